"""Embedding proteins: create_esm_pert_features.py beside fair-esm's own model.

    python tests/benchmarks/bench_esm2.py [--models 8M 35M 650M] [--proteins 20] [--workers 2]
    python tests/benchmarks/bench_esm2.py --models --cached

Random weights, and lengths drawn like those of the human proteome (log-normal, median 415 residues)
and cut at 1,022. Every worker takes a protein and has each implementation compute it, one sequence
at a time, in an order drawn anew: whatever else the machine does slows down all of them. Printed
are the seconds of the workers' own threads and those of the clock, and, of a process each that
embeds proteins of 1,022 residues, the peak memory. Nothing is asserted: seconds depend on the
machine.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import esm
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from random_esm2 import human_like, random_protein, write_checkpoint  # noqa: E402

from state_esm_features.embedding.cache import Cache  # noqa: E402
from state_esm_features.embedding.embed import embed  # noqa: E402
from state_esm_features.embedding.esm2 import (  # noqa: E402
    ENCODER,
    Esm2,
    open_checkpoint,
    read_checkpoint,
)
from state_esm_features.embedding.fasta import Recipe  # noqa: E402
from state_esm_features.files import sha256_of  # noqa: E402

SHAPES = {"8M": (6, 320), "35M": (12, 480), "150M": (30, 640), "650M": (33, 1280)}
HEADS = 20
RUNS = ("fair-esm float32", "fair-esm bfloat16", "ours float32", "ours bfloat16")
Embed = Callable[[str], torch.Tensor]


def fair_esm(path: Path, dtype: torch.dtype) -> Embed:
    """The inner loop of fair-esm's extract.py with a batch of one; half precision: autocast."""
    c = open_checkpoint("model.pt", path)
    model = esm.ESM2(c.layers, c.width, c.heads).eval()
    model.load_state_dict(read_checkpoint(path)[1], strict=False)
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()

    def mean(sequence: str) -> torch.Tensor:
        tokens = convert([("", sequence)])[2]
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            states = model(tokens, repr_layers=[c.layers])["representations"][c.layers]
            return states[0, 1:-1].float().mean(0)

    return mean


def ours(path: Path, dtype: torch.dtype) -> Embed:
    """What embed_all gives to a core."""
    c = open_checkpoint("model.pt", path)
    model = Esm2(c, c.layers, torch.device("cpu"), dtype)
    return lambda sequence: embed(model, sequence, "window", threading.Event())


def built(run: str, path: Path) -> Embed:
    """One of RUNS on the weights of a file."""
    name, dtype = run.split()
    return {"fair-esm": fair_esm, "ours": ours}[name](path, getattr(torch, dtype))


def one_thread_each(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def compare(path: Path, proteins: int, workers: int) -> None:
    """Print thread seconds, clock seconds and the distance to the first of RUNS."""
    sequences = human_like(proteins, 1022)
    embeds = {run: built(run, path) for run in RUNS}

    def all_of(sequence: str) -> dict[str, tuple[float, float, torch.Tensor]]:
        done = {}
        for run in random.sample(RUNS, len(RUNS)):
            thread, clock = time.thread_time(), time.perf_counter()
            vector = embeds[run](sequence)
            done[run] = time.thread_time() - thread, time.perf_counter() - clock, vector
        return done

    with one_thread_each(workers) as pool:
        list(pool.map(all_of, ["MK" * 50] * workers))
        rounds = list(pool.map(all_of, sequences))
    expected = torch.stack([r[RUNS[0]][2] for r in rounds])
    for run in RUNS:
        thread, clock = (sum(r[run][i] for r in rounds) for i in (0, 1))
        vectors = torch.stack([r[run][2] for r in rounds])
        print(
            f"  {run:17}  {thread:6.1f} s of threads  {clock:6.1f} s of the clock  "
            f"largest difference {(vectors - expected).abs().max():.1e}, least cosine "
            f"{torch.cosine_similarity(vectors.double(), expected.double()).min():.6f}",
            flush=True,
        )


def print_memory(run: str, path: Path, workers: int) -> None:
    """Peak memory of a process that embeds two long proteins per worker."""
    embed_one = built(run, path)
    embed_one("M" * 1022)  # alone: threads race for the rotations that fair-esm's model keeps
    with one_thread_each(workers) as pool:
        list(pool.map(embed_one, ["M" * 1022] * 2 * workers))
    # not ru_maxrss: a new process starts with that of the process that started it
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    print(f"  {run:17}  {int(peak[1]) / 1e3:7,.0f} MB at most", flush=True)


def cached(folder: Path, proteins: int = 20_000, width: int = 1280) -> None:
    """From command to file when every protein is in the cache."""
    write_checkpoint(folder / "model.pt", 1, width, HEADS)
    rng = np.random.default_rng(2)
    sequences = [random_protein(rng, 400) for _ in range(proteins)]
    (folder / "all.fasta").write_text("".join(f">P{i}\n{s}\n" for i, s in enumerate(sequences)))
    sha256 = sha256_of(folder / "model.pt")
    recipe = Recipe(sha256, 1, "mean", "window", "float32", ENCODER)
    cache = Cache(folder)
    for sequence in sequences:
        cache.put(recipe.key(sequence), torch.randn(width))
    command = [sys.executable, str(ROOT / "create_esm_pert_features.py"), "--all-genes"]
    command += ["--fasta=all.fasta", "--esm-model=model.pt", "--cache=.", "--device=cpu"]
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([*command, "--output", "o.pt"], cwd=folder, check=True, capture_output=True)
        print(
            f"{proteins:,} proteins x {width:,} in the cache: {time.perf_counter() - start:.1f} s"
        )


def main() -> None:
    from torch.backends import cpu

    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=["8M", "35M"])
    parser.add_argument("--proteins", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print_memory(args.memory[0], Path(args.memory[1]), args.workers)
        return
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt"
            write_checkpoint(path, *SHAPES[name], HEADS)
            cores = f"{args.workers} of {os.cpu_count()} cores"
            print(f"{name}, {args.proteins} proteins, {cores}, {cpu.get_cpu_capability()}")
            compare(path, args.proteins, args.workers)
            for run in RUNS:
                command = [sys.executable, __file__, "--memory", run, str(path)]
                subprocess.run([*command, f"--workers={args.workers}"], check=True)
    if args.cached:
        with tempfile.TemporaryDirectory() as folder:
            cached(Path(folder))


if __name__ == "__main__":
    main()
