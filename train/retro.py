"""RETRO on a text, with neighbors from its training part, against a plain decoder: what does retrieval gain?

    python -m train.retro --text tiny_shakespeare      # or a FILE; without --text: Python's own language reference
    python -m train.retro --from-decoder runs/retro/plain --out runs/retrofit    # RETROfit: the decoder is frozen

Hardware   2 CPU cores, shared with test runs; float32
Time       19 min 31 s by the clock, 23 min 41 s of CPU time over both cores; of it some 2 min for index and neighbors
Training   1500 steps of 16 sequences of 128 characters (3 epochs of tiny_shakespeare), 2 neighbors of 32 characters
           for every 16; once with retrieval, once the decoder alone
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram                                1.774
           plain decoder (460,097 parameters)              1.642, after 500 steps 1.843, after 1000 1.692
           RETRO (684,449), nearest neighbors              1.646, after 500 steps 1.861, after 1000 1.698
                            none that shares 8 in a row    1.646
                            random neighbors               1.647
                            retrieval off                  1.659
           Retrieval does not help here: random neighbors give the same loss, so the model has not learned to use them.
           None of its gain is copied text.
           RETROfit of that decoder, --steps 250 --warmup 25: 1.636 with the nearest and the filtered, 1.637 with random
           ones, 1.642 without: the gain comes from more layers, not from retrieval.

RUN/retrieval is the model with neighbors, RUN/plain its decoder alone, trained in the same way, RUN/index the chunk
index. The same command resumes where it was stopped. At the end the model is evaluated four times: with the nearest
neighbors; with those that share no --overlap tokens in a row with the chunk or the text to be predicted, so that
nothing can be copied; with random ones; and without.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh
from rich.table import Table

from jaxmodels.process.paths import resolved
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.embedders import Embedder, HashedNGrams, embedder_of
from jaxmodels.retro.retrieval.examples import (
    Kind,
    Lookup,
    Samples,
    attach,
    index_checksum,
    make_once,
    nearest_neighbors,
    samples_of,
    start_positions,
)
from jaxmodels.retro.retrieval.files import read_about as read_index
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.retro.retrieval.live import Retriever, Retrieving
from jaxmodels.sharding import make_mesh
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.training import script
from jaxmodels.training.checkpoints import latest_model, open_model
from jaxmodels.training.config import AdamWConfig, AttentionKernel
from jaxmodels.training.data import Example, Task, Windows
from jaxmodels.training.experiment import Experiment, Interrupted, check_unchanged, never
from jaxmodels.training.loop import Evaluation
from jaxmodels.training.runs.folder import check_folder
from jaxmodels.training.script import Session, as_program, parse, sampling
from jaxmodels.training.signals import Stopped, interruptible
from jaxmodels.training.step import Batch, Program, State, put
from jaxmodels.training.tokenize import Tokens
from jaxmodels.training.trainer import Result
from jaxmodels.weights.names import dotted, flat_arrays

PROGRAM = "python -m train.retro"
MOST_PASSES = 100  # over the text; neighbors are looked up for all sequences of each, before the first step
MOST_NEIGHBORS = 1_000  # of a chunk
UNNAMED_BYTES = 2**28  # of all neighbors that are looked up, if a run's files alone name their number
RETRIEVES = ("encoder.", "cca.", "norm_e.")  # parameters that a plain decoder does not have


@dataclasses.dataclass(frozen=True)
class Config(AdamWConfig):
    """Hyperparameters of a run."""

    PRESETS = ("small", "original")

    d_model: int = 96
    """features per token"""
    d_ff: int = 384
    """hidden features of a feed-forward network"""
    d_k: int | None = None
    """features of an attention head; if omitted: d_model / heads"""
    attention_kernel: AttentionKernel = "auto"
    """kernel of causal attention. auto: fused where it applies, otherwise blocks; fused: cuDNN on CUDA devices, splash
    attention on TPUs; blocks: each block of queries over its prefix of the keys; plain: the whole score matrix"""
    chunk_len: int = 16
    """tokens per chunk; neighbors are twice as long"""
    neighbors: int = 2
    """neighbors of each chunk"""
    ca_layers: tuple[int, ...] | None = None
    """layers with cross-attention to the neighbors, from 0; if omitted: the middle and the last one"""
    encoder_layers: int = 1
    """layers of the neighbor encoder"""
    encoder_ca_layers: tuple[int, ...] | None = None
    """encoder layers with cross-attention to the neighbors' chunk, from 0; if omitted: the middle one"""
    embedder: str = "ngrams"
    """embedding of chunks: ngrams, ngrams:WIDTH:SHORTEST:LONGEST, sentence:MODEL or bert:MODEL"""
    factory: str | None = None
    """FAISS factory string of the index, such as IVF4096,PQ64; if omitted: exact, or IVF-PQ for many chunks"""
    passes: int = 2
    """cut the training text into examples this many times, each at other positions; neighbors are looked up for all"""
    overlap: int = 8
    """the filtered evaluation excludes neighbors that share this many tokens in a row"""
    from_decoder: str | None = None
    """folder of a trained decoder, a run or a model: freeze it, and train encoder and cross-attention"""
    index: str = ""
    """folder of the chunk index; if omitted: RUN/index"""
    retrieval: tyro.conf.Suppress[bool] = True

    steps: int = 1500
    """total steps; raise it to extend a finished run (not with schedule=cosine)"""
    warmup: int = 50
    """steps until the schedule's peak"""
    every: int = 500
    """validate, sample and checkpoint every N steps"""

    def __post_init__(self) -> None:
        for name in ("ca_layers", "encoder_ca_layers"):  # JSON has lists
            given = getattr(self, name)
            if given is not None and not given:
                raise ValueError(f"{name}=() must name at least one layer, from 0; omit it for the default")
            object.__setattr__(self, name, None if given is None else tuple(given))
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout={self.dropout} must be 0: RETRO has none")
        if self.seq_len < self.chunk_len:
            raise ValueError(f"seq_len={self.seq_len} must be at least chunk_len={self.chunk_len}")
        for name, most in (("passes", MOST_PASSES), ("neighbors", MOST_NEIGHBORS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {most:,}")
        if self.overlap > 2 * self.chunk_len:
            raise ValueError(f"overlap={self.overlap} must be at most 2 · chunk_len = {2 * self.chunk_len}")
        embedder_of(self.embedder)

    def positive(self) -> list[str]:
        counts = ["d_k", "chunk_len", "neighbors", "encoder_layers", "passes", "overlap"]
        return [*super().positive(), *counts]

    @classmethod
    def small(cls) -> "Config":
        """Minutes on two CPU cores."""
        return cls()

    @classmethod
    def original(cls) -> "Config":
        """The sizes of the original experiment, for an accelerator."""
        return cls(
            d_model=128,
            d_ff=512,
            heads=16,
            d_k=16,
            n_layers=6,
            encoder_layers=6,
            optimizer="original",
            schedule="noam",
            learning_rate=1.0,
            warmup=2000,
            b2=0.999,
            eps=1e-16,
            clip=None,
            seq_len=512,
            batch_size=4,
            passes=1,
            steps=15_000,
        )


class Retro(Experiment[Config]):
    config_class = Config
    embedder: Embedder | None = None  # of a saved run's index, as named by the user
    retriever: Retriever | None = None  # opened once: jit captures it, and would compile again for another one
    source: Path | None = None  # run with a checkpoint that is continued

    @property
    def standalone(self) -> bool:
        return not self.config.retrieval  # with retrieval, saved runs need their index

    def model(self, n_vocab: int) -> RetroModel:
        c, rngs = self.config, nnx.Rngs(self.config.seed)
        if c.d_k is None and c.d_model % c.heads:
            raise ValueError(f"d_model={c.d_model} is not divisible by heads={c.heads}; or set d_k")
        d_k = c.d_k or c.d_model // c.heads
        if not c.retrieval:
            return RetroModel(n_vocab, c.d_model, c.n_layers, (), c.chunk_len, c.heads, d_k, c.d_ff, rngs=rngs)
        ca_layers = c.ca_layers or {c.n_layers // 2, c.n_layers - 1}
        encoder_ca = c.encoder_ca_layers or {c.encoder_layers // 2}
        encoder_sizes = (c.chunk_len, c.encoder_layers, encoder_ca, c.d_model, c.heads, d_k, c.d_ff)
        encoder = NearestNeighborEncoder(*encoder_sizes, rngs=rngs)
        sizes = (n_vocab, c.d_model, c.n_layers, ca_layers, c.chunk_len, c.heads, d_k, c.d_ff)
        return RetroModel(*sizes, encoder, rngs=rngs)

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        state = super().initial(program, vocabulary)
        if self.config.from_decoder is None:
            return state
        self.refuse_unnamed("from_decoder", would="be copied into it")
        decoder = load_decoder(self.config.from_decoder, program.abstract, vocabulary, program.mesh)
        arrays = {dotted(path): array for path, array in flat_arrays(decoder).items()}
        fixed = {name: put(arrays[name].astype(own.dtype), own.sharding) for name, own in state.fixed.items()}
        return dataclasses.replace(state, fixed=fixed)

    def check_inputs(self, mesh: Mesh) -> None:
        """Raise ValueError if text, model, mesh or decoder do not fit; called before the long lookup."""
        vocabulary = self.tokens().vocabulary
        program = self.program(len(vocabulary), mesh)
        if self.config.from_decoder is not None:
            load_decoder(self.config.from_decoder, program.abstract, vocabulary, mesh)

    def trains(self, path: str) -> bool:
        return self.config.from_decoder is None or path.startswith(RETRIEVES)

    def abstract_batch(self) -> Batch:
        batch, c = super().abstract_batch(), self.config
        if not c.retrieval:
            return batch
        shape = (c.batch_size, c.seq_len // c.chunk_len, c.neighbors, 2 * c.chunk_len)
        return {**batch, "ret": jax.ShapeDtypeStruct(shape, np.int32)}

    def task(self, interrupted: Interrupted = never) -> Task:
        """Build the examples with their neighbors; looks up those that are not in files yet.

        Raises ValueError first if a text is too short, and KeyboardInterrupt if interrupted() during a lookup.
        """
        c, tokens = self.config, self.tokens()
        windows = Windows(tokens.train, c.seq_len, "training")
        validation = self.validation(tokens, None)
        train = Samples(windows, start_positions(len(tokens.train), c.seq_len, c.passes, c.seed))
        sha256, about = tokens.sha256, self.summary(tokens)
        if c.retrieval:
            index = self.open_index(interrupted).index
            file = Path(c.index) / "training.npz"
            lookup = Lookup(c.neighbors, own=True)
            train = attach(
                train, index, lookup, file, interrupted, save=self.saves_neighbors, most_bytes=self.most_bytes
            )
            validation = self.validation(tokens, interrupted=interrupted)
            sha256, about = index_checksum(sha256, index.fingerprint), f"{about}; {len(index):,} chunks to find"
        order = grain.MapDataset.range(len(train)).seed(c.seed).shuffle().repeat()
        ids = tokens.train, tokens.validation
        return Task(order.map(train.__getitem__), validation, tokens.vocabulary, sha256, about, *ids)

    def validation(
        self, tokens: Tokens, kind: Kind | None = "nearest", interrupted: Interrupted = never
    ) -> Sequence[Example]:
        """Build the validation examples with neighbors of a kind, or without; raises like `task`."""
        c = self.config
        windows = Windows(tokens.validation, c.seq_len, "validation")
        if kind is None:
            return windows
        lookup = Lookup(c.neighbors, kind, run=c.overlap if kind == "filtered" else 0)
        file = Path(c.index) / f"validation_{kind}.npz"
        index = self.open_index(interrupted).index
        return attach(
            samples_of(windows), index, lookup, file, interrupted, save=self.saves_neighbors, most_bytes=self.most_bytes
        )

    def resume(self, run: Path) -> None:
        self.source = run

    @property
    def most_bytes(self) -> int | None:
        """Most bytes of neighbors that are looked up; None if the user has named their number."""
        return UNNAMED_BYTES if "neighbors" in self.unnamed else None

    @property
    def saves_neighbors(self) -> bool:
        """False for an index that only a run's files name and that is not beside it: it may be anybody's."""
        return "index" not in self.unnamed or (self.source is not None and is_beside(self.config, self.source))

    def open_index(self, interrupted: Interrupted = never) -> Retriever:
        """Open the index of the training text; the first process builds it if it does not exist.

        Raises KeyboardInterrupt if interrupted() while it is built.
        """
        c = self.config
        if not c.index:
            raise ValueError("index='' must be the folder of the chunk index")
        if self.retriever is None:
            tokens = self.tokens()
            corpus = Corpus.of(tokens.train, tokens.vocabulary)
            embedder = embedder_of(c.embedder)
            if self.reads_unnamed:  # before the text is written to the index
                fingerprint = ChunkIndex.fingerprint_of(corpus, c.chunk_len, embedder, c.factory)
                self.refuse_unnamed_data(index_checksum(tokens.sha256, fingerprint))

            def build() -> ChunkIndex:
                return ChunkIndex.build(
                    c.index, corpus, c.chunk_len, embedder, factory=c.factory, interrupted=interrupted
                )

            index = make_once(build)
            index.check_k(c.neighbors, "neighbors", c.index)
            self.retriever = Retriever(index, c.neighbors)
        return self.retriever

    def report(self, model: Any, task: Task, interrupted: Interrupted) -> tuple[str, dict[str, float]]:
        """Sample greedily, looking up neighbors while generating."""
        model = Retrieving(model, self.open_index()) if self.config.retrieval else model
        return super().report(model, task, interrupted)

    # Saved runs.

    def saved_index(self, run: Path) -> ChunkIndex:
        """Load the index that a run was trained with, from its configured folder or the one next to the run.

        Raises ValueError if it has fewer chunks than neighbors are looked up, or another vocabulary than the run.
        """
        folder = Path(self.config.index)
        found = folder if folder.exists() else run.absolute().parent / folder.name
        index = ChunkIndex.load(found, embedder=self.embedder)
        index.check_k(self.config.neighbors, "neighbors", found)
        if (own := run / "vocabulary.json").exists() and load_vocabulary(own) != index.corpus.vocabulary:
            raise ValueError(f"{found} is the index of another text than that of {run}: its vocabulary differs")
        return index

    def use_embedder(self, name: str) -> None:
        if not self.config.retrieval:
            super().use_embedder(name)
        self.embedder = embedder_of(name)

    def held_out(self, run: Path, vocabulary: Vocabulary, sha256: str) -> Sequence[Example]:
        tokens = self.tokens(vocabulary)
        now, what = tokens.sha256, f"text={self.config.text!r}"
        if self.config.retrieval:
            now, what = index_checksum(now, self.saved_index(run).fingerprint), f"{what} with its index"
        check_unchanged(what, run, now=now, then=sha256)
        return self.examples(tokens.validation, run)

    def examples(self, ids: np.ndarray, run: Path) -> Sequence[Example]:
        windows = Windows(ids, self.config.seq_len, "given")
        if not self.config.retrieval:
            return windows
        return nearest_neighbors(samples_of(windows), self.saved_index(run), self.config.neighbors, self.most_bytes)

    @property
    def reads_tokens_alone(self) -> bool:
        return not self.config.retrieval

    def generator(self, model: Any, run: Path) -> Any:
        if not self.config.retrieval:
            return model
        return Retrieving(model, Retriever(self.saved_index(run), self.config.neighbors))


EXPERIMENT = Retro


def check_embedder(config: Config, run: Path, named: str | None) -> None:
    """Raise ValueError if a run is resumed whose embedder loads a model by a name that the user has not given."""
    if config.retrieval and named is None and not isinstance(embedder_of(config.embedder), HashedNGrams):
        raise ValueError(
            f"{run} was trained with the embedder {config.embedder}, which loads a model by that name; if you trust "
            f"it, name it yourself: --embedder {config.embedder}"
        )


def check_index(config: Config, run: Path, named: str | None) -> None:
    """Raise ValueError if a run is resumed that names a folder for its index, not beside it, without a finished one.

    The index would be written there, wherever a run of others says.
    """
    if not config.retrieval or not config.index or named is not None or is_beside(config, run):
        return
    folder = Path(config.index).absolute()
    about = read_index(folder) if (folder / "about.json").is_file() else {"added": 0, "chunks": 1}
    if about["added"] < about["chunks"]:
        raise ValueError(
            f"{run} names {folder} for its index, which is not beside it and holds no finished one; name the folder to "
            "write it to yourself: --index FOLDER"
        )


def is_beside(config: Config, run: Path) -> bool:
    """True if the folder of a run's index lies in that of the run's."""
    return resolved(config.index).is_relative_to(resolved(run).parent)


def load_decoder(folder: str, model: RetroModel, vocabulary: Vocabulary, mesh: Mesh) -> RetroModel:
    """Load the decoder of a run, or of a folder written by `jaxmodels.save`, for a model, which may be abstract.

    Raises ValueError if it is not a plain decoder, or if its sizes or vocabulary differ.
    """
    is_run = (Path(folder) / "checkpoints").is_dir()
    decoder = latest_model(Path(folder), mesh)[0] if is_run else open_model(Path(folder), mesh)
    if not isinstance(decoder, RetroModel) or decoder.ca_layers:
        raise ValueError(f"from_decoder={folder} holds no plain decoder, which is a RetroModel without ca_layers")
    own = Path(folder) / "vocabulary.json"
    if own.exists() and load_vocabulary(own) != vocabulary:
        raise ValueError(f"from_decoder={folder} was trained with another vocabulary than the text's")
    ours, theirs = model.config(), decoder.config()
    differing = [name for name in ours if name not in ("encoder", "ca_layers") and ours[name] != theirs[name]]
    if differing:
        was, now = (", ".join(f"{name}={c[name]}" for name in differing) for c in (theirs, ours))
        raise ValueError(f"from_decoder={folder} has {was}, this configuration {now}")
    return decoder


def compare(experiment: Retro, folder: Path, session: Session) -> dict[str, float] | None:
    """Validation losses of a run's model with neighbors of each kind and without; None if it was stopped."""
    overlap = experiment.config.overlap
    try:
        tokens = experiment.tokens()
    except Stopped:
        return None
    program = experiment.program(len(tokens.vocabulary), make_mesh(session.options.mesh))
    state = program.state_of(latest_model(folder, program.mesh)[0])
    kinds: dict[str, Kind | None] = {
        "nearest neighbors": "nearest",
        f"no run of {overlap} shared": "filtered",
        "random neighbors": "random",
        "retrieval off": None,
    }
    losses: dict[str, float] = {}
    for name, kind in kinds.items():
        try:
            examples = experiment.validation_subset(experiment.validation(tokens, kind, session.stop.__bool__))
        except KeyboardInterrupt:
            return None
        loss = Evaluation(program, examples, experiment.config.batch_size, session.stop)(state)
        if loss is None:
            return None
        losses[name] = loss
    return losses


def main(arguments: Sequence[str]) -> int:
    """Train and compare the model and its plain decoder; returns the exit code. Raises ValueError for bad input."""
    with interruptible() as stop:
        given, command = parse(Retro, PROGRAM, arguments)
        source = command.resume or command.branch
        if source is not None:
            check_embedder(given.config, source, None if "embedder" in given.unnamed else given.config.embedder)
            check_index(given.config, source, None if "index" in given.unnamed else given.config.index)
            return script.main(Retro, PROGRAM, arguments, stop)
        config = dataclasses.replace(given.config, index=given.config.index or str(command.run / "index"))
        experiments = {"retrieval": Retro(config)}
        if config.from_decoder is None:
            experiments["plain"] = Retro(dataclasses.replace(config, retrieval=False))
        for name, experiment in experiments.items():
            check_folder(experiment, command.run / name)
        session = Session(command.options, stop, f"{PROGRAM} and the same flags again", PROGRAM)
        try:
            for experiment in experiments.values():
                experiment.check_inputs(make_mesh(command.options.mesh))
            experiments["retrieval"].task(stop.__bool__)
        except KeyboardInterrupt:
            session.console.print(f"stopped while looking up neighbors; continue with: {session.resume}")
            return stop.exit_code
        results: dict[str, Result] = {}
        for name, experiment in experiments.items():
            session.console.print(f"\n{name}")
            result = session.train(experiment, command.run / name)
            if result is None:
                return stop.exit_code
            results[name] = result
        losses = compare(experiments["retrieval"], command.run / "retrieval", session)
        if losses is None:
            return stop.exit_code
        session.console.print(table(results, losses))
        session.console.print(f"saved; write text with: {sampling(Retro, PROGRAM, command.run / 'retrieval')}")
        return 0


def table(results: dict[str, Result], losses: dict[str, float]) -> Table:
    """One line per model and kind of neighbors."""
    shown = Table(box=None)
    shown.add_column("")
    for heading in ("parameters", "validation loss"):
        shown.add_column(heading, justify="right")
    baseline = results["retrieval"].baseline
    if baseline is not None:
        shown.add_row(baseline[0], "", f"{baseline[1]:.3f}")
    if "plain" in results:
        shown.add_row(
            "plain decoder, trained alike", f"{results['plain'].parameters:,}", f"{results['plain'].loss:.3f}"
        )
    for name, loss in losses.items():
        shown.add_row(f"RETRO, {name}", f"{results['retrieval'].parameters:,}", f"{loss:.3f}")
    return shown


if __name__ == "__main__":
    as_program(main, PROGRAM)
