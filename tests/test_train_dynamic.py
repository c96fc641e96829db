"""Training without a features file: the labels of the TOML are resolved and embedded on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, Result, run_script
from random_esm2 import write_checkpoint
from test_train_run import FAST, TINY, make_screen, run_json

import create_esm_pert_features
import train_with_esm_features
from state_esm_features.embedding import vectors as vectors_module
from state_esm_features.embedding.gene_names import HGNC_COLUMNS

TABLE = '[features]\nesm-embeddings = "table.pt"\n'


@pytest.fixture(scope="module")
def screen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_screen(tmp_path_factory.mktemp("screen"), {"sim": SMALL})


@pytest.fixture
def folder(screen_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the screen, which is the working directory; its config.toml names the table."""
    copy = Path(shutil.copytree(screen_dir, tmp_path / "screen"))
    (copy / "config.toml").write_text((copy / "config.toml").read_text() + TABLE)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def train(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run train_with_esm_features.main([...]) in this process; the run is folder/runs/run."""

    def call(*words: object, steps: int = 1) -> Result:
        capsys.readouterr()
        all_words = ("--config", "config.toml", "--name", "run", "--max-steps", steps, *FAST)
        try:
            code = train_with_esm_features.main([str(w) for w in (*all_words, *words, *TINY)])
        except SystemExit as usage:
            code = int(usage.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def create(folder: Path, *words: object) -> Path:
    """What script 1 writes."""
    words = ("--from-toml", "config.toml", *words, "--output", folder / "alone.pt")
    done = run_script("create_esm_pert_features", *words, cwd=folder)
    assert done.code == 0, done.err
    return folder / "alone.pt"


def manifest(features: Path) -> dict[str, Any]:
    content = json.loads(features.with_name(features.name + ".json").read_text())
    return {k: v for k, v in content.items() if k != "command"}


def write_proteins(folder: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [f">{s}\nM{''.join(rng.choice(list('ACDEFGHIKL'), 20))}\n" for s in SMALL.symbols]
    (folder / "p.fasta").write_text("".join(lines))
    write_checkpoint(folder / "m.pt")


def sections(text: str) -> None:
    """Give config.toml another [features] table."""
    path = Path("config.toml")
    path.write_text(path.read_text().split("[features]")[0] + text)


def test_the_run_holds_what_script_1_would_have_written(train: Any, folder: Path) -> None:
    done = train()
    run = folder / "runs" / "run"
    assert (done.code, done.out) == (0, f"{run}\n"), done.err
    lines = done.err.splitlines()
    assert "features  options of [features] in config.toml: --esm-embeddings=table.pt" in lines
    assert f"features  {run}/pert_features.pt (12 x 8)" in lines
    sections("")
    alone = create(folder, "--esm-embeddings", "table.pt")
    assert (run / "pert_features.pt").read_bytes() == alone.read_bytes()
    # the TOML of the run has the table, so its hash differs
    ours, theirs = manifest(run / "pert_features.pt"), manifest(alone)
    for content in (ours, theirs):
        for origin in content["inputs"]:
            origin.pop("sha256", None)
    assert ours == theirs
    command = json.loads((run / "pert_features.pt.json").read_text())["command"]
    assert command == [
        *("--from-toml", "config.toml", "--pert-col", "target_gene"),
        *("--control-pert", "non-targeting", "--esm-embeddings=table.pt"),
    ]
    known = torch.load(run / "pert_onehot_map.pt", weights_only=True)
    assert known.keys() == torch.load(alone, weights_only=True).keys()


def test_script_1_reads_the_table_of_the_toml_too(folder: Path) -> None:
    with_flag = create(folder, "--esm-embeddings", "table.pt").read_bytes()
    assert create(folder).read_bytes() == with_flag


def test_a_held_out_label_whose_vector_trains_is_named(train: Any, folder: Path) -> None:
    """As where the features are named."""
    held = "".join(f'[fewshot."sim.{x}"]\nval = ["SIM003"]\n' for x in SMALL.cell_types)
    Path("config.toml").write_text(
        f'[datasets]\nsim = "sim.h5ad"\n[training]\nsim = "train"\n{held}'
    )
    done = train("--esm-embeddings", "table.pt", "--alias", "SIM003=SIM007", "--dry-run")
    assert done.code == 0, done.err
    assert (
        "warning: 1 label held out has the vector of one that trains (SIM003 = SIM007): not "
        "unseen. Of guides of one gene, hold all out"
    ) in done.err.splitlines()


def test_flags_win_over_the_table(train: Any, folder: Path) -> None:
    table = torch.load("table.pt", weights_only=True)
    torch.save({k: v * 2 for k, v in table.items()}, "double.pt")
    assert train("--esm-embeddings", "double.pt", "--combine", "mean").code == 0
    features = torch.load(folder / "runs/run/pert_features.pt", weights_only=True)
    assert torch.equal(features["SIM004"], table["SIM004"] * 2)
    assert torch.equal(features[SMALL.combination], table["SIM000"] + table["SIM001"])


def test_every_kind_of_option_can_stand_in_the_table(train: Any, folder: Path) -> None:
    table = torch.load("table.pt", weights_only=True)
    table["OTHER"] = table.pop("SIM004")
    torch.save(table, "renamed.pt")
    sections(
        '[features]\nesm_embeddings = ["renamed.pt"]\nmissing = "mean"\ncombine = "mean"\n'
        'prefer-previous = true\nno-cache = false\n[features.alias]\nSIM004 = "OTHER"\n'
    )
    assert train().code == 0
    described = manifest(folder / "runs/run/pert_features.pt")
    assert described["policy"] == {
        "missing": "mean",
        "combine": "mean",
        "scale": "none",
        "separator": "+",
        "label_regex": None,
        "prefer_previous": True,
    }
    assert described["labels"]["SIM004"]["gene"] == "OTHER"


def test_a_run_is_resumed_on_the_scaled_vectors_that_it_keeps(train: Any, folder: Path) -> None:
    rows = torch.stack(list(torch.load("table.pt", weights_only=True).values())).double()
    sections('[features]\nesm_embeddings = ["table.pt"]\nscale = "center"\n')
    assert train().code == 0
    path = folder / "runs/run/pert_features.pt"
    first = path.read_bytes()
    features = torch.load(path, weights_only=True)
    less = torch.load("table.pt", weights_only=True)["SIM004"] - rows.mean(0)
    torch.testing.assert_close(features["SIM004"], less.float())
    assert not features["non-targeting"].any()
    sections('[features]\nesm_embeddings = ["table.pt"]\nscale = "none"\n')
    assert train("--resume", "--max-steps", 3).code == 0
    assert path.read_bytes() == first


def test_scale_is_refused_where_there_is_no_table_to_take_it_from(train: Any, folder: Path) -> None:
    sections('[features]\nfasta = "p.fasta"\nscale = "center"\n')
    done = train()
    assert done.code == 2
    assert done.err.endswith(
        "error: --scale needs one table, whose mean and spread it takes, not none\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[features]\nfastaa = "p.fasta"\n', "[features] has no option 'fastaa' (did you mean "),
        (
            '[features]\nmissing = "maen"\n',
            "[features] argument --missing: invalid choice: 'maen' (choose from ",
        ),
        ("[features]\nlayer = 1.5\n", "[features] argument --layer: invalid int value: '1.5'"),
        ('[feature]\nmissing = "mean"\n', "unknown section [feature] (did you mean features?)"),
    ],
)
def test_wrong_tables_are_named(train: Any, folder: Path, text: str, message: str) -> None:
    sections(text)
    done = train("--esm-embeddings", "table.pt")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: config.toml: {message}"), done.err
    assert done.err.count("\n") == 1
    assert not (folder / "runs").exists()


def test_missing_labels_are_refused_as_script_1_does_and_nothing_is_written(
    train: Any,
    folder: Path,
) -> None:
    table = torch.load("table.pt", weights_only=True)
    table.pop("SIM007")
    torch.save(table, "table.pt")
    done = train()
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1] == (
        "error: 1 of 11 labels has no embedding (SIM007): 'SIM007' is in no table. Add a table "
        "that has them with --esm-embeddings, or their proteins with --fasta, rename with --alias "
        "OLD=NEW, or accept with --missing mean"
    )
    assert not (folder / "runs").exists()
    done = train("--missing", "mean")
    assert done.code == 0
    assert done.err.count("1 of 11 labels missing, or a part of them (SIM007)") == 1


GENES = ("STAT1", "MYC", "WWTR1")
ASK = "Add a table that has them with --esm-embeddings, or their proteins with --fasta, "
OBS = "adata.obs['target_gene']"
GIVE = "a control. Give its cells the label non-targeting: "


def relabelled(pattern: str) -> str:
    """The line of pandas that makes the control of what a pattern finds."""
    replaced = f".str.replace(r'{pattern}', 'non-targeting', regex=True).astype('category')"
    return f"{OBS} = {OBS}{replaced}"


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("NONE1",), (), "1 of 4 labels has no embedding (NONE1): 'NONE1' is in no table. ASK"),
        (
            ("NONE1", "TAZ", "NTC", "nan"),
            (),
            "4 of 7 labels have no embedding (NONE1, NTC, TAZ, nan): 1 ambiguous, 1 named like a "
            f"control, 1 no value, 1 not found\n  - NTC: {GIVE}{relabelled('^NTC$')}\n"
            "  - 'TAZ' is ambiguous: TAFAZZIN (previous symbol, not here) or WWTR1 (alias symbol). "
            "Choose: --alias TAZ=WWTR1\n  - For NONE1, TAZ, nan: ASK",
        ),
        (
            ("TAZ",),
            (),
            "1 of 4 labels has no embedding (TAZ): 'TAZ' is ambiguous: TAFAZZIN (previous symbol, "
            "not here) or WWTR1 (alias symbol)\n  - Choose: --alias TAZ=WWTR1\n  - ASK",
        ),
        (
            ("NTC",),
            (),
            "1 of 4 labels has no embedding (NTC): 'NTC' is the name of a control, not of a gene. "
            f"NTC: {GIVE}{relabelled('^NTC$')}",
        ),
        (
            ("STAT1+ctrl",),
            (),
            "1 of 4 labels has no embedding (STAT1+ctrl): 'ctrl' is the name of a control, not of "
            "a gene. STAT1+ctrl: a control beside a gene. Write non-targeting for it: "
            + relabelled("ctrl"),
        ),
        (
            ("nan",),
            (),
            "1 of 4 labels has no embedding (nan): 'nan' stands for no value. ASK",
        ),
        (
            ("NEAT1",),
            ("--hgnc", "hgnc.txt"),
            "1 of 4 labels has no embedding (NEAT1): 'NEAT1' has no protein: NEAT1 is a "
            "non-coding RNA gene. ASK",
        ),
        (
            ("STAT1_g1", "MYC_g2"),
            (),
            "2 of 5 labels have no embedding (MYC_g2, STAT1_g1). 2 of them resolve with "
            "--label-regex '(?P<gene>.+?)[_-](sg|g|guide)?[0-9]+' (MYC_g2 is MYC)",
        ),
        (
            ("STAT1|MYC",),
            (),
            "1 of 4 labels has no embedding (STAT1|MYC): 'STAT1|MYC' is in no table. 1 of them "
            "resolve with --separator '|' (STAT1|MYC is STAT1 and MYC)",
        ),
        (
            ("NONE1", "STAT1+NONE2"),
            ("--missing", "mean"),
            "2 of 5 labels missing, or a part of them (NONE1, STAT1+NONE2): filled with the mean "
            "vector",
        ),
        (
            ("NTC",),
            ("--missing", "zero"),
            "1 of 4 labels missing, or a part of them (NTC): filled with zeros, as if they were "
            "control",
        ),
        (
            (),  # STAT11 in [fewshot]
            (),
            "[fewshot] names 1 label that no file has (STAT11 (did you mean STAT1?)): cell-load "
            "holds nothing out for it. Remove it",
        ),
    ],
)
def test_missing_labels_have_one_message_in_both_scripts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    labels: tuple[str, ...],
    options: tuple[str, ...],
    message: str,
) -> None:
    """But for --report, which the training has not."""
    monkeypatch.chdir(tmp_path)
    everything = ["non-targeting", *GENES, *labels]
    obs = {"target_gene": everything * 4, "cell_type": ["a"] * 4 * len(everything)}
    frame = pd.DataFrame(obs | {"batch": "b"}, dtype="category")
    frame.index = frame.index.astype(str)
    x = np.random.default_rng(0).random((len(frame), 5)).astype(np.float32)
    data = anndata.AnnData(x, obs=frame, var=pd.DataFrame(index=[f"G{i}" for i in range(5)]))
    data.write_h5ad("d.h5ad")
    torch.save({gene: torch.eye(3)[i] for i, gene in enumerate(GENES)}, "t.pt")
    hgnc = (HGNC_COLUMNS, ("HGNC:30815", "NEAT1", "non-coding RNA"))
    Path("hgnc.txt").write_text("\n".join("\t".join((*row, *[""] * 4)[:7]) for row in hgnc))
    held_out = '"MYC"' if labels else '"STAT11"'
    Path("c.toml").write_text(
        f'[datasets]\nd = "d.h5ad"\n[training]\nd = "train"\n[fewshot."d.a"]\nval = [{held_out}]\n'
    )
    sources = ("--esm-embeddings", "t.pt", *options, "--dry-run")
    commands = {
        "see all with --report FILE.tsv --dry-run, ": lambda: create_esm_pert_features.main(
            ["--from-toml", "c.toml", *sources, "--output", "o.pt"]
        ),
        "": lambda: train_with_esm_features.main(["--config", "c.toml", *sources]),
    }
    for report, command in commands.items():
        code = command()
        said = capsys.readouterr().err
        if "--missing" in options or not labels:
            assert (code, said.splitlines().count(f"warning: {message}")) == (0, 1)
            continue
        ask = f"{ASK}rename with --alias OLD=NEW, {report}or accept with --missing mean"
        error = said[said.index("error: ") :]
        assert (code, error) == (1, f"error: {message.replace('ASK', ask)}\n")


@pytest.fixture
def two_columns(folder: Path) -> str:
    """The screen with labels in `gene`, of which the control is NT, and `target_gene` beside it;
    the line of the plan that says what is read."""
    screen = anndata.read_h5ad("sim.h5ad")
    names = {"non-targeting": "NT"}
    screen.obs["gene"] = screen.obs["target_gene"].cat.rename_categories(names)
    screen.write_h5ad("sim.h5ad")
    return "columns   perturbation gene, cell type cell_type, batch batch_var, control NT"


def test_column_and_control_are_those_of_the_features_if_nothing_else_says_them(
    train: Any, folder: Path, two_columns: str
) -> None:
    done = train("--pert-features", "features.pt", "--dry-run")
    assert (done.code, done.err.splitlines()[-1]) == (
        0,
        "dry run (new): nothing written. The stock command for it:",
    )  # these were made of target_gene
    made = create(folder, "--pert-col", "gene", "--control-pert", "NT")
    assert manifest(made)["pert_col"] == "gene"
    done = train("--pert-features", made, "--dry-run")
    assert done.code == 0, done.err
    assert two_columns in done.err.splitlines()
    done = train("--pert-features", made, "--control-pert", "SIM001", "--dry-run")
    assert done.code == 1
    assert (
        f"{made} was made for the control 'NT', but this run's control is 'SIM001'; make it again, "
        "or correct --control-pert" in done.err
    )
    done = train("--pert-features", made, "--pert-col", "target_gene", "--dry-run")
    assert done.code == 1  # what is typed is firmer
    assert "no cell has the control label 'NT' in obs column 'target_gene'" in done.err


UNUSED = (
    "features  not used of [features] in config.toml: --esm-embeddings=table.pt (--pert-features)"
)


def test_column_and_control_may_stand_in_the_table_of_the_toml(
    train: Any, folder: Path, two_columns: str
) -> None:
    sections(f'{TABLE}pert-col = "gene"\ncontrol-pert = "NT"\n')
    made = create(folder)
    assert manifest(made)["control"] == "NT"
    for words in (("--pert-features", made), ()):
        done = train(*words, "--dry-run")
        assert done.code == 0, done.err
        assert two_columns in done.err.splitlines()
    said = "features  options of [features] in config.toml: "
    columns = "--pert-col=gene --control-pert=NT"
    assert f"{said}--esm-embeddings=table.pt {columns}" in done.err.splitlines()
    done = train("--pert-features", made, "--dry-run")
    assert f"{said}{columns}" in done.err.splitlines()
    assert UNUSED in done.err.splitlines()


def test_named_features_need_no_options_and_leave_the_table_alone(train: Any, folder: Path) -> None:
    done = train("--pert-features", "features.pt", "--missing", "mean")
    assert done.code == 2
    assert done.err.endswith("error: --pert-features does not go with --missing\n")
    torch.save({"SIM000": torch.ones(3)}, "table.pt")
    done = train("--pert-features", "features.pt", "--dry-run")
    assert done.code == 0, done.err
    assert f"{UNUSED}\n" in done.err
    assert "options of [features]" not in done.err


def test_again_is_up_to_date_and_a_changed_table_is_another_run(train: Any, folder: Path) -> None:
    assert train().code == 0
    done = train()
    run = folder / "runs" / "run"
    assert done.err.splitlines()[-1] == f"up to date: {run} finished with the same inputs"
    text = Path("config.toml").read_text()
    Path("config.toml").write_text(f"# a comment\n{text}")
    assert "up to date" in train().err
    table = torch.load("table.pt", weights_only=True)
    table["SIM004"] += 1
    torch.save(table, "table.pt")
    done = train()
    assert done.code == 1
    assert "exists with other inputs (features sha256: " in done.err.splitlines()[-1]
    assert train("--overwrite").code == 0
    features = torch.load(run / "pert_features.pt", weights_only=True)
    assert torch.equal(features["SIM004"], table["SIM004"])


def test_proteins_are_computed_after_all_checks_and_the_run_resumes(
    train: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections("")
    write_proteins(folder)
    words = ("--fasta", "p.fasta", "--esm-model", "m.pt", "--device", "cpu", "--cache", "cache")
    with monkeypatch.context() as patch:
        patch.setattr(vectors_module, "embed_genes", lambda *_: pytest.fail("computes already"))
        done = train(*words, "--dry-run")
        assert done.code == 0, done.err
        lines = done.err.splitlines()
        assert "10 genes to compute before the training" in lines
        assert f"features  {folder}/runs/run/pert_features.pt (12 x 16)" in lines
        assert not (folder / "runs").exists()
        done = train(*words, "--batch-col", "nowhere")
        assert done.code == 1
        assert "obs column 'nowhere'" in done.err
        done = train(*words, "model.kwargs.loss=nowhere")
        assert done.code == 1
        assert done.err.endswith("ends in ValueError: Unknown loss function: nowhere\n")
    assert train(*words).code == 0
    run = folder / "runs" / "run"
    alone = create(folder, *words)
    assert (run / "pert_features.pt").read_bytes() == alone.read_bytes()
    done = train(*words, "--resume", steps=2)
    assert done.code == 0, done.err
    assert "10 in the cache, 0 to compute" in done.err
    assert (run_json(run)["status"], run_json(run)["steps"]) == ("finished", 2)


@pytest.mark.parametrize("named", [True, False])
def test_resumed_run_keeps_its_features_unless_others_are_asked_for(
    train: Any, folder: Path, named: bool
) -> None:
    run = folder / "runs" / "run"
    done = train(*(("--pert-features", "features.pt") if named else ()))
    assert done.code == 0, done.err
    kept = (run / "pert_features.pt").read_bytes()
    (folder / "genes.txt").write_text("SIMEXTRA000\n")
    words = ("--gene-list", "genes.txt", "--into-run", run)
    assert run_script("create_esm_pert_features", *words, cwd=folder).code == 0
    Path("table.pt").unlink()
    Path("features.pt").unlink()
    done = train("--resume", steps=2)
    assert done.code == 0, done.err
    assert run_json(run)["identity"]["features"]["sha256"] == hashlib.sha256(kept).hexdigest()
    known = torch.load(run / "pert_onehot_map.pt", weights_only=True)
    assert "SIMEXTRA000" in known
    table = torch.load(run / "pert_features.pt", weights_only=True)
    torch.save({k: v + 1 for k, v in table.items() if v.any()}, "table.pt")
    done = train("--resume", "--esm-embeddings", "table.pt", steps=3)
    assert done.code == 1
    assert "was trained otherwise (features sha256: " in done.err
