"""Program that trains each system for a few steps on each mesh of 8 host devices, and prints the losses.

python -m tests.train_on_meshes -> {"rope": {"": [losses of one device], "fsdp=8": [...], ...}, ...}
"""

import dataclasses
import json
import math

import jax
import numpy as np
import optax
from flax import nnx

from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.sharding import make_mesh
from jaxmodels.training.step import Numerics, Program
from jaxmodels.transformer import AutoregressiveTransformer

V, D, H, F, S, B, CHUNK = 23, 16, 4, 24, 5, 16, 2
MESHES = ["", "fsdp=8", "data=2,fsdp=2,tensor=2"]  # each takes seconds to compile
ALSO = {"rope": ["data=8", "tensor=4"], "neox": ["tensor=4"]}  # one axis alone, the others of one device
STEPS = 4


def transformer(attention: str):
    return lambda: AutoregressiveTransformer(V, D, H, F, 1, attention, max_len=S, rngs=nnx.Rngs(0))


def feedback(cls):
    return lambda: AutoregressiveModel(V, cls(D, H, F, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


def neox():
    sizes = {"n_vocab": 32, "n_hidden": D, "n_layers": 2, "n_heads": H, "n_ff": F, "rope_percentage": 0.5}
    return NeoX(NeoXConfig(**sizes, max_len=S), rngs=nnx.Rngs(0))


def retro():
    encoder = NearestNeighborEncoder(CHUNK, 1, {0}, D, H, F // H, F, rngs=nnx.Rngs(0))
    return RetroModel(V, D, 1, {0}, CHUNK, H, F // H, F, encoder, rngs=nnx.Rngs(0))


SYSTEMS = {
    "rope": transformer("rotary"),
    "relative": transformer("relative"),
    "synthesizer": transformer("random+dense+vanilla"),
    "neox": neox,
    "feedback": feedback(FeedbackTransformer),
    "feedback_kv": feedback(FeedbackTransformerKV),
    "retro": retro,
}
NEIGHBORS = {"ret": np.random.default_rng(1).integers(0, V, (B, S // CHUNK, 3, 5), np.int32)}
# accumulation and rematerialization must not depend on the mesh either
NUMERICS = {"rope": Numerics(accumulate=2, remat="layers"), "neox": Numerics(remat="layers")}


def losses(make_model, numerics: Numerics, others: dict[str, np.ndarray], meshes: list[str]) -> dict[str, list[float]]:
    """Losses by mesh; "" is one device. others: arrays of a batch besides its tokens."""
    found: dict[str, list[float]] = {sizes: [] for sizes in meshes}
    tokens = np.random.default_rng(0).integers(0, V, (STEPS, B, S + 1), np.int32)
    first = None
    for sizes in meshes:
        n_devices = math.prod(int(part.partition("=")[2]) for part in sizes.split(",") if part)
        mesh = make_mesh(sizes, jax.devices()[:n_devices])
        program = Program(make_model, optax.adam(1e-2, eps=1e-3), mesh, numerics)
        first = first or jax.device_get(program.make_state(0))  # once: compiling it takes as long as the step
        state = dataclasses.replace(first, key=jax.random.key(0))  # a key is not copied, and a step donates it
        state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, program.abstract_state()))
        step = program.lower_step({"tokens": tokens[0], **others}).compile()
        for ids in tokens:
            state, metrics = step(state, {"tokens": ids, **others}, np.zeros(mesh.size, bool))
            found[sizes].append(float(metrics.loss))
    return found


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    found = {}
    for name, make in SYSTEMS.items():
        others = NEIGHBORS if name == "retro" else {}
        found[name] = losses(make, NUMERICS.get(name, Numerics()), others, [*MESHES, *ALSO.get(name, [])])
    print(json.dumps(found))
