"""Part of bench_gpu.py: proteins a second of ESM2, and peak memory of the GPU.

Models have random weights, made where they are used. Ours is `embed_all`, one sequence at a time.
Its references, on the same weights and proteins: fair-esm's own loop, also one at a time
(bfloat16: autocast), and transformers' EsmModel in padded batches of up to 16,384 tokens, sorted
by length (bfloat16: all of the model).
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import esm
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu_rows import Rows, parser_of_part, say, spread  # noqa: E402
from random_esm2 import human_like, random_model  # noqa: E402

from state_esm_features.embedding import esm2  # noqa: E402
from state_esm_features.embedding.devices import choose_devices  # noqa: E402
from state_esm_features.embedding.embed import embed_all  # noqa: E402

SHAPES = {"8M": (6, 320, 20), "650M": (33, 1280, 20), "3B": (36, 2560, 40)}
PROTEINS = {"8M": 100, "650M": 60, "3B": 20}
TINY = {name: (layers // 6, 40, 4) for name, (layers, _, _) in SHAPES.items()}
BATCH_TOKENS = 16_384
REFERENCE = "fair-esm"
Embed = Callable[[Sequence[str]], torch.Tensor]
"""Vectors of proteins, float32 (proteins, width), on the CPU."""


def fair_esm_loop(fair: esm.ESM2, device: torch.device, dtype: torch.dtype) -> Embed:
    """fair-esm's extract.py with a batch of one; half precision: autocast."""
    convert = fair.alphabet.get_batch_converter()
    last = fair.num_layers

    @torch.inference_mode()
    def mean(sequence: str) -> torch.Tensor:
        tokens = convert([("", sequence)])[2].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            states = fair(tokens, repr_layers=[last])["representations"][last]
        return states[0, 1:-1].float().mean(0).cpu()

    return lambda sequences: torch.stack([mean(sequence) for sequence in sequences])


def our_model(fair: esm.ESM2, device: torch.device, dtype: torch.dtype) -> esm2.Esm2:
    """Our model, which takes the weights from memory in place of a file."""
    shape = (fair.num_layers, fair.embed_dim, fair.attention_heads, fair.token_dropout)
    checkpoint = esm2.Checkpoint("random", Path("in memory"), "", *shape)
    content = (None, fair.state_dict())
    with mock.patch.object(esm2, "read_checkpoint", lambda path: content):
        return esm2.Esm2(checkpoint, fair.num_layers, device, dtype)


def on_devices(fair: esm.ESM2, devices: Sequence[torch.device], dtype: torch.dtype) -> Embed:
    """What the command does with proteins that are in no table and not in the cache."""
    models = [our_model(fair, device, dtype) for device in devices]

    def embed(sequences: Sequence[str]) -> torch.Tensor:
        vectors = dict(embed_all(models, sequences, "window"))
        return torch.stack([vectors[sequence] for sequence in sequences])

    return embed


def ours(fair: esm.ESM2, device: torch.device, dtype: torch.dtype) -> Embed:
    """On one device."""
    return on_devices(fair, [device], dtype)


def several(device: torch.device) -> list[torch.device]:
    """All devices of --device, if there are several; of a CPU two, only to see that it runs."""
    devices, _ = choose_devices(device.type)
    return [device, device] if device.type == "cpu" else devices[1:] and devices


def ours_on_all(fair: esm.ESM2, device: torch.device, dtype: torch.dtype) -> Embed:
    """On every device of the machine."""
    return on_devices(fair, several(device), dtype)


def batches(sequences: Sequence[str]) -> Iterator[list[int]]:
    """Numbers of sequences, the longest first, of at most BATCH_TOKENS with their padding."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    while order:
        size = max(1, BATCH_TOKENS // (len(sequences[order[0]]) + 2))
        yield order[:size]
        order = order[size:]


def padded_batches(fair: esm.ESM2, device: torch.device, dtype: torch.dtype) -> Embed:
    """transformers' EsmModel, which is also the module within ours, in batches with padding."""
    model = our_model(fair, device, torch.float32).model.to(dtype)
    convert = fair.alphabet.get_batch_converter()

    @torch.inference_mode()
    def embed(sequences: Sequence[str]) -> torch.Tensor:
        found = torch.empty(len(sequences), fair.embed_dim)
        for numbers in batches(sequences):
            tokens = convert([("", sequences[i]) for i in numbers])[2].to(device)
            mask = tokens != fair.padding_idx
            states = model(tokens, attention_mask=mask.long()).last_hidden_state
            mask &= (tokens != fair.cls_idx) & (tokens != fair.eos_idx)
            total = (states.float() * mask[..., None]).sum(1)
            found[numbers] = (total / mask.sum(1, keepdim=True)).cpu()
        return found

    return embed


BUILD = {
    REFERENCE: fair_esm_loop,
    "ours": ours,
    "ours on all devices": ours_on_all,
    "padded batches": padded_batches,
}


class GpuMemory:
    """Peak memory of tensors since the start, without what was there (a model in use counts)."""

    def __init__(self, device: torch.device, in_use: int = 0) -> None:
        self.on = device.type == "cuda"
        if self.on:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() - in_use

    def peak(self) -> dict[str, float]:
        if not self.on:
            return {}
        return {"peak GPU GB": round((torch.cuda.max_memory_allocated() - self.before) / 1e9, 2)}


def measure(
    embed: Embed, sequences: Sequence[str], rounds: int
) -> tuple[torch.Tensor, list[float]]:
    """Vectors, and proteins a second of each round; the results are on the CPU, so all is done."""
    embed(sorted(sequences, key=len)[:: max(1, len(sequences) // 4)])  # loads kernels
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        vectors = embed(sequences)
        rates.append(len(sequences) / (time.perf_counter() - start))
    return vectors, rates


def size_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def compare(
    rows: Rows, name: str, fair: esm.ESM2, device: torch.device, sequences: list[str], rounds: int
) -> None:
    """A row of each implementation and type, beside fair-esm's of that type."""
    exact: torch.Tensor | None = None
    case = f"ESM2 {name}, {len(sequences)} proteins"
    for dtype in (torch.float32, torch.bfloat16):
        reference = 0.0
        for run, build in BUILD.items():
            if build is ours_on_all and not several(device):
                continue
            label = f"{run}, {str(dtype).removeprefix('torch.')}"
            with rows.guarded(case, label):
                rows.require_time()
                memory = GpuMemory(device, size_of(fair) if run == REFERENCE else 0)
                vectors, rates = measure(build(fair, device, dtype), sequences, rounds)
                found = {"speed": spread(rates, "proteins/s"), "rates": rates, **memory.peak()}
                exact = vectors if exact is None else exact
                reference = reference or statistics.median(rates) if run == REFERENCE else reference
                if reference:
                    found[f"times {REFERENCE}"] = round(statistics.median(rates) / reference, 2)
                furthest = (vectors - exact).abs().max().item()
                found["largest difference"] = f"{furthest:.1e}"
                cosine = torch.cosine_similarity(vectors.double(), exact.double()).min().item()
                rows.add(case, label, **found, **{"least cosine": round(cosine, 7)})


def main() -> None:
    parser = parser_of_part(__doc__)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows, device = Rows(args.rows, "embed", args.until), torch.device(args.device)
    for name in args.models:
        shape = (TINY if args.tiny else SHAPES)[name]
        sequences = human_like(6, 60) if args.tiny else human_like(PROTEINS[name], 1022)
        with rows.guarded(f"ESM2 {name}", "random weights"):
            rows.require_time()
            start = time.perf_counter()
            with device:
                fair = random_model(*shape).requires_grad_(False)
            say(f"embed: ESM2 {name} made in {time.perf_counter() - start:.1f} s")
            compare(rows, name, fair, device, sequences, args.rounds)
            del fair


if __name__ == "__main__":
    main()
