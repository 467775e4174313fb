"""Write made rooms in the layouts and formats of S3DIS and ScanNet, at sizes that tests can afford."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.scannet_layout import MESH_HEADER, write_mesh

PAINT = {  # a color for each class, so that a network can learn them in a few steps
    "ceiling": (240, 240, 240), "floor": (90, 60, 40), "wall": (200, 200, 120), "beam": (10, 60, 60),
    "column": (60, 10, 60), "window": (120, 200, 250), "door": (150, 90, 20), "table": (250, 120, 10),
    "chair": (20, 40, 200), "sofa": (200, 20, 90), "bookcase": (100, 20, 10), "board": (20, 120, 20),
    "clutter": (250, 20, 250), "stairs": (60, 60, 60),
}  # fmt: skip
Object = tuple[str, np.ndarray, np.ndarray]  # class, points [N, 3] m, colors uint8 [N, 3]


def made_objects(rng: np.random.Generator, count: int = 60, edge: float = 2.0) -> list[Object]:
    """Floor, a wall, a table and two chairs of `count` points each, in a room of `edge` meters."""
    plane = rng.uniform(0, edge, (count, 3))
    boxes = {
        "floor": [plane * (1, 1, 0)],
        "wall": [plane * (0, 1, 1)],
        "table": [rng.uniform((0.8, 0.8, 0.6), (1.4, 1.2, 0.7), (count, 3))],
        "chair": [rng.uniform((low, 0.2, 0.0), (low + 0.4, 0.6, 0.5), (count, 3)) for low in (0.3, 1.3)],
    }
    return [
        (name, points, np.clip(np.array(PAINT[name]) + rng.integers(-8, 9, (count, 3)), 0, 255).astype(np.uint8))
        for name, parts in boxes.items()
        for points in parts
    ]


def lines_of(points: np.ndarray, colors: np.ndarray) -> str:
    """Lines `x y z r g b` as in Stanford3dDataset_v1.2: three decimals, whole colors."""
    rows = zip(points, colors, strict=True)
    return "".join(f"{x:.3f} {y:.3f} {z:.3f} {r} {g} {b}\n" for (x, y, z), (r, g, b) in rows)


def write_s3dis_room(root: Path, room: str, objects: Sequence[Object]) -> Path:
    """Write Area_k/ROOM, with one text file an object, the room's own, and the files that a Mac leaves behind."""
    folder = root / room
    (folder / "Annotations").mkdir(parents=True)
    counts: dict[str, int] = {}
    for name, points, colors in objects:
        counts[name] = counts.get(name, 0) + 1
        (folder / "Annotations" / f"{name}_{counts[name]}.txt").write_text(lines_of(points, colors))
    everything = "".join(lines_of(points, colors) for _, points, colors in objects)
    (folder / f"{folder.name}.txt").write_text(everything)
    (folder / "Annotations" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\0")
    (folder / "Annotations" / "Icon\r").write_bytes(b"")
    return folder


def write_s3dis(root: Path, rooms: int = 1, count: int = 60, edge: float = 2.0) -> None:
    """Write made rooms in each of the six areas."""
    for area in range(1, 7):
        for number in range(1, rooms + 1):
            rng = np.random.default_rng([area, number])
            write_s3dis_room(root, f"Area_{area}/office_{number}", made_objects(rng, count, edge))
        (root / f"Area_{area}" / f"Area_{area}_alignmentAngle.txt").write_text(
            "## Global alignment angle\noffice_1 90\n"
        )


COLUMNS = [
    "id", "raw_category", "category", "count", "nyu40id", "eigen13id", "nyuClass", "nyu40class", "eigen13class",
    "ModelNet40", "ModelNet10", "ShapeNetCore55", "synsetoffset", "wnsynsetid", "wnsynsetkey", "mpcat40",
    "mpcat40index",
]  # fmt: skip
CATEGORIES = {  # raw category -> nyu40 id
    "wall": 1, "floor": 2, "ceiling": 22, "office chair": 5, "chair": 5, "coffee table": 7, "table": 7, "lamp": 35,
    "door": 8, "fire extinguisher": 39, "whiteboard": 30,
}  # fmt: skip
OF_S3DIS = {"floor": "floor", "wall": "wall", "table": "coffee table", "chair": "office chair"}


@dataclass(frozen=True)
class Scan:
    """What a made scan holds."""

    name: str
    points: np.ndarray  # float32 [V, 3]
    colors: np.ndarray  # uint8 [V, 3]
    ids: np.ndarray  # int64 [V], nyu40
    numbers: np.ndarray  # int64 [V], objectId + 1, 0 = none
    alignment: np.ndarray  # float64 [4, 4]


def made_scan(
    name: str, seed: int, count: int = 60, edge: float = 2.0, objects: Sequence[Object] | None = None
) -> Scan:
    """A made room with a lamp more, whose objectIds skip every third number; a tenth of the vertices has no label."""
    rng = np.random.default_rng(seed)
    parts = [(OF_S3DIS[name], *rest) for name, *rest in objects or made_objects(rng, count, edge)]
    lamp = rng.uniform((0.1, 1.4, 0.0), (0.3, 1.6, 1.2), (count, 3))
    parts.append(("lamp", lamp, np.tile(np.array(PAINT["clutter"], np.uint8), (count, 1))))
    points = np.concatenate([points for _, points, _ in parts]).astype(np.float32)
    colors = np.concatenate([colors for _, _, colors in parts])
    ids = np.concatenate([np.full(len(points), CATEGORIES[name]) for name, points, _ in parts])
    numbers = np.concatenate([np.full(len(part[1]), k + k // 2 + 1) for k, part in enumerate(parts)])
    known, order = (
        rng.random(len(ids)) > 0.1,
        rng.permutation(len(ids)),
    )  # vertices of an object lie anywhere in the file
    turn = np.eye(4)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    turn[:3, 3] = 1.5, -2.0, 0.25
    ids, numbers = np.where(known, ids, 0), np.where(known, numbers, 0)
    return Scan(name, points[order], colors[order], ids[order], numbers[order], turn)


def write_scan(root: Path, scan: Scan, *, labelled: bool = True) -> Path:
    """Write scans/sceneXXXX_XX (a test scan without `labelled`): mesh, labels, segments, objects and SCAN.txt."""
    folder = root / scan.name
    folder.mkdir(parents=True)
    faces = np.arange(len(scan.points) // 3 * 3).reshape(-1, 3)
    mesh = folder / f"{scan.name}_vh_clean_2.ply"
    write_mesh(mesh, scan.points, scan.colors, faces)
    facts = ["colorHeight = 968", "colorWidth = 1296", "numDepthFrames = 100", f"sceneType = {'Office'}"]
    if labelled:
        facts.insert(0, "axisAlignment = " + " ".join(f"{value:.6f}" for value in scan.alignment.ravel()) + " ")
        write_labelled_mesh(folder / f"{scan.name}_vh_clean_2.labels.ply", scan.points, scan.colors, faces, scan.ids)
        write_scan_objects(folder, scan)
    (folder / f"{scan.name}.txt").write_text("".join(f"{line}\n" for line in facts))
    return folder


def write_labelled_mesh(path: Path, points, colors, faces, ids) -> None:
    """A mesh as *_vh_clean_2.labels.ply: its vertices have a ushort more."""
    vertex = np.zeros(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3), ("alpha", "u1"), ("label", "<u2")])
    vertex["xyz"], vertex["rgb"], vertex["alpha"], vertex["label"] = points, colors, 255, ids
    face = np.zeros(len(faces), [("count", "u1"), ("rows", "<i4", 3)])
    face["count"], face["rows"] = 3, faces
    header = MESH_HEADER.replace("uchar alpha\n", "uchar alpha\nproperty ushort label\n")
    text = header.format(vertices=len(vertex), faces=len(face)).encode()
    path.write_bytes(text + vertex.tobytes() + face.tobytes())


def write_scan_objects(folder: Path, scan: Scan) -> None:
    """Segments of a few vertices with ids far apart, and the objects made of them."""
    name = scan.name
    inside = np.arange(len(scan.points)) // 7
    segments = (inside + 1000 * scan.numbers) * 3  # no segment is in two objects
    groups = []
    for place, number in enumerate(np.unique(scan.numbers[scan.numbers > 0])):
        rows = scan.numbers == number
        category = next(raw for raw, id in CATEGORIES.items() if id == scan.ids[rows][0])
        parts = np.unique(segments[rows]).tolist()
        groups.append({"id": place, "objectId": int(number) - 1, "segments": parts, "label": category})
    tree = {"params": {"kThresh": "0.0001", "segMinVerts": "20"}, "sceneId": name, "segIndices": segments.tolist()}
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(tree))
    tree = {"sceneId": f"scannet.{name}", "appId": "Aggregator.v2", "segGroups": groups,
            "segmentsFile": f"scannet.{name}_vh_clean_2.0.010000.segs.json"}  # fmt: skip
    (folder / f"{name}.aggregation.json").write_text(json.dumps(tree))


def write_scannet_release(root: Path, **sizes) -> dict[str, Scan]:
    """Write three training scans, one of val, one of test, the lists of train and val, and the table of categories."""
    scans = {}
    for number, split in enumerate(("train", "train", "train", "val", "test")):
        scan = made_scan(f"scene{number:04d}_00", number, **sizes)
        scans[scan.name] = scan
        write_scan(root / ("scans_test" if split == "test" else "scans"), scan, labelled=split != "test")
    names = list(scans)
    (root / "scannetv2_train.txt").write_text("".join(f"{name}\n" for name in names[:3]))
    (root / "scannetv2_val.txt").write_text(f"{names[3]}\n")
    write_categories(root / "scannetv2-labels.combined.tsv")
    return scans


def write_categories(path: Path) -> None:
    """The table of categories: 17 columns, ends of lines as in VoteNet's copy."""
    rows = ["\t".join(COLUMNS)]
    for number, (raw, id) in enumerate(CATEGORIES.items(), 1):
        known = {"id": str(number), "raw_category": raw, "category": raw, "nyu40id": str(id), "count": "7"}
        rows.append("\t".join(known.get(column, "") for column in COLUMNS))
    path.write_bytes("".join(f"{row}\r\n" for row in rows).encode())
