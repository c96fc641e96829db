"""Where ESM2 computes: which device is there, and whether it is quick in half precision.

What is computed is not known here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from state_esm_features.console import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """--device; `auto` takes a GPU that is there."""
    import torch

    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there = [gpu for gpu, is_there in gpus.items() if is_there] + ["cpu"]
    if name not in ("auto", *there):
        raise InputError(f"--device {name}: torch sees none here; use --device auto or cpu")
    return torch.device(there[0] if name == "auto" else name)


def slow_in(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices far more slowly in half precision than in float32.

    Measured, on one thread, each at its best of several: what instructions a CPU has does not say
    what this build of torch makes of them. Without such instructions half precision took 4 to 50
    times as long as float32, with them 0.2 to 0.8 times.
    """
    import torch

    def seconds(kind: torch.dtype) -> float:
        x, weight = torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter() - start

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # in turn, so that whatever else this machine does slows down both
        pairs = [(seconds(dtype), seconds(torch.float32)) for _ in range(6)]
    finally:
        torch.set_num_threads(cores)
    return min(half for half, _ in pairs) > 2 * min(single for _, single in pairs)
