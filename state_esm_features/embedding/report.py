"""How labels were resolved: the closing table, and the report of one line a label.

Nothing is decided here.
"""

from __future__ import annotations

import re
from pathlib import Path

from state_esm_features.console import count
from state_esm_features.embedding.missing import missing_by_kind
from state_esm_features.embedding.resolve import how_resolved
from state_esm_features.embedding.vectors import Resolved, Vectors, nearest
from state_esm_features.files import write_whole

REPORT_COLUMNS = (
    *("label", "how", "genes", "source", "via", "proteins", "residues", "nearest", "cosine"),
    "reason",
)


def write_report(path: Path, resolved: Resolved, vectors: Vectors | None = None) -> None:
    """One line a label, tab-separated: how it was resolved, to what, from where.

    Proteins and residues (of each) are known of sequences; the nearest other label and its cosine
    once there are `vectors`.
    """
    sources, missing = resolved.resolver.sources, resolved.options.policy.missing
    near = nearest(vectors, list(vectors), 1) if vectors and len(vectors) > 1 else {}
    lines = ["\t".join(REPORT_COLUMNS)]
    for r in [*resolved.resolutions, *resolved.left_out]:
        used = [(p.gene, sources[p.source]) for p in r.parts if p.gene and p.source is not None]
        proteins = [p for gene, source in used for p in source.origin(gene).get("proteins", [])]
        how = how_resolved(r, missing)
        if r.reason and missing == "error":
            how = "left out" if r in resolved.left_out else "missing"
        closest = next(iter(near.get(r.label, [])), None)
        cells = (
            *(r.label, how, "+".join(p.gene or p.name for p in r.parts)),
            ";".join(sorted({str(source.path) for _, source in used})),
            "; ".join(p.via for p in r.parts if p.via),
            str(len(proteins) or ""),
            ";".join(str(p["residues"]) for p in proteins),
            *((closest[0], f"{closest[1]:.4f}") if closest else ("", "")),
            r.reason or "",
        )
        lines.append("\t".join(re.sub(r"[\t\r\n]", " ", c) for c in cells))
    write_whole(path, lambda f: f.write(("\n".join(lines) + "\n").encode()))


WELL_KNOWN = ("TP53", "MYC", "STAT1", "KRAS", "CDK1", "GATA1", "HSPA5", "RPL3")
"""Genes whose neighbours a biologist can judge: the summary names those of the first three."""


def summary(resolved: Resolved, features: Vectors | None = None) -> str:
    """The closing table: labels by how they were resolved, missing ones by reason, sources, and,
    once there are features, the nearest neighbours of a few well-known genes.
    """
    resolutions, resolver = resolved.resolutions, resolved.resolver
    hows = [how_resolved(r, resolved.options.policy.missing) for r in resolutions]
    tally = ", ".join(f"{hows.count(h):,} {h}" for h in dict.fromkeys(sorted(hows)))
    rows = [
        ("labels", f"{len(resolutions):,} ({tally})"),
        *(("from", f"{i['path']} ({count(i['labels'], 'label')})") for i in resolved.labels.inputs),
        *(("source", str(source)) for source in resolver.sources),
        *(("symbols", names.describe()) for names in resolver.names_read),
    ]
    if any(r.reason for r in resolutions):
        rows.insert(1, ("missing", missing_by_kind(resolutions)))
    if resolved.ablation:
        how = f"{resolved.ablation['kind']}, seed {resolved.ablation['seed']}"
        rows.append(("ablation", f"{how}: no gene has its own vector"))
    elif features is not None:
        vectors = resolved.own(features)
        known = [gene for gene in WELL_KNOWN if gene in vectors][:3]
        for gene, near in nearest(vectors, known, 5).items() if len(vectors) > 5 else ():
            listed = ", ".join(f"{name} {cosine:.3f}" for name, cosine in near)
            rows.append(("nearest", f"to {gene}: {listed}"))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)
