"""torchvision's own ResNet with our weights computes what our encoder computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from geo_pretrain.adapters.torchvision import resnet
from geo_pretrain.catalog import Arch
from geo_pretrain.loading import load_backbone
from tests.zoo import write_tiny


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of torchvision's width whose weights were drawn and saved by torchvision's class."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    weights = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    folder = tmp_path_factory.mktemp("hub") / "stored_net_r18"
    arch = Arch("resnet_unet", {"depth": 18, "width": 64, "out_chans": 32})
    write_tiny(folder, "stored_net_r18", arch=arch, weights={"encoder": weights})
    return folder


@torch.no_grad()
@pytest.mark.parametrize("in_chans", [3, 4])
def test_features_equal_the_plain_encoder(stored: Path, in_chans: int):
    network = resnet(str(stored), num_classes=7, in_chans=in_chans)
    assert type(network) is torchvision.models.ResNet
    assert network.fc.out_features == 7
    assert not network.training
    encoder = load_backbone(stored, in_chans=in_chans)
    images = torch.rand(2, in_chans, 64, 96)
    extractor = create_feature_extractor(network, ["relu", "layer1", "layer2", "layer3", "layer4"]).eval()
    for value, expected in zip(extractor(images).values(), encoder(images), strict=True):
        assert float((value - expected).abs().max() / expected.abs().max()) < 1e-5
    assert network(images).shape == (2, 7)


def test_the_contract_travels(stored: Path):
    network = resnet(str(stored))
    assert network.contract.size == (64, 96)
    assert network.transforms(torch.rand(3, 50, 50)).shape == (3, 64, 96)
    assert network.load_report.coverage == 1.0


@torch.no_grad()
def test_output_stride_is_torchvisions_dilation():
    torch.manual_seed(1)
    network = resnet("pri3d_view_r50", pretrained=False, output_stride=8, num_classes=2)
    encoder = load_backbone("pri3d_view_r50", pretrained=False, output_stride=8)
    encoder.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("fc.")})
    images = torch.rand(1, 3, 64, 64)
    value = create_feature_extractor(network, ["layer4"]).eval()(images)["layer4"]
    torch.testing.assert_close(value, encoder(images)[-1])
    assert value.shape[2:] == (8, 8)


def test_what_torchvision_cannot_do_is_refused(stored: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="decoder: torchvision's ResNet has no such option"):
        resnet(str(stored), decoder=True)
    with pytest.raises(ValueError, match="torchvision dilates ResNet-50 and deeper; accepted: 32"):
        resnet(str(stored), output_stride=8)
    write_tiny(tmp_path / "tiny")
    with pytest.raises(ValueError, match="width 64"):
        resnet(str(tmp_path / "tiny"))
