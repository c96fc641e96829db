"""What --scale does to vectors: by the mean and spread of the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from state_esm_features.console import InputError
from state_esm_features.embedding.plot import vectors_around
from state_esm_features.embedding.scale import scaling_from, scaling_of
from state_esm_features.embedding.tables import Table
from state_esm_features.embedding.vectors import scaled

ROWS = np.array(
    # far from zero with a small spread, as dimensions of ESM2 are; one that never varies
    [[-4.20, 1.0, 0.1], [-4.25, 2.0, 0.1], [-4.15, 9.0, 0.1], [-4.24, 0.0, 0.1]],
    np.float32,
)


def table(rows: np.ndarray = ROWS, **more: list[float]) -> Table:
    vectors = {f"G{i}": torch.from_numpy(row) for i, row in enumerate(rows)}
    vectors |= {name: torch.tensor(row) for name, row in more.items()}
    return Table(Path("t.pt"), vectors, rows.shape[1])


def test_a_scaled_table_has_mean_zero_and_if_standard_spread_one() -> None:
    whole = table()
    centred = torch.stack([scaling_of(whole, False).of(v) for v in whole.vectors.values()])
    standard = torch.stack([scaling_of(whole, True).of(v) for v in whole.vectors.values()])
    assert centred.dtype == standard.dtype == torch.float32
    less = ROWS.astype(float) - ROWS.astype(float).mean(0)
    np.testing.assert_allclose(centred.numpy()[:, :2], less[:, :2], atol=1e-6)
    expected = less[:, :2] / ROWS.astype(float).std(0)[:2]
    np.testing.assert_allclose(standard.numpy()[:, :2], expected, atol=2e-5)
    np.testing.assert_allclose(standard.numpy()[:, :2].std(0), 1, atol=1e-5)


@pytest.mark.parametrize("standard", [False, True])
def test_a_dimension_of_one_value_becomes_exactly_zero_for_other_vectors_too(
    standard: bool,
) -> None:
    scaling = scaling_of(table(), standard)
    assert scaling.spread.tolist()[2] == 0
    assert scaling.of(torch.tensor([-4.2, 1.0, 0.1]))[2] == 0
    assert scaling.of(torch.tensor([-4.2, 1.0, 0.7]))[2] == 0  # computed, beside the table
    assert scaling.said == (
        "vectors less their mean"
        + (", each dimension in units of its spread" if standard else "")
        + ", over 4 genes of the table; 1 dimension of one value set to 0"
    )


def test_rows_that_no_label_can_use_do_not_count() -> None:
    more = {"control": [0.0] * 3, "NAN": [np.nan] * 3, "INF": [1.0, np.inf, 1.0]}
    one, two = scaling_of(table(), True), scaling_of(table(**more), True)
    assert (one.genes, one.mean.tolist(), one.spread.tolist()) == (
        *(two.genes, two.mean.tolist(), two.spread.tolist()),
    )


def test_statistics_come_back_from_the_manifest_bit_for_bit() -> None:
    made = scaling_of(table(), True)
    kept = scaling_from(json.loads(json.dumps(made.record())), True)
    assert torch.equal(made.mean, kept.mean) and torch.equal(made.spread, kept.spread)
    assert (kept.genes, kept.standard) == (4, True)


def test_a_table_of_one_vector_has_no_spread() -> None:
    with pytest.raises(InputError) as error:
        scaling_of(table(ROWS[[0, 0]]), True)
    assert str(error.value) == (
        "--scale needs a table of genes with different vectors, and the 2 genes of t.pt have one "
        "vector; leave --scale out"
    )


def test_a_gene_that_is_the_mean_would_be_the_control() -> None:
    scaling = scaling_of(table(np.array([[1.0, 1.0], [3.0, 5.0], [2.0, 3.0]], np.float32)), False)
    with pytest.raises(InputError) as error:
        scaled({"A": torch.tensor([1.0, 1.0]), "M": torch.tensor([2.0, 3.0])}, scaling)
    assert str(error.value) == (
        "the vector of 1 gene in use is the mean of the table (M): --scale makes zeros of it, "
        "which State takes for the control; leave --scale out"
    )


def test_genes_drawn_around_the_screen_are_scaled_as_its_own() -> None:
    whole = table(NAN=[np.nan] * 3)
    scaling = scaling_of(whole, True)
    [drawn] = vectors_around([whole], ["G1", "NAN"], scaling)
    assert torch.equal(drawn, scaling.of(whole["G1"]))
    [drawn] = vectors_around([whole], ["G1", "NAN"], None)
    assert torch.equal(drawn, whole["G1"])
