"""Which kernels compute sparse convolutions: plain torch, or numba's (extra `fast`) for float32 on the CPU."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from geo_pretrain.errors import require

CHOICES = ("auto", "plain", "fast")
LOW_PRECISION = (torch.bfloat16, torch.float16)
NUMBA = ("numba", "llvmlite")  # what the fast kernels import
_choice = os.environ.get("GEO_PRETRAIN_SPARSE", "auto")
if _choice not in CHOICES:
    raise ValueError(f"GEO_PRETRAIN_SPARSE is {_choice!r}; accepted: {', '.join(CHOICES)}.")


def is_fast(tensor: Tensor) -> bool:
    """Whether numba's kernels take this tensor: float32 or int32 on the CPU, with numba installed, not switched off."""
    if _choice == "plain" or tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int32):
        return False
    return _choice == "fast" or _has_numba()


def computed_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which convolutions of such features compute: float32 for 16-bit ones on the CPU, else their own.

    No kernel here multiplies 16-bit numbers on a CPU, and torch's own are several times slower than float32's.
    """
    return torch.float32 if device == "cpu" and dtype in LOW_PRECISION else dtype


def describe(dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """Which kernels compute convolutions of such features, in words.

    >>> with use("plain"):
    ...     describe(torch.bfloat16)
    'torch.bfloat16 on cpu: computed in torch.float32 by plain torch'
    """
    computed = computed_dtype(device, dtype)
    kernels = "numba's kernels" if is_fast(torch.empty(0, dtype=computed, device=device)) else "plain torch"
    change = "" if computed == dtype else f" in {computed}"
    return f"{dtype} on {device}: computed{change} by {kernels}"


@cache
def warn_once(dtype: torch.dtype) -> None:
    """Say, once a process, that a 16-bit dtype is computed in float32 on the CPU."""
    warnings.warn(
        f"Sparse convolutions: {describe(dtype)}, as quick as float32; features are handed out as {dtype}.",
        stacklevel=2,
    )


@cache
def _has_numba() -> bool:
    """Whether numba is installed whole and compiles; cached: every convolution asks, and searching sys.path is slow."""
    compiles = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")  # numba's own switch, for debugging
    return compiles and all(importlib.util.find_spec(name) is not None for name in NUMBA)


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose the backend within a `with` block: "plain", "fast" or "auto" (fast where possible).

    The environment variable GEO_PRETRAIN_SPARSE sets the choice outside such blocks.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"The sparse backend is {choice!r}; accepted: {', '.join(CHOICES)}.")
    if choice == "fast" and not _has_numba():
        for name in NUMBA:
            require(name, "fast")  # says what to install
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before
