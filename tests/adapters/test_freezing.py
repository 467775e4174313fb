"""Frozen stages stay frozen, and parameter groups hold every parameter once."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn
from torch.optim import swa_utils

from geo_pretrain.adapters import smp as in_smp
from geo_pretrain.adapters import torchvision as in_torchvision
from geo_pretrain.adapters.common import encoder_of, freeze_stages, parameter_groups
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.loading import load_backbone

STAGE_OF = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
NAME = "pri3d_view_r18"
BUILDERS = {
    "smp.unet": (in_smp.unet, "encoder."),
    "smp.deeplabv3plus": (in_smp.deeplabv3plus, "encoder."),
    "torchvision.deeplabv3": (in_torchvision.deeplabv3, "backbone."),
}


def build(host: str, **options):
    return BUILDERS[host][0](NAME, num_classes=2, pretrained=False, **options)


def train_a_step(network: nn.Module) -> set[str]:
    """Names of everything a step of training changed."""
    before = copy.deepcopy(network.state_dict())
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    out = network(torch.rand(2, 3, 32, 64))
    loss = out["out"] if isinstance(out, dict) else out
    loss.square().mean().backward()
    optimizer.step()
    after = network.state_dict()
    assert list(after) == list(before)
    return {key for key in after if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("host, freeze", [(host, freeze) for host in BUILDERS for freeze in (0, 2)] + [
    ("smp.unet", freeze) for freeze in (1, 5)
])  # fmt: skip
def test_frozen_stages_do_not_move_in_training_mode(host: str, freeze: int):
    network = build(host, freeze=freeze).train()
    prefix = BUILDERS[host][1]
    moved = train_a_step(network)
    for key in network.state_dict():
        if key.startswith(prefix):
            assert (key in moved) == (STAGE_OF[key.removeprefix(prefix).split(".")[0]] >= freeze), key
    assert {key for key in network.state_dict() if not key.startswith(prefix)} <= moved


@pytest.mark.parametrize("host", ["smp.unet", "torchvision.deeplabv3"])
def test_freezing_survives_modes_copies_and_pickles(host: str):
    network = build(host, freeze=3)
    for twin in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        for mode in (True, False, True):
            twin.train(mode)
            for name, module in encoder_of(twin).named_modules():
                if isinstance(module, nn.BatchNorm2d):
                    frozen = STAGE_OF[name.split(".")[0]] < 3
                    assert module.training == (mode and not frozen)
                    assert module.weight.requires_grad != frozen
    assert list(network.state_dict()) == list(build(host).state_dict())


def test_stages_can_be_thawed_and_frozen_again():
    network = build("smp.unet", freeze=5).train()
    freeze_stages(network, 1)
    thawed = {type(module) for module in network.encoder.layer1.modules()} | {type(network.encoder.layer4[1].bn2)}
    assert nn.BatchNorm2d in thawed
    assert not any("FrozenStats" in kind.__name__ for kind in thawed)
    assert network.encoder.layer4[1].bn2.training
    assert not network.encoder.bn1.training
    moved = train_a_step(network)
    assert "encoder.layer1.0.bn1.running_mean" in moved
    assert not {key for key in moved if key.startswith(("encoder.conv1", "encoder.bn1"))}
    freeze_stages(network, 2)
    assert not {key for key in train_a_step(network) if key.startswith("encoder.layer1")}


def test_after_a_conversion_to_sync_batch_norm_it_is_called_again():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(build("smp.unet"))
    freeze_stages(network, 2)
    network.train()
    assert isinstance(network.encoder.bn1, nn.SyncBatchNorm)
    assert not network.encoder.bn1.training
    assert not network.encoder.layer1[0].bn1.training
    assert network.encoder.layer2[0].bn1.training
    freeze_stages(network, 0)
    assert type(network.encoder.bn1) is nn.SyncBatchNorm
    assert network.encoder.bn1.training


def test_statistics_stay_when_averaged_weights_get_theirs_anew():
    network = build("smp.unet", freeze=2).train()
    with torch.no_grad():
        network.encoder.bn1.running_mean.fill_(0.3)
        network.encoder.layer3[0].bn1.running_mean.fill_(0.3)
    averaged = swa_utils.AveragedModel(network, use_buffers=True)
    swa_utils.update_bn([torch.rand(2, 3, 32, 64)], averaged)
    assert torch.all(averaged.module.encoder.bn1.running_mean == 0.3)
    assert not torch.any(averaged.module.encoder.layer3[0].bn1.running_mean == 0.3)


def test_timms_synchronized_norms_are_frozen_too():
    network = timm.layers.convert_sync_batchnorm(timm.create_model("efficientnet_lite0", features_only=True))
    freeze_stages(network, 5)
    network.train()
    norms = [module for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert {type(norm).__name__ for norm in norms} == {"FrozenStatsSyncBatchNormAct"}
    assert not any(norm.training for norm in norms)
    twin = pickle.loads(pickle.dumps(network)).train()
    assert not any(norm.training for norm in twin.modules() if isinstance(norm, nn.SyncBatchNorm))


@pytest.mark.parametrize("wrap", [nn.DataParallel, swa_utils.AveragedModel, torch.compile])
def test_the_encoder_is_found_in_a_wrapper(wrap):
    network = build("smp.unet")
    wrapped = wrap(network)
    freeze_stages(wrapped, 5)
    inside = wrapped._orig_mod if wrap is torch.compile else wrapped.module
    assert not any(parameter.requires_grad for parameter in inside.encoder.parameters())
    assert {group["name"] for group in parameter_groups(wrapped, 1.0)} == {"new"}


def test_a_layer_that_is_called_module_is_no_wrapper():
    network = nn.ModuleDict({"module": nn.Linear(2, 2), "backbone": torchvision.models.resnet18()})
    assert encoder_of(network) is network["backbone"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: load_backbone(NAME, pretrained=False),
        lambda: load_backbone(NAME, pretrained=False, decoder=True),
        lambda: torchvision.models.resnet18(),
        lambda: in_torchvision.faster_rcnn(NAME, num_classes=2, pretrained=False),
        lambda: smp.FPN("resnet18", encoder_weights=None),
        lambda: smp.FPN("tu-resnet18", encoder_weights=None),
        lambda: timm.create_model("resnet18", features_only=True),
    ],
)
def test_the_encoder_is_found_in_every_host(make):
    network = make()
    encoder = encoder_of(network)
    assert sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("fc.")) == 11176512
    freeze_stages(network, 2)
    network.train()
    frozen = {parameter for parameter in network.parameters() if not parameter.requires_grad}
    stages = (encoder.get_submodule(name) for name in ("conv1", "bn1", "layer1"))
    assert frozen == {parameter for stage in stages for parameter in stage.parameters()}
    groups = parameter_groups(network, 1.0)
    assert sum(len(group["params"]) for group in groups) + len(frozen) == len(list(network.parameters()))


def test_networks_without_one_and_numbers_out_of_range_are_refused():
    for network in (nn.Linear(2, 2), SRUNet("34C", planes=(8,) * 8, width=8)):
        with pytest.raises(
            ValueError, match=r"has no ResNet .*; accepted: such a ResNet, or a network that has one as"
        ):
            encoder_of(network)
    for count in (-1, 6, 1.0, True, None):
        with pytest.raises(ValueError, match=r"freeze is .*; accepted: 0 \(nothing\) to 5"):
            freeze_stages(ResNetUNet(18, width=8), count)


# --- parameter groups ---


@pytest.mark.parametrize("host", BUILDERS)
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}])
def test_every_parameter_is_in_one_group(host: str, options: dict):
    network = build(host)
    groups = parameter_groups(network, 0.1, **options)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in network.parameters()}
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    prefix = BUILDERS[host][1]
    for name, parameter in network.named_parameters():
        expected = 0.1
        if name.startswith(prefix):
            stage = STAGE_OF[name.removeprefix(prefix).split(".")[0]]
            expected = 0.1 * (0.5 ** (5 - stage) if options else 0.1)
        assert rate_of[id(parameter)] == pytest.approx(expected), name


def test_groups_have_names_and_an_optimizer_takes_them():
    network = build("smp.unet")
    assert [group["name"] for group in parameter_groups(network, 0.1)] == ["backbone", "new"]
    groups = parameter_groups(network, 0.1, backbone_factor=1.0)
    assert [group["lr"] for group in groups] == [0.1, 0.1]
    groups = parameter_groups(network, 0.1, layer_decay=0.5)
    assert [group["name"] for group in groups] == ["stem", "layer1", "layer2", "layer3", "layer4", "new"]
    assert [group["lr"] for group in groups] == pytest.approx([0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1])
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.AdamW(parameter_groups(network, 0.1))


def test_frozen_parameters_are_left_out():
    network = build("smp.unet", freeze=2)
    groups = parameter_groups(network, 0.1, layer_decay=0.9)
    assert [group["name"] for group in groups] == ["layer2", "layer3", "layer4", "new"]
    freeze_stages(network, 5)
    assert [group["name"] for group in parameter_groups(network, 0.1)] == ["new"]
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of this Unet is trainable"):
        parameter_groups(network, 0.1)


def test_a_shared_parameter_is_in_one_group():
    network = build("smp.unet")
    network.head_too = network.segmentation_head
    groups = parameter_groups(network, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    assert torch.optim.SGD(groups)


def test_wrong_rates_are_refused():
    network = build("smp.unet")
    with pytest.raises(ValueError, match="drop one"):
        parameter_groups(network, 0.1, backbone_factor=0.1, layer_decay=0.9)
    for options in ({"backbone_factor": 0.0}, {"layer_decay": -1.0}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; accepted: positive numbers"):
            parameter_groups(network, **{"lr": 0.1, **options})


def test_a_stored_network_is_frozen_with_its_weights(r18: Path, source: nn.Module):
    network = in_smp.unet(r18, num_classes=2, freeze=5).train()
    train_a_step(network)
    state = network.encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items() if key in state)
