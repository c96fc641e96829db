"""The architecture's own test: floors, sizes, who may speak. Read from the source, not imported.

A module imports only from floors below its own, or from a module written before it on its floor; so
there is no circle. The two scripts never import each other, and no module imports a script.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping

import pytest
from conftest import ROOT

PACKAGE = "state_esm_features"
SCRIPTS = ("create_esm_pert_features", "train_with_esm_features", "evaluation.__main__")

FLOORS = (
    (
        *("console", "files", "options", "option_values", "option_groups", "training_options"),
        *("option_rules", "results"),
    ),
    (
        *("experiment", "h5ad", "embedding.gene_names", "embedding.downloads"),
        *("embedding.protein_ids", "embedding.excel_dates", "embedding.fasta"),
        *("embedding.plain_pickle", "embedding.table_columns", "embedding.table_content"),
        *("embedding.table_folders", "embedding.table_forms", "embedding.table_keys"),
        *("embedding.tables", "embedding.table_agreement"),
    ),
    (
        *("embedding.devices", "embedding.esm2", "embedding.cache", "embedding.embed"),
        *("embedding.resolve", "embedding.namers", "embedding.labels", "embedding.scale"),
        "embedding.vectors",
        *("embedding.compare", "embedding.date_remedies", "embedding.missing"),
        *("embedding.features_file", "embedding.report", "embedding.plot", "embedding.features"),
    ),
    (
        *("training.launch", "training.stock", "training.trainer", "training.rendezvous"),
        *("training.expression", "training.data"),
        *("training.splits", "training.preflight", "training.model_check"),
        *("training.features_check", "training.fast_copies", "training.fast_loading"),
    ),
    ("training.checkpoints", "training.progress", "training.plan", "training.run_dir"),
    (
        *("training.processes", "training.loop", "training.trained_run", "training.templates"),
        *("training.undo", "training.new_labels"),
    ),
    (
        *("evaluation.design", "evaluation.groups", "evaluation.intervals", "evaluation.cells"),
        *("evaluation.effects", "evaluation.planted", "evaluation.summary", "evaluation.conclude"),
        *("evaluation.table", "evaluation.picture", "evaluation.settings", "evaluation.study"),
        *("evaluation.commands", "evaluation.runs"),
    ),
)
"""Every module of the package, from the ground up."""

MODULE_LINES, FUNCTION_LINES, SCRIPT_LINES = 350, 40, 350


def sources() -> dict[str, str]:
    """{module, without the package's name: its source} of scripts and package."""
    folder = ROOT / PACKAGE
    modules = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text()
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }
    commands = [name for name in SCRIPTS if name not in modules]
    return modules | {name: (ROOT / f"{name}.py").read_text() for name in commands}


def imports(source: str) -> Iterator[str]:
    """Scripts and modules of the package that a source imports, for types too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top in SCRIPTS:
                yield top
            elif top == PACKAGE:
                yield rest


def wrong_imports(modules: Mapping[str, str]) -> list[str]:
    """Imports that go upwards, or to a script."""
    place = {name: i for i, name in enumerate(name for floor in FLOORS for name in floor)}
    wrong = []
    for module, source in modules.items():
        for name in imports(source):
            target = next((m for m in (name, name.rpartition(".")[0]) if m in place), name)
            if target in SCRIPTS or place.get(target, -1) >= place.get(module, len(place)):
                wrong.append(f"{module} imports {target}")
    return wrong


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that are neither blank, nor comment, nor docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docstrings |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def too_long(modules: Mapping[str, str]) -> list[str]:
    """Modules and scripts above their number of lines."""
    wrong = []
    for name, source in modules.items():
        if name in SCRIPTS:
            lines, most = len(source.splitlines()), SCRIPT_LINES
        else:
            lines, most = len(code_lines(source)), MODULE_LINES
        if lines > most:
            wrong.append(f"{name}: {lines} lines")
    return wrong


def long_functions(modules: Mapping[str, str]) -> list[str]:
    """Functions of more than FUNCTION_LINES lines of code."""
    wrong = []
    for name, source in modules.items():
        code = code_lines(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
                if lines > FUNCTION_LINES:
                    wrong.append(f"{name}.{node.name}: {lines} lines")
    return wrong


SPEAKERS = {
    *("files", "embedding.downloads", "embedding.cache", "embedding.embed"),
    *("training.fast_copies", "training.checkpoints", "training.rendezvous", "training.loop"),
    "evaluation.runs",
}
"""Modules that speak while they work, through `console`: progress, downloads, waiting, damage."""


def who_speaks(modules: Mapping[str, str]) -> list[str]:
    """Modules that print, log, or say at once what they could return or note."""
    wrong = []
    for name, source in modules.items():
        if name in (*SCRIPTS, "console"):
            continue
        for node in ast.walk(ast.parse(source)):
            called = node.func if isinstance(node, ast.Call) else None
            said = getattr(called, "id", "")
            taken = [alias.name for alias in getattr(node, "names", ())]
            if said == "print" or {"log", "logging"} & {*taken}:
                wrong.append(f"{name} prints or logs")
            if said in ("announce", "warn") and name not in SPEAKERS:
                wrong.append(f"{name} speaks while it works")
            if isinstance(called, ast.Attribute) and ast.unparse(called) == "notes.say":
                wrong.append(f"{name} says notes")
    return wrong


def test_parts_return_or_note_and_scripts_say() -> None:
    assert who_speaks(sources()) == []


def test_no_function_is_long() -> None:
    assert long_functions(sources()) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("h5ad", "print(1)", "h5ad prints or logs"),
        ("files", "from state_esm_features.console import log", "files prints or logs"),
        ("h5ad", "import logging", "h5ad prints or logs"),
        ("h5ad", "announce('x')", "h5ad speaks while it works"),
        ("embedding.labels", "notes.say()", "embedding.labels says notes"),
    ],
)
def test_a_part_that_speaks_is_seen(module: str, source: str, said: str) -> None:
    assert who_speaks({module: source}) == [said]
    assert who_speaks({"files": "announce('x')", SCRIPTS[0]: "print(1)"}) == []


def test_no_private_operator_of_torch_is_used() -> None:
    """They have refused CPUs without AVX-512."""
    assert not [name for name, text in sources().items() if re.search(r"torch\.(?:ops|_C)\b", text)]


def test_every_module_has_its_floor() -> None:
    modules = set(sources()) - set(SCRIPTS)
    assert modules == {name for floor in FLOORS for name in floor}


def test_imports_go_downwards_only() -> None:
    assert wrong_imports(sources()) == []


def test_modules_and_scripts_fit_into_a_head() -> None:
    assert too_long(sources()) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("files", f"import {PACKAGE}.h5ad", "files imports h5ad"),
        ("console", f"from {PACKAGE}.files import now", "console imports files"),
        ("console", f"from {PACKAGE} import files", "console imports files"),
        (
            "h5ad",
            f"if TYPE_CHECKING:\n    from {PACKAGE}.training.data import Data",
            "h5ad imports training.data",
        ),
        (
            "training.loop",
            "def late():\n    from train_with_esm_features import main",
            "training.loop imports train_with_esm_features",
        ),
        (
            "create_esm_pert_features",
            "import train_with_esm_features",
            "create_esm_pert_features imports train_with_esm_features",
        ),
    ],
)
def test_an_import_upwards_is_seen(module: str, source: str, said: str) -> None:
    assert wrong_imports({module: source}) == [said]
    assert wrong_imports({"training.loop": f"from {PACKAGE}.files import now"}) == []


def test_a_long_module_or_function_is_seen() -> None:
    text = '"""Of one\nthought."""\n\n# why\nx = [\n    1,\n]\n'
    assert code_lines(text) == {5, 6, 7}
    assert too_long({"h5ad": "x = 1\n" * 351, "files": "x = 1\n# y\n" * 350}) == ["h5ad: 351 lines"]
    assert too_long({SCRIPTS[0]: "\n" * 351}) == [f"{SCRIPTS[0]}: 351 lines"]
    body = 'def long():\n    """What."""\n' + "    x = 1\n" * 40
    assert long_functions({"h5ad": body}) == ["h5ad.long: 41 lines"]
    assert long_functions({"h5ad": body.replace("    x = 1\n", "", 1)}) == []
