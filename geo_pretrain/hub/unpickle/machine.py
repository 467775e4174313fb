"""An interpreter of pickle instructions that imports and calls nothing, within a budget."""

from __future__ import annotations

import codecs
import io
import pickle
import pickletools
from collections.abc import Callable, Sequence
from typing import Any

from geo_pretrain.hub.unpickle.budget import Budget
from geo_pretrain.hub.unpickle.names import NAME_LENGTH, Name, Refused, Unreadable, may_be_named, normalized, shown
from geo_pretrain.hub.unpickle.nodes import Array, Dict, Dtype, Foreign, kind, put
from geo_pretrain.hub.unpickle.stand_ins import call

LONGEST_INTEGER = 64  # bytes

Persistent = Callable[[Any], Any]


class Machine:
    """Interprets the pickles at the start of `data`, bytes or a memory map; `at` points behind the last one read.

    `persistent` resolves the file's persistent ids; None: the file may have none. Raises `Refused` and `Unreadable`
    only.
    """

    def __init__(self, data: Any, budget: Budget, persistent: Persistent | None = None) -> None:
        self.stream = io.BytesIO(data) if isinstance(data, bytes) else data  # a memory map is a stream
        self.at = 0
        self.budget, self.persistent = budget, persistent

    def run(self) -> Any:
        """Interpret the next pickle up to its STOP and return its value."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}  # by index: a huge index is one entry, not an array
        self.stream.seek(self.at)
        try:
            while (code := self.next_code()) != pickle.STOP[0]:
                self.budget.spend()
                if code in READERS:
                    STEPS[code](self, self.argument(code))
                else:
                    STEPS[code](self)
            value = self.pop()
            if self.stack or self.marks:
                raise Unreadable("its pickle ends with values left over")
        except (Unreadable, Refused):
            self.budget.check_names()  # outranks damage: Python would execute a broken pickle up to where it breaks
            raise
        self.at = self.stream.tell()
        return value

    # reading

    def next_code(self) -> int:
        """The byte of the next instruction."""
        code = self.stream.read(1)
        if not code:
            raise Unreadable("the pickle breaks off (a truncated file, or none of pickle)")
        if code != pickle.STOP and code[0] not in STEPS:
            raise Unreadable(f"byte {self.stream.tell() - 1} (0x{code[0]:02x}) is no pickle instruction")
        return code[0]

    def argument(self, code: int) -> Any:
        """The argument of an instruction, decoded by the standard library."""
        try:
            value = READERS[code](self.stream)
        except ValueError as error:
            text = str(error)
            if any(words in text for words in ("not enough data", "remain", "no newline", "sys.maxsize")):
                raise Unreadable("the pickle breaks off (a truncated file, or none of pickle)") from error
            raise Unreadable(f"an argument of the pickle is none ({shown(text)})") from error
        if isinstance(value, int) and value.bit_length() > 8 * LONGEST_INTEGER:
            raise Refused(f"its pickle holds an integer of {value.bit_length() // 8 + 1} bytes")
        return value

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
            noted = self.budget.names if may_be_named(module, name) else self.budget.forbidden
            noted[shown(f"{module}.{name}")] = None
        return reference

    def stacked_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.name(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(call(function, arguments, self.budget))

    def plain_object(self) -> None:
        """NEWOBJ: an object of a class, made without a call of it."""
        arguments, cls = self.pop(), self.pop()
        self.push(call(cls, arguments, self.budget, plain=True))

    def plain_object_with_keywords(self) -> None:
        self.pop()  # keyword arguments are dropped
        self.plain_object()

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

    def extension(self, code: int) -> None:
        raise Refused("its pickle uses the extension registry")

    def outside(self) -> None:
        raise Refused("its pickle refers to buffers outside itself")


def protocol(version: int) -> None:
    """Raises `Unreadable` for a pickle of a later Python."""
    if version > pickle.HIGHEST_PROTOCOL:
        raise Unreadable(f"a pickle of protocol {version}; up to {pickle.HIGHEST_PROTOCOL} are accepted")


def name_pair(stream: Any) -> tuple[str, str]:
    """The two lines after GLOBAL and INST; Python's own reader joins them."""
    lines: list[Any] = [pickletools.read_stringnl(stream, decode=False, stripquotes=False) for _ in range(2)]
    return lines[0].decode(), lines[1].decode()


def quoted_line(stream: Any) -> str:
    """The text after STRING; Python's own reader takes ASCII alone, Python 2 wrote arrays so."""
    return codecs.escape_decode(pickletools.read_stringnl(stream, decode=False))[0].decode("latin-1")


READERS: dict[int, Callable[[Any], Any]] = {
    ord(opcode.code): opcode.arg.reader for opcode in pickletools.opcodes if opcode.arg is not None
}
READERS |= {pickle.GLOBAL[0]: name_pair, pickle.INST[0]: name_pair, pickle.STRING[0]: quoted_line}

VALUES = (  # instructions that push their argument
    *(pickle.INT, pickle.LONG, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4),
    *(pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
)
INSTRUCTIONS: dict[bytes, Callable[..., Any]] = {
    **dict.fromkeys(VALUES, lambda s, value: s.push(value)),
    pickle.BYTEARRAY8: lambda s, raw: s.push(bytes(raw)),
    pickle.PROTO: lambda s, version: protocol(version),
    pickle.FRAME: lambda s, size: None,
    pickle.MARK: lambda s: s.marks.append(len(s.stack)),
    pickle.POP: Machine.drop,
    pickle.POP_MARK: Machine.pop_mark,
    pickle.DUP: lambda s: s.push(s.top()),
    pickle.NONE: lambda s: s.push(None),
    pickle.NEWTRUE: lambda s: s.push(True),
    pickle.NEWFALSE: lambda s: s.push(False),
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
    **dict.fromkeys((pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT), Machine.remember),
    pickle.MEMOIZE: lambda s: s.remember(len(s.memo)),
    **dict.fromkeys((pickle.GET, pickle.BINGET, pickle.LONG_BINGET), Machine.recall),
    pickle.GLOBAL: lambda s, pair: s.push(s.name(*pair)),
    pickle.STACK_GLOBAL: Machine.stacked_name,
    pickle.REDUCE: Machine.reduce,
    pickle.NEWOBJ: Machine.plain_object,
    pickle.NEWOBJ_EX: Machine.plain_object_with_keywords,
    pickle.OBJ: Machine.instance,
    pickle.INST: lambda s, pair: s.push(call(s.name(*pair), tuple(s.pop_mark()), s.budget)),
    pickle.BUILD: lambda s: s.build(s.pop(), s.top()),
    pickle.BINPERSID: lambda s: s.push(s.persist(s.pop())),
    pickle.PERSID: lambda s, text: s.push(s.persist(text)),
    **dict.fromkeys((pickle.EXT1, pickle.EXT2, pickle.EXT4), Machine.extension),
    pickle.NEXT_BUFFER: Machine.outside,
    pickle.READONLY_BUFFER: Machine.outside,
}
STEPS = {code[0]: step for code, step in INSTRUCTIONS.items()}  # by the byte that starts the instruction
