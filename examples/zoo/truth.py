"""Expected verdicts: the ports that differ from PyTorch, with the lines of transformers that show it."""

import dataclasses
from pathlib import Path

Line = tuple[str, str]
"""A file of transformers and a text that its line contains."""


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a port differs. torch, flax: the lines of both sides. named: only the names differ, the numbers agree."""

    sentence: str
    torch: Line
    flax: Line
    named: bool = False


WINDOW = Cause(
    "Flax keeps the last `window + 1` keys of a position, PyTorch the last `window`: one token too many.",
    ("masking_utils.py", "return kv_idx > q_idx - sliding_window"),
    ("models/mistral/modeling_flax_mistral.py", "jnp.triu(causal_mask, k=-(config.sliding_window or 0))"),
)
NO_WINDOW = Cause(
    "Without a sliding window Flax keeps only the diagonal of the causal mask: each position attends to itself alone.",
    ("models/mistral/modeling_mistral.py", "create_causal_mask if self.config.sliding_window is None"),
    ("models/mistral/modeling_flax_mistral.py", "jnp.triu(causal_mask, k=-(config.sliding_window or 0))"),
)
PADDING = Cause(
    "PyTorch gives the embedding of the padding token no gradient, Flax trains it like the others.",
    ("models/bert/modeling_bert.py", "nn.Embedding(config.vocab_size, config.hidden_size, padding_idx="),
    ("models/bert/modeling_flax_bert.py", "self.word_embeddings = nn.Embed("),
)
BASIC_LAYER = Cause(
    "A basic layer's convolutions are `layer.0` and `layer.1` in PyTorch and `layer.layer_0` and `layer.layer_1` in "
    "Flax, so transformers' own conversion does not load them. With these names the numbers agree.",
    ("models/resnet/modeling_resnet.py", "ResNetConvLayer(in_channels, out_channels, stride=stride),"),
    ("models/resnet/modeling_flax_resnet.py", "self.layer = FlaxResNetBasicLayerCollection("),
    named=True,
)

STATISTICS = Cause(
    "The blocks call their layers without `deterministic`, so that the BatchNorms inside use their running averages in "
    "training mode and never update them; evaluation agrees.",
    ("models/regnet/modeling_regnet.py", "hidden_state = self.layer(hidden_state)"),
    ("models/regnet/modeling_flax_regnet.py", "hidden_state = self.layer(hidden_state)"),
)


def logits_bias(model: str) -> Cause:
    """The cause that BART and the models derived from it share."""
    return Cause(
        "`final_logits_bias` is a buffer in PyTorch and a parameter in Flax, so that an optimizer there holds a state "
        "for it and decays it, though its gradient is stopped.",
        (f"models/{model}/modeling_{model}.py", 'self.register_buffer("final_logits_bias"'),
        (f"models/{model}/modeling_flax_{model}.py", 'self.param("final_logits_bias"'),
    )


BART_FAMILY = ("bart", "mbart", "pegasus", "blenderbot", "blenderbot_small", "marian")
CAUSES = {
    "bert_padding": PADDING,
    "mistral": WINDOW,
    "mistral_nowindow": NO_WINDOW,
    "regnet": STATISTICS,
    "resnet": BASIC_LAYER,
    **{model: logits_bias(model) for model in BART_FAMILY},
}


def differs(name: str) -> bool:
    """True if a port does not compute the same as PyTorch."""
    return name in CAUSES and not CAUSES[name].named


def located(root: Path, line: Line) -> str:
    """'file:number' of the first line that contains a text; raises ValueError if none does."""
    file, text = line
    for number, found in enumerate((root / file).read_text().splitlines(), 1):
        if text in found:
            return f"{file}:{number}"
    raise ValueError(f"{file} of this version of transformers has no line with {text!r}")
