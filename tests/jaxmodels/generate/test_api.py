"""Texts in, texts out: equal to transformers' own generation on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from jaxmodels.convert.hf import load_hf
from jaxmodels.generate import generate, stream
from jaxmodels.text import TokenizerFile
from tests.common import language_model
from tests.jaxmodels.tokenizer import byte_level_tokenizer

N = 17
PROMPTS = ["The statement ", "if", "a while loop", "in é"]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=34,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "folder"
    theirs.save_pretrained(folder)
    return load_hf(folder).unstacked()


@pytest.fixture(scope="module")
def expected(theirs, tokenizer):
    """Texts by transformers, for settings of its `generate`."""

    def written(prompt, **settings):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=N,
            do_sample=False,
            pad_token_id=0,
            tokenizer=tokenizer,
            **settings,
        )
        whole = tokenizer.decode(new[0], skip_special_tokens=True)
        before = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert whole.startswith(before)
        return whole[len(before) :]

    return written


@pytest.mark.slow
def test_texts_are_those_of_transformers_in_the_order_given(model, tokenizer, expected):
    one_by_one = [expected(prompt) for prompt in PROMPTS]
    assert len(set(one_by_one)) == len(PROMPTS)
    assert generate(model, PROMPTS, N, tokenizer=tokenizer, stop_tokens=(), batch_size=3) == one_by_one
    assert generate(model, PROMPTS[2], N, tokenizer=tokenizer, stop_tokens=()) == one_by_one[2]
    twice = generate(model, PROMPTS[:2], N, tokenizer=tokenizer, stop_tokens=(), num_return_sequences=2)
    assert twice == [one_by_one[0], one_by_one[0], one_by_one[1], one_by_one[1]]


@pytest.mark.parametrize(
    ("ours", "settings"),
    [
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"logit_bias": {7: 9.0, 9: -np.inf}}, {"sequence_bias": {(7,): 9.0, (9,): -np.inf}}),
        (
            {"logit_bias": {65: 4.0}, "repetition_penalty": 1.2},
            {"sequence_bias": {(65,): 4.0}, "repetition_penalty": 1.2},
        ),
    ],
    ids=str,
)
def test_settings_are_those_of_transformers(model, tokenizer, expected, ours, settings):
    right = [expected(prompt, **settings) for prompt in PROMPTS]
    assert right != [expected(prompt) for prompt in PROMPTS]
    assert generate(model, PROMPTS, N, tokenizer=tokenizer, stop_tokens=(), **ours) == right


@pytest.mark.slow
def test_end_tokens_and_stop_texts_are_those_of_transformers(model, theirs, tokenizer, expected):
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    new = theirs.generate(ids, max_new_tokens=N, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    ends = [new[9], new[5]]
    found = generate(model, PROMPTS, N, tokenizer=tokenizer, stop_tokens=ends)
    right = [expected(prompt, eos_token_id=ends) for prompt in PROMPTS]
    last = {tokenizer.decode([end]) for end in ends}  # transformers keeps the token that ends a text
    assert right[0] != expected(PROMPTS[0])
    for text, whole in zip(found, right, strict=True):
        assert whole == text or any(whole == text + end for end in last)
    text = expected(PROMPTS[0])
    stop = text[4:6]
    assert expected(PROMPTS[0], stop_strings=[stop]).startswith(text[: text.index(stop)])
    found = generate(model, PROMPTS, N, tokenizer=tokenizer, stop_tokens=(), stop=[stop, "never"])
    assert found == [whole.partition(stop)[0] for whole in (expected(prompt) for prompt in PROMPTS)]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_p": 0.9}, {"stop": "e"}], ids=str)
def test_a_stream_joins_to_the_whole_text(model, tokenizer, settings):
    settings = {"tokenizer": tokenizer, "rng": jax.random.key(5), **settings}
    whole = generate(model, PROMPTS[0], N, **settings)
    parts = list(stream(model, PROMPTS[0], N, **settings))
    assert "".join(parts) == whole
    assert len(parts) > 2 or "stop" in settings


@pytest.mark.slow
def test_draws_do_not_depend_on_the_batch(model, tokenizer):
    settings = {"tokenizer": tokenizer, "temperature": 1.3, "num_return_sequences": 2}
    whole = generate(model, PROMPTS, N, **settings)
    assert whole == generate(model, PROMPTS, N, **settings, batch_size=2)
    assert whole == generate(model, PROMPTS, N, **settings, rng=jax.random.key(0))  # the default
    assert whole != generate(model, PROMPTS, N, **settings, rng=jax.random.key(1))
    assert len(set(whole)) == 2 * len(PROMPTS)


@pytest.mark.slow
def test_several_sequences_of_ids_follow_each_other(model):
    ids = np.random.default_rng(0).integers(0, 300, (3, 5))
    start = np.array([0, 2, 1])
    ragged = np.asarray(generate(model, ids, N, start=start, num_return_sequences=2, repetition_penalty=1.5))
    np.testing.assert_array_equal(ragged[::2], ragged[1::2])
    alone = np.asarray(generate(model, ids[1:2, 2:], N, repetition_penalty=1.5))  # padding is not penalized
    np.testing.assert_array_equal(ragged[2:3], alone)
    drawn = np.asarray(generate(model, ids, N, num_return_sequences=2, temperature=1.0))
    assert all((drawn[i] != drawn[j]).any() for i in range(6) for j in range(i))


@pytest.mark.slow
def test_sequence_first_models_and_windows(tokenizer):
    model = language_model("rotary", n_vocab=300)
    settings = {"tokenizer": tokenizer, "window": 9, "stop_tokens": ()}
    prompts = ["if a", "or", "if b"]
    whole = generate(model, prompts, 13, **settings)
    assert "".join(stream(model, prompts[2], 13, **settings)) == whole[2]
    ids = TokenizerFile.of(tokenizer).encode(prompts[0])
    new = np.asarray(generate(model, ids[:, None], 13, window=9, num_return_sequences=2))
    np.testing.assert_array_equal(new[:, 0], new[:, 1])
    text = np.concatenate([ids, new[:, 0]])
    again = np.asarray(generate(model, text[5:9, None], 5))  # after nine tokens, from the last four
    np.testing.assert_array_equal(again[:, 0], text[9:14])
    assert whole[0] == TokenizerFile.of(tokenizer).decode(text)[len(prompts[0]) :]


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_not_a_text(model, tokenizer, value):
    broken = jax.tree.map(lambda array: jnp.full_like(array, value), model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        generate(broken, PROMPTS[0], N, tokenizer=tokenizer, temperature=0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(stream(broken, [[1, 2]], N))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tokenizer": None}, "tokenizer=None"),
        ({"tokenizer": 3}, "tokenizer is a int"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json"),
        ({"ids": []}, "ids is empty"),
        ({"ids": ["a", ""]}, "prompt=''"),
        ({"ids": ["a", 3]}, "ids .*not both"),
        ({"ids": [[1, 2], [3]], "tokenizer": None}, "ids .*different lengths"),
        ({"ids": [[1, 2]]}, "tokenizer is for"),
        ({"ids": [[1, 2]], "tokenizer": None, "stop": "x"}, "stop is for"),
        ({"ids": "\ud800"}, "ud800"),
        ({"stop": ""}, "stop=''"),
        ({"stop": [3]}, "stop=3"),
        ({"stop_tokens": [999]}, r"stop_tokens \[999\]"),
        ({"stop_tokens": [1.5]}, r"stop_tokens.*1\.5"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"num_return_sequences": True}, "num_return_sequences=True"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"window": 1}, "window=1"),
        ({"start": [0]}, "start"),
        ({"top_k": 2.5, "temperature": 1}, r"top_k=2\.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_bad_arguments_are_named(model, tokenizer, arguments, match):
    arguments = {"ids": "The", "max_new_tokens": 3, "tokenizer": tokenizer} | arguments
    with pytest.raises(ValueError, match=match) as error:
        generate(model, **arguments)
    assert "\n" not in str(error.value)
    if arguments.keys() & {"num_return_sequences", "batch_size"} or not isinstance(arguments["ids"], str):
        return
    with pytest.raises(ValueError, match=match):
        stream(model, **arguments)  # at once, not with the first piece
