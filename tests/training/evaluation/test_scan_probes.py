"""Probes on whole clouds: points judged by their voxels, controls of coordinates and color, broken clouds counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.registry import subset
from geo_pretrain.training.evaluation.probe_data import InputData, ScanData, plain_features
from geo_pretrain.training.evaluation.probes import (
    INPUT,
    RANDOM,
    ProbeSpec,
    compare_probes,
    probe_backbone,
    probe_extractor,
    run_probes,
)
from tests.front_door import geo_pretrain
from tests.training.painted_clouds import COLORS, ONES, Given, painted
from tests.zoo import write_tiny, write_tiny_3d

SPEC = ProbeSpec(pixels=300, iterations=60)
TINY_ROOMS = {"scenes": 2, "val_scenes": 1, "frames": 3, "width": 64, "height": 64}


class Scans:
    """Painted clouds as a source of whole clouds; `change` alters each."""

    name, classes = "clouds", ("red", "green", "blue")

    def __init__(self, split, count=2, change=lambda cloud: cloud):
        self.split, self.count, self.change = split, count, change

    def ids(self):
        return [f"{self.split}{k}" for k in range(self.count)]

    def scene_of(self, id):
        return id

    def load(self, id):
        if id == "train1":
            raise BadFrame("train1.ply", "cut off")
        return self.change(replace(painted(int(id[-1]) + (5 if self.split == "val" else 0)), id=id))

    def fingerprint(self):
        return "0" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_3d(tmp_path_factory.mktemp("tiny") / "tiny_net_srunet34").folder


def probed(network, contract, train, val, spec=SPEC):
    network.contract = contract
    data = [ScanData(probe_extractor(network, frames=False), split) for split in (train, val)]
    return run_probes(["linear"], *data, spec)["linear"], data


def test_every_labelled_point_is_judged_by_the_features_of_its_voxel():
    found, (seen, _) = probed(Given(), COLORS, Scans("train"), Scans("val"))
    assert found.measured == sum(int((Scans("val").load(id).labels > 0).sum()) for id in Scans("val").ids())
    assert found.accuracy == 1  # the network hands on the colors that tell the classes
    assert seen.skipped == {"train1.ply": "cut off"}
    coarse = replace(COLORS, voxel_size=50.0)  # one voxel for the whole cloud: one answer for all of its points
    blunt, _ = probed(Given(), coarse, Scans("train"), Scans("val"))
    assert blunt.measured == found.measured
    assert (blunt.confusion.sum(0) > 0).sum() <= 2


def test_the_control_sees_the_same_points_without_a_network():
    data = [
        ScanData(probe_extractor(with_contract(Given(constant=True)), frames=False), Scans(s)) for s in ("train", "val")
    ]
    blind = run_probes(["linear"], *data, SPEC)["linear"]
    control = run_probes(["linear", "knn"], *map(InputData, data), SPEC)
    assert control["linear"].accuracy == 1 > blind.accuracy  # colors tell the classes
    assert control["linear"].measured == blind.measured
    assert control["linear"].channels == 6
    ones = probe_extractor(with_contract(Given(), ONES), frames=False)
    gray = [ScanData(ones, Scans(s, change=lambda c: replace(c, colors=None))) for s in ("train", "val")]
    alone = run_probes(["linear"], *map(InputData, gray), SPEC)["linear"]
    assert alone.channels == 3
    assert alone.accuracy < 1


def test_the_control_sees_clouds_of_several_kinds_and_only_those_that_the_network_takes():
    def mixed(cloud):
        odd = cloud.id.endswith(("2", "3"))
        return replace(
            cloud, intensity=cloud.points[:, 2] if odd else None, colors=None if cloud.id[-1] == "3" else cloud.colors
        )

    data = [
        ScanData(probe_extractor(with_contract(Given()), frames=False), Scans(s, 4, mixed)) for s in ("train", "val")
    ]
    network, control = (run_probes(["linear"], *pair, SPEC)["linear"] for pair in (data, map(InputData, data)))
    assert (control.measured, control.channels) == (network.measured, 6)
    assert {"val3", "train3"} <= data[0].skipped.keys() | data[1].skipped.keys()


def with_contract(network, contract=COLORS):
    network.contract = contract
    return network


def test_coordinates_of_the_control_are_relative_to_the_cloud():
    points = np.array([[10, 20, 5], [14, 20, 6], [12, 24, 9]], np.float32)
    colors = np.array([[0, 51, 255]] * 3, np.uint8)
    cloud = LabelledCloud("a", points, colors, np.ones(3, np.int64), intensity=np.array([0, 0.5, 1], np.float32))
    place, color, remission = plain_features(cloud)
    assert place.tolist() == [[-2, -2, 0], [2, -2, 1], [0, 2, 4]]
    assert torch.allclose(color[0], torch.tensor([0, 0.2, 1]))
    assert remission[:, 0].tolist() == [0, 0.5, 1]


def test_a_backbone_stands_beside_both_controls(folder):
    skipped, done = {}, []
    found = compare_probes(
        folder, Scans("train"), Scans("val"), SPEC, skipped=skipped, progress=lambda *at: done.append(at)
    )
    assert list(found) == [INPUT, RANDOM, str(folder)]
    assert skipped == {"train1.ply": "cut off"}
    assert done[-1] == (3 * (2 + 2 * 2),) * 2
    assert len({r["linear"].measured for r in found.values()}) == 1
    alone = probe_backbone(folder, subset(Scans("train"), 1.0), Scans("val"), SPEC)
    assert np.array_equal(alone.confusion, found[str(folder)]["linear"].confusion)


def test_cylinders_and_laser_scans_are_probed():
    def laser(cloud):
        remission = (cloud.colors[:, 0] / 255).astype(np.float32)
        return replace(cloud, colors=None, intensity=remission, points=cloud.points + np.float32([5, 0, 0]))

    contract = VoxelContract((0.1, 1.0, 0.1), ("intensity",), coordinates="cylindrical")
    found, _ = probed(Given(), contract, Scans("train", change=laser), Scans("val", change=laser))
    assert found.channels == 1
    assert found.accuracy > 0.6  # red is told from the others


def test_what_does_not_fit_is_said(folder, tmp_path):
    write_tiny(tmp_path / "tiny_net_r18")
    with pytest.raises(RecipeError, match="has clouds, the backbone takes images; accepted: a 3D backbone"):
        compare_probes(tmp_path / "tiny_net_r18", Scans("train"), Scans("val"), SPEC)
    with pytest.raises(DataError, match=r"a probe needs clouds with labels of points\. Skipped: train1\.ply: cut off"):
        compare_probes(folder, subset(Scans("train"), 1.0, scenes=["train1"]), Scans("val"), SPEC)
    bare = Scans("train", change=lambda cloud: replace(cloud, labels=None))
    with pytest.raises(DataError, match="cloud train0 has no labels of points"):
        compare_probes(folder, bare, Scans("val"), SPEC)


def test_features_other_than_the_contracts_are_reconciled(folder):
    gray = [Scans(s, change=lambda cloud: replace(cloud, colors=None)) for s in ("train", "val")]
    spec = replace(SPEC, features="ones")
    assert compare_probes(folder, *gray, spec, probes=["linear"])[RANDOM]["linear"].measured > 0


def test_rooms_are_probed_by_the_command(folder):
    options = [part for key, value in TINY_ROOMS.items() for part in ("--option", f"{key}={value}")]
    result = geo_pretrain("eval", "probe", folder, "--data", "rooms3d", "--pixels", 200, *options, "--json")
    found = json.loads(result.output)
    assert list(found) == [INPUT, RANDOM, str(folder)]
    assert found[INPUT]["linear"]["channels"] == 6
