"""What --scale does to the vectors of genes, by the statistics of the one table they come from.

What a label gets of its genes' vectors stands in `vectors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, count
from state_esm_features.embedding.tables import Table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scaling:
    """The mean that is taken off vectors and, if `standard`, what each dimension is divided by.

    Attributes
    ----------
    genes
        Of the table, over which the statistics are.
    mean, spread
        float32 (width,); the spread is the standard deviation of all of these genes (ddof 0), 0 of
        a dimension that has one value.
    """

    standard: bool
    genes: int
    mean: torch.Tensor
    spread: torch.Tensor

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """A scaled vector, float32 (width,): 0 where the table has one value for all genes.

        So a computed vector beside the table cannot stand out there by nothing but rounding.
        """
        less = (vector - self.mean).where(self.spread > 0, 0.0)
        return less / self.spread.where(self.spread > 0, 1.0) if self.standard else less

    def record(self) -> dict[str, Any]:
        """What the manifest keeps, for labels that are added later."""
        return {
            "genes": self.genes,
            "mean": self.mean.tolist(),
            "spread": self.spread.tolist(),
        }

    @property
    def said(self) -> str:
        """What was done, in words."""
        flat = int((self.spread == 0).sum())
        how = "less their mean" + (
            ", each dimension in units of its spread" if self.standard else ""
        )
        zero = f"; {count(flat, 'dimension')} of one value set to 0" if flat else ""
        return f"vectors {how}, over {count(self.genes, 'gene')} of the table{zero}"


def scaling_of(table: Table, standard: bool) -> Scaling:
    """The statistics of a table, over all genes of which `Table.usable` gives a vector.

    Sums are of differences to the first vector: a dimension may have a mean of 4 and a spread of
    0.04, and one that never varies has a spread of exactly 0.

    Raises
    ------
    InputError
        Fewer than two different vectors.
    """
    import torch

    first, genes = None, 0
    total = squares = torch.zeros(table.width, dtype=torch.float64)
    for vector in table.usable():
        first = vector if first is None else first
        less = vector.double() - first.double()
        total, squares, genes = total + less, squares + less**2, genes + 1
    spread = (squares / max(genes, 1) - (total / max(genes, 1)) ** 2).clamp(min=0).sqrt().float()
    if first is None or not spread.any():
        raise InputError(
            f"--scale needs a table of genes with different vectors, and the "
            f"{count(genes, 'gene')} of {table.path} {'has' if genes == 1 else 'have'} one vector; "
            "leave --scale out"
        )
    mean = (first.double() + total / genes).float()
    return Scaling(standard, genes, mean, spread)


def scaling_from(record: Mapping[str, Any], standard: bool) -> Scaling:
    """The statistics that a manifest keeps."""
    import torch

    mean, spread = (torch.tensor(record[name], dtype=torch.float32) for name in ("mean", "spread"))
    return Scaling(standard, record["genes"], mean, spread)
