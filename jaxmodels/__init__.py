"""PyTorch models in JAX, with proof that the numbers agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodels.convert.open import load
    from jaxmodels.models import register, save

__version__ = "0.2.0"
__all__ = ["__version__", "load", "register", "save"]


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that `import jaxmodels` imports neither JAX nor Flax.
    if name == "load":
        from jaxmodels.convert.open import load

        return load
    if name in ("register", "save"):
        from jaxmodels import models

        return getattr(models, name)
    raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
