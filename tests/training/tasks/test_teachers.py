"""Teachers: the folder of a fine-tuning run, what it says of its images and terms, and weights that are not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from geo_pretrain.checkpoint import read_checkpoint, sha256
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DigestMismatch, GeoPretrainError, RecipeError
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.loading import verify
from geo_pretrain.training import pretrain
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks.teachers import finetuned_segmenter, load_teacher
from tests.training.finetune.test_run import run
from tests.training.tasks.test_ppkt import tiny_batch
from tests.training.test_licenses import license_of
from tests.training.test_loop import logged, run_here
from tests.zoo import write_tiny

pytestmark = pytest.mark.usefixtures("quick_weights")  # teachers are of real size

GRAY = ImageContract(size=(64, 96), mean=(0.4, 0.45, 0.5), std=(0.2, 0.225, 0.25), interpolation="bilinear")
PPKD = {"data.license=CC0-1.0", "unet3d.out_chans=3"}


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The folder of a short fine-tuning run of a U-Net, and that of the backbone that it started from."""
    folder = tmp_path_factory.mktemp("finetuned")
    write_tiny(folder / "start", contract=GRAY)
    run(folder / "out", backbone=folder / "start")
    return folder / "out", folder / "start"


@pytest.fixture
def moved(finetuned, tmp_path):
    """A copy of that folder whose backbone is in another place than it says."""
    folder = shutil.copytree(finetuned[0], tmp_path / "moved")
    results = read_sealed(folder / "results.json")
    results["backbone"]["name"] = str(tmp_path / "gone")
    write_sealed(folder / "results.json", results)
    return folder


def forget_contract(folder):
    """Make the folder one of an earlier version."""
    results = read_sealed(folder / "results.json")
    del results["contract"]
    write_sealed(folder / "results.json", results)
    return folder


@pytest.mark.parametrize(
    "name, options, last, biases",
    [
        ("scannet_unet_r18", (), "network.decoder.conv0", [50.0, 1.0, 2.0, 3.0]),  # output 0 is no class
        ("rooms_pspnet_r18", ("data.size=[32, 32]",), "network.segmentation_head.0", [1.0, 2.0, 3.0]),
    ],
)
def test_the_channels_of_a_fine_tuned_network_are_its_classes_in_order(tmp_path, name, options, last, biases):
    run(tmp_path / "out", "optim.steps=1", "evaluate.every_steps=1", *options, name=name)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"]["classes"] == ["ground", "red", "green"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights[f"{last}.weight"].zero_()
    weights[f"{last}.bias"].copy_(torch.tensor(biases))
    model = tmp_path / "out" / "model.safetensors"
    save_file(weights, model)
    with pytest.raises(DigestMismatch, match=r"model\.safetensors: sha256 is .* results\.json states"):
        finetuned_segmenter(tmp_path / "out")
    results = read_sealed(tmp_path / "out" / "results.json")
    write_sealed(tmp_path / "out" / "results.json", results | {"model": {"sha256": sha256(model)}})
    teacher = finetuned_segmenter(tmp_path / "out")
    logits = teacher(torch.randn(1, 3, 48, 64))
    assert (teacher.out_chans, logits.shape[1]) == (3, 3)
    torch.testing.assert_close(logits, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand_as(logits))
    assert teacher.contract == ImageContract()  # of random weights


def test_a_fine_tuned_network_teaches_ppkd(finetuned, tiny_recipe, recording, tmp_path):
    folder, start = finetuned
    settings = {"teacher": str(folder), "teacher_encoder": None, "flip_prob": 0.0, "resize": [1.0, 1.0]}
    plain = ("data.augment.jitter_prob=0", "data.augment.grayscale_prob=0", "data.augment.blur_prob=0")
    task, batch = tiny_batch(tiny_recipe, "ppkd", settings, *PPKD, *plain)
    assert task.teacher.contract == GRAY
    shown = replace(GRAY, size=(48, 64), interpolation="nearest").transforms()
    with Image.open(recording / "frame-000000.color.png") as picture:
        color = shown(picture)
    torch.testing.assert_close(batch["image"][0], color, atol=1e-6, rtol=0)
    checkpoint = run_here(tmp_path / "tiny.yaml", tmp_path / "out", [*PPKD, "optim.steps=1"])
    assert verify(tmp_path / "out").passed
    assert len(logged(tmp_path / "out")) == 1
    assert checkpoint.license.base_model == (
        f"random weights; teacher: scannet_unet_r18.toy fine-tuned from {start} (LicenseRef-data-owner)"
    )


def test_a_backbone_that_is_gone_is_no_trouble_and_its_terms_are_strict(moved, tiny_recipe, tmp_path):
    assert finetuned_segmenter(moved).contract == GRAY
    path = tiny_recipe("ppkd", task={"teacher": str(moved)})
    license = run_here(path, tmp_path / "out", [*PPKD, "optim.steps=1"]).license
    assert (f"what {tmp_path / 'gone'} learned from", "LicenseRef-unknown") in license.datasets
    results = read_sealed(moved / "results.json")
    results["data"] |= {"source": "rooms", "licence": "MIT"}
    write_sealed(moved / "results.json", results)
    assert license_of(load_recipe(str(path), PPKD)).weights == "LicenseRef-unknown"
    results["data"]["licence"] = "CC-BY-NC-SA-3.0"  # as the run knew its data
    results["backbone"]["name"] = "scratch"
    write_sealed(moved / "results.json", results)
    assert license_of(load_recipe(str(path), PPKD)).weights == "CC-BY-NC-SA-3.0"


def test_a_folder_without_a_contract_has_that_of_its_backbone(finetuned, moved, tmp_path):
    earlier = forget_contract(shutil.copytree(finetuned[0], tmp_path / "earlier"))
    assert finetuned_segmenter(earlier).contract == GRAY
    with pytest.raises(RecipeError, match=r"has no 'contract' and its backbone '.*gone', whose images it took, cannot"):
        finetuned_segmenter(forget_contract(moved))
    results = read_sealed(moved / "results.json") | {"contract": {"kind": "image", "size": [1, 1]}}
    write_sealed(moved / "results.json", results)
    with pytest.raises(RecipeError, match=r"'contract' in its results.json cannot be read: .*missing \['channels'"):
        finetuned_segmenter(moved)


def test_a_folder_of_another_task_is_no_segmenter(moved):
    results = read_sealed(moved / "results.json") | {"task": "detection"}
    write_sealed(moved / "results.json", results)
    with pytest.raises(RecipeError, match="was fine-tuned for detection, accepted is segmentation"):
        finetuned_segmenter(moved)


def test_a_teacher_that_is_not_named_has_its_terms(tiny_recipe):
    path = tiny_recipe("ppkt", task={"teacher": None, "teacher_encoder": None})
    license = license_of(load_recipe(str(path), ["data.license=CC0-1.0"]))
    assert license.weights == "LicenseRef-ImageNet-terms"
    assert "teacher: torchvision ResNet-50 IMAGENET1K_V1" in license.base_model
    with pytest.raises(RecipeError, match=r"unknown key 'task.techer'"):
        license_of(load_recipe(str(path), ["task.techer=scratch"]))


def test_terms_are_found_before_the_first_step(tiny_recipe, tmp_path, monkeypatch):
    def unknown(*_):
        raise GeoPretrainError("nobody knows")

    monkeypatch.setattr(pretrain, "run_license", unknown)
    steps = []
    with pytest.raises(GeoPretrainError, match="nobody knows"):
        run_here(tiny_recipe(optim={"steps": 2}), tmp_path / "out", on_step=steps.append)
    assert steps == []


def test_start_weights_may_move_while_they_are_trained(tiny_recipe, tmp_path):
    run_here(tiny_recipe(optim={"steps": 1}), tmp_path / "start")
    path = tiny_recipe(model={"encoder": "resnet18", "init": str(tmp_path / "start"), "width": 8})

    def move(info):
        if info.step == 1:
            (tmp_path / "start").rename(tmp_path / "elsewhere")

    run_here(path, tmp_path / "out", ["optim.steps=2"], on_step=move)
    assert read_checkpoint(tmp_path / "out").license.base_model == "pri3d_view_r18.tiny (LicenseRef-data-owner)"


def test_a_teacher_that_cannot_be_fetched_is_told_in_a_teachers_words(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(GeoPretrainError) as caught:
        load_teacher("imagenet", "resnet18")
    said = str(caught.value)
    assert said.startswith("Teacher 'imagenet': init 'imagenet' needs https://")
    assert said.endswith("or start from random weights: --set task.teacher=NAME or a checkpoint folder.")
    assert "model.init" not in said
