"""The demo's table shows whether the vectors reach the model, on a smaller setting."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import state.__main__
import torch
from demo_data import Screen, vectors, write_demo
from run_demo import correlations

import create_esm_pert_features
import train_with_esm_features

BASE = Screen(perturbed=60, families=6, width=8, genes=40, cells=12, controls=48)
STEPS = 180
TINY_MODEL = (
    "data.kwargs.output_space=gene",
    "training.lr=0.005",
    "model.kwargs.cell_set_len=16",
    "model.kwargs.hidden_dim=48",
    "model.kwargs.n_encoder_layers=2",
    "model.kwargs.n_decoder_layers=2",
    "model.kwargs.transformer_backbone_kwargs.head_dim=6",
    "model.kwargs.transformer_backbone_kwargs.intermediate_size=96",
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers=2",
)


def prepare(folder: Path, screen: Screen) -> None:
    """A folder with the simulated screen and a TOML as the demo's."""
    write_demo(folder / "demo", screen)
    (folder / "demo.toml").write_text(
        '[datasets]\ndemo = "demo/simulated_screen.h5ad"\n[training]\ndemo = "train"\n'
        '[zeroshot]\n"demo.simB" = "test"\n[fewshot."demo.simA"]\n'
        f"val = {json.dumps(screen.validation)}\ntest = {json.dumps(screen.unseen)}\n"
    )


def outcome(folder: Path, screen: Screen, name: str, table: Path, *options: str) -> pd.Series:
    """Features from `table`, training and stock inference: the demo's column for it."""
    features = f"{name}.pt"
    labels = ["--from-toml", "demo.toml", "--esm-embeddings", str(table), "--output", features]
    assert create_esm_pert_features.main([*labels, *options]) == 0
    words = ["--config", "demo.toml", "--pert-features", features, "--name", name]
    words += ["--max-steps", str(STEPS), "--batch-size", "8", "--num-workers", "0"]
    assert train_with_esm_features.main([*words, *TINY_MODEL]) == 0
    predicted = folder / f"{name}.h5ad"
    infer = ["state", "tx", "infer", "--model-dir", f"runs/{name}", "--output", str(predicted)]
    infer += ["--adata", "demo/simulated_template.h5ad", "--pert-col", "target_gene", "--quiet"]
    before, sys.argv = sys.argv, infer
    try:
        state.__main__.main()
    finally:
        sys.argv = before
    return correlations(folder / "demo/simulated_screen.h5ad", predicted, screen)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_table_tells_right_wiring_from_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    folder, screen = tmp_path, replace(BASE, seed=seed)
    prepare(folder, screen)
    monkeypatch.chdir(folder)
    table = {k: torch.from_numpy(v) for k, v in vectors(screen).items()}
    mixed = random.Random(0).sample([*table.values()], len(table))
    other = replace(screen, seed=9, families=screen.perturbed)  # families would tell genes apart
    tables = {
        "right": table,
        "wrong order": dict(zip(table, mixed, strict=True)),
        "wrong file": {k: torch.from_numpy(v) for k, v in vectors(other).items()},
        "zero vectors": {"SIM000": table["SIM000"]},
    }
    found = {}
    for name, content in tables.items():
        torch.save(content, folder / f"{name} table.pt")
        options = ["--missing", "zero"] if name == "zero vectors" else []
        found[name] = outcome(folder, screen, name, folder / f"{name} table.pt", *options)
    shown = pd.DataFrame(found)
    print(shown.to_string(float_format="%.2f"))
    unseen = shown.loc["unseen genes"]
    assert unseen["right"] > 0.4, shown
    assert (unseen["right"] - unseen.drop("right") > 0.25).all(), shown
    assert np.isfinite(shown.to_numpy()).all()
