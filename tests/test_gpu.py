"""On a CUDA device: vectors of proteins, and State's training by our command beside its own.

    make test-gpu                 (make test-gpu DEVICE=cpu: the same tests on the CPU)

How far apart results are is recorded as a property of each test (pytest --junitxml).
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import esm
import pytest
import torch
from conftest import PATIENCE, ROOT, SMALL
from demo_data import CONTROL, simulate, vectors
from fasta_records import protein
from random_esm2 import write_checkpoint
from test_train_run import FAST, FILES, TINY, checkpoint, flat_tensors, run_json

from state_esm_features.embedding.embed import embed_all
from state_esm_features.embedding.esm2 import Esm2, open_checkpoint

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"
    ),
]
Record = Callable[[str, object], None]

LENGTHS = (1, 17, 300, 1022, 1500)
STEPS, FEWER = 5, 3

# State trains on a GPU wherever one is seen
ENVIRONMENT = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if DEVICE.type == "cpu" else {})
ENVIRONMENT.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


def begin(command: list[object], cwd: Path, **env: str) -> subprocess.Popen[str]:
    """A command of its own, as from a shell."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it must succeed."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


# ---------------------------------------------------------------------------------------------
# Vectors
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, esm.ESM2]:
    """A checkpoint of the shape of the smallest published model, and fair-esm's model of it."""
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    return path, write_checkpoint(path, 6, 320, 20)


def opened(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Esm2:
    checkpoint = open_checkpoint(str(path), path)
    return Esm2(checkpoint, checkpoint.layers, device, dtype)


def embedded(model: Esm2) -> torch.Tensor:
    """Vectors of proteins of LENGTHS, (proteins, width)."""
    sequences = [protein(length) for length in LENGTHS]
    found = dict(embed_all([model], sequences, "window"))
    return torch.stack([found[sequence] for sequence in sequences])


@torch.inference_mode()
def test_residues_equal_fair_esm_on_the_device(
    weights: tuple[Path, esm.ESM2], record_property: Record
) -> None:
    """Products rounded to TF32 would be a hundred times as far."""
    path, theirs = weights
    ours = opened(path, DEVICE)
    convert = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    theirs.to(DEVICE)
    furthest = 0.0
    for length in LENGTHS[:-1]:  # longer ones have windows
        tokens = convert([("", protein(length))])[2].to(DEVICE)
        fair = theirs(tokens, repr_layers=[6])["representations"][6][0, 1:-1]
        furthest = max(furthest, (ours(protein(length)) - fair).abs().max().item())
    theirs.to("cpu")
    record_property("largest difference to fair-esm", f"{furthest:.1e}")
    assert furthest <= 1e-4


def test_vectors_equal_those_of_the_cpu(
    weights: tuple[Path, esm.ESM2], record_property: Record
) -> None:
    on_cpu = embedded(opened(weights[0], torch.device("cpu")))
    single = embedded(opened(weights[0], DEVICE))
    half = embedded(opened(weights[0], DEVICE, torch.bfloat16))
    furthest = (single - on_cpu).abs().max().item()
    cosine = torch.cosine_similarity(half.double(), on_cpu.double()).min().item()
    record_property("largest difference to the CPU", f"{furthest:.1e}")
    record_property("least cosine of bfloat16 to the CPU's float32", f"{cosine:.6f}")
    assert furthest <= 1e-5
    assert cosine >= 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_are_the_same_bytes_every_time(
    weights: tuple[Path, esm.ESM2], dtype: torch.dtype
) -> None:
    """Also after State's training, which leaves torch with less exact products."""
    first = embedded(opened(weights[0], DEVICE, dtype))
    torch.set_float32_matmul_precision("medium")
    again = embedded(opened(weights[0], DEVICE, dtype))
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.equal(first, again)


def test_features_are_the_same_bytes_every_time(
    weights: tuple[Path, esm.ESM2], tmp_path: Path
) -> None:
    fasta = "".join(f">SIM{n:03d}\n{protein(length)}\n" for n, length in enumerate(LENGTHS))
    (tmp_path / "proteins.fasta").write_text(fasta)
    command = [sys.executable, ROOT / "create_esm_pert_features.py", "--all-genes", "--no-cache"]
    command += ["--fasta", "proteins.fasta", "--esm-model", weights[0], "--device", DEVICE]
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for process in [begin([*command, "--output", path], tmp_path) for path in files]:
        finish(process)
    assert files[0].read_bytes() == files[1].read_bytes()
    found = torch.load(files[0], weights_only=True)
    assert found["SIM003"].shape == (320,)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def write_project(folder: Path) -> None:
    """A small screen, its TOML and features."""
    simulate(SMALL).write_h5ad(folder / "sim.h5ad")
    (folder / "config.toml").write_text(
        '[datasets]\nsim = "sim.h5ad"\n[training]\nsim = "train"\n'
        '[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = ["SIM004"]\n'
    )
    table = {name: torch.from_numpy(vector) for name, vector in vectors(SMALL).items()}
    combination = sum(table[part] for part in SMALL.combination.split("+"))
    added = {SMALL.combination: combination, CONTROL: torch.zeros(SMALL.width)}
    torch.save(table | added, folder / "features.pt")


def words_of(name: str, steps: int) -> list[str]:
    """Our command line of a run."""
    settings = (*FAST[:2], "--num-workers", 1, *FAST[4:], "--max-steps", steps)
    return [str(word) for word in (*FILES, *settings, "--name", name, *TINY)]


def ours(name: str, steps: int, *more: str) -> list[object]:
    return [sys.executable, ROOT / "train_with_esm_features.py", *words_of(name, steps), *more]


def stock(name: str, folder: Path) -> list[object]:
    """The stock command that our dry run prints."""
    import train_with_esm_features

    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        assert train_with_esm_features.main([*words_of(name, STEPS), "--dry-run"]) == 0
    words = shlex.split(out.getvalue())
    assert words[:3] == ["state", "tx", "train"]
    return [sys.executable, "-m", *words]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs, trained at once: stock and ours, twice stock, both in bfloat16, and ours of
    fewer steps."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    commands = {name: stock(name, folder) for name in ("stock", "again", "stock_bf16")}
    commands["ours"] = ours("ours", STEPS)
    commands["bf16"] = ours("bf16", STEPS, "--training-precision=bf16-mixed")
    commands["fewer"] = ours("fewer", FEWER)
    env = {"stock_bf16": {"PL_TRAINER_PRECISION": "bf16-mixed"}}
    started = [begin(command, folder, **env.get(n, {})) for n, command in commands.items()]
    for process in started:
        finish(process)
    return folder / "runs"


def trained(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and optimiser of the last step, {name: tensor}."""
    path = run_dir / "checkpoints" / "final.ckpt"
    content = torch.load(path, map_location="cpu", weights_only=False)  # stock's hold NumPy numbers
    assert content["global_step"] == STEPS
    parts = {key: content[key] for key in ("state_dict", "optimizer_states")}
    return {k: v for k, v in flat_tensors(parts).items() if torch.is_tensor(v)}


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def test_weights_are_those_of_the_stock_command(runs: Path, record_property: Record) -> None:
    """Bit for bit where stock itself gives the same bits twice; else no further than stock is."""
    theirs = trained(runs / "stock")
    of_stock = difference(theirs, trained(runs / "again"))
    of_ours = difference(theirs, trained(runs / "ours"))
    record_property("largest difference of stock to stock", f"{of_stock:.1e}")
    record_property("largest difference of ours to stock", f"{of_ours:.1e}")
    assert of_ours <= 10 * of_stock


def test_it_trains_on_the_device(runs: Path) -> None:
    accelerator = "gpu" if DEVICE.type == "cuda" else "cpu"
    assert f"'accelerator': '{accelerator}'" in (runs / "ours/train.log").read_text()
    assert bool(run_json(runs / "ours")["hardware"]["gpus"]) == (accelerator == "gpu")


def test_bfloat16_trains(runs: Path, record_property: Record) -> None:
    half, single = trained(runs / "bf16"), trained(runs / "ours")
    assert all(value.isfinite().all() for value in half.values())
    record_property("largest difference to float32", f"{difference(half, single):.1e}")
    assert difference(half, single) > 0
    of_stock = difference(half, trained(runs / "stock_bf16"))
    record_property("largest difference of ours to stock in bfloat16", f"{of_stock:.1e}")
    assert of_stock < difference(half, single)


def test_a_run_is_resumed(runs: Path) -> None:
    before = checkpoint(runs / "fewer", "final")
    assert before["global_step"] == FEWER
    finish(begin(ours("fewer", STEPS, "--resume"), runs.parent))
    record = run_json(runs / "fewer")
    assert [start["from_step"] for start in record["starts"]] == [0, FEWER]
    after = trained(runs / "fewer")
    assert all(value.isfinite().all() for value in after.values())
    weights = {f"/state_dict/{name}": value for name, value in before["state_dict"].items()}
    assert difference(weights, {name: after[name] for name in weights}) > 0
