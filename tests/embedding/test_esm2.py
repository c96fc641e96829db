"""ESM2: weights, forward, windows and download, against fair-esm and a real server.

Checkpoints have random weights in the layout of the published files. Every parameter is random,
layer norms and biases too (fair-esm starts those at 1 and 0), so none can be left out unseen.
"""

from __future__ import annotations

import string
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import esm
import pytest
import torch
from fasta_records import protein
from random_esm2 import write_checkpoint

from state_esm_features.console import InputError
from state_esm_features.embedding.embed import embed, embed_all
from state_esm_features.embedding.esm2 import Checkpoint, Esm2, open_checkpoint
from state_esm_features.embedding.fasta import RESIDUES
from state_esm_features.option_groups import ESM2_WIDTHS

CPU = torch.device("cpu")
NAME = "esm2_t6_8M_UR50D"


def opened(path: Path, layer: int, dtype: torch.dtype = torch.float32) -> Esm2:
    """The model of a checkpoint up to a layer, on the CPU."""
    return Esm2(open_checkpoint(str(path), path), layer, CPU, dtype)


def mean(model: Esm2, sequence: str, long: str = "window") -> torch.Tensor:
    """embed() that nobody stops."""
    return embed(model, sequence, long, threading.Event())


def sharpen(factor: float) -> Callable[[dict[str, Any]], object]:
    """Multiplies query and key weights: attention as selective as that of trained weights."""

    def spoil(content: dict[str, Any]) -> None:
        for name, weight in content["model"].items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(factor)

    return spoil


def assert_near(
    ours: torch.Tensor, theirs: torch.Tensor, what: object, limit: float = 1e-5
) -> None:
    """Same shape, float32, nowhere further apart than `limit`."""
    assert ours.shape == theirs.shape, what
    assert ours.dtype == torch.float32, what
    assert (ours - theirs).abs().max().item() <= limit, what


# ---------------------------------------------------------------------------------------------
# The same numbers as other implementations
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "width", "heads", "options", "limit"),
    [
        (6, 40, 20, {}, 1e-5),
        (12, 40, 4, {}, 1e-5),
        (30, 40, 4, {}, 1e-5),
        (33, 40, 4, {}, 1e-5),
        (36, 40, 4, {}, 1e-5),
        (48, 40, 4, {}, 1e-5),
        (6, 64, 4, {}, 1e-5),
        (6, 64, 4, {"token_dropout": False}, 1e-5),
        (6, 64, 4, {"dtype": torch.float16}, 1e-5),
        (6, 64, 4, {"spoil": sharpen(3)}, 1e-4),
        (6, 64, 4, {"spoil": sharpen(6)}, 1e-3),
    ],
)
@torch.no_grad()
def test_layers_equal_fair_esm(
    tmp_path: Path, layers: int, width: int, heads: int, options: dict[str, Any], limit: float
) -> None:
    """Every asked layer, token by token, from one residue to a long window.

    Sharp attention makes more of the last bits: with weights x6 fair-esm's own residues are 2e-3
    from those in float64. The mean over residues, the vector of a protein, is always near.
    """
    theirs = write_checkpoint(tmp_path / "w.pt", layers, width, heads, seed=layers, **options)
    asked = {layer: opened(tmp_path / "w.pt", layer) for layer in (0, 1, layers)}
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    longest = (1022,) if heads == 4 and layers in (6, 48) else ()  # slow in fair-esm
    for length in (1, 2, 17, 300, *longest):
        sequence = protein(length)
        tokens = convert([("", sequence)])[2]
        expected = theirs(tokens, repr_layers=list(asked))["representations"]
        for layer, ours in asked.items():
            residues, fair = ours(sequence), expected[layer][0, 1:-1]
            assert_near(residues, fair, (length, layer), limit)
            assert_near(residues.mean(0), fair.mean(0), (length, layer), min(limit, 1e-4))


@torch.no_grad()
def test_means_equal_a_padded_batch_of_fair_esm(tmp_path: Path) -> None:
    """Rows of a batch, padded to the longest, give the vectors of the sequences alone."""
    theirs = write_checkpoint(tmp_path / "w.pt", 6, 64, 4)
    proteins = [(str(n), protein(n)) for n in (17, 1, 300, 2, 129)]
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    tokens = alphabet.get_batch_converter()(proteins)[2]
    assert tokens.eq(alphabet.padding_idx).any()
    expected = theirs(tokens, repr_layers=[0, 3, 6])["representations"]
    for layer in (0, 3, 6):
        ours = opened(tmp_path / "w.pt", layer)
        for row, (name, sequence) in zip(expected[layer], proteins, strict=True):
            theirs_mean = row[1 : len(sequence) + 1].mean(0)
            assert_near(mean(ours, sequence), theirs_mean, (name, layer))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 layers, width 40, 20 heads."""
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    write_checkpoint(path, 2, 40, 20)
    return path


def test_published_token_ids(small: Path) -> None:
    """Ids in facebookresearch/esm, tests/test_alphabet.py (MIT), and of every accepted letter."""
    model = opened(small, 0)
    expected = model.model.embeddings(torch.tensor([[20, 15, 11, 7, 10, 16, 6]]))[0]
    with torch.no_grad():
        assert torch.equal(model("MKTVRQG"), expected)
        assert torch.equal(model("MKTVRQGMKTVRQG"), expected.repeat(2, 1))
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    assert len(RESIDUES) == 25
    assert set(string.ascii_uppercase) & set(alphabet.all_toks) == RESIDUES
    with torch.no_grad():
        for letter in RESIDUES:
            [[token]] = alphabet.get_batch_converter()([("", letter)])[2][:, 1:-1].tolist()
            expected = model.model.embeddings(torch.tensor([[token]]))[0]
            assert torch.equal(model(letter), expected)


@pytest.mark.parametrize("factor", [1, 3, 6])
@torch.no_grad()
def test_bfloat16_is_as_near_as_fair_esm_under_autocast(tmp_path: Path, factor: float) -> None:
    """The shape of the smallest published model; the sharper attention, the more rounding tells."""
    theirs = write_checkpoint(tmp_path / "w.pt", 6, 320, 20, spoil=sharpen(factor))
    half = opened(tmp_path / "w.pt", 6, torch.bfloat16)
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return torch.cosine_similarity(a.double(), b.double(), dim=0).item()

    for length in (1, 17, 300):
        tokens = convert([("", protein(length))])[2]

        def fair(tokens: torch.Tensor = tokens) -> torch.Tensor:
            states = theirs(tokens, repr_layers=[6])["representations"][6]
            return states[0, 1:-1].float().mean(0)

        exact = fair()
        with torch.autocast("cpu", torch.bfloat16):
            autocast = fair()
        ours = mean(half, protein(length))
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, exact)
        assert 1 - cosine(ours, exact) <= 1.5 * (1 - cosine(autocast, exact)) + 1e-5
        if factor == 1:
            assert cosine(ours, exact) >= 0.9999


# ---------------------------------------------------------------------------------------------
# Independence, windows
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    """torch's number of threads, as it was before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vector_depends_on_its_sequence_only(
    tmp_path: Path, threads: None, dtype: torch.dtype
) -> None:
    """Bit by bit the same in any order, alone, on one thread or two, and of several copies."""
    write_checkpoint(tmp_path / "w.pt", 3, 320, 20)
    model = opened(tmp_path / "w.pt", 3, dtype)
    sequences = [protein(n) for n in (40, 1, 300, 2, 17, 1040, 41)]

    def vectors(order: Sequence[str], cores: int, copies: int = 1) -> dict[str, torch.Tensor]:
        torch.set_num_threads(cores)
        found = dict(embed_all([model] * copies, order, "window"))
        assert torch.get_num_threads() == cores
        return found

    expected = vectors(sequences, 2)
    assert set(expected) == set(sequences)
    others = [vectors(sequences[::-1], 2), vectors(sorted(sequences), 1), vectors(sequences, 1, 3)]
    others += [vectors([s], cores) for s in sequences for cores in (1, 2)]
    for found in others:
        for sequence, vector in found.items():
            assert torch.equal(vector, expected[sequence]), (len(sequence), len(found))


@torch.no_grad()
def test_a_long_protein_is_the_mean_of_its_windows(tmp_path: Path) -> None:
    """2,500 residues: each residue's vectors averaged over windows, then the residues'."""
    theirs = write_checkpoint(tmp_path / "w.pt", 2, 40, 4)
    model = opened(tmp_path / "w.pt", 2)
    sequence = protein(2500)
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    said: list[list[torch.Tensor]] = [[] for _ in sequence]
    for start in (0, 511, 1022, 1533):
        tokens = convert([("", sequence[start : start + 1022])])[2]
        residues = theirs(tokens, repr_layers=[2])["representations"][2][0, 1:-1]
        for i, vector in enumerate(residues):
            said[start + i].append(vector)
    assert [len(said[i]) for i in (0, 511, 1021, 1022, 2043, 2044, 2499)] == [1, 2, 2, 2, 2, 1, 1]
    expected = torch.stack([torch.stack(v).mean(0) for v in said]).mean(0)
    assert_near(mean(model, sequence), expected, "window")
    first = theirs(convert([("", sequence[:1022])])[2], repr_layers=[2])["representations"][2]
    assert_near(mean(model, sequence, "truncate"), first[0, 1:-1].mean(0), "truncate")


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["all", "cfg", "model"])
def test_no_pickled_code_is_executed(tmp_path: Path, where: str, zipped: bool) -> None:
    """A file that would create another when unpickled is refused, and creates none."""
    trap, path = tmp_path / "executed", tmp_path / "w.pt"
    write_checkpoint(path, 1, 8, 2)
    content = torch.load(path, weights_only=False)
    content = Touch(trap) if where == "all" else {**content, where: Touch(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError) as refused:
        open_checkpoint(str(path), path)
    assert not trap.exists()
    assert str(refused.value) == (
        f"{path} was refused without running it: it holds pickled Python objects beside tensors "
        f"({open.__module__}.open), and loading those can execute code. Give an ESM2 checkpoint as "
        "fair-esm publishes it"
    )
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


FC1 = "encoder.sentence_encoder.layers.0.fc1.weight"


def plain_table(content: dict[str, Any]) -> None:
    """A {gene: vector} table instead."""
    content.clear()
    content["TP53"] = torch.ones(8)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (plain_table, "'cfg'"),
        (lambda content: content.pop("model"), "'model'"),
        (lambda content: content["model"].pop(FC1), "'layers.0.fc1.weight'"),
        (
            lambda content: content["model"].update({FC1: torch.ones(3, 4)}),
            "layers.0.fc1.weight has shape (3, 4)",
        ),
    ],
)
def test_other_layouts_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], why: str
) -> None:
    """Tables, and checkpoints that lack a weight or have one of another shape."""
    path = tmp_path / "w.pt"
    write_checkpoint(path, 1, 8, 2, spoil=spoil)
    with pytest.raises(InputError) as refused:
        open_checkpoint(str(path), path)
    assert str(refused.value) == (
        f"{path} is no ESM2 checkpoint in fair-esm's format ({why}); the published files are "
        "esm2_*.pt"
    )


def test_no_contact_regression_is_needed(tmp_path: Path) -> None:
    """fair-esm's loader wants a second file beside a model of this name."""
    path = tmp_path / f"{NAME}.pt"
    write_checkpoint(path, 3, 8, 2)
    assert esm.pretrained._has_regression_weights(NAME)
    assert [p.name for p in tmp_path.iterdir()] == [f"{NAME}.pt"]
    checkpoint = open_checkpoint(NAME, path)
    assert isinstance(checkpoint, Checkpoint)
    assert (checkpoint.model, checkpoint.path) == (NAME, path)
    assert (checkpoint.layers, checkpoint.width, checkpoint.heads) == (3, 8, 2)
    assert checkpoint.token_dropout is True


def test_every_model_of_fair_esm_is_known() -> None:
    """The names are exactly fair-esm's."""
    assert {name for name in dir(esm.pretrained) if name.startswith("esm2_")} == set(ESM2_WIDTHS)


# ---------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------
