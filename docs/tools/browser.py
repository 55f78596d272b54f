"""Headless Chromium over the pipe of its DevTools protocol: screenshots, and scripts that read a page.

Needs the program `chromium` or `google-chrome`; no Python package, no network.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

TIMEOUT = 60.0  # seconds to wait for one answer
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One page in a headless browser, as a context manager."""

    def __init__(self) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            raise ValueError(f"no browser found; install one of {', '.join(NAMES)}")
        self.profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        flags += ["--allow-file-access-from-files", "--disable-dev-shm-usage", f"--user-data-dir={self.profile.name}"]

        # The protocol reads from descriptor 3 and writes to descriptor 4.
        shell = f'exec {program} "$@" 3<&{read_commands} 4>&{write_answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *flags, "about:blank"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.numbers = itertools.count(1)
        self.session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.session = ""
        try:
            self.call("Browser.close")
        finally:
            self.process.wait(TIMEOUT)
            os.close(self.commands)
            os.close(self.answers)
            self.profile.cleanup()

    def message(self, deadline: float) -> dict[str, Any]:
        """Next message; raises TimeoutError if none comes, and ConnectionError if the browser ended."""
        while b"\0" not in self.buffer:
            if not select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no answer of the browser within {TIMEOUT:g} s")
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise ConnectionError("the browser ended")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        received: dict[str, Any] = json.loads(text)
        return received

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; raises ValueError with the browser's reason."""
        number = next(self.numbers)
        sent = {"id": number, "method": method, "params": parameters}
        if self.session:
            sent["sessionId"] = self.session
        data = json.dumps(sent).encode() + b"\0"
        while data:
            data = data[os.write(self.commands, data) :]
        deadline = time.monotonic() + TIMEOUT
        while True:
            received = self.message(deadline)
            if received.get("id") == number:
                if "error" in received:
                    raise ValueError(f"{method}: {received['error']['message']}")
                result: dict[str, Any] = received["result"]
                return result
            self.events.append(received)

    def open(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False, scale: float = 1.0) -> None:
        """Load a page in a window of CSS pixels and wait until it is complete."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + TIMEOUT
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message(deadline))
        self.run("new Promise(done => document.fonts.ready.then(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page, await it if it is a promise, and return its value as JSON has it."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise ValueError(f"script failed: {done['exceptionDetails']}")
        return done["result"].get("value")

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def errors(self) -> list[str]:
        """Errors of the page's scripts and resources since it was opened."""
        entries = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        thrown = [e["params"] for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        return [f"{e['text']} {e.get('url', '')}" for e in entries if e["level"] == "error"] + [str(e) for e in thrown]

    def screenshot(
        self, file: Path, *, whole: bool = False, clip: tuple[float, float, float, float] | None = None
    ) -> None:
        """Write a PNG of the window, of the whole page, or of a part of it (x, y, width, height)."""
        parameters: dict[str, Any] = {"format": "png"}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = (0, 0, size["width"], size["height"])
        if clip is not None:
            x, y, width, height = clip
            parameters |= {"captureBeyondViewport": True}
            parameters["clip"] = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **parameters)["data"]))
