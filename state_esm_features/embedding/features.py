"""The way from labels to features: sources, resolution, vectors, file.

Each step stands in a module of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, Notes, count, some
from state_esm_features.embedding.embed import find_checkpoint
from state_esm_features.embedding.esm2 import Checkpoint
from state_esm_features.embedding.fasta import load_proteins
from state_esm_features.embedding.features_file import build_manifest
from state_esm_features.embedding.labels import Labels
from state_esm_features.embedding.missing import check_missing, leave_out_unused, say_left_out
from state_esm_features.embedding.report import write_report
from state_esm_features.embedding.resolve import (
    Resolution,
    Resolver,
    Source,
    genes_by_source,
    read_aliases,
    resolve,
)
from state_esm_features.embedding.tables import Table, open_tables
from state_esm_features.embedding.vectors import ablate, build_features, read_vectors
from state_esm_features.option_groups import ESM2_WIDTHS, FeatureOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Resolved:
    """Labels, and where the vector of each comes from; no vector is read or computed yet.

    Attributes
    ----------
    left_out
        Labels that no cell has and no source: they get no vector.
    used
        Genes that are used of each source.
    to_embed
        Those of them that are computed.
    checkpoint
        The model that computes them; None if there is nothing to compute, or if a dry run would
        have to download it.
    """

    labels: Labels
    tables: list[Table]
    resolver: Resolver
    resolutions: list[Resolution]
    left_out: list[Resolution]
    used: list[list[str]]
    to_embed: list[str]
    checkpoint: Checkpoint | None

    def width(self, model: str) -> int | None:
        """Length of the vectors, as far as it is known without computing one."""
        if self.tables:
            return self.tables[0].width
        known = self.checkpoint.width if self.checkpoint else None
        return known or ESM2_WIDTHS.get(model)

    def features(
        self, options: FeatureOptions, ablation: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """({label: vector}, {gene: vector}), read, computed, ablated, combined."""
        sources, for_run = self.resolver.sources, self.labels.for_run
        vectors = read_vectors(self.used, sources, self.checkpoint, options.sequences, for_run)
        if ablation:
            vectors = dict(ablate(vectors, ablation["kind"], ablation["seed"]))
        width = len(next(iter(vectors.values())))
        return build_features(self.resolutions, vectors, width, options.policy), vectors

    def manifest(
        self,
        features: Mapping[str, torch.Tensor],
        options: FeatureOptions,
        command: Sequence[str],
        ablation: Mapping[str, Any] | None,
        features_sha256: str,
    ) -> dict[str, Any]:
        """What the manifest says of a file of these features, made by `command`."""
        manifest = build_manifest(
            options,
            self.labels,
            self.resolver,
            self.resolutions,
            features,
            features_sha256,
            command,
            ablation,
        )
        left_out = {r.label: r.reason for r in self.left_out}
        return manifest | ({"left_out": left_out} if left_out else {})


def resolve_labels(
    labels: Labels,
    options: FeatureOptions,
    notes: Notes,
    dry_run: bool = False,
    all_genes: bool = False,
    report: Path | None = None,
    can_report: bool = False,
) -> Resolved | None:
    """Open the sources and find the gene of every label; None if a dry run has no source.

    Parameters
    ----------
    options
        What both commands have; what one of them has alone comes in the other parameters.
    can_report
        The command has --report.

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
        labels.add(genes, path=some(str(source.path) for source in sources), kind="all-genes")
    names = dict.fromkeys([*labels.names, labels.control])
    aliases = read_aliases(options.symbols.alias, options.symbols.aliases)
    resolver = Resolver(sources, aliases, labels.control, options.symbols, notes)
    every, missing = resolve(names, resolver), options.policy.missing
    left_out = leave_out_unused(every, labels, missing)
    without = {r.label for r in left_out}
    resolutions = [r for r in every if r.label not in without]
    if report:
        write_report(report, resolutions, sources, missing, left_out=left_out)
    check_missing(resolutions, labels, resolver, missing, can_report)
    for text in warn_of_left_out(left_out, labels):
        notes.warn(text)
    used = genes_by_source(resolutions, sources)
    if not any(used) and not labels.for_run:
        raise InputError(
            f"none of the {count(len(names) - 1, 'label')} is in a source: other species or "
            f"naming? labels: {some(names)}; {sources[0].path}: {some(sources[0].symbols)}"
        )
    tables = [source for source in sources if isinstance(source, Table)]
    to_embed = used[-1] if options.sources.fasta else []
    checkpoint = None
    if to_embed:
        checkpoint = find_checkpoint(to_embed, tables, options.sequences, dry_run)
    return Resolved(labels, tables, resolver, resolutions, left_out, used, to_embed, checkpoint)


def open_sources(options: FeatureOptions, dry_run: bool, notes: Notes) -> list[Source]:
    """Tables, then proteins, in the order in which they are asked."""
    sources: list[Source] = [*open_tables(options.sources, dry_run, notes)]
    if options.sources.fasta:
        sources.append(load_proteins(options.sources.fasta, options.sequences, notes))
    return sources


def warn_of_left_out(left_out: Sequence[Resolution], labels: Labels) -> list[str]:
    """What to say of labels that get no vector, as no cell of a data file has them."""
    holders = {r.label: labels.holders[r.label] for r in left_out}
    files = dict.fromkeys(p for paths in holders.values() for p in paths if p in labels.columns)
    unused = [label for label, paths in holders.items() if not files.keys().isdisjoint(paths)]
    if not unused or not labels.column:
        return []
    return [say_left_out(unused, files, labels.column, "")]
