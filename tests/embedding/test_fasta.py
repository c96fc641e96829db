"""Proteins of FASTA files: headers, isoforms, what is written as FASTA is read back."""

from __future__ import annotations

import gzip
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fasta_records import ENSEMBL, LETTERS, UNIPROT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from state_esm_features.console import Notes
from state_esm_features.embedding.fasta import (
    Proteins,
    genes_in_header,
    load_proteins,
    windows,
)
from state_esm_features.option_groups import SequenceOptions


@pytest.fixture
def parse(tmp_path: Path) -> Callable[..., Proteins]:
    """load_proteins on files of these contents."""

    def load(*contents: str | bytes) -> Proteins:
        paths = []
        for i, content in enumerate(contents):
            paths.append(tmp_path / f"{i}.fasta")
            paths[-1].write_bytes(content.encode() if isinstance(content, str) else content)
        return load_proteins(paths, SequenceOptions(), Notes())

    return load


def sequences_of(proteins: Proteins) -> dict[str, list[str]]:
    return {gene: [p.sequence for p in found] for gene, found in proteins.genes.items()}


@pytest.mark.parametrize(
    ("header", "genes"),
    [
        (UNIPROT, ["STAT1"]),
        ("sp|P1|X_HUMAN Name OS=Homo sapiens GN=HLA-A", ["HLA-A"]),
        ("tr|P1|X Name GN=Two words PE=4 SV=1", ["Two words"]),
        (ENSEMBL.format(".21"), ["STAT1", "ENSG00000115415"]),
        (ENSEMBL.format(""), ["STAT1", "ENSG00000115415"]),
        ("ENSP1 pep gene:ENSMUSG00000026104.15 gene_symbol:Stat1", ["Stat1", "ENSMUSG00000026104"]),
        ("lcl|NC_1_prot_NP_1.1 [gene=TP53] [db_xref=GeneID:7157]", ["TP53"]),
        ("P42224|GN=STAT1|Homo sapiens", ["STAT1"]),
        ("P42224 | GN=STAT1 | Homo sapiens", ["STAT1"]),
        ("TP53", ["TP53"]),
        ("HLA-A.1", ["HLA-A.1"]),
        ("ENSG00000115415.21", ["ENSG00000115415"]),
        ("query_ENSG00000169047_canonical_ENST00000305123_Name_IRS1", ["ENSG00000169047"]),
        ("ENSG00000115415_ENSG00000169047", ["ENSG00000115415_ENSG00000169047"]),
        ("sp|P42224|STAT1_HUMAN", []),
        ("NP_009330.1 signal transducer", []),
        ("", []),
    ],
)
def test_genes_in_a_header(header: str, genes: list[str]) -> None:
    assert genes_in_header(header) == genes


def test_gzip_crlf_case_and_end_stop_change_nothing(parse: Callable[..., Proteins]) -> None:
    plain = b">A\nMKTA\nYIAK\n>B\nMLQ\n"
    for content in (
        plain,
        gzip.compress(plain),
        plain.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + plain,
        b">A\nmkta\nyiak*\n>B\nmLq*\n",
        b">A\n\nMKTA YIAK\n\n>B\nM\tLQ",
    ):
        assert sequences_of(parse(content)) == {"A": ["MKTAYIAK"], "B": ["MLQ"]}


def test_files_add_up_in_their_order(parse: Callable[..., Proteins]) -> None:
    proteins = parse(">A\nMK\n>B\nML\n", ">A\nMKL\n")
    assert sequences_of(proteins) == {"A": ["MK", "MKL"], "B": ["ML"]}
    assert list(proteins.symbols) == ["A", "B"]
    assert [Path(f["path"]).name for f in proteins.files] == ["0.fasta", "1.fasta"]


RECORD = st.tuples(
    st.text("ABCXYZ0189-", min_size=1, max_size=8),
    st.text(LETTERS, min_size=1, max_size=80),
    st.integers(1, 90),
)


@settings(max_examples=80)
@given(st.lists(RECORD, max_size=12), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_what_is_written_as_fasta_is_read_back(
    records: list[tuple[str, str, int]], end: str
) -> None:
    expected: dict[str, list[str]] = {}
    text = ""
    for symbol, sequence, width in [*records, ("last", "MMM", 2)]:  # M: never only nucleotides
        expected.setdefault(symbol, []).append(sequence)
        lines = [sequence[i : i + width] for i in range(0, len(sequence), width)]
        text += end.join([f">{symbol}", *lines, ""])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.fasta"
        path.write_bytes(text.encode())
        proteins = load_proteins([path], SequenceOptions(), Notes())
    assert sequences_of(proteins) == expected
    assert list(proteins.symbols) == list(expected)
    assert proteins.left_out == {}


@given(st.integers(1, 40_000))
@example(1022)
@example(1023)
@example(1533)
@example(1534)
@example(35_991)
def test_windows_cover_a_protein(length: int) -> None:
    """1,022 residues every 511, no more windows than needed; or the first 1,022 residues."""
    pieces = windows(length, "window")
    assert len(pieces) == max(1, math.ceil((length - 1022) / 511) + 1)
    assert [start for start, _ in pieces] == [511 * i for i in range(len(pieces))]
    assert all(end == min(start + 1022, length) for start, end in pieces)
    assert {i for start, end in pieces for i in range(start, end)} == set(range(length))
    assert (len(pieces) == 1) == (length <= 1022)
    assert windows(length, "truncate") == [(0, min(length, 1022))]
