"""Whatever axis of a recording's world points up, frames come out with z up."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.training.data.sources.conventions import Conventions
from geo_pretrain.training.data.sources.recording import Recordings
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import DataSpec
from tests.recording_layouts import golden_frames, write_plain
from tests.training.data.sources.test_recordings import TILT, upright


@pytest.mark.parametrize("up", ["x", "-x", "y", "-y", "z", "-z"])
def test_the_axis_of_the_world_that_points_up_becomes_z(up, tmp_path):
    root = write_plain(tmp_path / "a", golden_frames(3, (48, 64)))
    specs = (DataSpec(source="folder", path=str(root), options=options) for options in ({}, {"world_up": up}))
    own, turned = (open_source(spec).load("a", "2") for spec in specs)
    turn = turned.cam_to_world @ np.linalg.inv(own.cam_to_world)
    axis = np.zeros(3)
    axis["xyz".index(up[-1])] = -1 if up[0] == "-" else 1
    np.testing.assert_allclose(turn[:3, :3] @ axis, [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(turn[:3, :3] @ turn[:3, :3].T, np.eye(3), atol=1e-6)
    assert np.linalg.det(turn[:3, :3]) > 0
    assert up not in TILT or np.allclose(turned.cam_to_world, upright(own, up).cam_to_world, atol=1e-6)
    assert (up == "z") == np.allclose(own.cam_to_world, turned.cam_to_world)


def test_what_was_kept_of_another_world_is_not_taken(tmp_path):
    """Surfaces are kept by the fingerprint, which a layout's own world is part of."""
    root = write_plain(tmp_path / "a", golden_frames(2, (48, 64)))
    found = open_source(DataSpec(source="folder", path=str(root)))
    recordings = list(found._recordings.values())
    worlds = [Recordings("folder", root, recordings, Conventions(world_up=up), found.config) for up in ("z", "y", "-y")]
    prints = [one.fingerprint() for one in worlds]
    assert prints[0] == found.fingerprint()
    assert len(set(prints)) == 3
