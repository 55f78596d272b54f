"""PyTorch models in JAX, with proof that the numbers agree."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodels.io.checkpoint import load, save

__version__ = "0.1.0"
__all__ = ["__version__", "load", "save"]


def __getattr__(name: str) -> Any:
    # `import jaxmodels` alone stays instant: JAX, Flax and Orbax come with the first use.
    if name in ("load", "save"):
        from jaxmodels.io import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}")
