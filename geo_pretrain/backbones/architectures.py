"""Table of all architectures, one row each. torch is not imported until a class is loaded.

An `Arch` is an architecture with the arguments of its constructor, as catalog entries and config.json state it.
`ENCODERS` are the names by which recipes and other libraries call image encoders, such as "resnet18"; any encoder of
timm is named "timm/NAME" and needs no row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any, Literal

from geo_pretrain.backbones.encoder import HOST_WIDTH
from geo_pretrain.backbones.timm_names import PREFIX, default_out_chans, is_timm, timm_args
from geo_pretrain.errors import unknown


@dataclass(frozen=True)
class Architecture:
    """One row of `ARCHITECTURES`: the class of a network, its weight files, its title."""

    name: str  # in catalog entries and checkpoint folders
    network: str  # "module:class" of the whole network
    modality: Literal["2d", "3d"]
    roles: tuple[str, ...]  # of the files that hold its weights; of two, the first is enough without the decoder
    stem: str  # key of the first convolution's weight in the network's state dict; "": the network's attribute `stem`
    title: str  # for people, a format string over the constructor's arguments
    defaults: Mapping[str, Any]  # of the constructor, where titles and cards need them
    tags: tuple[str, ...]  # of model cards
    encoder: str | None = None  # architecture of the encoder alone; None: it is one, or comes in one piece
    dense_stride: int = 1  # a side of the decoder's output is ceil(side of the image / this)

    def load_class(self) -> Any:
        """Import the network's class."""
        return resolve_name(self.network)


_RESNET = {"depth": 18, "width": HOST_WIDTH}
_ROWS = (
    Architecture(
        name="resnet",
        network="geo_pretrain.backbones.resnet_unet:ResNetEncoder",
        modality="2d",
        roles=("encoder",),
        stem="conv1.weight",
        title="ResNet-{depth}",
        defaults=_RESNET,
        tags=("resnet",),
    ),
    Architecture(
        name="resnet_unet",
        network="geo_pretrain.backbones.resnet_unet:ResNetUNet",
        modality="2d",
        roles=("encoder", "decoder"),
        stem="encoder.conv1.weight",
        title="ResNet-{depth} U-Net",
        defaults=_RESNET,
        tags=("resnet", "unet"),
        encoder="resnet",
        dense_stride=2,
    ),
    Architecture(
        name="resnet_depth_unet",
        network="geo_pretrain.backbones.depth_unet:ResNetDepthUNet",
        modality="2d",
        roles=("encoder", "decoder"),
        stem="encoder.conv1.weight",
        title="ResNet-{depth} depth U-Net",
        defaults=_RESNET | {"out_chans": 16},
        tags=("resnet", "unet"),
        encoder="resnet",
    ),
    Architecture(
        name="timm_encoder",
        network="geo_pretrain.backbones.timm_encoder:TimmEncoder",
        modality="2d",
        roles=("encoder",),
        stem="",
        title="timm {name}",
        defaults={},
        tags=("timm",),
    ),
    Architecture(
        name="timm_unet",
        network="geo_pretrain.backbones.timm_encoder:TimmUNet",
        modality="2d",
        roles=("encoder", "decoder"),
        stem="",
        title="timm {name} U-Net",
        defaults={},
        tags=("timm", "unet"),
        encoder="timm_encoder",
        dense_stride=2,
    ),
    Architecture(
        name="timm_depth_unet",
        network="geo_pretrain.backbones.timm_encoder:TimmDepthUNet",
        modality="2d",
        roles=("encoder", "decoder"),
        stem="",
        title="timm {name} depth U-Net",
        defaults={"out_chans": 16},
        tags=("timm", "unet"),
        encoder="timm_encoder",
    ),
    Architecture(
        name="sr_unet",
        network="geo_pretrain.backbones.sr_unet:SRUNet",
        modality="3d",
        roles=("model",),
        stem="conv0p1s1.kernel",
        title="SR-UNet{variant}",
        defaults={"variant": "34C", "out_chans": 32},
        tags=("sparse-unet", "minkowski"),
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class Arch:
    """An architecture's name, a key of `ARCHITECTURES`, and the arguments of its constructor."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ARCHITECTURES:
            raise unknown("architecture", self.name, ARCHITECTURES)
        object.__setattr__(self, "args", dict(self.args))

    def __str__(self) -> str:
        shown = self.args.items()
        if self.of_timm is not None:  # what follows from the name is left out
            shown = {key: value for key, value in shown if not isinstance(value, list | dict)}.items()
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in shown)})"

    @property
    def architecture(self) -> Architecture:
        """The row of `ARCHITECTURES`."""
        return ARCHITECTURES[self.name]

    @property
    def modality(self) -> Literal["2d", "3d"]:
        """The modality of the network's input: "2d" images or "3d" points."""
        return self.architecture.modality

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the files that hold the network's weights."""
        return self.architecture.roles

    def network_roles(self, *, decoder: bool = True) -> tuple[str, ...]:
        """`roles`, or for decoder=False only the first, which is enough for the network without decoder."""
        return self.roles if decoder else self.roles[:1]

    @property
    def has_decoder(self) -> bool:
        """Whether the network has a decoder, so that its encoder can be loaded alone."""
        return "decoder" in self.roles

    @property
    def in_one_piece(self) -> bool:
        """Whether the network has no encoder that could be loaded alone: the sparse U-Net."""
        return self.roles == ("model",)

    @property
    def encoder_alone(self) -> Arch:
        """The `Arch` of the encoder alone; of the whole network where it is an encoder or comes in one piece."""
        encoder = self.architecture.encoder
        if encoder is None:
            return self
        return replace(self, name=encoder, args={key: value for key, value in self.args.items() if key != "out_chans"})

    @property
    def of_timm(self) -> str | None:
        """The name in timm of the network's encoder; None: it is none of timm's."""
        return str(self.args.get("name")) if self.name.startswith("timm_") else None

    @property
    def maps(self) -> list[list[int]]:
        """[channels, stride] of each map of a 2D network's encoder, finest first."""
        if "maps" in self.args:
            return [list(row) for row in self.args["maps"]]
        given = {**self.architecture.defaults, **self.args}
        width, expansion = int(given["width"]), 4 if given["depth"] >= 50 else 1
        return [[width, 2], *([(width << stage) * expansion, 4 << stage] for stage in range(4))]

    @property
    def encoder_name(self) -> str | None:
        """The name in recipes of the network's encoder, of any width: in `ENCODERS`, or "timm/NAME"; None: none."""
        encoder = self.encoder_alone
        if encoder.of_timm is not None:
            return f"{PREFIX}{encoder.of_timm}"
        given = {**encoder.architecture.defaults, **encoder.args}
        for name, arch in ENCODERS.items():
            if arch.name == encoder.name and all(given.get(key) == value for key, value in arch.args.items()):
                return name
        return None

    @property
    def host_encoder(self) -> str | None:
        """The name by which torchvision and timm know a network with the encoder's tensors; None: not both do."""
        name = self.encoder_name
        return name if name in ENCODERS and self.args.get("width", HOST_WIDTH) == HOST_WIDTH else None

    @property
    def title(self) -> str:
        """A short name for people, such as "ResNet-18 U-Net" or "SR-UNet34C"."""
        values = {**self.architecture.defaults, **self.args}
        if "planes" in values:  # channels of its own, so it is no variant
            values["variant"] = ""
        width = values.get("width", HOST_WIDTH) if self.modality == "2d" else HOST_WIDTH
        return self.architecture.title.format(**values) + ("" if width == HOST_WIDTH else f", width {width}")


# name in recipes, torchvision and timm -> what it is, but for its width
ENCODERS: Mapping[str, Arch] = {f"resnet{depth}": Arch("resnet", {"depth": depth}) for depth in (18, 34, 50, 101)}


def encoder_arch(name: str, **args: Any) -> Arch:
    """Look up an encoder in `ENCODERS`, or in timm ("timm/NAME"), and add arguments such as `width`.

    Raises `UnknownName`, and ValueError for another `width` of an encoder of timm.

    >>> str(encoder_arch("resnet18", width=8))
    'resnet(depth=18, width=8)'
    """
    if is_timm(name):
        if args.pop("width", HOST_WIDTH) != HOST_WIDTH:
            raise ValueError(f"{name!r} has the width that timm gives it; accepted: the default, {HOST_WIDTH}.")
        return Arch("timm_encoder", {**timm_args(name), **args})
    if name not in ENCODERS:
        raise unknown("image encoder", name, ENCODERS)
    arch = ENCODERS[name]
    return replace(arch, args={**arch.args, **args})


def unet_arch(encoder: str, **args: Any) -> Arch:
    """Pri3D's U-Net around the encoder of this name; the errors are those of `encoder_arch`."""
    arch = encoder_arch(encoder, **args)
    if arch.of_timm is None:
        return replace(arch, name="resnet_unet")
    return replace(arch, name="timm_unet", args={"out_chans": default_out_chans(arch.maps), **arch.args})


def depth_unet_arch(encoder: str, **args: Any) -> Arch:
    """The U-Net of depth estimation around the encoder of this name; the errors are those of `encoder_arch`."""
    arch = encoder_arch(encoder, **args)
    return replace(arch, name="resnet_depth_unet" if arch.of_timm is None else "timm_depth_unet")
