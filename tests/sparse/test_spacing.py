"""Clouds in other units than meters are told by their voxels, which touch no other, or are one."""

from __future__ import annotations

import warnings

import pytest
import torch

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.sparse.spacing import spacing_doubt

VOXEL = 0.05


def room(count=4000):
    """Points on the floor and two walls of a room, 4 m x 5 m x 2.5 m."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(count, 3, generator=generator) * torch.tensor([4.0, 5.0, 2.5])
    for axis in range(3):
        points[axis::3, axis] = 0
    return points


def lidar():
    """A turning scanner over a plane: rings of points, near ones denser than far ones."""
    turn, down = torch.linspace(0, 6.28, 600), torch.linspace(0.03, 0.4, 32)
    a, e = torch.meshgrid(turn, down, indexing="ij")
    reach = 1.7 / torch.tan(e)
    return torch.stack([reach * torch.cos(a), reach * torch.sin(a), torch.full_like(a, -1.7)], -1).reshape(-1, 3)


def doubt(points, batch=None):
    coords = voxelize(points, torch.ones(len(points), 1), VOXEL, batch=batch).coords
    return spacing_doubt(coords, len(points), VOXEL, "scale={}")


@pytest.mark.parametrize("points", [room(), lidar(), room()[:499] * 100], ids=["room", "lidar", "few"])
def test_scans_in_meters_are_not_doubted(points):
    assert doubt(points) is None


@pytest.mark.parametrize("scale", [100, 1000])
def test_lone_points_are_told_with_both_scales(scale):
    said = doubt(room() * scale)
    assert said.startswith("hardly any of the 4000 points has another one within 0.2 m; the cloud is ")
    assert "Centimeters: scale=0.01, millimeters: scale=0.001." in said


def test_a_cloud_in_one_spot_is_told():
    said = doubt(room() / 1000)
    assert said.startswith("all 4000 points lie in 1 voxels; the cloud is 0.05 m wide")
    assert said.endswith("Kilometers: scale=1000.")


def test_clouds_of_a_batch_are_no_neighbors():
    several = room().repeat(8, 1) * 100
    assert doubt(several, torch.arange(8).repeat_interleave(4000))


def test_a_network_warns_of_each_cloud_at_the_callers_line():
    network = SRUNet("18A", width=8).eval()
    network.contract = VoxelContract(VOXEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.encode_points(room(600))
    with pytest.warns(UserWarning, match=r"Centimeters: points \* 0\.01") as caught:
        network.encode_points(room(600) * 100)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"the cloud is 450 m wide"):
        network.encode_points(room(600) * 90)
