"""config.json: read as transformers reads it, or refused in one line."""

import dataclasses
import json

import pytest
import torch
import transformers
from transformers.activations import ACT2CLS, ACT2FN

from jaxmodels.convert.hf import read_config
from jaxmodels.convert.hf.config import ACTIVATIONS
from tests.jaxmodels.convert.hf.folders import SIZES, model

PLAIN = SIZES | {"model_type": "gpt_neox"}


def written(tmp_path, **values):
    content = {key: value for key, value in (PLAIN | values).items() if value != "absent"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    return file


ROTARY = [
    {},
    {"rotary_pct": 0.8, "rotary_emb_base": 500},
    {"rope_theta": 777.0, "partial_rotary_factor": 0.6},
    {"rope_theta": 777.0, "rotary_emb_base": 555},
    {"rope_scaling": None, "rotary_emb_base": 600},
    {"rope_scaling": {}, "rotary_emb_base": 600},
    {"rope_scaling": {"rope_theta": 500.0}},
    {"rope_scaling": {"type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.8}},
    {"rope_scaling": {"rope_theta": 500.0}, "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 0.8}},
    {"rope_parameters": {"rope_type": "default"}, "rotary_emb_base": 500, "rotary_pct": 1.0},
    {"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.8}, "rotary_emb_base": 9, "rotary_pct": 1.0},
    {"rope_parameters": {"rope_type": "default", "type": "linear"}},
    {"rope_parameters": None},
]


@pytest.mark.parametrize("keys", ROTARY, ids=str)
def test_rotary_settings_are_those_of_transformers(tmp_path, keys):
    file = written(tmp_path, **keys)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    config, notes = read_config(file)
    assert (config.rope_base, config.rope_percentage) == (theirs["rope_theta"], theirs["partial_rotary_factor"])
    said = [note for note in notes if "not read" in note]
    content = json.loads(file.read_text())
    other = content.get("rope_parameters" if content.get("rope_scaling") else "rope_scaling") or {}
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    stored = [
        (value, theirs[key])
        for key, older in names.items()
        for value in (content.get(key), content.get(older), other.get(key))
    ]
    assert len(said) == sum(value is not None and value != used for value, used in stored)


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_each_activation_of_transformers_is_computed_or_refused(tmp_path, name):
    file = written(tmp_path, hidden_act=name)
    x = torch.linspace(-13, 13, 2001, dtype=torch.float64)
    y = ACT2FN[name].double()(x).detach()
    forms = {"gelu": "none", "gelu_tanh": "tanh"}
    equal = [
        form for form, how in forms.items() if (y - torch.nn.functional.gelu(x, approximate=how)).abs().max() < 1e-7
    ]
    if equal:
        assert [read_config(file)[0].activation] == equal
    else:
        with pytest.raises(ValueError, match=rf"config\.json .*hidden_act '{name}'.*{', '.join(ACTIVATIONS)}"):
            read_config(file)


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"hidden_size": "60"}, "n_hidden", 60),
        ({"hidden_size": 60.0}, "n_hidden", 60),
        ({"num_hidden_layers": " 3 "}, "n_layers", 3),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps", 1e-6),
        ({"rotary_pct": "0.4"}, "rope_percentage", 0.4),
        ({"rotary_emb_base": "9000"}, "rope_base", 9_000.0),
        ({"rope_scaling": {"rope_theta": "9000.0"}}, "rope_base", 9_000.0),
        ({"intermediate_size": None}, "d_ff", 240),
        ({"layer_norm_eps": None}, "layer_norm_eps", 1e-5),
        ({"use_parallel_residual": None}, "parallel_residual", True),
        ({"max_position_embeddings": None}, "max_len", 2_048),
        ({"head_dim": 10, "is_causal": None}, "d_k", 10),
        ({"rotary_pct": None, "rope_parameters": {"rope_theta": None, "type": None}}, "rope_base", 10_000.0),
        ({"n_embd": 7, "architectures": None, "auto_map": {}, "": [], "dtype": "auto"}, "n_hidden", 60),
    ],
)
def test_numbers_as_strings_nulls_and_unknown_keys(tmp_path, values, field, expected):
    config, notes = read_config(written(tmp_path, **values))
    assert getattr(config, field) == expected
    key, value = next(iter(values.items()))
    if isinstance(value, str):
        assert any(key in note and repr(value) in note for note in notes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "wide"),
        ("hidden_size", 60.5),
        ("hidden_size", True),
        ("hidden_size", float("nan")),
        ("hidden_size", [60]),
        ("num_hidden_layers", "1e400"),
        ("layer_norm_eps", float("inf")),
        ("layer_norm_eps", {"__float__": "NaN"}),
        ("use_parallel_residual", 1),
        ("use_parallel_residual", "true"),
        ("rotary_pct", "a quarter"),
        ("rotary_emb_base", [10_000]),
        ("hidden_act", ["gelu"]),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn"}),
        ("rope_parameters", {"full_attention": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("rope_parameters", [1]),
        ("head_dim", "ten"),
    ],
)
def test_other_values_are_one_line_with_file_and_key(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"^\S*config\.json .*\b{key}\b.*$"):
        read_config(written(tmp_path, **{key: value}))


# Keys with which transformers computes other numbers: redirected attributes, another file, a shorter cache.
OTHER_NUMBERS = [
    {"head_dim": 5},
    {"is_causal": False},
    {"attribute_map": {"layer_norm_eps": "foo"}, "foo": 0.9},
    {"attribute_map": {"head_dim": "foo"}, "foo": 5},
    {"attribute_map": {"foo": "is_causal"}, "foo": False},
    {"__dict__": "all attributes"},
    {"configuration_files": ["config.4.0.0.json"]},
    {"sliding_window": 2},
    {"attention_chunk_size": 2},
    {"layer_types": ["sliding_attention"] * 3, "sliding_window": 2},
    {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 2},
]


def logits(model):
    """Logits of a text as a whole, and of its last token after a cache of those before."""
    ids = torch.tensor([[5, 3, 11, 2, 7, 9]])
    with torch.no_grad():
        before = model(ids[:, :-1], use_cache=True)
        return torch.cat([model(ids).logits, model(ids[:, -1:], past_key_values=before.past_key_values).logits], 1)


@pytest.mark.parametrize("keys", OTHER_NUMBERS, ids=str)
def test_a_key_with_which_transformers_computes_other_numbers_is_refused(tmp_path, keys):
    plain = model(torch.float32, rotary_pct=0.4)
    plain.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    own = json.loads(file.read_text())
    assert read_config(file)[0].rope_percentage == 0.4
    (tmp_path / "config.4.0.0.json").write_text(json.dumps(own | {"layer_norm_eps": 0.9}))
    if "__dict__" in keys:
        attributes = transformers.AutoConfig.from_pretrained(tmp_path).__dict__
        keys = {"__dict__": attributes | {"dtype": None, "layer_norm_eps": 0.9}}
    file.write_text(json.dumps(own | keys))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.allclose(logits(theirs), logits(plain), atol=1e-3)
    with pytest.raises(ValueError, match=rf"config\.json has ({'|'.join(keys)}) .*; supported is"):
        read_config(file)


@pytest.mark.parametrize(
    "keys",
    [
        *({"attribute_map": {}}, {"configuration_files": []}, {"per_layer_config": {}}, {"is_encoder_decoder": False}),
        *({"layer_types": ["full_attention"] * 3}, {"layer_types": ["attention"] * 3}, {"layer_types": None}),
        *({"sliding_window": None}, {"attention_chunk_size": None}, {"is_causal": True}),
    ],
    ids=str,
)
def test_such_a_key_with_which_transformers_computes_the_same_is_read(tmp_path, keys):
    plain = model(torch.float32)
    plain.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(plain))
    assert read_config(file)[0].n_hidden == 60


@pytest.mark.parametrize(
    ("key", "value"),
    [("per_layer_config", {"0": {"use_parallel_residual": False}}), ("quantization_config", {"load_in_8bit": True})],
)
def test_settings_of_single_layers_and_of_other_weights_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"config\.json has {key} .*; supported is \{{\}} or no such key"):
        read_config(written(tmp_path, **{key: value}))


@pytest.mark.parametrize("value", [{"layer_norm_eps": "foo"}, {"foo": "layer_norm_eps"}, [], 2])
def test_no_name_of_transformers_class_changes_a_setting_without_a_word(tmp_path, value):
    """transformers sets an attribute of each key, and its class has about a hundred names that are no settings."""
    settings = {field.name for field in dataclasses.fields(transformers.GPTNeoXConfig)}
    written(tmp_path)
    plain = {name: getattr(transformers.AutoConfig.from_pretrained(tmp_path), name) for name in settings}
    redirecting = []
    for name in sorted({*dir(transformers.GPTNeoXConfig)} - settings - {"model_type", "rope_scaling", "torch_dtype"}):
        file = written(tmp_path, **{name: value, "foo": 0.9})
        try:
            found = transformers.AutoConfig.from_pretrained(tmp_path)
            same = all(getattr(found, setting) == plain[setting] for setting in settings - {"id2label", "label2id"})
        except Exception:  # of many kinds: transformers reads no model
            continue
        if not same:
            redirecting.append(name)
            with pytest.raises(ValueError, match=rf"config\.json has {name} "):
                read_config(file)
    assert redirecting == (["attribute_map"] if isinstance(value, dict) else [])


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", ["absent", None])
def test_sizes_without_which_nothing_works(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"config\.json lacks {key}$"):
        read_config(written(tmp_path, **{key: value}))


def test_the_last_of_equal_keys_is_read(tmp_path):
    file = written(tmp_path)
    file.write_text(file.read_text()[:-1] + ', "rotary_pct": 0.5, "rotary_pct": 0.4}')
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["partial_rotary_factor"]
    assert read_config(file)[0].rope_percentage == theirs == 0.4
