"""What is read of one .h5ad file, however its nodes are stored, and what cell-load can read of it.

What the labels mean is not known here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, count, did_you_mean, first_line, have, some, them
from state_esm_features.files import existing_file

if TYPE_CHECKING:
    import h5py
    import numpy as np


@contextlib.contextmanager
def open_h5ad(path: Path) -> Iterator[h5py.File]:
    """Open an .h5ad file for reading and make sure that it has an obs group."""
    import h5py

    existing_file(path, "data file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: it is damaged, cut short or not an HDF5 file ({error})"
        ) from error
    with file:
        if not isinstance(file.get("obs"), h5py.Group):
            raise InputError(
                f"{path} has no obs table that cell-load can read; "
                "write it again with a current anndata"
            )
        yield file


def obs_columns(file: h5py.File) -> list[str]:
    """Columns of obs, without the index and the bookkeeping of old anndata versions."""
    index = file["obs"].attrs.get("_index", "_index")
    return sorted(set(file["obs"]) - {index, "_index", "__categories"})


class LacksColumn(InputError):
    """Some of the files lack a column that the others have."""

    def __init__(self, message: str, files: Sequence[Path]) -> None:
        super().__init__(message)
        self.files = files


def find_column(
    columns: Mapping[Path, Sequence[str]],
    wanted: str | None,
    candidates: Sequence[str],
    flag: str,
) -> str:
    """The one obs column to use in all files: `wanted`, or the only candidate they share.

    Parameters
    ----------
    columns
        {file: its obs columns}
    wanted
        What the user asked for, or None to look for one.
    candidates
        Usual names of such a column.
    flag
        The option that names it, for the error.

    Raises
    ------
    LacksColumn
        Some files have it and some do not.
    InputError
        No file has it, or there is none or more than one candidate.
    """
    if wanted is not None:
        require_column(columns, wanted, flag)
        return wanted
    shared = [c for c in candidates if all(c in there for there in columns.values())]
    if len(shared) == 1:
        return shared[0]
    path, there = next(iter(columns.items()))
    if shared:
        raise InputError(
            f"{path} has more than one obs column that could be meant: {', '.join(shared)}. "
            f"Choose one with {flag}"
        )
    usual = f"no obs column {', '.join(candidates[:4])} ..."
    if len(columns) == 1:
        raise InputError(f"{path} has {usual}; columns: {some(there, 20)}. Choose one with {flag}")
    # the candidate that most files have: those that lack it are the odd ones
    most = max(candidates, key=lambda c: sum(c in there for there in columns.values()))
    lacking = [path for path, there in columns.items() if most not in there]
    if len(lacking) == len(columns):
        raise InputError(
            f"{path} and {count(len(columns) - 1, 'more file')}: {usual} in common; "
            f"columns of the first: {some(there, 20)}. Choose one with {flag}"
        )
    others = [str(path) for path in columns if path not in lacking]
    raise LacksColumn(
        f"{some(lacking)} {have(len(lacking))} no obs column {most}, which "
        f"{some(others)} {have(len(others))}; columns there: {some(columns[lacking[0]], 20)}. "
        f"Choose one that all have with {flag}",
        lacking,
    )


def require_column(columns: Mapping[Path, Sequence[str]], wanted: str, flag: str) -> None:
    """Refuse files that lack a column which was asked for; see `find_column`."""
    lacking = [path for path, there in columns.items() if wanted not in there]
    if not lacking:
        return
    there = columns[lacking[0]]
    message = (
        f"{some(lacking)} {have(len(lacking))} no obs column {wanted!r}"
        f"{did_you_mean(wanted, there)}; columns: {some(there, 20)}. Choose one with {flag}"
    )
    raise LacksColumn(message, lacking) if len(lacking) < len(columns) else InputError(message)


PLAIN = ("array", "boolean", "string-array")

CELL_LOAD_READS = {
    "labels": ("categorical",),
    "column": ("categorical", *PLAIN),
    "gene names": ("categorical", *PLAIN),
    "names": PLAIN,
    "mask": ("boolean",),
    "X": ("array", "csr_matrix"),
    "matrix": ("array", "csr_matrix"),
}
"""{what is read: how it may be stored (`stored_as`)}: what H5MetadataCache and PerturbationDataset
of cell-load 0.10.4 do with the HDF5 node itself. Other forms end in a TypeError, but compressed
columns in obsm and a mask of numbers are read wrongly in silence. anndata reads all of them."""


@dataclass(frozen=True)
class Unreadable:
    """A node that cell-load cannot read as it is stored.

    Attributes
    ----------
    node, stored
        Its path in the file, and how it is stored.
    line
        Python after which anndata writes it in a form that is read; none if writing is enough.
    """

    node: str
    stored: str
    line: str

    @property
    def mended(self) -> bool:
        """Whether the copies of --fast-loading hold it in a form that is read."""
        return self.node != "X" and self.stored not in ("group", "null")


def stored_as(node: h5py.Group | h5py.Dataset) -> str:
    """How a node is stored, in anndata's words; of a categorical also its categories."""
    if not hasattr(node, "keys"):
        if node.shape is None:
            return "null"
        kinds = {"b": "boolean", "O": "string-array", "S": "string-array", "U": "string-array"}
        return kinds.get(node.dtype.kind, "array")
    if {"codes", "categories"} <= set(node):
        inner = stored_as(node["categories"])
        return "categorical" if inner in PLAIN else f"categorical of {inner}"
    return str(node.attrs.get("encoding-type", "group"))


def find_unreadable(file: h5py.File, reads: Mapping[str, str]) -> list[Unreadable]:
    """What cell-load cannot read of {node: what it reads there}; nodes that are not there are left
    to others."""
    found = []
    for name, what in reads.items():
        node = file.get(name)
        if node is None:
            continue
        stored = stored_as(node)
        if what == "X" and "encoding-type" not in node.attrs:  # cell-load asks for it
            stored = "group"
        if stored not in CELL_LOAD_READS[what]:
            found.append(Unreadable(name, stored, line_to_rewrite(name, stored)))
    return found


def strings_are_nullable() -> bool:
    """Whether all text is a nullable string here, as from pandas 3 on."""
    return int(importlib.metadata.version("pandas").partition(".")[0]) >= 3


def rewriting(*lines: str) -> str:
    """Python to run before anndata's write_h5ad, so that cell-load can read all that it writes."""
    setting = "anndata.settings.allow_write_nullable_strings = False"
    return "; ".join(dict.fromkeys([setting] * strings_are_nullable() + [x for x in lines if x]))


def line_to_rewrite(name: str, stored: str) -> str:
    """Python to run before anndata's write_h5ad, so that it stores one node in a plainer form."""
    table, _, key = name.partition("/")
    place = {"_index": f"adata.{table}_names"}.get(key, f"adata.{table}[{key!r}]")
    if table == "obs" and key != "_index":
        return f"{place} = {place}.astype(str).astype('category')"
    if "nullable-string" in stored:
        return "" if strings_are_nullable() else f"{place} = {place}.astype(object)"
    if stored == "csc_matrix":
        place = "adata.X" if name == "X" else place
        return f"{place} = {place}.tocsr()"
    if stored == "dataframe":
        return f"{place} = {place}.to_numpy()"
    if key == "highly_variable":
        return f"{place} = {place}.astype(bool)"
    return "" if name == "X" or stored == "group" else f"{place} = list({place})"


def storage_problems(
    unreadable: Mapping[Path, Sequence[Unreadable]], fast: bool = True
) -> list[str]:
    """One line for all files of which cell-load cannot read the same nodes, with the ways out.

    Parameters
    ----------
    fast
        Whether --fast-loading is one of them.
    """
    groups: dict[tuple[Unreadable, ...], list[str]] = {}
    for path, nodes in unreadable.items():
        if nodes:
            groups.setdefault(tuple(nodes), []).append(str(path))
    problems = []
    for nodes, files in groups.items():
        forms = {n.stored: some(m.node for m in nodes if m.stored == n.stored) for n in nodes}
        what = "; ".join(f"{names} (stored as {stored})" for stored, names in forms.items())
        lines = rewriting(*(n.line for n in nodes))
        advice = f"Write {them(len(files))} again with a current anndata"
        advice += f", after {lines}" if lines else ""
        if fast and all(n.mended for n in nodes):
            advice += ", or train with --fast-loading, whose copies it can read"
        problems.append(f"{some(files)}: cell-load cannot read {what}. {advice}")
    return problems


def read_values(node: h5py.Group | h5py.Dataset) -> np.ndarray:
    """(n,) values of a node, however it is stored: text as str, and None for no value."""
    import numpy as np

    if not hasattr(node, "keys"):
        values = node[:]
        if values.dtype.kind not in "OS":
            return values
        texts = (v.decode("utf-8", "ignore") if isinstance(v, bytes) else str(v) for v in values)
        return np.array(list(texts), dtype=object)
    import pandas
    from anndata.io import read_elem

    try:
        values = np.array(read_elem(node))
    except Exception as error:  # of a form that this anndata does not know
        raise InputError(
            f"{node.file.filename}: {node.name.strip('/')} cannot be read ({first_line(error)}); "
            "write the file again with a current anndata"
        ) from error
    if values.dtype.kind == "O":
        values[pandas.isna(values)] = None
    return values


def open_column(file: h5py.File, column: str) -> tuple[np.ndarray, h5py.Dataset | np.ndarray]:
    """(categories,) of an obs column, and of each cell the index of its own (-1: none), which is
    not read yet where the column is categorical.

    A column that is not gets sorted categories, as pandas would give it.
    """
    import numpy as np

    node = file["obs"][column]
    if {"codes", "categories"} <= set(getattr(node, "keys", tuple)()):
        return read_values(node["categories"]), node["codes"]
    if "categories" in node.attrs:  # anndata before 0.7
        return read_values(file[node.attrs["categories"]]), node
    import pandas

    values = pandas.Categorical(read_values(node))
    return np.asarray(values.categories), values.codes


def open_labels(file: h5py.File, column: str) -> tuple[list[str], h5py.Dataset | np.ndarray]:
    """`open_column` of a column of text: of a categorical one no cell is read yet.

    Unused categories are labels too: cell-load takes them all for perturbations.

    Raises
    ------
    InputError
        The labels are not text.
    """
    categories, codes = open_column(file, column)
    if categories.dtype.kind not in "OSUT":
        raise InputError(
            f"{file.filename}: obs column {column!r} holds {categories.dtype} labels, not text; "
            f"write the file again after {rewriting(line_to_rewrite(f'obs/{column}', 'array'))}"
        )
    return list(map(str, categories)), codes


def matrix_shape(node: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    """(cells, columns) of a matrix of an .h5ad file, however it is stored."""
    if stored_as(node) == "dataframe":
        return len(read_values(node[node.attrs["_index"]])), len(node.attrs["column-order"])
    shape = tuple(node.attrs.get("shape", ()) if is_sparse(node) else getattr(node, "shape", ()))
    if len(shape) != 2:
        raise InputError(
            f"{node.file.filename}: {node.name.strip('/')} is no matrix that cell-load can read; "
            "write the file again with a current anndata"
        )
    return int(shape[0]), int(shape[1])


def is_matrix(node: Any) -> bool:
    """A dense or compressed sparse matrix, as opposed to nothing or a data frame in obsm."""
    return node is not None and (is_sparse(node) or len(getattr(node, "shape", None) or ()) == 2)


def is_sparse(node: h5py.Group | h5py.Dataset) -> bool:
    """A group with indptr (`in` a dataset would search its values)."""
    return hasattr(node, "keys") and "indptr" in node


def gene_names_node(file: h5py.File) -> str | None:
    """Where PerturbationDataset.get_gene_names looks for the names of the genes."""
    names = ("gene_name", "gene_name_index", "_index", "feature")
    return next((f"var/{n}" for n in names if file.get(f"var/{n}") is not None), None)


def unused_categories(labels: Sequence[str], codes: Iterable[np.ndarray]) -> set[str]:
    """Categories that no cell has: what was filtered out after they were made.

    `codes` are those of the cells in blocks, int (cells,), -1 for none.
    """
    import numpy as np

    used = {code for block in codes for code in np.unique(block).tolist()}
    return {label for i, label in enumerate(labels) if i not in used}


def labels_in_no_cell(path: Path, column: str) -> set[str]:
    """`unused_categories` of an obs column of a file."""
    with open_h5ad(path) as file:
        labels, codes = open_labels(file, column)
        blocks = (codes[i : i + 10_000_000] for i in range(0, len(codes), 10_000_000))
        return unused_categories(labels, blocks)


def gene_names(file: h5py.File) -> list[str]:
    """Gene names in order, from where cell-load takes them."""
    name = gene_names_node(file)
    if name is None:
        raise InputError(
            f"{file.filename}: cell-load finds no gene names (it looks for var/gene_name and "
            "var/_index); write the file again after " + rewriting("adata.var.index.name = None")
        )
    return list(map(str, read_values(file[name])))


def columns_of(paths: Sequence[Path]) -> dict[Path, list[str]]:
    """{file: its obs columns}."""
    columns = {}
    for path in paths:
        with open_h5ad(path) as file:
            columns[path] = obs_columns(file)
    return columns


def columns_of_all(paths: Sequence[Path]) -> set[str]:
    """obs columns that all of these files have."""
    return set.intersection(*map(set, columns_of(paths).values())) if paths else set()
