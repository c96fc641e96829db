"""--training-precision: Lightning's, as State's own command has it, and part of what a run is."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Result, run_script, run_state
from test_train_run import FAST, FILES, TINY, checkpoint, make_screen, run_json

HALF = ("--training-precision", "bf16-mixed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with screen, TOML and features, and in runs/half a run of two steps."""
    folder = make_screen(tmp_path_factory.mktemp("screen"), {"sim": SMALL})
    done = train(folder, "--max-steps", 2, *HALF)
    assert done.code == 0, done.err
    assert "precision bf16-mixed\n" in done.err
    return folder


def train(folder: Path, *words: object) -> Result:
    places = ("--name", "half", *FAST, *TINY)
    return run_script("train_with_esm_features", *FILES, *words, *places, cwd=folder)


def test_weights_are_those_of_the_command_that_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_json(folder / "runs/half")
    assert record["trainer"] == {"PL_TRAINER_PRECISION": "bf16-mixed"}
    assert record["identity"]["trainer"] == {"precision": "bf16-mixed"}
    words = shlex.split(record["stock_command"])
    begin = words.index("state")
    for variable in words[:begin]:
        monkeypatch.setenv(*variable.split("="))
    assert "PL_TRAINER_PRECISION=bf16-mixed" in words[:begin]
    done = run_state(*words[begin + 1 :], "name=stock", cwd=folder)
    assert done.code == 0, done.err
    stock = torch.load(folder / "runs/stock/checkpoints/final.ckpt", weights_only=False)
    ours = checkpoint(folder / "runs/half", "final")["state_dict"]
    assert ours.keys() == stock["state_dict"].keys()
    assert all(torch.equal(ours[name], stock["state_dict"][name]) for name in ours)
    assert "bfloat16 Automatic Mixed Precision" in (folder / "runs/half/train.log").read_text()


def test_a_run_keeps_its_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = folder / "runs/half"
    done = train(folder, "--max-steps", 2)
    assert (done.code, done.err.splitlines()[-1]) == (
        1,
        f"error: {run_dir} exists with other inputs (trainer precision: bf16-mixed -> none); "
        "--resume cannot mix them, --overwrite trains anew, --name NAME makes another run",
    )
    done = train(folder, "--max-steps", 3, "--resume", "--training-precision", "32-true")
    assert (done.code, done.err.splitlines()[-1]) == (
        1,
        f"error: {run_dir} was trained otherwise (training.max_steps: 2 -> 3; trainer precision: "
        "bf16-mixed -> none); resuming would mix two runs. --overwrite trains anew, --name NAME "
        "makes another run, --force mixes them",
    )
    monkeypatch.setenv("PL_TRAINER_PRECISION", "bf16-mixed")
    done = train(folder, "--max-steps", 2)
    assert done.code == 0
    assert "variable  PL_TRAINER_PRECISION=bf16-mixed (you set it; Lightning reads it)" in done.err
    assert done.err.splitlines()[-1].startswith("up to date: ")
    monkeypatch.delenv("PL_TRAINER_PRECISION")
    done = train(folder, "--max-steps", 3, "--resume")
    assert done.code == 0, done.err
    record = run_json(run_dir)
    assert (record["steps"], record["trainer"]) == (3, {"PL_TRAINER_PRECISION": "bf16-mixed"})


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (
            ("--training-precision", "16-mixed"),
            {},
            "train_with_esm_features.py: error: argument --training-precision: invalid choice: "
            "'16-mixed' (choose from '32-true', 'bf16-mixed')",
        ),
        (
            (),
            {"PL_TRAINER_PRECISION": "16-mixed", "PL_TRAINER_NUM_NODES": "none"},
            "error: PL_TRAINER_NUM_NODES must be a whole number above 0, got 'none'",
        ),
        (
            (),
            {"PL_TRAINER_PRECISION": "16-mixed"},
            "error: PL_TRAINER_PRECISION=16-mixed: a training has 32-true or bf16-mixed (16-mixed "
            "would silently be bf16-mixed on a CPU); unset it, or use --training-precision",
        ),
    ],
)
def test_another_precision_is_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    variables: dict[str, str],
    said: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = train(folder, "--max-steps", 1, *words)
    assert done.code == (2 if words else 1)
    assert done.err.splitlines()[-1].replace("32-true, bf16-mixed", "'32-true', 'bf16-mixed'") == (
        said
    )
