"""The picture of a features file: a map of the vectors, and their cosines.

Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features.console import InputError, count, some
from state_esm_features.embedding.compare import Compared
from state_esm_features.embedding.report import WELL_KNOWN
from state_esm_features.embedding.scale import Scaling
from state_esm_features.embedding.tables import Table
from state_esm_features.embedding.vectors import identical
from state_esm_features.files import write_whole

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

MOST, MOST_AROUND, MOST_NAMES = 2000, 1000, 30
"""Genes drawn of the screen, and of the rest of the tables: the seconds that the map takes grow
faster than their number. And how many have their name."""

OTHERS, GENES, MISSING = "other genes of the table", "genes of this screen", "missing"


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, from the first to the last in even steps."""
    if len(names) <= most:
        return list(names)
    return [names[i * len(names) // most] for i in range(most)]


def places_of(vectors: torch.Tensor) -> Any:
    """t-SNE of vectors (n, width) on their principal components: float32 (n, 2).

    On one thread: the places depend on the number of threads, and where others use the cores,
    several threads wait for each other at every step.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    components = min(50, *vectors.shape)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    with threadpool_limits(1):
        points = PCA(components, random_state=0).fit_transform(vectors.numpy())
        spread = points[:, 0].std() > 0 and components > 1
        layout = TSNE(init="pca" if spread else "random", perplexity=perplexity, random_state=0)
        return layout.fit_transform(points)


def draw(path: Path, compared: Compared) -> None:
    """One PNG: genes of the screen among those of the tables, and their pairwise cosines.

    The control is not on the map: it is a vector of zeros, and so is what --missing zero fills in.

    Raises
    ------
    InputError
        Fewer than five genes.
    """
    import torch

    resolved, vectors = compared.resolved, compared.vectors
    genes = list(vectors)
    if len(genes) < 5:
        raise InputError(f"--plot needs at least five genes, and here are {len(genes)}")
    chosen = evenly(genes, MOST)
    shown = list(dict.fromkeys([*(g for g in WELL_KNOWN if g in vectors), *chosen]))
    tables = [table for table in resolved.tables if table.width == len(vectors[genes[0]])]
    others = list(dict.fromkeys(g for t in tables for g in t.symbols if g not in vectors))
    filled = [compared.features[r.label] for r in resolved.resolutions if r.reason]
    groups = {
        OTHERS: vectors_around(tables, evenly(others, MOST_AROUND), resolved.scaling),
        GENES: [vectors[gene] for gene in shown],
        MISSING: [filler for filler in filled[:1] if filler.any()],  # all of them have one
    }
    places = iter(places_of(torch.stack([v for group in groups.values() for v in group])))
    points = {name: [next(places) for _ in group] for name, group in groups.items()}
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), dpi=150)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.12, top=0.92, wspace=0.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_map(left, points, {OTHERS: len(others), GENES: len(genes)}, shown)
    draw_cosines(right, compared, chosen)
    write_whole(path, lambda f: figure.savefig(f, format="png"))


def vectors_around(
    tables: Sequence[Table], genes: Sequence[str], scaling: Scaling | None
) -> list[torch.Tensor]:
    """Vectors of genes that no label uses; those that hold NaN or infinity were never refused."""
    around = [next(table for table in tables if gene in table)[gene] for gene in genes]
    usable = [vector for vector in around if vector.isfinite().all() and vector.any()]
    return list(map(scaling.of, usable)) if scaling else usable


def draw_map(
    axes: Axes,
    points: Mapping[str, Sequence[Any]],
    numbers: Mapping[str, int],
    genes: Sequence[str],
) -> None:
    """The t-SNE; of many genes some well-known and some evenly chosen ones have their name.

    `points` are those of each group, `numbers` how many it has in all, `genes` the screen's, in
    the order of their points.
    """
    from matplotlib.collections import PathCollection

    small = min(36.0, 3 + 3e3 / len(genes))
    styles: dict[str, dict[str, Any]] = {  # apart in black and white too
        OTHERS: {"marker": ".", "s": 6, "c": "0.82"},
        GENES: {"marker": "o", "s": small, "c": "#1f5fa8", "linewidths": 0},
        MISSING: {"marker": "^", "s": 340, "facecolors": "none", "edgecolors": "#d9601a"},
    }
    for name, group in points.items():
        if not group:
            continue
        of = numbers.get(name, 1)
        drawn = f"{len(group):,} of {of:,}" if len(group) < of else f"{of:,}"
        x, y = zip(*group, strict=True)
        axes.scatter(x, y, label=f"{name} ({drawn})" if of > 1 else name, **styles[name])
    axes.margins(0.06)
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2", title="Vectors of the genes")
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)
    for handle in legend.findobj(PathCollection):
        handle.set_sizes([60])
    write_names(axes, dict(zip(genes, points[GENES], strict=True)))


def write_names(axes: Axes, places: Mapping[str, Any]) -> None:
    """The names of at most MOST_NAMES genes beside their points, where they do not meet."""
    from adjustText import adjust_text
    from matplotlib.patheffects import withStroke

    known = [gene for gene in WELL_KNOWN if gene in places]
    chosen = [*known, *evenly(list(places), MOST_NAMES - len(known))]
    named = {gene: places[gene] for gene in chosen}
    texts = [axes.text(x, y, gene, fontsize=8, zorder=5) for gene, (x, y) in named.items()]
    for text in texts:
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    arrows = {"arrowstyle": "-", "color": "0.3", "lw": 0.6}
    # not for a second, as it is by default: the picture would depend on what else the machine does
    adjust_text(texts, ax=axes, iter_lim=300, arrowprops=arrows)


def draw_cosines(axes: Axes, compared: Compared, genes: Sequence[str]) -> None:
    """Histogram of the cosines of pairs of genes."""
    import torch
    from matplotlib.ticker import MaxNLocator

    vectors = compared.vectors
    unit = torch.nn.functional.normalize(compared.genes(genes), dim=1)
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
    axes.set(xlabel=f"cosine\n({compared.said})", ylabel="pairs of genes")
    axes.set_title(f"Pairwise cosines ({of} genes)")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
