"""What is downloaded once, by need: Arc's table, and the weights of ESM2.

Nothing is read of it here but its hash.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from state_esm_features.console import InputError, announce, first_line
from state_esm_features.files import existing_file, sha256_of
from state_esm_features.option_groups import (
    ARC_BYTES,
    ARC_FILE,
    ARC_REPOSITORY,
    ARC_SHA256,
    ESM2_URL,
    ESM2_WIDTHS,
)

HUB_SECONDS = 8
"""How long the Hugging Face hub may take to answer."""


def arc_table_path(dry_run: bool, for_run: bool = False) -> Path | None:
    """Arc's published table, from the Hugging Face cache or downloaded into it once.

    Parameters
    ----------
    for_run
        A run was trained on it: no other table can take its place.

    Returns
    -------
    path
        The file, its sha256 checked; None in a dry run that would have to download it.
    """
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = huggingface_hub.try_to_load_from_cache(ARC_REPOSITORY, ARC_FILE)
    if not isinstance(cached, str):
        verb = "would download" if dry_run else "downloading"
        announce(
            f"{verb} {ARC_FILE} of {ARC_REPOSITORY} ({ARC_BYTES / 1e6:.0f} MB) into "
            f"{HF_HUB_CACHE}. The repository is under the Arc Institute's non-commercial licence. "
            "--esm-embeddings FILE avoids the download",
            quiet_too=True,
        )
        if dry_run:
            return None
    path = Path(cached) if isinstance(cached, str) else _download_arc_table(for_run)
    found = sha256_of(path)
    if found != ARC_SHA256:
        use = "" if for_run else ", or pass it with --esm-embeddings to use it as it is"
        raise InputError(
            # resolved: without its link alone the cache would give the same file again
            f"{path.resolve()} has sha256 {found}, expected {ARC_SHA256}: the download is damaged, "
            f"or the table was replaced. Delete that file to download it again{use}"
        )
    return path


def _download_arc_table(for_run: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    instead = f"pass {'this' if for_run else 'a'} table with --esm-embeddings FILE"
    advice = f"Run again when it can be reached, or {instead}"
    try:
        require_hub()
        return Path(huggingface_hub.hf_hub_download(ARC_REPOSITORY, ARC_FILE))
    except (ConnectionError, errors.LocalEntryNotFoundError) as error:
        raise InputError(
            f"cannot download {ARC_FILE}: the Hugging Face hub cannot be reached. {advice}"
        ) from error
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as error:
        raise InputError(
            f"cannot download {ARC_FILE}: the Hugging Face hub has no such file in "
            f"{ARC_REPOSITORY}, or wants a login. P{instead[1:]}"
        ) from error
    except Exception as error:  # whatever the HTTP client under huggingface_hub raises
        raise InputError(
            f"cannot download {ARC_FILE}: {type(error).__name__}: {first_line(error)}. {advice}"
        ) from error


def require_hub() -> None:
    """Ask the hub for the table once: its client would try for minutes, with a line for each time.

    Raises
    ------
    ConnectionError
        No answer, for HF_HUB_ETAG_TIMEOUT seconds if that is set. What the answer is, is left to
        the download.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    by_user = "HF_HUB_ETAG_TIMEOUT" in os.environ
    url = huggingface_hub.hf_hub_url(ARC_REPOSITORY, ARC_FILE)
    try:
        huggingface_hub.get_hf_file_metadata(
            url, timeout=constants.HF_HUB_ETAG_TIMEOUT if by_user else HUB_SECONDS
        )
    except errors.HfHubHTTPError:
        pass
    except Exception as error:  # whatever the HTTP client under huggingface_hub raises
        raise ConnectionError(first_line(error)) from error


def weights_path(model: str, dry_run: bool) -> Path | None:
    """The checkpoint of a fair-esm model, downloaded once, or a local file.

    The address and the folder are fair-esm's own, so each finds what the other downloaded.

    Returns
    -------
    path
        The file; None in a dry run that would have to download it.
    """
    import torch

    if model not in ESM2_WIDTHS:
        if not Path(model).exists():
            raise InputError(
                f"--esm-model {model}: neither a file nor one of {', '.join(ESM2_WIDTHS)}"
            )
        return existing_file(model, "ESM2 checkpoint")
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{model}.pt"
    if not path.is_file() and dry_run:
        what = f"would download {model}.pt into {path.parent}; --esm-model FILE avoids it"
        announce(what, quiet_too=True)
        return None
    if not path.is_file():
        _download_weights(ESM2_URL.format(model), path)
    return path


def _download_weights(url: str, path: Path) -> None:
    """Download with torch.hub, as fair-esm does, and check that all of it came."""
    import http.client
    import urllib.request

    import torch

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as r:
            size = int(r.headers["Content-Length"])
        announce(
            f"downloading {path.name} ({size / 1e6:.0f} MB) into {path.parent}; --esm-model FILE "
            "avoids it",
            quiet_too=True,
        )
        torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        if part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes came")
        part.replace(path)
    except (OSError, http.client.HTTPException, TypeError, ValueError) as error:
        raise InputError(
            f"cannot download {url}: {first_line(error)}. Run again when it can be reached, or "
            "pass the file with --esm-model FILE"
        ) from error
    finally:
        part.unlink(missing_ok=True)
