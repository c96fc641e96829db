"""The state of a run before labels were added to it: kept, and put back.

Adding itself stands in `new_labels`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from state_esm_features.console import InputError, some
from state_esm_features.embedding.features_file import manifest_path
from state_esm_features.files import read_json, run_lock, sha256_of, write_whole
from state_esm_features.training.trained_run import TrainedRun

FOLDER = "before_adding"
"""In a run: a folder for each addition, 1, 2, ..., with the files as they were before it."""

PUT_BACK = ".undo"
"""Ends the name of a state that is being put back: if that is cut off, it is finished later."""

WAIT_SECONDS = 60
"""How long to wait for another process that adds labels to the same run."""


def changed_files(run: TrainedRun) -> list[Path]:
    """The files that an addition changes."""
    return [run.features, manifest_path(run.features), run.map_path]


def states(run: TrainedRun) -> list[Path]:
    """The states that are kept, the oldest first."""
    found = [p for p in (run.folder / FOLDER).glob("*") if p.name.isdecimal()]
    return sorted(found, key=lambda p: int(p.name))


def copy_whole(sources: Iterable[Path], folder: Path) -> None:
    """Copies of files that are there, each whole or not at all.

    No links: State writes into the map as it stands when the run is resumed.
    """
    for source in filter(Path.exists, sources):
        with source.open("rb") as content:
            write_whole(folder / source.name, partial(shutil.copyfileobj, content))


def keep_state(run: TrainedRun) -> None:
    """Keep the files of a run before labels are added; whole or not at all.

    If the last addition was cut off, its map is still that of before, and so is what was kept.
    """
    kept = states(run)
    if kept and sha256_of(kept[-1] / run.map_path.name) == sha256_of(run.map_path):
        return
    unfinished = run.folder / FOLDER / ".tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        copy_whole([*changed_files(run), run.folder / "run.json"], unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    number = int(kept[-1].name) + 1 if kept else 1
    unfinished.rename(unfinished.with_name(str(number)))


def finish_undo(run: TrainedRun) -> None:
    """Finish what a call of --undo began that was cut off."""
    if any((run.folder / FOLDER).glob(f"*{PUT_BACK}")):
        with run_lock(run.folder, "taking labels out of", WAIT_SECONDS):
            put_back(run)


def put_back(run: TrainedRun) -> None:
    """Put back the state that is marked for it; the mark goes last."""
    for state in (run.folder / FOLDER).glob(f"*{PUT_BACK}"):
        copy_whole([state / path.name for path in changed_files(run)], run.folder)
        shutil.rmtree(state)


def undo_addition(run: TrainedRun) -> list[str]:
    """Put a run back to before the last addition; returns the labels that were taken out.

    Raises
    ------
    InputError
        Nothing was added, or the run has trained on since.
    """
    with run_lock(run.folder, "taking labels out of", WAIT_SECONDS):
        put_back(run)
        for state in reversed(states(run)):
            labels = labels_since(run, state)
            if not labels:  # the addition was cut off before it changed anything
                shutil.rmtree(state)
                continue
            require_untrained(run, state, labels)
            state.rename(state.with_name(state.name + PUT_BACK))
            put_back(run)
            return labels
    added = (read_json(manifest_path(run.features)) or {}).get("added")
    earlier = f"nothing was added to {run.named} with --into-run, or all of it was taken out again"
    if added:
        earlier = (
            f"labels were added to {run.named} by an earlier version, which kept the old files as "
            "FILE.orig: copy these back by hand"
        )
    raise InputError(f"nothing to undo: {earlier}")


def labels_since(run: TrainedRun, state: Path) -> list[str]:
    """Labels that the run knows now, by its features or its map, and did not know in a state."""

    def known(folder: Path) -> dict[str, None]:
        features, in_map = (run.vectors(folder / p.name) for p in (run.features, run.map_path))
        return dict.fromkeys([*features, *run.known(in_map, features)])

    before = known(state)
    return [label for label in known(run.folder) if label not in before]


def require_untrained(run: TrainedRun, state: Path, labels: list[str]) -> None:
    """Refuse to put a state back under checkpoints that were trained after it."""
    before, now = (
        len((read_json(folder / "run.json") or {}).get("starts", ()))
        for folder in (state, run.folder)
    )
    if now != before:
        raise InputError(
            f"{run.named} has trained on since {some(labels)} were added: the old files are of the "
            "run as it was. Labels that you do not predict do no harm"
        )
