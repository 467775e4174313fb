"""Numbers of spconv itself: random kernels in its own layout, run by its own layers.

`python -m tests.convert.spconv_reference`, where spconv can be imported, writes tests/data/spconv_ops.safetensors
(stored: spconv 2.3.8, CPU). Coordinates are (batch, z, y, x), as spconv's documents name the columns of `indices`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).resolve().parents[1] / "data"


def layers(coords: Tensor, feats: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's outputs for weights "subm" (kernel 3), "point" (1), "down" (2, stride 2), "up" (its inverse)."""
    import spconv.pytorch as spconv

    def load(layer: torch.nn.Module, weight: Tensor) -> torch.nn.Module:
        assert layer.weight.shape == weight.shape
        layer.weight.data.copy_(weight)
        return layer

    shape = [int(extent) // 2 * 2 + 2 for extent in coords[:, 1:].amax(dim=0)]
    x = spconv.SparseConvTensor(feats, coords.int(), shape, int(coords[:, 0].max()) + 1)
    chans = {name: (weight.shape[4], weight.shape[0]) for name, weight in weights.items()}
    with torch.no_grad():
        subm = load(spconv.SubMConv3d(*chans["subm"], 3, bias=False), weights["subm"])(x)
        point = load(spconv.SubMConv3d(*chans["point"], 1, bias=False), weights["point"])(x)
        down = load(spconv.SparseConv3d(*chans["down"], 2, 2, bias=False, indice_key="d"), weights["down"])(x)
        up = load(spconv.SparseInverseConv3d(*chans["up"], 2, indice_key="d", bias=False), weights["up"])(down)
    assert torch.equal(up.indices, x.indices)
    return {
        "subm.out": subm.features,
        "point.out": point.features,
        "down.out": down.features,
        "down.coords": down.indices,
        "up.out": up.features,
    }


def inputs() -> dict[str, Tensor]:
    """About 120 voxels of two scenes in a 5 x 6 x 7 box, four features each, and kernels."""
    generator = torch.Generator().manual_seed(0)
    occupied = torch.rand(2, 5, 6, 7, generator=generator) < 0.3
    coords = occupied.nonzero().int().contiguous()
    shapes = {"subm": (3, 3, 3, 3, 4), "point": (3, 1, 1, 1, 4), "down": (5, 2, 2, 2, 4), "up": (3, 2, 2, 2, 5)}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {"coords": coords, "feats": torch.randn(len(coords), 4, generator=generator), **weights}


if __name__ == "__main__":
    given = inputs()
    weights = {key.removesuffix(".weight"): value for key, value in given.items() if key.endswith(".weight")}
    save_file({**given, **layers(given["coords"], given["feats"], weights)}, DATA / "spconv_ops.safetensors")
