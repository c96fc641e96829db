"""Where ESM2 computes: which devices are there, and whether one is quick in half precision.

What is computed is not known here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from state_esm_features.console import InputError, count, out_of_memory, some

if TYPE_CHECKING:
    import torch


class OutOfMemory(Exception):
    """A device has no room for what it was given; its argument is the device's name."""


@contextlib.contextmanager
def memory_of(device: torch.device) -> Iterator[None]:
    """Name the device that is out of memory.

    Raises
    ------
    OutOfMemory
        In place of whatever torch raises then.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(str(device)) from error


def choose_devices(name: str) -> tuple[list[torch.device], str]:
    """The devices of --device, and what a person may want to know of the choice.

    `cuda` means every visible GPU, `cuda:N` one, and `auto` what is there.

    Raises
    ------
    InputError
        torch sees no such device.
    """
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(visible)]
    kinds = {"cuda": bool(gpus), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, number = name.partition(":")
    if kind == "auto":
        kind = next(kind for kind, is_there in kinds.items() if is_there)
    if not kinds[kind]:
        raise InputError(f"--device {name}: torch sees none here; use --device auto or cpu")
    if kind != "cuda":
        return [torch.device(kind)], ""
    numbers, said = which_gpus(gpus, int(number) if number else None)
    return [torch.device("cuda", i) for i in numbers], said


def which_gpus(gpus: Sequence[str], number: int | None) -> tuple[list[int], str]:
    """Of GPUs, by their names, the numbers of those to use, and what is to be said of it.

    Without a number those of the first one's kind: another kind may round otherwise, and which one
    has a protein depends on the moment.
    """
    if number is not None:
        if number >= len(gpus):
            raise InputError(
                f"--device cuda:{number}: torch sees {count(len(gpus), 'GPU')} here, "
                f"{some(f'cuda:{i}' for i in range(len(gpus)))}"
            )
        return [number], ""
    alike = [i for i, gpu in enumerate(gpus) if gpu == gpus[0]]
    others = [f"cuda:{i} ({gpu})" for i, gpu in enumerate(gpus) if gpu != gpus[0]]
    said = f"not used: {some(others)}; vectors are of one kind of GPU, here {gpus[0]}"
    return alike, said if others else ""


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
