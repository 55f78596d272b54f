"""The model type "jaxmodels" in lm-evaluation-harness. Imports the standard library alone.

lm-eval 0.4 has no plugins: a model type exists once it was registered in the process. PyTorch, which lm-eval imports
before it looks up a model, calls the entry points of the group torch.backends; pyproject.toml names `register_if_used`
there, so that `python -m lm_eval --model jaxmodels …` finds the model. Without PyTorch, or with
TORCH_DEVICE_BACKEND_AUTOLOAD=0, use `jaxmodels lm-eval …`, which takes the same arguments.
"""

import sys

NAME = "jaxmodels"
TARGET = "jaxmodels.scoring.lm_eval:JaxModelsLM"  # imported when the model is made


def register_if_used() -> None:
    """Register the model type in a process that has imported lm_eval; otherwise do nothing."""
    if "lm_eval" in sys.modules:
        register()


def register() -> None:
    """Register the model type, once; raises ModuleNotFoundError if lm_eval is not installed."""
    from lm_eval import models  # noqa: F401  # first: it registers lm-eval's own types only in an empty registry
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
