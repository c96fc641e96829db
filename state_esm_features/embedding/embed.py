"""From sequences to vectors: windows, pooling, precision, all cores and GPUs.

The encoder itself stands in `esm2`, which devices there are in `devices`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from state_esm_features.console import Bar, InputError, announce, count, some, warn
from state_esm_features.embedding.cache import Cache, open_cache
from state_esm_features.embedding.devices import OutOfMemory, choose_devices, memory_of, slow_in
from state_esm_features.embedding.downloads import weights_path
from state_esm_features.embedding.esm2 import (
    ENCODER,
    Checkpoint,
    Esm2,
    attention_without_plans,
    open_checkpoint,
)
from state_esm_features.embedding.fasta import Proteins, Recipe, windows
from state_esm_features.embedding.tables import Table
from state_esm_features.option_groups import ESM2_WIDTHS, WINDOW, SequenceOptions

if TYPE_CHECKING:
    import torch


def embed(model: Esm2, sequence: str, long: str, stop: threading.Event) -> torch.Tensor:
    """Mean over the residues of a protein, float32 (width,); a window at a time in memory.

    Where windows overlap, a residue's vector is the mean of what they say of it.
    """
    import torch

    pieces = windows(len(sequence), long)
    seen = torch.zeros(len(sequence))
    for start, end in pieces:
        seen[start:end] += 1
    total = torch.zeros(model.width, dtype=torch.float64)
    with torch.inference_mode():
        for start, end in pieces:
            if stop.is_set():
                raise CancelledError
            residues = model(sequence[start:end])
            share = 1 / seen[start:end, None].to(residues.device)
            total += (residues * share).sum(0).cpu()  # MPS has no float64
    vector = (total / seen.count_nonzero()).float()
    if not vector.isfinite().all():
        raise InputError(
            "ESM2 gave NaN or infinity for a protein that starts with "
            f"{sequence[:20]}; try --precision float32"
        )
    return vector


def choose_recipe(checkpoint: Checkpoint, options: SequenceOptions) -> Recipe:
    """What the command line and the device make of a model.

    `auto` is bfloat16 on a GPU made for it, float32 everywhere else.
    """
    import torch

    layer = checkpoint.layers if options.layer is None else options.layer
    precision, [device, *_] = options.precision, choose_devices(options.device)[0]
    if precision == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bfloat16" if on_gpu else "float32"
    return Recipe(checkpoint.sha256, layer, "mean", options.long, precision, ENCODER)


def embed_all(
    models: Sequence[Esm2], sequences: Sequence[str], long: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(sequence, vector) of each as it is finished, the longest begun first.

    On a CPU every core has a protein of its own: small matrices do not keep many cores busy. A GPU
    has one at a time, on its own copy of the model.

    Raises
    ------
    OutOfMemory
        Names the device.
    """
    import torch

    cores, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    seats = [m for m in models for _ in range(cores if m.device.type == "cpu" else 1)]
    seats = seats[: len(sequences)]
    free: queue.SimpleQueue[Esm2] = queue.SimpleQueue()
    for model in seats:
        free.put(model)
    stop = threading.Event()

    def job(sequence: str) -> torch.Tensor:
        model = free.get()
        try:
            with memory_of(model.device):
                return embed(model, sequence, long, stop)
        finally:
            free.put(model)

    # State's training leaves "medium" for its process (a notebook): float32 may then be less
    torch.set_float32_matmul_precision("highest")
    # one thread each, always: the last bit of a vector may differ with the number of threads
    pool = ThreadPoolExecutor(len(seats), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with attention_without_plans({m.device.type for m in models}):
            longest_first = sorted(sequences, key=len, reverse=True)
            jobs = {pool.submit(job, s): s for s in longest_first}
            for done in as_completed(jobs):
                yield jobs[done], done.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
        torch.set_float32_matmul_precision(matmul)


def say_computed(genes: Sequence[str], tables: Sequence[Table], model: str) -> None:
    """Which genes no table has, before weights are looked for; a FASTA file may be there only to
    name the keys of a table."""
    if not tables:
        return
    text = f"{count(len(genes), 'gene')} in no table, to compute with {model} from --fasta"
    named_by = {namer.origin["kind"] for table in tables for namer in table.keys.named_by}
    if "fasta" not in named_by:
        announce(f"{text}: {some(genes)}")
        return
    warn(
        f"{text}: {some(genes)}. If --fasta is only to name the keys of the table, take the "
        "records of these genes out of it, or name the keys with --aliases or --hgnc"
    )


def find_checkpoint(
    genes: Sequence[str], tables: Sequence[Table], options: SequenceOptions, dry_run: bool
) -> Checkpoint | None:
    """The model that computes `genes`, as wide as the tables; None if a dry run has no weights."""

    def check_width(width: int | None) -> None:
        if tables and width not in (None, tables[0].width):
            fitting = [m for m, w in ESM2_WIDTHS.items() if w == tables[0].width]
            instead = ", or leave the table out"
            if tables[0].keys.named_by:
                instead = ", or, if --fasta is to name the keys only, take their records out of it"
            raise InputError(
                f"{count(len(genes), 'gene')} not in {tables[0].path} ({some(genes)}) would be "
                f"computed with {options.esm_model}, which gives {width:,} values a gene; the "
                f"table has {tables[0].width:,}. Choose an --esm-model of that width"
                + (f" ({fitting[0]})" if fitting else "")
                + instead
            )

    check_width(ESM2_WIDTHS.get(options.esm_model))  # before gigabytes are downloaded
    say_computed(genes, tables, options.esm_model)
    path = weights_path(options.esm_model, dry_run)
    if path is None:
        return None
    checkpoint = open_checkpoint(options.esm_model, path)
    check_width(checkpoint.width)
    if options.layer is not None and not 0 <= options.layer <= checkpoint.layers:
        raise InputError(
            f"--layer {options.layer}: {options.esm_model} has layers 0 (embeddings) to "
            f"{checkpoint.layers}"
        )
    layer = checkpoint.layers if options.layer is None else options.layer
    for table in tables:
        if table.part.get("layer", layer) != layer:
            raise InputError(
                f"{table.path} holds layer {table.part['layer']} of its model, and "
                f"{options.esm_model} would compute layer {layer}; choose one for both with "
                "--layer, or leave the table out"
            )
    return checkpoint


def embed_genes(
    genes: Sequence[str], proteins: Proteins, checkpoint: Checkpoint, for_run: bool
) -> dict[str, torch.Tensor]:
    """{gene: mean vector of its proteins, float32 (width,)}; each sequence is embedded once.

    Raises
    ------
    InputError
        The device is not there or out of memory, or a vector is not finite.
    """
    import torch

    options = proteins.options
    recipe = choose_recipe(checkpoint, options)
    proteins.recipe, proteins.width = recipe, checkpoint.width
    sequences = list(dict.fromkeys(p.sequence for gene in genes for p in proteins[gene]))
    long = sum(len(s) > WINDOW for s in sequences)
    if long and options.long == "truncate":
        warn(f"{count(long, 'protein')} cut after {WINDOW:,} residues by --long truncate")
    cache = open_cache(options)
    vectors = cache.read({s: recipe.key(s) for s in sequences})
    missing = [s for s in sequences if s not in vectors]
    devices, said = choose_devices(options.device)
    devices = devices[: len(missing) or 1]
    if missing and said:
        warn(said)
    announce(
        f"{count(len(sequences), 'protein')} of {count(len(genes), 'gene')}: {len(vectors):,} in "
        f"the cache, {len(missing):,} to compute with {options.esm_model} on "
        f"{some(map(str, devices), len(devices))} in {recipe.precision}"
    )
    if missing:
        vectors |= compute(missing, checkpoint, recipe, options, devices, cache, for_run)
    return {
        gene: torch.stack([vectors[p.sequence] for p in proteins[gene]]).double().mean(0).float()
        for gene in genes
    }


def compute(
    sequences: Sequence[str],
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: SequenceOptions,
    devices: Sequence[torch.device],
    cache: Cache,
    for_run: bool,
) -> dict[str, torch.Tensor]:
    """{sequence: vector, float32 (width,)}, each kept in the cache as soon as it is there."""
    import torch

    dtype = getattr(torch, recipe.precision)
    if devices[0].type == "cpu" and dtype != torch.float32 and slow_in(dtype):
        choice = "" if for_run else "--precision "
        warn(f"{recipe.precision} is slow on this CPU, {choice}float32 is faster")
    vectors: dict[str, torch.Tensor] = {}
    bar = Bar(sum(map(len, sequences)), "residues", "residue")
    try:
        models = []
        for device in devices:
            with memory_of(device):
                models.append(Esm2(checkpoint, recipe.layer, device, dtype))
        for sequence, vector in embed_all(models, sequences, options.long):
            vectors[sequence] = vector
            cache.put(recipe.key(sequence), vector)
            bar.add(len(sequence), f"{len(vectors):,} of {len(sequences):,} proteins")
    except OutOfMemory as error:
        other = "--device cpu"
        if not for_run:
            other = f"--precision bfloat16, {other} or a smaller --esm-model"
        leave_out = ", leave it out (CUDA_VISIBLE_DEVICES)" if len(devices) > 1 else ""
        raise InputError(
            f"out of memory on {error}, where {options.esm_model} in {recipe.precision} and "
            f"one window of {WINDOW:,} residues must fit; what is finished is kept. Free memory "
            f"there{leave_out}, or choose {other}"
        ) from error
    finally:
        bar.close()
    return vectors
