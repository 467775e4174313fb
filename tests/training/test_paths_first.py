"""Commands with data and a backbone tell a wrong path, or a wrong layout, before anything of a hub is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from geo_pretrain.hub import sources
from tests.front_door import geo_pretrain

NAME = "pri3d_view_geo_r18"  # its weights are the authors', on the network
POINTS = "pointcontrast_nce_srunet34"
COMMANDS = [
    f"eval matching {NAME} --data seven_scenes:PATH",
    f"eval matching {POINTS} --data tum:PATH",
    f"eval pixel-to-voxel {NAME} --data scannet:PATH",
    f"eval probe {NAME} --data ade20k:PATH",
    f"eval probe {POINTS} --data s3dis:PATH",
    f"eval awareness {NAME} --data folder:PATH",
    f"visualize matches {NAME} --data redwood:PATH",
    f"visualize features {NAME} {POINTS} --data scannet:PATH",
    f"visualize points {POINTS} --data seven_scenes:PATH",
    f"finetune folder_unet -b {NAME} --data folder:PATH --out run --device cpu",
    f"finetune folder_unet --sweep -b {NAME} -b scratch --data folder:PATH --out sweep --device cpu",
    f"finetune clouds_srunet34 -b {POINTS} --data clouds:PATH --out run --device cpu",
    f"train pri3d_view_r18 --data tum:PATH --out run --device cpu --set model.init={NAME}",
    "predict hf-hub:lab/run --data clouds:PATH",
    "predict hf-hub:lab/run PATH/photo.jpg",
]


@pytest.mark.parametrize("layout", ["missing", "empty"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_path_is_told_before_a_hub_is_asked(
    command: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if layout == "empty" and command.startswith("predict"):
        pytest.skip("what is there is looked at with the network's own options")
    data = tmp_path / "my_data"
    if layout == "empty":
        data.mkdir()
    for source in (sources.Authors, sources.HuggingFace):
        monkeypatch.setattr(source, "fetch", lambda *args: pytest.fail("weights were fetched"))
    monkeypatch.chdir(tmp_path)
    errors = geo_pretrain(*command.replace("PATH", str(data)).split(), expected=1).errors
    assert str(data) in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == (["my_data"] if layout == "empty" else [])
