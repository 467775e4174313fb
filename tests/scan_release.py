"""Write rooms as a tree of ScanNet's release: scans of .sens, mesh, segments, objects and facts, lists and categories.

    python -m tests.scan_release FOLDER [--scenes 20] [--frames 12] [--size 120 160]

Formats are those of ScanNet's README and SensReader and written byte by byte; nothing here calls a reader.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from geo_pretrain.rooms import CLASSES, RoomGenerator, RoomsConfig
from geo_pretrain.training.data.frame import Frame
from tests.indoor_layouts import COLUMNS, write_labelled_mesh
from tests.recording_layouts import sens_bytes
from tests.scannet_layout import write_mesh

EDGE = 0.07  # m between vertices of a wall, so that each pixel is within 5 cm of one
CELL = 0.8  # m, the size of a segment of a wall
SCALE = 2  # the color camera's pixels for each of the depth camera's (ScanNet: 1296x968 over 640x480)
NYU40 = {"wall": 1, "floor": 2, "cabinet": 3, "bed": 4, "chair": 5, "sofa": 6, "table": 7, "door": 8, "window": 9,
         "shelf": 15, "picture": 11, "desk": 14, "curtain": 16, "pillow": 18, "rug": 20, "ceiling": 22, "book": 23,
         "tv": 25, "box": 29, "lamp": 35}  # fmt: skip
OTHER = 40  # other prop


def write_release(root: Path, *, scenes: int, frames: int, size: tuple[int, int] = (72, 96), val: int = 1) -> list[str]:
    """Write `scenes` scans of `frames` frames, the last `val` of them for validation; returns their names."""
    height, width = size
    generator = RoomGenerator(RoomsConfig(scenes=scenes, frames=frames, height=height, width=width, renderer="auto"))
    names = []
    for number, room in enumerate(generator.names()):
        name = f"scene{number:04d}_00"
        write_scan(root / "scans" / name, generator, room)
        names.append(name)
    for split, part in (("train", names[: scenes - val]), ("val", names[scenes - val :])):
        (root / f"scannetv2_{split}.txt").write_text("".join(f"{name}\n" for name in part))
    write_categories(root / "scannetv2-labels.combined.tsv")
    return names


def write_scan(folder: Path, generator: RoomGenerator, room: str) -> None:
    """One scan: all its files carry the folder's name."""
    folder.mkdir(parents=True)
    name, arrays, mesh = folder.name, generator.render(room), generator.mesh(room, EDGE)
    views = zip(arrays["color"], arrays["depth"], arrays["poses"], strict=True)
    frames = [Frame("", "", color, depth, arrays["intrinsics"], pose) for color, depth, pose in views]
    (folder / f"{name}.sens").write_bytes(sens_bytes(frames, scale=SCALE, imu=3))
    write_mesh(folder / f"{name}_vh_clean_2.ply", mesh.vertices, mesh.colors, mesh.faces)
    ids = np.array([NYU40.get(kind, OTHER) for kind in CLASSES])[mesh.semantic]
    labelled = folder / f"{name}_vh_clean_2.labels.ply"
    write_labelled_mesh(labelled, mesh.vertices, mesh.colors, mesh.faces, ids)
    segments = segments_of(mesh)
    tree = {"params": {"kThresh": "0.0001", "segMinVerts": "20", "minPoints": "750", "maxPoints": "30000"},
            "sceneId": name, "segIndices": segments.tolist()}  # fmt: skip
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(tree, separators=(",", ":")))
    groups = []
    for number, instance in enumerate(np.unique(mesh.instance[mesh.instance > 0])):
        rows = mesh.instance == instance
        label = CLASSES[np.bincount(mesh.semantic[rows]).argmax()]
        parts = np.unique(segments[rows]).tolist()
        groups.append({"id": number, "objectId": number, "segments": parts, "label": label})
    tree = {"sceneId": f"scannet.{name}", "appId": "Aggregator.v2", "segGroups": groups,
            "segmentsFile": f"scannet.{name}_vh_clean_2.0.010000.segs.json"}  # fmt: skip
    (folder / f"{name}.aggregation.json").write_text(json.dumps(tree))
    (height, width), matrix = frames[0].depth.shape, frames[0].intrinsics
    facts = {"axisAlignment": " ".join(f"{value:.6f}" for value in np.eye(4).ravel()) + " ",
             "colorHeight": height * SCALE, "colorWidth": width * SCALE, "depthHeight": height, "depthWidth": width,
             "fx_depth": f"{matrix[0, 0]:.6f}", "fy_depth": f"{matrix[1, 1]:.6f}", "mx_depth": f"{matrix[0, 2]:.6f}",
             "my_depth": f"{matrix[1, 2]:.6f}", "numDepthFrames": 25 * (len(frames) - 1) + 1,
             "sceneType": "Apartment"}  # fmt: skip
    (folder / f"{name}.txt").write_text("".join(f"{key} = {value}\n" for key, value in facts.items()))


def segments_of(mesh) -> np.ndarray:
    """A segment of each vertex, int64 [V]: what faces one way, within a cell, of one object; named by its first vertex.

    Surfaces of round things that face several ways fall apart, as they do in the release.
    """
    axis = np.abs(mesh.normals).argmax(1)
    side = np.take_along_axis(mesh.normals, axis[:, None], 1)[:, 0] > 0
    cells = np.floor(mesh.vertices / CELL).astype(np.int64)
    keys = np.column_stack([mesh.instance, mesh.semantic, axis, side, cells])
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def write_categories(path: Path) -> None:
    """scannetv2-labels.combined.tsv: 17 columns, one row a raw category."""
    rows = ["\t".join(COLUMNS)]
    for number, kind in enumerate(CLASSES[1:], 1):
        known = {"id": str(number), "raw_category": kind, "category": kind, "count": "9"}
        known["nyu40id"] = str(NYU40.get(kind, OTHER))
        rows.append("\t".join(known.get(column, "") for column in COLUMNS))
    path.write_text("".join(f"{row}\n" for row in rows))


def main() -> None:
    """Write a tree for trials by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(120, 160), metavar=("HEIGHT", "WIDTH"))
    given = parser.parse_args()
    print(*write_release(given.folder, scenes=given.scenes, frames=given.frames, size=tuple(given.size), val=2))


if __name__ == "__main__":
    main()
