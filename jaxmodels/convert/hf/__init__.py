"""GPT-NeoX checkpoints in the format of `transformers` (GPTNeoXForCausalLM): config.json and the weights' files."""

from jaxmodels.convert.hf.config import read_config
from jaxmodels.convert.hf.names import twin_names
from jaxmodels.convert.hf.read import load_hf, open_hf
from jaxmodels.convert.hf.write import save_hf, write_hf

__all__ = ["load_hf", "open_hf", "read_config", "save_hf", "twin_names", "write_hf"]
