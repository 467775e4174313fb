"""smp's networks with our encoders: same maps, our contract, and the traps on the way."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from geo_pretrain.adapters import smp as adapter
from geo_pretrain.adapters.common import split_options
from geo_pretrain.errors import HubError, MissingDependency, UnknownName, WeightsMismatch
from geo_pretrain.loading import load_backbone
from tests.adapters.conftest import CONTRACT, lively
from tests.zoo import write_tiny, write_tiny_3d

HOSTS = {
    "unet": (smp.Unet, (32, 16, 8)),
    "unetplusplus": (smp.UnetPlusPlus, (32,)),
    "fpn": (smp.FPN, (32,)),
    "upernet": (smp.UPerNet, (32, 16, 8)),
    "pspnet": (smp.PSPNet, (8, 16, 32)),
    "deeplabv3": (smp.DeepLabV3, (16, 8)),
    "deeplabv3plus": (smp.DeepLabV3Plus, (16, 8)),
}
CASES = [(host, stride) for host, (_, strides) in HOSTS.items() for stride in strides]


def images(chans: int = 3, size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.randn(1, chans, *size, generator=torch.Generator().manual_seed(3))


def maps_inside(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the host's decoder is given by its encoder."""
    seen: list[Tensor] = []
    handle = network.encoder.register_forward_hook(lambda module, given, out: seen.extend(out))
    network(x)
    handle.remove()
    return seen


def difference(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return float((value - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("host, stride", CASES)
def test_the_decoder_sees_the_maps_of_the_plain_encoder(r18: Path, host: str, stride: int):
    network = getattr(adapter, host)(r18, num_classes=5, output_stride=stride)
    assert type(network) is HOSTS[host][0]
    assert not network.training
    image, *maps = maps_inside(network, images())
    assert torch.equal(image, images())
    encoder = load_backbone(r18, output_stride=stride)
    for value, expected in zip(maps, encoder(images()), strict=True):
        assert difference(value, expected) < 1e-5
    assert network(images()).shape == (1, 5, 64, 96)


@pytest.mark.parametrize("host", HOSTS)
def test_default_strides_are_the_first_ones_above(host: str):
    assert inspect.signature(getattr(adapter, host)).parameters["output_stride"].default == HOSTS[host][1][0]


@torch.no_grad()
def test_a_resnet50_at_stride_16_in_deeplab():
    network = adapter.deeplabv3plus("pri3d_view_r50", num_classes=4, pretrained=False, in_chans=4)
    lively(network.encoder)
    encoder = load_backbone("pri3d_view_r50", pretrained=False, output_stride=16, in_chans=4)
    encoder.load_state_dict(network.encoder.state_dict())
    for value, expected in zip(maps_inside(network, images(4))[1:], encoder(images(4)), strict=True):
        assert difference(value, expected) < 1e-5
    assert network.preprocessing_params["mean"] == pytest.approx([0.485, 0.456, 0.406, 0.449])
    assert network.preprocessing_params["input_space"] == "R+G+B+extra0"


# --- traps ---


@torch.no_grad()
def test_smps_own_dilation_would_have_given_something_else(r18: Path):
    stride = 16
    ours = adapter.deeplabv3(r18, num_classes=2, output_stride=stride)
    theirs = smp.DeepLabV3("resnet18", encoder_weights=None, encoder_output_stride=stride, classes=2).eval()
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    last, expected = (maps_inside(network, images())[-1] for network in (theirs, ours))
    assert difference(last, expected) > 0.1


def test_the_classifier_in_a_callers_dict_stays(r18: Path, source: nn.Module):
    network = adapter.unet(r18, num_classes=2)
    state = source.state_dict()
    keys = list(state)
    assert keys[-2:] == ["fc.weight", "fc.bias"]
    result = network.encoder.load_state_dict(state)
    assert list(state) == keys
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    theirs = smp.Unet("resnet18", encoder_weights=None).encoder
    theirs.load_state_dict(state)
    assert "fc.weight" not in state  # what smp does
    del state["layer1.0.bn1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        network.encoder.load_state_dict(state)  # as strict as torch: the dict's version travels with the copy
    with pytest.raises(RuntimeError, match="unheard"):
        network.encoder.load_state_dict({**source.state_dict(), "unheard": torch.zeros(1)})


def used_share(network: nn.Module) -> float:
    """Of the encoder's parameters, by gradients."""
    network.train()(images().repeat(2, 1, 1, 1)).square().sum().backward()
    parameters = list(network.encoder.parameters())
    return sum(p.numel() for p in parameters if p.grad is not None) / sum(p.numel() for p in parameters)


def test_pspnet_uses_the_whole_encoder():
    network = adapter.pspnet("pri3d_view_r18", num_classes=3, pretrained=False)
    assert used_share(network) == 1.0
    assert used_share(smp.PSPNet("resnet18", encoder_weights=None, classes=3)) < 0.07
    assert [block.pool_size for block in network.decoder.psp.blocks] == [1, 2, 3, 6]
    assert network.segmentation_head[1].scale_factor == 8
    assert network.decoder.dropout.p == 0.2
    other = adapter.pspnet("pri3d_view_r18", num_classes=3, pretrained=False, psp_dropout=0.1, upsampling=4)
    assert other.decoder.dropout.p == 0.1
    assert other.segmentation_head[1].scale_factor == 4


def test_atrous_rates_follow_the_stride():
    def rates(host: str, **options) -> list[int]:
        network = getattr(adapter, host)("pri3d_view_r18", num_classes=2, pretrained=False, **options)
        convs = [module for module in network.decoder.modules() if isinstance(module, nn.Conv2d)]
        return [conv.dilation[0] for conv in convs if conv.dilation[0] > 1]

    assert rates("deeplabv3") == rates("deeplabv3plus") == [6, 12, 18]
    assert rates("deeplabv3", output_stride=8) == rates("deeplabv3plus", output_stride=8) == [12, 24, 36]
    assert rates("deeplabv3plus", decoder_atrous_rates=(2, 3, 4)) == [2, 3, 4]


@torch.no_grad()
def test_saved_and_built_again_by_smp_it_is_the_same_network(r18: Path, tmp_path: Path):
    network = lively(adapter.deeplabv3(r18, num_classes=3))
    network.save_pretrained(tmp_path / "saved")
    again = smp.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is smp.DeepLabV3
    torch.testing.assert_close(again(images()), network(images()), rtol=0, atol=0)
    text = (tmp_path / "saved" / "config.json").read_text()
    assert '"stored_host_r18"' in text
    assert '"geo-resnet18"' in text


@torch.no_grad()
def test_copies_and_pickles_compute_the_same(r18: Path):
    network = adapter.fpn(r18, num_classes=2, freeze=2, in_chans=1)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images(1)), network(images(1)))
        assert (twin.contract, twin.load_report) == (network.contract, network.load_report)


# --- weights and contract ---


def test_the_contract_is_where_smp_keeps_it_and_beside(r18: Path):
    network = adapter.unet(r18, num_classes=2)
    assert network.contract == CONTRACT
    assert network.load_report.coverage == 1.0
    assert network.preprocessing_params == {
        "input_space": "RGB",
        "input_range": [0.0, 1.0],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    theirs = functools.partial(smp.encoders.preprocess_input, **network.preprocessing_params)(noise)
    torch.testing.assert_close(network.transforms(noise), torch.from_numpy(theirs).permute(2, 0, 1).float())


@pytest.mark.parametrize("host", ["unet", "deeplabv3"])
def test_without_pretrained_only_the_encoder_differs(r18: Path, host: str):
    networks = []
    for pretrained in (True, False):
        torch.manual_seed(5)
        networks.append(getattr(adapter, host)(r18, num_classes=3, pretrained=pretrained))
    states = [network.state_dict() for network in networks]
    assert list(states[0]) == list(states[1])
    same = {key for key, value in states[0].items() if torch.equal(value, states[1][key])}
    assert {key for key in states[0] if not key.startswith("encoder.")} <= same
    convs = {key for key in states[0] if key.startswith("encoder.") and states[0][key].ndim == 4}
    assert len(convs) == 20
    assert not convs & same
    assert networks[0].contract == networks[1].contract
    assert [network.config["_geo_pretrain"]["pretrained"] for network in networks] == [True, False]
    assert (networks[0].load_report.loaded, networks[1].load_report.loaded) == (120, 0)


def test_weights_are_those_of_the_file(r18: Path, source: nn.Module):
    state = adapter.upernet(r18, num_classes=2).encoder.state_dict()
    expected = {key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_where_to_look_device_and_dtype_are_passed_on(r18: Path, tmp_path: Path):
    network = adapter.unet(r18.name, num_classes=2, hub=str(r18.parent), dtype=torch.float64)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    with pytest.raises(HubError):
        adapter.unet("pri3d_view_r18", num_classes=2, hub=str(tmp_path), local_files_only=True, cache_dir=tmp_path)


def test_every_option_that_says_where_to_look_is_passed_on():
    names = ("hub", "revision", "cache_dir", "local_files_only", "in_chans", "strict", "device", "dtype")
    given = dict.fromkeys(names, "given")
    assert split_options("host", given | {"own": 1}, {"own"}, {}) == (given, {"own": 1})


# --- refusals ---


def test_names_and_options_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(UnknownName, match="pri3d_view_r18"):
        adapter.unet("pri3d_veiw_r18", num_classes=2)
    with pytest.raises(
        ValueError, match=r"'csc_100k_srunet34' is a 3D network and smp\.Unet takes images; accepted: .* 'gsc_r50',"
    ):
        adapter.unet("csc_100k_srunet34", num_classes=2, output_stride=8)
    write_tiny_3d(tmp_path / "points")
    with pytest.raises(ValueError, match=r"is a SRUNet; accepted by smp\.FPN"):
        adapter.fpn(tmp_path / "points", num_classes=2)
    write_tiny(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"is a ResNetEncoder of width 8; accepted by smp\.FPN: ResNets of width 64"):
        adapter.fpn(tmp_path / "tiny", num_classes=2)
    name = "pri3d_view_r18"
    with pytest.raises(UnknownName, match=r"Unknown option of smp\.Unet 'decoder_chanels'\. Closest: 'decoder_channe"):
        adapter.unet(name, num_classes=2, decoder_chanels=(8, 8, 8, 8, 8))
    with pytest.raises(ValueError, match="classes: not an option here; use num_classes"):
        adapter.unet(name, num_classes=2, classes=3)
    with pytest.raises(ValueError, match="encoder_depth: not an option here; all stages"):
        adapter.pspnet(name, num_classes=2, encoder_depth=3)
    for value in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"num_classes is .*; accepted: a whole number from 1 up"):
            adapter.unet(name, num_classes=value, pretrained=False)
    with pytest.raises(ValueError, match="output_stride is 16; accepted by this network: 32"):
        adapter.fpn(name, num_classes=2, output_stride=16)
    with pytest.raises(ValueError, match="output_stride is 32; accepted by this network: 16, 8"):
        adapter.deeplabv3(name, num_classes=2, output_stride=32)
    with pytest.raises(ValueError, match="freeze is 6; accepted: 0"):  # before anything is fetched
        adapter.unet(name, num_classes=2, freeze=6)


def test_weights_load_as_a_whole_or_the_call_fails(tmp_path: Path, r18: Path, source: nn.Module):
    from geo_pretrain.catalog import Arch

    weights = {k: v for k, v in source.state_dict().items() if not k.startswith(("fc.", "layer4.1.conv2"))}
    arch = Arch("resnet_unet", {"depth": 18, "width": 64})
    write_tiny(tmp_path / "part", "part_net_r18", arch=arch, weights={"encoder": weights})
    with pytest.raises(WeightsMismatch, match=r"layer4\.1\.conv2"):
        adapter.unet(tmp_path / "part", num_classes=2)
    network = adapter.unet(tmp_path / "part", num_classes=2, strict=False)
    assert network.load_report.fresh == ("layer4.1.conv2.weight",)


def test_without_smp_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    monkeypatch.delitem(sys.modules, "geo_pretrain.adapters.smp")
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[adapters\]'"):
        import geo_pretrain.adapters.smp  # noqa: F401
