"""Labels added to a trained run, by the rules of its own features.

The run is read in `trained_run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, Notes, short, some
from state_esm_features.embedding import features_file
from state_esm_features.embedding.compare import Compared
from state_esm_features.embedding.embed import choose_recipe
from state_esm_features.embedding.fasta import Recipe
from state_esm_features.embedding.features import resolve_labels
from state_esm_features.embedding.labels import Labels
from state_esm_features.embedding.report import summary
from state_esm_features.embedding.scale import scaling_from
from state_esm_features.embedding.tables import part_of
from state_esm_features.embedding.vectors import Resolved, identical, note_identical
from state_esm_features.files import run_lock, staged
from state_esm_features.option_groups import FeatureOptions, PolicyOptions, alias_pair
from state_esm_features.training import undo
from state_esm_features.training.trained_run import TrainedRun, aliases_of_user

if TYPE_CHECKING:
    import torch


def check_same_model(
    resolved: Resolved,
    run: TrainedRun,
    manifest: Mapping[str, Any],
    options: FeatureOptions,
    notes: Notes,
) -> None:
    """Refuse vectors that are not of the kind that the run was trained on.

    Raises
    ------
    InputError
        Another width, table, model, or way of computing.
    """
    check_same_policy(run, manifest, options.policy)
    width = resolved.width
    if any(resolved.used) and width != manifest["width"]:
        raise InputError(
            f"{run.named} was trained on vectors of {manifest['width']:,} values, these have "
            f"{width or 0:,}; name the table or --esm-model that its features were made with"
        )
    of_run = [s for s in manifest["sources"] if s["kind"] == "table"]
    for table in resolved.tables:
        sha256 = table.sha256
        if sha256 not in {t["sha256"] for t in of_run}:
            of = some(f"{t['path']}, sha256 {t['sha256'][:12]}..." for t in of_run) or "no table"
            raise InputError(
                f"{table.path} (sha256 {sha256[:12]}...) is not what the features of "
                f"{run.named} were made of ({of}): vectors of another model would mean "
                "nothing to it. Give that file with --esm-embeddings"
            )
        parts = [part_of(t) for t in of_run if t["sha256"] == sha256]
        if part_of(table.part) not in parts:
            raise InputError(
                f"{run.named} was trained on {some(parts)} of {table.path}, not on "
                f"{part_of(table.part)}; leave --layer and --table-key out"
            )
    if resolved.checkpoint is not None:
        recipe = choose_recipe(resolved.checkpoint, options.sequences)
        require_recipe_of(run, manifest, recipe, options.sequences.esm_model, notes)


def check_same_policy(run: TrainedRun, manifest: Mapping[str, Any], policy: PolicyOptions) -> None:
    """Refuse vectors that are not made of their genes' as those of a run."""
    combine = manifest["policy"]["combine"]
    if policy.combine != combine:
        raise InputError(
            f"{run.named} was trained on combinations by --combine {combine}; leave the option out"
        )
    scale = manifest["policy"].get("scale", "none")
    if policy.scale != scale:
        raise InputError(
            f"{run.named} was trained on vectors of --scale {scale}; leave the option out"
        )


def require_recipe_of(
    run: TrainedRun, manifest: Mapping[str, Any], recipe: Recipe, model: str, notes: Notes
) -> None:
    """Refuse vectors that are not computed as those of a run; note where nothing tells how."""
    computed = [s for s in manifest["sources"] if "weights_sha256" in s]
    if not computed:
        path = next(s["path"] for s in manifest["sources"] if s["kind"] == "table")
        notes.warn(
            f"nothing tells whether {path} was computed with {model}: the new vectors are "
            "comparable only if it was"
        )
        return
    wanted = asdict(recipe)
    encoder = wanted.pop("encoder")
    recipes = [{k: s[k] for k in wanted} for s in computed]
    if wanted not in recipes:
        old = recipes[0]
        changed = [f"{k} {short(old[k])} -> {short(v)}" for k, v in wanted.items() if old[k] != v]
        raise InputError(
            f"the features of {run.named} were computed otherwise ({'; '.join(changed)}): "
            "vectors of another model would mean nothing to it. Leave the options of the model out"
        )
    if encoder not in {s.get("encoder") for s in computed}:
        notes.warn(
            f"the features of {run.named} were computed by an earlier version; the new ones may "
            "differ from these by up to 1e-4"
        )


def resolve_for_run(
    run: TrainedRun,
    known: Mapping[str, torch.Tensor],
    labels: Labels,
    options: FeatureOptions,
    notes: Notes,
) -> tuple[Resolved | None, dict[str, torch.Tensor]]:
    """The labels that a run does not know, and {label: vector} by the rules of its own features.

    `known` are the vectors of these features; `labels` are left with the new names only.
    """
    manifest = run.manifest()
    new = [x for x in labels.names if x not in known]
    if not new:
        return None, {}
    labels.names = dict.fromkeys(new)
    remembered = {alias_pair(text) for text in aliases_of_user(manifest)}
    resolved = resolve_labels(labels, options, notes, remembered=remembered)
    assert resolved is not None  # only a dry run has no source
    check_same_model(resolved, run, manifest, options, notes)
    if manifest.get("scaling"):
        standard = options.policy.scale == "standard"
        resolved = replace(resolved, kept_scaling=scaling_from(manifest["scaling"], standard))
    genes = {
        record["gene"]: known[label].float()
        for label, record in manifest["labels"].items()
        if "gene" in record
    }
    # the mean of --missing mean is over the run's genes and the new ones
    of_genes = resolved.vectors()
    vectors = resolved.combined(genes | of_genes, manifest["width"])
    vectors.pop(run.control, None)
    others = {x: v for x, v in known.items() if x not in {run.control, *manifest["missing"]}}
    note_identical(others | resolved.own(vectors), notes, new)
    notes.line(summary(resolved, Compared(resolved, vectors, of_genes)))
    return resolved, vectors


def add_to_run(
    run: TrainedRun,
    vectors: Mapping[str, torch.Tensor],
    resolved: Resolved | None,
    command: Sequence[str],
    notes: Notes,
) -> list[str]:
    """Extend a run's features and its map by what they do not hold now; returns these labels.

    What is known stays bit for bit, and the old files are kept for --undo. The features of the run
    come first, then its map, so that a run that was cut off in between is mended by the next call.
    """
    import torch

    with run_lock(run.folder, "adding labels to", undo.WAIT_SECONDS):
        features, in_map = run.vectors(run.features), run.vectors(run.map_path)
        known = run.known(in_map, features)
        new = {label: vector for label, vector in vectors.items() if label not in features}
        features |= new
        missing = {label: v for label, v in features.items() if label not in known}
        if not missing:
            return []
        undo.keep_state(run)
        with staged(run.map_path, lambda f: torch.save({**in_map, **missing}, f)):
            if new and resolved:
                before = run.manifest()
                described = features_file.build_manifest(resolved, features, command, "")
                extended = partial(extended_manifest, before, described, list(new), features)
                features_file.write_features(run.features, features, extended, notes)
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
        "trained_features_sha256": features_file.trained_sha256(before),
        "sources": sources,
        "labels": labels,
        "missing": missing,
        "identical": identical(own),
        "added": [*before.get("added", []), {**about, "labels": list(new)}],
    }
