"""Sequences to vectors: FASTA files, fair-esm's values, the cache, and runs that are stopped."""

from __future__ import annotations

import gzip
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import esm
import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, Result, run_script, suspend, until
from fasta_records import ENSEMBL, LETTERS
from random_esm2 import write_checkpoint
from table_writers import of_extract

import create_esm_pert_features as script
from state_esm_features.embedding import downloads
from state_esm_features.embedding import vectors as vectors_module

Create = Callable[..., Result]

SEQUENCES = {
    "A": "MKTAYIAKQRQISFVKSHFSRQ",
    "B": "MALWMRLLPLLALLALWGPDPAAAFVNQHLC",
    "C": "MXBUZO",
}
ALL = ("--all-genes", "--fasta", "p.fasta", "--esm-model", "m.pt", "--device", "cpu")
OUT = ("--output", "o.pt")
ADVICE = (
    "Add a table that has them with --esm-embeddings, or their proteins with --fasta, rename with "
    "--alias OLD=NEW, see all with --report FILE.tsv --dry-run, or accept with --missing mean\n"
)
NAME_THE_GENE = (
    ". Headers must name the gene: GN=SYMBOL, gene_symbol:SYMBOL, [gene=SYMBOL] or the symbol "
    "alone\n"
)


def reference(model: Any, sequences: list[str], layer: int) -> list[torch.Tensor]:
    """Mean over residues as fair-esm gives it, all sequences in one padded batch."""
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    tokens = convert([(str(i), s) for i, s in enumerate(sequences)])[2]
    with torch.no_grad():
        found = model(tokens, repr_layers=[layer])["representations"][layer]
    return [v[1 : len(s) + 1].mean(0) for v, s in zip(found, sequences, strict=True)]


def fasta(records: dict[str, str]) -> str:
    return "".join(f">{header}\n{sequence}\n" for header, sequence in records.items())


def features(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "o.pt", weights_only=True)


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "o.pt.json").read_text())


def cached(err: str) -> tuple[int, int]:
    """How many vectors were in the cache and how many had to be computed, as logged."""
    found = re.search(r"([\d,]+) in the cache, ([\d,]+) to compute", err)
    assert found, err
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def random_protein(rng: random.Random, length: int) -> str:
    return "M" + "".join(rng.choices(LETTERS[:20], k=length - 1))


def close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-5) -> bool:
    return a.dtype == torch.float32 and float((a - b).abs().max()) < within


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """m.pt and p.fasta in tmp_path; fair-esm's model with the weights of m.pt."""
    (tmp_path / "p.fasta").write_text(fasta(SEQUENCES))
    return write_checkpoint(tmp_path / "m.pt")


# --- FASTA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["", ".21"])
def test_symbol_and_ensembl_id_are_both_labels(
    tmp_path: Path, create: Create, model: Any, version: str
) -> None:
    (tmp_path / "p.fasta").write_text(fasta({ENSEMBL.format(version): SEQUENCES["A"]}))
    (tmp_path / "genes.txt").write_text("ENSG00000115415\nSTAT1\n")
    done = create("--gene-list", "genes.txt", *ALL[1:], *OUT, "--no-cache")
    assert (done.code, done.out) == (0, "o.pt\n")
    assert "1 protein of 2 genes: 0 in the cache, 1 to compute with m.pt on cpu" in done.err
    found = features(tmp_path)
    assert list(found) == ["ENSG00000115415", "STAT1", "non-targeting"]
    assert torch.equal(found["STAT1"], found["ENSG00000115415"])
    assert not found["non-targeting"].any()
    assert manifest(tmp_path)["labels"]["ENSG00000115415"] == {
        "how": "exact",
        "gene": "ENSG00000115415",
        "source": 0,
        "proteins": [{"id": "ENSP00000354394.4", "residues": 22, "windows": 1}],
    }


def test_left_out_proteins_are_counted_with_their_reasons(
    tmp_path: Path, create: Create, model: Any
) -> None:
    bad = {"nameless one": "MK", "S": "MK*LV", "D": "MK1LV", "J": "MJ", "E": "", "N two": "MK"}
    bad["DNA"] = "ACGT" * 8
    (tmp_path / "p.fasta").write_text(fasta({"GOOD": "MKLV*", **bad}))
    done = create(*ALL, *OUT, "--no-cache")
    assert done.code == 0
    assert done.err.splitlines()[0] == (
        "warning: 7 of 8 proteins left out: no gene in the header: 2 (nameless, N); a stop (*) "
        "inside the sequence: 1 (S); characters that are no amino acids: 2 (D, J); empty sequence: "
        "1 (E); nucleotides: 1 (DNA)"
    )
    assert list(features(tmp_path)) == ["GOOD", "non-targeting"]
    assert manifest(tmp_path)["sources"][0]["left_out"] == {
        "no gene in the header": ["nameless", "N"],
        "a stop (*) inside the sequence": ["S"],
        "characters that are no amino acids": ["D", "J"],
        "empty sequence": ["E"],
        "nucleotides": ["DNA"],
    }


def test_a_missing_label_says_why_its_record_was_left_out(
    tmp_path: Path, create: Create, model: Any
) -> None:
    (tmp_path / "p.fasta").write_text(fasta({"A": "MK", "id1 GN=XBAD PE=1": "MK*L"}))
    (tmp_path / "genes.txt").write_text("A\nXBAD\n")
    done = create("--gene-list", "genes.txt", *ALL[1:], *OUT, "--no-cache")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "warning: 1 of 2 proteins left out: a stop (*) inside the sequence: 1 (id1)\n"
        "error: 1 of 2 labels has no embedding (XBAD): 'XBAD' is in no FASTA file (id1: a stop "
        f"(*) inside the sequence). {ADVICE}"
    )
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b">a b\nMK\n>\nML\n",
            "2 of 2 proteins left out: no gene in the header: 2 (a, (no name))" + NAME_THE_GENE,
        ),
        (
            b">A\nacgt\n>B\nNNU\n",
            "p.fasta holds nucleotides; give the file of the proteins (pep)\n",
        ),
        (b"MKLV\n", "p.fasta does not begin with '>'. Is it FASTA, plain or gzip?\n"),
        (b"", "p.fasta holds no protein: no line starts with '>'. Is it FASTA?\n"),
        (b"\n text\n>A\nMK\n", "p.fasta does not begin with '>'. Is it FASTA, plain or gzip?\n"),
        (
            gzip.compress(b"a.fasta\0\0" + b">A\nMK\n", mtime=0),  # as of tar
            "p.fasta does not begin with '>'. Is it FASTA, plain or gzip?\n",
        ),
        (
            gzip.compress(b">A\n" + random.Random(0).randbytes(3000).hex().encode(), mtime=0)[
                :2000
            ],
            "FASTA file p.fasta cannot be read: damaged or cut short (Compressed file ended before "
            "the end-of-stream marker was reached)\n",
        ),
    ],
)
def test_files_that_hold_no_usable_protein(
    tmp_path: Path, create: Create, model: Any, content: bytes, message: str
) -> None:
    (tmp_path / "p.fasta").write_bytes(content)
    done = create(*ALL, *OUT, "--no-cache")
    assert (done.code, done.out, done.err) == (1, "", f"error: {message}")
    assert not (tmp_path / "o.pt").exists()


def test_a_pipe_is_no_file(tmp_path: Path, create: Create, model: Any) -> None:
    (tmp_path / "p.fasta").unlink()
    os.mkfifo(tmp_path / "p.fasta")
    done = create(*ALL, *OUT, "--no-cache")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: FASTA file p.fasta is a pipe or device; write it to a file first\n"


def test_a_damaged_gzip_is_said_to_be_damaged(tmp_path: Path, create: Create, model: Any) -> None:
    whole = bytearray(gzip.compress(fasta(SEQUENCES).encode(), mtime=0))
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "p.fasta").write_bytes(whole)
    done = create(*ALL, *OUT, "--no-cache")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: FASTA file p.fasta cannot be read: damaged or cut short (")
    assert done.err.count("\n") == 1


def test_no_such_fasta(tmp_path: Path, create: Create, model: Any) -> None:
    (tmp_path / "p.fasta").unlink()
    done = create(*ALL, *OUT, "--no-cache")
    assert done.err == f"error: no such FASTA file: p.fasta (looked in {tmp_path})\n"


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("isoforms", ["mean", "longest", "first"])
def test_isoforms_have_the_values_of_fair_esm(
    tmp_path: Path, create: Create, model: Any, isoforms: str
) -> None:
    a, b, c = SEQUENCES.values()
    (tmp_path / "p.fasta").write_text(f">G\n{a}\n>G\n{b}\n>H\n{c}\n>H\n{a}\n>G\n{c}\n>I\n{b}\n")
    done = create(*ALL, *OUT, "--isoforms", isoforms, "--no-cache")
    assert done.code == 0
    va, vb, vc = reference(model, [a, b, c], 2)
    for sequence, vector in zip((a, b, c), (va, vb, vc), strict=True):  # padded or not
        assert close(reference(model, [sequence], 2)[0], vector)
    expected = {
        "mean": ((va + vb + vc) / 3, (vc + va) / 2, vb, 3),
        "longest": (vb, va, vb, 2),
        "first": (va, vc, vb, 3),
    }[isoforms]
    found = features(tmp_path)
    for gene, vector in zip("GHI", expected[:3], strict=True):
        assert close(found[gene], vector), gene
    assert (
        f"{expected[3]} proteins of 3 genes: 0 in the cache, {expected[3]} to compute" in done.err
    )
    assert manifest(tmp_path)["sources"][0]["isoforms"] == isoforms
    assert len(manifest(tmp_path)["labels"]["G"]["proteins"]) == (3 if isoforms == "mean" else 1)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("dropout", [True, False])
def test_layers_have_the_values_of_fair_esm(
    tmp_path: Path, create: Create, model: Any, layer: int, dropout: bool
) -> None:
    theirs = write_checkpoint(tmp_path / "m.pt", seed=1, token_dropout=dropout)
    assert create(*ALL, *OUT, "--layer", layer, "--no-cache").code == 0
    found = features(tmp_path)
    expected = reference(theirs, list(SEQUENCES.values()), layer)
    for gene, vector in zip(SEQUENCES, expected, strict=True):
        assert close(found[gene], vector), gene
    assert manifest(tmp_path)["sources"][0]["layer"] == layer


@pytest.mark.parametrize("layer", [9, 3, -1])
def test_a_layer_that_is_not_there(tmp_path: Path, create: Create, model: Any, layer: int) -> None:
    done = create(*ALL, *OUT, "--layer", layer, "--no-cache")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: --layer {layer}: m.pt has layers 0 (embeddings) to 2\n"


def test_long_proteins_cut_or_in_windows(tmp_path: Path, create: Create, model: Any) -> None:
    sequence = random_protein(random.Random(0), 1600)
    (tmp_path / "p.fasta").write_text(fasta({"LONG": sequence, "EDGE": sequence[:1022]}))
    cut = create(*ALL, *OUT, "--long", "truncate", "--no-cache")
    assert cut.err.splitlines()[0] == (
        "warning: 1 protein cut after 1,022 residues by --long truncate"
    )
    found = features(tmp_path)
    assert close(found["LONG"], reference(model, [sequence[:1022]], 2)[0])
    assert torch.equal(found["LONG"], found["EDGE"])
    whole = create(*ALL, *OUT, "--no-cache")
    assert "warning" not in whole.err
    total, seen = torch.zeros(1600, 16), torch.zeros(1600, 1)
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    for start, end in ((0, 1022), (511, 1533), (1022, 1600)):
        with torch.no_grad():
            tokens = convert([("", sequence[start:end])])[2]
            piece = model(tokens, repr_layers=[2])["representations"][2]
        total[start:end] += piece[0, 1:-1]
        seen[start:end] += 1
    assert close(features(tmp_path)["LONG"], (total / seen).mean(0))
    assert manifest(tmp_path)["labels"]["LONG"]["proteins"][0]["windows"] == 3


def test_titin(tmp_path: Path, create: Create, model: Any) -> None:
    (tmp_path / "p.fasta").write_text(fasta({"TTN": random_protein(random.Random(1), 34_350)}))
    done = create(*ALL, *OUT, "--no-cache")
    assert done.code == 0
    vector = features(tmp_path)["TTN"]
    assert vector.shape == (16,) and vector.isfinite().all() and vector.any()
    assert manifest(tmp_path)["labels"]["TTN"]["proteins"] == [
        {"id": "TTN", "residues": 34_350, "windows": 67}
    ]


# --- with a table -----------------------------------------------------------------------------


def test_the_table_comes_first(tmp_path: Path, create: Create, model: Any) -> None:
    table = {"A": torch.randn(16), "Z": torch.randn(16)}
    torch.save(table, tmp_path / "table.pt")
    (tmp_path / "genes.txt").write_text("A\nB\nA+C\n")
    arguments = ("--gene-list", "genes.txt", "--esm-embeddings", "table.pt", *ALL[1:])
    done = create(*arguments, *OUT, "--no-cache")
    assert done.code == 0
    assert "2 genes in no table, to compute with m.pt from --fasta: B, C" in done.err.splitlines()
    assert "2 proteins of 2 genes: 0 in the cache, 2 to compute" in done.err
    found = features(tmp_path)
    b, c = reference(model, [SEQUENCES["B"], SEQUENCES["C"]], 2)
    assert torch.equal(found["A"], table["A"])
    assert close(found["B"], b)
    assert close(found["A+C"], table["A"] + c)
    labels = manifest(tmp_path)["labels"]
    assert (labels["A"]["source"], labels["B"]["source"]) == (0, 1)
    assert [s["kind"] for s in manifest(tmp_path)["sources"]] == ["table", "esm2"]


def test_a_table_of_another_layer_than_the_model_computes_is_refused(
    tmp_path: Path, create: Create, model: Any
) -> None:
    of_extract(tmp_path / "folder", {"A": np.ones(16, np.float32)}, layer=1)
    (tmp_path / "genes.txt").write_text("A\nB\n")
    arguments = ("--gene-list", "genes.txt", "--esm-embeddings", "folder", *ALL[1:], *OUT)
    assert create(*arguments, "--no-cache", "--quiet") == Result(
        1,
        "",
        "error: folder holds layer 1 of its model, and m.pt would compute layer 2; choose one for "
        "both with --layer, or leave the table out\n",
    )
    assert create(*arguments, "--no-cache", "--quiet", "--layer", 1).code == 0
    assert features(tmp_path)["A"].tolist() == [1.0] * 16


@pytest.mark.parametrize(
    ("name", "width", "table", "fitting"),
    [
        ("m.pt", "16", 8, ""),
        ("esm2_t6_8M_UR50D", "320", 1280, " (esm2_t33_650M_UR50D)"),
        ("esm2_t33_650M_UR50D", "1,280", 5120, " (esm2_t48_15B_UR50D)"),
    ],
)
def test_widths_that_differ(
    tmp_path: Path,
    create: Create,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    width: str,
    table: int,
    fitting: str,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(downloads, "_download_weights", lambda *_: pytest.fail("downloads"))
    torch.save({"A": torch.randn(table)}, tmp_path / "table.pt")
    arguments = ("--all-genes", "--esm-embeddings", "table.pt", "--fasta", "p.fasta")
    done = create(*arguments, "--esm-model", name, *OUT, "--no-cache")
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith(
        f"error: 2 genes not in table.pt (B, C) would be computed with {name}, which gives {width} "
        f"values a gene; the table has {table:,}. Choose an --esm-model of that width{fitting}, or "
        "leave the table out\n"
    )
    assert not (tmp_path / "torch").exists()


# --- usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        ("--esm-model", "m.pt"),
        ("--isoforms", "first"),
        ("--long", "truncate"),
        ("--layer", "0"),
        ("--device", "cpu"),
        ("--precision", "float32"),
        ("--cache", "cache"),
        ("--no-cache",),
        ("--isoforms", "mean"),  # the default, but asked for
    ],
)
def test_options_of_sequences_need_sequences(create: Create, option: tuple[str, ...]) -> None:
    done = create("--all-genes", *OUT, *option)
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(
        f"create_esm_pert_features.py: error: {option[0]} needs --fasta FILE\n"
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(
    tmp_path: Path, create: Create, model: Any, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = create(*ALL[:-1], device, *OUT, "--cache", "cache")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: --device {device}: torch sees none here; use --device auto or cpu\n"
    assert not (tmp_path / "o.pt").exists()


def test_a_device_that_is_none(create: Create) -> None:
    done = create(*ALL[:-1], "gpu", *OUT)
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(
        "error: argument --device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'\n"
    )


HIDDEN = (
    "error: the installed package 'esm' is EvolutionaryScale's and hides fair-esm, which has the "
    "same name: pip uninstall -y esm, then pip install --force-reinstall --no-deps fair-esm\n"
)


def test_another_package_called_esm(tmp_path: Path, model: Any) -> None:
    (tmp_path / "other" / "esm").mkdir(parents=True)
    (tmp_path / "other" / "esm" / "__init__.py").write_text("__version__ = '3.2.1'\n")
    hiding = os.environ | {"PYTHONPATH": str(tmp_path / "other")}
    done = run_script(
        "create_esm_pert_features", *ALL, *OUT, "--no-cache", cwd=tmp_path, env=hiding
    )
    assert (done.code, done.out, done.err) == (1, "", HIDDEN)
    assert not (tmp_path / "o.pt").exists()


PLAIN_CPU = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""Makes torch take an x86 CPU for one without AVX."""


@pytest.mark.parametrize(
    "precision", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs have other instructions"
)
def test_any_cpu_computes_in_any_precision_and_says_when_float32_is_faster(
    tmp_path: Path, model: Any, precision: str
) -> None:
    words = (*ALL, *OUT, *CACHE, "--precision", precision)
    done = run_script("create_esm_pert_features", *words, cwd=tmp_path, env=os.environ | PLAIN_CPU)
    warning = f"warning: {precision} is slow on this CPU, --precision float32 is faster"
    assert (done.code, done.out) == (0, "o.pt\n"), done.err
    said = [line for line in done.err.splitlines() if "warning" in line]
    assert said == ([] if precision == "float32" else [warning])
    for gene, vector in zip(SEQUENCES, reference(model, list(SEQUENCES.values()), 2), strict=True):
        assert torch.cosine_similarity(features(tmp_path)[gene], vector, dim=0) > 0.999
    again = run_script(  # all of it in the cache
        "create_esm_pert_features", *words, cwd=tmp_path, env=os.environ | PLAIN_CPU
    )
    assert cached(again.err) == (3, 0) and "warning" not in again.err


WITHOUT_NETWORK = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
import create_esm_pert_features as script
sys.exit(script.main(sys.argv[1:]))
"""


def test_nothing_asks_the_network(tmp_path: Path, model: Any) -> None:
    """The model's class comes from transformers, which can load from the Hugging Face hub."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, *ALL, *OUT, "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "o.pt\n"), done.stderr


IN_LITTLE_MEMORY = """
import re, resource, sys
import create_esm_pert_features as script
assert script.main(["--all-genes", "--fasta", "p.fasta", *sys.argv[1:4]]) == 0
used = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv.pop()),) * 2)
sys.exit(script.main(["--all-genes", "--fasta", "p.fasta", *sys.argv[4:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits memory")
@pytest.mark.parametrize(
    ("left", "message"),
    [
        (150_000_000, "big.pt has 170,831,829 bytes; free memory, or use a machine with more"),
        (
            400_000_000,  # more than its file mapped, less than that and a copy in float32
            "on cpu, where big.pt in float32 and one window of 1,022 residues must fit; what is "
            "finished is kept. Free memory there, or choose --precision bfloat16, --device cpu or "
            "a smaller --esm-model",
        ),
    ],
)
def test_out_of_memory(tmp_path: Path, model: Any, left: int, message: str) -> None:
    write_checkpoint(tmp_path / "big.pt", layers=1, width=2560, dtype=torch.float16)
    arguments = ("--esm-model=big.pt", "--device=cpu", "--no-cache", "--output=big_o.pt")
    small = ("--esm-model=m.pt", "--output=o.pt", "--no-cache")  # all is imported
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, *small, *arguments, str(left)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(f"error: out of memory:? {re.escape(message)}\n$", done.stderr), done.stderr
    assert not (tmp_path / "big_o.pt").exists()


def test_a_dry_run_computes_nothing(
    tmp_path: Path, create: Create, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "embed_genes", lambda *_: pytest.fail("computes"))
    before = sorted(tmp_path.iterdir())
    done = create(*ALL, *OUT, "--cache", "cache", "--dry-run")
    assert (done.code, done.out) == (0, "")
    assert done.err.endswith("\ndry run: 3 genes to compute (A, B, C), nothing written\n")
    assert sorted(tmp_path.iterdir()) == before


# --- cache ------------------------------------------------------------------------------------

CACHE = ("--cache", "cache")


def vectors_in(folder: Path) -> list[Path]:
    """Files of the cache, whole ones only."""
    return sorted(folder.glob("cache/??/" + "[0-9a-f]" * 64))


def test_the_second_run_computes_nothing(tmp_path: Path, create: Create, model: Any) -> None:
    first = create(*ALL, *OUT, *CACHE)
    assert cached(first.err) == (0, 3)
    assert first.err.endswith("\nsource    p.fasta (3 genes x 16, m.pt in float32)\n")
    kept = (tmp_path / "o.pt").read_bytes()
    second = create(*ALL, *OUT, *CACHE)
    assert cached(second.err) == (3, 0)
    assert (tmp_path / "o.pt").read_bytes() == kept
    uncached = create(*ALL, *OUT, "--no-cache")
    assert cached(uncached.err) == (0, 3)
    assert (tmp_path / "o.pt").read_bytes() == kept


@pytest.mark.parametrize(
    "change",
    [
        ("--precision", "bfloat16"),
        ("--precision", "float16"),
        ("--layer", "1"),
        ("--long", "truncate"),
        ("--esm-model", "other.pt"),
    ],
)
def test_another_recipe_never_takes_vectors_of_this_one(
    tmp_path: Path, create: Create, model: Any, change: tuple[str, str]
) -> None:
    write_checkpoint(tmp_path / "other.pt", seed=7)
    expected = {}
    for options in ((), change):
        assert create(*ALL, *options, *OUT, "--no-cache").code == 0
        expected[options] = (tmp_path / "o.pt").read_bytes()
    assert (expected[()] == expected[change]) == (change[0] == "--long")
    for options, found in ((change, 0), ((), 0), (change, 3), ((), 3)):
        done = create(*ALL, *options, *OUT, *CACHE)
        assert cached(done.err) == (found, 3 - found)
        assert (tmp_path / "o.pt").read_bytes() == expected[options]


def test_weights_changed_under_the_same_name_are_another_recipe(
    tmp_path: Path, create: Create, model: Any
) -> None:
    assert create(*ALL, *OUT, *CACHE).code == 0
    before = (tmp_path / "o.pt").read_bytes()
    theirs = write_checkpoint(tmp_path / "m.pt", seed=3)
    assert cached(create(*ALL, *OUT, *CACHE).err) == (0, 3)
    assert (tmp_path / "o.pt").read_bytes() != before
    assert close(features(tmp_path)["A"], reference(theirs, [SEQUENCES["A"]], 2)[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-10] + bytes([content[-10] ^ 0x40]) + content[-9:],
        lambda content: content[:-4],  # cut short
        lambda content: b"",
        lambda content: b"junk" * 3000,
    ],
)
def test_damaged_vectors_are_computed_again_and_counted(
    tmp_path: Path, create: Create, model: Any, damage: Callable[[bytes], bytes]
) -> None:
    assert create(*ALL, *OUT, *CACHE).code == 0
    kept = (tmp_path / "o.pt").read_bytes()
    files = vectors_in(tmp_path)
    whole = [path.read_bytes() for path in files]
    assert len(files) == 3
    for path in files[:2]:
        path.write_bytes(damage(path.read_bytes()))
    done = create(*ALL, *OUT, *CACHE)
    assert done.code == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: cache cache: 2 damaged vectors to compute again"]
    assert cached(done.err) == (1, 2)
    assert (tmp_path / "o.pt").read_bytes() == kept
    assert [path.read_bytes() for path in vectors_in(tmp_path)] == whole
    again = create(*ALL, *OUT, *CACHE)
    assert cached(again.err) == (3, 0) and "warning" not in again.err


def test_the_database_of_an_earlier_version_is_left_aside(
    tmp_path: Path, create: Create, model: Any
) -> None:
    old = tmp_path / "cache" / "esm2_vectors.sqlite"
    old.parent.mkdir()
    old.write_bytes(b"SQLite format 3\0")
    done = create(*ALL, *OUT, *CACHE)
    assert done.code == 0
    assert done.err.count("esm2_vectors.sqlite") == 1
    assert (
        "cache/esm2_vectors.sqlite is the cache of an earlier version: not used, and may be "
        "deleted\n"
    ) in done.err
    assert old.read_bytes() == b"SQLite format 3\0"
    assert cached(create(*ALL, *OUT, *CACHE).err) == (3, 0)


@pytest.mark.parametrize("folder", ["p.fasta/cache", "p.fasta", "dangling", "files"])
def test_a_cache_that_cannot_be_used_costs_a_warning(
    tmp_path: Path, create: Create, model: Any, folder: str
) -> None:
    """Under a file, a file, a link to nowhere (found out by writing), files for its folders."""
    assert create(*ALL, *OUT, "--no-cache").code == 0
    kept = (tmp_path / "o.pt").read_bytes()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "cache")
    (tmp_path / "files").mkdir()
    for i in range(256):
        (tmp_path / "files" / f"{i:02x}").touch()
    done = create(*ALL, *OUT, "--cache", folder)
    assert done.code == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert re.fullmatch(
        rf"warning: cache {folder} cannot be used \(.+\): going on without it", warnings[0]
    )
    assert cached(done.err) == (0, 3)
    assert (tmp_path / "o.pt").read_bytes() == kept


def test_no_cache_writes_none(
    tmp_path: Path, create: Create, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    before = set(tmp_path.iterdir())
    assert create(*ALL, *OUT, "--no-cache").code == 0
    assert {p.name for p in set(tmp_path.iterdir()) - before} == {"o.pt", "o.pt.json"}


# --- stopped runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Big:
    """Files of 200 proteins and an unbroken run's features."""

    arguments: tuple[str, ...]
    whole: bytes


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Big:
    folder = tmp_path_factory.mktemp("big")
    rng = random.Random(5)
    write_checkpoint(folder / "m.pt", layers=4, width=96)
    proteins = {f"G{i}": random_protein(rng, rng.randint(30, 300)) for i in range(200)}
    (folder / "p.fasta").write_text(fasta(proteins))
    fixed = ("--all-genes", f"--fasta={folder / 'p.fasta'}", f"--esm-model={folder / 'm.pt'}")
    arguments = (*fixed, "--device=cpu", "--output")
    assert script.main([*arguments, str(folder / "o.pt"), "--no-cache"]) == 0
    return Big(arguments, (folder / "o.pt").read_bytes())


def test_training_in_the_same_process_changes_no_bit(
    tmp_path: Path, create: Create, big: Big
) -> None:
    """State's training lowers the precision of float32 products for the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert create(*big.arguments, "o.pt", "--no-cache").code == 0
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (tmp_path / "o.pt").read_bytes() == big.whole


def begin(folder: Path, big: Big, output: str = "o.pt") -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "create_esm_pert_features.py"), *big.arguments, output]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *CACHE], cwd=folder, **pipes)  # type: ignore[call-overload]


def until_it_computes(process: subprocess.Popen[str]) -> str:
    """Read what a run says up to the line after which it computes, and return that."""
    said = ""
    while "in the cache" not in said:
        line = process.stderr.readline()  # type: ignore[union-attr]
        assert line, said
        said += line
    return said


def set_back(folder: Path, content: dict[Path, bytes]) -> None:
    """The cache as it was, and no features: nothing that a run left there which ended too soon."""
    shutil.rmtree(folder / "cache")
    for path in (*folder.glob("*.pt"), *folder.glob("*.json")):
        path.unlink()
    for path, was in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(was)


def reached(folder: Path, number: int, process: subprocess.Popen[str]) -> bool:
    """Whether so many vectors are in the cache, or a run has ended that was to write them."""
    return process.poll() is not None or len(vectors_in(folder)) >= number


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_loses_only_what_is_being_computed(
    tmp_path: Path, create: Create, big: Big, kills: int
) -> None:
    moments = random.Random(kills)
    kept = killed = 0
    while killed < kills or kept == 0:
        before = {path: path.read_bytes() for path in vectors_in(tmp_path)}
        process = begin(tmp_path, big)
        assert cached(until_it_computes(process)) == (kept, 200 - kept)
        wanted = kept + moments.randint(0, 90 // kills)
        until(partial(reached, tmp_path, wanted, process))
        time.sleep(moments.uniform(0, 0.01))  # any moment will do
        process.kill()
        _, err = process.communicate()
        if len(vectors_in(tmp_path)) > 190 * (killed + 1) // (kills + 1):
            # it came too late, and would leave too few vectors for the others: once more
            assert process.returncode in (0, -signal.SIGKILL), err
            set_back(tmp_path, before)
            continue
        assert process.returncode == -signal.SIGKILL, err
        assert len(vectors_in(tmp_path)) >= kept
        killed, kept = killed + 1, len(vectors_in(tmp_path))
        assert not (tmp_path / "o.pt").exists()
    assert 0 < kept < 200
    done = create(*big.arguments, "o.pt", *CACHE)
    assert (done.code, done.out) == (0, "o.pt\n")
    assert cached(done.err) == (kept, 200 - kept)
    assert (tmp_path / "o.pt").read_bytes() == big.whole
    assert len(vectors_in(tmp_path)) == 200


def test_sigterm_while_computing(tmp_path: Path, create: Create, big: Big) -> None:
    while True:
        process = begin(tmp_path, big)
        assert cached(until_it_computes(process)) == (0, 200)
        until(partial(reached, tmp_path, 5, process))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
        if len(vectors_in(tmp_path)) < 200:
            break
        assert process.returncode in (0, 143), err
        set_back(tmp_path, {})  # it came too late: once more
    assert (process.returncode, out) == (143, "")
    assert err.endswith("stopped by SIGTERM\n") and "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}
    kept = len(vectors_in(tmp_path))
    assert 5 <= kept < 200
    done = create(*big.arguments, "o.pt", *CACHE)
    assert done.code == 0
    assert cached(done.err) == (kept, 200 - kept)
    assert (tmp_path / "o.pt").read_bytes() == big.whole


def test_two_runs_at_once_share_a_cache(tmp_path: Path, create: Create, big: Big) -> None:
    """The first is held until the second has looked: both compute what the cache then lacked."""
    while True:
        other = begin(tmp_path, big, "other.pt")
        said = [until_it_computes(other)]
        if suspend(other.pid) and len(vectors_in(tmp_path)) < 200:
            break
        other.send_signal(signal.SIGCONT)  # it came too late: once more
        assert other.wait(PATIENCE) == 0
        set_back(tmp_path, {})
    try:
        one = begin(tmp_path, big)
        said.append(until_it_computes(one))
    finally:
        other.send_signal(signal.SIGCONT)
    assert cached(said[0]) == (0, 200) and cached(said[1])[1] > 0
    for process, name in ((other, "other.pt"), (one, "o.pt")):
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (0, f"{name}\n"), err
        said.append(err)
    assert "warning" not in "".join(said)
    assert (tmp_path / "o.pt").read_bytes() == big.whole
    assert (tmp_path / "other.pt").read_bytes() == big.whole
    assert len(vectors_in(tmp_path)) == 200
