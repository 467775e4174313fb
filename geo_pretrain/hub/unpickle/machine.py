"""An interpreter of pickle instructions that imports and calls nothing, within a budget."""

from __future__ import annotations

import codecs
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

from geo_pretrain.hub.unpickle.budget import Budget
from geo_pretrain.hub.unpickle.names import NAME_LENGTH, Name, Refused, Unreadable, is_forbidden, normalized, shown
from geo_pretrain.hub.unpickle.nodes import Array, Dict, Dtype, Foreign, kind, put
from geo_pretrain.hub.unpickle.stand_ins import call

Persistent = Callable[[Any], Any]


class Machine:
    """Interprets one pickle in `data` from byte `at`; afterwards `at` points behind the pickle.

    `persistent` resolves the file's persistent ids; None: the file may have none. Raises `Refused` and `Unreadable`
    only.
    """

    def __init__(self, data: Any, at: int, end: int, budget: Budget, persistent: Persistent | None = None) -> None:
        self.data, self.at, self.end = data, at, end
        self.budget, self.persistent = budget, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}  # by index: a huge index is one entry, not an array

    def run(self) -> Any:
        """Interpret the pickle up to its STOP and return its value."""
        try:
            while (code := self.take(1)[0]) != pickle.STOP[0]:
                self.budget.spend()
                step = STEPS.get(code)
                if step is None:
                    raise Unreadable(f"byte {self.at - 1} (0x{code:02x}) is no pickle instruction")
                step(self)
            value = self.pop()
            if self.stack or self.marks:
                raise Unreadable("its pickle ends with values left over")
        except (Unreadable, Refused):
            self.budget.check_names()  # outranks damage: Python would execute a broken pickle up to where it breaks
            raise
        return value

    # reading

    def take(self, count: int) -> bytes:
        """The next `count` bytes; a count beyond the end is an error before anything is allocated."""
        if count > self.end - self.at:
            raise Unreadable("the pickle breaks off (a truncated file, or none of pickle)")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def counted(self, form: str) -> bytes:
        count = self.number(form)
        if count < 0:
            raise Unreadable("a negative length in the pickle")
        return self.take(count)

    def line(self, limit: int | None = None) -> bytes:
        stop = self.data.find(b"\n", self.at, self.end if limit is None else min(self.end, self.at + limit))
        if stop < 0:
            raise Unreadable("a line of the pickle does not end")
        text = self.take(stop - self.at)
        self.at += 1
        return text

    def text_line(self) -> str:
        return decoded(self.line(4 * NAME_LENGTH), "utf-8")

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Unreadable("the pickle takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise Unreadable("the pickle looks for a mark that it never set")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def drop(self) -> None:
        """POP: removes the top value, or the mark if that is on top."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Unreadable("the pickle recalls what it never remembered")
        self.push(self.memo[index])

    # numbers and texts

    def integer_line(self) -> None:
        text = self.line(NAME_LENGTH).rstrip(b"L")
        if text in (b"00", b"01"):
            self.push(text == b"01")
        elif re.fullmatch(rb"\s*[+-]?\d+\s*", text):
            self.push(int(text))
        else:
            raise Unreadable("a number of the pickle is none")

    def float_line(self) -> None:
        try:
            self.push(float(self.line(NAME_LENGTH)))
        except ValueError as error:
            raise Unreadable("a number of the pickle is none") from error

    def long(self, form: str) -> None:
        count = self.number(form)
        if not 0 <= count <= 64:
            raise Refused(f"its pickle holds an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def quoted_line(self) -> None:
        text = self.line()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            raise Unreadable("a text of the pickle has no quotes")
        try:
            raw = codecs.escape_decode(text[1:-1])[0]  # what pickle itself uses
        except ValueError as error:
            raise Unreadable("a text of the pickle is not one") from error
        self.push(decoded(raw, "latin-1"))

    # containers

    def set_items(self, pairs: Sequence[Any], target: Any) -> None:
        if len(pairs) % 2:
            raise Unreadable("the pickle sets a key without a value")
        if isinstance(target, Dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                put(target, key, value)
        elif not isinstance(target, Foreign):
            raise Unreadable(f"the pickle sets items of {kind(target)}")

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value], self.top())

    def marked_dict(self) -> None:
        pairs, items = self.pop_mark(), Dict()
        self.set_items(pairs, items)
        self.push(items)

    def marked_set(self) -> None:
        self.pop_mark()
        self.push(Foreign("set"))

    def append(self, items: Sequence[Any], target: Any) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Foreign):
            raise Unreadable(f"the pickle appends to {kind(target)}")

    def add_items(self) -> None:
        self.pop_mark()
        if not isinstance(self.top(), Foreign):
            raise Unreadable("the pickle adds to what is no set")

    # names, calls, state

    def name(self, module: Any, name: Any) -> Any:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("its pickle computes the name of a class")
        if len(module) > NAME_LENGTH or len(name) > NAME_LENGTH:
            raise Refused("its pickle names a class of more than 200 letters")
        reference = Name(normalized(module, name))
        if not reference.is_known:
            forbidden = is_forbidden(module, name)
            noted = self.budget.forbidden if forbidden else self.budget.names
            noted[shown(f"{module}.{name}")] = None
        return reference

    def stacked_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.name(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(call(function, arguments, self.budget))

    def reduce_with_keywords(self) -> None:
        self.pop()  # keyword arguments are dropped
        self.reduce()

    def instance(self) -> None:
        items = self.pop_mark()
        if not items:
            raise Unreadable("the pickle makes an object of no class")
        self.push(call(items[0], tuple(items[1:]), self.budget))

    def build(self, state: Any, target: Any) -> None:
        """BUILD: sets the state of an array or dtype; any other state (an OrderedDict's `_metadata`) is dropped."""
        if isinstance(target, Dtype):
            if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
                target.order = state[1]
        elif isinstance(target, Array):
            if target.shape is not None:
                raise Refused("its pickle sets the state of an array twice")
            if not isinstance(state, tuple) or len(state) not in (4, 5):
                raise Unreadable("the state of a numpy array is not one")
            target.shape, target.dtype, fortran, target.data = state[-4:]
            target.fortran = bool(fortran) if isinstance(fortran, int) else False

    def persist(self, given: Any) -> Any:
        if self.persistent is None:
            raise Refused("its pickle refers to data outside itself")
        return self.persistent(given)

    def extension(self) -> None:
        raise Refused("its pickle uses the extension registry")

    def outside(self) -> None:
        raise Refused("its pickle refers to buffers outside itself")


def decoded(raw: bytes, encoding: str) -> str:
    """Decode a text of the pickle."""
    try:
        return raw.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise Unreadable(f"a text of the pickle is not {encoding}") from error


def protocol(version: int) -> None:
    """Raises `Unreadable` for a pickle of a later Python."""
    if version > pickle.HIGHEST_PROTOCOL:
        raise Unreadable(f"a pickle of protocol {version}; up to {pickle.HIGHEST_PROTOCOL} are accepted")


def index(text: bytes) -> int:
    """Parse a memo index as protocol 0 writes it, in decimal."""
    if not re.fullmatch(rb"\d{1,12}", text):
        raise Unreadable("the pickle remembers under an index that is no number")
    return int(text)


INSTRUCTIONS: dict[bytes, Callable[[Machine], Any]] = {
    pickle.PROTO: lambda s: protocol(s.take(1)[0]),
    pickle.FRAME: lambda s: s.take(8),
    pickle.MARK: lambda s: s.marks.append(len(s.stack)),
    pickle.POP: Machine.drop,
    pickle.POP_MARK: Machine.pop_mark,
    pickle.DUP: lambda s: s.push(s.top()),
    pickle.NONE: lambda s: s.push(None),
    pickle.NEWTRUE: lambda s: s.push(True),
    pickle.NEWFALSE: lambda s: s.push(False),
    pickle.INT: Machine.integer_line,
    pickle.LONG: Machine.integer_line,
    pickle.BININT: lambda s: s.push(s.number("<i")),
    pickle.BININT1: lambda s: s.push(s.number("<B")),
    pickle.BININT2: lambda s: s.push(s.number("<H")),
    pickle.LONG1: lambda s: s.long("<B"),
    pickle.LONG4: lambda s: s.long("<i"),
    pickle.FLOAT: Machine.float_line,
    pickle.BINFLOAT: lambda s: s.push(s.number(">d")),
    pickle.STRING: Machine.quoted_line,
    pickle.BINSTRING: lambda s: s.push(decoded(s.counted("<i"), "latin-1")),
    pickle.SHORT_BINSTRING: lambda s: s.push(decoded(s.counted("<B"), "latin-1")),
    pickle.BINBYTES: lambda s: s.push(s.counted("<I")),
    pickle.SHORT_BINBYTES: lambda s: s.push(s.counted("<B")),
    pickle.BINBYTES8: lambda s: s.push(s.counted("<Q")),
    pickle.BYTEARRAY8: lambda s: s.push(s.counted("<Q")),
    pickle.UNICODE: lambda s: s.push(decoded(s.line(), "raw-unicode-escape")),
    pickle.BINUNICODE: lambda s: s.push(decoded(s.counted("<I"), "utf-8")),
    pickle.SHORT_BINUNICODE: lambda s: s.push(decoded(s.counted("<B"), "utf-8")),
    pickle.BINUNICODE8: lambda s: s.push(decoded(s.counted("<Q"), "utf-8")),
    pickle.EMPTY_LIST: lambda s: s.push([]),
    pickle.EMPTY_TUPLE: lambda s: s.push(()),
    pickle.EMPTY_DICT: lambda s: s.push(Dict()),
    pickle.EMPTY_SET: lambda s: s.push(Foreign("set")),
    pickle.LIST: lambda s: s.push(s.pop_mark()),
    pickle.TUPLE: lambda s: s.push(tuple(s.pop_mark())),
    pickle.TUPLE1: lambda s: s.tuple_of(1),
    pickle.TUPLE2: lambda s: s.tuple_of(2),
    pickle.TUPLE3: lambda s: s.tuple_of(3),
    pickle.DICT: Machine.marked_dict,
    pickle.FROZENSET: Machine.marked_set,
    pickle.APPEND: lambda s: s.append([s.pop()], s.top()),
    pickle.APPENDS: lambda s: s.append(s.pop_mark(), s.top()),
    pickle.SETITEM: Machine.set_item,
    pickle.SETITEMS: lambda s: s.set_items(s.pop_mark(), s.top()),
    pickle.ADDITEMS: Machine.add_items,
    pickle.PUT: lambda s: s.remember(index(s.line(NAME_LENGTH))),
    pickle.BINPUT: lambda s: s.remember(s.number("<B")),
    pickle.LONG_BINPUT: lambda s: s.remember(s.number("<I")),
    pickle.MEMOIZE: lambda s: s.remember(len(s.memo)),
    pickle.GET: lambda s: s.recall(index(s.line(NAME_LENGTH))),
    pickle.BINGET: lambda s: s.recall(s.number("<B")),
    pickle.LONG_BINGET: lambda s: s.recall(s.number("<I")),
    pickle.GLOBAL: lambda s: s.push(s.name(s.text_line(), s.text_line())),
    pickle.STACK_GLOBAL: Machine.stacked_name,
    pickle.REDUCE: Machine.reduce,
    pickle.NEWOBJ: Machine.reduce,
    pickle.NEWOBJ_EX: Machine.reduce_with_keywords,
    pickle.OBJ: Machine.instance,
    pickle.INST: lambda s: s.push(call(s.name(s.text_line(), s.text_line()), tuple(s.pop_mark()), s.budget)),
    pickle.BUILD: lambda s: s.build(s.pop(), s.top()),
    pickle.BINPERSID: lambda s: s.push(s.persist(s.pop())),
    pickle.PERSID: lambda s: s.push(s.persist(s.text_line())),
    pickle.EXT1: Machine.extension,
    pickle.EXT2: Machine.extension,
    pickle.EXT4: Machine.extension,
    pickle.NEXT_BUFFER: Machine.outside,
    pickle.READONLY_BUFFER: Machine.outside,
}
STEPS = {code[0]: step for code, step in INSTRUCTIONS.items()}  # by the byte that starts the instruction
