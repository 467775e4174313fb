"""Input contracts: the expected input of a network, stored with the weights; they build the input transform.

A contract is to this package what `pretrained_cfg` is to timm.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from geo_pretrain.errors import InputError
from geo_pretrain.inputs import as_float, check_extents, to_batch, to_features, to_image, to_points

if TYPE_CHECKING:
    from torch import Tensor

    from geo_pretrain.sparse.coordinates import Voxels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear")
COLORS = {"R", "G", "B", "grey"}
COORDINATES = {"cartesian": "one edge in meters", "cylindrical": "three edges in meters, degrees, meters"}


@dataclass(frozen=True)
class Contract:
    """The form in which both contracts are stored."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types; `contract_from_dict` converts back."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build a contract from its `to_dict` form. Raises ValueError for unknown, missing or impossible entries."""
        names = {"kind", *(field.name for field in fields(cls))}
        if set(data) != names or data["kind"] != cls.kind:
            missing, extra = sorted(names - set(data)), sorted(set(data) - names)
            raise ValueError(
                f"not a contract of kind {cls.kind!r}: missing {missing}, unknown {extra}, kind {data.get('kind')!r}."
            )
        return cls(**{key: value for key, value in data.items() if key != "kind"})


@dataclass(frozen=True)
class ImageContract(Contract):
    """The input of an image network: channels in order, value range, mean and std, size (H, W) of pre-training."""

    kind: ClassVar = "image"
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

    def transforms(self, *, resize: bool = True) -> ImageTransform:
        """The transform of this contract; `resize=False` keeps the image's own size."""
        return ImageTransform(self, resize)

    def doubt(self, span: tuple[float, float]) -> str | None:
        """Say why images with values in `span` (least, greatest) cannot be normalized; None if they can.

        Augmented ones may leave the range by as much as it spans, noise by 5.
        """
        if not set(self.channels) <= COLORS:
            return None
        low = min((self.value_range[0] - mean) / std for mean, std in zip(self.mean, self.std, strict=True))
        high = max((self.value_range[1] - mean) / std for mean, std in zip(self.mean, self.std, strict=True))
        slack = max(high - low, 5.0)
        if low - slack <= span[0] and span[1] <= high + slack:
            return None
        what = "pixels from 0 to 255 that were not normalized" if span[0] >= 0 else "images of another normalization"
        return (
            f"the values given span [{span[0]:.4g}, {span[1]:.4g}] instead of about [{low:.2g}, {high:.2g}]: {what}? "
            "network(network.transforms(images)) of uint8 or of floats in [0, 1] makes them right."
        )

    def with_channels(self, count: int) -> ImageContract:
        """The contract of a network with its stem adapted to `count` channels; new ones take the average statistics."""
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
    """Turns an image into the network's normalized float input. Plain data, so that it can be sent to workers."""

    contract: ImageContract
    resize: bool = True

    def __call__(self, image: Any) -> Tensor:
        """Convert a PIL image, uint8 [H, W, C] array or tensor [(B,) C, H, W] to float32 [(B,) C, h, w].

        Refuses floats outside [0, 1]: such an image was normalized already or is on a 0-255 scale.
        """
        pixels = to_image(image, len(self.contract.channels))
        if self.resize:
            pixels = _resize(pixels, self.contract)
        scaled = as_float(pixels)
        mean, std = (scaled.new_tensor(values)[:, None, None] for values in (self.contract.mean, self.contract.std))
        return (scaled - mean) / std


@dataclass(frozen=True)
class VoxelContract(Contract):
    """The input of a sparse 3D network: voxel edge, feature channels by name, their scaling, kind of coordinates.

    A channel named "one" is constant 1; every other is `raw * scale + offset`, where raw colors ("R", "G", "B",
    "grey") lie in [0, 1]. `voxel_size` is one edge in meters or, for "cylindrical" coordinates (radius, azimuth, z),
    three: meters, degrees, meters. A voxel's features are those of its first point or the mean (`reduce`).
    """

    kind: ClassVar = "voxel"
    voxel_size: float | tuple[float, float, float]
    channels: tuple[str, ...] = ("one", "one", "one")
    scale: float = 1.0
    offset: float = 0.0
    coordinates: Literal["cartesian", "cylindrical"] = "cartesian"
    reduce: Literal["first", "mean"] = "first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not isinstance(self.voxel_size, (int, float)):
            object.__setattr__(self, "voxel_size", tuple(self.voxel_size))
        if self.coordinates not in COORDINATES:
            raise ValueError(f"coordinates are {self.coordinates!r}; accepted: {', '.join(COORDINATES)}.")
        wanted = COORDINATES[self.coordinates]
        sizes = self.voxel_size if isinstance(self.voxel_size, tuple) else (self.voxel_size,)
        if len(sizes) != (1 if self.coordinates == "cartesian" else 3) or min(sizes) <= 0:
            raise ValueError(f"voxel_size is {self.voxel_size!r}; accepted for {self.coordinates} ones: {wanted}.")
        if not self.channels or not all(isinstance(name, str) and name for name in self.channels):
            raise ValueError(f"channels are {self.channels!r}; accepted: one name a channel, such as 'R' or 'one'.")
        if self.scale == 0:
            raise ValueError("scale is 0; accepted: any other number.")
        if self.reduce not in ("first", "mean"):
            raise ValueError(f"reduce is {self.reduce!r}; accepted: 'first', 'mean'.")

    def __str__(self) -> str:
        if isinstance(self.voxel_size, tuple):
            size = "{:g} m x {:g} degree x {:g} m (radius, azimuth, z)".format(*self.voxel_size)
        else:
            size = f"{self.voxel_size * 100:g} cm"
        names = self.given_channels
        if not names:
            return f"voxels: {size}, features constant 1 ({len(self.channels)} channels)"
        order = "".join(names) if max(map(len, names)) == 1 else "+".join(names)
        ones = len(self.channels) - len(names)
        text = order + (" in [0, 1]" if set(names) <= COLORS else "") + self.scaling
        text += f", {ones} x constant 1" if ones else ""
        whose = "a voxel's first point" if self.reduce == "first" else "the mean of a voxel's points"
        return f"voxels: {size}, {text}, of {whose}"

    @property
    def given_channels(self) -> tuple[str, ...]:
        """The channels that the caller gives: all but the constant ones."""
        return tuple(name for name in self.channels if name != "one")

    @property
    def scaling(self) -> str:
        """The scaling of raw channels as a text, such as " * 2 - 0.5"; "" where there is none."""
        scale = f" * {self.scale:g}" if self.scale != 1 else ""
        return scale + (f" {'-' if self.offset < 0 else '+'} {abs(self.offset):g}" if self.offset else "")

    def transforms(self) -> VoxelTransform:
        """The transform of this contract: points to voxels."""
        return VoxelTransform(self)

    def with_channels(self, count: int) -> VoxelContract:
        """The contract of a network with its stem adapted to `count` channels; new ones are scaled as the others."""
        have = len(self.channels)
        if count == have:
            return self
        if not self.given_channels:
            return replace(self, channels=("one",) * count)
        if count > have:
            return replace(self, channels=(*self.channels, *(f"extra{i}" for i in range(count - have))))
        gray = count == 1 and set(self.channels) <= COLORS
        return replace(self, channels=("grey",) if gray else tuple(f"channel{i}" for i in range(count)))

    def scaled(self, raw: Tensor) -> Tensor:
        """Scale the given channels [N, given], colors from 0 to 1, and fill in constant ones: float32 [N, C]."""
        import torch

        feats = torch.ones(len(raw), len(self.channels), dtype=torch.float32, device=raw.device)
        given = [index for index, name in enumerate(self.channels) if name != "one"]
        feats[:, given] = raw.to(torch.float32) * self.scale + self.offset
        return feats

    def doubt(self, feats: Tensor) -> str | None:
        """Say why features [N, C] cannot come from this contract's transform; None if they can.

        Pre-training adds a little noise to the features, so that 0.1 beyond the range is accepted.
        """
        low, high = feats.aminmax(dim=0)
        values = list(zip(self.channels, low.tolist(), high.tolist(), strict=True))
        ones = [value for value in values if value[0] == "one"]
        if any(not (least > 0.5 and most < 1.5) for _, least, most in ones):
            return f"the features given are not constant 1 but span {_span(ones)}."
        start, end = sorted((self.offset, self.offset + self.scale))
        colors = [value for value in values if value[0] in COLORS]
        if any(not (least >= start - 0.1 and most <= end + 0.1) for _, least, most in colors):
            return f"the colors given span {_span(colors)} instead of [{start:g}, {end:g}]; .transforms scales them."
        given = [value for value in values if value[0] != "one"]
        if given and len(feats) > 1 and all(least == most == given[0][1] for _, least, most in given):
            return f"all features given are {given[0][1]:g}."
        return None


@dataclass(frozen=True)
class VoxelTransform:
    """Turns points into the voxels of the network's input. Plain data, so that it can be sent to workers."""

    contract: VoxelContract

    def __call__(self, points: Any, features: Any = None, *, batch: Any = None) -> Voxels:
        """Voxelize points [N, 3] in meters with `features` [N, C], arrays or tensors, and scale the features.

        Colors are uint8 or float in [0, 1], other features float; networks trained on ones take None. `batch` [N]
        holds the number of the cloud that each point belongs to. Values that were scaled already, features for a
        network without, and points that look like millimeters raise ValueError.
        """
        from geo_pretrain.sparse.coordinates import voxelize

        contract = self.contract
        points = to_points(points, together=batch is None)
        feats = _to_features(features, points, contract)
        if batch is not None:
            batch = to_batch(batch, points)
            check_extents(points, batch)
        if isinstance(contract.voxel_size, tuple):
            _warn_if_far(points, min(contract.voxel_size[0], contract.voxel_size[2]))
            cells = _cylinder(points) / points.new_tensor(contract.voxel_size)
            return voxelize(cells, feats, 1.0, reduce=contract.reduce, batch=batch)
        _warn_if_far(points, contract.voxel_size)
        return voxelize(points, feats, contract.voxel_size, reduce=contract.reduce, batch=batch)


def contract_from_dict(data: Mapping[str, Any]) -> ImageContract | VoxelContract:
    """Build an image or voxel contract from its `to_dict` form. Raises ValueError when it is neither."""
    kinds: dict[str, type[ImageContract] | type[VoxelContract]] = {"image": ImageContract, "voxel": VoxelContract}
    kind = data.get("kind")
    if kind not in kinds:
        raise ValueError(f"contract kind is {kind!r}; accepted: {', '.join(kinds)}.")
    return kinds[kind].from_dict(data)


def _warn_if_far(points: Tensor, voxel_size: float) -> None:
    """Warn of points so far from the origin that their type rounds them by more than an eighth of a voxel."""
    import torch

    farthest = float(points.abs().max())
    if farthest * torch.finfo(points.dtype).eps > voxel_size / 8:
        warnings.warn(
            f"The points lie up to {farthest:.4g} m from the origin, where {points.dtype} rounds them by more than an "
            f"eighth of a voxel of {voxel_size:g} m: features are wrong. Subtract an offset, such as the cloud's first "
            "point, in float64 first, or give float64 points.",
            stacklevel=4,
        )


def _to_features(features: Any, points: Tensor, contract: VoxelContract) -> Tensor:
    """The features the network sees for every point: float [N, C], scaled, constant channels filled in."""
    import torch

    names = contract.given_channels
    if names:
        return contract.scaled(to_features(features, points, names, COLORS))
    if features is not None:
        raise InputError(
            "This network was trained on constant features; accepted: features=None. To fine-tune on others, set "
            "network.contract to a VoxelContract that names them."
        )
    return torch.ones(len(points), len(contract.channels), dtype=torch.float32, device=points.device)


def _cylinder(points: Tensor) -> Tensor:
    """Convert (x, y, z) m to cylindrical (radius in m, azimuth in degrees within [-180, 180], z in m)."""
    import torch

    x, y, z = points.unbind(dim=1)
    return torch.stack([torch.sqrt(x * x + y * y), torch.rad2deg(torch.atan2(y, x)), z], dim=1)


def _span(values: Iterable[tuple[str, float, float]]) -> str:
    _, lows, highs = zip(*values, strict=True)
    return f"[{min(lows):.4g}, {max(highs):.4g}]"


def image_pixels(image: Any, call: str = "transforms") -> Any:
    """Convert one image, as `ImageTransform` takes it, to numpy uint8 [H, W, 3] RGB. Raises `InputError` for others."""
    import torch

    pixels = to_image(image, 3, call)
    if pixels.ndim != 3:
        raise InputError(
            f"Got a batch of shape {tuple(pixels.shape)}; accepted is one image [3, H, W], or a list: list(images)."
        )
    if pixels.dtype != torch.uint8:
        pixels = (pixels.detach().float() * 255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous().cpu().numpy()


def _resize(pixels: Tensor, contract: ImageContract) -> Tensor:
    """Resize to the contract's size. "nearest" takes the pixel under the center, as Pillow and Pri3D do."""
    import torch
    from torch.nn import functional as F

    height, width = pixels.shape[-2:]
    if (height, width) == contract.size:
        return pixels
    if contract.interpolation == "nearest":
        rows, columns = _under_centers(height, contract.size[0]), _under_centers(width, contract.size[1])
        chosen = pixels.index_select(-2, torch.tensor(rows, device=pixels.device))
        return chosen.index_select(-1, torch.tensor(columns, device=pixels.device))
    scaled = pixels if pixels.dtype == torch.float64 else as_float(pixels)
    batch = scaled if scaled.ndim == 4 else scaled[None]
    resized = F.interpolate(batch, size=contract.size, mode="bilinear", antialias=True)
    return resized if pixels.ndim == 4 else resized[0]


def _under_centers(source: int, target: int) -> list[int]:
    """The source pixel under the center of each of `target` pixels, by Pillow's NEAREST rule.

    Positions are summed up step by step in double precision as Pillow does, so that ties fall the same way. Training
    data are resized by `geometry.nearest_indices`, which differs at ties; weights and stored numbers depend on both.
    """
    step = source / target
    positions = accumulate([step * 0.5] + [step] * (target - 1))
    return [min(int(position), source - 1) for position in positions]
