"""Folders in the current folder that lm-eval's libraries would take for what is published under the same name."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def refuse_metrics_here() -> None:
    """Raise ValueError if a folder NAME in the current folder has a NAME.py.

    `evaluate.load("rouge")`, which tasks call, prefers the code in ./rouge/rouge.py to the published metric.
    """
    for folder in Path().iterdir():
        code = folder / f"{folder.name}.py"
        if os.path.isfile(code):
            raise ValueError(f"{code} would run as the metric of that name; start the command in another folder")


@contextlib.contextmanager
def data_sets_not_here() -> Iterator[None]:
    """Context in which `datasets` raises ValueError instead of reading a folder of the name of a published data set.

    `load_dataset("EleutherAI/lambada_openai")` prefers ./EleutherAI/lambada_openai, whose README.md may name files at
    any address. Tasks name their data sets in YAML or in code, so the call is checked. Paths that begin with ./, ../ or
    / and the builders of `datasets`, such as json, which it prefers to folders, are read as ever.
    """
    import datasets.load as loading

    original = loading.dataset_module_factory

    @functools.wraps(original)
    def checked(path: str, *arguments: Any, **settings: Any) -> Any:
        explicit = path.split("/")[0] in ("", ".", "..") or path in loading._PACKAGED_DATASETS_MODULES
        if not explicit and os.path.isdir(path):
            raise ValueError(
                f"{path} in the current folder would be read as the data set of that name; start the command "
                f"in another folder, or write ./{path} as the dataset_path of a task of your own"
            )
        return original(path, *arguments, **settings)

    loading.dataset_module_factory = checked
    try:
        yield
    finally:
        loading.dataset_module_factory = original


@contextlib.contextmanager
def repository_here_not_asked() -> Iterator[None]:
    """Context in which lm-eval records no commit of the current folder or those above it; `git_hash` is None.

    Git runs programs that a repository's configuration names, and lm-eval itself reads what a `.git` refers to. The
    current folder may be somebody else's.
    """
    import lm_eval.evaluator
    import lm_eval.loggers.utils

    places = [(lm_eval.evaluator, "get_git_commit_hash"), (lm_eval.loggers.utils, "get_commit_from_path")]
    with contextlib.ExitStack() as stack:
        for module, name in places:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, lambda *_: None)
        yield
