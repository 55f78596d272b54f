"""A run's config.json, as it is read."""

import json

import pytest

from jaxmodels.training.run import read_about

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
