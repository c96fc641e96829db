"""tests/run_evaluation.py: what `make evaluate` evaluates."""

from __future__ import annotations

import tomllib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import run_evaluation
from run_evaluation import HELD_OUT, STEPS

from state_esm_features.evaluation.__main__ import parse


def test_norman_split_has_genes_of_both_groups(tmp_path: Path) -> None:
    shared = {"MAP2K3", "MAP2K6", "MAP3K21", "MAP4K3", "MAP4K5", "MAPK1", "PLK4", "SGK1", "TGFBR2"}
    labels = [*sorted(shared), "HK2", "KMT2A", "NIT1", "KLF1+MAP2K6", "control"]
    obs = pd.DataFrame({"perturbation": labels}, dtype="category", index=labels)
    obs["cell_type"] = [[*HELD_OUT][i % 4] for i in range(len(labels))]
    var = pd.DataFrame(index=pd.Index(["TP53"], name="gene"))
    anndata.AnnData(np.zeros((len(labels), 1)), obs, var).write_h5ad(tmp_path / "cells.h5ad")
    words = run_evaluation.norman(tmp_path / "cells.h5ad", tmp_path / "out")
    typed, _ = parse(words)
    assert (typed["pert_col"], typed["control_pert"]) == ("perturbation", "control")
    config = tomllib.loads(typed["config"].read_text())
    assert anndata.read_h5ad(config["datasets"]["norman"]).var.index.name is None
    held = {k.removeprefix("norman."): set(v["test"]) for k, v in config["fewshot"].items()}
    assert held == {k: set(v) for k, v in HELD_OUT.items()}
    everywhere = set.intersection(*held.values())
    assert everywhere == {"MAP3K21", "MAP4K5", "PLK4"}
    assert set.union(*held.values()) - shared == {"HK2", "KMT2A", "NIT1"}
    for genes in held.values():
        assert len(genes & shared - everywhere) >= 2


def test_another_file_is_refused(tmp_path: Path) -> None:
    obs = pd.DataFrame({"perturbation": ["A"]}, index=["c"])
    anndata.AnnData(np.zeros((1, 1)), obs).write_h5ad(tmp_path / "other.h5ad")
    for name, message in (
        ("none.h5ad", "error: no file {}"),
        (
            "other.h5ad",
            "error: {} is not the Norman/McFaline file: its cells are to have obs columns "
            "perturbation and cell_type, with the cell types k562, A172, T98G, U87MG",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            run_evaluation.norman(tmp_path / name, tmp_path / "out")
        assert stop.value.code == message.format(tmp_path / name)


def test_demo_is_simulated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed, _ = parse([*run_evaluation.demo(), "--planted", *STEPS])
    assert typed["config"].exists() and typed["esm_embeddings"][0].exists()
    before = Path("demo/simulated_screen.h5ad").stat().st_mtime_ns
    run_evaluation.demo()
    assert Path("demo/simulated_screen.h5ad").stat().st_mtime_ns == before
