"""`Reference`: the unit in which cached decoding is judged without float64."""

import numpy as np
import pytest
import torch
from flax import nnx

import torch_ref.transformer
from jaxmodels.transformer import AutoregressiveTransformer
from parity.compare.comparison import Comparison
from parity.compare.decoding import decoded
from parity.compare.noise import ULPS
from parity.measure.reference import Reference

SIZES = (11, 6, 3, 7, 1, "plain")


@pytest.mark.slow
def test_decoding_is_judged_by_pytorchs_error_at_the_decoded_positions():
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 11, (29, 2))
    flax = AutoregressiveTransformer(*SIZES, rngs=nnx.Rngs(0))
    twin = torch_ref.transformer.AutoregressiveTransformer(*SIZES)
    comparison = Comparison.of(twin, flax, {"ids": ids}, float64=False)
    with comparison.strict_precision():
        exact = comparison.torch_side("float64")
        batch, kinds = comparison.evaluated(exact)
        noises = exact.noises(batch, kinds, ULPS["float64"], seed=0)
        reference, side = Reference(comparison, batch, kinds, noises), comparison.jax_side("float32")
        first, _ = decoded(side.module, batch.inputs, side.dtype)
        own = comparison.torch_side("float32").outputs(batch.inputs)
        check = reference.decoding(side, own_outputs=own)
        before = {name: output.copy() for name, output in own.items()}
        after = {name: output.copy() for name, output in own.items()}
        for name in own:
            before[name][:first] += 1  # an error of PyTorch's where nothing is decoded excuses nothing
            after[name][first:] += 1
        assert reference.decoding(side, own_outputs=before).limit == check.limit > check.value > 0
        assert reference.decoding(side, own_outputs=after).limit > check.limit
    assert first > 0
    assert (check.kind, check.precision, check.passed) == ("cached decoding", "float32", True)
