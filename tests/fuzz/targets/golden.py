"""Recorded results of PyTorch, and files that `parity` reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.targets.files import make_pt, make_safetensors
from tests.fuzz.targets.kind import Target
from tests.fuzz.targets.models import make_bins, make_hf
from tests.fuzz.targets.resumed import temporary_in
from tests.fuzz.targets.texts import make_settings, read_settings


def make_fixture(folder: Path) -> None:
    import torch
    from flax import nnx

    import parity
    import torch_ref.transformer
    from jaxmodels.transformer import AutoregressiveTransformer

    model = nnx.eval_shape(lambda: AutoregressiveTransformer(7, 4, 2, 5, 1, rngs=nnx.Rngs(0)))
    torch.manual_seed(0)
    twin = torch_ref.transformer.AutoregressiveTransformer(7, 4, 2, 5, 1)
    parity.record(twin, {"x": np.ones((2, 3), np.int64)}, folder / "one", flax_module=model)


def read_fixture(folder: Path) -> Any:
    from jaxmodels.io.bounded import errors_naming
    from parity.golden.fixture import read
    from parity.golden.replay import rebuilt

    fixture = read(folder / "one")
    with errors_naming(folder / "one"):  # as `replay` does
        model = rebuilt(fixture)
    return model, list(fixture.named_parameters()), [fixture.get_submodule(path) for path in fixture.layers]


def seal(folder: Path) -> None:
    """Write the checksum of the changed tensors to the JSON, so that their content is reached."""
    from jaxmodels.io.bounded import read_object, sha256_of

    about = read_object(folder / "one.json")
    about["sha256"] = sha256_of(folder / "one.safetensors", 10**6)
    (folder / "one.json").write_text(json.dumps(about))


def make_entry(folder: Path) -> None:
    """A checkpoint with the weights in its only state_dict."""
    import torch

    tensors = {"a": torch.arange(15.0).view(3, 5), "b": torch.nn.Parameter(torch.ones(3))}
    torch.save({"state_dict": tensors, "epoch": 7}, folder / "model.pt")


def make_state(folder: Path) -> None:
    from parity.mutation.state import State
    from parity.report.results import Check

    readings = [(s, Check("output", p, "output", 0.3, 32.0)) for s in range(3) for p in ("float64", "float32")]
    with State.opened(folder / "state.jsonl") as state:
        state.add("one", None)
        state.add_alarms("rope", 3, readings)
        state.add("two", None)


def read_state(folder: Path) -> Any:
    """Opened for appending, so that the folder may change."""
    from parity.mutation.state import State

    with State.opened(folder / "state.jsonl") as state:
        return state.rows, state.alarms


def verify(name: str) -> Any:
    """Reader by `parity verify`, against the example."""

    def read(folder: Path) -> None:
        from parity.checkpoint.opened import opened

        found = opened(folder / name)
        for tensor in found.tensors.values():
            np.asarray(tensor)

    return read


def read_by_transformers(folder: Path) -> None:
    """As `parity verify --numerics` loads the first checkpoint; links to its weights are made in a temporary folder."""
    from parity.checkpoint.opened import opened
    from parity.checkpoint.reference import reference

    with temporary_in(folder.with_name("out")):
        found = opened(folder)
        reference(found.of_model(found.model, found.config))


TARGETS = (
    Target("fixture", make_fixture, read_fixture, seal=seal),
    Target("fixture's tensors", make_fixture, read_fixture, "*.safetensors", seal=seal),
    Target("fixture's JSON", make_fixture, read_fixture, "*.json"),
    Target("mutation state", make_state, read_state, changes=True),
    Target("settings", make_settings, read_settings),
    Target("parity, pt", make_pt, verify("model.pt")),
    Target("parity, pt with an entry", make_entry, verify("model.pt")),
    Target("parity, safetensors", make_safetensors, verify("model.safetensors")),
    Target("parity, Hugging Face", make_hf, verify(".")),
    Target("parity, transformers", make_hf, read_by_transformers, "*config.json"),
    Target("parity, transformers, .bin", make_bins, read_by_transformers),
)
