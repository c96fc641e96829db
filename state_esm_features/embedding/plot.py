"""The picture of a features file: a map of the vectors, and their cosines.

Nothing is decided here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, count, some
from state_esm_features.embedding.report import WELL_KNOWN
from state_esm_features.embedding.vectors import Resolved, Vectors, identical
from state_esm_features.files import write_whole

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes


def umap(vectors: torch.Tensor) -> Any:
    """Scanpy's UMAP of vectors (n, width) on their principal components: float32 (n, 2)."""
    import anndata
    import scanpy
    from sklearn.neighbors import KNeighborsTransformer

    data = anndata.AnnData(vectors.numpy())
    scanpy.pp.pca(data, n_comps=min(50, *(size - 1 for size in data.shape)), random_state=0)
    exact = KNeighborsTransformer(n_neighbors=min(15, data.n_obs - 1))  # pynndescent 0.7 breaks it
    scanpy.pp.neighbors(data, transformer=exact, random_state=0)
    init = "spectral" if data.n_obs > 50 else "random"  # too few for a spectral layout
    scanpy.tl.umap(data, random_state=0, init_pos=init)
    return data.obsm["X_umap"]


def draw(path: Path, resolved: Resolved, vectors: Vectors, features: Vectors) -> None:
    """One PNG: the genes of the screen among all of the tables, and their pairwise cosines.

    Raises
    ------
    InputError
        Fewer than five genes.
    """
    import torch

    genes = list(vectors)
    if len(genes) < 5:
        raise InputError(f"--plot needs at least five genes, and here are {len(genes)}")
    resolutions, tables = resolved.resolutions, resolved.tables
    width = len(vectors[genes[0]])
    others = dict.fromkeys(g for t in tables if t.width == width for g in t if g not in vectors)
    around = [next(t for t in tables if g in t)[g] for g in others]
    control = [features[r.label] for r in resolutions if all(p.how == "control" for p in r.parts)]
    missing = [features[r.label] for r in resolutions if r.reason]
    groups = {
        "other genes of the table": around,
        "genes of this screen": list(vectors.values()),
        "control": control[:1],
        "missing": missing[:1],  # all of them have one filler
    }
    with warnings.catch_warnings(action="ignore"):  # of umap, that a seed means one thread
        places = umap(torch.stack([v for group in groups.values() for v in group]))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), dpi=150)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.1, top=0.92, wspace=0.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_map(left, places, {name: len(group) for name, group in groups.items()}, genes)
    draw_cosines(right, vectors)
    write_whole(path, lambda f: figure.savefig(f, format="png"))


def draw_map(axes: Axes, places: Any, sizes: Mapping[str, int], genes: Sequence[str]) -> None:
    """The UMAP; of many genes some well-known and some evenly chosen ones have their name."""
    from adjustText import adjust_text
    from matplotlib.collections import PathCollection
    from matplotlib.patheffects import withStroke

    small = min(36.0, 3 + 3e3 / len(genes))
    styles: dict[str, dict[str, Any]] = {  # apart in black and white too
        "other genes of the table": {"marker": ".", "s": 6, "c": "0.82"},
        "genes of this screen": {"marker": "o", "s": small, "c": "#1f5fa8", "linewidths": 0},
        "control": {"marker": "X", "s": 110, "c": "black", "edgecolors": "white"},
        "missing": {"marker": "^", "s": 340, "facecolors": "none", "edgecolors": "#d9601a"},
    }
    start = 0
    for name, size in sizes.items():
        x, y = places[start : start + size].T
        start += size
        if size:
            axes.scatter(x, y, label=f"{name} ({size:,})" if size > 1 else name, **styles[name])
    known = [gene for gene in WELL_KNOWN if gene in genes]
    named = dict.fromkeys([*known, *genes[:: max(1, -(-len(genes) // 24))]])
    first = sizes["other genes of the table"]
    texts = []
    for gene in list(named)[:30]:
        x, y = places[first + genes.index(gene)]
        texts.append(axes.text(x, y, gene, fontsize=8, zorder=5))
        texts[-1].set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title="Vectors of the genes")
    adjust_text(texts, ax=axes, arrowprops={"arrowstyle": "-", "color": "0.3", "lw": 0.6})
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=4, frameon=False)
    for handle in legend.findobj(PathCollection):
        handle.set_sizes([60])


def draw_cosines(axes: Axes, vectors: Vectors) -> None:
    """Histogram of the cosines of pairs of genes (of at most 2,000, evenly chosen)."""
    import torch
    from matplotlib.ticker import MaxNLocator

    genes = list(vectors)[:: -(-len(vectors) // 2000)]
    unit = torch.nn.functional.normalize(torch.stack([vectors[gene] for gene in genes]), dim=1)
    pairs = torch.triu_indices(len(genes), len(genes), 1)
    axes.hist((unit @ unit.T)[pairs[0], pairs[1]].clamp(-1, 1).numpy(), bins=60, color="#1f5fa8")
    axes.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
    same = identical(vectors)
    if same:
        example = some((" = ".join(group[:3]) for group in same), 1)
        axes.annotate(
            f"{count(len(same), 'group')} identical\n({example})",
            *((1, 0), (0.9, 0.9)),
            textcoords="axes fraction",
            ha="right",
            color="#d9601a",
            arrowprops={"arrowstyle": "->", "color": "#d9601a"},
        )
    of = f"{len(genes):,} of {len(vectors):,}" if len(genes) < len(vectors) else f"{len(genes):,}"
    axes.set(xlabel="cosine", ylabel="pairs of genes", title=f"Pairwise cosines ({of} genes)")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
