"""Which devices compute the vectors, and that each has its share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from fasta_records import protein
from random_esm2 import write_checkpoint

from state_esm_features.console import InputError
from state_esm_features.embedding.devices import (
    OutOfMemory,
    choose_devices,
    memory_of,
    which_gpus,
)
from state_esm_features.embedding.embed import embed_all
from state_esm_features.embedding.esm2 import Esm2, open_checkpoint

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("gpus", "number", "chosen", "said"),
    [
        ([H100], None, [0], ""),
        ([H100] * 4, None, [0, 1, 2, 3], ""),
        ([H100] * 4, 2, [2], ""),
        (
            [H100, A100, H100],
            None,
            [0, 2],
            f"not used: cuda:1 ({A100}); vectors are of one kind of GPU, here {H100}",
        ),
        ([H100, A100], 1, [1], ""),
    ],
)
def test_which_gpus(gpus: list[str], number: int | None, chosen: list[int], said: str) -> None:
    assert which_gpus(gpus, number) == (chosen, said)


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(InputError) as error:
        which_gpus([H100, H100], 2)
    assert str(error.value) == "--device cuda:2: torch sees 2 GPUs here, cuda:0, cuda:1"


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_devices("cpu") == ([torch.device("cpu")], "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", [H100, H100].__getitem__)
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_devices("cuda") == choose_devices("auto") == (both, "")
    assert choose_devices("cuda:1") == (both[1:], "")


@dataclass(eq=False)
class Busy(Esm2):
    """A copy of a model on what passes for a GPU; it waits until every copy has a protein."""

    model: Esm2
    all_busy: threading.Barrier
    seen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device, self.width = torch.device("meta"), self.model.width

    def __call__(self, sequence: str) -> torch.Tensor:
        self.seen.append(len(sequence))
        self.all_busy.wait(timeout=600)
        return self.model(sequence)


def test_every_device_has_a_protein_at_a_time(tmp_path: Path) -> None:
    """The longest first, one at a time on each, the same bytes as of one."""
    write_checkpoint(tmp_path / "w.pt", 2, 40, 4)
    model = Esm2(open_checkpoint("w.pt", tmp_path / "w.pt"), 2, torch.device("cpu"), torch.float32)
    sequences = [protein(n) for n in (5, 90, 20, 60, 40, 30)]
    expected = dict(embed_all([model], sequences, "window"))
    copies = [Busy(model, all_busy) for all_busy in [threading.Barrier(3)] for _ in range(3)]
    found = dict(embed_all(copies, sequences, "window"))
    assert {s: v.tolist() for s, v in found.items()} == {s: v.tolist() for s, v in expected.items()}
    assert sorted(copy.seen[0] for copy in copies) == [40, 60, 90]
    assert [len(copy.seen) for copy in copies] == [2, 2, 2]


class Full(Esm2):
    """A model on a GPU that has no room for what it is given."""

    def __init__(self, number: int) -> None:
        self.device, self.width = torch.device("cuda", number), 40

    def __call__(self, sequence: str) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_names_the_device() -> None:
    with pytest.raises(OutOfMemory, match=r"^cuda:3$"):
        dict(embed_all([Full(3)], ["MK"], "window"))
    with pytest.raises(RuntimeError, match=r"^a bug$"), memory_of(torch.device("cpu")):
        raise RuntimeError("a bug")
