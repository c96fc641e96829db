"""Training with the real State model (small by configuration) on the real data module."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from conftest import (
    NO_HASH_SEED,
    PATIENCE,
    SMALL,
    Result,
    run_process,
    run_script,
    run_state,
    script_fork,
    until,
)
from demo_data import simulate, template
from run_demo import SMALL_MODEL

from state_esm_features.training.loop import READ_BEFORE

TINY = (
    *SMALL_MODEL,
    "model.kwargs.cell_set_len=8",
    "model.kwargs.hidden_dim=24",
    "model.kwargs.transformer_backbone_kwargs.head_dim=3",
    "model.kwargs.transformer_backbone_kwargs.intermediate_size=32",
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers=1",
)
TINY = tuple({t.split("=")[0]: t for t in TINY}.values())
FAST = ("--batch-size", "2", "--num-workers", "0", "--val-freq", "2")
FILES = ("--config", "config.toml", "--pert-features", "features.pt")


@pytest.fixture(scope="module")
def screen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with screen, TOML and features, which no test changes."""
    folder = tmp_path_factory.mktemp("screen")
    return make_screen(folder, {"sim": SMALL})


def make_screen(folder: Path, screens: dict[str, Any]) -> Path:
    from demo_data import vectors

    datasets, training, fewshot = [], [], []
    for name, screen in screens.items():
        simulate(screen).write_h5ad(folder / f"{name}.h5ad")
        datasets.append(f'{name} = "{name}.h5ad"')
        training.append(f'{name} = "train"')
        fewshot.append(f'[fewshot."{name}.simA"]\nval = ["SIM003"]\ntest = ["SIM004"]')
    (folder / "config.toml").write_text(
        "\n".join(["[datasets]", *datasets, "[training]", *training, *fewshot]) + "\n"
    )
    table = {k: torch.from_numpy(v) for k, v in vectors(SMALL).items()}
    torch.save(table, folder / "table.pt")
    done = run_script(
        "create_esm_pert_features",
        *("--from-toml", "config.toml", "--esm-embeddings", "table.pt"),
        *("--output", "features.pt"),
        cwd=folder,
    )
    assert (done.code, done.out) == (0, "features.pt\n"), done.err
    template(simulate(SMALL), ["SIM004", "SIM003"], cells=6).write_h5ad(folder / "template.h5ad")
    return folder


@pytest.fixture
def train(
    screen_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Result]:
    """Run train_with_esm_features.main([...]) in this process; runs go to tmp_path/runs."""
    import train_with_esm_features

    monkeypatch.chdir(screen_dir)

    def run(*arguments: object, name: str = "run", files: tuple[str, ...] = FILES) -> Result:
        capsys.readouterr()
        where = ("--output-dir", tmp_path / "runs", "--name", name)
        words = [str(a) for a in (*files, *FAST, *where, *arguments, *TINY)]
        code = train_with_esm_features.main(words)
        return Result(code, *capsys.readouterr())

    return run


def checkpoint(run_dir: Path, name: str) -> dict[str, Any]:
    """A checkpoint, loaded the way that executes nothing."""
    path = run_dir / "checkpoints" / f"{name}.ckpt"
    return torch.load(path, map_location="cpu", weights_only=True)


def flat_tensors(value: Any, prefix: str = "") -> dict[str, Any]:
    """{path: tensor or number} of nested dicts and lists."""
    if isinstance(value, dict):
        return {p: t for k, v in value.items() for p, t in flat_tensors(v, f"{prefix}/{k}").items()}
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return {p: t for i, v in items for p, t in flat_tensors(v, f"{prefix}/{i}").items()}
    return {prefix: value}


def assert_same_bits(a: Any, b: Any) -> None:
    a, b = flat_tensors(a), flat_tensors(b)
    assert a.keys() == b.keys() and a
    different = [
        k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])
    ]
    assert different == []


def run_json(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def stock_command(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The stock command line, as a user types it."""
    command = [str(Path(sys.executable).with_name("state")), *map(str, words)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_FORCE")}
    return subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)


# ---------------------------------------------------------------------------------------------
# Unmodified
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_weights_are_bit_identical_to_the_stock_command(
    screen_dir: Path, tmp_path: Path, workers: int
) -> None:
    flags = (*FILES, *FAST[:2], *FAST[4:], "--num-workers", workers, "--max-steps", 5)
    where = ("--output-dir", tmp_path / "ours", "--name", "run")
    ours = run_script("train_with_esm_features", *flags, *where, *TINY, cwd=screen_dir)
    assert ours.code == 0, ours.err
    assert ours.out == f"{tmp_path / 'ours' / 'run'}\n"
    there = ("--output-dir", tmp_path / "stock", "--name", "run", "--dry-run")
    plan = run_script("train_with_esm_features", *flags, *there, *TINY, cwd=screen_dir)
    words = shlex.split(plan.out)
    assert words[:3] == ["state", "tx", "train"]
    stock = stock_command(*words[1:], cwd=screen_dir)
    assert stock.returncode == 0, stock.stderr
    theirs = torch.load(
        tmp_path / "stock/run/checkpoints/final.ckpt", map_location="cpu", weights_only=False
    )
    own = checkpoint(tmp_path / "ours/run", "final")
    assert own["global_step"] == theirs["global_step"] == 5
    assert_same_bits(own["state_dict"], theirs["state_dict"])
    assert_same_bits(own["optimizer_states"], theirs["optimizer_states"])
    assert_same_bits(own["hyper_parameters"], theirs["hyper_parameters"])


SAID = (
    r"run       \S+",
    r"model     state_sm, 2 steps of 2 cell sets",
    r"data      1 file, 30 genes, \d+ cells",
    r"columns   perturbation target_gene, .*",
    r"split         cells  perturbations  .*",
    *(rf"{split}  .*" for split in ("train", "val", "test")),
    r"features  features.pt \(\d+ x 8\)",
    r"workers   \d",
    r"warning: \[fewshot\] holds SIM003.*",
    r"training; what State and its libraries say goes to \S+train.log",
    r"step 1 of 2, loss \S+, \d+% waiting for data, \S+ steps/s",
    r"step 2 of 2, loss \S+, (validation \S+, )?\d+% waiting for data, \S+ steps/s, 00:00 left",
    r"finished  .*",
    r"check     create-esm-pert-features --into-run .*",
    r"predict   state tx infer .*",
)
"""Every line of a training's stderr."""


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_our_own_lines_reaches_the_terminal(
    screen_dir: Path, tmp_path: Path, workers: int
) -> None:
    """Tips, devices, seeds, bars and warnings of State and its libraries are in train.log."""
    words = (*FILES, *FAST[:2], "--num-workers", workers, "--val-freq", 2, "--max-steps", 2)
    where = ("--output-dir", tmp_path, "--name", "run")
    done = run_process("train_with_esm_features", *words, *where, *TINY, cwd=screen_dir)
    assert (done.code, done.out) == (0, f"{tmp_path / 'run'}\n"), done.err
    strange = [x for x in done.err.splitlines() if not any(re.fullmatch(s, x) for s in SAID)]
    assert strange == []
    kept = (tmp_path / "run" / "train.log").read_text()
    for text in ("Seed set to", "Processing datasets", "GPU available", "Model created"):
        assert text in kept


def test_two_datasets_train_the_same_weights_every_time(tmp_path: Path) -> None:
    screens = {f"sim{n}": replace(SMALL, seed=n) for n in range(4)}  # in another order, other cells
    folder = make_screen(tmp_path, screens)
    weights = []
    for name in ("a", "b"):  # each is begun anew by the script itself; by chance alike: 1 in 24
        words = (*FILES, *FAST, "--max-steps", 2, "--name", name, *TINY)
        done = run_script("train_with_esm_features", *words, cwd=folder, before=NO_HASH_SEED)
        assert done.code == 0, done.err
        weights.append(checkpoint(folder / "runs" / name, "final")["state_dict"])
        assert run_json(folder / "runs" / name)["python_hash_seed"] == "0"
    assert_same_bits(weights[0], weights[1])


def test_one_function_of_stock_is_wrapped_only_while_it_trains(
    train: Callable[..., Result],
) -> None:
    import state._cli
    import state.tx.utils

    def attributes() -> dict[tuple[str, str], int]:
        """Every attribute of every stock module, and of the classes in them."""
        found = {}
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] not in {"state", "cell_load"}:
                continue
            for key, value in vars(module).items():
                found[name, key] = id(value)
                if isinstance(value, type) and value.__module__.startswith(("state", "cell_load")):
                    found |= {(f"{name}.{key}", k): id(v) for k, v in list(vars(value).items())}
        return found

    assert train("--max-steps", 1, name="imports everything").code == 0
    seen: dict[str, Any] = {}
    original = state.tx.utils.get_checkpoint_callbacks

    class Probe:
        """Looks at stock from inside the training function, where the seam is called."""

        def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
            seen["during"] = attributes()
            return original(*args, **kwargs)

    state.tx.utils.get_checkpoint_callbacks = probe = Probe()
    try:
        before = attributes()
        assert train("--max-steps", 1, name="probed").code == 0
        after = attributes()
    finally:
        state.tx.utils.get_checkpoint_callbacks = original
    assert probe is not original
    changed = {k for k in before | seen["during"] if before.get(k) != seen["during"].get(k)}
    added_by_import = {k for k in changed if k not in before}
    assert changed - added_by_import == {("state.tx.utils", "get_checkpoint_callbacks")}
    assert {k for k in before if before[k] != after.get(k)} == set()


def test_seam_is_restored_when_training_fails(
    train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import state.tx.utils

    original = state.tx.utils.get_checkpoint_callbacks
    with pytest.raises(ValueError, match="val_subsample_fraction must be in"):
        train("--max-steps", 1, "data.kwargs.val_subsample_fraction=2")
    assert state.tx.utils.get_checkpoint_callbacks is original
    assert run_json(tmp_path / "runs/run")["status"] == "failed"


# ---------------------------------------------------------------------------------------------
# The run directory
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(screen_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run of 4 steps."""
    runs = tmp_path_factory.mktemp("finished")
    flags = (*FILES, *FAST, "--max-steps", 4, "--output-dir", runs, "--name", "run")
    extra = ("--ckpt-every-n-steps", 3)
    result = run_script("train_with_esm_features", *flags, *extra, *TINY, cwd=screen_dir)
    assert result.code == 0, result.err
    return runs / "run", result


def test_a_run_stands_alone(finished: tuple[Path, Result], screen_dir: Path) -> None:
    run_dir, _ = finished
    assert (run_dir / "pert_features.pt").read_bytes() == (screen_dir / "features.pt").read_bytes()
    manifest = (run_dir / "pert_features.pt.json").read_bytes()
    assert manifest == (screen_dir / "features.pt.json").read_bytes()
    settings = torch.load(run_dir / "data_module.torch", weights_only=True)
    assert settings["perturbation_features_file"] == str(run_dir / "pert_features.pt")
    assert settings["toml_config_path"] == str(run_dir / "config.toml")
    assert f'sim = "{screen_dir / "sim.h5ad"}"' in (run_dir / "config.toml").read_text()
    names = {p.name for p in run_dir.iterdir()}
    assert names == {
        *("batch_onehot_map.torch", "cell_type_onehot_map.torch", "pert_onehot_map.pt"),
        *("checkpoints", "config.yaml", "data_module.torch", "var_dims.pkl", "version_0"),
        *("config.toml", "pert_features.pt", "pert_features.pt.json", "run.json", "train.log"),
        *("progress.csv", "training.png"),
    }


def test_the_model_is_given_the_vectors_of_the_features_file(finished: tuple[Path, Result]) -> None:
    run_dir, _ = finished
    used = torch.load(run_dir / "pert_onehot_map.pt", weights_only=True)
    features = torch.load(run_dir / "pert_features.pt", weights_only=True)
    assert_same_bits(used, features)
    weights = checkpoint(run_dir, "final")["state_dict"]
    assert weights["pert_encoder.0.weight"].shape[1] == SMALL.width


def test_checkpoints_of_sparse_data_load_without_pickle(finished: tuple[Path, Result]) -> None:
    run_dir, _ = finished
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["best.ckpt", "final.ckpt", "last.ckpt", "step=3.ckpt"]
    steps = {p: checkpoint(run_dir, p.removesuffix(".ckpt"))["global_step"] for p in names}
    assert {k: v for k, v in steps.items() if k != "best.ckpt"} == {
        "final.ckpt": 4,
        "last.ckpt": 4,
        "step=3.ckpt": 3,
    }
    hyper = checkpoint(run_dir, "final")["hyper_parameters"]
    assert (hyper["input_dim"], type(hyper["input_dim"])) == (SMALL.genes, int)


def test_the_end_says_where_steps_losses_and_what_next(finished: tuple[Path, Result]) -> None:
    run_dir, result = finished
    record = run_json(run_dir)
    assert record["status"] == "finished" and record["steps"] == 4
    lines = result.err.splitlines()[-3:]
    losses = f"train_loss {record['train_loss']:.5g}, val_loss {record['val_loss']:.5g}"
    assert lines == [
        f"finished  {run_dir}: 4 steps, {losses}",
        f"check     create-esm-pert-features --into-run {run_dir} --adata TEMPLATE.h5ad --dry-run",
        f"predict   state tx infer --model-dir {run_dir} --checkpoint "
        f"{run_dir}/checkpoints/final.ckpt --pert-col target_gene --adata TEMPLATE.h5ad "
        "--output prediction.h5ad",
    ]
    assert np.isfinite([record["train_loss"], record["val_loss"]]).all()
    assert f"step 4 of 4, loss {record['train_loss']:.4g}" in result.err
    # of State and its libraries nothing, nor its command, which a dry run shows
    assert record["stock_command"].startswith("state tx train ")
    printed = (run_dir / "train.log").read_text()
    for text in ("Seed set to ", "is_log1p mode", "Processing sim", "`Trainer.fit` stopped"):
        assert (text in printed, text in result.err) == (True, False)
    assert "state tx train" not in result.err


def test_stock_infer_works_as_typed(
    finished: tuple[Path, Result], screen_dir: Path, tmp_path: Path
) -> None:
    _, result = finished
    command = result.err.splitlines()[-1].removeprefix("predict   ")
    words = shlex.split(command.replace("TEMPLATE.h5ad", str(screen_dir / "template.h5ad")))
    done = run_state(*words[1:], cwd=tmp_path)
    assert done.code == 0, done.err
    predicted = anndata.read_h5ad(tmp_path / "prediction.h5ad")
    assert predicted.shape == anndata.read_h5ad(screen_dir / "template.h5ad").shape
    assert np.isfinite(predicted.X).all()
    assert "not in mapping" not in done.out
    unseen = predicted[predicted.obs["target_gene"] == "SIM004"].X
    control = predicted[predicted.obs["target_gene"] == "non-targeting"].X
    assert not np.allclose(unseen.mean(0), control.mean(0), atol=1e-4)


def test_stock_predict_works_as_typed_from_any_folder(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    words = ("tx", "predict", "--output-dir", run_dir, "--predict-only")
    done = run_state(*words, cwd=tmp_path)
    assert done.code == 0, done.err[-2000:]
    predictions = list(run_dir.glob("eval_last.ckpt/*pred*.h5ad"))
    assert len(predictions) == 1
    predicted = anndata.read_h5ad(predictions[0])
    assert set(predicted.obs["target_gene"]) == {"SIM004", "non-targeting"}


# ---------------------------------------------------------------------------------------------
# Running again
# ---------------------------------------------------------------------------------------------


def test_finished_and_unchanged_is_up_to_date(train: Callable[..., Result], tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    assert train("--max-steps", 2).code == 0
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    again = train("--max-steps", 2)
    assert (again.code, again.out) == (0, f"{run_dir}\n")
    assert again.err.splitlines()[-1] == f"up to date: {run_dir} finished with the same inputs"
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_changed_run_is_refused_and_named(train: Callable[..., Result], tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    assert train("--max-steps", 1).code == 0
    changed = train("--max-steps", 3)
    assert changed.code == 1
    assert changed.err.splitlines()[-1] == (
        f"error: {run_dir} exists with other inputs (training.max_steps: 1 -> 3); --resume goes on "
        "with it, --overwrite trains anew, --name NAME makes another run"
    )
    mixed = train("--max-steps", 3, "--resume", "--seed", 7)
    assert mixed.code == 1
    assert mixed.err.splitlines()[-1] == (
        f"error: {run_dir} was trained otherwise (training.max_steps: 1 -> 3; training.train_seed: "
        "42 -> 7; data.kwargs.random_seed: none -> 7); resuming would mix two runs. --overwrite "
        "trains anew, --name NAME makes another run, --force mixes them"
    )


def test_other_features_are_not_up_to_date(
    train: Callable[..., Result], tmp_path: Path, screen_dir: Path
) -> None:
    assert train("--max-steps", 1).code == 0
    other = torch.load(screen_dir / "features.pt", weights_only=True)
    other["SIM000"] += 1
    torch.save(other, tmp_path / "other.pt")
    files = ("--config", "config.toml", "--pert-features", str(tmp_path / "other.pt"))
    changed = train("--max-steps", 1, files=files)
    assert changed.code == 1
    message = changed.err.splitlines()[-1]
    assert message.startswith(
        f"error: {tmp_path}/runs/run exists with other inputs (features sha256: "
    )
    assert message.endswith(
        "); --resume cannot mix them, --overwrite trains anew, --name NAME makes another run"
    )


def test_resume_restores_weights_optimiser_and_step_bit_for_bit(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    import state.tx.utils
    from lightning.pytorch.callbacks import LambdaCallback

    run_dir = tmp_path / "runs/run"
    assert train("--max-steps", 3).code == 0
    saved = checkpoint(run_dir, "final")
    restored: dict[str, Any] = {}

    def look(trainer: Any, module: Any) -> None:
        restored["state_dict"] = {k: v.clone() for k, v in module.state_dict().items()}
        restored["optimizer"] = [
            {k: v.clone() if torch.is_tensor(v) else v for k, v in flat_tensors(o).items()}
            for o in (optimizer.state_dict() for optimizer in trainer.optimizers)
        ]
        restored["step"] = trainer.global_step

    original = state.tx.utils.get_checkpoint_callbacks
    state.tx.utils.get_checkpoint_callbacks = lambda *a, **k: [
        *original(*a, **k),
        LambdaCallback(on_train_start=look),
    ]
    try:
        resumed = train("--max-steps", 5, "--resume")
    finally:
        state.tx.utils.get_checkpoint_callbacks = original
    assert resumed.code == 0, resumed.err
    assert restored["step"] == saved["global_step"] == 3
    assert_same_bits(restored["state_dict"], saved["state_dict"])
    assert_same_bits(restored["optimizer"], [flat_tensors(o) for o in saved["optimizer_states"]])
    said = [line for line in resumed.err.splitlines() if line.startswith("resuming")]
    assert said == [
        f"resuming at step 3 of 5 from {run_dir}/checkpoints/last.ckpt: weights, optimiser and "
        "step as saved; the order of the data and the random state start anew, so the result "
        "differs from an unbroken run"
    ]
    starts = run_json(run_dir)["starts"]
    assert [s["from_step"] for s in starts] == [0, 3]
    assert starts[1]["note"] == "data order and random state start anew"


def test_final_checkpoint_after_resume_is_the_last_step_and_nothing_is_left_beside(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "runs/run/checkpoints"
    assert train("--max-steps", 3).code == 0
    first = checkpoint(tmp_path / "runs/run", "final")
    for steps in (5, 8):
        assert train("--max-steps", steps, "--resume").code == 0
        assert checkpoint(tmp_path / "runs/run", "final")["global_step"] == steps
        assert checkpoint(tmp_path / "runs/run", "last")["global_step"] == steps
        assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "final.ckpt", "last.ckpt"]
    last = checkpoint(tmp_path / "runs/run", "final")["state_dict"]
    key = "pert_encoder.0.weight"
    assert not torch.equal(last[key], first["state_dict"][key])
    assert run_json(tmp_path / "runs/run")["steps"] == 8


def test_resume_keeps_the_metrics_of_before(train: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "runs/run/version_0"
    assert train("--max-steps", 2).code == 0
    before = (folder / "metrics.csv").read_text()
    assert train("--max-steps", 4, "--resume").code == 0
    assert (folder / "metrics-until-step-2.csv").read_text() == before
    assert "val_loss" in (folder / "metrics.csv").read_text()


def test_resume_takes_the_most_advanced_checkpoint(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    """As after a kill between two validations: only an old last.ckpt and a step checkpoint."""
    folder = tmp_path / "runs/run/checkpoints"
    rare = ("--ckpt-every-n-steps", 3, "--val-freq", 23)
    assert train("--max-steps", 2, *rare).code == 0
    old = (folder / "last.ckpt").read_bytes()
    assert train("--max-steps", 3, *rare, "--resume").code == 0
    for name in ("last.ckpt", "final.ckpt"):
        (folder / name).unlink()
    (folder / "last.ckpt").write_bytes(old)
    record = run_json(tmp_path / "runs/run") | {"status": "training"}
    (tmp_path / "runs/run/run.json").write_text(json.dumps(record))
    refused = train("--max-steps", 3, *rare)
    assert refused.err.splitlines()[-1] == (
        f"error: {tmp_path}/runs/run is not finished (training, step 3); --resume goes on with it, "
        "--overwrite trains anew, --name NAME makes another run"
    )
    resumed = train("--max-steps", 4, *rare, "--resume")
    assert resumed.code == 0
    assert "resuming at step 3 of 4" in resumed.err
    assert checkpoint(tmp_path / "runs/run", "final")["global_step"] == 4
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["final.ckpt", "last.ckpt", "step=3.ckpt"]


def test_run_that_never_had_a_last_checkpoint_gets_one_on_resume(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    """As after a kill before the first validation, with only a step checkpoint."""
    folder = tmp_path / "runs/run/checkpoints"
    rare = ("--ckpt-every-n-steps", 2, "--val-freq", 23)
    assert train("--max-steps", 3, *rare).code == 0
    for name in ("last.ckpt", "final.ckpt"):
        (folder / name).unlink()
    assert train("--max-steps", 5, *rare, "--resume").code == 0
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["final.ckpt", "last.ckpt", "step=2.ckpt", "step=4.ckpt"]


def test_resume_without_a_run_or_checkpoint_starts(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    assert train("--max-steps", 1, "--resume").code == 0
    run_dir = tmp_path / "runs/run"
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    record = run_json(run_dir) | {"status": "stopped"}
    (run_dir / "run.json").write_text(json.dumps(record))
    again = train("--max-steps", 1, "--resume")
    assert again.code == 0
    assert f"no checkpoint in {run_dir} yet: training starts at step 0" in again.err
    assert checkpoint(run_dir, "final")["global_step"] == 1


def test_resume_to_fewer_steps_than_done_is_refused(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    assert train("--max-steps", 3).code == 0
    less = train("--max-steps", 2, "--resume")
    assert less.code == 1
    assert less.err.splitlines()[-1] == (
        f"error: {tmp_path}/runs/run is at step 3 already; --max-steps 2 is less"
    )
    assert checkpoint(tmp_path / "runs/run", "final")["global_step"] == 3


def test_resume_keeps_what_is_not_given(train: Callable[..., Result], tmp_path: Path) -> None:
    """Steps, number of workers and Hydra overrides of the first start stay in force."""
    import train_with_esm_features

    assert train("--max-steps", 3, "training.weight_decay=0.25").code == 0
    runs = ("--output-dir", str(tmp_path / "runs"), "--name", "run")
    assert train_with_esm_features.main([*FILES, *runs, "--resume", "--max-steps", "4"]) == 0
    settings = run_json(tmp_path / "runs/run")["identity"]["settings"]
    assert settings["training.max_steps"] == 4
    assert settings["training.weight_decay"] == 0.25
    assert settings["data.kwargs.num_workers"] == 0
    assert settings["model.kwargs.hidden_dim"] == 24


def test_overwrite_keeps_the_old_run_until_the_new_one_has_finished(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    run_dir, old = tmp_path / "runs/run", tmp_path / "runs/run.old"
    assert train("--max-steps", 2).code == 0
    first = (run_dir / "checkpoints/final.ckpt").read_bytes()
    bad = "data.kwargs.val_subsample_fraction=2"
    with pytest.raises(ValueError, match="val_subsample_fraction must be in"):
        train("--max-steps", 1, "--overwrite", bad)
    assert (old / "checkpoints/final.ckpt").read_bytes() == first
    done = train("--max-steps", 1, "--overwrite")
    assert done.code == 0
    assert checkpoint(run_dir, "final")["global_step"] == 1
    assert sorted(p.name for p in run_dir.parent.iterdir()) == [".run.lock", "run"]
    assert f"the run that this one replaces was deleted: {old}" in done.err


def test_folder_that_is_no_run_is_left_alone(train: Callable[..., Result], tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    run_dir.mkdir(parents=True)
    (run_dir / "thesis.txt").write_text("mine")
    for flag in ((), ("--resume",), ("--overwrite",)):
        result = train("--max-steps", 1, *flag)
        assert (result.code, result.err) == (
            1,
            f"error: {run_dir} exists and is no run of this script; choose another --name, or move "
            "it away\n",
        )
    assert [p.name for p in run_dir.iterdir()] == ["thesis.txt"]


def test_shuffled_features_are_announced_first_and_recorded(
    train: Callable[..., Result], tmp_path: Path, screen_dir: Path
) -> None:
    shuffled = tmp_path / "shuffled.pt"
    made = run_script(
        "create_esm_pert_features",
        *("--from-toml", "config.toml", "--esm-embeddings", "table.pt", "--ablation", "shuffle"),
        *("--seed", 3, "--output", shuffled),
        cwd=screen_dir,
    )
    assert made.code == 0, made.err
    files = ("--config", "config.toml", "--pert-features", str(shuffled))
    result = train("--max-steps", 1, files=files)
    assert result.code == 0
    assert result.err.splitlines()[0] == "ABLATION: shuffle, seed 3: not real features"
    assert run_json(tmp_path / "runs/run")["ablation"] == {"kind": "shuffle", "seed": 3}


def test_ctrl_c_while_training_exits_130_and_is_recorded(screen_dir: Path, tmp_path: Path) -> None:
    assert stop_while_training(screen_dir, tmp_path, "SIGINT") == (130, "stopped by Ctrl-C")


def test_sigterm_while_training_exits_143_and_is_recorded(screen_dir: Path, tmp_path: Path) -> None:
    assert stop_while_training(screen_dir, tmp_path, "SIGTERM") == (143, "stopped by SIGTERM")


def stop_while_training(screen_dir: Path, tmp_path: Path, name: str) -> tuple[int, str]:
    import signal

    flags = (*FILES, *FAST, "--max-steps", 100_000, "--output-dir", tmp_path, "--name", "run")
    process = script_fork("train_with_esm_features", *flags, *TINY, cwd=screen_dir)
    until((tmp_path / "run/checkpoints/last.ckpt").exists, process)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=PATIENCE)
    assert run_json(tmp_path / "run")["status"] == "stopped"
    assert run_json(tmp_path / "run")["steps"] >= 2
    return process.returncode, err.strip().splitlines()[-1]


def own_screen(folder: Path) -> tuple[str, ...]:
    """A screen of a test's own, to change; returns --config and --pert-features."""
    make_screen(folder, {"sim": SMALL})
    return ("--config", f"{folder}/config.toml", "--pert-features", f"{folder}/features.pt")


def test_same_data_downloaded_again_can_be_resumed_but_is_not_up_to_date(
    train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    files = own_screen(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train("--max-steps", 2, files=files).code == 0
    os.utime(tmp_path / "sim.h5ad", (1, 1))
    again = train("--max-steps", 2, files=files)
    assert again.code == 1
    assert f"exists with other inputs (changed {tmp_path}/sim.h5ad: " in again.err
    READ_BEFORE.clear()  # as in a new process
    resumed = train("--max-steps", 3, "--resume", files=files)
    assert resumed.code == 0, resumed.err
    assert "resuming at step 2 of 3" in resumed.err


def test_file_that_changed_in_the_life_of_a_notebook_is_refused(
    train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = own_screen(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train("--max-steps", 1, files=files).code == 0
    os.utime(tmp_path / "sim.h5ad", (1, 1))
    again = train("--max-steps", 1, files=files, name="other")
    assert again.code == 1
    assert again.err.splitlines()[-1] == (
        f"error: {tmp_path}/sim.h5ad changed since this Python first trained on it, and cell-load "
        "keeps the old labels in memory; restart the notebook kernel, or use !python"
    )
    assert not (tmp_path / "runs/other").exists()


def test_run_cut_off_before_its_inputs_were_copied_can_be_resumed(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs/run"
    assert train("--max-steps", 1).code == 0
    record = run_json(run_dir) | {"status": "training", "starts": []}
    for path in sorted(run_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run_dir / "run.json").write_text(json.dumps(record))
    assert train("--max-steps", 1, "--resume").code == 0
    assert checkpoint(run_dir, "final")["global_step"] == 1
    assert (run_dir / "pert_features.pt").exists()


def test_damaged_checkpoint_is_named_and_the_next_one_goes_on(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    assert train("--max-steps", 1).code == 0
    last = tmp_path / "runs/run/checkpoints/last.ckpt"
    whole = last.read_bytes()
    last.unlink()  # final.ckpt is the same file
    last.write_bytes(whole[: len(whole) // 2])
    result = train("--max-steps", 2, "--resume")
    assert result.code == 0, result.err
    assert (
        f"warning: damaged checkpoint: {last} cannot be read as a file of torch.save: damaged or "
        "cut short ("
    ) in result.err
    assert "resuming at step 1 of 2" in result.err
    assert checkpoint(tmp_path / "runs/run", "final")["global_step"] == 2


def test_moved_run_is_resumed_where_it_is_now(train: Callable[..., Result], tmp_path: Path) -> None:
    assert train("--max-steps", 2, "--ckpt-every-n-steps", 2).code == 0
    (tmp_path / "runs").rename(tmp_path / "moved")
    where = ("--output-dir", tmp_path / "moved")
    moved = train("--max-steps", 6, "--ckpt-every-n-steps", 2, "--resume", *where)
    assert moved.code == 0, moved.err
    assert not (tmp_path / "runs").exists()
    names = {p.name for p in (tmp_path / "moved/run/checkpoints").iterdir()}
    assert names == {"best.ckpt", "final.ckpt", "last.ckpt", *(f"step={n}.ckpt" for n in (2, 4, 6))}
    states = checkpoint(tmp_path / "moved/run", "final")["callbacks"].values()
    folders = {str(Path(s["best_model_path"]).parent) for s in states if s.get("best_model_path")}
    assert folders == {str(tmp_path / "moved/run/checkpoints")}


def test_the_two_commands_of_the_challenge(tmp_path: Path) -> None:
    """Its folder in small: a brace path of .h5 files, its own table at the output path."""
    from demo_data import vectors

    folder = tmp_path / "competition_support_set"
    folder.mkdir()
    data = simulate(SMALL)
    for name, cell_type in (("competition_train", "simA"), ("hepg2", "simB")):
        data[data.obs["cell_type"] == cell_type].copy().write_h5ad(folder / f"{name}.h5")
    template(data, ["SIM009"]).write_h5ad(folder / "competition_val_template.h5ad")
    (folder / "starter.toml").write_text(
        "# Dataset paths\n[datasets]\n"
        'replogle_h1 = "competition_support_set/{competition_train,k562_gwps,hepg2}.h5"\n'
        '[training]\nreplogle_h1 = "train"\n[zeroshot]\n"replogle_h1.simB" = "test"\n[fewshot]\n'
    )
    features = folder / "ESM2_pert_features.pt"
    torch.save({k: torch.from_numpy(v) for k, v in vectors(SMALL).items()}, features)
    official = features.read_bytes()
    path = "competition_support_set"
    words = ("--from-toml", f"{path}/starter.toml", "--output", f"{path}/ESM2_pert_features.pt")
    more = ("--adata", f"{path}/competition_val_template.h5ad", "--esm-embeddings", features)
    made = run_script("create_esm_pert_features", *words, *more, cwd=tmp_path)
    assert (made.code, made.out) == (0, f"{path}/ESM2_pert_features.pt\n"), made.err
    assert (folder / "ESM2_pert_features.pt.orig").read_bytes() == official
    assert f"it is kept as {path}/ESM2_pert_features.pt.orig" in made.err
    ours = torch.load(features, weights_only=True)
    assert set(ours) == set(data.obs["target_gene"])
    words = ("--config", f"{path}/starter.toml", "--pert-features", f"{path}/{features.name}")
    words += ("--pert-col", "target_gene", "--control-pert", "non-targeting", "--model", "state_sm")
    words += ("--max-steps", "2", "--output-dir", "competition", "--name", "first_run")
    trained = run_script("train_with_esm_features", *words, *TINY, cwd=tmp_path)
    assert (trained.code, trained.out) == (0, f"{tmp_path}/competition/first_run\n"), trained.err
    assert trained.err.startswith(
        f"warning: dataset 'replogle_h1': {path}/k562_gwps.h5 matches no file; cell-load goes on "
        "without it\nwarning: no validation cells: cell-load validates on the test cells"
    )
