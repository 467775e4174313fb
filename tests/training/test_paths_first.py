"""Commands with data and a backbone tell a wrong path, or a wrong layout, before anything of a hub is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geo_pretrain.hub import sources
from geo_pretrain.training.finetune import run
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


OFFLINE = {  # command -> the way out that it has
    f"finetune clouds_srunet34 -b {POINTS} --data clouds:PATH --out run --device cpu": "-b scratch begins",
    "finetune rooms_unet_r18 --toy -b pri3d_view_geo_r18 --out run --device cpu": (
        "-b scratch --set network.encoder=resnet18 begins with random weights."
    ),
    f"train pri3d_view_r18 --toy --out run --device cpu --set model.init={NAME}": "--set model.init=scratch begins",
    f"eval matching {NAME} --data rooms": None,
}


@pytest.mark.parametrize("command", OFFLINE)
def test_weights_that_cannot_be_had_are_told_before_any_work_in_the_words_of_the_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for split in ("train", "val"):
        (tmp_path / "own" / split).mkdir(parents=True)
        np.save(tmp_path / "own" / split / f"{split}.npy", np.ones((3, 4)))
    (tmp_path / "own" / "classes.txt").write_text("wall\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "label_table", lambda data: pytest.fail("labels were read"))
    monkeypatch.chdir(tmp_path)
    ended = geo_pretrain(*command.replace("PATH", str(tmp_path / "own")).split(), expected=1)
    assert "could not be loaded" in ended.errors
    assert "pretrained=False" not in ended.errors
    wanted = OFFLINE[command]
    assert ("Without a network: " in ended.errors) == (wanted is not None)
    assert wanted is None or f"Without a network: {wanted}" in ended.errors
    assert "rendering rooms" not in ended.errors
