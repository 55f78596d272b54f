"""`python -m bench.accelerator`: parity, tests and timings on a GPU or TPU, in one command, written to one page.

Each part is a command of its own, in a process of its own, with a limit of time; its output goes to --folder. Parts
that ended with this commit on this device are not run again, so that a run which was cut off goes on where it was.
Parts that are not timed run beside each other on a GPU, for half of the time at most. The page has every part's
command, exit code, seconds and output, and says which parts did not run, and why.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxmodels.io.atomic import atomic_file

ROOT = Path(__file__).parents[1]
SHOWN = 120  # lines of a part's output on the page
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # processes share a GPU's memory
# Processes of the parity cases on a GPU: most of their time is compilation, for which each has a processor.
WORKERS = min(12, max(1, (os.cpu_count() or 1) - 2))


@dataclasses.dataclass(frozen=True)
class Part:
    """A command with the device in it. smoke: arguments of a short run; devices: where it can run.

    timed: it runs alone. Other parts run beside each other where processes can share the device.
    """

    title: str
    command: tuple[str, ...]
    smoke: tuple[str, ...]
    full: tuple[str, ...] = ()
    timed: bool = True
    devices: tuple[str, ...] = ("cpu", "gpu", "tpu")
    environment: tuple[tuple[str, str], ...] = ()

    def arguments(self, device: str, smoke: bool) -> list[str]:
        """Arguments of Python."""
        words = (*self.command, *(self.smoke if smoke else self.full))
        return [word.format(device=device, workers=WORKERS if device == "gpu" else 1) for word in words]


DEVICE_TESTS = (
    "test_rope.py",
    "test_attention.py",
    "test_attention_kernels.py",
    "test_cache.py",
    "test_synthesizer.py",
)
# XLA times the kernels of each product on a GPU, which takes most of the time of compiling many small programs; and
# compiles with a thread for each processor, which slows down processes beside each other.
UNTUNED = (("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_force_compilation_parallelism=2"),)
BENCHED = ("cpu", "gpu")  # PyTorch is timed beside, which has no TPUs
PARTS = (
    Part(
        "Parity of every case in float32, at the default matmul precision, and determinism",
        ("-m", "parity", "--device", "{device}", "--fast", "--workers", "{workers}"),
        ("rope.attention",),
        timed=False,
        environment=UNTUNED,
    ),
    Part(
        "Golden fixtures, without PyTorch",
        ("-m", "parity", "--device", "{device}", "--workers", "1"),
        ("feedback.own", "--replay"),
        ("--replay",),
        timed=False,
        environment=UNTUNED,
    ),
    Part(
        "Tests on the device",
        ("-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:benchmark", "-n", "{workers}"),
        ("tests/jaxmodels/test_rope.py",),
        tuple(f"tests/jaxmodels/{name}" for name in DEVICE_TESTS),
        timed=False,
        environment=(("JAX_DEFAULT_MATMUL_PRECISION", "highest"), *UNTUNED),
    ),
    Part(
        "GPT-NeoX: decoding against the memory's bandwidth",
        ("-m", "bench.neox", "--device", "{device}", "--batch", "1"),
        ("--sizes", "pythia_14m", "--prompt", "7", "--tokens", "3", "--rounds", "1", "--no-compile"),
        ("--sizes", "pythia_410m", "pythia_1_4b", "--rounds", "5"),
        devices=BENCHED,
    ),
    Part(
        "GPT-NeoX: prefill against the matmul rate",
        ("-m", "bench.neox", "--device", "{device}", "--no-compile", "--tokens", "0"),
        ("--sizes", "pythia_14m", "--batch", "1", "--prompt", "7", "--rounds", "1"),
        ("--sizes", "pythia_410m", "pythia_1_4b", "--batch", "8", "--prompt", "1024", "--rounds", "5"),
        devices=BENCHED,
    ),
    Part(
        "Feedback Transformer",
        ("-m", "bench.feedback", "--device", "{device}"),
        ("--sizes", "16x13", "--growth", "0", "--tokens", "0", "--rounds", "1"),
        ("--sizes", "128x512", "256x512", "512x128x6x64", "--growth", "1024", "--tokens", "256"),
        devices=BENCHED,
    ),
    Part(
        "RoPE language model, a training step",
        ("-m", "bench.rope", "--device", "{device}"),
        ("--sequence", "17", "--batch", "2", "--rounds", "1", "--no-compile"),
        devices=BENCHED,
    ),
    Part(
        "A training step of every script, with its memory",
        ("-m", "bench.scripts", "--device", "{device}"),
        ("rope", "--rounds", "1", "--sequence", "17", "--no-compile"),
        devices=BENCHED,
    ),
)


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.accelerator", description=__doc__)
    arguments.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="gpu", help="default: gpu")
    arguments.add_argument("--smoke", action="store_true", help="the smallest sizes: a test of this command")
    add = arguments.add_argument
    add("--only", nargs="+", default=[""], metavar="TEXT", help="run only parts with a TEXT in their title")
    add("--commit", metavar="TEXT", help="commit of this code, where it lies outside of its repository")
    add("--cases", nargs="+", default=[], metavar="CASE", help="cases of the parity part (default: all)")
    arguments.add_argument("--minutes", type=float, default=40, help="time for all parts (default 40)")
    folder = Path("runs/accelerator")
    arguments.add_argument("--folder", type=Path, default=folder, help=f"outputs of the parts (default {folder})")
    page = Path("docs/accelerator.md")
    arguments.add_argument("--page", type=Path, default=page, help=f"the page to write (default {page})")
    options = arguments.parse_args()
    if not options.minutes > 0:
        arguments.error(f"--minutes {options.minutes} must be more than 0")
    return options


def main() -> int:
    options = parse()
    machine = described(options.device)
    version = options.commit or commit()
    options.folder.mkdir(parents=True, exist_ok=True)
    seconds = 60 * options.minutes
    ends = time.monotonic() + seconds
    results: dict[int, dict[str, Any]] = {}

    def add(number: int, share: float = 1.0) -> None:
        state = {"machine": machine, "smoke": options.smoke}
        results[number] = result_of(number, state, version, options, ends - (1 - share) * seconds)
        write(options.page, page([results[key] for key in sorted(results)], machine, options))

    beside = [number for number, part in enumerate(PARTS) if not part.timed] if options.device == "gpu" else []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda number: add(number, 0.5), beside))
    for number in range(len(PARTS)):
        if number not in results:
            add(number)
    print(f"wrote {options.page}")
    return 1 if any(result["code"] for result in results.values()) else 0


def result_of(
    number: int, state: dict[str, Any], version: str, options: argparse.Namespace, ends: float
) -> dict[str, Any]:
    """Run a part, unless its result is known, it is not chosen or cannot run here, or the time is over.

    version: commit of the checkout. ends: time (`time.monotonic`) at which the last part is stopped.
    """
    part, file = PARTS[number], options.folder / f"{number}.json"
    arguments = part.arguments(options.device, options.smoke)
    arguments += options.cases if part is PARTS[0] and not options.smoke else []
    settings = [f"{name}={value}" for name, value in part.environment]
    result = {"title": part.title, "command": " ".join([*settings, "python", *arguments]), **state}
    known, left = read(file), ends - time.monotonic()
    if known is not None and any(known.get(key) != value for key, value in result.items()):
        known = None
    result["commit"] = version
    chosen = any(text in part.title for text in options.only)
    if options.device not in part.devices:
        return result | {"code": None, "why": f"not run: it has no --device {options.device}"}
    if known is not None and (not chosen or known["commit"] == version):
        print(f"{part.title}: done before, in {known['seconds']:.0f} s", flush=True)
        return known
    if not chosen:
        return result | {"code": None, "why": f"not run: --only {' '.join(options.only)}"}
    if left < 10:
        return result | {"code": None, "why": f"not run: the {options.minutes:g} minutes were over"}
    print(f"{part.title}: {result['command']}", flush=True)
    result |= run(arguments, dict(part.environment), options.device, left)
    print(f"{part.title}: exit code {result['code']}, {result['seconds']:.0f} s", flush=True)
    if not result["why"]:
        write(file, json.dumps(result))
    return result


def run(arguments: list[str], environment: dict[str, str], device: str, seconds: float) -> dict[str, Any]:
    """Exit code, seconds and output of a part; `why` if the time ran out."""
    platforms = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}[device]
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": platforms, **SHARED, "COLUMNS": "100", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    why = ""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        why = f"stopped after {seconds:.0f} s: the time was over"
    return {"code": process.returncode, "seconds": time.monotonic() - began, "output": output, "why": why}


def described(device: str) -> str:
    """Name of the device and versions, from a process of its own: JAX takes a GPU's memory."""
    program = (
        "import jax, sys; from bench.timing import stamp; print(stamp(0, sys.argv[1]).replace(', 0 threads', '', 1))"
        if device != "cpu"
        else "import os; from bench.timing import stamp; print(stamp(len(os.sched_getaffinity(0))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, device], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"python -m bench.accelerator: --device {device}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def commit() -> str:
    """The checkout's commit, with the number of uncommitted changes; "" outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.fsmonitor=false", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("diff", "--shortstat", "HEAD", "--", "jaxmodels", "parity", "torch_ref", "train", "bench")
    return f"{git('rev-parse', '--short', 'HEAD')} {changed}".strip()


def read(file: Path) -> dict[str, Any] | None:
    """The result of a part that was written before."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as new:
        new.write_text(text, encoding="utf-8")


def page(results: list[dict[str, Any]], machine: str, options: argparse.Namespace) -> str:
    """The page in Markdown."""
    kind = " These are the smallest sizes, a test of the command: the times say nothing." if options.smoke else ""
    lines = [
        "# On an accelerator",
        "",
        f"Written by `make accelerator` on {machine}.{kind}",
    ]
    for result in results:
        lines += ["", f"## {result['title']}", "", f"`{result['command']}`"]
        if result.get("why"):
            lines[-1] += f": {result['why']}."
        else:
            lines[-1] += f": exit code {result['code']}, {result['seconds']:.0f} s, commit {result['commit']}."
        output = [line.rstrip() for line in result.get("output", "").splitlines()]
        if output:
            cut = [f"({len(output) - SHOWN} lines before these)"] if len(output) > SHOWN else []
            lines += ["", "```text", *cut, *output[-SHOWN:], "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
