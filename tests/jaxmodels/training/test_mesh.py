"""Training on device meshes and in several processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxmodels
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.source import model_source
from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.io.steps import steps
from jaxmodels.layers import constrain, hooks
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.process.distributed import VARIABLES, Processes
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.sharding import (
    activation_placement,
    check_batch,
    divided_lookup,
    make_mesh,
    parameter_specs,
    parse_sizes,
)
from jaxmodels.text import CharVocabulary
from jaxmodels.training.metrics import read
from jaxmodels.training.optimizers import make_optimizer
from jaxmodels.training.script import main
from jaxmodels.training.step import Program
from jaxmodels.transformer import AutoregressiveTransformer
from tests.common import ATTENTIONS
from tests.train_common import EIGHT_DEVICES, ROOT, TEXT, TINY, program, start, start_two
from tests.train_on_meshes import ALSO, MESHES, SYSTEMS
from train import feedback, rope


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [("", 8, (8, 1, 1)), ("fsdp=4", 8, (2, 4, 1)), ("tensor=2,fsdp=3", 6, (1, 3, 2)), ("data=2,fsdp=2", 4, (2, 2, 1))],
)
def test_mesh_sizes_are_parsed(text, n, expected):
    assert tuple(parse_sizes(text, n).values()) == expected


@pytest.mark.parametrize("text", ["fsdp", "rows=2", "fsdp=0", "fsdp=2,fsdp=2", "fsdp=3", "data=2", "fsdp=16"])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(text):
    with pytest.raises(ValueError, match=f"^mesh='{text}' "):
        parse_sizes(text, 8)


def shapes(make) -> dict[str, tuple[int, ...]]:
    made = nnx.to_flat_state(nnx.state(nnx.eval_shape(make)))
    return {".".join(map(str, path)): variable.get_value().shape for path, variable in made}


def abstract_mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **sizes}
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


MODELS = [
    *(
        lambda attention=attention: AutoregressiveTransformer(65, 32, 4, 48, 2, attention, max_len=9, rngs=nnx.Rngs(0))
        for attention in ATTENTIONS
    ),
    *(
        lambda cls=cls: AutoregressiveModel(65, cls(32, 4, 48, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
        for cls in (FeedbackTransformer, FeedbackTransformerKV)
    ),
    lambda: NeoX(NeoXConfig(n_vocab=64, n_hidden=32, n_heads=4, n_layers=2), rngs=nnx.Rngs(0)),
    lambda: LoRANeoX(NeoXConfig(n_vocab=64, n_hidden=32, n_heads=4, n_layers=2), LoRA(32), rngs=nnx.Rngs(0)),
    lambda: RetroModel(
        *(65, 32, 2, {1}, 4, 4, 8, 48),
        NearestNeighborEncoder(4, 1, {0}, 32, 4, 8, 48, rngs=nnx.Rngs(0)),
        rngs=nnx.Rngs(0),
    ),
]


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_optimizer_states_are_divided_like_their_parameters(name):
    sizes = NeoXConfig(n_vocab=64, n_hidden=128, n_heads=4, n_layers=3)
    mesh = abstract_mesh(fsdp=4, tensor=2)
    program = Program(lambda: NeoX(sizes, rngs=nnx.Rngs(0)), make_optimizer(name, 0.1), mesh)
    state = program.abstract_state()
    found = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state.optimizer)}
    path = "layers.ffn.dense_h_h4.kernel"  # [3, 128, 512]
    spec = program.specs[path]
    assert spec == P(None, "fsdp", "tensor")
    if name == "adafactor":
        factored = state.optimizer[1][path][0]
        assert (factored.v_row.shape, factored.v_col.shape) == ((3, 128), (3, 512))
        assert (factored.v_row.sharding.spec, factored.v_col.sharding.spec) == (P(None, "fsdp"), P(None, "tensor"))
        assert (3, 128, 512) not in found
        square = state.optimizer[1]["layers.attention.output.kernel"][0]  # [3, 128, 128]
        rows, columns = program.specs["layers.attention.output.kernel"][1:]
        assert rows != columns
        assert (square.v_row.sharding.spec, square.v_col.sharding.spec) == (P(None, rows), P(None, columns))
    else:
        assert found[3, 128, 512] == spec


@pytest.mark.parametrize("make", MODELS, ids=[*ATTENTIONS, "feedback", "feedback_kv", "neox", "lora", "retro"])
def test_sharding_rules_place_every_array_and_divide_every_large_one(make):
    found = shapes(make)
    specs = parameter_specs(nnx.eval_shape(make), found, abstract_mesh(fsdp=4, tensor=2))
    assert specs.keys() == found.keys()
    large = {path for path, shape in found.items() if len(shape) > 1 and np.prod(shape) >= 32 * 32}
    assert large
    assert [path for path in large if not any(specs[path])] == []


def test_sharding_rules_refuse_unknown_arrays_and_uneven_sizes():
    mesh = abstract_mesh(fsdp=2)
    with pytest.raises(ValueError, match=r"Linear .*sharding_rules.*fsdp=2"):
        parameter_specs(nnx.Linear, {}, mesh)
    with pytest.raises(ValueError, match=r"encoder\.novelty \[2\]"):
        parameter_specs(AutoregressiveTransformer, {"encoder.novelty": (2,)}, mesh)
    with pytest.raises(ValueError, match=r"fsdp=2 .*7 of a\.layer1\.kernel \[7, 3\]"):
        parameter_specs(AutoregressiveTransformer, {"a.layer1.kernel": (7, 3), "b.layer1.kernel": (5, 3)}, mesh)


def test_one_device_replicates_any_model():
    found = {"encoder.novelty": (2, 3), "layers.0.readout": ()}
    for model in (nnx.Linear, NeoX):
        assert parameter_specs(model, found, abstract_mesh()) == dict.fromkeys(found, P())


def test_neox_rules_divide_its_stacked_layers():
    paths = {
        "embedding.emb.embedding": P("tensor", "fsdp"),
        "layers.attention.qkv_lin.kernel": P(None, "fsdp", "tensor"),
        "layers.ffn.dense_h4_h.kernel": P(None, "tensor", "fsdp"),
        "layers.pre_ln_attn.scale": P(),
        "final_norm.ln.bias": P(),
        "readout.linear.kernel": P("fsdp", "tensor"),
    }
    sizes = {path: (8,) * max(len(spec), 1) for path, spec in paths.items()}
    assert parameter_specs(NeoX, sizes, abstract_mesh(fsdp=4, tensor=2)) == paths


def test_a_batch_that_does_not_split_is_an_error():
    mesh = abstract_mesh(data=2, fsdp=2, tensor=2)
    check_batch(mesh, 12, 3)
    with pytest.raises(ValueError, match=r"batch_size=6\b.*4"):
        check_batch(mesh, 6)
    with pytest.raises(ValueError, match=r"batch_size=12 .*accumulate=2\b.*4"):
        check_batch(mesh, 12, 2)


@pytest.mark.parametrize(
    ("shape", "name", "spec"),
    [
        ((6, 5, 8), "BSD", P(("data", "fsdp"), None, "tensor")),
        ((6, 5, 10), "BSD", P(("data", "fsdp"), None, None)),
        ((5, 6, 8), "SBD", P(None, ("data", "fsdp"), "tensor")),
        ((5, 4, 8), "SBD", P(None, None, "tensor")),  # 4 rows for 6 devices
        ((6, 5, 6, 7), "BSHK", P(("data", "fsdp"), None, None, None)),
        ((6, 5, 12), "BSF", P(("data", "fsdp"), None, "tensor")),
        ((23, 12), "V.", P(None, None)),
    ],
)
def test_activations_are_divided_by_the_axes_that_fit(monkeypatch, shape, name, spec):
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", lambda x, sharding: sharding.spec)
    place = activation_placement(abstract_mesh(data=2, fsdp=3, tensor=4))
    assert place(jax.ShapeDtypeStruct(shape, np.float32), name) == spec


@pytest.mark.parametrize(
    ("sizes", "shape", "specs"),
    [
        ({"fsdp": 4}, (2048, 8), [P(None, "fsdp"), P(), P(None, None, "fsdp")]),
        ({"fsdp": 4}, (64, 8), [P()]),  # the rows of all ids would take more memory than the table
        ({"fsdp": 4}, (2048, 10), [P()]),
        ({"data": 2, "fsdp": 4}, (2048, 8), [P()]),
        ({"fsdp": 4, "tensor": 2}, (2048, 8), [P()]),
    ],
)
def test_embedding_tables_are_divided_in_the_lookup(monkeypatch, sizes, shape, specs):
    found = []
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", lambda x, sharding: (found.append(sharding.spec), x)[1])
    table, ids = np.random.default_rng(0).random(shape, np.float32), np.array([[3, 5, shape[0]], [0, -1, 7]])
    rows = divided_lookup(abstract_mesh(**sizes))(jnp.asarray(table), jnp.asarray(ids))
    assert found == specs
    np.testing.assert_array_equal(rows[0, :2], table[[3, 5]])
    assert np.isnan(rows[0, 2]).all()
    assert np.isnan(rows[1, 1]).all()


LOOKUP = """
import re
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxmodels.layers import rows_of
from jaxmodels.sharding import divided_lookup, make_mesh

mesh, random = make_mesh("fsdp=8"), np.random.default_rng(0)
table, ids = random.normal(size=(4099, 16)).astype(np.float32), random.integers(0, 4099, (8, 3)).astype(np.int32)
weight = random.normal(size=(8, 3, 16)).astype(np.float32)

def both(look_up):
    def function(table, ids):
        rows, pull = jax.vjp(lambda table: look_up(table, ids), table)
        return rows, pull(weight)[0]
    return function

by_row, by_feature = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, "fsdp"))
compiled = jax.jit(both(divided_lookup(mesh)), in_shardings=(by_feature, by_row), out_shardings=(by_row, by_feature))
assert not re.search(r"f32\\[4099,16\\]", compiled.lower(table, ids).compile().as_text())
found, expected = compiled(table, ids), both(rows_of)(table, ids)
np.testing.assert_array_equal(found[0], expected[0])
np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)
"""


@pytest.mark.slow
def test_neither_an_embedding_table_nor_its_gradient_is_whole_on_a_device():
    command, environment = [sys.executable, "-c", LOOKUP], os.environ | EIGHT_DEVICES
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_constrain_is_the_identity_unless_a_mesh_is_set():
    x = np.ones((2, 3))
    assert constrain(x, "SB") is x
    with hooks(placement=lambda x, name: (x, name)):
        assert constrain(x, "SB") == (x, "SB")
    assert constrain(x, "SB") is x
    made = program()
    with made.tracing():
        assert constrain(x, "SB") is x  # one device
    with pytest.raises(ValueError, match=r"'SBD' .*3.*\[2, 3\]"):
        activation_placement(make_mesh())(x, "SBD")


ON_A_MESH = """
import sys
from pathlib import Path
import jax, numpy as np
import jaxmodels
from jaxmodels.neox import NeoX
from jaxmodels.weights.names import flat_arrays
from jaxmodels.training.checkpoints import open_model
from jaxmodels.training.commands.evaluate import open_checkpoint, parser
from jaxmodels.sharding import make_mesh, parameter_specs

mesh = make_mesh("data=2,fsdp=2,tensor=2")
*folders, by_layer = map(Path, sys.argv[1:])
options = parser().parse_args([str(by_layer)])
assert open_checkpoint(options, mesh).model.is_stacked  # sharding rules are for stacked layers
for folder in folders:
    whole, parts = flat_arrays(jaxmodels.load(folder)), flat_arrays(open_model(folder, mesh))
    shapes = {".".join(map(str, path)): array.shape for path, array in whole.items()}
    for (path, array), spec in zip(parts.items(), parameter_specs(NeoX, shapes, mesh).values(), strict=True):
        assert array.sharding == jax.NamedSharding(mesh, spec), path
        np.testing.assert_array_equal(array, whole[path])
    divided = parts["layers", "ffn", "dense_h_h4", "kernel"]
    assert divided.addressable_shards[0].data.size * 4 == divided.size
"""


@pytest.mark.slow
def test_a_checkpoint_is_loaded_with_each_shard_on_its_device(tmp_path):
    sizes = {"n_vocab": 32, "n_hidden": 32, "n_layers": 3, "n_heads": 4, "n_ff": 40, "rope_percentage": 0.5}
    model = NeoX(NeoXConfig(**sizes), rngs=nnx.Rngs(0))
    jaxmodels.save(model, tmp_path / "orbax")
    write_flax(model_source(model), tmp_path / "safetensors")
    jaxmodels.save(model.unstacked(), tmp_path / "by_layer")
    CharVocabulary("abc").save(tmp_path / "by_layer" / "vocabulary.json")
    command = [sys.executable, "-c", ON_A_MESH, *(tmp_path / name for name in ("orbax", "safetensors", "by_layer"))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | EIGHT_DEVICES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def losses() -> dict[str, dict[str, list[float]]]:
    process = start("tests.train_on_meshes", **EIGHT_DEVICES)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_on_every_mesh_equal_those_of_one_device(losses, system):
    of_one = losses[system].pop("")
    assert len(set(of_one)) == 4
    assert ["", *losses[system]] == [*MESHES, *ALSO.get(system, [])]
    for mesh, found in losses[system].items():
        np.testing.assert_allclose(found, of_one, rtol=2e-6, err_msg=mesh)


def test_processes_are_named_by_flags_or_by_variables_or_not_at_all(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    assert Processes().named() == Processes(distributed=True).named() == (None, None, None)
    assert Processes(False, "[::1]:80", 3, 2).named() == Processes(True, "[::1]:80", 3, 2).named() == ("[::1]:80", 3, 2)
    for variable, value in zip(VARIABLES.values(), ("host:8476", "2", "1"), strict=True):
        monkeypatch.setenv(variable, value)
    assert Processes().named() == ("host:8476", 2, 1)
    assert Processes(process=0).named() == ("host:8476", 2, 0)
    assert Processes(distributed=True).named() == (None, None, None)  # JAX asks the machine


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        (
            {"processes": 2},
            {},
            r": --coordinator \(or JAX_COORDINATOR_ADDRESS\) and --process \(or JAX_PROCESS_ID\)$",
        ),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "host:1"},
            r"--processes \(or JAX_NUM_PROCESSES\) and --process \(or JAX_PROC",
        ),
        ({"coordinator": "localhost", "processes": 2, "process": 0}, {}, "^coordinator='localhost'.*HOST:PORT"),
        ({"coordinator": ":80", "processes": 2, "process": 0}, {}, "^coordinator=':80'.*HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, {}, "^process=2 .*processes=2"),
        (
            {"coordinator": "a:1", "process": 2},
            {"JAX_NUM_PROCESSES": "two"},
            "^JAX_NUM_PROCESSES='two'",
        ),
        ({"peer_timeout": 0}, {}, "^peer_timeout=0 .*1"),
    ],
)
def test_processes_named_incompletely_or_wrongly_are_an_error(flags, variables, message, monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, variables.get(variable, ""))
    with pytest.raises(ValueError, match=message):
        Processes(**flags).initialize()


@pytest.fixture(scope="module")
def text(tmp_path_factory, compile_cache) -> list:
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return ["--text", file, "--compile-cache", compile_cache, "--no-tensorboard"]


def wait_for_lines(run: Path, n: int, processes: list) -> None:
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_text().count("grad_norm") < n:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


def alone(*flags: object) -> None:
    assert main(rope.Rope, "train.rope", [*TINY, *map(str, flags)]) == 0


def logged(run: Path, name: str = "loss") -> dict[int, float]:
    """Values by step."""
    return {line["step"]: line[name] for line in read(run) if name in line}


@pytest.mark.slow
def test_two_processes_train_and_stop_like_one_and_one_resumes_alone(text, tmp_path):
    flags = [*text, "--every", 10, "--validation-batches", 3]
    here = ["--out", tmp_path / "run", "--mesh", "fsdp=2"]
    processes = start_two("train.rope", *TINY, *flags, *here, "--steps", 10**6, by_variables=True)
    wait_for_lines(tmp_path / "run", 12, processes)
    processes[1].terminate()  # one is signaled, both stop
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    stopped = steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"stopped at step {stopped};" in ends[0][0]
    assert "validation loss" in ends[0][0]
    assert "validation loss" not in ends[1][0]  # what is printed, the first prints

    alone("--out", tmp_path / "run", *flags, "--steps", stopped + 5)
    alone("--out", tmp_path / "straight", *flags, "--steps", stopped + 5)
    found, expected = logged(tmp_path / "run"), logged(tmp_path / "straight")
    assert list(found) == list(expected) == list(range(1, stopped + 6))
    # what rounding does to a parameter grows with the steps
    np.testing.assert_allclose(list(found.values())[:35], list(expected.values())[:35], rtol=1e-5)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3)
    judged = [logged(tmp_path / name, "validation_loss")[10] for name in ("run", "straight")]
    np.testing.assert_allclose(*judged, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one_and_if_one_dies_the_other_ends_with_an_error(text, tmp_path):
    run, straight, flags = tmp_path / "run", tmp_path / "straight", [*text, "--every", 10**6]
    alone("--out", run, *flags, "--steps", 3)
    shutil.copytree(run, straight)
    alone("--out", straight, *flags, "--steps", 6)
    processes = start_two("train.rope", *TINY, *flags, "--out", run, "--steps", 10**6, "--mesh", "fsdp=2")
    wait_for_lines(run, 6, processes)
    processes[1].kill()
    out, err = processes[0].communicate(timeout=120)  # no hang
    assert processes[0].returncode != 0
    assert err
    assert "at step 3\n" in out
    found, expected = logged(run), logged(straight)
    np.testing.assert_allclose([found[step] for step in (4, 5, 6)], [expected[step] for step in (4, 5, 6)], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_start_from_a_model_like_one(text, tmp_path):
    """A loaded model's arrays are each process's own; those of a state lie on the devices of both."""
    alone("--out", tmp_path / "parallel", *text, "--attention", "relative", "--steps", 2)
    flags = [*TINY, *text, "--from-parallel", tmp_path / "parallel", "--steps", 3]
    processes = start_two("train.feedback", *flags, "--out", tmp_path / "two", "--mesh", "fsdp=2")
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert main(feedback.Feedback, "train.feedback", list(map(str, [*flags, "--out", tmp_path / "one"]))) == 0
    found, expected = (list(logged(tmp_path / name).values()) for name in ("two", "one"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
