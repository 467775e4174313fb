"""`data check`: readings that are wrong are named, each by a twin of a recording; what is right is left alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import DataError, UnknownName
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.check import conventions, findings
from geo_pretrain.training.data.check.conventions import (
    AS_READ,
    CONVENTIONS,
    FLIP,
    Convention,
    View,
    try_conventions,
)
from geo_pretrain.training.data.check.registration import Registration, find_registration
from geo_pretrain.training.data.check.report import Level, Report
from geo_pretrain.training.data.check.sample import FULL, QUICK, load_sample, turn
from geo_pretrain.training.data.check.source import Reread, check_source, quick_check, stop_if_wrong, with_registration
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.sources.conventions import read_registration
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.sources.scannet import ScanNet
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes, SevenScenesConfig
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.check import draw_check
from tests.scannet_layout import write_scannet

SPEC = DataSpec(source="seven_scenes", path="here")
GL_BACKWARDS = {"pose_convention": "world_to_camera", "camera_axes": "opengl"}
TWINS = {  # what a recorder did otherwise -> the options that say so
    "inverse": (np.linalg.inv, 1, {"pose_convention": "world_to_camera"}),
    "opengl": (lambda pose: pose @ FLIP, 1, {"camera_axes": "opengl"}),
    "inverse opengl": (lambda pose: np.linalg.inv(pose @ FLIP), 1, GL_BACKWARDS),
    "depth times five": (lambda pose: pose, 5, {"depth_scale": 5000.0}),
    "poses in millimeters": (
        lambda pose: np.diag([1e3, 1e3, 1e3, 1]) @ pose @ np.diag([1e-3, 1e-3, 1e-3, 1]),
        1,
        {"pose_scale": 1000.0},
    ),
    "all at once": (lambda pose: np.linalg.inv(pose @ FLIP), 5, {**GL_BACKWARDS, "depth_scale": 5000.0}),
}


def write_twin(files, change, factor):
    """Rewrite the poses and depths of a recording, in any layout."""
    for path in files.rglob("*.txt"):
        if path.parent.name == "pose" or path.name.endswith(".pose.txt"):
            pose = np.loadtxt(path)
            np.savetxt(path, change(pose) if np.isfinite(pose).all() else pose)
    if factor != 1:
        for path in [*files.rglob("*.depth.png"), *files.rglob("depth/*.png")]:
            depth = np.asarray(Image.open(path)).astype(np.uint16)
            Image.fromarray(depth * np.uint16(factor)).save(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, recording):
    root = tmp_path_factory.mktemp("exported")
    write_scannet(root, SevenScenes(recording), lost=())
    return root


def views_of(source):
    scene = source.scenes()[0]
    frames = [source.load(scene, each) for each in source.frame_ids(scene)]
    return [View(frame.depth, frame.intrinsics, frame.cam_to_world) for frame in frames]


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_reading_of_a_recording_is_named_with_the_options_that_mend_it(twin, recording, tmp_path):
    change, factor, options = TWINS[twin]
    shutil.copytree(recording, tmp_path / "twin")
    write_twin(tmp_path / "twin", change, factor)
    report = quick_check(SevenScenes(tmp_path / "twin"), SPEC)
    assert (report.level, report.options) == (Level.WRONG, options)
    assert report.paste() == " ".join(f"--set data.options.{key}={value}" for key, value in options.items())
    assert report.fits.best.difference < 0.01
    with pytest.raises(DataError, match=r"read wrongly(.|\n)*data check seven_scenes:here") as stopped:
        stop_if_wrong(report)
    assert report.paste() in str(stopped.value)


def test_single_frame_tasks_are_stopped_by_the_unit_of_depth_and_not_by_poses(recording, tmp_path):
    shutil.copytree(recording, tmp_path / "twin")
    write_twin(tmp_path / "twin", *TWINS["all at once"][:2])
    report = quick_check(SevenScenes(tmp_path / "twin"), replace(SPEC, units="frames"))
    assert report.options == {"depth_scale": 5000.0}
    with pytest.raises(DataError, match="depth is 5 times what the poses say"):
        stop_if_wrong(report)


@pytest.mark.parametrize("twin", ["inverse", "opengl", "depth times five"])
def test_a_wrong_reading_of_exported_scans_is_named(twin, exported, tmp_path):
    change, factor, options = TWINS[twin]
    shutil.copytree(exported, tmp_path / "twin")
    write_twin(tmp_path / "twin", change, factor)
    report = quick_check(ScanNet(tmp_path / "twin"), replace(SPEC, source="scannet"))
    assert (report.level, report.options) == (Level.WRONG, options)


def test_right_recordings_pass(recording, exported, tmp_path):
    rooms = Rooms(RoomsConfig(scenes=1, frames=4, width=64, height=64), cache="none", cache_dir=tmp_path)
    for source in (ScanNet(exported), rooms):
        report = quick_check(source, SPEC)
        topics = {finding.topic: finding.level for finding in report.findings}
        assert topics["poses"] == topics["depth scale"] == topics["frames"] == Level.OK, report.findings
        assert not report.options
        assert not stop_if_wrong(report)


class TwoScenes:
    """A recording twice; the depth of the second is `factor` times as large. Without poses: at one place."""

    name = "two"

    def __init__(self, source, factor, posed=True):
        self.inner, self.factor, self.posed = source, factor, posed

    def scenes(self):
        return ["first", "second"]

    def frame_ids(self, scene):
        return self.inner.frame_ids(self.inner.scenes()[0])

    def load(self, scene, frame_id):
        frame = self.inner.load(self.inner.scenes()[0], frame_id)
        depth = frame.depth * np.float32(self.factor if scene == "second" else 1)
        pose = frame.cam_to_world if self.posed else np.eye(4)
        return replace(frame, scene=scene, depth=depth, cam_to_world=pose)

    def fingerprint(self):
        return "two"


def test_scenes_of_different_units_are_named(recording):
    source = SevenScenes(recording)
    for check in (quick_check, check_source):
        found = {one.topic: one for one in check(TwoScenes(source, 5), SPEC).findings}["scenes"]
        assert found.level == Level.DOUBTFUL
        assert found.text.endswith("check them apart. second: depth is 5 times what its poses say")
        assert not found.options
    for factor, posed, count in ((1, True, 0), (5, False, 0), (1000, False, 1)):
        topics = [one.topic for one in quick_check(TwoScenes(source, factor, posed), SPEC).findings]
        assert topics.count("scenes") == count


def test_agreement_equals_a_loop_over_points(recording):
    views = views_of(SevenScenes(recording))[:2]
    rounds = conventions._Rounds(views, [(0, 1)])
    points, valid = conventions._points(views[0])
    for convention in CONVENTIONS:
        poses = [convention.apply(view.pose) for view in views]
        hits, gaps = 0, []
        for point in points[valid]:
            x, y, z = (np.linalg.inv(poses[1]) @ poses[0] @ np.array([*(2 * point), 1]))[:3]
            k = views[1].intrinsics
            u, v = (round(float(value)) for value in (k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]))
            height, width = views[1].depth.shape
            if z > 0 and 0 <= u < width and 0 <= v < height and views[1].depth[v, u] > 0:
                there = 2 * views[1].depth[v, u]
                gaps.append(abs(z - there))
                hits += abs(z - there) < conventions.TOLERANCE * there
        fit = rounds.fit(convention, 2.0, np.array([True]))
        assert fit.agreement == pytest.approx(hits / valid.sum(), abs=0.01)
        if len(gaps) >= conventions.FEWEST:
            assert fit.difference == pytest.approx(np.median(gaps), abs=0.01)


def test_a_camera_that_stands_still_tells_nothing(recording):
    view = views_of(SevenScenes(recording))[0]
    fits = try_conventions([view, view, view], [(0, 1), (0, 2)])
    assert (fits.pairs, fits.fits_as_read, fits.as_read.agreement) == (0, True, 1.0)
    assert findings.of_poses(SevenScenes(recording), fits, True).level == Level.UNKNOWN
    assert try_conventions([view], []) is None


def test_suggested_options_undo_the_reading_whatever_is_in_force():
    """Every convention of files, read under every convention, comes to the same relative pose under the suggestion."""
    rng = np.random.default_rng(0)
    true = [np.eye(4), np.eye(4)]
    for pose in true:
        pose[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        pose[:3, :3] *= np.linalg.det(pose[:3, :3])
        pose[:3, 3] = rng.normal(size=3)
    names = ("camera_to_world", "world_to_camera"), ("opencv", "opengl")

    def read(stored, options):
        pose = np.linalg.inv(stored) if options["pose_convention"] == "world_to_camera" else stored
        return pose @ FLIP if options["camera_axes"] == "opengl" else pose

    def relative(poses):
        return np.linalg.solve(poses[1], poses[0])

    every = [{"pose_convention": a, "camera_axes": b} for a in names[0] for b in names[1]]
    for written in every:
        stored = [np.linalg.inv(read(np.linalg.inv(pose), {**written, "camera_axes": "opencv"})) for pose in true]
        stored = [pose @ FLIP if written["camera_axes"] == "opengl" else pose for pose in true]
        stored = [np.linalg.inv(pose) if written["pose_convention"] == "world_to_camera" else pose for pose in stored]
        for now in every:
            as_read = [read(pose, now) for pose in stored]
            best = next(c for c in CONVENTIONS if np.allclose(relative([c.apply(p) for p in as_read]), relative(true)))
            fit = conventions.Fit(best, 1.0, 1.0, 0.0)
            mended = {**now, **findings._pose_options(now, fit)}
            assert np.allclose(relative([read(pose, mended) for pose in stored]), relative(true))


def painted(shift, scale=1.0):
    """Squares before a wall, whose colors are moved and scaled against their depths."""
    rng = np.random.default_rng(3)
    frames = []
    for number in range(3):
        depth, color = np.full((150, 200), 3.0, np.float32), np.full((150, 200, 3), 90, np.uint8)
        for _ in range(6):
            x, y = rng.integers(30, 150), rng.integers(30, 100)
            depth[y : y + 20, x : x + 25] = 1.5
            middle = np.array([99.5, 74.5])
            left, top = np.rint((np.array([x, y]) - middle) * scale + middle + shift).astype(int)
            color[top : top + round(20 * scale), left : left + round(25 * scale)] = rng.integers(120, 255, 3)
        frames.append(Frame("s", str(number), color, depth, np.eye(3), np.eye(4)))
    return frames


@pytest.mark.parametrize("shift, scale", [((0, 0), 1.0), ((7, -4), 1.0), ((-3, 2), 0.88)])
def test_registration_is_measured_to_a_pixel(shift, scale):
    found = find_registration(painted(shift, scale))
    assert found.scale == pytest.approx(scale, abs=0.021)
    assert found.offset == pytest.approx(shift, abs=1.5)
    assert found.is_registered == (shift == (0, 0))


def test_a_registration_that_is_missing_is_written_and_mends_the_frames(recording, tmp_path):
    """Depth pixels p lie at s p + t of color, which another camera at the same place sees so."""
    source, path = SevenScenes(recording), tmp_path / "r.json"
    frame = source.load(source.scenes()[0], source.frame_ids(source.scenes()[0])[0])
    height, width = frame.depth.shape
    found = Registration(0.1, 0.8, 0.9, (-4.0, 2.0), 20.0, width)
    finding = findings.of_registration(source, found, [frame])
    report = with_registration(Report(SPEC, (finding,), load_sample(source, QUICK)), path)
    assert report.paste() == f"--set data.options.registration={path}"
    color, depth_to_color = read_registration(path)
    assert np.array_equal(depth_to_color, np.eye(4))
    corner = np.array([[0.0, 0, 1], [width - 1, height - 1, 1]]) @ np.linalg.inv(frame.intrinsics).T @ color.T
    middle = (np.array([width, height]) - 1) / 2
    wanted = (np.array([[0, 0], [width - 1, height - 1]]) - middle) * 0.9 + middle + [-4, 2]
    assert np.abs(corner[:, :2] / corner[:, 2:] - wanted).max() < 0.01
    assert not findings.of_registration(Rooms.__new__(Rooms), found, [frame]).numbers.get("registration")


def test_float_depth_is_suggested_to_be_in_meters(tmp_path):
    write_folder_frames(tmp_path)
    report = check_source(open_source(DataSpec("folder", str(tmp_path))), SPEC)
    assert report.paste() == "--set data.options.depth_scale=1.0"
    assert "none of 2 could be read: depth is in float" in report.findings[0].text


def write_folder_frames(root):
    """The plain layout with depth in float."""
    for name in ("color", "depth"):
        (root / name).mkdir()
    for number in range(2):
        Image.new("RGB", (32, 24)).save(root / "color" / f"{number}.png")
        np.save(root / "depth" / f"{number}.npy", np.ones((24, 32), np.float32))
    (root / "intrinsics.txt").write_text("30 30 15.5 11.5\n")
    (root / "poses.txt").write_text("\n".join(["1 0 0 0 0 1 0 0 0 0 1 0"] * 2))


def test_a_folder_given_without_its_source_is_told_with_the_layout_that_fits(tmp_path, exported):
    write_folder_frames(tmp_path)
    for path, source in ((tmp_path, "folder"), (exported, "scannet")):
        with pytest.raises(UnknownName, match=f"data are SOURCE:PATH. Did you mean {source}:{path}\\?"):
            open_source(DataSpec(str(path)))


def test_registration_is_unknown_without_edges():
    flat = [replace(frame, depth=np.full_like(frame.depth, 2)) for frame in painted((0, 0))]
    assert find_registration(flat) is None
    assert find_registration([]) is None


@pytest.mark.parametrize(
    "matrix, level, suggested",
    [
        ([[585, 0, 319.5], [0, 585, 239.5], [0, 0, 1]], Level.OK, None),
        ([[1170, 0, 639.5], [0, 1170, 479.5], [0, 0, 1]], Level.WRONG, [585.0, 585.0, 319.5, 239.5]),
        ([[585, 0, 400], [0, 585, 180], [0, 0, 1]], Level.DOUBTFUL, None),
        ([[40, 0, 319.5], [0, 40, 239.5], [0, 0, 1]], Level.DOUBTFUL, None),
        ([[585, 0, 319.5], [0, 300, 239.5], [0, 0, 1]], Level.DOUBTFUL, None),
    ],
)
def test_intrinsics_are_judged(matrix, level, suggested):
    blank = np.zeros((480, 640), np.float32)
    frame = Frame("s", "0", np.zeros((480, 640, 3), np.uint8), blank, np.array(matrix, float), np.eye(4))
    finding = findings.of_intrinsics([frame])
    assert finding.level == level
    assert finding.options.get("intrinsics") == suggested


def test_a_source_without_a_readable_frame_is_wrong_and_says_why(recording, tmp_path):
    shutil.copytree(recording, tmp_path / "twin")
    for path in (tmp_path / "twin").glob("*.pose.txt"):
        np.savetxt(path, np.full((4, 4), np.nan))
    report = check_source(SevenScenes(tmp_path / "twin"), SPEC)
    assert report.level == Level.WRONG
    assert "none of 6 could be read: pose is not finite" in report.findings[0].text
    assert not stop_if_wrong(report)  # mining tells it
    with pytest.raises(DataError, match="none could be read"):
        draw_check(report, tmp_path / "x.png")


def test_samples_are_few_and_neighbors_are_compared():
    class Many:
        name = "many"

        def scenes(self):
            return [f"s{number:02d}" for number in range(40)]

        def frame_ids(self, scene):
            return [str(number) for number in range(500)]

        def load(self, scene, frame_id):
            pose = np.eye(4)
            pose[0, 3] = int(frame_id)
            return Frame(scene, frame_id, np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.float32), np.eye(3), pose)

    full, quick = load_sample(Many(), FULL), load_sample(Many(), QUICK)
    assert (full.scenes, full.total, len(full.frames), len(quick.frames)) == (40, 20000, 84, 16)
    gaps = {full.positions[j] - full.positions[i] for i, j in full.pairs}
    assert gaps == {1, 2, 4, 8, 16, 32}
    assert all(full.frames[i].scene == full.frames[j].scene for i, j in full.pairs)


def test_a_turn_is_the_same_for_inverse_poses_and_other_axes():
    angle = np.radians(25)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for one in CONVENTIONS:
        assert turn(one.apply(np.eye(4)), one.apply(turned)) == pytest.approx(25)
    assert Convention() == AS_READ


def test_report_is_plain_data_and_draws_a_picture(recording, tmp_path):
    report = check_source(SevenScenes(recording, SevenScenesConfig(registered=True)), SPEC)
    tree = json.loads(json.dumps(report.to_dict()))
    assert {finding["topic"] for finding in tree["findings"]} == {finding.topic for finding in report.findings}
    # the six views look where they like
    assert {f["topic"]: f["level"] for f in tree["findings"] if f["level"] != "ok"} == {"time order": "doubtful"}
    assert tree["options"] == {}
    assert tree["findings"][-1]["pairs"] == 15
    assert findings.of_registration(SevenScenes(recording), report.registration, []).options == {"registered": True}
    draw_check(report, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 900


@pytest.mark.parametrize("twin", ["all at once", "poses in millimeters"])
def test_frames_read_as_they_fit_best_are_those_of_the_right_recording(twin, recording, tmp_path):
    shutil.copytree(recording, tmp_path / "twin")
    write_twin(tmp_path / "twin", *TWINS[twin][:2])
    source, right = SevenScenes(tmp_path / "twin"), SevenScenes(recording)
    off = twin == "poses in millimeters"
    convention = AS_READ if off else Convention(inverse=True, flipped=True)
    best = conventions.Fit(convention, 1000.0 if off else 0.2, 1.0, 0.0)
    (scene,), (own,) = source.scenes(), right.scenes()
    frames = [Reread(source, best, scaled_poses=off).load(scene, each) for each in source.frame_ids(scene)[:2]]
    wanted = [right.load(own, each) for each in right.frame_ids(own)[:2]]
    np.testing.assert_allclose(frames[1].depth, wanted[1].depth, atol=1e-3)
    np.testing.assert_allclose(
        *(np.linalg.solve(a.cam_to_world, b.cam_to_world) for a, b in (frames, wanted)), atol=1e-5
    )


def test_kinds_of_invalid_depth_are_told_apart(recording, tmp_path):
    shutil.copytree(recording, tmp_path / "twin")
    for path in (tmp_path / "twin").glob("*.depth.png"):
        depth = np.asarray(Image.open(path)).astype(np.uint16)
        depth[:30], depth[30:42] = 0, 65535  # of 120 rows
        Image.fromarray(depth).save(path)
    source = SevenScenes(tmp_path / "twin")
    frames = [source.load("twin", each) for each in source.frame_ids("twin")]
    finding = findings.of_depth(source, frames)
    assert finding.numbers["kinds"]["65535"] == pytest.approx(0.1)
    assert finding.numbers["kinds"]["0"] >= 0.25
    assert finding.numbers["invalid"] == pytest.approx(0.1 + finding.numbers["kinds"]["0"])
    assert "65535 10.0 %" in finding.text


@pytest.mark.parametrize("read, best, options", [
    ((0.36, 0.047), (0.50, 0.064, 1.767), {}),  # of kitchen frames whose focal length was stated 1.54 times too large
    ((0.82, 0.017), (0.86, 0.066, 1 / 5.66), {}),  # of quaternions read in another order
    ((0.10, 0.300), (0.90, 0.010, 1 / 1.767), {"depth_scale": 1770.0}),  # an odd unit, beyond doubt
    ((0.10, 0.300), (0.90, 0.010, 0.2), {"depth_scale": 5000.0}),
])  # fmt: skip
def test_an_odd_factor_on_depth_is_suggested_only_where_it_fits_beyond_doubt(recording, read, best, options):
    source = SevenScenes(recording)
    frames = [source.load(source.scenes()[0], id) for id in source.frame_ids(source.scenes()[0])[:2]]
    fits = [conventions.Fit(AS_READ, scale, share, off) for share, off, scale in ((*read, 1.0), best)]
    found = findings.of_scale(source, conventions.Fits(*fits, (), 9), frames)
    assert found.options == options
    assert ("focal length" in found.text) == (not options)
