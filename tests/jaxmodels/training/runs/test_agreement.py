"""Checkpoints that contradict their run, as files of others may: they are refused by name, or an older one is read."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.generate import command as generate
from jaxmodels.io.checkpoint import read_arrays
from jaxmodels.io.steps import MARK, steps
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.training.checkpoints import typed
from jaxmodels.training.commands import evaluate, sample
from jaxmodels.training.runs.agreement import Expected, check_model
from jaxmodels.training.script import main, parse
from jaxmodels.training.trainer import Trainer
from tests.train_common import TEXT, TINY
from train import feedback, neox, retro, rope

PROGRAM = "python -m train.rope"
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def ended(tmp_path_factory, compile_cache) -> Path:
    """A run with checkpoints 5 and 7."""
    folder = tmp_path_factory.mktemp("ended")
    (folder / "sea.txt").write_text(TEXT)
    flags = [*TINY, "--text", folder / "sea.txt", "--no-tensorboard", "--compile-cache", compile_cache, "--steps", 7]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(rope.Rope, PROGRAM, [*map(str, flags), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(ended, tmp_path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def opened(run: Path, *flags: str) -> Trainer:
    """The run as it is resumed, up to the first step."""
    experiment, command = parse(rope.Rope, PROGRAM, ["--resume", str(run), "--no-tensorboard", *flags])
    trainer = Trainer(experiment, run, command.options)
    trainer.close()
    return trainer


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file, and the sizes of its step's files in complete.json."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    measure(file)


def measure(file: Path) -> None:
    """Write the sizes of the files of the step that a file lies in to its complete.json, so that it is complete."""
    step = next((folder for folder in file.parents if folder.parent.name == "checkpoints"), None)
    if step is not None and file != step / MARK:
        mark = json.loads((step / MARK).read_text())
        found = (path for path in step.rglob("*") if path.is_file() and path.name not in (MARK, ".jaxmodels.json"))
        mark["files"] = {str(path.relative_to(step)): path.stat().st_size for path in found}
        (step / MARK).write_text(json.dumps(mark))


def test_an_unchanged_run_is_resumed(run):
    assert opened(run, "--steps", "9").position.step == 7


def older(run: Path) -> None:
    """Have a run's checkpoints as older versions wrote them, without hyperparameters and description."""
    for mark in run.glob(f"checkpoints/*/{MARK}"):
        content = json.loads(mark.read_text())
        mark.write_text(json.dumps({key: content[key] for key in ("format", "step", "data", "files")}))


def descriptions(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/*/model/config.json"))


def configure(run: Path, **fields: object) -> None:
    edit(run / "config.json", lambda about: about["config"].update(fields))


def test_a_run_of_an_older_version_is_resumed(run):
    older(run)
    assert opened(run, "--steps", "9").position.step == 7


@pytest.mark.parametrize(("key", "value", "then"), [("heads", 5, "3"), ("attention", "relative", "'rotary'")])
def test_a_configuration_that_gives_another_model_than_its_checkpoint_is_refused(run, key, value, then):
    older(run)
    configure(run, **{key: value})
    file = run / "checkpoints" / "7" / "model" / "config.json"
    with pytest.raises(ValueError, match=f"^{file} has {key}={then}, but {run}/config.json gives {key}={value!r}$"):
        opened(run)


@pytest.mark.parametrize(("key", "value", "then"), [("heads", 5, "3"), ("seed", 1, "0"), ("batch_size", 8, "4")])
def test_hyperparameters_are_those_that_the_checkpoint_was_saved_with(run, key, value, then):
    configure(run, **{key: value})
    with pytest.raises(ValueError, match=rf"/7/complete\.json was saved with {key}={then}, but .* has {key}={value}:"):
        opened(run)


def test_a_description_that_gives_another_model_than_the_configuration_is_refused(run):
    older(run)
    for file in descriptions(run):
        edit(file, lambda content: content["config"].update(heads=5))
    with pytest.raises(ValueError, match=r"/7/model/config\.json has heads=5, but .*/config\.json gives heads=3$"):
        opened(run)


@pytest.mark.parametrize(
    "command",
    [
        lambda run: evaluate.main([run]),
        lambda run: evaluate.main([run, "--text", f"{run}/vocabulary.json", "--stride", "3"]),
        lambda run: sample.main([run]),
        lambda run: generate.main([run, "--prompt", "The "]),
    ],
)
def test_every_command_compares_the_model_of_a_run_with_its_configuration(run, command, capsys):
    older(run)
    edit(descriptions(run)[1], lambda content: content["config"].update(heads=5))
    assert command(str(run)) == 2
    assert re.fullmatch(
        r".*/7/model/config\.json has heads=5, but .*/config\.json gives heads=3\n", capsys.readouterr().err
    )


def test_a_run_without_a_complete_checkpoint_says_that_it_begins_anew(run, capsys):
    for mark in run.glob(f"checkpoints/*/{MARK}"):
        mark.unlink()
    assert opened(run).position.step == 0
    said = f"warning: {run}/checkpoints has no complete checkpoint; 2 unfinished up to step 7 are removed, "
    said += "and training begins at step 0\n"
    assert capsys.readouterr().err == said
    assert list((run / "checkpoints").iterdir()) == []


def test_a_description_is_that_which_was_saved(run, capsys):
    for file in descriptions(run)[:1]:
        edit(file, lambda content: content["config"].update(heads=5))
    assert opened(run).position.step == 7
    edit(descriptions(run)[1], lambda content: content["config"].update(heads=5))
    with pytest.raises(
        ValueError, match=r"/7/model/config\.json has config\.heads=5, but .*/7/complete\.json 3; .*/5/"
    ):
        opened(run)
    with pytest.raises(ValueError, match=r"no complete checkpoint.*config\.heads=5"):
        jaxmodels.load(run)


@pytest.mark.parametrize("described", [True, False])
def test_layers_without_arrays_are_refused_at_once(run, described):
    older(run)
    configure(run, n_layers=2000)
    for file in () if described else descriptions(run):
        edit(file, dict.clear)
    began = time.process_time()
    said = "more than [0-9]+ tensors; stored are" if described else "has no checkpoint that can be read: .*'format'"
    with pytest.raises(ValueError, match=said):
        opened(run)
    assert time.process_time() - began < 5


def saved(folder: Path, model: Any) -> Path:
    """A run with one checkpoint, of which the model alone is there."""
    step = folder / "checkpoints" / "3"
    step.mkdir(parents=True)
    (step / MARK).write_text(json.dumps({"format": 2, "step": 3, "data": {}, "files": {}}))
    jaxmodels.save(model, step / "model")
    return folder


SMALL = {"d_model": 16, "heads": 2, "d_ff": 5, "n_layers": 1}
DECODER = SMALL | {"chunk_len": 4, "seq_len": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "change", "said"),
    [
        (neox.Neox, SMALL, {"rope_percentage": 1.0}, "rope_percentage=0.25, .* rope_percentage=1.0"),
        (feedback.Feedback, SMALL, {"memory": 3}, "memory=None, .* memory=3"),
        (retro.Retro, DECODER, {"heads": 4, "d_k": 8}, r"encoder\.n_heads=2, .* encoder\.n_heads=4"),
        (retro.Retro, DECODER, {"encoder_layers": 2000}, "more than [0-9]+ tensors; stored are"),
        (neox.Neox, SMALL, {"n_layers": 2000}, "n_layers=1, .* n_layers=2000"),
        (retro.Retro, DECODER | {"n_layers": 2}, {"ca_layers": (0,)}, r"ca_layers=\[1\], .* ca_layers=\[0\]"),
    ],
)
def test_the_models_of_all_scripts_are_compared(tmp_path, kind, fields, change, said):
    experiment = kind(kind.config_class(**fields))
    run = saved(tmp_path / "run", experiment.model(11))
    check_model(experiment, run, 11)
    with pytest.raises(ValueError, match=said):
        check_model(kind(dataclasses.replace(experiment.config, **change)), run, 11)
    with pytest.raises(ValueError, match=r"n_vocab=11, .* n_vocab=12"):
        check_model(experiment, run, 12)


def test_layers_that_are_not_built_may_be_more_than_the_tensors(tmp_path):
    experiment = retro.Retro(retro.Config(**DECODER, retrieval=False, encoder_layers=2000))
    run = saved(tmp_path / "run", experiment.model(11))
    check_model(experiment, run, 11)
    with pytest.raises(ValueError, match=r"more than \d+ tensors; stored are"):
        check_model(retro.Retro(dataclasses.replace(experiment.config, n_layers=2000)), run, 11)


def test_the_adapter_of_a_fine_tuned_run_is_compared(tmp_path):
    model = NeoX(NeoXConfig(n_vocab=11, n_hidden=16, n_layers=3, n_heads=2), rngs=nnx.Rngs(0))
    run = saved(tmp_path / "run", LoRANeoX.of(model, LoRA(2, 8.0), 0))
    for alpha in (8.0, 1000.0):
        config = neox.Config(checkpoint="elsewhere", tune="lora", lora_rank=2, lora_alpha=alpha, n_layers=999)
        experiment = neox.Neox(config)
        experiment.resume(run)
        if alpha == 8.0:
            check_model(experiment, run, 11)
        else:
            with pytest.raises(ValueError, match=r"has lora\.alpha=8\.0, .* gives lora\.alpha=1000\.0"):
                check_model(experiment, run, 11)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"next_index": 2**52 + 5}, "next_index alone must be there"),
        ({"next_index": 0}, "next_index=0 at step 7, must be 7"),
        ({"next_index": 8}, "next_index=8 at step 7, must be 7"),
        ({"next_index": 7, "epoch": 1}, "next_index alone must be there"),
        ({}, "next_index alone must be there"),
    ],
)
def test_a_position_in_the_data_that_the_step_contradicts_is_not_read(run, data, said, capsys):
    edit(run / "checkpoints" / "7" / MARK, lambda mark: mark.update(data=data))
    assert opened(run).position.step == 5
    assert re.search(rf"checkpoint 7 is skipped: .*/7/complete\.json has .*{said}", capsys.readouterr().err)


def test_a_branched_run_has_taken_no_more_batches_than_steps_since_its_beginning(tmp_path):
    expected = Expected(began=5)
    for used, fine in ((2, True), (9, True), (1, False)):
        mark = {"step": 7, "data": {"next_index": used}}
        with contextlib.nullcontext() if fine else pytest.raises(ValueError, match="must be at least 2"):
            expected.check(tmp_path, mark)
    with pytest.raises(ValueError, match="began at step 5"):
        expected.check(tmp_path, {"step": 3, "data": {"next_index": 3}})


def test_a_count_of_the_optimizer_that_the_step_contradicts_is_not_read(run, capsys):
    rewrite(run / "checkpoints" / "7" / "state", "count", lambda array: array * 0 + 3)
    assert opened(run).position.step == 5
    said = r"checkpoint 7 is skipped: .*/7/state has optimizer.*\.count=3, must be 7, the number of steps\n"
    assert re.search(said, capsys.readouterr().err)


def rewrite(folder: Path, end: str, change: Callable[[jax.Array], jax.Array]) -> str:
    """Change the first array of an Orbax folder whose name has that end and that is not empty; returns its name."""
    from orbax.checkpoint import v1 as ocp

    arrays = read_arrays(folder, {name: typed(a, DEVICE) for name, a in ocp.metadata(folder).metadata.items()})
    name = next(name for name in sorted(arrays) if name.endswith(end) and name != "key")
    shutil.rmtree(folder)
    ocp.save(folder, arrays | {name: change(arrays[name])})
    measure(folder / "state")
    return name


@pytest.mark.parametrize(("part", "end"), [("model/params", ""), ("state", "bias']")])
def test_arrays_of_another_float_dtype_are_named_and_an_older_checkpoint_is_read(run, part, end, capsys):
    name = rewrite(run / "checkpoints" / "7" / part, end, lambda array: array.astype(jnp.bfloat16))
    assert opened(run).position.step == 5
    said = rf"checkpoint 7 is skipped: .*/7/{part} .*{re.escape(name)} has dtype bfloat16, expected float32\n"
    assert re.search(said, capsys.readouterr().err)
    assert steps(run / "checkpoints") == [5]
