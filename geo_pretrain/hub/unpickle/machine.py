"""The machine: steps through the instructions of a pickle, within a budget."""

from __future__ import annotations

import codecs
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from geo_pretrain.hub.unpickle.names import (
    NAME_LENGTH,
    SHOWN,
    Name,
    Refused,
    Unreadable,
    is_forbidden,
    normalized,
    shown,
)
from geo_pretrain.hub.unpickle.stand_ins import BUILDERS, Array, Dict, Dtype, Foreign, kind, put


@dataclass
class Budget:
    """What one file may cost: instructions, and bytes that its texts are turned into."""

    operations: int
    recoded: int
    names: dict[str, None] = field(default_factory=dict)  # foreign
    forbidden: dict[str, None] = field(default_factory=dict)

    def spend(self, operations: int = 1) -> None:
        """Raises `Refused` when the file has used up its instructions."""
        self.operations -= operations
        if self.operations < 0:
            raise Refused("its pickle has more instructions than are accepted")

    def recode(self, size: int) -> None:
        """Raises `Refused` when more is made of the file's texts than the file can hold."""
        self.recoded -= size
        if self.recoded < 0:
            raise Refused("its pickle unfolds to far more than the file holds")

    def check_names(self) -> None:
        """Raises `Refused` naming what has no place in a file of weights."""
        if self.forbidden:
            names = list(self.forbidden)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            listed = ", ".join(names[:SHOWN]) + more
            raise Refused(f"it names {listed}, which have no place in a file of weights. Nothing of it was executed")


Persistent = Callable[[Any], Any]


class Machine:
    """Steps through one pickle in `data` from `at`; afterwards `at` is the byte behind it.

    `persistent` answers the file's persistent ids; None: it may have none. Raises `Refused` and `Unreadable` only.
    """

    def __init__(self, data: Any, at: int, end: int, budget: Budget, persistent: Persistent | None = None) -> None:
        self.data, self.at, self.end = data, at, end
        self.budget, self.persistent = budget, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}  # by index: a huge index is one entry, not an array

    def run(self) -> Any:
        """The value of the pickle."""
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
            self.budget.check_names()  # malice first: a broken pickle runs up to where it breaks
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
        found = self.take(stop - self.at)
        self.at += 1
        return found

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
        """POP takes a mark when that is what lies on top."""
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
        pairs, made = self.pop_mark(), Dict()
        self.set_items(pairs, made)
        self.push(made)

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
        found = Name(normalized(module, name))
        if not found.is_known:
            forbidden = is_forbidden(module, name)
            noted = self.budget.forbidden if forbidden else self.budget.names
            noted[shown(f"{module}.{name}")] = None
        return found

    def stacked_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.name(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(self.call(function, arguments))

    def reduce_with_keywords(self) -> None:
        self.pop()  # they go nowhere
        self.reduce()

    def instance(self) -> None:
        items = self.pop_mark()
        if not items:
            raise Unreadable("the pickle makes an object of no class")
        self.push(self.call(items[0], tuple(items[1:])))

    def call(self, function: Any, arguments: Any) -> Any:
        """A value for what the file wants called: a node built here, or a placeholder."""
        if not isinstance(function, Name):
            return Foreign(f"a call of {kind(function)}")
        build = BUILDERS.get(function.path)
        if build is None:
            return Foreign(f"object of {function.path}")
        if not isinstance(arguments, tuple):
            raise Unreadable(f"{function.path} is given {kind(arguments)} in place of arguments")
        try:
            return build(self, *arguments)
        except TypeError as error:  # the wrong number of arguments
            raise Unreadable(f"{function.path} is given {len(arguments)} arguments") from error

    def build(self, state: Any, target: Any) -> None:
        """State is data of arrays and dtypes; for everything else (an OrderedDict's `_metadata`) it is dropped."""
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
    """A text of the pickle."""
    try:
        return raw.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise Unreadable(f"a text of the pickle is not {encoding}") from error


def protocol(version: int) -> None:
    """Raises `Unreadable` for a pickle of a later Python."""
    if version > pickle.HIGHEST_PROTOCOL:
        raise Unreadable(f"a pickle of protocol {version}; up to {pickle.HIGHEST_PROTOCOL} are accepted")


def index(text: bytes) -> int:
    """A place in the memo, as protocol 0 writes it."""
    if not re.fullmatch(rb"\d{1,12}", text):
        raise Unreadable("the pickle remembers under an index that is no number")
    return int(text)


def steps() -> dict[int, Callable[[Machine], Any]]:
    """One function an instruction."""
    p, m = pickle, Machine
    table: dict[bytes, Callable[[Machine], Any]] = {
        p.PROTO: lambda s: protocol(s.take(1)[0]),
        p.FRAME: lambda s: s.take(8),
        p.MARK: lambda s: s.marks.append(len(s.stack)),
        p.POP: m.drop,
        p.POP_MARK: m.pop_mark,
        p.DUP: lambda s: s.push(s.top()),
        p.NONE: lambda s: s.push(None),
        p.NEWTRUE: lambda s: s.push(True),
        p.NEWFALSE: lambda s: s.push(False),
        p.INT: m.integer_line,
        p.LONG: m.integer_line,
        p.BININT: lambda s: s.push(s.number("<i")),
        p.BININT1: lambda s: s.push(s.number("<B")),
        p.BININT2: lambda s: s.push(s.number("<H")),
        p.LONG1: lambda s: s.long("<B"),
        p.LONG4: lambda s: s.long("<i"),
        p.FLOAT: m.float_line,
        p.BINFLOAT: lambda s: s.push(s.number(">d")),
        p.STRING: m.quoted_line,
        p.BINSTRING: lambda s: s.push(decoded(s.counted("<i"), "latin-1")),
        p.SHORT_BINSTRING: lambda s: s.push(decoded(s.counted("<B"), "latin-1")),
        p.BINBYTES: lambda s: s.push(s.counted("<I")),
        p.SHORT_BINBYTES: lambda s: s.push(s.counted("<B")),
        p.BINBYTES8: lambda s: s.push(s.counted("<Q")),
        p.BYTEARRAY8: lambda s: s.push(s.counted("<Q")),
        p.UNICODE: lambda s: s.push(decoded(s.line(), "raw-unicode-escape")),
        p.BINUNICODE: lambda s: s.push(decoded(s.counted("<I"), "utf-8")),
        p.SHORT_BINUNICODE: lambda s: s.push(decoded(s.counted("<B"), "utf-8")),
        p.BINUNICODE8: lambda s: s.push(decoded(s.counted("<Q"), "utf-8")),
        p.EMPTY_LIST: lambda s: s.push([]),
        p.EMPTY_TUPLE: lambda s: s.push(()),
        p.EMPTY_DICT: lambda s: s.push(Dict()),
        p.EMPTY_SET: lambda s: s.push(Foreign("set")),
        p.LIST: lambda s: s.push(s.pop_mark()),
        p.TUPLE: lambda s: s.push(tuple(s.pop_mark())),
        p.TUPLE1: lambda s: s.tuple_of(1),
        p.TUPLE2: lambda s: s.tuple_of(2),
        p.TUPLE3: lambda s: s.tuple_of(3),
        p.DICT: m.marked_dict,
        p.FROZENSET: m.marked_set,
        p.APPEND: lambda s: s.append([s.pop()], s.top()),
        p.APPENDS: lambda s: s.append(s.pop_mark(), s.top()),
        p.SETITEM: m.set_item,
        p.SETITEMS: lambda s: s.set_items(s.pop_mark(), s.top()),
        p.ADDITEMS: m.add_items,
        p.PUT: lambda s: s.remember(index(s.line(NAME_LENGTH))),
        p.BINPUT: lambda s: s.remember(s.number("<B")),
        p.LONG_BINPUT: lambda s: s.remember(s.number("<I")),
        p.MEMOIZE: lambda s: s.remember(len(s.memo)),
        p.GET: lambda s: s.recall(index(s.line(NAME_LENGTH))),
        p.BINGET: lambda s: s.recall(s.number("<B")),
        p.LONG_BINGET: lambda s: s.recall(s.number("<I")),
        p.GLOBAL: lambda s: s.push(s.name(s.text_line(), s.text_line())),
        p.STACK_GLOBAL: m.stacked_name,
        p.REDUCE: m.reduce,
        p.NEWOBJ: m.reduce,
        p.NEWOBJ_EX: m.reduce_with_keywords,
        p.OBJ: m.instance,
        p.INST: lambda s: s.push(s.call(s.name(s.text_line(), s.text_line()), tuple(s.pop_mark()))),
        p.BUILD: lambda s: s.build(s.pop(), s.top()),
        p.BINPERSID: lambda s: s.push(s.persist(s.pop())),
        p.PERSID: lambda s: s.push(s.persist(s.text_line())),
        p.EXT1: m.extension,
        p.EXT2: m.extension,
        p.EXT4: m.extension,
        p.NEXT_BUFFER: m.outside,
        p.READONLY_BUFFER: m.outside,
    }
    return {code[0]: step for code, step in table.items()}


STEPS = steps()
