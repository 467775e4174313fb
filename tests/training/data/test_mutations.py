"""Damaged files of every kind end as our errors with the file's name: no reader shows a traceback."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.files import loaded_arrays
from geo_pretrain.training.data.labelled.clouds.folder import split_files
from geo_pretrain.training.data.labelled.clouds.listed import read_scan
from geo_pretrain.training.data.labelled.clouds.shapenetcore import listed_models
from geo_pretrain.training.data.labelled.clouds.sunrgbd3d import read_boxes
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.labelled.scannet import read_scene_list
from geo_pretrain.training.data.sources.scannet_files import read_categories
from geo_pretrain.training.data.surfaces.obj import read_obj
from tests.mutations import COCO, faults, readers

NAMES = (
    "depth", "ids", "png", "jpeg", "size", "pose", "intrinsics", "ply", "ascii ply", "cloud ply", "cloud npy",
    "cloud npz", "packed npz", "sunrgbd boxes", "obj", "kitti calibration", "kitti boxes", "scan", "labels",
    "alignment", "segments", "objects", "categories", "labelled points", "s3dis", "coco", "recipe", "sealed",
    "meters", "frame color", "poses", "camera", "open3d camera", "redwood", "tum", "transforms", "sens", "shard",
    "ade20k", "colmap images", "colmap images.bin", "colmap cameras", "colmap cameras.bin", "colmap depth",
    "classes", "label colors", "photo",
    "kitti camera", "oxts", "hdf5 depth", "arkit poses", "arkit camera", "polycam", "record3d",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_as_our_errors(tmp_path, name):
    made = readers(tmp_path)
    assert set(made) == set(NAMES)
    if name == "hdf5 depth":
        pytest.importorskip("h5py", reason="needs pip install 'geo_pretrain[datasets]'")
    found = [f"{type(error).__name__}: {error} <- {data!r}" for data, error in faults(made[name], tmp_path, 80)]
    assert not found


def test_an_archive_that_unpacks_to_far_more_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("points.npy", "w", force_zip64=True) as file:
            file.write(b"\0" * 100_000)
        archive.infolist()[0].file_size = 1 << 40  # as the directory of a bomb states
    with pytest.raises(BadFrame, match=r"x\.npz: unpacks to 1099511627776 bytes"), loaded_arrays(tmp_path / "x.npz"):
        pass


def test_headers_of_arrays_that_lie_are_bad_frames(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((12, 3)))
    for lie in (b"(12, 3 ", b"(12000", b"(-1, 3)"):
        (tmp_path / "x.npy").write_bytes(buffer.getvalue().replace(b"(12, 3)", lie))
        with pytest.raises(BadFrame, match=r"x\.npy: "), loaded_arrays(tmp_path / "x.npy"):
            pass


def test_a_face_beyond_all_numbers_is_a_bad_frame(tmp_path):
    (tmp_path / "x.obj").write_text(f"v 0 0 0\nv 1 0 0\nv 0 1 0\nf {'9' * 30} 2 3\n")
    with pytest.raises(BadFrame, match="beyond 64 bits"):
        read_obj(tmp_path / "x.obj")


def opened(source, task, split="train"):
    return lambda root: open_labelled(source, root, split, task=task)


LISTS = {  # what reads a list, and where it lies below the data set's folder
    "train_cvpr19.txt": opened("synthia4d", "segmentation3d"),
    "ImageSets/train.txt": opened("kitti_object", "detection3d"),
    "train.txt": lambda root: split_files(root, "train"),
    "all.csv": lambda root: listed_models(root, root / "all.csv", shrec=False),
    "scenes.txt": lambda root: read_scene_list(root / "scenes.txt"),
    "labels.tsv": lambda root: read_categories(root / "labels.tsv"),
    "train_test_split/shuffled_train_file_list.json": opened("shapenetpart", "parts3d"),
}
NAME = b'["02691156/' + b"x" * 300 + b'"]'  # more than file systems take
LONG = b"id,synsetId,modelId,split\n" + b"x" * 200_000 + b"\nraw_category\tnyu40id\n"  # more than csv takes in a field


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("content", [b"\xff\xfe", b"0\x000\n", NAME, LONG], ids=["bytes", "zero", "name", "long"])
def test_damaged_lists_end_as_data_errors(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "training/velodyne").mkdir(parents=True)
    (tmp_path / "training/velodyne/000000.bin").write_bytes(bytes(16))
    path.write_bytes(content)
    with pytest.raises(DataError, match=path.name):
        LISTS[name](tmp_path)


def test_names_of_images_that_no_file_can_have_are_data_errors(tmp_path):
    for name, reason in (("x" * 300, "is 300 bytes long"), ("a\0b", "has a zero byte")):
        tree = COCO | {"images": [COCO["images"][0], COCO["images"][1] | {"file_name": name}]}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations/instances_train.json").write_text(json.dumps(tree))
        with pytest.raises(DataError, match=rf"images\[1\] has a 'file_name' that {reason}"):
            open_labelled("coco", tmp_path, "train", task="detection")


@pytest.mark.parametrize("remission", [-0.5, 1e30, np.nan])
def test_remissions_that_no_scanner_gives_are_bad_frames(tmp_path, remission):
    (tmp_path / "x.bin").write_bytes(np.array([[1, 2, 3, 0.5], [1, 2, 3, remission]], "<f4").tobytes())
    with pytest.raises(BadFrame, match=r"x\.bin: remissions of 1 points are not from 0 to 255"):
        read_scan(tmp_path / "x.bin")


def test_a_heading_that_would_be_infinite_in_float32_is_a_bad_frame(tmp_path):
    with pytest.raises(BadFrame, match=r"x\.npy: a box has the heading 1e\+300"):
        read_boxes(tmp_path / "x.npy", np.array([[1, 2, 3, 1, 1, 1, 1e300, 0]]))
