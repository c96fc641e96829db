"""The features file of a training, held against its data.

How features are made is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from state_esm_features.console import Findings, InputError, count, have, some
from state_esm_features.embedding.features_file import trained_sha256
from state_esm_features.embedding.missing import say_left_out
from state_esm_features.embedding.vectors import Vectors, identical
from state_esm_features.files import existing_file, read_torch, sha256_of
from state_esm_features.option_groups import DEFAULT_CONTROL
from state_esm_features.training.data import Data


def check_features(
    path: Path, manifest: Mapping[str, Any] | None, data: Data | None, found: Findings
) -> dict[str, Any]:
    """Hold the features file against the data; returns what is known of it.

    {sha256, width, labels, ablation, known_as}, the last as `same_vector_in_training` has it.
    cell-load takes the width from the first vector, gives a label without a vector zeros, the
    vector of the control, and says so at INFO level only.

    Parameters
    ----------
    manifest
        What `read_manifest` gives for the file, which holds its hash.
    """
    features, about = read_features(path), manifest or {}
    control = data.columns.control if data else about.get("control", DEFAULT_CONTROL)
    if manifest is None:
        found.warnings.append(
            f"{path} has no manifest of create_esm_pert_features.py: nothing tells where its "
            "vectors come from"
        )
    else:
        _check_manifest(path, len(features), manifest, control, found)
    if control not in features:
        found.warnings.append(f"{path} has no control {control!r}: cell-load gives it zeros")
    width = _check_values(path, features, found)
    controls = {control, about.get("control")}  # another control is a problem already
    zeros = [k for k, v in features.items() if k not in controls and not v.any()]
    if zeros:
        _note_zeros(path, zeros, about, found)
    known_as = {}
    if data:
        _check_labels(path, features, data, found)
        known_as = same_vector_in_training(features, data.splits)
        note_known(known_as, found)
    return {
        "sha256": trained_sha256(manifest) if manifest else sha256_of(path),
        "width": width,
        "labels": len(features),
        "ablation": about.get("ablation"),
        "known_as": known_as,
    }


def same_vector_in_training(
    features: Vectors, splits: Mapping[str, Mapping[str, int]]
) -> dict[str, str]:
    """{label of val or test that no training cell has: one of training with the same vector}.

    To State they are one perturbation: two guides of a gene, or a symbol and its older one.
    """
    train, held = splits["train"], {**splits["val"], **splits["test"]}
    known: dict[str, str] = {}
    for group in identical(features):
        trained = next((label for label in group if label in train), None)
        if trained:
            known |= {x: trained for x in group if x in held and x not in train}
    return known


def _check_values(path: Path, features: Vectors, found: Findings) -> int:
    """One width and numbers only are wanted; returns the width that cell-load takes."""
    import torch

    shapes = sorted({tuple(v.shape) for v in features.values()})
    if len(shapes) > 1 or len(shapes[0]) != 1:
        found.problems.append(
            f"{path}: expected vectors of one width, found shapes {some(map(str, shapes))}"
        )
    infinite = [k for k, v in features.items() if not torch.isfinite(v).all()]
    if infinite:
        found.problems.append(
            f"{path}: NaN or infinite values in {count(len(infinite), 'vector')} ({some(infinite)})"
        )
    return next(iter(features.values())).shape[-1] if shapes[0] else 0


def _check_manifest(
    path: Path, labels: int, manifest: Mapping[str, Any], control: str, found: Findings
) -> None:
    if manifest["control"] != control:
        found.problems.append(
            f"{path} was made for the control {manifest['control']!r}, but this run's control is "
            f"{control!r}; make it again, or correct --control-pert"
        )
    filled = list(manifest.get("missing", {}))
    if filled and manifest["policy"]["missing"] == "mean":
        found.warnings.append(
            f"{path}: {len(filled):,} of {count(labels, 'label')} filled in with the mean "
            f"vector, as --missing mean chose ({some(filled)})"
        )


def note_known(known_as: Mapping[str, str], found: Findings) -> None:
    """Warn of labels as `same_vector_in_training` has them."""
    if known_as:
        n, pairs = len(known_as), [f"{held} = {trained}" for held, trained in known_as.items()]
        found.warnings.append(
            f"{count(n, 'label')} held out {have(n)} the vector of one that trains "
            f"({some(pairs, 3)}): not unseen. Of guides of one gene, hold all out"
        )


def read_features(path: Path) -> dict[str, Any]:
    """Load a features file without executing anything in it."""
    import torch

    existing_file(path, "features file")
    features = read_torch(path)

    if not (
        isinstance(features, dict)
        and features
        and all(isinstance(k, str) and torch.is_tensor(v) for k, v in features.items())
    ):
        raise InputError(f"{path} is no features file: expected a dict of label -> tensor")
    return features


def _note_zeros(
    path: Path, zeros: Collection[str], about: Mapping[str, Any], found: Findings
) -> None:
    what = (
        f"{path}: {count(len(zeros), 'perturbation')} with a zero vector, which State cannot tell "
        f"from the control ({some(zeros)})"
    )
    if about.get("policy", {}).get("missing") == "zero":
        found.warnings.append(f"{what}, as --missing zero chose")
    else:
        found.problems.append(f"{what}. Make the file again with create_esm_pert_features.py")


def _check_labels(path: Path, features: Collection[str], data: Data, found: Findings) -> None:
    control = data.columns.control
    for f in data.files:
        labels = [x for x in f.labels if x != control and x not in f.unused]
        missing = [x for x in labels if x not in features]
        if missing:
            found.problems.append(
                f"{len(missing):,} of {count(len(labels), 'perturbation')} in {f.path} "
                f"{have(len(missing))} no embedding in {path} ({some(missing)}); cell-load "
                "would train them as control. Make the file again with create_esm_pert_features.py "
                "--from-toml"
            )
    in_cells = {x for f in data.files for x in set(f.labels) - set(f.unused)}
    known = {control, *features, *in_cells}
    unused = {x: None for f in data.files for x in f.labels if x in f.unused and x not in known}
    if unused:
        holders = [str(f.path) for f in data.files if not unused.keys().isdisjoint(f.unused)]
        text = say_left_out(list(unused), holders, data.columns.pert, f" in {path}")
        found.warnings.append(text)
