"""The built site: no warning, no dead link, nothing loaded from elsewhere, and what a browser says about each page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.tools import audit, links
from docs.tools.browser import NAMES, Browser

ROOT = Path(__file__).parents[2]
needs_browser = pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason="needs Chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    assert links.problems(site) == []


@pytest.mark.slow
@needs_browser
def test_pages_in_a_browser(site):
    assert audit.problems(site) == []


@pytest.mark.slow
@needs_browser
def test_search_works_without_a_server(site):
    with Browser() as browser:
        browser.open((site / "index.html").as_uri())
        browser.run("""(() => {
            const query = document.querySelector("[data-md-component=search-query]");
            query.focus();
            query.value = "layouts";
            query.dispatchEvent(new Event("input", {bubbles: true}));
            query.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
        })()""")
        found = browser.run("""new Promise(done => {
            const found = () => [...document.querySelectorAll(".md-search-result__item h1")];
            const titles = () => found().map(element => element.textContent.trim());
            const waiting = setInterval(() => titles().length && (clearInterval(waiting), done(titles())), 50);
            setTimeout(() => done([]), 20000);
        })""")
    assert "Names and layouts" in found


def built(folder: Path, **pages: str) -> Path:
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{body}</body></html>", encoding="utf-8")
    return folder


def test_dead_links_anchors_and_foreign_files_are_found(tmp_path):
    site = built(
        tmp_path,
        a='<a href="b.html#x">b</a><a href="https://example.org">fine</a><a href="#top">no</a>'
        '<script src="https://cdn.example.org/s.js"></script><link rel="canonical" href="https://example.org/a">',
        b='<p id="x">x</p><a href="c.html">c</a><a href="a.html#y">y</a>',
    )
    assert links.problems(site) == [
        "a.html loads https://cdn.example.org/s.js",
        "a.html links to #top, where the anchor does not exist",
        "b.html links to c.html, which does not exist",
        "b.html links to a.html#y, where the anchor does not exist",
    ]


@pytest.mark.slow
@needs_browser
def test_a_browser_sees_width_contrast_and_missing_glyphs(tmp_path):
    site = built(
        tmp_path,
        page='<p style="color: #888; width: 500px">pale \U00013000</p><img src="https://example.invalid/i.png">',
    )
    found = audit.problems(site)
    narrow = [line for line in found if line.startswith("page.html at 390, light")]
    assert any("is 508 pixels wide" in line for line in narrow)
    assert any("contrast of p. 3.54" in line for line in narrow)
    assert any("no glyph for U+13000" in line for line in narrow)
    assert any("asks for https://example.invalid/i.png" in line for line in narrow)
    assert not any("pixels wide" in line for line in found if "at 1280" in line)
