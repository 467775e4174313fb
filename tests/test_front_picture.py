"""The front page says what is stored: the parts of README.md between the marks of `benchmarks.front_picture`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.front_picture import LARGEST, OF_POINTS, PICTURE, README, RESULT, ROOT, parts, save_picture, with_parts
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.training.demo.weights import NAME, POINT_NAME, Setting, Shown

RESULTS = {
    "weights": {
        "name": NAME,
        "size": [240, 320],
        "frames": 6,
        "labelled": 2,
        "scores": {
            "random": {"recall by room": [0.1, 0.2], "pixels that get the right label by room": [0.3, 0.3]},
            NAME: {"recall by room": [0.5, 0.7], "pixels that get the right label by room": [0.6, 0.8]},
        },
    }
}


def test_parts_of_the_front_page_show_the_stored_numbers():
    found = parts(RESULTS)
    assert f"model_cards/{NAME}.md" in found["front picture"]
    assert POINT_NAME not in found["front picture"]
    assert POINT_NAME in parts(RESULTS | {"columns": [OF_POINTS]})["front picture"]
    assert found["front numbers"].splitlines() == [
        f"| | random weights | `{NAME}` |",
        "| --- | --- | --- |",
        "| matching recall at 4 px, 240x320 (%), mean ± spread over 2 rooms never seen "
        "| 15.0 ± 7.1 | **60.0 ± 14.1** |",
        "| pixels that get the right label (%), carried from 2 of a room's 6 frames by the nearest features "
        "| 30.0 ± 0.0 | **70.0 ± 14.1** |",
    ]


def test_the_front_page_has_the_marks_and_agrees_with_the_stored_result():
    text = README.read_text(encoding="utf-8")
    written = with_parts(text, RESULTS)
    assert "**60.0 ± 14.1**" in written
    assert with_parts(written, RESULTS) == written
    if RESULT.exists():
        assert with_parts(text, json.loads(RESULT.read_text(encoding="utf-8"))) == text, (
            "python -m benchmarks.front_picture"
        )
        assert (ROOT / PICTURE).stat().st_size <= LARGEST
    with pytest.raises(GeoPretrainError, match="accepted is one part between <!-- front picture -->"):
        with_parts("nothing", RESULTS)


def test_the_picture_is_small_and_leaves_labels_out(tmp_path):
    view = Image.new("RGB", (320, 490), "green")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (490, 900, 3)).astype(np.uint8))
    shown = Shown(NAME, {}, 0.0, Setting(), (("matches", view), ("labels", noise), ("points", view)), True, 1.0)
    save_picture(shown, tmp_path / "front.jpg")
    with Image.open(tmp_path / "front.jpg") as picture:
        assert picture.width == 2 * 320 + 3 * 10
    detailed = Shown(NAME, {}, 0.0, Setting(), (("points", noise.crop((0, 0, 400, 490))),), True, 1.0)
    save_picture(detailed, tmp_path / "front.jpg")  # in a lower quality
    assert (tmp_path / "front.jpg").stat().st_size <= LARGEST
    too_big = Shown(NAME, {}, 0.0, Setting(), (("points", noise),), True, 1.0)
    with pytest.raises(GeoPretrainError, match="at most 300,000 are accepted"):
        save_picture(too_big, tmp_path / "front.jpg")
