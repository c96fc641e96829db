"""What create_esm_pert_features.py writes: the vectors, the contract, the manifest, whole files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import table_writers
import torch
from conftest import (
    PATIENCE,
    ROOT,
    Result,
    caught,
    run_process,
    run_script,
    script_fork,
    until,
)
from forks import Fork

from create_esm_pert_features import build_parser
from state_esm_features import __version__
from state_esm_features.embedding.features_file import read_manifest

Create = Callable[..., Result]
CONTROL = "non-targeting"
A, B, C = [1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [-1.0, 0.5, 4.0]
ZERO = [0.0, 0.0, 0.0]
IN_TABLE = ("--esm-embeddings", "table.pt")
OUT = ("--output", "o.pt")
HINT = (
    "Add a table that has them with --esm-embeddings, or their proteins with --fasta, rename with "
    "--alias OLD=NEW, see all with --report FILE.tsv --dry-run, or accept with --missing mean"
)


def write_table(path: Path, **genes: list[float]) -> None:
    torch.save({k: torch.tensor(v) for k, v in genes.items()}, path)


def read(path: Path) -> dict[str, list[float]]:
    return {k: v.tolist() for k, v in torch.load(path, weights_only=True).items()}


def manifest(path: Path) -> dict[str, object]:
    return json.loads(path.with_name(path.name + ".json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content: what was there before and is there after."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Write tmp_path/table.pt with genes A, B, C, and a gene list; returns the arguments."""
    write_table(tmp_path / "table.pt", A=A, B=B, C=C)

    def write(*names: str) -> tuple[str, ...]:
        (tmp_path / "g.txt").write_text("\n".join(names) + "\n")
        return ("--gene-list", "g.txt", *IN_TABLE, *OUT, "--quiet")

    return write


# --- lookup -------------------------------------------------------------------------------------


def test_each_label_gets_its_vector_and_the_control_gets_zeros(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    assert create(*labels("C", "A")) == Result(0, "o.pt\n", "")
    assert read(tmp_path / "o.pt") == {"C": C, "A": A, CONTROL: ZERO}


def test_the_control_is_zero_even_where_the_table_has_a_vector_for_it(
    tmp_path: Path, create: Create
) -> None:
    torch.save({"A": torch.tensor(A), CONTROL: torch.tensor(B)}, tmp_path / "table.pt")
    assert create("--all-genes", *IN_TABLE, *OUT).code == 0
    assert read(tmp_path / "o.pt") == {"A": A, CONTROL: ZERO}


def test_of_several_tables_the_first_that_has_a_gene_wins(tmp_path: Path, create: Create) -> None:
    write_table(tmp_path / "one.pt", A=A)
    np.savez(tmp_path / "two.npz", genes=np.array(["A", "B"]), embeddings=np.array([C, B]))
    write_table(tmp_path / "three.pt", B=A, C=C)
    (tmp_path / "g.txt").write_text("A\nB\nC\n")
    tables = [("--esm-embeddings", t) for t in ("one.pt", "two.npz", "three.pt")]
    assert create("--gene-list", "g.txt", *sum(tables, ()), *OUT) == Result(
        0,
        "o.pt\n",
        "two.npz: float64 values are converted to float32\n"
        "too few genes in common, by name, to tell whether tables are of one model: two.npz and "
        "one.pt (1), three.pt and one.pt (0), three.pt and two.npz (1)\n"
        "labels    4 (1 control, 3 exact)\n"
        "from      g.txt (3 labels)\n"
        "source    one.pt (1 gene x 3)\n"
        "source    two.npz (2 genes x 3)\n"
        "source    three.pt (2 genes x 3)\n",
    )
    assert read(tmp_path / "o.pt") == {"A": A, "B": B, "C": C, CONTROL: ZERO}
    found = manifest(tmp_path / "o.pt")["labels"]
    assert [found[gene]["source"] for gene in "ABC"] == [0, 1, 2]


def test_one_of_several_vectors_of_a_table_is_chosen_by_option_and_named_in_the_manifest(
    tmp_path: Path, create: Create
) -> None:
    genes = pd.DataFrame(index=["A", "B"])
    x, esm = np.array([A, B], np.float32), np.array([C, A], np.float32)
    anndata.AnnData(x, obs=genes, obsm={"esm": esm}).write_h5ad(tmp_path / "t.h5ad")
    table = ("--all-genes", "--esm-embeddings", "t.h5ad", *OUT)
    assert create(*table).err == (
        "error: t.h5ad holds more than one thing that may be the vectors: X (2, 3), obsm/esm (2, "
        "3). Choose one with --table-key, for instance --table-key X\n"
    )
    assert create(*table, "--table-key", "esm").err.splitlines()[-1] == (
        "source    t.h5ad (2 genes x 3, key obsm/esm)"
    )
    assert read(tmp_path / "o.pt") == {"A": C, "B": A, CONTROL: ZERO}
    [source] = manifest(tmp_path / "o.pt")["sources"]
    assert (source["form"], source["table_key"]) == ("h5ad", "obsm/esm")


def test_options_that_no_table_asks_for_are_said(tmp_path: Path, create: Create) -> None:
    write_table(tmp_path / "one.pt", A=A)
    words = ("--all-genes", "--esm-embeddings", "one.pt", *OUT, "--quiet")
    assert create(*words, "--layer", 3, "--table-key", "X") == Result(
        0,
        "o.pt\n",
        "warning: --layer 3: no table given holds layers\n"
        "warning: --table-key X: no table given holds more than one\n",
    )


# --- combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "how", "expected"),
    [
        ("A+B", "sum", [11.0, 22.0, 33.0]),
        ("A+B", "mean", [5.5, 11.0, 16.5]),
        ("B+A", "sum", [11.0, 22.0, 33.0]),
        ("A+B+C", "sum", [10.0, 22.5, 37.0]),
        ("A+A", "sum", [2.0, 4.0, 6.0]),
        ("A+A", "mean", A),
        (f"A+{CONTROL}", "sum", A),
        (f"A+{CONTROL}", "mean", A),
        (f"{CONTROL}+B", "sum", B),
        (f"A+{CONTROL}+B", "mean", [5.5, 11.0, 16.5]),
    ],
)
def test_a_combination_is_the_sum_or_mean_of_its_genes_and_the_control_adds_nothing(
    tmp_path: Path,
    create: Create,
    labels: Callable[..., tuple[str, ...]],
    label: str,
    how: str,
    expected: list[float],
) -> None:
    assert create(*labels(label), "--combine", how) == Result(0, "o.pt\n", "")
    assert read(tmp_path / "o.pt") == {label: expected, CONTROL: ZERO}
    assert manifest(tmp_path / "o.pt")["policy"]["combine"] == how
    assert manifest(tmp_path / "o.pt")["labels"][label]["how"] == "combination"


@pytest.mark.parametrize("how", ["center", "standard"])
def test_genes_are_scaled_by_the_whole_table_before_they_are_combined(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]], how: str
) -> None:
    arguments = labels("A", "B", "A+B", f"A+{CONTROL}")  # C counts, though no label asks for it
    done = create(*arguments[:-1], "--scale", how)
    units = ", each dimension in units of its spread" if how == "standard" else ""
    assert done == Result(
        0,
        "o.pt\n",
        f"warning: State cannot tell labels with the same vector apart: A = A+{CONTROL}\n"
        "labels    5 (2 combination, 1 control, 2 exact)\n"
        "from      g.txt (4 labels)\n"
        "source    table.pt (3 genes x 3)\n"
        f"scaled    vectors less their mean{units}, over 3 genes of the table\n",
    )
    rows = np.array([A, B, C])
    a, b = ((np.array([A, B]) - rows.mean(0)) / (rows.std(0) if how == "standard" else 1)).tolist()
    both = [x + y for x, y in zip(a, b, strict=True)]
    expected = {"A": a, "B": b, "A+B": both, f"A+{CONTROL}": a}
    written = read(tmp_path / "o.pt")
    assert written.pop(CONTROL) == ZERO
    assert written == {label: pytest.approx(v, abs=1e-5) for label, v in expected.items()}
    kept = manifest(tmp_path / "o.pt")
    assert kept["policy"]["scale"] == how
    assert kept["scaling"] == {
        "genes": 3,
        "mean": pytest.approx(rows.mean(0).tolist()),
        "spread": pytest.approx(rows.std(0).tolist()),
    }


def test_scaled_vectors_are_shuffled_and_compared_as_scaled(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = (*labels("A", "B", "C"), "--scale", "standard", "--report", "r.tsv")
    assert create(*arguments).code == 0
    own = read(tmp_path / "o.pt")
    report = (tmp_path / "r.tsv").read_text().splitlines()
    assert [line.split("\t")[9] for line in report] == ["less_mean_of", "", "", "", ""]
    assert create(*arguments, "--ablation", "shuffle").code == 0
    shuffled = read(tmp_path / "o.pt")
    assert sorted(own.values()) == sorted(shuffled.values())
    assert all(own[gene] != shuffled[gene] for gene in "ABC")


def test_what_helps_missing_labels_goes_with_scale(
    create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    assert create(*labels("A", "NONE"), "--scale", "center") == Result(
        1,
        "",
        "error: 1 of 2 labels has no embedding (NONE): 'NONE' is in no table. Add their proteins "
        "with --fasta, beside --esm-embeddings TABLE, see all with --report FILE.tsv --dry-run, or "
        "rename with --alias OLD=NEW\n",
    )


def test_a_combination_is_a_sum_unless_told(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    assert create(*labels("A+B")).code == 0
    assert read(tmp_path / "o.pt")["A+B"] == [11.0, 22.0, 33.0]


def test_a_label_with_a_plus_that_the_table_has_is_one_gene(tmp_path: Path, create: Create) -> None:
    torch.save({"A": torch.tensor(A), "A+B": torch.tensor(C)}, tmp_path / "table.pt")
    assert create("--all-genes", *IN_TABLE, *OUT).code == 0
    assert read(tmp_path / "o.pt") == {"A": A, "A+B": C, CONTROL: ZERO}


@pytest.mark.parametrize(
    ("label", "reason", "mean"),
    [
        (f"{CONTROL}+{CONTROL}", "every part of the combination is the control", A),
        ("A+", "empty label or part", [2.0, 4.0, 6.0]),
        ("+A", "empty label or part", [2.0, 4.0, 6.0]),
        ("A+NONE", "'NONE' is in no table", [2.0, 4.0, 6.0]),
        ("NO+NONE", "'NO' is in no table; 'NONE' is in no table", [2.0, 4.0, 6.0]),
        ("NONE", "'NONE' is in no table", A),
        (f"NONE+{CONTROL}", "'NONE' is in no table", A),
    ],
)
def test_a_label_with_a_part_that_has_no_vector_is_missing(
    tmp_path: Path,
    create: Create,
    labels: Callable[..., tuple[str, ...]],
    label: str,
    reason: str,
    mean: list[float],
) -> None:
    arguments = labels("A", label)
    message = f"error: 1 of 2 labels has no embedding ({label}): {reason}. {HINT}\n"
    before = files(tmp_path)
    assert create(*arguments) == Result(1, "", message)
    assert files(tmp_path) == before

    assert create(*arguments, "--missing", "mean").code == 0
    assert read(tmp_path / "o.pt") == {"A": A, label: mean, CONTROL: ZERO}
    assert manifest(tmp_path / "o.pt")["missing"] == {label: reason}

    assert create(*arguments, "--missing", "zero").code == 0
    found = read(tmp_path / "o.pt")[label]
    assert found == (A if "A" in label else ZERO)


# --- aliases ------------------------------------------------------------------------------------


def test_aliases_are_looked_up_under_their_new_name_and_kept_under_the_old(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = labels("OLD", "A", "OLD+B", "WHOLE+NAME", "INFILE", "BOTH")
    (tmp_path / "aliases.tsv").write_bytes(
        b"\xef\xbb\xbf# old new\r\nINFILE\tB\r\n\r\nBOTH C # see below\r\nA,B\r\n"
    )
    done = create(
        *(*arguments, "--aliases", "aliases.tsv", "--alias", "OLD=C"),
        *("--alias", "WHOLE+NAME=A", "--alias", "BOTH=A"),
    )
    same = "A = INFILE, WHOLE+NAME = BOTH"
    assert done == Result(
        0, "o.pt\n", f"warning: State cannot tell labels with the same vector apart: {same}\n"
    )
    assert read(tmp_path / "o.pt") == {
        "OLD": C,
        "A": B,  # an alias is stronger than the table's own key
        "OLD+B": [9.0, 20.5, 34.0],
        "WHOLE+NAME": A,
        "INFILE": B,
        "BOTH": A,  # --alias is stronger than --aliases
        CONTROL: ZERO,
    }
    records = manifest(tmp_path / "o.pt")["labels"]
    assert records["OLD"] == {"how": "alias", "gene": "C", "source": 0}
    assert records["OLD+B"]["parts"] == [
        {"name": "OLD", "how": "alias", "gene": "C", "source": 0},
        {"name": "B", "how": "exact", "gene": "B", "source": 0},
    ]


def test_an_alias_to_a_gene_that_is_in_no_table_is_named(
    create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    assert create(*labels("A", "OLD"), "--alias", "OLD=NEW") == Result(
        1,
        "",
        "error: 1 of 2 labels has no embedding (OLD): 'NEW' (alias of 'OLD') is in no table. "
        f"{HINT}\n",
    )


def test_an_alias_that_no_label_uses_is_a_warning(
    create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    assert create(*labels("ALPHA"), "--alias", "ALPHB=B", "--alias", "ALPHA=A") == Result(
        0, "o.pt\n", "warning: --alias ALPHB=B: no label 'ALPHB' (did you mean ALPHA?)\n"
    )


@pytest.mark.parametrize("text", ["AB", "A=", "=B"])
def test_an_alias_that_is_no_pair_is_a_usage_error(
    create: Create, labels: Callable[..., tuple[str, ...]], text: str
) -> None:
    done = create(*labels("A"), "--alias", text)
    assert done == Result(
        2,
        "",
        build_parser().format_usage()
        + f"create_esm_pert_features.py: error: argument --alias: expected OLD=NEW, got {text!r}\n",
    )


# --- missing ------------------------------------------------------------------------------------


def test_missing_labels_are_refused_and_the_first_five_are_named(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = labels("A", "B", *(f"NONE{i}" for i in range(1, 8)))
    before = files(tmp_path)
    assert create(*arguments) == Result(
        1,
        "",
        "error: 7 of 9 labels have no embedding (NONE1, NONE2, NONE3, NONE4, NONE5, ...). "
        f"{HINT}\n",
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("policy", "filler", "words"),
    [
        ("mean", [(1 + 10) / 2, (2 + 20) / 2, (3 + 30) / 2], "the mean vector"),
        ("zero", ZERO, "zeros, as if they were control"),
    ],
)
def test_missing_labels_are_filled_as_told_and_that_is_said(
    tmp_path: Path,
    create: Create,
    labels: Callable[..., tuple[str, ...]],
    policy: str,
    filler: list[float],
    words: str,
) -> None:
    # C is in the table but not in use: it does not count for the mean
    done = create(*labels("A", "B", "NO", "B+NONE"), "--missing", policy)
    assert done == Result(
        0,
        "o.pt\n",
        f"warning: 2 of 4 labels missing, or a part of them (NO, B+NONE): filled with {words}\n",
    )
    both = [b + f for b, f in zip(B, filler, strict=True)]
    expected = {"A": A, "B": B, "NO": filler, "B+NONE": both, CONTROL: ZERO}
    assert read(tmp_path / "o.pt") == expected
    written = manifest(tmp_path / "o.pt")
    assert written["policy"] == {
        **{"missing": policy, "combine": "sum", "scale": "none", "separator": "+"},
        **{"label_regex": None, "prefer_previous": False},
    }
    assert written["missing"] == {"NO": "'NO' is in no table", "B+NONE": "'NONE' is in no table"}
    assert written["labels"]["NO"] == {"how": policy}
    assert written["labels"]["B+NONE"] == {
        "how": "combination",
        "parts": [
            {"name": "B", "how": "exact", "gene": "B", "source": 0},
            {"name": "NONE", "how": policy},
        ],
    }


@pytest.mark.parametrize("policy", ["error", "mean", "zero"])
def test_a_table_of_other_names_is_an_error_whatever_missing_says(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]], policy: str
) -> None:
    arguments = labels("Trp53", "Myc")
    before = files(tmp_path)
    done = create(*arguments, "--missing", policy)
    if policy == "error":
        message = f"error: 2 of 2 labels have no embedding (Trp53, Myc). {HINT}\n"
    else:
        words = {"mean": "the mean vector", "zero": "zeros, as if they were control"}[policy]
        message = (
            f"warning: 2 of 2 labels missing, or a part of them (Trp53, Myc): filled with {words}\n"
            "error: none of the 2 labels is in a source: other species or naming? labels: Trp53, "
            f"Myc, {CONTROL}; table.pt: A, B, C\n"
        )
    assert done == Result(1, "", message)
    assert files(tmp_path) == before


def test_the_report_tells_of_each_label_even_if_labels_are_missing(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = labels("A", "OLD", f"A+{CONTROL}", "A+NONE")
    done = create(*arguments, "--alias", "OLD=C", "--report", "r.tsv")
    assert done.code == 1
    head = (
        "label\thow\tgenes\tsource\tvia\tproteins\tresidues\tnearest\tcosine\tless_mean_of\t"
        "reason\n"
    )
    plain = (
        f"{head}A\texact\tA\ttable.pt{TAB * 7}\nOLD\talias\tC\ttable.pt{TAB * 7}\n"
        f"A+{CONTROL}\tcombination\tA+{CONTROL}\ttable.pt{TAB * 7}\n"
    )
    reason = "'NONE' is in no table"
    tail = f"{CONTROL}\tcontrol\t{CONTROL}{TAB * 8}\n"
    assert (tmp_path / "r.tsv").read_text() == (
        f"{plain}A+NONE\tmissing\tA+NONE\ttable.pt{TAB * 7}{reason}\n{tail}"
    )
    done = create(*arguments, "--alias", "OLD=C", "--report", "r.tsv", "--missing", "mean")
    assert done.code == 0
    mean = [sum(values) / 3 for values in zip(A, B, C, strict=True)]
    less = [[x - m for x, m in zip(vector, mean, strict=True)] for vector in (A, C)]
    a_to_c = f"{cosine(*less):.4f}\ttable.pt"
    assert (tmp_path / "r.tsv").read_text() == (
        f"{head}A\texact\tA\ttable.pt{TAB * 4}OLD\t{a_to_c}\t\n"
        f"OLD\talias\tC\ttable.pt{TAB * 4}A\t{a_to_c}\t\n"
        f"A+{CONTROL}\tcombination\tA+{CONTROL}\ttable.pt{TAB * 4}OLD\t{a_to_c}\t\n"
        f"A+NONE\tcombination\tA+NONE\ttable.pt{TAB * 7}{reason}\n{tail}"
    )


TAB = "\t"


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


# --- shuffle ------------------------------------------------------------------------------------


def test_shuffle_keeps_keys_and_vectors_and_combinations_follow_their_parts(
    project: Path, create: Create
) -> None:
    arguments = ("--from-toml", "config.toml", *IN_TABLE, "--quiet")
    assert create(*arguments, "--output", "plain.pt").code == 0
    assert create(*arguments, "--output", "o.pt", "--ablation", "shuffle", "--seed", "7").code == 0
    plain, shuffled = read(project / "plain.pt"), read(project / "o.pt")
    assert list(shuffled) == list(plain)
    genes = [k for k in plain if k not in (CONTROL, "SIM000+SIM001")]
    assert all(shuffled[g] != plain[g] for g in genes)
    assert sorted(shuffled[g] for g in genes) == sorted(plain[g] for g in genes)
    a, b = (torch.tensor(shuffled[g]) for g in ("SIM000", "SIM001"))
    assert shuffled["SIM000+SIM001"] == (a + b).tolist() != plain["SIM000+SIM001"]
    assert not any(shuffled[CONTROL])
    assert manifest(project / "o.pt")["ablation"] == {"kind": "shuffle", "seed": 7}
    assert manifest(project / "plain.pt")["ablation"] is None
    assert manifest(project / "o.pt")["labels"] == manifest(project / "plain.pt")["labels"]


def test_shuffle_is_said_and_its_seed_is_42_unless_told(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = [a for a in labels("A", "B", "C") if a != "--quiet"]
    assert create(*arguments, "--ablation", "shuffle").err == (
        "labels    4 (1 control, 3 exact)\n"
        "from      g.txt (3 labels)\n"
        "source    table.pt (3 genes x 3)\n"
        "ablation  shuffle, seed 42: no gene has its own vector\n"
    )
    assert manifest(tmp_path / "o.pt")["ablation"] == {"kind": "shuffle", "seed": 42}


def test_shuffle_of_identical_vectors_is_refused(tmp_path: Path, create: Create) -> None:
    write_table(tmp_path / "table.pt", A=A, B=A, C=B)
    assert create("--all-genes", *IN_TABLE, *OUT, "--ablation", "shuffle", "--quiet") == Result(
        1,
        "",
        "error: --ablation shuffle needs genes with different vectors: 2 of 3 are identical, so "
        "some gene would keep its own\n",
    )
    assert list(files(tmp_path)) == ["table.pt"]


# --- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows of one matrix", "rows (1, width)", "float64", "npz"])
def test_every_vector_is_float32_one_dimensional_and_owns_its_storage(
    tmp_path: Path, create: Create, kind: str
) -> None:
    matrix = torch.tensor([A, B, C, ZERO])
    if kind == "npz":
        table = tmp_path / "table.npz"
        np.savez(table, genes=np.array(list("ABC")), embeddings=matrix[:3].numpy())
    else:
        table = tmp_path / "table.pt"
        matrix = matrix.double() if kind == "float64" else matrix
        rows = [matrix[i : i + 1] if "(1" in kind else matrix[i] for i in range(3)]
        torch.save(dict(zip("ABC", rows, strict=True)), table)
    names = ["A", "B", "SAME", "A+B", f"A+{CONTROL}", "MISSING1", "MISSING2"]
    names += [f"{CONTROL}+{CONTROL}", f"{CONTROL}+{CONTROL}+{CONTROL}"]
    (tmp_path / "g.txt").write_text("\n".join(names))
    arguments = ("--gene-list", "g.txt", "--esm-embeddings", table, *OUT)
    assert create(*arguments, "--missing", "mean", "--alias", "SAME=A").code == 0
    features = torch.load(tmp_path / "o.pt", weights_only=True)
    assert type(features) is dict
    assert list(features) == [*names, CONTROL]
    for vector in features.values():
        assert vector.dtype == torch.float32 and vector.shape == (3,) and vector.is_contiguous()
        assert vector.device.type == "cpu" and not vector.requires_grad
        assert vector.untyped_storage().nbytes() == 4 * 3
        assert torch.isfinite(vector).all()
    assert len({v.untyped_storage().data_ptr() for v in features.values()}) == len(features)
    zero = [label for label, vector in features.items() if not vector.any()]
    assert zero == [CONTROL]


def test_same_inputs_give_the_same_bytes_whatever_the_name_or_hash_seed(project: Path) -> None:
    (project / "two.toml").write_text(
        '[datasets]\nsim = "screen.h5ad"\nagain = "./screen.h5ad"\nmore = "{screen}.h5ad"\n'
        '[training]\nmore = "train"\nsim = "train"\n[zeroshot]\n"again.simB" = "test"\n'
        '[fewshot."sim.simA"]\nval = ["TYPO1", "TYPO2", "SIM003"]\n'
    )
    runs = []
    for name, hash_seed in (("a.pt", "0"), ("elsewhere/long_name.bin", "1")):
        done = run_process(
            *("create_esm_pert_features", "--from-toml", "two.toml", *IN_TABLE, "--output", name),
            *("--alias", "NOT1=A", "--alias", "NOT2=B", "--alias", "NOT3=B", "--missing", "mean"),
            *("--ablation", "shuffle"),
            cwd=project,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert (done.code, done.out) == (0, f"{name}\n"), done.err
        written = manifest(project / name)
        written.pop("command")
        text = (project / f"{name}.json").read_text()
        runs.append((done.err, (project / name).read_bytes(), written, list(json.loads(text))))
    assert runs[0] == runs[1]


def test_the_same_command_gives_the_same_manifest_later(project: Path, create: Create) -> None:
    arguments = ("--from-toml", "config.toml", *IN_TABLE, *OUT)
    assert create(*arguments).code == 0
    first = files(project)
    then = time.time() // 2  # no clock in a file is coarser: that of a zip
    until(lambda: time.time() // 2 > then)
    assert create(*arguments).code == 0
    assert files(project) == first


def test_the_manifest_says_where_every_vector_comes_from(project: Path, create: Create) -> None:
    (project / "g.txt").write_text(f"OLD\nSIM000+{CONTROL}\n")
    arguments = (
        *("--from-toml", "config.toml", "--gene-list", "g.txt", *IN_TABLE, *OUT),
        *("--alias", "OLD=SIM009"),
    )
    assert create(*arguments).code == 0
    sha256 = {n: hashlib.sha256(b).hexdigest() for n, b in files(project).items()}
    screen = (project / "screen.h5ad").stat()
    exact = {f"SIM{i:03d}": {"how": "exact", "gene": f"SIM{i:03d}", "source": 0} for i in range(10)}

    def part(name: str) -> dict[str, object]:
        return {"name": name, **exact[name]}

    both = {"how": "combination", "parts": [part("SIM000"), part("SIM001")]}
    with_control = [part("SIM000"), {"name": CONTROL, "how": "control"}]
    expected = {
        "format": 1,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "create_esm_pert_features": __version__,
        },
        "command": list(arguments),
        "control": CONTROL,
        "pert_col": "target_gene",
        "width": 8,
        "features_sha256": sha256["o.pt"],
        "inputs": [
            {
                "path": "screen.h5ad",
                "kind": "adata",
                "size": screen.st_size,
                "mtime_ns": screen.st_mtime_ns,
                "labels": 12,
            },
            {"path": "config.toml", "kind": "toml", "sha256": sha256["config.toml"], "labels": 2},
            {"path": "g.txt", "kind": "gene-list", "sha256": sha256["g.txt"], "labels": 2},
        ],
        "sources": [
            {
                "kind": "table",
                "form": "torch dict",
                "path": "table.pt",
                "sha256": sha256["table.pt"],
                "genes": 50,
                "keys": "symbols",
            }
        ],
        "symbols": [],
        "policy": {
            **{"missing": "error", "combine": "sum", "scale": "none", "separator": "+"},
            **{"label_regex": None, "prefer_previous": False},
        },
        "scaling": None,
        "ablation": None,
        "labels": {
            "SIM000": exact["SIM000"],
            "SIM000+SIM001": both,
            **exact,
            CONTROL: {"how": "control"},
            "OLD": {"how": "alias", "gene": "SIM009", "source": 0},
            f"SIM000+{CONTROL}": {"how": "combination", "parts": with_control},
        },
        "missing": {},
        "identical": [["SIM000", f"SIM000+{CONTROL}"], ["SIM009", "OLD"]],
    }
    written = manifest(project / "o.pt")
    assert written == expected
    assert list(written) == list(expected)
    assert list(written["labels"]) == list(expected["labels"]) == list(read(project / "o.pt"))
    assert read_manifest(project / "o.pt") == expected


def test_a_table_in_every_form_gives_the_same_features_file(tmp_path: Path, create: Create) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    (tmp_path / "g.txt").write_text("A\nC\nA+B\n")
    written = {}
    for form in table_writers.WRITERS:
        path = table_writers.write_table(form, tmp_path / "t", dict(zip("ABC", rows, strict=True)))
        done = create("--gene-list", "g.txt", "--esm-embeddings", path, "--output", "o.pt")
        assert done.code == 0, (form, done.err)
        written[form] = (tmp_path / "o.pt").read_bytes()
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(set(written.values())) == 1
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    expected = {"A": rows[0], "C": rows[2], "A+B": rows[0] + rows[1], CONTROL: np.zeros(5)}
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}


def test_tables_of_two_models_get_a_warning_and_the_manifest_keeps_the_figure(
    tmp_path: Path, create: Create
) -> None:
    for seed, name in enumerate(("one.pt", "two.pt")):
        generator = torch.Generator().manual_seed(seed)
        table = {f"G{i}": torch.randn(8, generator=generator) for i in range(30)}
        torch.save(table, tmp_path / name)
    (tmp_path / "g.txt").write_text("G1\nG2\n")
    tables = ("--esm-embeddings", "one.pt", "--esm-embeddings", "two.pt")
    done = create("--gene-list", "g.txt", *tables, "--output", "o.pt", "--quiet")
    assert (done.code, done.out) == (0, "o.pt\n")
    one, two = manifest(tmp_path / "o.pt")["sources"]
    [seen] = two["agreement"]
    assert "agreement" not in one
    assert (seen["with"], seen["genes_in_both"], seen["compared"]) == ("one.pt", 30, 30)
    assert abs(seen["median_cosine"]) < 0.5
    assert done.err.startswith(
        "warning: two.pt and one.pt have 30 genes in common, with other vectors: the median cosine "
        f"of 30 of them is {seen['median_cosine']:.3f}, less their means (G0 "
    )


def test_files_are_as_readable_as_any_other_file_of_the_user(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    before = os.umask(0o027)
    try:
        assert create(*labels("A")).code == 0
    finally:
        os.umask(before)
    for name in ("o.pt", "o.pt.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


# --- the command line ---------------------------------------------------------------------------


def test_stdout_holds_the_output_path_and_nothing_else(project: Path) -> None:
    done = run_process(
        *("create_esm_pert_features", "--from-toml", "config.toml", *IN_TABLE),
        *("--output", "deep/er/o.pt"),
        cwd=project,
    )
    assert done == Result(
        0,
        "deep/er/o.pt\n",
        "labels    12 (1 combination, 1 control, 10 exact)\n"
        "from      screen.h5ad (12 labels)\n"
        "from      config.toml (2 labels)\n"
        "source    table.pt (50 genes x 8)\n",
    )
    assert sorted(p.name for p in (project / "deep/er").iterdir()) == ["o.pt", "o.pt.json"]


def test_quiet_prints_the_output_path_only(project: Path, create: Create) -> None:
    arguments = ("--from-toml", "config.toml", *IN_TABLE, *OUT, "--quiet")
    assert create(*arguments) == Result(0, "o.pt\n", "")


def test_a_dry_run_resolves_and_writes_nothing(project: Path, create: Create) -> None:
    before = files(project)
    done = create("--from-toml", "config.toml", *IN_TABLE, "--output", "new/o.pt", "--dry-run")
    assert done == Result(
        0,
        "",
        "labels    12 (1 combination, 1 control, 10 exact)\n"
        "from      screen.h5ad (12 labels)\n"
        "from      config.toml (2 labels)\n"
        "source    table.pt (50 genes x 8)\n"
        "dry run: new/o.pt not written\n",
    )
    assert files(project) == before and not (project / "new").exists()


def test_a_dry_run_fails_where_the_run_would(
    create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = labels("A", "NONE")
    assert create(*arguments, "--dry-run") == create(*arguments)
    assert create(*arguments, "--dry-run").code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*IN_TABLE, *OUT), "no labels: give --from-toml, --gene-list or --adata, or --all-genes"),
        (("--all-genes", *IN_TABLE), "--output FILE is required"),
        (
            ("--all", *IN_TABLE, *OUT),
            "unrecognized arguments: --all (did you mean --all-genes?)",
        ),
        (
            ("--gene", "g.txt", *IN_TABLE, *OUT),
            "unrecognized arguments: --gene g.txt (did you mean --gene-list?)",
        ),
        (
            ("--all-genes", "--out", "o.pt"),
            "unrecognized arguments: --out o.pt (did you mean --output?)",
        ),
        (
            ("--all-genes", *OUT, "--seed", "x"),
            "argument --ablation-seed/--seed: invalid int value: 'x'",
        ),
    ],
)
def test_wrong_usage_exits_2(
    tmp_path: Path, create: Create, arguments: tuple[str, ...], message: str
) -> None:
    assert create(*arguments) == Result(
        2,
        "",
        f"{build_parser().format_usage()}create_esm_pert_features.py: error: {message}\n",
    )
    assert not files(tmp_path)


def test_help_and_version_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, create_esm_pert_features as script\n"
        "try: script.main([sys.argv[1]])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[2:])), file=sys.stderr)"
    )
    heavy = ["torch", "h5py", "cell_load", "numpy", "pandas", "anndata", "huggingface_hub", "toml"]
    for flag, start in (("--help", "usage: create_esm_pert_features.py "), ("--version", "0.1.0")):
        done = subprocess.run(
            [sys.executable, "-c", code, flag, *heavy],
            **{"cwd": tmp_path, "capture_output": True, "text": True},
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert (done.returncode, done.stderr) == (0, "[]\n")
        assert done.stdout.startswith(start)


# --- setting aside ------------------------------------------------------------------------------


def test_a_file_that_is_not_ours_is_kept_as_orig_and_that_is_said(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = labels("A")
    (tmp_path / "o.pt").write_bytes(b"official")
    said = "o.pt was not written by this script: it {} as o.pt.orig{}\n"
    before = files(tmp_path)
    assert create(*arguments, "--dry-run") == Result(0, "", said.format("would be kept", ""))
    assert files(tmp_path) == before

    assert create(*arguments) == Result(0, "o.pt\n", said.format("is kept", ""))
    assert files(tmp_path).keys() == before.keys() | {"o.pt.json", "o.pt.orig"}
    assert (tmp_path / "o.pt.orig").read_bytes() == b"official"
    assert read(tmp_path / "o.pt") == {"A": A, CONTROL: ZERO}

    for number, content in ((".1", b"second"), (".2", b"third")):
        (tmp_path / "o.pt").write_bytes(content)
        assert create(*arguments) == Result(0, "o.pt\n", said.format("is kept", number))
        assert (tmp_path / f"o.pt.orig{number}").read_bytes() == content
    assert (tmp_path / "o.pt.orig").read_bytes() == b"official"


def test_our_own_older_output_is_replaced(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    assert create(*labels("A")).code == 0
    assert create(*labels("B")) == Result(0, "o.pt\n", "")
    assert set(files(tmp_path)) == {"g.txt", "table.pt", "o.pt", "o.pt.json"}
    assert read(tmp_path / "o.pt") == {"B": B, CONTROL: ZERO}


def test_our_output_that_somebody_changed_is_kept(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    assert create(*labels("A")).code == 0
    with (tmp_path / "o.pt").open("ab") as f:
        f.write(b"changed")
    changed = (tmp_path / "o.pt").read_bytes()
    assert create(*labels("A")) == Result(
        0, "o.pt\n", "o.pt was not written by this script: it is kept as o.pt.orig\n"
    )
    assert (tmp_path / "o.pt.orig").read_bytes() == changed


# --- whole or not at all ------------------------------------------------------------------------

FULL = (
    "error: cannot write o.pt{}: File too large; nothing was changed. "
    "Free some space there, or choose another place for it\n"
)


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.mark.parametrize("old", ["ours", "not ours", "none"])
@pytest.mark.parametrize("which", ["features", "manifest"])
def test_a_disk_that_fills_up_leaves_the_old_files_as_they_were(
    tmp_path: Path, labels: Callable[..., tuple[str, ...]], old: str, which: str
) -> None:
    if old != "none":
        done = run_script("create_esm_pert_features", *labels("A"), cwd=tmp_path)
        assert done.code == 0
    if old == "not ours":
        (tmp_path / "o.pt.json").unlink()
    # features of many labels, or a combination of so many parts that the manifest is the larger
    arguments = labels(*["+".join("A" * n) for n in range(1, 400)])
    limit = 100_000
    if which == "manifest":
        arguments = labels("+".join("A" * 2000))
    before = files(tmp_path)
    done = run_script(
        *("create_esm_pert_features", *arguments),
        cwd=tmp_path,
        before=LIMIT.format(limit),
    )
    assert done == Result(1, "", FULL.format("" if which == "features" else ".json"))
    assert files(tmp_path) == before


def test_a_report_that_does_not_fit_is_an_error(
    tmp_path: Path, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = labels("+".join("A" * 2000))
    before = files(tmp_path)
    done = run_script(
        *("create_esm_pert_features", *arguments, "--report", "o.pt.tsv"),
        cwd=tmp_path,
        before=LIMIT.format(1000),
    )
    assert done == Result(1, "", FULL.format(".tsv"))
    assert files(tmp_path) == before


@pytest.fixture(scope="module")
def big_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 200 MB: 500 genes x 100,000."""
    path = tmp_path_factory.mktemp("big") / "big.pt"
    torch.save({f"G{i}": torch.full((100_000,), i + 1.0) for i in range(500)}, path)
    assert path.stat().st_size > 200_000_000
    return path


def run_on_big(folder: Path, table: Path, *labels: str) -> Fork:
    """Start a look-up of `labels` in `big_table`, which takes a while."""
    words = (*labels, "--esm-embeddings", table, *OUT, "--quiet")
    return script_fork("create_esm_pert_features", *words, cwd=folder)


def written(folder: Path) -> int:
    """Bytes of o.pt that a run has written so far."""
    sizes = 0
    for path in folder.glob(".o.pt.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            sizes += path.stat().st_size
    return sizes


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "stopped by Ctrl-C\n"),
        (signal.SIGTERM, 143, "stopped by SIGTERM\n"),
    ],
)
def test_a_signal_in_the_middle_of_the_write_leaves_the_old_files_as_they_were(
    tmp_path: Path,
    big_table: Path,
    create: Create,
    labels: Callable[..., tuple[str, ...]],
    number: signal.Signals,
    code: int,
    said: str,
) -> None:
    assert create(*labels("A")).code == 0
    (tmp_path / "many.txt").write_text("\n".join(f"G{i}" for i in range(200)))
    before = files(tmp_path)

    def begin() -> Fork:
        for name in files(tmp_path).keys() - before.keys():  # of one that was looked at too late
            (tmp_path / name).unlink()
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        return run_on_big(tmp_path, big_table, "--gene-list", "many.txt")

    def half_written() -> bool:
        return 0 < written(tmp_path) < 80_000_000

    with caught(begin, half_written) as process:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=PATIENCE)
    assert Result(process.returncode, out, err) == Result(code, "", said)
    assert files(tmp_path) == before


def test_a_signal_before_the_write_leaves_nothing(tmp_path: Path, big_table: Path) -> None:
    """While 200 MB are being looked up: as soon as the process has the table mapped."""
    processes = []

    def begin() -> Fork:
        for name in files(tmp_path):  # of one that was looked at too late
            (tmp_path / name).unlink()
        processes.append(run_on_big(tmp_path, big_table, "--all-genes"))
        return processes[-1]

    def looking_up() -> bool:
        maps = Path(f"/proc/{processes[-1].pid}/maps").read_text()
        return str(big_table) in maps and not files(tmp_path)

    with caught(begin, looking_up) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=PATIENCE)
    assert Result(process.returncode, out, err) == Result(130, "", "stopped by Ctrl-C\n")
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("blocker/o.pt", "Not a directory"),
        ("blocker/deeper/o.pt", "Not a directory"),
        ("/proc/o.pt", "No such file or directory"),
    ],
)
def test_an_output_folder_that_cannot_be_written_is_an_error(
    tmp_path: Path,
    create: Create,
    labels: Callable[..., tuple[str, ...]],
    output: str,
    reason: str,
) -> None:
    arguments = labels("A")
    (tmp_path / "table.pt").write_bytes(b"not read before the folder is tried")
    (tmp_path / "blocker").write_text("a file")
    before = files(tmp_path)
    assert create(*arguments, "--output", output) == Result(
        1,
        "",
        f"error: cannot write {output}: {reason}; nothing was changed. "
        "Choose another place for it\n",
    )
    assert files(tmp_path) == before


def test_an_output_that_is_a_folder_is_an_error(
    tmp_path: Path, create: Create, labels: Callable[..., tuple[str, ...]]
) -> None:
    arguments = labels("A")
    (tmp_path / "folder").mkdir()
    before = files(tmp_path)
    assert create(*arguments, "--output", "folder") == Result(
        1, "", "error: --output folder is a folder; give the name of a file in it\n"
    )
    assert files(tmp_path) == before


# --- memory -------------------------------------------------------------------------------------

# not ru_maxrss: a new process starts with that of the process that started it
MEASURED = """
import re, sys
import create_esm_pert_features as script
code = script.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def peak(folder: Path, table: Path, output: str) -> int:
    """KiB that a look-up of the genes in g.txt has in memory at most."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", MEASURED, "--gene-list", "g.txt", "--quiet"),
            *("--esm-embeddings", table, "--output", output),
        ],
        **{"cwd": folder, "capture_output": True, "text": True, "timeout": PATIENCE},
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    return int(done.stderr)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--output", "vectors/o.pt"), "--output vectors/o.pt"),
        (("--report", "vectors/r.tsv"), "--report vectors/r.tsv"),
        (("--plot", "link/p.png"), "--plot link/p.png"),
    ],
)
def test_no_output_is_written_into_a_folder_that_is_the_table(
    tmp_path: Path, create: Callable[..., Result], options: tuple[str, str], said: str
) -> None:
    folder = tmp_path / "vectors"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    torch.save(torch.ones(3), folder / "A.pt")
    (tmp_path / "genes.txt").write_text("A\n")
    sources = ("--gene-list", "genes.txt", "--esm-embeddings", "vectors", "--output", "o.pt")
    assert create(*sources, *options) == Result(
        1,
        "",
        f"error: {said} is in vectors, which is a table itself: it would be read as a part of it. "
        "Give a place in another folder\n",
    )
    assert [path.name for path in folder.iterdir()] == ["A.pt"]
    (folder / "out").mkdir()  # deeper folders are no part of a table
    assert create(*sources, "--output", "vectors/out/o.pt").code == 0


def test_of_a_large_table_only_the_vectors_in_use_come_into_memory(
    tmp_path: Path, big_table: Path
) -> None:
    genes = [f"G{i}" for i in range(5)]
    torch.save({g: torch.full((100_000,), i + 1.0) for i, g in enumerate(genes)}, tmp_path / "5.pt")
    (tmp_path / "g.txt").write_text("\n".join(genes))
    most = peak(tmp_path, tmp_path / "5.pt", "small.pt") + 60_000
    assert peak(tmp_path, big_table, "big.pt") < most
    assert (tmp_path / "big.pt").read_bytes() == (tmp_path / "small.pt").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--report", "genes.txt"), "--report genes.txt is an input"),
        (("--output", "genes.txt"), "--output genes.txt is an input"),
        (("--report", "./o.pt"), "--report o.pt is also the --output"),
        (("--report", "o.pt.json"), "--report o.pt.json is the manifest of --output"),
        (("--report", "table.pt"), "--report table.pt is there and of another kind"),
    ],
)
def test_outputs_take_the_place_of_no_input(
    tmp_path: Path, create: Callable[..., Result], options: tuple[str, str], message: str
) -> None:
    torch.save({"A": torch.ones(3)}, tmp_path / "table.pt")
    (tmp_path / "genes.txt").write_text("A\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sources = ("--gene-list", "genes.txt", "--esm-embeddings", "table.pt", "--output", "o.pt")
    done = create(*sources, "--dry-run", *options)
    assert (done.code, done.out, done.err) == (1, "", f"error: {message}; give another name\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
