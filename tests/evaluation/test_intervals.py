"""A bootstrap over perturbations, then seeds: exact where it can be, and always the same."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from state_esm_features.evaluation.intervals import bootstrap, by_perturbation, difference


def test_values_that_do_not_vary_have_an_interval_of_no_width() -> None:
    found = bootstrap(np.full((5, 3), 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)
    assert (found.perturbations, found.seeds) == (5, 3)


def test_interval_is_that_of_the_mean_of_normal_values() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.2, size=(400, 1))
    found = bootstrap(values, alike=True)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.0015)
    assert found.high == pytest.approx(values.mean() + half, abs=0.0015)
    assert bootstrap(values, alike=True) == found  # the generator is always the same


def test_seeds_that_differ_widen_the_interval_however_many_perturbations_there_are() -> None:
    values = np.tile([-0.3, 0.0, 0.3], (1000, 1))
    found = bootstrap(values)
    assert found.mean == pytest.approx(0)
    half = 4.303 * 0.3 / np.sqrt(3)  # the quantile of Student's t, 2 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(-half, rel=0.1), pytest.approx(half, rel=0.1))
    assert not found.above_zero and not found.below_zero


def test_three_seeds_of_one_sign_are_no_proof() -> None:
    """What drawing three seeds with replacement would call one."""
    assert bootstrap(np.tile([0.01, 0.1, 0.2], (1000, 1))).low < 0


def test_intervals_hold_zero_as_often_as_they_say_where_there_is_nothing() -> None:
    """Seeds and perturbations both vary: 95 % of 400 draws, give or take three of its errors."""
    rng, holds = np.random.default_rng(2), 0
    for _ in range(400):
        of_seeds, of_perturbations = rng.normal(0, 0.1, (1, 3)), rng.normal(0, 0.1, (30, 1))
        found = bootstrap(of_seeds + of_perturbations + rng.normal(0, 0.1, (30, 3)), resamples=2000)
        holds += found.low <= 0 <= found.high
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / 400) < holds / 400, holds


@pytest.mark.parametrize("n", [0, 1])
def test_of_less_than_two_perturbations_or_seeds_there_is_no_interval(n: int) -> None:
    assert np.isnan(bootstrap(np.ones((5, n))).low)
    found = bootstrap(np.ones((n, 3)))
    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(found.mean) == (n == 0)
    assert not found.above_zero and not found.below_zero


def test_above_and_below_zero() -> None:
    values = np.linspace(0.1, 0.2, 20)[:, None] + [0.0, 0.001]
    assert bootstrap(values).above_zero and not bootstrap(values).below_zero
    assert bootstrap(-values).below_zero and not bootstrap(-values).above_zero


def scores(method: str, values: dict[tuple[str, str, int], float]) -> pd.DataFrame:
    rows = [(method, t, p, s, v) for (t, p, s), v in values.items()]
    return pd.DataFrame(rows, columns=["method", "cell_type", "perturbation", "seed", "pearson"])


def test_a_perturbation_counts_once_and_pairs_stay_pairs() -> None:
    own = scores(
        "own",
        {
            ("K562", "A", 0): 0.5,
            ("HeLa", "A", 0): 0.7,
            ("K562", "B", 0): 0.2,
            ("K562", "C", 0): np.nan,
            ("K562", "A", 1): 0.4,
            ("K562", "B", 1): 0.3,
            ("K562", "C", 1): 0.9,
            ("K562", "D", 0): 0.5,
            ("HeLa", "D", 0): np.nan,
            ("K562", "D", 1): 0.5,
            ("HeLa", "D", 1): 0.1,
        },
    )
    table = by_perturbation(own, "pearson")
    assert table.index.tolist() == ["A", "B"]  # C and D have no value in one seed
    assert table.to_numpy() == pytest.approx(np.array([[0.6, 0.4], [0.2, 0.3]]))
    other = table.assign(**{"2": 0.0}).drop("B") / 2  # type: ignore[arg-type]
    assert difference(table, other).to_numpy() == pytest.approx(np.array([[0.3, 0.2]]))
