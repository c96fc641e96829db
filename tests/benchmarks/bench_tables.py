"""How long each form of a table takes to read, and how much memory: 20,000 genes x 1,280.

    python tests/benchmarks/bench_tables.py [--genes 20000] [--width 1280] [--forms csv parquet]

Each form is written by `tests/table_writers.py`, and read by `load_table`, every vector of it, in a
process of its own that has torch imported. Other libraries are imported while the clock runs. Then
labels are looked up in a torch dict of the size of Arc's table, and two of these are compared.

Memory is the most that was resident, pages of mapped files included. Files have just been written:
they come from the system's cache. Nothing is asserted: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ARC_GENES, ARC_WIDTH, LABELS = 19_790, 5_120, 5
"""Size of Arc's table, and labels that are looked up in it."""


def limit(form: str) -> int:
    """Seconds that reading a form shall take at most."""
    if form.startswith(("csv", "tsv")):
        return 30
    folders = {"extract.py", "meta.json", "genes.json", "index.tsv", "names.txt", "gene_order.txt"}
    return 20 if form in folders or form.startswith("folder") else 10


def write(form: str, path: Path, genes: int, width: int) -> None:
    """A table of random vectors."""
    import numpy as np
    import table_writers

    rows = np.random.default_rng(0).standard_normal((genes, width), dtype=np.float32)
    names = [f"GENE{i}" for i in range(genes)]
    table_writers.write_table(form, path, dict(zip(names, rows, strict=True)))


def resident(kind: str) -> float:
    """MB in memory now (VmRSS), or at most until now (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{kind}:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1e3


def read(path: Path, labels: int | None) -> dict[str, float]:
    """Seconds, CPU seconds and MB of reading all vectors, or those of some labels."""
    import torch

    from state_esm_features.console import Notes
    from state_esm_features.embedding.tables import load_table

    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    table = load_table(path, Notes())
    genes = list(table)
    step = 1 if labels is None else len(genes) // labels
    total = torch.zeros(table.width, dtype=torch.float64)
    for gene in genes[::step]:
        total += table[gene]
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "before": before,
        "most": resident("VmHWM"),
    }


def compare(one: Path, other: Path) -> dict[str, float]:
    """The same of comparing two tables that are open."""
    from state_esm_features.console import Notes
    from state_esm_features.embedding.table_agreement import compare_tables
    from state_esm_features.embedding.tables import load_table

    tables = [load_table(path, Notes()) for path in (one, other)]
    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    compare_tables(tables, Notes())
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "before": before,
        "most": resident("VmHWM"),
    }


def child(*words: object) -> dict[str, float]:
    """What this file does in a process of its own; its last line is JSON."""
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {}


def line(what: str, seen: dict[str, float], most_seconds: str = "") -> str:
    return (
        f"{what:<22} {seen['seconds']:7.2f} s {seen['cpu']:7.2f} s of CPU  {most_seconds:>8}  "
        f"{seen['most']:7,.0f} MB, {seen['most'] - seen['before']:7,.0f} MB more than before"
    )


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def main(args: argparse.Namespace) -> None:
    """Each form in turn, in a folder that is deleted afterwards."""
    import os

    import table_writers
    import torch

    cores = len(os.sched_getaffinity(0))
    print(f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores")
    print(f"{args.genes:,} genes x {args.width:,}; load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "table"
        for form in args.forms or table_writers.WRITERS:
            child("--write", form, path, args.genes, args.width)
            print(line(form, child("--read", path), f"(< {limit(form)} s)"), flush=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        genes, width = (ARC_GENES, ARC_WIDTH) if args.arc else (args.genes, args.width)
        child("--write", "torch", path, genes, width)
        print(f"{genes:,} genes x {width:,}, torch: {path.stat().st_size / 1e6:,.0f} MB")
        print(line(f"{LABELS} labels", child("--read", path, LABELS)))
        print(line("all genes", child("--read", path)))
        print(line("comparing two tables", child("--compare", path, path)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=1_280)
    parser.add_argument("--forms", nargs="+", help="some of tests/table_writers.py's")
    parser.add_argument("--arc", action=argparse.BooleanOptionalAction, default=True)
    for hidden in ("--write", "--read", "--compare"):
        parser.add_argument(hidden, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        kind, where, *size = arguments.write
        write(kind, Path(where), *map(int, size))
    elif arguments.read:
        where, *number = arguments.read
        print(json.dumps(read(Path(where), int(number[0]) if number else None)))
    elif arguments.compare:
        print(json.dumps(compare(*map(Path, arguments.compare))))
    else:
        main(arguments)
