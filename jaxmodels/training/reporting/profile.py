"""Profile of a run's first steps."""

from pathlib import Path

import jax

from jaxmodels.process.failures import cause
from jaxmodels.process.streams import warn


class Trace:
    """Profile of `n` steps and the reports between them, written to a folder.

    It begins with the second step of this process; the first one is for warm-up. If it cannot be written, a warning
    says so, and the run goes on.
    """

    def __init__(self, folder: Path, step: int, n: int):
        self.folder, self.bounds = folder, [step + 1, step + 1 + n] if n else []

    def until(self, step: int) -> int:
        """Next step, at most `step`, after which `at` must be called."""
        return min([step, *self.bounds])

    def at(self, step: int) -> None:
        """Start or stop the profile if it is due after this step."""
        if self.bounds[:1] == [step]:
            begins = len(self.bounds) == 2
            del self.bounds[0]
            jax.profiler.start_trace(str(self.folder)) if begins else self.stop()

    def close(self) -> None:
        """Stop the profile if it was started."""
        if len(self.bounds) == 1:
            self.bounds = []
            self.stop()

    def stop(self) -> None:
        """Stop the profile, which writes it."""
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # RuntimeError: of XLA
            warn(f"the profile could not be written: {cause(error, self.folder)}")
