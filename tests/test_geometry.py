"""Geometry against the authors' released matcher, the paper's definition, and slow loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geo_pretrain import geometry
from tests.work import LargestTensor, python_lines

PAIRS = ("pair80", "pair50", "pair30")
GOLDEN_FILES = {
    "procedural": Path(__file__).parent / "data" / "geometry.safetensors",
    "recorded": Path(__file__).parents[2] / "shared" / "reference" / "golden_local" / "geometry.safetensors",
}


@pytest.fixture(scope="module", params=GOLDEN_FILES)
def golden(request):
    path = GOLDEN_FILES[request.param]
    if not path.exists():
        pytest.skip(f"{path.name} of recorded frames is for local use only and not here")
    return load_file(path)


def pair_inputs(golden, pair, dtype=torch.float32):
    depth1, depth2 = (golden[f"{pair}.depth{k}_mm"][None].to(dtype) / 1000 for k in (1, 2))
    intrinsics = golden["intrinsics"][None].to(dtype)
    pose1, pose2 = (golden[f"{pair}.pose{k}"][None].double() for k in (1, 2))
    return depth1, depth2, intrinsics, intrinsics, pose1, pose2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pair", PAIRS)
def test_exact_mode_equals_the_released_matcher(golden, pair, dtype):
    target = geometry.match_pixels(*pair_inputs(golden, pair, dtype), tolerance=0.05, match_released_code=True)[0]
    source = (target >= 0).nonzero()[:, 0]
    pos1 = torch.stack([source // 160, source % 160], -1)
    pos2 = torch.stack([target[source] // 160, target[source] % 160], -1)
    assert torch.equal(pos1.int(), golden[f"{pair}.warp_pos1"])
    assert torch.equal(pos2.int(), golden[f"{pair}.warp_pos2"])


@pytest.mark.parametrize("pair, count", [("pair80", 13033), ("pair50", 8428), ("pair30", 5236)])
def test_rounding_to_the_nearest_pixel_gives_the_counts_of_the_reference(pair, count):
    inputs = pair_inputs(load_file(GOLDEN_FILES["procedural"]), pair)
    assert (geometry.match_pixels(*inputs, rounding="nearest") >= 0).sum() == count


@pytest.mark.parametrize("pair", PAIRS)
def test_default_matches_are_the_authors_without_the_half_pixel_band_outside_the_image(golden, pair):
    inputs = pair_inputs(golden, pair)
    exact = geometry.match_pixels(*inputs, match_released_code=True)
    default = geometry.match_pixels(*inputs)
    differs = exact != default
    assert torch.all(default[differs] == -1)
    assert torch.all((exact[differs] % 160 == 0) | (exact[differs] < 160))


@pytest.mark.parametrize("pair", PAIRS)
def test_euclidean_matches_agree_with_the_paper_definition(golden, pair):
    """Where the 2 cm projective match exists, the nearest surface point lies within 2 cm and about a pixel away."""
    target = geometry.match_pixels(*pair_inputs(golden, pair), tolerance=0.02, distance="euclidean", rounding="nearest")
    source = (target[0] >= 0).nonzero()[:, 0]
    index = golden[f"{pair}.nn12_index"].flatten()[source].long()
    gap = golden[f"{pair}.nn12_dist"].flatten()[source]
    assert torch.all(gap < 0.02 + 2e-6)
    offset = torch.stack([target[0][source] // 160 - index // 160, target[0][source] % 160 - index % 160]).float()
    assert (offset.norm(dim=0) <= 1.5).float().mean() > 0.9
    found = len(source) / int(golden[f"{pair}.counts"][2])
    assert (
        0.75 < found <= 1.0
    )  # a projection meets one pixel, which may lie 2 cm off on a slope; the paper searches all


@pytest.mark.parametrize("pair", PAIRS)
def test_overlap_is_close_to_the_papers_ratio_and_symmetric(golden, pair):
    d1, d2, k, _, p1, p2 = pair_inputs(golden, pair)
    there = geometry.match_pixels(d1, d2, k, k, p1, p2)
    back = geometry.match_pixels(d2, d1, k, k, p2, p1)
    ratio = geometry.overlap_ratio(there, back, d1, d2)
    assert ratio.item() == pytest.approx(golden[f"{pair}.overlap_paper"].item(), abs=0.08)
    assert ratio.item() == geometry.overlap_ratio(back, there, d2, d1).item()


def random_view(rng, height=9, width=12):
    depth = rng.uniform(0.8, 1.2, (height, width))
    depth[rng.random((height, width)) < 0.2] = 0
    axis = rng.normal(size=3) * 0.1
    skew = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    pose = np.eye(4)
    pose[:3, :3] = np.linalg.qr(np.eye(3) + skew)[0] * np.sign(np.diag(np.linalg.qr(np.eye(3) + skew)[1]))
    pose[:3, 3] = rng.normal(size=3) * 0.1
    intrinsics = np.array([[10 + rng.random(), 0, 5.3], [0, 10.2, 4.1], [0, 0, 1]])
    return depth, intrinsics, pose


def slow_match(view1, view2, tolerance, distance):
    """One pixel at a time, in the order in which one would explain it."""
    (depth1, k1, pose1), (depth2, k2, pose2) = view1, view2
    out = np.full(depth1.size, -1)
    for i in range(depth1.shape[0]):
        for j in range(depth1.shape[1]):
            z = depth1[i, j]
            if z == 0:
                continue
            world = pose1 @ np.array([(j - k1[0, 2]) * z / k1[0, 0], (i - k1[1, 2]) * z / k1[1, 1], z, 1])
            x, y, z2, _ = np.linalg.inv(pose2) @ world
            if z2 <= 0:
                continue
            col, row = int(np.floor(x / z2 * k2[0, 0] + k2[0, 2])), int(np.floor(y / z2 * k2[1, 1] + k2[1, 2]))
            if not (0 <= row < depth2.shape[0] and 0 <= col < depth2.shape[1]) or depth2[row, col] == 0:
                continue
            seen = depth2[row, col]
            surface = np.array([(col - k2[0, 2]) * seen / k2[0, 0], (row - k2[1, 2]) * seen / k2[1, 1], seen])
            gap = abs(z2 - seen) if distance == "depth" else np.linalg.norm(np.array([x, y, z2]) - surface)
            if gap < tolerance:
                out[i * depth1.shape[1] + j] = row * depth2.shape[1] + col
    return out


@pytest.mark.parametrize("distance, tolerance", [("depth", 0.1), ("euclidean", 0.2)])
def test_batched_matching_equals_the_loop_over_pixels(distance, tolerance):
    rng = np.random.default_rng(3)
    views = [(random_view(rng), random_view(rng)) for _ in range(4)]
    columns = [torch.from_numpy(np.stack([pair[s][k] for pair in views])) for k in range(3) for s in range(2)]
    got = geometry.match_pixels(*columns, tolerance=tolerance, distance=distance)
    want = np.stack([slow_match(*pair, tolerance, distance) for pair in views])
    assert (want >= 0).sum() > 40
    np.testing.assert_array_equal(got.numpy(), want)


def test_projection_inverts_backprojection():
    rng = np.random.default_rng(0)
    depth, intrinsics, pose = (torch.from_numpy(a) for a in random_view(rng))
    uv, z = geometry.project(geometry.backproject(depth, intrinsics), intrinsics)
    valid = depth.flatten() > 0
    torch.testing.assert_close(uv[valid], geometry.pixel_grid(9, 12, depth)[valid])
    torch.testing.assert_close(z, depth.flatten())
    there = geometry.relative_pose(pose, torch.eye(4).double())
    points = torch.from_numpy(rng.normal(size=(5, 3)))
    slow = np.stack([(pose.numpy() @ np.append(p, 1))[:3] for p in points.numpy()])
    np.testing.assert_allclose(geometry.transform(points, there).numpy(), slow, atol=1e-12)


def test_resized_intrinsics_belong_to_the_sampled_pixels():
    full = load_file(GOLDEN_FILES["procedural"])
    torch.testing.assert_close(
        geometry.resize_intrinsics(full["intrinsics_full"], (480, 640), (120, 160)), full["intrinsics"], rtol=0, atol=0
    )
    for old, new in ((640, 160), (640, 320), (480, 240), (1296, 320), (7, 7)):
        intrinsics = torch.tensor([[500.0, 0, 300], [0, 500, 300], [0, 0, 1]]).double()
        small = geometry.resize_intrinsics(intrinsics, (old, old), (new, new))
        source = torch.tensor(geometry.nearest_indices(old, new)).double()
        ray_source, ray_small = (source - 300) / 500, (torch.arange(new) - small[0, 2]) / small[0, 0]
        limit = 1e-12 if old % new == 0 else 0.51 / 500
        assert (ray_source - ray_small).abs().max() <= limit


def test_nearest_indices_are_pillows():
    from PIL import Image

    for old, new in ((640, 160), (640, 320), (1296, 320), (968, 240), (90, 100)):
        row = Image.fromarray(np.arange(old, dtype=np.int32)[None])
        picked = np.asarray(row.resize((new, 1), Image.Resampling.NEAREST))[0]
        assert geometry.nearest_indices(old, new) == picked.tolist()


@pytest.mark.parametrize(
    ("degrees", "shift"),
    [(0, (-0.05, 0.01, 0.02)), (0, (-0.005, 0.001, 0.02)), (20, (-0.05, 0.01, 0.02)), (170, (0, 0, 1.5))],
)
def test_registered_depth_is_the_depth_the_color_camera_would_see(degrees, shift):
    """Two parallel planes seen by a shifted camera: values, occlusion order and holes by a loop over pixels."""
    rng = np.random.default_rng(1)
    depth, intrinsics, _ = random_view(rng, 12, 16)
    depth[4:8, 5:11] = 0.5
    color_intrinsics = np.array([[9.0, 0, 7.2], [0, 9.5, 5.1], [0, 0, 1]])
    moved = geometry.rotation(torch.tensor([0.3, 1.0, -0.2]), np.radians(degrees)).numpy()
    moved[:3, 3] = shift
    want = np.zeros((11, 15))
    for i in range(12):
        for j in range(16):
            z = depth[i, j]
            ray = [(j - intrinsics[0, 2]) / intrinsics[0, 0], (i - intrinsics[1, 2]) / intrinsics[1, 1], 1]
            x, y, seen = moved[:3, :3] @ (z * np.array(ray)) + moved[:3, 3]
            if z == 0 or seen <= 0:
                continue
            col, row = int(np.floor(x / seen * 9 + 7.2 + 0.5)), int(np.floor(y / seen * 9.5 + 5.1 + 0.5))
            if 0 <= row < 11 and 0 <= col < 15 and (want[row, col] == 0 or seen < want[row, col]):
                want[row, col] = seen
    tensors = [torch.from_numpy(a) for a in (depth, intrinsics, color_intrinsics, moved)]
    np.testing.assert_allclose(geometry.register_depth(*tensors, (11, 15)).numpy(), want)
    assert want.any()


def test_points_behind_the_second_camera_never_match():
    """Two cameras back to back: with a tolerance of meters the depth test alone would let the mirror image through."""
    depth = torch.ones(1, 8, 8)
    intrinsics = torch.tensor([[[8.0, 0, 3.5], [0, 8, 3.5], [0, 0, 1]]])
    turned = torch.diag(torch.tensor([-1.0, 1, -1, 1]))[None]
    same = torch.eye(4)[None]
    options = {"tolerance": 5.0, "rounding": "nearest"}
    assert (geometry.match_pixels(depth, depth, intrinsics, intrinsics, same, same, **options) >= 0).all()
    assert (geometry.match_pixels(depth, depth, intrinsics, intrinsics, same, turned, **options) == -1).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_points_on_the_pixels_of_a_frame_are_seen_where_the_released_matcher_finds_them(golden, pair):
    """The voxel matcher and the pixel matcher share their projection: back-projected pixels must land alike."""
    depth1, depth2, k, _, pose1, pose2 = pair_inputs(golden, pair, torch.float64)
    source = (depth1[0].flatten() > 0).nonzero()[:, 0]
    world = geometry.transform(geometry.backproject(depth1[0], k[0])[source], pose1[0])
    target = geometry.seen_at(world, depth2[0], k[0], pose2[0], match_released_code=True)
    found = target >= 0
    pos1 = torch.stack([source[found] // 160, source[found] % 160], -1)
    pos2 = torch.stack([target[found] // 160, target[found] % 160], -1)
    assert torch.equal(pos1.int(), golden[f"{pair}.warp_pos1"])
    assert torch.equal(pos2.int(), golden[f"{pair}.warp_pos2"])


def slow_seen_at(points, depth, intrinsics, pose, tolerance, rounding, match_released_code):
    """One point at a time."""
    out = np.full(len(points), -1)
    world_to_cam = np.linalg.inv(pose)
    for row, point in enumerate(points):
        x, y, z, _ = world_to_cam @ np.append(point, 1)
        u, v = x / z * intrinsics[0, 0] + intrinsics[0, 2], y / z * intrinsics[1, 1] + intrinsics[1, 2]
        if match_released_code:
            j, i = int(u), int(v)
        elif rounding == "floor":
            j, i = int(np.floor(u)), int(np.floor(v))
        else:
            j, i = int(np.floor(u + 0.5)), int(np.floor(v + 0.5))
        if not (0 <= i < depth.shape[0] and 0 <= j < depth.shape[1]) or abs(z - depth[i, j]) >= tolerance:
            continue
        if match_released_code or (z > 0 and depth[i, j] > 0):
            out[row] = i * depth.shape[1] + j
    return out


@pytest.mark.parametrize("options", [{}, {"rounding": "nearest"}, {"match_released_code": True}])
def test_seen_points_equal_the_loop_over_points(options):
    rng = np.random.default_rng(4)
    depth, intrinsics, pose = random_view(rng)
    points = rng.uniform(-0.6, 1.2, (10_000, 3))
    args = [torch.from_numpy(a) for a in (points, depth, intrinsics, pose)]
    got = geometry.seen_at(*args, tolerance=0.2, **options)
    want = slow_seen_at(
        points, depth, intrinsics, pose, 0.2, options.get("rounding", "floor"), "match_released_code" in options
    )
    assert (want >= 0).sum() > 150
    np.testing.assert_array_equal(got.numpy(), want)
    batched = geometry.seen_at(*(a[None].expand(2, *a.shape) for a in args), tolerance=0.2, **options)
    assert (batched == got).all()


def test_only_the_exact_mode_lets_points_at_the_camera_plane_match_pixels_without_depth():
    """methods.md D3: no test of validity, so a voxel 10 cm before or behind the camera meets depth 0."""
    depth, intrinsics = torch.zeros(8, 8), torch.tensor([[8.0, 0, 3.5], [0, 8, 3.5], [0, 0, 1]])
    points = torch.tensor([[0.0, 0, 0.1], [0, 0, -0.1], [-0.053125, 0, 0.1]])  # the last one at u = -0.75
    args = (points, depth, intrinsics, torch.eye(4))
    assert geometry.seen_at(*args, tolerance=0.2).tolist() == [-1, -1, -1]
    assert geometry.seen_at(*args, tolerance=0.2, match_released_code=True).tolist() == [27, 27, 24]


def brute_force(points1, points2, radius):
    distance = ((points1[:, None].double() - points2[None].double()) ** 2).sum(-1)
    return (distance < radius**2).nonzero()


@pytest.mark.parametrize("spread", [(0.4, 0.4, 0.4), (1.0, 1.0, 0.01), (30.0, 0.0, 0.0), (0.02, 0.02, 0.02)])
def test_radius_matches_are_all_pairs_within_the_radius(spread):
    generator = torch.Generator().manual_seed(0)
    points1, points2 = (torch.randn(n, 3, generator=generator) * torch.tensor(spread) - 5 for n in (400, 300))
    got = geometry.radius_matches(points1, points2, 0.1)
    assert len(got) > 30
    assert torch.equal(got, brute_force(points1, points2, 0.1))  # also in this order
    grid = torch.stack(torch.meshgrid(*[torch.arange(-3.0, 4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for radius in (1.0, 1.0000001, 1.5):  # on the grid, neighbors lie exactly on the first radius
        assert torch.equal(geometry.radius_matches(grid, grid, radius), brute_force(grid, grid, radius))
    assert len(geometry.radius_matches(grid, grid, 1.0)) == len(grid)


def test_a_point_at_the_radius_is_no_match():
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0.25, 0, 0]])
    assert geometry.radius_matches(points[:1], points[1:], 0.5).tolist() == [[0, 1]]
    assert geometry.radius_matches(points[:1], points[1:], 0.5000001).tolist() == [[0, 0], [0, 1]]


def test_radius_matches_of_nothing_and_of_the_far_away_are_none():
    near, far, none = torch.zeros(3, 3), torch.full((2, 3), 1e6), torch.empty(0, 3)
    for points1, points2 in ((near, none), (none, near), (near, far), (far, near)):
        assert geometry.radius_matches(points1, points2, 0.0375).shape == (0, 2)


def test_radius_matches_refuse_what_they_cannot_answer():
    points = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="radius is 0"):
        geometry.radius_matches(points, points, 0)
    with pytest.raises(ValueError, match="not finite"):
        geometry.radius_matches(points, points * torch.nan, 1)
    with pytest.raises(ValueError, match="too many to number"):
        geometry.radius_matches(points, torch.tensor([[0.0, 0, 0], [1e6, 1e6, 1e6]]), 1e-3)


def test_radius_matches_of_two_frames_need_no_table_of_distances():
    """20k points each, as two 640x480 frames at 2 cm: a table of all distances would take 3 GB."""
    generator = torch.Generator().manual_seed(1)
    wall = torch.rand(20_000, 3, generator=generator) * torch.tensor([3.0, 3.0, 0.02])
    with LargestTensor() as largest:
        geometry.radius_matches(wall[:2], wall[:2], 0.0375)  # torch imports what a mode needs when it is first used
        found, lines = python_lines(lambda: geometry.radius_matches(wall, wall.flip(0), 0.0375))
    assert lines < 5000
    assert largest.elements < 20_000_000
    assert len(found) > 100_000


def test_rotations_are_scipys():
    from scipy.spatial.transform import Rotation

    for axis, angle in (([0.3, -0.2, 0.4], 1.2), ([0, 0, 5.0], -3.0), ([1e-3, 0, 0], 0.0)):
        unit = np.array(axis) / np.linalg.norm(axis)
        want = Rotation.from_rotvec(unit * angle).as_matrix()
        got = geometry.rotation(torch.tensor(axis), angle)
        np.testing.assert_allclose(got[:3, :3].numpy(), want, atol=1e-6)
        assert got[3].tolist() == [0, 0, 0, 1]
        assert got[:3, 3].tolist() == [0, 0, 0]


def test_centered_points_have_their_mean_at_the_origin():
    points = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) + 7
    moved = geometry.transform(points.double(), geometry.centered(points))
    assert moved.mean(dim=0).abs().max() < 1e-12
    torch.testing.assert_close(moved - moved[0], (points - points[0]).double(), atol=1e-5, rtol=0)


def test_the_former_name_of_match_released_code_still_works():
    depth, intrinsics, pose = torch.ones(1, 4, 4), torch.eye(3)[None], torch.eye(4)[None]
    views = (depth, depth, intrinsics, intrinsics, pose, pose)
    with pytest.warns(FutureWarning, match="'authors_exact' is now 'match_released_code'"):
        former = geometry.match_pixels(*views, authors_exact=True)
    assert torch.equal(former, geometry.match_pixels(*views, match_released_code=True))
