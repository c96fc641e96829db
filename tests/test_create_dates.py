"""Gene symbols that a spreadsheet has turned into dates: in lists, in tables, in the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import pytest
import torch
from conftest import Result

Create = Callable[..., Result]

RUN = ("--esm-embeddings", "table.csv", "--output", "o.pt", "--quiet")
LEFT_OUT = (
    "warning: table.csv: 3 rows left out, whose keys are dates that a spreadsheet made of symbols "
    "(1-Mar, 1-Mar, 2-Sep)\n"
)
MAR = "MARCH1 (today MARCHF1) or MARC1 (today MTARC1)"


@pytest.fixture
def table(tmp_path: Path) -> None:
    """MARCHF1 is there; MTARC1 and SEPTIN2 were, before the table was saved by a spreadsheet."""
    rows = ["gene,e0,e1", "STAT1,1,2", "MARCHF1,3,4", "1-Mar,5,6", "1-Mar,5,7", "2-Sep,8,9"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")


def look_up(folder: Path, create: Create, labels: str, *options: str) -> Result:
    (folder / "g.txt").write_text("\n".join(labels.split()) + "\n")
    return create("--gene-list", "g.txt", *RUN, *options)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "o.pt.json").read_text())


def test_dates_of_a_gene_list_are_an_error_that_says_what_they_were(
    tmp_path: Path, create: Create, table: None
) -> None:
    assert look_up(tmp_path, create, "STAT1 1-Mar 2-Sep 4/10/2022") == Result(
        1,
        "",
        f"{LEFT_OUT}error: 3 of 4 labels have no embedding (1-Mar, 2-Sep, 4/10/2022). 3 labels "
        f"that a spreadsheet has turned into dates: 1-Mar, probably {MAR}; 2-Sep, probably SEPT2 "
        "(today SEPTIN2); 4/10/2022, probably OCT4 (today POU5F1 or POU5F1P3 or POU5F1P4). Which "
        "symbol it was is not guessed: write it again in g.txt, or choose: --alias "
        "1-Mar=MARCHF1\n",
    )
    assert look_up(tmp_path, create, "STAT1 1-Mar") == Result(
        1,
        "",
        f"{LEFT_OUT}error: 1 of 2 labels has no embedding (1-Mar): '1-Mar' is a date, which a "
        f"spreadsheet has made of a symbol: probably {MAR}. Which symbol it was is not guessed: "
        "write it again in g.txt, or choose: --alias 1-Mar=MARCHF1\n",
    )


@pytest.mark.parametrize("form", ["g.csv", "g.tsv"])
def test_the_first_five_of_many_dates_are_said(
    tmp_path: Path, create: Create, table: None, form: str
) -> None:
    dates = [f"{day}-Mar" for day in range(3, 10)]
    mark = {"g.csv": ",", "g.tsv": "\t"}[form]
    rows = [f"n{mark}gene", *(f"{i}{mark}{date}" for i, date in enumerate(dates))]
    (tmp_path / form).write_text("\n".join(rows) + "\n")
    listed = "; ".join(f"{day}-Mar, probably MARCH{day} (today MARCHF{day})" for day in range(3, 8))
    assert create("--gene-list", form, *RUN).err == (
        f"{LEFT_OUT}error: 7 of 7 labels have no embedding (3-Mar, 4-Mar, 5-Mar, 6-Mar, 7-Mar, "
        f"...). 7 labels that a spreadsheet has turned into dates: {listed}; .... Which symbol it "
        f"was is not guessed: write it again in {form}\n"
    )


@pytest.mark.parametrize("policy", ["mean", "zero"])
def test_no_policy_fills_in_a_date_of_a_gene_list(
    tmp_path: Path, create: Create, table: None, policy: str
) -> None:
    done = look_up(tmp_path, create, "STAT1 1-Mar NONESUCH", "--missing", policy)
    assert done == Result(
        1,
        "",
        f"{LEFT_OUT}error: 1 label that a spreadsheet has turned into dates: 1-Mar, probably "
        f"{MAR}. Which symbol it was is not guessed: write it again in g.txt, or choose: --alias "
        "1-Mar=MARCHF1\n",
    )
    assert not (tmp_path / "o.pt").exists()


def test_an_alias_says_what_a_date_was(tmp_path: Path, create: Create, table: None) -> None:
    done = look_up(tmp_path, create, "1-Mar STAT1+1-Mar", "--alias", "1-Mar=MARCHF1")
    assert done == Result(0, "o.pt\n", LEFT_OUT)
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert {k: v.tolist() for k, v in found.items()} == {
        "1-Mar": [3.0, 4.0],
        "STAT1+1-Mar": [4.0, 6.0],
        "non-targeting": [0.0, 0.0],
    }


@pytest.mark.parametrize("mark", ["-", "/", ":"])
def test_no_separator_makes_numbers_of_a_date(
    tmp_path: Path, create: Create, table: None, mark: str
) -> None:
    """1 would be the NCBI id of A1BG."""
    (tmp_path / "g.txt").write_text("1-Mar\n1/3/2023\n2023-03-01 00:00:00\n")
    done = create("--gene-list", "g.txt", *RUN, "--separator", mark)
    assert "error: 3 of 3 labels" in done.err  # and the control is no combination
    assert "3 labels that a spreadsheet has turned into dates: 1-Mar, probably" in done.err


def test_names_that_look_like_dates_are_what_the_source_says(
    tmp_path: Path, create: Create
) -> None:
    """OCT-11 is an alias of POU2F3, and 14-3-3 a key here."""
    torch.save({"POU2F3": torch.ones(1), "14-3-3": torch.zeros(1) + 2}, tmp_path / "t.pt")
    (tmp_path / "g.txt").write_text("OCT-11\nOct-11\n14-3-3\n")
    done = create("--gene-list", "g.txt", "--esm-embeddings", "t.pt", "--output", "o.pt")
    assert done.code == 0
    found = manifest(tmp_path)["labels"]
    genes = {label: record.get("gene") for label, record in found.items()}
    assert genes == {
        "OCT-11": "POU2F3",
        "Oct-11": "POU2F3",
        "14-3-3": "14-3-3",
        "non-targeting": None,
    }


def test_rows_of_dates_are_left_out_of_a_table_and_kept_in_the_manifest(
    tmp_path: Path, create: Create, table: None
) -> None:
    assert look_up(tmp_path, create, "STAT1 MARCH1") == Result(0, "o.pt\n", LEFT_OUT)
    [source] = manifest(tmp_path)["sources"]
    assert (source["genes"], source["dates_left_out"]) == (2, ["1-Mar", "1-Mar", "2-Sep"])


def test_a_label_that_may_need_such_a_row_gets_the_hint(
    tmp_path: Path, create: Create, table: None
) -> None:
    assert look_up(tmp_path, create, "STAT1 SEPTIN2").err == (
        f"{LEFT_OUT}error: 1 of 2 labels has no embedding (SEPTIN2): 'SEPTIN2' is in no table, "
        "though a human gene; it may be 2-Sep of table.csv, left out as a date. Write the symbol "
        "again in the table\n"
    )
    assert look_up(tmp_path, create, "SEPT2 MARC1 TP53").err == (
        f"{LEFT_OUT}error: 3 of 3 labels have no embedding (SEPT2, MARC1, TP53): 1 ambiguous, 2 "
        "not found\n  - SEPT2 (2-Sep of table.csv), MARC1 (1-Mar of table.csv): the table may have "
        "had it, before a spreadsheet made a date of it. Write the symbol again in the table\n"
        "  - For TP53: Add a table that has them with --esm-embeddings, or their proteins with "
        "--fasta, rename with --alias OLD=NEW, see all with --report FILE.tsv --dry-run, or accept "
        "with --missing mean\n"
    )


def test_a_table_of_dates_alone_is_refused(tmp_path: Path, create: Create) -> None:
    (tmp_path / "table.csv").write_text("gene,e0\n1-Mar,1\n2-Sep,2\n")
    assert look_up(tmp_path, create, "STAT1") == Result(
        1,
        "",
        "error: table.csv: all 2 keys are dates that a spreadsheet made of symbols (1-Mar, 2-Sep); "
        "write the symbols again\n",
    )


def test_a_date_among_the_labels_of_the_data_says_so(
    tmp_path: Path, create: Create, screen: anndata.AnnData, table: None
) -> None:
    names = {"non-targeting": "non-targeting", "SIM001": "STAT1"}
    labels = [names.get(str(label), "1-Mar") for label in screen.obs["target_gene"]]
    screen.obs["target_gene"] = pd.Categorical(labels)
    screen.write_h5ad(tmp_path / "d.h5ad")
    done = create("--adata", "d.h5ad", *RUN)
    assert done.code == 1
    assert (
        f"(1-Mar): '1-Mar' is a date, which a spreadsheet has made of a symbol: probably {MAR}. "
        "Which symbol it was is not guessed: write it again in d.h5ad, or choose: --alias "
        "1-Mar=MARCHF1\n"
    ) in done.err
    assert create("--adata", "d.h5ad", *RUN, "--missing", "mean").code == 0
    assert manifest(tmp_path)["missing"] == {
        "1-Mar": f"'1-Mar' is a date, which a spreadsheet has made of a symbol: probably {MAR}"
    }
