"""GPT-NeoX's YAML files: conversion to and from the fields of NeoXConfig.

Keys have dashes or underscores, which may be mixed. Absent keys have GPT-NeoX's own defaults, which differ from those
of its published models: the default of `rotary_pct`, for example, is 1.0.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import read_text
from jaxmodels.neox import NeoXConfig
from jaxmodels.process.texts import quoted, shortened

# Field of NeoXConfig, key, and default of an absent key; None: the field follows from the tensors, or is required.
KEYS: tuple[tuple[str, str, Any], ...] = (
    ("n_layers", "num_layers", None),
    ("n_hidden", "hidden_size", None),
    ("n_heads", "num_attention_heads", None),
    ("n_kv_heads", "num_kv_heads", None),
    ("n_ff", "intermediate_size", None),
    ("rope_percentage", "rotary_pct", 1.0),
    ("rope_base", "rotary_emb_base", 10_000.0),
    ("max_len", "max_position_embeddings", 2_048),
)
WHOLE = ("n_layers", "n_hidden", "n_heads", "n_kv_heads", "n_ff", "max_len")
# Flags of NeoXConfig, key and default.
FLAGS: tuple[tuple[str, str, bool], ...] = (
    ("parallel_residual", "gpt_j_residual", False),
    ("attention_bias", "use_bias_in_attn_linear", True),
    ("ffn_bias", "use_bias_in_mlp", True),
)
# Kind of norm, its names (the second: TransformerEngine's), and key and default of its epsilon.
NORMS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("layernorm", ("layernorm", "te_layernorm"), "layernorm_epsilon", 1e-5),
    ("rmsnorm", ("rmsnorm", "te_rmsnorm"), "rms_norm_epsilon", 1e-8),
)

# Supported values; the first is the default of an absent key. Any other value is refused.
REQUIRED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("gpt_j_tied", (False,)),
    ("norm", tuple(name for _, names, *_ in NORMS for name in names)),
    ("pos_emb", ("rotary",)),
    ("activation", ("gelu",)),
    ("mlp_type", ("regular",)),
    ("rotary_interleaved", (False,)),
    ("use_qk_layernorm", (False,)),
    ("moe_num_experts", (1, 0)),
    ("use_mup", (False,)),
    ("sliding_window_width", (None,)),
    ("rope_scaling", (None, {})),
)
ATTENTION = ("global", "flash")  # two implementations of full attention; other kinds are not supported
READ = {
    *(key for _, key, _ in (*KEYS, *FLAGS)),
    *(key for *_, key, _ in NORMS),
    *(key for key, _ in REQUIRED),
    *("attention_config", "soft_prompt_tuning", "enabled", "use_bias_in_norms", "te_mha", "bias_gelu_fusion"),
    *("no_weight_tying", "mlp_multiple_of", "model_parallel_size", "make_vocab_size_divisible_by"),
}  # keys of this module and of `read`; of others, the last one of several values is kept
# Required, as GPT-NeoX's default of an absent key is learned positions, which are not supported.
EXPLICIT = ("pos_emb",)
YAML_BYTES = 2**17  # of all files; GPT-NeoX's own have 5 kB, and the parser reads 0.03 to 0.1 MB a second
DEEPEST = 20  # lists and mappings in brackets in each other, at each of which the parser looks for each word
ALIAS = "(an alias of a list, a mapping or a long text)"
LONGEST_ALIAS = 100  # characters of a scalar that aliases repeat
LONGEST_NUMBER = 100  # characters; YAML's numbers to the base 60, such as 1:30:00, take quadratic time
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def read_yaml(files: list[Path]) -> dict[str, Any]:
    """Settings of all files together, with underscores in keys, and without quotes around numbers and flags.

    Raises ValueError, naming the file, if one is not a YAML mapping or contradicts an earlier one.
    """
    try:
        import yaml  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"{files[0]}: reading it needs pyyaml: pip install 'jaxmodels[neox]'") from None
    settings: dict[str, Any] = {}
    size = 0
    for file in files:
        size += file.stat().st_size
        if size > YAML_BYTES:
            before = "" if file == files[0] else " with those before it"
            raise ValueError(f"{file}{before} has {size:,} bytes of YAML; at most {YAML_BYTES:,} are read")
        try:
            content = parsed(read_text(file, YAML_BYTES))
        except Exception as error:  # also KeyError, IndexError, OverflowError, of values that are not of their tag
            raise ValueError(f"{file} is not a YAML file: {one_line(error)}") from None
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise ValueError(f"{file} must be a mapping of settings, not a {type(content).__name__}")
        for key, value in content.items():
            if not isinstance(key, str):
                raise ValueError(f"{file} has the key {quoted(key)}; expected names of settings")
            key, value = key.replace("-", "_"), unquoted(value)
            if key in READ and value == ALIAS:
                raise ValueError(f"{file} has {key}: {ALIAS}; write its value there")
            if key in READ and key in settings and settings[key] != value:
                name = shortened(key, 80)
                before = quoted(settings[key])
                raise ValueError(f"{file} has {name}: {quoted(value)}, but before it stands {name}: {before}")
            settings[key] = value
    return settings


def parsed(text: str) -> Any:
    """Content of a YAML text.

    A few aliases of aliases of lists stand for more values than any memory holds, as soon as they are printed, and
    thousands of a long text do too. The text ALIAS stands for each; `read_yaml` refuses it in a setting that is read.
    Raises yaml.YAMLError for a number of many characters, for more than DEEPEST brackets in each other, for a key of
    READ with two values in a mapping, for two mappings that are merged into one, and for other texts that are no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, token: Any) -> None:
            super().fetch_flow_collection_start(token)
            if self.flow_level > DEEPEST:
                problem = f"more than {DEEPEST} brackets in each other"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark())

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                node = self.anchors.get(event.anchor)
                if not isinstance(node, yaml.ScalarNode) or len(node.value) > LONGEST_ALIAS:
                    self.get_event()
                    return yaml.ScalarNode("tag:yaml.org,2002:str", ALIAS, event.start_mark, event.end_mark)
            return super().compose_node(parent, index)

        def compose_scalar_node(self, anchor: Any) -> Any:
            node = super().compose_scalar_node(anchor)
            if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
                raise yaml.MarkedYAMLError(
                    problem=f"a number of {len(node.value):,} characters", problem_mark=node.start_mark
                )
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            known: dict[str, Any] = {}
            for key, value in node.value:
                before = known.setdefault(key.value, value) if isinstance(key, yaml.ScalarNode) else value
                known_key = isinstance(key, yaml.ScalarNode) and key.value.replace("-", "_") in {*READ, "<<"}
                if (
                    known_key
                    and before is not value
                    and (not isinstance(value, yaml.ScalarNode) or before.value != value.value)
                ):
                    problem = f"a second value of {shortened(key.value, 80)}"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            return node

    return yaml.load(text, Loader)


def one_line(error: Exception) -> str:
    """Message of an error, without the lines that YAML quotes."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"line {mark.line + 1}: {shortened(problem, 300)}"
    return shortened(" ".join(str(error).split()), 300)


def fields(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of NeoXConfig from settings, without `n_vocab` and absent sizes.

    Raises ValueError, beginning with `where`, if a setting is not supported.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    for key, allowed in REQUIRED:
        value = settings.get(key, None if key in EXPLICIT else allowed[0])
        if value not in allowed:
            setting = f"{key}: {quoted(value)}" if value is not None else f"no {key}"
            supported = " or ".join("none" if value is None else repr(value) for value in allowed)
            raise ValueError(f"{where} has {setting}; supported is {supported}")
    kinds = kinds_in(settings.get("attention_config"))
    if not kinds <= set(ATTENTION):
        other = ", ".join(shortened(kind, 40) for kind in sorted(kinds - set(ATTENTION))[:5])
        raise ValueError(f"{where} has attention_config of {other}; supported is {' or '.join(map(repr, ATTENTION))}")
    prompt = settings.get("soft_prompt_tuning")
    if prompt is not None and not (isinstance(prompt, Mapping) and prompt.get("enabled") is False):
        raise ValueError(f"{where} has soft_prompt_tuning: {quoted(prompt)}; supported is enabled: false")
    found: dict[str, Any] = {}
    for field, key, absent in KEYS:
        value = settings.get(key, absent)
        if value is not None:
            found[field] = checked(field, key, value, where)
    for field, key, default in FLAGS:
        found[field] = checked_flag(key, settings, where, default)
    for norm, names, key, default_eps in NORMS:
        if settings.get("norm", "layernorm") in names:
            found |= {"norm": norm, "layer_norm_eps": checked("", key, settings.get(key, default_eps), where)}
    if found["norm"] == "layernorm" and not checked_flag("use_bias_in_norms", settings, where, True):
        raise ValueError(f"{where} has use_bias_in_norms: False with LayerNorm; supported is True, or norm: 'rmsnorm'")
    if not found.get("n_kv_heads", 1):
        del found["n_kv_heads"]  # 0 means as many as heads
    elif found.get("n_kv_heads") not in (None, found.get("n_heads")) and checked_flag("te_mha", settings, where):
        raise ValueError(
            f"{where} has te_mha: True and num_kv_heads: {found['n_kv_heads']}; supported is te_mha: False"
        )
    # GPT-NeoX's fused kernel of bias and GELU uses the tanh form, its unfused one the exact form.
    found["activation"] = "gelu_tanh" if checked_flag("bias_gelu_fusion", settings, where) else "gelu"
    found["tied"] = not checked_flag("no_weight_tying", settings, where)
    if settings.get("mlp_multiple_of") not in (None, 1):
        found.pop("n_ff", None)  # rounded up, so that it follows from the tensors alone
    return found


def unquoted(value: Any) -> Any:
    """Flag or number in a string, any other value as it is. YAML 1.1 reads `1e-5`, without a point, as a string."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if NUMBER.fullmatch(value.strip()) is None:
        return value
    number = float(value)
    return int(number) if number.is_integer() and "e" not in value.lower() and "." not in value else number


def kinds_in(value: Any) -> set[str]:
    """Kinds of attention in [[["global", "flash"], 12], ...] or ["global", ...]; "all" is a number of repetitions."""
    if isinstance(value, list):
        return set().union(*map(kinds_in, value))
    return {str(value)} if value not in (None, "all") and not isinstance(value, int) else set()


def checked(field: str, key: str, value: Any, where: str) -> Any:
    """Convert a setting to the type of its field; raises ValueError if it has another type."""
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number) or (field in WHOLE and not number.is_integer()):
        raise ValueError(
            f"{where} has {key}: {quoted(value)}, which must be {'an integer' if field in WHOLE else 'a number'}"
        )
    return number if field not in WHOLE else value if isinstance(value, int) else int(number)


def checked_flag(key: str, settings: Mapping[str, Any], where: str, default: bool = False) -> bool:
    """Value of a flag; raises ValueError if it is not a boolean."""
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{where} has {key}: {quoted(value)}, which must be true or false")
    return value


def settings_of(config: NeoXConfig, model_parallel: int, divisible_by: int) -> dict[str, Any]:
    """Inverse of `fields`: settings that GPT-NeoX reads as well."""
    settings: dict[str, Any] = {key: getattr(config, field) for field, key, _ in KEYS}
    if config.n_kv_heads is None:
        del settings["num_kv_heads"]
    # Older versions of GPT-NeoX refuse newer keys: only what differs from the default is written.
    changed = [(field, key) for field, key, default in FLAGS if getattr(config, field) != default]
    settings |= {key: getattr(config, field) for field, key in changed}
    settings |= {key: config.layer_norm_eps for norm, _, key, _ in NORMS if norm == config.norm}
    if config.rope_base == int(config.rope_base):
        settings["rotary_emb_base"] = int(config.rope_base)  # GPT-NeoX requires an integer
    return settings | {
        "intermediate_size": config.d_ff,
        "activation": "gelu",
        "bias_gelu_fusion": config.activation == "gelu_tanh",
        "no_weight_tying": not config.tied,
        "norm": config.norm,
        "pos_emb": "rotary",
        "output_layer_parallelism": "column",
        "seq_length": config.max_len,
        "make_vocab_size_divisible_by": divisible_by,
        "model_parallel_size": model_parallel,
        "pipe_parallel_size": 1,
    }


def yaml_text(settings: Mapping[str, Any]) -> str:
    """YAML text of a mapping to numbers, flags and strings; 1e-05 is written as 1.0e-05, which YAML 1.1 requires."""
    words = {True: "true", False: "false"}
    lines = []
    for key, value in settings.items():
        text = words[value] if isinstance(value, bool) else repr(value)
        lines.append(f"{key}: {text.replace('e-', '.0e-') if 'e-' in text and '.' not in text else text}")
    return "\n".join(lines) + "\n"
