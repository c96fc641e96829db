"""The run directory: what is there, and what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from state_esm_features.console import InputError, Notes
from state_esm_features.training.run_dir import RUN_FORMAT, decide, differences, earlier_run
from state_esm_features.training_options import RunOptions


def test_differences_are_named_with_before_and_now() -> None:
    before = {"settings": {"a.b": 1, "gone": 2, "same": 3}, "features": {"sha256": "0" * 64}}
    now = {"settings": {"a.b": 5, "same": 3, "new": None}, "features": {"sha256": "1" * 64}}
    assert differences(before, now) == {
        "a.b": "1 -> 5",
        "gone": "2 -> none",
        "features sha256": "000000000000... -> 111111111111...",
    }
    assert differences(before, before) == {}


def test_a_run_is_there_only_with_its_record(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert earlier_run(run) is None
    run.mkdir()
    assert earlier_run(run) is None
    (run / "other.txt").write_text("x")
    (run / "run.json").write_text(json.dumps({"format": RUN_FORMAT, "steps": 3}))
    assert earlier_run(run) == {"format": RUN_FORMAT, "steps": 3}
    for content in ("{", "[]", json.dumps({"format": 0})):
        (run / "run.json").write_text(content)
        with pytest.raises(InputError) as error:
            earlier_run(run)
        assert str(error.value) == (
            f"{run} exists and is no run of this script; choose another --name, or move it away"
        )


NEW_STEPS = {"training.max_steps": "100 -> 200"}
OTHER_DATA = {"data sha256": "aaa -> bbb", "training.lr": "0.1 -> 0.2"}
FINISHED, STOPPED = {"status": "finished"}, {"status": "stopped", "steps": 1234}
RESUME, FORCE = RunOptions(resume=True), RunOptions(resume=True, force=True)
ANEW = RunOptions(overwrite=True)


@pytest.mark.parametrize(
    ("earlier", "changed", "options", "how", "said"),
    [
        (None, {}, RunOptions(), "new", ""),
        (None, {}, RESUME, "new", ""),
        (FINISHED, {}, RunOptions(), "up to date", ""),
        (FINISHED, {}, RESUME, "up to date", ""),
        (FINISHED, {}, ANEW, "overwrite", ""),
        (FINISHED, OTHER_DATA, ANEW, "overwrite", ""),
        (STOPPED, {}, RESUME, "resume", ""),
        (
            FINISHED,
            NEW_STEPS,
            RESUME,
            "resume",
            "changed since the run was started: training.max_steps: 100 -> 200",
        ),
        (
            STOPPED,
            OTHER_DATA,
            FORCE,
            "resume",
            "warning: --force: this run goes on otherwise than it was started (data sha256: aaa -> "
            "bbb; training.lr: 0.1 -> 0.2)",
        ),
    ],
)
def test_what_is_done_with_a_run_that_is_there(
    earlier: Any, changed: dict[str, str], options: RunOptions, how: str, said: str
) -> None:
    notes = Notes()
    assert decide(Path("runs/x"), earlier, changed, options, notes) == how
    assert "".join(text for _, text in notes.noted) == said


@pytest.mark.parametrize(
    ("earlier", "changed", "options", "message"),
    [
        (
            STOPPED,
            {},
            RunOptions(),
            "runs/x is not finished (stopped, step 1,234); --resume goes on with it, --overwrite "
            "trains anew, --name NAME makes another run",
        ),
        (
            FINISHED,
            NEW_STEPS,
            RunOptions(),
            "runs/x exists with other inputs (training.max_steps: 100 -> 200); --resume goes on "
            "with it, --overwrite trains anew, --name NAME makes another run",
        ),
        (
            FINISHED,
            OTHER_DATA,
            RunOptions(),
            "runs/x exists with other inputs (data sha256: aaa -> bbb; training.lr: 0.1 -> 0.2); "
            "--resume cannot mix them, --overwrite trains anew, --name NAME makes another run",
        ),
        (
            STOPPED,
            OTHER_DATA,
            RESUME,
            "runs/x was trained otherwise (data sha256: aaa -> bbb; training.lr: 0.1 -> 0.2); "
            "resuming would mix two runs. --overwrite trains anew, --name NAME makes another run, "
            "--force mixes them",
        ),
    ],
)
def test_a_run_that_is_there_is_not_touched_unasked(
    earlier: Any, changed: dict[str, str], options: RunOptions, message: str
) -> None:
    with pytest.raises(InputError) as error:
        decide(Path("runs/x"), earlier, changed, options, Notes())
    assert str(error.value) == message
