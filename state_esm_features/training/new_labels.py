"""Labels added to a trained run, by the rules of its own features.

The run is read in `trained_run`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, count, log, short, some, warn
from state_esm_features.embedding.embed import choose_recipe
from state_esm_features.embedding.features import Resolved, resolve_labels
from state_esm_features.embedding.features_file import manifest_path, trained_sha256, write_features
from state_esm_features.embedding.labels import collect_labels
from state_esm_features.embedding.report import summary
from state_esm_features.embedding.vectors import (
    build_features,
    identical,
    read_vectors,
    warn_of_identical,
    with_vectors,
)
from state_esm_features.files import keep, run_lock, sha256_of, staged
from state_esm_features.h5ad import columns_of_all
from state_esm_features.options import DEFAULT_CONTROL
from state_esm_features.training.templates import check_template, check_templates, filled_in
from state_esm_features.training.trained_run import TrainedRun, open_run

if TYPE_CHECKING:
    import torch


WAIT_SECONDS = 60
"""How long to wait for another process that adds labels to the same run."""


def check_same_model(
    resolved: Resolved, manifest: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Refuse vectors that are not of the kind that the run was trained on.

    Raises
    ------
    InputError
        Another width, table, model, or way of computing.
    """
    combine = manifest["policy"]["combine"]
    if args.combine != combine:
        raise InputError(
            f"{args.into_run} was trained on combinations by --combine {combine}; leave the option "
            "out"
        )
    width = resolved.width(args)
    if any(resolved.used) and width != manifest["width"]:
        raise InputError(
            f"{args.into_run} was trained on vectors of {manifest['width']:,} values, these have "
            f"{width or 0:,}; name the table or --esm-model that its features were made with"
        )
    kept = manifest["sources"]
    tables = [s for s in kept if s["kind"] == "table"]
    for table in resolved.tables:
        sha256 = sha256_of(table.path)
        if sha256 not in {t["sha256"] for t in tables}:
            of = some(f"{t['path']}, sha256 {t['sha256'][:12]}..." for t in tables) or "no table"
            raise InputError(
                f"{table.path} (sha256 {sha256[:12]}...) is not what the features of "
                f"{args.into_run} were made of ({of}): vectors of another model would mean "
                "nothing to it. Give that file with --esm-embeddings"
            )
    if resolved.checkpoint is None:
        return
    recipe = asdict(choose_recipe(resolved.checkpoint, args))
    encoder = recipe.pop("encoder")
    computed = [s for s in kept if "weights_sha256" in s]
    recipes = [{k: s[k] for k in recipe} for s in computed]
    if recipes and recipe not in recipes:
        old = recipes[0]
        changed = [f"{k} {short(old[k])} -> {short(v)}" for k, v in recipe.items() if old[k] != v]
        raise InputError(
            f"the features of {args.into_run} were computed otherwise ({'; '.join(changed)}): "
            "vectors of another model would mean nothing to it. Leave the options of the model out"
        )
    if recipes and encoder not in {s.get("encoder") for s in computed}:
        warn(
            f"the features of {args.into_run} were computed by an earlier version; the new ones "
            "may differ from these by up to 1e-4"
        )
    if not recipes:
        warn(
            f"nothing tells whether {tables[0]['path']} was computed with {args.esm_model}: the "
            "new vectors are comparable only if it was"
        )


def add_to_run(args: argparse.Namespace) -> int:
    """Give a run the vectors of labels that it does not know, by the rules of its own features.

    What is known stays bit for bit. The features of the run come first, then its map, so that a
    run that was cut off in between is mended by the next call.
    """
    run = open_run(args.into_run)
    if args.control_pert not in (DEFAULT_CONTROL, run.control):
        raise InputError(
            f"--control-pert {args.control_pert}: the run's control is {run.control}; give the "
            "control cells that label"
        )
    args.control_pert = run.control
    if args.pert_col is None and run.pert_col in columns_of_all(args.adata):
        args.pert_col = run.pert_col
    labels = collect_labels(args)
    if args.dry_run:
        return check_template(run, labels, args)
    manifest = run.manifest()
    known = run.vectors(run.features)
    found, resolved = dict[str, Any](), None
    wanted = list(labels.names)
    new = [x for x in wanted if x not in known]
    if new:
        labels.names = dict.fromkeys(new)
        resolved = resolve_labels(labels, args)
        assert resolved is not None  # only a dry run has no source
        check_same_model(resolved, manifest, args)
        found = new_vectors(resolved, run, manifest, args)
        others = {x: v for x, v in known.items() if x not in {run.control, *manifest["missing"]}}
        warn_of_identical(others | with_vectors(resolved.resolutions, found), new)
        log.info("%s", summary(resolved.resolutions, labels, resolved.resolver, args, found))
    with run_lock(run.folder, "adding labels to", WAIT_SECONDS):
        added = write_into_run(run, found, resolved, args)
    for text in itertools.chain(*check_templates(run, args)):
        warn(text)
    for text in itertools.chain(*filled_in(run, wanted, known, args)):
        warn(text)
    if added:
        log.info("added     %s to %s: %s", count(len(added), "label"), args.into_run, some(added))
    else:
        log.info("up to date: %s knows all of these labels", args.into_run)
    print(run.map_path)
    return 0


def new_vectors(
    resolved: Resolved, run: TrainedRun, manifest: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """{new label: vector}; the mean of --missing mean is over the run's genes and the new ones."""
    there = run.vectors(run.features)
    known = {
        record["gene"]: there[label].float()
        for label, record in manifest["labels"].items()
        if "gene" in record
    }
    sources = resolved.resolver.sources
    found = read_vectors(resolved.used, sources, resolved.checkpoint, args, for_run=True)
    vectors = known | found
    features = build_features(resolved.resolutions, vectors, manifest["width"], args)
    return {label: vector for label, vector in features.items() if label != run.control}


def write_into_run(
    run: TrainedRun,
    found: Mapping[str, torch.Tensor],
    resolved: Resolved | None,
    args: argparse.Namespace,
) -> list[str]:
    """Extend the run's features and its map by what they do not hold now; returns these labels."""
    import torch

    features, in_map = run.vectors(run.features), run.vectors(run.map_path)
    known = run.known(in_map, features)
    new = {label: vector for label, vector in found.items() if label not in features}
    features |= new
    missing = {label: v for label, v in features.items() if label not in known}
    if not missing:
        return []
    with staged(run.map_path, lambda f: torch.save({**in_map, **missing}, f)):
        log.info("the map of before is kept as %s", keep(run.map_path))
        if new and resolved:
            before, described = run.manifest(), resolved.manifest(features, "", args, args.command)
            keep(run.features)
            keep(manifest_path(run.features))
            write_features(
                run.features,
                features,
                lambda sha256: extended_manifest(before, described, list(new), features, sha256),
            )
    return list(missing)


def extended_manifest(
    before: Mapping[str, Any],
    described: Mapping[str, Any],
    new: Sequence[str],
    features: Mapping[str, torch.Tensor],
    features_sha256: str,
) -> dict[str, Any]:
    """The manifest of a run's features with new labels: where these come from goes with them.

    `trained_features_sha256` stays that of the file that the run was trained on.
    """
    sources = list(before["sources"])
    sources += [s for s in described["sources"] if s not in sources]
    place = [sources.index(s) for s in described["sources"]]

    def moved(record: Mapping[str, Any]) -> dict[str, Any]:
        parts = {"parts": list(map(moved, record["parts"]))} if "parts" in record else {}
        source = {"source": place[record["source"]]} if "source" in record else {}
        return {**record, **parts, **source}

    labels = before["labels"] | {x: moved(described["labels"][x]) for x in new}
    missing = before["missing"] | {x: r for x, r in described["missing"].items() if x in new}
    filled = {x for x, r in labels.items() if x in missing or r["how"] == "control"}
    own = {x: v for x, v in features.items() if x not in filled}
    about = {k: described[k] for k in ("command", "versions", "inputs", "symbols", "policy")}
    return {
        **before,
        "features_sha256": features_sha256,
        "trained_features_sha256": trained_sha256(before),
        "sources": sources,
        "labels": labels,
        "missing": missing,
        "identical": identical(own),
        "added": [*before.get("added", []), {**about, "labels": list(new)}],
    }
