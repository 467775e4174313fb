"""Small valid files of every reader of data, and damage to them: nothing but our errors may come out of a reader."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.files import read_sealed
from geo_pretrain.training.config import Draft
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.labelled.clouds import kitti_object, listed, semantickitti, sunrgbd3d
from geo_pretrain.training.data.labelled.clouds.files import read_cloud
from geo_pretrain.training.data.labelled.clouds.limited import read_point_list
from geo_pretrain.training.data.labelled.clouds.s3dis_text import parse_lines
from geo_pretrain.training.data.labelled.own_classes import read_image_classes
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.sources import (
    arkitscenes,
    colmap_model,
    kitti,
    record3d,
    redwood,
    scannet_files,
    sens,
    shards,
)
from geo_pretrain.training.data.sources.conventions import read_camera
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.obj import read_obj
from geo_pretrain.training.data.surfaces.ply import read_ply, write_ply
from geo_pretrain.training.recipe import DataSpec
from tests.dataset_layouts import hdf5, write_record3d
from tests.labelled_layouts import write_ade20k_image
from tests.recording_layouts import write_sens, write_tars

NUMBERS = [b"0", b"-1", b"1e400", b"nan", b"inf", b"-inf", b"99999999999999999999", b"4294967296", b"1e300", b"x", b""]
POSE = b"1 0 0 0.5 0 1 0 0.2 0 0 1 0.1 0 0 0 1\n"
CAMERA = "P2: 700 0 600 0 0 700 180 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
CAR = "Car 0.00 0 1.5 10 10 20 20 1.50 1.60 4.00 2.00 1.70 20.00 0.3\n"
SEGMENTS = {"segIndices": [1, 2, 3] * 4}
GROUPS = {"segGroups": [{"objectId": 0, "label": "chair", "segments": [1, 2]}]}
VERTEX = {axis: np.arange(12, dtype=np.float32) for axis in "xyz"} | {"label": np.ones(12, np.int32)}
PLY = {"vertex": VERTEX, "face": {"vertex_indices": np.arange(12, dtype=np.int32).reshape(4, 3)}}


class Reader(NamedTuple):
    """A reader, the ending of its files and a valid one; text: words may also be replaced by numbers."""

    read: Callable[[Path], object]
    suffix: str
    valid: bytes
    text: bool = True


def image(array: np.ndarray, format: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


def saved(save: Callable[..., object], *given: object, **named: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *given, **named)
    return buffer.getvalue()


def ascii_ply() -> bytes:
    fields = "".join(f"property double {axis}\n" for axis in "xyz")
    head = f"ply\nformat ascii 1.0\nelement vertex 2\n{fields}element face 1\nproperty list uchar int vertex_indices\n"
    return f"{head}end_header\n0 1 2\n3 4 5\n3 0 1 1\n".encode()


def binary_ply(folder: Path) -> bytes:
    write_ply(folder / "valid.ply", PLY)
    return (folder / "valid.ply").read_bytes()


def ade20k(path: Path) -> object:
    """The challenge's folder with this annotation."""
    write_ade20k_image(path.parent, "val", 1, np.zeros((12, 16, 3), np.uint8), np.zeros((12, 16)))
    named = path.parent / "ADEChallengeData2016" / "annotations" / "validation" / "ADE_val_00000001.png"
    named.write_bytes(path.read_bytes())
    return open_labelled("ade20k", path.parent, "val", task="segmentation").load("ADE_val_00000001")


def boxes_of_votenet(path: Path) -> object:
    with files.loaded_arrays(path, "bbox") as rows:
        found = np.asarray(rows, np.float64)
    return sunrgbd3d.read_boxes(path, found)


COCO = {
    "images": [{"id": k, "file_name": f"{k:012d}.jpg", "height": 12, "width": 16} for k in (1, 2)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 5, 5], "area": 25, "iscrowd": 0,
         "segmentation": [[2, 3, 7, 3, 7, 8, 2, 8]]},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [2, 3, 5, 5], "area": 20, "iscrowd": 1,
         "segmentation": {"size": [12, 16], "counts": [100, 20, 72]}},
    ],
}  # fmt: skip


def coco(path: Path) -> object:
    root = path.parent / "coco"
    if not root.exists():
        (root / "train").mkdir(parents=True)
        (root / "annotations").mkdir()
        for entry in COCO["images"]:
            (root / "train" / entry["file_name"]).write_bytes(image(np.zeros((12, 16, 3), np.uint8), "jpeg"))
    (root / "annotations" / "instances_train.json").write_bytes(path.read_bytes())
    source = open_labelled("coco", root, "train", task="detection")
    return [source.load(id) for id in source.ids()]


def calibrated(path: Path) -> object:
    (path.parent / "calibration").write_text(CAMERA)
    return kitti_object.read_boxes(path, kitti_object.read_calibration(path.parent / "calibration"))


OPEN3D = {"width": 16, "height": 12, "intrinsic_matrix": [20.0, 0, 0, 0, 20, 0, 7.5, 5.5, 1]}
NERF = {
    "fl_x": 20, "fl_y": 20, "cx": 8, "cy": 6, "w": 16, "h": 12, "k1": 0,
    "frames": [{"file_path": "color/0.png", "depth_file_path": "depth/0.png", "transform_matrix": np.eye(4).tolist()}],
}  # fmt: skip


def recording_of(layout: str, listing: str) -> Callable[[Path], object]:
    """A reader of a file that lists the frames of a recording: opens the recording and loads every frame."""

    def read(path: Path) -> object:
        root = path.parent / layout
        if not root.exists():
            for part, pixels in (
                ("color", np.zeros((12, 16, 3), np.uint8)),
                ("depth", np.full((12, 16), 9, np.uint16)),
            ):
                (root / part).mkdir(parents=True)
                for number in range(2):
                    (root / part / f"{number}.png").write_bytes(image(pixels))
            (root / "intrinsics.txt").write_text("20 20 7.5 5.5")
            for name, part in (("rgb", "color"), ("depth", "depth")):
                (root / f"{name}.txt").write_text(f"0.01 {part}/0.png\n0.02 {part}/1.png\n")
        (root / listing).write_bytes(path.read_bytes())
        source = open_source(DataSpec(source=layout, path=str(root)))
        for scene in source.scenes():
            source.load(scene, source.frame_ids(scene)[-1])
        return source

    return read


plain_folder = recording_of("folder", "poses.txt")


def scan_bytes(folder: Path) -> bytes:
    frame = Frame("", "", np.zeros((12, 16, 3), np.uint8), np.ones((12, 16), np.float32), np.eye(3), np.eye(4))
    return (write_sens(folder / "scan", [frame] * 2, step=1) / "scene0000_00" / "scene0000_00.sens").read_bytes()


def whole_shard(path: Path) -> object:
    source = shards.Shards(path.parent, shards.ShardsOptions())
    source.content()
    return [source.load(scene, frame) for scene in source.scenes() for frame in source.frame_ids(scene)]


def shard_bytes(folder: Path) -> bytes:
    frame = Frame(
        "", "", np.zeros((12, 16, 3), np.uint8), np.ones((12, 16), np.float32), np.diag([20.0, 20, 1]), np.eye(4)
    )
    data = (write_tars(folder / "tars", [frame] * 2) / "desk-000000.tar").read_bytes()
    shutil.rmtree(folder / "tars")
    return data


def whole_scan(path: Path) -> object:
    header = sens.read_header(path)
    scan = sens.SensFile(path, path.parent / "index")
    return header, [(scan.pose(k), scan.color(k), scan.stored_depth(k)) for k in range(min(len(scan), 3))]


CAMERAS_BIN = struct.pack("<QiiQQ4d", 1, 1, 1, 16, 12, 20, 20, 8, 6)
IMAGES_BIN = struct.pack("<Q", 2) + 2 * struct.pack("<i7di6sQddq", 1, 1, 0, 0, 0, 1, 2, 3, 1, b"a.jpg", 1, 1, 2, 7)


def whole_model(path: Path) -> object:
    return [colmap_model.read_observations(path, image) for image in colmap_model.read_images(path)]


POLYCAM = {"width": 16, "height": 12, "fx": 20, "fy": 20, "cx": 8, "cy": 6, "blur_score": 9} | {
    f"t_{row}{column}": float(row == column) for row in range(3) for column in range(4)
}


def polycam_camera(path: Path) -> object:
    root = path.parent / "polycam"
    if not root.exists():
        for part, pixels in (("images", np.zeros((12, 16, 3), np.uint8)), ("depth", np.full((12, 16), 9, np.uint16))):
            (root / "keyframes" / part).mkdir(parents=True)
            (root / "keyframes" / part / "1.png").write_bytes(image(pixels))
        (root / "keyframes" / "cameras").mkdir()
    (root / "keyframes" / "cameras" / "1.json").write_bytes(path.read_bytes())
    return open_source(DataSpec(source="polycam", path=str(root))).load("polycam", "1")


def archive_bytes(folder: Path) -> bytes:
    frame = Frame("", "", np.zeros((12, 16, 3), np.uint8), np.ones((12, 16), np.float32), np.eye(3) * 20, np.eye(4))
    return (write_record3d(folder / "phone", [frame], packed=False) / "room.r3d").read_bytes()


def whole_archive(path: Path) -> object:
    tree = record3d.read_metadata(path)
    depth = record3d.unpacked_depth(path, record3d.member(path, "0.depth"), (12, 16))
    return tree, depth, files.read_frame_color(path, record3d.member(path, "0.jpg"))


def readers(folder: Path) -> dict[str, Reader]:
    """All readers by name; `folder` is for files that are made on the way."""
    rng = np.random.default_rng(0)
    gray = rng.integers(400, 5000, (12, 16)).astype(np.uint16)
    color = rng.integers(0, 255, (12, 16, 3), np.uint8)
    points = rng.uniform(-1, 1, (12, 3))
    row = np.array([[1.0, 2, 0, 0.3, 0.4, 0.5, 0.1, 3]])
    sealed = json.dumps({"a": [1, {"b": None}]}).encode()
    return {
        "depth": Reader(files.read_depth, ".png", image(gray), text=False),
        "ids": Reader(lambda path: files.read_ids(path, bits=(8, 16)), ".png", image(gray), text=False),
        "ade20k": Reader(ade20k, ".png", image((gray % 151).astype(np.uint8)), text=False),
        "png": Reader(files.read_color, ".png", image(color), text=False),
        "jpeg": Reader(files.read_color, ".jpg", image(color, "jpeg"), text=False),
        "size": Reader(files.image_size, ".png", image(gray), text=False),
        "pose": Reader(files.read_pose, ".txt", POSE),
        "meters": Reader(lambda path: files.read_depth(path, floats=True), ".npy", saved(np.save, gray / 1e3), False),
        "frame color": Reader(files.read_frame_color, ".jpg", image(color, "jpeg"), text=False),
        "poses": Reader(plain_folder, ".txt", POSE * 2),
        "camera": Reader(read_camera, ".txt", b"585 585 320 240\n"),
        "open3d camera": Reader(read_camera, ".json", json.dumps(OPEN3D).encode()),
        "redwood": Reader(redwood.read_log, ".log", b"0 0 1\n1 0 0 0.5\n0 1 0 0.2\n0 0 1 0\n0 0 0 1\n" ),
        "tum": Reader(recording_of("tum", "groundtruth.txt"), ".txt", b"# t\n0.01 1 2 3 0 0 0 1\n0.02 1 2 3 0 0 0 1\n"),
        "transforms": Reader(recording_of("transforms", "transforms.json"), ".json", json.dumps(NERF).encode()),
        "colmap images": Reader(whole_model, ".txt", b"1 1 0 0 0 1 2 3 1 a.jpg\n1 2 3\n2 1 0 0 0 1 2 3 1 b.jpg\n\n"),
        "colmap images.bin": Reader(whole_model, ".bin", IMAGES_BIN, text=False),
        "colmap cameras": Reader(colmap_model.read_cameras, ".txt", b"1 PINHOLE 16 12 20 20 8 6\n2 RADIAL 9 9 9 4 4\n"),
        "colmap cameras.bin": Reader(colmap_model.read_cameras, ".bin", CAMERAS_BIN, text=False),
        "colmap depth": Reader(files.read_raw_depth, ".bin", b"4&3&1&" + bytes(48), text=False),
        "kitti camera": Reader(lambda path: kitti.read_camera_2(path, "P2:"), ".txt", CAMERA.encode()),
        "oxts": Reader(lambda path: kitti.read_oxts({"0": path}), ".txt", b"49.0 8.4 112 0.1 0.2 0.3" + b" 1" * 24),
        "hdf5 depth": Reader(files.read_raw_depth, ".h5", hdf5(np.ones((12, 16))), text=False),
        "arkit poses": Reader(arkitscenes.read_trajectory, ".traj", b"1.5 0.1 0.2 0.3 1 2 3\n1.6 0 0 0 1 2 3\n"),
        "arkit camera": Reader(arkitscenes.read_pincam, ".pincam", b"256 192 211.9 211.9 127.9 95.9"),
        "polycam": Reader(polycam_camera, ".json", json.dumps(POLYCAM).encode()),
        "record3d": Reader(whole_archive, ".r3d", archive_bytes(folder), text=False),
        "sens": Reader(whole_scan, ".sens", scan_bytes(folder), text=False),
        "shard": Reader(whole_shard, ".tar", shard_bytes(folder), text=False),
        "intrinsics": Reader(files.read_intrinsics, ".txt", b"585 0 320 0 585 240 0 0 1\n"),
        "ply": Reader(read_ply, ".ply", binary_ply(folder), text=False),
        "ascii ply": Reader(read_ply, ".ply", ascii_ply()),
        "cloud ply": Reader(read_cloud, ".ply", binary_ply(folder), text=False),
        "cloud npy": Reader(read_cloud, ".npy", saved(np.save, points), text=False),
        "cloud npz": Reader(read_cloud, ".npz", saved(np.savez, points=points), text=False),
        "packed npz": Reader(read_cloud, ".npz", saved(np.savez_compressed, points=points), text=False),
        "sunrgbd boxes": Reader(boxes_of_votenet, ".npy", saved(np.save, row), text=False),
        "obj": Reader(read_obj, ".obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"),
        "kitti calibration": Reader(kitti_object.read_calibration, ".txt", CAMERA.encode()),
        "kitti boxes": Reader(calibrated, ".txt", CAR.encode() * 2),
        "scan": Reader(listed.read_scan, ".bin", bytes(64), text=False),
        "labels": Reader(lambda path: semantickitti.read_labels(path, 4), ".label", bytes(16), text=False),
        "alignment": Reader(scannet_files.read_alignment, ".txt", b"axisAlignment = " + POSE),
        "segments": Reader(lambda path: scannet_files.read_segments(path, 12), ".json", json.dumps(SEGMENTS).encode()),
        "objects": Reader(scannet_files.read_objects, ".json", json.dumps(GROUPS).encode()),
        "categories": Reader(scannet_files.read_categories, ".tsv", b"raw_category\tnyu40id\nchair\t5\nbed\t4\n"),
        "labelled points": Reader(read_point_list, ".json", b'{"scene0000_00": [1, 2, 3]}'),
        "s3dis": Reader(lambda path: parse_lines(path.read_bytes()), ".txt", b"0.1 0.2 0.3 10 20 30\n" * 3),
        "classes": Reader(read_image_classes, ".txt", b"0 wall\n1 chair\n7 table\n"),
        "label colors": Reader(files.read_label_colors, ".png", image(np.eye(12, dtype=np.uint8)), text=False),
        "photo": Reader(files.read_photo, ".jpg", image(np.zeros((12, 16, 3), np.uint8), "jpeg"), text=False),
        "coco": Reader(coco, ".json", json.dumps(COCO).encode()),
        "recipe": Reader(Draft.read, ".yaml", b"a: &a {x: 1, y: [2, 3]}\nb: *a\nc: 2020-01-01\n"),
        "sealed": Reader(read_sealed, ".json", sealed),
    }  # fmt: skip


def damaged(valid: bytes, rng: random.Random, *, text: bool) -> bytes:
    """One to five flips, cuts, insertions, repetitions or numbers that lie; of texts, often a word replaced."""
    if text and rng.random() < 0.5:
        words = valid.split(b" ")
        words[rng.randrange(len(words))] = rng.choice(NUMBERS)
        return b" ".join(words)
    data = bytearray(valid)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if not data:
            break
        at, kind = rng.randrange(len(data)), rng.randrange(7)
        if kind <= 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.choice([1, 40, len(data)])]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 40))
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        elif kind == 5:
            number = rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 65535])
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
        else:
            data[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38]))
    return bytes(data)


def faults(reader: Reader, folder: Path, count: int, seed: int = 0) -> Iterator[tuple[bytes, Exception]]:
    """Damaged files that made a reader raise anything but our errors, and what it raised."""
    rng, path = random.Random(seed), folder / f"x{reader.suffix}"
    path.write_bytes(reader.valid)
    reader.read(path)
    for _ in range(count):
        data = damaged(reader.valid, rng, text=reader.text)
        path.write_bytes(data)
        try:
            reader.read(path)
        except GeoPretrainError as error:
            if str(folder) not in str(error):
                yield data, error
        except Exception as error:
            yield data, error
