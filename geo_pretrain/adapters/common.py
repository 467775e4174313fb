"""Shared by all adapters of image encoders: loading, freezing of stages, learning rates by stage.

`freeze_stages` and `parameter_groups` work on any network around an encoder with `stages()`, such as this package's
own, around a ResNet under torchvision's names (those the adapters build, torchvision's, smp's and timm's own), and
around any other network of timm's `features_only`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from geo_pretrain import devices
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.backbones.encoder import ImageEncoder, Stages
from geo_pretrain.backbones.resnet_unet import STAGES, resnet_stages
from geo_pretrain.backbones.timm_encoder import TimmEncoder, is_timm_features, timm_stages
from geo_pretrain.backbones.timm_names import is_timm, timm_contract, timm_weights
from geo_pretrain.catalog import CATALOG, find
from geo_pretrain.errors import nearest, require, unknown
from geo_pretrain.inputs import check_images, look_at
from geo_pretrain.loading import DTYPES, LoadReport, load_backbone

Name: TypeAlias = str | os.PathLike[str]  # of a checkpoint, or its folder

ENCODER_PATHS = (
    "",
    "encoder",
    "encoder.model",
    "backbone.body",
    "backbone",
    "backbone.body.encoder",
    "backbone.encoder",
)  # of the encoder in its host
WRAPPED = "module", "_orig_mod"  # a network in DataParallel, AveragedModel and the like, and compiled
MAX_FREEZE = 5  # the stem and four stages
LOAD_OPTIONS = ("in_chans", "strict", "hub", "revision", "cache_dir", "local_files_only", "device", "dtype")


class _FrozenStats(nn.Module):
    """Ignores `.train()` and resets, so that a BatchNorm keeps its running statistics; state-dict keys do not change.

    It is made from a norm that has them, never from nothing. `torch.optim.swa_utils.update_bn` is what resets.
    """

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def reset_running_stats(self) -> None:
        """Keep them."""


class FrozenStatsBatchNorm2d(_FrozenStats, nn.BatchNorm2d):
    """BatchNorm that keeps its running statistics."""


class FrozenStatsSyncBatchNorm(_FrozenStats, nn.SyncBatchNorm):
    """`FrozenStatsBatchNorm2d` for networks that were converted to SyncBatchNorm."""


FROZEN_STATS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: FrozenStatsBatchNorm2d,
    nn.SyncBatchNorm: FrozenStatsSyncBatchNorm,
}
TRAINED_STATS = {frozen: trained for trained, frozen in FROZEN_STATS.items()}
TIMM_NORMS = "BatchNormAct2d", "SyncBatchNormAct"  # timm's BatchNorms with an activation


def _add_timm_norm(norm: str) -> type[nn.Module]:
    """Add one of timm's BatchNorms with an activation to the tables; networks that have one have imported timm."""
    kind: type[nn.Module] = getattr(require("timm", "adapters").layers, norm)
    if kind not in FROZEN_STATS:
        name = f"FrozenStats{norm}"
        frozen = type(name, (_FrozenStats, kind), {"__doc__": f"`{norm}` that keeps its running statistics."})
        FROZEN_STATS[kind], TRAINED_STATS[frozen] = frozen, kind
        frozen.__module__ = __name__
    return FROZEN_STATS[kind]


def __getattr__(name: str) -> Any:
    """The classes of frozen norms of timm, which pickles look up here."""
    norm = name.removeprefix("FrozenStats")
    if norm in TIMM_NORMS and norm != name:
        return _add_timm_norm(norm)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def encoder_of(network: nn.Module) -> nn.Module:
    """Find the encoder in a network: with `stages()`, with conv1, bn1 and layer1 to layer4, or timm's feature maps.

    Raises ValueError where there is none.
    """
    wanted = {module for modules in STAGES.values() for module in modules}
    modules = dict(network.named_modules())
    for path in ENCODER_PATHS:
        if path in modules:
            children = {name for name, _ in modules[path].named_children()}
            if isinstance(modules[path], ImageEncoder) or wanted <= children or is_timm_features(modules[path]):
                return modules[path]
    inside = [part for name, part in network.named_children() if name in WRAPPED]
    if len(inside) == len(list(network.children())) == 1:
        return encoder_of(inside[0])
    places = ", ".join(repr(path) for path in ENCODER_PATHS if path)
    raise ValueError(
        f"{type(network).__name__} has no ResNet with the stages {', '.join(sorted(wanted))}; accepted: such a ResNet, "
        f"or a network that has one as {places}."
    )


def stages_of(encoder: nn.Module) -> Stages:
    """Name and modules of each stage of an encoder, the stem first."""
    if isinstance(encoder, ImageEncoder):
        return encoder.stages()
    resnet = all(hasattr(encoder, module) for modules in STAGES.values() for module in modules)
    return resnet_stages(encoder) if resnet else timm_stages(encoder)


def freeze_stages(network: nn.Module, count: int) -> None:
    """Freeze exactly the first `count` stages of the encoder in `network`: 0 none, 1 the stem, 2 layer1 too, 5 all.

    Detectron2 counts so in `FREEZE_AT`; torchvision's `trainable_layers` is 5 minus it. Frozen are the parameters
    (`requires_grad`) and BatchNorm's statistics, and both stay so through `.train()`, copies and pickles. Stages after
    them are made trainable, so a second call with a smaller number thaws. After a conversion to SyncBatchNorm, which
    replaces the layers, call it again.
    """
    _check_freeze(count)
    encoder = encoder_of(network)
    for number, (_, parts) in enumerate(stages_of(encoder)):
        for part in parts:
            part.requires_grad_(number >= count)
            for module in part.modules():
                _freeze_stats(module, number < count, encoder.training)


def _check_freeze(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_FREEZE:
        raise ValueError(f"freeze is {count!r}; accepted: 0 (nothing) to {MAX_FREEZE} (the whole encoder).")


def _freeze_stats(module: nn.Module, frozen: bool, training: bool) -> None:
    """Freeze or thaw BatchNorm statistics by changing the module's class: weights, hooks and optimizers stay valid."""
    kind = type(module)
    if frozen and kind.__name__ in TIMM_NORMS and kind.__module__.startswith("timm.") and kind not in FROZEN_STATS:
        _add_timm_norm(kind.__name__)
    changed = (FROZEN_STATS if frozen else TRAINED_STATS).get(kind)
    if changed is not None:
        module.__class__ = changed
        module.train(training)


def parameter_groups(
    network: nn.Module, lr: float, *, backbone_factor: float | None = None, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: "new" layers at `lr`, the encoder slower, frozen parameters left out.

    `backbone_factor` (0.1 unless `layer_decay` is given): one group "backbone" at `lr * backbone_factor`, the papers'
    rule. `layer_decay` d: a group each for "layer4" at lr * d, "layer3" at lr * d**2, down to "stem" at lr * d**5. Each
    group has "params", "lr" and "name". Raises ValueError for both at once, for values that are not positive, and when
    nothing can be trained.
    """
    if backbone_factor is not None and layer_decay is not None:
        raise ValueError("backbone_factor and layer_decay both set the encoder's learning rate; drop one.")
    if backbone_factor is None and layer_decay is None:
        backbone_factor = 0.1
    for what, value in (("lr", lr), ("backbone_factor", backbone_factor), ("layer_decay", layer_decay)):
        if value is not None and not value > 0:
            raise ValueError(f"{what} is {value!r}; accepted: positive numbers. freeze_stages stops the training.")
    stages = stages_of(encoder_of(network))
    stage_of = {parameter: name for name, parts in stages for part in parts for parameter in part.parameters()}
    if layer_decay is None:
        rates = {"backbone": lr * (backbone_factor or 0.0)}
        stage_of = dict.fromkeys(stage_of, "backbone")
    else:
        rates = {name: lr * layer_decay ** (len(stages) - number) for number, (name, _) in enumerate(stages)}
    rates |= {"new": lr}
    groups: dict[str, dict[str, Any]] = {name: {"params": [], "lr": rate, "name": name} for name, rate in rates.items()}
    for parameter in network.parameters():  # each once, also when two layers share it
        if parameter.requires_grad:
            groups[stage_of.get(parameter, "new")]["params"].append(parameter)
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise ValueError(f"No parameter of this {type(network).__name__} is trainable; accepted: at least one.")
    return used


def load_encoder(name: Name, host: str, *, pretrained: bool = True, output_stride: int = 32, **load: Any) -> Any:
    """Load an `ImageEncoder` that host libraries have too (`host_name`, or timm's). Raises ValueError for others.

    "timm/NAME[.TAG]" is timm's own network, with timm's own weights where `pretrained`.
    Random numbers are drawn aside, so the host's own layers start the same with `pretrained` True or False.
    """
    devices.check_request(load.get("dtype"), load.get("device"), DTYPES)
    entry = find(str(name))
    if entry is not None:
        name = entry.name
        if entry.modality != "2d":
            images = nearest(entry.name, (other.name for other in CATALOG.values() if other.modality == "2d"))
            raise ValueError(
                f"{entry.name!r} is a 3D network and {host} takes images; accepted: names of image networks, such as "
                f"{', '.join(map(repr, images))}, and their folders."
            )
    with torch.random.fork_rng(devices=[]):
        if isinstance(name, str) and is_timm(name):
            encoder: Any = _of_timm(name, pretrained, output_stride, load)
        else:
            encoder = load_backbone(name, pretrained=pretrained, output_stride=output_stride, **load)
    if getattr(encoder, "host_name", None) is None and not isinstance(encoder, TimmEncoder):
        width = f" of width {encoder.width}" if hasattr(encoder, "host_name") else ""
        raise ValueError(
            f"{str(name)!r} is a {type(encoder).__name__}{width}; accepted by {host}: ResNets of width 64, which is "
            "torchvision's."
        )
    return encoder


def _of_timm(name: str, pretrained: bool, output_stride: int, load: Mapping[str, Any]) -> Any:
    """timm's own network under the encoder protocol, in evaluation mode."""
    encoder = build_encoder(name, output_stride=output_stride, in_chans=None if pretrained else load.get("in_chans"))
    own = encoder.state_dict()
    if pretrained:
        if load.get("in_chans") not in (None, encoder.in_chans):
            raise ValueError(f"in_chans is {load['in_chans']}; accepted for {name!r} with pretrained weights: 3.")
        own = timm_weights(name, own, otherwise="Without a network: pretrained=False has random weights.")
        encoder.load_state_dict(own)
    fresh = () if pretrained else tuple(own)
    encoder.name, encoder.contract = name, timm_contract(name).with_channels(encoder.in_chans)
    encoder.load_report = LoadReport(len(own) - len(fresh), fresh, (), (), float(pretrained))
    return encoder.to(device=load.get("device"), dtype=load.get("dtype")).eval()


def split_options(
    host: str, options: Mapping[str, Any], accepted: Collection[str], ours: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those of `load_backbone` and those of the host.

    `ours` maps names of the host that a caller might try to what is used instead. Raises ValueError for those and
    `UnknownName` for what neither knows.
    """
    for option in options:
        if option in ours:
            raise ValueError(f"{option}: not an option here; {ours[option]}.")
        if option not in LOAD_OPTIONS and option not in accepted:
            raise unknown(f"option of {host}", option, [*accepted, *LOAD_OPTIONS])
    load = {key: value for key, value in options.items() if key in LOAD_OPTIONS}
    return load, {key: value for key, value in options.items() if key not in LOAD_OPTIONS}


def check_request(num_classes: int, freeze: int, *, least: int = 1) -> None:
    """Raise ValueError unless `num_classes` is a number from `least` up and `freeze` 0 to 5."""
    _check_freeze(freeze)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < least:
        what = " (the background is one)" if least > 1 else ""
        raise ValueError(f"num_classes is {num_classes!r}; accepted: a whole number from {least} up{what}.")


def refuse_input(network: nn.Module, inputs: tuple[Tensor]) -> None:
    """Check images before a host's network sees them; a forward pre-hook that torch can script."""
    if not torch.jit.is_scripting() and len(inputs) > 0:  # none: given by its name, and not looked at
        _check_input(network, inputs[0])


@torch.jit.ignore
def _check_input(network: nn.Module, x: Tensor) -> None:
    host: Any = network
    check_images(x, len(host.contract.channels), next(host.parameters()), 1)
    look_at(host, x)


def equip(network: Any, encoder: Any, freeze: int, transforms: Any = None) -> Any:
    """Finish a built network: freeze stages, attach contract and report, move it to the encoder's device and dtype."""
    freeze_stages(network, freeze)
    network.contract, network.load_report = encoder.contract, encoder.load_report
    network.transforms = encoder.transforms if transforms is None else transforms
    if transforms is None:  # others normalize themselves and have a check of their own
        network.register_forward_pre_hook(refuse_input)
    weight = next(encoder.parameters())
    return network.to(weight.device, weight.dtype).eval()
