"""The child process that reads somebody else's pickled file and writes the tensors of one entry as safetensors.

Run by `hub.extract` with a JSON job on standard input; standalone: standard library, and numpy for strided tensors.
Python's own unpickler is not used. `Machine` steps through the instructions itself and can build nothing but
containers, numbers, texts and the inert nodes below: there is no instruction here that imports, calls or sets an
attribute, so a file that asks for it gets a `Foreign` node or is refused, and never what it asked for. Values are
looked at lazily and never walked, compared or hashed as a whole: depth, sharing and cycles cost nothing.

Formats: torch >= 1.6 (zip), torch < 1.6 ("legacy"), plain pickles holding numpy arrays. Layouts as written by
torch/serialization.py, numpy's `__reduce__` and the opcodes of pickletools.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import mmap
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
ACCEPTED = "files of torch.save and pickles of numpy arrays"
BLOCK = 8 << 20  # bytes copied at a time
RANK, CELLS = 32, 1 << 48  # numpy's (1.x) limit of dimensions; no honest tensor has more elements
KEY_LENGTH, NAME_LENGTH, SHOWN = 512, 200, 30
SCALARS, SKIPPED, NAMES = 100, 1000, 100  # how many the report lists

WRITABLE = {  # our name of a dtype -> (safetensors' name, bytes, numpy's name; bfloat16 travels as bits)
    "float16": ("F16", 2, "f2"),
    "bfloat16": ("BF16", 2, "u2"),
    "float32": ("F32", 4, "f4"),
    "float64": ("F64", 8, "f8"),
    "int8": ("I8", 1, "i1"),
    "int16": ("I16", 2, "i2"),
    "int32": ("I32", 4, "i4"),
    "int64": ("I64", 8, "i8"),
    "uint8": ("U8", 1, "u1"),
    "bool": ("BOOL", 1, "b1"),
}
# Others are named so that their storages can be stepped over: bytes of an element.
ITEM = {name: size for name, (_, size, _) in WRITABLE.items()}
ITEM |= {"complex32": 4, "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8, "qint32": 4}
ITEM |= dict.fromkeys(("qint8", "quint8", "quint4x2", "quint2x4", "float8_e4m3fn", "float8_e5m2"), 1)
ALIASES = {"half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32"}
ALIASES |= {"long": "int64", "char": "int8", "byte": "uint8", "untyped": "uint8"}
ALIASES |= {"complexfloat": "complex64", "complexdouble": "complex128"}
NUMPY_DTYPES = {"f2": "float16", "f4": "float32", "f8": "float64", "i1": "int8", "i2": "int16", "i4": "int32"}
NUMPY_DTYPES |= {"i8": "int64", "u1": "uint8", "b1": "bool", "?": "bool"}
SCALAR_CODES = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H"}
SCALAR_CODES |= {"u4": "I", "u8": "Q", "b1": "?", "?": "?"}


class Refused(Exception):
    """The file asks for more than tensors, or for more than its limits."""


class Unreadable(Exception):
    """The file is damaged, of another format, or does not hold what is wanted."""


# --- what a pickle may name ------------------------------------------------------------------------------------------

# Modules that have no place among weights. Nothing is ever imported or called: naming one is reason to refuse the file.
FORBIDDEN_MODULES = frozenset(
    """
    _aix_support _frozen_importlib _frozen_importlib_external _imp _io _osx_support _pickle _posixsubprocess
    _socket _thread _winapi aifc antigravity ast asyncio asyncore atexit bdb builtins cgi cmd code codecs _codecs codeop
    commands compileall concurrent copyreg cPickle cProfile ctypes _ctypes cffi curses dbm dill cloudpickle dis
    distutils doctest ensurepip faulthandler fcntl fileinput ftplib functools gc glob http idlelib imaplib imp importlib
    inspect io ipykernel IPython joblib lib2to3 linecache mailcap marshal mmap modulefinder msvcrt multiprocessing
    netrc nntplib nt ntpath operator _operator optparse os pdb pexpect pickle pickletools pip pkg_resources pkgutil
    platform poplib posix posixpath profile pstats psutil pty py_compile pydoc requests resource rlcompleter runpy
    sched select selectors setuptools shelve shlex shutil signal site smtpd smtplib socket _socket socketserver sqlite3
    ssl subprocess symtable sys sysconfig tarfile telnetlib tempfile threading timeit trace traceback tracemalloc
    tty types unittest urllib urllib2 urllib3 uu venv webbrowser winreg _winreg xmlrpc zipapp zipfile zipimport
    """.split()  # noqa: SIM905
)
FORBIDDEN_PARTS = frozenset(
    """
    torch.hub torch.load torch.save torch.jit torch.serialization torch.package torch.ops torch.classes torch.library
    torch.multiprocessing torch.distributed.rpc torch.compile torch._dynamo torch._inductor torch.utils.cpp_extension
    torch.utils.collect_env torch.utils.model_zoo numpy.load numpy.save numpy.fromfile numpy.memmap numpy.loadtxt
    numpy.genfromtxt numpy.distutils numpy.f2py numpy.testing numpy.lib numpy.ctypeslib logging.config
    pandas.read_pickle yaml.load
    """.split()  # noqa: SIM905
)
# Names within those modules that ordinary pickles use; each is a stand-in here. "__builtin__" and "copy_reg" are
# Python 2's spelling of the same.
INERT = frozenset(
    """
    builtins.object builtins.int builtins.float builtins.str builtins.bool builtins.bytes builtins.bytearray
    builtins.list builtins.dict builtins.tuple builtins.set builtins.frozenset builtins.complex builtins.slice
    builtins.range builtins.type builtins.NoneType builtins.Ellipsis builtins.NotImplemented builtins.long
    builtins.unicode builtins.basestring builtins.xrange collections.OrderedDict collections.defaultdict
    collections.Counter copyreg._reconstructor copyreg.__newobj__ _codecs.encode torch.Size torch.device torch.Tensor
    torch.nn.parameter.Parameter torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2
    torch._utils._rebuild_tensor_v3 torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state
    torch._tensor._rebuild_from_type torch._tensor._rebuild_from_type_v2 torch._utils._rebuild_qtensor
    torch._utils._rebuild_sparse_tensor torch.serialization._get_layout numpy.ndarray numpy.dtype
    numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy.core.numeric._frombuffer
    """.split()  # noqa: SIM905
)
STORAGE_NAME = re.compile(r"torch\.(?:cuda\.|storage\.)?_?([A-Z][A-Za-z0-9]*?)Storage")
DTYPE_NAME = re.compile(r"torch\.([a-z][a-z0-9_]*)")
NUMPY_TYPE_NAME = re.compile(r"numpy\.(?:(?:float|int|uint|complex)(?:\d+|_)|bool_?|str_|bytes_|dtypes\.\w+DType)")


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the file names, never looked up."""

    path: str  # "module.name", Python 2's and numpy 2's modules under their common names

    @property
    def storage(self) -> str | None:
        """The dtype of a storage class."""
        found = STORAGE_NAME.fullmatch(self.path)
        name = found[1].lower() if found else ""
        name = ALIASES.get(name, name)
        return name if name in ITEM else None

    @property
    def dtype(self) -> str | None:
        """The dtype that `torch.<name>` is."""
        found = DTYPE_NAME.fullmatch(self.path)
        name = ALIASES.get(found[1], found[1]) if found else None
        return name if name in ITEM else None

    @property
    def is_known(self) -> bool:
        """Whether there is a stand-in for it."""
        return bool(self.path in INERT or self.storage or self.dtype or NUMPY_TYPE_NAME.fullmatch(self.path))


def normalised(module: str, name: str) -> str:
    """One spelling for a name that pickles of several Pythons and numpys spell differently."""
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if module.startswith("numpy._core."):
        module = "numpy.core." + module.removeprefix("numpy._core.")
    return f"{module}.{name}"


def is_forbidden(module: str, name: str) -> bool:
    """Whether a name that has no stand-in is reason enough to refuse the file."""
    parts = normalised(module, name).split(".")
    if parts[0] in FORBIDDEN_MODULES:
        return True
    if any(".".join(parts[:length]) in FORBIDDEN_PARTS for length in range(2, len(parts) + 1)):
        return True
    # "pathlib" + "os.system": a way through an attribute of a harmless module
    steps = name.split(".")
    return len(steps) > 1 and any(step in FORBIDDEN_MODULES or step.startswith("__") for step in steps)


def shown(text: str, limit: int = NAME_LENGTH) -> str:
    """Text from the file as it may stand in a message: printable ASCII, not endless."""
    clean = re.sub(r"[^\x20-\x7e]", "?", text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


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


# --- the machine -----------------------------------------------------------------------------------------------------


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
        found = Name(normalised(module, name))
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


def put(target: Dict, key: Any, value: Any) -> None:
    """Set an item. Keys that could be made to collide, or take long to compare, stand for themselves."""
    if isinstance(key, str):
        if key in target:
            target.repeated.add(key)
    elif not (key is None or isinstance(key, bool | bytes) or (isinstance(key, int) and abs(key) < 1 << 60)):
        key = Odd(kind(key))
    target[key] = value


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


# --- stand-ins for what pickles of tensors call ----------------------------------------------------------------------


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


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """A file whose pickle has been read: its top-level value, and where its storages lie."""

    top: Any
    records: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # key -> (start, bytes, crc or 0)


def read_file(data: Any, budget: Budget, limits: Mapping[str, Any]) -> Opened:
    """Find out what the file is, and read its pickle. `data` is a memory map or bytes."""
    head = data[:512]
    if head[:4] == b"PK\x03\x04":
        return read_zip(data, budget, limits)
    if what := other_format(head):
        raise Unreadable(f"it is {what}; accepted are {ACCEPTED}")
    if head[:1] not in (b"\x80", b"(", b"}", b"]", b"c"):  # protocol 2 and later, or a container of protocol 0 or 1
        raise Unreadable(f"it is no pickle; accepted are {ACCEPTED}")
    machine = Machine(data, 0, len(data), budget)
    top = machine.run()
    if type(top) is int and top == LEGACY_MAGIC:
        return read_legacy(data, machine.at, budget)
    nothing_after(machine.at, data)
    return Opened(top)


def other_format(head: bytes) -> str | None:
    """The name of a format that is neither."""
    if not head:
        return "empty"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not the file behind it (a login, quota or confirmation page)"
    if text.startswith((b"{", b"version https://git-lfs")):
        return "text (JSON or a Git LFS pointer)"
    if head[257:262] == b"ustar":
        return "a tar archive (torch before 0.2 wrote such files; save it again with a newer torch)"
    if len(head) > 8 and head[8:10] in (b'{"', b"{ ", b"{}") and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file already; it needs no extraction"
    magics = {
        b"\x1f\x8b": "compressed with gzip; unpack it first",
        b"BZh": "compressed with bzip2; unpack it first",
        b"\xfd7zXZ": "compressed with xz; unpack it first",
        b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
        b"7z\xbc\xaf": "a 7z archive; unpack it first",
        b"Rar!": "a RAR archive; unpack it first",
        b"PK": "an empty or damaged zip archive",
        b"\x89HDF": "an HDF5 file",
        b"\x93NUMPY": "a numpy .npy file",
        b"\x7fELF": "a program",
        b"MZ": "a program",
    }
    return next((what for magic, what in magics.items() if head.startswith(magic)), None)


def nothing_after(at: int, data: Any) -> None:
    """Raises `Refused` when a file goes on behind its end."""
    if at != len(data):
        raise Refused(f"{len(data) - at} bytes follow its end")


def read_legacy(data: Any, at: int, budget: Budget) -> Opened:
    """torch < 1.6: behind the magic number protocol, system, object and storage keys as pickles; then raw storages."""
    declared: dict[str, Storage] = {}

    def persistent(given: Any) -> Any:
        if isinstance(given, tuple) and len(given) == 4 and given[0] == "module":
            return given[1]
        if not isinstance(given, tuple) or len(given) != 6:
            raise Refused("its pickle refers to data in a way torch does not")
        whole = storage_of(given[:5])
        known = declared.setdefault(whole.key, whole)
        if (known.dtype, known.count) != (whole.dtype, whole.count):
            raise Unreadable(f"storage {shown(whole.key)} is declared in two ways")
        return view_of(whole, given[5])

    def following(answers: Persistent | None = None) -> Any:
        nonlocal at
        machine = Machine(data, at, len(data), budget, answers)
        value = machine.run()
        at = machine.at
        return value

    if following() != LEGACY_PROTOCOL:
        raise Unreadable("it is of a protocol that torch < 1.6 did not write")
    system = following()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Unreadable("it was written on a big-endian machine; save it again on a little-endian one")
    top, keys = following(persistent), following()
    budget.check_names()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise Unreadable("its list of storages is none")
    records = {}
    for key in keys:
        if key not in declared:
            raise Unreadable(f"storage {shown(key)} belongs to no tensor")
        if len(data) - at < 8:
            raise Unreadable("it breaks off among its storages; download it again")
        (count,) = struct.unpack("<q", data[at : at + 8])
        size = declared[key].count * ITEM[declared[key].dtype]
        if count != declared[key].count:
            raise Unreadable(f"storage {shown(key)} has {count} elements, {declared[key].count} are declared")
        if size > len(data) - at - 8:
            raise Unreadable("it breaks off among its storages; download it again")
        records[key] = (at + 8, size, 0)
        at += 8 + size
    nothing_after(at, data)
    return Opened(top, records)


def storage_of(given: tuple[Any, ...]) -> Storage:
    """torch's persistent id: ("storage", type, key, location, elements)."""
    tag, cls, key, _, count = given
    dtype = cls.storage if isinstance(cls, Name) else None
    if tag != "storage" or not isinstance(key, str) or len(key) > NAME_LENGTH or type(count) is not int:
        raise Refused("its pickle refers to data in a way torch does not")
    if dtype is None:
        raise Unreadable(f"it has a storage of {kind(cls)}")
    if not 0 <= count <= CELLS:
        raise Refused(f"it declares a storage of {count} elements")
    return Storage(key, dtype, count, 0, count)


def view_of(whole: Storage, view: Any) -> Storage:
    """torch < 0.4 kept views of storages: (key, offset, elements)."""
    if view is None:
        return whole
    if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or type(view[2]) is not int:
        raise Refused("its pickle refers to data in a way torch does not")
    start, length = view[1:]
    if start < 0 or length < 0 or start + length > whole.count:
        raise Refused("it has a view beyond the end of its storage")
    return Storage(whole.key, whole.dtype, whole.count, start, length)


def read_zip(data: Any, budget: Budget, limits: Mapping[str, Any]) -> Opened:
    """torch >= 1.6: <name>/data.pkl and one uncompressed record <name>/data/<key> a storage."""
    tail = data[-22:]
    if tail[:4] != b"PK\x05\x06" or tail[20:] != b"\0\0":
        if data.rfind(b"PK\x05\x06", max(0, len(data) - (1 << 17))) < 0:
            raise Unreadable("it is a zip archive without its end: a truncated download; fetch it again")
        raise Refused("bytes follow the end of its zip archive")
    infos = listing(data, limits)
    pickles = [name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in infos):
        raise Unreadable("it is a TorchScript archive, a program (torch.jit.save); accepted are files of torch.save")
    if len(pickles) != 1:
        names = ", ".join(shown(name, 40) for name in list(infos)[:5])
        raise Unreadable(
            f"it is a zip archive with {len(pickles)} data.pkl, not a file of torch.save; it holds {names}"
        )
    folder = pickles[0].removesuffix("data.pkl")
    records = {}
    for name, info in infos.items():
        if name in (pickles[0], f"{folder}byteorder") or name.startswith(f"{folder}data/"):
            records[name.removeprefix(folder)] = record(data, name, info)
    disjoint(records.values())
    start, size, _ = records.get("byteorder", (0, 0, 0))
    if data[start : start + min(size, 16)] not in (b"", b"little"):
        raise Unreadable("it was written on a big-endian machine; save it again on a little-endian one")
    start, size, crc = records["data.pkl"]
    if size > limits["pickle"]:
        raise Refused(f"its data.pkl has {size} bytes, {limits['pickle']} are accepted")
    text = data[start : start + size]
    if crc and zlib.crc32(text) != crc:
        raise Unreadable("its data.pkl is damaged (its checksum differs); fetch it again")

    def persistent(given: Any) -> Storage:
        if not isinstance(given, tuple) or len(given) != 5:
            raise Refused("its pickle refers to data in a way torch does not")
        return storage_of(given)

    machine = Machine(text, 0, size, budget, persistent)
    top = machine.run()
    nothing_after(machine.at, text)
    found = {key.removeprefix("data/"): where for key, where in records.items() if key.startswith("data/")}
    return Opened(top, found)


def listing(data: Any, limits: Mapping[str, Any]) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name."""
    try:
        with zipfile.ZipFile(data) as archive:  # a memory map is a file
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error, IndexError) as error:
        raise Unreadable(f"it is a damaged zip archive ({shown(str(error))}); fetch it again") from error
    if len(infos) > limits["records"]:
        raise Refused(f"its zip archive has {len(infos)} members, {limits['records']} are accepted")
    named = {info.filename: info for info in infos}
    if len(named) != len(infos) or any(info.filename != info.orig_filename for info in infos):
        raise Refused("its zip archive has two members of one name")
    return named


def record(data: Any, name: str, info: zipfile.ZipInfo) -> tuple[int, int, int]:
    """Where an uncompressed member lies: start, bytes, checksum."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise Refused(f"its member {shown(name)} is compressed; torch.save does not compress")
    if info.flag_bits & 0x1:
        raise Refused(f"its member {shown(name)} is encrypted")
    at = info.header_offset
    head = data[at : at + 30] if at >= 0 else b""
    if len(head) != 30 or head[:4] != b"PK\x03\x04":
        raise Unreadable(f"its member {shown(name)} is not where the directory says")
    names, extra = struct.unpack("<HH", head[26:30])
    if data[at + 30 : at + 30 + names] != name.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise Refused(f"its member {shown(name)} has another name in place")
    start = at + 30 + names + extra
    if start + info.file_size > len(data):
        raise Unreadable(f"its member {shown(name)} reaches beyond the end of the file")
    return start, info.file_size, info.CRC


def disjoint(records: Any) -> None:
    """Members that share bytes are how a small archive becomes a huge one."""
    end = 0
    for start, size, _ in sorted(records):
        if start < end:
            raise Refused("members of its zip archive overlap")
        end = start + size


# --- the tensors of one entry ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """One tensor to write: where its numbers are, and how they are laid out."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    start: int  # byte in the file; for arrays in `data`
    data: bytes | None = None
    order: str = "<"

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.count * ITEM[self.dtype]

    @property
    def span(self) -> int:
        """Elements from the first to behind the last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.count else 0


def choose(top: Any, entries: Sequence[str]) -> tuple[str, Dict]:
    """The first of `entries` that holds at least one tensor. Raises `Unreadable` saying what the file has instead."""
    for entry in entries:
        found = top if entry == "" else top.get(entry) if isinstance(top, Dict) else None
        if isinstance(found, Dict) and any(unusable(value) is None for value in found.values()):
            return entry, found
    wanted = " or ".join(repr(entry) if entry else "the top level" for entry in entries)
    if not isinstance(top, Dict):
        raise Unreadable(f"its top level is {kind(top)}; accepted is a dict with tensors in {wanted}")
    lines = [f"{shown_key(key)!r}: {unusable(value) or 'tensor'}" for key, value in list(top.items())[:SHOWN]]
    more = f", and {len(top) - SHOWN} more" if len(top) > SHOWN else ""
    raise Unreadable(f"it has no tensors in {wanted}. Its top level holds {', '.join(lines) or 'nothing'}{more}")


def unusable(value: Any) -> str | None:
    """Why a value is not among the result; None: it is."""
    if isinstance(value, Tensor):
        if not isinstance(value.storage, Storage):
            return f"tensor whose storage is {kind(value.storage)}"
        dtype = value.dtype or value.storage.dtype
        return None if dtype in WRITABLE else f"tensor of unsupported dtype {shown(dtype)}"
    if isinstance(value, Array):
        code = value.dtype.code if isinstance(value.dtype, Dtype) else "unknown"
        return None if code in NUMPY_DTYPES else f"array of unsupported dtype {shown(code)}"
    return kind(value)


def wanted_of(entry: Dict, opened: Opened, limits: Mapping[str, Any]) -> tuple[list[Wanted], dict[str, str]]:
    """The tensors of an entry, checked against the file and the limits; and what is left out, with the reason."""
    if entry.repeated:
        raise Refused(f"it gives {shown(min(entry.repeated))!r} twice")
    wanted, skipped = [], {}
    for key, value in entry.items():
        reason = unusable(value)
        if reason is None and not isinstance(key, str):
            reason = "its key is no text"
        if reason is not None:
            skipped[shown_key(key)] = reason
            continue
        if len(key) > KEY_LENGTH or not key.isprintable() or re.search(r"[/\\]|\.\.|^__metadata__$", key) or not key:
            raise Refused(f"{shown(key)!r} is no name of a tensor")
        wanted.append(view(key, value, opened) if isinstance(value, Tensor) else array(key, value))
    if len(wanted) > limits["tensors"]:
        raise Refused(f"it holds {len(wanted)} tensors, {limits['tensors']} are accepted")
    total = sum(one.size for one in wanted)
    if total > limits["output"]:
        raise Refused(f"its tensors have {total} bytes, {limits['output']} are accepted")
    return wanted, skipped


def whole_numbers(value: Any) -> tuple[int, ...] | None:
    """A shape or stride, if that is what it is."""
    if not isinstance(value, tuple | list) or len(value) > RANK:
        return None
    fits = all(type(number) is int and 0 <= number <= CELLS for number in value)
    return tuple(value) if fits and math.prod(max(1, number) for number in value) <= CELLS else None


def view(key: str, tensor: Tensor, opened: Opened) -> Wanted:
    """A tensor of torch, within the bounds of its storage and its storage within the file."""
    storage: Storage = tensor.storage
    dtype = tensor.dtype or storage.dtype
    shape = whole_numbers(tensor.size)
    # strides of no consequence may be anything, so only their product is not looked at
    stride = tensor.stride if isinstance(tensor.stride, tuple | list) else ()
    sound = all(type(number) is int and 0 <= number <= CELLS for number in (tensor.offset, *stride))
    if shape is None or len(stride) != len(shape) or not sound:
        raise Refused(f"tensor {shown(key)!r} has an impossible shape, stride or offset")
    if storage.key not in opened.records:
        raise Unreadable(f"tensor {shown(key)!r} refers to storage {shown(storage.key)!r}, which the file lacks")
    start, size, _ = opened.records[storage.key]
    if storage.count * ITEM[storage.dtype] != size:
        raise Unreadable(f"the storage of {shown(key)!r} has {size} bytes, {storage.count} x {storage.dtype} declared")
    found = Wanted(key, dtype, shape, tuple(stride), start + storage.start * ITEM[storage.dtype])
    if (tensor.offset + found.span) * ITEM[dtype] > storage.length * ITEM[storage.dtype]:
        raise Refused(f"tensor {shown(key)!r} reaches beyond the end of its storage")
    return Wanted(key, dtype, shape, tuple(stride), found.start + tensor.offset * ITEM[dtype])


def array(key: str, given: Array) -> Wanted:
    """An array of numpy, whose numbers lie in the pickle itself."""
    shape = whole_numbers(given.shape)
    if shape is None:
        raise Refused(f"array {shown(key)!r} has an impossible shape")
    dtype = NUMPY_DTYPES[given.dtype.code]
    try:  # Python 2 wrote texts
        data = given.data.encode("latin-1") if isinstance(given.data, str) else given.data
    except UnicodeEncodeError as error:
        raise Unreadable(f"the numbers of array {shown(key)!r} are not bytes") from error
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * ITEM[dtype]:
        raise Unreadable(f"array {shown(key)!r} has not as many numbers as its shape says")
    return Wanted(key, dtype, shape, strides(shape, given.fortran), 0, data, given.dtype.order)


def strides(shape: tuple[int, ...], fortran: bool = False) -> tuple[int, ...]:
    """Of a contiguous array, in elements."""
    axes = range(len(shape)) if fortran else range(len(shape) - 1, -1, -1)
    steps, step = dict.fromkeys(axes, 0), 1
    for axis in axes:
        steps[axis], step = step, step * shape[axis]
    return tuple(steps[axis] for axis in range(len(shape)))


def check_sums(entry: Dict, wanted: Sequence[Wanted], opened: Opened, data: Any) -> None:
    """The checksums of the records that are wanted; 0 is what torch writes for "not computed"."""
    keys = {one.key for one in wanted}
    for name in {value.storage.key for key, value in entry.items() if key in keys and isinstance(value, Tensor)}:
        start, size, crc = opened.records[name]
        found = 0
        for at in range(start, start + size, BLOCK) if crc else ():
            found = zlib.crc32(data[at : min(at + BLOCK, start + size)], found)
        forget(data)
        if found != crc:
            raise Unreadable(f"its storage {shown(name)!r} is damaged (its checksum differs); fetch it again")


def forget(data: Any) -> None:
    """Let go of the pages of the file that were read: memory then holds one tensor of it, not all."""
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        data.madvise(mmap.MADV_DONTNEED)


def write(wanted: Sequence[Wanted], data: Any, out: BinaryIO) -> None:
    """safetensors: the length of the header, the header (JSON), the numbers; streamed, so that memory stays small."""
    header, at = {}, 0
    ordered = sorted(wanted, key=lambda one: (-ITEM[one.dtype], one.key))  # as safetensors does: all are aligned
    for one in ordered:
        header[one.key] = {"dtype": WRITABLE[one.dtype][0], "shape": one.shape, "data_offsets": [at, at + one.size]}
        at += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for one in ordered:
        for block in numbers(one, data):
            out.write(block)
        forget(data)


def numbers(one: Wanted, data: Any) -> Iterator[bytes]:
    """The numbers of a tensor in order, little-endian, in blocks."""
    source = data if one.data is None else one.data
    if one.order == "<" and one.stride == strides(one.shape):
        for at in range(one.start, one.start + one.size, BLOCK):
            yield source[at : min(at + BLOCK, one.start + one.size)]
    elif one.count:
        import numpy as np  # takes longer than all the rest: only for what needs it

        code = WRITABLE[one.dtype][2]
        form = np.dtype(f"<{code}")
        raw = source[one.start : one.start + one.span * form.itemsize]
        flat = np.frombuffer(raw, np.dtype(one.order + code))
        laid = np.lib.stride_tricks.as_strided(flat, one.shape, [step * form.itemsize for step in one.stride])
        rows = laid if laid.ndim else laid[None]
        group = max(1, BLOCK * len(rows) // one.size)
        for first in range(0, len(rows), group):
            yield rows[first : first + group].astype(form, order="C").tobytes()


# --- the process -----------------------------------------------------------------------------------------------------


def extract(data: Any, out: Path, entries: Sequence[str], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Write the tensors of the first of `entries` that the file has; returns the report. `out` must not exist."""
    budget = Budget(limits["operations"], 2 * len(data) + (1 << 20))
    opened = read_file(data, budget, limits)
    budget.check_names()
    entry, values = choose(opened.top, entries)
    wanted, skipped = wanted_of(values, opened, limits)
    check_sums(values, wanted, opened, data)
    with out.open("xb") as stream:
        write(wanted, data, stream)
    return {
        "entry": entry,
        "tensors": len(wanted),
        "foreign": sorted(budget.names)[:NAMES],
        "scalars": scalars(opened.top),
        "skipped": dict(list(skipped.items())[:SKIPPED]),
    }


def scalars(top: Any) -> dict[str, Any]:
    """Numbers and short texts at the top level."""
    found: dict[str, Any] = {}
    for key, value in top.items() if isinstance(top, Dict) else ():
        short = isinstance(value, str) and len(value) <= NAME_LENGTH
        number = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63)
        if isinstance(key, str) and (short or number) and len(found) < SCALARS:
            found[shown(key)] = shown(value) if short else value
    return found


def set_limits(limits: Mapping[str, Any], size: int) -> None:
    """Memory beyond what is in use now and the mapped file, CPU seconds, bytes written, no core files, no processes."""
    try:
        import resource
    except ImportError:  # not on Windows; the parent's clock is what is left there
        return
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        used = 4 << 30  # elsewhere than on Linux
    seconds = math.ceil(limits["seconds"])
    for name, soft in {
        "RLIMIT_AS": used + size + limits["memory"],
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": limits["output"] + (128 << 20),
        "RLIMIT_CORE": 0,
    }.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        _, hard = resource.getrlimit(number)
        ceiling = soft + (5 if name == "RLIMIT_CPU" else 0)
        highest = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
        try:
            resource.setrlimit(number, (min(soft, highest), highest))
        except (ValueError, OSError):  # macOS refuses some
            continue


def deny(event: str, _: tuple[Any, ...]) -> None:
    """A second wall, should the first have a hole: this process starts nothing, calls nobody and unpickles nothing."""
    if event.split(".")[0] in ("subprocess", "socket", "pickle", "webbrowser") or event in (
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.remove",
        "os.rename",
        "os.kill",
    ):
        raise Refused(f"it tried {event}")


def main() -> None:
    """Read the job from standard input, answer with one line of JSON on standard output."""
    job = json.load(sys.stdin)
    sys.path.extend(path for path in job["path"] if path not in sys.path)
    answer: dict[str, Any]
    try:
        size = Path(job["file"]).stat().st_size
        set_limits(job["limits"], size)
        with Path(job["file"]).open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            sys.addaudithook(deny)
            answer = {"done": extract(data, Path(job["out"]), job["entries"], job["limits"])}
    except Refused as error:
        answer = {"refused": str(error)}
    except Unreadable as error:
        answer = {"unreadable": str(error)}
    except (MemoryError, RecursionError):
        answer = {"refused": "reading it takes more memory than is accepted"}
    except Exception as error:  # this process ends here: whatever it was, the parent reports it
        answer = {"broken": f"{type(error).__name__}: {shown(str(error))}"}
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            answer = {"refused": "reading it takes more memory than is accepted"}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
