"""Which process this is, and whether those that were started are those that are asked for."""

from __future__ import annotations

import os
import platform

import pytest
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from state_esm_features.console import InputError
from state_esm_features.training.launch import (
    STARTED,
    Ranks,
    check_launch,
    commands_by_hand,
    launch_id,
    launcher,
    nodes_started,
    rank,
)

OF_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "MASTER_")
NAMES = {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", STARTED}

SRUN = {
    **{"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2"},
    **{"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
}
TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "abc", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"},
    **{"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
}
ALONE = {"SLURM_NTASKS": "3", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "3"}
"""Of a job script, without srun."""
HAND = {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(OF_LAUNCHERS) or name in NAMES:
            monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def global_rank(environment: ClusterEnvironment, devices: int) -> int:
    """As DDPStrategy.set_world_ranks has it."""
    environment.set_global_rank(environment.node_rank() * devices + environment.local_rank())
    return environment.global_rank()


@pytest.mark.parametrize(
    ("variables", "devices", "theirs", "by"),
    [
        ({}, 2, LightningEnvironment, None),
        ({"LOCAL_RANK": "1"}, 2, LightningEnvironment, None),
        (HAND, 1, LightningEnvironment, None),
        (HAND, 2, LightningEnvironment, None),
        ({**HAND, "LOCAL_RANK": "1"}, 2, LightningEnvironment, None),
        ({"GROUP_RANK": "1", "LOCAL_RANK": "0"}, 3, LightningEnvironment, None),
        ({**HAND, "RANK": "9"}, 2, LightningEnvironment, None),
        (SRUN, 2, SLURMEnvironment, "srun"),
        ({**SRUN, "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, 2, LightningEnvironment, None),
        (TORCHRUN, 2, TorchElasticEnvironment, "torchrun"),
        ({**SRUN, **TORCHRUN, "RANK": "2"}, 2, TorchElasticEnvironment, "torchrun"),
    ],
)
def test_rank_is_that_of_lightning(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    devices: int,
    theirs: type[ClusterEnvironment],
    by: str | None,
) -> None:
    put(monkeypatch, variables)
    kinds: list[type[ClusterEnvironment]] = [TorchElasticEnvironment, SLURMEnvironment]
    detected = next((kind for kind in kinds if kind.detect()), LightningEnvironment)
    assert detected is theirs  # in the order of AcceleratorConnector
    assert (launcher(), rank(devices)) == (by, global_rank(theirs(), devices))


def test_nodes_are_those_that_srun_or_torchrun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes_started() == 1
    put(monkeypatch, {**HAND, "SLURM_NNODES": "5"})
    assert nodes_started() == 1  # by hand: --nodes says it
    put(monkeypatch, {**SRUN, "SLURM_NNODES": "3"})
    assert nodes_started() == 3
    monkeypatch.delenv("SLURM_STEP_ID")
    assert nodes_started() == 1  # in the job script, without srun
    put(monkeypatch, TORCHRUN)
    assert nodes_started() == 2


def test_processes_of_a_training_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_id() is None
    put(monkeypatch, HAND)
    assert launch_id() == "a.29500"
    put(monkeypatch, SRUN)
    assert launch_id() == "77.0."
    put(monkeypatch, TORCHRUN)
    assert launch_id() == "abc..1"


def test_ranks_that_others_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks(1, 1).started_apart() == Ranks(1, 4).started_apart() == []
    assert Ranks(3, 1).started_apart() == [1, 2]
    assert Ranks(3, 2).started_apart() == [2, 4]
    put(monkeypatch, SRUN)
    assert Ranks(2, 2).started_apart() == [1, 2, 3]


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, Ranks(1, 1)),
        ({}, Ranks(1, 2)),
        ({"NODE_RANK": "0"}, Ranks(1, 2)),
        (HAND, Ranks(2, 1)),
        (HAND, Ranks(2, 4)),
        (SRUN, Ranks(2, 2)),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, Ranks(1, 1)),
        (ALONE, Ranks(1, 1)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, Ranks(1, 4)),
        (TORCHRUN, Ranks(2, 2)),
    ],
)
def test_what_was_started_as_asked_for_goes_on(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], ranks: Ranks
) -> None:
    put(monkeypatch, variables)
    check_launch(ranks, [])


@pytest.mark.parametrize(
    ("variables", "ranks", "said"),
    [
        (
            SRUN,
            Ranks(2, 1),
            "SLURM started --ntasks=4 on --nodes=2 (--ntasks-per-node=2), but --nodes 2 "
            "training.devices=1 training.strategy=ddp asks for 1 on each of 2. Write into the job "
            "script\n  #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=1\nand start the "
            "command with srun, or give --nodes 2 training.devices=2 training.strategy=ddp",
        ),
        (
            SRUN,
            Ranks(3, 2),
            "SLURM started --ntasks=4 on --nodes=2 (--ntasks-per-node=2), but --nodes 3 "
            "training.devices=2 training.strategy=ddp asks for 2 on each of 3. Write into the job "
            "script\n  #SBATCH --nodes=3 --ntasks-per-node=2 --gpus-per-node=2\nand start the "
            "command with srun, or give --nodes 2 training.devices=2 training.strategy=ddp",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_NNODES": "2"},
            Ranks(2, 1),
            "SLURM started --ntasks=2 on --nodes=2 (without --ntasks-per-node), but --nodes 2 "
            "training.devices=1 training.strategy=ddp asks for 1 on each of 2. Write into the job "
            "script\n  #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=1\nand start the "
            "command with srun",
        ),
        (
            {**ALONE, "SLURM_STEP_ID": "0"},
            Ranks(1, 1),
            "SLURM started --ntasks=3 on --nodes=1 (--ntasks-per-node=3), but --nodes 1 "
            "training.devices=1 asks for 1 on each of 1. Write into the job script\n"
            "  #SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1\nand start the "
            "command with srun, or give --nodes 1 training.devices=3 training.strategy=ddp",
        ),
        (
            TORCHRUN,
            Ranks(2, 1),
            "torchrun started 2 on each of 2 (processes, machines), but --nodes 2 "
            "training.devices=1 training.strategy=ddp asks for 1 on each of 2. Give --nodes 2 "
            "training.devices=2 training.strategy=ddp, or start torchrun --nnodes=2 "
            "--nproc-per-node=1",
        ),
        (
            {"MASTER_ADDR": "a"},
            Ranks(2, 1),
            "--nodes 2: NODE_RANK, MASTER_PORT not set. On each machine type its line:\n"
            "  NODE_RANK=0 MASTER_ADDR=a MASTER_PORT=29500 train-with-esm-features --nodes 2 '#'\n"
            "  NODE_RANK=1 MASTER_ADDR=a MASTER_PORT=29500 train-with-esm-features --nodes 2 '#'",
        ),
        (
            {**HAND, "NODE_RANK": "2"},
            Ranks(2, 1),
            "NODE_RANK=2, but of --nodes 2 the last is 1: they count from 0",
        ),
        (
            HAND,
            Ranks(1, 2),
            "NODE_RANK=1 is set, but one machine trains: give --nodes N on every machine, or unset "
            "NODE_RANK",
        ),
        (
            {**HAND, "NODE_RANK": "first"},
            Ranks(2, 1),
            "the environment variable NODE_RANK must be a whole number, got 'first'",
        ),
    ],
)
def test_what_was_started_otherwise_is_refused_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], ranks: Ranks, said: str
) -> None:
    put(monkeypatch, variables)
    with pytest.raises(InputError) as error:
        check_launch(ranks, ["--nodes", "2", "#"])
    assert str(error.value) == said


def test_commands_of_many_machines_are_the_first_ones_and_the_last() -> None:
    start = f"MASTER_ADDR={platform.node()} MASTER_PORT=29500 train-with-esm-features"
    lines = [f"NODE_RANK={i} {start}" for i in range(9)]
    assert commands_by_hand(9, []) == [lines[0], lines[1], "...", lines[8]]
    assert commands_by_hand(4, []) == lines[:4]
