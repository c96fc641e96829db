"""The options of the training, each declared once: its name, default, help and setting of State.

Those of features stand in `option_groups`. What an option does is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from state_esm_features.option_groups import BATCH_COLUMNS, DEFAULT_CONTROL, PERT_COLUMNS
from state_esm_features.option_values import FILE, FOLDER, NUMBER, WHOLE, run_name, workers
from state_esm_features.options import option, switch

LAYOUTS = ("sorted", "dense")
"""Of --fast-loading."""

TRAINING_PRECISIONS = ("32-true", "bf16-mixed")
"""Of --training-precision, as Lightning calls them."""

SPACES = ("gene", "all", "embedding")
"""Of --output-space."""

WORKERS = "data.kwargs.num_workers"
CONSECUTIVE = "data.kwargs.use_consecutive_loading"
"""Settings of State that need more than the value of an option."""


@dataclass(frozen=True)
class DataOptions:
    """What a training reads."""

    config: Path = option(
        "cell-load's TOML; paths in it count from the working directory", **FILE, required=True
    )
    pert_features: Path | None = option(
        "features that create-esm-pert-features wrote (default: they are made now)", **FILE
    )
    pert_col: str | None = option(
        f"obs column of the labels (default: the one found of {', '.join(PERT_COLUMNS)})",
        metavar="COL",
        stock=("data.kwargs.pert_col",),
    )
    batch_col: str | None = option(
        f"obs column of the batches (default: the one found of {', '.join(BATCH_COLUMNS)})",
        metavar="COL",
        stock=("data.kwargs.batch_col",),
    )
    cell_type_key: str | None = option(
        "obs column of the cell types (default: cell_type)",
        metavar="COL",
        stock=("data.kwargs.cell_type_key",),
    )
    control_pert: str | None = option(
        f"label of the control cells (default: that of the features, else {DEFAULT_CONTROL})",
        metavar="LABEL",
        stock=("data.kwargs.control_pert",),
    )
    embed_key: str | None = option(
        "train on obsm[KEY] (default: on X)", metavar="KEY", stock=("data.kwargs.embed_key",)
    )
    output_space: str | None = option(
        "what the model predicts: HVGs, all genes, or the embedding (State's default: all)",
        choices=SPACES,
        stock=("data.kwargs.output_space",),
    )


@dataclass(frozen=True)
class TrainingOptions:
    """How State is trained; what is not given stays as State has it."""

    model: str | None = option(
        "State's model: state, state_sm, state_lg ... (default: state_sm)",
        metavar="NAME",
        stock=("model",),
    )
    num_workers: int | str = option(
        "processes that load data (default: auto: as in the run, else by cores and memory)",
        "auto",
        type=workers,
        metavar="auto|N",
    )
    fast_loading: str | None = option(
        "train on copies of the data: sorted (the default; controls are drawn in blocks), or dense "
        "(State's own batches; 4 bytes a cell and gene)",
        nargs="?",
        const="sorted",
        choices=LAYOUTS,
    )
    data_cache: Path | None = option(
        "folder of these copies (default: OUTPUT_DIR/data_cache)", **FOLDER
    )
    seed: int | None = option(
        "random seed of the training and its data (State's default: 42)",
        **WHOLE,
        stock=("data.kwargs.random_seed", "training.train_seed"),
    )
    max_steps: int | None = option(
        "steps to train in all (State's default: 400000)", **NUMBER, stock=("training.max_steps",)
    )
    batch_size: int | None = option(
        "cell sets in a batch (State's default: 16)", **NUMBER, stock=("training.batch_size",)
    )
    val_freq: int | None = option(
        "steps between validations and checkpoints (State's default: 2000)",
        **NUMBER,
        stock=("training.val_freq",),
    )
    ckpt_every_n_steps: int | None = option(
        "keep a step=N.ckpt every N steps (default: none)",
        **NUMBER,
        stock=("training.ckpt_every_n_steps",),
    )
    nodes: int | None = option(
        "machines that train together (default: as srun or torchrun starts them, else 1)", **NUMBER
    )
    training_precision: str | None = option(
        "precision of the training (State's default: 32-true)", choices=TRAINING_PRECISIONS
    )


@dataclass(frozen=True)
class RunOptions:
    """Where a run is, and what to do with one that is there."""

    output_dir: Path = option("folder of the runs (default: runs)", Path("runs"), **FOLDER)
    name: str | None = option(
        "name of the run, a folder there (default: the TOML's name and the model)",
        type=run_name,
        metavar="NAME",
    )
    resume: bool = switch("go on with the run of this name", exclusive=True)
    overwrite: bool = switch("train anew under this name", exclusive=True)
    force: bool = switch("with --resume: go on even with other data, features or model")
    dry_run: bool = switch("check everything, show the plan and State's own command, write nothing")
    quiet: bool = switch("say warnings and errors only, without progress: for cron")


@dataclass(frozen=True)
class WandbOptions:
    """Weights & Biases."""

    wandb_project: str | None = option("project to log to", metavar="P", stock=("wandb.project",))
    wandb_entity: str | None = option(
        "user or team that owns it", metavar="E", stock=("wandb.entity",)
    )
    wandb_tags: str | None = option("tags of the run, separated by commas", metavar="A,B")


def with_layout(words: Sequence[str]) -> list[str]:
    """A command line in which a bare --fast-loading says its layout: an override may follow it."""
    said = list(words)
    for i, word in enumerate(said[:-1]):
        if word == "--fast-loading" and said[i + 1] not in LAYOUTS:
            said[i] = "--fast-loading=sorted"
    return said
