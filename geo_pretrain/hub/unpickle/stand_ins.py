"""Stand-ins for the functions that pickles of tensors and arrays call: each builds an inert node from its arguments."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from geo_pretrain.hub.unpickle.budget import Budget
from geo_pretrain.hub.unpickle.names import Name, Refused, Unreadable, shown
from geo_pretrain.hub.unpickle.nodes import Array, Dict, Dtype, Foreign, Tensor, kind, put

SCALAR_CODES = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H"}
SCALAR_CODES |= {"u4": "I", "u8": "Q", "b1": "?", "?": "?"}


def call(function: Any, arguments: Any, budget: Budget, *, plain: bool = False) -> Any:
    """The node that stands in for the result of a call in the pickle, or a `Foreign` placeholder; nothing is called.

    A call of what is on no list of `names` is noted, for which the file is refused. `plain`: an object of a class that
    is made without a call, for which it is enough that the class may be named.
    """
    if not isinstance(function, Name) or not (plain or function.may_be_called):
        budget.forbid_call(function.path if isinstance(function, Name) else kind(function))
    if not isinstance(function, Name):
        return Foreign(f"a call of {kind(function)}")
    build = BUILDERS.get(function.path)
    if build is None:
        return Foreign(f"object of {function.path}")
    if not isinstance(arguments, tuple):
        raise Unreadable(f"{function.path} is given {kind(arguments)} in place of arguments")
    try:
        return build(budget, *arguments)
    except TypeError as error:  # the wrong number of arguments
        raise Unreadable(f"{function.path} is given {len(arguments)} arguments") from error


def rebuild_tensor(_: Budget, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | Foreign:
    """torch._utils._rebuild_tensor and _v2; `rest` is (requires_grad, hooks, metadata)."""
    if len(rest) > 2 and rest[2]:
        return Foreign("a conjugated or negated view")
    return Tensor(storage, offset, size, stride, None)


def rebuild_tensor_v3(
    _: Budget, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor | Foreign:
    """torch._utils._rebuild_tensor_v3: a storage of bytes, and the dtype as an argument."""
    if rest and rest[0]:
        return Foreign("a conjugated or negated view")
    return Tensor(storage, offset, size, stride, (dtype.dtype if isinstance(dtype, Name) else None) or kind(dtype))


def rebuild_from_type(budget: Budget, function: Any, cls: Any, arguments: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type and _v2: a tensor with attributes, which are dropped (`state`)."""
    plain = isinstance(cls, Name) and cls.path in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if plain and isinstance(function, Name) and function.path.startswith("torch._utils._rebuild_"):
        return call(function, arguments, budget)
    return Foreign(f"a tensor of {kind(cls)}")


def ordered_dict(budget: Budget, *given: Any) -> Dict:
    """collections.OrderedDict; Python 2 passes its items as a list of pairs."""
    items = Dict()
    pairs = given[0] if given and isinstance(given[0], list | tuple) else ()
    budget.spend(len(pairs))
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unreadable("an OrderedDict of the pickle has an item that is no pair")
        put(items, pair[0], pair[1])
    return items


def encode(budget: Budget, text: Any, encoding: Any = "utf-8") -> bytes:
    """_codecs.encode, with which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("its pickle calls a codec other than latin1")
    budget.recode(len(text))
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise Unreadable("bytes of the pickle are not latin1") from error


def numpy_dtype(_: Budget, code: Any, *rest: Any) -> Dtype:
    """numpy.dtype; dtypes other than plain numbers keep their code and are refused when wanted."""
    text = code if isinstance(code, str) else "?" if isinstance(code, Name) and code.path == "builtins.bool" else ""
    match = re.fullmatch(r"([<>|=]?)([fiub][1248]|\?)", text)
    if not match:
        return Dtype(shown(text, 20) or "unknown")
    return Dtype(match[2], ">" if match[1] == ">" else "<")


def numpy_scalar(_: Budget, dtype: Any, raw: Any = b"") -> Any:
    """numpy.core.multiarray.scalar: the number itself."""
    code = SCALAR_CODES.get(dtype.code) if isinstance(dtype, Dtype) else None
    data = raw.encode("latin-1", "replace") if isinstance(raw, str) and len(raw) <= 8 else raw
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(code):
        return Foreign("numpy scalar")
    return struct.unpack(dtype.order + code, data)[0]


def numpy_from_buffer(_: Budget, data: Any, dtype: Any, shape: Any, order: Any = "C") -> Array:
    """numpy.core.numeric._frombuffer, with which protocol 5 writes arrays."""
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
