"""What the figures allow to say, in three sentences.

Pure: figures in, sentences out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from state_esm_features.console import count
from state_esm_features.evaluation.design import CONTROLLED
from state_esm_features.evaluation.groups import UNSEEN
from state_esm_features.evaluation.intervals import Interval
from state_esm_features.evaluation.summary import DIFFERENCE, interval

if TYPE_CHECKING:
    import pandas as pd

FEW = 10
"""Perturbations below which a bootstrap's interval is known to be too narrow."""


@dataclass(frozen=True)
class Comparison:
    """Correlations of predicted with true effects of unseen perturbations.

    Attributes
    ----------
    own
        With its interval: vectors that are of use predict something themselves.
    shuffled
        A mean.
    difference
        own - shuffled, paired by perturbation and seed.
    """

    own: Interval
    shuffled: float
    difference: Interval


@dataclass(frozen=True)
class Evidence:
    """What was found.

    Attributes
    ----------
    real
        On the screen itself; None if it was not compared.
    planted
        {strength: on the screen whose response was made of the vectors}.
    effect
        RMS of the real effects less their noise, as planted at strength 1; None if not measured.
    baselines
        {method: mean} of what reads no vectors, on the screen itself.
    """

    real: Comparison | None
    planted: Mapping[float, Comparison] = field(default_factory=dict)
    effect: float | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)


def comparison(figures: pd.DataFrame, screen: str) -> Comparison | None:
    """That of a screen, from what `summarise` returns; None where one of the two is lacking."""
    own, shuffled, difference = (
        interval(figures, screen, UNSEEN, method) for method in (*CONTROLLED, DIFFERENCE)
    )
    if not (own and shuffled and difference):
        return None
    return Comparison(own, shuffled.mean, difference)


def number(value: float) -> str:
    """Two digits behind the point, and never '-0.00'."""
    if not math.isfinite(value):
        return "unknown"
    return f"{round(value, 2) + 0.0:.2f}"


def end(value: float) -> str:
    """An end of an interval: like a number, but never a zero that it is not."""
    return number(value) if round(value, 2) or not value else f"{value:.1g}"


def with_interval(interval: Interval) -> str:
    """'0.31 (95 % interval 0.25 to 0.36)'."""
    if not math.isfinite(interval.low):
        of = f"{count(interval.perturbations, 'perturbation')}, {count(interval.seeds, 'seed')}"
        return f"{number(interval.mean)} (no interval: {of})"
    ends = f"{end(interval.low)} to {end(interval.high)}"
    return f"{number(interval.mean)} (95 % interval {ends})"


def strength_words(strength: float) -> str:
    """How strong the planted effects were, against the real ones."""
    if strength == 1:
        return "as strong as this screen's real effects"
    if strength == 0:
        return "of no strength"
    return f"{strength:g} times as strong as this screen's real effects"


def reference(planted: Mapping[float, Comparison]) -> float:
    """The strength that decides: 1, or the nearest to it by ratio."""
    return min(planted, key=lambda s: (abs(math.log(s)) if s else math.inf, s))


def conclude(evidence: Evidence) -> list[str]:
    """Three sentences: could it be seen, was it seen, what follows.

    'better' is said of an interval that lies above zero, and of no other.
    """
    return [_could_be_seen(evidence), _was_seen(evidence), _what_follows(evidence)]


def is_seen(planted: Comparison) -> bool:
    """Whether own vectors predict what was made of them, and more of it than shuffled ones do.

    A model that has learnt next to nothing may be less wrong with the one than with the other.
    """
    return planted.difference.above_zero and planted.own.above_zero


def control_failed(evidence: Evidence) -> bool:
    """Whether the positive control could not be seen."""
    if not evidence.planted:
        return False
    return not is_seen(evidence.planted[reference(evidence.planted)])


def _could_be_seen(evidence: Evidence) -> str:
    if not evidence.planted:
        return (
            "There was no positive control (--planted), so nothing tells whether this screen, with "
            "this model and these steps, could show that vectors help if they did."
        )
    strength = reference(evidence.planted)
    found = evidence.planted[strength]
    made = f"where the response was made of the vectors, {strength_words(strength)}"
    gain = f"a correlation of {with_interval(found.difference)}"
    if control_failed(evidence):
        lower = [s for s, x in evidence.planted.items() if is_seen(x)]
        also = f"; it is seen at a strength of {min(lower):g}" if lower else ""
        if evidence.effect == 0:
            also = "; the real effects cannot be told from noise: halves of their cells disagree"
        reached = ""
        if found.difference.above_zero:
            reached = f", but themselves reach {with_interval(found.own)} only"
        return (
            f"The positive control cannot be seen: even {made}, own vectors gain {gain} over "
            f"shuffled ones on unseen perturbations{reached}{also}. No result on the real cells "
            "says anything."
        )
    weakest = min(s for s, x in evidence.planted.items() if is_seen(x))
    also = f", and it is seen down to a strength of {weakest:g}" if weakest < strength else ""
    return (
        f"This screen can show it: {made}, own vectors predict unseen perturbations better than "
        f"shuffled ones, by {gain}{also}{_caution(found.difference)}."
    )


def _was_seen(evidence: Evidence) -> str:
    real = evidence.real
    if real is None:
        return "On the real cells nothing was compared."
    found = real.difference
    of = f"of {count(found.perturbations, 'unseen perturbation')}, {count(found.seeds, 'seed')}"
    means = (
        f"the correlation of predicted with true effects is {number(real.own.mean)} with own and "
        f"{number(real.shuffled)} with shuffled vectors ({of}), a difference of "
        f"{with_interval(found)}"
    )
    if control_failed(evidence):
        return f"For the record, on the real cells {means}: not to be read as a result."
    if found.above_zero:
        return f"On the real cells own vectors do better than shuffled ones: {means}."
    if found.below_zero:
        return f"On the real cells own vectors do worse than shuffled ones: {means}."
    holds = ", which holds zero" if math.isfinite(found.low) else ""
    return f"On the real cells no difference can be told: {means}{holds}."


def _what_follows(evidence: Evidence) -> str:
    real = evidence.real
    if control_failed(evidence):
        return (
            "What to do: more unseen perturbations, cells, seeds (--seeds) or steps (--max-steps), "
            "or other settings of the model, until the positive control is seen; until then do "
            "not choose vectors by this screen."
        )
    if real is None:
        return "What to do: run it again with own and shuffled vectors."
    caution = _caution(real.difference)
    if real.difference.above_zero:
        best = max(evidence.baselines, key=lambda m: evidence.baselines[m], default=None)
        if best and evidence.baselines[best] >= real.own.mean:
            return (
                f"So the vectors tell State something about genes that it has not seen, but {best},"
                f" which reads no vectors, has a correlation of {number(evidence.baselines[best])}:"
                f" these vectors alone are no reason to predict unseen genes with this "
                f"model{caution}."
            )
        return (
            "So the vectors tell State something about genes that it has not seen: take them where "
            "such genes are to be predicted, knowing that one split, one model and one number of "
            f"steps were tried{caution}."
        )
    if real.difference.below_zero:
        return (
            "So nothing speaks for these vectors here; vectors that do worse than mixed-up ones "
            f"are a reason to look for mixed-up labels or too few perturbations{caution}."
        )
    limit = real.difference.high
    bound = f"a gain of more than {number(limit)} is unlikely" if math.isfinite(limit) else ""
    bound = bound or "an interval needs two perturbations and two seeds (--seeds)"
    return (
        f"So nothing here speaks for these vectors, and nothing proves them useless: {bound}, a "
        "smaller one would not be seen. Test on more perturbations, or take the vectors that are "
        f"least trouble{caution}."
    )


def _caution(interval: Interval) -> str:
    if interval.perturbations >= FEW:
        return ""
    of = count(interval.perturbations, "perturbation")
    return f" ({of}: the true interval is wider than the one shown)"
