"""Fixtures whose content was changed by others: arrays that do not fit, and numbers with which anything would agree."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
from flax import nnx

import parity
from jaxmodels import layers
from jaxmodels.io.bounded import sha256_of
from jaxmodels.io.formats.safetensors import read_file, write_file
from parity.command import main
from parity.compare.comparison import Comparison
from parity.golden.fixture import SHIPPED, files_of, read, stems
from tests.parity.pairs import mlp

GRADIENTS = "parameter gradients"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch_module, flax_module, x = mlp()
    stem = tmp_path_factory.mktemp("original") / "mlp"
    parity.record(torch_module, {"x": x}, stem)
    return flax_module, stem


@pytest.fixture
def recorded(original, tmp_path):
    flax_module, stem = original
    for file in files_of(stem):
        shutil.copy(file, tmp_path)
    return flax_module, tmp_path / "mlp"


def change(stem, tensors=None, about=None):
    """Rewrite a fixture with the functions' changes; its sha256 is right."""
    tensors_file, about_file = files_of(stem)
    held = {name: np.array(tensor) for name, tensor in read_file(tensors_file).items()}
    fields = json.loads(about_file.read_text())
    if tensors:
        held = tensors(held)
    if about:
        about(fields)
    tensors_file.unlink()
    write_file(tensors_file, {name: np.ascontiguousarray(tensor) for name, tensor in held.items()})
    about_file.write_text(json.dumps(fields | {"sha256": sha256_of(tensors_file)}))


def of_group(group, function):
    """A change of the tensors of one group."""
    return lambda held: {n: function(t) if n.startswith(f"{group}/") else t for n, t in held.items()}


def without(group):
    """A change that removes the tensors of a group."""
    return lambda held: {name: tensor for name, tensor in held.items() if not name.startswith(f"{group}/")}


def in_all(field, value):
    """A change of the numbers of all tensors in a field of the JSON."""

    def apply(about):
        about[field] = {kind: dict.fromkeys(of_kind, value) for kind, of_kind in about[field].items()}

    return apply


@pytest.mark.parametrize("group", ["state", "inputs", "targets", "output", GRADIENTS, "input gradients"])
@pytest.mark.parametrize(
    "function", [lambda t: t.reshape(-1)[:1], lambda t: t[..., None], lambda t: t > 0], ids=["one", "rank", "bool"]
)
def test_an_array_of_another_shape_or_dtype_is_named(recorded, group, function):
    flax_module, stem = recorded
    change(stem, of_group(group, function))
    with pytest.raises(ValueError, match=rf"{group}/") as error:
        parity.replay(flax_module, stem)
    assert str(stem) in str(error.value)


def test_outputs_and_targets_of_another_shape_are_compared_with_the_module(recorded):
    flax_module, stem = recorded
    change(stem, lambda held: of_group("targets", lambda t: t[:1])(of_group("output", lambda t: t[:1])(held)))
    with pytest.raises(ValueError, match=r"mlp: 'output/output' is float64 \[1, 3\].* \[\d+, 3\]"):
        parity.replay(flax_module, stem)


@pytest.mark.parametrize("number", [1e300, math.inf, math.nan, -1.0, 1e-3, 1e-8])
def test_noise_that_would_hide_anything_is_refused(recorded, number):
    flax_module, stem = recorded
    change(stem, of_group("output", lambda t: t + 1), in_all("noise", [number, 1e30]))
    with pytest.raises(ValueError, match=r"mlp\b.*noise of 'output/output' is"):
        parity.replay(flax_module, stem)


@pytest.mark.parametrize("number", [1e30, math.inf, math.nan, -1.0])
def test_own_values_that_would_hide_anything_are_refused(recorded, number):
    change(recorded[1], None, in_all("own values", number))
    with pytest.raises(ValueError, match=r"mlp\b.*own values of 'output/output' is"):
        read(recorded[1])


@pytest.mark.parametrize(
    ("constants", "named"),
    [
        ([], r"constants=\[\] must be an object"),
        ({"a\x1b[2J": {}}, "constants=.* printable"),
        ({"x" * 1_001: {}}, "constants: .*1,001 characters"),
        ({"scale": {"output": {"other": 1.0}}}, "constants of 'scale' has 'output/other'"),
        ({"scale": {"losses": {"output": 1.0}}}, "constants of 'scale' has 'losses/output'"),
        ({"scale": {"output": {"output": -1.0}}}, "scale of 'output/output' is -1"),
    ],
)
def test_constants_are_of_results_of_the_fixture(recorded, constants, named):
    change(recorded[1], None, lambda fields: fields.update(constants=constants))
    with pytest.raises(ValueError, match=rf"mlp\b.*{named}"):
        read(recorded[1])


@pytest.mark.slow
def test_a_constant_that_would_hide_anything_is_refused(recorded):
    flax_module, stem = recorded

    def moved(by):
        names = [f"scale {i}" for i in range(100)]
        return lambda fields: fields.update(constants={name: {"output": {"output": by}} for name in names})

    change(stem, of_group("output", lambda t: t * (1 + 1e-9)), moved(1e9))
    report = parity.replay(flax_module, stem)
    assert report.passed
    assert any("scale 5 in PyTorch; " in note for note in report.notes)
    change(stem, of_group("output", lambda t: t * 1.001), moved(math.inf))  # at most what float32 costs may pass
    assert parity.replay(flax_module, stem).value("output", "float64") > 1e9
    assert not parity.replay(flax_module, stem).passed
    for by in (1e13, math.inf):
        change(stem, None, lambda fields, by=by: (moved(by)(fields), in_all("noise", [1e-12, 1e30])(fields)))
        with pytest.raises(ValueError, match=r"mlp\b.*constants of 'scale 0' has 'output/output' at"):
            read(stem)


def test_weights_and_results_without_numbers_are_refused(recorded):
    stem = recorded[1]
    change(stem, of_group("output", lambda t: t * math.nan))
    with pytest.raises(ValueError, match="'output/output' has no finite number"):
        read(stem)
    change(stem, of_group("state", lambda t: t * math.nan))
    with pytest.raises(ValueError, match=r"'state/.*' has NaN"):
        read(stem)


def test_gradients_that_are_all_zero_are_refused(recorded):
    """A port that passes no gradients on would agree."""

    def about(fields):
        for kind in (GRADIENTS, "input gradients"):
            fields["noise"][kind] = {name: [0.0, 1e30] for name in fields["noise"][kind]}
            fields["own values"][kind] = dict.fromkeys(fields["own values"][kind], 0.0)

    stem = recorded[1]
    change(stem, of_group(GRADIENTS, np.zeros_like), about)
    with pytest.raises(ValueError, match=rf"mlp\b.*{GRADIENTS} are all zero"):
        read(stem)
    change(
        stem,
        lambda held: of_group("input gradients", np.zeros_like)(without(GRADIENTS)(held)),
        lambda fields: [
            fields[field].pop(GRADIENTS) if isinstance(fields[field], dict) else fields[field].remove(GRADIENTS)
            for field in ("noise", "own values", "readings")
        ],
    )
    with pytest.raises(ValueError, match=r"mlp\b.*input gradients are all zero"):
        read(stem)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_targets_are_numbers_where_the_output_is_one(recorded, number):
    stem = recorded[1]
    change(stem, of_group("targets", lambda t: np.where(np.arange(t.size).reshape(t.shape) > 0, number, t)))
    with pytest.raises(ValueError, match=r"mlp\b.*'targets/output' has NaN"):
        read(stem)


class Masked(torch.nn.Linear):
    """Outputs of every kind that has no target: NaN, infinities and a constant that masks others."""

    def forward(self, x, used):
        y = super().forward(x).clone()
        y[0, :3] = torch.tensor([math.nan, -math.inf, -1e9], dtype=y.dtype)
        return torch.where(used > 0, y, 0)


def test_a_module_with_masks_and_an_input_without_gradients_is_recorded_and_read(tmp_path):
    parity.record(Masked(5, 7), {"x": np.ones((3, 5)), "used": np.ones((3, 1))}, tmp_path / "masked")
    fixture = read(tmp_path / "masked")
    assert np.isnan(fixture.targets["output"]).sum() == 3
    assert not fixture.results["input gradients"]["used"].any()


def test_results_that_are_all_zero_are_refused(recorded, tmp_path):
    """Any model agrees whose weights and results are zero."""
    _, stem = recorded

    def about(fields):
        fields["readings"], fields["zero gradients"], fields["constants"] = ["output"], [], {}
        fields["noise"], fields["own values"] = {"output": {"output": [0.0, 1e30]}}, {"output": {"output": 0.0}}

    def tensors(held):
        held = {name: tensor for name, tensor in held.items() if "gradients" not in name}
        return of_group("state", np.zeros_like)(of_group("output", np.zeros_like)(held))

    change(stem, tensors, about)
    with pytest.raises(ValueError, match=r"mlp\b.*output: all numbers are zero"):
        read(stem)

    class Last(torch.nn.Linear):
        """As the last layer of a block that begins as the identity."""

        def reset_parameters(self):
            torch.nn.init.zeros_(self.weight)

    parity.record(Last(5, 3, bias=False), np.ones((2, 5)), tmp_path / "last", randomize=False)
    assert not read(tmp_path / "last").results["output"]["output"].any()


def test_gradients_that_are_zero_in_pytorch_are_not_recorded(tmp_path):
    class Detached(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).detach() + 0 * self.weight.sum()

    parity.record(Detached(5, 7), np.ones((3, 5)), tmp_path / "detached", zero_gradients=["weight"])
    assert read(tmp_path / "detached").results.keys() == {"output"}


class Narrow(torch.nn.Module):
    """A frozen matrix and a table in half precision."""

    def __init__(self, dtype):
        super().__init__()
        self.base = torch.nn.Linear(7, 5).to(dtype).requires_grad_(False)
        self.own = torch.nn.Linear(7, 5)
        self.register_buffer("table", torch.linspace(0.1, 1, 5).to(dtype))

    def forward(self, x):
        return (self.base(x.to(self.base.weight.dtype)).to(x.dtype) + self.own(x)) * self.table.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_constants_in_half_precision_are_recorded_and_read(tmp_path, dtype, whole):
    torch.manual_seed(0)
    module = Narrow(dtype).to(dtype) if whole else Narrow(dtype)
    parity.record(module, np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7), tmp_path / "half")
    assert read(tmp_path / "half").constants.keys() == {"base.weight", "base.bias", "table"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "n" * 1_001}, "1,001 characters"),
        ({"zero_gradients": ["weight"] * 101}, "101 patterns"),
        ({"zero_gradients": ["weight" * 2_000]}, "12,000 characters"),
    ],
)
def test_arguments_that_would_not_be_read_are_refused_before_any_work(tmp_path, monkeypatch, settings, named):
    monkeypatch.setattr(Comparison, "torch_side", lambda *_: pytest.fail("it was evaluated"))
    with pytest.raises(ValueError, match=named):
        parity.record(torch.nn.Linear(5, 7), np.ones((3, 5)), tmp_path / "linear", **settings)
    assert not list(tmp_path.iterdir())


def test_what_would_not_be_read_is_not_recorded(tmp_path):
    class Half(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, y * math.nan

    with pytest.raises(ValueError, match=r"half\b.*'output/output\[1\]' has no finite number"):
        parity.record(Half(5, 7), np.ones((3, 5)), tmp_path / "half")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_not_compared_says_nothing_about_noise(recorded):
    flax_module, stem = recorded
    zzz = "output[zzz]"

    def about(fields):
        in_all("noise", [0.1, 1e30])(fields)
        fields["noise"]["output"][zzz], fields["own values"]["output"][zzz] = [0.0, 1e30], 0.0

    change(stem, lambda held: held | {f"output/{zzz}": np.full(3, 1e25), f"targets/{zzz}": np.zeros(3)}, about)
    with pytest.raises(ValueError, match=r"noise of 'output/output' is 0\.1"):
        parity.replay(flax_module, stem)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_expected_values_that_are_not_finite_differ(recorded, number):
    flax_module, stem = recorded
    change(stem, of_group("output", lambda t: np.where(np.arange(t.size).reshape(t.shape) == 1, number, t)))
    report = parity.replay(flax_module, stem)
    assert {check.precision for check in report.checks if check.kind == "output" and not check.passed} == {
        "float64",
        "float32",
    }


def test_tensors_that_the_json_states_are_there(recorded):
    stem = recorded[1]
    fields = json.loads(files_of(stem)[1].read_text())
    assert fields["readings"] == ["output", GRADIENTS, "input gradients"]
    change(stem, without(GRADIENTS))
    with pytest.raises(ValueError, match=r"mlp\b.*'parameter gradients'"):
        read(stem)
    change(stem, None, lambda about: about.pop("readings"))
    with pytest.raises(ValueError, match=r"mlp\b.*'parameter gradients'"):
        read(stem)


@pytest.mark.parametrize("key", ["parameter gradients/up.weight", "other/up.weight", "output/output"])
def test_a_single_tensor_more_or_less_is_named(recorded, key):
    def changed(held):
        return {k: t for k, t in held.items() if k != key} if key in held else held | {key: np.ones(3)}

    change(recorded[1], changed)
    with pytest.raises(ValueError, match=rf"mlp\b.*'({key}|output)'"):
        read(recorded[1])


@pytest.mark.slow
def test_a_reading_that_is_absent_is_said_to_be(tmp_path, capsys):
    for file in files_of(SHIPPED / "rope.rotary"):
        shutil.copy(file, tmp_path)

    def about(fields):
        fields["readings"] = ["output"]
        for field in ("noise", "own values"):
            del fields[field][GRADIENTS]

    change(tmp_path / "rope.rotary", without(GRADIENTS), about)
    assert main(["--replay", str(tmp_path), "--json", str(tmp_path / "out.txt")]) == 0
    assert f"rope.rotary: {GRADIENTS}: not in the fixture" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "out.txt").read_text())
    assert report["skipped"][GRADIENTS] == "not in the fixture"
    assert "input gradients" not in report["skipped"], "ids have no gradients"


def test_an_ill_conditioned_module_is_not_recorded(tmp_path):
    class Cancels(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1e8 - 1e8

    with pytest.raises(ValueError, match=r"cancels\b.*(noise|own values) of 'output/output' is"):
        parity.record(Cancels(5, 7), np.ones((3, 5)), tmp_path / "cancels")
    assert not list(tmp_path.iterdir())


def test_parameters_without_gradients_are_noted(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(5, 7))
    module[0].bias.requires_grad_(False)
    parity.record(module, np.ones((3, 5)), tmp_path / "frozen")
    port = nnx.Sequential(layers.Linear(5, 7, rngs=nnx.Rngs(0)))
    report = parity.replay(port, tmp_path / "frozen", names={"0": "layers.0"})
    assert report.passed, str(report)
    assert any(note.startswith("1 parameters") for note in report.notes)


def test_shipped_fixtures_are_far_from_the_limits_of_noise():
    """By a factor of 1000: the limit is 2⁻³³ of the largest element."""
    for stem in stems(SHIPPED):
        fixture = read(stem)
        for kind, noises in fixture.noises.items():
            largest = max(np.abs(t).max() for t in fixture.results[kind].values())
            assert max(noise.unit for noise in noises.values()) < 2**-43 * largest


@pytest.mark.slow
def test_lists_that_would_take_minutes_are_read_at_once_or_refused(recorded):
    _, stem = recorded
    many = [f"p{i}" for i in range(100_000)]

    def longer(about):
        about["names"] |= dict(zip(many, many, strict=True))
        about["untrained"] += many

    change(stem, about=longer)
    began = time.process_time()
    found = list(read(stem).named_parameters())
    assert sum(not parameter.requires_grad for _, parameter in found) == len(many)
    assert time.process_time() - began < 5
    change(stem, about=lambda about: about.update({"zero gradients": many}))
    with pytest.raises(ValueError, match=rf"{stem} .*zero gradients has 100,000 patterns; at most 100"):
        read(stem)


@pytest.mark.parametrize("name", ["foo", "output[a", "outputs", "", "output[0]]x"])
def test_an_output_has_a_name_as_they_are_recorded(recorded, name):
    flax_module, stem = recorded

    def renamed(held):
        return {
            key.replace("/output", f"/{name}") if key.startswith(("output", "targets")) else key: held[key]
            for key in held
        }

    def about(fields):
        for field in ("noise", "own values"):
            fields[field]["output"] = {name: fields[field]["output"]["output"]}

    change(stem, renamed, about)
    with pytest.raises(ValueError, match=r"mlp\b.* is no name of an output"):
        parity.replay(flax_module, stem)
