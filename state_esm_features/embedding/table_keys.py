"""The keys of a table, and the genes that they are: symbols and ids of genes are keys as they are,
ids of proteins become genes where something tells which.

No vector is read here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from state_esm_features.console import InputError, count, have, some
from state_esm_features.embedding.fasta import genes_in_header
from state_esm_features.embedding.gene_names import canonical
from state_esm_features.embedding.protein_ids import one_protein, protein_id
from state_esm_features.embedding.table_content import Content

SYMBOLS, GENE_IDS, NUMBERS = "symbols", "Ensembl gene ids", "NCBI or HGNC gene ids"
ACCESSIONS, PROTEINS = "UniProt accessions", "Ensembl protein or transcript ids"

OF_GENES = (SYMBOLS, GENE_IDS, NUMBERS)

MOST = 0.9
"""The share of the keys from which on they are of one kind, else they are mixed."""

HEADERS, ALIASES = "headers", "aliases"
"""Kinds of Namer, beside hgnc and fasta."""


@dataclass(frozen=True)
class Namer:
    """Something that tells which gene has a protein.

    Attributes
    ----------
    said, origin
        What it is, in a message and in the manifest.
    genes
        {id as `protein_id` has it: genes that have it, each by all of its names}.
    """

    said: str
    origin: Mapping[str, Any]
    genes: Mapping[str, Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Key:
    """A key of a table.

    Attributes
    ----------
    text
        As it stands there.
    protein
        Its `protein_id`.
    own
        Names of the gene that it says itself, as a FASTA header does.
    """

    text: str
    protein: str | None
    own: Sequence[str] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """Under what a Namer may know it: as it stands, or by its protein."""
        return (self.text, self.protein) if self.protein else (self.text,)

    @property
    def kind(self) -> str:
        """What it is by its form."""
        if self.protein:
            return PROTEINS if self.protein.startswith("ENS") else ACCESSIONS
        name = canonical(self.own[0] if self.own else self.text)
        if re.fullmatch(r"ENS[A-Z]*G\d{11}", name):
            return GENE_IDS
        return NUMBERS if re.fullmatch(r"(HGNC|NCBI):\d+", name) else SYMBOLS


@dataclass(frozen=True)
class NamedKeys:
    """The genes of a table.

    Attributes
    ----------
    kind
        Of the keys, as the manifest has it.
    genes
        {gene, or another name of one, that is no key: keys whose mean is its vector}.
    symbols
        Every gene, by its first name, in the order of the table; empty: every key is one.
    named
        How many keys have been told their gene: '540 of 542 keys'.
    named_by
        What told the genes.
    several
        Genes whose vector is a mean of several proteins.
    by_key
        Genes that are keys themselves, and have proteins among the keys too: these are not used.
    shared
        Keys that are a protein of several genes.
    unnamed
        Ids of proteins of which nothing tells the gene.
    """

    kind: str = SYMBOLS
    genes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    symbols: Sequence[str] = ()
    named: str = ""
    named_by: Sequence[Namer] = ()
    several: Mapping[str, Sequence[str]] = field(default_factory=dict)
    by_key: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shared: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unnamed: Sequence[str] = ()

    def record(self) -> dict[str, Any]:
        """What the manifest says of them."""
        if not self.named_by:
            return {"keys": self.kind}
        counts = {
            **{"several_proteins": len(self.several), "by_their_own_key": len(self.by_key)},
            **{"several_genes": len(self.shared), "unnamed": len(self.unnamed)},
        }
        named_by: list[Mapping[str, Any]] = []
        for namer in self.named_by:
            named_by += [namer.origin] if namer.origin not in named_by else []
        return {"keys": self.kind, "named_by": named_by, "named": counts}

    def said(self) -> list[str]:
        """What a person may want to know of it, a sentence each."""
        said = []
        by = dict.fromkeys(n.said for n in self.named_by if n.origin["kind"] != HEADERS)
        if by:
            said.append(f"{self.named} ({self.kind}) have their gene from {' and '.join(by)}")
        if self.several:
            said.append(
                f"{count(len(self.several), 'gene')} {have(len(self.several))} several proteins "
                f"({listed(self.several)}): the mean of their vectors is taken"
            )
        if self.by_key:
            n = len(self.by_key)
            said.append(
                f"{count(n, 'gene')} {have(n)} a key and proteins too ({listed(self.by_key)}): the "
                "vector of the key is taken"
            )
        if self.shared:
            n = len(self.shared)
            said.append(
                f"{count(n, 'protein')} {'is' if n == 1 else 'are'} of several genes "
                f"({listed(self.shared)}), each of which gets the vector"
            )
        if self.unnamed and by:
            n = len(self.unnamed)
            said.append(
                f"{count(n, 'protein')} {have(n)} no gene there ({some(self.unnamed)}): found by "
                "the id only"
            )
        return said


def listed(names: Mapping[str, Sequence[str]]) -> str:
    """'CDKN2A: P42771 and Q8N726; ...' of the first three."""
    first = [f"{name}: {' and '.join(ids_of(of)[:3])}" for name, of in list(names.items())[:3]]
    return "; ".join(first) + ("; ..." if len(names) > 3 else "")


def ids_of(keys: Sequence[str]) -> list[str]:
    """Keys as they are shown: of a header the first word."""
    return [key.split()[0] for key in keys]


def read_keys(path: Path, content: Content) -> list[Key]:
    """The keys of the vectors; each protein and each name stands once.

    Raises
    ------
    InputError
        A key is no text, or one is there twice.
    """
    wrong = [name for name in content.names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise InputError(
            f"{path}: {len(wrong):,} of {len(content.names):,} keys are no names of genes "
            f"({some(map(repr, wrong))}); name each gene by a text"
        )
    keys = [key_of(str(name), content.headers) for name in content.names]
    counted = Counter(one_protein(key.text) for key in keys)
    repeated = [gene for gene, n in counted.items() if n > 1]
    if repeated:
        raise InputError(
            f"{path}: {count(len(repeated), 'gene')} more than once ({some(repeated)}); keep one "
            "vector of each"
        )
    return keys


def key_of(text: str, header: bool = False) -> Key:
    """A key; one that is a header of a FASTA record, or a whole line of one, may name its gene."""
    own = genes_in_header(text) if header or " " in text else []
    return Key(text, protein_id(text), () if own == [text] else own)


def kind_of(keys: Sequence[Key]) -> str:
    """The kind of MOST of the keys; 'mixed: 4 symbols, 2 UniProt accessions' if there is none."""
    kinds = Counter(key.kind for key in keys).most_common()
    kind, n = kinds[0]
    if n >= MOST * len(keys):
        return kind
    return f"mixed: {', '.join(f'{n:,} {kind}' for kind, n in kinds)}"


def name_keys(keys: Sequence[Key], namers: Sequence[Namer]) -> NamedKeys:
    """The genes of keys.

    The key's own words are asked first, then the namers in their order: the first that knows a
    protein gives its genes, the others give further names of them. A name that is a key stays what
    it is.
    """
    kind = kind_of(keys)
    if kind in OF_GENES:  # an alias OLD=H2AC11 names no accession there
        namers = [namer for namer in namers if namer.origin["kind"] != ALIASES]
    namers = [own_words(keys), *namers]
    asked: set[int] = set()
    genes_of: dict[str, list[str]] = {}
    first: dict[str, list[str]] = {}
    further: dict[str, list[str]] = {}
    for key in keys:
        told = {i: n.genes[x] for i, n in enumerate(namers) for x in key.asked if x in n.genes}
        asked |= {*told}
        if told:
            genes_of[key.text] = list(dict.fromkeys(names[0] for names in told[min(told)]))
        names_of = [name for genes in told.values() for names in genes for name in names]
        for name in dict.fromkeys([*names_of, *key.asked[1:]]):
            group = first if name in genes_of.get(key.text, ()) else further
            group.setdefault(name, []).append(key.text)
    texts = {key.text for key in keys}
    # sorted, so that the last bit of a mean does not depend on the form of the table
    genes = {name: sorted(of) for name, of in (further | first).items() if name not in texts}
    return NamedKeys(
        kind,
        genes,
        symbols=symbols_of(keys, genes_of, kind),
        named=f"{len(genes_of):,} of {count(len(keys), 'key')}",
        named_by=[namers[i] for i in sorted(asked)],
        several={name: genes[name] for name, of in first.items() if name in genes and len(of) > 1},
        by_key={name: of for name, of in first.items() if name in texts},
        shared={text: of for text, of in genes_of.items() if len(of) > 1},
        unnamed=[key.text for key in keys if key.protein and key.text not in genes_of],
    )


def own_words(keys: Sequence[Key]) -> Namer:
    """What keys that are headers say of their own gene."""
    return Namer("headers", {"kind": HEADERS}, {key.text: [key.own] for key in keys if key.own})


def symbols_of(keys: Sequence[Key], genes_of: Mapping[str, Sequence[str]], kind: str) -> list[str]:
    """The genes in the order of the table. In a table of proteins, what nothing names is none."""
    only_named = kind in (ACCESSIONS, PROTEINS) and bool(genes_of)
    symbols: dict[str, None] = {}
    for key in keys:
        alone = () if only_named and key.protein else (key.text,)
        symbols.update(dict.fromkeys(genes_of.get(key.text, alone)))
    return list(symbols)
