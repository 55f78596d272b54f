"""Training runs that `--resume` and `--branch` continue, up to the first step, and an embedder's folder."""

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.targets.kind import SEED, Target

SIZES = ("--d-model=12", "--heads=3", "--d-ff=13", "--n-layers=2", "--seq-len=7", "--batch-size=3", "--steps=2")
RARE = ("--every=1", "--warmup=1", "--validation-batches=1", "--dropout=0")


def make_trained(folder: Path) -> None:
    """A run of two steps with a checkpoint after each, beside its text."""
    from jaxmodels.training.script import main
    from train.rope import Rope

    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 9)
    flags = [f"--text={folder / 'text.txt'}", f"--out={folder / 'run'}", *SIZES, *RARE]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(Rope, "python -m train.rope", flags)


@contextlib.contextmanager
def temporary_in(folder: Path) -> Iterator[None]:
    """Context in which temporary files lie in a folder, where an attempt may write."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def continued(*flags: str) -> Any:
    """Reader that opens a run as a training command does, and takes no step."""

    def read(folder: Path) -> None:
        from jaxmodels.training.script import parse
        from jaxmodels.training.trainer import Trainer
        from train.rope import Rope

        run, out = folder / "run", folder.with_name("out") / "new"
        given = [flag.replace("RUN", str(run)).replace("OUT", str(out)) for flag in flags]
        with warnings.catch_warnings(), temporary_in(folder.with_name("out")):
            warnings.simplefilter("ignore")  # of checkpoints that are skipped
            experiment, command = parse(Rope, "python -m train.rope", [*given, f"--text={folder / 'text.txt'}"])
            Trainer(experiment, command.run, command.options, command.origin).close()

    return read


def make_embedder(folder: Path) -> None:
    """A small BERT with the files of sentence-transformers and of an adapter beside it."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(SEED)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 13}
    model = folder / "model"
    BertModel(BertConfig(vocab_size=31, max_position_embeddings=23, **sizes)).save_pretrained(model)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 12}))


def read_embedder(folder: Path) -> Any:
    from jaxmodels.io.bounded import errors_naming
    from jaxmodels.retro.retrieval.embedders import BertMean, check_modules

    check_modules(str(folder / "model"))
    with errors_naming(folder):
        return BertMean(str(folder / "model")).embed(["a b c d"])


def make_adapted(folder: Path) -> None:
    """The same with an adapter that names another model."""
    make_embedder(folder)
    about = {"base_model_name_or_path": "nobody/nothing", "peft_type": "LORA", "r": 2, "target_modules": ["query"]}
    (folder / "model" / "adapter_config.json").write_text(json.dumps(about))


def read_adapted(folder: Path) -> Any:
    """It is refused, or read without the adapter if that is damaged: never from the network."""
    with contextlib.suppress(ValueError):
        return read_embedder(folder)
    return None


TARGETS = (
    Target("run, resumed", make_trained, continued("--resume=RUN"), changes=True),
    Target("run's JSON, resumed", make_trained, continued("--resume=RUN"), "*.json*", changes=True),
    Target("run, branched", make_trained, continued("--branch=RUN", "--out=OUT", "--steps=3")),
    Target("embedder", make_embedder, read_embedder),
    Target("embedder's JSON", make_embedder, read_embedder, "*.json"),
    Target("embedder with an adapter", make_adapted, read_adapted, "*.json"),
)
