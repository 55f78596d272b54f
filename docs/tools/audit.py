"""Look at the built site in Chromium: `python -m docs.tools.audit site [FOLDER]`.

Every page at 1280 and 390 CSS pixels, light and dark: no horizontal scroll, text with the contrast of WCAG AA, no
character without a glyph, no request to another site, no error of a script. FOLDER: screenshots are written there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from docs.tools.browser import Browser

WIDTHS = (1280, 390)

CONTRAST, GLYPHS = (
    Path(__file__).with_name(f"{name}.js").read_text(encoding="utf-8") for name in ("contrast", "glyphs")
)


def look(browser: Browser, page: Path, width: int, dark: bool) -> list[str]:
    """Problems of a page in one width and scheme."""
    browser.open(page.as_uri(), width=width, height=900, dark=dark)
    found = []
    wide = browser.run("document.documentElement.scrollWidth")
    if wide > width:
        found.append(f"is {wide} pixels wide")
    found += [f"contrast of {text}" for text in browser.run(CONTRAST)]
    found += [f"no glyph for U+{ord(character):04X}" for character in browser.run(GLYPHS)]
    found += [f"asks for {url}" for url in browser.requests() if not url.startswith(("file:", "blob:"))]
    return found + [f"error: {error}" for error in browser.errors()]


def problems(site: Path, screenshots: Path | None = None) -> list[str]:
    """A line for each problem of each page."""
    found = []
    with Browser() as browser:
        for page in sorted(site.resolve().rglob("*.html")):
            if page.name == "404.html":  # its files are at the server's root
                continue
            for width in WIDTHS:
                for scheme in ("light", "dark"):
                    name = page.relative_to(site.resolve()).as_posix()
                    seen = look(browser, page, width, scheme == "dark")
                    found += [f"{name} at {width}, {scheme}: {problem}" for problem in seen]
                    if screenshots is not None:
                        shot = f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                        browser.screenshot(screenshots / shot)
    return found


def main(argv: Sequence[str]) -> int:
    """Print the problems and return the exit code."""
    found = problems(Path(argv[0]), Path(argv[1]) if len(argv) > 1 else None)
    print("\n".join(found) or "no problem in any page")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
