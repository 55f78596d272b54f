"""Memory of a conversion and of a sharded load, measured in processes of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jaxmodels.convert.hf import write_hf
from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.convert.operations import largest_layer
from jaxmodels.neox import NeoXConfig
from jaxmodels.weights.lazy import read
from jaxmodels.weights.names import as_tensor
from tests.jaxmodels.convert.originals import write

ROOT = Path(__file__).parents[4]
CONFIG = NeoXConfig(n_vocab=7_000, n_hidden=960, n_layers=8, n_heads=12)  # blocks of 22 MB, 204 MB in all

# Follows RssAnon from a thread; numpy and torch give up the interpreter's lock while they copy and write.
WATCH = """
import json, re, sys, threading, time
from pathlib import Path

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Watch(threading.Thread):
    peak = 0
    def run(self):
        while True:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)
"""

CONVERT = """
import jax, torch
from jaxmodels.convert.command import main
from jaxmodels.convert import operations
from jaxmodels.convert.source import abstract
from jaxmodels.neox import NeoXConfig

jax.device_put(1.0).block_until_ready()
abstract(NeoXConfig.pythia_14m())  # what JAX allocates once and for all
watch = Watch(daemon=True)
start = anonymous()
watch.start()
assert main(sys.argv[1:]) == 0
print(json.dumps({"peak": watch.peak - start}))
"""

LOAD = """
import jax, torch
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxmodels.convert.neox import load_neox
from jaxmodels.convert.source import abstract
from jaxmodels.neox import NeoXConfig

mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
asked = []

def shardings(path, shape):
    asked.append(path)
    spec = P(*[None] * (len(shape) - 1), "x") if shape[-1] % 4 == 0 else P()
    return NamedSharding(mesh, spec)

jax.device_put(1.0).block_until_ready()
abstract(NeoXConfig.pythia_14m())  # what JAX allocates once and for all
watch = Watch(daemon=True)
start = anonymous()
watch.start()
model = load_neox(sys.argv[1], shardings=shardings)
arrays = jax.tree.leaves(model)
kernel = model.layers.ffn.dense_h_h4.kernel[...]
print(json.dumps({
    "peak": watch.peak - start,
    "shards": [list(shard.data.shape) for shard in kernel.addressable_shards],
    "bytes": sum(array.nbytes for array in arrays),
    "slice": max(array.addressable_shards[0].data.nbytes for array in arrays),
    "sum": float(abs(kernel.astype("float32")).sum()),
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    state = write(folder, 2, CONFIG)
    return folder, state


def measured(program, *arguments, env=None):
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is read from /proc, which this system has not")
    command = [sys.executable, "-c", WATCH + program, *map(str, arguments)]
    variables = {"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | (env or {})
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("to", [["flax"], ["hf"], ["neox", "--model-parallel", "1"], ["neox", "--model-parallel", "4"]])
def test_a_conversion_keeps_less_than_three_layers(checkpoint, tmp_path, to):
    folder, _ = checkpoint
    layer = largest_layer(open_neox(folder))
    found = measured(CONVERT, "neox", folder, tmp_path / "out", "--to", *to)
    assert 0 < found["peak"] < 3 * layer


@pytest.mark.slow
@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("to", [["flax"], ["hf"], ["neox", "--model-parallel", "4"]])
def test_a_pytorch_file_is_mapped(checkpoint, tmp_path, to, zip_file):
    """As from shards; reading the file would take 204 MB. Pieces in flight, of fixed size, take about 35 MB."""
    folder, _ = checkpoint
    source = open_neox(folder)
    write_hf(source, tmp_path / "hf")
    state = {hf_name(key): as_tensor(read(tensor)) for key, tensor in source.tensors.items()}
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin", _use_new_zipfile_serialization=zip_file)
    found = measured(CONVERT, "neox", tmp_path / "hf", tmp_path / "out", "--to", *to)
    assert 0 < found["peak"] < 3 * largest_layer(source)


@pytest.mark.slow
def test_no_host_holds_the_whole(checkpoint):
    """Four devices, all of them this host's memory: what is on them, and one device's slice of one array, no more."""
    folder, state = checkpoint
    found = measured(LOAD, folder, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4"})
    total = sum(tensor.nbytes for tensor in state.values())
    assert found["bytes"] == total
    assert found["shards"] == [[8, 960, 960]] * 4
    assert found["slice"] * 12 < total
    assert found["peak"] < total + found["slice"]
    expected = sum(float(state[f"layers.{i}.ffn.dense_h_h4.weight"].double().abs().sum()) for i in range(8))
    assert found["sum"] == pytest.approx(expected, rel=1e-4)
