"""Numbers in files of others: True and 1.0 are equal to 1 in Python, and are not the integer that a file must hold."""

import json

import pytest

from jaxmodels.io import manifest
from jaxmodels.io.bounded import check_format, is_integer
from tests.fuzz.targets import TARGETS

# Target, file, keys of an integer in it.
INTEGERS = [
    ("model", "config.json", ["format"]),
    ("run", "config.json", ["format"]),
    ("run", "checkpoints/7/complete.json", ["format"]),
    ("run", "checkpoints/7/complete.json", ["step"]),
    ("run", "checkpoints/7/complete.json", ["files", "losses.npy"]),
    ("tokens", "tokens/tokens.json", ["format"]),
    ("tokens", "tokens/tokens.json", ["train"]),
    ("chunk index", "index/about.json", ["format"]),
    ("chunk index", "index/about.json", ["added"]),
    ("fixture", "one.json", ["format"]),
    ("fixture", "one.json", ["positional"]),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Function of a target's name to a folder with its example, which is made once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("target")
            TARGETS[name].make(folders[name])
        return folders[name]

    return folder


@pytest.mark.filterwarnings("ignore:skipped checkpoint")
@pytest.mark.parametrize(("name", "file", "keys"), INTEGERS)
def test_an_integer_is_neither_a_float_nor_a_truth_value(made, name, file, keys):
    folder = made(name)
    text = (folder / file).read_text()
    for kind in (float, bool, str):
        content = json.loads(text)
        holder = content
        for key in keys[:-1]:
            holder = holder[key]
        if kind is bool and name == "run" and file != "config.json":
            holder[keys[-1]] = True
        else:
            holder[keys[-1]] = kind(holder[keys[-1]])
        (folder / file).write_text(json.dumps(content))
        try:
            if (name, keys[0]) == ("run", "format") or file.startswith("checkpoints"):
                refused(name, folder, file)
            else:
                with pytest.raises(ValueError, match=r"format|json|positional|tokens|added"):
                    TARGETS[name].read(folder)
        finally:
            (folder / file).write_text(text)


def refused(name, folder, file):
    """A run's own file raises; a checkpoint's is skipped with its reason."""
    from jaxmodels.io.steps import latest_step
    from jaxmodels.training.runs.folder import read_about

    if file == "config.json":
        with pytest.raises(ValueError, match=r"config\.json has format"):
            read_about(folder)
    else:
        step, skipped = latest_step(folder)
        assert step.name == "3"
        assert "complete.json" in skipped[7]


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_a_manifest_of_another_format_claims_nothing(tmp_path, value):
    (tmp_path / manifest.NAME).write_text(json.dumps({"format": value, "complete": True, "files": {}}))
    assert not manifest.is_ours(tmp_path)
    (tmp_path / manifest.NAME).write_text(json.dumps({"format": 1, "complete": True, "files": {}}))
    assert manifest.is_ours(tmp_path)


def test_an_integer_is_of_the_type():
    assert is_integer(1, 1)
    assert not any(is_integer(value, 1) for value in (True, 1.0, "1", None, 2))
    check_format("a.json", 3, 3)
    with pytest.raises(ValueError, match=r"^a\.json has format True, this version reads 1; do it$"):
        check_format("a.json", True, 1, "; do it")
