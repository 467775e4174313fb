"""The detection network: losses and predictions against torchvision's own, freezing, starts, released settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.catalog import Arch
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.finetune.detection import Detection, coco_detections
from geo_pretrain.training.finetune.detector import detection_options, stride_in_1x1
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.finetune.test_detection import (
    HEIGHT,
    WIDTH,
    Shapes,
    bare,
    generator,
    recipe,
    task_of,
    tight,
)
from tests.zoo import write_tiny

pytestmark = pytest.mark.usefixtures("quick_weights")


@pytest.fixture(scope="module")
def plain():
    """The task with the channels of torchvision's own network; tests leave its weights alone."""
    return task_of(network={"options": {"width": 256}})


def theirs(masks=True, **changes):
    """The same network put together from torchvision's parts alone."""
    body = BackboneWithFPN(
        resnet18(weights=None), {f"layer{k}": str(k - 1) for k in range(1, 5)}, [64, 128, 256, 512], 256
    )
    settings = {
        "min_size": (48, 64),
        "max_size": 128,
        "box_batch_size_per_image": 8,
        "rpn_post_nms_top_n_train": 12,
        "rpn_post_nms_top_n_test": 12,
        "rpn_anchor_generator": AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
    }
    return (MaskRCNN if masks else FasterRCNN)(body, num_classes=3, **(settings | changes))


def batch_of(task, ids=("train0", "train4", "train3"), seed=0):
    source = Shapes()
    return task.collate([task.sample(source.load(id), generator(seed)) for id in ids])


def copied(module):
    """A state dict that a step on the module does not change."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_losses_are_those_of_torchvisions_network(plain):
    """Three images: a crowd and an empty one among them; both draw the scales from the same seed."""
    host = theirs()
    host.load_state_dict(copied(plain.module))
    weights = copied(plain.module)
    batch = batch_of(plain)
    targets = []
    for id, image in zip(("train0", "train4", "train3"), batch["images"], strict=True):
        whole = Shapes().load(id)
        mirrored = not np.array_equal(image.permute(1, 2, 0).numpy(), whole.image)
        masks = whole.instances.masks[~whole.instances.crowd]
        masks = masks[:, :, ::-1] if mirrored else masks
        targets.append(
            {
                "boxes": torch.tensor([list(map(float, tight(mask))) for mask in masks]).reshape(-1, 4),
                "labels": torch.tensor(whole.instances.classes[~whole.instances.crowd]),
                "masks": torch.from_numpy(masks.astype(np.uint8)),
            }
        )
    plain.module.train()
    host.train()
    torch.manual_seed(3)
    mine = plain.losses(batch)
    torch.manual_seed(3)
    expected = host([image.float() / 255 for image in batch["images"]], targets)
    assert set(mine) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    for name, value in expected.items():
        assert mine[name].item() == pytest.approx(value.item(), rel=1e-5)
        assert value.item() > 0
    plain.module.load_state_dict(weights)  # BatchNorm's statistics moved


def test_predictions_are_those_of_torchvisions_network(plain):
    host = theirs(box_score_thresh=0.05).eval()
    host.load_state_dict(plain.module.state_dict())
    pixels = [Shapes().load(id).image for id in ("train0", "train1")]
    pixels[1] = pixels[1][:40, :]  # sizes differ
    with torch.no_grad():
        expected = host([torch.from_numpy(p.transpose(2, 0, 1).copy()) / 255 for p in pixels])
    found = plain.predict(pixels)
    assert not plain.module.training
    for one, other, image in zip(found, expected, pixels, strict=True):
        assert len(one) == len(other["scores"]) > 0
        assert np.allclose(one.boxes, other["boxes"].numpy(), atol=1e-3)
        assert one.classes.tolist() == other["labels"].tolist()
        assert np.allclose(one.scores, other["scores"].numpy(), atol=1e-5)
        assert one.masks.shape == (len(one), *image.shape[:2])
        assert np.array_equal(one.masks, other["masks"].numpy()[:, 0] > 0.5)


def test_the_shorter_side_is_drawn_and_fixed_for_measuring(plain):
    wide = load_finetune_recipe("scannet_mask_rcnn_r50")
    assert sides_of(wide) == ((640, 672, 704, 736, 768, 800), 1333)  # Detectron2's six
    assert sides_of(recipe(data={"size": [60, 90], "augment": {"shorter": None}})) == ((60,), 90)
    assert plain.module.transform.min_size == (48, 64)
    assert plain.module.transform.max_size == 128
    plain.module.train()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        images, _ = plain.module.transform([torch.zeros(3, HEIGHT, WIDTH)])
        seen.add(images.image_sizes[0])
    assert seen == {(48, 64), (64, 85)}
    plain.module.eval()
    assert plain.module.transform([torch.zeros(3, HEIGHT, WIDTH)])[0].image_sizes == [(64, 85)]


def sides_of(made):
    from geo_pretrain.training.finetune.detector import _sides

    return _sides(made.data.size, made.data.augment)


def test_faster_rcnn_gives_boxes_only():
    task = task_of(task="detection", network={"kind": "faster_rcnn"})
    assert type(task.module) is FasterRCNN
    assert task.metric == "box_ap"
    task.module.train()
    assert "loss_mask" not in task.losses(batch_of(task))
    evaluation = task.evaluate(Shapes("val", 3), ["val0", "val2"])
    assert list(evaluation.scores) == ["box_ap", "box_ap50", "box_ap75"]
    assert coco_detections(task.predict([Shapes().load("train0").image])[0], 1)[0].keys() == {
        "image_id", "category_id", "score", "bbox"
    }  # fmt: skip


def frozen_stages(task):
    encoder = encoder_of(task.module)
    names = ("conv1", "layer1", "layer2", "layer3", "layer4")
    return [not any(p.requires_grad for p in encoder.get_submodule(name).parameters()) for name in names]


def norms(module):
    return {type(layer) for layer in module.modules() if "BatchNorm" in type(layer).__name__}


def test_freezing_and_rates():
    """Of a stored backbone: the stem and layer1, and all statistics; the paper's one rate, or two."""
    changes = {
        "network": {"freeze": 2, "options": {"norm": "frozen"}},
        "optim": {"backbone_factor": 0.1, "head_factor": 2.0},
    }
    task = task_of(match_released_code=True, **changes)
    assert frozen_stages(task) == [True, True, False, False, False]
    assert norms(task.module) == {FrozenBatchNorm2d}
    groups = task.parameter_groups()
    trained = {id(p) for p in task.module.parameters() if p.requires_grad}
    assert [id(p) for group in groups for p in group["params"]].__len__() == len(trained)
    assert {id(p) for group in groups for p in group["params"]} == trained
    inside = {id(p) for p in encoder_of(task.module).parameters()}
    factors = {id(p): group["factor"] for group in groups for p in group["params"]}
    assert all(factor == (0.1 if p in inside else 2.0) for p, factor in factors.items())
    assert task.backbone() is encoder_of(task.module)


def test_a_start_from_scratch_is_not_frozen_unless_released_so():
    frozen = {"network": {"freeze": 2, "options": {"norm": "frozen"}}}
    task = task_of(**frozen)
    assert frozen_stages(task) == [False] * 5
    assert norms(encoder_of(task.module)) == {nn.BatchNorm2d}
    assert task.setup.thawed
    assert "trained with BatchNorm from scratch" in task.protocol_deviations()["frozen random layers"]
    exact = bare(match_released_code=True, **frozen)
    assert not exact.setup.thawed
    assert "stay frozen" in exact.protocol_deviations()["frozen random layers"]
    assert "frozen random layers" not in bare().protocol_deviations()


def test_every_start_begins_with_the_same_new_layers():
    """The host's layers do not depend on what is frozen or normed how."""
    one, other = task_of(), task_of(match_released_code=True, network={"freeze": 2, "options": {"norm": "frozen"}})
    mine, theirs = one.module.state_dict(), other.module.state_dict()
    shared = [key for key in mine if not key.startswith("backbone.body")]
    assert len(shared) > 30
    assert all(torch.equal(mine[key], theirs[key]) for key in shared)
    again = task_of(seed=1).module.state_dict()
    assert not torch.equal(mine["roi_heads.box_head.fc6.weight"], again["roi_heads.box_head.fc6.weight"])


def test_a_checkpoint_folder_brings_its_encoder_and_contract(tmp_path):
    """The rest is that of a start from scratch, so that two starts differ in what was pre-trained alone."""
    torch.manual_seed(5)
    stored = {key: value for key, value in resnet18().state_dict().items() if not key.startswith("fc.")}
    arch = Arch("resnet_unet", {"depth": 18, "width": 64, "out_chans": 32})
    write_tiny(tmp_path / "stored_net_r18", "stored_net_r18", arch=arch, weights={"encoder": stored})
    folder = str(tmp_path / "stored_net_r18")
    task = task_of(folder, network={"freeze": 2, "options": {"norm": "frozen"}})
    encoder = task.backbone().state_dict()
    assert all(torch.equal(encoder[key], value) for key, value in stored.items() if key in encoder)
    assert len(encoder) == 20 * 5  # 20 convolutions and their norms, which do not count
    assert frozen_stages(task) == [True, True, False, False, False]
    assert norms(task.module) == {FrozenBatchNorm2d}
    assert not task.setup.thawed
    scratch, mine = task_of().module.state_dict(), task.module.state_dict()
    assert all(torch.equal(mine[key], scratch[key]) for key in mine if not key.startswith("backbone.body"))


def test_the_network_of_the_coco_protocol():
    """BatchNorm in pyramid, box and mask heads; four convolutions before one layer in the box head."""
    task = task_of(network={"options": {"width": 256, "norm": "everywhere", "box_head": "4conv1fc"}})
    host = task.module
    convolutions = [m for m in host.roi_heads.box_head.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [256] * 4
    assert [m.out_features for m in host.roi_heads.box_head.modules() if isinstance(m, nn.Linear)] == [1024]
    for part, count in ((host.roi_heads.box_head, 4), (host.roi_heads.mask_head, 4), (host.backbone.fpn, 8)):
        assert sum(isinstance(m, nn.BatchNorm2d) for m in part.modules()) == count
    host.train()
    losses = task.losses(batch_of(task))
    assert all(torch.isfinite(value) for value in losses.values())
    assert "SyncBN" in task.protocol_deviations()["BatchNorm"]
    light = task_of(network={"options": {"box_head": "4conv1fc"}}).module
    assert not norms(light.roi_heads) | norms(light.backbone.fpn)


def test_stride_in_the_1x1():
    """As in the MSRA networks: the same convolutions, but half of the pixels are dropped before the 3x3."""
    torch.manual_seed(0)
    encoder = resnet50(weights=None).eval()
    block = encoder.layer2[0]
    image = torch.rand(1, 256, 16, 16)
    stride_in_1x1(encoder)
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2), ("layer4", 2)):
        blocks = encoder.get_submodule(stage)
        assert next((b.conv1.stride, b.conv2.stride) for b in blocks) == ((stride, stride), (1, 1))
        assert {(b.conv1.stride, b.conv2.stride) for b in list(blocks)[1:]} == {((1, 1), (1, 1))}
    with torch.no_grad():
        x = torch.relu(block.bn1(nn.functional.conv2d(image[:, :, ::2, ::2], block.conv1.weight)))
        x = torch.relu(block.bn2(nn.functional.conv2d(x, block.conv2.weight, padding=1)))
        x = block.bn3(nn.functional.conv2d(x, block.conv3.weight)) + block.downsample(image)
        assert torch.allclose(block(image), torch.relu(x), atol=1e-5)


def test_the_released_stride_is_built_in_for_resnet50():
    options = {"authors_input": "msra"}
    for exact in (True, False):
        task = task_of(match_released_code=exact, network={"encoder": "resnet50", "options": options})
        block = encoder_of(task.module).layer3[0]
        assert (block.conv1.stride, block.conv2.stride) == (((2, 2), (1, 1)) if exact else ((1, 1), (2, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"augment": {"rotate": 10.0}}}, r"'data\.augment\.rotate' is 10\.0, accepted for task 'instances'"),
        ({"data": {"augment": {"shorter": None}}}, r"'data\.size' is None, accepted is"),
        ({"data": {"augment": {"shorter": [64, 48]}}}, r"'data\.augment\.shorter' is \[64, 48\]"),
        ({"network": {"output_stride": 16}}, r"'network\.output_stride' is 16"),
        ({"network": {"aux": 0.4}}, r"'network\.aux' is 0\.4"),
        ({"network": {"options": {"anchor": 3}}}, r"unknown key 'network\.options\.anchor'. Closest: .*anchors"),
        ({"network": {"options": {"roi_batch": 0}}}, r"'network\.options\.roi_batch' is 0"),
        ({"network": {"options": {"width": 0}}}, r"'network\.options\.width' is 0"),
        ({"network": {"options": {"score_threshold": 1.0}}}, r"'network\.options\.score_threshold' is 1\.0"),
    ],
)
def test_settings_that_would_be_ignored_or_fail_later(changes, message):
    with pytest.raises(RecipeError, match=message):
        bare(**changes)


def test_two_sizes_at_once_are_refused_before_a_run_but_read_from_a_finished_one():
    both = recipe(data={"size": [48, 64]})
    with pytest.raises(RecipeError, match=r"which decides.*--set data\.augment\.shorter=\[48,48\] .*longer=64"):
        Detection.check(both)
    detection_options(both)
