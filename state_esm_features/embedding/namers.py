"""What tells which gene has a protein: the user's aliases, HGNC's file, headers of FASTA records.

How the keys of a table become genes by it stands in `table_keys`.
"""

from __future__ import annotations

from collections.abc import Sequence

from state_esm_features.embedding.fasta import Proteins
from state_esm_features.embedding.gene_names import read_hgnc
from state_esm_features.embedding.protein_ids import protein_id
from state_esm_features.embedding.resolve import read_pairs
from state_esm_features.embedding.table_keys import ALIASES, Namer
from state_esm_features.files import sha256_of
from state_esm_features.option_groups import SymbolOptions


def find_namers(options: SymbolOptions, proteins: Sequence[Proteins]) -> list[Namer]:
    """Those that are given, in the order in which they are asked.

    Aliases P42224 STAT1 are the user's word on the protein. Of STAT1 P42224, which is one on the
    label, nothing is made that another tells otherwise.
    """
    by_protein, by_gene = namers_of_aliases(options)
    namers = [by_protein]
    if options.hgnc:
        names = read_hgnc(options.hgnc)
        genes = {x: [[symbol] for symbol in of] for x, of in names.accessions.items()}
        namers.append(Namer(names.describe(), names.origin, genes))
    for read in proteins:
        namers.append(Namer(read.path, {"kind": "fasta", "files": read.files}, read.named))
    return [*namers, by_gene]


def namers_of_aliases(options: SymbolOptions) -> tuple[Namer, ...]:
    """(those of lines PROTEIN GENE, those of lines GENE PROTEIN)."""
    listed = read_pairs(options.aliases)
    typed = [f"{old}={new}" for old, new in options.alias if protein_id(old) or protein_id(new)]
    origin: dict[str, object] = {"kind": ALIASES}
    said = []
    if options.aliases:
        origin |= {"path": str(options.aliases), "sha256": sha256_of(options.aliases)}
        said.append(str(options.aliases))
    if typed:
        origin["pairs"] = typed
        said.append("--alias")
    by_protein: dict[str, list[list[str]]] = {}
    by_gene: dict[str, list[list[str]]] = {}
    for old, new in dict.fromkeys([*options.alias, *listed]):
        if protein := protein_id(old):
            by_protein.setdefault(protein, []).append([new])
        if protein := protein_id(new):
            by_gene.setdefault(protein, []).append([old])
    return tuple(Namer(" and ".join(said), origin, genes) for genes in (by_protein, by_gene))
