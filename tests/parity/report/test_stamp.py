"""The stamp asks git about this project's checkout alone."""

import os
import subprocess

import pytest

from parity.report import stamp


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def hostile(tmp_path):
    """A repository whose configuration runs a program whenever git looks for modified files."""
    folder, ran = tmp_path / "hostile", tmp_path / "ran"
    folder.mkdir()
    program = folder / "monitor"
    program.write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    program.chmod(0o755)
    git(folder, "init", "-q")
    (folder / "file").write_text("a")
    git(folder, "add", "file")
    git(folder, "commit", "-qm", "first")
    git(folder, "config", "core.fsmonitor", str(program))
    (folder / "file").write_text("b")
    subprocess.run(["git", "status"], cwd=folder, check=True, capture_output=True)
    assert ran.exists()
    ran.unlink()
    return folder, ran


def test_the_repository_of_the_working_directory_is_not_asked(hostile, monkeypatch):
    folder, ran = hostile
    before = stamp.commit()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GIT_DIR", str(folder / ".git"))
    assert stamp.commit() == before
    assert not ran.exists()


def test_the_monitor_and_hooks_of_the_own_repository_do_not_run(hostile, monkeypatch):
    folder, ran = hostile
    monkeypatch.setattr(stamp, "ROOT", folder)
    assert stamp.commit().endswith("+")
    assert not ran.exists()


def test_an_installed_package_has_no_commit_even_inside_a_repository(hostile, monkeypatch):
    folder, ran = hostile
    inside = folder / "site-packages"
    os.mkdir(inside)
    monkeypatch.setattr(stamp, "ROOT", inside)
    assert stamp.commit() == "none"
    assert not ran.exists()
