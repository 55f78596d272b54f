"""Targets and companions of others: what `jaxmodels convert --overwrite` and `jaxmodels quantize` replace and copy."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from flax import nnx

import jaxmodels
from jaxmodels.convert.command import main
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.open import open_source
from jaxmodels.neox import NeoX, NeoXConfig
from tests.fuzz.targets.runs import make_run
from tests.jaxmodels.tokenizer import byte_level_tokenizer

CONFIG = NeoXConfig(21, 12, 2, 3, n_ff=21, rope_percentage=0.5, max_len=11)
COMMANDS = {
    "flax": ["neox", "--to", "flax"],
    "hf": ["neox", "--to", "hf"],
    "shards": ["neox", "--to", "neox", "--model-parallel", "3"],
    "quantized": ["quantize", "--kind", "weights-4"],
}
COMPANIONS = {
    "tokenizer_config.json": '{"eos_token": "a"}',
    "generation_config.json": '{"eos_token_id": 2}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
MINE = "written by somebody"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "source"
    save_hf(NeoX(CONFIG, rngs=nnx.Rngs(0)), folder)
    (folder / "additional_chat_templates").mkdir()
    for name, content in COMPANIONS.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def source(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "source")


def convert(source, target, to: str = "flax") -> int:
    name, *flags = COMMANDS[to]
    return main([name, str(source), str(target), *flags, "--overwrite"])


@pytest.mark.parametrize("to", COMMANDS)
def test_a_target_that_is_a_link_to_itself_is_one_line(source, tmp_path, capsys, to):
    (tmp_path / "loop").symlink_to("loop")
    assert convert(source, tmp_path / "loop", to) == 2
    assert re.search(r"^.*/loop is.*link.*\n$", capsys.readouterr().err)
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    assert main(["torch", str(source), str(tmp_path / "loop.pt")]) == 2
    assert re.search(r"^.*/loop\.pt is.*link.*\n$", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "loop.pt", "source"]


def state(folder: Path) -> dict[str, object]:
    """Entries below a folder with their content; links with what they point to."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found


def refused(capsys, *names: object) -> None:
    """The command printed one line, with these names in it, and nothing else."""
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert all(str(name) in line for name in names), line
    assert printed.out == ""


@pytest.mark.parametrize("to", COMMANDS)
def test_companions_are_written_beside_the_weights(source, tmp_path, to):
    out = tmp_path / "out"
    for _ in range(2):  # the second time over the first
        assert convert(source, out, to) == 0
        assert {name: (out / name).read_text() for name in COMPANIONS} == COMPANIONS
        assert open_source(out).companions.token_ids.eos == (2,)


@pytest.mark.parametrize("to", COMMANDS)
def test_the_tokenizer_of_a_published_folder_is_the_one_that_is_read(source, tmp_path, to):
    """A vocabulary.json there is no companion: it would replace the tokenizer, and `verify` compares tensors alone."""
    tokenizer = byte_level_tokenizer()
    (source / "tokenizer.json").write_text(tokenizer.to_str())
    tokenizer.add_tokens(["another"])
    (source / "vocabulary.json").write_text(json.dumps({"tokenizer": tokenizer.to_str()}))
    out = tmp_path / "out"
    assert convert(source, out, to) == 0
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (out / "vocabulary.json").exists()
    texts = [open_source(folder).vocabulary().encode("another").tolist() for folder in (source, out)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("to", COMMANDS)
def test_a_link_to_a_folder_of_others_is_refused(source, tmp_path, capsys, to):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "photo.jpg").write_text(MINE)
    (tmp_path / "out").symlink_to("others")
    before = state(tmp_path)
    assert convert(source, tmp_path / "out", to) == 2
    refused(capsys, tmp_path / "out", ".jaxmodels.json")
    assert state(tmp_path) == before


def test_a_link_to_an_earlier_conversion_stays_and_what_it_points_to_is_replaced(source, tmp_path):
    assert convert(source, tmp_path / "real" / "out") == 0
    (tmp_path / "real" / "photo.jpg").write_text(MINE)
    (tmp_path / "link").symlink_to("real/out")
    (tmp_path / "parent").symlink_to("real")
    for target in (tmp_path / "link", tmp_path / "parent" / "out"):
        assert convert(source, target, "hf") == 0
        assert (tmp_path / "real" / "out" / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "parent").is_symlink()
    assert {path.name for path in (tmp_path / "real").iterdir()} == {"out", "photo.jpg"}


@pytest.mark.parametrize("what", ["file", "link", "FIFO", "folder", "changed companion", "link for a companion"])
def test_an_earlier_conversion_with_anything_of_others_is_kept(source, tmp_path, capsys, what):
    out, beside = tmp_path / "out", tmp_path / "secret.txt"
    assert convert(source, out) == 0
    beside.write_text(MINE)
    entry = out / ("tokenizer_config.json" if "companion" in what else "notes.txt")
    if what == "file":
        entry.write_text(MINE)
    elif what == "link":
        entry.symlink_to(beside)
    elif what == "FIFO":
        os.mkfifo(entry)
    elif what == "folder":
        entry.mkdir()
    elif what == "changed companion":
        entry.write_text('{"eos_token": "my own"}')
    else:
        entry.unlink()
        entry.symlink_to(beside)
    capsys.readouterr()
    before = state(tmp_path)
    assert convert(source, out, "hf") == 2
    refused(capsys, out, entry.name)
    assert state(tmp_path) == before


def test_a_hard_link_in_an_earlier_conversion_keeps_its_other_name(source, tmp_path):
    out, beside = tmp_path / "out", tmp_path / "secret.txt"
    assert convert(source, out) == 0
    beside.write_text("x" * len(COMPANIONS["tokenizer_config.json"]))  # of the size in the manifest
    (out / "tokenizer_config.json").unlink()
    os.link(beside, out / "tokenizer_config.json")
    assert convert(source, out) == 0
    assert set(beside.read_text()) == {"x"}
    assert (out / "tokenizer_config.json").read_text() == COMPANIONS["tokenizer_config.json"]


@pytest.mark.parametrize("to", ["flax", "quantized"])
def test_the_source_and_a_folder_around_it_are_refused(source, tmp_path, capsys, to):
    (tmp_path / "link").symlink_to(source)
    before = state(tmp_path)
    for target in (source, tmp_path, tmp_path / "link", source / ".." / "source", source / "additional_chat_templates"):
        assert convert(source, target, to) == 2
        refused(capsys, target)
    assert convert(tmp_path / "link", source, to) == 2
    assert state(tmp_path) == before


@pytest.mark.parametrize("to", ["hf", "quantized"])
def test_the_step_of_a_run_that_is_read_is_refused(tmp_path, capsys, to):
    make_run(tmp_path / "run")
    model = tmp_path / "run" / "checkpoints" / "7" / "model"
    (tmp_path / "link").symlink_to(model)
    before = state(tmp_path)
    for target in (model, tmp_path / "link"):
        assert convert(tmp_path / "run", target, to) == 2
        refused(capsys, target, "contains the source")
    assert main(["torch", str(tmp_path / "run"), str(model / "config.json"), "--overwrite"]) == 2
    refused(capsys, model / "config.json", "lies in the weights")
    assert state(tmp_path) == before


LINKED = {
    "hf": "model.safetensors",
    "flax": "params.safetensors",
    "shards": "global_step0/layer_02-model_00-model_states.pt",
    "configuration": "configs/model.yml",
    "folder": "global_step0",
    "companion": "tokenizer_config.json",
}


@pytest.mark.parametrize("what", LINKED)
@pytest.mark.parametrize("to", ["quantized", "hf"])
def test_a_source_whose_files_are_links_into_the_target_is_refused(source, tmp_path, capsys, to, what):
    kind, name = what if what in COMMANDS else "hf" if what == "companion" else "shards", LINKED[what]
    assert convert(source, tmp_path / "out", kind) == 0
    linked = shutil.copytree(tmp_path / "out", tmp_path / "linked")
    if what == "folder":
        shutil.rmtree(linked / name)
    else:
        (linked / name).unlink()
    (linked / name).symlink_to(tmp_path / "out" / name)
    before = state(tmp_path)
    capsys.readouterr()
    assert convert(linked, tmp_path / "out", to) == 2
    refused(capsys, tmp_path / "out", name, "contains the source")
    assert state(tmp_path) == before


@pytest.mark.parametrize("kind", ["bin", "shards"])
def test_a_file_to_which_the_source_links_is_refused(source, tmp_path, capsys, kind):
    folder, file = tmp_path / "linked", tmp_path / "weights.pt"
    if kind == "bin":
        shutil.copytree(source, folder)
        torch.save(safetensors.torch.load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").symlink_to(file)
    else:
        assert convert(source, folder, kind) == 0
        (folder / LINKED[kind]).rename(file)
        (folder / LINKED[kind]).symlink_to(file)
    before = state(tmp_path)
    capsys.readouterr()
    assert main(["torch", str(folder), str(file), "--overwrite"]) == 2
    refused(capsys, file, "lies in the weights")
    assert state(tmp_path) == before


def test_a_source_with_hard_links_in_the_target_keeps_its_files(source, tmp_path):
    """Another name of a file is left as it is when one is replaced."""
    assert convert(source, tmp_path / "out", "hf") == 0
    shutil.copytree(tmp_path / "out", tmp_path / "linked", copy_function=os.link)
    before = state(tmp_path / "linked")
    assert convert(tmp_path / "linked", tmp_path / "out", "quantized") == 0
    assert state(tmp_path / "linked") == before


def test_an_earlier_conversion_inside_the_source_is_replaced(source):
    for to in ("flax", "hf"):
        assert convert(source, source / "converted", to) == 0
        assert jaxmodels.load(source / "converted").settings == CONFIG
    assert (source / "model.safetensors").is_file()


BAD = {
    "sparse": "sparse",
    "large": "at most",
    "link to a sparse file": "sparse",
    "link to a device": "device",
    "link to nothing": "missing",
    "FIFO": "FIFO",
    "folder": None,
}


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tools.jinja"])
@pytest.mark.parametrize("what", BAD)
def test_a_companion_that_is_no_file_of_a_companions_size_is_refused_or_left_out(source, tmp_path, capsys, what, name):
    """A folder is no tokenizer.json, but of every *.jinja something is expected."""
    out, companion = tmp_path / "out", source / name
    assert convert(source, out) == 0
    companion.unlink(missing_ok=True)
    if what in ("sparse", "large"):
        with companion.open("wb") as opened:
            opened.truncate(10**12 if what == "sparse" else 10**8)
    elif what == "FIFO":
        os.mkfifo(companion)
    elif what == "folder":
        companion.mkdir()
    else:
        place = {"link to a device": "/dev/zero", "link to nothing": "nowhere"}.get(what, str(tmp_path / "sparse"))
        companion.symlink_to(place)
        with (tmp_path / "sparse").open("wb") as opened:
            opened.truncate(10**12)
    capsys.readouterr()
    before = state(out)
    code = convert(source, out, "hf")
    said = BAD[what] if companion.parent == source else BAD[what] or "expected a regular file"
    if said is None:
        assert code == 0
        assert not (out / name).exists()
        return
    assert code == 2
    refused(capsys, companion)
    assert state(out) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_template_whose_name_is_not_utf_8_is_refused(source, tmp_path, capsys):
    """The manifest, which is JSON, could not list it, so that the folder would never be replaced."""
    (source / "additional_chat_templates" / os.fsdecode(b"a\xff.jinja")).touch()
    assert convert(source, tmp_path / "out") == 2
    refused(capsys, "additional_chat_templates has 'a\\udcff.jinja', whose name is not UTF-8")
    assert not (tmp_path / "out").exists()


def test_companions_are_bounded_together(source, tmp_path, capsys):
    """A file that occupies nothing on the disk may say that it has 60 MB, and the copy has them."""
    for name in ("tokenizer.model", "vocab.txt", "chat_template.jinja"):
        with (source / name).open("wb") as opened:
            opened.truncate(60 * 10**6)
    assert convert(source, tmp_path / "out", "hf") == 2
    refused(capsys, "and the files beside it have 180,", "at most 134,217,728 are copied")
    assert not (tmp_path / "out").exists()
    templates = source / "additional_chat_templates"
    templates.mkdir(exist_ok=True)
    for i in range(101):
        (templates / f"{i}.jinja").touch()
    assert convert(source, tmp_path / "out", "hf") == 2
    refused(capsys, templates, "templates; at most 100 are read")


def test_links_to_companions_are_followed_and_copied(source, tmp_path):
    """As in the Hub's cache; the copy is a file of its own."""
    real = (source / "tokenizer_config.json").rename(tmp_path / "blob")
    (source / "tokenizer_config.json").symlink_to(real)
    os.link(real, source / "special_tokens_map.json")
    assert convert(source, tmp_path / "out", "hf") == 0
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        copy = tmp_path / "out" / name
        assert copy.read_bytes() == real.read_bytes()
        assert not copy.is_symlink()
        assert copy.stat().st_nlink == 1
