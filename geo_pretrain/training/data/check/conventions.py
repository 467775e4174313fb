"""Which reading of poses and depth is right: every one is tried by projecting frames into each other.

A pixel of one frame, moved by the two poses, must fall on the same surface in the other frame. Poses that are inverse,
camera axes of OpenGL, or a depth in other units than the poses leave few pixels that do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FLIP = np.diag([1.0, -1, -1, 1])  # OpenGL's camera (x right, y up, looking along -z) seen from ours, and back
TOLERANCE = 0.03  # by which two depths of one surface may differ, relative to the depth
POINTS = 400  # of each frame
THINNED = 4  # one of so many points is used as long as many factors are tried
LIMIT = 14  # factors on depth from 2**-14 to 2**14 are tried: from meters read as millimeters to the opposite
STEPS = 4  # factors tried in an octave
SAME, CLOSER = 0.92, 1.35  # of the best agreement and depth difference: readings within both are as good as it
COARSE = (0.001, 0.01, 0.2, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 5.0, 100.0, 1000.0)  # factors tried by a quick check
SPARSE, LEAST_DENSE = 0.5, 0.02  # share of pixels with depth below which a frame is sparse; and the least counted with
TELLING = 0.15  # spread of agreement over the four conventions, above which a pair of frames tells them apart
FEWEST = 20  # points that land on depth in the other frame; a median of fewer says nothing


@dataclass(frozen=True)
class Convention:
    """A reading of the poses as they come from the source: which way they go, and which axes cameras have."""

    inverse: bool = False  # the poses are world-to-camera
    flipped: bool = False  # camera axes are those of OpenGL

    def apply(self, poses: np.ndarray) -> np.ndarray:
        """Camera-to-world poses of our axes, [..., 4, 4], if `poses` follow this convention."""
        read = np.linalg.inv(poses) if self.inverse else poses.copy()
        return read @ FLIP if self.flipped else read


CONVENTIONS = tuple(Convention(inverse, flipped) for inverse in (False, True) for flipped in (False, True))
AS_READ = CONVENTIONS[0]


@dataclass(frozen=True)
class Fit:
    """How well frames agree under one reading of them."""

    convention: Convention
    scale: float  # factor on the depth, as it comes from the source
    agreement: float  # share of valid pixels that land on the same surface, mean over pairs of frames
    difference: float  # m, median depth difference of those that land on any depth; NaN where hardly any does


@dataclass(frozen=True)
class Fits:
    """The readings that were tried."""

    as_read: Fit
    best: Fit
    conventions: tuple[Fit, ...]  # one each of CONVENTIONS, at the best factor for it
    pairs: int  # pairs of frames that tell the conventions apart; with none, nothing is known

    @property
    def fits_as_read(self) -> bool:
        """Whether no other reading is clearly better than the source's own."""
        return self.best == self.as_read


@dataclass(frozen=True)
class View:
    """A frame as it takes part: depth [H, W] m, intrinsics [3, 3], pose [4, 4] as read."""

    depth: np.ndarray
    intrinsics: np.ndarray
    pose: np.ndarray


def try_conventions(views: Sequence[View], pairs: Sequence[tuple[int, int]], *, quick: bool = False) -> Fits | None:
    """Project frames into each other under every convention and factor on depth; None without a pair.

    Args:
        views: frames of equal size, poses as read (of any unit).
        pairs: indices of two frames that probably see the same surfaces, such as neighbors in time.
        quick: try a few factors first; if the source's own reading is the best, it is not asked for the others.
    """
    if not pairs:
        return None
    rounds = _Rounds(views, pairs)
    if quick and (fits := _fits(rounds, np.array(COARSE))).fits_as_read:
        return fits
    return _fits(rounds, 2.0 ** (np.arange(-LIMIT * STEPS, LIMIT * STEPS + 1) / STEPS))


def _fits(rounds: _Rounds, factors: np.ndarray) -> Fits:
    """The best factor for each convention, and the best of all."""
    few = rounds.thinned()
    table = np.stack([[few.agreement(one, factor) for factor in factors] for one in CONVENTIONS])  # [4, F, P]
    telling = _telling(table)
    known = int(telling.sum())
    if not known:
        telling[:] = True
    fits = []
    for convention, row in zip(CONVENTIONS, table, strict=True):
        factor = _refined(rounds, convention, float(factors[row[:, telling].mean(axis=1).argmax()]), telling)
        tried = [rounds.fit(convention, one, telling) for one in (1.0, factor)]
        fits.append(tried[0] if _as_good(*tried) else tried[1])
    as_read, best = rounds.fit(AS_READ, 1.0, telling), max(fits, key=lambda fit: fit.agreement)
    return Fits(as_read, as_read if _as_good(as_read, best) else best, tuple(fits), known)


def _as_good(fit: Fit, best: Fit) -> bool:
    """Whether a reading is about as good as the best one; differences count in units of the depth as read."""
    closer = fit.difference / fit.scale <= CLOSER * best.difference / best.scale
    return fit.agreement >= SAME * best.agreement and (closer or fit.agreement >= best.agreement)


def _telling(table: np.ndarray) -> np.ndarray:
    """Which pairs [P] tell the readings [4, F, P] apart: they agree under one convention and not under the others."""
    ranked = np.sort(table.max(axis=1), axis=0)
    return ranked[-1] - ranked[-2] >= TELLING


def _refined(rounds: _Rounds, convention: Convention, factor: float, telling: np.ndarray) -> float:
    """The factor between its neighbors on the grid: the middle of those with nearly the best agreement."""
    tried = factor * 2.0 ** np.linspace(-1 / STEPS, 1 / STEPS, 17)
    means = np.array([rounds.agreement(convention, one)[telling].mean() for one in tried])
    return float(np.exp(np.log(tried[means >= 0.99 * means.max()]).mean()))


class _Rounds:
    """Points of the first frame of every pair, ready to be moved into the second under any reading."""

    def __init__(self, views: Sequence[View], pairs: Sequence[tuple[int, int]]) -> None:
        first, second = np.array(pairs).T
        self.size = views[0].depth.shape
        self.depth = np.stack([view.depth.reshape(-1) for view in views]).astype(np.float64)  # [N, H W]
        self.intrinsics = np.stack([view.intrinsics for view in views])
        self.poses = np.stack([view.pose for view in views])
        points, self.valid = zip(*(_points(views[i]) for i in range(len(views))), strict=True)
        self.points, self.valid = np.stack(points)[first], np.stack(self.valid)[first]  # [P, M, 3], [P, M]
        self.first, self.second = first, second
        dense = (self.depth > 0).mean(axis=1)
        self.reachable = np.where(dense < SPARSE, np.maximum(dense, LEAST_DENSE), 1.0)[second]  # [P]
        self._moved: dict[Convention, tuple[np.ndarray, np.ndarray]] = {}

    def thinned(self) -> _Rounds:
        """The same with fewer points."""
        few = copy.copy(self)
        few.points, few.valid, few._moved = self.points[:, ::THINNED], self.valid[:, ::THINNED], {}
        return few

    def agreement(self, convention: Convention, factor: float) -> np.ndarray:
        """Share of the valid points of each pair [P] that meet the other frame's surface.

        Where the other frame has depth at few pixels (laser scans), of those points that can fall on one.
        """
        gap, depth = self._gaps(convention, factor)
        hits = (np.abs(gap) < TOLERANCE * depth) & self.valid
        share: np.ndarray = hits.sum(axis=1) / np.maximum(self.valid.sum(axis=1), 1) / self.reachable
        return np.minimum(share, 1.0)

    def fit(self, convention: Convention, factor: float, telling: np.ndarray) -> Fit:
        gap, _ = self._gaps(convention, factor)
        landed = np.abs(gap[telling])[np.isfinite(gap[telling]) & self.valid[telling]]
        difference = factor * float(np.median(landed)) if len(landed) >= FEWEST else math.nan
        return Fit(convention, factor, float(self.agreement(convention, factor)[telling].mean()), difference)

    def _gaps(self, convention: Convention, factor: float) -> tuple[np.ndarray, np.ndarray]:
        """Depth of the moved points minus depth there, and that depth, [P, M]; infinite where there is none.

        In units of the depth as read: a factor on all depths is one on the baseline, the other way around.
        """
        rotated, baseline = self._motion(convention)
        moved = rotated + baseline[:, None] / factor
        k = self.intrinsics[self.second]
        z = moved[..., 2]
        ahead = np.where(z > 0, z, np.inf)  # what lies behind falls on the principal point, and is left out below
        column = np.floor(moved[..., 0] / ahead * k[:, 0, 0, None] + k[:, 0, 2, None] + 0.5)
        row = np.floor(moved[..., 1] / ahead * k[:, 1, 1, None] + k[:, 1, 2, None] + 0.5)
        height, width = self.size
        inside = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        at = np.where(inside, row * width + column, 0).astype(np.int64)
        depth = self.depth[self.second[:, None], at]
        seen = inside & (depth > 0)
        return np.where(seen, z - depth, np.inf), np.where(seen, depth, 1.0)

    def _motion(self, convention: Convention) -> tuple[np.ndarray, np.ndarray]:
        """Points turned into the second camera [P, M, 3], and what has to be added to them, [P, 3]."""
        if convention not in self._moved:
            poses = convention.apply(self.poses)
            motion = np.linalg.solve(poses[self.second], poses[self.first])
            self._moved[convention] = (self.points @ motion[:, :3, :3].transpose(0, 2, 1), motion[:, :3, 3])
        return self._moved[convention]


def _points(view: View) -> tuple[np.ndarray, np.ndarray]:
    """`POINTS` points [M, 3] of a frame in its camera, evenly spread over its valid pixels; which are valid."""
    pixels = np.flatnonzero(view.depth)
    valid = np.arange(POINTS) < len(pixels)
    if not len(pixels):
        return np.zeros((POINTS, 3)), valid
    chosen = pixels[np.linspace(0, len(pixels) - 1, POINTS).astype(np.int64)] if len(pixels) > POINTS else pixels
    chosen = np.pad(chosen, (0, POINTS - len(chosen)))
    v, u = np.divmod(chosen, view.depth.shape[1])
    z, k = view.depth.reshape(-1)[chosen].astype(np.float64), view.intrinsics
    return np.stack([(u - k[0, 2]) * z / k[0, 0], (v - k[1, 2]) * z / k[1, 1], z], axis=1), valid
