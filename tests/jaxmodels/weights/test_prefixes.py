"""Prefixes of wrappers among names of others."""

import time

import pytest

from jaxmodels.weights.prefixes import prefix_of, removable

KNOWN = {f"layers.{i}.weight" for i in range(5000)}


def test_a_prefix_is_found_among_thousands_of_names():
    assert prefix_of([f"module.{name}" for name in KNOWN], KNOWN.__contains__) == "module."
    half = [f"module.{name}" if i % 3 else f"other{i}" for i, name in enumerate(sorted(KNOWN))]
    assert prefix_of(half, KNOWN.__contains__) == "module."
    assert prefix_of([f"other.{i}" for i in range(5000)], KNOWN.__contains__) is None


@pytest.mark.parametrize("name", ["a." * 10_000 + "weight", "a" * 10**6 + ".b" * 20, ".".join(["a" * 300] * 29)])
def test_a_name_that_would_take_minutes_has_no_prefix(name):
    began = time.process_time()
    assert removable(name, KNOWN.__contains__) is None
    assert prefix_of([f"{name}{i}" for i in range(30)], KNOWN.__contains__) is None
    assert time.process_time() - began < 5
