"""Files as wholes: written beside the old one and renamed, hashed, locked, loaded without pickle.

What stands in them is not known here.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from state_esm_features.console import InputError, announce, first_line, out_of_memory


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Hex sha256 of a folder's files: over their sorted names and contents."""
    listed = (f"{path.name}\0{sha256_of(path)}\n" for path in sorted(paths))
    return hashlib.sha256("".join(listed).encode()).hexdigest()


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cannot_write(path: Path, cause: OSError) -> InputError:
    """The error of a file that could not be written."""
    advice = "Free some space there, or choose" if cause.errno in DISK_FULL else "Choose"
    return InputError(
        f"cannot write {path}: {cause.strerror}; nothing was changed. {advice} another place for it"
    )


@contextlib.contextmanager
def staged(path: Path, write: Callable[[Any], Any]) -> Iterator[Path]:
    """Write a temporary file in the folder of `path`; it takes that name when the block ends.

    Parameters
    ----------
    path
        Where the file shall be; what is there stays untouched until the block ends well.
    write
        Called with the open binary file, which is synced to disk afterwards.

    Yields
    ------
    temporary
        The complete new file.

    Raises
    ------
    InputError
        The folder cannot be written, or the disk is full.
    """
    temporary = None
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as f:
            temporary = Path(f.name)
            write(f)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only the owner can read
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        # torch's zip writer hides what stopped it, a full disk or Ctrl-C, behind a RuntimeError
        cause = error
        while isinstance(cause, RuntimeError) and cause.__context__ is not None:
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise cause  # noqa: B904
        raise cannot_write(path, cause) from cause


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file whole or not at all; see `staged`."""
    with staged(path, write):
        pass


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all."""
    write_whole(path, lambda f: f.write(text.encode()))


def as_json(content: Mapping[str, Any]) -> bytes:
    """JSON text, keys in the order given."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, lambda f: f.write(as_json(content)))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is none to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def now() -> str:
    """This moment, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def lock_path(run_dir: Path) -> Path:
    """Beside the run, which --overwrite moves."""
    return run_dir.with_name(f".{run_dir.name}.lock")


@contextlib.contextmanager
def run_lock(
    run_dir: Path, does: str = "training", seconds: float = 0, advice: str = "let it finish"
) -> Iterator[None]:
    """Hold the run; the system lets go of it when this process ends, however it ends.

    Parameters
    ----------
    does
        What for, as another process that wants the run is told.
    seconds
        How long to wait for it.
    advice
        What to do if it is held.

    Raises
    ------
    Busy
        Another process holds it.
    """
    from filelock import FileLock, Timeout

    holder = {"pid": os.getpid(), "host": platform.node(), "since": now(), "does": does}

    def sign(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, as_json(holder), 0)

    path = lock_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, on_acquired=sign)
    try:
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            if seconds:
                busy = Busy(run_dir, read_json(path), advice)
                announce(f"waiting for at most {seconds:g} s: {busy}")
            held = lock.acquire(timeout=seconds)
    except Timeout:
        raise Busy(run_dir, read_json(path), advice) from None
    with held:
        yield


class Busy(InputError):
    """Another process holds the run: EX_TEMPFAIL of sysexits.h, try again later."""

    code = 75

    def __init__(self, run_dir: Path, holder: Mapping[str, Any] | None, advice: str) -> None:
        who, does = "another process", "training"
        if holder:
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
            does = holder.get("does", does)
        super().__init__(f"{who} is {does} {run_dir}; {advice}")


def existing_file(path: str | Path, what: str) -> Path:
    """`path` if it is a file, else an error that says what was looked for and from where."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give the file itself")
    if path.exists() and not path.is_file():
        raise InputError(f"{what} {path} is a pipe or device; write it to a file first")
    if not path.is_file():
        where = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        if path.is_symlink():
            where = f": it is a link to {path.readlink()}, where nothing is"
        raise InputError(f"no such {what}: {path}{where}")
    return path


def begins_with(path: Path, start: bytes) -> bool:
    """Whether a file has these first bytes."""
    with path.open("rb") as f:
        return f.read(len(start)) == start


def fingerprint(names: Sequence[str]) -> dict[str, Any]:
    """Number and hash of names in their order."""
    return {"number": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def data_file_origin(path: Path) -> dict[str, Any]:
    """What the manifest keeps of a data file: hashing tens of gigabytes would cost minutes."""
    stat = path.stat()
    return {"path": str(path), "kind": "adata", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def cannot_read(path: Path, form: str, cause: Exception, longest: int | None = None) -> InputError:
    """The error of a file that is damaged, or too large for the memory there is.

    `longest` is how many signs of what a library says of it are shown.
    """
    if out_of_memory(cause):
        return InputError(
            f"out of memory: {path} has {path.stat().st_size:,} bytes; free memory, or use a "
            "machine with more"
        )
    said = first_line(cause)[:longest]
    return InputError(f"{path} cannot be read as {form}: damaged or cut short ({said})")


def read_torch(
    path: Path,
    advice: str = "Save it again as a plain {symbol: torch.Tensor} dict",
    allowed: Sequence[Any] = (),
    mapped: bool = True,
) -> Any:
    """torch.load that never executes pickled code, memory-mapped where the format allows it.

    Parameters
    ----------
    allowed
        Classes and functions beside tensors and plain values that the file may hold.
    mapped
        False for many small files: each mapping is one that the system counts.
    """
    import pickle
    import zipfile

    import torch

    try:
        mmap = mapped and zipfile.is_zipfile(path)
        with (
            warnings.catch_warnings(action="ignore"),  # of the pickle protocol; decided below
            torch.serialization.safe_globals(list(allowed)),
        ):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        objects = "pickled Python objects beside tensors"
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it is no file of torch.save, or it holds {objects}"
        if named:
            what = f"it holds {objects} ({named[1]})"
        raise InputError(
            f"{path} was refused without running it: {what}, and loading those can execute code. "
            f"{advice}"
        ) from error
    except Exception as error:  # damaged bytes raise all kinds
        raise cannot_read(path, "a file of torch.save", error) from error


def place_to_keep(path: Path) -> Path:
    """FILE.orig (.orig.1, ... if that exists)."""
    names = [path.name + ".orig", *(f"{path.name}.orig.{n}" for n in range(1, 1000))]
    return next(p for p in map(path.with_name, names) if not p.exists())


def link(source: Path, target: Path) -> None:
    """A second name of a file: a hard link, or a copy where links do not work."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:  # no hard links here (FAT, some network and Drive folders)
        shutil.copy2(source, target)


def keep(path: Path) -> Path:
    """Give a file that will be replaced a second name; returns it.

    A hard link, or a copy where links do not work: there is no moment without the file.
    """
    kept = place_to_keep(path)
    link(path, kept)
    return kept


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def available_memory() -> int:
    """Bytes of memory that can be had now, the limit of the container respected."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" means no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cache = re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        free = min(free, limit - used + int(cache[0]))  # the file cache gives way when needed
    return free


def git_state(folder: Path) -> str | None:
    """Commit of a folder under git, with -dirty for changed files; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def same_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a copy where links do not work."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    link(source, temporary)
    temporary.replace(target)
