"""What other libraries get from us: read by themselves, or compared with names and orders written by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickletools
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from geo_pretrain.catalog import Arch
from geo_pretrain.checkpoint import FINETUNED, Checkpoint
from geo_pretrain.contract import ImageContract, contract_from_dict
from geo_pretrain.convert.out import OUT_FORMATS, export_weights, write_export
from geo_pretrain.errors import CheckpointError, DigestMismatch, UnknownName, WeightsMismatch
from tests.convert import dense
from tests.forked import Forked
from tests.zoo import write_tiny, write_tiny_3d

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
OFFSETS = json.loads((DATA / "kernel_offsets.json").read_text())
HYBRID = [tuple(offset) for offset in OFFSETS["hybrid3_me04"]]
DEPTHS = (18, 50)
FORMATS_2D, FORMATS_3D = ("torchvision", "timm", "detectron2", "mmlab"), ("me05", "me04", "spconv", "torchsparse")


@pytest.fixture(scope="module")
def theirs() -> dict[int, nn.Module]:
    """torchvision's networks with random weights and norms that do something."""
    networks = {}
    for depth in DEPTHS:
        torch.manual_seed(depth)
        networks[depth] = getattr(torchvision.models, f"resnet{depth}")(num_classes=1).eval()
        for module in networks[depth].modules():
            if isinstance(module, nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
                torch.nn.init.normal_(module.running_mean, std=0.1)
    return networks


@pytest.fixture(scope="module")
def encoders(theirs: dict[int, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Checkpoint]:
    base = tmp_path_factory.mktemp("encoders")
    return {
        depth: write_tiny(
            base / f"stored_net_r{depth}",
            f"stored_net_r{depth}",
            arch=Arch("resnet_unet", {"depth": depth}),
            weights={"encoder": without_fc(network.state_dict())},
            contract=ImageContract(size=(64, 96)),
        )
        for depth, network in theirs.items()
    }


def write_light(folder: Path, depth: int = 18, **changes) -> Checkpoint:
    """A checkpoint with three small tensors, for what does not depend on the weights."""
    names = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")
    weights = {"encoder": {name: torch.arange(6.0).reshape(2, 3) for name in names}}
    return write_tiny(folder, "light_net_r18", arch=Arch("resnet", {"depth": depth}), weights=weights, **changes)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_light(tmp_path_factory.mktemp("light") / "light_net_r18")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The network whose weights MinkowskiEngine 0.5.4 wrote."""
    return write_tiny_3d(tmp_path_factory.mktemp("unet") / "tiny_net_srunet34")


@pytest.fixture(scope="module")
def engines() -> dict[str, Tensor]:
    """The state dict as MinkowskiEngine 0.5.4 wrote it."""
    golden = load_file(DATA / "srunet_small.safetensors")
    return {key.removeprefix("state_dict."): value for key, value in golden.items() if key.startswith("state_dict.")}


def without_fc(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def read(path: Path) -> dict:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- 2D ---


@pytest.mark.parametrize("depth, suffix", [(18, ".safetensors"), (18, ".pth"), (50, ".safetensors")])
def test_torchvision_loads_the_file(theirs, encoders, tmp_path: Path, depth: int, suffix: str):
    out = tmp_path / f"resnet{suffix}"
    assert write_export("torchvision", encoders[depth], out) == [out, tmp_path / f"resnet{suffix}.json"]
    network = getattr(torchvision.models, f"resnet{depth}")()
    network.fc = nn.Identity()
    network.load_state_dict(read(out), strict=True)
    assert equal(network.state_dict(), without_fc(theirs[depth].state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_loads_the_file_as_a_checkpoint_and_as_its_pretrained_weights(theirs, encoders, tmp_path: Path, suffix):
    out = write_export("timm", encoders[18], tmp_path / f"resnet{suffix}")[0]
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = create_feature_extractor(theirs[18], ["layer3", "flatten"])(x)
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=out).eval()
    torch.testing.assert_close(model(x), expected["flatten"])
    overlay = {"file": str(out), "num_classes": 0}
    maps = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()(x)
    torch.testing.assert_close(maps[3], expected["layer3"])


def detectron2_keys(depth: int) -> list[tuple[str, str]]:
    """(Detectron2's name, torchvision's) of every tensor of its build_resnet_backbone with frozen norms."""
    blocks, convs = {18: ((2, 2, 2, 2), 2), 50: ((3, 4, 6, 3), 3)}[depth]
    statistics = ("weight", "bias", "running_mean", "running_var")
    names = [("stem.conv1.weight", "conv1.weight")]
    names += [(f"stem.conv1.norm.{leaf}", f"bn1.{leaf}") for leaf in statistics]
    for stage, count in enumerate(blocks):
        for block in range(count):
            here, there = f"res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
            if block == 0 and (stage > 0 or depth == 50):
                names.append((f"{here}.shortcut.weight", f"{there}.downsample.0.weight"))
                names += [(f"{here}.shortcut.norm.{leaf}", f"{there}.downsample.1.{leaf}") for leaf in statistics]
            for conv in range(1, convs + 1):
                names.append((f"{here}.conv{conv}.weight", f"{there}.conv{conv}.weight"))
                names += [(f"{here}.conv{conv}.norm.{leaf}", f"{there}.bn{conv}.{leaf}") for leaf in statistics]
    return names


READER = """
import pickle, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "geo_pretrain", "torchvision"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import warnings, hashlib, json
warnings.simplefilter("error")
with open(sys.argv[1], "rb") as stream:
    data = pickle.load(stream, encoding="latin1")  # as Detectron2 does
model = data.pop("model")
print(json.dumps(data))
print(json.dumps({k: [str(v.dtype), list(v.shape), hashlib.sha256(v.tobytes()).hexdigest()] for k, v in model.items()}))
"""


@pytest.mark.parametrize("depth", DEPTHS)
def test_detectron2s_pickle_has_its_names_and_needs_numpy_alone(theirs, encoders, tmp_path: Path, depth: int):
    out = write_export("detectron2", encoders[depth], tmp_path / "r.pkl")[0]
    done = subprocess.run([sys.executable, "-c", READER, out], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    header, model = map(json.loads, done.stdout.splitlines())
    assert header == {"__author__": "geo_pretrain", "matching_heuristics": True}
    names = detectron2_keys(depth)
    assert len(names) == {18: 100, 50: 265}[depth]
    assert model.keys() == {name for name, _ in names}
    state = theirs[depth].state_dict()
    for name, torchvisions in names:
        digest = hashlib.sha256(state[torchvisions].numpy().tobytes()).hexdigest()
        assert model[name] == ["float32", list(state[torchvisions].shape), digest], name


def test_the_pickle_asks_for_nothing_that_an_old_numpy_lacks(light, tmp_path: Path):
    out = write_export("detectron2", light, tmp_path / "r.pkl")[0]
    asked = {argument for code, argument, _ in pickletools.genops(out.read_bytes()) if "GLOBAL" in code.name}
    assert asked == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


@pytest.mark.parametrize("depth", DEPTHS)
def test_detectron2s_config_says_what_the_network_expects(tmp_path: Path, depth: int):
    out, note, config = write_export("detectron2", write_light(tmp_path / "net", depth), tmp_path / "r.pkl")
    assert (note, config) == (tmp_path / "r.pkl.json", tmp_path / "r.pkl.yaml")
    narrow = {"RES2_OUT_CHANNELS": 64} if depth == 18 else {}
    assert yaml.safe_load(config.read_text()) == {
        "MODEL": {
            "WEIGHTS": str(out),
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "RESNETS": {"DEPTH": depth, "STRIDE_IN_1X1": False, **narrow},
        },
        "INPUT": {"FORMAT": "RGB"},
    }
    assert "license of the weights: MIT" in config.read_text()


def test_mmengine_finds_the_backbone(theirs, encoders, tmp_path: Path):
    out, _, config = write_export("mmlab", encoders[50], tmp_path / "r.pth")
    pixels = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}
    start = {"type": "Pretrained", "checkpoint": str(out), "prefix": "backbone."}
    backbone = {"type": "ResNet", "depth": 50, "style": "pytorch", "init_cfg": start}
    assert yaml.safe_load(config.read_text()) == {"model": {"data_preprocessor": pixels, "backbone": backbone}}
    checkpoint = torch.load(out, map_location="cpu", weights_only=True)
    assert checkpoint["meta"] == {"name": "stored_net_r50", "licence": "MIT"}
    # what its loader does with a prefix
    state = {key[9:]: value for key, value in checkpoint["state_dict"].items() if key.startswith("backbone.")}
    assert len(state) == len(checkpoint["state_dict"])
    assert equal(state, without_fc(theirs[50].state_dict()))


@pytest.mark.parametrize("channels, order, flips", [("BGR", "BGR", False), ("RGB", "RGB", True)])
def test_the_color_order_is_the_contracts(tmp_path: Path, channels: str, order: str, flips: bool):
    contract = ImageContract(channels=tuple(channels), mean=(0.0, 0.1, 0.2), std=(1.0, 0.5, 0.25))
    stored = write_light(tmp_path / "net", contract=contract)
    config = yaml.safe_load(write_export("detectron2", stored, tmp_path / "r.pkl")[2].read_text())
    assert config["INPUT"]["FORMAT"] == order
    assert config["MODEL"]["PIXEL_MEAN"] == [0.0, 25.5, 51.0]
    assert config["MODEL"]["PIXEL_STD"] == [255.0, 127.5, 63.75]
    config = yaml.safe_load(write_export("mmlab", stored, tmp_path / "r.pth")[2].read_text())
    assert config["model"]["data_preprocessor"]["bgr_to_rgb"] is flips


def test_images_these_libraries_do_not_know_are_refused(tmp_path: Path):
    stored = write_light(tmp_path / "net", contract=ImageContract(channels=("R", "G", "D")))
    with pytest.raises(WeightsMismatch, match="'light_net_r18' sees RGD; a config can be written for RGB and BGR"):
        write_export("detectron2", stored, tmp_path / "out" / "r.pkl")
    assert files(tmp_path / "out") == set()


# --- 3D ---


def test_minkowski_engine_05_gets_what_it_wrote(unet, engines, tmp_path: Path):
    assert equal(export_weights("me05", unet), engines)
    for suffix in (".pth", ".safetensors"):
        assert equal(read(write_export("me05", unet, tmp_path / f"net{suffix}")[0]), engines)


def scene() -> tuple[Tensor, Tensor]:
    ops = load_file(DATA / "me_ops.safetensors")
    return ops["coords"], ops["feats"]


def test_minkowski_engine_04_computes_the_same_with_its_order(unet, engines, tmp_path: Path):
    state = torch.load(write_export("me04", unet, tmp_path / "net.pth")[0], weights_only=True)["state_dict"]
    key = "block3.1.conv2.kernel"
    coords, _ = scene()
    feats = torch.randn(len(coords), engines[key].shape[1], generator=torch.Generator().manual_seed(0))
    expected = dense.convolve(coords, feats, engines[key], dense.x_fastest(3))
    torch.testing.assert_close(dense.convolve(coords, feats, state[key], HYBRID), expected)
    changed = {name for name, value in state.items() if not torch.equal(value, engines[name])}
    content = json.loads((DATA / "pointcontrast_res16unet34c.json").read_text())
    (hybrid,) = (keys for title, keys in content["kernel_layout"].items() if "HYBRID" in title)
    assert changed == set(hybrid)


def test_spconv_gets_a_grid_of_weights_with_plain_norms(unet, engines, tmp_path: Path):
    state = load_file(write_export("spconv", unet, tmp_path / "net.safetensors")[0])
    assert len(state) == len(engines)
    kernel, weight = engines["conv1p1s2.kernel"], state["conv1p1s2.weight"]
    for index, (x, y, z) in enumerate(dense.x_fastest(2)):
        assert torch.equal(weight[:, z, y, x], kernel[index].T)
    assert torch.equal(state["bn0.running_var"], engines["bn0.bn.running_var"])
    assert torch.equal(state["final.bias"], engines["final.bias"][0])


def test_torchsparse_gets_its_order_for_even_kernels(unet, engines, tmp_path: Path):
    state = torch.load(write_export("torchsparse", unet, tmp_path / "net.pth")[0], weights_only=True)
    for index, offset in enumerate(dense.z_fastest(2)):
        ours = dense.x_fastest(2).index(offset)
        assert torch.equal(state["conv1p1s2.kernel"][index], engines["conv1p1s2.kernel"][ours])
    assert torch.equal(state["conv0p1s1.kernel"], engines["conv0p1s1.kernel"])
    assert torch.equal(state["block1.0.norm1.bias"], engines["block1.0.norm1.bn.bias"])


# --- what all have in common ---


def test_the_table_is_whole():
    assert tuple(OUT_FORMATS) == (*FORMATS_2D, *FORMATS_3D)
    assert all(rule.text and rule.suffixes for rule in OUT_FORMATS.values())


@pytest.mark.parametrize("format", list(OUT_FORMATS))
def test_every_suffix_of_every_format_is_written_with_its_papers(light, unet, tmp_path: Path, format: str):
    checkpoint = light if format in FORMATS_2D else unet
    for suffix in OUT_FORMATS[format].suffixes:
        out = tmp_path / "new" / f"net{suffix}"
        written = write_export(format, checkpoint, out)
        assert written[0] == out
        assert set(written) >= {out, out.with_name(f"net{suffix}.json")}
        assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask() for path in written)
        note = json.loads(out.with_name(f"net{suffix}.json").read_text())
        assert note["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
        assert (note["file"], note["size"], note["format"]) == (out.name, out.stat().st_size, format)
        assert (note["name"], note["finished"]) == (checkpoint.name, True)
        assert contract_from_dict(note["contract"]) == checkpoint.contract
        assert note["licence"] == {"code": "MIT", "weights": "MIT", "datasets": [["none", "MIT"]], "base_model": "none"}
        assert note["provenance"] == {"steps": 7, "seed": 0}
        if suffix == ".safetensors":
            assert int.from_bytes(out.read_bytes()[:8], "little") % 8 == 0  # so that tensors can be mapped in place
            with safe_open(out, "pt") as stream:
                about = stream.metadata()
            assert (about["format"], about["name"]) == ("pt", checkpoint.name)
            assert json.loads(about["licence"]) == note["licence"]
            assert json.loads(about["contract"]) == note["contract"]


@pytest.mark.parametrize("format, name", [("timm", "r.pth"), ("detectron2", "r.pkl"), ("torchvision", "r.safetensors")])
def test_the_same_checkpoint_gives_the_same_bytes(light, tmp_path: Path, format: str, name: str):
    digests = {
        hashlib.sha256(write_export(format, light, tmp_path / folder / name)[0].read_bytes()).hexdigest()
        for folder in ("one", "two")
    }
    assert len(digests) == 1


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@pytest.mark.parametrize("which", ["r.pkl", "r.pkl.json", "r.pkl.yaml"])
def test_nothing_is_overwritten_unless_told(light, tmp_path: Path, which: str):
    (tmp_path / which).write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{which}: in the way; give another name, or overwrite=True"):
        write_export("detectron2", light, tmp_path / "r.pkl")
    assert files(tmp_path) == {which}
    assert (tmp_path / which).read_text() == "mine"
    write_export("detectron2", light, tmp_path / "r.pkl", overwrite=True)
    assert files(tmp_path) == {"r.pkl", "r.pkl.json", "r.pkl.yaml"}
    assert (tmp_path / which).read_bytes() != b"mine"


def test_a_folder_in_the_way_is_never_replaced(light, tmp_path: Path):
    (tmp_path / "r.pth.yaml").mkdir()
    with pytest.raises(CheckpointError, match=r"r.pth.yaml: in the way"):
        write_export("mmlab", light, tmp_path / "r.pth", overwrite=True)


def test_a_disk_that_refuses_leaves_what_was_there(encoders, tmp_path: Path):
    """A limit on file sizes stands for a full disk: the write fails half way."""
    (tmp_path / "r.pth").write_text("mine")

    def write_all() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit))
        for format, name in (("torchvision", "r.safetensors"), ("detectron2", "r.pkl"), ("torchvision", "r.pth")):
            try:
                write_export(format, encoders[18], tmp_path / name, overwrite=True)
            except CheckpointError as error:
                print(error)

    writer = Forked(write_all)
    output, _ = writer.communicate()
    assert writer.returncode == 0, output
    assert output.count("could not be written") == 3
    assert "r.pkl: could not be written (File too large)" in output
    assert files(tmp_path) == {"r.pth"}
    assert (tmp_path / "r.pth").read_text() == "mine"


def test_a_file_where_a_folder_should_be_is_told(light, tmp_path: Path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written \((File exists|Not a directory)\)"):
        write_export("timm", light, tmp_path / "folder" / "r.pth")


def test_columns_of_a_fine_tuned_network_for_points_are_named(unet, tmp_path: Path):
    classes = [f"class {k}" for k in range(1, unet.arch.args["out_chans"])]
    for given, named in ((classes, ["(no class)", *classes]), (classes[1:], None)):
        tuned = dataclasses.replace(unet, provenance={FINETUNED: {"data": {"classes": given}}})
        _, note = write_export("spconv", tuned, tmp_path / "net.pth", overwrite=True)
        assert json.loads(note.read_text()).get("outputs") == named


@pytest.mark.parametrize(
    "format, kind, error, message",
    [
        ("mmsegmentation", "2d", UnknownName, "Unknown format to write 'mmsegmentation'. Closest: 'mmlab'"),
        ("minkowski", "3d", UnknownName, r"Closest: 'me04', 'me05'. Accepted: torchvision .*spconv \(spconv 2.2"),
        (
            "me05",
            "2d",
            WeightsMismatch,
            "is a 2D network and me05 holds 3D ones. .*: torchvision, timm, detectron2, mmlab",
        ),
        ("timm", "3d", WeightsMismatch, "is a 3D network and timm holds 2D ones. .*: me05, me04, spconv, torchsparse"),
        ("timm", "narrow", WeightsMismatch, "'tiny_net_r18' is a ResNet of width 8; timm has those of width 64"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(light, unet, tmp_path: Path, format, kind, error, message):
    checkpoint = {"2d": light, "3d": unet}.get(kind) or write_tiny(tmp_path / "tiny")
    with pytest.raises(error, match=message):
        export_weights(format, checkpoint)
    with pytest.raises(error, match=message):
        write_export(format, checkpoint, tmp_path / "out" / "net.pth")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format, name", [("detectron2", "r.pth"), ("mmlab", "r.safetensors"), ("timm", "r.bin")])
def test_a_suffix_that_nobody_reads_is_refused(light, tmp_path: Path, format: str, name: str):
    accepted = ", ".join(OUT_FORMATS[format].suffixes)
    with pytest.raises(CheckpointError, match=rf"{name}: {format} cannot be read .*; use: {accepted}\."):
        write_export(format, light, tmp_path / name)
    assert files(tmp_path) == set()


def test_altered_weights_are_not_passed_on(tmp_path: Path):
    stored = write_light(tmp_path / "net")
    path = stored.folder / "encoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestMismatch):
        write_export("torchvision", stored, tmp_path / "out" / "r.pth")
    assert not (tmp_path / "out").exists()


def test_importing_loads_nothing_heavy():
    code = "import sys, geo_pretrain.convert.out; print(*{'torch', 'numpy', 'safetensors', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
