"""How a command ends, what it says of its progress, and where other code's words go."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest

from state_esm_features import console
from state_esm_features.console import (
    Bar,
    InputError,
    Notes,
    announce,
    called,
    exit_code,
    libraries_into,
    line_due,
    log,
    raise_if_stopped,
    raise_stopped,
    start_log,
)


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
    assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0) == 143
    assert called(step, Notes()) == 0


def test_a_call_from_python_raises_what_stopped_it() -> None:
    """Notes are said, and what it held is free: the error of a notebook's last cell is kept."""

    class Model:
        pass

    notes = Notes()
    held = []

    def out_of_memory() -> None:
        model = Model()
        held.append(weakref.ref(model))
        notes.always("said")
        try:
            raise RuntimeError(str(model))
        except RuntimeError as error:
            raise InputError("out of memory") from error

    with pytest.raises(InputError, match="out of memory") as error:
        called(out_of_memory, notes)
    assert error.value.__cause__ is error.value.__context__ is None
    assert held[0]() is None
    assert notes.noted == []  # said
    with pytest.raises(KeyboardInterrupt):
        called(lambda: raise_stopped(signal.SIGINT, None), notes)
    with pytest.raises(SystemExit) as stop:
        called(lambda: raise_stopped(signal.SIGUSR1, None), notes)
    assert stop.value.code == 143


def test_progress_is_said_soon_and_then_once_a_minute() -> None:
    said = [float("-inf")]
    for second in range(100, 401):
        if line_due(second, 100, said[-1]):
            said.append(second)
    assert [moment - 100 for moment in said[1:]] == [0, 5, 10, 20, 40, 80, 140, 200, 260]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Start = Callable[[io.StringIO], io.StringIO]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Say messages on this stderr."""

    def on(stream: io.StringIO) -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", stream)
        start_log(quiet=False)
        return stream

    before = log.handlers[:]
    yield on
    log.handlers[:] = before


def test_no_time_left_is_said_before_five_steps_are_done(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = start(io.StringIO())
    monkeypatch.setattr(console, "line_due", lambda *_: True)  # each step is said
    bar = Bar(20, "step", "step", initial=10, warm_up=5)
    for _ in range(10):
        bar.add(1)
    said = messages.getvalue().splitlines()
    assert [line.split(",")[0] for line in said] == [f"step {n} of 20" for n in range(11, 21)]
    assert [line.endswith(" left") for line in said] == [n >= 15 for n in range(11, 21)]


def test_a_bar_on_a_terminal_has_no_time_left_before_five_steps_either(
    start: Start,
) -> None:
    terminal = start(Terminal())
    bar = Bar(20, "step", "step", warm_up=5)
    bar.bar.mininterval = 0
    shown = []
    for _ in range(8):
        terminal.truncate(0)
        bar.add(1)
        bar.bar.refresh()
        shown.append("<" in terminal.getvalue())
    bar.close()
    assert shown == [False] * 4 + [True] * 4


def test_of_few_steps_the_last_one_has_a_time_left(start: Start) -> None:
    messages = start(io.StringIO())
    bar = Bar(2, "step", "step", warm_up=5)
    bar.add(1)
    bar.add(1)
    first, last = messages.getvalue().splitlines()
    assert not first.endswith(" left") and last.endswith(", 00:00 left")


def test_what_libraries_say_goes_into_a_file_and_our_own_words_do_not(
    start: Start,
) -> None:
    messages = start(io.StringIO())
    early, late = logging.getLogger("a.library"), logging.getLogger("another.library")
    early.addHandler(logging.StreamHandler())
    file = io.StringIO()
    with libraries_into(file):
        late.addHandler(logging.StreamHandler())
        for logger in (early, late):
            logger.warning("said by %s", logger.name)
        print("printed")
        print("warned", file=sys.stderr)  # as Python shows warnings
        announce("ours")
        Bar(1, "step", "step").add(1)
    kept = file.getvalue()
    for text in ("said by a.library", "said by another.library", "printed", "warned"):
        assert kept.count(text) == 1
    own = messages.getvalue().splitlines()
    assert own[0] == "ours" and own[1].startswith("step 1 of 1") and len(own) == 2
    file.close()
    early.warning("after")
    late.warning("after")
    assert messages.getvalue().splitlines()[2:] == ["after", "after"]
    early.handlers.clear()
    late.handlers.clear()


def test_libraries_whose_stream_was_closed_are_logged_all_the_same() -> None:
    """A notebook, or a test, gives each cell a stderr of its own."""
    closed, file = io.StringIO(), io.StringIO()
    logger = logging.getLogger("lightning")
    handler = logging.StreamHandler(closed)
    closed.close()
    logger.addHandler(handler)
    try:
        with libraries_into(file):
            logger.warning("a tip")
        assert handler.stream is closed
    finally:
        logger.removeHandler(handler)
    assert "a tip\n" in file.getvalue()
