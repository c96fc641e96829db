"""The notebook runs from its first cell to its last, and again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, Fork, until

NOTEBOOK = ROOT / "notebooks/esm_features_for_state.ipynb"


def notebook(work: Path | None = None, steps: int = 400) -> nbformat.NotebookNode:
    """The notebook; with other parameters if there is a folder to work in."""
    content = nbformat.read(NOTEBOOK, as_version=4)
    if work:
        [cell] = [c for c in content.cells if "parameters" in c.metadata.get("tags", [])]
        cell.source = f"DATA, STEPS, PICTURE, WORK = 'demo', {steps}, None, {str(work)!r}"
    return content


def sources(content: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in content.cells if cell.cell_type == "code"]


def test_it_is_whole_and_ships_without_outputs() -> None:
    content = notebook()
    nbformat.validate(content)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert [i for i, c in enumerate(content.cells) if c.metadata.get("tags") == ["parameters"]]
    text = json.dumps(content)
    assert not re.search(r"/(?:home|root|tmp)/", text)


def test_every_cell_does_what_it_says(tmp_path: Path) -> None:
    """In a process that has the imports done, without a kernel; two steps learn nothing."""
    cells = sources(notebook(tmp_path, steps=2))
    code = "import json\nnames = {}\nfor cell in json.loads(sys.argv[1]): exec(cell, names)"
    run = Fork(code, ["notebook", json.dumps(cells)], NOTEBOOK.parent)
    until(lambda: run.poll() is not None)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert {p.name for p in tmp_path.iterdir()} == {"demo", "runs", "demo_predicted.h5ad"}
    assert "added     2 labels to " in err and "SIMEXTRA000, SIMEXTRA001" in err
    assert re.search(r"unseen genes: mean correlation of predicted with true effect -?0\.\d\d", out)


def said(content: nbformat.NotebookNode, name: str) -> str:
    """Everything that the cell of that id shows: lines, and tables as HTML."""
    [cell] = [cell for cell in content.cells if cell.id == name]
    shown = [o.get("text") or o.get("data", {}).get("text/html", "") for o in cell.outputs]
    return "\n".join(shown)


def status(content: nbformat.NotebookNode, name: str) -> str:
    return re.findall("<th>status</th><td>(.*?)</td>", said(content, name))[0]


def images(content: nbformat.NotebookNode, name: str) -> int:
    [cell] = [cell for cell in content.cells if cell.id == name]
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.slow
def test_in_a_kernel_it_learns_and_the_second_time_all_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    runs = []
    for _ in range(2):
        content = notebook(tmp_path, steps=400)
        for cell in content.cells:  # with the picture
            cell.source = cell.source.replace("400, None", "400, 'vectors.png'")
        NotebookClient(content, timeout=None, resources=where).execute()
        runs.append(content)
    first, again = runs
    assert [status(first, name) for name in ("features", "plan", "train", "new")] == [
        *("written", "dry run", "finished", "added")
    ]
    assert [status(again, name) for name in ("features", "plan", "train", "new")] == [
        *("written", "dry run", "up to date", "up to date")
    ]
    for content in runs:
        assert [images(content, name) for name in ("picture", "losses", "compare")] == [1, 1, 1]
    assert re.search(r"^step [\d,]+ of 400, loss ", said(first, "train"), re.MULTILINE)
    assert " of 400, loss " not in said(again, "train")
    for content in runs:
        shown = said(content, "compare")
        unseen = re.search(r"^unseen genes: .* (-?[\d.]+)$", shown, re.MULTILINE)
        assert unseen and float(unseen[1]) > 0.4, shown
