"""Detection as a task of fine-tuning: samples, losses against torchvision's network, AP, deviations, exact resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.labelled.image import Instances, LabelledImage
from geo_pretrain.training.finetune import load_finetuned
from geo_pretrain.training.finetune.detection import (
    Detection,
    Detections,
    coco_detections,
)
from geo_pretrain.training.finetune.network import FinetunedNetwork
from geo_pretrain.training.finetune.registry import build_finetune_task
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import (
    FinetuneRecipe,
    list_finetune_recipes,
    load_finetune_recipe,
    with_encoder,
)
from geo_pretrain.training.networks import PretrainedInit
from geo_pretrain.training.visualize.results import draw_detections

HEIGHT, WIDTH = 48, 64
CLASSES = ("square", "disc")
SHADES = {1: (220, 60, 30), 2: (20, 90, 230)}


class Shapes:
    """Squares and discs on gray; every fourth image is empty, every fifth has a crowd."""

    name, classes = "shapes", CLASSES

    def __init__(self, split="train", count=6):
        self.split, self.count, self.loads = split, count, 0

    def ids(self):
        return [f"{self.split}{k}" for k in range(self.count)]

    def scene_of(self, id):
        return id

    def fingerprint(self):
        return f"{self.split} {self.count}"

    def load(self, id):
        self.loads += 1
        number = int(id.removeprefix(self.split))
        random = np.random.default_rng([number, len(self.split)])
        pixels = random.integers(100, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        objects = []
        v, u = np.mgrid[:HEIGHT, :WIDTH]
        for label in (1, 2) if number % 4 != 3 else ():
            x, y, r = random.integers(12, 50), random.integers(12, 36), random.integers(7, 11)
            near = (abs(u - x) <= r) & (abs(v - y) <= r) if label == 1 else (u - x) ** 2 + (v - y) ** 2 <= r**2
            pixels[near] = SHADES[label]
            objects.append((near, label, number % 5 == 4 and label == 2))
        return labelled(id, pixels, objects)


def labelled(id, pixels, objects):
    """An image with objects (mask, class, crowd); boxes are tight."""
    masks = np.array([mask for mask, _, _ in objects], bool).reshape(-1, *pixels.shape[:2])
    boxes = [tight(mask) for mask in masks]
    return LabelledImage(
        id,
        pixels,
        None,
        Instances(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array([label for _, label, _ in objects], np.int64),
            masks,
            np.array([crowd for _, _, crowd in objects], bool),
        ),
    )


def tight(mask):
    v, u = np.nonzero(mask)
    return u.min(), v.min(), u.max() + 1, v.max() + 1


def tree(**changes):
    """A recipe that runs in moments; `changes` go into its sections."""
    small: dict[str, Any] = {"anchors": [8, 16, 32, 64, 128], "roi_batch": 8, "proposals": 12, "norm": "encoder"}
    small["width"] = 32  # test_detection_network.py has the 256 channels of torchvision's own
    base = {
        "name": "shapes_mask_rcnn_r18",
        "task": "instances",
        "network": {"kind": "mask_rcnn", "encoder": "resnet18", "options": small},
        "data": {"source": "rooms", "size": None, "augment": {"flip": 0.5, "shorter": [48, 64], "longer": 128}},
        "optim": {"lr": 0.01, "momentum": 0.9, "batch": 2, "steps": 3, "schedule": "multistep", "milestones": [1, 2]},
        "evaluate": {"batch": 2},
        "workers": 0,
    }
    for key, value in changes.items():
        base[key] = merged(base.get(key), value)
    return base


def merged(old, new):
    if not isinstance(new, dict):
        return new
    return {**(old or {}), **{key: merged((old or {}).get(key), value) for key, value in new.items()}}


def recipe(**changes):
    return parse(FinetuneRecipe, tree(**changes), where="test")


def task_of(backbone="scratch", **changes):
    made = recipe(**changes)
    task = build_finetune_task(made, PretrainedInit(backbone, made.network.encoder), CLASSES, ImageContract())
    assert isinstance(task, Detection)
    return task


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- samples --------------------------------------------------------------------------------------------------------


def bare(**changes):
    """A task whose network is never asked: `sample` and `protocol_deviations` do without."""
    made = recipe(**changes)
    return Detection(made, _Nowhere("scratch", made.network.encoder), CLASSES, ImageContract())


class _Nowhere(PretrainedInit):
    def host(self, builder, seed, **options):
        return nn.Identity()


def test_a_sample_is_the_image_and_its_objects_without_crowds():
    image = Shapes(count=6).load("train4")
    sample = bare(data={"augment": {"flip": 0.0}}).sample(image, generator())
    assert sample["image"].dtype == torch.uint8
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), image.image)
    assert sample["labels"].tolist() == [1]  # the disc is a crowd
    assert sample["boxes"].tolist() == [list(map(float, tight(image.instances.masks[0])))]
    assert np.array_equal(sample["masks"].numpy(), image.instances.masks[:1])
    assert "masks" not in bare(task="detection", network={"kind": "faster_rcnn"}).sample(image, generator())


def test_flips_turn_image_boxes_and_masks_together():
    source, task = Shapes(), bare()
    before = source.load("train0")
    flipped = 0
    for seed in range(40):
        sample = task.sample(source.load("train0"), generator(seed))
        mirrored = not np.array_equal(sample["image"].permute(1, 2, 0).numpy(), before.image)
        flipped += mirrored
        for box, mask, original in zip(sample["boxes"], sample["masks"], before.instances.masks, strict=True):
            assert np.array_equal(mask.numpy(), original[:, ::-1] if mirrored else original)
            assert box.tolist() == list(map(float, tight(mask.numpy())))
    assert 10 < flipped < 30
    assert np.array_equal(before.instances.boxes, source.load("train0").instances.boxes)  # not changed in place


def test_what_the_released_input_was(monkeypatch):
    """BGR in 0-255 minus Detectron2's means, not divided; otherwise RGB by the contract."""
    image = Shapes().load("train0")
    options = {"authors_input": "msra", "norm": "frozen", "score_threshold": 0.1, "authors_score_threshold": 0.5}
    task = task_of(match_released_code=True, network={"options": options}, data={"augment": {"flip": 0.0}})
    tensor = task.sample(image, generator())["image"].float() / 255
    theirs = image.image[:, :, ::-1].astype(np.float64) - [103.530, 116.280, 123.675]
    assert np.abs(task.module.transform.normalize(tensor).permute(1, 2, 0).numpy() - theirs).max() < 1e-3

    network, seen = FinetunedNetwork(task, {"recipe": "any"}, Path()), []
    monkeypatch.setattr(task.module, "forward", seen.append)
    network([network.transforms(image.image)])  # is given RGB, as all networks are
    assert torch.equal(seen[0][0].flip(0), torch.from_numpy(image.image.copy()).permute(2, 0, 1) / 255)

    mended = task_of(network={"options": options}, data={"augment": {"flip": 0.0}})
    assert (task.module.roi_heads.score_thresh, mended.module.roi_heads.score_thresh) == (0.5, 0.1)
    tensor = mended.sample(image, generator())["image"].float() / 255
    expected = (image.image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(mended.module.transform.normalize(tensor).permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_the_contract_of_the_backbone_is_the_hosts():
    made = recipe()
    contract = ImageContract(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    transform = Detection(made, PretrainedInit("scratch", "resnet18"), CLASSES, contract).module.transform
    assert (transform.image_mean, transform.image_std) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    with pytest.raises(RecipeError, match=r"channels .*grey"):
        Detection(
            made, PretrainedInit("scratch", "resnet18"), CLASSES, ImageContract(("grey",), mean=(0.5,), std=(0.2,))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": np.array([3, 1])}, "train0: object of class 3, accepted are 1 to 2"),
        ({"classes": np.array([1, 0])}, "object of class 0"),
        ({"masks": np.zeros((2, 9, 9), bool)}, r"masks are \(2, 9, 9\), the image has \(2, 48, 64\)"),
        ({"boxes": np.array([[1, 1, 9, 9], [5, 1, 5, 9]], np.float32)}, r"box \[5.0, 1.0, 5.0, 9.0\]"),
        ({"boxes": np.array([[1, 1, 9, 9], [5, 1, 65, 9]], np.float32)}, "x0 < x1 <= 64 and y0 < y1 <= 48"),
        ({"boxes": np.array([[-1, 1, 9, 9], [5, 1, 6, 9]], np.float32)}, "object with box"),
        ({"boxes": np.array([[np.nan, 1, 9, 9], [5, 1, 6, 9]], np.float32)}, "object with box"),
    ],
)
def test_labels_that_cannot_be_are_named(changes, message):
    image = Shapes().load("train0")
    wrong = dataclasses.replace(image, instances=dataclasses.replace(image.instances, **changes))
    with pytest.raises(BadFrame, match=message):
        bare().sample(wrong, generator())


def test_images_without_labels_of_objects_are_refused():
    image = dataclasses.replace(Shapes().load("train0"), instances=None)
    with pytest.raises(DataError, match="'train0' has no objects; open the data set with task='detection'"):
        bare().sample(image, generator())


def test_empty_images_in_a_batch():
    source = Shapes()
    for exact, kept in ((False, 3), (True, 2)):
        task = bare(match_released_code=exact)
        samples = [task.sample(source.load(id), generator()) for id in ("train3", "train0", "train1")]
        batch = task.collate(samples)
        assert len(batch["images"]) == len(batch["targets"]) == kept
        assert [len(target["labels"]) for target in batch["targets"]][-2:] == [2, 2]
        assert len(task.collate(samples[:1])["images"]) == 1  # something must be trained on


# --- measuring ------------------------------------------------------------------------------------------------------


def knows_the_truth(task, source, monkeypatch, *, wrong_on_empty=False):
    """Replace the network by one that finds every object."""

    def predict(images):
        found = []
        for pixels in images:
            image = next(i for i in map(source.load, source.ids()) if np.array_equal(i.image, pixels))
            kept = ~image.instances.crowd
            boxes, classes, masks = (getattr(image.instances, key)[kept] for key in ("boxes", "classes", "masks"))
            scores = np.full(len(classes), 0.8, np.float32)
            if wrong_on_empty and not len(image.instances):
                boxes, classes, scores = np.array([[1, 1, 9, 9]], np.float32), np.array([1]), np.array([0.9])
                masks = np.ones((1, HEIGHT, WIDTH), bool)
            found.append(Detections(boxes, classes, scores, masks))
        return found

    monkeypatch.setattr(task, "predict", predict)


def test_perfect_predictions_measure_one(monkeypatch):
    source = Shapes("val", 5)
    task = bare()
    knows_the_truth(task, source, monkeypatch)
    evaluation = task.evaluate(source, source.ids())
    assert evaluation.scores == {
        name: pytest.approx(1)
        for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")
    }  # fmt: skip
    assert evaluation.per_class["mask_ap75"] == {"square": pytest.approx(1), "disc": pytest.approx(1)}
    assert evaluation.details == {
        "images": 5, "without_objects_left_out": 0, "detections": 7, "score_threshold": 0.05
    }  # fmt: skip
    json.dumps(evaluation.to_dict())
    assert task.metric == "mask_ap"


def test_images_without_objects_count_unless_released_so(monkeypatch):
    """val3 is empty: what is found there, with the best score of all, is wrong."""
    source = Shapes("val", 4)
    for exact, square in ((False, 3 / 4), (True, 1)):
        task = bare(match_released_code=exact)
        knows_the_truth(task, source, monkeypatch, wrong_on_empty=True)
        evaluation = task.evaluate(source, source.ids())
        # three squares after one mistake: precision 1/2, 2/3, 3/4, and 3/4 is the best from every recall on
        assert evaluation.per_class["box_ap50"]["square"] == pytest.approx(square)
        assert evaluation.details["without_objects_left_out"] == int(exact)
        assert evaluation.details["images"] == 4 - int(exact)


def test_only_the_images_given_are_measured_and_read_once_more_only(monkeypatch):
    source = Shapes("val", 5)
    task = bare()
    knows_the_truth(task, Shapes("val", 5), monkeypatch)
    assert task.evaluate(source, ["val4", "val1"]).details["images"] == 2
    assert source.loads == 4  # the truth, and the images
    evaluation = task.evaluate(source, ["val4", "val1"])
    assert source.loads == 6
    assert evaluation.scores["box_ap"] == pytest.approx(1)
    assert task.evaluate(source, ["val4"]).per_class["box_ap"] == {"square": pytest.approx(1), "disc": None}  # a crowd


def test_an_image_that_cannot_be_read_stops_the_measurement(monkeypatch):
    source = Shapes("val", 3)
    task = bare()
    knows_the_truth(task, Shapes("val", 3), monkeypatch)
    load = source.load

    def broken(id):
        if id == "val1":
            raise BadFrame("val1.png", "annotation is missing")
        return load(id)

    source.load = broken
    with pytest.raises(BadFrame, match=r"val1\.png: annotation is missing"):
        task.evaluate(source, source.ids())


def test_detections_in_cocos_format():
    from pycocotools import mask as coco_mask

    masks = np.zeros((2, HEIGHT, WIDTH), bool)
    masks[0, 3:9, 5:40] = masks[1, 20:, :] = True
    found = Detections(
        np.array([[5, 3, 40, 9], [0, 20, 64, 48]], np.float32), np.array([2, 1]), np.array([0.75, 0.5]), masks
    )
    first, second = coco_detections(found, 17)
    assert {key: first[key] for key in ("image_id", "category_id", "score", "bbox")} == {
        "image_id": 17, "category_id": 2, "score": 0.75, "bbox": [5, 3, 35, 6]
    }  # fmt: skip
    assert second["bbox"] == [0, 20, 64, 28]
    for entry, mask in zip((first, second), masks, strict=True):
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), mask)


# --- pictures and words ---------------------------------------------------------------------------------------------


def test_pictures(tmp_path):
    """Boxes and tints are where the objects are; a weak detection is not drawn."""
    pixels = np.full((100, 160, 3), 255, np.uint8)
    mask = np.zeros((100, 160), bool)
    mask[20:60, 40:80] = True
    image = labelled("a", pixels, [(mask, 2, False)])
    upright = labelled("b", np.full((160, 100, 3), 255, np.uint8), [])
    boxes = np.array([[100, 10, 150, 90], [0, 0, 30, 30]], np.float32)
    right = np.zeros((100, 160), bool)
    right[10:90, 100:150] = True
    found = Detections(boxes, np.array([1, 1]), np.array([0.9, 0.3]), np.stack([right, ~right]))
    nothing = Detections(boxes[:0], np.array([], int), np.array([]), None)
    rows = [(i.image, i.instances, f) for i, f in ((image, found), (upright, nothing))]
    draw_detections(rows, CLASSES, tmp_path / "deep" / "p.png")
    sheet = np.asarray(Image.open(tmp_path / "deep" / "p.png").convert("RGB")).astype(int)
    # cells are 320 wide and high (the second image is upright), the first picture's own height is 200, at the bottom
    left, top = 12, 40 + 320 - 200

    def at(column, x, y):
        return sheet[top + 2 * y, left + column * (320 + 12) + 2 * x].tolist()

    assert at(0, 60, 40) == at(1, 10, 90) == at(2, 60, 40) == at(2, 15, 29) == [255, 255, 255]
    disc, square = at(1, 40, 40), at(2, 100, 50)  # on the outlines
    assert disc != square
    assert at(1, 60, 40) == pytest.approx([(255 + c) / 2 for c in disc], abs=1)
    assert at(2, 125, 60) == pytest.approx([(255 + c) / 2 for c in square], abs=1)
    assert at(2, 0, 15) == [255, 255, 255]


@pytest.mark.parametrize("name", ["scannet_mask_rcnn_r50", "nyuv2_mask_rcnn_r50"])
def test_the_report_says_which_accidents_were_reproduced(name):
    said = {}
    for exact in (False, True):
        made = dataclasses.replace(load_finetune_recipe(name), match_released_code=exact)
        task = Detection(made, _Nowhere("imagenet", 50), CLASSES, ImageContract())
        said[exact] = task.protocol_deviations()
        assert task.setup.score_threshold == (0.5 if exact else 0.05)
    keys = {"images without objects", "score threshold", "input", "place of the stride", "ImageNet weights", "host"}
    assert set(said[True]) == set(said[False]) == keys
    for key in keys - {"ImageNet weights", "host"}:
        assert "as released" in said[True][key]
        assert "(released: " in said[False][key]
    assert "MSRA" in said[True]["ImageNet weights"]


def test_the_coco_protocol_has_none_of_the_inputs_accidents():
    made = dataclasses.replace(load_finetune_recipe("coco_mask_rcnn_r50"), match_released_code=True)
    task = Detection(made, _Nowhere("imagenet", 50), CLASSES, ImageContract())
    assert not task.setup.msra
    assert task.setup.score_threshold == 0.05
    assert set(task.protocol_deviations()) == {"images without objects", "ImageNet weights", "BatchNorm", "host"}


# --- recipes --------------------------------------------------------------------------------------------------------

PAPER = {  # batch, lr, boxes a head is trained on, frozen stages, norm, box head
    "scannet_mask_rcnn_r50": (16, 0.0025, 32, 2, "frozen", "2fc"),
    "nyuv2_mask_rcnn_r50": (2, 0.0025, 32, 2, "frozen", "2fc"),
    "coco_mask_rcnn_r50": (16, 0.02, 512, 0, "everywhere", "4conv1fc"),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_papers(name):
    made = load_finetune_recipe(name)
    batch, lr, rois, freeze, norm, head = PAPER[name]
    task = Detection(made, _Nowhere("scratch", "resnet50"), CLASSES, ImageContract())
    o = made.optim
    assert (o.batch, o.lr, task.setup.options.roi_batch, made.network.freeze) == (batch, lr, rois, freeze)
    assert (task.setup.options.norm, task.setup.options.box_head, made.network.kind, made.network.encoder) == (
        norm, head, "mask_rcnn", "resnet50"
    )  # fmt: skip
    assert (o.momentum, o.dampening, o.weight_decay, o.steps) == (0.9, 0, 1e-4, 90_000)
    assert (o.backbone_factor, o.head_factor, o.clip_norm) == (1, 1, None)
    rates = [o.rate(step, 90_000) / lr for step in (0, 500, 1000, 59_999, 60_000, 79_999, 80_000, 89_999)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert made.data.source == name.partition("_")[0]
    assert (made.data.augment.flip, made.data.augment.shorter, made.data.augment.longer) == (0.5, (640, 800), 1333)
    assert made.data.size is None
    assert task.setup.options.anchors == (32, 64, 128, 256, 512)
    assert task.setup.options.proposals == 1000
    assert not made.match_released_code


def test_every_detection_recipe_has_a_toy():
    names = list_finetune_recipes("instances") + list_finetune_recipes("detection")
    assert set(names) == {*PAPER, "rooms_mask_rcnn_r18", "folder_mask_rcnn"}
    for name in names:
        toy = load_finetune_recipe(name, toy=True)
        assert toy.data.source == "rooms"
        assert (toy.optim.steps, toy.optim.milestones) == (100, (70, 90))
        toy = with_encoder(toy, "resnet50")
        Detection(toy, _Nowhere("scratch", toy.network.encoder), CLASSES, ImageContract())
    boxes = load_finetune_recipe("scannet_mask_rcnn_r50", ["task=detection"], toy=True)
    assert boxes.task == "detection"


# --- a run ----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """What stands for a kill between two saved states."""


def test_a_run_that_was_killed_goes_on_as_if_it_never_was(tmp_path):
    made = dataclasses.replace(recipe(optim={"steps": 2}, evaluate={"images": 2}), save_every=1)
    sources = (Shapes("train", 6), Shapes("val", 4))
    whole = finetune(made, "scratch", tmp_path / "whole", sources=sources, device="cpu")

    def kill(info):
        if info.step == 2:
            raise Killed

    with pytest.raises(Killed):
        finetune(made, "scratch", tmp_path / "killed", sources=sources, device="cpu", on_step=kill)
    again = finetune(made, "scratch", tmp_path / "killed", sources=sources, device="cpu")

    mine, theirs = (load_file(result.folder / "model.safetensors") for result in (again, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    lines = [[json.loads(line) for line in (r.folder / "log.jsonl").read_text().splitlines()] for r in (again, whole)]
    assert lines[0] == lines[1]
    assert [line["lr"] for line in lines[0] if "lr" in line] == pytest.approx([0.01, 0.001])
    assert again.score == whole.score
    assert [e["step"] for e in whole.data["evaluations"]] == [2]
    assert set(whole.per_class("mask_ap50")) == set(CLASSES)
    assert whole.metric == "mask_ap"
    assert whole.data["quirks"]["images without objects"].startswith("are trained on and measured")
    assert Image.open(whole.folder / "predictions.png").size[0] == 3 * (320 + 12) + 12

    loaded = load_finetuned(whole.folder)  # scratch: its norms are not frozen, whatever the recipe says
    assert loaded.evaluate(sources[1], sources[1].ids()[:2]).per_class.keys() == whole.data["last"]["per_class"].keys()
    found, known = loaded.predict([sources[1].load("val0").image])[0], load_file(whole.folder / "model.safetensors")
    assert found.boxes.shape == (len(found), 4)
    assert all(torch.equal(value, known[key]) for key, value in loaded.module.state_dict().items())
