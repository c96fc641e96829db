"""How fast batches come, and a whole training: stock against --fast-loading.

    python tests/benchmarks/bench_loader.py [--rounds 3] [--batches 12] [--steps 6] [--folder DIR]

Simulates 20,000 cells x 18,080 genes with 3,000 values a cell in six files (unsorted, sparse, once
uncompressed and once gzip), then in turn, each in a process of its own:

- the stock data module with the notebook's settings (8 workers, cut to the cores there are) and
  the same on the copies that --fast-loading makes: seconds a batch, peak memory of all processes;
- writing those copies, in MB of source per second, on one core;
- `--dry-run` on the six files; writing one checkpoint of state_sm;
- `state tx train` and train_with_esm_features.py --fast-loading from start to end, state_sm. On a
  machine with a GPU also its busy share and memory.

Nothing is asserted: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state_esm_features.console import Notes, start_log
from state_esm_features.files import write_whole
from state_esm_features.training.fast_copies import make_copies
from state_esm_features.training.plan import make_plan
from state_esm_features.training.run_dir import toml_of_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
FILES = 6
WORKERS = min(8, len(os.sched_getaffinity(0)))
NOTEBOOK = {"batch_size": 16, "cell_sentence_len": 128, "num_workers": WORKERS}


@dataclass(frozen=True)
class Size:
    """Of a simulated file: `each` cells a perturbation, the rest controls; `values` a cell."""

    cells: int = 3_334
    genes: int = 18_080
    values: int = 3_000
    perturbations: int = 20
    each: int = 128

    @property
    def symbols(self) -> list[str]:
        return [f"SIM{i:03d}" for i in range(self.perturbations)]


def write_screen(path: Path, number: int, compression: str | None, size: Size = Size()) -> None:
    """One file: CSR X in random order of cells."""
    import h5py
    import numpy as np

    rng, cells = np.random.default_rng(number), size.cells
    labels = np.repeat(np.arange(size.perturbations), size.each)
    labels = np.append(labels, np.full(cells - len(labels), size.perturbations))
    rng.shuffle(labels)
    genes = [np.sort(rng.choice(size.genes, size.values, replace=False)) for _ in range(cells)]
    values = np.log1p(rng.poisson(2.0, cells * size.values) + 1.0) * rng.choice([0.9, 1.1], 1)
    text = h5py.string_dtype()
    columns: dict[str, tuple[Any, list[str]]] = {
        "target_gene": (labels, [*size.symbols, "non-targeting"]),
        "cell_type": (np.zeros(cells), [f"sim{number}"]),
        "batch_var": (rng.integers(0, 3, cells), ["a", "b", "c"]),
    }
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        x.attrs["shape"] = np.array([cells, size.genes])
        for name, array in (
            ("data", values.astype(np.float32)),
            ("indices", np.concatenate(genes).astype(np.int32)),
            ("indptr", np.arange(cells + 1) * size.values),
        ):
            x.create_dataset(name, data=array, compression=compression)
        obs = file.create_group("obs")
        obs.create_dataset("_index", data=[f"{number}_{i}" for i in range(cells)], dtype=text)
        for name, (codes, categories) in columns.items():
            obs.create_group(name)["codes"] = codes.astype(np.int8)
            obs[name].create_dataset("categories", data=categories, dtype=text)
        var = file.create_group("var")
        var.create_dataset("_index", data=[f"GENE{i}" for i in range(size.genes)], dtype=text)
        file.create_group("uns/log1p")


def write_toml(folder: Path, name: str) -> None:
    """NAME.toml of the six files in NAME/."""
    stems = ",".join(f"file{i}" for i in range(FILES))
    (folder / f"{name}.toml").write_text(
        f'[datasets]\nsim = "{folder}/{name}/{{{stems}}}.h5"\n[training]\nsim = "train"\n'
        f'[fewshot."sim.sim0"]\nval = ["SIM000"]\n'
    )


def write_features(folder: Path, size: Size = Size()) -> None:
    """features.pt of the labels, random."""
    import torch

    features = {label: torch.randn(5_120) for label in size.symbols}
    torch.save({**features, "non-targeting": torch.zeros(5_120)}, folder / "features.pt")


def write_inputs(folder: Path) -> None:
    """raw.toml, gzip.toml with six files each, and features.pt."""
    for name, compression in (("raw", None), ("gzip", "gzip")):
        (folder / name).mkdir()
        for i in range(FILES):
            write_screen(folder / name / f"file{i}.h5", i, compression)
        write_toml(folder, name)
    write_features(folder)


def write_copies(folder: Path, name: str, layout: str) -> float:
    """Write the copies and the TOML of a layout; returns seconds."""
    import train_with_esm_features as script

    where = folder / f"{name}_{layout}"
    words = ["--config", f"{folder}/{name}.toml", "--pert-features", f"{folder}/features.pt"]
    words += ["--fast-loading", layout, "--data-cache", str(where)]
    args = script.parse(words)
    start_log(quiet=True)
    plan = make_plan(args, folder / "run", None, None, folder, Notes())
    assert plan.fast is not None
    start = time.perf_counter()
    make_copies(plan.fast, plan.data.columns)
    seconds = time.perf_counter() - start
    (folder / f"{name}_{layout}.toml").write_text(toml_of_run(plan, Notes()))
    return seconds


def load_batches(toml: Path, number: int, **settings: Any) -> float:
    """Seconds a batch of the stock data module, after the first one."""
    import logging

    from cell_load.data_modules import PerturbationDataModule

    logging.disable(logging.CRITICAL)
    module = PerturbationDataModule(
        toml_config_path=str(toml),
        pert_col="target_gene",
        batch_col="batch_var",
        control_pert="non-targeting",
        perturbation_features_file=str(toml.parent / "features.pt"),
        output_space="all",
        barcode=True,
        **NOTEBOOK,
        **settings,
    )
    module.setup()
    loader = module.train_dataloader()
    moments: list[float] = []
    while len(moments) < number:
        for _ in loader:  # an epoch has ten batches
            moments.append(time.perf_counter())
            if len(moments) == number:
                break
    return (moments[-1] - moments[0]) / (number - 1)


class Peak:
    """Memory of a process and all below it, and what its GPU does, sampled while it runs."""

    def __init__(self, pid: int) -> None:
        self.memory, self.gpu_memory, self.busy = 0.0, 0.0, []  # type: ignore[var-annotated]
        self.pid, self.running = pid, True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def _sample(self) -> None:
        import psutil

        gpu = shutil.which("nvidia-smi")
        while self.running:
            total = 0
            try:
                parent = psutil.Process(self.pid)
                for process in [parent, *parent.children(recursive=True)]:
                    total += process.memory_full_info().pss  # shared pages counted once
            except psutil.Error:
                pass
            self.memory = max(self.memory, total / 1e6)
            if gpu:
                query = "--query-gpu=utilization.gpu,memory.used"
                line = subprocess.check_output([gpu, query, "--format=csv,noheader,nounits"])
                busy, used = map(float, line.decode().splitlines()[0].split(","))
                self.busy.append(busy)
                self.gpu_memory = max(self.gpu_memory, used)
            time.sleep(0.2)

    def stop(self) -> None:
        self.running = False
        self.thread.join()


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds of a command that must succeed, peak MB, and the number it prints last."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = Peak(process.pid)
    out, err = process.communicate()
    peak.stop()
    if process.returncode != 0:
        raise SystemExit(f"failed: {command}\n{err[-2000:]}")
    last = out.strip().splitlines()[-1] if out.strip() else ""
    found = {"seconds": time.perf_counter() - start, "MB": peak.memory}
    found |= {"printed": float(last)} if last.replace(".", "", 1).isdigit() else {}
    if peak.busy:
        found |= {"GPU busy %": statistics.mean(peak.busy), "GPU MB": peak.gpu_memory}
    return found


def spread(values: list[float], unit: str = "", digits: int = 2) -> str:
    """Median (lowest to highest)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def bench_loader(folder: Path, rounds: int, batches: int) -> None:
    """Stock and copies in turn; ratios within a round."""
    me = [sys.executable, __file__, "--folder", str(folder)]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name in ("raw", "gzip"):
            for layout in ("stock", "sorted", "dense"):
                command = [*me, "--batches", str(batches), "--load", f"{name}:{layout}"]
                found.setdefault((name, layout), []).append(measured(command, folder))
    print(f"{WORKERS} workers, {NOTEBOOK['batch_size']} sets of 128 cells, {rounds} rounds")
    for (name, layout), results in found.items():
        seconds = [r["printed"] for r in results]
        stock = [r["printed"] for r in found[name, "stock"]]
        ratios = [a / b for a, b in zip(stock, seconds, strict=True)]
        print(
            f"{name:5} {layout:7} {spread(seconds, ' s a batch', 3):38} x{spread(ratios)} as fast, "
            f"peak {max(r['MB'] for r in results):,.0f} MB"
        )


def bench_writing(folder: Path, rounds: int) -> None:
    """MB of source per second on one core."""
    core = str(min(os.sched_getaffinity(0)))
    for name in ("raw", "gzip"):
        source = sum(p.stat().st_size for p in (folder / name).iterdir()) / 1e6
        for layout in ("sorted", "dense"):
            results = []
            for _ in range(rounds):
                shutil.rmtree(folder / f"{name}_{layout}", ignore_errors=True)
                command = [sys.executable, __file__, "--folder", str(folder)]
                command = ["taskset", "-c", core, *command, "--copy", f"{name}:{layout}"]
                results.append(measured(command, folder))
            files = (folder / f"{name}_{layout}").glob("*/*.h5")
            written = sum(p.stat().st_size for p in files) / 1e6
            rates = [source / r["printed"] for r in results]
            print(
                f"write {name:5} {layout:7} {source:,.0f} MB -> {written:,.0f} MB: "
                f"{spread([r['printed'] for r in results], ' s')}, {spread(rates, ' MB/s', 0)} of "
                f"source, peak {max(r['MB'] for r in results):,.0f} MB"
            )


def bench_training(folder: Path, rounds: int, steps: int) -> None:
    """Whole runs of state_sm, from the command to final.ckpt."""
    ours = [sys.executable, str(ROOT / "train_with_esm_features.py"), "--config", "raw.toml"]
    ours += ["--pert-features", "features.pt", "--output-dir", "runs"]
    dry = [measured([*ours, "--dry-run"], folder)["seconds"] for _ in range(rounds)]
    print(f"--dry-run on {FILES} files: {spread(dry, ' s')}")
    stock = [str(Path(sys.executable).with_name("state")), "tx", "train", "model=state_sm"]
    stock += ["data.kwargs.toml_config_path=raw.toml", "use_wandb=false", "output_dir=runs"]
    stock += [
        "data.kwargs.perturbation_features_file=features.pt",
        "data.kwargs.batch_col=batch_var",
    ]
    stock += ["data.kwargs.pert_col=target_gene", "data.kwargs.control_pert=non-targeting"]
    stock += [f"data.kwargs.num_workers={WORKERS}", "training.val_freq=100000", "name=stock"]
    commands = {
        "state tx train": [*stock, "overwrite=true"],
        "--fast-loading sorted": [*ours, "--fast-loading", "sorted", "--name", "sorted"],
        "--fast-loading dense": [*ours, "--fast-loading", "dense", "--name", "dense"],
    }
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for what, command in commands.items():
            last = [f"training.max_steps={steps}"]
            if what != "state tx train":
                last = ["--max-steps", str(steps), "--val-freq", "100000", "--overwrite"]
            found.setdefault(what, []).append(measured([*command, *last], folder))
    for what, results in found.items():
        kinds = {k for r in results for k in r} - {"printed"}
        line = ", ".join(f"{k} {spread([r[k] for r in results], digits=1)}" for k in sorted(kinds))
        print(f"train {steps} steps, {what:22} {line}")
    for name in ("sorted", "dense"):
        record = json.loads((folder / "runs" / name / "run.json").read_text())["starts"][-1]
        print(f"  {name}: {record['waiting_for_data']:.0%} of the training waits for data")


def bench_checkpoint(folder: Path) -> None:
    """Seconds to write the checkpoint of the run above again, as the script does it."""
    import torch

    path = folder / "runs" / "sorted" / "checkpoints" / "final.ckpt"
    content = torch.load(path, weights_only=True)
    start = time.perf_counter()
    write_whole(folder / "again.ckpt", lambda f: torch.save(content, f))
    seconds = time.perf_counter() - start
    print(f"checkpoint of state_sm: {path.stat().st_size / 1e9:.2f} GB in {seconds:.1f} s")


def main(args: argparse.Namespace) -> None:
    """Everything, in a folder that is deleted afterwards unless it was given."""
    import torch

    print(f"instruction set: {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "features.pt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, __file__, "--write", str(folder)], check=True)
        bench_writing(folder, args.rounds)
        bench_loader(folder, args.rounds, args.batches)
        if args.steps:
            bench_training(folder, args.rounds, args.steps)
            bench_checkpoint(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="of the whole training; 0: none")
    parser.add_argument("--folder", type=Path, help="keep the data there")
    for hidden in ("--write", "--load", "--copy"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_inputs(Path(arguments.write))
    elif arguments.copy:
        print(write_copies(arguments.folder.absolute(), *arguments.copy.split(":")))
    elif arguments.load:
        kind, form = arguments.load.split(":")
        if form != "stock":
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the script does
        toml = arguments.folder / (f"{kind}.toml" if form == "stock" else f"{kind}_{form}.toml")
        print(load_batches(toml, arguments.batches, use_consecutive_loading=form == "sorted"))
    else:
        arguments.folder = arguments.folder and arguments.folder.absolute()
        main(arguments)
