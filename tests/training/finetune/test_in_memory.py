"""Segmentation: mIoU against a loop, a transfer that keeps all but the last layer, and learning on a few frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DataError
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.evaluation.metrics import confusion_matrix, mean_iou
from geo_pretrain.training.finetune.in_memory import (
    FinetuneSpec,
    evaluate_frames,
    finetune_frames,
    predict,
)
from geo_pretrain.training.networks import segmentation_unet


def slow_miou(truth, predicted, classes):
    ious = []
    for c in range(1, classes):
        inside = union = present = 0
        for t, p in zip(truth.flatten(), predicted.flatten(), strict=True):
            if t == 0:
                continue
            inside += t == c and p == c
            union += t == c or p == c
            present += t == c
        if present:
            ious.append(inside / union)
    return float(np.mean(ious))


def test_miou_equals_the_loop_and_leaves_out_unlabelled_pixels_and_absent_classes():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (6, 30))  # classes 5 and 6 do not occur
    predicted = np.where(rng.random((6, 30)) < 0.6, truth.clip(1), rng.integers(1, 7, (6, 30)))
    confusion = confusion_matrix(torch.from_numpy(truth), torch.from_numpy(predicted), 7)
    assert confusion.sum() == (truth > 0).sum()
    assert mean_iou(confusion) == pytest.approx(slow_miou(truth, predicted, 7))
    assert mean_iou(confusion_matrix(torch.from_numpy(truth), torch.from_numpy(truth.clip(1)), 7)) == 1


def toy_frames(count, seed):
    """Colored squares on a gray ground: class 1 is the ground, 2 red, 3 green, 0 a strip without label."""
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(count):
        color = rng.normal(128, 10, (48, 64, 3))
        labels = np.ones((48, 64), np.int16)
        for c, rgb in ((2, (220, 40, 40)), (3, (40, 220, 40))):
            i, j = rng.integers(0, 24), rng.integers(0, 40)
            color[i : i + 20, j : j + 20] = rgb
            labels[i : i + 20, j : j + 20] = c
        labels[:2] = 0
        image = color.clip(0, 255).astype(np.uint8)
        frames.append(Frame("toy", str(k), image, np.ones((48, 64), np.float32), np.eye(3), np.eye(4), labels))
    return frames


def test_finetuning_learns_and_depends_on_its_seed_alone():
    start = ResNetUNet(18, width=8)
    spec = FinetuneSpec(steps=40, batch=4, lr=0.05)

    def run(seed, noise):
        torch.manual_seed(noise)
        network = segmentation_unet(start, 4, seed=seed, transfer="none")
        return network, finetune_frames(network, ImageContract(), toy_frames(8, 0), toy_frames(6, 1), spec, seed=seed)

    network, result = run(0, 1)
    _, again = run(0, 2)
    _, other = run(1, 1)
    assert result.miou == again.miou
    assert result.losses == again.losses
    assert result.losses != other.losses
    assert result.miou > 0.6
    untrained = segmentation_unet(start, 4, seed=0, transfer="none")
    assert mean_iou(evaluate_frames(untrained, ImageContract(), toy_frames(6, 1))) < 0.3
    frame = toy_frames(6, 1)[0]
    labels = predict(network, ImageContract(), frame)
    assert labels.shape == (48, 64)
    assert labels.min() >= 1
    assert (labels == frame.semantic)[2:].mean() > 0.8


def test_transfer_keeps_everything_but_the_last_layer():
    start = ResNetUNet(18, width=8)
    moved = segmentation_unet(start, 5, seed=0)
    encoder = segmentation_unet(start, 5, seed=0, transfer="encoder").state_dict()
    fresh = segmentation_unet(start, 5, seed=0, transfer="none")
    for key, value in moved.state_dict().items():
        if key.startswith("decoder.conv0."):
            assert len(value) == 5
            assert torch.equal(value, fresh.state_dict()[key]), "both starts must draw the same new layer"
        else:
            assert torch.equal(value, start.state_dict()[key])
        other = start if key.startswith("encoder.") else fresh
        assert torch.equal(encoder[key], other.state_dict()[key])


def test_frame_without_labels_is_named():
    frame = Frame(
        "kitchen", "000010", np.zeros((48, 64, 3), np.uint8), np.ones((48, 64), np.float32), np.eye(3), np.eye(4)
    )
    with pytest.raises(DataError, match="kitchen/000010 has no labels"):
        evaluate_frames(ResNetUNet(18, width=8, out_chans=4), ImageContract(), [frame])
