# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "anndata>=0.11.4",
#     "arc-state>=0.11.1",
#     "cell-load>=0.10.4",
#     "fair-esm>=2.0.0",
#     "h5py>=3.11",
#     "huggingface-hub>=1.0",
#     "numpy>=2.2.6",
#     "pandas>=2.2.3",
#     "scanpy>=1.11.2",
#     "toml>=0.10.2",
#     "torch>=2.7",
#     "tqdm>=4.67.1",
# ]
# ///
"""Look up the ESM2 embedding of every perturbation of a Perturb-seq screen.

State takes one vector per perturbation. This script collects the perturbation labels that
cell-load would read for a TOML, finds the protein embedding of each, and writes one file
that cell-load takes as `perturbation_features_file`:

    python create_esm_pert_features.py --from-toml my_config.toml --output ESM2_pert_features.pt
    python train_with_esm_features.py --config my_config.toml --pert-features ESM2_pert_features.pt

Written, whole or not at all: FILE.pt (a dict {label: float32 vector}) and FILE.pt.json (the
manifest: where every vector comes from). The path of FILE.pt is printed on stdout.

Exit codes: 0 done, 1 bad data (nothing is written), 2 usage, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import errno
import glob
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h5py
    import torch
    from cell_load.config import ExperimentConfig

__version__ = "0.1.0"

DEFAULT_CONTROL = "non-targeting"
"""Label of control cells in the Virtual Cell Challenge and in cell-load."""

PERT_COLUMNS = ("target_gene", "gene", "perturbation", "condition", "perturbed_gene", "pert")
"""obs columns in which Perturb-seq files keep the perturbation; exactly one must be there."""

GENE_LIST_COLUMNS = (*PERT_COLUMNS, "symbol", "gene_symbol")
"""Columns of a .csv or .tsv gene list that may hold the labels."""

SPLITS = ("train", "val", "test")
"""Splits that a cell-load TOML may name (cell_load.config.ExperimentConfig.validate)."""

SECTIONS = ("datasets", "training", "zeroshot", "fewshot")
"""Sections of a TOML that cell-load reads; it ignores others."""

ARC_REPOSITORY = "arcinstitute/SE-600M"
ARC_FILE = "protein_embeddings.pt"
ARC_BYTES = 410_886_729
ARC_SHA256 = "a210e1cc7901513999b2bca3836ba9e2f203cd008be4e9a9d6412a2267de9748"
"""Arc's table of 19,790 human genes x 5,120 (ESM2 15B): the file that the Virtual Cell
Challenge ships as ESM2_pert_features.pt, byte for byte."""

MANIFEST_FORMAT = 1

log = logging.getLogger("esm_pert_features")


class InputError(Exception):
    """Something the user can mend: ends the run in one message on stderr, without traceback."""


# ---------------------------------------------------------------------------------------------
# What both scripts share: messages, exit codes, hashes, whole files
# ---------------------------------------------------------------------------------------------


def some(items: Iterable[str], limit: int = 5) -> str:
    """First items of a list for a message: 'A, B, C, D, E, ...'."""
    shown = list(items)
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")


def count(n: int, noun: str) -> str:
    """'1 label', '2,024 labels'."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean A, B?)' for the names nearest to `name`, or nothing."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(by_lower[n] for n in near)}?)" if near else ""


def one_error(problems: Sequence[str]) -> InputError:
    """Fold every problem found into one error, so that they are mended in one go."""
    if len(problems) == 1:
        return InputError(problems[0])
    return InputError("\n  - ".join([f"{len(problems)} problems:", *problems]))


def warn(message: str) -> None:
    """Say something that does not stop the run."""
    log.warning("warning: %s", message)


def start_log(quiet: bool) -> None:
    """Send messages to stderr; `quiet` keeps warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), so that half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(step: Callable[[], int]) -> int:
    """Run `step` and translate how it ended into the documented exit codes."""
    try:
        with sigterm_as_exit():
            return step()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if stop.code != 143:
            raise
        print("stopped by SIGTERM", file=sys.stderr)
        return 143


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def staged(path: Path, write: Callable[[Any], Any]) -> Iterator[Path]:
    """Write a temporary file in the folder of `path`; it takes that name when the block ends.

    Parameters
    ----------
    path
        Where the file shall be; what is there stays untouched until the block ends well.
    write
        Called with the open binary file, which is synced to disk afterwards.

    Yields
    ------
    temporary
        The complete new file.

    Raises
    ------
    InputError
        The folder cannot be written, or the disk is full.
    """
    temporary = None
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as f:
            temporary = Path(f.name)
            write(f)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only the owner can read
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        # torch's zip writer hides what stopped it, a full disk or Ctrl-C, behind a RuntimeError
        cause = error
        while isinstance(cause, RuntimeError) and cause.__context__ is not None:
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise cause  # noqa: B904
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise InputError(
            f"cannot write {path}: {cause.strerror}; nothing was changed. "
            + ("Free some space there, or choose" if full else "Choose")
            + " another place for it"
        ) from error


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file whole or not at all; see `staged`."""
    with staged(path, write):
        pass


def as_json(content: Mapping[str, Any]) -> bytes:
    """JSON text, keys in the order given."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, lambda f: f.write(as_json(content)))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is none to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def manifest_path(features: Path) -> Path:
    """FILE.pt -> FILE.pt.json."""
    return features.with_name(features.name + ".json")


def read_manifest(features: Path) -> dict[str, Any] | None:
    """The manifest of a features file, or None if there is none or it is another file's."""
    manifest = read_json(manifest_path(features))
    if manifest is None or manifest.get("format") != MANIFEST_FORMAT:
        return None
    return manifest if manifest.get("features_sha256") == sha256_of(features) else None


def existing_file(path: str | Path, what: str) -> Path:
    """`path` if it is a file, else an error that says what was looked for and from where."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give the file itself")
    if not path.is_file():
        where = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise InputError(f"no such {what}: {path}{where}")
    return path


# ---------------------------------------------------------------------------------------------
# The TOML and the files it names, as cell-load sees them
# ---------------------------------------------------------------------------------------------


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
        meant = did_you_mean(section, SECTIONS)
        if section not in SECTIONS and meant:  # cell-load would ignore it, and hold nothing out
            raise InputError(f"{toml_path}: unknown section [{section}]{meant}")
    return experiment


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
            problems.append(f'[training] {name} = {split!r}: the only value is "train"')
    for key, split in experiment.zeroshot.items():
        problems += _held_out_key_problems("zeroshot", key, split)
        if "." in key and not isinstance(split, dict) and split not in SPLITS:
            problems.append(f'[zeroshot] "{key}" = {split!r}: unknown split, use val or test')
    for key, splits in experiment.fewshot.items():
        problems += _held_out_key_problems("fewshot", key, splits)
        if "." in key and isinstance(splits, dict):
            problems += _fewshot_split_problems(key, splits)
    for name in sorted(set(map(str, experiment.get_all_datasets())) - set(experiment.datasets)):
        problems.append(
            f"dataset {name!r} is used but has no path under [datasets]"
            + did_you_mean(name, experiment.datasets)
        )
    return problems


def _held_out_key_problems(section: str, key: str, value: object) -> list[str]:
    """A key of [zeroshot] or [fewshot] must be one quoted string, "dataset.cell_type"."""
    if "." in key:
        shape_ok = isinstance(value, dict) == (section == "fewshot")
        return [] if shape_ok else [f'[{section}] "{key}" = {value!r} is not understood']
    if isinstance(value, dict) and value and not set(value) & set(SPLITS):
        # an unquoted a.b = ... is a nested table in TOML
        cell_type = next(iter(value))
        right = (
            f'"{key}.{cell_type}" = "{value[cell_type]}"'
            if section == "zeroshot"
            else f'[fewshot."{key}.{cell_type}"]'
        )
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


def expand_braces(pattern: str) -> list[str]:
    """'x/{a,b}.h5' -> ['x/a.h5', 'x/b.h5'], for any number of braces, as cell-load does it."""
    match = re.search(r"\{([^}]+)\}", pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [
        p for option in match[1].split(",") for p in expand_braces(head + option.strip() + tail)
    ]


def dataset_files(path: str) -> list[Path]:
    """Every .h5 and .h5ad file that a path of [datasets] stands for, in cell-load's order.

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
            if branch.startswith("/"):
                files += [Path(f) for f in sorted(glob.glob(pattern))]  # noqa: PTH207
            else:
                files += sorted(Path().glob(pattern))
    return files


def files_cell_load_reads(path: str) -> list[Path]:
    """The files of one dataset that cell-load really reads: of one stem, the last."""
    return list({f.stem: f for f in dataset_files(path)}.values())


def find_data_files(
    experiment: ExperimentConfig, toml_path: Path
) -> tuple[dict[str, list[Path]], list[str]]:
    """Files of every dataset used by a TOML, and what is wrong with its paths.

    Returns
    -------
    files
        {dataset name: files that cell-load reads}, datasets in the order of [datasets].
    problems
        Datasets without a file. Where the path would work relative to the TOML, it says so:
        cell-load reads it relative to the working directory.
    """
    files: dict[str, list[Path]] = {}
    problems = []
    used = experiment.get_all_datasets()
    for name, path in experiment.datasets.items():
        if name not in used:
            warn(
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
                warn(f"dataset {name!r}: {branch} matches no file; cell-load goes on without it")
        hidden = sorted({*dataset_files(path)} - {*files[name]})
        if hidden:
            warn(
                f"dataset {name!r}: cell-load keeps one file per name and does not read "
                f"{some(map(str, hidden))}; rename {'it' if len(hidden) == 1 else 'them'}"
            )
        if not files[name]:
            problems.append(_no_file_message(name, path, toml_path))
    return files, problems


def _no_file_message(name: str, path: str, toml_path: Path) -> str:
    message = f"dataset {name!r}: no .h5 or .h5ad file at {path}"
    if Path(path).is_absolute():
        return f"{message}; correct the path in {toml_path}"
    message += f" (relative to the working directory {Path.cwd()})"
    beside = toml_path.resolve().parent
    if dataset_files(str(beside / path)):
        return (
            f"{message}. It exists relative to the TOML: run from {beside}, "
            "or make the path absolute"
        )
    return f"{message}; correct the path in {toml_path}, or run from the folder it starts in"


# ---------------------------------------------------------------------------------------------
# Labels: what stands in the data
# ---------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """Perturbation labels of a run, each once, in the order in which they were found.

    Attributes
    ----------
    control
        The control label.
    names
        Every label, the control included.
    inputs
        Where they come from, as in the manifest.
    fewshot_only
        Labels that [fewshot] names but no file holds: probable typos.
    """

    control: str
    names: dict[str, None] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    fewshot_only: list[str] = field(default_factory=list)

    def add(self, labels: Iterable[str], **origin: Any) -> None:
        found = list(dict.fromkeys(labels))
        self.names.update(dict.fromkeys(found))
        self.inputs.append({**origin, "labels": len(found)})


@contextlib.contextmanager
def open_h5ad(path: Path) -> Iterator[h5py.File]:
    """Open an .h5ad file for reading and make sure that it has an obs group."""
    import h5py

    existing_file(path, "data file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: it is damaged, cut short or not an HDF5 file ({error})"
        ) from error
    with file:
        if not isinstance(file.get("obs"), h5py.Group):
            raise InputError(
                f"{path} has no obs table that cell-load can read; "
                "write it again with a current anndata"
            )
        yield file


def obs_columns(file: h5py.File) -> list[str]:
    """Columns of obs, without the index and the bookkeeping of old anndata versions."""
    index = file["obs"].attrs.get("_index", "_index")
    return sorted(set(file["obs"]) - {index, "_index", "__categories"})


def find_column(
    columns: Mapping[Path, Sequence[str]],
    wanted: str | None,
    candidates: Sequence[str],
    flag: str,
) -> str:
    """The one obs column to use in all files: `wanted`, or the only candidate they share.

    Parameters
    ----------
    columns
        {file: its obs columns}
    wanted
        What the user asked for, or None to look for one.
    candidates
        Usual names of such a column.
    flag
        The option that names it, for the error.

    Raises
    ------
    InputError
        The column is missing from a file, or there is none or more than one candidate.
    """
    for path, there in columns.items():
        if wanted is not None and wanted not in there:
            raise InputError(
                f"{path} has no obs column {wanted!r}{did_you_mean(wanted, there)}; "
                f"columns: {some(there, 20)}. Choose one with {flag}"
            )
    if wanted is not None:
        return wanted
    shared = [c for c in candidates if all(c in there for there in columns.values())]
    if len(shared) == 1:
        return shared[0]
    path, there = next(iter(columns.items()))
    if shared:
        raise InputError(
            f"{path} has more than one obs column that could be meant: {', '.join(shared)}. "
            f"Choose one with {flag}"
        )
    usual = f"no obs column {', '.join(candidates[:4])} ..."
    if len(columns) == 1:
        raise InputError(f"{path} has {usual}; columns: {some(there, 20)}. Choose one with {flag}")
    raise InputError(
        f"{path} and {count(len(columns) - 1, 'more file')}: {usual} in common; "
        f"columns of the first: {some(there, 20)}. Choose one with {flag}"
    )


def read_categories(file: h5py.File, column: str) -> list[str]:
    """Labels of a categorical obs column, as cell-load decodes them; reads no cell.

    Unused categories are labels too: cell-load takes them all for perturbations.
    """
    node = file["obs"][column]
    fix = f"adata.obs[{column!r}] = adata.obs[{column!r}].astype(str).astype('category')"
    if "categories" not in getattr(node, "keys", tuple)():
        raise InputError(
            f"{file.filename}: obs column {column!r} is not categorical, as cell-load needs it; "
            f"write the file again after {fix}"
        )
    values = node["categories"][:]
    if values.dtype.kind not in "OSU":
        raise InputError(
            f"{file.filename}: obs column {column!r} holds {values.dtype} labels, not text; "
            f"write the file again after {fix}"
        )
    return [v.decode("utf-8", errors="ignore") if isinstance(v, bytes) else v for v in values]


def data_file_origin(path: Path) -> dict[str, Any]:
    """What the manifest keeps of a data file: hashing tens of gigabytes would cost minutes."""
    stat = path.stat()
    return {"path": str(path), "kind": "adata", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def require_control(control: str, labels: Sequence[str], path: Path, column: str) -> None:
    """cell-load refuses a file without control cells; say which label was probably meant."""
    if control in labels:
        return
    usual = [x for x in labels if re.search(r"control|ctrl|non.?targ|^nt", x, re.IGNORECASE)]
    hint = f" (did you mean {some(usual)}?)" if usual else did_you_mean(control, labels)
    raise InputError(
        f"{path}: no cell has the control label {control!r} in obs column {column!r}{hint}. "
        f"Name it with --control-pert; labels: {some(sorted(labels)) or 'none'}"
    )


def labels_of_files(
    paths: Sequence[Path], pert_col: str | None, control: str | None
) -> dict[Path, list[str]]:
    """Labels of each file, all read from one column; `control`, if given, must be in each."""
    columns = {}
    for path in paths:
        with open_h5ad(path) as file:
            columns[path] = obs_columns(file)
    column = find_column(columns, pert_col, PERT_COLUMNS, "--pert-col")
    labels = {}
    for path in paths:
        with open_h5ad(path) as file:
            labels[path] = read_categories(file, column)
        if control is not None:
            require_control(control, labels[path], path, column)
    return labels


def add_toml_labels(labels: Labels, toml_path: Path, pert_col: str | None) -> None:
    """Add every label that cell-load would read for a TOML, and those that [fewshot] names."""
    experiment = load_experiment(toml_path)
    problems = experiment_problems(experiment)
    if problems:
        raise one_error([f"{toml_path}: {p}" for p in problems])
    by_dataset, problems = find_data_files(experiment, toml_path)
    if problems:
        raise one_error(problems)
    files = list(dict.fromkeys(f for found in by_dataset.values() for f in found))
    if not files:
        raise InputError(f"{toml_path}: [training], [zeroshot] and [fewshot] name no dataset")
    in_files: set[str] = set()
    for path, found in labels_of_files(files, pert_col, labels.control).items():
        labels.add(found, **data_file_origin(path))
        in_files.update(found)
    named = [x for s in experiment.fewshot.values() for split in s.values() for x in split]
    labels.add(named, path=str(toml_path), kind="toml", sha256=sha256_of(toml_path))
    labels.fewshot_only += sorted(set(named) - in_files)
    for label in labels.fewshot_only:
        warn(
            f"[fewshot] names {label!r}, which no file holds: probably a typo"
            f"{did_you_mean(label, in_files)}. cell-load holds nothing out for it"
        )


def read_gene_list(path: Path, pert_col: str | None) -> list[str]:
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
        log.info("%s: %s left out", path, count(repeated, "repeated label"))
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


def collect_labels(args: argparse.Namespace) -> Labels:
    """Every label the command asks for, but for --all-genes."""
    labels = Labels(control=args.control_pert)
    if args.from_toml:
        add_toml_labels(labels, args.from_toml, args.pert_col)
    for path, found in (
        labels_of_files(args.adata, args.pert_col, None).items() if args.adata else ()
    ):
        labels.add(found, **data_file_origin(path))
    for path in args.gene_list:
        labels.add(
            read_gene_list(path, args.pert_col),
            path=str(path),
            kind="gene-list",
            sha256=sha256_of(path),
        )
    return labels


# ---------------------------------------------------------------------------------------------
# Sources: tables {gene symbol: vector}
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of embeddings on disk.

    Attributes
    ----------
    path
        The file.
    vectors
        {gene symbol: tensor}; memory-mapped, so a vector is read when it is used.
    width
        Length of every vector.
    """

    path: Path
    vectors: Mapping[str, torch.Tensor]
    width: int

    def __getitem__(self, gene: str) -> torch.Tensor:
        """Vector of a gene as float32 (width,), a copy that owns its memory."""
        import torch

        return self.vectors[gene].detach().reshape(-1).to(torch.float32, copy=True)


def load_table(path: Path) -> Table:
    """Open a table without executing anything in it and without reading its vectors.

    Parameters
    ----------
    path
        .npz with `genes` (n,) and `embeddings` (n, width), or a file of torch.save holding
        {symbol: tensor (width,) or (1, width)}.

    Raises
    ------
    InputError
        Not such a file, mixed widths, or a pickle that holds more than tensors.
    """
    existing_file(path, "embeddings table")
    content = _read_npz(path) if path.suffix.lower() == ".npz" else read_torch(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no {{symbol: vector}} table, but {type(content).__name__}")
    if not content:
        raise InputError(f"{path} holds an empty table")
    import torch

    wrong = [k for k, v in content.items() if not isinstance(k, str) or not torch.is_tensor(v)]
    if wrong:
        raise InputError(
            f"{path}: {len(wrong):,} of {len(content):,} entries are not symbol -> tensor "
            f"({some(f'{k!r}: {type(content[k]).__name__}' for k in wrong)})"
        )
    widths: dict[int, str] = {}
    for gene, vector in content.items():
        if vector.dim() != 1 and not (vector.dim() == 2 and len(vector) == 1):
            raise InputError(
                f"{path}: {gene!r} has shape {tuple(vector.shape)}; expected one vector a gene"
            )
        widths.setdefault(vector.shape[-1], gene)
    if len(widths) > 1 or 0 in widths:
        seen = some(f"{w} ({gene!r})" for w, gene in widths.items())
        raise InputError(f"{path}: vectors of different widths: {seen}; one table, one width")
    _check_dtypes(path, content)
    return Table(path, content, next(iter(widths)))


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    import zipfile

    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as arrays:
            genes, embeddings = arrays["genes"], arrays["embeddings"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is no table: expected arrays `genes` (n,) of text and "
            f"`embeddings` (n, width) ({_line(error)})"
        ) from error
    shapes_ok = genes.ndim == 1 and embeddings.ndim == 2 and len(genes) == len(embeddings)
    if not shapes_ok or genes.dtype.kind not in "US" or embeddings.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: expected `genes` (n,) of text and `embeddings` (n, width), found "
            f"{genes.dtype} {genes.shape} and {embeddings.dtype} {embeddings.shape}"
        )
    table = dict(zip(genes.astype(str).tolist(), torch.from_numpy(embeddings), strict=True))
    if len(table) < len(genes):
        repeated = len(genes) - len(table)
        raise InputError(f"{path}: {count(repeated, 'repeated gene')} in `genes`; keep one each")
    return table


def read_torch(path: Path) -> Any:
    """torch.load that never executes pickled code, memory-mapped where the format allows it."""
    import pickle
    import zipfile

    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of the pickle protocol; decided below
            return torch.load(
                path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
            )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} was refused without running it: it is no file of torch.save, or it holds "
            "pickled Python objects beside tensors, and loading those can execute code. Save it "
            "again as a plain {symbol: torch.Tensor} dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a file of torch.save: damaged or cut short ({_line(error)})"
        ) from error


def _line(error: BaseException) -> str:
    """First line of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_dtypes(path: Path, content: Mapping[str, torch.Tensor]) -> None:
    """Say what is converted to float32 (width,); refuse what is no real number."""
    import torch

    dtypes = {str(v.dtype).removeprefix("torch.") for v in content.values()}
    if any(v.dtype.is_complex or v.dtype == torch.bool for v in content.values()):
        raise InputError(f"{path}: {', '.join(sorted(dtypes))} values are no embeddings")
    if dtypes != {"float32"}:
        log.info("%s: %s values are converted to float32", path, " and ".join(sorted(dtypes)))
    rows = sum(v.dim() == 2 for v in content.values())
    if rows:
        log.info("%s: %s of shape (1, width) flattened", path, count(rows, "row"))


def arc_table_path(dry_run: bool) -> Path | None:
    """Arc's published table, from the Hugging Face cache or downloaded into it once.

    Returns
    -------
    path
        The file, its sha256 checked; None in a dry run that would have to download it.
    """
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = huggingface_hub.try_to_load_from_cache(ARC_REPOSITORY, ARC_FILE)
    if not isinstance(cached, str):
        verb = "would download" if dry_run else "downloading"
        log.warning(
            "%s %s of %s (%.0f MB) into %s. The repository is under the Arc Institute's "
            "non-commercial licence. --esm-embeddings FILE avoids the download",
            *(verb, ARC_FILE, ARC_REPOSITORY, ARC_BYTES / 1e6, HF_HUB_CACHE),
        )
        if dry_run:
            return None
    path = Path(cached) if isinstance(cached, str) else _download_arc_table()
    found = sha256_of(path)
    if found != ARC_SHA256:
        raise InputError(
            # resolved: without its link alone the cache would give the same file again
            f"{path.resolve()} has sha256 {found}, expected {ARC_SHA256}: the download is damaged, "
            "or the table was replaced. Delete that file to download it again, or pass it with "
            "--esm-embeddings to use it as it is"
        )
    return path


def _download_arc_table() -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    advice = "Run again when it can be reached, or pass a table with --esm-embeddings FILE"
    try:
        return Path(huggingface_hub.hf_hub_download(ARC_REPOSITORY, ARC_FILE))
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"cannot download {ARC_FILE}: the Hugging Face hub cannot be reached. {advice}"
        ) from error
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as error:
        raise InputError(
            f"cannot download {ARC_FILE}: the Hugging Face hub has no such file in "
            f"{ARC_REPOSITORY}, or wants a login. Pass a table with --esm-embeddings FILE"
        ) from error
    except Exception as error:  # whatever the HTTP client under huggingface_hub raises
        raise InputError(
            f"cannot download {ARC_FILE}: {type(error).__name__}: {_line(error)}. {advice}"
        ) from error


def open_tables(args: argparse.Namespace) -> list[Table]:
    """The tables of --esm-embeddings, or Arc's; all of one width, first hit wins."""
    paths = args.esm_embeddings or [arc_table_path(args.dry_run)]
    tables = [load_table(path) for path in paths if path is not None]
    for table in tables[1:]:
        if table.width != tables[0].width:
            raise InputError(
                f"tables of different widths: {tables[0].path} has {tables[0].width}, {table.path} "
                f"has {table.width}; use tables of one ESM2 model"
            )
    return tables


# ---------------------------------------------------------------------------------------------
# Resolution: label -> gene(s) -> vector
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gene:
    """A single gene (or the control) that a label or a part of one stands for.

    Attributes
    ----------
    name
        As in the label.
    how
        exact, alias, control, or missing.
    gene
        Key in the table, for exact and alias.
    source
        Index of the table.
    reason
        Why it is missing.
    """

    name: str
    how: str
    gene: str | None = None
    source: int | None = None
    reason: str | None = None


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


def read_aliases(pairs: Sequence[tuple[str, str]], path: Path | None) -> dict[str, str]:
    """{label: table key} from --alias and from the two columns of --aliases."""
    aliases = {}
    if path is not None:
        existing_file(path, "aliases file")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"aliases file {path} is not plain text in UTF-8: {error}") from error
        for number, line in enumerate(lines, 1):
            fields = re.split(r"[\t,]|\s+", line.split("#", 1)[0].strip())
            if fields == [""]:
                continue
            if len(fields) != 2 or not all(fields):
                raise InputError(f"{path}, line {number}: expected two columns, OLD NEW: {line!r}")
            aliases[fields[0]] = fields[1]
    return aliases | dict(pairs)


def resolve_gene(
    name: str, tables: Sequence[Table], aliases: Mapping[str, str], control: str
) -> Gene:
    """Resolve one gene: the control, the user's alias, then the exact key; first table wins."""
    if name == control:
        return Gene(name, "control")
    key = aliases.get(name, name)
    how = "alias" if name in aliases else "exact"
    for index, table in enumerate(tables):
        if key in table.vectors:
            return Gene(name, how, key, index)
    if not name:
        return Gene(name, "missing", reason="empty label or part")
    via = f" (alias of {name!r})" if name in aliases else ""
    return Gene(name, "missing", reason=f"{key!r}{via} is in no table")


def resolve_label(
    label: str, tables: Sequence[Table], aliases: Mapping[str, str], control: str
) -> Resolution:
    """Resolve a label: as it stands, else part by part if it is a combination A+B."""
    whole = resolve_gene(label, tables, aliases, control)
    if whole.how != "missing" or "+" not in label:
        return Resolution(label, (whole,))
    parts = (resolve_gene(part, tables, aliases, control) for part in label.split("+"))
    return Resolution(label, tuple(parts))


def read_vectors(
    resolutions: Iterable[Resolution], tables: Sequence[Table]
) -> dict[str, torch.Tensor]:
    """{gene: float32 (width,)} of every gene used, each read from its table once.

    Raises
    ------
    InputError
        A vector holds NaN or infinity, or only zeros (State would take it for the control).
    """
    import torch

    used = {p.gene: p.source for r in resolutions for p in r.parts if p.gene is not None}
    vectors = {gene: tables[source or 0][gene] for gene, source in used.items()}
    for complaint, test in (
        ("holds NaN or infinite values", lambda v: not torch.isfinite(v).all()),
        ("holds only zeros, which State takes for the control", lambda v: not v.any()),
    ):
        bad = sorted(gene for gene, v in vectors.items() if test(v))
        if bad:
            path = tables[used[bad[0]] or 0].path
            raise InputError(
                f"{path}: the vector of {count(len(bad), 'gene')} in use {complaint} "
                f"({some(bad)}); repair the table, or remove them from it and choose "
                "--missing mean"
            )
    return vectors


def shuffle_vectors(vectors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Give every gene the vector of another gene: the negative control of the features.

    Genes are put in random order, those of identical vectors side by side, and the vectors
    are moved on by as many places as the largest such group has: no gene can keep its own.

    Raises
    ------
    InputError
        More than half of the genes share one vector (or there is one gene only).
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    groups: dict[bytes, list[str]] = {}
    for gene in sorted(vectors):
        groups.setdefault(vectors[gene].numpy().tobytes(), []).append(gene)
    members = list(groups.values())
    order = [gene for i in rng.permutation(len(members)) for gene in rng.permutation(members[i])]
    shift = max(map(len, members))
    if 2 * shift > len(order):
        raise InputError(
            "--ablation shuffle needs genes with different vectors: "
            f"{shift} of {len(order)} are identical, so some gene would keep its own"
        )
    return {
        str(gene): vectors[str(giver)]
        for gene, giver in zip(order, order[shift:] + order[:shift], strict=True)
    }


def combine(parts: Sequence[torch.Tensor], how: str) -> torch.Tensor:
    """Vector of a combination: sum (as scLAMBDA does) or mean of its genes' vectors."""
    import torch

    stacked = torch.stack(list(parts))
    return stacked.sum(0) if how == "sum" else stacked.mean(0)


def build_features(
    resolutions: Sequence[Resolution],
    vectors: Mapping[str, torch.Tensor],
    width: int,
    args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """One vector a label, in the order of the labels.

    The control is zero and adds nothing to a combination. A missing gene gets what --missing
    says: `mean` is the mean of the vectors of all genes that this run found.
    """
    import torch

    zero = torch.zeros(width)
    filler = zero
    if args.missing == "mean":
        filler = torch.stack([vectors[g] for g in sorted(vectors)]).double().mean(0).float()
    features = {}
    for resolution in resolutions:
        genes = [p for p in resolution.parts if p.how != "control"]
        if genes:
            found = [vectors[p.gene] if p.gene is not None else filler for p in genes]
            vector = combine(found, args.combine)
        else:
            vector = filler if resolution.reason else zero
        features[resolution.label] = vector.clone()
    return features


# ---------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------


def how_resolved(resolution: Resolution, missing: str) -> str:
    """The manifest's word for how a label got its vector."""
    if len(resolution.parts) > 1:
        return "combination"
    how = resolution.parts[0].how
    return missing if how == "missing" else how


def label_record(resolution: Resolution, missing: str) -> dict[str, Any]:
    """What the manifest says of one label."""

    def fields(part: Gene) -> dict[str, Any]:
        return {k: v for k, v in (("gene", part.gene), ("source", part.source)) if v is not None}

    record: dict[str, Any] = {"how": how_resolved(resolution, missing)}
    if len(resolution.parts) == 1:
        return record | fields(resolution.parts[0])
    parts = [
        {"name": p.name, "how": missing if p.how == "missing" else p.how, **fields(p)}
        for p in resolution.parts
    ]
    return record | {"parts": parts}


def build_manifest(
    args: argparse.Namespace,
    labels: Labels,
    tables: Sequence[Table],
    resolutions: Sequence[Resolution],
    features_sha256: str,
) -> dict[str, Any]:
    """The manifest: the same for the same inputs, so it holds no time of day."""
    import torch

    return {
        "format": MANIFEST_FORMAT,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "create_esm_pert_features": __version__,
        },
        "command": args.command,
        "control": labels.control,
        "width": tables[0].width,
        "features_sha256": features_sha256,
        "inputs": labels.inputs,
        "sources": [
            {
                "kind": "table",
                "path": str(t.path),
                "sha256": sha256_of(t.path),
                "genes": len(t.vectors),
            }
            for t in tables
        ],
        "policy": {"missing": args.missing, "combine": args.combine, "separator": "+"},
        "ablation": {"kind": args.ablation, "seed": args.seed} if args.ablation else None,
        "labels": {r.label: label_record(r, args.missing) for r in resolutions},
        "missing": {r.label: r.reason for r in resolutions if r.reason},
    }


def set_aside(path: Path, act: bool) -> None:
    """Keep a file that this script did not write as FILE.orig (.orig.1, ... if that exists).

    A hard link, or a copy where links do not work: there is no moment without the file.
    A dry run (`act` false) only says so.
    """
    if not path.exists() or read_manifest(path) is not None:
        return
    names = [path.name + ".orig", *(f"{path.name}.orig.{n}" for n in range(1, 1000))]
    kept = next(p for p in map(path.with_name, names) if not p.exists())
    if act:
        try:
            kept.hardlink_to(path)
        except FileExistsError:
            raise
        except OSError:  # no hard links here (FAT, some network and Drive folders)
            shutil.copy2(path, kept)
    verb = "is kept" if act else "would be kept"
    log.warning("%s was not written by this script: it %s as %s", path, verb, kept)


def write_features(
    path: Path, features: Mapping[str, torch.Tensor], manifest: Callable[[str], dict[str, Any]]
) -> None:
    """Save the features and their manifest, made from their sha256: both, or neither.

    torch.save is given an open file, not a name: the bytes then do not depend on the name.
    """
    import torch

    with staged(path, lambda f: torch.save(dict(features), f)) as new:
        described = as_json(manifest(sha256_of(new)))
        with staged(manifest_path(path), lambda f: f.write(described)):
            set_aside(path, act=True)


def write_report(
    path: Path, resolutions: Sequence[Resolution], tables: Sequence[Table], args: argparse.Namespace
) -> None:
    """One line a label, tab-separated: how it was resolved, to what, from where."""
    lines = ["label\thow\tgenes\tsource\treason"]
    for r in resolutions:
        genes = "+".join(p.gene or p.name for p in r.parts)
        sources = sorted({str(tables[p.source].path) for p in r.parts if p.source is not None})
        how = how_resolved(r, args.missing)
        if r.reason and args.missing == "error":
            how = "missing"
        cells = (r.label, how, genes, ";".join(sources), r.reason or "")
        lines.append("\t".join(re.sub(r"[\t\r\n]", " ", c) for c in cells))
    write_whole(path, lambda f: f.write(("\n".join(lines) + "\n").encode()))


def check_missing(
    resolutions: Sequence[Resolution], labels: Labels, args: argparse.Namespace
) -> None:
    """Refuse missing labels, or say once what --missing does with them."""
    missing = [r for r in resolutions if r.reason]
    if not missing:
        return
    total = sum(r.label != labels.control for r in resolutions)
    names = some(r.label for r in missing)
    if args.missing != "error":
        filling = "the mean vector" if args.missing == "mean" else "zeros, as if they were control"
        warn(
            f"{len(missing):,} of {count(total, 'label')} missing ({names}): filled with {filling}"
        )
        return
    typos = [r.label for r in missing if r.label in labels.fewshot_only]
    also = f" {some(typos)}: only in [fewshot], probably a typo." if typos else ""
    reason = f": {missing[0].reason}" if len(missing) == 1 else ""
    raise InputError(
        f"{len(missing):,} of {count(total, 'label')} have no embedding ({names}){reason}.{also} "
        "Add a table that has them with --esm-embeddings, rename with --alias OLD=NEW, see all "
        "with --report FILE.tsv --dry-run, or accept with --missing mean"
    )


def summary(
    resolutions: Sequence[Resolution],
    labels: Labels,
    tables: Sequence[Table],
    args: argparse.Namespace,
) -> str:
    """The closing table: labels by how they were resolved, width, source."""
    hows = [how_resolved(r, args.missing) for r in resolutions]
    tally = ", ".join(f"{hows.count(h):,} {h}" for h in dict.fromkeys(sorted(hows)))
    rows = [
        ("labels", f"{len(resolutions):,} ({tally})"),
        *(("from", f"{i['path']} ({count(i['labels'], 'label')})") for i in labels.inputs),
        *(("source", f"{t.path} ({count(len(t.vectors), 'gene')} x {t.width:,})") for t in tables),
    ]
    if args.ablation:
        rows.append(("ablation", f"{args.ablation}, seed {args.seed}: no gene has its own vector"))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


PERT_COLUMNS_HELP = ", ".join(PERT_COLUMNS)
GENE_LIST_HELP = "a target_gene, gene, perturbation or symbol column; repeatable"
TABLE_HELP = (
    ".pt dict, or .npz with arrays genes (n,) and embeddings (n, width); repeatable, first hit "
    f"wins (default: {ARC_FILE} of {ARC_REPOSITORY}, {ARC_BYTES / 1e6:.0f} MB, downloaded once)"
)
MISSING_HELP = (
    "labels without embedding: refuse them, or fill in the mean of the genes found, or zeros, "
    "which State takes for control (default: error)"
)


def alias_pair(text: str) -> tuple[str, str]:
    """OLD=NEW -> (OLD, NEW)."""
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"expected OLD=NEW, got {text!r}")
    return old, new


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="create_esm_pert_features.py",
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

    add = parser.add_argument_group("sources").add_argument
    add("--esm-embeddings", **files, help=f"table {{symbol: vector}}: {TABLE_HELP}")

    add = parser.add_argument_group("symbols").add_argument
    pairs: dict[str, Any] = {"type": alias_pair, "action": "append", "default": []}
    add("--alias", **pairs, metavar="OLD=NEW", help="look label OLD up as NEW; repeatable")
    add("--aliases", **file, help="two columns, OLD NEW; --alias wins over it")

    add = parser.add_argument_group("policy").add_argument
    add("--missing", choices=("error", "mean", "zero"), default="error", help=MISSING_HELP)
    add("--combine", choices=("sum", "mean"), default="sum", help="of 'A+B' (default: sum)")

    add = parser.add_argument_group("ablation").add_argument
    add("--ablation", choices=("shuffle",), help="control: give each gene another one's vector")
    add("--seed", type=int, default=42, metavar="N", help="of the ablation (default: 42)")

    add = parser.add_argument_group("output").add_argument
    add("--output", **file, help="features to write; FILE.json beside it is its manifest")
    add("--report", **file, help="tab-separated: how each label was resolved")
    add("--dry-run", action="store_true", help="resolve, write no features, download nothing")
    add("--quiet", action="store_true", help="warnings and errors only")
    add("--version", action="version", version=__version__)
    return parser


def run(args: argparse.Namespace) -> int:
    """From labels to the features file, in the order of the data."""
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder; give the name of a file in it")
    labels = collect_labels(args)
    tables = open_tables(args)
    if not tables:  # a dry run that would have to download
        log.info("%s to look up: %s", count(len(labels.names), "label"), some(labels.names))
        return 0
    if args.all_genes:
        genes = [g for t in tables for g in t.vectors if g != labels.control]
        labels.add(genes, path=some(str(t.path) for t in tables), kind="all-genes")
    names = dict.fromkeys([*labels.names, labels.control])
    aliases = read_aliases(args.alias, args.aliases)
    resolutions = [resolve_label(n, tables, aliases, labels.control) for n in names]
    for name in sorted(set(dict(args.alias)) - {p.name for r in resolutions for p in r.parts}):
        warn(f"--alias {name}={aliases[name]}: no label {name!r}{did_you_mean(name, names)}")
    if args.report:
        write_report(args.report, resolutions, tables, args)
    check_missing(resolutions, labels, args)
    vectors = read_vectors(resolutions, tables)
    if not vectors:
        raise InputError(
            f"none of the {count(len(names) - 1, 'label')} is in a table: other species or naming? "
            f"labels: {some(names)}; table: {some(tables[0].vectors)}"
        )
    if args.ablation:
        vectors = shuffle_vectors(vectors, args.seed)
    features = build_features(resolutions, vectors, tables[0].width, args)
    log.info("%s", summary(resolutions, labels, tables, args))
    if args.dry_run:
        set_aside(args.output, act=False)
        log.info("dry run: %s not written", args.output)
        return 0
    write_features(
        args.output, features, lambda sha: build_manifest(args, labels, tables, resolutions, sha)
    )
    print(args.output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    if not (args.from_toml or args.gene_list or args.adata or args.all_genes):
        parser.error("no labels: give --from-toml, --gene-list, --adata or --all-genes")
    if args.output is None:
        parser.error("--output FILE is required")
    start_log(args.quiet)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
