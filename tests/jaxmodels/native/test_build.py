"""Compilation of the kernel: once, into a private folder, and never the end of a program."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmodels.native import build

ROOT = Path(__file__).parents[3]
PROGRAM = "from jaxmodels import native; print(native.available())"
FAILING = """#!/bin/sh
case $1 in --version) echo 1;; *) echo 'products.cc:1:2: error: \x1b[31mno\x1b[0m such' >&2; exit 3;; esac
"""


def program(tmp_path, **environment):
    """A process that asks for the kernel, with a cache of its own."""
    given = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    given.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.splitlines()


def compiler(tmp_path, text):
    file = tmp_path / "compiler"
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxmodels" / "native"


@pytest.mark.slow
def test_a_failed_compilation_is_one_line_and_leaves_no_file(tmp_path):
    available, lines = program(tmp_path, CXX=compiler(tmp_path, FAILING))
    assert available == "False"
    (compiling, failed) = lines
    assert "compiling products.cc and matmul.cc" in compiling
    assert re.search(r"exit code 3.*products\.cc:1:2: error: \\x1b\[31mno", failed)
    assert list((tmp_path / "cache" / "jaxmodels" / "native").iterdir()) == []


@pytest.mark.slow
def test_the_switch_compiles_nothing(tmp_path):
    assert program(tmp_path, JAXMODELS_NATIVE="0", CXX=compiler(tmp_path, FAILING)) == ("False", [])
    assert not (tmp_path / "cache").exists()


def test_no_compiler_is_said(private, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(private))
    with pytest.raises(build.BuildError, match="CXX"):
        build.find_compiler()


def test_a_compiler_that_does_not_end_is_stopped(private, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SECONDS", 0.1)
    with pytest.raises(build.BuildError, match=r"0 s"):
        build.run([compiler(tmp_path, "#!/bin/sh\nexec sleep 60\n")])


def test_the_folder_and_file_are_the_user_s_alone(private, monkeypatch, tmp_path):
    assert stat.S_IMODE(build.private_folder(private).stat().st_mode) == 0o700
    private.chmod(0o770)
    with pytest.raises(build.BuildError, match="native must be"):
        build.private_folder(private)
    private.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    private.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(build.BuildError, match="native must be"):
        build.private_folder(private)
    file = tmp_path / "products.so"
    file.write_bytes(b"")
    file.chmod(0o666)
    with pytest.raises(build.BuildError, match=r"products\.so"):
        build.check_own(file)


@pytest.mark.parametrize("given", ["", ".", "cache"])
def test_the_cache_is_never_in_the_current_folder(given, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert build.cache() == Path.home() / ".cache" / "jaxmodels" / "native"


def test_the_name_depends_on_source_compiler_processor_and_headers(private, tmp_path, monkeypatch):
    version = compiler(tmp_path, "#!/bin/sh\necho 1\n")
    first = build.key([version], "headers")
    assert build.key([version], "headers") == first
    others = [build.key([version, "-m32"], "headers"), build.key([version], "other")]
    compiler(tmp_path, "#!/bin/sh\necho 2\n")
    others.append(build.key([version], "headers"))
    monkeypatch.setattr(build, "processor", lambda: "another")
    others.append(build.key([version], "headers"))
    for files in ("SOURCES", "HEADERS"):
        monkeypatch.setattr(build, files, [*getattr(build, files), tmp_path / "compiler"])
        others.append(build.key([version], "headers"))
        monkeypatch.undo()
    assert len({first, *others}) == 7


@pytest.mark.slow
def test_it_is_compiled_once(tmp_path):
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    first, lines = program(tmp_path)
    assert (first, len(lines)) == ("True", 1)
    (file,) = (tmp_path / "cache" / "jaxmodels" / "native").iterdir()
    assert file.stat().st_mode & 0o022 == 0
    assert program(tmp_path) == ("True", [])


def test_the_sources_are_in_the_package():
    for file in (*build.SOURCES, *build.HEADERS):
        assert file.is_file()
        assert file.is_relative_to(ROOT / "jaxmodels")
