"""Processes that were started apart find each other, or say why not."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from state_esm_features.console import InputError, Stopped
from state_esm_features.training import rendezvous
from state_esm_features.training.rendezvous import (
    FirstRank,
    Follower,
    announced,
    answer_path,
    sign_path,
    wait_for_first,
)

HOST = platform.node()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, the same address at every start; each look and beat follows at once."""
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(rendezvous, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(rendezvous, "BEAT_SECONDS", 0.001)


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Begin work; returns what waits for its result, or for its InputError."""
    ended: list[object] = []

    def note() -> None:
        try:
            ended.append(work())
        except InputError as error:
            ended.append(error)

    thread = threading.Thread(target=note)
    thread.start()

    def result() -> object:
        thread.join()
        return ended[0]

    return result


def nothing_wrong() -> None:
    """The check of a rank that can train."""


def test_all_begin_once_every_rank_has_seen_what_was_prepared(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    seen: list[bool] = []
    others = [
        in_thread(lambda rank=rank: wait_for_first(run_dir, rank, lambda: seen.append(ready)))  # type: ignore[misc]
        for rank in (1, 2)
    ]
    ready = False
    with announced(run_dir, [1, 2]) as first:
        ready = True
        first.gather()
        followers = [other() for other in others]
        assert seen == [True, True]
        assert all(isinstance(follower, Follower) for follower in followers)
    assert list((tmp_path / "runs").iterdir()) == []


def test_alone_nothing_is_written(tmp_path: Path) -> None:
    with announced(tmp_path / "run", []) as first:
        first.gather()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such TOML"), 1, "no such TOML"),
        (Stopped(15), 143, "stopped by SIGTERM"),
        (Stopped(2), 130, "stopped by Ctrl-C"),
        (ValueError(), 1, "ValueError"),
    ],
)
def test_others_end_as_the_first_rank_did(
    tmp_path: Path, error: BaseException, code: int, said: str
) -> None:
    other = in_thread(lambda: wait_for_first(tmp_path / "run", 1, nothing_wrong))
    with pytest.raises(type(error)), announced(tmp_path / "run", [1]):
        while not answer_path(tmp_path / "run", 1).exists():
            pass  # so that the other one has looked before
        raise error
    refused = other()
    assert str(refused) == f"rank 1 on {HOST}: the first rank ended: {said}"
    assert getattr(refused, "code", None) == code
    assert json.loads(sign_path(tmp_path / "run").read_text())["state"] == "ended"
    assert not answer_path(tmp_path / "run", 1).exists()


def test_nothing_to_train_is_no_error(tmp_path: Path) -> None:
    other = in_thread(lambda: wait_for_first(tmp_path / "run", 1, nothing_wrong))
    with announced(tmp_path / "run", [1]):
        while not answer_path(tmp_path / "run", 1).exists():
            pass
    assert other() is None


def test_a_rank_that_cannot_train_stops_the_first(tmp_path: Path) -> None:
    def wrong() -> None:
        raise InputError("no data here")

    other = in_thread(lambda: wait_for_first(tmp_path / "run", 1, wrong))
    with (
        pytest.raises(InputError, match=f"rank 1 on {HOST} cannot train: no data here"),
        announced(tmp_path / "run", [1]) as first,
    ):
        first.gather()
    assert str(other()) == "no data here"
    assert not answer_path(tmp_path / "run", 1).exists()


def test_a_rank_that_does_not_come_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "GATHER_SECONDS", 0.05)
    first = FirstRank(tmp_path / "run", [1, 2])
    with pytest.raises(InputError) as error:
        first.gather()
    assert str(error.value) == (
        "rank 1, 2 did not come within 0 s: start the same command on every machine"
    )


def test_a_sign_of_an_earlier_start_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it trained, or refused, by the same command on the same address."""
    monkeypatch.setattr(rendezvous, "SILENCE_SECONDS", 0.05)
    for state, more, how in (
        ("training", {}, "training"),
        ("ended", {"code": 1, "error": "bad data"}, "bad data"),
    ):
        FirstRank(tmp_path / "run", [1]).say(state, **more)
        with pytest.raises(InputError) as error:
            wait_for_first(tmp_path / "run", 1, nothing_wrong)
        assert str(error.value) == (
            f"rank 1 on {HOST}: no sign of the first rank for 0.05 s in {tmp_path}/.run.launch. "
            "Either it was not started, with the same command, or --output-dir is no folder that "
            f"all machines share. What is there is of an earlier start, process {os.getpid()} on "
            f"{HOST}: {how}"
        )


def test_a_first_rank_that_falls_silent_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "SILENCE_SECONDS", 0.2)
    other = in_thread(lambda: wait_for_first(tmp_path / "run", 1, nothing_wrong))
    while not answer_path(tmp_path / "run", 1).exists():
        pass
    first = FirstRank(tmp_path / "run", [1])
    while not other_has_seen(first):
        pass
    assert str(other()) == (
        f"rank 1 on {HOST}: the first rank, process {os.getpid()} on {HOST}, has been silent for "
        "0.2 s"
    )


def other_has_seen(first: FirstRank) -> bool:
    """Five beats, as a rank looks at least twice in them."""
    first.say("preparing")
    return first.sign["beat"] >= 5


def test_who_comes_too_late_is_told(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "run", 1)
    first = FirstRank(tmp_path / "run", [1])
    first.say("training")
    follower.look()
    first.say("training")
    with pytest.raises(InputError) as error:
        follower.wait(nothing_wrong)
    assert str(error.value) == (
        f"rank 1 on {HOST} comes too late: process {os.getpid()} on {HOST} trains"
    )
    assert error.value.code == 75


def test_another_training_in_the_folder_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FirstRank(tmp_path / "run", [1])  # of another address
    monkeypatch.setenv("MASTER_PORT", "2")
    follower = Follower(tmp_path / "run", 1)
    for _ in range(3):
        first.say("preparing")
        follower.look()
    assert not follower.alive
