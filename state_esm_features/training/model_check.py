"""What State's own training makes of a model and these data, tried without values.

The data files were read before.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from state_esm_features.console import Findings, count, some
from state_esm_features.training.data import DataFile
from state_esm_features.training.stock import (
    counts_read,
    input_matrix,
    matrices_read,
    set_length,
    wants_cell_type_map,
)
from state_esm_features.training_options import SPACES

Trial = tuple[str | None, int | None]
"""Of a model that was to take one training step without data: why it cannot be trained, or None;
bytes of a checkpoint, or None where that is unknown."""


def lacks_cell_type_map() -> bool:
    """For those, run_tx_train of State 0.11.1 reads celltype_onehot_map of the data module, which
    in cell-load 0.10.4 is cell_type_onehot_map. Looked up in what is installed."""
    from cell_load.data_modules import PerturbationDataModule
    from state._cli import run_tx_train

    name, of_module = "celltype_onehot_map", PerturbationDataModule.__init__.__code__.co_names
    return name in run_tx_train.__code__.co_names and name not in of_module


def matrix_problems(files: Sequence[DataFile], kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(problem, how to mend it) of matrices that cell-load would not find or stack.

    That the one which is trained on is in every file, and equally wide, is checked elsewhere.
    """
    problems = []

    def note(paths: Sequence[Path], what: str, mend: str) -> None:
        if paths:
            names = some(map(str, paths))
            problems.append((f"{count(len(paths), 'file')} {what} ({names})", mend))

    for matrix in matrices_read(kwargs):
        if matrix == input_matrix(kwargs):
            continue
        name = "X" if matrix == "X" else f"obsm[{matrix.removeprefix('obsm/')!r}]"
        there = {f.path: f.matrices[matrix] for f in files if matrix in f.matrices}
        why = "which data.kwargs.store_raw_basal=true reads"
        if matrix == counts_read(kwargs):
            why = f"whose genes State would learn with --output-space {kwargs['output_space']}"
        absent = [f.path for f in files if f.path not in there]
        note(absent, f"without {matrix}, {why}", f"add adata.{name}")
        width = next(iter(there.values()), 0)
        other = [path for path, columns in there.items() if columns != width]
        same = f"write adata.{name} with the same genes in every file"
        note(other, f"with other than {width:,} columns in {matrix}", same)
    bare = [f.path for f in files if not {"X", "obsm/X_hvg"} & set(f.matrices)]
    # PerturbationDataset._get_num_genes
    note(bare, "with neither X nor obsm/X_hvg, of which cell-load counts the genes", "add adata.X")
    return problems


def data_dims(files: Sequence[DataFile], pert_width: int) -> dict[str, Any]:
    """What the data module's get_var_dims will give State; 1 for a width that is not there, or
    not known (0)."""

    def columns(matrix: str) -> int:
        return next((f.matrices[matrix] for f in files if matrix in f.matrices), 1)

    return {
        "input_dim": files[0].width,
        "output_dim": files[0].width,
        "gene_dim": columns("X"),
        "hvg_dim": columns("obsm/X_hvg"),
        "pert_dim": pert_width or 1,
        "batch_dim": len({b for f in files for b in f.batches}) or 1,
        "gene_names": files[0].genes,
    }


def as_run_tx_train(stock: Mapping[str, Any], dims: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the configuration (State's constructors write into it) with the decoder of genes
    that run_tx_train adds."""
    own = deepcopy(dict(stock))
    model, space = own["model"]["kwargs"], own["data"]["kwargs"]["output_space"]
    if space == "embedding":
        model.pop("decoder_cfg", None)
        model["gene_decoder_bool"] = False
    else:
        model["decoder_cfg"] = {
            "latent_dim": dims["output_dim"],
            "gene_dim": dims["hvg_dim" if space == "gene" else "gene_dim"],
            "hidden_dims": model.get("decoder_hidden_dims", [1024, 1024, 512]),
            "dropout": model.get("decoder_dropout", 0.1),
            "residual_decoder": model.get("residual_decoder", False),
        }
    return own


def empty_batch(stock: Mapping[str, Any], dims: Mapping[str, Any], cells: int) -> dict[str, Any]:
    """What collate_fn of PerturbationDataset returns for control cells, as far as models read it;
    tensors (cells, width) on the device of the context."""
    import torch

    kwargs = stock["data"]["kwargs"]
    widths = {"pert_cell_emb": dims["output_dim"], "ctrl_cell_emb": dims["input_dim"]}
    widths |= {"pert_emb": dims["pert_dim"], "batch": dims["batch_dim"]}
    if counts_read(kwargs):
        widths["pert_cell_counts"] = stock["model"]["kwargs"]["decoder_cfg"]["gene_dim"]
    batch: dict[str, Any] = {key: torch.zeros(cells, width) for key, width in widths.items()}
    return batch | {"pert_name": [kwargs["control_pert"]] * cells, "cell_type": [""] * cells}


def checkpoint_bytes(module: Any, stepped: bool, decodes: bool) -> int:
    """Weights and buffers once, and two more of each weight that learns: Adam's moments, as all
    models of State 0.11.1 that can be trained take Adam.

    Parameters
    ----------
    stepped
        The weights that learn have a gradient; else those of the decoder do where it `decodes`.
    """
    learning = [
        p
        for key, p in module.named_parameters()
        if p.requires_grad
        and (p.grad is not None if stepped else decodes or not key.startswith("gene_decoder."))
    ]
    once = sum(tensor.nbytes for tensor in module.state_dict().values())
    return once + 2 * sum(p.nbytes for p in learning)


def try_model(stock: Mapping[str, Any], dims: Mapping[str, Any]) -> Trial:
    """Build the model as run_tx_train does, and let it take a step on one set of cells.

    On torch's meta device tensors have shapes but no values: that takes no memory and, once State
    is imported (3 s), a tenth of a second. Errors about this device, or that there is no trainer,
    are not the model's.

    Parameters
    ----------
    dims
        Of `data_dims`.
    """
    if wants_cell_type_map(stock):
        version = importlib.metadata.version("cell-load")
        asks = "State's training asks the data module for celltype_onehot_map, which cell-load "
        return (f"{asks}{version} does not have" if lacks_cell_type_map() else None), None
    cells = set_length(stock)
    if cells is None:
        add = f"+model.cell_set_len={stock['model']['kwargs'].get('cell_set_len') or 512}"
        return f"State's training does not find how many cells a set has; add {add}", None

    import state.tx.models  # noqa: F401  (what modules make when imported must not be meta)
    import torch

    with (
        torch.device("meta"),
        contextlib.redirect_stdout(io.StringIO()),  # State prints the model
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of losses that no trainer logs
        return build_and_step(as_run_tx_train(stock, dims), dims, cells)


def build_and_step(stock: Mapping[str, Any], dims: Mapping[str, Any], cells: int) -> Trial:
    """`try_model` on the device of the context, with sets of so many cells."""
    from state.tx.utils import get_lightning_module

    model, kwargs = stock["model"], stock["data"]["kwargs"]
    module, stepped = None, False
    try:
        module = get_lightning_module(
            model["name"], kwargs, model["kwargs"], stock["training"], dims
        )
        own = getattr(module, "cell_sentence_len", cells)
        if cells % own:
            return (
                f"it takes sets of {own} cells, and State's training would give it sets of "
                f"{cells}; set model.kwargs.cell_set_len, and no other length",
                None,
            )
        loss = module.training_step(empty_batch(stock, dims, cells), 0)
        if loss is not None:  # the mean baselines have nothing to minimise
            loss.backward()
        elif model["name"].lower() == "decoder_only":
            return "it learns to decode an embedding into genes, and is given none", None
        stepped = True
    except Exception as error:  # State, transformers and torch raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, OSError) or not re.search(r"\bmeta\b|to a .?Trainer", text):
            what = "a training step" if module else "building it"
            return f"{what} ends in {text[:300]}", None
    if module is None:
        return None, None
    return None, checkpoint_bytes(module, stepped, counts_read(kwargs) is not None)


def other_spaces(
    stock: Mapping[str, Any], files: Sequence[DataFile], dims: Mapping[str, Any]
) -> list[str]:
    """The other output spaces with which the same model can be trained on the same files."""
    fitting = []
    for space in SPACES:
        kwargs = {**stock["data"]["kwargs"], "output_space": space}
        other = {**stock, "data": {**stock["data"], "kwargs": kwargs}}
        known = space == stock["data"]["kwargs"]["output_space"] or matrix_problems(files, kwargs)
        if not known and try_model(other, dims)[0] is None:
            fitting.append(space)
    return fitting


def check_model(
    name: str, stock: Mapping[str, Any], files: Sequence[DataFile], found: Findings
) -> None:
    """Note why State could not train this model (`name` of its configuration) on these files."""
    dims = data_dims(files, pert_width=0)
    lacking = matrix_problems(files, stock["data"]["kwargs"])
    untrainable, _ = try_model(stock, dims)
    if not lacking and untrainable is None:
        return
    spaces = " or ".join(other_spaces(stock, files, dims))
    for problem, mend in lacking:
        choose = f"Choose --output-space {spaces}, or {mend}"
        found.problems.append(f"{problem}. {choose if spaces else mend[0].upper() + mend[1:]}")
    if untrainable is not None:
        advice = f". With --output-space {spaces} it can" if spaces else ""
        if "'GPT2Attention' object has no attribute 'bias'" in untrainable:
            advice = ", as State's GPT2 does not fit the installed transformers. Choose a model on "
            advice += "llama, such as --model state, and no transformer_backbone_key=GPT2"
        elif wants_cell_type_map(stock):
            advice = ". Choose another model, such as --model state"
        elif name == "decoder_only" and not stock["data"]["kwargs"]["embed_key"]:
            advice = ". Give it --embed-key KEY and --output-space all"
        found.problems.append(f"model {name} cannot be trained like this: {untrainable}{advice}")
