"""Whether voxels of a cloud touch one another; where they do not, its coordinates are often in another unit."""

from __future__ import annotations

import torch
from torch import Tensor

from geo_pretrain.sparse.coordinates import unique_rows

REACH = 4  # voxels; twice what the widest kernel of the networks here sees
ALONE = 0.9  # share of cells of REACH voxels to voxels; scans of rooms have 0.1, lidar 0.2 to 0.5, one point each 1
FEW = 500  # points; fewer say nothing
CROWDED = 100  # points a voxel, of all voxels together, ...
LEAST = 27  # ... and so many voxels at most: a cloud that is one spot


def spacing_doubt(coords: Tensor, points: int, voxel_size: float, line: str) -> str | None:
    """Say why coordinates of a cloud seem not to be meters; None if they do.

    `coords` [M, 4]: voxels of `points` points, of edge `voxel_size` (m), from `voxelize`. `line`: what scales them,
    with {} for the factor, such as "points * {}".

    >>> from geo_pretrain.sparse.coordinates import voxelize
    >>> points = torch.rand(5000, 3) * 500
    >>> coords = voxelize(points, torch.ones(5000, 1), 0.05).coords
    >>> spacing_doubt(coords, 5000, 0.05, "points * {}")[:56]
    'hardly any of the 5000 points has another one within 0.2'
    """
    if points < FEW:
        return None
    cells = coords[:, 1:]
    wide = int((cells.amax(dim=0) - cells.amin(dim=0)).max()) + 1
    extent = f"{float(f'{wide * voxel_size:.3g}'):g} m wide, at {voxel_size:g} m a voxel"
    if len(coords) <= LEAST and points >= CROWDED * len(coords):
        return (
            f"all {points} points lie in {len(coords)} voxels; the cloud is {extent}. Are its coordinates meters? "
            f"Kilometers: {line.format(1000)}."
        )
    cubes = torch.cat([coords[:, :1], torch.div(cells, REACH, rounding_mode="floor")], dim=1)
    if len(unique_rows(cubes.to(torch.int64))[0]) < ALONE * len(coords):
        return None
    return (
        f"hardly any of the {points} points has another one within {REACH * voxel_size:.3g} m; the cloud is {extent}. "
        f"Are its coordinates meters? Centimeters: {line.format(0.01)}, millimeters: {line.format(0.001)}. If they "
        "are meters, the network sees lone points: it wants denser clouds or larger voxels."
    )
