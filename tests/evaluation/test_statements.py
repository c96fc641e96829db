"""What the evaluation says of screens of which it is known what there is to see.

Ridge regression from vectors to effects takes the place of State, which takes minutes to learn: all
else, from cells to sentences, is the evaluation's own. The slow test does it with State.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from demo_data import CONTROL, Screen, simulate, vectors
from test_demo import BASE, STEPS, TINY_MODEL, prepare

from state_esm_features.console import Findings
from state_esm_features.embedding.vectors import shuffle_vectors
from state_esm_features.evaluation.__main__ import main
from state_esm_features.evaluation.conclude import Comparison, Evidence, comparison, conclude
from state_esm_features.evaluation.design import CONTROLLED, OWN, REAL, screen_name
from state_esm_features.evaluation.effects import read_effects, score
from state_esm_features.evaluation.planted import real_effect, respond, standardised, write_screen
from state_esm_features.evaluation.summary import EVERY_METRIC, summarise
from state_esm_features.training.preflight import inspect_data
from state_esm_features.training.stock import compose

SCREEN = Screen(perturbed=60, families=6, width=8, genes=40, cells=12, controls=48)
UNSEEN = {*SCREEN.unseen, *SCREEN.validation}
SEEDS = 3

Table = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Ridge:
    """Predicts the effect of a gene by its vector, as learnt from the cells of simA."""

    cells: anndata.AnnData
    folder: Path

    def scores(self, table: Table, method: str, seed: int, screen: str) -> pd.DataFrame:
        """What the evaluation would have of a model of State."""
        obs, x = self.cells.obs, self.cells.X.toarray().astype(float)
        labels, types = (obs[c].astype(str).to_numpy() for c in ("target_gene", "cell_type"))
        groups = obs.groupby(["cell_type", "target_gene"], observed=True).indices
        of = {pair: x[rows] for pair, rows in groups.items()}
        rng = np.random.default_rng(seed)
        trained = [g for g in SCREEN.symbols if g not in UNSEEN]
        drawn = rng.choice(trained, len(trained))  # what differs between seeds
        base = of["simA", CONTROL].mean(0)
        effects = np.stack([of["simA", g].mean(0) - base for g in drawn])
        rows = np.stack([table[g] for g in drawn]).astype(float)
        inner = rows.T @ rows + len(rows) * np.eye(rows.shape[1]) * rows.var() / 10
        weights = np.linalg.solve(inner, rows.T @ effects)
        test = np.flatnonzero((types == "simB") | (labels == CONTROL) | np.isin(labels, [*UNSEEN]))
        test = test[~np.isin(labels[test], [SCREEN.combination])]
        predicted = np.stack(
            [
                rng.choice(of[types[i], CONTROL])
                + (0 if labels[i] == CONTROL else table[labels[i]] @ weights)
                for i in test
            ]
        )
        place = self.folder / f"{screen}_{method}_{seed}"
        place.mkdir(parents=True)
        for name, cells in (("adata_real", x[test]), ("adata_pred", predicted)):
            anndata.AnnData(cells.astype(np.float32), obs.iloc[test]).write_h5ad(
                place / f"{name}.h5ad"
            )
        found = score(read_effects(place, "target_gene", "cell_type", CONTROL))
        group = found["perturbation"].isin(UNSEEN).map({True: "unseen", False: "seen"})
        about = {"group": group, "screen": screen, "method": method, "seed": seed}
        return found.reindex(columns=["cell_type", "perturbation", *EVERY_METRIC]).assign(**about)

    def compare(self, own: Table, screen: str = REAL) -> Comparison:
        """Own vectors against shuffled ones."""
        as_torch = {g: torch.as_tensor(v) for g, v in own.items()}
        tables = []
        for seed in range(SEEDS):
            mixed = {g: v.numpy() for g, v in shuffle_vectors(as_torch, seed).items()}
            for method in CONTROLLED:
                tables.append(self.scores(own if method == OWN else mixed, method, seed, screen))
        found = comparison(summarise(pd.concat(tables)), screen)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return simulate(SCREEN)


@pytest.fixture(scope="module")
def own() -> dict[str, np.ndarray]:
    table = vectors(SCREEN)
    return {g: table[g] for g in SCREEN.symbols}


@pytest.fixture(scope="module")
def real(
    cells: anndata.AnnData, own: Table, tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    return Ridge(cells, tmp_path_factory.mktemp("real")).compare(own)


@pytest.fixture
def planted(
    cells: anndata.AnnData, own: Table, tmp_path: Path, request: pytest.FixtureRequest
) -> Comparison:
    """On a screen of the strength that the test names."""
    strength = request.param
    cells.write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "s.toml").write_text(
        f'[datasets]\ns = "{tmp_path}/screen.h5ad"\n[training]\ns = "train"\n'
    )
    kwargs = compose(["model=state_sm"])["data"]["kwargs"]
    data = inspect_data(tmp_path / "s.toml", {}, kwargs, Findings())
    assert data is not None
    rms, controls = real_effect(data)
    labels = [{t: [x for x in c if x != CONTROL] for t, c in f.by_type.items()} for f in data.files]
    z = standardised(own, {g: frozenset({g}) for g in own}, True)
    write_screen(tmp_path / "planted", data, respond(z, controls, labels, strength * rms), {})
    made = anndata.read_h5ad(tmp_path / "planted/data/s/screen.h5ad")
    return Ridge(made, tmp_path / "runs").compare(own, screen_name(strength))


def test_own_vectors_that_decide_the_response_are_far_from_zero(real: Comparison) -> None:
    assert real.difference.low > 0.3, real


def test_shuffled_vectors_handed_in_as_own_hold_zero(
    cells: anndata.AnnData, own: Table, tmp_path: Path
) -> None:
    as_torch = {g: torch.as_tensor(v) for g, v in own.items()}
    mixed = {g: v.numpy() for g, v in shuffle_vectors(as_torch, 99).items()}
    found = Ridge(cells, tmp_path).compare(mixed)
    assert found.difference.low < 0 < found.difference.high, found


@pytest.mark.parametrize("planted", [1.0], indirect=True)
def test_what_is_planted_at_strength_one_is_found(planted: Comparison, real: Comparison) -> None:
    assert planted.difference.low > 0.3, planted
    first, second, _ = conclude(Evidence(real, {1.0: planted}))
    assert first.startswith("This screen can show it: ")
    assert second.startswith("On the real cells own vectors do better than shuffled ones: ")


@pytest.mark.parametrize("planted", [0.0], indirect=True)
def test_at_a_strength_of_zero_nothing_can_be_seen(planted: Comparison, real: Comparison) -> None:
    assert planted.difference.low < 0 < planted.difference.high, planted
    assert abs(planted.own.mean) < 0.1 and abs(planted.shuffled) < 0.1, planted
    first, second, _ = conclude(Evidence(real, {0.0: planted}))
    assert first.startswith("The positive control cannot be seen: ")
    assert second.startswith("For the record, on the real cells ")


@pytest.mark.slow
def test_the_same_of_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State made small, 120 steps, three seeds: an hour on two cores."""
    prepare(tmp_path, replace(BASE))
    monkeypatch.chdir(tmp_path)
    table = torch.load("demo/simulated_table.pt", weights_only=True)
    torch.save(shuffle_vectors(table, 99), "mixed.pt")
    words = ["--config", "demo.toml", "--max-steps", str(STEPS), "--batch-size", "8"]
    words += ["--num-workers", "0", "--fast-loading", "dense", *TINY_MODEL]
    own = ["--esm-embeddings", "demo/simulated_table.pt", "--planted", "0,1"]
    assert main([*own, *words], CONTROLLED) == 0
    mixed = ["--esm-embeddings", "mixed.pt", "--output-dir", "mixed"]
    assert main([*mixed, *words], CONTROLLED) == 0

    def difference(folder: str, screen: str) -> pd.Series:
        table = pd.read_csv(tmp_path / folder / "table.tsv", sep="\t")
        return table.query(
            f"screen == '{screen}' and group == 'unseen' and cell_type == 'all' and "
            "method == 'own - shuffled' and metric == 'pearson'"
        ).iloc[0]

    for screen in (REAL, screen_name(1)):
        assert difference("evaluation", screen)["low"] > 0.2, difference("evaluation", screen)
    for row in (difference("evaluation", screen_name(0)), difference("mixed", REAL)):
        assert row["low"] < 0 < row["high"], row
