"""Bad input of create_esm_pert_features.py: exit code 1, the whole message, nothing written."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch
from conftest import Result, run_script
from h5ad_forms import SETTING
from toml_mistakes import TOML_MISTAKES, write_mistake

Create = Callable[..., Result]
Refused = Callable[..., None]
CONTROL = "non-targeting"
TABLE = ("--esm-embeddings", "table.pt", "--output", "o.pt", "--quiet")
A, B = [1.0, 2.0, 3.0], [10.0, 20.0, 30.0]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every folder and file below `folder`, with its content."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, create: Create) -> Refused:
    """Assert that a command ends with exactly this message and changes nothing on the disk."""

    def check(message: str, *arguments: object) -> None:
        before = snapshot(tmp_path)
        assert create(*arguments) == Result(1, "", f"error: {message}\n")
        assert snapshot(tmp_path) == before

    return check


@pytest.fixture
def gene_list(tmp_path: Path) -> tuple[str, ...]:
    """A gene list of A and B, as arguments."""
    (tmp_path / "g.txt").write_text("A\nB\n")
    return ("--gene-list", "g.txt", "--esm-embeddings", "t.pt", "--output", "o.pt", "--quiet")


# --- files that are not there -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "what"),
    [
        ("--from-toml", "TOML"),
        ("--gene-list", "gene list"),
        ("--adata", "data file"),
        ("--aliases", "aliases file"),
        ("--esm-embeddings", "embeddings table"),
    ],
)
def test_a_file_that_does_not_exist_is_named(
    project: Path, refused: Refused, flag: str, what: str
) -> None:
    arguments = ("--all-genes", *TABLE, flag)
    where = f" (looked in {project})"
    refused(f"no such {what}: nowhere.x{where}", *arguments, "nowhere.x")
    refused(f"no such {what}: {project}/nowhere.x", *arguments, project / "nowhere.x")
    if flag == "--esm-embeddings":  # may be a folder
        return
    (project / "folder").mkdir()
    refused(f"{what} folder is a folder; give the file itself", *arguments, "folder")


# --- the TOML -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "stderr"), TOML_MISTAKES)
def test_a_toml_that_cell_load_would_misread_is_refused(
    project: Path, create: Create, text: str, stderr: str
) -> None:
    write_mistake(project / "c.toml", text)
    before = snapshot(project)
    assert create("--from-toml", "c.toml", *TABLE) == Result(1, "", stderr)
    assert snapshot(project) == before


# --- data files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere.h5ad", "nowhere", "nowhere/*.h5", "{a,b}.h5", "*.h5"])
@pytest.mark.parametrize("where", ["relative", "absolute"])
def test_a_path_without_a_data_file_is_an_error(
    project: Path, refused: Refused, path: str, where: str
) -> None:
    if where == "absolute":
        path = f"{project}/{path}"
        advice = "; correct the path in c.toml"
    else:
        advice = (
            f" (relative to the working directory {project}); correct the path in c.toml, or run "
            "from the folder it starts in"
        )
    (project / "c.toml").write_text(f'[datasets]\nx = "{path}"\n[training]\nx = "train"\n')
    refused(f"dataset 'x': no .h5 or .h5ad file at {path}{advice}", "--from-toml", "c.toml", *TABLE)


def test_a_path_that_works_relative_to_the_toml_only_is_an_error_that_says_so(
    project: Path, refused: Refused
) -> None:
    (project / "sub").mkdir()
    (project / "screen.h5ad").rename(project / "sub/screen.h5ad")
    (project / "config.toml").rename(project / "sub/config.toml")
    refused(
        "dataset 'sim': no .h5 or .h5ad file at screen.h5ad (relative to the working directory "
        f"{project}). It exists relative to the TOML: run from {project}/sub, or make the path "
        "absolute",
        *("--from-toml", "sub/config.toml", *TABLE),
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{screen.h5ad,}", "Non-relative patterns are unsupported"),
        ("a**/*.h5", "Invalid pattern: '**' can only be an entire path component"),
    ],
)
def test_a_pattern_that_cell_load_cannot_search_is_an_error(
    project: Path, refused: Refused, path: str, reason: str
) -> None:
    (project / "c.toml").write_text(f'[datasets]\nx = "{path}"\n[training]\nx = "train"\n')
    refused(
        f"dataset 'x': path '{path}' cannot be searched: {reason}", "--from-toml", "c.toml", *TABLE
    )


def test_all_datasets_without_a_file_are_listed_together(project: Path, refused: Refused) -> None:
    (project / "c.toml").write_text(
        '[datasets]\na = "/nowhere/a.h5"\nb = "/nowhere/b"\n[training]\na = "train"\nb = "train"\n'
    )
    refused(
        "2 problems:\n"
        "  - dataset 'a': no .h5 or .h5ad file at /nowhere/a.h5; correct the path in c.toml\n"
        "  - dataset 'b': no .h5 or .h5ad file at /nowhere/b; correct the path in c.toml",
        *("--from-toml", "c.toml", *TABLE),
    )


@pytest.mark.parametrize("kind", ["cut short", "empty", "text"])
@pytest.mark.parametrize("flag", ["--from-toml", "--adata"])
def test_a_data_file_that_is_cut_short_or_not_hdf5_is_an_error(
    project: Path, refused: Refused, kind: str, flag: str
) -> None:
    path = project / "screen.h5ad"
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "text": b"A\n"}[kind])
    with pytest.raises(OSError) as hdf5:
        h5py.File(path, "r")
    refused(
        f"screen.h5ad cannot be read: it is damaged, cut short or not an HDF5 file ({hdf5.value})",
        *(flag, "config.toml" if flag == "--from-toml" else "screen.h5ad", *TABLE),
    )


@pytest.mark.parametrize("obs", ["none", "a table of old anndata"])
def test_a_data_file_without_an_obs_group_is_an_error(
    project: Path, refused: Refused, obs: str
) -> None:
    with h5py.File(project / "screen.h5ad", "w") as f:
        if obs != "none":
            f["obs"] = np.array([(b"cell", 1)], dtype=[("index", "S4"), ("target_gene", "i1")])
    refused(
        "screen.h5ad has no obs table that cell-load can read; "
        "write it again with a current anndata",
        *("--from-toml", "config.toml", *TABLE),
    )


def test_a_missing_column_is_an_error_that_names_those_that_exist(
    project: Path, refused: Refused
) -> None:
    refused(
        "screen.h5ad has no obs column 'target_genes' (did you mean target_gene?); columns: "
        "batch_var, cell_type, target_gene. Choose one with --pert-col",
        *("--from-toml", "config.toml", *TABLE, "--pert-col", "target_genes"),
    )


def test_a_column_that_is_not_categorical_is_read_and_said(
    project: Path, create: Callable[..., Result]
) -> None:
    """Training reads it with --fast-loading only; a template may have it."""
    with h5py.File(project / "screen.h5ad", "a") as f:
        del f["obs/target_gene"]
        f["obs/target_gene"] = ["SIM000", CONTROL, "SIM003", "SIM004"]
    done = create("--from-toml", "config.toml", *TABLE)
    assert done.code == 0, done.err
    assert done.err.splitlines()[0] == (
        "warning: screen.h5ad: cell-load cannot read obs/target_gene (stored as string-array). "
        f"Write it again with a current anndata, after {SETTING}adata.obs['target_gene'] = "
        "adata.obs['target_gene'].astype(str).astype('category'), or train with --fast-loading, "
        "whose copies it can read"
    )
    features = torch.load(project / "o.pt", weights_only=True)
    assert list(features) == ["SIM000", "SIM003", "SIM004", CONTROL]
    done = create("--adata", "screen.h5ad", *TABLE)
    assert (done.code, "warning" in done.err) == (0, False)


def test_labels_that_are_not_text_are_an_error(
    project: Path, screen: anndata.AnnData, refused: Refused
) -> None:
    screen.obs["target_gene"] = screen.obs["target_gene"].cat.codes.astype("category")
    screen.obs["target_gene"] = screen.obs["target_gene"].cat.rename_categories(lambda x: int(x))
    screen.write_h5ad(project / "screen.h5ad")
    with h5py.File(project / "screen.h5ad") as f:
        kind = f["obs/target_gene/categories"].dtype
    assert kind.kind == "i"
    refused(
        f"screen.h5ad: obs column 'target_gene' holds {kind} labels, not text; write the file "
        f"again after {SETTING}adata.obs['target_gene'] = "
        "adata.obs['target_gene'].astype(str).astype('category')",
        *("--from-toml", "config.toml", *TABLE),
    )


def test_the_advice_for_labels_that_are_not_text_works(
    project: Path, screen: anndata.AnnData, create: Create
) -> None:
    screen.obs["target_gene"] = screen.obs["target_gene"].astype(str).astype("category")
    screen.write_h5ad(project / "screen.h5ad")
    assert create("--from-toml", "config.toml", *TABLE) == Result(0, "o.pt\n", "")


def test_an_absent_control_is_an_error_with_the_nearest_labels(
    project: Path, refused: Refused
) -> None:
    message = (
        "screen.h5ad: no cell has the control label '{}' in obs column 'target_gene' (did you mean "
        "non-targeting?). Name it with --control-pert; labels: SIM000, SIM000+SIM001, SIM001, "
        "SIM002, SIM003, ..."
    )
    for control in ("NT", "Non-Targeting"):
        arguments = ("--from-toml", "config.toml", *TABLE, "--control-pert", control)
        refused(message.format(control), *arguments)


# --- gene lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("g.txt", b""),
        ("g.txt", b"\xef\xbb\xbf\r\n\r\n# nothing\r\n  \r\n"),
        ("g.csv", b"gene,n\n"),
        ("g.csv", b"gene,n\n,1\n"),
    ],
)
def test_an_empty_gene_list_is_an_error(
    project: Path, refused: Refused, name: str, content: bytes
) -> None:
    (project / name).write_bytes(content)
    refused(f"gene list {name} is empty; put one label on each line", "--gene-list", name, *TABLE)


@pytest.mark.parametrize(
    ("header", "problem", "columns"),
    [
        ("name,score", "no label column", "name, score"),
        (
            "gene,target_gene,n",
            "more than one label column (target_gene, gene)",
            "gene, target_gene, n",
        ),
    ],
)
def test_a_gene_list_without_a_clear_column_is_an_error(
    project: Path, refused: Refused, header: str, problem: str, columns: str
) -> None:
    (project / "g.csv").write_text(f"{header}\nSIM001,SIM001,1\n")
    refused(
        f"gene list g.csv has {problem}; columns: {columns}. Name it with --pert-col, or give a "
        ".txt with one label a line",
        *("--gene-list", "g.csv", *TABLE),
    )


def test_text_files_that_are_not_utf8_are_errors(project: Path, refused: Refused) -> None:
    (project / "g.txt").write_bytes(b"SIM001\n\xff\xfe\n")
    why = "'utf-8' codec can't decode byte 0xff in position 7: invalid start byte"
    refused(f"gene list g.txt is not plain text in UTF-8: {why}", "--gene-list", "g.txt", *TABLE)
    refused(
        f"aliases file g.txt is not plain text in UTF-8: {why}",
        *("--all-genes", "--aliases", "g.txt", *TABLE),
    )


@pytest.mark.parametrize("line", ["OLD", "OLD NEW MORE", "OLD,"])
def test_an_aliases_file_that_is_not_two_columns_is_an_error_with_the_line(
    project: Path, refused: Refused, line: str
) -> None:
    (project / "a.txt").write_text(f"SIM001 SIM002\n\n{line}\n")
    refused(
        f"a.txt, line 3: expected two columns, OLD NEW: {line!r}",
        *("--all-genes", "--aliases", "a.txt", *TABLE),
    )


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "t.pt holds no {gene: vector} table, but list; save a dict"),
        (torch.ones(3), "t.pt holds no {gene: vector} table, but Tensor; save a dict"),
        ({}, "t.pt holds an empty table"),
        (
            {"A": torch.ones(3), "B": torch.ones(4), "C": torch.ones(4)},
            "t.pt: vectors of different widths: 3 ('A'), 4 ('B'); one table, one width",
        ),
        (
            {"A": torch.ones(0)},
            "t.pt: vectors of different widths: 0 ('A'); one table, one width",
        ),
        (
            {"A": torch.ones(3), "B": [1.0, 2.0, 3.0], 7: torch.ones(3)},
            "t.pt: 1 of 3 keys are no names of genes (7); name each gene by a text",
        ),
        (
            {"A": torch.ones(3), "B": "1, 2, 3", "C": [[1.0], [2.0, 3.0]]},
            "t.pt: 2 of 3 entries are not gene -> vector of numbers ('B': str, 'C': list)",
        ),
        (
            {"A": {6: torch.ones(3), 33: torch.ones(3)}},
            "t.pt: 1 of 1 entries are not gene -> vector of numbers ('A': dict of 6, 33). Save the "
            "vector itself of each gene, for instance of one layer",
        ),
        (
            {"A": torch.ones(2, 3), "B": torch.ones(4, 3)},
            "t.pt: 'A' has shape (2, 3); expected one vector a gene. These are vectors of "
            "residues: save the mean over them, vector.mean(0)",
        ),
        (
            {"A": torch.ones(3, 2), "B": torch.ones(3, 4)},
            "t.pt: 'A' has shape (3, 2); expected one vector a gene. These are vectors of "
            "residues, transposed: save the mean, vector.mean(1)",
        ),
        (
            {"A": torch.ones(2, 3)},
            "t.pt: 'A' has shape (2, 3); expected one vector a gene",
        ),
        ({"A": torch.tensor(1.0)}, "t.pt: 'A' has shape (); expected one vector a gene"),
        (
            {"A": torch.ones(3, dtype=torch.complex64)},
            "t.pt: complex64 values are no embeddings",
        ),
        ({"A": torch.ones(3, dtype=torch.bool)}, "t.pt: bool values are no embeddings"),
        (
            {"A": torch.tensor(A), "B": torch.tensor([1.0, float("nan"), 3.0])},
            "t.pt: the vector of 1 gene in use holds NaN or infinite values (B); repair the table, "
            "or remove them from it and choose --missing mean",
        ),
        (
            {"A": torch.tensor([1e300], dtype=torch.float64), "B": torch.tensor([float("inf")])},
            "t.pt: the vector of 2 genes in use holds NaN or infinite values (A, B); repair the "
            "table, or remove them from it and choose --missing mean",
        ),
        (
            {"A": torch.zeros(3), "B": torch.tensor(B)},
            "t.pt: the vector of 1 gene in use holds only zeros, which State takes for the control "
            "(A); repair the table, or remove them from it and choose --missing mean",
        ),
    ],
)
def test_a_table_that_is_none_is_refused(
    tmp_path: Path,
    refused: Refused,
    gene_list: tuple[str, ...],
    content: object,
    message: str,
) -> None:
    torch.save(content, tmp_path / "t.pt")
    refused(message, *gene_list)


def test_a_bad_vector_that_no_label_uses_does_no_harm(
    tmp_path: Path, create: Create, gene_list: tuple[str, ...]
) -> None:
    bad = {"C": torch.full((3,), float("nan")), "D": torch.zeros(3)}
    torch.save({"A": torch.tensor(A), "B": torch.tensor(B), **bad}, tmp_path / "t.pt")
    assert create(*gene_list) == Result(0, "o.pt\n", "")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float64, "float64"),
        (torch.int64, "int64"),
        (torch.uint8, "uint8"),
    ],
)
def test_other_numbers_are_converted_and_that_is_said(
    tmp_path: Path, create: Create, gene_list: tuple[str, ...], dtype: torch.dtype, name: str
) -> None:
    torch.save({"A": torch.tensor(A, dtype=dtype), "B": torch.tensor(B)}, tmp_path / "t.pt")
    done = create(*(a for a in gene_list if a != "--quiet"))
    both = " and ".join(sorted([name, "float32"]))
    assert done == Result(
        0,
        "o.pt\n",
        f"t.pt: {both} values are converted to float32\n"
        "labels    3 (1 control, 2 exact)\n"
        "from      g.txt (2 labels)\n"
        "source    t.pt (2 genes x 3)\n",
    )
    features = torch.load(tmp_path / "o.pt", weights_only=True)
    assert {v.dtype for v in features.values()} == {torch.float32}
    assert (features["A"].tolist(), features["B"].tolist()) == (A, B)


def test_rows_of_shape_1_by_width_are_accepted_and_that_is_said(
    tmp_path: Path, create: Create, gene_list: tuple[str, ...]
) -> None:
    torch.save({"A": torch.tensor([A]), "B": torch.tensor(B)}, tmp_path / "t.pt")
    done = create(*(a for a in gene_list if a != "--quiet"))
    assert done == Result(
        0,
        "o.pt\n",
        "t.pt: 1 row of shape (1, width) flattened\n"
        "labels    3 (1 control, 2 exact)\n"
        "from      g.txt (2 labels)\n"
        "source    t.pt (2 genes x 3)\n",
    )
    assert torch.load(tmp_path / "o.pt", weights_only=True)["A"].tolist() == A


def test_tables_of_different_widths_are_an_error(
    tmp_path: Path, refused: Refused, gene_list: tuple[str, ...]
) -> None:
    torch.save({"A": torch.ones(3)}, tmp_path / "t.pt")
    torch.save({"B": torch.ones(4)}, tmp_path / "u.pt")
    refused(
        "tables of different widths: t.pt has 3, u.pt has 4; use tables of one ESM2 model",
        *(*gene_list, "--esm-embeddings", "u.pt"),
    )


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("kind", ["torch.save", "torch.save of old", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_without_running_it(
    tmp_path: Path, gene_list: tuple[str, ...], kind: str
) -> None:
    content = {"A": torch.tensor(A), "B": Code(tmp_path / "marker")}
    path = tmp_path / "t.pt"
    message = (
        "t.pt was refused without running it: it holds pickled Python objects beside tensors "
        "(posix.mkdir), and loading those can execute code. Save it again as a plain {gene: "
        "torch.Tensor} dict\n"
    )
    if kind == "pickle":
        path.write_bytes(pickle.dumps({**content, "A": np.array(A)}))
        message = (
            "t.pt was refused before anything of it ran: it holds posix.mkdir, and of a pickle "
            "only dicts, lists, tuples, text, numbers and NumPy arrays are read, as the rest can "
            "execute code. If you trust it, save it again: python -c 'import gzip, pickle, numpy, "
            "torch; torch.save({k: torch.tensor(numpy.asarray(v)) for k, v in pickle.load(open("
            """'"'"'t.pt'"'"', '"'"'rb'"'"')).items()}, '"'"'t_plain.pt'"'"')'\n"""
        )
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    before = snapshot(tmp_path)
    # in a process of its own: Python's warnings would be seen there, too
    done = run_script("create_esm_pert_features", *gene_list, cwd=tmp_path)
    assert done == Result(1, "", f"error: {message}")
    assert snapshot(tmp_path) == before and not (tmp_path / "marker").exists()
    with contextlib.suppress(RuntimeError):  # the file is as dangerous as it looks
        torch.load(path, weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_a_table_that_is_cut_short_is_an_error(
    tmp_path: Path,
    create: Create,
    gene_list: tuple[str, ...],
    zipped: bool,
    kept: float,
) -> None:
    path = tmp_path / "t.pt"
    content = {"A": torch.ones(2000), "B": torch.ones(2000)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    message = "t.pt is empty"
    if kept and zipped:
        message = (
            "t.pt cannot be read as a zip archive of torch or NumPy: damaged or cut short (File is "
            "not a zip file)"
        )
    elif kept:
        with pytest.raises((RuntimeError, EOFError, OSError)) as reason:
            torch.load(path, weights_only=True)
        why = str(reason.value).splitlines()[0]
        message = f"t.pt cannot be read as a file of torch.save: damaged or cut short ({why})"
    before = snapshot(tmp_path)
    assert create(*gene_list) == Result(1, "", f"error: {message}\n")
    assert snapshot(tmp_path) == before


NPZ = "expected `genes` (n,) of text and `embeddings` (n, width), found"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"genes": np.array(["A", "B"]), "other": np.ones((2, 3))},
            "t.npz: expected arrays `genes` (or `names`) (n,) of text and `embeddings` (n, width), "
            "or one array a gene; it holds genes, other",
        ),
        (
            {"genes": np.array(["A", Path("B")], dtype=object), "embeddings": np.ones((2, 3))},
            "t.npz holds arrays of dtype object, which are pickles and can execute code. If you "
            "trust it, these lines of Python save it again:\n"
            "  import numpy as np; old = np.load('t.npz', allow_pickle=True)\n"
            "  np.savez('t_plain.npz', **{k: np.array(old[k].tolist()) for k in old})",
        ),
        (
            {"genes": np.array(["A", "B"]), "embeddings": np.ones((3, 2))},
            f"t.npz: {NPZ} <U1 (2,) and float64 (3, 2); the matrix is transposed, save its .T",
        ),
        (
            {"genes": np.array(["A", "B"]), "embeddings": np.ones((3, 3))},
            f"t.npz: {NPZ} <U1 (2,) and float64 (3, 3)",
        ),
        (
            {"genes": np.array(["A", "B"]), "embeddings": np.ones(2)},
            f"t.npz: {NPZ} <U1 (2,) and float64 (2,)",
        ),
        (
            {"genes": np.array([["A"], ["B"]]), "embeddings": np.ones((2, 3))},
            f"t.npz: {NPZ} <U1 (2, 1) and float64 (2, 3)",
        ),
        (
            {"genes": np.array("A"), "embeddings": np.array(1.0)},
            f"t.npz: {NPZ} <U1 () and float64 ()",
        ),
        (
            {"genes": np.array([1, 2]), "embeddings": np.ones((2, 3))},
            f"t.npz: {NPZ} int64 (2,) and float64 (2, 3)",
        ),
        (
            {"genes": np.array(["A", "B"]), "embeddings": np.array([["1"], ["2"]])},
            f"t.npz: {NPZ} <U1 (2,) and <U1 (2, 1)",
        ),
    ],
)
def test_an_npz_that_is_no_table_is_refused(
    tmp_path: Path,
    refused: Refused,
    gene_list: tuple[str, ...],
    arrays: dict[str, np.ndarray],
    message: str,
) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    refused(message, *(a.replace("t.pt", "t.npz") for a in gene_list))
