"""Attacks by pickles: code that runs, bombs, and lies about sizes."""

from __future__ import annotations

import pickle

from geo_pretrain.errors import CheckpointError
from tests.hub.hostile.assembler import (
    FLOATS,
    GOOD,
    call,
    dict_,
    legacy_tensor,
    list_,
    name,
    number,
    numpy_array,
    numpy_dtype,
    pairs,
    proto,
    raw,
    stacked,
    storage,
    tensor,
    text,
    torch_legacy,
    torch_zip,
    tuple_,
)
from tests.hub.hostile.corpus import Touch, attack, lie, python, system

# Code that runs, by the instruction that starts it.

for version in range(pickle.HIGHEST_PROTOCOL + 1):
    attack(
        f"reduce os.system, protocol {version}",
        lambda canary, version=version: pickle.dumps({"a": Touch(canary)}, version),
        "posix.system",
        fires=True,
    )
attack(
    "reduce in a list that is popped",
    lambda c: proto(system(c) + b"0" + dict_(a=numpy_array(tuple_(4), raw(FLOATS)))),
    "posix.system",
    fires=True,
)
attack("reduce behind the memo", lambda c: proto(dict_(a=system(c) + b"q\x05h\x05\x86")), "posix.system", fires=True)
attack("reduce as a key", lambda c: proto(pairs((system(c), 1))), "posix.system", fires=True)
attack("reduce in a set", lambda c: proto(b"\x8f(" + system(c) + b"\x90", 4), "posix.system", fires=True)
attack("reduce in a frozenset", lambda c: proto(b"(" + system(c) + b"\x91", 4), "posix.system", fires=True)
attack("INST", lambda c: proto(b"(" + text(f"touch {c}") + b"iposix\nsystem\n"), "posix.system", fires=True)
attack(
    "OBJ",
    lambda c: proto(b"(" + name("posix", "system") + text(f"touch {c}") + b"o"),
    "posix.system",
    fires=True,
)
attack(
    "NEWOBJ",
    lambda c: proto(name("subprocess", "Popen") + tuple_(f"touch {c}") + b"\x81"),
    "subprocess.Popen",
)
attack(
    "NEWOBJ_EX",
    lambda c: proto(name("subprocess", "Popen") + tuple_(f"touch {c}") + b"}\x92", 4),
    "subprocess.Popen",
)
attack(
    "STACK_GLOBAL",
    lambda c: proto(call(stacked("posix", "system"), f"touch {c}"), 4),
    "posix.system",
    fires=True,
)
attack(
    "STACK_GLOBAL through an attribute",
    lambda c: proto(call(stacked("shutil", "os.system"), f"touch {c}"), 4),
    "shutil.os.system",
    fires=True,
)
attack(
    "STACK_GLOBAL through a function's globals",
    lambda c: proto(call(stacked("collections", "namedtuple.__globals__"), f"touch {c}"), 4),
    "namedtuple.__globals__",
)
attack("STACK_GLOBAL of a computed name", proto(text("os") + tuple_("system") + b"\x93", 4), "computes the name")
attack(
    "BUILD that gives a stand-in other globals",
    lambda c: proto(
        name("torch._utils", "_rebuild_tensor_v2")
        + tuple_(b"N", dict_(__globals__=dict_(os=name("builtins", "__import__")), __code__=python(c)))
        + b"b"
    ),
    "builtins.__import__",
)
attack(
    "BUILD through __setstate__",
    lambda c: proto(
        name("collections", "OrderedDict")
        + b")R"
        + dict_(__setstate__=name("posix", "system"))
        + b"b"
        + text(f"touch {c}")
        + b"b"
    ),
    "posix.system",
    fires=True,
)
attack(
    "getattr of __import__",
    lambda c: proto(
        call(
            call(name("builtins", "getattr"), call(name("builtins", "__import__"), "os"), "system"),
            f"touch {c}",
        )
    ),
    "builtins.getattr, builtins.__import__",
    fires=True,
)
for number_, code in ((1, b"\x82\x01"), (2, b"\x83\x01\x00"), (4, b"\x84\x01\x00\x00\x00")):
    attack(f"EXT{number_}", proto(code + b"(tR"), "extension registry")

# Code that runs, by where it hides.

attack(
    "in optimizer state of a zip",
    lambda c: torch_zip(dict_(model=dict_(a=GOOD), optimizer=dict_(state=system(c)))),
    "posix.system",
    fires=True,
)
attack(
    "in optimizer state of a legacy file",
    lambda c: torch_legacy(dict_(model=dict_(a=legacy_tensor()), optimizer=dict_(state=system(c)))),
    "posix.system",
)
attack(
    "as the type of a storage",
    lambda c: torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage("0", 4, system(c))))),
    "posix.system",
    fires=True,
)
attack(
    "as the key of a storage",
    lambda c: torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage(system(c))))),
    "data in a way torch does not|posix.system",
    fires=True,
)
attack(
    "in a tensor's hooks",
    lambda c: torch_zip(
        dict_(
            a=call(
                name("torch._utils", "_rebuild_tensor_v2"),
                storage(),
                0,
                tuple_(4),
                tuple_(1),
                b"\x89",
                system(c),
            )
        )
    ),
    "posix.system",
    fires=True,
)
attack(
    "in a tensor's shape",
    lambda c: torch_zip(dict_(a=tensor(tuple_(system(c)), tuple_(1)))),
    "posix.system",
    fires=True,
)
attack(
    "in sys_info of a legacy file", lambda c: torch_legacy(dict_(a=legacy_tensor()), system=system(c)), "posix.system"
)
attack(
    "in the storage keys of a legacy file",
    lambda c: torch_legacy(dict_(a=legacy_tensor()), keys=list_(system(c))),
    "posix.system",
)
attack(
    "in front of a legacy file",
    lambda c: proto(system(c)) + torch_legacy(dict_(a=legacy_tensor())),
    "posix.system|bytes follow",
    fires=True,
)
attack(
    "in an object array",
    lambda c: proto(dict_(a=numpy_array(tuple_(1), list_(system(c)), numpy_dtype("O8")))),
    "posix.system",
    fires=True,
)
attack(
    "before the pickle breaks off",
    lambda c: proto(dict_(a=system(c)))[:-1] + b"\x8c\xff",
    "posix.system",
    fires=True,
)

# Code that runs, by what is called.

for module, attribute, arguments in (
    ("builtins", "eval", lambda c: [python(c)]),
    ("builtins", "exec", lambda c: [python(c)]),
    ("__builtin__", "eval", lambda c: [python(c)]),
    ("builtins", "open", lambda c: [c, "w"]),
    ("io", "open", lambda c: [c, "w"]),
    ("_io", "FileIO", lambda c: [c, "w"]),
    ("codecs", "open", lambda c: [c, "w"]),
    ("os", "mkdir", lambda c: [c]),
    ("shutil", "copyfile", lambda c: ["/etc/hostname", c]),
    ("subprocess", "getoutput", lambda c: [f"touch {c}"]),
    ("subprocess", "check_output", lambda c: [list_("touch", c)]),
    ("timeit", "timeit", lambda c: ["pass", python(c)]),
    ("cProfile", "run", lambda c: [python(c)]),
    ("bdb", "Bdb", lambda c: []),
    ("code", "InteractiveInterpreter", lambda c: []),
    ("pickle", "loads", lambda c: [raw(proto(system(c)))]),
    ("_pickle", "loads", lambda c: [raw(proto(system(c)))]),
    ("marshal", "loads", lambda c: [raw(b"0")]),
    ("types", "FunctionType", lambda c: []),
    ("functools", "partial", lambda c: [name("builtins", "print")]),
    ("operator", "attrgetter", lambda c: ["system"]),
    ("importlib", "import_module", lambda c: ["antigravity"]),
    ("runpy", "run_path", lambda c: [c]),
    ("ctypes", "CDLL", lambda c: [c]),
    ("socket", "create_connection", lambda c: [tuple_("127.0.0.1", 9)]),
    ("urllib.request", "urlopen", lambda c: [f"file://{c}"]),
    ("sys", "exit", lambda c: [0]),
    ("pip", "main", lambda c: [list_("install", c)]),
    ("torch.hub", "load", lambda c: [c, "model"]),
    ("torch", "load", lambda c: [c]),
    ("torch.jit", "load", lambda c: [c]),
    ("torch.utils.cpp_extension", "load", lambda c: [c]),
    ("numpy", "load", lambda c: [c, b"N", b"\x88"]),
    ("logging.config", "listen", lambda c: []),
    ("copyreg", "add_extension", lambda c: ["os", "system", 1]),
    ("commands", "getoutput", lambda c: [f"touch {c}"]),
):
    attack(
        f"call of {module}.{attribute}",
        lambda c, m=module, a=attribute, given=arguments: proto(dict_(a=call(name(m, a), *given(c)))),
        f"names .*{module}.{attribute}",
        fires=module
        in (
            "builtins",
            "__builtin__",
            "io",
            "_io",
            "os",
            "shutil",
            "subprocess",
            "timeit",
            "cProfile",
            "pickle",
            "_pickle",
        )
        or (module, attribute) == ("codecs", "open"),
    )
for path in ("mylib.run", "utils.Runner", "turtle.done", "torch.utils._content_store.x", "numpy.core.records.fromfile"):
    module, _, attribute = path.rpartition(".")
    attack(
        f"call of {path}, on no list",
        torch_zip(dict_(a=GOOD, b=call(name(module, attribute), "x"))),
        f"it names {path}.*list of what a file of weights may name and call",
    )
    attack(f"INST of {path}", proto(b"(" + text("x") + f"i{module}\n{attribute}\n".encode()), f"it names {path}")
    attack(f"OBJ of {path}", proto(b"(" + name(module, attribute) + text("x") + b"o"), f"it names {path}")
attack(
    "call of what a listed call gave",
    proto(call(call(name("argparse", "Namespace")), "x")),
    r"names object of argparse.Namespace \(to be called\)",
)
attack(
    "a tensor's own loader around a second pickle",
    lambda c: proto(
        dict_(a=tensor(tuple_(4), tuple_(1), 0, call(name("torch.storage", "_load_from_bytes"), raw(proto(system(c))))))
    ),
    "torch.storage._load_from_bytes",
    CheckpointError,
)
attack(
    "a codec that inflates",
    proto(dict_(a=call(name("_codecs", "encode"), "x", "zlib_codec"))),
    "codec other than latin1",
)

# Bombs.

FEW = {"operations": 50_000}
attack("memo index of 4 GiB", proto(b"]r\xff\xff\xff\xff"), "top level is list", CheckpointError)
attack("memo index of a hundred digits", proto(b"]p" + b"9" * 100 + b"\n"), "top level is list", CheckpointError)
attack("LONG4 of 2 GiB", proto(b"\x8b\xff\xff\xff\x7f"), "breaks off", CheckpointError)
attack("LONG4 of negative length", proto(b"\x8b\xff\xff\xff\xff"), "long4 byte count < 0", CheckpointError)
attack("LONG1 of 255 bytes", proto(b"\x8a\xff" + b"\x7f" * 255), "integer of 255 bytes")
attack("integer of a million digits", proto(b"I" + b"9" * 1_000_000 + b"\n"), "integer string", CheckpointError)
for title, code in {
    "BINBYTES8": b"\x8e",
    "BINUNICODE8": b"\x8d",
    "BYTEARRAY8": b"\x96",
}.items():
    attack(f"{title} of 8 EiB", proto(code + b"\xff" * 7 + b"\x7f", 5), "breaks off", CheckpointError)
attack("BINSTRING of negative length", proto(b"T\xff\xff\xff\xff"), "byte count < 0", CheckpointError)
attack("BINBYTES of 4 GiB", proto(b"B\xff\xff\xff\xff"), "breaks off", CheckpointError)
attack("nested tuples, 100000 deep", proto(b")" + b"\x85" * 100_000), "top level is tuple", CheckpointError)
attack("nested lists, 100000 deep", proto(b"]" * 100_000 + b"a" * 99_999), "top level is list", CheckpointError)
attack("a list that holds itself", proto(b"]q\x00h\x00a"), "top level is list", CheckpointError)
attack("a dict that holds only itself", proto(b"}q\x00" + text("a") + b"h\x00s"), "'a': dict of 1", CheckpointError)
attack("billion laughs, tuples", proto(b")" + b"2\x86" * 10_000), "top level is tuple", CheckpointError)
attack("billion laughs as a key", proto(pairs((b")" + b"2\x86" * 10_000, 1))), "tuple of 2", CheckpointError)
attack(
    "billion laughs, lists",
    proto(b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(200))),
    "left over|top level is list",
    CheckpointError,
)
attack("instructions without end", proto(b"N0" * 100_000 + b"N"), "more instructions", **FEW)
attack("marks without end", proto(b"(" * 100_000), "more instructions", **FEW)
attack("a stack without end", proto(b"N" + b"2" * 100_000), "more instructions", **FEW)
attack(
    "OrderedDict of one long list, again and again",
    proto(
        list_(*[1] * 0, *[tuple_(1, 1)] * 5_000)
        + b"q\x00"
        + (name("collections", "OrderedDict") + b"h\x00\x85R0") * 2_000
    ),
    "more instructions",
    operations=200_000,
)
attack(
    "keys that collide",
    proto(pairs(*((number(k * ((1 << 61) - 1)), 0) for k in range(1, 20_000)))),
    "no tensors",
    CheckpointError,
)
attack(
    "one text encoded again and again",
    proto(
        name("_codecs", "encode")
        + b"q\x00"
        + text("a" * 1_000_000)
        + text("latin1")
        + b"\x86q\x01"
        + b"h\x00h\x01R0" * 1_000
    ),
    "unfolds to far more",
)
attack("a class name of 10000 letters", proto(name("a" * 10_000, "b")), "more than 200 letters")
attack("a class name of 10000 letters, stacked", proto(stacked("a" * 10_000, "b"), 4), "more than 200 letters")

# Lies about tensors.

TERA = tuple_(1 << 40)
lie("offset beyond the storage", torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 1))), "beyond the end of its storage")
lie("negative offset", torch_zip(dict_(a=tensor(tuple_(1), tuple_(1), -1))), "impossible shape")
lie("negative stride", torch_zip(dict_(a=tensor(tuple_(4), tuple_(-1), 3))), "impossible shape")
lie("stride beyond the storage", torch_zip(dict_(a=tensor(tuple_(2), tuple_(4)))), "beyond the end of its storage")
lie("negative size", torch_zip(dict_(a=tensor(tuple_(-4), tuple_(1)))), "impossible shape")
lie("sizes whose product overflows", torch_zip(dict_(a=tensor(tuple_(*[1 << 33] * 2), tuple_(0, 0)))), "impossible")
lie("zero times an overflow", torch_zip(dict_(a=tensor(tuple_(0, *[1 << 33] * 2), tuple_(0, 0, 0)))), "impossible")
lie("a rank of 1000", torch_zip(dict_(a=tensor(tuple_(*[1] * 1000), tuple_(*[1] * 1000)))), "impossible shape")
lie("strides for another rank", torch_zip(dict_(a=tensor(tuple_(2, 2), tuple_(1)))), "impossible shape")
lie("truth as a size", torch_zip(dict_(a=tensor(tuple_(b"\x88"), tuple_(1)))), "impossible shape")
lie("text as an offset", torch_zip(dict_(a=tensor(tuple_(1), tuple_(1), "0"))), "impossible shape")
attack(
    "a number expanded to 4 TB",
    torch_zip(dict_(a=tensor(TERA, tuple_(0)))),
    "bytes, 1048576 are accepted",
    output=1 << 20,
)
attack(
    "one storage in a thousand expanded tensors",
    torch_zip(dict_(**{f"k{i}": tensor(tuple_(1 << 21), tuple_(0)) for i in range(1000)})),
    "bytes, 1048576 are accepted",
    output=1 << 20,
)
lie(
    "an expanded tensor beyond the limit given",
    torch_zip(dict_(a=tensor(tuple_(1000, 4), tuple_(0, 1)))),
    "16000 bytes, 15999 are accepted",
    output=15_999,
)
lie("a number expanded to 64 MB", torch_zip(dict_(a=tensor(tuple_(1 << 24), tuple_(0)))), "'a' alone to 67108864")
lie(
    "one storage in a thousand tensors",
    torch_zip(dict_(w=GOOD, **{f"k{i}": tensor(tuple_(1024), tuple_(0)) for i in range(1000)})),
    "unfold to .* while the file has .*up to 4 times its size",
)
lie(
    "a thousand names for one dict of empty tensors",
    torch_zip(dict_(w=GOOD, a=tensor(tuple_(0), tuple_(1)) + b"q\x09", **{f"k{i}": b"h\x09" for i in range(1000)})),
    "unfold to .* while the file has",
)
lie("more tensors than accepted", torch_zip(dict_(a=GOOD, b=GOOD)), "2 tensors, 1 are accepted", tensors=1)
lie(
    "a storage longer than its record",
    torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage("0", 5)))),
    "16 bytes, 5 x float32",
    CheckpointError,
)
lie(
    "a storage of another type than its record",
    torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage("0", 4, name("torch", "DoubleStorage"))))),
    "16 bytes, 4 x float64",
    CheckpointError,
)
lie(
    "a storage of 2^60",
    torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage("0", 1 << 60)))),
    "declares a storage",
)
lie(
    "a storage of -1",
    torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage("0", -1)))),
    "declares a storage",
)
lie(
    "a storage that the file lacks",
    torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage("../../../etc/passwd")))),
    "which the file lacks",
    CheckpointError,
)
lie(
    "a storage of no type",
    torch_zip(dict_(a=tensor(tuple_(4), tuple_(1), 0, storage("0", 4, b"N")))),
    "storage of None",
    CheckpointError,
)
lie("a persistent id that is text", torch_zip(dict_(a=text("0") + b"Q")), "data in a way torch does not")
lie("a persistent id in a line", torch_zip(dict_(a=b"P0\n")), "data in a way torch does not")
lie("a persistent id of a module in a zip", torch_zip(tuple_("module", name("a", "B"), "f", "s") + b"Q"), "in a way")
lie("a persistent id with a number as key", torch_zip(dict_(a=storage(0))), "data in a way torch does not")
lie("a persistent id in a plain pickle", proto(dict_(a=GOOD)), "data outside itself")
lie("buffers outside", proto(b"\x97\x98", 5), "buffers outside")

# Lies about names.

lie("a key that climbs", torch_zip(pairs((text("../../etc/passwd"), GOOD))), "no name of a tensor")
lie("a key with a slash", torch_zip(pairs((text("/etc/passwd"), GOOD))), "no name of a tensor")
lie("a key with a backslash", torch_zip(pairs((text("a\\b"), GOOD))), "no name of a tensor")
lie("a key with a zero byte", torch_zip(pairs((text("a\0b"), GOOD))), "no name of a tensor")
lie("a key with an escape sequence", torch_zip(pairs((text("\x1b[2Ja"), GOOD))), "'\\?\\[2Ja' is no name")
lie("a key of 10000 letters", torch_zip(pairs((text("a" * 10_000), GOOD))), "no name of a tensor")
lie("an empty key", torch_zip(pairs((text(""), GOOD))), "no name of a tensor")
lie("a key of half a character", torch_zip(pairs((text("\ud800"), GOOD))), "no name of a tensor")
lie("safetensors' own key", torch_zip(pairs((text("__metadata__"), GOOD))), "no name of a tensor")
lie("one key twice", torch_zip(pairs((text("a"), GOOD), (text("a"), GOOD))), "gives 'a' twice")

# Arrays.

lie("an array longer than its bytes", proto(dict_(a=numpy_array(tuple_(5), raw(FLOATS)))), "as many", CheckpointError)
lie("an array of negative length", proto(dict_(a=numpy_array(tuple_(-4), raw(FLOATS)))), "impossible shape")
lie("an array that overflows", proto(dict_(a=numpy_array(tuple_(1 << 40, 1 << 40), raw(b"")))), "impossible shape")
lie(
    "an array whose bytes are none",
    proto(dict_(a=numpy_array(tuple_(4), tuple_(1)))),
    "as many",
    CheckpointError,
)
lie(
    "an array whose state is set twice",
    proto(
        dict_(a=numpy_array(tuple_(4), raw(FLOATS)) + tuple_(1, tuple_(1), numpy_dtype("f4"), b"\x89", raw(b"")) + b"b")
    ),
    "array twice",
)
lie(
    "an array of objects",
    proto(dict_(a=numpy_array(tuple_(1), list_(1), numpy_dtype("O8")))),
    "no tensors",
    CheckpointError,
)
lie(
    "an array of structures",
    proto(dict_(a=numpy_array(tuple_(1), raw(b"1234"), numpy_dtype("V4")))),
    "no tensors",
    CheckpointError,
)
