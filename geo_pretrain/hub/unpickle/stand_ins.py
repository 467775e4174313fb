"""What the machine builds: inert nodes, and the stand-ins for what pickles of tensors call."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geo_pretrain.hub.unpickle.names import Name, Refused, Unreadable, shown

if TYPE_CHECKING:
    from geo_pretrain.hub.unpickle.machine import Machine

CELLS = 1 << 48  # no honest tensor has more elements
SCALAR_CODES = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H"}
SCALAR_CODES |= {"u4": "I", "u8": "Q", "b1": "?", "?": "?"}


# --- the nodes -------------------------------------------------------------------------------------------------------


class Dict(dict):
    """A dict whose keys are texts, numbers or `Odd`; remembers the texts that were set twice."""

    __slots__ = ("repeated",)

    def __init__(self) -> None:
        super().__init__()
        self.repeated: set[str] = set()


class Odd:
    """A key that is neither text nor a small number: stands for itself, compares by identity."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


@dataclass(eq=False, frozen=True, slots=True)
class Foreign:
    """What came of something that is not on the list: swallows arguments, items and state."""

    what: str


@dataclass(eq=False, frozen=True, slots=True)
class Storage:
    """A stretch of numbers in the file; `start` counts elements within the record `key`."""

    key: str
    dtype: str
    count: int  # elements of the whole record
    start: int = 0
    length: int = 0  # elements of this view of it


@dataclass(eq=False, frozen=True, slots=True)
class Tensor:
    """A view of a storage as the file describes it; checked when it is wanted."""

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
    """What a value is, for people."""
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
    """A key of a dict, for people."""
    return shown(key) if isinstance(key, str) else key.kind if isinstance(key, Odd) else shown(repr(key))


def put(target: Dict, key: Any, value: Any) -> None:
    """Set an item. Keys that could be made to collide, or take long to compare, stand for themselves."""
    if isinstance(key, str):
        if key in target:
            target.repeated.add(key)
    elif not (key is None or isinstance(key, bool | bytes) or (isinstance(key, int) and abs(key) < 1 << 60)):
        key = Odd(kind(key))
    target[key] = value


# --- what pickles of tensors call -------------------------------------------------------------------------------------


def rebuild_tensor(_: Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | Foreign:
    """torch._utils._rebuild_tensor and _v2: (requires_grad, hooks, metadata) follow."""
    if len(rest) > 2 and rest[2]:
        return Foreign("a conjugated or negated view")
    return Tensor(storage, offset, size, stride, None)


def rebuild_tensor_v3(
    _: Machine, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor | Foreign:
    """Of a storage that is bytes and a dtype of its own."""
    if rest and rest[0]:
        return Foreign("a conjugated or negated view")
    return Tensor(storage, offset, size, stride, (dtype.dtype if isinstance(dtype, Name) else None) or kind(dtype))


def rebuild_from_type(machine: Machine, function: Any, cls: Any, arguments: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type and _v2: a tensor that had attributes, the `state` dropped here."""
    plain = isinstance(cls, Name) and cls.path in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if plain and isinstance(function, Name) and function.path.startswith("torch._utils._rebuild_"):
        return machine.call(function, arguments)
    return Foreign(f"a tensor of {kind(cls)}")


def ordered_dict(machine: Machine, *given: Any) -> Dict:
    """Python 2 gives its items as a list of pairs."""
    made = Dict()
    pairs = given[0] if given and isinstance(given[0], list | tuple) else ()
    machine.budget.spend(len(pairs))
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unreadable("an OrderedDict of the pickle has an item that is no pair")
        put(made, pair[0], pair[1])
    return made


def encode(machine: Machine, text: Any, encoding: Any = "utf-8") -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("its pickle calls a codec other than latin1")
    machine.budget.recode(len(text))
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise Unreadable("bytes of the pickle are not latin1") from error


def numpy_dtype(_: Machine, code: Any, *rest: Any) -> Dtype:
    """By pattern; objects, structures and texts keep their code and are of no use."""
    text = code if isinstance(code, str) else "?" if isinstance(code, Name) and code.path == "builtins.bool" else ""
    found = re.fullmatch(r"([<>|=]?)([fiub][1248]|\?)", text)
    if not found:
        return Dtype(shown(text, 20) or "unknown")
    return Dtype(found[2], ">" if found[1] == ">" else "<")


def numpy_scalar(_: Machine, dtype: Any, raw: Any = b"") -> Any:
    """The number that a numpy scalar is."""
    code = SCALAR_CODES.get(dtype.code) if isinstance(dtype, Dtype) else None
    data = raw.encode("latin-1", "replace") if isinstance(raw, str) and len(raw) <= 8 else raw
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(code):
        return Foreign("numpy scalar")
    return struct.unpack(dtype.order + code, data)[0]


def numpy_from_buffer(_: Machine, data: Any, dtype: Any, shape: Any, order: Any = "C") -> Array:
    """Protocol 5."""
    return Array(shape, dtype, data, order == "F")


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": ordered_dict,
    "collections.defaultdict": lambda _, *given: Dict(),
    "builtins.bytes": lambda _, *given: b"" if not given else Foreign("bytes"),
    "_codecs.encode": encode,
    "torch.Size": lambda _, size=(): size,
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda _, data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda _, data, *rest: data,
    "torch._utils._rebuild_qtensor": lambda _, *given: Foreign("quantized tensor"),
    "torch._utils._rebuild_sparse_tensor": lambda _, *given: Foreign("sparse tensor"),
    "torch._tensor._rebuild_from_type": rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "numpy.dtype": numpy_dtype,
    "numpy.core.multiarray._reconstruct": lambda _, *given: Array(),
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy.core.numeric._frombuffer": numpy_from_buffer,
}
