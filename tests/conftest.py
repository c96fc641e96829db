"""Fixtures: the two scripts as a user runs them, and small simulated screens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import pytest
import torch
from demo_data import Screen, simulate, vectors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SMALL = Screen(perturbed=10, families=3, width=8, genes=30, cells=12, controls=24, batches=2)


@dataclass(frozen=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run_script(name: str, *arguments: object, cwd: Path, **options: object) -> Result:
    """Run `name`.py in a process of its own, as from a shell."""
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        **options,  # type: ignore[call-overload]
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def whole_float32() -> None:
    """State's training leaves products of float32 less exact for its process, references too."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def create(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run create_esm_pert_features.main([...]) in this process, inside tmp_path."""
    import create_esm_pert_features

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = create_esm_pert_features.main([str(a) for a in arguments])
        except SystemExit as usage:  # argparse
            code = int(usage.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def screen(tmp_path: Path) -> anndata.AnnData:
    """A small screen: 10 genes, one combination, control; 2 cell types, 2 batches."""
    return simulate(SMALL)


@pytest.fixture
def project(tmp_path: Path, screen: anndata.AnnData) -> Path:
    """tmp_path with screen.h5ad, its table.pt and a config.toml that trains on all of it."""
    screen.write_h5ad(tmp_path / "screen.h5ad")
    torch.save({k: torch.from_numpy(v) for k, v in vectors(SMALL).items()}, tmp_path / "table.pt")
    (tmp_path / "config.toml").write_text(
        '[datasets]\nsim = "screen.h5ad"\n[training]\nsim = "train"\n'
        '[fewshot."sim.simA"]\nval = ["SIM003"]\ntest = ["SIM004"]\n'
    )
    return tmp_path
