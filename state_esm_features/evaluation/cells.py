"""Means of groups of cells, read a block at a time.

Which cells make a group is decided elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.h5ad import is_sparse, matrix_shape, open_column, open_h5ad

if TYPE_CHECKING:
    import h5py
    import numpy as np

BLOCK = 4096
"""Cells that are read at once."""


def blocks(node: h5py.Group | h5py.Dataset) -> Iterator[tuple[int, Any]]:
    """(index of the first cell, matrix of a block of cells) of X, dense or CSR."""
    if is_sparse(node):
        from anndata.io import sparse_dataset

        node = sparse_dataset(node)
    for start in range(0, node.shape[0], BLOCK):
        yield start, node[start : start + BLOCK]


def group_means(path: Path, groups: np.ndarray, number: int) -> np.ndarray:
    """Mean of X over the cells of each group.

    Parameters
    ----------
    groups
        int (cells,): the group of a cell, -1 of those that are in none.
    number
        Of groups.

    Returns
    -------
    means
        float64 (groups, genes); NaN of a group without cells.
    """
    import numpy as np
    import scipy.sparse

    with open_h5ad(path) as file:
        sums = np.zeros((number, matrix_shape(file["X"])[1]))
        for start, block in blocks(file["X"]):
            of_block = groups[start : start + block.shape[0]]
            rows = np.flatnonzero(of_block >= 0)
            ones = np.ones(len(rows))
            shape = (number, block.shape[0])
            which = scipy.sparse.csr_matrix((ones, (of_block[rows], rows)), shape)
            summed = which @ block
            sums += summed.toarray() if scipy.sparse.issparse(summed) else summed
    sizes = np.bincount(groups[groups >= 0], minlength=number)
    with np.errstate(invalid="ignore"):
        return sums / sizes[:, None]


def column(path: Path, name: str) -> np.ndarray:
    """(cells,) of an obs column, as text."""
    import numpy as np

    with open_h5ad(path) as file:
        categories, codes = open_column(file, name)
        return np.asarray(categories, dtype=object).astype(str)[codes[:]]


def halves(path: Path, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """bool (rows,): a random half of these cells, the same in whatever order they stand.

    Of a cell that is there several times each copy is drawn for itself: halves of a sample with
    replacement stay independent.
    """
    import numpy as np

    wanted = set(np.asarray(rows).tolist())
    digests: dict[int, bytes] = {}
    copies: dict[bytes, int] = {}
    with open_h5ad(path) as file:
        for start, block in blocks(file["X"]):
            for i in sorted(wanted & set(range(start, start + block.shape[0]))):
                row = block[i - start]
                dense = row.toarray() if hasattr(row, "toarray") else row
                content = np.ascontiguousarray(dense, dtype=np.float32).tobytes()
                digest = hashlib.blake2b(content, digest_size=16).digest()
                copies[digest] = copies.get(digest, 0) + 1
                again = digest + copies[digest].to_bytes(8, "little")
                digests[i] = hashlib.blake2b(again, digest_size=16).digest()
    order = sorted(digests, key=lambda i: digests[i])
    first = set(order[: len(order) // 2])
    return np.array([i in first for i in np.asarray(rows).tolist()], dtype=bool)
