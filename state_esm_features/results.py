"""What create_features() and train() return, and how a notebook shows it.

How it came about is not known here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from state_esm_features.console import count, some


class Shown:
    """A result as a table of two columns: of text, or in a notebook of HTML."""

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) of what there is to say."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(f"{name:<9} {value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table>{''.join(rows)}</table>"


@dataclass(frozen=True)
class FeaturesResult(Shown):
    """What create_features() did.

    Attributes
    ----------
    status
        'written', 'added' (to a run), 'up to date' (the run knew all of them) or 'dry run'.
    path
        The features file, or of a run the file in which `state tx infer` looks labels up; None if
        nothing was written.
    manifest
        The record of where every vector comes from.
    labels
        How many labels were looked up; of a run those that it did not know.
    resolved
        {how: number of these labels}: 'exact', 'alias', 'previous symbol', ...
    missing
        {label: why it has no vector of its own}.
    """

    status: str
    path: Path | None
    manifest: Path | None
    labels: int
    resolved: Mapping[str, int]
    missing: Mapping[str, str]

    def rows(self) -> list[tuple[str, str]]:
        tally = ", ".join(f"{n:,} {how}" for how, n in self.resolved.items())
        rows = [
            ("status", self.status),
            ("features", str(self.path or "")),
            ("manifest", str(self.manifest or "")),
            ("labels", f"{self.labels:,}" + (f" ({tally})" if tally else "")),
        ]
        if self.missing:
            rows.append(("missing", f"{count(len(self.missing), 'label')}: {some(self.missing)}"))
        return [(name, value) for name, value in rows if value]


@dataclass(frozen=True)
class TrainingResult(Shown):
    """What train() did.

    Attributes
    ----------
    status
        'finished', 'up to date' or 'dry run'.
    run_dir
        Where the run is.
    steps
        How many steps it has.
    losses
        {'train_loss', 'val_loss': the last one}.
    predict_command
        State's command that predicts with this run.
    stock_command
        The `state tx train` command that trains the same weights.
    """

    status: str
    run_dir: Path
    steps: int
    losses: Mapping[str, float]
    predict_command: str
    stock_command: str

    def rows(self) -> list[tuple[str, str]]:
        losses = ", ".join(f"{name} {loss:.5g}" for name, loss in sorted(self.losses.items()))
        rows = [
            ("status", self.status),
            ("run", str(self.run_dir)),
            ("steps", f"{self.steps:,}"),
            ("losses", losses),
            ("predict", self.predict_command),
            ("stock", self.stock_command),
        ]
        return [(name, value) for name, value in rows if value]
