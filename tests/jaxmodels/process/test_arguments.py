"""Errors about arguments cannot steer a terminal."""

import argparse
from pathlib import Path

import pytest

from jaxmodels.process.arguments import Parser, errors_escaped

HOSTILE = "--\x1b]0;hidden\x07\u202e"
SHOWN = "--\\x1b]0;hidden\\x07\\u202e"


def refused(parser, *arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_an_unknown_argument_is_repeated_with_escapes(capsys):
    parser = Parser(prog="command")
    commands = parser.add_subparsers()
    commands.add_parser("inner")
    for arguments in ([HOSTILE], ["inner", HOSTILE]):
        text = refused(parser, *arguments, capsys=capsys)
        assert f"error: unrecognized arguments: {SHOWN}\n" in text


def test_a_very_long_argument_is_shortened(capsys):
    assert len(refused(Parser(), "--" + "x" * 10**6, capsys=capsys)) < 5000


def test_the_parsers_of_a_library_are_escaped_for_a_while(capsys):
    with errors_escaped():
        assert SHOWN in refused(argparse.ArgumentParser(), HOSTILE, capsys=capsys)
    assert HOSTILE in refused(argparse.ArgumentParser(), HOSTILE, capsys=capsys)


def test_the_home_folder_is_expanded_where_a_shell_leaves_it(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = Parser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name")
    given = parser.parse_args(["--out=~/a b", "--name=~/x"])
    assert (given.out, given.name) == (Path("/home/somebody/a b"), "~/x")
    assert "argument --out: ~nobody-here/x: ~nobody-here " in refused(parser, "--out=~nobody-here/x", capsys=capsys)
