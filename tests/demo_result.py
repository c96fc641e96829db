"""What the demo ends with: a table and a picture of predicted against true effects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from demo_data import CONTROL, Screen

SEEN, UNSEEN, UNSEEN_TYPE = "seen genes", "unseen genes", "unseen genes, unseen cell type"

COLOURS = ("#0072B2", "#D55E00")
"""Of seen and unseen genes: two that the colour-blind can tell apart."""

Effects = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""{group: (true, predicted effects), both (perturbations, genes)}."""


def mean_effects(
    data: anndata.AnnData, controls: anndata.AnnData
) -> dict[tuple[str, str], np.ndarray]:
    """{(cell type, label): mean expression minus that of the control cells, (genes,)}."""
    found = {}
    for (cell_type, label), rows in data.obs.groupby(["cell_type", "target_gene"], observed=True):
        of_type = controls.obs.index[controls.obs["cell_type"] == cell_type]
        base = controls[of_type].X.mean(0)
        found[cell_type, label] = np.asarray(data[rows.index].X.mean(0) - base).ravel()
    return found


def read_effects(truth: Path, predicted: Path, screen: Screen) -> Effects:
    """True and predicted effects of three groups of perturbations."""
    data = anndata.read_h5ad(truth)
    controls = data[data.obs["target_gene"] == CONTROL]
    both = [mean_effects(x, controls) for x in (data, anndata.read_h5ad(predicted))]
    trained, held_out = screen.cell_types
    seen = [s for s in screen.symbols if s not in {*screen.unseen, *screen.validation}]
    groups = {
        SEEN: [(trained, s) for s in seen],
        UNSEEN: [(trained, s) for s in screen.unseen],
        UNSEEN_TYPE: [(held_out, s) for s in screen.unseen],
    }
    return {
        group: tuple(np.array([effects[k] for k in keys]) for effects in both)  # type: ignore[misc]
        for group, keys in groups.items()
    }


def correlations(effects: Effects) -> pd.Series:
    """{group: Pearson correlation of predicted with true effect, mean over perturbations}."""
    return pd.Series(
        {
            group: np.mean([np.corrcoef(t, p)[0, 1] for t, p in zip(*both, strict=True)])
            for group, both in effects.items()
        }
    )


def draw(columns: Mapping[str, Effects], path: Path) -> None:
    """Predicted against true effects: vectors side by side, seen genes above unseen ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 7.8), dpi=120, layout="constrained")
    panels = figure.subplots(2, len(columns), sharex=True, sharey=True, squeeze=False)
    shown = [effects[group] for effects in columns.values() for group in (SEEN, UNSEEN)]
    limit = 1.05 * max(np.abs(np.concatenate(both)).max() for both in shown)
    for row, group, colour in zip(panels, (SEEN, UNSEEN), COLOURS, strict=True):
        for panel, (vectors, effects) in zip(row, columns.items(), strict=True):
            true, predicted = effects[group]
            panel.plot((-limit, limit), (-limit, limit), color="0.3", linewidth=0.8)
            alpha = min(0.5, 1000 / true.size)
            panel.plot(true.ravel(), predicted.ravel(), "o", color=colour, alpha=alpha, ms=3, mew=0)
            panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
            found = correlations({group: effects[group]})[group]
            panel.set_title(f"{group}, {vectors}\ncorrelation {found:.2f}", fontsize=12)
            panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("true effect (change of log expression)", fontsize=12)
    figure.supylabel("predicted effect", fontsize=12)
    figure.savefig(path)
