"""create_features() and train(): what the commands do, called from Python."""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from test_train_return import GOAL, Start, assert_finished, folder, gated, steps_done  # noqa: F401
from test_train_return import begin as begin
from test_train_run import TINY, checkpoint, run_json

import create_esm_pert_features
import train_with_esm_features
from create_esm_pert_features import create_features
from state_esm_features.console import InputError, UsageError
from state_esm_features.results import FeaturesResult, TrainingResult
from train_with_esm_features import train

FUNCTIONS: dict[str, tuple[Callable[..., Any], Any]] = {
    "create_features": (create_features, create_esm_pert_features),
    "train": (train, train_with_esm_features),
}

SCREEN_LABELS = {"combination": 1, "control": 1, "exact": 10}


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with screen.h5ad, table.pt and config.toml, to work in."""
    monkeypatch.chdir(project)
    return project


def test_features_are_those_of_the_command(
    here: Path, create: Callable[..., Result], capsys: pytest.CaptureFixture[str]
) -> None:
    made = create_features(from_toml="config.toml", esm_embeddings=Path("table.pt"), output="f.pt")
    said = capsys.readouterr()
    assert made == FeaturesResult("written", Path("f.pt"), Path("f.pt.json"), 12, SCREEN_LABELS, {})
    words = ("--from-toml", "config.toml", "--esm-embeddings", "table.pt", "--output", "g.pt")
    typed = create(*words)
    assert (here / "f.pt").read_bytes() == (here / "g.pt").read_bytes()
    assert (said.out, said.err) == ("", typed.err)
    record = json.loads((here / "f.pt.json").read_text())
    assert record["command"] == [
        "--from-toml=config.toml",
        "--esm-embeddings=table.pt",
        "--output=f.pt",
    ]


def test_labels_that_are_filled_in_are_returned_with_the_reason(here: Path) -> None:
    (here / "genes.txt").write_text("SIM000\nold<1>\nSIM002\nNEW\n")
    sources = {"gene_list": "genes.txt", "esm_embeddings": ["table.pt"]}
    made = create_features(
        **sources, alias={"old<1>": "SIM001"}, missing="mean", dry_run=True, output="f.pt"
    )
    assert (made.status, made.path, made.labels) == ("dry run", None, 5)
    assert made.resolved == {"alias": 1, "control": 1, "exact": 2, "mean": 1}
    assert made.missing == {"NEW": "'NEW' is in no table"}
    with pytest.raises(InputError, match="NEW") as refused:
        create_features(**sources, alias={"old<1>": "SIM001"}, output="f.pt")
    assert len(refused.traceback) < 5  # the call, and no more of ours
    assert not (here / "f.pt").exists()


def test_a_result_is_shown_as_a_table() -> None:
    made = FeaturesResult("written", Path("a<b>.pt"), None, 3, {"exact": 2, "mean": 1}, {"X": "y"})
    assert str(made) == (
        "status    written\nfeatures  a<b>.pt\nlabels    3 (2 exact, 1 mean)\nmissing   1 label: X"
    )
    assert made._repr_html_() == (
        "<table><tr><th>status</th><td>written</td></tr>"
        "<tr><th>features</th><td>a&lt;b&gt;.pt</td></tr>"
        "<tr><th>labels</th><td>3 (2 exact, 1 mean)</td></tr>"
        "<tr><th>missing</th><td>1 label: X</td></tr></table>"
    )


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("create_features", {"outptu": "x"}, "create_features() has no option 'outptu' (did you mean "),
    ("create_features", {"layer": 1.5}, "create_features() argument --layer: invalid int value: "),
    ("create_features", {"missing": "maen"}, "create_features() argument --missing: invalid choi"),
    ("create_features", {"dry_run": 1}, "create_features() argument --dry-run: expected true or "),
    ("create_features", {}, "no labels: give --from-toml, --gene-list or --adata, or --all-genes"),
    ("create_features", {"gene_list": "g.txt"}, "--output FILE is required"),
    (
        "create_features",
        {"gene_list": "g.txt", "into_run": "r", "plot": "p.png"},
        "--plot does not go with --into-run",
    ),
    (
        "create_features",
        {"gene_list": "g.txt", "output": "f.pt", "long": "truncate"},
        "--long needs --fasta FILE",
    ),
    ("train", {}, "the following arguments are required: --config"),
    ("train", {"config": "c", "max_step": 3}, "train() has no option 'max_step' (did you mean max"),
    ("train", {"config": "c", "max_steps": 0}, "train() argument --max-steps: 0 is not above 0"),
    ("train", {"config": "c", "force": True}, "--force goes with --resume"),
    (
        "train",
        {"config": "c", "resume": True, "overwrite": True},
        "argument --overwrite: not allowed with argument --resume",
    ),
    (
        "train",
        {"config": "c", "pert_features": "f.pt", "missing": "mean"},
        "--pert-features does not go with --missing",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_wrong_options_are_refused_as_by_the_command(
    here: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        FUNCTIONS[name][0](**options)
    assert str(refused.value).startswith(message)
    assert issubclass(UsageError, InputError)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_signature_is_that_of_the_command(name: str) -> None:
    function, script = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    actions = {a.dest: a for a in script.build_parser()._actions}
    assert parameters.keys() == actions.keys() - {"help", "version"}
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    required = {name for name, p in parameters.items() if p.default is p.empty}
    assert required == {name for name, a in actions.items() if a.required and a.option_strings}
    documented = (function.__doc__ or "").split("----------\n")[1].split("\nReturns")[0]
    assert [line for line in documented.splitlines() if line[:1].strip()] == [*parameters]


def test_the_signature_shows_defaults_and_types() -> None:
    shown = str(inspect.signature(create_features))
    assert shown.startswith("(*, from_toml: str | pathlib.Path | None = None, ")
    assert "missing: str = 'error'" in shown and "all_genes: bool = False" in shown
    assert shown.endswith("quiet: bool = False) -> 'FeaturesResult'")
    assert "overrides: 'str | Sequence[str]' = ()" in str(inspect.signature(train))


def test_a_run_is_that_of_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_features(from_toml="config.toml", esm_embeddings="table.pt", output="f.pt")
    options = {"config": "config.toml", "pert_features": "f.pt", "name": "run"}
    options |= {"max_steps": 2, "batch_size": 2, "num_workers": 0}
    plan = train(**options, dry_run=True, overrides=TINY)
    run_dir = here / "runs/run"
    assert (plan.status, plan.run_dir, plan.steps, plan.losses) == ("dry run", run_dir, 0, {})
    assert plan.stock_command.startswith("state tx train ") and not run_dir.exists()

    handlers = {number: signal.getsignal(number) for number in signal.Signals}
    capsys.readouterr()
    trained = train(**options, overrides=TINY)
    assert capsys.readouterr().out == ""
    assert {number: signal.getsignal(number) for number in signal.Signals} == handlers
    record = run_json(run_dir)
    assert trained == TrainingResult(
        "finished",
        run_dir,
        2,
        {"train_loss": record["train_loss"]},
        f"state tx infer --model-dir {run_dir} --checkpoint {run_dir}/checkpoints/final.ckpt "
        "--pert-col target_gene --adata TEMPLATE.h5ad --output prediction.h5ad",
        plan.stock_command,
    )
    assert record["starts"][0]["command"][:3] == [
        "--config=config.toml",
        "--pert-features=f.pt",
        "--num-workers=0",
    ]
    words = ["--config", "config.toml", "--pert-features", "f.pt", "--name", "run"]
    words += ["--max-steps", "2", "--batch-size", "2", "--num-workers", "0", *TINY]
    assert train_with_esm_features.main(words) == 0
    assert "up to date: " in capsys.readouterr().err
    same = train(**options, overrides=TINY)
    assert (same.status, same.steps, same.losses) == ("up to date", 2, trained.losses)
    capsys.readouterr()

    (here / "new.txt").write_text("SIMEXTRA000\n")
    files = (run_dir / "pert_onehot_map.pt", run_dir / "pert_features.pt.json")
    added = create_features(into_run=run_dir, gene_list=here / "new.txt")
    assert added == FeaturesResult("added", *files, 2, {"control": 1, "exact": 1}, {})
    again = create_features(into_run=run_dir, gene_list=here / "new.txt")
    assert again == FeaturesResult("up to date", *files, 0, {}, {})
    assert capsys.readouterr().out == ""


STOPPED = """
import json, signal, sys
def handlers(): return [signal.getsignal(number) for number in signal.Signals]
before = handlers()
try:
    train_with_esm_features.train(OPTIONS, max_steps=GOAL)
except STOP as stop:
    assert handlers() == before, handlers()
    assert stop.args == ARGS, stop.args
    steps = json.load(open("RUN/run.json"))["steps"] + 1
    train_with_esm_features.train(OPTIONS, resume=True, max_steps=steps)
    print("RUN")
"""


def stopped(run_dir: Path, stop: str, arguments: tuple[object, ...] = ()) -> str:
    """A call that is stopped, and in the same Python one that goes on for one more step."""
    options = {
        "config": "config.toml",
        "pert_features": "features.pt",
        "output_dir": str(run_dir.parent),
        "name": run_dir.name,
        "batch_size": 2,
        "num_workers": 0,
        "val_freq": 5,
        "overrides": TINY,
    }
    texts = {"OPTIONS": f"**{options!r}", "GOAL": str(GOAL), "ARGS": repr(arguments)}
    code = STOPPED
    for name, text in {**texts, "STOP": stop, "RUN": str(run_dir)}.items():
        code = code.replace(name, text)
    return code


@pytest.mark.parametrize(
    ("number", "stop", "arguments"),
    [(signal.SIGINT, "KeyboardInterrupt", ()), (signal.SIGTERM, "SystemExit", (143,))],
)
def test_a_stopped_call_saves_a_checkpoint_and_can_go_on(
    begin: Start,
    tmp_path: Path,
    number: int,
    stop: str,
    arguments: tuple[object, ...],
) -> None:
    run_dir = tmp_path / "runs/run"
    run = begin(code=stopped(run_dir, stop, arguments))
    run.until(lambda: steps_done(run_dir) >= 2)
    run.send(number)
    assert run.wait() == 0, run.err
    assert run.out_file.read_text() == f"{run_dir}\n"
    record = run_json(run_dir)
    assert record["starts"][0]["to_step"] == record["starts"][1]["from_step"] >= 2
    assert (record["status"], record["steps"]) == ("finished", record["starts"][0]["to_step"] + 1)
    saved = f"{record['starts'][0]['to_step']:,}"
    assert f"saved step {saved} in {run_dir}/checkpoints/last.ckpt" in run.err
    assert checkpoint(run_dir, "final")["global_step"] == record["steps"]


def test_ctrl_c_before_the_first_step_is_one_too(begin: Start, tmp_path: Path) -> None:
    """Lightning on its own would end the process, and ignore Ctrl-C from then on."""
    run_dir = tmp_path / "runs/run"
    call = stopped(run_dir, "KeyboardInterrupt").split("    steps = ")[0]
    last_line = "sys.exit(train_with_esm_features.main())"
    run = begin(code=gated("setup", tmp_path).replace(last_line, call))
    run.until((tmp_path / "at-gate").exists)
    run.send(signal.SIGINT)
    assert run.wait() == 0, run.err
    assert run_json(run_dir)["status"] == "stopped"
