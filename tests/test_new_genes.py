"""Labels added to a trained run: stock predicts them with their own vectors; all else stays."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import PATIENCE, ROOT, SMALL, Result, run_script, run_state, until
from demo_data import simulate, template, vectors
from forks import Fork
from h5ad_forms import SETTING, nullable, nullable_categories, old_categorical, plain_text
from random_esm2 import write_checkpoint
from test_train_run import FAST, FILES, TINY, make_screen, run_json

import create_esm_pert_features as script
import train_with_esm_features
from state_esm_features.console import Notes
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.embedding.gene_names import HGNC_COLUMNS, UNIPROT_COLUMN
from state_esm_features.embedding.table_content import Asked
from state_esm_features.embedding.tables import load_table
from state_esm_features.files import run_lock, sha256_of
from state_esm_features.training import undo

NEW = "SIMEXTRA000"
TABLE = ("--esm-embeddings", "table.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen, its table with genes that it lacks, a template that asks for one; never changed."""
    folder = make_screen(tmp_path_factory.mktemp("screen"), {"sim": SMALL})
    wanted = template(simulate(SMALL), ["SIM004", NEW], cells=6)
    wanted.write_h5ad(folder / "wanted.h5ad")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of two steps; never changed."""
    done = run_script(
        "train_with_esm_features",
        *FILES,
        *FAST,
        "--max-steps",
        2,
        "--name",
        "run",
        *TINY,
        cwd=folder,
    )
    assert done.code == 0, done.err
    return folder / "runs" / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, to change; the working directory is that of the screen."""
    copy = shutil.copytree(trained, tmp_path / "runs" / "run")
    monkeypatch.chdir(folder)
    return Path(copy)


@pytest.fixture
def add(run: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run create_esm_pert_features.main([... --into-run RUN ...]) in this process."""

    def call(*words: object, into: Path = run) -> Result:
        capsys.readouterr()
        try:
            code = script.main([*map(str, words), "--into-run", str(into)])
        except SystemExit as usage:
            code = int(usage.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table() -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in vectors(SMALL).items()}


# ---------------------------------------------------------------------------------------------
# What a run would predict as control
# ---------------------------------------------------------------------------------------------


def test_dry_run_names_the_labels_that_stock_would_predict_as_control(
    add: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(tmp_path)
    wanted = Path("wanted.h5ad").absolute()
    monkeypatch.chdir("/")  # the sources of the features are not needed
    assert add("--adata", wanted, "--dry-run") == Result(
        1,
        "",
        f"error: 1 of 2 labels not known to {run} ({NEW}): state tx infer would predict them as "
        "control. This command without --dry-run adds them, if its sources have all\n",
    )
    assert snapshot(tmp_path) == before


def test_dry_run_is_content_when_every_label_has_a_vector(add: Any, run: Path) -> None:
    assert add("--adata", "template.h5ad", "--dry-run") == Result(
        0, "", f"2 labels, none of which would be predicted as control by {run}\n"
    )


def without_controls(data: anndata.AnnData) -> anndata.AnnData:
    return data[data.obs["target_gene"] != "non-targeting"].copy()


def without_cell_type(data: anndata.AnnData) -> anndata.AnnData:
    del data.obs["cell_type"]
    return data


def controls_of_one_type(data: anndata.AnnData) -> anndata.AnnData:
    keep = (data.obs["target_gene"] != "non-targeting") | (data.obs["cell_type"] == "simA")
    return data[keep].copy()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            without_controls,
            1,
            "error: {} has no cell of the control 'non-targeting' in 'target_gene': state tx infer "
            "predicts from control cells, and would leave all cells as they are. Add control cells",
        ),
        (
            without_cell_type,
            0,
            "warning: {}: no obs column 'cell_type': state tx infer draws control cells of any "
            "cell type",
        ),
        (
            controls_of_one_type,
            0,
            "warning: {}: no control cell in simB: state tx infer draws them from all other cell "
            "types",
        ),
    ],
)
def test_template_without_the_controls_that_infer_predicts_from_is_named(
    add: Any, tmp_path: Path, change: Any, code: int, message: str
) -> None:
    wanted = tmp_path / "t.h5ad"
    change(anndata.read_h5ad("template.h5ad")).write_h5ad(wanted)
    done = add("--adata", wanted, "--dry-run")
    assert (done.code, done.err.splitlines()[-1]) == (code, message.format(wanted))


def test_run_on_an_embedding_is_predicted_by_the_command_that_it_prints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = anndata.read_h5ad(folder / "sim.h5ad")
    rng = np.random.default_rng(0)
    screen.obsm["X_emb"] = rng.normal(size=(screen.n_obs, 6)).astype(np.float32)
    (tmp_path / "features.pt").write_bytes((folder / "features.pt").read_bytes())
    for name, text in (("sim.h5ad", None), ("config.toml", (folder / "config.toml").read_text())):
        screen.write_h5ad(tmp_path / name) if text is None else (tmp_path / name).write_text(text)
    flags = ("--embed-key", "X_emb", "--max-steps", 2, "--name", "run")
    space = "data.kwargs.output_space=all"
    done = run_script("train_with_esm_features", *FILES, *FAST, *flags, *TINY, space, cwd=tmp_path)
    assert done.code == 0, done.err
    command = shlex.split(done.err.splitlines()[-1].removeprefix("predict"))
    assert command[-4:] == ["--embed-key", "X_emb", "--output", "prediction.h5ad"]
    into = tmp_path / "runs" / "run"

    def check(template: anndata.AnnData) -> Result:
        template.write_h5ad(tmp_path / "TEMPLATE.h5ad")
        words = ["--adata", str(tmp_path / "TEMPLATE.h5ad"), "--into-run", str(into), "--dry-run"]
        code = script.main(words)
        return Result(code, *capsys.readouterr())

    wanted = screen[screen.obs["target_gene"].isin(["non-targeting", "SIM004"])].copy()
    path = tmp_path / "TEMPLATE.h5ad"
    plain = wanted.obsm["X_emb"]
    line = "adata.obsm['X_emb'] = adata.obsm['X_emb'].toarray()"
    for value, problem in (
        (None, "has no obsm/X_emb, on which the run was trained (obsm: none). Compute it as there"),
        (
            plain[:, :5],
            "has 5 columns in obsm/X_emb, and the run was trained on 6. Compute it as there",
        ),
        (
            scipy.sparse.csr_matrix(plain),
            "has obsm/X_emb stored as csr_matrix, which state tx infer cannot take. Write it again "
            f"after {SETTING}{line}",
        ),
    ):
        del wanted.obsm["X_emb"]
        if value is not None:
            wanted.obsm["X_emb"] = value
        refused(check(wanted), f"{path} {problem}")
        wanted.obsm["X_emb"] = plain
    assert check(wanted).code == 0
    predicted = run_state(*command[1:], cwd=tmp_path)
    assert predicted.code == 0, predicted.err
    cells = anndata.read_h5ad(tmp_path / "prediction.h5ad")
    assert cells.shape == wanted.shape
    assert np.isfinite(cells.obsm["X_emb"]).all()
    assert not np.array_equal(cells.obsm["X_emb"], plain)


@pytest.mark.parametrize("store", [nullable, plain_text, nullable_categories, old_categorical])
def test_template_is_read_however_its_labels_and_names_are_stored(
    add: Any, run: Path, tmp_path: Path, store: Any
) -> None:
    """As state tx infer reads it, by anndata."""
    wanted = tmp_path / "wanted.h5ad"
    shutil.copy("wanted.h5ad", wanted)
    store(wanted, "obs/target_gene")
    for index in ("obs/_index", "var/_index"):
        nullable(wanted, index)
    assert add("--adata", wanted, "--dry-run").err == (
        f"error: 1 of 2 labels not known to {run} ({NEW}): state tx infer would predict them as "
        "control. This command without --dry-run adds them, if its sources have all\n"
    )
    done = add("--adata", wanted)
    assert (done.code, "warning" in done.err) == (0, False)
    assert add("--adata", wanted, "--dry-run").code == 0


def test_dry_run_also_names_labels_with_the_vector_of_the_control(add: Any, run: Path) -> None:
    content = load(run / "pert_onehot_map.pt")
    content["SIM004"].zero_()
    torch.save(content, run / "pert_onehot_map.pt")
    done = add("--adata", "template.h5ad", "--dry-run")
    assert (done.code, done.err) == (
        1,
        f"error: 1 label with a zero vector in {run} (SIM004): state tx infer predicts them "
        "as control, as --missing zero chose. Leave them out, or train on features that have "
        "them\n",
    )


def test_dry_run_says_what_a_label_named_like_a_control_needs(
    add: Any, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "genes.txt").write_text("SIM004\nCtrl\n")
    refused(
        add("--gene-list", tmp_path / "genes.txt", "--dry-run"),
        f"1 of 2 labels not known to {run} (Ctrl): state tx infer would predict them as control. "
        "This command without --dry-run adds them, if its sources have all (if Ctrl is the "
        "control, label its cells non-targeting instead)",
    )
    done = add("--gene-list", tmp_path / "genes.txt")
    assert done.err.endswith(
        "Ctrl: a control. Give its cells the label non-targeting, as in the run\n"
    )


def test_a_category_of_no_cell_that_stock_filled_with_zeros_is_unknown_and_can_be_added(
    folder: Path, tmp_path: Path, add: Any
) -> None:
    """cell-load gives it zeros in the map of the run, where a template with such cells finds it."""
    screen = anndata.read_h5ad(folder / "sim.h5ad")
    screen.obs["target_gene"] = screen.obs["target_gene"].cat.add_categories([NEW])
    screen.write_h5ad(tmp_path / "sim.h5ad")
    for name in ("config.toml", "features.pt", "features.pt.json", "table.pt"):
        shutil.copy(folder / name, tmp_path)
    words = (*FILES, *FAST, "--max-steps", 2, "--name", "unused", *TINY)
    done = run_script("train_with_esm_features", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"warning: 1 label of no cell has no embedding in features.pt ({NEW}; categ" in done.err
    into = tmp_path / "runs" / "unused"
    in_map = torch.load(into / "pert_onehot_map.pt", weights_only=False)  # a key is numpy's text
    assert not in_map[NEW].any()
    refused(
        add("--adata", "wanted.h5ad", "--dry-run", into=into),
        f"1 of 2 labels not known to {into} ({NEW}): state tx infer would predict them as "
        "control. This command without --dry-run adds them, if its sources have all",
    )
    unused = ("--adata", tmp_path / "sim.h5ad", "--dry-run")
    assert add(*unused, into=into).code == 0  # no cell would be predicted
    assert add("--adata", "wanted.h5ad", into=into).code == 0
    assert torch.equal(load(into / "pert_onehot_map.pt")[NEW], table()[NEW])
    assert list(load(into / "pert_features.pt"))[-1] == NEW
    assert add("--adata", "wanted.h5ad", "--dry-run", into=into).code == 0


def test_labels_of_no_cell_of_a_template_are_left_out_of_what_is_added(
    add: Any, run: Path, tmp_path: Path
) -> None:
    cells = anndata.read_h5ad("wanted.h5ad")
    cells.obs["target_gene"] = cells.obs["target_gene"].cat.add_categories(["NONESUCH"])
    cells.write_h5ad(tmp_path / "more.h5ad")
    before = load(run / "pert_onehot_map.pt")
    done = add("--adata", tmp_path / "more.h5ad")
    assert done.code == 0, done.err
    assert (
        f"warning: 1 label of no cell has no embedding (NONESUCH; categories of {tmp_path}/more"
        in (done.err)
    )
    assert list(load(run / "pert_onehot_map.pt")) == [*before, NEW]
    assert "NONESUCH" not in load(run / "pert_features.pt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            "NONE",
            "1 of 1 label has no embedding (NONE): 'NONE' is in no table. Add their proteins with "
            "--fasta, rename with --alias OLD=NEW, or accept with --missing mean",
        ),
        (
            "SIM001_g2\nSIM002_g2",
            "2 of 2 labels have no embedding (SIM001_g2, SIM002_g2). 2 of them resolve with "
            "--label-regex '(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+' (SIM001_g2 is SIM001)",
        ),
        (
            "Ctrl",
            "1 of 1 label has no embedding (Ctrl): 'Ctrl' is the name of a control, not of a gene. "
            "Ctrl: a control. Give its cells the label non-targeting, as in the run",
        ),
    ],
)
def test_advice_on_missing_labels_is_for_a_run(
    add: Any, run: Path, tmp_path: Path, labels: str, message: str
) -> None:
    """Another table, --report and --control-pert would be refused."""
    (tmp_path / "genes.txt").write_text(f"{labels}\nSIM004\n")
    refused(add("--gene-list", tmp_path / "genes.txt"), message)


def test_control_of_a_run_is_not_asked_for(
    add: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = anndata.read_h5ad("sim.h5ad")
    screen.obs["target_gene"] = screen.obs["target_gene"].cat.rename_categories(
        {"non-targeting": "NTC"}
    )
    screen.write_h5ad(tmp_path / "other.h5ad")
    (tmp_path / "c.toml").write_text(
        f'[datasets]\nd = "{tmp_path}/other.h5ad"\n[training]\nd = "train"\n'
    )
    refused(
        add("--from-toml", tmp_path / "c.toml"),
        f"{tmp_path}/other.h5ad: no cell has the control label 'non-targeting' in obs column "
        "'target_gene' (did you mean NTC?). Give its control cells that label, as in the run; "
        "labels: NTC, SIM000, SIM000+SIM001, SIM001, SIM002, ...",
    )


def unlabelled(cells: anndata.AnnData) -> anndata.AnnData:
    cells.obs.loc[cells.obs_names[:3], "target_gene"] = None
    return cells


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            unlabelled,
            "{file}: 3 cells without a label in 'target_gene': state tx infer would predict them "
            "as control. Remove them, or label them",
        ),
        (
            lambda cells: cells[:, ::-1].copy(),
            "{file} has other genes than the run, or the same in another order: state tx infer "
            "takes its columns for the run's genes. Write it again with the genes of the training "
            "data, in their order",
        ),
        (
            lambda cells: cells[:, :25].copy(),
            "{file} has 25 genes, not the 30 genes of the run: state tx infer takes its columns "
            "for the run's genes. Write it again with the genes of the training data, in their "
            "order",
        ),
    ],
)
def test_template_that_would_be_predicted_wrongly_is_named(
    add: Any, run: Path, folder: Path, tmp_path: Path, change: Any, problem: str
) -> None:
    file = tmp_path / "t.h5ad"
    change(anndata.read_h5ad(folder / "wanted.h5ad")).write_h5ad(file)
    said = f"warning: {problem.format(file=file)}"
    assert said in add("--adata", file).err.splitlines()
    refused(add("--adata", file, "--dry-run"), problem.format(file=file))


def test_batches_of_a_template_are_held_against_those_that_the_model_reads(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    words = (*FILES, *FAST, "--max-steps", 1, "--output-dir", tmp_path, "--name", "run", *TINY)
    words = (*words, "model.kwargs.batch_encoder=true")
    assert train_with_esm_features.main([str(w) for w in words]) == 0
    wanted = tmp_path / "t.h5ad"

    def check(cells: anndata.AnnData) -> Result:
        cells.write_h5ad(wanted)
        capsys.readouterr()
        flags = ("--adata", wanted, "--into-run", tmp_path / "run", "--dry-run")
        code = script.main([*map(str, flags)])
        return Result(code, *capsys.readouterr())

    cells = anndata.read_h5ad("template.h5ad")
    batches = list(cells.obs["batch_var"].cat.categories)
    assert check(cells).err.count("\n") == 1  # that nothing is wrong
    cells.obs["batch_var"] = cells.obs["batch_var"].cat.rename_categories({batches[1]: "new"})
    known = check(cells)
    assert (known.code, known.err.splitlines()[-1]) == (
        0,
        f"warning: {wanted}: 1 label of 'batch_var' not known to the run (new): state tx infer "
        f"takes the run's first batch, {batches[0]}, for it",
    )
    del cells.obs["batch_var"]
    refused(
        check(cells),
        f"{wanted} has no obs column 'batch_var', the batch that the model reads: state tx infer "
        "would end in a KeyError. Add it, with batches of the training data",
    )
    flags = ("--model-dir", tmp_path / "run", "--pert-col", "target_gene", "--adata", wanted)
    died = run_state("tx", "infer", *flags, "--output", tmp_path / "p.h5ad", cwd=tmp_path)
    assert (died.code, died.err.splitlines()[-1]) == (1, "KeyError: 'batch'")


def test_genes_of_a_template_do_not_matter_to_a_run_on_an_embedding(
    add: Any, run: Path, folder: Path, tmp_path: Path
) -> None:
    record = run_json(run)
    assert record["genes"]["number"] == 30
    (run / "run.json").write_text(json.dumps(record | {"genes": None}))  # as such a run has it
    anndata.read_h5ad(folder / "template.h5ad")[:, :25].copy().write_h5ad(tmp_path / "t.h5ad")
    assert add("--adata", tmp_path / "t.h5ad", "--dry-run").code == 0


# ---------------------------------------------------------------------------------------------
# Adding
# ---------------------------------------------------------------------------------------------


def test_labels_that_state_cannot_tell_apart_are_said(add: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("mine\nSIMEXTRA001\n")
    done = add("--gene-list", tmp_path / "genes.txt", "--alias", "mine=SIM001")
    assert done.code == 0
    assert (
        "warning: State cannot tell labels with the same vector apart: SIM001 = mine"
    ) in done.err.splitlines()
    content = load(run / "pert_onehot_map.pt")
    assert torch.equal(content["mine"], content["SIM001"])
    again = add("--gene-list", tmp_path / "genes.txt")
    assert again.err == f"up to date: {run} knows all of these labels\n"


def test_alias_of_the_run_is_that_of_its_new_combinations(
    add: Any, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "genes.txt").write_text("mine\n")
    assert add("--gene-list", tmp_path / "genes.txt", "--alias", "mine=SIMEXTRA001").code == 0
    (tmp_path / "genes.txt").write_text("mine+SIM002\n")
    assert add("--gene-list", tmp_path / "genes.txt").code == 0
    content = load(run / "pert_onehot_map.pt")
    assert torch.equal(content["mine+SIM002"], content["mine"] + content["SIM002"])
    (tmp_path / "genes.txt").write_text("mine+SIM003\n")  # another word is that of the user
    other = ("--alias", "mine=SIMEXTRA002", "--alias", "his=SIM001")
    done = add("--gene-list", tmp_path / "genes.txt", *other)
    assert (done.code, done.err.count("warning: --alias")) == (0, 1)
    assert "warning: --alias his=SIM001: no label 'his'\n" in done.err
    content = load(run / "pert_onehot_map.pt")
    expected = table()["SIMEXTRA002"] + content["SIM003"]
    assert torch.equal(content["mine+SIM003"], expected)
    (tmp_path / "genes.txt").write_text("SIMEXTRA003\n")  # needs no alias, and is told of none
    done = add("--gene-list", tmp_path / "genes.txt")
    assert (done.code, "warning" in done.err) == (0, False), done.err
    (tmp_path / "genes.txt").write_text("mine+SIM004\n")  # as in the run
    assert add("--gene-list", tmp_path / "genes.txt").code == 0
    content = load(run / "pert_onehot_map.pt")
    assert torch.equal(content["mine+SIM004"], content["mine"] + content["SIM004"])


def test_aliases_of_a_toml_are_added_to_those_of_the_run(
    add: Any, run: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "genes.txt").write_text("mine\n")
    assert add("--gene-list", tmp_path / "genes.txt", "--alias", "mine=SIMEXTRA001").code == 0
    text = (folder / "config.toml").read_text() + '[features]\nalias = ["his=SIMEXTRA002"]\n'
    (tmp_path / "c.toml").write_text(text)
    (tmp_path / "genes.txt").write_text("his+mine\n")
    done = add("--from-toml", tmp_path / "c.toml", "--gene-list", tmp_path / "genes.txt")
    assert done.code == 0, done.err
    content = load(run / "pert_onehot_map.pt")
    assert torch.equal(content["his+mine"], table()["SIMEXTRA002"] + content["mine"])


def test_labels_known_by_other_vectors_are_said(add: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("NOTHING\nSIM004\n")
    done = add("--gene-list", tmp_path / "genes.txt", "--missing", "zero")
    assert (done.code, "with a zero vector" in done.err) == (0, False)  # said as filled in
    (tmp_path / "more.txt").write_text("NEITHER\n")
    assert add("--gene-list", tmp_path / "more.txt", "--missing", "mean").code == 0
    (tmp_path / "genes.txt").write_text("NOTHING\nSIM004\nNEITHER\n")
    done = add("--gene-list", tmp_path / "genes.txt")
    assert done.err == (
        f"warning: 1 label with a zero vector in {run} (NOTHING): state tx infer predicts them as "
        "control, as --missing zero chose. Leave them out, or train on features that have them\n"
        f"warning: 1 label with the mean of other vectors in {run} (NEITHER), as --missing mean "
        "chose\n"
        f"up to date: {run} knows all of these labels\n"
    )


CHANGED = ("pert_features.pt", "pert_features.pt.json", "pert_onehot_map.pt")


def changed(run: Path) -> list[bytes]:
    """The files that an addition changes."""
    return [(run / name).read_bytes() for name in CHANGED]


def added_one(add: Any, run: Path, tmp_path: Path, gene: str) -> list[bytes]:
    """The files of a run after an addition."""
    (tmp_path / "genes.txt").write_text(f"{gene}\n")
    done = add("--gene-list", tmp_path / "genes.txt")
    assert done.code == 0, done.err
    assert gene in load(run / "pert_onehot_map.pt")
    return changed(run)


NOTHING = (
    "nothing to undo: nothing was added to {} with --into-run, or all of it was taken out again"
)


def test_undo_puts_the_run_back_to_before_the_last_addition(
    add: Any, run: Path, tmp_path: Path
) -> None:
    """Byte for byte, one addition after the other; what it took out is said."""
    whole = snapshot(run)
    before = changed(run)
    first = added_one(add, run, tmp_path, "SIMEXTRA001")
    second = added_one(add, run, tmp_path, "SIMEXTRA002")
    assert len({tuple(files) for files in (before, first, second)}) == 3
    for gene, files in (("SIMEXTRA002", first), ("SIMEXTRA001", before)):
        assert add("--undo") == Result(
            0, f"{run}/pert_onehot_map.pt\n", f"taken out 1 label of {run}: {gene}\n"
        )
        assert changed(run) == files
    refused(add("--undo"), NOTHING.format(run))
    assert snapshot(run) == whole  # nothing else was touched, and nothing is left
    assert added_one(add, run, tmp_path, "SIMEXTRA001") == first


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def killed(add: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command that is killed before its n-th file is written; false if it writes fewer."""
    real = tempfile.NamedTemporaryFile

    def call(n: int, *words: object) -> bool:
        written = []

        def temporary(*args: Any, **how: Any) -> Any:
            written.append(how)
            if len(written) > n:
                raise Killed
            return real(*args, **how)

        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "NamedTemporaryFile", temporary)
            try:
                return add(*words).code != 0
            except Killed:
                return True

    return call


@pytest.mark.parametrize("n", range(3))
def test_undo_that_was_cut_off_is_finished_by_the_next_call(
    add: Any, run: Path, tmp_path: Path, killed: Any, n: int
) -> None:
    before = changed(run)
    added_one(add, run, tmp_path, NEW)
    assert killed(n, "--undo")
    assert add("--adata", "template.h5ad", "--dry-run").code == 0  # any call
    assert changed(run) == before
    refused(add("--undo"), NOTHING.format(run))


def test_addition_that_was_cut_off_is_taken_out_whole(
    add: Any, run: Path, tmp_path: Path, killed: Any
) -> None:
    """Wherever it was cut off: at once, or after the next call has finished it."""
    before = changed(run)
    after = added_one(add, run, tmp_path, NEW)
    assert add("--undo").code == 0
    n = 0
    while killed(n, "--gene-list", tmp_path / "genes.txt"):
        undone = add("--undo")
        assert undone.code == (changed(run) == before and "nothing to undo" in undone.err)
        assert changed(run) == before
        killed(n, "--gene-list", tmp_path / "genes.txt")
        assert added_one(add, run, tmp_path, NEW) == after
        assert add("--undo").err == f"taken out 1 label of {run}: {NEW}\n"
        assert changed(run) == before
        n += 1
    assert n == 7  # four copies, features, manifest, map


def test_undo_is_refused_once_the_run_has_trained_on(add: Any, run: Path, tmp_path: Path) -> None:
    after = added_one(add, run, tmp_path, NEW)
    record = run_json(run)
    again = [*record["starts"], record["starts"][-1]]
    (run / "run.json").write_text(json.dumps(record | {"starts": again}))
    refused(
        add("--undo"),
        f"{run} has trained on since {NEW} were added: the old files are of the run as it was. "
        "Labels that you do not predict do no harm",
    )
    assert changed(run) == after


def test_undo_leaves_a_run_that_trains_alone(
    add: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo, "WAIT_SECONDS", 0.1)
    after = added_one(add, run, tmp_path, NEW)
    with run_lock(run):
        done = add("--undo")
    assert (done.code, changed(run)) == (75, after)
    assert done.err.endswith(f", is training {run}; let it finish\n")


def test_undo_of_an_earlier_version_names_its_files(add: Any, run: Path, tmp_path: Path) -> None:
    added_one(add, run, tmp_path, NEW)
    shutil.rmtree(run / "before_adding")
    refused(
        add("--undo"),
        f"nothing to undo: labels were added to {run} by an earlier version, which kept the old "
        "files as FILE.orig: copy these back by hand",
    )


def test_undo_goes_with_a_run_alone(
    add: Any, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(run)
    for words in (["--into-run", str(run), "--undo", "--dry-run"], ["--undo", "--output", "o.pt"]):
        with pytest.raises(SystemExit) as usage:
            script.main(words)
        assert usage.value.code == 2
        said = "error: --undo goes with --into-run DIR, and with nothing else but --quiet\n"
        assert capsys.readouterr().err.endswith(said)
    assert snapshot(run) == before


def test_new_labels_are_added_and_known_ones_stay_bit_identical(add: Any, run: Path) -> None:
    old_map = (run / "pert_onehot_map.pt").read_bytes()
    old = load(run / "pert_onehot_map.pt")
    trained_on = json.loads((run / "pert_features.pt.json").read_text())
    done = add("--adata", "wanted.h5ad")
    assert (done.code, done.out) == (0, f"{run}/pert_onehot_map.pt\n")
    assert done.err.splitlines() == [
        "labels    2 (1 control, 1 exact)",
        "from      wanted.h5ad (3 labels)",
        "source    table.pt (50 genes x 8)",
        f"added     1 label to {run}: {NEW}",
        f"undo      create-esm-pert-features --into-run {run} --undo",
        f"predict   state tx infer --model-dir {run} --checkpoint {run}/checkpoints/final.ckpt "
        "--pert-col target_gene --adata wanted.h5ad --output prediction.h5ad",
    ]
    for name in ("pert_onehot_map.pt", "pert_features.pt"):
        content = load(run / name)
        assert list(content) == [*old, NEW]
        assert all(torch.equal(content[label], old[label]) for label in old)
        assert torch.equal(content[NEW], table()[NEW])
    assert (run / "before_adding/1/pert_onehot_map.pt").read_bytes() == old_map
    manifest = read_manifest(run / "pert_features.pt")
    assert manifest is not None
    assert manifest["trained_features_sha256"] == trained_on["features_sha256"]
    assert manifest["sources"] == trained_on["sources"]
    assert manifest["labels"] == {
        **trained_on["labels"],
        NEW: {"how": "exact", "gene": NEW, "source": 0},
    }
    assert [(a["command"], a["labels"]) for a in manifest["added"]] == [
        (["--adata", "wanted.h5ad", "--into-run", str(run)], [NEW])
    ]
    assert add("--adata", "wanted.h5ad", "--dry-run").code == 0
    before = snapshot(run)
    again = add("--adata", "wanted.h5ad")
    assert again.err == f"up to date: {run} knows all of these labels\n"
    assert (again.code, snapshot(run)) == (0, before)


def test_prediction_of_an_added_gene_is_that_of_a_map_that_always_had_it(
    add: Any, run: Path, folder: Path, tmp_path: Path
) -> None:
    def infer(run_dir: Path) -> np.ndarray:
        output = tmp_path / "prediction.h5ad"
        done = run_state(
            *("tx", "infer", "--model-dir", run_dir, "--pert-col", "target_gene"),
            *("--adata", folder / "wanted.h5ad", "--output", output, "--quiet"),
            cwd=tmp_path,
        )
        assert done.code == 0, done.err
        predicted = anndata.read_h5ad(output)
        return np.asarray(predicted[predicted.obs["target_gene"] == NEW].X)

    as_control = infer(run)
    always = Path(shutil.copytree(run, tmp_path / "always"))
    (tmp_path / "genes.txt").write_text(f"{NEW}\n")
    done = run_script(
        "create_esm_pert_features",
        *("--from-toml", "config.toml", "--gene-list", tmp_path / "genes.txt", *TABLE),
        *("--output", always / "pert_onehot_map.pt"),
        cwd=folder,
    )
    assert done.code == 0, done.err
    assert NEW not in load(run / "pert_onehot_map.pt") and NEW in load(
        always / "pert_onehot_map.pt"
    )
    assert add("--adata", "wanted.h5ad").code == 0
    added = infer(run)
    assert np.array_equal(added, infer(always))
    assert not np.allclose(added.mean(0), as_control.mean(0), atol=1e-4)


def test_resumed_run_keeps_what_was_added(add: Any, run: Path, folder: Path) -> None:
    assert add("--adata", "wanted.h5ad").code == 0
    kept = snapshot(run)
    words = (*FILES, *FAST, "--output-dir", run.parent, "--name", "run", "--resume", *TINY)
    done = run_script("train_with_esm_features", *words, "--max-steps", 3, cwd=folder)
    assert done.code == 0, done.err
    assert "added with --into-run" not in done.err
    assert (run_json(run)["status"], run_json(run)["steps"]) == ("finished", 3)
    for name in ("pert_features.pt", "pert_features.pt.json"):
        assert (run / name).read_bytes() == kept[str(run / name)]
    content = load(run / "pert_onehot_map.pt")
    assert torch.equal(content[NEW], table()[NEW])
    again = run_script("train_with_esm_features", *words, "--max-steps", 3, cwd=folder)
    assert (again.code, again.err.splitlines()[-1]) == (
        0,
        f"up to date: {run} finished with the same inputs",
    )
    predicted = run_state("tx", "predict", "--output-dir", run, "--predict-only", cwd=folder)
    assert predicted.code == 0, predicted.err[-2000:]


def test_features_that_make_way_take_added_labels_with_them_and_that_is_said(
    add: Any, run: Path, folder: Path
) -> None:
    assert add("--adata", "wanted.h5ad").code == 0
    words = (*FILES, *FAST, "--output-dir", run.parent, "--name", "run", "--overwrite", *TINY)
    done = run_script("train_with_esm_features", *words, "--max-steps", 1, cwd=folder)
    assert done.code == 0, done.err
    assert (
        f"warning: 1 label added with --into-run ({NEW}) will not be in the new features: add them "
        "again after the training"
    ) in done.err.splitlines()
    assert NEW not in load(run / "pert_onehot_map.pt")


def test_run_that_was_cut_off_between_its_two_files_is_mended(add: Any, run: Path) -> None:
    old = (run / "pert_onehot_map.pt").read_bytes()
    assert add("--adata", "wanted.h5ad").code == 0
    whole = load(run / "pert_onehot_map.pt")
    (run / "pert_onehot_map.pt").write_bytes(old)
    assert add("--adata", "wanted.h5ad", "--dry-run").code == 1
    assert (
        add("--adata", "wanted.h5ad").err.splitlines()[-3] == f"added     1 label to {run}: {NEW}"
    )
    assert load(run / "pert_onehot_map.pt").keys() == whole.keys()


def test_missing_mean_is_over_the_genes_of_the_run_and_the_new_ones(
    add: Any, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "genes.txt").write_text(f"{NEW}\nNOSUCHGENE\n")
    assert add("--gene-list", tmp_path / "genes.txt", "--missing", "mean").code == 0
    genes = [*SMALL.symbols, NEW]
    mean = torch.stack([table()[g] for g in sorted(genes)]).double().mean(0).float()
    assert torch.allclose(load(run / "pert_onehot_map.pt")["NOSUCHGENE"], mean, atol=1e-6)
    manifest = json.loads((run / "pert_features.pt.json").read_text())
    assert manifest["missing"] == {"NOSUCHGENE": "'NOSUCHGENE' is in no table"}
    assert manifest["labels"]["NOSUCHGENE"] == {"how": "mean"}
    assert add("--gene-list", tmp_path / "genes.txt", "--dry-run").err == (
        f"2 labels, none of which would be predicted as control by {run}\n"
        f"warning: 1 label with the mean of other vectors in {run} (NOSUCHGENE), as --missing mean "
        "chose\n"
    )
    (tmp_path / "genes.txt").write_text("NOSUCHGENE2\n")  # alone
    assert add("--gene-list", tmp_path / "genes.txt", "--missing", "mean").code == 0
    assert torch.allclose(load(run / "pert_onehot_map.pt")["NOSUCHGENE2"], mean, atol=1e-6)


def test_missing_label_is_refused_and_nothing_is_written(
    add: Any, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "genes.txt").write_text(f"{NEW}\nNOSUCHGENE\n")
    before = snapshot(run)
    done = add("--gene-list", tmp_path / "genes.txt")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "error: 1 of 2 labels has no embedding (NOSUCHGENE): 'NOSUCHGENE' is in no table. Add "
        "their proteins with --fasta, rename with --alias OLD=NEW, or accept with --missing mean\n"
    )
    assert snapshot(run) == before


def test_sources_are_found_from_another_folder(
    add: Any, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert add("--adata", folder / "wanted.h5ad").code == 0
    assert torch.equal(load(run / "pert_onehot_map.pt")[NEW], table()[NEW])


# ---------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------


def refused(done: Result, message: str) -> None:
    assert done == Result(1, "", f"error: {message}\n")


def test_sources_that_are_gone_are_named(
    add: Any, run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_json(run)
    for start in record["starts"]:
        start["folder"] = "/"
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    refused(
        add("--adata", folder / "wanted.h5ad"),
        f"the features of {run} were made of table.pt, which is not there (looked in {tmp_path}); "
        "say where it is with --esm-embeddings FILE",
    )
    moved = ("--esm-embeddings", folder / "table.pt")
    assert add("--adata", folder / "wanted.h5ad", *moved).code == 0
    manifest = json.loads((run / "pert_features.pt.json").read_text())
    assert [s["path"] for s in manifest["sources"]] == ["table.pt", str(folder / "table.pt")]
    assert manifest["labels"][NEW]["source"] == 1
    monkeypatch.chdir(folder)  # where the table is as it was named first
    (tmp_path / "genes.txt").write_text("SIMEXTRA001\n")
    assert add("--gene-list", tmp_path / "genes.txt").code == 0


def test_other_sums_of_combinations_are_refused(add: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text(f"{NEW}+SIM000\n")
    refused(
        add("--gene-list", tmp_path / "genes.txt", "--combine", "mean"),
        f"{run} was trained on combinations by --combine sum; leave the option out",
    )
    assert add("--gene-list", tmp_path / "genes.txt").code == 0
    both = table()[NEW] + table()["SIM000"]
    assert torch.equal(load(run / "pert_onehot_map.pt")[f"{NEW}+SIM000"], both)


@pytest.fixture(scope="module")
def trained_scaled(folder: Path) -> Path:
    """A run of two steps on standardised vectors; never changed."""
    words = ["--config", "config.toml", *TABLE, "--scale", "standard", *FAST, "--max-steps", 2]
    done = run_script("train_with_esm_features", *words, "--name", "scaled", *TINY, cwd=folder)
    assert done.code == 0, done.err
    return folder / "runs" / "scaled"


def test_new_labels_are_scaled_by_the_statistics_that_the_run_keeps(
    add: Any, run: Path, trained_scaled: Path, tmp_path: Path
) -> None:
    scaled = Path(shutil.copytree(trained_scaled, tmp_path / "runs" / "scaled"))
    rows = torch.stack(list(table().values())).double()
    own = (table()[NEW] - rows.mean(0)) / rows.std(0, correction=0)
    known = load(scaled / "pert_onehot_map.pt")
    mean = torch.stack([known[s] for s in SMALL.symbols]).mean(0)
    assert mean.abs().max() < 1  # of some genes of the table only
    refused(
        add("--adata", "wanted.h5ad", "--scale", "none", into=scaled),
        f"{scaled} was trained on vectors of --scale standard; leave the option out",
    )
    refused(
        add("--adata", "wanted.h5ad", "--scale", "center"),
        f"{run} was trained on vectors of --scale none; leave the option out",
    )
    assert add("--adata", "wanted.h5ad", into=scaled).code == 0
    torch.testing.assert_close(load(scaled / "pert_onehot_map.pt")[NEW], own.float())
    path = scaled / "pert_features.pt.json"
    content = json.loads(path.read_text())
    content["scaling"]["mean"] = [x - 1 for x in content["scaling"]["mean"]]  # to see it is read
    path.write_text(json.dumps(content))
    (tmp_path / "genes.txt").write_text("SIMEXTRA001\n")
    assert add("--gene-list", tmp_path / "genes.txt", into=scaled).code == 0
    moved = (table()["SIMEXTRA001"] - rows.mean(0) + 1) / rows.std(0, correction=0)
    torch.testing.assert_close(load(scaled / "pert_onehot_map.pt")["SIMEXTRA001"], moved.float())
    assert json.loads(path.read_text())["scaling"] == content["scaling"]


def test_another_table_or_width_is_refused(add: Any, run: Path, tmp_path: Path) -> None:
    before = snapshot(run)
    other = {k: v + 1 for k, v in table().items()}
    torch.save(other, tmp_path / "other.pt")
    torch.save({k: torch.cat([v, v]) for k, v in table().items()}, tmp_path / "wide.pt")
    hashes = [sha256_of(p)[:12] for p in (tmp_path / "other.pt", Path("table.pt"))]
    refused(
        add("--adata", "wanted.h5ad", "--esm-embeddings", tmp_path / "other.pt"),
        f"{tmp_path}/other.pt (sha256 {hashes[0]}...) is not what the features of {run} were made "
        f"of (table.pt, sha256 {hashes[1]}...): vectors of another model would mean nothing to it. "
        "Give that file with --esm-embeddings",
    )
    refused(
        add("--adata", "wanted.h5ad", "--esm-embeddings", tmp_path / "wide.pt"),
        f"{run} was trained on vectors of 8 values, these have 16; name the table or --esm-model "
        "that its features were made with",
    )
    assert snapshot(run) == before


def test_a_folder_is_asked_for_again_by_its_contents_and_its_layer(
    add: Any, run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "extracted"
    path.mkdir()
    for gene, vector in table().items():
        means = {6: vector + 1, 33: vector}
        torch.save({"label": gene, "mean_representations": means}, path / f"{gene}.pt")
    source = load_table(path, Notes()).record()
    assert source["layer"] == 33
    manifest_path = run / "pert_features.pt.json"
    manifest = json.loads(manifest_path.read_text()) | {"sources": [source]}
    manifest_path.write_text(json.dumps(manifest))
    before = snapshot(run)
    refused(
        add("--adata", "wanted.h5ad", "--layer", 6),
        f"{run} was trained on layer 33 of {path}, not on layer 6; leave --layer and --table-key "
        "out",
    )
    changed = shutil.copytree(path, tmp_path / "changed")
    torch.save(table()[NEW], tmp_path / "changed" / f"{NEW}.pt")
    torch.save({"label": NEW, "mean_representations": {33: table()[NEW]}}, changed / "new.pt")
    (changed / f"{NEW}.pt").unlink()
    hashes = [load_table(p, Notes(), Asked(33)).sha256[:12] for p in (changed, path)]
    refused(
        add("--adata", "wanted.h5ad", "--esm-embeddings", changed),
        f"{changed} (sha256 {hashes[0]}...) is not what the features of {run} were made of "
        f"({path}, sha256 {hashes[1]}...): vectors of another model would mean nothing to it. Give "
        "that file with --esm-embeddings",
    )
    assert snapshot(run) == before
    assert add("--adata", "wanted.h5ad").code == 0
    assert torch.equal(load(run / "pert_onehot_map.pt")[NEW], table()[NEW])
    assert json.loads(manifest_path.read_text())["sources"] == [source]


def made_of_proteins(run: Path, folder: Path, *options: str) -> None:
    """Say that a run's features were made of a table that is keyed by accessions, and of `options`
    that name their genes, all in `folder`."""
    accessions = {gene: f"P{i:05d}" for i, gene in enumerate(table())}
    proteins = {accessions[gene]: vector for gene, vector in table().items()}
    pairs = [f"{accession}\t{gene}\n" for gene, accession in accessions.items()]
    torch.save(proteins, folder / "proteins.pt")
    (folder / "aliases.tsv").write_text("".join(pairs))
    (folder / "p.fasta").write_text(
        "".join(f">sp|{x}|X_HUMAN GN={gene} PE=1\nMKT\n" for gene, x in accessions.items())
    )
    columns = [*HGNC_COLUMNS, UNIPROT_COLUMN]
    rows = (["HGNC:1", gene, *[""] * 5, x] for gene, x in accessions.items())
    (folder / "hgnc.txt").write_text("".join("\t".join(row) + "\n" for row in (columns, *rows)))
    made = folder / "made.pt"
    words = ["--from-toml", "config.toml", "--esm-embeddings", str(folder / "proteins.pt")]
    named = [str(folder / word) if "." in word else word for word in options]
    if options == ("--alias",):
        named = [word for gene, x in accessions.items() for word in ("--alias", f"{x}={gene}")]
    assert script.main([*words, *named, "--output", str(made), "--quiet"]) == 0
    assert made.read_bytes() == (run / "pert_features.pt").read_bytes()
    shutil.copy(f"{made}.json", run / "pert_features.pt.json")


@pytest.mark.parametrize(
    "options",
    [("--fasta", "p.fasta"), ("--hgnc", "hgnc.txt"), ("--aliases", "aliases.tsv"), ("--alias",)],
)
def test_what_named_the_keys_of_a_table_is_remembered(
    add: Any, run: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    made_of_proteins(run, tmp_path, *options)
    sources = read_manifest(run / "pert_features.pt")["sources"]  # type: ignore[index]
    assert sources[0]["keys"] == "UniProt accessions"
    done = add("--adata", "wanted.h5ad")
    assert done.code == 0 and "warning" not in done.err, done.err
    assert torch.equal(load(run / "pert_onehot_map.pt")[NEW], table()[NEW])
    manifest = read_manifest(run / "pert_features.pt")
    assert manifest is not None and manifest["sources"] == sources
    assert manifest["labels"][NEW]["gene"] == NEW


@pytest.mark.parametrize("option", ["--hgnc", "--aliases", "--fasta"])
def test_what_named_the_keys_of_a_table_is_named_if_it_is_gone(
    add: Any, run: Path, tmp_path: Path, option: str
) -> None:
    name = {"--hgnc": "hgnc.txt", "--aliases": "aliases.tsv", "--fasta": "p.fasta"}[option]
    made_of_proteins(run, tmp_path, option, name)
    (tmp_path / name).rename(tmp_path / "moved")
    refused(
        add("--adata", "wanted.h5ad"),
        f"the features of {run} were made of {tmp_path / name}, which is not there (looked in "
        f"{Path.cwd()}); say where it is with {option} FILE",
    )
    assert add("--adata", "wanted.h5ad", option, tmp_path / "moved").code == 0
    assert torch.equal(load(run / "pert_onehot_map.pt")[NEW], table()[NEW])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ablation": {"kind": "shuffle", "seed": 1}},
            "{run} was trained on an ablation (shuffle): a new gene has no vector there. Add genes "
            "to a run on real features",
        ),
        (
            {"features_sha256": "of another file"},
            "nothing tells which table or model the vectors of {run}/pert_features.pt come from: "
            "it has no manifest of create_esm_pert_features.py. Train on a file that has one",
        ),
    ],
)
def test_features_that_are_not_real_or_of_unknown_origin_are_refused(
    add: Any, run: Path, change: dict[str, Any], message: str
) -> None:
    path = run / "pert_features.pt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = message.format(run=run)
    refused(add("--adata", "wanted.h5ad"), message)
    refused(
        add("--adata", "wanted.h5ad", "--dry-run"),
        f"1 of 2 labels not known to {run} ({NEW}): state tx infer would predict them as control. "
        + message,
    )


def test_what_is_no_trained_run_is_refused(add: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    refused(
        add("--adata", "wanted.h5ad", into=nowhere),
        f"--into-run {nowhere} is no folder (looked in {Path.cwd()})",
    )
    refused(
        add("--adata", "wanted.h5ad", "--dry-run", into=empty),
        f"{empty} is no run of train_with_esm_features.py: it has no run.json",
    )
    (run / "pert_onehot_map.pt").unlink()
    refused(
        add("--adata", "wanted.h5ad"),
        f"{run} has no pert_onehot_map.pt: its training has not begun",
    )
    refused(
        add("--adata", "wanted.h5ad", "--control-pert", "NTC", into=tmp_path / "runs" / "run"),
        f"{run} has no pert_onehot_map.pt: its training has not begun",
    )


def test_another_control_is_refused(add: Any) -> None:
    refused(
        add("--adata", "wanted.h5ad", "--control-pert", "NTC"),
        "--control-pert NTC: the run's control is non-targeting; give the control cells that label",
    )


def test_a_run_alone_names_no_labels(add: Any) -> None:
    done = add()
    assert done.code == 2
    assert done.err.endswith("error: no labels: give --from-toml, --gene-list or --adata\n")


@pytest.mark.parametrize(
    "words",
    [("--output", "o.pt"), ("--ablation", "shuffle"), ("--report", "r.tsv"), ("--all-genes",)],
)
def test_options_that_mean_nothing_for_a_run_are_refused(add: Any, words: tuple[str, ...]) -> None:
    done = add("--adata", "wanted.h5ad", *words)
    assert done.code == 2
    assert done.err.endswith(f"error: {words[0]} does not go with --into-run\n")


# ---------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def protein(seed: int) -> str:
    return "M" + "".join(np.random.default_rng(seed).choice(list(RESIDUES), 30))


@pytest.fixture(scope="module")
def of_sequences(folder: Path) -> Path:
    """A run whose features were computed from proteins; never changed."""
    (folder / "p.fasta").write_text(
        "".join(f">{s}\n{protein(i)}\n" for i, s in enumerate(SMALL.symbols))
    )
    (folder / "new.fasta").write_text(f">{NEW}\n{protein(99)}\n")
    write_checkpoint(folder / "m.pt")
    write_checkpoint(folder / "m2.pt", seed=1)
    words = ("--config", "config.toml", "--fasta", "p.fasta", "--esm-model", "m.pt", "--no-cache")
    done = run_script(
        "train_with_esm_features",
        *(*words, "--device", "cpu", *FAST, "--max-steps", 1, "--name", "esm", *TINY),
        cwd=folder,
    )
    assert done.code == 0, done.err
    return folder / "runs" / "esm"


def test_new_gene_is_computed_by_the_model_of_the_run(
    add: Any, of_sequences: Path, run: Path, tmp_path: Path, folder: Path
) -> None:
    esm = Path(shutil.copytree(of_sequences, tmp_path / "esm"))
    new = ("--adata", "wanted.h5ad", "--fasta", "new.fasta", "--no-cache", "--device", "cpu")
    before = snapshot(esm)
    for other, changed in (
        (("--esm-model", "m2.pt"), "weights_sha256 {} -> {}"),
        (("--layer", 1), "layer 2 -> 1"),
        (("--precision", "bfloat16"), "precision float32 -> bfloat16"),
    ):
        hashes = [f"{sha256_of(folder / name)[:12]}..." for name in ("m.pt", "m2.pt")]
        refused(
            add(*new, *other, into=esm),
            f"the features of {esm} were computed otherwise ({changed.format(*hashes)}): vectors "
            "of another model would mean nothing to it. Leave the options of the model out",
        )
    assert snapshot(esm) == before
    done = add(*new, into=esm)
    assert done.code == 0, done.err
    words = ("--all-genes", "--fasta", "new.fasta", "--esm-model", "m.pt", "--no-cache")
    words += ("--device", "cpu", "--output", str(tmp_path / "alone.pt"))
    assert run_script("create_esm_pert_features", *words, cwd=folder).code == 0
    assert torch.equal(load(esm / "pert_onehot_map.pt")[NEW], load(tmp_path / "alone.pt")[NEW])
    assert "earlier version" not in done.err


def test_a_run_of_an_earlier_version_goes_on_and_says_so_once(
    add: Any, of_sequences: Path, tmp_path: Path
) -> None:
    """Manifests of before do not name the encoder."""
    esm = Path(shutil.copytree(of_sequences, tmp_path / "esm"))
    path = esm / "pert_features.pt.json"
    manifest = json.loads(path.read_text())
    for source in manifest["sources"]:
        assert source.pop("encoder") == "transformers.EsmModel"
    path.write_text(json.dumps(manifest))
    known = load(esm / "pert_features.pt")
    (tmp_path / "other.fasta").write_text(f">SIMOTHER\n{protein(98)}\n")
    (tmp_path / "other.txt").write_text("SIMOTHER\n")
    warned = []
    for words in (
        ("--adata", "wanted.h5ad", "--fasta", "new.fasta"),
        ("--gene-list", tmp_path / "other.txt", "--fasta", tmp_path / "other.fasta"),
    ):
        done = add(*words, "--no-cache", "--device", "cpu", into=esm)
        assert done.code == 0, done.err
        warned += [line for line in done.err.splitlines() if "earlier version" in line]
    assert warned == [
        f"warning: the features of {esm} were computed by an earlier version; the new ones may "
        "differ from these by up to 1e-4"
    ]
    features = load(esm / "pert_features.pt")
    assert features.keys() == known.keys() | {NEW, "SIMOTHER"}
    assert all(torch.equal(features[label], known[label]) for label in known)


# ---------------------------------------------------------------------------------------------
# At the same time
# ---------------------------------------------------------------------------------------------


# Only how long it waits is another than the script's: however long the others take to begin.
PATIENTLY = (
    "from state_esm_features.training import undo\n"
    f"undo.WAIT_SECONDS = {PATIENCE}\n"
    "sys.exit(create_esm_pert_features.main(sys.argv[1:]))"
)


def test_several_processes_add_to_one_run(run: Path, tmp_path: Path) -> None:
    """All of them have their vectors and wait for the run, which is let go when they do."""
    assert undo.WAIT_SECONDS == 60
    waits = f"waiting for at most {PATIENCE} s: process {os.getpid()} on {platform.node()}, since "
    ours = [f"SIMEXTRA00{i}" for i in range(4)]
    processes = []
    with run_lock(run, "testing"):
        for gene in ours:
            (tmp_path / f"{gene}.txt").write_text(f"{gene}\nSIMEXTRA009\n")
            words = ("-c", "--gene-list", tmp_path / f"{gene}.txt", "--into-run", run)
            processes.append(Fork(PATIENTLY, words, Path.cwd(), err=tmp_path / f"{gene}.err"))
        for gene, process in zip(ours, processes, strict=True):
            said = tmp_path / f"{gene}.err"
            until(lambda said=said: waits in said.read_text(), process, said)
            assert "source" in said.read_text()
        assert all(p.poll() is None for p in processes)
    assert [p.wait(PATIENCE) for p in processes] == [0, 0, 0, 0]
    for gene in ours:
        said = (tmp_path / f"{gene}.err").read_text()
        assert f" is testing {run}; let it finish\n" in said
    for name in ("pert_onehot_map.pt", "pert_features.pt"):
        content = load(run / name)
        assert {*ours, "SIMEXTRA009"} == content.keys() - {*SMALL.symbols} - {
            SMALL.combination,
            "non-targeting",
        }
        assert all(torch.equal(content[g], table()[g]) for g in ours)
    manifest = read_manifest(run / "pert_features.pt")
    assert manifest is not None
    added = [label for a in manifest["added"] for label in a["labels"]]
    assert sorted(added) == [*ours, "SIMEXTRA009"]


def test_run_that_trains_is_left_alone(
    add: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo, "WAIT_SECONDS", 0.1)
    before = snapshot(run)
    with run_lock(run):
        done = add("--adata", "wanted.h5ad")
    assert done.code == 75
    assert done.err.splitlines()[-1].startswith("error: process ")
    assert done.err.endswith(f", is training {run}; let it finish\n")
    assert snapshot(run) == before


# ---------------------------------------------------------------------------------------------
# The whole way
# ---------------------------------------------------------------------------------------------


def readme_commands() -> list[list[str]]:
    """The commands of README's challenge section, as typed."""
    section = (ROOT / "README.md").read_text().split("## The Virtual Cell Challenge")[1]
    block = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines()]


def test_challenge_path_of_the_readme_runs_as_typed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small screen under the challenge's names: only its size has to be said."""
    place = tmp_path / "competition_support_set"
    place.mkdir()
    for name in ("competition_train", "k562"):
        shutil.copy(folder / "sim.h5ad", place / f"{name}.h5")
    shutil.copy(folder / "wanted.h5ad", place / "competition_val_template.h5ad")
    (place / "gene_names.csv").write_text("\n".join(simulate(SMALL).var_names) + "\n")
    (place / "starter.toml").write_text(
        '[datasets]\nh1 = "competition_support_set/{competition_train,k562}.h5"\n'
        '[training]\nh1 = "train"\n[zeroshot]\n"h1.simB" = "test"\n'
    )
    more = {
        "create --from-toml": ("--esm-embeddings", folder / "table.pt"),
        "train --config": ("--max-steps", 2, *FAST, *TINY),
        "cell-eval prep": ("--expected-gene-dim", SMALL.genes),
    }
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in readme_commands():
        ours = words[0].endswith("-features")
        name = f"{words[0].split('-')[0] if ours else words[0]} {words[1]}"
        rest = [*words[1:], *map(str, more.get(name, ()))]
        if ours:
            done = run_script(words[0].replace("-", "_"), *rest, cwd=tmp_path)
        elif words[0] == "state":
            done = run_state(*rest, cwd=tmp_path)
        else:
            command = [Path(sys.executable).with_name(words[0]), *rest]
            ended = subprocess.run(command, capture_output=True, text=True)
            done = Result(ended.returncode, ended.stdout, ended.stderr)
        assert done.code == 0, (words, done.err)
        ran.append(name)
        if words[0] == "state":
            assert "not in mapping" not in done.out
    assert ran == [
        *(
            "create --from-toml",
            "train --config",
            "create --into-run",
            "state tx",
            "cell-eval prep",
        ),
    ]
    features = torch.load(place / "ESM2_pert_features.pt", weights_only=True)
    known = torch.load("competition/first_run/pert_onehot_map.pt", weights_only=True)
    assert set(known) - set(features) == {NEW}
    predicted = anndata.read_h5ad("competition/prediction.h5ad")
    assert set(predicted.obs["target_gene"]) == {"SIM004", NEW, "non-targeting"}
    assert (tmp_path / "competition/prediction.prep.vcc").stat().st_size > 0
