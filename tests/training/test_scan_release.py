"""A tree in the formats of ScanNet's release goes through check, mining and each pre-training with one command each.

`python -m tests.scan_release FOLDER` writes the tree of 20 scenes for a trial by hand; here are two of them, smaller.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.rooms import CLASSES, RoomGenerator, RoomsConfig
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.pair_files import read_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import DataSpec
from tests import scan_release
from tests.front_door import geo_pretrain

SCENES, FRAMES, SIZE = 2, 3, (64, 80)
SMALL = ("data.size=[48, 56]", "optim.steps=1", "optim.batch=2", "workers=0")
IMAGES = (*SMALL, "model.encoder=resnet18", "model.width=8", "optim.epochs=null")
CLOUDS = ("unet3d.variant=18A", "unet3d.width=8", "unet3d.voxel_size=0.1")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The tree, its mined pairs, and a checkpoint of Pri3D view + geo."""
    root = tmp_path_factory.mktemp("release")
    scan_release.write_release(root / "tree", scenes=SCENES, frames=FRAMES, size=SIZE)
    geo_pretrain("data", "mine", f"scannet:{root / 'tree'}", "--out", root / "pairs", "--overlap", "0.1:1")
    train(root, "pri3d_view_geo_r50", *IMAGES, *CLOUDS, "model.init=scratch")
    return root


def train(root, recipe, *settings, pairs=True):
    given = [part for setting in ("data.overlap=[0.1, 1.0]", *settings) for part in ("--set", setting)]
    mined = ("--pairs", root / "pairs") if pairs else ()
    geo_pretrain("train", recipe, "--data", f"scannet:{root / 'tree'}", *mined, "--out", root / recipe, *given)
    checkpoint = read_checkpoint(root / recipe)
    assert checkpoint.finished
    assert checkpoint.provenance["steps"] == 1
    assert not checkpoint.provenance["skipped"]
    return checkpoint


def test_frames_meshes_and_segments_are_what_was_rendered(release):
    config = RoomsConfig(scenes=SCENES, frames=FRAMES, height=SIZE[0], width=SIZE[1], renderer="auto")
    generator = RoomGenerator(config)
    source = open_source(DataSpec(source="scannet", path=str(release / "tree")))
    assert source.scenes() == ["scene0000_00", "scene0001_00"]
    assert source.frame_ids("scene0001_00") == ["0", "25", "50"]
    arrays, mesh = generator.render("rooms_train_0001"), generator.mesh("rooms_train_0001", scan_release.EDGE)
    frame = source.load("scene0001_00", "50")
    np.testing.assert_allclose(frame.depth, arrays["depth"][2], atol=6e-4)
    np.testing.assert_allclose(frame.cam_to_world, arrays["poses"][2], atol=1e-6)
    np.testing.assert_allclose(frame.intrinsics, arrays["intrinsics"], atol=1e-4)
    assert np.abs(frame.color.astype(int) - arrays["color"][2]).mean() < 5  # JPEG
    np.testing.assert_array_equal(source.vertices("scene0001_00"), mesh.vertices)
    segments = source.segments("scene0001_00", len(mesh.vertices))
    assert len(np.unique(segments)) > 50
    for segment in np.unique(segments)[::17]:
        assert len(np.unique(mesh.instance[segments == segment])) == 1


def test_objects_are_those_of_the_rooms(release):
    scan = open_labelled("scannet3d", release / "tree", "val", task="instances3d").load("scene0001_00")
    generator = RoomGenerator(RoomsConfig(scenes=SCENES, frames=FRAMES))
    mesh = generator.mesh("rooms_train_0001", scan_release.EDGE)
    kinds = {CLASSES[k] for k in np.unique(mesh.semantic)}
    assert {"wall", "floor"} < kinds
    found = {int(k) for k in np.unique(scan.labels) if k}
    wanted = [scan_release.NYU40.get(kind, scan_release.OTHER) for kind in kinds]
    assert 5 < len(found) <= len(set(wanted))
    assert len(np.unique(scan.instances[scan.instances > 0])) > 5


def test_data_check_finds_nothing_wrong(release, tmp_path):
    ended = geo_pretrain("data", "check", f"scannet:{release / 'tree'}", "-o", tmp_path / "check.png", "--json")
    report = json.loads(ended.output)
    assert report["level"] in ("ok", "unknown", "doubtful")
    assert not report["options"]
    assert (tmp_path / "check.png").is_file()


def test_pairs_are_mined_once_a_scene(release):
    spec = DataSpec(source="scannet", path=str(release / "tree"), measure="voxels", overlap=(0.1, 1.0))
    assert sorted(path.name for path in (release / "pairs").glob("*.json")) == [
        "scene0000_00.json",
        "scene0001_00.json",
    ]
    assert len(read_pairs(release / "pairs", open_source(spec), spec, SkippedFrames())) > 2


def test_pri3d_has_both_networks(release):
    assert {"encoder", "decoder", "heads"} <= set(read_checkpoint(release / "pri3d_view_geo_r50").roles)


@pytest.mark.parametrize(
    "recipe, settings",
    [
        ("pointcontrast_nce_srunet34", (*SMALL, *CLOUDS)),
        ("gsc_r50", (*IMAGES, "model.init={view_geo}")),
        ("ppkt_srunet34", (*SMALL, *CLOUDS, "task.teacher={view_geo}")),
    ],
)
def test_each_pretraining_takes_one_command(release, recipe, settings):
    settings = [setting.format(view_geo=release / "pri3d_view_geo_r50") if "{v" in setting else setting
                for setting in settings]  # fmt: skip
    checkpoint = train(release, recipe, *settings, pairs=not recipe.startswith("ppkt"))
    assert checkpoint.provenance["data"]["source"] == "scannet"
    shutil.rmtree(release / recipe)
