"""Synthesizer attention: each kind against its definition, factors, lengths."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.layers import Fixed
from jaxmodels.synthesizer import DenseSynthesizer, SynthesizerAttention, default_factors
from tests.common import SYNTHESIZERS, assert_close, causal_mask, filled, normal, run

HEADS, D_K, L = 3, 4, 11
D = HEADS * D_K
KINDS = ["vanilla", *SYNTHESIZERS, "dense+random+factorized_random"]


def make(kind, max_len=L, factors=None):
    return filled(lambda: SynthesizerAttention(kind, HEADS, D, max_len, factors=factors, rngs=nnx.Rngs(0)))


def softmax(x, axis=-1):
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def by_head(projection, x):
    return np.asarray(x @ projection.linear.kernel + projection.linear.bias).reshape(*x.shape[:2], HEADS, D_K)


def dense_logits(dense, x):
    hidden = np.maximum(by_head(dense.hidden, x), 0)
    return np.einsum("ibhd,hdj->bhij", hidden, dense.projection) + np.asarray(dense.projection_bias)[:, None]


def logits_of(attention, part, x, max_len):
    """Logits of each kind by its definition in the paper: [B or 1, H, S, l] (vanilla: [B, H, S, N])."""
    match part:
        case "vanilla":
            q, k = by_head(attention.query, x), by_head(attention.key, x)
            return np.einsum("ibhd,jbhd->bhij", q, k) / math.sqrt(D_K)
        case "dense":
            return dense_logits(attention.dense, x)
        case "random" | "fixed_random":
            return np.asarray(getattr(attention, part).table)[None, :, : len(x)]
        case "factorized_dense":
            a = dense_logits(attention.factorized_dense.factor_a, x)
            c = dense_logits(attention.factorized_dense.factor_c, x)
            j = np.arange(max_len)
            return a[..., j // c.shape[-1]] * c[..., j % c.shape[-1]]
        case "factorized_random":
            left, right = (np.asarray(t) for t in (attention.factorized_random.left, attention.factorized_random.right))
            return (left @ right.swapaxes(1, 2))[None, :, : len(x)]


def expected(attention, x, mask, max_len=L):
    parts, n = attention.kind.split("+"), len(x)
    logits = [logits_of(attention, part, x, max_len)[..., :n] for part in parts]
    weights = softmax(np.append(np.asarray(attention.alpha), 0)) if len(parts) > 1 else [1]
    total = sum(w * b for w, b in zip(weights, logits, strict=True))
    total = np.where(np.broadcast_to(mask, (n, n, x.shape[1])).transpose(2, 0, 1)[:, None], total, -np.inf)
    out = np.einsum("bhij,jbhd->ibhd", softmax(total), by_head(attention.value, x))
    return out.reshape(n, -1, D) @ np.asarray(attention.output.kernel) + np.asarray(attention.output.bias)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [7, L])
def test_each_kind_by_its_definition(kind, n):
    attention, x = make(kind), normal(0, n, 2, D)
    padding = np.ones((1, n, 2), bool)
    padding[0, :3, 1] = False
    for mask in (None, padding, causal_mask(n)):
        given = {} if mask is None else {"mask": mask}
        wanted = expected(attention, x, np.ones((1, n, 1), bool) if mask is None else mask)
        assert_close(run(attention, query=x, key=x, value=x, **given), wanted)
    assert_close(run(attention, query=x, key=x, value=x, mask="causal"), wanted)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("max_len", "factors"), [(11, (2, 7)), (11, (11, 1)), (11, (1, 13)), (12, (3, 4)), (7, None)])
def test_factors(max_len, factors):
    attention, x = make("factorized_dense", max_len, factors), normal(0, 7, 2, D)
    a, c = attention.factorized_dense.factor_a, attention.factorized_dense.factor_c
    assert (a.projection.shape[-1], c.projection.shape[-1]) == (factors or default_factors(max_len))
    assert_close(run(attention, query=x, key=x, value=x), expected(attention, x, np.ones((1, 7, 1), bool), max_len))


@pytest.mark.parametrize(
    ("max_len", "factors"), [(1, (1, 1)), (2, (2, 1)), (9, (3, 3)), (10, (4, 3)), (12, (4, 3)), (13, (4, 4))]
)
def test_default_factors(max_len, factors):
    assert default_factors(max_len) == factors


@pytest.mark.parametrize("factors", [(3, 3), (0, 11), (-4, -4)])
def test_refuses_factors_that_do_not_reach(factors):
    with pytest.raises(ValueError, match=r"factors=.*max_len=11"):
        make("factorized_dense", factors=factors)


@pytest.mark.parametrize("kind", ["", "sparse", "dense+", "dense+dense", "random+sparse", "Dense", "dense random"])
def test_refuses_an_unknown_kind(kind):
    with pytest.raises(ValueError, match=r"kind=.*factorized_random"):
        make(kind)


@pytest.mark.parametrize("max_len", [0, -1])
def test_refuses_an_empty_table(max_len):
    with pytest.raises(ValueError, match=f"max_len={max_len}"):
        make("random", max_len)


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_more_tokens_than_its_logits_reach(kind):
    attention, x = make(kind), normal(0, L + 1, 2, D)
    for query, key in ((x, x), (x[:1], x), (x, x[:1])):
        with pytest.raises(ValueError, match=f"{L + 1} .*max_len={L}"):
            attention(query=query, key=key, value=key)
    with pytest.raises(ValueError, match=f"{L + 1} .*max_len={L}"):
        attention.init_cache(2, L + 1, jnp.float32)


def test_fixed_logits_are_no_parameter_and_take_no_gradient():
    attention, x = make("fixed_random+vanilla"), normal(0, 7, 2, D)
    assert isinstance(attention.fixed_random.table, Fixed)
    assert ("fixed_random", "table") not in nnx.to_flat_state(nnx.state(attention, nnx.Param))
    gradient = jax.jit(jax.grad(lambda a: (a(query=x, key=x, value=x) ** 2).sum()))(attention)
    assert not jnp.any(gradient.fixed_random.table[...])
    assert jnp.any(gradient.alpha[...])
    trained = make("random+vanilla")
    gradient = jax.jit(jax.grad(lambda a: (a(query=x, key=x, value=x) ** 2).sum()))(trained)
    assert jnp.any(gradient.random.table[...])


@pytest.mark.parametrize("kind", KINDS)
def test_starts_with_equal_weights_of_its_parts(kind):
    attention = nnx.eval_shape(lambda: SynthesizerAttention(kind, HEADS, D, L, rngs=nnx.Rngs(0)))
    parts = kind.count("+") + 1
    if parts == 1:
        assert not hasattr(attention, "alpha")
    else:
        chex.assert_shape(attention.alpha, (parts - 1,))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["random", "fixed_random", "dense", "factorized_random"])
def test_keys_are_not_read_without_vanilla(kind):
    attention, x = make(kind), normal(0, 7, 2, D)
    assert not hasattr(attention, "key")
    assert "key" not in attention.init_cache(2, 7, jnp.float64)
    assert_close(
        run(attention, query=x, key=x, value=x), run(attention, query=x, key=jnp.full_like(x, jnp.nan), value=x)
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("n", [1, 5, 7])
def test_dense_synthesizer(lead, n):
    layer = filled(lambda: DenseSynthesizer(7, 5, rngs=nnx.Rngs(0)))
    x, v = normal(0, *lead, n, 5), normal(1, *lead, n, 5)
    w1, b1, w2, b2 = (np.asarray(p) for f in (layer.linear1, layer.linear2) for p in (f.kernel, f.bias))
    chex.assert_shape([w1, w2], [(5, 5), (5, 7)])
    logits = (np.maximum(np.asarray(x) @ w1 + b1, 0) @ w2 + b2)[..., :n]
    assert_close(run(layer, x, v), softmax(logits) @ np.asarray(v))


def test_dense_synthesizer_refuses_more_tokens_than_max_len():
    layer = filled(lambda: DenseSynthesizer(7, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"8 .*max_len=7"):
        layer(normal(0, 2, 8, 5), normal(1, 2, 8, 5))
