"""State's own training with our callbacks at one seam: losses, signals, checkpoints.

What is trained was decided in `plan`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from state_esm_features.console import (
    STOP_SIGNALS,
    Bar,
    InputError,
    Stopped,
    announce,
    first_line,
    libraries_into,
    on_signals,
    raise_if_stopped,
    raise_stopped,
    some,
)
from state_esm_features.files import DISK_FULL, read_json, same_file, write_whole
from state_esm_features.training.checkpoints import without_numpy, write_over_old_names
from state_esm_features.training.launch import STARTED, Ranks, launcher
from state_esm_features.training.plan import Plan
from state_esm_features.training.processes import end_with_parent, loaders_end_with_us
from state_esm_features.training.progress import Training, note_progress
from state_esm_features.training.rendezvous import Party, connecting, wait_for_first
from state_esm_features.training.stock import compose
from state_esm_features.training.trainer import variables_set


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
    state.connected.set()
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
    raise_if_stopped()
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
        announce(f"{Stopped(signum)}: stopping after this step")

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def on_train_start(state: Training, trainer: Any, module: Any) -> None:
    take_signals(state, trainer)
    state.first = state.step = state.row_step = int(trainer.global_step)
    state.started = state.row_moment = time.monotonic()
    state.waited = 0.0  # of the sanity check
    if trainer.is_global_zero:
        state.bar = Bar(trainer.max_steps, "step", "step", initial=state.first, warm_up=5)


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
    # this process ends by itself: Lightning would kill it within seconds of a rank that it started
    getattr(trainer.strategy.launcher, "procs", []).clear()
    if not (isinstance(exception, Stopped) and state.sound and state.step > state.first):
        return
    trainer.save_checkpoint(state.last_checkpoint)
    announce(f"saved step {state.step:,} in {state.last_checkpoint}; --resume goes on")


READ_BEFORE: dict[str, tuple[int, int]] = {}
"""{data file: size and time} of what this process has trained on."""


def refuse_changed_files(plan: Plan) -> None:
    """cell-load keeps obs of a file, by path, for the life of the process (a notebook's, say)."""
    stats = {str(f.path.absolute()): f.path.stat() for f in plan.data.files}
    now = {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
    changed = [path for path, state in now.items() if READ_BEFORE.get(path, state) != state]
    if changed:
        raise InputError(
            f"{some(changed)} changed since this Python first trained on it, and cell-load keeps "
            "the old labels in memory; restart the notebook kernel, or use !python"
        )
    READ_BEFORE.update(now)


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


def train(
    state: Training, record: Mapping[str, Any], party: Party | None = None, first: bool = True
) -> None:
    """Run the stock training; what it and its libraries say goes to train.log in the run directory.

    Parameters
    ----------
    state
        Filled in as the training runs.
    record
        run.json, with the overrides of the stock configuration.
    party
        By which this rank knows of those that were started elsewhere.
    first
        Whether this is the first rank, which alone keeps a log.

    Raises
    ------
    Stopped
        By a signal; what was reached is saved in last.ckpt.
    InputError
        Something of the user's: not a number, full disk, out of memory.
    """
    from omegaconf import OmegaConf
    from state._cli import run_tx_train

    cfg = OmegaConf.create(compose(record["overrides"]))
    printed = state.run_dir / "train.log" if first else Path(os.devnull)
    with (
        printed.open("a", buffering=1, encoding="utf-8") as log_file,
        loaders_end_with_us(),
        variables_set({**record["trainer"], STARTED: "1"}),
        libraries_into(log_file),
        # of what comes before `take_signals`: Lightning itself ends the process on Ctrl-C
        on_signals(raise_stopped, STOP_SIGNALS),
        appended_callbacks(our_callbacks(state, record["step_checkpoints"])),
    ):
        try:
            with connecting(state.connected, party):
                run_tx_train(cfg)
        except Exception as error:
            raise in_plain_words(error, state) from error
        finally:
            if state.bar:
                state.bar.close()
    if first:
        # `state tx predict` takes last.ckpt, `state tx infer` final.ckpt; both are the last step's
        same_file(state.last_checkpoint.with_name("final.ckpt"), state.last_checkpoint)


class LostRank(InputError):
    """Another rank has ended, by itself or killed."""


def in_plain_words(error: Exception, state: Training) -> Exception:
    """What a user can mend, in one line; anything else as it is."""
    import torch

    text = str(error).strip()
    if "EADDRINUSE" in text:
        return InputError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} is taken on {platform.node()}: name "
            "another one on every machine"
        )
    if isinstance(error, torch.distributed.DistError) or re.search(r"gloo.transport|NCCL", text):
        return LostRank(
            f"another process of this training has ended, or its machine cannot be reached, at "
            f"step {state.step:,}; {state.good_checkpoint()}: --resume, started again on every "
            f"machine ({first_line(error)})"
        )
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
    return InputError(
        f"{what} (at step {state.step:,}; {state.good_checkpoint()}): {first_line(error)}"
    )


def follow(run_dir: Path, ranks: Ranks, several_datasets: bool) -> None:
    """Train as one of several ranks, on what the first one has decided and written.

    Lightning (and srun, torchrun, a hand on every machine) starts the same command once for every
    rank; the checks, the lock, moving aside and the manifests are the first one's.
    """
    follower = None
    if ranks.by_lightning:  # for a process of ours on this machine, which has waited
        end_with_parent()
    else:
        check = functools.partial(check_prepared, run_dir, several_datasets)
        follower = wait_for_first(run_dir, ranks.rank, check)
        if follower is None:
            return
        announce(f"{follower.who()} trains {run_dir} together with {follower.holder()}")
    record = read_json(run_dir / "run.json") or {}
    state = Training(run_dir, record["identity"]["settings"]["training.max_steps"])
    try:
        train(state, record, follower, first=False)
    except (Stopped, Exception) as error:
        if follower and not state.started:
            follower.end(1, first_line(error))
        # of what all ranks notice the first one says why: who started this one would kill it then
        said = state.together or isinstance(error, LostRank)
        if not ((said and ranks.by_lightning) or (state.together and launcher())):
            raise
    if follower:
        announce(f"{follower.who()}: finished with step {state.step:,}; see the first rank")


def check_prepared(run_dir: Path, several_datasets: bool) -> None:
    """What the first rank has prepared can be trained by this process too.

    Raises
    ------
    InputError
        Paths are others on this machine, or the order of the data would be.
    """
    record = read_json(run_dir / "run.json") or {}
    stock = compose(record["overrides"])
    run, here = Path(stock["output_dir"], stock["name"]), platform.node()
    if not (run / "run.json").exists() or not run.samefile(run_dir):
        raise InputError(
            f"the run is {run} for the first rank, and {run_dir} on {here}: name a folder that has "
            "one path on all machines, with --output-dir"
        )
    sizes = record["identity"]["data"] if not record["fast_loading"] else {}
    other = [path for path, size in sizes.items() if bytes_of(path) != size]
    if other:
        raise InputError(f"not the data of the first rank on {here}, or none: {some(other)}")
    seeds = [record["python_hash_seed"], os.environ.get("PYTHONHASHSEED")]
    if several_datasets and seeds[0] != seeds[1]:
        raise InputError(
            f"PYTHONHASHSEED is {seeds[0]} for the first rank and {seeds[1]} on {here}: set one "
            "value, as the order of several datasets depends on it"
        )


def bytes_of(path: str) -> str | None:
    """Size of a file as the identity of a run has it; None if there is none."""
    return f"{Path(path).stat().st_size:,} bytes" if Path(path).is_file() else None
