"""ScanNet's .sens files: codecs, units, the frames that are taken, files that were cut."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.sources.sens import SensFile, index_frames
from tests.recording_layouts import Twin, golden_frames, write_sens
from tests.training.data.sources.test_recordings import assert_is, opened


@pytest.fixture(scope="module")
def frames():
    """Four frames of a recording, 64x48."""
    return golden_frames(4, (48, 64))


@pytest.mark.parametrize("color", [0, 1])
def test_sens_reads_its_other_codecs(color, frames, tmp_path):
    source = opened("scannet", write_sens(tmp_path, frames, color=color))
    np.testing.assert_array_equal(source.load("scene0000_00", "50").color, frames[2].color)


def test_sens_says_the_unit_of_its_depth(frames, tmp_path):
    root = write_sens(tmp_path, frames, Twin(depth=5.0))
    path = root / "scene0000_00" / "scene0000_00.sens"
    path.write_bytes(path.read_bytes().replace(struct.pack("<f", 1000.0), struct.pack("<f", 5000.0), 1))
    source = opened("scannet", root)
    assert_is(source.load("scene0000_00", "50"), frames[2])
    assert source.depth_scale("scene0000_00") == 5000
    as_millimeters = opened("scannet", root, depth_scale=1000).load("scene0000_00", "50").depth
    np.testing.assert_allclose(as_millimeters, frames[2].depth * 5, atol=0.005)


def test_sens_gives_every_25th_frame_or_those_that_are_asked_for(frames, tmp_path):
    root = write_sens(tmp_path, frames, step=2)
    assert opened("scannet", root).frame_ids("scene0000_00") == ["0"]
    source = opened("scannet", root, every=1)
    assert source.frame_ids("scene0000_00") == [str(k) for k in range(7)]
    assert_is(source.load("scene0000_00", "6"), frames[3])
    with pytest.raises(BadFrame, match="frame 5: pose is not finite"):
        source.load("scene0000_00", "5")
    (tmp_path / "list.txt").write_text("scene0000_00\nscene0001_00\n")
    with pytest.raises(DataError, match=r"1 of the 2 scans in .*list\.txt are not in .*: scene0001_00"):
        opened("scannet", root, scans=str(tmp_path / "list.txt"))


def test_a_cut_sens_file_keeps_what_it_holds(frames, tmp_path):
    path = write_sens(tmp_path, frames, step=2) / "scene0000_00" / "scene0000_00.sens"
    whole = index_frames(SensFile(path).header)
    assert len(whole["offsets"]) == 7
    path.write_bytes(path.read_bytes()[: int(whole["offsets"][4]) + 100])
    source = opened("scannet", tmp_path, every=2)
    assert_is(source.load("scene0000_00", "2"), frames[1])
    with pytest.raises(BadFrame, match="frame 4: is missing: the file ends after 4 frames"):
        source.load("scene0000_00", "4")
    path.write_bytes(b"\x05\0\0\0" + path.read_bytes()[4:])
    with pytest.raises(BadFrame, match=r"is no \.sens file of version 4"):
        SensFile(path)
