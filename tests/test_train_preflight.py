"""What train_with_esm_features.py checks before anything is written: exit code, whole message."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from conftest import SMALL, Result
from h5ad_forms import OLD_PANDAS, SETTING, nullable
from toml_mistakes import TOML_MISTAKES, write_mistake

import train_with_esm_features as script
from state_esm_features.console import Findings
from state_esm_features.files import available_memory
from state_esm_features.h5ad import gene_names
from state_esm_features.option_groups import BATCH_COLUMNS
from state_esm_features.training import preflight
from state_esm_features.training.model_check import try_model
from state_esm_features.training.preflight import check_disk, inspect_data
from state_esm_features.training.stock import compose

Train = Callable[..., Result]
Refused = Callable[..., None]
Accepted = Callable[..., Result]

CONTROL = "non-targeting"
DATASETS = '[datasets]\nsim = "screen.h5ad"\n'
TRAIN = f'{DATASETS}[training]\nsim = "train"\n'
HELD = '[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = ["SIM004"]\n'
PLAN = ["run", "model", "data", "columns", "split", "train", "val", "test"]
PLAN += ["features", "workers", "dry"]
SEEN = "out, but training sees"
LABELS = [*SMALL.symbols, SMALL.combination]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every folder and file below `folder`, with its content."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def ready(project: Path, create: Callable[..., Result]) -> Path:
    """The project, with features.pt by create_esm_pert_features.py."""
    assert make_features(create).out == "features.pt\n"
    return project


def make_features(create: Callable[..., Result], *arguments: object) -> Result:
    """Run script 1 for config.toml."""
    where = ("--esm-embeddings", "table.pt", "--output", "features.pt")
    done = create("--from-toml", "config.toml", *where, *arguments)
    assert done.code == 0, done.err
    return done


@pytest.fixture
def train(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Train:
    """Run train_with_esm_features.main([..., '--dry-run']); assert that it changes nothing."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # as the script does from the command line

    def run(*arguments: object, config: str = "config.toml", features: str = "features.pt") -> Any:
        before = snapshot(ready)
        capsys.readouterr()
        files = ["--config", config, "--pert-features", features, "--output-dir", "runs"]
        code = script.main([*files, "--dry-run", *map(str, arguments)])
        assert snapshot(ready) == before
        assert not (ready / "runs").exists()
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(train: Train) -> Refused:
    """Assert exit code 1 and that stderr is the error, after any warnings."""

    def check(*problems: str, args: Sequence[object] = (), **files: str) -> None:
        message = problems[0]
        if len(problems) > 1:
            message = "\n  - ".join([f"{len(problems)} problems:", *problems])
        done = train(*args, **files)
        lines = [x for x in done.err.splitlines(True) if not x.startswith("warning: ")]
        assert (done.code, done.out, "".join(lines)) == (1, "", f"error: {message}\n")

    return check


@pytest.fixture
def accepted(train: Train) -> Accepted:
    """Assert exit code 0 and that stderr is these warnings, then the plan.

    That the screen's genes are held out in one cell type only is a warning of every test: it is
    left out where it is not expected.
    """

    def check(*warnings: str, args: Sequence[object] = (), **files: str) -> Result:
        done = train(*args, **files)
        usual = "" if any(SEEN in w for w in warnings) else SEEN
        lines = [x for x in done.err.splitlines() if not usual or usual not in x]
        assert done.code == 0, done.err
        assert lines[: -len(PLAN)] == [f"warning: {w}" for w in warnings]
        assert [line.split()[0] for line in lines[-len(PLAN) :]] == PLAN
        return done

    return check


def toml(folder: Path, text: str) -> None:
    (folder / "config.toml").write_text(text)


def plan(done: Result) -> dict[str, str]:
    """The lines of the plan by their name."""
    lines = done.err.splitlines()[-len(PLAN) : -1]
    return dict(tuple(line.split(maxsplit=1)) for line in lines)  # type: ignore[misc]


def two_files(folder: Path, first: anndata.AnnData, second: anndata.AnnData) -> None:
    """One dataset of two files, a.h5ad and b.h5ad."""
    first.write_h5ad(folder / "a.h5ad")
    second.write_h5ad(folder / "b.h5ad")
    toml(folder, TRAIN.replace("screen.h5ad", "{a,b}.h5ad") + HELD)


def test_a_good_project_is_accepted_without_a_warning(accepted: Accepted, tmp_path: Path) -> None:
    assert plan(accepted(args=("--num-workers", 3))) == {
        "run": str(tmp_path / "runs" / "config_state_sm"),
        "model": "state_sm, 400,000 steps of 16 cell sets",
        "data": "1 file, 30 genes, 312 cells",
        "columns": (
            "perturbation target_gene, cell type cell_type, batch batch_var, control non-targeting"
        ),
        "split": "cells  perturbations           seen in training          never in training",
        "train": "240             11",
        "val": "12              1               1 (12 cells)                0 (0 cells)",
        "test": "12              1               1 (12 cells)                0 (0 cells)",
        "features": "features.pt (12 x 8)",
        "workers": "3",
    }


@pytest.mark.parametrize(
    ("held", "val", "test", "said"),
    [
        (
            {"simA": ("SIM003", "SIM004")},
            "12 1 1 (12 cells) 0 (0 cells)",
            "12 1 1 (12 cells) 0 (0 cells)",
            "SIM003, SIM004 out, but training sees them in sim.simB",
        ),
        (
            {"simA": ("SIM003", "SIM004"), "simB": ("SIM005", "SIM004")},
            "24 2 2 (24 cells) 0 (0 cells)",
            "24 1 0 (0 cells) 1 (24 cells)",
            "SIM003, SIM005 out, but training sees them in sim.simA, sim.simB",
        ),
        (
            {"simA": ("SIM003", "SIM004"), "simB": ("SIM003", "SIM004")},
            "24 1 0 (0 cells) 1 (24 cells)",
            "24 1 0 (0 cells) 1 (24 cells)",
            None,
        ),
    ],
)
def test_plan_tells_genes_trained_elsewhere_from_genes_never_trained(
    accepted: Accepted,
    tmp_path: Path,
    held: dict[str, tuple[str, str]],
    val: str,
    test: str,
    said: str | None,
) -> None:
    sections = [
        f'[fewshot."sim.{cell_type}"]\nval = ["{v}"]\ntest = ["{t}"]\n'
        for cell_type, (v, t) in held.items()
    ]
    toml(tmp_path, TRAIN + "".join(sections))
    warning = f"[fewshot] holds {said}: not unseen. For genes that no training cell has, hold "
    done = accepted(*([f"{warning}them out there too"] if said else []))
    assert SEEN in done.err if said else SEEN not in done.err
    shown = plan(done)
    assert " ".join(shown["val"].split()) == val
    assert " ".join(shown["test"].split()) == test


def test_held_out_gene_in_a_trained_combination_is_a_warning(
    accepted: Accepted, tmp_path: Path
) -> None:
    held = '[fewshot."sim.{}"]\nval = ["SIM003"]\ntest = ["SIM000"]\n'
    toml(tmp_path, TRAIN + held.format("simA") + held.format("simB"))
    accepted(
        f"training has combinations of genes that [fewshot] holds out ({SMALL.combination}): these "
        "genes are not unseen. Hold the combinations out too"
    )


def test_plan_of_a_zero_shot_cell_type_tells_trained_from_never_trained(
    accepted: Accepted, tmp_path: Path
) -> None:
    toml(tmp_path, TRAIN + HELD + '[zeroshot]\n"sim.simB" = "test"\n')
    shown = plan(accepted())
    assert " ".join(shown["train"].split()) == "108 9"
    assert " ".join(shown["val"].split()) == "12 1 0 (0 cells) 1 (12 cells)"
    assert " ".join(shown["test"].split()) == "144 11 9 (108 cells) 2 (36 cells)"


# --- the TOML -----------------------------------------------------------------------------------


def test_toml_that_does_not_exist_is_named(refused: Refused, tmp_path: Path) -> None:
    refused(f"no such TOML: nowhere.toml (looked in {tmp_path})", config="nowhere.toml")


def test_features_file_that_does_not_exist_is_named(refused: Refused, tmp_path: Path) -> None:
    refused(f"no such features file: nowhere.pt (looked in {tmp_path})", features="nowhere.pt")


@pytest.mark.parametrize(("text", "stderr"), TOML_MISTAKES)
def test_toml_that_cell_load_would_misread_is_refused(
    train: Train, ready: Path, text: str, stderr: str
) -> None:
    write_mistake(ready / "c.toml", text)
    assert train(config="c.toml") == Result(1, "", stderr)


# --- the paths ----------------------------------------------------------------------------------


def test_path_that_matches_no_file_is_named_with_the_folder_it_counts_from(
    refused: Refused, ready: Path
) -> None:
    toml(ready, TRAIN.replace("screen", "nowhere"))
    refused(
        "dataset 'sim': no .h5 or .h5ad file at nowhere.h5ad (relative to the working directory "
        f"{ready}); correct the path in config.toml, or run from the folder it starts in"
    )


def test_path_that_exists_relative_to_the_toml_is_pointed_out(
    refused: Refused, ready: Path
) -> None:
    (ready / "sub").mkdir()
    (ready / "screen.h5ad").rename(ready / "sub" / "screen.h5ad")
    (ready / "sub" / "c.toml").write_text(TRAIN)
    refused(
        "dataset 'sim': no .h5 or .h5ad file at screen.h5ad (relative to the working directory "
        f"{ready}). It exists relative to the TOML: run from {ready / 'sub'}, or make the path "
        "absolute",
        config="sub/c.toml",
    )


def test_file_that_is_no_hdf5_is_refused(refused: Refused, ready: Path) -> None:
    (ready / "screen.h5ad").write_text("gene,cell\n")
    refused(
        "screen.h5ad cannot be read: it is damaged, cut short or not an HDF5 file (Unable to "
        "synchronously open file (file signature not found))"
    )


def test_truncated_file_is_refused(train: Train, ready: Path) -> None:
    path = ready / "screen.h5ad"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = train()
    assert (done.code, done.out) == (1, "")
    size, eof = len(whole) // 2, len(whole)
    assert re.fullmatch(
        r"error: screen\.h5ad cannot be read: it is damaged, cut short or not an HDF5 file "
        rf"\(Unable to synchronously open file \(truncated file: eof = {size}, sblock->base_addr "
        rf"= 0, stored_eof = {eof}\)\)\n",
        done.err,
    )


def test_file_without_obs_is_refused(refused: Refused, ready: Path) -> None:
    with h5py.File(ready / "screen.h5ad", "w") as file:
        file["X"] = np.zeros((2, 2))
    refused(
        "screen.h5ad has no obs table that cell-load can read; write it again with a current "
        "anndata"
    )


# --- all problems at once -----------------------------------------------------------------------


def test_all_problems_are_listed_together(refused: Refused, ready: Path, screen: Any) -> None:
    first, second = screen.copy(), screen.copy()
    first.obs.loc[first.obs_names[0], "target_gene"] = None
    second = second[(second.obs["cell_type"] == "simA") | (second.obs["target_gene"] != CONTROL)]
    second.var_names = [*second.var_names[1:], second.var_names[0]]
    del second.uns["log1p"]
    two_files(ready, first, second)
    text = (ready / "config.toml").read_text()
    toml(ready, f'{text}[zeroshot]\n"sim.simC" = "test"\n')
    features = torch.load(ready / "features.pt", weights_only=True)
    del features["SIM001"]
    features["SIM002"][3] = float("nan")
    features["SIM003"][:] = 0
    torch.save(features, ready / "bad.pt")
    order = ", ".join(f"SIMREADOUT{i:03d}/SIMREADOUT{i + 1:03d}" for i in range(5))
    again = "Make the file again with create_esm_pert_features.py"
    refused(
        "a.h5ad: 1 cell without a label in 'target_gene'; cell-load would train them as "
        "'non-targeting'. Remove them, or label them",
        "a.h5ad and b.h5ad do not have the same genes in the same order: the same genes in "
        f"another order (30 positions: {order}, ...); cell-load would train on mixed-up genes. "
        "Write them with the same var_names",
        "some files carry uns/log1p and some do not (b.h5ad), which cell-load refuses; if those "
        "too are log1p-normalised, write them again after "
        f"{SETTING}adata.uns['log1p'] = {{}}",
        "b.h5ad: no control cell ('non-targeting') in simB; cell-load draws the controls from the "
        "same cell type and file. Add controls, or remove these cells",
        "'sim.simC': no file of dataset 'sim' has the cell type 'simC' (did you mean simB, "
        "simA?); cell types: simA, simB",
        "bad.pt: NaN or infinite values in 1 vector (SIM002)",
        "bad.pt: 1 perturbation with a zero vector, which State cannot tell from the control "
        f"(SIM003). {again}",
        *(
            f"1 of 11 perturbations in {name}.h5ad has no embedding in bad.pt (SIM001); "
            f"cell-load would train them as control. {again} --from-toml"
            for name in "ab"
        ),
        features="bad.pt",
    )


def test_the_features_file_is_checked_even_where_the_data_cannot_be(
    refused: Refused, ready: Path
) -> None:
    toml(ready, TRAIN.replace("screen", "/nowhere/screen"))
    torch.save({CONTROL: torch.zeros(2), "A": torch.tensor([1.0, float("inf")])}, ready / "bad.pt")
    refused(
        "dataset 'sim': no .h5 or .h5ad file at /nowhere/screen.h5ad; correct the path in "
        "config.toml",
        "bad.pt: NaN or infinite values in 1 vector (A)",
        features="bad.pt",
    )


# --- obs columns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "wanted", "hint"),
    [
        ("--pert-col", "target_gen", " (did you mean target_gene?)"),
        ("--cell-type-key", "celltype", " (did you mean cell_type?)"),
        ("--batch-col", "x", ""),
    ],
)
def test_column_that_is_missing_is_named_with_those_that_are_there(
    refused: Refused, flag: str, wanted: str, hint: str
) -> None:
    advice = ""
    if flag == "--batch-col":
        advice = (
            "; State does not use the batch unless you tell it to, but cell-load needs a column: "
            "any one that every file has will do, e.g. --batch-col cell_type"
        )
    refused(
        f"screen.h5ad has no obs column {wanted!r}{hint}; columns: batch_var, cell_type, "
        f"target_gene. Choose one with {flag}{advice}",
        args=(flag, wanted),
    )


@pytest.mark.parametrize("column", ["target_gene", "cell_type"])
def test_column_that_is_not_categorical_is_refused(train: Train, ready: Path, column: str) -> None:
    with h5py.File(ready / "screen.h5ad", "r+") as file:
        del file[f"obs/{column}"]
        file[f"obs/{column}"] = ["a"] * len(file["obs/batch_var/codes"])
    problem = (
        f"screen.h5ad: cell-load cannot read obs/{column} (stored as string-array). Write it again "
        f"with a current anndata, after {SETTING}adata.obs['{column}'] = adata.obs['{column}']"
        ".astype(str).astype('category'), or train with --fast-loading, whose copies it can read"
    )
    assert f"  - {problem}\n" in train().err


@pytest.mark.parametrize("column", ["target_gene", "cell_type"])
def test_labels_that_are_not_text_are_refused(
    refused: Refused, ready: Path, screen: Any, column: str
) -> None:
    screen.obs[column] = pd.Categorical(screen.obs[column].cat.codes.astype("int64").to_numpy())
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        f"screen.h5ad: obs column '{column}' holds int64 labels, not text; write the file again "
        f"after {SETTING}adata.obs['{column}'] = "
        f"adata.obs['{column}'].astype(str).astype('category')"
    )


def test_batch_column_is_found_under_its_usual_names(
    accepted: Accepted, ready: Path, screen: Any
) -> None:
    for name in BATCH_COLUMNS:
        data = screen.copy()
        data.obs = data.obs.rename(columns={"batch_var": name})
        data.write_h5ad(ready / "screen.h5ad")
        assert f" data.kwargs.batch_col={name} " in accepted().out


def test_without_a_batch_column_the_error_says_what_to_do_and_that_works(
    refused: Refused, accepted: Accepted, ready: Path, screen: Any
) -> None:
    del screen.obs["batch_var"]
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad has no obs column batch_var, gem_group, gemgroup, batch ...; columns: "
        "cell_type, target_gene. Choose one with --batch-col; State does not use the batch unless "
        "you tell it to, but cell-load needs a column: any one that every file has will do, e.g. "
        "--batch-col cell_type"
    )
    assert "data.kwargs.batch_col=cell_type" in accepted(args=("--batch-col", "cell_type")).out


def test_two_batch_columns_are_an_error_that_names_both(
    refused: Refused, accepted: Accepted, ready: Path, screen: Any
) -> None:
    screen.obs["donor"] = screen.obs["batch_var"]
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad has more than one obs column that could be meant: batch_var, donor. Choose "
        "one with --batch-col; State does not use the batch unless you tell it to, but cell-load "
        "needs a column: any one that every file has will do, e.g. --batch-col cell_type"
    )
    assert "data.kwargs.batch_col=donor" in accepted(args=("--batch-col", "donor")).out


def test_batch_column_of_numbers_works(accepted: Accepted, ready: Path, screen: Any) -> None:
    screen.obs["batch_var"] = np.arange(screen.n_obs) % 3
    screen.write_h5ad(ready / "screen.h5ad")
    accepted()
    assert sum(real_splits(ready)["train"].values()) == 240


# --- controls and cells without label -----------------------------------------------------------


def test_control_label_that_no_cell_has_comes_with_the_nearest(refused: Refused) -> None:
    refused(
        "screen.h5ad: no cell has the control label 'nontarget' in obs column 'target_gene' (did "
        "you mean non-targeting?). Name it with --control-pert; labels: SIM000, SIM000+SIM001, "
        "SIM001, SIM002, SIM003, ...",
        "features.pt was made for the control 'non-targeting', but this run's control is "
        "'nontarget'; make it again, or correct --control-pert",
        args=("--control-pert", "nontarget"),
    )


def test_cell_type_without_control_cells_is_refused(
    refused: Refused, ready: Path, screen: Any
) -> None:
    bare = (screen.obs["target_gene"] == CONTROL) & (screen.obs["cell_type"] == "simB")
    screen[~bare].write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad: no control cell ('non-targeting') in simB; cell-load draws the controls from "
        "the same cell type and file. Add controls, or remove these cells"
    )


def test_unused_cell_type_category_is_no_problem(
    accepted: Accepted, ready: Path, screen: Any
) -> None:
    screen.obs["cell_type"] = screen.obs["cell_type"].cat.add_categories("simC")
    screen.write_h5ad(ready / "screen.h5ad")
    accepted()


def test_cells_without_a_label_are_refused(refused: Refused, ready: Path, screen: Any) -> None:
    screen = screen.copy()  # pandas 3 makes the codes of a new frame read-only
    screen.obs.loc[screen.obs_names[:7], "target_gene"] = None
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad: 7 cells without a label in 'target_gene'; cell-load would train them as "
        "'non-targeting'. Remove them, or label them"
    )


def test_file_in_which_no_cell_has_a_label_is_refused(
    refused: Refused, ready: Path, screen: Any
) -> None:
    screen.obs["target_gene"] = pd.Categorical([None] * screen.n_obs, categories=np.array([], str))
    with h5py.File(ready / "screen.h5ad", "r+") as file:
        column = file["obs/target_gene"]
        column["codes"][:] = -1
        del column["categories"]
        column.create_dataset("categories", shape=(0,), dtype=h5py.string_dtype())
    refused(
        "screen.h5ad: no cell has the control label 'non-targeting' in obs column 'target_gene'. "
        "Name it with --control-pert; labels: none",
        "screen.h5ad: 312 cells without a label in 'target_gene'. Remove them, or label them",
        'no perturbed cell to train on: name a dataset under [training], e.g. NAME = "train"',
    )


def test_cells_without_a_cell_type_are_a_warning_and_not_counted(
    accepted: Accepted, ready: Path, screen: Any
) -> None:
    screen = screen.copy()  # pandas 3 makes the codes of a new frame read-only
    screen.obs.loc[screen.obs_names[:3], "cell_type"] = None
    screen.write_h5ad(ready / "screen.h5ad")
    done = accepted("screen.h5ad: 3 cells without a cell type in 'cell_type' are not read")
    assert plan(done)["data"] == "1 file, 30 genes, 309 cells"
    assert plan(done)["train"].split() == ["237", "11"]
    assert sum(real_splits(ready)["train"].values()) == 237


# --- the features file --------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "features.pt", weights_only=True)


def test_labels_without_a_vector_are_refused(refused: Refused, ready: Path) -> None:
    features = stored(ready)
    for label in LABELS[2:9]:
        del features[label]
    torch.save(features, ready / "bad.pt")
    refused(
        "7 of 11 perturbations in screen.h5ad have no embedding in bad.pt (SIM002, SIM003, SIM004, "
        "SIM005, SIM006, ...); cell-load would train them as control. Make the file again with "
        "create_esm_pert_features.py --from-toml",
        features="bad.pt",
    )


@pytest.mark.parametrize(
    ("vector", "shapes"),
    [
        (torch.ones(9), "(8,), (9,)"),
        (torch.ones(1, 8), "(1, 8), (8,)"),
        (torch.tensor(1.0), "(), (8,)"),
    ],
)
def test_vectors_of_different_shapes_are_refused(
    refused: Refused, ready: Path, vector: torch.Tensor, shapes: str
) -> None:
    torch.save({**stored(ready), "SIM002": vector}, ready / "bad.pt")
    refused(f"bad.pt: expected vectors of one width, found shapes {shapes}", features="bad.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(
    refused: Refused, ready: Path, value: float
) -> None:
    features = stored(ready)
    features["SIM002"][7] = features["SIM009"][0] = value
    torch.save(features, ready / "bad.pt")
    refused("bad.pt: NaN or infinite values in 2 vectors (SIM002, SIM009)", features="bad.pt")


def test_zero_vectors_are_refused(refused: Refused, ready: Path) -> None:
    features = stored(ready)
    features["SIM002"][:] = 0
    features["SIM009"][:] = 0
    torch.save(features, ready / "bad.pt")
    refused(
        "bad.pt: 2 perturbations with a zero vector, which State cannot tell from the control "
        "(SIM002, SIM009). Make the file again with create_esm_pert_features.py",
        features="bad.pt",
    )


def test_zero_vectors_that_were_chosen_are_a_warning(
    accepted: Accepted, ready: Path, create: Callable[..., Result]
) -> None:
    table = torch.load(ready / "table.pt", weights_only=True)
    del table["SIM005"]
    torch.save(table, ready / "table.pt")
    make_features(create, "--missing", "zero")
    accepted(
        "features.pt: 1 perturbation with a zero vector, which State cannot tell from the control "
        "(SIM005), as --missing zero chose"
    )


def test_another_guide_of_a_gene_that_trains_is_not_unseen(accepted: Accepted, ready: Path) -> None:
    held = "".join(f'[fewshot."sim.{x}"]\nval = ["SIM003"]\n' for x in ("simA", "simB"))
    toml(ready, TRAIN + held)
    features = stored(ready)
    features["SIM003"] = features["SIM007"].clone()
    torch.save(features, ready / "guides.pt")
    done = accepted(
        "guides.pt has no manifest of create_esm_pert_features.py: nothing tells where its vectors "
        "come from",
        "1 label held out has the vector of one that trains (SIM003 = SIM007): not unseen. Of "
        "guides of one gene, hold all out",
        features="guides.pt",
    )
    [row] = [line.split() for line in done.err.splitlines() if line.startswith("val ")]
    assert row == ["val", "24", "1", "1", "(24", "cells)", "0", "(0", "cells)"]


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_features_file_with_code_in_it_is_refused_and_not_executed(
    refused: Refused, ready: Path
) -> None:
    marker = ready / "executed"
    torch.save({**stored(ready), "SIM002": Planted(marker)}, ready / "bad.pt")
    (ready / "plain.pt").write_bytes(pickle.dumps(Planted(marker)))
    objects = "it holds pickled Python objects beside tensors"
    for name, what in (
        ("bad.pt", f"{objects} (getattr)"),
        ("plain.pt", f"it is no file of torch.save, or {objects}"),
    ):
        refused(
            f"{name} was refused without running it: {what}, and loading those can execute code. "
            "Save it again as a plain {symbol: torch.Tensor} dict",
            features=name,
        )
        assert not marker.exists()
    torch.load(ready / "bad.pt", weights_only=False)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    "content", [[torch.ones(8)], torch.ones(8), {}, {"SIM000": 1.0}, {0: torch.ones(8)}]
)
def test_features_file_that_is_no_dict_of_tensors_is_refused(
    refused: Refused, ready: Path, content: object
) -> None:
    torch.save(content, ready / "bad.pt")
    refused("bad.pt is no features file: expected a dict of label -> tensor", features="bad.pt")


def test_features_file_cut_short_is_refused(train: Train, ready: Path) -> None:
    whole = (ready / "features.pt").read_bytes()
    (ready / "bad.pt").write_bytes(whole[: len(whole) // 2])
    done = train(features="bad.pt")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(
        r"warning: .*\nerror: bad\.pt (was refused without running|cannot be read as).*\n", done.err
    )


NO_MANIFEST = (
    "{} has no manifest of create_esm_pert_features.py: nothing tells where its vectors come from"
)


def test_features_file_without_manifest_and_control_is_a_warning_each(
    accepted: Accepted, ready: Path
) -> None:
    """As the file that the challenge ships."""
    features = stored(ready)
    del features[CONTROL]
    torch.save(features, ready / "official.pt")
    accepted(
        NO_MANIFEST.format("official.pt"),
        "official.pt has no control 'non-targeting': cell-load gives it zeros",
        features="official.pt",
    )


@pytest.mark.parametrize("change", ["other bytes", "other format", "no json"])
def test_manifest_that_is_not_of_this_file_counts_as_none(
    accepted: Accepted, ready: Path, change: str
) -> None:
    features, manifest = ready / "features.pt", ready / "features.pt.json"
    if change == "other bytes":
        features.write_bytes(features.read_bytes() + b"\0")
    elif change == "other format":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    else:
        manifest.write_text("{")
    accepted(NO_MANIFEST.format("features.pt"))


def test_features_made_for_another_control_are_refused(
    refused: Refused, ready: Path, create: Callable[..., Result]
) -> None:
    (ready / "g.txt").write_text("\n".join(LABELS))
    table = torch.load(ready / "table.pt", weights_only=True)
    torch.save({**table, CONTROL: torch.ones(8)}, ready / "table.pt")
    make_features(create, "--gene-list", "g.txt")
    done = create(
        *("--gene-list", "g.txt", "--all-genes", "--control-pert", "ctrl"),
        *("--esm-embeddings", "table.pt", "--output", "ctrl.pt"),
    )
    assert done.code == 0, done.err
    refused(
        "ctrl.pt was made for the control 'ctrl', but this run's control is 'non-targeting'; make "
        "it again, or correct --control-pert",
        args=("--control-pert", CONTROL),
        features="ctrl.pt",
    )
    refused(  # what nothing else says is as the features have it
        "screen.h5ad: no cell has the control label 'ctrl' in obs column 'target_gene' (did you "
        "mean non-targeting?). Name it with --control-pert; labels: SIM000, SIM000+SIM001, SIM001, "
        "SIM002, SIM003, ...",
        features="ctrl.pt",
    )


def test_ablation_is_announced_before_everything_else(
    train: Train, ready: Path, create: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_features(create, "--ablation", "shuffle", "--seed", 7)
    for name in ("two", "unused"):
        shutil.copy(ready / "screen.h5ad", ready / f"{name}.h5ad")
    paths = '\n[datasets]\nsim = "screen.h5ad"\ntwo = "two.h5ad"\nunused = "unused.h5ad"\n'
    toml(ready, f'{paths}[training]\nsim = "train"\ntwo = "train"\n')
    monkeypatch.delenv("PYTHONHASHSEED")
    done = train()
    assert done.code == 0
    first, *others = done.err.splitlines()
    assert first == "ABLATION: shuffle, seed 7: not real features"
    assert [x.split(", ")[0] for x in others if x.startswith("warning: ")] == [
        "warning: two or more datasets",
        "warning: dataset 'unused' is in [datasets] but not in [training]",
        "warning: no validation cells: nothing is validated and no best.ckpt is chosen. Keep some "
        "genes back: in the TOML",
    ]
    assert "ABLATION" not in "".join(others)


# --- genes --------------------------------------------------------------------------------------


def mixed_up(what: str) -> str:
    return (
        f"a.h5ad and b.h5ad do not have the same genes in the same order: {what}; cell-load would "
        "train on mixed-up genes. Write them with the same var_names"
    )


def test_genes_in_another_order_are_refused(refused: Refused, ready: Path, screen: Any) -> None:
    order = np.arange(30)
    order[[4, 20]] = order[[20, 4]]
    two_files(ready, screen, screen[:, order].copy())
    what = "2 positions: SIMREADOUT004/SIMREADOUT020, SIMREADOUT020/SIMREADOUT004"
    refused(mixed_up(f"the same genes in another order ({what})"))


def test_other_genes_are_refused(refused: Refused, ready: Path, screen: Any) -> None:
    other = screen.copy()
    other.var_names = [*screen.var_names[:29], "ELSE"]
    two_files(ready, screen, other)
    refused(mixed_up("other genes (1 position: SIMREADOUT029/ELSE)"))


def test_another_number_of_genes_is_refused(refused: Refused, ready: Path, screen: Any) -> None:
    two_files(ready, screen, screen[:, :29].copy())
    refused(mixed_up("29 columns against 30"))


def test_genes_are_compared_between_datasets_too(
    refused: Refused, ready: Path, screen: Any
) -> None:
    two_files(ready, screen, screen[:, :29].copy())
    toml(ready, '[datasets]\na = "a.h5ad"\nb = "b.h5ad"\n[training]\na = "train"\nb = "train"\n')
    refused(mixed_up("29 columns against 30"))


def test_width_of_an_embedding_is_compared_between_files(
    refused: Refused, ready: Path, screen: Any
) -> None:
    other = screen.copy()
    screen.obsm["X_pca"], other.obsm["X_pca"] = np.ones((312, 5)), np.ones((312, 4))
    two_files(ready, screen, other)
    refused(mixed_up("4 columns against 5"), args=("--embed-key", "X_pca"))


def test_gene_names_that_cell_load_does_not_find_are_refused(
    refused: Refused, ready: Path, screen: Any
) -> None:
    screen.var.index.name = "symbol"
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad: cell-load finds no gene names (it looks for var/gene_name and var/_index); "
        f"write the file again after {SETTING}adata.var.index.name = None"
    )
    with pytest.raises(KeyError):
        real_dataset(ready / "screen.h5ad").get_gene_names()


def real_dataset(path: Path) -> Any:
    from cell_load.dataset import PerturbationDataset
    from cell_load.mapping_strategies import RandomMappingStrategy
    from cell_load.utils.data_utils import GlobalH5MetadataCache

    GlobalH5MetadataCache()._cache.clear()  # one process, many files of one name
    return PerturbationDataset(
        name="sim",
        h5_path=path,
        mapping_strategy=RandomMappingStrategy(),
        pert_col="target_gene",
        batch_col="batch_var",
        embed_key=None,
        output_space="all",
    )


@pytest.mark.parametrize(
    ("var", "index"),
    [
        ({}, None),
        ({"gene_name": "plain"}, None),
        ({"gene_name": "categorical"}, None),
        ({"gene_name": "categorical"}, "symbol"),
        ({}, "gene_name"),
        ({}, "gene_name_index"),
        ({"feature": "plain"}, "symbol"),
        ({"feature": "plain"}, None),
        ({"gene_name": "plain", "feature": "plain"}, "gene_name_index"),
    ],
)
def test_gene_names_are_those_that_cell_load_reads(
    ready: Path, screen: Any, var: Mapping[str, str], index: str | None
) -> None:
    for column, kind in var.items():
        names = [f"{column} {i // 2}" for i in range(30, 0, -1)]
        screen.var[column] = pd.Categorical(names) if kind == "categorical" else names
    screen.var.index.name = index
    screen.strings_to_categoricals = lambda *_: None  # write plain text as plain text
    path = ready / "other.h5ad"
    screen.write_h5ad(path)
    with h5py.File(path) as file:
        ours = gene_names(file)
    assert ours == real_dataset(path).get_gene_names()
    assert len(ours) == 30


# --- X ------------------------------------------------------------------------------------------


def test_csc_storage_is_refused(refused: Refused, ready: Path, screen: Any) -> None:
    screen.X = scipy.sparse.csc_matrix(screen.X)
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad: cell-load cannot read X (stored as csc_matrix). Write it again with a "
        f"current anndata, after {SETTING}adata.X = adata.X.tocsr()"
    )


def test_sparse_x_of_no_known_format_is_refused(refused: Refused, ready: Path) -> None:
    with h5py.File(ready / "screen.h5ad", "r+") as file:
        del file["X"].attrs["encoding-type"]
    refused(
        "screen.h5ad: cell-load cannot read X (stored as group). Write it again with a current "
        "anndata" + (f", after {SETTING.removesuffix('; ')}" if SETTING else "")
    )


def test_values_of_one_dimension_are_no_matrix(refused: Refused, ready: Path) -> None:
    with h5py.File(ready / "screen.h5ad", "r+") as file:
        del file["X"]
        file["X"] = np.ones(312, "f4")
        file["X"].attrs["encoding-type"] = "array"
    refused(
        "screen.h5ad: X is no matrix that cell-load can read; write the file again with a current "
        "anndata"
    )


def test_same_form_in_several_files_is_one_line(refused: Refused, ready: Path, screen: Any) -> None:
    two_files(ready, screen, screen)
    for name in "ab":
        for node in ("obs/_index", "var/_index"):
            nullable(ready / f"{name}.h5ad", node)
    lines = SETTING.removesuffix("; ")
    if OLD_PANDAS:
        lines = "; ".join(
            f"adata.{x} = adata.{x}.astype(object)" for x in ("obs_names", "var_names")
        )
    refused(
        "a.h5ad, b.h5ad: cell-load cannot read obs/_index, var/_index (stored as "
        f"nullable-string-array). Write them again with a current anndata, after {lines}, or train "
        "with --fast-loading, whose copies it can read"
    )


def test_file_with_layers_only_is_told_how_to_make_x_of_one(
    refused: Refused, ready: Path, screen: Any
) -> None:
    screen.layers["counts"], screen.layers["scaled"] = screen.X, screen.X
    screen.X = None
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad has no X, but layers: counts, scaled. Write it again after "
        f"{SETTING}adata.X = adata.layers['counts'], log1p-normalised "
        "(scanpy.pp.normalize_total, then scanpy.pp.log1p), or choose with --embed-key; obsm: none"
    )


EXPECTS = "State expects log1p-normalised values: scanpy.pp.normalize_total, then scanpy.pp.log1p"


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (lambda x: x - 20.5 * (x > 0), "has negative values (down to -20.5), as scaled data have"),
        (
            lambda x: x + 10.25 * (x > 0),
            "has values up to {:.4g}, above the 15 that log1p-normalised ones stay below",
        ),
        (lambda x: np.ceil(x * 9), "looks like raw counts (whole numbers up to {:g})"),
    ],
)
def test_values_that_are_not_log1p_are_a_warning(
    accepted: Accepted, ready: Path, screen: Any, change: Any, doubt: str, dense: bool
) -> None:
    values = change(screen.X.toarray())
    doubt = doubt.replace("-20.5", f"{values.min():.3g}").format(values.max())
    for place in ("X", "obsm/X_hvg"):
        changed = screen.copy()
        changed.obsm["X_hvg"] = screen.X.toarray()[:, :5]
        if place == "X":
            changed.X = values if dense else scipy.sparse.csr_matrix(values)
        else:
            changed.obsm["X_hvg"] = values if dense else scipy.sparse.csr_matrix(values)
        changed.write_h5ad(ready / "screen.h5ad")
        flags = () if place == "X" else ("--embed-key", "X_hvg", "--output-space", "gene")
        accepted(f"screen.h5ad: {place} {doubt}; {EXPECTS}", args=flags)


@pytest.mark.parametrize(
    ("mask", "flags", "what", "remedy"),
    [
        (15, (), "X has 30 columns", "Choose --output-space all"),
        (15, ("--embed-key", "X_hvg"), "obsm/X_hvg has 10 columns", "Correct var/highly_variable"),
        (15, ("--embed-key", "X_pca"), "obsm/X_hvg has 10 columns", "Correct var/highly_variable"),
        (10, ("--embed-key", "X_hvg"), "", ""),
        (30, (), "", ""),
    ],
)
def test_names_that_do_not_fit_what_is_predicted_are_a_warning(
    accepted: Accepted,
    ready: Path,
    screen: Any,
    mask: int,
    flags: tuple[str, ...],
    what: str,
    remedy: str,
) -> None:
    screen.var["highly_variable"] = np.arange(30) < mask
    screen.obsm["X_hvg"] = screen.X.toarray()[:, :10]
    screen.obsm["X_pca"] = np.ones((312, 5))
    screen.write_h5ad(ready / "screen.h5ad")
    warning = (
        f"screen.h5ad: {what}, for which cell-load takes the names of the 15 genes of "
        "var/highly_variable with output space gene: `state tx predict` will write genes named 0, "
        f"1, 2 ... {remedy}"
    )
    accepted(*([warning] if what else []), args=("--output-space", "gene", *flags))


def test_values_that_are_no_numbers_are_refused(refused: Refused, ready: Path, screen: Any) -> None:
    screen.X.data[-1] = np.inf  # the sample reaches to the end
    screen.write_h5ad(ready / "screen.h5ad")
    refused("screen.h5ad: X holds NaN or infinite values; the loss would become NaN")


def test_scaled_data_behind_an_embedding_do_not_matter(
    accepted: Accepted, ready: Path, screen: Any
) -> None:
    screen.X = screen.X.toarray() - 1
    screen.obsm["X_pca"] = np.full((312, 5), -200.5, "float32")
    screen.write_h5ad(ready / "screen.h5ad")
    accepted(args=("--embed-key", "X_pca", "--output-space", "embedding"))


def test_file_without_x_is_refused(refused: Refused, ready: Path, screen: Any) -> None:
    screen.obsm["X_pca"] = np.ones((312, 5))
    screen.X = None
    screen.write_h5ad(ready / "screen.h5ad")
    refused("screen.h5ad has no X; obsm: X_pca. Choose with --embed-key")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_raw_counts_are_a_warning(
    accepted: Accepted, ready: Path, screen: Any, dense: bool, dtype: str
) -> None:
    counts = np.round(screen.X.toarray() * 10).astype(dtype)
    screen.X = counts if dense else scipy.sparse.csr_matrix(counts)
    screen.write_h5ad(ready / "screen.h5ad")
    largest = int((counts[:100] if dense else counts).max())  # a sample of a dense file is read
    accepted(
        f"screen.h5ad: X looks like raw counts (whole numbers up to {largest}); State expects "
        "log1p-normalised values: scanpy.pp.normalize_total, then scanpy.pp.log1p"
    )


def test_dense_log1p_data_is_no_warning(accepted: Accepted, ready: Path, screen: Any) -> None:
    screen.X = screen.X.toarray()
    screen.write_h5ad(ready / "screen.h5ad")
    accepted()


def test_raw_counts_behind_an_embedding_do_not_matter(
    accepted: Accepted, ready: Path, screen: Any
) -> None:
    screen.X = np.ones((312, 30), "float32")
    screen.obsm["X_pca"] = np.full((312, 5), 2.0, "float32")  # whole numbers, no counts
    screen.write_h5ad(ready / "screen.h5ad")
    accepted(args=("--embed-key", "X_pca", "--output-space", "embedding"))


def test_log1p_mark_in_some_files_only_is_refused(
    refused: Refused, ready: Path, screen: Any
) -> None:
    other = screen.copy()
    del other.uns["log1p"]
    two_files(ready, screen, other)
    refused(
        "some files carry uns/log1p and some do not (b.h5ad), which cell-load refuses; if those "
        "too are log1p-normalised, write them again after "
        f"{SETTING}adata.uns['log1p'] = {{}}"
    )


def test_embed_key_that_is_missing_is_named_with_those_that_are_there(
    refused: Refused, ready: Path, screen: Any
) -> None:
    refused(
        "screen.h5ad has no obsm/X_uce; obsm: none. Choose with --embed-key",
        args=("--embed-key", "X_uce"),
    )
    screen.obsm["X_pca"] = np.ones((312, 5))
    screen.write_h5ad(ready / "screen.h5ad")
    refused(
        "screen.h5ad has no obsm/X_uce; obsm: X_pca. Choose with --embed-key",
        args=("--embed-key", "X_uce"),
    )


# --- splits -------------------------------------------------------------------------------------


def test_no_cell_to_train_on_is_refused(refused: Refused, ready: Path) -> None:
    toml(ready, f'{TRAIN}[zeroshot]\n"sim.simA" = "val"\n"sim.simB" = "test"\n')
    refused(
        "no perturbed cell to train on: [zeroshot] and [fewshot] hold out all there are of "
        "[training]'s datasets"
    )


def with_advice(text: str, header: str, line: str) -> str:
    """`text` with `line` put under `header`, as a person would do it."""
    if header in text.splitlines():
        return text.replace(f"{header}\n", f"{header}\n{line}\n")
    return f"{text}{header}\n{line}\n"


@pytest.mark.parametrize(
    ("held", "consequence", "header"),
    [
        ("", "nothing is validated and no best.ckpt is chosen", '[fewshot."sim.simA"]'),
        (
            '[zeroshot]\n"sim.simB" = "test"\n[fewshot."sim.simA"]\ntest = ["SIM004"]\n',
            "cell-load validates on the test cells, so best.ckpt is chosen on them",
            '[fewshot."sim.simA"]',
        ),
        (
            '[zeroshot]\n"sim.simA" = "test"\n',
            "cell-load validates on the test cells, so best.ckpt is chosen on them",
            '[fewshot."sim.simB"]',
        ),
    ],
)
def test_no_validation_cells_is_a_warning_whose_advice_works(
    accepted: Accepted, ready: Path, held: str, consequence: str, header: str
) -> None:
    toml(ready, TRAIN + held)
    line = 'val = ["SIM002", "SIM003"]'
    accepted(
        f"no validation cells: {consequence}. Keep some genes back: in the TOML, under {header} "
        f"on a line of its own, {line}"
    )
    toml(ready, with_advice(TRAIN + held, header, line))
    assert plan(accepted())["val"].split()[:2] == ["24", "2"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('[zeroshot]\n"sim.simC" = "test"\n', " (did you mean simB, simA?)"),
        ('[fewshot."sim.HepG2"]\nval = ["SIM001"]\n', ""),
    ],
)
def test_held_out_cell_type_that_no_file_has_is_refused(
    refused: Refused, ready: Path, text: str, hint: str
) -> None:
    toml(ready, TRAIN + text)
    name = re.findall(r"sim\.(\w+)", text)[0]
    refused(
        f"'sim.{name}': no file of dataset 'sim' has the cell type '{name}'{hint}; cell types: "
        "simA, simB"
    )


def test_held_out_names_without_an_effect_are_warnings(accepted: Accepted, ready: Path) -> None:
    zeroshot = f'{TRAIN}[zeroshot]\n"sim.simA" = "test"\n[fewshot."sim.simB"]\nval = ["SIM002"]\n'
    toml(ready, zeroshot + '[fewshot."sim.simA"]\nval = ["SIM003"]\n')
    accepted('[fewshot."sim.simA"] has no effect: [zeroshot] holds out the whole cell type')
    splits = real_splits(ready)
    assert "SIM003" not in splits["val"] and "SIM003" in splits["test"]
    toml(ready, f'{TRAIN}[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = ["non-targeting"]\n')
    accepted(
        "[fewshot.\"sim.simA\"] names the control 'non-targeting', of which cell-load holds "
        "nothing out: control cells go into every split"
    )
    assert not real_splits(ready)["test"]


def test_held_out_label_that_no_file_has_is_a_warning(accepted: Accepted, ready: Path) -> None:
    toml(ready, f'{TRAIN}[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = ["SIM0004"]\n')
    accepted(
        "[fewshot] names 1 label that no file has (SIM0004 (did you mean SIM004, SIM000, "
        "SIM009?)): cell-load holds nothing out for it. Remove it"
    )


def test_held_out_labels_that_no_file_has_are_one_warning_with_and_without_a_features_file(
    accepted: Accepted, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"GENE{i}x" for i in range(7)]
    toml(
        ready,
        f'{TRAIN}[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = {json.dumps(names[:4])}\n'
        f'[fewshot."sim.simB"]\ntest = {json.dumps(names)}\n',
    )
    warning = (
        "[fewshot] names 7 labels that no file has (GENE0x, GENE1x, GENE2x, GENE3x, GENE4x, ...): "
        "cell-load holds nothing out for them. Remove them"
    )
    accepted(warning)
    files = ["--config", "config.toml", "--esm-embeddings", "table.pt", "--output-dir", "runs"]
    assert script.main([*files, "--dry-run"]) == 0
    assert capsys.readouterr().err.count("warning: [fewshot] names") == 1


def test_held_out_label_of_which_the_cell_type_has_no_cell_is_a_warning(
    accepted: Accepted, ready: Path, screen: anndata.AnnData
) -> None:
    rows = (screen.obs["target_gene"] == "SIM003") & (screen.obs["cell_type"] == "simA")
    screen[~rows.to_numpy()].copy().write_h5ad(ready / "screen.h5ad")
    toml(ready, f'{TRAIN}[fewshot."sim.simA"]\nval = ["SIM005"]\ntest = ["SIM003", "SIM004"]\n')
    done = accepted(
        '[fewshot."sim.simA"] names 1 label of which this cell type has no cell (SIM003): '
        "nothing is held out for it"
    )
    assert plan(done)["test"].split()[:2] == ["12", "1"]
    # of two cell types: one warning
    rows |= (screen.obs["target_gene"] == "SIM006") & (screen.obs["cell_type"] == "simB")
    screen[~rows.to_numpy()].copy().write_h5ad(ready / "screen.h5ad")
    with (ready / "config.toml").open("a") as f:
        f.write('[fewshot."sim.simB"]\ntest = ["SIM006"]\n')
    accepted(
        "[fewshot] names labels of which the cell type has no cell (SIM003 in sim.simA, SIM006 in "
        "sim.simB): nothing is held out for them"
    )


def test_train_lists_hold_nothing_out_and_what_is_not_read_is_named(
    accepted: Accepted, ready: Path
) -> None:
    toml(ready, f'{DATASETS}[fewshot."sim.simA"]\ntrain = ["SIM001"]\nval = ["SIM003"]\n')
    done = accepted(
        'config.toml: [fewshot."sim.simA"] train: cell-load ignores this list. Every '
        "perturbation of the cell type that val and test do not name trains",
        "1 cell type not read (sim.simB; 156 cells): [zeroshot] and [fewshot] do not name it, nor "
        '[training] the dataset. To train on it: sim = "train" under [training]',
    )
    assert plan(done)["train"].split()[:2] == ["120", "10"]
    assert sum(real_splits(ready)["train"].values()) == 120
    toml(ready, f'{TRAIN}[fewshot."sim.simA"]\ntrain = ["SIM001"]\nval = ["SIM003"]\n')
    accepted(
        'config.toml: [fewshot."sim.simA"] train: cell-load ignores this list. Every '
        "perturbation of the cell type that val and test do not name trains"
    )


def test_cells_that_are_not_read_are_counted_over_all_files(
    accepted: Accepted, ready: Path, screen: anndata.AnnData
) -> None:
    two_files(ready, screen, screen)
    text = DATASETS.replace("screen.h5ad", "{a,b}.h5ad")
    toml(ready, f'{text}[fewshot."sim.simA"]\nval = ["SIM003"]\n')
    accepted(
        "1 cell type not read (sim.simB; 312 cells): [zeroshot] and [fewshot] do not name it, nor "
        '[training] the dataset. To train on it: sim = "train" under [training]'
    )


def test_what_no_one_reads_in_the_toml_is_said_once(accepted: Accepted, ready: Path) -> None:
    toml(ready, f"{TRAIN}{HELD}[model.kwargs]\ncell_set_len = 64\n[cell_eval]\nx = 1\n")
    accepted(
        "config.toml: nothing reads [model], [cell_eval]. Settings of State stand at the end of "
        "the training's command line as KEY=VALUE, e.g. model.kwargs.cell_set_len=64"
    )
    accepted(
        "config.toml: nothing reads [model], [cell_eval]. Settings of State stand at the end of "
        "the training's command line as KEY=VALUE, e.g. model.kwargs.cell_set_len=64",
        args=("model.kwargs.cell_set_len=64",),
    )


def test_a_template_in_the_folder_of_a_dataset_is_named_with_a_path_without_it(
    refused: Refused, accepted: Accepted, ready: Path, screen: anndata.AnnData
) -> None:
    (ready / "support").mkdir()
    for name in ("ARC_H1", "hepg2"):
        screen.write_h5ad(ready / f"support/{name}.h5")
    template = screen[:20].copy()
    del template.obs["cell_type"], template.obs["batch_var"]
    template.write_h5ad(ready / "support/template.h5ad")
    toml(ready, TRAIN.replace("screen.h5ad", "support") + HELD)
    where = "support/template.h5ad has no obs column"
    others = "support/ARC_H1.h5, support/hepg2.h5 have; columns there: target_gene. Choose one"
    refused(
        f"{where} cell_type, which {others} that all have with --cell-type-key. If "
        "support/template.h5ad is not to be trained on (a template to predict, say), move it out, "
        'or give sim = "support/{ARC_H1,hepg2}.h5"',
        f"{where} batch_var, which {others} that all have with --batch-col; State does not use "
        "the batch unless you tell it to, but cell-load needs a column: any one that every file "
        "has will do",
    )
    toml(ready, TRAIN.replace("screen.h5ad", "support/{ARC_H1,hepg2}.h5") + HELD)
    accepted()


def test_categories_of_no_cell_need_no_vector_in_both_scripts(
    accepted: Accepted,
    refused: Refused,
    ready: Path,
    screen: anndata.AnnData,
    create: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = screen.obs["target_gene"].cat
    screen.obs["target_gene"] = labels.add_categories(["TERT", "", "SIMEXTRA000"])
    screen.write_h5ad(ready / "screen.h5ad")
    line = "adata.obs['target_gene'] = adata.obs['target_gene'].cat.remove_unused_categories()"
    rest = (
        "; categories of screen.h5ad). cell-load gives them zeros, which no cell uses. To be rid "
        f"of them: {line}"
    )
    old = "3 labels of no cell have no embedding in features.pt (TERT, '', SIMEXTRA000"
    accepted(old + rest)
    made = make_features(create)
    assert f"warning: 2 labels of no cell have no embedding (TERT, ''{rest}\n" in made.err
    accepted("2 labels of no cell have no embedding in features.pt (TERT, ''" + rest)
    # made by the training: the same features
    files = ["--config", "config.toml", "--esm-embeddings", "table.pt", "--output-dir", "runs"]
    capsys.readouterr()
    assert script.main([*files, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert err.count("of no cell") == 1
    assert f"warning: 2 labels of no cell have no embedding (TERT, ''{rest}\n" in err
    # what a cell has is asked for, whatever other file does not use it
    perturbed = screen.obs["target_gene"] != CONTROL
    screen.obs.loc[perturbed[perturbed].index[:2], "target_gene"] = "TERT"
    screen.write_h5ad(ready / "b.h5ad")
    toml(ready, TRAIN.replace("screen.h5ad", "{screen,b}.h5ad") + HELD)
    refused(
        "1 of 12 perturbations in b.h5ad has no embedding in features.pt (TERT); cell-load would "
        "train them as control. Make the file again with create_esm_pert_features.py --from-toml"
    )


def test_label_that_is_both_val_and_test_is_a_warning(accepted: Accepted, ready: Path) -> None:
    toml(ready, f'{TRAIN}[fewshot."sim.simA"]\nval = ["SIM003", "SIM005"]\ntest = ["SIM005"]\n')
    done = accepted(
        '[fewshot."sim.simA"] SIM005: both val and test, so best.ckpt is chosen on cells of the '
        "test. Name each once"
    )
    assert plan(done)["val"].split()[:2] == ["24", "2"]
    assert plan(done)["test"].split()[:2] == ["12", "1"]


NO_CONTROLS = "data.kwargs.should_yield_control_cells=false"


def test_part_without_perturbed_cells_is_refused_where_cell_load_crashes_on_it(
    refused: Refused, accepted: Accepted, ready: Path
) -> None:
    toml(ready, f'{TRAIN}[zeroshot]\n"sim.simA" = "val"\n')
    accepted()
    refused(
        "screen.h5ad: no perturbed cell of 'simA' is left for training, on which cell-load crashes "
        f"with {NO_CONTROLS}; leave it true",
        args=(NO_CONTROLS,),
    )
    with pytest.raises(ValueError, match="zero-size array"):
        next(iter(data_module(ready, should_yield_control_cells=False).train_dataloader()))
    next(iter(data_module(ready).train_dataloader()))


@pytest.mark.parametrize(
    "text",
    [
        TRAIN + HELD,
        f'{DATASETS}[fewshot."sim.simA"]\nval = ["SIM003"]\n',  # simB is in no split
        f'{TRAIN}[zeroshot]\n"sim.simA" = "train"\n[fewshot."sim.simB"]\nval = ["SIM003"]\n',
    ],
)
def test_perturbed_cells_alone_are_accepted_where_cell_load_can_do_it(
    accepted: Accepted, ready: Path, text: str
) -> None:
    toml(ready, text)
    unread = (
        "1 cell type not read (sim.simB; 156 cells): [zeroshot] and [fewshot] do not name it, nor "
        '[training] the dataset. To train on it: sim = "train" under [training]'
    )
    accepted(*([] if "simB" in text or "[training]" in text else [unread]), args=(NO_CONTROLS,))
    next(iter(data_module(ready, should_yield_control_cells=False).train_dataloader()))


def data_module(folder: Path, config: str = "config.toml", **settings: Any) -> Any:
    """The real cell-load data module, set up for fitting."""
    from cell_load.data_modules import PerturbationDataModule
    from cell_load.utils.data_utils import GlobalH5MetadataCache

    GlobalH5MetadataCache()._cache.clear()  # it knows files by name, whatever is in them
    module = PerturbationDataModule(
        toml_config_path=str(folder / config),
        batch_size=2,
        num_workers=0,
        pert_col="target_gene",
        batch_col="batch_var",
        cell_type_key="cell_type",
        control_pert=CONTROL,
        embed_key=None,
        output_space="all",
        perturbation_features_file=str(folder / "features.pt"),
        cell_sentence_len=4,
        **settings,
    )
    module.setup(stage="fit")
    return module


def real_splits(folder: Path, config: str = "config.toml") -> dict[str, dict[str, int]]:
    """{split: {label: perturbed cells}} as cell-load splits them."""
    module = data_module(folder, config)
    splits = {}
    for split in ("train", "val", "test"):
        tally: collections.Counter[str] = collections.Counter()
        for subset in getattr(module, f"{split}_datasets"):
            codes = subset.dataset.metadata_cache.pert_codes[subset.indices]
            tally.update(map(str, subset.dataset.pert_categories[codes]))
        splits[split] = {k: v for k, v in tally.items() if k != CONTROL}
    return splits


@pytest.mark.parametrize(
    ("held", "cells"),
    [
        ("", (264, 0, 0)),
        ('[zeroshot]\n"sim.simA" = "test"\n', (132, 0, 132)),
        ('[zeroshot]\n"sim.simA" = "val"\n"sim.simB" = "train"\n', (132, 132, 0)),
        (HELD, (240, 12, 12)),
        ('[fewshot."sim.simA"]\ntest = ["SIM000+SIM001", "SIM001"]\n', (240, 0, 24)),
        ('[fewshot."sim.simA"]\nval = ["SIM001"]\ntest = ["SIM001", "SIM002"]\n', (240, 12, 24)),
        ('[fewshot."sim.simA"]\ntrain = ["SIM001"]\nval = ["SIM002"]\n', (252, 12, 0)),
        (f'{HELD}[zeroshot]\n"sim.simB" = "val"\n', (108, 144, 12)),
        (f'{HELD}[zeroshot]\n"sim.simA" = "test"\n', (132, 0, 132)),
        (f'{HELD}[fewshot."sim.simB"]\nval = ["SIM003"]\ntest = ["SIM004"]\n', (216, 24, 24)),
        (f'{HELD}[fewshot."sim.simB"]\nval = ["SIM003", "non-targeting"]\n', (228, 24, 12)),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_splits_are_those_of_the_data_module(
    ready: Path, held: str, cells: tuple[int, int, int], trains: bool
) -> None:
    toml(ready, (TRAIN if trains else DATASETS) + held)
    found = Findings()
    stock = compose([])["data"]["kwargs"]
    data = inspect_data(Path("config.toml"), {}, stock, found)
    if trains:
        assert data is not None
        assert tuple(sum(data.splits[s].values()) for s in ("train", "val", "test")) == cells
    if held:
        assert data is not None
        assert data.splits == real_splits(ready)
    else:
        assert (data is None) == (not trains)


def test_splits_of_two_datasets_are_those_of_the_data_module(ready: Path, screen: Any) -> None:
    two_files(ready, screen, screen[::2].copy())
    toml(
        ready,
        '[datasets]\na = "a.h5ad"\nb = "b.h5ad"\n[training]\na = "train"\n'
        '[zeroshot]\n"b.simA" = "test"\n[fewshot."a.simB"]\nval = ["SIM003"]\n',
    )
    stock = compose([])["data"]["kwargs"]
    data = inspect_data(Path("config.toml"), {}, stock, Findings())
    assert data is not None
    assert data.splits == real_splits(ready)
    assert {k: sum(v.values()) for k, v in data.splits.items()} == {
        "train": 252,
        "val": 12,
        "test": 66,
    }


# --- disk space ---------------------------------------------------------------------------------


def with_free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**15, 0, free))


def test_too_little_space_for_the_checkpoints_is_refused(
    refused: Refused, accepted: Accepted, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--max-steps", 100, "--ckpt-every-n-steps", 40)
    each = checkpoint_of("state_sm", 30, 8)
    assert each is not None
    with_free_space(monkeypatch, 6 * each)
    accepted(args=args)
    with_free_space(monkeypatch, 6 * each - 1)
    refused(
        f"not enough space in {ready}: 6 checkpoints of 0.47 GB need 2.8 GB, 2.8 GB are free. Free "
        "some, choose another --output-dir, or write fewer with --ckpt-every-n-steps",
        args=args,
    )


def test_enormous_checkpoints_do_not_fit_on_the_real_disk(tmp_path: Path) -> None:
    found = Findings()
    check_disk(10**18, 0, tmp_path / "not" / "yet" / "there", 0, found)
    assert len(found.problems) == 1
    assert re.fullmatch(
        rf"not enough space in {re.escape(str(tmp_path))}: 4 checkpoints of 1000000000\.00 GB need "
        rf"4000000000\.0 GB, \d+\.\d GB are free\. Free some, choose another --output-dir, or "
        r"write fewer with --ckpt-every-n-steps",
        found.problems[0],
    )


def checkpoint_of(model: str, genes: int, pert_width: int) -> int | None:
    """Bytes of a checkpoint of a model trained on X."""
    dims = {"input_dim": genes, "gene_dim": genes, "hvg_dim": genes, "output_dim": genes}
    names = {"gene_names": [f"G{i}" for i in range(genes)], "pert_dim": pert_width, "batch_dim": 3}
    return try_model(compose([f"model={model}"]), dims | names)[1]


def test_state_sm_of_the_challenge_takes_the_size_that_was_measured() -> None:
    """162,626,484 parameters, of which 141,122,484 have Adam's two moments."""
    assert checkpoint_of("state_sm", 18_080, 5_120) == 4 * (162_626_484 + 2 * 141_122_484)


def test_space_for_another_model_than_state_is_checked_too(
    refused: Refused, accepted: Accepted, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = checkpoint_of("pseudobulk", 30, 8)
    assert each is not None
    with_free_space(monkeypatch, 4 * each)
    accepted(args=("--model", "pseudobulk"))
    with_free_space(monkeypatch, 4 * each - 1)
    refused(
        f"not enough space in {ready}: 4 checkpoints of 1.01 GB need 4.0 GB, 4.0 GB are free. Free "
        "some, choose another --output-dir, or write fewer with --ckpt-every-n-steps",
        args=("--model", "pseudobulk"),
    )


# --- loader workers -----------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, cores: int, memory: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(preflight, "available_memory", lambda: memory)


def workers_of(done: Result) -> int:
    found = re.findall(r"data\.kwargs\.num_workers=(\d+)", done.out)
    assert plan(done)["workers"] == found[0]
    return int(found[0])


def test_workers_are_chosen_from_what_the_machine_has_now(
    accepted: Accepted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rule that tests/training/test_preflight.py holds."""
    each = 4 * 30 * (312 + 4 * 16 * 256)  # all cells, and 4 batches of sets of 128 + 128
    machine(monkeypatch, 64, 20 * each)
    assert workers_of(accepted()) == 5
    machine(monkeypatch, 3, 20 * each)
    assert workers_of(accepted()) == 3


def test_number_of_workers_that_was_given_is_kept(
    accepted: Accepted, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 64, 0)
    assert workers_of(accepted(args=("--num-workers", 9))) == 9
    assert workers_of(accepted(args=("data.kwargs.num_workers=8",))) == 8


def test_available_memory_is_no_more_than_the_machine_reports() -> None:
    reported = re.findall(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert 2**20 < available_memory() < int(reported[0]) * 1024


def test_warnings_are_said_before_the_problems(train: Train, ready: Path, screen: Any) -> None:
    toml(ready, '[datasets]\nsim = "screen.h5ad"\n[training]\nsim = "train"\n')
    (ready / "features.pt").unlink()
    done = train()
    assert done.code == 1
    first, *rest = done.err.splitlines()
    assert first.startswith("warning: no validation cells: nothing is validated"), done.err
    assert rest == [f"error: no such features file: features.pt (looked in {ready})"]


def test_filled_in_vectors_are_said_again(create: Any, accepted: Accepted, ready: Path) -> None:
    table = torch.load(ready / "table.pt", weights_only=True)
    del table["SIM001"]
    torch.save(table, ready / "part.pt")
    labels = ("--from-toml", "config.toml", "--esm-embeddings", "part.pt", "--missing", "mean")
    assert create(*labels, "--output", "features.pt").code == 0
    accepted(
        "features.pt: 2 of 12 labels filled in with the mean vector, as --missing mean chose "
        "(SIM000+SIM001, SIM001)"
    )


def test_the_rest_is_checked_while_the_batch_column_is_missing(
    train: Train, ready: Path, screen: Any
) -> None:
    del screen.obs["batch_var"]
    screen.write_h5ad(ready / "screen.h5ad")
    done = train("--control-pert", "nontarget")
    problems = [x.split()[:4] for x in done.err.splitlines() if x.startswith("  - ")]
    assert [p[1:] for p in problems] == [
        ["screen.h5ad", "has", "no"],
        ["screen.h5ad:", "no", "cell"],
        ["features.pt", "was", "made"],
    ]
