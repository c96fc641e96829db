"""Two tables whose widths agree may still be of two models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from state_esm_features.console import Notes
from state_esm_features.embedding.table_agreement import agreement, compare_tables
from state_esm_features.embedding.tables import Table


def random_table(name: str, vectors: torch.Tensor, start: int = 0) -> Table:
    """Genes G0, G1, ... of these rows, or from a later number on."""
    genes = {f"G{start + i}": vector for i, vector in enumerate(vectors)}
    return Table(Path(name), genes, vectors.shape[1])


def drawn(genes: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    """Vectors that have nearly all in common, as those of ESM2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(genes, 16, generator=generator) + offset


def noted(*tables: Table) -> tuple[list[Table], list[str]]:
    notes = Notes()
    return compare_tables(tables, notes), [text for _, text in notes.noted]


def test_tables_of_two_models_are_told_though_their_vectors_look_alike() -> None:
    one, other = drawn(700, 1, 30.0), drawn(650, 2, 30.0)
    assert torch.nn.functional.cosine_similarity(one[:650], other).median() > 0.99
    (_, second), said = noted(random_table("a.pt", one), random_table("b.pt", other))
    first, last = one[:650:3].double(), other[::3].double()  # 217 of 650
    cosines = torch.nn.functional.cosine_similarity(
        first - first.mean(0), last - last.mean(0)
    ).tolist()
    median = sorted(cosines)[108]
    assert said == [
        "warning: b.pt and a.pt have 650 genes in common, with other vectors: the median cosine of "
        f"217 of them is {median:.3f}, less their means (G0 {cosines[0]:.3f}, G3 {cosines[1]:.3f}, "
        "...). They seem to be of two models, or pooled otherwise: vectors of the two are not to "
        "be mixed. Give tables of one model"
    ]
    assert second.agreement == (
        {"with": "a.pt", "genes_in_both": 650, "compared": 217, "median_cosine": round(median, 4)},
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_tables_of_one_model_are_not_told_whatever_their_numbers(kind: torch.dtype) -> None:
    one = drawn(40, 1, 2.0)
    (first, second), said = noted(random_table("a.pt", one), random_table("b.pt", one.to(kind)))
    assert (said, first.agreement) == ([], ())
    assert second.agreement == (
        {"with": "a.pt", "genes_in_both": 40, "compared": 40, "median_cosine": 1.0},
    )


def test_a_few_genes_that_differ_make_no_other_model() -> None:
    one = drawn(300, 1)
    other = one.clone()
    other[:140] = drawn(140, 2)
    assert noted(random_table("a.pt", one), random_table("b.pt", other))[1] == []
    other[:160] = drawn(160, 3)
    assert len(noted(random_table("a.pt", one), random_table("b.pt", other))[1]) == 1


def test_of_too_few_genes_nothing_is_told_but_how_many_were_compared() -> None:
    one, other = drawn(30, 1), drawn(30, 2)
    one[10], other[11, 0] = 0, torch.nan  # a control, and what no label uses
    (_, second), said = noted(random_table("a.pt", one), random_table("b.pt", other, start=9))
    seen = agreement(random_table("a.pt", one), random_table("b.pt", other, start=9))
    assert (seen.shared, seen.compared, seen.median_cosine) == (21, 19, None)
    assert said == [
        "too few genes in common, by name, to tell whether tables are of one model: b.pt and a.pt "
        "(21)"
    ]
    assert second.agreement == (
        {"with": "a.pt", "genes_in_both": 21, "compared": 19, "median_cosine": None},
    )


def test_each_table_is_compared_with_all_before_it() -> None:
    one, other = drawn(40, 1), drawn(40, 2)
    tables = [random_table(f"{i}.pt", rows) for i, rows in enumerate((one, other, one))]
    found, said = noted(*tables)
    assert [[of["with"] for of in table.agreement] for table in found] == [
        [],
        ["0.pt"],
        ["0.pt", "1.pt"],
    ]
    assert [text[:21] for text in said] == ["warning: 1.pt and 0.p", "warning: 2.pt and 1.p"]
