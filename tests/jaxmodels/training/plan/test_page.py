"""docs/plans.md: what `make plans` compiles, stores and writes, and that its figures hold."""

import importlib.util
import json
import re

import pytest

from bench import plans
from bench.plans_page import page
from jaxmodels.training.plan import command
from jaxmodels.training.plan.topology import HBM, chips, parse_topology

VERSIONS = {"jax": "0.10.2", "libtpu": "0.0.42"}


def row(step: plans.Step, **figures: object) -> dict:
    """Figures as `plans.compiled` returns them."""
    common = {"key": step.key, "table": step.table, "name": step.name, "topology": step.topology}
    place = {"mesh": "fsdp=32", "sequences": step.sequences, "parameters": 7, "tokens": 11}
    return {**common, **place, **figures}


FITS = {
    "peak": 3 * 2**30,
    "parts": {"optimizer": 2**30},
    "limit": 15.75 * 2**30,
    "flops": 5e15,
    "accessed": 7 * 2**30,
    "collectives": [{"kind": "all-gather", "count": 3, "moved": 2**31, "axes": "fsdp", "seconds": 1e-3}],
    "least": 0.013,
    "bound": "matrix products",
    "processor_seconds": 17.0,
    "chips": 32,
}


def test_every_step_is_accepted_by_the_planner_and_named_once():
    steps = [step for generation in plans.GENERATIONS for step in plans.steps(generation)]
    assert len({step.key for step in steps}) == len(steps)
    names = {step.name for step in steps}
    long = next(step for step in steps if step.name == "pythia_1_4b, 32,768 tokens")
    assert command.parse(long.arguments)[0].config.seq_len == 32_768
    assert names >= {"rope original", "feedback_kv small", "retro original", *plans.PYTHIA, "neox_20b"}
    for step in (step for step in steps if step.topology == "v4:2x2x1" and step.table == "scripts"):
        _, options = command.parse(step.arguments)
        n = chips(parse_topology(options.topology)[1])
        assert options.config.batch_size == step.sequences * n


def test_slices_for_the_largest_model_are_those_that_hold_its_state():
    first = {generation: plans.slices_for_20b(generation)[0] for generation in plans.GENERATIONS}
    state = 20_554_567_680 * 12 / 2**30
    for generation, topology in first.items():
        n = chips(topology.partition(":")[2])
        assert state / n < HBM[generation] <= state / (n // 2)


def test_a_cut_run_goes_on_with_the_steps_that_are_missing(tmp_path, monkeypatch):
    """The most sequences are found from the difference of one and two; each step is compiled once."""
    done = []

    def compiled(step: plans.Step) -> dict:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(step.key)
        peak = (10 + 1.5 * step.sequences) * 2**30
        if peak > FITS["limit"]:
            return row(step, need=peak / 2**30, limit=15.75)
        return row(step, **{**FITS, "peak": peak})

    monkeypatch.setattr(plans, "compiled", compiled)
    monkeypatch.setattr(plans, "PAGE", tmp_path / "plans.md")
    file = tmp_path / "runs" / "plans.jsonl"
    with pytest.raises(KeyboardInterrupt):
        plans.largest(plans.Store(file), "v5e")
    assert len(file.read_text().splitlines()) == 3
    first, done[:] = list(done), []
    plans.largest(plans.Store(file), "v5e")
    again = plans.Store(file)
    assert not set(first) & set(done)
    found = {row["sequences"]: "peak" in row for row in again.rows.values()}
    assert found == {1: True, 2: True, 3: True, 4: False}
    assert "Most sequences per chip: 3; 4 need 16 GiB." in (tmp_path / "plans.md").read_text()


def test_steps_of_other_versions_are_compiled_again(tmp_path):
    file = tmp_path / "plans.jsonl"
    file.write_text(json.dumps({"key": "rope", "versions": {"jax": "0.1", "libtpu": "0"}}) + "\n")
    assert not plans.Store(file).rows


def test_the_page_says_what_is_refused_and_what_is_missing():
    one = row(plans.language_model("neox_20b", "v5e:4x8", 1, "neox_20b"), **FITS, versions=VERSIONS)
    two = row(plans.language_model("neox_20b", "v5e:4x4", 1, "neox_20b"), need=17.5, limit=15.75, versions=VERSIONS)
    peer = {"key": "neox_20b v5e:4x8 fsdp=32 1", "flags": ["head_dim=96"], "peak": 4 * 2**30}
    text = page([one, two], [("v6e:1x1", "rope small"), ("v6e:1x1", "rope original")], [peer])
    assert "| neox_20b | v5e:4x8 | 1 | 3 of 15.75 | 5 | 7 | all-gather fsdp 2 | 13 ms, matrix products | 17 |" in text
    assert "`v5e:4x8` holds it; `v5e:4x4` needs 17.5 of 15.75 GiB" in text
    assert "| neox_20b | v5e:4x8 | fsdp=32 | 1 | 3.000 | 4.000 |" in text
    assert "2 steps" in text
    assert "- `v6e:1x1`: rope small, rope original" in text
    assert "head_dim=96" in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (extra plan)")
@pytest.mark.parametrize("name", ["pythia_70m", "rope original", "neox small"])
def test_a_steps_memory_is_at_most_that_of_the_page_and_three_percent(name):
    step = next(step for step in plans.steps("v5e") if step.name == name)
    line = re.search(rf"^\| {name} \| {step.topology} \|.*?\| ([\d.e-]+) of", plans.PAGE.read_text(), re.M)
    assert line is not None, "the page has no such row"
    found = plans.compiled(step)
    assert found["peak"] / 2**30 <= 1.03 * float(line[1])
