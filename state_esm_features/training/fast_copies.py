"""Copies of data files in the order and form in which they are read, written in bounded memory.

Which files need one is decided in `fast_loading`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import h5ad
from state_esm_features.console import (
    STOP_SIGNALS,
    Bar,
    InputError,
    Stopped,
    announce,
    count,
    on_signals,
    some,
)
from state_esm_features.files import data_file_origin, existing_parent, read_json, write_json
from state_esm_features.training.data import Columns

if TYPE_CHECKING:
    import h5py
    import numpy as np


ORDER_SEED = 0
"""Of the order of cells within a group; the same for all runs, so that they share copies."""

BLOCK = 8_000_000
"""Values of a matrix held at once while a file is rewritten: about 250 MB at the most."""


@dataclass(frozen=True)
class FastCopy:
    """One data file and the copy of it that is read instead.

    Attributes
    ----------
    size
        Bytes that the copy takes.
    made_of
        What the copy depends on; its folder is named by the hash of it.
    """

    source: Path
    target: Path
    size: int
    made_of: Mapping[str, Any]


@dataclass(frozen=True)
class FastLoading:
    """How --fast-loading reads the data: `copies` by source file; a file in order has none."""

    layout: str
    folder: Path
    copies: Mapping[Path, FastCopy]

    def path_of(self, source: Path) -> Path:
        """The file that cell-load is given for a data file."""
        return self.copies[source].target if source in self.copies else source.absolute()

    def missing(self) -> list[FastCopy]:
        """Copies that are not there yet."""
        return [c for c in self.copies.values() if not c.target.exists()]

    def bytes_beside(self, run_dir: Path) -> int:
        """Bytes that missing copies will take on the disk of a run directory."""
        disks = {existing_parent(place).stat().st_dev for place in (self.folder, run_dir)}
        return sum(copy.size for copy in self.missing()) if len(disks) == 1 else 0


def make_copies(fast: FastLoading, columns: Columns) -> None:
    """Write the copies that are missing; another process at the same file is waited for."""
    missing = fast.missing()
    if not missing:
        return
    total = sum(c.size for c in missing)
    announce(
        f"rewriting {count(len(missing), 'file')} of data for fast loading ({fast.layout}, "
        f"{total / 1e9:.1f} GB) into {fast.folder}"
    )
    start, bar = time.monotonic(), Bar(total, "rewriting", "B", scale=True)
    asked: list[int] = []

    def advance(n: int) -> None:
        bar.add(n)
        if asked:
            raise Stopped(asked[0])

    # noted and obeyed between writes: HDF5's call-backs swallow what is raised in them
    with on_signals(lambda signum, frame: asked.append(signum), STOP_SIGNALS):
        _write_missing(missing, fast.layout, columns, advance)
    bar.close()
    announce(f"rewrote {count(len(missing), 'file')} in {time.monotonic() - start:.0f} s")


def _write_missing(
    missing: Sequence[FastCopy], layout: str, columns: Columns, advance: Callable[[int], None]
) -> None:
    from filelock import FileLock, Timeout

    for copy in missing:
        folder = copy.target.parent
        _say_older_copies(copy)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock, held, said = FileLock(folder.parent / f".{folder.name}.lock"), None, False
            while held is None:
                try:
                    held = lock.acquire(timeout=1 if said else 0)
                except Timeout:
                    if not said:
                        announce(f"another process is rewriting {copy.source}: waiting for it")
                    said = True
                    advance(0)
            with held:
                if not copy.target.exists():
                    write_copy(copy, layout, columns, advance)
        except (OSError, RuntimeError) as error:  # HDF5 reports a full disk as either
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cannot write {copy.target}: {reason}; no half of it is kept. Free some space "
                "there, or choose another --data-cache"
            ) from error


def _say_older_copies(copy: FastCopy) -> None:
    """A source that changed leaves its old copy behind: another run may be reading it."""
    older = [
        record.parent
        for record in copy.target.parent.parent.glob("*/source.json")
        if (made_of := read_json(record))
        and made_of["path"] == copy.made_of["path"]
        and made_of["mtime_ns"] != copy.made_of["mtime_ns"]
    ]
    if older:
        announce(
            f"{copy.source} changed: copies of what it was stay in {some(map(str, older))}; delete "
            "them when no run reads them"
        )


def write_copy(
    copy: FastCopy, layout: str, columns: Columns, advance: Callable[[int], None]
) -> None:
    """Write one copy: all that cell-load reads of the file, and nothing else; whole or not at all.

    Memory is bounded by `BLOCK`, whatever the size of the file: rows are read in the order of the
    source and written to their place.
    """
    import h5py
    import numpy as np

    folder = copy.target.parent
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()
    try:
        path = temporary / copy.target.name
        with h5ad.open_h5ad(copy.source) as source, h5py.File(path, "w") as target:
            order = cell_order(source, columns)
            if layout == "dense":
                order = np.arange(len(order))
            rewritten = copy.made_of.get("rewritten", ())
            copy_obs(source, target, copy.made_of, order)
            copy_names(source, target, rewritten)
            place = np.argsort(order)
            for name in sorted({"X", "obsm/X_hvg", *copy.made_of["matrices"]}):
                if name in rewritten:
                    with plain_matrix(source[name]) as matrix:
                        copy_matrix(matrix, target, name, place, layout, advance)
                elif not h5ad.is_matrix(source.get(name)):
                    continue
                elif name in copy.made_of["matrices"]:
                    copy_matrix(source[name], target, name, place, layout, advance)
                else:  # only its shape is read; whoever reads more gets NaN, not zeros
                    create_matrix(target, name, h5ad.matrix_shape(source[name]), np.nan)
        if not data_file_origin(copy.source).items() <= copy.made_of.items():
            raise InputError(f"{copy.source} changed while it was read; start again")
        with path.open("rb") as written:
            os.fsync(written.fileno())
        write_json(temporary / "source.json", copy.made_of)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_names(source: h5py.File, target: h5py.File, rewritten: Collection[str]) -> None:
    """Copy what cell-load reads of var and uns; `rewritten` nodes in a plain form."""
    source.copy("var", target)
    for name in {"log1p", "hvg_names"} & set(source.get("uns", ())):
        source.copy(f"uns/{name}", target.require_group("uns"))
        target["uns"].attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    for name in {n for n in rewritten if n.startswith(("var/", "uns/"))}:
        del target[name]
        values = h5ad.read_values(source[name])
        is_mask = name == "var/highly_variable"
        write_values(target, name, values.astype(bool) if is_mask else values)


def create_matrix(
    target: h5py.File, name: str, shape: tuple[int, int], fill: float | None = None
) -> h5py.Dataset:
    """A dense float32 matrix (cells, columns), to be filled."""
    matrix = target.create_dataset(name, shape, "float32", fillvalue=fill)
    matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return matrix


def create_csr(target: h5py.File, name: str, lengths: np.ndarray, width: int) -> h5py.Group:
    """A CSR matrix of float32 with int64 (cells,) `lengths` of rows, its values to be filled."""
    import numpy as np

    starts = np.concatenate([[0], np.cumsum(lengths)])
    group = target.create_group(name)
    group["indptr"] = starts
    group.create_dataset("data", (starts[-1],), np.float32)
    group.create_dataset("indices", (starts[-1],), np.int32)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    group.attrs["shape"] = np.array([len(lengths), width])
    return group


def cell_order(file: h5py.File, columns: Columns) -> np.ndarray:
    """int64 (cells,): source rows by cell type and perturbation, in random order within these.

    In random order, so that the cells of a set do not come from one lane or plate.
    """
    import numpy as np

    types, labels = (h5ad.open_column(file, c)[1][:] for c in (columns.cell_type, columns.pert))
    return np.lexsort((np.random.default_rng(ORDER_SEED).random(len(labels)), labels, types))


def copy_obs(
    source: h5py.File, target: h5py.File, made_of: Mapping[str, Any], order: np.ndarray
) -> None:
    """Copy obs columns and cell names, cells in `order`; `rewritten` nodes in a plain form."""
    import h5py

    names, rewritten = made_of["obs"], made_of.get("rewritten", ())
    obs = target.create_group("obs")
    for name in [*names, *({"_index"} & set(source["obs"]))]:
        if f"obs/{name}" in rewritten:
            if name == "_index":
                write_values(obs, name, h5ad.read_values(source["obs"][name])[order])
            else:
                categories, codes = h5ad.open_column(source, name)
                write_categorical(obs, name, categories, codes[:][order])
            continue
        source.copy(f"obs/{name}", obs)
        values = obs[name]["codes"] if isinstance(obs[name], h5py.Group) else obs[name]
        values[...] = values[:][order]
    if "_index" not in obs:  # the names that cell-load makes up, so that they stay with their cells
        made_up = [f"cell_{i:06d}" for i in order]
        obs.create_dataset("_index", data=made_up, dtype=h5py.string_dtype())
    obs.attrs.update({"_index": "_index", "encoding-type": "dataframe"})
    obs.attrs.update({"encoding-version": "0.2.0", "column-order": list(names)})
    target.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def write_values(parent: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write (n,) text, numbers or truth values as a plain array, whatever anndata would make of
    them; text that is no value is empty."""
    import h5py

    kind, dtype = "array", None
    if values.dtype.kind in "OU":
        kind, dtype = "string-array", h5py.string_dtype()
        values = values.astype(object)
        values[values == None] = ""  # noqa: E711
    node = parent.create_dataset(name, data=values, dtype=dtype)
    node.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})


def write_categorical(
    parent: h5py.Group, name: str, categories: np.ndarray, codes: np.ndarray
) -> None:
    """Write a column as a categorical of text."""
    import numpy as np

    group = parent.create_group(name)
    group["codes"] = codes.astype(np.int32)
    write_values(group, "categories", np.array(list(map(str, categories)), dtype=object))
    group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0"})
    group.attrs["ordered"] = False


@contextlib.contextmanager
def plain_matrix(node: h5py.Group) -> Iterator[h5py.Group | h5py.Dataset]:
    """A data frame or compressed columns of obsm as a dense or CSR matrix, in memory."""
    import h5py
    import numpy as np
    from anndata.io import read_elem, write_elem

    value = read_elem(node)
    try:
        if h5ad.stored_as(node) == "dataframe":
            plain = value.to_numpy(np.float32)
        else:
            plain = value.tocsr()
            plain.sum_duplicates()
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{node.file.filename}: {node.name.strip('/')} is no table of numbers ({error})"
        ) from error
    with h5py.File("matrix", "w", driver="core", backing_store=False) as memory:
        write_elem(memory, "matrix", plain)
        yield memory["matrix"]


def copy_matrix(
    source: h5py.Group | h5py.Dataset,
    target: h5py.File,
    name: str,
    place: np.ndarray,
    layout: str,
    advance: Callable[[int], None],
) -> None:
    """Copy a matrix as float32, uncompressed and in one piece, source row i to row place[i].

    `sorted` keeps CSR as CSR: a row of 3,000 values is a third of its dense form, and as fast.
    """
    import numpy as np

    rows, width = h5ad.matrix_shape(source)
    csr = h5ad.is_sparse(source) and layout == "sorted"
    if csr:
        lengths = np.empty(rows, np.int64)
        lengths[place] = np.diff(source["indptr"][:])
        out = create_csr(target, name, lengths, width)
        starts, data, indices = out["indptr"][:], out["data"], out["indices"]
    else:
        out = create_matrix(target, name, (rows, width))
    for first, block in row_blocks(source, max_rows=rows if csr else max(1, BLOCK // width)):
        places = place[first : first + block.shape[0]]
        if csr or (h5ad.is_sparse(source) and name != "X"):
            require_unique(block, source)
        by_place = np.argsort(places)
        places, block = places[by_place], block[by_place]
        if not csr and not isinstance(block, np.ndarray):
            block = block.toarray()
        edges = np.flatnonzero(np.diff(places) != 1) + 1
        for a, b in zip([0, *edges], [*edges, len(places)], strict=True):
            if csr:
                here = slice(starts[places[a]], starts[places[b - 1] + 1])
                there = slice(block.indptr[a], block.indptr[b])
                data[here], indices[here] = block.data[there], block.indices[there]
            else:
                out[places[a] : places[a] + b - a] = block[a:b]
        advance(8 * block.nnz if csr else block.nbytes)


def row_blocks(node: h5py.Group | h5py.Dataset, max_rows: int) -> Iterator[tuple[int, Any]]:
    """(first row, rows) of a matrix in pieces of about `BLOCK` values: arrays, or scipy's CSR."""
    import numpy as np
    import scipy.sparse

    rows, width = h5ad.matrix_shape(node)
    if not h5ad.is_sparse(node):
        step = max(1, min(BLOCK // width, max_rows))
        for first in range(0, rows, step):
            yield first, node[first : first + step].astype(np.float32, copy=False)
        return
    indptr = node["indptr"][:].astype(np.int64)
    first = 0
    while first < rows:
        stop = int(np.searchsorted(indptr, indptr[first] + BLOCK, "right")) - 1
        stop = min(max(stop, first + 1), first + max_rows, rows)
        a, b = indptr[first], indptr[stop]
        values = node["data"][a:b].astype(np.float32, copy=False)
        where = node["indices"][a:b].astype(np.int32, copy=False)
        block = scipy.sparse.csr_matrix(
            (values, where, indptr[first : stop + 1] - a), shape=(stop - first, width)
        )
        yield first, block
        first = stop


def require_unique(block: Any, source: h5py.Group) -> None:
    """Two values of one gene in one cell: stock adds them in X, but not when it loads in a row, nor
    in obsm."""
    tidy = block if block.has_canonical_format else block.copy()
    tidy.sum_duplicates()
    if tidy.nnz != block.nnz:
        raise InputError(
            f"{source.file.filename}: a cell has two values of one gene in {source.name}; write "
            "the file again after " + h5ad.rewriting("adata.X.sum_duplicates()")
        )
