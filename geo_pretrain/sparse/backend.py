"""Which kernels compute sparse convolutions: plain torch, numba's (extra `fast`) on the CPU, or a peer's.

Peers are engines of other libraries (see `peers`). They compute where they are chosen and where they can; torch does
the rest.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from geo_pretrain.errors import InputError, require

LOW_PRECISION = (torch.bfloat16, torch.float16)
PEERS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {  # what each takes, by device
    "spconv": {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.float16)},
    "warpconvnet": {"cuda": (torch.float32, torch.bfloat16, torch.float16)},
}
INSTALL = {
    "spconv": "pip install spconv-cu126 (or -cu118 to -cu124, as your CUDA is; for CPUs: pip install spconv)",
    "warpconvnet": "pip install warpconvnet (wheels by version of torch and CUDA: github.com/NVlabs/WarpConvNet)",
}
CHOICES = ("auto", "plain", "fast", *PEERS)
NUMBA_DTYPES = (torch.float32, torch.int32, torch.bfloat16)
NUMBA = ("llvmlite", "numba")  # what the fast kernels import; numba without llvmlite breaks off half-imported
VARIABLE = "GEO_PRETRAIN_SPARSE"


def is_fast(tensor: Tensor) -> bool:
    """Whether numba's kernels take this tensor: on the CPU, with numba installed, not switched off.

    They take float32 and int32, and bfloat16 where the processor multiplies it.
    """
    return _takes_numba(tensor.device.type, tensor.dtype)


def _takes_numba(device: str, dtype: torch.dtype) -> bool:
    if _choice not in ("auto", "fast") or device != "cpu" or dtype not in NUMBA_DTYPES:
        return False
    if torch.compiler.is_compiling():  # it traces torch's calls alone
        return False
    if dtype == torch.bfloat16 and not _multiplies_bf16():
        return False
    return _choice == "fast" or _has_numba()


@cache
def _multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself (avx512_bf16), or the one that numba is told to compile for."""
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is not None:
        return {"+avx512f", "+avx512bf16"} <= set(features.split(","))
    return torch.cpu._is_avx512_bf16_supported()


def peer(device: str, dtype: torch.dtype) -> str | None:
    """The name of the other library's engine that was chosen, if it takes such features."""
    return _choice if dtype in PEERS.get(_choice, {}).get(device, ()) else None


def computed_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of what layers hand on: float32 for 16-bit features on the CPU, else their own."""
    return torch.float32 if device == "cpu" and dtype in LOW_PRECISION else dtype


def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which convolutions of such features multiply.

    On the CPU bfloat16 is its own where numba's kernels and the processor multiply it; other 16-bit numbers are
    multiplied in float32: torch's own products of them are several times slower.
    """
    return dtype if _takes_numba(device, dtype) else computed_dtype(device, dtype)


def describe(dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """Which kernels compute convolutions of such features, in words.

    >>> with use("plain"):
    ...     describe(torch.bfloat16)
    'torch.bfloat16 on cpu: computed in torch.float32 by plain torch'
    """
    computed, multiplied = computed_dtype(device, dtype), product_dtype(device, dtype)
    kernels = peer(device, computed) or ("numba's kernels" if _takes_numba(device, multiplied) else "plain torch")
    if multiplied != computed:
        return f"{dtype} on {device}: multiplied in {multiplied}, summed in {computed} by {kernels}"
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
def say_once(text: str) -> None:
    """Warn of something once a process."""
    warnings.warn(text, stacklevel=2)


@cache
def _has_numba() -> bool:
    """Whether numba is installed whole and compiles; cached: every convolution asks, and searching sys.path is slow."""
    compiles = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")  # numba's own switch, for debugging
    return compiles and all(importlib.util.find_spec(name) is not None for name in NUMBA)


def _checked(choice: str, what: str) -> str:
    """A choice that is one and can be had here. Raises `InputError`, `MissingDependency`."""
    if choice not in CHOICES:
        raise InputError(f"{what} is {choice!r}; accepted: {', '.join(CHOICES)}.")
    if choice == "fast" and not _has_numba():
        for name in NUMBA:
            require(name, "fast")  # says what to install
    if choice in PEERS and importlib.util.find_spec(choice) is None:
        require(choice, install=INSTALL[choice])
    return choice


_outside = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)  # the choice where no block is open
_blocks: dict[object, str] = {}  # the choices of open blocks, the one begun last behind
_choice = _outside  # the one in force


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose the backend within a `with` block: "plain", "fast", "auto" (fast where possible), or another library's.

    "spconv" and "warpconvnet" compute with these libraries, on a GPU, what they can, torch the rest. The choice is the
    process's, so gradients of another thread have it too; of several blocks that are open the one begun last counts.

    The environment variable GEO_PRETRAIN_SPARSE sets the choice outside such blocks. Raises `InputError` for a name
    that is none, `MissingDependency` for a library that is not installed.
    """
    global _choice
    block = object()
    _blocks[block] = _choice = _checked(choice, "The sparse backend")
    try:
        yield
    finally:
        del _blocks[block]
        _choice = next(reversed(_blocks.values()), _outside)
