"""Other processes of a training: loaders, ranks, and starting again under a fixed hash seed.

What they train is not known here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from state_esm_features.console import STOP_SIGNALS, InputError
from state_esm_features.experiment import experiment_problems
from state_esm_features.files import read_json
from state_esm_features.training.launch import LAUNCH, launch_id, rank
from state_esm_features.training.plan import Plan
from state_esm_features.training.stock import count_devices, ranks, typed_settings

if TYPE_CHECKING:
    from cell_load.config import ExperimentConfig


PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""

FOLLOW_SECONDS = 3600
"""How long another rank waits for the first one to prepare the run."""


@contextlib.contextmanager
def loaders_end_with_us() -> Iterator[None]:
    """Loader processes leave signals to this one, and are killed with it (on Linux): after kill -9
    they would wait for ever, and hold their gigabytes.

    The signals are blocked, as torch sets its own handler of SIGTERM in a loader process, which
    ends it; so what is left of them after the training is killed here.
    """
    import multiprocessing

    parent = os.getpid()
    active = [True]

    def in_child() -> None:
        if active and os.getppid() == parent:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            if sys.platform == "linux":
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    libc = ctypes.CDLL(None)
    before = multiprocessing.active_children()
    os.register_at_fork(after_in_child=in_child)  # cannot be taken back, hence `active`
    try:
        yield
    finally:
        active.clear()
        for process in set(multiprocessing.active_children()) - set(before):
            process.kill()


def follows(run_dir: Path, typed: Sequence[str]) -> bool:
    """Whether this process is a further rank of a training, and not one of several trainings."""
    if rank() == 0:
        return False
    kept = (read_json(run_dir / "run.json") or {}).get("typed", [])
    devices = typed_settings([*kept, *typed]).get("training.devices", 1)
    return LAUNCH in os.environ or count_devices(devices) > 1


def repeat_hash_seed(experiment: ExperimentConfig, from_command_line: bool) -> str | None:
    """With two or more datasets, start again once under a fixed hash seed, or return a warning.

    cell-load walks a set of dataset names, so their order, and with it which cells come when,
    follows Python's hash seed, which is random unless PYTHONHASHSEED is set before the start.
    """
    fixed = os.environ.get("PYTHONHASHSEED", "") not in ("", "random")
    if fixed or experiment_problems(experiment) or len(experiment.get_all_datasets()) < 2:
        return None
    if from_command_line:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return (
        "two or more datasets, and PYTHONHASHSEED was not set when this Python was started: the "
        "order of the data, and so the result, will differ from run to run. From a notebook, run "
        "the script with !python instead"
    )


def one_launch(plan: Plan, from_command_line: bool) -> None:
    """Give the processes of this training a name, by which the other ranks know its record."""
    if ranks(plan.stock) > 1 and not from_command_line:
        raise InputError(
            f"training.devices={plan.stock['training']['devices']} starts the command line again "
            "for every device, which a notebook has none of; use !python train_with_esm_features.py"
        )
    os.environ.pop(LAUNCH, None)
    if launch_id() is None:
        os.environ[LAUNCH] = uuid.uuid4().hex
