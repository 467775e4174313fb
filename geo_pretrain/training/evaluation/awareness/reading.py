"""Reading maps at places of an image: bilinear, corners aligned, as linear operators on rows and columns.

As reading is linear, a linear layer and a dot product may be taken on the cells of a map first and then be read: a map
at stride 32 has 80 cells where there are 4800 places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geo_pretrain.training.evaluation.probe_data import read_at

COARSE = 4  # times fewer cells than places: then products are taken on cells


class PlaceReader:
    """Reads maps [1, C, h, w] at a grid of places of an image."""

    def __init__(self, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> None:
        """`rows`, `columns`: of the grid, in pixels of an image of `size` (height, width)."""
        self.rows, self.columns, self.size = rows, columns, size
        self._operators: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def count(self) -> int:
        """Number of places."""
        return len(self.rows) * len(self.columns)

    def operators(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Weights of the rows and of the columns of a map at the places': [R, height], [C, width]."""
        if (height, width) not in self._operators:
            self._operators[height, width] = (
                _weights(self.rows, self.size[0], height),
                _weights(self.columns, self.size[1], width),
            )
        return self._operators[height, width]

    def spread(self, values: Tensor) -> Tensor:
        """Read maps [K, h, w] at all places: [K, S]."""
        down, across = self.operators(*values.shape[1:])
        return (down @ values @ across.T).flatten(1)

    def at(self, one: Tensor, pixels: Tensor) -> Tensor:
        """Read a map [1, C, h, w] at flat pixels [N] of the image: [N, C]."""
        width = self.size[1]
        return read_at([one], torch.stack([pixels // width, pixels % width], 1).float(), self.size)

    def cosines(self, query: Tensor, one: Tensor) -> Tensor:
        """Cosines between queries [Q, C] of unit length and the features of a map read at all places: [Q, S]."""
        read = self.spread(one[0])
        length = read.square().sum(0).sqrt().clamp_min(1e-12)
        cells = one[0].flatten(1)
        if cells.shape[1] * COARSE > self.count:
            return query @ read / length
        return self.spread((query @ cells).reshape(len(query), *one.shape[2:])) / length


def _weights(places: Tensor, pixels: int, cells: int) -> Tensor:
    """Weights of `cells` at `places` along an axis of `pixels`, first and last centers on each other: [P, cells]."""
    where = places.float() / max(pixels - 1, 1) * (cells - 1)
    low = where.floor().long().clamp(0, max(cells - 2, 0))
    share = (where - low)[:, None]
    weights = torch.zeros(len(places), cells)
    weights.scatter_add_(1, low[:, None], 1 - share)
    weights.scatter_add_(1, (low[:, None] + 1).clamp(max=cells - 1), share)
    return weights
