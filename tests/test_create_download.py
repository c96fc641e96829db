"""The download of Arc's table: the real Hugging Face client against a server on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, Result, until

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "/arcinstitute/SE-600M/resolve/main/protein_embeddings.pt"
ADVICE = "Run again when it can be reached, or pass a table with --esm-embeddings FILE"
CONTROL = "non-targeting"
PIECE = 10 * 1024 * 1024
"""Bytes that the client writes to the disk at a time."""


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes
    ----------
    body
        The file.
    refuse
        (status, X-Error-Code) of every answer, if it refuses.
    cuts
        How many transfers break off in the middle of the body.
    hold
        Transfers stop after half of the body until this is set.
    asked
        (method, path, Range header) of every request.
    """

    body: bytes
    refuse: tuple[int, str] | None = None
    cuts: int = 0
    hold: threading.Event | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    @property
    def transfers(self) -> list[str | None]:
        """Range header of every request of the body."""
        return [span for method, path, span in self.asked if (method, path) == ("GET", "/content")]


class Handler(BaseHTTPRequestHandler):
    """The hub's file protocol: metadata and a redirect to another host that has the content."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.hub
        hub.asked.append((self.command, self.path, self.headers["Range"]))
        if hub.refuse is not None or self.path not in (FILE, "/content"):
            status, code = hub.refuse or (404, "EntryNotFound")
            self.headers_of(status, {"X-Error-Code": code, "Content-Length": "0"})
        elif self.path == FILE:
            etag = hashlib.sha256(hub.body).hexdigest()
            port = self.server.server_address[1]
            self.headers_of(
                302,
                {
                    "Location": f"http://localhost:{port}/content",
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(hub.body)),
                    "X-Linked-Etag": f'"{etag}"',
                    "Content-Length": "0",
                },
            )
        else:
            self.content()

    def headers_of(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def content(self) -> None:
        hub = self.hub
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        length = len(hub.body) - start
        headers = {
            "Content-Length": str(length),
            "Content-Disposition": 'inline; filename="protein_embeddings.pt";',
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(hub.body) - 1}/{len(hub.body)}"
        self.headers_of(206 if start else 200, headers)
        if self.command == "HEAD":
            return
        half = len(hub.body) // 2
        if len(hub.transfers) <= hub.cuts:
            self.wfile.write(hub.body[start:half])
            self.close_connection = True
            return
        if hub.hold is not None:
            self.wfile.write(hub.body[start:half])
            hub.hold.wait()
            self.close_connection = True
            return
        self.wfile.write(hub.body[start:])


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A table of 24 MB: the client takes pieces of 10 MB, so that half of it is a start."""
    path = tmp_path_factory.mktemp("body") / "table.pt"
    torch.save({g: torch.full((2_000_000,), i + 1.0) for i, g in enumerate("ABC")}, path)
    return path.read_bytes()


@pytest.fixture
def hub(body: bytes) -> Iterator[Hub]:
    """A hub that serves `body` on loopback."""
    hub = Hub(body)
    handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        if hub.hold is not None:
            hub.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


# Only the constants that describe Arc's file are another file's; all code is the script's.
START = (
    "import sys, create_esm_pert_features as script\n"
    "from state_esm_features.embedding import downloads\n"
    "downloads.ARC_SHA256, downloads.ARC_BYTES = sys.argv[1], int(sys.argv[2])\n"
    "sys.exit(script.main(sys.argv[3:]))"
)


def start(
    folder: Path,
    endpoint: str,
    expected: bytes,
    *arguments: str,
    stderr: int = subprocess.PIPE,
    **env: str,
) -> subprocess.Popen[str]:
    """Start the script in `folder` with the hub at `endpoint` and its cache in folder/hf."""
    (folder / "g.txt").write_text("A\nB\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [
            *(sys.executable, "-c", START),
            *(hashlib.sha256(expected).hexdigest(), str(len(expected))),
            *("--gene-list", "g.txt", "--output", "o.pt", *arguments),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={
            **clean,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_VERBOSITY": "error",  # keeps the client's own retry messages out
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE),
            "HF_HUB_ETAG_TIMEOUT": str(PATIENCE),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        | env,
    )


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out, err)


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, hub: Hub) -> Run:
    def run(*arguments: str, expected: bytes = hub.body, **env: str) -> Result:
        return finish(start(tmp_path, hub.url, expected, *arguments, **env))

    return run


def announcement(folder: Path, verb: str = "downloading") -> str:
    return (
        f"{verb} protein_embeddings.pt of arcinstitute/SE-600M (24 MB) into {folder}/hf/hub. The "
        "repository is under the Arc Institute's non-commercial licence. --esm-embeddings FILE "
        "avoids the download\n"
    )


def cached(folder: Path) -> Path:
    """Where the client keeps the file."""
    snapshots = folder / "hf/hub/models--arcinstitute--SE-600M/snapshots"
    return snapshots / COMMIT / "protein_embeddings.pt"


def nothing_written(folder: Path) -> bool:
    return {p.name for p in folder.iterdir()} <= {"g.txt", "hf"}


def summary(folder: Path) -> str:
    return (
        "labels    3 (1 control, 2 exact)\n"
        "from      g.txt (2 labels)\n"
        f"source    {cached(folder)} (3 genes x 2,000,000)\n"
    )


def test_the_table_is_downloaded_once_and_that_is_said_before_it_starts(
    tmp_path: Path, hub: Hub, run: Run
) -> None:
    assert run() == Result(0, "o.pt\n", announcement(tmp_path) + summary(tmp_path))
    features = torch.load(tmp_path / "o.pt", weights_only=True)
    assert {k: (v[0].item(), len(v)) for k, v in features.items()} == {
        "A": (1.0, 2_000_000),
        "B": (2.0, 2_000_000),
        CONTROL: (0.0, 2_000_000),
    }
    assert cached(tmp_path).read_bytes() == hub.body
    assert hub.transfers == [None]

    hub.asked.clear()
    first = (tmp_path / "o.pt").read_bytes()
    assert run() == Result(0, "o.pt\n", summary(tmp_path))
    assert hub.asked == []
    assert run("--quiet", HF_HUB_OFFLINE="1") == Result(0, "o.pt\n", "")
    assert (tmp_path / "o.pt").read_bytes() == first


def test_a_terminal_shows_the_progress_bar_of_the_client(tmp_path: Path, hub: Hub) -> None:
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = start(tmp_path, hub.url, hub.body, stderr=stderr, HF_HUB_DISABLE_PROGRESS_BARS="0")
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the last process has closed the terminal
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert (process.communicate(timeout=PATIENCE)[0], process.returncode) == ("o.pt\n", 0)
    text = shown.decode().replace("\r\n", "\n")
    assert text.startswith(announcement(tmp_path))
    assert re.search(r"protein_embeddings\.pt: 100%\|.*\| 24\.0M/24\.0M", text)
    assert text.endswith(summary(tmp_path))


def test_no_download_where_a_table_is_given(tmp_path: Path, hub: Hub, run: Run) -> None:
    torch.save({"A": torch.ones(3), "B": -torch.ones(3)}, tmp_path / "mine.pt")
    assert run("--esm-embeddings", "mine.pt", "--quiet") == Result(0, "o.pt\n", "")
    assert hub.asked == []


def test_no_download_in_a_dry_run(tmp_path: Path, hub: Hub, run: Run) -> None:
    assert run("--dry-run") == Result(
        0, "", announcement(tmp_path, "would download") + "2 labels to look up: A, B\n"
    )
    assert hub.asked == []
    assert {p.name for p in tmp_path.iterdir()} == {"g.txt"}


@pytest.mark.parametrize(
    "refuse",
    [(404, "EntryNotFound"), (404, "RepoNotFound"), (401, "RepoNotFound"), (403, "GatedRepo")],
)
def test_a_file_that_the_hub_does_not_give_is_an_error(
    tmp_path: Path, hub: Hub, run: Run, refuse: tuple[int, str]
) -> None:
    hub.refuse = refuse
    assert run() == Result(
        1,
        "",
        announcement(tmp_path)
        + "error: cannot download protein_embeddings.pt: the Hugging Face hub has no such file in "
        "arcinstitute/SE-600M, or wants a login. Pass a table with --esm-embeddings FILE\n",
    )
    assert nothing_written(tmp_path)


def test_another_refusal_of_the_hub_is_an_error_with_its_words(
    tmp_path: Path, hub: Hub, run: Run
) -> None:
    hub.refuse = (401, "")
    assert run() == Result(
        1,
        "",
        announcement(tmp_path)
        + "error: cannot download protein_embeddings.pt: HfHubHTTPError: Client error '401 "
        f"Unauthorized' for url '{hub.url}{FILE}'. {ADVICE}\n",
    )
    assert nothing_written(tmp_path)


def test_a_transfer_that_breaks_off_once_is_resumed(tmp_path: Path, hub: Hub, run: Run) -> None:
    hub.cuts = 1
    assert run("--quiet") == Result(0, "o.pt\n", announcement(tmp_path))
    assert hub.transfers == [None, f"bytes={PIECE}-"]
    assert cached(tmp_path).read_bytes() == hub.body


def test_a_transfer_that_always_breaks_off_is_an_error_and_works_later(
    tmp_path: Path, hub: Hub, run: Run
) -> None:
    hub.cuts = 1000
    done = run()
    assert done == Result(
        1,
        "",
        announcement(tmp_path)
        + "error: cannot download protein_embeddings.pt: RemoteProtocolError: peer closed "
        f"connection without sending complete message body (received {len(hub.body) // 2 - PIECE} "
        f"bytes, expected {len(hub.body) - PIECE}). {ADVICE}\n",
    )
    assert len(hub.transfers) > 1
    assert nothing_written(tmp_path) and not cached(tmp_path).exists()
    hub.cuts = 0
    assert run("--quiet") == Result(0, "o.pt\n", announcement(tmp_path))


def test_another_sha256_is_an_error_and_deleting_the_file_downloads_it_again(
    tmp_path: Path, hub: Hub, run: Run
) -> None:
    right, hub.body = hub.body, hub.body[:-1] + b"x"
    found, expected = (hashlib.sha256(b).hexdigest() for b in (hub.body, right))
    assert run(expected=right).code == 1
    path = cached(tmp_path).resolve()
    error = (
        f"error: {path} has sha256 {found}, expected {expected}: the download is damaged, or the "
        "table was replaced. Delete that file to download it again, or pass it with "
        "--esm-embeddings to use it as it is\n"
    )
    hub.asked.clear()
    assert run(expected=right) == Result(1, "", error)
    assert hub.asked == [] and nothing_written(tmp_path)

    path.unlink()
    assert run(expected=right) == Result(1, "", announcement(tmp_path) + error)
    assert len(hub.transfers) == 1 and nothing_written(tmp_path)
    path.unlink()
    hub.body = right
    assert run("--quiet") == Result(0, "o.pt\n", announcement(tmp_path))


def test_ctrl_c_in_the_middle_of_the_download_writes_nothing(tmp_path: Path, hub: Hub) -> None:
    hub.hold = threading.Event()
    process = start(tmp_path, hub.url, hub.body)
    assert process.stderr is not None
    # said while not even half of the file has come
    assert process.stderr.readline() == announcement(tmp_path)
    until(lambda: hub.transfers, process)
    process.send_signal(signal.SIGINT)
    assert finish(process) == Result(130, "", "stopped by Ctrl-C\n")
    assert nothing_written(tmp_path) and not cached(tmp_path).exists()


def test_the_hub_offline_by_choice_is_an_error(tmp_path: Path, hub: Hub, run: Run) -> None:
    assert run(HF_HUB_OFFLINE="1") == Result(
        1,
        "",
        announcement(tmp_path)
        + "error: cannot download protein_embeddings.pt: the Hugging Face hub cannot be reached. "
        f"{ADVICE}\n",
    )
    assert hub.asked == [] and nothing_written(tmp_path)


@pytest.mark.parametrize("accepts", [False, True])
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path: Path, accepts: bool) -> None:
    """Where nothing listens, and where what listens never answers: the client tries for minutes."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if accepts:
            silent.listen()
        endpoint = "http://{}:{}".format(*silent.getsockname())
        patience = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_VERBOSITY": "warning"}
        assert finish(start(tmp_path, endpoint, bytes(24_000_000), **patience)) == Result(
            1,
            "",
            announcement(tmp_path)
            + "error: cannot download protein_embeddings.pt: the Hugging Face hub cannot be "
            f"reached. {ADVICE}\n",
        )
    assert nothing_written(tmp_path)
