"""Files in the folder of an embedder, checked before transformers or sentence-transformers read them.

The libraries do not name a damaged file, build what a configuration describes before they look at the weights, and
follow names that lead to other folders and models.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.allowance import Allowance
from jaxmodels.io.bounded import TOKENIZER_BYTES, open_regular, read_json
from jaxmodels.io.formats.safetensors import read_file
from jaxmodels.io.formats.torch_files import read_pt
from jaxmodels.process.paths import is_plain
from jaxmodels.process.texts import quoted
from jaxmodels.retro.retrieval.embedder_settings import check_settings
from jaxmodels.text import TokenizerFile
from jaxmodels.weights.stored import Stored
from jaxmodels.weights.torch_modules import no_larger

CONFIG = "config.json"
MOST_LAYERS = 2_000  # of which each is made before its weights are looked for
MOST_VALUES = 100_000  # of a configuration, labels included; libraries copy all of them several times
MOST_NUMBER = 2**20  # in a configuration, from which libraries make lists before they make a model
WEIGHTS = re.compile(r".+\.safetensors|pytorch_model(-[0-9]+-of-[0-9]+)?\.bin")
VERSIONED = re.compile(r"tokenizer(\.[0-9.]+)?\.json")  # one of a version of transformers takes the place of the first
# Files that name others, and the key of the names.
NAMING = {
    "model.safetensors.index.json": "weight_map",
    "pytorch_model.bin.index.json": "weight_map",
    "tokenizer_config.json": "fast_tokenizer_files",
}
# Arguments of transformers' tokenizers in tokenizer_config.json or special_tokens_map.json that may be paths of files.
PATHS = ("vocab", "merges", "gguf_file", "init_inputs")
# Tokens that a library looks for one by one, in a list of all; published files name up to 256.
TOKENS, MOST_TOKENS = ("extra_special_tokens", "additional_special_tokens"), 5_000
OWN_MODULES = re.compile(r"sentence_transformers\.([a-z_]+\.)+(Transformer|Pooling|Normalize)")


def check_modules(model: str) -> None:
    """Raise ValueError if a folder of sentence-transformers names classes that are not its own plain ones.

    Before version 6 the package imports any class that modules.json in a folder names; some of its own classes import
    those that their configurations name. Raises ValueError too if a module lies in another folder.
    """
    file = Path(model) / "modules.json"
    entries = read_json(file) if file.is_file() else []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict):
            raise ValueError(f"{file} has the entry {quoted(entry)}, must be an object with the type of a module")
        named = entry.get("type")
        if not isinstance(named, str) or not OWN_MODULES.fullmatch(named):
            raise ValueError(f"{file} names the class {quoted(named)}, which is not imported from a folder")
        place = entry.get("path", "")
        if place != "" and not is_plain(place):
            raise ValueError(f"{file} names the folder {quoted(place)}, which is not one beside it")


def first_module(model: str) -> Path:
    """Folder of the first module of a folder of sentence-transformers, which holds the weights."""
    file = Path(model) / "modules.json"
    entries = read_json(file) if file.is_file() else []
    return Path(model) / (entries[0].get("path", "") if isinstance(entries, list) and entries else "")


def check_files(folder: Path) -> None:
    """Raise ValueError, naming the file, if weights or configurations in an embedder's folder are damaged or hostile.

    Also if a configuration describes a model that is far larger than the weights beside it, and if there is an adapter:
    its configuration names another model.
    """
    found = [*folder.glob("*"), *folder.glob("*/*")]  # sentence-transformers has a folder for each part
    stored: dict[Path, Stored] = {}
    files = sorted(file for file in found if file.exists() and not file.is_dir())
    allowance = Allowance(file for file in files if WEIGHTS.fullmatch(file.name))
    for file in files:
        open_regular(file).close()  # a library would wait for a FIFO
        if WEIGHTS.fullmatch(file.name):
            stored[file.parent] = joined(stored.get(file.parent), stored_in(file, allowance))
        elif file.suffix == ".json":
            check_json(file)
    check_settings(folder)
    for place, sizes in stored.items():
        about = read_json(place / CONFIG) if (place / CONFIG).is_file() else None
        if isinstance(about, dict) and "model_type" in about:
            check_sizes(place, sizes)


def check_json(file: Path) -> None:
    """Raise ValueError, naming the file, if a JSON file is damaged, or names what must not be read."""
    content = read_json(file, TOKENIZER_BYTES)
    for name in TOKENS:
        tokens = content.get(name) if isinstance(content, dict) else None
        if isinstance(tokens, list | dict) and len(tokens) > MOST_TOKENS:
            raise ValueError(f"{file} has {len(tokens):,} tokens in {name}; at most {MOST_TOKENS:,}")
    for argument in PATHS:
        value = content.get(argument) if isinstance(content, dict) else None
        if isinstance(value, str) or (argument == "init_inputs" and value):
            raise ValueError(f"{file} has {quoted(argument)} of {quoted(value)}, which may name files elsewhere")
    if file.name == CONFIG:
        check_numbers(file, content)
        check_names(file, content)
    elif file.name == "adapter_config.json":
        raise ValueError(f"{file} is of an adapter of PEFT, which is not read: merge it with its model, and save that")
    elif key := NAMING.get(file.name):
        named = content.get(key) if isinstance(content, dict) else None
        names = list(named.values()) if isinstance(named, dict) else named if isinstance(named, list) else []
        pattern = VERSIONED if key == "fast_tokenizer_files" else WEIGHTS
        for place in names:
            if not is_plain(place) or not pattern.fullmatch(place):
                raise ValueError(f"{file} names {quoted(place)} in {key}, which is no such file beside it")


def check_names(file: Path, content: Any) -> None:
    """Raise ValueError if a configuration names a file that is read in its place, or weights that are not checked."""
    if not isinstance(content, dict):
        return
    if content.get("configuration_files"):
        raise ValueError(f"{file} has 'configuration_files', which would be read in its place: remove the key")
    named = content.get("transformers_weights")
    if named is None or named == "model.safetensors.index.json":
        return
    if not is_plain(named) or not WEIGHTS.fullmatch(named) or not (file.parent / named).exists():
        raise ValueError(f"{file} has 'transformers_weights' of {quoted(named)}, must be a .safetensors file beside it")


def check_numbers(file: Path, content: Any) -> None:
    """Raise ValueError if an integer of a configuration is larger than any of a published one, at any depth.

    Raises ValueError too for more than MOST_VALUES values, where num_labels stands for that many; for a kernel of the
    Hub, which is code; and for an attribute_map, by which any other key may set what is checked here.
    """
    left: list[tuple[str, Any]] = [("", content)]
    values = 0
    while left:
        name, value = left.pop()
        values += value if name == "num_labels" and type(value) is int and value > 0 else 1
        if values + len(left) > MOST_VALUES:
            raise ValueError(f"{file} has more than {MOST_VALUES:,} values, those of 'num_labels' included")
        if name == "attribute_map" and value:
            raise ValueError(f"{file} has 'attribute_map', which renames other keys: remove it")
        most = MOST_LAYERS if name.endswith(("layer", "layers")) else MOST_NUMBER
        if type(value) is int and value > most and "theta" not in name:
            raise ValueError(f"{file} has {quoted(name)} of {quoted(value)}, must be at most {most:,}")
        if isinstance(value, str) and name.endswith("implementation") and "/" in value:
            raise ValueError(f"{file} has {quoted(name)} of {quoted(value)}, which is code of the Hub")
        if isinstance(value, dict):  # of a model of several parts, an implementation for each
            left += [(name if name.endswith("implementation") else key, one) for key, one in value.items()]
        elif isinstance(value, list):
            left += [(name, one) for one in value]


def stored_in(file: Path, allowance: Allowance) -> Stored:
    """Numbers of a file's tensors and of their elements, of which each takes a byte; raises ValueError if damaged."""
    content = read_file(file) if file.suffix == ".safetensors" else read_pt(file, allowance=allowance)
    tensors = content.values() if isinstance(content, Mapping) else ()
    sizes = [math.prod(tensor.shape) for tensor in tensors if hasattr(tensor, "shape")]
    return Stored(len(sizes), min(sum(sizes), file.stat().st_size))  # several may share their elements


def joined(first: Stored | None, second: Stored) -> Stored:
    """Sum of two numbers of tensors and elements."""
    return second if first is None else Stored(first.tensors + second.tensors, first.elements + second.elements)


def check_sizes(folder: Path, stored: Stored) -> None:
    """Raise ValueError, naming config.json, if it describes a model that is far larger than the stored tensors.

    The model is built without values, and only as far as it is not larger.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        return
    with without_reports(transformers), no_larger(stored, str(folder / CONFIG)):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        transformers.AutoModel.from_config(config, trust_remote_code=False)


def confined_tokenizers(folder: Path) -> list[TokenizerFile]:
    """Tokenizers in an embedder's folder that are not known to be harmless; raises ValueError for one that is refused.

    They encode each text in a process of their own first: the libraries, which read the same files, would hang with a
    text for which that process is ended.
    """
    found = [*folder.glob("tokenizer*.json"), *folder.glob("*/tokenizer*.json")]
    files = sorted(file for file in found if VERSIONED.fullmatch(file.name))
    return [one for one in map(TokenizerFile.read, files) if one.confined is not None]


@contextlib.contextmanager
def without_reports(transformers: Any, progress: bool = False) -> Iterator[None]:
    """Context in which transformers prints no tables on weights, whose names a file may choose, and no progress.

    progress: print that nevertheless, as of a download.
    """
    logs = transformers.logging
    before, hides = logs.get_verbosity(), logs.is_progress_bar_enabled() and not progress
    logs.set_verbosity_error()
    if hides:
        quietly(logs.disable_progress_bar)
    try:
        yield
    finally:
        logs.set_verbosity(before)
        if hides:
            quietly(logs.enable_progress_bar)


def quietly(switch: Callable[[], None]) -> None:
    """Call a function that warns of an environment variable which takes precedence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        switch()
