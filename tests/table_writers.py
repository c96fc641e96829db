"""One table {gene: vector} in every form in which people keep such tables."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file

Vectors = Mapping[str, np.ndarray]
"""{gene: float32 (width,)}."""


def matrix(table: Vectors) -> np.ndarray:
    return np.stack(list(table.values()))


def frame(table: Vectors) -> pd.DataFrame:
    return pd.DataFrame(matrix(table), index=pd.Index(list(table), name="gene"))


def lists(table: Vectors) -> dict[str, list[float]]:
    return {gene: vector.tolist() for gene, vector in table.items()}


def of_torch(path: Path, table: Vectors) -> None:
    torch.save({gene: torch.from_numpy(vector) for gene, vector in table.items()}, path)


def of_torch_legacy(path: Path, table: Vectors) -> None:
    content = {gene: torch.from_numpy(vector) for gene, vector in table.items()}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def of_npz(path: Path, table: Vectors, names: str = "genes") -> None:
    np.savez(path, **{names: np.array(list(table)), "embeddings": matrix(table)})


def of_npz_by_gene(path: Path, table: Vectors) -> None:
    np.savez(path, **table)


def of_extract(path: Path, table: Vectors, layer: int = 33) -> None:
    path.mkdir()
    for gene, vector in table.items():
        content = {"label": gene, "mean_representations": {layer: torch.from_numpy(vector)}}
        torch.save(content, path / f"{gene}.pt")


def of_matrix_folder(path: Path, table: Vectors, keys: str = "meta.json") -> None:
    path.mkdir()
    np.save(path / "embeddings.npy", matrix(table))
    texts = {
        "meta.json": json.dumps({"layout": "dense", "keys": list(table)}),
        "genes.json": json.dumps(list(table)),
        "index.tsv": "gene\trow\n" + "".join(f"{gene}\t{i}\n" for i, gene in enumerate(table)),
        "names.txt": "".join(f"{gene}\n" for gene in table),
        "gene_order.txt": "\n".join(table),
    }
    (path / keys).write_text(texts[keys])


def of_pt_folder(path: Path, table: Vectors) -> None:
    path.mkdir()
    for gene, vector in table.items():
        torch.save(torch.from_numpy(vector), path / f"{gene}.pt")


def of_npy_folder(path: Path, table: Vectors) -> None:
    path.mkdir()
    for gene, vector in table.items():
        np.save(path / f"{gene}.npy", vector)


def of_csv(path: Path, table: Vectors, separator: str = ",") -> None:
    frame(table).to_csv(path, sep=separator, compression=None)


def of_csv_gz(path: Path, table: Vectors) -> None:
    frame(table).to_csv(path, compression="gzip")


def of_csv_lists(path: Path, table: Vectors) -> None:
    pd.Series(lists(table), name="vector").rename_axis("gene").to_csv(path, compression=None)


def of_parquet(path: Path, table: Vectors) -> None:
    frame(table).rename(columns=str).to_parquet(path)


def of_parquet_lists(path: Path, table: Vectors) -> None:
    pd.DataFrame({"gene": list(table), "vector": list(matrix(table))}).to_parquet(path)


def of_hdf5(path: Path, table: Vectors) -> None:
    with h5py.File(path, "w") as file:
        for gene, vector in table.items():
            file[gene] = vector


def of_hdf5_ids(path: Path, table: Vectors) -> None:
    with h5py.File(path, "w") as file:
        for i, (gene, vector) in enumerate(table.items()):
            file[f"md5{i:04d}"] = vector
            file[f"md5{i:04d}"].attrs["original_id"] = gene


def of_h5ad(path: Path, table: Vectors, place: str = "X") -> None:
    obs = pd.DataFrame(index=pd.Index(list(table)))
    cells = pd.DataFrame({"cell_type": ["K562"]}, index=["cell"])
    data = anndata.AnnData(np.ones((1, len(table)), np.float32), obs=cells, var=obs)
    if place == "X":
        data = anndata.AnnData(matrix(table), obs=obs)
    elif place == "obsm":
        data = anndata.AnnData(obs=obs, obsm={"esm": matrix(table)})
    elif place == "varm":
        data.varm["esm"] = matrix(table)
    else:
        data.uns["esm"] = dict(table)
    data.write_h5ad(path)


def of_safetensors(path: Path, table: Vectors) -> None:
    save_file(dict(table), path)


def of_pickle(path: Path, table: Vectors, protocol: int = 4) -> None:
    path.write_bytes(pickle.dumps(dict(table), protocol))


def of_pickle_lists(path: Path, table: Vectors) -> None:
    path.write_bytes(pickle.dumps(lists(table)))


def of_pickle_gz(path: Path, table: Vectors) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(dict(table))))


WRITERS: dict[str, Callable[[Path, Vectors], None]] = {
    "torch": of_torch,
    "torch, legacy": of_torch_legacy,
    "torch of arrays": lambda path, table: torch.save(dict(table), path),
    "npz": of_npz,
    "npz of names": lambda path, table: of_npz(path, table, "names"),
    "npz by gene": of_npz_by_gene,
    "extract.py": of_extract,
    "meta.json": of_matrix_folder,
    "genes.json": lambda path, table: of_matrix_folder(path, table, "genes.json"),
    "index.tsv": lambda path, table: of_matrix_folder(path, table, "index.tsv"),
    "names.txt": lambda path, table: of_matrix_folder(path, table, "names.txt"),
    "gene_order.txt": lambda path, table: of_matrix_folder(path, table, "gene_order.txt"),
    "folder of .pt": of_pt_folder,
    "folder of .npy": of_npy_folder,
    "csv": of_csv,
    "tsv": lambda path, table: of_csv(path, table, "\t"),
    "csv.gz": of_csv_gz,
    "csv of lists": of_csv_lists,
    "parquet": of_parquet,
    "parquet of lists": of_parquet_lists,
    "hdf5": of_hdf5,
    "hdf5, original_id": of_hdf5_ids,
    "h5ad X": of_h5ad,
    "h5ad obsm": lambda path, table: of_h5ad(path, table, "obsm"),
    "h5ad varm": lambda path, table: of_h5ad(path, table, "varm"),
    "h5ad uns": lambda path, table: of_h5ad(path, table, "uns"),
    "safetensors": of_safetensors,
    "pickle": of_pickle,
    "pickle, protocol 0": lambda path, table: of_pickle(path, table, 0),
    "pickle, protocol 2": lambda path, table: of_pickle(path, table, 2),
    "pickle, protocol 5": lambda path, table: of_pickle(path, table, 5),
    "pickle of lists": of_pickle_lists,
    "pickle.gz": of_pickle_gz,
}
"""{form: what writes it}; the file's name tells nothing."""


def write_table(form: str, path: Path, table: Vectors) -> Path:
    """Write a table in a form under a name that says nothing of it."""
    WRITERS[form](path, table)
    if not path.exists():  # np.savez puts .npz behind it
        path.with_name(f"{path.name}.npz").rename(path)
    return path
