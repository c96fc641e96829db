"""What of the cells that are held out is unseen, to a person and to State."""

from __future__ import annotations

import torch

from state_esm_features.training.features_check import same_vector_in_training
from state_esm_features.training.splits import split_table

SPLITS = {
    "train": {"STAT1_g1": 20, "KLF1": 10, "A+B": 5},
    "val": {"STAT1_g2": 7, "KLF1": 3},
    "test": {"MYC": 4, "B+A": 2, "STAT1_g2": 1},
}


def vectors() -> dict[str, torch.Tensor]:
    values = {"STAT1_g1": 1, "STAT1_g2": 1, "KLF1": 2, "MYC": 3, "A+B": 4, "B+A": 4, "other": 3}
    return {label: torch.tensor([float(v), 0.0]) for label, v in values.items()}


def test_another_guide_of_a_gene_that_trains_is_not_unseen() -> None:
    """Nor a combination the other way round; one that nobody trains on has no part in it."""
    assert same_vector_in_training(vectors(), SPLITS) == {"STAT1_g2": "STAT1_g1", "B+A": "A+B"}
    assert same_vector_in_training(vectors(), {**SPLITS, "train": {"KLF1": 10}}) == {}


def test_the_table_counts_it_as_seen() -> None:
    by_label = [" ".join(text.split()) for _, text in split_table(SPLITS)]
    assert by_label[2:] == ["10 2 1 (3 cells) 1 (7 cells)", "7 3 0 (0 cells) 3 (7 cells)"]
    known = same_vector_in_training(vectors(), SPLITS)
    by_vector = [" ".join(text.split()) for _, text in split_table(SPLITS, known)]
    assert by_vector[2:] == ["10 2 2 (10 cells) 0 (0 cells)", "7 3 2 (3 cells) 1 (4 cells)"]
