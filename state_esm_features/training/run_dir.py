"""The run directory: its record, what makes two runs the same, what to do with one that is there.

The training itself stands in `loop`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from state_esm_features import __version__, files
from state_esm_features.console import InputError, Notes, count, short, some
from state_esm_features.embedding.features_file import manifest_path, read_manifest, trained_sha256
from state_esm_features.experiment import SECTIONS, absolute_paths, toml_text
from state_esm_features.results import TrainingResult
from state_esm_features.training.checkpoints import checkpoint_steps, intact
from state_esm_features.training.fast_loading import fast_paths
from state_esm_features.training.launch import launch_id
from state_esm_features.training.plan import Plan, TrainOptions, what_is_next
from state_esm_features.training.progress import Training, draw_training, keep_progress
from state_esm_features.training.stock import MANAGED, flat, typed_settings
from state_esm_features.training.trainer import cells_a_step
from state_esm_features.training_options import CONSECUTIVE, RunOptions

OR_ANOTHER = "let it finish, or choose another --name"

RUN_FORMAT = 1

MAY_CHANGE_ON_RESUME = re.compile(
    r"training\.(max_steps|val_freq|ckpt_every_n_steps)$|use_wandb$|wandb\.|versions |changed "
)
"""Differences that a resumed run may have; 'changed' is the time of a data file, as after a new
download of the same data."""


def run_dir_of(options: TrainOptions) -> Path:
    """OUTPUT_DIR/NAME, absolute."""
    model = typed_settings(options.overrides).get("model") or options.training.model or "state_sm"
    name = options.run.name or f"{options.data.config.stem}_{model}"
    return options.run.output_dir.absolute() / name


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

    return {
        "host": platform.node(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def identity(plan: Plan) -> dict[str, Any]:
    """What makes two runs the same: settings, features, TOML, data files, versions."""
    origins = [files.data_file_origin(f.path.absolute()) for f in plan.data.files]
    stock = {k: v for k, v in flat(plan.stock).items() if k not in MANAGED or k == CONSECUTIVE}
    cell_load_reads = {s: getattr(plan.data.experiment, s) for s in SECTIONS}  # not comments
    return {
        "features": {"sha256": plan.pert_features["sha256"]},
        "toml": {"content": hashlib.sha256(files.as_json(cell_load_reads)).hexdigest()},
        "data": {o["path"]: f"{o['size']:,} bytes" for o in origins},
        "changed": {o["path"]: o["mtime_ns"] for o in origins},
        "versions": versions(),
        "settings": stock,
        "trainer": plan.trainer.identity(),
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
    record = files.read_json(run_dir / "run.json")
    if record is None or record.get("format") != RUN_FORMAT:
        raise InputError(
            f"{run_dir} exists and is no run of this script; choose another --name, or move it away"
        )
    return record


def changed_since(plan: Plan) -> dict[str, str]:
    """{what: 'before -> now'} of the run that is there; nothing if there is none."""
    return differences(plan.earlier["identity"], identity(plan)) if plan.earlier else {}


def decide(
    run_dir: Path,
    earlier: Mapping[str, Any] | None,
    changed: Mapping[str, str],
    options: RunOptions,
    notes: Notes,
) -> str:
    """'new', 'resume', 'overwrite' or 'up to date', by the record of the run that is there.

    Raises
    ------
    InputError
        There is a run that neither --resume nor --overwrite allows to touch.
    """
    if earlier is None:
        return "new"
    if options.overwrite:
        return "overwrite"
    if earlier["status"] == "finished" and not changed:
        return "up to date"
    listed = "; ".join(f"{k}: {v}" for k, v in list(changed.items())[:5])
    listed += f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    resumable = all(map(MAY_CHANGE_ON_RESUME.match, changed))
    if options.resume:
        if not (resumable or options.force):
            raise InputError(
                f"{run_dir} was trained otherwise ({listed}); resuming would mix two runs. "
                "--overwrite trains anew, --name NAME makes another run, --force mixes them"
            )
        if not resumable:
            notes.warn(f"--force: this run goes on otherwise than it was started ({listed})")
        elif changed:
            notes.line(f"changed since the run was started: {listed}")
        return "resume"
    if changed:
        state = f"exists with other inputs ({listed})"
    else:
        state = f"is not finished ({earlier['status']}, step {earlier.get('steps', 0):,})"
    resume = "goes on with it" if resumable else "cannot mix them"
    raise InputError(
        f"{run_dir} {state}; --resume {resume}, --overwrite trains anew, "
        "--name NAME makes another run"
    )


def move_aside(run_dir: Path) -> Path:
    """Rename an old run to NAME.old (NAME.old-2, ...); it goes when the new one has finished."""
    names = ["old", *(f"old-{n}" for n in range(2, 1000))]
    aside = next(p for n in names if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
    return run_dir.rename(aside)


def toml_of_run(plan: Plan, notes: Notes) -> str:
    """The TOML as the run uses it: absolute paths, or those of the copies for fast loading."""
    experiment, said = plan.data.experiment, f"# {plan.toml.absolute()} as used here"
    if plan.fast is None:
        datasets = absolute_paths(experiment, notes)
    else:
        datasets = {**experiment.datasets, **fast_paths(plan.fast, plan.data)}
    if plan.fast and plan.fast.copies:
        said += f", on the copies that --fast-loading {plan.fast.layout} made of:"
        said = "\n#   ".join([said, *(str(c.source) for c in plan.fast.copies.values())])
    return f"{said}\n{toml_text(experiment, datasets)}"


def write_inputs(plan: Plan, features_too: bool, notes: Notes) -> None:
    """Make the run stand alone: its own copy of features, manifest and TOML."""

    def copy(source: Path, target: Path) -> None:
        with source.open("rb") as content:
            files.write_whole(target, lambda f: shutil.copyfileobj(content, f))

    if features_too:
        source = plan.made or plan.features
        note_lost_labels(plan.own_features, notes)
        copy(source, plan.own_features)
        if manifest_path(source).is_file():
            copy(manifest_path(source), manifest_path(plan.own_features))
    text = toml_of_run(plan, notes)
    files.write_whole(plan.own_toml, lambda f: f.write(text.encode()))


def note_lost_labels(features: Path, notes: Notes) -> None:
    """Before features to which labels were added make way for others."""
    added = (files.read_json(manifest_path(features)) or {}).get("added", [])
    labels = [label for addition in added for label in addition["labels"]]
    if labels:
        notes.warn(
            f"{count(len(labels), 'label')} added with --into-run ({some(labels)}) will not be in "
            "the new features: add them again after the training"
        )


def prepare_resume(plan: Plan, notes: Notes) -> int:
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
        notes.line(f"no checkpoint in {plan.run_dir} yet: training starts at step 0")
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
        files.same_file(best, last)
    metrics = plan.run_dir / "version_0" / "metrics.csv"
    if metrics.exists():  # Lightning's logger starts the file anew
        metrics.replace(metrics.with_name(f"metrics-until-step-{step}.csv"))
    keep_progress(plan.run_dir / "progress.csv", step)
    notes.line(
        f"resuming at step {step:,} of {goal:,} from {last}: weights, optimiser and step as saved; "
        "the order of the data and the random state start anew, so the result differs from an "
        "unbroken run"
    )
    note_nodes(plan, notes)
    return step


def note_nodes(plan: Plan, notes: Notes) -> None:
    """A run may go on on another number of machines."""
    before, now = (plan.earlier or {}).get("nodes", 1), plan.trainer.ranks
    if before != now.nodes:
        notes.line(
            f"until now on {count(before, 'machine')}, from here on {now.nodes:,}: "
            f"{cells_a_step(now, plan.stock)}"
        )


def refuse_if_held(run_dir: Path) -> None:
    """Say so at once, before the data is looked at."""
    if files.lock_path(run_dir).exists():
        with files.run_lock(run_dir, advice=OR_ANOTHER):
            pass


def finish(plan: Plan, record: dict[str, Any], state: Training, notes: Notes) -> None:
    """Close the record of a finished run, delete what it replaced, say what is next."""
    record["status"] = "finished"
    replaced, record["replaces"] = record["replaces"], []
    close_record(plan.run_dir, record, state)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)
        notes.line(f"the run that this one replaces was deleted: {old}")
    losses = ", ".join(f"{k} {v:.5g}" for k, v in sorted(state.losses.items()))
    notes.line(f"finished  {plan.run_dir}: {state.step:,} steps, {losses}")
    for what, command in what_is_next(plan):
        notes.line(f"{what:<9} {command}")


def result(status: str, plan: Plan, record: Mapping[str, Any]) -> TrainingResult:
    """What a caller in Python is told of a run."""
    losses = {name: record[name] for name in ("train_loss", "val_loss") if name in record}
    steps = record.get("steps", 0)
    commands = (what_is_next(plan)[-1][1], plan.stock_command())
    return TrainingResult(status, plan.run_dir, steps, losses, *commands)


def close_record(run_dir: Path, record: dict[str, Any], state: Training) -> None:
    """Write down how far this start came, and draw it."""
    record |= {"steps": state.step, **state.losses}
    record["starts"][-1] |= {"to_step": state.step, "ended": files.now(), **state.timings()}
    files.write_json(run_dir / "run.json", record)
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


def described(plan: Plan, what: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of a run beside its starts; `what` is its `identity`."""
    fast, on_embedding = plan.fast, plan.stock["data"]["kwargs"]["embed_key"]
    first = plan.data.files[0]
    return {
        "status": "training",
        "stock_command": plan.stock_command(),
        "settings": plan.settings,
        "typed": plan.typed,
        "nodes": plan.trainer.ranks.nodes,
        "trainer": plan.trainer.variables(),
        "fast_loading": fast.layout if fast else None,
        "data_cache": str(fast.folder) if fast else None,
        "ablation": plan.pert_features["ablation"],
        "python_hash_seed": os.environ.get("PYTHONHASHSEED"),
        "identity": what,
        # what `state tx infer` takes the columns of a template for
        "genes": None if on_embedding else files.fingerprint(first.genes),
        "input_width": first.width,
        "hardware": hardware(),
        "git": {
            "working_directory": files.git_state(Path.cwd()),
            "scripts": files.git_state(Path(__file__).parent),
        },
        # for the other ranks, where there are any
        "launch": launch_id(),
        "overrides": plan.overrides(plan.own_toml, plan.own_features),
        "step_checkpoints": plan.step_checkpoints,
    }


def start(plan: Plan, how: str, notes: Notes) -> dict[str, Any]:
    """Prepare the run directory for a new, replaced or resumed run; returns its record."""
    earlier = plan.earlier
    if earlier and how == "resume":
        step = prepare_resume(plan, notes)
        record = dict(earlier)
    else:
        step = 0
        record = {"format": RUN_FORMAT, "starts": [], "steps": 0, "replaces": []}
        if earlier and how == "overwrite":
            note_lost_labels(plan.own_features, notes)
            aside = str(move_aside(plan.run_dir))
            record["replaces"] = [*earlier["replaces"], aside]
            notes.line(f"the old run is kept as {aside} until this one has finished")
    what, own = identity(plan), plan.own_features
    kept = read_manifest(own) if own.exists() else None  # labels may have been added to it
    new_features = kept is None or trained_sha256(kept) != what["features"]["sha256"]
    record |= described(plan, what)
    this_start = {
        "from_step": step,
        "at": files.now(),
        "folder": str(Path.cwd()),
        "command": list(plan.options.command),
        "toml": {"path": str(plan.toml.absolute()), "sha256": files.sha256_of(plan.toml)},
        "processes": str(plan.trainer.ranks),
    }
    if step:
        this_start["note"] = "data order and random state start anew"
    record["starts"] = [*record["starts"], this_start]
    # run.json first: a run cut off here can be resumed; the other ranks wait for "training"
    files.write_json(plan.run_dir / "run.json", record | {"status": "preparing"})
    write_inputs(plan, new_features, notes)
    files.write_json(plan.run_dir / "run.json", record)
    return record
