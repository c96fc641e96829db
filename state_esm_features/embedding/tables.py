"""Tables {gene: vector}: opened in whatever form they are in, and checked, once for all forms.

The forms stand in `table_forms` and `table_folders`. How a label finds its gene is not known here.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, Notes, count, some
from state_esm_features.embedding.downloads import arc_table_path
from state_esm_features.embedding.table_content import Asked, Content, without_dates
from state_esm_features.embedding.table_forms import read_form
from state_esm_features.embedding.table_keys import (
    NamedKeys,
    Namer,
    ids_of,
    name_keys,
    read_keys,
)
from state_esm_features.files import existing_file, sha256_of, sha256_of_files
from state_esm_features.option_groups import (
    ARC_BYTES,
    ARC_FILE,
    ARC_REPOSITORY,
    ARC_SHA256,
    SourceOptions,
)

if TYPE_CHECKING:
    import torch

KNOWN_TABLES = {ARC_SHA256: (ARC_BYTES, f"Arc's {ARC_FILE} of {ARC_REPOSITORY} (ESM2 15B)")}
"""{sha256: (bytes, what that table is)}."""


@dataclass(frozen=True)
class Table:
    """A table of embeddings on disk.

    Attributes
    ----------
    path
        The file, or the folder.
    vectors
        {key: tensor}; memory-mapped where the form allows it: a vector is read when it is used.
    width
        Length of every vector.
    form
        As the manifest names it.
    files
        Those of a folder.
    part
        The layer, or the key, where a table holds several.
    keys
        The genes that the keys are.
    dates
        Keys that were left out: a spreadsheet has made dates of symbols.
    agreement
        With the tables that are asked before it, as the manifest has it.
    """

    path: Path
    vectors: Mapping[str, torch.Tensor]
    width: int
    form: str = "torch dict"
    files: Sequence[Path] = ()
    part: Mapping[str, Any] = field(default_factory=dict)
    keys: NamedKeys = field(default_factory=NamedKeys)
    dates: tuple[str, ...] = ()
    agreement: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def symbols(self) -> Sequence[str]:
        """Every gene of it, by its first name."""
        return self.keys.symbols or list(self.vectors)

    def __contains__(self, gene: str) -> bool:
        return gene in self.vectors or gene in self.keys.genes

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self.vectors, self.keys.genes)

    def origin(self, gene: str) -> dict[str, Any]:
        """What the manifest says of a gene beside its source: its keys, where it is none itself."""
        keys = self.keys.genes.get(gene)
        return {"keys": ids_of(keys)} if keys else {}

    @cached_property
    def sha256(self) -> str:
        """Of the file; of a folder, over the names and contents of its files."""
        return sha256_of_files(self.files) if self.path.is_dir() else sha256_of(self.path)

    @cached_property
    def known_as(self) -> str | None:
        """What a known table is, whatever its file is called; other sizes are not hashed."""
        sizes = {size for size, _ in KNOWN_TABLES.values()}
        if not self.path.is_file() or self.path.stat().st_size not in sizes:
            return None
        return KNOWN_TABLES.get(self.sha256, (0, None))[1]

    def record(self) -> dict[str, Any]:
        """What the manifest says of the table."""
        return {
            "kind": "table",
            **({"known_as": self.known_as} if self.known_as else {}),
            "form": self.form,
            "path": str(self.path),
            "sha256": self.sha256,
            "genes": len(self.symbols),
            **self.keys.record(),
            **self.part,
            **({"dates_left_out": list(self.dates)} if self.dates else {}),
            **({"agreement": list(self.agreement)} if self.agreement else {}),
        }

    def __str__(self) -> str:
        size = f"{count(len(self.symbols), 'gene')} x {self.width:,}"
        return f"{self.path} ({', '.join(filter(None, [size, part_of(self.part), self.known_as]))})"

    def __getitem__(self, gene: str) -> torch.Tensor:
        """Vector of a gene as float32 (width,), a copy that owns its memory.

        Of several proteins it is their mean, as of those that are computed.
        """
        import torch

        keys = self.keys.genes.get(gene, (gene,))
        rows = [self.vectors[key].detach().reshape(-1).float() for key in keys]
        return rows[0].clone() if len(rows) == 1 else torch.stack(rows).double().mean(0).float()

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean vector of its genes, float32 (width,)."""
        import torch

        total, genes = torch.zeros(self.width, dtype=torch.float64), 0
        for vector in self.usable():
            total += vector
            genes += 1
        return (total / max(genes, 1)).float()

    def usable(self) -> Iterator[torch.Tensor]:
        """The vector of every gene, one in memory at a time.

        Rows of zeros (a control) and rows with NaN or infinity, which no label uses, do not count.
        """
        for gene in self.symbols:
            vector = self[gene]
            if 0 < vector.norm() < float("inf"):
                yield vector


def part_of(record: Mapping[str, Any]) -> str:
    """Which vectors of a table were read, as the manifest has it; nothing where it holds one."""
    parts = (name for name in ("layer", "table_key") if name in record)
    return ", ".join(f"{name.removeprefix('table_')} {record[name]}" for name in parts)


def load_table(
    path: Path,
    notes: Notes,
    asked: Asked | None = None,
    namers: Callable[[], Sequence[Namer]] = tuple,
) -> Table:
    """Open a table without executing anything in it and, where it can be mapped, without reading
    its vectors.

    Parameters
    ----------
    path
        A file or folder in one of the forms of docs/tables.md.
    asked
        --layer and --table-key.
    namers
        What tells which gene has a protein: called if a key may be the id of one.

    Raises
    ------
    InputError
        None of these forms; a damaged file, or one that can execute code; not one finite vector of
        one width a gene.
    """
    if not path.is_dir():
        existing_file(path, "embeddings table")
    content = read_form(path, asked or Asked())
    if not len(content.names):
        raise InputError(f"{path} holds an empty table")
    for text in content.said:
        notes.line(f"{path}: {text}")
    content, dates = without_dates(path, content, notes)
    keys = read_keys(path, content)
    rows = dict(zip((key.text for key in keys), tensors(path, content), strict=True))
    _check_shapes(path, rows)
    width = _one_width(path, rows)
    _check_dtypes(path, rows, notes)
    named = name_keys(keys, namers() if any(key.protein for key in keys) else ())
    for text in named.said():
        notes.line(f"{path}: {text}")
    return Table(path, rows, width, content.form, content.files, content.part, named, dates)


def tensors(path: Path, content: Content) -> list[torch.Tensor]:
    """The vectors as tensors, in the numbers in which they are stored."""
    import torch

    with warnings.catch_warnings(action="ignore"):  # of arrays that cannot be written into
        if hasattr(content.vectors, "dtype"):
            return list(torch.from_numpy(native(content.vectors)).unbind())
        made = [as_tensor(vector) for vector in content.vectors]
    wrong = {
        name: vector
        for name, vector, tensor in zip(content.names, content.vectors, made, strict=True)
        if tensor is None
    }
    if wrong:
        said = some(f"{name!r}: {described(vector)}" for name, vector in wrong.items())
        advice = ""
        if all(isinstance(vector, dict) for vector in wrong.values()):
            advice = ". Save the vector itself of each gene, for instance of one layer"
        raise InputError(
            f"{path}: {len(wrong):,} of {len(made):,} entries are not gene -> vector of numbers "
            f"({said}){advice}"
        )
    return [tensor for tensor in made if tensor is not None]


def described(value: Any) -> str:
    """What a value is that is no vector."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return f"dict of {some(value, 3)}"
    return f"array of {value.dtype}" if kind == "ndarray" else kind


def as_tensor(value: Any) -> torch.Tensor | None:
    """A vector as a tensor, without a copy where that can be; None if it is none."""
    import numpy as np
    import torch

    if torch.is_tensor(value):
        return value
    if isinstance(value, (list, tuple)):
        try:
            value = np.asarray(value)
        except ValueError:  # lists of unlike lengths
            return None
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in "biufc":
        return None
    return torch.from_numpy(native(np.asarray(value)))


def native(array: Any) -> Any:
    """Numbers in the order of bytes and the precisions that torch has."""
    import numpy as np

    dtype = np.dtype(np.float64) if array.dtype.itemsize == 16 and array.dtype.kind == "f" else None
    dtype = dtype or array.dtype.newbyteorder("=")
    return array if array.dtype == dtype and array.dtype.isnative else array.astype(dtype)


def _check_shapes(path: Path, rows: Mapping[str, torch.Tensor]) -> None:
    """One vector a gene: (width,) or (1, width)."""
    several = {
        gene: tuple(v.shape)
        for gene, v in rows.items()
        if v.dim() != 1 and not (v.dim() == 2 and len(v) == 1)
    }
    if not several:
        return
    gene, shape = next(iter(several.items()))
    shapes = {shape for shape in several.values() if len(shape) == 2}
    advice = ""
    if len(shapes) > 1 and len({s[1] for s in shapes}) == 1:
        advice = ". These are vectors of residues: save the mean over them, vector.mean(0)"
    elif len(shapes) > 1 and len({s[0] for s in shapes}) == 1:
        advice = ". These are vectors of residues, transposed: save the mean, vector.mean(1)"
    raise InputError(f"{path}: {gene!r} has shape {shape}; expected one vector a gene{advice}")


def _one_width(path: Path, rows: Mapping[str, torch.Tensor]) -> int:
    widths: dict[int, str] = {}
    for gene, vector in rows.items():
        widths.setdefault(vector.shape[-1], gene)
    if len(widths) > 1 or 0 in widths:
        seen = some(f"{w} ({gene!r})" for w, gene in widths.items())
        raise InputError(f"{path}: vectors of different widths: {seen}; one table, one width")
    return next(iter(widths))


def _check_dtypes(path: Path, rows: Mapping[str, torch.Tensor], notes: Notes) -> None:
    """Say what is converted to float32 (width,); refuse what is no real number."""
    import torch

    dtypes = {str(v.dtype).removeprefix("torch.") for v in rows.values()}
    if any(v.dtype.is_complex or v.dtype == torch.bool for v in rows.values()):
        raise InputError(f"{path}: {', '.join(sorted(dtypes))} values are no embeddings")
    if dtypes != {"float32"}:
        notes.line(f"{path}: {' and '.join(sorted(dtypes))} values are converted to float32")
    flat = sum(v.dim() == 2 for v in rows.values())
    if flat:
        notes.line(f"{path}: {count(flat, 'row')} of shape (1, width) flattened")


def open_tables(
    options: SourceOptions,
    layer: int | None,
    dry_run: bool,
    notes: Notes,
    namers: Callable[[], Sequence[Namer]] = tuple,
) -> list[Table]:
    """The tables of --esm-embeddings, all of one width; Arc's if there is no source at all.

    `layer` is --layer: of folders that hold several; `namers` as in `load_table`.
    """
    paths = options.esm_embeddings or ([] if options.fasta else [arc_table_path(dry_run)])
    asked = Asked(layer, options.table_key)
    tables = [load_table(path, notes, asked, namers) for path in paths if path is not None]
    parts = {name for table in tables for name in table.part}
    if layer is not None and not options.fasta and "layer" not in parts:
        notes.warn(f"--layer {layer}: no table given holds layers")
    if options.table_key is not None and "table_key" not in parts:
        notes.warn(f"--table-key {options.table_key}: no table given holds more than one")
    for table in tables[1:]:
        if table.width != tables[0].width:
            raise InputError(
                f"tables of different widths: {tables[0].path} has {tables[0].width}, {table.path} "
                f"has {table.width}; use tables of one ESM2 model"
            )
    return tables
