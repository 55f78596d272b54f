"""Texts from elsewhere, on a terminal."""

import io
import time

import pytest

from jaxmodels.process.texts import for_terminal, quoted, shortened, table_cell, visible


def test_control_characters_marks_and_lone_surrogates_are_escaped():
    assert visible("größe 名 ✓") == "größe 名 ✓"
    assert visible("a\x1b[2Jb\r\n\x00\u202e\ud800") == r"a\x1b[2Jb\r\n\x00\u202e\ud800"
    assert visible("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_a_long_text_keeps_its_ends():
    assert shortened("a\r\n\x1b[2J") == r"a\r\n\x1b[2J"
    assert shortened("\n" * 500, 4).startswith(r"\n\n\n … (496")
    assert shortened("x" * 97, 97) == "x" * 97
    text = shortened("a" * 500 + "b" * 500, 100)
    assert text.startswith("a" * 75)
    assert text.endswith("b" * 25)
    assert "900" in text


@pytest.mark.parametrize(
    "value", [10**5000, "x" * 10**6, list(range(10**5)), {"a": "b" * 999}], ids=["int", "str", "list", "dict"]
)
def test_values_of_any_length_are_quoted_in_a_line(value):
    assert len(quoted(value)) < 200


def test_a_nested_value_is_quoted():
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert "list" in quoted(value)


def test_a_models_text_is_escaped_on_a_terminal_alone():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert for_terminal("a\x1b[2J\n\tb", Terminal()) == "a\\x1b[2J\n\tb"
    assert for_terminal("a\x1b[2J", io.StringIO()) == "a\x1b[2J"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("a\\b", r"a\b"),
        ("<script>", r"\<script>"),
        (r"\<script>", r"\\\<script>"),
        ("[a](javascript:b)", r"[a]\(javascript:b)"),
        ("a\n\x1b[2J", r"a\n\x1b[2J"),
        ("**a** `b` [0, 3]", "**a** `b` [0, 3]"),
    ],
)
def test_a_cell_of_a_table_holds_neither_a_bar_nor_html_nor_a_link(text, cell):
    assert table_cell(text) == cell


def test_a_cell_takes_linear_time():
    start = time.process_time()
    assert table_cell("\\" * 100_000) == "\\" * 100_000
    assert time.process_time() - start < 1
