"""Build networks from an `Arch`, and compute golden values, which show whether a network's outputs have changed.

A golden file holds a small seeded input and the outputs of a network in evaluation mode. Written with the weights, it
is recomputed by `loading.verify`, on another machine, after a transfer or years later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geo_pretrain.backbones.architectures import Arch, encoder_arch
from geo_pretrain.backbones.base import ImageBackbone
from geo_pretrain.backbones.encoder import HOST_WIDTH
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import CheckpointError
from geo_pretrain.sparse.tensor import SparseTensor

GOLDEN_SIZE = (64, 96)  # pixels: all five strides, and still small on disk
GOLDEN_VOXELS, GOLDEN_EXTENT = 800, 8  # random voxels in a cube from -extent to extent


def build(
    arch: Arch,
    *,
    decoder: bool = False,
    in_chans: int | None = None,
    out_indices: Sequence[int] | None = None,
    output_stride: int = 32,
) -> Any:
    """Build the network of an `Arch` with random weights; without `decoder` only its encoder, where it has one.

    Arguments that do not fit its class raise `CheckpointError`.
    """
    built = arch if decoder else arch.encoder_alone
    args = dict(built.args) | ({} if in_chans is None else {"in_chans": in_chans})
    if not (arch.in_one_piece or decoder):
        args |= {"output_stride": output_stride} | ({} if out_indices is None else {"out_indices": out_indices})
    try:
        return built.architecture.load_class()(**args)
    except TypeError as error:
        raise CheckpointError(f"{arch} cannot be built: {error}") from error


def build_encoder(name: str, *, width: int = HOST_WIDTH, **options: Any) -> Any:
    """Build a randomly initialized `ImageEncoder` by its name, "resnet18" or "timm/NAME"; `options`: those of `build`.

    Raises `UnknownName`.

    >>> [info["num_chs"] for info in build_encoder("resnet18").feature_info]
    [64, 64, 128, 256, 512]
    """
    return build(encoder_arch(name, width=width), **options)


def network_states(arch: Arch) -> dict[str, dict[str, Tensor]]:
    """A network's state dict for each role, on the meta device; converters compare files with it."""
    with torch.device("meta"):
        network = build(arch, decoder=arch.has_decoder)
    if not arch.has_decoder:
        return {arch.roles[0]: network.state_dict()}
    return {role: network.get_submodule(role).state_dict() for role in arch.roles}


def golden_values(network: nn.Module, *, ones: bool = False, offset: float = -0.5) -> dict[str, Tensor]:
    """Draw a seeded input and compute the outputs of `network`, which is float32, on the CPU and in evaluation mode.

    Images: "input" [1, C, 64, 96], or of the only size that it takes; "encoder.0" to "encoder.4", the encoder's maps;
    and, where there is one, "decoder". Points:
    "input.coords" [N, 4], "input.feats" [N, C] from `offset` to `offset` + 1 (`ones`: constant 1), "output" [N, C].
    """
    generator = torch.Generator().manual_seed(0)
    golden: dict[str, Tensor]
    if isinstance(network, SRUNet):
        shape = (GOLDEN_VOXELS, 3)
        cells = torch.randint(-GOLDEN_EXTENT, GOLDEN_EXTENT, shape, generator=generator, dtype=torch.int32)
        cells = cells.unique(dim=0)
        coords = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int32), cells], dim=1)
        size = len(coords), network.in_chans
        feats = torch.ones(size) if ones else torch.rand(size, generator=generator) + offset
        golden = {"input.coords": coords, "input.feats": feats}
    else:
        encoder: Any = getattr(network, "encoder", network)
        size = getattr(encoder, "fixed_size", None) or GOLDEN_SIZE
        golden = {"input": torch.randn((1, encoder.in_chans, *size), generator=generator)}
    return golden | golden_outputs(network, golden)


@torch.no_grad()
def golden_outputs(network: Any, golden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the outputs of `network` for the inputs in `golden`, with the names of `golden_values`."""
    if isinstance(network, SRUNet):
        return {"output": network(SparseTensor(golden["input.coords"], golden["input.feats"])).feats}
    if not isinstance(network, ImageBackbone):
        raise CheckpointError(f"No golden values are defined for {type(network).__name__}.")
    encoder: Any = getattr(network, "encoder", network)
    outputs = {f"encoder.{index}": value for index, value in enumerate(encoder(golden["input"]))}
    return outputs | ({"decoder": network(golden["input"])} if encoder is not network else {})
