"""Initialization of a Feedback Transformer from a parallel transformer."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.feedback import FeedbackAttention
from jaxmodels.feedback.parallel import ApproximateWarning, from_parallel
from jaxmodels.weights.names import flat_arrays
from tests.common import assert_close, language_model, normal, run, token_ids

TABLES = ("key_pos_embeddings", "key_pos_bias")


@pytest.mark.slow
def test_every_weight_is_copied():
    parallel = language_model("relative")
    feedback = from_parallel(parallel)
    source, copied = flat_arrays(parallel), flat_arrays(feedback)
    assert len(copied) == len(source) + 1
    np.testing.assert_array_equal(copied["transformer", "weights"], np.ones(3, np.float32))
    for path, array in source.items():
        new = tuple({"encoder": "transformer", "self_attn": "attn"}.get(w, w) for w in path if w != "projection")
        kept = array[: FeedbackAttention.P] if path[-1] in TABLES else array
        np.testing.assert_array_equal(copied[new], kept)
    assert run(feedback, token_ids(0, 7, 2)).shape == (7, 2, parallel.n_vocab)
    assert feedback.transformer.config() == {
        name: getattr(parallel, name) for name in ("d_model", "heads", "d_ff", "n_layers", "dropout_prob")
    } | {"memory": None}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_attention_is_the_parallel_layers_over_the_same_tokens():
    """The copied tables give each distance the row it had: distances 1 and more, as the parallel layer sees them."""
    parallel = language_model("relative")
    attention, ours = parallel.encoder.layers[1].self_attn, from_parallel(parallel).transformer.layers[1].attn
    memory, query = normal(0, 9, 2, 12), normal(1, 1, 2, 12)
    together = jnp.concatenate([memory, query])
    seen = (jnp.arange(10) < 9)[None, :, None]  # the parallel query without itself: distances 9 … 1
    theirs = attention(query=query, key=together, value=together, mask=seen)
    assert_close(ours(query=query[0], key=memory, value=memory), theirs[0])


@pytest.mark.usefixtures("x64")
def test_shared_keys_and_values_are_means_and_the_value_biases_move_on():
    parallel = language_model("relative")
    with pytest.warns(ApproximateWarning, match="key.*value"):
        model = from_parallel(parallel, "FeedbackTransformerKV", memory=7)
    assert model.transformer.memory == 7
    layers = [layer.self_attn for layer in parallel.encoder.layers]
    for name in ("key", "value"):
        mean = sum(getattr(layer, name).linear.kernel[...] for layer in layers) / len(layers)
        assert_close(getattr(model.transformer, name).linear.kernel[...], mean)
    values = normal(0, 5, 12)
    for ours, theirs in zip(model.transformer.layers, layers, strict=True):
        assert_close(ours.attn.output(values), theirs.output(values + theirs.value.linear.bias))


def test_refuses_another_attention_or_variant():
    with pytest.raises(ValueError, match="attention='rotary'"):
        from_parallel(language_model("rotary"))
    with pytest.raises(ValueError, match="RelativeMultiHeadAttention"):
        from_parallel(language_model("relative").encoder.layers[0].self_attn)
    with pytest.raises(ValueError, match=r"variant='Feedback'.*FeedbackTransformer, FeedbackTransformerKV"):
        from_parallel(language_model("relative"), "Feedback")
