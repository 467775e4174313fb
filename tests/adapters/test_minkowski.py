"""Our weights in MinkowskiEngine: key names against the authors' class, structure against the engine's numbers.

The engine cannot be installed here. Its layers are stood in for by classes with its constructor signatures and
parameter shapes (0.5.4), which compute with our own layers; the numbers compared with are the engine's.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from geo_pretrain.adapters import minkowski
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import MissingDependency
from geo_pretrain.sparse import SparseTensor, cat, layers

DATA = Path(__file__).resolve().parents[1] / "data"
SMALL = {"planes": (8, 12, 16, 24, 24, 16, 12, 12), "layers": (2, 3, 4, 6, 2, 2, 2, 2), "width": 8}


class Voxels:
    """What the adapter uses of an ME SparseTensor."""

    def __init__(self, features: Tensor, coordinates=None, coordinate_map_key=None, coordinate_manager=None) -> None:
        if coordinates is None:  # of a tensor that exists: its map and manager, here the stride and our tensor
            self.ours = coordinate_manager.with_sorted_feats(features, stride=coordinate_map_key)
        else:
            self.ours = SparseTensor(coordinates, features)
        self.F, self.coordinate_map_key, self.coordinate_manager = self.ours.sorted_feats, self.ours.stride, self.ours

    def __add__(self, other: Voxels) -> Voxels:
        return wrap(self.ours + other.ours)


def wrap(ours: SparseTensor) -> Voxels:
    return Voxels(ours.sorted_feats, coordinate_map_key=ours.stride, coordinate_manager=ours)


class MinkowskiConvolution(nn.Module):
    ours = layers.Conv3d

    def __init__(
        self, in_channels, out_channels, kernel_size=-1, stride=1, dilation=1, bias=False, kernel_generator=None,
        expand_coordinates=False, convolution_mode=None, dimension=None,
    ):  # fmt: skip
        super().__init__()
        assert dimension == 3
        assert dilation == 1
        assert kernel_size > 0
        self.layer = [self.ours(in_channels, out_channels, kernel_size, stride, bias=bias)]  # hidden from state dicts
        volume = kernel_size**3
        pointwise = volume == 1 and stride == 1
        self.kernel = nn.Parameter(torch.empty(*(() if pointwise else (volume,)), in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(1, out_channels)) if bias else None

    def forward(self, x: Voxels) -> Voxels:
        layer = self.layer[0]
        layer.kernel = self.kernel
        layer.bias = self.bias
        return wrap(layer(x.ours))


class MinkowskiConvolutionTranspose(MinkowskiConvolution):
    @staticmethod
    def ours(in_chans, out_chans, kernel_size, stride, bias):
        return layers.ConvTranspose3d(in_chans, out_chans, kernel_size, stride, bias=bias)


class MinkowskiBatchNorm(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True):
        super().__init__()
        self.bn = nn.BatchNorm1d(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, x: Voxels) -> Voxels:
        return wrap(x.ours.with_sorted_feats(self.bn(x.F)))


class MinkowskiReLU(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()

    def forward(self, x: Voxels) -> Voxels:
        return wrap(x.ours.with_sorted_feats(x.F.relu()))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    def together(*tensors: Voxels) -> Voxels:
        return wrap(cat(*(tensor.ours for tensor in tensors)))

    classes = (MinkowskiConvolution, MinkowskiConvolutionTranspose, MinkowskiBatchNorm, MinkowskiReLU)
    stand_in = SimpleNamespace(SparseTensor=Voxels, cat=together, **{c.__name__: c for c in classes})
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "srunet_small.safetensors")


def small(golden: dict[str, Tensor], **options) -> SRUNet:
    model = SRUNet("34C", **SMALL, **options).eval()
    model.load_state_dict({k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")})
    return model


@pytest.mark.parametrize(
    "manifest, options",
    [
        ("pointcontrast_res16unet34c", {}),
        ("slidr_minkunet", {"in_chans": 1, "out_chans": 64}),
        ("pri3d_resunet3d", {"out_chans": 96, "stem_kernel": 5}),
    ],
)
def test_the_state_dict_has_the_keys_and_shapes_of_the_authors_class(manifest: str, options: dict):
    keys = json.loads((DATA / f"{manifest}.json").read_text())["keys"]
    state = minkowski.state_dict(SRUNet("34C", **options))
    assert {key: list(value.shape) for key, value in state.items()} == keys


def test_the_state_dict_is_a_copy(golden):
    model = small(golden)
    state = minkowski.state_dict(model)
    assert all(torch.equal(value, golden[f"state_dict.{key}"]) for key, value in state.items())
    assert all(value.is_contiguous() and not value.requires_grad for value in state.values())
    state["conv0p1s1.kernel"].zero_()
    assert model.conv0p1s1.kernel.any()


@torch.no_grad()
@pytest.mark.parametrize("normalize, key", [(False, "eval.out"), (True, "normalized.eval.out")])
def test_a_network_of_engine_layers_computes_what_the_engine_computed(engine, golden, normalize: bool, key: str):
    model = small(golden, normalize=normalize)
    network = minkowski.me_network(model)
    assert list(network.state_dict()) == list(model.state_dict())
    assert not any(isinstance(module, layers.Conv3d | layers.BatchNorm) for module in network.modules())
    out = network(engine.SparseTensor(golden["feats"], coordinates=golden["coords"])).ours.feats
    torch.testing.assert_close(out, golden[key], rtol=0, atol=1e-5 * float(golden[key].abs().max()))


def test_mode_momentum_dtype_and_our_own_network_survive(engine, golden):
    model = small(golden, bn_momentum=0.02).double().train()
    names = [type(module).__name__ for module in model.modules()]
    network = minkowski.me_network(model)
    assert network.training
    assert network.final.kernel.dtype == torch.float64
    momenta, theirs = (
        {name: module.momentum for name, module in net.named_modules() if isinstance(module, nn.BatchNorm1d)}
        for net in (model, network)
    )
    assert theirs == momenta
    assert set(momenta.values()) == {0.02, 0.1}
    assert [type(module).__name__ for module in model.modules()] == names
    with torch.no_grad():
        network.final.kernel.zero_()
    assert model.final.kernel.any()


def test_the_contract_travels_with_a_named_network(engine):
    network = minkowski.me_network("pointcontrast_nce_srunet34", pretrained=False)
    assert not network.training
    assert network.contract.voxel_size == 0.025
    voxels = network.transforms(torch.rand(50, 3))
    with torch.no_grad():
        out = network(engine.SparseTensor(voxels.feats, coordinates=voxels.coords))
    assert out.F.shape == (len(voxels), 32)
    assert list(copy.deepcopy(network).state_dict()) == list(network.state_dict())


def test_without_the_engine_the_error_has_the_install_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    with pytest.raises(MissingDependency, match=r"'MinkowskiEngine', which is not installed: pip install .*load_backb"):
        minkowski.me_network(SRUNet("34C", **SMALL))


def test_other_networks_and_options_are_refused():
    with pytest.raises(ValueError, match="Got a ResNetUNet; accepted: an SRUNet, the name or the folder of one"):
        minkowski.state_dict(ResNetUNet(18, width=8))
    with pytest.raises(ValueError, match="Got a ResNetEncoder; accepted: an SRUNet"):
        minkowski.state_dict("pri3d_view_r18", pretrained=False)
    with pytest.raises(ValueError, match="in_chans: options of load_backbone, for names and folders only"):
        minkowski.state_dict(SRUNet("34C", **SMALL), in_chans=4)
