"""The demo, whole, at a size that proves the path and no numbers; with weights as a wheel project holds them."""

from __future__ import annotations

import html
import json
import math
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from geo_pretrain import catalog
from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.errors import CheckpointError, HubError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.training.demo import weights
from geo_pretrain.training.demo.pretraining import RECIPE, PretrainingResult, Spread
from geo_pretrain.training.demo.report import table_rows, verdict, weights_rows, what_next, write_report
from geo_pretrain.training.demo.weights import (
    NAME,
    POINT_NAME,
    Scores,
    Setting,
    Shown,
    find_point_network,
    find_weights,
    why_missing,
)
from geo_pretrain.training.evaluation.metrics import Interval
from geo_pretrain.training.evaluation.probes import ProbeSpec
from geo_pretrain.training.recipe import load_recipe
from tests.front_door import geo_pretrain
from tests.test_distribution import RUN, add, give, make_narrow, shipped_file
from tests.test_pages import parse
from tests.zoo import write_tiny, write_tiny_3d

ROOT = Path(__file__).parents[2]
TINY = [
    "model.width=8",
    "data.size=[64, 80]",
    "data.options={scenes: 2, frames: 4, width: 80, height: 64}",
    "data.overlap=[0.1, 1.0]",
    "optim.steps=3",
    "optim.batch=2",
]
SMALL = Setting(
    rooms=2,
    frames=4,
    pairs=1,
    labelled=2,
    size=(64, 96),
    overlap=(0.05, 1.0),
    probe=ProbeSpec(pixels=200),
)
TINY_ARCH = Arch("resnet_unet", {"depth": 18, "width": 8})


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder whose weights/ holds a wheel project with a narrow NAME, which the catalog lists."""
    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as patch:
        listed = make_narrow(patch, folder)
        run = write_tiny(folder / "run" / NAME, **RUN).folder
        add.add_run(run, folder / "weights")
        give(patch, shipped_file.read_shipped(listed)[NAME].applied(catalog.CATALOG[NAME]))
        hub = folder / "weights/geo_pretrain_weights/geo_pretrain_weights"
        points = write_tiny_3d(hub / POINT_NAME, POINT_NAME)
        entry = next(entry for entry in catalog.ENTRIES if entry.name == POINT_NAME)  # before anything is shipped
        give(patch, replace(entry, arch=points.arch, contract=points.contract))
        patch.setenv("GEO_PRETRAIN_HUB", f",{hub}")
        yield folder


@pytest.fixture(scope="module")
def ran(clone, tmp_path_factory):
    """`geo-pretrain demo`, at a tiny size: its folder, what it printed, what it showed of the weights."""
    out = tmp_path_factory.mktemp("demo")
    entry, kept = CATALOG[RECIPE], []
    tiny = replace(entry, arch=TINY_ARCH, contract=replace(entry.contract, size=(64, 80)))

    def show(*arguments, **options) -> Shown:
        kept.append(show_small(*arguments, **options))
        return kept[-1]

    show_small = partial(weights.show_weights, setting=SMALL)
    with pytest.MonkeyPatch.context() as patch:  # a name of the catalog stands for no other network
        give(patch, tiny)
        patch.setattr(weights, "show_weights", show)
        words = [word for change in TINY for word in ("--set", change)]
        ended = geo_pretrain("demo", "--out", out, *words)
        yield out, ended, kept[0]


def test_demo_shows_the_weights_of_a_clone_first_and_then_pre_trains(ran):
    _, ended, shown = ran
    assert ended.output.index("Finished weights") < ended.output.index("short pre-training")
    assert list(shown.scores) == ["random", NAME]
    for scores in shown.scores.values():
        assert len(scores.recall) == len(scores.scenes) == len(scores.accuracy) == len(scores.miou) == 2
        assert all(0 <= value <= 1 for value in (*scores.recall, *scores.accuracy, *scores.miou))
    titles = [title for title, _ in shown.columns]
    assert titles == ["matches", "features", *(["labels"] if shown.label_gain.low > 0 else []), "points", "points, 3D"]
    assert not shown.installed  # it lies in the clone alone
    stages = [line.partition(":")[0] for line in ended.errors.splitlines()]
    wanted = ["rendering rooms", "measuring", "pre-training"]
    assert [stage for stage in dict.fromkeys(stages) if stage in wanted] == wanted


def test_demo_leaves_pictures_a_report_and_a_checkpoint_in_a_hub_folder(ran):
    out, ended, shown = ran
    for name, width in (("matches.png", 500), ("weights.png", 1000)):
        with Image.open(out / name) as image:
            assert image.width > width
            assert len(image.convert("RGB").getcolors(1_000_000)) > 100
    page = (out / "report.html").read_text()
    for command in what_next(out / "hub" / RECIPE, shown):
        assert html.escape(command) in page
        assert command in ended.output
    assert page.count("data:image/png;base64,") == 2
    assert page.index("base64") < page.index("<h2>")  # the picture of the weights comes first
    assert "$" not in page.partition("<h2>")[0]
    assert "<script" not in page
    stored = json.loads((out / "results.json").read_text())
    assert stored["weights"]["scores"][NAME]["recall by room"] == list(shown.ours.recall)  # one pair a room
    assert str(Spread(shown.ours.recall)) in page
    assert str(Spread(tuple(stored["matching_recall"]["random"]))) in page
    unet = load_backbone(RECIPE, decoder=True, hub=str(out / "hub"))
    assert unet.load_report.coverage == 1
    assert verify(RECIPE, hub=str(out / "hub")).passed


def test_without_weights_the_demo_says_what_to_install(clone, tmp_path, monkeypatch, capsys):
    from geo_pretrain.cli.train import _shown_weights

    monkeypatch.setenv("GEO_PRETRAIN_HUB", "")
    shown, missing = _shown_weights(tmp_path)
    assert shown is None
    assert find_point_network() is None
    assert "Install it: `pip install ./weights/geo_pretrain_weights` in a clone" in missing
    assert " ".join(missing.split()) in " ".join(capsys.readouterr().out.split())
    shutil.copytree(clone / "weights/geo_pretrain_weights/geo_pretrain_weights", tmp_path / "hub")
    (tmp_path / "hub" / NAME / "encoder.safetensors").unlink()
    monkeypatch.setenv("GEO_PRETRAIN_HUB", str(tmp_path / "hub"))
    with pytest.raises(HubError) as error:
        find_weights(NAME)
    assert "encoder.safetensors: is missing" in why_missing(NAME, error.value)
    monkeypatch.setenv("GEO_PRETRAIN_HUB", "")
    assert "no weights of that name to install" in why_missing("gsc_r18.rooms", error.value)
    with pytest.raises(CheckpointError, match=r"accepted: a backbone for images, such as 'pri3d_view_r18\.rooms'"):
        find_weights(str(write_tiny_3d(tmp_path / "points").folder))


def test_a_report_without_weights_says_why_and_leads_on_from_the_short_pre_training(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "matches.png")
    recall = {"random": Spread((0.1, 0.2)), "pre-trained": Spread((0.3, 0.5))}
    gain = Interval(0.25, 0.2, 0.3, "pairs")
    result = PretrainingResult(load_recipe(RECIPE), recall, 0.007, gain, {"render": 1.0}, tmp_path / "hub" / RECIPE)
    write_report(result, tmp_path, missing="Not here: <install> it.")
    page = (tmp_path / "report.html").read_text()
    assert "Not here: &lt;install&gt; it." in page
    assert html.escape(verdict(result)) in page
    assert table_rows(result) == [
        ("matching recall at 4 px, 72x96 (%)", "15.0 ± 7.1  (random weights)", "40.0 ± 14.1"),
    ]
    assert json.loads((tmp_path / "results.json").read_text())["weights"] == "Not here: <install> it."
    assert str(tmp_path / "hub" / RECIPE) in what_next(result.folder)[0]


def test_what_comes_next_are_commands_that_the_command_line_takes(ran):
    for lines in (what_next(Path("demo/hub/x")), what_next(Path("demo/hub/x"), ran[2])):
        for line in lines:
            words = line.partition("#")[0].split()
            if words[0] != "make":
                assert parse(words[1:])[2] == []
    assert what_next(Path("x"), replace(ran[2], installed=False))[0].startswith("make weights")
    assert f"model.init={NAME}" in what_next(Path("x"), replace(ran[2], installed=True))[-1]


def test_scores_of_rooms_and_gains():
    random = Scores((0.1, 0.2, 0.3), ("a", "a", "b"), (0.4, 0.5), (0.1, 0.2))
    ours = Scores((0.3, 0.4, 0.9), ("a", "a", "b"), (0.3, 0.4), (0.2, 0.3))
    shown = Shown(NAME, {"random": random, NAME: ours}, 0.01, SMALL, (), True, 1.0)
    assert ours.by_room().values == pytest.approx((0.35, 0.9))
    assert shown.gain.mean == pytest.approx(0.333333, abs=1e-5)
    assert shown.label_gain.mean == pytest.approx(-0.1)
    assert weights_rows(shown)[1] == ("pixels that get the right label (%)", "45.0 ± 7.1", "35.0 ± 7.1")
    assert weights_rows(shown)[0] == ("matching recall at 4 px, 64x96 (%)", "22.5 ± 10.6", "62.5 ± 38.9")


def test_maps_of_a_frame_are_computed_once(ran, clone):
    checkpoint = find_weights(NAME)
    extractor = weights._networks(NAME, checkpoint, SMALL)[NAME]
    calls = []
    extractor.network.register_forward_hook(lambda *_: calls.append(1))
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 96, 3)).astype(np.uint8)
    first = [extractor.maps(image)[0] for image in images[:4]]
    assert torch.equal(extractor.maps(images[0], resize=True)[0], first[0])
    assert len(calls) == 4
    for image in images:  # four are remembered: the fifth takes the place of the first
        extractor.maps(image)
    extractor.maps(images[0])
    assert len(calls) == 7


def test_imagenet_stands_beside_where_torch_has_it(clone, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoint = find_weights(NAME)
    assert weights._imagenet(checkpoint) is None
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), path)
    maps = weights._imagenet(checkpoint)
    assert torch.equal(maps.encoder.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    assert maps(torch.rand(1, 3, 64, 96)).shape == (1, 64 + 128 + 256 + 512, 32, 48)


def test_make_demo_takes_the_weights_of_its_clone(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for path in ("pyproject.toml", "constraints.txt", "weights/one/pyproject.toml", "weights/two/pyproject.toml"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()
    done = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert 'GEO_PRETRAIN_HUB="$GEO_PRETRAIN_HUB,weights/one/one,weights/two/two" .venv/bin/geo-pretrain' in done.stdout


def test_spread_is_mean_and_sample_deviation():
    assert str(Spread((0.1, 0.2, 0.3))) == "20.0 ± 10.0"
    assert Spread((0.5,)).std == 0
    assert str(Spread((0.5, math.nan))) == "nan ± nan"
