"""True and predicted effects of perturbations, without shared noise, and how well they agree.

Which perturbations are unseen is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from state_esm_features.console import InputError, some
from state_esm_features.evaluation.cells import column, group_means, halves

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

TRUE, PREDICTED = "adata_real.h5ad", "adata_pred.h5ad"
"""What `state tx predict` writes: a row a cell of the test in both, in one order."""

METRICS = {
    "pearson": ("higher", "1 is perfect, 0 is chance"),
    "mse": ("lower", "0 is perfect"),
    "discrimination": ("higher", "1 is perfect, 0.5 is chance"),
}
"""{ours: which way is better, and what it is for a perfect prediction and for chance}."""

CELL_EVAL = {
    "cell_eval_pearson": "pearson_delta",
    "cell_eval_mse": "mse",
    "cell_eval_discrimination": "discrimination_score_l1",
}
"""{name here: cell-eval's name} of the same three, computed by cell-eval 0.8. Its mse is of
expression, and its true and predicted effects share the control cells."""

KEYS = ["cell_type", "perturbation"]


@dataclass(frozen=True)
class Effects:
    """Changes of mean expression against control cells.

    Attributes
    ----------
    pairs
        (cell type, perturbation) of each row, sorted.
    true, predicted
        float64 (pairs, genes)
    """

    pairs: Sequence[tuple[str, str]]
    true: np.ndarray
    predicted: np.ndarray


def read_effects(folder: Path, pert_col: str, cell_type_key: str, control: str) -> Effects:
    """Effects from what `state tx predict` wrote into `folder`.

    The control cells of each cell type are halved. A true effect is the mean of the perturbed cells
    less that of one half; a predicted one is the mean of what is predicted for them less what is
    predicted for the cells of the other half. So the two share no control cell by which they could
    agree: context_mean 'predicts' the true control cells, and its effects would share their noise.

    Raises
    ------
    InputError
        A cell type has less than two control cells in the test.
    """
    import numpy as np

    true = folder / TRUE
    labels, types = column(true, pert_col), column(true, cell_type_key)
    keys = list(zip(types.tolist(), labels.tolist(), strict=True))
    cell_types = sorted({*types.tolist()})
    pairs = sorted({key for key in keys if key[1] != control})
    number = {key: i for i, key in enumerate([*pairs, *((t, control) for t in cell_types)])}
    groups = np.array([number[key] for key in keys])
    controls = np.flatnonzero(labels == control)
    few = [t for t in cell_types if (types[controls] == t).sum() < 2]
    if few:
        raise InputError(
            f"{true}: less than two control cells ({control!r}) of {some(few)}: effects need two "
            "halves of them. Hold out a cell type that has more"
        )
    other = np.zeros(len(keys), dtype=bool)
    for cell_type in cell_types:
        rows = controls[types[controls] == cell_type]
        other[rows] = halves(true, rows)
    is_control = labels == control

    def effects(path: Path, left_out: np.ndarray) -> np.ndarray:
        means = group_means(path, np.where(is_control & left_out, -1, groups), len(number))
        base = {t: means[number[t, control]] for t in cell_types}
        return means[: len(pairs)] - np.array([base[t] for t, _ in pairs]).reshape(len(pairs), -1)

    return Effects(pairs, effects(true, other), effects(folder / PREDICTED, ~other))


def score(effects: Effects) -> pd.DataFrame:
    """A row a (cell type, perturbation): how well the predicted effect agrees with the true one.

    pearson
        Correlation over genes. NaN of an effect that is the same for all genes.
    mse
        Mean squared difference over genes.
    discrimination
        How many true effects of other perturbations of the cell type are further from the
        predicted one than the right one, as a share (L1 distance; of as far ones, half). NaN of a
        perturbation that is alone.
    """
    import numpy as np
    import pandas as pd

    true, predicted = effects.true, effects.predicted
    x, y = (v - v.mean(1, keepdims=True) for v in (true, predicted))
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    found = pd.DataFrame(effects.pairs, columns=KEYS)
    found["pearson"] = pearson
    found["mse"] = ((true - predicted) ** 2).mean(1)
    found["discrimination"] = np.nan
    for rows in found.groupby("cell_type").indices.values():
        for i in rows if len(rows) > 1 else ():
            distances = np.abs(true[rows] - predicted[i]).sum(1)
            right = np.abs(true[i] - predicted[i]).sum()
            further = (distances > right).sum() + ((distances == right).sum() - 1) / 2
            found.loc[i, "discrimination"] = further / (len(rows) - 1)
    return found


def read_cell_eval(folder: Path) -> pd.DataFrame:
    """cell-eval's values of every (cell type, perturbation), as `state tx predict` wrote them."""
    import pandas as pd

    ending, tables = "_results.csv", []
    for file in sorted(folder.glob(f"*{ending}")):
        if not file.name.endswith(f"_agg{ending}"):
            # NA may be a gene
            table = pd.read_csv(file, keep_default_na=False, na_values=["", "NaN"])
            tables.append(table.assign(cell_type=file.name.removesuffix(ending)))
    names = {theirs: ours for ours, theirs in CELL_EVAL.items()}
    if not tables:
        return pd.DataFrame(columns=[*KEYS, *names.values()])
    joined = pd.concat(tables, ignore_index=True).reindex(columns=[*KEYS, *names])
    return joined.rename(columns=names)


def all_scores(folder: Path, pert_col: str, cell_type_key: str, control: str) -> pd.DataFrame:
    """Our values of every (cell type, perturbation), and cell-eval's beside them."""
    ours = score(read_effects(folder, pert_col, cell_type_key, control))
    theirs = read_cell_eval(folder).astype(dict.fromkeys(KEYS, str))
    return ours.merge(theirs, on=KEYS, how="left")
