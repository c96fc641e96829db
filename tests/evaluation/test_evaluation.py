"""The whole evaluation through the real commands: its files, its resumption, what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import anndata
import pandas as pd
import psutil
import pytest
import torch
from conftest import Result, caught, until
from demo_data import CONTROL
from matplotlib.image import imread
from small_evaluation import STEPS, TINY, UNSEEN, WORDS, evaluation, prepare

from state_esm_features.evaluation.__main__ import build_parser, main, parse
from state_esm_features.evaluation.design import CONTROLLED, METHODS
from state_esm_features.evaluation.runs import begin_process, device_names

THREE = (*CONTROLLED, "context_mean")


def run(folder: Path, methods: tuple[str, ...], *words: object, at_once: int = 1) -> Result:
    process = evaluation(folder, methods, *words, at_once=at_once)
    out, err = process.communicate()
    return Result(process.wait(), out, err)


def running(folder: Path, key: str) -> bool:
    """A part has begun and is not done."""
    begun = (folder / "logs" / f"{key}.log").exists()
    if key.endswith("training"):
        begun = (folder / "runs" / key.removesuffix(".training") / "run.json").exists()
    return begun and not (folder / "done" / f"{key}.json").exists()


def alive(group: int) -> bool:
    """Whether a process of a group lives on."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screen")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def first(place: Path) -> dict[str, bytes]:
    """Tables of an evaluation of own and shuffled vectors, one seed, before anything is added."""
    done = run(place, CONTROLLED, "--seeds", 1)
    assert done.code == 0, done.err
    return {f: (place / "evaluation" / f).read_bytes() for f in ("table.tsv", "scores.tsv")}


@pytest.fixture(scope="module")
def whole(place: Path, first: dict[str, bytes]) -> tuple[Path, Result]:
    """The same, gone on to a baseline and a planted screen."""
    return place / "evaluation", run(place, THREE, "--seeds", 1, "--planted")


def test_killed_at_three_moments_and_gone_on_the_table_is_the_same(
    place: Path, first: dict[str, bytes]
) -> None:
    """Also where two models are trained at once."""
    folder = place / "killed"
    words = ("--seeds", 1, "--output-dir", folder)
    for key in ("shuffled_0.features", "real_own_0.training", "real_shuffled_0.prediction"):

        def begin(key: str = key) -> object:
            if (folder / "done" / f"{key}.json").exists():  # it was too quick the last time
                shutil.rmtree(folder)
            return evaluation(place, CONTROLLED, *words, at_once=2)

        with caught(begin, lambda key=key: running(folder, key)) as process:  # type: ignore[arg-type]
            os.killpg(process.pid, signal.SIGKILL)
        until(lambda group=process.pid: not alive(group))  # they hold runs until they have died
        assert not (folder / "table.tsv").exists()
        assert not (folder / "done" / f"{key}.json").exists()
    gone_on = run(place, CONTROLLED, *words, at_once=2)
    assert gone_on.code == 0, gone_on.err
    assert {f: (folder / f).read_bytes() for f in first} == first
    records = folder.glob("runs/*/run.json")
    assert {len(json.loads(r.read_text())["starts"]) for r in records} == {1}  # begun anew


def test_a_signal_is_passed_on_and_waited_for(place: Path) -> None:
    folder, key = place / "stopped", "real_own_0.training"

    def begin() -> object:
        shutil.rmtree(folder, ignore_errors=True)
        return evaluation(place, CONTROLLED, "--seeds", 1, "--output-dir", folder)

    with caught(begin, lambda: running(folder, key)) as process:  # type: ignore[arg-type]
        process.terminate()
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate()
        assert process.wait() == 143
        assert err.splitlines()[-1] == "stopped by SIGTERM"
        with pytest.raises(ProcessLookupError):  # no process of its group is left
            os.killpg(process.pid, 0)
    assert not (folder / "done" / f"{key}.json").exists()


def test_each_gpu_that_is_visible_takes_a_model() -> None:
    assert device_names(0, "") == device_names(1, "3") == [None]
    assert device_names(2, "") == ["0", "1"]
    assert device_names(2, "4, 6") == ["4", "6"]
    assert device_names(2, "GPU-a,GPU-b,GPU-c") == ["GPU-a", "GPU-b"]


def test_the_plan_stands_first_and_what_was_done_is_not_done_again(
    whole: tuple[Path, Result],
) -> None:
    folder, result = whole
    assert result.code == 0, result.err
    assert result.out == f"{folder}/conclusion.md\n"
    lines = result.err.splitlines()
    assert [
        line for line in lines if line.startswith(("test", "models", "parts", "planted  "))
    ] == [
        "planted   own and shuffled at a strength of 1",
        "test      11 perturbations, 3 that no training cell has",
        f"models    5: {4 * STEPS} steps in 4 trainings of {STEPS}, {2 * STEPS} steps left",
        "parts     18, 8 done",
    ]
    [time] = [line for line in lines if line.startswith("time ")]
    assert re.fullmatch(r"time      about [\d,]+ minutes?", time), time
    done = [line.split("  ")[1] for line in lines if " of 18  " in line]
    assert done == [
        "screen of planted_1",
        *(f"{kind} of planted_1_own_0" for kind in ("training", "prediction", "scores")),
        *(f"{kind} of planted_1_shuffled_0" for kind in ("training", "prediction", "scores")),
        *(f"{kind} of real_context_mean_0" for kind in ("training", "prediction", "scores")),
    ]


def test_perturbations_are_scored_by_cell_type_and_told_apart(whole: tuple[Path, Result]) -> None:
    folder, result = whole
    assert result.code == 0, result.err
    scores = pd.read_csv(folder / "scores.tsv", sep="\t")
    of_one = scores[(scores["screen"] == "real") & (scores["method"] == "own")]
    unseen = of_one[of_one["group"] == "unseen"]
    assert {*unseen["perturbation"]} == {*UNSEEN}
    assert {*map(tuple, unseen[["cell_type", "perturbation"]].to_numpy())} == {
        (t, x) for t in TINY.cell_types for x in UNSEEN
    }
    seen = of_one[of_one["group"] == "seen"]
    labels = {*TINY.symbols, TINY.combination} - {*UNSEEN}
    assert {*seen["perturbation"]} == labels and {*seen["cell_type"]} == {"simB"}
    metrics = scores.columns[2:8]
    assert [*metrics] == [
        *("pearson", "mse", "discrimination"),
        *("cell_eval_pearson", "cell_eval_mse", "cell_eval_discrimination"),
    ]
    assert scores[metrics].notna().to_numpy().all()
    table = pd.read_csv(folder / "table.tsv", sep="\t")
    assert {*table["method"]} == {*THREE, "own - shuffled"}
    assert {*table["screen"]} == {"real", "planted_1"}
    assert {*table["cell_type"]} == {"all", *TINY.cell_types}
    # the mean over perturbations of the mean over cell types
    row = table.query(
        "screen == 'real' and group == 'unseen' and cell_type == 'all' and method == 'own' and "
        "metric == 'pearson'"
    ).iloc[0]
    assert row["mean"] == pytest.approx(
        unseen.groupby("perturbation")["pearson"].mean().mean(), rel=1e-4
    )
    assert (row["perturbations"], row["seeds"], row["left_out"]) == (3, 1, 0)


def test_what_is_written_can_be_opened(whole: tuple[Path, Result]) -> None:
    folder, result = whole
    assert result.code == 0, result.err
    conclusion = (folder / "conclusion.md").read_text()
    sentences = conclusion.split("\n\n")[1:4]
    assert sentences[0].startswith("The positive control cannot be seen: even where the response")
    assert "(no interval: 3 perturbations, 1 seed)" in sentences[1]
    for sentence in sentences:
        assert sentence in result.err
    for heading in ("## Real cells: unseen (3 perturbations, 1 seed)", "## Planted, strength 1: "):
        assert heading in conclusion
    assert imread(folder / "evaluation.png").shape[2] == 4
    # the predicted cells are gone, State's other files are there
    assert not [*folder.rglob("adata_*.h5ad")]
    assert (folder / "runs/real_own_0/eval_final.ckpt/simA_results.csv").exists()
    kept = {p.name for p in folder.glob("runs/*/checkpoints/*")}
    assert kept == {"final.ckpt"}


def test_the_planted_screen_is_as_strong_as_the_real_one(whole: tuple[Path, Result]) -> None:
    folder, result = whole
    assert result.code == 0, result.err
    measured = json.loads((folder / "planted_1/measured.json").read_text())
    assert measured["planted_rms"] == pytest.approx(measured["real_rms"], rel=1e-4)
    planted = anndata.read_h5ad(folder / "planted_1/data/sim/screen.h5ad")
    real = anndata.read_h5ad(folder.parent / "screen.h5ad")
    assert planted.obs.equals(real.obs)
    config = json.loads((folder / "runs/planted_1_own_0/run.json").read_text())
    assert [*config["identity"]["data"]] == [str(folder / "planted_1/data/sim/screen.h5ad")]


def test_seeds_and_vectors_of_each_model_are_its_own(whole: tuple[Path, Result]) -> None:
    folder, result = whole
    assert result.code == 0, result.err
    for name, ablation in (
        ("real_own_0", None),
        ("planted_1_own_0", None),
        ("real_shuffled_0", {"kind": "shuffle", "seed": 0}),
        ("planted_1_shuffled_0", {"kind": "shuffle", "seed": 0}),
    ):
        record = json.loads((folder / f"runs/{name}/run.json").read_text())
        assert record["ablation"] == ablation
        settings = record["identity"]["settings"]
        assert settings["training.train_seed"] == settings["data.kwargs.random_seed"] == 0
        assert settings["training.val_freq"] == settings["training.max_steps"] == STEPS
    record = json.loads((folder / "runs/real_context_mean_0/run.json").read_text())
    assert record["identity"]["settings"]["model.name"] == "context_mean"


def test_up_to_date_in_the_end_and_nothing_changes(whole: tuple[Path, Result]) -> None:
    folder, result = whole
    assert result.code == 0, result.err
    before = {p: p.read_bytes() for p in folder.glob("*.tsv")}
    again = run(folder.parent, THREE, "--seeds", 1, "--planted")
    assert again.code == 0, again.err
    assert again.err.splitlines()[-1] == f"up to date: {folder}"
    assert " of 18  " not in again.err
    assert {p: p.read_bytes() for p in folder.glob("*.tsv")} == before


# --- what is refused, before anything is started -----------------------------------------------


@pytest.fixture
def evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """main([...]) in this process, in a folder with the tiny screen; only a dry run may start
    something."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)

    def nothing(*arguments: object) -> object:
        raise AssertionError(f"started {arguments}")

    def call(*words: object) -> Result:
        capsys.readouterr()
        try:
            begin = begin_process if "--dry-run" in words else nothing
            code = main([*WORDS, *map(str, words)], METHODS, begin)  # type: ignore[arg-type]
        except SystemExit as usage:
            code = int(usage.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def test_dry_run_writes_nothing(evaluate: Callable[..., Result], tmp_path: Path) -> None:
    before = {*tmp_path.rglob("*")}
    result = evaluate("--planted", "0.5,1", "--dry-run")
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert lines[-1] == "dry run: nothing written"
    # there are no validation cells, and none are needed
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: 3 perturbations of the test that no training cell has: under 10 an interval is "
        "narrower than it should be, and little can be told. Hold more out"
    ]
    assert "compared  own, shuffled, onehot, perturb_mean, context_mean; 3 seeds" in lines
    assert "planted   own and shuffled at a strength of 0.5, 1" in lines
    steps = (9 + 12) * STEPS
    assert f"models    23: {steps} steps in 21 trainings of {STEPS}, {steps} steps left" in lines
    assert "time      not measured yet: said once the first training has taken some steps" in lines
    assert {*tmp_path.rglob("*")} == before


def test_dry_run_looks_the_labels_up(evaluate: Callable[..., Result], tmp_path: Path) -> None:
    table = torch.load("table.pt", weights_only=True)
    torch.save({**table, "1-Mar": table["SIM001"]}, "table.pt")
    dated = evaluate("--dry-run")
    assert dated.code == 0, dated.err
    assert (
        "warning: table.pt: 1 row left out, whose keys are dates that a spreadsheet made of "
        "symbols (1-Mar)" in dated.err.splitlines()
    )
    del table["SIM001"]
    torch.save(table, "table.pt")
    refused = evaluate("--dry-run")
    assert refused.code == 1
    assert "error: the vectors cannot be made (exit code 1):\n" in refused.err
    assert "  error: 2 of 11 labels have no embedding (SIM000+SIM001, SIM001). " in refused.err


NOTHING_UNSEEN = (
    "error: screen.toml holds {}. Whether vectors help is seen on genes that no training cell has. "
    "Hold some out of every cell type that trains (a fifth of them, at least ten), with every "
    "combination that has one:\n"
)


@pytest.mark.parametrize(
    ("held", "what", "lines"),
    [
        (
            '[zeroshot]\n"sim.simB" = "test"\n',
            "no unseen perturbation out: of each of 11 perturbations of the test training sees a "
            "gene",
            '  [fewshot."sim.simA"]\n  test = ["SIM002"]\n',
        ),
        (
            '[fewshot."sim.simB"]\nval = ["SIM003"]\n',
            "no perturbation out for the test",
            '  [fewshot."sim.simA"]\n  test = ["SIM002"]\n'
            '  [fewshot."sim.simB"]\n  test = ["SIM002"]\n',
        ),
        (
            '[fewshot."sim.simB"]\ntest = ["SIM003"]\n',
            "no unseen perturbation out: of each of 1 perturbation of the test training sees a "
            "gene",
            '  [fewshot."sim.simA"]\n  test = ["SIM002"]\n'
            '  [fewshot."sim.simB"]\n  test = ["SIM003", "SIM002"]\n',
        ),
    ],
)
def test_without_an_unseen_perturbation_it_says_how_to_hold_some_out(
    evaluate: Callable[..., Result], tmp_path: Path, held: str, what: str, lines: str
) -> None:
    base = '[datasets]\nsim = "screen.h5ad"\n[training]\nsim = "train"\n'
    (tmp_path / "screen.toml").write_text(base + held)
    result = evaluate()
    assert result.code == 1
    assert result.err[result.err.index("error:") :].splitlines()[0] == (
        NOTHING_UNSEEN.format(what).strip()
    )
    assert result.err.endswith(NOTHING_UNSEEN.format(what) + lines), result.err
    assert not (tmp_path / "evaluation").exists()


def test_another_evaluation_is_not_mixed_in(
    evaluate: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation"
    (folder / "done").mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"overrides": ["training.lr=1"]}))
    assert evaluate("--dry-run").code == 0  # nothing of it is done
    (folder / "done" / "own.features.json").write_text('{"seconds": 1}')
    result = evaluate("--dry-run")
    assert result.code == 1
    assert f"error: {folder} holds an evaluation with another overrides, toml, data, " in result.err
    assert "choose another --output-dir, or give the same options" in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seeds", "0"), "argument --seeds: 0 is not above 0"),
        (("--planted", "1,x"), "argument --planted: expected numbers with commas between, e.g. "),
        (("--seed", "3"), "unrecognized arguments: --seed 3 (did you mean --seeds?)"),
        (("--pert-features", "f.pt"), "unrecognized arguments: --pert-features"),
        (("--layer", "3", "--fasta", "p.fa", "--separator", ""), "--separator is empty"),
    ],
)
def test_usage_errors(evaluate: Callable[..., Result], words: tuple[str, ...], said: str) -> None:
    result = evaluate(*words)
    assert result.code == 2
    assert said in result.err


def test_planted_cells_are_for_expression_only(
    evaluate: Callable[..., Result], tmp_path: Path
) -> None:
    cells = anndata.read_h5ad(tmp_path / "screen.h5ad")
    cells.obsm["X_pca"] = cells.X.toarray()[:, :5]
    cells.write_h5ad(tmp_path / "screen.h5ad")
    words = ("--embed-key", "X_pca", "--output-space", "embedding", "--planted")
    result = evaluate(*words, "data.kwargs.output_space=embedding")
    assert result.code == 1
    assert (
        "--planted makes cells for State on X, and this model reads obsm/X_pca: leave --planted or "
        "--embed-key out"
    ) in result.err


def test_a_seed_cannot_be_the_same_for_all(evaluate: Callable[..., Result]) -> None:
    result = evaluate("training.train_seed=3")
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        "error: training.train_seed: each model has a seed of its own. Leave it out, and give "
        "--seeds N"
    )


def test_what_stands_behind_planted_may_be_an_override() -> None:
    for words, planted, overrides in (
        (["--planted"], (1.0,), []),
        (["--planted", "training.lr=1"], (1.0,), ["training.lr=1"]),
        (["--planted", "0.5,2", "training.lr=1"], (0.5, 2.0), ["training.lr=1"]),
        (["training.lr=1", "--planted", "--seeds", "2"], (1.0,), ["training.lr=1"]),
    ):
        typed, found = parse(["--config", "c.toml", *words])
        assert (typed["planted"], found) == (planted, overrides)
    assert "--planted" in build_parser().format_help()


def test_a_part_that_fails_names_its_log_and_shows_its_end(place: Path) -> None:
    (place / "bad.pt").write_bytes(b"nothing")
    folder = place / "failed"
    result = run(place, CONTROLLED, "--output-dir", folder, "--esm-embeddings", "bad.pt")
    assert result.code == 1
    log = folder / "logs/own.features.log"
    end = result.err[result.err.index("error:") :]
    assert end.startswith(
        "error: features of own failed (exit code 1); what is done is kept, and the same command "
        f"goes on there. The end of {log}:\n"
    )
    assert log.read_text().splitlines()[-1] in end
    assert not (folder / "done").exists()


def test_control_is_not_a_perturbation_of_the_test(whole: tuple[Path, Result]) -> None:
    folder, result = whole
    assert result.code == 0, result.err
    scores = pd.read_csv(folder / "scores.tsv", sep="\t")
    assert CONTROL not in {*scores["perturbation"]}
