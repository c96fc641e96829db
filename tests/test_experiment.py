"""The TOML and its files, as cell-load sees them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import toml
from cell_load.data_modules import PerturbationDataModule
from hypothesis import given, settings
from hypothesis import strategies as st

from state_esm_features.console import Notes
from state_esm_features.experiment import (
    absolute_paths,
    dataset_files,
    files_cell_load_reads,
    load_experiment,
    toml_text,
)


def cell_load_finds(path: str) -> list[Path] | type[BaseException]:
    """What cell-load's own search returns for a path of [datasets], or how it dies of it."""
    module = object.__new__(PerturbationDataModule)
    try:
        return list(PerturbationDataModule._find_dataset_files(module, Path(path)).values())
    except (NotImplementedError, ValueError) as error:
        return type(error)


def we_find(path: str) -> list[Path] | type[BaseException]:
    try:
        return files_cell_load_reads(path)
    except (NotImplementedError, ValueError) as error:
        return type(error)


PATH_FORMS = {
    "data": ["a.h5", "b.h5ad", "c.h5ad"],
    "data/": ["a.h5", "b.h5ad", "c.h5ad"],
    "./data": ["a.h5", "b.h5ad", "c.h5ad"],
    "data/a.h5": ["a.h5"],
    "data//b.h5ad": ["b.h5ad"],
    "data/notes.txt": ["notes.txt"],
    "data/sub/../b.h5ad": ["sub/../b.h5ad"],
    "data/*.h5": ["a.h5"],
    "data/*.h5ad": ["b.h5ad", "c.h5ad"],
    "data/?.h5ad": ["b.h5ad", "c.h5ad"],
    "data/[ab].h5": ["a.h5"],
    "data/*": ["sub/d.h5", "other/e.h5ad", "sub/a.h5ad"],
    "data/*/": ["sub/d.h5", "other/e.h5ad", "sub/a.h5ad"],
    "data/{a,b}.h5ad": ["b.h5ad"],
    "data/{c,b}.h5ad": ["c.h5ad", "b.h5ad"],
    "data/{a, b}.{h5,h5ad}": ["a.h5", "b.h5ad"],
    "data/{sub,other}/*.h5ad": ["sub/a.h5ad", "other/e.h5ad"],
    "data/{sub,other}": ["sub/d.h5", "sub/a.h5ad", "other/e.h5ad"],
    "data/{a}.h5": ["a.h5"],
    "data/{nowhere,a}.h5": ["a.h5"],
    "data/{a.h5,sub/a.h5ad}": ["sub/a.h5ad"],
    "data/{sub/a.h5ad,a.h5}": ["a.h5"],
    "data/nowhere": [],
    "data/nowhere/*.h5": [],
    "data/{nowhere,nothing}.h5": [],
    "data/{a,{b,c}}.h5ad": ["b.h5ad"],
}


@pytest.mark.parametrize("where", ["relative", "absolute"])
@pytest.mark.parametrize("path", PATH_FORMS)
def test_the_files_of_every_path_form_are_those_of_cell_load(
    tree: Path, path: str, where: str
) -> None:
    start = "" if where == "relative" else f"{tree}/"
    found = files_cell_load_reads(start + path)
    assert found == [Path(f"{start}data/{name}") for name in PATH_FORMS[path]]
    assert found == cell_load_finds(start + path)


def test_recursive_globs_are_those_of_cell_load(tree: Path) -> None:
    assert {f.stem for f in files_cell_load_reads("**/*.h5ad")} == {"a", "b", "c", "e"}
    for path in ("**/*.h5ad", "**", "data/**/*.h5", f"{tree}/**/*.h5ad", f"{tree}/**"):
        assert files_cell_load_reads(path) == cell_load_finds(path)


PIECES = ["a", "b", "x", "z", "/", ".h5", ".h5ad", "*", "?", "[ab]", "**", " ", ",", "{", "}"]


GROUPS = ["{a,b}", "{x,z}", "{x/a, z/b}", "{.h5,.h5ad}", "{a,nowhere}", "{,a}", "{{a,b},x}"]


@settings(max_examples=300)
@given(
    names=st.lists(
        st.tuples(
            st.sampled_from(["", "x/", "x/z/", "z/", "z.h5/"]),
            st.sampled_from(["a", "b", "ab", "a b"]),
            st.sampled_from([".h5", ".h5ad", ".txt", ""]),
        ).map("".join),
        max_size=8,
        unique=True,
    ),
    pieces=st.lists(st.sampled_from(PIECES + GROUPS), min_size=1, max_size=6),
    absolute=st.booleans(),
)
def test_files_are_those_of_cell_load_for_any_tree_and_pattern(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], pieces: list[str], absolute: bool
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    pattern = "".join(pieces).lstrip("/")
    with contextlib.chdir(folder):
        path_ = f"{folder}/{pattern}" if absolute else pattern
        assert we_find(path_) == cell_load_finds(path_)


def test_toml_of_a_run_names_the_same_files_from_any_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    for name in ("d/a.h5ad", "d/b.h5ad", "e/a b.h5"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    (project / "config.toml").write_text(
        '[datasets]\none = "screen.h5ad"\nall = "d"\nbraces = "d/{a,b}.h5ad"\nglob = "e/*.h5"\n'
        f'absolute = "{project}/d/a.h5ad"\n[training]\none = "train"\n'
        '[zeroshot]\n"one.K562 (x)" = "val"\n[fewshot."one.é"]\ntest = ["A+B", "it\'s \\"c\\""]\n'
    )
    experiment = load_experiment(Path("config.toml"))
    expected = {
        name: [p.absolute() for p in dataset_files(path)]
        for name, path in experiment.datasets.items()
    }
    assert [len(files) for files in expected.values()] == [1, 2, 2, 1, 1]
    (project / "copy.toml").write_text(toml_text(experiment, absolute_paths(experiment, Notes())))
    (project / "far").mkdir()
    monkeypatch.chdir(project / "far")
    copy = load_experiment(project / "copy.toml")
    assert (copy.training, copy.zeroshot, copy.fewshot) == (
        experiment.training,
        experiment.zeroshot,
        experiment.fewshot,
    )
    found = {n: dataset_files(p) for n, p in copy.datasets.items()}
    assert found == expected
    assert toml.loads((project / "copy.toml").read_text())["datasets"] == copy.datasets
