"""Base classes of the networks: name, input contract and load report beside the weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from geo_pretrain.inputs import caller_level, look_at

if TYPE_CHECKING:
    from geo_pretrain.backbones.encoder import Stages
    from geo_pretrain.contract import ImageContract, ImageTransform, VoxelContract

T = TypeVar("T")


class Backbone(nn.Module):
    """Base class of all networks. `load_backbone` fills the attributes; a network built by hand leaves them None."""

    name: str | None = None
    contract: ImageContract | VoxelContract | None = None
    load_report: Any = None  # a loading.LoadReport; that module imports this one
    _looked = False  # at the values of an input
    _doubted = False  # that an input fits the contract

    def _warn(self, doubt: str | None) -> None:
        """Warn at the caller's line of input that does not fit the contract."""
        if doubt is not None:
            warnings.warn(f"{self.name or 'This network'} expects {self.contract}; {doubt}", stacklevel=caller_level())

    def extra_repr(self) -> str:
        """Name and contract, for `repr(model)`."""
        return ", ".join(str(part) for part in (self.name, self.contract) if part is not None)


def choose_maps(maps: Sequence[T], indices: int | Sequence[int] | None) -> list[T]:
    """Select maps for `forward_intermediates`: at the given indices, the last n for a number n, all for None."""
    count = len(maps)
    if indices is None:
        return list(maps)
    wanted: Any = range(count)[-indices:] if isinstance(indices, int) and 0 < indices <= count else indices
    right = isinstance(wanted, Sequence) and all(
        isinstance(index, int) and not isinstance(index, bool) and -count <= index < count for index in wanted
    )
    if not right:
        accepted = f"None, a number of maps from 1 to {count}, or a list of indices from 0 to {count - 1}"
        raise ValueError(f"indices is {indices!r}; accepted: {accepted}.")
    return [maps[index] for index in wanted]


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

    def __dir__(self) -> list[str]:
        """Without a contract there are no transforms: torch.jit.trace reads all that is listed."""
        return [name for name in super().__dir__() if name != "transforms" or self.contract is not None]

    def look_at(self, x: Tensor) -> None:
        """Look at the values of images; see `inputs.look_at`."""
        look_at(self, x)


class FeatureEncoder(ImageBackbone):
    """Base class of the networks whose `forward` gives a pyramid of maps."""

    feature_info: list[dict[str, Any]]  # of each map, finest first: "num_chs", "reduction" (its stride), "module"
    in_chans: int
    output_stride: int  # of the last map

    if TYPE_CHECKING:  # nn.Module's own says Any

        def __call__(self, x: Tensor) -> list[Tensor]: ...

        def stages(self) -> Stages: ...

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> Any:
        """The last map and those of `forward` (`indices`: see `choose_maps`), under timm's name."""
        maps = self(x)
        intermediates = choose_maps(maps, indices)
        return intermediates if intermediates_only else (maps[-1], intermediates)


class EncoderDecoder(ImageBackbone):
    """Base class of the networks with an encoder, `.encoder`, and a decoder of dense features, `.decoder`."""

    encoder: Any
    out_chans: int

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The encoder's maps."""
        info: list[dict[str, Any]] = self.encoder.feature_info
        return info

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_chans, H, W], normalized -> dense features [B, out_chans, ...]; their size: see the network."""
        return self._dense(self._maps(x), x)

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> Any:
        """The dense features and the encoder's maps (`indices`: see `choose_maps`), under timm's name."""
        maps = self._maps(x)
        intermediates = choose_maps(maps, indices)
        return intermediates if intermediates_only else (self._dense(maps, x), intermediates)

    def _maps(self, x: Tensor) -> Any:
        """The encoder's maps. It checks the images, and has no contract: the whole network has."""
        maps = self.encoder(x)
        if not self._doubted:
            self.look_at(x)
        return maps

    def _dense(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:
        """The decoder's map for the encoder's maps of the images `x`."""
        raise NotImplementedError
