"""Hyperparameters and their presets."""

import dataclasses
import json
import math
import os
import types
from pathlib import Path

import pytest

from jaxmodels.io.checkpoint import save_arrays
from jaxmodels.training.config import Config
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.runs.folder import Branch, check_folder, saved_config, write_about
from jaxmodels.training.runs.original import original_of
from jaxmodels.training.script import main, parse
from train import feedback, neox, retro, rope, rope_value


@dataclasses.dataclass(frozen=True)
class Own(Config):
    """Hyperparameters of an experiment outside the project, without presets."""

    context: int = 3
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class WithPresets(Own):
    PRESETS = ("tiny",)

    @classmethod
    def tiny(cls) -> "WithPresets":
        """Seconds on one core."""
        return cls(context=1)


def test_a_config_without_presets_has_its_defaults():
    assert Own.of_preset(Own.PRESETS[0]) == Own()


def test_a_config_with_presets_has_these_alone():
    assert WithPresets.of_preset("tiny").context == 1
    with pytest.raises(ValueError, match=r"preset='default'.*tiny"):
        WithPresets.of_preset("default")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("steps", 0), ("seq_len", -1), ("seed", -1), ("clip", 0.0), ("b2", 1.0), ("weight_decay", -0.5)],
        *[("learning_rate", math.inf), ("eps", math.inf), ("clip", math.nan), ("share", -math.inf)],
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Own(**{field: value})


@pytest.mark.parametrize("field", ["learning_rate", "eps", "clip", "weight_decay", "share"])
def test_a_whole_number_stands_for_a_float(field):
    found = getattr(Own(**{field: 10**10}), field)
    assert (found, type(found)) == (1e10, float)
    with pytest.raises(ValueError, match=f"^{field}=1000"):
        Own(**{field: 10**400})


@dataclasses.dataclass(frozen=True)
class WithTuples(Own):
    layers_used: tuple[int, ...] = (0, 1)
    pairs: tuple[tuple[int, str], ...] | None = None


def test_tuples_of_a_run_are_tuples_again_and_its_command_resumes_it(tmp_path):
    class Mine(Experiment[WithTuples]):
        config_class = WithTuples

    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    mark = {"format": 2, "step": 5, "data": {}, "files": {}}
    (tmp_path / "checkpoints" / "5" / "complete.json").write_text(json.dumps(mark))
    config = WithTuples(pairs=((3, "a"), (5, "b")))
    write_about(tmp_path, Mine(config), "0" * 64, {})
    assert saved_config(Mine, tmp_path) == config
    check_folder(Mine(config), tmp_path)
    with pytest.raises(ValueError, match=r"layers_used=\[0, 1\], not layers_used=\[2\]"):
        check_folder(Mine(dataclasses.replace(config, layers_used=(2,))), tmp_path)


def test_a_path_that_no_file_can_hold_is_refused_by_name(tmp_path):
    """JSON has no names but in UTF-8; Orbax neither."""
    path = str(tmp_path / os.fsdecode(b"a\xff"))
    with pytest.raises(ValueError, match=f"^text={path} is not UTF-8"):
        Config(text=path)
    with pytest.raises(ValueError, match=f"^index={path} is not UTF-8"):
        retro.Config(index=path)
    with pytest.raises(ValueError, match=f"^folder={path} is not UTF-8"):
        check_folder(rope.Rope(rope.Config()), Path(path))
    with pytest.raises(ValueError, match=f"^branch={path} is not UTF-8"):
        Branch.at(path)
    Path(path).mkdir()
    opened = types.SimpleNamespace(name=path, companions=None, original={"dtype": "float32"})
    with pytest.raises(ValueError, match=f"^checkpoint={path} is not UTF-8"):
        original_of(opened)
    with pytest.raises(ValueError, match=f"^folder={path} is not UTF-8"):
        save_arrays(Path(path), None)


def test_help_lists_the_presets_and_names_its_boxes_for_what_they_hold(capsys):
    with pytest.raises(SystemExit):
        main(neox.Neox, "python -m train.neox", ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for preset in neox.Config.PRESETS:
        assert f"{preset}: " in shown
    for box in ("hyperparameter options", "execution options", "multi-process options"):
        assert f" {box} " in shown
    assert "options options" not in shown
    assert "config options" not in shown


def test_help_repeats_the_values_of_a_run_with_escapes(capsys):
    from jaxmodels.training.script import parse_flags

    config = dataclasses.make_dataclass("Named", [("text", str, "\x1b]0;name\x07\u202e")], frozen=True)
    with pytest.raises(SystemExit):
        parse_flags(config, (), ["--help"], "python -m train.rope")
    shown = capsys.readouterr().out
    assert "x1b]0;name" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_paths_of_flags_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    flags = ["--out=~/run", "--text=~/a.txt", "--compile-cache=~/cache"]
    experiment, command = parse(neox.Neox, "python -m train.neox", flags)
    assert experiment.config.text == "/home/somebody/a.txt"
    assert (command.run, command.options.compile_cache) == (Path("/home/somebody/run"), Path("/home/somebody/cache"))


def test_a_list_of_layers_without_one_is_refused():
    with pytest.raises(ValueError, match=r"^ca_layers=\(\) "):
        parse(retro.Retro, "python -m train.retro", ["--ca-layers"])


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        (rope.Rope, "--optimizer lion --b2 0.99", r"^b2=0\.99 .*optimizer=lion .*original, torch, adamw and muon"),
        (rope.Rope, "--optimizer adafactor --eps=1e-8", r"^eps=1e-08 .*optimizer=adafactor .*muon"),
        (rope.Rope, "--optimizer torch --weight-decay 0", r"^weight_decay=0\.0 .*=torch .*adafactor, lion and muon"),
        (rope.Rope, "--schedule constant --warmup 3", r"^warmup=3 .*noam and cosine"),
        (rope.Rope, "--text-field body", r"^text_field=body .*text='python_docs' .*\.parquet"),
        (rope_value.RopeValue, "--text-field body", r"^text_field=body "),
        (feedback.Feedback, "--double-every 7", r"^double_every=7 .*start_len=None"),
        (feedback.Feedback, "--remat layers", r"^remat=layers "),
        (neox.Neox, "--tokenizer t.json", r"^tokenizer=t\.json .*--checkpoint"),
        (neox.Neox, "--checkpoint x --d-model 64", r"^d_model=64 .*checkpoint='x'"),
    ],
)
def test_a_flag_without_effect_is_refused(kind, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(kind, "python -m train.x", flags.split())


def test_values_that_were_not_given_may_have_no_effect(tmp_path):
    config = parse(neox.Neox, "python -m train.neox", ["--preset", "finetune", "--optimizer", "lion"])[0].config
    assert (config.eps, config.optimizer) == (1e-16, "lion")
    (tmp_path / "a.jsonl").touch()
    flags = ["--text", str(tmp_path / "a.jsonl"), "--text-field", "body", "--optimizer=muon", "--b2=0.9"]
    assert parse(rope.Rope, "python -m train.rope", flags)[0].config.text_field == "body"
