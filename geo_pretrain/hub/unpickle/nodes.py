"""The inert values a pickle is read into: containers, descriptions of tensors and arrays, and placeholders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from geo_pretrain.hub.unpickle.names import Name, shown

CELLS = 1 << 48  # no honest tensor has more elements


class Dict(dict):
    """A dict with texts, numbers or `Odd` as keys, which remembers texts that were set twice."""

    __slots__ = ("repeated",)

    def __init__(self) -> None:
        super().__init__()
        self.repeated: set[str] = set()


class Odd:
    """Replaces a dict key that is neither text nor a small number; compares by identity."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


@dataclass(eq=False, frozen=True, slots=True)
class Foreign:
    """Placeholder for an object without a stand-in; it ignores arguments, items and state."""

    what: str


@dataclass(eq=False, frozen=True, slots=True)
class Storage:
    """A tensor storage, or a view of one: `length` elements of the record `key` from element `start`."""

    key: str
    dtype: str
    count: int  # elements of the whole record
    start: int = 0
    length: int = 0


@dataclass(eq=False, frozen=True, slots=True)
class Tensor:
    """A tensor as the file describes it, unchecked: a strided view of a storage."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: str | None


@dataclass(eq=False, slots=True)
class Dtype:
    """A numpy dtype: letter and width such as "f4", and "<" or ">"."""

    code: str
    order: str = "<"


@dataclass(eq=False, slots=True)
class Array:
    """A numpy array; empty until its state is set, once."""

    shape: Any = None
    dtype: Any = None
    data: Any = None
    fortran: bool = False


def kind(value: object) -> str:
    """Describe a value in an error message."""
    if isinstance(value, Foreign):
        return shown(value.what)
    if isinstance(value, Name):
        return shown(f"the name {value.path}")
    if isinstance(value, dict):
        return f"dict of {len(value)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    names = {str: "text", bytes: "bytes", type(None): "None", Array: "numpy array", Dtype: "numpy dtype"}
    return names.get(type(value), type(value).__name__.lower())


def shown_key(key: object) -> str:
    """Show a dict key in an error message."""
    return shown(key) if isinstance(key, str) else key.kind if isinstance(key, Odd) else shown(repr(key))


def put(target: Dict, key: Any, value: Any) -> None:
    """Set an item of a dict; a key made to collide or to be slow to compare is replaced by an `Odd`."""
    if isinstance(key, str):
        if key in target:
            target.repeated.add(key)
    elif not (key is None or isinstance(key, bool | bytes) or (isinstance(key, int) and abs(key) < 1 << 60)):
        key = Odd(kind(key))
    target[key] = value
