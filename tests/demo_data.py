"""Simulate a small Perturb-seq screen in which the protein vectors decide the response.

    python tests/demo_data.py demo

writes, all of it simulated and named so:

    demo/simulated_screen.h5ad     cells x genes, log1p, sparse, with every cell type and label
    demo/simulated_template.h5ad   control cells of the screen, relabelled: what to predict
    demo/simulated_table.pt        {gene symbol: vector}, with genes that the screen lacks

A gene's effect on expression is a linear function of its vector, vectors come in families, and
the effect of a combination A+B is the sum of its parts. So whoever reads the vectors rightly can
predict genes that were never perturbed, and whoever mixes them up cannot.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import torch

CONTROL = "non-targeting"


@dataclass(frozen=True)
class Screen:
    """Sizes of a simulated screen.

    Attributes
    ----------
    perturbed
        Number of perturbed genes, SIM000 and on.
    families
        Protein families; vectors within one are alike.
    width
        Length of a vector.
    genes
        Measured genes.
    cells
        Cells of each (cell type, perturbation).
    controls
        Control cells of each cell type.
    """

    perturbed: int = 60
    families: int = 8
    width: int = 64
    genes: int = 200
    cells: int = 38
    controls: int = 200
    cell_types: tuple[str, ...] = ("simA", "simB")
    batches: int = 3
    seed: int = 0

    @property
    def symbols(self) -> list[str]:
        return [f"SIM{i:03d}" for i in range(self.perturbed)]

    @property
    def combination(self) -> str:
        return "SIM000+SIM001"

    @property
    def unseen(self) -> list[str]:
        """Every fifth gene is never perturbed in training."""
        return self.symbols[4::5]

    @property
    def validation(self) -> list[str]:
        return self.symbols[3::20]


def vectors(screen: Screen, extra: int = 40) -> dict[str, np.ndarray]:
    """{symbol: float32 (width,)}: family centre plus what is the gene's own."""
    rng = np.random.default_rng(screen.seed)
    symbols = screen.symbols + [f"SIMEXTRA{i:03d}" for i in range(extra)]
    centres = rng.normal(size=(screen.families, screen.width))
    own = rng.normal(size=(len(symbols), screen.width))
    table = centres[np.arange(len(symbols)) % screen.families] + 0.5 * own
    return dict(zip(symbols, table.astype(np.float32), strict=True))


def effects(screen: Screen) -> dict[str, np.ndarray]:
    """{label: float (genes,)}: change of log expression, noise-free."""
    rng = np.random.default_rng(screen.seed + 1)
    weights = rng.normal(size=(screen.width, screen.genes)) / np.sqrt(screen.width)
    table = vectors(screen)
    found = {s: 0.8 * table[s] @ weights for s in screen.symbols}
    a, b = screen.combination.split("+")
    return {**found, screen.combination: found[a] + found[b], CONTROL: np.zeros(screen.genes)}


def simulate(screen: Screen = Screen()) -> anndata.AnnData:
    """The screen: X (cells, genes) log1p, CSR float32; obs target_gene, cell_type, batch_var."""
    rng = np.random.default_rng(screen.seed + 2)
    common = rng.gamma(4.0, 0.8, size=screen.genes)
    base = common * np.exp(rng.normal(scale=0.3, size=(len(screen.cell_types), screen.genes)))
    rows, obs = [], []
    for i, cell_type in enumerate(screen.cell_types):
        for label, effect in effects(screen).items():
            n = screen.controls if label == CONTROL else screen.cells
            noise = rng.normal(scale=0.4, size=(n, screen.genes))
            rows.append(np.clip(base[i] + effect + noise, 0, None))
            obs += [(label, cell_type, f"sim_batch{j % screen.batches}") for j in range(n)]
    frame = pd.DataFrame(obs, columns=["target_gene", "cell_type", "batch_var"], dtype="category")
    frame.index = [f"simulated_cell_{i}" for i in range(len(frame))]
    var = pd.DataFrame(index=[f"SIMREADOUT{i:03d}" for i in range(screen.genes)])
    x = scipy.sparse.csr_matrix(np.concatenate(rows).astype(np.float32))
    return anndata.AnnData(x, obs=frame, var=var, uns={"log1p": {}, "simulated": True})


def template(data: anndata.AnnData, labels: list[str], cells: int = 32) -> anndata.AnnData:
    """Control cells, and copies of them under each label: the input of `state tx infer`."""
    blocks = []
    for _, of_type in data.obs.groupby("cell_type", observed=True):
        controls = data[of_type.index[of_type["target_gene"] == CONTROL]]
        blocks.append(controls.copy())
        for label in labels:
            block = controls[:cells].copy()
            block.obs["target_gene"] = label
            blocks.append(block)
    whole = anndata.concat(blocks, index_unique="-")
    for column in whole.obs:
        whole.obs[column] = whole.obs[column].astype("category")
    return whole


def write_demo(folder: Path, screen: Screen = Screen()) -> None:
    """Write the three files of the demo into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = simulate(screen)
    anndata.settings.allow_write_nullable_strings = False  # cell-load reads none
    data.write_h5ad(folder / "simulated_screen.h5ad")
    labels = [label for label in effects(screen) if label != CONTROL]
    template(data, labels).write_h5ad(folder / "simulated_template.h5ad")
    table = {symbol: torch.from_numpy(vector) for symbol, vector in vectors(screen).items()}
    torch.save(table, folder / "simulated_table.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_demo(arguments.folder)
    print(f"simulated screen written into {arguments.folder}")
