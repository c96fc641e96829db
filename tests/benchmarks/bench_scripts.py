"""What the two commands cost beside the least that their work takes.

    python tests/benchmarks/bench_scripts.py [--repeats 5]

Writes a table of the size of Arc's (19,790 genes x 5,120) and a data file of 1,000,000 cells into a
temporary folder, runs each command and its reference in turn, and prints medians, spread and peak
memory. Nothing here is asserted: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CREATE = [sys.executable, str(ROOT / "create_esm_pert_features.py")]
TRAIN = [sys.executable, str(ROOT / "train_with_esm_features.py")]
GENES, WIDTH, LABELS, CELLS = 19_790, 5_120, 2_000, 1_000_000


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak memory in MB of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def write_inputs(folder: Path) -> None:
    """table.pt, labels.txt, big.h5ad (X declared, never written) and big.toml."""
    import h5py
    import numpy as np
    import torch

    symbols = ["TP53", *(f"G{i}" for i in range(1, GENES))]
    rows = torch.randn(GENES, WIDTH)
    torch.save({s: row.clone() for s, row in zip(symbols, rows, strict=True)}, folder / "table.pt")
    labels = symbols[:: GENES // LABELS][:LABELS]
    (folder / "labels.txt").write_text("\n".join(labels))
    (folder / "ids.txt").write_text("ENSG00000141510")
    with h5py.File(folder / "big.h5ad", "w") as file:
        x = file.create_dataset("X", (CELLS, 18_080), np.float32, chunks=(100, 18_080))
        x.attrs["encoding-type"], x.attrs["encoding-version"] = "array", "0.2.0"
        obs = file.create_group("obs")
        obs.attrs.update(
            {"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.2.0"}
        )
        obs.attrs["column-order"] = ["gene", "cell_type", "batch"]
        obs["_index"] = np.arange(CELLS).astype("S")
        text = h5py.string_dtype()
        columns = {"gene": ["non-targeting", *labels], "cell_type": ["c"], "batch": ["b"]}
        for name, categories in columns.items():
            column = obs.create_group(name)
            column["codes"] = np.arange(CELLS, dtype=np.int16) % len(categories)
            column.create_dataset("categories", data=categories, dtype=text)
            column.attrs["encoding-type"], column.attrs["ordered"] = "categorical", False
            column.attrs["encoding-version"] = "0.2.0"
        var = file.create_group("var")
        var["_index"] = np.array([f"R{i}" for i in range(18_080)], "S")
    (folder / "big.toml").write_text('[datasets]\nd = "big.h5ad"\n[training]\nd = "train"\n')


def main(repeats: int) -> None:
    load = "import torch; torch.load('table.pt', mmap=True, weights_only=True)"
    hashing = "import hashlib; hashlib.file_digest(open('table.pt', 'rb'), 'sha256')"
    python = [sys.executable, "-c"]
    lookup = ["--gene-list", "labels.txt", "--esm-embeddings", "table.pt", "--output", "o.pt"]
    features = ["--from-toml", "big.toml", "--esm-embeddings", "table.pt", "--output", "big.pt"]
    plan = ["--config", "big.toml", "--pert-features", "big.pt", "--dry-run"]
    read_obs = "import h5py; h5py.File('big.h5ad')['obs/gene/categories'][:]"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own: a child's peak memory counts from that of its parent
        subprocess.run([sys.executable, __file__, "--write", name], check=True)
        pairs = {
            "script 1 --help": [*CREATE, "--help"],
            "script 2 --help": [*TRAIN, "--help"],
            "(python alone)": [*python, "pass"],
            f"{LABELS:,} labels from the table": [*CREATE, *lookup],
            "the same, one as an Ensembl id": [*CREATE, *lookup, "--gene-list", "ids.txt"],
            "(torch.load mmap + sha256)": [*python, f"{load}; {hashing}"],
            f"labels of {CELLS:,} cells + lookup": [*CREATE, *features],
            "(h5py reads the categories)": [*python, read_obs],
            "script 2 --dry-run on that": [*TRAIN, *plan],
        }
        found: dict[str, list[tuple[float, float]]] = {k: [] for k in pairs}
        for _ in range(repeats):
            for key, command in pairs.items():  # in turn, so that noise hits all alike
                found[key].append(measure(command, folder))
    for key, results in found.items():
        seconds, memory = zip(*results, strict=True)
        print(
            f"{key:38} {statistics.median(seconds):7.2f} s ({min(seconds):.2f} to "
            f"{max(seconds):.2f})  {max(memory):6,.0f} MB"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    write_inputs(arguments.write) if arguments.write else main(arguments.repeats)
