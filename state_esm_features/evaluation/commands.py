"""The commands of each part, as a user would type them.

Nothing is started here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from state_esm_features.evaluation import design
from state_esm_features.evaluation.planted import TOML
from state_esm_features.evaluation.study import Study

HOME = Path(__file__).resolve().parents[2]
"""Where the two scripts lie, beside the package: in a clone, and where it is installed."""

CREATE = HOME / "create_esm_pert_features.py"
TRAIN = HOME / "train_with_esm_features.py"
CHECKPOINT = "final.ckpt"


def command(study: Study, part: design.Part) -> list[str]:
    """The words of a part that is a process."""
    words = {
        design.FEATURES: _features,
        design.TRAINING: _training,
        design.PREDICTION: _prediction,
    }[part.kind](study, part)
    return [sys.executable, *map(str, words)]


def _features(study: Study, part: design.Part) -> list[object]:
    words: list[object] = [CREATE, "--from-toml", study.toml, *study.features]
    method, _, seed = part.name.partition("_")
    if method in design.ABLATIONS:
        words += ["--ablation", design.ABLATIONS[method]]
    if seed:
        words += ["--ablation-seed", seed]
    return [*words, "--output", study.features_file(part.name)]


def _training(study: Study, part: design.Part) -> list[object]:
    model = part.model
    assert model is not None
    toml = study.toml if model.screen == design.REAL else study.planted(model.screen) / TOML
    run_dir, training = study.run_dir(part.name), list(study.training)
    overrides = list(study.overrides)
    if not model.trains:
        training = [word for word in training if not word.startswith("--model=")]
        training.append(f"--model={model.method}")
        overrides = study.baseline_overrides()
    words: list[object] = [TRAIN, "--config", toml]
    words += ["--pert-features", study.features_file(model.features), "--seed", model.seed]
    words += [*training, "--output-dir", run_dir.parent, "--name", run_dir.name]
    words += ["--resume"] if study.resumes else []
    return [*words, *overrides]


def _prediction(study: Study, part: design.Part) -> list[object]:
    # -P: a folder of this name where one works is not State. minimal: the smallest profile that has
    # all three metrics
    words: list[object] = ["-P", "-m", "state", "tx", "predict"]
    words += ["--output-dir", study.run_dir(part.name), "--checkpoint", CHECKPOINT]
    return [*words, "--profile", "minimal"]
