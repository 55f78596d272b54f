"""Manifests: one of a finished folder proves nothing of an unfinished one, and a full disk leaves no folder."""

import json

import pytest

from jaxmodels.io import manifest, steps
from jaxmodels.io.atomic import atomic_folder, temporary_folder
from jaxmodels.io.clean import main as clean
from jaxmodels.text.partial import locked
from jaxmodels.text.tokens import write
from jaxmodels.text.vocabularies import CharVocabulary
from tests.jaxmodels.io.full_disk import full_disk
from tests.jaxmodels.io.test_atomic import aged, contents


@pytest.mark.parametrize("names", [["model/thesis.txt"], ["model/config.json", "losses.npy"]])
@pytest.mark.parametrize("listed", [True, False])
def test_a_step_is_never_complete_by_its_manifest(names, listed, tmp_path):
    folder = tmp_path / "checkpoints" / "6"
    (folder / "model").mkdir(parents=True)
    for name in names:
        (folder / name).write_text("my thesis")
    files = dict.fromkeys(names, 9) if listed else {}
    manifest.write(folder, complete=True, name="6", files=files)
    aged(tmp_path)
    before = contents(folder)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert contents(folder) == before
    with pytest.raises(ValueError, match=rf"{folder} is not removed: .*\.jaxmodels\.json says that it is complete"):
        steps.remove(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("name", [".model.0a1b2c3d", ".model.0a1b2c3d.old"])
@pytest.mark.parametrize(
    ("file", "text"), [("thesis.tex", "mine"), ("config.json", "mine"), ("params/thesis.tex", "mine")]
)
def test_a_complete_manifest_claims_no_file_that_is_never_written(name, file, text, tmp_path):
    folder = tmp_path / name
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(text)
    manifest.finish(folder)
    assert manifest.foreign(folder) is None
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert contents(folder) == {file: text}


def test_a_finished_folder_that_waits_for_its_name_is_removed(tmp_path):
    folder = tmp_path / ".model.0a1b2c3d"
    block = f"params/state/d/{'0' * 32}"
    for name, content in {"config.json": b"{}", block: b"numbers", "params/state/commit_success.txt": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "params/state/commit_success.txt").unlink()
    manifest.finish(folder)
    aged(tmp_path)
    assert clean([str(tmp_path), "--delete"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_tokens_that_is_begun_is_not_complete(tmp_path):
    folder = tmp_path / ".tokens.0a1b2c3d"
    folder.mkdir()
    manifest.finish(folder)
    with locked(folder):
        assert manifest.read(folder)["complete"] is False


def test_a_full_disk_leaves_no_temporary_folder_and_the_error_names_the_target(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        full_disk(),
        pytest.raises(OSError, match=rf"{tmp_path}/model/\.jaxmodels\.json"),
        atomic_folder(tmp_path / "model"),
    ):
        pass
    with full_disk(), pytest.raises(OSError, match="too large"), temporary_folder("tokens"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_of_tokens_that_were_not_begun(tmp_path):
    text = "to be or not to be\n" * 40
    with full_disk(), pytest.raises(OSError, match=rf"{tmp_path}/tokens/\.jaxmodels\.json"):
        write(tmp_path / "tokens", text, CharVocabulary.of(text))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_manifest_is_removed_on_a_full_disk(tmp_path):
    folder = tmp_path / ".model.0a1b2c3d"
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "_METADATA").write_text(json.dumps({}))
    with full_disk():
        manifest.remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_another_thread_writes_as_a_folder_is_removed_is_left_with_a_manifest(tmp_path, monkeypatch):
    folder = tmp_path / ".model.0a1b2c3d"
    folder.mkdir()
    clear = manifest.clear

    def cleared(folder):
        clear(folder)
        (folder / "late").write_text("late")

    monkeypatch.setattr(manifest, "clear", cleared)
    with pytest.raises(OSError, match=folder.name):
        manifest.remove(folder)
    assert sorted(path.name for path in folder.iterdir()) == [manifest.NAME, "late"]
