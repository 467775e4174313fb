"""Numba-compiled tasks that run on torch's threads, the base of the fast kernels (extra `fast`).

A task is a function of one job, an array of addresses and sizes that begins with the address of a counter; the threads
draw numbers from the counter and return when none are left. They are torch's own OpenMP threads where these can be
reached: a second pool would fight with it for the cores.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geo_pretrain.errors import require

numba = require("numba", "fast")
types, intrinsic = numba.types, numba.extending.intrinsic
INT64 = numba.core.cgutils.ir.IntType(64)
ADDRESS, SIZE = types.uint64, types.int64


def compiled(tasks: Callable[..., None]) -> Any:
    """Compile a task to machine code, cached on disk where there is a folder for it."""
    signature = types.void(types.CPointer(types.int64))
    try:
        return numba.cfunc(signature, cache=True)(tasks)
    except RuntimeError:
        return numba.cfunc(signature)(tasks)


@intrinsic
def next_task(context, counter):
    """Return the counter's value and increment it atomically: threads draw their tasks from it."""

    def emit(_context, b, _signature, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], INT64.as_pointer()), INT64(1), "monotonic")

    return SIZE(ADDRESS), emit


def _pointer_cast(kind: Any) -> Any:
    @intrinsic
    def cast(context, address):
        def emit(_context, b, signature, args):
            return b.inttoptr(args[0], _context.get_value_type(signature.return_type))

        return types.CPointer(kind)(ADDRESS), emit

    return cast


int32_at, int64_at, float_at = (_pointer_cast(kind) for kind in (types.int32, types.int64, types.float32))


def run(tasks: Any, *values: int) -> None:
    """Run compiled tasks on as many threads as torch uses; the job is the counter followed by `values`."""
    counter = np.zeros(1, np.int64)
    job = np.array([counter.ctypes.data, *values], np.int64)
    pointer, threads = job.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)), torch.get_num_threads()
    if threads == 1:
        tasks.ctypes(pointer)
    elif (parallel := _openmp()) is not None:
        parallel(tasks.address, pointer, threads, 0)
    else:
        others = [_pool(os.getpid(), threads).submit(tasks.ctypes, pointer) for _ in range(threads - 1)]
        tasks.ctypes(pointer)
        for other in others:
            other.result()


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
