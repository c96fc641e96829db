"""Mistakes in a cell-load TOML, and what both scripts say to them: all they print on stderr."""

from __future__ import annotations

from pathlib import Path

SCREEN = '[datasets]\nsim = "screen.h5ad"\n'
TRAIN = f'{SCREEN}[training]\nsim = "train"\n'
NO_DATASET = "c.toml: [training], [zeroshot] and [fewshot] name no dataset"
UNREAD = (
    "warning: dataset 'sim' is in [datasets] but not in [training], [zeroshot] or [fewshot]: "
    "not read\n"
)

# (content of c.toml, the error)
_MISTAKES = [
    # not TOML
    (
        '[datasets]\nsim = "screen.h5ad\n[training]\n',
        "c.toml, line 2, column 19: Unbalanced quotes",
    ),
    (
        '[datasets]\nsim = "screen.h5ad"\n[training\nsim = "train"\n',
        "c.toml, line 3, column 1: Key group not on a line by itself.",
    ),
    (
        '[datasets]\nsim = "screen.h5ad"\nsim = "again.h5ad"\n',
        "c.toml, line 3, column 1: Duplicate keys!",
    ),
    (
        "[datasets]\nsim = screen.h5ad\n",
        "c.toml, line 2, column 1: This float doesn't have a leading digit",
    ),
    (
        '[datasets]\nsim = "\xff"\n',
        "c.toml is not valid TOML: 'utf-8' codec can't decode byte 0xff in position 18: invalid "
        "start byte",
    ),
    # sections
    (
        f'{TRAIN}[zero-shot]\n"sim.simB" = "test"\n',
        "c.toml: unknown section [zero-shot] (did you mean zeroshot, fewshot?)",
    ),
    (
        f'{TRAIN}[trainning]\n"sim.simB" = "test"\n',
        "c.toml: unknown section [trainning] (did you mean training?)",
    ),
    (
        f'{TRAIN}[few_shot]\n"sim.simB" = "test"\n',
        "c.toml: unknown section [few_shot] (did you mean fewshot, zeroshot?)",
    ),
    (
        'datasets = "screen.h5ad"\n',
        "c.toml: [datasets] must be a table, e.g. [datasets] on a line of its own",
    ),
    (
        f'training = "sim"\n{SCREEN}',
        "c.toml: [training] must be a table, e.g. [training] on a line of its own",
    ),
    (
        f'zeroshot = "test"\n{TRAIN}',
        "c.toml: [zeroshot] must be a table, e.g. [zeroshot] on a line of its own",
    ),
    # datasets and training
    (
        '[datasets]\nsim = ["screen.h5ad"]\n[training]\nsim = "train"\n',
        "c.toml: [datasets] sim must be a path in quotes, got ['screen.h5ad']",
    ),
    (
        f'{SCREEN}[training]\nsim = "val"\n',
        "c.toml: [training] sim = 'val': the only value is \"train\"",
    ),
    (
        f'{SCREEN}[training]\nsim = "trian"\n',
        "c.toml: [training] sim = 'trian': the only value is \"train\"",
    ),
    (
        f"{SCREEN}[training]\nsim = true\n",
        'c.toml: [training] sim = True: the only value is "train"',
    ),
    (
        '[training]\nsim = "train"\n',
        "c.toml: dataset 'sim' is used but has no path under [datasets]",
    ),
    (
        f'{SCREEN}[training]\nsmi = "train"\n',
        "c.toml: dataset 'smi' is used but has no path under [datasets] (did you mean sim?)",
    ),
    (
        f'{TRAIN}smi = "train"\n',
        "c.toml: dataset 'smi' is used but has no path under [datasets] (did you mean sim?)",
    ),
    (
        f'{TRAIN}[zeroshot]\n"smi.simA" = "test"\n',
        "c.toml: dataset 'smi' is used but has no path under [datasets] (did you mean sim?)",
    ),
    (
        f'{TRAIN}[zeroshot]\n"other.k562" = "test"\n',
        "c.toml: dataset 'other' is used but has no path under [datasets]",
    ),
    (SCREEN, NO_DATASET),
    ("", NO_DATASET),
    # zeroshot
    (
        f'{TRAIN}[zeroshot]\nsim.simA = "test"\n',
        'c.toml: [zeroshot] sim.simA needs quotes around the whole name: "sim.simA" = "test"',
    ),
    (
        f'{TRAIN}[zeroshot]\nsim = "test"\n',
        'c.toml: [zeroshot] "sim" names no cell type: write "sim.CELL_TYPE"',
    ),
    (
        f'{TRAIN}[zeroshot]\n"sim.simA" = "tset"\n',
        "c.toml: [zeroshot] \"sim.simA\" = 'tset': unknown split, use val or test",
    ),
    (
        f'{TRAIN}[zeroshot]\n"sim.simA" = 3\n',
        'c.toml: [zeroshot] "sim.simA" = 3: unknown split, use val or test',
    ),
    (
        f'{TRAIN}[zeroshot."sim.simA"]\ntest = ["SIM001"]\n',
        "c.toml: [zeroshot] \"sim.simA\" = {'test': ['SIM001']} is not understood",
    ),
    # fewshot
    (
        f'{TRAIN}[fewshot.sim.simA]\ntest = ["SIM001"]\n',
        'c.toml: [fewshot] sim.simA needs quotes around the whole name: [fewshot."sim.simA"]',
    ),
    (
        f'{TRAIN}[fewshot.sim]\ntest = ["SIM001"]\n',
        'c.toml: [fewshot] "sim" names no cell type: write "sim.CELL_TYPE"',
    ),
    (
        f'{TRAIN}[fewshot]\n"sim.simA" = "test"\n',
        "c.toml: [fewshot] \"sim.simA\" = 'test' is not understood",
    ),
    (
        f'{TRAIN}[fewshot."sim.simA"]\ntset = ["SIM001"]\n',
        'c.toml: [fewshot."sim.simA"] tset: unknown split, use val or test',
    ),
    (
        f'{TRAIN}[fewshot."sim.simA"]\ntest = "SIM001"\n',
        'c.toml: [fewshot."sim.simA"] test must be a list of labels in quotes',
    ),
    (
        f'{TRAIN}[fewshot."sim.simA"]\nval = [1, 2]\n',
        'c.toml: [fewshot."sim.simA"] val must be a list of labels in quotes',
    ),
    # several, listed together
    (
        f'{SCREEN}[training]\nsim = "yes"\nother = "train"\n[zeroshot]\nsim.simA = "test"\n'
        '"sim.simB" = "tset"\n',
        "4 problems:\n"
        "  - c.toml: [training] sim = 'yes': the only value is \"train\"\n"
        '  - c.toml: [zeroshot] sim.simA needs quotes around the whole name: "sim.simA" = "test"\n'
        "  - c.toml: [zeroshot] \"sim.simB\" = 'tset': unknown split, use val or test\n"
        "  - c.toml: dataset 'other' is used but has no path under [datasets]",
    ),
]

TOML_MISTAKES = [
    (text, (UNREAD if text == SCREEN else "") + f"error: {error}\n") for text, error in _MISTAKES
]
"""(content of c.toml, everything on stderr), to parametrise a test of either script."""


def write_mistake(path: Path, text: str) -> None:
    """Write a content of `TOML_MISTAKES`; as Latin-1, so that \\xff is no UTF-8."""
    path.write_bytes(text.encode("latin-1"))
