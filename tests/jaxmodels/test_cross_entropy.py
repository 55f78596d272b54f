"""Log-probabilities in chunks, compared with those of whole logits."""

import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxmodels import cross_entropy
from jaxmodels.cross_entropy import chunk_length, chunks, mean_nats, token_log_probs, token_nats
from jaxmodels.sharding import AXES, DividedVocabulary
from tests.common import assert_close, normal
from tests.train_common import EIGHT_DEVICES, ROOT

T, D, V = 11, 5, 23


@pytest.fixture
def _small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 4 * V)


def problem(n: int):
    draw = np.random.default_rng(1)
    return normal(0, T, D), normal(1, D, V), *map(jnp.asarray, (draw.integers(0, T, n), draw.integers(0, V, n)))


@pytest.mark.usefixtures("x64", "_small_chunks")
@pytest.mark.parametrize(("size", "n"), [(13, None), (13, 13), (13, 7), (13, 0), (4, None), (1, None)])
def test_chunks_give_the_log_softmax(size, n):
    x, weights, positions, targets = problem(size)
    found = jax.jit(lambda n: token_log_probs(lambda x: x @ weights, x, positions, targets, n, greedy=True))(n)
    expected = jax.nn.log_softmax(x @ weights)[positions]
    valid = np.arange(size) < (size if n is None else n)
    assert_close(found[0], np.where(valid, expected[jnp.arange(size), targets], 0))
    np.testing.assert_array_equal(found[1], (expected.argmax(-1) == targets) & valid)
    assert found[0].dtype == jnp.float64


B, S = 3, 11
WEIGHTS = np.maximum(np.random.default_rng(3).normal(size=(B, S)), 0)  # of the tokens in a loss, some of them 0


READOUTS = {"tied": lambda p, x: x @ p["table"].T, "untied": lambda p, x: x @ p["kernel"] + p["bias"]}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["mean", "weighted mean", "weighted"])
@pytest.mark.parametrize(("readout", "axis"), [("tied", 0), ("untied", 1)])
def test_losses_and_gradients_are_those_of_whole_logits(readout, kind, axis):
    parameters = {"table": normal(4, V, D), "kernel": normal(5, D, V), "bias": normal(6, V)}
    drawn = (np.random.default_rng(seed).integers(0, V, (B, S)) for seed in (0, 1))
    ids, targets, weights = (jnp.asarray(a if axis else a.T) for a in (*drawn, WEIGHTS))
    read = READOUTS[readout]

    def whole(p):
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(read(p, jnp.tanh(p["table"][ids]))), targets[..., None], 2)
        return -log_probs.mean() if kind == "mean" else -(log_probs[..., 0] * weights).sum()

    def loss(p, chunk):
        with chunks(chunk):
            arguments = lambda x: read(p, x), jnp.tanh(p["table"][ids]), targets, axis
            if kind == "weighted":
                return (token_nats(*arguments) * weights).sum()
            return mean_nats(*arguments, None if kind == "mean" else weights)

    expected = jax.jit(jax.value_and_grad(whole))(parameters)
    for chunk in (1, 4 * B, B * S):  # single positions; chunks of which the last is padded; one
        found = jax.jit(jax.value_and_grad(functools.partial(loss, chunk=chunk)))(parameters)
        jax.tree.map(assert_close, found, expected)
    assert_close(jax.jit(functools.partial(loss, chunk=4 * B))(parameters), expected[0])  # without gradients


@pytest.mark.parametrize("loss", [mean_nats, token_nats])
def test_no_product_is_computed_for_weights_that_are_not_trained(loss):
    x, weights, _, _ = problem(1)
    targets = jnp.zeros((1, T), int)

    def of(x):
        with chunks(3):
            return loss(lambda x: x @ weights, x[None], targets, 1).sum()

    products = str(jax.make_jaxpr(jax.grad(of))(x)).count("dot_general[")
    assert products == {mean_nats: 2, token_nats: 3}[loss]  # logits (again), and the gradient by x


@pytest.mark.parametrize("loss", [mean_nats, token_nats])
def test_gradients_of_half_precision_weights_are_summed_in_float32(loss):
    x, weights = normal(0, 1, 400, D).astype(jnp.bfloat16), normal(1, D, V).astype(jnp.bfloat16)
    targets = jnp.zeros((1, 400), int)

    def of(weights, chunk, dtype):
        with chunks(chunk):
            return loss(lambda x: x @ weights.astype(dtype), x.astype(dtype), targets, 1).mean()

    expected = jax.grad(of)(weights.astype(jnp.float32), 400, jnp.float32)
    found = jax.grad(of)(weights, 1, jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    error = np.abs(found.astype(jnp.float32) - expected).max() / np.abs(expected).max()
    assert error < 0.01


@pytest.mark.parametrize("loss", [mean_nats, token_nats])
def test_the_logits_are_never_whole(loss):
    x, weights, _, _ = problem(1)
    targets = jnp.zeros((2, T), int)

    def of(x, weights):
        with chunks(8):
            return loss(lambda x: x @ weights, jnp.stack([x, x]), targets, 1).sum()

    text = jax.jit(jax.grad(of, (0, 1))).lower(x, weights).as_text()
    sizes = [math.prod(map(int, dims.split("x"))) for dims in re.findall(r"tensor<([\dx]+)xf32>", text)]
    assert 2 * T * V > max(sizes) == 2 * 4 * V


def test_of_equal_logits_the_first_is_greedy():
    ids = jnp.arange(3)
    _, greedy = token_log_probs(lambda x: x, jnp.ones((3, 3)), ids, ids, greedy=True)
    assert greedy.tolist() == [True, False, False]


def test_half_precision_logits_are_widened():
    log_probs, _ = token_log_probs(lambda x: x, jnp.ones((2, 3), jnp.bfloat16), jnp.arange(2), jnp.arange(2))
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, -np.log(3), rtol=1e-6)


def test_a_chunk_is_bounded():
    assert chunk_length(50_304, 4096) == 512
    assert chunk_length(50_304, 256, rows=8) == 64
    assert chunk_length(50_304, 5) == 5
    assert chunk_length(1 << 30, 100) == 1
    assert chunk_length(97, 1024, rows=128) == 1024
    with chunks(None, "tpu", devices=4):
        assert chunk_length(50_304, 2048, rows=16) == 256
    with chunks(None, forward_only=True):
        assert chunk_length(50_304, 4096) == 128
    with chunks(100):
        assert chunk_length(50_304, 2048, rows=3) == 32
    with chunks(None, "tpu", devices=4):  # 2²⁴ logits of each device
        assert chunk_length(50_304, 2048, rows=16, divided=True) == 64


@pytest.mark.parametrize("target", [0, 2])
def test_logits_that_are_not_finite_give_the_losses_of_jax(target):
    logits = jnp.asarray([[0.0, -jnp.inf, 1], [jnp.nan, 0, 1], [jnp.inf, 0, 1], [-jnp.inf] * 3, [1e30, -1e30, 0]])
    targets = jnp.full(5, target)
    expected, pull = jax.vjp(lambda x: cross_entropy.nats(x, targets), logits)
    found, slope = cross_entropy._nats_and_slope(logits, targets)
    np.testing.assert_array_equal(found, expected)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(slope[finite], pull(jnp.ones(5))[0][finite], rtol=1e-6)
    assert np.isnan(slope[~finite]).any(axis=-1)[:2].all()


def vocabulary(**sizes: int) -> DividedVocabulary:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return DividedVocabulary(AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3))


@pytest.mark.parametrize(
    ("sizes", "n_vocab", "tokens", "chunks", "expected"),
    [
        ({"fsdp": 4}, 50_432, 32_768, 8, True),
        ({"fsdp": 32}, 50_432, 65_536, 2, True),
        ({"data": 8, "fsdp": 4}, 50_432, 262_144, 8, True),
        ({"fsdp": 32, "tensor": 8}, 50_432, 524_288, 2, False),  # few chunks of a device's few weights
        ({"fsdp": 4}, 50_257, 32_768, 8, False),  # not divisible
        ({"fsdp": 64}, 50_432, 65_536, 8, False),  # 788 columns are stored as 896
        ({"tensor": 4}, 50_432, 32_768, 8, False),  # divided already
    ],
)
def test_the_vocabulary_is_divided_where_that_takes_less_communication(sizes, n_vocab, tokens, chunks, expected):
    assert vocabulary(**sizes).applies(n_vocab, tokens, chunks) is expected


DIVIDED = """
import functools, re
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxmodels.cross_entropy import chunks, mean_nats, token_nats
from jaxmodels.sharding import DividedVocabulary, make_mesh

jax.config.update("jax_enable_x64", True)
B, S, D, V = 8, 11, 8, 1024
random = np.random.default_rng(0)
x, kernel, bias = (random.normal(size=shape) for shape in ((B, S, D), (D, V), (V,)))
targets, weights = random.integers(0, V, (B, S)), random.random((B, S))
cases = {  # read-out and its weights, square ones are not divided, axis of S
    "untied": (lambda x, w, b: x @ w + b, (kernel, bias), 1),
    "tied": (lambda x, w: x @ w.T, (kernel.T,), 0),
}

def function(read, axis, vocabulary, tokens, loss):
    def of(x, weight):
        turn = (lambda a: a.swapaxes(0, 1)) if axis == 0 else (lambda a: a)
        with chunks(tokens, vocabulary=vocabulary):
            arguments = lambda x: read(x, *weight), turn(x), turn(targets), axis
            if loss == "mean":
                return mean_nats(*arguments)
            return (token_nats(*arguments) * turn(weights)).sum()
    return jax.jit(jax.value_and_grad(of, (0, 1)))

for sizes in ("fsdp=8", "data=2,fsdp=2,tensor=2"):
    mesh = make_mesh(sizes)
    for (name, (read, parameters, axis)), loss in zip(cases.items(), ("mean", "weighted"), strict=True):
        place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))
        arguments = place(x, ("data", "fsdp")), tuple(place(p, *["fsdp"] * (p.ndim - 1)) for p in parameters)
        expected = function(read, axis, None, B * S, loss)(*arguments)
        divided = function(read, axis, DividedVocabulary(mesh), 4 * B, loss)
        found = divided(*arguments)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        shapes = re.findall(r"f64\\[([\\d,]+)\\]", divided.lower(*arguments).compile().as_text())
        sizes_found = {tuple(map(int, shape.split(","))) for shape in shapes}
        part = V // (mesh.shape["fsdp"] * mesh.shape["tensor"])
        logits = [shape for shape in sizes_found if len(shape) == 3 and shape[-1] in (part, V)]
        assert logits and {shape[-1] for shape in logits} == {part}, logits
"""


@pytest.mark.slow
def test_losses_of_a_divided_vocabulary_are_those_of_whole_logits_on_meshes():
    command, environment = [sys.executable, "-c", DIVIDED], os.environ | EIGHT_DEVICES
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
