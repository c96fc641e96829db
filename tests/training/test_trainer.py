"""What Lightning's Trainer is told beside State's settings."""

from __future__ import annotations

import ast
import inspect
import os

import pytest

from state_esm_features.console import InputError
from state_esm_features.training.launch import Ranks
from state_esm_features.training.stock import compose
from state_esm_features.training.trainer import (
    NODES,
    PASSED_BY_STATE,
    PRECISION,
    TrainerSettings,
    cells_a_step,
    check_logging,
    choose_nodes,
    choose_precision,
    describe_trainer,
    set_by_user,
    variables_set,
)

SM = {"model": {"name": "state"}}
SCGPT = {"model": {"name": "scGPT-genetic"}}


def test_arguments_that_state_passes_are_known() -> None:
    import state._cli._tx._train as stock

    tree = ast.parse(inspect.getsource(stock))
    first = next(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "trainer_kwargs"
    )
    assert isinstance(first, ast.Call)
    later = {
        node.targets[0].slice.value  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]).startswith("trainer_kwargs[")
    }
    assert {k.arg for k in first.keywords} | later == PASSED_BY_STATE


def test_nodes_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (choose_nodes(None), choose_nodes(3)) == (1, 3)
    monkeypatch.setenv(NODES, "2")
    assert (choose_nodes(None), choose_nodes(2)) == (2, 2)
    with pytest.raises(InputError) as error:
        choose_nodes(3)
    assert str(error.value) == "--nodes 3, but PL_TRAINER_NUM_NODES=2 is set: unset it"
    monkeypatch.setenv(NODES, "two")
    with pytest.raises(InputError) as error:
        choose_nodes(None)
    assert str(error.value) == "PL_TRAINER_NUM_NODES must be a whole number above 0, got 'two'"


def test_precision_is_typed_set_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {PRECISION: "bf16-mixed"}
    assert choose_precision(None, {}, SM) is None
    assert choose_precision(None, kept, SM) == "bf16-mixed"
    assert choose_precision("32-true", kept, SM) == "32-true"
    monkeypatch.setenv(PRECISION, "bf16-mixed")
    assert choose_precision(None, {}, SM) == choose_precision("bf16-mixed", {}, SM) == "bf16-mixed"
    monkeypatch.setenv(PRECISION, "")  # for Lightning it is not set
    assert choose_precision(None, {}, SM) is None


@pytest.mark.parametrize(
    ("asked", "variable", "stock", "said"),
    [
        (
            "32-true",
            "bf16-mixed",
            SM,
            "--training-precision 32-true, but PL_TRAINER_PRECISION=bf16-mixed is set: unset it",
        ),
        (
            None,
            "16-mixed",
            SM,
            "PL_TRAINER_PRECISION=16-mixed: a training has 32-true or bf16-mixed (16-mixed would "
            "silently be bf16-mixed on a CPU); unset it, or use --training-precision",
        ),
        (
            "32-true",
            "",
            SCGPT,
            "--training-precision 32-true: State trains scGPT-genetic in bf16-mixed, and takes no "
            "other precision; leave it out",
        ),
        (
            None,
            "bf16-mixed",
            SCGPT,
            "PL_TRAINER_PRECISION bf16-mixed: State trains scGPT-genetic in bf16-mixed, and takes "
            "no other precision; unset it",
        ),
    ],
)
def test_a_precision_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    variable: str,
    stock: dict[str, dict[str, str]],
    said: str,
) -> None:
    monkeypatch.setenv(PRECISION, variable)
    with pytest.raises(InputError) as error:
        choose_precision(asked, {}, stock)
    assert str(error.value) == said


def test_only_a_precision_that_lightning_does_not_have_anyway_identifies_a_run() -> None:
    assert TrainerSettings().identity() == TrainerSettings(precision="32-true").identity() == {}
    assert TrainerSettings(precision="bf16-mixed").identity() == {"precision": "bf16-mixed"}
    assert TrainerSettings(Ranks(4, 2), of_user={"PL_TRAINER_X": "1"}).identity() == {}


def test_variables_are_set_for_the_time_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_DETERMINISTIC", "True")
    monkeypatch.setenv(NODES, "2")
    before = dict(os.environ)
    settings = TrainerSettings(Ranks(2, 1), "bf16-mixed", {"PL_TRAINER_BENCHMARK": "True"})
    variables = settings.variables()
    assert variables == {
        "PL_TRAINER_BENCHMARK": "True",
        "PL_TRAINER_NUM_NODES": "2",
        "PL_TRAINER_PRECISION": "bf16-mixed",
    }
    with variables_set({**variables, "OTHER": "1"}):
        assert set_by_user() == variables
        assert os.environ["OTHER"] == "1"
    assert dict(os.environ) == before
    assert TrainerSettings().variables() == {}


def test_the_plan_says_cells_a_step_and_what_the_user_set() -> None:
    stock = compose(["model=state_sm", "training.gradient_accumulation_steps=3"])
    of_user = {
        "PL_TRAINER_DETERMINISTIC": "True",
        "PL_TRAINER_DEVICES": "4",
        "PL_TRAINER_PRECISION": "bf16-mixed",
    }
    assert describe_trainer(TrainerSettings(Ranks(2, 4), "bf16-mixed", of_user), stock) == [
        (
            "processes",
            "2 x 4 (machines x devices): 384 cell sets (49,152 cells) a step in all, 48 in each; "
            "training.lr=0.0001 stays: State does not scale it",
        ),
        ("precision", "bf16-mixed"),
        ("variable", "PL_TRAINER_DETERMINISTIC=True (you set it; Lightning reads it)"),
        ("variable", "PL_TRAINER_DEVICES=4 (no effect: State sets it itself)"),
        ("variable", "PL_TRAINER_PRECISION=bf16-mixed (you set it; Lightning reads it)"),
    ]
    assert describe_trainer(TrainerSettings(), stock) == []


def test_sets_of_models_that_state_gives_one_at_a_time() -> None:
    stock = compose(["model=scgpt-genetic"])
    stock["model"]["kwargs"]["cell_sentence_len"] = 32
    assert cells_a_step(Ranks(2, 1), stock).startswith("2 cell sets (64 cells) a step in all, 1 in")


def test_weights_and_biases_is_for_one_process() -> None:
    with_it, without = {"use_wandb": True}, {"use_wandb": False}
    check_logging(Ranks(), with_it)
    check_logging(Ranks(1, 2), without)
    with pytest.raises(InputError) as error:
        check_logging(Ranks(1, 2), with_it)
    assert str(error.value) == (
        "State cannot log to Weights & Biases from several processes (1 x 2): all but the first "
        "would end with a TypeError. Leave --wandb-project and use_wandb out"
    )


def test_of_a_further_process_lightning_has_no_path_for_weights_and_biases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trap that `check_logging` is for."""
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert callable(WandbLogger(project="x", offline=True).experiment.path)
