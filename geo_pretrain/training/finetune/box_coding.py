"""How VoteNet writes boxes: heading bins and size templates, each with a residual; the published mean sizes.

A heading counts clockwise seen from above here, as in the released code and its weights; everywhere else in this
package it counts counter-clockwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.training.losses.voting import BoxTargets, Proposals

SIZES: dict[str, tuple[tuple[float, float, float], ...]] = {
    # m: means over the training boxes in the order of the 18 classes of ScanNet (VoteNet's scannet_means.npz)
    "scannet": (
        (0.769667, 0.811602, 0.925737), (1.876858, 1.842560, 1.193157), (0.613280, 0.614861, 0.718270),
        (1.395501, 1.512154, 0.834436), (0.979496, 1.067515, 0.632969), (0.531663, 0.595558, 1.750015),
        (0.962471, 0.724623, 1.148187), (0.832219, 1.049094, 1.687566), (0.211322, 0.420616, 0.537285),
        (1.444007, 1.897083, 0.269857), (1.029426, 1.404080, 0.875543), (1.376641, 0.655218, 1.681313),
        (0.665082, 0.711119, 1.298853), (0.419992, 0.379069, 1.751397), (0.593596, 0.591249, 0.739190),
        (0.508676, 0.506561, 0.301362), (1.151153, 1.054630, 0.497067), (0.475353, 0.492495, 0.580212),
    ),
    # m: medians, in the order bed, table, sofa, chair, toilet, desk, dresser, night_stand, bookshelf, bathtub
    "sunrgbd": (
        (2.114256, 1.620300, 0.927272), (0.791118, 1.279516, 0.718182), (0.923508, 1.867419, 0.845495),
        (0.591958, 0.552978, 0.827272), (0.699104, 0.454178, 0.756250), (0.695190, 1.346299, 0.736364),
        (0.528526, 1.002642, 1.172878), (0.500618, 0.632163, 0.683424), (0.404671, 1.071108, 1.688889),
        (0.765840, 1.398258, 0.472728),
    ),
}  # fmt: skip
TABLE_OF = {"scannet3d": "scannet", "sunrgbd3d": "sunrgbd"}  # of labelled data sets
FULL = 2 * math.pi


def heading_bins(angles: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Write clockwise angles (radians) as bins, int64, and residuals in half bins, from -1 to 1.

    Bins are centered on multiples of their width, so that angle 0 is the middle of bin 0.

    >>> heading_bins(torch.tensor([0.1, -0.3, 3.0]), 12)
    (tensor([ 0, 11,  6]), tensor([ 0.3820,  0.8541, -0.5408]))
    """
    width = FULL / bins
    shifted = (angles + width / 2).remainder(FULL)
    number = (shifted / width).floor().clamp(max=bins - 1)  # rounding may reach the next turn
    return number.long(), (shifted - number * width) / (width / 2) - 1


def encode_boxes(rows: Tensor, classes: Tensor, present: Tensor, mean_sizes: Tensor, bins: int) -> BoxTargets:
    """Encode padded boxes [B, M, 7] of `classes` int64 [B, M] (1..C) as targets; padding becomes 0 everywhere.

    With one bin boxes have no heading. The size template of a box is that of its class.
    """
    number, residual = heading_bins(-rows[..., 6], bins)
    if bins == 1:
        residual = torch.zeros_like(residual)
    kinds = (classes - 1).clamp(min=0)
    growth = rows[..., 3:6] / mean_sizes[kinds] - 1
    own = present[..., None]
    return BoxTargets(
        present,
        rows[..., :3] * own,
        number * present,
        residual * present,
        kinds * present,
        growth * own,
        kinds * present,
    )


def decode_boxes(proposals: Proposals, mean_sizes: Tensor) -> Tensor:
    """The boxes that proposals mean: [B, K, 7], headings counter-clockwise in (-pi, pi]."""
    bins = proposals.headings.shape[2]
    number = proposals.headings.argmax(2)
    residual = proposals.heading_residuals.gather(2, number[..., None])[..., 0]
    clockwise = (number + residual / 2) * (FULL / bins)
    clockwise = torch.where(clockwise > math.pi, clockwise - FULL, clockwise)
    heading = -clockwise if bins > 1 else torch.zeros_like(clockwise)
    template = proposals.sizes.argmax(2)
    growth = proposals.size_residuals.gather(2, template[..., None, None].expand(-1, -1, 1, 3))[:, :, 0]
    sizes = (mean_sizes[template] * (1 + growth)).abs()  # of a negative length, too, the corners are the same
    return torch.cat([proposals.centers, sizes, heading[..., None]], dim=2)


def typical_sizes(boxes: Iterable[tuple[np.ndarray, np.ndarray]], classes: Sequence[str], *, mean: bool) -> Tensor:
    """The median or mean size (m) of each class over boxes given as (sizes [K, 3], classes [K]): float32 [C, 3].

    A class without a box has the size of all boxes together. Without any box all sizes are 1 m.
    """
    given = list(boxes)
    sizes = np.concatenate([np.zeros((0, 3), np.float32), *(one for one, _ in given)])
    kinds = np.concatenate([np.zeros(0, np.int64), *(one for _, one in given)])
    middle = np.mean if mean else np.median
    rows = []
    for number in range(1, len(classes) + 1):
        own = sizes[kinds == number] if (kinds == number).any() else sizes
        rows.append(middle(own, axis=0) if len(own) else np.ones(3))
    return torch.from_numpy(np.array(rows, np.float32))
