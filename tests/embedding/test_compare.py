"""Which vectors are near each other, less what all of them have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from state_esm_features.console import Notes
from state_esm_features.embedding.compare import Compared, nearest
from state_esm_features.embedding.labels import Labels
from state_esm_features.embedding.resolve import Resolver, resolve
from state_esm_features.embedding.tables import Table
from state_esm_features.embedding.vectors import Resolved
from state_esm_features.option_groups import FeatureOptions, PolicyOptions


def table(name: str, **vectors: list[float]) -> Table:
    tensors = {gene: torch.tensor(vector) for gene, vector in vectors.items()}
    return Table(Path("tables", name), tensors, 2)


def compared(names: str, *tables: Table, combine: str = "sum", ablation: str = "") -> Compared:
    """Labels of these tables; an ablation is only said, the vectors stay."""
    options = FeatureOptions(policy=PolicyOptions(combine=combine))
    resolver = Resolver(tables, "control", options.symbols, Notes())
    resolutions = resolve(names.split(), resolver)
    said = {"kind": ablation, "seed": 1} if ablation else None
    resolved = Resolved(Labels("control"), options, resolver, resolutions, [], said)
    vectors = resolved.vectors()
    return Compared(resolved, resolved.combined(vectors, 2), vectors)


ONE = table("one.pt", A=[101.0, 0.0], B=[102.0, 0.0], C=[100.0, 1.0], D=[97.0, -1.0])
"""Its mean is (100, 0)."""

SCALED = FeatureOptions(policy=PolicyOptions(scale="center"))

TWO = table("two.pt", E=[0.0, 52.0], F=[-2.0, 48.0], G=[2.0, 50.0])
"""Its mean is (0, 50)."""


def test_vectors_are_compared_less_the_mean_of_their_own_table() -> None:
    seen = compared("A C D E", ONE, TWO)
    near = seen.nearest(["A", "C", "E"], 2)
    assert [name for name, _ in near["A"]] == ["C", "E"]  # (1, 0) to (0, 1), and to (0, 2)
    assert [name for name, _ in near["C"]] == ["E", "A"]
    assert near["C"][0][1] == pytest.approx(1.0)  # (0, 1) to (0, 2); it is 0.01 as they are
    assert near["E"][0] == ("C", pytest.approx(1.0))
    assert seen.said == "less the mean of one.pt and two.pt"
    assert seen.less_mean_of("A") == "tables/one.pt"
    assert seen.less_mean_of("E") == "tables/two.pt"
    assert seen.genes(["D", "E"]).tolist() == [[-3.0, -1.0], [0.0, 2.0]]
    assert seen.vectors["D"].tolist() == [97.0, -1.0]
    assert seen.features["D"].tolist() == [97.0, -1.0]


def test_scaled_vectors_are_compared_as_they_are() -> None:
    resolved = replace(compared("A B C D", ONE).resolved, options=SCALED)
    vectors = resolved.vectors()
    seen = Compared(resolved, resolved.combined(vectors, 2), vectors)
    assert vectors["D"].tolist() == [-3.0, -1.0]
    assert seen.genes(["D", "C"]).tolist() == [[-3.0, -1.0], [0.0, 1.0]]
    assert (seen.said, seen.less_mean_of("D")) == ("vectors as scaled", "")


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_a_combination_is_less_the_means_of_its_parts(combine: str) -> None:
    seen = compared("A+E A+control C+A A B C", ONE, TWO, combine=combine)
    near = seen.nearest(["A+E", "A+control", "C+A"], 6)
    assert dict(near["A+E"])["A"] == pytest.approx(1 / 5**0.5)  # (1, 2) to (1, 0)
    assert dict(near["C+A"])["A"] == pytest.approx(0.5**0.5)  # (1, 1) to (1, 0)
    assert dict(near["A+control"])["B"] == pytest.approx(1.0)
    assert "A" not in dict(near["A+control"])
    assert seen.less_mean_of("A+E") == "tables/one.pt;tables/two.pt"
    assert seen.less_mean_of("C+A") == "tables/one.pt"


@dataclass
class Computed:
    """Of a FASTA source what matters here: that it is no table."""

    number: int

    def __iter__(self) -> Iterator[str]:
        return (f"P{i}" for i in range(self.number))

    def __contains__(self, gene: str) -> bool:
        return gene in set(self)


@pytest.mark.parametrize(
    ("number", "tables", "said", "of"),
    [
        (49, (), "vectors as they are", ""),
        (50, (), "less the mean of 50 computed genes", "50 computed genes"),
        (49, (ONE,), "less the mean of one.pt", "tables/one.pt"),
        (50, (ONE,), "less the mean of one.pt and 50 computed genes", "50 computed genes"),
    ],
)
def test_computed_vectors_are_compared_less_their_mean_if_they_are_enough(
    number: int, tables: tuple[Table, ...], said: str, of: str
) -> None:
    computed = {f"P{i}": torch.tensor([10.0 + i % 2, 3.0]) for i in range(number)}
    labels = [*computed, *(["A"] if tables else [])]
    options = FeatureOptions()
    resolver = Resolver([*tables, Computed(number)], "control", options.symbols, Notes())
    resolved = Resolved(Labels("control"), options, resolver, resolve(labels, resolver), [])
    vectors = resolved.vectors() | computed
    seen = Compared(resolved, resolved.combined(vectors, 2), vectors)
    assert (seen.said, seen.less_mean_of("P0")) == (said, of)
    mean = {"": [0.0, 0.0], "tables/one.pt": [100.0, 0.0]}.get(of, [10.5, 3.0])
    assert seen.genes(["P0"]).tolist() == [[10 - mean[0], 3 - mean[1]]]


def test_unit_vectors_are_compared_as_they_are() -> None:
    seen = compared("A B C", ONE, ablation="onehot")
    assert (seen.said, seen.less_mean_of("A")) == ("vectors as they are", "")
    assert seen.nearest(["A"], 1)["A"] == [("B", pytest.approx(1.0))]
    assert compared("A B C", ONE, ablation="shuffle").said == "less the mean of one.pt"


def test_relatives_are_found_under_a_large_common_mean() -> None:
    """As real ESM2 vectors are: all cosines above 0.9, families apart less the mean."""
    torch.manual_seed(0)
    common, families = 3 * torch.randn(64), torch.randn(40, 64)
    vectors = {
        f"F{i}_{j}": common + 0.4 * families[i] + 0.1 * torch.randn(64) * (1 + 3 * (j == 2))
        for i in range(40)
        for j in range(3)
    }
    whole = Table(Path("t.pt"), vectors, 64)
    plain = nearest(vectors, [*vectors], 119, {})
    assert min(cosine for near in plain.values() for _, cosine in near) > 0.9
    seen = compared(" ".join(vectors), whole)
    for i in range(40):
        [(name, cosine), *_] = seen.nearest([f"F{i}_0"], 119)[f"F{i}_0"]
        assert name == f"F{i}_1" and cosine > 0.8
    every = [c for near in seen.nearest([*vectors], 119).values() for _, c in near]
    assert abs(sum(every) / len(every)) < 0.02


def test_no_label_is_nearest_to_itself_or_to_one_of_the_same_vector() -> None:
    vectors = {"A": torch.tensor([1.0, 0.0]), "B": torch.tensor([-1.0, 0.0])}
    assert nearest(vectors, ["A", "B"], 5, {}) == {"A": [("B", -1.0)], "B": [("A", -1.0)]}
    guides = vectors | {"A_g2": vectors["A"].clone()}
    assert nearest(guides, ["A", "B", "A_g2"], 5, {}) == {
        **{"A": [("B", -1.0)], "A_g2": [("B", -1.0)]},
        "B": [("A", -1.0), ("A_g2", -1.0)],
    }
    assert nearest({"A": vectors["A"], "A_g2": vectors["A"]}, ["A"], 1, {}) == {"A": []}


def test_nearest_by_blocks_is_nearest_by_all() -> None:
    torch.manual_seed(0)
    vectors = {f"G{i}": v for i, v in enumerate(torch.randn(2500, 8))}
    names, mean = list(vectors), torch.ones(8)
    found = nearest(vectors, names, 3, dict.fromkeys(names, mean))
    stacked = torch.stack(list(vectors.values())).double() - mean
    unit = torch.nn.functional.normalize(stacked, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    best = cosine.topk(3)
    for i in (0, 999, 1000, 2499):
        assert [n for n, _ in found[names[i]]] == [names[j] for j in best.indices[i]]
        assert [c for _, c in found[names[i]]] == pytest.approx(best.values[i].tolist(), abs=1e-6)
