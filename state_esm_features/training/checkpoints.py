"""Checkpoints: how far they are, whether they are sound, and what they may hold.

When they are written is decided in `loop`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from state_esm_features.console import InputError, warn
from state_esm_features.files import read_torch


def checkpoint_steps(run_dir: Path) -> dict[Path, int]:
    """{checkpoint: its step}, the most advanced first; what cannot be read is said and left out."""
    folder = run_dir / "checkpoints"
    found = {}
    for name in ("last.ckpt", "final.ckpt", "step=*.ckpt", "best.ckpt"):
        for path in sorted(folder.glob(name)):
            try:
                found[path] = int(read_torch(path)["global_step"])
            except InputError as error:
                warn(f"damaged checkpoint: {error}")
            except Exception as error:  # bytes that are not what was pickled can raise anything
                warn(f"damaged checkpoint: {path} cannot be read ({type(error).__name__}: {error})")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def intact(path: Path) -> bool:
    """Every byte of a checkpoint is as it was written: torch keeps a checksum of each tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged headers raise anything
        damaged = f"{type(error).__name__}: {error}"
    if damaged:
        warn(f"damaged checkpoint: {path} does not hold what was written ({damaged})")
    return damaged is None


def without_numpy(value: Any) -> Any:
    """NumPy numbers and arrays turned into Python's and torch's, in nested dicts and lists, so that
    torch.load(weights_only=True) reads what is saved.

    cell-load takes input_dim and others from HDF5 attributes of sparse X as numpy.int64, which go
    into hyper_parameters, and State's mean baselines keep their means as arrays: then neither
    resume nor `state tx infer` could load the checkpoint. State makes tensors of both.
    """
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:  # not a state_dict, which has attributes
        return {k: without_numpy(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    return value


def write_over_old_names(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
    """Let a resumed run write over its last.ckpt and best.ckpt, where the run is now.

    Lightning writes last-v1.ckpt and best-v1.ckpt beside files that it does not know as its own.
    """
    folder = next(str(c.dirpath) for c in trainer.checkpoint_callbacks)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {moved(k): v for k, v in value.items()}
        return f"{folder}/{Path(value).name}" if isinstance(value, str) and value else value

    for state in checkpoint["callbacks"].values():
        if "dirpath" in state:
            paths = {k: moved(v) for k, v in state.items() if k.endswith("path") or "models" in k}
            state |= paths | {"dirpath": folder, "last_model_path": f"{folder}/last.ckpt"}
