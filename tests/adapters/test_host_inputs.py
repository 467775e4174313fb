"""Networks of other libraries say what they were given, what they accept and the line that mends it, as ours do."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch

from geo_pretrain.adapters import smp
from geo_pretrain.adapters import torchvision as hosts
from geo_pretrain.adapters.timm import register
from geo_pretrain.errors import InputError

BYTES = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
IMAGES = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, 64, 64)).astype(np.float32))
NAME = "pri3d_view_r18"


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    register()
    return {
        "deeplabv3": hosts.deeplabv3(NAME, num_classes=3, pretrained=False),
        "smp": smp.unet(NAME, num_classes=3, pretrained=False),
        "timm": timm.create_model(f"{NAME}.rooms", num_classes=0).eval(),
    }


CELLS = {
    "uint8": (torch.from_numpy(BYTES).permute(2, 0, 1)[None], "torch.uint8", "network.transforms(images)"),
    "numpy": (BYTES, "a numpy array uint8 (64, 64, 3)", "network(network.transforms(image)[None])"),
    "PIL": (PIL.Image.fromarray(BYTES), "a PIL image of mode 'RGB'", "network(network.transforms(image)[None])"),
    "no batch": (IMAGES[0], "shape (3, 64, 64)", "network(image[None])"),
    "HWC": (IMAGES.permute(0, 2, 3, 1), "shape (1, 64, 64, 3)", "images.permute(0, 3, 1, 2)"),
    "half": (IMAGES.half(), "torch.float16, the weights torch.float32", "network(images.to(torch.float32))"),
    "double": (IMAGES.double(), "torch.float64, the weights torch.float32", "network(images.to(torch.float32))"),
    "empty": (IMAGES[:0], "[0, C, H, W]", ""),
    "NaN": (IMAGES * torch.nan, "12288 of 12288 values", "torch.nan_to_num(images"),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("host", ["deeplabv3", "smp", "timm"])
def test_images(networks: dict[str, Any], host: str, cell: str):
    given, said, line = CELLS[cell]
    with pytest.raises(InputError) as refused, torch.no_grad():
        networks[host](given)
    assert said in str(refused.value)
    assert line in str(refused.value)


def test_pixels_to_255_are_told_and_a_copy_keeps_its_check(networks: dict[str, Any]):
    network = pickle.loads(pickle.dumps(copy.deepcopy(networks["deeplabv3"])))
    network._looked = False
    with pytest.warns(UserWarning, match="pixels from 0 to 255") as caught, torch.no_grad():
        network(IMAGES.abs() * 90)
    assert caught[0].filename == __file__


def test_a_scripted_network_still_runs_and_is_saved(networks: dict[str, Any], tmp_path):
    network = networks["deeplabv3"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(network)
        scripted.save(tmp_path / "x.pt")
        assert torch.equal(scripted(IMAGES)["out"], network(IMAGES)["out"])


def test_images_may_be_given_by_their_name(networks: dict[str, Any]):
    with torch.no_grad():
        assert torch.equal(networks["deeplabv3"](x=IMAGES)["out"], networks["deeplabv3"](IMAGES)["out"])
        detector = hosts.faster_rcnn(NAME, num_classes=3, pretrained=False, min_size=64, box_score_thresh=0.9)
        assert set(detector(images=[torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores"}
        with pytest.raises(InputError, match="needs dividing by 255"):
            detector(images=[torch.rand(3, 64, 64) * 255])
        with pytest.raises(TypeError, match="images"):
            detector()


def test_detectors_take_lists():
    network = hosts.faster_rcnn(NAME, num_classes=3, pretrained=False, min_size=64, box_score_thresh=0.9)
    pixels = torch.rand(3, 64, 64)
    for given, said in (
        ([], r"list of images is empty; accepted: at least one \[3, H, W\]"),
        (pixels, r"takes a list of images \[3, H, W\]; got a tensor of shape \(3, 64, 64\).*network\(\[network.tr"),
        (BYTES, r"got a numpy array uint8 \(64, 64, 3\)"),
        ("photo.png", "got the text 'photo.png'"),
        ([BYTES], r"one is a numpy array uint8 .*network\(\[network.transforms\(image\) for image in images\]\)"),
        ([pixels[:1]], r"one is a tensor of shape \(1, 64, 64\)"),
        ([(pixels * 255).byte()], r"An image is torch.uint8; accepted: float in \[0, 1\]"),
        ([pixels.double()], "torch.float64, the weights torch.float32"),
        ([pixels * 255], "up to 255 it needs dividing by 255"),
        ([pixels * torch.nan], r"spans \[nan, nan\]"),
    ):
        with pytest.raises(InputError, match=said), torch.no_grad():
            network(given)
    with torch.no_grad():
        assert set(network([network.transforms(BYTES)])[0]) == {"boxes", "labels", "scores"}


def test_devices_and_types_are_refused_before_anything_is_fetched():
    for options, said in (({"device": "cuda:77"}, "torch sees 0 GPUs"), ({"dtype": "float16"}, "Write torch.float16")):
        for name in (NAME, "timm/resnet18"):
            with pytest.raises(ValueError, match=said):
                hosts.deeplabv3(name, num_classes=3, pretrained=True, **options)
