"""Loading a fine-tuned folder: the network measures and predicts as it did in the run; what is wrong is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import geo_pretrain as gp
from geo_pretrain.cards import card_of
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import CheckpointError, DigestMismatch, InputError, RecipeError, WeightsMismatch
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.loading import verify
from geo_pretrain.publish import publish
from geo_pretrain.training.finetune import load_finetuned
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.finetune.test_run import SOURCES, run
from tests.training.finetune.test_segmentation_clouds import CLASSES, SMALL
from tests.training.painted_clouds import painted
from tests.zoo import write_tiny, write_tiny_3d

EXIF_TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6: by 90 degrees


class Painted:
    name, split, classes = "painted", "train", CLASSES

    def __init__(self, split):
        self.split = split

    def ids(self):
        return ["1", "2"]

    def scene_of(self, id):
        return id

    def load(self, id):
        return painted(int(id))

    def fingerprint(self):
        return "0" * 64


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run from a narrow checkpoint, which is gone afterwards."""
    folder = tmp_path_factory.mktemp("images")
    write_tiny(folder / "tiny_net_r18")
    run(folder / "out", "network.width=64", backbone=folder / "tiny_net_r18")  # the checkpoint's width is 8
    shutil.rmtree(folder / "tiny_net_r18")
    return folder / "out"


@pytest.fixture
def copy(images, tmp_path):
    return shutil.copytree(images, tmp_path / "copy")


def edit(folder, change):
    path = folder / "results.json"
    data = read_sealed(path)
    change(data)
    write_sealed(path, data)


def test_an_image_network_measures_as_in_its_run_without_its_start(images):
    task, val = load_finetuned(images), SOURCES[1]
    assert task.classes == ("ground", "red", "green")
    assert not task.module.training
    stated = json.loads((images / "results.json").read_text())["last"]
    found = task.evaluate(val, val.ids())
    assert found.scores == stated["scores"]
    image = val.load(val.ids()[0]).image
    (pixels,) = task.predict([image])
    assert pixels.labels.shape == pixels.scores.shape == image.shape[:2]
    assert set(np.unique(pixels.labels)) <= {1, 2, 3}
    assert (pixels.scores > 1 / 3 - 1e-6).all()
    _, _, guess = next(task.predictions(val, val.ids()[:1]))
    assert (pixels.labels == guess.numpy()).mean() > 0.999  # softmax and arg-max may round a tie


def test_images_are_predicted_at_their_own_size_and_in_order(images):
    task = load_finetuned(str(images))
    large, small = (np.random.default_rng(n).integers(0, 255, (60 * n, 80, 3), np.uint8) for n in (2, 1))
    found = task.predict([large, small])
    assert [one.labels.shape for one in found] == [(120, 80), (60, 80)]
    assert np.array_equal(found[1].labels, task.predict([small])[0].labels)
    assert task.predict([]) == []


def test_a_run_is_a_checkpoint_folder_too(images, tmp_path):
    """Its backbone loads, verifies and publishes; the published folder is the whole network again."""
    task = load_finetuned(images)
    unet = gp.load_backbone(images, decoder=True)
    assert unet.load_report.coverage == 1
    assert unet.contract.size == task.recipe.data.size
    assert torch.equal(unet.encoder.conv1.weight, task.module.network.encoder.conv1.weight)
    x = torch.rand(1, 3, 64, 96)
    assert torch.equal(unet(x), task.module(x)[0])
    assert verify(images).passed
    license = read_checkpoint(images).license
    assert license.weights == "LicenseRef-data-owner"
    assert license.datasets[0] == (SOURCES[0].name, "LicenseRef-data-owner")
    card = (images / "README.md").read_text()
    assert "one of 3 classes: ground, red, green" in card
    assert card_of(images).startswith("---")
    publish(images, tmp_path / "hub")
    again = gp.load_finetuned(tmp_path / "hub" / read_checkpoint(images).name)
    assert not (again.folder / "results.json").exists()
    image = SOURCES[1].load(SOURCES[1].ids()[0]).image
    assert np.array_equal(again.predict(image).labels, task.predict(image).labels)


def test_a_fine_tuned_network_takes_what_is_at_hand(images, tmp_path):
    network, pixels = load_finetuned(images), SOURCES[1].load(SOURCES[1].ids()[0]).image
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    expected = network.predict([pixels])[0].labels
    for item in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1), tmp_path / "photo.png"):
        assert np.array_equal(network.predict(item).labels, expected)
    with pytest.raises(ValueError, match="Got a numpy array float64"):
        network.predict(pixels / 255)
    for item in (str(tmp_path), [tmp_path / "photo.png", tmp_path]):
        with pytest.raises(
            InputError, match=r"accepted: the path of an image, a PIL image, uint8 .* or a list"
        ) as told:
            network.predict(item)
        assert f"predict(sorted(pathlib.Path('{tmp_path}').glob('*.png')))" in str(told.value)
        assert f"geo-pretrain predict {images} {tmp_path} -o DIR" in str(told.value)
    assert not network.training
    for wrong, line in ((torch.rand(1, 4, 32, 48), "load_backbone"), (torch.rand(1, 32, 48, 3), "network.transforms")):
        with pytest.raises(ValueError, match=rf"fine-tuned on 3 \(R, G, B\); accepted are these alone\. .*{line}"):
            network(wrong)
    for item in ("photo.jpg", Image.fromarray(pixels), [pixels], None):
        with pytest.raises(InputError, match=r"takes images \[B, 3, H, W\]; got"):
            network(item)
    with pytest.warns(UserWarning, match="255"):
        network(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    with pytest.raises(TypeError, match=r"devise='cpu' is unknown; accepted: device, hub, .*Nearest: 'device'"):
        load_finetuned(images, devise="cpu")
    with pytest.raises(TypeError, match="in_chans is load_backbone's"):
        load_finetuned(images, in_chans=4)
    logits = network(network.transforms(pixels)[None])
    assert logits.shape == (1, 3, *network.recipe.data.size)
    assert "3 classes" in repr(network)
    assert network.license == "LicenseRef-data-owner"
    turned = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(turned, exif=EXIF_TURNED, quality=95)
    assert network.predict(turned).labels.shape == expected.T.shape


def test_a_network_for_clouds_comes_back_with_its_starts_shape(tmp_path):
    start = write_tiny_3d(tmp_path / "tiny_net_srunet34").folder
    more = ["optim.batch=2", "optim.steps=2", "evaluate.every_steps=2", "data.cloud.features=contract"]
    recipe = load_finetune_recipe("rooms_srunet34", [*SMALL, *more])
    result = finetune(recipe, start, tmp_path / "out", sources=(Painted("train"), Painted("val")), device="cpu")
    shutil.rmtree(start)
    task = load_finetuned(tmp_path / "out")
    assert task.evaluate(Painted("val"), ["1", "2"]).scores == result.data["last"]["scores"]
    assert task.contract.to_dict() == {
        **result.data["contract"],
        "channels": tuple(result.data["contract"]["channels"]),
    }
    with pytest.raises(InputError, match=r"accepted: the path of a PLY, .*glob\('\*\.ply'\)"):
        task.predict(tmp_path)
    (found,) = task.predict([painted(3)])
    assert found.labels.shape == (len(painted(3)),)
    assert verify(tmp_path / "out").passed
    backbone = gp.load_backbone(tmp_path / "out")
    assert torch.equal(backbone.conv0p1s1.kernel, task.module.conv0p1s1.kernel)
    assert load_file(tmp_path / "out" / "backbone.safetensors").keys() == backbone.state_dict().keys()
    assert not any(parameter.device.type != "cpu" for parameter in task.module.parameters())


def test_a_run_of_an_older_version_is_read_if_its_start_is_known(copy, tmp_path):
    edit(copy, lambda data: (data["backbone"].pop("shape"), data.pop("model")))
    with pytest.raises(CheckpointError, match="older version wrote this run and did not keep the shape of its start"):
        load_finetuned(copy)
    name = json.loads((copy / "results.json").read_text())["backbone"]["name"]
    write_tiny(tmp_path / "tiny_net_r18")
    edit(copy, lambda data: data["backbone"].update(name=str(tmp_path / "tiny_net_r18")))
    assert load_finetuned(copy).classes == ("ground", "red", "green")
    assert name.endswith("tiny_net_r18")


def test_altered_weights_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    key = next(iter(weights))
    save_file({**weights, key: weights[key] + 1}, copy / "model.safetensors")
    with pytest.raises(DigestMismatch, match=r"results\.json states"):
        load_finetuned(copy)


def test_weights_of_another_network_are_refused_with_the_first_differences(copy):
    weights = load_file(copy / "model.safetensors")
    first, second, *_ = weights
    del weights[first]
    save_file({**weights, second: torch.zeros(1), "extra": torch.zeros(1)}, copy / "model.safetensors")
    edit(copy, lambda data: data.pop("model"))
    message = rf"3 of \d+ tensors do not fit: {first} is missing, extra is not of the network, {second} is \[1\]"
    with pytest.raises(WeightsMismatch, match=message):
        load_finetuned(copy)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda out: [(out / name).unlink() for name in ("results.json", "config.json")],
            CheckpointError,
            "has no results.json; it is no finished run",
        ),
        (lambda out: (out / "model.safetensors").unlink(), CheckpointError, "has no model.safetensors"),
        (lambda out: (out / "recipe.yaml").unlink(), CheckpointError, "has no recipe.yaml"),
        (lambda out: (out / "results.json").write_text("{"), CheckpointError, "is not JSON"),
        (
            lambda out: edit(out, lambda data: data.update(format=9)),
            CheckpointError,
            "format is 9; this version reads 1",
        ),
        (lambda out: edit(out, lambda data: data.pop("contract")), CheckpointError, "not a result of fine-tuning"),
        (lambda out: (out / "recipe.yaml").write_text("task: segmentatio"), RecipeError, "segmentatio"),
        (lambda out: shutil.rmtree(out), CheckpointError, "no such folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(copy, spoil, error, message):
    spoil(copy)
    with pytest.raises(error, match=message):
        load_finetuned(copy)


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_no_folder_is_told(given):
    with pytest.raises(InputError, match=rf"load_finetuned takes the folder of a fine-tuning run .*; got {given}\."):
        load_finetuned(given)


def test_a_checkpoint_folder_is_told_from_a_run(tmp_path):
    write_tiny(tmp_path / "tiny_net_r18")
    with pytest.raises(CheckpointError, match="it is a checkpoint folder: load_backbone loads it"):
        load_finetuned(tmp_path / "tiny_net_r18")
