"""A server with the endpoints of Hugging Face's Hub that a download uses, for models in folders of this machine."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path


class Hub(http.server.ThreadingHTTPServer):
    """models: folder of each revision by id of a model. requests: method and path of each. tokens: by id, if needed."""

    daemon_threads = True

    def __init__(self, models: dict[str, dict[str, Path]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.requests = models, []
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.failing: int | None = None  # status of every answer
        self.cut: set[str] = set()  # files of which half is sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloaded(self) -> list[str]:
        """Files whose content was sent, sorted."""
        return sorted(
            {
                path.split("/resolve/")[1].split("/", 1)[1]
                for how, path in self.requests
                if how == "GET" and "/resolve/" in path
            }
        )


@contextlib.contextmanager
def running(models):
    """A hub that answers while the context lasts."""
    with Hub(models) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def commit(name, revision):
    return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if hub.failing is not None:
            return self.refuse(hub.failing, None)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, kind, revision = (
                "/".join(parts[2:4]),
                parts[4] if parts[4:] else "revision",
                "/".join(parts[5:]) or "main",
            )
        else:  # …/resolve/…; the package asks for other paths too, such as api/agent-harnesses
            name, kind, revision = "/".join(parts[:2]), "resolve", "".join(parts[3:4])
        if name not in hub.models or not revision:
            return self.refuse(401, None)  # as the Hub, which does not tell absent from private
        wanted = hub.tokens.get(name)
        if wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}":
            return self.refuse(*((403, "GatedRepo") if name in hub.gated else (404, "RepoNotFound")))
        commits = {commit(name, known): known for known in hub.models[name]}
        revision = commits.get(revision, revision or "main")
        if revision not in hub.models[name]:
            return self.refuse(404, "RevisionNotFound")
        folder, sha = hub.models[name][revision], commit(name, revision)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        if kind == "revision":
            return self.answer({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in names]})
        if kind == "tree":
            entries = [
                {"type": "file", "path": file, "size": path.stat().st_size, "oid": oid(path)}
                for file, path in zip(names, files, strict=True)
            ]
            return self.answer(entries)
        file = "/".join(parts[4:])
        if file not in names:
            return self.refuse(404, "EntryNotFound")
        return self.send(folder / file, sha)

    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)

    def send(self, file, sha):
        content = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{oid(file)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            if file.name in self.server.cut:
                self.wfile.write(content[start : (start + len(content)) // 2])
                self.close_connection = True
                return
            self.wfile.write(content[start:])

    def refuse(self, status, code):
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def oid(file):
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
