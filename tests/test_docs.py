"""The pages: their commands as the programs' own parsers read them, their imports, their links."""

import argparse
import ast
import importlib
import importlib.util
import itertools
import math
import re
import shlex
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from jaxmodels.command import COMMANDS
from jaxmodels.sharding import AXES, check_batch, parse_sizes
from jaxmodels.training import config, script
from jaxmodels.training.commands import template
from jaxmodels.training.experiment import EXPERIMENTS
from jaxmodels.training.plan import command as plan
from jaxmodels.training.plan.topology import chips, parse_topology
from parity.plugin import FILES

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    *sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/**/*.md")),
]
# Anywhere in a page, also inside another command; flags end at a comment, a quote or the line's end.
TRAIN = re.compile(r"python -m train\.(\w+)(?: +([^#'`\n]*))?", re.M)
# Inline code that is a command.
INLINE = re.compile(r"(?:python -m |python examples/|make |jaxmodels |parity |pytest )[^`\n]*")
# Programs that pages show and that are not of this project: their arguments are not checked.
OTHERS = {"cd", "chmod", "cp", "gcloud", "gcsfuse", "git", "hf", "pre-commit", "source"}
OWN = {"./my_experiment.py", "jaxmodels", "make", "parity", "pip", "pytest", "python"}
PARSERS = {
    "jaxmodels": "jaxmodels.command",
    "jaxmodels.convert": "jaxmodels.convert.command",
    "jaxmodels.generate": "jaxmodels.generate.command",
    "jaxmodels.neox.generate": "jaxmodels.neox.generate",
    "jaxmodels.retro.neighbors": "jaxmodels.retro.retrieval.command",
    "parity": "parity.command",
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def joined(page: str) -> str:
    """Text of a page with continued lines as one."""
    return read(page).replace("\\\n", " ")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of a page's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.M | re.S)


def commands() -> list[tuple[str, str, str]]:
    """(page, program, flags) of each training command, once; … stands for omitted flags."""
    found = [(page, *match.groups(default="")) for page in PAGES for match in TRAIN.finditer(joined(page))]
    return [command for command in dict.fromkeys(found) if "…" not in command[2] and command[1].islower()]


def in_block(language: str, content: str) -> list[str]:
    """Commands of a code block: its lines, or if some begin with `$ `, those."""
    lines = content.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    if prompted or language in ("sh", "bash"):
        return prompted or [line for line in lines if line.strip()]
    is_command = bool(lines) and lines[0].split(" ")[0] in OWN | OTHERS
    return [line for line in lines if line.split(" ")[0] in OWN | OTHERS] if is_command and not language else []


def shell_commands() -> list[tuple[str, str]]:
    """(page, command) of all commands except those of training scripts. Inline code may leave its arguments out."""
    found = []
    for page in PAGES:
        listed = [line for block in blocks(page) for line in in_block(*block)]
        inline = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S).replace("\n", " ")
        spans = [span for span in re.findall(r"`([^`]+)`", inline) if INLINE.match(span)]
        found += [(page, command) for command in [*listed, *spans]]
    return [c for c in dict.fromkeys(found) if "…" not in c[1] and not c[1].startswith("python -m train.")]


def programs(command: str) -> list[list[str]]:
    """Words of each program of a command line; what is behind a pipe or a redirection is left out."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(command, comments=True):
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return [list(itertools.takewhile(lambda word: word not in ("|", ">"), part)) for part in parts]


def accepted(parser, arguments: list[str]) -> None:
    try:
        parser.parse_args(arguments)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{parser.prog} does not accept {arguments}")


def fits(settings: config.Config, mesh: str, n_devices: int) -> None:
    sizes = parse_sizes(mesh, n_devices)
    check_batch(jax.sharding.AbstractMesh(tuple(sizes.values()), AXES), settings.batch_size, settings.accumulate)


def check_plan(arguments: list[str]) -> None:
    _, command = plan.parse(arguments)
    fits(command.config, command.mesh, chips(parse_topology(command.topology)[1]))


def check_subcommand(name: str, arguments: list[str]) -> None:
    """A subcommand of `jaxmodels`."""
    if name == "--version":
        return
    assert name in COMMANDS
    if name == "plan":
        if arguments and arguments[0] in EXPERIMENTS:
            check_plan(arguments)
    elif arguments:
        parser = importlib.import_module(COMMANDS[name].module).parser("jaxmodels")
        if arguments in (["neox"], ["torch"]):  # of convert, named without its arguments
            arguments = [*arguments, "--help"]
        accepted(parser, [*COMMANDS[name].first, *arguments])


def check_module(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A `python -m` command."""
    assert importlib.util.find_spec(name) is not None
    if name in PARSERS and arguments:
        accepted(importlib.import_module(PARSERS[name]).parser("program"), arguments)
    elif name.startswith("bench."):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).parse()


def check_make(arguments: list[str]) -> None:
    """`make TARGET VARIABLE=VALUE`."""
    targets = [argument for argument in arguments if "=" not in argument]
    variables = [argument.partition("=")[0] for argument in arguments if "=" in argument]
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in targets)
    assert all(re.search(rf"^{variable} \?=", makefile, re.M) for variable in variables)


def check_pip(arguments: list[str]) -> None:
    """`pip install`: extras of this package exist."""
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, group in re.findall(r"([\w.]+)\[([\w,]+)\]", " ".join(arguments)):
        assert package in ("jaxmodels", ".")
        assert set(group.split(",")) <= extras.keys()


def check_file(file: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python FILE`: an example, or the file that `jaxmodels new` writes."""
    if file.removeprefix("./") == "my_experiment.py":
        monkeypatch.setattr(script, "saved_config", lambda kind, run: kind.config_class())
        monkeypatch.setattr(script.Command, "origin", property(lambda self: argparse.Namespace(run="RUN", step=1)))
        if not any(flag in ("--help", "--tyro-print-completion") for flag in flags):
            script.parse(template.EXPERIMENT, file, flags)
        return
    text = (ROOT / file).read_text(encoding="utf-8")
    assert all(f'"{flag}"' in text for flag in flags if flag.startswith("-"))


def check_program(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of a page, but for those of training scripts."""
    if program == "make":
        check_make(arguments)
    elif program == "jaxmodels":
        check_subcommand(*arguments[:1], arguments[1:])
    elif program == "parity":
        verify = arguments[:1] == ["verify"]
        module = importlib.import_module("parity.checkpoint.verify" if verify else "parity.command")
        accepted(module.parser(program), arguments[1:] if verify else arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "pytest":
        assert {flag for flag in arguments if flag.startswith("--")} <= {
            f"--parity-{kind}" for kind in (*FILES, "device")
        }
    elif program in ("python", "./my_experiment.py"):
        if arguments[0] == "-m":
            check_module(arguments[1], arguments[2:], monkeypatch)
        elif arguments[0] == "-c":
            ast.parse(arguments[1])
        else:
            check_file(*([arguments[0], arguments[1:]] if program == "python" else [program, arguments]), monkeypatch)
    else:
        assert program in OTHERS


@pytest.mark.parametrize(("page", "program", "flags"), commands(), ids=lambda part: part[:60])
def test_a_training_command_of_a_page_is_accepted(page, program, flags, monkeypatch):
    arguments, module = shlex.split(flags), importlib.import_module(f"train.{program}")
    if program == "plan":
        if arguments:
            check_plan(arguments)
    elif program not in EXPERIMENTS:
        if arguments:
            accepted(importlib.import_module(COMMANDS[program].module).parser("program"), arguments)
    else:
        monkeypatch.setattr(
            script, "saved_config", lambda kind, run: kind.config_class.of_preset(kind.config_class.PRESETS[0])
        )
        _, command = script.parse(module.EXPERIMENT, f"python -m train.{program}", arguments)
        mesh = command.options.mesh  # a page that names one names all of its axes
        fits(command.config, mesh, math.prod(map(int, re.findall(r"\d+", mesh))))


@pytest.mark.parametrize(("page", "command"), shell_commands(), ids=lambda part: part[:60])
def test_a_command_of_a_page_is_accepted(page, command, monkeypatch):
    for program, *arguments in programs(command):
        check_program(program, arguments, monkeypatch)


def test_the_pages_have_commands():
    found = commands()
    on_tpus = {program for page, program, _ in found if page == "docs/guides/tpu.md"}
    assert on_tpus >= {"plan", "tokenize", "rope", "evaluate"}
    assert len(found) > 15
    assert any("--distributed" in flags and "--mesh fsdp=16 --out" in flags for _, _, flags in found)
    others = [command for _, command in shell_commands()]
    assert len(others) > 30
    for start in (
        "jaxmodels convert torch --model",
        "jaxmodels generate ",
        "parity --device",
        "make parity TORCH_INDEX=",
    ):
        assert any(command.startswith(start) for command in others), start


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_a_commands_help_are_accepted(name):
    module = importlib.import_module(COMMANDS[name].module)
    examples = "\n".join(text for variable, text in vars(module).items() if variable.endswith("EXAMPLES"))
    whole_lines = re.sub(r"\\?\n {3,}", " ", examples)
    found = re.findall(r"^  jaxmodels (.*)", whole_lines, re.M)
    assert found or name == "plan"
    for line in found:
        command, *arguments = shlex.split(line.replace("$'", "'"), comments=True)
        check_subcommand(command, arguments)


def test_the_readme_is_short_and_its_outputs_are_narrow():
    assert len(read("README.md").splitlines()) < 150
    assert all(len(line) <= 100 for _, content in blocks("README.md") for line in content.splitlines())
    assert [line for _, content in blocks("README.md")[:1] for line in in_block("", content)] == [
        "make parity     # Flax against PyTorch, every case",
        "make test       # the test suite",
    ]


def test_every_page_is_in_the_navigation():
    """The navigation of mkdocs.yml has each page once, and no other but the generated ones."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- .*: (\S+\.md)$", config[config.index("\nnav:") :], re.M)
    assert len(listed) == len(set(listed))
    written = {name for name in listed if not name.startswith(("reference/", "project/"))}
    notebooks = {f"examples/{path.stem}.md" for path in ROOT.glob("examples/*.ipynb")}
    assert notebooks == {name for name in written if name.startswith("examples/")}
    written -= notebooks
    assert written == {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            linked = (ROOT / page).parent / file if file else ROOT / page
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    """Paths of this repository in inline code, from its root."""
    if page == "CHANGELOG.md":
        pytest.skip("names files of earlier versions")
    inline = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    paths = re.findall(r"`((?:jaxmodels|parity|torch_ref|train|bench|tests|docs|examples)/[\w./]*)`", inline)
    assert all((ROOT / path).exists() for path in paths if "SYSTEM" not in path), paths
