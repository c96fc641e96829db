"""What --fast-loading sorted does to the validation loss: the same training with and without it.

    python tests/benchmarks/bench_validation.py [--seeds 3] [--steps 400]
    python tests/benchmarks/bench_validation.py --config my.toml --pert-features f.pt \
        --steps 400 --with "--batch-size 8 model.kwargs.cell_set_len=32"

Without a TOML: on the simulated screen of `make demo`, State made small by configuration. Prints of
every run the lowest and the last validation loss that it saw itself, and that of its last weights
with the sets and controls that stock draws (the same for both), then mean and standard deviation
over seeds.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
LOADING = {"stock": (), "sorted": ("--fast-loading", "sorted")}


def demo(folder: Path) -> list[str]:
    """Write the simulated screen and its features; returns the options to train on it."""
    from demo_data import write_demo
    from run_demo import SMALL_MODEL

    write_demo(folder / "demo")
    toml = str(ROOT / "configs" / "demo.toml")
    words = ["--from-toml", toml, "--esm-embeddings", "demo/simulated_table.pt"]
    script = str(ROOT / "create_esm_pert_features.py")
    command = [sys.executable, script, *words, "--output", "features.pt"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    options = ["--config", toml, "--pert-features", "features.pt", "--batch-size", "8"]
    return [*options, "--num-workers", "1", *SMALL_MODEL]


def validation_losses(words: list[str], name: str, folder: Path, cwd: Path) -> list[float]:
    """Train once; returns the validation losses in order."""
    script = str(ROOT / "train_with_esm_features.py")
    where = ["--output-dir", str(folder / "runs"), "--name", name, "--overwrite"]
    done = subprocess.run(
        [sys.executable, script, *where, *words], cwd=cwd, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    with (folder / "runs" / name / "progress.csv").open() as f:
        return [float(row["val_loss"]) for row in csv.DictReader(f) if row["val_loss"]]


def loss_on_stock_draws(run_dir: Path, stock_run: Path, cwd: Path) -> float:
    """Validation loss of the last weights, on the data module of the stock run."""
    code = """
import sys, logging, warnings
import lightning.pytorch as pl
from cell_load.data_modules import PerturbationDataModule
from state.tx.models.state_transition import StateTransitionPerturbationModel as State
logging.disable(logging.CRITICAL); warnings.simplefilter("ignore")
pl.seed_everything(0)
module = PerturbationDataModule.load_state(sys.argv[2])
module.setup()
trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
model = State.load_from_checkpoint(sys.argv[1], map_location="cpu")
print(trainer.validate(model, datamodule=module, verbose=False)[0]["val_loss"])
"""
    paths = [str(run_dir / "checkpoints" / "final.ckpt"), str(stock_run / "data_module.torch")]
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, cwd = Path(temporary), Path.cwd()
        if args.config:
            words = ["--config", args.config, "--pert-features", args.pert_features]
            words += shlex.split(args.extra)
        else:
            words, cwd = demo(folder), folder
        words += ["--max-steps", str(args.steps), "--val-freq", str(max(1, args.steps // 10))]
        columns = ("lowest", "last", "last, on stock's draws")
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in LOADING}
        for seed in range(args.seeds):
            for name, flags in LOADING.items():  # in turn
                losses = validation_losses(
                    [*words, "--seed", str(seed), *flags], f"{name}_{seed}", folder, cwd
                )
                runs = folder / "runs"
                same = loss_on_stock_draws(runs / f"{name}_{seed}", runs / f"stock_{seed}", cwd)
                found[name].append((min(losses), losses[-1], same))
                said = ", ".join(
                    f"{c} {v:.4f}" for c, v in zip(columns, found[name][-1], strict=True)
                )
                print(f"{name:7} seed {seed}: {said}", flush=True)
    for name, results in found.items():
        for column, values in zip(columns, zip(*results, strict=True), strict=True):
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            print(f"{name:7} {column:22} {statistics.mean(values):.4f} +- {deviation:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--config")
    parser.add_argument("--pert-features")
    parser.add_argument("--with", dest="extra", default="", help="more options, in one string")
    main(parser.parse_args())
