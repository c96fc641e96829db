"""Folders in which people keep {gene: vector}: one reader each, told apart by what is inside.

A new form is one function in `OF_FOLDERS`. None executes what it reads, and none checks the
vectors: `tables` does that, once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from state_esm_features.console import InputError, count, some
from state_esm_features.embedding.plain_pickle import IN_TORCH_FILES, plain
from state_esm_features.embedding.table_content import Asked, Content, matrix_rows, readable
from state_esm_features.files import read_torch
from state_esm_features.option_groups import GENE_LIST_COLUMNS


def files_of(folder: Path, *endings: str) -> list[Path]:
    """Its files of these endings, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if path.suffix in endings and not path.name.startswith(".")]


def others_in(folder: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """What to say of the rest of a folder."""
    rest = {path for path in folder.iterdir() if not path.name.startswith(".")} - {*files}
    names = sorted(path.name for path in rest)
    return (f"{count(len(rest), 'other file')} left out ({some(names)})",) if rest else ()


def extract_folder(folder: Path, asked: Asked) -> Content | None:
    """The folder of fair-esm's extract.py: a file a protein, its vectors by layer."""
    files = files_of(folder, ".pt")
    first = torch_file(files[0]) if files else {}
    if not is_extracted(first):
        return None
    layers = sorted(layers_of(files[0], first))
    layer = layers[-1] if asked.layer is None else asked.layer
    labels, vectors = [], []
    for path in files:
        content = torch_file(path)
        if not is_extracted(content):
            raise InputError(f"{path} is not of fair-esm's extract.py, as {files[0].name} is")
        here = layers_of(path, content)
        if asked.layer is None and sorted(here) != layers:
            raise InputError(
                f"{folder}: layers differ: {files[0].name} has {some(layers)}, {path.name} has "
                f"{some(sorted(here))}; choose one that all have with --layer N"
            )
        if layer not in here:
            raise InputError(f"{path} has no layer {layer}, but {some(sorted(here))}: see --layer")
        labels.append(str(content.get("label") or path.stem))
        mean = bool(content.get("mean_representations"))
        with readable(path, "a file of extract.py"):
            vectors.append(here[layer] if mean else here[layer].float().mean(0))
    said, part = others_in(folder, files), {"layer": layer}
    return Content("fair-esm extract.py", labels, vectors, tuple(files), part, said, headers=True)


def layers_of(path: Path, content: Mapping[str, Any]) -> Mapping[int, Any]:
    """{layer: vector of the protein, or of its residues where no mean is there}."""
    layers = content.get("mean_representations") or content.get("representations")
    if not isinstance(layers, dict) or not layers:
        raise InputError(
            f"{path} holds no vector but that of the first token. Run extract.py with --include "
            "mean"
        )
    return layers


def torch_file(path: Path) -> Any:
    """The content of a small file of torch.save, read into memory."""
    again = "Save it again as a plain tensor"
    return plain(read_torch(path, again, IN_TORCH_FILES, mapped=False))


def is_extracted(content: Any) -> bool:
    """Whether this is what extract.py writes of a protein."""
    kinds = {"mean_representations", "representations", "bos_representations"}
    return isinstance(content, dict) and bool(kinds & {*content})


def matrix_folder(folder: Path, asked: Asked) -> Content | None:
    """embeddings.npy beside the list of its keys: PIE's meta.json, or another."""
    import numpy as np

    matrix_path = folder / "embeddings.npy"
    if not matrix_path.is_file():
        return None
    with readable(matrix_path, ".npy"):
        matrix = np.load(matrix_path, allow_pickle=False, mmap_mode="c")
    lists = {name: keys for name in KEY_FILES if (keys := read_keys(folder / name)) is not None}
    if len(lists) != 1:
        which = f"more than one list of keys: {' and '.join(lists)}; keep one"
        none = f"no list of its keys: {', '.join(KEY_FILES)}, one name a row"
        raise InputError(f"{folder} has embeddings.npy and {which if lists else none}")
    [(name, keys)] = lists.items()
    rows = matrix_rows(folder, np.array(keys), name, matrix, "embeddings.npy")
    files = (matrix_path, folder / name)
    return Content("embeddings.npy and its keys", keys, rows, files, said=others_in(folder, files))


KEY_FILES = ("meta.json", "genes.json", "index.tsv", "gene_order.txt", "names.txt")
"""Where the keys of embeddings.npy may stand."""


def read_keys(path: Path) -> list[str] | None:
    """The keys in one of KEY_FILES; None if there are none.

    A .json holds a list, {"keys": list} as PIE's meta.json, or {key: row}. Of index.tsv it is the
    first column that does not count.
    """
    if not path.is_file():
        return None
    with readable(path, "a list of keys"):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text)
            keys = content.get("keys", content) if isinstance(content, dict) else content
            if isinstance(keys, dict):
                rows = all(isinstance(row, int) for row in keys.values())
                keys = sorted(keys, key=keys.__getitem__) if rows and keys else None
            return keys if keys is None else list(map(str, keys))
        lines = [line.split("\t") for line in text.splitlines() if line.strip()]
        column = next((i for i, cell in enumerate(lines[-1]) if not cell.isdecimal()), 0)
        keys = [line[column].strip() for line in lines]
        counts = [any(cell.isdecimal() for cell in line) for line in (lines[0], lines[-1])]
    header = keys[0] in (*GENE_LIST_COLUMNS, "key", "name", "id") or counts == [False, True]
    return keys[header:]


def vector_folder(folder: Path, asked: Asked) -> Content | None:
    """A file a gene, GENE.pt or GENE.npy."""
    import numpy as np

    files = files_of(folder, ".pt", ".npy")
    if not files:
        return None
    if len({path.suffix for path in files}) > 1:
        raise InputError(f"{folder} holds .pt and .npy files; keep one kind of them in it")
    vectors = []
    for path in files:
        if path.suffix == ".pt":
            vectors.append(torch_file(path))
            continue
        with readable(path, ".npy"):
            vectors.append(np.load(path, allow_pickle=False))
    form = f"folder of {files[0].suffix} files"
    said = others_in(folder, files)
    return Content(form, [path.stem for path in files], vectors, tuple(files), said=said)


OF_FOLDERS = (matrix_folder, extract_folder, vector_folder)
"""The readers, in the order in which they are asked."""
