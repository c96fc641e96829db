"""What is made of vectors: shuffled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from state_esm_features.console import InputError
from state_esm_features.embedding.vectors import shuffle_vectors


@settings(max_examples=300)
@given(
    values=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
def test_shuffling_moves_every_vector_to_a_gene_that_had_another(
    values: list[int], seed: int, order: object
) -> None:
    vectors = {f"G{i}": torch.tensor([float(v), 1.0]) for i, v in enumerate(values)}
    most = max(values.count(v) for v in values)
    if 2 * most > len(values):
        with pytest.raises(InputError) as error:
            shuffle_vectors(vectors, seed)
        assert str(error.value) == (
            "--ablation shuffle needs genes with different vectors: "
            f"{most} of {len(values)} are identical, so some gene would keep its own"
        )
        return
    shuffled = shuffle_vectors(vectors, seed)
    assert set(shuffled) == set(vectors)
    assert all(shuffled[g].tolist() != vectors[g].tolist() for g in vectors)
    assert sorted(v.tolist() for v in shuffled.values()) == sorted(
        v.tolist() for v in vectors.values()
    )
    items = list(vectors.items())
    order.shuffle(items)  # type: ignore[attr-defined]
    again = shuffle_vectors(dict(items), seed)
    assert {g: v.tolist() for g, v in again.items()} == {g: v.tolist() for g, v in shuffled.items()}


def test_another_seed_shuffles_otherwise() -> None:
    vectors = {f"G{i}": torch.tensor([float(i)]) for i in range(1, 50)}
    drawn = {
        tuple(shuffle_vectors(vectors, seed)[g].item() for g in sorted(vectors))
        for seed in range(20)
    }
    assert len(drawn) == 20
