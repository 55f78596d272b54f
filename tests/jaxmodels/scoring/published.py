"""A Hugging Face folder for tests of scoring, written by transformers: model, tokenizer and their settings."""

from pathlib import Path

import torch
import transformers

from tests.jaxmodels.tokenizer import byte_level_tokenizer

END = "<|endoftext|>"
V = 307  # the tokenizer's 300, padded


def hugging_face_folder(folder: Path, **settings) -> Path:
    """Write a GPT-NeoX of random weights, large enough that greedy decoding has no near ties."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=V,
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=40,
        max_position_embeddings=61,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token=END, eos_token=END, pad_token=END
    )
    tokenizer.save_pretrained(folder)
    return folder
