"""The names in a pickle: dtypes, storages, names with a stand-in, and the lists of what a file may name and call."""

from __future__ import annotations

import re
import sys
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


# What a file may name is decided by lists of what is allowed. Nothing is ever imported or called, so a name that slips
# through does nothing; a file that asks for more than the lists hold is refused all the same, as no honest one does.
#   - INERT: the names with a meaning here, each a stand-in;
#   - BESIDE: what honest checkpoints hold beside weights (settings, paths, dates), and NAMED, the classes of torch and
#     numpy that they hold. They become placeholders;
#   - of the standard library, torch, numpy and the packages in CLOSED, nothing else may be named;
#   - a class of any other package, such as an author's own, may be the type of a plain object (made without a call:
#     NEWOBJ, copyreg._reconstructor) or a value. It is a placeholder; a file that would call it is refused.
CLOSED = frozenset(
    sys.stdlib_module_names
) | frozenset(  # of other versions of Python, and packages whose purpose is to run, fetch or load something
    """
    __builtin__ aifc asynchat asyncore cgi cgitb chunk commands copy_reg cPickle crypt distutils dummy_thread
    dummy_threading formatter httplib imghdr imp lib2to3 macpath mailcap msilib nis nntplib nt ossaudiodev parser pipes
    popen2 posix smtpd sndhdr spwd sunau symbol telnetlib thread urllib2 urlparse uu xdrlib _winreg
    IPython cffi cloudpickle dask dill fabric fsspec ipykernel joblib jsonpickle numba pandas paramiko pexpect pip
    pkg_resources plumbum psutil requests sh setuptools urllib3 wheel yaml numpy torch
    """.split()  # noqa: SIM905
)
# Names that ordinary pickles of tensors, arrays and containers use; each is a stand-in here. "__builtin__" and
# "copy_reg" are Python 2's spelling of the same.
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
BESIDE = frozenset(  # may be named and called
    """
    argparse.Namespace types.SimpleNamespace collections.deque itertools.count decimal.Decimal fractions.Fraction
    uuid.UUID random.Random re._compile array._array_reconstructor array.array logging.getLogger time.struct_time
    datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone
    pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath
    pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath pathlib._local.PurePosixPath
    pathlib._local.PureWindowsPath torch.storage._load_from_bytes torch.Generator torch.torch_version.TorchVersion
    numpy.random._pickle.__randomstate_ctor numpy.random._pickle.__generator_ctor
    numpy.random._pickle.__bit_generator_ctor numpy.ma.core._mareconstruct
    pandas.core.frame.DataFrame pandas.core.series.Series pandas.core.indexes.base._new_Index
    pandas._libs.internals._unpickle_block torchvision.transforms.functional.InterpolationMode
    pytorch_lightning.trainer.states.TrainerFn pytorch_lightning.trainer.states.TrainerStatus
    pytorch_lightning.trainer.states.RunningStage lightning.pytorch.trainer.states.TrainerFn
    lightning.pytorch.trainer.states.TrainerStatus lightning.pytorch.trainer.states.RunningStage
    """.split()  # noqa: SIM905
)
NAMED = re.compile(  # may be named, and be the type of a plain object
    r"torch\.(nn|optim|ao|quantization|distributions|amp|cuda\.amp|utils\.data|_C\._nn)\.[\w.]+"
    r"|torch\.(q?u?int|float|bfloat|complex|bits)\d\w*|torch\.(strided|sparse_\w+|\w+_format|per_\w+)"
    r"|torch\.(cuda\.|storage\.)?_?[A-Z]\w*(Storage|Tensor)|torch\._utils\._rebuild_\w+"
    r"|numpy\.(random\.)?[\w.]*(RandomState|Generator|MT19937|PCG64|Philox|SFC64|SeedSequence)"
    r"|numpy\.(object_|void|datetime64|timedelta64|longlong|ulonglong|intc|uintc|record|recarray|matrix)"
    r"|numpy\.(rec\.recarray|ma\.core\.MaskedArray|ma\.MaskedArray|matrixlib\.defmatrix\.matrix)"
    r"|typing\.[A-Z]\w*|pandas\.core\.internals\.\w+\.\w+Manager|pandas\.core\.indexes\.\w+\.\w*Index"
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

    @property
    def may_be_called(self) -> bool:
        """Whether a file may ask for a call of it, which becomes a stand-in or a placeholder."""
        return self.is_known or self.path in BESIDE or self.path.startswith("torch._utils._rebuild_")


def normalized(module: str, name: str) -> str:
    """One spelling for names that Python 2 and 3, numpy 1 and 2 spell differently."""
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if module.startswith("numpy._core."):
        module = "numpy.core." + module.removeprefix("numpy._core.")
    return f"{module}.{name}"


def may_be_named(module: str, name: str) -> bool:
    """Whether a file may name this at all; the lists above say what."""
    path = Name(normalized(module, name))
    if path.is_known or path.path in BESIDE:
        return True
    parts, steps = path.path.split("."), name.split(".")
    # "omegaconf" + "sys.modules": a way through an attribute of a harmless module. Honest steps go through classes
    if not all(part.isidentifier() for part in parts) or any(not step.lstrip("_")[:1].isupper() for step in steps[:-1]):
        return False
    if any(step.startswith("__") for step in steps):
        return False
    return parts[0] not in CLOSED or bool(NAMED.fullmatch(path.path))


def shown(text: str, limit: int = NAME_LENGTH) -> str:
    """Text from the file made fit for a message: printable ASCII, at most `limit` letters."""
    clean = re.sub(r"[^\x20-\x7e]", "?", text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
