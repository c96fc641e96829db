"""How many loader workers a training gets, on machines that are no more than numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cell_load.config import ExperimentConfig

from state_esm_features.training.data import Columns, Data, DataFile
from state_esm_features.training.preflight import Machine, choose_workers
from state_esm_features.training.stock import compose

PLENTY = 2**60
GENES = 18_080
TRAIN = ExperimentConfig({"d": "d.h5ad"}, {"d": "train"}, {}, {})
VALIDATES = ExperimentConfig({"d": "d.h5ad"}, {"d": "train"}, {}, {"d.t": {"val": ["a"]}})


def workers(
    machine: Machine,
    *overrides: str,
    experiment: ExperimentConfig = TRAIN,
    cells: int = 10**6,
) -> int:
    """Of a training of state_sm on one file of so many cells of perturbation a."""
    of_file = (["a", "b"], ["t"], np.array([[cells, cells]]), [], GENES)
    file = DataFile("d", Path("d.h5ad"), *of_file, True, True, {}, frozenset())
    data = Data(experiment, Columns("p", "b", "t", "control"), [file])
    return choose_workers(compose(["model=state_sm", *overrides]), data, machine)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (3, 3), (12, 12), (64, 12)])
def test_as_many_as_cores_and_at_most_the_twelve_of_state(cores: int, expected: int) -> None:
    assert workers(Machine(cores, PLENTY, PLENTY)) == expected


BATCH = 4 * GENES * 4 * 16 * 256
"""Bytes of 4 batches of 16 sets of 128 + 128 cells."""
CACHED = 4 * GENES * 10_000
"""Bytes of the 10,000 rows that a worker keeps at most."""


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (2 * 7 * (BATCH + CACHED), 7),
        (2 * 7 * (BATCH + CACHED) - 1, 6),
        (2 * (BATCH + CACHED) - 1, 0),
        (-(10**6), 0),
    ],
)
def test_they_fit_in_half_of_the_free_memory(memory: int, expected: int) -> None:
    assert workers(Machine(64, memory, PLENTY)) == expected


def test_validation_has_workers_of_its_own() -> None:
    machine = Machine(64, 2 * 7 * (BATCH + CACHED), PLENTY)
    assert workers(machine, experiment=VALIDATES) == 3


def test_of_a_small_file_no_more_rows_are_kept_than_it_has() -> None:
    each = BATCH + 4 * GENES * 200
    assert workers(Machine(64, 2 * 5 * each, PLENTY), cells=100) == 5


def test_consecutive_loading_keeps_no_rows() -> None:
    machine = Machine(64, 2 * 7 * BATCH, PLENTY)
    assert workers(machine, "data.kwargs.use_consecutive_loading=true") == 7


@pytest.mark.parametrize(("shared", "expected"), [(3 * BATCH, 3), (BATCH - 1, 0)])
def test_batches_fit_in_shared_memory(shared: int, expected: int) -> None:
    """Docker has 64 MB of it."""
    assert workers(Machine(64, PLENTY, shared)) == expected


def test_each_gpu_has_its_share_of_the_cores_and_of_the_memory() -> None:
    assert workers(Machine(12, PLENTY, PLENTY), "training.devices=4") == 3
    assert workers(Machine(64, 2 * 8 * (BATCH + CACHED), PLENTY), "training.devices=4") == 2
