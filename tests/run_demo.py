"""The whole job on a simulated screen, with the commands that a user types.

    python tests/run_demo.py

writes the screen into demo/ and runs both scripts and `state tx infer` on it, once with the real
vectors and once with shuffled ones. It ends with a table and a picture, demo/result.png, of how
well the predicted effect of each perturbation correlates with the one in the data. The model is
State's own, made small by configuration.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from demo_data import Screen, write_demo
from demo_result import correlations, draw, read_effects

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from state_esm_features.console import Bar, start_log  # noqa: E402
from state_esm_features.training.progress import read_progress  # noqa: E402

SMALL_MODEL = (
    "model.kwargs.cell_set_len=32",
    "model.kwargs.hidden_dim=96",
    "model.kwargs.n_encoder_layers=2",
    "model.kwargs.n_decoder_layers=2",
    "model.kwargs.transformer_backbone_kwargs.head_dim=12",
    "model.kwargs.transformer_backbone_kwargs.intermediate_size=192",
    "data.kwargs.output_space=gene",
    "training.lr=0.003",
)
"""State small enough for two CPU cores; full-size state_sm learns nothing specific in minutes."""

FOLDER = Path("demo")
SCREEN, TEMPLATE, TABLE = (
    FOLDER / f"simulated_{name}" for name in ("screen.h5ad", "template.h5ad", "table.pt")
)
LAST = 7
"""Number of the demo's last step."""

TAIL = 20
"""Last lines of a log that are shown when a step fails."""

NEXT = """\
What next?
  your own screen     README.md, "Your own screen"
  new genes           README.md, "Predict, and add new genes"
  make evaluate       what an evaluation of this screen says; takes longer"""


def short(words: Sequence[object]) -> str:
    """A command as one would type it here, cut to fit a line."""
    typed = [str(w) for w in words]
    typed = [os.path.relpath(w) if Path(w).is_absolute() else w for w in typed]
    typed[0] = Path(typed[0]).name  # python, state
    return textwrap.shorten(shlex.join(typed), 70, placeholder=" ...", break_on_hyphens=False)


def run(number: int, what: str, *words: object, steps: int = 0, run_dir: Path = FOLDER) -> None:
    """Do one of the demo's seven steps; what it says goes into a log.

    Parameters
    ----------
    words
        The command.
    steps
        Of a training, whose progress is shown.
    run_dir
        Where that training writes it.
    """
    say(number, what, short(words))
    log = FOLDER / "logs" / f"{number}.log"
    # a model as small as this one is no faster on several threads, and much slower on busy cores
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w") as f:
        f.write(f"$ {shlex.join(map(str, words))}\n")
        f.flush()
        command = [str(w) for w in words]
        with subprocess.Popen(command, stdout=f, stderr=f, env=environment) as process:
            if steps:
                show_progress(process, run_dir / "progress.csv", steps)
    if process.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
        sys.exit(f"\n{end}\n\nerror: step {number} failed; above is the end of {log}")


def say(number: int, what: str, command: str) -> None:
    print(f"{number} of {LAST}  {what:19}  $ {command}", flush=True)


def show_progress(process: subprocess.Popen[bytes], path: Path, steps: int) -> None:
    """A bar of the rows that a training writes until it ends."""
    start, bar = time.time(), None
    ended = False
    while not ended:
        ended = process.poll() is not None
        new = path.exists() and path.stat().st_mtime >= start  # an earlier demo left one
        losses = [r for r in read_progress(path) if r["train_loss"]] if new else []
        if losses:
            step = int(losses[-1]["step"])
            bar = bar or Bar(steps, "step", "step", initial=step, warm_up=5)
            if step > bar.done:
                bar.add(step - bar.done, f"loss {float(losses[-1]['train_loss']):.3g}")
        time.sleep(0 if ended else 0.5)
    if bar:
        bar.close()


def train_and_predict(number: int, name: str, steps: int) -> Path:
    """Steps `number` and the next: train on the features `name`, predict; returns that."""
    runs = FOLDER / "runs"
    words = ("--pert-features", FOLDER / f"{name}.pt", "--config", ROOT / "configs" / "demo.toml")
    words += ("--fast-loading", "dense", "--num-workers", 1, "--batch-size", 8)
    words += ("--max-steps", steps, "--val-freq", max(1, steps // 2))
    words += ("--output-dir", runs, "--name", name, "--overwrite", *SMALL_MODEL)
    command = (sys.executable, ROOT / "train_with_esm_features.py", *words)
    run(number, "train State on them", *command, steps=steps, run_dir=runs / name)
    predicted = FOLDER / f"predicted_{name}.h5ad"
    words = ("--model-dir", runs / name, "--adata", TEMPLATE, "--pert-col", "target_gene")
    state = Path(sys.executable).with_name("state")
    run(number + 1, "predict the effects", state, "tx", "infer", *words, "--output", predicted)
    return predicted


def features(number: int, what: str, name: str, *options: object) -> None:
    """A step that writes a features file."""
    words = ("--esm-embeddings", TABLE, "--from-toml", ROOT / "configs" / "demo.toml")
    script = ROOT / "create_esm_pert_features.py"
    output = ("--output", FOLDER / f"{name}.pt")
    run(number, what, sys.executable, script, *options, *words, *output)


def main(steps: int) -> None:
    start = time.monotonic()
    screen = Screen()
    (FOLDER / "logs").mkdir(parents=True, exist_ok=True)
    print(
        "A simulated screen, and a small State trained on it twice: minutes on two CPU cores.\n"
        f"What the commands say goes into {FOLDER / 'logs'}.\n"
    )
    say(1, "simulate a screen", "python tests/demo_data.py demo")
    write_demo(FOLDER, screen)
    features(2, "look up vectors", "own")
    own = train_and_predict(3, "own", steps)
    features(5, "shuffle the vectors", "shuffled", "--ablation", "shuffle")
    shuffled = train_and_predict(6, "shuffled", steps)
    found = {"own vectors": own, "shuffled vectors": shuffled}
    effects = {name: read_effects(SCREEN, path, screen) for name, path in found.items()}
    draw(effects, FOLDER / "result.png")
    table = pd.DataFrame({name: correlations(x) for name, x in effects.items()})
    print("\nSimulated screen: correlation of predicted with true effect (1 is perfect)\n")
    print(table.to_string(float_format="%.2f"))
    print(
        "\nUnseen genes were perturbed in no training cell: only their vectors can tell what they\n"
        f"do. Nothing here is biology. It took {time.monotonic() - start:.0f} s.\n\n"
        f"The picture: {FOLDER / 'result.png'}\n\n{NEXT}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    start_log(quiet=False)
    try:
        main(arguments.steps)
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C")
