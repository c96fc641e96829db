"""Which labels create_esm_pert_features.py finds: those that cell-load finds, and no others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from cell_load.data_modules import PerturbationDataModule
from conftest import PATIENCE, ROOT, Result, run_script
from h5ad_forms import CONTROL, TREE, write_screen
from test_experiment import PATH_FORMS

from state_esm_features.console import Notes
from state_esm_features.experiment import (
    find_data_files,
    load_experiment,
    unread_parts,
)
from state_esm_features.option_groups import PERT_COLUMNS

Create = Callable[..., Result]
TABLE = ("--esm-embeddings", "table.pt")


def write_table(path: Path, genes: Iterable[str]) -> None:
    torch.save({g: torch.full((3,), i + 1.0) for i, g in enumerate(genes)}, path)


def labels_in(path: Path) -> list[str]:
    return list(torch.load(path, weights_only=True))


def toml(path: Path, *datasets: str, more: str = "") -> Path:
    """A TOML that trains on every one of `datasets`."""
    paths = "".join(f"set{i} = {d!r}\n" for i, d in enumerate(datasets))
    train = "".join(f'set{i} = "train"\n' for i in range(len(datasets)))
    path.write_text(f"[datasets]\n{paths}[training]\n{train}{more}")
    return path


# --- files of a TOML ---------------------------------------------------------------------------


# --- labels of a TOML --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["relative", "absolute"])
@pytest.mark.parametrize(
    "path", [p for p, names in PATH_FORMS.items() if names and names != ["notes.txt"]]
)
def test_labels_of_every_path_form_are_the_perturbations_of_cell_load(
    tree: Path, create: Create, path: str, where: str
) -> None:
    config = toml(tree / "c.toml", path if where == "relative" else f"{tree}/{path}")
    write_table(tree / "table.pt", [f"GENE_{name}" for name in TREE])
    done = create("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert (done.code, done.out) == (0, "o.pt\n")
    names = [name.replace("sub/../", "") for name in PATH_FORMS[path]]
    assert set(labels_in(tree / "o.pt")) == {CONTROL, *(f"GENE_{name}" for name in names)}
    module = PerturbationDataModule(str(config), pert_col="target_gene", batch_col="batch_var")
    assert set(labels_in(tree / "o.pt")) == set(module.pert_onehot_map)


def test_labels_of_several_datasets_are_the_perturbations_of_cell_load(
    project: Path, create: Create, screen: anndata.AnnData
) -> None:
    write_screen(project / "more/one.h5", ["SIM000", "SIMEXTRA001"], unused=["SIMEXTRA002"])
    write_screen(project / "more/two.h5ad", ["SIMEXTRA003"])
    write_screen(project / "unread.h5ad", ["SIMEXTRA004"])
    config = project / "several.toml"
    config.write_text(
        '[datasets]\nsim = "screen.h5ad"\nmore = "more/{one,two}.{h5,h5ad}"\n'
        'unread = "unread.h5ad"\n[training]\nsim = "train"\n[zeroshot]\n"more.c" = "test"\n'
        '[fewshot."sim.simA"]\nval = ["SIM003"]\n'
    )
    done = create(
        *("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt", "--quiet")
    )
    assert done == Result(
        0,
        "o.pt\n",
        "warning: dataset 'more': more/one.h5ad matches no file; cell-load goes on without it\n"
        "warning: dataset 'more': more/two.h5 matches no file; cell-load goes on without it\n"
        "warning: dataset 'unread' is in [datasets] but not in [training], [zeroshot] or "
        "[fewshot]: not read\n",
    )
    module = PerturbationDataModule(str(config), pert_col="target_gene", batch_col="batch_var")
    written = labels_in(project / "o.pt")
    assert set(written) == set(module.pert_onehot_map) and len(written) == len(set(written))
    in_screen = list(screen.obs["target_gene"].cat.categories)
    assert written == [*in_screen, "SIMEXTRA001", "SIMEXTRA002", "SIMEXTRA003"]


def test_unused_categories_are_labels(tree: Path, create: Create) -> None:
    write_screen(tree / "s.h5ad", ["A"], unused=["NEVER"])
    write_table(tree / "table.pt", ["A", "NEVER"])
    config = toml(tree / "c.toml", "s.h5ad")
    assert create(
        "--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt"
    ) == Result(
        0,
        "o.pt\n",
        "labels    3 (1 control, 2 exact)\n"
        "from      s.h5ad (3 labels)\n"
        f"from      {config} (0 labels)\n"
        "source    table.pt (2 genes x 3)\n",
    )
    assert labels_in(tree / "o.pt") == ["A", CONTROL, "NEVER"]


def test_of_two_files_of_one_stem_the_one_that_cell_load_drops_is_named(
    tree: Path, create: Create
) -> None:
    write_table(tree / "table.pt", ["GENE_a.h5", "GENE_sub/a.h5ad"])
    config = toml(tree / "c.toml", "data/{a.h5,sub/a.h5ad}")
    done = create(
        *("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt", "--quiet")
    )
    assert done == Result(
        0,
        "o.pt\n",
        "warning: dataset 'set0': cell-load keeps one file per name and does not read "
        "data/a.h5; rename it\n",
    )
    assert labels_in(tree / "o.pt") == ["GENE_sub/a.h5ad", CONTROL]


def test_a_brace_branch_without_a_match_is_named(tree: Path, create: Create) -> None:
    write_table(tree / "table.pt", ["GENE_b.h5ad"])
    config = toml(tree / "c.toml", "data/{b,nowhere}.h5ad")
    done = create(
        *("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt", "--quiet")
    )
    assert done.err == (
        "warning: dataset 'set0': data/nowhere.h5ad matches no file; cell-load goes on without it\n"
    )
    assert (done.code, labels_in(tree / "o.pt")) == (0, ["GENE_b.h5ad", CONTROL])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["SIM0003"], "1 label that no file has (SIM0003 (did you mean SIM003, SIM000, SIM009?))"),
        (["zzzzz"], "1 label that no file has (zzzzz)"),
        (
            [f"z{i}" * 3 for i in range(7)],
            "7 labels that no file has (z0z0z0, z1z1z1, z2z2z2, z3z3z3, z4z4z4, ...)",
        ),
    ],
)
def test_few_shot_labels_that_no_file_has_are_one_warning_and_need_no_vector(
    project: Path, create: Create, names: list[str], said: str
) -> None:
    before = create("--from-toml", "config.toml", *TABLE, "--output", "before.pt")
    assert before.code == 0
    with (project / "config.toml").open("a") as f:
        f.write(f'[fewshot."sim.simB"]\ntest = {json.dumps(["SIM004", *names])}\n')
    arguments = ("--from-toml", "config.toml", *TABLE, "--output", "o.pt", "--quiet")
    it = "it" if len(names) == 1 else "them"
    warning = (
        f"warning: [fewshot] names {said}: cell-load holds nothing out for {it}. Remove {it}\n"
    )
    assert create(*arguments) == Result(0, "o.pt\n", warning)
    assert (project / "o.pt").read_bytes() == (project / "before.pt").read_bytes()
    left_out = json.loads((project / "o.pt.json").read_text())["left_out"]
    assert left_out == {name: f"{name!r} is in no table" for name in names}
    # a vector that is to be had is added
    done = create(*arguments, "--alias", f"{names[0]}=SIM003")
    same = f"warning: State cannot tell labels with the same vector apart: SIM003 = {names[0]}\n"
    assert done == Result(0, "o.pt\n", warning + same)
    assert labels_in(project / "o.pt")[-1] == names[0]


# --- what a person wrote and nothing reads ------------------------------------------------------


@pytest.fixture
def said(tmp_path: Path, create: Create) -> Callable[..., list[str]]:
    """Warnings and errors for a path of [datasets], with a table that has every gene."""

    def call(path: str, more: str = "") -> list[str]:
        write_table(tmp_path / "table.pt", ["A", "B", "C"])
        config = toml(tmp_path / "c.toml", path, more=more)
        done = create("--from-toml", config, *TABLE, "--output", "o.pt", "--quiet")
        prefix = "error: " if done.code else "warning: "
        return [line.removeprefix(prefix) for line in done.err.splitlines()]

    return call


def test_files_that_an_absolute_pattern_loses_are_named_with_a_path_that_reads_them(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    write_screen(tmp_path / "data/top.h5ad", ["A"])
    write_screen(tmp_path / "data/one/x.h5ad", ["B"])
    write_screen(tmp_path / "data/one/two/y.h5ad", ["C"])
    lost = f"{tmp_path}/data/one/two/y.h5ad, {tmp_path}/data/top.h5ad"
    for pattern in ("**/*.h5ad", "**"):
        assert said(f"{tmp_path}/data/{pattern}") == [
            "dataset 'set0': in an absolute path cell-load takes ** for *: 2 files not read "
            f"({lost}). To read them too, give the path data/{pattern}"
        ]
        assert labels_in(tmp_path / "o.pt") == ["B", CONTROL]
        assert said(f"data/{pattern}") == []
        assert set(labels_in(tmp_path / "o.pt")) == {"A", "B", "C", CONTROL}
    (tmp_path / "data/one/x.h5ad").unlink()
    assert said(f"{tmp_path}/data/**/*.h5ad") == [
        f"dataset 'set0': no .h5 or .h5ad file at {tmp_path}/data/**/*.h5ad: in an absolute path "
        f"cell-load takes ** for *. To read {lost}, give the path data/**/*.h5ad"
    ]


def test_files_in_subfolders_of_a_dataset_are_named_once(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    write_screen(tmp_path / "data/top.h5ad", ["A"])
    write_screen(tmp_path / "data/one/x.h5", ["B"])
    write_screen(tmp_path / "data/one/.git/z.h5", ["C"])
    below = (
        "dataset 'set0': cell-load does not look into sub-folders: 1 file not read "
        "({}data/one/x.h5). To read it too, give the path {}"
    )
    assert said("data") == [below.format("", "data/{top.h5ad,one/x.h5}")]
    assert said("data/{top.h5ad,one/x.h5}") == []
    assert said(str(tmp_path / "data")) == [
        below.format(f"{tmp_path}/", f"{tmp_path}/data/{{top.h5ad,one/x.h5}}")
    ]
    (tmp_path / "data/one/.git/z.h5").unlink()
    assert said("data") == [below.format("", "data/**")]
    assert said("data/**") == []
    # another dataset reads it
    config = toml(tmp_path / "c.toml", "data", "data/one")
    words = ("--from-toml", config, *TABLE, "--output", "o.pt", "--quiet")
    created = run_script("create_esm_pert_features", *words, cwd=tmp_path)
    assert created == Result(0, "o.pt\n", "")
    (tmp_path / "data/top.h5ad").unlink()
    assert said("data") == [
        "dataset 'set0': no .h5 or .h5ad file at data: cell-load does not look into sub-folders. "
        "To read data/one/x.h5, give the path data/**"
    ]


def test_files_with_other_endings_in_a_dataset_are_named(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    write_screen(tmp_path / "data/a.h5ad", ["A"])
    for name in ("b.h5ad.gz", "C.H5AD", "d.loom", "README.md", "genes.csv"):
        (tmp_path / "data" / name).write_bytes(b"")
    (tmp_path / "data/e.zarr").mkdir()
    write_screen(tmp_path / "data/e.zarr/inside.h5ad", ["B"])
    others = "data/C.H5AD, data/b.h5ad.gz, data/d.loom, data/e.zarr"
    assert said("data") == [
        f"dataset 'set0': cell-load reads what is named .h5 or .h5ad, not {others}. Convert or "
        "rename them, or move them out of the folder"
    ]
    assert said("data/*.h5ad") == []  # what is asked for is there
    (tmp_path / "data/a.h5ad").unlink()
    assert said("data") == [
        f"dataset 'set0': no .h5 or .h5ad file at data, but {others}: convert or rename them"
    ]


def test_hidden_files_that_cell_load_reads_are_named(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    """Path.glob matches them, glob.glob does not."""
    write_screen(tmp_path / "data/a.h5ad", ["A"])
    write_screen(tmp_path / "data/.b.h5ad", ["B"])
    assert said("data") == [
        "dataset 'set0': cell-load reads hidden files too: data/.b.h5ad. If that is not meant, "
        "move it out of the folder"
    ]
    assert labels_in(tmp_path / "o.pt") == ["B", CONTROL, "A"]
    assert said(f"{tmp_path}/data/*.h5ad") == []
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL]


def test_links_and_paths_that_lead_nowhere_say_so(
    tmp_path: Path, said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_screen(tmp_path / "data/a.h5ad", ["A"])
    (tmp_path / "data/b.h5ad").symlink_to("moved/b.h5ad")
    (tmp_path / "empty").mkdir()
    link = "it is a link to moved/b.h5ad, where nothing is"
    assert said("data") == [f"no such data file: data/b.h5ad: {link}"]
    start = "dataset 'set0': no .h5 or .h5ad file at "
    assert said("data/b.h5ad") == [
        f"{start}data/b.h5ad, which is a link to moved/b.h5ad, where nothing is"
    ]
    assert said("empty") == [
        f"{start}empty: the folder holds none; correct the path in {tmp_path}/c.toml"
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCREENS", "data")
    as_written = "cell-load takes a path as it is written. Write"
    assert said("~/data/a.h5ad") == [f"{start}~/data/a.h5ad: {as_written} {tmp_path}/data/a.h5ad"]
    assert said("$SCREENS/a.h5ad") == [f"{start}$SCREENS/a.h5ad: {as_written} data/a.h5ad"]
    (tmp_path / "data/b.h5ad").unlink()
    assert said("data/a") == [f"{start}data/a: {as_written} data/a.h5ad"]
    assert said("data/*") == [f"{start}data/*: {as_written} data/*.h5ad"]


def test_sections_and_keys_that_nothing_reads_are_one_warning(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    write_screen(tmp_path / "s.h5ad", ["A"])
    more = "[model.kwargs]\ncell_set_len = 64\n[cell_eval]\nenabled = true\n[features]\n"
    settings = (
        "Settings of State stand at the end of the training's command line as KEY=VALUE, e.g. "
        "model.kwargs.cell_set_len=64"
    )
    assert said("s.h5ad", more) == [
        f"{tmp_path}/c.toml: nothing reads [model], [cell_eval]. {settings}"
    ]
    (tmp_path / "top.toml").write_text("seed = 1\n" + (tmp_path / "c.toml").read_text())
    done = find_data_files(load_experiment(tmp_path / "top.toml"), tmp_path / "top.toml", Notes())
    assert done == ({"set0": [Path("s.h5ad")]}, [])
    assert unread_parts({"seed": 1, "model": {}, "training": {}}) == [
        f"nothing reads seed (in no section), [model]. {settings}"
    ]
    # a setting among the datasets of [training] was refused, and is still
    assert said("s.h5ad", "max_steps = 400\n") == [
        "2 problems:",
        f'  - {tmp_path}/c.toml: [training] max_steps = 400: the only value is "train", and each '
        f"name one of [datasets]. {settings}",
        f"  - {tmp_path}/c.toml: dataset 'max_steps' is used but has no path under [datasets]",
    ]


def test_train_lists_are_said_to_be_ignored(tmp_path: Path, said: Callable[..., list[str]]) -> None:
    write_screen(tmp_path / "s.h5ad", ["A", "B"])
    more = '[fewshot."set0.c"]\ntrain = ["A", "NOWHERE"]\nval = ["B"]\n'
    assert said("s.h5ad", more) == [
        f'{tmp_path}/c.toml: [fewshot."set0.c"] train: cell-load ignores this list. Every '
        "perturbation of the cell type that val and test do not name trains"
    ]
    assert labels_in(tmp_path / "o.pt") == ["A", "B", CONTROL]


def test_a_template_in_the_folder_of_a_dataset_is_named_with_a_path_without_it(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    for name in ("one.h5", "three.h5"):
        write_screen(tmp_path / "data" / name, ["A"])
    write_screen(tmp_path / "data/template.h5ad", ["B"], target_gene="to_predict")
    rest = "data/{one,three}.h5"
    assert said("data") == [
        "data/template.h5ad has no obs column target_gene, which data/one.h5, data/three.h5 have; "
        "columns there: batch_var, cell_type, to_predict. Choose one that all have with "
        "--pert-col. If data/template.h5ad is not to be trained on (a template to predict, say), "
        f'move it out, or give set0 = "{rest}"'
    ]
    assert said(rest) == []
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL]
    # whatever the column is called, the one that most have counts
    for name in ("one.h5", "three.h5"):
        write_screen(tmp_path / "data" / name, ["A"], target_gene="condition")
    write_screen(tmp_path / "data/template.h5ad", ["B"])
    [error] = said("data")
    assert error.startswith("data/template.h5ad has no obs column condition, which data/one.h5, ")


def test_the_file_that_missing_labels_come_from_is_named(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    write_screen(tmp_path / "data/one.h5", ["A"])
    write_screen(tmp_path / "data/template.h5ad", ["B", "NONESUCH", "NEITHER"])
    [error] = said("data")
    assert error.startswith(
        "2 of 4 labels have no embedding (NONESUCH, NEITHER). They are in data/template.h5ad "
        "only. Add a table"
    )
    write_screen(tmp_path / "data/two.h5", ["NONESUCH"])
    [error] = said("data")
    assert "They are in data/two.h5, data/template.h5ad only. Add" in error
    write_screen(tmp_path / "data/one.h5", ["A", "NEITHER"])
    [error] = said("data")
    assert "(NEITHER, NONESUCH). Add a table" in error  # in all of them


# --- labels that no cell has --------------------------------------------------------------------


def test_unused_categories_without_embedding_are_left_out_and_said(
    tmp_path: Path, create: Create
) -> None:
    write_screen(tmp_path / "s.h5ad", ["A", "B"], unused=["TERT", "", "C"])
    write_table(tmp_path / "table.pt", ["A", "B", "C"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, *TABLE, "--output", "o.pt", "--quiet")
    assert create(*arguments, "--report", "r.tsv") == Result(
        0,
        "o.pt\n",
        "warning: 2 labels of no cell have no embedding (TERT, ''; categories of s.h5ad). "
        "cell-load gives them zeros, which no cell uses. To be rid of them: "
        "adata.obs['target_gene'] = adata.obs['target_gene'].cat.remove_unused_categories()\n",
    )
    assert labels_in(tmp_path / "o.pt") == ["A", "B", CONTROL, "C"]
    written = json.loads((tmp_path / "o.pt.json").read_text())
    assert written["left_out"] == {
        "TERT": "'TERT' is in no table, though a human gene",
        "": "empty label or part",
    }
    assert (written["missing"], list(written["labels"])) == ({}, ["A", "B", CONTROL, "C"])
    rows = [line.split("\t") for line in (tmp_path / "r.tsv").read_text().splitlines()]
    assert [(r[0], r[1]) for r in rows[-2:]] == [("TERT", "left out"), ("", "left out")]
    # the line of Python does what it says
    adata = anndata.read_h5ad(tmp_path / "s.h5ad")
    adata.obs["target_gene"] = adata.obs["target_gene"].cat.remove_unused_categories()
    adata.write_h5ad(tmp_path / "s.h5ad")
    assert create(*arguments) == Result(0, "o.pt\n", "")
    # with --missing mean they are filled in, as any other
    write_screen(tmp_path / "s.h5ad", ["A", "B"], unused=["TERT"])
    assert create(*arguments, "--missing", "mean").err == (
        "warning: 1 of 3 labels missing, or a part of them (TERT): filled with the mean vector\n"
    )
    assert "TERT" in labels_in(tmp_path / "o.pt")


def test_a_label_is_needed_if_any_cell_of_any_input_has_it(tmp_path: Path, create: Create) -> None:
    write_screen(tmp_path / "one.h5ad", ["A"], unused=["TERT"])
    write_screen(tmp_path / "two.h5ad", ["TERT"])
    write_table(tmp_path / "table.pt", ["A"])
    (tmp_path / "g.txt").write_text("TERT\n")
    both = toml(tmp_path / "both.toml", "one.h5ad", "two.h5ad")
    one = toml(tmp_path / "one.toml", "one.h5ad")
    output = (*TABLE, "--output", "o.pt", "--quiet")
    missing = "error: 1 of 2 labels has no embedding (TERT): 'TERT' is in no table, though a human"
    missing += " gene."
    only = " It is in {} only. Add a table"
    for inputs, where in (
        (("--from-toml", both), only.format("two.h5ad")),
        (("--from-toml", one, "--adata", "two.h5ad"), only.format("two.h5ad")),
        (("--from-toml", one, "--gene-list", "g.txt"), only.format("g.txt")),
    ):
        done = create(*inputs, *output)
        assert (done.code, done.err[: len(missing + where)]) == (1, missing + where)
    done = create("--adata", "one.h5ad", "--from-toml", one, *output)
    assert done.code == 0 and "1 label of no cell has no embedding (TERT; categ" in done.err


# --- blanks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "control", "named", "line"),
    [
        (["A+ctrl "], " ctrl ", "'A+ctrl '", ".str.strip()"),
        (["A+ctrl\t", "B\u00a0"], "ctrl\u00a0", "'A+ctrl\\t'", ".str.strip()"),
        (
            ["A +ctrl", "B+\u00a0C"],
            "ctrl ",
            "'A +ctrl'",
            ".str.strip().str.replace(r'\\s*\\+\\s*', '+', regex=True)",
        ),
        ([" ctrl", "A"], "ctrl", "' ctrl'", ".str.strip()"),
    ],
)
def test_blanks_around_labels_are_shown_and_the_line_that_takes_them_away_works(
    tmp_path: Path, create: Create, labels: list[str], control: str, named: str, line: str
) -> None:
    obs = pd.DataFrame({"gene": pd.Categorical([*labels, control])}, index=[*labels, "control"])
    adata = anndata.AnnData(np.ones((len(obs), 2), np.float32), obs=obs)
    adata.write_h5ad(tmp_path / "s.h5ad")
    write_table(tmp_path / "table.pt", ["A", "B", "C"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, *TABLE, "--output", "o.pt", "--quiet", "--control-pert")
    done = create(*arguments, control)
    name = "name" if done.err.startswith("error: 1") else "names"
    then = "" if control == control.strip() else ", then --control-pert ctrl"
    assert (done.code, done.out) == (1, "")
    assert named in done.err and done.err.endswith(
        f": blanks in the {name}. Take them away: adata.obs['gene'] = "
        f"adata.obs['gene']{line}.astype('category'){then}\n"
    )
    said = re.search(r"adata.obs.*astype\('category'\)", done.err)
    assert said
    exec(said[0], {"adata": adata})
    adata.write_h5ad(tmp_path / "s.h5ad")
    assert create(*arguments, "ctrl") == Result(0, "o.pt\n", "")


def test_a_control_that_lacks_its_blanks_is_told_to_strip_them(
    tmp_path: Path, create: Create
) -> None:
    write_screen(tmp_path / "s.h5ad", ["A", "ctrl "])
    write_table(tmp_path / "table.pt", ["A"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    done = create("--from-toml", config, *TABLE, "--output", "o.pt", "--control-pert", "ctrl")
    assert done == Result(
        1,
        "",
        "error: s.h5ad: no cell has the control label 'ctrl' in obs column 'target_gene' (did you "
        "mean 'ctrl ', non-targeting?). Take the blanks away: adata.obs['target_gene'] = "
        "adata.obs['target_gene'].str.strip().astype('category'); labels: A, 'ctrl ', "
        "non-targeting\n",
    )


# --- controls with numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "steps"),
    [
        (["A", "non-targeting_0001", "non-targeting_0002"], "r'^non-targeting_\\d+$', {c}"),
        (["A", "NTC-2", "sgNT_4"], "r'^(NTC-\\d+|sgNT_\\d+)$', {c}"),
        (["A", "NT1", "NT4", "NT5E"], "r'^NT\\d+$', {c}"),  # NT4 is an alias of NTF4 elsewhere
        (["A+NegCtrl0", "NegCtrl10+B", "B+A"], "r'NegCtrl\\d+', {c}"),
        (
            ["A+NegCtrl0", "NegCtrl1+NegCtrl0"],
            "r'^NegCtrl\\d+\\+NegCtrl\\d+$', {c}, regex=True).str.replace(r'NegCtrl\\d+', {c}",
        ),
    ],
)
@pytest.mark.parametrize("control", [CONTROL, "ctrl"])
def test_controls_with_numbers_are_told_to_take_the_label_of_the_control(
    tmp_path: Path, create: Create, labels: list[str], steps: str, control: str
) -> None:
    obs = pd.DataFrame({"gene": pd.Categorical([*labels, control])}, index=[*labels, "control"])
    adata = anndata.AnnData(np.ones((len(obs), 2), np.float32), obs=obs)
    adata.write_h5ad(tmp_path / "s.h5ad")
    write_table(tmp_path / "table.pt", ["A", "B", "NT5E", "NTF4"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, *TABLE, "--output", "o.pt", "--quiet")
    arguments += ("--control-pert", control)
    done = create(*arguments)
    c = repr(control)
    assert done.code == 1
    assert done.err.endswith(
        f": adata.obs['gene'] = adata.obs['gene'].str.replace({steps.format(c=c)}, regex=True)"
        ".astype('category')\n"
    ), done.err
    assert "--label-regex" not in done.err and "--esm-embeddings" not in done.err
    if "B+A" in labels:
        assert f": a control beside a gene. Write {control} for it" in done.err
    else:
        names = [x for x in labels if x not in ("A", "B", "NT5E") and x[:2] != "A+"]
        what = "controls. Give their" if len(names) > 1 else "a control. Give its"
        assert f" {', '.join(names)}: {what} cells the label {control}" in done.err
    said = re.search(r"adata.obs.*", done.err)
    assert said
    exec(said[0], {"adata": adata})
    adata.write_h5ad(tmp_path / "s.h5ad")
    assert create(*arguments) == Result(0, "o.pt\n", "")


def test_no_line_is_offered_that_would_rename_a_gene_too(tmp_path: Path, create: Create) -> None:
    write_screen(tmp_path / "s.h5ad", ["NTC_1", "NTC_2"])
    write_table(tmp_path / "table.pt", ["NTC_2"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    done = create("--from-toml", config, *TABLE, "--output", "o.pt", "--quiet")
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith(" NTC_1: a control. Give its cells the label non-targeting\n")


def test_many_controls_and_no_control_are_told_to_take_one_label(
    tmp_path: Path, create: Create
) -> None:
    obs = pd.DataFrame({"gene": pd.Categorical(["A", "NTC_1", "NTC_2"])}, index=["1", "2", "3"])
    adata = anndata.AnnData(np.ones((3, 2), np.float32), obs=obs)
    adata.write_h5ad(tmp_path / "s.h5ad")
    write_table(tmp_path / "table.pt", ["A"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, *TABLE, "--output", "o.pt", "--quiet")
    line = (
        "adata.obs['gene'] = adata.obs['gene'].str.replace(r'^NTC_\\d+$', 'non-targeting', "
        "regex=True).astype('category')"
    )
    assert create(*arguments) == Result(
        1,
        "",
        "error: s.h5ad: no cell has the control label 'non-targeting' in obs column 'gene'. NTC_1, "
        "NTC_2: named like controls, but only one label can be the control. Give their cells the "
        f"label non-targeting: {line}; labels: A, NTC_1, NTC_2\n",
    )
    exec(line, {"adata": adata})
    adata.write_h5ad(tmp_path / "s.h5ad")
    assert create(*arguments) == Result(0, "o.pt\n", "")


# --- only the categories are read ---------------------------------------------------------------

# not ru_maxrss: a new process starts with that of the process that started it
MEASURED = """
import re, sys
import create_esm_pert_features as script
code = script.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def test_of_a_huge_file_only_the_categories_are_read(tree: Path) -> None:
    cells = 10_000_000
    with h5py.File(tree / "huge.h5ad", "w") as f:
        f.create_dataset("X", (cells, 20_000), "f4", chunks=(1000, 1000))  # 800 GB, if it is read
        obs = f.create_group("obs")
        elsewhere = {"external": [("/nowhere/at/all", 0, 8 * cells)]}  # reading it fails
        for column in ("target_gene", "cell_type"):
            group = obs.create_group(column)
            group["categories"] = ["A", CONTROL]
            group.create_dataset("codes", (cells,), "i1", **elsewhere)
        obs.create_dataset("n_counts", (cells,), "f8", **elsewhere)
        with pytest.raises(OSError):
            obs["target_gene/codes"][:]
    write_screen(tree / "small.h5ad", ["A"])
    write_table(tree / "table.pt", ["A"])

    def peak(name: str) -> int:
        """KiB at most in memory while the script reads one file."""
        config = toml(tree / f"{name}.toml", f"{name}.h5ad")
        done = subprocess.run(
            [
                *(sys.executable, "-c", MEASURED, "--from-toml", str(config), "--quiet"),
                *("--esm-embeddings", "table.pt", "--output", f"{name}.pt"),
            ],
            **{"cwd": tree, "capture_output": True, "text": True, "timeout": PATIENCE},
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )
        assert (done.returncode, done.stdout) == (0, f"{name}.pt\n"), done.stderr
        return int(done.stderr)

    assert peak("huge") < peak("small") + 30_000
    assert labels_in(tree / "huge.pt") == labels_in(tree / "small.pt") == ["A", CONTROL]


# --- other sources of labels --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("g.txt", b"B\nA\n", ["B", "A"]),
        ("g.txt", b"\xef\xbb\xbfB\r\n\r\n# all of them\r\nA # why\r\n B \r\nA", ["B", "A"]),
        ("g", b"A+B\nA\n", ["A+B", "A"]),
        ("g.txt", b"NA\nnan\nNone\n", ["NA", "nan", "None"]),
        ("g.csv", b"target_gene,n\nB,1\nNA,2\n,3\nB,4\n", ["B", "NA"]),
        ("g.csv", b'\xef\xbb\xbfn,"gene"\r\n1,"B"\r\n2," A "\r\n', ["B", "A"]),
        ("g.csv", b"perturbation\nA+B\n\nA\n", ["A+B", "A"]),
        ("g.CSV", b"symbol,n\nA\n", ["A"]),
        ("g.tsv", b"n\tgene_symbol\n1\tB\n2\tNA\n", ["B", "NA"]),
    ],
)
def test_gene_lists_of_every_kind_give_their_labels(
    tmp_path: Path, create: Create, name: str, content: bytes, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    write_table(tmp_path / "table.pt", ["A", "B", "NA", "nan", "None"])
    done = create("--gene-list", name, "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert (done.code, done.out) == (0, "o.pt\n")
    assert labels_in(tmp_path / "o.pt") == [*expected, CONTROL]


@pytest.mark.parametrize(("repeats", "noun"), [(1, "1 repeated label"), (3, "3 repeated labels")])
def test_repeated_labels_of_a_gene_list_are_said(
    tmp_path: Path, create: Create, repeats: int, noun: str
) -> None:
    (tmp_path / "g.txt").write_text("A\n" * (repeats + 1))
    write_table(tmp_path / "table.pt", ["A"])
    assert create(
        "--gene-list", "g.txt", "--esm-embeddings", "table.pt", "--output", "o.pt"
    ) == Result(
        0,
        "o.pt\n",
        f"g.txt: {noun} left out\n"
        "labels    2 (1 control, 1 exact)\n"
        "from      g.txt (1 label)\n"
        "source    table.pt (1 gene x 3)\n",
    )


def test_pert_col_chooses_the_column_of_a_gene_list(tmp_path: Path, create: Create) -> None:
    (tmp_path / "g.csv").write_text("gene,target_gene,mine\nX,Y,A\n")
    write_table(tmp_path / "table.pt", ["A"])
    arguments = ("--gene-list", "g.csv", "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert create(*arguments, "--pert-col", "mine").code == 0
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL]


def test_sources_of_labels_add_up_and_each_label_comes_once(tmp_path: Path, create: Create) -> None:
    write_screen(tmp_path / "s.h5ad", ["A"])
    write_screen(tmp_path / "template.h5ad", ["A", "B"])
    write_screen(tmp_path / "other.h5ad", ["C"])
    (tmp_path / "one.txt").write_text("D\nA\n")
    (tmp_path / "two.txt").write_text("E\n")
    write_table(tmp_path / "table.pt", ["A", "B", "C", "D", "E", "F"])
    toml(tmp_path / "c.toml", "s.h5ad")
    arguments = (
        *("--from-toml", "c.toml", "--adata", "template.h5ad", "--adata", "other.h5ad"),
        *("--gene-list", "one.txt", "--gene-list", "two.txt"),
        *("--esm-embeddings", "table.pt", "--output", "o.pt", "--quiet"),
    )
    assert create(*arguments) == Result(0, "o.pt\n", "")
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL, "B", "C", "D", "E"]
    inputs = json.loads((tmp_path / "o.pt.json").read_text())["inputs"]
    assert [(i["path"], i["kind"], i["labels"]) for i in inputs] == [
        ("s.h5ad", "adata", 2),
        ("c.toml", "toml", 0),
        ("template.h5ad", "adata", 3),
        ("other.h5ad", "adata", 2),
        ("one.txt", "gene-list", 2),
        ("two.txt", "gene-list", 1),
    ]


def test_adata_needs_no_control(tmp_path: Path, create: Create) -> None:
    write_screen(tmp_path / "t.h5ad", ["A"])
    write_table(tmp_path / "table.pt", ["A", CONTROL])
    arguments = ("--adata", "t.h5ad", "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert create(*arguments, "--control-pert", "absent").code == 0
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL, "absent"]


def test_all_genes_gives_every_gene_of_every_table(tmp_path: Path, create: Create) -> None:
    write_table(tmp_path / "one.pt", ["A", "B"])
    write_table(tmp_path / "two.pt", ["C", "B"])
    arguments = ("--all-genes", "--esm-embeddings", "one.pt", "--esm-embeddings", "two.pt")
    assert create(*arguments, "--output", "o.pt").code == 0
    assert labels_in(tmp_path / "o.pt") == ["A", "B", "C", CONTROL]
    assert json.loads((tmp_path / "o.pt.json").read_text())["inputs"] == [
        {"path": "one.pt, two.pt", "kind": "all-genes", "labels": 3}
    ]


# --- the column and the control -----------------------------------------------------------------


@pytest.mark.parametrize("column", PERT_COLUMNS)
def test_each_usual_column_is_found(tmp_path: Path, create: Create, column: str) -> None:
    write_screen(tmp_path / "s.h5ad", ["A"], target_gene=column)
    write_table(tmp_path / "table.pt", ["A"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert create(*arguments).code == 0
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL]


def test_of_two_candidates_the_one_that_all_files_share_is_taken(
    tmp_path: Path, create: Create
) -> None:
    write_screen(tmp_path / "one.h5ad", ["A"], cell_type="gene")
    write_screen(tmp_path / "two.h5ad", ["B"])
    write_table(tmp_path / "table.pt", ["A", "B"])
    config = toml(tmp_path / "c.toml", "one.h5ad", "two.h5ad")
    arguments = ("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert create(*arguments).code == 0
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL, "B"]


NO_COLUMN = "no obs column target_gene, gene, perturbation, condition ..."
CHOOSE = "Choose one with --pert-col"


@pytest.mark.parametrize(
    ("first", "second", "arguments", "message"),
    [
        (
            {"target_gene": "knocked"},
            None,
            (),
            f"one.h5ad has {NO_COLUMN}; columns: batch_var, cell_type, knocked. {CHOOSE}",
        ),
        (
            {},
            {"target_gene": "gene"},
            (),
            "two.h5ad has no obs column target_gene, which one.h5ad has; columns there: "
            "batch_var, cell_type, gene. Choose one that all have with --pert-col",
        ),
        (
            {"target_gene": "mine"},
            {"target_gene": "yours"},
            (),
            f"one.h5ad and 1 more file: {NO_COLUMN} in common; columns of the first: "
            f"batch_var, cell_type, mine. {CHOOSE}",
        ),
        (
            {"cell_type": "gene", "batch_var": "condition"},
            None,
            (),
            "one.h5ad has more than one obs column that could be meant: target_gene, gene, "
            f"condition. {CHOOSE}",
        ),
        (
            {},
            None,
            ("--pert-col", "target_genes"),
            "one.h5ad has no obs column 'target_genes' (did you mean target_gene?); "
            f"columns: batch_var, cell_type, target_gene. {CHOOSE}",
        ),
        (
            {"target_gene": "mine"},
            {},
            ("--pert-col", "mine"),
            "two.h5ad has no obs column 'mine'; columns: batch_var, cell_type, target_gene. "
            + CHOOSE,
        ),
    ],
    ids=["none", "not in all", "none in common", "several", "wrong --pert-col", "not in all files"],
)
def test_a_column_that_is_not_clear_is_an_error_that_names_the_columns(
    tmp_path: Path,
    create: Create,
    first: dict[str, str],
    second: dict[str, str] | None,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    write_screen(tmp_path / "one.h5ad", ["A"], **first)
    names = ["one.h5ad"]
    if second is not None:
        write_screen(tmp_path / "two.h5ad", ["B"], **second)
        names.append("two.h5ad")
    config = toml(tmp_path / "c.toml", *names)
    write_table(tmp_path / "table.pt", ["A", "B"])
    done = create(
        *("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt", *arguments)
    )
    assert done == Result(1, "", f"error: {message}\n")
    assert not list(tmp_path.glob("o.pt*"))


def test_pert_col_decides_between_candidates(tmp_path: Path, create: Create) -> None:
    write_screen(tmp_path / "s.h5ad", ["A"], cell_type="gene")
    write_table(tmp_path / "table.pt", ["A"])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert create(*arguments, "--pert-col", "target_gene").code == 0
    assert labels_in(tmp_path / "o.pt") == ["A", CONTROL]


@pytest.mark.parametrize(
    ("control", "labels", "hint"),
    [
        ("non-targeting", ["A", "ctrl", "B"], " (did you mean ctrl?)"),
        ("non-targeting", ["NT", "Non_Targeting", "A"], " (did you mean NT, Non_Targeting?)"),
        ("safe-harbour", ["A", "safe-harbor"], " (did you mean safe-harbor?)"),
        ("non-targeting", ["A", "B"], ""),
    ],
)
def test_a_control_that_is_absent_is_an_error_with_the_nearest_labels(
    tmp_path: Path, create: Create, control: str, labels: list[str], hint: str
) -> None:
    obs = pd.DataFrame({"gene": pd.Categorical(labels, categories=labels)})
    obs.index = obs.index.astype(str)
    anndata.AnnData(np.ones((len(labels), 2), np.float32), obs=obs).write_h5ad(tmp_path / "s.h5ad")
    write_table(tmp_path / "table.pt", labels)
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert create(*arguments, "--control-pert", control) == Result(
        1,
        "",
        f"error: s.h5ad: no cell has the control label {control!r} in obs column 'gene'{hint}. "
        f"Name it with --control-pert; labels: {', '.join(sorted(labels))}\n",
    )
    assert not list(tmp_path.glob("o.pt*"))


def test_control_pert_names_the_control_and_gives_it_zeros(tmp_path: Path, create: Create) -> None:
    write_screen(tmp_path / "s.h5ad", ["A"])
    write_table(tmp_path / "table.pt", ["A", CONTROL])
    config = toml(tmp_path / "c.toml", "s.h5ad")
    arguments = ("--from-toml", config, "--esm-embeddings", "table.pt", "--output", "o.pt")
    assert create(*arguments, "--control-pert", "A").code == 0
    features = torch.load(tmp_path / "o.pt", weights_only=True)
    assert {k: v.tolist() for k, v in features.items()} == {"A": [0.0] * 3, CONTROL: [2.0] * 3}
