"""Entry points for torch.hub: one for each catalog name, with the arguments of `load_backbone`.

torch.hub.load(REPO, "pri3d_view_r18.rooms", source="local", trust_repo=True, pretrained=False)
"""

from __future__ import annotations

import functools as _functools
from typing import Any as _Any

from geo_pretrain.catalog import CATALOG as _CATALOG
from geo_pretrain.catalog import RENAMED as _RENAMED

dependencies = ["torch", "torchvision", "numpy", "safetensors", "huggingface_hub", "PIL", "xxhash", "filelock"]
dependencies += ["rich", "yaml"]  # a download's progress, an authors' file's card


def _entrypoint(name: str, **kwargs: _Any) -> _Any:
    from geo_pretrain.loading import load_backbone

    return load_backbone(name, **kwargs)


for _name, _entry in _CATALOG.items():
    _function = _functools.partial(_entrypoint, _name)
    _function.__doc__ = f"{_entry.description} ({_entry.arch}). Keyword arguments: those of load_backbone."
    globals()[_name] = _function  # names with a dot too: torch.hub looks them up as strings

for _old in _RENAMED:  # they warn when called
    globals()[_old] = _functools.partial(_entrypoint, _old)
