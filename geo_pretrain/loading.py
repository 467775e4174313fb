"""load_backbone: a name or folder becomes a network with weights, or an error that teaches.

Weights load or the program stops: only the stem may differ, and only when the caller asked for it with `in_chans`.
The outcome is kept on the network as its `load_report`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from geo_pretrain import hub as hubs
from geo_pretrain.backbones.architectures import encoder_arch
from geo_pretrain.backbones.base import Backbone, EncoderDecoder, FeatureEncoder
from geo_pretrain.backbones.build import build, golden_outputs
from geo_pretrain.backbones.feature_pair import FeaturePair, pair_outputs
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.backbones.timm_names import is_timm, timm_contract, timm_weights
from geo_pretrain.catalog import Arch, Entry, find
from geo_pretrain.catalog.names import ImageName, PointName
from geo_pretrain.checkpoint import Checkpoint, read_weights
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.devices import check_request
from geo_pretrain.errors import CheckpointError, WeightsMismatch
from geo_pretrain.fitting import LoadReport as LoadReport
from geo_pretrain.fitting import adapt_stem as adapt_stem
from geo_pretrain.fitting import fitting_prefix as fitting_prefix
from geo_pretrain.fitting import match as match
from geo_pretrain.fitting import prefix_hint, shown_keys
from geo_pretrain.inputs import check_path

MIN_COVERAGE = 0.9
_UNFINISHED: set[Path] = set()  # folders whose warning was given
GOLDEN_TOLERANCE = 1e-4  # of the largest magnitude: other processors sum in another order
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # to which weights can be converted


class LoadOptions(hubs.Where, total=False):
    """The keyword arguments of `load_backbone` except `decoder`, which selects the return type."""

    pretrained: bool
    in_chans: int | None
    out_indices: Sequence[int] | None
    output_stride: int
    strict: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


@overload
def load_backbone(
    name_or_folder: PointName, *, decoder: Literal[False] = False, **options: Unpack[LoadOptions]
) -> SRUNet: ...


@overload
def load_backbone(
    name_or_folder: ImageName, *, decoder: Literal[False] = False, **options: Unpack[LoadOptions]
) -> ResNetEncoder: ...


@overload
def load_backbone(
    name_or_folder: str | os.PathLike[str], *, decoder: Literal[False] = False, **options: Unpack[LoadOptions]
) -> ResNetEncoder | SRUNet: ...


@overload
def load_backbone(
    name_or_folder: str | os.PathLike[str], *, decoder: Literal[True], **options: Unpack[LoadOptions]
) -> ResNetUNet: ...


@overload
def load_backbone(
    name_or_folder: str | os.PathLike[str], *, decoder: bool = False, **options: Unpack[LoadOptions]
) -> ResNetEncoder | ResNetUNet | SRUNet: ...


def load_backbone(
    name_or_folder: str | os.PathLike[str],
    *,
    decoder: bool = False,
    pretrained: bool = True,
    in_chans: int | None = None,
    out_indices: Sequence[int] | None = None,
    output_stride: int = 32,
    strict: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    hub: str | Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ResNetEncoder | ResNetUNet | SRUNet:
    """Load a pre-trained network: the encoder or, with `decoder=True`, the U-Net for images; a sparse U-Net for points.

    It comes in evaluation mode; call `.train()` to fine-tune. The encoder maps [B, 3, H, W] to five maps at strides 2,
    4, 8, 16, 32 (those in `out_indices`; an encoder of timm has its own, see `feature_info`); its U-Net gives dense
    features [B, C, H/2, W/2]. The sparse U-Net takes points through `.encode_points(points, features)`, or a
    `SparseTensor`; `.forward_intermediates(x)` gives its maps too. `.transforms` turns an image or points into input,
    `.contract` says what that is, `.feature_info` describes the maps, `.load_report` what was loaded.

    `name_or_folder`, `hub`, `revision`, `cache_dir`, `local_files_only`: see `hub.open`; or "timm/NAME[.TAG]": timm's
    encoder and weights. `pretrained=False` builds the network with a random start; for a name of the catalog no file is
    needed. `in_chans` other than that of the pre-training adapts the stem (`adapt_stem`). `output_stride` 16 or 8
    dilates the last stages (image encoders only). `strict=False` tolerates differing tensors as long as 90 % of the
    network is covered. Weights stored in float16 come in float32, as all others do, unless `dtype` says otherwise.
    Raises `UnknownName`, `HubError`, `CheckpointError`, `DigestMismatch` or `WeightsMismatch`; ValueError for arguments
    that do not go together.

    >>> encoder = load_backbone("pri3d_view_geo_r50", pretrained=False, output_stride=8)
    >>> [info["reduction"] for info in encoder.feature_info]
    [2, 4, 8, 8, 8]
    """
    where: hubs.Where = {"hub": hub, "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    check_path("load_backbone", name_or_folder, hubs.NAME_OR_FOLDER)
    check_request(dtype, device, DTYPES)
    shape = _Shape(decoder, in_chans, out_indices, output_stride)
    network: Any
    if is_timm(str(name_or_folder)):
        network = _of_timm(str(name_or_folder), where, shape, pretrained)
    else:
        load = _pretrained if pretrained else _random
        network = load(name_or_folder, where, shape, strict)
    _ORIGINS[network] = (os.fspath(name_or_folder), where)
    _check_one_type(network, dtype)
    _warn_of_overflow(network, dtype)
    return network.to(device=device, dtype=dtype).eval()


def load_pair(
    name_or_folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **where: Unpack[hubs.Where],
) -> FeaturePair:
    """Load the image network and the point network of a checkpoint that share one feature space.

    For folders of PPKT, img2pc and Pri3D's geometric prior. `name_or_folder`, and `hub`, `revision`, `cache_dir`,
    `local_files_only` in `where`: see `hub.open`. Raises `CheckpointError` for a checkpoint that holds one network
    alone, and what `load_backbone` raises.
    """
    if refused := where.keys() - hubs.Where.__annotations__.keys():
        accepted = ", ".join(["device", "dtype", *hubs.Where.__annotations__])
        raise TypeError(f"load_pair() got an unexpected keyword argument {min(refused)!r}; accepted: {accepted}.")
    check_request(dtype, device, DTYPES)  # before anything is fetched
    checkpoint = _fetch_pair(name_or_folder, where)
    network = load_backbone(checkpoint.folder, decoder=checkpoint.arch.has_decoder, device=device, dtype=dtype)
    return _joined(checkpoint, network)


def load_image_encoder(
    name_or_folder: ImageName | str | os.PathLike[str], **options: Unpack[LoadOptions]
) -> FeatureEncoder:
    """Load an image encoder: `load_backbone` for editors, which then complete `.forward_intermediates` and the rest.

    The network maps [B, 3, H, W] to a list of maps, finest first. Arguments and errors are those of `load_backbone`; a
    checkpoint for point clouds raises ValueError before it is fetched, if its name is in the catalog.
    """
    _check_kind(name_or_folder, "2d")
    network = load_backbone(name_or_folder, **options)
    if not isinstance(network, FeatureEncoder):
        raise _other_kind(name_or_folder, "3d")
    return network


def load_image_unet(
    name_or_folder: ImageName | str | os.PathLike[str], **options: Unpack[LoadOptions]
) -> EncoderDecoder:
    """Load an image network with its decoder: dense features [B, C, ...]. See `load_image_encoder`."""
    _check_kind(name_or_folder, "2d")
    network = load_backbone(name_or_folder, decoder=True, **options)
    if not isinstance(network, EncoderDecoder):
        raise _other_kind(name_or_folder, "3d")
    return network


def load_point_unet(name_or_folder: PointName | str | os.PathLike[str], **options: Unpack[LoadOptions]) -> SRUNet:
    """Load a sparse U-Net for point clouds: `.encode_points(points, features)` -> [N, D]. See `load_image_encoder`."""
    _check_kind(name_or_folder, "3d")
    network = load_backbone(name_or_folder, **options)
    if not isinstance(network, SRUNet):
        raise _other_kind(name_or_folder, "2d")
    return network


@dataclass(frozen=True)
class Verification:
    """Differences between stored and recomputed outputs, relative to the largest magnitude of each.

    Outputs are named "encoder.0" to "encoder.4" (the maps, finest first) and "decoder", or in 3D "output"; of a pair
    of networks also "pair.image" and "pair.points".
    """

    name: str
    errors: Mapping[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether all outputs agree."""
        return all(error <= self.tolerance for error in self.errors.values())


def verify(
    name_or_folder: str | os.PathLike[str],
    *,
    tolerance: float = GOLDEN_TOLERANCE,
    **where: Unpack[hubs.Where],
) -> Verification:
    """Compare a checkpoint's files with their digests, load it and recompute its golden outputs.

    `where`: the keyword arguments of `hub.open`. Of files that the network does not need, such as the log, those that
    are there are compared. Raises `CheckpointError` when an output differs by more than `tolerance`, besides
    everything loading raises.
    """
    opened = hubs.open(name_or_folder, **where)
    partner = () if opened.pairing is None else opened.pairing.roles()
    checkpoint = opened.fetch(*opened.network_roles(), *partner, "golden", compare=True)
    golden = read_weights(checkpoint, "golden")
    network, computed = _golden_of(checkpoint, golden)
    expected = {key: value for key, value in golden.items() if not key.startswith("input")}
    errors = {key: _relative(computed[key], value) if key in computed else math.inf for key, value in expected.items()}
    result = Verification(str(network.name), errors, tolerance)
    if not errors or not result.passed:
        raise CheckpointError(
            f"{checkpoint.folder}: golden outputs are not reproduced within {tolerance:g} (relative): {errors}."
        )
    return result


def golden_of(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Compute the golden outputs of a checkpoint folder anew, for the inputs that it keeps."""
    checkpoint = hubs.open(Path(folder).resolve()).fetch("golden")
    return _golden_of(checkpoint, read_weights(checkpoint, "golden"))[1]


def _golden_of(checkpoint: Checkpoint, golden: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    network: Any = load_backbone(checkpoint.folder, decoder=checkpoint.arch.has_decoder)
    try:
        computed = golden_outputs(network, golden)
        if checkpoint.pairing is not None:
            computed |= pair_outputs(_joined(checkpoint, network), golden)
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its golden file holds no {error}; it was not made for it."
        ) from error
    return network, computed


# --- from a checkpoint to a network ---


def _check_kind(name_or_folder: str | os.PathLike[str], wanted: str) -> None:
    """Raise ValueError for a name of the catalog whose network takes something else."""
    entry = find(str(name_or_folder), stacklevel=4)
    if entry is not None and entry.modality != wanted:
        raise _other_kind(name_or_folder, entry.modality)


def _other_kind(name_or_folder: str | os.PathLike[str], is_of: str) -> ValueError:
    takes, loader = {"2d": ("images", "load_image_encoder"), "3d": ("point clouds", "load_point_unet")}[is_of]
    return ValueError(f"{os.fspath(name_or_folder)!r} takes {takes}: {loader} loads it.")


def _check_one_type(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse weights of several floating-point types, which no layer multiplies, unless `dtype` makes them one."""
    first: dict[torch.dtype, str] = {}
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            first.setdefault(value.dtype, key)
    if dtype is None and len(first) > 1:
        kinds = ", ".join(f"{key!r} is {kind}" for kind, key in first.items())
        raise WeightsMismatch(f"{network.name!r}: its weights are of several types: {kinds}. dtype= makes them one.")


def _warn_of_overflow(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Warn of values that are infinite in float16, which ends at 65504."""
    if dtype is not torch.float16:
        return
    largest = torch.finfo(dtype).max
    over = [
        key
        for key, value in network.state_dict().items()
        if value.is_floating_point() and value.abs().gt(largest).any()
    ]
    if over:
        warnings.warn(
            f"{len(over)} tensors have values above {largest:g}, which torch.float16 turns into infinity: "
            f"{shown_keys(over)}; dtype=torch.bfloat16 holds them.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Shape:
    """The options of `load_backbone` that shape the network: the arguments of `build`."""

    decoder: bool
    in_chans: int | None
    out_indices: Sequence[int] | None
    output_stride: int

    def build(self, arch: Arch) -> Any:
        """The network with random weights."""
        return build(arch, **vars(self))

    def check(self, arch: Arch) -> None:
        """Raise ValueError for options that do not go together, or not with this architecture."""
        decoder, in_chans, out_indices, stride = self.decoder, self.in_chans, self.out_indices, self.output_stride
        if in_chans is not None and (not isinstance(in_chans, int) or isinstance(in_chans, bool) or in_chans < 1):
            raise ValueError(f"in_chans is {in_chans!r}; accepted: a whole number from 1 up.")
        if out_indices is not None and not isinstance(out_indices, Sequence):
            raise ValueError(f"out_indices is {out_indices!r}; accepted: a list of numbers, such as (1, 2, 3, 4).")
        if arch.in_one_piece:
            if decoder:
                raise ValueError("A 3D U-Net always comes with its decoder; drop decoder=True.")
            if out_indices is not None or stride != 32:
                raise ValueError(
                    "out_indices and output_stride shape image encoders; a 3D U-Net has network.pyramid(x): its maps "
                    "at strides 1, 2, 4, 8, 16 in voxels. Drop them."
                )
            return
        if decoder and not arch.has_decoder:
            raise ValueError(
                f"This checkpoint holds an encoder alone ({arch}); drop decoder=True, or use load_image_encoder."
            )
        if decoder and out_indices is not None:
            raise ValueError(
                "out_indices chooses maps of the encoder; with decoder=True there is one output. Drop one."
            )
        if stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {stride!r}; accepted: 8, 16 or 32.")
        if decoder and stride != 32:
            raise ValueError(f"output_stride={stride} dilates a lone encoder; the decoder needs stride 32. Drop one.")

    def contract(self, source: Checkpoint | Entry) -> ImageContract | VoxelContract:
        """The input contract of pre-training, adapted to the requested number of channels."""
        return source.contract if self.in_chans is None else source.contract.with_channels(self.in_chans)


def _pretrained(name_or_folder: str | os.PathLike[str], where: hubs.Where, shape: _Shape, strict: bool) -> Any:
    entry = find(str(name_or_folder))
    if entry is not None:
        shape.check(entry.arch)  # before anything is fetched
    opened = hubs.open(name_or_folder, **where)
    # a source may hold the encoder alone where the catalog, and another source, have the whole network
    promised = opened.arch if entry is None else entry.arch
    checkpoint = opened.fetch(*promised.network_roles(decoder=shape.decoder))
    shape.check(checkpoint.arch)
    if not checkpoint.finished and checkpoint.folder not in _UNFINISHED:
        _UNFINISHED.add(checkpoint.folder)  # told once, not for each network of a comparison
        warnings.warn(f"{checkpoint.name!r} is unfinished: its training went on or was stopped.", stacklevel=3)
    network, report = _load(checkpoint, strict, shape)
    network.name, network.load_report, network.contract = checkpoint.name, report, shape.contract(checkpoint)
    return network


def _random(name_or_folder: str | os.PathLike[str], where: hubs.Where, shape: _Shape, strict: bool) -> Any:
    """The network of a checkpoint with random weights. Fetches config.json alone, for a catalog name nothing."""
    source = find(str(name_or_folder)) or hubs.open(name_or_folder, **where).fetch()
    shape.check(source.arch)
    network = shape.build(source.arch)
    report = LoadReport(0, tuple(network.state_dict()), (), (), 0.0)
    network.name, network.load_report, network.contract = source.name, report, shape.contract(source)
    return network


def _of_timm(name: str, where: hubs.Where, shape: _Shape, pretrained: bool) -> Any:
    """An encoder of timm by "timm/NAME[.TAG]", with the weights that timm publishes for it or random ones."""
    if given := [key for key, value in where.items() if value]:
        raise ValueError(f"{given[0]} does not go with {name!r}: timm itself fetches and keeps its weights; drop it.")
    arch, contract = encoder_arch(name), timm_contract(name)
    shape.check(arch)
    network, wanted = shape.build(arch), shape.in_chans or len(contract.channels)
    network.name, network.contract = name, contract.with_channels(wanted)
    network.load_report = LoadReport(0, tuple(network.state_dict()), (), (), 0.0)
    if pretrained:
        otherwise = f'Without a network: load_backbone("{name}", pretrained=False) has random weights.'
        weights, reshaped = timm_weights(name, build(arch).state_dict(), otherwise=otherwise), list[str]()
        if wanted != len(contract.channels):
            if network.stem is None:
                raise ValueError(f"in_chans is {wanted}: {name} has no one first convolution; accepted: 3.")
            weights[network.stem] = adapt_stem(weights[network.stem], wanted)
            reshaped.append(network.stem)
        network.load_state_dict(weights)
        network.load_report = LoadReport(len(weights), (), (), tuple(reshaped), 1.0)
    return network


def _load(checkpoint: Checkpoint, strict: bool, shape: _Shape) -> tuple[Any, LoadReport]:
    """Build on the meta device, plan, then put the file's tensors in place without a second copy."""
    with torch.device("meta"):
        network: nn.Module = shape.build(checkpoint.arch)
    given: dict[str, Tensor] = {}
    for role in checkpoint.network_roles(decoder=shape.decoder):
        prefix = f"{role}." if shape.decoder else ""
        given |= {prefix + key: value for key, value in read_weights(checkpoint, role).items()}
    expected = network.state_dict()
    built = checkpoint.arch if shape.decoder else checkpoint.arch.encoder_alone
    stem, reshaped = built.architecture.stem or str(getattr(network, "stem", None)), list[str]()
    if shape.in_chans is not None and stem in given and given[stem].shape[1] != shape.in_chans:
        given[stem] = adapt_stem(given[stem], expected[stem].shape[1])
        reshaped.append(stem)
    fits, fresh, dropped = match(expected, given)
    for key, value in fits.items():
        if value.is_floating_point() != expected[key].is_floating_point() or value.dtype is torch.bool:
            raise WeightsMismatch(
                f"{checkpoint.name!r}: {key!r} is {value.dtype} in the file; this network needs "
                f"{'a floating-point type' if expected[key].is_floating_point() else 'whole numbers'}."
            )
    report = LoadReport(len(fits), fresh, dropped, tuple(reshaped), len(fits) / len(expected))
    if report.coverage < MIN_COVERAGE:
        raise WeightsMismatch(
            f"{checkpoint.name!r}: {len(fits)} of {len(expected)} tensors match this network (coverage "
            f"{report.coverage:.0%}; at least {MIN_COVERAGE:.0%} is accepted).{prefix_hint(expected, given)}"
        )
    if strict and (fresh or dropped):
        raise WeightsMismatch(
            f"{checkpoint.name!r}: the file does not fit this network exactly. Missing or of another shape: "
            f"{shown_keys(fresh)}. Not used: {shown_keys(dropped)}. strict=False loads the other {len(fits)} tensors."
        )
    if fresh:
        network = shape.build(checkpoint.arch)  # the left-over tensors need a real random start
        fits = {**network.state_dict(), **fits}
    network.load_state_dict(fits, assign=True)
    return network, report


def _relative(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return float("inf")
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


# --- pairs of networks ---


def _fetch_pair(name_or_folder: str | os.PathLike[str], where: hubs.Where) -> Checkpoint:
    """Fetch the files of both networks of a checkpoint."""
    opened = hubs.open(name_or_folder, **where)
    if opened.pairing is None:
        raise CheckpointError(
            f"{opened.name!r} holds one network alone; accepted: a folder that `geo-pretrain train` made with a recipe "
            "of PPKT (ppkt_*), img2pc or Pri3D's geometric prior (pri3d_geo_*, pri3d_view_geo_*)."
        )
    return opened.fetch(*opened.network_roles(), *opened.pairing.roles())


def _joined(checkpoint: Checkpoint, network: Any) -> FeaturePair:
    """Build the pair of a checkpoint from its network, which is loaded already, and the partner's stored weights."""
    pairing = checkpoint.pairing
    assert pairing is not None
    heads = read_weights(checkpoint, "heads") if "heads" in pairing.roles() else {}
    partner = heads if pairing.role == "heads" else read_weights(checkpoint, pairing.role)
    return FeaturePair.from_states(network, pairing, partner, heads)


# Where networks came from, for their former method `pair`: outside of them, so that copies and pickles hold no paths.
_ORIGINS: WeakKeyDictionary[nn.Module, tuple[str, hubs.Where]] = WeakKeyDictionary()


def _former_pair(network: Any) -> FeaturePair:
    """Former way to `load_pair`, kept for one version: this very network with its partner."""
    warnings.warn("network.pair() is now geo_pretrain.load_pair(NAME_OR_FOLDER).", FutureWarning, stacklevel=2)
    if network not in _ORIGINS:
        raise RuntimeError(
            "The checkpoint of this network is not known: it was built by hand, copied or unpickled. "
            "geo_pretrain.load_pair(NAME_OR_FOLDER) loads it with its partner."
        )
    name_or_folder, where = _ORIGINS[network]
    checkpoint = _fetch_pair(name_or_folder, where)
    if len(network.contract.channels) != len(checkpoint.contract.channels):
        raise CheckpointError(
            f"{checkpoint.name!r} was loaded with other input channels; its pair needs its own number."
        )
    if checkpoint.arch.has_decoder and not hasattr(network, "decoder"):  # the encoder alone was loaded
        like = next(network.parameters())
        network = load_backbone(checkpoint.folder, decoder=True, device=like.device, dtype=like.dtype)
    return _joined(checkpoint, network)


Backbone.pair = _former_pair  # type: ignore[attr-defined]  # attached from here: a network itself never downloads
