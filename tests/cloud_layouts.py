"""Writers of labelled clouds in the layouts in which their data sets are published, byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

FIGURE = "shapenetcore_partanno_segmentation_benchmark_v0_normal"


def write_semantickitti(root: Path, sequence: str, number: int, scan, classes=None, instances=None) -> None:
    """A scan float32 [N, 4] of a sequence, and its labels unless `classes` is None."""
    folder = root / "sequences" / sequence
    write(folder / "velodyne" / f"{number:06d}.bin", b"".join(struct.pack("<4f", *row) for row in scan))
    if classes is not None:
        words = [(int(i) << 16) | int(c) for c, i in zip(classes, instances, strict=True)]
        write(folder / "labels" / f"{number:06d}.label", struct.pack(f"<{len(words)}I", *words))


def write_synthia4d(root: Path, sequence: str, number: int, points, colors, labels) -> str:
    """A frame with points in centimeters, y up; returns its line in a list."""
    name = f"{sequence}/point_clouds/{number:06d}.ply"
    fields = ["float x", "float y", "float z", "uchar r", "uchar g", "uchar b", "uchar l"]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    head += [f"property {field}" for field in fields]
    rows = zip(points, colors, labels, strict=True)
    body = b"".join(struct.pack("<3f4B", *p, *map(int, c), int(label)) for p, c, label in rows)
    write(root / name, ("\n".join([*head, "end_header"]) + "\n").encode() + body)
    return f"{name} {name.removesuffix('.ply')}_label.ply"


def write_shapenetpart(root: Path, synset: str, model: str, points, parts) -> str:
    """An object of ShapeNetPart; returns its entry in a list."""
    rows = [" ".join(f"{v:.6f}" for v in (*p, 0, 1, 0, part)) for p, part in zip(points, parts, strict=True)]
    write(root / synset / f"{model}.txt", ("\n".join(rows) + "\n").encode())
    return f"shape_data/{synset}/{model}"


def write_shapenetpart_list(root: Path, split: str, entries) -> None:
    path = root / "train_test_split" / f"shuffled_{split}_file_list.json"
    write(path, json.dumps(list(entries)).encode())


def write_obj(path: Path, vertices, faces) -> None:
    """A mesh; faces count vertices from 1, each with a texture coordinate and a normal beside it."""
    lines = ["# a mesh", "mtllib model.mtl", "o object"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices]
    lines += ["vt 0.5 0.5", "vn 0 0 1", "usemtl wood"]
    lines += ["f " + " ".join(f"{corner}/1/1" for corner in face) for face in faces]
    write(path, ("\n".join(lines) + "\n").encode())


def write_kitti_object(root: Path, number: int, scan, labels, calibration, folder: str = "training") -> None:
    """A frame without its image: a scan [N, 4], lines of labels, matrices by name."""
    name = f"{number:06d}"
    write(root / folder / "velodyne" / f"{name}.bin", np.asarray(scan, "<f4").tobytes())
    rows = [f"{key}: " + " ".join(f"{v:.12e}" for v in np.ravel(m)) for key, m in calibration.items()]
    write(root / folder / "calib" / f"{name}.txt", ("\n".join(rows) + "\n\n").encode())
    if labels is not None:
        write(root / folder / "label_2" / f"{name}.txt", ("\n".join(labels) + "\n").encode())


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
