"""Scores of documents in a file."""

import json
import tracemalloc

import pytest

from jaxmodels.scoring.documents import Score, Scores, total_of
from jaxmodels.scoring.files import Document, values_of, write_json


@pytest.mark.parametrize("n", [0, 1, 3])
def test_scores_are_written_as_one_json(tmp_path, n):
    documents = [Document("a\n.jsonl", i + 1, "") for i in range(n)]
    scores = [Score(i, 1e3 * i, 7, 9) for i in range(n)]
    found = Scores(tuple(scores), total_of(scores))
    write_json(tmp_path / "scores.json", documents, found)
    rows = [
        {"file": "a\n.jsonl", "line": i + 1, "tokens": i}
        | {name: value for name, value in values_of(score).items() if name != "tokens"}
        for i, score in enumerate(scores)
    ]
    expected = json.dumps({"documents": rows, "total": values_of(found.total)}, indent=2) + "\n"
    assert (tmp_path / "scores.json").read_text() == expected


def test_scores_of_many_documents_are_not_one_text_in_memory(tmp_path):
    score = Score(3, 5.0, 7, 9)
    documents, scores = [Document("a.jsonl", 1, "")] * 20_000, Scores((score,) * 20_000, score)
    tracemalloc.start()
    write_json(tmp_path / "scores.json", documents, scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "scores.json").stat().st_size > 20_000 * 100
    assert peak < 1e6
