"""The figures as a table, for programs (TSV) and for people (Markdown)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from state_esm_features.console import count
from state_esm_features.evaluation.design import REAL, strength_of
from state_esm_features.evaluation.effects import METRICS
from state_esm_features.evaluation.summary import ALL, EVERY_METRIC, PRIMARY

if TYPE_CHECKING:
    import pandas as pd

NOTES = f"""\
Correlation, mse and discrimination compare predicted with true changes of mean expression, which
share no control cell. Intervals (95 %) are of a bootstrap over perturbations, with the spread of
the seeds. A perturbation counts once: as its mean over cell types.

- **pearson**: {METRICS["pearson"][0]} is better, {METRICS["pearson"][1]}.
- **mse**: {METRICS["mse"][0]} is better, {METRICS["mse"][1]}.
- **discrimination**: how many other true effects are further from the prediction than the right
  one; {METRICS["discrimination"][1]}.
- **cell-eval** computes the same three on effects that share the control cells, and mse on
  expression.
- **unseen**: no training cell has the perturbation, or another one with one of its genes.
- **own - shuffled**: paired by perturbation and seed."""


def as_tsv(figures: pd.DataFrame) -> str:
    """Every figure, six digits."""
    text: str = figures.to_csv(sep="\t", index=False, float_format="%.6g", na_rep="NaN")
    return text


def title(screen: str) -> str:
    """'Real cells', 'Planted, strength 0.5'."""
    return "Real cells" if screen == REAL else f"Planted, strength {strength_of(screen):g}"


def shown(row: pd.Series, with_interval: bool = True) -> str:
    """'0.31 (0.25 to 0.36)'; of small numbers two digits that say something."""

    def number(value: float) -> str:
        if not math.isfinite(value):
            return "NaN"
        return f"{value + 0.0:.2g}" if 0 < abs(value) < 0.01 else f"{round(value, 2) + 0.0:.2f}"

    text = number(row["mean"])
    if with_interval and math.isfinite(row["low"]):
        text += f" ({number(row['low'])} to {number(row['high'])})"
    return text + (f", {row['left_out']:,} NaN" if row["left_out"] else "")


def as_markdown(figures: pd.DataFrame, sentences: Sequence[str]) -> str:
    """The sentences, then a table a screen and group, then cell types."""
    parts = ["# Do the vectors help?", *sentences]
    overall = figures[figures["cell_type"] == ALL]
    for (screen, group), rows in overall.groupby(["screen", "group"], sort=False):
        seeds, n = int(rows["seeds"].max()), int((rows["perturbations"] + rows["left_out"]).max())
        of = f"{count(n, 'perturbation')}, {count(seeds, 'seed')}"
        parts.append(f"## {title(screen)}: {group} ({of})\n\n{_metrics_table(rows)}")
    by_type = figures[(figures["cell_type"] != ALL) & (figures["metric"] == PRIMARY)]
    for screen, rows in by_type.groupby("screen", sort=False):
        parts.append(f"## {title(screen)}: correlation by cell type\n\n{_types_table(rows)}")
    return "\n\n".join([*parts, NOTES]) + "\n"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metrics_table(figures: pd.DataFrame) -> str:
    rows = []
    for method, of in figures.groupby("method", sort=False):
        cells = of.set_index("metric")
        texts = [shown(cells.loc[m], m in METRICS) for m in EVERY_METRIC]
        rows.append([str(method), *texts])
    names = [m.replace("cell_eval_", "cell-eval: ") for m in EVERY_METRIC]
    return _rows(["", *names], rows)


def _types_table(figures: pd.DataFrame) -> str:
    methods = list(dict.fromkeys(figures["method"]))
    rows = []
    for (group, cell_type), of in figures.groupby(["group", "cell_type"], sort=False):
        cells = of.set_index("method")
        n = int(cells["perturbations"].max())
        texts = [shown(cells.loc[m]) if m in cells.index else "" for m in methods]
        rows.append([f"{group}, {cell_type} ({n:,})", *texts])
    return _rows(["", *methods], rows)
