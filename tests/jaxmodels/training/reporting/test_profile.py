"""Profile of a run's first steps, where it cannot be written."""

import jax
import pytest

from jaxmodels.training.reporting.profile import Trace


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("UNKNOWN: a.xplane.pb; No space left on device")]
)
def test_a_profile_that_cannot_be_written_is_a_warning(error, tmp_path, monkeypatch, capsys):
    def stop():
        raise error

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    trace = Trace(tmp_path / "profile", 0, 1)
    trace.at(1)
    trace.at(2)
    said = f"warning: the profile could not be written: {tmp_path / 'profile'}: No space left on device\n"
    assert capsys.readouterr().err == said
    trace.close()
    assert capsys.readouterr().err == ""
