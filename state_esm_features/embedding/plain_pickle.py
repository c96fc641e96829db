"""Pickles of plain values: dicts, lists, tuples, text, numbers and NumPy arrays, and nothing else.

A pickle is a program that names what it calls. Here each name leads to a stand-in of this module,
or it is refused before anything of it has run. What the values mean is not known here.
"""

from __future__ import annotations

import copyreg
import pickle
import re
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Refused(pickle.UnpicklingError):
    """A pickle asks for something that is not plain; `name` says for what."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class StandIn:
    """What a name in a pickle leads to: it can be called, and nothing can be set on it."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any] | None = None) -> None:
        self.name, self.make = name, make

    def __call__(self, *args: Any) -> Any:
        if self.make is None:
            raise Refused(f"{self.name}(...)")
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"a state for {self.name}")


class Dtype:
    """A dtype of numbers, text or objects. Of its state only the order of bytes is taken: NumPy's
    own would take sizes and flags too, and believe them."""

    __slots__ = ("value",)

    def __init__(self, code: Any = "", *_: Any) -> None:
        import numpy as np

        code = code.decode("latin1") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[<>=|]?(b1|[iufc]\d{1,2}|[SU]\d{1,6}|O8?)", code):
            raise Refused(f"numpy.dtype({code!r})")
        self.value: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *parts = state[:5]
        if any(part is not None for part in parts) or order not in ("<", ">", "=", "|"):
            raise Refused("numpy.dtype with fields")
        self.value = self.value.newbyteorder(order)


class Array:
    """A NumPy array, once its state is there."""

    __slots__ = ("value",)

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, content = state[-4:]
        self.value = filled(dtype, shape, content, "F" if fortran else "C")


def filled(dtype: Any, shape: Any, content: Any, order: Any) -> np.ndarray:
    """The array of these bytes, or of this list of objects; its size is theirs."""
    import numpy as np

    if type(dtype) is not Dtype or order not in ("C", "F"):
        raise Refused("numpy.ndarray of another kind")
    if dtype.value.hasobject:
        if not isinstance(content, list):
            raise Refused("numpy.ndarray of another kind")
        array = np.empty(len(content), dtype=object)
        for i, item in enumerate(content):
            array[i] = item
    else:
        content = content.encode("latin1") if isinstance(content, str) else content
        array = np.frombuffer(content, dtype.value) if content else np.empty(0, dtype.value)
    return array.reshape(shape, order=order)


def _empty_array(kind: Any, *_: Any) -> Array:
    """_reconstruct(ndarray, (0,), b'b'): an array whose state follows."""
    if kind is not NDARRAY:
        raise Refused("a subclass of numpy.ndarray")
    return Array()


def _array_of(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """_frombuffer of pickle protocol 5."""
    array = Array()
    array.value = filled(dtype, shape, bytes(content), order)
    return array


def _scalar(dtype: Any, content: Any) -> Any:
    """A number of NumPy."""
    return filled(dtype, (), content if isinstance(content, str) else bytes(content), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, as old protocols write them."""
    if encoding != "latin1":
        raise Refused(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


def _no_bytes(*args: Any) -> bytes:
    """bytes(), as old protocols write none."""
    if args:
        raise Refused("bytes(...)")
    return b""


NDARRAY = StandIn("numpy.ndarray")

MAKERS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": Dtype,
    **dict.fromkeys(
        ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"), _empty_array
    ),
    **dict.fromkeys(
        ("numpy._core.numeric._frombuffer", "numpy.core.numeric._frombuffer"), _array_of
    ),
    **dict.fromkeys(("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"), _scalar),
    "_codecs.encode": _encode,
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), _no_bytes),
    "collections.OrderedDict": dict,
}

STAND_INS = {name: StandIn(name, make) for name, make in MAKERS.items()} | {
    "numpy.ndarray": NDARRAY
}
"""{name in a pickle: what it leads to}."""

IN_TORCH_FILES = [
    *((stand_in, name) for name, stand_in in STAND_INS.items() if name.startswith("numpy.")),
    (Array, "stand-in of an array"),
    (Dtype, "stand-in of a dtype"),
]
"""The same for `torch.serialization.safe_globals`, whose unpickler asks for the types of what gets
a state; no pickle can name these two."""


class PlainUnpickler(pickle.Unpickler):
    """Leads every name to its stand-in."""

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in STAND_INS:
            raise Refused(wanted)
        return STAND_INS[wanted]

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("a persistent id")


def read_plain(file: IO[bytes]) -> Any:
    """The content of a pickle, with `Array` in place of arrays; see `plain`.

    Raises
    ------
    Refused
        It asks for anything else. Whatever other error: it is damaged.
    """
    copyreg.clear_extension_cache()  # what it remembers would be used without asking find_class
    return PlainUnpickler(file, encoding="latin1").load()  # text of Python 2


def plain(value: Any) -> Any:
    """The array, where there is a stand-in of one."""
    return value.value if isinstance(value, Array) else value
