"""From a folder of one's own images to a fine-tuned network, pictures and COCO's JSON, by the command line."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import geo_pretrain as gp
from geo_pretrain.errors import CheckpointError, RecipeError
from geo_pretrain.files import read_sealed
from geo_pretrain.training.distributed import checked_device
from geo_pretrain.training.evaluation.coco import Detections
from geo_pretrain.training.finetune import predict as predicting
from geo_pretrain.training.finetune import run as runs
from geo_pretrain.training.finetune.coco_file import CocoFile
from geo_pretrain.training.finetune.registry import guessed_encoder
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune.sweep import run_sweep
from geo_pretrain.training.finetune.written import Place, write_prediction
from geo_pretrain.training.finetune_recipe import load_finetune_recipe, with_length
from geo_pretrain.training.licenses import finetuned_license
from tests.front_door import geo_pretrain
from tests.training.data.labelled.test_own_images import boxes_json, write_flat, write_image, write_label
from tests.zoo import write_tiny

IDS = np.array([[0, 0, 1, 2], [7, 255, 1, 2]]).repeat(24, 0).repeat(16, 1)  # [48, 64]
SMALL = ["--set", "data.size=[32, 48]", "--set", "optim.batch=2", "--set", "workers=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on six images, from a narrow checkpoint, by a recipe that names no encoder."""
    root = tmp_path_factory.mktemp("own")
    for number in range(6):
        path = root / "data" / "images" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)).save(path)
        write_label(root / "data" / "labels" / f"{number}.png", IDS)
    (root / "data" / "classes.txt").write_text("0 sky\n1 road\n2 car\n7 car\n")
    write_tiny(root / "tiny_net_r18")
    command = ["finetune", "folder_unet", "-b", root / "tiny_net_r18", "--data", f"folder:{root / 'data'}"]
    length = ["--steps", 2, "--set", "data.license=CC-BY-4.0", "--out", root / "mine"]
    ended = geo_pretrain(*map(str, [*command, *length, *SMALL]))
    assert "Labels in all training files" in ended.output  # before training: id, class, share, files
    lines = [line.split() for line in ended.output.splitlines()]
    assert ["7", "car", "12.5", "%", "5"] in lines
    assert ["class", "iou", "(%)"] in lines  # after it: the score of each class, and no remarks on papers
    assert "mended" not in ended.output
    return root / "mine"


def test_a_run_says_whose_data_and_which_encoder(run):
    results = read_sealed(run / "results.json")
    assert results["data"]["classes"] == ["sky", "road", "car"]
    assert (results["data"]["ids"], results["data"]["licence"]) == ([0, 1, 2], "CC-BY-4.0")
    assert (results["data"]["train_images"], results["data"]["val_images"], results["steps"]) == (5, 1, 2)
    assert load_finetune_recipe(str(run / "recipe.yaml")).network.encoder == "resnet18"
    network = gp.load_finetuned(run)
    assert (network.license, network.classes) == ("CC-BY-4.0", ("sky", "road", "car"))


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_labels_of_no_class_stop_a_run_right_after_the_table(more, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "build_finetune_task", lambda *args: pytest.fail("a network was built"))
    for number in range(6):
        write_image(tmp_path / "data" / "images" / f"{number}.jpg", number)
        write_label(tmp_path / "data" / "labels" / f"{number}.png", np.where(IDS == 0, 11, 5))
    (tmp_path / "data" / "classes.txt").write_text("1 sky\n2 road\n")
    command = ["finetune", "folder_unet", "-b", "scratch", "--data", f"folder:{tmp_path / 'data'}", *SMALL, *more]
    out = ["--set", "data.options.ignore=[4]", "--out", str(tmp_path / "out")]
    ended = geo_pretrain(*command, *out, expected=1)
    assert ("Labels in all training files" in ended.output) == (not more)
    assert "Labels that are no class: 5, 11." in ended.errors
    assert "--set data.options.ignore=[4,5,11]," in ended.errors
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_of_images_is_predicted_in_batches_as_one_by_one(run, tmp_path):
    new = tmp_path / "new" / "deep"
    write_image(new / "a.jpg", 1)
    write_image(new / "b.png", 2)
    (tmp_path / "new" / "c.jpg").write_bytes((new / "a.jpg").read_bytes()[:200])
    geo_pretrain("predict", str(run), str(tmp_path / "new"), "--batch", "3", "-o", str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [item["name"] for item in index["items"]] == ["deep/a", "deep/b"]
    assert [one["path"] for one in index["skipped"]] == [str(tmp_path / "new" / "c.jpg")]
    with Image.open(tmp_path / "out" / "deep" / "b.labels.png") as image:
        assert (image.mode, image.size) == ("P", (16, 12))
        labels, palette = np.asarray(image), image.getpalette()
        colors = np.asarray(image.convert("RGB"))
    found = gp.load_finetuned(run).predict(new / "b.png")
    assert np.array_equal(labels, found.labels)
    assert np.array_equal(colors.reshape(-1, 3), np.array(palette).reshape(-1, 3)[labels.reshape(-1)])
    assert (tmp_path / "out" / "classes.txt").read_text() == "sky\nroad\ncar\n"
    with Image.open(tmp_path / "out" / "legend.png") as legend:
        shown = {color for _, color in legend.convert("RGB").getcolors(1 << 20)}
    assert {tuple(palette[3 * k : 3 * k + 3]) for k in (1, 2, 3)} <= shown
    missing = geo_pretrain("predict", run, tmp_path / "nowhere", "-o", tmp_path / "none", expected=1)
    assert "nowhere' does not exist; accepted: images (.png" in missing.errors


def test_a_prediction_below_its_images_is_no_input_of_the_next_and_leaves_nothing_of_the_one_before(run, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / "new" / name)
    words = ["predict", run, tmp_path / "new", "-o", tmp_path / "new" / "out"]
    geo_pretrain(*words)
    kept = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    (tmp_path / "new" / "out" / "detections.json").write_text("of an earlier run")
    (tmp_path / "new" / "out" / "mine.txt").write_text("stays")
    (tmp_path / "new" / "b.jpg").unlink()
    geo_pretrain(*words)
    index = json.loads((tmp_path / "new" / "out" / "predictions.json").read_text())
    assert [item["name"] for item in index["items"]] == ["a"]
    left = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert left == {name for name in kept if not name.startswith("b.")} | {"mine.txt"}


@pytest.mark.parametrize("names", [("x.png", "x.labels.png"), ("legend.png",)])
def test_names_that_other_files_of_a_prediction_have_are_refused(run, tmp_path, names):
    for name in names:
        write_image(tmp_path / "new" / name)
    said = geo_pretrain("predict", run, tmp_path / "new", "-o", tmp_path / "out", expected=1).errors
    assert f"Files of '{names[-1].removesuffix('.png')}' would have names of others of this prediction" in said
    assert not (tmp_path / "out").exists()


def test_a_path_may_have_any_character(run, tmp_path):
    own = shutil.copytree(run.parent / "data", tmp_path / "\N{GRINNING FACE} [1] 100%")
    words = ["--data", f"folder:{own}", "--steps", 1, "--set", "network.width=8", "--out", tmp_path / "out"]
    geo_pretrain("finetune", "folder_unet", "-b", "scratch", "--set", "network.encoder=resnet18", *words, *SMALL)


def test_an_image_in_both_splits_is_refused(tmp_path):
    write_flat(tmp_path, count=3)
    (tmp_path / "train.txt").write_text("0\n1\n")
    (tmp_path / "val.txt").write_text("1\n2\n")
    words = ["finetune", "folder_unet", "-b", "scratch", "--data", f"folder:{tmp_path}", "--steps", 1]
    words += ["--out", tmp_path / "out"]
    assert "1 images are in train and in val: 1.jpg" in geo_pretrain(*words, *SMALL, expected=1).errors


def test_what_cannot_be_predicted_on_is_told_before_the_network_is_loaded_and_nothing_is_made(
    run, tmp_path, monkeypatch
):
    def said(*words):
        return geo_pretrain("predict", run, *words, "-o", tmp_path / "answers", expected=1).errors

    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert "None of 1 items can be read" in said(tmp_path / "broken.jpg")
    monkeypatch.setattr(predicting, "load_task", lambda *args, **more: pytest.fail("the network was loaded"))
    assert f"there is no '{tmp_path / 'nope.jpg'}' here" in said(tmp_path / "nope.jpg")
    options = said(tmp_path / "broken.jpg", "--option", "foo=1")
    assert "Options of files are 'foo=1'; accepted of images: none. Leave out --option" in options
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jpg"]


def test_pictures_have_the_colors_of_the_data(tmp_path):
    found = Detections(np.array([[2, 3, 20, 20]], np.float32), np.array([2]), np.array([0.9], np.float32), None)
    place = Place(tmp_path, "x", [], [(10, 20, 30), (40, 250, 60)])
    write_prediction(found, place, np.zeros((40, 60, 3), np.uint8), ("pen", "mug"))
    with Image.open(tmp_path / "x.png") as image:
        assert image.getpixel((2, 12)) == (40, 250, 60)
    assert place.files == ["x.boxes.json", "x.png"]
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 25:30, 40:50] = masks[1, 30:36, 5:9] = True
    boxes, scores = np.array([[40, 25, 50, 30], [5, 30, 9, 36]], np.float32), np.array([0.5, 0.49], np.float32)
    found = Detections(boxes, np.array([2, 1]), scores, masks)
    write_prediction(found, Place(tmp_path, "y", [], place.colors), np.zeros((40, 60, 3), np.uint8), ("pen", "mug"))
    with Image.open(tmp_path / "y.png") as image, Image.open(tmp_path / "y.instances.png") as numbers:
        assert np.asarray(image)[30:36, 5:9].max() == 0  # a mask that is not sure is numbered, and not drawn
        assert (np.asarray(image)[29, 45].max() > 0, numbers.getpixel((6, 32)), numbers.getpixel((45, 29))) == (
            True,
            2,
            1,
        )


def test_detections_are_in_cocos_format_with_the_datas_own_categories(tmp_path):
    masks = np.zeros((2, 12, 16), bool)
    masks[0, 3:7, 2:7] = masks[1, :2, :2] = True
    boxes = np.array([[2, 3, 7, 7], [0, 0, 2, 2]], np.float32)
    file = CocoFile(("pen", "mug"), (3, 90))
    file.add("1.jpg", (12, 16, 3), Detections(boxes, np.array([2, 1]), np.array([0.75, 0.5], np.float32), masks))
    (tmp_path / "found.json").write_text(json.dumps(file.tree()))
    (tmp_path / "truth.json").write_text(json.dumps(boxes_json()))
    read = COCO(tmp_path / "found.json")
    assert {c["id"]: c["name"] for c in read.loadCats(read.getCatIds())} == {3: "pen", 90: "mug"}
    first = read.loadAnns(1)[0]
    assert (first["category_id"], first["bbox"], first["area"], first["score"]) == (90, [2, 3, 5, 4], 20, 0.75)
    assert np.array_equal(read.annToMask(first), masks[0])
    truth = COCO(tmp_path / "truth.json")
    assert len(truth.loadRes(file.tree()["annotations"]).getAnnIds(catIds=[90])) == 1


@pytest.mark.parametrize("more", [[], ["--sweep"]])
def test_a_library_that_training_needs_is_told_before_data_and_backbone_are_read(more, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    command = ["finetune", "folder_mask_rcnn", "-b", tmp_path / "nowhere", "--data", f"folder:{tmp_path / 'none'}"]
    ended = geo_pretrain(*map(str, command), "--steps", "2", "--out", str(tmp_path / "out"), *more, expected=1)
    assert "'pycocotools', which is not installed: pip install 'geo_pretrain[training]'" in ended.errors
    assert not list(tmp_path.iterdir())


def test_masks_of_ones_own_categories_are_trained_and_found(tmp_path, monkeypatch):
    boxes = boxes_json(2)
    for part in (*boxes["images"], *boxes["annotations"]):  # ids that are no count from 1
        part |= {key: part[key] + 40 for key in part.keys() & {"image_id"} | ({"id"} if "file_name" in part else set())}
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "annotations.json").write_text(json.dumps(boxes))
        for number in range(2):
            write_image(tmp_path / "data" / split / f"{number}.jpg", number)
    network = ["network.encoder=resnet18", "network.options.width=8", "network.options.roi_batch=4"]
    shape = ["data.augment.shorter=[64, 64]", "network.options.proposals=8", "network.options.score_threshold=0.0"]
    sets = [part for item in (*network, *shape) for part in ("--set", item)]
    small = ["--steps", "1", "--set", "optim.batch=2", "--set", "workers=0", "--out", str(tmp_path / "out"), *sets]
    geo_pretrain("finetune", "folder_mask_rcnn", "-b", "scratch", "--data", f"folder:{tmp_path / 'data'}", *small)
    geo_pretrain("predict", str(tmp_path / "out"), str(tmp_path / "data" / "val"), "-o", str(tmp_path / "answers"))
    found = json.loads((tmp_path / "answers" / "detections.json").read_text())
    assert [image["file_name"] for image in found["images"]] == ["0.jpg", "1.jpg"]
    data = f"folder:{tmp_path / 'data'}"
    geo_pretrain("predict", tmp_path / "out", "--data", data, "-o", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "detections.json").read_text())
    truth = json.loads((tmp_path / "data" / "val" / "annotations.json").read_text())
    for key in ("id", "file_name"):  # as the data's own annotations have them
        assert [image[key] for image in again["images"]] == [image[key] for image in truth["images"]]
    write_image(tmp_path / "thin.png")
    Image.fromarray(np.zeros((1, 2000, 3), np.uint8)).save(tmp_path / "thin.png")
    both = [tmp_path / "thin.png", tmp_path / "data" / "val"]
    ended = geo_pretrain("predict", tmp_path / "out", *both, "-o", tmp_path / "two")
    assert "nothing is left of it" in " ".join(ended.output.split())
    assert found["categories"] == [{"id": 3, "name": "pen"}, {"id": 90, "name": "mug"}]
    assert gp.load_backbone(tmp_path / "out").load_report.coverage == 1
    network, photo = gp.load_finetuned(tmp_path / "out"), Image.open(tmp_path / "data" / "val" / "0.jpg")
    with torch.inference_mode():
        (direct,) = network([network.transforms(photo)])  # a detector normalizes by itself: [0, 1] is its input
    assert np.array_equal(direct["scores"].numpy(), network.predict(photo).scores)
    assert (network.contract.std, network.training) == ((1.0, 1.0, 1.0), False)
    assert "takes a list of images [3, H, W], RGB in [0, 1], of any size" in repr(network)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    other = ["predict", tmp_path / "out", tmp_path / "data" / "val", "-o", tmp_path / "other"]
    assert "pip install 'geo_pretrain[training]'" in geo_pretrain(*other, expected=1).errors
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"steps": 900}, (900, None, (600, 800), 10)),
        ({"steps": 9}, (9, None, (6, 8), 0)),
        ({"epochs": 2.5}, (None, 2.5, (60_000, 80_000), 1000)),
    ],
)
def test_milestones_and_warm_up_go_with_the_length(given, found):
    optim = with_length(load_finetune_recipe("coco_mask_rcnn_r50"), **given).optim  # 90,000 steps, 1000 of warm-up
    assert (optim.steps, optim.epochs, optim.milestones, optim.warmup) == found


def test_weights_without_a_networks_name_are_told_at_once_with_a_guess(tmp_path):
    recipe = load_finetune_recipe("folder_unet", [f"data.path={tmp_path}"])  # which has no data: starts come first
    with pytest.raises(CheckpointError, match="'package:not_here': no package 'not_here' is installed here"):
        finetune(recipe, "package:not_here", tmp_path / "out")
    file = tmp_path / "efficientnet-lite0-1234.pth"
    file.write_bytes(b"not looked at")
    with pytest.raises(
        RecipeError, match=r"By its name: --set network.encoder=timm/efficientnet_lite0\. Accepted: resnet18"
    ):
        run_sweep(recipe, ["scratch", f"file:{file}"], [1.0], [0], tmp_path / "out")
    assert (guessed_encoder("my-ResNet50.v2"), guessed_encoder("mine")) == ("resnet50", None)
    gone = finetuned_license("folder", "CC-BY-4.0", "package:not_here", "timm/efficientnet_lite0")
    assert gone.base_model == "package:not_here (LicenseRef-unknown)"
    assert (
        finetuned_license("folder", "MIT", "gone (old)/x", "resnet18").base_model == "gone [old]/x (LicenseRef-unknown)"
    )


def test_wrong_lengths_licenses_backbones_and_devices_are_named(tmp_path):
    start = ["finetune", "folder_unet", "-b", "scratch", "--data", f"folder:{tmp_path}", "--out", str(tmp_path / "x")]
    both = geo_pretrain(*start, "--steps", "2", "--epochs", "1", expected=2).errors
    assert "accepted" in both
    bare = [*start[:5], str(tmp_path), *start[6:]]
    assert f"Did you mean folder:{tmp_path}?" in geo_pretrain(*bare, expected=1).errors
    for length in ("0", "nan", "inf"):
        assert f"--epochs is {length}" in geo_pretrain(*start, "--epochs", length, expected=2).errors
    with pytest.raises(RecipeError, match=r"data\.license: Unknown license 'CC-BY'"):
        load_finetune_recipe("folder_unet", ["data.license=CC-BY"])
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="Device 'cuda': torch sees 0 GPUs here; accepted: cpu"):
            checked_device("cuda")
        with pytest.raises(ValueError, match="Device 'cuda:3': torch sees 0 GPUs here; accepted: cpu"):
            gp.load_backbone("pri3d_view_geo_r50", pretrained=False, device="cuda:3")
    with pytest.raises(ValueError, match=r"dtype is 'float16'; accepted: .* Write torch\.float16, without quotes"):
        gp.load_backbone("pri3d_view_geo_r50", pretrained=False, dtype="float16")
    with pytest.raises(ValueError, match="Device 'tpu!' is none that torch knows"):
        gp.load_backbone("pri3d_view_geo_r50", pretrained=False, device="tpu!")
