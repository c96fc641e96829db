"""The figures as one picture: seen and unseen perturbations, real and planted screens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from state_esm_features.console import count
from state_esm_features.evaluation.design import METHODS
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


LIMIT = 1.05
"""Correlations are within 1."""


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
    methods = [m for m in (*METHODS, DIFFERENCE) if m in {*figures["method"]}]
    size = (max(7.5, 1.5 + 4.0 * len(screens)), 2.2 + 0.62 * len(methods))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(screens), sharex=True, sharey=True, squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for axes, screen in zip(panels, screens, strict=True):
        handles |= _panel(axes, screen, methods, figures, scores)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(max(low, -LIMIT), min(high, LIMIT))  # of two seeds an interval may be longer
    figure.legend(
        list(handles.values()),
        _legend(figures, handles),
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    figure.suptitle(f"{name}: a dot is a seed, the line their mean, the bar its 95 % interval")
    return figure


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
    axes.set_title(title(screen), fontsize=11)
    axes.set_xlabel("correlation of predicted with true effects")
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
