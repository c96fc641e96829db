"""Protein sequences of FASTA files by gene, and in which pieces ESM2 sees them.

No vector is computed here.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from state_esm_features.console import InputError, Notes, count, first_line, some
from state_esm_features.embedding.gene_names import without_version
from state_esm_features.embedding.protein_ids import ids_in_header
from state_esm_features.files import begins_with, existing_file, sha256_of
from state_esm_features.option_groups import STRIDE, WINDOW, SequenceOptions

NUCLEOTIDES = frozenset("ACGTUN")

RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWYXBUZO")
"""Letters that ESM2's alphabet has a token for: the 20 amino acids, any (X), B, Z, U and O."""

GENE_IN_HEADER = (
    r"\bGN=(.+?)(?=\s+[A-Z]{2}=|\s*\||\s*$)",
    r"\[gene=([^\]]+)\]",
    r"\bgene_symbol:(\S+)",
    r"\bgene:(\S+)",
)
"""Where a FASTA header names its gene: UniProt, NCBI, Ensembl's symbol and gene id."""


ENSEMBL_GENE = r"(?<![A-Za-z0-9])ENS(?:[A-Z]{3,4})?G\d{11}(?!\d)"
"""An Ensembl gene id, as a part of query_ENSG00000115415_canonical too."""


@dataclass(frozen=True)
class Protein:
    """A record of a FASTA file: its identifier and its sequence in capitals."""

    id: str
    sequence: str


@dataclass
class Proteins:
    """The sequences of --fasta by gene.

    Attributes
    ----------
    files
        {path, sha256} of every file.
    genes
        {symbol or Ensembl gene id: its usable proteins, in the order of the files}.
    symbols
        The first name of every gene: what --all-genes means.
    left_out
        {reason: identifiers of the records}.
    refused
        {gene: why a record of it was left out}.
    named
        {accession or Ensembl id of a protein: its genes, each by all of its names}, also of records
        that were left out.
    options
        The model, and how it is used.
    recipe, width
        How vectors were computed and how long they are; None as long as none was needed.
    """

    options: SequenceOptions
    recipe: Recipe | None = None
    width: int | None = None
    files: list[dict[str, Any]] = field(default_factory=list)
    genes: dict[str, list[Protein]] = field(default_factory=dict)
    symbols: dict[str, None] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    named: dict[str, list[list[str]]] = field(default_factory=dict)

    def __contains__(self, gene: str) -> bool:
        return gene in self.genes

    def __iter__(self) -> Iterator[str]:
        return iter(self.genes)

    def __getitem__(self, gene: str) -> list[Protein]:
        """The proteins whose mean is the gene's vector, as --isoforms has it."""
        proteins = self.genes[gene]
        if self.options.isoforms == "longest":
            return [max(proteins, key=lambda p: len(p.sequence))]
        return proteins[:1] if self.options.isoforms == "first" else proteins

    def origin(self, gene: str) -> dict[str, Any]:
        """What the manifest says of a gene: which proteins its vector was computed from."""
        proteins = []
        for protein in self[gene]:
            length = len(protein.sequence)
            pieces = len(windows(length, self.options.long))
            proteins.append({"id": protein.id, "residues": length, "windows": pieces})
        return {"proteins": proteins}

    def add(self, header: str, raw: str) -> str:
        """File a record under its gene, or count why not; the sequence, in capitals."""
        identifier = (header.split() or ["(no name)"])[0]
        names = genes_in_header(header)
        sequence = re.sub(r"\s", "", raw).removesuffix("*")
        if sequence.isascii():  # capitals of other letters can be residues
            sequence = sequence.upper()
        if names not in ([], [header]):  # else it names itself
            for protein in ids_in_header(header):
                genes = self.named.setdefault(protein, [])
                genes += [names] if names not in genes else []
        reason = unusable(sequence) if names else "no gene in the header"
        if reason is None:
            self.symbols.setdefault(names[0])
            for name in names:
                self.genes.setdefault(name, []).append(Protein(identifier, sequence))
            return sequence
        self.left_out.setdefault(reason, []).append(identifier)
        for name in names:
            self.refused.setdefault(name, f"{identifier}: {reason}")
        return sequence

    @property
    def path(self) -> str:
        """The files, for a message."""
        return some(f["path"] for f in self.files)

    def record(self) -> dict[str, Any]:
        """What the manifest says of the sequences and the model."""
        return {
            "kind": "esm2",
            "model": self.options.esm_model,
            **(asdict(self.recipe) if self.recipe else {}),
            "isoforms": self.options.isoforms,
            "fasta": self.files,
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        how = ""
        if self.recipe:
            how = f" x {self.width:,}, {self.options.esm_model} in {self.recipe.precision}"
        return f"{self.path} ({count(len(self.symbols), 'gene')}{how})"


def genes_in_header(header: str) -> list[str]:
    """Symbol and gene id that a FASTA header names, versions of Ensembl ids stripped.

    A header that is one word without `|` is the Ensembl gene id in it, else the symbol itself.
    """
    found = [m[1].strip() for p in GENE_IN_HEADER if (m := re.search(p, header))]
    if not found and re.fullmatch(r"[^\s|]+", header):
        ids = dict.fromkeys(re.findall(ENSEMBL_GENE, header))
        found = [*ids] if len(ids) == 1 else [header]
    return list(dict.fromkeys(map(without_version, found)))


def unusable(sequence: str) -> str | None:
    """Why ESM2 cannot read a sequence, or None."""
    if not sequence:
        return "empty sequence"
    if "*" in sequence:
        return "a stop (*) inside the sequence"
    if len(sequence) >= 30 and NUCLEOTIDES.issuperset(sequence):
        return "nucleotides"
    return None if RESIDUES.issuperset(sequence) else "characters that are no amino acids"


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """(header, sequence) of every record, plain or gzip, told by content."""
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    existing_file(path, "FASTA file")
    try:
        opened = gzip.open if begins_with(path, b"\x1f\x8b") else open
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as f:
            lines = itertools.dropwhile(lambda line: not line.strip(), f)
            first = next(lines, None)
            if first is None:
                return
            if not first.startswith(">"):  # the parser would skip what comes before
                raise InputError(f"{path} does not begin with '>'. Is it FASTA, plain or gzip?")
            yield from SimpleFastaParser(itertools.chain([first], lines))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"FASTA file {path} cannot be read: damaged or cut short ({first_line(error)})"
        ) from error


def load_proteins(paths: Sequence[Path], options: SequenceOptions, notes: Notes) -> Proteins:
    """Read every --fasta.

    Raises
    ------
    InputError
        A file cannot be read, holds no record or nucleotides; no record at all can be used.
    """
    proteins = Proteins(options)
    records = 0
    for path in paths:
        letters: set[str] = set()
        before = records
        for header, sequence in read_fasta(path):
            letters.update(proteins.add(header, sequence))
            records += 1
        if records == before:
            raise InputError(f"{path} holds no protein: no line starts with '>'. Is it FASTA?")
        if letters and letters <= NUCLEOTIDES:
            raise InputError(f"{path} holds nucleotides; give the file of the proteins (pep)")
        proteins.files.append({"path": str(path), "sha256": sha256_of(path)})
    if proteins.left_out:
        reasons = (f"{why}: {len(i):,} ({some(i, 3)})" for why, i in proteins.left_out.items())
        total = sum(map(len, proteins.left_out.values()))
        message = f"{total:,} of {count(records, 'protein')} left out: {'; '.join(reasons)}"
        if not proteins.genes:
            raise InputError(
                f"{message}. Headers must name the gene: GN=SYMBOL, gene_symbol:SYMBOL, "
                "[gene=SYMBOL] or the symbol alone"
            )
        notes.warn(message)
    return proteins


def windows(length: int, long: str) -> list[tuple[int, int]]:
    """Pieces (start, end) in which ESM2 sees a protein of `length` residues.

    `window`: WINDOW residues every STRIDE, the last one as long as what is left; `truncate`: the
    first WINDOW residues.
    """
    if long == "truncate":
        return [(0, min(length, WINDOW))]
    starts = range(0, max(1, length - WINDOW + STRIDE), STRIDE)
    return [(start, min(start + WINDOW, length)) for start in starts]


@dataclass(frozen=True)
class Recipe:
    """All that the vector of a sequence depends on: what the manifest says, and the cache's key."""

    weights_sha256: str
    layer: int
    pooling: str
    long: str
    precision: str
    encoder: str

    def key(self, sequence: str) -> str:
        """Hex sha256 of the recipe and the sequence."""
        return hashlib.sha256(f"{json.dumps(asdict(self))}\n{sequence}".encode()).hexdigest()
