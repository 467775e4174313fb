"""The interface of 2D encoders: an image in, a pyramid of feature maps out, stages by name.

Start weights, teachers, adapters and fine-tuning use encoders through this protocol and know no particular network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

HOST_WIDTH = 64  # channels of the stem of the ResNets in torchvision, timm and segmentation-models-pytorch

Stages: TypeAlias = "list[tuple[str, list[nn.Module]]]"


@runtime_checkable
class ImageEncoder(Protocol):
    """A 2D encoder. `ResNetEncoder` is one."""

    feature_info: list[dict[str, Any]]  # of each map, finest first: "num_chs", "reduction" (its stride), "module"
    in_chans: int
    output_stride: int  # of the last map
    host_name: str | None  # the network with the same tensors in torchvision and timm, "resnet18"; None: they have none

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, in_chans, H, W], normalized -> maps [B, C, H / stride, W / stride], finest first."""

    def stages(self) -> Stages:
        """List name and modules of each stage, stem first; freezing, dilation and learning rates apply per stage."""
