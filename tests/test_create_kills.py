"""Killed at any moment, script 1 leaves whole files: the old ones or the new ones."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import run_script, script_fork, until
from forks import Fork


def has_written(folder: Path, old: set[Path], size: int, process: Fork) -> bool:
    """Whether a run has a new temporary file of that size, or needs none any more."""
    if process.poll() is not None:
        return True
    sizes = []
    for path in set(folder.glob(".o.pt.*.tmp")) - old:
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            sizes.append(path.stat().st_size)
    return max(sizes, default=-1) >= size


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_leaves_whole_files(tmp_path: Path, kills: int) -> None:
    table = {f"G{i}": torch.randn(2048) for i in range(3000)}
    torch.save(table, tmp_path / "table.pt")
    arguments = ("--all-genes", "--esm-embeddings", "table.pt", "--output", "o.pt")
    whole = {}
    for ablation in ((), ("--ablation", "shuffle")):
        assert run_script("create_esm_pert_features", *arguments, *ablation, cwd=tmp_path).code == 0
        whole[ablation] = (tmp_path / "o.pt").read_bytes()
    assert whole[()] != whole["--ablation", "shuffle"]
    moments = random.Random(kills)
    in_time = 0
    while in_time < kills:  # not counting those that came too late
        old = set(tmp_path.iterdir())
        process = script_fork("create_esm_pert_features", *arguments, cwd=tmp_path)
        size = int(moments.uniform(0, 1) * len(whole[()]))
        until(partial(has_written, tmp_path, old, size, process))
        # before it, in it or after it: what is asserted below holds whatever the moment is
        time.sleep(moments.choice([0, moments.uniform(0, 0.1)]))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        in_time += process.returncode == -signal.SIGKILL
        assert (tmp_path / "o.pt").read_bytes() in whole.values()
        assert json.loads((tmp_path / "o.pt.json").read_text())["format"] == 1
    again = run_script("create_esm_pert_features", *arguments, cwd=tmp_path)
    assert (again.code, again.out) == (0, "o.pt\n")
    assert (tmp_path / "o.pt").read_bytes() == whole[()]
    kept = [p for p in tmp_path.iterdir() if ".orig" in p.name]
    assert all(p.read_bytes() in whole.values() for p in kept)
