"""The way from labels to features: sources, resolution, vectors, file.

Each step stands in a module of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from state_esm_features.console import InputError, Notes, count, some, with_remedies
from state_esm_features.embedding.embed import find_checkpoint
from state_esm_features.embedding.fasta import load_proteins
from state_esm_features.embedding.labels import Labels
from state_esm_features.embedding.missing import check_missing, names_for_keys, say_left_out
from state_esm_features.embedding.namers import find_namers
from state_esm_features.embedding.report import write_report
from state_esm_features.embedding.resolve import Resolution, Resolver, Source, resolve
from state_esm_features.embedding.table_agreement import compare_tables
from state_esm_features.embedding.tables import open_tables
from state_esm_features.embedding.vectors import Resolved
from state_esm_features.option_groups import FeatureOptions


def resolve_labels(
    labels: Labels,
    options: FeatureOptions,
    notes: Notes,
    dry_run: bool = False,
    all_genes: bool = False,
    report: Path | None = None,
    can_report: bool = False,
    remembered: Collection[tuple[str, str]] = (),
) -> Resolved | None:
    """Open the sources and find the gene of every label; None if a dry run has no source.

    Parameters
    ----------
    options
        What both commands have; what one of them has alone comes in the other parameters.
    can_report
        The command has --report.
    remembered
        (OLD, NEW) of aliases that a run has kept: nobody typed them.

    Raises
    ------
    InputError
        A source cannot be read, or labels are missing and --missing does not allow it.
    """
    sources = open_sources(options, dry_run, notes)
    if not sources:  # a dry run that would have to download
        notes.line(f"{count(len(labels.names), 'label')} to look up: {some(labels.names)}")
        return None
    if all_genes:
        genes = [g for source in sources for g in source.symbols if g != labels.control]
        labels.add(genes, path=some(source.path for source in sources), kind="all-genes")
    names = dict.fromkeys([*labels.names, labels.control])
    resolver = Resolver(sources, labels.control, options.symbols, notes)
    every, missing = resolve(names, resolver, remembered), options.policy.missing
    left_out = []
    if missing == "error":  # cell-load gives such a category zeros, --into-run a vector later
        left_out = [r for r in every if r.reason and not labels.needed_in(r.label)]
    without = {r.label for r in left_out}
    resolutions = [r for r in every if r.label not in without]
    resolved = Resolved(labels, options, resolver, resolutions, left_out)
    if report:
        write_report(report, resolved)
    check_missing(resolved, can_report)
    warn_of_left_out(left_out, labels, notes)
    require_some(resolved)
    if not resolved.to_embed:
        return resolved
    tables, sequences = resolved.tables, options.sequences
    checkpoint = find_checkpoint(resolved.to_embed, tables, sequences, dry_run)
    return replace(resolved, checkpoint=checkpoint)


def require_some(resolved: Resolved) -> None:
    """Refuse labels of which none has a vector, whatever --missing says."""
    if any(resolved.used) or resolved.labels.for_run:
        return
    names = [r.label for r in [*resolved.resolutions, *resolved.left_out]]
    source = resolved.resolver.sources[0]
    problem = (
        f"none of the {count(len(names) - 1, 'label')} is in a source: other species or naming? "
        f"labels: {some(names)}; {source.path}: {some(source.symbols)}"
    )
    raise InputError(with_remedies(problem, names_for_keys(resolved.resolver)))


def open_sources(options: FeatureOptions, dry_run: bool, notes: Notes) -> list[Source]:
    """Tables, then proteins, in the order in which they are asked.

    Proteins are read first, as they name the keys of tables.
    """
    fasta, isoforms = options.sources.fasta, options.sequences.isoforms
    proteins = [load_proteins(fasta, options.sequences, notes)] if fasta else []
    namers = cache(partial(find_namers, options.symbols, proteins))  # once for all tables
    tables = open_tables(options.sources, options.sequences.layer, dry_run, notes, namers)
    tables = compare_tables(tables, notes)
    several = sum(len(table.keys.several) for table in tables)
    if several and isoforms != "mean":
        notes.warn(
            f"--isoforms {isoforms} is for vectors that are computed: of {count(several, 'gene')} "
            "with several proteins in a table the mean is taken"
        )
    return [*tables, *proteins]


def warn_of_left_out(left_out: Sequence[Resolution], labels: Labels, notes: Notes) -> None:
    """Labels that get no vector, as no cell of a data file has them, are said."""
    holders = {r.label: labels.holders[r.label] for r in left_out}
    files = dict.fromkeys(p for paths in holders.values() for p in paths if p in labels.columns)
    unused = [label for label, paths in holders.items() if not files.keys().isdisjoint(paths)]
    if unused and labels.column:
        notes.warn(say_left_out(unused, files, labels.column, ""))
