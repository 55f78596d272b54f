"""The commands of the pages, as the programs' own parsers read them: flags that are there, batches that fit a mesh."""

import importlib
import math
import re
import shlex

import jax
import pytest

from jaxmodels.sharding import AXES, check_batch, parse_sizes
from jaxmodels.training import config, script
from jaxmodels.training.experiment import EXPERIMENTS
from jaxmodels.training.plan import command as plan
from tests.train_common import ROOT

PAGES = ["docs/tpu.md", "README.md"]
COMMAND = re.compile(r"python -m train\.(\w+)(?: +([^#'`\n]*))?", re.M)


def commands() -> list[tuple[str, str, str]]:
    """(page, program, flags) of each, once; what a page leaves out, it writes as …"""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        found += [(page, *match.groups(default="")) for match in COMMAND.finditer(text)]
    return [command for command in dict.fromkeys(found) if "…" not in command[2]]


def fits(settings: config.Config, mesh: str, n_devices: int) -> None:
    sizes = parse_sizes(mesh, n_devices)
    check_batch(jax.sharding.AbstractMesh(tuple(sizes.values()), AXES), settings.batch_size, settings.accumulate)


@pytest.mark.parametrize(("page", "program", "flags"), commands(), ids=lambda part: part[:60])
def test_a_command_of_a_page_is_one_that_its_program_takes(page, program, flags, monkeypatch):
    arguments, module = shlex.split(flags), importlib.import_module(f"train.{program}")
    if program == "plan":
        _, command = plan.parse(arguments)
        fits(command.config, command.mesh, math.prod(map(int, command.topology.partition(":")[2].split("x"))))
    elif program not in EXPERIMENTS:
        importlib.import_module(f"jaxmodels.training.{program}").parser().parse_args(arguments)
    else:
        monkeypatch.setattr(
            script, "saved_config", lambda kind, run: kind.config_class.of_preset(kind.config_class.PRESETS[0])
        )
        _, command = script.parse(module.EXPERIMENT, f"python -m train.{program}", arguments)
        mesh = command.options.mesh  # a page that names one names all of its axes
        fits(command.config, mesh, math.prod(map(int, re.findall(r"\d+", mesh))))


def test_the_pages_have_commands():
    found = commands()
    assert {program for page, program, _ in found if page == PAGES[0]} >= {"plan", "tokenize", "rope", "evaluate"}
    assert len(found) > 15
    assert any("--distributed" in flags and "--mesh fsdp=16 --out" in flags for _, _, flags in found)
