"""Cases in several processes at a time: compiling, most of a case's time, keeps one core busy."""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # nothing of JAX before `prepare_jax`, nor of torch where fixtures are replayed
    from parity.cases.suite import Wanted
    from parity.report.report import Report

MIN_CASES = 8  # fewer are done before processes have imported what they need
MAX_WORKERS = 4  # each holds PyTorch, JAX and a case of its own: about 1 GB


def prepare_jax(device: str | None, *, eight: bool) -> None:
    """What has to be said before JAX starts: that it looks for no other device, and that a CPU is eight of them."""
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if eight:
        with contextlib.suppress(RuntimeError):  # it runs already: that reading is then skipped, with its reason
            jax.config.update("jax_num_cpu_devices", 8)


def workers_for(cases: int, device: str | None) -> int:
    """How many processes to use where nobody says: one on an accelerator, which one process takes for itself."""
    if cases < MIN_CASES or device != "cpu":
        return 1
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def examined(
    names: list[str], wanted: "Wanted", *, device: str | None, seed: int, workers: int, prepare: Callable[[], None]
) -> Iterator["Report"]:
    """The cases' reports in their order. Where a process dies, those of the cases it leaves undone say so.

    `prepare`, which must be picklable, is called in each process before JAX starts.
    """
    from parity.report.report import Report

    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start, (prepare, workers))
    try:
        pending = [pool.submit(examine_case, name, wanted, device, seed) for name in names]
        for name, future in zip(names, pending, strict=True):
            yield Report.gathered(name, map(concurrent.futures.Future.result, [future]))
    finally:
        pool.shutdown(cancel_futures=True)


def start(prepare: Callable[[], None], workers: int) -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    prepare()


def examine_case(name: str, wanted: "Wanted", device: str | None, seed: int) -> "Report":
    from parity.cases import load_cases
    from parity.cases.suite import examine

    return examine(load_cases()[name][0], name, wanted, device=device, seed=seed)
