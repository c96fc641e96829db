"""Tables {gene: vector} as people keep them, one reader a form; none executes what it reads.

How a label finds its gene is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, Notes, count, first_line, some
from state_esm_features.embedding.downloads import arc_table_path
from state_esm_features.files import existing_file, read_torch, sha256_of
from state_esm_features.option_groups import SourceOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Table:
    """A table of embeddings on disk.

    Attributes
    ----------
    path
        The file.
    vectors
        {gene symbol: tensor}; memory-mapped, so a vector is read when it is used.
    width
        Length of every vector.
    """

    path: Path
    vectors: Mapping[str, torch.Tensor]
    width: int

    @property
    def symbols(self) -> Iterable[str]:
        """Every gene of it."""
        return self.vectors

    def __contains__(self, gene: str) -> bool:
        return gene in self.vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self.vectors)

    def origin(self, gene: str) -> dict[str, Any]:
        """What the manifest says of a gene beside its source: nothing, of a table."""
        return {}

    def record(self) -> dict[str, Any]:
        """What the manifest says of the table."""
        return {
            "kind": "table",
            "path": str(self.path),
            "sha256": sha256_of(self.path),
            "genes": len(self.vectors),
        }

    def __str__(self) -> str:
        return f"{self.path} ({count(len(self.vectors), 'gene')} x {self.width:,})"

    def __getitem__(self, gene: str) -> torch.Tensor:
        """Vector of a gene as float32 (width,), a copy that owns its memory."""
        import torch

        return self.vectors[gene].detach().reshape(-1).to(torch.float32, copy=True)

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean vector of its genes, float32 (width,); one vector is in memory at a time.

        Rows of zeros (a control) and rows with NaN or infinity, which no label uses, do not count.
        """
        import torch

        total, genes = torch.zeros(self.width, dtype=torch.float64), 0
        for gene in self.vectors:
            vector = self[gene]
            if 0 < vector.norm() < torch.inf:
                total += vector
                genes += 1
        return (total / max(genes, 1)).float()


def load_table(path: Path, notes: Notes) -> Table:
    """Open a table without executing anything in it and without reading its vectors.

    Parameters
    ----------
    path
        .npz with `genes` (n,) and `embeddings` (n, width), or a file of torch.save holding
        {symbol: tensor (width,) or (1, width)}.

    Raises
    ------
    InputError
        Not such a file, mixed widths, or a pickle that holds more than tensors.
    """
    existing_file(path, "embeddings table")
    content = _read_npz(path) if path.suffix.lower() == ".npz" else read_torch(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no {{symbol: vector}} table, but {type(content).__name__}")
    if not content:
        raise InputError(f"{path} holds an empty table")
    import torch

    wrong = [k for k, v in content.items() if not isinstance(k, str) or not torch.is_tensor(v)]
    if wrong:
        raise InputError(
            f"{path}: {len(wrong):,} of {len(content):,} entries are not symbol -> tensor "
            f"({some(f'{k!r}: {type(content[k]).__name__}' for k in wrong)})"
        )
    widths: dict[int, str] = {}
    for gene, vector in content.items():
        if vector.dim() != 1 and not (vector.dim() == 2 and len(vector) == 1):
            raise InputError(
                f"{path}: {gene!r} has shape {tuple(vector.shape)}; expected one vector a gene"
            )
        widths.setdefault(vector.shape[-1], gene)
    if len(widths) > 1 or 0 in widths:
        seen = some(f"{w} ({gene!r})" for w, gene in widths.items())
        raise InputError(f"{path}: vectors of different widths: {seen}; one table, one width")
    _check_dtypes(path, content, notes)
    return Table(path, content, next(iter(widths)))


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    import zipfile

    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as arrays:
            genes, embeddings = arrays["genes"], arrays["embeddings"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is no table: expected arrays `genes` (n,) of text and "
            f"`embeddings` (n, width) ({first_line(error)})"
        ) from error
    shapes_ok = genes.ndim == 1 and embeddings.ndim == 2 and len(genes) == len(embeddings)
    if not shapes_ok or genes.dtype.kind not in "US" or embeddings.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: expected `genes` (n,) of text and `embeddings` (n, width), found "
            f"{genes.dtype} {genes.shape} and {embeddings.dtype} {embeddings.shape}"
        )
    table = dict(zip(genes.astype(str).tolist(), torch.from_numpy(embeddings), strict=True))
    if len(table) < len(genes):
        repeated = len(genes) - len(table)
        raise InputError(f"{path}: {count(repeated, 'repeated gene')} in `genes`; keep one each")
    return table


def _check_dtypes(path: Path, content: Mapping[str, torch.Tensor], notes: Notes) -> None:
    """Say what is converted to float32 (width,); refuse what is no real number."""
    import torch

    dtypes = {str(v.dtype).removeprefix("torch.") for v in content.values()}
    if any(v.dtype.is_complex or v.dtype == torch.bool for v in content.values()):
        raise InputError(f"{path}: {', '.join(sorted(dtypes))} values are no embeddings")
    if dtypes != {"float32"}:
        notes.line(f"{path}: {' and '.join(sorted(dtypes))} values are converted to float32")
    rows = sum(v.dim() == 2 for v in content.values())
    if rows:
        notes.line(f"{path}: {count(rows, 'row')} of shape (1, width) flattened")


def open_tables(options: SourceOptions, dry_run: bool, notes: Notes) -> list[Table]:
    """The tables of --esm-embeddings, all of one width; Arc's if there is no source at all."""
    paths = options.esm_embeddings or ([] if options.fasta else [arc_table_path(dry_run)])
    tables = [load_table(path, notes) for path in paths if path is not None]
    for table in tables[1:]:
        if table.width != tables[0].width:
            raise InputError(
                f"tables of different widths: {tables[0].path} has {tables[0].width}, {table.path} "
                f"has {table.width}; use tables of one ESM2 model"
            )
    return tables
