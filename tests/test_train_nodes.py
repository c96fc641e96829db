"""Several machines: processes that were started apart train together, and end together.

Two machines are two processes here, connected by loopback.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SMALL, asleep, until
from demo_data import simulate
from test_train_return import (
    GOAL,
    MAIN_CODE,
    Run,
    Start,
    assert_finished,
    assert_stopped_and_saved,
    gone,
    names,
    start,
    step_reached,
    steps_done,
)
from test_train_run import TINY, checkpoint, make_screen, run_json

HOST = platform.node()

SET = 8
"""Cells in a set, of TINY."""

DRIVER = """
import json, os, sys
sys.path.insert(0, ROOT)
import state.tx.utils
from lightning.pytorch.callbacks import Callback
import train_with_esm_features

class Cells(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(f"HERE/{trainer.global_rank}.cells", "a") as f:
            row = [trainer.global_step, trainer.current_epoch, batch["pert_cell_barcode"]]
            f.write(json.dumps(row) + chr(10))

stock = state.tx.utils.get_checkpoint_callbacks
state.tx.utils.get_checkpoint_callbacks = lambda *a, **k: [*stock(*a, **k), Cells()]
sys.exit(train_with_esm_features.main())
"""
"""Started by us as the first process of a machine, and by Lightning as the others there; each notes
in HERE/RANK.cells which cells it trains on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with screen, TOML and features, which no test changes."""
    return make_screen(tmp_path_factory.mktemp("screen"), {"sim": SMALL})


@pytest.fixture
def driver(tmp_path: Path) -> str:
    """Code of a training that notes its cells; Lightning starts the file that it is in."""
    path = tmp_path / "driver.py"
    path.write_text(DRIVER.replace("ROOT", repr(str(ROOT))).replace("HERE", str(tmp_path)))
    return f"sys.argv[0] = {str(path)!r}; exec(open(sys.argv[0]).read())"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def by_hand(node: int, port: int) -> dict[str, str]:
    return {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture
def begin(folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a training of tmp_path/runs/run in a process of its own."""
    runs: list[Run] = []

    def begin(*words: object, env: dict[str, str], code: str = MAIN_CODE) -> Run:
        files = ("--config", "config.toml", "--pert-features", "features.pt")
        words = (*files, "--num-workers", 0, *words)
        runs.append(start(tmp_path, len(runs), words, folder, env, code))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


Machines = Callable[..., list[Run]]


@pytest.fixture
def machines(begin: Start) -> Machines:
    """Start the same command on several machines by hand, the first one last."""

    def machines(*words: object, nodes: int = 2, code: str = MAIN_CODE) -> list[Run]:
        port = free_port()
        words = ("--nodes", nodes, *words)
        backwards = reversed(range(nodes))
        return [begin(*words, env=by_hand(node, port), code=code) for node in backwards][::-1]

    return machines


def cells_of(here: Path, rank: int, epoch: int = 0) -> list[list[str]]:
    """Cells of each step of an epoch."""
    rows = map(json.loads, (here / f"{rank}.cells").read_text().splitlines())
    return [cells for _, its_epoch, cells in rows if its_epoch == epoch]


def assert_each_set_is_drawn_by_one_rank(here: Path, ranks: int) -> None:
    """In the first epoch: no cell comes to two ranks, and there are as many sets as the cells of a
    cell type and perturbation make (one that is not full is filled up with some of its cells)."""
    drawn = [[cell for step in cells_of(here, rank) for cell in step] for rank in range(ranks)]
    assert all(drawn)
    assert len(set().union(*drawn)) == sum(len(set(cells)) for cells in drawn)
    cells = simulate(SMALL).obs
    held_out = cells.cell_type.eq("simA") & cells.target_gene.isin(["SIM003", "SIM004"])
    groups = cells[~held_out].groupby(["cell_type", "target_gene"], observed=True).size()
    assert sum(map(len, drawn)) == SET * sum(math.ceil(n / SET) for n in groups)


def epochs_begun(here: Path, ranks: int) -> int:
    """How many epochs every rank has begun."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        last = [(here / f"{rank}.cells").read_text().splitlines()[-1] for rank in range(ranks)]
        return min(json.loads(line)[1] for line in last) + 1
    return 0


LOST = (
    r"error: another process of this training has ended, or its machine cannot be reached, at step "
    r"[\d,]+; the last good checkpoint is .*last\.ckpt, of step [\d,]+: --resume, started again on "
    r"every machine \(.+\)"
)


def test_two_machines_train_as_one_end_as_one_and_go_on(
    machines: Machines, begin: Start, driver: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs/run"
    flags = ("--val-freq", 3, "--max-steps", GOAL)
    first, other = machines(*flags, code=driver)
    until(lambda: epochs_begun(tmp_path, 2) > 1, first)
    other.send(signal.SIGKILL)
    assert (first.wait(), other.wait()) == (1, -signal.SIGKILL)
    assert re.fullmatch(LOST, first.lines[-1]), first.err
    assert_each_set_is_drawn_by_one_rank(tmp_path, 2)
    record = run_json(run_dir)
    assert (record["status"], record["nodes"]) == ("failed", 2)
    assert record["trainer"] == {"PL_TRAINER_NUM_NODES": "2"}
    assert record["starts"][0]["processes"] == "2 x 1"
    assert "PL_TRAINER_NUM_NODES=2 state tx train " in record["stock_command"]
    assert names(tmp_path / "runs") == [".run.launch", ".run.lock", "run"]

    reached = step_reached(run_dir)
    first, other = machines(*flags, "--resume")
    until(lambda: steps_done(run_dir) > reached + 1, first)
    other.send(signal.SIGTERM)
    step = assert_stopped_and_saved(first, run_dir, "SIGTERM")
    assert other.wait() == 143
    assert other.lines == [
        f"rank 1 on {HOST} trains {run_dir} together with process {first.pid} on {HOST}",
        "SIGTERM: stopping after this step",
        f"saved step {step} in {run_dir}/checkpoints/last.ckpt; --resume goes on",
        "stopped by SIGTERM",
    ]
    assert names(tmp_path / "runs") == [".run.launch", ".run.lock", "run"]

    alone = begin("--max-steps", step + 1, "--resume", env={})
    assert_finished(alone, run_dir, step + 1)
    assert (
        "until now on 2 machines, from here on 1: 2 cell sets (16 cells) a step in all, 2 in each; "
        "training.lr=0.003 stays: State does not scale it" in alone.lines
    )
    assert [s["processes"] for s in run_json(run_dir)["starts"]] == ["2 x 1", "2 x 1", "1 x 1"]

    first, other = machines("--max-steps", step + 1, "--val-freq", 3)
    assert (first.wait(), other.wait()) == (0, 0)  # the number of machines is none of a run's
    assert first.lines[-1] == f"up to date: {run_dir} finished with the same inputs"
    assert other.lines == [f"rank 1 on {HOST}: nothing to train, the run is up to date"]


def test_a_refusal_of_the_first_rank_ends_the_others_at_once(
    machines: Machines, tmp_path: Path
) -> None:
    first, other = machines("--max-steps", 1, "model=none")
    assert (first.wait(), other.wait()) == (1, 1)
    said = first.lines[-1].removeprefix("error: ")
    assert said.startswith("the stock configuration of state says: no model 'none'; models: ")
    assert other.lines == [f"error: rank 1 on {HOST}: the first rank ended: {said}"]
    assert not (tmp_path / "runs/run").exists()


def test_a_dry_run_by_hand_says_what_to_type(begin: Start, tmp_path: Path) -> None:
    run = begin("--max-steps", 1, "--nodes", 2, "--dry-run", env={})
    assert run.wait() == 0, run.err
    assert run.out_file.read_text().startswith("PL_TRAINER_NUM_NODES=2 state tx train ")
    typed = [line.removeprefix("type      ") for line in run.lines if line.startswith("type ")]
    start = f"MASTER_ADDR={HOST} MASTER_PORT=29500 train-with-esm-features --config config.toml "
    assert [line.partition("--pert-features")[0] for line in typed] == [
        f"NODE_RANK={node} {start}" for node in (0, 1)
    ]
    assert "--dry-run" not in " ".join(typed) and " --nodes 2 " in typed[0]
    assert not (tmp_path / "runs").exists()


def test_several_machines_cannot_be_started_from_a_notebook(begin: Start, tmp_path: Path) -> None:
    code = "sys.exit(train_with_esm_features.main(sys.argv[1:]))"
    run = begin("--max-steps", 1, "--nodes", 2, env=by_hand(0, free_port()), code=code)
    assert (run.wait(), run.lines) == (
        1,
        [
            "error: --nodes 2 starts the command line again for every machine, which a notebook "
            "has none of; use !python train_with_esm_features.py"
        ],
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_torchrun_starts_both_processes(folder: Path, tmp_path: Path) -> None:
    words = ["--config", "config.toml", "--pert-features", "features.pt", "--num-workers", "0"]
    words += ["--max-steps", "2", "--val-freq", "2", "--batch-size", "2", *TINY]
    words += ["--output-dir", str(tmp_path / "runs"), "--name", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command += [str(ROOT / "train_with_esm_features.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "error: torchrun started 2 on each of 1 (processes, machines), but --nodes 1 "
        "training.devices=1 asks for 1 on each of 1. Give --nodes 1 training.devices=2 "
        "training.strategy=ddp, or start torchrun --nnodes=1 --nproc-per-node=1" in done.stderr
    )
    command += ["training.devices=2", "training.strategy=ddp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/runs/run\n"), done.stderr
    assert checkpoint(tmp_path / "runs/run", "final")["global_step"] == 2


def test_a_folder_that_is_not_shared_is_said(begin: Start, tmp_path: Path) -> None:
    code = "import state_esm_features.training.rendezvous as r; r.SILENCE_SECONDS = 1; " + MAIN_CODE
    words = ("--max-steps", 1, "--nodes", 2)
    run = begin(*words, env=by_hand(1, free_port()), code=code)
    assert (run.wait(), run.lines) == (
        1,
        [
            f"rank 1 on {HOST} waits for the first rank to write {tmp_path}/runs/run",
            f"error: rank 1 on {HOST}: no sign of the first rank for 1 s in "
            f"{tmp_path}/runs/.run.launch. Either it was not started, with the same command, or "
            "--output-dir is no folder that all machines share",
        ],
    )
    assert names(tmp_path / "runs") == []


def test_a_rank_that_cannot_train_what_was_prepared_ends_all(begin: Start, tmp_path: Path) -> None:
    port, words = free_port(), ("--nodes", 2, "--max-steps", 1)
    code = (
        "import state_esm_features.training.loop as loop; "
        f"loop.bytes_of = lambda path: None; {MAIN_CODE}"
    )
    other = begin(*words, env=by_hand(1, port), code=code)
    first = begin(*words, env=by_hand(0, port))
    assert (first.wait(), other.wait()) == (1, 1)
    data = next(iter(run_json(tmp_path / "runs/run")["identity"]["data"]))
    said = f"not the data of the first rank on {HOST}, or none: {data}"
    assert other.lines[-1] == f"error: {said}"
    assert first.lines[-1] == f"error: rank 1 on {HOST} cannot train: {said}"


def test_ctrl_c_ends_a_process_that_waits_for_the_connection(begin: Start, tmp_path: Path) -> None:
    """torch looks at no signal meanwhile. Here the other process never connects."""
    here = tmp_path / "connects"
    never = "import time, torch.distributed as d; "
    never += "d.init_process_group = lambda *a, **k: time.sleep(1e6); "
    notes = "import torch.distributed as d; real = d.init_process_group; "
    notes += f"d.init_process_group = lambda *a, **k: (open({str(here)!r}, 'w'), real(*a, **k)); "
    notes += "import state_esm_features.training.rendezvous as r; "
    notes += "r.GRACE_SECONDS = r.SAY_SECONDS = 0.5; "
    port, words = free_port(), ("--nodes", 2, "--max-steps", 1)
    other = begin(*words, env=by_hand(1, port), code=never + MAIN_CODE)
    first = begin(*words, env=by_hand(0, port), code=notes + MAIN_CODE)
    still = (
        "still connecting with the other ranks; if one of them has ended, stop this one, and start "
        "again on every machine"
    )
    first.until(lambda: still in first.lines and here.exists() and asleep(first.pid))
    first.send(signal.SIGINT)
    assert first.wait() == 130
    assert first.lines[-1] == "warning: stopped by Ctrl-C; the ranks were not connected yet"
    assert other.wait() == 1
    assert other.lines[-1] == (
        f"warning: rank 1 on {HOST}: the first rank ended: stopped by Ctrl-C; the ranks were not "
        "connected yet"
    )


def test_a_port_that_is_taken_is_said(begin: Start) -> None:
    """The other process connects to whoever has it, and ends with the first rank."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ("--max-steps", 1, "--nodes", 2)
        other, first = (begin(*words, env=by_hand(node, port)) for node in (1, 0))
        said = f"MASTER_PORT={port} is taken on {HOST}: name another one on every machine"
        assert (first.wait(), first.lines[-1]) == (1, f"error: {said}")
        ended = f"rank 1 on {HOST}: the first rank ended: {said}"
        assert other.wait() == 1
        # it may have looked before it began to connect, or while it did
        assert other.lines[-1] in (
            f"error: {ended}",
            f"warning: {ended}; the ranks were not connected yet",
        )


def slurm(node: int, port: int) -> dict[str, str]:
    """Environment of a task of srun --nodes=2 --ntasks-per-node=1."""
    return {
        **{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"},
        **{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"},
        **{"SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_NODEID": str(node)},
        **{"SLURM_NODELIST": "localhost", "MASTER_PORT": str(port)},
    }


def torchrun(node: int, port: int) -> dict[str, str]:
    """Environment of a process of torchrun --nnodes=2 --nproc-per-node=1."""
    return {
        **{"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"},
        **{"RANK": str(node), "LOCAL_RANK": "0", "GROUP_RANK": str(node)},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


@pytest.mark.parametrize("launched", [slurm, torchrun])
def test_processes_of_a_launcher_train_together(
    begin: Start, tmp_path: Path, launched: Callable[[int, int], dict[str, str]]
) -> None:
    """Their number of machines is the launcher's; a dry run needs no other process."""
    port, words = free_port(), ("--max-steps", 2, "--val-freq", 2)
    dry = begin(*words, "--dry-run", env=launched(0, port))
    assert dry.wait() == 0, dry.err
    assert (
        "processes 2 x 1 (machines x devices): 4 cell sets (32 cells) a step in all, 2 in each; "
        "training.lr=0.003 stays: State does not scale it" in dry.lines
    )
    other, first = (begin(*words, env=launched(node, port)) for node in (1, 0))
    assert_finished(first, tmp_path / "runs/run", 2)
    assert (other.wait(), other.lines[-1]) == (
        0,
        f"rank 1 on {HOST}: finished with step 2; see the first rank",
    )
    assert names(tmp_path / "runs") == [".run.lock", "run"]


@pytest.mark.slow
def test_two_machines_of_two_processes(machines: Machines, driver: str, tmp_path: Path) -> None:
    """Lightning starts the second process of each; all end with one that is killed."""
    run_dir = tmp_path / "runs/run"
    two = ("training.devices=2", "training.strategy=ddp")
    flags = ("--val-freq", 3, "--max-steps", GOAL, *two)
    first, other = machines(*flags, code=driver)
    until(lambda: epochs_begun(tmp_path, 4) > 1, first)
    [child] = children(other)
    family = [child, *children(first)]
    child.kill()
    assert (first.wait(), other.wait()) != (0, 0)
    until(lambda: all(map(gone, family)))
    assert re.fullmatch(LOST, first.lines[-1]), first.err
    assert_each_set_is_drawn_by_one_rank(tmp_path, 4)

    reached = step_reached(run_dir)
    first, other = machines(*flags, "--resume", code=driver)
    until(lambda: steps_done(run_dir) > reached + 1, first)
    family = [*children(first), *children(other)]
    assert len(family) == 2
    for run in (first, other):
        run.send(signal.SIGTERM, group=True)
    step = assert_stopped_and_saved(first, run_dir, "SIGTERM")
    assert other.wait() == 143
    until(lambda: all(map(gone, family)))

    first, other = machines("--max-steps", step + 3, "--resume", code=driver)
    assert_finished(first, run_dir, step + 3)
    assert other.wait() == 0, other.err
    assert names(tmp_path / "runs") == [".run.lock", "run"]


def children(run: Run) -> list[psutil.Process]:
    return psutil.Process(run.pid).children()
