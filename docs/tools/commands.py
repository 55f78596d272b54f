"""Pages of the command lines, from the programs' own parsers."""

import argparse
import dataclasses
import importlib
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tyro

from jaxmodels.command import COMMANDS
from jaxmodels.training import script
from jaxmodels.training.experiment import EXPERIMENTS
from jaxmodels.training.plan import command as plan

JAXMODELS = """\
# The command `jaxmodels`

`python -m jaxmodels` is the same command. Exit code: 0; 2 after an error of one line; 130 after Ctrl-C. `verify` exits
with 1 if anything differs.
"""
PARITY = """\
# The command `parity`

`python -m parity` is the same command. Exit code: 0 if all cases agree, 1 if a case differs, 2 after an error.
"""
SCRIPTS = """\
# Training scripts

The scripts run from a checkout: `python -m train.NAME`. An experiment of your own has the flags of the first sections,
too. Defaults there are those of `train.rope --preset small`.
"""


def escaped(text: str) -> str:
    """Text of a help message as Markdown."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_<>{}\[\]|#])", r"\\\1", text)


def name_of(action: argparse.Action) -> str:
    """An argument as it is typed."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return ", ".join(action.option_strings)
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    if isinstance(value, tuple):
        value = " ".join(value)
    more = {"*": " …", "+": " …"}.get(str(action.nargs), "")
    if not action.option_strings:
        return f"[{value}{more}]" if action.nargs in ("?", "*") else f"{value}{more}"
    return ", ".join(action.option_strings) + f" {value}{more}"


def entry(action: argparse.Action) -> str:
    """An argument as an item of a definition list."""
    known = {"%%": "%", "%(default)s": str(action.default), "%(prog)s": "", "%(choices)s": str(action.choices)}
    text = re.sub(r"%%|%\(\w+\)s", lambda match: known[match[0]], action.help or "")
    return f"`{name_of(action)}`\n:   {escaped(text.removesuffix(' (default: None)')) or '–'}\n"


def shown(actions: Iterable[argparse.Action]) -> list[argparse.Action]:
    """Actions that a help message lists."""
    skipped = (argparse._SubParsersAction, argparse._VersionAction)
    return [
        a
        for a in actions
        if not (a.help == argparse.SUPPRESS or "--help" in a.option_strings or isinstance(a, skipped))
    ]


def subparsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Name and parser of each subcommand."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def section(parser: argparse.ArgumentParser, title: str, level: int = 2) -> str:
    """One command: usage, description, arguments and examples."""
    usage = textwrap.dedent(parser.format_usage().replace("usage: ", "       ", 1)).strip()
    parts = [f"{'#' * level} {title}\n"]
    if parser.description:
        parts.append(escaped(parser.description) + "\n")
    parts.append(f"```text\n{usage}\n```\n")
    for group in parser._action_groups:
        actions = shown(group._group_actions)
        if actions:
            heading = str(group.title).removeprefix("positional ")
            parts.append(f"**{heading[:1].upper()}{heading[1:]}**\n")
            parts += map(entry, actions)
    if parser.epilog:
        parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


def jaxmodels() -> str:
    """Every subcommand of `jaxmodels`."""
    parts = [JAXMODELS]
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module)
        if name == "plan":
            parts.append(section(plan.overview("jaxmodels plan"), "jaxmodels plan"))
            continue
        whole = module.parser("jaxmodels" if command.first else f"jaxmodels {name}")
        inner = dict(subparsers(whole))
        if command.first:
            parts.append(section(inner[command.first[0]], f"jaxmodels {name}"))
        elif inner:
            hidden = {other.first[0] for other in COMMANDS.values() if other.first}
            parts.append(f"## jaxmodels {name}\n\n{escaped(whole.description or '')}\n")
            parts += [section(p, f"jaxmodels {name} {n}", 3) for n, p in inner.items() if n not in hidden]
        else:
            parts.append(section(whole, f"jaxmodels {name}"))
    return "\n".join(parts)


def parity() -> str:
    """`parity` and `parity verify`."""
    command = importlib.import_module("parity.command").parser("parity")
    verify = importlib.import_module("parity.checkpoint.verify").parser("parity verify")
    return "\n".join([PARITY, section(command, "parity"), section(verify, "parity verify")])


def tyro_parser(kind: Any, command: Any, values: tuple[Any, ...], prog: str) -> argparse.ArgumentParser:
    """Parser of a dataclass of flags."""
    made = script.with_presets(command, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other function for it
        parser: Any = tyro.extras.get_parser(
            made, default=made(*values), prog=prog, config=(tyro.conf.OmitArgPrefixes,)
        )
    return parser


def of_script(name: str, kind: Any) -> argparse.ArgumentParser:
    """Parser of a training script."""
    preset = kind.config_class.PRESETS[0]
    values = (kind.config_class.of_preset(preset), preset, Path("runs") / name)
    return tyro_parser(kind, script.Command, values, f"python -m train.{name}")


def presets(kind: Any) -> str:
    """Table of what each preset sets."""
    names = kind.config_class.PRESETS
    configs = [dataclasses.asdict(kind.config_class.of_preset(name)) for name in names]
    keys = [key for key in configs[0] if any(config[key] != configs[0][key] for config in configs)]
    if not keys:
        return ""
    rows = [f"| `--{key.replace('_', '-')}` | " + " | ".join(f"`{c[key]}`" for c in configs) + " |" for key in keys]
    head = "| flag | " + " | ".join(f"`{name}`" for name in names) + " |"
    return "\n".join(
        ["Presets (`--preset`) and the flags in which they differ:\n", head, "|---" * (len(names) + 1) + "|", *rows, ""]
    )


def scripts() -> str:
    """Flags that all training scripts have, then those of each one, then the planner's."""
    kinds = {name: importlib.import_module(module).EXPERIMENT for name, module in EXPERIMENTS.items()}
    parsers = {name: of_script(name, kind) for name, kind in kinds.items()}
    strings = [{s for a in parser._actions for s in a.option_strings} for parser in parsers.values()]
    common = set.intersection(*strings)
    parts = [SCRIPTS]
    for group in parsers["rope"]._action_groups:
        actions = [a for a in shown(group._group_actions) if set(a.option_strings) & common]
        if actions:
            title = {"options": "Flags of every script", "hyperparameter options": "Hyperparameters of every script"}
            heading = title.get(str(group.title), str(group.title))
            parts.append(f"## {heading[:1].upper()}{heading[1:]}\n")
            parts += map(entry, actions)
    for name, parser in parsers.items():
        doc = (importlib.import_module(EXPERIMENTS[name]).__doc__ or "").strip()
        parts.append(f"## train.{name}\n\n{escaped(doc.partition(chr(10))[0])}\n")
        rest = doc.partition("\n")[2].strip("\n")
        parts.append(f"```text\n{rest}\n```\n")
        own = [a for a in shown(parser._actions) if not set(a.option_strings) & common]
        parts += map(entry, own)
        parts.append(presets(kinds[name]))
    preset = kinds["rope"].config_class.PRESETS[0]
    planner = tyro_parser(kinds["rope"], plan.Command, (kinds["rope"].config_class.of_preset(preset), preset), "")
    known = {s for p in strings for s in p} - {"--mesh"}
    parts.append(
        "## train.plan\n\n`python -m train.plan EXPERIMENT`, also `jaxmodels plan EXPERIMENT`, takes the experiment's "
        "hyperparameters and:\n"
    )
    parts += [entry(a) for a in shown(planner._actions) if not set(a.option_strings) & known]
    return "\n".join(parts)


PAGES = {
    "reference/command-jaxmodels.md": jaxmodels,
    "reference/command-parity.md": parity,
    "reference/scripts.md": scripts,
}
