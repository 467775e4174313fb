"""load_backbone: a stored checkpoint gives the stored outputs; whatever does not fit is refused with the reason."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from geo_pretrain.backbones.build import build
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError, UnknownName, WeightsMismatch
from geo_pretrain.loading import (
    LoadOptions,
    LoadReport,
    adapt_stem,
    fitting_prefix,
    load_backbone,
    load_pair,
    match,
    verify,
)
from geo_pretrain.sparse import SparseTensor
from tests.zoo import (
    ARCH,
    ARCH_3D,
    CONTRACT_3D,
    golden_3d,
    golden_file,
    role_weights,
    weights_3d,
    write_tiny,
    write_tiny_3d,
)

pytestmark = pytest.mark.usefixtures("quick_weights")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return golden_file()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny_net_r18"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny_net_srunet34"
    write_tiny_3d(folder)
    return folder


@torch.no_grad()
def test_loaded_networks_reproduce_the_released_code(tiny: Path, golden: dict[str, Tensor]):
    encoder, unet = load_backbone(tiny), load_backbone(tiny, decoder=True)
    assert isinstance(encoder, ResNetEncoder)
    assert isinstance(unet, ResNetUNet)
    assert not encoder.training
    assert not unet.training
    maps = encoder(golden["input"])
    assert len(maps) == len(encoder.feature_info) == 5
    for stage in range(1, 5):
        torch.testing.assert_close(maps[stage], golden[f"eval.encoder_out.{stage}"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unet(golden["input"]), golden["eval.out"], rtol=1e-4, atol=1e-5)


def test_a_loaded_network_carries_name_contract_transforms_and_report(tiny: Path):
    encoder = load_backbone(tiny)
    assert encoder.name == "tiny_net_r18"
    assert encoder.contract.size == (64, 96)
    assert encoder.load_report == LoadReport(120, (), (), (), 1.0)
    assert len(encoder.state_dict()) == 120
    text = repr(encoder)
    assert "tiny_net_r18, images: RGB in [0, 1], mean (0.485, 0.456, 0.406)" in text
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8))
    assert encoder.transforms(image).shape == (3, 64, 96)
    twin = copy.deepcopy(encoder)
    assert (twin.contract, twin.name, twin.load_report) == (encoder.contract, encoder.name, encoder.load_report)
    assert pickle.loads(pickle.dumps(encoder.transforms)) == encoder.transforms


def test_weights_can_be_trained_in_place_without_touching_the_file(tiny: Path):
    before = (tiny / "encoder.safetensors").read_bytes()
    encoder = load_backbone(tiny).train()
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    sum(m.mean() for m in encoder(torch.rand(2, 3, 64, 64))).backward()
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    assert (tiny / "encoder.safetensors").read_bytes() == before
    assert not torch.equal(encoder.conv1.weight, load_backbone(tiny).conv1.weight)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_and_out_indices(tiny: Path, output_stride: int):
    encoder = load_backbone(tiny, output_stride=output_stride, out_indices=(1, 3, 4))
    maps = encoder(torch.rand(1, 3, 64, 96))
    assert [info["reduction"] for info in encoder.feature_info] == [4, min(16, output_stride), min(32, output_stride)]
    for value, info in zip(maps, encoder.feature_info, strict=True):
        assert value.shape[2:] == (64 // info["reduction"], 96 // info["reduction"])


def test_device_and_dtype(tiny: Path):
    half = load_backbone(tiny, dtype=torch.bfloat16, device="cpu")
    assert half.conv1.weight.dtype == torch.bfloat16
    assert half.bn1.num_batches_tracked.dtype == torch.int64
    assert load_backbone(tiny, device="meta").conv1.weight.is_meta


def test_an_unfinished_checkpoint_is_loaded_with_a_warning(tmp_path: Path):
    write_tiny(tmp_path / "tiny", finished=False)
    with pytest.warns(UserWarning, match="'tiny_net_r18' is unfinished") as caught:
        load_backbone(tmp_path / "tiny"), load_backbone(tmp_path / "tiny")
    assert [one.filename for one in caught] == [__file__]  # told once


def test_wrong_combinations_are_explained(tiny: Path):
    with pytest.raises(ValueError, match="out_indices chooses maps of the encoder"):
        load_backbone(tiny, decoder=True, out_indices=(0,))
    with pytest.raises(ValueError, match="output_stride is 4; accepted: 8, 16 or 32"):
        load_backbone(tiny, output_stride=4)
    with pytest.raises(ValueError, match="the decoder needs stride 32"):
        load_backbone(tiny, decoder=True, output_stride=8)
    with pytest.raises(ValueError, match="in_chans is 0"):
        load_backbone(tiny, in_chans=0)
    with pytest.raises(UnknownName, match="pri3d_view_geo_r50"):
        load_backbone("pri3d_viewgeo_r50")


# --- networks for points


@torch.no_grad()
def test_a_loaded_3d_network_reproduces_the_released_code_and_carries_its_contract(tiny_3d: Path):
    golden = golden_3d()
    network = load_backbone(tiny_3d)
    assert isinstance(network, SRUNet)
    assert not network.training
    out = network(SparseTensor(golden["coords"], golden["feats"])).feats
    torch.testing.assert_close(out, golden["eval.out"], rtol=1e-4, atol=1e-4)
    assert (network.name, network.contract) == ("tiny_net_srunet34", CONTRACT_3D)
    assert network.load_report == LoadReport(374, (), (), (), 1.0)
    assert "tiny_net_srunet34, voxels: 5 cm, RGB in [0, 1] - 0.5" in repr(network)
    points = (golden["coords"][:1780, 1:] + 0.5) * 0.05
    colors = (golden["feats"][:1780] + 0.5).clamp(0, 1)
    encoded = network.encode_points(points, colors, out="final")
    torch.testing.assert_close(encoded, golden["eval.out"][:1780], rtol=1e-3, atol=1e-3)
    assert network.encode_points(points, colors).shape == (1780, sum(i["num_chs"] for i in network.feature_info))


def test_3d_weights_can_be_trained_in_place_copied_and_moved(tiny_3d: Path):
    network = load_backbone(tiny_3d).train()
    network.encode_points(torch.rand(40, 3), torch.rand(40, 3), out="final").sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    fresh = load_backbone(tiny_3d)
    assert not torch.equal(network.final.kernel, fresh.final.kernel)
    twin = copy.deepcopy(fresh)
    assert (twin.contract, twin.name, twin.load_report) == (fresh.contract, fresh.name, fresh.load_report)
    half = load_backbone(tiny_3d, dtype=torch.bfloat16)
    assert half.encode_points(torch.rand(9, 3), torch.rand(9, 3)).dtype == torch.bfloat16


def test_options_of_image_encoders_are_refused_for_3d_networks(tiny_3d: Path):
    for name in (tiny_3d, "pointcontrast_nce_srunet34"):
        for pretrained in (True, False):
            with pytest.raises(ValueError, match="always comes with its decoder; drop decoder=True"):
                load_backbone(name, decoder=True, pretrained=pretrained)
            with pytest.raises(ValueError, match=r"network.pyramid\(x\)"):
                load_backbone(name, out_indices=(0, 1), pretrained=pretrained)
            with pytest.raises(ValueError, match="shape image encoders"):
                load_backbone(name, output_stride=8, pretrained=pretrained)
            with pytest.raises(ValueError, match="in_chans is 0"):
                load_backbone(name, in_chans=0, pretrained=pretrained)


def test_in_chans_adapts_the_sparse_stem(tiny_3d: Path):
    original = weights_3d()["conv0p1s1.kernel"]
    for chans, names in ((1, ("grey",)), (6, ("R", "G", "B", "extra0", "extra1", "extra2"))):
        network = load_backbone(tiny_3d, in_chans=chans)
        kernel = network.conv0p1s1.kernel
        assert torch.equal(kernel, adapt_stem(original, chans))
        assert kernel.shape == (27, chans, 8)
        assert network.load_report.reshaped == ("conv0p1s1.kernel",)
        assert network.load_report.coverage == 1.0
        assert network.contract.channels == names
        assert network.encode_points(torch.rand(9, 3), torch.rand(9, chans)).shape[0] == 9
    # equal channels give the response that the whole stem gave
    torch.testing.assert_close(adapt_stem(original, 1).sum(dim=1), original.sum(dim=1))


def test_3d_weights_that_do_not_fit_are_refused(tmp_path: Path):
    weights = {f"module.{key}": value for key, value in weights_3d().items()}
    write_tiny_3d(tmp_path / "tiny", weights={"model": weights})
    with pytest.raises(WeightsMismatch, match=r"0 of 374 tensors.*prefix 'module\.'"):
        load_backbone(tmp_path / "tiny")
    write_tiny_3d(tmp_path / "tiny", weights={"heads": weights})
    with pytest.raises(CheckpointError, match="no file with role 'model'; it has: heads"):
        load_backbone(tmp_path / "tiny")
    write_tiny_3d(tmp_path / "tiny", arch=Arch("sr_unet", {"depth": 18}))
    with pytest.raises(CheckpointError, match="depth"):
        load_backbone(tmp_path / "tiny")


# --- the stem


def test_stem_channels_slow_twin():
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    for chans in (1, 2, 3, 4, 6):
        adapted = adapt_stem(weight, chans)
        assert adapted.shape == (4, chans, 2, 2)
        for out in range(4):
            for i in range(2):
                for j in range(2):
                    old = [float(weight[out, c, i, j]) for c in range(3)]
                    if chans <= 3:
                        expected = [old[c] + sum(old[chans:]) / chans for c in range(chans)]
                    else:
                        expected = old + [sum(old) / 3] * (chans - 3)
                    assert adapted[out, :, i, j].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("chans", [1, 2, 3])
def test_gray_images_give_the_same_response_with_fewer_channels(chans: int):
    weight = torch.randn(5, 3, 7, 7)
    gray = torch.rand(1, 1, 20, 20)
    expected = F.conv2d(gray.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(F.conv2d(gray.expand(-1, chans, -1, -1), adapt_stem(weight, chans)), expected)


@pytest.mark.parametrize("decoder", [False, True])
def test_in_chans_adapts_stem_contract_and_report(tiny: Path, decoder: bool):
    stem = "encoder.conv1.weight" if decoder else "conv1.weight"
    original = role_weights("encoder")["conv1.weight"]
    gray = load_backbone(tiny, in_chans=1, decoder=decoder)
    assert torch.equal(gray.state_dict()[stem], adapt_stem(original, 1))
    assert gray.load_report.reshaped == (stem,)
    assert gray.load_report.coverage == 1.0
    assert gray.contract.channels == ("grey",)
    assert gray.transforms(Image.new("RGB", (40, 40))).shape == (1, 64, 96)
    four = load_backbone(tiny, in_chans=4, decoder=decoder)
    assert torch.equal(four.state_dict()[stem][:, :3], original)
    assert four.contract.channels == ("R", "G", "B", "extra0")
    assert len(four.contract.mean) == 4
    same = load_backbone(tiny, in_chans=3, decoder=decoder)
    assert same.load_report.reshaped == ()


def test_images_with_other_channels_get_a_hint(tiny: Path):
    with pytest.raises(ValueError, match="Load with in_chans=4"):
        load_backbone(tiny)(torch.rand(1, 4, 64, 64))


# --- what does not fit


def test_wrong_prefix_is_refused_and_the_message_names_it(tmp_path: Path):
    weights = {f"backbone.encoder.{key}": value for key, value in role_weights("encoder").items()}
    write_tiny(tmp_path / "tiny", weights={"encoder": weights})
    with pytest.raises(WeightsMismatch) as caught:
        load_backbone(tmp_path / "tiny")
    total = len(weights)
    for part in (f"0 of {total} tensors", "coverage 0%", "prefix 'backbone.encoder.'", f"{total} of {total}"):
        assert part in str(caught.value)
    with pytest.raises(WeightsMismatch):
        load_backbone(tmp_path / "tiny", strict=False)


def test_one_missing_or_extra_tensor_stops_a_strict_load_and_is_reported_by_a_lenient_one(tmp_path: Path):
    weights = role_weights("encoder")
    del weights["layer4.1.bn2.weight"]
    weights["fc.bias"] = torch.zeros(3)
    write_tiny(tmp_path / "tiny", weights={"encoder": weights})
    with pytest.raises(WeightsMismatch, match=r"'layer4\.1\.bn2\.weight'.*Not used: 'fc\.bias'"):
        load_backbone(tmp_path / "tiny")
    encoder = load_backbone(tmp_path / "tiny", strict=False)
    report = encoder.load_report
    assert (report.fresh, report.dropped) == (("layer4.1.bn2.weight",), ("fc.bias",))
    assert report.coverage == pytest.approx(report.loaded / (report.loaded + 1))
    assert torch.equal(encoder.layer4[1].bn2.weight, torch.ones(64))  # a real start, not left-over memory
    assert torch.equal(encoder.conv1.weight, weights["conv1.weight"])


def test_another_shape_is_missing_and_not_used(tmp_path: Path):
    weights = role_weights("encoder") | {"conv1.weight": torch.zeros(8, 3, 3, 3)}
    write_tiny(tmp_path / "tiny", weights={"encoder": weights})
    with pytest.raises(WeightsMismatch, match=r"another shape: 'conv1\.weight'\. Not used: 'conv1\.weight'"):
        load_backbone(tmp_path / "tiny")


@pytest.mark.parametrize(("kept", "accepted"), [(0.95, True), (0.85, False)])
def test_ninety_percent_is_the_limit_without_strict(tmp_path: Path, kept: float, accepted: bool):
    weights = role_weights("encoder")
    for key in list(weights)[int(len(weights) * kept) :]:
        del weights[key]
    write_tiny(tmp_path / "tiny", weights={"encoder": weights})
    if accepted:
        assert load_backbone(tmp_path / "tiny", strict=False).load_report.coverage > 0.9
    else:
        with pytest.raises(WeightsMismatch, match="at least 90% is accepted"):
            load_backbone(tmp_path / "tiny", strict=False)


def test_an_altered_file_is_refused(tmp_path: Path):
    write_tiny(tmp_path / "tiny")
    path = tmp_path / "tiny/encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DigestMismatch, match=r"encoder\.safetensors: sha256 is"):
        load_backbone(tmp_path / "tiny")


def test_arguments_that_do_not_fit_the_architecture_are_refused(tmp_path: Path):
    write_tiny(tmp_path / "tiny", arch=Arch("resnet_unet", {"depth": 18, "breadth": 8}))
    with pytest.raises(CheckpointError, match="breadth"):
        load_backbone(tmp_path / "tiny")


def test_an_encoder_only_checkpoint_has_no_decoder(tmp_path: Path):
    write_tiny(tmp_path / "tiny", weights={"encoder": role_weights("encoder")})
    assert load_backbone(tmp_path / "tiny").load_report.coverage == 1.0
    with pytest.raises(CheckpointError, match="no file with role 'decoder'"):
        load_backbone(tmp_path / "tiny", decoder=True)


# --- pure parts


def test_matching_slow_twin():
    generator = torch.Generator().manual_seed(0)
    expected = {f"k{i}": torch.zeros(int(torch.randint(1, 4, (), generator=generator))) for i in range(30)}
    given = {f"k{i}": torch.zeros(int(torch.randint(1, 4, (), generator=generator))) for i in range(15, 45)}
    fits, fresh, dropped = match(expected, given)
    slow = []
    for key in expected:
        for other in given:
            if key == other and len(expected[key]) == len(given[other]):
                slow.append(key)
    assert 0 < len(slow) < 15
    assert list(fits) == slow
    assert set(fresh) == set(expected) - set(slow)
    assert set(dropped) == set(given) - set(slow)


def test_the_prefix_that_fits_most_is_found():
    expected = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight"]
    given = [f"module.net.{key}" for key in expected] + ["other.bn1.weight", "module.fc.weight"]
    assert fitting_prefix(expected, given) == ("module.net.", 3)
    assert fitting_prefix(expected, ["x", "y.z"]) == ("", 0)
    assert fitting_prefix(expected, expected[:2]) == ("", 0)  # fits as it is
    # a key may contain itself: layer1.0.conv1.weight ends in conv1.weight
    assert fitting_prefix(expected, ["a.layer1.0.conv1.weight", "a.bn1.weight"]) == ("a.", 2)


# --- every name of the catalog


@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.modality == "2d"])
def test_every_image_entry_builds_and_matches_its_feature_info(name: str):
    entry = CATALOG[name]
    with torch.device("meta"):
        encoder = load_backbone(name, pretrained=False)
        maps = encoder(torch.empty(1, 3, 64, 96))
    assert encoder.name == name
    assert encoder.contract == entry.contract
    assert encoder.load_report.loaded == 0
    assert encoder.load_report.fresh == tuple(encoder.state_dict())
    for value, info in zip(maps, encoder.feature_info, strict=True):
        assert value.shape == (1, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
    if entry.arch.name == "resnet":
        with pytest.raises(ValueError, match="encoder alone"):
            load_backbone(name, pretrained=False, decoder=True)
        return
    with torch.device("meta"):
        unet = load_backbone(name, pretrained=False, decoder=True)
        dense = unet(torch.empty(1, 3, 64, 96))
    size = (64, 96) if entry.arch.name == "resnet_depth_unet" else (32, 48)
    assert dense.shape == (1, entry.arch.args["out_chans"], *size)


@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.modality == "3d"])
def test_every_3d_entry_builds_and_takes_what_its_contract_says(name: str):
    with torch.device("meta"):
        network = load_backbone(name, pretrained=False)
    entry = CATALOG[name]
    assert isinstance(network, SRUNet)
    assert (network.name, network.contract) == (name, entry.contract)
    assert network.in_chans == len(entry.contract.channels)
    assert network.conv0p1s1.kernel.shape[1] == network.in_chans
    assert network.final.kernel.shape == (96, entry.arch.args["out_chans"])
    assert network.load_report.fresh == tuple(network.state_dict())
    widths = {"34C": [96, 96, 128, 256, 256], "18A": [96, 96, 128, 128, 256]}
    assert [info["num_chs"] for info in network.feature_info] == widths[entry.arch.args["variant"]]


def test_names_without_a_file_say_how_to_get_one():
    with pytest.raises(HubError, match=r"geo-pretrain train pri3d_view_r18\.rooms_toy --out DIR") as caught:
        load_backbone("pri3d_view_r18.rooms_toy")
    first, _, second, third = str(caught.value).splitlines()
    assert first == "'pri3d_view_r18.rooms_toy' could not be loaded:"
    assert second.startswith('Without a network: load_backbone("pri3d_view_r18.rooms_toy", pretrained=False) builds')
    assert third.startswith("To get its weights: make it with `geo-pretrain train")


def test_names_of_a_hub_need_not_be_in_the_catalog(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_backbone("tiny_net_r18", hub=str(tiny.parent)).name == "tiny_net_r18"
    monkeypatch.setenv("GEO_PRETRAIN_HUB", str(tiny.parent))
    assert load_backbone("tiny_net_r18").name == "tiny_net_r18"
    fresh = load_backbone("tiny_net_r18", pretrained=False)
    assert (fresh.width, fresh.load_report.loaded) == (8, 0)


# --- verify


def test_verify_recomputes_the_golden_outputs(tiny: Path):
    result = verify(tiny)
    assert result.passed
    assert set(result.errors) == {"decoder", "encoder.1", "encoder.2", "encoder.3", "encoder.4"}
    assert max(result.errors.values()) < 1e-5


def test_verify_notices_weights_that_do_not_belong_to_the_golden_outputs(tmp_path: Path):
    decoder = role_weights("decoder")
    decoder["conv0.bias"] = decoder["conv0.bias"] + 0.01
    write_tiny(tmp_path / "tiny", weights={"encoder": role_weights("encoder"), "decoder": decoder})
    with pytest.raises(CheckpointError, match="golden outputs are not reproduced"):
        verify(tmp_path / "tiny")


def test_verify_recomputes_the_golden_output_of_a_3d_network(tmp_path: Path):
    write_tiny_3d(tmp_path / "tiny")
    result = verify(tmp_path / "tiny")
    assert result.passed
    assert set(result.errors) == {"output"}
    assert result.errors["output"] < 1e-5
    weights = weights_3d()
    kernel = weights["block4.5.conv2.kernel"]
    weights["block4.5.conv2.kernel"] = kernel.flip(0)  # the right numbers in the wrong places
    write_tiny_3d(tmp_path / "tiny", weights={"model": weights})
    with pytest.raises(CheckpointError, match="golden outputs are not reproduced"):
        verify(tmp_path / "tiny")


def test_architectures_of_the_catalog_are_buildable_by_name():
    assert isinstance(build(ARCH), ResNetEncoder)
    assert isinstance(build(ARCH, decoder=True), ResNetUNet)
    assert isinstance(build(ARCH_3D), SRUNet)


@pytest.mark.parametrize("write", [write_tiny, write_tiny_3d])
def test_copies_and_pickles_of_a_network_hold_no_paths(write, tmp_path: Path):
    secret = tmp_path / "secret_place"
    network = load_backbone(write(secret / "tiny").folder, hub=[str(secret)], cache_dir=secret / "cache")
    stream = io.BytesIO()
    torch.save(network, stream)
    state = io.BytesIO()
    torch.save(network.state_dict(), state)
    for data in (pickle.dumps(network), pickle.dumps(copy.deepcopy(network)), stream.getvalue(), state.getvalue()):
        assert len(data) > 10_000
        assert b"secret_place" not in data
    again = pickle.loads(pickle.dumps(network))
    assert (again.name, again.contract, again.load_report) == (network.name, network.contract, network.load_report)


def test_the_former_pair_says_where_it_went_and_why_a_copy_has_none(tmp_path: Path):
    network = load_backbone(write_tiny(tmp_path / "tiny").folder)
    with (
        pytest.warns(FutureWarning, match=r"now geo_pretrain\.load_pair"),
        pytest.raises(CheckpointError, match="alone"),
    ):
        network.pair()
    for other in (copy.deepcopy(network), type(network)(18, width=8)):
        with pytest.warns(FutureWarning), pytest.raises(RuntimeError, match="built by hand, copied or unpickled"):
            other.pair()
    with pytest.raises(CheckpointError, match="holds one network alone"):
        load_pair(tmp_path / "tiny")


def test_options_that_do_not_exist_are_named_and_help_shows_those_that_do(tiny: Path):
    for function in (load_backbone, load_pair, verify):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'pretraind'"):
            function(tiny, pretraind=True)
    assert set(LoadOptions.__annotations__) | {"name_or_folder", "decoder"} == set(
        inspect.signature(load_backbone).parameters
    )
