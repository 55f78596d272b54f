"""What lm-eval and its libraries would read or run in the place of what is published, or without being told to."""

import contextlib
import functools
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


@contextlib.contextmanager
def nothing_else() -> Iterator[None]:
    """Context of lm-eval with all of the others here."""
    with contextlib.ExitStack() as stack:
        for context in (metrics_not_here, data_sets_not_here, code_beside_models_not_run, files_not_asked_for):
            stack.enter_context(context())
        stack.enter_context(repository_here_not_asked())
        yield


@contextlib.contextmanager
def metrics_not_here() -> Iterator[None]:
    """Context in which `evaluate` raises ValueError instead of running code in a folder of a published metric's name.

    `evaluate.load("rouge")`, which tasks call, prefers the code in ./rouge/rouge.py to the published metric, and
    `evaluate.load("ORG/NAME")` that in ./ORG/NAME/NAME.py. Paths that begin with ./, ../ or / are a task's own.
    """

    def check(path: str, *_: Any, **__: Any) -> None:
        if not is_explicit(path) and os.path.lexists(path):
            raise ValueError(
                f"{path} in the current folder would run as the metric of that name; start the command in another "
                "folder"
            )

    with checked("evaluate.loading", "evaluation_module_factory", check):
        yield


@contextlib.contextmanager
def code_beside_models_not_run() -> Iterator[None]:
    """Context in which `transformers` raises ValueError instead of running code that lies beside a model or tokenizer.

    Tasks that measure their prompts in tokens, such as those of RULER, read the tokenizer of --model_args with
    trust_remote_code=True, whoever made it. `--trust_remote_code` of the command line allows it.
    """

    def check(pretrained_model_name_or_path: Any, *_: Any, **__: Any) -> None:
        import datasets

        if not getattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", False):  # lm-eval sets it
            raise ValueError(
                f"{pretrained_model_name_or_path} names code of its own, which a task would run; "
                "--trust_remote_code allows it"
            )

    with checked("transformers.dynamic_module_utils", "get_cached_module_file", check):
        yield


@contextlib.contextmanager
def files_not_asked_for() -> Iterator[None]:
    """Context in which `transformers` raises ValueError instead of taking the path of a file for an id of the Hub.

    The tokenizer of --model_args may be a file here; tasks that read it, too, need its folder.
    """

    def check(path_or_repo_id: Any, *_: Any, **__: Any) -> None:
        if os.path.isfile(path_or_repo_id):
            raise ValueError(f"{path_or_repo_id} is a file; a task that reads the tokenizer, too, needs its folder")

    with checked("transformers.utils.hub", "cached_files", check):
        yield


def is_explicit(path: str) -> bool:
    """True for a path that is no name of something published."""
    return path.split("/")[0] in ("", ".", "..")


@contextlib.contextmanager
def checked(module: str, name: str, check: Function) -> Iterator[None]:
    """Context in which a function of a module calls `check` with its arguments first, also if it is imported later.

    An error of `check` is raised at the end of the context, too, whatever caught it before: tasks report metrics that
    fail to load, and go on.
    """
    refused: list[ValueError] = []
    active = True

    def replace(found: ModuleType) -> None:
        original: Function = getattr(found, name)

        @functools.wraps(original)
        def replaced(*arguments: Any, **settings: Any) -> Any:
            if active:
                try:
                    check(*arguments, **settings)
                except ValueError as error:
                    refused.append(error)
                    raise
            return original(*arguments, **settings)

        setattr(found, name, replaced)
        undo.callback(setattr, found, name, original)

    with contextlib.ExitStack() as undo:
        if module in sys.modules:
            replace(sys.modules[module])
        else:
            finder = WhenImported(module, replace)
            sys.meta_path.insert(0, finder)
            undo.callback(finder.leave)
        try:
            yield
        except Exception:
            if refused:
                raise refused[0] from None
            raise
        finally:
            active = False
    if refused:
        raise refused[0]


class WhenImported(importlib.abc.MetaPathFinder):
    """Finder that calls a function with a module right after its import."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def leave(self) -> None:
        """Find nothing any more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Spec of the module, as the other finders give it, whose execution ends with the function; None for others."""
        if name != self.name:
            return None
        self.leave()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def data_sets_not_here() -> Iterator[None]:
    """Context in which `datasets` raises ValueError instead of reading a folder of the name of a published data set.

    `load_dataset("EleutherAI/lambada_openai")` prefers ./EleutherAI/lambada_openai, whose README.md may name files at
    any address. Tasks name their data sets in YAML or in code, so the call is checked. Paths that begin with ./, ../ or
    / and the builders of `datasets`, such as json, which it prefers to folders, are read as ever.
    """

    def check(path: str, *_: Any, **__: Any) -> None:
        from datasets.load import _PACKAGED_DATASETS_MODULES

        if not is_explicit(path) and path not in _PACKAGED_DATASETS_MODULES and os.path.isdir(path):
            raise ValueError(
                f"{path} in the current folder would be read as the data set of that name; start the command "
                f"in another folder, or write ./{path} as the dataset_path of a task of your own"
            )

    with checked("datasets.load", "dataset_module_factory", check):
        yield


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
