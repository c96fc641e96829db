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
from options_page import PAGE, page
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import create_esm_pert_features
import state_esm_features
import train_with_esm_features
from state_esm_features.evaluation import __main__ as evaluation
from state_esm_features.experiment import experiment_problems, load_experiment
from state_esm_features.option_groups import PERT_COLUMNS

SCRIPTS = {
    "create_esm_pert_features": create_esm_pert_features,
    "train_with_esm_features": train_with_esm_features,
}
COMMANDS = {**SCRIPTS, "state_esm_features.evaluation.__main__": evaluation}
"""{module: it} of what is typed on a command line."""
CODE = [*ROOT.glob("*.py"), *(ROOT / "state_esm_features").rglob("*.py")]
README = (ROOT / "README.md").read_text()
PAGES = {p.name: p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
"""{file: text} of README and docs."""
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {o: a for a in parser._actions for o in a.option_strings if o.startswith("--")}


def blocks(text: str) -> str:
    """What stands in code blocks, commands on one line."""
    return "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")


def anchors(text: str) -> set[str]:
    """What a link to a heading of a page ends with, as GitHub makes it."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_page_of_options_is_made_from_the_parsers() -> None:
    assert PAGE.read_text() == page()


def test_readme_is_short() -> None:
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 1200


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_the_command_it_is_about(name: str) -> None:
    before, block, _ = PAGES[name].split("```", 2)
    assert re.fullmatch(r"# .+\n\n", before) or name in ("README.md", "cron_and_slurm.md"), before
    assert re.search(r"create.esm.pert|train.with.esm|evaluate-esm|make |pip ", block), block


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """To files and headings of the repository; the network is not asked."""
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        assert (folder / path).is_file(), target
        if heading:
            assert heading in anchors((folder / path).read_text()), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([a-z_]+\.md)\)", README))
    assert linked == {name for name in PAGES if name != "README.md"}


@pytest.mark.parametrize("name", PAGES)
def test_every_option_that_is_named_exists(name: str) -> None:
    known = {o for m in COMMANDS.values() for o in options(m.build_parser())}
    others = {"--model-dir", "--checkpoint", "--include"}  # of state tx infer, predict; extract.py
    others |= {"--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal"}
    others |= {"--requeue", "--open-mode", "--kill-on-bad-exit"}  # of SLURM
    others |= {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--no-python"}
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", PAGES[name])) - known - others == set()


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its words) of every command of ours in the code blocks of a page."""
    found = []
    for line in blocks(text).splitlines():
        for command in line.split("&&"):
            names = r"(?:create-esm-pert|train-with-esm|evaluate-esm)-features .*"
            called = re.search(names, command)
            if called:
                script, *words = shlex.split(called[0], comments=True)
                found.append((script.replace("-", "_"), words))
    return found


def test_commands_parse() -> None:
    parsed = 0
    for name, words in (c for text in PAGES.values() for c in commands(text)):
        if "--help" not in words:
            module = SCRIPTS.get(name, evaluation)
            getattr(module, "parse", module.build_parser().parse_args)(words)
        parsed += 1
    assert parsed >= 25


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        target
        for text in PAGES.values()
        for target in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE)
    }
    assert targets == {"bench-gpu", "demo", "docs", "evaluate", "test"}
    assert all(f"\n{target}:" in makefile for target in targets)


def test_texts_of_the_troubleshooting_page_are_those_of_messages() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", PAGES["troubleshooting.md"], re.MULTILINE)
    texts = [text for row in rows for text in re.findall(r"`(.+?)`", row)]
    assert len(texts) > 8
    code = "".join(path.read_text() for path in CODE)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # messages run over lines
    for text in texts:  # a verb is chosen by the number
        assert re.sub("^(has|have) no embedding$", "no embedding ", text) in code, text


def test_columns_that_are_looked_for_are_all_named() -> None:
    for column in PERT_COLUMNS:
        assert f"`{column}`" in PAGES["labels.md"]


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
        "evaluate-esm-features": "state_esm_features.evaluation.__main__:main",
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
    for name, module in (*SCRIPTS.items(), ("evaluate_esm_features", evaluation)):
        command = site / "bin" / name.replace("_", "-")
        help_text = subprocess.run(
            [sys.executable, command, "--help"], capture_output=True, text=True, env=env
        )
        assert help_text.stdout == module.build_parser().format_help(), help_text.stderr
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


@pytest.mark.parametrize("script", COMMANDS)
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
    for option in options(COMMANDS[script].build_parser()):
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
