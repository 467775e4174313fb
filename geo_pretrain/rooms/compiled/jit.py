"""How the loops of this package are compiled: by numba (extra `fast`), kept on disk where there is a folder for it."""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

from geo_pretrain.errors import require

numba = require("numba", "fast")
OPTIONS = {"error_model": "numpy"}  # x / 0 is infinite and needs no check
LEAN = {**OPTIONS, "_nrt": False}  # allocates nothing, so that no references are counted
PART = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called by compiled code only


def entry(function):
    """Compile a function that Python calls; its code is cached."""
    return _cached(function, OPTIONS)


def lean_entry(function):
    """Compile a function that Python calls and that allocates nothing; its code is cached."""
    return _cached(function, LEAN)


def helper(function):
    """Compile a function for other compiled ones. It must lie in their file: the cache looks at no other."""
    return numba.njit(**OPTIONS, **PART)(function)


def lean_helper(function):
    """Compile a function that allocates nothing for other compiled ones in its file."""
    return numba.njit(**LEAN, **PART)(function)


def _cached(function, options):
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to
        return numba.njit(**options)(function)
