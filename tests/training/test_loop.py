"""Further processes of a training: can they train what the first one prepared."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from state_esm_features.console import InputError
from state_esm_features.training.loop import check_prepared

HOST = platform.node()


@pytest.fixture
def prepared(tmp_path: Path) -> dict[str, Any]:
    """What run.json of tmp_path/runs/run says to the others; it is written by `check`."""
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "screen.h5ad").write_bytes(b"12345")
    return {
        "overrides": [f"output_dir={tmp_path}/runs", "name=run"],
        "identity": {"data": {str(tmp_path / "screen.h5ad"): "5 bytes"}},
        "fast_loading": None,
        "python_hash_seed": "0",
    }


def refused(run_dir: Path, record: dict[str, Any], several_datasets: bool) -> str | None:
    (run_dir / "run.json").write_text(json.dumps(record))
    try:
        check_prepared(run_dir, several_datasets)
    except InputError as error:
        return str(error)
    return None


def test_a_run_that_is_there_with_its_data_is_trained(
    prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "runs/run"
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert refused(run_dir, prepared, True) is None
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert refused(tmp_path / "link/run", prepared, True) is None
    data = str(tmp_path / "away.h5ad")
    copies = prepared | {"fast_loading": "sorted", "identity": {"data": {data: "5 bytes"}}}
    assert refused(run_dir, copies, True) is None  # only the copies are read


def test_data_that_is_missing_or_another_is_named(prepared: dict[str, Any], tmp_path: Path) -> None:
    data = str(tmp_path / "screen.h5ad")
    for size, path in (("6 bytes", data), ("5 bytes", f"{data}.away")):
        prepared["identity"]["data"] = {path: size}
        assert refused(tmp_path / "runs/run", prepared, False) == (
            f"not the data of the first rank on {HOST}, or none: {path}"
        )


def test_a_folder_of_another_name_is_refused(prepared: dict[str, Any], tmp_path: Path) -> None:
    prepared["overrides"][0] = "output_dir=/mnt/elsewhere"
    assert refused(tmp_path / "runs/run", prepared, False) == (
        f"the run is /mnt/elsewhere/run for the first rank, and {tmp_path}/runs/run on {HOST}: "
        "name a folder that has one path on all machines, with --output-dir"
    )


def test_several_datasets_need_one_hash_seed(
    prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    run_dir = tmp_path / "runs/run"
    assert refused(run_dir, prepared, False) is None
    assert refused(run_dir, prepared, True) == (
        f"PYTHONHASHSEED is 0 for the first rank and 7 on {HOST}: set one value, as the order of "
        "several datasets depends on it"
    )
