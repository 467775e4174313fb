"""The names in a pickle: dtypes, storages, names with a stand-in, and names for which a file is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME_LENGTH, SHOWN = 200, 30  # longest name in letters; most names in a message

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


class Refused(Exception):
    """Raised when a file contains more than tensors, or exceeds the limits."""


class Unreadable(Exception):
    """The file is damaged, of another format, or does not hold what is wanted."""


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
    """A class or function that the file names; it is never imported."""

    path: str  # "module.name", normalized across Python and numpy versions

    @property
    def storage(self) -> str | None:
        """The dtype of a storage class such as torch.FloatStorage; None: it is not one."""
        match = STORAGE_NAME.fullmatch(self.path)
        name = match[1].lower() if match else ""
        name = ALIASES.get(name, name)
        return name if name in ITEM else None

    @property
    def dtype(self) -> str | None:
        """The dtype that `torch.<name>` is; None: it is not one."""
        match = DTYPE_NAME.fullmatch(self.path)
        name = ALIASES.get(match[1], match[1]) if match else None
        return name if name in ITEM else None

    @property
    def is_known(self) -> bool:
        """Whether it has a stand-in: a dtype, a storage or a name in INERT."""
        return bool(self.path in INERT or self.storage or self.dtype or NUMPY_TYPE_NAME.fullmatch(self.path))


def normalized(module: str, name: str) -> str:
    """One spelling for names that Python 2 and 3, numpy 1 and 2 spell differently."""
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if module.startswith("numpy._core."):
        module = "numpy.core." + module.removeprefix("numpy._core.")
    return f"{module}.{name}"


def is_forbidden(module: str, name: str) -> bool:
    """Whether the file is refused for naming this; names with a stand-in are not asked about."""
    parts = normalized(module, name).split(".")
    if parts[0] in FORBIDDEN_MODULES:
        return True
    if any(".".join(parts[:length]) in FORBIDDEN_PARTS for length in range(2, len(parts) + 1)):
        return True
    # "pathlib" + "os.system": a way through an attribute of a harmless module
    steps = name.split(".")
    return len(steps) > 1 and any(step in FORBIDDEN_MODULES or step.startswith("__") for step in steps)


def shown(text: str, limit: int = NAME_LENGTH) -> str:
    """Text from the file made fit for a message: printable ASCII, at most `limit` letters."""
    clean = re.sub(r"[^\x20-\x7e]", "?", text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
