"""Parts of reading a sample beside the obvious way of each, in turn: registered depth, chunks, voxels of dense clouds.

    python -m benchmarks.reading [--repeats 15]

A frame of 640x480, the surface of a room and the chunk around that frame, by the processor time of one thread. Obvious:
points as rows of three numbers, and sorting. Both ways give the same. Writes benchmarks/results/reading.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import machine, spread, write_results
from benchmarks.seven_scenes import REGISTRATION
from geo_pretrain.geometry import backproject, project, register_depth, transform
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.sparse import coordinates
from geo_pretrain.training.data.frame import Surface
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop_surface

ROOMS = RoomsConfig(scenes=1, frames=4, width=640, height=480)
VOXEL = 0.1  # m, that of Pri3D geo's toy
Work = Callable[[], list[Tensor]]


def register_rows(depth: Tensor, own: Tensor, other: Tensor, moved: Tensor, size: tuple[int, int]) -> Tensor:
    """`register_depth`, every step on points [N, 3]."""
    height, width = size
    points = transform(backproject(depth, own), moved.to(depth.dtype))
    uv, z = project(points, other)
    column, row = (uv + 0.5).floor().unbind(-1)
    valid = (depth.flatten() > 0) & (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    image = depth.new_full((height * width,), math.inf)
    image.scatter_reduce_(0, (row[valid] * width + column[valid]).long(), z[valid], reduce="amin")
    return torch.where(image.isinf(), 0, image).reshape(height, width)


def crop_rows(surface: Surface, low: np.ndarray, high: np.ndarray) -> Surface:
    """`crop_surface`, every comparison on points [N, 3]."""
    inside = ((surface.points > low) & (surface.points < high)).all(axis=1)
    return Surface(surface.points[inside], surface.colors[inside])


def unique_by_sorting(rows: Tensor) -> list[Tensor]:
    """`unique_rows` without its table of cells."""
    with mock.patch.object(coordinates, "DENSE", -1):
        return list(coordinates.unique_rows(rows))


def works() -> dict[str, tuple[str, Work, Work]]:
    """What is measured: of how much, ours and the obvious way."""
    rooms = Rooms(ROOMS)
    rooms.prepare()
    (scene,) = rooms.scenes()
    frame, surface = rooms.load(scene, rooms.frame_ids(scene)[0]), rooms.surface(scene)
    box = chunk_box(frame, match_released_code=False)
    chunk = crop_surface(surface, *box)
    rows = torch.floor(torch.from_numpy(chunk.points) / VOXEL).long()
    depth, own = torch.from_numpy(frame.depth), torch.from_numpy(frame.intrinsics)
    other, moved = (torch.tensor(REGISTRATION[key]).double() for key in ("color_intrinsics", "depth_to_color"))
    size = (depth.shape[0], depth.shape[1])

    def tensors(found: Surface) -> list[Tensor]:
        return [torch.from_numpy(found.points), torch.from_numpy(found.colors)]

    return {
        "depth moved into the color camera": (
            f"{size[1]}x{size[0]}",
            lambda: [register_depth(depth, own, other, moved, size)],
            lambda: [register_rows(depth, own, other, moved, size)],
        ),
        "chunk cut out of a surface": (
            f"{len(chunk)} of {len(surface)} points",
            lambda: tensors(crop_surface(surface, *box)),
            lambda: tensors(crop_rows(surface, *box)),
        ),
        f"voxels of {100 * VOXEL:g} cm numbered": (
            f"{len(rows)} points, {len(coordinates.unique_rows(rows)[0])} voxels",
            lambda: list(coordinates.unique_rows(rows)),
            lambda: unique_by_sorting(rows),
        ),
    }


def milliseconds(work: Work) -> float:
    """Processor time of one call."""
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def largest_share_apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest share of numbers that differ by more than 0.1 mm, in float32 at pixels' edges."""
    pairs = zip(ours, theirs, strict=True)
    return max(((one.double() - other.double()).abs() > 1e-4).double().mean().item() for one, other in pairs)


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for what, (amount, ours, obvious) in works().items():
        apart = largest_share_apart(ours(), obvious())
        times = [(milliseconds(obvious), milliseconds(ours)) for _ in range(options.repeats)]
        found[what] = {
            "of": amount,
            "obvious_ms": spread([slow for slow, _ in times]),
            "ours_ms": spread([fast for _, fast in times]),
            "ratio": spread([fast / slow for slow, fast in times]),
            "share apart": apart,
        }
    write_results("reading", "python -m benchmarks.reading", {"machine": machine(), "parts": found})


if __name__ == "__main__":
    main()
