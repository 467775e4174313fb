"""Segmentation as a task: loss and resizing against slow twins, labels that move with images, each quirk, starts."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.finetune.registry import build_finetune_task
from geo_pretrain.training.finetune.segmentation import crop_box, segmentation_loss
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.networks import PretrainedInit

CLASSES = ("ground", "red", "green")
PLAIN = ImageContract(mean=(0, 0, 0), std=(1, 1, 1))


class Squares:
    """Colored squares on a gray ground: class 1 is the ground, 2 red, 3 green, 0 a strip without label."""

    name = "squares"
    classes = CLASSES

    def __init__(self, split="train", count=6, size=(48, 64), broken=None):
        self.split, self.count, self.size, self.broken = split, count, size, broken or {}

    def ids(self):
        return [f"{self.split}{k // 2}/{k}" for k in range(self.count)]

    def scene_of(self, id):
        return id.partition("/")[0]

    def load(self, id):
        rng = np.random.default_rng([int(id.partition("/")[2]), self.split == "val"])
        height, width = self.size
        color = rng.normal(128, 10, (height, width, 3))
        labels = np.ones((height, width), np.uint8)
        for c, rgb in ((2, (220, 40, 40)), (3, (40, 220, 40))):
            i, j = rng.integers(0, height // 2), rng.integers(0, width // 2)
            color[i : i + height // 2, j : j + width // 3] = rgb
            labels[i : i + height // 2, j : j + width // 3] = c
        labels[:2] = 0
        image = color.clip(0, 255).astype(np.uint8)
        return self.broken.get(id, lambda found: found)(LabelledImage(id, image, labels, None))

    def fingerprint(self):
        return f"{self.split} {self.count} {self.size} {sorted(self.broken)}"


def recipe_for(name="scannet_unet_r18", *overrides, toy=True):
    base = ["network.width=8", "data.size=[48, 64]", "optim.batch=2", "optim.steps=4", "evaluate.every_steps=2"]
    base += ["data.options={}", "save_every=1"] if toy else []
    return load_finetune_recipe(name, [*(base[1:] if "unet" not in name else base), *overrides], toy=toy)


def task_for(recipe, backbone="scratch", contract=PLAIN, **where):
    start = PretrainedInit(str(backbone), recipe.network.encoder, recipe.network.width, where)
    return build_finetune_task(recipe, start, CLASSES, contract)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# loss


def slow_upsample(logits, height, width):
    """Bilinear with the corners of both grids in one place, output by output."""
    b, c, h, w = logits.shape
    out = np.zeros((b, c, height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * (h - 1) / (height - 1), j * (w - 1) / (width - 1)
            y0, x0 = min(int(y), h - 2), min(int(x), w - 2)
            dy, dx = y - y0, x - x0
            for oy, ox, share in (
                (0, 0, (1 - dy) * (1 - dx)),
                (0, 1, (1 - dy) * dx),
                (1, 0, dy * (1 - dx)),
                (1, 1, dy * dx),
            ):
                out[:, :, i, j] += share * logits[:, :, y0 + oy, x0 + ox]
    return out


@pytest.mark.parametrize("first", [0, 1])
def test_loss_equals_the_weighted_likelihood_pixel_by_pixel(first):
    torch.manual_seed(first)
    logits, labels = torch.randn(2, 5, 4, 5), torch.randint(0, 5, (2, 9, 11))
    labels[1, :3] = 0
    full = slow_upsample(logits.double().numpy(), 9, 11)
    total = weights = 0.0
    for b in range(2):
        for i in range(9):
            for j in range(11):
                c = int(labels[b, i, j])
                weight = 0 if c == 0 else 1 / (1 + 0.001)
                values = full[b, :, i, j]
                total -= weight * (values[c - first] - math.log(np.exp(values).sum())) if c else 0
                weights += weight
    assert segmentation_loss(logits, labels, first).item() == pytest.approx(total / weights, rel=1e-5)


@pytest.mark.parametrize("first", [0, 1])
def test_batch_without_labels_costs_nothing(first):
    logits = torch.randn(1, 4, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.zeros(1, 8, 8, dtype=torch.long), first)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


# samples


def coded(height=60, width=84):
    """An image whose red channel is its label times 50."""
    labels = np.random.default_rng(0).integers(0, 4, (height // 6, width // 6)).repeat(6, 0).repeat(6, 1)
    image = np.stack([labels * 50, labels * 0, labels * 0], axis=2)
    return LabelledImage("scene/coded", image.astype(np.uint8), labels.astype(np.uint8), None)


AUGMENTS = {
    "none": [],
    "flip": ["data.augment.flip=1"],
    "rotate": ["data.augment.rotate=10"],
    "crop": ["data.augment.crop=[32, 40]"],
    "all": ["data.augment.flip=0.5", "data.augment.rotate=10", "data.augment.crop=[32, 40]"],
}


@pytest.mark.parametrize("overrides", AUGMENTS.values(), ids=AUGMENTS)
def test_labels_move_with_their_image(overrides):
    task = task_for(recipe_for("scannet_unet_r18", "data.resize=nearest", *overrides))
    for seed in range(4):
        sample = task.sample(coded(), generator(seed))
        assert sample["image"].shape == (3, *sample["labels"].shape)
        assert torch.equal((sample["image"][0] * 255 / 50).round().long(), sample["labels"])
        assert sample["labels"].unique().numel() == 4


def test_nearest_takes_the_pixel_under_the_center_and_bilinear_mixes():
    image = coded()
    rows = [int((i + 0.5) * 60 / 48) for i in range(48)]
    columns = [int((j + 0.5) * 84 / 64) for j in range(64)]
    nearest = task_for(recipe_for("scannet_unet_r18", "match_released_code=true")).sample(image, generator())
    mixed = task_for(recipe_for()).sample(image, generator())
    expected = torch.from_numpy(image.semantic[rows][:, columns]).long()
    for sample in (nearest, mixed):
        assert torch.equal(sample["labels"], expected)
    assert torch.equal((nearest["image"][0] * 255).round().long(), expected * 50)
    off = (mixed["image"][0] * 255).round().long() % 50
    assert (off > 0).any()
    assert torch.equal((mixed["image"][0] * 255).round().long()[off == 0].unique(), torch.tensor([0, 50, 100, 150]))


def test_flip_happens_with_its_probability_and_mirrors():
    plain = task_for(recipe_for()).sample(coded(), generator())["labels"]
    task = task_for(recipe_for("scannet_unet_r18", "data.augment.flip=0.3"))
    flipped = [torch.equal(task.sample(coded(), generator(s))["labels"], plain.flip(1)) for s in range(200)]
    assert 0.2 < np.mean(flipped) < 0.4


def test_rotation_is_within_its_range_both_ways_and_uncovers_unlabelled_pixels():
    halves = np.ones((60, 84), np.uint8)
    halves[:, 42:] = 2
    task = task_for(recipe_for("scannet_unet_r18", "data.augment.rotate=10"))
    angles, corners = [], []
    for seed in range(60):
        labels = task.sample(dataclasses.replace(coded(), semantic=halves), generator(seed))["labels"]
        top, bottom = (int((labels[row] == 1).nonzero().max()) for row in (8, 40))
        angles.append(math.degrees(math.atan2(top - bottom, 32)))
        corners.append(bool((labels[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()))
    assert max(map(abs, angles)) < 11.5
    assert max(angles) > 8
    assert min(angles) < -8
    assert np.std(angles) == pytest.approx(10 / math.sqrt(3), abs=1.5), "all angles are equally likely"
    assert any(corners)


def test_blur_touches_the_image_alone():
    sharp = task_for(recipe_for()).sample(coded(), generator())
    blurred = task_for(recipe_for("scannet_unet_r18", "data.augment.blur=1")).sample(coded(), generator())
    assert torch.equal(sharp["labels"], blurred["labels"])
    assert not torch.equal(sharp["image"], blurred["image"])
    assert blurred["image"][0].diff(dim=1).abs().max() < sharp["image"][0].diff(dim=1).abs().max()
    sometimes = task_for(recipe_for("scannet_unet_r18", "data.augment.blur=0.3"))
    touched = [not torch.equal(sometimes.sample(coded(), generator(s))["image"], sharp["image"]) for s in range(200)]
    assert 0.2 < np.mean(touched) < 0.4
    flat = dataclasses.replace(coded(), image=np.full((60, 84, 3), 77, np.uint8))
    task = task_for(recipe_for("scannet_unet_r18", "data.augment.blur=1"))
    assert torch.allclose(task.sample(flat, generator())["image"] * 255, torch.tensor(77.0))


def test_crops_lie_anywhere_or_where_the_released_loader_looks():
    mended = [crop_box((375, 1242), (240, 320), generator(seed), "x", False) for seed in range(400)]
    exact = [crop_box((375, 1242), (240, 320), generator(seed), "x", True) for seed in range(400)]
    for left, top, right, bottom in mended + exact:
        assert (right - left, bottom - top) == (320, 240)
        assert left >= 0 <= top
        assert right <= 1242
        assert bottom <= 375
    assert max(right for _, _, right, _ in exact) <= 480
    assert max(bottom for _, _, _, bottom in exact) <= 360
    assert np.mean([left == 0 for left, *_ in exact]) > 0.4, "centers left of the middle of the crop are moved inside"
    assert max(right for _, _, right, _ in mended) > 1200
    assert max(bottom for *_, bottom in mended) > 370
    lefts = np.array([left for left, *_ in mended])
    assert abs(lefts.mean() - (1242 - 320) / 2) < 60
    assert crop_box((240, 320), (240, 320), generator(), "x", False) == (0, 0, 320, 240)


@pytest.mark.parametrize("exact", [False, True])
def test_image_smaller_than_the_crop_is_named(exact):
    with pytest.raises(BadFrame, match=r"kitti/7: image is 1242x200, smaller than the crop of 320x240"):
        crop_box((200, 1242), (240, 320), generator(), "kitti/7", exact)


def test_images_are_normalized_by_the_contract_of_the_backbone():
    contract = ImageContract(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = np.full((60, 84, 3), 51, np.uint8)
    task = task_for(recipe_for(), contract=contract)
    found = task.sample(dataclasses.replace(coded(), image=image), generator())["image"]
    assert found[:, 3, 3].tolist() == pytest.approx([(0.2 - 0.1) / 0.5, 0.0, (0.2 - 0.3) / 0.7], abs=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"semantic": None}, "scene/coded: image has no labels"),
        ({"semantic": np.ones((60, 80), np.uint8)}, "scene/coded: labels are 80x60, the image is 84x60"),
        ({"semantic": np.full((60, 84), 4, np.uint8)}, r"scene/coded: label 4, accepted are 0 \(ignore\) to 3"),
        ({"semantic": np.full((60, 84), -1, np.int16)}, "scene/coded: label -1"),
        ({"semantic": np.full((60, 84), 257, np.int16)}, "scene/coded: label 257"),
    ],
)
def test_bad_labels_name_the_image_and_the_value(change, message):
    task = task_for(recipe_for())
    bad = dataclasses.replace(coded(), **change)
    with pytest.raises(BadFrame, match=message):
        task.sample(bad, generator())
    source = Squares("val", broken={"val0/1": lambda found: dataclasses.replace(bad, id=found.id)})
    with pytest.raises(BadFrame, match=message.replace("scene/coded", "val0/1")):
        task.evaluate(source, source.ids())


def test_batch_of_different_sizes_is_explained():
    task = task_for(recipe_for("scannet_unet_r18", "data.size=null"))
    samples = [task.sample(coded(height, 84), generator()) for height in (60, 66)]
    with pytest.raises(DataError, match=r"data\.size or data\.augment\.crop"):
        task.collate(samples)


# evaluation


class Fixed(nn.Module):
    """Logits that do not depend on the image: the whole image is of one class, with a runner-up."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        height, width = images.shape[-2:]
        return self.logits.view(1, -1, 1, 1).expand(len(images), -1, height // 2, width // 2), None


def measured(source, logits, *overrides):
    task = task_for(recipe_for("scannet_unet_r18", *overrides))
    task.module = Fixed(logits)
    return task.evaluate(source, source.ids()), task


def test_iou_is_measured_on_the_full_labels_or_on_small_ones():
    source = Squares("val", size=(96, 130))
    labels = [source.load(id).semantic for id in source.ids()]
    mended, _ = measured(source, [0.0, 1.0, 0.0, 0.0])
    exact, _ = measured(source, [0.0, 1.0, 0.0, 0.0], "match_released_code=true")
    other, _ = measured(source, [0.0, 1.0, 0.0, 0.0], "match_released_code=true", "evaluate.size=[32, 33]")
    rows, columns = [int((i + 0.5) * 2) for i in range(48)], [int((j + 0.5) * 130 / 64) for j in range(64)]
    small = [image[rows][:, columns] for image in labels]
    for found, truths in ((mended, labels), (exact, small)):
        counts = [sum(int((truth == c).sum()) for truth in truths) for c in (1, 2, 3)]
        assert [row[1] for row in found.details["confusion"]] == [0, *counts]
        assert found.per_class["iou"]["ground"] == pytest.approx(counts[0] / sum(counts))
        assert found.scores["miou"] == pytest.approx(counts[0] / sum(counts) / 3)
        assert found.scores["accuracy"] == pytest.approx(counts[0] / sum(counts))
    assert np.sum(other.details["confusion"]) < 6 * 32 * 33


def test_pixels_predicted_as_unlabelled():
    source = Squares("val", count=2)
    mended, _ = measured(source, [2.0, 1.0, 0.0, 0.0])
    exact, _ = measured(source, [2.0, 1.0, 0.0, 0.0], "match_released_code=true")
    assert np.sum(mended.details["confusion"], axis=0)[0] == 0
    assert mended.scores["miou"] > 0
    assert np.sum(exact.details["confusion"], axis=0)[1:].sum() == 0
    assert exact.scores["miou"] == 0


def test_absent_classes():
    def ground_alone(found):
        return dataclasses.replace(found, semantic=np.ones_like(found.semantic))

    source = Squares("val", count=1, broken={"val0/0": ground_alone})
    mended, _ = measured(source, [0.0, 1.0, 0.0, 0.0])
    exact, _ = measured(source, [0.0, 1.0, 0.0, 0.0], "match_released_code=true")
    assert mended.scores["miou"] == 1
    assert exact.scores["miou"] == pytest.approx(1 / 3)
    assert mended.per_class["iou"] == {"ground": 1.0, "red": None, "green": None}


def test_protocol_deviations_are_told_one_by_one():
    crop = "data.augment.crop=[32, 32]"
    mended = task_for(recipe_for("scannet_unet_r18", crop)).protocol_deviations()
    exact = task_for(recipe_for("scannet_unet_r18", crop, "match_released_code=true")).protocol_deviations()
    assert mended.keys() == exact.keys()
    assert len(mended) == 5
    assert all(text.endswith("(mended)") for text in mended.values())
    assert all(text.endswith("(as published)") for text in exact.values())
    assert exact["size IoU is measured at"].startswith("64x48")
    chosen = task_for(recipe_for("scannet_unet_r18", "data.resize=nearest")).protocol_deviations()
    assert chosen["image resize"] == "nearest (as published)"


def test_batch_and_mixed_sizes_change_no_number():
    class Mixed(Squares):
        def load(self, id):
            self.size = (48, 64) if int(id[-1]) < 3 else (50, 70)
            return super().load(id)

    source = Mixed("val", count=5)
    found = []
    for batch in (1, 2, 8):
        task = task_for(recipe_for("scannet_unet_r18", "data.size=null", f"evaluate.batch={batch}"))
        found.append(task.evaluate(source, source.ids()))
    assert found[0].details["confusion"] == found[1].details["confusion"] == found[2].details["confusion"]
    assert np.sum(found[0].details["confusion"]) == 3 * 46 * 64 + 2 * 48 * 70
    assert not task.module.training


def test_predictions_are_those_of_the_network_by_hand():
    task = task_for(recipe_for())
    source = Squares("val", count=1, size=(60, 80))
    image = source.load("val0/0")
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(task._sized(image)[0])).permute(2, 0, 1)[None] / 255
        logits = task.module.eval()(pixels)[0]
    full = slow_upsample(logits.numpy().astype(np.float64), 60, 80)[0]
    predicted = full[1:].argmax(0) + 1
    confusion = np.zeros((4, 4), int)
    for t, p in zip(image.semantic.flatten(), predicted.flatten(), strict=True):
        confusion[t, p] += t > 0
    found = np.array(task.evaluate(source, ["val0/0"]).details["confusion"])
    assert np.abs(found - confusion).sum() <= 4, "up to ties of rounding"


def test_no_labelled_pixel_at_all_is_an_error():
    def blank(found):
        return dataclasses.replace(found, semantic=np.zeros_like(found.semantic))

    source = Squares("val", count=1, broken={"val0/0": blank})
    with pytest.raises(DataError, match="No labelled pixel in 1 images of 'squares', split 'val'"):
        task_for(recipe_for()).evaluate(source, source.ids())


def test_picture_has_a_row_an_image(tmp_path):
    from PIL import Image

    source = Squares("val", count=3)
    task = task_for(recipe_for())
    task.draw(source, source.ids()[:1], tmp_path / "one.png")
    task.draw(source, source.ids(), tmp_path / "three.png")
    one, three = (Image.open(tmp_path / name) for name in ("one.png", "three.png"))
    assert one.width == three.width
    assert three.height > 2 * one.height - 100
    colors = np.array(three.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colors, axis=0)) > 50
