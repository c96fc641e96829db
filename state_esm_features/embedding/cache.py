"""Vectors of finished proteins, kept between runs.

How they are computed is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from state_esm_features.console import InputError, announce, count, warn
from state_esm_features.files import write_whole
from state_esm_features.option_groups import SequenceOptions

if TYPE_CHECKING:
    import torch


CHECKSUM_BYTES = hashlib.sha256().digest_size


class Cache:
    """Vectors of finished proteins, a file each, which several runs may use at once.

    A file is named by its key and holds the sha256 of the vector, then the vector. What is damaged
    is computed again; a folder that cannot be used (no space, no permission) costs a warning, not
    the run.

    Parameters
    ----------
    folder
        Where the files are; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, keys: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """{sequence: vector, float32 (width,)} of {sequence: key}, of those that are kept."""
        import torch

        vectors, damaged = {}, 0
        for sequence, key in keys.items():
            if self.folder is None:
                break
            try:
                content = (self.folder / key[:2] / key).read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                self._give_up(error)
                break
            checksum, values = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
            if hashlib.sha256(values).digest() == checksum:
                vectors[sequence] = torch.frombuffer(bytearray(values), dtype=torch.float32)
            else:
                damaged += 1
        if damaged:
            warn(f"cache {self.folder}: {count(damaged, 'damaged vector')} to compute again")
        return vectors

    def put(self, key: str, vector: torch.Tensor) -> None:
        """Keep a vector, float32 (width,); it is on disk when this returns."""
        if self.folder is None:
            return
        values = vector.numpy().tobytes()
        content = hashlib.sha256(values).digest() + values
        try:
            write_whole(self.folder / key[:2] / key, lambda f: f.write(content))
        except InputError as error:
            self._give_up(error.__cause__)

    def _give_up(self, error: BaseException | None) -> None:
        warn(f"cache {self.folder} cannot be used ({error}): going on without it")
        self.folder = None


def open_cache(options: SequenceOptions) -> Cache:
    """The cache in --cache DIR, or in the user's cache folder."""
    import platformdirs

    if options.no_cache:
        return Cache(None)
    folder = options.cache or platformdirs.user_cache_path("state-esm-features")
    old = folder / "esm2_vectors.sqlite"
    if old.is_file():
        announce(f"{old} is the cache of an earlier version: not used, and may be deleted")
    return Cache(folder)
