"""`suggest`: what it pairs, what it calls ambiguous, and how a run resolves that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

import parity
from parity.compare.suggest.compression import compressed
from parity.compare.suggest.layers import Pair
from parity.compare.suggest.similarity import exchanged, similarity, tokens
from parity.compare.weights import Mapped

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((3, 5)).astype(np.float32)
SEQUENCE = RNG.standard_normal((2, 4, 5)).astype(np.float32)


class Tree(nnx.Module):
    """A Flax module that holds arrays, by path and shape, and has no call."""

    def __init__(self, shapes):
        for path, shape in shapes.items():
            node = self
            *owners, last = path.split(".")
            for word in owners:
                if not hasattr(node, word):
                    setattr(node, word, Tree({}))
                node = getattr(node, word)
            setattr(node, last, nnx.Param(jnp.zeros(shape)))


def dense(*paths, i=5, o=5):
    """Shapes of Linear layers."""
    return {f"{path}.{name}": shape for path in paths for name, shape in (("kernel", (i, o)), ("bias", (o,)))}


def carried(module, tree, names):
    """Flax's path of every tensor."""
    return {piece.key: ".".join(map(str, piece.path)) for piece in Mapped(module, tree, names).pieces}


class Block(nn.Module):
    """An attention and a feed-forward network of square matrices, which shapes cannot tell apart."""

    def __init__(self, cross=False):
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(5, 5) for name in ("k_proj", "v_proj", "q_proj", "out_proj")})
        if cross:
            self.encoder_attn = nn.ModuleDict(
                {name: nn.Linear(5, 5) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
            )
        self.fc1, self.fc2 = nn.Linear(5, 5), nn.Linear(5, 5)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(Block(cross=True) for _ in range(3))})


PARTS = ("attention.query", "attention.key", "attention.value", "attention.out", "up", "down")
CROSS = ("cross_attention.query", "cross_attention.key", "cross_attention.value", "cross_attention.out")


def translator(layer="layers.{}"):
    """A port's arrays, with the decoder first."""
    layers = [layer.format(i) for i in range(3)]
    decoder = dense(*(f"decoder.{each}.{part}" for each in layers for part in (*CROSS, *PARTS)))
    return Tree(decoder | dense(*(f"encoder.{each}.{part}" for each in layers for part in PARTS)))


@pytest.mark.parametrize("layer", ["layers.{}", "block_{}"])
def test_layers_are_matched_alike_and_roles_are_not_exchanged(layer):
    module, tree = Translator(), translator(layer)
    suggestion = parity.suggest(module, tree)
    assert suggestion.complete, str(suggestion)
    found = carried(module, tree, suggestion.names)
    for i in range(3):
        flax = layer.format(i)
        assert found[f"encoder.layers.{i}.self_attn.q_proj.weight"] == f"encoder.{flax}.attention.query.kernel"
        assert found[f"decoder.layers.{i}.self_attn.k_proj.bias"] == f"decoder.{flax}.attention.key.bias"
        assert found[f"decoder.layers.{i}.encoder_attn.v_proj.bias"] == f"decoder.{flax}.cross_attention.value.bias"
        assert found[f"decoder.layers.{i}.fc1.weight"] == f"decoder.{flax}.up.kernel"


def test_names_are_short_where_linen_numbers_the_layers():
    suggestion = parity.suggest(Translator(), translator("block_{}"))
    assert suggestion.names["encoder.layers.*.fc1"] == "encoder.block_*.up"
    assert len(suggestion.names) == 21


def test_which_of_two_gates_is_not_guessed():
    module = nn.ModuleDict({name: nn.Linear(5, 7) for name in ("w1", "w3")} | {"w2": nn.Linear(7, 5)})
    suggestion = parity.suggest(module, Tree(dense("gate_proj", "up_proj", o=7) | dense("down_proj", i=7)))
    assert suggestion.names["w2"] == "down_proj"
    assert sorted(suggestion.ambiguous) == ["w1", "w3"]


def test_numbered_rows_are_paired_by_rank():
    module = nn.ModuleDict({f"layer{i}": nn.ModuleDict({"fc": nn.Linear(5, 5)}) for i in (1, 2, 3)})
    suggestion = parity.suggest(module, Tree(dense(*(f"stages.{i}.fc" for i in range(3)))))
    assert suggestion.names == {"layer1": "stages.0", "layer2": "stages.1", "layer3": "stages.2"}
    assert suggestion.complete


def test_a_stack_of_layers_is_one_array():
    module = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
    arrays = {p: (3, *shape) for p, shape in dense(*(f"blocks.{part}" for part in PARTS)).items()}
    suggestion = parity.suggest(module, Tree(arrays))
    assert suggestion.complete, str(suggestion)
    assert suggestion.names["layers"] == "blocks"
    assert suggestion.names["layers.*.fc2"] == "blocks.*.down"


def test_a_collection_called_layer_is_no_stack():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList(nn.ModuleDict({"dense": nn.Linear(5, 7)}) for _ in range(2))
            self.table = nn.Embedding(11, 5)
            self.table.weight.requires_grad_(False)

    module = nn.ModuleDict({"encoder": Encoder()})
    tree = Tree(dense("encoder.layer.0.dense", "encoder.layer.1.dense", o=7))
    suggestion = parity.suggest(module, tree)
    assert suggestion.names == {"encoder.table.weight": None}  # frozen: it needs no counterpart
    assert suggestion.complete


def test_equal_names_count_more_than_fitting_shapes():
    class Conv1D(nn.Module):  # as that of transformers, whose weight is [in, out]
        def __init__(self, i, o):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(i, o)), nn.Parameter(torch.zeros(o))

    module = nn.ModuleDict({"c_fc": Conv1D(5, 7), "c_proj": Conv1D(7, 5)})
    tree = Tree({"c_fc.kernel": (7, 5), "c_fc.bias": (7,), "c_proj.kernel": (5, 7), "c_proj.bias": (5,)})
    assert parity.suggest(module, tree).names == {}
    wrapped = nn.ModuleDict({"mlp": module})
    suggestion = parity.suggest(wrapped, tree)
    assert carried(wrapped, tree, suggestion.names)["mlp.c_fc.weight"] == "c_fc.kernel"


class Three(nn.Module):
    """Layers that neither names nor shapes tell apart, only what they compute."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(5, 5) for _ in range(3))
        self.n1, self.n2 = nn.LayerNorm(5), nn.LayerNorm(5)

    def forward(self, x):
        return self.n2(self.three(torch.tanh(self.n1(self.two(torch.relu(self.one(x)))))))


class Fruit(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.apple, self.pear, self.plum = (nnx.Linear(5, 5, rngs=rngs) for _ in range(3))
        self.red, self.blue = (nnx.LayerNorm(5, epsilon=1e-5, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.red(self.apple(jnp.tanh(self.blue(self.plum(jax.nn.relu(self.pear(x)))))))


class Compact(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Dense(5)(x))
        x = linen.LayerNorm(epsilon=1e-5)(linen.Dense(5)(x))
        return linen.LayerNorm(epsilon=1e-5)(linen.Dense(5)(jnp.tanh(x)))


def test_an_assignment_by_order_alone_is_ambiguous_until_it_is_run():
    torch.manual_seed(0)
    module = Three()
    guess = parity.suggest(module, Fruit())
    assert not guess.complete
    assert guess.names == {"one": "apple", "two": "pear", "three": "plum", "n1": "red", "n2": "blue"}
    assert guess.ambiguous["one"] == ["pear", "plum"]
    assert guess.ambiguous["n1"] == ["blue"]
    found = parity.suggest(module, Fruit(), ROWS, verify=True)
    assert found.complete, str(found)
    assert found.names == {"one": "pear", "two": "plum", "three": "apple", "n1": "blue", "n2": "red"}


def test_the_order_of_calls_in_linen_is_taken_but_is_a_guess():
    torch.manual_seed(0)
    names = {"one": "Dense_0", "two": "Dense_1", "three": "Dense_2", "n1": "LayerNorm_0", "n2": "LayerNorm_1"}
    guess = parity.suggest(Three(), Compact(), ROWS)
    assert guess.names == names
    assert sorted(guess.ambiguous) == sorted(names)


def test_no_candidate_that_agrees_leaves_the_ambiguity():
    class Torch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.LayerNorm(5), nn.LayerNorm(5)

        def forward(self, x):
            return self.two(self.one(x))

    class Flax(nnx.Module):
        def __init__(self):
            self.red, self.blue = (nnx.LayerNorm(5, rngs=nnx.Rngs(0)) for _ in range(2))

        def __call__(self, x):
            return jnp.sin(x)

    suggestion = parity.suggest(Torch(), Flax(), ROWS, verify=True)
    assert suggestion.ambiguous == {"one": ["blue"], "two": ["red"]}
    assert suggestion.note in str(suggestion)
    assert "verify=True" in suggestion.note
    assert parity.suggest(Torch(), Flax(), ROWS).note == ""


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn, self.head = kind(5, 7, batch_first=True, **settings), nn.Linear(7, 3)


class Cells(linen.Module):
    cells: tuple[type, ...]

    @linen.compact
    def __call__(self, x):
        for cell in self.cells:
            x = linen.RNN(cell(7))(x)
        return linen.Dense(3)(x)


@pytest.mark.parametrize(
    ("kind", "cell"), [(nn.LSTM, linen.LSTMCell), (nn.LSTM, linen.OptimizedLSTMCell), (nn.GRU, linen.GRUCell)]
)
def test_recurrent_layers_are_their_cells(kind, cell):
    suggestion = parity.suggest(Recurrent(kind), Cells((cell,)), SEQUENCE)
    assert suggestion.complete, str(suggestion)
    assert suggestion.names["rnn"] == f"{cell.__name__}_0"


def test_each_level_of_a_recurrent_layer_has_a_cell_of_its_own():
    suggestion = parity.suggest(Recurrent(nn.LSTM, num_layers=2), Cells((linen.LSTMCell,) * 2), SEQUENCE)
    assert suggestion.complete, str(suggestion)
    assert suggestion.names["rnn.weight_hh_l1"] == "LSTMCell_1"


def test_packed_attention_is_taken_apart():
    class Flax(nnx.Module):
        def __init__(self):
            self.mix = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))

    suggestion = parity.suggest(nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2)}), Flax())
    assert suggestion.complete, str(suggestion)
    assert suggestion.names["attn.in_proj_bias"] == ["mix.query.bias", "mix.key.bias", "mix.value.bias"]


def test_settings_of_the_check_are_taken():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.extra = nn.Linear(5, 7), nn.Linear(2, 2)

        def forward(self, x):
            return self.lin(x)

    class Flagged(linen.Module):
        @linen.compact
        def __call__(self, x, *, mode):
            assert mode == "quiet"
            return linen.Dense(7)(x)

    suggestion = parity.suggest(Buffered(), Flagged(), ROWS, flax_kwargs={"mode": "quiet"}, torch_only=["extra.*"])
    assert suggestion.names == {"lin": "Dense_0"}
    assert suggestion.complete


def test_parts_without_a_counterpart_are_listed():
    suggestion = parity.suggest(Three(), Tree(dense("other", i=2, o=3)))
    assert not suggestion.complete
    assert suggestion.unmatched_torch == ["one", "two", "three", "n1", "n2"]
    assert suggestion.unmatched_flax == ["other"]
    assert "no counterpart in PyTorch: other" in str(suggestion)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"torch_module=Fruit, flax_module=Three"):
        parity.suggest(Fruit(), Three())
    with pytest.raises(ValueError, match="inputs=None"):
        parity.suggest(Three(), Compact())
    with pytest.raises(ValueError, match="inputs=None: verify=True"):
        parity.suggest(Three(), Fruit(), verify=True)


def test_similar_names():
    assert tokens(("h", "3", "ln_1")) == tokens(("layers", "3", "norm1"))
    assert similarity(("encoder", "fc1"), ("encoder", "fc1")) > similarity(("encoder", "fc1"), ("encoder", "up"))
    assert similarity(("attn", "q"), ("attention", "query")) > similarity(("attn", "q"), ("attention", "key"))
    assert exchanged("encoder.fc", "decoder.fc", cross=False)
    assert exchanged("layer.encoder_attn.q", "layer.self_attention.q", cross=True)
    assert not exchanged("layer.encoder_attn.q", "layer.cross_attention.q", cross=True)


def test_names_that_layers_do_not_share_are_not_starred():
    pairs = [Pair("h.0.a.weight", ("b.0.x.kernel",)), Pair("h.1.a.weight", ("b.1.y.kernel",))]
    assert compressed(pairs, [("h", "b")], ["h.0.mask"], []) == {
        "h": "b",
        "h.0.a": "b.0.x",
        "h.1.a": "b.1.y",
        "h.*.mask": None,
    }
