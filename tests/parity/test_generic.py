"""The harness is generic: only the project's cases and checkpoints of its models name a class of its systems."""

import inspect
import re
from pathlib import Path

import pytest
from flax import nnx

import parity
from jaxmodels import feedback, neox, retro, rope, synthesizer, transformer

OTHERS = {"Encoder", "Generator"}  # names that PyTorch and NumPy use too
SYSTEMS = (feedback, neox, retro, rope, synthesizer, transformer)
CLASSES = {
    name
    for system in SYSTEMS
    for name, cls in vars(system).items()
    if inspect.isclass(cls) and issubclass(cls, nnx.Module) and cls.__module__.startswith(system.__name__)
} - OTHERS
ROOT = Path(parity.__file__).parent
OWN = {"cases", "checkpoint"}
FILES = [file.relative_to(ROOT) for file in sorted(ROOT.rglob("*.py")) if not OWN & {*file.relative_to(ROOT).parts}]


def test_the_classes_of_all_systems_are_known():
    assert {"NeoX", "RetroModel", "AutoregressiveTransformer", "AutoregressiveModel", "SynthesizerAttention"} <= CLASSES


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_file_names_a_class_of_a_system(file):
    words = set(re.findall(r"\w+", (ROOT / file).read_text(encoding="utf-8")))
    assert not words & (CLASSES | {"RETRO"})
