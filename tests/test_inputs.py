"""What is given to networks and transforms, cell by cell: refused with what was given, what is accepted, a line.

The line is Python that the message holds, and it is run: what it makes is taken.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from geo_pretrain.backbones.depth_unet import ResNetDepthUNet
from geo_pretrain.backbones.feature_pair import FeaturePair
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.catalog import list_backbones
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import InputError
from geo_pretrain.inputs import check_images
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.sparse.tensor import SparseTensor

SEED = np.random.default_rng(0)
BYTES = SEED.integers(0, 256, (40, 48, 3), dtype=np.uint8)  # one photo, [H, W, C]
IMAGES = torch.from_numpy(SEED.standard_normal((2, 3, 40, 48)).astype(np.float32))
NAN = torch.where(torch.arange(48) == 7, torch.nan, IMAGES)


@cache
def networks() -> dict[str, Any]:
    """Every network of images: entry point -> what is called `network` in messages."""
    made = {
        "encoder": ResNetEncoder(18, width=8),
        "unet": ResNetUNet(18, width=8),
        "depth_unet": ResNetDepthUNet(18, width=8),
        "pair": FeaturePair(ResNetUNet(18, width=8, out_chans=32), SRUNet("18A", width=4)).image_network,
    }
    for network in made.values():
        network.eval().contract = ImageContract(size=(40, 48))
    return made


def run(network: nn.Module, x: Any) -> Any:
    with torch.no_grad():
        return network(x)


PHOTO = "network(network.transforms(image)[None])"
STACK = "network(torch.stack([network.transforms(image) for image in images]))"

# what is given, what the message says of it, the line of the message that mends it (called: image, images)
IMAGE_CELLS: dict[str, tuple[Any, str, str]] = {
    "uint8": (torch.from_numpy(BYTES).permute(2, 0, 1)[None], "torch.uint8", "network(network.transforms(images))"),
    "int64": (
        torch.zeros(1, 3, 40, 48, dtype=torch.int64),
        "torch.int64",
        "network(network.transforms(images.to(torch.uint8)))",
    ),
    "bool": (torch.ones(1, 3, 40, 48, dtype=torch.bool), "torch.bool", "network(network.transforms(images.float()))"),
    "float64": (IMAGES.double(), "torch.float64, the weights torch.float32", "network(images.to(torch.float32))"),
    "half": (IMAGES.half(), "torch.float16, the weights torch.float32", "network(images.to(torch.float32))"),
    "bfloat16": (IMAGES.bfloat16(), "torch.bfloat16, the weights", "network(images.to(torch.float32))"),
    "numpy": (BYTES, "a numpy array uint8 (40, 48, 3)", PHOTO),
    "numpy batch": (BYTES[None], "a numpy array uint8 (1, 40, 48, 3)", STACK),
    "numpy BCHW": (IMAGES.numpy(), "array float32 (2, 3, 40, 48)", "network(torch.from_numpy(images))"),
    "numpy BHWC": (
        IMAGES.permute(0, 2, 3, 1).numpy(),
        "array float32 (2, 40, 48, 3)",
        "network(torch.from_numpy(images).permute(0, 3, 1, 2))",
    ),
    "numpy bytes BCHW": (
        BYTES.transpose(2, 0, 1)[None],
        "array uint8 (1, 3, 40, 48)",
        "network(network.transforms(torch.from_numpy(images)))",
    ),
    "PIL": (PIL.Image.fromarray(BYTES), "a PIL image of mode 'RGB', 48 x 40 pixels", PHOTO),
    "list": ([BYTES, BYTES], "a list of 2 ndarray", STACK),
    "path": (
        Path("photo.png"),
        "the path 'photo.png'",
        "network(network.transforms(PIL.Image.open('photo.png'))[None])",
    ),
    "None": (None, "NoneType", PHOTO),
    "no batch": (IMAGES[0], "shape (3, 40, 48)", "network(image[None])"),
    "HWC": (IMAGES[0].permute(1, 2, 0), "shape (40, 48, 3)", "network(image.permute(2, 0, 1)[None])"),
    "BHWC": (IMAGES.permute(0, 2, 3, 1), "shape (2, 40, 48, 3)", "network(images.permute(0, 3, 1, 2))"),
    "gray": (IMAGES[:, :1], "shape (2, 1, 40, 48)", "images.repeat(1, 3, 1, 1)"),
    "alpha": (torch.cat([IMAGES, IMAGES[:, :1]], 1), "shape (2, 4, 40, 48)", "images[:, :3]"),
    "empty": (IMAGES[:0], "[0, C, H, W]", ""),
    "small": (IMAGES[:, :, :31], "31 x 48 pixels", "network.transforms"),
    "NaN": (NAN, "240 of 11520 values", "torch.nan_to_num(images, 0, 0, 0)"),
    "infinite": (IMAGES / 0, "values of the images are not finite", "torch.nan_to_num(images, 0, 0, 0)"),
    "elsewhere": (IMAGES.to("meta"), "on meta, the network is on cpu", ""),
}


@pytest.mark.parametrize("cell", IMAGE_CELLS)
@pytest.mark.parametrize("entry", ["encoder", "unet", "depth_unet", "pair"])
def test_images_into_networks(entry: str, cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network, (given, said, line) = networks()[entry], IMAGE_CELLS[cell]
    with pytest.raises(InputError) as refused:
        run(network, given)
    text = str(refused.value)
    assert said in text
    assert "accepted" in text or "takes images [B, 3, H, W]" in text
    assert line in text
    if line and entry == "encoder" and given is not None:
        monkeypatch.chdir(tmp_path)
        PIL.Image.fromarray(BYTES).save("photo.png")
        names = {"network": network, "torch": torch, "PIL": PIL, "images": given, "image": given}
        made = eval(line, names)
        if isinstance(made, torch.Tensor):
            run(network, made if made.is_floating_point() else network.transforms(made))


def test_images_for_weights_of_another_type():
    for dtype in (torch.float16, torch.float64):
        network = copy.deepcopy(networks()["encoder"]).to(dtype)
        with pytest.raises(InputError, match=rf"torch.float32, the weights {dtype}.*images.to\({dtype}\)"):
            run(network, IMAGES)
        assert run(network, IMAGES.to(dtype))[0].dtype == dtype


def test_autocast_takes_what_it_converts():
    network = networks()["encoder"]
    with torch.autocast("cpu", torch.bfloat16):
        assert run(network, IMAGES.bfloat16())[1].dtype == torch.bfloat16
        with pytest.raises(InputError, match=r"torch.float64, the weights torch.float32"):
            run(network, IMAGES.double())


@pytest.mark.parametrize(
    ("scale", "said"),
    [(255.0, r"span \[\S+, \S+\] instead of about \[-2.1, 2.6\]: pixels from 0 to 255"), (-60.0, "another normal")],
)
def test_pixels_that_were_not_normalized_are_told_once_at_the_callers_line(scale: float, said: str):
    network = copy.deepcopy(networks()["unet"])
    network._looked = False
    pixels = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0)) * scale
    with pytest.warns(UserWarning, match=rf"{said}.*network\(network.transforms\(images\)\)") as caught:
        run(network, pixels)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(network, pixels)
        run(pickle.loads(pickle.dumps(network)), pixels)


def test_pixels_that_were_not_normalized_are_told_of_after_good_ones():
    network = copy.deepcopy(networks()["unet"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(network, IMAGES)
    with pytest.warns(UserWarning, match="pixels from 0 to 255"):
        run(network, torch.rand(1, 3, 40, 48) * 255)


def test_what_transforms_give_is_quiet():
    network = copy.deepcopy(networks()["unet"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pixels in (np.zeros_like(BYTES), np.full_like(BYTES, 255), BYTES):
            run(network, network.transforms(pixels)[None])
        run(network, IMAGES)
        network.contract = None
        run(network, IMAGES * 255)


def test_values_are_not_looked_at_while_torch_traces():
    network = ResNetEncoder(18, width=8, out_indices=(0, 1)).eval()
    network.contract = ImageContract()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        program = torch.export.export(
            network, (IMAGES * 255,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
        )
        assert not [node for node in program.graph.nodes if "aminmax" in str(node.target)]
        traced = torch.jit.trace(network, IMAGES * 255, check_trace=False)
        assert "aminmax" not in str(traced.inlined_graph)
        torch.func.vmap(lambda one: network(one[None])[0])(IMAGES)
        network.to("meta")(IMAGES.to("meta"))
    assert torch.isnan(traced(NAN)[0]).any()


def test_checks_are_no_part_of_a_trace():
    class Checked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            check_images(x, 3, torch.zeros(1))
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(Checked(), IMAGES)
    assert traced(IMAGES[:1, :, :33]).shape == (1, 3, 33, 48)


def test_a_network_whose_encoder_has_no_contract_is_traced():
    """torch.jit.trace reads every attribute that is listed; an encoder in a U-Net has no transforms of its own."""
    network = ResNetUNet(18, width=8).eval()
    network.contract = ImageContract()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, torch.zeros(1, 3, 64, 64), check_trace=False)
    assert traced(torch.zeros(2, 3, 64, 64)).shape[0] == 2


def test_a_compiled_network_is_one_graph():
    network = ResNetEncoder(18, width=8, out_indices=(0,))
    network.contract = ImageContract()
    explained = torch._dynamo.explain(network)(IMAGES * 255)
    assert explained.graph_count == 1, explained.break_reasons
    torch._dynamo.reset()


# --- images into transforms

TRANSFORM_CELLS: dict[str, tuple[Any, str, str]] = {
    "0 to 255 as floats": (IMAGES[0].abs() * 90, "these span", "dividing by 255"),
    "normalized": (IMAGES[0], "these span", "normalized already"),
    "NaN": (NAN[0].clamp(0, 1), "120 of 5760 values are not finite", "torch.nan_to_num(values, 0, 0, 0)"),
    "int64": (torch.from_numpy(BYTES).permute(2, 0, 1).long(), "torch.int64", "transforms(image.to(torch.uint8))"),
    "HWC tensor": (torch.from_numpy(BYTES), "shape (40, 48, 3), torch.uint8", "transforms(image.permute(2, 0, 1))"),
    "BHWC": (torch.from_numpy(BYTES)[None], "shape (1, 40, 48, 3)", "transforms(image.permute(0, 3, 1, 2))"),
    "CHW array": (BYTES.transpose(2, 0, 1), "uint8 (3, 40, 48)", "transforms(image.transpose(1, 2, 0))"),
    "float array": (BYTES / 255, "float64 (40, 48, 3)", "transforms(torch.from_numpy(image).permute(2, 0, 1))"),
    "int32 array": (BYTES.astype(np.int32), "int32 (40, 48, 3)", "transforms(image.astype(numpy.uint8))"),
    "gray array": (BYTES[:, :, 0], "uint8 (40, 48)", "transforms(numpy.repeat(image[..., None], 3, axis=2))"),
    "float CHW array": (BYTES.transpose(2, 0, 1) / 255, "float64 (3, 40, 48)", "transforms(torch.from_numpy(image))"),
    "float BCHW array": (IMAGES.numpy() % 1, "float32 (2, 3, 40, 48)", "transforms(torch.from_numpy(image))"),
    "float BHWC array": (
        BYTES[None] / 255,
        "(1, 40, 48, 3)",
        "transforms(torch.from_numpy(image).permute(0, 3, 1, 2))",
    ),
    "float gray array": (BYTES[:, :, 0] / 255, "(40, 48)", "transforms(torch.from_numpy(image).expand(3, -1, -1))"),
    "BCHW array": (BYTES.transpose(2, 0, 1)[None], "uint8 (1, 3, 40, 48)", "transforms(torch.from_numpy(image))"),
    "bool array": (BYTES > 99, "bool (40, 48, 3)", "transforms(image.astype(numpy.uint8) * 255)"),
    "bool tensor": (torch.ones(3, 40, 48, dtype=torch.bool), "torch.bool", "transforms(image.float())"),
    "gray image": (torch.zeros(1, 40, 48), "shape (1, 40, 48)", "transforms(image.expand(3, -1, -1))"),
    "gray batch": (torch.zeros(2, 1, 40, 48), "shape (2, 1, 40, 48)", "transforms(image.expand(-1, 3, -1, -1))"),
    "empty list": ([], "Got list", "There is nothing in it: leave it out."),
    "gray tensor": (torch.from_numpy(BYTES[:, :, 0]), "shape (40, 48)", "transforms(image.expand(3, -1, -1))"),
    "RGBA array": (np.dstack([BYTES, BYTES[:, :, :1]]), "uint8 (40, 48, 4)", "transforms(image[..., :3])"),
    "RGBA tensor": (torch.zeros(4, 40, 48), "shape (4, 40, 48)", "transforms(image[..., :3, :, :])"),
    "5 channels": (torch.zeros(5, 40, 48), "shape (5, 40, 48)", "load the network with in_chans=5"),
    "batch of arrays": (BYTES[None], "uint8 (1, 40, 48, 3)", "torch.stack([transforms(image) for image in images])"),
    "list": ([BYTES], "a list of 1 ndarray", "torch.stack([transforms(image) for image in images])"),
    "path": ("photo.png", "the text 'photo.png'", "transforms(PIL.Image.open('photo.png'))"),
    "16 bit": (
        PIL.Image.new("I;16", (48, 40)),
        "mode 'I;16'",
        "transforms(torch.from_numpy(numpy.array(image) / LARGEST).expand(3, -1, -1))",
    ),
    "empty batch": (torch.zeros(0, 3, 40, 48), "shape (0, 3, 40, 48)", ""),
    "no pixels": (torch.zeros(3, 0, 48), "shape (3, 0, 48)", ""),
    "None": (None, "NoneType", ""),
}


@pytest.mark.parametrize("cell", TRANSFORM_CELLS)
def test_images_into_transforms(cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given, said, line = TRANSFORM_CELLS[cell]
    transforms = ImageContract(size=(40, 48)).transforms()
    with pytest.raises(InputError) as refused:
        transforms(given)
    text = str(refused.value)
    assert said in text
    assert "accepted" in text or "must lie in [0, 1]" in text
    assert line in text
    if line.endswith(")") and "nan_to_num" not in line:
        monkeypatch.chdir(tmp_path)
        PIL.Image.fromarray(BYTES).save("photo.png")
        names = {"transforms": transforms, "torch": torch, "numpy": np, "PIL": PIL, "image": given, "images": given}
        names["LARGEST"] = 65535
        assert eval(line, names).shape[-3:] == (3, 40, 48)


def test_half_and_double_images_in_range_become_float32():
    transforms = ImageContract(size=(40, 48)).transforms()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert transforms(torch.full((3, 40, 48), 0.5, dtype=dtype)).dtype == torch.float32


# --- points

CLOUD = SEED.random((30, 3)).astype(np.float32)
COLORS = SEED.integers(0, 256, (30, 3), dtype=np.uint8)
RGB = VoxelContract(0.05, ("R", "G", "B"), offset=-0.5)
ONES = VoxelContract(0.05)
TWO = "features=torch.cat(features), batch"
JOINED = "encode_points({0}(clouds), batch=numpy.repeat(range(len(clouds)), [len(cloud) for cloud in clouds]))"

# points, features of networks with color or None, what the message says, the line
POINT_CELLS: dict[str, tuple[Any, Any, str, str]] = {
    "list of arrays": ([CLOUD, CLOUD[:9]], None, "a list of 2 ndarray", JOINED.format("numpy.concatenate")),
    "list of equal arrays": ([CLOUD, CLOUD], None, "a list of 2 ndarray", JOINED.format("numpy.concatenate")),
    "list of tensors": ([torch.from_numpy(CLOUD)] * 2, None, "a list of 2 Tensor", JOINED.format("torch.cat")),
    "batch": (CLOUD[None], None, "(1, 30, 3)", JOINED.format("numpy.concatenate").replace("clouds", "points")),
    "npy": ("scan.npy", None, "the text 'scan.npy'", "numpy.load('scan.npy')"),
    "ply": (Path("scan.ply"), None, "the path 'scan.ply'", "`geo-pretrain predict` does"),
    "None": (None, None, "NoneType", ""),
    "dict": ({"coord": CLOUD}, None, "dict", ""),
    "millimeters": (CLOUD * 4000, None, "m; accepted: meters, up to 1000", "points / 1000"),
    "NaN": (
        np.where(np.arange(30)[:, None] == 4, np.nan, CLOUD),
        None,
        "not finite (NaN or infinity), 1 of 30",
        "good",
    ),
    "empty": (CLOUD[:0], None, "(0, 3)", "leave it out"),
    "[N, 2]": (CLOUD[:, :2], None, "(30, 2)", "x, y and z"),
    "[N, 6]": (np.hstack([CLOUD, CLOUD]), None, "(30, 6)", "encode_points(cloud[:, :3], features=cloud[:, 3:])"),
    "[3, N]": (CLOUD.T, None, "(3, 30)", "points.T"),
    "one point": (CLOUD[0], None, "(3,)", "points.reshape(-1, 3)"),
    "integers": ((CLOUD * 100).astype(int), None, "torch.int64 (30, 3)", "points * METERS_PER_UNIT"),
    "no colors": (CLOUD, ..., "needs features", "encode_points(points, features)"),
    "colors to 255": (CLOUD, COLORS.astype(np.float32), "these span", "dividing by 255"),
    "int colors": (CLOUD, COLORS.astype(int), "features are torch.int64", "features.to(torch.uint8)"),
    "fewer colors": (CLOUD, COLORS[:9], "features are (9, 3)", "one row a point"),
    "gray": (CLOUD, COLORS[:, :1], "features are (30, 1)", "[30, 3] (R, G, B)"),
    "list of colors": (CLOUD, [COLORS, COLORS], "features are a list of 2 ndarray", "numpy.concatenate(features)"),
    "path of colors": (CLOUD, "colors.npy", "the text 'colors.npy'", "numpy.load('colors.npy')"),
    "NaN colors": (CLOUD, CLOUD * np.nan, "90 of 90 values are not finite", "torch.nan_to_num(values, 0, 0, 0)"),
}


@cache
def sparse(contract: VoxelContract) -> SRUNet:
    network = SRUNet("18A", width=4).eval()
    network.contract = contract
    return network


def point_entries(cell_features: Any) -> list[Callable[[Any, Any], Any]]:
    """The public functions that take points."""
    network = sparse(ONES if cell_features is None else RGB)
    pair = FeaturePair(ResNetUNet(18, width=8), network)
    return [network.transforms, network.encode_points, pair.encode_points, pair.point_transforms]


@pytest.mark.parametrize("cell", POINT_CELLS)
def test_points(cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points, features, said, line = POINT_CELLS[cell]
    for entry in point_entries(features):
        with pytest.raises(InputError) as refused:
            entry(points, None if features is ... else features)
        text = str(refused.value)
        assert said in text
        assert "accepted" in text or "must lie in [0, 1]" in text
        assert line in text
    if line.startswith("encode_points(") and features is None and "cloud[" not in line:
        names = {"encode_points": sparse(ONES).encode_points, "torch": torch, "numpy": np}
        assert len(eval(line, names | {"clouds": points, "points": points})) == sum(map(len, points))


def test_numbers_of_clouds():
    transforms = ONES.transforms()
    for batch, said in (([0] * 29, r"\(29,\).*N = 30"), (np.zeros(30), r"torch.float64 \(30,\).*batch.long\(\)")):
        with pytest.raises(InputError, match=said):
            transforms(CLOUD, batch=batch)
    assert transforms(CLOUD, batch=[0] * 12 + [1] * 18).coords[:, 0].tolist().count(1) == 18


def test_sparse_tensors_into_networks():
    network, coords = sparse(RGB), torch.arange(36, dtype=torch.int32).reshape(9, 4) * torch.tensor([0, 1, 1, 1])
    coords = coords.int()
    feats = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    for given, said in (
        (torch.from_numpy(CLOUD), r"Got Tensor \(a tensor of shape \(30, 3\), .*encode_points\(points\)"),
        (CLOUD, r"Got ndarray \(a numpy array float32 \(30, 3\)\); accepted: a SparseTensor"),
        (SparseTensor(coords, feats * torch.nan), "27 of 27 values of the features are not finite"),
        (SparseTensor(coords, feats.double()), r"torch.float64, the weights torch.float32.*voxels.to\(torch.float32\)"),
        (SparseTensor(coords, feats.half()), r"torch.float16, the weights torch.float32.*or torch.autocast"),
        (SparseTensor(coords, feats[:, :2]), "takes 3 feature channels .*; got 2"),
    ):
        with pytest.raises(InputError, match=said):
            run(network, given)
    assert len(run(network, SparseTensor(coords, feats))) == 9
    with pytest.raises(InputError, match=r"coords are a numpy array int32 \(9, 4\); accepted: a tensor"):
        SparseTensor(coords.numpy(), feats.numpy())


@pytest.mark.parametrize(("given", "said"), [(None, "None"), (3, "3"), (["a"], "a list of 1 str")])
def test_what_is_neither_a_name_nor_a_folder_is_told(given, said):
    accepted = 'a name such as "pri3d_view_geo_r50", or a folder'
    for load in (load_backbone, partial(load_backbone, pretrained=False)):
        with pytest.raises(InputError, match=re.escape(f"load_backbone takes {accepted}; got {said}.")):
            load(given)
    with pytest.raises(InputError, match=re.escape(f"takes {accepted}; got {said}.")):
        verify(given)
    with pytest.raises(InputError, match=re.escape(f'takes a pattern such as "pri3d_*"; got {said}.')):
        list_backbones(given)
