"""Attention layers: formulas, masks, blocks, dropout, gradients."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.attention import MultiHeadAttention, RelativeMultiHeadAttention, attend, shear
from jaxmodels.layers import Dropout
from jaxmodels.rope import RotaryPEMultiHeadAttention, RotaryValuePEMultiHeadAttention
from jaxmodels.synthesizer import SynthesizerAttention
from tests.common import assert_close, causal_mask, filled, normal, run

HEADS, D_K = 3, 4
D = HEADS * D_K

MAKERS = {
    "plain": lambda p: MultiHeadAttention(HEADS, D, p, rngs=nnx.Rngs(0)),
    "relative": lambda p: RelativeMultiHeadAttention(HEADS, D, p, rngs=nnx.Rngs(0)),
    "rotary": lambda p: RotaryPEMultiHeadAttention(HEADS, D, 0.5, p, rngs=nnx.Rngs(0)),
    "rotary_value": lambda p: RotaryValuePEMultiHeadAttention(HEADS, D, 0.5, 1.0, p, rngs=nnx.Rngs(0)),
    "random": lambda p: SynthesizerAttention("random", HEADS, D, 607, p, rngs=nnx.Rngs(0)),
    "dense+vanilla": lambda p: SynthesizerAttention("dense+vanilla", HEADS, D, 607, p, rngs=nnx.Rngs(0)),
}


def make(kind, dropout_prob=0.0, scale=0.3):
    return filled(lambda: MAKERS[kind](dropout_prob), scale=scale)


def softmax_attention(attention, query, key, value, mask=True):
    """The textbook's formula for the plain kind, in numpy."""
    q, k, v = (np.asarray(x) for x in (attention.query(query), attention.key(key), attention.value(value)))
    scores = np.einsum("ibhd,jbhd->ijbh", q, k) / np.sqrt(D_K)
    weights = np.where(np.asarray(mask)[..., None] if np.ndim(mask) else True, np.exp(scores), 0)
    out = np.einsum("ijbh,jbhd->ibhd", weights / weights.sum(axis=1, keepdims=True), v)
    return attention.output(jnp.asarray(out.reshape(*out.shape[:2], D)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("s", [1, 5, 11])
def test_plain_attention_by_its_formula(s):
    attention = make("plain")
    query, key, value = normal(0, s, 2, D), normal(1, 7, 2, D), normal(2, 7, 2, D)
    expected = softmax_attention(attention, query, key, value)
    assert_close(run(attention, query=query, key=key, value=value), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", list(itertools.product([1, 5], [7], [1, 2])))
def test_masks_of_every_allowed_shape(shape):
    attention, s, b = make("plain"), 5, 2
    query, key, value = normal(0, s, b, D), normal(1, 7, b, D), normal(2, 7, b, D)
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask[:, 0] = True
    expected = softmax_attention(attention, query, key, value, mask)
    for given in (mask, jnp.asarray(mask)):
        assert_close(run(attention, query=query, key=key, value=value, mask=given), expected)


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((5, 7), bool),
        np.ones((5, 7, 2, 1), bool),
        np.ones((5, 7, 2), np.int32),
        np.ones((5, 7, 2), np.float32),
        np.ones((7, 5, 2), bool),
        np.ones((4, 7, 2), bool),
        np.ones((5, 6, 2), bool),
        np.ones((5, 1, 2), bool),
        np.ones((5, 7, 3), bool),
        np.ones((5, 7, HEADS), bool),
        np.ones((0, 7, 2), bool),
        "causal",
        "full",
        "",
    ],
    ids=lambda mask: repr(mask) if isinstance(mask, str) else f"{mask.dtype}{list(mask.shape)}",
)
def test_refuses_other_masks(mask):
    attention = make("plain")
    x = jnp.zeros((7, 2, D))
    with pytest.raises(ValueError, match="mask"):
        attention(query=x[:5], key=x, value=x, mask=mask)


def test_refuses_an_unknown_name_of_a_mask():
    x = jnp.zeros((7, 2, D))
    with pytest.raises(ValueError, match="mask='Causal'"):
        make("plain")(query=x, key=x, value=x, mask="Causal")


@pytest.mark.parametrize("heads", [-1, 0, 5])
def test_refuses_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f"d_model=12 .*heads={heads}"):
        MultiHeadAttention(heads, 12, rngs=nnx.Rngs(0))


def test_bias_is_the_querys_and_the_keys():
    attention = MultiHeadAttention(3, 12, bias=False, rngs=nnx.Rngs(0))
    assert attention.query.linear.bias is None
    assert attention.key.linear.bias is None
    assert attention.value.linear.bias is not None
    assert attention.output.bias is not None


@pytest.mark.usefixtures("x64")
def test_a_query_that_may_attend_to_nothing_is_nan_and_no_other():
    attention, x = make("plain"), normal(0, 7, 2, D)
    mask = np.arange(7)[:, None, None] != np.full((7, 1), 3)
    y = run(attention, query=x, key=x, value=x, mask=mask)
    assert jnp.isnan(y[3]).all()
    chex.assert_tree_all_finite(np.delete(y, 3, axis=0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", MAKERS)
def test_large_scores_stay_finite(kind):
    attention, x = make(kind, scale=30.0), normal(0, 7, 2, D)
    loss = jax.jit(jax.value_and_grad(lambda a: (a(query=x, key=x, value=x, mask="causal") ** 2).sum()))
    chex.assert_tree_all_finite(loss(attention))


def both_ways(attention, x, mask):
    """Output and gradients by parameters and input."""

    def loss(attention, x):
        y = attention(query=x, key=x, value=x, mask=mask)
        return (jnp.sin(y + jnp.arange(y.size).reshape(y.shape))).sum(), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(attention, x)
    return y, gradients


BLOCK_EDGES = [1, 2, 63, 64, 65, 129, 601]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "n"), [*(("relative", n) for n in BLOCK_EDGES), *((kind, 67) for kind in MAKERS if kind != "relative")]
)
def test_blocks_equal_the_dense_mask(kind, n):
    attention, x = make(kind), normal(0, n, 2, D)
    fast = jax.jit(lambda a, x: both_ways(a, x, "causal"))(attention, x)
    dense = jax.jit(lambda a, x: both_ways(a, x, causal_mask(n)))(attention, x)
    assert_close(fast, dense)


@pytest.mark.parametrize("kind", MAKERS)
def test_bfloat16_stays_bfloat16_and_near(kind):
    attention = make(kind)
    x = normal(0, 7, 2, D)
    half, x_half = jax.jit(lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree))((attention, x))
    y = run(half, query=x_half, key=x_half, value=x_half, mask="causal")
    assert y.dtype == jnp.bfloat16
    expected = run(attention, query=x, key=x, value=x, mask="causal")
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05)


def relative_by_pairs(attention, query, key, value, causal):
    """The docstring's equation, one pair of tokens at a time; the queries stand at the end of the keys."""
    q, k, v = (np.asarray(x) for x in (attention.query(query), attention.key(key), attention.value(value)))
    e, b, u = (
        np.asarray(p[...]) for p in (attention.key_pos_embeddings, attention.key_pos_bias, attention.query_pos_bias)
    )
    out = np.zeros_like(q)
    for i in range(len(q)):
        place = len(k) - len(q) + i
        keys = [j for j in range(len(k)) if j <= place or not causal]
        scores = []
        for j in keys:
            row = attention.P - (place - j)
            score = np.einsum("bhd,bhd->bh", q[i] + u, k[j]) + np.einsum("bhd,hd->bh", q[i], e[row]) + b[row]
            scores.append(score / np.sqrt(D_K))
        weights = np.exp(scores) / np.exp(scores).sum(axis=0)
        out[i] = sum(w[..., None] * v[j] for w, j in zip(weights, keys, strict=True))
    return attention.output(jnp.asarray(out.reshape(*out.shape[:2], D)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("s", "causal"), [(7, True), (7, False), (3, True), (3, False), (1, True)])
def test_relative_attention_pair_by_pair(s, causal):
    attention, x = make("relative", scale=0.3), normal(0, 7, 2, D)
    expected = relative_by_pairs(attention, x[-s:], x, x, causal)
    mask = causal_mask(7)[-s:] if causal else None
    assert_close(run(attention, query=x[-s:], key=x, value=x, mask=mask), expected)


@pytest.mark.usefixtures("x64")
def test_relative_scores_of_rows_at_places_of_their_own():
    attention, query = make("relative"), normal(0, 3, HEADS, 5, D_K)
    first = jnp.array([4, 0, 2])
    by_row = jax.jit(lambda first: attention.position_scores(query, 11, first))(first)
    for row, place in enumerate(first.tolist()):
        expected = jax.jit(lambda q, place=place: attention.position_scores(q, 11, place))(query[row : row + 1])
        later = np.arange(11) > place + np.arange(5)[:, None]  # masked wherever places are not static
        assert_close(np.where(later, 0, by_row[row]), np.where(later, 0, expected[0]))


def test_relative_attention_reaches_back_no_further_than_its_tables(monkeypatch):
    monkeypatch.setattr(RelativeMultiHeadAttention, "P", 7)
    attention = make("relative")
    chex.assert_shape(attention.key_pos_embeddings[...], (14, HEADS, D_K))
    x = jnp.ones((8, 2, D))
    chex.assert_tree_all_finite(run(attention, query=x[:7], key=x[:7], value=x[:7]))
    for query, key in ((x, x), (x[:1], x), (x, x[:1])):
        with pytest.raises(ValueError, match=r"8 .*7"):
            attention(query=query, key=key, value=key)
    with pytest.raises(ValueError, match=r"8 .*7"):
        attention.init_cache(2, 8, jnp.float32)


@pytest.mark.parametrize(("s", "n"), [(1, 1), (1, 7), (5, 5), (5, 7), (7, 3)])
def test_shear(s, n):
    x = np.random.default_rng(0).normal(size=(2, 3, s, s + n - 1)).astype(np.float32)
    y = np.asarray(shear(jnp.asarray(x), n))
    chex.assert_shape(y, (2, 3, s, n))
    for i, j in itertools.product(range(s), range(n)):
        np.testing.assert_array_equal(y[..., i, j], x[..., i, s - 1 - i + j])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch_of_scores", [1, 2])
def test_dropout_acts_on_the_softmaxs_weights(batch_of_scores):
    """With the unit matrix as values, what comes out are the weights themselves."""
    n, rate = 211, 0.3
    scores = normal(0, batch_of_scores, HEADS, 5, n)
    value = jnp.asarray(np.broadcast_to(np.eye(n), (2, HEADS, n, n)))
    weights = np.broadcast_to(np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True), (2, HEADS, 5, n))
    dropped = np.asarray(attend(scores, value, None, Dropout(rate), jax.random.key(0)))
    kept = dropped != 0
    assert abs(kept.mean() - (1 - rate)) < 0.03
    assert_close(dropped[kept], weights[kept] / (1 - rate))
    assert (kept[0] != kept[1]).any()
    assert (kept[:, 0] != kept[:, 1]).any()
    assert_close(attend(scores, value, None, Dropout(rate), None), weights)


@pytest.mark.parametrize("kind", ["plain", "random"])
def test_dropout_in_blocks(kind):
    attention = make(kind, 0.4)
    x = normal(0, 67, 2, D)  # two blocks

    @jax.jit
    def draw(key):
        return attention(query=x, key=x, value=x, mask="causal", rng=key)

    draws = np.stack([draw(key) for key in jax.random.split(jax.random.key(0), 101)])
    certain = run(attention, query=x, key=x, value=x, mask="causal")
    error = draws.std(axis=0) / np.sqrt(len(draws)) + 1e-6
    assert (np.abs(draws.mean(axis=0) - certain) < 5.5 * error).all()
    assert draws.std(axis=0).min() > 0
    np.testing.assert_array_equal(draw(jax.random.key(5)), draw(jax.random.key(5)))
    assert (draw(jax.random.key(5)) != draw(jax.random.key(6))).any()


def test_dropout_differs_between_rows_and_blocks():
    """Rows with the same tokens, and tokens that all are alike, still lose weights of their own."""
    attention = make("random", 0.4)
    x = jnp.ones((128, 2, D))
    y = np.asarray(run(attention, query=x, key=x, value=x, mask="causal", rng=jax.random.key(0)))
    assert (y[1:, 0] != y[1:, 1]).any()
    assert (y[:64] != y[64:]).any()
