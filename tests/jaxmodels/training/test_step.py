"""The training step: losses, accumulation, rematerialization, mixed precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmodels.layers import Fixed
from jaxmodels.training.plan.flops import count, of_forward
from jaxmodels.training.step import Numerics, Program, State, token_losses
from jaxmodels.transformer import AutoregressiveTransformer
from tests.train_common import IDS, Bigrams, S, V, program

B = 6
TOKENS = np.stack([IDS[i : i + S + 1] for i in range(B)])
BATCH = {"tokens": TOKENS}
STOP = np.zeros(1, bool)


def transformer(seed: int = 0) -> AutoregressiveTransformer:
    return AutoregressiveTransformer(V, 12, 3, 17, 1, "plain", rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def state():
    """State of the transformer above before its first step."""
    return program(make=transformer).make_state(0)


def gradients(made: Program, state: State):
    return jax.jit(lambda state: made.gradients(state, BATCH))(state)


def test_losses_are_of_the_next_tokens_for_either_layout_of_a_model():
    model = Bigrams()
    logits = jax.nn.log_softmax(model(TOKENS[:, :-1].T))
    expected = -np.take_along_axis(np.asarray(logits), TOKENS[:, 1:].T[..., None], 2)[..., 0].T
    np.testing.assert_allclose(token_losses(model, BATCH), expected, rtol=1e-5)

    class BatchFirst:
        sequence_axis = 1

        def __call__(self, ids):
            return model(ids.T).swapaxes(0, 1)

    np.testing.assert_allclose(token_losses(BatchFirst(), BATCH), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_accumulated_gradients_equal_those_of_the_whole_batch(state):
    wide = {name: np.asarray(array, np.float64) for name, array in state.params.items()}
    wide = dataclasses.replace(state, params=wide)
    loss, whole = gradients(program(make=transformer), wide)
    assert loss.dtype == jnp.float64
    for parts in (2, 3):
        mean, summed = gradients(program(make=transformer, numerics=Numerics(parts)), wide)
        np.testing.assert_allclose(mean, loss, rtol=1e-13)
        for name, gradient in whole.items():
            np.testing.assert_allclose(summed[name], gradient, rtol=0, atol=1e-13 * np.abs(gradient).max() + 1e-16)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_cross_entropy_in_chunks_does_not_change_the_gradients(state):
    wide = {name: np.asarray(array, np.float64) for name, array in state.params.items()}
    wide = dataclasses.replace(state, params=wide)
    _, expected = gradients(program(make=transformer), wide)
    for losses in (token_losses, lambda model, batch, rng: token_losses(model, batch, rng) * 1.0):
        made = program(make=transformer, numerics=Numerics(loss_chunk=4 * B), losses=losses)
        with made.tracing():
            traced = jax.jit(lambda state, made=made: made.gradients(state, BATCH)).trace(wide)
        text = str(traced.jaxpr)
        assert f"f64[4,{B},{V}]" in text
        assert f"f64[{S},{B},{V}]" not in text
        _, found = traced.lower().compile()(wide)
        for name, gradient in expected.items():
            np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-13 * np.abs(gradient).max() + 1e-16)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("losses", [token_losses, lambda model, batch, rng: token_losses(model, batch, rng) * 1.0])
def test_padding_is_in_no_loss_and_every_other_token_counts_once(state, losses):
    wide = {name: np.asarray(array, np.float64) for name, array in state.params.items()}
    wide = dataclasses.replace(state, params=wide)
    lengths = np.asarray([1, 7, S, 3, 2, 5])  # of the predicted tokens
    batch = {"tokens": TOKENS, "predicted": np.arange(S) < lengths[:, None]}

    def whole(params):
        model = program(make=transformer).model(dataclasses.replace(wide, params=params))
        found = [token_losses(model, {"tokens": row[None, : n + 1]}) for row, n in zip(TOKENS, lengths, strict=True)]
        return jnp.concatenate(found, axis=1).mean()

    loss, expected = jax.jit(jax.value_and_grad(whole))(wide.params)
    for numerics in (Numerics(), Numerics(2), Numerics(3, loss_chunk=4)):
        made = program(make=transformer, numerics=numerics, losses=losses)
        with made.tracing():
            found, gradient = jax.jit(lambda state, batch, made=made: made.gradients(state, batch))(wide, batch)
        np.testing.assert_allclose(found, loss, rtol=1e-13)
        for name, array in expected.items():
            np.testing.assert_allclose(gradient[name], array, rtol=0, atol=1e-13 * np.abs(array).max() + 1e-16)
    if losses is token_losses:
        rows = (
            program(make=transformer)
            .lower_evaluation(batch)
            .compile()(dataclasses.replace(state, optimizer=None), batch)
        )
        np.testing.assert_allclose(rows.sum() / lengths.sum(), loss, rtol=1e-5)


@pytest.mark.slow
def test_rematerialization_does_not_change_the_gradients(state):
    none, dots, layers = (program(make=transformer, numerics=Numerics(remat=r)) for r in ("none", "dots", "layers"))
    products = {}
    for made in (none, dots, layers):
        with made.tracing():
            products[made] = count(lambda state, made=made: made.gradients(state, BATCH), state)
    forward = of_forward(none, none.abstract_batch(BATCH))
    assert products[none] < products[layers] <= products[none] + forward
    assert products[none] <= products[dots] < products[layers]  # keeps the products, but for those of attention
    loss, expected = gradients(none, state)
    with layers.tracing():
        same_loss, got = gradients(layers, state)
    np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
    for name, gradient in expected.items():
        np.testing.assert_allclose(got[name], gradient, atol=1e-6)


def test_bfloat16_computes_and_float32_stores(state):
    made = program(make=transformer, numerics=Numerics(compute_dtype="bfloat16"))
    assert {array.dtype for array in state.params.values()} == {jnp.dtype("float32")}
    assert {array.dtype for array in jax.tree.leaves(state.optimizer)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    loss, found = gradients(made, state)
    assert loss.dtype == jnp.float32
    assert {array.dtype for array in found.values()} == {jnp.dtype("float32")}
    exact, _ = gradients(program(make=transformer), state)
    assert loss != exact
    np.testing.assert_allclose(loss, exact, rtol=0.01)
    text = str(jax.make_jaxpr(lambda state: made.gradients(state, BATCH))(state))
    assert "bf16[12,17]" in text


def test_only_trained_parameters_change():
    class WithTable(Bigrams):
        def __init__(self):
            super().__init__()
            self.table = Fixed(jnp.ones(V))
            self.alpha = nnx.Param(jnp.zeros(V))

        def __call__(self, ids, rng=None):
            return super().__call__(ids, rng) * self.table[...] + self.alpha[...]

    made = program(make=WithTable, trains=lambda path: path != "alpha")
    state = made.init(np.uint32(0))
    assert (set(state.params), set(state.fixed)) == ({"src_embed.embedding"}, {"alpha", "table"})
    after, _ = made.step(state, BATCH, STOP)
    assert (after.params["src_embed.embedding"] != state.params["src_embed.embedding"]).any()
    np.testing.assert_array_equal(after.fixed["table"], state.fixed["table"])
    assert made.model(after).table[...].shape == (V,)


@pytest.mark.slow
def test_dropout_differs_by_step_part_and_key_and_is_reproducible():
    frozen = optax.sgd(0.0)

    def losses(seed: int, **options) -> list[float]:
        """Losses of three steps over one batch, without learning from it."""
        made = program(frozen, dropout=True, **options)
        state, found, step = made.make_state(seed), [], jax.jit(made.step)
        for _ in range(3):
            state, metrics = step(state, BATCH, STOP)
            found.append(float(metrics.loss))
        return found

    assert len(set(losses(0) + losses(1) + losses(0, numerics=Numerics(2)))) == 9
    assert losses(0) == losses(0)


@pytest.mark.slow
def test_the_state_is_donated_and_keeps_its_shardings():
    made = program(make=transformer)
    state = made.make_state(0)  # not the fixture's: it is donated
    compiled = made.lower_step(BATCH).compile()
    old = state.params["src_embed.embedding"]
    before = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), state)
    for _ in range(3):
        state, _ = compiled(state, BATCH, STOP)
    assert old.is_deleted()
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), state) == before
    with pytest.raises(TypeError, match="compiled"):
        compiled(state, {"tokens": TOKENS[:, :-1]}, STOP)


def test_initial_weights_depend_on_the_models_seed():
    first, again, other = (program(make=lambda seed=seed: Bigrams(seed)).make_state(seed) for seed in (0, 0, 1))
    name = "src_embed.embedding"
    np.testing.assert_array_equal(first.params[name], again.params[name])
    assert (first.params[name] != other.params[name]).any()
