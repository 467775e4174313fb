"""torchvision's Faster and Mask R-CNN with our encoders, and what is easily done wrong with them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from geo_pretrain.adapters.common import freeze_stages
from geo_pretrain.adapters.torchvision import faster_rcnn, mask_rcnn
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import UnknownName
from geo_pretrain.loading import load_backbone
from tests.adapters.conftest import CONTRACT

SMALL = {"min_size": 64, "max_size": 96}  # of the images below, so that nothing is resized; and few boxes
SMALL |= {f"rpn_{when}_nms_top_n_{phase}": 20 for when in ("pre", "post") for phase in ("train", "test")}
SMALL |= {"box_detections_per_img": 3, "box_batch_size_per_image": 16}
STAGES = ["relu", "layer1", "layer2", "layer3", "layer4"]


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 64, 96, generator=generator) for _ in range(count)]


def targets(masks: bool) -> list[dict[str, Tensor]]:
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    if masks:
        mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
        mask[:, 8:40, 8:40] = 1
        box["masks"] = mask
    return [dict(box) for _ in range(2)]


@pytest.fixture(scope="module")
def network(r18: Path) -> torchvision.models.detection.MaskRCNN:
    """Not to be changed."""
    return mask_rcnn(r18, num_classes=4, **SMALL)


@torch.no_grad()
def test_the_pyramid_is_built_on_the_maps_of_the_plain_encoder(r18: Path, network):
    assert type(network) is torchvision.models.detection.MaskRCNN
    seen: list[Tensor] = []
    body = network.backbone.body
    handles = [body[name].register_forward_hook(lambda m, given, out: seen.append(out.clone())) for name in STAGES]
    found = network(images())
    for handle in handles:
        handle.remove()
    assert [set(one) for one in found] == [{"boxes", "labels", "scores", "masks"}] * 2
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    expected = load_backbone(r18)((torch.stack(images()) - mean) / std)
    for value, other in zip(seen, expected, strict=True):
        assert value.shape == other.shape
        assert float((value - other).abs().max() / other.abs().max()) < 1e-5


@torch.no_grad()
def test_faster_rcnn_has_the_same_maps_and_a_pyramid_of_any_width(r18: Path, network):
    narrow = faster_rcnn(r18, num_classes=4, pyramid=24, **SMALL)
    assert type(narrow) is torchvision.models.detection.FasterRCNN
    x = torch.stack(images())
    maps = [net.backbone.body(x) for net in (narrow, network)]
    assert all(torch.equal(value, other) for value, other in zip(maps[0].values(), maps[1].values(), strict=True))
    assert {value.shape[1] for value in narrow.backbone(x).values()} == {24}
    assert list(narrow.backbone(x)) == ["0", "1", "2", "3", "pool"]  # torchvision's heads look for these
    assert {value.shape[1] for value in network.backbone(x).values()} == {256}  # torchvision's, unless told otherwise
    assert narrow.rpn.head.cls_logits.in_channels == 24
    assert narrow.roi_heads.box_head.fc6.in_features == 24 * 7 * 7
    assert len(narrow(images())) == 2


def test_the_contract_is_in_the_hosts_own_place(network):
    assert network.contract == CONTRACT
    assert network.transform.image_mean == [0.1, 0.2, 0.3]
    assert network.transform.image_std == [0.4, 0.5, 0.6]
    assert (network.transform.min_size, network.transform.max_size) == ((64,), 96)
    assert network.load_report.coverage == 1.0
    assert not network.training


@pytest.mark.parametrize("builder", [faster_rcnn, mask_rcnn])
def test_pretrained_means_frozen_norms_and_two_frozen_stages(r18: Path, builder):
    """Against torchvision's own rule for pre-trained encoders, trainable_layers=3."""
    network = builder(r18, num_classes=2).train()
    body = network.backbone.body
    norms = [module for module in body.modules() if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d)]
    assert len(norms) == 20
    assert {type(norm) for norm in norms} == {FrozenBatchNorm2d}
    with torch.device("meta"):
        theirs = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=3
        )
    expected = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in network.backbone.named_parameters()} == expected
    assert not expected["body.layer1.0.conv1.weight"]
    assert expected["body.layer2.0.conv1.weight"]
    assert list(network.backbone.state_dict()) == list(theirs.state_dict())
    others = network.rpn, network.roi_heads
    assert all(parameter.requires_grad for part in others for parameter in part.parameters())
    assert (network.transform.min_size, network.transform.max_size) == ((800,), 1333)


def test_freeze_is_five_minus_torchvisions_trainable_layers():
    network = faster_rcnn("pri3d_view_r18", num_classes=2, pretrained=False, freeze=4, norm="frozen")
    for freeze in (4, 0, 1, 2, 3, 5):
        if freeze != 4:  # that one is the builder's
            freeze_stages(network, freeze)
        with torch.device("meta"):
            theirs = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
                backbone_name="resnet18", weights=None, trainable_layers=5 - freeze
            )
        expected = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
        assert {name: parameter.requires_grad for name, parameter in network.backbone.named_parameters()} == expected


def test_a_random_start_trains_everything():
    network = faster_rcnn("pri3d_view_r18", num_classes=2, pretrained=False).train()
    norms = [module for module in network.backbone.body.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(norm.training for norm in norms)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_with_batch_norm_the_frozen_stages_keep_their_statistics(r18: Path):
    network = mask_rcnn(r18, num_classes=2, norm="batch", **SMALL).train()
    before = copy.deepcopy(network.state_dict())
    losses = network(images(), targets(masks=True))
    assert set(losses) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"
    }  # fmt: skip
    sum(losses.values()).backward()
    after = network.state_dict()
    moved = {key.split(".")[2] for key in after if not torch.equal(before[key], after[key])}
    assert moved == {"layer2", "layer3", "layer4"}
    graded = {name.split(".")[2] for name, p in network.backbone.body.named_parameters(prefix="x.x") if p.grad is None}
    assert graded == {"conv1", "bn1", "layer1"}


def test_a_step_of_training_with_frozen_norms(r18: Path):
    network = faster_rcnn(r18, num_classes=2, **SMALL).train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    sum(network(images(), targets(masks=False)).values()).backward()
    optimizer.step()
    after = network.state_dict()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert "backbone.body.layer2.0.conv1.weight" in moved
    assert not {key for key in moved if ".layer1." in key or "body.conv1." in key}
    assert not {key for key in moved if "body" in key and ("bn" in key or "downsample.1" in key)}


# --- normalizing twice ---


def test_an_image_that_was_normalized_before_is_refused(network):
    normalized = [(image - 0.45) / 0.225 for image in images()]
    with pytest.raises(ValueError, match=r"Image 0 spans \[-.*normalized already \(network\.transforms"):
        network(normalized)
    with pytest.raises(ValueError, match="Image 1 spans"):
        network([images()[0], normalized[1]])
    with pytest.raises(ValueError, match="dividing by 255"):
        network([image * 255 for image in images()])
    with pytest.raises(ValueError, match="Image 0 spans"):
        network([torch.full((3, 64, 96), torch.nan)])
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with pytest.raises(ValueError, match="Image 0 spans"):
            twin(normalized)
    with pytest.raises(ValueError, match="Image 0 spans"):
        network.transform([network.contract.transforms()(images()[0])])


@torch.no_grad()
def test_images_that_are_right_pass(network):
    transform = network.transform
    transform([image * 1.02 - 0.01 for image in images()])  # resampling overshoots a little
    transform([torch.zeros(3, 64, 96), torch.ones(3, 64, 96)])
    for image in (images()[0] - 0.1, images()[0] + 0.1):  # more than that
        with pytest.raises(ValueError, match="Image 1 spans"):
            transform([images()[0], image])
    with pytest.raises(TypeError, match="floating type"):  # torchvision's own word
        transform([torch.zeros(3, 64, 96, dtype=torch.uint8)])


@torch.no_grad()
def test_the_networks_transforms_leave_normalizing_to_it(network):
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = network.transforms(noise)
    torch.testing.assert_close(image, torch.from_numpy(noise).permute(2, 0, 1) / 255)
    assert image.dtype == torch.float32
    assert network.transform([image])[0].tensors.shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match="normalized already"):
        network.transforms(network.contract.transforms()(noise))


# --- the rest ---


def test_keys_are_those_of_torchvisions_builders():
    ours = mask_rcnn("pri3d_view_r50", num_classes=19, pretrained=False).state_dict()
    with torch.device("meta"):
        theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(weights_backbone=None, num_classes=19)
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert list(ours) == list(theirs.state_dict())


def test_the_heads_start_the_same_with_and_without_weights(r18: Path):
    states = []
    for pretrained in (True, False):
        torch.manual_seed(5)
        states.append(faster_rcnn(r18, num_classes=3, pretrained=pretrained, in_chans=1, norm="frozen").state_dict())
    same = {key for key, value in states[0].items() if torch.equal(value, states[1][key])}
    assert {key for key in states[0] if not key.startswith("backbone.body.")} <= same
    assert not {key for key in states[0] if key.startswith("backbone.body.") and states[0][key].ndim == 4} & same


def test_options_are_torchvisions_and_wrong_ones_are_refused(r18: Path):
    network = faster_rcnn(
        r18, num_classes=2, box_score_thresh=0.5, box_batch_size_per_image=32, in_chans=1, size_divisible=64
    )
    assert network.transform.size_divisible == 64
    assert network.roi_heads.score_thresh == 0.5
    assert network.roi_heads.fg_bg_sampler.batch_size_per_image == 32
    assert len(network.transform.image_mean) == 1
    assert network.backbone.body.conv1.in_channels == 1
    name = "pri3d_view_r18"
    with pytest.raises(
        UnknownName, match=r"option of torchvision's FasterRCNN 'box_score_tresh'\. Closest: 'box_score_t"
    ):
        faster_rcnn(name, num_classes=2, box_score_tresh=0.5)
    with pytest.raises(UnknownName, match="option of torchvision's FasterRCNN 'mask_head'"):
        faster_rcnn(name, num_classes=2, mask_head=None)
    with pytest.raises(ValueError, match="trainable_backbone_layers: not an option here; use freeze"):
        mask_rcnn(name, num_classes=2, trainable_backbone_layers=3)
    with pytest.raises(ValueError, match="output_stride: not an option here; the feature pyramid"):
        mask_rcnn(name, num_classes=2, output_stride=16)
    with pytest.raises(ValueError, match="image_mean: not an option here; it comes from the contract"):
        mask_rcnn(name, num_classes=2, image_mean=[0.5] * 3)
    with pytest.raises(ValueError, match=r"num_classes is 1; accepted: .* 2 up \(the background is one\)"):
        mask_rcnn(name, num_classes=1)
    with pytest.raises(ValueError, match="norm is 'sync'; accepted: 'frozen', 'batch'"):
        mask_rcnn(name, num_classes=2, norm="sync")
    with pytest.raises(ValueError, match="freeze is 6"):
        mask_rcnn(name, num_classes=2, freeze=6)
    for pyramid in (0, True, 64.0):
        with pytest.raises(ValueError, match=r"pyramid is .*; accepted: a whole number of channels from 1 up"):
            mask_rcnn(name, num_classes=2, pyramid=pyramid)
    with pytest.raises(ValueError, match="is a 3D network and torchvision's MaskRCNN takes images"):
        mask_rcnn("csc_100k_srunet34", num_classes=2)


def test_the_plain_transform_keeps_the_channels():
    gray = faster_rcnn("pri3d_view_r18", num_classes=2, pretrained=False, in_chans=1)
    assert gray.transforms.contract == ImageContract(("grey",), mean=(0.0,), std=(1.0,), size=(240, 320))
