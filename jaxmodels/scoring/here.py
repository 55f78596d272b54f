"""Guards of lm-eval: against what it and its libraries would read or run in the place of what is published."""

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
def guarded(*, code_allowed: bool) -> Iterator[None]:
    """Context of lm-eval with all of the others here. code_allowed: that beside models and tokenizers may run."""
    contexts = [metrics_not_here, data_sets_not_here, files_not_asked_for, repository_here_not_asked]
    with contextlib.ExitStack() as stack:
        for context in contexts if code_allowed else [*contexts, code_beside_models_not_run]:
            stack.enter_context(context())
        yield


@contextlib.contextmanager
def metrics_not_here() -> Iterator[None]:
    """Context in which `evaluate` raises ValueError instead of running code in a folder of a published metric's name.

    `evaluate.load("rouge")`, which tasks call, prefers the code in ./rouge/rouge.py to the published metric, and
    `evaluate.load("ORG/NAME")` that in ./ORG/NAME/NAME.py. Paths that begin with ./, ../ or / are a task's own.
    """

    def check(path: str, *_: Any, **__: Any) -> None:
        name = os.path.basename(path.rstrip("/")).removesuffix(".py")
        code = path if path.endswith(f"{name}.py") else os.path.join(path, f"{name}.py")
        if not is_explicit(path) and os.path.isfile(code):
            raise ValueError(
                f"{code} in the current folder would run as the metric of that name; start the command in another "
                "folder"
            )

    with checked("evaluate.loading", "evaluation_module_factory", check):
        yield


@contextlib.contextmanager
def code_beside_models_not_run() -> Iterator[None]:
    """Context in which `transformers` raises ValueError instead of running code that lies beside a model or tokenizer.

    Tasks that measure their prompts in tokens, such as those of RULER, read the tokenizer of --model_args with
    trust_remote_code=True, whoever made it. The command line allows it, by `--trust_remote_code` or in --model_args.
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

    The tokenizer of --model_args may be a file for the model, but not for tasks that read it.
    """

    def check(path_or_repo_id: Any, *_: Any, **__: Any) -> None:
        if os.path.isfile(str(path_or_repo_id)):
            raise ValueError(f"tokenizer={path_or_repo_id} is a file; tasks that read the tokenizer need its folder")

    with checked("transformers.utils.hub", "cached_files", check):
        yield


def is_explicit(path: str) -> bool:
    """True for a path that is no name of something published."""
    return path.split("/")[0] in ("", ".", "..")


@contextlib.contextmanager
def checked(module: str, name: str, check: Function) -> Iterator[None]:
    """Context in which a function of a module calls `check` with its arguments first, also if it is imported later.

    The function stays replaced, by one that does the same outside of the context: other modules may have imported it.
    An error of `check` is raised at the end of the context, too, whatever caught it before: tasks report metrics that
    fail to load, and go on.
    """
    refused: list[ValueError] = []

    def recording(*arguments: Any, **settings: Any) -> None:
        try:
            check(*arguments, **settings)
        except ValueError as error:
            refused.append(error)
            raise

    active = checks_of(module, name)
    active.append(recording)
    try:
        yield
    except (Exception, SystemExit):
        if refused:
            raise refused[0] from None
        raise
    finally:
        active.remove(recording)
    if refused:
        raise refused[0]


@functools.cache
def checks_of(module: str, name: str) -> list[Function]:
    """Functions that a function of a module calls first, from now on: a list to change."""
    checks: list[Function] = []

    def replace(found: ModuleType) -> None:
        original: Function = getattr(found, name)

        @functools.wraps(original)
        def replaced(*arguments: Any, **settings: Any) -> Any:
            for check in checks:
                check(*arguments, **settings)
            return original(*arguments, **settings)

        setattr(found, name, replaced)

    if module in sys.modules:
        replace(sys.modules[module])
    else:
        sys.meta_path.insert(0, AfterImport(module, replace))
    return checks


class AfterImport(importlib.abc.MetaPathFinder):
    """Finder that calls a function with a module right after its import, once."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name, self.action, self.searching = name, action, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Spec of the module, as the other finders give it, whose execution ends with the function; None for others."""
        if name != self.name or self.searching:
            return None
        self.searching = True  # the others are asked
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.action(module)

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
