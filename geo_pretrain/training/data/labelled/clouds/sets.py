"""The rows of the data sets of labelled clouds in the registry."""

from __future__ import annotations

from geo_pretrain.training.data.labelled.clouds.folder import FolderOptions, open_clouds
from geo_pretrain.training.data.labelled.clouds.kitti_object import KITTIObjectOptions, open_kitti_object
from geo_pretrain.training.data.labelled.clouds.rooms3d import Rooms3DOptions, open_rooms3d
from geo_pretrain.training.data.labelled.clouds.s3dis import S3DISOptions, open_s3dis
from geo_pretrain.training.data.labelled.clouds.scannet3d import ScanNet3DOptions, open_scannet3d
from geo_pretrain.training.data.labelled.clouds.semantickitti import SemanticKITTIOptions, open_semantickitti
from geo_pretrain.training.data.labelled.clouds.shapenetcore import ShapeNetCoreOptions, open_shapenetcore
from geo_pretrain.training.data.labelled.clouds.shapenetpart import ShapeNetPartOptions, open_shapenetpart
from geo_pretrain.training.data.labelled.clouds.sunrgbd3d import open_sunrgbd3d
from geo_pretrain.training.data.labelled.clouds.synthia4d import Synthia4DOptions, open_synthia4d
from geo_pretrain.training.data.labelled.dataset import DataSet, plain

WITH_TEST = ("train", "val", "test")
SHAPENET = ("LicenseRef-ShapeNet-terms", "non-commercial research and education; on registration")
CLOUD_SETS: dict[str, DataSet] = {
    "clouds": DataSet(
        open_clouds,
        ("segmentation3d", "instances3d", "detection3d"),
        "LicenseRef-data-owner",
        "clouds given by the caller: as their owner says",
        FolderOptions,
        splits=(),
    ),
    "kitti_object": DataSet(
        open_kitti_object,
        ("detection3d",),
        "CC-BY-NC-SA-3.0",
        "non-commercial, share alike",
        KITTIObjectOptions,
        WITH_TEST,
    ),
    "rooms3d": DataSet(
        None,
        ("segmentation3d", "instances3d", "detection3d", "classification3d", "parts3d"),
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
    "scannet3d": DataSet(
        open_scannet3d,
        ("segmentation3d", "instances3d", "detection3d"),
        "LicenseRef-ScanNet-ToU",
        "non-commercial research and education; on a signed agreement",
        ScanNet3DOptions,
        WITH_TEST,
    ),
    "semantickitti": DataSet(
        open_semantickitti,
        ("segmentation3d",),
        "CC-BY-NC-SA-3.0",
        "non-commercial, share alike: labels on KITTI's scans",
        SemanticKITTIOptions,
        WITH_TEST,
    ),
    "shapenetcore": DataSet(open_shapenetcore, ("classification3d",), *SHAPENET, ShapeNetCoreOptions, WITH_TEST),
    "shapenetpart": DataSet(open_shapenetpart, ("parts3d",), *SHAPENET, ShapeNetPartOptions),
    "sunrgbd3d": DataSet(
        plain(open_sunrgbd3d),
        ("detection3d",),
        "LicenseRef-unstated",
        "published for research without a license; holds images of NYUv2, B3DO, SUN3D",
    ),
    "synthia4d": DataSet(
        open_synthia4d,
        ("segmentation3d",),
        "CC-BY-NC-SA-3.0",
        "non-commercial, share alike",
        Synthia4DOptions,
        WITH_TEST,
    ),
}
