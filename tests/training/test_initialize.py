"""Where encoders start: torchvision's V1 weights, a checkpoint, or random; offline says what to do."""

from __future__ import annotations

import copy
import hashlib
import re
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from geo_pretrain.backbones.depth_unet import ResNetDepthUNet
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.catalog import Arch
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import DigestMismatch, GeoPretrainError, RecipeError, UnknownName, WeightsMismatch
from geo_pretrain.training import initialize
from geo_pretrain.training.initialize import initialize_encoder
from geo_pretrain.training.pretrain import load_checked_recipe, needs_stage1
from geo_pretrain.training.recipe import ModelSpec, Stage1Spec, load_recipe
from geo_pretrain.training.tasks import build_task
from tests.authors_files import write
from tests.hub.hosts import Fault, Hosts
from tests.training.test_loop import run_here

pytestmark = pytest.mark.usefixtures("quick_weights")


def serve(monkeypatch, answer):
    """Stand in for torchvision's download; returns the addresses asked for."""
    asked = []

    def download(url, *args, **kwargs):
        asked.append(url)
        return answer()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    return asked


def test_imagenet_is_torchvisions_v1_without_the_classifier(monkeypatch):
    torch.manual_seed(3)
    published = torchvision.models.resnet18().state_dict()
    asked = serve(monkeypatch, lambda: published)
    network = ResNetUNet(18)
    decoder = {key: value.clone() for key, value in network.decoder.state_dict().items()}
    initialize_encoder(network, ModelSpec(init="imagenet"))
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url]
    assert asked[0].endswith("/resnet18-f37072fd.pth")
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(value, published[key]), key
    assert all(torch.equal(value, decoder[key]) for key, value in network.decoder.state_dict().items())


def test_imagenet_without_network_offers_a_random_start(monkeypatch):
    def offline():
        raise urllib.error.URLError("no route to host")

    serve(monkeypatch, offline)
    with pytest.raises(
        GeoPretrainError, match=r"no route to host(.|\n)*Put the file at(.|\n)*--set model.init=scratch"
    ):
        initialize_encoder(ResNetUNet(18), ModelSpec(init="imagenet"))


def test_checkpoint_folder_fills_encoder_and_decoder(tmp_path, tiny_recipe):
    run_here(tiny_recipe(optim={"steps": 2}), tmp_path / "first")
    network = ResNetUNet(18, width=8)
    initialize_encoder(network, ModelSpec(init=str(tmp_path / "first"), width=8))
    run = run_here(
        tiny_recipe(optim={"steps": 1, "lr": 1e-12}), tmp_path / "second", [f"model.init={tmp_path / 'first'}"]
    )
    assert run.license.base_model.startswith("pri3d_view_r18.tiny")
    first, second = (load_file(tmp_path / name / "encoder.safetensors") for name in ("first", "second"))
    assert torch.equal(first["conv1.weight"], network.encoder.conv1.weight)
    torch.testing.assert_close(first["conv1.weight"], second["conv1.weight"])


def test_start_that_does_not_fit_or_exist_is_an_error(monkeypatch):
    serve(monkeypatch, lambda: torchvision.models.resnet18().state_dict())
    with pytest.raises(WeightsMismatch, match="do not fit"):
        initialize_encoder(ResNetUNet(18, width=8), ModelSpec(init="imagenet", width=8))
    with pytest.raises(UnknownName, match="Unknown backbone 'imagnet'"):
        initialize_encoder(ResNetUNet(18), ModelSpec(init="imagnet"))


def moco_file(path, depth=50, seed=0):
    """A training state as MoCo's code saves it, and the encoder that is to be read out of it."""
    return write("moco", path, seed, arch=Arch("resnet", {"depth": depth, "width": 64}))["encoder"]


@pytest.fixture(scope="module")
def moco_content(tmp_path_factory):
    """The encoder that is to be read out of MoCo's file, and the file."""
    path = tmp_path_factory.mktemp("moco") / "moco.pth.tar"
    return moco_file(path), path.read_bytes()


@pytest.fixture
def published(tmp_path, moco_content, monkeypatch):
    """MoCo's file of 200 epochs where it is published, on an imitated host; its MD5 is what its README would say."""
    expected, content = moco_content
    monkeypatch.setitem(initialize.MD5_PREFIXES, "moco_v2", hashlib.md5(content).hexdigest()[:8])
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    url = initialize.IMAGENET_STARTS["moco_v2"].authors_files[0].url
    assert url.endswith("/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar")
    with Hosts({url: content}) as hosts:
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", hosts.url)
        yield hosts, url, expected, content


class WithDecoder(nn.Module):
    """What a U-Net is to `initialize_encoder`, without the 150 million weights of a real decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = ResNetEncoder(50), nn.Linear(2, 2)


def test_moco_is_fetched_once_and_its_query_encoder_taken(published, tmp_path):
    hosts, url, expected, _ = published
    for network in (ResNetEncoder(50), WithDecoder()):
        decoder = {key: value for key, value in copy.deepcopy(network).state_dict().items() if "decoder" in key}
        initialize_encoder(network, ModelSpec(encoder="resnet50", init="moco_v2"))
        state = getattr(network, "encoder", network).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in decoder.items())
    assert hosts.served[url] == 1
    found = read_checkpoint(tmp_path / "cache" / "authors" / "moco_v2_r50.imagenet_200ep")
    assert found.provenance["source"]["url"] == url
    assert found.license.weights == "CC-BY-NC-4.0"
    left = [p.name for p in (tmp_path / "cache" / "authors").iterdir()]
    assert set(left) <= {found.name, f".{found.name}.lock"}
    (found.folder / "encoder.safetensors").write_bytes(b"broken")  # fetched anew
    encoder = ResNetEncoder(50)
    initialize_encoder(encoder, ModelSpec(encoder="resnet50", init="moco_v2"))
    assert torch.equal(encoder.conv1.weight, expected["conv1.weight"])
    assert hosts.served[url] == 2


def test_moco_put_into_the_cache_by_hand_is_used_without_a_network(published, tmp_path, monkeypatch):
    hosts, _, expected, content = published
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GeoPretrainError) as caught:
        initialize_encoder(ResNetEncoder(50), ModelSpec(encoder="resnet50", init="moco_v2"))
    assert "--set model.init=scratch" in str(caught.value)
    place = Path(re.search(r"Put the file at (\S+),", str(caught.value)).group(1))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    encoder = ResNetEncoder(50)
    initialize_encoder(encoder, ModelSpec(encoder="resnet50", init="moco_v2"))
    assert torch.equal(encoder.state_dict()["layer4.2.bn3.running_var"], expected["layer4.2.bn3.running_var"])
    assert place.exists()
    assert not hosts.served


def test_moco_of_another_digest_or_not_there_is_refused(published, tmp_path, monkeypatch):
    hosts, url, _, _ = published
    hosts.fault(url, Fault("status", status=404))
    with pytest.raises(GeoPretrainError, match=r"could not be downloaded \((.|\n)*404(.|\n)*model.init=scratch"):
        initialize_encoder(ResNetEncoder(50), ModelSpec(encoder="resnet50", init="moco_v2"))
    hosts.fault(url, Fault("status", times=0))
    monkeypatch.setitem(initialize.MD5_PREFIXES, "moco_v2", "00000000")
    with pytest.raises(DigestMismatch, match="begins with 00000000"):
        initialize_encoder(ResNetEncoder(50), ModelSpec(encoder="resnet50", init="moco_v2"))
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_moco_fits_a_resnet50_alone(published):
    with pytest.raises(WeightsMismatch, match=r"'moco_v2' do not fit(.|\n)*model.encoder"):
        initialize_encoder(ResNetUNet(18), ModelSpec(encoder="resnet18", init="moco_v2"))


def test_md5_prefixes_are_those_of_mocos_readme():
    starts = initialize.IMAGENET_STARTS
    assert [starts[name].authors_files[0].url.split("/")[-2] for name in starts] == ["moco_v2_200ep", "moco_v2_800ep"]
    assert initialize.MD5_PREFIXES == {"moco_v2": "59fd9945", "moco_v2_800ep": "a04e12f8"}


def test_encoder_alone_fills_the_encoder_of_a_unet(tmp_path, tiny_recipe):
    """A MoCo checkpoint of ours; and a U-Net's own checkpoint fills a lone encoder and another U-Net's encoder."""
    moco = {"name": "moco_v2", "matches": None, "queue": 8, "resize": None}
    run_here(tiny_recipe(name="moco_v2_r18.tiny", task=moco, optim={"steps": 1}), tmp_path / "moco")
    run_here(tiny_recipe(optim={"steps": 1}), tmp_path / "unet")
    spec = ModelSpec(init=str(tmp_path / "moco"), width=8)
    stored = {name: load_file(tmp_path / name / "encoder.safetensors") for name in ("moco", "unet")}
    for network, start in (
        (ResNetUNet(18, width=8), "moco"),
        (ResNetEncoder(18, width=8, out_indices=(4,)), "unet"),
        (ResNetDepthUNet(18, width=8), "unet"),
        (ResNetDepthUNet(18, width=8), "moco"),
    ):
        before = copy.deepcopy(network)
        initialize_encoder(network, replace(spec, init=str(tmp_path / start)))
        encoder = getattr(network, "encoder", network)
        assert all(torch.equal(value, stored[start][key]) for key, value in encoder.state_dict().items())
        if encoder is not network:
            own, old = network.decoder.state_dict(), before.decoder.state_dict()
            assert all(torch.equal(value, old[key]) for key, value in own.items())


def test_stage1_is_the_folder_that_the_first_stage_left(tmp_path, tiny_recipe):
    run_here(tiny_recipe(optim={"steps": 1}), tmp_path / "first")
    recipe = load_recipe(str(tiny_recipe(model={"init": "stage1"})))
    with pytest.raises(RecipeError, match="no first stage was trained"):
        build_task(recipe)
    task = build_task(recipe, {"stage1": tmp_path / "first"})
    stored = load_file(tmp_path / "first" / "decoder.safetensors")
    assert torch.equal(task.state_dict()["backbone.decoder.conv0.weight"], stored["conv0.weight"])


def test_continued_training_keeps_the_heads_that_its_loss_has(tmp_path, tiny_recipe):
    run_here(tiny_recipe("pri3d_view_geo", optim={"steps": 1}), tmp_path / "first")
    heads = load_file(tmp_path / "first" / "heads.safetensors")
    for name, kept in (("pri3d_view_geo", ("backbone3d.", "w2d.", "w3d.", "headnet.")), ("pri3d_view", ("headnet.",))):
        path = tiny_recipe(name, model={"init": str(tmp_path / "first")}, task={"keep_heads": True})
        task = build_task(load_recipe(str(path)))
        state = task.state_dict()
        wanted = {key for key in heads if key.startswith(kept)}
        assert wanted == {key for key in state if not key.startswith("backbone.")}
        assert all(torch.equal(state[key], heads[key]) for key in wanted)
        fresh = build_task(load_recipe(str(path), ["task.keep_heads=false"]))
        assert not torch.equal(fresh.state_dict()["headnet.weight"], heads["headnet.weight"])
        assert torch.equal(fresh.state_dict()["backbone.decoder.conv0.bias"], state["backbone.decoder.conv0.bias"])
    run_here(tiny_recipe(optim={"steps": 1}), tmp_path / "view")
    path = tiny_recipe("pri3d_view_geo", model={"init": str(tmp_path / "view")}, task={"keep_heads": True})
    with pytest.raises(WeightsMismatch, match=r"do not fit(.|\n)*backbone3d"):
        build_task(load_recipe(str(path)))


def test_recipes_of_other_starts_differ_in_nothing_else():
    for prior in ("view", "geo", "view_geo"):
        parent, unsupervised = (load_recipe(f"pri3d_{name}{prior}_r50") for name in ("", "unsup_"))
        assert unsupervised.model.init == "moco_v2"
        model = replace(unsupervised.model, init="imagenet")
        assert replace(unsupervised, name=parent.name, model=model) == parent
        continued = load_recipe(f"pri3d_{prior}_r50.continued")
        assert continued.stage1 == Stage1Spec("pri3d_view_geo_r50")
        assert needs_stage1(continued)
        optim = replace(parent.optim, epochs=2, bn_momentum="floor")
        task = parent.task | {"keep_heads": True}
        model = replace(parent.model, init="stage1")
        wanted = replace(parent, name=continued.name, optim=optim, task=task, model=model, stage1=continued.stage1)
        assert continued == wanted
    slow, parent = load_recipe("pri3d_view_geo_r50.lr001"), load_recipe("pri3d_view_geo_r50")
    assert replace(slow, name=parent.name, optim=replace(slow.optim, lr=0.1)) == parent
    assert slow.optim.lr == 0.01


def test_a_size_that_an_encoder_of_timm_cannot_take_is_told_with_the_recipe():
    given = ["model.encoder=timm/swin_s3_tiny_224", "model.init=scratch"]
    with pytest.raises(RecipeError, match=r"'data\.size' is \[70, 94\].*multiples of 32"):
        load_checked_recipe("pri3d_view_r18.rooms", [*given, "data.size=[70,94]"])
    assert load_checked_recipe("pri3d_view_r18.rooms", [*given, "data.size=[128,160]"])
    given[0] = "model.encoder=timm/efficientvit_m0"
    with pytest.raises(RecipeError, match=r"accepted is \[224, 224\], the one size of timm/efficientvit_m0"):
        load_checked_recipe("pri3d_view_r18.rooms", [*given, "data.size=[72,96]"])
