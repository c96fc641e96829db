"""An evaluation of a tiny screen in processes that have the imports done.

The evaluation is a process of its own, and so is every command that it starts, in one process
group, as from a shell: `os.fork` takes the place of starting a Python anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from demo_data import Screen, simulate, vectors
from forks import Fork

TINY = Screen(perturbed=10, families=3, width=8, genes=30, cells=12, controls=24, batches=2)
STEPS = 4
UNSEEN = ["SIM004", "SIM009", "SIM003"]

MODEL = (
    "data.kwargs.output_space=gene",
    "training.lr=0.005",
    "model.kwargs.cell_set_len=8",
    "model.kwargs.hidden_dim=24",
    "model.kwargs.n_encoder_layers=1",
    "model.kwargs.n_decoder_layers=1",
    "model.kwargs.transformer_backbone_kwargs.head_dim=6",
    "model.kwargs.transformer_backbone_kwargs.intermediate_size=48",
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers=1",
)
WORDS = (
    *("--config", "screen.toml", "--esm-embeddings", "table.pt", "--batch-size", "4"),
    *("--num-workers", "0", "--max-steps", str(STEPS), *MODEL),
)

CODE = """
import atexit, os, runpy, signal, sys, threading, traceback


class Child:
    def __init__(self, words, environment, log):
        self.code = None
        if "predict" in words:
            import cell_eval  # once for all children
        self.pid = os.fork()
        if self.pid == 0:
            self.work(words, environment, log)

    def work(self, words, environment, log):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        into = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(into, 1)
        os.dup2(into, 2)
        status = 1
        try:
            if words[1].endswith(".py"):
                sys.argv = list(words[1:])
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                import state.__main__
                assert words[1:4] == ["-P", "-m", "state"]
                sys.argv = list(words[3:])
                state.__main__.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self):
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)


from state_esm_features.evaluation import runs
from state_esm_features.evaluation.__main__ import main

runs.devices = lambda: DEVICES
sys.exit(main(sys.argv[1:], METHODS, Child))
"""


def prepare(folder: Path) -> None:
    """A screen with three genes that are unseen, and a cell type of which only controls train."""
    simulate(TINY).write_h5ad(folder / "screen.h5ad")
    table = {k: torch.from_numpy(v) for k, v in vectors(TINY).items()}
    torch.save(table, folder / "table.pt")
    (folder / "screen.toml").write_text(
        '[datasets]\nsim = "screen.h5ad"\n[training]\nsim = "train"\n'
        '[zeroshot]\n"sim.simB" = "test"\n'
        f'[fewshot."sim.simA"]\ntest = {json.dumps(UNSEEN)}\n'
    )


def evaluation(folder: Path, methods: tuple[str, ...], *words: object, at_once: int = 1) -> Fork:
    """`python -m state_esm_features.evaluation`, begun.

    Parameters
    ----------
    methods
        Those that are compared.
    at_once
        Models that are trained at once, as on so many GPUs.
    """
    devices = [None] if at_once == 1 else [str(i) for i in range(at_once)]
    code = CODE.replace("METHODS", repr(methods)).replace("DEVICES", repr(devices))
    # compiling takes numba longer than it takes cell-eval to compare so few cells without
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    words = ("evaluation", *WORDS, *words)
    return Fork(code, words, folder, environment)
