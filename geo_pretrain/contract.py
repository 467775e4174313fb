"""What a network expects as input, as data: it is stored with the weights and becomes the network's transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear")
ACCEPTED = "a PIL image, uint8 [H, W, C] numpy, or a tensor [C, H, W] or [B, C, H, W], uint8 or float in [0, 1]"


@dataclass(frozen=True)
class ImageContract:
    """Channels in order, value range before normalisation, mean and std in that range, size (H, W) of pre-training."""

    channels: tuple[str, ...] = ("R", "G", "B")
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] = (240, 320)
    interpolation: str = "nearest"

    def __post_init__(self) -> None:
        for name in ("channels", "value_range", "mean", "std", "size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists when read from a file
        if not len(self.channels) == len(self.mean) == len(self.std):
            raise ValueError(f"channels, mean and std must have equal lengths; got {self}.")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; accepted: positive numbers.")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size}; accepted: (height, width) in pixels.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; accepted: {', '.join(INTERPOLATIONS)}.")
        if self.value_range != (0.0, 1.0):
            raise ValueError(f"value_range is {self.value_range}; accepted: (0.0, 1.0).")

    def __str__(self) -> str:
        order = "".join(self.channels) if max(map(len, self.channels)) == 1 else "+".join(self.channels)
        mean, std = (f"({', '.join(f'{value:g}' for value in values)})" for values in (self.mean, self.std))
        return (
            f"images: {order} in [{self.value_range[0]:g}, {self.value_range[1]:g}], mean {mean}, std {std}, "
            f"pre-trained at {self.size[0]}x{self.size[1]} (HxW, {self.interpolation} resize)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `contract_from_dict` is the way back."""
        return {"kind": "image", **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageContract:
        """Raises ValueError for unknown, missing or impossible entries."""
        return cls(**_checked_keys(cls, data, "image"))

    def transforms(self, *, resize: bool = True) -> ImageTransform:
        """The transform of this contract; `resize=False` keeps the image's own size."""
        return ImageTransform(self, resize)

    def with_channels(self, count: int) -> ImageContract:
        """The contract after the stem was adapted to `count` channels: new ones take the average statistics."""
        if count == len(self.channels):
            return self
        mean, std = sum(self.mean) / len(self.mean), sum(self.std) / len(self.std)
        if count < len(self.channels):
            names = ("grey",) if count == 1 else tuple(f"channel{i}" for i in range(count))
            return replace(self, channels=names, mean=(mean,) * count, std=(std,) * count)
        extra = count - len(self.channels)
        names = (*self.channels, *(f"extra{i}" for i in range(extra)))
        return replace(self, channels=names, mean=(*self.mean, *(mean,) * extra), std=(*self.std, *(std,) * extra))


@dataclass(frozen=True)
class ImageTransform:
    """An image in, the network's normalised float input out. Plain data, so data-loader workers can receive it."""

    contract: ImageContract
    resize: bool = True

    def __call__(self, image: Any) -> Tensor:
        """A PIL image, uint8 [H, W, C] array or tensor [C, H, W] / [B, C, H, W] -> float32 [C, h, w] / [B, C, h, w].

        Refuses floats outside [0, 1]: such an image was normalised already or is on a 0-255 scale.
        """
        import torch

        pixels = _to_tensor(image, len(self.contract.channels))
        if self.resize:
            pixels = _resize(pixels, self.contract)
        scaled = pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels.to(torch.float32)
        mean, std = (scaled.new_tensor(values)[:, None, None] for values in (self.contract.mean, self.contract.std))
        return (scaled - mean) / std


@dataclass(frozen=True)
class VoxelContract:
    """What a sparse 3D network expects: voxel edge in metres, feature channels by name, their scaling, coordinates."""

    voxel_size: float
    channels: tuple[str, ...]
    scaling: str  # in words, such as "colour / 255 - 0.5"
    coordinates: str = "floor(x / voxel_size), int32 rows (batch, x, y, z)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.voxel_size <= 0:
            raise ValueError(f"voxel_size is {self.voxel_size}; accepted: metres above 0.")
        if not self.channels or not self.scaling:
            raise ValueError(f"channels and scaling must not be empty; got {self}.")

    def __str__(self) -> str:
        return f"voxels: {self.voxel_size * 100:g} cm, {'+'.join(self.channels)} ({self.scaling}), {self.coordinates}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `contract_from_dict` is the way back."""
        return {"kind": "voxel", **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VoxelContract:
        """Raises ValueError for unknown, missing or impossible entries."""
        return cls(**_checked_keys(cls, data, "voxel"))


def contract_from_dict(data: Mapping[str, Any]) -> ImageContract | VoxelContract:
    """Either contract from its `to_dict` form. Raises ValueError when it is neither."""
    kinds: dict[str, type[ImageContract] | type[VoxelContract]] = {"image": ImageContract, "voxel": VoxelContract}
    kind = data.get("kind")
    if kind not in kinds:
        raise ValueError(f"contract kind is {kind!r}; accepted: {', '.join(kinds)}.")
    return kinds[kind].from_dict(data)


def _checked_keys(cls: type, data: Mapping[str, Any], kind: str) -> dict[str, Any]:
    fields = {"kind", *cls.__dataclass_fields__}  # type: ignore[attr-defined]
    if set(data) != fields or data["kind"] != kind:
        missing, extra = sorted(fields - set(data)), sorted(set(data) - fields)
        raise ValueError(f"not an {kind} contract: missing {missing}, unknown {extra}, kind {data.get('kind')!r}.")
    return {key: value for key, value in data.items() if key != "kind"}


def _to_tensor(image: Any, chans: int) -> Tensor:
    """Any accepted image as a tensor [C, H, W] or [B, C, H, W], uint8 or float in [0, 1]; ValueError otherwise."""
    import numpy as np
    import torch

    if hasattr(image, "mode") and hasattr(image, "convert"):  # PIL, without importing it
        image = _from_pil(image, chans)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != chans:
            raise ValueError(f"Got a numpy array {image.dtype} {image.shape}; accepted, with C = {chans}: {ACCEPTED}.")
        return torch.from_numpy(image.transpose(2, 0, 1).copy())
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"Got {type(image).__name__}; accepted, with C = {chans}: {ACCEPTED}.")
    if image.ndim not in (3, 4) or image.shape[-3] != chans:
        raise ValueError(f"Got a tensor of shape {tuple(image.shape)}; accepted, with C = {chans}: {ACCEPTED}.")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"Got a tensor of {image.dtype}; accepted: {ACCEPTED}.")
    low, high = (float(bound) for bound in torch.aminmax(image))
    if not (low >= 0 and high <= 1):  # so written, NaN is refused too
        raise ValueError(
            f"Float images must lie in [0, 1]; this one spans [{low:.4g}, {high:.4g}]. "
            "Below 0 it was probably normalised already; up to 255 it needs dividing by 255 (or pass uint8)."
        )
    return image


def _from_pil(image: Any, chans: int) -> Any:
    import numpy as np

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"Got a PIL image of mode {image.mode!r} (16 bit or float); accepted: 8-bit images.")
    if chans not in (1, 3):
        raise ValueError(f"A PIL image cannot give {chans} channels; accepted here: numpy or tensors with C = {chans}.")
    pixels = np.asarray(image.convert("RGB" if chans == 3 else "L"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _resize(pixels: Tensor, contract: ImageContract) -> Tensor:
    """To the contract's size. "nearest" takes the pixel under the centre, as Pillow (and so Pri3D's loader) does."""
    import torch
    from torch.nn import functional as F

    height, width = pixels.shape[-2:]
    if (height, width) == contract.size:
        return pixels
    if contract.interpolation == "nearest":
        rows, columns = _under_centres(height, contract.size[0]), _under_centres(width, contract.size[1])
        chosen = pixels.index_select(-2, torch.tensor(rows, device=pixels.device))
        return chosen.index_select(-1, torch.tensor(columns, device=pixels.device))
    scaled = pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels
    batch = scaled if scaled.ndim == 4 else scaled[None]
    resized = F.interpolate(batch, size=contract.size, mode="bilinear", antialias=True)
    return resized if pixels.ndim == 4 else resized[0]


def _under_centres(source: int, target: int) -> list[int]:
    """For each of `target` pixels the source pixel under its centre.

    The positions are summed up step by step in double precision as Pillow does, so that ties fall the same way.
    """
    step = source / target
    positions = accumulate([step * 0.5] + [step] * (target - 1))
    return [min(int(position), source - 1) for position in positions]
