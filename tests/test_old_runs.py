"""Runs of earlier versions stay what they were: up to date, resumed, extended.

old_run.tar.xz holds one as version 0.1.0 wrote it before there was a package: two scripts, features
of a table and of two proteins (ESM2 with random weights of width 16), four steps of a State model
with hidden_dim 16. The folder it was made in is replaced by a placeholder.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Result
from test_train_run import run_json

import create_esm_pert_features
import train_with_esm_features
from state_esm_features.training.run_dir import versions

PLACEHOLDER = "/THE/OLD/FOLDER"
FILES = ("--config", "config.toml", "--pert-features", "features.pt")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked run, in the working directory, as if it had been made there with what is
    installed now."""
    with tarfile.open(ROOT / "tests" / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".toml", ".yaml"):
            path.write_text(path.read_text().replace(PLACEHOLDER, str(tmp_path)))
    run = tmp_path / "runs" / "run"
    record = run_json(run)
    record["identity"]["versions"] = versions()
    (run / "run.json").write_text(json.dumps(record))
    [changed] = record["identity"]["changed"].values()
    os.utime(tmp_path / "screen.h5ad", ns=(changed, changed))
    monkeypatch.chdir(tmp_path)
    return run


Main = Callable[..., Result]


@pytest.fixture
def train(old: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    def run(*words: object) -> Result:
        capsys.readouterr()
        given = run_json(old)["starts"][0]["command"][len(FILES) :]
        code = train_with_esm_features.main([*FILES, *given, *map(str, words)])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def add(old: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    def run(*words: object) -> Result:
        capsys.readouterr()
        code = create_esm_pert_features.main([*map(str, words), "--into-run", str(old)])
        return Result(code, *capsys.readouterr())

    return run


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_a_finished_run_is_up_to_date(train: Main, old: Path) -> None:
    before = (old / "run.json").read_bytes()
    done = train()
    assert (done.code, done.out) == (0, f"{old}\n"), done.err
    assert f"up to date: {old} finished with the same inputs" in done.err.splitlines()
    assert (old / "run.json").read_bytes() == before


def test_a_run_resumes(train: Main, old: Path) -> None:
    done = train("--resume", "--max-steps", 6)
    assert done.code == 0, done.err
    assert "changed since the run was started: training.max_steps: 4 -> 6" in done.err
    assert (run_json(old)["steps"], run_json(old)["status"]) == (6, "finished")
    assert load(old / "checkpoints" / "final.ckpt")["global_step"] == 6


def test_labels_are_added_to_a_run(add: Main, old: Path, tmp_path: Path) -> None:
    """One of its table, and one whose protein its FASTA has."""
    (tmp_path / "new.txt").write_text("SIMEXTRA001\nSIM020\n")
    before = load(old / "pert_onehot_map.pt")
    done = add("--gene-list", "new.txt", "--device", "cpu", "--no-cache")
    assert done.code == 0, done.err
    after, table = load(old / "pert_onehot_map.pt"), load(tmp_path / "table.pt")
    assert after.keys() - before.keys() == {"SIMEXTRA001", "SIM020"}
    assert all(torch.equal(after[label], vector) for label, vector in before.items())
    assert torch.equal(after["SIMEXTRA001"], table["SIMEXTRA001"])
    assert after["SIM020"].shape == (16,) and after["SIM020"].any()


def test_vectors_made_now_are_those_of_the_run(old: Path, tmp_path: Path) -> None:
    """Those computed from sequences are at most 1e-4 away, the others are bit for bit the same."""
    words = ["--from-toml", "config.toml", "--esm-embeddings", "table.pt", "--fasta"]
    words += ["proteins.fasta", "--esm-model", "esm2.pt", "--device", "cpu", "--no-cache"]
    assert create_esm_pert_features.main([*words, "--output", "now.pt"]) == 0
    now, then = load(tmp_path / "now.pt"), load(old / "pert_features.pt")
    assert now.keys() == then.keys()
    for label, vector in now.items():
        computed = label in ("SIM005", "SIM006")
        assert torch.allclose(vector, then[label], rtol=0, atol=1e-4 if computed else 0), label
