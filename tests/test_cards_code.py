"""The code of cards runs, with the networks and shapes that they show."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain import cards
from geo_pretrain.backbones.build import build
from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.checkpoint import write_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from tests.adapters import test_minkowski
from tests.cards_reading import (
    ROOMS,
    codes,
    every_kind_of_card,
)
from tests.zoo import CONTRACT_3D, LICENSE, write_tiny, write_tiny_3d

REPO = Path(__file__).resolve().parents[1]
engine = test_minkowski.engine  # a stand-in for MinkowskiEngine


# ---- code ----


@pytest.mark.parametrize("kind", list(every_kind_of_card()))
def test_code_compiles_and_the_names_it_uses_exist(kind: str):
    blocks = codes(every_kind_of_card()[kind])
    assert blocks
    known = set(dir(builtins))
    modules: dict[str, Any] = {}
    for code in blocks:
        for node in ast.walk(tree := ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if importlib.util.find_spec(alias.name.split(".")[0]) is None:
                        assert alias.name == "MinkowskiEngine"
                        continue
                    bound = alias.asname or alias.name.split(".")[0]
                    module = importlib.import_module(alias.name)
                    modules[bound] = module if alias.asname else sys.modules[bound]
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
        for statement in tree.body:
            used = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
            assert set(used) <= known, f"{set(used) - known} is not defined before {ast.unparse(statement)}"
            known |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if isinstance(statement, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
            for n in ast.walk(statement):  # gp.load_backbone, timm.create_model, np.load
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules:
                    assert hasattr(modules[n.value.id], n.attr), ast.unparse(n)


def run(card: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Execute a card's code, all of it, from top to bottom, as a reader would."""
    names = {} if names is None else names
    for code in codes(card):
        exec(compile(code, "card", "exec"), names)
    return names


def comment(card: str, line: str) -> str:
    return re.search(rf"^{re.escape(line)}.*  # (.*)$", card, re.MULTILINE)[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the snippets name: an image, a cloud, a clone of this project."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save("image.jpg")
    points = rng.uniform(0, 1, (200, 3)).astype(np.float32)
    colors = rng.integers(0, 256, (200, 3), dtype=np.uint8)
    np.savez("cloud.npz", points=points, colors=colors, intensity=rng.random((200, 1), dtype=np.float32))
    (tmp_path / "path" / "to" / "this").mkdir(parents=True)
    (tmp_path / "path" / "to" / "geo_pretrain").symlink_to(REPO)
    return tmp_path


def test_the_code_of_a_tiny_2d_card_runs(place: Path):
    checkpoint = write_tiny(place / "path" / "to" / "this" / "folder")
    card = cards.card_of(checkpoint.folder)
    names = run(card)
    channels, strides = re.fullmatch(r"(.*) channels at strides (.*)", comment(card, "maps = ")).groups()
    assert [str(m.shape[1]) for m in names["maps"]] == channels.split(", ")
    assert [str(64 // m.shape[2]) for m in names["maps"]] == strides.split(", ")
    assert str(list(names["features"].shape)) == comment(card, "features = ") == "[1, 32, 32, 48]"
    assert len(codes(card)) == 1  # it fits no other library: its width is 8


@pytest.mark.parametrize(
    "arch, size",
    [
        (Arch("resnet_unet", {"depth": 18, "width": 8}), (33, 50)),
        (Arch("resnet_unet", {"depth": 50, "width": 8}), (64, 90)),
        (Arch("resnet_depth_unet", {"depth": 18, "width": 8}), (33, 50)),
        (Arch("resnet_depth_unet", {"depth": 18, "width": 8, "out_chans": 5}), (64, 32)),
        (Arch("resnet", {"depth": 34, "width": 8}), (32, 64)),
    ],
    ids=str,
)
def test_shapes_in_2d_cards_are_those_of_the_networks(arch: Arch, size: tuple[int, int]):
    contract = ImageContract(size=size)
    card = cards.render_card("my_net", arch, contract, LICENSE, {})
    network = build(arch, decoder="unet" in arch.name).eval()
    image = torch.zeros(1, 3, *size)
    encoder = getattr(network, "encoder", network)
    channels = ", ".join(str(info["num_chs"]) for info in encoder.feature_info)
    assert comment(card, "maps = ").startswith(f"{channels} channels at")
    assert ("features = " in card) == ("unet" in arch.name)
    if "unet" in arch.name:
        with torch.no_grad():
            assert comment(card, "features = ") == str(list(network(image).shape))


@pytest.mark.parametrize(
    "contract",
    [
        CONTRACT_3D,
        VoxelContract(0.05),
        VoxelContract((0.1, 5.0, 0.1), ("intensity", "one", "one"), coordinates="cylindrical"),
    ],
    ids=["colors", "ones", "intensity"],
)
def test_the_code_of_a_3d_card_runs(place: Path, contract: VoxelContract, engine):
    checkpoint = write_tiny_3d(place / "path" / "to" / "this" / "folder", contract=contract)
    card = cards.card_of(checkpoint.folder)
    names = run(card)
    assert names["features"].shape == (200, sum(m.feats.shape[1] for m in names["maps"]))
    assert f"[{len(names['points'])}, {names['network'].final.kernel.shape[1]}]" == str([200, 32])
    assert comment(card, "output = network.encode_points(") == "[N, 32]: what the loss saw"
    assert names["output"].F.shape == (len(names["voxels"].coords), 32)
    assert list(names["weights"]) == list(names["network"].state_dict())
    assert ("intensity" in names) == ("intensity" in contract.channels)
    assert ("colors" in names) == ("R" in contract.channels)


@pytest.fixture(scope="module")
def real_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder with a ResNet-18 U-Net of the real width, as `geo-pretrain train --out runs/NAME` leaves it."""
    entry, hub = CATALOG[ROOMS], tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    network = build(entry.arch, decoder=True)
    write_checkpoint(
        hub / ROOMS,
        name=ROOMS,
        arch=entry.arch,
        contract=entry.contract,
        weights={"encoder": network.encoder.state_dict(), "decoder": network.decoder.state_dict()},
        golden={"input": torch.zeros(1)},
        license=entry.license,
        provenance={},
        recipe_yaml="name: x\n",
        log="",
        card="# x\n",
    )
    return hub


@pytest.mark.parametrize("of", ["name", "folder"])
def test_the_code_of_a_real_2d_card_runs_in_every_library(place: Path, real_hub: Path, of: str, monkeypatch):
    """The catalog's card after its recipe was run, and the folder's own card."""
    for library in ("timm", "segmentation_models_pytorch"):
        pytest.importorskip(library)
    if of == "name":
        card = cards.card_of(ROOMS)
        variable, hub = re.search(r"^export (\w+)=(\w+)$", card, re.MULTILINE).groups()
        (place / hub).symlink_to(real_hub)
    else:
        (place / "path" / "to" / "this" / "folder").symlink_to(real_hub / ROOMS)
        card = cards.card_of(real_hub / ROOMS)
        variable, parent = re.search(r"`export (\w+)=(PARENT)`", card).groups()
        hub = str(real_hub)
        assert parent == "PARENT"
    monkeypatch.setenv(variable, hub)
    assert len(codes(card)) == 5
    seen: dict[str, Any] = {}
    image = torch.rand(1, 3, 64, 64)
    stem = None
    for code in codes(card):
        names = run(f"```python\n{code}\n```", {"image": seen.get("image")})
        seen |= names
        found = [value for value in names.values() if isinstance(value, torch.nn.Module)]
        for network in found:  # each one has the checkpoint's weights
            weight = next(iter(network.state_dict().values()))
            stem = weight if stem is None else stem
            assert weight.shape == (64, 3, 7, 7)
            assert torch.equal(weight, stem)
            with torch.no_grad():
                network.eval()(image)
        assert found
    assert str(list(seen["maps"][0].shape)) == "[1, 64, 120, 160]"
