"""The depth U-Net against the key list of its assumed original, and against a twin written out step by step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.backbones.depth_unet import DepthDecoder, ResNetDepthUNet, mirror_border
from geo_pretrain.backbones.resnet_unet import ResNetEncoder
from geo_pretrain.contract import ImageContract

DATA = Path(__file__).resolve().parents[1] / "data"
# methods of the paper's network, ResNet-18: (name, channels in, channels out), in the order of the original's numbers
LAYERS = [
    ("upconv4_0", 512, 256), ("upconv4_1", 512, 256), ("upconv3_0", 256, 128), ("upconv3_1", 256, 128),
    ("upconv2_0", 128, 64), ("upconv2_1", 128, 64), ("upconv1_0", 64, 32), ("upconv1_1", 96, 32),
    ("upconv0_0", 32, 16), ("upconv0_1", 16, 16), ("head", 16, 16),
]  # fmt: skip


def slow_conv(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """3x3 cross-correlation of x [C, H, W] whose border is mirrored, pixel by pixel."""
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    _, height, width = x.shape

    def mirrored(index: int, size: int) -> int:
        if size == 1:
            return 0
        return 1 if index == -1 else size - 2 if index == size else index

    out = np.empty((len(weight), height, width))
    for row in range(height):
        for column in range(width):
            value = bias.copy()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    seen = x[:, mirrored(row + dy, height), mirrored(column + dx, width)]
                    value += weight[:, :, dy + 1, dx + 1] @ seen
            out[:, row, column] = value
    return out


def slow_decoder(decoder: DepthDecoder, maps: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The decoder's arithmetic for one image; `maps` [C, h, w], finest first."""

    def elu(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)

    def twice(x: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.array([[[plane[r // 2][c // 2] for c in range(width)] for r in range(height)] for plane in x])

    x = maps[4]
    for level in (4, 3, 2, 1, 0):
        x = elu(slow_conv(x, getattr(decoder, f"upconv{level}_0")))
        x = twice(x, *(size if level == 0 else maps[level - 1].shape[1:]))
        if level > 0:
            x = np.concatenate([x, maps[level - 1]])
        x = elu(slow_conv(x, getattr(decoder, f"upconv{level}_1")))
    return slow_conv(x, decoder.head)


def test_names_shapes_and_total_equal_the_assumed_original():
    manifest = json.loads((DATA / "assumed_janda_resunet18_16d.json").read_text())["keys"]
    with torch.device("meta"):
        network = ResNetDepthUNet()
    encoder = {k.removeprefix("encoder.encoder."): s for k, s in manifest.items() if k.startswith("encoder.")}
    assert encoder.pop("fc.weight") == [1000, 512]
    assert encoder.pop("fc.bias") == [1000]
    assert {k: list(v.shape) for k, v in network.encoder.state_dict().items()} == encoder
    decoder = [shape for key, shape in manifest.items() if key.startswith("decoder.")]
    ours = network.decoder.state_dict()
    assert [list(value.shape) for value in ours.values()] == decoder
    assert list(ours) == [f"{name}.{leaf}" for name, *_ in LAYERS for leaf in ("weight", "bias")]
    assert [list(ours[f"{name}.weight"].shape) for name, *_ in LAYERS] == [[o, i, 3, 3] for _, i, o in LAYERS]
    assert sum(p.numel() for p in network.parameters()) == 14_329_392


def test_the_deep_variant_has_the_size_that_follows_from_the_description():
    with torch.device("meta"):
        network = ResNetDepthUNet(50)
    assert sum(p.numel() for p in network.parameters()) == 32_522_288


def random_network(depth: int = 18) -> ResNetDepthUNet:
    torch.manual_seed(0)
    network = ResNetDepthUNet(depth, width=8, out_chans=5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.5)  # so that borders and the negative side of the ELU matter
    return network


@pytest.mark.parametrize("size", [(32, 64), (37, 45), (64, 32), (33, 96)])
@torch.no_grad()
def test_output_equals_the_slow_twin(size: tuple[int, int]):
    network = random_network()
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    maps = [value[0].double().numpy() for value in network.encoder(image)]
    expected = torch.from_numpy(slow_decoder(network.decoder, maps, size))
    out = network(image)
    assert out.shape == (1, 5, *size)
    assert float((out[0] - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (33, 63), (95, 40), (64, 97)])
@torch.no_grad()
def test_the_output_has_the_images_size(size: tuple[int, int]):
    network = random_network(50)
    out = network(torch.randn(2, 3, *size))
    assert out.shape == (2, 5, *size)
    assert out.std() > 0
    doubled = network.decoder(network.encoder(torch.randn(1, 3, *size)))
    assert doubled.shape[2:] == tuple(2 * ((side + 1) // 2) for side in size)


def test_a_border_is_mirrored_about_the_outermost_row_and_a_single_one_repeated():
    rows = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert mirror_border(rows)[0, 0].tolist() == [
        [4, 3, 4, 5, 4], [1, 0, 1, 2, 1], [4, 3, 4, 5, 4], [1, 0, 1, 2, 1],
    ]  # fmt: skip
    single = torch.arange(2.0).reshape(1, 1, 1, 2)
    assert mirror_border(single)[0, 0].tolist() == [[1, 0, 1, 0]] * 3
    assert mirror_border(single.transpose(2, 3))[0, 0].tolist() == [[1] * 3, [0] * 3, [1] * 3, [0] * 3]


def test_traced_and_exported_it_takes_any_size():
    network = ResNetDepthUNet(18, width=8).eval()
    sides = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        exported = torch.export.export(network, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sides,)).module()
        for seen in ((32, 96), (64, 96)):
            traced = torch.jit.trace(network, torch.randn(1, 3, *seen), check_trace=False)
            for size in ((33, 70), (95, 64), (32, 32)):
                x = torch.randn(1, 3, *size)
                torch.testing.assert_close(traced(x), network(x), rtol=1e-4, atol=1e-5)
                if min(size) > 32:
                    torch.testing.assert_close(exported(x), network(x), rtol=1e-4, atol=1e-5)


def test_every_weight_has_a_gradient():
    network = random_network().train()
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_it_is_an_image_backbone_with_its_encoders_maps():
    network = ResNetDepthUNet(width=8, in_chans=4).eval()
    assert Arch("resnet_depth_unet").encoder_alone.architecture.load_class() is ResNetEncoder
    assert isinstance(network.encoder, ResNetEncoder)
    assert network.feature_info == network.encoder.feature_info
    assert [info["num_chs"] for info in network.feature_info] == [8, 8, 16, 32, 64]
    assert network.out_chans == 16
    assert network(torch.randn(1, 4, 32, 32)).shape == (1, 16, 32, 32)
    network.contract = ImageContract(mean=(0.45,) * 3, std=(0.225,) * 3)
    assert network.transforms is not None


def check_refused(images: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        ResNetDepthUNet(width=8)(images)


def test_wrong_images_are_refused():
    check_refused(torch.zeros(1, 3, 31, 64), "31 x 64 pixels; accepted: at least 32")
    check_refused(torch.zeros(1, 4, 64, 64), r"takes images \[B, 3, H, W\]; got a tensor of shape \(1, 4, 64, 64\)")
    check_refused(torch.zeros(3, 64, 64), "got a tensor of shape")


def test_forward_intermediates_gives_the_output_and_the_encoders_maps():
    network, images = ResNetDepthUNet(18, width=8).eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        output, maps = network.forward_intermediates(images)
        assert torch.equal(output, network(images))
        assert all(torch.equal(*both) for both in zip(maps, network.encoder(images), strict=True))
        (last,) = network.forward_intermediates(images, 1, intermediates_only=True)
    assert torch.equal(last, maps[-1])
