"""What an option is: a field of a dataclass, typed, in a TOML or of a call from Python; which of
several sayings holds.

The options themselves stand in `option_groups` and `training_options`.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from state_esm_features.console import InputError, UsageError, did_you_mean, some

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

EITHER = {"cache", "no_cache"}
"""Options of which one, where it is said more firmly, takes the place of both."""


def option(
    help_text: str | None = None, default: Any = None, stock: tuple[str, ...] = (), **how: Any
) -> Any:
    """A field that is an option.

    Parameters
    ----------
    stock
        The settings of State's own training that it decides.
    how
        What `argparse.ArgumentParser.add_argument` is told of it; `names` if they are not those of
        the field; `exclusive` for options of a group of which one can be given.
    """
    return field(default=default, metadata={"help": help_text, "stock": stock, **how})


def switch(help_text: str, **how: Any) -> Any:
    """An option without a value."""
    return option(help_text, False, action="store_true", **how)


def names_of(f: Field[Any]) -> tuple[str, ...]:
    """What a field is called on a command line: ('--pert-col',)."""
    return f.metadata.get("names", (f"--{f.name.replace('_', '-')}",))


def add_options(parser: argparse.ArgumentParser, group: type[Any], title: str) -> None:
    """The options of a group; what is not given does not stand in the namespace."""
    section = parser.add_argument_group(title)
    either = section.add_mutually_exclusive_group()
    for f in fields(group):
        how = {k: v for k, v in f.metadata.items() if k not in ("stock", "names", "exclusive")}
        place = either if f.metadata.get("exclusive") else section
        place.add_argument(*names_of(f), dest=f.name, default=argparse.SUPPRESS, **how)


class Parser(argparse.ArgumentParser):
    """A parser that names the option which a mistyped one may have been.

    No option may be shortened: a new one could make an old command mean another.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        """Leave with the usage, the message, and what was probably meant."""
        start, unknown, words = message.partition("unrecognized arguments: ")
        if unknown and not start:
            typed = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
            message += next(filter(None, map(self.meant, typed)), "")
        super().error(message)

    def meant(self, typed: str) -> str:
        """' (did you mean --max-steps?)' for what was typed: cut short, or wrongly."""
        longer = [name for name in self._option_string_actions if name.startswith(typed)]
        if longer:
            return f" (did you mean {some(longer)}?)"
        return did_you_mean(typed, self._option_string_actions)


def make(group: type[T], given: Mapping[str, Any]) -> T:
    """The options of a group: those that are given, and the defaults of the others."""
    values = {f.name: given[f.name] for f in fields(group) if f.name in given}  # type: ignore[arg-type]
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def left_to(layer: Mapping[str, Any], firmer: Collection[str]) -> dict[str, Any]:
    """{option: value} of a layer for the options that are not said more firmly."""
    taken = {*firmer} | (EITHER if EITHER.intersection(firmer) else set())
    return {name: value for name, value in layer.items() if name not in taken}


def first_given(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """What holds of {option: value} said in several places, the firmest first: the rule of both
    commands. What is typed, then [features] of the TOML, then the run that is there.

    Aliases add up, name by name.
    """
    options: dict[str, Any] = {}
    aliases: list[tuple[str, str]] = []
    for layer in layers:
        options |= left_to(layer, options)
        firmer = {old for old, _ in aliases}
        aliases += [pair for pair in layer.get("alias", ()) if pair[0] not in firmer]
    return options | ({"alias": tuple(aliases)} if aliases else {})


def read_table(table: Any, known: Mapping[str, Field[Any]], joint: str = "-") -> dict[str, Any]:
    """{option: value} of a table in a TOML, each checked as on a command line.

    Parameters
    ----------
    known
        {name: field} of what may stand there.
    joint
        Between the words of a name, as a message lists it.

    Raises
    ------
    InputError
        Another option, or a wrong value.
    """
    names = {names_of(f)[0][2:].replace("-", joint): f for f in known.values()}
    found = {}
    for written, value in table.items() if isinstance(table, Mapping) else ():
        name = re.sub("[-_]", joint, written)
        if name not in names:
            raise InputError(
                f"has no option {written!r}{did_you_mean(name, names)}; options: "
                f"{some(sorted(names), 50)}"
            )
        try:
            found[names[name].name] = _value(names[name], value)
        except (InputError, argparse.ArgumentTypeError) as error:
            raise InputError(f"argument {names_of(names[name])[0]}: {error}") from error
    return found


def _value(f: Field[Any], value: Any) -> Any:
    if f.metadata.get("action") == "store_true":
        if not isinstance(value, bool):
            raise InputError(f"expected true or false, got {value!r}")
        return value
    if f.metadata.get("action") == "append":
        if isinstance(value, Mapping):
            value = list(value.items())
        several = value if isinstance(value, (list, tuple)) else [value]
        pairs = ("=".join(map(str, v)) if isinstance(v, tuple) else v for v in several)
        return tuple(_single(f, item) for item in pairs)
    return _single(f, value)


def _single(f: Field[Any], value: Any) -> Any:
    convert = f.metadata.get("type", str)
    if value is True and "const" in f.metadata:
        return f.metadata["const"]
    if isinstance(value, (bool, list, tuple, Mapping)):
        raise InputError(f"expected one value, got {value!r}")
    text = str(getattr(value, "pattern", value))
    try:
        converted = convert(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"invalid {convert.__name__} value: {text!r}") from error
    choices = f.metadata.get("choices", (converted,))
    if converted not in choices:
        listed = ", ".join(map(repr, choices))
        raise InputError(f"invalid choice: {converted!r} (choose from {listed})")
    return converted


def as_words(given: Mapping[str, Any], known: Mapping[str, Field[Any]]) -> list[str]:
    """{option: value} as it would be typed, in the order of `known`, for a record or a message."""
    words = []
    for name, f in known.items():
        value = given.get(name, False)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            text = getattr(item, "pattern", item)
            text = "=".join(text) if isinstance(text, tuple) else text
            if item is True:
                words.append(names_of(f)[0])
            elif item is not False:
                words.append(f"{names_of(f)[0]}={text}")
    return words


def fields_of(groups: Collection[type[Any]]) -> dict[str, Field[Any]]:
    """{name: field} of the options of several groups."""
    return {f.name: f for group in groups for f in fields(group)}


def read_call(
    name: str,
    call: Mapping[str, Any],
    groups: Collection[type[Any]],
    refused: Callable[[Mapping[str, Any]], str | None],
) -> tuple[dict[str, Any], list[str]]:
    """{option: value} of a call from Python, each checked as on a command line, and its words.

    None and an empty list say nothing.

    Parameters
    ----------
    refused
        Says what is wrong with options that are given together.

    Raises
    ------
    UsageError
        Another option, a wrong value, one that is needed, or some that do not go together.
    """
    known = fields_of(groups)
    said = {k: v for k, v in call.items() if v is not None and v not in ([], (), {})}
    try:
        given = read_table(said, known, "_")
    except InputError as error:
        raise UsageError(f"{name}() {error}") from error
    needed = [f for f in known.values() if f.metadata.get("required") and f.name not in given]
    if needed:
        listed = some(names_of(f)[0] for f in needed)
        raise UsageError(f"the following arguments are required: {listed}")
    for group in groups:
        either = [f for f in fields(group) if f.metadata.get("exclusive") and given.get(f.name)]
        if len(either) > 1:
            first, second = (names_of(f)[0] for f in either[:2])
            raise UsageError(f"argument {second}: not allowed with argument {first}")
    wrong = refused(given)
    if wrong:
        raise UsageError(wrong)
    return given, as_words(given, known)


def takes(groups: Collection[type[Any]]) -> Callable[[F], F]:
    """Let help() and a notebook show the options of these groups for **options of a function.

    They become its signature, and their help texts the parameters of its docstring.
    """

    def declare(function: F) -> F:
        own = inspect.signature(function)
        parameters, described = [], []
        for group in groups:
            hints = get_type_hints(group, localns={"Path": str | Path})
            for f in fields(group):
                default = inspect.Parameter.empty if f.metadata.get("required") else f.default
                parameters.append(
                    inspect.Parameter(
                        f.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=default,
                        annotation=hints[f.name],
                    )
                )
                words = [", ".join(f.metadata.get("choices", ())), f.metadata["help"]]
                text = " ".join(filter(None, words)) or f.name.replace("_", " ")
                described.append(f"{f.name}\n    {text}")
        parameters += [p for p in own.parameters.values() if p.kind is p.KEYWORD_ONLY]
        text = inspect.getdoc(function) or ""
        function.__doc__ = text.replace("**options", "\n".join(described))
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return declare
