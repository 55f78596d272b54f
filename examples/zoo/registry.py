"""The pairs: a configuration, the class of the model, its inputs, and constants that only one side takes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BATCH, LENGTH, TARGET, VOCABULARY = 2, 9, 7, 97
Arrays = dict[str, np.ndarray]
Maker = Callable[[np.random.Generator], Arrays]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of transformers in PyTorch and its port to Flax; the Flax class is called Flax + model."""

    model: str
    config: Callable[[Any], Any]
    inputs: Maker
    torch_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flax_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def channels_last(self) -> tuple[str, ...]:
        """Images have their channels last in the Flax module; the Flax model's wrapper transposes them."""
        return ("pixel_values",) if "pixel_values" in self.inputs(np.random.default_rng(0)) else ()


PAIRS: dict[str, Pair] = {}


def ids(rng: np.random.Generator, length: int = LENGTH) -> np.ndarray:
    """Token ids without padding."""
    return rng.integers(3, 90, (BATCH, length))


def positions(length: int = LENGTH) -> np.ndarray:
    """Positions of the tokens, as the Flax model's wrapper passes them."""
    return np.tile(np.arange(length), (BATCH, 1))


def mask() -> np.ndarray:
    """An attention mask whose second row ends early."""
    found = np.ones((BATCH, LENGTH), np.int64)
    found[1, -2:] = 0
    return found


def tokens(rng: np.random.Generator) -> Arrays:
    """Ids and mask."""
    return {"input_ids": ids(rng), "attention_mask": mask()}


def placed(rng: np.random.Generator) -> Arrays:
    """Ids, mask and positions."""
    return tokens(rng) | {"position_ids": positions()}


def segments(rng: np.random.Generator) -> Arrays:
    """Ids, mask and segments of a sentence pair."""
    return tokens(rng) | {"token_type_ids": np.tile(np.arange(LENGTH) > 4, (BATCH, 1)).astype(np.int64)}


def sentence_pair(rng: np.random.Generator) -> Arrays:
    """Ids, mask, segments and positions."""
    return segments(rng) | {"position_ids": positions()}


def offset_pair(rng: np.random.Generator) -> Arrays:
    """The same for RoBERTa, whose positions start after the padding index."""
    return segments(rng) | {"position_ids": positions() + 2}


def padded_pair(rng: np.random.Generator) -> Arrays:
    """A sentence pair that ends in padding tokens."""
    given = sentence_pair(rng)
    given["input_ids"][1, -2:] = 0
    return given


def translation(rng: np.random.Generator) -> Arrays:
    """Ids and masks of an encoder and a decoder."""
    ones = np.ones((BATCH, TARGET), np.int64)
    return tokens(rng) | {"decoder_input_ids": ids(rng, TARGET), "decoder_attention_mask": ones}


def images(size: int) -> Maker:
    """Square images of three channels."""

    def make(rng: np.random.Generator) -> Arrays:
        return {"pixel_values": rng.standard_normal((BATCH, 3, size, size)).astype(np.float32)}

    return make


def waves(name: str) -> Maker:
    """Audio samples."""
    return lambda rng: {name: rng.standard_normal((BATCH, 400)).astype(np.float32)}


def both(*makers: Maker) -> Maker:
    """The inputs of several makers."""
    return lambda rng: {name: array for maker in makers for name, array in maker(rng).items()}


def prefix(rng: np.random.Generator) -> Arrays:
    """Inputs of the decoder of a model whose encoder takes something else."""
    return {"decoder_input_ids": ids(rng, TARGET), "decoder_attention_mask": np.ones((BATCH, TARGET), np.int64)}


def spectrogram(rng: np.random.Generator) -> Arrays:
    """Log-mel features, and the ids of the decoder."""
    features = rng.standard_normal((BATCH, 8, 24)).astype(np.float32)
    return {"input_features": features, "decoder_input_ids": ids(rng, TARGET)}


SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "use_cache": False,
    **SPECIAL,
}
T5: dict[str, Any] = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "use_cache": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SPEECH: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "vocab_size": 31,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
RESIDUAL: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}


ENDINGS = (
    "ForConditionalGeneration",
    "ForImageClassification",
    "ForCausalLM",
    "ForMaskedLM",
    "LMHeadModel",
    "MTModel",
    "Model",
)


def pair(name: str, model: str, inputs: Maker, flax: Mapping[str, Any] | None = None, **sizes: Any) -> None:
    """Register a pair; the configuration's class is called like the model, without its ending."""
    config = next(model.removesuffix(ending) for ending in ENDINGS if model.endswith(ending))
    PAIRS[name] = Pair(model, lambda library: getattr(library, f"{config}Config")(**sizes), inputs, {}, flax or {})


UNMASKED = {"head_mask": None}  # an argument without a default
TARGETS = {"decoder_position_ids": positions(TARGET)}
SOURCES = {"position_ids": positions(), **TARGETS}

# Encoders
pair("bert", "BertModel", sentence_pair, **SMALL)
pair("bert_padding", "BertModel", padded_pair, **SMALL)
pair("bert_mlm", "BertForMaskedLM", sentence_pair, flax=UNMASKED, **SMALL)
pair("roberta", "RobertaModel", offset_pair, **SMALL)
pair("xlm_roberta", "XLMRobertaModel", offset_pair, **SMALL)
pair("roberta_prenorm", "RobertaPreLayerNormModel", offset_pair, **SMALL)
pair("albert", "AlbertModel", sentence_pair, embedding_size=16, **SMALL)
pair("electra", "ElectraModel", sentence_pair, embedding_size=16, **SMALL)
pair(
    "distilbert",
    "DistilBertModel",
    tokens,
    dim=24,
    n_layers=2,
    n_heads=4,
    hidden_dim=37,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
)
pair("roformer", "RoFormerModel", segments, flax=UNMASKED, **SMALL)
pair("bigbird", "BigBirdModel", sentence_pair, flax=UNMASKED, attention_type="original_full", **SMALL)

# Decoders
pair("gpt2", "GPT2LMHeadModel", placed, **GPT)
pair(
    "gpt_neo",
    "GPTNeoForCausalLM",
    placed,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    intermediate_size=37,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    window_size=4,
    use_cache=False,
    **SPECIAL,
)
pair("gptj", "GPTJForCausalLM", placed, rotary_dim=4, tie_word_embeddings=False, **GPT)
pair(
    "opt",
    "OPTForCausalLM",
    placed,
    hidden_size=24,
    num_hidden_layers=2,
    ffn_dim=37,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    word_embed_proj_dim=24,
    use_cache=False,
)
pair("bloom", "BloomForCausalLM", tokens, hidden_size=24, n_layer=2, n_head=4, vocab_size=VOCABULARY, use_cache=False)
pair("llama", "LlamaForCausalLM", placed, use_cache=False, **SMALL)
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "use_cache": False}
pair("mistral", "MistralForCausalLM", placed, sliding_window=4, **GROUPED)
pair("mistral_nowindow", "MistralForCausalLM", placed, sliding_window=None, **GROUPED)
pair("mistral_long", "MistralForCausalLM", placed, sliding_window=64, **GROUPED)
pair("gemma", "GemmaForCausalLM", placed, num_key_value_heads=1, head_dim=6, use_cache=False, **SMALL)
pair(
    "xglm",
    "XGLMForCausalLM",
    placed,
    d_model=24,
    num_layers=2,
    attention_heads=4,
    ffn_dim=37,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    use_cache=False,
)

# Encoder and decoder
pair("t5", "T5ForConditionalGeneration", translation, **T5)
pair(
    "mt5",
    "MT5ForConditionalGeneration",
    translation,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    **T5,
)
pair("longt5", "LongT5ForConditionalGeneration", translation, encoder_attention_type="local", local_radius=3, **T5)
pair(
    "longt5_tglobal",
    "LongT5ForConditionalGeneration",
    translation,
    encoder_attention_type="transient-global",
    local_radius=3,
    global_block_size=3,
    **T5,
)
for NAME, CLASS in {
    "bart": "Bart",
    "mbart": "MBart",
    "pegasus": "Pegasus",
    "blenderbot": "Blenderbot",
    "blenderbot_small": "BlenderbotSmall",
}.items():
    pair(NAME, f"{CLASS}ForConditionalGeneration", translation, flax=SOURCES, **BART)
pair("marian", "MarianMTModel", translation, flax=SOURCES, pad_token_id=0, decoder_start_token_id=0, **BART)
pair(
    "whisper",
    "WhisperForConditionalGeneration",
    spectrogram,
    flax={**TARGETS, "decoder_attention_mask": np.ones((BATCH, TARGET), np.int64)},
    num_mel_bins=8,
    max_source_positions=12,
    max_target_positions=20,
    pad_token_id=0,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
    **SPECIAL,
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
)

# Images
pair("vit", "ViTModel", images(16), intermediate_size=37, **VISION)
pair("beit", "BeitModel", images(16), intermediate_size=37, use_relative_position_bias=True, **VISION)
pair("dinov2", "Dinov2Model", images(16), mlp_ratio=2, **VISION)
pair("clip_text", "CLIPTextModel", placed, eos_token_id=96, **SMALL)
pair("clip_vision", "CLIPVisionModel", images(16), intermediate_size=37, **VISION)
pair("resnet", "ResNetModel", images(32), layer_type="basic", **RESIDUAL)
pair("resnet_cls", "ResNetForImageClassification", images(32), layer_type="bottleneck", num_labels=5, **RESIDUAL)
pair("regnet", "RegNetModel", images(32), layer_type="y", groups_width=4, **RESIDUAL)

# Speech, and models of two models
pair("wav2vec2", "Wav2Vec2Model", waves("input_values"), flax={"return_dict": True}, mask_time_prob=0.05, **SPEECH)


def clip_config(library: Any) -> Any:
    """CLIP of a small text and a small image model."""
    text = library.CLIPTextConfig(eos_token_id=96, **SMALL).to_dict()
    vision = library.CLIPVisionConfig(intermediate_size=37, **VISION).to_dict()
    return library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def speech_config(library: Any) -> Any:
    """wav2vec2 and BART's decoder."""
    encoder = library.Wav2Vec2Config(add_adapter=False, mask_time_prob=0.05, **SPEECH)
    decoder = library.BartConfig(is_decoder=True, add_cross_attention=True, **BART)
    return library.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


def captioning_config(library: Any) -> Any:
    """ViT and GPT-2."""
    encoder = library.ViTConfig(intermediate_size=37, **VISION)
    decoder = library.GPT2Config(is_decoder=True, add_cross_attention=True, **GPT)
    return library.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


def heard(rng: np.random.Generator) -> Arrays:
    """A mask for every audio sample."""
    return {"attention_mask": np.ones((BATCH, 400), np.int64)}


PAIRS["clip"] = Pair("CLIPModel", clip_config, both(images(16), placed))
PAIRS["speech_encdec"] = Pair(
    "SpeechEncoderDecoderModel", speech_config, both(waves("inputs"), heard, prefix), {}, TARGETS
)
PAIRS["vision_encdec"] = Pair("VisionEncoderDecoderModel", captioning_config, both(images(16), prefix), {}, TARGETS)
