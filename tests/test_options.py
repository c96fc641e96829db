"""Options are declared once; of several sayings the firmest holds."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import create_esm_pert_features
import train_with_esm_features
from state_esm_features.console import InputError
from state_esm_features.option_groups import (
    FEATURE_GROUPS,
    FEATURES,
    IN_SECTION,
    FeatureOptions,
    LabelOptions,
    SequenceOptions,
    feature_options,
    without_defaults,
)
from state_esm_features.option_rules import misused
from state_esm_features.options import (
    add_options,
    as_words,
    first_given,
    make,
    read_call,
    read_table,
)
from state_esm_features.training_options import (
    DataOptions,
    RunOptions,
    TrainingOptions,
    WandbOptions,
)


@pytest.mark.parametrize(
    ("layers", "holds"),
    [
        ([{"missing": "zero"}, {"missing": "mean"}], {"missing": "zero"}),
        ([{}, {"missing": "mean"}, {"missing": "error"}], {"missing": "mean"}),
        ([{"combine": "sum"}, {"missing": "mean"}], {"combine": "sum", "missing": "mean"}),
        ([{"missing": "error"}, {"missing": "mean"}], {"missing": "error"}),  # a default, typed
        ([{"fasta": ("a",)}, {"fasta": ("b", "c")}], {"fasta": ("a",)}),
        ([{"no_cache": True}, {"cache": Path("c")}], {"no_cache": True}),
        ([{"cache": Path("c")}, {"no_cache": True}], {"cache": Path("c")}),
        ([{}, {"cache": Path("c")}, {"no_cache": True}], {"cache": Path("c")}),
        (
            [
                {"alias": [("A", "B")]},
                {"alias": (("A", "X"), ("C", "D"))},
                {"alias": (("C", "Y"),)},
            ],
            {"alias": (("A", "B"), ("C", "D"))},
        ),
        (
            [{"alias": [("A", "B"), ("A", "C")]}],
            {"alias": (("A", "B"), ("A", "C"))},
        ),  # to be refused
    ],
)
def test_the_firmest_saying_holds(layers: list[Mapping[str, Any]], holds: dict[str, Any]) -> None:
    assert first_given(*layers) == holds


@pytest.mark.parametrize(
    ("table", "options"),
    [
        ({"fasta": "p.fa"}, {"fasta": (Path("p.fa"),)}),
        ({"esm_embeddings": ["a.pt", "b.pt"]}, {"esm_embeddings": (Path("a.pt"), Path("b.pt"))}),
        ({"alias": {"A": "B"}}, {"alias": (("A", "B"),)}),
        ({"alias": ["A=B", "C=D"]}, {"alias": (("A", "B"), ("C", "D"))}),
        ({"layer": 5, "no-cache": True}, {"layer": 5, "no_cache": True}),
        ({"table-key": "obsm/esm"}, {"table_key": "obsm/esm"}),
        ({"pert-col": "gene", "control-pert": "NT"}, {"pert_col": "gene", "control_pert": "NT"}),
    ],
)
def test_values_of_a_toml_are_those_of_a_command_line(
    table: dict[str, Any], options: dict[str, Any]
) -> None:
    assert read_table(table, IN_SECTION) == options
    parser = argparse.ArgumentParser()
    add_options(parser, FeatureOptionsAndColumns, "all")
    typed = vars(parser.parse_args(as_words(options, IN_SECTION)))
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in typed.items()} == options


class FeatureOptionsAndColumns:
    """All that may stand in a TOML, as one group."""

    __dataclass_fields__ = IN_SECTION


@pytest.mark.parametrize(
    ("call", "options"),
    [
        ({"fasta": Path("p.fa")}, {"fasta": (Path("p.fa"),)}),
        ({"fasta": ("a.fa", Path("b.fa"))}, {"fasta": (Path("a.fa"), Path("b.fa"))}),
        ({"alias": {"A": "B"}}, {"alias": (("A", "B"),)}),
        ({"alias": [("A", "B"), "C=D"]}, {"alias": (("A", "B"), ("C", "D"))}),
        ({"label_regex": re.compile("(?P<gene>.+)_g1")}, {"label_regex": "(?P<gene>.+)_g1"}),
        ({"fast_loading": True, "num_workers": "2"}, {"fast_loading": "sorted", "num_workers": 2}),
        ({"prefer_previous": False, "cache": None, "fasta": []}, {}),
        ({"wandb_tags": "a,b", "max_steps": 5}, {"wandb_tags": "a,b", "max_steps": 5}),
    ],
)
def test_values_of_a_call_are_those_of_a_command_line(
    call: dict[str, Any], options: dict[str, Any]
) -> None:
    groups = (DataOptions, TrainingOptions, RunOptions, *FEATURE_GROUPS.values(), WandbOptions)
    given, words = read_call("train", {"config": "c.toml", **call}, groups, lambda _: None)
    parser = argparse.ArgumentParser()
    for group in groups:
        add_options(parser, group, "any")
    typed = vars(parser.parse_args(words))
    expected = {"config": Path("c.toml"), **options}
    if "label_regex" in options:
        assert given.pop("label_regex").pattern == typed.pop("label_regex").pattern
        assert expected.pop("label_regex") == call["label_regex"].pattern
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in typed.items()} == expected
    assert {k: v for k, v in given.items() if v is not False} == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"missing": "maen"},
            "argument --missing: invalid choice: 'maen' (choose from 'error', 'mean', 'zero')",
        ),
        ({"layer": 1.5}, "argument --layer: invalid int value: '1.5'"),
        ({"layer": [1]}, "argument --layer: expected one value, got [1]"),
        ({"alias": ["AB"]}, "argument --alias: expected OLD=NEW, got 'AB'"),
        ({"label-regex": "(x"}, "argument --label-regex: '(x' is no regular expression: "),
        ({"no-cache": "yes"}, "argument --no-cache: expected true or false, got 'yes'"),
        ({"max-steps": 3}, "has no option 'max-steps'; options: alias, aliases, cache, combine, "),
    ],
)
def test_wrong_values_of_a_toml_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as said:
        read_table(table, IN_SECTION)
    assert str(said.value).startswith(message)


def test_what_is_not_given_is_not_the_default() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, LabelOptions, "labels")
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--control-pert", "NT"])) == {"control_pert": "NT"}
    assert make(LabelOptions, {}) == LabelOptions()
    assert make(LabelOptions, {"adata": [Path("a")], "missing": "zero"}).adata == (Path("a"),)


def test_only_options_that_are_not_at_their_default_are_recorded() -> None:
    assert without_defaults(FeatureOptions()) == {}
    given = {"missing": "mean", "separator": "+", "label_regex": re.compile("(?P<gene>.+)_g1")}
    options = without_defaults(feature_options(given))
    assert as_words(options, FEATURES) == ["--label-regex=(?P<gene>.+)_g1", "--missing=mean"]


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({}, None),
        ({"separator": ""}, "--separator is empty"),
        (
            {"cache": Path("c"), "no_cache": True, "fasta": [Path("p")]},
            "--cache and --no-cache exclude each other",
        ),
        ({"long": "truncate"}, "--long needs --fasta FILE"),
        ({"long": "truncate", "fasta": [Path("p")]}, None),
        ({"no_cache": False}, None),
        ({"layer": 3}, "--layer needs --fasta FILE"),
        ({"layer": 3, "esm_embeddings": [Path("folder")]}, None),
        ({"table_key": "X"}, "--table-key needs --esm-embeddings PATH"),
        ({"table_key": "X", "esm_embeddings": [Path("t")]}, None),
        ({"scale": "center"}, None),  # of Arc's table
        ({"scale": "none", "fasta": [Path("p")]}, None),
        ({"scale": "standard", "fasta": [Path("p")], "esm_embeddings": [Path("t")]}, None),
        (
            {"scale": "standard", "fasta": [Path("p")]},
            "--scale needs one table, whose mean and spread it takes, not none",
        ),
        (
            {"scale": "center", "esm_embeddings": [Path("t"), Path("u")]},
            "--scale needs one table, whose mean and spread it takes, not 2",
        ),
        (
            {"scale": "center", "missing": "mean"},
            "--scale does not go with --missing mean: that mean is nearly 0, as the control is",
        ),
        ({"scale": "center", "missing": "zero"}, None),
        (
            {"scale": "center", "ablation": "onehot"},
            "--scale does not go with --ablation onehot, whose vectors come from no table",
        ),
        ({"scale": "center", "ablation": "shuffle"}, None),
    ],
)
def test_combinations_that_mean_nothing_are_named(given: dict[str, Any], wrong: str | None) -> None:
    assert misused(feature_options(given), given) == wrong


COMMANDS = [create_esm_pert_features, train_with_esm_features]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (0, "--from-tom c.toml --output o.pt", "--from-tom c.toml (did you mean --from-toml?)"),
        (
            0,
            "--from-toml c.toml --mising mean",
            "--mising mean (did you mean --missing, --precision?)",
        ),
        (0, "--from-toml c.toml --zzz", "--zzz"),
        (
            1,
            "--config c.toml --max-step 3",
            "--max-step (did you mean --max-steps?)",
        ),
        (
            1,
            "--config c.toml --pert-feature=f.pt",
            "--pert-feature=f.pt (did you mean --pert-features?)",
        ),
    ],
)
def test_a_mistyped_option_is_told_what_it_may_have_been(
    capsys: pytest.CaptureFixture[str], command: int, words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        COMMANDS[command].main(words.split())
    said = capsys.readouterr().err.splitlines()[-1]
    name = COMMANDS[command].build_parser().prog
    assert (left.value.code, said) == (2, f"{name}: error: unrecognized arguments: {message}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_phrases_of_at_most_two_lines(command: Any) -> None:
    """On a terminal of a hundred columns."""
    for action in command.build_parser()._actions:
        text = (action.help or "") % vars(action)
        assert text and not text.startswith("(") and len(text) <= 148, action.option_strings


def test_resume_and_overwrite_stand_with_the_run_in_help() -> None:
    [run] = [g for g in COMMANDS[1].build_parser()._action_groups if g.title == "run"]
    names = [action.option_strings[0] for action in run._group_actions]
    assert names == [f"--{f.name.replace('_', '-')}" for f in fields(RunOptions)]


def test_the_seed_of_an_ablation_has_the_same_name_in_both() -> None:
    """--seed is the training's in the training, and the ablation's where there is no other."""
    create, train = (command.build_parser()._option_string_actions for command in COMMANDS)
    assert create["--ablation-seed"] is create["--seed"]
    assert "--ablation-seed" not in train and train["--seed"].dest == "seed"


def test_names_of_a_group_are_its_own() -> None:
    """Groups of one command share no name, so that {option: value} can hold all of them."""
    for groups in ((LabelOptions,), (DataOptions, TrainingOptions, RunOptions)):
        names = [f.name for group in groups for f in fields(group)] + [*FEATURES]
        assert len(names) == len(set(names))
    assert {f.name for f in fields(SequenceOptions)} <= FEATURES.keys()


def test_no_function_of_the_package_takes_a_namespace() -> None:
    for path in (ROOT / "state_esm_features").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                of = [*node.args.args, *node.args.kwonlyargs]
                assert all("Namespace" not in ast.unparse(a.annotation or a) for a in of), path
                assert "args" not in [a.arg for a in of], (path, node.name)
