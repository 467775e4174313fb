"""The rows of the data sets of labelled clouds in the registry."""

from __future__ import annotations

from geo_pretrain.training.data.labelled.clouds.rooms3d import Rooms3DOptions, open_rooms3d
from geo_pretrain.training.data.labelled.dataset import DataSet

CLOUD_SETS: dict[str, DataSet] = {
    "rooms3d": DataSet(
        None,
        ("segmentation3d", "instances3d", "detection3d"),
        "MIT",
        "rendered by this package",
        Rooms3DOptions,
        embedded=open_rooms3d,
    ),
}
