"""Small .h5ad files, and the forms in which anndata, of today and of before, stores their nodes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse

OLD_PANDAS = int(pd.__version__.partition(".")[0]) < 3

SETTING = "" if OLD_PANDAS else "anndata.settings.allow_write_nullable_strings = False; "
"""What advice to write a file again begins with, where text is nullable by default."""


@contextlib.contextmanager
def changing(path: Path) -> Iterator[h5py.File]:
    """A file to be changed, by way of a copy: a data module may have it open still."""
    copy = path.with_suffix(".changed")
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        yield file
    copy.replace(path)


def write_element(path: Path, name: str, value: Any) -> None:
    """Store one element of a file in another way, by anndata."""
    with anndata.settings.override(allow_write_nullable_strings=True), changing(path) as file:
        if name in file:
            del file[name]
        group, _, key = f"/{name}".rpartition("/")
        anndata.io.write_elem(file[group or "/"], key, value)


def read_element(path: Path, name: str) -> Any:
    with h5py.File(path) as file:
        return anndata.io.read_elem(file[name])


def nullable(path: Path, name: str) -> None:
    """Text as `nullable-string-array`, as anndata 0.13 writes it with pandas 3."""
    write_element(path, name, pd.array(list(read_element(path, name)), dtype="string"))


def plain_text(path: Path, name: str) -> None:
    write_element(path, name, np.array(read_element(path, name), dtype=object).astype(str))


def nullable_categories(path: Path, name: str) -> None:
    nullable(path, f"{name}/categories")


def categorical(path: Path, name: str) -> None:
    write_element(path, name, pd.Categorical(read_element(path, name)))


def nullable_integer(path: Path, name: str) -> None:
    write_element(path, name, pd.array(read_element(path, name), dtype="Int64"))


def nullable_boolean(path: Path, name: str) -> None:
    write_element(path, name, pd.array(read_element(path, name), dtype="boolean"))


def whole_numbers(path: Path, name: str) -> None:
    write_element(path, name, np.asarray(read_element(path, name)).astype(int))


def compressed_columns(path: Path, name: str) -> None:
    write_element(path, name, scipy.sparse.csc_matrix(read_element(path, name)))


def compressed_rows(path: Path, name: str) -> None:
    write_element(path, name, scipy.sparse.csr_matrix(read_element(path, name)))


def data_frame(path: Path, name: str) -> None:
    values = pd.DataFrame(np.asarray(read_element(path, name)), read_element(path, "obs").index)
    values.columns = values.columns.astype(str)
    write_element(path, name, values)


def old_categorical(path: Path, name: str) -> None:
    """Codes that refer to their categories, as anndata wrote them before 0.7."""
    values = read_element(path, name)
    with changing(path) as file:
        del file[name]
        categories = file.create_dataset(
            f"obs/__categories/{name.removeprefix('obs/')}",
            data=list(values.categories),
            dtype=h5py.string_dtype(),
        )
        file[name] = values.codes
        file[name].attrs["categories"] = categories.ref


def without_encoding(path: Path, name: str) -> None:
    """A dense matrix as anndata wrote it before 0.7."""
    write_element(path, name, read_element(path, name).toarray())
    with changing(path) as file:
        for attribute in list(file[name].attrs):
            del file[name].attrs[attribute]


CONTROL = "non-targeting"


def write_screen(path: Path, genes: Iterable[str], unused: Iterable[str] = (), **columns: str):
    """A real .h5ad of one cell a label; `columns` renames target_gene."""
    labels = [*genes, CONTROL]
    obs = pd.DataFrame(
        {
            "target_gene": pd.Categorical(labels, categories=[*labels, *unused]),
            "cell_type": pd.Categorical(["c"] * len(labels)),
            "batch_var": pd.Categorical(["b"] * len(labels)),
        },
        index=[f"cell{i}" for i in range(len(labels))],
    ).rename(columns=columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    anndata.AnnData(np.ones((len(labels), 2), np.float32), obs=obs).write_h5ad(path)


TREE = ("a.h5", "b.h5ad", "c.h5ad", "notes.txt", "sub/a.h5ad", "sub/d.h5", "other/e.h5ad")
