"""timm and segmentation-models-pytorch give our weights under our names: same maps, same contract, no half-loads."""

from __future__ import annotations

import copy
import functools
import http.server
import importlib
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from geo_pretrain.adapters import timm as adapter
from geo_pretrain.backbones.resnet_unet import ResNetEncoder
from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.errors import DigestMismatch, HubError, MissingDependency, UnknownName, WeightsMismatch
from geo_pretrain.loading import load_backbone
from tests.forked import Forked, import_anew
from tests.zoo import as_tiny, write_tiny

NAMES = [entry.name for entry in CATALOG.values() if entry.modality == "2d"]
TAPS = ["relu", "layer1", "layer2", "layer3", "layer4"]


def theirs(depth: int, seed: int) -> nn.Module:
    """torchvision's network with random weights and norms that do something."""
    torch.manual_seed(seed)
    network = getattr(torchvision.models, f"resnet{depth}")(num_classes=1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return network.eval()


def write(folder: Path, network: nn.Module, depth: int, **changes) -> None:
    weights = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    arch = Arch("resnet_unet", {"depth": depth, "width": 64})
    write_tiny(folder, folder.name, arch=arch, weights={"encoder": weights}, **changes)


SOURCES = {"pri3d_view_r18": (18, 0), "pri3d_view_r18.rooms_toy": (18, 1), "pri3d_view_r50.kitti": (50, 2)}


@pytest.fixture(scope="module")
def sources() -> dict[str, nn.Module]:
    return {name: theirs(*how) for name, how in SOURCES.items()}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, nn.Module]) -> Path:
    """A hub with three real encoders, one of another width and one whose file was altered."""
    base = tmp_path_factory.mktemp("hub")
    for name, network in sources.items():
        write(base / name, network, SOURCES[name][0], contract=CATALOG[name].contract)
    write_tiny(base / "pri3d_geo_r18", "pri3d_geo_r18")
    write_tiny(base / "pri3d_view_geo_r18", "pri3d_view_geo_r18")
    altered = base / "pri3d_view_geo_r18" / "encoder.safetensors"
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    return base


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, shelf: Path) -> Path:
    monkeypatch.setenv("GEO_PRETRAIN_HUB", str(shelf))
    tiny = {name: as_tiny(name) for name in ("pri3d_geo_r18", "pri3d_view_geo_r18")}
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | tiny)
    return shelf


def images(chans: int = 3, size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.randn(1, chans, *size, generator=torch.Generator().manual_seed(3))


def assert_equal_maps(maps, expected) -> None:
    assert len(maps) == len(expected)
    for value, other in zip(maps, expected, strict=True):
        assert value.shape == other.shape
        assert float((value - other).abs().max() / other.abs().max()) < 1e-5


# --- names ---


@pytest.mark.parametrize("name", NAMES)
def test_every_2d_name_is_a_timm_network_with_our_maps_and_contract(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG)
    entry = CATALOG[name]
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
        encoder = ResNetEncoder(entry.arch.args["depth"])
    for key, of_ours in (("channels", "num_chs"), ("reduction", "reduction")):
        assert getattr(model.feature_info, key)() == [info[of_ours] for info in encoder.feature_info]
    expected = {k: v.shape for k, v in encoder.state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == expected
    assert model.contract == entry.contract
    config = timm.data.resolve_model_data_config(model)
    assert config == {
        "input_size": (3, *entry.contract.size),
        "mean": entry.contract.mean,
        "std": entry.contract.std,
        "interpolation": entry.contract.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.architecture, cfg.tag or "") == tuple(name.partition(".")[::2])
    assert (cfg.license, cfg.first_conv, cfg.classifier) == (entry.license.weights, "conv1", "fc")
    assert name in timm.list_pretrained()
    # smp decides by parts of a name what it does to the maps
    assert not any(word in name for word in ("dla", "tresnet"))


def test_the_sweep_sees_the_catalog():
    assert len(NAMES) >= 29
    assert {CATALOG[name].arch.args["depth"] for name in NAMES} == {18, 50}


def test_a_fresh_process_lists_exactly_the_2d_names_and_neither_asks_a_hub_nor_loads_a_second_time():

    def work() -> None:
        import_anew("geo_pretrain", "timm")
        import timm

        before = set(timm.list_pretrained()), set(timm.list_models())
        import geo_pretrain.adapters.timm as adapter

        added = set(timm.list_pretrained()) - before[0]
        print(*sorted(added))
        models = set(timm.list_models()) - before[1]
        assert models == {name.partition(".")[0] for name in added} == set(timm.list_models(module="timm"))
        warnings.simplefilter("error")
        importlib.reload(adapter)
        assert set(timm.list_pretrained()) - before[0] == added
        print(*timm.list_models("pri3d_view_r18*", pretrained=True))
        default = timm.get_pretrained_cfg("pri3d_view_r50").tag
        print(default, adapter.pri3d_view_r50 is timm.model_entrypoint("pri3d_view_r50"))

    process = Forked(work, {"GEO_PRETRAIN_HUB": "http://127.0.0.1:9"})  # where nobody answers
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    added, some, default = printed.splitlines()
    assert added.split() == sorted(NAMES)
    assert some.split() == [name for name in timm.list_pretrained() if name.startswith("pri3d_view_r18")]
    assert default == "None True"  # the untagged name is the one of ScanNet


def test_without_timm_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match=r"'timm', .*: pip install 'geo_pretrain\[adapters\]'"):
        importlib.reload(adapter)


@pytest.fixture
def forget() -> Iterator[None]:
    """Names registered by a test leave timm again."""
    entrypoints = timm.models._registry._model_entrypoints
    before = set(entrypoints)
    yield
    for name in set(entrypoints) - before:
        timm.models._registry._clear_model_entries(name)
        del entrypoints[name]
        adapter.default_cfgs.pop(name, None)


def test_a_bare_name_whose_weights_all_have_tags_stands_for_none(forget, monkeypatch: pytest.MonkeyPatch):
    arch = Arch("resnet", {"depth": 50})
    entries = [replace(CATALOG["pri3d_view_r50"], name=f"pri3d_other_r50.{tag}", arch=arch) for tag in "ba"]
    monkeypatch.setattr(adapter, "CATALOG", {entry.name: entry for entry in entries})
    adapter.register()
    assert timm.list_pretrained("pri3d_other*") == ["pri3d_other_r50.a", "pri3d_other_r50.b"]
    with torch.device("meta"):
        assert timm.create_model("pri3d_other_r50").num_features == 2048
        with pytest.raises(UnknownName, match="'pri3d_other_r50' alone is an architecture; weights need a tag"):
            timm.create_model("pri3d_other_r50", pretrained=True)


def test_the_untagged_name_is_the_default_wherever_the_catalog_has_it(forget, monkeypatch: pytest.MonkeyPatch):
    kitti, scannet = CATALOG["pri3d_view_r50.kitti_180"], CATALOG["pri3d_view_r50"]
    entries = [replace(kitti, name="pri3d_other_r50.a"), replace(scannet, name="pri3d_other_r50")]
    monkeypatch.setattr(adapter, "CATALOG", {entry.name: entry for entry in entries})
    adapter.register()
    assert timm.get_pretrained_cfg("pri3d_other_r50").license == scannet.license.weights
    assert timm.get_pretrained_cfg("pri3d_other_r50.a").license == kitti.license.weights


def test_renamed_names_give_the_new_one_and_a_warning(forget, monkeypatch: pytest.MonkeyPatch):
    renamed = {"pri3d_old_r18": "pri3d_view_r18.rooms_toy", "pri3d_old_r18.tag": "pri3d_view_r18", "old_3d": "csc_3d"}
    monkeypatch.setattr(adapter, "RENAMED", renamed)
    adapter.register()
    with pytest.warns(UserWarning, match="pri3d_old_r18 to current pri3d_view_r18.rooms_toy"):
        model = timm.create_model("pri3d_old_r18", pretrained=True, features_only=True)
    assert model.contract == CATALOG["pri3d_view_r18.rooms_toy"].contract
    assert not timm.list_models("pri3d_old*")
    assert timm.models._registry.get_deprecated_models("timm") == {"pri3d_old_r18": "pri3d_view_r18.rooms_toy"}


def test_a_name_cannot_stand_for_two_depths(forget, monkeypatch: pytest.MonkeyPatch):
    one = replace(CATALOG["pri3d_view_r18"], name="pri3d_other_r50")
    two = replace(CATALOG["pri3d_view_r50"], name="pri3d_other_r50.a")
    monkeypatch.setattr(adapter, "CATALOG", {one.name: one, two.name: two})
    with pytest.raises(ValueError, match=r"'pri3d_other_r50' stands for the encoders \['resnet18', 'resnet50'\]"):
        adapter.register()
    assert not timm.is_model("pri3d_other_r50")


def test_networks_timm_cannot_build_stay_out(forget, monkeypatch: pytest.MonkeyPatch):
    narrow = replace(CATALOG["pri3d_view_r18"], name="pri3d_other_r18", arch=Arch("resnet", {"depth": 18, "width": 8}))
    points = replace(CATALOG["csc_100k_srunet34"], name="csc_other_srunet34", arch=Arch("sr_unet"))
    monkeypatch.setattr(adapter, "CATALOG", {entry.name: entry for entry in (narrow, points)})
    adapter.register()
    assert not timm.is_model("pri3d_other_r18")
    assert not timm.is_model("csc_other_srunet34")


# --- weights ---


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def test_maps_are_those_of_the_network_that_the_weights_came_from(sources: dict[str, nn.Module], name: str):
    model = timm.create_model(name, pretrained=True, features_only=True)
    assert model.training  # as timm's are
    expected = create_feature_extractor(sources[name], TAPS)(images())
    assert_equal_maps(model.eval()(images()), list(expected.values()))
    assert model.load_report.coverage == 1.0
    assert model.load_report.fresh == ()


@torch.no_grad()
@pytest.mark.parametrize(
    "name, options",
    [
        ("pri3d_view_r18", {"in_chans": 1}),
        ("pri3d_view_r18", {"in_chans": 4}),
        ("pri3d_view_r18", {"in_chans": 4, "output_stride": 16}),
        ("pri3d_view_r50.kitti", {"output_stride": 8}),
    ],
)
def test_options_give_what_they_give_in_load_backbone(name: str, options: dict[str, int]):
    model = timm.create_model(name, pretrained=True, features_only=True, **options).eval()
    encoder = load_backbone(name, **options)
    assert model.feature_info.reduction() == [info["reduction"] for info in encoder.feature_info]
    x = images(options.get("in_chans", 3))
    assert_equal_maps(model(x), encoder(x))
    assert model.load_report.reshaped == (("conv1.weight",) if "in_chans" in options else ())


@torch.no_grad()
def test_a_gray_image_in_one_channel_gives_what_it_gives_in_three(sources: dict[str, nn.Module]):
    model = timm.create_model("pri3d_view_r18", pretrained=True, features_only=True, in_chans=1).eval()
    gray = images(1)
    expected = create_feature_extractor(sources["pri3d_view_r18"], TAPS)(gray.expand(-1, 3, -1, -1))
    assert_equal_maps(model(gray), list(expected.values()))


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", ["dict", "hook", "fx", "getter"])
def test_weights_are_in_whatever_way_timm_takes_the_maps(sources: dict[str, nn.Module], feature_cls: str):
    model = timm.create_model(
        "pri3d_view_r18", pretrained=True, features_only=True, feature_cls=feature_cls, out_indices=(1, 3)
    )
    maps = model.eval()(images())
    expected = create_feature_extractor(sources["pri3d_view_r18"], TAPS)(images())
    assert_equal_maps(list(maps.values() if isinstance(maps, dict) else maps), [expected["layer1"], expected["layer3"]])
    assert model.contract == CATALOG["pri3d_view_r18"].contract


@torch.no_grad()
def test_a_classifier_is_fresh_and_the_rest_is_loaded(sources: dict[str, nn.Module]):
    model = timm.create_model("pri3d_view_r18", pretrained=True, num_classes=10).eval()
    assert isinstance(model, timm.models.ResNet)
    assert model.load_report.fresh == ("fc.weight", "fc.bias")
    assert model.load_report.loaded == 120
    assert model(images()).shape == (1, 10)
    expected = create_feature_extractor(sources["pri3d_view_r18"], ["flatten"])(images())["flatten"]
    assert_equal_maps([model.forward_head(model.forward_features(images()), pre_logits=True)], [expected])
    pooled = timm.create_model("pri3d_view_r18", pretrained=True).eval()
    assert_equal_maps([pooled(images())], [expected])


@torch.no_grad()
def test_two_names_at_once_have_their_own_weights(sources: dict[str, nn.Module]):
    names = ["pri3d_view_r18", "pri3d_view_r18.rooms_toy"]
    models = [timm.create_model(name, pretrained=True, features_only=True).eval() for name in names]
    for name, model in zip(names, models, strict=True):
        expected = create_feature_extractor(sources[name], TAPS)(images())
        assert_equal_maps(model(images()), list(expected.values()))
    by_tag = timm.create_model("pri3d_view_r18", pretrained=True, pretrained_cfg="rooms_toy")
    assert torch.equal(by_tag.conv1.weight, models[1].conv1.weight)


def test_without_pretrained_nothing_is_loaded(sources: dict[str, nn.Module]):
    model = timm.create_model("pri3d_view_r18")
    assert model.load_report is None
    assert not torch.equal(model.conv1.weight, sources["pri3d_view_r18"].conv1.weight)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_copies_pickles_and_scripts_compute_the_same():
    model = timm.create_model("pri3d_view_r18", pretrained=True, features_only=True, in_chans=4).eval()
    expected = model(images(4))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_maps(twin(images(4)), expected)
        assert (twin.contract, twin.load_report) == (model.contract, model.load_report)
    assert_equal_maps(torch.jit.script(model)(images(4)), expected)
    whole = timm.create_model("pri3d_view_r18", pretrained=True, num_classes=2).eval()
    twin = pickle.loads(pickle.dumps(whole))
    assert_equal_maps([twin(images())], [whole(images())])


def test_timms_own_function_loads_them_again(sources: dict[str, nn.Module]):
    model = timm.create_model("pri3d_view_r18", num_classes=3)
    timm.models.load_pretrained(model, num_classes=3)
    assert torch.equal(model.conv1.weight, sources["pri3d_view_r18"].conv1.weight)


def test_the_arguments_that_timms_scripts_resolve_give_the_same_network():
    arguments = timm.models.resolve_model_input_args("pri3d_view_r18.rooms_toy", in_chans=4)
    model = timm.create_model(pretrained=True, **arguments)
    again = timm.create_model("pri3d_view_r18.rooms_toy", pretrained=True, in_chans=4)
    assert torch.equal(model.conv1.weight, again.conv1.weight)
    assert model.contract == again.contract


def test_weights_the_caller_names_are_timms_to_load(tmp_path: Path):
    other = theirs(18, 9)
    save_file({k: v for k, v in other.state_dict().items() if not k.startswith("fc.")}, tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    model = timm.create_model("pri3d_view_r18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv1.weight, other.conv1.weight)
    assert model.load_report is None
    assert model.contract is None


def test_the_cache_folder_is_used(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=shelf))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GEO_PRETRAIN_HUB", f"http://127.0.0.1:{server.server_port}")
    try:
        timm.create_model("pri3d_view_r18")
        assert asked == []
        timm.create_model("pri3d_view_r18", pretrained=True, cache_dir=tmp_path / "cache")
        assert sorted(path.rpartition("/")[2] for path in asked) == ["config.json", "encoder.safetensors"]
        count = len(asked)
        timm.create_model("pri3d_view_r18", pretrained=True, features_only=True, cache_dir=tmp_path / "cache")
        assert len(asked) == count
    finally:
        server.shutdown()
        server.server_close()
    assert [path.parent.name for path in (tmp_path / "cache").rglob("encoder.safetensors")] == ["pri3d_view_r18"]


# --- contract ---


@pytest.mark.parametrize("size", [(61, 200), (480, 640), (300, 90)])
@pytest.mark.parametrize("name, levels", [("pri3d_view_r50.kitti_180", 0), ("moco_v2_unsup_in_sn_r50", 1)])
def test_timms_transform_is_ours(name: str, levels: int, size: tuple[int, int]):
    """Where pixels are mixed, timm rounds them to one of 256 levels again, and we do not."""
    noise = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    image = Image.fromarray(noise.numpy())
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert CATALOG[name].contract.interpolation == ("bilinear" if levels else "nearest")
    tolerance = 1e-5 + levels / 255 / min(model.contract.std)
    torch.testing.assert_close(transform(image), model.contract.transforms()(image), rtol=0, atol=tolerance)


@pytest.mark.parametrize("pretrained", [False, True])
def test_other_channels_have_statistics_too(pretrained: bool):
    model = timm.create_model("pri3d_view_r18", pretrained=pretrained, in_chans=4)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (4, 240, 320)
    assert config["mean"] == pytest.approx((0.485, 0.456, 0.406, 0.449))
    assert config["std"] == pytest.approx((0.229, 0.224, 0.225, 0.226))
    assert len(model.contract.channels) == 4
    assert timm.get_pretrained_cfg("pri3d_view_r18").input_size == (3, 240, 320)  # others see the plain one


def test_what_the_caller_says_of_the_data_stays():
    overlay = {"mean": (0.5, 0.5, 0.5, 0.5), "crop_pct": 0.9}
    model = timm.create_model("pri3d_view_r18", in_chans=4, pretrained_cfg_overlay=overlay)
    config = timm.data.resolve_model_data_config(model)
    assert (config["mean"], config["crop_pct"], len(config["std"])) == ((0.5,) * 4, 0.9, 4)


# --- refusals ---


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        (
            "pri3d_geo_r18",
            {},
            WeightsMismatch,
            r"0 of 120 .* conv1.weight \[64, 3, 7, 7\].* conv1.weight \[8, 3, 7, 7\]",
        ),
        ("pri3d_view_r18", {"stem_type": "deep", "stem_width": 32}, WeightsMismatch, "Accepted: ResNets of width 64"),
        ("pri3d_view_r18", {"layers": (2, 2, 2, 1)}, WeightsMismatch, r"Here: nothing. There instead: layer4.1.conv1"),
        ("pri3d_view_geo_r18", {}, DigestMismatch, "sha256"),
        ("pri3d_view_geo_r50", {}, HubError, "'pri3d_view_geo_r50' could not be loaded"),
    ],
)
def test_what_does_not_fit_or_is_not_there_stops(
    name: str, options: dict, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=message):
        timm.create_model(name, pretrained=True, **options)


def test_the_meta_device_holds_no_weights():
    with torch.device("meta"), pytest.raises(ValueError, match="meta device, which holds no values"):
        timm.create_model("pri3d_view_r18", pretrained=True)


# --- segmentation-models-pytorch ---


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@torch.no_grad()
@pytest.mark.parametrize(
    "decoder, name, options",
    [
        (smp.Unet, "pri3d_view_r18", {"in_channels": 4}),
        (smp.Unet, "pri3d_view_r18", {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}),
        (smp.DeepLabV3Plus, "pri3d_view_r18.rooms_toy", {"encoder_output_stride": 8}),
        (smp.FPN, "pri3d_view_r18", {}),
    ],
)
def test_smp_networks_have_our_encoder(no_warnings, decoder, name: str, options: dict):
    warnings.filterwarnings("ignore", ".*is a name of the catalog")  # one on the shelf has a contract of its own
    model = decoder(f"tu-{name}", encoder_weights=True, classes=5, **options).eval()
    chans, stride = options.get("in_channels", 3), options.get("encoder_output_stride", 32)
    encoder = load_backbone(name, in_chans=chans, output_stride=stride)
    x = images(chans)
    maps = model.encoder(x)
    assert_equal_maps(maps, [x, *encoder(x)][: len(maps)])
    assert len(maps) == options.get("encoder_depth", 5) + 1
    assert model.encoder.out_channels == [chans, *(info["num_chs"] for info in encoder.feature_info)][: len(maps)]
    assert model(x).shape == (1, 5, 64, 96)
    assert model.encoder.model.contract == encoder.contract


def test_smp_knows_the_normalization_and_leaves_weights_out_on_request(sources: dict[str, nn.Module]):
    parameters = smp.encoders.get_preprocessing_params("tu-pri3d_view_r50.kitti")
    contract = CATALOG["pri3d_view_r50.kitti"].contract
    assert parameters["mean"] == list(contract.mean)
    assert parameters["std"] == list(contract.std)
    assert (parameters["input_space"], parameters["input_range"]) == ("RGB", [0, 1])
    model = smp.Unet("tu-pri3d_view_r18", encoder_weights=None)
    assert model.encoder.model.load_report is None
    with pytest.raises(WeightsMismatch):
        smp.Unet("tu-pri3d_geo_r18", encoder_weights=True)
