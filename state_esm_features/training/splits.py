"""What is wrong, or not as one may think, with what a TOML holds out.

Which cell goes to which split is decided in `data`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from state_esm_features.console import Findings, count, did_you_mean, some, them
from state_esm_features.embedding.labels import names_of_no_file
from state_esm_features.training.data import Data


def check_splits(data: Data, found: Findings) -> None:
    """Held-out names that hold nothing out, nothing to train on, nothing to validate on."""
    experiment, files = data.experiment, data.files
    types = {
        d: sorted({t for f in files if f.dataset == d for t in f.cell_types})
        for d in dict.fromkeys(f.dataset for f in files)
    }
    for key in [*experiment.zeroshot, *experiment.fewshot]:
        dataset, _, cell_type = key.partition(".")
        if dataset in types and cell_type not in types[dataset]:
            found.problems.append(
                f"{key!r}: no file of dataset {dataset!r} has the cell type {cell_type!r}"
                f"{did_you_mean(cell_type, types[dataset])}; cell types: {some(types[dataset])}"
            )
    held = _names_held_out(data, types, found)
    found.warnings += held_out_but_trained(data, held)
    found.warnings += cell_types_unread(data)
    if not data.splits["train"]:
        advice = 'name a dataset under [training], e.g. NAME = "train"'
        if any(f.dataset in experiment.training and f.labels for f in files):
            advice = "[zeroshot] and [fewshot] hold out all there are of [training]'s datasets"
        found.problems.append(f"no perturbed cell to train on: {advice}")
    elif not data.splits["val"]:
        found.warnings.append(no_validation_message(data))


def held_out_but_trained(data: Data, held: Collection[str]) -> list[str]:
    """What to say of labels that [fewshot] holds out and training sees all the same.

    `held` are those that it holds out.
    """
    train = data.splits["train"]
    texts = []
    trained = sorted({*held} & train.keys())
    if trained:
        where = [
            f"{f.dataset}.{cell_type}"
            for f, cell_type, splits in data.cell_types_read()
            if not splits["train"].keys().isdisjoint(trained)
        ]
        texts.append(
            f"[fewshot] holds {some(trained)} out, but training sees "
            f"{them(len(trained))} in {some(dict.fromkeys(where))}: not unseen. "
            "For genes that no training cell has, hold them out there too"
        )
    pairs = [x for x in train if "+" in x and not set(x.split("+")).isdisjoint(held)]
    if pairs:
        texts.append(
            f"training has combinations of genes that [fewshot] holds out ({some(pairs)}): these "
            "genes are not unseen. Hold the combinations out too"
        )
    return texts


def cell_types_unread(data: Data) -> list[str]:
    """What to say of cell types that are in no split."""
    cells = Counter[str]()
    for f in data.files:
        for cell_type, labels in f.by_type.items():
            if not data.reads(f.dataset, cell_type):
                cells[f"{f.dataset}.{cell_type}"] += sum(labels.values())
    if not cells:
        return []
    datasets = dict.fromkeys(key.partition(".")[0] for key in cells)
    lines = " and ".join(f'{name} = "train"' for name in datasets)
    return [
        f"{count(len(cells), 'cell type')} not read ({some(cells)}; "
        f"{count(sum(cells.values()), 'cell')}): [zeroshot] and [fewshot] do not name "
        f"{them(len(cells))}, nor [training] the dataset. To train on {them(len(cells))}: "
        f"{lines} under [training]"
    ]


def _names_held_out(data: Data, types: Mapping[str, Sequence[str]], found: Findings) -> set[str]:
    """Labels that [fewshot] holds out of a cell type that is there; notes those without effect."""
    control = data.columns.control
    everything = {label for f in data.files for label in f.labels}
    held, nowhere = set[str](), set[str]()
    elsewhere: dict[str, list[str]] = {}
    for key, kept in data.experiment.fewshot.items():
        named = {*kept.get("val", ()), *kept.get("test", ())}  # a train list holds nothing out
        dataset, _, cell_type = key.partition(".")
        nowhere |= named.difference(everything)
        if cell_type in types.get(dataset, ()):
            held |= named
            of_type = [f.by_type.get(cell_type, {}) for f in data.files if f.dataset == dataset]
            elsewhere[key] = sorted(named.intersection(everything) - {control}.union(*of_type))
        whole = key in data.experiment.zeroshot
        found.warnings += [f'[fewshot."{key}"] {x}' for x in _odd_section(kept, control, whole)]
    found.warnings += labels_elsewhere({key: names for key, names in elsewhere.items() if names})
    if nowhere:
        found.warnings.append(names_of_no_file(sorted(nowhere), everything))
    return held


def labels_elsewhere(elsewhere: Mapping[str, Sequence[str]]) -> list[str]:
    """What to say of {cell type: labels} that [fewshot] holds out where no cell has them."""
    n = sum(map(len, elsewhere.values()))
    if len(elsewhere) == 1:
        [(key, names)] = elsewhere.items()
        where = f'[fewshot."{key}"] names {count(n, "label")} of which this cell type has no cell'
    else:
        names = [f"{name} in {key}" for key, names in elsewhere.items() for name in names]
        where = "[fewshot] names labels of which the cell type has no cell"
    return [f"{where} ({some(names)}): nothing is held out for {them(n)}"] if n else []


def _odd_section(kept: Mapping[str, Sequence[str]], control: str, whole: bool) -> list[str]:
    """What to say of {split: labels} of a cell type, which [zeroshot] holds out `whole` or not."""
    texts = []
    both = set(kept.get("val", ())) & set(kept.get("test", ()))
    if both:
        texts.append(
            f"{some(sorted(both))}: both val and test, so best.ckpt is chosen on cells of the "
            "test. Name each once"
        )
    if control in {*kept.get("val", ()), *kept.get("test", ())}:
        texts.append(
            f"names the control {control!r}, of which cell-load holds nothing out: control cells "
            "go into every split"
        )
    if whole:
        texts.append("has no effect: [zeroshot] holds out the whole cell type")
    return texts


def check_subsets(data: Data, found: Findings) -> None:
    """Without should_yield_control_cells, cell-load crashes on a part without perturbed cells."""
    for f, cell_type, splits in data.cell_types_read():
        if not splits["train"]:
            found.problems.append(
                f"{f.path}: no perturbed cell of {cell_type!r} is left for training, on which "
                "cell-load crashes with data.kwargs.should_yield_control_cells=false; leave it true"
            )


def no_validation_message(data: Data) -> str:
    """Say what follows and what to add: a line that works, with names from the data."""
    if data.splits["test"]:
        what = "cell-load validates on the test cells, so best.ckpt is chosen on them"
    else:
        what = "nothing is validated and no best.ckpt is chosen"
    candidates = [
        (f"{f.dataset}.{cell_type}", list(splits["train"]))
        for f, cell_type, splits in data.cell_types_read()
        if f"{f.dataset}.{cell_type}" not in data.experiment.zeroshot
    ]
    key, labels = max(candidates, key=lambda c: len(c[1]), default=("", []))
    if len(labels) < 2:
        return f"no validation cells: {what}. Keep a cell type or some genes back in the TOML"
    paired = {gene for x in labels if "+" in x for gene in (x, *x.split("+"))}
    labels = [x for x in labels if x not in paired] or labels  # which training would still see
    chosen = ", ".join(json.dumps(x, ensure_ascii=False) for x in labels[: min(2, len(labels) - 1)])
    return (
        f"no validation cells: {what}. Keep some genes back: in the TOML, under "
        f"[fewshot.{json.dumps(key, ensure_ascii=False)}] on a line of its own, val = [{chosen}]"
    )


def split_table(
    splits: Mapping[str, Mapping[str, int]], known_as: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Per split: perturbed cells, perturbations, and which of these training sees, or never does.

    A perturbation of val or test is seen if it is trained anywhere, in another cell type say, or
    if it is `known_as` another one that is.
    """
    row = "{:>9}  {:>13}  {:>25}  {:>25}".format
    trained = {*splits["train"], *known_as}
    rows = [("split", row("cells", "perturbations", "seen in training", "never in training"))]
    for split, labels in splits.items():
        counts = [f"{sum(labels.values()):,}", f"{len(labels):,}"]
        for seen in (True, False):
            group = [n for label, n in labels.items() if (label in trained) == seen]
            text = f"{len(group):,} ({count(sum(group), 'cell')})" if labels else "0"
            counts.append("" if split == "train" else text)
        rows.append((split, row(*counts).rstrip()))
    return rows
