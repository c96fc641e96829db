"""Which cell goes to which split, by cell-load's rule, on data that are no more than counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from cell_load.config import ExperimentConfig

from state_esm_features.training.data import Columns, Data, DataFile

LABELS = ["A", "B", "A+B", "ctrl"]


def splits(
    zeroshot: Mapping[str, str],
    fewshot: Mapping[str, Mapping[str, list[str]]],
    training: Mapping[str, str] | None = None,
) -> dict[str, dict[str, int]]:
    """{split: {label: cells}} of a dataset d: of cell type t 1, 2, 3 and 9 cells, of u 10 times
    as many."""
    cells = np.array([[1, 2, 3, 9], [10, 20, 30, 90]])
    of_file = (LABELS, ["t", "u"], cells, [], 5, True, True, {}, frozenset())
    file = DataFile("d", Path("d.h5ad"), *of_file)
    trains = {"d": "train"} if training is None else dict(training)
    experiment = ExperimentConfig({"d": "d.h5ad"}, trains, dict(zeroshot), dict(fewshot))
    data = Data(experiment, Columns("p", "b", "c", "ctrl"), [file])
    return {split: dict(cells) for split, cells in data.splits.items()}


EVERY = {"A": 11, "B": 22, "A+B": 33}
BOTH, ODD = {"val": ["A"], "test": ["A", "B"]}, {"test": ["A+B", "ctrl", "nobody"]}
OF_T, OF_U = {"A": 1, "B": 2, "A+B": 3}, {"A": 10, "B": 20, "A+B": 30}


@pytest.mark.parametrize(
    ("zeroshot", "fewshot", "train", "val", "test"),
    [
        ({}, {}, EVERY, {}, {}),
        ({"d.t": "test"}, {}, OF_U, {}, OF_T),
        ({"d.t": "val", "d.u": "train"}, {}, OF_U, OF_T, {}),
        ({}, {"d.t": {"val": ["A"]}}, {"A": 10, "B": 22, "A+B": 33}, {"A": 1}, {}),
        (
            {},
            {"d.t": {"val": ["A"], "test": ["A", "B"]}},
            {**OF_U, "A+B": 33},
            {"A": 1},
            {"A": 1, "B": 2},
        ),
        ({}, {"d.t": {"train": ["A"]}}, EVERY, {}, {}),
        (
            {},
            {"d.t": {"test": ["A+B", "ctrl", "nobody"]}},
            {"A": 11, "B": 22, "A+B": 30},
            {},
            {"A+B": 3},
        ),
        ({"d.t": "test"}, {"d.t": {"val": ["A"]}}, OF_U, {}, OF_T),  # zero-shot wins
        ({"e.t": "test"}, {"e.u": {"val": ["A"]}}, EVERY, {}, {}),  # of another dataset
    ],
)
def test_held_out_cells_go_where_cell_load_puts_them(
    zeroshot: dict[str, str],
    fewshot: dict[str, dict[str, list[str]]],
    train: dict[str, int],
    val: dict[str, int],
    test: dict[str, int],
) -> None:
    """test_train_preflight.py holds the same against cell-load's own data module."""
    assert splits(zeroshot, fewshot) == {"train": train, "val": val, "test": test}


def test_of_a_dataset_that_does_not_train_only_what_is_held_out_is_read() -> None:
    assert splits({"d.t": "test"}, {}, {}) == {"train": {}, "val": {}, "test": OF_T}
    assert splits({}, {"d.u": {"val": ["A"]}}, {}) == {
        "train": {"B": 20, "A+B": 30},
        "val": {"A": 10},
        "test": {},
    }
