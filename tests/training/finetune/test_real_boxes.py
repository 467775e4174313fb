"""Real clouds with boxes (SUN RGB-D, KITTI) from their bytes to a picture: trained, measured, predicted, drawn."""

from __future__ import annotations

import codecs
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from geo_pretrain.training.data.labelled.clouds.sunrgbd3d import CLASSES
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.samples.cloud_boxes import box_rows
from geo_pretrain.training.finetune.registry import (
    backbone_init,
    build_finetune_task,
    load_checked_finetune_recipe,
)
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.geometry3d.boxes import points_in_boxes
from tests.training.data.labelled.test_sunrgbd3d import write_prepared
from tests.training.data.labelled.twins import sample

SMALL = (
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.1}",
    "data.cloud.voxel_size=0.1",
    "data.cloud.points=3000",
    "network.options.start=quiet",
    "network.options.seeds=64",
    "network.options.proposals=32",
    "optim.batch=1",
    "optim.epochs=null",
    "optim.steps=5",
    "optim.milestones=[4]",
    "optim.milestones_in=steps",
    "evaluate.every_epochs=null",
    "evaluate.every_steps=5",
    "workers=0",
)


class Numbers(pickle.Unpickler):
    """The sample's annotation is a pickle: nothing but numpy's numbers is made of it."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        assert module.startswith("numpy")
        return super().find_class(module, name)


def sunrgbd(tmp_path):
    """The sample as VoteNet's preprocessing would leave it."""
    folder = sample("sunrgbd_points")
    points = np.fromfile(folder / "000017.bin", "<f4").reshape(-1, 6)
    with (folder / "sunrgbd_000017_infos.pkl").open("rb") as file:
        objects = Numbers(file).load()["data_list"][0]["instances"]
    boxes = [(*one["bbox_3d"], one["bbox_label_3d"]) for one in objects]
    rows = np.array([[*box[:3], *(length / 2 for length in box[3:6]), -box[6], box[7]] for box in boxes])
    for split in ("train", "val"):
        write_prepared(tmp_path / "data", split, {17: (points, rows)})
    return tmp_path / "data", {}


def kitti(tmp_path):
    path = sample("kitti_object")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("000000\n")
    return path, {"lists": str(tmp_path)}


@pytest.mark.parametrize("name, files", [("sunrgbd3d", sunrgbd), ("kitti_object", kitti)])
def test_a_cloud_is_trained_measured_predicted_and_drawn(name, files, tmp_path):
    path, options = files(tmp_path)
    own = [f"data.source={name}", f"data.path={path}", f"data.options={options}", "network.options.sizes=mean"]
    recipe = load_checked_finetune_recipe("sunrgbd3d_votenet", [*own, *SMALL])
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu")
    assert (result.steps, result.data["data"]["skipped"]) == (5, [])
    assert 0 <= result.score <= 1
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert np.asarray(picture).std() > 10
    source = open_labelled(name, path, "val", task="detection3d", options=options)
    start = backbone_init(recipe, "scratch", {})
    task = build_finetune_task(recipe, start, source.classes, start.contract())
    task.module.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert task.evaluate(source, source.ids()).scores == result.data["last"]["scores"]
    (found,) = task.predict([source.load(source.ids()[0])])
    assert len(found) == len(found.scores) > 0
    assert np.isfinite(found.boxes.centers).all()


def test_boxes_of_sun_rgbd_stand_around_their_objects(tmp_path):
    """Turned the other way round, the bed's box would hold half as many points."""
    path, _ = sunrgbd(tmp_path)
    cloud = open_labelled("sunrgbd3d", path, "train", task="detection3d").load("000017")
    rows, points = box_rows(cloud.boxes), torch.from_numpy(cloud.points)
    bed = CLASSES.index("bed") + 1 == cloud.boxes.classes
    turned = rows.clone()
    turned[:, 6] *= -1
    inside, other = (points_in_boxes(points, boxes).sum(1).numpy()[bed] for boxes in (rows, turned))
    assert inside.sum() > 15_000
    assert other.sum() < 0.6 * inside.sum()
