"""Any encoder of timm behind the encoder protocol, and Pri3D's U-Net around it.

Networks and feature maps are timm's (`features_only`), and so are the keys after "model.", under which
segmentation-models-pytorch knows them too. `timm_names.timm_args` makes the arguments from a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from geo_pretrain.backbones.base import FeatureEncoder
from geo_pretrain.backbones.depth_unet import DepthDecoder, DepthUNet
from geo_pretrain.backbones.encoder import HOST_WIDTH, Stages
from geo_pretrain.backbones.resnet_unet import DENSE_STRIDE, UNet, UNetDecoder
from geo_pretrain.backbones.timm_names import NARROWEST, create, default_out_chans
from geo_pretrain.errors import CheckpointError, InputError, first_line, require
from geo_pretrain.inputs import check_images

# what torch says of sizes that do not go together
SHAPES = re.compile("size of tensor|Sizes of tensors|shape '.*' is invalid|input size|[Kk]ernel size|must match")
FEW = 4  # cells of the coarsest map: an image of fewer may be too small for a network without padding


class TimmEncoder(FeatureEncoder):
    """A network of timm without its classifier: an image in, its feature maps out.

    `maps` are the channels and the stride of each, finest first, that the network must have: another timm that builds
    others under the same name is refused with `CheckpointError`. `indices` are their numbers in timm, `options` the
    arguments it is built by. `output_stride` 16 or 8 dilates by timm's rule where that network can be dilated.
    `out_indices` chooses among the maps, from 0.
    """

    host_name: str | None = None  # torchvision has no network with these tensors

    def __init__(
        self,
        name: str,
        *,
        maps: Sequence[Sequence[int]],
        indices: Sequence[int],
        options: Mapping[str, Any] = {},
        in_chans: int = 3,
        output_stride: int = 32,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.timm_name, self.in_chans, self.output_stride = name, in_chans, output_stride
        self.arguments: dict[str, Any] = {
            "name": name,
            "maps": [list(row) for row in maps],
            "indices": list(indices),
            "options": dict(options),
        }
        self.out_indices = _check_indices(out_indices, len(maps))
        dilated = output_stride < self.arguments["maps"][-1][1]
        self.model = _create(name, indices, options, in_chans, output_stride if dilated else 32)
        info = self.model.feature_info.get_dicts(keys=["num_chs", "reduction", "module"])
        self._check_maps(info, maps)
        self.feature_info: list[dict[str, Any]] = [dict(info[index]) for index in self.out_indices]
        self.channels_last = is_channels_last(self.model)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, in_chans, H, W], normalized -> maps [B, C, H / stride, W / stride], finest first (`feature_info`)."""
        check_images(x, self.in_chans, next(self.model.parameters()))
        fixed = self.fixed_size
        if fixed is not None and tuple(x.shape[2:]) != fixed:
            raise InputError(
                f"timm's {self.timm_name} was built for images of {fixed[0]} x {fixed[1]} pixels and takes no others; "
                f"got {x.shape[2]} x {x.shape[3]}: torch.nn.functional.interpolate(images, {fixed})."
            )
        self.look_at(x)
        maps = self._maps(x)
        if self.channels_last:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        return [maps[index] for index in self.out_indices]

    def _maps(self, x: Tensor) -> list[Tensor]:
        """timm's maps. Raises `InputError` for images whose sides the network cannot divide, or that are too small."""
        try:
            maps: list[Tensor] = self.model(x)
        except (AssertionError, RuntimeError, ValueError) as error:
            if not isinstance(error, AssertionError) and not SHAPES.search(str(error)):
                raise  # of memory, another process, a library: nothing that another size would mend
            coarsest = max(stride for _, stride in self.arguments["maps"])
            fits = not any(side % coarsest or side < FEW * coarsest for side in x.shape[2:])
            advice = f"Give sides that are multiples of {coarsest}, from {FEW * coarsest} up."
            raise InputError(
                f"timm's {self.timm_name} cannot take images of {x.shape[2]} x {x.shape[3]} "
                f"({first_line(error).rstrip('.') or 'an assertion of its code'}). "
                f"{'Other sizes, or another encoder, may do.' if fits else advice}"
            ) from error
        return maps

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """The only (height, width) of images that it takes; None: any."""
        options = self.arguments["options"]
        if "img_size" not in options or options.get("dynamic_img_size") or options.get("strict_img_size") is False:
            return None
        height, width = options["img_size"]
        return height, width

    @property
    def stem(self) -> str | None:
        """The key of the first convolution's weight, which `in_chans` shapes; None: it has none, or several."""
        first = (self.model.pretrained_cfg or {}).get("first_conv")
        if not isinstance(first, str):
            return None
        forms = (f"model.{first}", "model." + first.replace(".", "_", 1), f"model.model.{first}")
        keys = self.state_dict().keys()
        return next((f"{form}.weight" for form in forms if f"{form}.weight" in keys), None)

    def stages(self) -> Stages:
        """The stem, and a stage for each map after it; see `timm_stages`."""
        return timm_stages(self.model)

    def unet(self, out_chans: int) -> TimmUNet:
        """A randomly initialized U-Net around such an encoder."""
        return TimmUNet(**self.arguments, in_chans=self.in_chans, out_chans=out_chans)

    def _check_maps(self, info: Sequence[Mapping[str, Any]], maps: Sequence[Sequence[int]]) -> None:
        built = [[row["num_chs"], row["reduction"]] for row in info]
        stated = [list(row) for row in maps]
        if self.output_stride != 32:  # strides are others then
            built, stated = ([[chans] for chans, _ in rows] for rows in (built, stated))
        if built != stated:
            raise CheckpointError(
                f"timm {require('timm', 'adapters').__version__} builds {self.timm_name!r} with maps {built} "
                f"([channels, stride]); these weights are of a network with {stated}. Install the timm that wrote them "
                "(`libraries` in the folder's config.json)."
            )


class TimmUNet(UNet):
    """Pri3D's U-Net around any encoder of timm: dense features at half the image's size, sides rounded up.

    The decoder's channels fall with the stride as around ResNets, but not below 32; `out_chans` defaults to them.
    """

    def __init__(self, name: str, *, out_chans: int | None = None, **shape: Any) -> None:
        super().__init__()
        self.encoder = TimmEncoder(name, **shape)
        rows = [row for row in self.encoder.arguments["maps"] if row[1] > DENSE_STRIDE]
        if not rows:
            raise CheckpointError(f"timm's {name} has no map of a stride above {DENSE_STRIDE}; a U-Net needs one.")
        chans, strides = zip(*rows, strict=True)
        self.out_chans = default_out_chans(self.encoder.arguments["maps"]) if out_chans is None else out_chans
        self.decoder = UNetDecoder(chans, self.out_chans, strides=strides, narrowest=NARROWEST)

    @property
    def stem(self) -> str | None:
        """The key of the first convolution's weight; see `TimmEncoder.stem`."""
        return None if self.encoder.stem is None else f"encoder.{self.encoder.stem}"


class TimmDepthUNet(DepthUNet):
    """The U-Net of depth estimation around any encoder of timm whose strides are powers of 2; see `ResNetDepthUNet`."""

    def __init__(self, name: str, *, out_chans: int = 16, **shape: Any) -> None:
        super().__init__()
        self.encoder, self.out_chans = TimmEncoder(name, **shape), out_chans
        chans, strides = zip(*self.encoder.arguments["maps"], strict=True)
        self.decoder = DepthDecoder(chans, HOST_WIDTH, out_chans, strides)

    @property
    def stem(self) -> str | None:
        """The key of the first convolution's weight; see `TimmEncoder.stem`."""
        return None if self.encoder.stem is None else f"encoder.{self.encoder.stem}"


def timm_stages(network: nn.Module) -> Stages:
    """Name and modules of each stage of a network that timm built with `features_only`, "stem" first.

    A stage ends with the module whose output is a map. The stem is what lies before the blocks, or ends with the map at
    stride 2 where there is one; position embeddings and class tokens belong to it. Where timm does not say which module
    a map comes from, the whole network is one stage.
    """
    info: list[dict[str, Any]] = network.feature_info.get_dicts()  # type: ignore[union-attr, operator]
    body: Any = network.model if isinstance(getattr(network, "model", None), nn.Module) else network
    units = _units(body)
    ends = [_last_of(str(row["module"]), [path for path, _ in units]) for row in info]
    last = [end + 1 for end in ends if end is not None]
    if len(last) != len(ends) or last != sorted(set(last)):
        return [("stem", [network])]
    if info[0]["reduction"] > DENSE_STRIDE:
        container = _container(units[last[0] - 1][0])
        last.insert(0, next(k for k, (path, _) in enumerate(units) if _container(path) == container))
    last[-1] = len(units)
    parts = [[module for _, module in units[start:end]] for start, end in zip([0, *last[:-1]], last, strict=True)]
    tokens = [parameter for _, parameter in body.named_parameters(recurse=False)]
    if tokens:
        parts[0].append(nn.ParameterList(tokens))  # the very parameters
    return [("stem" if number == 0 else f"stage{number}", part) for number, part in enumerate(parts)]


def is_channels_last(network: nn.Module) -> bool:
    """Whether an encoder's own stages give maps [B, H, W, C], as those of Swin in timm do."""
    network = getattr(network, "model", network) if isinstance(network, TimmEncoder) else network
    return getattr(network, "output_fmt", None) == "NHWC" and not hasattr(network, "model")


def is_timm_features(network: nn.Module) -> bool:
    """Whether timm built a network with `features_only`, so that `timm_stages` knows its stages."""
    return callable(getattr(getattr(network, "feature_info", None), "get_dicts", None))


def _units(body: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a network in order, those of sequences and lists in place of the sequence."""
    units: list[tuple[str, nn.Module]] = []
    for name, child in body.named_children():
        parts = list(child.named_children()) if isinstance(child, nn.Sequential | nn.ModuleList) else []
        units += [(f"{name}.{part}", module) for part, module in parts] or [(name, child)]
    return units


def _last_of(module: str, paths: Sequence[str]) -> int | None:
    """The last of `paths` that is `module`, is in it or has it inside; timm joins parts of names by "_" or "."."""
    wanted, found = module.replace(".", "_"), None
    for number, path in enumerate(one.replace(".", "_") for one in paths):
        if f"{wanted}_".startswith(f"{path}_") or path.startswith(f"{wanted}_"):
            found = number
    return found


def _container(path: str) -> str:
    """The name of the sequence that a numbered part is of."""
    return re.sub(r"[._]\d+$", "", path)


def _check_indices(out_indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    indices = tuple(range(count)) if out_indices is None else tuple(out_indices)
    if not indices or any(index not in range(count) for index in indices) or list(indices) != sorted(set(indices)):
        raise ValueError(
            f"out_indices is {indices!r}; accepted: numbers from 0 to {count - 1}, one a map, each once, rising."
        )
    return indices


def _create(name: str, indices: Sequence[int], options: Mapping[str, Any], in_chans: int, output_stride: int) -> Any:
    shape: dict[str, Any] = {"in_chans": in_chans, "out_indices": tuple(indices)}
    if output_stride == 32:
        return create(name, **options, **shape)
    try:
        return create(name, **options, **shape, output_stride=output_stride)
    except (TypeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"output_stride={output_stride}: timm cannot dilate {name} ({first_line(error)}); accepted: 32."
        ) from error
