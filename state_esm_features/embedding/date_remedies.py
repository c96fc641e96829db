"""What helps labels that a spreadsheet turned into dates, and labels whose row of a table it did.

Which labels these are stands in `resolve`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from state_esm_features.console import count, some
from state_esm_features.embedding.labels import Labels
from state_esm_features.embedding.resolve import DATE, Resolution, Resolver


def with_dates(missing: Iterable[Resolution]) -> list[Resolution]:
    """Those of which a part is a date."""
    return [r for r in missing if any(p.kind == DATE for p in r.parts)]


def dates_of_gene_lists(missing: Iterable[Resolution], labels: Labels) -> list[Resolution]:
    """Labels of gene lists that a spreadsheet turned into dates: no --missing fills them in."""
    lists = {str(i["path"]) for i in labels.inputs if i["kind"] == "gene-list"}
    return [r for r in with_dates(missing) if not lists.isdisjoint(labels.holders.get(r.label, ()))]


def dates_advice(dates: Sequence[Resolution], labels: Labels, said: bool = False) -> str:
    """What to do with labels that were symbols; `said` is that their reasons are said already."""
    if not dates:
        return ""
    parts = {p.name: p for r in dates for p in r.parts if p.kind == DATE}
    listed = "; ".join(f"{name}, probably {p.via}" for name, p in list(parts.items())[:5])
    listed += "; ..." if len(parts) > 5 else ""
    what = f"{count(len(parts), 'label')} that a spreadsheet has turned into dates: {listed}. "
    holders = some(dict.fromkeys(path for r in dates for path in labels.needed_in(r.label)))
    choices = [" or ".join(p.paste) for p in parts.values() if p.paste]
    choose = f", or choose: {'; '.join(choices[:5])}" if choices else ""
    return (
        f"{'' if said else what}Which symbol it was is not guessed: write it again in {holders}"
        f"{choose}"
    )


def lost_rows(resolution: Resolution, resolver: Resolver) -> list[str]:
    """Rows of tables, left out as dates, that may be what a label lacks."""
    return [row for p in resolution.parts if p.reason for row in resolver.lost_rows(p.name)]


def lost_rows_advice(lost: Sequence[Resolution], resolver: Resolver, said: bool) -> str:
    """What to do where a table may have had a label's gene; `said` as in `dates_advice`."""
    if not lost:
        return ""
    pairs = (f"{r.label} ({' or '.join(lost_rows(r, resolver)[:3])})" for r in lost)
    what = f"{some(pairs)}: the table may have had it, before a spreadsheet made a date of it. "
    return f"{'' if said else what}Write the symbol again in the table"
