"""Check the built site without a browser: `python -m docs.tools.links site`.

Every link inside of the site leads to a file and an anchor that exist, and no page loads anything from another site.
"""

import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

# Elements that load what they name, and the attribute that names it. <a> is followed by people only.
LOADING = {"img": ("src",), "script": ("src",), "link": ("href",), "source": ("srcset",), "iframe": ("src",)}
HARMLESS = {"canonical", "prev", "next", "alternate"}  # <link rel=…> that loads nothing


class Page(HTMLParser):
    """Anchors, links and loaded files of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "a" and (target := values.get("href")):
            self.links.append(target)
        if tag == "link" and set((values.get("rel") or "").split()) & HARMLESS:
            return
        self.loaded += [value for name in LOADING.get(tag, ()) if (value := values.get(name))]


def problems(site: Path) -> list[str]:
    """A line for each dead link and each file that is loaded from another site."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        where = file.relative_to(site)
        if where.name == "404.html":  # its links are those of the server's root
            continue
        for target in page.loaded:
            if urlsplit(target).scheme not in ("", "data"):
                found.append(f"{where} loads {target}")
        for target in [*page.links, *page.loaded]:
            if urlsplit(target).scheme or target.startswith("//"):
                continue
            path, anchor = urldefrag(target)
            goal = (file.parent / unquote(path)).resolve() if path else file
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.is_file():
                found.append(f"{where} links to {target}, which does not exist")
            elif anchor and goal in pages and unquote(anchor) not in pages[goal].anchors and anchor != "__tabbed":
                found.append(f"{where} links to {target}, where the anchor does not exist")
    return list(dict.fromkeys(found))


def main(argv: Sequence[str]) -> int:
    """Print the problems and return the exit code."""
    found = problems(Path(argv[0]).resolve())
    print("\n".join(found) or "all links lead somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
