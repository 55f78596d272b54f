"""RETRO's script from text to table, its data, RETROfit, and commands over its runs."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.generate import command as generate
from jaxmodels.retro.retrieval import examples
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.embedders import BertMean, HashedNGrams
from jaxmodels.retro.retrieval.examples import Lookup, Samples, attach, make_once, samples_of, start_positions
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.text import CharVocabulary
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import latest_model
from jaxmodels.training.commands import evaluate, sample
from jaxmodels.training.data import Windows
from jaxmodels.training.runs.folder import saved_experiment, write_about
from tests.train_common import TEXT, start_two
from train import retro

L = 4
SIZES = {"d-model": 12, "heads": 3, "d-ff": 13, "n-layers": 1, "seq-len": 11, "batch-size": 4, "warmup": 1, "every": 9}
SIZES |= {"chunk-len": L, "passes": 1, "embedder": "ngrams:64:1:3", "overlap": 3, "validation-batches": 5}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return file


def train(*arguments: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert retro.main(list(map(str, arguments))) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def flags(text, compile_cache) -> list[object]:
    return [*TINY, "--text", text, "--compile-cache", compile_cache, "--no-tensorboard", "--steps", 3]


@pytest.fixture(scope="module")
def run_and_output(flags, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(*flags, "--out", folder)


def table(out: str) -> dict[str, float]:
    rows = re.findall(r"^ (.+?) {2,}(?:[\d,]+ +)?(\d\.\d{3}) *$", out[out.rindex("parameters") :], re.M)
    return {name: float(loss) for name, loss in rows}


@pytest.mark.slow
def test_a_run_is_compared_with_its_plain_decoder_and_other_neighbors(run_and_output):
    run, out = run_and_output
    found = table(out)
    assert list(found) == [
        "character 4-gram (Witten-Bell)",
        "plain decoder, trained alike",
        "RETRO, nearest neighbors",
        "RETRO, no run of 3 shared",
        "RETRO, random neighbors",
        "RETRO, retrieval off",
    ]
    losses = {name: metrics.read(run / name)[-1]["validation_loss"] for name in ("retrieval", "plain")}
    assert found["RETRO, nearest neighbors"] == pytest.approx(losses["retrieval"], abs=6e-4)
    assert found["plain decoder, trained alike"] == pytest.approx(losses["plain"], abs=6e-4)
    assert len(set(found.values())) == 6
    assert {path.name for path in run.iterdir()} == {"index", "plain", "retrieval"}


@pytest.mark.slow
def test_the_same_command_prints_the_comparison_again_without_work(run_and_output, flags, monkeypatch):
    run, out = run_and_output
    monkeypatch.setattr(examples, "look_up", None)  # everything was kept
    assert table(train(*flags, "--out", run)) == table(out)
    with pytest.raises(ValueError, match=r"overlap=3, .*overlap=4"):
        retro.main([*map(str, flags), "--out", str(run), "--overlap", "4"])
    other = [
        *map(str, flags),
        "--embedder",
        "ngrams:32:1:3",
        "--index",
        str(run / "index"),
        "--out",
        str(run / "other"),
    ]
    with pytest.raises(ValueError, match="embedder=ngrams:64:1:3"):
        retro.main(other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-eval and the libraries that it imports
def test_scorers_of_tokens_refuse_a_run_that_reads_neighbors(run_and_output, text, capsys):
    run, _ = run_and_output
    pair = ["--text", str(text), str(text)]
    assert evaluate.main([str(run / "retrieval"), *pair]) == 2
    assert re.search("retrieval was trained on more than tokens", capsys.readouterr().err)
    assert evaluate.main([str(run / "plain"), *pair]) == 0
    pytest.importorskip("lm_eval")
    from jaxmodels.scoring.lm_eval import JaxModelsLM

    with pytest.raises(ValueError, match="retrieval was trained on more than tokens"):
        JaxModelsLM(str(run / "retrieval"))
    assert JaxModelsLM(str(run / "plain")).model is not None
    with pytest.raises(ValueError, match=r"train.retro, not of train.rope"):
        JaxModelsLM(str(run / "plain"), experiment="train.rope")


@pytest.mark.slow
def test_a_run_is_sampled_and_evaluated(run_and_output, text, capsys):
    run, _ = run_and_output
    for name in ("retrieval", "plain"):
        capsys.readouterr()
        assert sample.main([str(run / name), "--prompt", "7", "--length", "17", "--temperature", "0"]) == 0
        assert re.fullmatch(r"7.{17}\n", capsys.readouterr().out, re.S)
    expected = metrics.read(run / "retrieval")[-1]["validation_loss"]
    held_out = TEXT[int(0.9 * len(TEXT)) :][: 5 * 4 * 11 + 1]  # what --validation-batches left of it
    (run / "held_out.txt").write_text(held_out)
    try:
        assert evaluate.main([str(run / "retrieval"), "--text", str(run / "held_out.txt")]) == 0
    finally:
        (run / "held_out.txt").unlink()
    assert f"loss                 {expected:.4f} nats" in capsys.readouterr().out
    assert evaluate.main([str(run / "retrieval"), "--seq-len", "3"]) == 2
    assert re.search("seq_len=3 .*chunk_len=4", capsys.readouterr().err)


@pytest.mark.slow
def test_retrofit_trains_only_retrieval_and_does_not_change_the_decoder(run_and_output, flags, tmp_path):
    run, _ = run_and_output
    out = train(*flags, "--out", tmp_path / "fit", "--from-decoder", run / "plain", "--index", run / "index")
    decoder, fitted = latest_model(run / "plain")[0], latest_model(tmp_path / "fit" / "retrieval")[0]
    ids = CharVocabulary.of(TEXT).encode(TEXT[:44]).reshape(4, 11)
    forward = jax.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(forward(fitted, ids), forward(decoder, ids))  # bit for bit
    fresh = retro.Config(**json.loads((tmp_path / "fit" / "retrieval" / "config.json").read_text())["config"])
    begun = retro.Retro(fresh).model(len(CharVocabulary.of(TEXT)))
    assert (fitted.cca[0].query.kernel[...] != begun.cca[0].query.kernel[...]).all()
    assert (fitted.encoder.ffw[0].lin1.kernel[...] != begun.encoder.ffw[0].lin1.kernel[...]).any()
    losses = {name: metrics.read(run / name)[-1]["validation_loss"] for name in ("plain",)}
    assert table(out)["RETRO, retrieval off"] == pytest.approx(losses["plain"], abs=6e-4)
    assert "plain decoder, trained alike" not in table(out)
    (tmp_path / "tea.txt").write_text(TEXT.replace("sea", "qea"))
    other = [*map(str, flags), "--text", str(tmp_path / "tea.txt"), "--out", str(tmp_path / "no")]
    with pytest.raises(ValueError, match=r"from_decoder=.*plain .*vocabulary"):
        retro.main([*other, "--from-decoder", str(run / "plain")])
    with pytest.raises(ValueError, match=r"from_decoder=.*retrieval .*ca_layers"):
        retro.main([*map(str, flags), "--out", str(tmp_path / "no"), "--from-decoder", str(run / "retrieval")])
    with pytest.raises(ValueError, match=r"from_decoder=.*d_ff=13, .*d_ff=17"):
        retro.main([*map(str, flags), "--out", str(tmp_path / "no"), "--from-decoder", str(run / "plain"), "--d-ff=17"])


@pytest.mark.slow
def test_an_interrupted_lookup_leaves_an_index_to_resume_from(flags, tmp_path, monkeypatch, capsys):
    original = examples.look_up

    def ended(*arguments, **others):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **others)

    monkeypatch.setattr(examples, "look_up", ended)
    assert retro.main([*map(str, flags), "--out", str(tmp_path / "run")]) == 0
    assert re.search("^stopped while .*: python -m train.retro", capsys.readouterr().out, re.M)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["index"]
    names = {path.name for path in (tmp_path / "run" / "index").iterdir()} - {".lock"}
    assert {os.path.splitext(name)[1] for name in names} == {".json", ".npy", ".faiss"}


@pytest.mark.slow
def test_an_interrupted_comparison_is_not_printed(run_and_output, flags, monkeypatch, capsys):
    run, _ = run_and_output
    (run / "index" / "validation_filtered.npz").unlink()  # is looked up again, last
    original = examples.look_up

    def ended(*arguments, **others):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **others)

    monkeypatch.setattr(examples, "look_up", ended)
    assert retro.main([*map(str, flags), "--out", str(run)]) == 130
    assert "RETRO, " not in capsys.readouterr().out
    assert not (run / "index" / "validation_filtered.npz").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_first_process_makes_files_and_the_others_read_them(interrupted, monkeypatch):
    events = []
    monkeypatch.setattr(examples, "is_first", lambda: False)
    monkeypatch.setattr(examples, "agree", lambda flag: events.append(flag) or interrupted)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            make_once(lambda: events.append("made"))
        assert events == [False]
    else:
        assert make_once(lambda: events.append("made") or 7) == 7
        assert events == [False, "made"]


@pytest.mark.slow
def test_two_processes_train_and_compare_like_one(run_and_output, flags, tmp_path):
    processes = start_two("train.retro", *flags, "--mesh", "fsdp=2", "--out", tmp_path / "run")
    ends = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    found, expected = table(ends[0][0]), table(run_and_output[1])
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=2e-3)
    assert "validation loss" not in ends[1][0]  # what is printed, the first prints
    assert [file.name for file in (tmp_path / "run" / "index").glob(".*")] == [".lock"]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ChunkIndex:
    vocabulary = CharVocabulary.of(TEXT)
    corpus = Corpus.of(vocabulary.encode(TEXT), vocabulary)
    return ChunkIndex.build(tmp_path_factory.mktemp("index") / "index", corpus, L, HashedNGrams(64, 1, 3))


def samples_at(index: ChunkIndex, starts: np.ndarray) -> Samples:
    return Samples(Windows(index.corpus.tokens, 11, "training"), starts)


def first_of(index: ChunkIndex, n: int) -> Samples:
    return samples_of(Windows(index.corpus.tokens[:n], 11, "training"))


def test_examples_skip_up_to_seven_tokens_and_cover_the_text_in_every_pass():
    starts = start_positions(1000, 30, 3, seed=0)
    passes = np.split(starts, np.nonzero(np.diff(starts) < 0)[0] + 1)
    assert len(passes) == 3
    for one in passes:
        assert one[0] < 8
        assert set(np.diff(one) - 30) <= set(range(8))
        assert one[-1] + 30 < 1000 <= one[-1] + 30 + 40
    assert len({tuple(one) for one in passes}) == 3
    np.testing.assert_array_equal(starts, start_positions(1000, 30, 3, seed=0))
    for n in (31, 30):
        windows = Windows(np.arange(n), 10, "training")
        covering = samples_of(windows)
        np.testing.assert_array_equal([e["tokens"] for e in covering], [e["tokens"] for e in windows])


def test_neighbors_of_training_examples_never_overlap_their_own_example(index, tmp_path):
    samples = attach(
        samples_at(index, start_positions(len(TEXT), 11, 1, 0)), index, Lookup(2, own=True), tmp_path / "n.npz"
    )
    assert samples.neighbors.shape == (len(samples), 2, 2)
    begin, end = samples.starts[:, None, None], samples.starts[:, None, None] + 12
    assert ((samples.neighbors + 2 * L <= begin) | (samples.neighbors >= end)).all()
    example = samples[5]
    assert {name: array.shape for name, array in example.items()} == {"tokens": (12,), "ret": (2, 2, 2 * L)}
    np.testing.assert_array_equal(example["ret"], index.corpus.passages(samples.neighbors[5], 2 * L))


def test_filtered_neighbors_share_no_run_with_the_text_to_predict(index, tmp_path):
    samples = first_of(index, 600)
    nearest, filtered = (
        attach(samples, index, Lookup(2, kind, run=3), tmp_path / f"{kind}.npz") for kind in ("nearest", "filtered")
    )

    def sharing(found: Samples) -> float:
        shared = []
        for start, chunks in zip(found.starts, found.neighbors, strict=True):
            for u, passages in enumerate(chunks):
                known = TEXT[start + u * L : start + (u + 2) * L]
                for place in passages:
                    passage = TEXT[place : place + 2 * L]
                    shared.append(any(known[i : i + 3] in passage for i in range(len(known) - 2)))
        return np.mean(shared)

    assert sharing(nearest) > 0.9
    assert sharing(filtered) < 0.05  # if all neighbors share one, none is left, and id 0 is used


def test_neighbors_in_a_file_are_of_the_same_examples_and_inside_the_corpus(index, tmp_path, monkeypatch):
    samples, file = first_of(index, 300), tmp_path / "n.npz"
    first = attach(samples, index, Lookup(2), file)
    looked_up = []
    original = examples.look_up
    monkeypatch.setattr(examples, "look_up", lambda *a, **k: looked_up.append(1) or original(*a, **k))
    np.testing.assert_array_equal(attach(samples, index, Lookup(2), file).neighbors, first.neighbors)
    assert not looked_up
    attach(first_of(index, 400), index, Lookup(2), file)
    file.write_bytes(file.read_bytes()[:200])
    attach(first_of(index, 400), index, Lookup(2), file)
    assert len(looked_up) == 2
    with np.load(file) as opened:
        kept = dict(opened)
    np.savez(file, **kept | {"neighbors": kept["neighbors"] + len(TEXT)})
    found = attach(first_of(index, 400), index, Lookup(2), file).neighbors
    assert len(looked_up) == 3  # a file with positions that are not chunks of the index is damaged
    np.testing.assert_array_equal(found, kept["neighbors"])
    with pytest.raises(ValueError, match=f"0 to {len(TEXT) - 1}"):
        dataclasses.replace(first, neighbors=found + len(TEXT))


@pytest.mark.parametrize("name", ["ca_layers", "encoder_ca_layers"])
def test_an_empty_tuple_of_layers_is_not_the_default(name):
    with pytest.raises(ValueError, match=rf"^{name}=\(\) must name at least one layer"):
        retro.Config(**{name: ()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dropout 0.1", "dropout=0.1"),
        ("--seq-len 8", "seq_len=8 must be at least chunk_len=16"),
        ("--overlap 40", "overlap=40 must be at most 2 · chunk_len = 32"),
        ("--embedder words", "embedder='words'"),
        ("--chunk-len 0", "chunk_len=0"),
    ],
)
def test_a_flag_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        retro.main(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--text {text} --heads 5", "d_model=96 .*heads=5"),
        ("--text {text} --ca-layers 4", r"ca_layers=\[4\] .*0 to 3"),
        ("--text {text} --seq-len 6000", "training text has 4689 .*seq_len=6000"),
        ("--text {text} --seq-len 600", "validation text has 522 .*seq_len=600"),
        ("--text {text} --accumulate 3", "batch_size=16 .*accumulate=3"),
        ("--text {text} --mesh fsdp=7", "mesh='fsdp=7' .*7"),
        ("--text {text} --factory Sideways --seq-len 32", "factory='Sideways'"),
    ],
)
def test_bad_input_is_a_value_error_before_any_training(arguments, message, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        retro.main(arguments.format(text=text).split())
    assert not list(tmp_path.glob("runs"))


def test_an_index_is_written_to_no_folder_that_a_run_of_others_names(tmp_path):
    """A run's config.json may name any folder; it is written to beside the run, or if the user names it."""
    run, elsewhere = tmp_path / "theirs" / "retrieval", tmp_path / "home" / "index"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "sea.txt").write_text(TEXT)
    for folder in (elsewhere, run.parent / ".." / "home" / "index"):
        config = retro.Config(chunk_len=L, index=str(folder), text=str(tmp_path / "sea.txt"))
        write_about(run, retro.Retro(config), "0" * 64, {})
        with pytest.raises(ValueError, match=r"/theirs/retrieval names .*/home/index for its index.*--index FOLDER"):
            retro.main(["--resume", str(run)])
    assert not elsewhere.parent.exists()
    for index, named in ((run.parent / "index", None), (elsewhere, str(elsewhere))):
        retro.check_index(dataclasses.replace(config, index=str(index)), run, named)
    ids = CharVocabulary.of(TEXT).encode(TEXT)
    ChunkIndex.build(elsewhere, Corpus.of(ids, CharVocabulary.of(TEXT)), L, HashedNGrams(64, 1, 3))
    retro.check_index(dataclasses.replace(config, index=str(elsewhere)), run, None)  # it is read
    about = json.loads((elsewhere / "about.json").read_text())
    (elsewhere / "about.json").write_text(json.dumps(about | {"added": 0}))
    with pytest.raises(ValueError, match="holds no finished one"):
        retro.check_index(dataclasses.replace(config, index=str(elsewhere)), run, None)


def test_a_finished_index_elsewhere_that_only_a_run_names_is_not_written_to(tmp_path):
    """Neighbors that are kept in it are those of its owner's examples; others are looked up at each start."""
    (tmp_path / "sea.txt").write_text(TEXT)
    fields = {"embedder": "ngrams:64:1:3", "chunk_len": L, "seq_len": 11, "passes": 1}
    own = retro.Retro(retro.Config(text=str(tmp_path / "sea.txt"), index=str(tmp_path / "home" / "index"), **fields))
    own.task()
    before = {path.name: path.read_bytes() for path in (tmp_path / "home" / "index").iterdir()}
    for run, writes in ((None, False), (tmp_path / "theirs" / "run", False), (tmp_path / "home" / "run", True)):
        theirs = retro.Retro(dataclasses.replace(own.config, passes=2))
        theirs.unnamed = frozenset({"index", "text"})
        if run is not None:
            theirs.resume(run)
        task = theirs.task()
        assert task.train[0]["ret"].shape == (11 // L, 2, 2 * L)
        changed = [p.name for p in (tmp_path / "home" / "index").iterdir() if p.read_bytes() != before[p.name]]
        assert changed == (["training.npz"] if writes else [])


def test_a_run_has_no_more_neighbors_than_its_index_has_chunks(tmp_path):
    """They are compared before there are arrays for them, with the check of `jaxmodels neighbors --k`."""
    vocabulary, file = CharVocabulary.of(TEXT), tmp_path / "sea.txt"
    file.write_text(TEXT[:900])
    fields = {"embedder": "ngrams:64:1:3", "chunk_len": L, "seq_len": 11, "index": str(tmp_path / "index")}
    few = retro.Retro(retro.Config(text=str(file), **fields))
    chunks = len(few.open_index().index)
    many = retro.Retro(dataclasses.replace(few.config, neighbors=chunks + 1))
    ids = few.tokens().validation
    assert chunks < retro.MOST_NEIGHBORS
    assert len(few.examples(ids, tmp_path / "run")) == len(ids) // 11
    for refused in (
        many.task,
        lambda: many.examples(ids, tmp_path / "run"),
        lambda: many.generator(None, tmp_path / "run"),
        lambda: many.held_out(tmp_path / "run", vocabulary, "0" * 64),
    ):
        with pytest.raises(
            ValueError, match=rf"neighbors={chunks + 1} must be from 1 to the {chunks} chunks of .*index"
        ):
            refused()


def test_a_saved_run_loads_no_model_that_the_user_has_not_named(tmp_path, monkeypatch):
    """A run's files name an embedder; only a flag makes it load the model of that name, from a network if need be."""
    name, folder, run = "bert:someone/remote", tmp_path / "index", tmp_path / "run"
    vocabulary = CharVocabulary.of(TEXT)
    corpus = Corpus.of(vocabulary.encode(TEXT), vocabulary)
    ChunkIndex.build(folder, corpus, L, HashedNGrams(64, 1, 3))
    about = json.loads((folder / "about.json").read_text())
    about |= {"embedder": name, "fingerprint": corpus.fingerprint(L, name)}
    (folder / "about.json").write_text(json.dumps(about))
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "sea.txt").write_text(TEXT)
    config = retro.Config(embedder=name, chunk_len=L, index=str(folder), text=str(tmp_path / "sea.txt"))
    write_about(run, retro.Retro(config), "0" * 64, {})
    monkeypatch.setattr("socket.socket", lambda *args, **kwargs: pytest.fail("a network was used"))
    monkeypatch.setattr(BertMean, "loaded", property(lambda self: pytest.fail("a model was loaded")))
    experiment = saved_experiment(run)
    for refused in (
        lambda: experiment.generator(None, run),
        lambda: experiment.examples(corpus.tokens, run),
        lambda: experiment.held_out(run, vocabulary, "0" * 64),
        lambda: retro.main(["--resume", str(run)]),
    ):
        with pytest.raises(ValueError, match=f"{name}.*--embedder"):
            refused()
    monkeypatch.setattr(BertMean, "width", 64)
    experiment.use_embedder(name)
    assert len(experiment.saved_index(run)) == len(corpus.chunks(L))
    CharVocabulary.of(TEXT + "é").save(run / "vocabulary.json")
    with pytest.raises(ValueError, match=f"{folder} is the index of another text than that of {run}"):
        experiment.saved_index(run)
    (run / "vocabulary.json").unlink()
    experiment.use_embedder("bert:another/one")
    with pytest.raises(ValueError, match=f"embedder={name}, not embedder=bert:another/one"):
        experiment.saved_index(run)
    with pytest.raises(ValueError, match="chunk index"):
        retro.Retro(retro.Config(retrieval=False)).use_embedder(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-eval and the libraries that it imports
def test_a_folder_of_a_model_alone_is_read_without_neighbors_and_says_so(text, tmp_path, capsys):
    vocabulary, folder = CharVocabulary.of(TEXT), tmp_path / "model"
    for retrieval in (True, False):
        fields = {"d_model": 12, "heads": 3, "d_ff": 13, "n_layers": 1, "chunk_len": L, "retrieval": retrieval}
        model = retro.Retro(retro.Config(**fields)).model(len(vocabulary))
        jaxmodels.save(model, folder, overwrite=True)
        vocabulary.save(folder / "vocabulary.json")
        warning = f"warning: {folder} is read without neighbors, which only its training run has an index of"
        (tmp_path / "short.txt").write_text(TEXT[:99])
        for more in ([], ["--seq-len", "11"]):
            assert evaluate.main([str(folder), "--text", str(tmp_path / "short.txt"), *more]) == 0
            assert capsys.readouterr().err.count(warning) == retrieval
        assert generate.main([str(folder), "--prompt", "7 men", "--max-new-tokens", "2"]) == 0
        assert capsys.readouterr().err.count(warning) == retrieval
        pytest.importorskip("lm_eval")
        from jaxmodels.scoring.lm_eval import JaxModelsLM

        assert JaxModelsLM(str(folder)).model is not None
        assert capsys.readouterr().err.count(warning) == retrieval
        (folder / "vocabulary.json").unlink()
