"""Kernels of causal attention: which one is chosen where, and the fused ones against the whole score matrix."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import attention_kernels
from jaxmodels.attention import RelativeMultiHeadAttention, causal_attention
from jaxmodels.attention_kernels import attention_kernel, block_length, chosen_kernel, platform_of
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.retro import RetroModel
from jaxmodels.rope import RotaryPEMultiHeadAttention
from jaxmodels.sharding import make_mesh
from jaxmodels.synthesizer import SynthesizerAttention
from jaxmodels.training.config import TransformerConfig
from tests.common import causal_mask, filled, language_model, normal, token_ids
from tests.train_common import EIGHT_DEVICES, ROOT
from train import neox, retro, rope

EPSILON = float(np.finfo(np.float32).eps)


def outputs(kernel, mesh, dtype, arrays, **options):
    """Output of causal attention over [B, S, H, d_k], and its gradient by queries, keys and values."""

    def attend(q, k, v):
        with attention_kernel(kernel, mesh, **options):
            return causal_attention(q, k, v)

    def both(q, k, v, weight):
        y, pull = jax.vjp(attend, q, k, v)
        return y, *pull(weight)

    return [np.asarray(x, np.float64) for x in jax.jit(both)(*(jnp.asarray(a, dtype) for a in arrays))]


def errors(b, s, h, d_k, mesh=None):
    """Largest relative errors of fused and plain attention in float32, forward and by each argument."""
    arrays = [np.asarray(normal(seed, b, s, h, d_k), np.float32) for seed in range(4)]
    fused = outputs("fused", mesh, np.float32, arrays, interpret=True)
    plain = outputs("plain", None, np.float32, arrays)
    with jax.enable_x64(True):
        truth = outputs("plain", None, np.float64, arrays)
    scales = [np.abs(t).max() for t in truth]
    return [
        [float(np.abs(x - t).max() / scale) for x, t, scale in zip(found, truth, scales, strict=True)]
        for found in (fused, plain)
    ]


def assert_rounding(fused, plain):
    assert len(fused) == 4
    assert all(0 < f <= 4 * max(p, EPSILON) for f, p in zip(fused, plain, strict=True)), (fused, plain)


@pytest.mark.parametrize(("s", "d_k"), [(523, 29), pytest.param(13, 7, marks=pytest.mark.slow)])
def test_splash_attention_equals_plain_attention_to_rounding(s, d_k):
    assert_rounding(*errors(2, s, 3, d_k))


ON_MESHES = """
import json, sys
from jaxmodels.sharding import make_mesh
from tests.jaxmodels.test_attention_kernels import errors, trained
sizes = ("data=8", "data=2,fsdp=2,tensor=2", "tensor=8")
print(json.dumps([[errors(3, 131, 5, 11, make_mesh(each)) for each in sizes],
                  [trained("fused", make_mesh("fsdp=2,tensor=4")), trained("plain", make_mesh("fsdp=8"))]]))
"""


def trained(kernel, mesh):
    """Losses of a NeoX with six heads, which tensor=4 does not divide, on a mesh."""
    from jaxmodels.training.optimizers import make_optimizer
    from jaxmodels.training.step import Numerics, Program

    sizes = NeoXConfig(n_vocab=32, n_hidden=48, n_heads=6, n_layers=2, rope_percentage=0.5)
    numerics = Numerics(remat="layers", attention_kernel=kernel)
    program = Program(lambda: NeoX(sizes, rngs=nnx.Rngs(0)), make_optimizer("adamw", 1e-2), mesh, numerics)
    batch, losses = {"tokens": np.asarray(token_ids(0, 8, 14), np.int32)}, []
    with attention_kernel(interpret=True):
        step = program.lower_step(batch).compile()
    state = program.make_state(0)
    for _ in range(3):
        state, metrics = step(state, batch, np.zeros(mesh.size, bool))
        losses.append(float(metrics.loss))
    return losses


@pytest.mark.slow
def test_splash_attention_on_meshes_that_do_not_divide_rows_or_heads():
    done = subprocess.run(
        [sys.executable, "-c", ON_MESHES], cwd=ROOT, env=os.environ | EIGHT_DEVICES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, (fused, plain) = json.loads(done.stdout)
    assert len(found) == 3
    for both in found:
        assert_rounding(*both)
    assert len(set(fused)) == 3
    np.testing.assert_allclose(fused, plain, rtol=2e-6)


@pytest.fixture
def splash_calls(monkeypatch):
    """Shapes of the calls of splash attention, which are computed by the whole score matrix."""
    calls = []

    def kernel(q, k, v, block, interpret):
        calls.append(q.shape)
        assert interpret
        assert q.shape[2] % block == 0
        scores = jnp.where(causal_mask(q.shape[2])[:, :, 0], jnp.einsum("bhid,bhjd->bhij", q, k), -jnp.inf)
        return jax.nn.softmax(scores) @ v

    monkeypatch.setattr(attention_kernels, "splash_kernel", kernel)
    return calls


def vanilla():
    attention = filled(lambda: SynthesizerAttention("vanilla", 3, 12, 19, rngs=nnx.Rngs(0)))
    return lambda ids: attention(query=(x := jnp.sin(ids[..., None] + jnp.arange(12.0))), key=x, value=x, mask="causal")


MODELS = {
    **{name: lambda name=name: language_model(name) for name in ("rotary", "rotary_value", "plain")},
    "vanilla": vanilla,
    "neox": lambda: filled(lambda: NeoX(NeoXConfig(23, 12, 2, 3, rope_percentage=0.5), rngs=nnx.Rngs(0))),
    "retro": lambda: filled(lambda: RetroModel(23, 12, 2, (), 4, 3, 4, 17, rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_scores_are_products_are_fused(name, splash_calls):
    model, ids = MODELS[name](), token_ids(0, 5, 2)

    def traced(ids):
        with attention_kernel(interpret=True):
            return model(ids)

    jax.eval_shape(traced, ids)
    assert len(splash_calls) == (1 if name in ("vanilla", "neox") else 2)  # NeoX scans over its layers
    assert {(shape[1], *shape[2:]) for shape in splash_calls} == {(3, 128, 4)}
    if name in ("rotary_value", "vanilla", "neox"):
        expected = jax.jit(lambda ids: model(ids))(ids)
        np.testing.assert_allclose(jax.jit(traced)(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["relative", "random", "random+vanilla"])
def test_other_scores_take_blocks_and_are_refused_if_fused_is_forced(name, splash_calls):
    model, ids = language_model(name), token_ids(0, 5, 2)
    with attention_kernel("auto", interpret=True):
        jax.eval_shape(lambda ids: model(ids), ids)
    assert not splash_calls
    refused = pytest.raises(ValueError, match=r"attention_kernel='fused' .*Attention's.* auto, blocks and plain")
    with refused, attention_kernel("fused", interpret=True):
        jax.eval_shape(lambda ids: model(ids), ids)  # another function: JAX keeps what it traced


def test_scores_of_ones_own_are_not_fused(splash_calls):
    class Cooler(RotaryPEMultiHeadAttention):
        def get_scores(self, query, key, n, first):
            return super().get_scores(query, key, n, first) / 3

    x = normal(0, 5, 2, 12)
    for kind, calls in ((Cooler, 0), (RotaryPEMultiHeadAttention, 1)):
        attention = kind(3, 12, 0.5, rngs=nnx.Rngs(0))
        with attention_kernel(interpret=True):
            jax.eval_shape(lambda x, attention=attention: attention(query=x, key=x, value=x, mask="causal"), x)
        assert len(splash_calls) == calls


def test_dropout_of_weights_is_not_fused_and_evaluation_is(splash_calls):
    model, ids = language_model("rotary", dropout_prob=0.3), token_ids(0, 5, 2)
    with attention_kernel("fused", interpret=True):
        with pytest.raises(ValueError, match=r"attention_kernel='fused' .*0\.3.* blocks"):
            jax.eval_shape(lambda ids: model(ids, jax.random.key(0)), ids)
        jax.eval_shape(lambda ids: model(ids), ids)
    assert splash_calls


def test_blocks_and_the_whole_matrix_are_taken_as_set():
    attention = RelativeMultiHeadAttention(3, 12, 0.0, rngs=nnx.Rngs(0))
    x = normal(0, 131, 2, 12)

    def found(kernel):
        with attention_kernel(kernel):
            traced = jax.make_jaxpr(lambda x: attention(query=x, key=x, value=x, mask="causal"))(x)
        return "[2,3,131,131]" in str(traced)

    assert (found("plain"), found("blocks"), found("auto")) == (True, False, False)


class Backend:
    def __init__(self, platform, version):
        self.platform, self.platform_version = platform, version


@pytest.mark.parametrize(
    ("platform", "version", "dtype", "d_k", "chosen", "refused"),
    [
        ("tpu", "libtpu", jnp.bfloat16, 13, "splash", None),
        ("tpu", "libtpu", jnp.float32, 128, "splash", None),
        ("tpu", "libtpu", jnp.float16, 64, "blocks", "bfloat16 and float32.*float16"),
        ("gpu", "cuda 13000", jnp.bfloat16, 64, "cudnn", None),
        ("gpu", "cuda 13000", jnp.float32, 64, "blocks", "bfloat16 and float16.*float32"),
        ("gpu", "cuda 13000", jnp.float16, 136, "blocks", "128.*136"),
        ("gpu", "cuda 13000", jnp.float16, 13, "blocks", "8.*13"),
        ("gpu", "rocm 6", jnp.bfloat16, 64, "blocks", "TPU or a CUDA.*gpu"),
        ("cpu", "cpu", jnp.float32, 64, "blocks", "TPU or a CUDA.*cpu"),
    ],
)
def test_kernel_of_a_platform(monkeypatch, platform, version, dtype, d_k, chosen, refused):
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: Backend(platform, version))
    query = jax.ShapeDtypeStruct((2, 3, 5, d_k), dtype)
    with jax.default_matmul_precision("default"):
        assert chosen_kernel(query) == chosen
    for kernel in ("blocks", "plain"):
        with attention_kernel(kernel):
            assert chosen_kernel(query) == kernel
    with attention_kernel("fused"), jax.default_matmul_precision("default"):
        if refused is None:
            assert chosen_kernel(query) == chosen
        else:
            with pytest.raises(ValueError, match=f"attention_kernel='fused' .*{refused}.*auto, blocks and plain"):
                chosen_kernel(query)


def test_several_tpus_without_a_mesh_take_blocks(monkeypatch):
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: Backend("tpu", "libtpu"))
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert chosen_kernel(jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.float32)) == "blocks"


def test_products_of_bfloat16_in_float32_are_not_fused_on_tpus():
    query = jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.bfloat16)
    with attention_kernel(interpret=True), jax.default_matmul_precision("highest"):
        assert chosen_kernel(query) == "blocks"
        assert chosen_kernel(query.update(dtype=jnp.float32)) == "splash"


def test_the_platform_is_that_of_the_mesh(monkeypatch):
    here = platform_of(attention_kernels.Setting())
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: Backend("tpu", "libtpu"))
    assert platform_of(attention_kernels.Setting()) == "tpu"
    assert platform_of(attention_kernels.Setting(mesh=make_mesh())) == here


@pytest.mark.parametrize("s", [1, 127, 128, 129, 512, 513, 600, 1531, 2048, 32_768])
def test_blocks_of_splash_attention_cover_the_sequence(s):
    block, padded = block_length(s)
    assert block % 128 == 0
    assert block <= 512
    assert padded % block == 0
    assert padded - 128 * (padded // block) < s <= padded


def test_settings_are_checked_and_end_with_their_block():
    refused = pytest.raises(ValueError, match="attention_kernel='quick' must be one of auto, blocks, fused, plain")
    with refused, attention_kernel("quick"):
        pass
    with pytest.raises(ValueError, match="attention_kernel='quick'"):
        TransformerConfig(attention_kernel="quick")
    query = jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.float32)
    with attention_kernel("plain", interpret=True):
        with attention_kernel():
            assert chosen_kernel(query) == "splash"
        assert chosen_kernel(query) == "plain"
    assert chosen_kernel(query) == "blocks"


@pytest.mark.parametrize("kind", [neox.Neox, rope.Rope, retro.Retro])
def test_scripts_refuse_a_kernel_before_any_work(kind):
    sizes = {"d_model": 12, "heads": 3, "d_ff": 8, "n_layers": 1, "seq_len": 16, "batch_size": 2}
    others = {"rope_percentage": 0.5} if kind is neox.Neox else {}
    experiment = kind(kind.config_class(attention_kernel="fused", **sizes, **others))
    assert experiment.config.numerics.attention_kernel == "fused"
    with pytest.raises(ValueError, match=r"attention_kernel='fused' .*float32|attention_kernel='fused' .*cpu"):
        experiment.program(23, make_mesh())


STEP_FOR_TPUS = """
import json, re, sys
from flax import nnx
import jax, numpy as np
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.sharding import make_mesh
from jaxmodels.training.optimizers import make_optimizer
from jaxmodels.training.plan.topology import topology_devices
from jaxmodels.training.step import Numerics, Program
mesh = make_mesh("fsdp=2,tensor=2", topology_devices("v5e:2x2"))
sizes = NeoXConfig(n_vocab=64, n_hidden=56, n_heads=4, n_layers=2, rope_percentage=0.3, n_ff=96)
found = {}
for kernel in ("auto", "fused", "plain"):
    numerics = Numerics(compute_dtype="bfloat16", remat="layers", attention_kernel=kernel)
    program = Program(lambda: NeoX(sizes, rngs=nnx.Rngs(0)), make_optimizer("adamw", 1e-2), mesh, numerics)
    text = program.lower_step({"tokens": jax.ShapeDtypeStruct((4, 390), np.int32)}).compile().as_text()
    found[kernel] = [len(re.findall(r"\\[[\\d,]*389,389\\]|\\[[\\d,]*512,512\\]", text)), "splash_mha" in text]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (extra plan)")
def test_a_step_compiled_for_tpus_has_no_score_matrix():
    done = subprocess.run([sys.executable, "-c", STEP_FOR_TPUS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["auto"] == found["fused"] == [0, True]
    matrices, fused = found["plain"]
    assert matrices > 0
    assert not fused
