"""A planted screen has the design of the real one, and effects as strong as is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
from demo_data import CONTROL, Screen, effects, simulate

from state_esm_features.console import Findings
from state_esm_features.evaluation.cells import column, group_means
from state_esm_features.evaluation.planted import (
    Response,
    plant,
    real_effect,
    respond,
    standardised,
    write_screen,
)
from state_esm_features.experiment import load_experiment
from state_esm_features.training.data import Data
from state_esm_features.training.preflight import inspect_data
from state_esm_features.training.stock import compose

SCREEN = Screen(perturbed=20, families=5, width=6, genes=60, cells=40, controls=150)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.chdir(tmp_path)
    return read(tmp_path, simulate(SCREEN))


def read(folder: Path, cells: anndata.AnnData) -> Data:
    cells.write_h5ad(folder / "screen.h5ad")
    toml = folder / "screen.toml"
    toml.write_text(
        '[datasets]\nsim = "screen.h5ad"\n[training]\nsim = "train"\n'
        '[fewshot."sim.simA"]\ntest = ["SIM004"]\n'
    )
    kwargs = compose(["model=state_sm"])["data"]["kwargs"]
    found = Findings()
    data = inspect_data(toml, {}, kwargs, found)
    assert data is not None and not found.problems
    return data


def vectors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    table = {x: rng.normal(3, 2, 6) for x in SCREEN.symbols}
    a, b = SCREEN.combination.split("+")
    return {**table, SCREEN.combination: table[a] + table[b]}


GENES_OF = {x: frozenset(x.split("+")) for x in (*SCREEN.symbols, SCREEN.combination)}


def labels_of(data: Data) -> list[dict[str, Sequence[str]]]:
    return [{t: [x for x in c if x != CONTROL] for t, c in f.by_type.items()} for f in data.files]


def planted(data: Data, rms: float) -> Response:
    _, controls = real_effect(data)
    return respond(standardised(vectors(), GENES_OF, True), controls, labels_of(data), rms)


def test_real_effect_is_that_without_noise(data: Data) -> None:
    """Of the true effects of the simulation; the mean of noisy ones would be a fifth larger."""
    exact = np.array([v for k, v in effects(SCREEN).items() if k != CONTROL])
    rms, _ = real_effect(data)
    # expression below zero is cut off, which takes some of the effects away
    assert rms == pytest.approx(np.sqrt((exact**2).mean()), rel=0.12)


def test_a_screen_without_effects_has_none_above_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    screen = replace(SCREEN, genes=400)
    cells = simulate(screen)
    noise = np.random.default_rng(3).normal(3, 0.4, cells.shape)
    cells.X = noise.astype(np.float32)
    rms, _ = real_effect(read(tmp_path, cells))
    by_noise = 0.4 * np.sqrt(1 / 40 + 1 / 150)
    assert rms < by_noise / 4


def test_standardised_vectors_of_combinations_are_sums_of_their_genes() -> None:
    table = standardised(vectors(), GENES_OF, summed=True)
    single = np.stack([table[x] for x in SCREEN.symbols])
    np.testing.assert_allclose(single.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(single.std(0), 1)
    a, b = SCREEN.combination.split("+")
    np.testing.assert_allclose(table[SCREEN.combination], table[a] + table[b])
    mean = {**vectors(), SCREEN.combination: (vectors()[a] + vectors()[b]) / 2}
    halved = standardised(mean, GENES_OF, summed=False)
    np.testing.assert_allclose(halved[SCREEN.combination], (table[a] + table[b]) / 2)


@pytest.mark.parametrize("strength", [0, 0.5, 1, 2])
def test_effects_are_as_strong_as_asked_for_within_noise(
    data: Data, tmp_path: Path, strength: float
) -> None:
    real, _ = real_effect(data)
    response = planted(data, strength * real)
    assert response.rms == pytest.approx(strength * real, rel=1e-4)
    toml = write_screen(tmp_path / "planted", data, response, {})
    kwargs = compose(["model=state_sm"])["data"]["kwargs"]
    again = inspect_data(toml, {}, kwargs, Findings())
    assert again is not None
    measured, _ = real_effect(again)
    if strength:
        assert measured == pytest.approx(strength * real, rel=0.1)
    else:
        assert measured < 0.1 * real
        assert not any(fold.any() for fold in response.folds.values())


def test_response_is_linear_in_the_standardised_vector(data: Data) -> None:
    response = planted(data, 0.2)
    z = standardised(vectors(), GENES_OF, summed=True)
    x = np.stack([z[label] for label in response.folds])
    y = np.stack([*response.folds.values()])
    whole = (y > -1).all(0)  # no gene of these would fall below zero
    assert whole.mean() > 0.5
    fit, *_ = np.linalg.lstsq(x, y[:, whole], rcond=None)
    np.testing.assert_allclose(x @ fit, y[:, whole], atol=1e-8)


def test_design_is_that_of_the_real_screen(data: Data) -> None:
    [file] = data.files
    real = anndata.read_h5ad(file.path)
    made = plant(file, data.columns, planted(data, 0.3).folds)
    assert made.obs.equals(real.obs) and made.var.equals(real.var)
    assert {*made.uns} == {*real.uns}
    controls = (real.obs["target_gene"] == CONTROL).to_numpy()
    for cell_type in SCREEN.cell_types:
        of_type = (real.obs["cell_type"] == cell_type).to_numpy() & controls
        pool = {row.tobytes() for row in real.X[of_type].toarray()}
        drawn = [row.tobytes() for row in made.X[of_type].toarray()]
        assert {*drawn} <= pool  # control cells are control cells of this cell type
        assert len({*drawn}) < len(drawn)  # with replacement
    same = plant(file, data.columns, planted(data, 0.3).folds)
    assert (same.X != made.X).nnz == 0
    # what is not expressed stays so, and the same cells are drawn whatever the response is
    none = plant(file, data.columns, {})
    assert (made.X[controls] != none.X[controls]).nnz == 0
    assert not made.X.toarray()[none.X.toarray() == 0].any()


def test_labels_without_a_vector_have_no_effect(data: Data, tmp_path: Path) -> None:
    _, controls = real_effect(data)
    some = {k: v for k, v in vectors().items() if k != "SIM004"}
    genes = {k: v for k, v in GENES_OF.items() if k in some}
    response = respond(standardised(some, genes, True), controls, labels_of(data), 0.5)
    assert response.rms == pytest.approx(0.5, rel=1e-4)  # the others make up for it
    made = plant(data.files[0], data.columns, response.folds)
    made.write_h5ad(tmp_path / "made.h5ad")
    labels = column(tmp_path / "made.h5ad", "target_gene")
    groups = np.select([labels == CONTROL, labels == "SIM004", labels == "SIM005"], [0, 1, 2], -1)
    base, without, other = group_means(tmp_path / "made.h5ad", groups, 3)
    assert np.abs(without - base).mean() < 0.1 < np.abs(other - base).mean()


def test_datasets_of_several_files_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = simulate(SCREEN)
    (tmp_path / "more").mkdir()
    for name, cell_type in (("one", "simA"), ("two", "simB")):
        part = cells[cells.obs["cell_type"] == cell_type]
        part.write_h5ad(tmp_path / "more" / f"{name}.h5ad")
    toml = tmp_path / "several.toml"
    toml.write_text('[datasets]\nsim = "more/{one,two}.h5ad"\n[training]\nsim = "train"\n')
    data = inspect_data(toml, {}, compose(["model=state_sm"])["data"]["kwargs"], Findings())
    assert data is not None
    made = write_screen(tmp_path / "planted", data, planted(data, 0.1), {})
    experiment = load_experiment(made)
    assert experiment.datasets == {"sim": str(tmp_path / "planted/data/sim")}
    assert {f.name for f in (tmp_path / "planted/data/sim").iterdir()} == {"one.h5ad", "two.h5ad"}
    one = anndata.read_h5ad(tmp_path / "planted/data/sim/one.h5ad")
    assert {*one.obs["cell_type"]} == {"simA"}
