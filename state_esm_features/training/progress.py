"""What is known of a training while it runs, as a bar, in progress.csv and in training.png.

Nothing is decided here.
"""

from __future__ import annotations

import csv
import io
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import Bar
from state_esm_features.files import write_whole
from state_esm_features.training.checkpoints import checkpoint_steps

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PROGRESS_ROWS = 1000
"""Rows of progress.csv, about, whatever the number of steps."""


@dataclass
class Training:
    """What is known of a training while it runs; shared by our callbacks.

    Attributes
    ----------
    first, step
        Step at which this start began, and now.
    losses
        Last training and validation loss.
    fetching
        The loop waits for a batch: between two steps, or in a validation.
    waited
        Seconds spent so.
    stop
        Signal that asked to stop after this step.
    sound
        The weights are those of a whole step, so that they can be saved.
    together
        The other ranks stop for the same reason.
    connected
        With the other ranks, where there are any.
    """

    run_dir: Path
    max_steps: int
    first: int = 0
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    fetching: float | None = None
    waited: float = 0.0
    started: float = 0.0
    stop: int | None = None
    sound: bool = False
    together: bool = False
    bar: Bar | None = None
    since_row: list[float] = field(default_factory=list)
    row_step: int = 0
    row_moment: float = 0.0
    row_waited: float = 0.0
    connected: threading.Event = field(default_factory=threading.Event)

    @property
    def last_checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / "last.ckpt"

    def good_checkpoint(self) -> str:
        """What a run that fails now can go on from."""
        steps = checkpoint_steps(self.run_dir)
        if not steps:
            return "there is no checkpoint yet"
        path, step = next(iter(steps.items()))
        return f"the last good checkpoint is {path}, of step {step:,}"

    def timings(self) -> dict[str, float]:
        """Seconds, speed and share of waiting of this start."""
        seconds = time.monotonic() - self.started if self.started else 0.0
        steps = self.step - self.first
        return {
            "seconds": round(seconds, 1),
            "steps_per_second": round(steps / seconds, 4) if seconds else 0.0,
            "waiting_for_data": round(self.waited / seconds, 4) if seconds else 0.0,
        }


PROGRESS_COLUMNS = ("step", "seconds", "train_loss", "val_loss", "steps_per_second", "waiting")


def note_progress(state: Training, trainer: Any, validated: bool = False) -> None:
    """The bar, and now and then a row of progress.csv: means over the steps since the last row."""
    if state.bar is None:
        return
    moment = time.monotonic()
    seconds = max(moment - state.started, 1e-9)
    names = {"loss": "train_loss", "validation": "val_loss"}
    notes = [f"{n} {state.losses[k]:.4g}" for n, k in names.items() if k in state.losses]
    notes.append(f"{state.waited / seconds:.0%} waiting for data")
    state.bar.add(state.step - state.bar.done, ", ".join(notes))
    every = max(1, state.max_steps // PROGRESS_ROWS)
    steps = state.step - state.row_step
    due = state.step % every == 0 or state.step == state.max_steps
    if not validated and not (due and steps):
        return
    span = max(moment - state.row_moment, 1e-9)
    losses = state.since_row
    row = (
        state.step,
        f"{seconds:.3f}",
        f"{sum(losses) / len(losses):.6g}" if losses else "",
        f"{state.losses['val_loss']:.6g}" if validated else "",
        f"{steps / span:.4g}" if steps else "",
        f"{(state.waited - state.row_waited) / span:.4f}" if steps else "",
    )
    path = state.run_dir / "progress.csv"
    new = not path.exists()
    with path.open("a", newline="") as f:
        csv.writer(f).writerows([PROGRESS_COLUMNS, row] if new else [row])
    if steps:
        state.row_step = state.step
        state.since_row.clear()
        state.row_moment, state.row_waited = moment, state.waited


def keep_progress(path: Path, step: int) -> None:
    """Drop the rows of steps that are trained again."""
    rows = read_progress(path)
    if rows:
        kept = [tuple(r.values()) for r in rows if int(r["step"]) <= step]
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows([PROGRESS_COLUMNS, *kept])
        write_whole(path, lambda f: f.write(lines.getvalue().encode()))


def read_progress(path: Path) -> list[dict[str, str]]:
    """Rows of progress.csv; a last one that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [r for r in csv.DictReader(f) if all(v is not None for v in r.values())]


def draw_training(run_dir: Path) -> Path | None:
    """training.png of progress.csv."""
    rows = read_progress(run_dir / "progress.csv")
    if not rows:
        return None
    path, figure = run_dir / "training.png", training_figure(rows, run_dir.name)
    write_whole(path, lambda f: figure.savefig(f, format="png"))
    return path


def training_figure(rows: Sequence[Mapping[str, str]], title: str) -> Figure:
    """Losses above, share of time waiting for data below; `rows` as progress.csv has them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def curve(column: str) -> tuple[list[int], list[float]]:
        points = [(int(r["step"]), float(r[column])) for r in rows if r[column]]
        return [x for x, _ in points], [y for _, y in points]

    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot(*curve("train_loss"), color="tab:blue", linewidth=1, label="training")
    steps, losses = curve("val_loss")
    if steps:
        above.plot(steps, losses, "o-", color="tab:orange", markersize=4, label="validation")
    every = [float(r[c]) for r in rows for c in ("train_loss", "val_loss") if r[c]]
    if every and min(every) > 0 and max(every) > 20 * min(every):
        above.set_yscale("log")
    plain_numbers(above.yaxis)
    above.legend()
    above.set(ylabel="loss", title=title)
    below.fill_between(*curve("waiting"), color="tab:grey", alpha=0.6)
    below.set(ylim=(0, 1), xlabel="step", ylabel="time waiting\nfor data")
    below.yaxis.set_major_formatter(PercentFormatter(1))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def plain_numbers(axis: Axis) -> None:
    """Ticks of an axis as a person writes them: no powers of ten, no offset, none between."""
    from matplotlib.ticker import LogLocator, NullLocator

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: f"{x:,.10f}".rstrip("0").rstrip("."))
