"""Do the vectors help? State on real, shuffled and one-hot vectors, beside State's mean baselines.

    python tests/benchmarks/evaluate.py [--seeds 3] [--steps 400] [--folder demo/evaluation]
    python tests/benchmarks/evaluate.py --norman FILE.h5ad [--norman-table FILE.pt]

All methods train with the same split, seeds and settings, State made small by configuration; stock
`state tx predict` and cell-eval (--profile minimal, the smallest with all three metrics) score the
test cells. Metrics are averaged over (cell type, perturbation) pairs, each counting once, apart for
perturbations that some training cell has (seen) and that none has (unseen), then over seeds.
Finished runs are not done again. Written: pairs.csv (every value), table.csv, evaluation.png.

cell-eval 0.8 compares mean expression over the cells of a pair:

pearson_delta
    Correlation over genes of predicted and true effect. The predicted effect is the prediction less
    what the same model predicts for control cells, the true one is less the true controls; as
    context_mean predicts the true ones for control cells, its effects share their noise, which
    where effects are weak gives 0.5 by itself. A constant effect has no correlation: NaN, counted
    and shown. One that is a mere draw of controls has about 0.
mse
    Of predicted and true mean expression, not of the effects: a model that predicts control cells
    badly, too, has a high one although its effects, less those controls, may be right.
discrimination_score_l1
    1 - rank / n: the rank (0 is the nearest) of the right one among the true effects of the n
    perturbations of this cell type in the test cells, seen and unseen, by L1 distance to the
    predicted effect. 1 is best; the same prediction for all gets 0.5 + 0.5 / n on average.

Demo screen: its seen pairs are all in simB, a cell type of which training has controls only.
Norman/McFaline: CRISPR activation in k562 (Norman 2019), interference in A172, T98G and U87MG
(McFaline-Figueroa 2023); a gene has one vector for both. Nine genes are perturbed in all four, in
k562 nine more and 15 combinations A+B. These train only: by label they would be unseen, though
their genes may have been trained. None has a gene that is held out everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from demo_data import write_demo  # noqa: E402
from run_demo import SMALL_MODEL  # noqa: E402

from state_esm_features.console import count  # noqa: E402
from state_esm_features.files import sha256_of  # noqa: E402

METRICS = {  # which way is better, and what a perfect prediction and chance get
    "pearson_delta": ("higher", "1 is perfect, 0 is chance"),
    "mse": ("lower", "0 is perfect"),
    "discrimination_score_l1": ("higher", "1 is perfect, 0.5 + 0.5 / n is chance"),
}
BASELINES = ("perturb_mean", "context_mean")
"""State's own: the mean effect of the label over cell types; the mean of all perturbed cells."""

METHODS = ("real", "shuffle", "onehot", *BASELINES)
GROUPS = {"seen": ("#0072B2", "o", -0.17), "unseen": ("#D55E00", "D", 0.17)}
"""Colour (two that the colour-blind can tell apart), marker and shift in the picture."""

NEVER_TRAINED = ["MAP3K21", "MAP4K5", "PLK4"]
HELD_OUT = {
    "k562": ["HK2", "KMT2A", "NIT1", *NEVER_TRAINED, "MAP2K6", "SGK1"],
    "A172": [*NEVER_TRAINED, "MAP2K3", "MAP2K6", "MAP4K3"],
    "T98G": [*NEVER_TRAINED, "MAP4K3", "MAPK1", "SGK1"],
    "U87MG": [*NEVER_TRAINED, "MAP2K3", "MAPK1", "TGFBR2"],
}
"""Test genes of Norman/McFaline. Unseen: NEVER_TRAINED, and HK2, KMT2A, NIT1, which only k562 has;
the others train in another cell type."""


@dataclass(frozen=True)
class Study:
    """Data, split and settings that all methods share; paths in the TOML count from `folder`.

    `columns` are options of both scripts, `training` options and overrides of the second.
    """

    title: str
    folder: Path
    toml: Path
    table: Path
    methods: Sequence[str] = METHODS
    columns: tuple[str, ...] = ()
    training: tuple[str, ...] = SMALL_MODEL


def demo(folder: Path) -> Study:
    """The simulated screen, in which the vectors decide the response."""
    table = folder / "demo" / "simulated_table.pt"
    if not table.exists():  # it is written last
        write_demo(folder / "demo")
    return Study("Simulated screen", folder, ROOT / "configs" / "demo.toml", table)


def norman(data: Path, table: Path | None, folder: Path) -> Study:
    """The Norman/McFaline cells; without a table of real vectors only what needs none."""
    import anndata
    import torch

    if not data.is_file():
        raise SystemExit(f"error: no file {data}")
    cells = anndata.read_h5ad(data)
    columns = {"perturbation", "cell_type"} <= set(cells.obs)
    if not (columns and set(HELD_OUT) <= set(cells.obs["cell_type"])):
        raise SystemExit(
            f"error: {data} is not the Norman/McFaline file: its cells are to have obs columns "
            f"perturbation and cell_type, with the cell types {', '.join(HELD_OUT)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    toml, copy = folder / "norman.toml", folder / "norman.h5ad"
    cells.obs.index.name = cells.var.index.name = None  # where cell-load looks for gene names
    cells.write_h5ad(copy)
    lines = ["[datasets]", f"norman = {json.dumps(str(copy.resolve()))}"]
    lines += ["[training]", 'norman = "train"']
    for cell_type, test in HELD_OUT.items():
        val = ["IER5L", "TMSB4X"] if cell_type == "k562" else []
        lines += [f'[fewshot."norman.{cell_type}"]', f"val = {val}", f"test = {test}"]
    toml.write_text("\n".join(lines) + "\n")
    methods = METHODS
    if table is None:
        print("real and shuffle are left out: they need real vectors (--norman-table)")
        methods, table = ("onehot", *BASELINES), folder / "names.pt"
        labels = cells.obs["perturbation"].unique()
        genes = sorted({gene for label in labels for gene in label.split("+")})
        torch.save(dict(zip(genes, torch.eye(len(genes)), strict=True)), table)
    named = ("--pert-col", "perturbation", "--control-pert", "control")
    training = ("--batch-col", "cell_type", *SMALL_MODEL)
    return Study("Norman/McFaline", folder, toml, table.resolve(), methods, named, training)


def one_run(study: Study, method: str, seed: int, steps: int) -> Path:
    """Features, training, prediction and cell-eval, unless done before; returns the run."""
    folder, name = study.folder, f"{method}_{seed}"
    run_dir, log = folder / "runs" / name, folder / f"{name}.log"
    model = study.training
    if method in BASELINES:  # without a transformer; stock stops them after one step
        model = tuple(w for w in model if not w.startswith("model.") or "cell_set_len" in w)
        model = ("--model", method, *model)
    settings = ["--max-steps", str(steps), "--batch-size", "8", "--val-freq", str(steps)]
    settings += ["--num-workers", "1", "--seed", str(seed), *study.columns, *model]
    done = run_dir / "evaluated.json"
    what = json.dumps([*settings, sha256_of(study.toml), sha256_of(study.table)])
    if done.exists() and done.read_text() == what:
        return run_dir
    kind = "onehot" if method in BASELINES else method  # which do not read the vectors
    vectors = [] if kind == "real" else ["--ablation", kind, "--seed", seed]
    features = folder / f"{name}.pt"
    create = [sys.executable, ROOT / "create_esm_pert_features.py", "--from-toml", study.toml]
    create += ["--esm-embeddings", study.table, *study.columns, *vectors, "--output", features]
    train = [sys.executable, ROOT / "train_with_esm_features.py", "--config", study.toml]
    train += ["--pert-features", features, "--name", name, "--resume", *settings]
    predict = [Path(sys.executable).with_name("state"), "tx", "predict", "--output-dir", run_dir]
    predict += ["--checkpoint", "final.ckpt", "--profile", "minimal"]
    with log.open("w") as f:
        for words in (create, train, predict):
            command = [str(w) for w in words]
            code = subprocess.run(command, cwd=folder, stdout=f, stderr=subprocess.STDOUT)
            if code.returncode != 0:
                raise SystemExit(f"{log.read_text()[-2000:]}\nfailed: {shlex.join(command)}")
    done.write_text(what)
    return run_dir


def trained_and_tested(run_dir: Path) -> set[str]:
    """Labels of the test cells that some training cell has, as cell-load split them."""
    from cell_load.data_modules import PerturbationDataModule

    module = PerturbationDataModule.load_state(str(run_dir / "data_module.torch"))
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        module.setup()
    return set(map(str, module.get_shared_perturbations()))


def read_pairs(run_dir: Path, seen: set[str]) -> pd.DataFrame:
    """cell-eval's metrics of a run: a row a (cell type, perturbation), and its group."""
    ending, tables = "_results.csv", []
    for file in sorted((run_dir / "eval_final.ckpt").glob(f"*{ending}")):
        if not file.name.endswith(f"_agg{ending}"):
            table = pd.read_csv(file, keep_default_na=False, na_values=["", "NaN"])
            tables.append(table.assign(cell_type=file.name.removesuffix(ending)))
    pairs = pd.concat(tables, ignore_index=True)
    group = pairs["perturbation"].isin(seen).map({True: "seen", False: "unseen"})
    return pairs.assign(group=group).reindex(
        columns=["group", "cell_type", "perturbation", *METRICS]
    )


def runs_of(pairs: pd.DataFrame) -> pd.DataFrame:
    """Mean over the pairs that have a value: a row a (method, group, seed)."""
    return pairs.groupby(["method", "group", "seed"], sort=False)[list(METRICS)].mean()


def summarise(pairs: pd.DataFrame) -> pd.DataFrame:
    """A row a (group, method, metric): mean and SD over seeds, number of pairs, and of NaN.

    A last method is the difference real - shuffle, seed by seed.
    """
    runs, rows = runs_of(pairs), []
    if {"real", "shuffle"} <= set(pairs["method"]):
        difference = runs.loc["real"] - runs.loc["shuffle"]
        runs = pd.concat([runs, pd.concat({"real - shuffle": difference}, names=["method"])])
    for (method, group), of_seeds in runs.groupby(["method", "group"], sort=False):
        of = pairs[(pairs["group"] == group) & pairs["method"].isin(method.split(" - "))]
        for metric in METRICS:
            row = {"group": group, "method": method, "metric": metric}
            row |= {"mean": of_seeds[metric].mean(), "sd": of_seeds[metric].std()}
            row |= {"pairs": len(of[["cell_type", "perturbation"]].drop_duplicates())}
            row |= {"seeds": len(of_seeds), "nan": of[metric].isna().sum(), "values": len(of)}
            rows.append(row)
    return pd.DataFrame(rows)


def as_cell(row: pd.Series) -> str:
    """'0.712 +- 0.010', and how many of the values are NaN."""
    spread = "" if pd.isna(row["sd"]) else f" +- {row['sd']:.3f}"
    missing = f" ({row['nan']}/{row['values']} NaN)" if row["nan"] else ""
    return ("NaN" if pd.isna(row["mean"]) else f"{row['mean']:.3f}") + spread + missing


def as_text(table: pd.DataFrame, title: str) -> str:
    """The table as one reads it."""
    seeds = count(int(table["seeds"].max()), "seed")
    lines = [f"{title}: mean +- SD over {seeds} of the mean over (cell type, perturbation) pairs"]
    for group in GROUPS:
        rows = table[table["group"] == group]
        heading = f"{group} ({rows['pairs'].max() if len(rows) else 'none'})"
        lines += ["", f"{heading:15}" + "".join(f"{metric:>28}" for metric in METRICS)]
        for method, of in rows.groupby("method", sort=False):
            cells = (as_cell(row) for _, row in of.iterrows())
            lines.append(f"{method:15}" + "".join(f"{cell:>28}" for cell in cells))
    notes = [f"{metric}: {way} is better, {note}" for metric, (way, note) in METRICS.items()]
    return "\n".join([*lines, "", "In brackets: pairs in the test cells.", *notes])


def draw(path: Path, pairs: pd.DataFrame, title: str) -> None:
    """A panel a metric, a row a method: every seed as a dot, their mean as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    runs, methods = runs_of(pairs).reset_index(), list(dict.fromkeys(pairs["method"]))
    figure = Figure(figsize=(12, 2.2 + 0.6 * len(methods)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(METRICS), sharey=True)
    unique = pairs.drop_duplicates(["cell_type", "perturbation"])
    n = unique.groupby("cell_type")["perturbation"].transform("size")
    chance = {"pearson_delta": 0, "discrimination_score_l1": (0.5 + 0.5 / n).mean()}
    handles = {}
    for axes, (metric, (way, note)) in zip(panels, METRICS.items(), strict=True):
        for group, (colour, marker, shift) in GROUPS.items():
            for y, method in enumerate(methods):
                own = (runs["method"] == method) & (runs["group"] == group)
                values, style = runs.loc[own, metric], {"c": colour, "clip_on": False}
                handles[group] = axes.plot(
                    values, [y + shift] * len(values), marker, ms=7, alpha=0.55, mew=0, **style
                )[0]
                axes.plot(values.mean(), y + shift, "|", ms=19, mew=2.5, **style)
                if own.any() and values.isna().all():
                    place = {"transform": axes.get_yaxis_transform(), "va": "center"}
                    axes.text(0.02, y + shift, "NaN", color=colour, fontsize=8, **place)
        better = {"higher": "higher is better \u2192", "lower": "\u2190 lower is better"}[way]
        axes.set(title=metric, xlabel=f"{better}\n({note})")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if metric in chance:
            axes.axvline(chance[metric], color="0.5", lw=1, ls=":")
        else:
            axes.set_xlim(left=0)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    sizes = unique["group"].value_counts()
    names = [f"{g} perturbations ({count(sizes.get(g, 0), 'pair')})" for g in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{title}: a dot is a seed, the line their mean; dotted: chance")
    figure.savefig(path, format="png")


def evaluate(study: Study, seeds: int, steps: int) -> pd.DataFrame:
    """Do all runs, or what is missing of them; write and print the results, return the table."""
    found, seen = [], None
    for seed in range(seeds):
        for method in study.methods:
            start = time.monotonic()
            run_dir = one_run(study, method, seed, steps)
            print(f"{run_dir.name}: {time.monotonic() - start:.0f} s", flush=True)
            seen = trained_and_tested(run_dir) if seen is None else seen  # the same in all runs
            found.append(read_pairs(run_dir, seen).assign(method=method, seed=seed))
    pairs = pd.concat(found, ignore_index=True)
    pairs.to_csv(study.folder / "pairs.csv", index=False)
    table = summarise(pairs)
    table.to_csv(study.folder / "table.csv", index=False)
    draw(study.folder / "evaluation.png", pairs, study.title)
    print(f"\n{as_text(table, study.title)}\n\nwritten into {study.folder}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("demo/evaluation"))
    parser.add_argument("--norman", type=Path, metavar="FILE.h5ad", help="evaluate on these cells")
    parser.add_argument("--norman-table", type=Path, metavar="FILE.pt", help="{symbol: vector}")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.norman:
        study = norman(args.norman, args.norman_table, folder / "norman")
    else:
        study = demo(folder / "demo")
    evaluate(study, args.seeds, args.steps)


if __name__ == "__main__":
    main()
