"""Recordings for the Rerun viewer: a stand-in notes what it is given; the library itself is used where it is."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from geo_pretrain.errors import MissingDependency, RecipeError
from geo_pretrain.training.visualize.points import visualize_points, write_recording
from geo_pretrain.training.visualize.rerun_file import check_rerun


def stand_in(notes: list) -> SimpleNamespace:
    def recording(name):
        return SimpleNamespace(
            save=lambda path: open(path, "wb").write(b"RRF2"),
            log=lambda entity, what, **how: notes.append((entity, what, how)),
            set_time=lambda line, sequence: notes.append((line, sequence, {})),
            flush=lambda: None,
            disconnect=lambda: None,
        )

    def archetype(name):
        return lambda *values, **named: (name, values, named)

    kinds = {name: archetype(name) for name in ("Points3D", "Transform3D", "Pinhole", "Image", "DepthImage")}
    return SimpleNamespace(RecordingStream=recording, ViewCoordinates=SimpleNamespace(RIGHT_HAND_Z_UP="z up"), **kinds)


def test_without_the_library_the_install_line_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[rerun\]'"):
        check_rerun(tmp_path / "x.rrd")
    with pytest.raises(RecipeError, match=r"'x\.ply'; accepted: names that end in \.rrd"):
        check_rerun(tmp_path / "x.ply")


def test_points_and_cameras_are_recorded(monkeypatch, tmp_path, cloud_folder, source, spec):
    notes: list = []
    monkeypatch.setitem(sys.modules, "rerun", stand_in(notes))
    cloud = visualize_points(cloud_folder, spec, tmp_path / "p.ply", limit=50)
    write_recording(cloud, tmp_path / "p.rrd")
    assert (tmp_path / "p.rrd").read_bytes() == b"RRF2"
    logged = {entity: what for entity, what, _ in notes}
    assert list(logged)[:3] == ["world", "world/points/cloud", "world/points/colors"]
    name, (points,), named = logged["world/points/cloud"]
    assert name == "Points3D"
    assert np.array_equal(points, cloud.points)
    assert np.array_equal(named["colors"], cloud.layers[0][1])
    ids = source.frame_ids(source.scenes()[0])
    assert [number for line, number, _ in notes if line == "frame"] == list(range(len(ids)))
    last = source.load(source.scenes()[0], ids[-1])
    assert np.allclose(logged["world/camera"][2]["translation"], last.cam_to_world[:3, 3])
    assert logged["world/camera/image"][2]["width"] == spec.size[1]
    assert logged["world/camera/image/color"][1][0].shape == (*spec.size, 3)


def test_the_library_takes_it(tmp_path, cloud_folder, spec):
    pytest.importorskip("rerun", reason="extra `rerun` is not installed")
    cloud = visualize_points(cloud_folder, spec, tmp_path / "p.ply", limit=50)
    write_recording(cloud, tmp_path / "p.rrd")
    assert (tmp_path / "p.rrd").read_bytes()[:3] == b"RRF"
