"""Quantized models against the arithmetic of LLM.int8 written out in NumPy, and what they are for."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.convert import from_torch, to_torch
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.neox import save_neox
from jaxmodels.generate import generate
from jaxmodels.layers import Linear
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.neox.int8 import GATHERED, LINEARS, Int8Linear, outliers, product, rounded
from jaxmodels.text import CharVocabulary, load_corpus, split
from tests.common import B, S, assert_close, filled, language_model, normal, run
from tests.jaxmodels.neox.common import CONFIG, START, ids, neox

ROWS, IN, OUT = (3, 7), 131, 17


def weights_in_8_bits(kernel):
    """int8 values [I, O] and the float16 magnitude of each output row [O], value by value in Python's own floats."""
    kernel = np.asarray(kernel).astype(np.float16)
    absmax = np.abs(kernel).max(0)
    q = [[round(127 * float(w) / float(s)) if s else 0 for w, s in zip(row, absmax, strict=True)] for row in kernel]
    return np.asarray(q, np.int64), absmax


def in_numpy(x, kernel, threshold):
    """The sums of whole numbers [R, O], their float32 scales [R, O], and the outliers' part in float64."""
    x = np.asarray(x).reshape(-1, x.shape[-1]).astype(np.float16)
    q_w, s_w = weights_in_8_bits(kernel)
    features = np.asarray([threshold > 0 and any(abs(float(v)) >= threshold for v in column) for column in x.T])
    sums, s_x = [], []
    for row in x:
        s = max([abs(float(v)) for v in row if not threshold or abs(float(v)) < threshold], default=0.0)
        q = [0 if out or not s else round(127 * float(v) / s) for v, out in zip(row, features, strict=True)]
        sums.append(np.asarray(q, np.int64) @ q_w)
        s_x.append(s)
    scales = np.float32(s_x)[:, None] * (s_w.astype(np.float32) / np.float32(127**2))
    halves = (q_w.astype(np.float32) * (s_w.astype(np.float32) / np.float32(127))).astype(np.float16)
    return np.asarray(sums), scales, x[:, features].astype(np.float64) @ halves[features].astype(np.float64)


def rows(n_outliers=0, seed=1, size=IN):
    """Inputs below 6 but for n_outliers features, each with one element beyond it."""
    x = jnp.clip(normal(seed, *ROWS, size), -4, 4)
    for i, feature in enumerate(np.random.default_rng(seed).permutation(size)[:n_outliers]):
        x = x.at[i % 3, i % 7, feature].set((-1) ** i * (6 + 2.3 * i))
    return x


def float_linear():
    return filled(lambda: Linear(IN, OUT, rngs=nnx.Rngs(0)))


def int8_linear(threshold):
    return Int8Linear(float_linear(), threshold)


def times(linear, x):
    """The product with the weights, without the bias, compiled."""
    call = jax.jit(lambda linear, x: product(x, linear.kernel[...], linear.absmax[...], linear.threshold))
    return np.asarray(call(linear, x)).reshape(-1, OUT)


def test_weights_are_rounded_as_stated():
    kernel = normal(0, IN, OUT).at[:, 5].set(0)
    kernel = kernel.at[0, 0].set(127.0).at[1:4, 0].set(jnp.asarray([0.5, -1.5, 2.5]))  # ties, to even
    linear = Linear(IN, OUT, rngs=nnx.Rngs(0))
    linear.kernel[...] = kernel
    q, absmax = weights_in_8_bits(kernel)
    quantized = Int8Linear(linear, 6.0)
    assert (quantized.kernel.dtype, quantized.absmax.dtype) == (jnp.int8, jnp.float16)
    np.testing.assert_array_equal(quantized.kernel[...], q)
    np.testing.assert_array_equal(quantized.absmax[...], absmax)
    assert q[1:4, 0].tolist() == [0, -2, 2]
    assert np.abs(np.delete(q, 5, axis=1)).max(0).tolist() == [127] * (OUT - 1)


@pytest.mark.parametrize("size", [IN, 1_511])  # 1,511 · 127² is beyond float32's whole numbers
def test_whole_numbers_are_exact_to_the_bit(size):
    kernel, x = jnp.abs(normal(0, size, OUT)), jnp.abs(rows(size=size))
    kernel, x = (jnp.maximum(a, 0.9 * a.max()) for a in (kernel, x))
    linear = Linear(size, OUT, rngs=nnx.Rngs(0))
    linear.kernel[...] = kernel
    sums, scales, _ = in_numpy(x, kernel, 0)
    assert (sums.max() > 2**24) == (size > IN)
    np.testing.assert_array_equal(times(Int8Linear(linear, 0.0), x), sums.astype(np.float32) * scales)


@pytest.mark.parametrize("n_outliers", [0, 1, 7, GATHERED, GATHERED + 1, IN])
def test_outlier_features_are_apart(n_outliers):
    linear, x = float_linear(), rows(n_outliers)
    sums, scales, apart = in_numpy(x, linear.kernel[...], 6.0)
    assert apart.any() == (n_outliers > 0)
    whole = sums.astype(np.float32) * scales
    y = times(Int8Linear(linear, 6.0), x)
    np.testing.assert_allclose(y, whole + apart, rtol=0, atol=2e-6 * np.abs(apart).max(initial=1))
    if n_outliers < GATHERED:  # more of them leave float32 too few digits
        np.testing.assert_array_equal(np.rint((y - apart) / scales), sums)


def test_the_threshold_itself_is_an_outlier_and_so_is_its_negative():
    for value, apart in ((6.0, True), (-6.0, True), (5.996, False)):
        linear, x = float_linear(), rows().at[1, 2, 3].set(value)
        _, _, expected = in_numpy(x, linear.kernel[...], 6.0)
        assert expected.any() == apart
        sums, scales, _ = in_numpy(x, linear.kernel[...], 0)
        assert (np.rint(times(Int8Linear(linear, 6.0), x) / scales) == sums).all() == (not apart)


def test_few_outliers_do_not_cost_the_whole_weights():
    """The common branches have no 16-bit array of the weights' size."""
    linear = int8_linear(6.0)
    program = jax.make_jaxpr(outliers)(
        rows(1).astype(jnp.float16), jnp.zeros(IN, bool), linear.kernel[...], linear.absmax[...]
    )
    (switch,) = [eqn for eqn in program.eqns if eqn.primitive.name == "cond"]
    none, few, many = map(str, switch.params["branches"])
    assert f"f16[{IN},{OUT}]" in many
    assert f"f16[{IN},{OUT}]" not in none + few
    assert f"f16[{GATHERED},{OUT}]" in few


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_zeros_give_the_bias(threshold):
    linear = float_linear()
    linear.kernel[...] = linear.kernel[...].at[:, 4].set(0)
    x = rows(2).at[1].set(0)
    y = run(Int8Linear(linear, threshold), x)
    chex.assert_tree_all_finite(y)
    np.testing.assert_array_equal(y[1], np.broadcast_to(linear.bias[...], (7, OUT)))
    np.testing.assert_array_equal(y[..., 4], np.full(ROWS, linear.bias[4]))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [1e5, jnp.inf, jnp.nan])
def test_what_leaves_float16_is_seen_in_its_row_alone(threshold, value):
    y = run(int8_linear(threshold), rows(2).at[1, 2, 3].set(value))
    finite = np.ones(ROWS, bool)
    finite[1, 2] = False
    np.testing.assert_array_equal(np.isfinite(y).all(-1), finite)
    np.testing.assert_array_equal(np.isfinite(y).any(-1), finite)


def test_nothing_is_divided_by_zero():
    """Though NaN becomes 0 as a whole number here, no machine has to do so."""
    with jax.debug_nans(True):
        q, absmax = rounded(jnp.zeros(ROWS, jnp.float16).at[0].set(1), -1)
    assert (q[:, 0].tolist(), absmax.tolist()) == ([127, 0, 0], [1, 0, 0])


def test_rows_share_their_outlier_features_and_nothing_else():
    """The outliers of a call depend on all its rows: a token decoded alone is rounded differently than in its text."""
    x = rows(1)  # an outlier in row (0, 0) alone
    apart, none = int8_linear(6.0), int8_linear(0.0)
    assert (run(apart, x)[1] != run(apart, x[1])).any()
    np.testing.assert_array_equal(run(none, x)[1], run(none, x[1]))


@pytest.mark.slow
def test_the_result_is_in_the_dtype_that_was_computed_in():
    x = rows(1)
    for dtype in ("float32", "bfloat16", "float16"):
        assert run(int8_linear(6.0), x.astype(dtype)).dtype == jnp.float32  # as the bias
    linear = int8_linear(6.0)
    linear.bias = nnx.Param(linear.bias[...].astype(jnp.bfloat16))
    assert run(linear, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    model = quantize(neox(dtype="bfloat16"))
    assert run(model, ids()).dtype == jnp.bfloat16


class Stated(nnx.Module):
    """A linear map computed by the NumPy statement, op by op: a callback's thread would not be in float64."""

    def __init__(self, linear):
        self.kernel, self.bias = linear.kernel, linear.bias

    def __call__(self, x):
        return self.computed(np.asarray(x), np.asarray(self.kernel[...])) + self.bias[...]

    @staticmethod
    def computed(x, kernel):
        sums, scales, _ = in_numpy(x, kernel, 0)
        return (sums * scales).reshape(*x.shape[:-1], -1).astype(x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_a_model_is_the_statement_in_all_its_linear_maps(x64, form):
    model = neox(stacked=False, parallel_residual=form == "parallel")
    stated = jax.tree.map(lambda array: array, model)
    for layer, (owner, name) in itertools.product(stated.layers, LINEARS):
        part = getattr(layer, owner)
        setattr(part, name, Stated(getattr(part, name)))
    expected = stated(ids())
    assert_close(run(quantize(model, 0), ids()), expected, 1e-6)
    assert float(jnp.abs(run(model, ids()) - expected).max()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_scanned_listed_and_plain_layers_agree(x64, threshold):
    model, start = neox(), START
    quantized = quantize(model, threshold)
    chex.assert_trees_all_equal(quantize(model.unstacked(), threshold), quantized.unstacked())
    chex.assert_trees_all_equal(quantized.unstacked().stacked(), quantized)
    expected = run(quantized, ids(), start)
    lost = float(jnp.abs(expected - run(model, ids(), start)).max())
    assert 1e-3 < lost < 1
    # The outliers' products are summed in float32, in an order that each program has for itself; now and then that
    # turns a rounding to float16. Without them all sums are of whole numbers.
    limit = 1e-3 * lost if threshold else 1e-12
    plain = jax.jit(lambda model, ids, start: model.plain(ids, start))
    for found in (run(quantized.unstacked(), ids(), start), plain(quantized, ids(), start)):
        assert float(jnp.abs(found - expected).max()) < limit


def through_cache(model, start=None, cut=7):
    prefill, decode = jax.jit(lambda m, i, c: m.prefill(i, c)), jax.jit(lambda m, i, c: m.decode(i, c))
    last, cache = prefill(model, ids()[:, :cut], model.init_cache(B, S, start=start))
    logits = [last[:, None]]
    for i in range(cut, S):
        more, cache = decode(model, ids()[:, i : i + 1], cache)
        logits.append(more)
    return jnp.concatenate(logits, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_at_threshold_0_cached_equals_uncached_ragged_too(x64, stacked):
    model, start = quantize(neox(stacked), 0), jnp.minimum(START, 6)
    assert_close(through_cache(model), run(model, ids())[:, 6:], 1e-6)
    full = run(model, ids(), start)
    assert_close(through_cache(model, start), full[:, 6:], 1e-6)
    for row in (1, 2):
        alone = run(model, ids()[row : row + 1, int(start[row]) :])
        assert_close(full[row, int(start[row]) :], alone[0], 1e-6)


@pytest.mark.slow
def test_with_outliers_cached_is_near_uncached(x64):
    model = neox(stacked=False)
    quantized = quantize(model, 2.0)
    full, exact = run(quantized, ids())[:, 6:], run(model, ids())[:, 6:]
    cached = through_cache(quantized)
    assert 1e-6 < float(jnp.abs(cached - full).max()) < 3 * float(jnp.abs(full - exact).max())


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_generation_is_the_argmax_of_full_forwards(x64, stacked):
    model, n = quantize(neox(stacked), 0), 4
    new = generate(model, ids()[:, :7], n)
    text = jnp.concatenate([ids()[:, :7], new], axis=1)
    np.testing.assert_array_equal(new, run(model, text)[:, 6:-1].argmax(-1))
    assert generate(quantize(neox(stacked)), ids()[:, :7], n).shape == (B, n)


def block_bytes(model):
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(model.layers))


@pytest.mark.slow
def test_blocks_keep_under_55_percent_of_their_bfloat16_bytes():
    config = dataclasses.replace(CONFIG, n_hidden=6 * 11, n_ff=None, rope_percentage=1.0)
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), NeoX(config, rngs=nnx.Rngs(0)))
    assert block_bytes(quantize(half)) < 0.55 * block_bytes(half)
    for preset in (NeoXConfig.pythia_70m(), NeoXConfig.neox_20b()):
        whole = nnx.eval_shape(lambda preset=preset: NeoX(preset, rngs=nnx.Rngs(0)))
        quantized = nnx.eval_shape(quantize, whole)
        assert block_bytes(quantized) < 0.55 * block_bytes(whole) / 2  # its biases stay in float32


def test_the_model_that_was_quantized_is_left_as_it_was():
    model = neox()
    before = jax.tree.map(np.asarray, nnx.state(model))
    quantized = quantize(model)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, nnx.state(model)), before)
    assert (model.int8_threshold, quantized.int8_threshold) == (None, 6.0)
    assert quantized.is_stacked


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, stacked):
    model = quantize(jax.tree.map(lambda array: array.astype(jnp.bfloat16), neox(stacked)), 3.5)
    jaxmodels.save(model, tmp_path / "model")
    loaded = jaxmodels.load(tmp_path / "model")
    assert (loaded.int8_threshold, loaded.is_stacked) == (3.5, stacked)
    chex.assert_trees_all_equal_dtypes(nnx.state(loaded), nnx.state(model))
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))
    np.testing.assert_array_equal(run(loaded, ids()), run(model, ids()))


@pytest.mark.parametrize("threshold", [-1, "6", [6]])
def test_a_saved_threshold_that_is_none_is_refused(tmp_path, threshold):
    jaxmodels.save(quantize(neox()), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    content["config"]["int8_threshold"] = threshold
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"threshold|config"):
        jaxmodels.load(tmp_path / "model")


def test_other_formats_refuse_int8_weights(tmp_path):
    model = quantize(neox())
    for save in (save_hf, save_neox):
        with pytest.raises(ValueError, match="quantized"):
            save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="absmax"):
        from_torch(model, to_torch(neox()))


@pytest.mark.slow
def test_what_cannot_be_quantized_is_refused():
    model = neox()
    for threshold in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"threshold={threshold}"):
            quantize(model, threshold)
    for other in (language_model("rotary"), model.layers, None):
        with pytest.raises(ValueError, match=type(other).__name__):
            quantize(other)
    with pytest.raises(ValueError, match=r"threshold=0\.0"):
        quantize(quantize(model, 0))
    for value in (7e4, jnp.nan):
        wrong = neox()
        wrong.layers.ffn.dense_h4_h.kernel[...] = wrong.layers.ffn.dense_h4_h.kernel[...].at[1, 2, 3].set(value)
        with pytest.raises(ValueError, match="float16"):
            quantize(wrong)


def test_gradients_are_refused():
    def loss(model):
        return model(ids()).sum()

    model = quantize(neox())
    with pytest.raises(TypeError, match="int8"):
        jax.grad(loss)(model)
    with pytest.raises(TypeError, match="no gradients"):  # of the embedding and the norms alone
        nnx.grad(loss)(model)


LENGTH, BATCH, STEPS = 41, 7, 150
PLANTED, FACTOR = (7, 31), 256.0  # a power of two: 16-bit weights and products lose nothing


def loss(model, ids):
    """Mean cross-entropy of the next character, in nats."""
    logits = model(ids[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@jax.jit
def trained(model, batches):
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))

    def step(carry, ids):
        model, state = carry
        updates, state = optimizer.update(jax.grad(loss)(model, ids), state, model)
        return (optax.apply_updates(model, updates), state), None

    return jax.lax.scan(step, (model, optimizer.init(model)), batches)[0][0]


def with_planted_outliers(model):
    """A bfloat16 model, the same but for rounding: its blocks read two features that are large, with small weights."""
    model = jax.tree.map(lambda array: array, model)
    factors = jnp.ones(model.settings.n_hidden, jnp.bfloat16).at[jnp.asarray(PLANTED)].set(FACTOR)
    for norm, linear in (
        (model.layers.pre_ln_attn, model.layers.attention.qkv_lin),
        (model.layers.pre_ln_ffn, model.layers.ffn.dense_h_h4),
    ):
        norm.scale[...] *= factors
        norm.bias[...] *= factors
        linear.kernel[...] /= factors[:, None]
    return model


@pytest.mark.slow
def test_outlier_features_ruin_int8_unless_they_are_apart():
    text = load_corpus("python_docs")
    vocabulary = CharVocabulary.of(text)
    training, validation = (vocabulary.encode(part) for part in split(text))
    begins = np.random.default_rng(0).integers(0, len(training) - LENGTH, (STEPS, BATCH, 1))
    config = NeoXConfig(len(vocabulary), 3 * 22, 2, 3, rope_percentage=1.0)
    model = trained(NeoX(config, rngs=nnx.Rngs(0)), jnp.asarray(training[begins + np.arange(LENGTH)]))

    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), model)
    planted = with_planted_outliers(half)
    unseen = jnp.asarray(validation[739 * np.arange(61)[:, None] + np.arange(LENGTH)])
    measure = jax.jit(loss)
    smooth, expected = float(measure(half, unseen)), float(measure(planted, unseen))
    assert expected < 2.5  # uniform: 4.63
    assert abs(expected / smooth - 1) < 1e-3
    apart, together = (float(measure(quantize(planted, threshold), unseen)) for threshold in (6.0, 0.0))
    print(f"bfloat16 {expected:.4f}, int8: threshold 6 {apart:.4f}, threshold 0 {together:.4f}")
    assert abs(apart / expected - 1) < 0.01
    assert together / expected - 1 > 0.03
