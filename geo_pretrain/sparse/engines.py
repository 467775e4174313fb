"""Which code computes convolutions: plain torch, or the numba kernels of the extra `fast` where they apply."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from geo_pretrain.errors import require

CHOICES = ("auto", "plain", "fast")
_choice = os.environ.get("GEO_PRETRAIN_SPARSE", "auto")
if _choice not in CHOICES:
    raise ValueError(f"GEO_PRETRAIN_SPARSE is {_choice!r}; accepted: {', '.join(CHOICES)}.")


def current(rows: Tensor) -> ModuleType:
    """The module whose `products` and `kernel_gradient` work on such rows."""
    if wants_fast(rows):
        return importlib.import_module("geo_pretrain.sparse.fast")
    return importlib.import_module("geo_pretrain.sparse.functional")


def wants_fast(rows: Tensor) -> bool:
    """float32 on the CPU, with numba installed and not switched off."""
    if _choice == "plain" or rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.int32):
        return False
    return _choice == "fast" or _has_numba()


@cache
def _has_numba() -> bool:
    """Looked up once: every convolution asks, and a library that is absent is searched for in every folder."""
    return importlib.util.find_spec("numba") is not None


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose the engine for a while: "plain", "fast" or "auto" (fast where it can; the environment's
    GEO_PRETRAIN_SPARSE sets the start value)."""
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"The engine is {choice!r}; accepted: {', '.join(CHOICES)}.")
    if choice == "fast":
        require("numba", "fast")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before
