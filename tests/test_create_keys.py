"""Tables keyed by accessions of proteins, through the command: what names the genes, what is said.

How keys become genes is tested in tests/embedding/test_table_keys.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Result
from fasta_records import ENSEMBL, UNIPROT
from table_writers import of_torch

from state_esm_features.files import sha256_of

Create = Callable[..., Result]

TABLE = {
    "P42224": np.array([1.0, 2.0, 4.0], np.float32),
    "P42224-2": np.array([3.0, 2.0, 1.0], np.float32),
    "P04637": np.array([0.5, 7.0, 0.25], np.float32),
    "P62805": np.array([9.0, -1.0, 3.0], np.float32),
    "Q00000": np.array([5.0, 5.0, 6.0], np.float32),
}
FASTA = (
    f">{UNIPROT}\nMSQW\n>sp|P42224-2|STAT1_HUMAN Isoform Beta GN=STAT1\nMSQ\n"
    ">P04637|P53_HUMAN|Cellular tumor antigen p53|GN=TP53|OS=Homo sapiens\nMEEP\n"
    ">sp|P62805|H4_HUMAN Histone H4 OS=Homo sapiens OX=9606 GN=H4C1 PE=1 SV=2\nMSGR\n"
)
HGNC = (
    "hgnc_id\tsymbol\tlocus_group\talias_symbol\tprev_symbol\tentrez_id\tensembl_gene_id"
    "\tuniprot_ids\n"
    "HGNC:11362\tSTAT1\tprotein-coding gene\t\t\t\t\tP42224\n"
    "HGNC:11998\tTP53\tprotein-coding gene\t\t\t\t\tP04637\n"
    "HGNC:4781\tH4C1\tprotein-coding gene\t\t\t\t\tP62805\n"
    "HGNC:4782\tH4C2\tprotein-coding gene\t\t\t\t\tP62805\n"
)
RUN = ("--gene-list", "g.txt", "--esm-embeddings", "per-protein.h5", "--output", "o.pt")
BY_FASTA, BY_HGNC = ("--fasta", "p.fasta"), ("--hgnc", "hgnc.txt")
STAT1, TP53, H4 = [2.0, 2.0, 2.5], [0.5, 7.0, 0.25], [9.0, -1.0, 3.0]
ADVICE = (
    "Add a table that has them with --esm-embeddings, or their proteins with --fasta, rename with "
    "--alias OLD=NEW, see all with --report FILE.tsv --dry-run, or accept with --missing mean\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with UniProt's per-protein file, what may name its genes, and no weights of ESM2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "weights"))
    with h5py.File("per-protein.h5", "w") as file:
        for accession, vector in TABLE.items():
            file[accession] = vector
    Path("p.fasta").write_text(FASTA)
    Path("hgnc.txt").write_text(HGNC)
    Path("aliases.tsv").write_text("P42224\tSTAT1\nP04637\tTP53\nP62805\tH4C1\n")
    Path("labels.tsv").write_text("STAT1 P42224\nSTAT1 P42224-2\nTP53 P04637\nH4C1 P62805\n")
    Path("g.txt").write_text("STAT1\nTP53\nH4C1\n")


def manifest(path: str = "o.pt") -> dict[str, Any]:
    return json.loads(Path(f"{path}.json").read_text())


def features() -> dict[str, list[float]]:
    return {k: v.tolist() for k, v in torch.load("o.pt", weights_only=True).items()}


def test_a_fasta_file_beside_a_table_names_its_genes_and_nothing_is_computed(
    create: Create,
) -> None:
    """ESM2 has no model of this width: it would be refused."""
    assert create(*RUN, *BY_FASTA) == Result(
        0,
        "o.pt\n",
        "per-protein.h5: 4 of 5 keys (UniProt accessions) have their gene from p.fasta\n"
        "per-protein.h5: 1 gene has several proteins (STAT1: P42224 and P42224-2): the mean of "
        "their vectors is taken\n"
        "per-protein.h5: 1 protein has no gene there (Q00000): found by the id only\n"
        "labels    4 (1 control, 3 exact)\n"
        "from      g.txt (3 labels)\n"
        "source    per-protein.h5 (3 genes x 3)\n"
        "source    p.fasta (3 genes)\n",
    )
    assert features() == {"STAT1": STAT1, "TP53": TP53, "H4C1": H4, "non-targeting": [0, 0, 0]}
    assert not Path("weights").exists()
    sha256 = {name: sha256_of(Path(name)) for name in ("per-protein.h5", "p.fasta")}
    found = manifest()
    assert found["sources"][0] == {
        "kind": "table",
        "form": "HDF5, one dataset a protein",
        "path": "per-protein.h5",
        "sha256": sha256["per-protein.h5"],
        "genes": 3,
        "keys": "UniProt accessions",
        "named_by": [
            {"kind": "fasta", "files": [{"path": "p.fasta", "sha256": sha256["p.fasta"]}]}
        ],
        "named": {
            **{"several_proteins": 1, "by_their_own_key": 0, "several_genes": 0, "unnamed": 1}
        },
    }
    assert "weights_sha256" not in found["sources"][1]
    assert found["labels"] == {
        "STAT1": {"how": "exact", "gene": "STAT1", "source": 0, "keys": ["P42224", "P42224-2"]},
        "TP53": {"how": "exact", "gene": "TP53", "source": 0, "keys": ["P04637"]},
        "H4C1": {"how": "exact", "gene": "H4C1", "source": 0, "keys": ["P62805"]},
        "non-targeting": {"how": "control"},
    }


@pytest.mark.parametrize(
    ("options", "named_by"),
    [
        (BY_FASTA, "fasta"),
        (BY_HGNC, "hgnc"),
        (("--aliases", "aliases.tsv"), "aliases"),
        (("--aliases", "labels.tsv"), "aliases"),
        (
            ("--alias", "P42224=STAT1", "--alias", "P04637=TP53", "--alias", "P62805=H4C1"),
            "aliases",
        ),
    ],
)
def test_each_thing_that_names_genes_gives_the_same_features(
    create: Create, options: tuple[str, ...], named_by: str
) -> None:
    assert create(*RUN, *options, "--quiet") == Result(0, "o.pt\n", "")
    assert features() == {"STAT1": STAT1, "TP53": TP53, "H4C1": H4, "non-targeting": [0, 0, 0]}
    [namer] = manifest()["sources"][0]["named_by"]
    assert namer["kind"] == named_by
    for file in [namer] if "path" in namer else namer.get("files", []):
        assert file["sha256"] == sha256_of(Path(file["path"]))
    assert namer.get("pairs", []) == [text for text in options if "=" in text]


def test_a_label_may_be_looked_up_as_an_accession(create: Create) -> None:
    assert create(*RUN, "--alias", "STAT1=P42224-2", *BY_HGNC, "--quiet").code == 0
    assert features()["STAT1"] == TABLE["P42224-2"].tolist()
    assert manifest()["labels"]["STAT1"] == {"how": "alias", "gene": "P42224-2", "source": 0}
    Path("g.txt").write_text("P42224\nsp53\n")
    assert create(*RUN, "--alias", "sp53=P04637", "--quiet").code == 0
    assert features()["P42224"] == TABLE["P42224"].tolist() and features()["sp53"] == TP53


def test_a_protein_of_several_genes_is_the_vector_of_each_and_that_is_said(create: Create) -> None:
    Path("g.txt").write_text("H4C1\nH4C2\n")
    done = create(*RUN, *BY_HGNC)
    assert (
        "per-protein.h5: 1 protein is of several genes (P62805: H4C1 and H4C2), each of which gets "
        "the vector\n" in done.err
    )
    assert "warning: State cannot tell labels with the same vector apart: H4C1 = H4C2\n" in done.err
    assert features()["H4C1"] == features()["H4C2"] == H4
    assert manifest()["identical"] == [["H4C1", "H4C2"]]


def test_names_of_genes_lead_to_proteins_as_to_any_key(create: Create) -> None:
    """An old symbol, an id and other case, in the words of the genes that the keys are."""
    Path("p.fasta").write_text(FASTA + ">sp|Q00000|SYAC_HUMAN x GN=AARS1 PE=1\nMDS\n")
    Path("g.txt").write_text("AARS\nENSG00000115415\ntp53\nSTAT1+TP53\nP42224\n")
    assert create(*RUN, *BY_FASTA, "--report", "r.tsv", "--quiet").code == 0
    found = features()
    assert found["AARS"] == TABLE["Q00000"].tolist() and found["ENSG00000115415"] == STAT1
    assert found["tp53"] == TP53 and found["STAT1+TP53"] == [2.5, 9.0, 2.75]
    report = pd.read_csv("r.tsv", sep="\t", index_col="label", dtype=str).fillna("")
    assert report.loc["STAT1+TP53", ["how", "genes", "proteins"]].tolist() == [
        *("combination", "STAT1+TP53", "3")
    ]
    assert report.loc["P42224", ["how", "genes", "proteins"]].tolist() == ["exact", "P42224", ""]


def test_every_gene_is_one_that_has_a_name(create: Create) -> None:
    every = ("--all-genes", "--esm-embeddings", "per-protein.h5", "--output", "o.pt", "--quiet")
    assert create(*every, *BY_HGNC).code == 0
    assert list(features()) == ["TP53", "STAT1", "H4C1", "H4C2", "non-targeting"]
    assert create(*every).code == 0
    assert list(features()) == [*sorted(TABLE), "non-targeting"]


def test_picture_and_nearest_genes_are_those_of_a_table_of_symbols(create: Create) -> None:
    torch.manual_seed(0)
    table = {f"GENE{i}": torch.randn(4) for i in range(30)}
    Path("g.txt").write_text("\n".join(list(table)[:12]))
    run = ("--gene-list", "g.txt", "--esm-embeddings", "t.pt", "--plot", "map.png")
    torch.save(table, "t.pt")
    assert create(*run, "--output", "a.pt", "--report", "r.tsv").code == 0
    picture, report = Path("map.png").read_bytes(), pd.read_csv("r.tsv", sep="\t")
    accessions = {gene: f"P{i:05d}" for i, gene in enumerate(table)}
    torch.save({accessions[gene]: vector for gene, vector in table.items()}, "t.pt")
    Path("a.tsv").write_text("".join(f"{x} {gene}\n" for gene, x in accessions.items()))
    named = ("--aliases", "a.tsv", "--report", "again.tsv")
    assert create(*run, *named, "--output", "b.pt").code == 0
    assert Path("a.pt").read_bytes() == Path("b.pt").read_bytes()
    assert Path("map.png").read_bytes() == picture
    again = pd.read_csv("again.tsv", sep="\t")
    assert again.drop(columns="proteins").equals(report.drop(columns="proteins"))
    assert again["proteins"].dropna().tolist() == [1.0] * 12


@pytest.mark.parametrize(("option", "what"), [("--aliases", "aliases"), ("--hgnc", "HGNC")])
def test_what_would_name_the_keys_and_is_not_there_is_an_error(
    create: Create, option: str, what: str
) -> None:
    done = create(*RUN, option, "absent.txt")
    assert done == Result(
        1, "", f"error: no such {what} file: absent.txt (looked in {Path.cwd()})\n"
    )


KEYS = "of 5 keys of per-protein.h5 (UniProt accessions: "
GIVE = (
    "Give HGNC's file with --hgnc (its column uniprot_ids), the FASTA file of these proteins with "
    "--fasta (GN= beside the accession in its headers), or two columns, protein and gene, with "
    "--aliases"
)


def test_without_a_name_for_its_keys_the_error_says_what_names_them(create: Create) -> None:
    assert create(*RUN) == Result(
        1,
        "",
        "error: 3 of 3 labels have no embedding (STAT1, TP53, H4C1)\n"
        f"  - Nothing given tells the gene of 5 {KEYS}P04637, P42224, P42224-2, ...). {GIVE}\n"
        f"  - {ADVICE}",
    )
    Path("g.txt").write_text("STAT1\nLRMDA\n")
    assert create(*RUN, *BY_HGNC, "--quiet") == Result(
        1,
        "",
        "error: 1 of 2 labels has no embedding (LRMDA): 'LRMDA' is in no table, though a human "
        f"gene\n  - Nothing given tells the gene of 1 {KEYS}Q00000). {GIVE}\n  - {ADVICE}",
    )
    assert create(*RUN, "--missing", "mean", "--quiet").err.endswith(
        "error: none of the 2 labels is in a source: other species or naming? labels: STAT1, "
        "LRMDA, non-targeting; per-protein.h5: P04637, P42224, P42224-2, P62805, Q00000. Nothing "
        f"given tells the gene of 5 {KEYS}P04637, P42224, P42224-2, ...). {GIVE}\n"
    )


def test_proteins_of_ensembl_are_named_by_a_fasta_file(create: Create) -> None:
    of_torch(
        Path("t.pt"), {"ENSP00000354394.3": TABLE["P42224"], "ENST00000269305": TABLE["P04637"]}
    )
    run = ("--gene-list", "g.txt", "--esm-embeddings", "t.pt", "--output", "o.pt", "--quiet")
    Path("g.txt").write_text("STAT1\nTP53\n")
    assert create(*run) == Result(
        1,
        "",
        "error: 2 of 2 labels have no embedding (STAT1, TP53)\n"
        "  - Nothing given tells the gene of 2 of 2 keys of t.pt (Ensembl protein or transcript "
        "ids: ENSP00000354394.3, ENST00000269305). Give the FASTA file of these proteins with "
        "--fasta (gene: or gene_symbol: beside the id in its headers), or two columns, protein and "
        f"gene, with --aliases\n  - {ADVICE}",
    )
    p53 = (
        "ENSP00000269305.4 pep chromosome:GRCh38:17:7668421:7687490:-1 gene:ENSG00000141510.19 "
        "transcript:ENST00000269305.9 gene_biotype:protein_coding gene_symbol:TP53 description:x"
    )
    Path("pep.fa").write_text(f">{ENSEMBL.format('.21')}\nMSQW\n>{p53}\nMEEP\n")
    assert create(*run, "--fasta", "pep.fa").code == 0
    assert features()["STAT1"] == TABLE["P42224"].tolist() and features()["TP53"] == TP53
    assert manifest()["sources"][0]["keys"] == "Ensembl protein or transcript ids"


def test_a_table_of_symbols_is_told_nothing_of_accessions(create: Create) -> None:
    """Though three of these symbols, and a name unknown, have the form of an accession."""
    keys = ("B3GNT2", "H2AC11", "P2RY12", "Q9Z0Z9", *(f"GENE{i}" for i in range(40)))
    of_torch(Path("t.pt"), dict.fromkeys(keys, TABLE["P42224"]))
    Path("g.txt").write_text("B3GNT2\nXYZQ\n")
    run = ("--gene-list", "g.txt", "--esm-embeddings", "t.pt", "--output", "o.pt", "--quiet")
    done = create(*run)
    assert done.err == (
        f"error: 1 of 2 labels has no embedding (XYZQ): 'XYZQ' is in no table. {ADVICE}"
    )
    assert create(*run, "--missing", "zero", *BY_HGNC).code == 0
    assert manifest()["labels"]["B3GNT2"] == {"how": "exact", "gene": "B3GNT2", "source": 0}
    assert manifest()["sources"][0]["keys"] == "symbols"


def test_a_gene_that_only_the_fasta_file_has_would_be_computed(create: Create) -> None:
    Path("p.fasta").write_text(FASTA + ">sp|P01106|MYC_HUMAN x GN=MYC PE=1\nMDF\n")
    Path("g.txt").write_text("STAT1\nMYC\n")
    assert create(*RUN, *BY_FASTA, "--quiet") == Result(
        1,
        "",
        "error: 1 gene not in per-protein.h5 (MYC) would be computed with esm2_t33_650M_UR50D, "
        "which gives 1,280 values a gene; the table has 3. Choose an --esm-model of that width, "
        "or, if --fasta is to name the keys only, take their records out of it\n",
    )
    assert not Path("weights").exists()


def test_genes_that_would_be_computed_are_named_before_weights_are_looked_for(
    create: Create,
) -> None:
    Path("p.fasta").write_text(FASTA + ">sp|P01106|MYC_HUMAN x GN=MYC PE=1\nMDF\n")
    Path("g.txt").write_text("STAT1\nMYC\n")
    torch.save({"P42224": torch.randn(1280)}, "wide.pt")
    wide = ("--gene-list", "g.txt", "--esm-embeddings", "wide.pt", "--output", "o.pt")
    done = create(*wide, *BY_FASTA, "--dry-run")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    warned = (
        "warning: 1 gene in no table, to compute with esm2_t33_650M_UR50D from --fasta: MYC. If "
        "--fasta is only to name the keys of the table, take the records of these genes out of it, "
        "or name the keys with --aliases or --hgnc"
    )
    assert lines[-1] == "dry run: 1 gene to compute (MYC), nothing written"
    assert lines.index(warned) < next(i for i, x in enumerate(lines) if "would download" in x)


def test_isoforms_of_a_table_are_averaged_whatever_is_said_of_those_computed(
    create: Create,
) -> None:
    assert create(*RUN, *BY_FASTA, "--isoforms", "longest", "--quiet").err == (
        "warning: --isoforms longest is for vectors that are computed: of 1 gene with several "
        "proteins in a table the mean is taken\n"
    )
    assert features()["STAT1"] == STAT1


def test_the_features_table_of_a_toml_names_them_too(project: Path, create: Create) -> None:
    table = torch.load("table.pt", weights_only=True)
    accessions = {gene: f"P{i:05d}" for i, gene in enumerate(table)}
    torch.save({accessions[gene]: vector for gene, vector in table.items()}, "proteins.pt")
    Path("p.fasta").write_text(
        "".join(f">sp|{x}|X GN={g} PE=1\nMKT\n" for g, x in accessions.items())
    )
    config = Path("config.toml").read_text()
    Path("config.toml").write_text(
        f'{config}[features]\nesm-embeddings = "proteins.pt"\nfasta = "p.fasta"\n'
    )
    assert create("--from-toml", "config.toml", "--output", "a.pt", "--quiet").code == 0
    old = ("--from-toml", "config.toml", "--esm-embeddings", "table.pt", "--output", "b.pt")
    assert create(*old, "--quiet").code == 0
    assert Path("a.pt").read_bytes() == Path("b.pt").read_bytes()
