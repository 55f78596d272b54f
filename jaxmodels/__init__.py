"""PyTorch models in JAX, with proof that the numbers agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodels.models import load, register, save

__version__ = "0.2.0"
__all__ = ["__version__", "load", "register", "save"]


def __getattr__(name: str) -> Any:
    # `import jaxmodels` alone stays instant: JAX, Flax and Orbax come with the first use.
    if name in ("load", "register", "save"):
        from jaxmodels import models

        return getattr(models, name)
    raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}")
