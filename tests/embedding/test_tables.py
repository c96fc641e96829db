"""Tables of vectors as people keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from state_esm_features.console import Notes
from state_esm_features.embedding import tables
from state_esm_features.embedding.tables import KNOWN_TABLES, Table, load_table
from state_esm_features.files import sha256_of


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


def test_the_table_of_arc_is_known_by_its_hash_and_size() -> None:
    sha256 = "a210e1cc7901513999b2bca3836ba9e2f203cd008be4e9a9d6412a2267de9748"
    assert {
        sha256: (410_886_729, "Arc's protein_embeddings.pt of arcinstitute/SE-600M (ESM2 15B)")
    } == KNOWN_TABLES


def test_a_known_table_is_named_as_what_it_is_whatever_its_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ESM2_pert_features.pt"
    torch.save({"A": torch.ones(3), "B": torch.zeros(3)}, path)
    known = {sha256_of(path): (path.stat().st_size, "Arc's own")}
    monkeypatch.setattr(tables, "KNOWN_TABLES", known)
    table = load_table(path, Notes())
    assert str(table) == f"{path} (2 genes x 3, Arc's own)"
    assert table.record()["known_as"] == "Arc's own"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # as large, and another one
    other = Table(path, table.vectors, 3)
    assert str(other) == f"{path} (2 genes x 3)" and "known_as" not in other.record()


def test_a_file_of_another_size_is_not_hashed_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"A": torch.ones(3)}, tmp_path / "t.pt")
    table = load_table(tmp_path / "t.pt", Notes())
    monkeypatch.setattr(tables, "sha256_of", lambda path: pytest.fail("hashes"))
    assert str(table) == f"{tmp_path}/t.pt (1 gene x 3)"
