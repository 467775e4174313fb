"""Machine code of the fast kernels: compiled once by numba, kept in a file, run on torch's threads (extra `fast`).

What is kept needs no numba to run, only the LLVM under it: importing numba takes longer than everything else here. The
threads are torch's own OpenMP threads where these can be reached: a second pool would fight with it for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geo_pretrain.errors import require
from geo_pretrain.files import atomic_write
from geo_pretrain.sparse import processor

llvm = require("llvmlite.binding", "fast")
FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
EXTERNAL = {"memset", "memcpy", "memmove"}  # what compiled code may call
SOURCES = ("kernels", "kernels_bf16", "kernels_amx", "processor", "compiled")
DIGEST = 32  # bytes of SHA-256 before the object code in a file
FILES = 8  # kept in a folder: several versions and processors may share one
_MAKING = threading.Lock()  # of the engine: of two, one would be freed, with code that runs


def run(name: str, *values: int) -> None:
    """Run a task of `kernels` on as many threads as torch uses; the job is the counter followed by `values`."""
    task = _task(name)
    counter = np.zeros(1, np.int64)
    job = np.array([counter.ctypes.data, *values], np.int64)
    pointer, threads = job.ctypes.data, torch.get_num_threads()
    if threads == 1:
        task(pointer)
    elif (parallel := _openmp()) is not None:
        parallel(ctypes.cast(task, ctypes.c_void_p), pointer, threads, 0)
    else:
        others = [_pool(os.getpid(), threads).submit(task, pointer) for _ in range(threads - 1)]
        task(pointer)
        for other in others:
            other.result()


@cache
def _task(name: str) -> Any:
    """A task as a function of its job's address."""
    with _MAKING:
        task = FUNCTION(_engine().get_function_address(name))
    return task


@cache
def _engine() -> Any:
    """LLVM with the machine code of all tasks, from the file that keeps it or compiled now."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=processor.NAME, features=processor.FEATURES, opt=3, jit=True
    )
    code = _kept()
    if code is None:
        code = _compiled(target)
        _keep(code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _compiled(target: Any) -> bytes:
    """Compile all tasks to one object file that calls nothing of Python."""
    from geo_pretrain.sparse import kernels  # imports numba

    if processor.BF16:
        from geo_pretrain.sparse import kernels_bf16  # noqa: F401  registers its tasks
    if processor.AMX:
        from geo_pretrain.sparse import kernels_amx  # noqa: F401

    whole = llvm.parse_assembly("")
    for name in kernels.TASKS:
        text, entry = kernels.assembly(name)
        module = llvm.parse_assembly(text)
        module.get_function(entry).name = name
        for value in (*module.functions, *module.global_variables):
            if not value.is_declaration and value.name != name:
                value.linkage = "internal"
        whole.link_in(module)
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(whole, builder)  # drops the wrappers' error paths, which are never taken
    called = {function.name for function in whole.functions if function.is_declaration}
    foreign = {name for name in called if not name.startswith("llvm.")} - EXTERNAL
    if foreign:
        raise RuntimeError(f"The compiled kernels call {', '.join(sorted(foreign))}; accepted: {', '.join(EXTERNAL)}.")
    code: bytes = target.emit_object(whole)
    return code


# ---- The file -------------------------------------------------------------------------------------------------------


def _kept() -> bytes | None:
    """The object code from the first file that holds it undamaged, and that no stranger wrote."""
    for path in _paths():
        with suppress(OSError), path.open("rb") as file:
            content = file.read()
            digest, code = content[:DIGEST], content[DIGEST:]
            if hashlib.sha256(code).digest() == digest and _is_trusted(os.fstat(file.fileno())):
                return code
    return None


def _is_trusted(file: os.stat_result) -> bool:
    """Whether a file is this user's, root's or the owner's of these sources, and nobody else may write it.

    Its code runs, and NUMBA_CACHE_DIR may be a folder where everybody writes, such as /tmp.
    """
    if os.name != "posix":
        return True
    return file.st_uid in (0, os.geteuid(), Path(__file__).stat().st_uid) and not file.st_mode & stat.S_IWOTH


def _keep(code: bytes) -> None:
    """Write the object code to the first folder that takes it; without one it is compiled in every process.

    Where Python writes no bytecode, nothing is written beside the sources.
    """
    for path in _paths():
        if sys.dont_write_bytecode and path.parent == _bytecode():
            continue
        with suppress(OSError):
            with atomic_write(path) as part:
                part.write_bytes(hashlib.sha256(code).digest() + code)
            _remove_old(path)
            return


def _remove_old(written: Path) -> None:
    """Remove the oldest files of machine code beside the one just written, but for a few."""
    dated = []
    for path in written.parent.glob(f"kernels-{'[0-9a-f]' * 16}.o"):
        with suppress(OSError):  # another process removed it
            dated.append((path != written, -path.stat().st_mtime, path))
    for *_, path in sorted(dated)[FILES:]:
        with suppress(OSError):
            path.unlink()


def _paths() -> Iterator[Path]:
    """Where the object code of these sources may lie: numba's cache folder if set, Python's bytecode, the user's."""
    here = Path(__file__).parent
    sources = [(here / f"{name}.py").read_bytes() for name in SOURCES]
    versions = llvm.llvm_version_info, llvm.get_process_triple(), processor.NAME, processor.FEATURES
    name = f"kernels-{hashlib.sha256(b''.join(sources) + repr(versions).encode()).hexdigest()[:16]}.o"
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(chosen) / name
    else:
        yield _bytecode() / name
        with suppress(RuntimeError):  # of a user without a home
            yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "geo_pretrain" / "kernels" / name


def _bytecode() -> Path:
    """The folder where Python keeps the bytecode of these sources."""
    return Path(cache_from_source(__file__)).parent


# ---- Threads --------------------------------------------------------------------------------------------------------


@cache
def _openmp() -> Any:
    """GOMP_parallel of the OpenMP library that torch loaded; None if that is not GNU's."""
    folder = Path(torch.__file__).parent
    for path in [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]:
        try:
            entry = ctypes.CDLL(str(path)).GOMP_parallel  # already loaded: this only finds it
        except (OSError, AttributeError):
            continue
        entry.argtypes, entry.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return entry
    return None


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; `process` is part of the cache key since threads do not survive a fork."""
    return ThreadPoolExecutor(threads)
