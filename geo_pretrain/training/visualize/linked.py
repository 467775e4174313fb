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


def link_frames(pixels: Column, frames: Sequence[Frame], voxels: Features, drawn: np.ndarray) -> dict[str, Any]:
    """What a page needs to compare pixels with points: features of both in shared directions of 8 bits.

    Args:
        pixels: the column of the image network.
        frames: those that see the cloud; up to `FRAMES`, evenly spaced, are put beside it.
        voxels: features of the surface's points in the same space.
        drawn: the rows of the points that the page draws.
    """
    shown, extracted = [], []
    for frame in spread_evenly(frames, FRAMES):
        try:
            extracted.append(pixels.extractor.extract_frame(frame))
        except BadFrame:  # sees nothing: there are others
            continue
        shown.append(frame)
    used, rows = np.unique(voxels.index[drawn], return_inverse=True)
    embedded = embed([voxels.unit()[torch.from_numpy(used)], *(features.unit() for features in extracted)])
    return {
        "scales": encode(embedded.scales),
        "codes": encode(embedded.codes[0]),
        "rows": encode_rows(rows.reshape(-1)),
        "frames": [
            {
                "name": frame.id,
                "picture": encode_picture(frame.color),
                "size": list(frame.depth.shape[::-1]),
                "grid": [int(features.index[0, -1]) + 1, len(features.rows) // (int(features.index[0, -1]) + 1)],
                "codes": encode(codes),
            }
            for frame, features, codes in zip(shown, extracted, embedded.codes[1:], strict=True)
        ],
    }
