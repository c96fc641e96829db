"""ESM2 checkpoints with random weights in the layout of the published files; random proteins."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import esm
import numpy as np
import torch


def random_protein(rng: np.random.Generator, residues: int) -> str:
    """A protein of random letters, one of the twenty for each residue."""
    return "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), residues))


def human_like(number: int, longest: int) -> list[str]:
    """Random proteins, as long as human ones are: log-normal, median 415 residues."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(415), 0.75, number), 30, longest).astype(int)
    return [random_protein(rng, n) for n in lengths]


def random_model(
    layers: int, width: int, heads: int, seed: int = 0, *, token_dropout: bool = True
) -> esm.model.esm2.ESM2:
    """fair-esm's model with random weights, on torch's default device.

    Layer norms and biases are random too, as in real weights (fair-esm starts them at 1 and 0).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = esm.model.esm2.ESM2(layers, width, heads, token_dropout=token_dropout).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) / 10)
    return model


def write_checkpoint(
    path: Path,
    layers: int = 2,
    width: int = 16,
    heads: int = 4,
    seed: int = 0,
    *,
    token_dropout: bool = True,
    dtype: torch.dtype = torch.float32,
    spoil: Callable[[dict[str, Any]], object] = lambda content: None,
) -> esm.model.esm2.ESM2:
    """Write random weights as fair-esm publishes them; fair-esm's model of the same weights.

    `spoil` may change what is written.
    """
    model = random_model(layers, width, heads, seed, token_dropout=token_dropout)
    if dtype != torch.float32:
        model = model.to(dtype).float()
    weights = {
        ("encoder." if k.startswith("lm_head.") else "encoder.sentence_encoder.") + k: v.to(dtype)
        for k, v in model.state_dict().items()
        if not k.startswith("contact_head.")
    }
    config = argparse.Namespace(
        encoder_layers=layers,
        encoder_embed_dim=width,
        encoder_attention_heads=heads,
        token_dropout=token_dropout,
    )
    content = {"cfg": {"model": config}, "model": weights}
    spoil(content)
    torch.save(content, path)
    return model
