"""What `state tx infer` would do wrong, or otherwise than one may think, on a template.

Adding labels stands in `new_labels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from state_esm_features import h5ad
from state_esm_features.console import Findings, InputError, Notes, count, one_error, some, them
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.embedding.labels import Labels, label_column
from state_esm_features.embedding.resolve import CONTROL_GUIDES, letters
from state_esm_features.files import fingerprint
from state_esm_features.training.trained_run import TrainedRun

if TYPE_CHECKING:
    import h5py
    import numpy as np
    import torch


CELL_TYPE_COLUMNS = ("cell_type", "celltype", "cellType", "ctype", "celltype_col")
"""obs columns in which `state tx infer` looks for the cell type after the run's own."""


def check_templates(run: TrainedRun, paths: Sequence[Path], pert_col: str | None) -> Findings:
    """What `state tx infer` would do wrong, or otherwise than one may think, on templates,
    whatever their labels (state/_cli/_tx/_infer.py of State 0.11.1)."""
    found = Findings()
    column = label_column(paths, pert_col) if paths else ""
    for path in paths:
        with h5ad.open_h5ad(path) as file:
            labels, unread_codes = h5ad.open_labels(file, column)
            codes = unread_codes[:]
            unlabelled = int((codes < 0).sum())
            if unlabelled:
                found.problems.append(
                    f"{path}: {count(unlabelled, 'cell')} without a label in {column!r}: state tx "
                    "infer would predict them as control. Remove them, or label them"
                )
            with found.collect():
                if run.embed_key:
                    require_embedding(run, file)
                else:
                    require_genes(run, file)
            check_batches(run, file, found)
            controls = codes == (labels.index(run.control) if run.control in labels else -2)
            if controls.any():
                check_controls(run, file, controls, found)
            else:
                found.problems.append(
                    f"{path} has no cell of the control {run.control!r} in {column!r}: state tx "
                    "infer predicts from control cells, and would leave all cells as they are. "
                    "Add control cells"
                )
    return found


def require_genes(run: TrainedRun, file: h5py.File) -> None:
    """Refuse X of other genes, for a run that was trained on X."""
    if not h5ad.is_matrix(file.get("X")):
        raise InputError(f"{file.filename} has no X, on which the run was trained. Add it")
    if run.genes is None:
        return
    genes = fingerprint(h5ad.gene_names(file))
    if genes != run.genes:
        number, trained = genes["number"], run.genes["number"]
        which = f"{number:,} genes, not the {trained:,} genes of the run"
        if number == trained:
            which = "other genes than the run, or the same in another order"
        raise InputError(
            f"{file.filename} has {which}: state tx infer takes its columns for the run's genes. "
            "Write it again with the genes of the training data, in their order"
        )


def require_embedding(run: TrainedRun, file: h5py.File) -> None:
    """Refuse an unlike embedding, for a run that was trained on one."""
    name = f"obsm/{run.embed_key}"
    node = file.get(name)
    if node is None:
        there = some(sorted(file.get("obsm", ()))) or "none"
        raise InputError(
            f"{file.filename} has no {name}, on which the run was trained (obsm: {there}). Compute "
            "it as there"
        )
    place = f"adata.obsm[{run.embed_key!r}]"
    if h5ad.is_sparse(node):
        again = h5ad.rewriting(f"{place} = {place}.toarray()")
        raise InputError(
            f"{file.filename} has {name} stored as {h5ad.stored_as(node)}, which state tx infer "
            f"cannot take. Write it again after {again}"
        )
    width = h5ad.matrix_shape(node)[1]
    if run.input_width not in (None, width):
        raise InputError(
            f"{file.filename} has {count(width, 'column')} in {name}, and the run was trained on "
            f"{run.input_width:,}. Compute it as there"
        )


def check_controls(run: TrainedRun, file: h5py.File, controls: np.ndarray, found: Findings) -> None:
    """Note cells that `state tx infer` would predict from control cells of other cell types.

    Parameters
    ----------
    controls
        bool (cells,): control cells.
    """
    columns = h5ad.obs_columns(file)
    column = next((c for c in (run.cell_type, *CELL_TYPE_COLUMNS) if c in columns), None)
    if column is None:
        found.warnings.append(
            f"{file.filename}: no obs column {run.cell_type!r}: state tx infer draws control cells "
            "of any cell type"
        )
        return
    names, codes = h5ad.open_column(file, column)
    types = codes[:]
    bare = sorted({int(t) for t in types} - {int(t) for t in types[controls]} - {-1})
    if bare:
        found.warnings.append(
            f"{file.filename}: no control cell in {some(str(names[t]) for t in bare)}: state tx "
            "infer draws them from all other cell types"
        )


def check_batches(run: TrainedRun, file: h5py.File, found: Findings) -> None:
    """Note batches of a template that a model which reads them does not know."""
    if run.batch is None:
        return
    if run.batch not in h5ad.obs_columns(file):
        found.problems.append(
            f"{file.filename} has no obs column {run.batch!r}, the batch that the model reads: "
            "state tx infer would end in a KeyError. Add it, with batches of the training data"
        )
        return
    known = run.vectors(run.folder / "batch_onehot_map.torch")
    names, codes = h5ad.open_column(file, run.batch)
    there = [str(names[code]) for code in sorted({*codes[:].tolist()} - {-1})]
    unknown = [name for name in there if name not in known]
    if unknown:
        found.warnings.append(
            f"{file.filename}: {count(len(unknown), 'label')} of {run.batch!r} not known to the "
            f"run ({some(unknown)}): state tx infer takes the run's first batch, "
            f"{next(iter(known))}, for {them(len(unknown))}"
        )


def check_template(
    run: TrainedRun, labels: Labels, paths: Sequence[Path], pert_col: str | None, notes: Notes
) -> None:
    """What `state tx infer` would predict as control, or on mixed-up genes, today.

    Raises
    ------
    InputError
        There is something.
    """
    own = run.vectors(run.features) if run.features.is_file() else {}
    known = run.known(run.vectors(run.map_path), own)
    wanted = [x for x in labels.names if x != run.control]
    unknown = [x for x in wanted if x not in known and labels.needed_in(x)]
    total = count(len(wanted), "label")
    found = check_templates(run, paths, pert_col)
    if unknown:
        try:
            run.manifest()
            remedy = "This command without --dry-run adds them, if its sources have all"
            named = [x for x in unknown if CONTROL_GUIDES.fullmatch(letters(x))]
            if named:
                remedy += f" (if {named[0]} is the control, label its cells {run.control} instead)"
        except InputError as refused:
            remedy = str(refused)
        found.problems.append(
            f"{len(unknown):,} of {total} not known to {run.named} ({some(unknown)}): state "
            f"tx infer would predict them as control. {remedy}"
        )
    filled = filled_in(run, wanted, known)
    found.problems += filled.problems
    if found.problems:
        raise one_error(found.problems)
    notes.line(f"{total}, none of which would be predicted as control by {run.named}")
    for text in (*filled.warnings, *found.warnings):
        notes.warn(text)


def filled_in(run: TrainedRun, names: Iterable[str], known: Mapping[str, torch.Tensor]) -> Findings:
    """What to say of labels that are known by zeros, and by vectors not their own."""
    found = Findings()
    manifest = read_manifest(run.features) or {}
    there = [x for x in names if x != run.control and x in known]
    zeros = [x for x in there if not known[x].any()]
    means = [x for x in there if x in manifest.get("missing", {}) and x not in zeros]
    if zeros:
        found.problems.append(
            f"{count(len(zeros), 'label')} with a zero vector in {run.named} ({some(zeros)}): "
            "state tx infer predicts them as control, as --missing zero chose. Leave them out, or "
            "train on features that have them"
        )
    if means:
        found.warnings.append(
            f"{count(len(means), 'label')} with the mean of other vectors in {run.named} "
            f"({some(means)}), as --missing mean chose"
        )
    if manifest.get("ablation"):
        kind = manifest["ablation"]["kind"]
        found.warnings.append(f"{run.named} was trained on an ablation ({kind})")
    return found
