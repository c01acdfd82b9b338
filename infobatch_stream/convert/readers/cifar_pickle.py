"""CIFAR's pickles, read by an unpickler that knows plain values and arrays of uint8, and nothing else."""

import io
import math
import pickle
import pickletools
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["PickledArray", "read_plain_pickle"]

_MOST = 1 << 22  # opcodes; CIFAR-100 has 300,000
_LONGEST = 1000  # characters of a key
_MOST_MARKS = 1 << 12  # CIFAR has one for every 1000 labels
_OPCODES = frozenset([
    "PROTO", "FRAME", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
])  # fmt: skip
_MISFITS = (pickle.UnpicklingError, AttributeError, EOFError, LookupError, TypeError, struct.error)


@dataclass(eq=False)
class PickledArray:
    """An array of uint8. It stands in a pickle before the opcode that fills it, where it may be referred to."""

    shape: tuple[int, ...] = (0,)
    fortran: bool = False
    content: str | bytes = ""

    def values(self) -> NDArray[np.uint8]:
        """uint8[shape], read-only. Raises ValueError."""
        content = self.content.encode("latin-1") if isinstance(self.content, str) else self.content
        return np.frombuffer(content, np.uint8).reshape(self.shape, order="F" if self.fortran else "C")

    def fill(self, state: object) -> None:
        """Take the values, which must be as many bytes as the shape says."""
        match state:
            case (int(), tuple(shape), dtype, bool(fortran), str(data) | bytes(data)) if dtype is _UINT8:
                if not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 8:
                    raise ValueError("it has an array of an impossible shape")
                if math.prod(shape) != len(data):
                    raise ValueError(f"its array has {len(data):,} bytes, and by its shape {math.prod(shape):,}")
                self.shape, self.fortran, self.content = shape, fortran, data
            case _:
                raise ValueError("it has an array that is not described as NumPy does it")


_NDARRAY, _UINT8 = object(), object()  # what stands for the two types while a file is read


def _array(kind: object, *_: object) -> PickledArray:
    if kind is not _NDARRAY:
        raise ValueError("it makes an array of a type that is none")
    return PickledArray()


def _dtype(name: object, *_: object) -> object:
    if name not in ("u1", b"u1"):
        called = repr(name[:20]) if isinstance(name, str | bytes) else type(name).__name__
        raise ValueError(f"it has an array of dtype {called}; only uint8 ('u1') is read")
    return _UINT8


def _encode(text: object, codec: object) -> str:
    """Bytes, as Python 3 writes them for Python 2; they stay the text, so that no reference to it makes a copy."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise ValueError("it calls '_codecs encode' for what are no bytes, which is never done")
    return text


_KNOWN: dict[str, Any] = {
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _dtype,
    "numpy.core.multiarray _reconstruct": _array,  # until NumPy 2
    "numpy._core.multiarray _reconstruct": _array,
    "_codecs encode": _encode,
}


class _ArrayUnpickler(pickle._Unpickler):
    """Python's unpickler without the opcodes that no such file has, and without imports: a name is one of `_KNOWN`.

    It is the one that Python has in Python. The one in C takes memory for the largest number of a memo that a file
    claims, and hashes any key: of nested tuples that may take for ever, or end the process.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        ord(opcode.code): pickle._Unpickler.dispatch[ord(opcode.code)]
        for opcode in pickletools.opcodes
        if opcode.name in _OPCODES
    }

    def find_class(self, module: str, name: str, /) -> Any:
        """What stands for a name; nothing is imported."""
        if (called := f"{module} {name}") not in _KNOWN:
            raise ValueError(f"it calls {called[:100]!r}, which is never done")
        return _KNOWN[called]

    def load_build(self) -> None:
        """Fill an array: no other state is ever set."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledArray):
            target.fill(state)
        elif target is not _UINT8:  # the state of a dtype of one byte says nothing
            raise ValueError(f"it sets the state of a {type(target).__name__}")

    def load_setitem(self) -> None:
        """Set one item of a dict."""
        self._update([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        """Set some items of a dict."""
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError(f"it sets items of a {type(self.stack[-1]).__name__}")  # noqa: TRY004
        self.stack[-1].update(zip(map(_text, items[::2]), items[1::2], strict=True))

    dispatch[ord(pickle.BUILD)] = load_build
    dispatch[ord(pickle.SETITEM)] = load_setitem
    dispatch[ord(pickle.SETITEMS)] = load_setitems


def read_plain_pickle(data: bytes) -> dict[str, Any]:
    """The dict in ``data``, its keys as texts; bytes may come as text, too, one character per byte.

    Nothing is imported or run, no value is copied, and no claimed size is believed, so memory is a few times that of
    ``data``. Raises ValueError, saying why.
    """
    try:
        with warnings.catch_warnings():  # pickletools decodes texts of opcodes that are refused here
            warnings.simplefilter("ignore", DeprecationWarning)
            marks = 0
            for count, (opcode, _, _) in enumerate(pickletools.genops(data)):
                marks += opcode.name == "MARK"
                if count > _MOST or marks > _MOST_MARKS:
                    raise ValueError(f"it has more than {_MOST:,} opcodes, or {_MOST_MARKS:,} marks")
                if opcode.name not in _OPCODES:
                    raise ValueError(f"it has the opcode {opcode.name}, which no pickle of plain values needs")
        value = _ArrayUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except _MISFITS as error:
        raise ValueError("its opcodes do not fit together") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} and no dict")  # noqa: TRY004  # damage, not a mistake
    return value


def _text(key: object) -> str:
    if not isinstance(key, str | bytes) or len(key) > _LONGEST:
        raise ValueError(f"it has a {type(key).__name__} where a short text should be")
    return key.decode("latin-1") if isinstance(key, bytes) else key
