"""The demo, whole, at a size that proves the path and no numbers."""

from __future__ import annotations

import html
import json
import math
from dataclasses import replace

import pytest
from PIL import Image

from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.training.demo import RECIPE, Spread, run_demo, table_rows, verdict, what_next

TINY = [
    "model.width=8",
    "data.size=[64, 80]",
    "data.options={scenes: 2, frames: 4, width: 80, height: 64}",
    "data.overlap=[0.1, 1.0]",
    "optim.steps=3",
    "optim.batch=2",
]


TINY_ARCH = Arch("resnet_unet", {"depth": 18, "width": 8})


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    stages = []
    entry = CATALOG[RECIPE]
    tiny = replace(entry, arch=TINY_ARCH, contract=replace(entry.contract, size=(64, 80)))
    with pytest.MonkeyPatch.context() as patch:  # a name of the catalog stands for no other network
        patch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {RECIPE: tiny})
        result = run_demo(
            out,
            overrides=TINY,
            report=lambda stage, *rest: stages.append(stage),
        )
        yield out, result, stages


def test_demo_measures_both_starts_and_reports_every_stage(result):
    _, numbers, stages = result
    assert list(dict.fromkeys(stages)) == [
        "rendering rooms", "finding pairs", "pre-training", "matching",
    ]  # fmt: skip
    assert set(numbers.matching) == {"random", "pre-trained"}
    assert all(0 <= value <= 1 for spread in numbers.matching.values() for value in spread.values)
    assert numbers.gain.low <= numbers.gain.mean <= numbers.gain.high
    assert len(table_rows(numbers)) == 1


def test_demo_leaves_pictures_a_report_and_a_checkpoint_in_a_hub_folder(result):
    out, numbers, _ = result
    with Image.open(out / "matches.png") as image:
        assert image.width > 500
        assert len(image.convert("RGB").getcolors(1_000_000)) > 100
    page = (out / "report.html").read_text()
    for command in what_next(numbers.folder):
        assert html.escape(command) in page
    assert page.count("data:image/png;base64,") == 1
    assert str(numbers.matching["random"]) in page
    assert html.escape(verdict(numbers)) in page
    assert "$" not in page.partition("<h2>")[0]
    assert "<script" not in page
    stored = json.loads((out / "results.json").read_text())
    assert stored["matching_recall"]["random"] == list(numbers.matching["random"].values)
    assert stored["gain"]["mean"] == numbers.gain.mean
    unet = load_backbone(RECIPE, decoder=True, hub=str(out / "hub"))
    assert unet.load_report.coverage == 1
    assert verify(RECIPE, hub=str(out / "hub")).passed


def test_spread_is_mean_and_sample_deviation():
    assert str(Spread((0.1, 0.2, 0.3))) == "20.0 ± 10.0"
    assert Spread((0.5,)).std == 0
    assert str(Spread((0.5, math.nan))) == "nan ± nan"
