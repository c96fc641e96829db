"""Other processes of a training: loaders, ranks, and starting again under a fixed hash seed.

What they train is not known here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from state_esm_features.console import STOP_SIGNALS, InputError
from state_esm_features.experiment import experiment_problems
from state_esm_features.files import read_json
from state_esm_features.training.launch import STARTED, Ranks, check_launch, launcher, rank, whole
from state_esm_features.training.plan import TrainOptions
from state_esm_features.training.stock import count_devices, typed_settings
from state_esm_features.training.trainer import choose_nodes

if TYPE_CHECKING:
    from cell_load.config import ExperimentConfig


PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""


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


def end_with_parent() -> None:
    """A process that Lightning started does not outlive the one it was started for (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ranks_of(options: TrainOptions, run_dir: Path, from_command_line: bool) -> Ranks:
    """The processes that train together, before State's configuration is composed.

    Raises
    ------
    InputError
        Others were started than are asked for; a dry run needs none. Several are asked for in a
        notebook.
    """
    kept = (read_json(run_dir / "run.json") or {}).get("typed", []) if options.run.resume else []
    asked = typed_settings([*kept, *options.overrides]).get("training.devices", 1)
    nodes, devices = choose_nodes(options.training.nodes), count_devices(asked)
    by_lightning = STARTED in os.environ and launcher() is None and whole("LOCAL_RANK") > 0
    number = rank(devices) if nodes * devices > 1 else 0
    ranks = Ranks(nodes, devices, number, by_lightning)
    if options.run.dry_run and launcher() is None:
        return ranks
    if ranks.number > 1 and not from_command_line:
        what, each = f"training.devices={asked}", "device"
        if nodes > 1:
            what, each = f"--nodes {nodes}", "machine"
        raise InputError(
            f"{what} starts the command line again for every {each}, which a notebook has none "
            "of; use !python train_with_esm_features.py"
        )
    check_launch(ranks, options.command)
    return ranks


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
