"""Vectors of finished proteins, kept between runs.

How they are computed is not known here.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import warn
from state_esm_features.option_groups import SequenceOptions

if TYPE_CHECKING:
    import torch


NETWORK_FILE_SYSTEMS = (
    *("afs", "beegfs", "ceph", "cifs", "fuse.", "glusterfs", "gpfs", "lustre", "nfs"),
    *("orangefs", "panfs", "smb"),
)
"""First letters of file systems on which SQLite's locks cannot be relied on."""


class Cache:
    """Vectors of finished proteins in a SQLite file, which several runs may use at once.

    A damaged file is set aside and begun anew, a damaged vector is computed again; a file that
    cannot be used (no space, no permission) costs a warning, not the run.

    Parameters
    ----------
    path
        The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.db: sqlite3.Connection | None = None
        if path is not None:
            self._run("SELECT 1 FROM vectors LIMIT 1")

    def get(self, key: bytes) -> torch.Tensor | None:
        """The vector of a key, float32 (width,), or None."""
        import torch

        for crc, blob in self._run("SELECT crc, vector FROM vectors WHERE key = ?", key):
            if zlib.crc32(blob) == crc:
                return torch.frombuffer(bytearray(blob), dtype=torch.float32)
            warn(f"cache {self.path}: a damaged vector is computed again")
        return None

    def put(self, key: bytes, vector: torch.Tensor) -> None:
        """Keep a vector; it is on disk when this returns."""
        blob = vector.numpy().tobytes()
        self._run("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", key, zlib.crc32(blob), blob)

    def close(self) -> None:
        """Fold the journal into the file."""
        if self.db is not None:
            self.db.close()
            self.db = None

    def _open(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=60, isolation_level=None)
        if network_file_system(path.parent) is None:
            db.execute("PRAGMA journal_mode = WAL")  # needs shared memory, so no network folder
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, crc INTEGER, vector BLOB)"
        )
        return db

    def _run(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        for _ in range(2):  # again after a damaged file was set aside
            if self.path is None:
                break
            try:
                self.db = self.db or self._open(self.path)
                return self.db.execute(statement, values).fetchall()
            except (sqlite3.OperationalError, OSError) as error:
                warn(f"cache {self.path} cannot be used ({error}): going on without it")
                self.path = None
            except sqlite3.DatabaseError as error:
                self._set_aside(self.path, error)
        return []

    def _set_aside(self, path: Path, error: sqlite3.DatabaseError) -> None:
        self.close()
        kept = path.with_name(path.name + ".damaged")
        try:
            path.replace(kept)
            for journal in ("-wal", "-shm"):
                path.with_name(path.name + journal).unlink(missing_ok=True)
        except OSError as failure:
            warn(f"cache {path} is damaged ({error}) and stays ({failure}): going on without it")
            self.path = None
            return
        warn(f"cache {path} is damaged ({error}): kept as {kept}, begun anew")


def network_file_system(path: Path) -> str | None:
    """Kind of the network or cloud file system that a folder is on, or None if it is local."""
    import psutil

    path = path.absolute()
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    kind = next((mounts[p] for p in (path, *path.parents) if p in mounts), "").lower()
    remote = kind.startswith(NETWORK_FILE_SYSTEMS) and kind != "fuse.fuse-overlayfs"
    return kind if remote else None


def open_cache(options: SequenceOptions) -> Cache:
    """The cache in --cache DIR, or in the user's cache folder, if that is on a local disk."""
    import platformdirs

    if options.no_cache:
        return Cache(None)
    folder = options.cache or platformdirs.user_cache_path("state-esm-features")
    kind = network_file_system(folder)
    if kind and options.cache:
        warn(
            f"--cache {folder} is on a network file system ({kind}), where SQLite is not safe when "
            "two runs use it at once; choose a folder on a local disk"
        )
    elif kind:
        local = Path(tempfile.gettempdir()) / f"state-esm-features-{os.getuid()}"
        warn(f"{folder} is on a network file system ({kind}): the cache is {local} instead")
        folder = local
    return Cache(folder / "esm2_vectors.sqlite")
