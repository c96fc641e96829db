"""The figures as one picture: seen and unseen perturbations, real and planted screens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from state_esm_features.console import count
from state_esm_features.evaluation.design import METHODS, REAL
from state_esm_features.evaluation.groups import SEEN, UNSEEN
from state_esm_features.evaluation.summary import ALL, DIFFERENCE, PRIMARY
from state_esm_features.evaluation.table import title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

STYLE: Mapping[str, tuple[str, str, float]] = {
    UNSEEN: ("#D55E00", "D", -0.16),
    SEEN: ("#0072B2", "o", 0.16),
}
"""{group: colour, marker, shift}; two colours that the colour-blind can tell apart."""


def draw(figures: pd.DataFrame, scores: pd.DataFrame, name: str) -> Figure:
    """Correlations of every method, a panel a screen, and own - shuffled below.

    Parameters
    ----------
    figures, scores
        As `summarise` returns and takes them.
    name
        Of what was evaluated.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    screens = list(dict.fromkeys(figures["screen"]))
    of_screens = [_methods(figures, screen) for screen in screens]
    rows = max(map(len, of_screens))
    size = (max(7.5, 2.2 + 4.2 * len(screens)), 2.6 + 0.55 * (rows + 1))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(screens), sharex=True, squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for axes, screen, methods in zip(panels, screens, of_screens, strict=True):
        handles |= _panel(axes, screen, methods, figures, scores)
        axes.set_ylim(rows - 0.4, -0.6)
    figure.legend(
        list(handles.values()),
        _legend(figures, handles),
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    figure.suptitle(f"{name}: correlation of predicted with true effects")
    return figure


def _methods(figures: pd.DataFrame, screen: str) -> list[str]:
    there = {*figures.loc[figures["screen"] == screen, "method"]}
    return [m for m in (*METHODS, DIFFERENCE) if m in there]


def _legend(figures: pd.DataFrame, groups: Mapping[str, Line2D]) -> list[str]:
    real = figures[(figures["cell_type"] == ALL) & (figures["metric"] == PRIMARY)]
    sizes = (real["perturbations"] + real["left_out"]).groupby(real["group"]).max()
    return [f"{g} ({count(int(sizes[g]), 'perturbation')})" for g in groups]


def _panel(
    axes: Axes, screen: str, methods: Sequence[str], figures: pd.DataFrame, scores: pd.DataFrame
) -> dict[str, Line2D]:
    """One screen: a dot a seed, the mean and its interval as a bar; returns {group: handle}."""
    chosen = figures[
        (figures["screen"] == screen)
        & (figures["cell_type"] == ALL)
        & (figures["metric"] == PRIMARY)
    ].set_index(["group", "method"])
    handles = {}
    for group, (colour, marker, shift) in STYLE.items():
        for y, method in enumerate(methods):
            if (group, method) not in chosen.index:
                continue
            row, place = chosen.loc[(group, method)], y + shift
            axes.plot((row["low"], row["high"]), (place, place), color=colour, lw=2.2)
            axes.plot(row["mean"], place, "|", color=colour, ms=13, mew=2.5)
            dots = seed_means(scores, screen, group, method)
            handles[group] = axes.plot(
                dots, [place] * len(dots), marker, color=colour, ms=6, alpha=0.5, mew=0
            )[0]
    axes.axvline(0, color="0.4", lw=1, ls=":")
    if DIFFERENCE in methods:
        axes.axhline(methods.index(DIFFERENCE) - 0.5, color="0.8", lw=1)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_title(title(screen), fontsize=11)
    axes.set_xlabel("correlation (0 is chance)" if screen == REAL else "correlation")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def seed_means(scores: pd.DataFrame, screen: str, group: str, method: str) -> list[float]:
    """Mean of a method in each seed; of own - shuffled their difference, seed by seed."""
    chosen = scores[(scores["screen"] == screen) & (scores["group"] == group)]

    def means(name: str) -> pd.Series:
        of = chosen[chosen["method"] == name]
        one_each = of.groupby(["seed", "perturbation"])[PRIMARY].mean()
        return one_each.groupby("seed").mean()

    if method == DIFFERENCE:
        own, other = method.split(" - ")
        return [float(x) for x in (means(own) - means(other)).dropna()]
    return [float(x) for x in means(method)]
