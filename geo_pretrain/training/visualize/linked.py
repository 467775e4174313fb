"""Images linked with a cloud, for networks that share a feature space: what a page compares at a pixel or point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.mining import spread_evenly
from geo_pretrain.training.evaluation.features import Features
from geo_pretrain.training.visualize.columns import Column
from geo_pretrain.training.visualize.embedded import embed, encode, encode_picture, encode_rows

FRAMES = 6  # of a scene, beside its cloud


def link_frames(
    columns: Sequence[Column], frames: Sequence[Frame], features: Sequence[Features], drawn: np.ndarray
) -> dict[str, Any] | None:
    """What a page needs to compare pixels with points: features of both in shared directions of 8 bits.

    Args:
        columns: of which the first two are the pixels and the voxels of a pair; None is returned for others.
        frames: those that see the cloud; up to `FRAMES`, evenly spaced, are put beside it.
        features: of the surface's points, by column.
        drawn: the rows of the points that the page draws.
    """
    if len(columns) < 2 or columns[0].space != columns[1].space:
        return None
    pixels, voxels = columns[0], features[1]
    shown, extracted = [], []
    for frame in spread_evenly(frames, FRAMES):
        try:
            extracted.append(pixels.extractor.extract_frame(frame))
        except BadFrame:  # sees nothing: there are others
            continue
        shown.append(frame)
    used, rows = np.unique(voxels.index[drawn], return_inverse=True)
    embedded = embed([voxels.unit()[torch.from_numpy(used)], *(one.unit() for one in extracted)])
    return {
        "scales": encode(embedded.scales),
        "codes": encode(embedded.codes[0]),
        "rows": encode_rows(rows.reshape(-1)),
        "frames": [
            {
                "name": frame.id,
                "picture": encode_picture(frame.color),
                "size": list(frame.depth.shape[::-1]),
                "grid": [int(one.index[0, -1]) + 1, len(one.rows) // (int(one.index[0, -1]) + 1)],
                "codes": encode(codes),
            }
            for frame, one, codes in zip(shown, extracted, embedded.codes[1:], strict=True)
        ],
    }
