"""The configuration of State's own training: composed, and read as State reads it.

Data and features are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from state_esm_features.console import InputError, did_you_mean, some
from state_esm_features.training_options import CONSECUTIVE, SPACES

INFER_LOADS = ("state", "neuralot", "pertsets")
"""model.name of the models that `state tx infer` loads: it knows one class of State 0.11.1."""

MANAGED = {
    "data.kwargs.toml_config_path": "--config",
    "data.kwargs.perturbation_features_file": "--pert-features",
    "output_dir": "--output-dir",
    "name": "--name",
    "overwrite": "--overwrite",
    CONSECUTIVE: "--fast-loading sorted",
}
"""Stock settings that this script decides; the option to use instead of an override."""


def quoted(value: Any) -> str:
    """A value in Hydra's override grammar, quoted only where it must be."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(quoted, value)) + "]"
    if not isinstance(value, (str, Path)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    text = str(value)
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # else OmegaConf would interpolate
    word = re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_/.\-]*", text)
    if word and text.lower() not in {"null", "true", "false", "nan", "inf"}:
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)\Z", r"\1\1", text)) + "'"


def overrides_of(settings: Mapping[str, Any], typed: Sequence[str] = ()) -> list[str]:
    """Hydra overrides: our settings, then what the user typed; a key typed is the user's."""
    keys = typed_settings(typed)
    # random_seed is a parameter of the data module, but not a key of its stock configuration
    added = {"data.kwargs.random_seed": "++"}
    ours = [f"{added.get(k, '')}{k}={quoted(v)}" for k, v in settings.items() if k not in keys]
    return [*ours, *typed]


def typed_settings(typed: Sequence[str]) -> dict[str, Any]:
    """{key: value} of the Hydra overrides on the command line.

    Raises
    ------
    InputError
        Not an override, or one that this script decides.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = {}
    for text in typed:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise InputError(
                f"{text!r} is neither an option nor a Hydra override such as training.lr=0.0001"
            ) from error
        key = override.key_or_group
        if key in MANAGED:
            raise InputError(f"{text!r}: use {MANAGED[key]} instead of this override")
        found[key] = override.value()
    return found


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The stock configuration of `state tx train` with overrides, resolved.

    Raises
    ------
    InputError
        Hydra refuses an override (unknown key, unknown model).
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_module("state.configs", version_base=None):
            cfg = hydra.compose("config", overrides=list(overrides))
        return OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reasons = [*str(error.__cause__ or "").splitlines(), *str(error).splitlines()]
        model = re.search(r"'model/([^']+)'", str(error))
        if model:
            reasons = [f"no model {model[1]!r}; models: {', '.join(stock_models())}"]
        elif unknown := re.match(r"Could not override '([^']+)'", str(error)):
            others = [text for text in overrides if unknown[1] not in typed_settings([text])]
            reasons = [f"no setting {unknown[1]!r}{setting_meant(unknown[1], compose(others))}"]
        raise InputError(f"the stock configuration of state says: {reasons[0]}") from error


def setting_meant(key: str, configuration: Mapping[str, Any]) -> str:
    """' (did you mean ...?)': settings of that name elsewhere, else those named alike there."""
    known = flat(configuration)
    group, _, name = key.rpartition(".")
    same = [setting for setting in known if setting.rpartition(".")[2] == name]
    names = [k.removeprefix(f"{group}.") for k in known if k.startswith(f"{group}.")]
    return f" (did you mean {some(same)}?)" if same else did_you_mean(name, names)


def stock_models() -> list[str]:
    """Names of the model configurations that the installed `state` package has."""
    import importlib.resources

    folder = importlib.resources.files("state.configs") / "model"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if "yaml" in f.name)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a.b.c': value} of a nested configuration."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def set_length(stock: Mapping[str, Any]) -> int | None:
    """Cells in a set, where run_tx_train looks for it (state/_cli/_tx/_train.py); None where it
    finds no number, as with embedsum of State 0.11.1."""
    model, kwargs = stock["model"], stock["model"]["kwargs"]
    backbone = kwargs.get("transformer_backbone_kwargs") or {}
    if "cell_set_len" in model:
        length = model["cell_set_len"]
    elif wants_cell_type_map(stock):
        length = max(1, kwargs.get("cell_sentence_len", 1))
    else:
        length = backbone.get("n_positions", backbone.get("max_position_embeddings"))
    return length if isinstance(length, int) and length > 0 else None


def wants_cell_type_map(stock: Mapping[str, Any]) -> bool:
    """Models that run_tx_train tells how many cell types, perturbations and batches there are."""
    name = stock["model"]["name"].lower()
    return name in ("cpa", "scvi") or name.startswith("scgpt")


def counts_read(kwargs: Mapping[str, Any]) -> str | None:
    """Where cell-load takes the genes that State learns to decode from an embedding
    (PerturbationDataModule.store_raw_expression), or None."""
    embed, space = kwargs["embed_key"], kwargs["output_space"]
    if not embed or space == "embedding" or (space == "gene" and embed == "X_hvg"):
        return None
    return "X" if space == "all" else "obsm/X_hvg"


def input_matrix(kwargs: Mapping[str, Any]) -> str:
    """What the model is fed: X, or a matrix of obsm."""
    return f"obsm/{kwargs['embed_key']}" if kwargs["embed_key"] else "X"


def matrices_read(kwargs: Mapping[str, Any]) -> list[str]:
    """Matrices whose rows PerturbationDataset reads; of X and obsm/X_hvg always the shape."""
    space = kwargs["output_space"]
    names = {input_matrix(kwargs), counts_read(kwargs)}
    if kwargs.get("store_raw_basal") and space != "embedding":
        names.add("X" if space == "all" else "obsm/X_hvg")
    return sorted(name for name in names if name)


def devices_of(stock: Mapping[str, Any]) -> int:
    """Processes that train together on a machine: training.devices as Lightning reads it."""
    return count_devices(stock["training"].get("devices", 1))


def count_devices(devices: Any) -> int:
    """A number, a list, "0,1", "auto" or -1, as Lightning's Trainer takes it."""
    if devices in ("auto", -1, "-1"):
        import torch

        return max(1, torch.cuda.device_count())
    if isinstance(devices, str):
        devices = [d for d in devices.split(",") if d] if "," in devices else int(devices)
    return len(devices) if isinstance(devices, list) else int(devices)


def require_trainable(stock: Mapping[str, Any]) -> None:
    """What the options check themselves, an override may hold; State knows one data module."""
    for key in ("max_steps", "batch_size", "val_freq", "ckpt_every_n_steps"):
        value = stock["training"].get(key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"training.{key} must be a whole number above 0, got {value!r}")
    module, kwargs = stock["data"]["name"], stock["data"]["kwargs"]
    if module != "PerturbationDataModule":
        raise InputError(
            f"data.name={module}: State trains on a PerturbationDataModule only; leave data= and "
            "data.name out"
        )
    space = kwargs.get("output_space")
    if space not in SPACES:
        raise InputError(f"data.kwargs.output_space must be gene, all or embedding, got {space!r}")
    if kwargs["embed_key"] == "":
        raise InputError("data.kwargs.embed_key is empty; to train on X, leave it out")
