"""Normals of depth: planes and a corner in closed form, a fit pixel by pixel, depth that is not there."""

from __future__ import annotations

import numpy as np
import torch

from geo_pretrain.training.geometry3d.normals import depth_normals

K = torch.tensor([[60.0, 0, 31], [0, 55.0, 24], [0, 0, 1]])
SIZE = (48, 64)
ALL = torch.arange(SIZE[0] * SIZE[1])


def plane(normal, distance):
    """Depth of the plane n . X = -distance, seen from the origin."""
    v, u = torch.meshgrid(torch.arange(SIZE[0]).float(), torch.arange(SIZE[1]).float(), indexing="ij")
    rays = torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], torch.ones(SIZE)])
    return -distance / (torch.tensor(normal)[:, None, None] * rays).sum(0)


def inner(values):
    return values.reshape(*SIZE, 3)[4:-4, 4:-4].reshape(-1, 3)


def test_normals_of_a_plane_are_its_own_and_point_to_the_camera():
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.4, -0.8]), dim=0)
    found = inner(depth_normals(plane(normal.tolist(), 2.0), K, ALL, radius=2))
    assert torch.allclose(found, normal.expand_as(found), atol=1e-5)


def test_normals_at_an_edge_are_those_of_the_pixel_s_own_surface():
    depth = torch.where(torch.arange(SIZE[1]) < 32, plane([0.0, 0.0, -1.0], 1.0), plane([-0.6, 0.0, -0.8], 3.0))
    found = depth_normals(depth, K, ALL, radius=2).reshape(*SIZE, 3)
    assert torch.allclose(found[10, 31], torch.tensor([0.0, 0.0, -1.0]), atol=1e-5)
    assert torch.allclose(found[10, 32], torch.tensor([-0.6, 0.0, -0.8]), atol=1e-5)


def test_normals_equal_a_fit_of_each_pixel():
    generator = torch.Generator().manual_seed(0)
    depth = plane([0.2, 0.1, -0.9], 1.5) * (1 + 0.01 * torch.randn(SIZE, generator=generator))
    depth[torch.rand(SIZE, generator=generator) < 0.3] = 0
    pixels = ALL[::97]
    found = depth_normals(depth, K, pixels, radius=2, gap=0.05)
    for pixel, normal in zip(pixels.tolist(), found, strict=True):
        row, column = divmod(pixel, SIZE[1])
        near = [(r, c) for r in range(row - 2, row + 3) for c in range(column - 2, column + 3)]
        near = [(r, c) for r, c in near if 0 <= r < SIZE[0] and 0 <= c < SIZE[1] and depth[r, c] > 0]
        own = depth[row, column]
        near = [(r, c) for r, c in near if own > 0 and abs(1 / depth[r, c] - 1 / own) <= 0.05 / depth[r, c]]
        if len(near) < 13:
            assert not normal.any()
            continue
        system = np.array([[c, r, 1.0] for r, c in near])
        w = np.linalg.lstsq(system, np.array([1 / float(depth[r, c]) for r, c in near]), rcond=None)[0]
        expected = -K.numpy().T @ w
        assert np.allclose(normal.numpy(), expected / np.linalg.norm(expected), atol=1e-4)
