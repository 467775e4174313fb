"""3D awareness of point networks: the matching of `eval matching` voxel for voxel, answers that are known, controls."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from geo_pretrain.errors import RecipeError
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.frame import Pair, SkippedFrames
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.evaluation.awareness.clouds import (
    CloudMeasures,
    CloudPair,
    Clouds,
    InputRows,
    draw_cloud_pairs,
    index_of,
)
from geo_pretrain.training.evaluation.awareness.memory import remember
from geo_pretrain.training.evaluation.awareness.networks import find_subject, with_random
from geo_pretrain.training.evaluation.awareness.run import measure_awareness
from geo_pretrain.training.evaluation.awareness.spec import OVERLAPS, TURNS, AwarenessSpec
from geo_pretrain.training.evaluation.awareness.views import read_views
from geo_pretrain.training.evaluation.features import CloudExtractor
from geo_pretrain.training.evaluation.matching import match_pair
from tests.test_cli import run
from tests.training.conftest import recording  # noqa: F401 (fixture)
from tests.zoo import write_tiny_3d

SPEC = AwarenessSpec(size=(48, 64), frames=6, pairs=1, queries=60, places=100, blocks=3, seeds=1)


@pytest.fixture(scope="module")
def source(recording):  # noqa: F811
    return SevenScenes(recording)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return find_subject(str(write_tiny_3d(tmp_path_factory.mktemp("awareness3d") / "net").folder))


@pytest.fixture(scope="module")
def network(subject):
    return subject.load()


@pytest.fixture(scope="module")
def clouds(source, network):
    return Clouds(read_views(source, SPEC, SkippedFrames()), network.contract)


class Known:
    """Features that are made of the voxels themselves."""

    def __init__(self, made):
        self.made, self.layers = made, ["known"]

    def read(self, frame, layer):
        number, turn = divmod(frame, len(TURNS))
        return self.made(number, TURNS[turn])


def test_networks_with_another_input_have_random_weights_of_their_own(subject):
    """Of one architecture: what they see decides how random weights score."""
    same = replace(subject, name="same")
    assert [one.name for one in with_random([subject, same])][:-2] == ["SR-UNet, random weights"]
    contract = replace(subject.checkpoint.contract, voxel_size=0.1)
    other = replace(subject, name="other", checkpoint=replace(subject.checkpoint, contract=contract))
    first, second, *given = with_random([subject, other])
    assert given == [subject, other]
    assert (first.kind, second.kind) == (subject.kind, other.kind)
    assert [first.name, second.name] == [
        f"SR-UNet of {subject.name}, random weights",
        "SR-UNet of other, random weights",
    ]


def test_layers_come_in_the_order_of_the_network(clouds, network):
    assert network.names == ["block4 /16", "block5 /8", "block6 /4", "block7 /2", "block8 /1", "output"]
    rows = clouds.layers(network, 0)
    voxels = clouds.voxels(0, TURNS[0])
    x = SparseTensor(voxels.coords, voxels.feats)
    with torch.no_grad():
        assert torch.equal(rows[4], network.network.pyramid(x)[0].feats)
        assert torch.equal(rows[5], network.network(x).feats)


def test_matching_is_that_of_eval_matching_on_features_that_are_read_once(clouds, network, source, tmp_path):
    frames = clouds.views.frames
    memory = remember(tmp_path, network.names, lambda index: clouds.layers(network, index), 2 * len(TURNS), {})
    pair = CloudPair(0, 1, 2)
    found = CloudMeasures(memory, clouds).matching(len(network.names) - 1, [pair], 5)
    extractor = CloudExtractor(network.network, network.contract)
    twin = Pair(frames[0].scene, frames[0].id, frames[1].id, 1.0)
    matches = match_pair(extractor, source, twin, size=SPEC.size, turn="camera", queries=60, seed=5)
    assert found["camera 0.5-0.7"] == pytest.approx(float((matches.error <= 2).mean()), abs=0.02)  # float16
    assert set(found) == {f"{turn} 0.5-0.7" for turn in TURNS} | {"recall"}


def test_features_that_know_the_place_match_however_the_clouds_are_turned(clouds):
    def made(number, turn):
        points = clouds.voxels(number, turn).world / 40
        return torch.cat([points, (1 - points.square().sum(1, keepdim=True)).clamp_min(0).sqrt()], 1)

    pairs = draw_cloud_pairs(clouds.views, 0)
    scores = CloudMeasures(Known(made), clouds).matching(0, pairs, 0)
    assert scores["recall"] > 0.95
    assert len(scores) == 1 + len(TURNS) * len({pair.bin for pair in pairs})
    assert all(0 <= pair.bin < len(OVERLAPS) and pair.first != pair.second for pair in pairs)


def test_normals_are_those_of_the_voxels_pixels_and_point_to_the_camera(clouds):
    for number in (0, 3):
        voxels, normals = clouds.voxels(number, "camera"), clouds.normals(number)
        known = normals.any(1)
        assert known.float().mean() > 0.5
        assert ((normals * voxels.held).sum(1)[known] < 0).all()  # the camera is at the origin
        frame = clouds.views.frames[number]
        depth = torch.from_numpy(frame.depth).flatten()[voxels.pixel]
        assert torch.allclose(voxels.held[:, 2], depth, atol=1e-4)


def test_probe_of_features_that_are_the_normals_is_right_and_of_constants_is_not(clouds):
    right = CloudMeasures(Known(lambda number, turn: clouds.normals(number)), clouds).normals(0, 0)
    assert right["11.25 deg"] == pytest.approx(1)
    assert right["rmse"] < 0.5
    wrong = CloudMeasures(Known(lambda number, turn: torch.ones(len(clouds.normals(number)), 1)), clouds)
    assert wrong.normals(0, 0)["11.25 deg"] < 0.5


def test_controls_are_coordinates_and_color_of_the_voxels_own_pixels(clouds):
    rows = InputRows(clouds)
    place, color, both = (rows.read(index_of(1, "upright"), layer) for layer in range(3))
    assert torch.equal(both, torch.cat([place, color], 1))
    assert place[:, 2].min() == 0
    assert torch.allclose(place[:, 0].max(), -place[:, 0].min(), atol=1e-5)
    if clouds.contract.given_channels:
        assert torch.allclose(color + clouds.contract.offset, clouds.voxels(1, "upright").feats, atol=1e-5)


def test_command_measures_point_networks_with_controls(recording, subject, tmp_path):  # noqa: F811
    options = ["--size", "48x64", "--views", "6", "--pairs", "1", "--seeds", "1", "--no-random"]
    result = run("eval", "awareness", subject.name, "--data", f"seven_scenes:{recording}", *options, "--out", tmp_path)
    assert "within 2 voxels" in result.output
    tree = json.loads((tmp_path / "awareness.json").read_text())
    assert list(tree["networks"]["without a network, 5 cm"]["normals"]["layers"]) == ["xyz", "color", "xyz+color"]
    assert len(tree["networks"][subject.name]["matching"]["layers"]) == 6
    assert (tmp_path / "awareness.png").read_bytes().startswith(b"\x89PNG")


def test_images_and_points_are_not_measured_together(source, subject):
    with pytest.raises(RecipeError, match="two calls"):
        measure_awareness([subject, find_subject("resnet18=scratch")], source, SPEC)


def test_points_have_no_probe_of_depth(source, subject):
    for measures in (("depth",), ("depth", "normals")):
        with pytest.raises(RecipeError, match="no probe of depth; accepted measures: matching, normals, semantic"):
            measure_awareness([subject], source, replace(SPEC, measures=measures))
