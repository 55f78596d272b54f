"""Shared by the tests of training: a text, the smallest model that can be trained, scripts as processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
from flax import nnx

import jaxmodels
from jaxmodels import sharding
from jaxmodels.layers import Dropout, Embed
from jaxmodels.process import distributed
from jaxmodels.training import step

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"{i} men and {i * i % 89} women went to sea [in a boat]. The end.\n" for i in range(97))

SIZES = {"d-model": 30, "heads": 3, "d-ff": 13, "n-layers": 1, "seq-len": 11, "batch-size": 4, "warmup": 5, "every": 5}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]


def without_warmup(flags: list[str]) -> list[str]:
    """Flags for a preset with a constant learning rate, for which --warmup is refused."""
    return [flag for flag in flags if not flag.startswith("--warmup=")]


def at_a_constant_rate(flags: list[str]) -> list[str]:
    """Flags of a run whose gradients are not clipped, as they may diverge."""
    return [*without_warmup(flags), "--schedule", "constant", "--clip", "None"]


# 62 windows of this many tokens, in batches that reach over the end of an epoch
V, S, B = 7, 11, 4
IDS = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, 3, 1], np.int32), 76)


@jaxmodels.register("tests.Bigrams")
class Bigrams(nnx.Module):
    """The logits of the next token depend on the current token only."""

    sequence_axis = 0

    def __init__(self, seed: int = 0, *, rngs: nnx.Rngs | None = None):
        self.src_embed = Embed(V, V, rngs=rngs or nnx.Rngs(seed))
        self.dropout = Dropout(0.3)

    def __call__(self, ids, rng=None):
        return self.dropout(self.src_embed(ids), rng)

    def config(self):
        return {}


def program(
    transformation: optax.GradientTransformation | None = None, make=Bigrams, on: str = "", **options
) -> step.Program:
    return step.Program(make, transformation or optax.adam(0.1), sharding.make_mesh(on), **options)


EIGHT_DEVICES = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
STARTED: list[subprocess.Popen] = []  # killed after a failed test by tests/conftest.py


def start(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """Start python -m … in a new process."""
    command = [sys.executable, "-m", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    given = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=given, **pipes))
    return STARTED[-1]


def start_two(module: str, *flags: object, by_variables: bool = False) -> list[subprocess.Popen]:
    """Start two processes that run one command together, and find each other by flags or by variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def process(i: int) -> subprocess.Popen:
        named = {"coordinator": address, "processes": 2, "process": i}
        found = [] if by_variables else [f"--{name}={value}" for name, value in named.items()]
        variables = {distributed.VARIABLES[name]: str(value) for name, value in named.items()} if by_variables else {}
        return start(module, *flags, "--peer-timeout", 10, *found, **variables)

    return [process(i) for i in range(2)]
