"""From flags and Hydra overrides to the stock configuration and the stock command."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_HASH_SEED, ROOT, Result, run_script

import train_with_esm_features as script
from state_esm_features.console import Notes
from state_esm_features.training import plan as plan_module
from state_esm_features.training.plan import make_plan
from state_esm_features.training.stock import compose, flat

Train = Callable[..., Result]
CONTROL = "non-targeting"
FILES = ("--config", "config.toml", "--pert-features", "features.pt")


@pytest.fixture
def ready(project: Path, create: Callable[..., Result]) -> Path:
    """The project, with features.pt by create_esm_pert_features.py."""
    make_features(create)
    return project


def make_features(create: Callable[..., Result], *arguments: object) -> None:
    where = ("--esm-embeddings", "table.pt", "--output", "features.pt")
    done = create("--from-toml", "config.toml", *where, *arguments)
    assert done.code == 0, done.err


@pytest.fixture
def train(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Train:
    """Run train_with_esm_features.main([..., '--dry-run']), which must write nothing."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        words = [*FILES, "--dry-run", *map(str, arguments)]
        try:
            code = script.main(words)
        except SystemExit as usage:  # argparse
            code = int(usage.code or 0)
        assert not (ready / "runs").exists()
        return Result(code, *capsys.readouterr())

    return run


def stock_overrides(done: Result) -> list[str]:
    """The overrides of the stock command that a dry run printed."""
    assert done.code == 0, done.err
    words = shlex.split(done.out)
    assert words[:3] == ["state", "tx", "train"]
    return words[3:]


def stock_configuration(done: Result) -> dict[str, Any]:
    """{key: value} of what `state tx train` makes of the printed command."""
    from omegaconf import OmegaConf
    from state.__main__ import load_hydra_config

    cfg = load_hydra_config("tx", stock_overrides(done))
    return flat(OmegaConf.to_container(cfg, resolve=True))


CELL_TYPES = ("simA", "simB")


def two_datasets(folder: Path) -> None:
    (folder / "two.h5ad").write_bytes((folder / "screen.h5ad").read_bytes())
    held = [f'[fewshot."{d}.{t}"]\nval = ["SIM003"]\n' for d in ("sim", "two") for t in CELL_TYPES]
    (folder / "config.toml").write_text(
        '[datasets]\nsim = "screen.h5ad"\ntwo = "two.h5ad"\n[training]\nsim = "train"\n'
        'two = "train"\n' + "".join(held)
    )


# --- text that survives Hydra's grammar ---------------------------------------------------------


@pytest.mark.parametrize("control", ["it's {a}, \"b\\", "NULL ctrl: é [1]", "null", "1e5"])
def test_awkward_control_label_reaches_the_stock_command(
    train: Train, ready: Path, screen: Any, create: Callable[..., Result], control: str
) -> None:
    screen.obs["target_gene"] = screen.obs["target_gene"].cat.rename_categories({CONTROL: control})
    screen.write_h5ad(ready / "screen.h5ad")
    make_features(create, "--control-pert", control)
    done = train("--control-pert", control)
    assert stock_configuration(done)["data.kwargs.control_pert"] == control
    assert f"batch batch_var, control {control}\n" in done.err


# --- flags, overrides and which of them wins ----------------------------------------------------


def test_what_is_not_given_is_stock(train: Train) -> None:
    """All that differs from stock is what the data, the names and the defaults decide."""
    default = flat(compose([]) | {"model": compose(["model=state_sm"])["model"]})
    ours = stock_configuration(train("--num-workers", 12))
    assert {k: v for k, v in ours.items() if default.get(k, "absent") != v} == {
        "data.kwargs.toml_config_path": str(Path.cwd() / "config.toml"),
        "data.kwargs.perturbation_features_file": str(Path.cwd() / "features.pt"),
        "data.kwargs.pert_col": "target_gene",
        "data.kwargs.batch_col": "batch_var",
        "data.kwargs.control_pert": CONTROL,
        "output_dir": str(Path.cwd() / "runs"),
        "name": "config_state_sm",
        "use_wandb": False,
    }
    assert default.keys() == ours.keys()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--model", "state_lg"), {"model.kwargs.hidden_dim": 1488, "name": "config_state_lg"}),
        (("--max-steps", 7), {"training.max_steps": 7}),
        (("--batch-size", 3), {"training.batch_size": 3}),
        (("--num-workers", 0), {"data.kwargs.num_workers": 0}),
        (("--val-freq", 5), {"training.val_freq": 5}),
        (("--max-steps", 12, "--ckpt-every-n-steps", 6), {"training.ckpt_every_n_steps": 6}),
        (("--seed", 0), {"training.train_seed": 0, "data.kwargs.random_seed": 0}),
        (("--seed", 9), {"training.train_seed": 9, "data.kwargs.random_seed": 9}),
        (("--output-space", "gene"), {"data.kwargs.output_space": "gene"}),
        (("--pert-col", "batch_var", "--control-pert", "sim_batch0"), None),
        (("--output-dir", "a/b", "--name", "c d"), {"name": "c d"}),
        (
            ("--wandb-project", "p", "--wandb-tags", "a,b"),
            {
                "use_wandb": True,
                "wandb.project": "p",
                "wandb.tags": ["a", "b"],
                "wandb.entity": None,
            },
        ),
        (
            ("--wandb-project", "p", "--wandb-entity", "e"),
            {"use_wandb": True, "wandb.entity": "e"},
        ),
        (("--wandb-tags", "a"), {"use_wandb": False, "wandb.tags": ["a"]}),
    ],
)
def test_each_flag_sets_its_stock_setting(
    train: Train, flags: tuple[object, ...], expected: dict[str, Any] | None
) -> None:
    done = train(*flags)
    if expected is None:
        assert done.code == 1
        assert "problems:\n  - features.pt was made for the control 'non-targeting'" in done.err
        return
    found = stock_configuration(done)
    assert {k: found[k] for k in expected} == expected


def test_without_a_seed_both_stay_as_stock_has_them(train: Train) -> None:
    found = stock_configuration(train())
    assert found["training.train_seed"] == 42
    assert "data.kwargs.random_seed" not in found


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("training.max_steps=9", "training.max_steps", 9),
        ("++training.max_steps=9", "training.max_steps", 9),
        ("data.kwargs.num_workers=5", "data.kwargs.num_workers", 5),
        ("data.kwargs.batch_col=cell_type", "data.kwargs.batch_col", "cell_type"),
        ("wandb.project=mine", "wandb.project", "mine"),
        ("use_wandb=false", "use_wandb", False),
        (
            "+data.kwargs.h5_open_kwargs={rdcc_nbytes:1}",
            "data.kwargs.h5_open_kwargs.rdcc_nbytes",
            1,
        ),
    ],
)
def test_an_override_wins_over_a_flag_and_is_passed_on_as_typed(
    train: Train, typed: str, key: str, value: object
) -> None:
    flags = ("--max-steps", 3, "--num-workers", 1, "--batch-col", "batch_var")
    done = train(*flags, "--wandb-project", "p", typed)
    overrides = stock_overrides(done)
    assert overrides[-1] == typed
    keys = [x.split("=")[0].lstrip("+") for x in overrides]
    assert sorted(keys) == sorted(set(keys))
    assert stock_configuration(done)[key] == value


def test_model_as_an_override_is_the_model_that_is_planned(train: Train) -> None:
    done = train("--model", "state", "model=state_lg", "--max-steps", 3)
    assert stock_configuration(done)["model.kwargs.hidden_dim"] == 1488
    assert "\nmodel     state_lg, 3 steps of 16 cell sets\n" in done.err
    assert stock_configuration(done)["name"] == "config_state_lg"


def test_overrides_may_stand_between_the_flags(train: Train) -> None:
    done = train("training.lr=0.5", "--max-steps", 3, "training.val_freq=2", "--batch-size", 2)
    assert stock_overrides(done)[-2:] == ["training.lr=0.5", "training.val_freq=2"]
    found = stock_configuration(done)
    assert found["training.lr"] == 0.5
    assert (found["training.max_steps"], found["training.batch_size"]) == (3, 2)


def test_tags_do_not_swallow_the_overrides_behind_them(train: Train) -> None:
    done = train("--wandb-project", "p", "--wandb-tags", "a,b", "training.lr=0.5")
    found = stock_configuration(done)
    assert (found["wandb.tags"], found["training.lr"]) == (["a", "b"], 0.5)


MODELS = (
    "celltypemean, context_mean, cpa, decoder_only, embedsum, globalsimplesum, old_neuralot, "
    "pertsets, perturb_mean, pseudobulk, scgpt-chemical, scgpt-genetic, scvi, state, state_lg, "
    "state_sm, tahoe_best, tahoe_llama_212693232, tahoe_llama_62089464"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("name=x",), "'name=x': use --name instead of this override"),
        (("++name=x",), "'++name=x': use --name instead of this override"),
        (("output_dir=x",), "'output_dir=x': use --output-dir instead of this override"),
        (("overwrite=true",), "'overwrite=true': use --overwrite instead of this override"),
        (
            ("data.kwargs.toml_config_path=x",),
            "'data.kwargs.toml_config_path=x': use --config instead of this override",
        ),
        (
            ("data.kwargs.perturbation_features_file=x",),
            "'data.kwargs.perturbation_features_file=x': use --pert-features instead of this "
            "override",
        ),
        *(
            ((text,), f"{text!r} is neither an option nor a Hydra override such as training.lr=0.1")
            for text in ("nonsense", "a b=c", "x={", "training.lr=[1", "")
        ),
        (
            ("training.max_step=1",),
            "the stock configuration of state says: no setting 'training.max_step' (did you mean "
            "max_steps?)",
        ),
        (
            ("training.weight_decay=0.1", "lr=1"),
            "the stock configuration of state says: no setting 'lr' (did you mean training.lr?)",
        ),
        (
            ("cake.flour=1",),
            "the stock configuration of state says: no setting 'cake.flour'",
        ),
        (
            ("training.lr=1,2",),
            "the stock configuration of state says: Ambiguous value for argument 'training.lr=1,2'",
        ),
        (
            ("--model", "nope"),
            f"the stock configuration of state says: no model 'nope'; models: {MODELS}",
        ),
        (
            ("model=nope",),
            f"the stock configuration of state says: no model 'nope'; models: {MODELS}",
        ),
        (
            ("--model", "no-such.model"),
            f"the stock configuration of state says: no model 'no-such.model'; models: {MODELS}",
        ),
        *(
            (
                (text,),
                f"training.max_steps must be a whole number above 0, got {shown}",
            )
            for text, shown in (
                ("training.max_steps=abc", "'abc'"),
                ("training.max_steps=null", "None"),
                ("training.max_steps='7'", "'7'"),
                ("training.max_steps=0", "0"),
                ("training.max_steps=4e4", "40000.0"),
                ("~training.max_steps", "None"),
            )
        ),
    ],
)
def test_override_that_cannot_be_is_refused(
    train: Train, arguments: tuple[str, ...], message: str
) -> None:
    message = message.replace("training.lr=0.1", "training.lr=0.0001")
    assert train(*arguments) == Result(1, "", f"error: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max", "3"), "unrecognized arguments: --max (did you mean --max-steps?)"),
        (("--num-workers", "-1"), "argument --num-workers: expected auto or a number, got '-1'"),
        (("--num-workers", "x"), "argument --num-workers: expected auto or a number, got 'x'"),
        (("--num-workers", "²"), "argument --num-workers: expected auto or a number, got '²'"),
        (("--max-steps", "0"), "argument --max-steps: 0 is not above 0"),
        (("--batch-size", "-1"), "argument --batch-size: -1 is not above 0"),
        (("--val-freq", "0"), "argument --val-freq: 0 is not above 0"),
        (("--ckpt-every-n-steps", "0"), "argument --ckpt-every-n-steps: 0 is not above 0"),
        (("--max-steps", "1e5"), "argument --max-steps: invalid positive value: '1e5'"),
        (("--seed", "a"), "argument --seed: invalid int value: 'a'"),
        (
            ("--output-space", "x"),
            "argument --output-space: invalid choice: 'x' (choose from 'gene', 'all', 'embedding')",
        ),
        (("--resume", "--overwrite"), "argument --overwrite: not allowed with argument --resume"),
    ],
)
def test_usage_errors_exit_with_2(train: Train, arguments: tuple[str, ...], message: str) -> None:
    done = train(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"{script.build_parser().format_usage()}train_with_esm_features.py: error: {message}\n"
    )
    assert "--config FILE" in done.err and "[option ...]" in done.err


def test_required_files_are_required(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_with_esm_features.py: error: the following arguments are required: --config"
    )


# --- the same configuration as stock ------------------------------------------------------------


def test_printed_command_gives_the_configuration_of_the_plan(ready: Path) -> None:
    from omegaconf import OmegaConf
    from state.__main__ import load_hydra_config

    flags = ("--seed", "3", "--max-steps", "7", "--wandb-project", "p q", "--wandb-tags", "a,b c")
    options = script.parse([*FILES, *flags, "training.lr=0.5"])
    plan = make_plan(options, ready / "elsewhere" / "my run", None, None, Path(), Notes())
    words = shlex.split(plan.stock_command())
    theirs = OmegaConf.to_container(
        load_hydra_config("tx", words[words.index("train") + 1 :]), resolve=True
    )
    ours = flat(plan.stock)
    assert {k: v for k, v in flat(theirs).items() if ours.get(k, "absent") != v} == {
        "data.kwargs.toml_config_path": str(ready / "config.toml"),
        "data.kwargs.perturbation_features_file": str(ready / "features.pt"),
        "output_dir": str(ready / "elsewhere"),
        "name": "my run",
    }
    assert ours.keys() == flat(theirs).keys()


def test_dry_run_prints_exactly_the_stock_command(train: Train, ready: Path) -> None:
    done = train("--num-workers", 2, "--name", "it's mine", "training.lr=0.5")
    assert done.out == (
        f"state tx train data.kwargs.toml_config_path={ready}/config.toml "
        f"data.kwargs.perturbation_features_file={ready}/features.pt output_dir={ready}/runs "
        "'name='\"'\"'it\\'\"'\"'s mine'\"'\"'' model=state_sm use_wandb=false "
        "data.kwargs.num_workers=2 data.kwargs.pert_col=target_gene "
        "data.kwargs.batch_col=batch_var data.kwargs.cell_type_key=cell_type "
        "data.kwargs.control_pert=non-targeting training.lr=0.5\n"
    )
    assert stock_configuration(done)["name"] == "it's mine"


# --- the hash seed ------------------------------------------------------------------------------

REPEAT = (
    "warning: two or more datasets, and PYTHONHASHSEED was not set when this Python was started: "
    "the order of the data, and so the result, will differ from run to run. From a notebook, run "
    "the script with !python instead"
)


@pytest.mark.parametrize(("given_seed", "expected"), [(None, "0"), ("5", "5")])
def test_two_datasets_run_under_a_fixed_hash_seed(
    ready: Path, given_seed: str | None, expected: str
) -> None:
    two_datasets(ready)
    before = f"os.environ['PYTHONHASHSEED'] = {given_seed!r}" if given_seed else NO_HASH_SEED
    done = run_script("train_with_esm_features", *FILES, "--dry-run", cwd=ready, before=before)
    assert done.code == 0, done.err
    assert done.out.startswith(f"PYTHONHASHSEED={expected} state tx train data.kwargs.toml_config")
    assert done.err.startswith("run  ")  # once, and without a warning
    assert done.err.count("\ndata ") == 1


def test_ablation_is_announced_once_and_first_by_the_second_start(
    ready: Path, create: Callable[..., Result]
) -> None:
    make_features(create, "--ablation", "shuffle")
    two_datasets(ready)
    words = (*FILES, "--dry-run")
    done = run_script("train_with_esm_features", *words, cwd=ready, before=NO_HASH_SEED)
    assert done.code == 0, done.err
    assert done.err.startswith("ABLATION: shuffle, seed 42: not real features\nrun  ")
    assert done.err.count("ABLATION") == 1


def test_one_dataset_needs_no_hash_seed(ready: Path) -> None:
    words = (*FILES, "--dry-run")
    done = run_script("train_with_esm_features", *words, cwd=ready, before=NO_HASH_SEED)
    assert done.code == 0, done.err
    assert done.out.startswith("state tx train ")


def test_in_a_notebook_two_datasets_are_a_warning(train: Train, ready: Path) -> None:
    two_datasets(ready)
    done = train()
    assert done.code == 0
    assert done.err.splitlines()[0] == REPEAT
    assert done.err.count("warning: ") == 1
    assert done.out.startswith("state tx train ")


# --- what is imported when ----------------------------------------------------------------------


def imported_by(code: str, cwd: Path) -> tuple[set[str], str]:
    """Modules in a fresh Python after `code`, and what it printed."""
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", "import train_with_esm_features"]
    lines += [code, "print('MODULES', *sys.modules, file=sys.stderr)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split("MODULES ")[1].split()), done.stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "try:\n train_with_esm_features.main(['--help'])\nexcept SystemExit as s:\n"
        " assert s.code == 0"
    )
    modules, printed = imported_by(code, tmp_path)
    assert printed.startswith("usage: train_with_esm_features.py")
    heavy = {"torch", "lightning", "state", "cell_load", "numpy", "pandas", "h5py", "anndata"}
    assert modules & (heavy | {"hydra", "omegaconf", "toml", "tqdm"}) == set()


HEAVY = ("lightning", "transformers", "state.tx", "cell_load.data_modules", "scanpy")


def test_preflight_imports_the_model_but_not_the_data_module(ready: Path) -> None:
    arguments = [*FILES, "--dry-run"]
    modules, printed = imported_by(f"train_with_esm_features.main({arguments!r})", ready)
    assert printed.startswith("state tx train ")
    assert {m for m in modules if m in HEAVY} == {"lightning", "transformers", "state.tx"}


def test_preflight_imports_no_model_before_the_data_can_be_read(ready: Path) -> None:
    (ready / "screen.h5ad").unlink()
    arguments = [*FILES, "--dry-run"]
    modules, _ = imported_by(f"assert train_with_esm_features.main({arguments!r}) == 1", ready)
    assert {m for m in modules if m.startswith(HEAVY)} == set()


# --- the run that is there already --------------------------------------------------------------


def test_file_in_the_place_of_the_run_is_refused(train: Train, ready: Path) -> None:
    (ready / "taken").write_text("mine")
    assert train("--output-dir", ".", "--name", "taken") == Result(
        1,
        "",
        f"error: {ready}/taken exists and is no run of this script; choose another --name, or move "
        "it away\n",
    )
    assert (ready / "taken").read_text() == "mine"


@pytest.fixture
def untrained(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Train:
    """Run main([...]) where so many loader workers fit; all but the training itself is done."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(script.loop, "train", lambda *_: None)

    def run(fitting: int, *arguments: object) -> Result:
        monkeypatch.setattr(plan_module, "choose_workers", lambda *_: fitting)
        capsys.readouterr()
        code = script.main([*FILES, "--name", "run", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return run


def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/run/run.json").read_text())


def workers_of(record: dict[str, Any]) -> int:
    return record["identity"]["settings"]["data.kwargs.num_workers"]


@pytest.mark.parametrize(
    ("first", "number"),
    [
        ((), 4),
        (("--num-workers", 0), 0),
        (("--num-workers", 3), 3),
        (("data.kwargs.num_workers=3",), 3),
    ],
)
@pytest.mark.parametrize("again", [(), ("--num-workers", "auto"), ("--resume",)])
def test_a_finished_run_is_up_to_date_whatever_memory_is_free_now(
    untrained: Train,
    ready: Path,
    first: tuple[object, ...],
    number: int,
    again: tuple[object, ...],
) -> None:
    assert untrained(4, *first).code == 0
    record = recorded(ready)
    assert workers_of(record) == number
    done = untrained(2, *again)
    assert done.err.splitlines()[-1] == (
        f"up to date: {ready}/runs/run finished with the same inputs"
    )
    assert f"\nworkers   {number}\n" in done.err
    assert (done.code, done.out) == (0, f"{ready}/runs/run\n")
    assert recorded(ready) == record


def test_an_unfinished_run_is_not_called_another_one_for_the_memory(
    untrained: Train, ready: Path
) -> None:
    assert untrained(4).code == 0
    stopped = recorded(ready) | {"status": "stopped"}
    (ready / "runs/run/run.json").write_text(json.dumps(stopped))
    done = untrained(2)
    assert done.err.splitlines()[-1] == (
        f"error: {ready}/runs/run is not finished (stopped, step 0); --resume goes on with it, "
        "--overwrite trains anew, --name NAME makes another run"
    )
    assert untrained(2, "--resume").code == 0
    assert workers_of(recorded(ready)) == 4


@pytest.mark.parametrize("given_now", [("--num-workers", 2), ("data.kwargs.num_workers=2",)])
def test_another_number_of_workers_that_is_given_is_another_input(
    untrained: Train, ready: Path, given_now: tuple[object, ...]
) -> None:
    assert untrained(4).code == 0
    done = untrained(4, *given_now)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        f"error: {ready}/runs/run exists with other inputs (data.kwargs.num_workers: 4 -> 2); "
    )


def test_a_run_that_is_overwritten_gets_the_workers_that_fit_now(
    untrained: Train, ready: Path
) -> None:
    assert untrained(4).code == 0
    assert untrained(2, "--overwrite").code == 0
    assert workers_of(recorded(ready)) == 2


def test_only_the_workers_stay_without_resume(untrained: Train, ready: Path) -> None:
    assert untrained(4, "--max-steps", 7, "training.lr=0.5").code == 0
    done = untrained(2)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        f"error: {ready}/runs/run exists with other inputs (training.lr: 0.5 -> 0.0001; "
        "training.max_steps: 7 -> 400000); "
    )


@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_features_file_is_hashed_once(
    untrained: Train, ready: Path, monkeypatch: pytest.MonkeyPatch, with_manifest: bool
) -> None:
    if not with_manifest:
        (ready / "features.pt.json").unlink()
    hashed: list[str] = []
    file_digest = hashlib.file_digest

    def counted(file: Any, digest: Any) -> Any:
        hashed.append(Path(file.name).name)
        return file_digest(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    assert untrained(0).code == 0
    assert hashed.count("features.pt") == 1
    content = (ready / "features.pt").read_bytes()
    assert recorded(ready)["identity"]["features"] == {
        "sha256": hashlib.sha256(content).hexdigest()
    }
