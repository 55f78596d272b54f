"""Fixtures: recorded with torch, replayed without it, rejected if damaged."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from jaxmodels import layers
from jaxmodels.convert import ConversionError
from jaxmodels.io import clean
from jaxmodels.io.bounded import sha256_of
from jaxmodels.io.formats.safetensors import write_file
from parity.cases import SYSTEMS
from parity.cases.golden import GOLDEN
from parity.cases.suite import pair_of
from parity.command import main
from parity.golden.fixture import SHIPPED, check_target, files_of, pending, read, stems
from parity.golden.record import record
from tests.parity.pairs import FlaxMLP, mlp

# In a process that begins so, importing torch is an error.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


@pytest.fixture
def recorded(tmp_path):
    torch_module, flax_module, x = mlp()
    parity.record(torch_module, {"x": x}, tmp_path / "mlp", name="an MLP")
    return flax_module, tmp_path / "mlp"


def test_a_recording_holds_torchs_results_in_float64(recorded):
    torch_module, _, x = mlp()
    fixture = read(recorded[1])
    state = {name: torch.tensor(array) for name, array in fixture.state.items()}
    module = torch_module.double()
    module.load_state_dict(state)
    np.testing.assert_array_equal(fixture.results["output"]["output"], module(torch.tensor(x)).detach().numpy())
    assert fixture.results["output"]["output"].dtype == np.float64
    assert set(fixture.results["parameter gradients"]) == set(state)
    assert fixture.results["input gradients"]["x"].shape == x.shape


def test_a_right_model_agrees_and_a_wrong_one_does_not(recorded):
    flax_module, stem = recorded
    report = parity.replay(flax_module, stem)
    assert report.passed, str(report)
    assert report.name == "an MLP"
    assert {(c.kind, c.precision) for c in report.checks} >= {("output", "float64"), ("parameter gradients", "float32")}
    assert "recorded" in report.environment["torch"]

    class Wrong(FlaxMLP):
        def __call__(self, x):
            return self.down(jnp.tanh(self.norm(self.up(x)) * (1 + 1e-9)))

    report = parity.replay(Wrong(rngs=nnx.Rngs(0)), stem)
    assert [c.kind for c in report.checks if not c.passed] == ["output", "parameter gradients", "input gradients"]
    assert "first divergence" in report.skipped


class TorchScaled(torch.nn.Module):
    """Scales its inputs by a table that it holds in float32."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(5, 7)
        self.register_buffer("table", torch.linspace(0.3, 1.7, 5))
        self.register_buffer("other", torch.linspace(0.1, 0.9, 7), persistent=False)

    def forward(self, x):
        return torch.tanh(self.up(x * self.table)) * self.other


class FlaxScaled(nnx.Module):
    """The same with tables in float64, and with a factor in float32."""

    factor = np.float32(1 / 3)

    def __init__(self, *, rngs):
        self.up = nnx.Linear(5, 7, rngs=rngs)

    def __call__(self, x):
        y = jnp.tanh(self.up(x * np.linspace(0.3, 1.7, 5))) * np.linspace(0.1, 0.9, 7)
        return y * jnp.float32(self.factor) * 3


class FlaxExact(FlaxScaled):
    factor = np.float32(1)

    def __call__(self, x):
        return super().__call__(x) / 3


class FlaxScaledOff(FlaxScaled):
    factor = np.float32(1 / 3 * (1 + 1e-5))


@pytest.mark.slow
def test_what_is_float32_inside_is_explained_as_in_a_check(tmp_path):
    """Constants of PyTorch's side are recorded, those of Flax's are moved when the fixture is replayed."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((3, 5))
    parity.record(TorchScaled(), x, tmp_path / "scaled")
    settings = {"names": {"table": None}}
    report = parity.replay(FlaxScaled(rngs=nnx.Rngs(0)), tmp_path / "scaled", **settings)
    assert report.passed, str(report)
    assert report.value("output", "float64") > 1e5
    (note,) = report.notes
    assert {"table in PyTorch", "other in PyTorch"} <= set(
        note.removeprefix("float32 inside: ").split(";")[0].split(", ")
    )
    assert "in Flax" in note
    checked = parity.check(TorchScaled(), FlaxScaled(rngs=nnx.Rngs(0)), x, steps=0, **settings)
    assert checked.passed, str(checked)
    wrong = parity.replay(FlaxScaledOff(rngs=nnx.Rngs(0)), tmp_path / "scaled", **settings)
    assert not wrong.passed

    assert parity.replay(FlaxExact(rngs=nnx.Rngs(0)), tmp_path / "scaled", **settings).passed
    about = json.loads((tmp_path / "scaled.json").read_text())
    assert about["constants"].keys() == {"table", "other"}
    (tmp_path / "scaled.json").write_text(json.dumps({k: v for k, v in about.items() if k != "constants"}))
    assert not parity.replay(FlaxExact(rngs=nnx.Rngs(0)), tmp_path / "scaled", **settings).passed


def test_a_less_stable_algorithm_replays_with_a_note(tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 7)) + 300
    parity.record(torch.nn.Sequential(torch.nn.LayerNorm(7)), x, tmp_path / "norm")

    def port(epsilon):
        return nnx.Sequential(nnx.LayerNorm(7, use_fast_variance=True, epsilon=epsilon, rngs=nnx.Rngs(0)))

    report = parity.replay(port(1e-5), tmp_path / "norm", names={"0": "layers.0"})
    assert report.passed, str(report)
    assert report.value("output", "float64") > 32
    assert any(note.startswith("rounding: ") for note in report.notes)
    assert not parity.replay(port(1e-6), tmp_path / "norm", names={"0": "layers.0"}).passed


def test_float32_alone_on_a_device_without_float64(recorded):
    report = parity.replay(*recorded, float64=False)
    assert report.passed
    assert {c.precision for c in report.checks} == {"bits", "float32"}


def test_names_that_differ_are_mapped_without_torch(recorded):
    class Renamed(nnx.Module):
        def __init__(self, *, rngs):
            self.first, self.ln = layers.Linear(5, 7, rngs=rngs), layers.LayerNorm(7, rngs=rngs)
            self.last = layers.Linear(7, 3, bias=False, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.ln(self.first(x))))

    model = Renamed(rngs=nnx.Rngs(0))
    assert parity.replay(model, recorded[1], names={"up": "first", "norm": "ln", "down": "last"}).passed
    with pytest.raises(ConversionError, match="first"):
        parity.replay(model, recorded[1])


def test_damaged_and_missing_fixtures_are_named(recorded, tmp_path):
    flax_module, stem = recorded
    with pytest.raises(ValueError, match="nothing"):
        parity.replay(flax_module, tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"flax_module=None\b.*an MLP"):
        parity.replay(None, stem)
    with pytest.raises(ValueError, match=r"flax_module="):
        parity.replay(jnp.tanh, stem)
    about = json.loads(stem.with_suffix(".json").read_text())
    stem.with_suffix(".json").write_text(json.dumps(about | {"format": 1}))
    with pytest.raises(ValueError, match=r"mlp\b.*format=1\b.*3;.*parity\.record"):
        parity.replay(flax_module, stem)
    stem.with_suffix(".json").write_text(json.dumps(about))
    stem.with_suffix(".safetensors").write_bytes(stem.with_suffix(".safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"mlp\b"):
        parity.replay(flax_module, stem)
    with pytest.raises(ValueError, match=r"stem=.*nowhere"):
        parity.record(*mlp()[::2], tmp_path / "nowhere" / "mlp")


def test_tensors_of_another_recording_are_refused(recorded, tmp_path):
    """Same names, shapes and format, other values: only the hash tells."""
    flax_module, stem = recorded
    torch_module, _, x = mlp()
    parity.record(torch_module, {"x": 2 * x}, tmp_path / "other")
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "mlp.safetensors")
    with pytest.raises(ValueError, match=r"mlp\.safetensors has another sha256 than mlp\.json"):
        parity.replay(flax_module, stem)
    with open(tmp_path / "mlp.safetensors", "wb") as opened:
        opened.truncate(10**12)
    with pytest.raises(ValueError, match=r"mlp\.safetensors has 1,000,000,000,000 bytes"):
        parity.replay(flax_module, stem)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positional", 10**9),
        ("positional", True),
        ("positional", -1),
        ("noise", {}),
        ("noise", {"output": {"output": [1.0]}}),
        ("noise", {"output": {"output": ["1", 2]}}),
        ("own values", {"output": {"output": None}}),
        ("own values", []),
        ("constants", [1.0]),
        ("constants", {"table": {"output": {"output": "much"}}}),
        ("names", {"up.weight": 3}),
        ("layers", ["up"]),
        ("layers", {"up": "Linear\0"}),
        ("layers", {"up": "Linear"}),
        ("untrained", "up.weight"),
        ("name", ["mlp"]),
        ("model", {"model": "NeoX"}),
        ("model", {"config": {}}),
        ("sha256", None),
        ("torch", "2" * 1_001),
        ("name", "n" * 10**7),
        ("layers", {"up": ".".join("0" * 100_000)}),
        ("untrained", ["u" * 1_001]),
        ("zero gradients", ["*a" * 400] * 20),
    ],
)
def test_a_field_that_is_not_as_written_is_one_short_line(recorded, field, value):
    file = recorded[1].with_suffix(".json")
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {field: value}))
    with pytest.raises(ValueError, match=r"mlp is not a fixture") as error:
        read(recorded[1])
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_a_recording_that_fails_leaves_the_old_one(recorded, tmp_path, monkeypatch):
    """The JSON is written last: without it there is no fixture."""
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    torch_module, _, x = mlp()

    def full(file, tensors):
        file.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("parity.golden.fixture.write_file", full)
    with pytest.raises(OSError, match="No space"):
        parity.record(torch_module, {"x": 2 * x}, recorded[1])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(OSError, match="No space"):
        parity.record(torch_module, {"x": x}, tmp_path / "new")
    assert {file.name for file in tmp_path.iterdir()} == set(before)


def test_a_recording_whose_writer_was_killed_is_the_old_one_or_the_new_one(recorded, tmp_path):
    """The states between the three renames; `tests.jaxmodels.io.kills` kills a process there."""
    stem = recorded[1]
    torch_module, _, x = mlp()
    old = {file: file.read_bytes() for file in files_of(stem)}
    parity.record(torch_module, {"x": 2 * x}, stem, name="new")
    new = {file: file.read_bytes() for file in files_of(stem)}
    assert sorted(old) == sorted(tmp_path.iterdir())
    tensors_file, about_file = files_of(stem)
    waiting = pending(about_file)

    for tensors, name in ((old, "an MLP"), (new, "new")):
        tensors_file.write_bytes(tensors[tensors_file])
        about_file.write_bytes(old[about_file])
        waiting.write_bytes(new[about_file])
        assert read(stem).name == name
    about_file.rename(waiting)
    assert read(stem).name == "new", "of a first recording"
    about_file.rename(waiting)
    parity.record(torch_module, {"x": x}, stem, name="third")
    assert read(stem).name == "third"
    assert sorted(old) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["waiting", "tensors", "link", "json", "dangling"])
def test_a_waiting_json_of_others_replaces_nothing(recorded, tmp_path, wrong):
    """Its sha256 is that of the tensors, and anybody may know that of published weights."""
    tensors_file, about_file = files_of(recorded[1])
    waiting = pending(about_file)
    about = json.loads(about_file.read_text())
    if wrong == "tensors":
        tensors_file.unlink()
        write_file(tensors_file, {"w": np.ones(3)})
    about |= {"name": "of others", "sha256": sha256_of(tensors_file)}
    content = json.dumps({"sha256": about["sha256"]} if wrong == "waiting" else about)
    if wrong == "link":
        (tmp_path / "elsewhere").write_text(content)
        waiting.symlink_to("elsewhere")
    else:
        waiting.write_text(content)
    if wrong == "json":
        about_file.write_text('{"my": "notes"}')
    elif wrong == "dangling":
        about_file.unlink()
        about_file.symlink_to("missing")
    before = {file: file.is_symlink() or file.read_bytes() for file in tmp_path.iterdir()}
    with contextlib.suppress(ValueError):
        assert read(recorded[1]).name == "an MLP"
    with contextlib.suppress(ValueError):
        check_target(recorded[1])
    assert {file: file.is_symlink() or file.read_bytes() for file in tmp_path.iterdir()} == before


def test_clean_lists_a_json_whose_tensors_were_not_written(recorded, tmp_path, capsys):
    tensors_file, about_file = files_of(recorded[1])
    waiting = pending(about_file)
    for content, listed in (
        (about_file.read_text(), False),  # its tensors are in place: a reader gives it its name
        (about_file.read_text().replace('"sha256": "', '"sha256": "0'), True),
        ('{"sha256": "0"}', False),  # of others
    ):
        waiting.write_text(content)
        os.utime(waiting, (0, 0))
        assert clean.main([str(tmp_path), "--delete"]) == 0
        assert (str(waiting) in capsys.readouterr().out, not waiting.exists()) == (listed, listed)
    assert tensors_file.exists()
    assert about_file.exists()


@pytest.mark.parametrize("wrong", ["mlp.safetensors", "mlp.json", ".mlp.json.new"])
@pytest.mark.parametrize("content", ["of others", "", None])
def test_files_of_others_are_not_replaced(recorded, tmp_path, wrong, content):
    torch_module, _, x = mlp()
    file = tmp_path / wrong
    if content is not None:
        file.write_text(content)
    elif wrong != "mlp.safetensors":
        file.write_text('{"format": 3, "model": "mine"}')
    else:
        file.unlink()
        write_file(file, {"state/w": np.ones(3), "output/y": np.ones(3), "w": np.ones(3)})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"{file} was not written by parity\.record"):
        parity.record(torch_module, {"x": x}, recorded[1])
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_command_replaces_no_files_of_others(tmp_path, capsys):
    file = tmp_path / "synthesizer.dense.safetensors"
    write_file(file, {"w": np.ones(3)})
    assert main(["rope.rotary", "synthesizer.dense", "--record", str(tmp_path)]) == 2
    assert f"{file} was not written by parity.record" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file], "nothing is recorded before"


def test_a_fixture_of_an_older_format_is_recorded_again(recorded):
    torch_module, _, x = mlp()
    about_file = files_of(recorded[1])[1]
    fields = json.loads(about_file.read_text())
    older = {"format", "name", "model", "positional", "zero gradients", "untrained", "torch"}
    about_file.write_text(json.dumps({key: fields[key] for key in older} | {"format": 1, "own errors": {}}))
    parity.record(torch_module, {"x": x}, recorded[1], name="again")
    assert read(recorded[1]).name == "again"


def test_every_system_ships_a_fixture():
    shipped = {file.stem for file in stems(SHIPPED)}
    assert shipped == set(GOLDEN)
    assert {name.split(".")[0] for name in shipped} == set(SYSTEMS)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rope.rotary_value", "retro.neighbors", "neox.sequential"])
def test_the_shipped_fixtures_are_torchs_results_today(name, tmp_path):
    """Recorded again, they are equal up to float64's rounding on another machine."""
    pair = pair_of(GOLDEN[name], 0)
    record(pair.torch, pair.inputs, tmp_path / name, flax_module=pair.flax, labels=pair.labels, name=name)
    new, old = read(tmp_path / name), read(SHIPPED / name)
    assert new.model == old.model
    for kind, tensors in new.results.items():
        for key, tensor in tensors.items():
            np.testing.assert_allclose(old.results[kind][key], tensor, rtol=0, atol=1e-12)


def test_the_command_records_models_that_can_be_rebuilt(tmp_path, capsys):
    assert main(["rope.embeddings", "synthesizer.dense_language_model", "--record", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "rope.embeddings: skipped" in shown
    assert [file.stem for file in stems(tmp_path)] == ["synthesizer.dense_language_model"]
    assert main(["--record", str(tmp_path / "nowhere")]) == 2


@pytest.mark.slow
def test_a_small_model_is_recorded_alone_by_its_name_and_by_its_system(tmp_path, capsys):
    assert main(["synthesizer.dense", "--record", str(tmp_path)]) == 0
    assert [file.stem for file in stems(tmp_path)] == ["synthesizer.dense"]
    assert read(tmp_path / "synthesizer.dense").model == read(SHIPPED / "synthesizer.dense").model
    assert main(["retro", "--record", str(tmp_path)]) == 0
    assert [file.stem for file in stems(tmp_path)] == ["retro.neighbors", "synthesizer.dense"]
    assert main(["synthesizer.dense", "synthesizer.thin", "--record", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "synthesizer.thin" in error
    assert "rope.rotary" in error
    assert "rope.attention" in error


@pytest.mark.slow
def test_shipped_fixtures_replay_without_torch(tmp_path):
    program = WITHOUT_TORCH + "from parity.__main__ import main; sys.exit(main(sys.argv[1:]))"
    file = tmp_path / "out.json"
    command = [sys.executable, "-c", program, "rope", "retro", "--replay", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = {report["name"]: report for report in json.loads(file.read_text())}
    assert set(reports) == {"rope.rotary", "rope.rotary_value", "retro.neighbors"}
    for report in reports.values():
        assert {"output", "parameter gradients", "cached decoding"} <= {check["kind"] for check in report["checks"]}


@pytest.mark.slow
def test_a_damaged_fixture_is_listed_and_the_others_are_replayed(tmp_path, capsys):
    for file in (*files_of(SHIPPED / "rope.rotary"), *files_of(SHIPPED / "transformer.plain")):
        shutil.copy(file, tmp_path)
    (tmp_path / "rope.rotary.safetensors").write_bytes(b"")
    assert main(["--replay", str(tmp_path), "--json", str(tmp_path / "out.txt")]) == 2
    assert "rope.rotary" in capsys.readouterr().out
    reports = json.loads((tmp_path / "out.txt").read_text())
    assert [(r["name"], r["passed"]) for r in reports] == [("rope.rotary", False), ("transformer.plain", True)]


def test_an_unknown_name_and_an_empty_folder_are_one_line(tmp_path, capsys):
    assert main(["--replay", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["nonsense", "--replay"]) == 2
    error = capsys.readouterr().err
    assert "nonsense" in error
    assert "rope.rotary" in error
    assert main(["rope", "nonsense", "--replay"]) == 2, "no name is passed over"


class Scaled(torch.nn.Linear):
    def forward(self, x, scale, state, mask):
        return super().forward(x) * scale + state[0]


def test_constants_and_nested_inputs_are_not_recorded(tmp_path):
    inputs = {"x": np.ones((2, 5)), "scale": 2.0, "state": [np.ones(3)], "mask": None}
    with pytest.raises(ValueError, match=r"inputs: got scale, state;"):
        record(Scaled(5, 3), inputs, tmp_path / "scaled")


def test_arrays_without_an_axis_are_recorded_as_such(tmp_path):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x, power):
            return (self.factor * x**power).sum()

    class Port(nnx.Module):
        def __init__(self):
            self.factor = nnx.Param(jnp.zeros(()))

        def __call__(self, x, power):
            return (self.factor[...] * x**power).sum()

    inputs = {"x": np.array([0.5, 1.5, 2.5], np.float32), "power": np.array(2)}
    parity.record(Scaled(), inputs, tmp_path / "scaled")
    assert parity.replay(Port(), tmp_path / "scaled").passed


@pytest.mark.slow
@pytest.mark.parametrize("file", ["json", "safetensors"])
@pytest.mark.parametrize("what", ["missing", "a FIFO", "a link to nothing", "a folder"])
def test_a_fixture_without_one_of_its_files_is_listed(file, what, tmp_path, capsys):
    for name in ("rope.rotary_value", "synthesizer.dense"):
        for each in files_of(SHIPPED / name):
            shutil.copy(each, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.json").symlink_to("gone")
    bad = tmp_path / f"synthesizer.dense.{file}"
    bad.unlink()
    make = {"a FIFO": os.mkfifo, "a link to nothing": lambda path: path.symlink_to("nothing"), "a folder": os.mkdir}
    make.get(what, lambda path: None)(bad)
    assert main(["--replay", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "1 of 2 cases agree" in shown.out
    assert "synthesizer.dense: ERROR" in shown.out
