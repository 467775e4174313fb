"""ADE20K's protocol: images of their own sizes, labels at the network's stride; from its folder to PPKD and PPKT."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from geo_pretrain.adapters.torchvision import fcn
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import RecipeError, WeightsMismatch
from geo_pretrain.loading import verify
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.finetune.segmentation import reduced, scaled_size
from geo_pretrain.training.loop import make_finetune_optimizer
from geo_pretrain.training.tasks.csail import SceneParser
from geo_pretrain.training.tasks.teachers import csail_segmenter, finetuned_segmenter
from tests.front_door import geo_pretrain
from tests.labelled_layouts import write_ade20k_image
from tests.training.data.labelled.layouts import picture
from tests.training.finetune.test_segmentation import recipe_for, task_for
from tests.training.tasks.test_ppkt import tiny_batch

SMALL = ("network.encoder=timm/test_resnet", "data.size=null", "data.augment.short_sides=[32, 40]",
         "data.augment.longer=60", "evaluate.short_sides=[32, 48]", "data.augment.flip=0")  # fmt: skip


@pytest.fixture(scope="module")
def small_fcn():
    return task_for(recipe_for("ade20k_fcn_r50", *SMALL))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image_of(height, width):
    rng = np.random.default_rng(height)
    label = rng.integers(0, 4, (height, width)).astype(np.uint8)
    return LabelledImage(f"{height}", rng.integers(0, 255, (height, width, 3)).astype(np.uint8), label, None)


def test_the_shorter_side_gets_the_length_unless_the_longer_becomes_too_long():
    assert scaled_size((683, 512), 300, 1000) == (400, 300)
    assert scaled_size((512, 683), 450, 1000) == (450, 600)
    assert scaled_size((2000, 500), 600, 1000) == (1000, 250)


def test_labels_are_reduced_as_pillow_does():
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 151, (2, 24, 40)).astype(np.uint8))
    for given, found in zip(labels, reduced(labels, 8), strict=True):
        small = Image.fromarray(given.numpy()).resize((5, 3), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(found.numpy(), np.asarray(small))
    assert reduced(labels[:, :21, :33], 8).shape == (2, 3, 5)
    assert reduced(labels[:, :20, :33], 8)[:, 2, 0].tolist() == [0, 0]  # filled up: ignored
    assert reduced(labels, 1) is labels


def test_a_batch_holds_images_of_different_sizes(small_fcn):
    task = small_fcn
    samples = [task.sample(image_of(*size), generator(k)) for k, size in enumerate([(90, 120), (120, 80), (30, 90)])]
    sizes = [tuple(sample["labels"].shape) for sample in samples]
    assert {min(size) for size in sizes[:2]} <= {32, 40}
    assert sizes[2] == (20, 60)
    batch = task.collate(samples)
    height, width = (-(-max(side) // 8) * 8 for side in zip(*sizes, strict=True))
    assert batch["image"].shape == (3, 3, height, width)
    for k, (rows, columns) in enumerate(sizes):
        torch.testing.assert_close(batch["image"][k, :, :rows, :columns], samples[k]["image"])
        for filled in (batch["labels"][k, rows:], batch["labels"][k, :, columns:], batch["image"][k, :, rows:]):
            assert not filled.any()


def test_the_loss_is_that_of_coarse_logits_and_reduced_labels(small_fcn):
    task = small_fcn
    batch = task.collate([task.sample(image_of(50, 70), generator(k)) for k in range(2)])
    task.module.eval()
    logits, _ = task.module(batch["image"])
    network = task.module.network
    torch.testing.assert_close(logits, network.classifier(network.backbone(batch["image"])["out"]))
    small, total, count = batch["labels"][:, 4::8, 4::8], 0.0, 0
    assert logits.shape[-2:] == small.shape[-2:]
    for b, row, column in np.ndindex(*small.shape):
        if small[b, row, column]:
            total -= float(logits.detach()[b, :, row, column].log_softmax(0)[small[b, row, column] - 1])
            count += 1
    assert task.losses(batch)["segmentation"].item() == pytest.approx(total / count, rel=1e-4)


def test_predictions_are_the_mean_over_the_sizes(small_fcn):
    task, image = small_fcn, image_of(60, 45)
    task.module.eval()
    total = 0
    for size in ((32, 48), (48, 64)):  # 32x42 and 45x60 (its longer side is at most 60), in whole cells
        pixels = np.asarray(Image.fromarray(image.image).resize(size, Image.Resampling.BILINEAR))
        with torch.no_grad():
            logits, _ = task.module(task.contract.transforms(resize=False)(pixels)[None])
        total = total + F.interpolate(logits, (60, 45), mode="bilinear", align_corners=False)[0].softmax(0)
    (found,) = task.predict([image.image])
    np.testing.assert_array_equal(found.labels, total.argmax(0).numpy() + 1)
    np.testing.assert_allclose(found.scores, total.max(0)[0].numpy() / 2, rtol=1e-5)
    source = type("One", (), {"load": lambda self, id: image})()
    ((_, truth, guess),) = task.predictions(source, ["60"])
    np.testing.assert_array_equal(guess.numpy(), found.labels)
    np.testing.assert_array_equal(truth.numpy(), image.semantic)


def test_biases_and_norms_do_not_decay(small_fcn):
    groups = small_fcn.parameter_groups()
    optimizer = make_finetune_optimizer(small_fcn.recipe.optim, copy.deepcopy(groups))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0, 1e-4, 0]
    named = {id(parameter): name for name, parameter in small_fcn.module.named_parameters()}
    still = {named[id(p)] for group in groups if group.get("weight_decay") == 0 for p in group["params"]}
    norms = (nn.BatchNorm2d,)
    expected = {f"{name}.{key}" for name, module in small_fcn.module.named_modules() for key in ("weight", "bias")
                if isinstance(module, norms)} | {"network.classifier.4.bias"}  # fmt: skip
    assert still == expected
    assert sum(len(group["params"]) for group in groups) == len(named)
    assert len(task_for(recipe_for("ade20k_fcn_r50", *SMALL, "optim.decay_norms=true")).parameter_groups()) == 2


def test_the_head_is_torchvisions_without_dropout():
    head = fcn("pri3d_view_geo_r18", num_classes=3, pretrained=False, dropout=0.0).classifier
    assert [type(layer).__name__ for layer in head] == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout", "Conv2d"]
    assert head[3].p == 0
    assert fcn("pri3d_view_geo_r18", num_classes=3, pretrained=False).classifier[3].p == 0.1
    with pytest.raises(ValueError, match="dropout is 1; accepted: a number from 0"):
        fcn("pri3d_view_geo_r18", num_classes=3, pretrained=False, dropout=1)


# From the folder of ADE20K to points, with one command each


def settings(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


def test_a_teacher_of_ade20k_teaches_ppkd_and_ppkt(tmp_path, recording):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number in range(1, count + 1):
            size = (40, 56) if number % 2 else (64, 44)
            write_ade20k_image(tmp_path, split, number, *picture(rng, list(range(1, 151)), size)[:2])
    small = settings(*SMALL[0:1], *SMALL[2:5], "optim.steps=2", "optim.batch=2", "evaluate.every_steps=2", "workers=0")
    fcn_run = tmp_path / "fcn"
    geo_pretrain(
        "finetune", "ade20k_fcn_r50", "-b", "scratch", "--data", f"ade20k:{tmp_path}", "--out", fcn_run, *small
    )
    results = json.loads((fcn_run / "results.json").read_text())
    assert (len(results["data"]["classes"]), results["data"]["licence"]) == (150, "LicenseRef-ADE20K-terms")
    assert results["last"]["details"]["images"] == 2
    for layer, chans in (("logits", 150), ("features", 24)):
        teacher = finetuned_segmenter(fcn_run, layer)
        assert teacher(torch.zeros(1, 3, 40, 52)).shape == (1, chans, 5, 7)
        assert teacher.out_chans == chans
    taught = settings(f"task.teacher_file={fcn_run}", "data.size=[48, 64]", "optim.steps=1", "optim.batch=2",
                      "task.matches=64", "unet3d.variant=18A", "unet3d.width=8", "unet3d.voxel_size=0.15",
                      "workers=0")  # fmt: skip
    for recipe in ("ppkd_srunet34", "ppkt_ade_srunet34"):
        out = tmp_path / recipe
        geo_pretrain("train", recipe, "--data", f"seven_scenes:{recording}", "--out", out, *taught)
        checkpoint = read_checkpoint(out)
        assert ("ade20k", "LicenseRef-ADE20K-terms") in checkpoint.license.datasets
        assert "teacher: ade20k_fcn_r50 fine-tuned from scratch" in checkpoint.license.base_model
        assert verify(out).passed
    assert read_checkpoint(tmp_path / "ppkd_srunet34").arch.args["out_chans"] == 150


# Files of ADE20K's authors


def authors_names(decoder):
    """(encoder, decoder) key -> shape of resnet18dilated and a decoder of 150 classes, typed from their classes."""
    encoder, norms = {}, []

    def convolution(name, out, inside, kernel):
        encoder[f"{name}.weight"] = (out, inside, kernel, kernel)

    for k, (out, inside) in enumerate([(64, 3), (64, 64), (128, 64)], 1):
        convolution(f"conv{k}", out, inside, 3)
        norms.append((f"bn{k}", out))
    inside = 128
    for layer, out in enumerate([64, 128, 256, 512], 1):
        for block in range(2):
            for k in (1, 2):
                convolution(f"layer{layer}.{block}.conv{k}", out, inside if k == 1 else out, 3)
                norms.append((f"layer{layer}.{block}.bn{k}", out))
            if inside != out:
                convolution(f"layer{layer}.{block}.downsample.0", out, inside, 1)
                norms.append((f"layer{layer}.{block}.downsample.1", out))
            inside = out
    encoder |= {f"{name}.{key}": (out,) for name, out in norms for key in BUFFERS}
    head = {"cbr_deepsup.0.weight": (128, 256, 3, 3), "conv_last_deepsup.weight": (150, 128, 1, 1),
            "conv_last_deepsup.bias": (150,)}  # fmt: skip
    named = [("cbr_deepsup.1", 128)]
    if decoder == "c1_deepsup":
        head |= {"cbr.0.weight": (128, 512, 3, 3), "conv_last.weight": (150, 128, 1, 1), "conv_last.bias": (150,)}
        named += [("cbr.1", 128)]
    else:
        head |= {f"ppm.{k}.1.weight": (512, 512, 1, 1) for k in range(4)}
        head |= {"conv_last.0.weight": (512, 512 + 4 * 512, 3, 3), "conv_last.4.weight": (150, 512, 1, 1),
                 "conv_last.4.bias": (150,)}  # fmt: skip
        named += [(f"ppm.{k}.2", 512) for k in range(4)] + [("conv_last.1", 512)]
    return encoder, head | {f"{name}.{key}": (out,) for name, out in named for key in BUFFERS}


# Their synchronized BatchNorm keeps two more; it does not count batches.
BUFFERS = ("weight", "bias", "running_mean", "running_var", "_tmp_running_mean", "_tmp_running_var")


def write_part(folder, part, shapes):
    weights = {key: torch.rand(shape) * 0.1 for key, shape in shapes.items()}
    torch.save(weights, folder / f"{part}_epoch_20.pth")
    return weights


def test_files_of_ade20ks_authors_are_teachers(tmp_path, tiny_recipe):
    torch.manual_seed(0)
    encoder = write_part(tmp_path, "encoder", authors_names("c1_deepsup")[0])
    (tmp_path / "encoder_epoch_21.pth").write_bytes(b"half of a pair")
    images = torch.rand(1, 3, 48, 64)
    for decoder, last, chans in (("ppm_deepsup", "conv_last.4", 512), ("c1_deepsup", "conv_last", 128)):
        weights = write_part(tmp_path, "decoder", authors_names(decoder)[1])
        features = csail_segmenter(tmp_path, "features")
        assert features.out_chans == chans
        logits = F.conv2d(features(images), weights[f"{last}.weight"], weights[f"{last}.bias"])
        assert logits.shape == (1, 150, 6, 8)
        torch.testing.assert_close(features.network.network(images), logits)
        own = features.network.network.encoder.state_dict()
        assert torch.equal(own["layer4.0.downsample.1.running_var"], encoder["layer4.0.downsample.1.running_var"])
    settings = {"teacher": "ade20k", "teacher_file": str(tmp_path)}
    task, batch = tiny_batch(tiny_recipe, "ppkd", settings, "unet3d.out_chans=150")
    torch.testing.assert_close(task.teacher(images), logits)
    assert task(batch)["ppkd"].item() > 0
    torch.save({key: value for key, value in weights.items() if key != "cbr.1.bias"}, tmp_path / "decoder_epoch_20.pth")
    with pytest.raises(WeightsMismatch, match=r"decoder_epoch_20.pth: 1 keys differ .*cbr.1.bias"):
        csail_segmenter(tmp_path)
    (tmp_path / "decoder_epoch_20.pth").unlink()
    with pytest.raises(RecipeError, match=r"has no encoder_epoch_N\.pth and decoder_epoch_N.pth of one N"):
        csail_segmenter(tmp_path)


def test_the_encoder_of_the_published_teacher_has_the_number_of_keys_that_others_report():
    with torch.device("meta"):
        encoder = SceneParser(50, SceneParserHead, 150).encoder
    kept = [key for key in encoder.state_dict() if not key.endswith("num_batches_tracked")]
    norms = sum(key.endswith("running_mean") for key in kept)
    assert len(kept) + 2 * norms == 385  # with the two further buffers of each norm
    assert encoder.layer3[0].conv2.dilation == (1, 1)
    assert encoder.layer3[1].conv2.dilation == encoder.layer4[0].conv2.dilation == (2, 2)
    assert encoder.layer4[1].conv2.dilation == (4, 4)


class SceneParserHead(nn.Module):
    """No head."""

    def __init__(self, channels, classes):
        super().__init__()
