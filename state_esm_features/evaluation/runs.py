"""The parts of an evaluation, done one after the other, or one on each GPU.

Each is done whole or not at all: a file in `done/` says that it is. What figures mean is not known
here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from state_esm_features.console import InputError, announce, raise_if_stopped, warn
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.evaluation import design, effects, planted
from state_esm_features.evaluation.commands import CHECKPOINT, command
from state_esm_features.evaluation.groups import genes_of
from state_esm_features.evaluation.study import (
    Study,
    describe_groups,
    duration,
    groups_of_test,
)
from state_esm_features.evaluation.summary import EVERY_METRIC
from state_esm_features.files import Busy, read_json, run_lock, write_json, write_text
from state_esm_features.training.features_check import read_features
from state_esm_features.training.progress import read_progress
from state_esm_features.training.stock import devices_of

if TYPE_CHECKING:
    import pandas as pd

TAIL = 15
"""Last lines of a log that are shown when a part fails."""

REAL_EFFECTS = "real_effects.json"
"""RMS of the real effects less their noise, once something is planted."""

WARM_UP = 5
"""Steps of a training before its speed is measured."""

PROCESSES = (design.FEATURES, design.TRAINING, design.PREDICTION)


class Process(Protocol):
    """A subprocess.Popen."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def terminate(self) -> None: ...


Begin = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""Starts a command in an environment; what it says is added to a file."""


def begin_process(words: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start a command where one works, in the process group of this one."""
    with log.open("ab") as f:
        return subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=f, stderr=f, env=dict(environment)
        )


def devices() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each model that is trained at once."""
    import torch

    return device_names(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def places(study: Study) -> list[str | None]:
    """`devices`, or one place where a training takes several GPUs itself (training.devices)."""
    return devices() if devices_of(study.stock) == 1 else [None]


def device_names(number: int, visible: str) -> list[str | None]:
    """Names of GPUs, of those that are visible; [None], as it is, where there are no two."""
    if number < 2:
        return [None]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return list(names[:number]) if len(names) >= number else [str(i) for i in range(number)]


def marker(study: Study, key: str) -> Path:
    return study.folder / "done" / f"{key}.json"


def parts_done(study: Study) -> dict[str, float]:
    """{key: seconds it took} of the parts that are done."""
    found = {}
    for part in study.parts:
        record = read_json(marker(study, part.key))
        if record is not None:
            found[part.key] = float(record["seconds"])
    return found


def time_left(
    study: Study, done: Mapping[str, float], slots: int, step: float | None = None
) -> str | None:
    """'about 2.3 hours', by what such parts took on average; None until a training was measured.

    Parameters
    ----------
    done
        {key: seconds} of the parts that are done.
    step
        Seconds a step of a training that runs.
    """

    def sort_of(part: design.Part) -> str:
        counts_only = part.model is not None and not part.model.trains
        return f"{part.kind}, {counts_only}" if part.kind == design.TRAINING else part.kind

    took: dict[str, list[float]] = {}
    for part in study.parts:
        if part.key in done:
            took.setdefault(sort_of(part), []).append(done[part.key])
    means = {sort: fmean(seconds) for sort, seconds in took.items()}
    training = sort_of(design.Part(design.TRAINING, ""))
    if step is not None:
        means.setdefault(training, step * study.max_steps)
    if training not in means:
        return None
    left = [means.get(sort_of(part), 0.0) for part in study.parts if part.key not in done]
    only = "" if design.PREDICTION in means else " of training"
    return f"about {duration(sum(left) / slots)}{only}"


def measured_step(study: Study, part: design.Part) -> float | None:
    """Seconds a step of a training that runs, once it has taken some."""
    if part.kind != design.TRAINING or part.model is None or not part.model.trains:
        return None
    rows = [r for r in read_progress(study.run_dir(part.name) / "progress.csv") if r["train_loss"]]
    if not rows or int(rows[-1]["step"]) < WARM_UP:
        return None
    return float(rows[-1]["seconds"]) / int(rows[-1]["step"])


class Work:
    """What runs now, and what is done.

    Parameters
    ----------
    begin
        As `begin_process`.
    """

    def __init__(self, study: Study, begin: Begin) -> None:
        self.study, self.begin = study, begin
        self.slots = places(study)
        self.done = parts_done(study)
        self.running: dict[int, tuple[design.Part, Process, float]] = {}
        self.said_time = ""

    def do_all(self) -> None:
        """Do every part that is not done.

        Raises
        ------
        InputError
            One failed, with the end of its log.
        """
        parts = self.study.parts
        waiting = [part for part in parts if part.key not in self.done]
        try:
            while waiting or self.running:
                self.collect()
                free = [i for i in range(len(self.slots)) if i not in self.running]
                part = design.ready(waiting, self.done) if free else None
                if part is None:
                    self.say_time()
                    raise_if_stopped()
                    time.sleep(0.05)
                    continue
                waiting.remove(part)
                place = f"{parts.index(part) + 1:,} of {len(parts):,}"
                announce(f"{place}  {part.kind} of {part.name}")
                self.start(part, free[0])
        except BaseException:
            self.stop()
            raise

    def start(self, part: design.Part, slot: int) -> None:
        """Begin a part that is a process, or do one that is not."""
        began = time.monotonic()
        if part.kind not in PROCESSES:
            {design.SCREEN: plant, design.SCORES: write_scores}[part.kind](self.study, part)
            self.finish(part, began)
            clear(self.study, part)
            return
        make_room(self.study, part)
        environment, device = dict(os.environ), self.slots[slot]
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        log = log_of(self.study, part)
        log.parent.mkdir(parents=True, exist_ok=True)
        process = self.begin(command(self.study, part), environment, log)
        self.running[slot] = part, process, began

    def collect(self) -> None:
        """Take note of processes that have ended."""
        for slot, (part, process, began) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[slot]
            if code:
                raise failed(self.study, part, code)
            after(self.study, part)
            self.finish(part, began)

    def finish(self, part: design.Part, began: float) -> None:
        seconds = time.monotonic() - began
        write_json(marker(self.study, part.key), {"seconds": round(seconds, 1)})
        self.done[part.key] = seconds

    def say_time(self) -> None:
        """How long it will take: once a training has taken some steps, and once one is scored."""
        scored = any(key.endswith(f".{design.SCORES}") for key in self.done)
        if self.said_time == ("whole" if scored else "training"):
            return
        steps = [measured_step(self.study, part) for part, _, _ in self.running.values()]
        step = next((s for s in steps if s is not None), None)
        left = time_left(self.study, self.done, len(self.slots), step)
        if left is not None:
            self.said_time = "whole" if scored else "training"
            announce(f"{left} left, as measured now")

    def stop(self) -> None:
        """End the processes, and wait until they have."""
        for _, process, _ in self.running.values():
            if process.poll() is None:
                process.terminate()
        for _, process, _ in self.running.values():
            process.wait()


def try_features(study: Study, begin: Begin) -> list[str]:
    """What a dry run of own vectors warns of; nothing is kept of it.

    Raises
    ------
    InputError
        It fails, as it would in earnest.
    """
    part = design.Part(design.FEATURES, design.OWN)
    with tempfile.TemporaryDirectory(prefix="esm-evaluation-") as place:
        log = Path(place, "features.log")
        code = begin([*command(study, part), "--dry-run"], dict(os.environ), log).wait()
        if code:
            raise InputError(f"the vectors cannot be made (exit code {code}):{end_of(log)}")
        return warnings_in(log)


def warnings_in(log: Path) -> list[str]:
    """What a command has warned of, each once."""
    start = "warning: "
    lines = log.read_text(errors="replace").splitlines()
    found = dict.fromkeys(line for line in lines if line.startswith(start))
    return [line.removeprefix(start) for line in found]


def end_of(log: Path) -> str:
    """Its last lines, each on a line of its own, for a message."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL:]
    return "".join(f"\n  {line}" for line in lines)


def log_of(study: Study, part: design.Part) -> Path:
    return study.folder / "logs" / f"{part.key}.log"


def failed(study: Study, part: design.Part, code: int) -> InputError:
    """The error of a part that failed: the end of its log, and where that is."""
    log = log_of(study, part)
    how = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
    if code == -9:
        how += ", as the system does when memory is short"
    error = InputError(
        f"{part.kind} of {part.name} failed ({how}); what is done is kept, and the same command "
        f"goes on there. The end of {log}:{end_of(log)}"
    )
    error.code = Busy.code if code == Busy.code else InputError.code
    return error


def make_room(study: Study, part: design.Part) -> None:
    """Take away what a part left that was cut off.

    A training that was cut off begins anew, unless --val-freq asks for checkpoints: State's resume
    is not exact, and the table would depend on where it was cut.
    """
    if part.kind == design.TRAINING and not study.resumes:
        run_dir = study.run_dir(part.name)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with run_lock(run_dir):
            shutil.rmtree(run_dir, ignore_errors=True)
    if part.kind == design.PREDICTION:
        shutil.rmtree(study.predictions(part.name), ignore_errors=True)


def after(study: Study, part: design.Part) -> None:
    """What belongs to a part whose process has ended well.

    Raises
    ------
    InputError
        The sources of features have changed since those of own vectors were made.
    """
    if part.kind == design.FEATURES:
        own, new = (
            read_manifest(study.features_file(name)) or {} for name in (design.OWN, part.name)
        )
        if own.get("sources") != new.get("sources"):
            raise InputError(
                f"the sources of the vectors have changed since {study.features_file(design.OWN)} "
                "was made: choose another --output-dir"
            )
        if part.name == design.OWN:
            for text in warnings_in(log_of(study, part)):
                warn(text)
            announce(describe_groups(groups_of_test(study)))
    if part.kind == design.PREDICTION:
        for checkpoint in (study.run_dir(part.name) / "checkpoints").glob("*.ckpt"):
            if checkpoint.name != CHECKPOINT:
                checkpoint.unlink()


def plant(study: Study, part: design.Part) -> None:
    """Write a planted screen; what the real effects are is measured once."""
    own, data = study.features_file(design.OWN), study.data
    manifest = read_manifest(own)
    assert manifest is not None
    rms, controls = planted.real_effect(data)
    write_json(study.folder / REAL_EFFECTS, {"rms": rms})
    genes, control = genes_of(manifest), data.columns.control
    vectors = {
        label: vector.numpy()
        for label, vector in read_features(own).items()
        if label != control and label not in manifest["missing"] and genes.get(label)
    }
    strength = design.strength_of(part.name)
    assert strength is not None
    summed = manifest["policy"]["combine"] == "sum"
    labels = [
        {t: [x for x in cells if x != control] for t, cells in f.by_type.items()}
        for f in data.files
    ]
    response = planted.respond(
        planted.standardised(vectors, genes, summed), controls, labels, strength * rms
    )
    about = {"strength": strength, "real_rms": rms}
    planted.write_screen(study.planted(part.name), data, response, about)


def write_scores(study: Study, part: design.Part) -> None:
    """Score what was predicted."""
    model, columns = part.model, study.data.columns
    assert model is not None
    folder = study.predictions(part.name)
    scores = effects.all_scores(folder, columns.pert, columns.cell_type, columns.control)
    about = {"screen": model.screen, "method": model.method, "seed": model.seed}
    text = scores.assign(**about).to_csv(sep="\t", index=False)
    write_text(study.scores_file(part.name), text)


def clear(study: Study, part: design.Part) -> None:
    """Take the predicted cells away once they are scored: of every model as many as of the test."""
    if part.kind == design.SCORES:
        for name in (effects.TRUE, effects.PREDICTED):
            (study.predictions(part.name) / name).unlink(missing_ok=True)


def read_scores(study: Study) -> pd.DataFrame:
    """The scores of all models, with the group of each perturbation."""
    import pandas as pd

    groups = groups_of_test(study)
    names = {"cell_type": str, "perturbation": str}  # 1 and NA are names, too
    how = {"sep": "\t", "keep_default_na": False, "na_values": {m: [""] for m in EVERY_METRIC}}
    files = (study.scores_file(model.name) for model in study.models)
    scores = pd.concat([pd.read_csv(f, dtype=names, **how) for f in files], ignore_index=True)
    return scores.assign(group=scores["perturbation"].map(groups))
