"""docs/options.md, made from the parsers of the commands.

python tests/options_page.py    # writes it anew
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"

INTRODUCTION = """# All options

```bash
create-esm-pert-features --help
train-with-esm-features --help
evaluate-esm-features --help
```

This page is made from the commands themselves (`make docs`).
"""


def cell(text: str) -> str:
    """Text that a table of Markdown shows as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def option_row(action: argparse.Action) -> str:
    """One line of a table: the option as it is typed, and its help."""
    name = ", ".join(action.option_strings)
    values = action.metavar or "|".join(map(str, action.choices or ()))
    if action.nargs == "?":
        values = f"[{values}]"
    typed = f"{name} {values}".strip() if name else str(action.metavar or action.dest)
    return f"| `{cell(typed)}` | {cell((action.help or '') % vars(action))} |"


def section(command: str, parser: argparse.ArgumentParser) -> str:
    """All options of one command, by the groups of its --help."""
    parts = [f"## {command}", parser.description or ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
        if actions:
            rows = [option_row(action) for action in actions]
            parts.append("\n".join([f"### {group.title}\n", "| | |", "|---|---|", *rows]))
    return "\n\n".join([*parts, parser.epilog or ""])


def page() -> str:
    """The whole page."""
    import create_esm_pert_features as create
    import train_with_esm_features as train
    from state_esm_features.evaluation import __main__ as evaluate

    commands = {
        "create-esm-pert-features": create,
        "train-with-esm-features": train,
        "evaluate-esm-features": evaluate,
    }
    texts = [section(name, script.build_parser()) for name, script in commands.items()]
    return "\n\n".join([INTRODUCTION.strip(), *texts]).strip() + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
