"""Rooms written in ScanNet's own layout: what is read back is what the rooms hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.frame import NoSurface, SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.clouds import (
    ChunkPairSamples,
    CloudPairSamples,
    PairCloudConfig,
)
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.sources.scannet import ScanNet, ScanNetConfig
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop_surface
from geo_pretrain.training.data.surfaces.fusing import Surfaces
from geo_pretrain.training.recipe import DataSpec
from tests.scannet_layout import cut, write_scannet

CONFIG = RoomsConfig(scenes=2, frames=5, width=96, height=64)


@pytest.fixture(scope="module")
def rooms():
    return Rooms(CONFIG)


@pytest.fixture(scope="module")
def scans(tmp_path_factory, rooms):
    """(folder, {scan: room}); read-only."""
    root = tmp_path_factory.mktemp("scans")
    return root, write_scannet(root, rooms)


def test_frames_are_the_rooms_own(rooms, scans):
    root, names = scans
    source = ScanNet(root)
    assert source.scenes() == ["scene0000_00", "scene0001_00"]
    assert source.frame_ids("scene0001_00") == ["0", "25", "50", "75", "100"]
    for number, (scan, room) in enumerate(names.items()):
        want = cut(rooms.load(room, "0002"), number)
        frame = source.load(scan, "50")
        np.testing.assert_allclose(frame.depth, want.depth, atol=0.0005001)
        np.testing.assert_allclose(frame.intrinsics, want.intrinsics, atol=1e-6)
        np.testing.assert_allclose(frame.cam_to_world, want.cam_to_world, atol=1e-6)
        assert np.abs(frame.color.astype(int) - want.color).mean() < 4  # JPEG
    centers = [source.load(scan, "50").intrinsics[0, 2] for scan in names]
    assert centers[0] == centers[1] + 3  # each scan has its own camera


def test_lost_tracking_is_a_bad_frame(scans):
    with pytest.raises(BadFrame, match=r"pose.25\.txt: pose is not finite"):
        ScanNet(scans[0]).load("scene0000_00", "25")
    ScanNet(scans[0]).load("scene0001_00", "25")


def test_surface_is_the_mesh_and_lies_on_the_room(rooms, scans):
    root, names = scans
    for scan, room in names.items():
        surface = Surfaces(ScanNet(root)).load(scan)
        mesh = rooms.generator.mesh(room, 0.1)
        assert (surface.points == mesh.vertices).all()
        assert (surface.colors == mesh.colors).all()
        assert surface.points.dtype == np.float32
        assert surface.colors.dtype == np.uint8
    # Chunks of the last one: the mesh and the room's own dense points cover one another.
    frame = ScanNet(root).load(scan, "50")
    box = chunk_box(frame)
    mesh_chunk, dense_chunk = crop_surface(surface, *box), crop_surface(rooms.generator.points(room), *box)
    near, _ = cKDTree(mesh_chunk.points).query(dense_chunk.points)
    assert len(mesh_chunk) > 1000
    assert np.quantile(near, 0.99) < 0.1


def mesh_path(root, scan="scene0000_00"):
    return root / scan / f"{scan}_vh_clean_2.ply"


def test_without_a_mesh_the_frames_are_fused(tmp_path, rooms):
    write_scannet(tmp_path / "scans", rooms, rooms.scenes()[:1], mesh=False)
    source = ScanNet(tmp_path / "scans")
    with pytest.raises(NoSurface, match=r"No mesh .*scene0000_00_vh_clean_2\.ply"):
        source.surface("scene0000_00")
    fused = Surfaces(source, cache_dir=tmp_path).load("scene0000_00")
    near, _ = cKDTree(rooms.generator.points(rooms.scenes()[0], 1000.0).points).query(fused.points)
    assert len(fused) > 10_000
    assert np.quantile(near, 0.99) < 0.06


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda data: data[:-5], None),  # the faces are not needed
        (lambda data: data[:3000], "cut off"),
        (lambda data: data.replace(b"uchar red", b"uchar rot"), "vertices have no red; they have x, y, z, rot"),
        (lambda data: data.replace(b"uchar blue\nproperty uchar alpha", b"ushort blue"), "colors are uint16"),
        (lambda data: data.replace(b"float x", b"int32 x"), r"m from the origin; at most 1e\+07 m are accepted"),
    ],
)
def test_broken_mesh_is_an_error_and_never_replaced_silently(tmp_path, rooms, change, reason):
    write_scannet(tmp_path, rooms, rooms.scenes()[:1], frames=1)
    path = mesh_path(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    if reason is None:
        assert len(Surfaces(ScanNet(tmp_path)).load("scene0000_00")) > 1000
        return
    with pytest.raises(DataError, match=reason) as error:
        Surfaces(ScanNet(tmp_path)).load("scene0000_00")
    assert str(path) in str(error.value)


def test_vertices_must_be_finite(tmp_path, rooms):
    write_scannet(tmp_path, rooms, rooms.scenes()[:1], frames=1)
    path = mesh_path(tmp_path)
    data = bytearray(path.read_bytes())
    start = data.index(b"end_header\n") + 11
    data[start : start + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"coordinates of .* are not finite"):
        Surfaces(ScanNet(tmp_path)).load("scene0000_00")


def test_fingerprint_changes_with_the_mesh(tmp_path, rooms):
    write_scannet(tmp_path, rooms, rooms.scenes()[:1], frames=1)
    before = ScanNet(tmp_path).fingerprint()
    assert before == ScanNet(tmp_path).fingerprint()
    mesh_path(tmp_path).write_bytes(mesh_path(tmp_path).read_bytes() + b"\0")
    longer = ScanNet(tmp_path).fingerprint()
    mesh_path(tmp_path).unlink()
    assert len({before, longer, ScanNet(tmp_path).fingerprint()}) == 3


def test_fingerprint_has_the_options_the_segments_and_the_cameras(tmp_path, rooms):
    write_scannet(tmp_path, rooms, rooms.scenes()[:1], frames=1)
    options = {}, {"constant_intrinsics": True}, {"labels": "label-filt"}, {"instances": "label-filt"}
    prints = [ScanNet(tmp_path, ScanNetConfig(**each)).fingerprint() for each in options]
    mesh_path(tmp_path).with_suffix(".0.010000.segs.json").write_text('{"segIndices": [0]}')
    prints.append(ScanNet(tmp_path).fingerprint())
    (tmp_path / "scene0000_00" / "intrinsic" / "intrinsic_depth.txt").write_text("1 0 0 0")
    prints.append(ScanNet(tmp_path).fingerprint())
    assert len(set(prints)) == 6
    assert ScanNet(tmp_path).fingerprint() == prints[-1]


@pytest.mark.parametrize("measure", ["projective", "match_released_code"])
def test_pairs_and_samples_come_out_of_the_layout(rooms, scans, measure):
    root, _ = scans
    spec = DataSpec(source="scannet", path=str(root), size=(56, 88), overlap=(0.2, 1.0), measure=measure)
    source = open_source(spec)
    skips = SkippedFrames()
    pairs = find_pairs(source, spec, skips=skips)
    assert list(skips.counts()) == ["pose is not finite (tracking was lost)"]
    assert {pair.scene for pair in pairs} == {"scene0000_00", "scene0001_00"}
    clouds = CloudPairSamples.collate(
        [CloudPairSamples(source, pairs, spec, 0, PairCloudConfig())[(0, k)] for k in range(2)]
    )
    assert min(clouds["matches_per_pair"]) > 100
    chunks = ChunkPairSamples.collate(
        [ChunkPairSamples(source, pairs, spec, 0, ImageContract())[(0, k)] for k in range(2)]
    )
    assert chunks["coords1"].shape[1] == 4
    assert chunks["image1"].shape == (2, 3, 56, 88)
    assert torch.bincount(chunks["coords1"][:, 0]).min() > 1000
