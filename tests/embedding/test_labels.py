"""What is said of the names in [fewshot] that no file has, on lists of names."""

from __future__ import annotations

import pytest

from state_esm_features.embedding.labels import guides_of, names_of_no_file

LABELS = ("STAT1_g1", "STAT1_g2", "sgMYC-1", "HLA-A", "KLF1")
GUIDES = "Labels of their guides are there. Name these as they stand in the data: for STAT1 write "


@pytest.mark.parametrize(
    ("names", "said", "remedy"),
    [
        (["KLF2"], "1 label that no file has (KLF2 (did you mean KLF1?))", "it. Remove it"),
        (
            ["STAT1", "MYC", "ZZZ"],
            "3 labels that no file has (STAT1, MYC, ZZZ)",
            f'them. {GUIDES}"STAT1_g1", "STAT1_g2". Remove the others',
        ),
        (
            ["STAT1", "MYC"],
            "2 labels that no file has (STAT1, MYC)",
            f'them. {GUIDES}"STAT1_g1", "STAT1_g2"',
        ),
    ],
)
def test_names_in_fewshot_that_no_file_has_are_one_warning(
    names: list[str], said: str, remedy: str
) -> None:
    assert names_of_no_file(names, LABELS) == (
        f"[fewshot] names {said}: cell-load holds nothing out for {remedy}"
    )


def test_guides_of_a_gene_are_known_by_their_form() -> None:
    labels = ["STAT1", "stat1", "STAT1_g2", "STAT1-1", "sgSTAT1", "STAT1_KO", "STAT12", "STAT1-AS"]
    assert guides_of("STAT1", labels) == ["STAT1-1", "STAT1_KO", "STAT1_g2", "sgSTAT1"]
    assert guides_of("HLA", LABELS) == []
