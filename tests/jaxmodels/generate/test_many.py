"""Continuous batching: every prompt gets the tokens that it gets alone, whatever is decoded beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformerKV
from jaxmodels.generate import Sampling, generate, generate_many
from jaxmodels.generate.loop import Decoding
from jaxmodels.generate.many import Continuous, padded_length
from jaxmodels.neox import NeoX, NeoXConfig
from tests.common import filled, language_model

V = 23
LENGTHS = (3, 17, 3, 5, 17, 5, 3)
NEW = (11, 2, 1, 7, 13, 5, 3)
PROMPTS = [np.random.default_rng(k).integers(0, V, length) for k, length in enumerate(LENGTHS)]
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    return filled(lambda: NeoX(NeoXConfig(V, 3 * 10, 2, 3, n_ff=18), rngs=nnx.Rngs(0), stacked=False))


def alone(model, k, n, sampling, stop_tokens=()):
    """Tokens of prompt k, continued by itself, up to its stop token."""
    ids = PROMPTS[k][:, None] if model.sequence_axis == 0 else PROMPTS[k][None]
    decoding = Decoding(model, ids, n, sampling, stop_tokens=stop_tokens, key=KEY, rows=[k])
    decoding.advance()
    tokens = np.asarray(decoding.tokens())[:, 0].tolist()
    ends = [i for i, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "stop_tokens", "rows"),
    [
        ({}, (), 3),
        ({"temperature": 1.3, "top_k": 9}, tuple(range(1, V, 3)), 2),
        ({"temperature": 0.7, "repetition_penalty": 1.4}, (), 3),
    ],
)
def test_tokens_are_those_of_each_prompt_alone(model, settings, stop_tokens, rows):
    found = generate_many(model, PROMPTS, NEW, rows=rows, stop_tokens=stop_tokens, rng=KEY, **settings)
    for k, n in enumerate(NEW):
        assert found[k].tolist() == alone(model, k, n, Sampling(**settings), stop_tokens), k
    if stop_tokens:
        assert any(len(tokens) < n for tokens, n in zip(found, NEW, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rotary", "feedback"])
def test_models_with_the_sequence_first(kind):
    model = language_model("rotary")
    if kind == "feedback":  # with a memory of 4 tokens, a ring
        sizes = {"d_model": 12, "heads": 3, "d_ff": 17, "n_layers": 2, "memory": 4}
        model = filled(
            lambda: AutoregressiveModel(V, FeedbackTransformerKV(**sizes, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
        )
    found = generate_many(model, PROMPTS[:4], NEW[:4], rows=2, rng=KEY)
    for k in range(4):
        assert found[k].tolist() == alone(model, k, NEW[k], Sampling()), k


def test_a_row_that_ends_makes_room_at_once(model):
    continuous = Continuous(model, PROMPTS, NEW, Sampling(), rows=2)
    results = list(continuous.results())
    assert sorted(result.prompt for result in results) == list(range(len(PROMPTS)))
    assert all(result.ended for result in results)
    # Steps of both rows, which are full until the end: the longest texts are first.
    assert int(continuous.state.cache.length) < sum(NEW) / 2 + 2
    assert [NEW[k] for k in continuous.order] == sorted(NEW, reverse=True)


@pytest.mark.slow
def test_prompts_of_similar_lengths_are_read_together(model):
    continuous = Continuous(model, PROMPTS, NEW, Sampling(), rows=3)
    shapes, read = [], continuous.compiled.read

    def counted(weights, ids, *arguments):
        shapes.append(ids.shape)
        return read(weights, ids, *arguments)

    continuous.compiled = continuous.compiled._replace(read=counted)
    found = {result.prompt: result.tokens.tolist() for result in continuous.results()}
    assert shapes.count((3, 16)) == 2
    assert shapes.count((3, 24)) == 1  # two of 17 tokens, one of 3 or 5
    assert len(shapes) == 3
    assert not continuous.waiting
    assert not continuous.groups
    for k in (0, 1, 6):
        assert found[k] == alone(model, k, NEW[k], Sampling())


def test_prompts_that_wait_take_no_more_slots_than_the_rows(model):
    prompts = [np.tile(PROMPTS[1], 7)] * 9  # of 119 tokens
    continuous = Continuous(model, prompts, [2 + k for k in range(9)], Sampling(), rows=2)
    held = 0
    for _ in continuous.results():
        assert sum(map(continuous.padded, continuous.waiting)) <= 2 * continuous.state.cache.max_len
        held = max(held, len(continuous.waiting))
    assert held > 0


def test_padded_lengths_are_few():
    lengths = [padded_length(length) for length in range(1, 193)]
    assert all(length <= padded for length, padded in enumerate(lengths, 1))
    assert sorted(set(lengths)) == [16, 24, 32, 48, 64, 96, 128, 192]


@pytest.mark.slow
def test_the_cache_grows(model):
    prompts = [PROMPTS[0], np.tile(PROMPTS[1], 15)]
    found = generate_many(model, prompts, [270, 9], rows=1)
    expected = [generate(model, one[None], n)[0] for one, n in zip(prompts, (270, 9), strict=True)]
    for tokens, one in zip(found, expected, strict=True):
        np.testing.assert_array_equal(tokens, one)


def test_results_in_parts(model):
    continuous = Continuous(model, PROMPTS[:3], NEW[:3], Sampling(), rows=2, key=KEY)
    parts = {k: [] for k in range(3)}
    for prompt, tokens, _ in continuous.results(chunk=2):
        assert len(tokens) <= 3
        parts[prompt] += tokens.tolist()
        if prompt == 0 and len(parts[0]) >= 4:
            continuous.stop(0)
    assert parts[0] == alone(model, 0, NEW[0], Sampling())[: len(parts[0])]
    assert 4 <= len(parts[0]) < NEW[0]
    assert parts[2] == alone(model, 2, NEW[2], Sampling())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": "text"}, "prompts"),
        ({"prompts": [[1], []]}, r"prompts\[1\]"),
        ({"prompts": [[1], [2.5]]}, r"prompts\[1\].*float"),
        ({"prompts": [[1], [V]]}, str(V)),
        ({"max_new_tokens": [3]}, "max_new_tokens has 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"rows": 0}, "rows=0"),
        ({"tokenizer": "x"}, "tokenizer"),
    ],
)
def test_bad_arguments(model, arguments, message):
    given = {"prompts": [[1], [2, 3]], "max_new_tokens": 3} | arguments
    with pytest.raises(ValueError, match=message):
        generate_many(model, given.pop("prompts"), given.pop("max_new_tokens"), **given)


def test_a_model_whose_cache_is_not_by_position():
    class Other:
        sequence_axis, init_cache, prefill, decode = 1, None, None, None

    with pytest.raises(ValueError, match=r"Other .*cache_by_position"):
        generate_many(Other(), [[1]], 2)


def test_weights_that_are_not_finite(model):
    wrong = jax.tree.map(lambda array: array * jnp.nan, model)
    with pytest.raises(ValueError, match="NaN"):
        generate_many(wrong, PROMPTS[:3], 2, rows=2)
