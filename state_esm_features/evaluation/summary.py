"""The figures of an evaluation: of every perturbation and seed, then means and intervals.

What may be concluded from them stands in `conclude`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from state_esm_features.evaluation.design import BASELINES, CONTROLLED, METHODS, REAL
from state_esm_features.evaluation.effects import CELL_EVAL, METRICS
from state_esm_features.evaluation.groups import GROUPS
from state_esm_features.evaluation.intervals import Interval, bootstrap, by_perturbation, difference

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"
"""In place of a cell type: the mean over cell types, perturbation by perturbation."""

DIFFERENCE = " - ".join(CONTROLLED)
"""The primary figure, in place of a method."""

PRIMARY = "pearson"
EVERY_METRIC = (*METRICS, *CELL_EVAL)

COLUMNS = ("screen", "group", "cell_type", "method", "metric")
FIGURES = ("mean", "low", "high", "sd_seeds", "perturbations", "left_out", "seeds")


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a (screen, group, cell type or all, method or difference, metric).

    Parameters
    ----------
    scores
        A row a (screen, method, seed, group, cell_type, perturbation), with the metrics.

    Returns
    -------
    figures
        mean, low and high as of `bootstrap`; sd_seeds: of the means of the seeds; perturbations:
        of which it is the mean; left_out: those without a value in some seed.
    """
    import pandas as pd

    rows = []
    for screen, of_screen in _in_order(scores, "screen", _screens(scores)):
        for group, of_group in _in_order(of_screen, "group", GROUPS):
            types = sorted(of_group["cell_type"].unique())
            for cell_type in (ALL, *types):
                kept = (
                    of_group if cell_type == ALL else of_group[of_group["cell_type"] == cell_type]
                )
                keys = {"screen": screen, "group": group, "cell_type": cell_type}
                rows += [keys | row for row in _of_methods(kept)]
    return pd.DataFrame(rows, columns=[*COLUMNS, *FIGURES])


def _screens(scores: pd.DataFrame) -> list[str]:
    return sorted(scores["screen"].unique(), key=lambda s: (s != REAL, s))


def _in_order(
    table: pd.DataFrame, name: str, order: Sequence[str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    for value in order:
        rows = table[table[name] == value]
        if len(rows):
            yield value, rows


def _of_methods(scores: pd.DataFrame) -> Iterator[dict[str, object]]:
    n = scores["perturbation"].nunique()
    for metric in EVERY_METRIC:
        values = {m: by_perturbation(x, metric) for m, x in _in_order(scores, "method", METHODS)}
        if {*CONTROLLED} <= {*values}:
            own, other = (values[m] for m in CONTROLLED)
            values[DIFFERENCE] = difference(own, other)
        for method, table in values.items():
            found = bootstrap(table.to_numpy(), alike=method in BASELINES)
            row = {"method": method, "metric": metric, **vars(found)}
            of_seeds = table.mean()
            yield row | {"sd_seeds": of_seeds.std(), "left_out": n - found.perturbations}


def interval(figures: pd.DataFrame, screen: str, group: str, method: str) -> Interval | None:
    """The primary figure over all cell types, or None if there is none."""
    rows = figures[
        (figures["screen"] == screen)
        & (figures["group"] == group)
        & (figures["cell_type"] == ALL)
        & (figures["method"] == method)
        & (figures["metric"] == PRIMARY)
    ]
    if rows.empty:
        return None
    row = rows.iloc[0]
    mean, low, high = (float(row[k]) for k in ("mean", "low", "high"))
    return Interval(mean, low, high, int(row["perturbations"]), int(row["seeds"]))
