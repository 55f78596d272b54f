"""Hooks of MkDocs: generated pages, links to files of the repository, links from names to the reference."""

import os
import posixpath
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("COLUMNS", "88")  # width of usage lines
os.environ.setdefault("NO_COLOR", "1")

from docs.tools import annotate, commands, notebooks, reference  # noqa: E402

# Pages whose source is a file of the repository's root.
PROJECT = {
    "project/changelog.md": "CHANGELOG.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/security.md": "SECURITY.md",
}
LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)\s#]+)(#[^)\s]*)?(\))")
# Inline code, outside of links and headings.
CODE = re.compile(r'<(a|h\d|pre)\b.*?</\1>|<code(?: class="short")?>([^<]+)</code>', re.S)
SHIM = "https://unpkg.com/iframe-worker/shim"  # which the theme loads for the search of a site opened from a file
# A picture in two versions: on a repository's page by the system's colors, on the site by the page's.
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]*)">'
    r'\s*<img (.*?) src="([^"]*)"[^>]*>\s*</picture>'
)
# A figure that stands alone, whose colors are those of the page if it is a part of it.
FIGURE = re.compile(r'<p><img alt="([^"]*)" src="([^":]*\.svg)" ?/?></p>')
# Inline code that fits on a line of a phone, such as a flag; a line must not end within it.
SHORT = re.compile(r"<code>([^<]{1,26})</code>")
COMMAND = re.compile(r"(jaxmodels|parity) ([a-z][a-z-]*)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference, those of the root's files, and the notebooks."""
    for page in reference.PAGES:
        files.append(File.generated(config, page, content=reference.page(page)))
    for page, make in commands.PAGES.items():
        files.append(File.generated(config, page, content=make()))
    for page, source in PROJECT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, source in notebooks.PAGES.items():
        files.append(File.generated(config, page, content=notebooks.page(source)))
    return files


def destination(page: str, target: str, repository: str) -> str:
    """Link of a page, written for the repository, as a link of the site.

    page: path in docs/, in PROJECT or of a notebook. Files that are no pages are linked on the repository's own site.
    """
    own = PROJECT | notebooks.PAGES
    source = own.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    pages = {file: made for made, file in own.items()}
    made = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if made is None or made.startswith("tools/") or made.endswith(".py"):
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{repository}/{kind}/main/{path}"
    return posixpath.relpath(made, posixpath.dirname(page))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they work on the site; code blocks are left alone."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)

    def linked(match: re.Match[str]) -> str:
        return f"{match[1]}{destination(here, match[2], config['extra']['repository'])}{match[3] or ''}{match[4]}"

    return "".join(part if part.startswith("```") else LINK.sub(linked, part) for part in parts)


def target_of(code: str) -> str | None:
    """Page and anchor of what a piece of inline code names; None if the reference has no entry for it."""
    name = code.partition("(")[0]
    names = reference.public()
    if name in names:
        return f"{names[name]}#{name}"
    match = COMMAND.match(code)
    if match and match[1] == "jaxmodels" and match[2] in commands.COMMANDS:
        return f"reference/command-jaxmodels.md#jaxmodels-{match[2]}"
    if code == "parity" or (match and match[2] == "verify"):
        return "reference/command-parity.md#" + ("parity" if code == "parity" else "parity-verify")
    return None


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Link names of the reference and commands in inline code."""
    here = page.file.src_uri

    def linked(match: re.Match[str]) -> str:
        target = target_of(match[2]) if match[2] else None
        if target is None or target.partition("#")[0] == here:
            return match[0]
        file = files.get_file_from_path(target.partition("#")[0])
        if file is None:
            return match[0]
        return f'<a href="{file.url_relative_to(page.file)}#{target.partition("#")[2]}">{match[0]}</a>'

    def drawn(match: re.Match[str]) -> str:
        folder = posixpath.dirname(f"docs/{here}")
        return annotate.figure(ROOT / posixpath.normpath(posixpath.join(folder, match[2])), unescape(match[1]))

    html = SHORT.sub(r'<code class="short">\1</code>', html)
    html = PICTURE.sub(r'<img class="only-dark" \2 src="\1"><img class="only-light" \2 src="\3">', html)
    html = CODE.sub(linked, FIGURE.sub(drawn, html))
    return notebooks.fill(html, notebooks.PAGES[here]) if here in notebooks.PAGES else html


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Scripts from this site only."""
    folder = posixpath.dirname(page.file.src_uri) or "."
    return output.replace(SHIM, posixpath.relpath("assets/iframe-worker.js", folder))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The same for pages without a source, such as that of a missing page."""
    return output.replace(SHIM, "/assets/iframe-worker.js")
