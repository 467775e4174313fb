"""Any encoder of timm as a backbone: its maps, Pri3D's U-Net around it, its checkpoint folder, its stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import geo_pretrain as gp
from geo_pretrain import loading
from geo_pretrain.backbones.architectures import Arch, encoder_arch, unet_arch
from geo_pretrain.backbones.build import build, build_encoder
from geo_pretrain.backbones.resnet_unet import UNetDecoder
from geo_pretrain.backbones.timm_encoder import TimmDepthUNet, TimmEncoder, TimmUNet, timm_stages
from geo_pretrain.backbones.timm_names import fitted, timm_contract
from geo_pretrain.checkpoint import CONFIG, read_checkpoint
from geo_pretrain.errors import CheckpointError, InputError, UnknownName, WeightsMismatch
from geo_pretrain.seeding import seeded
from tests.zoo import tiny_timm, write_timm

SMALL = "timm/mobilenetv3_small_050"
VIT = "timm/vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def unet() -> TimmUNet:
    network: TimmUNet = tiny_timm(SMALL, 0)
    return network


@pytest.fixture(scope="module")
def folder(unet: TimmUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timm(tmp_path_factory.mktemp("timm") / "mine_mobilenet", SMALL, unet)


def test_names_say_what_shapes_the_network():
    args = encoder_arch(SMALL).args
    assert args == {
        "name": "mobilenetv3_small_050",
        "maps": [[16, 2], [8, 4], [16, 8], [24, 16], [288, 32]],
        "indices": [0, 1, 2, 3, 4],
        "options": {},
    }
    assert unet_arch(SMALL).encoder_alone == encoder_arch(SMALL)
    assert encoder_arch(f"{SMALL}.lamb_in1k") == encoder_arch(SMALL)  # a tag chooses weights only
    vit = encoder_arch(VIT).args
    assert (vit["maps"], vit["indices"]) == ([[192, 16]] * 4, [2, 5, 8, 11])
    assert vit["options"] == {"img_size": [224, 224], "dynamic_img_size": True, "dynamic_img_pad": True}
    assert unet_arch(SMALL).encoder_name == SMALL
    assert unet_arch(SMALL).host_encoder is None
    assert str(unet_arch(SMALL)) == "timm_unet(out_chans=32, name=mobilenetv3_small_050)"


@pytest.mark.parametrize(
    ("name", "closest"),
    [("timm/convnext_tinny", "timm/convnext_tiny"), (f"{SMALL}.lamb_in1", f"{SMALL}.lamb_in1k"), ("timm/", "timm/")],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, closest: str):
    with pytest.raises(UnknownName, match=closest):
        encoder_arch(name)


def test_maps_are_those_of_timm(unet: TimmUNet):
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    plain = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    plain.load_state_dict({key.removeprefix("model."): value for key, value in unet.encoder.state_dict().items()})
    with torch.no_grad():
        maps = unet.encoder(images)
        for ours, theirs in zip(maps, plain(images), strict=True):
            assert torch.equal(ours, theirs)
        dense, chosen = unet.forward_intermediates(images, [0, -1])
    assert [one.shape[1] for one in maps] == [info["num_chs"] for info in unet.feature_info]
    assert torch.equal(chosen[0], maps[0])
    assert torch.equal(chosen[1], maps[-1])
    assert dense.shape == (2, 32, 32, 48)


def test_the_decoder_joins_maps_of_any_channels_and_strides():
    """Against the same steps written out: 20 channels at 16 and 12 at 4, so 20 -> 8 at 4 (joined), 8 at 2."""
    with seeded(0):
        decoder = UNetDecoder([12, 20], 5, strides=[4, 16], narrowest=8).eval()
    fine, coarse = torch.randn(1, 12, 6, 8), torch.randn(1, 20, 2, 2)

    def step(block: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        left = block.bn1_2(block.conv1_2(F.relu(block.bn1(block.conv1(x)))))
        return F.relu(left + block.bn2(block.conv2(x)))

    x = step(decoder.up1, coarse, (6, 8)) + decoder.join1(fine)
    expected = decoder.conv0(step(decoder.up2, x, (12, 16)))
    assert torch.equal(decoder([fine, coarse]), expected)
    assert decoder.join1.weight.shape == (8, 12, 1, 1)


def test_the_decoder_of_a_resnet_is_that_of_its_released_keys():
    keys = UNetDecoder([64, 128, 256, 512], 32).state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"up1", "up2", "up3", "up4", "conv0"}


def test_a_transformer_takes_images_of_any_size():
    network = build(unet_arch(VIT), decoder=True).eval()
    assert list(network.decoder.steps) == [(16, 2), (16, 1), (16, 0), (8, None), (4, None), (2, None)]
    with torch.no_grad():
        maps = network.encoder(torch.zeros(1, 3, 72, 96))  # a row of patches is filled up
        assert [tuple(one.shape) for one in maps] == [(1, 192, 5, 6)] * 4
        assert network(torch.zeros(1, 3, 72, 96)).shape == (1, 32, 36, 48)
    sizes = [sum(p.numel() for module in part for p in module.parameters()) for _, part in network.encoder.stages()]
    assert sum(sizes) == sum(p.numel() for p in network.encoder.parameters())
    assert len(sizes) == 5
    assert len(set(sizes[1:])) == 1  # twelve equal blocks in four stages
    assert any(
        p is network.encoder.model.model.pos_embed for m in network.encoder.stages()[0][1] for p in m.parameters()
    )


def test_stages_hold_every_parameter_once(unet: TimmUNet):
    names = [name for name, _ in unet.encoder.stages()]
    assert names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    parts = [parameter for _, part in unet.encoder.stages() for module in part for parameter in module.parameters()]
    assert {id(p) for p in parts} == {id(p) for p in unet.encoder.parameters()}
    assert len(parts) == len(list(unet.encoder.parameters()))
    assert [len(part) for _, part in timm_stages(unet.encoder.model)] == [len(p) for _, p in unet.encoder.stages()]


# --- sizes


@pytest.mark.parametrize("name", ["timm/test_convnext2", "timm/test_vit", SMALL])
@pytest.mark.parametrize("size", [(64, 96), (70, 95), (71, 33)])
def test_dense_features_are_half_the_image_rounded_up(name: str, size: tuple[int, int]):
    network = tiny_timm(name, 0)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, plain = network(x), network.decoder([one for one in network.encoder(x) if one.shape[2] < size[0] // 2])
    assert dense.shape == (1, network.out_chans, (size[0] + 1) // 2, (size[1] + 1) // 2)
    height, width = (min(one, other) for one, other in zip(dense.shape[2:], plain.shape[2:], strict=True))
    assert torch.equal(dense[:, :, :height, :width], plain[:, :, :height, :width])
    beyond = dense[:, :, height:, :width]  # of ConvNeXt, which does not look at the last pixels
    assert torch.equal(beyond, plain[:, :, -1:, :width].expand_as(beyond))


@pytest.mark.parametrize(
    ("name", "size", "multiple"),
    [("timm/swin_s3_tiny_224", (70, 96), 32), ("timm/inception_v3", (72, 96), 32), ("timm/tresnet_m", (70, 96), 32)],
)
def test_sides_that_a_network_cannot_take_are_told(name: str, size: tuple[int, int], multiple: int):
    network = build_encoder(name).eval()
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=rf"cannot take images of {size[0]} x {size[1]} .*multiples of"),
    ):
        network(torch.zeros(1, 3, *size))
    with torch.no_grad():
        network(torch.zeros(1, 3, 4 * multiple, 5 * multiple))


@pytest.mark.parametrize("size", [(240, 320), (66, 98)])
def test_the_depth_network_has_the_images_own_size(size: tuple[int, int]):
    network = TimmDepthUNet(**encoder_arch("timm/test_convnext2").args).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, *size)).shape == (1, 16, *size)


@pytest.mark.parametrize(
    "text",
    ["DataLoader worker (pid 5) is killed by signal: Killed.", "can't allocate memory", "Connection closed by peer"],
)
@pytest.mark.parametrize("size", [(240, 320), (256, 320)])
def test_other_faults_of_a_network_stay_what_they_are(text: str, size, unet: TimmUNet, monkeypatch: pytest.MonkeyPatch):
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError(text)

    monkeypatch.setattr(unet.encoder.model, "forward", broken)
    with pytest.raises(RuntimeError) as caught:
        unet(torch.zeros(1, 3, *size))
    assert str(caught.value) == text


def test_a_network_that_no_such_size_fits_gets_no_wrong_advice(unet: TimmUNet, monkeypatch: pytest.MonkeyPatch):
    def broken(x: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(unet.encoder.model, "forward", broken)
    with pytest.raises(InputError, match=r"cannot take images of 256 x 320 .*Other sizes, or another encoder, may do"):
        unet(torch.zeros(1, 3, 256, 320))


# --- the checkpoint folder


def test_a_folder_is_loaded_with_and_without_decoder_and_reproduces_its_golden_values(folder: Path, unet: TimmUNet):
    loaded = gp.load_backbone(folder, decoder=True)
    encoder = gp.load_backbone(folder)
    assert isinstance(loaded, TimmUNet)
    assert isinstance(encoder, TimmEncoder)
    for one, other in ((loaded, unet), (encoder, unet.encoder)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert encoder.load_report.coverage == 1
    assert encoder.contract == timm_contract(SMALL)
    assert encoder.transforms(torch.zeros(3, 50, 70)).shape == (3, 224, 224)
    gp.verify(folder)
    assert read_checkpoint(folder).arch == unet_arch(SMALL)
    assert not any(value.is_meta for value in [*encoder.parameters(), *encoder.buffers()])


def test_maps_channels_and_dilation_are_chosen_on_loading(folder: Path):
    encoder = gp.load_backbone(folder, in_chans=1, out_indices=(1, 3), output_stride=16)
    maps = encoder(torch.zeros(1, 1, 64, 64))
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 16, 16), (24, 4, 4)]
    assert encoder.load_report.reshaped == ("model.conv_stem.weight",)
    with pytest.raises(ValueError, match="numbers from 0 to 4"):
        gp.load_backbone(folder, out_indices=(5,))


def test_another_network_under_the_same_name_is_refused(folder: Path, tmp_path: Path):
    config = json.loads((folder / CONFIG).read_text())
    args = config["arch"]["args"] | {"maps": [[16, 2], [8, 4], [16, 8], [24, 16], [289, 32]]}
    with pytest.raises(CheckpointError, match=rf"timm {timm.__version__} builds .* \[288, 32\]"):
        build(Arch("timm_unet", args))


def test_loading_takes_no_random_numbers(folder: Path):
    state = torch.random.get_rng_state()
    gp.load_backbone(folder)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- weights from elsewhere


def test_weights_of_the_plain_network_fit_and_others_are_refused(unet: TimmUNet):
    plain = timm.create_model("mobilenetv3_small_050")
    given, expected = plain.state_dict(), build_encoder(SMALL).state_dict()
    found = fitted(SMALL, expected, given, "it")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, given[key.removeprefix("model.")]) for key, value in found.items())
    del given["conv_stem.weight"]
    with pytest.raises(WeightsMismatch, match=r"it: 1 of \d+ tensors of the encoder are missing .*conv_stem"):
        fitted(SMALL, expected, given, "it")


def test_names_of_efficientnet_pytorch_fit_in_the_order_of_its_layers():
    """That library counts blocks through all stages; its layers have timm's order, so names are paired by it."""
    plain = timm.create_model("efficientnet_lite0").state_dict()
    given, names = {}, {}
    block = -1
    for key, value in plain.items():
        if key.startswith("blocks."):
            place, part = key.split(".")[1:3], key.split(".")[3]
            if names.get("place") != place:
                block, names = block + 1, {"place": place}
                wide = "blocks.{}.{}.conv_pwl.weight".format(*place) in plain
                narrow = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
                layers = iter(["_expand_conv", "_bn0", *narrow] if wide else narrow)
            if part not in names:
                names[part] = next(layers)
            given[f"_blocks.{block}.{names[part]}.{key.split('.')[4]}"] = value
        else:
            first, rest = key.split(".")
            theirs = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
            given[f"{theirs.get(first, '_fc')}.{rest}"] = value
    expected = build_encoder("timm/efficientnet_lite0").state_dict()
    found = fitted("timm/efficientnet_lite0", expected, given, "it")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, plain[key.removeprefix("model.")]) for key, value in found.items())


def test_load_backbone_takes_names_of_timm(monkeypatch: pytest.MonkeyPatch):
    published = build_encoder(SMALL).state_dict()
    asked: list[str] = []

    def weights(name: str, expected: dict[str, Tensor], otherwise: str) -> dict[str, Tensor]:
        asked.append(name)
        assert expected.keys() == published.keys()
        assert f'load_backbone("{name}", pretrained=False)' in otherwise
        return dict(published)

    monkeypatch.setattr(loading, "timm_weights", weights)
    name = f"{SMALL}.lamb_in1k"
    encoder = gp.load_backbone(name)
    assert asked == [encoder.name] == [name]
    assert encoder.contract == timm_contract(name)
    assert encoder.load_report.loaded == len(published)
    assert all(torch.equal(value, published[key]) for key, value in encoder.state_dict().items())
    wide = gp.load_backbone(name, in_chans=4, out_indices=(1, 2), output_stride=16)
    stem = published[wide.stem]
    assert torch.equal(wide.state_dict()[wide.stem][:, 3], stem.mean(1))
    assert (wide.load_report.reshaped, len(wide.contract.channels)) == ((wide.stem,), 4)
    assert [len(one[0]) for one in wide(torch.rand(1, 4, 64, 64))] == [8, 16]
    asked.clear()
    assert gp.load_backbone(SMALL, pretrained=False).load_report.loaded == len(asked) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": True}, "encoder alone"),
        ({"revision": "main"}, "revision does not go with"),
        ({"in_chans": 0}, "in_chans is 0"),
    ],
)
def test_options_that_timm_s_encoders_do_not_have_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        gp.load_backbone(SMALL, pretrained=False, **options)
