"""Progress of long work: lines without a terminal, a bar on one."""

from jaxmodels.process import progress


def test_without_a_terminal_there_is_a_line_every_few_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("encoding a.txt") as report:
        for second in range(1, 32):
            now[0] = float(second)
            report(second * 10**6, 40 * 10**6, f"{second} tokens")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "encoding a.txt: 28 % of 40 MB, 11 tokens",
        "encoding a.txt: 55 % of 40 MB, 22 tokens",
    ]


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "SHOWN_AFTER", -1.0)
    with progress.progress("encoding [a].txt") as report:
        report(10, 20, "7 tokens")
    assert "%" not in capsys.readouterr().out
