"""Limits of what a run's files may ask for where the user has not typed it: they may be those of others.

They are not for a run whose config.json has a `signature`: with a key in the user's cache, of hyperparameters that the
user has typed.
"""

import hmac
import itertools
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import read_bytes, read_object
from jaxmodels.process.paths import below
from jaxmodels.process.texts import quoted
from jaxmodels.text.corpora import cache_file, is_downloaded
from jaxmodels.training.config import Config
from jaxmodels.training.step import Program

FILES = 100_000  # in the folder of a text
BYTES = 2**32  # of the main memory in a step
GROWTH = 8  # or as many times the bytes of the checkpoint
KEY_BYTES = 32
SIGNATURE = "signature"  # in a run's config.json

ConfigT = TypeVar("ConfigT", bound=Config)


def signature(about: Mapping[str, Any], *, create: bool = False) -> str | None:
    """HMAC-SHA256 of a config.json with the key in the user's cache; None if there is no key, which `create` makes."""
    file = cache_file().with_name("runs.key")
    try:
        if create and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as new:
                new.touch(0o600)
                new.write_bytes(secrets.token_bytes(KEY_BYTES))
        key, text = read_bytes(file, KEY_BYTES), json.dumps(about, sort_keys=True)
    except (OSError, ValueError, RecursionError):  # such as of a home that cannot be written
        return None
    return hmac.new(key, text.encode(), "sha256").hexdigest() if len(key) == KEY_BYTES else None


def signed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a config.json with its signature, or without one if the user's cache cannot be written."""
    found = signature(about, create=True)
    return {**about, **({} if found is None else {SIGNATURE: found})}


def is_signed(file: Path) -> bool:
    """True if a config.json is as this user's program signed it; False if it cannot be read."""
    try:
        about = dict(read_object(file))
    except (OSError, ValueError):
        return False
    given, found = about.pop(SIGNATURE, None), signature(about)
    return found is not None and isinstance(given, str) and hmac.compare_digest(given.encode(), found.encode())


class Unnamed(Generic[ConfigT]):
    """Base class of experiments: the hyperparameters that a run's files have, and the user has not typed."""

    config: ConfigT
    unnamed: frozenset[str] = frozenset()  # their names
    recorded: str | None = None  # sha256 of the data that the run's files have

    def refuse_unnamed(self, name: str, *, would: str = "be downloaded") -> None:
        """Raise ValueError if a run's files alone have a hyperparameter. would: what would be done with it."""
        if name in self.unnamed and getattr(self.config, name) is not None:
            value = getattr(self.config, name)
            raise ValueError(
                f"{name}={quoted(value)} of the run would {would}; if you trust it, name it yourself: "
                f"--{name.replace('_', '-')} {shlex.quote(value)}"
            )

    def refuse_unnamed_text(self) -> None:
        """Raise ValueError if a run's files alone name a text that is downloaded, or a folder with far too many files.

        The folder may be any: that of others' run may be the root of the file system.
        """
        text = self.config.text
        if is_downloaded(text):
            self.refuse_unnamed("text")
        if "text" in self.unnamed and os.path.isdir(text):
            found = sum(1 for _ in itertools.islice(below(text), FILES + 1))
            if found > FILES:
                raise ValueError(
                    f"text={quoted(text)} of the run is a folder of more than {FILES:,} files; if you trust "
                    f"it, name it yourself: --text {shlex.quote(text)}"
                )

    @property
    def reads_unnamed(self) -> bool:
        """True if a run's files alone name a text of this machine, which may be any."""
        return "text" in self.unnamed and os.path.exists(self.config.text)

    def refuse_unnamed_data(self, sha256: str) -> None:
        """Raise ValueError if a run's files alone name a text of this machine, and not with the checksum of its data.

        Called before anything of a text is printed or written: a model of it would be left in the run's folder.
        """
        if self.reads_unnamed and self.recorded is not None and sha256 != self.recorded:
            text = self.config.text
            raise ValueError(
                f"text={quoted(text)} of the run has not the sha256 that the run names; if you trust it, name the text "
                f"yourself: --text {shlex.quote(text)}"
            )

    def refuse_unnamed_size(self, program: Program, *, stored: bool) -> None:
        """Raise ValueError if a run's files alone name its sizes, and it takes far more main memory than they do.

        Each hyperparameter has a bound, but products of several may have any size. A state is compared at once, unless
        it is stored; a step or evaluation when it is compiled. The memory of accelerators is not the machine's.
        """
        if "batch_size" not in self.unnamed or program.mesh.devices.flat[0].platform != "cpu":
            return
        most = max(BYTES, GROWTH * program.state_bytes * stored)

        def accept(what: str, size: int) -> None:
            if size > most:
                raise ValueError(
                    f"{what} of the run takes {size:,} bytes of memory; at most {most:,} with a batch_size that its "
                    f"files alone name; if you trust it, name it yourself: --batch-size {self.config.batch_size}"
                )

        def accept_compiled(compiled: jax.stages.Compiled) -> None:
            found = compiled.memory_analysis()
            accept("a step", 0 if found is None else found.temp_size_in_bytes)

        if not stored:
            accept("the state", program.state_bytes)
        program.accept = accept_compiled
