"""Contracts: images become input as Pillow and plain arithmetic say; anything doubtful is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.contract import ImageContract, VoxelContract, contract_from_dict

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 81, 3), dtype=np.uint8)
CONTRACT = ImageContract(size=(32, 40))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return ((np.asarray(resized) / 255 - MEAN) / STD).transpose(2, 0, 1)


def test_every_accepted_kind_of_image_gives_pillows_nearest_resize_normalised():
    expected = by_pillow(PIXELS, (32, 40))
    chw = torch.from_numpy(PIXELS).permute(2, 0, 1)
    transform = CONTRACT.transforms()
    for image in (Image.fromarray(PIXELS), PIXELS, chw, chw / 255, (chw / 255).double()):
        value = transform(image)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), expected, atol=2e-6)
    batch = transform(torch.stack([chw, chw.flip(2)]) / 255)
    assert batch.shape == (2, 3, 32, 40)
    np.testing.assert_allclose(batch[0].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("size", [(240, 320), (180, 360), (33, 47)])
@pytest.mark.parametrize("source", [(480, 640), (968, 1296), (100, 90), (427, 561)])
def test_nearest_is_pillows_for_every_ratio(source: tuple[int, int], size: tuple[int, int]):
    pixels = RNG.integers(0, 256, (*source, 3), dtype=np.uint8)
    value = ImageContract(size=size).transforms()(pixels)
    np.testing.assert_allclose(value.numpy(), by_pillow(pixels, size), atol=2e-6)


def test_without_resize_the_size_stays():
    value = CONTRACT.transforms(resize=False)(PIXELS)
    np.testing.assert_allclose(value.numpy(), ((PIXELS / 255 - MEAN) / STD).transpose(2, 0, 1), atol=2e-6)


def test_bilinear_stays_within_the_colours_of_the_image():
    contract = ImageContract(size=(32, 40), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    value = contract.transforms()(PIXELS)
    assert value.shape == (3, 32, 40)
    assert 0 <= float(value.min()) <= float(value.max()) <= 1
    assert float(value.mean()) == pytest.approx(PIXELS.mean() / 255, abs=0.01)


def test_grey_palette_and_alpha_pictures_become_rgb():
    for mode in ("L", "P", "RGBA", "1"):
        assert CONTRACT.transforms()(Image.fromarray(PIXELS).convert(mode)).shape == (3, 32, 40)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 40, 40) * 255, "up to 255 it needs dividing by 255"),
        (torch.rand(3, 40, 40) - 0.5, "probably normalised already"),
        (torch.full((3, 40, 40), float("nan")), r"must lie in \[0, 1\]"),
        (torch.zeros(3, 40, 40, dtype=torch.int64), "torch.int64"),
        (torch.rand(40, 40, 3), r"shape \(40, 40, 3\)"),
        (torch.rand(4, 40, 40), r"shape \(4, 40, 40\)"),
        (np.zeros((40, 40, 3), np.float32), "numpy array float32"),
        (np.zeros((3, 40, 40), np.uint8), r"numpy array uint8 \(3, 40, 40\)"),
        (np.zeros((40, 40), np.uint8), "numpy array uint8"),
        (Image.new("I;16", (40, 40)), "mode 'I;16'"),
        (Image.new("F", (40, 40)), "mode 'F'"),
        ("picture.png", "Got str; accepted"),
        (None, "Got NoneType"),
    ],
)
def test_doubtful_images_are_refused(image: object, message: str):
    with pytest.raises(ValueError, match=message):
        CONTRACT.transforms()(image)


def test_normalising_twice_is_noticed():
    transform = CONTRACT.transforms()
    with pytest.raises(ValueError, match="normalised already"):
        transform(transform(PIXELS))


@pytest.mark.parametrize(
    "contract",
    [ImageContract(), ImageContract(size=(180, 360), interpolation="bilinear"), VoxelContract(0.02, ("R",), "x / 255")],
)
def test_contracts_survive_json(contract: ImageContract | VoxelContract):
    import json

    assert contract_from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


def test_wrong_contracts_are_refused():
    for wrong, message in (
        ({"mean": (0.5,)}, "equal lengths"),
        ({"std": (1, 1, 0)}, "positive"),
        ({"size": (240,)}, "height, width"),
        ({"interpolation": "cubic"}, "'cubic'; accepted: nearest, bilinear"),
        ({"value_range": (0, 255)}, "value_range"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageContract(**wrong)
    with pytest.raises(ValueError, match="accepted: image, voxel"):
        contract_from_dict({"kind": "sound"})
    with pytest.raises(ValueError, match="unknown \\['colour'\\]"):
        contract_from_dict(ImageContract().to_dict() | {"colour": 1})
    with pytest.raises(ValueError, match="voxel_size"):
        VoxelContract(0.0, ("R",), "x")


def test_text_says_order_range_mean_and_size():
    text = "images: RGB in [0, 1], mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225), pre-trained at 240x320"
    assert str(ImageContract()).startswith(text)
    assert str(VoxelContract(0.025, ("ones",), "none")).startswith("voxels: 2.5 cm, ones (none)")


def test_other_channel_counts_take_average_statistics():
    grey = ImageContract().with_channels(1)
    assert (grey.channels, grey.mean, grey.std) == (("grey",), (pytest.approx(0.449),), (pytest.approx(0.226),))
    assert ImageContract().with_channels(3) is not None
    five = ImageContract().with_channels(5)
    assert five.mean[:3] == ImageContract().mean
    assert five.mean[3:] == (pytest.approx(0.449),) * 2
    assert five.transforms()(np.zeros((40, 40, 5), np.uint8)).shape == (5, 240, 320)
    with pytest.raises(ValueError, match="cannot give 5 channels"):
        five.transforms()(Image.fromarray(PIXELS))


def test_contracts_do_not_import_torch():
    code = "import sys, geo_pretrain.contract; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
