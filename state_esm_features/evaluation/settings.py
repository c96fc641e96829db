"""The options of the evaluation, and those that it hands on to the two commands.

What they do is not known here.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from state_esm_features.option_groups import COLUMNS, FEATURES
from state_esm_features.option_values import FOLDER, NUMBER
from state_esm_features.options import as_words, fields_of, option, switch
from state_esm_features.training_options import DataOptions, TrainingOptions


def strengths(text: str) -> tuple[float, ...]:
    """'0.5,1,2' -> (0.5, 1.0, 2.0)."""
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between, e.g. 0.5,1,2, got {text!r}"
        ) from None
    if not all(0 <= value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text} has a strength below 0")
    return tuple(sorted({*values}))


def without(group: type[Any], names: Collection[str]) -> type[Any]:
    """A group of options that lacks some."""
    kept = [f for f in fields(group) if f.name not in names]
    listed = [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in kept]
    return make_dataclass(group.__name__, listed, frozen=True)


DATA = without(DataOptions, {"pert_features"})
TRAINING = without(TrainingOptions, {"seed"})
"""What is handed on to every training; features and seed are the evaluation's own."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is compared, and where it goes."""

    seeds: int = option("training seeds of each kind of vectors (default: 3)", 3, **NUMBER)
    planted: tuple[float, ...] = option(
        "positive control: the same on a screen whose response is made of the vectors, as strong "
        "as the real effects, or S times as strong, e.g. 0.5,1,2",
        (),
        nargs="?",
        const=(1.0,),
        type=strengths,
        metavar="S,S",
    )
    output_dir: Path = option(
        "folder of the evaluation (default: evaluation)", Path("evaluation"), **FOLDER
    )
    dry_run: bool = switch("check everything and show the plan, write nothing")
    quiet: bool = switch("say warnings, errors and the conclusion only")


def feature_words(typed: Mapping[str, Any]) -> list[str]:
    """Options of create-esm-pert-features, as typed here."""
    return as_words(typed, {**FEATURES, **COLUMNS})


def training_words(typed: Mapping[str, Any]) -> list[str]:
    """Options of train-with-esm-features, as typed here; the TOML is named by each run."""
    known = fields_of((DATA, TRAINING))
    return as_words({k: v for k, v in typed.items() if k != "config"}, known)
