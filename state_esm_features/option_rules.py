"""Which options of the groups mean nothing together.

What an option does is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from state_esm_features.option_groups import FeatureOptions, SequenceOptions
from state_esm_features.options import names_of


def misused(options: FeatureOptions, given: Mapping[str, Any]) -> str | None:
    """What is wrong with a combination of options that means nothing, or None."""
    if not options.symbols.separator:
        return "--separator is empty"
    if options.sequences.cache and options.sequences.no_cache:
        return "--cache and --no-cache exclude each other"
    in_tables = {"layer"} if options.sources.esm_embeddings else set()
    of_fasta = [
        names_of(f)[0]
        for f in fields(SequenceOptions)
        if given.get(f.name, False) is not False and f.name not in in_tables
    ]
    if options.sources.table_key is not None and not options.sources.esm_embeddings:
        return "--table-key needs --esm-embeddings PATH"
    if of_fasta and not options.sources.fasta:
        return f"{of_fasta[0]} needs --fasta FILE"
    return misused_scale(options, given) if options.policy.scale != "none" else None


def misused_scale(options: FeatureOptions, given: Mapping[str, Any]) -> str | None:
    """The same for --scale, which goes by the statistics of one table."""
    tables = len(options.sources.esm_embeddings)
    if tables > 1 or (not tables and options.sources.fasta):
        return f"--scale needs one table, whose mean and spread it takes, not {tables or 'none'}"
    if options.policy.missing == "mean":
        return "--scale does not go with --missing mean: that mean is nearly 0, as the control is"
    if given.get("ablation") == "onehot":
        return "--scale does not go with --ablation onehot, whose vectors come from no table"
    return None
