"""Whether expression looks like what State expects, and how wide it is.

Cells and their labels are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from state_esm_features import h5ad
from state_esm_features.console import Findings, InputError, count, some
from state_esm_features.training.stock import input_matrix, matrices_read

if TYPE_CHECKING:
    import h5py


SAMPLE = 100_000
"""Values of a matrix that are looked at."""

LOG1P_MAXIMUM = 15
"""Above it cell-load takes values for counts (cell_load.utils.data_utils.suspected_log_torch)."""


def input_width(file: h5py.File, kwargs: Mapping[str, Any], found: Findings) -> int:
    """Columns of obsm[embed_key] or X; notes values of X that are not log1p."""
    where = input_matrix(kwargs)
    node = file.get(where)
    if node is None or h5ad.stored_as(node) == "null":
        there = some(sorted(file.get("obsm", ()))) or "none"
        layers = sorted(file.get("layers", ()))
        if layers and where == "X":
            raise InputError(
                f"{file.filename} has no X, but layers: {some(layers)}. Write it again after "
                + h5ad.rewriting(f"adata.X = adata.layers[{layers[0]!r}]")
                + ", log1p-normalised (scanpy.pp.normalize_total, then scanpy.pp.log1p), or choose "
                f"with --embed-key; obsm: {there}"
            )
        raise InputError(f"{file.filename} has no {where}; obsm: {there}. Choose with --embed-key")
    for name in matrices_read(kwargs):
        if name in ("X", "obsm/X_hvg") and h5ad.is_matrix(file.get(name)):
            check_log1p(file, name, found)
    return h5ad.matrix_shape(node)[1]


def check_log1p(file: h5py.File, name: str, found: Findings) -> None:
    """Look at a sample of expression values, from all over the matrix."""
    import numpy as np

    node = file[name]
    pieces = 10
    values = node["data"] if h5ad.is_sparse(node) else node
    if not values.shape[0]:
        return
    each = SAMPLE // pieces if h5ad.is_sparse(node) else max(1, SAMPLE // pieces // values.shape[1])
    starts = np.linspace(0, max(0, values.shape[0] - each), pieces).astype(int)
    sample = np.concatenate([values[i : i + each].ravel() for i in dict.fromkeys(starts)])
    if not np.isfinite(sample).all():
        found.problems.append(
            f"{file.filename}: {name} holds NaN or infinite values; the loss would become NaN"
        )
        return
    values = sample[sample != 0]
    if not values.size:
        return
    low, high = values.min(), values.max()
    if low < 0:
        doubt = f"has negative values (down to {low:.3g}), as scaled data have"
    elif np.array_equal(values, np.round(values)):
        doubt = f"looks like raw counts (whole numbers up to {high:g})"
    elif high > LOG1P_MAXIMUM:
        doubt = (
            f"has values up to {high:.4g}, above the {LOG1P_MAXIMUM} that log1p-normalised ones "
        )
        doubt += "stay below"
    else:
        return
    found.warnings.append(
        f"{file.filename}: {name} {doubt}; State expects log1p-normalised values: "
        "scanpy.pp.normalize_total, then scanpy.pp.log1p"
    )


def check_names_of_output(
    file: h5py.File, kwargs: Mapping[str, Any], width: int, found: Findings
) -> None:
    """For the output space gene cell-load names a selection of genes, whatever is predicted.

    Parameters
    ----------
    width
        Columns of X or obsm[embed_key].
    """
    if kwargs["output_space"] != "gene":
        return
    where, embed_key = "X", kwargs["embed_key"]
    if embed_key:
        where, hvg = "obsm/X_hvg", file.get("obsm/X_hvg")
        if hvg is None:
            return
        width = h5ad.matrix_shape(hvg)[1]
    mask, names = file.get("var/highly_variable"), file.get("uns/hvg_names")
    if mask is not None:
        selected, source = int(h5ad.read_values(mask).astype(bool).sum()), "var/highly_variable"
    elif names is not None and h5ad.gene_names_node(file) == "var/gene_name":
        selected, source = len(h5ad.read_values(names)), "uns/hvg_names"
    else:
        return
    if selected != width:
        remedy = "Choose --output-space all" if where == "X" else f"Correct {source}"
        found.warnings.append(
            f"{file.filename}: {where} has {count(width, 'column')}, for which cell-load takes the "
            f"names of the {count(selected, 'gene')} of {source} with output space gene: `state tx "
            f"predict` will write genes named 0, 1, 2 ... {remedy}"
        )
