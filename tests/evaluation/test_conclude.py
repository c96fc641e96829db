"""The three sentences follow the figures, and never say 'better' of an interval that holds zero."""

from __future__ import annotations

import pytest

from state_esm_features.evaluation.conclude import Comparison, Evidence, conclude
from state_esm_features.evaluation.intervals import Interval

NAN = float("nan")


def comparison(low: float, high: float, n: int = 12, seeds: int = 3) -> Comparison:
    mean = (low + high) / 2
    own = Interval(0.1 + mean, 0.05 + mean, 0.15 + mean, n, seeds)
    return Comparison(own, 0.1, Interval(mean, low, high, n, seeds))


SEEN = comparison(0.6, 0.7)
NOT_SEEN = comparison(-0.05, 0.09)
BASELINES = {"perturb_mean": 0.02, "context_mean": 0.15}

CAN = (
    "This screen can show it: where the response was made of the vectors, as strong as this "
    "screen's real effects, own vectors predict unseen perturbations better than shuffled ones, by "
    "a correlation of 0.65 (95 % interval 0.60 to 0.70)."
)
CANNOT = (
    "The positive control cannot be seen: even where the response was made of the vectors, as "
    "strong as this screen's real effects, own vectors gain a correlation of 0.02 (95 % interval "
    "-0.05 to 0.09) over shuffled ones on unseen perturbations. No result on the real cells says "
    "anything."
)
OF = "(of 12 unseen perturbations, 3 seeds), a difference of"
MEANS = "the correlation of predicted with true effects is"


@pytest.mark.parametrize(
    ("evidence", "sentences"),
    [
        (
            Evidence(comparison(0.2, 0.4), {1.0: SEEN}, 0.1, BASELINES),
            [
                CAN,
                "On the real cells own vectors do better than shuffled ones: "
                f"{MEANS} 0.40 with own and 0.10 with shuffled vectors {OF} 0.30 (95 % interval "
                "0.20 to 0.40).",
                "So the vectors tell State something about genes that it has not seen: take them "
                "where such genes are to be predicted, knowing that one split, one model and one "
                "number of steps were tried.",
            ],
        ),
        (
            Evidence(comparison(0.2, 0.4), {1.0: SEEN}, 0.1, {"context_mean": 0.5}),
            [
                CAN,
                "On the real cells own vectors do better than shuffled ones: "
                f"{MEANS} 0.40 with own and 0.10 with shuffled vectors {OF} 0.30 (95 % interval "
                "0.20 to 0.40).",
                "So the vectors tell State something about genes that it has not seen, but "
                "context_mean, which reads no vectors, has a correlation of 0.50: these vectors "
                "alone are no reason to predict unseen genes with this model.",
            ],
        ),
        (
            Evidence(comparison(-0.04, 0.1, n=9), {1.0: SEEN}, 0.1, BASELINES),
            [
                CAN,
                f"On the real cells no difference can be told: {MEANS} 0.13 with own and 0.10 with "
                "shuffled vectors (of 9 unseen perturbations, 3 seeds), a difference of 0.03 "
                "(95 % interval -0.04 to 0.10), which holds zero.",
                "So nothing here speaks for these vectors, and nothing proves them useless: a gain "
                "of more than 0.10 is unlikely, a smaller one would not be seen. Test on more "
                "perturbations, or take the vectors that are least trouble (9 perturbations: the "
                "true interval is wider than the one shown).",
            ],
        ),
        (
            Evidence(comparison(-0.4, -0.2), {1.0: SEEN}, 0.1, BASELINES),
            [
                CAN,
                "On the real cells own vectors do worse than shuffled ones: "
                f"{MEANS} -0.20 with own "
                f"and 0.10 with shuffled vectors {OF} -0.30 (95 % interval -0.40 to -0.20).",
                "So nothing speaks for these vectors here; vectors that do worse than mixed-up "
                "ones are a reason to look for mixed-up labels or too few perturbations.",
            ],
        ),
        (
            Evidence(comparison(0.2, 0.4), {1.0: NOT_SEEN}, 0.1, BASELINES),
            [
                CANNOT,
                f"For the record, on the real cells {MEANS} 0.40 with own and 0.10 with shuffled "
                f"vectors {OF} 0.30 (95 % interval 0.20 to 0.40): not to be read as a result.",
                "What to do: more unseen perturbations, cells, seeds (--seeds) or steps "
                "(--max-steps), or other settings of the model, until the positive control is "
                "seen; until then do not choose vectors by this screen.",
            ],
        ),
    ],
    ids=["positive", "positive, but a baseline is", "zero", "negative", "planted not seen"],
)
def test_sentences(evidence: Evidence, sentences: list[str]) -> None:
    assert conclude(evidence) == sentences


def test_without_a_positive_control_that_is_said_first() -> None:
    first, *_ = conclude(Evidence(comparison(0.2, 0.4)))
    assert first == (
        "There was no positive control (--planted), so nothing tells whether this screen, with "
        "this model and these steps, could show that vectors help if they did."
    )


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({0.0: NOT_SEEN}, "of no strength, own vectors gain a correlation of 0.02"),
        ({0.0: NOT_SEEN, 1.0: SEEN}, "This screen can show it: "),
        ({0.5: SEEN, 1.0: SEEN}, ", and it is seen down to a strength of 0.5."),
        ({0.5: NOT_SEEN, 2.0: SEEN}, "2 times as strong as this screen's real effects, own vec"),
        ({1.0: NOT_SEEN, 2.0: SEEN}, "unseen perturbations; it is seen at a strength of 2. No r"),
    ],
)
def test_the_strength_that_decides_is_one_or_the_nearest(
    planted: dict[float, Comparison], said: str
) -> None:
    evidence = Evidence(comparison(0.2, 0.4), planted, 0.1)
    if planted == {0.5: NOT_SEEN, 2.0: SEEN}:  # equally far: the weaker one
        said = "cannot be seen: even where the response was made of the vectors, 0.5 times as s"
    assert said in conclude(evidence)[0]


def test_effects_that_are_noise_are_said_to_be() -> None:
    first = conclude(Evidence(comparison(0.2, 0.4), {1.0: NOT_SEEN}, 0.0))[0]
    assert "the real effects cannot be told from noise: halves of their cells disagree. No" in first


@pytest.mark.parametrize("planted", [{}, {1.0: SEEN}, {1.0: NOT_SEEN}, {0.0: NOT_SEEN}])
@pytest.mark.parametrize("ends", [(-0.1, 0.2), (0.0, 0.2), (-0.2, 0.0), (NAN, NAN), (-0.3, -0.1)])
@pytest.mark.parametrize("n", [1, 12])
def test_better_is_never_said_where_the_interval_holds_zero(
    planted: dict[float, Comparison], ends: tuple[float, float], n: int
) -> None:
    real = Comparison(Interval(0.3, *ends, n, 3), 0.1, Interval(0.2, *ends, n, 3))
    first, *others = conclude(Evidence(real, planted, 0.1, BASELINES))
    assert "better" not in " ".join(others)
    assert ("better" in first) == (planted == {1.0: SEEN})


def test_one_seed_allows_no_conclusion() -> None:
    one = Comparison(Interval(0.3, NAN, NAN, 12, 1), 0.1, Interval(0.2, NAN, NAN, 12, 1))
    _, second, last = conclude(Evidence(one, {}, None, BASELINES))
    assert second.endswith("1 seed), a difference of 0.20 (no interval: 12 perturbations, 1 seed).")
    assert "an interval needs two perturbations and two seeds (--seeds)" in last
    assert conclude(Evidence(one, {1.0: one}))[0].startswith("The positive control cannot be seen")


def test_a_handful_of_perturbations_is_a_caution() -> None:
    last = conclude(Evidence(comparison(0.2, 0.4, n=9), {1.0: SEEN}, 0.1, BASELINES))[-1]
    assert last.endswith("(9 perturbations: the true interval is wider than the one shown).")


def test_a_model_that_has_learnt_nothing_is_no_positive_control() -> None:
    """Own vectors may be less wrong than shuffled ones, and predict nothing all the same."""
    hardly_trained = Comparison(
        Interval(0.01, -0.06, 0.09, 3, 2), -0.01, Interval(0.02, 0.0028, 0.04, 3, 2)
    )
    first, second, last = conclude(Evidence(comparison(0.2, 0.4), {1.0: hardly_trained}, 0.1))
    assert first == (
        "The positive control cannot be seen: even where the response was made of the vectors, as "
        "strong as this screen's real effects, own vectors gain a correlation of 0.02 (95 % "
        "interval 0.003 to 0.04) over shuffled ones on unseen perturbations, but themselves reach "
        "0.01 (95 % interval -0.06 to 0.09) only. No result on the real cells says anything."
    )
    assert second.endswith("not to be read as a result.") and "until the positive control" in last


def test_a_handful_of_perturbations_is_a_caution_of_the_positive_control_too() -> None:
    first, *_ = conclude(Evidence(comparison(0.2, 0.4), {1.0: comparison(0.6, 0.7, n=9)}, 0.1))
    assert first.endswith("0.70) (9 perturbations: the true interval is wider than the one shown).")
