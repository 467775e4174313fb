"""Features of pixels and points by backbones of each kind, against loops and against other ways to compute them."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from geo_pretrain import hub
from geo_pretrain.catalog import Arch
from geo_pretrain.checkpoint import Pairing
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import BadFrame, CheckpointError, HubError
from geo_pretrain.loading import load_backbone, load_pair
from geo_pretrain.training.data.frame import Pair, Surface, resize_frame
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop_surface
from geo_pretrain.training.data.surfaces.fusing import Surfaces, frame_cloud
from geo_pretrain.training.evaluation import features as extraction
from geo_pretrain.training.evaluation.features import (
    ChunkExtractor,
    CloudExtractor,
    ImageExtractor,
    is_paired,
    load_pri3d,
)
from geo_pretrain.training.networks3d import encode
from geo_pretrain.training.visualize.columns import (
    RANDOM_TITLE,
    find_backbone,
    load_columns,
)
from geo_pretrain.training.visualize.splat import frame_camera, splat
from tests.training.test_loop import run_here
from tests.zoo import ARCH, CONTRACT, role_weights, weights_3d, write_tiny, write_tiny_3d

SIZE = (48, 64)


@pytest.fixture(scope="module")
def source(recording):
    return SevenScenes(recording)


@pytest.fixture(scope="module")
def surfaces(source):
    return Surfaces(source)


@pytest.fixture(scope="module")
def frames(source):
    scene = source.scenes()[0]
    return [resize_frame(source.load(scene, frame), SIZE) for frame in source.frame_ids(scene)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def geo(runs, tiny_recipe):
    """Trained for a step, by the first test that asks."""
    if not (runs / "geo").exists():
        run_here(tiny_recipe("pri3d_geo", optim={"steps": 1}), runs / "geo")
    return runs / "geo"


@pytest.fixture(scope="module")
def image_folder(runs):
    return write_tiny(runs / "image").folder


@pytest.fixture(scope="module")
def cloud_folder(runs):
    return write_tiny_3d(runs / "cloud", recipe_yaml=None).folder


def columns(folder, surfaces, **options):
    return load_columns(find_backbone(str(folder)), surfaces, **options)


class Colors(nn.Module):
    """A network whose map is the colors of a quarter of the pixels, and one more channel."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        half = image[:, :, ::2, ::2]
        return torch.cat([half, torch.ones_like(half[:, :1])], dim=1) + self.bias


PLAIN = ImageContract(mean=(0, 0, 0), std=(1, 1, 1), size=SIZE)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cell_features(frame):
    """What `Colors` says of every pixel: float [H, W, 4]."""
    found = np.ones((*SIZE, 4))
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            found[row, column, :3] = frame.color[row // 2 * 2, column // 2 * 2] / 255
    return unit(found)


def test_a_pixel_has_the_feature_of_its_cell(frames):
    found = ImageExtractor(Colors(), PLAIN).extract_frame(frames[0])
    assert found.index.shape == SIZE
    np.testing.assert_allclose(found.unit()[found.index], cell_features(frames[0]), atol=1e-6)


def test_a_point_has_the_mean_of_the_pixels_that_see_it(frames):
    cloud = frame_cloud(frames[1])
    generator = np.random.default_rng(0)
    rows = generator.choice(len(cloud), 300, replace=False)
    away = cloud.points[rows] + np.float32([0, 0, 40])
    surface = Surface(np.concatenate([cloud.points[rows], away]), np.zeros((600, 3), np.uint8))
    found = ImageExtractor(Colors(), PLAIN).extract_surface(surface, frames)
    slow, seen_by = [], []
    described = [cell_features(frame) for frame in frames]
    for point in surface.points.astype(np.float64):
        seen = []
        for frame, features in zip(frames, described, strict=True):
            x, y, z = (np.linalg.inv(frame.cam_to_world) @ [*point, 1])[:3]
            if z <= 0:
                continue
            k = frame.intrinsics
            u, v = math.floor(k[0, 0] * x / z + k[0, 2] + 0.5), math.floor(k[1, 1] * y / z + k[1, 2] + 0.5)
            if 0 <= u < SIZE[1] and 0 <= v < SIZE[0] and frame.depth[v, u] > 0 and abs(z - frame.depth[v, u]) < 0.05:
                seen.append(features[v, u])
        seen_by.append(len(seen))
        slow.append(unit(np.sum(seen, axis=0)) if seen else None)
    assert max(seen_by) > 1
    assert (found.index[:300] >= 0).all()
    for number, expected in enumerate(slow):
        if expected is None:
            assert found.index[number] == -1
        else:
            np.testing.assert_allclose(found.unit()[found.index[number]], expected, atol=1e-5)
    assert len(found.unit()) == sum(expected is not None for expected in slow)
    assert seen_by.count(0) > 100


def test_points_that_no_frame_sees(frames):
    far = Surface(np.full((3, 3), 500, np.float32), np.zeros((3, 3), np.uint8))
    with pytest.raises(BadFrame, match="no frame sees a point"):
        ImageExtractor(Colors(), PLAIN).extract_surface(far, frames)


def test_an_image_backbone_gives_its_dense_features(image_folder, surfaces, frames):
    (found,) = columns(image_folder, surfaces)
    network = load_backbone(image_folder, decoder=True)
    with torch.no_grad():
        dense = network(network.contract.transforms(resize=False)(frames[0].color)[None])
    features = found.pixel_features(frames[0])
    grid = features.unit()[features.index[::2, ::2]]
    torch.testing.assert_close(grid, F.normalize(dense[0], dim=0).movedim(0, -1))
    assert found.title == "image"


def test_a_map_of_an_encoder(image_folder, surfaces, frames, tmp_path):
    arch = Arch("resnet", {"depth": 18, "width": 8})
    alone = write_tiny(tmp_path / "alone", arch=arch, weights={"encoder": role_weights("encoder")}).folder
    maps = load_backbone(image_folder)(PLAIN.transforms(resize=False)(frames[0].color)[None])
    for folder, level, stride in ((image_folder, 3, 16), (alone, None, 8), (alone, 0, 2)):
        (found,) = columns(folder, surfaces, level=level)
        features = found.pixel_features(dataclasses.replace(frames[0]))
        assert len(features.unit()) == SIZE[0] // stride * (SIZE[1] // stride)
        assert np.array_equal(features.index[::stride, ::stride].flatten(), np.arange(len(features.unit())))
        assert features.unit().shape[1] == maps[int(math.log2(stride)) - 1].shape[1]


@pytest.mark.parametrize("level", [None, 0, 2])
def test_a_cloud_backbone_gives_what_encode_points_does(cloud_folder, surfaces, frames, level):
    (found,) = columns(cloud_folder, surfaces, level=level)
    network, cloud = load_backbone(cloud_folder), frame_cloud(frames[0])
    with torch.no_grad():
        if level is None:
            expected = network.encode_points(cloud.points, cloud.colors, out="final")
        else:
            widths = [info["num_chs"] for info in network.feature_info]
            expected = network.encode_points(cloud.points, cloud.colors).split(widths, dim=1)[level]
    features = found.extractor.extract_surface(cloud, [])
    torch.testing.assert_close(features.unit()[torch.from_numpy(features.index)], F.normalize(expected, dim=1))
    seen = found.pixel_features(frames[0])
    assert np.array_equal(seen.index >= 0, frames[0].depth > 0)
    assert np.array_equal(seen.index[frames[0].depth > 0], features.index)


def test_a_network_of_ones_is_not_given_colors(surfaces, frames, tmp_path):
    contract = VoxelContract(0.1)
    (found,) = columns(write_tiny_3d(tmp_path / "ones", contract=contract, recipe_yaml=None).folder, surfaces)
    painted = dataclasses.replace(frames[0], color=255 - frames[0].color)
    assert torch.equal(found.pixel_features(frames[0]).unit(), found.pixel_features(painted).unit())


def test_what_rgbd_cannot_give_is_refused():
    contract = VoxelContract((0.1, 1.0, 0.1), ("intensity",) * 3, coordinates="cylindrical")
    with pytest.raises(CheckpointError, match="RGB-D frames give"):
        CloudExtractor(nn.Identity(), contract)


def test_a_frame_without_depth_is_a_bad_frame(cloud_folder, surfaces, frames):
    (found,) = columns(cloud_folder, surfaces)
    with pytest.raises(BadFrame, match="no pixel has a valid depth"):
        found.pixel_features(dataclasses.replace(frames[0], depth=np.zeros_like(frames[0].depth)))


def test_pixels_and_voxels_of_one_checkpoint_share_a_space(geo, source, surfaces, frames):
    pixels, voxels = columns(geo, surfaces)
    assert (type(pixels.extractor), type(voxels.extractor)) == (ImageExtractor, ChunkExtractor)
    assert pixels.space == voxels.space
    assert (pixels.title, voxels.title) == ("geo: pixels", "geo: voxels")
    task = load_pri3d(str(geo))
    frame = frames[0]
    sample = task.dataset(source, [Pair(frame.scene, frame.id, frame.id, 1.0)])[(0, 0)]
    with torch.no_grad():
        image = task.w2d(task.backbone(sample["image1"][None])[0].movedim(0, -1))
        coords = F.pad(sample["coords1"], (1, 0))
        cloud = task.w3d(encode(task.backbone3d, coords, sample["feats1"], low_precision=False))
    found = pixels.pixel_features(frame)
    torch.testing.assert_close(found.unit()[found.index[::2, ::2]], F.normalize(image, dim=-1))
    seen = voxels.pixel_features(frame)
    torch.testing.assert_close(seen.unit(), F.normalize(cloud, dim=1))
    chunk = crop_surface(surfaces.load(frame.scene), *chunk_box(frame))
    row = splat(torch.from_numpy(chunk.points), frame_camera(frame), task.voxel_size / 2)
    numbers = {tuple(place): number for number, place in enumerate(sample["coords1"].tolist())}
    for v in range(0, SIZE[0], 5):
        for u in range(0, SIZE[1], 5):
            if row[v, u] < 0:
                assert seen.index[v, u] == -1
                continue
            place = np.floor(chunk.points[row[v, u]] / np.float32(task.voxel_size)).astype(int)
            assert seen.index[v, u] == numbers[tuple(place)]
    assert (seen.index >= 0).mean() > 0.8


def test_a_frame_away_from_the_surface_is_a_bad_frame(geo, surfaces, frames):
    pose = frames[0].cam_to_world.copy()
    pose[:3, 3] += 100
    with pytest.raises(BadFrame, match="no surface"):
        columns(geo, surfaces)[1].pixel_features(dataclasses.replace(frames[0], cam_to_world=pose))


def test_the_chunk_is_that_of_the_recipe(geo, surfaces, frames):
    (_, voxels), frame = columns(geo, surfaces), frames[0]
    surface, edge = surfaces.load(frame.scene), np.float32(voxels.extractor.task.voxel_size)
    counts = []
    for frustum in (False, True):
        voxels.extractor.task.config = dataclasses.replace(voxels.extractor.task.config, frustum=frustum)
        chunk = crop_surface(surface, *chunk_box(frame, match_released_code=not frustum))
        counts.append(len({tuple(place) for place in np.floor(chunk.points / edge).tolist()}))
        assert len(voxels.pixel_features(frame).unit()) == counts[-1]
    assert counts[1] < counts[0]


def test_what_drawing_needs_of_a_checkpoint(geo, cloud_folder, monkeypatch):
    """No more is fetched: the network, and of a pair the heads and the recipe that says which they are."""
    asked = []

    def opened(name):
        found = hub.open(name)

        def fetch(*roles, optional=()):
            asked.append((roles, optional))
            return found.fetch(*roles, optional=optional)

        return SimpleNamespace(network_roles=found.network_roles, fetch=fetch)

    monkeypatch.setattr(extraction, "hub", SimpleNamespace(open=opened))
    assert set(find_backbone(str(geo)).checkpoint.roles) >= {"encoder", "decoder", "heads", "recipe"}
    find_backbone(str(cloud_folder))
    assert [set(roles) for roles, _ in asked] == [{"encoder", "decoder"}, {"model"}]
    assert {optional for _, optional in asked} == {("heads", "recipe")}


def test_voxels_of_a_network_of_ones_have_no_colors(geo, surfaces, frames):
    (_, voxels), cloud = columns(geo, surfaces), frame_cloud(frames[0])
    painted = Surface(cloud.points, 255 - cloud.colors)
    assert not torch.equal(
        voxels.extractor.extract_surface(cloud, []).unit(), voxels.extractor.extract_surface(painted, []).unit()
    )
    voxels.extractor.task.config = dataclasses.replace(voxels.extractor.task.config, features="ones")
    assert torch.equal(
        voxels.extractor.extract_surface(cloud, []).unit(), voxels.extractor.extract_surface(painted, []).unit()
    )


@pytest.mark.parametrize(
    "task, expected",
    [("pri3d_geo", True), ("pri3d_view_geo", True), ("pri3d_view", False), ("depth_prediction", False)],
)
def test_which_checkpoints_hold_both_networks(tmp_path, task, expected, tiny_recipe):
    weights = {role: role_weights(role) for role in ("encoder", "decoder")} | {"heads": {"w": torch.zeros(1)}}
    recipe = tiny_recipe(task).read_text()
    assert is_paired(write_tiny(tmp_path / "a", weights=weights, recipe_yaml=recipe)) == expected
    del weights["heads"]
    assert not is_paired(write_tiny(tmp_path / "b", weights=weights, recipe_yaml=recipe))


def test_a_map_of_such_a_checkpoint_is_one_column(geo, surfaces, frames):
    (found,) = columns(geo, surfaces, level=1)
    assert type(found.extractor) is ImageExtractor


def test_a_network_with_its_teacher_has_pixels_and_voxels_in_one_space(surfaces, frames, tmp_path):
    teacher = {f"{role}.{key}": value for role in ("encoder", "decoder") for key, value in role_weights(role).items()}
    folder = write_tiny_3d(
        tmp_path / "taught",
        recipe_yaml=None,
        weights={"model": weights_3d(), "teacher": teacher},
        pairing=Pairing(ARCH, CONTRACT, "teacher"),
    ).folder
    pixels, voxels = columns(folder, surfaces)
    assert (pixels.title, voxels.title) == ("taught: pixels", "taught: voxels")
    assert pixels.space == voxels.space
    pair, cloud = load_pair(folder), frame_cloud(frames[0])
    with torch.no_grad():
        image = pair.image_map(pair.image_contract.transforms(resize=False)(frames[0].color)[None])[0]
        points = pair.encode_points(cloud.points, cloud.colors)
    found, seen = pixels.pixel_features(frames[0]), voxels.pixel_features(frames[0])
    torch.testing.assert_close(found.unit()[found.index[::2, ::2]], F.normalize(image, dim=0).movedim(0, -1))
    torch.testing.assert_close(seen.unit()[seen.index[frames[0].depth > 0]], points)
    twin = columns(folder, surfaces, random_init=True)
    assert [d.title for d in twin] == ["random student: pixels", "random student: voxels"]
    assert torch.equal(twin[0].pixel_features(frames[0]).unit(), found.unit())  # there is no projection to draw
    assert not torch.allclose(twin[1].pixel_features(frames[0]).unit(), seen.unit(), atol=1e-3)
    other = columns(folder, surfaces, random_init=True, seed=1)[1].pixel_features(frames[0]).unit()
    assert not torch.allclose(other, twin[1].pixel_features(frames[0]).unit(), atol=1e-3)
    assert [type(d.extractor) for d in columns(folder, surfaces, level=0)] == [CloudExtractor]


@pytest.mark.parametrize("kind", ["image", "cloud", "geo"])
def test_the_twin_has_other_weights_and_its_own_space(kind, image_folder, cloud_folder, geo, surfaces, frames):
    folder = {"image": image_folder, "cloud": cloud_folder, "geo": geo}[kind]
    trained = columns(folder, surfaces)
    twins = [columns(folder, surfaces, random_init=True, seed=seed) for seed in (0, 0, 1)]
    for own, first, again, other in zip(trained, *twins, strict=True):
        assert RANDOM_TITLE in first.title
        assert own.space != first.space
        rows = [d.pixel_features(frames[0]).unit() for d in (own, first, again, other)]
        assert torch.equal(rows[1], rows[2])
        assert not torch.allclose(rows[0], rows[1], atol=1e-3)
        assert not torch.allclose(rows[1], rows[3], atol=1e-3)


def test_random_weights_leave_the_global_generator_alone(image_folder, surfaces):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    columns(image_folder, surfaces, random_init=True)
    assert torch.equal(torch.rand(1), expected)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises((CheckpointError, HubError), match="photos"):
        find_backbone(str(tmp_path / "photos"))
