"""Seeds of any size."""

import pytest

from jaxmodels.process.seeds import seed_32
from train import rope


def test_small_seeds_stay_and_large_ones_are_hashed():
    assert [seed_32(seed) for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]
    large = [seed_32(2**32 + i) for i in range(50)] + [seed_32(10**30)]
    assert len(set(large)) == 51
    assert all(0 <= seed < 2**32 for seed in large)
    with pytest.raises(ValueError, match="seed=-1 "):
        seed_32(-1)


def test_a_configuration_takes_any_seed():
    config = rope.Config(seed=10**30)
    assert config.seed == seed_32(10**30)
    assert rope.Config(seed=config.seed) == config
