"""The perturbation labels of TOMLs, .h5ad files and gene lists, and the control among them.

What they mean is not known here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import h5ad
from state_esm_features.console import (
    InputError,
    Notes,
    count,
    did_you_mean,
    one_error,
    shown,
    some,
    them,
)
from state_esm_features.embedding.resolve import CONTROL_GUIDES, CONTROL_NAMES, letters
from state_esm_features.experiment import (
    experiment_problems,
    find_data_files,
    leave_out,
    load_experiment,
)
from state_esm_features.files import data_file_origin, existing_file, sha256_of
from state_esm_features.option_groups import GENE_LIST_COLUMNS, PERT_COLUMNS, LabelOptions

if TYPE_CHECKING:
    from cell_load.config import ExperimentConfig


@dataclass
class Labels:
    """Perturbation labels of a run, each once, in the order in which they were found.

    Attributes
    ----------
    control
        The control label.
    names
        Every label, the control included.
    holders
        {label: inputs that have it}.
    columns
        {data file: its obs column of labels}.
    in_no_cell
        {input: labels of it that no cell has}, as far as it is known.
    inputs
        Where they come from, as in the manifest.
    fewshot_only
        Labels that [fewshot] holds out but no file holds.
    for_run
        They are for a trained run, whose control and sources cannot be chosen any more.
    """

    control: str
    names: dict[str, None] = field(default_factory=dict)
    holders: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    in_no_cell: dict[str, Collection[str]] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    fewshot_only: list[str] = field(default_factory=list)
    for_run: bool = False

    @property
    def column(self) -> str | None:
        """The obs column of the labels, if a data file was read."""
        return next(iter(self.columns.values()), None)

    def add(self, labels: Iterable[str], **origin: Any) -> None:
        """Add the labels of one input, in their order."""
        found = list(dict.fromkeys(labels))
        self.names.update(dict.fromkeys(found))
        self.inputs.append({**origin, "labels": len(found)})
        for label in found:
            self.holders.setdefault(label, []).append(str(origin["path"]))

    def add_file(self, path: Path, column: str, labels: Iterable[str]) -> None:
        """Add the labels in an obs column of a data file."""
        self.columns[str(path)] = column
        self.add(labels, **data_file_origin(path))

    def unused(self, path: str) -> Collection[str]:
        """Labels of an input that no cell has: no training and no prediction reads their vector.

        Cells are read when this is asked: only if a label is missing.
        """
        if path not in self.in_no_cell:
            column = self.columns.get(path)
            self.in_no_cell[path] = h5ad.labels_in_no_cell(Path(path), column) if column else ()
        return self.in_no_cell[path]

    def needed_in(self, label: str) -> list[str]:
        """The inputs that need a vector for a label."""
        return [path for path in self.holders[label] if label not in self.unused(path)]


NAME_CONTROL = "Name it with --control-pert"


def relabelling(
    whole: Iterable[str], guides: Iterable[str], control: str, column: str
) -> tuple[str, Callable[[str], str]]:
    """The line of pandas that makes `control` of whole labels, and of guides that are parts of one.

    Returns
    -------
    line
        Nothing if it would be long.
    renamed
        What it makes of a label, to be tried on all.
    """

    def patterns(names: Iterable[str]) -> list[str]:
        return sorted({re.sub(r"\d+", r"\\d+", plain_regex(name)) for name in names})

    alone, steps = patterns(whole), patterns(guides)
    if alone:
        steps.insert(0, f"^{alone[0]}$" if len(alone) == 1 else f"^({'|'.join(alone)})$")

    def renamed(label: str) -> str:
        for pattern in steps:
            label = re.sub(pattern, lambda _: control, label)
        return label

    obs = f"adata.obs[{column!r}]"
    replaced = "".join(f".str.replace(r'{p}', {control!r}, regex=True)" for p in steps)
    short_enough = len(alone) + len(steps) <= 6
    return f"{obs} = {obs}{replaced}.astype('category')" if short_enough else "", renamed


def plain_regex(text: str) -> str:
    """A text as a regular expression, with no more backslashes than it needs."""
    return re.sub(r"\\([ #&~-])", r"\1", re.escape(text))


def require_control(
    control: str, labels: Sequence[str], path: Path, column: str, advice: str = NAME_CONTROL
) -> None:
    """cell-load refuses a file without control cells; say which label was probably meant."""
    if control in labels:
        return
    guides = [x for x in labels if CONTROL_GUIDES.fullmatch(letters(x))]
    hint = did_you_mean(control, labels)
    if usual := [x for x in labels if re.search(r"control|ctrl|non.?targ|^nt", x, re.IGNORECASE)]:
        hint = f" (did you mean {some(usual)}?)"
    if control in map(str.strip, labels):
        obs = f"adata.obs[{column!r}]"
        advice = f"Take the blanks away: {obs} = {obs}.str.strip().astype('category')"
    elif len(guides) > 1 and not {*map(letters, guides)} <= CONTROL_NAMES:
        line, renamed = relabelling(guides, (), control, column)
        exact = line and all((renamed(x) == control) == (x in guides) for x in labels)
        hint = ""
        advice = (
            f"{some(guides)}: named like controls, but only one label can be the control. Give "
            f"their cells the label {shown(control)}" + (f": {line}" if exact else "")
        )
    raise InputError(
        f"{path}: no cell has the control label {control!r} in obs column {column!r}{hint}. "
        f"{advice}; labels: {some(sorted(labels)) or 'none'}"
    )


def label_column(paths: Sequence[Path], pert_col: str | None) -> str:
    """The one obs column of all these files that has the labels."""
    return h5ad.find_column(h5ad.columns_of(paths), pert_col, PERT_COLUMNS, "--pert-col")


def add_toml_labels(labels: Labels, toml_path: Path, pert_col: str | None, notes: Notes) -> None:
    """Add every label that cell-load would read for a TOML, and those that [fewshot] names."""
    experiment = load_experiment(toml_path)
    problems = experiment_problems(experiment)
    if problems:
        raise one_error([f"{toml_path}: {p}" for p in problems])
    by_dataset, problems = find_data_files(experiment, toml_path, notes)
    if problems:
        raise one_error(problems)
    files = list(dict.fromkeys(f for found in by_dataset.values() for f in found))
    if not files:
        raise InputError(f"{toml_path}: [training], [zeroshot] and [fewshot] name no dataset")
    try:
        column = label_column(files, pert_col)
    except h5ad.LacksColumn as error:
        raise InputError(f"{error}{leave_out(error.files, by_dataset)}") from error
    advice = "Give its control cells that label, as in the run" if labels.for_run else NAME_CONTROL
    in_files, unreadable = {}, {}
    for path in files:
        with h5ad.open_h5ad(path) as file:
            in_files[path], _ = h5ad.open_labels(file, column)
            unreadable[path] = h5ad.find_unreadable(file, {f"obs/{column}": "labels"})
        require_control(labels.control, in_files[path], path, column, advice)
    for problem in h5ad.storage_problems(unreadable):
        notes.warn(problem)
    add_labels_found(labels, in_files, column, experiment, toml_path)
    if labels.fewshot_only:
        notes.warn(names_of_no_file(labels.fewshot_only, {x for f in in_files.values() for x in f}))


def add_labels_found(
    labels: Labels,
    in_files: Mapping[Path, Sequence[str]],
    column: str,
    experiment: ExperimentConfig,
    toml_path: Path,
) -> None:
    """Add the labels of the files of a TOML, and those that its [fewshot] names."""
    for path, found in in_files.items():
        labels.add_file(path, column, found)
    splits = [split for kept in experiment.fewshot.values() for split in kept.items()]
    named = [x for _, names in splits for x in names]
    labels.in_no_cell[str(toml_path)] = set(named)
    labels.add(named, path=str(toml_path), kind="toml", sha256=sha256_of(toml_path))
    held_out = {x for split, names in splits if split != "train" for x in names}
    labels.fewshot_only += sorted(held_out.difference(*in_files.values()))


def names_of_no_file(names: Sequence[str], known: Collection[str]) -> str:
    """What to say of labels that [fewshot] holds out and no file has: a list made beforehand."""
    guides = {name: labels for name in names if (labels := guides_of(name, known))}
    listed = [f"{shown(x)}{'' if x in guides else did_you_mean(x, known)}" for x in names[:5]]
    remedy = f"Remove {them(len(names))}"
    if guides:
        name, labels = next(iter(guides.items()))
        written = ", ".join(f'"{label}"' for label in labels[:5])
        remedy = "Labels of their guides are there. Name these as they stand in the data: for "
        remedy += f"{name} write {written}{', ...' if len(labels) > 5 else ''}"
        remedy += ". Remove the others" if len(guides) < len(names) else ""
    return (
        f"[fewshot] names {count(len(names), 'label')} that no file has "
        f"({some([*listed, *names[5:]])}): cell-load holds nothing out for {them(len(names))}. "
        f"{remedy}"
    )


def guides_of(gene: str, labels: Iterable[str]) -> list[str]:
    """Labels that look like guides of a gene: STAT1_g2, STAT1-2 or sgSTAT1 of STAT1."""
    pattern = re.compile(rf"(sg)?{re.escape(gene)}([_-](sg|g|guide)?\d+|_.+)?", re.IGNORECASE)
    return sorted(x for x in labels if x.lower() != gene.lower() and pattern.fullmatch(x))


def read_gene_list(path: Path, pert_col: str | None, notes: Notes) -> list[str]:
    """Labels of a gene list: .txt one a line (# starts a comment), or a column of .csv/.tsv.

    Windows line ends, a byte-order mark, blank lines and duplicates do no harm.
    """
    existing_file(path, "gene list")
    delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            if delimiter is None:
                values = [line.split("#", 1)[0].strip() for line in f.read().splitlines()]
            else:
                rows = csv.DictReader(f, delimiter=delimiter)
                column = _gene_list_column(path, list(rows.fieldnames or []), pert_col)
                values = [(row[column] or "").strip() for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"gene list {path} is not plain text in UTF-8: {error}") from error
    genes = [v for v in values if v]
    if not genes:
        raise InputError(f"gene list {path} is empty; put one label on each line")
    repeated = len(genes) - len(set(genes))
    if repeated:
        notes.line(f"{path}: {count(repeated, 'repeated label')} left out")
    return genes


def _gene_list_column(path: Path, header: list[str], pert_col: str | None) -> str:
    if pert_col in header:
        return str(pert_col)
    found = [c for c in GENE_LIST_COLUMNS if c in header]
    if len(found) == 1:
        return found[0]
    problem = f"more than one label column ({', '.join(found)})" if found else "no label column"
    raise InputError(
        f"gene list {path} has {problem}; columns: {some(header, 20)}. Name it with --pert-col, "
        "or give a .txt with one label a line"
    )


def collect_labels(options: LabelOptions, notes: Notes, for_run: bool = False) -> Labels:
    """Every label that is asked for, but for --all-genes."""
    labels = Labels(control=options.control_pert, for_run=for_run)
    if options.from_toml:
        add_toml_labels(labels, options.from_toml, options.pert_col, notes)
    if options.adata:
        column = label_column(options.adata, options.pert_col)
        for path in options.adata:
            with h5ad.open_h5ad(path) as file:
                labels.add_file(path, column, h5ad.open_labels(file, column)[0])
    for path in options.gene_list:
        labels.add(
            read_gene_list(path, options.pert_col, notes),
            path=str(path),
            kind="gene-list",
            sha256=sha256_of(path),
        )
    return labels
