"""Backbones pre-trained with 3D geometry: names become networks with weights. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geo_pretrain.advice import recommend
    from geo_pretrain.catalog import backbone_info, list_backbones
    from geo_pretrain.loading import (
        load_backbone,
        load_image_encoder,
        load_image_unet,
        load_pair,
        load_point_unet,
        verify,
    )
    from geo_pretrain.sparse.coordinates import voxelize
    from geo_pretrain.training.finetune.load import load_finetuned

__version__ = "0.1.0"
__all__ = [
    "backbone_info",
    "list_backbones",
    "load_backbone",
    "load_finetuned",
    "load_image_encoder",
    "load_image_unet",
    "load_pair",
    "load_point_unet",
    "recommend",
    "verify",
    "voxelize",
]

_LOADERS = ("load_backbone", "load_image_encoder", "load_image_unet", "load_pair", "load_point_unet", "verify")
_HOMES = {
    **dict.fromkeys(_LOADERS, "geo_pretrain.loading"),
    "backbone_info": "geo_pretrain.catalog",
    "list_backbones": "geo_pretrain.catalog",
    "load_finetuned": "geo_pretrain.training.finetune.load",
    "recommend": "geo_pretrain.advice",
    "voxelize": "geo_pretrain.sparse.coordinates",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
