"""Files of verdicts: what others may have written there, and what is in their place."""

import io
import json
import os
import resource

import pytest
from rich.console import Console

from parity.mutation import score
from parity.mutation.state import Row, State
from parity.report.results import Check

ROW = Row("rope.attention", "layers.0", "factor", "output", 1e9, True, True, "layers.0", "off by 2 in [0, 3]")
CHECK = Check("output", "float64", "output", 0.3, 32.0)
MUTANT = {"mutant": "key", "row": None}
FIELDS = {field: getattr(ROW, field) for field in ROW.__dataclass_fields__}
NARROW = Check("loss", "float32", "loss", float("nan"), float("inf"), own=2.0)
ALARM = {"case": "rope", "seeds": 1, "checks": [[0, {**CHECK.__dict__}], [0, {**NARROW.__dict__}]]}


def test_verdicts_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "state.jsonl"
    rows = {"a": ROW, "b": None, "c": Row("x", "", "factor", "", float("inf"), False, False, None, "")}
    alarms = [(seed, check) for seed in (0, 1) for check in (CHECK, NARROW)]
    for name, row in rows.items():
        with State.opened(file) as state:
            state.add(name, row)
    with State.opened(file) as state:
        state.add_alarms("rope", 2, alarms)
    with State.opened(file) as state:
        assert state.rows == rows
        assert repr(state.alarms) == repr({("rope", 2): alarms})
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "line",
    [
        [],
        5,
        None,
        "mutant",
        {},
        {"mutant": 5, "row": None},
        {"mutant": ["a"], "row": None},
        {"mutant": "a\x1b[2J", "row": None},
        {"mutant": "a"},
        {"mutant": "a", "row": []},
        {"mutant": "a", "row": {}},
        {"mutant": "a", "row": FIELDS | {"more": 1}},
        *(
            {"mutant": "a", "row": FIELDS | {name: 5}}
            for name in ("case", "culprit", "where", "hint", "found", "named")
        ),
        *(
            {"mutant": "a", "row": FIELDS | {name: "a\x1b[2J\n"}}
            for name in ("case", "culprit", "where", "hint", "kind")
        ),
        *({"mutant": "a", "row": FIELDS | {"value": value}} for value in ("1", None, True, 10**400, [1.0])),
        {"case": 5, "seeds": 1, "checks": []},
        {"case": "rope", "seeds": 1.5, "checks": []},
        {"case": "rope", "seeds": "1", "checks": []},
        {"case": "rope", "seeds": 1, "checks": 5},
        {"case": "rope", "seeds": 1, "checks": []},
        {"case": "rope", "seeds": 1, "checks": [[0, {**CHECK.__dict__}]]},
        {"case": "rope", "seeds": 2, "checks": ALARM["checks"]},
        {"case": "rope", "seeds": 10**9, "checks": ALARM["checks"]},
        {"case": "rope", "seeds": 1, "checks": [[0]]},
        {"case": "rope", "seeds": 1, "checks": [[0, {}]]},
        {"case": "rope", "seeds": 1, "checks": [[1e400, {**CHECK.__dict__}]]},
        {"case": "rope", "seeds": 1, "checks": [[0, {**CHECK.__dict__, "value": "1"}]]},
        {"case": "rope", "seeds": 1, "checks": [[0, {**CHECK.__dict__, "own": "1"}]]},
        {"case": "rope", "seeds": 1, "checks": [[0, {**CHECK.__dict__, "kind": "\x1b[2J"}]]},
        {"case": "rope", "seeds": 1, "checks": [[0, {**CHECK.__dict__, "passed": True}]]},
    ],
    ids=str,
)
def test_a_line_that_is_no_verdict_is_refused(tmp_path, line):
    file = tmp_path / "state.jsonl"
    text = f"{json.dumps(MUTANT)}\n{json.dumps(ALARM)}\n{json.dumps(line)}\n"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"--state {file}, line 3 is not a verdict") as error, State.opened(file):
        pass
    assert str(error.value).isprintable()
    assert file.read_text() == text


def test_a_last_line_that_a_kill_cut_is_removed_and_one_without_an_end_is_kept(tmp_path):
    file = tmp_path / "state.jsonl"
    lines = f"{json.dumps(MUTANT)}\n{json.dumps(ALARM)}"
    first = len(json.dumps(MUTANT)) + 1
    for cut, alarms in ((len(lines), 1), (len(lines) - 1, 0), *((first + more, 0) for more in range(9, 40))):
        file.write_text(lines[:cut])
        with State.opened(file) as state:
            assert (list(state.rows), len(state.alarms)) == (["key"], alarms)
            state.add("more", None)
        with State.opened(file) as state:
            assert (list(state.rows), len(state.alarms)) == (["key", "more"], alarms)
    for others in (
        "a text of others",
        json.dumps({"case": "important", "x": 1}),
        json.dumps({"mutant": "a", "x": [1]}),
        '{"case": "important",}',
        '{"case": "important", "note": "unfinished',
        '{"mutant": "x", "n": 1} {"mutant": 2}',
    ):
        file.write_text(others)
        with pytest.raises(ValueError, match="line 1 is not a verdict"), State.opened(file):
            pass
        assert file.read_text() == others


def test_a_wrong_name_of_a_case_touches_no_file(tmp_path, capsys):
    file = tmp_path / "state.jsonl"
    assert score.main(["--state", str(file), "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize("what", ["symbolic link", "link to nothing", "hard link", "FIFO", "folder"])
def test_nothing_is_written_through_a_link(tmp_path, what):
    file, other = tmp_path / "state.jsonl", tmp_path / "others.txt"
    other.write_text(f"{json.dumps(MUTANT)}\n")
    if what == "hard link":
        os.link(other, file)
    elif what == "FIFO":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        file.symlink_to(other if what == "symbolic link" else tmp_path / "nothing")
    with pytest.raises((ValueError, OSError), match=str(file)), State.opened(file) as state:
        state.add("mine", None)
    assert other.read_text() == f"{json.dumps(MUTANT)}\n"
    assert not (tmp_path / "nothing").exists()


def test_a_name_is_no_markup_of_the_status_line():
    with Console(file=io.StringIO(), force_terminal=True).status("") as status:
        score.in_status(status)("[/] [link=x]a[/link] [0, 3]")
        assert str(status.status) == "[/] [link=x]a[/link] [0, 3]"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    file, before = tmp_path / "state.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/state\.jsonl'"), State.opened(file) as state:  # noqa: PT012 (the error comes as the file is closed)
            for number in range(20):
                state.add(f"mutant {number}", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
