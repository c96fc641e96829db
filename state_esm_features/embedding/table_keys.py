"""The keys of a table, and the genes that they are.

No vector is read here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from state_esm_features.console import InputError, count, some
from state_esm_features.embedding.fasta import genes_in_header
from state_esm_features.embedding.table_content import Content


def gene_keys(path: Path, content: Content) -> list[list[str]]:
    """The genes of the vectors: of each its name, and others that it has. Each stands once.

    The one place where the keys of a table become genes.
    """
    wrong = [name for name in content.names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise InputError(
            f"{path}: {len(wrong):,} of {len(content.names):,} keys are no names of genes "
            f"({some(map(repr, wrong))}); name each gene by a text"
        )
    keys = [[str(name)] for name in content.names]
    if content.headers:
        keys = [genes_in_header(name) or [name] for name in content.names]
    counted = Counter(own for own, *_ in keys)
    repeated = [gene for gene, n in counted.items() if n > 1]
    if repeated:
        raise InputError(
            f"{path}: {count(len(repeated), 'gene')} more than once ({some(repeated)}); keep one "
            "vector of each"
        )
    return keys
