"""Encoders of timm in every 2D network of fine-tuning, alone in Pri3D's U-Net or inside another library's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d

from geo_pretrain.adapters import smp
from geo_pretrain.adapters import torchvision as hosts
from geo_pretrain.adapters.common import encoder_of, freeze_stages, parameter_groups, stages_of
from geo_pretrain.adapters.timm import load_into
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.backbones.timm_encoder import TimmUNet
from geo_pretrain.backbones.timm_names import timm_contract
from geo_pretrain.errors import RecipeError, UnknownName, WeightsMismatch
from geo_pretrain.loading import load_backbone
from geo_pretrain.training.finetune import load_finetuned
from geo_pretrain.training.finetune_recipe import NetworkSpec
from geo_pretrain.training.networks import PretrainedInit, build_segmenter, check_options
from tests.training.finetune.test_run import SOURCES, run
from tests.zoo import tiny_timm, write_timm

ENCODER = "timm/mobilenetv3_small_050"


@pytest.fixture(scope="module")
def unet() -> TimmUNet:
    network: TimmUNet = tiny_timm(ENCODER, 3)
    return network


@pytest.fixture(scope="module")
def folder(unet: TimmUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timm(tmp_path_factory.mktemp("timm") / "mine_mobilenet", ENCODER, unet)


def test_the_whole_unet_but_its_last_layer_is_transferred(folder: Path, unet: TimmUNet):
    init = PretrainedInit(str(folder), ENCODER)
    segmenter, have = build_segmenter(NetworkSpec("unet", ENCODER, transfer="all"), init, 3, seed=0)
    assert have == "all"
    state = segmenter.network.state_dict()
    given = unet.state_dict()
    own = {key for key in given if not torch.equal(state[key].flatten()[:1], given[key].flatten()[:1])}
    assert {key.rpartition(".")[0] for key in own} == {"decoder.conv0"}
    assert init.contract() == timm_contract(ENCODER)
    with pytest.raises(RecipeError, match="has the encoder 'timm/mobilenetv3_small_050', the recipe is for 'resnet50'"):
        PretrainedInit(str(folder), "resnet50").unet(0)


@pytest.mark.parametrize(
    ("kind", "stride"),
    [("deeplabv3", 16), ("deeplabv3plus", 16), ("pspnet", 8), ("fpn", 32), ("upernet", 32), ("fcn", 8)],
)
def test_networks_of_other_libraries_hold_the_encoder(folder: Path, unet: TimmUNet, kind: str, stride: int):
    aux = 0.4 if kind == "pspnet" else 0.0
    spec = NetworkSpec(kind, ENCODER, output_stride=stride, aux=aux, freeze=1)  # type: ignore[arg-type]
    segmenter, have = build_segmenter(spec, PretrainedInit(str(folder), ENCODER), 3, seed=0)
    assert have == "encoder"
    logits, of_aux = segmenter.train()(torch.zeros(2, 3, 64, 64))
    assert logits.shape[1] == 3
    assert (of_aux is not None) == bool(aux)
    given = unet.encoder.state_dict()
    for key, value in encoder_of(segmenter.network).state_dict().items():
        assert torch.equal(value, given[key if key in given else f"model.{key}"]) or "running" in key or "num_b" in key
    frozen = [p for _, part in stages_of(encoder_of(segmenter.network))[:1] for m in part for p in m.parameters()]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


def test_freezing_holds_timms_norms_and_survives_pickles():
    network = timm.create_model("efficientnet_lite0", features_only=True).train()
    freeze_stages(network, 2)
    norms = [module for module in network.modules() if isinstance(module, BatchNormAct2d)]
    still = [module for module in norms if not module.train().training]
    assert 0 < len(still) < len(norms)
    again = pickle.loads(pickle.dumps(network))
    assert type(again.bn1) is type(network.bn1) is not BatchNormAct2d
    names = [group["name"] for group in parameter_groups(network, 1.0, layer_decay=0.5)]
    assert names == ["stage2", "stage3", "stage4"]
    freeze_stages(network, 0)
    assert all(type(module) is BatchNormAct2d for module in norms)


def test_a_detector_sees_four_maps(folder: Path):
    detector = hosts.faster_rcnn(folder, num_classes=3, pyramid=32, min_size=64, max_size=64)
    levels = detector.backbone(torch.zeros(1, 3, 64, 64))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [(32, s, s) for s in (16, 8, 4, 2, 1)]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in detector.backbone.body.modules())
    assert encoder_of(detector) is detector.backbone.body.encoder
    assert detector.transform.image_mean == list(timm_contract(ENCODER).mean)


@pytest.mark.parametrize("features", [False, True])
def test_a_folder_loads_into_timms_own_network(folder: Path, unet: TimmUNet, features: bool):
    model = timm.create_model("mobilenetv3_small_050", features_only=features)
    head = None if features else model.classifier.weight.clone()
    assert load_into(model, folder) is model
    given = unet.encoder.state_dict()
    assert all(torch.equal(model.state_dict()[key.removeprefix("model.")], value) for key, value in given.items())
    assert features or torch.equal(model.classifier.weight, head)
    assert timm.data.resolve_model_data_config(model)["mean"] == timm_contract(ENCODER).mean
    if features:
        with pytest.raises(WeightsMismatch, match=r"holds timm's mobilenetv3_small_050; \d+ of its"):
            load_into(timm.create_model("mobilenetv3_small_075", features_only=True), folder)
        gray = timm.create_model("mobilenetv3_small_050", in_chans=1)
        with pytest.raises(WeightsMismatch, match=r"conv_stem\.weight is \[16, 1, 3, 3\] there\. .*such as in_chans"):
            load_into(gray, folder)


def test_smp_takes_maps_of_stride_1():
    network = smp.unet("timm/vgg11", num_classes=3, pretrained=False).eval()
    encoder = build_encoder("timm/vgg11").eval()
    encoder.load_state_dict(network.encoder.state_dict())
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, theirs in zip(encoder(image), network.encoder(image), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_network_that_an_encoder_fills_in_part_is_refused(folder: Path):
    small = load_into(timm.create_model("mobilenetv3_small_050"), folder)
    larger = copy.deepcopy(small)
    larger.blocks.append(torch.nn.Conv2d(4, 4, 1))
    with pytest.raises(WeightsMismatch, match=r"of those that would stay random 2 are no classifier's: blocks\."):
        load_into(larger, folder)
    for name in ("resnet34", "seresnet18"):
        for features in (True, False):
            with pytest.raises(WeightsMismatch, match="fills 120 of the"):
                load_into(timm.create_model(name, features_only=features), "pri3d_view_r18", pretrained=False)
    assert load_into(timm.create_model("resnet18"), "pri3d_view_r18", pretrained=False).load_report.loaded == 120


def test_a_run_from_a_folder_is_loaded_and_predicts_alike(folder: Path, tmp_path: Path):
    run(tmp_path / "out", f"network.encoder={ENCODER}", "network.width=64", backbone=folder)
    task = load_finetuned(tmp_path / "out")
    labels = task.predict([SOURCES[1].load(SOURCES[1].ids()[0]).image])[0].labels
    assert labels.min() >= 1
    assert task.task.contract == timm_contract(ENCODER)
    assert load_backbone(tmp_path / "out", decoder=True).load_report.coverage == 1


def test_an_unknown_encoder_is_told_before_any_work():
    with pytest.raises(UnknownName, match="Closest: 'timm/convnext_tiny'"):
        check_options(NetworkSpec("unet", "timm/convnext_tin"))


@pytest.mark.parametrize("kind", ["fpn", "upernet", "deeplabv3plus", "pspnet"])
def test_options_of_other_libraries_networks_are_checked_around_an_encoder_of_timm(kind: str):
    """timm moves the weights of its encoder, which have no values on the meta device."""
    stride = 16 if kind == "deeplabv3plus" else 32
    check_options(NetworkSpec(kind, ENCODER, output_stride=stride))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"decoder_wings"):
        check_options(NetworkSpec(kind, ENCODER, output_stride=stride, options={"decoder_wings": 2}))  # type: ignore[arg-type]
