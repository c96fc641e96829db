"""Processes that begin with everything imported: forks of one that is started once."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

PATIENCE = 1800
"""Seconds after which a test that hangs is given up: the only clock of the tests. What they check
depends on what happened, so they hold on a slow and on a busy machine."""

SERVER = """
import atexit, gc, json, os, runpy, sys, threading, traceback
sys.path.insert(0, ROOT)
import torch._dynamo, lightning.pytorch, transformers, matplotlib.figure, state._cli
import cell_load.data_modules, state.tx.utils, state.tx.models.state_transition
import create_esm_pert_features, train_with_esm_features

gc.freeze()  # or every process would first copy all of it, only to free it at its end
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        pid, status = os.waitpid(job["wait"], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else "running", flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
os.setsid()
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, name in ((1, job["out"]), (2, job["err"])):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
sys.argv = job["argv"]
sys.orig_argv = [sys.executable, *sys.argv]
if job["whole_end"]:
    exec(job["code"])
    sys.exit()
try:
    exec(job["code"])
    status = 0
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    status = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""

SCRIPT = "runpy.run_path(sys.argv[0], run_name='__main__')"
"""Python's own way to run sys.argv[0]."""

STATE = "import state.__main__; sys.exit(state.__main__.main())"
"""What the command `state` does."""


class Server:
    """Starts processes, forked after the imports of both scripts and of State's training.

    Each has a folder, an environment, arguments, standard streams and a process group of its own,
    and its memory is that of a Python that has done nothing but import. What an import reads, the
    hash seed among it, is that of the server.
    """

    def __init__(self) -> None:
        code = SERVER.replace("ROOT", repr(str(ROOT)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lock = threading.Lock()

    def ask(self, **job: Any) -> str:
        assert self.process.stdin and self.process.stdout
        with self.lock:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            return self.process.stdout.readline().strip()

    def begin(
        self,
        code: str,
        argv: list[str],
        cwd: Path,
        env: dict[str, str],
        out: Path,
        err: Path,
        whole_end: bool = True,
    ) -> int:
        """Start a process; returns its id.

        Parameters
        ----------
        code
            Python code.
        out, err
            Files for its standard output and error.
        whole_end
            Whether it ends as any Python does, which takes apart everything that was imported; if
            not, it ends after the functions of atexit.
        """
        job = {"code": code, "argv": argv, "cwd": str(cwd), "env": env, "whole_end": whole_end}
        return int(self.ask(**job, out=str(out), err=str(err)))

    def code(self, pid: int) -> int | None:
        """Exit code of a process, once; None while it runs."""
        answer = self.ask(wait=pid)
        return None if answer == "running" else int(answer)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def server() -> Server:
    """The one of this test session, started by who needs it first."""
    return Server()


def end_server() -> None:
    if server.cache_info().currsize:
        server().end()


class Fork:
    """A process of the server's, in place of a subprocess.Popen with pipes.

    Parameters
    ----------
    code
        Python code.
    argv
        Its sys.argv.
    env
        Its environment, if not that of this process.
    err
        File for its standard error, if not one that `communicate` reads.
    whole_end
        As in Server.begin.
    """

    def __init__(
        self,
        code: str,
        argv: Iterable[object],
        cwd: Path,
        env: dict[str, str] | None = None,
        err: Path | None = None,
        whole_end: bool = False,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name, "out")
        self.err = err or Path(self.folder.name, "err")
        env = dict(os.environ) if env is None else env
        files = (self.out, self.err)
        for path in files:
            path.touch()
        self.pid = server().begin(code, [str(a) for a in argv], cwd, env, *files, whole_end)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = server().code(self.pid)
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        limit = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < limit, "hangs"
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
