"""The rows of the data sets of labelled clouds in the registry."""

from __future__ import annotations

from geo_pretrain.training.data.labelled.clouds.rooms3d import Rooms3DOptions, open_rooms3d
from geo_pretrain.training.data.labelled.clouds.s3dis import S3DISOptions, open_s3dis
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
    "s3dis": DataSet(
        open_s3dis,
        ("segmentation3d", "instances3d"),
        "LicenseRef-2D-3D-S-terms",
        "non-commercial research; on a form",
        S3DISOptions,
    ),
}
