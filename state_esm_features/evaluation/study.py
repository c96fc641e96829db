"""The screen of an evaluation, checked before anything is started, and the plan.

Nothing is written here.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from state_esm_features.console import Findings, Notes, count, some
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.evaluation import design
from state_esm_features.evaluation.conclude import FEW
from state_esm_features.evaluation.groups import (
    GROUPS,
    PARTLY,
    SEEN,
    UNSEEN,
    genes_of,
    group,
    require_unseen,
)
from state_esm_features.evaluation.settings import feature_words, training_words
from state_esm_features.files import data_file_origin, existing_parent, sha256_of
from state_esm_features.training.data import Data
from state_esm_features.training.features_check import read_features, same_vector_in_training
from state_esm_features.training.model_check import check_model, data_dims, try_model
from state_esm_features.training.plan import TrainOptions, choose_settings
from state_esm_features.training.preflight import inspect_data
from state_esm_features.training.splits import no_validation_message
from state_esm_features.training.stock import matrices_read, typed_settings
from state_esm_features.training_options import TrainingOptions

CHECKPOINTS = 4
"""Of one training while it runs, one being written; of a finished one, final.ckpt is kept."""

CELL_SETS = "model.kwargs.cell_set_len"
"""The only setting of the model that the baselines share: it decides how cells are read."""


@dataclass(frozen=True)
class Study:
    """A screen, and how State is trained on it.

    Attributes
    ----------
    toml
        As the user named it.
    folder
        Of the evaluation, absolute.
    stock
        State's configuration of the trainings.
    features, training, overrides
        Words handed on to the two commands.
    strengths
        Of the planted screens.
    resumes
        Trainings save checkpoints and go on from them (--val-freq is given).
    """

    toml: Path
    folder: Path
    data: Data
    stock: Mapping[str, Any]
    features: Sequence[str]
    training: Sequence[str]
    overrides: Sequence[str]
    models: Sequence[design.Model]
    strengths: Sequence[float]
    resumes: bool

    @property
    def max_steps(self) -> int:
        return int(self.stock["training"]["max_steps"])

    @property
    def parts(self) -> list[design.Part]:
        return design.parts(self.models)

    @property
    def not_trained(self) -> list[str]:
        """Labels of the test that no training cell has."""
        splits = self.data.splits
        return [label for label in splits["test"] if label not in splits["train"]]

    def features_file(self, name: str) -> Path:
        return self.folder / "features" / f"{name}.pt"

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def predictions(self, name: str) -> Path:
        """Where `state tx predict` writes."""
        return self.run_dir(name) / "eval_final.ckpt"

    def scores_file(self, name: str) -> Path:
        return self.folder / "scores" / f"{name}.tsv"

    def planted(self, screen: str) -> Path:
        return self.folder / screen

    def baseline_overrides(self) -> list[str]:
        """Overrides without those of the model: the baselines have none of its settings."""
        kept = []
        for text in self.overrides:
            key = next(iter(typed_settings([text])))
            if key == CELL_SETS or key.partition(".")[0] != "model":
                kept.append(text)
        return kept


def make_study(
    typed: Mapping[str, Any],
    given: Mapping[str, Any],
    overrides: Sequence[str],
    methods: Collection[str],
    notes: Notes,
) -> Study:
    """Check the screen as a training does, and that some perturbation may be unseen.

    Parameters
    ----------
    typed
        {option: value} of the command line; `given` has those of [features] of the TOML too.

    Raises
    ------
    InputError
        All problems, in one.
    """
    found = Findings(notes.noted)
    options = TrainOptions.of(given, overrides, ())
    settings, words, stock = choose_settings(options, None)
    asked = {**settings, **typed_settings(words)}
    toml: Path = given["config"]
    data = inspect_data(toml, asked, stock["data"]["kwargs"], found)
    if data and data.files:
        check_model(str(asked["model"]), stock, data.files, found)
        # that best.ckpt is chosen on the test does no harm: the last weights are evaluated
        found.warnings = [x for x in found.warnings if x != no_validation_message(data)]
        _check_planted(given, stock, found)
        _check_seeds(overrides, found)
        with found.collect():
            test, train = data.splits["test"], data.splits["train"]
            require_unseen(data, group(test, train, {x: frozenset({x}) for x in test}), toml)
    found.settle()
    assert data  # else there is a problem
    strengths = tuple(given.get("planted", ()))
    training = training_words(typed)
    if "val_freq" not in typed:  # the last weights are evaluated: nothing is chosen by validation
        training.append(f"--val-freq={stock['training']['max_steps']}")
    return Study(
        toml=toml,
        folder=Path(given.get("output_dir", "evaluation")).absolute(),
        data=data,
        stock=stock,
        features=feature_words(typed),
        training=training,
        overrides=overrides,
        models=design.models(given.get("seeds", 3), strengths, methods),
        strengths=strengths,
        resumes="val_freq" in typed,
    )


def _check_planted(given: Mapping[str, Any], stock: Mapping[str, Any], found: Findings) -> None:
    read = matrices_read(stock["data"]["kwargs"])
    if given.get("planted") and read != ["X"]:
        found.problems.append(
            f"--planted makes cells for State on X, and this model reads {', '.join(read)}: leave "
            "--planted or --embed-key out"
        )


def _check_seeds(overrides: Sequence[str], found: Findings) -> None:
    seeds = {
        key for f in fields(TrainingOptions) if f.name == "seed" for key in f.metadata["stock"]
    }
    named = sorted(seeds & typed_settings(overrides).keys())
    if named:
        found.problems.append(
            f"{some(named)}: each model has a seed of its own. Leave it out, and give --seeds N"
        )


def identity(study: Study) -> dict[str, Any]:
    """What decides the figures: another one needs another folder.

    Seeds and strengths are not part of it: more may be added.
    """
    return {
        "toml": sha256_of(study.toml),
        "data": [data_file_origin(f.path.absolute()) for f in study.data.files],
        "features": list(study.features),
        "training": list(study.training),
        "overrides": list(study.overrides),
    }


def groups_of_test(study: Study) -> dict[str, str]:
    """{label of the test: its group}, once the features of own vectors are made.

    Raises
    ------
    InputError
        None is unseen.
    """
    own = study.features_file(design.OWN)
    manifest = read_manifest(own) or {"labels": {}, "missing": {}}
    splits = study.data.splits
    known_as = same_vector_in_training(read_features(own), splits)
    groups = group(
        splits["test"], splits["train"], genes_of(manifest), known_as, manifest["missing"]
    )
    require_unseen(study.data, groups, study.toml)
    return groups


def disk_needed(study: Study, slots: int) -> int:
    """Bytes that the whole evaluation takes, about."""
    files = study.data.files
    _, each = try_model(study.stock, data_dims(files, 0))
    trained = sum(model.trains for model in study.models)
    checkpoints = (each or 0) * (trained + CHECKPOINTS * slots)
    control, held = study.data.columns.control, study.data.splits["test"]
    controls = sum(cells.get(control, 0) for f in files for cells in f.by_type.values())
    predicted = 2 * 4 * (sum(held.values()) + controls) * files[0].width
    planted = len(study.strengths) * sum(f.path.stat().st_size for f in files)
    return checkpoints + predicted * slots + planted


def disk_short(study: Study, slots: int) -> str | None:
    """What to say where the disk may be too small."""
    needed = disk_needed(study, slots)
    free = shutil.disk_usage(existing_parent(study.folder)).free
    if needed <= free:
        return None
    return (
        f"{study.folder}: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. "
        "Free some, choose another --output-dir, or fewer --seeds"
    )


def few_unseen(study: Study) -> str | None:
    """What to say where the test may be too small."""
    n = len(study.not_trained)
    if n >= FEW:
        return None
    return (
        f"{count(n, 'perturbation')} of the test that no training cell has: under {FEW} an "
        "interval is narrower than it should be, and little can be told. Hold more out"
    )


def describe(study: Study, done: Collection[str], left: str | None, slots: int) -> str:
    """The plan in a few lines.

    Parameters
    ----------
    done
        Keys of parts that are done.
    left
        The time that the others will take, as far as it was measured.
    """
    models, parts, data = study.models, study.parts, study.data
    names = [m for m in design.METHODS if any(m == model.method for model in models)]
    seeds = len({model.seed for model in models})
    test, unseen = data.splits["test"], len(study.not_trained)
    steps_left = design.steps(models, study.max_steps, done)
    trained = sum(model.trains for model in models)
    total = f"{design.steps(models, study.max_steps):,} steps in {count(trained, 'training')}"
    screens = ", ".join(f"{s:g}" for s in study.strengths)
    free = shutil.disk_usage(existing_parent(study.folder)).free
    rows = [
        ("folder", study.folder),
        ("compared", f"{', '.join(names)}; {count(seeds, 'seed')}"),
        ("planted", f"own and shuffled at a strength of {screens}" if screens else "none"),
        ("test", f"{count(len(test), 'perturbation')}, {unseen:,} that no training cell has"),
        ("models", f"{len(models):,}: {total} of {study.max_steps:,}, {steps_left:,} steps left"),
        ("parts", f"{len(parts):,}, {len({p.key for p in parts} & {*done}):,} done"),
        ("at once", f"{slots:,}"),
        ("time", left or "not measured yet: said once the first training has taken some steps"),
        ("disk", f"{disk_needed(study, slots) / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def describe_groups(groups: Mapping[str, str]) -> str:
    """'12 unseen, 46 seen' perturbations of the test."""
    sizes = {g: sum(x == g for x in groups.values()) for g in GROUPS}
    more = {PARTLY: " (one of their genes trains)"}
    listed = [f"{n:,} {g}{more.get(g, '')}" for g, n in sizes.items() if n or g in (SEEN, UNSEEN)]
    return f"perturbations of the test: {', '.join(listed)}"


def duration(seconds: float) -> str:
    """'2.3 hours', '4 minutes'."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return count(max(1, round(seconds / 60)), "minute")
