"""What the parts of bench_gpu.py share: rows of its table, progress, the time that is left."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Progress, on stderr."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], unit: str) -> str:
    """Median (lowest to highest), three digits."""
    low, middle, high = (f"{v:,.3g}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit}" + (f" ({low} to {high})" if len(values) > 1 else "")


@dataclass(frozen=True)
class Rows:
    """The rows of a part, written to a file one by one: those before a crash are kept.

    Attributes
    ----------
    path
        A JSON object a line.
    part
        Name of the part.
    until
        Moment (time.monotonic) after which nothing new is begun.
    """

    path: Path
    part: str
    until: float

    def add(self, case: str, run: str, **found: Any) -> None:
        row = {"part": self.part, "case": case, "run": run, **found}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{self.part}: {case}, {run}: {in_words(row)}")

    def require_time(self) -> None:
        if time.monotonic() > self.until:
            raise TimeoutError("not begun: the time was used up")

    @contextlib.contextmanager
    def guarded(self, case: str, run: str) -> Iterator[None]:
        """A failure within becomes a row with its error."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, TimeoutError):
                traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.add(case, run, error=f"{type(error).__name__}: {lines[-1]}"[:300])


HEAD = ("part", "case", "run", "error")


def in_words(row: dict[str, Any]) -> str:
    """The results of a row."""
    found = [f"{name} {value}" for name, value in row.items() if name not in HEAD]
    return "; ".join([*([f"FAILED: {row['error']}"] if "error" in row else []), *found])


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parser_of_part(text: str) -> argparse.ArgumentParser:
    """The options that bench_gpu.py gives to every part."""
    parser = argparse.ArgumentParser(description=text.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=Path, required=True, help="file to append to")
    parser.add_argument("--until", type=float, default=float("inf"), help="of time.monotonic")
    parser.add_argument("--folder", type=Path, required=True, help="of data, kept")
    return parser


def run_for(seconds: float, command: Sequence[str], **options: Any) -> int:
    """Exit code of a command; when its time is over it ends, with all that it has started.

    State's loader processes would outlive it, and disturb what is measured next.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"given up after {seconds:.0f} s") from error
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def on_device(device: str) -> dict[str, str]:
    """Environment of what is to run there: State trains on a GPU wherever it sees one.

    On a CPU only that it runs is of interest, and one thread each is the least to wait for.
    """
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | (on_cpu if device == "cpu" else {})
