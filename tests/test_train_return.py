"""Stopped, killed, locked out, out of space or on bad numbers: a training can be gone on with.

Most runs here start from a process that has imported everything (`Server`): each is a process of
its own, with its own session, signals and exit code, seven seconds sooner.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import os
import platform
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import psutil
import pytest
import torch
from conftest import PATIENCE, ROOT, SMALL, asleep, suspend, until
from forks import server
from test_train_run import FILES, TINY, checkpoint, make_screen, run_json

from state_esm_features.training.checkpoints import checkpoint_steps, intact


@dataclass
class Run:
    """A training that runs, in a process group of its own."""

    pid: int
    out_file: Path
    err_file: Path
    code: int | None = None

    @property
    def err(self) -> str:
        return self.err_file.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()

    def poll(self) -> int | None:
        if self.code is None:
            self.code = server().code(self.pid)
        return self.code

    def running(self) -> bool:
        return self.poll() is None

    def communicate(self) -> tuple[str, str]:
        return self.out_file.read_text(), self.err

    def wait(self) -> int:
        until(lambda: not self.running())
        assert self.code is not None
        return self.code

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait for something that this run does."""
        until(ready, self)

    def until_said(self, text: str) -> None:
        self.until(lambda: text in self.err)

    def hold(self, ready: Callable[[], bool]) -> None:
        """Suspend it while `ready()` holds, until `go_on`; it goes on while it does not."""

        def held() -> bool:
            if not ready():
                return False
            assert suspend(self.pid), self.err
            if ready():
                return True
            self.go_on()
            return False

        self.until(held)

    def go_on(self) -> None:
        self.send(signal.SIGCONT)

    def send(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> None:
        """Whatever happened in the test."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with screen, TOML and features, which no test changes."""
    return make_screen(tmp_path_factory.mktemp("screen"), {"sim": SMALL})


Start = Callable[..., Run]

MAIN_CODE = "sys.exit(train_with_esm_features.main())"

GATE = """
import time
from pathlib import Path
import state.tx.utils
from lightning.pytorch.callbacks import Callback

class Gate(Callback):
    def HOOK(self, trainer, *_, **__):
        if not trainer.sanity_checking:
            with open(HERE + "/at-gate", "a") as f:
                f.write("here" + chr(10))
            while not Path(HERE + "/go").exists():
                time.sleep(0.005)

stock = state.tx.utils.get_checkpoint_callbacks
state.tx.utils.get_checkpoint_callbacks = lambda *a, **k: [*stock(*a, **k), Gate()]
sys.exit(train_with_esm_features.main())
"""
"""Training with one more callback, which waits for the test: so a test that looks late, on a busy
machine, still finds the training there."""


def gated(hook: str, here: Path) -> str:
    """A training that waits in that hook of Lightning's until here/go is there, and then no more;
    here/at-gate has a line for every time that it came there."""
    return GATE.replace("HOOK", hook).replace("HERE", repr(str(here)))


def start(
    place: Path,
    number: int,
    words: tuple[object, ...],
    cwd: Path,
    env: dict[str, str] | None = None,
    code: str = MAIN_CODE,
) -> Run:
    """Start a training of place/runs/run."""
    out, err = (place / f"{number}.{name}" for name in ("out", "err"))
    where = ("--output-dir", place / "runs", "--name", "run", "--batch-size", 2)
    argv = [str(w) for w in (ROOT / "train_with_esm_features.py", *words, *where, *TINY)]
    run = Run(server().begin(code, argv, cwd, os.environ | (env or {}), out, err), out, err)
    until(err.exists)
    return run


@pytest.fixture
def begin(folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a training of tmp_path/runs/run in a process of its own."""
    runs: list[Run] = []

    def begin(
        *words: object,
        cwd: Path = folder,
        env: dict[str, str] | None = None,
        files: tuple[str, ...] = FILES,
        code: str = MAIN_CODE,
    ) -> Run:
        runs.append(start(tmp_path, len(runs), (*files, *words), cwd, env, code))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def progress(run_dir: Path) -> list[dict[str, str]]:
    """Rows of progress.csv so far."""
    try:
        with (run_dir / "progress.csv").open(newline="") as f:
            return list(csv.DictReader(f))
    except FileNotFoundError:
        return []


def steps_done(run_dir: Path) -> int:
    return max((int(r["step"]) for r in progress(run_dir)), default=0)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


GOAL = 1_900
"""Many more steps than a test waits for, and still a row in progress.csv for each."""

SAID = {"SIGTERM": (143, "SIGTERM"), "SIGINT": (130, "Ctrl-C"), "SIGUSR1": (143, "SIGUSR1")}


def assert_stopped_and_saved(run: Run, run_dir: Path, name: str) -> int:
    """By that signal, after a whole step that is in last.ckpt; returns the step."""
    code = run.wait()
    last = run_dir / "checkpoints/last.ckpt"
    record = run_json(run_dir)
    step = record["steps"]
    assert (code, run.lines[-2:]) == (
        SAID[name][0],
        [f"saved step {step} in {last}; --resume goes on", f"stopped by {SAID[name][1]}"],
    )
    assert record["status"] == "stopped"
    assert checkpoint(run_dir, "last")["global_step"] == step
    assert record["starts"][-1]["to_step"] == step > record["starts"][-1]["from_step"]
    assert not [n for n in names(run_dir / "checkpoints") if n.startswith(".")]
    return step


def step_reached(run_dir: Path) -> int:
    """Of a killed run: best.ckpt is written before last.ckpt, so any may be the latest."""
    checkpoints = (run_dir / "checkpoints").glob("*.ckpt")
    return max((torch.load(p, weights_only=True)["global_step"] for p in checkpoints), default=0)


def assert_finished(run: Run, run_dir: Path, step: int) -> None:
    assert run.wait() == 0, run.err
    assert run.out_file.read_text() == f"{run_dir}\n"
    assert checkpoint(run_dir, "final")["global_step"] == step
    assert checkpoint(run_dir, "last")["global_step"] == step
    assert (run_json(run_dir)["status"], run_json(run_dir)["steps"]) == ("finished", step)


def resumed_from(run: Run) -> int:
    found = re.search(r"^resuming at step ([\d,]+) of", run.err, re.MULTILINE)
    assert found, run.err
    return int(found[1].replace(",", ""))


# ---------------------------------------------------------------------------------------------
# Stopped by a signal
# ---------------------------------------------------------------------------------------------

GROUP = True
MAIN = False

MANY = tuple((s, GROUP) for _ in range(7) for s in SAID)
MANY_ALONE = tuple((s, MAIN) for _ in range(2) for s in SAID)


@pytest.mark.parametrize(
    ("workers", "signals"),
    [
        (0, (("SIGUSR1", MAIN),)),
        (1, (("SIGTERM", GROUP), ("SIGINT", MAIN))),
        (2, (("SIGINT", GROUP), ("SIGUSR1", GROUP))),
        pytest.param(0, MANY_ALONE, marks=pytest.mark.slow),
        pytest.param(1, MANY, marks=pytest.mark.slow),
        pytest.param(2, MANY_ALONE, marks=pytest.mark.slow),
        pytest.param(2, MANY, marks=pytest.mark.slow),
    ],
)
def test_signal_stops_after_a_whole_step_that_resume_goes_on_from(
    begin: Start, tmp_path: Path, workers: int, signals: tuple[tuple[str, bool], ...]
) -> None:
    run_dir = tmp_path / "runs/run"
    moments = random.Random(workers)
    step, said = 0, []
    for name, group in signals:
        flags = ("--max-steps", GOAL, "--val-freq", 500, "--num-workers", workers)
        run = begin(*flags, "--resume")
        run.until(lambda seen=step: steps_done(run_dir) > seen)
        time.sleep(moments.uniform(0, 0.3))  # any moment will do
        run.send(getattr(signal, name), group)
        if step:
            assert resumed_from(run) == step
        step = assert_stopped_and_saved(run, run_dir, name)
        said.append(run.err)
    run = begin("--max-steps", step + 2, "--resume")
    assert_finished(run, run_dir, step + 2)
    assert resumed_from(run) == step
    rows = [int(r["step"]) for r in progress(run_dir) if r["train_loss"]]
    assert rows == list(range(1, step + 3))
    starts = run_json(run_dir)["starts"]
    assert [s["from_step"] for s in starts[1:]] == [s["to_step"] for s in starts[:-1]]
    # a loader that is cut off while it hands a batch over may print its own ConnectionResetError
    assert not [text for text in said if "Stopped:" in text or "train_with_esm_features.py" in text]


@pytest.mark.parametrize(
    ("workers", "signals"),
    [
        (2, {"GPU available": ("SIGTERM", GROUP)}),
        pytest.param(
            0,
            {
                "Seed set to": ("SIGTERM", MAIN),
                "Processing datasets": ("SIGINT", MAIN),
                "GPU available": ("SIGUSR1", MAIN),
                "Tip: ": ("SIGTERM", GROUP),
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            {
                "Seed set to": ("SIGUSR1", GROUP),
                "Processing datasets": ("SIGTERM", GROUP),
                "Tip: ": ("SIGINT", GROUP),
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_signal_before_the_first_step_ends_at_once_and_the_run_can_be_resumed(
    begin: Start, tmp_path: Path, workers: int, signals: dict[str, tuple[str, bool]]
) -> None:
    """Sent when train.log says so; the first step waits for it, however late that is."""
    run_dir, log = tmp_path / "runs/run", tmp_path / "runs/run/train.log"
    flags = ("--max-steps", 1, "--val-freq", 1, "--num-workers", workers, "--resume")
    for text, (name, group) in signals.items():
        log.unlink(missing_ok=True)
        run = begin(*flags, code=gated("setup", tmp_path))
        run.until(lambda text=text: log.exists() and text in log.read_text())
        run.send(getattr(signal, name), group)

        def lost(run: Run = run) -> bool:
            """Python drops what is raised in some call-backs, and the gate would wait for ever."""
            said = run.err + log.read_text()
            return "Exception ignored in" in said and (tmp_path / "at-gate").exists()

        until(lambda run=run, lost=lost: not run.running() or lost())
        assert not run.running(), run.err
        (tmp_path / "at-gate").unlink(missing_ok=True)
        code, who = SAID[name]
        assert (run.wait(), run.lines[-1]) == (code, f"stopped by {who}"), run.err
        assert "saved step" not in run.err
        assert run.lines[-2] == "nothing to save yet: --resume goes on at step 0"
        assert (run_json(run_dir)["status"], run_json(run_dir)["steps"]) == ("stopped", 0)
        assert not list(run_dir.glob("checkpoints/*"))
    run = begin(*flags)
    assert_finished(run, run_dir, 1)
    assert f"no checkpoint in {run_dir} yet: training starts at step 0" in run.lines


def test_signal_while_the_script_still_imports_ends_with_the_same_exit_code(
    folder: Path, tmp_path: Path
) -> None:
    """The imports take seconds; a signal that comes later yet, in training, ends it alike."""
    words = ("--output-dir", tmp_path, "--name", "run", "--max-steps", GOAL, *TINY)
    command = [sys.executable, ROOT / "train_with_esm_features.py", *FILES, *words]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [str(w) for w in command], cwd=folder, stderr=err, start_new_session=True
        )
    try:
        said = tmp_path / "err"
        until(
            lambda: "training; what State and its libraries say" in said.read_text(), process, said
        )
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "err").read_text().splitlines()[-1] == "stopped by Ctrl-C"
    assert run_json(tmp_path / "run")["status"] == "stopped"


@pytest.fixture(scope="module")
def long_validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `folder`, but a validation has many batches."""
    folder = make_screen(tmp_path_factory.mktemp("long"), {"sim": replace(SMALL, cells=200)})
    text = (folder / "config.toml").read_text()
    held_out = [f"SIM{i:03d}" for i in range(10) if i not in (0, 4)]
    text = text.replace('val = ["SIM003"]', f"val = {json.dumps(held_out)}")
    (folder / "config.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("workers", "name", "group"),
    [pytest.param(0, "SIGTERM", MAIN, marks=pytest.mark.slow), (2, "SIGINT", GROUP)],
)
def test_signal_in_a_validation_does_not_wait_for_its_end(
    begin: Start, tmp_path: Path, long_validation: Path, workers: int, name: str, group: bool
) -> None:
    run_dir = tmp_path / "runs/run"
    flags = ("--max-steps", GOAL, "--val-freq", 1, "--num-workers", workers)
    run = begin(*flags, cwd=long_validation, code=gated("on_validation_batch_start", tmp_path))
    run.until((tmp_path / "at-gate").exists)
    assert steps_done(run_dir) == 1
    run.send(getattr(signal, name), group)
    run.until_said("stopping after this step")
    (tmp_path / "go").touch()
    assert assert_stopped_and_saved(run, run_dir, name) == 1
    assert (tmp_path / "at-gate").read_text() == "here\n"  # no other batch was begun
    assert [r["val_loss"] for r in progress(run_dir)] == [""]  # it had not ended


def loaders(run: Run) -> list[psutil.Process]:
    """Loader processes of a run: forks of it."""
    return psutil.Process(run.pid).children(recursive=True)


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGINT", "SIGUSR1"))]
)
def test_signal_while_waiting_for_data_does_not_wait_for_the_batch(
    begin: Start, tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "runs/run"
    run = begin("--max-steps", GOAL, "--val-freq", 500, "--num-workers", 1)
    run.until(lambda: steps_done(run_dir) >= 1)
    slow = loaders(run)
    assert slow
    for process in slow:
        assert suspend(process.pid)
    try:
        run.until(lambda: asleep(run.pid))  # there is nothing else that it could wait for
        count = steps_done(run_dir)
        run.send(getattr(signal, name))
        run.until_said("saved step")
        assert "stopping after this step" not in run.err
        assert steps_done(run_dir) == count
    finally:
        for process in slow:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
    assert assert_stopped_and_saved(run, run_dir, name) == count


# ---------------------------------------------------------------------------------------------
# SLURM
# ---------------------------------------------------------------------------------------------


def slurm(tmp_path: Path) -> dict[str, str]:
    """Environment of a job step of one task; `scontrol` leaves a file when it is called."""
    fake = tmp_path / "bin/scontrol"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/scontrol-was-called\n")
    fake.chmod(0o755)
    return {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        **{"SLURM_NTASKS": "1", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        **{"SLURM_NODEID": "0", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"},
    }


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a screen's folder, to change."""
    return Path(shutil.copytree(folder, target))


def test_slurm_signal_saves_and_requeues_nothing(
    begin: Start, folder: Path, tmp_path: Path
) -> None:
    here, run_dir = copy_of(folder, tmp_path / "here"), tmp_path / "runs/run"
    env = slurm(tmp_path)
    flags = ("--max-steps", GOAL, "--val-freq", 500, "--num-workers", 0)
    run = begin(*flags, cwd=here, env=env)
    run.until(lambda: steps_done(run_dir) >= 2)
    run.send(signal.SIGUSR1)
    step = assert_stopped_and_saved(run, run_dir, "SIGUSR1")
    assert run_json(run_dir)["launch"] == "1.."  # of the job, so SLURM was seen
    shutil.copy(run_dir / "checkpoints/last.ckpt", here / "hpc_ckpt_1.ckpt")
    run = begin("--max-steps", step + 2, "--resume", cwd=here, env=env)
    assert_finished(run, run_dir, step + 2)
    assert not (tmp_path / "scontrol-was-called").exists()
    assert list(tmp_path.rglob("hpc_ckpt*")) == [here / "hpc_ckpt_1.ckpt"]


def test_checkpoint_of_another_runs_requeue_is_refused(
    begin: Start, folder: Path, tmp_path: Path
) -> None:
    here, run_dir = copy_of(folder, tmp_path / "here"), tmp_path / "runs/run"
    (here / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    flags = ("--max-steps", 1, "--val-freq", 1, "--num-workers", 0)
    env = slurm(tmp_path)
    run = begin(*flags, "--resume", cwd=here, env=env)
    assert (run.wait(), run.lines[-1]) == (
        1,
        f"error: {here}/hpc_ckpt_1.ckpt was left by another run's requeue, and under SLURM this "
        "run would start from it. Move it away, or start from another folder",
    )
    assert not run_dir.exists()
    assert_finished(begin(*flags, cwd=here), run_dir, 1)  # without SLURM nothing reads it
    first = (run_dir / "checkpoints/final.ckpt").read_bytes()
    run = begin(*flags, "--overwrite", cwd=here, env=env)
    assert run.wait() == 1
    assert (run_dir / "checkpoints/final.ckpt").read_bytes() == first  # the old run stays


# ---------------------------------------------------------------------------------------------
# Killed, held, out of space
# ---------------------------------------------------------------------------------------------


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; who waits for it need not have looked yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def leaves_signals(process: psutil.Process) -> bool:
    """Whether a loader process has blocked what would stop it: the first thing that it does."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        blocked = next(int(x.split()[1], 16) for x in lines if x.startswith("SigBlk:"))
        return bool(blocked >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_is_resumed_to_the_end(
    begin: Start, tmp_path: Path, kills: int
) -> None:
    run_dir = tmp_path / "runs/run"
    flags = ("--max-steps", GOAL, "--val-freq", 3, "--ckpt-every-n-steps", 2, "--num-workers", 2)
    moments = random.Random(kills)
    checkpoints = run_dir / "checkpoints"

    def writing(before: set[Path]) -> bool:
        """A checkpoint is half written, which no other run left."""
        return not set(checkpoints.glob(".*")) <= before

    def trained(seen: int) -> bool:
        return steps_done(run_dir) > seen

    for number in range(kills):
        before, seen = set(checkpoints.glob(".*")), steps_done(run_dir)
        run = begin(*flags, "--resume")
        if number % 3 == 0:
            run.hold(functools.partial(writing, before))
        elif number % 3 == 1:
            run.until(functools.partial(trained, seen + moments.randint(0, 9)))
        time.sleep(moments.uniform(0, 1))  # any moment will do
        family = loaders(run)
        at_work = [p for p in family if leaves_signals(p)]
        for process in at_work:  # nothing that it does itself could end it
            suspend(process.pid)
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        until(lambda those=family: all(map(gone, those)))
        for path in checkpoints.glob("*.ckpt"):
            torch.load(path, weights_only=True)
    reached = step_reached(run_dir)
    run = begin("--max-steps", reached + 3, "--resume")
    assert_finished(run, run_dir, reached + 3)
    for path in checkpoints.glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] > 0
    assert [n for n in names(checkpoints) if n.startswith(".")] == []
    rows = [int(r["step"]) for r in progress(run_dir) if r["train_loss"]]
    assert rows == sorted(set(rows))


def test_held_run_is_refused_at_once_and_taken_over_when_its_holder_is_killed(
    begin: Start, folder: Path, tmp_path: Path
) -> None:
    here, run_dir = copy_of(folder, tmp_path / "here"), tmp_path / "runs/run"
    flags = ("--max-steps", GOAL, "--val-freq", 2, "--num-workers", 0)
    first = begin(*flags, cwd=here)
    first.hold((run_dir / "checkpoints/last.ckpt").exists)  # however long the others take
    holder = json.loads((tmp_path / "runs/.run.lock").read_text())
    assert (holder["pid"], holder["host"]) == (first.pid, platform.node())
    message = (
        f"error: process {first.pid} on {platform.node()}, since {holder['since']}, is training "
        f"{run_dir}; let it finish, or choose another --name\n"
    )
    dry = begin(*flags, "--resume", "--dry-run", cwd=here)
    assert dry.wait() == 0, dry.err
    assert dry.out_file.read_text().startswith("state tx train ")
    (here / "sim.h5ad").rename(here / "away.h5ad")
    for extra in ("--resume", "--overwrite"):
        second = begin(*flags, extra, cwd=here)
        assert (second.wait(), second.err) == (75, message)
    assert first.running() and run_json(run_dir)["status"] == "training"
    first.send(signal.SIGKILL)
    first.wait()
    (here / "away.h5ad").rename(here / "sim.h5ad")
    reached = step_reached(run_dir)
    run = begin("--max-steps", reached + 1, "--resume", cwd=here)
    assert_finished(run, run_dir, reached + 1)
    again = begin("--max-steps", reached + 1, "--val-freq", 2, "--num-workers", 0, cwd=here)
    assert again.wait() == 0
    assert again.lines[-1] == f"up to date: {run_dir} finished with the same inputs"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[Path, int], bool]]:
    """Put a small file system on a folder; False where that is not permitted."""
    there: list[Path] = []

    def mount(folder: Path, megabytes: int) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True)
        except FileNotFoundError:
            return False
        if done.returncode == 0:
            there.append(folder)
        return done.returncode == 0

    yield mount
    for folder in there:
        subprocess.run(["umount", "-l", str(folder)], check=True)


FULL = {True: "No space left on device", False: "File too large"}


@pytest.mark.parametrize(
    "disk", ["own file system", pytest.param("limit of file size", marks=pytest.mark.slow)]
)
def test_full_disk_keeps_the_previous_checkpoint_and_says_so(
    begin: Start,
    tmp_path: Path,
    mounted: Callable[[Path, int], bool],
    disk: str,
) -> None:
    runs, run_dir = tmp_path / "runs", tmp_path / "runs/run"
    full = disk == "own file system" and mounted(runs, 32)
    flags = ("--max-steps", GOAL, "--val-freq", 4, "--num-workers", 0)
    run = begin(*flags)
    last = run_dir / "checkpoints/last.ckpt"
    # between two checkpoints: what is half written could be written to its end
    run.hold(lambda: last.exists() and not [n for n in names(last.parent) if n.startswith(".")])
    size = last.stat().st_size
    if full:
        free = shutil.disk_usage(runs).free
        (runs / "filler").write_bytes(bytes(free - size // 2))
    else:
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    run.go_on()
    assert run.wait() == 1
    record = run_json(run_dir)
    said = re.fullmatch(
        rf"error: cannot write {run_dir}/checkpoints/(best|last)\.ckpt: {FULL[full]}; nothing was "
        rf"changed\. Free some space there, or choose another place for it\. At step (\d+); the "
        rf"last good checkpoint is {last}, of step (\d+): --resume",
        run.lines[-1],
    )
    assert said, run.err
    step, good = int(said[2]), int(said[3])
    assert (record["status"], record["steps"]) == ("failed", step)
    assert step > good == checkpoint(run_dir, "last")["global_step"]
    assert not [n for n in names(run_dir / "checkpoints") if n.startswith(".")]
    assert "Traceback" not in run.err
    if full:
        (runs / "filler").unlink()
    run = begin("--max-steps", good + 2, "--resume")
    assert_finished(run, run_dir, good + 2)
    assert resumed_from(run) == good


def test_disk_that_takes_no_byte_more_is_one_line_too(begin: Start, tmp_path: Path) -> None:
    """Even where the next thing to be written is a row of progress.csv."""
    run_dir, pipe = tmp_path / "runs/run", tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    to_pipe = f"os.dup2(os.open({str(pipe)!r}, os.O_WRONLY), 2)\n"  # a limit of files only
    code = f"{to_pipe}sys.exit(train_with_esm_features.main())"
    flags = ("--max-steps", GOAL, "--val-freq", 3, "--num-workers", 0)
    run = begin(*flags, code=code)
    last = run_dir / "checkpoints/last.ckpt"
    # step 4, or 7, ...: no checkpoint is due
    run.hold(lambda: last.exists() and steps_done(run_dir) % 3 == 1)
    good = checkpoint(run_dir, "last")["global_step"]
    assert good == steps_done(run_dir) - 1
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    run.go_on()
    assert run.wait() == 1
    said = os.read(reader, 1_000_000).decode()
    os.close(reader)
    assert "Traceback" not in said
    assert re.fullmatch(
        rf"error: cannot write {run_dir}/.*: File too large.*the last good checkpoint is {last}, "
        rf"of step {good}.*",
        said.splitlines()[-1],
    )
    assert checkpoint(run_dir, "last")["global_step"] == good
    assert_finished(begin("--max-steps", good + 1, "--resume"), run_dir, good + 1)


def test_folder_of_temporary_files_may_be_full(
    begin: Start, tmp_path: Path, mounted: Callable[[Path, int], bool]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    mounted(temporary, 1)  # less than a checkpoint
    biggest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for path in temporary.rglob("*"):
                with contextlib.suppress(OSError):
                    biggest.append(path.stat().st_size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    flags = ("--max-steps", 2, "--val-freq", 1, "--num-workers", 0)
    code = "import tempfile; tempfile.tempdir = None; sys.exit(train_with_esm_features.main())"
    run = begin(*flags, code=code, env={"TMPDIR": str(temporary)})
    run.wait()
    done.set()
    watcher.join()
    assert_finished(run, tmp_path / "runs/run", 2)
    assert max(biggest) < 1_000_000 < (tmp_path / "runs/run/checkpoints/last.ckpt").stat().st_size
    assert list(temporary.rglob("*.ckpt")) == []


# ---------------------------------------------------------------------------------------------
# Damaged, mixed up, not a number
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_four_steps(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with last, final (4), step=3 and best (2); which no test changes."""
    place = tmp_path_factory.mktemp("four")
    words = ("--max-steps", 4, "--val-freq", 2, "--ckpt-every-n-steps", 3, "--num-workers", 0)
    run = start(place, 0, (*FILES, *words), folder)
    assert_finished(run, place / "runs/run", 4)
    return place / "runs/run"


@pytest.fixture
def four(of_four_steps: Path, tmp_path: Path) -> Path:
    """A copy of that run, to change; no two checkpoints are one file."""
    return Path(shutil.copytree(of_four_steps, tmp_path / "runs/run"))


NO_ARCHIVE = "cannot be read as a file of torch.save: damaged or cut short"


def damage(path: Path, kind: str) -> str:
    """Damage a checkpoint; returns a pattern of what is said of it."""
    whole = path.read_bytes()
    half = len(whole) // 2
    if kind == "flipped":
        path.write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
        return r"does not hold what was written \(archive/data/\d+\)"
    path.write_bytes({"cut": whole[:half], "zeros": bytes(len(whole)), "empty": b""}[kind])
    reason = {"cut": "PytorchStreamReader failed .*", "zeros": ".*", "empty": "EOFError"}[kind]
    return rf"{NO_ARCHIVE} \({reason}\)"


@pytest.mark.parametrize(
    ("kind", "damaged", "step"),
    [
        ("cut", ("last",), 4),
        ("flipped", ("last",), 4),
        ("zeros", ("last", "final", "step=3"), 2),
        pytest.param("empty", ("last", "final"), 3, marks=pytest.mark.slow),
        pytest.param("cut", ("last", "final", "step=3"), 2, marks=pytest.mark.slow),
        pytest.param("flipped", ("last", "final"), 3, marks=pytest.mark.slow),
        pytest.param("zeros", ("last",), 4, marks=pytest.mark.slow),
    ],
)
def test_damaged_checkpoints_are_named_and_the_best_other_one_goes_on(
    begin: Start,
    tmp_path: Path,
    four: Path,
    kind: str,
    damaged: tuple[str, ...],
    step: int,
) -> None:
    paths = [four / f"checkpoints/{name}.ckpt" for name in damaged]
    said = [f"warning: damaged checkpoint: {re.escape(str(p))} {damage(p, kind)}" for p in paths]
    weights = checkpoint(four, {4: "final", 3: "step=3", 2: "best"}[step])["state_dict"]
    last = four / "checkpoints/last.ckpt"
    code = gated("setup", tmp_path)  # the last step is not taken before the test has looked
    run = begin("--max-steps", 5, "--resume", "--ckpt-every-n-steps", 3, code=code)
    run.until_said("training; what State and its libraries say goes to")
    assert checkpoint(four, "last")["global_step"] == step
    restored = checkpoint(four, "last")["state_dict"]
    assert all(torch.equal(restored[k], weights[k]) for k in weights)
    (tmp_path / "go").touch()
    assert_finished(run, four, 5)
    warnings = [line for line in run.lines if line.startswith("warning: damaged")]
    assert len(warnings) == len(said)
    assert [bool(re.fullmatch(s, w)) for s, w in zip(said, warnings, strict=True)] == [
        True for _ in said
    ], warnings
    assert [line for line in run.lines if line.startswith("resuming")] == [
        f"resuming at step {step} of 5 from {last}: weights, optimiser and step as saved; the "
        "order of the data and the random state start anew, so the result differs from an "
        "unbroken run"
    ]


@pytest.mark.parametrize("kind", ["flipped", pytest.param("cut", marks=pytest.mark.slow)])
def test_all_checkpoints_damaged_is_an_error_and_nothing_is_lost(
    begin: Start, four: Path, kind: str
) -> None:
    for path in (four / "checkpoints").iterdir():
        damage(path, kind)
    before = {p: p.read_bytes() for p in four.rglob("*") if p.is_file()}
    run = begin("--max-steps", 5, "--resume")
    assert (run.wait(), run.lines[-1]) == (
        1,
        f"error: no checkpoint in {four}/checkpoints can be read; --overwrite trains anew, and "
        "keeps the old run until the new one has finished",
    )
    named = [line.split()[3] for line in run.lines if line.startswith("warning: damaged")]
    assert sorted(named) == sorted(str(p) for p in (four / "checkpoints").iterdir())
    assert {p: p.read_bytes() for p in four.rglob("*") if p.is_file()} == before


def test_no_byte_of_a_checkpoint_can_change_unnoticed(four: Path) -> None:
    """Nor end in anything but a warning, wherever it is."""

    path = four / "checkpoints/last.ckpt"
    whole = path.read_bytes()
    expected = flat(torch.load(path, weights_only=True))
    for other in ("final", "step=3", "best"):
        (four / f"checkpoints/{other}.ckpt").unlink()
    places = random.Random(0)
    moments = [*range(0, 15_000, 301), *(places.randrange(len(whole)) for _ in range(40))]
    moments += range(len(whole) - 12_000, len(whole), 501)
    for place in moments:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        good = [p for p in checkpoint_steps(four) if intact(p)]
        if good:  # the byte means nothing: padding, or a field of the archive that nobody reads
            assert flat(torch.load(path, weights_only=True)) == expected, place


def flat(value: Any) -> Any:
    """Nested content, tensors as bytes, to compare."""
    if torch.is_tensor(value):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(v) for v in value]
    return value


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def mixed_up(run_dir: Path, changes: str) -> str:
    return (
        f"error: {run_dir} was trained otherwise ({changes}); resuming would mix two runs. "
        "--overwrite trains anew, --name NAME makes another run, --force mixes them"
    )


def test_other_features_are_mixed_only_by_force_and_are_then_the_runs_own(
    begin: Start, folder: Path, four: Path, tmp_path: Path
) -> None:
    other = torch.load(folder / "features.pt", weights_only=True)
    other["SIM000"] += 1
    torch.save(other, tmp_path / "other.pt")
    files = ("--config", "config.toml", "--pert-features", str(tmp_path / "other.pt"))
    old, new = sha256(folder / "features.pt"), sha256(tmp_path / "other.pt")
    changes = f"features sha256: {old[:12]}... -> {new[:12]}...; training.max_steps: 4 -> 5"
    before = files_of(four)
    run = begin("--max-steps", 5, "--resume", files=files)
    assert (run.wait(), run.lines[-1]) == (1, mixed_up(four, changes))
    assert files_of(four) == before
    run = begin("--max-steps", 5, "--resume", "--force", files=files)
    assert_finished(run, four, 5)
    said = f"warning: --force: this run goes on otherwise than it was started ({changes})"
    assert said in run.lines
    assert (four / "pert_features.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()
    used = torch.load(four / "pert_onehot_map.pt", weights_only=True)
    assert torch.equal(used["SIM000"], other["SIM000"])
    assert run_json(four)["identity"]["features"] == {"sha256": new}
    same = ("--val-freq", 2, "--ckpt-every-n-steps", 3, "--num-workers", 0)
    again = begin("--max-steps", 5, *same, files=files)
    assert again.wait() == 0
    assert again.lines[-1] == f"up to date: {four} finished with the same inputs"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_data_and_another_seed_are_mixed_only_by_force(
    begin: Start, folder: Path, tmp_path: Path
) -> None:
    here, run_dir = copy_of(folder, tmp_path / "here"), tmp_path / "runs/run"
    flags = ("--max-steps", 1, "--val-freq", 1, "--num-workers", 0)
    assert_finished(begin(*flags, cwd=here), run_dir, 1)
    data = anndata.read_h5ad(here / "sim.h5ad")
    size = (here / "sim.h5ad").stat().st_size
    data[:-1].copy().write_h5ad(here / "sim.h5ad")
    now = (here / "sim.h5ad").stat()
    run = begin("--resume", "--seed", 7, cwd=here)
    assert run.wait() == 1
    found = re.fullmatch(
        re.escape(
            mixed_up(
                run_dir,
                f"data {here}/sim.h5ad: {size:,} bytes -> {now.st_size:,} bytes; "
                f"changed {here}/sim.h5ad: OLD -> {now.st_mtime_ns}; "
                "training.train_seed: 42 -> 7; data.kwargs.random_seed: none -> 7",
            )
        ).replace("OLD", r"\d+"),
        run.lines[-1],
    )
    assert found, run.lines[-1]
    before = checkpoint(run_dir, "final")["state_dict"]
    run = begin("--max-steps", 2, "--resume", "--force", "--seed", 7, cwd=here)
    assert_finished(run, run_dir, 2)
    assert "warning: --force: this run goes on otherwise than it was started (data " in run.err
    after = checkpoint(run_dir, "final")["state_dict"]
    assert [k for k in before if not torch.equal(before[k], after[k])]


WIDER = ("model.kwargs.hidden_dim=32", "model.kwargs.transformer_backbone_kwargs.head_dim=4")


def test_checkpoint_of_another_model_is_refused_and_loses_nothing(begin: Start, four: Path) -> None:
    changes = (
        "model.kwargs.hidden_dim: 24 -> 32; model.kwargs.transformer_backbone_kwargs.hidden_size: "
        "24 -> 32; model.kwargs.transformer_backbone_kwargs.head_dim: 3 -> 4; "
        "training.max_steps: 4 -> 5"
    )
    words = ("--max-steps", 5, "--resume")
    code = f"sys.argv += {list(WIDER)!r}; sys.exit(train_with_esm_features.main())"
    run = begin(*words, code=code)
    assert (run.wait(), run.lines[-1]) == (1, mixed_up(four, changes))
    weights = {p: p.read_bytes() for p in (four / "checkpoints").iterdir()}
    run = begin(*words, "--force", code=code)
    assert run.wait() == 1
    assert f"warning: --force: this run goes on otherwise than it was started ({changes})" in (
        run.lines
    )
    assert run.lines[-1] == (
        "error: the checkpoint is of another model than this configuration (at step 4; the last "
        f"good checkpoint is {four}/checkpoints/last.ckpt, of step 4): Error(s) in loading "
        "state_dict for StateTransitionPerturbationModel:"
    )
    assert {p: p.read_bytes() for p in (four / "checkpoints").iterdir()} == weights
    run = begin(*words)  # the model that it is of: the record is as it was
    assert_finished(run, four, 5)


def test_force_without_resume_is_a_usage_error(begin: Start) -> None:
    run = begin("--force")
    assert run.wait() == 2
    assert run.lines[-1] == "train_with_esm_features.py: error: --force goes with --resume"


HUGE = 3e38
"""A number, so that the check passes it; what is computed of it is none."""


def poison(file: Path, cells: Callable[[Any], Any], value: float) -> None:
    """Put a value into the matrix at every entry of some cells, without a change of size."""
    import h5py

    chosen = np.flatnonzero(cells(anndata.read_h5ad(file).obs))
    with h5py.File(file, "r+") as f:
        starts = f["X/indptr"][:]
        for cell in chosen:
            f["X/data"][starts[cell] : starts[cell + 1]] = value


def test_loss_that_is_no_number_stops_and_names_the_last_good_checkpoint(
    begin: Start, folder: Path, tmp_path: Path
) -> None:
    here, run_dir = copy_of(folder, tmp_path / "here"), tmp_path / "runs/run"
    last = run_dir / "checkpoints/last.ckpt"
    flags = ("--max-steps", 2, "--val-freq", 2, "--num-workers", 0)
    assert_finished(begin(*flags, cwd=here), run_dir, 2)
    good = checkpoint(run_dir, "last")["state_dict"]
    held_out = ["SIM003", "SIM004", "non-targeting"]
    poison(
        here / "sim.h5ad",
        lambda obs: (obs["target_gene"] == "SIM003") & (obs["cell_type"] == "simA"),
        HUGE,
    )
    for what in ("validation", "training"):
        if what == "training":
            poison(here / "sim.h5ad", lambda obs: ~obs["target_gene"].isin(held_out), HUGE)
        run = begin("--max-steps", 9, "--val-freq", 3, "--resume", cwd=here)
        assert (run.wait(), run.lines[-1]) == (
            1,
            f"error: the {what} loss became nan at step 3; the last good checkpoint is {last}, of "
            "step 2. Nothing was saved since. Look for NaN or huge values in the data, or train "
            "anew with a smaller training.lr",
        )
        assert (run_json(run_dir)["status"], run_json(run_dir)["steps"]) == ("failed", 3)
        assert "Traceback" not in run.err
        assert names(run_dir / "checkpoints") == ["best.ckpt", "final.ckpt", "last.ckpt"]
        for name in ("best", "last"):
            weights = checkpoint(run_dir, name)["state_dict"]
            assert all(v.isfinite().all() for v in weights.values())
            assert all(torch.equal(weights[k], good[k]) for k in good)
        rows = progress(run_dir)
        assert all(np.isfinite(float(r[c])) for r in rows for c in list(r)[2:4] if r[c])


@pytest.mark.parametrize(
    "every", [("--ckpt-every-n-steps", 1), pytest.param((), marks=pytest.mark.slow)]
)
def test_weights_that_turn_bad_at_a_checkpoint_are_not_saved(
    begin: Start, tmp_path: Path, every: tuple[object, ...]
) -> None:
    """Loss 1 is of the weights before step 1, so it is a number; the weights after it are none."""
    run_dir = tmp_path / "runs/run"
    code = "sys.argv += ['training.lr=inf']; sys.exit(train_with_esm_features.main())"
    flags = ("--max-steps", 1, "--val-freq", 90, "--num-workers", 0, *every)
    run = begin(*flags, code=code)
    assert run.wait() == 1
    assert re.fullmatch(
        r"error: weights became NaN or infinite at step 1 \([\w.]+(, [\w.]+){4}, \.\.\.\); there "
        r"is no checkpoint yet\. Look for huge values in the data, or train anew with a "
        r"smaller training\.lr",
        run.lines[-1],
    ), run.lines[-1]
    assert run_json(run_dir)["status"] == "failed"
    assert not list(run_dir.glob("checkpoints/*"))


# ---------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------

DRIVER = """
import json, os, sys, time
sys.path.insert(0, ROOT)
import state.tx.utils
from lightning.pytorch.callbacks import Callback
import train_with_esm_features

class Cells(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(f"{HERE}/{trainer.global_rank}.cells", "a") as f:
            row = [trainer.global_step, sorted(batch["pert_cell_barcode"])]
            f.write(json.dumps(row) + chr(10))

stock = state.tx.utils.get_checkpoint_callbacks
state.tx.utils.get_checkpoint_callbacks = lambda *a, **k: [*stock(*a, **k), Cells()]
sys.exit(train_with_esm_features.main())
"""
"""Started by us as the first rank, and by Lightning as the other one."""


def cells_of(here: Path, rank: int) -> list[tuple[int, list[str]]]:
    lines = (here / f"{rank}.cells").read_text().splitlines()
    return [(step, cells) for step, cells in map(json.loads, lines)]


def test_two_processes_share_the_cells_stop_together_and_go_on(
    begin: Start, folder: Path, of_four_steps: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs/run"
    code = DRIVER.replace("ROOT", repr(str(ROOT))).replace("{HERE}", str(tmp_path))
    (tmp_path / "driver.py").write_text(code)
    two = ["training.devices=2", "training.strategy=ddp"]
    code = f"sys.argv[0] = {str(tmp_path / 'driver.py')!r}; sys.argv += {two}; "
    code += f"exec(open({str(tmp_path / 'driver.py')!r}).read())"
    flags = ("--val-freq", 3, "--ckpt-every-n-steps", 3, "--num-workers", 0)
    run = begin("--max-steps", GOAL, *flags, code=code)
    run.until(lambda: steps_done(run_dir) >= 6)
    family = loaders(run)
    assert family
    run.send(signal.SIGTERM)
    step = assert_stopped_and_saved(run, run_dir, "SIGTERM")
    until(lambda: all(map(gone, family)))
    ours, others = cells_of(tmp_path, 0), cells_of(tmp_path, 1)
    assert [s for s, _ in ours] == [s for s, _ in others] == list(range(step))
    for (_, a), (_, b) in zip(ours, others, strict=True):
        assert len(a) == len(b) == 16  # 2 sets of 8 cells
    epoch = 288 // 16 // 2 - 2  # whole batches of each rank, less the last ones
    seen = [c for s in range(min(step, epoch)) for c in ours[s][1] + others[s][1]]
    assert len(seen) > 60
    assert len(seen) - len(set(seen)) <= 0.2 * len(seen), "ranks see the same cells"
    run = begin("--max-steps", step + 3, "--resume", code=code)
    assert run.wait() == 0, run.err
    assert run.out_file.read_text() == f"{run_dir}\n"
    assert checkpoint(run_dir, "final")["global_step"] == step + 3
    assert run.err.count("finished  ") == 1
    written = {p for p in names(run_dir) if not p.startswith("eval")}
    assert written == set(names(of_four_steps))
    assert "final-v1.ckpt" not in names(run_dir / "checkpoints")
    steps = [int(r["step"]) for r in progress(run_dir) if r["train_loss"]]
    assert steps == list(range(1, step + 4))
    assert names(tmp_path / "runs") == [".run.lock", "run"]


def test_two_processes_cannot_be_started_from_a_notebook(begin: Start, tmp_path: Path) -> None:
    code = (
        "sys.argv += ['training.devices=2', 'training.strategy=ddp']; "
        "sys.exit(train_with_esm_features.main(sys.argv[1:]))"
    )
    run = begin("--max-steps", 1, code=code)
    assert (run.wait(), run.lines[-1]) == (
        1,
        "error: training.devices=2 starts the command line again for every device, which a "
        "notebook has none of; use !python train_with_esm_features.py",
    )
    assert not (tmp_path / "runs/run").exists()


# ---------------------------------------------------------------------------------------------
# Seeing it
# ---------------------------------------------------------------------------------------------


def test_progress_is_said_written_down_and_drawn(
    begin: Start, four: Path, folder: Path, tmp_path: Path
) -> None:
    import matplotlib.image

    run = begin("--max-steps", 7, "--resume")
    assert_finished(run, four, 7)
    number = r"\d+(\.\d+)?(e[+-]\d+)?"
    said = [line for line in run.lines if line.startswith("step ")]
    assert re.fullmatch(
        rf"step 5 of 7, loss {number}, \d+% waiting for data, {number} steps/s", said[0]
    )
    assert said[-1].startswith("step 7 of 7, loss ") and said[-1].endswith(", 00:00 left")
    text = (four / "progress.csv").read_text()
    columns = ["step", "seconds", "train_loss", "val_loss", "steps_per_second", "waiting"]
    assert text.splitlines()[0].split(",") == columns
    rows = progress(four)
    trained = [r for r in rows if r["train_loss"]]
    assert [int(r["step"]) for r in trained] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["val_loss"] for r in trained] == [""] * 7
    assert [int(r["step"]) for r in rows if r["val_loss"]] == [2, 4, 6]
    values = np.array([[float(r[c]) for c in (columns[2], *columns[4:])] for r in trained])
    assert np.isfinite(values).all() and (values[:, 1] > 0).all()
    assert ((values[:, 2] >= 0) & (values[:, 2] <= 1)).all()
    losses = run_json(four)
    assert f"{losses['train_loss']:.6g}" == trained[-1]["train_loss"]
    picture = matplotlib.image.imread(four / "training.png")
    assert picture.shape[:2] == (780, 1080)
    assert len(np.unique((picture * 255).astype(int).reshape(-1, picture.shape[2]), axis=0)) > 100


def test_record_of_a_run_says_what_made_it(four: Path, folder: Path) -> None:
    record = run_json(four)
    assert record["status"] == "finished"
    first = record["starts"][0]
    assert first["command"][:4] == ["--config", "config.toml", "--pert-features", "features.pt"]
    assert (first["from_step"], first["to_step"]) == (0, 4)
    assert first["seconds"] > 0 and 0 <= first["waiting_for_data"] <= 1
    seconds, speed = first["seconds"], first["steps_per_second"]  # to 1 and to 4 places
    assert (speed - 1e-4) * (seconds - 0.05) <= 4 <= (speed + 1e-4) * (seconds + 0.05)
    made = record["identity"]
    assert made["features"]["sha256"] == sha256(folder / "features.pt")
    toml = folder / "config.toml"
    assert first["toml"] == {"path": str(toml), "sha256": sha256(toml)}
    size = (folder / "sim.h5ad").stat().st_size
    assert made["data"] == {f"{folder}/sim.h5ad": f"{size:,} bytes"}
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["python"] == platform.python_version()
    assert {"lightning", "arc-state", "cell-load", "transformers", "numpy"} < set(made["versions"])
    assert record["hardware"]["host"] == platform.node()
    assert record["hardware"]["cores"] == os.cpu_count()
    assert record["hardware"]["memory_gb"] == round(psutil.virtual_memory().total / 1e9, 1)
    assert set(record["git"]) == {"working_directory", "scripts"}
    commit = record["git"]["scripts"]
    inside = (ROOT / ".git").exists()
    assert bool(re.fullmatch("[0-9a-f]{40}(-dirty)?", commit or "")) == inside
    assert np.isfinite([record["train_loss"], record["val_loss"]]).all()


def test_terminal_is_shown_a_bar(begin: Start, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 200))
    name = os.ttyname(theirs)
    code = f"os.dup2(os.open({name!r}, os.O_WRONLY | os.O_NOCTTY), 2)\n"
    code += "sys.exit(train_with_esm_features.main())"
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 65536):
                seen.extend(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    run = begin("--max-steps", 3, "--val-freq", 3, "--num-workers", 0, code=code)
    assert_finished(run, tmp_path / "runs/run", 3)
    os.close(theirs)
    reader.join()  # it ends with the last process that has the terminal open
    text = seen.decode()
    assert re.search(r"step: +100%\|█+\| 3/3 \[.*loss [\d.]+.*waiting for data\]", text), text
    assert "\r" in text and not re.search(r"^step 3 of 3,", text, re.MULTILINE)


# ---------------------------------------------------------------------------------------------
# Cron, notebooks
# ---------------------------------------------------------------------------------------------


def test_cron_recipe_trains_and_is_quiet_where_all_is_well(folder: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cron_and_slurm.md").read_text()
    script = page.split("## Cron\n")[1].split("```bash\n")[1].split("```")[0]
    assert script.startswith("#!/bin/sh\n")
    here = copy_of(folder, tmp_path / "screen")
    (here / "config.toml").rename(here / "my.toml")
    (here / "features.pt").unlink()
    (here / "features.pt.json").unlink()
    (here / ".venv").symlink_to(sys.prefix)
    for old, new in {
        "/home/me/screen": str(here),
        "--from-toml my.toml": "--from-toml my.toml --esm-embeddings table.pt",
        "--max-steps 40000": f"--max-steps 2 --val-freq 2 --batch-size 2 {' '.join(TINY)}",
    }.items():
        assert old in script
        script = script.replace(old, new)
    (here / "nightly.sh").write_text(script)
    ends = []
    for _ in range(2):
        done = subprocess.run(
            ["env", "-i", f"PYTHONPATH={ROOT}", "/bin/sh", str(here / "nightly.sh")],
            cwd="/",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{here}/runs/nightly"
        ends.append(done.stderr.splitlines())
    said = {line for lines in ends for line in lines}  # warnings, not of what goes on
    assert all(line.startswith("warning: [fewshot] holds") for line in said), ends
    assert checkpoint(here / "runs/nightly", "final")["global_step"] == 2


HANDLERS = (
    "[signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)]"
)


def test_main_in_a_running_event_loop_and_signal_handlers_are_as_before(
    begin: Start, tmp_path: Path
) -> None:
    code = f"""
import asyncio, signal
def mine(*_): pass
signal.signal(signal.SIGTERM, mine)
signal.signal(signal.SIGCHLD, mine)
async def cell():
    before = {HANDLERS}
    code = train_with_esm_features.main(sys.argv[1:])
    assert {HANDLERS} == before, {HANDLERS}
    assert before == [signal.default_int_handler, mine, signal.SIG_DFL, mine], before
    await asyncio.sleep(0)
    return code
sys.exit(asyncio.run(cell()))
""".replace("default_int_handler, mine", "getsignal(signal.SIGINT), mine")
    run = begin("--max-steps", 2, "--val-freq", 1, "--num-workers", 1, code=code)
    assert_finished(run, tmp_path / "runs/run", 2)


def test_main_in_a_thread_that_is_not_the_main_one(begin: Start, tmp_path: Path) -> None:
    code = f"""
import signal, threading
before, codes = {HANDLERS}, []
def cell(): codes.append(train_with_esm_features.main(sys.argv[1:]))
thread = threading.Thread(target=cell)
thread.start()
thread.join()
assert {HANDLERS} == before
sys.exit(codes[0])
"""
    run = begin("--max-steps", 2, "--val-freq", 1, "--num-workers", 1, code=code)
    assert_finished(run, tmp_path / "runs/run", 2)
