"""One pair in every floating dtype: what PyTorch itself loses there is the yardstick for what Flax loses.

The truth of a dtype is PyTorch in float64 with the weights and inputs that dtype can hold: rounding them is no error of
computing. The worst tensor of Flax is held to the worst of PyTorch: in 16 bits a single bias's gradient is off by where
its sum was rounded, which each library does elsewhere. A language model is also judged by its distributions: KL(truth ‖
model) and the best tokens.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from jaxmodels.weights.names import as_numpy
from parity.compare import jax_side, torch_side
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs, random_targets
from parity.compare.jax_side import FlaxSide
from parity.compare.names import Names, weights_of
from parity.compare.torch_side import TorchSide
from parity.locate.store import DEFAULT_LIMIT, check_limit
from parity.locate.tree import Part, plain
from parity.measure import limits
from parity.report.report import Check, Report, environment

DTYPES = ("float64", "float32", "bfloat16", "float16")
KINDS = ("output", "parameter gradients")
TOP = 5
ROWS = 1024  # distributions at once: 50,000 tokens in float64 are 0.4 MB each


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How near distributions are to the true ones: KL(truth ‖ model) in nats, and the share of positions whose best
    token, of tokens among the TOP best, that are the same."""

    kl_mean: float
    kl_max: float
    top_1: float
    top_k: float

    @classmethod
    def of(cls, logits: np.ndarray, truth: np.ndarray) -> "Agreement":
        """Over the last axis, whole; a part of the positions at a time."""
        ours, theirs = (a.reshape(-1, a.shape[-1]) for a in (logits, truth))
        k = min(TOP, truth.shape[-1])
        kl, same, shared = [], 0, 0
        for i in range(0, len(theirs), ROWS):
            p, q = (log_softmax(a[i : i + ROWS].astype(np.float64)) for a in (theirs, ours))
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
            best = [np.argpartition(a, -k, axis=-1)[:, -k:] for a in (p, q)]
            shared += sum(len(np.intersect1d(a, b)) for a, b in zip(*best, strict=True))
        found = np.maximum(np.concatenate(kl), 0.0)  # rounding can leave -1e-17
        return cls(float(found.mean()), float(found.max()), same / len(theirs), shared / (k * len(theirs)))


@dataclasses.dataclass(frozen=True)
class Row:
    """One dtype: the worst errors of Flax and of PyTorch by kind, agreements of a language model, the traced parts."""

    dtype: str
    errors: dict[str, tuple[float, float]]  # Flax's, PyTorch's
    flax_agreement: Agreement | None
    torch_agreement: Agreement | None
    parts: Part | None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All dtypes of one pair; `checks` holds Flax to PyTorch's own error."""

    rows: list[Row]
    checks: list[Check]
    seconds: float
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def report(self, name: str) -> Report:
        """This alone, for `parity.Report.of`."""
        return Report(name, self.checks, None, self.seconds, self.environment, sweep=self)

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities are strings."""
        return plain({"rows": [dataclasses.asdict(row) for row in self.rows]})

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            for kind, (ours, theirs) in row.errors.items():
                lines.append(f"  {row.dtype:9} {kind:20} Flax {ours:.1e}, PyTorch {theirs:.1e}")
            for side, agreement in (("Flax", row.flax_agreement), ("PyTorch", row.torch_agreement)):
                if agreement is not None:
                    lines.append(
                        f"  {row.dtype:9} {side:20} KL {agreement.kl_mean:.1e}, at most {agreement.kl_max:.1e}; "
                        f"best token {agreement.top_1:.2%}, best {TOP} {agreement.top_k:.2%}"
                    )
        return "\n".join(lines)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def sweep(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    dtypes: Sequence[str] = DTYPES,
    layers: bool = True,
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    device: str | None = None,
    randomize: bool = True,
    seed: int = 0,
    memory_limit: int = DEFAULT_LIMIT,
    progress: Callable[[str], None] = lambda dtype: None,
) -> Sweep:
    """Outputs and parameter gradients of both sides in every dtype, each against the float64 truth of that dtype.

    `layers` traces every sub-module in each dtype as well. With labels, a single output counts as logits over the whole
    vocabulary. The other arguments are those of `parity.check`. Raises ValueError for a dtype that is not in DTYPES and
    for a negative memory_limit.
    """
    check_limit(memory_limit)
    began = time.perf_counter()
    if set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes={list(dtypes)} must be among {', '.join(DTYPES)}")
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    chosen = jax.devices(device)[0]
    if chosen.platform == "tpu":
        dtypes = [dtype for dtype in dtypes if dtype != "float64"]
    flax_module = as_module(flax_module, inputs, channels_last)
    weights = weights_of(module, flax_module, names)
    rows, checks = [], []
    for name in dtypes:
        progress(name)
        with torch_side.strict_precision(), jax_side.strict_precision(name == "float64", chosen):
            dtype = getattr(torch, name)
            rounded = inputs.rounded(as_numpy(torch.empty(0, dtype=dtype)).dtype)
            theirs = TorchSide(module, dtype, "cpu")
            truth = TorchSide(theirs.module, torch.float64, "cpu")
            state = theirs.module.state_dict()
            ours = FlaxSide(flax_module, state, rounded, jnp.dtype(name), weights, channels_last)
            targets = random_targets(truth.outputs(rounded), seed)
            arguments = (rounded, labels, targets)
            right, own, result = (side.evaluate(*arguments) for side in (truth, theirs, ours))
            found = {}
            for kind in KINDS:
                if kind not in right:
                    continue
                frozen = result[kind].keys() - right[kind].keys() if kind != "output" else set()
                held = {key: tensor for key, tensor in result[kind].items() if key not in frozen}
                where, value = limits.worst(limits.errors(held, right[kind]))
                found[kind] = value, limits.worst(limits.errors(own[kind], right[kind]))[1]
                if name != "float64":
                    value /= found[kind][1] + limits.RATIO_FLOOR
                limit = limits.FLOAT64_LIMIT if name == "float64" else limits.RATIO_LIMIT
                checks.append(Check(f"sweep: {kind}", name, where, value, limit))
            agreement = yardstick = None
            if labels is not None and len(right["output"]) == 1:
                ((key, logits),) = right["output"].items()
                agreement, yardstick = (Agreement.of(side["output"][key], logits) for side in (result, own))
                checks.append(divergence_check(name, agreement, yardstick))
            parts = traced(truth, ours, rounded, chosen, memory_limit) if layers else None
            rows.append(Row(name, found, agreement, yardstick, parts))
    stamp = environment(chosen, chosen.platform != "tpu", seed)
    return Sweep(rows, checks, time.perf_counter() - began, stamp)


def divergence_check(name: str, ours: Agreement, theirs: Agreement) -> Check:
    """√KL grows as the error of logits does (KL ≈ half its variance): so it has the same limits."""
    value, own = (float(np.sqrt(agreement.kl_mean)) for agreement in (ours, theirs))
    if name == "float64":
        return Check("sweep: √KL", name, "logits", value, 1e-7)  # KL itself is rounded at 1e-16
    return Check("sweep: √KL", name, "logits", value / (own + limits.RATIO_FLOOR), limits.RATIO_LIMIT)


def traced(truth: TorchSide, side: FlaxSide, inputs: Inputs, device: jax.Device, memory_limit: int) -> Part | None:
    """The errors of every sub-module's outputs; None on a device, where only whole programs are run."""
    from parity.locate.trace import trace

    if device.platform != "cpu":
        return None
    return trace(truth, side, inputs, memory_limit=memory_limit).forward


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the device's default precision costs in float32: errors against the truth, of the worst tensor."""

    kind: str
    worst: str
    strict: float
    default: float
    torch: float

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.default:.1e} at the default precision, {self.strict:.1e} at the highest, "
            f"{self.torch:.1e} in PyTorch's float32; worst at {self.worst}"
        )


@dataclasses.dataclass(frozen=True)
class FastPath:
    """What the default precision costs, which has no limit, and how far apart two runs of two compilations are."""

    costs: list[Cost]
    checks: list[Check]
    seconds: float
    environment: dict[str, str]

    def report(self, name: str) -> Report:
        """This alone, for `parity.Report.of`."""
        return Report(name, self.checks, None, self.seconds, self.environment, costs=tuple(self.costs))


def fast_path(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    device: str | None = None,
    matmul_precision: str | None = None,
    randomize: bool = True,
    seed: int = 0,
) -> FastPath:
    """A second pass as users run it: matmuls at the device's default precision (TF32, bfloat16), and twice.

    matmul_precision names another precision of `jax.default_matmul_precision` to be the fast one. The checks are of
    determinism: 0 where every bit is equal.
    """
    began = time.perf_counter()
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    chosen = jax.devices(device)[0]
    flax_module = as_module(flax_module, inputs, channels_last)
    weights = weights_of(module, flax_module, names)
    with torch_side.strict_precision():
        truth_side, own_side = (TorchSide(module, dtype, "cpu") for dtype in (torch.float64, torch.float32))
        targets = random_targets(truth_side.outputs(inputs), seed)
        arguments = (inputs, labels, targets)
        truth, own = truth_side.evaluate(*arguments), own_side.evaluate(*arguments)
    state = own_side.module.state_dict()

    def run(precision: str | None) -> dict[str, dict[str, np.ndarray]]:
        with default_precision(precision, chosen):  # a new side: a new compilation
            side = FlaxSide(flax_module, state, inputs, jnp.float32, weights, channels_last)
            return side.evaluate(*arguments)

    strict, fast, again = run("highest"), run(matmul_precision), run(matmul_precision)
    costs, checks = [], []
    for kind, tensors in truth.items():
        pairs = [{key: a for key, a in side[kind].items() if key in tensors} for side in (strict, fast, again)]
        name, default = limits.worst(limits.errors(pairs[1], tensors))
        others = [limits.worst(limits.errors(side, tensors))[1] for side in (pairs[0], own[kind])]
        costs.append(Cost(kind, name, others[0], default, others[1]))
        apart = limits.worst(limits.errors(pairs[2], {key: a.astype(np.float64) for key, a in pairs[1].items()}))
        checks.append(Check(f"two runs: {kind}", "float32", *apart, np.inf))
    stamp = environment(chosen, chosen.platform != "tpu", seed)
    return FastPath(costs, checks, time.perf_counter() - began, stamp)


@contextlib.contextmanager
def default_precision(precision: str | None, device: jax.Device) -> Iterator[None]:
    """Float32 at a matmul precision (None: the device's default) on a device, while it is open."""
    with jax.enable_x64(False), jax.default_matmul_precision(precision), jax.default_device(device):
        yield
