"""tests/benchmarks/evaluate.py: its table is exact, and tells vectors that help from others."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.image import imread
from test_demo import BASE, STEPS, TINY_MODEL, prepare

sys.path.append(str(ROOT / "tests" / "benchmarks"))
import evaluate
from evaluate import GROUPS, HELD_OUT, METRICS, Study

TEXT = """\
By hand: mean +- SD over 2 seeds of the mean over (cell type, perturbation) pairs

seen (1)                      pearson_delta                         mse     discrimination_score_l1
real                         0.850 +- 0.071              0.200 +- 0.000              1.000 +- 0.000
shuffle                      0.700 +- 0.000              0.300 +- 0.000              1.000 +- 0.000
perturb_mean                 0.900 +- 0.000              0.100 +- 0.000              1.000 +- 0.000
real - shuffle               0.150 +- 0.071             -0.100 +- 0.000              0.000 +- 0.000

unseen (3)                    pearson_delta                         mse     discrimination_score_l1
real                         0.567 +- 0.047              0.433 +- 0.047              0.533 +- 0.047
shuffle                      0.033 +- 0.047              1.000 +- 0.000              0.500 +- 0.000
perturb_mean                  NaN (6/6 NaN)              1.000 +- 0.000              0.500 +- 0.000
real - shuffle               0.533 +- 0.094             -0.567 +- 0.047              0.033 +- 0.047

In brackets: pairs in the test cells.
pearson_delta: higher is better, 1 is perfect, 0 is chance
mse: lower is better, 0 is perfect
discrimination_score_l1: higher is better, 1 is perfect, 0.5 + 0.5 / n is chance"""


def write_results(run_dir: Path, cell_type: str, *rows: str) -> None:
    """A file as cell-eval writes it, with a column more, and its aggregate."""
    folder = run_dir / "eval_final.ckpt"
    folder.mkdir(parents=True, exist_ok=True)
    header = "perturbation,mae,discrimination_score_l1,mse,pearson_delta\n"
    (folder / f"{cell_type}_results.csv").write_text(header + "\n".join(rows) + "\n")
    aggregate = header.replace("perturbation", "statistic") + "mean,9,9,9,9\n"
    (folder / f"{cell_type}_agg_results.csv").write_text(aggregate)


@pytest.fixture
def pairs(tmp_path: Path) -> pd.DataFrame:
    """Three methods, two seeds, two cell types; only A is seen, NA is a gene."""
    found = []
    for method, seen, unseen in (
        ("real", ("1,0.2,0.8", "1,0.2,0.9"), ("0.5,0.4,0.6", "0.7,0.6,0.4")),
        ("shuffle", ("1,0.3,0.7", "1,0.3,0.7"), ("0.5,1,0", "0.5,1,0.2")),
        ("perturb_mean", ("1,0.1,0.9", "1,0.1,0.9"), ("0.5,1,NaN", "0.5,1,")),
    ):
        for seed in range(2):
            run_dir = tmp_path / f"{method}_{seed}"
            write_results(run_dir, "K562", f"A,7,{seen[seed]}", f"NA,7,{unseen[seed]}")
            write_results(run_dir, "HeLa_S3", f"NA,7,{unseen[0]}", f"A+B,7,{unseen[0]}")
            run = evaluate.read_pairs(run_dir, seen={"A", "B"})
            found.append(run.assign(method=method, seed=seed))
    return pd.concat(found, ignore_index=True)


def test_pairs_are_read_and_told_apart(pairs: pd.DataFrame) -> None:
    first = pairs[(pairs["method"] == "real") & (pairs["seed"] == 0)]
    assert first[["group", "cell_type", "perturbation", *METRICS]].to_numpy().tolist() == [
        ["unseen", "HeLa_S3", "NA", 0.6, 0.4, 0.5],
        ["unseen", "HeLa_S3", "A+B", 0.6, 0.4, 0.5],
        ["seen", "K562", "A", 0.8, 0.2, 1.0],
        ["unseen", "K562", "NA", 0.6, 0.4, 0.5],
    ]
    assert len(pairs) == 3 * 2 * 4


def test_table_is_exact_and_counts_nan(pairs: pd.DataFrame) -> None:
    table = evaluate.summarise(pairs).set_index(["group", "method", "metric"])
    real = table.loc["unseen", "real", "pearson_delta"]
    # seed 0: 0.6 thrice; seed 1: 0.6, 0.6 and 0.4, and each pair counts once
    assert real["mean"] == pytest.approx((0.6 + 1.6 / 3) / 2)
    assert real["sd"] == pytest.approx((0.6 - 1.6 / 3) / np.sqrt(2))
    assert real[["seeds", "pairs", "values", "nan"]].tolist() == [2, 3, 6, 0]
    none = table.loc["unseen", "perturb_mean", "pearson_delta"]
    assert np.isnan(none["mean"])
    assert none[["pairs", "values", "nan"]].tolist() == [3, 6, 6]
    gain = table.loc["unseen", "real - shuffle", "pearson_delta"]  # 0.6 - 0; 1.6 / 3 - 0.2 / 3
    assert gain["mean"] == pytest.approx((0.6 + 1.4 / 3) / 2)
    assert gain["sd"] == pytest.approx((0.6 - 1.4 / 3) / np.sqrt(2))
    methods = ["real", "shuffle", "perturb_mean", "real - shuffle"]
    assert len(table) == len(methods) * len(GROUPS) * len(METRICS)
    assert list(table.index.unique("method")) == methods


def test_printed_table(pairs: pd.DataFrame) -> None:
    assert evaluate.as_text(evaluate.summarise(pairs), "By hand") == TEXT


def test_values_that_are_missing_are_counted_not_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "eval_final.ckpt"
    folder.mkdir()
    (folder / "K562_results.csv").write_text("perturbation,mse,pearson_delta\nA,0.5,\nB,0.3,0.5\n")
    pairs = evaluate.read_pairs(tmp_path, {"A", "B"}).assign(method="onehot", seed=0)
    text = evaluate.as_text(evaluate.summarise(pairs), "One seed, a metric missing")
    cells = [[word.strip() for word in line.split("  ") if word] for line in text.splitlines()]
    assert ["seen (2)", *METRICS] in cells
    assert ["onehot", "0.500 (1/2 NaN)", "0.400", "NaN (2/2 NaN)"] in cells
    assert ["unseen (none)", *METRICS] in cells


def test_picture_shows_both_groups(pairs: pd.DataFrame, tmp_path: Path) -> None:
    evaluate.draw(tmp_path / "picture.png", pairs, "By hand")
    image = imread(tmp_path / "picture.png")
    assert image.shape == (480, 1440, 4)
    pixels = (image[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for colour, *_ in GROUPS.values():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(1).sum() > 100  # lines of the means


def test_norman_split_has_genes_of_both_groups(tmp_path: Path) -> None:
    shared = {"MAP2K3", "MAP2K6", "MAP3K21", "MAP4K3", "MAP4K5", "MAPK1", "PLK4", "SGK1", "TGFBR2"}
    labels = [*sorted(shared), "HK2", "KMT2A", "NIT1", "KLF1+MAP2K6", "control"]
    obs = pd.DataFrame({"perturbation": labels}, dtype="category", index=labels)
    obs["cell_type"] = [[*HELD_OUT][i % 4] for i in range(len(labels))]
    var = pd.DataFrame(index=pd.Index(["TP53"], name="gene"))
    anndata.AnnData(np.zeros((len(labels), 1)), obs, var).write_h5ad(tmp_path / "cells.h5ad")
    study = evaluate.norman(tmp_path / "cells.h5ad", None, tmp_path / "out")
    assert anndata.read_h5ad(study.folder / "norman.h5ad").var.index.name is None
    assert study.methods == ("onehot", "perturb_mean", "context_mean")
    with_table = evaluate.norman(tmp_path / "cells.h5ad", study.table, tmp_path / "out")
    assert with_table.methods == ("real", "shuffle", *study.methods)
    del obs["cell_type"]
    anndata.AnnData(np.zeros((len(labels), 1)), obs, var).write_h5ad(tmp_path / "other.h5ad")
    for name, message in (
        ("none.h5ad", "error: no file {}"),
        (
            "other.h5ad",
            "error: {} is not the Norman/McFaline file: its cells are to have obs columns "
            "perturbation and cell_type, with the cell types k562, A172, T98G, U87MG",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.norman(tmp_path / name, None, tmp_path / "out")
        assert stop.value.code == message.format(tmp_path / name)
    config = tomllib.loads(study.toml.read_text())
    held = {k.removeprefix("norman."): set(v["test"]) for k, v in config["fewshot"].items()}
    assert held == {k: set(v) for k, v in HELD_OUT.items()}
    everywhere = set.intersection(*held.values())
    assert everywhere == {"MAP3K21", "MAP4K5", "PLK4"}
    assert set.union(*held.values()) - shared == {"HK2", "KMT2A", "NIT1"}
    for genes in held.values():
        assert len(genes & shared - everywhere) >= 2


def test_evaluation_measures_every_method_on_every_perturbation(tmp_path: Path) -> None:
    """What they are worth after so few steps is nothing: a slow test looks at that."""
    prepare(tmp_path, BASE)
    table = tmp_path / "demo" / "simulated_table.pt"
    methods = ("real", "onehot")
    study = Study("Small", tmp_path, tmp_path / "demo.toml", table, methods, training=TINY_MODEL)
    found = evaluate.evaluate(study, seeds=1, steps=2)
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    for _, of_method in pairs.groupby("method"):
        assert set(of_method["perturbation"]) == {*BASE.symbols, BASE.combination}
    assert {*found["method"]} == {*methods}
    assert np.isfinite(found["mean"]).all()


@pytest.mark.slow
def test_evaluation_tells_vectors_that_help_from_others(tmp_path: Path) -> None:
    prepare(tmp_path, BASE)
    table = tmp_path / "demo" / "simulated_table.pt"
    methods = ("real", "shuffle", "onehot")
    study = Study("Small", tmp_path, tmp_path / "demo.toml", table, methods, training=TINY_MODEL)
    found = evaluate.evaluate(study, seeds=1, steps=STEPS)
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    unseen = pairs[pairs["group"] == "unseen"]
    assert set(unseen["perturbation"]) == {*BASE.unseen, *BASE.validation}
    seen = set(pairs["perturbation"]) - set(unseen["perturbation"])
    assert seen == {*BASE.symbols, BASE.combination} - {*BASE.unseen, *BASE.validation}
    shown = found.pivot_table(index=["group", "method"], columns="metric", values="mean")
    r = shown.loc["unseen", "pearson_delta"]
    assert r["real"] > 0.4, shown
    assert r["real"] - r["shuffle"] > 0.3, shown
    assert abs(r["onehot"]) < 0.2, shown
