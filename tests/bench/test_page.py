"""The page of timings, as its commands write it."""

import subprocess
import sys
from pathlib import Path

from bench import page
from bench.page import PAGE, commands, with_output

ROOT = Path(__file__).parents[2]
TEXT = """# Timings

<!-- python -m bench.absent --rounds 3 -->
```
old
```

<!-- python -m bench.page --list -->
```
older
lines
```

```
another
```
"""


def test_each_command_of_the_page_is_found_once():
    found = commands(PAGE.read_text())
    assert len(found) == len(set(found)) > 5
    for command in found:
        assert (ROOT / f"{command.split()[2].replace('.', '/')}.py").exists(), command


def test_output_replaces_the_block_of_its_command_only():
    written = with_output(TEXT, "python -m bench.absent --rounds 3", "new \\1\n")
    assert written == TEXT.replace("old\n", "new \\1\n")


def test_a_command_that_fails_leaves_its_block(tmp_path):
    file = tmp_path / "bench.md"
    file.write_text(TEXT)
    command = [sys.executable, "-m", "bench.page", "--page", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "python -m bench.absent --rounds 3 ended with code 1" in done.stderr
    text = file.read_text()
    assert "old\n" in text
    assert "older" not in text
    assert page.run("python -m bench.page --list", "v").splitlines()[1:] == commands(PAGE.read_text())
    assert "another" in text
