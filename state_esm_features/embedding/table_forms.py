"""Files in which people keep {gene: vector}: one reader each, told apart by what is inside.

A new form is one function in `OF_FILES`. None executes what it reads, and none checks the vectors:
`tables` does that, once.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from state_esm_features.console import (
    InputError,
    count,
    did_you_mean,
    some,
)
from state_esm_features.embedding.plain_pickle import IN_TORCH_FILES, Refused, plain, read_plain
from state_esm_features.embedding.table_columns import has_header, key_column, vectors_in
from state_esm_features.embedding.table_content import Asked, Content, matrix_rows, readable
from state_esm_features.embedding.table_folders import OF_FOLDERS
from state_esm_features.files import begins_with, read_torch
from state_esm_features.h5ad import read_values
from state_esm_features.option_groups import BATCH_COLUMNS

if TYPE_CHECKING:
    import h5py


def from_dict(path: Path, form: str, content: Any) -> Content:
    """{name: vector} of one file."""
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds no {{gene: vector}} table, but {type(content).__name__}; save a dict"
        )
    if {"mean_representations", "representations"} & {*content}:
        raise InputError(f"{path} is one protein of fair-esm's extract.py; give the folder")
    return Content(form, list(content), list(map(plain, content.values())), (path,))


LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The number with which files of torch.save begin that are not zip archives."""


def torch_dict(path: Path, asked: Asked) -> Content | None:
    """torch.save of {gene: tensor or array}, memory-mapped."""
    in_zip = any(name.rpartition("/")[2] == "data.pkl" for name in zip_members(path))
    if not in_zip and LEGACY not in start_of(path):
        return None
    again = "Save it again as a plain {gene: torch.Tensor} dict"
    return from_dict(path, "torch dict", read_torch(path, again, IN_TORCH_FILES))


def zip_members(path: Path) -> list[str]:
    """Names in a zip archive; none of another file."""
    if not begins_with(path, b"PK"):
        return []
    with readable(path, "a zip archive of torch or NumPy"), zipfile.ZipFile(path) as archive:
        return archive.namelist()


def npz(path: Path, asked: Asked) -> Content | None:
    """`genes` or `names` beside `embeddings`, or one array a gene."""
    import numpy as np

    members = zip_members(path)
    if not members or not all(name.endswith(".npy") for name in members):
        return None
    with readable(path, ".npz"), np.load(path, allow_pickle=False) as arrays:
        try:
            read = {name: arrays[name] for name in arrays.files}
        except ValueError as error:
            if "Object arrays" not in str(error):
                raise
            raise object_arrays(path) from error
    listed = [name for name in ("genes", "names") if name in read]
    if "embeddings" not in read and not listed:
        return Content("npz, one array a gene", list(read), list(read.values()), (path,))
    if "embeddings" not in read or len(listed) != 1:
        raise InputError(
            f"{path}: expected arrays `genes` (or `names`) (n,) of text and `embeddings` (n, "
            f"width), or one array a gene; it holds {some(read)}"
        )
    matrix = matrix_rows(path, read[listed[0]], listed[0], read["embeddings"], "embeddings")
    return Content("npz", read[listed[0]].astype(str).tolist(), matrix, (path,))


def object_arrays(path: Path) -> InputError:
    """The error of an .npz that holds pickles."""
    again = str(path.with_name(f"{path.stem}_plain.npz"))
    return InputError(
        f"{path} holds arrays of dtype object, which are pickles and can execute code. If you "
        "trust it, these lines of Python save it again:\n"
        f"  import numpy as np; old = np.load({str(path)!r}, allow_pickle=True)\n"
        f"  np.savez({again!r}, **{{k: np.array(old[k].tolist()) for k in old}})"
    )


def npy(path: Path, asked: Asked) -> Content | None:
    """An array alone is no table: say what it lacks."""
    if not begins_with(path, b"\x93NUMPY"):
        return None
    raise InputError(
        f"{path} is one array without the names of its genes. Give the folder that holds "
        "embeddings.npy and its list of keys, or save both with np.savez(FILE, genes=..., "
        "embeddings=...)"
    )


def safetensors(path: Path, asked: Asked) -> Content | None:
    """A dict of tensors, memory-mapped."""
    start = start_of(path)
    if start[8:9] != b"{" or int.from_bytes(start[:8], "little") > path.stat().st_size:
        return None
    from safetensors.torch import load_file

    with readable(path, ".safetensors"):
        return from_dict(path, "safetensors", load_file(path))


def pickled(path: Path, asked: Asked) -> Content | None:
    """A pickle of {gene: array or list of numbers}, gzip too."""
    start = start_of(path)
    if not re.match(rb"\x80[\x01-\x05]|\(dp|\}q|\(lp|\]q|ccollections\n|cnumpy", start):
        return None
    with readable(path, "a pickle"):
        try:
            with opened(path) as file:
                return from_dict(path, "pickle", read_plain(file))
        except Refused as error:
            raise not_plain(path, error.name) from error


def not_plain(path: Path, name: str) -> InputError:
    """The error of a pickle that holds more than is read, with the line that saves it again."""
    file, read = repr(str(path)), "open"
    again = repr(str(path.with_name(path.name.split(".")[0] + "_plain.pt")))
    if begins_with(path, b"\x1f\x8b"):
        read = "gzip.open"
    old = f"pickle.load({read}({file}, 'rb'))"
    line = (
        "import gzip, pickle, numpy, torch; torch.save({k: torch.tensor(numpy.asarray(v)) for k, "
        f"v in {old}.items()}}, {again})"
    )
    if name.startswith("pandas."):
        line = f"import pandas; pandas.read_pickle({file}).to_parquet({again[:-4]}.parquet')"
    return InputError(
        f"{path} was refused before anything of it ran: it holds {name}, and of a pickle only "
        "dicts, lists, tuples, text, numbers and NumPy arrays are read, as the rest can execute "
        f"code. If you trust it, save it again: python -c {shlex.quote(line)}"
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file for reading, its gzip taken off."""
    how: Any = gzip.open if begins_with(path, b"\x1f\x8b") else open
    with how(path, "rb") as file:
        yield file


def start_of(path: Path, size: int = 64) -> bytes:
    """The first bytes, the gzip taken off."""
    with readable(path, "a gzip file"), opened(path) as file:
        return file.read(size)


def hdf5(path: Path) -> h5py.File | None:
    """An HDF5 file, to be closed; None of another file."""
    if not begins_with(path, b"\x89HDF\r\n\x1a\n"):
        return None
    import h5py

    with readable(path, "HDF5"):
        return h5py.File(path, "r")


def h5ad(path: Path, asked: Asked) -> Content | None:
    """AnnData: a matrix of X, obsm or varm by the names of its rows, or a dict in uns."""
    file = hdf5(path)
    if file is None:
        return None
    with file, readable(path, ".h5ad"):
        if not {"obs", "var"} <= {*file}:
            return None
        key = chosen_key(path, meant_in(file), asked.key)
        if key.startswith("uns/"):
            names, vectors = list(file[key]), [node[()] for node in file[key].values()]
        else:
            names, vectors = axis_names(file, key), dense(file[key])
    return Content("h5ad", names, vectors, (path,), {"table_key": key})


def meant_in(file: h5py.File) -> dict[str, str]:
    """{what may be the vectors: its shape, as shown}. Where obs are cells, it is in varm or uns."""
    of_genes = {"varm/" + name: file["varm"][name] for name in file.get("varm", ())}
    of_genes |= {f"uns/{k}": v for k, v in file.get("uns", {}).items() if holds_vectors(v)}
    of_rows = {"obsm/" + name: file["obsm"][name] for name in file.get("obsm", ())}
    if "X" in file and getattr(file["X"], "shape", True):
        of_rows = {"X": file["X"], **of_rows}
    cells = {"cell_type", "n_counts", "n_genes", "total_counts", *BATCH_COLUMNS} & {*file["obs"]}
    meant = of_genes if of_genes and cells else {**of_rows, **of_genes}
    return {name: node_shape(name, node) for name, node in meant.items()}


def holds_vectors(node: Any) -> bool:
    """Whether a node of uns is a dict of vectors."""
    values = list(node.values()) if hasattr(node, "values") else []
    return bool(values) and all(getattr(v, "ndim", 0) and v.dtype.kind in "fiu" for v in values)


def node_shape(name: str, node: Any) -> str:
    """'(3, 8)', also of sparse matrices and data frames; 'a dict of 3 vectors'."""
    if name.startswith("uns/"):
        return f"a dict of {count(len(node), 'vector')}"
    if "column-order" in node.attrs:
        return str((len(node[node.attrs["_index"]]), len(node.attrs["column-order"])))
    return str(tuple(map(int, node.attrs["shape"] if hasattr(node, "keys") else node.shape)))


def chosen_key(path: Path, meant: Mapping[str, str], asked: str | None) -> str:
    """The one thing that can be meant, or the one that --table-key names: obsm/KEY, or KEY."""
    named = [name for name in meant if asked in (name, name.partition("/")[2])]
    if len(named) == 1 or len(meant) == 1:
        return (named or [*meant])[0]
    listed = some((f"{name} {shape}" for name, shape in meant.items()), 20)
    if not meant:
        raise InputError(
            f"{path} holds no vectors: it has neither X nor obsm, varm or a dict in uns"
        )
    unknown = f", and no {asked!r}{did_you_mean(asked, meant)}" if asked and not named else ""
    raise InputError(
        f"{path} holds more than one thing that may be the vectors: {listed}{unknown}. Choose one "
        f"with --table-key, for instance --table-key {next(iter(meant))}"
    )


def axis_names(file: h5py.File, key: str) -> list[str]:
    """obs_names, or var_names of what lies in varm."""
    axis = file["var" if key.startswith("varm/") else "obs"]
    return [str(name) for name in read_values(axis[axis.attrs.get("_index", "_index")])]


def dense(node: Any) -> Any:
    """A matrix of anndata, whatever its form."""
    from anndata.io import read_elem

    matrix = read_elem(node)
    matrix = matrix.toarray() if hasattr(matrix, "toarray") else matrix
    return matrix.to_numpy() if hasattr(matrix, "to_numpy") else matrix


def hdf5_datasets(path: Path, asked: Asked) -> Content | None:
    """One dataset a protein; its name, or the attribute original_id."""
    file = hdf5(path)
    if file is None:
        return None
    with file, readable(path, "HDF5"):
        nodes = dict(file)
        names = [node.attrs.get("original_id", name) for name, node in nodes.items()]
        groups = [name for name, node in nodes.items() if hasattr(node, "keys")]
        if groups:
            raise InputError(
                f"{path} holds groups ({some(groups)}); expected one dataset a protein, or an .h5ad"
            )
        vectors = [node[()] for node in nodes.values()]
    return Content("HDF5, one dataset a protein", names, vectors, (path,))


def parquet(path: Path, asked: Asked) -> Content | None:
    """A column of genes, or the index, beside columns of numbers or of lists."""
    if not begins_with(path, b"PAR1"):
        return None
    import pyarrow.parquet

    with readable(path, ".parquet"):
        table = pyarrow.parquet.read_table(path)
    names, first = list(table.column_names), 0
    index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    if index and isinstance(index[0], str):  # else it only counts the rows
        first = names.index(index[0])
    return from_columns(
        path, "parquet", names, table.columns, key_column(path, names, first), asked
    )


def from_columns(
    path: Path, form: str, names: Sequence[str], columns: Any, key: int, asked: Asked
) -> Content:
    """What stands in columns, and which were left out."""
    genes, vectors, column, left_out = vectors_in(path, names, columns, key, asked.key)
    said = f"{count(len(left_out), 'column')} left out ({some(n or '(no name)' for n in left_out)})"
    part = {"table_key": column} if column else {}
    return Content(form, genes, vectors, (path,), part, (said,) if left_out else ())


def delimited(path: Path, asked: Asked) -> Content | None:
    """.csv and .tsv, gzip too: a column of genes beside columns of numbers or of lists."""
    with readable(path, "a gzip file"), opened(path) as file:
        first, second = (file.readline(1 << 24) for _ in range(2))
    try:
        line = first.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        return None
    delimiter = next((mark for mark in "\t,;" if mark in line), None)
    if delimiter is None or "\0" in line or line.lstrip()[:1] in (">", "{", "[", "<"):
        return None
    import pyarrow as pa
    from pyarrow import csv as arrow

    with readable(path, "text in columns"):
        cells = next(csv.reader([line], delimiter=delimiter))
    header = has_header(cells)
    more = second.count(delimiter.encode()) == len(cells) and b'"[' not in second
    if header and more:  # as R writes it: no name above the names of rows
        cells = ["", *cells]
    key = key_column(path, cells) if header else 0
    places = [str(i) for i in range(len(cells))]
    with readable(path, "text in columns"):
        squeezed = "gzip" if begins_with(path, b"\x1f\x8b") else None
        comma = delimiter == ";" and b"," in second
        table = arrow.read_csv(
            pa.input_stream(str(path), compression=squeezed),
            arrow.ReadOptions(block_size=1 << 24, column_names=places, skip_rows=int(header)),
            arrow.ParseOptions(delimiter=delimiter, newlines_in_values=b'"' in second),
            arrow.ConvertOptions(
                column_types={places[key]: pa.string()}, decimal_point="," if comma else "."
            ),
        )
    names = cells if header else places
    return from_columns(path, "text in columns", names, table.columns, key, asked)


OF_FILES = (
    torch_dict,
    npz,
    npy,
    h5ad,
    hdf5_datasets,
    parquet,
    safetensors,
    pickled,
    delimited,
)
"""The readers, in the order in which they are asked."""


def read_form(path: Path, asked: Asked) -> Content:
    """The content of a table, by the first reader whose form it is."""
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{path} is empty")
    try:
        for reader in OF_FOLDERS if path.is_dir() else OF_FILES:
            content = reader(path, asked)
            if content is not None:
                return content
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    raise InputError(
        f"{path} is no table of vectors that is known here. Forms: a {{gene: vector}} dict of "
        "torch.save, pickle or safetensors; .npz; .csv, .tsv or .parquet with a column of genes; "
        ".h5 with one dataset a protein; .h5ad; a folder of fair-esm's extract.py, of .pt or of "
        ".npy files, or with embeddings.npy and its list of keys"
    )
