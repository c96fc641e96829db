"""Tables of vectors as people keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from state_esm_features.console import Notes
from state_esm_features.embedding.tables import Table, load_table


@pytest.mark.parametrize("layout", ["one each", "rows of one", "legacy", "bfloat16"])
def test_vectors_are_those_of_torch_load_whatever_the_layout(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 7)
    if layout == "bfloat16":
        rows = rows.bfloat16()
    table = {f"G{i}": row if layout == "rows of one" else row.clone() for i, row in enumerate(rows)}
    table["flipped"] = rows[:, 3][:7] if layout == "rows of one" else rows[0].flip(0)
    table["nan"] = torch.full((7,), torch.nan, dtype=rows.dtype)
    zipped = {"_use_new_zipfile_serialization": layout != "legacy"}
    torch.save(table, tmp_path / "table.pt", **zipped)
    opened = load_table(tmp_path / "table.pt", Notes())
    for gene, vector in table.items():
        assert torch.equal(opened[gene].nan_to_num(9), vector.float().nan_to_num(9)), gene
    sound = [vector.double() for gene, vector in table.items() if gene != "nan"]
    assert torch.allclose(opened.mean.double(), torch.stack(sound).mean(0), atol=1e-6)


def test_a_control_in_a_table_is_not_in_its_mean() -> None:
    rows = {"A": torch.tensor([1.0, 2.0]), "control": torch.zeros(2), "B": torch.tensor([3.0, 0.0])}
    assert Table(Path("t.pt"), rows, 2).mean.tolist() == [2.0, 1.0]


def test_a_table_replaced_while_it_is_open_is_still_the_old_one(tmp_path: Path) -> None:
    torch.save({"A": torch.ones(3), "B": torch.zeros(3)}, tmp_path / "table.pt")
    opened = load_table(tmp_path / "table.pt", Notes())
    torch.save({"A": -torch.ones(3), "B": torch.zeros(3)}, tmp_path / "new.pt")
    (tmp_path / "new.pt").replace(tmp_path / "table.pt")
    assert opened["A"].tolist() == [1.0, 1.0, 1.0]
