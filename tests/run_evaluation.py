"""`evaluate-esm-features` on the demo's screen, or on the cells of Norman 2019 and McFaline 2023.

    python tests/run_evaluation.py
    python tests/run_evaluation.py --norman FILE.h5ad [--table TABLE] [any option of the command]

State is made small by configuration, as in the demo, and trains for 400 steps; --planted is given.

Norman/McFaline: CRISPR activation in k562 (Norman 2019), interference in A172, T98G and U87MG
(McFaline-Figueroa 2023); a gene has one vector for both. Nine genes are perturbed in all four, in
k562 nine more and 15 combinations A+B. Three of the nine, and three that only k562 has, are unseen.
Written into demo/evaluation or demo/norman.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo_data import write_demo  # noqa: E402
from run_demo import FOLDER, SMALL_MODEL, TABLE  # noqa: E402

from state_esm_features.evaluation.__main__ import main as evaluate  # noqa: E402
from state_esm_features.files import sha256_of  # noqa: E402

NEVER_TRAINED = ["MAP3K21", "MAP4K5", "PLK4"]
HELD_OUT = {
    "k562": ["HK2", "KMT2A", "NIT1", *NEVER_TRAINED, "MAP2K6", "SGK1"],
    "A172": [*NEVER_TRAINED, "MAP2K3", "MAP2K6", "MAP4K3"],
    "T98G": [*NEVER_TRAINED, "MAP4K3", "MAPK1", "SGK1"],
    "U87MG": [*NEVER_TRAINED, "MAP2K3", "MAPK1", "TGFBR2"],
}
"""Test genes of Norman/McFaline. Unseen: NEVER_TRAINED, and HK2, KMT2A, NIT1, which only k562 has;
the others train in another cell type."""

STEPS = ("--max-steps", "400", "--batch-size", "8")


def demo() -> list[str]:
    """Options for the simulated screen, which is made unless it is there."""
    if not TABLE.exists():  # it is written last
        write_demo(FOLDER)
    config = ROOT / "configs" / "demo.toml"
    words = ["--config", str(config), "--esm-embeddings", str(TABLE), "--num-workers", "1"]
    return [*words, "--fast-loading", "dense", "--output-dir", str(FOLDER / "evaluation")]


def norman(data: Path, folder: Path) -> list[str]:
    """Options for the Norman/McFaline cells; a copy that cell-load can read, and its TOML."""
    import anndata

    if not data.is_file():
        sys.exit(f"error: no file {data}")
    cells = anndata.read_h5ad(data)
    columns = {"perturbation", "cell_type"} <= set(cells.obs)
    if not (columns and set(HELD_OUT) <= set(cells.obs["cell_type"])):
        sys.exit(
            f"error: {data} is not the Norman/McFaline file: its cells are to have obs columns "
            f"perturbation and cell_type, with the cell types {', '.join(HELD_OUT)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    toml, copy = folder / "norman.toml", folder / f"norman-{sha256_of(data)[:8]}.h5ad"
    if not copy.exists():
        cells.obs.index.name = cells.var.index.name = None  # where cell-load looks for gene names
        cells.write_h5ad(copy)
    lines = ["[datasets]", f"norman = {json.dumps(str(copy.resolve()))}"]
    lines += ["[training]", 'norman = "train"']
    for cell_type, test in HELD_OUT.items():
        val = ["IER5L", "TMSB4X"] if cell_type == "k562" else []
        lines += [f'[fewshot."norman.{cell_type}"]', f"val = {val}", f"test = {test}"]
    toml.write_text("\n".join(lines) + "\n")
    words = ["--config", str(toml), "--pert-col", "perturbation", "--control-pert", "control"]
    return [*words, "--batch-col", "cell_type", "--output-dir", str(folder / "evaluation")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--norman", type=Path, metavar="FILE.h5ad", help="evaluate on these cells")
    parser.add_argument("--table", metavar="TABLE", help="their vectors (default: Arc's table)")
    arguments, more = parser.parse_known_args()
    if arguments.norman:
        words = norman(arguments.norman, FOLDER / "norman")
        words += ["--esm-embeddings", arguments.table] if arguments.table else []
    else:
        words = demo()
    return evaluate([*words, "--planted", *STEPS, *more, *SMALL_MODEL])


if __name__ == "__main__":
    sys.exit(main())
