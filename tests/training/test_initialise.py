"""Where encoders start: torchvision's V1 weights, a checkpoint, or random; offline says what to do."""

from __future__ import annotations

import urllib.error

import pytest
import torch
import torchvision

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.errors import GeoPretrainError, UnknownName, WeightsMismatch
from geo_pretrain.training.initialise import initialise_encoder
from geo_pretrain.training.recipe import ModelSpec
from tests.training.test_engine import run_here


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
    initialise_encoder(network, ModelSpec(init="imagenet"))
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url]
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(value, published[key]), key
    assert all(torch.equal(value, decoder[key]) for key, value in network.decoder.state_dict().items())


def test_imagenet_without_network_offers_a_random_start(monkeypatch):
    def offline():
        raise urllib.error.URLError("no route to host")

    serve(monkeypatch, offline)
    with pytest.raises(GeoPretrainError, match=r"no route to host(.|\n)*--set model.init=scratch"):
        initialise_encoder(ResNetUNet(18), ModelSpec(init="imagenet"))


def test_checkpoint_folder_fills_encoder_and_decoder(tmp_path, tiny_recipe):
    run_here(tiny_recipe(optim={"steps": 2}), tmp_path / "first")
    network = ResNetUNet(18, width=8)
    initialise_encoder(network, ModelSpec(init=str(tmp_path / "first"), width=8))
    run = run_here(
        tiny_recipe(optim={"steps": 1, "lr": 1e-12}), tmp_path / "second", [f"model.init={tmp_path / 'first'}"]
    )
    assert run.licence.base_model.startswith("pri3d_view_r18.tiny")
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / name / "encoder.safetensors") for name in ("first", "second"))
    assert torch.equal(first["conv1.weight"], network.encoder.conv1.weight)
    torch.testing.assert_close(first["conv1.weight"], second["conv1.weight"])


def test_start_that_does_not_fit_or_exist_is_an_error(monkeypatch):
    serve(monkeypatch, lambda: torchvision.models.resnet18().state_dict())
    with pytest.raises(WeightsMismatch, match="do not fit"):
        initialise_encoder(ResNetUNet(18, width=8), ModelSpec(init="imagenet", width=8))
    with pytest.raises(UnknownName, match="Unknown backbone 'imagnet'"):
        initialise_encoder(ResNetUNet(18), ModelSpec(init="imagnet"))
