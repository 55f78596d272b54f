"""A run's config.json, as it is read."""

import dataclasses
import importlib
import json
import re

import pytest

from jaxmodels.training.experiment import EXPERIMENTS
from jaxmodels.training.runs.folder import read_about, saved_config, saved_experiment
from train import neox

ABOUT = {"format": 3, "script": "train.rope", "standalone": True, "config": {"seq_len": 7}, "sha256": "0" * 64}


def test_a_configuration_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ABOUT))
    about = read_about(tmp_path)
    assert (about.script, about.config, about.standalone) == ("train.rope", {"seq_len": 7}, True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 4}, r"format 4\b.*3"),
        ({"config": [1, 2]}, r"config=\[1, 2\].*dict"),
        ({"config": None}, "config=None.*dict"),
        ({"standalone": "yes"}, "standalone='yes'"),
    ],
)
def test_another_content_is_refused_by_name(tmp_path, change, match):
    (tmp_path / "config.json").write_text(json.dumps(ABOUT | change))
    with pytest.raises(ValueError, match=match):
        read_about(tmp_path)


@pytest.mark.parametrize("missing", ["format", "script", "config", "sha256"])
def test_a_missing_entry_is_refused_by_name(tmp_path, missing):
    (tmp_path / "config.json").write_text(json.dumps({name: ABOUT[name] for name in ABOUT if name != missing}))
    with pytest.raises(ValueError, match=missing):
        read_about(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("text", ["a"], "str"),
        ("text", 5, "str"),
        ("learning_rate", "x", "float"),
        ("learning_rate", True, "float"),
        ("eps", None, "float"),
        ("clip", [1.0], r"float \| None"),
        ("steps", True, "int"),
        ("seq_len", 7.5, "int"),
        ("keep_every", "7", r"int \| None"),
        ("within_documents", 1, "bool"),
        ("optimizer", "\x1b[31m", r"Literal\['original'"),
        ("param_dtype", {}, "Literal"),
    ],
)
@pytest.mark.parametrize("standalone", [True, False])
def test_a_value_of_another_type_is_refused_by_name(field, value, kind, standalone, tmp_path):
    about = ABOUT | {"config": {field: value}, "standalone": standalone}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"config\.json: {field}={re.escape(repr(value))} must be {kind}"):
        saved_experiment(tmp_path)


@pytest.mark.parametrize(
    ("script", "field", "value"),
    [
        ("train.retro", "ca_layers", ["a"]),
        ("train.retro", "encoder_ca_layers", 1),
        ("train.retro", "ca_layers", [[0]]),
        ("train.neox", "lora_targets", "dense"),
        ("train.neox", "lora_targets", [5]),
    ],
)
def test_a_list_of_another_type_is_refused_by_name(script, field, value, tmp_path):
    about = ABOUT | {"config": {field: value}, "script": script, "standalone": False}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"config\.json: {field}={re.escape(repr(value))} must be tuple"):
        saved_experiment(tmp_path)


def test_the_configuration_of_every_preset_is_read_again(tmp_path):
    for module in EXPERIMENTS.values():
        kind = importlib.import_module(module).EXPERIMENT
        for name in kind.config_class.PRESETS:
            saved = json.loads(json.dumps(dataclasses.asdict(kind.config_class.of_preset(name))))
            kind.config_class.check_types(saved)


def test_a_fine_tuned_run_has_the_layers_of_its_source_instead_of_the_flag_s(tmp_path):
    step = tmp_path / "checkpoints" / "2"
    (step / "model").mkdir(parents=True)
    (step / "complete.json").write_text("{}")
    (step / "model" / "config.json").write_text(json.dumps({"format": 1, "model": "NeoX", "config": {"n_layers": 3}}))
    config = {"checkpoint": "elsewhere", "n_layers": 7}
    (tmp_path / "config.json").write_text(json.dumps(ABOUT | {"script": "train.neox", "config": config}))
    assert saved_config(neox.Neox, tmp_path).n_layers == 7


def test_a_hyperparameter_s_name_of_several_lines_is_refused_in_one(tmp_path):
    config = {"\x9b31m\r\n\b": 1}
    (tmp_path / "config.json").write_text(json.dumps(ABOUT | {"script": "train.neox", "config": config}))
    with pytest.raises(ValueError, match=r"config\.json has a configuration that .*\\x9b31m\\r\\n\\x08") as refused:
        saved_config(neox.Neox, tmp_path)
    assert str(refused.value).isprintable()
