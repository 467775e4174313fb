"""torchvision's ResNet, DeepLabV3 and FCN with our weights compute what our encoder computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from geo_pretrain.adapters.torchvision import deeplabv3, fcn, resnet
from geo_pretrain.errors import UnknownName
from geo_pretrain.loading import load_backbone
from tests.adapters.conftest import CONTRACT, lively
from tests.zoo import write_tiny, write_tiny_3d

BUILDERS = {"deeplabv3": deeplabv3, "fcn": fcn}
STAGES = ["relu", "layer1", "layer2", "layer3", "layer4"]


def images(chans: int = 3) -> Tensor:
    return torch.randn(2, chans, 64, 96, generator=torch.Generator().manual_seed(3))


def maps_inside(network: nn.Module, encoder: nn.Module, x: Tensor) -> list[Tensor]:
    """What the five stages of the host's encoder give."""
    seen: list[Tensor] = []
    handles = [encoder[name].register_forward_hook(lambda m, given, out: seen.append(out.clone())) for name in STAGES]
    network(x)
    for handle in handles:
        handle.remove()
    return seen


def assert_equal_maps(maps, expected) -> None:
    for value, other in zip(maps, expected, strict=True):
        assert value.shape == other.shape
        assert float((value - other).abs().max() / other.abs().max()) < 1e-5


# --- resnet ---


@torch.no_grad()
@pytest.mark.parametrize("in_chans", [3, 4])
def test_features_equal_the_plain_encoder(r18: Path, in_chans: int):
    network = resnet(str(r18), num_classes=7, in_chans=in_chans)
    assert type(network) is torchvision.models.ResNet
    assert network.fc.out_features == 7
    assert not network.training
    extractor = create_feature_extractor(network, STAGES).eval()
    assert_equal_maps(extractor(images(in_chans)).values(), load_backbone(r18, in_chans=in_chans)(images(in_chans)))
    assert network(images(in_chans)).shape == (2, 7)


def test_the_contract_travels(r18: Path):
    network = resnet(str(r18))
    assert network.contract == CONTRACT
    assert network.fc.out_features == 1000  # torchvision's, unless told otherwise
    assert network.transforms(torch.rand(3, 50, 50)).shape == (3, 64, 96)
    assert network.load_report.coverage == 1.0


@torch.no_grad()
def test_output_stride_is_torchvisions_dilation():
    network = resnet("pri3d_view_r50", pretrained=False, output_stride=8, num_classes=2)
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(num_classes=2, replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(network.state_dict(), assign=True)
    torch.testing.assert_close(network(images()), theirs(images()), rtol=0, atol=0)
    value = create_feature_extractor(network, ["layer4"]).eval()(images())["layer4"]
    assert value.shape[2:] == (8, 12)


def test_what_torchvision_cannot_do_is_refused(r18: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="decoder: not an option here; torchvision's ResNet has none"):
        resnet(str(r18), decoder=True)
    with pytest.raises(ValueError, match="torchvision dilates ResNet-50 and deeper; accepted: 32"):
        resnet(str(r18), output_stride=8)
    write_tiny(tmp_path / "tiny")
    with pytest.raises(ValueError, match="width 64"):
        resnet(str(tmp_path / "tiny"))


# --- segmentation ---


@torch.no_grad()
@pytest.mark.parametrize("host", BUILDERS)
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_the_head_sees_the_maps_of_the_plain_encoder(r18: Path, host: str, stride: int):
    network = BUILDERS[host](r18, num_classes=5, output_stride=stride, aux_loss=True)
    assert type(network) is {"deeplabv3": torchvision.models.segmentation.DeepLabV3}.get(
        host, torchvision.models.segmentation.FCN
    )
    assert not network.training
    maps = maps_inside(network, network.backbone, images())
    assert_equal_maps(maps, load_backbone(r18, output_stride=stride)(images()))
    out = network(images())
    assert {key: value.shape for key, value in out.items()} == dict.fromkeys(("out", "aux"), (2, 5, 64, 96))
    expected = torch.nn.functional.interpolate(network.aux_classifier(maps[3]), (64, 96), mode="bilinear")
    torch.testing.assert_close(out["aux"], expected)


@torch.no_grad()
@pytest.mark.parametrize("host", BUILDERS)
def test_a_resnet50_is_torchvisions_own_network(host: str):
    """Same keys, and with the same weights the same numbers as torchvision's builder, which is dilated to stride 8."""
    network = BUILDERS[host]("pri3d_view_r50", num_classes=3, pretrained=False, output_stride=8, aux_loss=True)
    lively(network.backbone)
    builder = getattr(torchvision.models.segmentation, f"{host}_resnet50")
    with torch.device("meta"):
        theirs = builder(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).eval()
    assert list(network.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(network.state_dict(), assign=True)
    ours, others = network(images()[:1]), theirs(images()[:1])
    for key in ("out", "aux"):
        torch.testing.assert_close(ours[key], others[key], rtol=0, atol=0)


def test_defaults_are_the_papers():
    def dilations(network) -> list[int]:
        convs = [module for module in network.classifier.modules() if isinstance(module, nn.Conv2d)]
        return [conv.dilation[0] for conv in convs if conv.dilation[0] > 1]

    def shape(network) -> torch.Size:
        with torch.no_grad():
            return network.backbone(images())["out"].shape[2:]

    name = "pri3d_view_r18"
    network = deeplabv3(name, num_classes=2, pretrained=False)
    assert (dilations(network), tuple(shape(network)), network.aux_classifier) == ([6, 12, 18], (4, 6), None)
    network = deeplabv3(name, num_classes=2, pretrained=False, output_stride=8)
    assert (dilations(network), tuple(shape(network))) == ([12, 24, 36], (8, 12))
    assert dilations(deeplabv3(name, num_classes=2, pretrained=False, output_stride=32)) == [3, 6, 9]
    assert dilations(deeplabv3(name, num_classes=2, pretrained=False, atrous_rates=(2, 4))) == [2, 4]
    frozen = fcn(name, num_classes=2, pretrained=False, freeze=1).backbone
    assert [part.weight.requires_grad for part in (frozen.conv1, frozen.layer1[0].conv1)] == [False, True]
    assert tuple(shape(fcn(name, num_classes=2, pretrained=False))) == (8, 12)


@pytest.mark.parametrize("host", BUILDERS)
def test_the_contract_is_on_the_network_and_only_the_encoder_differs_from_scratch(r18: Path, host: str):
    networks = []
    for pretrained in (True, False):
        torch.manual_seed(5)
        networks.append(BUILDERS[host](r18, num_classes=3, pretrained=pretrained, in_chans=4, aux_loss=True))
    states = [network.state_dict() for network in networks]
    assert list(states[0]) == list(states[1])
    same = {key for key, value in states[0].items() if torch.equal(value, states[1][key])}
    assert {key for key in states[0] if not key.startswith("backbone.")} <= same
    assert not {key for key in states[0] if key.startswith("backbone.") and states[0][key].ndim == 4} & same
    for network in networks:
        assert network.contract == CONTRACT.with_channels(4)
        assert network.transforms.contract == network.contract
    assert networks[0].load_report.reshaped == ("conv1.weight",)
    assert (networks[0].load_report.loaded, networks[1].load_report.loaded) == (120, 0)


def test_a_classifier_starts_the_same_with_weights_and_without(r18: Path):
    heads = []
    for pretrained in (True, False):
        torch.manual_seed(5)
        heads.append(resnet(r18, num_classes=3, pretrained=pretrained).fc.weight)
    assert torch.equal(*heads)
    for options, said in (
        ({"num_classes": -1}, "num_classes is -1; accepted: a whole number from 1 up"),
        ({"num_classes": "10"}, "num_classes is '10'"),
        ({"freeze": 2}, r"freeze: not an option here; call freeze_stages\(network, count\) afterwards"),
        ({"decoder": True}, "decoder: not an option here; torchvision's ResNet has none"),
        ({"strickt": True}, r"Unknown option of torchvision's ResNet 'strickt'\. Closest: 'strict'"),
    ):
        with pytest.raises((ValueError, UnknownName), match=said):
            resnet(r18, **options)


def test_wrong_names_and_options_are_refused(tmp_path: Path):
    with pytest.raises(UnknownName, match="pri3d_view_r18"):
        deeplabv3("pri3d_veiw_r18", num_classes=2)
    with pytest.raises(ValueError, match="is a 3D network and torchvision's FCN takes images"):
        fcn("csc_100k_srunet34", num_classes=2)
    write_tiny_3d(tmp_path / "points")
    with pytest.raises(ValueError, match="output_stride shape image encoders"):
        fcn(tmp_path / "points", num_classes=2)
    name = "pri3d_view_r18"
    with pytest.raises(UnknownName, match=r"Unknown option of torchvision's FCN 'aux_los'\. Closest: 'aux_loss'"):
        fcn(name, num_classes=2, aux_los=True)
    with pytest.raises(ValueError, match="weights_backbone: not an option here; use pretrained"):
        deeplabv3(name, num_classes=2, weights_backbone=None)
    with pytest.raises(UnknownName, match="Unknown option of torchvision's DeepLabV3 'decoder'"):
        deeplabv3(name, num_classes=2, decoder=True)
    with pytest.raises(ValueError, match="num_classes is 0"):
        fcn(name, num_classes=0)
    with pytest.raises(ValueError, match="freeze is -1"):
        fcn(name, num_classes=2, freeze=-1)
    with pytest.raises(ValueError, match="output_stride is 4; accepted: 8, 16 or 32"):
        deeplabv3(name, num_classes=2, output_stride=4)
