"""Names of the tensors in files of `transformers`; the table itself is in `jaxmodels.convert.neox.layout`."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.convert.source import named
from jaxmodels.neox import NeoXConfig
from jaxmodels.neox.sequential import check_buffer, is_buffer
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.weights.lazy import equal
from jaxmodels.weights.prefixes import LONGEST

BASE = "gpt_neox."  # prefix of all tensors but the readout; absent in files of GPTNeoXModel
READOUT = "embed_out.weight"
READOUT_ALIAS = "lm_head.weight"  # its name in memory since transformers 5.14
FREQUENCIES = (f"{BASE}rotary_emb.inv_freq", f"{BASE}rotary_emb.original_inv_freq")  # of all layers, in newer versions
# Buffers that are neither parameters nor compared with the configuration.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|attention\.norm_factor)")
# A word inside of a name. Words are matched one by one: an expression for the whole name takes quadratic time.
ADAPTER = re.compile(r"lora_[A-Z]\w*|lora_magnitude_vector|base_layer|modules_to_save|original_module")


def twin_names(stored: Mapping[str, Any], config: NeoXConfig, where: str) -> dict[str, Any]:
    """Tensors by the names of the PyTorch twin, without buffers, and without a tied readout; other names are kept.

    where: file or folder, for errors. Raises ValueError if a buffer contradicts the configuration.
    """
    held = with_base(stored)
    table, readout, alias = (held.get(name) for name in (hf_name("embedding.emb.weight"), READOUT, READOUT_ALIAS))
    if alias is not None and (readout is None or equal(alias, readout)):
        readout = held[READOUT] = held.pop(READOUT_ALIAS)
    if config.tied and table is not None and readout is not None and equal(readout, table):
        held.pop(READOUT)
    for name in list(held):
        if is_buffer(name.removeprefix(BASE), config.n_layers) or name in FREQUENCIES:
            try:
                check_buffer(name, held.pop(name), config)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        elif IGNORED.fullmatch(name):
            held.pop(name)
    twins = {hf_name(key): key for key in named(config)}
    renamed: dict[str, Any] = {}
    for name, tensor in held.items():
        if renamed.setdefault(twins.get(name, name), tensor) is not tensor:
            raise ValueError(f"{where} has two tensors that are {quoted(twins.get(name, name))}: expected one")
    return renamed


def with_base(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors with the prefix `gpt_neox.`, which files of GPTNeoXModel alone do not have."""
    if (
        any(name.startswith(BASE) for name in stored)
        or hf_name("embedding.emb.weight").removeprefix(BASE) not in stored
    ):
        return dict(stored)
    return {name if name in (READOUT, READOUT_ALIAS) else BASE + name: tensor for name, tensor in stored.items()}


def known_names(config: NeoXConfig) -> Callable[[str], bool]:
    """Function that is True for the name of a tensor of the model, with or without `gpt_neox.`."""
    names = {hf_name(key) for key in named(config)} | {READOUT, READOUT_ALIAS}
    return (names | {name.removeprefix(BASE) for name in names}).__contains__


def check_no_adapter(names: Iterable[str], where: str) -> None:
    """Raises ValueError, beginning with `where`, if tensors are those of an adapter or of layers that have one."""
    found = [name for name in names if any(map(ADAPTER.fullmatch, name.split(".")[1:-1]))]
    if found:
        name = shortened(found[0], LONGEST)
        raise ValueError(
            f"{where} has layers with adapter weights of PEFT ({name}); merge them with merge_and_unload(), and "
            "save the model again"
        )
