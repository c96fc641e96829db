"""The demo: its table shows whether the vectors reach the model, and its parts do what they say."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import run_demo
import state.__main__
import torch
from demo_data import Screen, vectors, write_demo
from demo_result import SEEN, UNSEEN, UNSEEN_TYPE, Effects, correlations, draw, read_effects

import create_esm_pert_features
import train_with_esm_features
from state_esm_features import console

BASE = Screen(perturbed=60, families=6, width=8, genes=40, cells=12, controls=48)
STEPS = 120
TINY_MODEL = (
    "data.kwargs.output_space=gene",
    "training.lr=0.005",
    "model.kwargs.cell_set_len=16",
    "model.kwargs.hidden_dim=48",
    "model.kwargs.n_encoder_layers=2",
    "model.kwargs.n_decoder_layers=2",
    "model.kwargs.transformer_backbone_kwargs.head_dim=6",
    "model.kwargs.transformer_backbone_kwargs.intermediate_size=96",
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers=2",
)


def prepare(folder: Path, screen: Screen) -> None:
    """A folder with the simulated screen and a TOML as the demo's."""
    write_demo(folder / "demo", screen)
    (folder / "demo.toml").write_text(
        '[datasets]\ndemo = "demo/simulated_screen.h5ad"\n[training]\ndemo = "train"\n'
        '[zeroshot]\n"demo.simB" = "test"\n[fewshot."demo.simA"]\n'
        f"val = {json.dumps(screen.validation)}\ntest = {json.dumps(screen.unseen)}\n"
    )


def outcome(folder: Path, screen: Screen, name: str, table: Path, *options: str) -> pd.Series:
    """Features from `table`, training and stock inference: the demo's column for it."""
    features = f"{name}.pt"
    labels = ["--from-toml", "demo.toml", "--esm-embeddings", str(table), "--output", features]
    assert create_esm_pert_features.main([*labels, *options]) == 0
    words = ["--config", "demo.toml", "--pert-features", features, "--name", name]
    words += ["--max-steps", str(STEPS), "--batch-size", "8", "--num-workers", "0"]
    words += ["--fast-loading", "sorted"]
    assert train_with_esm_features.main([*words, *TINY_MODEL]) == 0
    predicted = folder / f"{name}.h5ad"
    infer = ["state", "tx", "infer", "--model-dir", f"runs/{name}", "--output", str(predicted)]
    infer += ["--adata", "demo/simulated_template.h5ad", "--pert-col", "target_gene", "--quiet"]
    before, sys.argv = sys.argv, infer
    try:
        state.__main__.main()
    finally:
        sys.argv = before
    return correlations(read_effects(folder / "demo/simulated_screen.h5ad", predicted, screen))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A model of this size is no faster on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.usefixtures("one_thread")
def test_table_tells_right_wiring_from_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    folder, screen = tmp_path, replace(BASE, seed=seed)
    prepare(folder, screen)
    monkeypatch.chdir(folder)
    table = {k: torch.from_numpy(v) for k, v in vectors(screen).items()}
    mixed = random.Random(0).sample([*table.values()], len(table))
    other = replace(screen, seed=9, families=screen.perturbed)  # families would tell genes apart
    tables = {
        "right": table,
        "wrong order": dict(zip(table, mixed, strict=True)),
        "wrong file": {k: torch.from_numpy(v) for k, v in vectors(other).items()},
        "zero vectors": {"SIM000": table["SIM000"]},
    }
    found = {}
    for name, content in tables.items():
        torch.save(content, folder / f"{name} table.pt")
        options = ["--missing", "zero"] if name == "zero vectors" else []
        found[name] = outcome(folder, screen, name, folder / f"{name} table.pt", *options)
    shown = pd.DataFrame(found)
    print(shown.to_string(float_format="%.2f"))
    unseen = shown.loc[UNSEEN]
    assert unseen["right"] > 0.4, shown
    assert (unseen["right"] - unseen.drop("right") > 0.25).all(), shown
    assert np.isfinite(shown.to_numpy()).all()


# --- parts of the demo --------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that one works in, with that of the logs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo/logs").mkdir(parents=True)
    return tmp_path


def perfect(folder: Path) -> Effects:
    """Effects of a screen that was predicted as it is."""
    screen = replace(BASE, families=3, perturbed=10)
    write_demo(folder, screen)
    truth = folder / "simulated_screen.h5ad"
    return read_effects(truth, truth, screen)


def test_table_of_a_perfect_and_of_a_useless_prediction(tmp_path: Path) -> None:
    effects = perfect(tmp_path)
    assert {g: true.shape for g, (true, _) in effects.items()} == {
        SEEN: (7, 40),
        UNSEEN: (2, 40),
        UNSEEN_TYPE: (2, 40),
    }
    assert correlations(effects).to_numpy() == pytest.approx(1)
    turned = {group: (true, -true) for group, (true, _) in effects.items()}
    assert correlations(turned).to_numpy() == pytest.approx(-1)


def test_picture_is_as_wide_as_a_page_and_small(tmp_path: Path) -> None:
    effects = perfect(tmp_path)
    path = tmp_path / "result.png"
    draw({"own vectors": effects, "shuffled vectors": effects}, path)
    assert matplotlib.image.imread(path).shape[1] == 900
    assert path.stat().st_size < 200_000


def test_a_step_is_one_line_and_what_it_says_is_in_its_log(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('out'); sys.stdout.flush(); print('err', file=sys.stderr)"
    run_demo.run(2, "try this", sys.executable, "-c", code)
    said = capfd.readouterr()
    assert re.fullmatch(r"2 of 7  try this +\$ python\S* -c .*\.\.\.\n", said.out)
    assert said.err == "" and len(said.out) <= 100
    assert (here / "demo/logs/2.log").read_text().splitlines()[1:] == ["out", "err"]


def test_of_a_step_that_fails_the_end_of_its_log_is_shown(here: Path) -> None:
    code = "print('\\n'.join(f'line {i}' for i in range(99))); raise SystemExit(3)"
    with pytest.raises(SystemExit) as end:
        run_demo.run(3, "fail", sys.executable, "-c", code)
    lines = str(end.value).strip().splitlines()
    assert lines[0] == f"line {99 - run_demo.TAIL}"
    assert lines[-1] == "error: step 3 failed; above is the end of demo/logs/3.log"


def test_progress_of_a_training_is_that_of_its_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = here / "begun"

    class Seen(console.Bar):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            begun.touch()

    monkeypatch.setattr(run_demo, "Bar", Seen)
    console.start_log(quiet=False)
    (here / "progress.csv").write_text("step,train_loss\n9,9\n")  # of an earlier demo
    os.utime("progress.csv", (0, 0))
    code = """
import pathlib, time
open("progress.csv", "w").write("step,train_loss\\n1,2.5\\n")
while not pathlib.Path("begun").exists():
    time.sleep(0.01)
open("progress.csv", "a").write("2,\\n3,1.25\\n")
"""
    run_demo.run(3, "train", sys.executable, "-c", code, steps=3, run_dir=here)
    said = capfd.readouterr().err
    assert re.fullmatch(r"step 3 of 3, loss 1.25, \S+ steps/s, 00:00 left\n", said)
