"""What an evaluation consists of, which perturbations are unseen, what is handed on."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from state_esm_features.evaluation import design
from state_esm_features.evaluation.groups import genes_of, group
from state_esm_features.evaluation.settings import (
    DATA,
    TRAINING,
    feature_words,
    strengths,
    training_words,
)
from state_esm_features.options import fields_of
from state_esm_features.training_options import DataOptions, TrainingOptions


def test_models_of_three_seeds_and_two_strengths() -> None:
    models = design.models(3, (0.5, 1))
    assert len(models) == len({m.name for m in models}) == 3 * 3 + 2 + 2 * 2 * 3
    assert [m.name for m in models[:9]] == [
        *("real_own_0", "real_shuffled_0", "real_onehot_0", "planted_0.5_own_0"),
        *("planted_0.5_shuffled_0", "planted_1_own_0", "planted_1_shuffled_0"),
        *("real_perturb_mean_0", "real_context_mean_0"),
    ]
    assert design.steps(models, 400) == (3 * 3 + 2 * 2 * 3) * 400
    assert design.steps(models, 400, {"real_own_0.training", "real_own_0.scores"}) == 20 * 400


def test_one_shuffle_a_seed_serves_real_and_planted_screens() -> None:
    models = design.models(2, (1,))
    used = {m.name: m.features for m in models}
    assert used["real_shuffled_1"] == used["planted_1_shuffled_1"] == "shuffled_1"
    assert used["real_own_1"] == used["planted_1_own_0"] == used["real_context_mean_0"] == "own"
    made = [p.name for p in design.parts(models) if p.kind == design.FEATURES]
    assert made == ["own", "shuffled_0", "onehot", "shuffled_1"]


def test_no_part_stands_before_one_that_it_needs() -> None:
    parts = design.parts(design.models(2, (1,)))
    done: set[str] = set()
    for part in parts:
        assert {*part.needs} <= done, part
        done.add(part.key)
    assert len(done) == len(parts) == 4 + 1 + 3 * (2 * 3 + 2 + 2 * 2)
    planted = next(p for p in parts if p.key == "planted_1_own_0.training")
    assert planted.needs == ("own.features", "planted_1.screen")


def test_a_part_is_ready_once_what_it_needs_is_done() -> None:
    parts = design.parts(design.models(1, (), ("own",)))
    assert design.ready(parts, {}) == parts[0]
    assert design.ready(parts[1:], {}) is None
    assert design.ready(parts[1:], {"own.features"}) == parts[1]


@pytest.mark.parametrize("strength", [0, 0.5, 1, 2])
def test_a_screen_is_named_by_its_strength(strength: float) -> None:
    assert design.strength_of(design.screen_name(strength)) == strength
    assert design.strength_of(design.REAL) is None


MANIFEST = {
    "labels": {
        "A_g1": {"how": "label-regex", "gene": "A"},
        "A_g2": {"how": "label-regex", "gene": "A"},
        "B": {"how": "exact", "gene": "B"},
        "C": {"how": "exact", "gene": "C"},
        "C+D": {"how": "combination", "parts": [{"gene": "C"}, {"gene": "D"}]},
        "E+F": {"how": "combination", "parts": [{"gene": "E"}, {"gene": "F"}]},
        "F": {"how": "exact", "gene": "F"},
        "X": {"how": "missing"},
        "twin of B": {"how": "exact", "gene": "B2"},
    }
}


def test_unseen_is_what_shares_no_gene_and_no_vector_with_the_training() -> None:
    genes = genes_of(MANIFEST)
    assert genes["C+D"] == {"C", "D"} and genes["X"] == set()
    test = ["A_g2", "B", "C", "C+D", "F", "X", "twin of B"]
    trained = ["A_g1", "B", "E+F", "C"]
    assert group(test, trained, genes, known_as=["twin of B"], missing=["X"]) == {
        "A_g2": "seen",  # by another guide
        "B": "seen",
        "C": "seen",
        "C+D": "partly seen",
        "F": "partly seen",
        "X": "no vector",
        "twin of B": "seen",
    }
    assert group(["C", "C+D", "A_g2"], ["B"], genes) == {
        "C": "unseen",
        "C+D": "unseen",
        "A_g2": "unseen",
    }


def test_options_that_are_handed_on_are_those_of_the_commands() -> None:
    assert {*fields_of((DATA,))} == {*fields_of((DataOptions,))} - {"pert_features"}
    assert {*fields_of((TRAINING,))} == {*fields_of((TrainingOptions,))} - {"seed"}
    typed = {
        "config": Path("my.toml"),
        "esm_embeddings": [Path("t.pt")],
        "missing": "mean",
        "pert_col": "gene",
        "max_steps": 50,
        "seeds": 2,
        "planted": (1.0,),
    }
    assert feature_words(typed) == ["--esm-embeddings=t.pt", "--missing=mean", "--pert-col=gene"]
    assert training_words(typed) == ["--pert-col=gene", "--max-steps=50"]


def test_strengths_are_numbers() -> None:
    assert strengths("2,0.5,1,1") == (0.5, 1.0, 2.0)
    for text, said in (
        ("0.5,x", "expected numbers with commas between, e.g. 0.5,1,2, got '0.5,x'"),
        ("-1", "-1 has a strength below 0"),
        ("nan", "nan has a strength below 0"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as wrong:
            strengths(text)
        assert str(wrong.value) == said
