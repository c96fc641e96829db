"""README, help and packaging say what the code does."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import create_esm_pert_features
import state_esm_features
import train_with_esm_features
from state_esm_features.experiment import experiment_problems, load_experiment
from state_esm_features.option_groups import add_feature_options

SCRIPTS = {
    "create_esm_pert_features": create_esm_pert_features,
    "train_with_esm_features": train_with_esm_features,
}
CODE = [*ROOT.glob("*.py"), *(ROOT / "state_esm_features").rglob("*.py")]
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {o: a for a in parser._actions for o in a.option_strings if o.startswith("--")}


def table_rows(script: str) -> str:
    """First column of the option table under the script's heading."""
    section = README.split(f"### `{script}.py`")[1].split("\n#")[0]
    return "\n".join(re.findall(r"^\| (.+?) \| .*\|$", section, re.MULTILINE))


def own_options(script: str) -> dict[str, argparse.Action]:
    """The options of a script that are not script 1's for making features."""
    parser = argparse.ArgumentParser(add_help=False)
    add_feature_options(parser)
    shared = options(parser) if script == "train_with_esm_features" else {}
    return {o: a for o, a in options(SCRIPTS[script].build_parser()).items() if o not in shared}


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_table_lists_exactly_the_options_of_the_parser(script: str) -> None:
    written = set(re.findall(r"--[a-z][a-z-]+", table_rows(script)))
    assert written == set(own_options(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_table_lists_the_choices_of_the_parser(script: str) -> None:
    for name, action in own_options(script).items():
        if action.choices:
            shown = "\\|".join(map(str, action.choices))
            assert f"{name} {shown}" in table_rows(script)


def test_every_option_in_the_readme_exists() -> None:
    known = {o for m in SCRIPTS.values() for o in options(m.build_parser())}
    stock = {"--model-dir", "--checkpoint"}  # of state tx infer and predict
    slurm = {"--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal"}
    slurm |= {"--requeue", "--open-mode", "--kill-on-bad-exit"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) - known - stock - slurm == set()


def test_commands_in_the_readme_parse() -> None:
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    parsed = 0
    for line in blocks.splitlines():
        found = re.search(r"(create|train)[_-](\w+[_-])+features(\.py)? (--.*)", line)
        if not found:
            continue
        for command in filter(str.strip, found[0].split("&&")):
            name = command.split()[0].removesuffix(".py").replace("-", "_")
            words = shlex.split(command, comments=True)[1:]
            parser = SCRIPTS[name].build_parser()
            getattr(SCRIPTS[name], "parse", parser.parse_intermixed_args)(words)
            parsed += 1
    assert parsed == 12


def test_readme_is_short_and_names_make_targets_that_exist() -> None:
    assert len(README.splitlines()) < 300
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z][a-z-]*)", README)) - {"it"}
    assert targets == {"demo", "evaluate", "test", "test-slow"}
    assert all(f"\n{t}:" in makefile for t in targets)


@pytest.mark.parametrize("script", SCRIPTS)
def test_error_texts_of_the_troubleshooting_table_are_in_the_code(script: str) -> None:
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    texts = re.findall(r"^\| `(.+?)`(?:, `(.+?)`)* \|", section, re.MULTILINE)
    code = "".join(path.read_text() for path in CODE)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # messages run over lines
    for text in (t.strip(". ") for pair in texts for t in pair if t):
        if text.startswith("no obs column") or text.startswith("no .h5"):
            text = text.split(" batch_var")[0].split(" at")[0]
        assert text in code, text


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_equals_pyproject(script: str) -> None:
    """PEP 723, so that `uv run script.py` works with nothing installed."""
    text = (ROOT / f"{script}.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)
    assert block is not None
    inline = tomllib.loads("".join(line[2:] + "\n" for line in block[1].splitlines()))
    assert inline["dependencies"] == PYPROJECT["project"]["dependencies"]
    assert inline["requires-python"] == PYPROJECT["project"]["requires-python"]


def test_every_dependency_is_pinned_within_its_bound() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    for python in ("3.11", "3.12"):
        here = {
            canonicalize_name(p.name): str(p.specifier).removeprefix("==")
            for p in pins
            if p.marker is None or p.marker.evaluate({"python_version": python})
        }
        for requirement in map(Requirement, wanted):
            assert requirement.specifier.contains(here[requirement.name]), requirement
        assert f"torch=={here['torch']}" in README


def test_console_commands_and_modules_exist() -> None:
    scripts = PYPROJECT["project"]["scripts"]
    assert scripts == {
        "create-esm-pert-features": "create_esm_pert_features:main",
        "train-with-esm-features": "train_with_esm_features:main",
    }
    assert PYPROJECT["tool"]["setuptools"]["py-modules"] == list(SCRIPTS)
    assert state_esm_features.__version__ == PYPROJECT["project"]["version"]


def test_the_wheel_has_both_commands_and_their_parts(tmp_path: Path) -> None:
    """Built and installed into an empty folder, beside which nothing of the repository lies."""
    clean = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "demo"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheel", clean]
    subprocess.run(wheel, check=True, capture_output=True)
    [built] = (tmp_path / "wheel").iterdir()
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, built], check=True)
    torch.save({"A": torch.tensor([1.0, 2.0])}, tmp_path / "t.pt")
    (tmp_path / "g.txt").write_text("A\n")
    env = {**os.environ, "PYTHONPATH": str(site)}
    for name in SCRIPTS:
        command = site / "bin" / name.replace("_", "-")
        help_text = subprocess.run(
            [sys.executable, command, "--help"], capture_output=True, text=True, env=env
        )
        assert help_text.stdout == SCRIPTS[name].build_parser().format_help(), help_text.stderr
    words = ["--gene-list", "g.txt", "--esm-embeddings", "t.pt", "--output", "f.pt"]
    done = subprocess.run(
        [sys.executable, site / "bin" / "create-esm-pert-features", *words],
        **{"cwd": tmp_path, "env": env, "capture_output": True, "text": True},
    )
    assert (done.returncode, done.stdout) == (0, "f.pt\n"), done.stderr
    features = torch.load(tmp_path / "f.pt", weights_only=True)
    assert features["A"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_copied_alone_says_what_it_needs(script: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", f"{script}.py", "--help"],  # without what is installed
        **{"cwd": tmp_path, "capture_output": True, "text": True},
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        f"error: {script}.py needs the folder state_esm_features of the same repository: keep it "
        "beside the script, or pip install the repository\n",
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script} as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'pandas', 'anndata', 'scanpy', 'h5py', 'state', 'cell_load',"
        " 'lightning', 'hydra', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"
    for option in options(SCRIPTS[script].build_parser()):
        assert option in done.stdout


def test_shipped_configurations_have_a_header_and_parse() -> None:
    names = {p.name for p in (ROOT / "configs").iterdir()}
    assert names == {
        *("vcc.toml", "fewshot.toml", "zeroshot.toml", "demo.toml", "esm_genetic_example.toml"),
    }
    for name in names:
        path = ROOT / "configs" / name
        header = re.match(r"(#.*\n)+", path.read_text())
        assert header is not None
        for word in ("Purpose:", "Hardware:", "Minutes:", "Expect:"):
            assert word in header[0], (name, word)
        experiment = load_experiment(path)
        assert experiment_problems(experiment) == []
