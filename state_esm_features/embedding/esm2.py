"""ESM2: a checkpoint in fair-esm's format, and the encoder on it.

Which sequences it is given, and what becomes of its output, is not known here.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, first_line
from state_esm_features.files import read_torch, sha256_of

if TYPE_CHECKING:
    import torch


ENCODER = "transformers.EsmModel"
"""What computes the vectors; others agree with it within 1e-4 only, so a recipe names it."""


@dataclass(frozen=True)
class Checkpoint:
    """ESM2 weights in fair-esm's format.

    Attributes
    ----------
    model
        As on the command line.
    path, sha256
        The file.
    layers, width, heads
        Shape of the encoder.
    token_dropout
        Whether embeddings are scaled as if 12 % of the tokens were masked, as in training.
    """

    model: str
    path: Path
    sha256: str
    layers: int
    width: int
    heads: int
    token_dropout: bool


def fair_esm() -> Any:
    """The package `esm` of fair-esm; EvolutionaryScale's has the same name and hides it."""
    import esm

    if not hasattr(esm, "Alphabet"):
        raise InputError(
            "the installed package 'esm' is EvolutionaryScale's and hides fair-esm, which has the "
            "same name: pip uninstall -y esm, then pip install --force-reinstall --no-deps fair-esm"
        )
    return esm


def read_checkpoint(path: Path) -> tuple[argparse.Namespace, dict[str, torch.Tensor]]:
    """Configuration and {name as in fair-esm's ESM2: tensor}, memory-mapped.

    What was read of the file leaves memory when all tensors of one call are gone.
    """
    content = read_torch(
        path, "Give an ESM2 checkpoint as fair-esm publishes it", [argparse.Namespace]
    )
    config, weights = content["cfg"]["model"], content["model"]
    prefix = r"^encoder\.(sentence_encoder\.)?"
    return config, {re.sub(prefix, "", name): weights[name] for name in weights}


def open_checkpoint(model: str, path: Path) -> Checkpoint:
    """Open a checkpoint without executing anything in it and without reading its weights.

    fair-esm's own loader unpickles the file, and asks for a contact-regression file that
    embeddings do not need.

    Raises
    ------
    InputError
        Not a checkpoint of ESM2 in fair-esm's format.
    """
    import torch

    try:
        config, weights = read_checkpoint(path)
        layers, width = int(config.encoder_layers), int(config.encoder_embed_dim)
        heads, token_dropout = int(config.encoder_attention_heads), bool(config.token_dropout)
        if layers < 1 or heads < 1 or width % heads:
            raise ValueError(f"{layers} layers, width {width}, {heads} heads")
        with torch.device("meta"):  # fair-esm's own model says which weights of which shape
            reference = fair_esm().ESM2(layers, width, heads)
        for name, weight in reference.state_dict().items():
            if not name.startswith("contact_head.") and weights[name].shape != weight.shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}")
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{path} is no ESM2 checkpoint in fair-esm's format ({first_line(error)}); the "
            "published files are esm2_*.pt"
        ) from error
    return Checkpoint(model, path, sha256_of(path), layers, width, heads, token_dropout)


FAIR_ESM_NAMES = (
    ("rotary_embeddings.", "layers.0.self_attn.rot_emb."),
    ("embeddings.word_embeddings.", "embed_tokens."),
    ("encoder.emb_layer_norm_after.", "emb_layer_norm_after."),
    ("encoder.layer.", "layers."),
    ("attention.self.query.", "self_attn.q_proj."),
    ("attention.self.key.", "self_attn.k_proj."),
    ("attention.self.value.", "self_attn.v_proj."),
    ("attention.output.dense.", "self_attn.out_proj."),
    ("attention.LayerNorm.", "self_attn_layer_norm."),
    ("intermediate.dense.", "fc1."),
    ("output.dense.", "fc2."),
    ("LayerNorm.", "final_layer_norm."),
)
"""Parts of the names of weights in EsmModel and in fair-esm's ESM2, in the order of replacing."""


class Esm2:
    """ESM2's encoder: transformers' EsmModel on fair-esm's weights, one sequence at a time.

    Without padding a vector depends on its own sequence only, and nothing is computed in vain. In
    half precision the linear maps are held in that type and the rest in float32, under autocast.
    Threads may share one (before transformers 5.6 they disturbed each other's rotations).

    Parameters
    ----------
    checkpoint
        The weights.
    layer
        After how many layers to read the representation; only these are loaded.
    device, dtype
        Where, and in which type, matrices are multiplied.
    """

    def __init__(
        self, checkpoint: Checkpoint, layer: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.alphabet = fair_esm().Alphabet.from_architecture("ESM-1b")
        self.device, self.dtype, self.width = device, dtype, checkpoint.width
        self.model = self._without_weights(checkpoint, layer)
        empty = self.model.state_dict()
        weights: dict[str, torch.Tensor] = {}
        for _, names in itertools.groupby(empty, lambda name: name.split(".")[:3]):  # a layer each
            dtypes = {name: empty[name].dtype for name in names}
            weights |= read_weights(checkpoint.path, dtypes, device)
        self.model.load_state_dict(weights, assign=True)

    def _without_weights(self, checkpoint: Checkpoint, layer: int) -> Any:
        """EsmModel as ESM2 has it, on torch's meta device, up to a layer.

        The final layer norm belongs to the last layer only, as in fair-esm.
        """
        import torch
        from transformers import EsmConfig, EsmModel

        config = EsmConfig(
            vocab_size=len(self.alphabet.all_toks),
            mask_token_id=self.alphabet.mask_idx,
            pad_token_id=self.alphabet.padding_idx,
            hidden_size=checkpoint.width,
            num_hidden_layers=checkpoint.layers,
            num_attention_heads=checkpoint.heads,
            intermediate_size=4 * checkpoint.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-5,
            position_embedding_type="rotary",
            emb_layer_norm_before=False,
            token_dropout=checkpoint.token_dropout,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            model = EsmModel(config, add_pooling_layer=False).eval()
        model.contact_head = None
        if layer < checkpoint.layers:
            model.encoder.layer = model.encoder.layer[:layer]
            model.encoder.emb_layer_norm_after = None
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(self.dtype)
        return model

    def __call__(self, sequence: str) -> torch.Tensor:
        """Representation of a sequence, float32 (residues, width).

        The same as `representations[layer]` of fair-esm's ESM2.
        """
        import torch

        letters = map(self.alphabet.get_idx, sequence)
        tokens = torch.tensor([[self.alphabet.cls_idx, *letters, self.alphabet.eos_idx]])
        half = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with half:
            states = self.model(tokens.to(self.device)).last_hidden_state
        return states[0, 1:-1]


def attention_without_plans(kinds: Collection[str]) -> contextlib.AbstractContextManager[Any]:
    """Attention on GPUs without cuDNN, which in half precision plans anew for every length.

    On an H200 (torch 2.11) that took 50 ms a protein, of 55 ms for the 8M model. It holds for all
    threads of the process, so it is entered once, around them.
    """
    if "cuda" not in kinds:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel([*others])


def read_weights(
    path: Path, dtypes: Mapping[str, torch.dtype], device: torch.device
) -> dict[str, torch.Tensor]:
    """Copies of weights by their names in EsmModel; the file itself leaves memory at the end."""
    _, stored = read_checkpoint(path)
    return {
        name: stored[fair_esm_name(name)].to(device, dtype, copy=True)
        for name, dtype in dtypes.items()
    }


def fair_esm_name(name: str) -> str:
    """What fair-esm's ESM2 calls a weight of transformers' EsmModel."""
    for ours, theirs in FAIR_ESM_NAMES:
        name = name.replace(ours, theirs)
    return name
