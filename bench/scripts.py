"""`python -m bench.scripts`: the training step of every script, compared with its PyTorch twin.

The Flax step is the one that the script compiles, at the sizes of a preset. PyTorch's step has the same sizes, clipping
and variant of Adam: once eager, and once with its model compiled by `torch.compile` (of a Feedback Transformer, the
function of one position: compiling all positions at once takes many minutes). All alternate in one process; prints one
line per model, with the peak of memory that XLA plans for the step. "÷ limit" is the Flax step's time by that of its
matrix products alone, if all of them were as fast as one large product.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from bench.device import add_device, compiled, synchronize, torch_device, use

N_VOCAB = 65
# Script and its --attention; "" if it has no such flag.
MODELS = [
    ("rope", "rotary"),
    ("rope", "relative"),
    ("rope_value", "rotary_value"),
    ("synthesizer", "dense"),
    ("synthesizer", "fixed_random"),
    ("synthesizer", "factorized_dense"),
    ("synthesizer", "factorized_random"),
    ("synthesizer", "random+vanilla"),
    ("feedback", ""),
    ("feedback_kv", ""),
    ("neox", ""),
    ("retro", ""),
]


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.scripts", description=__doc__)
    arguments.add_argument("models", nargs="*", metavar="SCRIPT", help="rope, feedback, … (default: all of them)")
    arguments.add_argument("--preset", default="small", help="preset of the scripts (default small)")
    arguments.add_argument("--sequence", type=int, help="tokens of a sequence (default: the preset's)")
    arguments.add_argument("--rounds", type=int, default=7, help="timed steps of each (default 7)")
    arguments.add_argument("--no-compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    add_device(arguments, threads=2)
    options = arguments.parse_args()
    unknown = sorted(set(options.models) - {script for script, _ in MODELS})
    if unknown:
        arguments.error(f"unknown SCRIPT {', '.join(unknown)}; choose from {', '.join(dict(MODELS))}")
    return options


def main() -> None:
    options = parse()
    use(options.device, options.threads)

    import numpy as np

    from bench.timing import LIMIT, stamp, with_limit
    from jaxmodels.process.allocator import keep_freed_memory
    from jaxmodels.training.experiment import experiment_class

    keep_freed_memory()  # as the scripts do; PyTorch becomes faster too
    print(stamp(options.threads, options.device))
    print(f"\nTraining steps, --preset {options.preset}")
    peers = ["eager"] if options.no_compile else ["eager", "compiled"]
    headings = "".join(f"{f'{peer} ms':>13}{'÷ Flax':>8}" for peer in peers)
    print(f"{'':28}{'batch':>12}{'Flax ms':>9}{'÷ limit':>9}{headings}{'Flax MB':>9}")
    for script, attention in MODELS:
        if options.models and script not in options.models:
            continue
        kind = experiment_class(script)
        config: Any = kind.config_class.of_preset(options.preset)
        if options.sequence:
            config = dataclasses.replace(config, seq_len=options.sequence)
        experiment = kind(dataclasses.replace(config, attention=attention) if attention else config)
        rng = np.random.default_rng(0)
        batch = {name: rng.integers(0, N_VOCAB, a.shape, np.int32) for name, a in experiment.abstract_batch().items()}
        step, peak, flops = flax_step(experiment, batch)
        others = {peer: torch_step(experiment, batch, options.device, compile=peer == "compiled") for peer in peers}
        seconds = with_limit({"Flax": step, **others}, options.rounds, flops)
        ours, limit = seconds.pop("Flax"), seconds.pop(LIMIT)
        size = f"{config.batch_size} × {config.seq_len}"
        line = f"{' '.join(filter(None, [script, attention])):28}{size:>12}{1e3 * statistics.median(ours):>9.0f}"
        line += f"{statistics.median(a / b for a, b in zip(ours, limit, strict=True)):>9.2f}"
        for times in seconds.values():
            ratio = statistics.median(a / b for a, b in zip(times, ours, strict=True))
            line += f"{1e3 * statistics.median(times):>13.0f}{ratio:>8.2f}"
        print(f"{line}{peak / 1e6:>9.0f}", flush=True)


def flax_step(experiment: Any, batch: dict[str, Any]) -> tuple[Callable[[], None], int, int]:
    """The script's training step, its peak of memory in bytes, and the operations of its matrix products."""
    import jax
    import numpy as np

    from jaxmodels.sharding import make_mesh
    from jaxmodels.training.plan.flops import of_step

    program = experiment.program(N_VOCAB, make_mesh("", jax.devices()[:1]))
    compiled = program.lower_step(batch).compile()
    state = [program.make_state(0)]
    placed = jax.device_put(batch)

    def run() -> None:
        state[0], metrics = compiled(state[0], placed, np.zeros(1, bool))
        jax.block_until_ready((state[0].params, metrics))

    return run, compiled.memory_analysis().peak_memory_in_bytes, of_step(program, batch)


def torch_step(experiment: Any, batch: dict[str, Any], device: str, *, compile: bool) -> Callable[[], None]:
    import torch

    where = torch_device(device)
    module, config = twin(experiment).to(where), experiment.config
    call = compiled(module) if compile else module
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(module.parameters(), lr=1e-4)
    tensors = {name: torch.as_tensor(array, dtype=torch.long, device=where) for name, array in batch.items()}
    inputs, targets = tensors["tokens"][:, :-1], tensors["tokens"][:, 1:]
    others = {name: tensor for name, tensor in tensors.items() if name != "tokens"}
    if experiment.model(N_VOCAB).sequence_axis == 0:
        inputs, targets = inputs.T.contiguous(), targets.T.contiguous()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = call(inputs, **others)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
        synchronize(device)

    return run


def twin(experiment: Any) -> Any:
    """Build the PyTorch module of the same class and sizes; a Feedback Transformer in the original's stack form."""
    from torch_ref import feedback, feedback_stack, neox, retro, transformer

    model = experiment.model(N_VOCAB)
    name = type(model).__name__
    if name == "NeoX":
        return neox.NeoX(model.settings)
    sizes = model.config()
    if name == "AutoregressiveTransformer":
        return transformer.AutoregressiveTransformer(**sizes)
    if name == "RetroModel":
        return retro.RetroModel(**sizes | {"encoder": retro.NearestNeighborEncoder(**sizes["encoder"])})
    home = feedback_stack if sizes["variant"] == "FeedbackTransformerKV" and sizes["memory"] is None else feedback
    kind = getattr(home, sizes["variant"])
    names = ("d_model", "heads", "d_ff", "n_layers", "dropout_prob")
    return feedback.AutoregressiveModel(N_VOCAB, kind(*(sizes[name] for name in names)))


if __name__ == "__main__":
    main()
