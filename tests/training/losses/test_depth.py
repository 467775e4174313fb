"""The depth loss against the values of the released code and against a slow loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geo_pretrain.training import losses
from tests.training.losses.test_contrastive import close


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[2] / "data" / "losses.safetensors")


def test_depth_loss_is_pri3ds(golden):
    prediction = golden["depth.pred"].clone().requires_grad_()
    loss = losses.depth_loss(prediction, golden["depth.target"])
    loss.backward()
    close(loss.detach(), golden["depth.loss"][0], 1e-5)
    close(prediction.grad, golden["depth.grad_pred"], 2e-5)


def slow_depth_loss(prediction, target):
    terms = {"depth": [], "normal": [], "dx": [], "dy": []}
    for p, t in zip(prediction, target, strict=True):
        gradients = []
        for image in (p, t):
            padded = np.pad(image, 1)
            h, w = image.shape
            gx = sum(c * (padded[r : r + h, 0:w] - padded[r : r + h, 2 : 2 + w]) for r, c in ((0, 1), (1, 2), (2, 1)))
            gy = sum(c * (padded[0:h, s : s + w] - padded[2 : 2 + h, s : s + w]) for s, c in ((0, 1), (1, 2), (2, 1)))
            gradients.append((gx, gy))
        for i, j in zip(*np.nonzero(t), strict=True):
            (px, py), (tx, ty) = ((gx[i, j], gy[i, j]) for gx, gy in gradients)
            terms["depth"].append(np.log(abs(p[i, j] - t[i, j]) + 0.5))
            terms["dx"].append(np.log(abs(px - tx) + 0.5))
            terms["dy"].append(np.log(abs(py - ty) + 0.5))
            a, b = np.array([-px, -py, 1]), np.array([-tx, -ty, 1])
            terms["normal"].append(abs(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    return sum(np.mean(values) for values in terms.values()) / 3


def test_depth_loss_equals_the_loop_over_pixels():
    rng = np.random.default_rng(5)
    target = rng.uniform(0.5, 4, (2, 6, 8)) * (rng.random((2, 6, 8)) > 0.2)
    prediction = rng.normal(size=(2, 6, 8))
    got = losses.depth_loss(torch.from_numpy(prediction)[:, None], torch.from_numpy(target))
    np.testing.assert_allclose(got.item(), slow_depth_loss(prediction, target), rtol=1e-10)


def test_depth_loss_of_an_image_without_depth_is_zero_with_zero_gradient():
    prediction = torch.randn(1, 1, 8, 8, requires_grad=True)
    loss = losses.depth_loss(prediction, torch.zeros(1, 8, 8))
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad.abs().sum() == 0
