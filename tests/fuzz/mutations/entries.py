"""Changes of a folder's entries: other kinds of files, names, links, missing and additional files."""

import os
import shutil
from pathlib import Path

from tests.fuzz.mutations.values import Rng, choose

BESIDE = "../beside"  # of the folder that is read: files that must not be touched
ADDED: tuple[str, ...] = (
    "layer_9999999999-model_00-model_states.pt",
    "mp_rank_99999999_model_states.pt",
    "layer_00-model_99999-model_states.pt",
    "model-00001-of-99999.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "params.safetensors",
    "params.safetensors.index.json",
    "config.json",
    "latest",
    "adapter_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "tokenizer.json",
    ".lock",
    ".jaxmodels.json",
    "complete.json",
    "chat_template.jinja",
    "tokenizer.model",
    "20B_tokenizer.json",
    "vocabulary.json",
)
ADDED += ("\x1b[2J.json", "a\nb.yml", "\udcff.json")
FOLDERS: tuple[str, ...] = ("params", "checkpoints", "snapshots", "blobs", "configs", "global_step99999999999999999999")
FOLDERS += ("checkpoints/" + "9" * 200, "checkpoints/\x1b[2J")


def exchange_file(file: Path, root: Path, rng: Rng) -> None:
    """Replace a file by a FIFO, a folder, a sparse or an empty file, or a link: to a device, nothing or itself.

    Or leave its content, with a hole in it or behind it.
    """
    change = int(rng.integers(11))
    if change > 8:
        dig(file, rng)
        return
    file.unlink()
    if change == 0:
        os.mkfifo(file)
    elif change == 1:
        file.mkdir()
    elif change == 2:
        with file.open("wb") as opened:
            opened.truncate(10**12)
    elif change == 3:
        file.touch()
    elif change == 4:
        file.write_bytes(b"{" + b" " * 10**7)
    else:
        secret = os.path.relpath(root / BESIDE / "secret.txt", file.parent)
        file.symlink_to(("/dev/zero", "nowhere", file.name, secret)[change - 5])


def dig(file: Path, rng: Rng) -> None:
    """Leave a part of a file unwritten: at its end, or between two of its bytes. It is read as zeros."""
    content = file.read_bytes()
    at = int(rng.integers(len(content) + 1)) if rng.random() < 0.5 else len(content)
    size = choose(rng, (4096, 10**6, 2**28, 2**28 + 1, 10**9, 2**32, 10**13))
    with file.open("wb") as opened:
        opened.write(content[:at])
        opened.truncate(at + size)
        opened.seek(0, os.SEEK_END)
        opened.write(content[at:])


def change_folder(root: Path, rng: Rng) -> None:
    """Remove, rename, exchange, link or add files and folders."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    folders = sorted(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())
    file, change = choose(rng, files), int(rng.integers(8))
    if change == 0:
        file.unlink()
    elif change == 1:
        file.rename(file.with_name(choose(rng, (*ADDED, f"{file.name}~", f"{file.name}.gz")).replace("/", "_")))
    elif change == 2:
        other = choose(rng, files)
        content, theirs = file.read_bytes(), other.read_bytes()
        file.write_bytes(theirs)
        other.write_bytes(content)
    elif change == 3:
        if (added := file.with_name(choose(rng, ADDED))) != file:
            shutil.copy(file, added)
    elif change == 4:
        folder = root / choose(rng, FOLDERS)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # a file of that name is there, or the name is too long
    elif change == 5 and folders:
        folder = choose(rng, folders)
        shutil.rmtree(folder)
        target = choose(rng, (os.path.relpath(root / BESIDE / "folder", folder.parent), ".", "/dev"))
        folder.symlink_to(target)
    elif change == 6 and folders:
        folder = choose(rng, folders)
        shutil.rmtree(folder)
        folder.touch()
    else:
        for i in range(50):
            (file.parent / f"{file.name}.{i}").touch()
