"""The whole job on a simulated screen, with the commands that a user types.

    python tests/run_demo.py

writes the screen into demo/ and runs both scripts and `state tx infer` on it, once with the real
vectors and once with shuffled ones, then prints how well the predicted effect of each perturbation
correlates with the one in the data. The model is State's own, made small by configuration.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from demo_data import CONTROL, Screen, write_demo

ROOT = Path(__file__).resolve().parent.parent

SMALL_MODEL = (
    "model.kwargs.cell_set_len=32",
    "model.kwargs.hidden_dim=96",
    "model.kwargs.n_encoder_layers=2",
    "model.kwargs.n_decoder_layers=2",
    "model.kwargs.transformer_backbone_kwargs.head_dim=12",
    "model.kwargs.transformer_backbone_kwargs.intermediate_size=192",
    "data.kwargs.output_space=gene",
    "training.lr=0.003",
)
"""State small enough for two CPU cores; full-size state_sm learns nothing specific in minutes."""


def run(*words: object) -> None:
    """Show a command as one would type it, and run it."""
    command = [str(w) for w in words]
    print(
        "\n$ " + shlex.join(["python" if w == sys.executable else w for w in command]), flush=True
    )
    subprocess.run(command, check=True)


def train_and_predict(
    folder: Path, name: str, features: Path, toml: Path, steps: int, runs: Path
) -> Path:
    """Train on `features` and predict the template; returns the predictions."""
    flags = ("--max-steps", steps, "--batch-size", 8, "--val-freq", steps // 2, "--num-workers", 1)
    script = ROOT / "train_with_esm_features.py"
    where = ("--output-dir", runs, "--name", name, "--overwrite")
    files = ("--config", toml, "--pert-features", features)
    run(sys.executable, script, *files, *flags, *where, *SMALL_MODEL)
    predicted = folder / f"predicted_{name}.h5ad"
    state = Path(sys.executable).with_name("state")
    template = ("--adata", folder / "simulated_template.h5ad", "--pert-col", "target_gene")
    run(
        state,
        "tx",
        "infer",
        "--model-dir",
        runs / name,
        *template,
        "--output",
        predicted,
        "--quiet",
    )
    return predicted


def mean_effects(
    data: anndata.AnnData, controls: anndata.AnnData
) -> dict[tuple[str, str], np.ndarray]:
    """{(cell type, label): mean expression minus that of the control cells, (genes,)}."""
    found = {}
    for (cell_type, label), rows in data.obs.groupby(["cell_type", "target_gene"], observed=True):
        of_type = controls.obs.index[controls.obs["cell_type"] == cell_type]
        base = controls[of_type].X.mean(0)
        found[cell_type, label] = np.asarray(data[rows.index].X.mean(0) - base).ravel()
    return found


def correlations(truth: Path, predicted: Path, screen: Screen) -> pd.Series:
    """Mean Pearson correlation of predicted with true effect, for three groups of genes."""
    data = anndata.read_h5ad(truth)
    controls = data[data.obs["target_gene"] == CONTROL]
    true = mean_effects(data, controls)
    guessed = mean_effects(anndata.read_h5ad(predicted), controls)
    trained, held_out = screen.cell_types
    seen = [s for s in screen.symbols if s not in {*screen.unseen, *screen.validation}]
    groups = {
        "seen genes": [(trained, s) for s in seen],
        "unseen genes": [(trained, s) for s in screen.unseen],
        "unseen genes, unseen cell type": [(held_out, s) for s in screen.unseen],
    }
    return pd.Series(
        {
            g: np.mean([np.corrcoef(true[k], guessed[k])[0, 1] for k in keys])
            for g, keys in groups.items()
        }
    )


def main(folder: Path, steps: int) -> None:
    start = time.monotonic()
    screen = Screen()
    write_demo(folder, screen)
    toml, runs = ROOT / "configs" / "demo.toml", Path("runs")
    columns = {}
    for name, ablation in (("demo_real", ()), ("demo_shuffled", ("--ablation", "shuffle"))):
        features = folder / f"{name}_features.pt"
        script = ROOT / "create_esm_pert_features.py"
        table = ("--esm-embeddings", folder / "simulated_table.pt")
        run(sys.executable, script, "--from-toml", toml, *table, *ablation, "--output", features)
        predicted = train_and_predict(folder, name, features, toml, steps, runs)
        columns[name] = correlations(folder / "simulated_screen.h5ad", predicted, screen)
    table = pd.DataFrame(columns).set_axis(["own vectors", "shuffled vectors"], axis=1)
    print("\nSimulated screen: correlation of predicted with true effect (1 is perfect)\n")
    print(table.to_string(float_format="%.2f"))
    print(
        f"\n{steps} steps of a small State model on each, {time.monotonic() - start:.0f} s in all. "
        "Unseen genes were perturbed in\nno training cell: only their vectors can tell what they "
        "do. Nothing here is biology."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.steps)
