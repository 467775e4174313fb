"""The encoders and DeepLabV3 leave Python: torch.compile, torch.export and ONNX give the same numbers at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from geo_pretrain.adapters import smp, torchvision
from geo_pretrain.loading import load_backbone
from tests.adapters.conftest import lively
from tests.zoo import tiny_timm

NETWORKS: dict[str, Callable[[Path], nn.Module]] = {
    "encoder": load_backbone,
    "unet": lambda folder: load_backbone("pri3d_view_r18.rooms", decoder=True, pretrained=False),
    "timm": lambda folder: load_backbone("timm/resnet10t", pretrained=False),
    "convnext": lambda folder: tiny_timm("timm/test_convnext2", 0),  # leaves out pixels that its stride does not divide
    "torchvision": lambda folder: torchvision.deeplabv3(folder, num_classes=3, freeze=2),
    "smp": lambda folder: smp.deeplabv3(folder, num_classes=3),
}
DYNAMIC = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)  # batch, height, width


def images(count: int, *size: int) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def outputs(given) -> list[Tensor]:
    values = given.values() if isinstance(given, dict) else given if isinstance(given, list | tuple) else [given]
    return [torch.as_tensor(value) for value in values]


def assert_same(given, expected) -> None:
    given, expected = outputs(given), outputs(expected)
    for value, other in zip(given, expected, strict=True):
        assert value.shape == other.shape
        assert float(other.abs().max()) > 0.01
        assert float((value - other).abs().max() / other.abs().max()) < 1e-5


@pytest.fixture(scope="module")
def networks(r18: Path) -> dict[str, nn.Module]:
    built = {name: build(r18) for name, build in NETWORKS.items()}
    for name in ("torchvision", "smp"):
        torch.manual_seed(0)
        lively(built[name].get_submodule("classifier" if name == "torchvision" else "decoder"))
    return built


@pytest.fixture(scope="module")
def programs(networks: dict[str, nn.Module]) -> dict[str, torch.export.ExportedProgram]:
    given = (images(2, 64, 96),)
    return {
        name: torch.export.export(net, given, dynamic_shapes=DYNAMIC, strict=False) for name, net in networks.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_program_takes_other_batches_and_sizes(networks, programs, name: str):
    program = programs[name].module()
    odd = () if name == "smp" else (images(1, 70, 95),)  # smp refuses what 16 does not divide
    for x in (images(2, 64, 96), images(1, 128, 64), *odd):
        assert_same(program(x), networks[name](x))


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["timm", "convnext", "torchvision"]
)  # our encoder is in torchvision's, which gives its last map
def test_onnxruntime_agrees_at_other_batches_and_sizes(networks, programs, name: str, tmp_path: Path):
    torch.onnx.export(programs[name], dynamo=True, verbose=False).save(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert [type(size) for size in given.shape] == [str, int, str, str]
    for x in (images(2, 64, 96), images(1, 128, 64), images(1, 70, 95)):
        assert_same(session.run(None, {given.name: x.numpy()}), networks[name](x))


@pytest.mark.parametrize("name", ["smp", "unet"])  # our encoder is in both, and gives all its maps
def test_compiled_in_one_piece_it_computes_the_same(networks, name: str):
    network = networks[name]
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert_same(compiled(images(2, 64, 96)), network(images(2, 64, 96)))
