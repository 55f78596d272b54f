"""Shards of models with RMSNorm, fewer heads of keys and values, and linear maps without biases."""

import dataclasses

import pytest
import safetensors.numpy
import torch

import jaxmodels
import torch_ref.neox
from jaxmodels.convert.command import main
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.neox import load_neox, save_neox
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.weights.lazy import read
from jaxmodels.weights.names import as_tensor
from tests.jaxmodels.convert.neox.test_read import assert_holds, edit
from tests.jaxmodels.convert.originals import CONFIG, VARIANT, layer_file, state_dict, write, write_rank_files

GROUPED = dataclasses.replace(CONFIG, n_kv_heads=6)  # with biases of queries, keys and values
FORMS = {
    "all": VARIANT,
    "grouped": GROUPED,
    "rmsnorm": dataclasses.replace(CONFIG, norm="rmsnorm", layer_norm_eps=1e-8, parallel_residual=False),
    "attention without biases": dataclasses.replace(CONFIG, attention_bias=False),
    "feed-forward without biases": dataclasses.replace(CONFIG, ffn_bias=False, tied=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_ranks_read_and_written(tmp_path, form):
    config = FORMS[form]
    state = write(tmp_path / "0", 6, config)
    for i, ranks in enumerate([1, 3, 2]):
        source = open_neox(tmp_path / str(i))
        assert source.config == config
        assert any("n_kv_heads=6" in note for note in source.notes) == (config.n_kv_heads == 6)
        jaxmodels.convert.neox.write.write_neox(source, tmp_path / str(i + 1), ranks)
    assert_holds(load_neox(tmp_path / "3"), state)
    original = tmp_path / "original"
    write(original, 2, config)
    for layer in (2, 3, 4, 6):
        for rank in range(2):
            expected = torch.load(layer_file(original, layer, rank))
            written = torch.load(tmp_path / "3" / "global_step0" / layer_file(original, layer, rank).name)
            expected.pop("attention.rotary_emb.inv_freq", None)
            assert written.keys() == expected.keys()
            for name, tensor in expected.items():
                # the ranks' own biases of row-parallel maps are not those of the source
                assert torch.equal(written[name], tensor) or name.endswith(("dense.bias", "dense_4h_to_h.bias")), name


@pytest.mark.parametrize("ranks", [1, 2, 6])
def test_one_file_for_each_rank(tmp_path, ranks):
    state = write_rank_files(tmp_path, ranks, VARIANT)
    assert_holds(load_neox(tmp_path), state)


@pytest.mark.parametrize("names", ["newer", "transformer_engine"])
def test_newer_names_and_a_fused_rmsnorm(tmp_path, names):
    """The fused RMSNorm's tensor is `weight`, not `scale`."""
    state = write(tmp_path, 2, VARIANT, names=names)
    for layer in (2, 3, 4, 6):
        for rank in range(2):
            edit(tmp_path, layer, rank, lambda tensors: {k.replace("scale", "weight"): v for k, v in tensors.items()})
    assert_holds(load_neox(tmp_path), state)


def attention_of_rank(x, shard, config, ranks, cos, sin):
    """One rank's share of the attention as GPT-NeoX computes it: [S, D] -> [S, D], to be added up over ranks."""
    heads, kv_heads, d_k = config.n_heads // ranks, config.n_kv_heads // ranks, config.n_hidden // config.n_heads
    mixed = x @ shard["attention.query_key_value.weight"].T + shard.get("attention.query_key_value.bias", 0)
    q, k, v = mixed.split([heads * d_k, kv_heads * d_k, kv_heads * d_k], dim=-1)
    q, k, v = q.view(len(x), heads, d_k), k.view(len(x), kv_heads, d_k), v.view(len(x), kv_heads, d_k)
    q, k = torch_ref.neox.rotate(q, cos, sin), torch_ref.neox.rotate(k, cos, sin)
    k, v = (a.repeat_interleave(heads // kv_heads, dim=1) for a in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / d_k**0.5
    weights = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ shard["attention.dense.weight"].T


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("form", ["all", "grouped"])
def test_the_merged_attention_computes_what_the_ranks_compute(tmp_path, form, ranks):
    config = FORMS[form]
    write(tmp_path, ranks, config, dtype=torch.float64)
    tensors = {name: as_tensor(read(tensor)) for name, tensor in open_neox(tmp_path).tensors.items()}
    merged = torch_ref.neox.Attention(config).double()
    merged.load_state_dict({n.split("attention.")[1]: t for n, t in tensors.items() if n.startswith("layers.1.att")})
    torch.manual_seed(0)
    x, positions = torch.randn(11, 120, dtype=torch.float64), torch.arange(11)
    cos, sin = torch_ref.neox.rotary_tables(positions, config.d_rope, config.rope_base, torch.float64)
    shards = [torch.load(layer_file(tmp_path, 3, rank)) for rank in range(ranks)]
    expected = sum(attention_of_rank(x, shard, config, ranks, cos[:, None], sin[:, None]) for shard in shards)
    with torch.no_grad():
        given = merged(x[None], positions[None], torch.ones(1, 11, 11).tril().bool())[0]
        given = given - (merged.output.bias if config.attention_bias else 0)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("ranks", [4, 12])
def test_ranks_that_do_not_divide_the_heads_of_keys_are_refused(tmp_path, ranks):
    write(tmp_path / "source", 2, VARIANT)
    with pytest.raises(ValueError, match=rf"n_kv_heads=6 .*model_parallel={ranks}\b"):
        save_neox(load_neox(tmp_path / "source"), tmp_path / "out", ranks)
    assert not (tmp_path / "out").exists()
    write(tmp_path / "ranks", ranks, dataclasses.replace(CONFIG, norm="rmsnorm"), yaml=False)
    with pytest.raises(ValueError, match=rf"global_step143: n_kv_heads=6\b.*\b{ranks} "):
        load_neox(tmp_path / "ranks", dataclasses.replace(CONFIG, norm="rmsnorm", n_kv_heads=6))


def test_tensors_decide_without_a_configuration(tmp_path):
    state = write(tmp_path, 2, VARIANT, yaml=False)
    with pytest.raises(ValueError, match=r"norm=rmsnorm, attention_bias=False, ffn_bias=False"):
        load_neox(tmp_path)
    assert_holds(load_neox(tmp_path, VARIANT), state)
    with pytest.raises(ValueError, match=r"norm is rmsnorm, expected layernorm"):
        load_neox(tmp_path, dataclasses.replace(VARIANT, norm="layernorm"))
    with pytest.raises(ValueError, match=r"query_key_value\.weight gives \[240, 120\], expected \[160, 120\]"):
        load_neox(tmp_path, dataclasses.replace(VARIANT, n_kv_heads=2))


def test_a_bias_that_one_shard_lacks_is_missing(tmp_path):
    write(tmp_path, 2, GROUPED)
    edit(tmp_path, 3, 1, lambda t: {k: v for k, v in t.items() if k != "attention.query_key_value.bias"})
    with pytest.raises(ValueError, match=r"layer_03-model_01.*missing attention\.query_key_value\.bias"):
        load_neox(tmp_path)


def test_a_folder_of_our_own_holds_every_variant(tmp_path, capsys):
    state = write(tmp_path / "source", 2, VARIANT)
    folders = [str(tmp_path / name) for name in ("source", "flax", "back")]
    assert main(["neox", *folders[:2], "--to", "flax"]) == 0
    assert main(["neox", *folders[1:], "--to", "neox", "--model-parallel", "3"]) == 0
    assert main(["verify", folders[0], folders[2]]) == 0
    assert_holds(jaxmodels.load(folders[1]), state)
    stored = safetensors.numpy.load_file(tmp_path / "flax" / "params.safetensors")
    assert sorted(name for name in stored if name.startswith("layers.1.pre_ln")) == [
        "layers.1.pre_ln_attn.scale",
        "layers.1.pre_ln_ffn.scale",
    ]
    capsys.readouterr()
    assert main(["inspect", folders[1]]) == 0
    shown = capsys.readouterr().out
    assert f"{VARIANT.parameters():,} parameters" in shown
    assert all(word in shown for word in ("rmsnorm", "n_kv_heads         6\n", "attention_bias     False\n"))


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (FORMS["rmsnorm"], "norm='rmsnorm'"),
        (GROUPED, "n_kv_heads=6"),
        (FORMS["feed-forward without biases"], "ffn_bias"),
    ],
)
def test_transformers_has_no_setting_for_it(tmp_path, capsys, config, setting):
    write(tmp_path / "source", 1, config)
    assert main(["neox", str(tmp_path / "source"), str(tmp_path / "hf"), "--to", "hf"]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert setting in shown
    with pytest.raises(ValueError, match=setting):
        save_hf(load_neox(tmp_path / "source"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("form", FORMS)
def test_parameters_counts_the_tensors(form):
    assert FORMS[form].parameters() == sum(tensor.numel() for tensor in state_dict(FORMS[form]).values())
