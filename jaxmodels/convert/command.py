"""`python -m jaxmodels.convert`: checkpoints between PyTorch and Flax."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmodels import programs
from jaxmodels.convert.arguments import NAMES, parser, read_json

PROGRAM = "python -m jaxmodels.convert"


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run a conversion and return the exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)

    def printed() -> int:
        good, message = run(options)
        print(message)
        return 0 if good else 1

    return programs.run(printed, f"{prog} {options.format}")


def run(options: argparse.Namespace) -> tuple[bool, str]:
    """Whether all is well, and what to say."""
    if options.format == "torch":
        return True, to_torch_file(options) if options.source.is_dir() else from_torch_file(options)
    from jaxmodels.convert import operations

    with float64_allowed():
        if options.format == "verify":
            return operations.verify(options)
        return True, {"neox": operations.neox, "inspect": operations.inspect}[options.format](options)


def from_torch_file(options: argparse.Namespace) -> str:
    """FILE.pt -> folder. Everything is checked before anything is written."""
    from flax import nnx

    import jaxmodels
    from jaxmodels.io.atomic import check_target
    from jaxmodels.io.torch_files import read_state_dict
    from jaxmodels.models import build
    from jaxmodels.weights.names import from_torch

    if not options.source.exists():
        raise ValueError(f"{options.source} does not exist")
    if options.model is None or options.config is None:
        raise ValueError(f"{options.source} is a .pt file: say with --model and --config what it holds")
    check_target(options.target, overwrite=options.overwrite, source=options.source)
    name, config = configured(options.model, read_json(options.config))
    with float64_allowed():
        abstract = nnx.eval_shape(lambda: build(name, config))
        model = from_torch(abstract, read_state_dict(options.source, options.key), options.dtype)
        jaxmodels.save(model, options.target, overwrite=options.overwrite)
        return f"{options.target}: {summary(name, model)}"


def to_torch_file(options: argparse.Namespace) -> str:
    """Folder -> FILE.pt."""
    import jax

    import jaxmodels
    from jaxmodels.io.torch_files import write_state_dict
    from jaxmodels.weights.names import is_floating, to_torch

    if options.target.is_dir():
        raise ValueError(f"{options.target} is a folder, not a file to write to")
    if options.target.exists() and not options.overwrite:
        raise ValueError(f"{options.target} exists; name another file, or pass --overwrite")
    for flag in ("model", "config", "key"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} says what a .pt file holds; {options.source} is a folder with a config.json")
    with float64_allowed():
        model = jaxmodels.load(options.source)
        arrays = to_torch(model)
    if options.dtype:
        arrays = {k: a.astype(jax.numpy.dtype(options.dtype)) if is_floating(a.dtype) else a for k, a in arrays.items()}
    write_state_dict(options.target, arrays)
    return f"{options.target}: {summary(type(model).__name__, model)}"


def configured(model: str, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class and arguments; raises ValueError where the configuration contradicts the model's name.

    The attentions rotary, rotary_value and plain have the same parameters: no shape would tell them apart.
    """
    name, said = NAMES[model]
    if {"model", "config"} <= config.keys():  # a config.json as this tool writes it
        if config["model"] != name:
            raise ValueError(f"--config is for {config['model']}, --model {model} is a {name}")
        config = config["config"]
    for argument, value in said.items():
        if config.get(argument, value) != value:
            raise ValueError(f"--model {model} has {argument}={value!r}, --config says {config[argument]!r}")
    if model == "synthesizer" and config.get("attention") in (None, "rotary", "rotary_value", "relative", "plain"):
        raise ValueError(f"--model synthesizer: --config has no synthesizer's attention: {config.get('attention')!r}")
    return name, said | config


@contextlib.contextmanager
def float64_allowed() -> Iterator[None]:
    """A float64 checkpoint stays float64; for all threads, as Orbax reads in its own."""
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def summary(name: str, model: Any) -> str:
    from jaxmodels.weights.names import flat_arrays

    arrays = list(flat_arrays(model).values())
    dtypes = ", ".join(sorted({str(array.dtype) for array in arrays}))
    return f"{name}, {sum(array.size for array in arrays):,} parameters in {len(arrays)} arrays, {dtypes}"
