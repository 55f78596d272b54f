"""RETRO on a text, with neighbours from its training part, against a plain decoder: what does retrieval buy?

    python -m train.retro --text tiny_shakespeare      # or a FILE; without --text: Python's own language reference
    python -m train.retro --from-decoder runs/retro/plain --out runs/retrofit    # RETROfit: the decoder is frozen

Hardware   2 CPU cores, which test runs were using too; float32
Time       19 min 31 s by the clock, 23 min 41 s of CPU time over both cores; of it some 2 min for index and neighbours
Training   1500 steps of 16 sequences of 128 characters (3 epochs of tiny_shakespeare), 2 neighbours of 32 characters
           for every 16; once with retrieval, once the decoder alone
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram                                1.774
           plain decoder (460,097 parameters)              1.642, after 500 steps 1.843, after 1000 1.692
           RETRO (684,449), nearest neighbours             1.646, after 500 steps 1.861, after 1000 1.698
                            none that shares 8 in a row    1.646
                            random neighbours              1.647
                            retrieval off                  1.659
           So retrieval does not win here: random neighbours serve the model as well, it has not learnt to read them.
           Nothing of its loss is copied.
           RETROfit of that decoder, --steps 250 --warmup 25: 1.636 with the nearest and the filtered, 1.637 with random
           ones, 1.642 without: what it gains comes from more layers, not from what it retrieves.

RUN/retrieval is the model with neighbours, RUN/plain its decoder alone, trained alike, RUN/index the chunk index. The
same command goes on where it was stopped. At its end the model is judged four times: with the nearest neighbours; with
those that share no run of --overlap tokens with the chunk or the text it is to predict, so that what it gains is not
copied; with random ones; and without.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh
from rich.table import Table

from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.embedders import embedder_of
from jaxmodels.retro.retrieval.examples import Kind, Samples, attach, end_to_end, made_once, with_index, with_skips
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.retro.retrieval.live import Retriever, Retrieving
from jaxmodels.sharding import make_mesh
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.training import experiment
from jaxmodels.training.checkpoints import latest_model, open_model
from jaxmodels.training.config import Options, check_folder, parse
from jaxmodels.training.data import Example, Task, Windows
from jaxmodels.training.experiment import Result, as_program, carry_out, start
from jaxmodels.training.loop import Evaluation
from jaxmodels.training.signals import Stop, interruptible
from jaxmodels.training.step import Batch, Program, State, put
from jaxmodels.training.tokenize import Tokens
from jaxmodels.weights.names import dotted, flat_arrays

PROGRAM = "python -m train.retro"
RETRIEVES = ("encoder.", "cca.", "norm_e.")  # what a plain decoder has not


@dataclasses.dataclass(frozen=True)
class Config(experiment.AdamWConfig):
    """What decides the numbers of a run."""

    d_model: int = 96
    """features of a token"""
    d_ff: int = 384
    """features of the hidden layer of a feed-forward network"""
    d_k: int | None = None
    """features of an attention head; none: d_model / heads"""
    chunk_len: int = 16
    """tokens of a chunk; neighbours are twice as long"""
    neighbors: int = 2
    """neighbours of each chunk"""
    ca_layers: tuple[int, ...] | None = None
    """layers that attend to them, from 0; none: the middle one and the last"""
    encoder_layers: int = 1
    """layers of the encoder of neighbours"""
    encoder_ca_layers: tuple[int, ...] | None = None
    """those of them that see the chunk that the neighbours are for; none: the middle one"""
    embedder: str = "ngrams"
    """what makes chunks comparable: ngrams, ngrams:WIDTH:SHORTEST:LONGEST, sentence:MODEL or bert:MODEL"""
    factory: str | None = None
    """FAISS's factory string of the index; none: exact, IVF-PQ for many chunks"""
    passes: int = 2
    """times that the training text is cut into examples, each time elsewhere; neighbours are looked up for all"""
    overlap: int = 8
    """a neighbour that shares so many tokens in a row is not among the filtered ones"""
    from_decoder: str | None = None
    """folder of a trained decoder, a run's or a model's: it is frozen, encoder and cross-attention are trained"""
    index: str = ""
    """folder of the chunk index; none: RUN/index"""
    retrieval: tyro.conf.Suppress[bool] = True

    steps: int = 1500
    """steps of the whole run"""
    warmup: int = 50
    """steps until the schedule's peak"""
    every: int = 500
    """steps from one validation, greedy sample and checkpoint to the next"""

    def __post_init__(self):
        for name in ("ca_layers", "encoder_ca_layers"):  # JSON has lists
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(given))
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout={self.dropout}: RETRO has none, leave it at 0")
        if self.seq_len < self.chunk_len:
            raise ValueError(f"seq_len={self.seq_len} must be at least chunk_len={self.chunk_len}")
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
        """The sizes of the original experiment: meant for an accelerator."""
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

    def model(self, n_vocab: int) -> RetroModel:
        rngs, heads = nnx.Rngs(self.seed), self.heads
        if self.d_k is None and self.d_model % heads:
            raise ValueError(f"d_model={self.d_model} is not divisible by heads={heads}; or name d_k")
        d_k = self.d_k or self.d_model // heads
        if not self.retrieval:
            return RetroModel(
                n_vocab, self.d_model, self.n_layers, (), self.chunk_len, heads, d_k, self.d_ff, rngs=rngs
            )
        ca_layers = self.ca_layers or {self.n_layers // 2, self.n_layers - 1}
        encoder_ca = self.encoder_ca_layers or {self.encoder_layers // 2}
        encoder_sizes = (self.chunk_len, self.encoder_layers, encoder_ca, self.d_model, heads, d_k, self.d_ff)
        encoder = NearestNeighborEncoder(*encoder_sizes, rngs=rngs)
        sizes = (n_vocab, self.d_model, self.n_layers, ca_layers, self.chunk_len, heads, d_k, self.d_ff)
        return RetroModel(*sizes, encoder, rngs=rngs)

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        state = super().initial(program, vocabulary)
        if self.from_decoder is None:
            return state
        decoder = load_decoder(self.from_decoder, program.abstract, vocabulary, program.mesh)
        arrays = {dotted(path): array for path, array in flat_arrays(decoder).items()}
        fixed = {name: put(arrays[name].astype(own.dtype), own.sharding) for name, own in state.fixed.items()}
        return dataclasses.replace(state, fixed=fixed)

    def check(self, mesh: Mesh) -> None:
        """Raises ValueError where text, model, mesh or the decoder to begin with are not there, or do not fit."""
        vocabulary = self.tokens().vocabulary
        program = self.program(len(vocabulary), mesh)
        if self.from_decoder is not None:
            load_decoder(self.from_decoder, program.abstract, vocabulary, mesh)

    def trains(self, path: str) -> bool:
        return self.from_decoder is None or path.startswith(RETRIEVES)

    def abstract_batch(self) -> Batch:
        batch = super().abstract_batch()
        if not self.retrieval:
            return batch
        shape = (self.batch_size, self.seq_len // self.chunk_len, self.neighbors, 2 * self.chunk_len)
        return {**batch, "ret": jax.ShapeDtypeStruct(shape, np.int32)}

    def task(self, interrupted: Callable[[], bool] = lambda: False) -> Task:
        """Examples with their neighbours, which are looked up where that has not been done yet.

        Raises ValueError, before it begins, where a text is too short; KeyboardInterrupt where interrupted() says so.
        """
        tokens = self.tokens()
        windows = Windows(tokens.train, self.seq_len, "training")
        validation = self.held_out(tokens, None)
        train = Samples(windows, with_skips(len(tokens.train), self.seq_len, self.passes, self.seed))
        sha256 = tokens.sha256
        if self.retrieval:
            index = open_index(self, interrupted).index
            file = Path(self.index) / "training.npz"
            train = attach(train, index, self.neighbors, file, own=True, interrupted=interrupted)
            validation = self.held_out(tokens, interrupted=interrupted)
            sha256 = with_index(sha256, index)
        n, unit = len(tokens.vocabulary), tokens.vocabulary.unit
        about = (
            f"{self.text}: {len(tokens.train):,} {unit}s to train on, {len(tokens.validation):,} to validate, "
            f"{n:,} different ones" + (f"; {len(index):,} chunks to find" if self.retrieval else "")
        )
        order = grain.MapDataset.range(len(train)).seed(self.seed).shuffle().repeat()
        ids = tokens.train, tokens.validation
        return Task(order.map(train.__getitem__), validation, tokens.vocabulary, sha256, about, *ids)

    def held_out(
        self, tokens: Tokens, kind: Kind | None = "nearest", interrupted: Callable[[], bool] = lambda: False
    ) -> Sequence[Example]:
        """The validation text, with neighbours of a kind or without; raises as `task`."""
        windows = Windows(tokens.validation, self.seq_len, "validation")
        if kind is None:
            return windows
        run = self.overlap if kind == "filtered" else 0
        file = Path(self.index) / f"validation_{kind}.npz"
        index = open_index(self, interrupted).index
        return attach(end_to_end(windows), index, self.neighbors, file, kind, run=run, interrupted=interrupted)

    def show(self, model: Any, task: Task, interrupted: Callable[[], bool]) -> tuple[str, dict[str, float]]:
        """What the model writes greedily, looking neighbours up as it goes."""
        return super().show(Retrieving(model, open_index(self)) if self.retrieval else model, task, interrupted)


OPENED: dict[Config, Retriever] = {}  # the last one: what writes with live retrieval is compiled for this very object


def open_index(settings: Config, interrupted: Callable[[], bool] = lambda: False) -> Retriever:
    """The index of a run's training text, which the first process builds where it is not there yet.

    Raises KeyboardInterrupt where interrupted() says so there.
    """
    if not settings.index:
        raise ValueError("index='' names no folder for the chunk index")
    if settings not in OPENED:
        tokens = settings.tokens()
        corpus = Corpus.of(tokens.train, tokens.vocabulary)
        embedder, factory = embedder_of(settings.embedder), settings.factory

        def build() -> ChunkIndex:
            chunk_len = settings.chunk_len
            return ChunkIndex.build(
                settings.index, corpus, chunk_len, embedder, factory=factory, interrupted=interrupted
            )

        OPENED.clear()
        OPENED[settings] = Retriever(made_once(build), settings.neighbors)
    return OPENED[settings]


def load_decoder(folder: str, model: RetroModel, vocabulary: Vocabulary, mesh: Mesh) -> RetroModel:
    """The decoder of a run, or of a folder that `jaxmodels.save` wrote, for a model, which may be abstract.

    Raises ValueError where it is no plain decoder, or one of other sizes, or of another vocabulary.
    """
    is_run = (Path(folder) / "checkpoints").is_dir()
    decoder = latest_model(Path(folder), mesh)[0] if is_run else open_model(Path(folder), mesh)
    if not isinstance(decoder, RetroModel) or decoder.ca_layers:
        raise ValueError(f"from_decoder={folder} holds no plain decoder: a RetroModel without ca_layers")
    own = Path(folder) / "vocabulary.json"
    if own.exists() and load_vocabulary(own) != vocabulary:
        raise ValueError(f"from_decoder={folder} was trained with another vocabulary than the text has")
    ours, theirs = model.config(), decoder.config()
    differing = [name for name in ours if name not in ("encoder", "ca_layers") and ours[name] != theirs[name]]
    if differing:
        was, now = (", ".join(f"{name}={c[name]}" for name in differing) for c in (theirs, ours))
        raise ValueError(f"from_decoder={folder} has {was}, this configuration {now}")
    return decoder


def compare(settings: Config, folder: Path, options: Options, stop: Stop) -> dict[str, float] | None:
    """Validation losses of a run's model with neighbours of each kind and with none; None where it was ended."""
    tokens = settings.tokens()
    program = settings.program(len(tokens.vocabulary), make_mesh(options.mesh))
    state = program.state_of(latest_model(folder, program.mesh)[0])
    kinds: dict[str, Kind | None] = {
        "nearest neighbours": "nearest",
        f"no run of {settings.overlap} shared": "filtered",
        "random neighbours": "random",
        "retrieval off": None,
    }
    losses: dict[str, float] = {}
    for name, kind in kinds.items():
        try:
            examples = settings.held_out(tokens, kind, stop.__bool__)
        except KeyboardInterrupt:
            return None
        loss = Evaluation(program, settings.judged(examples), settings.batch_size, stop)(state)
        if loss is None:
            return None
        losses[name] = loss
    return losses


def main(arguments: Sequence[str]) -> int:
    """Trains the model and its plain decoder, and compares them; the exit code. Raises ValueError for bad input."""
    with interruptible() as stop:
        command = parse(Config, PROGRAM, arguments)
        if command.resume is not None:
            return experiment.main(Config, PROGRAM, arguments, stop)
        given = command.config
        settings = dataclasses.replace(given, index=given.index or str(command.run / "index"))
        runs = {"retrieval": settings}
        if settings.from_decoder is None:
            runs["plain"] = dataclasses.replace(settings, retrieval=False)
        for name, config in runs.items():
            check_folder(config, command.run / name)
        console = start(command.options)
        mesh, go_on = make_mesh(command.options.mesh), f"{PROGRAM} and the same flags again"
        for config in runs.values():
            config.check(mesh)
        try:
            settings.task(stop.__bool__)
        except KeyboardInterrupt:
            console.print(f"stopped while neighbours were looked up; go on with: {go_on}")
            return stop.exit_code
        results: dict[str, Result] = {}
        for name, config in runs.items():
            console.print(f"\n{name}")
            result = carry_out(config, command.run / name, command.options, stop, console, go_on)
            if result is None:
                return stop.exit_code
            results[name] = result
        losses = compare(settings, command.run / "retrieval", command.options, stop)
        if losses is None:
            return stop.exit_code
        console.print(table(results, losses))
        console.print(f"saved; write text with: python -m train.sample {command.run / 'retrieval'}")
        return 0


def table(results: dict[str, Result], losses: dict[str, float]) -> Table:
    """A line per way of judging."""
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
