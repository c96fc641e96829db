"""Headers and letters of proteins as FASTA files have them."""

from __future__ import annotations

import random

from state_esm_features.embedding.fasta import RESIDUES

LETTERS = "ACDEFGHIKLMNPQRSTVWYXBUZO"


UNIPROT = (
    "sp|P42224|STAT1_HUMAN Signal transducer and activator OS=Homo sapiens OX=9606 GN=STAT1 PE=1"
)


ENSEMBL = (
    "ENSP00000354394.4 pep chromosome:GRCh38:2:190964358:191020960:-1 gene:ENSG00000115415{} "
    "transcript:ENST00000361099.8 gene_biotype:protein_coding gene_symbol:STAT1 description:x"
)


def protein(length: int, seed: int = 0) -> str:
    """A random sequence of all letters that ESM2 has a token for."""
    return "".join(random.Random(seed * 10_007 + length).choices(sorted(RESIDUES), k=length))
