"""Rooms: depth, shadows and surfaces against slow, obvious twins, and frames against each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from geo_pretrain.rooms.intersect import MISS, Geometry, hit_box, hit_frustum, hit_quadric, occluded
from geo_pretrain.rooms.layout import make_scene
from geo_pretrain.rooms.path import camera_path, intrinsics, look
from geo_pretrain.rooms.render import Renderer
from geo_pretrain.rooms.scene import CLASSES, Lights, Material, Scene, Thing, pack, rotation_about
from geo_pretrain.rooms.surface import depth_inside, scene_mesh, scene_points

WIDTH, HEIGHT = 96, 64


def small_scene(*things: Thing, size: tuple[float, float, float] = (6.0, 6.0, 3.0)) -> Scene:
    lights = Lights(np.array([[0.0, 0.0, 2.7]]), np.ones((1, 3)), np.array([[0.0, 0.0, -1.0]]), np.zeros(1))
    return pack("hand", np.array(size), things, [Material()] * 6, lights, None, np.full(3, 0.3))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene("twin", np.random.default_rng(3), "hard")


@pytest.fixture(scope="module")
def renderer(scene: Scene) -> Renderer:
    return Renderer(scene)


@pytest.fixture(scope="module")
def poses(renderer: Renderer) -> np.ndarray:
    return camera_path(renderer, np.random.default_rng(4), 10)


def test_hand_made_depths() -> None:
    """Distances that can be worked out on paper."""
    thing = Thing("box")
    thing.box((2, 0, 1), (1, 1, 1), Material())  # front face at x = 1.5
    thing.ellipsoid((0, 2, 1), (1, 1, 1), Material())  # nearest point at y = 1.5
    thing.cylinder((-2, 0, 0.5), 1.0, 2.0, Material())  # nearest point at x = -1.5
    thing.cylinder((0, -2, 1.0), 2.0, 1.0, Material(), top=0.0)  # a cone: radius 0.5 at z = 1.5
    renderer = Renderer(small_scene(thing))
    k = intrinsics(64, 64)
    k[:2, 2] = 32.0  # a pixel exactly on the axis
    for yaw, part in ((0.0, 0), (np.pi / 2, 1), (np.pi, 2), (-np.pi / 2, 3)):
        depth, index = renderer.depth(look(np.array([0.0, 0.0, 1.5]), yaw, 0.0), k, 64, 64)
        assert depth[32, 32].item() == pytest.approx(1.5, abs=1e-5)
        assert index[32, 32].item() == part


def test_sizes_on_the_image() -> None:
    """A square of 1 m at 2 m covers f/2 pixels; the tapered box is half as wide at its top."""
    thing = Thing("box")
    thing.box((2.05, 0, 0.5), (0.1, 1, 2), Material(), taper=(1.0, 0.5))
    k = np.array([[100.0, 0, 63.5], [0, 100.0, 63.5], [0, 0, 1]])
    _, index = Renderer(small_scene(thing)).depth(look(np.array([0.0, 0.0, 1.5]), 0.0, 0.0), k, 128, 128)
    wide = (index == 0).sum(1)
    assert wide[63].item() == pytest.approx(37.5, abs=1.0)  # half way up: 0.75 m
    assert wide[111].item() == pytest.approx(50 * (1 - 0.5 * 0.02 / 2), abs=1.5)  # near the lower edge
    assert wide[15].item() == pytest.approx(25, abs=1.5)  # near the upper edge


def _inside(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Deepest penetration of points [N, 3] into any part, meters, one part after the other."""
    deepest = np.full(len(points), -np.inf)
    for part in range(len(scene.kind) - 6):
        near = np.abs(points - scene.center[part]).max(1) < np.linalg.norm(scene.bound[part])
        deepest[near] = np.maximum(deepest[near], depth_inside(scene, points[near], part))
    return deepest


def test_depth_is_where_the_first_solid_begins(scene: Scene, renderer: Renderer, poses: np.ndarray) -> None:
    """Slow twin: walk along rays in 5 mm steps. Nothing solid lies before the depth, and something begins there."""
    rng = np.random.default_rng(0)
    k = intrinsics(WIDTH, HEIGHT)
    checked = 0
    for pose in poses[::3]:
        depth, index = (x.numpy() for x in renderer.depth(pose, k, WIDTH, HEIGHT))
        for _ in range(30):
            v, u = int(rng.integers(HEIGHT)), int(rng.integers(WIDTH))
            ray = pose[:3, :3] @ np.array([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], 1.0])
            z, part = float(depth[v, u]), int(index[v, u])
            way = pose[:3, 3] + np.arange(0.0, z - 0.002, 0.005)[:, None] * ray
            assert _inside(scene, way).max() < 5e-4
            end = pose[:3, 3] + z * ray
            assert (np.abs(end[:2]) <= scene.size[:2] / 2 + 1e-3).all()
            if part < len(scene.kind) - 6:
                assert abs(depth_inside(scene, end[None], part)[0]) < 1e-3
                assert depth_inside(scene, (end + 1e-3 * ray)[None], part)[0] > -1e-3
            else:
                gap = np.abs(np.concatenate([scene.size[:2] / 2 - np.abs(end[:2]), [end[2], scene.size[2] - end[2]]]))
                assert gap.min() < 1e-3
            checked += 1
    assert checked == 120


def test_tiles_miss_nothing(scene: Scene, renderer: Renderer, poses: np.ndarray) -> None:
    """Twin without culling: every ray against every part, through the plain kernels."""
    geometry = renderer.geometry
    pose, k = poses[5], intrinsics(WIDTH, HEIGHT)
    depth, index = renderer.depth(pose, k, WIDTH, HEIGHT)
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH]
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.shape)], -1).reshape(-1, 3)
    rays = torch.tensor(rays @ pose[:3, :3].T, dtype=torch.float32)
    best, winner = torch.full((len(rays),), MISS), torch.full((len(rays),), -1)
    for group, kernel in zip(geometry.groups, (hit_box, hit_frustum, hit_quadric), strict=True):
        for part in group.tolist():
            unit = geometry.rotation[part] / geometry.half[part]
            origin = (torch.tensor(pose[:3, 3], dtype=torch.float32) - geometry.center[part]) @ unit
            d = rays @ unit
            t = kernel(
                tuple(origin[i].view(1, 1) for i in range(3)),
                tuple(d[None, :, i] for i in range(3)),
                geometry.coef[part : part + 1],
            )[0]
            winner[t < best] = part
            best = torch.minimum(best, t)
    ours, seen = depth.flatten(), index.flatten() < geometry.parts
    assert seen.float().mean() > 0.15
    assert (best[seen] - ours[seen]).abs().max() < 1e-4
    assert (best[~seen] >= ours[~seen] - 1e-4).all()
    assert (winner[seen] == index.flatten()[seen]).float().mean() > 0.999


def test_shadows_equal_a_walk_to_the_light(scene: Scene, renderer: Renderer, poses: np.ndarray) -> None:
    """Slow twin: a point is dark when some step towards the light lies inside a part that casts shadows."""
    geometry, k = renderer.geometry, intrinsics(WIDTH, HEIGHT)
    casting = {part for part in range(geometry.parts) if scene.casts[part]}
    light = scene.lights.position[0]
    depth, _ = (x.numpy() for x in renderer.depth(poses[2], k, WIDTH, HEIGHT))
    v, u = (g.ravel() for g in np.mgrid[0:HEIGHT, 0:WIDTH])
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.shape)], -1) @ poses[2][:3, :3].T
    points = poses[2][:3, 3] + rays * depth.ravel()[:, None]
    points += 0.02 * (light - points) / np.linalg.norm(light - points, axis=1, keepdims=True)
    dark = occluded(
        geometry,
        torch.tensor(light, dtype=torch.float32),
        torch.tensor(points, dtype=torch.float32).view(-1, 64, 3),
        torch.ones(len(points) // 64, 64, dtype=torch.bool),
    ).flatten()
    rng = np.random.default_rng(1)
    sides = [(value, rng.permutation(np.nonzero(dark.numpy() == value)[0])[:64]) for value in (True, False)]
    for value, picks in sides:
        assert len(picks) > 60
        for pick in picks:
            steps = points[pick] + np.linspace(0, 1, 1200)[:, None] * (light - points[pick])
            deepest = max(depth_inside(scene, steps, part).max() for part in casting)
            # Half a millimeter of doubt: a ray that cuts an edge may do so between two steps.
            assert deepest > -5e-4 if value else deepest < 5e-4


def test_reprojection_agrees(renderer: Renderer, poses: np.ndarray) -> None:
    """Depth of one frame, carried into another one, is that frame's depth wherever nothing is in between."""
    k = intrinsics(160, 120)
    compared = 0
    for a, b in itertools.pairwise(poses):
        depth_a, depth_b = (renderer.depth(pose, k, 160, 120)[0].double().numpy() for pose in (a, b))
        part_b = renderer.depth(b, k, 160, 120)[1].numpy()
        v, u = (g.ravel() for g in np.mgrid[0:120, 0:160])
        world = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.size)], -1) * depth_a.reshape(
            -1, 1
        )
        world = world @ a[:3, :3].T + a[:3, 3]
        camera = (world - b[:3, 3]) @ b[:3, :3]
        uv = camera[:, :2] / camera[:, 2:] * k[0, 0] + k[:2, 2]
        ok = (camera[:, 2] > 0.1) & (uv > 1).all(1) & (uv[:, 0] < 158) & (uv[:, 1] < 118)
        uv, z = uv[ok], camera[ok, 2]
        x, y = np.floor(uv).astype(int).T
        fx, fy = (uv - np.floor(uv)).T
        corners = [(y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)]
        inverse = [1 / depth_b[c] for c in corners]  # on a plane, 1 / z is linear in the image
        flat = np.abs(inverse[0] + inverse[3] - inverse[1] - inverse[2]) < 1e-6
        for c in corners[1:]:
            flat &= part_b[c] == part_b[corners[0]]
        there = 1 / (
            inverse[0] * (1 - fx) * (1 - fy)
            + inverse[1] * fx * (1 - fy)
            + inverse[2] * (1 - fx) * fy
            + inverse[3] * fx * fy
        )
        visible = flat & (z < there + 0.01)  # behind it: hidden in b
        difference = np.abs(z - there)[visible]
        compared += visible.sum()
        assert np.quantile(difference, 0.995) < 0.002 if visible.sum() > 200 else True
    assert compared > 20000


def test_points_lie_on_what_the_camera_sees(scene: Scene, renderer: Renderer, poses: np.ndarray) -> None:
    """Surface points seen in a frame carry the frame's class and instance, and the camera faces their normals."""
    surface = scene_points(scene, np.random.default_rng(0), 150.0)
    assert np.allclose(np.linalg.norm(surface.normals, axis=1), 1, atol=1e-4)
    assert _inside(scene, surface.points.astype(np.float64) + 0.01 * surface.normals)[::7].mean() < 0.0
    k = intrinsics(160, 120)
    seen = 0
    for pose in poses[::3]:
        shot = renderer.render(pose, k, 160, 120)
        camera = (surface.points - pose[:3, 3]) @ pose[:3, :3]
        uv = np.rint(camera[:, :2] / np.maximum(camera[:, 2:], 1e-6) * k[0, 0] + k[:2, 2]).astype(int)
        ok = (camera[:, 2] > 0.2) & (uv >= 1).all(1) & (uv[:, 0] < 159) & (uv[:, 1] < 119)
        u, v = uv[ok].T
        instances = shot.instance.numpy()
        near = np.abs(shot.depth.numpy()[v, u] - camera[ok, 2]) < 0.004
        calm = np.ones(len(u), bool)  # not at the border of an instance
        for dv, du in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            calm &= instances[v + dv, u + du] == instances[v, u]
        keep = near & calm
        same = surface.instance[ok][keep] == instances[v, u][keep]
        assert same.mean() > 0.97
        assert (surface.semantic[ok][keep][same] == shot.semantic.numpy()[v, u][keep][same]).all()
        towards = ((pose[:3, 3] - surface.points[ok][keep]) * surface.normals[ok][keep]).sum(1)
        assert (towards[same] > -0.02).mean() > 0.95  # the rest lie just round an edge, within the same pixel
        seen += keep.sum()
    assert seen > 1000


def test_mesh_has_the_area_of_its_solids() -> None:
    thing = Thing("ball")
    thing.ellipsoid((0, 0, 1), (1, 1, 1), Material())
    thing.box((2, 0, 0.5), (1, 2, 0.5), Material(), rotation=rotation_about("z", 0.3))
    thing.cylinder((-2, 0, 0.5), 1.0, 1.0, Material(), top=0.5)
    mesh = scene_mesh(small_scene(thing), 0.5)
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1) / 2
    faces_of = mesh.instance[mesh.faces[:, 0]]
    slant = np.hypot(1.0, 0.25)
    expected = np.pi + 2 * (2 + 0.5 + 1.0) + np.pi * (0.25 + 0.0625) + np.pi * 0.75 * slant
    assert area[faces_of == 1].sum() == pytest.approx(expected, rel=0.02)
    assert area[faces_of > 1].sum() == pytest.approx(2 * 36 + 4 * 18, rel=1e-6)
    # Counter-clockwise seen from the side of the normals, shell included.
    facing = (cross / (2 * area[:, None]) * mesh.normals[mesh.faces].mean(1)).sum(1)
    assert facing.min() > 0.9
    assert {CLASSES[i] for i in np.unique(mesh.semantic)} == {"wall", "floor", "ceiling", "ball"}


def test_threads_do_not_change_a_bit(renderer: Renderer, poses: np.ndarray) -> None:
    before = torch.get_num_threads()
    images = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        images.append(renderer.render(poses[1], intrinsics(WIDTH, HEIGHT), WIDTH, HEIGHT, 4).radiance)
    torch.set_num_threads(before)
    assert torch.equal(images[0], images[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu(scene: Scene, renderer: Renderer, poses: np.ndarray) -> None:
    k = intrinsics(160, 120)
    ours, theirs = renderer.render(poses[1], k, 160, 120, 4), Renderer(scene, "cuda").render(poses[1], k, 160, 120, 4)
    same = ours.instance == theirs.instance.cpu()
    assert same.float().mean() > 0.999
    assert (ours.depth - theirs.depth.cpu())[same].abs().max() < 1e-4
    assert (ours.radiance - theirs.radiance.cpu()).abs().median() < 1e-4


def test_geometry_holds_every_part(scene: Scene) -> None:
    geometry = Geometry.of(scene, torch.device("cpu"))
    assert sorted(torch.cat(geometry.groups).tolist()) == list(range(geometry.parts))
    assert geometry.parts == len(scene.kind) - 6
