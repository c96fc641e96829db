"""How labels were resolved: the closing table, and the report of one line a label.

Nothing is decided here.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from state_esm_features.console import count
from state_esm_features.embedding.compare import Compared
from state_esm_features.embedding.missing import missing_by_kind
from state_esm_features.embedding.resolve import how_resolved
from state_esm_features.embedding.vectors import Resolved
from state_esm_features.files import write_whole
from state_esm_features.results import FeaturesResult

REPORT_COLUMNS = (
    *("label", "how", "genes", "source", "via", "proteins", "residues", "nearest", "cosine"),
    *("less_mean_of", "reason"),
)


def write_report(path: Path, resolved: Resolved, compared: Compared | None = None) -> None:
    """One line a label, tab-separated: how it was resolved, to what, from where.

    Proteins are those whose mean a vector is; residues (of each) are known of sequences; the
    nearest other label, its cosine, and what is taken off the vectors before, once there are
    vectors.
    """
    sources, missing = resolved.resolver.sources, resolved.options.policy.missing
    near = compared.nearest(list(compared.own), 1) if compared and len(compared.own) > 1 else {}
    lines = ["\t".join(REPORT_COLUMNS)]
    for r in [*resolved.resolutions, *resolved.left_out]:
        used = [(p.gene, sources[p.source]) for p in r.parts if p.gene and p.source is not None]
        origins = [source.origin(gene) for gene, source in used]
        proteins = [p for origin in origins for p in origin.get("proteins", [])]
        keys = [key for origin in origins for key in origin.get("keys", [])]
        how = how_resolved(r, missing)
        if r.reason and missing == "error":
            how = "left out" if r in resolved.left_out else "missing"
        closest = ("", "", "")
        for name, cosine in near.get(r.label, []):
            closest = (name, f"{cosine:.4f}", compared.less_mean_of(r.label) if compared else "")
        cells = (
            *(r.label, how, "+".join(p.gene or p.name for p in r.parts)),
            ";".join(sorted({str(source.path) for _, source in used})),
            "; ".join(p.via for p in r.parts if p.via),
            str(len(proteins) + len(keys) or ""),
            ";".join(str(p["residues"]) for p in proteins),
            *(*closest, r.reason or ""),
        )
        lines.append("\t".join(re.sub(r"[\t\r\n]", " ", c) for c in cells))
    write_whole(path, lambda f: f.write(("\n".join(lines) + "\n").encode()))


WELL_KNOWN = ("TP53", "MYC", "STAT1", "KRAS", "CDK1", "GATA1", "HSPA5", "RPL3")
"""Genes whose neighbours a biologist can judge: the summary names those of the first three."""


def tally(resolved: Resolved) -> dict[str, int]:
    """{how labels were resolved: number of these labels}."""
    missing = resolved.options.policy.missing
    return dict(sorted(Counter(how_resolved(r, missing) for r in resolved.resolutions).items()))


def result(
    status: str,
    resolved: Resolved | None,
    path: Path | None = None,
    manifest: Path | None = None,
) -> FeaturesResult:
    """The same for a caller in Python; None where nothing was looked up."""
    if resolved is None:
        return FeaturesResult(status, path, manifest, 0, {}, {})
    missing = {r.label: r.reason for r in resolved.resolutions if r.reason}
    labels = len(resolved.resolutions)
    return FeaturesResult(status, path, manifest, labels, tally(resolved), missing)


def summary(resolved: Resolved, compared: Compared | None = None) -> str:
    """The closing table: labels by how they were resolved, missing ones by reason, sources, and,
    once there are vectors, the nearest neighbours of a few well-known genes.
    """
    resolutions, resolver = resolved.resolutions, resolved.resolver
    hows = ", ".join(f"{n:,} {how}" for how, n in tally(resolved).items())
    rows = [
        ("labels", f"{len(resolutions):,} ({hows})"),
        *(("from", f"{i['path']} ({count(i['labels'], 'label')})") for i in resolved.labels.inputs),
        *(("source", str(source)) for source in resolver.sources),
        *(("symbols", names.describe()) for names in resolver.names_read),
    ]
    if any(r.reason for r in resolutions):
        rows.insert(1, ("missing", missing_by_kind(resolutions)))
    if resolved.scaling:
        rows.append(("scaled", resolved.scaling.said))
    if resolved.ablation:
        how = f"{resolved.ablation['kind']}, seed {resolved.ablation['seed']}"
        rows.append(("ablation", f"{how}: no gene has its own vector"))
    elif compared is not None and len(compared.own) > 5:
        known = [gene for gene in WELL_KNOWN if gene in compared.own][:3]
        for gene, near in compared.nearest(known, 5).items() if known else ():
            listed = ", ".join(f"{name} {cosine:.3f}" for name, cosine in near)
            if near:
                rows.append(("nearest", f"to {gene}: {listed} ({compared.said})"))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)
