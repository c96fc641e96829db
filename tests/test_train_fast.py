"""--fast-loading: copies of the data, read by the real data module and trained on by real State."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from conftest import PATIENCE, ROOT, SMALL, Result, caught, script_fork, until
from demo_data import CONTROL, simulate
from forks import Fork
from h5ad_forms import (
    OLD_PANDAS,
    SETTING,
    categorical,
    changing,
    compressed_columns,
    compressed_rows,
    data_frame,
    nullable,
    nullable_boolean,
    nullable_categories,
    nullable_integer,
    old_categorical,
    plain_text,
    whole_numbers,
)
from test_train_run import (
    FAST,
    TINY,
    assert_same_bits,
    checkpoint,
    make_screen,
    run_json,
    stock_command,
)

import train_with_esm_features as script
from state_esm_features.console import InputError, Notes, start_log
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.training import fast_copies
from state_esm_features.training.fast_copies import BLOCK, make_copies
from state_esm_features.training.plan import Plan, make_plan
from state_esm_features.training.run_dir import toml_of_run
from state_esm_features.training_options import LAYOUTS

Run = Callable[..., Result]

HELD = '[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = ["SIM004"]\n'
TOML = f'[datasets]\nsim = "sim.h5ad"\n[training]\nsim = "train"\n{HELD}'
SET = 8
"""cell_set_len of TINY."""

COPIES = "copies.toml"

MEASURE_MEMORY = """
import sys
from pathlib import Path
import filelock, h5py, numpy, psutil, scipy.sparse, tqdm
from state_esm_features.files import data_file_origin
from state_esm_features.training.data import Columns
from state_esm_features.training.fast_copies import FastCopy, FastLoading, make_copies

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))

source, target, layout = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
made_of = {"obs": ["batch_var", "cell_type", "target_gene"], "matrices": ["X"]}
made_of |= data_file_origin(source)
fast = FastLoading(
    layout, target.parent, {source: FastCopy(source, target, 1, made_of)}
)
before = peak()
make_copies(fast, Columns("target_gene", "batch_var", "cell_type", "non-targeting"))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features for the labels of every screen here."""
    return make_screen(tmp_path_factory.mktemp("features"), {"sim": SMALL}) / "features.pt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with sim.h5ad (cells in no order) and its TOML."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # as the script does from the command line
    # cell-load asks for a table of 8 MB at every opening of a chunked array
    monkeypatch.setenv("CELL_LOAD_H5_RDCC_NSLOTS", "101")
    mixed(SMALL).write_h5ad(tmp_path / "sim.h5ad")
    (tmp_path / "config.toml").write_text(TOML)
    return tmp_path


@pytest.fixture
def words(features: Path) -> tuple[str, ...]:
    """The part of a command line that all tests share."""
    return ("--config", "config.toml", "--pert-features", str(features), *FAST, "--name", "run")


def without_usual(err: str) -> str:
    """stderr without the warning that the screen's genes are held out in one cell type only."""
    lines = err.splitlines(keepends=True)
    return "".join(x for x in lines if not x.startswith("warning: [fewshot] holds SIM003"))


@pytest.fixture
def run(folder: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> Run:
    """Run train_with_esm_features.main([...]) in this process, inside `folder`."""

    def main(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = script.main([*words, *TINY, *map(str, arguments)])
        except SystemExit as usage:  # argparse
            code = int(usage.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, without_usual(err))

    return main


@pytest.fixture
def plan(folder: Path, words: tuple[str, ...]) -> Callable[..., Plan]:
    """The plan of a command line."""

    def of(*arguments: object) -> Plan:
        options = script.parse([*words, *TINY, *map(str, arguments)])
        manifest = read_manifest(options.data.pert_features)
        place = options.run.output_dir.absolute() / options.run.name
        return make_plan(options, place, None, manifest, Path(), Notes())

    return of


@pytest.fixture
def copied(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """Write the copies of a command line, and COPIES, the TOML of a run on them."""

    def write(*arguments: object) -> Plan:
        made = plan(*arguments)
        assert made.fast is not None
        start_log(quiet=False)
        make_copies(made.fast, made.data.columns)
        Path(COPIES).write_text(toml_of_run(made, Notes()))
        return made

    return write


def mixed(screen: Any, **other: Any) -> anndata.AnnData:
    """A simulated screen, cells in no order."""
    data = simulate(replace(screen, **other))
    return data[np.random.default_rng(3).permutation(data.n_obs)].copy()


def only_copy(plan: Plan) -> Path:
    assert plan.fast is not None
    (copy,) = plan.fast.copies.values()
    return copy.target


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every folder and file below `folder`, with its content."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def content(path: Path) -> dict[str, Any]:
    """{name in an HDF5 file: its attributes, and dtype, shape and values of a dataset}."""
    found: dict[str, Any] = {}

    def note(name: str, node: Any) -> None:
        attributes = {k: np.asarray(v).tolist() for k, v in node.attrs.items()}
        values = (node.dtype, node.shape, node[()].tolist()) if hasattr(node, "dtype") else None
        found[name] = (attributes, values)

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def replace_x(path: Path, **parts: np.ndarray) -> None:
    """Put other arrays into the CSR matrix X of a file."""
    with h5py.File(path, "r+") as file:
        for name, values in parts.items():
            del file["X"][name]
            file["X"][name] = values


def parts_of_x(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with h5py.File(path) as file:
        return file["X/data"][:], file["X/indices"][:], file["X/indptr"][:]


def data_module(plan: Plan, toml: Path, consecutive: bool = False) -> Any:
    """The stock data module as the stock training makes it."""
    from cell_load.data_modules import PerturbationDataModule
    from cell_load.utils.data_utils import GlobalH5MetadataCache

    GlobalH5MetadataCache()._cache.clear()  # as in a new process: other tests have a sim.h5ad too
    kwargs = plan.stock["data"]["kwargs"] | {
        "toml_config_path": str(toml),
        "perturbation_features_file": str(plan.features),
        "use_consecutive_loading": consecutive,
    }
    module = PerturbationDataModule(batch_size=2, cell_sentence_len=SET, **kwargs)
    module.setup(stage="fit")
    return module


def all_cells(module: Any) -> dict[tuple[str, ...], tuple[bytes, ...]]:
    """{(split, dataset, file, cell type, label, barcode): rows and batch}, as the loader gets them.

    The row of each control drawn is compared with its row as a cell.
    """
    found, drawn = {}, {}
    splits = {"train": module.train_datasets, "val": module.val_datasets}
    for split, subsets in {**splits, "test": module.test_datasets}.items():
        for subset in subsets:
            for cell in subset.__getitems__(list(range(len(subset)))):
                where = (split, cell["dataset_name"], subset.dataset.h5_path.name)
                barcode = str(cell["pert_cell_barcode"])
                rows = [
                    cell[k].numpy().tobytes()
                    for k in ("pert_cell_emb", "pert_cell_counts")
                    if k in cell
                ]
                key = (*where, str(cell["cell_type"]), str(cell["pert_name"]), barcode)
                assert key not in found
                found[key] = (*rows, str(cell["batch_name"]).encode())
                control = (*where, str(cell["cell_type"]), CONTROL, str(cell["ctrl_cell_barcode"]))
                drawn[control] = cell["ctrl_cell_emb"].numpy().tobytes()
    assert [key for key, row in drawn.items() if found[key][0] != row] == []
    return found


def assert_same_cells(a: dict[Any, Any], b: dict[Any, Any]) -> None:
    assert len(a) > 100
    assert sorted(a.keys() ^ b.keys()) == []
    assert [key for key in a if a[key] != b[key]] == []


def batches(module: Any) -> list[Any]:
    """All batches of training and validation, from given seeds."""
    np.random.seed(0)
    torch.manual_seed(0)
    return [*module.train_dataloader(), *module.val_dataloader()]


# ---------------------------------------------------------------------------------------------
# dense: the same as stock
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "today"), [(0, True), (1, False)])
def test_dense_trains_the_weights_of_the_stock_command_on_the_source(
    run: Run, folder: Path, workers: int, today: bool
) -> None:
    """With `today` the source is then written as anndata 0.13 does, which stock cannot read."""
    flags = ("--max-steps", 5, "--num-workers", workers)
    stock_plan = run(*flags, "--output-dir", "stock", "--dry-run")
    assert stock_plan.code == 0, stock_plan.err
    command = shlex.split(stock_plan.out)
    assert command[:4] == ["PYTHONHASHSEED=0", "state", "tx", "train"]
    assert f"data.kwargs.toml_config_path={folder}/config.toml" in command
    stock = stock_command(*command[2:], cwd=folder)
    assert stock.returncode == 0, stock.stderr
    if today:
        for name in ("obs/_index", "var/_index"):
            nullable(folder / "sim.h5ad", name)
        assert run(*flags).code == 1
    ours = run(*flags, "--fast-loading", "dense")
    assert ours.code == 0, ours.err
    assert "data_cache/sim-dense-" in (folder / "runs/run/config.toml").read_text()
    theirs = torch.load(
        folder / "stock/run/checkpoints/final.ckpt", map_location="cpu", weights_only=False
    )
    own = checkpoint(folder / "runs/run", "final")
    assert own["global_step"] == theirs["global_step"] == 5
    assert_same_bits(own["state_dict"], theirs["state_dict"])
    assert_same_bits(own["optimizer_states"], theirs["optimizer_states"])


def store_float64(path: Path) -> None:
    data = parts_of_x(path)[0]
    replace_x(path, data=data.astype(np.float64) + 1e-9)


def store_int64(path: Path) -> None:
    _, indices, indptr = parts_of_x(path)
    replace_x(path, indices=indices.astype(np.int64), indptr=indptr.astype(np.int64))


def store_whole_numbers(path: Path) -> None:
    replace_x(path, data=np.ceil(parts_of_x(path)[0] * 5).astype(np.int32))


def store_unsorted(path: Path) -> None:
    data, indices, indptr = parts_of_x(path)
    for a, b in itertools.pairwise(indptr):
        data[a:b], indices[a:b] = data[a:b][::-1].copy(), indices[a:b][::-1].copy()
    replace_x(path, data=data, indices=indices)


def store_zeros(path: Path) -> None:
    data = parts_of_x(path)[0]
    data[::3] = 0
    replace_x(path, data=data)


def store_repeated(path: Path) -> None:
    """The first two values of every cell are of one gene."""
    data, indices, indptr = parts_of_x(path)
    indices[indptr[:-1]] = indices[indptr[:-1] + 1]
    replace_x(path, indices=indices, data=data)


def store_chunked(path: Path) -> None:
    data = anndata.read_h5ad(path)
    data.X = data.X.toarray()
    data.write_h5ad(path, compression="gzip")


def store_as_it_is(path: Path) -> None:
    """CSR float32."""


STORED = [
    *(store_as_it_is, store_float64, store_int64, store_whole_numbers, store_unsorted),
    *(store_zeros, store_repeated, store_chunked),
]


@pytest.mark.parametrize("store", STORED)
def test_dense_gives_the_batches_of_the_source(
    copied: Callable[..., Plan], folder: Path, store: Callable[[Path], None]
) -> None:
    store(folder / "sim.h5ad")
    made = copied("--fast-loading", "dense")
    with h5py.File(only_copy(made)) as file:
        x = file["X"]
        assert (x.dtype, x.chunks, x.compression) == (np.float32, None, None)
    expected = batches(data_module(made, folder / "config.toml"))
    assert len(expected) > 15
    assert_same_bits(batches(data_module(made, folder / COPIES)), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_dense_gives_the_batches_of_an_embedding(
    copied: Callable[..., Plan], folder: Path, sparse: bool
) -> None:
    write_embeddings(folder / "sim.h5ad", sparse)
    made = copied("--fast-loading", "dense", "--embed-key", "X_emb")
    expected = batches(data_module(made, folder / "config.toml"))
    assert expected[0]["pert_cell_emb"].shape == (2 * SET, 6)
    assert expected[0]["pert_cell_counts"].shape == (2 * SET, 10)
    assert_same_bits(batches(data_module(made, folder / COPIES)), expected)


def write_embeddings(path: Path, sparse: bool, **options: Any) -> None:
    """Give a file obsm/X_emb, 6 columns, and obsm/X_hvg, 10 columns."""
    data = anndata.read_h5ad(path)
    rng = np.random.default_rng(7)
    for key, width in (("X_emb", 6), ("X_hvg", 10)):
        dense = np.floor(rng.normal(size=(data.n_obs, width)) * 8) / 8 + 1 / 3
        dense[rng.random(dense.shape) < 0.4] = 0
        dense = dense.astype(np.float32)
        data.obsm[key] = scipy.sparse.csr_matrix(dense) if sparse else dense
    data.write_h5ad(path, **options)


# ---------------------------------------------------------------------------------------------
# sorted: the same cells
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csr", "dense", "embedding", "sparse embedding"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cell_keeps_split_label_name_batch_and_expression(
    copied: Callable[..., Plan], folder: Path, layout: str, form: str
) -> None:
    """Two datasets, one of two files with both extensions; zeroshot and fewshot."""
    (folder / "data").mkdir()
    for seed, name in enumerate(("data/zz.h5", "data/aa.h5ad", "other.h5ad")):
        data = mixed(SMALL, seed=seed)
        data.obs_names = [f"{name}-{barcode}" for barcode in data.obs_names]
        if form == "dense":
            data.X = data.X.toarray()
        data.write_h5ad(folder / name, compression="gzip")
        if "embedding" in form:
            write_embeddings(folder / name, sparse="sparse" in form, compression="gzip")
    (folder / "config.toml").write_text(
        '[datasets]\none = "data/{zz.h5,aa.h5ad}"\ntwo = "other.h5ad"\n'
        '[training]\none = "train"\ntwo = "train"\n[zeroshot]\n"one.simB" = "test"\n'
        '[fewshot."two.simA"]\nval = ["SIM003", "SIM001"]\ntest = ["SIM004"]\n'
    )
    embed = ("--embed-key", "X_emb") if "embedding" in form else ()
    made = copied("--fast-loading", layout, *embed)
    assert made.fast is not None and len(made.fast.copies) == 3
    source = data_module(made, folder / "config.toml")
    copy = data_module(made, folder / COPIES, consecutive=layout == "sorted")
    for kind in ("train_datasets", "val_datasets", "test_datasets"):
        a, b = ([s.dataset.h5_path.name for s in getattr(m, kind)] for m in (source, copy))
        assert a == b and a
    files = list(dict.fromkeys(s.dataset.h5_path.name for s in copy.train_datasets))
    assert files.index("zz.h5") == files.index("aa.h5ad") - 1
    assert {str(s.dataset.h5_path.parents[1]) for s in copy.train_datasets} == {
        f"{folder}/runs/data_cache"
    }
    cells = all_cells(copy)
    assert {len(rows) for rows in cells.values()} == {3 if embed else 2}
    assert_same_cells(all_cells(source), cells)
    assert copy.get_var_dims() == source.get_var_dims()


def test_names_that_cell_load_makes_up_stay_with_their_cells(
    copied: Callable[..., Plan], folder: Path
) -> None:
    data = mixed(SMALL)
    data.obs.index.name = "barcode"  # so that the file has no obs/_index
    data.write_h5ad(folder / "sim.h5ad")
    with h5py.File(folder / "sim.h5ad") as file:
        assert "_index" not in file["obs"]
    made = copied("--fast-loading")
    source = all_cells(data_module(made, folder / "config.toml"))
    assert ("train", "sim", "sim.h5ad") in {key[:3] for key in source}
    assert min(key[-1] for key in source) == "cell_000000"
    copy = all_cells(data_module(made, folder / COPIES, consecutive=True))
    assert_same_cells(source, copy)


def order_in(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(cell type, label) and name of each cell of a file, in its order."""
    obs = anndata.read_h5ad(path).obs
    return list(zip(obs["cell_type"], obs["target_gene"], strict=True)), list(obs.index)


def test_sorted_groups_are_in_one_piece_and_mixed_within_always_alike(
    copied: Callable[..., Plan], folder: Path
) -> None:
    made = copied("--fast-loading")
    groups, names = order_in(only_copy(made))
    runs = [g for g, before in zip(groups, [None, *groups], strict=False) if g != before]
    assert len(runs) == len(set(runs)) == 24
    source_groups, source_names = order_in(folder / "sim.h5ad")
    assert sorted(names) == sorted(source_names)
    place = {name: i for i, name in enumerate(source_names)}
    in_source_order = 0
    for group in runs:
        cells = [place[n] for n, g in zip(names, groups, strict=True) if g == group]
        assert {source_groups[i] for i in cells} == {group}
        in_source_order += cells == sorted(cells)
    assert in_source_order == 0
    batches_of_controls = anndata.read_h5ad(only_copy(made)).obs.query("target_gene == @CONTROL")
    assert batches_of_controls["batch_var"].nunique() == 2
    again = copied("--fast-loading", "--data-cache", "elsewhere")
    assert only_copy(again) != only_copy(made)
    assert only_copy(again).read_bytes() == only_copy(made).read_bytes()


def test_stock_loads_consecutively_from_the_copy_and_not_from_the_source(
    copied: Callable[..., Plan], folder: Path
) -> None:
    made = copied("--fast-loading")
    with pytest.raises(ValueError, match=r"requires each .* group to appear in one contiguous run"):
        data_module(made, folder / "config.toml", consecutive=True).train_dataloader()
    loaded = batches(data_module(made, folder / COPIES, consecutive=True))
    assert len(loaded) > 15
    controls = order_in(only_copy(made))
    place = {
        n: i
        for i, (n, g) in enumerate(zip(controls[1], controls[0], strict=True))
        if g[1] == CONTROL
    }
    for batch in loaded:
        drawn = np.array([place[str(b)] for b in batch["ctrl_cell_barcode"]]).reshape(-1, SET)
        assert (np.diff(drawn) == 1).sum(1).min() >= SET - 2  # may go on at the start of the pool


def test_sorted_trains_the_weights_of_its_stock_command(run: Run, folder: Path) -> None:
    flags = ("--max-steps", 5, "--fast-loading")
    ours = run(*flags)
    assert (ours.code, ours.out) == (0, f"{folder}/runs/run\n"), ours.err
    record = run_json(folder / "runs/run")
    assert (record["status"], record["fast_loading"]) == ("finished", "sorted")
    command = shlex.split(record["stock_command"])
    assert "data.kwargs.use_consecutive_loading=true" in command
    there = [w.replace(f"output_dir={folder}/runs", "output_dir=stock") for w in command[2:]]
    stock = stock_command(*there, cwd=folder)
    assert stock.returncode == 0, stock.stderr
    theirs = torch.load(
        folder / "stock/run/checkpoints/final.ckpt", map_location="cpu", weights_only=False
    )
    own = checkpoint(folder / "runs/run", "final")
    assert_same_bits(own["state_dict"], theirs["state_dict"])
    assert_same_bits(own["optimizer_states"], theirs["optimizer_states"])


# ---------------------------------------------------------------------------------------------
# What is in a copy
# ---------------------------------------------------------------------------------------------


def rich_screen(path: Path) -> anndata.AnnData:
    """A screen with everything that an .h5ad may hold."""
    data = mixed(SMALL)
    rng = np.random.default_rng(0)
    data.raw = data.copy()
    data.layers["counts"] = data.X.copy()
    data.obsp["graph"] = scipy.sparse.eye(data.n_obs, format="csr")
    data.varm["PCs"] = rng.normal(size=(data.n_vars, 2))
    data.obsm["X_emb"] = rng.normal(size=(data.n_obs, 6)).astype(np.float32)
    data.obsm["X_hvg"] = data.X[:, :10].toarray()
    data.obsm["X_unused"] = rng.normal(size=(data.n_obs, 4))
    data.obs["lane"] = rng.integers(0, 3, data.n_obs)
    data.obs["age"] = rng.normal(size=data.n_obs)
    data.obs["donor"] = pd.Categorical(rng.choice(["ann", "bob"], data.n_obs))
    data.obs["note"] = [f"note {i}" for i in range(data.n_obs)]
    data.obs["unused"] = "x"
    data.var["gene_name"] = [f"gene {i}" for i in range(data.n_vars)]
    data.var["highly_variable"] = np.arange(data.n_vars) < 10
    data.uns["hvg_names"] = np.array(data.var["gene_name"][:10], dtype=object)
    data.uns["umap"] = {"a": 1}
    data.write_h5ad(path, compression="gzip")
    return data


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_holds_what_cell_load_reads_and_nothing_else(
    copied: Callable[..., Plan], folder: Path, layout: str
) -> None:
    source = rich_screen(folder / "sim.h5ad")
    more = "data.kwargs.additional_obs=[donor,age,note]"
    made = copied("--fast-loading", layout, "--batch-col", "lane", more)
    copy = anndata.read_h5ad(only_copy(made))
    assert list(copy.obs) == ["age", "cell_type", "donor", "lane", "note", "target_gene"]
    expected = source.obs.loc[copy.obs_names, list(copy.obs)]
    pd.testing.assert_frame_equal(copy.obs, expected, check_names=False)
    pd.testing.assert_frame_equal(copy.var, source.var)
    assert list(copy.uns) == ["hvg_names", "log1p"]
    assert list(copy.uns["hvg_names"]) == list(source.uns["hvg_names"])
    assert list(copy.obsm) == ["X_hvg"]
    assert copy.obsm["X_hvg"].shape == (312, 10) and np.isnan(copy.obsm["X_hvg"]).all()
    assert not (copy.layers or copy.obsp or copy.varp or copy.varm or copy.raw)
    x = copy.X.toarray() if layout == "sorted" else copy.X
    np.testing.assert_array_equal(x, source[copy.obs_names].X.toarray())
    modules = [data_module(made, t) for t in (folder / "config.toml", folder / COPIES)]
    names = [m.train_datasets[0].dataset.get_gene_names("gene") for m in modules]
    assert names[0] == names[1] == [f"gene {i}" for i in range(10)]
    assert modules[0].get_var_dims() == modules[1].get_var_dims()
    (seen, expected_seen) = ({}, {})
    for found, module in zip((expected_seen, seen), modules, strict=True):
        for subset in module.train_datasets:
            for i in range(len(subset)):
                cell = subset[i]
                keys = ("donor", "age", "note", "batch_name")
                found[str(cell["pert_cell_barcode"])] = [str(cell[k]) for k in keys]
    assert_same_cells(expected_seen, seen)


def test_copy_for_an_embedding_only_declares_x(copied: Callable[..., Plan], folder: Path) -> None:
    source = rich_screen(folder / "sim.h5ad")
    flags = ("--batch-col", "lane", "--embed-key", "X_emb")
    made = copied("--fast-loading", *flags, "data.kwargs.output_space=embedding")
    copy = anndata.read_h5ad(only_copy(made))
    assert sorted(copy.obsm) == ["X_emb", "X_hvg"]
    np.testing.assert_array_equal(copy.obsm["X_emb"], source[copy.obs_names].obsm["X_emb"])
    assert copy.X.shape == source.shape and np.isnan(copy.X).all()
    with h5py.File(only_copy(made)) as file:
        assert file["X"].id.get_storage_size() == file["obsm/X_hvg"].id.get_storage_size() == 0
        assert file["obsm/X_emb"].id.get_storage_size() == 312 * 6 * 4


@pytest.mark.parametrize(
    ("flags", "matrices"),
    [
        ((), {"X"}),
        (("data.kwargs.output_space=all",), {"X"}),
        (("data.kwargs.store_raw_basal=true",), {"X", "obsm/X_hvg"}),
        (("--embed-key", "X_emb"), {"obsm/X_emb", "obsm/X_hvg"}),
        (("--embed-key", "X_emb", "data.kwargs.output_space=all"), {"obsm/X_emb", "X"}),
        (("--embed-key", "X_hvg"), {"obsm/X_hvg"}),
        (("--embed-key", "X_emb", "data.kwargs.output_space=embedding"), {"obsm/X_emb"}),
    ],
)
def test_matrices_that_are_written_are_those_whose_values_reach_a_batch(
    copied: Callable[..., Plan],
    folder: Path,
    flags: tuple[str, ...],
    matrices: set[str],
) -> None:
    rich_screen(folder / "sim.h5ad")
    made = copied("--fast-loading", "dense", "--batch-col", "lane", *flags)
    with h5py.File(only_copy(made)) as file:
        shapes = {m: file[m].shape[1] for m in ("X", "obsm/X_hvg", "obsm/X_emb") if m in file}
        written = {m for m in shapes if file[m].id.get_storage_size() > 0}
    assert written == matrices
    expected = batches(data_module(made, folder / "config.toml"))
    assert_same_bits(batches(data_module(made, folder / COPIES)), expected)


def test_batch_column_of_numbers_gives_the_same_batches(
    copied: Callable[..., Plan], folder: Path
) -> None:
    rich_screen(folder / "sim.h5ad")
    made = copied("--fast-loading", "--batch-col", "age")
    source = data_module(made, folder / "config.toml")
    copy = data_module(made, folder / COPIES, consecutive=True)
    assert len(copy.batch_onehot_map) == 312
    assert copy.batch_onehot_map.keys() == source.batch_onehot_map.keys()
    assert_same_cells(all_cells(source), all_cells(copy))


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------


def refused(run: Run, folder: Path, message: str, *arguments: object) -> None:
    """Exit code 1, that message, and nothing written."""
    before = snapshot(folder)
    result = run(*arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err == f"error: {message}\n"
    assert snapshot(folder) == before


def with_controls(a: int, b: int) -> anndata.AnnData:
    """A screen with so many control cells of simA and simB."""
    data = mixed(SMALL)
    keep = np.ones(data.n_obs, bool)
    for cell_type, n in (("simA", a), ("simB", b)):
        mask = (data.obs["cell_type"] == cell_type) & (data.obs["target_gene"] == CONTROL)
        keep[np.flatnonzero(mask)[n:]] = False
    return data[keep].copy()


def test_fewer_controls_than_a_set_are_refused_by_sorted_only(run: Run, folder: Path) -> None:
    with_controls(SET - 1, 5).write_h5ad(folder / "sim.h5ad")
    message = (
        "--fast-loading sorted draws 8 control cells in a row, and there are fewer: simA 7, simB "
        "5; stock would return short sets or crash. --fast-loading dense has no such need; or "
        "choose a smaller model.kwargs.cell_set_len"
    )
    refused(run, folder, message, "--fast-loading", "--max-steps", 1)
    assert run("--fast-loading", "dense", "--dry-run").code == 0
    with_controls(SET, SET).write_h5ad(folder / "sim.h5ad")
    assert run("--fast-loading", "--dry-run").code == 0


def test_cell_types_that_are_not_read_need_no_controls(run: Run, folder: Path) -> None:
    with_controls(SET, 5).write_h5ad(folder / "sim.h5ad")
    (folder / "config.toml").write_text(f'[datasets]\nsim = "sim.h5ad"\n{HELD}')
    assert run("--fast-loading", "--dry-run").code == 0


def test_mapping_by_batch_is_refused_by_sorted_only(run: Run, folder: Path) -> None:
    batch = "data.kwargs.basal_mapping_strategy=batch"
    message = (
        "--fast-loading sorted groups cells by cell type and perturbation, but "
        "data.kwargs.basal_mapping_strategy=batch wants them grouped by batch; --fast-loading "
        "dense has no such need"
    )
    refused(run, folder, message, "--fast-loading", batch, "--max-steps", 1)
    assert run("--fast-loading", "dense", batch, "--dry-run").code == 0


@pytest.mark.parametrize("flags", [(), ("--fast-loading",), ("--fast-loading", "dense")])
def test_stock_setting_of_consecutive_loading_is_not_typed(
    run: Run, folder: Path, flags: tuple[str, ...]
) -> None:
    typed = "data.kwargs.use_consecutive_loading=true"
    message = f"'{typed}': use --fast-loading sorted instead of this override"
    refused(run, folder, message, *flags, typed, "--max-steps", 1)


def test_control_label_that_is_not_there_is_said_as_without_the_option(
    run: Run, folder: Path
) -> None:
    flags = ("--control-pert", "DMSO", "--max-steps", 1)
    plain, fast = run(*flags), run("--fast-loading", *flags)
    said = "sim.h5ad: no cell has the control label 'DMSO' in obs column 'target_gene' (did you"
    assert said in plain.err
    assert (fast.code, fast.out, fast.err) == (1, "", plain.err)
    assert not (folder / "runs").exists()


def test_column_that_a_file_lacks_is_named(run: Run, folder: Path) -> None:
    message = "sim.h5ad has no obs column donor, lane"
    more = "data.kwargs.additional_obs=[lane,donor,batch_var]"
    refused(run, folder, message, "--fast-loading", more, "--max-steps", 1)


def test_two_values_of_one_gene_are_refused_by_sorted(
    run: Run, copied: Callable[..., Plan], folder: Path
) -> None:
    store_repeated(folder / "sim.h5ad")
    result = run("--fast-loading", "--max-steps", 1)
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        f"error: {folder}/sim.h5ad: a cell has two values of one gene in /X; write the file again "
        f"after {SETTING}adata.X.sum_duplicates()"
    )
    left = [p for p in (folder / "runs/data_cache").iterdir() if p.suffix != ".lock"]
    assert left == [] and not (folder / "runs/run").exists()
    data, indices, _ = parts_of_x(folder / "sim.h5ad")
    assert indices[0] == indices[1]
    dense = anndata.read_h5ad(only_copy(copied("--fast-loading", "dense"))).X
    assert dense[0, indices[0]] == data[0] + data[1] > max(data[:2])


def test_source_that_changes_while_it_is_read_is_refused(
    plan: Callable[..., Plan], folder: Path
) -> None:
    made = plan("--fast-loading")
    assert made.fast is not None
    os.utime(folder / "sim.h5ad", (1, 1))
    with pytest.raises(InputError) as error:
        make_copies(made.fast, made.data.columns)
    assert str(error.value) == f"{folder}/sim.h5ad changed while it was read; start again"
    assert [p.suffix for p in (folder / "runs/data_cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_too_little_space_is_said_before_anything_is_written(
    run: Run, folder: Path, layout: str
) -> None:
    """X is declared larger than the disk, and never written."""
    width = 100_000
    cells = shutil.disk_usage(folder).total // width
    with h5py.File(folder / "sim.h5ad", "r+") as file:
        del file["X"], file["obs/_index"]
        x = file.create_dataset("X", (cells, width), np.float32, chunks=(10, width))
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for name in ("target_gene", "cell_type", "batch_var"):
            column = file["obs"][name]
            n = len(column["categories"])
            codes = np.arange(cells) // 2 % n if name == "target_gene" else np.arange(cells) % n
            del column["codes"]
            column["codes"] = codes.astype(np.int8)
    needed = (4 * cells * width + 100 * cells) / 1e9
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    result = run("--fast-loading", layout, "--max-steps", 1)
    assert result.code == 1
    assert re.fullmatch(
        rf"error: not enough space in {folder}/runs/data_cache: --fast-loading {layout} writes "
        rf"{needed:.1f} GB, \d+\.\d GB are free\. Free some, or choose another --data-cache\n",
        result.err,
    ), result.err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


# ---------------------------------------------------------------------------------------------
# Which copies are written, and when
# ---------------------------------------------------------------------------------------------


def test_file_in_order_is_read_where_it_is_by_sorted(
    copied: Callable[..., Plan], run: Run, folder: Path
) -> None:
    simulate(SMALL).write_h5ad(folder / "sim.h5ad")
    result = run("--fast-loading", "--max-steps", 1)
    assert result.code == 0, result.err
    assert "rewriting" not in result.err
    assert (
        "loading   sorted: 1 file in this order already, read without a copy"
    ) in result.err.splitlines()
    assert (
        f'sim = "{folder}/sim.h5ad"' in (folder / "runs/run/config.toml").read_text().splitlines()
    )
    assert not (folder / "runs/data_cache").exists()
    made = copied("--fast-loading", "dense")
    assert made.fast is not None and list(made.fast.copies) == [Path("sim.h5ad")]


def test_only_uncompressed_dense_file_is_read_where_it_is_by_dense(
    copied: Callable[..., Plan], folder: Path
) -> None:
    data = mixed(SMALL)
    data.X = data.X.toarray()
    data.write_h5ad(folder / "sim.h5ad")
    made = copied("--fast-loading", "dense")
    assert made.fast is not None and made.fast.copies == {}
    assert f'sim = "{folder}/sim.h5ad"' in (folder / COPIES).read_text().splitlines()
    assert not made.fast.folder.exists()
    data.write_h5ad(folder / "sim.h5ad", compression="gzip")
    assert only_copy(copied("--fast-loading", "dense")).exists()


def test_one_cell_out_of_place_is_enough_for_a_copy(
    plan: Callable[..., Plan], folder: Path
) -> None:
    data = simulate(SMALL)
    order = np.arange(data.n_obs)
    data[np.roll(order, 1)].copy().write_h5ad(folder / "sim.h5ad")
    made = plan("--fast-loading")
    assert made.fast is not None and list(made.fast.copies) == [Path("sim.h5ad")]


def test_copies_are_shared_by_runs_and_made_again_when_the_source_changes(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("--fast-loading", "--max-steps", 1)
    cache = folder / "runs/data_cache"
    assert f"rewriting 1 file of data for fast loading (sorted, 0.0 GB) into {cache}" in first.err
    assert re.search(r"^rewrote 1 file in \d+ s$", first.err, re.M)
    (copy,) = cache.glob("*/sim.h5ad")
    state = copy.stat()
    second = run("--fast-loading", "--max-steps", 1, "--name", "second")
    assert second.code == 0, second.err
    assert "rewriting" not in second.err and "rewrote" not in second.err
    assert (copy.stat().st_mtime_ns, copy.stat().st_ino) == (state.st_mtime_ns, state.st_ino)
    assert list(cache.glob("*/sim.h5ad")) == [copy]
    other = run(
        "--fast-loading",
        "--max-steps",
        1,
        "--name",
        "third",
        "data.kwargs.additional_obs=[batch_var]",
    )
    assert "rewriting" not in other.err and other.code == 0


def test_copy_follows_time_columns_matrices_and_layout_of_the_source(
    copied: Callable[..., Plan], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich_screen(folder / "sim.h5ad")
    usual = ("--batch-col", "batch_var", "data.kwargs.output_space=all")
    variants: list[tuple[str, ...]] = [
        (*usual, "--fast-loading"),
        (*usual, "--fast-loading", "dense"),
        (*usual, "--batch-col", "lane", "--fast-loading"),
        (*usual, "--fast-loading", "data.kwargs.additional_obs=[age]"),
        (*usual, "--fast-loading", "--embed-key", "X_hvg"),
    ]
    copies = [only_copy(copied(*v)) for v in variants]
    assert len(set(copies)) == len(variants)
    assert "stay in" not in capsys.readouterr().err
    assert [only_copy(copied(*v)) for v in variants] == copies
    assert without_usual(capsys.readouterr().err) == ""
    before = {p: p.read_bytes() for p in copies}
    os.utime(folder / "sim.h5ad", (1, 1))
    new = only_copy(copied(*variants[0]))
    assert new not in copies
    assert {p: p.read_bytes() for p in copies} == before
    said = [x for x in capsys.readouterr().err.splitlines() if "stay in" in x]
    assert len(said) == 1
    start, _, rest = said[0].partition(" stay in ")
    assert start == f"{folder}/sim.h5ad changed: copies of what it was"
    listed, _, end = rest.partition(";")
    assert end == " delete them when no run reads them"
    assert set(listed.split(", ")) == {str(p.parent) for p in copies}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of 20,000 cells x 2,000 genes, 8 million values, cells in no order."""
    path = tmp_path_factory.mktemp("big") / "big.h5ad"
    write_big(path, cells=20_000, genes=2_000, values=400)
    yield path
    path.unlink()


def write_big(path: Path, cells: int, genes: int, values: int) -> None:
    """A CSR file, X written in pieces; `values` values a cell."""
    rng = np.random.default_rng(0)
    labels = rng.choice([*SMALL.symbols, CONTROL], cells)
    obs = pd.DataFrame(
        {
            "target_gene": pd.Categorical(labels),
            "cell_type": pd.Categorical(rng.choice(["simA", "simB"], cells)),
            "batch_var": pd.Categorical(["b"] * cells),
        },
        index=[f"cell {i}" for i in range(cells)],
    )
    var = pd.DataFrame(index=[f"gene {i}" for i in range(genes)])
    empty = scipy.sparse.csr_matrix((cells, genes), dtype=np.float32)
    anndata.AnnData(empty, obs=obs, var=var, uns={"log1p": {}}).write_h5ad(path)
    step, piece = genes // values, cells // 10
    with h5py.File(path, "r+") as file:
        x = file["X"]
        for name in ("data", "indices", "indptr"):
            del x[name]
        x["indptr"] = np.arange(cells + 1, dtype=np.int64) * values
        data = x.create_dataset("data", (cells * values,), np.float32)
        indices = x.create_dataset("indices", (cells * values,), np.int32)
        for first in range(0, cells * values, piece * values):
            there = slice(first, first + piece * values)
            data[there] = rng.random(piece * values, np.float32) + 0.5
            starts = rng.integers(0, step, (piece, 1), np.int32)
            indices[there] = (starts + step * np.arange(values, dtype=np.int32)).ravel()


@pytest.fixture
def big_folder(folder: Path, big: Path) -> Path:
    """`folder` with a TOML on the big file."""
    (folder / "config.toml").write_text(TOML.replace('"sim.h5ad"', f'"{big}"'))
    return folder


def start_rewriting(
    folder: Path, words: tuple[str, ...], *more: str, err: Path | None = None
) -> Fork:
    words = (*words, *more, "--max-steps", "1", "--fast-loading", *TINY)
    return script_fork("train_with_esm_features", *words, cwd=folder, err=err)


@contextlib.contextmanager
def caught_rewriting(
    folder: Path, words: tuple[str, ...], *more: str
) -> Iterator[tuple[Fork, Path]]:
    """A run that is suspended while it writes rows into a copy, and its temporary folder."""
    cache = folder / "runs/data_cache"

    def begin() -> Fork:
        shutil.rmtree(folder / "runs", ignore_errors=True)  # of one that was looked at too late
        return start_rewriting(folder, words, *more)

    def half() -> list[Path]:
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            return [p for p in cache.glob(".*.tmp/big.h5ad") if p.stat().st_size >= 100_000]
        return []

    with caught(begin, lambda: bool(half())) as process:
        yield process, half()[0].parent


def test_killed_while_rewriting_leaves_no_copy_and_the_next_run_writes_it_whole(
    copied: Callable[..., Plan], big_folder: Path, words: tuple[str, ...]
) -> None:
    cache = big_folder / "runs/data_cache"
    with caught_rewriting(big_folder, words) as (process, half):
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert half.exists() and list(cache.glob("[!.]*")) == []
    assert not (big_folder / "runs/run").exists()
    (half / "left.h5ad").write_text("half")
    copy = only_copy(copied("--fast-loading"))
    assert half.name == f".{copy.parent.name}.tmp" and not half.exists()
    assert sorted(p.name for p in copy.parent.iterdir()) == ["big.h5ad", "source.json"]
    undisturbed = only_copy(copied("--fast-loading", "--data-cache", "other"))
    assert copy.read_bytes() == undisturbed.read_bytes()


def test_sigterm_while_rewriting_exits_143_and_leaves_nothing(
    big_folder: Path, words: tuple[str, ...]
) -> None:
    cache = big_folder / "runs/data_cache"
    with caught_rewriting(big_folder, words) as (process, _):
        process.terminate()
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err.splitlines()[-1]) == (143, "stopped by SIGTERM")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    assert not (big_folder / "runs/run").exists()


def test_two_runs_at_once_write_one_copy_and_both_finish(
    big_folder: Path, words: tuple[str, ...]
) -> None:
    cache, waited = big_folder / "runs/data_cache", "another process is rewriting"
    saying = big_folder / "second.err"
    with caught_rewriting(big_folder, words, "--name", "first") as (first, half):
        second = start_rewriting(big_folder, words, "--name", "second", err=saying)
        try:  # the first is held until the second has found it at work
            until(lambda: waited in saying.read_text(), second, saying)
            assert half.exists()
            first.send_signal(signal.SIGCONT)
            said = [first.communicate(timeout=PATIENCE)[1]]
            second.wait(PATIENCE)
        finally:
            second.kill()
            second.wait()
    said.append(saying.read_text())
    assert (first.returncode, second.returncode) == (0, 0), said
    assert [s.count("rewriting 1 file of data") for s in said] == [1, 1]
    assert [s.count(waited) for s in said] == [0, 1]
    (copy,) = cache.glob("[!.]*")
    assert list(cache.glob("*.tmp")) == []
    for name in ("first", "second"):
        assert f"{copy}/big.h5ad" in (big_folder / f"runs/{name}/config.toml").read_text()


@pytest.mark.parametrize("form", ["csr", "dense", "compressed", "empty rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_is_the_same_whatever_the_size_of_a_block(
    copied: Callable[..., Plan],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    form: str,
) -> None:
    data = mixed(SMALL)
    if form in ("dense", "compressed"):
        data.X = data.X.toarray()
    if form == "empty rows":
        data.X = scipy.sparse.diags((np.arange(data.n_obs) % 4 == 1).astype("f4")) @ data.X
        data.X = scipy.sparse.csr_matrix(data.X)
    data.write_h5ad(folder / "sim.h5ad", compression="gzip")
    assert BLOCK == 8_000_000
    whole = content(only_copy(copied("--fast-loading", layout)))
    for block in (50, 7, 1000):
        monkeypatch.setattr(fast_copies, "BLOCK", block)
        again = copied("--fast-loading", layout, "--data-cache", f"cache{block}")
        assert content(only_copy(again)) == whole
    rows = anndata.read_h5ad(only_copy(again))
    x = rows.X if isinstance(rows.X, np.ndarray) else rows.X.toarray()
    source = data[rows.obs_names].X
    np.testing.assert_array_equal(x, source if isinstance(source, np.ndarray) else source.toarray())


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of 400 MB: 50 million values and their columns."""
    path = tmp_path_factory.mktemp("huge") / "huge.h5ad"
    write_big(path, cells=5_000, genes=20_000, values=10_000)
    yield path
    path.unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_bounded_whatever_the_size_of_the_file(
    huge: Path, tmp_path: Path, layout: str
) -> None:
    assert huge.stat().st_size > 400e6
    target = tmp_path / "cache" / "huge" / "huge.h5ad"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, huge, target, layout],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 400e6
    shutil.rmtree(tmp_path / "cache")
    assert 20 < float(done.stdout) < 350


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def test_bare_option_before_an_override_means_sorted(run: Run, folder: Path) -> None:
    bare = run("--dry-run", "--fast-loading", "training.lr=0.01")
    named = run("--dry-run", "--fast-loading", "sorted", "training.lr=0.01")
    assert bare == named and bare.code == 0
    assert "data.kwargs.use_consecutive_loading=true" in shlex.split(bare.out)
    assert "training.lr=0.01" in shlex.split(bare.out)
    dense = run("--dry-run", "--fast-loading", "dense", "training.lr=0.01")
    assert "data.kwargs.use_consecutive_loading=false" in shlex.split(dense.out)


@pytest.mark.parametrize("last", [("--fast-loading",), ("--fast-loading", "--dry-run")])
def test_bare_option_at_the_end_or_before_an_option_means_sorted(
    words: tuple[str, ...], last: tuple[str, ...]
) -> None:
    assert script.parse([*words, *last]).training.fast_loading == "sorted"
    assert script.parse([*words, *last, "--data-cache", "x"]).training.data_cache == Path("x")


def test_no_option_means_no_copies(words: tuple[str, ...]) -> None:
    assert script.parse([*words]).training.fast_loading is None


def test_cache_without_the_option_is_a_usage_error(run: Run, folder: Path) -> None:
    before = snapshot(folder)
    result = run("--data-cache", "cache", "--max-steps", 1)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1] == (
        "train_with_esm_features.py: error: --data-cache goes with --fast-loading"
    )
    assert snapshot(folder) == before


def test_plan_says_what_is_read_and_written_and_dry_run_writes_nothing(
    run: Run, copied: Callable[..., Plan], folder: Path
) -> None:
    """Three files: one in order, one copied already, one to be copied."""
    simulate(replace(SMALL, cells=40)).write_h5ad(folder / "a.h5ad")
    mixed(SMALL, seed=4).write_h5ad(folder / "b.h5ad")
    mixed(SMALL, cells=4000, genes=30).write_h5ad(folder / "c.h5ad")
    toml = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(toml.replace("sim.h5ad", "b.h5ad"))
    copied("--fast-loading", "--output-dir", "out")
    (folder / "config.toml").write_text(toml.replace("sim.h5ad", "{a,b,c}.h5ad"))
    before = snapshot(folder)
    result = run("--fast-loading", "--output-dir", "out", "--dry-run")
    assert result.code == 0, result.err
    assert snapshot(folder) == before
    values = len(parts_of_x(folder / "c.h5ad")[0])
    cells = 2 * (11 * 4000 + 24)
    size = (8 * values + 8 * (cells + 1) + 100 * cells) / 1e9
    assert size > 0.02
    assert (
        f"loading   sorted: 2 files of 3 read as copies in {folder}/out/data_cache, 1 to be "
        f"written ({size:.2f} GB)"
    ) in result.err.splitlines()
    command = shlex.split(result.out)
    assert f"data.kwargs.toml_config_path={folder}/out/run/config.toml" in command


def test_size_that_is_planned_is_about_the_size_that_is_written(
    copied: Callable[..., Plan], folder: Path
) -> None:
    mixed(SMALL, cells=400, genes=300).write_h5ad(folder / "sim.h5ad")
    for layout in LAYOUTS:
        made = copied("--fast-loading", layout)
        assert made.fast is not None
        (copy,) = made.fast.copies.values()
        assert 0.9 < copy.size / copy.target.stat().st_size < 1.2


# ---------------------------------------------------------------------------------------------
# Paths that cell-load takes for patterns
# ---------------------------------------------------------------------------------------------


def two_files(folder: Path, second: str = "b.h5ad") -> None:
    for seed, name in enumerate(("a.h5ad", second)):
        mixed(SMALL, seed=seed).write_h5ad(folder / "data" / name)
    (folder / "config.toml").write_text(TOML.replace('"sim.h5ad"', '"data"'))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", ["[cache]", "ca*che?", "ca[a]che*"])
def test_cache_with_signs_of_patterns_in_its_name_works(
    copied: Callable[..., Plan], folder: Path, name: str, several: bool
) -> None:
    if several:
        (folder / "data").mkdir()
        two_files(folder)
    made = copied("--fast-loading", "--data-cache", name)
    modules = [data_module(made, folder / COPIES, True), data_module(made, folder / "config.toml")]
    parents = {str(s.dataset.h5_path.parents[1]) for s in modules[0].train_datasets}
    assert parents == {f"{folder}/{name}"}
    assert_same_cells(*map(all_cells, modules))


@pytest.mark.parametrize(
    ("cache", "second"), [("{cache}", None), ("a,b", "b.h5ad"), ("cache", "b,c.h5ad")]
)
def test_path_that_cell_load_would_take_apart_is_refused(
    run: Run, folder: Path, cache: str, second: str | None
) -> None:
    if second:
        (folder / "data").mkdir()
        two_files(folder, second)
    result = run("--fast-loading", "--data-cache", cache, "--max-steps", 1)
    assert (result.code, result.out) == (1, "")
    assert not (folder / "runs/run").exists() and not (folder / cache).exists()
    message = result.err.splitlines()[-1]
    names = ["a", second.removesuffix(".h5ad")] if second else ["sim"]
    where = ", ".join(
        rf"{re.escape(f'{folder}/{cache}/{n}-sorted-')}\w+/{re.escape(n)}\.h5ad" for n in names
    )
    assert re.fullmatch(
        f"error: cell-load cannot be given the path {where}: it takes braces and commas in it for "
        "a pattern. Choose a --data-cache and file names without them",
        message,
    ), message


# ---------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------


def test_resume_keeps_layout_and_cache_and_does_not_mix_layouts(run: Run, folder: Path) -> None:
    run_dir = folder / "runs/run"
    assert run("--fast-loading", "--data-cache", "cache", "--max-steps", 1).code == 0
    toml = (run_dir / "config.toml").read_text()
    assert f'sim = "{folder}/cache/sim-sorted-' in toml
    resumed = run("--resume", "--max-steps", 2)
    assert resumed.code == 0, resumed.err
    assert "rewriting" not in resumed.err and not (folder / "runs/data_cache").exists()
    assert (run_dir / "config.toml").read_text() == toml
    record = run_json(run_dir)
    assert (record["fast_loading"], record["steps"]) == ("sorted", 2)
    assert record["identity"]["settings"]["data.kwargs.use_consecutive_loading"] is True
    before = snapshot(run_dir)
    mixed_up = run("--resume", "--max-steps", 2, "--fast-loading", "dense")
    assert mixed_up.code == 1
    assert mixed_up.err.splitlines()[-1] == (
        f"error: {run_dir} was trained otherwise (data.kwargs.use_consecutive_loading: True -> "
        "False); resuming would mix two runs. --overwrite trains anew, --name NAME makes another "
        "run, --force mixes them"
    )
    assert snapshot(run_dir) == before and not (folder / "runs/data_cache").exists()
    finished = run("--fast-loading", "--data-cache", "cache", "--max-steps", 2)
    assert finished.err.splitlines()[-1] == f"up to date: {run_dir} finished with the same inputs"


# ---------------------------------------------------------------------------------------------
# Nodes that cell-load cannot read as they are stored
# ---------------------------------------------------------------------------------------------


def index_line(place: str) -> str:
    return f"{place} = {place}.astype(object)" if OLD_PANDAS else ""


def column_line(name: str) -> str:
    return f"adata.obs['{name}'] = adata.obs['{name}'].astype(str).astype('category')"


EMBEDDING = ("--embed-key", "X_emb")
GENES = (*EMBEDDING, "--output-space", "gene")
TEXT, CATEGORIES = "nullable-string-array", "categorical of nullable-string-array"
NUMBER, NAMES = ("--batch-col", "number"), "adata.var['gene_name']"

REFUSED: list[tuple[Callable[[Path, str], None], str, tuple[str, ...], str, str]] = [
    (nullable, "obs/_index", (), TEXT, index_line("adata.obs_names")),
    (categorical, "obs/_index", (), "categorical", "adata.obs_names = list(adata.obs_names)"),
    (nullable, "var/_index", (), TEXT, index_line("adata.var_names")),
    (nullable, "var/gene_name", (), TEXT, index_line(NAMES)),
    (nullable_categories, "var/gene_name", (), CATEGORIES, index_line(NAMES)),
    (plain_text, "obs/target_gene", (), "string-array", column_line("target_gene")),
    (nullable, "obs/target_gene", (), TEXT, column_line("target_gene")),
    (old_categorical, "obs/target_gene", (), "array", column_line("target_gene")),
    (
        nullable_categories,
        "obs/target_gene",
        (),
        CATEGORIES,
        column_line("target_gene"),
    ),
    (plain_text, "obs/cell_type", (), "string-array", column_line("cell_type")),
    (old_categorical, "obs/cell_type", (), "array", column_line("cell_type")),
    (nullable, "obs/batch_var", (), TEXT, column_line("batch_var")),
    (nullable_categories, "obs/batch_var", (), CATEGORIES, column_line("batch_var")),
    (nullable_integer, "obs/number", NUMBER, "nullable-integer", column_line("number")),
    (
        nullable_boolean,
        "obs/left",
        ("--batch-col", "left"),
        "nullable-boolean",
        column_line("left"),
    ),
    (compressed_columns, "obsm/X_emb", EMBEDDING, "csc_matrix", "{} = {}.tocsr()"),
    (data_frame, "obsm/X_emb", EMBEDDING, "dataframe", "{} = {}.to_numpy()"),
    (compressed_columns, "obsm/X_hvg", GENES, "csc_matrix", "{} = {}.tocsr()"),
    (data_frame, "obsm/X_hvg", GENES, "dataframe", "{} = {}.to_numpy()"),
    (nullable_boolean, "var/highly_variable", GENES, "nullable-boolean", "{} = {}.astype(bool)"),
    (whole_numbers, "var/highly_variable", GENES, "array", "{} = {}.astype(bool)"),
]
"""How a node is stored, options with which cell-load opens it, its name, the line that helps."""

READ: list[tuple[Callable[[Path, str], None], str, tuple[str, ...]]] = [
    (plain_text, "obs/batch_var", ()),
    (categorical, "var/gene_name", ()),
    (compressed_rows, "obsm/X_emb", EMBEDDING),
    (compressed_rows, "obsm/X_hvg", GENES),
    (nullable_integer, "obs/number", ()),  # not opened
    (nullable, "obs/target_gene/categories", ("--pert-col", "target")),  # nor this
    (nullable_boolean, "var/highly_variable", ("data.kwargs.output_space=all",)),
    (compressed_columns, "obsm/X_emb", ()),
]
SILENT = {"var/highly_variable", "obsm/X_emb", "obsm/X_hvg"}
"""What cell-load reads wrongly without an error in some forms."""


def storable_screen(path: Path, flags: tuple[str, ...]) -> None:
    """A screen with every node that cell-load may open with these options, as it reads them."""
    data = mixed(SMALL)
    rng = np.random.default_rng(0)
    data.obsm["X_emb"] = rng.normal(size=(data.n_obs, 6)).astype(np.float32)
    data.obsm["X_hvg"] = data.X[:, :10].toarray()
    data.obs["number"] = rng.integers(0, 3, data.n_obs)
    data.obs["left"] = rng.integers(0, 2, data.n_obs).astype(bool)
    data.obs["target"] = data.obs["target_gene"]
    data.var["gene_name"] = [f"gene {i}" for i in range(data.n_vars)]
    data.var["highly_variable"] = np.arange(data.n_vars) < (
        10 if flags[:1] == EMBEDDING[:1] else 30
    )
    data.strings_to_categoricals = lambda *_: None
    data.write_h5ad(path)


def prepare(path: Path, name: str) -> None:
    """Let cell-load take the names of genes from this node."""
    if name == "var/_index":
        with changing(path) as file:
            del file["var/gene_name"]
            columns = [c for c in file["var"].attrs["column-order"] if c != "gene_name"]
            file["var"].attrs["column-order"] = columns
    if name == "var/gene_name":
        categorical(path, name)
    if name == "uns/hvg_names":
        with changing(path) as file:
            del file["var/highly_variable"]


def everything_read(made: Plan, toml: Path) -> tuple[Any, ...]:
    """All that State gets from the data module."""
    module = data_module(made, toml)
    dims = module.get_var_dims()
    return dims, sorted(module.batch_onehot_map), batches(module)


@pytest.mark.parametrize(("store", "name", "flags", "stored", "line"), REFUSED)
def test_node_that_cell_load_cannot_read_is_refused_and_mended_by_a_copy(
    run: Run,
    plan: Callable[..., Plan],
    copied: Callable[..., Plan],
    folder: Path,
    store: Callable[[Path, str], None],
    name: str,
    flags: tuple[str, ...],
    stored: str,
    line: str,
) -> None:
    path = folder / "sim.h5ad"
    storable_screen(path, flags)
    prepare(path, name)
    made = plan(*flags)
    expected = everything_read(made, folder / "config.toml")
    if store is nullable:
        plain_text(path, name)
    store(path, name)
    try:
        wrong = everything_read(made, folder / "config.toml")
        assert name in SILENT
        with pytest.raises(AssertionError):
            assert_same_bits(wrong, expected)
    except (KeyError, TypeError, ValueError, IndexError) as error:  # State's training ends in it
        assert str(error)
    table, _, key = name.partition("/")
    line = line.replace("{}", f"adata.{table}['{key}']")
    line = f"{SETTING}{line}".removesuffix("; ")
    message = (
        f"sim.h5ad: cell-load cannot read {name} (stored as {stored}). Write it again with a "
        f"current anndata, after {line}, or train with --fast-loading, whose copies it can read"
    )
    refused(run, folder, message, "--max-steps", 1, *flags)
    copied("--fast-loading", "dense", *flags)
    assert_same_bits(everything_read(made, folder / COPIES), expected)
    if store is old_categorical:
        return
    adata = anndata.read_h5ad(path)
    with anndata.settings.override(allow_write_nullable_strings=not OLD_PANDAS):
        exec(line, {"adata": adata, "anndata": anndata})
        path.unlink()
        adata.write_h5ad(path)
    assert_same_bits(everything_read(plan(*flags), folder / "config.toml"), expected)


@pytest.mark.parametrize(("store", "name", "flags"), READ)
def test_node_that_cell_load_reads_or_does_not_open_is_accepted(
    plan: Callable[..., Plan],
    folder: Path,
    store: Callable[[Path, str], None],
    name: str,
    flags: tuple[str, ...],
) -> None:
    path = folder / "sim.h5ad"
    storable_screen(path, flags)
    made = plan(*flags)
    expected = everything_read(made, folder / "config.toml")
    store(path, name)
    assert_same_bits(everything_read(plan(*flags), folder / "config.toml"), expected)
