"""What a reader of a table is asked for, what it returns, and how it says that a file is damaged.

The readers stand in `table_forms` and `table_folders`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError
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
