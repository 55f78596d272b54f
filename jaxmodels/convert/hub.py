"""Hugging Face's Hub: an id such as EleutherAI/pythia-70m becomes a local folder, by huggingface_hub."""

import re
from pathlib import Path

from jaxmodels.process.extras import require

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


def is_id(source: str) -> bool:
    """True for a text that may be the id of a model, ORG/NAME."""
    return ID.fullmatch(source) is not None


def download(name: str, revision: str | None = None) -> Path:
    """Folder of a model in the Hub's cache, downloaded if it is not there."""
    require("hub", "huggingface_hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
