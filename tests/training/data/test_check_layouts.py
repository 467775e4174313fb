"""`data check` on every layout of folders, in its true format: right ones pass, wrong readings are named and mended."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from geo_pretrain.training.data.check.report import Level
from geo_pretrain.training.data.check.source import quick_check, stop_if_wrong
from geo_pretrain.training.data.shard_files import write_shards
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import DataSpec
from tests.dataset_layouts import ALL_LAYOUTS, NAMES
from tests.recording_layouts import RIGHT, WRONG, golden_frames

TOPICS = {"inverted": "poses", "flipped": "poses", "depth": "depth scale"}


def checked(layout, path, **options):
    spec = DataSpec(source=layout.split()[0], path=str(path), options=options)
    return quick_check(open_source(spec), spec)


@pytest.fixture(scope="module")
def frames():
    return golden_frames(size=(60, 80))


@pytest.mark.parametrize("layout", NAMES)
def test_right_recordings_pass(layout, frames, tmp_path):
    report = checked(layout, ALL_LAYOUTS[layout](tmp_path, frames, RIGHT))
    assert {finding.topic: finding.level for finding in report.findings} == {
        "frames": Level.OK, "intrinsics": Level.OK, "poses": Level.OK, "depth scale": Level.OK
    }  # fmt: skip
    assert not stop_if_wrong(report)


@pytest.mark.parametrize("twin", WRONG)
@pytest.mark.parametrize("layout", NAMES)
def test_wrong_readings_are_named_and_the_suggested_options_mend_them(layout, twin, frames, tmp_path):
    path = ALL_LAYOUTS[layout](tmp_path, frames, WRONG[twin])
    report = checked(layout, path)
    assert {finding.topic for finding in report.at(Level.WRONG)} == {TOPICS[twin]}
    mended = checked(layout, path, **report.options)
    assert mended.level == Level.OK, mended.findings
    assert mended.fits.as_read.agreement > 1.3 * report.fits.as_read.agreement


def test_sparse_depth_tells_as_much_as_dense_depth(tmp_path):
    """A laser's: one pixel in six. What lands between the points says nothing."""
    rng = np.random.default_rng(0)
    frames = [
        replace(frame, depth=np.where(rng.random(frame.depth.shape) < 0.16, frame.depth, 0).astype(np.float32))
        for frame in golden_frames()
    ]
    right = checked("kitti", ALL_LAYOUTS["kitti"](tmp_path / "right", frames, RIGHT))
    assert right.level == Level.OK, right.findings
    wrong = checked("kitti", ALL_LAYOUTS["kitti"](tmp_path / "wrong", frames, WRONG["inverted"]))
    assert wrong.options == {"pose_convention": "world_to_camera"}
    assert wrong.fits.best.agreement > 0.5 > 0.2 > wrong.fits.as_read.agreement


def test_the_unit_that_shards_state_is_the_one_that_is_mended(frames, tmp_path):
    """Frames in millimeters, written as if 5000 were a meter: the option overrules what each frame says."""
    spec = DataSpec(source="folder", path=str(ALL_LAYOUTS["folder"](tmp_path / "plain", frames, RIGHT)))
    write_shards(open_source(replace(spec, options={"depth_scale": 5000})), tmp_path / "shards")
    report = checked("shards", tmp_path / "shards")
    assert report.options == {"depth_scale": 1000.0}
    assert checked("shards", tmp_path / "shards", **report.options).level == Level.OK
