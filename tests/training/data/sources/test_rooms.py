"""Rooms as a data set: plausible, varied, repeatable, and a cache that survives what disks and people do."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from geo_pretrain.errors import BadFrame, DataError, RecipeError, UnknownName
from geo_pretrain.rooms import CLASSES, GENERATOR, RoomsConfig
from geo_pretrain.rooms.path import CLEARANCE, clearance
from geo_pretrain.rooms.surface import depth_inside, scene_points
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.sources.registry import open_source, source_note
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.recipe import DataSpec, changes, load_recipe
from geo_pretrain.training.visualize.colors import class_colors, depth_colors
from geo_pretrain.training.visualize.preview import contact_sheet
from tests.forked import Forked

TINY = RoomsConfig(scenes=2, frames=2, width=64, height=64)

# What the generator of this version makes of seed 0: a change of these numbers needs a new GENERATOR version.
GOLDEN_VERSION = "1"
GOLDEN_LAYOUT = "3a86d950f500fa96"
GOLDEN_DEPTH = [2.3123, 2.7151, 1.6532]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Rooms:
    source = Rooms(
        RoomsConfig(scenes=6, frames=6, width=96, height=64), cache_dir=tmp_path_factory.mktemp("rooms") / "cache"
    )
    source.prepare()
    return source


def frames(source: Rooms) -> list[Frame]:
    return [source.load(scene, frame_id) for scene in source.scenes() for frame_id in source.frame_ids(scene)]


def digest(source: Rooms) -> str:
    total = hashlib.sha256()
    for frame in frames(source):
        for array in (frame.color, frame.depth, frame.semantic, frame.instance, frame.cam_to_world, frame.intrinsics):
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def test_frames_are_what_frame_promises(rooms: Rooms) -> None:
    assert rooms.scenes()[0] == "rooms_train_0000"
    assert rooms.frame_ids("rooms_train_0000") == [f"{i:04d}" for i in range(6)]
    everything = frames(rooms)
    assert len(everything) == 36
    for frame in everything:
        assert (frame.color.dtype, frame.color.shape) == (np.uint8, (64, 96, 3))
        assert (frame.depth.dtype, frame.depth.shape) == (np.float32, (64, 96))
        assert frame.semantic is not None
        assert frame.instance is not None
        assert (frame.semantic.dtype, frame.instance.dtype) == (np.int16, np.int32)
        assert frame.depth.min() > 0.05  # closed rooms: every ray ends somewhere
        assert frame.depth.max() < 9
        assert 1 <= frame.semantic.min() <= frame.semantic.max() < len(CLASSES)
        assert frame.instance.min() >= 1
        rotation = frame.cam_to_world[:3, :3]
        assert np.allclose(rotation.T @ rotation, np.eye(3), atol=1e-9)
        assert np.linalg.det(rotation) == pytest.approx(1)
        assert 40 < frame.color.mean() < 215
        assert frame.color.std() > 8


def test_golden_layout_and_depth(rooms: Rooms) -> None:
    assert GENERATOR == GOLDEN_VERSION, "new version: renew GOLDEN_LAYOUT and GOLDEN_DEPTH"
    packed = [rooms.generator.scene(scene) for scene in rooms.scenes()[:3]]
    text = json.dumps([[np.round(s.center, 3).tolist(), s.semantic.tolist()] for s in packed]).replace("-0.0,", "0.0,")
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN_LAYOUT
    means = [float(rooms.load(scene, "0002").depth.mean()) for scene in rooms.scenes()[:3]]
    assert means == pytest.approx(GOLDEN_DEPTH, abs=2e-3)


def test_camera_overlaps_varies_and_keeps_its_distance(rooms: Rooms) -> None:
    shares, pitches = [], []
    for scene in rooms.scenes():
        packed = rooms.generator.scene(scene)
        shots = [rooms.load(scene, frame_id) for frame_id in rooms.frame_ids(scene)]
        eyes = np.array([shot.cam_to_world[:3, 3] for shot in shots])
        assert clearance(packed, eyes).min() > CLEARANCE * 0.85
        assert (eyes[:, 2] > 1.1).all()
        assert (eyes[:, 2] < 1.9).all()
        pitches += [np.degrees(np.arcsin(shot.cam_to_world[2, 2])) for shot in shots]
        assert np.mean([(shot.depth < 0.4).mean() for shot in shots]) < 0.03
        shares += [overlap(a, b) for a, b in itertools.pairwise(shots)]
    assert 0.4 < np.mean(shares) < 0.85
    assert np.mean(np.array(shares) > 0.25) > 0.8
    assert np.std(pitches) > 5
    assert -38 < min(pitches) < max(pitches) < 14


def overlap(a: Frame, b: Frame) -> float:
    """Share of a's pixels whose points b sees too."""
    v, u = (g.ravel() for g in np.mgrid[0 : a.depth.shape[0], 0 : a.depth.shape[1]])
    k = a.intrinsics
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.size)], -1)
    world = (rays * a.depth.reshape(-1, 1)) @ a.cam_to_world[:3, :3].T + a.cam_to_world[:3, 3]
    camera = (world - b.cam_to_world[:3, 3]) @ b.cam_to_world[:3, :3]
    uv = np.rint(camera[:, :2] / np.maximum(camera[:, 2:], 1e-6) * k[0, 0] + k[:2, 2]).astype(int)
    inside = (camera[:, 2] > 0) & (uv >= 0).all(1) & (uv < a.depth.shape[::-1]).all(1)
    x, y = uv[inside].T
    return float((np.abs(b.depth[y, x] - camera[inside, 2]) < 0.05).sum() / u.size)


def test_things_do_not_interpenetrate() -> None:
    """No surface point of one thing is more than 1 cm inside a part of another (rugs lie under feet)."""
    source = Rooms(RoomsConfig(scenes=5, seed=7, difficulty="hard"))
    checked = 0
    for scene in source.scenes():
        packed = source.generator.scene(scene)
        points = scene_points(packed, np.random.default_rng(0), 60.0)
        things = ~np.isin(points.semantic, [CLASSES.index(c) for c in ("wall", "floor", "ceiling", "rug")])
        where, owner = points.points[things].astype(np.float64), points.instance[things]
        for part in range(len(packed.kind) - 6):
            label = CLASSES[packed.semantic[part]]
            if label in ("rug", "wall"):
                continue
            near = np.abs(where - packed.center[part]).max(1) < np.linalg.norm(packed.bound[part])
            other = near & (owner != packed.instance[part])
            if other.any():
                assert depth_inside(packed, where[other], part).max() < 0.01, label
                checked += other.sum()
        low, high = where.min(0), where.max(0)
        assert (low > -packed.size / 2 * (1, 1, 0) - 1e-3).all()
        assert (high < packed.size / (2, 2, 1) + 1e-3).all()
    assert checked > 500


def test_every_thing_rests_on_something() -> None:
    """Nothing floats: just below or behind each thing there is the shell or another thing."""
    source = Rooms(RoomsConfig(scenes=4, seed=9))
    for scene in source.scenes():
        packed = source.generator.scene(scene)
        for box in source.generator.boxes(scene):
            if CLASSES[box.semantic] == "curtain":
                continue  # hangs from a rod that is not modeled, 4 cm off the wall
            corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
            world = (corners * box.size) @ box.rotation.T + box.center
            gap = min(
                world[:, 2].min(),
                packed.size[2] - world[:, 2].max(),
                (packed.size[:2] / 2 - np.abs(world[:, :2])).min(),
            )
            if gap < 0.07:
                continue
            grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 9)] * 2, [-0.5]), -1).reshape(-1, 3)
            under = (grid * box.size) @ box.rotation.T + box.center - (0, 0, 0.004)
            others = [p for p in range(len(packed.kind) - 6) if packed.instance[p] != box.instance]
            assert max(depth_inside(packed, under, part).max() for part in others) > 0, CLASSES[box.semantic]


def test_boxes_hold_their_pixels(rooms: Rooms) -> None:
    for scene in rooms.scenes()[:3]:
        boxes = {box.instance: box for box in rooms.generator.boxes(scene)}
        for frame_id in rooms.frame_ids(scene)[::2]:
            frame = rooms.load(scene, frame_id)
            assert frame.instance is not None
            assert frame.semantic is not None
            v, u = (g.ravel() for g in np.mgrid[0:64, 0:96])
            k = frame.intrinsics
            rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.size)], -1)
            world = (rays * frame.depth.reshape(-1, 1)) @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3]
            for instance in np.unique(frame.instance):
                pixels = frame.instance.ravel() == instance
                labels = np.unique(frame.semantic.ravel()[pixels])
                assert len(labels) == 1
                if instance not in boxes:
                    assert CLASSES[labels[0]] in ("wall", "floor", "ceiling")
                    continue
                box = boxes[instance]
                assert box.semantic == labels[0]
                local = (world[pixels] - box.center) @ box.rotation
                assert (np.abs(local) < box.size / 2 + 2e-3).all()


def test_classes_are_many_and_not_told_by_color() -> None:
    """Mean colors of classes learned in some rooms hardly name the classes of pixels in others."""
    sums, counts, hits, total = np.zeros((2, len(CLASSES), 3)), np.zeros((2, len(CLASSES))), Counter(), Counter()
    seen: set[int] = set()
    samples: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for split in (0, 1):
        source = Rooms(RoomsConfig(scenes=12, frames=1, width=64, height=64, split=("train", "val")[split]))
        for scene in source.scenes():
            arrays = source.generator.render(scene)
            color, label = arrays["color"].reshape(-1, 3)[::2] / 255.0, arrays["semantic"].reshape(-1)[::2]
            seen |= set(np.unique(label).tolist())
            samples[split].append((color, label))
            np.add.at(sums[split], label, color)
            np.add.at(counts[split], label, 1)
    means = sums[0] / np.maximum(counts[0], 1)[:, None]
    known = np.nonzero(counts[0] > 50)[0]
    for color, label in samples[1]:
        guess = known[np.linalg.norm(color[:, None] - means[known], axis=-1).argmin(1)]
        for which in known:
            hits[which] += int(((label == which) & (guess == which)).sum())
            total[which] += int((label == which).sum())
    accuracy = np.mean([hits[c] / total[c] for c in known if total[c] > 50])
    assert len(seen) >= 18
    assert accuracy < 0.2


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, two = Rooms(TINY, cache_dir=tmp_path / "a"), Rooms(TINY, cache_dir=tmp_path / "b")
    one.prepare()
    assert digest(one) == digest(two)  # the second renders on demand
    assert one.fingerprint() == two.fingerprint()
    more = Rooms(replace(TINY, scenes=3), cache_dir=tmp_path / "c")
    assert np.array_equal(
        more.load("rooms_train_0001", "0001").color, one.load("rooms_train_0001", "0001").color
    )  # a scene does not depend on how many there are
    assert more.fingerprint() != one.fingerprint()


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "val"}, {"difficulty": "hard"}, {"depth_noise": True}])
def test_other_configs_other_frames(tmp_path: Path, change: dict[str, object]) -> None:
    small = replace(TINY, scenes=1, frames=1)
    a, b = (Rooms(c, cache_dir=tmp_path / str(i)) for i, c in enumerate((small, replace(small, **change))))  # type: ignore[arg-type]
    first, second = (source.load(source.scenes()[0], "0000") for source in (a, b))
    assert not np.array_equal(first.depth, second.depth)
    assert a.fingerprint() != b.fingerprint()
    assert a.config.digest() != b.config.digest()


ONE = replace(TINY, scenes=1, frames=1)


@pytest.fixture(scope="module")
def one_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one frame, to be copied and harmed."""
    folder = tmp_path_factory.mktemp("one_scene")
    Rooms(ONE, cache_dir=folder).prepare()
    return folder


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "other config", "text"])
def test_damaged_scene_is_rendered_again(tmp_path: Path, one_scene: Path, harm: str) -> None:
    expected = digest(Rooms(ONE, cache_dir=one_scene))
    tmp_path = Path(shutil.copytree(one_scene, tmp_path / "cache"))
    path = next(tmp_path.glob("*.safetensors"))
    intact = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(intact[: len(intact) // 2])
    elif harm == "flipped":
        path.write_bytes(intact[:-5000] + bytes([intact[-5000] ^ 1]) + intact[-4999:])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "text":
        path.write_text("not a scene")
    else:
        other = Rooms(replace(ONE, seed=3), cache_dir=tmp_path / "other")
        other.prepare()
        path.write_bytes(next((tmp_path / "other").glob("*.safetensors")).read_bytes())
    assert digest(Rooms(ONE, cache_dir=tmp_path)) == expected
    assert path.read_bytes() == intact
    listed = json.loads((tmp_path / "manifest.json").read_text())["scenes"]["rooms_train_0000"]
    assert listed["bytes"] == len(intact)
    assert not list(tmp_path.glob(".*"))  # no temporary files stay behind


def test_manifest_and_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    source = Rooms(TINY, cache_dir=tmp_path)
    source.prepare(lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["generator"] == GENERATOR
    assert manifest["config"]["width"] == 64
    assert sorted(manifest["scenes"]) == source.scenes()
    assert all(len(entry["sha256"]) == 64 for entry in manifest["scenes"].values())
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    Rooms(TINY, cache_dir=tmp_path).prepare()
    assert stamps == {
        path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")
    }  # nothing rendered twice


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    both = [Forked(lambda: Rooms(TINY, cache_dir=tmp_path / "shared").prepare()) for _ in range(2)]
    assert [(process.communicate(), process.returncode)[1] for process in both] == [0, 0]
    alone = Rooms(TINY, cache_dir=tmp_path / "alone")
    assert digest(Rooms(TINY, cache_dir=tmp_path / "shared")) == digest(alone)
    assert len(list((tmp_path / "shared").iterdir())) == 3  # two scenes and the manifest


def test_cache_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path))
    assert Rooms(TINY).cache_dir.parent == tmp_path / "rooms"
    assert Rooms(TINY).cache_dir == Rooms(replace(TINY, scenes=5)).cache_dir != Rooms(replace(TINY, seed=1)).cache_dir


def test_unwritable_cache_teaches(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="GEO_PRETRAIN_CACHE"):
        Rooms(TINY, cache_dir=tmp_path / "file" / "cache").prepare()


class Frames(Dataset[np.ndarray]):
    """The colors of a source's frames, for a loader."""

    def __init__(self, source: Rooms) -> None:
        self.source = source
        self.ids = [(scene, frame_id) for scene in source.scenes() for frame_id in source.frame_ids(scene)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.source.load(*self.ids[number]).color


@pytest.mark.parametrize("renderer", ["auto", "torch"])
def test_frames_rendered_beside_training_are_those_of_the_cache(tmp_path: Path, renderer: str) -> None:
    """Without a cache nothing is written, and a loader's workers get the same bytes in any order."""
    config = replace(TINY, renderer=renderer, depth_noise=True)
    kept, free = (Rooms(config, cache_dir=tmp_path / cache, cache=cache) for cache in ("disk", "none"))
    free.prepare()
    assert free.fingerprint() == kept.fingerprint()
    assert digest(free) == digest(kept)
    backwards = list(reversed(range(len(Frames(free)))))
    loader = DataLoader(Frames(free), batch_size=None, sampler=backwards, num_workers=2)
    for number, color in zip(backwards, loader, strict=True):
        assert np.array_equal(color, Frames(kept)[number])
    assert not (tmp_path / "none").exists()


def test_options_say_whether_frames_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path))
    options = {"scenes": 1, "frames": 1, "width": 64, "height": 64, "renderer": "auto"}
    free, kept = (open_source(DataSpec(options={**options, "cache": cache})) for cache in ("none", "disk"))
    assert np.array_equal(free.load("rooms_train_0000", "0000").color, kept.load("rooms_train_0000", "0000").color)
    assert len(list(tmp_path.glob("rooms/*/*.safetensors"))) == 1
    assert source_note(kept) == "Rooms are rendered by numba."
    assert source_note(Rooms(TINY)) == ""
    with pytest.raises(RecipeError, match="Nearest: 'none'"):
        open_source(DataSpec(options={"cache": "non"}))


def test_a_run_goes_on_with_another_cache_or_the_renderer_it_had() -> None:
    """Neither counts as a change of the recipe: data are compared by their fingerprint, which names the renderer."""
    before, now = (
        load_recipe("pri3d_view_r18.rooms_toy", [f"data.options.{option}" for option in options]).to_yaml()
        for options in ((), ("cache=none", "renderer=auto"))
    )
    assert before != now
    assert changes(before, now) == []
    assert Rooms(TINY, cache="none").fingerprint() == Rooms(TINY).fingerprint()
    assert Rooms(replace(TINY, renderer="torch")).fingerprint() != Rooms(replace(TINY, renderer="numba")).fingerprint()


def test_travels_to_workers(tmp_path: Path) -> None:
    source = Rooms(TINY, cache_dir=tmp_path)
    source.prepare(lambda done, total: None)
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.load("rooms_train_0000", "0001").color, source.load("rooms_train_0000", "0001").color)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"width": 100}, "Nearest: 96"),
        ({"height": 8}, "Nearest: 64"),
        ({"difficulty": "hrad"}, "Nearest: 'hard'"),
        ({"split": "test"}, "'train', 'val'"),
        ({"scenes": 0}, "1 to"),
        ({"seed": -1}, "0 to"),
    ],
)
def test_config_errors_teach(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        RoomsConfig(**wrong)  # type: ignore[arg-type]


def test_unknown_names(rooms: Rooms) -> None:
    with pytest.raises(UnknownName, match="rooms_train_0001"):
        rooms.load("rooms_trian_0001", "0000")
    with pytest.raises(UnknownName, match=r"frame '0006'\. Closest"):
        rooms.load("rooms_train_0001", "0006")


def test_depth_noise_is_a_kinects(tmp_path: Path) -> None:
    """Holes at a plausible rate; the error is millimeters near and centimeters far, with no large bias."""
    exact = Rooms(RoomsConfig(scenes=3, frames=1, width=160, height=120), cache_dir=tmp_path / "a")
    noisy = Rooms(replace(exact.config, depth_noise=True), cache_dir=tmp_path / "b")
    pairs = [(a.depth, b.depth) for a, b in zip(frames(exact), frames(noisy), strict=True)]
    assert all(np.array_equal(a.color, b.color) for a, b in zip(frames(exact)[:2], frames(noisy)[:2], strict=True))
    true, seen = (np.concatenate([pair[k].ravel() for pair in pairs]) for k in (0, 1))
    valid = seen > 0
    assert 0.01 < 1 - valid.mean() < 0.3
    error = (seen - true)[valid]
    spread = [np.median(np.abs(error[(true[valid] > a) & (true[valid] < b)])) for a, b in ((0.8, 1.6), (2.6, 4.0))]
    assert 0.0005 < spread[0] < spread[1] < 0.05
    assert abs(np.median(error)) < 0.01


class _Plain:
    """A source without classes, one of whose frames is broken."""

    name = "plain"

    def scenes(self) -> list[str]:
        return ["a", "b"]

    def frame_ids(self, scene: str) -> list[str]:
        return ["0", "1"]

    def load(self, scene: str, frame_id: str) -> Frame:
        if (scene, frame_id) == ("a", "1"):
            raise BadFrame("a/1.png", "broken")
        depth = np.tile(np.linspace(0, 3, 40, dtype=np.float32), (30, 1))
        return Frame(scene, frame_id, np.full((30, 40, 3), 90, np.uint8), depth, np.eye(3), np.eye(4))

    def fingerprint(self) -> str:
        return "0"


def test_contact_sheet(rooms: Rooms, tmp_path: Path) -> None:
    from PIL import Image

    contact_sheet(rooms, tmp_path / "new" / "sheet.png", scenes=2, frames=3)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.size == (3 * (3 * 96 + 4) - 4, 2 * (64 + 4) - 4)
        corner = np.asarray(sheet)[:64, :96]
    assert np.array_equal(corner, rooms.load("rooms_train_0000", "0000").color)
    contact_sheet(_Plain(), tmp_path / "plain.png")
    with Image.open(tmp_path / "plain.png") as sheet:
        assert sheet.size == (2 * (2 * 40 + 4) - 4, 2 * (30 + 4) - 4)


def test_contact_sheet_of_nothing(tmp_path: Path) -> None:
    class Broken(_Plain):
        def load(self, scene: str, frame_id: str) -> Frame:
            raise BadFrame("x", "broken")

    with pytest.raises(DataError, match="no frame that can be shown"):
        contact_sheet(Broken(), tmp_path / "x.png")


def test_colors_of_the_sheet() -> None:
    depth = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    colors = depth_colors(depth).astype(int)
    assert (colors[0, 0] == 0).all()
    assert colors[0, 1].sum() > colors[1, 0].sum() > colors[1, 1].sum()
    assert (depth_colors(np.zeros((2, 2), np.float32)) == 0).all()
    table = class_colors(np.arange(len(CLASSES), dtype=np.int16)[None])[0]
    assert len({tuple(color) for color in table}) == len(CLASSES)
    assert (class_colors(np.array([[-1, 0]], np.int16)) == 0).all()
