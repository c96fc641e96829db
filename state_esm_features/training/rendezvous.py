"""How the processes of a training find each other that srun, torchrun or a hand on every machine
started: through small files beside the run, on the folder that all machines share.

The first rank writes .NAME.launch: its state, and a beat that counts on while it prepares the run.
Every other rank waits for it, looks at what was prepared, and answers in .NAME.launch.RANK. What is
trained is not known here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from state_esm_features.console import InputError, Stopped, announce, some, warn
from state_esm_features.files import read_json, write_json
from state_esm_features.training.launch import launch_id

SILENCE_SECONDS = 60.0
"""Without a beat of the first rank for so long another one gives up."""

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.2

GATHER_SECONDS = 3600.0
"""How long the first rank waits for the others."""

SAY_SECONDS = 60.0
"""From one 'waiting' to the next."""

GRACE_SECONDS = 5.0
"""In which a process that a signal asks to end does so itself, if it can."""


def sign_path(run_dir: Path) -> Path:
    """Beside the run, which --overwrite moves."""
    return run_dir.with_name(f".{run_dir.name}.launch")


def answer_path(run_dir: Path, rank: int) -> Path:
    return run_dir.with_name(f".{run_dir.name}.launch.{rank}")


class FirstRank:
    """What the first rank lets the others know.

    Parameters
    ----------
    others
        Ranks that neither it nor Lightning starts; with none nothing is written.
    """

    def __init__(self, run_dir: Path, others: Sequence[int]) -> None:
        self.run_dir, self.others = run_dir, others
        self.sign: dict[str, Any] = {
            "start": uuid.uuid4().hex,
            "launch": launch_id(),
            "host": platform.node(),
            "pid": os.getpid(),
            "beat": 0,
        }
        self.lock, self.quiet = threading.Lock(), threading.Event()

    def say(self, state: str, **more: object) -> None:
        """preparing, ready (run.json is there), training, ended (with code and error)."""
        if not self.others:
            return
        with self.lock:
            self.sign |= {"state": state, "beat": self.sign["beat"] + 1, **more}
            write_json(sign_path(self.run_dir), self.sign)

    def beat(self) -> None:
        """Until the training begins; a beat that cannot be written is left out."""
        while not self.quiet.wait(BEAT_SECONDS):
            with contextlib.suppress(InputError):
                self.say(self.sign["state"])

    def gather(self) -> None:
        """Wait until every other rank has seen what was prepared, then let all of them train.

        Raises
        ------
        InputError
            One of them cannot train, or has not come.
        """
        self.say("ready")
        begun = said = time.monotonic()
        while absent := [rank for rank in self.others if not self.has_come(rank)]:
            moment = time.monotonic()
            advice = "start the same command on every machine"
            if moment - begun > GATHER_SECONDS:
                raise InputError(
                    f"rank {some(absent)} did not come within {GATHER_SECONDS:,.0f} s: {advice}"
                )
            if moment - said > (SAY_SECONDS if said > begun else SAY_SECONDS / 12):
                announce(f"waiting for rank {some(absent)}: {advice}")
                said = moment
            time.sleep(LOOK_SECONDS)
        self.quiet.set()
        self.say("training")

    def has_come(self, rank: int) -> bool:
        """Whether a rank has seen this start."""
        answer = read_json(answer_path(self.run_dir, rank)) or {}
        if answer.get("start") != self.sign["start"]:
            return False
        if answer["error"]:
            answer_path(self.run_dir, rank).unlink(missing_ok=True)
            raise InputError(f"rank {rank} on {answer['host']} cannot train: {answer['error']}")
        return True

    def trouble(self) -> str | None:
        """Why another rank does not come to train after all."""
        try:
            for rank in self.others:
                self.has_come(rank)
        except InputError as error:
            return str(error)
        return None

    def end(self, code: int, error: str | None) -> None:
        """Those who still wait end in the same way; after a training nobody does."""
        self.quiet.set()
        if self.sign.get("state") == "training" and not error:
            sign_path(self.run_dir).unlink(missing_ok=True)
        else:
            self.say("ended", code=code, error=error)


@contextlib.contextmanager
def announced(run_dir: Path, others: Sequence[int]) -> Iterator[FirstRank]:
    """Let ranks that were started elsewhere know that the first one works, and how it ended."""
    first = FirstRank(run_dir, others)
    first.say("preparing")
    if others:
        threading.Thread(target=first.beat, daemon=True, name="beat").start()
    try:
        yield first
    except BaseException as error:
        code = getattr(error, "code", 1)
        text = f"stopped by {error}" if isinstance(error, Stopped) else str(error)
        with contextlib.suppress(InputError):  # the first error is the one to see
            first.end(code if isinstance(code, int) else 1, text or type(error).__name__)
        raise
    first.end(0, None)


class Refused(InputError):
    """The first rank ended before the training; this one ends with the same code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def wait_for_first(run_dir: Path, rank: int, check: Callable[[], None]) -> Follower | None:
    """Wait for the first rank to prepare the run, and for all others to be there.

    Whether it lives is seen by its beat: clocks of two machines differ.

    Parameters
    ----------
    check
        Raises InputError where this process cannot train what was prepared.

    Returns
    -------
    follower
        None if there is nothing to train.

    Raises
    ------
    InputError
        No sign of it; or it has ended, refused or been killed; or this rank comes too late.
    """
    answer = answer_path(run_dir, rank)
    follower = Follower(run_dir, rank)
    try:
        return follower if follower.wait(check) else None
    finally:
        # not where the first rank still has to read it
        if not (read_json(answer) or {}).get("error"):
            answer.unlink(missing_ok=True)


class Follower:
    """Another rank, which waits for the first one."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir, self.rank = run_dir, rank
        self.found: dict[str, Any] | None = None
        """The sign at the first look: it may be of an earlier start."""
        self.sign: dict[str, Any] = {}
        self.alive = False
        self.answered: str | None = None
        self.last_beat = time.monotonic()

    def answer(self, error: str | None) -> None:
        """Also before there is anything to answer to: a folder in which this machine itself wrote
        something is looked at anew, and not taken from the cache of a network folder."""
        content = {"start": self.sign.get("start"), "error": error, "host": platform.node()}
        write_json(answer_path(self.run_dir, self.rank), content)

    def look(self) -> None:
        """Read the sign; it lives if it has changed since the first look."""
        sign = read_json(sign_path(self.run_dir)) or {}
        ours = bool(sign) and sign["launch"] == launch_id()
        if self.found is None:
            self.found = sign
        elif ours and sign != self.found and sign != self.sign:
            self.alive, self.last_beat = True, time.monotonic()
        self.sign = sign

    def wait(self, check: Callable[[], None]) -> bool:
        """Whether there is something to train, once all ranks are there."""
        said = False
        self.answer(None)
        while True:
            self.look()
            state = self.sign.get("state") if self.alive else None
            if state == "ended":
                self.end_too()
                return False
            if state == "ready" and not self.answered:
                self.see(check)
            if state == "training":
                if self.answered != self.sign["start"]:
                    raise Refused(f"{self.who()} comes too late: {self.holder()} trains", 75)
                return True
            silent = time.monotonic() - self.last_beat
            if silent > SILENCE_SECONDS:
                raise InputError(self.silence())
            if silent > SILENCE_SECONDS / 12 and not (self.alive or said):
                announce(f"{self.who()} waits for the first rank to write {self.run_dir}")
                said = True
            time.sleep(LOOK_SECONDS)

    def see(self, check: Callable[[], None]) -> None:
        """Answer whether this process can train what was prepared."""
        try:
            check()
        except InputError as error:
            self.answer(str(error))
            raise
        self.answer(None)
        self.answered = self.sign["start"]

    def end_too(self) -> None:
        if self.sign["code"]:
            raise Refused(
                f"{self.who()}: the first rank ended: {self.sign['error']}", self.sign["code"]
            )
        announce(f"{self.who()}: nothing to train, the run is up to date")

    def trouble(self) -> str | None:
        """Why the first rank does not train after all."""
        sign = read_json(sign_path(self.run_dir)) or {}
        if sign.get("start") != self.answered or sign["state"] != "ended":
            return None
        return f"{self.who()}: the first rank ended: {sign['error']}"

    def end(self, code: int, error: str | None) -> None:
        """Let the first rank know why this one does not train."""
        self.answer(error)

    def who(self) -> str:
        return f"rank {self.rank} on {platform.node()}"

    def holder(self) -> str:
        return f"process {self.sign['pid']} on {self.sign['host']}"

    def silence(self) -> str:
        """Why this rank waits no longer."""
        seconds = f"{SILENCE_SECONDS:g} s"
        if self.alive:
            return f"{self.who()}: the first rank, {self.holder()}, has been silent for {seconds}"
        earlier = ""
        if self.sign:
            how = self.sign.get("error") or self.sign["state"]
            earlier = f". What is there is of an earlier start, {self.holder()}: {how}"
        return (
            f"{self.who()}: no sign of the first rank for {seconds} in {sign_path(self.run_dir)}. "
            "Either it was not started, with the same command, or --output-dir is no folder that "
            f"all machines share{earlier}"
        )


class Party(Protocol):
    """One of several ranks, the first or another."""

    def trouble(self) -> str | None: ...

    def end(self, code: int, error: str | None) -> None: ...


@contextlib.contextmanager
def connecting(connected: threading.Event, party: Party | None) -> Iterator[None]:
    """While the ranks connect, end with one that has ended, and on a signal.

    torch waits for the others for up to half an hour, and no signal handler of Python's runs
    meanwhile: a thread looks, and ends the process. Once they are connected, each notices the end
    of another one itself.
    """
    if party is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived, wakes = os.pipe()
    os.set_blocking(arrived, False)
    os.set_blocking(wakes, False)
    before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)

    def look() -> None:
        say_at = time.monotonic() + SAY_SECONDS
        while not connected.wait(LOOK_SECONDS):
            if time.monotonic() > say_at:
                announce(
                    "still connecting with the other ranks; if one of them has ended, stop this "
                    "one, and start again on every machine"
                )
                say_at = float("inf")
            code, why = 1, party.trouble()
            with contextlib.suppress(BlockingIOError):
                stop = Stopped(os.read(arrived, 1)[0])
                if connected.wait(GRACE_SECONDS):
                    return
                code, why = stop.code, f"stopped by {stop}"
            if why:
                with contextlib.suppress(InputError):
                    party.end(code, why)
                warn(f"{why}; the ranks were not connected yet")
                os._exit(code)

    thread = threading.Thread(target=look, daemon=True, name="connecting")
    thread.start()
    try:
        yield
    finally:
        connected.set()
        thread.join()
        signal.set_wakeup_fd(before)
        os.close(arrived)
        os.close(wakes)
