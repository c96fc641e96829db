"""Who started the processes of a training, how many there are, and which of them this one is.

All of it is read from the environment, as Lightning reads it. Starting and ending processes stands
in `processes`.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from state_esm_features.console import InputError

STARTED = "TRAIN_WITH_ESM_LAUNCH"
"""Environment variable of the processes that Lightning starts for one of ours."""

BY_HAND = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What Lightning and torch ask for on several machines that no srun or torchrun starts."""


def whole(name: str, default: int = 0) -> int:
    """An environment variable that holds a whole number.

    Raises
    ------
    InputError
        It holds something else.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} must be a whole number, got {text!r}")
    return int(text)


def launcher() -> str | None:
    """'torchrun' or 'srun' if that starts every process, else None: by hand, or Lightning.

    In the order of Lightning's AcceleratorConnector, as srun may start torchrun. In an interactive
    job, which it knows by the name, Lightning starts the processes itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "srun" if "SLURM_NTASKS" in os.environ and not interactive else None


def rank(devices: int = 1) -> int:
    """Number of this process among those that train together, as Lightning counts them.

    Parameters
    ----------
    devices
        Processes on each machine.
    """
    names = {"torchrun": "RANK", "srun": "SLURM_PROCID"}
    by = launcher()
    if by:
        return whole(names[by])
    return whole("NODE_RANK", whole("GROUP_RANK")) * devices + whole("LOCAL_RANK")


def nodes_started() -> int:
    """Machines on which srun or torchrun started processes; 1 where neither did."""
    by = launcher()
    if by == "torchrun":
        return max(1, whole("WORLD_SIZE", 1) // max(1, whole("LOCAL_WORLD_SIZE", 1)))
    return whole("SLURM_NNODES", 1) if by and in_a_step() else 1


def in_a_step() -> bool:
    """Whether srun itself started this process: a job script has the other variables too, and may
    train in one process, whatever the job was given."""
    return "SLURM_STEP_ID" in os.environ


def launch_id() -> str | None:
    """What the processes of one training share; by hand it is the same at every start."""
    shared = {
        "torchrun": ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"),
        "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        None: BY_HAND[1:],
    }
    values = [os.environ.get(name, "") for name in shared[launcher()]]
    return ".".join(values) if any(values) else None


@dataclass(frozen=True)
class Ranks:
    """The processes that train together.

    Attributes
    ----------
    nodes, devices
        Machines, and processes on each of them.
    rank
        Number of this one.
    by_lightning
        Lightning started this one, for another one on this machine.
    """

    nodes: int = 1
    devices: int = 1
    rank: int = 0
    by_lightning: bool = False

    @property
    def number(self) -> int:
        return self.nodes * self.devices

    def started_apart(self) -> list[int]:
        """Ranks beside the first that neither Lightning nor this process starts."""
        if self.number == 1:
            return []
        return list(range(0, self.number, 1 if launcher() else self.devices))[1:]

    def __str__(self) -> str:
        return f"{self.nodes} x {self.devices}"


def in_words(nodes: int, devices: int) -> str:
    """The options that ask for so many processes."""
    words = [f"--nodes {nodes}", f"training.devices={devices}"]
    return " ".join([*words, "training.strategy=ddp"] if nodes * devices > 1 else words)


def check_launch(ranks: Ranks, command: Sequence[str]) -> None:
    """The processes are those that the options ask for.

    Parameters
    ----------
    command
        Words of the command line, which a message repeats.

    Raises
    ------
    InputError
        srun or torchrun started others; by hand a variable is missing, or --nodes.
    """
    if ranks.by_lightning:
        return
    {"torchrun": check_torchrun, "srun": check_srun, None: check_by_hand}[launcher()](
        ranks, command
    )


def check_torchrun(ranks: Ranks, command: Sequence[str]) -> None:
    nodes, each = nodes_started(), whole("LOCAL_WORLD_SIZE", 1)
    if (nodes, each) != (ranks.nodes, ranks.devices):
        raise InputError(
            f"torchrun started {each} on each of {nodes} (processes, machines), but "
            f"{in_words(ranks.nodes, ranks.devices)} asks for {ranks.devices} on each of "
            f"{ranks.nodes}. Give {in_words(nodes, each)}, or start torchrun "
            f"--nnodes={ranks.nodes} --nproc-per-node={ranks.devices}"
        )


def check_srun(ranks: Ranks, command: Sequence[str]) -> None:
    """SLURM decides; Lightning asks for --ntasks-per-node where there are several tasks."""
    nodes, tasks = whole("SLURM_NNODES", 1), whole("SLURM_NTASKS", 1)
    each = whole("SLURM_NTASKS_PER_NODE", 1 if tasks == 1 else 0)
    alone = ranks.number == 1 and not in_a_step()
    if alone or (nodes, tasks, each) == (ranks.nodes, ranks.number, ranks.devices):
        return
    by_node = f"--ntasks-per-node={each}" if each else "without --ntasks-per-node"
    fitting = tasks // nodes if tasks % nodes == 0 else 0
    options = f", or give {in_words(nodes, fitting)}" if each == fitting else ""
    raise InputError(
        f"SLURM started --ntasks={tasks} on --nodes={nodes} ({by_node}), but "
        f"{in_words(ranks.nodes, ranks.devices)} asks for {ranks.devices} on each of "
        f"{ranks.nodes}. Write into the job script\n"
        f"  #SBATCH --nodes={ranks.nodes} --ntasks-per-node={ranks.devices} "
        f"--gpus-per-node={ranks.devices}\n"
        f"and start the command with srun{options}"
    )


def check_by_hand(ranks: Ranks, command: Sequence[str]) -> None:
    node = whole("NODE_RANK", whole("GROUP_RANK"))
    if ranks.nodes == 1 and node:
        raise InputError(
            f"NODE_RANK={node} is set, but one machine trains: give --nodes N on every machine, "
            "or unset NODE_RANK"
        )
    missing = [name for name in BY_HAND if not os.environ.get(name)] if ranks.nodes > 1 else []
    if missing:
        raise InputError(
            f"--nodes {ranks.nodes}: {', '.join(missing)} not set. On each machine type its line:\n"
            + "\n".join(f"  {line}" for line in commands_by_hand(ranks.nodes, command))
        )
    if node >= ranks.nodes:
        raise InputError(
            f"NODE_RANK={node}, but of --nodes {ranks.nodes} the last is {ranks.nodes - 1}: they "
            "count from 0"
        )


def commands_by_hand(nodes: int, command: Sequence[str], shown: int = 3) -> list[str]:
    """What to type on each machine, this one as the first; of many the first ones and the last."""
    address = os.environ.get("MASTER_ADDR") or platform.node()
    port = os.environ.get("MASTER_PORT") or "29500"
    words = shlex.join(["train-with-esm-features", *command])
    lines = [
        f"NODE_RANK={i} MASTER_ADDR={address} MASTER_PORT={port} {words}" for i in range(nodes)
    ]
    return lines if nodes <= shown + 1 else [*lines[: shown - 1], "...", lines[-1]]
