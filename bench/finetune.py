"""`python -m bench.finetune`: a fine-tuning step of all weights, of a LoRA adapter, and of the biases.

Each is compiled as `python -m train.neox --preset finetune` compiles it, for one random checkpoint in float16, and the
steps alternate in one process. A LoRA step computes no gradients of the base's weights and must not be slower than one
of all weights. "whole logits" computes the cross-entropy at once instead of in chunks. Memory: the state (weights,
moments) and what the compiled step allocates besides.

--transformers compares with transformers' model of the same sizes in float32, eager, with torch's clipping and AdamW:

    python -m bench.finetune --batch 8 --length 256 --dtype float32 --kinds "all weights" "whole logits" --transformers

--memory takes the steps of each once more in a process of its own, and prints how much its memory grows by them.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported by `main` once the processors are set
    import numpy as np

PRESETS = ("pythia_14m", "pythia_31m", "pythia_70m", "pythia_160m")
KINDS = ("all weights", "whole logits", "LoRA", "LoRA on all maps", "biases")


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__)
    add = arguments.add_argument
    add("--model", choices=PRESETS, default="pythia_70m", help="sizes of the model (default pythia_70m)")
    add("--batch", type=int, default=4, help="sequences of a step (default 4)")
    add("--length", type=int, default=128, help="tokens of a sequence (default 128)")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the checkpoint (float16)")
    add("--rank", type=int, default=8, help="rank of the adapter (default 8)")
    add("--kinds", nargs="*", choices=KINDS, default=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)} (all)")
    add("--transformers", action="store_true", help="also a step of transformers' model in PyTorch")
    add("--memory", action="store_true", help="also the peak memory of each, in processes of their own")
    add("--alone", action="store_true", help=argparse.SUPPRESS)  # print the growth of memory only
    add("--rounds", type=int, default=9, help="timed rounds of each (default 9)")
    add("--steps", type=int, default=3, help="steps of a round (default 3)")
    add("--threads", type=int, default=2, help="CPU threads (default 2)")
    return arguments.parse_args()


def main() -> None:
    options = parse()
    if hasattr(os, "sched_setaffinity"):  # XLA sizes its thread pool once, at start
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

    import jax
    import numpy as np
    from flax import nnx

    import jaxmodels
    from bench.timing import alternate, report, stamp, with_limit
    from jaxmodels.models import cast
    from jaxmodels.neox import NeoX
    from jaxmodels.neox.config import PRESETS
    from jaxmodels.neox.lora import TARGETS
    from jaxmodels.process.allocator import keep_freed_memory
    from jaxmodels.sharding import make_mesh
    from jaxmodels.text import ByteVocabulary
    from jaxmodels.training.plan.flops import of_step
    from jaxmodels.weights.names import flat_arrays
    from train import neox

    keep_freed_memory()
    if options.transformers:
        import transformers.models.gpt_neox  # noqa: F401  before its memory is measured
    before = memory_of("VmRSS")
    sizes = PRESETS[options.model]()
    kinds: dict[str, dict[str, Any]] = {
        "all weights": {},
        "whole logits": {"loss_chunk": options.batch * options.length},
        "LoRA": {"tune": "lora", "lora_rank": options.rank},
        "LoRA on all maps": {"tune": "lora", "lora_rank": options.rank, "lora_targets": tuple(TARGETS)},
        "biases": {"tune": "biases"},
    }
    shape = (options.batch, options.length + 1)
    tokens = np.random.default_rng(0).integers(0, sizes.n_vocab, shape, np.int32)
    steps: dict[str, Callable[[], object]] = {}
    memory: dict[str, tuple[int, int, int]] = {}
    flops: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder) / "model")
        if options.kinds:
            model = NeoX(sizes, rngs=nnx.Rngs(0))
            jaxmodels.save(cast(model, flat_arrays(model), options.dtype), checkpoint)
            del model
        for name in options.kinds:
            fields = kinds[name]
            config = neox.Config(checkpoint=checkpoint, seq_len=options.length, batch_size=options.batch, **fields)
            experiment = neox.Neox(config)
            program = experiment.program(sizes.n_vocab, make_mesh())
            compiled = program.lower_step({"tokens": tokens}).compile()
            state = experiment.initial(program, ByteVocabulary())
            held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.fixed, state.optimizer)))
            analysis: Any = compiled.memory_analysis()
            flops.append(options.steps * of_step(program, {"tokens": tokens}))
            memory[name] = program.parameters, held, analysis.temp_size_in_bytes
            states = [state]
            del state

            def run(compiled: Any = compiled, states: list[Any] = states) -> None:
                for _ in range(options.steps):
                    states[0], last = compiled(states[0], {"tokens": tokens}, np.zeros(1, bool))
                jax.block_until_ready(last)

            steps[name] = run
        if options.transformers:
            steps["transformers"] = torch_steps(sizes, tokens, options)
    if options.alone:
        for step in steps.values():
            step()
        print(memory_of("VmHWM") - before)
        return
    print(stamp(options.threads))
    # The products of the first kind's steps, which are those of transformers'.
    seconds = with_limit(steps, options.rounds, flops[0]) if flops else alternate(steps, options.rounds)
    title = f"{options.steps} steps, {options.model} in {options.dtype}, batch {options.batch} × {options.length}"
    report(title, seconds, against=next(iter(steps)))
    for name, (parameters, held, allocated) in memory.items():
        sizes_of = f"state {held / 1e6:7.1f} MB, step {allocated / 1e6:7.1f} MB"
        print(f"{name:17} {parameters:12,} trained parameters, {sizes_of}")
    if options.memory:
        for name in steps:
            print(f"{name:17} memory grows by {grown(name) / 1e6:5.0f} MB")


def grown(name: str) -> int:
    """Bytes by which the memory of a process grows that takes the steps of one kind, beyond its imports."""
    arguments = [a for a in sys.argv[1:] if a not in ("--transformers", "--memory")]
    if "--kinds" in arguments:
        first = arguments.index("--kinds")
        rest = [a for a in arguments[first + 1 :] if a not in KINDS]
        arguments = [*arguments[:first], *rest]
    chosen = ["--transformers", "--kinds"] if name == "transformers" else ["--kinds", name]
    command = [sys.executable, "-m", "bench.finetune", *arguments, "--alone", *chosen]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def memory_of(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", text)[1])  # type: ignore[index]


def torch_steps(sizes: Any, tokens: "np.ndarray", options: argparse.Namespace) -> Callable[[], None]:
    """Function that takes options.steps steps with transformers' model of the same sizes, in float32."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from jaxmodels.convert.hf.config import hf_config

    torch.set_num_threads(options.threads)
    model = GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(hf_config(sizes, "float32", {})))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.as_tensor(tokens, dtype=torch.long)

    def run() -> None:
        for _ in range(options.steps):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


if __name__ == "__main__":
    main()
