"""The z-buffer against a loop over points and pixels; cameras around a scene; which way is up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geo_pretrain.geometry import backproject, rotation, transform
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.visualize.splat import (
    MAX_REACH,
    Camera,
    behind_camera,
    frame_camera,
    look_at,
    rotation_to_z,
    splat,
    turntable,
    up_direction,
)


def camera(size=(12, 16), focal=14.0):
    pose = rotation(torch.tensor([1.0, 2, 3]), 0.4)
    pose[:3, 3] = torch.tensor([0.3, -0.2, 0.1])
    intrinsics = torch.tensor([[focal, 0, 7.4], [0, focal, 5.6], [0, 0, 1]], dtype=torch.float64)
    return Camera(intrinsics, pose, size)


def slow_splat(points, view, radius):
    """Pixel by pixel, point by point."""
    height, width = view.size
    k, inverse = view.intrinsics.numpy(), np.linalg.inv(view.cam_to_world.numpy())
    nearest, found = np.full((height, width), np.inf), np.full((height, width), -1)
    for number, point in enumerate(points.double().numpy()):
        x, y, z = (inverse @ [*point, 1])[:3]
        if z <= 0:
            continue
        column, row = (math.floor(c + 0.5) for c in (k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]))
        reach = min(round(radius * k[0, 0] / z), MAX_REACH)
        for v in range(max(row - reach, 0), min(row + reach + 1, height)):
            for u in range(max(column - reach, 0), min(column + reach + 1, width)):
                if z < nearest[v, u]:
                    nearest[v, u], found[v, u] = z, number
    return found


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.5])
def test_splat_equals_the_loop(radius):
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(80, 3, generator=generator, dtype=torch.float64) * torch.tensor([1, 1, 1.5]) + torch.tensor(
        [0, 0, 1.5]
    )
    points = transform(own, camera().cam_to_world)
    found = splat(points, camera(), radius)
    assert np.array_equal(found, slow_splat(points, camera(), radius))
    assert found.dtype == np.int64
    assert (own[:, 2] < 0).any()  # some lie behind
    assert (found == -1).any() or radius > 0.1
    assert len(np.unique(found)) > 5


def test_of_equally_near_points_the_first_wins():
    view = Camera(camera().intrinsics, torch.eye(4, dtype=torch.float64), (12, 16))
    points = torch.tensor([[0.0, 0, 3], [0, 0, 2], [0, 0, 2]])
    assert set(np.unique(splat(points, view, 0.0))) == {-1, 1}


def test_nothing_in_sight():
    view = Camera(camera().intrinsics, torch.eye(4, dtype=torch.float64), (12, 16))
    for points in (torch.zeros(0, 3), torch.tensor([[0.0, 0, -1]]), torch.tensor([[50.0, 0, 1]])):
        assert (splat(points, view, 0.3) == -1).all()


@pytest.fixture(scope="module")
def frame(recording):
    source = SevenScenes(recording)
    return source.load(source.scenes()[0], "000000")


def world_points(frame):
    points = backproject(torch.from_numpy(frame.depth).double(), torch.from_numpy(frame.intrinsics))
    return transform(points[frame.depth.flatten() > 0], torch.from_numpy(frame.cam_to_world).double())


def test_a_frame_drawn_into_its_own_camera_is_itself(frame):
    found = splat(world_points(frame), frame_camera(frame), 0.0)
    rows = np.full(frame.depth.shape, -1)
    rows[frame.depth > 0] = np.arange((frame.depth > 0).sum())
    assert np.array_equal(found, rows)


def test_a_camera_behind_sees_all_of_a_frame_from_above(frame):
    points = world_points(frame)
    view = behind_camera(points, frame, (90, 120))
    pixel, z = view.project(points)
    assert (z > 0).all()
    assert ((pixel >= 0) & (pixel <= torch.tensor([119, 89]))).all()
    own, moved = torch.from_numpy(frame.cam_to_world), view.cam_to_world
    away = own[:3, :3].T @ (moved[:3, 3] - own[:3, 3])  # in the frame's camera: x right, y down, z forward
    depth = float(np.median(frame.depth[frame.depth > 0]))
    torch.testing.assert_close(away, depth * torch.tensor([0, -0.3, -0.35], dtype=torch.float64), rtol=1e-3, atol=1e-3)
    turned = own[:3, :3].T @ moved[:3, :3]
    assert turned[0, 0] == pytest.approx(1)  # not tilted sideways
    assert float(turned[1, 2]) > 0.1  # it looks down


def poses(*ups):
    """Poses of cameras whose own up is given."""
    found = []
    for up in ups:
        pose = np.eye(4)
        pose[:3, :3] = rotation_to_z(-np.asarray(up, float) / np.linalg.norm(up))[
            [0, 2, 1]
        ].T  # the second column is down
        found.append(pose)
    return found


def test_up_is_the_axis_that_cameras_mean():
    np.testing.assert_allclose(up_direction(poses((0.3, 0, 1), (-0.2, 0.1, 1))), [0, 0, 1])
    np.testing.assert_allclose(up_direction(poses((0.1, -1, 0.3))), [0, -1, 0])
    oblique = np.array([0.0, 1, 1]) / 2**0.5
    np.testing.assert_allclose(up_direction(poses(oblique, oblique)), oblique, atol=1e-12)
    np.testing.assert_allclose(up_direction(poses((0, 0.51, 0.86), (0, 0.51, 0.86)))[1], 0.51, atol=1e-3)
    np.testing.assert_allclose(up_direction(poses((0, 0.49, 0.87))), [0, 0, 1])


@pytest.mark.parametrize("up", [(0, 0, 1), (0, -1, 0), (1, 0, 0), (0.6, 0, -0.8)])
def test_upright_is_a_rotation_that_lifts_up(up):
    turn = rotation_to_z(np.array(up, float))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    np.testing.assert_allclose(turn @ up, [0, 0, 1], atol=1e-12)


def test_look_at_faces_the_target_with_up_upwards():
    eye, target = torch.tensor([3.0, 1, 2], dtype=torch.float64), torch.tensor([0.0, -1, 0.5], dtype=torch.float64)
    pose = look_at(eye, target, torch.tensor([0, 0, 1], dtype=torch.float64))
    torch.testing.assert_close(pose[:3, :3] @ pose[:3, :3].T, torch.eye(3, dtype=torch.float64))
    assert float(torch.linalg.det(pose[:3, :3])) == pytest.approx(1)
    view = Camera(torch.eye(3, dtype=torch.float64), pose, (2, 2))
    pixel, z = view.project(torch.stack([target, target + torch.tensor([0, 0, 0.1], dtype=torch.float64)]))
    torch.testing.assert_close(pixel[0], torch.zeros(2, dtype=torch.float64))
    assert float(z[0]) == pytest.approx(float((eye - target).norm()))
    assert abs(float(pixel[1, 0])) < 1e-12
    assert float(pixel[1, 1]) < 0  # higher in the world is higher in the picture


def test_turntable_sees_everything_and_fills_its_pictures():
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 2, 1]) + 10
    cameras = turntable(points, 4, (60, 80), 0.6)
    center = (points.amin(0) + points.amax(0)).double() / 2
    eyes = torch.stack([view.cam_to_world[:3, 3] for view in cameras]) - center
    angles = torch.atan2(eyes[:, 1], eyes[:, 0])
    torch.testing.assert_close(angles.diff().remainder(2 * math.pi), torch.full((3,), math.pi / 2, dtype=torch.float64))
    torch.testing.assert_close(torch.asin(eyes[:, 2] / eyes.norm(dim=1)), torch.full((4,), 0.6, dtype=torch.float64))
    filled = []
    for view in cameras:
        pixel, z = view.project(points)
        assert (z > 0).all()
        low, high = (pixel / torch.tensor([79, 59])).aminmax(dim=0)
        torch.testing.assert_close(low + high, torch.ones(2, dtype=torch.float64))  # in the middle
        filled.append(float((high - low).max()))
    assert max(filled) == pytest.approx(1 / 1.05)
    assert len({float(view.intrinsics[0, 0]) for view in cameras}) == 1


def test_turntable_around_one_point():
    for view in turntable(torch.ones(1, 3), 2, (9, 9), 0.5):
        assert splat(torch.ones(1, 3), view, 0.0)[4, 4] == 0
