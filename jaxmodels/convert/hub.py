"""Hugging Face's Hub: an id such as EleutherAI/pythia-70m becomes a local folder, by the package huggingface_hub.

That package decides on cache, token, endpoint and offline mode: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

import contextlib
import errno
import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxmodels.convert.companions import FILES, TEMPLATES
from jaxmodels.convert.kinds.unusable import check_hf, explain_names, matching
from jaxmodels.io.bounded import read_object, read_text
from jaxmodels.io.content import STEM
from jaxmodels.io.pretrained import chosen, variants
from jaxmodels.process.extras import available
from jaxmodels.process.paths import below, is_plain
from jaxmodels.process.texts import quoted

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADDRESS = re.compile(r"(https?://|hf://|hf\.co/|huggingface\.co/).*")
# Small files that are downloaded first, to refuse a model before its weights are.
ABOUT = ("config.json", "adapter_config.json", *FILES, f"{TEMPLATES}/*.jinja", "latest")
# Files of the kinds that lie on the Hub besides Hugging Face's own.
OURS = (f"{STEM}*.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}/**")
SHARDS = ("layer_*-model_states.pt", "mp_rank_*_model_states.pt")  # in a step's folder; the second if there is no first


def is_id(source: str) -> bool:
    """True for a text that may be the id of a model, ORG/NAME."""
    return ID.fullmatch(source) is not None


def check_not_address(source: str) -> None:
    """Raises ValueError for the address of a page, and for an id with a revision in it."""
    if ADDRESS.fullmatch(source):
        raise ValueError(f"{source} is an address; name a model of the Hub by its id, ORG/NAME")
    name, at, revision = source.partition("@")
    if at and is_id(name):
        raise ValueError(
            f"{source} is not the id of a model; name {name} with revision={revision!r}, or run `hf download {name} "
            f"--revision {revision} --local-dir DIR`, and name DIR"
        )


def download(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Folder of a model in the Hub's cache; files that are needed and not there are downloaded.

    name: id, ORG/NAME. revision: branch, tag or commit; default main. variant: of the weights, such as "fp16".

    If the Hub cannot be reached, the cache is used. Raises ValueError in one line, with what was looked for, if the
    model is neither there nor here, if it is no checkpoint that can be loaded, or if a download fails; OSError if the
    disk is full.
    """
    if not available("huggingface_hub"):
        raise ValueError(
            f"{name} is not a folder; for models of the Hub huggingface_hub is needed: pip install 'jaxmodels[hub]'"
        )
    from huggingface_hub import HfApi

    api = HfApi(library_name="jaxmodels")

    def fetch(patterns: Sequence[str], local: bool = False) -> Path:
        found = api.snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=local)
        assert isinstance(found, str)
        return Path(found)

    known = False
    with quiet():
        try:
            info = api.model_info(name, revision=revision or "main")
            listed = [entry.rfilename for entry in info.siblings or ()]
            names = listed or api.list_repo_files(name, revision=revision or "main")
            known = True
            return fetched(name, names, variant, fetch)
        except Exception as error:
            if not is_of_hub(error):
                raise
            return cached(name, revision, error, fetch, known)


Fetch = Callable[..., Path]


def fetched(name: str, names: Sequence[str], variant: str | None, fetch: Fetch) -> Path:
    """Download what is needed of a repository's files; raises ValueError if they hold no checkpoint to load."""
    config = "config.json" in names
    folder = fetch([*ABOUT, "*.index*.json"]) if matching(names, ABOUT) else Path(name)
    content = read_object(folder / "config.json") if config else {}
    if "model_type" in content:
        check_hf(folder, content)
        form = content.get("transformers_weights")
        if form is None and (variants(names) or variant is not None):
            form, _ = chosen(names, variant, f"{name} on the Hub")
        if isinstance(form, str) and form in names:
            return fetch([*ABOUT, "*.index*.json", form, *shards_of(folder / form)])
    elif config and matching(names, OURS):
        return fetch([*ABOUT, *OURS])
    shards = [] if content else shard_patterns(names, folder)
    if shards:
        return fetch([*ABOUT, *shards, "configs/*", "global_step*/configs/*"])
    raise ValueError(explain_names(f"{name} on the Hub", names, folder))


def shard_patterns(names: Sequence[str], folder: Path) -> list[str]:
    """Patterns of GPT-NeoX's shards among a repository's files, of the step that `latest` names if there is one."""
    latest = folder / "latest"
    step = read_text(latest, 4096).strip() if latest.is_file() else "global_step*"
    if not is_plain(step):
        raise ValueError(f"{latest} names {quoted(step)}, which is not a folder beside it")
    step = step if step == "global_step*" else glob.escape(step)
    for places in ("", f"{step}/"):
        for pattern in SHARDS:
            if matching(names, [places + pattern]):
                return [places + pattern]
    return []


def shards_of(index: Path) -> list[str]:
    """Names of the files in an index; empty for a single file."""
    if not index.name.endswith(".json") or not index.is_file():
        return []
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    return sorted({str(file) for file in weight_map.values()})


def cached(name: str, revision: str | None, error: Exception, fetch: Fetch, known: bool) -> Path:
    """Folder in the cache, for a Hub that cannot be reached; raises ValueError for the error if it is not there.

    known: the Hub has answered that it has the model.
    """
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    flag = f" --revision {revision}" if revision else ""
    first = str(error).strip().partition("\n")[0]
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    page = f"{constants.ENDPOINT}/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        raise ValueError(
            f"{name} on the Hub has no revision {revision!r}; see its branches and tags at {page}"
        ) from None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{error.strerror} while downloading {name} (set HF_HUB_CACHE for another disk)"
        raise OSError(error.errno, what, constants.HF_HUB_CACHE) from None
    with contextlib.suppress(OSError, ValueError):
        folder = fetch(["config.json"], local=True)
        if is_whole(folder):
            return folder
    if isinstance(error, errors.GatedRepoError):
        raise ValueError(f"{name} on the Hub is gated: ask for access at {page}, and {login}") from None
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        raise ValueError(
            f"{name}{at} is neither a folder nor a model on the Hub ({page}); if it is private, {login}"
        ) from None
    if known and not isinstance(error, errors.HfHubHTTPError):
        raise ValueError(
            f"the download of {name}{at} broke off ({reason}): run the command again to continue it"
        ) from None
    if constants.is_offline_mode():
        why = "and the Hub is switched off (HF_HUB_OFFLINE)"
    elif isinstance(error, errors.HfHubHTTPError):
        raise ValueError(f"{name}{at} could not be downloaded from the Hub: {reason}") from None
    else:
        why = f"and {constants.ENDPOINT} cannot be reached ({reason})"
    raise ValueError(
        f"{name}{at} is not a folder, not in the Hub's cache ({constants.HF_HUB_CACHE}), {why}: where there is a "
        f"connection, run `hf download {name}{flag} --local-dir DIR`, and name DIR"
    ) from None


def is_whole(folder: Path) -> bool:
    """True if a snapshot has weights, and all files of their index."""
    names = sorted(path.relative_to(folder).as_posix() for path in below(folder) if path.is_file())
    forms = variants(names).values()
    if forms:
        return any(set(names).issuperset(shards_of(folder / form)) for form in forms)
    return bool(matching(names, OURS) or shard_patterns(names, folder))


def is_of_hub(error: Exception) -> bool:
    """True for errors of the Hub's package, of the connection and of the disk; others are mistakes here."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or module in ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bars unless standard error is a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
