"""A screen of the same design whose response is made of the vectors: the positive control.

Files, labels, cell types, cells of each and genes are those of the real screen. Every cell is
drawn, with replacement, from the control cells of its file and cell type. What is expressed in a
perturbed one is multiplied by 1 + fold, where the fold changes of a perturbation are a linear
function of its standardised vector, the same in all cell types. What is not expressed stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.evaluation.cells import column, group_means
from state_esm_features.experiment import toml_text
from state_esm_features.files import write_json, write_text
from state_esm_features.training.data import Columns, Data, DataFile

if TYPE_CHECKING:
    import numpy as np

TOML, MEASURED = "config.toml", "measured.json"
"""Files of a planted screen; the last is written last."""


@dataclass(frozen=True)
class Response:
    """What is planted.

    Attributes
    ----------
    folds
        {label: float64 (genes,)}: fold change less 1, of labels that have a vector of their own.
    rms
        Root mean square over cell types, labels and genes of the changes of mean expression.
    """

    folds: Mapping[str, np.ndarray]
    rms: float


def real_effect(data: Data) -> tuple[float, list[dict[str, np.ndarray]]]:
    """RMS of the effects of a screen less their noise, and what control cells express.

    Perturbed and control cells of each (file, cell type, perturbation) are halved at random. The
    noise of the two halves is independent, so the mean product of their effects is that of the
    effects without noise. Where that is below zero, nothing can be told from noise: 0.

    Returns
    -------
    rms
        Over pairs of cell type and perturbation, and genes: each pair counts once.
    controls
        For each file {cell type: float64 (genes,)}, the mean of its control cells.
    """
    import numpy as np

    products, controls = [], []
    rng = np.random.default_rng(0)
    for f in data.files:
        means, keys = _half_means(f, data.columns, rng)
        index = {key: i for i, key in enumerate(keys)}
        control = data.columns.control
        controls.append({t: means[:, index[t, control]].mean(0) for t in f.by_type})
        for (cell_type, label), i in index.items():
            if label != control:
                both: np.ndarray = means[:, i] - means[:, index[cell_type, control]]
                if np.isfinite(both).all():  # of one cell there are no halves
                    products.append(float((both[0] * both[1]).mean()))
    mean = float(np.mean(products)) if products else 0.0
    return max(0.0, mean) ** 0.5, controls


def _half_means(
    f: DataFile, columns: Columns, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """float64 (2, groups, genes) of the halves of each (cell type, label) of a file."""
    import numpy as np

    keys = [(t, label) for t, labels in f.by_type.items() for label in labels]
    groups = group_codes(f.path, columns, keys)
    second = np.zeros(len(groups), dtype=bool)
    for i in range(len(keys)):
        cells = np.flatnonzero(groups == i)
        second[rng.permutation(cells)[: len(cells) // 2]] = True
    codes = np.where(groups < 0, -1, groups + len(keys) * second)
    return group_means(f.path, codes, 2 * len(keys)).reshape(2, len(keys), -1), keys


def group_codes(path: Path, columns: Columns, keys: Sequence[tuple[str, str]]) -> np.ndarray:
    """int (cells,): the index of a cell's (cell type, label) in `keys`; -1 of none."""
    import numpy as np

    number = {key: i for i, key in enumerate(keys)}
    types, labels = (column(path, name).tolist() for name in (columns.cell_type, columns.pert))
    return np.array([number.get(key, -1) for key in zip(types, labels, strict=True)], dtype=int)


def standardised(
    vectors: Mapping[str, np.ndarray], genes: Mapping[str, frozenset[str]], summed: bool
) -> dict[str, np.ndarray]:
    """{label: float64 (width,)}, less the mean and in units of the spread of the single genes'.

    Parameters
    ----------
    vectors
        Of labels that have one of their own; that of a combination is the sum or mean of its genes.
    genes
        {label: its genes}
    summed
        Whether it is the sum: then that of a combination is the sum of the standardised ones too.
    """
    import numpy as np

    weight = {x: len(genes[x]) if summed else 1 for x in vectors}
    alone = [x for x in vectors if len(genes[x]) == 1] or list(vectors)
    rows = np.stack([vectors[x] / weight[x] for x in alone]).astype(float)
    rows = np.unique(rows, axis=0)  # guides of one gene count once
    mean, spread = rows.mean(0), rows.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    return {x: (v - weight[x] * mean) / spread for x, v in vectors.items()}


def respond(
    vectors: Mapping[str, np.ndarray],
    controls: Sequence[Mapping[str, np.ndarray]],
    labels: Sequence[Mapping[str, Sequence[str]]],
    rms: float,
) -> Response:
    """Fold changes linear in `vectors`, so strong that the effects have this RMS.

    Parameters
    ----------
    vectors
        {label: standardised vector, float64 (width,)}
    controls
        For each file {cell type: mean of its control cells, float64 (genes,)}.
    labels
        For each file {cell type: perturbations}; those without a vector have no effect.
    """
    import numpy as np

    width = len(next(iter(vectors.values())))
    n_genes = len(next(iter(controls[0].values())))
    weights = np.random.default_rng(0).normal(size=(width, n_genes)) / np.sqrt(width)
    names = list(vectors)
    folds = np.stack([vectors[x] for x in names]) @ weights
    number = {x: i for i, x in enumerate(names)}
    cell_types = [
        (mean, [number[x] for x in of_labels[cell_type] if x in number], len(of_labels[cell_type]))
        for of_types, of_labels in zip(controls, labels, strict=True)
        for cell_type, mean in of_types.items()
    ]

    def achieved(scale: float) -> float:
        total, n = 0.0, 0
        for mean, rows, size in cell_types:
            total += float(((np.maximum(scale * folds[rows], -1) * mean) ** 2).sum())
            n += size * n_genes
        return float(np.sqrt(total / n)) if n else 0.0

    scale = 0.0
    if rms > 0 and achieved(1.0) > 0:
        scale = rms / achieved(1.0)
        for _ in range(20):  # what is multiplied by less than 0 is 0: the others make up for it
            reached = achieved(scale)
            scale *= rms / reached
            if abs(reached / rms - 1) < 1e-6:
                break
    whole = np.maximum(scale * folds, -1)
    return Response(dict(zip(names, whole, strict=True)), achieved(scale))


def plant(f: DataFile, columns: Columns, folds: Mapping[str, np.ndarray]) -> Any:
    """The planted cells of a file, as AnnData with X in CSR, and obs, var and uns as they are.

    The same cells are drawn whatever the response is.
    """
    import anndata
    import numpy as np
    import scipy.sparse

    whole = anndata.read_h5ad(f.path, backed="r")
    rng = np.random.default_rng(0)
    types, labels = (column(f.path, name) for name in (columns.cell_type, columns.pert))
    drawn = np.zeros(len(labels), dtype=int)
    for cell_type in f.by_type:
        cells = np.flatnonzero(types == cell_type)
        drawn[cells] = rng.choice(cells[labels[cells] == columns.control], size=len(cells))
    pool, where = np.unique(drawn, return_inverse=True)
    x = scipy.sparse.csr_matrix(whole.X[pool])[where].astype(np.float32)
    rows = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    names = list(folds)
    table = np.stack([*folds.values(), np.zeros(x.shape[1])]).astype(np.float32)
    index = {name: i for i, name in enumerate(names)}
    of_cell = np.array([index.get(label, len(names)) for label in labels.tolist()])
    x.data *= 1 + table[of_cell[rows], x.indices]
    planted = anndata.AnnData(x, obs=whole.obs, var=whole.var, uns=dict(whole.uns))
    whole.file.close()
    return planted


def write_screen(folder: Path, data: Data, response: Response, about: Mapping[str, Any]) -> Path:
    """Write a planted screen into `folder`, with its TOML, which is returned, and its strength."""
    import anndata

    paths: dict[str, str] = {}
    # cell-load reads no nullable strings
    with anndata.settings.override(allow_write_nullable_strings=False):
        for f in data.files:
            place = folder / "data" / f.dataset / f"{f.path.stem}.h5ad"
            place.parent.mkdir(parents=True, exist_ok=True)
            plant(f, data.columns, response.folds).write_h5ad(place)
            paths[f.dataset] = str(place.parent.absolute())
    text = toml_text(data.experiment, {**data.experiment.datasets, **paths})
    write_text(folder / TOML, text)
    write_json(folder / MEASURED, {**about, "planted_rms": response.rms})
    return folder / TOML
