"""Embedding proteins: create_esm_pert_features.py beside fair-esm's own extract loop.

    python tests/benchmarks/bench_esm2.py [--models 8M 35M 650M] [--proteins 100] [--repeats 3]
    python tests/benchmarks/bench_esm2.py --models --cached

Random weights, and lengths drawn like those of the human proteome (log-normal, median 415 residues)
and cut at 1,022, so that both do the same work. The reference is the loop of fair-esm's extract.py:
FASTA in, mean vectors out, 4,096 tokens a batch. Each runs in a process of its own; seconds are
those of the embedding itself, after a first protein and without model loading; memory is the peak
of the whole process. Every repeat runs all of them in turn; medians are printed, and nothing is
asserted: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from state_esm_features.embedding.cache import Cache
from state_esm_features.embedding.embed import embed, embed_all
from state_esm_features.embedding.esm2 import Esm2, open_checkpoint
from state_esm_features.embedding.fasta import Recipe, read_fasta
from state_esm_features.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHAPES = {"8M": (6, 320), "35M": (12, 480), "150M": (30, 640), "650M": (33, 1280)}
HEADS = 20
RUNS = ("reference", "float32", "bfloat16")


def write_inputs(folder: Path, model: str, proteins: int) -> None:
    """model.pt in fair-esm's layout with random weights, and p.fasta."""
    import esm
    import numpy as np
    import torch

    torch.manual_seed(0)
    layers, width = SHAPES[model]
    weights = {}
    for name, value in esm.ESM2(layers, width, HEADS).state_dict().items():
        if not name.startswith("contact_head."):
            inner = "" if name.startswith("lm_head.") else "sentence_encoder."
            weights[f"encoder.{inner}{name}"] = value
    config = argparse.Namespace(
        encoder_layers=layers,
        encoder_embed_dim=width,
        encoder_attention_heads=HEADS,
        token_dropout=True,
    )
    torch.save({"cfg": {"model": config}, "model": weights}, folder / "model.pt")
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(415), 0.75, proteins), 30, 1022).astype(int)
    sequences = ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), n)) for n in lengths]
    (folder / "p.fasta").write_text("".join(f">P{i}\n{s}\n" for i, s in enumerate(sequences)))


def reference(folder: Path) -> float:
    """fair-esm's extract loop; seconds."""
    import esm
    import torch

    content = torch.load(folder / "model.pt", weights_only=False)
    model, alphabet, weights = esm.pretrained._load_model_and_alphabet_core_v2(content)
    model.load_state_dict(weights, strict=False)
    model.eval()
    del content, weights
    vectors = {}
    with torch.no_grad():
        model(alphabet.get_batch_converter()([("warm", "MK" * 100)])[2])
    start = time.perf_counter()
    data = esm.FastaBatchedDataset.from_file(folder / "p.fasta")
    batches = data.get_batch_indices(4096, extra_toks_per_seq=1)
    loader = torch.utils.data.DataLoader(
        data, collate_fn=alphabet.get_batch_converter(1022), batch_sampler=batches
    )
    with torch.no_grad():
        for labels, sequences, tokens in loader:
            found = model(tokens, repr_layers=[model.num_layers])["representations"]
            for i, label in enumerate(labels):
                residues = found[model.num_layers][i, 1 : len(sequences[i]) + 1]
                vectors[label] = residues.mean(0).clone()
    seconds = time.perf_counter() - start
    torch.save(vectors, folder / "reference.pt")
    return seconds


def ours(folder: Path, precision: str) -> float:
    """The script's own functions on the same file; seconds."""
    import threading

    import torch

    checkpoint = open_checkpoint("model.pt", folder / "model.pt")
    model = Esm2(checkpoint, torch.device("cpu"), getattr(torch, precision))
    embed(model, "MK" * 100, model.layers, "window", threading.Event())
    start = time.perf_counter()
    names = {s: header for header, s in read_fasta(folder / "p.fasta")}
    embedded = embed_all(model, list(names), model.layers, "window")
    vectors = {names[sequence]: vector for sequence, vector in embedded}
    seconds = time.perf_counter() - start
    torch.save(vectors, folder / f"{precision}.pt")
    return seconds


def one(folder: Path, what: str) -> tuple[float, float]:
    """Seconds and peak MB of a run in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", what, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def compare(folder: Path, precision: str) -> tuple[float, float]:
    """Largest difference of an element, and least cosine, to the reference."""
    import torch

    a, b = (torch.load(folder / f"{x}.pt", weights_only=True) for x in ("reference", precision))
    genes = sorted(a)
    x, y = (torch.stack([t[g] for g in genes]) for t in (a, b))
    return float((x - y).abs().max()), float(torch.cosine_similarity(x, y).min())


def cached(folder: Path, proteins: int = 20_000, width: int = 1280) -> None:
    """From command to file when every protein is in the cache."""
    import numpy as np
    import torch

    write_inputs(folder, "650M", 1)
    rng = np.random.default_rng(2)
    sequences = ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), 400)) for _ in range(proteins)]
    (folder / "all.fasta").write_text("".join(f">P{i}\n{s}\n" for i, s in enumerate(sequences)))
    recipe = Recipe(sha256_of(folder / "model.pt"), 33, "mean", "window", "float32")
    cache = Cache(folder / "esm2_vectors.sqlite")
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=["8M", "35M"])
    parser.add_argument("--proteins", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, folder = args.one[0], Path(args.one[1])
        seconds = reference(folder) if what == "reference" else ours(folder, what)
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        return
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), name, args.proteins)
            rounds = [{w: one(Path(folder), w) for w in RUNS} for _ in range(args.repeats)]
            print(f"{name}, {args.proteins} proteins, {os.cpu_count()} cores")
            for what in RUNS:
                difference, cosine = compare(Path(folder), what)
                ratios = sorted(r["reference"][0] / r[what][0] for r in rounds)
                print(
                    f"  {what:9}  {median(r[what][0] for r in rounds):6.1f} s  "
                    f"x{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
                    f"{max(r[what][1] for r in rounds):5,.0f} MB  "
                    f"largest difference {difference:.1e}, least cosine {cosine:.6f}",
                    flush=True,
                )
    if args.cached:
        with tempfile.TemporaryDirectory() as folder:
            cached(Path(folder))


if __name__ == "__main__":
    main()
