"""Means and differences with their intervals, by perturbation and seed.

What is compared, and what follows from it, is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the 95 % interval of a bootstrap.

    Attributes
    ----------
    low, high
        NaN of less than two perturbations or seeds.
    perturbations, seeds
        Of which it is the mean.
    """

    mean: float
    low: float
    high: float
    perturbations: int
    seeds: int

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0


def by_perturbation(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a perturbation, a column a seed: the mean of a metric over cell types.

    Perturbations without a value in some seed and cell type are left out: else means over unlike
    cell types would be compared.
    """
    lacking = scores.loc[scores[metric].isna(), "perturbation"]
    whole = scores[~scores["perturbation"].isin(lacking)]
    values = whole.groupby(["perturbation", "seed"])[metric].mean().unstack("seed")
    return values.sort_index().dropna()


def difference(own: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """own - other, each as of `by_perturbation`: paired by perturbation and by seed."""
    return (own - other).dropna(axis=1, how="all").dropna()


def bootstrap(values: np.ndarray, alike: bool = False, resamples: int = RESAMPLES) -> Interval:
    """The mean of values, and its interval over perturbations, then seeds.

    Perturbations are drawn with replacement. To each draw comes one of the seeds: their means vary
    around the true one as Student's t of seeds - 1 degrees of freedom says, the same for all
    perturbations, as a training that went well did so for all of them. Intervals by drawing three
    seeds with replacement held zero in 81 to 93 % of simulations without a difference, these in 95
    to 97 %. The generator is always the same.

    Parameters
    ----------
    values
        float (perturbations, seeds)
    alike
        Every seed gives the same, as of a method that only counts: one is enough.
    """
    import numpy as np

    perturbations, seeds = values.shape
    if not values.size:
        return Interval(np.nan, np.nan, np.nan, perturbations, seeds)
    mean = float(values.mean())
    if perturbations < 2 or (seeds < 2 and not alike):
        return Interval(mean, np.nan, np.nan, perturbations, seeds)
    rng = np.random.default_rng(0)
    rows = rng.multinomial(perturbations, np.full(perturbations, 1 / perturbations), resamples)
    means = rows @ values.mean(1) / perturbations
    if not alike:
        error = values.mean(0).std(ddof=1) / np.sqrt(seeds)
        means = means + error * rng.standard_t(seeds - 1, resamples)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), perturbations, seeds)
