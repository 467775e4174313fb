"""One real-size ResNet-18 checkpoint for the tests of all hosts; its weights were drawn by torchvision's class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from geo_pretrain.catalog import Arch
from geo_pretrain.contract import ImageContract
from tests.zoo import write_tiny

CONTRACT = ImageContract(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), size=(64, 96), interpolation="bilinear")


def lively(network: nn.Module) -> nn.Module:
    """Norms that do something: statistics and scales as no constructor draws them."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.7, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    return network


@pytest.fixture(scope="module", autouse=True)
def quick(quick_weights: None) -> None:
    """Whatever the weights are, hosts compute the same with them."""


@pytest.fixture(scope="session")
def source() -> nn.Module:
    """The torchvision network that the checkpoint was made from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lively(torchvision.models.resnet18(num_classes=1)).eval()


@pytest.fixture(scope="session")
def r18(tmp_path_factory: pytest.TempPathFactory, source: nn.Module) -> Path:
    weights = {key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    folder = tmp_path_factory.mktemp("hosts") / "stored_host_r18"
    arch = Arch("resnet_unet", {"depth": 18, "width": 64, "out_chans": 32})
    write_tiny(folder, folder.name, arch=arch, contract=CONTRACT, weights={"encoder": weights})
    return folder
