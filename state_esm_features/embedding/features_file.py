"""The features file and its manifest: both are written, or neither.

What the vectors mean is not known here.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from state_esm_features import __version__
from state_esm_features.console import InputError, Notes
from state_esm_features.embedding.resolve import Gene, Resolution, Source, how_resolved
from state_esm_features.embedding.vectors import Resolved, Vectors, identical
from state_esm_features.files import (
    as_json,
    begins_with,
    cannot_write,
    keep,
    place_to_keep,
    read_json,
    sha256_of,
    staged,
)
from state_esm_features.option_groups import OutputOptions

MANIFEST_FORMAT = 1


def manifest_path(features: Path) -> Path:
    """FILE.pt -> FILE.pt.json."""
    return features.with_name(features.name + ".json")


def read_manifest(features: Path) -> dict[str, Any] | None:
    """The manifest of a features file, or None if there is none or it is another file's."""
    manifest = read_json(manifest_path(features))
    if manifest is None or manifest.get("format") != MANIFEST_FORMAT:
        return None
    return manifest if manifest.get("features_sha256") == sha256_of(features) else None


def check_outputs(
    output: OutputOptions, inputs: Iterable[Path], tables: Iterable[Path] = ()
) -> None:
    """Refuse outputs that cannot be written, or would take the place of what is no such output, or
    would be read as a part of a table."""
    folders = {table.resolve(): table for table in tables if table.is_dir()}
    taken = {path.resolve(): "an input" for path in inputs}
    for option, path, start in (
        ("--output", output.output, b""),  # any file: `set_aside` keeps what is not ours
        ("--report", output.report, b"label\t"),
        ("--plot", output.plot, b"\x89PNG"),
    ):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file in it")
        place = path.resolve()
        if place.parent in folders:
            raise InputError(
                f"{option} {path} is in {folders[place.parent]}, which is a table itself: it would "
                "be read as a part of it. Give a place in another folder"
            )
        if place in taken:
            raise InputError(f"{option} {path} is {taken[place]}; give another name")
        if path.is_file() and path.stat().st_size and not begins_with(path, start):
            raise InputError(f"{option} {path} is there and of another kind; give another name")
        taken[place] = f"also the {option}"
        taken[manifest_path(place)] = f"the manifest of {option}"
        folder = next(p for p in place.parents if p.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise cannot_write(path, error) from error


def label_record(resolution: Resolution, sources: Sequence[Source], missing: str) -> dict[str, Any]:
    """What the manifest says of one label."""

    def fields(part: Gene) -> dict[str, Any]:
        if part.gene is None or part.source is None:
            return {}
        via = {"via": part.via} if part.via else {}
        origin = sources[part.source].origin(part.gene)
        return {"gene": part.gene, **via, "source": part.source, **origin}

    record: dict[str, Any] = {"how": how_resolved(resolution, missing)}
    if len(resolution.parts) == 1:
        return record | fields(resolution.parts[0])
    parts = [
        {"name": p.name, "how": missing if p.how == "missing" else p.how, **fields(p)}
        for p in resolution.parts
    ]
    return record | {"parts": parts}


def build_manifest(
    resolved: Resolved, features: Vectors, command: Sequence[str], features_sha256: str
) -> dict[str, Any]:
    """The manifest: the same for the same inputs, so it holds no time of day."""
    import torch

    labels, resolver, resolutions = resolved.labels, resolved.resolver, resolved.resolutions
    symbols, policy = resolved.options.symbols, resolved.options.policy
    left_out = {r.label: r.reason for r in resolved.left_out}
    return {
        "format": MANIFEST_FORMAT,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "create_esm_pert_features": __version__,
        },
        "command": command,
        "control": labels.control,
        "pert_col": labels.column,
        "width": len(features[labels.control]),
        "features_sha256": features_sha256,
        "inputs": labels.inputs,
        "sources": [source.record() for source in resolver.sources],
        "symbols": [names.origin for names in resolver.names_read],
        "policy": {
            "missing": policy.missing,
            "combine": policy.combine,
            "scale": policy.scale,
            "separator": symbols.separator,
            "label_regex": symbols.label_regex and symbols.label_regex.pattern,
            "prefer_previous": symbols.prefer_previous,
        },
        "scaling": resolved.scaling.record() if resolved.scaling else None,
        "ablation": resolved.ablation,
        "labels": {r.label: label_record(r, resolver.sources, policy.missing) for r in resolutions},
        "missing": {r.label: r.reason for r in resolutions if r.reason},
        "identical": identical(resolved.own(features)),
    } | ({"left_out": left_out} if left_out else {})


def set_aside(path: Path, notes: Notes, act: bool) -> None:
    """Keep a file that this script did not write; a dry run (`act` false) only notes it."""
    if not path.exists() or read_manifest(path) is not None:
        return
    kept = keep(path) if act else place_to_keep(path)
    verb = "is kept" if act else "would be kept"
    notes.always(f"{path} was not written by this script: it {verb} as {kept}")


def write_features(
    path: Path, features: Vectors, manifest: Callable[[str], dict[str, Any]], notes: Notes
) -> None:
    """Save the features and their manifest, made from their sha256: both, or neither.

    torch.save is given an open file, not a name: the bytes then do not depend on the name.
    """
    import torch

    with staged(path, lambda f: torch.save(dict(features), f)) as new:
        described = as_json(manifest(sha256_of(new)))
        with staged(manifest_path(path), lambda f: f.write(described)):
            set_aside(path, notes, act=True)


def trained_sha256(manifest: Mapping[str, Any]) -> str:
    """sha256 of the features that a run was trained on, before labels were added to its own."""
    return str(manifest.get("trained_features_sha256", manifest["features_sha256"]))
