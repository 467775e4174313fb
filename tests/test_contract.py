"""Contracts: images become input as Pillow and plain arithmetic say; anything doubtful is refused."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.contract import ImageContract, VoxelContract, contract_from_dict

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 81, 3), dtype=np.uint8)
CONTRACT = ImageContract(size=(32, 40))
ONES = VoxelContract(0.025)
SHIFTED = VoxelContract(0.025, ("R", "G", "B"), offset=-0.5)
COLORED = VoxelContract(0.02, ("R", "G", "B"), reduce="mean")
LIDAR = VoxelContract((0.1, 1.0, 0.1), ("intensity",), coordinates="cylindrical")
MIXED = VoxelContract(0.05, ("R", "G", "B", "height", "one"), scale=2.0)
VOXEL_CONTRACTS = [ONES, SHIFTED, COLORED, LIDAR, MIXED]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return ((np.asarray(resized) / 255 - MEAN) / STD).transpose(2, 0, 1)


def test_every_accepted_kind_of_image_gives_pillows_nearest_resize_normalized():
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


def test_bilinear_stays_within_the_colors_of_the_image():
    contract = ImageContract(size=(32, 40), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    value = contract.transforms()(PIXELS)
    assert value.shape == (3, 32, 40)
    assert 0 <= float(value.min()) <= float(value.max()) <= 1
    assert float(value.mean()) == pytest.approx(PIXELS.mean() / 255, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bilinear_takes_floats_of_any_width(dtype):
    contract = ImageContract(size=(32, 40), interpolation="bilinear")
    image = torch.rand(3, 50, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.allclose(contract.transforms()(image).float(), contract.transforms()(image.float()), atol=1e-6)


def test_the_extent_of_a_batch_is_that_of_each_cloud():
    voxelize, points = VoxelContract(0.05).transforms(), torch.rand(200, 3, dtype=torch.float64)
    apart = torch.cat([points[:100], points[100:] + 5000])
    batch = torch.arange(200) // 100
    assert len(voxelize(apart, batch=batch).coords)
    for given in ({}, {"batch": batch.flip(0) * 0}):
        with pytest.raises(ValueError, match="The points span 500"):
            voxelize(apart, **given)


def test_gray_palette_and_alpha_pictures_become_rgb():
    for mode in ("L", "P", "RGBA", "1"):
        assert CONTRACT.transforms()(Image.fromarray(PIXELS).convert(mode)).shape == (3, 32, 40)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 40, 40) * 255, "up to 255 they need dividing by 255"),
        (torch.rand(3, 40, 40) - 0.5, "probably normalized already"),
        (torch.full((3, 40, 40), float("nan")), r"must lie in \[0, 1\]"),
        (torch.zeros(3, 40, 40, dtype=torch.int64), "torch.int64"),
        (torch.rand(40, 40, 3), r"shape \(40, 40, 3\)"),
        (torch.rand(4, 40, 40), r"shape \(4, 40, 40\)"),
        (np.zeros((40, 40, 3), np.float32), "numpy array float32"),
        (np.zeros((3, 40, 40), np.uint8), r"numpy array uint8 \(3, 40, 40\)"),
        (np.zeros((40, 40), np.uint8), "numpy array uint8"),
        (Image.new("I;16", (40, 40)), "mode 'I;16'"),
        (Image.new("F", (40, 40)), "mode 'F'"),
        ("picture.png", "Got the text 'picture.png'; accepted"),
        (None, "Got NoneType"),
    ],
)
def test_doubtful_images_are_refused(image: object, message: str):
    with pytest.raises(ValueError, match=message):
        CONTRACT.transforms()(image)


def test_normalizing_twice_is_noticed():
    transform = CONTRACT.transforms()
    with pytest.raises(ValueError, match="normalized already"):
        transform(transform(PIXELS))


@pytest.mark.parametrize(
    "contract",
    [ImageContract(), ImageContract(size=(180, 360), interpolation="bilinear"), *VOXEL_CONTRACTS],
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
    with pytest.raises(ValueError, match="unknown \\['color'\\]"):
        contract_from_dict(ImageContract().to_dict() | {"color": 1})
    for wrong, message in (
        ({"voxel_size": 0.0}, "voxel_size is 0.0; accepted for cartesian ones: one edge in meters"),
        ({"voxel_size": (0.1, 1.0, 0.1)}, "one edge in meters"),
        ({"voxel_size": 0.1, "coordinates": "cylindrical"}, "three edges in meters, degrees, meters"),
        ({"voxel_size": 0.1, "coordinates": "polar"}, "'polar'; accepted: cartesian, cylindrical"),
        ({"voxel_size": 0.1, "channels": ()}, r"channels are \(\); accepted: one name a channel"),
        ({"voxel_size": 0.1, "scale": 0}, "scale is 0"),
        ({"voxel_size": 0.1, "reduce": "sum"}, "'sum'; accepted: 'first', 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            VoxelContract(**wrong)


def test_text_says_order_range_mean_and_size():
    text = "images: RGB in [0, 1], mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225), pre-trained at 240x320"
    assert str(ImageContract()).startswith(text)
    assert [str(contract) for contract in VOXEL_CONTRACTS] == [
        "voxels: 2.5 cm, features constant 1 (3 channels)",
        "voxels: 2.5 cm, RGB in [0, 1] - 0.5, of a voxel's first point",
        "voxels: 2 cm, RGB in [0, 1], of the mean of a voxel's points",
        "voxels: 0.1 m x 1 degree x 0.1 m (radius, azimuth, z), intensity, of a voxel's first point",
        "voxels: 5 cm, R+G+B+height * 2, 1 x constant 1, of a voxel's first point",
    ]


def test_other_channel_counts_take_average_statistics():
    gray = ImageContract().with_channels(1)
    assert (gray.channels, gray.mean, gray.std) == (("grey",), (pytest.approx(0.449),), (pytest.approx(0.226),))
    assert ImageContract().with_channels(3) is not None
    five = ImageContract().with_channels(5)
    assert five.mean[:3] == ImageContract().mean
    assert five.mean[3:] == (pytest.approx(0.449),) * 2
    assert five.transforms()(np.zeros((40, 40, 5), np.uint8)).shape == (5, 240, 320)
    with pytest.raises(ValueError, match="cannot give 5 channels"):
        five.transforms()(Image.fromarray(PIXELS))


# --- points


def points_and_colors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(400, 3, generator=generator) - 0.5) * 0.4
    return points, torch.randint(0, 256, (400, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("contract", [ONES, SHIFTED, COLORED])
def test_points_become_voxels_slow_twin(contract: VoxelContract):
    points, colors = points_and_colors()
    voxels = contract.transforms()(points, None if contract is ONES else colors)
    members: dict[tuple[int, ...], list[int]] = {}
    for row, point in enumerate(points):
        members.setdefault(tuple(math.floor(float(v)) for v in point / contract.voxel_size), []).append(row)
    assert voxels.coords.tolist() == [[0, *cell] for cell in members]
    assert len(members) < 400
    for rows, feats in zip(members.values(), voxels.feats.tolist(), strict=True):
        assert all(int(voxels.inverse[row]) == list(members.values()).index(rows) for row in rows)
        if contract is ONES:
            expected = [1.0, 1.0, 1.0]
        elif contract is SHIFTED:
            expected = [int(value) / 255 - 0.5 for value in colors[rows[0]]]
        else:
            expected = [sum(int(colors[row, c]) / 255 for row in rows) / len(rows) for c in range(3)]
        assert feats == pytest.approx(expected, abs=1e-6)


def test_bytes_floats_and_arrays_of_colors_give_the_same_voxels():
    points, colors = points_and_colors()
    transform = SHIFTED.transforms()
    expected = transform(points, colors)
    for given in ((points, colors / 255), (points.numpy(), colors.numpy()), (points, colors.double() / 255)):
        voxels = transform(*given)
        assert torch.equal(voxels.coords, expected.coords)
        assert voxels.feats.dtype == torch.float32
        torch.testing.assert_close(voxels.feats, expected.feats)
    batch = torch.arange(400) % 2
    for given in (batch, batch.numpy(), batch.tolist()):
        assert transform(points, colors, batch=given).coords[:, 0].tolist()[:6] == [0, 1, 0, 1, 0, 1]
    backwards, read_only = points.numpy()[::-1], colors.numpy()[::-1].copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(transform(backwards, read_only)) == len(expected)


def test_cylindrical_voxels_slow_twin():
    generator = torch.Generator().manual_seed(1)
    points = (torch.rand(200, 3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor([60, 60, 4])
    intensity = torch.rand(200, 1, generator=generator) * 255
    voxels = LIDAR.transforms()(points, intensity)
    for point, cell in zip(points.tolist(), voxels.coords[voxels.inverse].tolist(), strict=True):
        radius, azimuth = math.hypot(point[0], point[1]), math.degrees(math.atan2(point[1], point[0]))
        assert cell == [0, math.floor(radius / 0.1), math.floor(azimuth), math.floor(point[2] / 0.1)]
    assert torch.equal(voxels.feats, intensity[voxels.index])
    assert int(voxels.coords[:, 2].min()) < -100  # azimuths of both signs


def test_constant_channels_are_filled_in_beside_given_ones():
    feats = MIXED.transforms()(torch.zeros(1, 3), torch.tensor([[0.1, 0.2, 0.3, 1.7]])).feats
    torch.testing.assert_close(feats, torch.tensor([[0.2, 0.4, 0.6, 3.4, 1.0]]))


ROOM = torch.rand(50, 3, generator=torch.Generator().manual_seed(2)) * 4
RGB = torch.rand(50, 3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("contract", "points", "features", "message"),
    [
        (ONES, ROOM, RGB, "trained on constant features; accepted: features=None"),
        (SHIFTED, ROOM, None, r"needs features of the points; accepted: uint8 or float in \[0, 1\] \[50, 3\]"),
        (SHIFTED, ROOM, RGB - 0.5, "Below 0 they were probably shifted already"),
        (SHIFTED, ROOM, RGB * 255, "up to 255 they need dividing by 255"),
        (SHIFTED, ROOM, RGB / 0, r"must lie in \[0, 1\]"),
        (SHIFTED, ROOM, RGB[:, :1], r"features are \(50, 1\); accepted: \[50, 3\] \(R, G, B\)"),
        (SHIFTED, ROOM, RGB[:9], r"features are \(9, 3\)"),
        (SHIFTED, ROOM, (RGB * 255).int(), "torch.int32; accepted: uint8 or float"),
        (LIDAR, ROOM, None, r"accepted: float \[50, 1\] \(intensity\)"),
        (LIDAR, ROOM, (RGB[:, :1] * 255).byte(), "torch.uint8; accepted: float"),
        (ONES, ROOM * 1000, None, "Millimeters need dividing by 1000"),
        (ONES, ROOM[:, :2], None, r"points are torch.float32 \(50, 2\); accepted: float \[N, 3\] in meters"),
        (ONES, ROOM.long(), None, "points are torch.int64"),
        (ONES, ROOM[:0], None, "N > 0"),
        (ONES, ROOM / 0, None, "not finite"),
    ],
)
def test_doubtful_points_are_refused(contract: VoxelContract, points: object, features: object, message: str):
    with pytest.raises(ValueError, match=message):
        contract.transforms()(points, features)


def test_voxel_contracts_of_other_channel_counts():
    assert ONES.with_channels(5).channels == ("one",) * 5
    assert SHIFTED.with_channels(1).channels == ("grey",)
    assert SHIFTED.with_channels(2).channels == ("channel0", "channel1")
    assert SHIFTED.with_channels(4).channels == ("R", "G", "B", "extra0")
    assert LIDAR.with_channels(2).channels == ("intensity", "extra0")
    assert SHIFTED.with_channels(3) is SHIFTED
    gray = SHIFTED.with_channels(1).transforms()(ROOM, (RGB[:, :1] * 255).byte())
    assert -0.5 <= float(gray.feats.min()) < 0 < float(gray.feats.max()) <= 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_points_that_are_not_finite_are_refused(value):
    points = torch.rand(9, 3)
    points[4, 1] = value
    with pytest.raises(ValueError, match="Some points are not finite"):
        ONES.transforms()(points)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    """Colors have a range; of other features nothing else would tell, and one such voxel makes all outputs NaN."""
    for contract, name in ((LIDAR, "intensity"), (MIXED, "height")):
        features = torch.rand(9, len(contract.given_channels))
        features[4, -1] = value
        with pytest.raises(ValueError, match=rf"Some features \({name}\) are not finite"):
            contract.transforms()(torch.rand(9, 3), features)


def test_scans_too_far_from_the_origin_are_warned_about_in_cylinders_too():
    near = torch.rand(9, 3)
    LIDAR.transforms()(near, torch.rand(9, 1))
    with pytest.warns(UserWarning, match=r"eighth of a voxel of 0\.1 m: features are wrong"):
        LIDAR.transforms()(near + 1e6, torch.rand(9, 1))


def test_points_too_far_from_the_origin_for_their_type_are_warned_about():
    """From 320 km on float32 rounds to more than a voxel; the same cloud in float64 has the same voxels as near it."""
    size = float(ONES.voxel_size)
    near = (torch.floor(torch.rand(500, 3, dtype=torch.float64) / size) + 0.5) * size
    for cells, dtype, warned in (
        (160_000 // 16 * 16, torch.float32, False),
        (16_000_000, torch.float32, True),
        (224_000_000, torch.float32, True),
        (224_000_000, torch.float64, False),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = ONES.transforms()((near + cells * size).to(dtype))
        assert [str(w.message) for w in caught if "from the origin" in str(w.message)] != [] if warned else not caught
        if not warned:
            assert len(found) == len(ONES.transforms()(near))


def test_voxel_transforms_are_plain_data():
    assert pickle.loads(pickle.dumps(LIDAR.transforms())) == LIDAR.transforms()


def test_contracts_do_not_import_torch():
    code = "import sys, geo_pretrain.contract; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
