"""Pickles of plain values, read without running anything: numbers, texts, lists, dicts, and arrays of uint8."""

import math
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PickledArray", "read_plain_pickle"]

_MOST = 1 << 22  # opcodes; CIFAR-100 has 300,000
_VALUES = frozenset([
    "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE",
    "SHORT_BINBYTES", "BINBYTES",
])  # fmt: skip
_LONGEST = 1000  # characters of a key or a name
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(frozen=True)
class _Global:
    """What a pickle calls by its name, "module name"; nothing is ever imported."""

    name: str


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


_NDARRAY = _Global("numpy ndarray")
_RECONSTRUCT = (
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
)  # until NumPy 2; from it on
_KNOWN = {known.name: known for known in (_NDARRAY, *map(_Global, (*_RECONSTRUCT, "numpy dtype", "_codecs encode")))}
_UINT8 = _Global("uint8")  # no such name can be in a pickle, which has two parts


def read_plain_pickle(data: bytes) -> dict[str, Any]:
    """The dict in ``data``, its keys as texts; bytes may come as text, too, one character per byte.

    Python's own unpickler calls what a file tells it to. Here pickletools takes the opcodes apart, those of plain
    values are carried out on a stack, and of names only the four are known by which NumPy describes an array. No
    opcode copies a value, and none is believed about sizes, so memory is a few times that of ``data``.
    Raises ValueError, saying why.
    """
    try:
        with warnings.catch_warnings():  # pickletools decodes texts of opcodes that are refused here
            warnings.simplefilter("ignore", DeprecationWarning)
            value = _run(data)
    except (IndexError, KeyError) as error:
        raise ValueError("its opcodes do not fit together") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} and no dict")  # noqa: TRY004  # damage, not a mistake
    return value


def _run(data: bytes) -> Any:  # noqa: PLR0912  # a case for each opcode
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}  # Python's own is an array as long as the largest number in the file
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count > _MOST:
            raise ValueError(f"it has more than {_MOST:,} opcodes")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND":
                _extend(stack, len(stack) - 1)
            case "APPENDS":
                _extend(stack, marks.pop())
            case "SETITEM":
                _set_items(stack, len(stack) - 2)
            case "SETITEMS":
                _set_items(stack, marks.pop())
            case "TUPLE":
                _join(stack, marks.pop())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                _join(stack, len(stack) - int(opcode.name[-1]))
            case "GLOBAL":
                stack.append(_known(argument))
            case "STACK_GLOBAL":
                _join(stack, len(stack) - 2)
                stack.append(_known(" ".join(map(_text, stack.pop()))))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_result(stack.pop(), arguments))
            case "BUILD":
                _fill(stack.pop(), stack[-1])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it has the opcode {name}, which no pickle of plain values needs")
    raise ValueError("it has no end")


def _taken(stack: list[Any], start: int) -> list[Any]:
    """What lies on the stack from ``start`` on, which is removed."""
    if not 0 <= start <= len(stack):
        raise IndexError
    items = stack[start:]
    del stack[start:]
    return items


def _join(stack: list[Any], start: int) -> None:
    stack.append(tuple(_taken(stack, start)))


def _extend(stack: list[Any], start: int) -> None:
    items = _taken(stack, start)
    if not isinstance(stack[-1], list):
        raise ValueError(f"it appends to a {type(stack[-1]).__name__}")  # noqa: TRY004
    stack[-1].extend(items)


def _set_items(stack: list[Any], start: int) -> None:
    items = _taken(stack, start)
    if not isinstance(stack[-1], dict):
        raise ValueError(f"it sets items of a {type(stack[-1]).__name__}")  # noqa: TRY004
    # Only texts are keys: the hash of nested tuples may take for ever.
    stack[-1].update(zip(map(_text, items[::2]), items[1::2], strict=True))


def _text(value: object) -> str:
    if not isinstance(value, str | bytes) or len(value) > _LONGEST:
        raise ValueError(f"it has a {type(value).__name__} where a short text should be")
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _known(name: str) -> _Global:
    """The same one each time: a file of references to long names must not become as many long names."""
    if name not in _KNOWN:
        raise ValueError(f"it calls {name[:100]!r}, which is never done")
    return _KNOWN[name]


def _result(called: object, arguments: object) -> Any:
    """What calling the name would give. Raises ValueError for all but bytes, dtype uint8, and an empty array."""
    if not isinstance(called, _Global):
        raise ValueError(f"it calls a {type(called).__name__}")  # noqa: TRY004
    match called.name, arguments:
        case "_codecs encode", (str(text), "latin1" | "latin-1"):  # bytes, as Python 3 writes them for Python 2
            return text
        case name, (first, *_) if name in _RECONSTRUCT and first == _NDARRAY:
            return PickledArray()
        case "numpy dtype", ("u1" | b"u1", *_):
            return _UINT8
        case "numpy dtype", (str(dtype) | bytes(dtype), *_):
            raise ValueError(f"it has an array of dtype {dtype[:20]!r}; only uint8 ('u1') is read")
    raise ValueError(f"it calls {called.name[:100]!r}, which is never done")


def _fill(state: object, target: object) -> None:
    """Give an array its values, which must be as many bytes as its shape says."""
    if target is _UINT8:
        return  # the state of a dtype of one byte says nothing
    match target, state:
        case PickledArray(), (int(), tuple(shape), dtype, bool(fortran), str(data) | bytes(data)) if dtype is _UINT8:
            if not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 8:
                raise ValueError("it has an array of an impossible shape")
            if math.prod(shape) != len(data):
                raise ValueError(f"its array has {len(data):,} bytes, and by its shape {math.prod(shape):,}")
            target.shape, target.fortran, target.content = shape, fortran, data
        case _:
            raise ValueError(f"it sets the state of a {type(target).__name__}")
