"""The run directory: what is there, and what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from state_esm_features.console import InputError
from state_esm_features.training.run_dir import RUN_FORMAT, differences, earlier_run


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
