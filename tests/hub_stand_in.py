"""A stand-in for the hub on loopback: serves one folder as one repository, and notes each file that it gives away."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

REPO = "someone/model"


class Hub(ThreadingHTTPServer):
    """One repository with one commit."""

    def __init__(self, folder: Path, commit: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.commit = folder, commit
        self.given: list[str] = []

    def reply(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """What to say to a request, and with which headers; None for 404."""
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        asked = [part for part in path.split("/") if len(part) == len(self.commit)]  # by commit, not by branch
        commit = asked[0] if asked else self.commit
        if path.startswith(f"/api/models/{REPO}"):
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _digest(f)} for f in files]
            about = {"id": REPO, "sha": commit, "siblings": [{"rfilename": file.name} for file in files]}
            return json.dumps(tree if "/tree/" in path else about).encode(), {"Content-Type": "application/json"}
        file = self.folder / path.rpartition("/")[2]
        if "/resolve/" not in path or file not in files:
            return None
        return file.read_bytes(), {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": commit}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        found = self.server.reply(path)
        body, headers = found or (b"", {"X-Error-Code": "EntryNotFound"})
        self.send_response(200 if found else 404)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and found:
            self.wfile.write(body)
            if "/resolve/" in path:
                self.server.given.append(path.rpartition("/")[2])

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def serving(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, commit: str = "a" * 40) -> Iterator[Hub]:
    """The hub's client of this process talks to a stand-in, and keeps what it fetches in `cache`."""
    with Hub(folder, commit) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        try:
            yield hub
        finally:
            hub.shutdown()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
