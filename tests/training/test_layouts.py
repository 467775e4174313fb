"""One command trains on rooms, on a 7-Scenes folder and on exported ScanNet scans, with and without their meshes."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from geo_pretrain import cli
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.loading import load_backbone
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.sources.rooms import Rooms
from tests.scannet_layout import write_scannet

ROOMS = {"scenes": 2, "frames": 6, "width": 80, "height": 64}


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Two scans each with and without meshes; one frame's pose is lost."""
    source = Rooms(RoomsConfig(**ROOMS))
    source.prepare()
    folders = {}
    for kind in ("scannet", "scannet_meshless"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        write_scannet(folders[kind], source, mesh=kind == "scannet")
    return folders


@pytest.mark.parametrize(
    "tiny, layout",
    [  # images and surfaces on every layout; clouds, which all recipes of clouds make alike, on one each
        *[("pri3d_view_geo", layout) for layout in ("rooms", "seven_scenes", "scannet", "scannet_meshless")],
        ("pointcontrast_nce", "scannet"),
        ("pointcontrast_hardest", "scannet_meshless"),
        ("csc", "rooms"),
        ("csc", "seven_scenes"),
    ],
)
def test_the_same_command_trains_on_every_layout(tmp_path, tiny_recipe, recording, scans, tiny, layout):
    data = {"rooms": "rooms", "seven_scenes": f"seven_scenes:{recording}"}.get(
        layout, f"scannet:{scans.get(layout, '')}"
    )
    path = tiny_recipe(tiny, data={"overlap": [0.1, 1.0]})
    options = ["--set", f"data.options={ROOMS}"] if layout == "rooms" else []
    arguments = ["train", path, "--data", data, "--out", tmp_path / "out", "--steps", 2, "--device", "cpu", *options]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.exception
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.provenance["data"]["source"] == layout.removesuffix("_meshless")
    assert load_backbone(tmp_path / "out").load_report.coverage == 1
    if layout.startswith("scannet"):
        assert sum(checkpoint.provenance["skipped"].values()) == 1  # the pose of -inf
        assert checkpoint.license.weights == "LicenseRef-ScanNet-ToU"
