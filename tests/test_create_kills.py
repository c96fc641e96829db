"""Killed at any moment, script 1 leaves whole files: the old ones or the new ones."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_leaves_whole_files(tmp_path: Path, kills: int) -> None:
    table = {f"G{i}": torch.randn(2048) for i in range(3000)}
    torch.save(table, tmp_path / "table.pt")
    arguments = ("--all-genes", "--esm-embeddings", "table.pt", "--output", "o.pt")
    whole = {}
    for ablation in ((), ("--ablation", "shuffle")):
        start = time.monotonic()
        assert run_script("create_esm_pert_features", *arguments, *ablation, cwd=tmp_path).code == 0
        seconds = time.monotonic() - start
        whole[ablation] = (tmp_path / "o.pt").read_bytes()
    assert whole[()] != whole["--ablation", "shuffle"]
    moments = random.Random(kills)
    for _ in range(kills):
        command = [sys.executable, str(ROOT / "create_esm_pert_features.py"), *arguments]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=-3, stderr=-3)
        time.sleep(moments.uniform(0.5, 1.0) * seconds)
        process.kill()
        process.wait()
        assert (tmp_path / "o.pt").read_bytes() in whole.values()
        assert json.loads((tmp_path / "o.pt.json").read_text())["format"] == 1
    again = run_script("create_esm_pert_features", *arguments, cwd=tmp_path)
    assert (again.code, again.out) == (0, "o.pt\n")
    assert (tmp_path / "o.pt").read_bytes() == whole[()]
    kept = [p for p in tmp_path.iterdir() if ".orig" in p.name]
    assert all(p.read_bytes() in whole.values() for p in kept)
