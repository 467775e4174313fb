"""Our image encoders under their own names in timm, and through it in segmentation-models-pytorch.

Importing this module registers every 2D name of the catalog; nothing is downloaded then. A name with a tag is timm's
`architecture.tag`, one without is that architecture's default.

>>> import geo_pretrain.adapters.timm
>>> timm.create_model("pri3d_view_r18.rooms", features_only=True).feature_info.channels()
[64, 64, 128, 256, 512]

    timm.create_model("pri3d_view_geo_r50", pretrained=True, features_only=True)
    timm.create_model("pri3d_view_r50.kitti", pretrained=True, num_classes=10, in_chans=4, output_stride=16)
    smp.Unet("tu-pri3d_view_geo_r50", encoder_weights=True)

The networks are timm's ResNets, with its options, and come in training mode as timm's do. Weights come through
`load_backbone`: where they are looked for is said by GEO_PRETRAIN_HUB and `cache_dir`, and they load as a whole or the
call fails. Other `in_chans` adapt the stem by our rule (`loading.adapt_stem`), not timm's, so that the maps equal those
of `load_backbone`; a classifier (`num_classes`) starts fresh, and there is none by default. The contract is where timm
keeps such things, `pretrained_cfg`, so `timm.data.resolve_model_data_config(model)` gives its mean, std and size, and
`create_transform` resizes as in pre-training. `contract` and `load_report` are attributes, too. Weights that the caller
names (`pretrained_cfg_overlay=dict(file=...)`, "local-dir:...") are loaded by timm, by its own rules.

A checkpoint of an encoder that timm has itself ("timm/NAME" in its recipe) loads into a network of timm of that name,
with or without `features_only`:

    model = load_into(timm.create_model("convnext_tiny", num_classes=10), "runs/pri3d_convnext")
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geo_pretrain.adapters.common import refuse_input
from geo_pretrain.backbones.architectures import ENCODERS
from geo_pretrain.backbones.resnet_unet import BLOCKS
from geo_pretrain.backbones.timm_encoder import TimmEncoder, is_timm_features
from geo_pretrain.backbones.timm_names import plain_keys
from geo_pretrain.catalog import CATALOG, RENAMED, Entry, backbone_info
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import WeightsMismatch, require, some, unknown
from geo_pretrain.loading import LoadReport, load_backbone, match

if TYPE_CHECKING:
    from torch import Tensor

timm = require("timm", "adapters")

LOCATION = "geo_pretrain:"  # what timm takes for the file of the weights is this and the name
HEAD = "fc."


class HubResNet(timm.models.ResNet):  # type: ignore[name-defined]
    """timm's ResNet whose pretrained weights are looked up by their name in the catalog."""

    contract: ImageContract | None = None
    load_report: LoadReport | None = None
    cache_dir: str | os.PathLike[str] | None = None

    def load_pretrained(self, location: str) -> None:
        """Load the encoder that `location` names; timm calls this before it wraps or prunes the network.

        Raises what `load_backbone` raises, and `WeightsMismatch` when a tensor of either side, but for the classifier,
        has no partner.
        """
        name = location.removeprefix(LOCATION)
        own: dict[str, Tensor] = self.state_dict()
        if any(value.is_meta for value in own.values()):
            raise ValueError(f"{name!r}: the network is on the meta device, which holds no values; accepted: others.")
        encoder = load_backbone(name, in_chans=self.in_chans, cache_dir=self.cache_dir)
        given = encoder.state_dict()
        expected = {key: value for key, value in own.items() if not key.startswith(HEAD)}
        fits, missing, unused = match(expected, given)
        if missing or unused:
            raise WeightsMismatch(
                f"{name!r}: {len(fits)} of {len(expected)} tensors of this timm network are in the checkpoint; all are "
                f"needed. Here: {_shapes(missing, expected)}. There instead: {_shapes(unused, given)}. Accepted: "
                "ResNets of width 64, and options of timm that leave the layers of its plain ResNet as they are."
            )
        self.load_state_dict({**own, **fits})
        fresh = tuple(key for key in own if key not in fits)
        self.load_report = LoadReport(len(fits), fresh, (), encoder.load_report.reshaped, len(fits) / len(own))
        contract: Any = encoder.contract
        self.contract = contract


def load_into(model: Any, name_or_folder: str | os.PathLike[str], **load: Any) -> Any:
    """Load the encoder of a checkpoint into a network that `timm.create_model` made of the same name; returns it.

    `model` is plain or made with `features_only`, of 3 channels; its classifier keeps its values. It gets the contract
    (`contract`, and timm's place for it, `pretrained_cfg`) and `load_report`. `load`: where to look, as in
    `load_backbone`. Raises `WeightsMismatch` when a tensor of the encoder has no place in it, or one that
    timm's network of that name lacks would stay random, and what `load_backbone` raises.
    """
    encoder: Any = load_backbone(name_or_folder, **load)
    given, own = encoder.state_dict(), model.state_dict()
    places = plain_keys(own, given) if isinstance(encoder, TimmEncoder) else {key: key for key in given if key in own}
    fits = {key: given[of] for key, of in places.items() if own[key].shape == given[of].shape}
    unused = [of for of in given if of not in {places[key] for key in fits}]
    if unused:
        what = f"timm's {encoder.timm_name}" if isinstance(encoder, TimmEncoder) else str(encoder.host_name)
        others = (f"; {of} is {list(own[key].shape)} there" for key, of in places.items() if of in unused)
        there = next(others, "")  # where a tensor has a place, but of another shape
        raise WeightsMismatch(
            f"{str(name_or_folder)!r} holds {what}; {len(unused)} of its {len(given)} tensors have no place in this "
            f"{type(model).__name__}: {_shapes(unused, given)}{there}. Accepted: timm.create_model of that name"
            f"{' with the options that give it these shapes, such as in_chans and img_size' if there else ''}."
        )
    fresh = tuple(key for key in own if key not in fits)
    if strange := _not_after(encoder, model, fresh):
        raise WeightsMismatch(
            f"{str(name_or_folder)!r} fills {len(fits)} of the {len(own)} tensors of this {type(model).__name__}, and "
            f"of those that would stay random {len(strange)} are no classifier's: {_shapes(strange, own)}. Accepted: "
            "timm.create_model of its name."
        )
    model.load_state_dict({**own, **fits})
    model.load_report = LoadReport(len(fits), fresh, (), (), len(fits) / len(own))
    model.contract = encoder.contract
    if isinstance(model.pretrained_cfg, dict):
        model.pretrained_cfg |= _timm_fields(encoder.contract)
    return model


def _not_after(encoder: Any, model: nn.Module, fresh: Sequence[str]) -> list[str]:
    """Tensors of a network that an encoder does not fill and that do not follow it, as a classifier does."""
    if is_timm_features(model):
        return list(fresh)
    if not isinstance(encoder, TimmEncoder):
        return [key for key in fresh if not key.startswith(HEAD)]
    with torch.device("meta"):  # what timm's network of that name has
        whole = timm.create_model(encoder.timm_name, pretrained=False).state_dict()
    head = str((getattr(model, "pretrained_cfg", None) or {}).get("classifier", HEAD)).partition(".")[0]
    return [key for key in fresh if key not in whole and not key.startswith(f"{head}.")]


def register() -> None:
    """Register every 2D name of the catalog with timm, unless it is registered already."""
    variants: dict[str, dict[str, Entry]] = {}
    for entry in CATALOG.values():
        if entry.arch.host_encoder is not None:
            variant, _, tag = entry.name.partition(".")
            variants.setdefault(variant, {})[tag] = entry
    for variant, entries in variants.items():
        if timm.models.is_model(variant) and timm.models.model_entrypoint(variant).__module__ == __name__:
            continue
        encoders = {str(entry.arch.host_encoder) for entry in entries.values()}
        if len(encoders) > 1:
            raise ValueError(f"{variant!r} stands for the encoders {sorted(encoders)}; accepted: one a name.")
        default_cfgs[variant] = _default_cfg(entries)
        globals()[variant] = timm.models.register_model(_entrypoint(variant, encoders.pop()))
    # timm takes what follows a dot for a tag, so a name that had one cannot be kept
    old = {name: now for name, now in RENAMED.items() if now.partition(".")[0] in variants and "." not in name}
    timm.models.register_model_deprecations(__name__, old)


default_cfgs: dict[str, Any] = {}  # where timm's decorator looks for the contracts


def _default_cfg(entries: Mapping[str, Entry]) -> Any:
    """timm's `DefaultCfg` of an architecture; without an untagged entry its bare name has no weights."""
    cfgs = {tag: timm.models.PretrainedCfg(**_record(entry)) for tag, entry in entries.items()}
    if "" not in cfgs:
        some = next(iter(entries.values()))
        cfgs = {"": timm.models.PretrainedCfg(**_record(some) | {"file": None, "custom_load": False}), **cfgs}
    tags = deque(sorted(cfgs, key=bool))  # the default first
    return timm.models.DefaultCfg(tags=tags, cfgs=cfgs, is_pretrained=True)


def _record(entry: Entry) -> dict[str, Any]:
    """A catalog entry as a `PretrainedCfg` of timm."""
    return {
        "file": LOCATION + entry.name,
        "custom_load": True,  # the network's own load_pretrained takes it
        "num_classes": 0,
        "classifier": HEAD.removesuffix("."),
        "first_conv": entry.arch.encoder_alone.architecture.stem.removesuffix(".weight"),
        "crop_pct": 1.0,
        "crop_mode": "squash",  # both sides to the size, as our transforms do
        "license": entry.license.weights,
        "description": entry.description,
        "paper_name": entry.paper.title,
        "origin_url": entry.paper.url,
        **_timm_fields(entry.contract),
    }


def _timm_fields(contract: Any) -> dict[str, Any]:
    """The fields of the contract that timm has too. Its values are in [0, 1] as well."""
    return {
        "input_size": (len(contract.channels), *contract.size),
        "interpolation": contract.interpolation,
        "mean": contract.mean,
        "std": contract.std,
    }


def _entrypoint(variant: str, encoder: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, encoder, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"timm's {encoder}, pretrained as {variant!r}."
    return create


def _create(variant: str, encoder: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build the network with timm's own builder and attach contract and load report."""
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = timm.models.resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise unknown("backbone", variant, CATALOG, f"{variant!r} alone is an architecture; weights need a tag.")
    networks: list[HubResNet] = []

    def network(**arguments: Any) -> HubResNet:
        networks.append(HubResNet(**arguments))
        networks[0].cache_dir = kwargs.get("cache_dir")
        return networks[0]

    block, layers = BLOCKS[ENCODERS[encoder].args["depth"]]
    arguments = {"block": getattr(timm.models.resnet, block), "layers": layers, **kwargs}
    model: Any = timm.models.build_model_with_cfg(network, variant, pretrained, **arguments)
    model.load_report, model.contract = networks[0].load_report, None
    if (cfg.file or "").startswith(LOCATION):
        published: Any = backbone_info(cfg.file.removeprefix(LOCATION)).contract
        model.contract = networks[0].contract or published.with_channels(networks[0].in_chans)
        if model.contract != published:  # other channels
            model.pretrained_cfg |= {key: v for key, v in _timm_fields(model.contract).items() if key not in overlay}
        model.register_forward_pre_hook(refuse_input)
    built: nn.Module = model
    return built


def _shapes(keys: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    return some(f"{key} {list(tensors[key].shape)}" for key in keys) if keys else "nothing"


register()
