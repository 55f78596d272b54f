"""A small embedder for the tests of this folder."""

from typing import Any

import pytest


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> tuple[str, Any]:
    """A small BERT of random weights, and the folder where it is with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sea", "was", "calm", "kings"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 5}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).eval()
    bert.save_pretrained(folder)
    return str(folder), bert
