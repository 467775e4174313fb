"""Rooms by numba against rooms by torch: the same scenes, ids and shadows; depth and colors to rounding.

Tolerances. Depth: float32 at up to 9 m, a few units in the last place, since libraries take square roots differently.
Radiance: noise coordinates are float32 with a seed of up to 4096 added, so the last place of sums moves colors by some
1e-4 of themselves. Levels of 255: what lies that close to a half is rounded to the other side, one or two values in a
thousand.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from geo_pretrain.errors import MissingDependency, RecipeError
from geo_pretrain.rooms import RoomGenerator, RoomsConfig, generator
from geo_pretrain.rooms.intersect import TILE, occluded
from geo_pretrain.rooms.layout import make_scene
from geo_pretrain.rooms.path import camera_path, intrinsics, look
from geo_pretrain.rooms.render import Renderer
from geo_pretrain.rooms.scene import M_COLUMNS, Lights, Material, Scene, Thing, pack, rotation_about
from geo_pretrain.rooms.sensor import SENSORS, develop
from geo_pretrain.rooms.textures import PATTERN_ID, Surface, albedo, tables

pytest.importorskip("numba")
from geo_pretrain.rooms.compiled import casting, patterns
from geo_pretrain.rooms.compiled.renderer import CompiledRenderer

SAME_IDS, SAME_COLORS = 0.999, 0.995  # shares of pixels, of color values
DEPTH, RADIANCE = 2e-6, 1e-3  # m; of a color's size


@pytest.fixture(scope="module", autouse=True)
def compiled_once(own_cache: Path) -> None:
    """Let one test worker compile, in a fresh checkout, and the others load what it compiled."""
    with FileLock(own_cache / "rooms_compiled.lock"):
        _, compiled, poses = both(0, "easy")
        compiled.render(poses[0], intrinsics(64, 64), 64, 64, 1)


CASES = [(0, 160, 120, "medium"), (1, 320, 240, "hard"), (2, 96, 64, "easy"), (5, 64, 128, "hard")]


def both(seed: int, difficulty: str) -> tuple[Renderer, CompiledRenderer, np.ndarray]:
    """Both renderers of a scene, and poses in it."""
    scene = make_scene("twins", np.random.default_rng(seed), difficulty)
    plain = Renderer(scene)
    return plain, CompiledRenderer(scene), camera_path(plain, np.random.default_rng(seed), 3)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("seed, width, height, difficulty", CASES)
def test_frames_are_those_of_torch(seed: int, width: int, height: int, difficulty: str, samples: int) -> None:
    plain, compiled, poses = both(seed, difficulty)
    k = intrinsics(width, height)
    for number, pose in enumerate(poses):
        expected, found = (renderer.render(pose, k, width, height, samples) for renderer in (plain, compiled))
        for field in ("radiance", "depth", "semantic", "instance", "slant", "gloss"):
            one, two = getattr(expected, field), getattr(found, field)
            assert (one.dtype, one.shape) == (two.dtype, two.shape), field
        same = expected.instance == found.instance
        assert same.float().mean() >= SAME_IDS
        assert (expected.semantic == found.semantic).float().mean() >= SAME_IDS
        assert (expected.depth - found.depth)[same].abs().max() < DEPTH
        assert (expected.slant - found.slant)[same].abs().max() < 1e-4
        assert torch.equal(expected.gloss[same], found.gloss[same])
        change = ((expected.radiance - found.radiance).abs() / (expected.radiance + 0.01)).amax(-1)
        assert (change < RADIANCE).float().mean() >= SAME_IDS
        levels = [
            develop(shot.radiance.numpy(), SENSORS[difficulty], np.random.default_rng(number)).astype(int)
            for shot in (expected, found)
        ]
        difference = np.abs(levels[0] - levels[1])
        assert (difference == 0).mean() >= SAME_COLORS
        assert (difference <= 1).mean() >= 0.9999


def test_cameras_walk_the_same_way() -> None:
    """The path depends on small depth images; poses are equal to the last bit."""
    for seed in range(4):
        _, compiled, poses = both(seed, ("easy", "medium", "hard")[seed % 3])
        assert np.array_equal(camera_path(compiled, np.random.default_rng(seed), len(poses)), poses)


def test_generators_agree_in_everything_drawn() -> None:
    """Sensor noise, holes and poses come from the same draws."""
    config = RoomsConfig(scenes=1, frames=2, width=96, height=64, depth_noise=True)
    one, two = (RoomGenerator(replace(config, renderer=name)).render("rooms_train_0000") for name in ("torch", "numba"))
    assert one.keys() == two.keys()
    for field in ("poses", "intrinsics"):
        assert np.array_equal(one[field], two[field])
    for field in ("semantic", "instance"):
        assert (one[field] == two[field]).mean() >= SAME_IDS
    assert (np.abs(one["color"].astype(int) - two["color"]) <= 1).mean() >= 0.9999
    assert ((one["depth"] == 0) == (two["depth"] == 0)).mean() >= SAME_IDS
    assert (np.abs(one["depth"] - two["depth"]) < 1e-5).mean() >= SAME_IDS
    assert 0 < (one["depth"] == 0).mean() < 0.5


def test_the_same_bytes_at_every_call_and_frame_by_frame() -> None:
    rooms = RoomGenerator(RoomsConfig(scenes=1, frames=3, width=64, height=64, renderer="numba"))
    once, again = rooms.render("rooms_train_0000"), rooms.render("rooms_train_0000")
    copy = pickle.loads(pickle.dumps(rooms))
    for field, array in once.items():
        assert array.tobytes() == again[field].tobytes(), field
        for index in (2, 0):
            expected = array if field == "intrinsics" else array[index]
            for source in (rooms, copy):
                assert source.frame("rooms_train_0000", index)[field].tobytes() == expected.tobytes(), field


def test_scenes_kept_ready_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_STAGES", 2)
    rooms = RoomGenerator(RoomsConfig(scenes=3, frames=1, width=64, height=64))
    a, b, c = rooms.names()
    for name in (a, b, a, c):
        rooms.frame(name, 0)
    assert list(rooms._stages) == [a, c]


def hand_made(seed: int) -> Scene:
    """Every kind of part in every posture, without a layout's rules."""
    rng = np.random.default_rng(seed)
    thing = Thing("box")
    for number in range(24):
        turn = rotation_about("z", rng.uniform(0, 6)) @ rotation_about("x", rng.uniform(-1, 1))
        at, size = rng.uniform([-2.6, -2.6, 0.1], [2.6, 2.6, 2]), rng.uniform(0.05, 0.8, 3)
        material = Material(gloss=0.4 * (number % 2), emit=0.2 * (number % 3))
        if number % 3 == 0:
            thing.box(at, size, material, rotation=turn, taper=(1.0, rng.uniform(0.1, 1)) if number % 2 else (1.0, 1.0))
        elif number % 3 == 1:
            thing.cylinder(at, size[0], size[1], material, top=rng.uniform(0, 1.2), rotation=turn, squash=0.6)
        else:
            thing.ellipsoid(at, size, material, rotation=turn)
    lights = Lights(
        np.array([[0.5, 0.2, 2.9], [-2.9, 0.0, 1.5]]),
        np.array([[2.0, 1.8, 1.5], [1.0, 1.0, 1.5]]),
        np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0]]),
        np.array([0.0, 1.0]),
    )
    return pack("hand", np.array([6.0, 6.0, 3.0]), [thing], [Material()] * 6, lights, None, np.full(3, 0.3))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_solids_in_every_posture(seed: int) -> None:
    scene = hand_made(seed)
    plain, compiled = Renderer(scene), CompiledRenderer(scene)
    k = intrinsics(160, 120)
    for yaw in (0.3, 2.4, 4.5):
        pose = look(np.array([0.1, -0.2, 2.6]), yaw, -0.5, 0.1)
        (depth, part), (other_depth, other_part) = (r.depth(pose, k, 160, 120) for r in (plain, compiled))
        assert (part == other_part).float().mean() >= SAME_IDS
        assert (part < plain.parts).float().mean() > 0.02
        assert (depth - other_depth)[part == other_part].abs().max() < DEPTH
        one, two = (r.render(pose, k, 160, 120, 4).radiance for r in (plain, compiled))
        assert (((one - two).abs() / (one + 0.01)).amax(-1) < RADIANCE).float().mean() >= SAME_IDS


def test_shadows_are_those_of_torch() -> None:
    plain, compiled, poses = both(3, "hard")
    rng = np.random.default_rng(0)
    depth, _ = plain.depth(poses[0], intrinsics(160, 120), 160, 120)
    v, u = np.mgrid[0:120, 0:160].reshape(2, 15, 8, 20, 8).transpose(0, 1, 3, 2, 4).reshape(2, -1)  # tile order
    k = intrinsics(160, 120)
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.shape)], -1) @ poses[0][:3, :3].T
    points = torch.tensor(poses[0][:3, 3] + rays * 0.99 * depth.numpy()[v, u, None], dtype=torch.float32)
    wanted = torch.tensor(rng.random(len(points)) < 0.7)
    lights = torch.tensor(plain.scene.lights.position, dtype=torch.float32)
    strength = np.tile(wanted.numpy().astype(np.float32), (len(lights), 1))
    normals = np.zeros((3, len(points)), np.float32)
    casting.shadows(compiled.shapes, lights.numpy(), np.ascontiguousarray(points.numpy().T), normals, strength)
    hidden = 0
    for light, seen in zip(lights, strength, strict=True):
        tiles = points.view(-1, TILE * TILE, 3), wanted.view(-1, TILE * TILE)
        dark = occluded(plain.geometry, light, *tiles).flatten()
        expected = (wanted & ~dark).numpy()
        hidden += int((wanted & dark).sum())
        assert ((seen > 0) == expected).mean() >= 0.9999
    assert 1000 < hidden < int(wanted.sum()) * len(lights) / 2


@pytest.mark.parametrize("name", PATTERN_ID)
def test_patterns_have_the_colors_of_torch(name: str) -> None:
    """Every pattern at random points, with several seeds, scales, footprints and grain."""
    rng, count = np.random.default_rng(PATTERN_ID[name]), 4000
    rows = [
        Material(
            PATTERN_ID[name],
            tuple(rng.uniform(0, 1, 3)),
            tuple(rng.uniform(0, 1, 3)),
            scale=rng.uniform(0.02, 0.4),
            seed=int(rng.integers(4096)),
            grain=0.1 * (number % 2),
        ).row()
        for number in range(12)
    ]
    material = np.array(rows, np.float32)
    assert material.shape[1] == M_COLUMNS
    part, longest = rng.integers(len(rows), size=count, dtype=np.int32), rng.integers(3, size=len(rows))
    half = rng.uniform(0.1, 2, (2, count)).astype(np.float32)
    uv = (half * rng.uniform(-1, 1, (2, count))).astype(np.float32)
    local = rng.uniform(-2, 2, (3, count)).astype(np.float32)
    footprint = rng.uniform(1e-4, 0.05, count).astype(np.float32)
    columns = local.T, uv.T, half.T, longest[part], footprint, material[part]
    expected = albedo(Surface(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))).numpy().T
    found = np.empty((3, count), np.float32)
    table, volume = (tensor.numpy() for tensor in tables("cpu"))
    face = np.concatenate([uv, half])
    patterns.albedo(part, local, face, footprint, longest, material, table, volume[0], found)
    change = np.abs(expected - found).max(0)
    assert np.median(change) < 3e-5
    assert (change < 5e-4).mean() >= 0.998  # the rest lie on the border of a cell


def test_choice_of_the_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, by_torch, by_numba = (RoomsConfig(renderer=name) for name in ("auto", "torch", "numba"))
    assert [config.on("cpu").renderer for config in (auto, by_torch, by_numba)] == ["numba", "torch", "numba"]
    assert [config.on("cuda").renderer for config in (auto, by_torch, by_numba)] == ["torch", "torch", "numba"]
    assert auto.digest() == by_numba.digest() != by_torch.digest()
    # What caches and checkpoints of before hold, when there was no other renderer.
    assert by_torch.digest() == "40b21f9c001199a7ee9fc3e01f8ae05de643fd2220ce20b13d8658780c30f09b"
    monkeypatch.setattr(generator, "_has_numba", lambda: False)
    assert auto.on("cpu").renderer == "torch"
    assert auto.digest() == by_torch.digest()


def test_numba_is_asked_for_by_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_has_numba", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    with pytest.raises(MissingDependency, match=r"geo_pretrain\[fast\]"):
        RoomGenerator(RoomsConfig(renderer="numba"))
    with pytest.raises(RecipeError, match="Nearest: 'torch'"):
        RoomsConfig(renderer="trch")


def test_code_is_kept_beside_the_sources_or_where_numba_is_told() -> None:
    """The cache looks at one file only, so a helper must lie beside its caller."""
    folder = Path(casting.__file__).parent
    for path in folder.glob("*.py"):
        for line in path.read_text().splitlines():
            if "from geo_pretrain.rooms.compiled." in line and path.name != "renderer.py":
                assert ".jit import" in line, (path.name, line)
