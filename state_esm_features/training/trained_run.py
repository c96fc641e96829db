"""What a run directory knows of its perturbations, and by which options they were made.

Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError
from state_esm_features.embedding.downloads import arc_table_path
from state_esm_features.embedding.features_file import read_manifest
from state_esm_features.files import existing_file, read_json, read_torch
from state_esm_features.option_groups import ARC_SHA256, FEATURES, alias_pair
from state_esm_features.options import names_of, read_table
from state_esm_features.training.stock import INFER_LOADS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainedRun:
    """What a run directory of train_with_esm_features.py knows of its perturbations.

    Attributes
    ----------
    named
        The folder as the user named it.
    map_path
        What `state tx infer` looks labels up in; a label that it lacks is predicted with the
        vector of the control.
    features
        The run's own features, from which stock writes the map anew when the run is resumed.
    control, pert_col
        As it was trained.
    started_in
        The working directory of its training.
    genes
        `fingerprint` of the genes of X that it was trained on; None if it reads an embedding.
    embed_key, input_width
        The matrix of obsm that it reads, or None for X; its columns, or None if nothing tells.
    cell_type
        The obs column by which `state tx infer` chooses control cells.
    batch
        The obs column of the batch that its model reads, or None if it reads none.
    """

    folder: Path
    named: Path
    control: str
    pert_col: str
    started_in: Path
    genes: Mapping[str, Any] | None
    embed_key: str | None
    input_width: int | None
    cell_type: str
    batch: str | None

    def file(self, path: str) -> str:
        """A file that its features were made of: seen from here, or from where it was started."""
        there = self.started_in / path
        return path if Path(path).exists() or not there.exists() else str(there)

    @property
    def map_path(self) -> Path:
        return self.folder / "pert_onehot_map.pt"

    @property
    def features(self) -> Path:
        return self.folder / "pert_features.pt"

    def vectors(self, path: Path) -> dict[str, torch.Tensor]:
        """{label: vector} of one of these files, in its order."""
        import numpy as np
        import torch

        existing_file(path, "file of the run")
        # cell-load names what it fills in with zeros by numpy's text, which is no code either
        text = (np.str_().__reduce__()[0], np.dtype, np.dtypes.StrDType)
        content = read_torch(path, allowed=text)
        if not (
            isinstance(content, dict) and content and all(map(torch.is_tensor, content.values()))
        ):
            raise InputError(f"{path} is no dict of label -> tensor")
        return {str(label): vector for label, vector in content.items()}

    def known(self, in_map: Mapping[str, torch.Tensor], own: Collection[str]) -> dict[str, Any]:
        """{label: vector} of the map, but for labels of no cell, to which cell-load gave zeros.

        `own` are the labels of the run's features, which lack those.
        """
        return {x: v for x, v in in_map.items() if x in own or x == self.control or v.any()}

    def manifest(self) -> dict[str, Any]:
        """Where its features come from.

        Raises
        ------
        InputError
            Nothing tells that, or they are no real features.
        """
        manifest = read_manifest(existing_file(self.features, "features of the run"))
        if manifest is None:
            raise InputError(
                f"nothing tells which table or model the vectors of {self.features} come from: it "
                "has no manifest of create_esm_pert_features.py. Train on a file that has one"
            )
        if manifest["ablation"]:
            raise InputError(
                f"{self.folder} was trained on an ablation ({manifest['ablation']['kind']}): a new "
                "gene has no vector there. Add genes to a run on real features"
            )
        return manifest


def open_run(folder: Path) -> TrainedRun:
    """The run in a folder.

    Raises
    ------
    InputError
        There is none, or its training has not begun.
    """
    if not folder.is_dir():
        raise InputError(f"--into-run {folder} is no folder (looked in {Path.cwd()})")
    record = read_json(folder / "run.json") or {}
    settings = record.get("identity", {}).get("settings", {})
    control, column = (settings.get(f"data.kwargs.{key}") for key in ("control_pert", "pert_col"))
    if not control or not column:
        raise InputError(f"{folder} is no run of train_with_esm_features.py: it has no run.json")
    model = str(settings.get("model.name"))
    if model.lower() not in INFER_LOADS:
        raise InputError(
            f"{folder} is a run of the model {model}, which state tx infer cannot load: no labels "
            "can be added to it. state tx predict predicts the cells that it held out"
        )
    started_in = Path(record["starts"][-1].get("folder", "."))
    reads_batch = settings.get("model.kwargs.batch_encoder")
    run = TrainedRun(
        *(folder.resolve(), folder, str(control), str(column), started_in),
        genes=record.get("genes"),
        embed_key=settings.get("data.kwargs.embed_key"),
        input_width=record.get("input_width"),
        cell_type=str(settings.get("data.kwargs.cell_type_key")),
        batch=str(settings.get("data.kwargs.batch_col")) if reads_batch else None,
    )
    if not run.map_path.is_file():
        raise InputError(f"{folder} has no {run.map_path.name}: its training has not begun")
    return run


def options_of_run(run: TrainedRun, given: Collection[str] = ()) -> dict[str, Any]:
    """{option: value} by which the run's own features were made.

    Files of options that are `given` otherwise need not be there.

    Raises
    ------
    InputError
        A file that they were made of is not there.
    """
    manifest = run.manifest()
    options = {name: value for name, value in manifest["policy"].items() if value is not None}
    options |= options_of_tables(run, manifest) | options_of_sequences(run, manifest)
    options |= {"alias": aliases_of_user(manifest)}
    for names in [*manifest["symbols"], *namers_of(manifest)]:
        if "path" in names:
            options[names["kind"]] = run.file(names["path"])
    for name in ("esm_embeddings", "fasta", "hgnc", "aliases"):
        paths = options.get(name, [])
        for path in paths if isinstance(paths, list) else [paths]:
            if name not in given and not Path(path).exists():
                raise InputError(
                    f"the features of {run.named} were made of {path}, which is not there (looked "
                    f"in {Path.cwd()}); say where it is with {names_of(FEATURES[name])[0]} FILE"
                )
    return read_table({k: v for k, v in options.items() if v != []}, FEATURES)


def options_of_tables(run: TrainedRun, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The tables, each once (one may have been named at several places), and what part of them."""
    places: dict[str, list[str]] = {}
    parts: dict[str, Any] = {}
    for source in manifest["sources"]:
        if source["kind"] == "table":
            places.setdefault(source["sha256"], []).append(run.file(source["path"]))
            parts |= {k: source[k] for k in ("layer", "table_key") if k in source}
    tables = []
    for sha256, paths in places.items():
        path = next((p for p in paths if Path(p).exists()), paths[0])
        if sha256 == ARC_SHA256 and not Path(path).exists():
            path = str(arc_table_path(dry_run=False, for_run=True))
        tables.append(path)
    return {"esm_embeddings": tables, **parts}


def options_of_sequences(run: TrainedRun, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The proteins, the model, and how it was used."""
    options: dict[str, Any] = {"fasta": []}
    for source in manifest["sources"]:
        if source["kind"] == "esm2":
            made = ("isoforms", "long", "layer", "precision")
            options |= {k: source[k] for k in made if source.get(k) is not None}
            model = run.file(source["model"])
            options["esm_model"] = model if Path(model).is_file() else source["model"]
            options["fasta"] += [run.file(f["path"]) for f in source["fasta"]]
    return options | {"fasta": list(dict.fromkeys(options["fasta"]))}


def namers_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What told the genes of the proteins in its tables."""
    return [namer for source in manifest["sources"] for namer in source.get("named_by", ())]


def aliases_of_user(manifest: Mapping[str, Any]) -> list[str]:
    """OLD=NEW of the aliases that the user gave: nothing else leads from name to gene, and those
    that named keys of a table.

    An addition may have read a name otherwise, for itself: the run's first reading stays.
    """
    aliases: dict[str, str] = {}
    for text in (pair for namer in namers_of(manifest) for pair in namer.get("pairs", ())):
        aliases.setdefault(*alias_pair(text))
    for label, record in manifest["labels"].items():
        for part in record.get("parts", [{"name": label, **record}]):
            if part["how"] == "alias" and "via" not in part:
                aliases.setdefault(part["name"], part["gene"])
    return [f"{old}={new}" for old, new in aliases.items()]
