"""Run cases in several processes: most of a case's time is compilation, which keeps only one core busy."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported late: JAX only after `prepare_jax`, torch only in a process that needs it
    from parity.cases.suite import Selection
    from parity.report.report import Report

MIN_CASES = 8  # fewer cases finish before new processes have imported JAX and PyTorch
MAX_WORKERS = 4  # each needs about 1 GB: PyTorch, JAX and a case


def prepare_jax(device: str | None, *, eight: bool) -> None:
    """Configure JAX before its first use: only the CPU backend for device 'cpu'; `eight` CPU devices."""
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if eight:
        with contextlib.suppress(RuntimeError):  # JAX has already started: the check is then skipped, with this reason
            jax.config.update("jax_num_cpu_devices", 8)


def default_workers(cases: int, device: str | None) -> int:
    """Default number of processes; 1 on an accelerator, which only one process can use."""
    if cases < MIN_CASES or device != "cpu":
        return 1
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def examine_in_processes(
    names: Sequence[str],
    selection: "Selection",
    *,
    device: str | None,
    seed: int,
    workers: int,
    prepare: Callable[[], None],
) -> Iterator["Report"]:
    """Reports of the cases, in their order. If a process dies, the reports of its unfinished cases are errors.

    prepare: called in each process before it uses JAX; must be picklable.
    """
    from parity.report.report import Report

    # A forked process would lack JAX's threads.
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_process, (prepare, workers))
    try:
        pending = [pool.submit(examine_case, name, selection, device, seed) for name in names]
        for name, future in zip(names, pending, strict=True):
            yield Report.gathered(name, map(concurrent.futures.Future.result, [future]))
    except KeyboardInterrupt:  # a terminal sends it to all processes, `kill` to this one alone: cases take a minute
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_process(prepare: Callable[[], None], workers: int) -> None:
    """Initialize a process: PyTorch's threads are shared among all of them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and without a traceback
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    prepare()


def end_with_parent() -> None:
    """End this process when its parent has ended: one that is killed cannot shut its pool down."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def examine_case(name: str, selection: "Selection", device: str | None, seed: int) -> "Report":
    from parity.cases import load_cases
    from parity.cases.suite import examine

    return examine(load_cases()[name][0], name, selection, device=device, seed=seed)
