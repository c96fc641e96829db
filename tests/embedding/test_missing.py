"""What the error of missing labels says, on tables that are no more than names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from state_esm_features.console import InputError, Notes
from state_esm_features.embedding.labels import Labels
from state_esm_features.embedding.missing import check_missing
from state_esm_features.embedding.resolve import Resolver
from state_esm_features.embedding.tables import Table
from state_esm_features.embedding.vectors import Resolved
from state_esm_features.option_groups import FeatureOptions, PolicyOptions, SymbolOptions

CONTROL = "non-targeting"
KEYS = ("STAT1", "TP53", "KLF1", "HLA-A", "TAFAZZIN", "WWTR1")


def said(
    *names: str,
    policy: str = "error",
    column: str | None = None,
    for_run: bool = False,
    can_report: bool = False,
) -> str:
    """The error, or the warning, of these labels; nothing if each has a gene.

    Parameters
    ----------
    column
        The obs column of the data file that has the labels; without one they are of a list.
    """
    labels = Labels(control=CONTROL, for_run=for_run)
    labels.add([*names, CONTROL], path="d.h5ad" if column else "g.txt", kind="data")
    if column:
        labels.columns["d.h5ad"], labels.in_no_cell["d.h5ad"] = column, ()
    table = Table(Path("t.pt"), dict.fromkeys(KEYS, torch.ones(1)), 1)
    notes = Notes()
    resolver = Resolver([table], CONTROL, SymbolOptions(), notes)
    resolutions = [resolver.label(name) for name in labels.names]
    options = FeatureOptions(policy=PolicyOptions(missing=policy))
    try:
        check_missing(Resolved(labels, options, resolver, resolutions, []), can_report)
    except InputError as error:
        assert policy == "error"
        return str(error)
    return "".join(text for _, text in notes.noted)


ADD = (
    "Add a table that has them with --esm-embeddings, or their proteins with --fasta, rename with "
    "--alias OLD=NEW, "
)
ACCEPT = "or accept with --missing mean"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("STAT1", "TP53"), ""),
        (
            ("STAT1", "XYZQ"),
            f"1 of 2 labels has no embedding (XYZQ): 'XYZQ' is in no table. {ADD}{ACCEPT}",
        ),
        (
            ("XYZQ1", "XYZQ2", "nan", "TP53"),
            "3 of 4 labels have no embedding (XYZQ1, XYZQ2, nan): 1 no value, 2 not found. "
            f"{ADD}{ACCEPT}",
        ),
        (
            ("sgSTAT1_1", "sgTP53_2", "sgKLF1_1"),
            "3 of 3 labels have no embedding (sgSTAT1_1, sgTP53_2, sgKLF1_1). 3 of them resolve "
            "with --label-regex 'sg(?P<gene>.+?)([_-](sg|g|guide)?[0-9]+)?' (sgSTAT1_1 is STAT1)",
        ),
        (
            ("STAT1_KLF1", "TP53_STAT1"),
            "2 of 2 labels have no embedding (STAT1_KLF1, TP53_STAT1). 2 of them resolve with "
            "--separator _ (STAT1_KLF1 is STAT1 and KLF1)",
        ),
        (
            ("TAZ", "STAT1"),
            "1 of 2 labels has no embedding (TAZ): 'TAZ' is ambiguous: TAFAZZIN (previous symbol) "
            "or WWTR1 (alias symbol)\n  - Choose: --alias TAZ=TAFAZZIN or --alias TAZ=WWTR1\n"
            f"  - {ADD}{ACCEPT}",
        ),
        (
            ("STAT1_1", "KLF1_2", "XYZQ", "NTC-1", "NTC-2"),
            "5 of 5 labels have no embedding (STAT1_1, KLF1_2, XYZQ, NTC-1, NTC-2): 2 named like "
            "a control, 3 not found\n"
            "  - NTC-1, NTC-2: controls. Give their cells the label non-targeting\n"
            "  - 2 of them resolve with --label-regex '(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+' "
            "(STAT1_1 is STAT1)\n"
            f"  - For XYZQ: {ADD}{ACCEPT}",
        ),
    ],
)
def test_what_helps_is_said(names: tuple[str, ...], message: str) -> None:
    assert said(*names) == message


def test_controls_are_relabelled_by_a_line_that_was_tried() -> None:
    assert said("NTC-1", "NTC-2", "STAT1", column="gene") == (
        "2 of 3 labels have no embedding (NTC-1, NTC-2). NTC-1, NTC-2: controls. "
        "Give their cells the label non-targeting: adata.obs['gene'] = "
        r"adata.obs['gene'].str.replace(r'^NTC-\d+$', 'non-targeting', regex=True)"
        ".astype('category')"
    )


def test_advice_is_what_works_here() -> None:
    """A run takes no other table; one command has a report, the other has not."""
    assert said("XYZQ", "STAT1", for_run=True).endswith(
        "Add their proteins with --fasta, rename with --alias OLD=NEW, or accept with "
        "--missing mean"
    )
    assert said("XYZQ", "STAT1", can_report=True).endswith(
        f"{ADD}see all with --report FILE.tsv --dry-run, {ACCEPT}"
    )


@pytest.mark.parametrize(
    ("policy", "filled"),
    [("mean", "the mean vector"), ("zero", "zeros, as if they were control")],
)
def test_what_is_accepted_is_said(policy: str, filled: str) -> None:
    assert said("XYZQ", "STAT1+XYZR", "TP53", policy=policy) == (
        "warning: 2 of 3 labels missing, or a part of them (XYZQ, STAT1+XYZR): filled with "
        f"{filled}"
    )
