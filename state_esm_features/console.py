"""What both commands say, and how they end: errors, exit codes, wording, log, progress, signals.

Nothing here knows of data or files. No other module of the package prints; what a part found is
returned, or noted in `Findings`.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO, TypeVar

T = TypeVar("T")

log = logging.getLogger("esm_pert_features")


class InputError(Exception):
    """Something the user can mend: ends the run in one message on stderr, without traceback."""

    code = 1


class UsageError(InputError):
    """Options that are none, or mean nothing together."""

    code = 2


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception: nothing on the way up mistakes it for a
    failure of its own."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signal.Signals(signum)

    def __str__(self) -> str:
        return "Ctrl-C" if self.signum == signal.SIGINT else self.signum.name

    @property
    def code(self) -> int:
        """130 for Ctrl-C, else 143, as of SIGTERM."""
        return 130 if self.signum == signal.SIGINT else 143


def shown(name: str) -> str:
    """A name as a message lists it: in quotes where a blank, or no sign at all, would be missed."""
    unseen = name != name.strip() or not name.isprintable() or re.search(r"\s[+|]|[+|]\s", name)
    return repr(name) if unseen or not name else name


def some(items: Iterable[object], limit: int = 5) -> str:
    """First items of a list for a message: 'A, B, C, D, E, ...'."""
    names = list(map(str, items))
    return ", ".join(map(shown, names[:limit])) + (", ..." if len(names) > limit else "")


def count(n: int, noun: str) -> str:
    """'1 label', '2,024 labels'."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def short(value: object) -> str:
    """A value as shown in a message: of a hash the first digits."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def have(n: int) -> str:
    """The verb after 'n of 3 labels'."""
    return "has" if n == 1 else "have"


def them(n: int) -> str:
    """The pronoun of n things that are acted on."""
    return "it" if n == 1 else "them"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean A, B?)' for the names nearest to `name`, or nothing."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f" (did you mean {some(by_lower[n] for n in near)}?)" if near else ""


def one_error(problems: Sequence[str]) -> InputError:
    """Fold every problem found into one error, so that they are mended in one go."""
    if len(problems) == 1:
        return InputError(problems[0])
    listed = [problem.replace("\n", "\n  ") for problem in problems]  # with lists of their own
    return InputError("\n  - ".join([f"{len(problems)} problems:", *listed]))


def with_remedies(problem: str, remedies: Sequence[str]) -> str:
    """A problem and what helps: one remedy behind it, of several each on a line of its own."""
    return (". " if len(remedies) == 1 else "\n  - ").join([problem, *remedies])


def warn(message: str) -> None:
    """Say at once, while work goes on, something that does not stop it."""
    log.warning("warning: %s", message)


def announce(message: str, quiet_too: bool = False) -> None:
    """Say at once, while work goes on, what it does: progress, downloads, waiting for a lock."""
    log.log(logging.WARNING if quiet_too else logging.INFO, "%s", message)


def start_log(quiet: bool) -> None:
    """Send messages to stderr; `quiet` keeps warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def _handlers_of_libraries() -> list[logging.StreamHandler[TextIO]]:
    """Those that write to a standard stream, of every logger but ours."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = [h for x in loggers if x is not log for h in getattr(x, "handlers", ())]
    return [h for h in found if type(h) is logging.StreamHandler]


@contextlib.contextmanager
def libraries_into(file: TextIO) -> Iterator[None]:
    """What libraries print, warn of and log goes into `file`; our own messages stay where they are.

    A library that is imported meanwhile takes `file` for stderr, and gets stderr back at the end.
    """
    before = {handler: handler.stream for handler in _handlers_of_libraries()}
    for handler in before:  # not by setStream, which fails where a notebook closed the old stream
        handler.stream = file
    stderr = sys.stderr
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        for handler in _handlers_of_libraries():
            if handler.stream is file:
                handler.stream = before.get(handler, stderr)


@contextlib.contextmanager
def on_signals(stop: Callable[[int, object], None], signals: Sequence[int]) -> Iterator[None]:
    """Call `stop` on these signals while the block runs (in the main thread, where they arrive)."""
    if threading.current_thread() is not threading.main_thread():
        signals = ()
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_asked: list[int] = []


def raise_stopped(signum: int, frame: object) -> None:
    """Signal handler: leave through every `finally`, so that half-written files are removed."""
    _asked.append(signum)
    raise Stopped(signum)


def raise_if_stopped() -> None:
    """Leave if a signal has asked for it: where the handler met a callback of C code or the end of
    an object, Python prints what it raised there, and goes on."""
    if _asked:
        raise Stopped(_asked[0])


def exit_code(
    step: Callable[[], int],
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
    notes: Notes | None = None,
) -> int:
    """Run `step`, say the last of its notes, and translate how it ended into the exit codes.

    Raises
    ------
    UsageError
        For the parser, which shows the usage.
    """
    try:
        try:
            with on_signals(raise_stopped, stop_signals):
                return step()
        finally:
            _asked.clear()
            if notes:
                notes.say()
    except UsageError:
        raise
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (KeyboardInterrupt, Stopped) as error:
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        traceback.clear_frames(error.__traceback__)  # ends progress bars, also those of libraries
        print(f"stopped by {stop}", file=sys.stderr)
        return stop.code


def called(step: Callable[[], T], notes: Notes) -> T:
    """Run `step` for a caller in Python, who gets what it returns, or what stopped it.

    Raises
    ------
    InputError
        With no more of a traceback than the call.
    KeyboardInterrupt
        Ctrl-C, also where a checkpoint was saved before.
    SystemExit
        Another signal: with the exit code of the commands.
    """
    try:
        return step()
    except InputError as error:
        # Python keeps the last error: what led to it would hold the memory of a model
        error.__cause__ = error.__context__ = None
        raise error.with_traceback(None) from None
    except Stopped as stop:
        traceback.clear_frames(stop.__traceback__)  # ends progress bars, also those of libraries
        if stop.signum == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(stop.code) from stop
    finally:
        _asked.clear()
        notes.say()


def out_of_memory(error: Exception) -> bool:
    """Whether this is Python's, CUDA's, MPS's, the CPU's, mmap's or oneDNN's lack of memory.

    oneDNN has no words of its own for it: it "could not create a primitive".
    """
    words = "out of memory|can(no|')t allocate memory|could not create a primitive"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


def first_line(error: BaseException) -> str:
    """First line of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what kill, cron and schedulers send; what SLURM's --signal=USR1 sends before the end."""


@dataclass
class Notes:
    """What parts found worth saying, in order; the scripts say it."""

    noted: list[tuple[int, str]] = field(default_factory=list)

    def line(self, text: str) -> None:
        """Left out with --quiet."""
        self.noted.append((logging.INFO, text))

    def always(self, text: str) -> None:
        """Said with --quiet too."""
        self.noted.append((logging.WARNING, text))

    def warn(self, text: str) -> None:
        """What does not stop the run."""
        self.always(f"warning: {text}")

    def say(self) -> None:
        """Say what was noted since the last time."""
        for level, text in self.noted:
            log.log(level, "%s", text)
        self.noted.clear()


@dataclass
class Findings(Notes):
    """Everything the preflight found; problems stop the run, all together."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Turn an InputError into one more problem and go on."""
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))

    def settle(self) -> None:
        """Say the warnings, and refuse to go on if there are problems.

        Raises
        ------
        InputError
            All of them, each once.
        """
        for message in self.warnings:
            self.warn(message)
        self.say()
        if self.problems:
            raise one_error(list(dict.fromkeys(self.problems)))


def line_due(moment: float, start: float, said: float) -> bool:
    """Whether progress is said again: in seconds, at 0, 5, 10, 20, 40, then twice as late, and
    from a minute on once a minute. A notebook or a log soon has something to show."""
    return moment - said >= min(60, max(5, said - start))


class Bar:
    """Progress where messages go: a bar on a terminal, else lines, as `line_due` says.

    Parameters
    ----------
    warm_up
        Units that may be slower than the rest: there is no time left before they are done.
    """

    WARMING_UP = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
    """tqdm's own form, without the time left."""

    def __init__(
        self,
        total: int,
        what: str,
        unit: str,
        initial: int = 0,
        scale: bool = False,
        warm_up: int = 0,
    ) -> None:
        from tqdm import tqdm

        streams = [getattr(handler, "stream", sys.stderr) for handler in log.handlers]
        quiet = True if not log.isEnabledFor(logging.INFO) else None  # None: where no terminal is
        self.bar = tqdm(
            total=total,
            initial=initial,
            desc=what,
            unit=unit,
            unit_scale=scale,
            disable=quiet,
            file=next((stream for stream in streams if not stream.closed), None),
            bar_format=self.WARMING_UP if warm_up else None,
        )
        self.what, self.unit, self.scale = what, unit, scale
        self.warm = initial + min(warm_up, total - initial)
        self.total, self.done, self.initial = total, initial, initial
        self.start, self.said = time.monotonic(), float("-inf")

    def add(self, n: int, notes: str = "") -> None:
        """`n` more units are done."""
        raise_if_stopped()
        self.done += n
        if self.done >= self.warm:
            self.bar.bar_format = None
        self.bar.set_postfix_str(notes, refresh=False)
        self.bar.update(n)
        moment = time.monotonic()
        due = line_due(moment, self.start, self.said) or self.done >= self.total
        if not self.bar.disable or not due:
            return
        self.said = moment
        rate = (self.done - self.initial) / max(moment - self.start, 1e-9)
        left = f", {self._time_left(rate)} left" if self.done >= self.warm else ""
        done, total = (
            self.bar.format_sizeof(x) if self.scale else f"{x:,}" for x in (self.done, self.total)
        )
        speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        speed = f"{self.bar.format_sizeof(rate)}B/s" if self.scale else f"{speed} {self.unit}s/s"
        notes = f"{notes}, " if notes else ""
        log.info("%s %s of %s, %s%s%s", self.what, done, total, notes, speed, left)

    def _time_left(self, rate: float) -> str:
        return self.bar.format_interval((self.total - self.done) / rate) if rate else "?"

    def close(self) -> None:
        self.bar.close()
