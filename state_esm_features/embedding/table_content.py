"""What a reader of a table is asked for, what it returns, and what of that is damaged.

The readers stand in `table_forms` and `table_folders`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, Notes, count, some
from state_esm_features.embedding.excel_dates import symbols_behind
from state_esm_features.files import cannot_read

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Asked:
    """Which part of a table is meant: --layer and --table-key."""

    layer: int | None = None
    key: str | None = None


@dataclass(frozen=True)
class Content:
    """What a reader found.

    Attributes
    ----------
    form
        As the manifest names it.
    names
        Of the vectors, as they stand there.
    vectors
        Arrays, tensors or lists, one a name; or the rows of a matrix.
    files
        What was read: the file itself, or those of a folder.
    part
        The layer or key that was read, as the manifest has it.
    said
        What a person may want to know of it.
    headers
        The names are headers of FASTA records.
    """

    form: str
    names: Sequence[Any]
    vectors: Sequence[Any]
    files: tuple[Path, ...]
    part: Mapping[str, Any] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    headers: bool = False


def without_dates(path: Path, content: Content, notes: Notes) -> tuple[Content, tuple[str, ...]]:
    """What is no date, and the keys that are: nobody knows of which symbol they were made."""
    dates = tuple(str(name) for name in content.names if symbols_behind(str(name)))
    if not dates:
        return content, ()
    listed = f"dates that a spreadsheet made of symbols ({some(dates)})"
    if len(dates) == len(content.names):
        raise InputError(f"{path}: all {len(dates):,} keys are {listed}; write the symbols again")
    notes.warn(f"{path}: {count(len(dates), 'row')} left out, whose keys are {listed}")
    rows = zip(content.names, content.vectors, strict=True)
    kept = [(name, vector) for name, vector in rows if not symbols_behind(str(name))]
    names, vectors = zip(*kept, strict=True)
    return replace(content, names=names, vectors=vectors), dates


@contextlib.contextmanager
def readable(path: Path, form: str) -> Iterator[None]:
    """Turn what a library says of damaged bytes, of whatever kind, into an error of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise cannot_read(path, form, error, 200) from error


def matrix_rows(path: Path, names: np.ndarray, named: str, matrix: np.ndarray, of: str) -> Any:
    """The rows of a matrix, if there is one for each name."""
    fits = names.ndim == 1 and matrix.ndim == 2 and len(names) == len(matrix)
    if fits and names.dtype.kind in "US" and matrix.dtype.kind in "fiu":
        return matrix
    flipped = names.ndim == 1 and matrix.ndim == 2 and len(names) == matrix.shape[1]
    raise InputError(
        f"{path}: expected `{named}` (n,) of text and `{of}` (n, width), found {names.dtype} "
        f"{names.shape} and {matrix.dtype} {matrix.shape}"
        + ("; the matrix is transposed, save its .T" if flipped else "")
    )
