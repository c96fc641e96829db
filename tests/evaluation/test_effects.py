"""Effects share no control cell, and their scores are exact."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from state_esm_features.console import InputError
from state_esm_features.evaluation.cells import BLOCK, group_means, halves
from state_esm_features.evaluation.effects import (
    Effects,
    all_scores,
    read_cell_eval,
    read_effects,
    score,
)

GENES = 40


def write_predicted(
    folder: Path, true: np.ndarray, predicted: np.ndarray, obs: pd.DataFrame
) -> Path:
    """What `state tx predict` writes: two files without gene names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, x in (("adata_real", true), ("adata_pred", predicted)):
        anndata.AnnData(x.astype(np.float32), obs=obs).write_h5ad(folder / f"{name}.h5ad")
    return folder


def frame(*groups: tuple[str, str, int]) -> pd.DataFrame:
    """obs of (cell type, label, cells)."""
    rows = [(t, x) for t, x, n in groups for _ in range(n)]
    obs = pd.DataFrame(rows, columns=["line", "gene"], dtype="category")
    return obs.set_index(pd.Index([f"c{i}" for i in range(len(obs))]))


def effects_of(folder: Path) -> Effects:
    return read_effects(folder, "gene", "line", "NT")


def test_effects_are_differences_of_means_against_halves_of_the_controls(tmp_path: Path) -> None:
    obs = frame(("K562", "A", 3), ("K562", "NT", 4), ("HeLa", "B", 2), ("HeLa", "NT", 5))
    rng = np.random.default_rng(0)
    true, predicted = rng.random((2, len(obs), GENES))
    found = effects_of(write_predicted(tmp_path, true, predicted, obs))
    assert found.pairs == [("HeLa", "B"), ("K562", "A")]
    true, predicted = true.astype(np.float32), predicted.astype(np.float32)
    base_true = true[:3].mean(0, dtype=float) - found.true[1]
    base_predicted = predicted[:3].mean(0, dtype=float) - found.predicted[1]
    # of four controls two are in each half, and no cell is in both
    rows = np.arange(3, 7)
    pairs = [(i, j) for i in rows for j in rows if i < j]
    of_true = [p for p in pairs if np.allclose(true[[*p]].mean(0), base_true)]
    of_predicted = [p for p in pairs if np.allclose(predicted[[*p]].mean(0), base_predicted)]
    assert len(of_true) == len(of_predicted) == 1
    assert {*of_true[0]} | {*of_predicted[0]} == {3, 4, 5, 6}


def test_true_effects_are_the_same_in_whatever_order_the_cells_stand(tmp_path: Path) -> None:
    obs = frame(("K562", "A", 30), ("K562", "NT", 41))
    true, predicted = np.random.default_rng(0).random((2, len(obs), GENES))
    order = np.random.default_rng(1).permutation(len(obs))
    one = effects_of(write_predicted(tmp_path / "one", true, predicted, obs))
    other = effects_of(
        write_predicted(tmp_path / "other", true[order], predicted[order], obs.iloc[order])
    )
    np.testing.assert_allclose(one.true, other.true, atol=1e-6)
    np.testing.assert_allclose(one.predicted, other.predicted, atol=1e-6)


def test_what_returns_the_control_cells_has_no_correlation_by_their_noise(tmp_path: Path) -> None:
    """context_mean predicts one profile for all, and for a control cell that cell itself."""
    labels = [f"G{i}" for i in range(40)]
    obs = frame(*(("K562", x, 20) for x in labels), ("K562", "NT", 20))
    rng = np.random.default_rng(0)
    wide = 400
    true = 2 + rng.normal(scale=0.5, size=(len(obs), wide))  # no perturbation does anything
    predicted = np.where((obs["gene"] == "NT").to_numpy()[:, None], true, 2.0)
    halved = score(effects_of(write_predicted(tmp_path, true, predicted, obs)))
    shared = np.array([true[obs["gene"] == x].mean(0) for x in labels]) - true[-20:].mean(0)
    naive = np.mean([np.corrcoef(2 - true[-20:].mean(0), t)[0, 1] for t in shared])
    assert naive > 0.6
    assert abs(halved["pearson"].mean()) < 0.1


def test_scores_are_exact() -> None:
    true = np.array([[1.0, 2, 3], [3, 2, 1], [0, 0, 1], [5, 5, 6]])
    predicted = np.array([[2.0, 4, 6], [1, 2, 3], [7, 7, 7], [0, 0, 1]])
    pairs = [("K562", "A"), ("K562", "B"), ("K562", "C"), ("HeLa", "A")]
    found = score(Effects(pairs, true, predicted))
    assert found["pearson"].tolist()[:2] == pytest.approx([1, -1])
    assert np.isnan(found["pearson"][2])  # a constant has none
    assert found["pearson"][3] == pytest.approx(1)
    assert found["mse"].tolist() == pytest.approx([14 / 3, 8 / 3, (49 + 49 + 36) / 3, 25])
    # distances of [2, 4, 6] to A, B, C: 6, 8, 11; of [1, 2, 3]: 0, 4, 5; of [7, 7, 7]: 15, 15, 20
    assert found["discrimination"].tolist()[:3] == [1, 0.5, 0]
    assert np.isnan(found["discrimination"][3])  # alone in its cell type


def test_equal_predictions_for_all_get_half_in_discrimination() -> None:
    true = np.random.default_rng(0).random((50, 8))
    pairs = [("K562", f"G{i:02d}") for i in range(50)]
    found = score(Effects(pairs, true, np.tile(true.mean(0), (50, 1))))
    assert found["discrimination"].mean() == pytest.approx(0.5)


def test_cell_type_with_one_control_is_refused(tmp_path: Path) -> None:
    obs = frame(("K562", "A", 3), ("K562", "NT", 1))
    x = np.ones((4, GENES))
    with pytest.raises(InputError) as said:
        effects_of(write_predicted(tmp_path, x, x, obs))
    assert str(said.value) == (
        f"{tmp_path}/adata_real.h5ad: less than two control cells ('NT') of K562: effects need two "
        "halves of them. Hold out a cell type that has more"
    )


def test_values_of_cell_eval_stand_beside_ours(tmp_path: Path) -> None:
    obs = frame(("K562", "NA", 3), ("K562", "NT", 4))
    folder = write_predicted(tmp_path, *np.random.default_rng(0).random((2, 7, GENES)), obs)
    header = "perturbation,mae,discrimination_score_l1,mse,pearson_delta\n"
    (folder / "K562_results.csv").write_text(f"{header}NA,9,1,0.5,\n")
    (folder / "K562_agg_results.csv").write_text(f"{header}mean,9,9,9,9\n")
    found = all_scores(folder, "gene", "line", "NT")
    assert found["perturbation"].tolist() == ["NA"]
    assert found["cell_eval_mse"].tolist() == [0.5]
    assert found["cell_eval_discrimination"].tolist() == [1]
    assert found["cell_eval_pearson"].isna().all()
    assert len(read_cell_eval(tmp_path / "none")) == 0


@pytest.mark.parametrize("form", ["dense", "csr"])
def test_means_of_groups_over_more_than_a_block(tmp_path: Path, form: str) -> None:
    import scipy.sparse

    n = BLOCK + 100
    x = np.random.default_rng(0).integers(0, 3, (n, 5)).astype(np.float32)
    groups = np.random.default_rng(1).integers(-1, 3, n)
    stored = scipy.sparse.csr_matrix(x) if form == "csr" else x
    anndata.AnnData(stored).write_h5ad(tmp_path / "x.h5ad")
    found = group_means(tmp_path / "x.h5ad", groups, 4)
    for i in range(3):
        np.testing.assert_allclose(found[i], x[groups == i].mean(0, dtype=float))
    assert np.isnan(found[3]).all()


def test_copies_of_a_cell_are_halved_each_for_itself(tmp_path: Path) -> None:
    """Halves of a sample with replacement: neither always together, nor always apart."""
    rows = np.repeat(np.random.default_rng(0).random((500, 3)), 2, axis=0).astype(np.float32)
    anndata.AnnData(rows).write_h5ad(tmp_path / "x.h5ad")
    first = halves(tmp_path / "x.h5ad", np.arange(1000))
    assert first.sum() == 500
    apart = (first[::2] != first[1::2]).mean()
    assert 0.4 < apart < 0.6
