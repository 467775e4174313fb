"""Whether depth and color show the same pixel: edges of depth are laid on edges of color, moved and scaled.

Where depth jumps, an object ends, and mostly its color does, too. If the edges fit best elsewhere than in place, the
two images come from two cameras that are not registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geo_pretrain.training.data.frame import Frame

WIDTH = 200  # px, about that of the images that are compared
JUMP = 0.05  # relative difference of neighboring depths that makes an edge
SCALES = tuple(round(0.8 + 0.04 * step, 2) for step in range(11))  # of depth edges about the middle of the image
REACH = 0.1  # of the width: how far edges are moved
NEAR = 0.012  # of the width: a median distance of edges below it is no misregistration (8 pixels of 640)
FIT, BETTER = 0.3, 1.3  # of the best place, at least: its fit, and its fit as a multiple of that in place
FEWEST = 200  # pixels of depth edges, in all frames together


@dataclass(frozen=True)
class Registration:
    """Where depth edges fit color edges best.

    A fit is the mean strength of color edges under depth edges, in standard deviations above the images' mean.
    """

    in_place: float  # the fit of depth edges where they are
    fit: float  # at the best place
    scale: float  # of depth edges about the middle of the image at the best place
    offset: tuple[float, float]  # pixels to the right and down at the best place, of the frame's own
    error: float  # pixels of the frame's own: median distance of depth edges in place from the best place
    width: int  # of the frame

    @property
    def is_known(self) -> bool:
        """Whether edges fit anywhere; where colors do not change with depth, they do not."""
        return self.fit >= FIT

    @property
    def is_registered(self) -> bool:
        """Whether no other place is clearly better than in place."""
        return self.error <= NEAR * self.width or self.fit < BETTER * self.in_place


def find_registration(frames: Sequence[Frame]) -> Registration | None:
    """Compare edges of depth and color in some frames of equal size; None where depth has too few edges."""
    if not frames:
        return None
    width = frames[0].depth.shape[1]
    factor = max(1, round(width / WIDTH))
    colors = [_color_edges(frame.color, factor) for frame in frames]
    edges = [np.nonzero(depth_edges(frame.depth, factor)) for frame in frames]
    if sum(len(rows) for rows, _ in edges) < FEWEST:
        return None
    reach = round(REACH * colors[0].shape[1])
    fits = np.stack([_fits(colors, edges, scale, reach) for scale in SCALES])  # [S, 2 reach + 1, 2 reach + 1]
    best, down, right = np.unravel_index(fits.argmax(), fits.shape)
    scale, offset = SCALES[best], (int(right) - reach, int(down) - reach)
    middle = (np.array(colors[0].shape[::-1]) - 1) / 2
    places = np.concatenate([np.stack([columns, rows], 1) for rows, columns in edges])
    moved = (places - middle) * (scale - 1) + offset
    return Registration(
        in_place=float(fits[SCALES.index(1.0), reach, reach]),
        fit=float(fits.max()),
        scale=scale,
        offset=(float(factor * offset[0]), float(factor * offset[1])),
        error=factor * float(np.median(np.linalg.norm(moved, axis=1))),
        width=width,
    )


def _fits(
    colors: Sequence[np.ndarray], edges: Sequence[tuple[np.ndarray, ...]], scale: float, reach: int
) -> np.ndarray:
    """The fit of all edges, scaled, at every offset up to `reach`: [2 reach + 1, 2 reach + 1], rows are down.

    A correlation by Fourier transforms; the images are padded, so that nothing comes back in on the other side.
    """
    height, width = colors[0].shape
    size = height + reach, width + reach
    spectrum, count = np.zeros((size[0], size[1] // 2 + 1), np.complex128), 0
    for color, (rows, columns) in zip(colors, edges, strict=True):
        row = np.rint((rows - (height - 1) / 2) * scale + (height - 1) / 2).astype(np.int64)
        column = np.rint((columns - (width - 1) / 2) * scale + (width - 1) / 2).astype(np.int64)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        marks = np.zeros((height, width))
        np.add.at(marks, (row[inside], column[inside]), 1)
        spectrum = spectrum + np.fft.rfft2(color, s=size) * np.conj(np.fft.rfft2(marks, s=size))
        count += int(inside.sum())
    sums = np.roll(np.fft.irfft2(spectrum, s=size), (reach, reach), axis=(0, 1))
    fits: np.ndarray = sums[: 2 * reach + 1, : 2 * reach + 1] / max(count, 1)
    return fits


def _color_edges(color: np.ndarray, factor: int) -> np.ndarray:
    """How much the brightness of an image uint8 [H, W, 3] changes at a pixel, shrunk by `factor`: float [h, w].

    The square root of the gradient, so that a few strong edges do not decide, with mean 0 and deviation 1.
    """
    height, width = (size // factor for size in color.shape[:2])
    blocks = color[: height * factor, : width * factor].astype(np.float64)
    gray = blocks.reshape(height, factor, width, factor, -1).mean(axis=(1, 3, 4))
    gradient = np.zeros_like(gray)
    gradient[1:-1, 1:-1] = np.hypot(gray[1:-1, 2:] - gray[1:-1, :-2], gray[2:, 1:-1] - gray[:-2, 1:-1])
    root = np.sqrt(gradient)
    return (root - root.mean()) / max(float(root.std()), 1e-9)


def depth_edges(depth: np.ndarray, factor: int) -> np.ndarray:
    """Pixels before a jump of depth [H, W], on the nearer side: bool [h, w]."""
    height, width = (size // factor for size in depth.shape)
    depth = depth[factor // 2 :: factor, factor // 2 :: factor][:height, :width]
    edges = np.zeros(depth.shape, bool)
    for depths, marks in ((depth, edges), (depth.T, edges.T)):
        here, there = depths[:-1], depths[1:]
        jumps = np.abs(there - here) > JUMP * np.minimum(here, there)
        jumps &= (here > 0) & (there > 0)
        marks[:-1] |= jumps & (here < there)
        marks[1:] |= jumps & (there < here)
    return edges
