"""ESM2: a checkpoint in fair-esm's format, and the encoder on it.

Which sequences it is given, and what becomes of its output, is not known here.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, _line
from state_esm_features.embedding.fasta import RESIDUES
from state_esm_features.files import read_torch, sha256_of

if TYPE_CHECKING:
    import torch


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
        checkpoint = Checkpoint(
            *(model, path, sha256_of(path), int(config.encoder_layers)),
            *(int(config.encoder_embed_dim), int(config.encoder_attention_heads)),
            bool(config.token_dropout),
        )
        if checkpoint.layers < 1 or checkpoint.heads < 1 or checkpoint.width % checkpoint.heads:
            raise ValueError(
                f"{checkpoint.layers} layers, width {checkpoint.width}, {checkpoint.heads} heads"
            )
        with torch.device("meta"):  # fair-esm's own model says which weights of which shape
            reference = fair_esm().ESM2(checkpoint.layers, checkpoint.width, checkpoint.heads)
        for name, weight in reference.state_dict().items():
            if not name.startswith("contact_head.") and weights[name].shape != weight.shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}")
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{path} is no ESM2 checkpoint in fair-esm's format ({_line(error)}); the published "
            "files are esm2_*.pt"
        ) from error
    return checkpoint


@dataclass(frozen=True)
class Block:
    """(weight, bias) of a transformer layer: two layer norms and four linear maps."""

    norm1: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    norm2: tuple[torch.Tensor, torch.Tensor]
    fc1: tuple[torch.Tensor, torch.Tensor]
    fc2: tuple[torch.Tensor, torch.Tensor]


class Esm2:
    """ESM2's encoder on fair-esm's weights: one sequence at a time, no padding, no LM head.

    A vector then depends on its own sequence only, and nothing is computed in vain. Query, key
    and value are one matrix product. In half precision the matrix products are in that type; sums
    over layers, layer norms, rotations and, on a CPU, attention (where half precision is not
    faster) stay in float32.

    Parameters
    ----------
    checkpoint
        The weights.
    device, dtype
        Where and in which type the matrix products are done.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        c = checkpoint
        self.heads, self.head_width = c.heads, c.width // c.heads
        self.device, self.layers = device, c.layers
        self.attention_dtype = torch.float32 if device.type == "cpu" else dtype
        self.dtype = dtype
        like = torch.empty(0, device=device, dtype=dtype)
        exact = torch.empty(0, device=device)
        # rotary embedding turns pairs (i, i + half): rows of query and key are put in an order
        # in which such pairs are neighbours, that is, complex numbers
        pairs = torch.arange(self.head_width).view(2, -1).T.flatten()
        rows = (torch.arange(c.heads)[:, None] * self.head_width + pairs).flatten()

        _, weights = read_checkpoint(c.path)

        def weight(name: str) -> torch.Tensor:
            return weights[name].float().clone()  # a copy, lest it keeps the file in memory

        def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weight(f"{name}.weight").to(exact), weight(f"{name}.bias").to(exact)

        def linear(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weight(f"{name}.weight").to(like), weight(f"{name}.bias").to(like)

        def qkv(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            def joined(kind: str) -> torch.Tensor:
                q, k, v = (weight(f"{name}.{x}_proj.{kind}") for x in "qkv")
                return torch.cat([q[rows], k[rows], v]).to(like)

            return joined("weight"), joined("bias")

        self.blocks = []
        for i in range(c.layers):
            _, weights = read_checkpoint(c.path)  # lets go of what the last layer read
            attention = f"layers.{i}.self_attn"
            self.blocks.append(
                Block(
                    norm(f"{attention}_layer_norm"),
                    qkv(attention),
                    linear(f"{attention}.out_proj"),
                    norm(f"layers.{i}.final_layer_norm"),
                    linear(f"layers.{i}.fc1"),
                    linear(f"layers.{i}.fc2"),
                )
            )
        self.norm_after = norm("emb_layer_norm_after")
        self.frequencies = weight("layers.0.self_attn.rot_emb.inv_freq").to(exact)
        scale = 1 - 0.15 * 0.8 if c.token_dropout else 1.0
        self.embedding = (weight("embed_tokens.weight") * scale).to(exact)
        alphabet = fair_esm().Alphabet.from_architecture("ESM-1b")
        self.token = torch.full((128,), alphabet.unk_idx)
        for residue in RESIDUES:
            self.token[ord(residue)] = alphabet.get_idx(residue)
        self.ends = torch.tensor([alphabet.cls_idx]), torch.tensor([alphabet.eos_idx])

    def tokens(self, sequence: str) -> torch.Tensor:
        """Token ids of a sequence, beginning and end included: int64 (residues + 2,)."""
        import torch

        letters = torch.frombuffer(bytearray(sequence, "ascii"), dtype=torch.uint8).long()
        return torch.cat([self.ends[0], self.token[letters], self.ends[1]])

    def __call__(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        """Representation after `layer` layers (all of them: normalised), float32 (tokens, width).

        The same as `representations[layer]` of fair-esm's ESM2.
        """
        import torch
        from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

        x = self.embedding[tokens.to(self.device)]
        length, width = x.shape
        angles = torch.arange(length, device=self.device)[:, None] * self.frequencies
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        turn = turn.expand(-1, 2 * self.heads, -1).contiguous()
        for block in self.blocks[:layer]:
            h = layer_norm(x, (width,), *block.norm1)
            qkv = linear(h.to(self.dtype), *block.qkv).float()
            pairs = qkv[:, : 2 * width].view(length, 2 * self.heads, -1, 2)
            torch.view_as_complex(pairs).mul_(turn)
            qkv = qkv.to(self.attention_dtype).view(1, length, 3, self.heads, self.head_width)
            mixed = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            mixed = mixed.transpose(1, 2).reshape(length, width)
            x += linear(mixed.to(self.dtype), *block.out)
            h = layer_norm(x, (width,), *block.norm2)
            x += linear(gelu(linear(h.to(self.dtype), *block.fc1)), *block.fc2)
        return layer_norm(x, (width,), *self.norm_after) if layer == self.layers else x
