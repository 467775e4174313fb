"""Mask R-CNN with fewer channels than torchvision's 256, which a CPU can train: still the host's class and parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN

from geo_pretrain.contract import ImageContract
from geo_pretrain.training.config import parse
from geo_pretrain.training.finetune.detection import Detection
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks import PretrainedInit
from tests.training.finetune.test_detection import CLASSES, task_of, tree
from tests.training.finetune.test_detection_network import batch_of, norms


@pytest.mark.parametrize(("norm", "box_head"), [("encoder", "2fc"), ("everywhere", "4conv1fc")])
def test_a_narrow_pyramid_has_narrow_heads(norm, box_head):
    task = task_of(network={"options": {"width": 16, "norm": norm, "box_head": box_head}})
    host = task.module
    assert type(host) is MaskRCNN
    sizes = {name: tuple(p.shape) for name, p in host.named_parameters() if p.ndim == 4 and ".body." not in name}
    assert [size[:2] for name, size in sizes.items() if "inner_blocks" in name] == [
        (16, 64), (16, 128), (16, 256), (16, 512)
    ]  # fmt: skip
    assert {size[1] for name, size in sizes.items() if "inner_blocks" not in name} == {16}
    assert sizes["roi_heads.mask_predictor.mask_fcn_logits.weight"] == (len(task.classes) + 1, 16, 1, 1)
    linear = [m for m in host.roi_heads.box_head.modules() if isinstance(m, nn.Linear)]
    assert (linear[0].in_features, linear[-1].out_features) == (16 * 7 * 7, 1024)
    assert sum(name.endswith("0.weight") for name in sizes if "roi_heads.mask_head" in name) == 4
    assert (nn.BatchNorm2d in norms(host.roi_heads.mask_head)) == (norm == "everywhere")
    host.train()
    losses = task.losses(batch_of(task))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(p.grad is not None for name, p in host.named_parameters() if "mask" in name)


def test_the_hosts_own_width_is_the_default_and_keeps_its_heads():
    made = tree()
    del made["network"]["options"]["width"]
    recipe = parse(FinetuneRecipe, made, where="test")
    heads = Detection(recipe, PretrainedInit("scratch", "resnet18"), CLASSES, ImageContract()).module.roi_heads
    assert heads.mask_predictor.mask_fcn_logits.in_channels == 256
    assert heads.mask_predictor.conv5_mask.out_channels == 256
    assert {m.out_channels for m in heads.mask_head.modules() if isinstance(m, nn.Conv2d)} == {256}
