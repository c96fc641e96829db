"""Values of options as they are typed: each is read, or refused with the reason.

The options themselves stand in `option_groups`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def label_regex(text: str) -> re.Pattern[str]:
    """A pattern with the group `gene`."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if "gene" not in pattern.groupindex:
        raise argparse.ArgumentTypeError(f"{text!r} has no group (?P<gene>...)")
    return pattern


def alias_pair(text: str) -> tuple[str, str]:
    """OLD=NEW -> (OLD, NEW)."""
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"expected OLD=NEW, got {text!r}")
    return old, new


def run_name(text: str) -> str:
    """One folder name."""
    if text in ("", ".", "..") or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder; see --output-dir")
    return text


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def workers(text: str) -> int | str:
    """'auto' or a whole number, 0 included."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected auto or a number, got {text!r}")
    return int(text)


def device_name(text: str) -> str:
    """'auto', 'cpu', 'mps', 'cuda' (every GPU that is visible) or 'cuda:N' (one of them)."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:N or mps, got {text!r}")
    return text


FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
FILES: dict[str, Any] = {**FILE, "default": (), "action": "append"}
WHOLE: dict[str, Any] = {"type": int, "metavar": "N"}
NUMBER: dict[str, Any] = {"type": positive, "metavar": "N"}
