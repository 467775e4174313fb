"""Write made rooms in S3DIS' own text files: the true layout and format, at sizes that tests can afford."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
