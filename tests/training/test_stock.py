"""State's own configuration: text that survives Hydra's grammar, composed as State composes it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from state_esm_features.training.stock import (
    compose,
    overrides_of,
    typed_settings,
)

AWKWARD = st.text() | st.text(alphabet="a1.e-_ '\"\\{}[]()$,:=+@#~%*?/\n\tné日", max_size=12)


EXAMPLES = ["", "null", "NULL", "true", "nan", "-inf", "123", "1e5", ".5", ".1e3", "0x1F", "1_000"]


EXAMPLES += [
    "it's",
    '5" {a, b}',
    "ends in \\",
    "\\'",
    "\\\\'\\",
    "[a,b]",
    " spaces ",
    "Médian",
    "aé",
]


EXAMPLES += ["${oc.env:HOME}", "\\${x}", "$${x}\\", "${", "A+B|C", "a=b", "#", "~", "a\nb"]


def test_awkward_text_comes_out_of_the_stock_configuration_as_it_went_in() -> None:
    wanted = {f"k{i}": text for i, text in enumerate(EXAMPLES)}
    overrides = overrides_of({f"+new.{k}": text for k, text in wanted.items()})
    assert compose(overrides)["new"] == wanted


@settings(max_examples=300)
@given(AWKWARD)
def test_any_text_survives_the_grammar_of_hydra_and_omegaconf(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    (override,) = overrides_of({"data.kwargs.control_pert": text})
    value = OverridesParser.create().parse_override(override).value()
    resolved = OmegaConf.to_container(OmegaConf.create({"k": value}), resolve=True)
    assert resolved == {"k": text}
    assert typed_settings([override]).keys() == {"data.kwargs.control_pert"}


@settings(max_examples=15)
@given(st.lists(AWKWARD, max_size=12))
@example(EXAMPLES)
@example([])
def test_lists_of_text_come_out_as_they_went_in(texts: list[str]) -> None:
    assert compose(overrides_of({"wandb.tags": texts}))["wandb"]["tags"] == texts


@pytest.mark.parametrize("value", [None, True, False, 0, -3, 10**12, 0.0001, [1, 2], [None, "a b"]])
def test_values_that_are_not_text_keep_their_type(value: object) -> None:
    composed = compose(overrides_of({"wandb.tags": value}))["wandb"]["tags"]
    assert composed == value
    assert type(composed) is type(value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=state_sm", "training.lr=0.5", "~wandb.tags"],
        ["model=state_lg", "+data.kwargs.new={a:[1,2]}", "data.kwargs.control_pert='a b'"],
    ],
)
def test_configuration_is_the_one_that_stock_composes(overrides: list[str]) -> None:
    from omegaconf import OmegaConf
    from state.__main__ import load_hydra_config

    theirs = OmegaConf.to_container(load_hydra_config("tx", overrides), resolve=True)
    assert compose(overrides) == theirs
