"""Whether a device and a type of numbers can be used, told before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_request(dtype: Any, device: Any, accepted: Sequence[Any]) -> None:
    """Raise ValueError for a type of weights that is not `accepted`, or a device that is not there; None is neither."""
    if device is not None and (fault := device_fault(device)) is not None:
        raise ValueError(fault)
    if dtype not in (None, *accepted):
        names = [str(one) for one in accepted]
        hint = f" Write torch.{dtype}, without quotes." if f"torch.{dtype}" in names else ""
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(names)}.{hint}")


def device_fault(device: Any) -> str | None:
    """Why `device` ("cuda:1", a torch.device) cannot be used on this machine, and what can; None if it can."""
    import torch

    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        return f"Device {device!r} is none that torch knows; accepted: cpu, cuda, cuda:N."
    if chosen.type in ("cpu", "meta") or (chosen.type != "cuda" and _is_there(chosen)):
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) < count:
        return None
    there = ", ".join(["cpu", *(f"cuda:{k}" for k in range(count))])
    if chosen.type != "cuda":
        return f"Device {str(device)!r}: torch has none here; accepted: {there}."
    return f"Device {str(device)!r}: torch sees {count} GPUs here; accepted: {there}."


def _is_there(device: Any) -> bool:
    """Whether torch can put a tensor on a device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):  # NotImplementedError is a RuntimeError
        return False
    return True
