"""Whether two tables of one width are of one model: vectors that both have of a gene, compared.

Tables are given open; how a gene is found in them is not known here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from state_esm_features.console import Notes, count, some
from state_esm_features.embedding.tables import Table

FEWEST_SHARED, MOST_SHARED = 20, 300
"""Genes that two tables must share, and those that are compared. Less the mean of those compared,
20 of the 542 kinase domains gave the median cosine of all, less the mean of all, within 0.003, and
300 within 0.001, at medians of 0.97 to 1."""

ONE_MODEL = 0.99
"""Median cosine from which on two tables are taken for those of one model: in float16 or bfloat16
they have 1.0000."""


@dataclass(frozen=True)
class Agreement:
    """How alike the vectors are that two tables have of the same genes.

    Attributes
    ----------
    shared, compared
        Genes of both tables; those whose vectors were compared.
    median_cosine
        Less the mean of the genes compared, which is each table's own; None of too few genes.
    unlike
        {gene: cosine} of the first two below ONE_MODEL.
    """

    shared: int
    compared: int
    median_cosine: float | None
    unlike: dict[str, float]

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "genes_in_both": self.shared,
            "compared": self.compared,
            "median_cosine": self.median_cosine,
        }


def agreement(one: Table, other: Table) -> Agreement:
    """Compare two tables of one width, in at most MOST_SHARED of their genes: always the same."""
    import torch

    shared = [gene for gene in one.symbols if gene in other]
    genes = shared[:: max(1, math.ceil(len(shared) / MOST_SHARED))]
    vectors = [{gene: table[gene] for gene in genes} for table in (one, other)]
    sound = [gene for gene in genes if all(0 < of[gene].norm() < torch.inf for of in vectors)]
    if len(sound) < FEWEST_SHARED:
        return Agreement(len(shared), len(sound), None, {})
    first, second = (torch.stack([of[gene] for gene in sound]).double() for of in vectors)
    first, second = first - first.mean(0), second - second.mean(0)
    cosines = torch.nn.functional.cosine_similarity(first, second).tolist()
    unlike = [(g, round(c, 4)) for g, c in zip(sound, cosines, strict=True) if c < ONE_MODEL]
    median = round(statistics.median(cosines), 4)
    return Agreement(len(shared), len(sound), median, dict(unlike[:2]))


def compare_tables(tables: Sequence[Table], notes: Notes) -> list[Table]:
    """The tables, each with its agreement with those that are asked before it."""
    compared: list[Table] = []
    untold: list[str] = []
    for table in tables:
        found = [(before, agreement(before, table)) for before in compared]
        for before, seen in found:
            pair = f"{table.path} and {before.path}"
            if seen.median_cosine is None:
                untold.append(f"{pair} ({seen.shared})")
            elif seen.median_cosine < ONE_MODEL:
                notes.warn(of_two_models(pair, seen))
        records = ({"with": str(t.path), **seen.record()} for t, seen in found)
        compared.append(replace(table, agreement=tuple(records)))
    if untold:
        notes.line(
            f"too few genes in common, by name, to tell whether tables are of one model: "
            f"{some(untold)}"
        )
    return compared


def of_two_models(pair: str, seen: Agreement) -> str:
    """The warning of tables that have other vectors of the same genes."""
    shown = ", ".join(f"{gene} {cosine:.3f}" for gene, cosine in seen.unlike.items())
    return (
        f"{pair} have {count(seen.shared, 'gene')} in common, with other vectors: the median "
        f"cosine of {seen.compared:,} of them is {seen.median_cosine:.3f}, less their means "
        f"({shown}, ...). They seem to be of two models, or pooled otherwise: vectors of the two "
        "are not to be mixed. Give tables of one model"
    )
