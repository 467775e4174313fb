"""The 2D network against golden values of the released code, and its encoder against torchvision's own class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.fx
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from geo_pretrain.backbones.depth_unet import ResNetDepthUNet
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet

pytestmark = pytest.mark.usefixtures("quick_weights")

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "res_unet2d_small.safetensors")


def golden_network(golden: dict[str, Tensor]) -> ResNetUNet:
    network = ResNetUNet(18, width=8, out_chans=32)
    prefix = "state_dict."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
    return network


def relative(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return float((value.detach() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("mode", "limit"), [("eval", 1e-5), ("train", 1e-4)])
def test_outputs_gradients_and_buffers_equal_the_released_code(golden: dict[str, Tensor], mode: str, limit: float):
    network = golden_network(golden).train(mode == "train")
    images = golden["input"].clone().requires_grad_()
    out = network(images)
    loss = (out * golden["loss_weight"]).mean()
    loss.backward()
    assert relative(out, golden[f"{mode}.out"]) < limit
    assert abs(float(loss.detach() - golden[f"{mode}.loss"].squeeze())) < 1e-6
    assert relative(images.grad, golden[f"{mode}.grad_input"]) < limit
    parameters = dict(network.named_parameters())
    names = [k.removeprefix(f"{mode}.grad.") for k in golden if k.startswith(f"{mode}.grad.")]
    assert len(names) == 6
    for name in names:
        assert relative(parameters[name].grad, golden[f"{mode}.grad.{name}"]) < limit, name
    if mode == "train":
        after = [k for k in golden if k.startswith("train.after.")]
        assert len(after) == 3
        for key in after:
            assert relative(network.state_dict()[key.removeprefix("train.after.")], golden[key]) < 1e-5, key


def test_intermediate_maps_equal_the_released_code(golden: dict[str, Tensor]):
    network = golden_network(golden).eval()
    with torch.no_grad():
        maps = network.encoder(golden["input"])
        up1 = network.decoder.up1(maps[4], (4, 6))
        up2 = network.decoder.up2(up1 + maps[3], (8, 12))
    for stage in range(1, 5):
        assert relative(maps[stage], golden[f"eval.encoder_out.{stage}"]) < 1e-5
    assert relative(up1, golden["eval.up1"]) < 1e-5
    assert relative(up2, golden["eval.up2"]) < 1e-5


@pytest.mark.parametrize(("depth", "out_chans"), [(18, 32), (50, 128)])
def test_names_and_shapes_equal_the_published_checkpoints(depth: int, out_chans: int):
    manifest = json.loads((DATA / f"pri3d_res{depth}unet.json").read_text())
    with torch.device("meta"):
        network = ResNetUNet(depth)
    assert network.out_chans == out_chans
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == manifest["keys"]
    assert list(network.state_dict()) == list(manifest["keys"])
    assert sum(p.numel() for p in network.parameters()) == manifest["num_params"]


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_encoder_keys_are_those_of_torchvision_without_fc(depth: int):
    with torch.device("meta"):
        ours, theirs = ResNetEncoder(depth), getattr(torchvision.models, f"resnet{depth}")()
    expected = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected


def randomize_norms(network: torch.nn.Module) -> None:
    """Fresh batch norms are identities and would hide a missing or misplaced one."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)


@pytest.mark.parametrize(
    ("depth", "output_stride", "replace"),
    [(18, 32, None), (50, 32, None), (50, 16, [False, False, True]), (50, 8, [False, True, True])],
)
def test_encoder_computes_what_torchvision_computes(depth: int, output_stride: int, replace: list[bool] | None):
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(replace_stride_with_dilation=replace).eval()
    randomize_norms(theirs)
    ours = ResNetEncoder(depth, output_stride=output_stride).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    images = torch.randn(1, 3, 72, 96)
    maps: dict[str, Tensor] = {}
    for name in ("relu", "layer1", "layer2", "layer3", "layer4"):
        theirs.get_submodule(name).register_forward_hook(lambda m, i, out, n=name: maps.__setitem__(n, out.clone()))
    with torch.no_grad():
        theirs(images)
        for value, info in zip(ours(images), ours.feature_info, strict=True):
            expected = maps[info["module"]]
            assert value.shape == expected.shape
            assert relative(value, expected) < 1e-5


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilation_keeps_the_values_at_the_points_of_the_strided_grid(depth: int, output_stride: int):
    torch.manual_seed(0)
    strided, dilated = ResNetEncoder(depth, width=8), ResNetEncoder(depth, width=8, output_stride=output_stride)
    randomize_norms(strided)
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        pairs = zip(strided.eval()(images), dilated.eval()(images), strict=True)
        for (coarse, fine), reduction in zip(pairs, (2, 4, 8, 16, 32), strict=True):
            step = max(1, reduction // output_stride)
            torch.testing.assert_close(fine[:, :, ::step, ::step], coarse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_maps_match_feature_info(depth: int, output_stride: int):
    encoder = ResNetEncoder(depth, width=8, output_stride=output_stride, out_indices=(0, 2, 4)).eval()
    maps = encoder(torch.rand(2, 3, 64, 96))
    assert len(maps) == len(encoder.feature_info) == 3
    for value, info in zip(maps, encoder.feature_info, strict=True):
        assert value.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])


def test_stages_beyond_the_last_index_are_not_computed():
    encoder = ResNetEncoder(18, width=8, out_indices=(0, 1))
    encoder.layer3.register_forward_hook(lambda *_: pytest.fail("layer3 ran"))
    assert len(encoder(torch.rand(2, 3, 64, 64))) == 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((240, 320), (120, 160)),
        ((32, 32), (16, 16)),
        ((50, 67), (25, 34)),
        ((180, 360), (90, 180)),
        ((33, 65), (17, 33)),
    ],
)
def test_output_is_half_the_input_rounded_up_for_any_size(size: tuple[int, int], expected: tuple[int, int]):
    network = ResNetUNet(18, width=8, out_chans=5).eval()
    images = torch.rand(1, 3, *size)
    dense, maps = network.forward_intermediates(images)
    assert dense.shape == (1, 5, *expected)
    assert dense.shape[2:] == maps[0].shape[2:]
    released = network.decoder(
        maps[1:]
    )  # as the released network: a row or column more where a side is no multiple of 4
    assert torch.equal(network(images), released[:, :, : expected[0], : expected[1]])


@pytest.mark.parametrize("network", [ResNetEncoder(18, width=8), ResNetUNet(18, width=8), ResNetDepthUNet(18, width=8)])
def test_fx_traces_the_networks_of_images(network: torch.nn.Module):
    traced = torch.fx.symbolic_trace(network.eval())
    for size in ((64, 96), (50, 67)):  # one graph for all sizes
        images = torch.rand(1, 3, *size)
        torch.testing.assert_close(traced(images), network(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="at least 32"):  # the checks are part of the graph
        traced(torch.rand(1, 3, 16, 16))


def test_240x320_gives_the_sizes_of_the_paper():
    network = ResNetEncoder(18, width=8).eval()
    sizes = [tuple(m.shape[2:]) for m in network(torch.rand(1, 3, 240, 320))]
    assert sizes == [(120, 160), (60, 80), (30, 40), (15, 20), (8, 10)]


def test_initialization_follows_the_fan_out_rule():
    torch.manual_seed(0)
    encoder = ResNetEncoder(18)
    for name, chans in (("conv1", 7 * 7 * 64), ("layer3.0.conv1", 3 * 3 * 256)):
        std = float(encoder.get_submodule(name).weight.detach().std())
        assert std == pytest.approx((2 / chans) ** 0.5, rel=0.03)


def test_wrong_arguments_and_images_are_explained():
    with pytest.raises(ValueError, match="depth 20; accepted: 18, 34, 50, 101"):
        ResNetEncoder(20)
    with pytest.raises(ValueError, match="output_stride is 4; accepted: 8, 16 or 32"):
        ResNetEncoder(18, output_stride=4)
    for indices in ((), (5,), (1, 1), (2, 1), (-1,)):
        with pytest.raises(ValueError, match="out_indices"):
            ResNetEncoder(18, width=8, out_indices=indices)
    encoder = ResNetEncoder(18, width=8)
    with pytest.raises(ValueError, match="Images are 31 x 64 pixels; accepted: at least 32"):
        encoder(torch.rand(1, 3, 31, 64))
    with pytest.raises(ValueError, match="Load with in_chans=4"):
        encoder(torch.rand(1, 4, 64, 64))
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\)"):
        encoder(torch.rand(3, 64, 64))
    with pytest.raises(ValueError, match=r"Images are torch\.uint8; accepted: floating point"):
        encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_in_chans_and_out_chans_change_only_stem_and_head():
    plain, changed = ResNetUNet(18, width=8), ResNetUNet(18, width=8, in_chans=4, out_chans=13)
    different = {k for k, v in plain.state_dict().items() if v.shape != changed.state_dict()[k].shape}
    assert different == {"encoder.conv1.weight", "decoder.conv0.weight", "decoder.conv0.bias"}


def test_a_network_without_contract_says_so():
    with pytest.raises(RuntimeError, match="without a contract"):
        _ = ResNetEncoder(18, width=8).transforms
