"""What Lightning's Trainer takes from PL_TRAINER_... variables, as State passes on some arguments
only: the number of machines, the precision, and what the user has set.

Who started the processes stands in `launch`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from state_esm_features.console import InputError
from state_esm_features.training.launch import Ranks, nodes_started
from state_esm_features.training.stock import set_length, wants_cell_type_map
from state_esm_features.training_options import TRAINING_PRECISIONS

PREFIX = "PL_TRAINER_"
NODES, PRECISION = f"{PREFIX}NUM_NODES", f"{PREFIX}PRECISION"

PASSED_BY_STATE = {
    *("accelerator", "devices", "strategy", "max_steps", "check_val_every_n_epoch"),
    *("val_check_interval", "logger", "plugins", "callbacks", "gradient_clip_val"),
    *("accumulate_grad_batches", "use_distributed_sampler", "log_every_n_steps"),
}
"""Arguments of the Trainer that run_tx_train passes (state/_cli/_tx/_train.py): they win over the
variables."""


@dataclass(frozen=True)
class TrainerSettings:
    """What the Trainer is told beside State's settings.

    Attributes
    ----------
    precision
        None: State's own.
    of_user
        {variable: value} that are set already.
    """

    ranks: Ranks = field(default_factory=Ranks)
    precision: str | None = None
    of_user: Mapping[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """{variable: value} during the training."""
        ours = {NODES: str(self.ranks.nodes)} if self.ranks.nodes > 1 else {}
        ours |= {PRECISION: self.precision} if self.precision else {}
        return dict(sorted({**self.of_user, **ours}.items()))

    def identity(self) -> dict[str, str]:
        """What decides the weights: Lightning's default is 32-true too."""
        return {"precision": self.precision} if self.precision not in (None, "32-true") else {}


def set_by_user() -> dict[str, str]:
    """{PL_TRAINER_...: value} of the environment; Lightning takes an empty one for none."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX) and v}


def one_of(option: str, asked: Any, variable: str) -> str | None:
    """What an option says, or the variable that means the same.

    Raises
    ------
    InputError
        They differ.
    """
    said = set_by_user().get(variable)
    if asked is not None and said is not None and str(asked) != said:
        raise InputError(f"{option} {asked}, but {variable}={said} is set: unset it")
    return str(asked) if asked is not None else said


def choose_nodes(asked: int | None) -> int:
    """Machines that train together: as asked for, else as srun or torchrun started them.

    Raises
    ------
    InputError
        --nodes and PL_TRAINER_NUM_NODES differ, or that is no number.
    """
    nodes = one_of("--nodes", asked, NODES)
    if nodes is None:
        return nodes_started()
    if not nodes.isdecimal() or int(nodes) < 1:
        raise InputError(f"{NODES} must be a whole number above 0, got {nodes!r}")
    return int(nodes)


def choose_precision(
    asked: str | None, kept: Mapping[str, str], stock: Mapping[str, Any]
) -> str | None:
    """The precision of the training; None: State's own.

    Parameters
    ----------
    kept
        {variable: value} of a run that is resumed.

    Raises
    ------
    InputError
        --training-precision and PL_TRAINER_PRECISION differ, that is none of both, or State passes
        a precision itself: run_tx_train gives scGPT a plugin for bf16-mixed.
    """
    precision = one_of("--training-precision", asked, PRECISION)
    where = "--training-precision" if asked else PRECISION
    if precision is None:
        return kept.get(PRECISION)
    if precision not in TRAINING_PRECISIONS:
        raise InputError(
            f"{PRECISION}={precision}: a training has {' or '.join(TRAINING_PRECISIONS)} (16-mixed "
            "would silently be bf16-mixed on a CPU); unset it, or use --training-precision"
        )
    model = str(stock["model"]["name"])
    if model.lower().startswith("scgpt"):
        raise InputError(
            f"{where} {precision}: State trains {model} in bf16-mixed, and takes no other "
            f"precision; {'leave it out' if asked else 'unset it'}"
        )
    return precision


def check_logging(ranks: Ranks, stock: Mapping[str, Any]) -> None:
    """run_tx_train writes down the path of the run at Weights & Biases, which Lightning gives to
    the first process only.

    Raises
    ------
    InputError
        Several processes are to log there.
    """
    if stock["use_wandb"] and ranks.number > 1:
        raise InputError(
            f"State cannot log to Weights & Biases from several processes ({ranks}): all but the "
            "first would end with a TypeError. Leave --wandb-project and use_wandb out"
        )


@contextlib.contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables and no other PL_TRAINER_..., while the block runs."""
    names = {*variables, *(k for k in os.environ if k.startswith(PREFIX))}
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def describe_trainer(settings: TrainerSettings, stock: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the plan: processes, cells a step, precision, variables of the user."""
    rows, ranks = [], settings.ranks
    if ranks.number > 1:
        rows.append(("processes", f"{ranks} (machines x devices): {cells_a_step(ranks, stock)}"))
    if settings.precision:
        rows.append(("precision", settings.precision))
    for name, value in settings.of_user.items():
        passed = name.removeprefix(PREFIX).lower() in PASSED_BY_STATE
        effect = "no effect: State sets it itself" if passed else "you set it; Lightning reads it"
        rows.append(("variable", f"{name}={value} ({effect})"))
    return rows


def cells_a_step(ranks: Ranks, stock: Mapping[str, Any]) -> str:
    """The effective batch, and how the learning rate stands to it."""
    training, length = stock["training"], set_length(stock)
    batches = training.get("gradient_accumulation_steps") or 1
    single = wants_cell_type_map(stock) and (length or 1) > 1  # as run_tx_train has it
    each = (1 if single else training["batch_size"]) * batches
    sets = f"{each * ranks.number:,} cell sets"
    cells = f" ({each * ranks.number * length:,} cells)" if length else ""
    return (
        f"{sets}{cells} a step in all, {each:,} in each; training.lr={training['lr']} stays: "
        "State does not scale it"
    )
