"""Write scenes of any source as exported ScanNet scans: the true folder layout, at sizes that tests can afford."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.frame import Frame, Source
from geo_pretrain.training.data.sources.rooms import Rooms

MARGIN = 8  # pixels cut away, from another side in every scan: so each has its own principal point
COLOR_SCALE = 4  # the color camera's resolution over the depth camera's (ScanNet: 1296x968 over 640x480)
STEP = 25  # frames are exported with these numbers between them

MESH_HEADER = """ply
format binary_little_endian 1.0
comment MLIB generated
element vertex {vertices}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
property uchar alpha
element face {faces}
property list uchar int vertex_indices
end_header
"""


def write_scannet(
    root: Path,
    source: Source,
    scenes: list[str] | None = None,
    frames: int | None = None,
    *,
    mesh: bool = True,
    lost: tuple[int, ...] = (1,),
) -> dict[str, str]:
    """Write `frames` frames of each scene, and its mesh where the source has one; {scan name: scene of the source}.

    Frame k of a scene is number 25 k of the scan. In the first scan the frames at `lost` have a pose of -inf.
    """
    names: dict[str, str] = {}
    for number, scene in enumerate(scenes or source.scenes()):
        name = f"scene{number:04d}_00"
        names[name] = scene
        scan = root / name
        for part in ("color", "depth", "pose", "intrinsic"):
            (scan / part).mkdir(parents=True)
        for k, frame_id in enumerate(source.frame_ids(scene)[:frames]):
            try:
                frame = cut(source.load(scene, frame_id), number)
            except BadFrame:
                continue
            is_lost = number == 0 and k in lost
            write_frame(scan, STEP * k, frame, np.full((4, 4), -np.inf) if is_lost else frame.cam_to_world)
        if mesh and isinstance(source, Rooms):
            triangles = source.generator.mesh(scene, 0.1)
            write_mesh(scan / f"{name}_vh_clean_2.ply", triangles.vertices, triangles.colors, triangles.faces)
    return names


def cut(frame: Frame, number: int) -> Frame:
    """The frame without `MARGIN` rows and columns, taken from other sides for each `number`."""
    before = number * 3 % (MARGIN + 1)
    rows, columns = (slice(before, size - MARGIN + before) for size in frame.depth.shape)
    intrinsics = frame.intrinsics.copy()
    intrinsics[:2, 2] -= before
    return Frame(
        frame.scene, frame.id, frame.color[rows, columns], frame.depth[rows, columns], intrinsics, frame.cam_to_world
    )


def write_frame(scan: Path, number: int, frame: Frame, pose: np.ndarray) -> None:
    """JPEG color, 16-bit depth in millimeters, the pose, and both 4x4 intrinsics."""
    big = frame.color.repeat(COLOR_SCALE, axis=0).repeat(COLOR_SCALE, axis=1)
    Image.fromarray(big).save(scan / "color" / f"{number}.jpg", quality=95)
    Image.fromarray(np.round(frame.depth * 1000).astype(np.uint16)).save(scan / "depth" / f"{number}.png")
    np.savetxt(scan / "pose" / f"{number}.txt", pose, fmt="%.9g")
    depth_camera, color_camera = np.eye(4), np.eye(4)
    depth_camera[:3, :3] = frame.intrinsics
    color_camera[:2, :3] = frame.intrinsics[:2] * COLOR_SCALE
    color_camera[:2, 2] += COLOR_SCALE // 2
    np.savetxt(scan / "intrinsic" / "intrinsic_depth.txt", depth_camera, fmt="%.9g")
    np.savetxt(scan / "intrinsic" / "intrinsic_color.txt", color_camera, fmt="%.9g")


def write_mesh(path: Path, vertices: np.ndarray, colors: np.ndarray, faces: np.ndarray) -> None:
    """A mesh as ScanNet's *_vh_clean_2.ply: x, y, z, red, green, blue, alpha; then the faces."""
    vertex = np.zeros(len(vertices), [("xyz", "<f4", 3), ("rgb", "u1", 3), ("alpha", "u1")])
    vertex["xyz"], vertex["rgb"], vertex["alpha"] = vertices, colors, 255
    face = np.zeros(len(faces), [("count", "u1"), ("rows", "<i4", 3)])
    face["count"], face["rows"] = 3, faces
    header = MESH_HEADER.format(vertices=len(vertices), faces=len(faces)).encode()
    path.write_bytes(header + vertex.tobytes() + face.tobytes())
