"""How a command ends: signals, whatever Python is doing when they come."""

from __future__ import annotations

import os
import signal
import weakref

import pytest

from state_esm_features.console import exit_code, raise_if_stopped


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_swallows_is_obeyed_at_the_next_look(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is raised while an object is collected is printed, and forgotten."""

    def step() -> int:
        dying = set[int]()
        weakref.finalize(dying, os.kill, os.getpid(), signal.SIGTERM)
        del dying
        raise_if_stopped()
        return 0

    assert exit_code(step) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM"


def test_a_stop_of_another_command_in_this_process_is_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0) == 143

    def step() -> int:
        raise_if_stopped()
        return 0

    assert exit_code(step) == 0
