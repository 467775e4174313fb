"""Reports of sweeps: every number where it belongs, measured and reported apart, and pictures that show them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import sweep_pictures
from benchmarks.sweep_pictures import draw_predictions, draw_starts
from geo_pretrain.errors import DataError, MissingDependency, RecipeError
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.evaluation.metrics import confusion_matrix, mean_iou
from geo_pretrain.training.finetune import sweep
from geo_pretrain.training.finetune.published import PaperRow
from geo_pretrain.training.finetune.report import (
    draw_curve,
    markdown,
    table,
    table_rows,
    verdicts,
    write_report,
)
from geo_pretrain.training.finetune.sweep import Point, SweepResult, run_sweep
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.visualize.colors import class_colors
from geo_pretrain.training.visualize.curves import COLORS, styles
from tests.training.finetune.sweeps import Squares, Written, tiny_recipe
from tests.zoo import write_tiny

RECIPE = load_finetune_recipe("scannet_unet_r50")
POINTS = (
    Point("scratch", 0.2, {0: 0.30, 1: 0.32}),
    Point("scratch", 1.0, {0: 0.40, 1: 0.40}),
    Point("pri3d_view_geo_r50", 0.2, {0: 0.515}),
    Point("pri3d_view_geo_r50", 1.0, {0: 0.60, 1: 0.61}),
)
PAPER = (
    PaperRow("scratch", 1.0, "miou", 0.391, "Pri3D T1"),
    PaperRow("pri3d_view_geo_r50", 0.2, "miou", 0.515, "Pri3D README"),
    PaperRow("pri3d_view_geo_r50", 1.0, "miou", 0.617, "Pri3D T1"),
    PaperRow("gsc_r50", 0.4, "miou", 0.583, "GSC T2"),
)
RESULT = SweepResult(
    RECIPE, "miou", "last", POINTS, PAPER, {0.2: 4000, 1.0: 19466}, {"absent classes": "are left out (mended)"}
)


def test_what_a_comparison_lacks_is_named():
    for start, missing in (("scratch", "another start, such as -b pri3d_view_r18.rooms"), ("gsc_r50", "-b scratch")):
        points = tuple(dataclasses.replace(point, backbone=start) for point in POINTS[:1])
        told = f"Add {missing}: without it nobody knows what pre-training brought."
        assert verdicts(dataclasses.replace(RESULT, points=points)) == [told]


def test_the_table_has_a_row_a_start_and_the_papers_row_under_it():
    assert table(RESULT) == [
        "| start | 20 % | 40 % | 100 % |",
        "|---|---:|---:|---:|",
        "| from scratch | 31.0 ± 1.4 |  | 40.0 ± 0.0 |",
        "| *from scratch: Pri3D T1* |  |  | *39.1* |",
        "| pri3d_view_geo_r50 | 51.5 |  | 60.5 ± 0.7 |",
        "| *pri3d_view_geo_r50: Pri3D README, Pri3D T1* | *51.5* |  | *61.7* |",
        "| *gsc_r50: GSC T2* |  | *58.3* |  |",
    ]


def test_the_terminals_table_has_the_papers_number_in_brackets():
    assert table_rows(RESULT) == [
        ("start", "20 %", "100 %"),
        ("from scratch", "31.0 ± 1.4", "40.0 ± 0.0 [Pri3D T1: 39.1]"),
        ("pri3d_view_geo_r50", "51.5 [Pri3D README: 51.5]", "60.5 ± 0.7 [Pri3D T1: 61.7]"),
    ]


def test_the_page_says_what_the_numbers_are():
    text = markdown(RESULT, figure="curve.png")
    assert "](curve.png)" in text
    assert "mIoU (%) on scannet, last state of each run" in text
    assert "seeds 0, 1;" in text
    assert "20 %: 4000, 100 %: 19466" in text
    assert "Data: scannet, LicenseRef-ScanNet-ToU (non-commercial research and education; on a signed agree" in text
    assert "| absent classes | are left out (mended) |" in text
    assert "were not measured here" in text
    assert "Not run yet" not in text
    assert "differs from" not in text
    more = dataclasses.replace(
        RESULT, missing=("scratch, 40 %",), changed=("optim.lr: 0.01 -> 0.1",), paper=(), protocol_deviations={}
    )
    text = markdown(more)
    assert "Not run yet: scratch, 40 %." in text
    assert "differs from `scannet_unet_r50` as shipped: optim.lr: 0.01 -> 0.1." in text
    assert "not measured here" not in text
    assert "curve.png" not in text
    assert "protocol" not in text
    assert "seeds 0, 1, 4;" in markdown(dataclasses.replace(RESULT, points=(*POINTS, Point("x", 0.2, {4: 0.5}))))


def test_a_report_is_three_files_and_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    paths = write_report(RESULT, tmp_path / "new" / "out")
    assert sorted(paths) == ["curve.png", "summary.json", "summary.md"]
    assert json.loads(paths["summary.json"].read_text()) == json.loads(json.dumps(RESULT.to_dict()))
    assert paths["summary.md"].read_text() == markdown(RESULT, figure="curve.png")
    with Image.open(paths["curve.png"]) as image:
        assert image.format == "PNG"
        assert 900 <= image.width <= 1200


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"geo_pretrain\[training\]"):
        write_report(RESULT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def drawn(result, path, monkeypatch):
    """The axes of the figure that `draw_curve` saves."""
    from matplotlib.figure import Figure

    kept = []

    class Kept(Figure):
        def savefig(self, *args, **options):
            kept.append(self)
            super().savefig(*args, **options)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    draw_curve(result, path)
    return kept[0].axes[0]


def close(first, second):
    np.testing.assert_allclose(np.asarray(first, float), np.asarray(second, float))


def test_curves_are_the_points_with_their_deviation(tmp_path, monkeypatch):
    axes = drawn(RESULT, tmp_path / "curve.png", monkeypatch)
    labels = {container.get_label(): container for container in axes.containers}
    assert list(labels) == ["from scratch", "pri3d_view_geo_r50"]
    line, caps, (bars,) = labels["from scratch"]
    close(line.get_xydata(), [[20, 31], [100, 40]])
    sigma = 100 * np.std([0.30, 0.32], ddof=1)
    close(bars.get_segments()[0], [[20, 31 - sigma], [20, 31 + sigma]])
    close([caps[0].get_ydata()[0], caps[1].get_ydata()[0]], [31 - sigma, 31 + sigma])
    close(labels["pri3d_view_geo_r50"][0].get_xydata(), [[20, 51.5], [100, 60.5]])
    assert axes.get_xscale() == "linear"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["20", "100"]
    assert axes.get_ylabel() == "mIoU (%)"


def test_what_papers_report_is_dashed_hollow_and_of_the_same_color(tmp_path, monkeypatch):
    axes = drawn(RESULT, tmp_path / "curve.png", monkeypatch)
    lines = {line.get_label(): line for line in axes.get_lines() if "(" in line.get_label()}
    assert list(lines) == ["from scratch (Pri3D T1)", "pri3d_view_geo_r50 (Pri3D README, Pri3D T1)"]  # gsc: not run
    paper = lines["pri3d_view_geo_r50 (Pri3D README, Pri3D T1)"]
    close(paper.get_xydata(), [[20, 51.5], [100, 61.7]])
    assert paper.get_linestyle() == "--"
    assert paper.get_markerfacecolor() == "none"
    measured = {container.get_label(): container[0] for container in axes.containers}["pri3d_view_geo_r50"]
    assert measured.get_linestyle() == "-"
    assert measured.get_markerfacecolor() == measured.get_color() == paper.get_color()
    legend = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert legend == ["from scratch", "pri3d_view_geo_r50", *lines]


def test_small_shares_have_room_and_one_share_stands_side_by_side(tmp_path, monkeypatch):
    small = tuple(dataclasses.replace(p, fraction={0.2: 0.01}.get(p.fraction, p.fraction)) for p in POINTS)
    axes = drawn(dataclasses.replace(RESULT, points=small, paper=()), tmp_path / "a.png", monkeypatch)
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "100"]
    one = dataclasses.replace(RESULT, points=tuple(p for p in POINTS if p.fraction == 1))
    axes = drawn(one, tmp_path / "b.png", monkeypatch)
    assert [c[0].get_xydata().tolist() for c in axes.containers] == [[[0, 40]], [[1, pytest.approx(60.5)]]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["from scratch", "pri3d_view\n_geo_r50"]
    assert [text.get_text() for text in axes.texts] == ["40.0 ± 0.0", "39.1", "60.5 ± 0.7", "61.7"]
    sides = [(text.get_ha(), text.get_style(), text.xyann[0] > 0) for text in axes.texts]
    assert sides == [("left", "normal", True), ("right", "italic", False)] * 2  # reported: italic, on the other side
    assert axes.get_xlabel() == "100 % of the training images\nhollow: as Pri3D T1 report"
    with pytest.raises(DataError, match="no finished run"):
        draw_curve(dataclasses.replace(RESULT, points=()), tmp_path / "c.png")


def luminance(color):
    r, g, b = (int(color[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


# From linear RGB of normal sight to that of a dichromat (Machado, Oliveira and Fernandes 2009, severity 1).
DICHROMATS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("sight", DICHROMATS)
def test_colors_differ_for_color_blind_readers_and_from_the_paper(sight):
    def seen(color):
        rgb = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        linear = np.clip(np.array(DICHROMATS[sight]) @ linear, 0, 1)
        return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)

    for k, first in enumerate(COLORS):
        assert luminance(first) < 0.75
        for second in COLORS[:k]:
            assert np.linalg.norm(seen(first) - seen(second)) > 0.1


def test_many_starts_differ_in_color_or_marker_and_known_ones_keep_theirs():
    names = ["a", "scratch", *"bcdefgh", "imagenet"]
    found = styles(names)
    assert list(found) == names
    assert len({tuple(style.values()) for style in found.values()}) == len(names)
    assert found["scratch"] == styles(["scratch"])["scratch"]
    assert found["imagenet"] == styles(["imagenet", "x"])["imagenet"]


def test_the_picture_shows_image_truth_and_predictions_at_their_places(tmp_path):
    source = Squares("val", 2)
    images = [source.load(id) for id in source.ids()]
    guesses = {
        "scratch": [np.full((64, 96), 2, np.uint8)] * 2,
        "pri3d_view_geo_r50": [np.full((32, 48), 3, np.int64), images[1].semantic],
    }
    draw_predictions(images, guesses, source.classes, tmp_path / "deep" / "grid.png")
    with Image.open(tmp_path / "deep" / "grid.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    panel, gap, head = (64 * 3, 96 * 3), 12, 40
    row = panel[0] + 22 + gap

    def cell(i, j):
        top, left = head + i * row, gap + j * (panel[1] + gap)
        return sheet[top : top + panel[0], left : left + panel[1]][::3, ::3]

    color = class_colors(np.arange(4)[None])[0]
    for i, labelled in enumerate(images):
        assert (cell(i, 0) == labelled.image).all()
        assert (cell(i, 1) == class_colors(labelled.semantic)).all()
        assert (cell(i, 2) == color[2]).all()
    assert (cell(0, 3) == color[3]).all()
    assert (cell(1, 3) == class_colors(images[1].semantic)).all()


def test_pictures_need_labels_and_a_prediction_for_each_image(tmp_path):
    image = Squares("val").load("val_0")
    with pytest.raises(DataError, match="scratch: 0 predictions for 1 images"):
        draw_predictions([image], {"scratch": []}, Squares.classes, tmp_path / "a.png")
    with pytest.raises(DataError, match="val_0 has no labels"):
        draw_predictions(
            [dataclasses.replace(image, semantic=None)], {"a": [image.semantic]}, Squares.classes, tmp_path / "a.png"
        )


def test_the_picture_of_a_sweep_is_drawn_from_its_weights(tmp_path, monkeypatch):
    """Predictions in the picture have the mIoU that the run reported."""
    net = str(write_tiny(tmp_path / "net").folder)
    sources = Squares("train", 4), Squares("val", 3)
    recipe = tiny_recipe(tmp_path)
    result = run_sweep(recipe, ["scratch", net], [0.5, 1.0], [1], tmp_path / "s", device="cpu", sources=sources)
    calls = []
    monkeypatch.setattr(sweep_pictures, "draw_predictions", lambda *arguments: calls.append(arguments))
    for fraction in (None, 0.5):
        draw_starts(tmp_path / "s", tmp_path / "grid.png", sources=sources, images=9, fraction=fraction)
        images, predictions, classes, path = calls.pop()
        assert [image.id for image in images] == sources[1].ids()
        assert list(predictions) == ["scratch", "tiny_net_r18"]
        assert (classes, path) == (Squares.classes, tmp_path / "grid.png")
        for point in result.points:
            if point.fraction == (fraction or 1.0):
                confusion = sum(
                    confusion_matrix(*(torch.from_numpy(a.astype(np.int64)) for a in (image.semantic, guess)), 4)
                    for image, guess in zip(images, predictions[point.backbone], strict=True)
                )
                assert mean_iou(confusion) == pytest.approx(point.spread.mean)
    draw_starts(tmp_path / "s", tmp_path / "grid.png", sources=sources, images=1)
    assert [image.id for image in calls.pop()[0]] == ["val_0"]
    with pytest.raises(DataError, match="no finished run of the share and seed"):
        draw_starts(tmp_path / "s", tmp_path / "grid.png", sources=sources, seed=7)


def test_the_picture_is_of_the_largest_share_and_its_first_seed_that_are_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "finetune", Written())
    out, where = tmp_path / "s", {"hub": ["/hub"]}
    for shares, seeds in (([0.5], [1, 4]), ([1.0], [6, 4, 9])):
        run_sweep(tiny_recipe(tmp_path, "data.path=/data"), ["scratch"], shares, seeds, out)
    (out / "runs/scratch/100/seed4/results.json").unlink()
    asked, shown = [], []

    class Task:
        module = SimpleNamespace(load_state_dict=asked.append)

        def predictions(self, source, ids):
            return [(None, None, torch.zeros(1)) for _ in ids]

    monkeypatch.setattr(
        sweep_pictures, "open_labelled", lambda *place, **more: asked.append((place, more)) or Squares("val", 8)
    )
    monkeypatch.setattr(sweep_pictures, "load_file", lambda path: path)

    def init(recipe, backbone, where):
        asked.append((backbone, recipe.network.encoder, recipe.network.width, where))
        return SimpleNamespace(contract=lambda: None)

    monkeypatch.setattr(sweep_pictures, "backbone_init", init)
    monkeypatch.setattr(sweep_pictures, "build_finetune_task", lambda recipe, *_: asked.append(recipe) or Task())
    monkeypatch.setattr(sweep_pictures, "draw_predictions", lambda images, guesses, *_: shown.append((images, guesses)))
    for fraction, seed, chosen in (
        (None, None, (1.0, 6)),
        (0.5, None, (0.5, 1)),
        (None, 9, (1.0, 9)),
        (None, 4, (0.5, 4)),
    ):
        draw_starts(out, tmp_path / "x.png", fraction=fraction, seed=seed, init_kwargs=where)
        opened, start, recipe, weights = asked
        assert opened == (("rooms", Path("/data"), "val"), {"task": "segmentation", "options": {}})
        assert start == ("scratch", "resnet18", 8, where)
        assert (recipe.data.fraction, recipe.seed) == chosen
        assert weights == out / f"runs/scratch/{100 * chosen[0]:g}/seed{chosen[1]}" / "model.safetensors"
        ((images, guesses),) = shown
        assert [image.id for image in images] == ["val_0", "val_2", "val_5", "val_7"]
        assert list(guesses) == ["scratch"]
        asked.clear()
        shown.clear()
    with pytest.raises(DataError, match="no finished run of the share and seed"):
        draw_starts(out, tmp_path / "x.png", fraction=1.0, seed=4)


def test_wide_images_are_reduced_and_their_labels_stay_labels(tmp_path):
    labels = np.repeat(np.array([1, 3], np.uint8), [3, 1])[None].repeat(40, 0)  # columns 1 1 1 3
    labels = np.tile(labels, (1, 160))
    image = LabelledImage("wide", np.full((40, 640, 3), 90, np.uint8), labels, None)
    draw_predictions([image], {"scratch": [labels]}, Squares.classes, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    assert sheet.shape[1] == 3 * (320 + 12) + 12
    for column in (1, 2):
        left = 12 + column * 332
        colors = {tuple(c) for c in sheet[40:60, left : left + 320].reshape(-1, 3).tolist()}
        assert colors == {tuple(c) for c in class_colors(np.array([[1, 3]]))[0].tolist()}


def test_pictures_of_detection_are_those_of_each_run(tmp_path):
    (tmp_path / "s").mkdir()
    recipe = load_finetune_recipe("scannet_unet_r50", ["task=detection", "network={kind: mask_rcnn}"])
    kept = {"format": 1, "recipe": recipe.to_yaml(), "starts": {}, "runs": []}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(kept))
    with pytest.raises(RecipeError, match=r"'task' is 'detection'; accepted is segmentation.*predictions\.png"):
        draw_starts(tmp_path / "s", tmp_path / "grid.png")
