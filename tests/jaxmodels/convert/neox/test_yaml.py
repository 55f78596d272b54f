"""GPT-NeoX's YAML files."""

import dataclasses
import re
import time

import pytest

from jaxmodels.convert.neox.read import open_neox
from jaxmodels.convert.neox.yaml import fields, read_yaml, settings_of, yaml_text
from jaxmodels.neox import NeoXConfig
from tests.jaxmodels.convert.originals import CONFIG, VARIANT, settings, write, write_yaml

TEXT_20B = """\
# DISCLAIMER: comments, and a comma behind the last entry
{
  # parallelism
  "pipe-parallel-size": 4,
  "model-parallel-size": 2,
  "num-layers": 44,
  "hidden-size": 6144,
  "num-attention-heads": 64,
  "seq-length": 2048,
  "max-position-embeddings": 2048,
  "norm": "layernorm",
  "pos-emb": "rotary",
  "rotary_pct": 0.25,
  "no_weight_tying": true,
  "gpt_j_residual": true,
  "output_layer_parallelism": "column",
  "scaled-upper-triang-masked-softmax-fusion": true,
  "bias_gelu_fusion": true,
  "init_method": "small_init",
  "fp16": {"fp16": true, "loss_scale": 0,},
}
"""


def parsed(tmp_path, *texts):
    files = []
    for i, text in enumerate(texts):
        files.append(tmp_path / f"{i}.yml")
        files[-1].write_text(text)
    return fields(read_yaml(files), "here")


def test_a_file_in_the_form_of_20b(tmp_path):
    assert NeoXConfig(**parsed(tmp_path, TEXT_20B)) == NeoXConfig.neox_20b()


def test_absent_keys_have_gpt_neox_own_defaults(tmp_path):
    found = parsed(tmp_path, "pos_emb: rotary\nhidden-size: 12\n")
    assert found == {
        "n_hidden": 12,
        "rope_percentage": 1.0,
        "rope_base": 10_000.0,
        "parallel_residual": False,
        "layer_norm_eps": 1e-5,
        "max_len": 2048,
        "activation": "gelu",
        "tied": True,
        "norm": "layernorm",
        "attention_bias": True,
        "ffn_bias": True,
    }


def test_yaml_takes_1e_minus_5_for_a_string(tmp_path):
    assert parsed(tmp_path, "pos-emb: rotary\nlayernorm-epsilon: 1e-6")["layer_norm_eps"] == 1e-6


def test_several_files_are_one(tmp_path):
    found = parsed(
        tmp_path, '{"pos-emb": "rotary", "num-layers": 3,}', "# nothing\n", "num_layers: 3\nhidden_size: 7\n"
    )
    assert (found["n_layers"], found["n_hidden"]) == (3, 7)
    assert parsed(tmp_path, 'pos-emb: rotary\nnum-layers: "3"', "num_layers: 3")["n_layers"] == 3
    with pytest.raises(ValueError, match=r"1\.yml\b.*num_layers: 4\b.*\b3\b"):
        parsed(tmp_path, "num-layers: 3", "num_layers: 4")
    with pytest.raises(ValueError, match=r"0\.yml\b.*rotary_pct: 0\.5\b.*rotary_pct: 0\.25"):
        parsed(tmp_path, "rotary-pct: .25\nrotary_pct: .5")


def test_numbers_and_flags_in_quotes(tmp_path):
    said = {"num-layers": "6", "hidden_size": " 512", "num-attention-heads": "8.0", "rotary-pct": ".25"}
    said |= {"rotary_emb_base": "1e4", "layernorm-epsilon": "1E-5", "no-weight-tying": "True", "gpt_j_residual": "true"}
    said |= {"bias-gelu-fusion": "true", "max-position-embeddings": "2048", "pos-emb": "rotary", "norm": "layernorm"}
    quoted = parsed(tmp_path, "{" + "".join(f'"{key}": "{value}", ' for key, value in said.items()) + "}")
    assert dataclasses.replace(NeoXConfig.pythia_70m(), n_vocab=7) == NeoXConfig(**quoted, n_vocab=7)
    settings = read_yaml([tmp_path / "0.yml"])
    assert (settings["num_layers"], settings["rotary_pct"], settings["no_weight_tying"]) == (6, 0.25, True)
    (tmp_path / "0.yml").write_text('{"split": "995,4,1", "make-vocab-size-divisible-by": "256", "seed": "nan"}')
    assert read_yaml([tmp_path / "0.yml"]) == {
        "split": "995,4,1",
        "make_vocab_size_divisible_by": 256,
        "seed": "nan",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt_j_tied: true", "gpt_j_tied: True"),
        ("norm: scalenorm", "norm: 'scalenorm'; supported is 'layernorm' or 'te_layernorm' or 'rmsnorm'"),
        ("pos-emb: alibi", "pos_emb: 'alibi'; supported is 'rotary'"),
        ("pos-emb: rpe", "pos_emb: 'rpe'; supported is 'rotary'"),
        ("rope_scaling: {type: linear, factor: 2}", "rope_scaling: {'type': 'linear', 'factor': 2}; supported is none"),
        ("activation: swiglu", "activation: 'swiglu'; supported is 'gelu'"),
        ("mlp_type: llama", "mlp_type: 'llama'; supported is 'regular'"),
        ("moe_num_experts: 8", "moe_num_experts: 8; supported is 1"),
        ("use_bias_in_norms: false", "use_bias_in_norms: False with LayerNorm; supported is True"),
        ("pos-emb: learned", "pos_emb: 'learned'"),
        ("activation: geglu", "activation: 'geglu'"),
        ("num-attention-heads: 8\nnum-kv-heads: 2\nte_mha: true", "te_mha: True and num_kv_heads: 2"),
        ("num-kv-heads: some", "num_kv_heads: 'some'"),
        ("rotary-interleaved: true", "rotary_interleaved: True"),
        ("use_bias_in_attn_linear: 0", "use_bias_in_attn_linear: 0"),
        ("use_mup: true", "use_mup: True"),
        ("sliding-window-width: 256", "sliding_window_width: 256"),
        ('attention-config: [[["local", "global"], "all"]]', "attention_config of local"),
        ('attention_config: ["rwkv", "flash", "mamba"]', "attention_config of mamba, rwkv"),
        ('soft-prompt-tuning: {"num_tokens": 10}', "soft_prompt_tuning: {'num_tokens': 10}"),
        ("num-layers: many", "num_layers: 'many'"),
        ("num-layers: 3.5", "num_layers: 3.5"),
        ("rotary-pct: true", "rotary_pct: True"),
        ("no-weight-tying: 1", "no_weight_tying: 1"),
    ],
)
def test_what_the_model_here_does_not_have_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"here .*{re.escape(message)}"):
        parsed(tmp_path, text if "pos-emb" in text else f"pos-emb: rotary\n{text}")


def test_settings_that_change_nothing_are_taken(tmp_path):
    plain = parsed(tmp_path, "pos_emb: rotary")
    others = 'attention-config: [[["flash"], 3], [["global"], "all"]]\nuse_mup: false\nsliding_window_width: null\n'
    assert parsed(tmp_path, f"pos_emb: rotary\n{others}soft_prompt_tuning: {{enabled: false}}") == plain


def test_variants(tmp_path):
    plain = parsed(tmp_path, "pos_emb: rotary\nnum-attention-heads: 8")
    found = parsed(tmp_path, "pos_emb: rotary\nnum-attention-heads: 8\nnorm: rmsnorm\nuse-bias-in-norms: false")
    assert found == plain | {"norm": "rmsnorm", "layer_norm_eps": 1e-8}
    said = "norm: te_rmsnorm\nrms-norm-epsilon: 1e-6\nuse_bias_in_attn_linear: false\nuse-bias-in-mlp: 'false'\n"
    found = parsed(tmp_path, f"pos_emb: rotary\nnum-attention-heads: 8\nnum_kv_heads: '2'\n{said}")
    biases = {"attention_bias": False, "ffn_bias": False}
    assert found == plain | biases | {"norm": "rmsnorm", "layer_norm_eps": 1e-6, "n_kv_heads": 2}
    for absent in ("num-kv-heads: 0", "num_kv_heads: null", "norm: null", "gpt-j-residual: 'False'"):
        assert parsed(tmp_path, f"pos_emb: rotary\nnum-attention-heads: 8\n{absent}") == plain
    for said in ("rotary_emb_base: 500000", "rotary-emb-base: '5e5'"):
        assert parsed(tmp_path, f"pos_emb: rotary\n{said}")["rope_base"] == 5e5


def test_a_rounded_width_follows_from_the_tensors(tmp_path):
    assert "n_ff" not in parsed(tmp_path, "pos_emb: rotary\nintermediate_size: 100\nmlp_multiple_of: 64")


def test_a_file_must_say_that_positions_are_rotary(tmp_path):
    with pytest.raises(ValueError, match=r"here .*pos_emb\b.*'rotary'"):
        parsed(tmp_path, "num-layers: 3")


@pytest.mark.parametrize("content", [b"{", b"- 1\n- 2\n", b"\xff", b"a: [", b"word", b"[" * 100_000])
def test_a_file_that_is_no_mapping_is_named(tmp_path, content):
    file = tmp_path / "model.yml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.yml\b[^\n]*\Z"):
        read_yaml([file])


def test_a_missing_comma_is_named_by_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"0\.yml\b.*line 3: expected ','"):
        parsed(tmp_path, '{\n  "num-layers": 3\n  "pos-emb": "rotary"\n}')


@pytest.mark.parametrize("place", ["configs", "global_step143/configs"])
def test_files_are_found_beside_latest_and_in_the_step(tmp_path, place):
    write(tmp_path, yaml=False)
    write_yaml(tmp_path / place, CONFIG, 2)
    source = open_neox(tmp_path)
    assert source.config == CONFIG
    assert "configuration from model.yml, rest.yml" in source.notes
    assert open_neox(tmp_path / "global_step143").config == CONFIG


def test_a_file_that_leaves_out_the_heads(tmp_path):
    write(tmp_path, yaml=False)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yml").write_text("pos-emb: rotary\nno-weight-tying: true")
    with pytest.raises(ValueError, match=r"configs: num_attention_heads .*a\.yml"):
        open_neox(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num-layers", 4, r"model\.yml, rest\.yml: n_layers .*\b3\b.*\b4\b"),
        ("hidden-size", 60, r"n_hidden .*\b120\b.*\b60\b"),
        ("no-weight-tying", False, r"tied .*\bFalse\b.*\bTrue\b"),
        ("norm", "rmsnorm", r"norm is layernorm, expected rmsnorm"),
        ("use_bias_in_mlp", False, r"ffn_bias is True, expected False"),
        ("num_kv_heads", 6, r"query_key_value\.weight gives \[360, 120\], expected \[240, 120\]"),
        ("num-attention-heads", 7, r"n_hidden=120\b.*n_heads=7\b"),
        ("num-attention-heads", 20, r"inv_freq="),
    ],
)
def test_files_that_contradict_the_tensors(tmp_path, key, value, message):
    write(tmp_path, yaml=False)
    write_yaml(tmp_path / "configs", CONFIG, 2, **{key: value})
    with pytest.raises(ValueError, match=message):
        open_neox(tmp_path)


def test_another_rank_count_in_the_configuration_is_a_note(tmp_path):
    write(tmp_path, 3, yaml=False)
    write_yaml(tmp_path / "configs", CONFIG, 2)
    assert any(re.search(r"model_parallel_size=2\b.*\b3 ranks", note) for note in open_neox(tmp_path).notes)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        NeoXConfig.neox_20b(),
        dataclasses.replace(CONFIG, tied=True, parallel_residual=False, activation="gelu_tanh", layer_norm_eps=1e-6),
        dataclasses.replace(CONFIG, rope_base=1234.5, rope_percentage=1.0),
        VARIANT,
    ],
)
def test_what_we_write_says_the_same(tmp_path, config):
    settings = settings_of(config, 2, 128)
    found = parsed(tmp_path, yaml_text(settings))
    assert NeoXConfig(**found, n_vocab=config.n_vocab) == dataclasses.replace(config, n_ff=config.d_ff)
    assert read_yaml([tmp_path / "0.yml"]) == settings


@pytest.mark.parametrize("config", [CONFIG, VARIANT], ids=["published", "variant"])
def test_the_writer_of_these_tests_says_what_we_say(config):
    ours = settings_of(config, 2, 7)
    theirs = {key.replace("-", "_"): value for key, value in settings(config, 2).items()}
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "{a: " * 5000,
        "a: " + "1" * 5000,
    ],
    ids=["lists", "mappings", "digits"],
)
def test_a_file_that_would_swell_is_one_line(tmp_path, text):
    file = tmp_path / "a.yml"
    file.write_text(text)
    with pytest.raises(ValueError, match=str(file)) as error:
        fields(read_yaml([file]), "here")
    assert len(str(error.value)) < 400


def test_aliases_of_numbers_are_read(tmp_path):
    assert read_yaml_text(tmp_path, "hidden-size: &d 12\nintermediate-size: *d\n") == {
        "hidden_size": 12,
        "intermediate_size": 12,
    }


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(30))]),
        "a: &a\n  b: *a\n",
    ],
    ids=["laughs", "itself"],
)
def test_aliases_of_aliases_stand_for_few_values(tmp_path, text):
    assert len(str(read_yaml_text(tmp_path, text))) < 20 * len(text)


def test_settings_that_are_not_read_may_have_aliases_and_several_values(tmp_path):
    text = "num-layers: 2\nlog-interval: 1\nlog_interval: 2\nlog-interval: 3\npaths: &p [1, 2]\nothers: [*p, *p]\n"
    found = read_yaml_text(tmp_path, f"{text}pos-emb: rotary\nrope_scaling: {{}}\n")
    assert (found["num_layers"], found["paths"]) == (2, [1, 2])
    assert "n_layers" in fields(found, "here")
    merged = "<<: {rotary_pct: 0.25}\n<<: {rotary_pct: 0.75}"
    for twice in ("num_layers: 3", "soft_prompt_tuning: {enabled: false, enabled: true}", merged):
        with pytest.raises(ValueError, match=r"num_layers|second value of (enabled|<<)"):
            read_yaml_text(tmp_path, text + twice)


@pytest.mark.parametrize("key", ["attention_config", "num_layers", "norm", "mlp_type", "make_vocab_size_divisible_by"])
def test_an_alias_of_a_list_is_no_value_of_a_setting_that_is_read(tmp_path, key):
    with pytest.raises(ValueError, match=rf"a\.yml has {key}: .* alias"):
        read_yaml_text(tmp_path, f"pos-emb: rotary\na: &a [[[global], all]]\n{key}: *a\n")


def read_yaml_text(folder, text):
    (folder / "a.yml").write_text(text)
    return read_yaml([folder / "a.yml"])


@pytest.mark.parametrize(
    "value", ["!!bool foo", '!!int ""', '!!float ""', "!!timestamp foo", ":".join("1" * 200) + ".5"]
)
def test_a_value_that_is_not_of_its_tag_is_one_line(tmp_path, value):
    file = tmp_path / "model.yml"
    file.write_text(f"a: {value}\n")
    with pytest.raises(ValueError, match=r"model\.yml is not a YAML file") as refused:
        read_yaml([file])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a " + "x" * 1000 + "\nnorm: [" + "*a, " * 25_000 + "]\n", "alias"),
        ("a: &a " + "x" * 100 + "\nnorm: [" + "*a, " * 1000 + "]\n", "norm"),
        ("norm: '" + "1" * 100_000 + "x'\n", "norm"),
        ("pos-emb: rotary\nnum-layers: '" + "1" * 50_000 + "." + "1" * 50_000 + "e'\n", "num_layers"),
        ("? 0x" + "f" * 5000 + "\n: 1\n", "5,002 characters"),
        ("a: 1" + ":1" * 50_000 + "\n", "100,001 characters"),
        ("a: -1" + ":9" * 50_000 + ".5\n", "characters"),
        ("norm: rmsnorm\nb: {norm: [1], norm: [1]}\n", "line 2: a second value of norm"),
        ("num-layers: 4\nnum-layers: 8\n", "line 2: a second value of num-layers"),
        ("? [1, 2]\n: 1\n", "key|unhashable"),
    ],
    ids=lambda text: text[:12] if len(text) > 12 else "said",
)
def test_a_text_that_would_take_minutes_or_gigabytes_is_one_line(tmp_path, text, said):
    file = tmp_path / "a.yml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(ValueError, match=said) as error:
        fields(read_yaml([file]), str(file))
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 500
    assert time.process_time() - began < 5


def test_all_files_together_are_limited(tmp_path):
    files = [tmp_path / f"{i}.yml" for i in range(40)]
    for file in files:
        file.write_text("# " + "x" * 10_000 + "\n")
    with pytest.raises(ValueError, match=r"13\.yml with those before it has .* bytes of YAML; at most 131,072"):
        read_yaml(files)
    assert read_yaml(files[:13]) == {}


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_brackets_in_each_other_are_few(tmp_path, brackets):
    """The parser looks at each that is open for each word."""
    left, right = ("[", "]") if brackets == "[]" else ("{a: ", "}")
    deep = f"- {left * 20}1{right * 20}  # {left * 9}\n- '{left * 30}'\n"
    text = "x:\n" + deep * 10
    assert len(read_yaml_text(tmp_path, text)["x"]) == 20
    with pytest.raises(ValueError, match=r"a\.yml is not a YAML file: line 3: more than 20 brackets"):
        read_yaml_text(tmp_path, f"x:\n- 1\n- {left * 21}1{right * 21}\n")
