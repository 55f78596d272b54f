"""`python -m bench.maxtext --python ENV/bin/python`: peak memory of MaxText's training step, for docs/plans.md.

Compiles MaxText ahead of time for TPU topologies, without a TPU, with the sizes of Pythia-70M and GPT-NeoX-20B, and
appends one JSON line per step to runs/plans/maxtext.jsonl, which `make plans` puts beside this project's. Steps that
are there already are not compiled again. ENV is an environment of Python 3.12 outside of this repository:

    python3.12 -m venv ENV
    ENV/bin/pip install --no-deps maxtext==0.2.5 cloud-accelerator-diagnostics ml-goodput-measurement
    ENV/bin/pip install 'jax[tpu]==0.11.1' 'flax>=0.12.9' optax orbax-checkpoint grain aqtp drjax jaxtyping omegaconf \\
        pydantic ml-collections qwix pathwaysutils absl-py numpy datasets transformers sentencepiece tensorboardx \\
        jsonlines pillow psutil jinja2 tiktoken chex scipy protobuf tokamax sympy tokenizers torch
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from jaxmodels.io.atomic import atomic_file

STORE = Path("runs/plans/maxtext.jsonl")
# Settings of all steps: AdamW, float32 parameters, bfloat16 computation, layers rematerialized, splash attention.
COMMON = [
    *("hardware=tpu", "compile_topology_num_slices=1", "decoder_block=gpt3", "mlp_activations=['gelu']"),
    *("fused_qkv=true", "logits_via_embedding=false", "opt_type=adamw", "weight_dtype=float32", "dtype=bfloat16"),
    *("scan_layers=true", "remat_policy=full", "attention=flash", "max_target_length=2048", "vocab_size=50432"),
    *("num_vocab_tiling=8", "use_iota_embed=true", "dataset_type=synthetic", "enable_checkpointing=false"),
    "skip_jax_distributed_system=true",
]
# features, heads, features per head, hidden features, layers
SIZES = {"pythia_70m": (512, 8, 64, 2048, 6), "neox_20b": (6144, 64, 96, 24576, 44)}
NAMES = ("base_emb_dim", "base_num_query_heads", "head_dim", "base_mlp_dim", "base_num_decoder_layers")
# (size, MaxText's name of the topology, this project's, mesh, sequences per chip)
STEPS = [
    ("pythia_70m", "v5e-4", "v5e:2x2", "fsdp=4", 4),
    ("neox_20b", "v5e-32", "v5e:4x8", "fsdp=32", 1),
    ("neox_20b", "v5e-256", "v5e:16x16", "fsdp=32,tensor=8", 1),
    ("neox_20b", "v5p-8", "v5p:2x2x1", "fsdp=4", 1),
    ("neox_20b", "v5e-64", "v5e:8x8", "fsdp=64", 1),
    ("neox_20b", "v5e-32", "v5e:4x8", "fsdp=32", 2),
]
# Runs in MaxText's environment: its compile script prints sizes but not the peak.
WRAPPER = """
import json, runpy, sys
import jax
analysis = jax.stages.Compiled.memory_analysis
def printed(self):
    found = analysis(self)
    sizes = {"peak": found.peak_memory_in_bytes, "arguments": found.argument_size_in_bytes}
    print("PEAK", json.dumps(sizes), flush=True)
    return found
jax.stages.Compiled.memory_analysis = printed
runpy.run_module("maxtext.trainers.pre_train.train_compile", run_name="__main__", alter_sys=True)
"""


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(prog="python -m bench.maxtext", description=__doc__)
    add = arguments.add_argument
    add("--python", default="python3.12", metavar="FILE", help="interpreter of MaxText's environment")
    add("--only", default="", metavar="TEXT", help="only steps whose size, topology and mesh contain TEXT")
    return arguments.parse_args()


def flags(size: str, accelerator: str, mesh: str, per_chip: int) -> list[str]:
    """MaxText's flags of a step."""
    sizes = dict(zip(NAMES, SIZES[size], strict=True))
    sizes["base_num_kv_heads"] = sizes["base_num_query_heads"]
    axes = [f"ici_{axis}_parallelism={n}" for axis, n in re.findall(r"(\w+)=(\d+)", mesh)]
    axes += ["allow_split_physical_axes=true"] if len(axes) > 1 else []  # 8 chips of a row of 16
    chips = [f"compile_topology={accelerator}", f"per_device_batch_size={per_chip}"]
    return [*chips, *axes, *(f"{name}={value}" for name, value in sizes.items())]


def compiled(python: str, own: list[str]) -> dict[str, Any]:
    """Peak and size of the arguments in bytes, or the compiler's refusal; raises ValueError without either."""
    place = [python, "-c", "import maxtext; print(list(maxtext.__path__)[0])"]
    found = subprocess.run(place, capture_output=True, text=True, check=True)
    config = Path(found.stdout.split()[-1]) / "configs" / "base.yml"
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_ID": "0",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "DECOUPLE_GCLOUD": "TRUE",
        }
        environment.pop("PYTHONPATH", None)
        run = subprocess.run(
            [python, "-c", WRAPPER, str(config), *COMMON, *own, f"base_output_directory={folder}", "run_name=plan"],
            capture_output=True,
            text=True,
            env=environment,
            cwd=folder,
        )
    text = run.stdout + run.stderr
    if peak := re.search(r"^PEAK (\{.*\})$", text, re.M):
        return json.loads(peak[1])
    if used := re.search(r"RESOURCE_EXHAUSTED.*", text):
        return {"refused": used[0][:300]}
    raise ValueError("MaxText printed no memory analysis: " + "\n".join(text.splitlines()[-15:]))


def main() -> None:
    options = parse()
    lines = STORE.read_text().splitlines() if STORE.exists() else []
    for size, accelerator, topology, mesh, per_chip in STEPS:
        key = f"{size} {topology} {mesh} {per_chip}"
        if options.only not in key or any(json.loads(line)["key"] == key for line in lines):
            continue
        own = flags(size, accelerator, mesh, per_chip)
        print(f"{key} …", flush=True)
        try:
            result = compiled(options.python, own)
        except ValueError as error:
            print(error, flush=True)
            continue
        lines.append(json.dumps({"key": key, "flags": own, **result}))
        STORE.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(STORE) as file:
            file.write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)
    print(f"{len(lines)} steps in {STORE}")


if __name__ == "__main__":
    main()
