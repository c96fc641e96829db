"""The picture of a training."""

from __future__ import annotations

import pytest

from state_esm_features.training.progress import training_figure


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ((9.0, 0.2, 0.31), ["0.2", "0.5", "1", "2", "5", "10"]),
        ((12345.0, 0.002, 30.0), ["0.001", "0.01", "0.1", "1", "10", "100", "1,000", "10,000"]),
        (
            (0.69312, 0.69308, 0.6931),
            [
                *("0.69308", "0.693085", "0.69309", "0.693095", "0.6931", "0.693105", "0.69311"),
                *("0.693115", "0.69312"),
            ],
        ),
    ],
)
def test_losses_have_plain_numbers(losses: tuple[float, ...], shown: list[str]) -> None:
    """Where matplotlib writes powers of ten between small ticks, or an offset above the axis."""
    rows = [
        {"step": str(i), "train_loss": str(loss), "val_loss": "", "waiting": "0.5"}
        for i, loss in enumerate(losses)
    ]
    figure = training_figure(rows, "run")
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    low, high = axis.get_view_interval()
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    assert [text.get_text() for place, text in ticks if low <= place <= high] == shown
    assert axis.get_offset_text().get_text() == ""
    assert not len(axis.get_minorticklocs())
