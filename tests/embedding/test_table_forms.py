"""Forms of tables: told apart by what is inside, the same vectors from each, one line if bad."""

from __future__ import annotations

import gzip
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import hypothesis
import numpy as np
import pandas as pd
import pytest
import table_writers as write
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from state_esm_features.console import InputError, Notes
from state_esm_features.embedding.table_content import Asked
from state_esm_features.embedding.tables import Table, load_table
from state_esm_features.files import sha256_of

A, B = np.array([1.5, -2.0, 0.1], np.float32), np.array([3.0, 1e-30, 7.25], np.float32)
TABLE = {"STAT1": A, "NA": B}  # pandas would take the second name for no value


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(path: str, layer: int | None = None, key: str | None = None) -> tuple[Table, list[str]]:
    """A table, and what was noted of it."""
    notes = Notes()
    table = load_table(Path(path), notes, Asked(layer, key))
    return table, [text for _, text in notes.noted]


def values(table: Table) -> dict[str, list[float]]:
    return {gene: table[gene].tolist() for gene in table}


def refused(path: str, layer: int | None = None, key: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        load(path, layer, key)
    return str(error.value)


FORMS = {
    "torch": "torch dict",
    "npz": "npz",
    "npz by gene": "npz, one array a gene",
    "extract.py": "fair-esm extract.py",
    "meta.json": "embeddings.npy and its keys",
    "folder of .pt": "folder of .pt files",
    "folder of .npy": "folder of .npy files",
    "csv.gz": "text in columns",
    "parquet": "parquet",
    "hdf5": "HDF5, one dataset a protein",
    "h5ad X": "h5ad",
    "safetensors": "safetensors",
    "pickle.gz": "pickle",
}


@pytest.mark.parametrize("form", write.WRITERS)
def test_every_form_gives_the_vectors_by_gene(form: str) -> None:
    write.write_table(form, Path("t"), TABLE)
    table, said = load("t")
    assert {gene: table[gene].numpy().tobytes() for gene in table} == {
        gene: vector.tobytes() for gene, vector in TABLE.items()
    }
    assert (table.width, len(list(table.symbols))) == (3, 2)
    assert table.record()["form"] == FORMS.get(form, table.form)
    lists = ["t: float64 values are converted to float32"]
    assert said == (lists if form in ("csv of lists", "pickle of lists") else [])


NAMES = st.from_regex(r"[A-Z][A-Z0-9.-]{0,6}", fullmatch=True)


@hypothesis.settings(max_examples=6)
@hypothesis.given(st.data())
def test_one_table_in_every_form_gives_the_same_features_byte_for_byte(data: st.DataObject) -> None:
    names = data.draw(st.lists(NAMES, min_size=1, max_size=4, unique_by=str.casefold))
    width = data.draw(st.integers(1, 5))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    table = {name: data.draw(arrays(np.float32, width, elements=numbers)) for name in names}
    for form in write.WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            path = write.write_table(form, Path(folder) / "t", table)
            found = load_table(path, Notes())
            assert {gene: found[gene].numpy().tobytes() for gene in found} == {
                gene: vector.tobytes() for gene, vector in table.items()
            }, form


@pytest.mark.parametrize("form", write.WRITERS)
def test_a_row_whose_key_is_a_date_is_left_out_of_every_form(form: str) -> None:
    write.write_table(form, Path("t"), {"1-Mar": A, **TABLE, "2023-09-02": B})
    table, said = load("t")
    assert values(table) == {"STAT1": A.tolist(), "NA": B.tolist()}
    assert table.dates == ("1-Mar", "2023-09-02")
    assert said[0] == (
        "warning: t: 2 rows left out, whose keys are dates that a spreadsheet made of symbols "
        "(1-Mar, 2023-09-02)"
    )


def test_dates_that_parquet_stores_as_such_are_left_out() -> None:
    frame = pd.DataFrame({"gene": pd.to_datetime(["2023-03-01", "2023-09-02"]), "e": [1.0, 2.0]})
    frame.to_parquet("t")
    assert refused("t").startswith(
        "t: all 2 keys are dates that a spreadsheet made of symbols (2023-03-01 00:00:00.000"
    )


# --- folders --------------------------------------------------------------------------------------


def extracted(name: str, label: str | None, **content: object) -> None:
    Path("t").mkdir(exist_ok=True)
    torch.save(({"label": label} if label else {}) | content, f"t/{name}.pt")


def test_a_label_of_extract_py_names_its_gene_as_a_fasta_header_does() -> None:
    mean = {33: torch.tensor(A)}
    extracted(
        "a", "sp|P42224|STAT1_HUMAN Signal OS=Homo sapiens GN=STAT1", mean_representations=mean
    )
    extracted("b", "ENSP1 pep gene:ENSG00000141510.1 gene_symbol:TP53", mean_representations=mean)
    extracted("c", "query_ENSG00000169047_canonical", mean_representations=mean)
    extracted("MYC", None, mean_representations=mean)
    table, _ = load("t")
    assert list(table.symbols) == ["MYC", "STAT1", "TP53", "ENSG00000169047"]
    assert "ENSG00000141510" in table and str(table) == "t (4 genes x 3, layer 33)"


def test_the_last_layer_is_read_or_the_one_asked_for_or_the_mean_over_residues() -> None:
    residues = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    extracted("A", "A", mean_representations={6: torch.ones(2), 33: torch.full((2,), 2.0)})
    extracted("B", "B", representations={6: residues, 33: residues * 2})
    assert values(load("t")[0]) == {"A": [2.0, 2.0], "B": [4.0, 8.0]}
    table, _ = load("t", layer=6)
    assert values(table) == {"A": [1.0, 1.0], "B": [2.0, 4.0]}
    assert table.record()["layer"] == 6


def test_what_else_lies_in_a_folder_is_said_and_its_hash_is_that_of_what_was_read() -> None:
    write.of_pt_folder(Path("t"), TABLE)
    before = load("t")[0].sha256
    Path("t/README.md").write_text("mine")
    table, said = load("t")
    assert said == ["t: 1 other file left out (README.md)"] and table.sha256 == before
    Path("t/NA.pt").rename("t/NB.pt")
    assert load("t")[0].sha256 != before
    Path("t/NB.pt").rename("t/NA.pt")
    assert load("t")[0].sha256 == before
    torch.save(torch.zeros(3), "t/NA.pt")
    assert load("t")[0].sha256 != before
    write.of_npz(Path("n"), TABLE)
    assert load("n.npz")[0].sha256 == sha256_of(Path("n.npz"))


def bad_extract_layers() -> None:
    extracted("A", "A", mean_representations={6: torch.ones(2)})
    extracted("B", "B", mean_representations={6: torch.ones(2), 33: torch.ones(2)})


def mixed_extract() -> None:
    extracted("A", "A", mean_representations={6: torch.ones(2)})
    torch.save(torch.ones(2), "t/B.pt")


def twice_extracted() -> None:
    extracted("1", "sp|P42224|A GN=A OS=x", mean_representations={6: torch.ones(2)})
    extracted("2", "P42224 GN=A OS=x", mean_representations={6: torch.ones(2)})


def two_lists_of_keys() -> None:
    write.of_matrix_folder(Path("t"), TABLE)
    Path("t/names.txt").write_text("STAT1\nNA\n")


def no_list_of_keys() -> None:
    write.of_matrix_folder(Path("t"), TABLE)
    Path("t/meta.json").unlink()


def other_length_of_keys() -> None:
    write.of_matrix_folder(Path("t"), TABLE)
    Path("t/meta.json").write_text(json.dumps({"keys": ["A", "B", "C"]}))


def two_kinds_of_files() -> None:
    write.of_pt_folder(Path("t"), TABLE)
    np.save("t/X.npy", A)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            bad_extract_layers,
            "t: layers differ: A.pt has 6, B.pt has 6, 33; choose one that all have with --layer N",
        ),
        (mixed_extract, "t/B.pt is not of fair-esm's extract.py, as A.pt is"),
        (twice_extracted, "t: 1 gene more than once (P42224); keep one vector of each"),
        (
            lambda: extracted("A", "A", bos_representations={6: torch.ones(2)}),
            "t/A.pt holds no vector but that of the first token. Run extract.py with --include "
            "mean",
        ),
        (
            two_lists_of_keys,
            "t has embeddings.npy and more than one list of keys: meta.json and names.txt; keep "
            "one",
        ),
        (
            no_list_of_keys,
            "t has embeddings.npy and no list of its keys: meta.json, genes.json, index.tsv, "
            "gene_order.txt, names.txt, one name a row",
        ),
        (
            other_length_of_keys,
            "t: expected `meta.json` (n,) of text and `embeddings.npy` (n, width), found <U1 (3,) "
            "and float32 (2, 3); the matrix is transposed, save its .T",
        ),
        (two_kinds_of_files, "t holds .pt and .npy files; keep one kind of them in it"),
        (
            lambda: write.of_npy_folder(Path("t"), {"A": np.ones((4, 3)), "B": np.ones((5, 3))}),
            "t: 'A' has shape (4, 3); expected one vector a gene. These are vectors of residues: "
            "save the mean over them, vector.mean(0)",
        ),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(make: Callable[[], None], message: str) -> None:
    make()
    assert refused("t") == message


def test_a_layer_that_a_folder_lacks_is_named() -> None:
    extracted("A", "A", mean_representations={6: torch.ones(2), 33: torch.ones(2)})
    assert refused("t", layer=5) == "t/A.pt has no layer 5, but 6, 33: see --layer"


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        ("gene,0,1\nA,1,2\nB,3,4\n", {"A": [1, 2], "B": [3, 4]}, []),
        ("\ufeffid;x;y\r\nA;1,5;2\r\n", {"A": [1.5, 2]}, []),
        ("A,0.5,2\nB,3,4\n", {"A": [0.5, 2], "B": [3, 4]}, []),  # no header
        ("x\ty\nA\t1\t2\n", {"A": [1, 2]}, []),  # as R writes it
        (
            "chrom,e0,ensembl_gene_id,e1\nchr1,1,ENSG1,2\nchrX,3,ENSG2,4\n",
            {"ENSG1": [1, 2], "ENSG2": [3, 4]},
            ["t: 1 column left out (chrom)"],
        ),
        (",symbol,e0\n0,A,5\n1,B,6\n", {"A": [5], "B": [6]}, ["t: 1 column left out ((no name))"]),
        ('uniprot,note,vec\nP1,x,"[1, 2]"\n', {"P1": [1, 2]}, ["t: 1 column left out (note)"]),
        ('gene,vec\nA,"[1.  2.5\n 3.]"\n', {"A": [1, 2.5, 3]}, []),  # as NumPy prints it
        ("entrez,e\n7157,1\n", {"7157": [1]}, []),
        (
            "gene,length,dim_0,dim_1,dim_2,entrezgene_id\nA,750,1,2,3,6772\n",
            {"A": [1, 2, 3]},
            ["t: 2 columns left out (length, entrezgene_id)"],
        ),
        (
            "gene,0,1,2,n_residues\nA,1,2,3,750\n",
            {"A": [1, 2, 3]},
            ["t: 1 column left out (n_residues)"],
        ),
        (
            "gene,esm_0,esm_1,t5_0,t5_1,pLDDT\nA,1,2,3,4,9\n",
            {"A": [1, 2, 3, 4]},
            ["t: 1 column left out (pLDDT)"],
        ),
        ("gene,height,width,length\nA,1,2,3\n", {"A": [1, 2, 3]}, []),  # none is numbered
        ("gene,V1,length\nA,1,3\n", {"A": [1, 3]}, []),  # one is not numbered by another
    ],
)
def test_columns_of_text_are_read_by_what_they_hold(
    text: str, expected: dict[str, list[float]], said: list[str]
) -> None:
    Path("t").write_text(text, newline="")
    table, notes = load("t")
    assert values(table) == expected
    assert [note for note in notes if "converted" not in note] == said


def test_a_parquet_too_has_dimensions_that_are_numbered() -> None:
    frame = pd.DataFrame(np.ones((2, 4)), index=["A", "B"], columns=["0", "1", "2", "length"])
    frame.to_parquet("t")
    table, said = load("t")
    assert (table.width, said[0]) == (3, "t: 1 column left out (length)")


def test_a_parquet_has_its_genes_in_the_index_or_in_a_column() -> None:
    frame = pd.DataFrame({"e0": [1.0, 2.0], "species": ["human", "human"]}, index=["A", "B"])
    frame.to_parquet("t")
    table, said = load("t")
    assert values(table) == {"A": [1.0], "B": [2.0]}
    assert said == ["t: 1 column left out (species)"]
    frame.reset_index(names="symbol").astype({"symbol": "category"}).to_parquet("t")
    assert values(load("t")[0]) == {"A": [1.0], "B": [2.0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gene,symbol,x\nA,A,1\n",
            "t has more than one column of genes (gene, symbol); keep one of them",
        ),
        (
            "gene,x,y\nA,1,2\nB,3,n/d\n",
            None,
        ),
        (
            "gene,x,y\nA,1,2\nB,3,4\nC,n/d,5\n",
            "t: column 'x' holds numbers and text ('n/d' for C); mend it, or take the column out",
        ),
        (
            "gene,note\nA,x\n",
            "t has no column of numbers beside the genes in 'gene'; columns: gene, note",
        ),
        ("x,y\n0.5,1\n0.25,2\n", "t has no column of genes: 'x' holds numbers"),
        (
            "gene,x,y\nA,1,2\nB,3\n",
            "t cannot be read as text in columns: damaged or cut short (CSV parse error: Expected "
            "3 columns, got 2: B,3)",
        ),
        ("gene,x\nA,1\nA,2\n", "t: 1 gene more than once (A); keep one vector of each"),
        (
            'gene,vec\nA,"[0.1 0.2 ... 0.3]"\n',
            "t: the lists in column 'vec' were shortened to '...' when they were written, so their "
            "numbers are lost. Write the table again in another form, such as .parquet",
        ),
        (
            'gene,vec\nA,"[0.1, n/d]"\n',
            "t: column 'vec' holds lists with other than numbers",
        ),
        (
            'gene,vec\nA,"[0.1, 2]"\nB,"[]"\n',
            "t: column 'vec' holds lists with other than numbers",
        ),
        ("gene,x\n,1\n", "t: 1 of 1 keys are no names of genes (''); name each gene by a text"),
    ],
)
def test_bad_columns_are_refused_in_one_line(text: str, message: str | None) -> None:
    Path("t").write_text(text)
    if message is None:  # half of the cells: a column of text
        assert load("t")[1] == ["t: 1 column left out (y)"]
    else:
        assert refused("t") == message


def test_lists_written_as_text_are_the_numbers_that_python_reads() -> None:
    numbers = np.random.default_rng(0).normal(size=(1201, 3)) * 10.0 ** np.arange(-9, 9, 6)
    table = {f"G{i}": row for i, row in enumerate(numbers)}
    write.of_csv_lists(Path("t"), table)
    opened, _ = load("t")
    assert [opened.vectors[gene].tolist() for gene in table] == numbers.tolist()
    texts = [str(row.tolist()) for row in numbers]
    pd.DataFrame({"gene": list(table), "vec": texts}).to_parquet("t")
    opened, _ = load("t")
    assert [opened.vectors[gene].tolist() for gene in table] == numbers.tolist()


def test_one_of_several_columns_of_lists_is_chosen() -> None:
    pd.DataFrame({"gene": ["A"], "cls": [[1.0]], "mean": [[2.0]]}).to_parquet("t")
    assert refused("t") == "t has several columns of lists (cls, mean); choose one with --table-key"
    assert values(load("t", key="mean")[0]) == {"A": [2.0]}
    assert load("t", key="mean")[0].record()["table_key"] == "mean"


# --- HDF5 -----------------------------------------------------------------------------------------


def data_of(**more: object) -> anndata.AnnData:
    frame = pd.DataFrame(index=["A", "B"])
    return anndata.AnnData(np.ones((2, 3), np.float32), obs=frame, **more)  # type: ignore[arg-type]


def test_one_of_several_places_of_an_h5ad_is_chosen_by_key() -> None:
    data_of(obsm={"esm": np.full((2, 4), 2.0)}, uns={"t5": {"A": np.full(5, 3.0)}}).write_h5ad("t")
    assert refused("t") == (
        "t holds more than one thing that may be the vectors: X (2, 3), obsm/esm (2, 4), uns/t5 a "
        "dict of 1 vector. Choose one with --table-key, for instance --table-key X"
    )
    assert refused("t", key="esm2").startswith(
        "t holds more than one thing that may be the vectors: X (2, 3), obsm/esm (2, 4), uns/t5 a "
        "dict of 1 vector, and no 'esm2'"
    )
    assert values(load("t", key="X")[0])["B"] == [1.0] * 3
    assert values(load("t", key="esm")[0])["B"] == [2.0] * 4
    assert values(load("t", key="uns/t5")[0]) == {"A": [3.0] * 5}


def test_where_obs_are_cells_the_vectors_are_those_of_var_or_uns() -> None:
    data = data_of(obsm={"X_pca": np.ones((2, 2))}, uns={"esm": {"G": np.full(4, 3.0)}})
    data.obs["cell_type"] = "K562"
    data.write_h5ad("t")
    assert values(load("t")[0]) == {"G": [3.0] * 4}


def test_a_sparse_matrix_and_a_frame_of_an_h5ad_are_read() -> None:
    import scipy.sparse

    frame = pd.DataFrame({"x": [1.0, 2.0]}, index=["A", "B"])
    anndata.AnnData(scipy.sparse.csr_matrix(np.eye(2, dtype=np.float32)), obs=frame[[]]).write_h5ad(
        "t"
    )
    assert values(load("t")[0]) == {"A": [1.0, 0.0], "B": [0.0, 1.0]}
    anndata.AnnData(obs=frame[[]], obsm={"esm": frame}).write_h5ad("t")
    assert values(load("t")[0]) == {"A": [1.0], "B": [2.0]}


def h5_with(**nodes: object) -> None:
    with h5py.File("t", "w") as file:
        for name, node in nodes.items():
            file[name] = node


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: h5_with(A=np.ones((4, 3)), B=np.ones((5, 3))),
            "t: 'A' has shape (4, 3); expected one vector a gene. These are vectors of residues: "
            "save the mean over them, vector.mean(0)",
        ),
        (
            lambda: h5_with(**{"x/A": A}),
            "t holds groups (x); expected one dataset a protein, or an .h5ad",
        ),
        (
            lambda: h5_with(A="text"),
            "t: 1 of 1 entries are not gene -> vector of numbers ('A': bytes)",
        ),
        (
            lambda: anndata.AnnData(obs=pd.DataFrame(index=["A"])).write_h5ad("t"),
            "t holds no vectors: it has neither X nor obsm, varm or a dict in uns",
        ),
        (lambda: h5_with(), "t holds an empty table"),
    ],
)
def test_bad_hdf5_is_refused_in_one_line(make: Callable[[], None], message: str) -> None:
    make()
    assert refused("t") == message


# --- other files ----------------------------------------------------------------------------------


def test_arrays_of_objects_in_an_npz_are_saved_again_by_the_lines_in_the_message() -> None:
    objects = np.array(["A", "B"], dtype=object)
    np.savez("t.npz", genes=objects, embeddings=np.ones((2, 3)))
    exec(refused("t.npz").partition(":\n")[2].replace("  ", ""), {})
    assert values(load("t_plain.npz")[0]) == {"A": [1.0] * 3, "B": [1.0] * 3}


def one_array() -> None:
    np.save("t.npy", A)
    Path("t.npy").rename("t")


def twice_in_npz() -> None:
    np.savez("t.npz", names=["A", "A"], embeddings=np.ones((2, 3)))
    Path("t.npz").rename("t")


UNKNOWN = (
    "t is no table of vectors that is known here. Forms: a {gene: vector} dict of torch.save, "
    "pickle or safetensors; .npz; .csv, .tsv or .parquet with a column of genes; .h5 with one "
    "dataset a protein; .h5ad; a folder of fair-esm's extract.py, of .pt or of .npy files, or with "
    "embeddings.npy and its list of keys"
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Path("t").write_text("words\n"), UNKNOWN),
        (lambda: Path("t").write_text('{"A": [1, 2]}'), UNKNOWN),
        (lambda: Path("t").write_text(">sp|P1|X GN=A, B\nMKT\n"), UNKNOWN),
        (lambda: Path("t").write_bytes(b"\xff\xfe\x00,"), UNKNOWN),
        (lambda: Path("t").mkdir(), UNKNOWN),
        (lambda: Path("t").write_bytes(b""), "t is empty"),
        (
            one_array,
            "t is one array without the names of its genes. Give the folder that holds "
            "embeddings.npy and its list of keys, or save both with np.savez(FILE, genes=..., "
            "embeddings=...)",
        ),
        (
            lambda: torch.save({"label": "A", "mean_representations": {6: torch.ones(2)}}, "t"),
            "t is one protein of fair-esm's extract.py; give the folder",
        ),
        (
            lambda: Path("t").write_bytes(pickle.dumps(["A"])),
            "t holds no {gene: vector} table, but list; save a dict",
        ),
        (
            lambda: Path("t").write_bytes(pickle.dumps({"A": A})[:-20]),
            "t cannot be read as a pickle: damaged or cut short (pickle data was truncated)",
        ),
        (
            lambda: Path("t").write_bytes(gzip.compress(pickle.dumps({"A": A}))[:-20]),
            "t cannot be read as a pickle: damaged or cut short (Compressed file ended before the "
            "end-of-stream marker was reached)",
        ),
        (
            lambda: Path("t").write_bytes(pickle.dumps({"A": A.astype(object)})),
            "t: 1 of 1 entries are not gene -> vector of numbers ('A': array of object)",
        ),
        (
            lambda: save_file({"A": np.ones((2, 3), np.float32)}, "t"),
            "t: 'A' has shape (2, 3); expected one vector a gene",
        ),
        (
            lambda: write.write_table("npz by gene", Path("t"), {"A": A, "B": B[:2]}),
            "t: vectors of different widths: 3 ('A'), 2 ('B'); one table, one width",
        ),
        (
            twice_in_npz,
            "t: 1 gene more than once (A); keep one vector of each",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(make: Callable[[], None], message: str) -> None:
    make()
    assert refused("t") == message


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("parquet", "t cannot be read as .parquet: damaged or cut short ("),
        ("hdf5", "t cannot be read as HDF5: damaged or cut short ("),
        ("safetensors", "t cannot be read as .safetensors: damaged or cut short ("),
    ],
)
def test_a_file_that_is_cut_short_says_so(form: str, said: str) -> None:
    whole = write.write_table(form, Path("t"), TABLE).read_bytes()
    Path("t").write_bytes(whole[:-10])
    assert refused("t").startswith(said)


def test_a_pickled_data_frame_is_saved_again_by_the_line_in_the_message() -> None:
    write.frame(TABLE).rename(columns=str).to_pickle("t.pkl")
    line = refused("t.pkl").partition("python -c ")[2]
    assert line == (
        """'import pandas; pandas.read_pickle('"'"'t.pkl'"'"').to_parquet('"'"'t_plain.parquet'"""
        """"'"')'"""
    )
