"""Downstream tasks: fine-tuning by the papers' protocols, sweeps, reports, and loading a finished run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geo_pretrain.training.finetune.load import load_finetuned as load_finetuned

__all__ = ["load_finetuned"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    from geo_pretrain.training.finetune.load import load_finetuned

    return load_finetuned
