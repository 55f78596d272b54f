"""NeoXConfig: presets, parameter counts, defaults, validation."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.config import PRESETS
from jaxmodels.weights.names import flat_arrays, to_torch
from tests.jaxmodels.neox.common import CONFIG, FORMS

# Published counts: EleutherAI's for Pythia (arXiv 2304.01373, table 1) and 20B's own.
PARAMETERS = {
    "pythia_14m": 14_067_712,
    "pythia_31m": 30_494_720,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "pythia_6_9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
    "neox_20b": 20_554_567_680,
}


def size(config: NeoXConfig) -> int:
    """Numbers in the arrays that a model would have; nothing is allocated."""
    model = nnx.eval_shape(lambda: NeoX(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(array.shape) for array in flat_arrays(model).values())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    config = PRESETS[name]()
    assert config == getattr(NeoXConfig, name)()
    assert config.parameters() == PARAMETERS[name] == size(config)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_parameters_and_tensors_count_the_arrays_of_every_form(form):
    config = dataclasses.replace(CONFIG, **FORMS[form])
    assert config.parameters() == size(config)
    assert config.tensors() == len(to_torch(NeoX(config, rngs=nnx.Rngs(0))))


def test_the_defaults_are_20b_with_the_exact_gelu():
    assert dataclasses.replace(NeoXConfig(), activation="gelu_tanh") == NeoXConfig.neox_20b()
    assert (NeoXConfig().d_k, NeoXConfig().d_rope, NeoXConfig().d_ff) == (96, 24, 24_576)
    assert dataclasses.replace(NeoXConfig(), n_ff=7).d_ff == 7


def test_the_usual_width_is_the_same_configuration_said_or_not():
    said = dataclasses.replace(CONFIG, n_ff=4 * CONFIG.n_hidden)
    assert said == dataclasses.replace(CONFIG, n_ff=None)
    assert (said.n_ff, said.d_ff) == (None, 4 * CONFIG.n_hidden)


def test_as_many_heads_of_keys_as_of_queries_is_the_same_configuration_said_or_not():
    said = dataclasses.replace(CONFIG, n_kv_heads=3)
    assert said == CONFIG
    assert (said.n_kv_heads, said.kv_heads, dataclasses.replace(CONFIG, n_kv_heads=1).kv_heads) == (None, 3, 1)


def test_a_configuration_from_before_there_were_variants_is_todays():
    fields = dataclasses.asdict(CONFIG)
    for name in ("norm", "n_kv_heads", "attention_bias", "ffn_bias"):
        del fields[name]
    assert NeoXConfig(**fields) == CONFIG


def test_a_config_is_hashable_and_frozen():
    assert len({NeoXConfig(), NeoXConfig(), NeoXConfig.neox_20b()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        NeoXConfig().n_vocab = 3


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"n_vocab": 0}, "n_vocab=0"),
        ({"n_hidden": -6}, "n_hidden=-6"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"n_heads": 2.0}, r"n_heads=2\.0"),
        ({"max_len": 0}, "max_len=0"),
        ({"n_layers": True}, "n_layers=True"),
        ({"tied": "no"}, "tied='no'"),
        ({"parallel_residual": 1}, r"parallel_residual=1\b"),
        ({"remat": None}, "remat=None"),
        ({"n_ff": 0}, "n_ff=0"),
        ({"n_hidden": 31}, r"n_hidden=31\b.*n_heads=3\b"),
        ({"rope_percentage": 0.1}, r"rope_percentage=0\.1"),
        ({"rope_percentage": 0.3}, r"rope_percentage=0\.3 .*\b3 .*d_k=10\b"),
        ({"rope_percentage": 1.2}, r"rope_percentage=1\.2"),
        ({"rope_base": 1.0}, r"rope_base=1\.0"),
        ({"rope_base": math.inf}, "rope_base=inf"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"norm": "batchnorm"}, "norm='batchnorm'.*layernorm, rmsnorm"),
        ({"n_kv_heads": 2}, r"n_heads=3\b.*n_kv_heads=2\b"),
        ({"n_kv_heads": 6}, r"n_heads=3\b.*n_kv_heads=6\b"),
        ({"n_kv_heads": 0}, "n_kv_heads=0"),
        ({"n_kv_heads": "1"}, "n_kv_heads='1'"),
        ({"attention_bias": None}, "attention_bias=None"),
        ({"ffn_bias": 0}, "ffn_bias=0"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps=0\.0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps=nan"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_refuses_what_no_model_can_have(fields, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **fields)


def test_a_model_of_20b_is_described_without_being_made():
    model = nnx.eval_shape(lambda: NeoX(NeoXConfig.neox_20b(), rngs=nnx.Rngs(0)))
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in flat_arrays(model).values())
    assert model.layers.attention.qkv_lin.kernel.shape == (44, 6_144, 18_432)
