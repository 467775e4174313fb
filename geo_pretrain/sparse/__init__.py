"""The sparse convolution engine: coordinates, kernel maps, layers; nothing to compile."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geo_pretrain.sparse.backend import use
    from geo_pretrain.sparse.coordinates import Voxels, voxelize
    from geo_pretrain.sparse.tensor import SparseTensor, cat

_HOMES = {
    "Voxels": "coordinates",
    "voxelize": "coordinates",
    "use": "backend",
    "SparseTensor": "tensor",
    "cat": "tensor",
}

__all__ = ["SparseTensor", "Voxels", "cat", "use", "voxelize"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"geo_pretrain.sparse.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'geo_pretrain.sparse' has no attribute {name!r}; public names: {', '.join(__all__)}.")
