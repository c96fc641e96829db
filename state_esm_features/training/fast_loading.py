"""Which data files --fast-loading reads as copies, and whether there is room for these.

Writing them stands in `fast_copies`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import Findings, InputError, count, some
from state_esm_features.files import as_json, data_file_origin, existing_parent
from state_esm_features.h5ad import is_sparse, matrix_shape, open_h5ad, storage_problems
from state_esm_features.training.data import Data, DataFile
from state_esm_features.training.fast_copies import FastCopy, FastLoading
from state_esm_features.training.stock import matrices_read, set_length
from state_esm_features.training_options import TrainingOptions

if TYPE_CHECKING:
    import h5py


FAST_FORMAT = 1
"""To be raised with any change of what stands in the copies: those of before are made anew then."""


def check_consecutive(data: Data, stock: Mapping[str, Any], found: Findings) -> None:
    """What stock's consecutive loading breaks on."""
    instead = "--fast-loading dense has no such need"
    strategy = stock["data"]["kwargs"]["basal_mapping_strategy"]
    if strategy != "random":
        found.problems.append(
            "--fast-loading sorted groups cells by cell type and perturbation, but data.kwargs."
            f"basal_mapping_strategy={strategy} wants them grouped by batch; {instead}"
        )
    length = set_length(stock) or 1  # without one it is refused anyway
    short = []
    for f, cell_type, _ in data.cell_types_read():
        controls = f.by_type[cell_type].get(data.columns.control, 0)
        if 0 < controls < length:  # none at all is a problem already
            short.append(f"{cell_type} {controls:,}")
    if short:
        found.problems.append(
            f"--fast-loading sorted draws {count(length, 'control cell')} in a row, and there are "
            f"fewer: {some(short)}; stock would return short sets or crash. {instead}; or choose a "
            "smaller model.kwargs.cell_set_len"
        )


def choose_loading(
    options: TrainingOptions,
    resumed: Mapping[str, Any],
    data: Data,
    stock: Mapping[str, Any],
    run_dir: Path,
    found: Findings,
) -> FastLoading | None:
    """How the files are read, as asked for or as the `resumed` run has it; None as they are.

    Notes the files that cannot be read like this, and if there is no room for copies that are
    missing.
    """
    layout = options.fast_loading or resumed.get("fast_loading")
    found.problems += storage_problems(
        {f.path: [n for n in f.unreadable if not (layout and n.mended)] for f in data.files},
        fast=not layout,
    )
    if not layout:
        return None
    default = resumed.get("data_cache") or run_dir.parent / "data_cache"
    folder = Path(options.data_cache or default).absolute()
    if layout == "sorted":
        check_consecutive(data, stock, found)
    kwargs, c = stock["data"]["kwargs"], data.columns
    names = sorted({c.pert, c.batch, c.cell_type, *(kwargs.get("additional_obs") or ())})
    copies: dict[Path, FastCopy] = {}
    for f in data.files:
        with found.collect():
            copy = copy_needed(f, layout, folder, names, matrices_read(kwargs))
            copies |= {f.path: copy} if copy else {}
    fast = FastLoading(layout, folder, copies)
    with found.collect():
        fast_paths(fast, data)
    needed = sum(copy.size for copy in fast.missing())
    free = shutil.disk_usage(existing_parent(folder)).free
    if needed > free:
        found.problems.append(
            f"not enough space in {folder}: --fast-loading {layout} writes {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free. Free some, or choose another --data-cache"
        )
    return fast


def copy_needed(
    f: DataFile, layout: str, folder: Path, names: Sequence[str], matrices: Sequence[str]
) -> FastCopy | None:
    """The copy to read in place of a file; None where the file is in this order and form itself.

    Parameters
    ----------
    names, matrices
        obs columns and matrices that cell-load reads.
    """
    import h5py

    with open_h5ad(f.path) as file:
        lost = [n for n in names if n and n not in file["obs"]]
        if lost:
            raise InputError(f"{f.path} has no obs column {some(lost)}")
        nodes = [file[m] for m in matrices if file.get(m) is not None]
        plain = all(isinstance(n, h5py.Dataset) and n.chunks is None for n in nodes)
        if not f.unreadable and (f.grouped if layout == "sorted" else plain):
            return None
        size = sum(_copy_bytes(n, layout) for n in nodes) + 100 * int(f.cells.sum())
    made_of = {
        "format": FAST_FORMAT,
        "layout": layout,
        **data_file_origin(f.path.absolute()),
        "obs": names,
        "matrices": matrices,
        **({"rewritten": [n.node for n in f.unreadable]} if f.unreadable else {}),
    }
    key = hashlib.sha256(as_json(made_of)).hexdigest()[:12]
    target = folder / f"{f.path.stem}-{layout}-{key}" / f.path.name
    return FastCopy(f.path.absolute(), target, size, made_of)


def _copy_bytes(node: h5py.Group | h5py.Dataset, layout: str) -> int:
    rows, columns = matrix_shape(node)
    if layout == "dense" or not is_sparse(node):
        return 4 * rows * columns
    return 8 * int(node["data"].shape[0]) + 8 * (rows + 1)


def fast_paths(fast: FastLoading, data: Data) -> dict[str, str]:
    """{dataset: path for the TOML} that makes cell-load read the copies, in the same order."""
    import glob

    found = {}
    for name in dict.fromkeys(f.dataset for f in data.files):
        paths = [str(fast.path_of(f.path)) for f in data.files if f.dataset == name]
        if any(c in path for path in paths for c in ("{}," if len(paths) > 1 else "{}")):
            raise InputError(
                f"cell-load cannot be given the path {some(paths)}: it takes braces and "
                "commas in it for a pattern. Choose a --data-cache and file names without them"
            )
        escaped = [glob.escape(p) for p in paths]
        plain = escaped == paths and len(paths) == 1
        found[name] = paths[0] if plain else "{" + ",".join(escaped) + "}"
    return found


def describe_loading(fast: FastLoading, files: int) -> str:
    """What --fast-loading will read, and what it has to write first."""
    if not fast.copies:
        return f"{fast.layout}: {count(files, 'file')} in this order already, read without a copy"
    missing = fast.missing()
    size = sum(c.size for c in missing) / 1e9
    return (
        f"{fast.layout}: {count(len(fast.copies), 'file')} of {files:,} read as copies in "
        f"{fast.folder}, {len(missing):,} to be written ({size:.2f} GB)"
    )
