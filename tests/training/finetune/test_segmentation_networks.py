"""Segmentation networks: which weights they start from, and networks of other libraries."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from geo_pretrain.adapters import smp
from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.catalog import Arch
from geo_pretrain.errors import CheckpointError, GeoPretrainError, RecipeError, UnknownName, WeightsMismatch
from geo_pretrain.training.finetune.segmentation import segmentation_loss
from geo_pretrain.training.finetune.task import weights_digest
from geo_pretrain.training.networks import PretrainedInit, Segmenter, _aux_head
from tests.training.finetune.test_segmentation import coded, generator, recipe_for, task_for
from tests.zoo import role_weights, write_tiny, write_tiny_3d

pytestmark = pytest.mark.usefixtures("quick_weights")

# where the network starts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "tiny_net_r18"
    write_tiny(folder)
    return folder


def test_whole_unet_but_its_last_layer_is_transferred(tiny):
    state = task_for(recipe_for(), tiny).module.state_dict()
    assert len(state["network.decoder.conv0.weight"]) == 4
    golden = {f"network.{role}.{key}": v for role in ("encoder", "decoder") for key, v in role_weights(role).items()}
    for key, value in golden.items():
        if not key.startswith("network.decoder.conv0"):
            assert torch.equal(state[key], value), key


def test_encoder_alone_is_transferred_and_the_rest_is_that_of_scratch(tiny):
    recipe = recipe_for("scannet_unet_r18", "network.transfer=encoder")
    state = task_for(recipe, tiny).module.state_dict()
    scratch = task_for(recipe).module.state_dict()
    encoder = role_weights("encoder")
    for key, value in state.items():
        short = key.removeprefix("network.encoder.")
        assert torch.equal(value, encoder[short] if short != key else scratch[key]), key
    assert not torch.equal(state["network.encoder.conv1.weight"], scratch["network.encoder.conv1.weight"])


def test_checkpoint_without_decoder_gives_its_encoder(tmp_path):
    arch = Arch("resnet", {"depth": 18, "width": 8})
    golden = {}
    write_tiny(
        tmp_path / "lone_r18", "lone_r18", arch=arch, weights={"encoder": role_weights("encoder")}, golden=golden
    )
    task = task_for(recipe_for(), tmp_path / "lone_r18")
    for key, value in role_weights("encoder").items():
        assert torch.equal(task.module.network.encoder.state_dict()[key], value)
    assert task.transferred == "encoder"
    assert task.backbone() is task.module.network.encoder


def test_seed_draws_what_is_new_and_only_that(tiny):
    same, other = (task_for(recipe_for("scannet_unet_r18", f"seed={s}"), tiny).module.state_dict() for s in (0, 1))
    differ = {key for key in same if not torch.equal(same[key], other[key])}
    assert differ == {"network.decoder.conv0.weight", "network.decoder.conv0.bias"}
    scratch = [
        weights_digest(task_for(recipe_for("scannet_unet_r18", f"seed={s}")).module.state_dict()) for s in (0, 0, 1)
    ]
    assert scratch[0] == scratch[1] != scratch[2]


def test_digest_sees_names_shapes_types_and_values():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}
    changed = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"] + 1e-6, "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({weights_digest(weights) for weights in [base, *changed]}) == 6
    assert weights_digest(dict(reversed(base.items()))) == weights_digest(base)


def test_backbones_that_do_not_fit_are_refused(tiny, tmp_path):
    with pytest.raises(
        RecipeError, match=r"encoder 'resnet18', the recipe is for 'resnet50'.*network\.encoder=resnet18"
    ):
        task_for(recipe_for("scannet_unet_r50"), tiny)
    write_tiny_3d(tmp_path / "points")
    with pytest.raises(RecipeError, match="accepted: a ResNet or a U-Net for images"):
        task_for(recipe_for(), tmp_path / "points")
    with pytest.raises(UnknownName, match="pri3d_view_geo_r18"):
        task_for(recipe_for(), "pri3d_view_geo_r81")
    with pytest.raises(RecipeError, match=r"'network\.width' is 8, accepted is 64"):
        task_for(recipe_for("rooms_pspnet_r18", "network.width=8"))
    with pytest.raises(RecipeError, match=r"'network\.width' is 8, accepted for backbone 'imagenet' is 64"):
        task_for(recipe_for(), "imagenet")


def test_imagenet_without_the_file_offers_scratch(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(GeoPretrainError, match=r"Backbone 'imagenet'.*no network.*--backbone scratch"):
        task_for(recipe_for("scannet_unet_r18", "network.width=64"), "imagenet")


@pytest.mark.parametrize("name", ["scannet_unet_r18", "rooms_pspnet_r18"])
def test_imagenet_fills_the_encoder(monkeypatch, name):
    import torchvision

    torch.manual_seed(5)
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(weights))
    task = task_for(recipe_for(name, "network.width=64"), "imagenet")
    encoder = encoder_of(task.module.network).state_dict()
    for key, value in weights.items():
        assert key.startswith("fc.") or torch.equal(encoder[key], value), key
    assert task.backbone() is encoder_of(task.module.network)


# other libraries' networks


@pytest.fixture(scope="module")
def psp():
    return task_for(recipe_for("rooms_pspnet_r18", "data.size=[44, 60]", "optim.head_factor=10"))


def test_host_has_an_output_a_class_and_an_auxiliary_head_in_training(psp):
    batch = psp.collate([psp.sample(coded(), generator(s)) for s in range(2)])
    losses = psp.losses(batch)
    psp.module.train()
    logits, aux = psp.module(batch["image"])
    assert logits.shape == (2, 3, 44, 60), "padded to a multiple of 8 for the host, and cut"
    assert aux.shape == (2, 3, 6, 8)
    psp.module.eval()
    assert psp.module(batch["image"])[1] is None
    assert list(losses) == ["segmentation", "aux"]
    psp.module.train()
    torch.manual_seed(0)
    losses = psp.losses(batch)
    torch.manual_seed(0)
    logits, aux = psp.module(batch["image"])
    assert losses["aux"].item() == pytest.approx(0.4 * segmentation_loss(aux, batch["labels"], 1).item(), rel=1e-5)
    assert losses["segmentation"].item() == pytest.approx(
        segmentation_loss(logits, batch["labels"], 1).item(), rel=1e-5
    )
    (losses["aux"]).backward()
    encoder = encoder_of(psp.module.network)
    assert encoder.layer3[0].conv1.weight.grad.abs().sum() > 0
    assert encoder.layer4[0].conv1.weight.grad is None


def test_padding_leaves_the_logits_of_a_divisible_image_alone(psp):
    psp.module.eval()
    torch.manual_seed(0)
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(psp.module(image)[0], psp.module.network(image))


def test_every_parameter_is_in_one_group_with_its_factor(psp):
    groups = psp.parameter_groups()
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(map(id, listed))) == len(list(psp.module.parameters()))
    factors = {id(parameter): group["factor"] for group in groups for parameter in group["params"]}
    inside = {id(parameter) for parameter in encoder_of(psp.module.network).parameters()}
    for parameter in psp.module.parameters():
        assert factors[id(parameter)] == pytest.approx(1 if id(parameter) in inside else 10)


def test_deeplab_gives_its_backbone_a_tenth():
    task = task_for(recipe_for("rooms_deeplabv3plus_r18", "optim.backbone_factor=0.1", "network.freeze=2"))
    frozen = encoder_of(task.module.network)
    task.module.train()
    assert not frozen.layer1.training or not frozen.layer1[0].bn1.training
    assert not any(parameter.requires_grad for parameter in frozen.layer1.parameters())
    assert sorted(group["factor"] for group in task.parameter_groups()) == pytest.approx([0.1, 1.0])
    assert task.module.aux is None
    logits, aux = task.module.eval()(torch.randn(1, 3, 44, 60))
    assert (logits.shape, aux) == ((1, 3, 44, 60), None)


def test_fcn_of_torchvision_speaks_in_dicts():
    task = task_for(recipe_for("rooms_pspnet_r18", "network.kind=fcn", "network.aux=0"))
    assert task.module.eval()(torch.randn(1, 3, 44, 60))[0].shape == (1, 3, 44, 60)
    assert task.first == 1


@pytest.mark.parametrize("name", ["resnet18", "timm/mobilenetv3_small_050"])
def test_weights_of_a_file_fill_the_encoder_of_every_network(tmp_path, name, quick_weights):
    given = build_encoder(name)
    path = tmp_path / "own.pth"
    plain = {key.removeprefix("model.").replace("blocks_", "blocks."): v for key, v in given.state_dict().items()}
    torch.save({"state_dict": plain | {"classifier.weight": torch.zeros(10, 3)}}, path)
    start = PretrainedInit(f"file:{path}", name)
    unet, have = start.unet(0)
    hosted = encoder_of(start.host(smp.deeplabv3plus, 0, num_classes=3, output_stride=16))
    assert have == "encoder"
    for key, value in given.state_dict().items():
        assert torch.equal(unet.encoder.state_dict()[key], value), key
    assert all(torch.equal(v, plain[k.replace("blocks_", "blocks.")]) for k, v in hosted.state_dict().items())


def test_file_of_another_encoder_is_refused_by_its_name(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "w.pth")
    with pytest.raises(WeightsMismatch, match=r"Backbone 'file:.*w\.pth'"):
        PretrainedInit(f"file:{tmp_path}/w.pth", "resnet18").unet(0)
    with pytest.raises(CheckpointError, match="no such file"):
        PretrainedInit(f"file:{tmp_path}/none.pth", "resnet18").unet(0)


class SwinHost(nn.Module):
    """A host with a small Swin of timm, whose stages give maps [B, H, W, C]."""

    def __init__(self):
        super().__init__()
        shape = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
        self.backbone = timm.create_model(
            "swin_tiny_patch4_window7_224", features_only=True, img_size=(64, 64), **shape
        )
        self.classifier = nn.Conv2d(128, 3, kernel_size=1)

    def forward(self, x):
        return self.classifier(self.backbone(x)[-1].permute(0, 3, 1, 2))


def test_auxiliary_head_of_swin_reads_the_map_of_the_last_stage_but_one():
    torch.manual_seed(0)
    host, aux = SwinHost(), _aux_head(64, 3)
    aux[3] = nn.Identity()  # no dropout, so that a second call gives the same
    images = torch.rand(2, 3, 64, 64)
    host.backbone.eval()
    _, found = Segmenter(host, multiple=1, aux=aux)(images)
    assert found.shape == (2, 3, 4, 4)
    assert torch.allclose(found, aux(host.backbone(images)[2].permute(0, 3, 1, 2)), atol=1e-5)
