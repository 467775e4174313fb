"""Base classes of the networks: name, input contract and load report beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from geo_pretrain.contract import ImageContract, ImageTransform, VoxelContract


class Backbone(nn.Module):
    """Base class of all networks. `load_backbone` fills the attributes; a network built by hand leaves them None."""

    name: str | None = None
    contract: ImageContract | VoxelContract | None = None
    load_report: Any = None  # a loading.LoadReport; that module imports this one

    def extra_repr(self) -> str:
        """Name and contract, for `repr(model)`."""
        return ", ".join(str(part) for part in (self.name, self.contract) if part is not None)


class ImageBackbone(Backbone):
    """Base class of the networks that take images."""

    contract: ImageContract | None

    @property
    def transforms(self) -> ImageTransform:
        """The callable that turns an image into this network's input: resizes and normalizes as in pre-training."""
        if self.contract is None:
            # not an AttributeError: nn.Module would hide it behind "has no attribute 'transforms'"
            raise RuntimeError(
                "This network was built without a contract, so its transforms are unknown. "
                "Networks from load_backbone carry one."
            )
        return self.contract.transforms()
