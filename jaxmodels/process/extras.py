"""Optional dependencies: one line that names the extra to install, instead of a traceback.

A module that cannot work without an extra calls `require` before it imports the extra's packages, e.g. as the first
statement of `train/__init__.py`:

    from jaxmodels.process.extras import require

    require("train", "grain", "optax", "orbax.checkpoint", "rich", "tyro")

This file imports the standard library alone.
"""

import importlib.util
import sys
from pathlib import Path

PROGRAMS = ("jaxmodels", "parity", "train", "bench")  # packages with `python -m` commands
SCRIPTS = ("jaxmodels", "parity")  # console commands


class MissingExtra(ModuleNotFoundError):
    """Packages of an extra are not installed.

    extra: name of the extra, as in `pip install 'jaxmodels[extra]'`. modules: import names that cannot be found.
    """

    def __init__(self, extra: str, modules: tuple[str, ...]):
        super().__init__(f"needs {', '.join(modules)}: pip install 'jaxmodels[{extra}]'", name=modules[0])
        self.extra, self.modules = extra, modules

    def __reduce__(self) -> tuple[type["MissingExtra"], tuple[str, tuple[str, ...]]]:
        return MissingExtra, (self.extra, self.modules)  # a worker process sends it to its parent


def require(extra: str, *modules: str) -> None:
    """Check that modules of an extra can be imported, without importing them.

    If one cannot be found, raises MissingExtra, a ModuleNotFoundError. In a process that runs one of the project's own
    commands (`python -m train.rope`, `python -m parity`, `jaxmodels`, …), instead prints one line to standard error,
    "COMMAND: needs MODULE: pip install 'jaxmodels[EXTRA]'", and exits with code 2.

    extra: a name under [project.optional-dependencies] in pyproject.toml. modules: import names, such as "sklearn".
    """
    missing = tuple(module for module in modules if not available(module))
    if not missing:
        return
    error, command = MissingExtra(extra, missing), running_command()
    if command is None:
        raise error
    print(f"{command}: {error}", file=sys.stderr)
    sys.exit(2)


def available(module: str) -> bool:
    """True if a module can be found. Imports its parent packages, not the module itself."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # no parent package
        return False
    except ValueError:  # a module without a spec, made at run time
        return True


def running_command() -> str | None:
    """The project's command that this process runs, as typed: "python -m train.rope", "parity"; None for any other.

    Read from the interpreter's own arguments: the parent packages of `python -m PACKAGE.MODULE` are imported before
    sys.argv is set.
    """
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        if not argument.startswith("-"):
            script = Path(argument).stem
            return script if script in SCRIPTS else None
        for i, letter in enumerate(argument[1:], start=2):
            if letter == "m":
                module = argument[i:] or next(arguments, "")
                return f"python -m {module}" if module.split(".")[0] in PROGRAMS else None
            if letter == "c":
                return None
            if letter in "WX":  # options with a value: the rest of the argument, or the next one
                if not argument[i:]:
                    next(arguments, None)
                break
    return None
