"""From genes to the vectors of labels: read, computed, ablated, combined.

How the genes are found is not known here, nor which vectors are near each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, Notes, count, some
from state_esm_features.embedding.embed import embed_genes
from state_esm_features.embedding.esm2 import Checkpoint
from state_esm_features.embedding.labels import Labels
from state_esm_features.embedding.resolve import Resolution, Resolver
from state_esm_features.embedding.scale import Scaling, scaling_of
from state_esm_features.embedding.tables import Table
from state_esm_features.option_groups import ESM2_WIDTHS, FeatureOptions

if TYPE_CHECKING:
    import torch

Vectors = Mapping[str, "torch.Tensor"]
"""{label or gene: float32 (width,)}."""


@dataclass(frozen=True)
class Resolved:
    """Labels, and where the vector of each comes from; no vector is read or computed yet.

    Attributes
    ----------
    left_out
        Labels that no cell has and no source: they get no vector.
    ablation
        As in the manifest; None for real vectors.
    checkpoint
        The model that computes those of the sequences; None if there is nothing to compute, or if
        a dry run would have to download it.
    kept_scaling
        The statistics that a run keeps for --scale; None to take those of the table.
    """

    labels: Labels
    options: FeatureOptions
    resolver: Resolver
    resolutions: list[Resolution]
    left_out: list[Resolution]
    ablation: Mapping[str, Any] | None = None
    checkpoint: Checkpoint | None = None
    kept_scaling: Scaling | None = None

    @cached_property
    def used(self) -> list[list[str]]:
        """Genes that are used of each source."""
        used = {p.gene: p.source for r in self.resolutions for p in r.parts if p.gene is not None}
        indices = range(len(self.resolver.sources))
        return [[gene for gene, source in used.items() if source == i] for i in indices]

    @property
    def tables(self) -> list[Table]:
        """The sources that are tables."""
        return [source for source in self.resolver.sources if isinstance(source, Table)]

    @property
    def to_embed(self) -> list[str]:
        """Genes that are used and have to be computed."""
        return self.used[-1] if self.options.sources.fasta else []

    @property
    def width(self) -> int | None:
        """Length of the vectors, as far as it is known without computing one."""
        if self.tables:
            return self.tables[0].width
        known = self.checkpoint.width if self.checkpoint else None
        return known or ESM2_WIDTHS.get(self.options.sequences.esm_model)

    @cached_property
    def scaling(self) -> Scaling | None:
        """What --scale does; None if it does nothing."""
        how = self.options.policy.scale
        if how == "none":
            return None
        return self.kept_scaling or scaling_of(self.tables[0], standard=how == "standard")

    def vectors(self) -> dict[str, torch.Tensor]:
        """{gene: float32 (width,)} of the genes used of each source, looked up or computed; scaled.

        Raises
        ------
        InputError
            A vector of a table is not finite or zero; a protein cannot be embedded.
        """
        vectors: dict[str, torch.Tensor] = {}
        for source, genes in zip(self.resolver.sources, self.used, strict=True):
            if isinstance(source, Table):
                looked_up = {gene: source[gene] for gene in genes}
                check_vectors(looked_up, source.path, self.options.policy.scale == "none")
                vectors |= looked_up
            elif self.checkpoint is not None:
                vectors |= embed_genes(genes, source, self.checkpoint, self.labels.for_run)
        return scaled(vectors, self.scaling) if self.scaling else vectors

    def features(self) -> tuple[Vectors, Vectors]:
        """({label: vector}, {gene: vector}), read, computed, ablated, combined."""
        vectors = self.vectors()
        if self.ablation:
            vectors = ablate(vectors, self.ablation["kind"], self.ablation["seed"])
        return self.combined(vectors, len(next(iter(vectors.values())))), vectors

    def combined(self, vectors: Vectors, width: int) -> dict[str, torch.Tensor]:
        """One vector a label, made of the genes' (width,), in the order of the labels.

        A combination is the sum (as in scLAMBDA) or mean of its genes' vectors; the control is zero
        and adds nothing to it. A missing gene gets what --missing says: `mean` is the mean of the
        vectors of all genes that this run found.
        """
        import torch

        policy, zero = self.options.policy, torch.zeros(width)
        filler = zero
        if policy.missing == "mean":
            filler = torch.stack([vectors[g] for g in sorted(vectors)]).double().mean(0).float()
        features = {}
        for resolution in self.resolutions:
            genes = [p for p in resolution.parts if p.how != "control"]
            vector = filler.clone() if resolution.reason else zero.clone()
            if genes:
                parts = [vectors[p.gene] if p.gene is not None else filler for p in genes]
                stacked = torch.stack(parts)
                vector = stacked.sum(0) if policy.combine == "sum" else stacked.mean(0)
            features[resolution.label] = vector
        return features

    def own(self, features: Vectors) -> dict[str, torch.Tensor]:
        """{label: vector} of those that have one of their own: not the control, not filled in."""
        return {
            r.label: features[r.label]
            for r in self.resolutions
            if not r.reason and any(p.how != "control" for p in r.parts)
        }


def check_vectors(vectors: Vectors, path: Path, can_fill: bool = True) -> None:
    """Refuse NaN, infinity, and vectors of zeros, which State would take for the control.

    `can_fill`: --missing mean would be taken.
    """
    import torch

    other = ", or remove them from it and choose --missing mean" if can_fill else ""

    for complaint, test in (
        ("holds NaN or infinite values", lambda v: not torch.isfinite(v).all()),
        ("holds only zeros, which State takes for the control", lambda v: not v.any()),
    ):
        bad = sorted(gene for gene, v in vectors.items() if test(v))
        if bad:
            raise InputError(
                f"{path}: the vector of {count(len(bad), 'gene')} in use {complaint} "
                f"({some(bad)}); repair the table{other}"
            )


def scaled(vectors: Vectors, scaling: Scaling) -> dict[str, torch.Tensor]:
    """{gene: scaled vector}; none may become the control's."""
    result = {gene: scaling.of(vector) for gene, vector in vectors.items()}
    zero = sorted(gene for gene, vector in result.items() if not vector.any())
    if zero:
        raise InputError(
            f"the vector of {count(len(zero), 'gene')} in use is the mean of the table "
            f"({some(zero)}): --scale makes zeros of it, which State takes for the control; leave "
            "--scale out"
        )
    return result


def shuffle_vectors(vectors: Vectors, seed: int) -> dict[str, torch.Tensor]:
    """Give every gene the vector of another gene: the negative control of the features.

    Genes are put in random order, those of identical vectors side by side, and the vectors
    are moved on by as many places as the largest such group has: no gene can keep its own.

    Raises
    ------
    InputError
        More than half of the genes share one vector (or there is one gene only).
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    groups: dict[bytes, list[str]] = {}
    for gene in sorted(vectors):
        groups.setdefault(vectors[gene].numpy().tobytes(), []).append(gene)
    members = list(groups.values())
    order = [gene for i in rng.permutation(len(members)) for gene in rng.permutation(members[i])]
    shift = max(map(len, members))
    if 2 * shift > len(order):
        raise InputError(
            "--ablation shuffle needs genes with different vectors: "
            f"{shift} of {len(order)} are identical, so some gene would keep its own"
        )
    return {
        str(gene): vectors[str(giver)]
        for gene, giver in zip(order, order[shift:] + order[:shift], strict=True)
    }


def random_vectors(vectors: Vectors, seed: int) -> dict[str, torch.Tensor]:
    """Gaussian vectors that have the mean and spread of the real ones in every dimension."""
    import numpy as np
    import torch

    rng = np.random.default_rng(seed)
    genes = sorted(vectors)
    real = torch.stack([vectors[gene] for gene in genes]).double().numpy()
    drawn = real.mean(0) + real.std(0) * rng.standard_normal(real.shape)
    return dict(zip(genes, torch.from_numpy(drawn).float().unbind(), strict=True))


def ablate(vectors: Vectors, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """What --ablation puts in the place of the vectors: {gene: float32 (width,)}.

    Of onehot the width is the number of genes: what State takes where it has no features.
    """
    import torch

    if kind == "onehot":
        return dict(zip(sorted(vectors), torch.eye(len(vectors)).unbind(), strict=True))
    return (shuffle_vectors if kind == "shuffle" else random_vectors)(vectors, seed)


def identical(vectors: Vectors) -> list[list[str]]:
    """Groups of labels with the same vector, which State cannot tell apart."""
    groups: dict[bytes, list[str]] = {}
    for label, vector in vectors.items():
        groups.setdefault(hashlib.sha256(vector.numpy().data).digest(), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def note_identical(vectors: Vectors, notes: Notes, new: Collection[str] | None = None) -> None:
    """Note which labels State cannot tell apart; of groups with a `new` one only, if given."""
    same = [g for g in identical(vectors) if new is None or not set(g).isdisjoint(new)]
    if same:
        listed = some((" = ".join(group) for group in same), 3)
        notes.warn(f"State cannot tell labels with the same vector apart: {listed}")
