"""What an evaluation consists of: models, the parts of each, and what a part waits for.

Nothing is started or read here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

OWN, SHUFFLED, ONEHOT = "own", "shuffled", "onehot"
VECTORS = (OWN, SHUFFLED, ONEHOT)
BASELINES = ("perturb_mean", "context_mean")
"""State's own: the mean effect of a perturbation over cell types; the mean of the perturbed cells
of a cell type."""

METHODS = (*VECTORS, *BASELINES)
CONTROLLED = (OWN, SHUFFLED)
"""What is compared on a planted screen, too."""

ABLATIONS = {SHUFFLED: "shuffle", ONEHOT: "onehot"}
"""{vectors: what --ablation calls them}."""

REAL, PLANTED = "real", "planted"
"""The screen of the user, and what names of planted ones begin with."""

FEATURES, SCREEN, TRAINING = "features", "screen", "training"
PREDICTION, SCORES = "prediction", "scores"
"""Kinds of parts; of the screens only planted ones are made."""


def screen_name(strength: float) -> str:
    """'planted_0.5' of the screen whose effects have that strength."""
    return f"{PLANTED}_{strength:g}"


def strength_of(screen: str) -> float | None:
    """The strength of a planted screen; None of the real one."""
    return None if screen == REAL else float(screen.removeprefix(f"{PLANTED}_"))


@dataclass(frozen=True)
class Model:
    """One model: trained, asked for predictions, scored.

    Attributes
    ----------
    screen
        'real', or 'planted_1'.
    method
        One of METHODS.
    seed
        Of the training, and of the shuffle.
    """

    screen: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.screen}_{self.method}_{self.seed}"

    @property
    def features(self) -> str:
        """Name of the features it trains on. The baselines read none, but State's data does."""
        kind = OWN if self.method in BASELINES else self.method
        return f"{kind}_{self.seed}" if kind == SHUFFLED else kind

    @property
    def trains(self) -> bool:
        """Whether it takes steps: State ends the baselines, which only count, after one."""
        return self.method not in BASELINES


@dataclass(frozen=True)
class Part:
    """What is done whole or not at all.

    Attributes
    ----------
    kind
        One of the five above.
    name
        Of the model, the features or the screen.
    needs
        Keys of the parts that have to be done before.
    """

    kind: str
    name: str
    needs: tuple[str, ...] = ()
    model: Model | None = None

    @property
    def key(self) -> str:
        return f"{self.name}.{self.kind}"


def models(
    seeds: int, strengths: Sequence[float] = (), methods: Collection[str] = METHODS
) -> list[Model]:
    """Every model, in the order of the work: all that one seed allows to say comes first."""
    found = []
    for seed in range(seeds):
        found += [Model(REAL, m, seed) for m in VECTORS if m in methods]
        for strength in strengths:
            found += [Model(screen_name(strength), m, seed) for m in CONTROLLED if m in methods]
        if seed == 0:
            found += [Model(REAL, m, 0) for m in BASELINES if m in methods]
    return found


def parts(wanted: Sequence[Model]) -> list[Part]:
    """The parts of these models, each once, none before one that it needs."""
    found: dict[str, Part] = {}

    def add(part: Part) -> str:
        found.setdefault(part.key, part)
        return part.key

    # of own vectors first: what is unseen depends on them, and planted responses are made of them
    own = add(Part(FEATURES, OWN))
    for model in wanted:
        needs = [own, add(Part(FEATURES, model.features))]
        if model.screen != REAL:
            needs.append(add(Part(SCREEN, model.screen, (own,))))
        before = tuple(dict.fromkeys(needs))
        for kind in (TRAINING, PREDICTION, SCORES):
            before = (add(Part(kind, model.name, before, model)),)
    return list(found.values())


def ready(waiting: Sequence[Part], done: Collection[str]) -> Part | None:
    """The first part that waits for nothing any more."""
    return next((part for part in waiting if {*part.needs} <= {*done}), None)


def steps(wanted: Sequence[Model], max_steps: int, done: Collection[str] = ()) -> int:
    """Training steps of those whose training is not done."""
    left = [m for m in wanted if m.trains and Part(TRAINING, m.name).key not in done]
    return len(left) * max_steps
