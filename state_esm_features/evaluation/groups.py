"""Which perturbations of the test are unseen, and what to do where none is.

A label that no training cell has is not unseen if one that trains has its vector
(`features_check.same_vector_in_training`) or one of its genes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from state_esm_features.console import InputError, count
from state_esm_features.training.data import Data

SEEN, UNSEEN, PARTLY, NO_VECTOR = "seen", "unseen", "partly seen", "no vector"
GROUPS = (UNSEEN, SEEN, PARTLY, NO_VECTOR)

NAMED = 5
"""Labels of an advice."""


def genes_of(manifest: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """{label: the genes whose vectors make its own} of the manifest of a features file."""
    return {
        label: frozenset(
            part["gene"] for part in record.get("parts", [record]) if part.get("gene") is not None
        )
        for label, record in manifest["labels"].items()
    }


def group(
    labels: Collection[str],
    trained: Collection[str],
    genes: Mapping[str, frozenset[str]],
    known_as: Collection[str] = (),
    missing: Collection[str] = (),
) -> dict[str, str]:
    """{label: 'seen', 'unseen', 'partly seen' or 'no vector'} of the test.

    Parameters
    ----------
    trained
        Labels that some training cell has.
    known_as
        Labels whose vector one of these has.
    missing
        Labels whose vector is filled in: they tell nothing of vectors where they are unseen.

    Returns
    -------
    groups
        'partly seen' are those of which a gene trains, in a combination or as a part of one: A of
        A+B, or A+B of A. Of two labels of one gene alone, both are seen.
    """
    trained_genes = frozenset[str]().union(*(genes.get(x, frozenset()) for x in trained))
    alone = frozenset[str]().union(
        *(genes[x] for x in trained if len(genes.get(x, frozenset())) == 1)
    )
    groups = {}
    for label in labels:
        own = genes.get(label, frozenset())
        if label in trained or label in known_as or (len(own) == 1 and own <= alone):
            groups[label] = SEEN
        elif label in missing or not own:
            groups[label] = NO_VECTOR
        else:
            groups[label] = PARTLY if own & trained_genes else UNSEEN
    return groups


def require_unseen(data: Data, groups: Mapping[str, str], toml: object) -> None:
    """Refuse a test without an unseen perturbation.

    Raises
    ------
    InputError
        With the lines of a TOML that hold some out.
    """
    if UNSEEN in groups.values():
        return
    if not groups:
        what = "no perturbation out for the test"
    else:
        n = count(len(groups), "perturbation")
        what = f"no unseen perturbation out: of each of {n} of the test training sees a gene"
        if NO_VECTOR in groups.values():
            what += ", or it has no vector of its own"
    lines = "".join(f"\n  {line}" for line in lines_to_hold_out(data))
    raise InputError(
        f"{toml} holds {what}. Whether vectors help is seen on genes that no training cell has. "
        "Hold some out of every cell type that trains (a fifth of them, at least ten), with every "
        f"combination that has one:{lines}"
    )


def lines_to_hold_out(data: Data) -> list[str]:
    """Sections of a TOML for the cell types that train, with labels from the data."""
    trains = {
        f"{f.dataset}.{cell_type}": splits["train"]
        for f, cell_type, splits in data.cell_types_read()
        if splits["train"]
    }
    combined = {gene for x in data.splits["train"] if "+" in x for gene in (x, *x.split("+"))}
    every = [x for x in data.splits["train"] if x not in combined] or [*data.splits["train"]]
    named = sorted(every, key=lambda x: (-sum(x in labels for labels in trains.values()), x))
    lines = []
    for key, labels in trains.items():
        listed = [x for x in named[: max(1, min(NAMED, len(named) // 5))] if x in labels]
        held = data.experiment.fewshot.get(key, {}).get("test", [])
        test = json.dumps(list(dict.fromkeys([*held, *listed])), ensure_ascii=False)
        lines += [f"[fewshot.{json.dumps(key, ensure_ascii=False)}]", f"test = {test}"]
    return lines
