"""Which kernels compute sparse convolutions: plain torch, or numba's (extra `fast`) for float32 on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from geo_pretrain.errors import require

CHOICES = ("auto", "plain", "fast")
_choice = os.environ.get("GEO_PRETRAIN_SPARSE", "auto")
if _choice not in CHOICES:
    raise ValueError(f"GEO_PRETRAIN_SPARSE is {_choice!r}; accepted: {', '.join(CHOICES)}.")


def is_fast(tensor: Tensor) -> bool:
    """Whether numba's kernels take this tensor: float32 or int32 on the CPU, with numba installed, not switched off."""
    if _choice == "plain" or tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int32):
        return False
    return _choice == "fast" or _has_numba()


@cache
def _has_numba() -> bool:
    """Looked up once: every convolution asks, and an absent library is searched for in every folder of sys.path."""
    return importlib.util.find_spec("numba") is not None


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose the backend within a `with` block: "plain", "fast" or "auto" (fast where possible).

    The environment variable GEO_PRETRAIN_SPARSE sets the choice outside such blocks.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"The sparse backend is {choice!r}; accepted: {', '.join(CHOICES)}.")
    if choice == "fast":
        require("numba", "fast")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before
