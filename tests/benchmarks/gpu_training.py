"""Part of bench_gpu.py: steps a second of state_sm, `state tx train` beside our command.

Six simulated files of 8,000 cells x 18,080 genes, 3,000 values a cell, uncompressed, unsorted. Each
run is a process that trains as from a shell, with a callback of this file added through the same
seam as ours: it notes the moments of the first and last timed step, the seconds that Lightning
waited for batches between them, and the peak memory of the GPU. What the GPU does meanwhile is
sampled from here. Runs that read row by row take fewer steps than those with --fast-loading.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_loader import FILES, Size, write_features, write_screen, write_toml  # noqa: E402
from gpu_rows import Rows, on_device, parser_of_part, run_for, say  # noqa: E402

CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Setting:
    """Sizes of data and runs.

    Attributes
    ----------
    workers
        Loader processes; stock has 12.
    warm_up, steps, fast_steps
        Steps before the timed ones, timed ones, and those with --fast-loading. Workers finish
        about together, so whole rounds of them are timed.
    model
        Overrides of the stock configuration.
    """

    size: Size = field(default_factory=lambda: Size(8_000, perturbations=50))
    workers: int = min(12, CORES)
    warm_up: int = 12
    steps: int = 36
    fast_steps: int = 144
    model: tuple[str, ...] = ()

    def timed(self, run: str) -> int:
        return self.fast_steps if "--fast-loading" in run else self.steps


def tiny() -> Setting:
    """A few cells and a small State."""
    from run_demo import SMALL_MODEL

    model = ("model.kwargs.cell_set_len=8", "training.batch_size=4")
    small = {word.split("=")[0]: word for word in (*SMALL_MODEL, *model)}
    return Setting(Size(120, 200, 40, 5, 16), 1, 2, 4, 8, tuple(small.values()))


RUNS = (
    ("state tx train", "float32"),
    ("ours", "float32"),
    ("ours --fast-loading", "float32"),
    ("state tx train", "bf16-mixed"),
    ("ours --fast-loading", "bf16-mixed"),
    ("state tx train, again", "float32"),
    ("ours", "bf16-mixed"),
)
"""In the order of what is wanted most. float32: State has torch round products to TF32."""

COMPARED = ("ours, float32", "state tx train, again, float32")
"""Runs of as many steps as stock's first one."""


def write_data(folder: Path, size: Size) -> None:
    """raw/file0.h5 ..., raw.toml, features.pt."""
    start = time.perf_counter()
    (folder / "raw").mkdir(parents=True)
    paths = [folder / "raw" / f"file{i}.h5" for i in range(FILES)]
    with ProcessPoolExecutor(min(FILES, CORES)) as pool:
        write = partial(write_screen, compression=None, size=size)
        list(pool.map(write, paths, range(FILES)))
    write_toml(folder, "raw")
    write_features(folder, size)
    written = sum(path.stat().st_size for path in paths) / 1e6
    say(f"train: {written:,.0f} MB of data written in {time.perf_counter() - start:.1f} s")


def name_of(run: str, precision: str) -> str:
    return "_".join((run + " " + precision).replace(",", "").replace("-", "").split())


def words_of(run: str, precision: str, setting: Setting) -> list[str]:
    """A command line, as one would type it after `python`."""
    steps = setting.warm_up + setting.timed(run)
    name = name_of(run, precision)
    if run.startswith("ours"):
        words = ["train_with_esm_features.py", "--config=raw.toml", "--pert-features=features.pt"]
        words += [f"--num-workers={setting.workers}", f"--max-steps={steps}"]
        words += ["--val-freq=100000", f"--name={name}"]
        words += ["--fast-loading=sorted"] if "--fast-loading" in run else []
        words += [f"--training-precision={precision}"] if precision != "float32" else []
        return [*words, *setting.model]
    kwargs = {
        "toml_config_path": "raw.toml",
        "perturbation_features_file": "features.pt",
        "pert_col": "target_gene",
        "control_pert": "non-targeting",
        "batch_col": "batch_var",
        "num_workers": setting.workers,
    }
    words = ["state", "tx", "train", "model=state_sm", "use_wandb=false", "output_dir=runs"]
    words += [f"name={name}", f"training.max_steps={steps}", "training.val_freq=100000"]
    return [*words, *(f"data.kwargs.{k}={v}" for k, v in kwargs.items()), *setting.model]


# ---------------------------------------------------------------------------------------------
# Within the process that trains
# ---------------------------------------------------------------------------------------------


def make_probe(report: Path, warm_up: int) -> Any:
    """A Lightning callback that writes what it saw of the timed steps into a JSON file."""
    import torch
    from lightning.pytorch.callbacks import Callback

    class Probe(Callback):
        waited = fetching = begin = 0.0

        def on_train_start(self, trainer: Any, module: Any) -> None:
            """Lightning's profiler, whose ever it is, is told of every wait for a batch."""
            profiler = trainer.profiler
            start, stop = profiler.start, profiler.stop

            def start_clock(action: str) -> None:
                start(action)
                if action.endswith("_next"):
                    self.fetching = time.monotonic()

            def stop_clock(action: str) -> None:
                if action.endswith("_next"):
                    self.waited += time.monotonic() - self.fetching
                stop(action)

            profiler.start, profiler.stop = start_clock, stop_clock

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == warm_up:
                self.begin, self.waited = self.moment(), 0.0
            elif trainer.global_step == trainer.max_steps:
                self.write(self.begin, self.moment(), trainer.max_steps - warm_up)

        def moment(self) -> float:
            """Now, with all that was asked of the GPU done."""
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.monotonic()

        def write(self, begin: float, end: float, steps: int) -> None:
            found = {"begin": begin, "end": end, "steps": steps, "waited": self.waited}
            if torch.cuda.is_available():
                found["peak"] = torch.cuda.max_memory_allocated()
            report.write_text(json.dumps(found))

    return Probe()


def run_probed(report: Path, warm_up: int, words: list[str]) -> int:
    """One of the two command lines with the probe in it."""
    from state_esm_features.training.loop import appended_callbacks

    with appended_callbacks([make_probe(report, warm_up)]):
        if words[0] == "state":
            import state.__main__

            sys.argv = words
            state.__main__.main()
            return 0
        import train_with_esm_features

        return train_with_esm_features.main(words[1:])


# ---------------------------------------------------------------------------------------------
# Beside it
# ---------------------------------------------------------------------------------------------


class GpuUse:
    """Busy share and memory of the first GPU, by moment, sampled in a thread; none without NVML."""

    def __init__(self, device: str) -> None:
        self.samples: list[tuple[float, float, float]] = []
        self.done = threading.Event()
        if device == "cpu":
            self.done.set()
        self.thread = threading.Thread(target=self._sample)

    def __enter__(self) -> GpuUse:
        if not self.done.is_set():
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()

    def _sample(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            while not self.done.wait(0.1):
                busy = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
                used = pynvml.nvmlDeviceGetMemoryInfo(gpu).used
                self.samples.append((time.monotonic(), busy, used))
        except Exception as error:  # no NVML, or a driver that does not answer
            say(f"train: the GPU's busy share is not measured: {type(error).__name__}: {error}")

    def between(self, begin: float, end: float) -> dict[str, Any]:
        inside = [(busy, used) for moment, busy, used in self.samples if begin <= moment <= end]
        if not inside:
            return {}
        busy = statistics.mean(busy for busy, _ in inside)
        used = max(used for _, used in inside) / 1e9
        return {"GPU busy": f"{busy:.0f}%", "GPU GB in use": round(used, 2)}


PATIENCE = 150
"""Seconds after which a run is given up."""


def train(run: str, precision: str, folder: Path, device: str, setting: Setting) -> dict[str, Any]:
    """Train once; what the probe and the GPU said of the timed steps."""
    report = folder / f"{name_of(run, precision)}.json"
    words = words_of(run, precision, setting)
    command = [sys.executable, __file__, "--probed", str(report), str(setting.warm_up), *words]
    # every run begins without a validation; huge pages are what our command sets by itself
    env = on_device(device) | {"PL_TRAINER_NUM_SANITY_VAL_STEPS": "0"}
    env |= {"THP_MEM_ALLOC_ENABLE": "1"} if run.startswith("ours") else {}
    stock_in_half = precision != "float32" and not run.startswith("ours")
    env |= {"PL_TRAINER_PRECISION": precision} if stock_in_half else {}
    start = time.monotonic()
    with GpuUse(device) as use, report.with_suffix(".log").open("w") as log:
        code = run_for(PATIENCE, command, cwd=folder, env=env, stdout=log, stderr=log)
    if code or not report.exists():
        last = report.with_suffix(".log").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"exit code {code}: {''.join(last)}")
    seen = json.loads(report.read_text())
    seconds = seen["end"] - seen["begin"]
    found = {"steps/s": round(seen["steps"] / seconds, 3), "timed steps": seen["steps"]}
    found |= use.between(seen["begin"], seen["end"])
    found["waiting for data"] = f"{seen['waited'] / seconds:.0%}"
    if "peak" in seen:
        found["peak GPU GB"] = round(seen["peak"] / 1e9, 2)
    return found | {"command s": round(time.monotonic() - start, 1)}


def weights(folder: Path, run: str) -> dict[str, Any]:
    import torch

    path = folder / "runs" / name_of(run, "float32") / "checkpoints" / "final.ckpt"
    content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)  # written above
    return content["state_dict"]


def compare_weights(rows: Rows, folder: Path, run: str) -> None:
    """After the same steps: ours beside stock's, or stock's beside itself."""
    case, label = "weights of state_sm after these steps", f"{run}, beside state tx train"
    with rows.guarded(case, label):
        theirs, own = weights(folder, "state tx train"), weights(folder, run)
        if theirs.keys() != own.keys():
            raise ValueError("not the same weights")
        furthest = max((theirs[n].double() - own[n].double()).abs().max() for n in own)
        rows.add(case, label, **{"largest difference": f"{float(furthest):.1e}"})


def main() -> None:
    parser = parser_of_part(__doc__)
    parser.add_argument("--write", action="store_true", help="only write the data")
    args = parser.parse_args()
    setting = tiny() if args.tiny else Setting()
    if args.write or not (args.folder / "features.pt").exists():
        write_data(args.folder, setting.size)
    if args.write:
        return
    rows = Rows(args.rows, "train", args.until)
    cells, genes = FILES * setting.size.cells, setting.size.genes
    case = f"state_sm, {genes:,} genes, {cells:,} cells, {setting.workers} workers"
    of_stock: dict[str, float] = {}
    for run, precision in RUNS:
        label = f"{run}, {precision}"
        say(f"train: {label} begins")
        with rows.guarded(case, label):
            rows.require_time()
            found = train(run, precision, args.folder, args.device, setting)
            if run == "state tx train":
                of_stock[precision] = found["steps/s"]
            if precision in of_stock:
                found["times state tx train"] = round(found["steps/s"] / of_stock[precision], 2)
            rows.add(case, label, **found)
            if label in COMPARED:
                compare_weights(rows, args.folder, run)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probed"]:
        sys.exit(run_probed(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
    main()
