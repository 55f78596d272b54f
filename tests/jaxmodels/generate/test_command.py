"""The command on a tiny checkpoint with a tiny byte-level tokenizer, both made here."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models

import jaxmodels
from jaxmodels import native
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.neox import save_neox
from jaxmodels.convert.open import open_source
from jaxmodels.convert.source import model_source
from jaxmodels.generate import generate, stream
from jaxmodels.generate.command import load_listed, main, parser, read_model, read_prompt, read_prompts
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.text import CharVocabulary, TokenizerFile
from tests.common import filled, language_model
from tests.jaxmodels.tokenizer import byte_level_tokenizer

PROMPT = "The statement "
N = 12


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model whose padding rows would win every draw, if they could."""
    config = NeoXConfig(tokenizer.get_vocab_size() + 21, 3 * 10, 2, 3, rope_percentage=0.4, n_ff=18)
    model = filled(lambda: NeoX(config, rngs=nnx.Rngs(0)))
    for bias in (model.final_norm.ln.bias, model.layers.ffn.dense_h4_h.bias):
        bias[...] = jnp.zeros_like(bias)
    kernel = model.readout.linear.kernel[...]
    model.readout.linear.kernel[...] = kernel.at[:, tokenizer.get_vocab_size() :].multiply(50).at[:, 0].set(0)
    return model


@pytest.fixture(scope="module")
def cut(model, tokenizer):
    """The model without its padding rows, on which `generate` gives the expected tokens."""
    kernel = model.readout.linear.kernel[:, : tokenizer.get_vocab_size()]
    cut = model.unstacked()
    cut.readout.linear.kernel = nnx.Param(kernel)
    return cut


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("neox") / "checkpoint"
    jaxmodels.save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def new(cut, tokenizer):
    ids = jnp.asarray([tokenizer.encode(PROMPT).ids])
    return np.asarray(generate(cut, ids, N))[0].tolist()


def command(checkpoint, *more, prompt=PROMPT):
    return [str(checkpoint), "--prompt", prompt, "--max-new-tokens", str(N), *more]


def test_the_command_prints_what_the_model_generates(checkpoint, tokenizer, new):
    assert len(set(new)) > 3
    run = subprocess.run(
        [sys.executable, "-m", "jaxmodels.neox.generate", *command(checkpoint)], capture_output=True, check=True
    )
    whole = tokenizer.decode(new)
    assert run.stdout.decode() == PROMPT + whole + "\n"
    n = len(tokenizer.encode(PROMPT).ids)
    assert re.search(rf"{n} tokens read in .* tokens/s\), {N} written \([\d.]+ tokens/s\)", run.stderr.decode())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 7}, {"temperature": 1.3, "top_p": 0.6}],
    ids=str,
)
def test_a_stream_is_what_generate_returns_at_once(model, tokenizer, settings):
    ids = tokenizer.encode(PROMPT).ids
    settings = {**settings, "n_tokens": tokenizer.get_vocab_size(), "rng": jax.random.key(3)}
    expected = np.asarray(generate(model, jnp.asarray([ids]), N, **settings))[0].tolist()
    tokens = stream(model.unstacked(), [ids], N, **settings)
    assert [token.item() for token in tokens] == expected


@pytest.mark.slow
def test_every_format_of_a_checkpoint_generates_the_same(tmp_path, checkpoint, model, tokenizer, new, capsys):
    tokenizer_flag = ["--tokenizer", str(checkpoint / "tokenizer.json")]
    save_hf(model, tmp_path / "hf")
    save_neox(model, tmp_path / "shards", model_parallel=3)
    whole = PROMPT + tokenizer.decode(new) + "\n"
    for name in ("hf", "shards"):
        assert main(command(tmp_path / name, *tokenizer_flag)) == 0
        assert capsys.readouterr().out == whole
    for file in (tmp_path / "shards").rglob("*.yml"):
        file.unlink()
    assert main(command(tmp_path / "shards", *tokenizer_flag)) == 2
    capsys.readouterr()
    assert (
        main(command(tmp_path / "shards", *tokenizer_flag, "--config", json.dumps(dataclasses.asdict(model.settings))))
        == 0
    )
    assert capsys.readouterr().out == whole


@pytest.mark.slow
def test_a_seed_says_what_is_drawn(checkpoint, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        assert main(command(checkpoint, "--temperature", "1.5", "--top-k", "50", "--seed", seed)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_stop_text_ends_it_and_is_left_out(checkpoint, tokenizer, new, capsys):
    text = tokenizer.decode(new)
    stop = text[5:8]
    assert main(command(checkpoint, "--stop", "never comes", "--stop", stop)) == 0
    assert capsys.readouterr().out == PROMPT + text[: text.index(stop)] + "\n"


def test_one_new_token(checkpoint, tokenizer, new, capsys):
    assert main([*command(checkpoint), "--max-new-tokens", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == PROMPT + tokenizer.decode(new[:1]) + "\n"
    assert "1 written (one token)" in shown.err


def test_weights_are_cast_where_asked(checkpoint):
    for dtype in ("bfloat16", None):
        model = load_listed(open_source(checkpoint), dtype)
        assert not model.is_stacked
        assert {array.dtype for array in jax.tree.leaves(model)} == {jnp.dtype(dtype or "float32")}


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "kind"), [("float16", "hf"), ("bfloat16", "flax"), ("float16", "orbax")])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_weights_in_16_bits_are_computed_in_float32_on_a_cpu(
    tmp_path, model, stored, kind, by_kernel, capsys, monkeypatch
):
    monkeypatch.setattr(native, "available", lambda: by_kernel)
    narrow = jax.tree.map(lambda array: array.astype(stored), model)
    if kind == "flax":
        write_flax(model_source(narrow), tmp_path / "narrow")
    else:
        {"hf": save_hf, "orbax": jaxmodels.save}[kind](narrow, tmp_path / "narrow")

    def read(*more):
        options = parser("generate").parse_args(command(tmp_path / "narrow", *more))
        return read_model(open_source(tmp_path / "narrow"), options)[0]

    wide = read()
    line = capsys.readouterr().err
    assert (line.count("\n"), stored in line, "--dtype" in line) == (1, True, True)
    expected = sorted(float(jnp.abs(array.astype(jnp.float32)).sum()) for array in jax.tree.leaves(narrow.unstacked()))
    found = sorted(float(jnp.abs(array.astype(jnp.float32)).sum()) for array in jax.tree.leaves(wide))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    kept = {jnp.dtype(stored)} if by_kernel else set()
    assert {array.dtype for array in jax.tree.leaves(wide)} == {jnp.dtype("float32")} | kept
    assert wide.init_cache(1, 2).layers[0]["key"].dtype == jnp.float32
    for given in (stored, "float32"):
        assert {array.dtype for array in jax.tree.leaves(read("--dtype", given))} == {jnp.dtype(given)}
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_of_prompts_is_continued_in_its_order(tmp_path, checkpoint, tokenizer, cut, kind, capsys):
    prompts = ["The statement ", "if", "a while loop", "The"]
    lines = prompts if kind == "txt" else [json.dumps({"prompt": prompt}) for prompt in prompts]
    file = tmp_path / f"prompts.{kind}"
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    arguments = [str(checkpoint), "--prompts", str(file), "--max-new-tokens", "5", "--batch-size"]
    shown = []
    for size in ("2", "4"):  # continuous, and one batch
        assert main([*arguments, size]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].count("--- prompt") == len(prompts)
    for prompt in prompts:
        new = np.asarray(generate(cut, jnp.asarray([tokenizer.encode(prompt).ids]), 5))[0].tolist()
        assert prompt + tokenizer.decode(new) in shown[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", "\n \n", "a.txt"), ("b.jsonl", '{"text": "x"}\n', "b.jsonl.*'prompt'"), ("c.jsonl", "x\n", "c.jsonl")],
)
def test_a_file_without_prompts_is_refused(tmp_path, checkpoint, name, content, message, capsys):
    (tmp_path / name).write_text(content)
    assert main([str(checkpoint), "--prompts", str(tmp_path / name)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_int8_writes_what_the_quantized_model_generates(checkpoint, cut, tokenizer, new, capsys):
    ids = jnp.asarray([tokenizer.encode(PROMPT).ids])
    quantized = np.asarray(generate(quantize(cut), ids, N))[0].tolist()
    assert quantized != new  # random weights: their likeliest tokens are near each other
    assert main(command(checkpoint, "--int8")) == 0
    assert capsys.readouterr().out == PROMPT + tokenizer.decode(quantized) + "\n"


@pytest.mark.slow
def test_a_checkpoint_of_int8_weights_stays_as_it_is(tmp_path, checkpoint, model):
    def read(folder, *more):
        return read_model(open_source(folder), parser("generate").parse_args(command(folder, *more)))[0]

    folder = tmp_path / "int8"
    jaxmodels.save(quantize(model, 3.0), folder)
    assert read(folder).int8_threshold == 3.0
    assert read(checkpoint, "--dtype", "bfloat16", "--int8").layers[0].ffn.dense_h_h4.bias.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"bfloat16 .*int8"):
        read(folder, "--dtype", "bfloat16")
    with pytest.raises(ValueError, match=r"threshold=3\.0"):
        read(folder, "--int8")
    for kind in ("weights", "weights-4"):
        assert read(checkpoint, "--quantize", kind).quantization == kind


def test_a_text_beyond_the_trained_positions_is_said(checkpoint, capsys, tmp_path):
    config = (checkpoint / "config.json").read_text()
    short = shutil.copytree(checkpoint, tmp_path / "short")
    (short / "config.json").write_text(config.replace('"max_len": 2048', '"max_len": 7'))
    assert main(command(short)) == 0
    assert "max_len=7 " in capsys.readouterr().err
    assert main(command(checkpoint)) == 0
    assert "max_len" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--prompt", ""], "prompt=''"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--top-k", "3"], "temperature"),
        (["--temperature", "-1"], r"temperature=-1\.0"),
        (["--seed", "-1"], r"seed=-1\b"),
        (["--temperature", "1", "--top-p", "2"], r"top_p=2\.0"),
        (["--stop", ""], "stop=''"),
        (["--tokenizer", "nowhere.json"], r"nowhere\.json"),
    ],
    ids=" ".join,
)
def test_bad_settings_are_one_clear_line(checkpoint, capsys, more, match):
    assert main([*command(checkpoint), *more]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(match, shown.err)
    assert shown.err.startswith("python -m jaxmodels.generate: ")
    assert len(shown.err.splitlines()) == 1


def test_a_folder_without_a_checkpoint_is_one_clear_line(tmp_path, checkpoint, capsys):
    tokenizer = ["--tokenizer", str(checkpoint / "tokenizer.json")]
    assert main(command(tmp_path / "nowhere", *tokenizer)) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert main(command(tmp_path, *tokenizer)) == 2
    assert "is an empty folder" in capsys.readouterr().err
    jaxmodels.save(language_model("rotary"), tmp_path / "other")
    assert main(command(tmp_path / "other", *tokenizer, "--int8")) == 2
    assert "AutoregressiveTransformer" in capsys.readouterr().err
    assert main(command(tmp_path / "other", *tokenizer)) == 2
    assert re.search(r"300 tokens.*n_vocab=23\b", capsys.readouterr().err)


def test_a_tokenizer_that_is_none_or_another_models_is_one_clear_line(tmp_path, checkpoint, tokenizer, capsys):
    (tmp_path / "20B_tokenizer.json").write_text("{}")
    assert main(command(checkpoint, "--tokenizer", str(tmp_path / "20B_tokenizer.json"))) == 2
    assert "20B_tokenizer.json" in capsys.readouterr().err
    other = Tokenizer(models.WordLevel({f"word{i}": i for i in range(350)}, unk_token="word0"))
    other.save(str(tmp_path / "larger.json"))
    assert main(command(checkpoint, "--tokenizer", str(tmp_path / "larger.json"))) == 2
    assert re.search(r"350 tokens.*n_vocab=321", capsys.readouterr().err)


def test_tokens_that_were_added_beyond_the_models_rows_are_said(tmp_path, checkpoint, tokenizer, new, capsys):
    larger = Tokenizer.from_str(tokenizer.to_str())
    larger.add_tokens([f"<token {i}>" for i in range(50)])
    larger.save(str(tmp_path / "larger.json"))
    flag = ["--tokenizer", str(tmp_path / "larger.json")]
    assert main(command(checkpoint, *flag, "--max-new-tokens", "1")) == 0
    assert "321 to 349" in capsys.readouterr().err
    assert main(command(checkpoint, *flag, prompt="a <token 49>")) == 2
    assert "the tokens 349, beyond" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffThe if\r\nThe\n", encoding="utf-8", newline="")
    assert read_prompt(file) == "The if\r\nThe"
    assert read_prompts(file, "text") == ["The if", "The"]
    file = file.rename(tmp_path / "prompts.jsonl")
    file.write_text('\ufeff{"text": "The if"}\n', encoding="utf-8")
    assert read_prompts(file, "text") == ["The if"]


@pytest.mark.slow
def test_several_prompts_and_sequences_are_each_printed(checkpoint, tokenizer, new, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"The if\n\n")
    more = ["--prompt-file", str(tmp_path / "prompt.txt"), "--num-sequences", "2"]
    assert main(command(checkpoint, *more)) == 0
    whole = re.split(r"--- prompt (\d), sequence (\d) ---\n", capsys.readouterr().out)
    assert whole[0] == ""
    assert [(int(a), int(b)) for a, b in zip(whole[1::3], whole[2::3], strict=True)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    texts = whole[3::3]
    assert texts[0] == texts[1] == PROMPT + tokenizer.decode(new) + "\n"
    assert texts[2].startswith("The if\n")
    assert main(command(checkpoint, *more, "--temperature", "2", "--min-p", "0.01")) == 0
    drawn = re.split(r"---.*---\n", capsys.readouterr().out)[1:]
    assert drawn[0] != drawn[1]


@pytest.mark.slow
def test_a_text_ends_at_the_checkpoints_end_tokens(tmp_path, checkpoint, tokenizer, new, capsys):
    end = new[5]
    assert end not in new[:5]
    folder = shutil.copytree(checkpoint, tmp_path / "ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, end], "temperature": 0.1}))
    assert main(command(folder)) == 0
    assert capsys.readouterr().out == PROMPT + tokenizer.decode(new[:5]) + "\n"
    assert main(command(folder, "--ignore-eos")) == 0
    assert capsys.readouterr().out == PROMPT + tokenizer.decode(new) + "\n"


@pytest.mark.slow
def test_a_stop_text_may_be_a_special_token(tmp_path, checkpoint, tokenizer, new, capsys):
    special = Tokenizer.from_str(tokenizer.to_str())
    special.add_special_tokens([text := tokenizer.id_to_token(new[3])])
    special.save(str(tmp_path / "special.json"))
    flag = ["--tokenizer", str(tmp_path / "special.json")]
    assert main(command(checkpoint, *flag)) == 0
    shown = capsys.readouterr().out
    assert main(command(checkpoint, *flag, "--stop", text)) == 0
    stopped = capsys.readouterr().out
    assert stopped == PROMPT + special.decode(new[:3]) + "\n"
    assert shown == PROMPT + special.decode(new) + "\n"


@pytest.mark.slow
def test_a_model_of_any_class_with_its_vocabulary(tmp_path, capsys):
    jaxmodels.save(language_model("relative"), tmp_path / "model")
    CharVocabulary("abcdefghijklmnopqrstuv ").save(tmp_path / "model" / "vocabulary.json")
    assert main(command(tmp_path / "model", prompt="see a ")) == 0
    assert re.fullmatch(f"see a .{{{N}}}\n", capsys.readouterr().out)
    assert main(command(tmp_path / "model", "--experiment", "some.module", prompt="see a ")) == 2
    assert "--experiment" in capsys.readouterr().err


def test_help_is_there(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop", "--dtype", "--int8"):
        assert flag in shown


def test_end_tokens_that_are_never_written_are_said(tmp_path, checkpoint, tokenizer, new, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [new[5], 300, 2**30]}))
    assert main(command(folder)) == 0
    printed = capsys.readouterr()
    assert printed.out == PROMPT + tokenizer.decode(new[:5]) + "\n"
    assert f"end tokens 300, {2**30} of {folder} are ignored: only ids below 300 are written" in printed.err


def test_a_prompt_with_ids_beyond_the_model_is_refused_before_it_is_printed(tmp_path, checkpoint, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "template")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "first", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"first": {"id": "first", "ids": [70_001], "tokens": ["first"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert main(command(folder)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert "the tokens 70001, beyond n_vocab=" in last
    assert last.endswith(f" of {folder}")


def test_an_error_amid_a_text_stands_on_a_line_of_its_own(checkpoint, monkeypatch, capsys):
    decode, calls = TokenizerFile.decode, []

    def failing(self, ids, **settings):
        calls.append(ids)
        if len(calls) > 6:
            raise ValueError(f"{self.name} cannot decode these ids: it takes more than 3 s")
        return decode(self, ids, **settings)

    monkeypatch.setattr(TokenizerFile, "decode", failing)
    assert main(command(checkpoint)) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(PROMPT)
    assert printed.out.endswith("\n")
    assert printed.err.splitlines()[-1].endswith(
        f"{checkpoint / 'tokenizer.json'} cannot decode these ids: it takes more than 3 s"
    )
