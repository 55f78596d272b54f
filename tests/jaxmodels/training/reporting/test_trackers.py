"""Metrics, TensorBoard, Weights & Biases and functions through one interface."""

import json
import math
import resource
import signal
import sys
import time
import types

import pytest

from jaxmodels.process.extras import MissingExtra
from jaxmodels.training import metrics
from jaxmodels.training.config import Options
from jaxmodels.training.reporting.trackers import Function, TensorBoard, Trackers, WandB
from jaxmodels.training.script import train
from train import rope


def test_each_tracker_gets_its_steps_and_every_validation(tmp_path):
    calls = []
    tensorboard = TensorBoard(tmp_path, 0)
    trackers = Trackers([metrics.Log(tmp_path, []), tensorboard, Function(lambda *call: calls.append(call))], tmp_path)
    for step in range(1, 22):
        trackers.step(step, {"loss": 1 / step})
    trackers.write(21, {"validation_loss": 0.5})
    trackers.close()
    assert [step for step, _ in calls] == [*range(1, 22), 21]
    assert calls[-1] == (21, {"validation_loss": 0.5})
    lines = metrics.read(tmp_path)
    assert [(line.pop("step"), line) for line in lines] == calls
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert events(file) == [(10, "loss", 1 / 10), (20, "loss", 1 / 20), (21, "validation_loss", 0.5)]


def events(file):
    """Scalars of an event file: length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, pytest.approx(value.simple_value)) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_a_tracker_that_cannot_write_is_dropped_with_a_warning(tmp_path, capsys):
    calls = []

    class Full(Function):
        def write(self, step, values):
            super().write(step, values)
            raise OSError(28, "No space left on device", "/full/events")

    trackers = Trackers([Full(lambda *call: calls.append(call))], tmp_path)
    for step in (1, 2):
        trackers.step(step, {"loss": 1.0})
    trackers.close()
    assert len(calls) == 1
    err = capsys.readouterr().err
    assert err == "warning: Full receives nothing from step 1 on: /full/events: No space left on device\n"


def test_tensorboard_on_a_full_disk_is_dropped_with_a_warning_that_names_the_file(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trackers = Trackers([TensorBoard(tmp_path, 0)], tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        for step in range(10, 20_000, 10):
            trackers.step(step, {"loss": 1.0})
        trackers.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: TensorBoard receives nothing from step ")
    assert f"{tmp_path}/tensorboard/events" in line
    assert line.endswith(": File too large")


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = metrics.Log(tmp_path, [])
    log.write(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))  # less than a line
    try:
        log.write(2, {"loss": 2.0})
        log.write(3, {"loss": math.nan})
        assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(4, {"loss": 4.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("wait in memory") == 1


def test_an_evaluation_is_kept_until_the_new_one_of_its_step_is_written(tmp_path):
    def lines():
        return [(line["step"], line.get("validation_loss")) for line in metrics.read(tmp_path)]

    log = metrics.Log(tmp_path, [])
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
        log.write(step, {"validation_loss": 0.5})
    log.close()
    log = metrics.Log(tmp_path, [1.0, 1.0])  # the third step is not in a checkpoint
    both = [(1, None), (1, 0.5), (2, None), (2, 0.5)]
    assert lines() == both
    log.write(3, {"loss": 2.0})
    log.close()
    assert lines() == [*both, (3, None)]
    log = metrics.Log(tmp_path, [1.0, 1.0])
    log.write(2, {"validation_loss": 0.25})
    assert lines() == [*both[:3], (2, 0.25)]
    log.write(3, {"loss": 2.0})
    log.close()
    assert lines() == [*both[:3], (2, 0.25), (3, None)]


def test_both_evaluations_of_a_step_are_kept_if_the_earlier_one_cannot_be_dropped(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 1, "validation_loss": 0.5}\n')
    log = metrics.Log(tmp_path, [1.0])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(metrics, "atomic_file", full)
        log.write(1, {"validation_loss": 0.25})
    log.write(2, {"loss": 1.0})
    log.close()
    assert [line.get("validation_loss") for line in metrics.read(tmp_path)] == [None, 0.5, 0.25, None]
    metrics.Log(tmp_path, [1.0]).close()
    assert [line.get("validation_loss") for line in metrics.read(tmp_path)] == [None, 0.25]


def test_weights_and_biases_gets_the_configuration_and_continues_a_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **arguments: calls.append(arguments) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        tracker = WandB(tmp_path / "run", "project", {"seed": 3})
        tracker.write(10, {"loss": 0.5})
        tracker.close()
    assert calls[:3] == calls[3:]
    assert (calls[0]["project"], calls[0]["config"], calls[0]["resume"]) == ("project", {"seed": 3}, "allow")
    assert calls[1:3] == [(10, {"loss": 0.5}), "finished"]


def test_weights_and_biases_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmodels.process.extras.available", lambda module: module != "wandb")
    with pytest.raises(MissingExtra, match=r"jaxmodels\[wandb\]"):
        WandB(tmp_path, "project", {})
    experiment = rope.Rope(rope.Config())
    with pytest.raises(MissingExtra, match=r"jaxmodels\[wandb\]"):
        train(experiment, tmp_path / "run", options=Options(wandb="project"), callback=lambda *call: None)
    assert not (tmp_path / "run").exists()  # before any work


def test_two_event_files_of_one_second_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.0e9)
    for step in (0, 10):
        events = TensorBoard(tmp_path, step)
        events.write(step + 10, {"loss": 0.5})
        events.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
