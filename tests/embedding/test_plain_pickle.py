"""Pickles of plain values are read; what else a pickle asks for is refused, and nothing runs."""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import pickletools
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from state_esm_features.console import InputError, Notes
from state_esm_features.embedding.plain_pickle import Refused, plain, read_plain
from state_esm_features.embedding.tables import load_table


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3)),
        np.array([], dtype=np.int16),
        np.array(1.5),
        np.array(["STAT1", "é"]),
        np.array([b"x"]),
        np.array([1.5, None, "x"], dtype=object),
    ],
    ids=["C", "Fortran, big-endian", "empty", "0-d", "text", "bytes", "objects"],
)
def test_arrays_come_back_as_numpy_wrote_them(array: np.ndarray, protocol: int) -> None:
    found = plain(read_plain(io.BytesIO(pickle.dumps(array, protocol))))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tolist() == array.tolist()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back(protocol: int) -> None:
    value = {"A": [1, 2.5, None, True], "B": ("é", b"\xff", {"c": 2**70})}
    assert read_plain(io.BytesIO(pickle.dumps(value, protocol))) == value
    scalars = {"x": np.float32(1.5), "y": np.int64(-3)}
    assert read_plain(io.BytesIO(pickle.dumps(scalars, protocol))) == scalars
    ordered = read_plain(io.BytesIO(pickle.dumps(OrderedDict(A=1, B=2), protocol)))
    assert (type(ordered), list(ordered.items())) == (dict, [("A", 1), ("B", 2)])


def test_text_of_python_2_is_text() -> None:
    assert read_plain(io.BytesIO(b"\x80\x02}U\x05STAT1K\x01s.")) == {"STAT1": 1}


# --- what would run code --------------------------------------------------------------------------

MARKER = Path("executed")


def run(*_: object) -> None:
    """What a pickle shall never reach."""
    MARKER.touch()


class ByReduce:
    def __reduce__(self) -> Any:
        return run, ()


class ByState:
    def __reduce__(self) -> Any:
        return ByState, (), "state"

    def __setstate__(self, state: object) -> None:
        run()


class ByNew:
    def __new__(cls, *_: object) -> Any:
        if MARKER.parent.name == "":  # always: when it is made for the pickle too
            MARKER.touch()
        return super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (ByNew,)  # type: ignore[attr-defined]


class ByItems(list):
    def extend(self, items: object) -> None:
        run()

    def append(self, item: object) -> None:
        run()


class BySetter:
    """A sixth value of __reduce__ sets the state of what the first two make."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"x": 1}, None, None, setter


def setter(*_: object) -> None:
    run()


class Dispatched:
    pass


@contextlib.contextmanager
def extension(code: int) -> Iterator[None]:
    """`run` under a number of copyreg's registry, which a pickle calls by that number."""
    copyreg.add_extension(__name__, "run", code)
    try:
        yield
    finally:
        copyreg.remove_extension(__name__, "run", code)


class WithId(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return "an id" if isinstance(value, ByReduce) else None


def with_id(value: object) -> bytes:
    file = io.BytesIO()
    WithId(file, 2).dump(value)
    return file.getvalue()


def items() -> ByItems:
    made = ByItems()
    list.append(made, 1)
    return made


def objects(value: object) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


HERE = __name__

WAYS: dict[str, tuple[Callable[[], bytes], str]] = {
    "__reduce__": (lambda: pickle.dumps({"A": ByReduce()}), f"{HERE}.run"),
    "__reduce__, protocol 0": (lambda: pickle.dumps({"A": ByReduce()}, 0), f"{HERE}.run"),
    "__setstate__": (lambda: pickle.dumps({"A": ByState()}), f"{HERE}.ByState"),
    "__new__": (lambda: pickle.dumps({"A": ByNew()}, 2), f"{HERE}.ByNew"),
    "items of a list": (lambda: pickle.dumps({"A": items()}), f"{HERE}.ByItems"),
    "a setter of state": (lambda: pickle.dumps({"A": BySetter()}), f"{HERE}.setter"),
    "a persistent id": (lambda: with_id({"A": ByReduce()}), "a persistent id"),
    "in an array of objects": (
        lambda: pickle.dumps({"A": objects({"b": [ByReduce()]})}),
        f"{HERE}.run",
    ),
    "as a key": (lambda: pickle.dumps({("x", ByReduce()): 1}), f"{HERE}.run"),
    "a call of eval": (lambda: b"c__builtin__\neval\n(V0\ntR.", "__builtin__.eval"),
    "INST": (lambda: b"(V0\nios\nsystem\n.", "os.system"),
    "an attribute of what is allowed": (
        lambda: b"\x80\x04\x8c\x05numpy\x8c\x14ndarray.__init__.__x\x93.",
        "numpy.ndarray.__init__.__x",
    ),
    "a codec": (
        lambda: b"c_codecs\nencode\n(V0\nVzlib\ntR.",
        "_codecs.encode to zlib",
    ),
    "a state for a function": (
        lambda: b"c_codecs\nencode\n}Vx\nI1\nsb.",
        "a state for _codecs.encode",
    ),
    "a new object of a stand-in": (
        lambda: pickle.dumps(np.ones(2), 2).replace(b"_reconstruct", b"scalar      "),
        "numpy._core.multiarray.scalar      ",
    ),
    "a subclass of an array": (
        lambda: b"cnumpy.core.multiarray\n_reconstruct\n(ccollections\nOrderedDict\n(I0\ntVb\ntR.",
        "a subclass of numpy.ndarray",
    ),
    "a call of ndarray": (lambda: b"cnumpy\nndarray\n(I1\ntR.", "numpy.ndarray(...)"),
    "a dtype with fields": (lambda: b"cnumpy\ndtype\n(Vf4,O8\ntR.", "numpy.dtype('f4,O8')"),
    "a state of a dtype": (
        lambda: b"cnumpy\ndtype\n(Vf4\ntR(I3\nV<\nN(Vx\ntNtb.",
        "numpy.dtype with fields",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_that_would_run_code_is_refused_by_name_and_nothing_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, name = WAYS[way]
    content = make()
    MARKER.unlink(missing_ok=True)
    with pytest.raises(Refused) as refused:
        read_plain(io.BytesIO(content))
    assert refused.value.name == name
    assert not MARKER.exists()


@pytest.mark.parametrize("way", ["__reduce__", "__setstate__", "__new__", "in an array of objects"])
def test_these_pickles_do_run_where_pickle_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = WAYS[way][0]()
    MARKER.unlink(missing_ok=True)
    pickle.loads(content)
    assert MARKER.exists()


@pytest.mark.parametrize("remembered", [False, True])
def test_an_extension_of_copyreg_is_refused_though_pickle_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    with extension(241):
        content = pickle.dumps({"A": ByReduce()}, 2)
        assert "EXT1" in {code.name for code, _, _ in pickletools.genops(content)}
        if remembered:  # by number, without asking find_class
            pickle.loads(content)
            assert MARKER.exists()
            MARKER.unlink()
        with pytest.raises(Refused, match=f"{HERE}.run"):
            read_plain(io.BytesIO(content))
        assert not MARKER.exists()


def test_a_dispatch_table_writes_a_call_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg.dispatch_table, Dispatched, lambda _: (run, ()))
    content = pickle.dumps({"A": Dispatched()})
    with pytest.raises(Refused, match=f"{HERE}.run"):
        read_plain(io.BytesIO(content))
    assert not MARKER.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("way", [ByReduce, ByState, lambda: objects(ByReduce())])
def test_a_torch_file_that_would_run_code_is_refused_and_nothing_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[], object], zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"A": np.ones(2), "B": way()}
    torch.save(content, "t.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError) as refused:
        load_table(Path("t.pt"), Notes())
    name = f"{HERE}.ByState" if way is ByState else f"{HERE}.run"
    assert str(refused.value) == (
        "t.pt was refused without running it: it holds pickled Python objects beside tensors "
        f"({name}), and loading those can execute code. Save it again as a plain {{gene: "
        "torch.Tensor} dict"
    )
    assert not MARKER.exists()
    torch.load("t.pt", weights_only=False)
    assert MARKER.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("remembered", [False, True])
def test_an_extension_of_copyreg_in_a_torch_file_is_refused_and_nothing_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, remembered: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    with extension(241):
        content = {"A": torch.ones(2), "B": ByReduce()}
        torch.save(content, "t.pt", _use_new_zipfile_serialization=zipped)
        if remembered:
            torch.load("t.pt", weights_only=False)
            MARKER.unlink()
        with pytest.raises(InputError, match=r"t\.pt was refused without running it"):
            load_table(Path("t.pt"), Notes())
        assert not MARKER.exists()


def test_no_dtype_of_numpy_is_built_by_the_state_in_a_torch_file(tmp_path: Path) -> None:
    """Its own __setstate__ believes flags and sizes that it is given."""
    torch.save({"A": np.ones(2, dtype=[("x", "f4"), ("y", "O")])}, tmp_path / "t.pt")
    with pytest.raises(InputError) as refused:
        load_table(tmp_path / "t.pt", Notes())
    assert str(refused.value) == (
        f"{tmp_path}/t.pt was refused without running it: it is no file of torch.save, or it holds "
        "pickled Python objects beside tensors, and loading those can execute code. Save it again "
        "as a plain {gene: torch.Tensor} dict"
    )


def test_a_refused_pickle_is_saved_again_by_the_line_in_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.pkl").write_bytes(pickle.dumps({"A": torch.tensor([1.0, 2.0])}))
    with pytest.raises(InputError) as refused:
        load_table(Path("t.pkl"), Notes())
    said, _, line = str(refused.value).partition("python -c ")
    assert "anything of it ran: it holds torch._utils._rebuild_tensor_v2, and of a pickle" in said
    exec(shlex.split(line)[0], {})
    assert load_table(Path("t_plain.pt"), Notes())["A"].tolist() == [1.0, 2.0]
