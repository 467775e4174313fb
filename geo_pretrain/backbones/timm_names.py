"""Image encoders of timm by name, such as "timm/convnext_tiny": what shapes the network, its input, its weights.

`timm_args` asks the installed timm once; what it answers is stored with the weights (config.json), so that no default
of a later timm changes the network. A tag, "timm/convnext_tiny.in12k", chooses pretrained weights, mean and std only.
timm is imported when such a name is used, never before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import CheckpointError, GeoPretrainError, WeightsMismatch, first_line, require, some, unknown
from geo_pretrain.online import hub_fault

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "timm/"
MAPS = 4  # of a network whose maps all have one stride: as many of its blocks, at even spacing
CHANNELS = 3
NARROWEST = 32  # channels of the U-Net's decoder, and of its output: as many as ResNet-18's
DENSE_STRIDE = 2  # of the U-Net's output
# names in the library EfficientNet-PyTorch (lukemelas) -> in timm; narrow blocks, the first ones, expand no channels
EFFICIENTNET_STEM = "_conv_stem.weight"
EFFICIENTNET_STEMS = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
EFFICIENTNET_NARROW = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
} | _SQUEEZE
EFFICIENTNET_PARTS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
} | _SQUEEZE


def is_timm(encoder: str) -> bool:
    """Whether the name of an encoder is one of timm's: "timm/NAME"."""
    return encoder.startswith(PREFIX)


def without_tag(encoder: str) -> str:
    """The name of the network alone: "timm/convnext_tiny" of "timm/convnext_tiny.in12k"; other names as they are."""
    return encoder.partition(".")[0] if is_timm(encoder) else encoder


def check_timm(encoder: str) -> tuple[str, str]:
    """Split "timm/NAME.TAG" into timm's name and the tag, "" for none. Raises `UnknownName` with the nearest names."""
    timm = require("timm", "adapters")
    name, _, tag = encoder.removeprefix(PREFIX).partition(".")
    known = timm.list_models()  # without those that timm has renamed
    if name not in known:
        raise unknown("encoder of timm", f"{PREFIX}{name}", [f"{PREFIX}{one}" for one in known])
    tagged = timm.models.get_arch_pretrained_cfgs(name)
    if tag and f"{name}.{tag}" not in tagged:
        raise unknown("encoder of timm", encoder, [f"{PREFIX}{one}" for one in tagged])
    return name, tag


@cache
def _described(encoder: str) -> tuple[tuple[str, Any], ...]:
    name, tag = check_timm(encoder)
    config = _config(name, tag)
    if config.input_size[0] != CHANNELS:
        raise CheckpointError(f"timm's {name} takes images of {config.input_size[0]} channels; accepted here: 3.")
    size = list(config.input_size[1:])
    ways: list[dict[str, Any]] = [{}]
    if config.fixed_input_size:  # preferred: a network for images of any size
        free = {"dynamic_img_size": True, "dynamic_img_pad": True}
        ways = [{"img_size": size, **free}, {"img_size": size, "strict_img_size": False}, {"img_size": size}, {}]
    for number, options in enumerate(ways, 1):
        try:
            network = create(name, **options)
            break
        except TypeError as error:  # an option that this family does not have
            if number == len(ways):
                raise _no_maps(name, error) from error
        except Exception as error:  # timm says in many ways that a network gives no feature maps
            raise _no_maps(name, error) from error
    info = network.feature_info
    indices = [index % len(info.info) for index in info.out_indices]
    if len({row["reduction"] for row in info.info}) == 1 and len(info.info) >= MAPS:
        indices = [len(info.info) * part // MAPS - 1 for part in range(1, MAPS + 1)]
    maps = [[int(info.info[index]["num_chs"]), int(info.info[index]["reduction"])] for index in indices]
    return tuple({"name": name, "maps": maps, "indices": indices, "options": options}.items())


def timm_args(encoder: str) -> dict[str, Any]:
    """The arguments of `TimmEncoder` for "timm/NAME": maps, [channels, stride] each, and the options it is built by.

    A plain vision transformer, whose blocks all have the stride of its patches, gives four of them at even spacing; all
    others what timm gives by default. Networks with position embeddings are built for images of any size where timm
    can; `options` without "dynamic_img_size" and "strict_img_size" but with "img_size" take that size alone. Raises
    `UnknownName`, and `CheckpointError` for networks that have no feature maps.
    """
    return {key: list(value) if isinstance(value, list) else value for key, value in _described(encoder)}


def contract_for(encoder: str, contract: ImageContract) -> ImageContract:
    """The contract of a run: `contract`, for an encoder of timm with the mean and std that timm states for it."""
    return timm_contract(encoder, contract) if is_timm(encoder) else contract


def timm_contract(encoder: str, contract: ImageContract | None = None) -> ImageContract:
    """Mean and std that timm states for "timm/NAME[.TAG]"; the rest of `contract`, or timm's size for None."""
    config = _config(*check_timm(encoder))
    if contract is None:
        contract = ImageContract(size=tuple(config.input_size[1:]), interpolation="bilinear")
    return replace(contract, mean=tuple(config.mean), std=tuple(config.std))


def timm_license(encoder: str) -> str:
    """The license that timm states for the weights of "timm/NAME[.TAG]", "" for none."""
    return str(_config(*check_timm(encoder)).license or "")


def default_out_chans(maps: Sequence[Sequence[int]]) -> int:
    """Output channels of a U-Net around an encoder with `maps`: those of its decoder at stride 2.

    >>> default_out_chans([[96, 4], [192, 8], [384, 16], [768, 32]])
    48
    """
    chans, stride = maps[-1]
    return max(NARROWEST, chans * DENSE_STRIDE // stride)


def create(name: str, *, features: bool = True, **options: Any) -> Any:
    """timm's network of this name on the CPU, in training mode, randomly initialized; random numbers are drawn there.

    On the meta device nothing is drawn from the generator, but the network is real: timm computes some tensors that no
    state dict holds.
    """
    timm = require("timm", "adapters")
    with _real():
        return timm.create_model(name, **({"features_only": True} if features else {}), **options)


def timm_weights(encoder: str, expected: Mapping[str, Tensor], *, otherwise: str) -> dict[str, Tensor]:
    """The weights that timm publishes for "timm/NAME[.TAG]", for a `TimmEncoder` with the state dict `expected`.

    They come through timm's own download and cache, and load strictly. Raises `GeoPretrainError` when they cannot be
    had; `otherwise` is its last sentence, what can be done then.
    """
    name, tag = check_timm(encoder)
    config = _config(name, tag)
    label = f"{name}.{config.tag}" if config.tag else name
    if not (config.hf_hub_id or config.url or config.file):
        known = [f"{PREFIX}{one}" for one in require("timm", "adapters").list_pretrained(f"{name}*")]
        raise GeoPretrainError(f"timm has no weights for {encoder!r}; it has some for: {some(known, 5)}. {otherwise}")
    try:
        _knock(config)
        plain = create(name, features=False, pretrained=True, pretrained_cfg=tag or None, **_options(encoder))
    except Exception as error:  # of the network, of huggingface_hub, of a file: many classes, one meaning
        source = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        raise GeoPretrainError(
            f"timm's weights of {label} ({source}) could not be loaded ({first_line(error).rstrip('.')}). {otherwise}"
        ) from error
    return _all_of(expected, plain.state_dict(), f"timm's weights of {label}")


def _knock(config: Any) -> None:
    """Raise OSError where there is no network: huggingface_hub would try for a minute."""
    files = ("model.safetensors", "pytorch_model.bin")
    repo, at, revision = (config.hf_hub_id or "").partition("@")
    if not repo or config.file:
        return
    faults = [hub_fault(repo, config.hf_hub_filename or file, revision if at else None) for file in files]
    if all(faults):
        raise OSError(faults[0])


def fitted(encoder: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Weights under timm's names, or in their authors' format, for a `TimmEncoder` with the state dict `expected`.

    A classifier is left out. What has other names goes through timm's own filter of that network, strictly. Raises
    `WeightsMismatch` that names `what`.
    """
    if EFFICIENTNET_STEM in given:
        return _all_of(expected, efficientnet_keys(expected, given), what)
    found = renamed_keys(expected, given)
    if not _lacking(expected, found):
        return found
    name, tag = check_timm(encoder)
    try:
        overlay = {"state_dict": dict(given)}
        plain = create(
            name,
            features=False,
            pretrained=True,
            pretrained_cfg=tag or None,
            pretrained_cfg_overlay=overlay,
            **_options(encoder),
        )
    except Exception:  # what timm's filters raise for keys that they do not know
        return _all_of(expected, given, what)
    return _all_of(expected, plain.state_dict(), what)


def renamed_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the keys of timm's plain network, of its features, or of `TimmEncoder`, under those of `expected`.

    timm's `features_only` joins the first two parts of a name ("stages.0" is "stages_0"), and puts transformers under
    "model."; `TimmEncoder` and segmentation-models-pytorch put "model." before all.
    """
    found = {}
    for key, value in given.items():
        for form in (key, f"model.{key}", "model." + key.replace(".", "_", 1), f"model.model.{key}"):
            if form in expected:
                found[form] = value
    return found


def efficientnet_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the library EfficientNet-PyTorch, under those of timm's plain network.

    There blocks are counted through all stages; stages and their lengths are those of `expected`.
    """
    places = sorted({tuple(map(int, key.split(".")[2:4])) for key in expected if key.startswith("model.blocks.")})
    found = {}
    for key, value in given.items():
        first, *rest = key.split(".")
        if first in EFFICIENTNET_STEMS:
            found[".".join([EFFICIENTNET_STEMS[first], *rest])] = value
        elif first == "_blocks" and int(rest[0]) < len(places):
            number, part, *end = rest
            narrow = f"_blocks.{number}._expand_conv.weight" not in given
            block = ".".join(map(str, places[int(number)]))
            name = (EFFICIENTNET_NARROW if narrow else EFFICIENTNET_PARTS).get(part, part)
            found[".".join(["blocks", block, name, *end])] = value
    return found


def plain_keys(keys: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a timm network -> those of a `TimmEncoder` (`expected`) for the same tensor; others are left out."""
    pairs = ((key, renamed_keys(expected, {key: value})) for key, value in keys.items())
    return {key: next(iter(found)) for key, found in pairs if found}


def _all_of(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    found = renamed_keys(expected, given)
    lacking = _lacking(expected, found)
    if lacking:
        raise WeightsMismatch(
            f"{what}: {len(lacking)} of {len(expected)} tensors of the encoder are missing or of another shape: "
            f"{some(map(repr, lacking))}. There are: {some(map(repr, given))}. Accepted: weights of the same network."
        )
    return found


def _lacking(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in expected.items() if key not in found or found[key].shape != value.shape]


def _options(encoder: str) -> dict[str, Any]:
    options: dict[str, Any] = timm_args(encoder)["options"]
    return options


def _config(name: str, tag: str) -> Any:
    timm = require("timm", "adapters")
    return timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)


def _no_maps(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"timm's {name} gives no feature maps ({first_line(error)}); accepted: networks that "
        f"timm.create_model({name!r}, features_only=True) builds."
    )


@contextmanager
def _real() -> Iterator[None]:
    """Build on the CPU; where the default is the meta device, without taking random numbers from the generator."""
    import torch

    on_meta = torch.get_default_device().type == "meta"
    with torch.random.fork_rng(devices=[], enabled=on_meta), torch.device("cpu"):
        yield
