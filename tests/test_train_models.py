"""What the dry run passes, trains: every model of State, inputs and output spaces.

The refused ones are refused with a whole message, and really end in an error where they are trained
all the same.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import SMALL, Result, run_state
from demo_data import simulate
from h5ad_forms import SETTING
from test_train_run import FAST, make_screen, run_json

import create_esm_pert_features
import train_with_esm_features as script
from state_esm_features.console import Findings
from state_esm_features.training.data import DataFile
from state_esm_features.training.model_check import as_run_tx_train, data_dims, try_model
from state_esm_features.training.preflight import inspect_data
from state_esm_features.training.stock import (
    compose,
    overrides_of,
    quoted,
    set_length,
    stock_models,
)

Run = Callable[..., Result]

LLAMA = ("pseudobulk", "state", "state_lg", "state_sm", "tahoe_best", "tahoe_llama_212693232")
LLAMA += ("tahoe_llama_62089464",)
MEANS = ("celltypemean", "context_mean", "globalsimplesum", "perturb_mean")
ONE_STEP = ("context_mean", "perturb_mean")
"""run_tx_train trains these for one step, but not the same models under their older names."""

GPT2 = ("old_neuralot", "pertsets")
CELL_TYPE_MAP = ("cpa", "scgpt-chemical", "scgpt-genetic", "scvi")
MODELS = sorted((*LLAMA, *MEANS, *GPT2, *CELL_TYPE_MAP, "decoder_only", "embedsum"))

INPUTS = [(file, key) for file in ("sim", "plain") for key in (None, "X_hvg", "X_emb")]
INPUTS.remove(("plain", "X_hvg"))
SPACES = ("gene", "all", "embedding")
COLUMNS = {None: 30, "X_hvg": 10, "X_emb": 6}
SET = 8
SMALLER = {
    "hidden_dim": 24,
    "cell_set_len": SET,
    "cell_sentence_len": SET,
    "n_encoder_layers": 1,
    "n_decoder_layers": 1,
    "decoder_hidden_dims": [16, 12],
}
BACKBONE = {"n_embd": 24, "n_layer": 1, "n_head": 2, "head_dim": 12, "intermediate_size": 32}
BACKBONE |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def small(model: str) -> list[str]:
    """Overrides of what this configuration has of sizes."""
    kwargs = compose([f"model={model}"])["model"]["kwargs"]
    backbone = kwargs.get("transformer_backbone_kwargs", {})
    settings = {k: v for k, v in SMALLER.items() if k in kwargs}
    settings |= {f"transformer_backbone_kwargs.{k}": BACKBONE[k] for k in BACKBONE if k in backbone}
    return [f"model.kwargs.{key}={quoted(value)}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sim.h5ad has obsm/X_hvg and obsm/X_emb, plain.h5ad (of plain.toml) only the latter."""
    folder = make_screen(tmp_path_factory.mktemp("models"), {"sim": SMALL})
    data = anndata.read_h5ad(folder / "sim.h5ad")
    data.obsm["X_emb"] = np.random.default_rng(0).normal(size=(312, 6)).astype(np.float32)
    data.write_h5ad(folder / "plain.h5ad")
    data.obsm["X_hvg"] = data.X[:, :10].toarray()
    data.write_h5ad(folder / "sim.h5ad")
    text = (folder / "config.toml").read_text()
    (folder / "sim.toml").write_text(text)
    (folder / "plain.toml").write_text(text.replace("sim.h5ad", "plain.h5ad"))
    return folder


@pytest.fixture
def run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run train_with_esm_features.main([...]) for two steps in tmp_path/runs."""
    monkeypatch.chdir(folder)

    def main(*arguments: object, config: str = "sim.toml", name: str = "run") -> Result:
        capsys.readouterr()
        words = ["--config", config, "--pert-features", "features.pt", *FAST, "--max-steps", "2"]
        where = ["--output-dir", tmp_path / "runs", "--name", name]
        code = script.main([str(w) for w in (*words, *where, *arguments)])
        return Result(code, *capsys.readouterr())

    return main


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., None]:
    """Assert that the dry run ends in exactly these problems, and writes nothing."""

    def check(*problems: str, args: Any = (), **options: Any) -> None:
        done = run("--dry-run", *args, **options)
        message = problems[0]
        if len(problems) > 1:
            message = "\n  - ".join([f"{len(problems)} problems:", *problems])
        lines = [x for x in done.err.splitlines(True) if not x.startswith("warning: ")]
        assert (done.code, done.out, "".join(lines)) == (1, "", f"error: {message}\n")
        assert not (tmp_path / "runs").exists()

    return check


@pytest.fixture
def trains(run: Run, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Assert that the dry run passes and that then two steps are trained; the final checkpoint."""

    def check(*args: object, steps: int = 2, **options: Any) -> dict[str, Any]:
        dry = run("--dry-run", *args, **options)
        assert dry.code == 0, dry.err
        done = run(*args, **options)
        assert done.code == 0, done.err
        run_dir = Path(done.out.strip())
        assert run_json(run_dir)["status"] == "finished"
        path = run_dir / "checkpoints" / "final.ckpt"
        final = torch.load(path, map_location="cpu", weights_only=True)
        assert final["global_step"] == steps
        return final

    return check


def options_of(key: str | None, space: str) -> list[str]:
    return [*(("--embed-key", key) if key else ()), "--output-space", space]


def cannot(model: str, reason: str) -> str:
    return f"model {model} cannot be trained like this: {reason}"


def expected_problems(model: str, file: str, key: str | None, space: str) -> list[str]:
    """What a user is to read, of all that there is to say."""
    found = []
    no_hvgs = file == "plain" and key == "X_emb" and space == "gene"
    if no_hvgs:
        others = dict.fromkeys(MEANS, "embedding") | {"decoder_only": "all"}
        others |= dict.fromkeys(LLAMA, "all or embedding")
        choose = f"Choose --output-space {others[model]}, or add" if model in others else "Add"
        found.append(
            "1 file without obsm/X_hvg, whose genes State would learn with --output-space gene "
            f"(plain.h5ad). {choose} adata.obsm['X_hvg']"
        )
    if model in GPT2:
        found.append(
            cannot(
                model,
                "building it ends in AttributeError: 'GPT2Attention' object has no attribute "
                "'bias', as State's GPT2 does not fit the installed transformers. Choose a model "
                "on llama, such as --model state, and no transformer_backbone_key=GPT2",
            )
        )
    if model in CELL_TYPE_MAP:
        version = importlib.metadata.version("cell-load")
        found.append(
            cannot(
                model,
                "State's training asks the data module for celltype_onehot_map, which cell-load "
                f"{version} does not have. Choose another model, such as --model state",
            )
        )
    if model == "embedsum":
        found.append(
            cannot(
                model,
                "State's training does not find how many cells a set has; add "
                f"+model.cell_set_len={SET}",
            )
        )
    counts = key is not None and (space == "all" or (space == "gene" and key != "X_hvg"))
    if model == "decoder_only" and not counts:
        genes = "gene or all" if file == "sim" and key == "X_emb" else "all"
        advice = f"With --output-space {genes} it can"
        if key is None:
            advice = "Give it --embed-key KEY and --output-space all"
        what = "it learns to decode an embedding into genes, and is given none"
        found.append(cannot(model, f"{what}. {advice}"))
    if model in MEANS and counts and not no_hvgs:
        a, b = COLUMNS[key], 30 if space == "all" else 10
        what = f"The size of tensor a ({a}) must match the size of tensor b ({b}) at "
        what += "non-singleton dimension 1"
        if model in ("celltypemean", "context_mean"):
            what = f"The expanded size of the tensor ({a}) must match the existing size ({b}) at "
            what += f"non-singleton dimension 0. Target sizes: [{a}]. Tensor sizes: [{b}]"
        others = "gene or embedding" if key == "X_hvg" else "embedding"
        what = f"a training step ends in RuntimeError: {what}. With --output-space {others} it can"
        found.append(cannot(model, what))
    return found


def stock_training(model: str, file: str, key: str | None, space: str, output: Path) -> None:
    """State's own training, without our check."""
    from omegaconf import OmegaConf
    from state._cli import run_tx_train

    settings = {
        "model": model,
        "data.kwargs.toml_config_path": f"{file}.toml",
        "data.kwargs.perturbation_features_file": "features.pt",
        "data.kwargs.pert_col": "target_gene",
        "data.kwargs.batch_col": "batch_var",
        "data.kwargs.control_pert": "non-targeting",
        "data.kwargs.embed_key": key,
        "data.kwargs.output_space": space,
        "data.kwargs.num_workers": 0,
        "training.max_steps": 2,
        "training.batch_size": 2,
        "use_wandb": False,
        "output_dir": output,
        "name": "stock",
    }
    run_tx_train(OmegaConf.create(compose([*overrides_of(settings), *small(model)])))


def test_these_are_the_models_of_state() -> None:
    """A new one is to be tried."""
    assert stock_models() == MODELS


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_what_the_dry_run_passes_trains_and_nothing_else_does(
    trains: Any, refused: Any, model: str, tmp_path: Path
) -> None:
    for file, key in INPUTS:
        for space in SPACES:
            arguments = ["--model", model, *options_of(key, space), *small(model)]
            problems = expected_problems(model, file, key, space)
            if not problems:
                steps = 1 if model in ONE_STEP else 2
                name = f"{file}-{key}-{space}"
                trains(*arguments, steps=steps, config=f"{file}.toml", name=name)
                (tmp_path / "runs").rename(tmp_path / f"runs-{name}")
                continue
            refused(*problems, args=arguments, config=f"{file}.toml")
            # without an embedding decoder_only trains nothing, and says nothing
            if model != "decoder_only" or space == "embedding" or len(problems) > 1:
                with pytest.raises((RuntimeError, KeyError, AttributeError, StopIteration)):
                    stock_training(model, file, key, space, tmp_path / "stock")


@pytest.mark.parametrize(
    ("model", "file", "key", "space"),
    [
        ("pertsets", "sim", None, "all"),
        ("scvi", "sim", None, "gene"),
        ("scgpt-genetic", "sim", None, "all"),
        ("embedsum", "sim", None, "all"),
        ("perturb_mean", "sim", "X_emb", "all"),
        ("context_mean", "sim", "X_hvg", "all"),
        ("decoder_only", "sim", None, "all"),
        ("decoder_only", "sim", "X_emb", "embedding"),
        ("decoder_only", "sim", "X_hvg", "gene"),
        ("state_sm", "plain", "X_emb", "gene"),
        ("perturb_mean", "plain", "X_emb", "gene"),
        ("pertsets", "plain", "X_emb", "gene"),
    ],
)
def test_model_that_could_not_be_trained_is_refused_with_the_reason(
    refused: Any, model: str, file: str, key: str | None, space: str
) -> None:
    problems = expected_problems(model, file, key, space)
    arguments = ["--model", model, *options_of(key, space), *small(model)]
    refused(*problems, args=arguments, config=f"{file}.toml")


@pytest.mark.parametrize(
    ("model", "file", "key", "space", "override"),
    [
        ("embedsum", "sim", None, "all", f"+model.cell_set_len={SET}"),
        ("state_sm", "plain", "X_emb", "all", None),
    ],
)
def test_what_a_refusal_offers_trains(
    trains: Any, model: str, file: str, key: str | None, space: str, override: str | None
) -> None:
    arguments = ["--model", model, *options_of(key, space), *small(model)]
    arguments += [override] if override else []
    trains(*arguments, steps=1 if model in ONE_STEP else 2, config=f"{file}.toml")


# --- settings that State's code refuses ---------------------------------------------------------

BACKBONE_KWARGS = "model.kwargs.transformer_backbone_kwargs"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.kwargs.loss=foo", "building it ends in ValueError: Unknown loss function: foo"),
        (
            "training.loss_fn=l1",
            "building it ends in ValueError: Unsupported loss function: l1",
        ),
        ("model.kwargs.distributional_loss=foo", "a training step ends in KeyError: 'foo'"),
        (
            "model.kwargs.finetune_vci_decoder=true",
            "building it ends in FileNotFoundError: [Errno 2] No such file or directory: "
            "'/home/aadduri/vci_pretrain/vci_1.4.4/config.yaml'",
        ),
        *(
            (
                setting,
                f"it takes sets of {SET} cells, and State's training would give it sets of 4; set "
                "model.kwargs.cell_set_len, and no other length",
            )
            for setting in (
                f"{BACKBONE_KWARGS}.max_position_embeddings=4",
                f"+{BACKBONE_KWARGS}.n_positions=4",
                "+model.cell_set_len=4",
            )
        ),
        *(
            (
                f"+model.cell_set_len={value}",
                "State's training does not find how many cells a set has; add "
                f"+model.cell_set_len={SET}",
            )
            for value in (0, "null", "many")
        ),
    ],
)
def test_setting_that_states_code_refuses_is_named(
    refused: Any, override: str, reason: str
) -> None:
    refused(cannot("state_sm", reason), args=[*small("state_sm"), override])


def test_backbone_of_another_width_than_the_model_is_refused(run: Run) -> None:
    done = run("--dry-run", *small("state_sm"), f"{BACKBONE_KWARGS}.hidden_size=12")
    what = re.escape(cannot("state_sm", "a training step ends in RuntimeError: "))
    assert done.code == 1
    assert re.search(rf"^error: {what}.*\b24\b.*\b12\b.*\n\Z", done.err, re.M), done.err


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.kwargs.lora.enable=true", "data.kwargs.embed_key=null"],
        ["model.kwargs.loss=sinkhorn", f"{BACKBONE_KWARGS}.bidirectional_attention=false"],
        *(
            pytest.param(overrides, marks=pytest.mark.slow)
            for overrides in (
                ["model.kwargs.batch_encoder=true"],
                ["+model.kwargs.use_batch_token=true", "data.kwargs.basal_mapping_strategy=batch"],
                ["+model.kwargs.confidence_token=true", "model.kwargs.mask_attn=true"],
                ["model.kwargs.freeze_pert_backbone=true", "training.use_mfu=true"],
                [f"+model.cell_set_len={2 * SET}"],
            )
        ),
    ],
)
def test_setting_that_states_code_takes_is_accepted_and_trains(
    trains: Any, overrides: list[str], folder: Path, tmp_path: Path
) -> None:
    final = trains(*small("state_sm"), *overrides)
    assert size_is_right(tmp_path / "runs" / "run", final)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.kwargs.output_space=genes"],
            "data.kwargs.output_space must be gene, all or embedding, got 'genes'",
        ),
        (
            ["data.kwargs.output_space=null"],
            "data.kwargs.output_space must be gene, all or embedding, got None",
        ),
        (
            ["data.kwargs.embed_key=''"],
            "data.kwargs.embed_key is empty; to train on X, leave it out",
        ),
        (["--embed-key", ""], "data.kwargs.embed_key is empty; to train on X, leave it out"),
        (
            ["data.name=foo"],
            "data.name=foo: State trains on a PerturbationDataModule only; leave data= and "
            "data.name out",
        ),
        (
            ["model.kwargs.init_from=no/such.ckpt"],
            "no such checkpoint to start from (model.kwargs.init_from): no/such.ckpt (looked in "
            "{folder})",
        ),
    ],
)
def test_override_that_states_training_refuses_is_named(
    refused: Any, folder: Path, overrides: list[str], message: str
) -> None:
    refused(message.format(folder=folder), args=overrides)


def test_mean_baseline_resumes_and_its_test_cells_are_predicted_by_the_command_it_prints(
    run: Run, tmp_path: Path, folder: Path
) -> None:
    """State keeps its means as NumPy arrays, which a checkpoint that is read without pickle has
    not, and `state tx infer` knows one class of models."""
    assert run("--model", "celltypemean").code == 0
    resumed = run("--model", "celltypemean", "--resume", "--max-steps", "4")
    assert resumed.code == 0, resumed.err
    run_dir = tmp_path / "runs" / "run"
    assert run_json(run_dir)["steps"] == 4
    finish, last = resumed.err.splitlines()[-2:]
    assert finish.startswith("finished  ")  # State cannot infer with it: there is nothing to check
    assert last == (
        f"predict   state tx predict --output-dir {run_dir} --checkpoint final.ckpt --predict-only"
    )
    done = run_state(*shlex.split(last)[2:], cwd=folder)
    assert done.code == 0, done.err
    predicted = anndata.read_h5ad(run_dir / "eval_final.ckpt" / "adata_pred.h5ad")
    means = torch.load(run_dir / "checkpoints" / "final.ckpt", weights_only=True)
    assert set(means["celltype_pert_means"]) == {"simA", "simB"}
    assert set(predicted.obs["target_gene"]) == {"non-targeting", "SIM004"}
    assert np.isfinite(predicted.X).all()
    command = ["--adata", str(folder / "sim.h5ad"), "--into-run", str(run_dir), "--dry-run"]
    assert create_esm_pert_features.main(command) == 1


@pytest.mark.slow
def test_a_run_starts_from_the_checkpoint_of_another(trains: Any, tmp_path: Path) -> None:
    trains(*small("state_sm"), name="first")
    first = tmp_path / "runs" / "first" / "checkpoints" / "final.ckpt"
    trains(*small("state_sm"), f"model.kwargs.init_from={first}", "--output-space", "gene")


def test_column_for_which_state_sets_the_control_is_refused(
    refused: Any, folder: Path, tmp_path: Path
) -> None:
    data = anndata.read_h5ad(folder / "sim.h5ad")
    data.obs = data.obs.rename(columns={"target_gene": "drugname_drugconc"})
    data.write_h5ad(tmp_path / "drugs.h5ad")
    text = (folder / "config.toml").read_text()
    (tmp_path / "drugs.toml").write_text(text.replace("sim.h5ad", f"{tmp_path}/drugs.h5ad"))
    refused(
        "State's training takes \"[('DMSO_TF', 0.0, 'uM')]\" for the control of a perturbation "
        "column named drugname_drugconc, whatever --control-pert says; give that label, or another "
        "name to the column",
        args=["--pert-col", "drugname_drugconc"],
        config=f"{tmp_path}/drugs.toml",
    )


# --- matrices -----------------------------------------------------------------------------------


def write_files(folder: Path, **change: Callable[[anndata.AnnData], None]) -> str:
    """A dataset of one file for each name, changed so; returns its TOML."""
    for name, apply in change.items():
        data = simulate(SMALL)
        data.obsm["X_emb"] = np.random.default_rng(0).normal(size=(312, 6)).astype(np.float32)
        data.obsm["X_hvg"] = data.X[:, :10].toarray()
        apply(data)
        data.write_h5ad(folder / f"{name}.h5ad")
    config = folder / "files.toml"
    config.write_text(
        f'[datasets]\nd = "{folder}/{{{",".join(change)}}}.h5ad"\n[training]\nd = "train"\n'
        '[fewshot."d.simA"]\nval = ["SIM003"]\ntest = ["SIM004"]\n'
    )
    return str(config)


def whole(data: anndata.AnnData) -> None:
    """As it is."""


def without_hvgs(data: anndata.AnnData) -> None:
    del data.obsm["X_hvg"]


def fewer_hvgs(data: anndata.AnnData) -> None:
    data.obsm["X_hvg"] = data.obsm["X_hvg"][:, :9]


def hvgs_by_column(data: anndata.AnnData) -> None:
    data.obsm["X_hvg"] = scipy.sparse.csc_matrix(data.obsm["X_hvg"])


def hvgs_by_row(data: anndata.AnnData) -> None:
    data.obsm["X_hvg"] = scipy.sparse.csr_matrix(data.obsm["X_hvg"])


def x_by_column(data: anndata.AnnData) -> None:
    data.X = data.X.tocsc()


def without_x(data: anndata.AnnData) -> None:
    data.X = None


def embedding_alone(data: anndata.AnnData) -> None:
    without_x(data)
    without_hvgs(data)


EMB_GENE = ["--embed-key", "X_emb", "--output-space", "gene"]
EMB_ALL = ["--embed-key", "X_emb", "--output-space", "all"]
RAW = "data.kwargs.store_raw_basal=true"


@pytest.mark.parametrize(
    ("files", "args", "message"),
    [
        (
            {"a": whole, "b": without_hvgs},
            EMB_GENE,
            "1 file without obsm/X_hvg, whose genes State would learn with --output-space gene "
            "({b}). Choose --output-space all or embedding, or add adata.obsm['X_hvg']",
        ),
        (
            {"a": without_hvgs, "b": without_hvgs},
            EMB_GENE,
            "2 files without obsm/X_hvg, whose genes State would learn with --output-space gene "
            "({a}, {b}). Choose --output-space all or embedding, or add adata.obsm['X_hvg']",
        ),
        (
            {"a": whole, "b": fewer_hvgs},
            EMB_GENE,
            "1 file with other than 10 columns in obsm/X_hvg ({b}). Choose --output-space all or "
            "embedding, or write adata.obsm['X_hvg'] with the same genes in every file",
        ),
        (
            {"a": hvgs_by_column},
            EMB_GENE,
            "{a}: cell-load cannot read obsm/X_hvg (stored as csc_matrix). Write it again with a "
            f"current anndata, after {SETTING}adata.obsm['X_hvg'] = adata.obsm['X_hvg'].tocsr(), "
            "or train with --fast-loading, whose copies it can read",
        ),
        (
            {"a": x_by_column},
            EMB_ALL,
            "{a}: cell-load cannot read X (stored as csc_matrix). Write it again with a current "
            f"anndata, after {SETTING}adata.X = adata.X.tocsr()",
        ),
        (
            {"a": without_x},
            EMB_ALL,
            "1 file without X, whose genes State would learn with --output-space all ({a}). Choose "
            "--output-space gene or embedding, or add adata.X",
        ),
        (
            {"a": embedding_alone},
            ["--embed-key", "X_emb", "--output-space", "embedding"],
            "1 file with neither X nor obsm/X_hvg, of which cell-load counts the genes ({a}). Add "
            "adata.X",
        ),
        (
            {"a": without_hvgs},
            [RAW, "--output-space", "gene"],
            "1 file without obsm/X_hvg, which data.kwargs.store_raw_basal=true reads ({a}). Choose "
            "--output-space all or embedding, or add adata.obsm['X_hvg']",
        ),
    ],
)
def test_matrix_that_cell_load_would_miss_is_named_for_every_file(
    refused: Any, tmp_path: Path, files: Any, args: list[str], message: str
) -> None:
    config = write_files(tmp_path, **files)
    names = {name: tmp_path / f"{name}.h5ad" for name in files}
    refused(message.format(**names), args=[*args, *small("state_sm")], config=config)


@pytest.mark.parametrize(
    ("files", "args"),
    [
        ({"a": without_hvgs, "b": fewer_hvgs, "c": whole}, ["--output-space", "gene"]),
        ({"a": without_hvgs, "b": fewer_hvgs, "c": hvgs_by_column}, EMB_ALL),
        ({"a": without_x, "b": hvgs_by_row}, EMB_GENE),
        *(
            pytest.param({"a": change}, [*args, "--output-space", space], marks=pytest.mark.slow)
            for change, args, space in (
                (x_by_column, ["--embed-key", "X_emb"], "embedding"),
                (whole, ["--embed-key", "X_hvg", RAW], "all"),
                (without_hvgs, [RAW], "all"),
            )
        ),
    ],
)
def test_matrix_that_cell_load_does_not_read_may_be_missing(
    trains: Any, tmp_path: Path, files: Any, args: list[str]
) -> None:
    trains(*args, *small("state_sm"), config=write_files(tmp_path, **files))


# --- as State makes it --------------------------------------------------------------------------


def plan_of(run_dir: Path) -> tuple[dict[str, Any], list[DataFile]]:
    """(stock configuration, files) of a run, read again."""
    stock = compose(run_json(run_dir)["overrides"])
    found = Findings()
    asked = {"data.kwargs.pert_col": "target_gene"}
    data = inspect_data(run_dir / "config.toml", asked, stock["data"]["kwargs"], found)
    assert data is not None and found.problems == []
    return stock, data.files


def size_is_right(run_dir: Path, final: dict[str, Any]) -> bool:
    """The size that is planned with is that of the file; the decoder is the one that was made."""
    stock, files = plan_of(run_dir)
    dims = data_dims(files, SMALL.width)
    decoder = as_run_tx_train(stock, dims)["model"]["kwargs"].get("decoder_cfg")
    assert final["hyper_parameters"]["decoder_cfg"] == decoder
    module = torch.load(run_dir / "data_module.torch", weights_only=False)
    assert set_length(stock) == module["cell_sentence_len"]
    _, size = try_model(stock, dims)
    assert stock == compose(run_json(run_dir)["overrides"])  # State writes into its own
    real = (run_dir / "checkpoints" / "final.ckpt").stat().st_size
    assert size is not None
    return size < real < 1.02 * size + 50_000


@pytest.mark.parametrize(
    ("model", "key", "space"),
    [
        ("state", None, "all"),
        ("state", None, "gene"),
        ("state", "X_emb", "embedding"),
        ("state", "X_emb", "all"),
        ("pseudobulk", None, "all"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("state", None, "embedding"),
                ("state", "X_emb", "gene"),
                ("state_sm", "X_hvg", "gene"),
                ("pseudobulk", "X_emb", "all"),
                ("perturb_mean", None, "all"),
            )
        ),
    ],
)
def test_size_of_a_checkpoint_is_that_of_the_file(
    trains: Any, tmp_path: Path, model: str, key: str | None, space: str
) -> None:
    large_decoder = ["++model.kwargs.decoder_hidden_dims=[512,512]"]
    arguments = ["--model", model, *options_of(key, space), *small(model), *large_decoder]
    final = trains(*arguments, steps=1 if model in ONE_STEP else 2)
    assert size_is_right(tmp_path / "runs" / "run", final)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("key", [None, "X_hvg", "X_emb"])
def test_widths_are_those_that_the_data_module_gives_state(
    run: Run, folder: Path, key: str | None, space: str
) -> None:
    from cell_load.data_modules import PerturbationDataModule

    done = run("--dry-run", *options_of(key, space))
    stock = compose(shlex.split(done.out)[4 if done.out.startswith("PYTHON") else 3 :])
    data = inspect_data(Path("sim.toml"), {}, stock["data"]["kwargs"], Findings())
    assert data is not None
    module = PerturbationDataModule(cell_sentence_len=4, batch_size=2, **stock["data"]["kwargs"])
    module.setup()
    real = module.get_var_dims()
    ours = data_dims(data.files, SMALL.width)
    assert ours == {name: real[name] for name in ours}
    assert (ours["batch_dim"], ours["hvg_dim"]) == (2, 10)


def test_batches_are_counted_over_all_files_and_kinds_of_column(tmp_path: Path) -> None:
    def lanes(first: int) -> Callable[[anndata.AnnData], None]:
        def apply(data: anndata.AnnData) -> None:
            data.obs["lane"] = np.arange(312) % 3 + first

        return apply

    config = Path(write_files(tmp_path, a=lanes(0), b=lanes(1)))
    for column, expected in (("lane", 4), ("batch_var", 2)):
        asked = {"data.kwargs.batch_col": column}
        stock = compose(["model=state_sm"])
        found = Findings()
        data = inspect_data(config, asked, stock["data"]["kwargs"], found)
        assert data is not None and found.problems == []
        assert data_dims(data.files, 8)["batch_dim"] == expected
