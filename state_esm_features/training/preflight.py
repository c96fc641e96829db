"""What would go wrong with the data, the disk or the memory, before anything is written.

The model stands in `model_check`, the features in `features_check`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cell_load.config import ExperimentConfig

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state_esm_features.console import Findings, count, some
from state_esm_features.experiment import experiment_problems, find_data_files, load_experiment
from state_esm_features.files import available_memory, existing_parent
from state_esm_features.h5ad import obs_columns, open_h5ad, rewriting
from state_esm_features.training.data import Data, DataFile, find_columns, inspect_file
from state_esm_features.training.splits import check_splits, check_subsets
from state_esm_features.training.stock import devices_of, set_length

CACHED_ROWS = 10_000
"""Rows that every loader worker of cell-load keeps (lru_cache in PerturbationDataset)."""

PREFETCH = 4
"""Batches that every loader worker prepares ahead (PerturbationDataModule)."""

STOCK_MAX_WORKERS = 12
"""num_workers of the stock configuration."""

TAHOE_CONTROL = "[('DMSO_TF', 0.0, 'uM')]"
"""What run_tx_train sets for the perturbation column drugname_drugconc."""


def check_genes(files: Sequence[DataFile], found: Findings) -> None:
    """cell-load takes gene names from one file and assumes them, in this order, in all."""
    first, *others = files
    for other in others:
        if other.width != first.width:
            what = f"{other.width:,} columns against {first.width:,}"
        elif len(other.genes) != len(first.genes):
            what = f"{len(other.genes):,} genes against {len(first.genes):,}"
        elif other.genes == first.genes:
            continue
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
        bare = [t for t, cells in f.by_type.items() if control not in cells]
        if bare:
            found.problems.append(
                f"{f.path}: no control cell ({control!r}) in {some(bare)}; cell-load draws the "
                "controls from the same cell type and file. Add controls, or remove these cells"
            )


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


def inspect_data(
    toml_path: Path,
    asked: Mapping[str, Any],
    stock: Mapping[str, Any],
    found: Findings,
    manifest: Mapping[str, Any] | None = None,
) -> Data | None:
    """TOML, files, columns, genes, controls and splits; None if that cannot be read at all.

    Parameters
    ----------
    stock
        Of State's configuration the arguments of the data module.
    manifest
        Of the features, whose perturbation column and control hold if nothing is asked for.
    """
    experiment = load_experiment(toml_path)
    by_dataset = files_of(experiment, toml_path, found)
    if not by_dataset:
        return None
    columns_there: dict[Path, list[str]] = {}
    pairs = [(dataset, path) for dataset, paths in by_dataset.items() for path in paths]
    for _, path in pairs:
        with found.collect(), open_h5ad(path) as file:
            columns_there[path] = obs_columns(file)
    columns = find_columns(columns_there, by_dataset, asked, found, manifest or {})
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
        for dataset, path in pairs
        if path in columns_there
    ]
    files = [f for f in inspected if f is not None]
    data = Data(experiment, columns, files)
    if files:
        check_genes(files, found)
        check_controls(files, columns.control, found)
        check_splits(data, found)
        if not stock["should_yield_control_cells"]:
            check_subsets(data, found)
    return data


def files_of(
    experiment: ExperimentConfig, toml_path: Path, found: Findings
) -> dict[str, list[Path]]:
    """{dataset: its files}; none if something is wrong with the TOML or its paths: it is noted."""
    wrong = [f"{toml_path}: {p}" for p in experiment_problems(experiment)]
    files: dict[str, list[Path]] = {}
    if not wrong:
        files, wrong = find_data_files(experiment, toml_path, found)
    if not wrong and not files:
        wrong = [f"{toml_path}: [training], [zeroshot] and [fewshot] name no dataset"]
    found.problems += wrong
    return {} if wrong else files


@dataclass(frozen=True)
class Machine:
    """What loader workers share: cores, and free bytes of memory and of shared memory."""

    cores: int
    memory: int
    shared: int


def this_machine() -> Machine:
    """What there is now; where nothing is known of shared memory, it is all of the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = shared = available_memory()
    with contextlib.suppress(OSError):  # Docker's default is 64 MB
        shared = shutil.disk_usage("/dev/shm").free
    return Machine(cores or 1, memory, shared)


def choose_workers(stock: Mapping[str, Any], data: Data, machine: Machine) -> int:
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
    loaders = devices_of(stock) * (2 if data.splits["val"] or data.splits["test"] else 1)
    fitting = min(machine.memory // 2 // (loaders * each), machine.shared // (loaders * shared))
    return max(0, min(machine.cores // devices_of(stock), STOCK_MAX_WORKERS, fitting))
