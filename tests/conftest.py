"""Fixtures: the two scripts as a user runs them, and small simulated screens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anndata
import pytest
import torch
from demo_data import Screen, simulate, vectors
from forks import PATIENCE, ROOT, SCRIPT, STATE, Fork, end_server
from h5ad_forms import TREE, write_screen
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(ROOT))

# cell-load reads no nullable strings, which anndata 0.13 writes for every index
anndata.settings.allow_write_nullable_strings = False

# an example may take as long as it takes on a slow or busy machine
settings.register_profile(
    "patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

# a shell starts what is in its background with Ctrl-C ignored, and all that this starts inherits it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at once: a core for each
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = Screen(perturbed=10, families=3, width=8, genes=30, cells=12, controls=24, batches=2)


@dataclass(frozen=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run_process(name: str, *arguments: object, cwd: Path, **options: object) -> Result:
    """Run `name`.py in a Python of its own, as from a shell: where the start is what matters."""
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **options,  # type: ignore[call-overload]
    )
    return Result(done.returncode, done.stdout, done.stderr)


def script_fork(name: str, *arguments: object, cwd: Path, err: Path | None = None) -> Fork:
    """`name`.py begun in a process of its own that has the imports done."""
    return Fork(SCRIPT, (ROOT / f"{name}.py", *arguments), cwd, err=err, whole_end=True)


def run_script(
    name: str,
    *arguments: object,
    cwd: Path,
    before: str = "",
    env: dict[str, str] | None = None,
) -> Result:
    """Run `name`.py in a process of its own that has the imports done.

    Parameters
    ----------
    before
        Python code that the process executes first.
    env
        Another environment, which imports may read: then it does them itself.
    """
    if env is not None:
        return run_process(name, *arguments, cwd=cwd, env=env)
    process = Fork(f"{before}\n{SCRIPT}", (ROOT / f"{name}.py", *arguments), cwd)
    return Result(process.wait(), *process.communicate())


NO_HASH_SEED = "os.environ.pop('PYTHONHASHSEED', None)"
"""`before` of a script that is to see none, whatever the tests run under."""


def run_state(*words: object, cwd: Path) -> Result:
    """State's command line in a process of its own that has the imports done."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_FORCE")}
    process = Fork(STATE, ("state", *words), cwd, clean)
    return Result(process.wait(), *process.communicate())


def pytest_sessionfinish() -> None:
    end_server()


class Process(Protocol):
    """A subprocess.Popen, or what a test has in its place."""

    def poll(self) -> int | None: ...

    def communicate(self) -> tuple[object, object]: ...


def until(
    condition: Callable[[], object], process: Process | None = None, err: Path | None = None
) -> None:
    """Wait until `condition` holds.

    Parameters
    ----------
    process
        Who makes it hold: if that ends without it, the test fails with what it said.
    err
        Where it said so, if not in its pipes.
    """
    limit = time.monotonic() + PATIENCE
    while True:
        # asked before the last look, as its last act may be the one that is waited for
        ended = process is not None and process.poll() is not None
        if condition():
            return
        if process is not None and ended:
            said = err.read_text() if err else process.communicate()
            pytest.fail(f"ended with {process.poll()} before what was waited for: {said}")
        assert time.monotonic() < limit, "hangs"
        time.sleep(0.005)


def threads_of(pid: int) -> dict[int, tuple[str, str]]:
    """{thread: (state, how often it was switched away)} of a process; none if it is gone."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
            switches = lines["voluntary_ctxt_switches"] + lines["nonvoluntary_ctxt_switches"]
            found[int(path.parent.name)] = (lines["State"].split()[0], switches)
    return found


def suspend(pid: int) -> bool:
    """Hold a process, all its threads, where it is until SIGCONT; False if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    until(lambda: {state for state, _ in threads_of(pid).values()} <= {"T", "Z", "X"})
    return {state for state, _ in threads_of(pid).values()} == {"T"}


def asleep(pid: int) -> bool:
    """Whether a process waits for something outside: all its threads sleep, and none of them ran
    between two looks, so that none is about to wake another."""
    first = threads_of(pid)
    return {state for state, _ in first.values()} == {"S"} and threads_of(pid) == first


@contextlib.contextmanager
def caught(begin: Callable[[], Fork], there: Callable[[], bool]) -> Iterator[Fork]:
    """A process that is suspended while `there()` holds.

    On a busy machine a look may come too late, when the process has ended well: then it is begun
    anew. A process that fails is a failure.
    """
    limit = time.monotonic() + PATIENCE
    while True:
        process = begin()
        try:
            while process.poll() is None:
                if there():
                    if suspend(process.pid) and there():
                        yield process
                        return
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.001)
                assert time.monotonic() < limit, "hangs"
            _, err = process.communicate()
            assert process.returncode == 0, err
        finally:
            process.kill()
            process.wait()


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """State's training leaves "medium" for its process, with which float32 is bfloat16 on a CPU
    that has it: no test inherits that from another."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def create(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run create_esm_pert_features.main([...]) in this process, inside tmp_path."""
    import create_esm_pert_features

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = create_esm_pert_features.main([str(a) for a in arguments])
        except SystemExit as usage:  # argparse
            code = int(usage.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def screen(tmp_path: Path) -> anndata.AnnData:
    """A small screen: 10 genes, one combination, control; 2 cell types, 2 batches."""
    return simulate(SMALL)


@pytest.fixture
def project(tmp_path: Path, screen: anndata.AnnData) -> Path:
    """tmp_path with screen.h5ad, its table.pt and a config.toml that trains on all of it."""
    screen.write_h5ad(tmp_path / "screen.h5ad")
    torch.save({k: torch.from_numpy(v) for k, v in vectors(SMALL).items()}, tmp_path / "table.pt")
    (tmp_path / "config.toml").write_text(
        '[datasets]\nsim = "screen.h5ad"\n[training]\nsim = "train"\n'
        '[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = ["SIM004"]\n'
    )
    return tmp_path


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tmp_path/data with the files of TREE; each holds the gene it is named after."""
    for name in TREE:
        path = tmp_path / "data" / name
        if path.suffix == ".txt":
            path.write_text("")
        else:
            write_screen(path, [f"GENE_{name}"])
    monkeypatch.chdir(tmp_path)
    return tmp_path
