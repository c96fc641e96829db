"""Everything about a run decided and checked, nothing written.

The run directory stands in `run_dir`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from state_esm_features import option_groups, training_options
from state_esm_features.console import Findings, Notes, count
from state_esm_features.embedding.compare import Compared
from state_esm_features.embedding.features import resolve_labels
from state_esm_features.embedding.features_file import build_manifest, read_manifest, write_features
from state_esm_features.embedding.labels import Labels, add_labels_found
from state_esm_features.embedding.report import summary
from state_esm_features.embedding.vectors import note_identical
from state_esm_features.files import existing_file
from state_esm_features.options import as_words, make
from state_esm_features.training.data import Data
from state_esm_features.training.fast_copies import FastLoading
from state_esm_features.training.fast_loading import choose_loading, describe_loading
from state_esm_features.training.features_check import check_features, note_known
from state_esm_features.training.launch import Ranks, commands_by_hand, launcher
from state_esm_features.training.model_check import check_model, data_dims, try_model
from state_esm_features.training.preflight import (
    check_disk,
    choose_workers,
    inspect_data,
    this_machine,
)
from state_esm_features.training.splits import split_table
from state_esm_features.training.stock import (
    INFER_LOADS,
    compose,
    devices_of,
    overrides_of,
    require_trainable,
    typed_settings,
)
from state_esm_features.training.trainer import (
    TrainerSettings,
    check_logging,
    choose_nodes,
    choose_precision,
    describe_trainer,
    set_by_user,
)

OWN_FEATURES = "pert_features.pt"
"""The features file in a run directory."""

TEMPLATE = "TEMPLATE.h5ad"
"""In a command that is shown, for cells to be predicted."""


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training, by what they decide.

    Attributes
    ----------
    given
        {option: value} of those that are not at their default because nothing says them.
    overrides
        Hydra overrides of State's configuration, as typed.
    command
        As typed.
    """

    data: training_options.DataOptions
    training: training_options.TrainingOptions
    run: training_options.RunOptions
    features: option_groups.FeatureOptions
    given: Mapping[str, Any]
    overrides: Sequence[str]
    command: Sequence[str]

    @classmethod
    def of(
        cls, given: Mapping[str, Any], overrides: Sequence[str], command: Sequence[str]
    ) -> TrainOptions:
        """Those that are given, and the defaults of the others."""
        return cls(
            make(training_options.DataOptions, given),
            make(training_options.TrainingOptions, given),
            make(training_options.RunOptions, given),
            option_groups.feature_options(given),
            *(given, overrides, command),
        )


def make_features(
    options: TrainOptions,
    data: Data,
    place: Path,
    earlier: Mapping[str, Any] | None,
    found: Findings,
) -> tuple[Path | None, dict[str, Any]]:
    """Make the features of exactly the labels of the data, as create_esm_pert_features.py does.

    Nothing is computed in a dry run, nor while there are problems.

    Returns
    -------
    path
        The file, or None if it was not made.
    checked
        As of `check_features`.

    Raises
    ------
    InputError
        As create_esm_pert_features.py has it: sources, symbols, missing labels.
    """
    labels = Labels(data.columns.control, in_no_cell={str(f.path): f.unused for f in data.files})
    in_files = {f.path: f.labels for f in data.files}
    add_labels_found(labels, in_files, data.columns.pert, data.experiment, options.data.config)
    wanted = options.features
    words = ["--from-toml", options.data.config, "--pert-col", data.columns.pert]
    words += ["--control-pert", data.columns.control]
    words += as_words(option_groups.without_defaults(wanted), option_groups.FEATURES)
    command = [str(w) for w in words]  # of create_esm_pert_features.py
    resolved = resolve_labels(labels, wanted, found, options.run.dry_run)
    before = earlier["identity"]["features"]["sha256"] if earlier else None
    unknown = {"sha256": before, "width": 0, "labels": len(labels.names), "ablation": None}
    if resolved is None:
        return None, unknown
    if found.problems or (options.run.dry_run and resolved.to_embed):
        found.line(summary(resolved))
        if resolved.to_embed:
            found.line(f"{count(len(resolved.to_embed), 'gene')} to compute before the training")
        return None, {**unknown, "width": resolved.width or 0}
    features, vectors = resolved.features()
    note_identical(resolved.own(features), found)
    found.line(summary(resolved, Compared(resolved, features, vectors)))
    path = place / OWN_FEATURES
    manifest = partial(build_manifest, resolved, features, command)
    write_features(path, features, manifest, found)
    checked = Findings()  # its other warnings were said in other words
    about = check_features(path, read_manifest(path), data, checked)
    found.problems += checked.problems
    note_known(about["known_as"], found)
    return path, about


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    options
        As the user gave them.
    earlier
        run.json of the run that is there already, or None.
    made
        Where features that were made for the run are until then, or None.
    run_dir
        Absolute; the run's own copies of TOML and features lie in it.
    settings
        {stock key: value} that this script sets.
    typed
        Hydra overrides as the user typed them; they win over `settings`.
    stock
        The stock configuration, composed with both.
    data, pert_features
        What the preflight found.
    step_checkpoints
        Steps between two step=N.ckpt, or None.
    fast
        How --fast-loading reads the data, or None.
    trainer
        What Lightning is told beside State's settings.
    """

    options: TrainOptions
    run_dir: Path
    earlier: Mapping[str, Any] | None
    made: Path | None
    settings: Mapping[str, Any]
    typed: Sequence[str]
    stock: Mapping[str, Any]
    data: Data
    pert_features: Mapping[str, Any]
    step_checkpoints: int | None
    fast: FastLoading | None
    trainer: TrainerSettings

    @property
    def toml(self) -> Path:
        """As the user named it."""
        return self.options.data.config

    @property
    def features(self) -> Path:
        """As the user named them; those that are made for the run are its own copy."""
        return self.options.data.pert_features or self.own_features

    @property
    def own_features(self) -> Path:
        return self.run_dir / OWN_FEATURES

    @property
    def own_toml(self) -> Path:
        return self.run_dir / "config.toml"

    def overrides(self, toml: Path, features: Path) -> list[str]:
        """Everything the stock command needs to do this run on these two files."""
        managed = {
            "data.kwargs.toml_config_path": toml,
            "data.kwargs.perturbation_features_file": features,
            "output_dir": self.run_dir.parent,
            "name": self.run_dir.name,
        }
        return overrides_of({**managed, **self.settings}, self.typed)

    def stock_command(self) -> str:
        """The `state tx train` command that trains the same weights."""
        words = ["state", "tx", "train"]
        copied = self.fast is not None and self.fast.copies
        words += self.overrides(
            self.own_toml if copied else self.toml.absolute(), self.features.absolute()
        )
        seed = os.environ.get("PYTHONHASHSEED")
        variables = ({"PYTHONHASHSEED": seed} if seed else {}) | self.trainer.variables()
        before = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        return " ".join([*before, shlex.join(words)])


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """{setting of State: value} of the options that are given."""
    groups = (
        training_options.DataOptions,
        training_options.TrainingOptions,
        training_options.WandbOptions,
    )
    settings = {
        key: given[f.name]
        for group in groups
        for f in fields(group)
        if f.name in given
        for key in f.metadata["stock"]
    }
    if given.get("num_workers", "auto") != "auto":
        settings[training_options.WORKERS] = given["num_workers"]
    if given.get("fast_loading"):
        settings[training_options.CONSECUTIVE] = given["fast_loading"] == "sorted"
    if given.get("wandb_project"):
        settings["use_wandb"] = True
        settings.setdefault("wandb.entity", None)  # stock's default is a placeholder
    if given.get("wandb_tags"):
        settings["wandb.tags"] = given["wandb_tags"].split(",")
    return settings


def choose_settings(
    options: TrainOptions, earlier: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """What the user wants, (settings, typed overrides), and State's configuration with both.

    On resume what is not given stays as in the run that is there. Else the number of loader
    workers only: chosen anew, it would follow the memory that is free now, and the same command
    would ask for another run. With --overwrite nothing.
    """
    settings: dict[str, Any] = {"model": "state_sm", "use_wandb": False}
    typed: list[str] = []
    if earlier and options.run.resume:
        now = typed_settings(options.overrides)
        typed = [t for t in earlier["typed"] if typed_settings([t]).keys().isdisjoint(now)]
        settings |= earlier["settings"]
    elif earlier and not options.run.overwrite:
        workers = training_options.WORKERS
        settings[workers] = earlier["identity"]["settings"][workers]
    settings |= settings_of(options.given)
    typed += options.overrides
    stock = compose(overrides_of(settings, typed))
    require_trainable(stock)
    return settings, typed, stock


def choose_trainer(
    options: TrainOptions,
    resumed: Mapping[str, Any],
    stock: Mapping[str, Any],
    found: Findings,
) -> TrainerSettings:
    """What Lightning is told beside State's settings; the precision stays that of the run that is
    resumed."""
    training, ranks, precision = options.training, Ranks(), None
    with found.collect():
        ranks = Ranks(choose_nodes(training.nodes), devices_of(stock))
    with found.collect():
        precision = choose_precision(training.training_precision, resumed.get("trainer", {}), stock)
    with found.collect():
        check_logging(ranks, stock)
    return TrainerSettings(ranks, precision, set_by_user())


def check_first_weights(stock: Mapping[str, Any], resumed: Mapping[str, Any]) -> None:
    """A new run may begin with the weights of a checkpoint."""
    begins_with = stock["model"]["kwargs"].get("init_from")
    if begins_with and not resumed:
        existing_file(begins_with, "checkpoint to start from (model.kwargs.init_from)")


def step_checkpoints(asked: Mapping[str, Any], stock: Mapping[str, Any]) -> int | None:
    """Steps between two step=N.ckpt: State's default, which State ignores, does not count."""
    every = "ckpt_every_n_steps"
    return int(stock["training"][every]) if f"training.{every}" in asked else None


def make_plan(
    options: TrainOptions,
    run_dir: Path,
    earlier: Mapping[str, Any] | None,
    manifest: Mapping[str, Any] | None,
    place: Path,
    notes: Notes,
) -> Plan:
    """Check everything and decide everything; nothing is written but features into `place`.

    Parameters
    ----------
    earlier
        run.json of the run that is there already, of which `choose_settings` keeps some.
    manifest
        Of the features file that was named.
    place
        A folder for features to be made.

    Raises
    ------
    InputError
        All problems found, in one.
    """
    found = Findings(notes.noted)
    settings, typed, stock = choose_settings(options, earlier)
    asked = settings | typed_settings(typed)
    resumed = (earlier or {}) if options.run.resume else {}
    every = step_checkpoints(asked, stock)
    made = features = fast = None
    data = inspect_data(options.data.config, asked, stock["data"]["kwargs"], found, manifest)
    if data and data.files:  # before hours go into features
        check_model(str(asked["model"]), stock, data.files, found)
    told = choose_trainer(options, resumed, stock, found)
    with found.collect():
        check_first_weights(stock, resumed)
    with found.collect():
        if options.data.pert_features:
            features = check_features(options.data.pert_features, manifest, data, found)
        elif data and data.files:
            made, features = make_features(options, data, place, earlier, found)
    if data and data.files:
        settings |= data.columns.settings()
        settings.setdefault(training_options.WORKERS, choose_workers(stock, data, this_machine()))
        fast = choose_loading(options.training, resumed, data, stock, run_dir, found)
        if features:
            _, each = try_model(stock, data_dims(data.files, features["width"]))
            steps = stock["training"]["max_steps"] // every if every else 0
            check_disk(each, steps, run_dir, fast.bytes_beside(run_dir) if fast else 0, found)
    found.settle()
    assert data and features  # else there is a problem
    stock = compose(overrides_of(settings, typed))
    return Plan(
        options, run_dir, earlier, made, settings, typed, stock, data, features, every, fast, told
    )


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    files, features, c = plan.data.files, plan.pert_features, plan.data.columns
    model = typed_settings(plan.typed).get("model", plan.settings["model"])
    training = plan.stock["training"]
    steps = f"{training['max_steps']:,} steps of {training['batch_size']} cell sets"
    genes, cells = len(files[0].genes), sum(int(f.cells.sum()) for f in files)
    columns = f"perturbation {c.pert}, cell type {c.cell_type}, batch {c.batch}"
    size = f"{features['labels']:,} x {features['width'] or 'unknown'}"
    rows = [
        ("run", plan.run_dir),
        ("model", f"{model}, {steps}"),
        ("data", f"{count(len(files), 'file')}, {genes:,} genes, {cells:,} cells"),
        ("columns", f"{columns}, control {c.control}"),
        *split_table(plan.data.splits, features.get("known_as", ())),
        ("features", f"{plan.features} ({size})"),
        ("workers", plan.stock["data"]["kwargs"]["num_workers"]),
        *describe_trainer(plan.trainer, plan.stock),
    ]
    nodes = plan.trainer.ranks.nodes
    if plan.options.run.dry_run and nodes > 1 and not launcher():
        typed = [word for word in plan.options.command if word != "--dry-run"]
        rows += [("type", line) for line in commands_by_hand(nodes, typed)]
    if plan.fast:
        rows.append(("loading", describe_loading(plan.fast, len(files))))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def what_is_next(plan: Plan) -> list[tuple[str, str]]:
    """(what for, command) of predicting with this run: on a template, if State can do that."""
    run_dir = plan.run_dir
    if plan.stock["model"]["name"].lower() not in INFER_LOADS:
        words = ["state", "tx", "predict", "--output-dir", str(run_dir)]
        return [("predict", shlex.join([*words, "--checkpoint", "final.ckpt", "--predict-only"]))]
    check = ["create-esm-pert-features", "--into-run", str(run_dir)]
    embed_key = plan.stock["data"]["kwargs"]["embed_key"]
    return [
        ("check", shlex.join([*check, "--adata", TEMPLATE, "--dry-run"])),
        ("predict", infer_command(run_dir, plan.data.columns.pert, embed_key)),
    ]


def infer_command(
    run_dir: Path, pert_col: str, embed_key: str | None, template: Path | str = TEMPLATE
) -> str:
    """State's command that predicts a template."""
    words = ["state", "tx", "infer", "--model-dir", run_dir]
    words += ["--checkpoint", run_dir / "checkpoints" / "final.ckpt"]
    words += ["--pert-col", pert_col, "--adata", template]
    words += ["--embed-key", embed_key] if embed_key else []
    return shlex.join(map(str, [*words, "--output", "prediction.h5ad"]))
