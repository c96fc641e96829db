"""What helps labels that no source has: each advice is tried before it is given.

How a label is resolved stands in `resolve`.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from state_esm_features.console import InputError, count, have, shown, some, them, with_remedies
from state_esm_features.embedding.date_remedies import (
    dates_advice,
    dates_of_gene_lists,
    lost_rows,
    lost_rows_advice,
    with_dates,
)
from state_esm_features.embedding.gene_names import LOOSER
from state_esm_features.embedding.labels import Labels, plain_regex, relabelling
from state_esm_features.embedding.resolve import (
    CONTROL_GUIDES,
    CONTROL_NAMED,
    CONTROL_NAMES,
    NOT_FOUND,
    Resolution,
    Resolver,
    letters,
)
from state_esm_features.embedding.table_keys import ACCESSIONS, OF_GENES, PROTEINS, key_of
from state_esm_features.embedding.tables import Table
from state_esm_features.embedding.vectors import Resolved

LABEL_FORMS = (
    r"(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+",
    r"sg(?P<gene>.+?)([_-](sg|g|guide)?[0-9]+)?",
    r"(?P<gene>.+?)_P[0-9](P[0-9])?",
    r"(?P<gene>.+?)_[ACGT]{15,}",
)
"""Common forms of labels that are no gene: guides, promoters."""

GENERAL_FORMS = (
    *(rf"(?P<gene>[^{mark}]+){mark}.+" for mark in "_ :;,/"),
    *(r"(?P<gene>[^|]+)[|].+", r"(?P<gene>[^.]+)[.].+"),
    *(r".+_(?P<gene>[^_]+)", r".+[|](?P<gene>[^|]+)", r".+:(?P<gene>[^:]+)"),
)
"""The gene before the first mark, or behind the last."""

HYPHEN_FORM = r"(?P<gene>.+)-[^-]+"
"""The gene before the last hyphen. Symbols have hyphens: only where names of genes are known."""

SEPARATORS = "|,_;:/&"


def with_options(resolver: Resolver, control: str | None = None, **options: Any) -> Resolver:
    """The same resolver under other options: what these would do, before they are offered."""
    for shared in ("names", "keys_in_capitals", "keys_of_gene", "doubtful_keys_of_gene"):
        getattr(resolver, shared)  # read once, not in every copy
    tried = copy.copy(resolver)
    tried.options = replace(resolver.options, **options)
    tried.control, tried.aliases_used = control or resolver.control, set()
    return tried


def read_as_keys(resolution: Resolution) -> bool:
    """Whether a label was read as what a person takes it for: keys, no ids and no other names."""
    hows = {p.how for p in resolution.parts}
    return resolution.reason is None and hows <= {"exact", "case", "control"}


def cuts_a_name(resolution: Resolution, resolver: Resolver) -> bool:
    """Whether a label was cut that is one name, or names another gene too.

    SOD2-OT1 is a gene without a protein, no guide of SOD2, and STAT1_KLF1 no guide of STAT1.
    """
    if set(resolver.meanings(resolution.label)[1].values()) - {LOOSER}:
        return True
    rest = resolution.label
    genes = {str(p.gene) for p in resolution.parts}
    for gene in genes:
        rest = re.sub(re.escape(gene), "", rest, count=1, flags=re.IGNORECASE)
    words = set(re.split(r"[\W_]", rest)) - genes
    return any(len(word) > 1 and resolver.exact(word) for word in words)


def forms_to_try(labels: Sequence[str], resolver: Resolver) -> list[tuple[str | None, str]]:
    """(form, separator) that labels may have: one option before two, common forms before separators
    before general forms."""
    now = resolver.options.separator
    marks = [m for m in SEPARATORS if any(m in x for x in labels)]
    if any(now in x for x in labels):  # which may be no separator here
        marks += [m for m in SEPARATORS if m not in marks][:1]
    general = [*GENERAL_FORMS, *([HYPHEN_FORM] if any(resolver.names) else [])]
    one: list[tuple[str | None, str]] = [(form, now) for form in LABEL_FORMS]
    one += [(None, mark) for mark in marks]
    one += [(form, now) for form in general]
    return one + [(form, mark) for mark in marks for form in (*LABEL_FORMS, *general)]


def suggest_form(
    missing: Sequence[Resolution], resolutions: Sequence[Resolution], resolver: Resolver
) -> tuple[str, Resolver]:
    """The options that make keys of most, and of at least half, of the missing labels; or nothing.

    Each is tried on these labels as it would work: the resolver that does it is returned too.
    Ambiguous labels, and readings that are no key but a number or another name, do not count. What
    would cut the name of a gene, or read a label otherwise that is found now, is not offered.
    """
    labels = [r.label for r in missing if not any(p.paste for p in r.parts)]
    sample = labels[:: len(labels) // 300 + 1]
    now = resolver.options.separator

    def tried(form: str | None, separator: str) -> Resolver:
        regex = re.compile(form) if form else resolver.options.label_regex
        return with_options(resolver, label_regex=regex, separator=separator)

    ranked = []
    for rank, (form, separator) in enumerate(forms_to_try(labels, resolver)):
        hits = sum(map(read_as_keys, map(tried(form, separator).label, sample)))
        ranked.append((-hits, rank, form, separator))
    for hits, _, form, separator in sorted(ranked, key=lambda trial: trial[:2]):
        if not hits:
            break
        trial = tried(form, separator)
        found = [trial.label(label) for label in labels]
        keys = [r for r in found if read_as_keys(r)]
        as_before = (trial.label(r.label) == r for r in resolutions if not r.reason)
        resolved = [r for r in found if not r.reason]
        if 2 * len(keys) < len(missing) or any(cuts_a_name(r, resolver) for r in resolved):
            continue
        if not all(as_before):
            continue
        options = [f"--separator {shlex.quote(separator)}"] * (separator != now)
        options += [f"--label-regex {shlex.quote(form)}"] if form else []
        example = keys[0]
        label = example.label if " " not in example.label else repr(example.label)
        genes = " and ".join(str(p.gene or p.name) for p in example.parts)
        offer = " ".join(options)
        return f"{len(resolved):,} of them resolve with {offer} ({label} is {genes})", trial
    return "", resolver


def neat(label: str, separator: str) -> str:
    """A label without blanks at the ends of its parts."""
    return separator.join(part.strip() for part in label.split(separator))


def only_blanks(
    missing: Sequence[Resolution], resolver: Resolver, column: str
) -> tuple[list[Resolution], str]:
    """Labels that resolve without blanks at their ends, and the line of Python that strips them."""
    mark = resolver.options.separator
    control = neat(resolver.control, mark)
    tried = with_options(resolver, control)
    cured = [
        r
        for r in missing
        if (neat(r.label, mark), control) != (r.label, resolver.control)
        and not tried.label(neat(r.label, mark)).reason
    ]
    if not cured:
        return [], ""
    obs = f"adata.obs[{column!r}]"
    inside = [r for r in cured if neat(r.label, mark) != r.label.strip()]
    parts = rf".str.replace(r'\s*{plain_regex(mark)}\s*', {mark!r}, regex=True)" if inside else ""
    then = f", then --control-pert {shlex.quote(control)}" if control != resolver.control else ""
    return cured, (
        f"{some(r.label for r in cured)}: blanks in the {'name' if len(cured) == 1 else 'names'}. "
        f"Take them away: {obs} = {obs}.str.strip(){parts}.astype('category'){then}"
    )


def named_as_controls(
    missing: Sequence[Resolution], resolutions: Sequence[Resolution]
) -> list[Resolution]:
    """Labels that lack a gene because a part is named like a control, and others of their kind.

    Beside NT1 and NT2, NT4 is no NTF4, whose alias it is.
    """

    def stem(name: str) -> str:
        return re.sub(r"\d", "", letters(name))

    named = [r for r in missing if {p.kind for p in r.parts if p.reason} == {CONTROL_NAMED}]
    stems = {stem(p.name) for r in named for p in r.parts if p.kind == CONTROL_NAMED}
    labels = {r.label for r in named}
    return [
        r
        for r in resolutions
        if r.label in labels
        or (
            stem(r.label) in stems
            and CONTROL_GUIDES.fullmatch(letters(r.label))
            and r.parts[0].how not in ("exact", "case", "control")
        )
    ]


def only_controls(resolution: Resolution) -> bool:
    """Whether a label names nothing but controls, not a gene beside one."""
    parts = resolution.parts
    return all(p.how == "control" or CONTROL_GUIDES.fullmatch(letters(p.name)) for p in parts)


def relabel_controls(
    alone: Sequence[Resolution], beside: Sequence[Resolution], labels: Labels, resolver: Resolver
) -> str:
    """': ' and the line of Python that gives controls the run's label, tried on all labels."""
    if labels.column is None:
        return ""
    guides = [p.name for r in beside for p in r.parts if p.kind == CONTROL_NAMED]
    whole = [r.label for r in alone]
    line, renamed = relabelling(whole, guides, resolver.control, labels.column)
    changed = {x for x in labels.names if renamed(x) != x}
    works = changed == {r.label for r in [*alone, *beside]} and not any(
        resolver.label(renamed(x)).reason for x in changed
    )
    return f": {line}" if line and works else ""


def missing_by_kind(resolutions: Iterable[Resolution]) -> str:
    """'2 ambiguous, 3 not found', by the first part of each label that has no gene."""
    kinds = [next((p.kind for p in r.parts if p.kind), NOT_FOUND) for r in resolutions if r.reason]
    return ", ".join(f"{kinds.count(k):,} {k}" for k in sorted(set(kinds)))


def check_missing(resolved: Resolved, can_report: bool) -> None:
    """Refuse missing labels, with what helps each, or say once what --missing does."""
    resolutions, labels = resolved.resolutions, resolved.labels
    policy = resolved.options.policy.missing
    missing = [r for r in resolutions if r.reason]
    if not missing:
        return
    total = sum(r.label != labels.control for r in resolutions)
    in_lists = dates_of_gene_lists(missing, labels)
    if in_lists and policy != "error":
        raise InputError(dates_advice(in_lists, labels))
    names = some(r.label for r in missing)
    if policy != "error":
        filling = "the mean vector" if policy == "mean" else "zeros, as if they were control"
        resolved.resolver.notes.warn(
            f"{len(missing):,} of {count(total, 'label')} missing, or a part of them ({names}): "
            f"filled with {filling}"
        )
        return
    reason = f": {missing[0].reason}" if len(missing) == 1 else ""
    kinds = missing_by_kind(resolutions)
    if not reason and "," in kinds:
        reason = f": {kinds}"
    problem = (
        f"{len(missing):,} of {count(total, 'label')} {have(len(missing))} no embedding "
        f"({names}){reason}{only_in(labels, missing)}"
    )
    remedies = remedies_for(missing, resolved, can_report)
    raise InputError(with_remedies(problem, remedies))


def remedies_for(missing: Sequence[Resolution], resolved: Resolved, can_report: bool) -> list[str]:
    """What helps the missing labels: of each the first thing that does.

    What helps any label is said of those only that nothing else does.
    """
    resolutions, labels, resolver = resolved.resolutions, resolved.labels, resolved.resolver

    def without(all_of: Sequence[Resolution], some_of: Sequence[Resolution]) -> list[Resolution]:
        gone = {r.label for r in some_of}
        return [r for r in all_of if r.label not in gone]

    cured, blanks = only_blanks(missing, resolver, labels.column or "COLUMN")
    controls = named_as_controls(without(missing, cured), resolutions)
    relabel = controls_advice(controls, labels, resolver)
    rest = without(missing, [*cured, *controls])
    dates = with_dates(rest)
    lost = [r for r in without(rest, dates) if lost_rows(r, resolver)]
    rest = without(rest, [*dates, *lost])
    form, tried = suggest_form(rest, resolutions, resolver)
    as_tried = [tried.label(r.label) for r in rest]
    unread = [r for r in as_tried if r.reason]
    more = named_as_controls(unread, as_tried) if form else []  # beside a gene, once parted
    relabel_more = controls_advice(more, labels, tried)
    may_be = controls if may_be_the_control(controls, labels) else []
    left = [*without(unread, more), *may_be]
    choose = ""
    unclear = {str(p.reason): " or ".join(p.paste) for r in rest for p in r.parts if p.paste}
    if unclear:
        choose = f"{some(unclear, 3)}. " if len(missing) > 1 else ""
        choose += f"Choose: {'; '.join(list(unclear.values())[:3])}"
    tail, names = "", [] if not left else names_for_keys(resolver)
    if left:
        which = "" if len(left) == len(missing) else f"For {some(r.label for r in left)}: "
        tail = f"{which}{advice_for_missing(resolved, can_report)}"
    only = len(missing) == 1
    spoilt = dates_advice(dates, labels, said=only)
    again = lost_rows_advice(lost, resolver, said=only)
    texts = (blanks, relabel, spoilt, again, form, relabel_more, choose, *names, tail)
    return [text for text in texts if text]


BESIDE = {
    ACCESSIONS: "GN= beside the accession",
    PROTEINS: "gene: or gene_symbol: beside the id",
}
"""Where the headers of a FASTA file name the gene of a protein."""


def names_for_keys(resolver: Resolver) -> list[str]:
    """Of each table with proteins of which nothing tells the gene, what could tell it."""
    texts = []
    for table in resolver.sources:
        if not isinstance(table, Table) or table.keys.kind in OF_GENES:
            continue
        unnamed = [key for key in table.keys.unnamed if not resolver.meanings(key)[1]]
        if not unnamed:
            continue
        kinds = list(dict.fromkeys(key_of(key).kind for key in unnamed))
        of = f"{len(unnamed):,} of {count(len(table.vectors), 'key')}"
        hgnc = "HGNC's file with --hgnc (its column uniprot_ids), " * (ACCESSIONS in kinds)
        headers = " or ".join(BESIDE[kind] for kind in kinds)
        texts.append(
            f"Nothing given tells the gene of {of} of {table.path} ({' and '.join(kinds)}: "
            f"{some(unnamed, 3)}). Give {hgnc}the FASTA file of these proteins with --fasta "
            f"({headers} in its headers), or two columns, protein and gene, with --aliases"
        )
    return texts


def advice_for_missing(resolved: Resolved, can_report: bool) -> str:
    """What helps a label that is a gene which no source has; --scale takes one table only."""
    for_run, scaled = resolved.labels.for_run, resolved.options.policy.scale != "none"
    see_all = "see all with --report FILE.tsv --dry-run, " if can_report else ""
    add = "Add a table that has them with --esm-embeddings, or their proteins with --fasta"
    if for_run:  # to which other tables would mean nothing
        add = "Add their proteins with --fasta"
    elif scaled:
        add = "Add their proteins with --fasta, beside --esm-embeddings TABLE"
    if scaled:
        return f"{add}, {see_all}or rename with --alias OLD=NEW"
    return f"{add}, rename with --alias OLD=NEW, {see_all}or accept with --missing mean"


def only_in(labels: Labels, missing: Sequence[Resolution]) -> str:
    """Which of several inputs the missing labels come from, if not from all."""
    inputs = {str(i["path"]) for i in labels.inputs if i["kind"] != "toml"}
    holders = {path: None for r in missing for path in labels.needed_in(r.label)}
    if not holders or len(holders) == len(inputs):
        return ""
    return f". {'It is' if len(missing) == 1 else 'They are'} in {some(holders)} only"


def controls_advice(controls: Sequence[Resolution], labels: Labels, resolver: Resolver) -> str:
    """What to do with labels that are named like controls: one label only can be the control."""
    if not controls:
        return ""
    alone = [r for r in controls if only_controls(r)]
    beside = [r for r in controls if not only_controls(r)]
    if may_be_the_control(controls, labels):
        name = alone[0].label
        return (
            f"{shown(name)}: if this is the control, --control-pert {shlex.quote(name)}; only one "
            "label can be, so give its cells that one"
        )
    texts = []
    if alone:
        what, whose = ("a control", "its") if len(alone) == 1 else ("controls", "their")
        names = some(r.label for r in alone)
        label = shown(labels.control) + (", as in the run" if labels.for_run else "")
        texts.append(f"{names}: {what}. Give {whose} cells the label {label}")
    if beside:
        names = some(r.label for r in beside)
        texts.append(f"{names}: a control beside a gene. Write {shown(labels.control)} for it")
    return ". ".join(texts) + relabel_controls(alone, beside, labels, resolver)


def may_be_the_control(controls: Sequence[Resolution], labels: Labels) -> bool:
    """Whether a name of controls may be that of the run's: of a list, or a file without it."""
    return (
        len(controls) == 1
        and letters(controls[0].label) in CONTROL_NAMES
        and labels.control not in labels.names
        and not labels.for_run
    )


def say_left_out(labels: Sequence[str], files: Iterable[str], column: str, where: str) -> str:
    """The warning of categories that no cell has, for which there is no vector."""
    n = len(labels)
    return (
        f"{count(n, 'label')} of no cell {have(n)} no embedding{where} ({some(labels)}; categories "
        f"of {some(files)}). cell-load gives {them(n)} zeros, which no cell uses. To be rid of "
        f"{them(n)}: adata.obs[{column!r}] = adata.obs[{column!r}].cat.remove_unused_categories()"
    )
