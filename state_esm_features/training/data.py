"""The data files of a training as cell-load sees them: columns, cells, and their splits.

What is wrong with them stands in `preflight` and `splits`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import h5ad
from state_esm_features.console import Findings, InputError, count
from state_esm_features.embedding.labels import require_control
from state_esm_features.experiment import SPLITS, leave_out
from state_esm_features.option_groups import BATCH_COLUMNS, DEFAULT_CONTROL, PERT_COLUMNS
from state_esm_features.training.expression import check_names_of_output, input_width
from state_esm_features.training.stock import matrices_read

if TYPE_CHECKING:
    import h5py
    import numpy as np
    from cell_load.config import ExperimentConfig


@dataclass(frozen=True)
class Columns:
    """obs columns and the control label, as cell-load is told."""

    pert: str
    batch: str
    cell_type: str
    control: str

    def settings(self) -> dict[str, str]:
        """The settings of State that say so."""
        return {
            "data.kwargs.pert_col": self.pert,
            "data.kwargs.batch_col": self.batch,
            "data.kwargs.cell_type_key": self.cell_type,
            "data.kwargs.control_pert": self.control,
        }


@dataclass(frozen=True)
class DataFile:
    """What the preflight reads of one data file: no expression but a sample.

    Attributes
    ----------
    labels, cell_types
        Categories of the perturbation and cell type columns.
    cells
        int (cell types, labels): number of cells.
    genes
        Gene names in order, as cell-load reads them.
    width
        Columns of what the model is fed: X, or obsm[embed_key].
    log1p
        The file carries uns/log1p.
    unused
        Those of `labels` that no cell has.
    grouped
        The cells of a (cell type, label) stand together, as stock's consecutive loading needs.
    matrices
        {X or obsm/KEY: its columns}.
    batches
        Different values of the batch column, as text.
    unreadable
        Nodes that cell-load cannot read as they are stored.
    """

    dataset: str
    path: Path
    labels: list[str]
    cell_types: list[str]
    cells: np.ndarray
    genes: list[str]
    width: int
    log1p: bool
    grouped: bool
    matrices: Mapping[str, int]
    batches: frozenset[str]
    unreadable: Sequence[h5ad.Unreadable] = ()
    unused: Collection[str] = ()

    @cached_property
    def by_type(self) -> dict[str, dict[str, int]]:
        """{cell type: {label: cells}}, without what has no cell."""
        return {
            cell_type: {x: n for x, n in zip(self.labels, row.tolist(), strict=True) if n}
            for cell_type, row in zip(self.cell_types, self.cells, strict=True)
            if row.any()
        }


def find_columns(
    files: Mapping[Path, Sequence[str]],
    by_dataset: Mapping[str, Sequence[Path]],
    asked: Mapping[str, Any],
    found: Findings,
    manifest: Mapping[str, Any],
) -> Columns | None:
    """The columns to use: what is asked for, what the features were made of, or what is found.

    None if one cannot be found, or if there is no file to look in.
    """
    if not files:
        return None
    of_features = manifest.get("pert_col")
    if of_features and all(of_features in columns for columns in files.values()):
        asked = {"data.kwargs.pert_col": of_features, **asked}
    batch_advice = (
        "; State does not use the batch unless you tell it to, but cell-load needs a column: any "
        "one that every file has will do"
    )
    names: dict[str, str] = {}
    odd: Sequence[Path] = ()
    for key, flag, candidates in (
        ("pert_col", "--pert-col", PERT_COLUMNS),
        ("cell_type_key", "--cell-type-key", ("cell_type",)),
        ("batch_col", "--batch-col", BATCH_COLUMNS),
    ):
        try:
            names[key] = h5ad.find_column(files, asked.get(f"data.kwargs.{key}"), candidates, flag)
        except InputError as error:
            advice = batch_advice if key == "batch_col" else ""
            if advice and "cell_type_key" in names:
                advice += f", e.g. --batch-col {names['cell_type_key']}"
            if isinstance(error, h5ad.LacksColumn) and error.files != odd:  # said of each file once
                odd = error.files
                advice += leave_out(odd, by_dataset)
            found.problems.append(f"{error}{advice}")
    if not {"pert_col", "cell_type_key"} <= set(names):
        return None
    control = asked.get("data.kwargs.control_pert") or manifest.get("control", DEFAULT_CONTROL)
    batch = names.get("batch_col", "")  # without one, the rest is checked all the same
    return Columns(names["pert_col"], batch, names["cell_type_key"], str(control))


def inspect_file(
    dataset: str, path: Path, columns: Columns, kwargs: Mapping[str, Any], found: Findings
) -> DataFile | None:
    """Read the metadata of a data file and note what cell-load would trip over."""
    import numpy as np

    with found.collect(), h5ad.open_h5ad(path) as file:
        labels, codes = h5ad.open_labels(file, columns.pert)
        label_codes = codes[:].astype(np.int64)
        cell_types, codes = h5ad.open_labels(file, columns.cell_type)
        type_codes = codes[:].astype(np.int64)
        with found.collect():
            require_control(columns.control, labels, path, columns.pert)
        check_codes(path, columns, labels, label_codes, type_codes, found)
        batches = h5ad.open_column(file, columns.batch)[0] if columns.batch else ()
        width = input_width(file, kwargs, found)
        check_names_of_output(file, kwargs, width, found)
        known = (label_codes >= 0) & (type_codes >= 0)
        groups = type_codes * len(labels) + label_codes
        cells = np.bincount(groups[known], minlength=len(labels) * len(cell_types))
        return DataFile(
            dataset=dataset,
            path=path,
            labels=labels,
            cell_types=cell_types,
            cells=cells.reshape(len(cell_types), len(labels)),
            genes=h5ad.gene_names(file),
            width=width,
            log1p="uns" in file and "log1p" in file["uns"],
            grouped=int((np.diff(groups) != 0).sum()) < len(np.unique(groups)),
            matrices=matrices_of(file),
            batches=frozenset(map(str, batches)),
            unreadable=h5ad.find_unreadable(file, nodes_read(file, columns, kwargs)),
            unused=h5ad.unused_categories(labels, [label_codes]),
        )
    return None


def check_codes(
    path: Path,
    columns: Columns,
    labels: Sequence[str],
    label_codes: np.ndarray,
    type_codes: np.ndarray,
    found: Findings,
) -> None:
    """Note cells that have no label or no cell type: -1 in int64 (cells,)."""
    unlabelled = int((label_codes < 0).sum())
    if unlabelled:
        what = f"; cell-load would train them as {labels[-1]!r}" if labels else ""
        found.problems.append(
            f"{path}: {count(unlabelled, 'cell')} without a label in {columns.pert!r}{what}. "
            "Remove them, or label them"
        )
    untyped = int((type_codes < 0).sum())
    if untyped:
        found.warnings.append(
            f"{path}: {count(untyped, 'cell')} without a cell type in {columns.cell_type!r} "
            "are not read"
        )


def nodes_read(file: h5py.File, columns: Columns, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """{node: what is read there}, as `CELL_LOAD_READS` has it, of all that cell-load opens.

    Parameters
    ----------
    kwargs
        Of the data module.
    """
    names = h5ad.gene_names_node(file)
    nodes = {
        f"obs/{columns.pert}": "labels",
        f"obs/{columns.cell_type}": "labels",
        f"obs/{columns.batch}": "column" if columns.batch else "",
        **{f"obs/{name}": "column" for name in kwargs.get("additional_obs") or ()},
        "obs/_index": "names" if kwargs.get("barcode") else "",
        str(names): "gene names" if names == "var/gene_name" else "names",
        **{name: "X" if name == "X" else "matrix" for name in matrices_read(kwargs)},
    }
    if kwargs["output_space"] == "gene":
        mask = "var/highly_variable"
        nodes |= {mask: "mask"} if file.get(mask) is not None else {"uns/hvg_names": "names"}
    return {name: what for name, what in nodes.items() if what}


def matrices_of(file: h5py.File) -> dict[str, int]:
    """{X or obsm/KEY: its columns} of every matrix that is one."""
    obsm = file.get("obsm")
    columns = {}
    for name in ("X", *(f"obsm/{key}" for key in getattr(obsm, "keys", tuple)())):
        with contextlib.suppress(InputError, KeyError):
            columns[name] = h5ad.matrix_shape(file[name])[1]
    return columns


@dataclass(frozen=True)
class Data:
    """The data of a run, as far as the preflight reads it."""

    experiment: ExperimentConfig
    columns: Columns
    files: Sequence[DataFile]

    def reads(self, dataset: str, cell_type: str) -> bool:
        """Whether cell-load reads a cell type: held out somewhere, or of a dataset that trains."""
        key, experiment = f"{dataset}.{cell_type}", self.experiment
        held_out = key in experiment.zeroshot or key in experiment.fewshot
        return held_out or dataset in experiment.training

    def cell_types_read(self) -> Iterator[tuple[DataFile, str, dict[str, dict[str, int]]]]:
        """(file, cell type, {split: {label: perturbed cells}}) of what it reads, by its rule.

        A cell type under [zeroshot] goes whole to its split; one under [fewshot] gives the labels
        named there to val and test and the rest to train; others train if their dataset does.
        """
        for f in self.files:
            zeroshot = self.experiment.get_zeroshot_celltypes(f.dataset)
            fewshot = self.experiment.get_fewshot_celltypes(f.dataset)
            for cell_type, cells in f.by_type.items():
                if not self.reads(f.dataset, cell_type):
                    continue
                splits: dict[str, dict[str, int]] = {s: {} for s in SPLITS}
                held = fewshot.get(cell_type, {})
                for label, n in cells.items():
                    into = [s for s in ("val", "test") if label in held.get(s, ())] or ["train"]
                    for split in [zeroshot[cell_type]] if cell_type in zeroshot else into:
                        if label != self.columns.control:
                            splits[split][label] = n
                yield f, cell_type, splits

    @cached_property
    def splits(self) -> dict[str, Counter[str]]:
        """{split: {label: perturbed cells}} of all files."""
        totals = {s: Counter[str]() for s in SPLITS}
        for _, _, splits in self.cell_types_read():
            for split, cells in splits.items():
                totals[split].update(cells)
        return totals
