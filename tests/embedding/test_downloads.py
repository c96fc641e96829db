"""Weights of ESM2, downloaded once from a server on loopback."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from random_esm2 import write_checkpoint

from state_esm_features.console import InputError
from state_esm_features.embedding import downloads
from state_esm_features.embedding.downloads import weights_path
from state_esm_features.embedding.esm2 import open_checkpoint

NAME = "esm2_t6_8M_UR50D"


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` at /models/NAME.pt, `missing` bytes fewer than it announces."""

    body = b""
    missing = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers HEAD and GET."""

    server: Server

    def do_HEAD(self) -> None:
        self.server.requests.append((self.command, self.path))
        if self.path != f"/models/{NAME}.pt" or not self.server.body:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body) + self.server.missing))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.server.body)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on loopback in the place of fair-esm's; torch.hub's folder is tmp_path/hub."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.hub.set_dir(tmp_path / "hub")
    with Server() as serving:
        address = f"http://127.0.0.1:{serving.server_port}/models/{{}}.pt"
        monkeypatch.setattr(downloads, "ESM2_URL", address)
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def files(folder: Path) -> list[str]:
    """All files under a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_weights_are_downloaded_once(tmp_path: Path, server: Server) -> None:
    """Into the folder where fair-esm looks, byte for byte; afterwards without the network."""
    write_checkpoint(tmp_path / "served.pt", 1, 8, 2)
    server.body = (tmp_path / "served.pt").read_bytes()
    path = weights_path(NAME, False)
    assert path == tmp_path / "hub" / "checkpoints" / f"{NAME}.pt"
    assert path.read_bytes() == server.body
    assert server.requests == [("HEAD", f"/models/{NAME}.pt"), ("GET", f"/models/{NAME}.pt")]
    assert files(tmp_path / "hub") == [f"checkpoints/{NAME}.pt"]
    assert open_checkpoint(NAME, path).layers == 1
    assert weights_path(NAME, False) == weights_path(NAME, True) == path
    assert len(server.requests) == 2


def test_a_dry_run_downloads_nothing(tmp_path: Path, server: Server) -> None:
    """No request, no folder."""
    server.body = b"weights"
    assert weights_path(NAME, True) is None
    assert server.requests == []
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("body", "missing", "why"),
    [
        (b"weights" * 1000, 100, "7,000 of 7,100 bytes came"),
        (b"", 0, "HTTP Error 404: Not Found"),
    ],
    ids=["cut short", "not found"],
)
def test_a_failed_download_leaves_no_file(
    tmp_path: Path, server: Server, body: bytes, missing: int, why: str
) -> None:
    """Cut short or not there: one message, and nothing a later run could take for weights."""
    server.body, server.missing = body, missing
    with pytest.raises(InputError) as failed:
        weights_path(NAME, False)
    assert str(failed.value) == (
        f"cannot download {downloads.ESM2_URL.format(NAME)}: {why}. Run again when it can be "
        "reached, or pass the file with --esm-model FILE"
    )
    assert files(tmp_path) == []
