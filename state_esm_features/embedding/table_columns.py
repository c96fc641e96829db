"""Columns of a .csv, .tsv or .parquet: which holds the genes, and which their vectors.

How such a file is read is not known here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, some
from state_esm_features.option_groups import GENE_LIST_COLUMNS

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ID_COLUMNS = ("ensembl_gene_id", "uniprot")
"""Columns of genes, asked for after those of gene lists."""

ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__|index")
"""Names that pandas gives to the numbers of rows."""

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def key_column(path: Path, names: Sequence[str], first: int = 0) -> int:
    """The place of the column of genes: by its name, else `first`."""
    usual = [name for name in GENE_LIST_COLUMNS if name in names]
    if len(usual) > 1:
        raise InputError(
            f"{path} has more than one column of genes ({', '.join(usual)}); keep one of them"
        )
    named = next((name for name in (*usual, *ID_COLUMNS) if name in names), None)
    return first if named is None else list(names).index(named)


def has_header(cells: Sequence[str]) -> bool:
    """Whether a first line names columns: numbers do so only if they count them."""
    numbers = [cell for cell in cells[1:] if NUMBER.fullmatch(cell)]
    counted = [str(i) for i in range(len(cells))]
    return len(numbers) < len(cells[1:]) or cells[1:] in (counted[:-1], counted[1:])


def vectors_in(
    path: Path,
    names: Sequence[str],
    columns: Sequence[pa.ChunkedArray],
    key: int,
    asked: str | None,
) -> tuple[list[str | None], Any, str | None, list[str]]:
    """Genes and vectors of columns.

    Parameters
    ----------
    key
        The place of the column of genes.
    asked
        The column of lists that is meant, where there are several.

    Returns
    -------
    genes, vectors
        A list of rows, or a float32 matrix (genes, width).
    column
        The column of lists, if it is one.
    left_out
        Columns that are neither.
    """
    import pyarrow as pa

    genes = columns[key].cast(pa.string()).to_pylist()
    if all(re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", gene or "") for gene in genes):
        raise InputError(f"{path} has no column of genes: {names[key]!r} holds numbers")
    others = [i for i in range(len(names)) if i != key]
    lists = [names[i] for i in others if holds_lists(columns[i])]
    if lists:
        column = lists[0] if len(lists) == 1 else asked
        if column not in lists:
            raise InputError(
                f"{path} has several columns of lists ({some(lists)}); choose one with --table-key"
            )
        left_out = [names[i] for i in others if names[i] != column]
        at = next(i for i in others if names[i] == column)
        return genes, list_rows(path, column, columns[at]), column, left_out
    numbers = [i for i in others if is_number(columns[i]) and not ROW_NUMBERS.fullmatch(names[i])]
    dimensions = numbered([names[i] for i in numbers])
    numbers = [i for i in numbers if names[i] in dimensions]
    left_out = [names[i] for i in others if i not in set(numbers)]
    for i in others:
        check_text(path, names[i], columns[i], genes)
    if not numbers:
        raise InputError(
            f"{path} has no column of numbers beside the genes in {names[key]!r}; columns: "
            f"{some(names, 20)}"
        )
    return genes, number_matrix([columns[i] for i in numbers]), None, left_out


def numbered(names: Sequence[str]) -> set[str]:
    """Those columns of numbers that are dimensions of the vectors.

    Where most of them are numbered (0, 1, ...; dim_0, dim_1, ...), the others are something else
    that is known of the gene: a length, an Entrez id. Else all are.
    """
    stems = {name: name.rstrip("0123456789") for name in names}
    members = Counter(stem for name, stem in stems.items() if stem != name)
    dimensions = {name for name, stem in stems.items() if stem != name and members[stem] > 1}
    return dimensions if 2 * len(dimensions) > len(stems) else set(stems)


def is_number(column: pa.ChunkedArray) -> bool:
    """Whether a column holds numbers."""
    import pyarrow as pa

    return pa.types.is_integer(column.type) or pa.types.is_floating(column.type)


def is_text(column: pa.ChunkedArray) -> bool:
    """Whether a column holds text."""
    import pyarrow as pa

    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def holds_lists(column: pa.ChunkedArray) -> bool:
    """Whether a column holds lists of numbers, also written as text: [0.1, 0.2] or [0.1 0.2]."""
    import pyarrow as pa

    first = next((v for v in column.slice(0, 1).to_pylist()), None) if is_text(column) else None
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(kind(column.type) for kind in kinds) or str(first).lstrip().startswith("[")


def list_rows(path: Path, name: str, column: pa.ChunkedArray) -> list[Any]:
    """The vectors of a column of lists."""
    import pyarrow as pa

    if not is_text(column):
        if pa.types.is_nested(column.type.value_type):  # a vector for each residue: refused later
            return column.to_pylist()
        rows = (row.values for row in column)
        return [row if row is None else row.to_numpy(zero_copy_only=False) for row in rows]
    import pyarrow.compute as pc

    if pc.any(pc.match_substring(column, "...")).as_py():
        raise InputError(
            f"{path}: the lists in column {name!r} were shortened to '...' when they were written, "
            "so their numbers are lost. Write the table again in another form, such as .parquet"
        )
    try:
        some_rows = (column.slice(start, 500) for start in range(0, len(column), 500))
        return [row for rows in some_rows for texts in rows.chunks for row in numbers_in(texts)]
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: column {name!r} holds lists with other than numbers") from error


def numbers_in(texts: pa.Array) -> list[np.ndarray]:
    """The numbers of each text such as [0.1, 0.2] or [0.1 0.2], float64."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    bare = pc.utf8_trim(pc.fill_null(texts, ""), characters="[], \t\r\n")
    words = pc.ascii_split_whitespace(pc.replace_substring(bare, ",", " "))
    numbers = pc.cast(words.flatten(), pa.float64()).to_numpy(zero_copy_only=False)
    return np.split(numbers, words.offsets.to_numpy()[1:-1])


def check_text(path: Path, name: str, column: pa.ChunkedArray, genes: Sequence[str | None]) -> None:
    """Refuse a column of numbers with some text in it, which would be left out as text."""
    cells = column.slice(0, 1000).to_pylist() if is_text(column) else []
    numbers = sum(bool(NUMBER.fullmatch(cell or "")) for cell in cells)
    if 2 * numbers <= len(cells):
        return
    cells = column.to_pylist()
    at = next(i for i, cell in enumerate(cells) if not NUMBER.fullmatch(cell or ""))
    raise InputError(
        f"{path}: column {name!r} holds numbers and text ({cells[at]!r} for {genes[at]}); mend it, "
        "or take the column out"
    )


def number_matrix(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """Columns of numbers as float32 (rows, columns); no value is NaN."""
    import numpy as np

    matrix = np.empty((len(columns[0]), len(columns)), dtype=np.float32)
    for i, column in enumerate(columns):
        with np.errstate(over="ignore"):  # infinity is refused where it is used
            matrix[:, i] = column.to_numpy()
    return matrix
