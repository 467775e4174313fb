"""Encoders of timm as students: every 2D pretext task takes them, runs write folders, and they start from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import geo_pretrain as gp
from geo_pretrain.backbones.architectures import unet_arch
from geo_pretrain.backbones.build import build, build_encoder
from geo_pretrain.backbones.timm_names import timm_contract
from geo_pretrain.errors import CheckpointError, GeoPretrainError, RecipeError, UnknownName, WeightsMismatch
from geo_pretrain.training.initialize import check_start, initialize_encoder
from geo_pretrain.training.pretrain import load_checked_recipe
from geo_pretrain.training.recipe import ModelSpec, load_recipe
from geo_pretrain.training.tasks import build_task
from tests.training.test_loop import run_here

ENCODER = "timm/mobilenetv3_small_050"
MODEL = {"encoder": ENCODER, "init": "scratch", "width": None}
ARCHS = {
    "pri3d_view": "timm_unet",
    "depth_prediction": "timm_unet",
    "pri3d_view_geo": "timm_unet",
    "gsc": "timm_unet",
    "trivial_correspondence": "timm_unet",
    "moco_v2": "timm_encoder",
    "pixel_simclr": "timm_depth_unet",
}


@pytest.mark.parametrize("name", ARCHS)
def test_every_image_task_takes_an_encoder_of_timm(tiny_recipe, name: str):
    task = build_task(load_recipe(str(tiny_recipe(name, model=MODEL))))
    assert task.arch == ARCHS[name]
    assert (task.contract.mean, task.contract.std) == (timm_contract(ENCODER).mean, timm_contract(ENCODER).std)
    export = task.export()  # which builds the network again from what config.json will say
    assert export.arch.encoder_name == ENCODER
    assert {"encoder.0", "encoder.4"} <= export.golden.keys()


def test_a_run_writes_a_folder_that_loads(tiny_recipe, tmp_path: Path):
    path = tiny_recipe(model=MODEL, optim={"steps": 2, "batch": 2}, name="pri3d_view_mobilenet.tiny")
    run_here(path, tmp_path / "out")
    unet = gp.load_backbone(tmp_path / "out", decoder=True)
    gp.verify(tmp_path / "out")
    start = build_task(load_recipe(str(path))).backbone.state_dict()
    moved = [key for key, value in unet.state_dict().items() if not torch.equal(value, start[key])]
    assert len(moved) == len(start)
    assert unet.contract.size == (48, 64)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "16, 8, 16, 24, 288 channels at strides 2, 4, 8, 16, 32" in text
    assert f'"timm": "{timm.__version__}"' in (tmp_path / "out" / "config.json").read_text()
    again = build(unet_arch(ENCODER), decoder=True)
    initialize_encoder(again, ModelSpec(encoder=ENCODER, init=str(tmp_path / "out")))
    assert all(torch.equal(value, unet.state_dict()[key]) for key, value in again.state_dict().items())


def test_mistakes_are_told_before_any_work(tiny_recipe):
    with pytest.raises(UnknownName, match="Closest: 'timm/mobilenetv3_small_050'"):
        load_checked_recipe(str(tiny_recipe(model=MODEL | {"encoder": "timm/mobilenetv3_small_05"})))
    with pytest.raises(RecipeError, match=r"'model.width' is 8, accepted is 64"):
        load_recipe(str(tiny_recipe(model=MODEL | {"width": 8})))
    with pytest.raises(RecipeError, match="MoCo's weights are of a ResNet-50"):
        load_checked_recipe(str(tiny_recipe(model=MODEL | {"init": "moco_v2"})))


# --- starts


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    """timm's classifier of this name, as a file from elsewhere holds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return timm.create_model("mobilenetv3_small_050")


def check(encoder: torch.nn.Module, plain: torch.nn.Module) -> None:
    given = plain.state_dict()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, given[key.removeprefix("model.")]), key


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_start_from_a_file(name: str, plain: torch.nn.Module, tmp_path: Path):
    if name.endswith(".pth"):
        torch.save({"state_dict": plain.state_dict(), "epoch": 3}, tmp_path / name)
    else:
        save_file(plain.state_dict(), tmp_path / name)
    encoder = build_encoder(ENCODER)
    initialize_encoder(encoder, ModelSpec(encoder=ENCODER, init=f"file:{tmp_path / name}"))
    check(encoder, plain)
    with pytest.raises(WeightsMismatch, match="do not fit"):
        initialize_encoder(build_encoder("resnet18"), ModelSpec(encoder="resnet18", init=f"file:{tmp_path / name}"))


def test_a_file_of_a_resnet_under_a_prefix(tmp_path: Path):
    given = build_encoder("resnet18", width=8).state_dict()
    save_file({f"backbone.{key}": value for key, value in given.items()}, tmp_path / "r.safetensors")
    encoder = build_encoder("resnet18", width=8)
    initialize_encoder(encoder, ModelSpec(encoder="resnet18", width=8, init=f"file:{tmp_path / 'r.safetensors'}"))
    assert all(torch.equal(value, given[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "module.backbone.", "encoder."])
def test_a_file_of_timm_under_a_prefix(prefix: str, plain: torch.nn.Module, tmp_path: Path):
    given = {f"{prefix}{key}": value for key, value in plain.state_dict().items()}
    torch.save({"state_dict_ema": given | {"head.weight": torch.zeros(3)}}, tmp_path / "w.pth")
    encoder = build_encoder(ENCODER)
    initialize_encoder(encoder, ModelSpec(encoder=ENCODER, init=f"file:{tmp_path / 'w.pth'}"))
    check(encoder, plain)


def test_a_file_of_a_resnet_without_counters_of_batchnorm(tmp_path: Path):
    """As torchvision's older files, which its own networks take."""
    network = torchvision.models.resnet18()
    for value in network.buffers():
        value += 1
    given = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(given, tmp_path / "old.pth")
    encoder = build_encoder("resnet18")
    initialize_encoder(encoder, ModelSpec(encoder="resnet18", init=f"file:{tmp_path / 'old.pth'}"))
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, given.get(key, torch.zeros_like(value))), key
    del given["bn1.running_mean"]
    torch.save(given, tmp_path / "old.pth")
    with pytest.raises(WeightsMismatch, match="1 keys differ"):
        initialize_encoder(encoder, ModelSpec(encoder="resnet18", init=f"file:{tmp_path / 'old.pth'}"))


def test_a_start_from_a_package_that_is_not_imported(plain: torch.nn.Module, tmp_path: Path, monkeypatch):
    (tmp_path / "some_weights" / "models").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(plain.state_dict(), tmp_path / "some_weights" / "models" / "net-1234.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    encoder = build_encoder(ENCODER)
    initialize_encoder(encoder, ModelSpec(encoder=ENCODER, init="package:some_weights"))
    check(encoder, plain)
    torch.save({}, tmp_path / "some_weights" / "other.pt")
    with pytest.raises(CheckpointError, match=r"holds 2 files of weights: .*models/net-1234.pth"):
        check_start("package:some_weights")
    check_start("package:some_weights/models/net-1234.pth")


def test_starts_that_are_not_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        check_start(f"file:{tmp_path / 'none.pth'}")
    with pytest.raises(CheckpointError, match="no package 'not_here' is installed"):
        check_start("package:not_here")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="holds no weights that torch reads"):
        initialize_encoder(build_encoder(ENCODER), ModelSpec(encoder=ENCODER, init=f"file:{tmp_path / 'bad.pth'}"))


def test_imagenet_is_timms_own_and_offline_says_where_to_put_the_file(plain: torch.nn.Module, monkeypatch):
    from timm.models import _builder

    from geo_pretrain.backbones import timm_names

    asked = []

    def answer(location, **options):
        asked.append(location)
        return plain.state_dict()

    monkeypatch.setattr(timm_names, "_knock", lambda config: None)  # whether the hub answers is not asked here
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", answer)
    encoder = build_encoder(ENCODER)
    initialize_encoder(encoder, ModelSpec(encoder=f"{ENCODER}.lamb_in1k", init="imagenet"))
    check(encoder, plain)
    assert asked == ["timm/mobilenetv3_small_050.lamb_in1k"]

    def offline(location, **options):
        raise OSError("no network")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", offline)
    with pytest.raises(GeoPretrainError, match=r"huggingface.co/timm/.*\(no network\).*model.init=file:PATH"):
        initialize_encoder(encoder, ModelSpec(encoder=ENCODER, init="imagenet"))
