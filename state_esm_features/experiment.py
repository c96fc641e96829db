"""A cell-load TOML and the files that it names, as cell-load sees them.

No data file is opened here.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, Notes, count, did_you_mean, some, them
from state_esm_features.files import existing_file
from state_esm_features.option_groups import IN_SECTION, SECTION
from state_esm_features.options import as_words, left_to, read_table

if TYPE_CHECKING:
    from cell_load.config import ExperimentConfig


SPLITS = ("train", "val", "test")
"""Splits that a cell-load TOML may name (cell_load.config.ExperimentConfig.validate)."""

SECTIONS = ("datasets", "training", "zeroshot", "fewshot")
"""Sections of a TOML that cell-load reads; it ignores others."""

SETTINGS_GO = (
    "Settings of State stand at the end of the training's command line as KEY=VALUE, e.g. "
    "model.kwargs.cell_set_len=64"
)


def load_experiment(toml_path: Path) -> ExperimentConfig:
    """Parse a cell-load TOML with cell-load's own class.

    Raises
    ------
    InputError
        No such file, or not TOML (with line and column).
    """
    import toml
    from cell_load.config import ExperimentConfig

    existing_file(toml_path, "TOML")
    try:
        experiment = ExperimentConfig.from_toml(str(toml_path))
        sections = toml.loads(toml_path.read_text(encoding="utf-8"))
    except toml.TomlDecodeError as error:
        raise InputError(
            f"{toml_path}, line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        # the toml package leaks these on some malformed input
        raise InputError(f"{toml_path} is not valid TOML: {error}") from error
    for section in sections:
        known = (*SECTIONS, SECTION)
        meant = did_you_mean(section, known)
        if section not in known and meant:  # cell-load would ignore it, and hold nothing out
            raise InputError(f"{toml_path}: unknown section [{section}]{meant}")
    return experiment


def features_section(toml_path: Path | None) -> dict[str, Any]:
    """{option: value} in [features] of a TOML; what is no TOML is left to `load_experiment`.

    Raises
    ------
    InputError
        An option that cannot stand there, or a wrong value.
    """
    import toml

    try:
        table = toml.loads(Path(toml_path or "").read_text(encoding="utf-8")).get(SECTION, {})
    except Exception:  # the toml package leaks all kinds
        return {}
    try:
        return read_table(table, IN_SECTION)
    except InputError as error:
        raise InputError(f"{toml_path}: [{SECTION}] {error}") from error


def note_section(
    section: Mapping[str, Any], toml_path: Path, firmer: Collection[str], notes: Notes
) -> None:
    """Options that stand in a file are said, as those on the command line can be seen."""
    words = shlex.join(as_words(left_to(section, firmer), IN_SECTION))
    if words:
        notes.line(f"features  options of [{SECTION}] in {toml_path}: {words}")


def experiment_problems(experiment: ExperimentConfig) -> list[str]:
    """What is wrong with a TOML before any data file is opened.

    cell-load dies on these with a bare KeyError or TypeError, or ignores them in silence.
    """
    problems = []
    for section in SECTIONS:
        if not isinstance(getattr(experiment, section), dict):
            return [f"[{section}] must be a table, e.g. [{section}] on a line of its own"]
    for name, path in experiment.datasets.items():
        if not isinstance(path, str):
            problems.append(f"[datasets] {name} must be a path in quotes, got {path!r}")
    for name, split in experiment.training.items():
        if split != "train":
            wrong = f'[training] {name} = {split!r}: the only value is "train"'
            settings = f", and each name one of [datasets]. {SETTINGS_GO}"
            problems.append(wrong + ("" if name in experiment.datasets else settings))
    for section in ("zeroshot", "fewshot"):
        for key, value in getattr(experiment, section).items():
            problems += _held_out_problems(section, key, value)
    for name in sorted(set(map(str, experiment.get_all_datasets())) - set(experiment.datasets)):
        problems.append(
            f"dataset {name!r} is used but has no path under [datasets]"
            + did_you_mean(name, experiment.datasets)
        )
    return problems


def _held_out_problems(section: str, key: str, value: object) -> list[str]:
    """A key of [zeroshot] or [fewshot] must be one quoted string, "dataset.cell_type"."""
    if "." in key:
        if isinstance(value, dict) != (section == "fewshot"):
            return [f'[{section}] "{key}" = {value!r} is not understood']
        if isinstance(value, dict):
            return _fewshot_split_problems(key, value)
        wrong = f'[zeroshot] "{key}" = {value!r}: unknown split, use val or test'
        return [] if value in SPLITS else [wrong]
    if isinstance(value, dict) and value and not set(value) & set(SPLITS):
        # an unquoted a.b = ... is a nested table in TOML
        cell_type = next(iter(value))
        right = f'[fewshot."{key}.{cell_type}"]'
        if section == "zeroshot":
            right = f'"{key}.{cell_type}" = "{value[cell_type]}"'
        return [f"[{section}] {key}.{cell_type} needs quotes around the whole name: {right}"]
    return [f'[{section}] "{key}" names no cell type: write "{key}.CELL_TYPE"']


def _fewshot_split_problems(key: str, splits: Mapping[str, Any]) -> list[str]:
    problems = []
    for split, labels in splits.items():
        if split not in SPLITS:
            problems.append(f'[fewshot."{key}"] {split}: unknown split, use val or test')
        elif not (isinstance(labels, list) and all(isinstance(x, str) for x in labels)):
            problems.append(f'[fewshot."{key}"] {split} must be a list of labels in quotes')
    return problems


def unread_parts(sections: Mapping[str, Any]) -> list[str]:
    """What stands in a TOML and is read by neither cell-load nor these scripts, to be said once.

    What has no path, no such split or no such dataset is a problem: see `experiment_problems`.
    """
    names = [
        f"[{name}]" if isinstance(content, Mapping) else f"{name} (in no section)"
        for name, content in sections.items()
        if name not in (*SECTIONS, SECTION)
    ]
    texts = [f"nothing reads {some(names)}. {SETTINGS_GO}"] if names else []
    # PerturbationDataModule._split_fewshot_celltype: all that val and test do not name trains
    fewshot = sections.get("fewshot", {})
    lists = [f'[fewshot."{key}"]' for key, kept in fewshot.items() if "train" in kept]
    if lists:
        texts.append(
            f"{some(lists)} train: cell-load ignores this list. Every perturbation of the cell "
            "type that val and test do not name trains"
        )
    return texts


def expand_braces(pattern: str) -> list[str]:
    """'x/{a,b}.h5' -> ['x/a.h5', 'x/b.h5'], for any number of braces, as cell-load does it."""
    match = re.search(r"\{([^}]+)\}", pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [
        p for option in match[1].split(",") for p in expand_braces(head + option.strip() + tail)
    ]


def dataset_files(path: str, recursive: bool = False) -> list[Path]:
    """Every .h5 and .h5ad file that a path of [datasets] stands for, in cell-load's order.

    With `recursive` what ** of an absolute path would stand for, which cell-load takes for *.

    The same rule as `PerturbationDataModule._find_dataset_files` (importing that takes four
    seconds), but for one point: cell-load keys files by their stem, so that of two files of
    one stem it reads only the last. Here both are returned; see `files_cell_load_reads`.
    """
    if not any(character in path for character in "*?[]{}"):
        if Path(path).is_file():
            return [Path(path)]
        return [f for ext in ("*.h5", "*.h5ad") for f in sorted(Path(path).glob(ext))]
    files: list[Path] = []
    for branch in expand_braces(str(Path(path))):
        patterns = [branch]
        if not branch.endswith((".h5", ".h5ad")):
            patterns = [f"{branch.rstrip('/')}/{ext}" for ext in ("*.h5", "*.h5ad")]
        for pattern in patterns:
            files += matching(pattern, branch.startswith("/"), recursive)
    return files


def matching(pattern: str, absolute: bool, recursive: bool = False) -> list[Path]:
    """What a pattern matches, in cell-load's order: it gives absolute patterns to glob.glob, for
    which ** is * unless `recursive`, and relative ones to Path.glob, for which it is any number of
    folders. An empty branch of braces is relative, though its pattern begins with /."""
    if absolute:
        return [Path(f) for f in sorted(glob.glob(pattern, recursive=recursive))]  # noqa: PTH207
    return sorted(Path().glob(pattern))


def files_cell_load_reads(path: str) -> list[Path]:
    """The files of one dataset that cell-load really reads: of one stem, the last."""
    return list({f.stem: f for f in dataset_files(path)}.values())


CELLS = re.compile(r".*\.(h5|h5ad|h5mu|hdf5|loom|zarr)(\.(gz|bz2|xz|zst|zip))?", re.IGNORECASE)
"""Names of files that hold cells; cell-load reads .h5 and .h5ad, in small letters."""

MOST_FOLDERS = 1000
"""So many sub-folders of a dataset's folder are searched for files that are not read."""


def searched(path: str) -> list[Path]:
    """`dataset_files`, but none for a path that cell-load would die of."""
    with contextlib.suppress(NotImplementedError, ValueError):
        return dataset_files(path)
    return []


def folders_searched(path: str) -> list[Path]:
    """The folders whose .h5 and .h5ad files a path of [datasets] means."""
    if not any(character in path for character in "*?[]{}"):
        return [Path(path)] if Path(path).is_dir() else []
    folders: list[Path] = []
    for branch in expand_braces(str(Path(path))):
        if not branch.endswith((".h5", ".h5ad")):
            folders += matching(branch, branch.startswith("/"))
    return [f for f in dict.fromkeys(folders) if f.is_dir()]


def other_endings(path: str) -> list[Path]:
    """Files of cells in the folders of a dataset whose name cell-load passes over."""
    folders = [f for f in folders_searched(path) if os.access(f, os.R_OK)]
    entries = sorted(entry for folder in folders for entry in folder.iterdir())
    read = {*searched(path)}
    return [e for e in entries if CELLS.fullmatch(e.name) and e not in read]


def deeper_files(path: str) -> list[Path]:
    """Files that a person may mean, and cell-load does not read: in sub-folders, or under **."""
    found: dict[Path, None] = {}
    if "**" in path:
        found |= dict.fromkeys(dataset_files(path, recursive=True))
    else:
        walks = itertools.chain(*(os.walk(folder) for folder in folders_searched(path)))
        for folder, below, names in itertools.islice(walks, MOST_FOLDERS):
            below[:] = sorted(b for b in below if not b.startswith(".") and not b.endswith(".zarr"))
            files = sorted(n for n in names if n.endswith((".h5", ".h5ad")) and n[0] != ".")
            found |= dict.fromkeys(Path(folder) / name for name in files)
    read = {*searched(path)}
    return [f for f in found if f not in read]


def brace_path(files: Sequence[Path]) -> str:
    """One path of [datasets] that means these files, 'data/{a,sub/b}.h5ad', or nothing."""
    if len(files) == 1:
        return str(files[0])
    top = Path(os.path.commonpath([f.parent for f in files]))
    endings = {f.suffix for f in files}
    ending = endings.pop() if len(endings) == 1 else ""
    names = (str(f.relative_to(top)).removesuffix(ending) for f in files)
    path = str(top / f"{{{','.join(names)}}}{ending}")
    return path if searched(path) == [*files] else ""


def path_of_all(path: str, files: Sequence[Path]) -> str:
    """A path of [datasets] that means all these files, tried, or an advice in words."""
    relative = os.path.relpath(path)
    below = relative if "**" in relative else f"{relative}/**"
    wanted = {f.resolve() for f in files}
    for candidate in (below, brace_path(files) if len(files) <= 10 else ""):
        if candidate and {f.resolve() for f in searched(candidate)} == wanted:
            return f"the path {candidate}"
    return "a list of them in braces, {a,b}"


def find_data_files(
    experiment: ExperimentConfig, toml_path: Path, notes: Notes
) -> tuple[dict[str, list[Path]], list[str]]:
    """Files of every dataset used by a TOML, and what is wrong with its paths.

    What the TOML or its paths seem to mean and nothing reads is noted.

    Returns
    -------
    files
        {dataset name: files that cell-load reads}, datasets in the order of [datasets].
    problems
        Datasets without a file. Where the path would work relative to the TOML, it says so:
        cell-load reads it relative to the working directory.
    """
    import toml

    for text in unread_parts(toml.loads(toml_path.read_text(encoding="utf-8"))):
        notes.warn(f"{toml_path}: {text}")
    files: dict[str, list[Path]] = {}
    problems = []
    used = experiment.get_all_datasets()
    for name, path in experiment.datasets.items():
        if name not in used:
            notes.warn(
                f"dataset {name!r} is in [datasets] but not in [training], [zeroshot] or "
                "[fewshot]: not read"
            )
            continue
        try:
            files[name] = files_cell_load_reads(path)
        except (NotImplementedError, ValueError) as error:  # cell-load dies of these
            problems.append(f"dataset {name!r}: path {path!r} cannot be searched: {error}")
            continue
        for branch in expand_braces(path):
            if files[name] and not dataset_files(branch):
                notes.warn(
                    f"dataset {name!r}: {branch} matches no file; cell-load goes on without it"
                )
        hidden = sorted({*dataset_files(path)} - {*files[name]})
        if hidden:
            notes.warn(
                f"dataset {name!r}: cell-load keeps one file per name and does not read "
                f"{some(hidden)}; rename {them(len(hidden))}"
            )
        if not files[name]:
            problems.append(_no_file_message(name, path, toml_path))
    read = {f.resolve() for found in files.values() for f in found}
    for name in files:
        for text in _files_passed_over(experiment.datasets[name], files[name], read):
            notes.warn(f"dataset {name!r}: {text}")
    return files, problems


def _files_passed_over(path: str, files: Sequence[Path], read: Collection[Path]) -> list[str]:
    """What to say of files that seem to be of a dataset and are read by none, and of hidden ones.

    Nothing of a dataset without any file, of which `_no_file_message` says it.
    """
    if not files:
        return []
    texts = []
    others = [f for f in other_endings(path) if f.resolve() not in read]
    if others:
        texts.append(
            f"cell-load reads what is named .h5 or .h5ad, not {some(others)}. Convert "
            f"or rename {them(len(others))}, or move {them(len(others))} out of the folder"
        )
    deeper = [f for f in deeper_files(path) if f.resolve() not in read]
    if deeper:
        texts.append(
            f"{_why_not_deeper(path)}: {count(len(deeper), 'file')} not read "
            f"({some(deeper)}). To read {them(len(deeper))} too, give "
            f"{path_of_all(path, [*files, *deeper])}"
        )
    dotted = [str(f) for f in files if f.name.startswith(".")]
    if dotted:
        texts.append(
            f"cell-load reads hidden files too: {some(dotted)}. If that is not meant, move "
            f"{them(len(dotted))} out of the folder"
        )
    return texts


def _why_not_deeper(path: str) -> str:
    if "**" in path:
        return "in an absolute path cell-load takes ** for *"
    return "cell-load does not look into sub-folders"


def _no_file_message(name: str, path: str, toml_path: Path) -> str:
    message = f"dataset {name!r}: no .h5 or .h5ad file at {path}"
    others, deeper = other_endings(path), deeper_files(path)
    if Path(path).is_symlink():
        return f"{message}, which is a link to {Path(path).readlink()}, where nothing is"
    if deeper:
        return (
            f"{message}: {_why_not_deeper(path)}. To read {some(deeper)}, give "
            f"{path_of_all(path, deeper)}"
        )
    if others:
        return f"{message}, but {some(others)}: convert or rename {them(len(others))}"
    whole = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111
    for meant in (whole, f"{path}.h5ad", f"{path}.h5"):
        if meant != path and searched(meant):
            return f"{message}: cell-load takes a path as it is written. Write {meant}"
    if Path(path).is_dir():
        return f"{message}: the folder holds none; correct the path in {toml_path}"
    if Path(path).is_absolute():
        return f"{message}; correct the path in {toml_path}"
    message += f" (relative to the working directory {Path.cwd()})"
    beside = toml_path.resolve().parent
    if searched(str(beside / path)):
        return (
            f"{message}. It exists relative to the TOML: run from {beside}, "
            "or make the path absolute"
        )
    return f"{message}; correct the path in {toml_path}, or run from the folder it starts in"


def leave_out(odd: Sequence[Path], by_dataset: Mapping[str, Sequence[Path]]) -> str:
    """What to do if files of a dataset are none of the training, such as a template to predict."""
    name, files = next((n, files) for n, files in by_dataset.items() if odd[0] in files)
    rest = [f for f in files if f not in odd]
    if not rest:
        return ""
    path = brace_path(rest) if len(rest) <= 10 else ""
    return (
        f". If {some(odd)} {'is' if len(odd) == 1 else 'are'} not to be trained on (a "
        f"template to predict, say), move {them(len(odd))} out, or give "
        + (f"{name} = {json.dumps(path, ensure_ascii=False)}" if path else "the files in braces")
    )


def absolute_paths(experiment: ExperimentConfig, notes: Notes) -> dict[str, str]:
    """{dataset: absolute path}, so that the run works from any folder."""
    datasets = {}
    for name, path in experiment.datasets.items():
        whole = str(Path.cwd() / path)
        same = [f.resolve() for f in dataset_files(whole)] == [
            f.resolve() for f in dataset_files(path)
        ]
        datasets[name] = whole if same else path
        if not same:  # hidden files and ** mean other things in absolute patterns
            notes.warn(
                f"the run keeps the relative path {path}: run state tx predict from {Path.cwd()}"
            )
    return datasets


def toml_text(experiment: ExperimentConfig, datasets: Mapping[str, str]) -> str:
    """The experiment as a cell-load TOML, with these paths."""
    import toml

    return toml.dumps(vars(experiment) | {"datasets": dict(datasets)})
