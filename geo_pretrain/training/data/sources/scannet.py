"""ScanNet: scene*/scene*.sens of the release, or scans exported to files.

Exported: scene*/{color/*.jpg, depth/*.png, pose/*.txt, intrinsic/intrinsic_depth.txt}, or, as in scannet_frames_25k,
intrinsics_depth.txt in the scan's folder. A scan that has both is read from its exported files.

The mesh scene*/<scene>_vh_clean_2.ply of the release, where it is there, is the surface of the scene, and
<scene>_vh_clean_2.0.010000.segs.json beside it has the segment of each of its vertices.
Color (1296x968) and depth (640x480) are aligned by the sensor's own calibration, so color is resized onto the
depth grid and the depth intrinsics of the scan hold for both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, RecipeError, first_line, some
from geo_pretrain.files import expanded
from geo_pretrain.training.checks import Count
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame, Surface, resize_image
from geo_pretrain.training.data.sources import scannet_files as scan_files
from geo_pretrain.training.data.sources.conventions import (
    Assembly,
    Camera,
    Conventions,
    FolderOptions,
    checked_camera,
    stated,
)
from geo_pretrain.training.data.sources.recording import hint, readable
from geo_pretrain.training.data.sources.sens import SensFile, beginning, open_sens
from geo_pretrain.training.data.surfaces.ply import triangle_rows

# Pri3D uses one matrix for every scan, at 320x240: focal length 288.9353025, principal point 159.5, 119.5. This one at
# 640x480 becomes that when `resize_frame` takes the second of every two pixels.
CONSTANT_640 = np.array([[577.870605, 0, 320.0], [0, 577.870605, 240.0], [0, 0, 1]])

SCANS = "scans"  # the folder of the scans in the release, beside scans_test, which has neither segments nor objects
EVERY = 25  # frames of a .sens file from one that is used to the next, in all papers
UNSTATED = ("every", "scans")  # options that are younger than fingerprints


@dataclass(frozen=True)
class ScanNetConfig(FolderOptions):
    """Options of the source."""

    constant_intrinsics: bool = False  # Pri3D's one matrix for all scans instead of each scan's own
    every: Count | None = None  # frames whose number this divides; None: 25 of .sens, as the papers, all of exported
    scans: str | None = None  # a list of scans, such as scannetv2_train.txt (1201); None: all that are there (1513)
    labels: str | None = None  # folder of label images beside color, such as "label-filt": `Frame.semantic`
    instances: str | None = None  # such as "instance-filt": `Frame.instance`


class ScanNet:
    """Exported ScanNet scans as a source of frames."""

    name = "scannet"

    @property
    def note(self) -> str:
        """How intrinsics and color of these frames came about, for the provenance of checkpoints."""
        own = "depth intrinsics of each scan; color resized onto the depth grid (nearest)"
        return "; ".join(part for part in (own, self.assembly.note()) if part)

    def __init__(self, root: Path, config: ScanNetConfig | None = None) -> None:
        released = root / SCANS
        root = released if released.is_dir() and not any(root.glob("scene*")) else root
        self.root = root
        self.config = config or ScanNetConfig()
        self.assembly = Assembly(Conventions(), self.config, resize=resize_image)
        self.conventions = self.assembly.conventions
        exported = {path.parent.name for path in root.glob("scene*/pose") if path.is_dir()}
        self._sens = {path.stem: path for path in root.glob("scene*/scene*.sens") if path.stem == path.parent.name}
        self._sens = {name: path for name, path in self._sens.items() if name not in exported}
        self._scenes = sorted(exported | self._sens.keys())
        if not self._scenes:
            raise DataError(
                f"No scans in {str(root)!r}: expected scene*/scene*.sens, or scene*/color, depth, pose and intrinsic "
                f"folders.{hint(root, self.name)}"
            )
        if self.config.scans is not None:
            self._scenes = self._listed(expanded(self.config.scans))
        self._scenes = readable(self._scenes, self._checked)

    def scenes(self) -> list[str]:
        """Scan names such as scene0000_00."""
        return self._scenes

    def frame_ids(self, scene: str) -> list[str]:
        every = self.config.every
        if scene in self._sens:
            return [str(number) for number in range(0, len(self._opened(scene)), every or EVERY)]
        names = sorted((p.stem for p in files.visible(self.root / scene / "pose", "*.txt")), key=lambda s: (len(s), s))
        return names if every is None else [name for name in names if not name.isdecimal() or int(name) % every == 0]

    def load(self, scene: str, frame_id: str) -> Frame:
        folder = self.root / scene
        color_path, depth_path = folder / "color" / f"{frame_id}.jpg", folder / "depth" / f"{frame_id}.png"
        if scene in self._sens:
            color_path = depth_path = self._sens[scene]
            scan, number = self._opened(scene), int(frame_id)
            pose = self.conventions.cam_to_world(scan.pose(number), f"{scan.path}: frame {number}")
            color = scan.color(number)
        else:
            color_path = color_path if color_path.exists() else color_path.with_suffix(".png")
            pose_path = folder / "pose" / f"{frame_id}.txt"
            pose = self.conventions.cam_to_world(files.read_matrix(pose_path, 4, 4), pose_path)
            color = files.read_frame_color(color_path)
        conventions = replace(self.conventions, depth_scale=self.depth_scale(scene))
        depth = conventions.meters(self.raw_depth(scene, frame_id), depth_path)
        camera = self._camera(scene)
        color, depth, matrix, pose = self.assembly.images(color, depth, camera, pose, color_path, depth_path)
        semantic, instance = (
            None if name is None else _read_labels(folder / name / f"{frame_id}.png", depth.shape, kind)
            for name, kind in ((self.config.labels, np.int16), (self.config.instances, np.int32))
        )
        return Frame(scene, frame_id, color, depth, matrix, pose, semantic, instance)

    def depth_scale(self, scene: str) -> float:
        """Stored values of depth per meter: the option, or what the header of a .sens file says, or millimeters."""
        if self.config.depth_scale is None and scene in self._sens:
            return self._opened(scene).header.depth_shift
        return self.conventions.depth_scale

    def raw_depth(self, scene: str, frame_id: str) -> np.ndarray:
        """Read the values of a depth image as they are stored: [H, W]."""
        if scene in self._sens:
            return self._opened(scene).stored_depth(int(frame_id))
        return files.read_raw_depth(self.root / scene / "depth" / f"{frame_id}.png")

    def surface(self, scene: str) -> Surface:
        return Surface(*scan_files.colored_vertices(self._mesh_path(scene)))

    def triangles(self, scene: str) -> tuple[np.ndarray, np.ndarray]:
        path = self._mesh_path(scene)
        vertex, face = scan_files.read_mesh(path, "vertex", "face")
        points = scan_files.positions(path, vertex)
        return points, triangle_rows(path, face, len(points))

    def vertices(self, scene: str) -> np.ndarray:
        path = self._mesh_path(scene)
        (vertex,) = scan_files.read_mesh(path, "vertex")
        return scan_files.positions(path, vertex)

    def segments(self, scene: str, vertices: int) -> np.ndarray | None:
        path = self._segments_path(scene)
        return scan_files.read_segments(path, vertices) if path.exists() else None

    def content(self) -> str:
        """A digest of the bytes of some frames' files, see `files.sampled_digest`; poses alone are listed."""
        poses = files.visible(self.root, "scene*/pose/*.txt")
        chosen = poses[:: max(1, -(-len(poses) // (files.SAMPLED // 3)))]
        folders = (("pose", ".txt"), ("color", ".jpg"), ("color", ".png"), ("depth", ".png"))
        of_frames = (pose.parents[1] / kind / f"{pose.stem}{ending}" for pose in chosen for kind, ending in folders)
        digest = files.sampled_digest(self.root, of_frames)
        if not self._sens:
            return digest
        parts = (beginning(path) for _, path in sorted(self._sens.items())[: files.SAMPLED])
        return hashlib.sha256(b"".join([digest.encode(), *parts])).hexdigest()

    def fingerprint(self) -> str:
        """A digest of the options and of names, sizes and times of poses, intrinsics, meshes and segments.

        Each frame has a pose; looking at all images too would take long on a disk of the network.
        """
        patterns = "scene*/pose/*.txt", "scene*/intrinsic/intrinsic_depth.txt", "scene*/intrinsics_depth.txt"
        of_scenes = (kind(scene) for scene in self._scenes for kind in (self._mesh_path, self._segments_path))
        found = filter(Path.is_file, chain(*map(self.root.glob, patterns), of_scenes))
        digest = files.files_fingerprint(self.root, chain(found, self._sens.values()))
        stated_here = {name: value for name, value in stated(self.config).items() if name not in UNSTATED or value}
        options = json.dumps(stated_here, sort_keys=True)
        if self.config.scans is not None:
            options += "\0".join(self._scenes)
        return hashlib.sha256(f"{self.assembly.digest(digest)}\0{options}".encode()).hexdigest()

    def _checked(self, scene: str) -> str:
        """The scene. Raises `BadFrame` for a .sens file that is none."""
        if scene in self._sens:
            self._opened(scene)
        return scene

    def _opened(self, scene: str) -> SensFile:
        path = self._sens[scene]
        try:
            return open_sens(path, path.stat().st_mtime_ns)
        except OSError as error:
            raise BadFrame(path, f"cannot be read ({error.strerror})") from None

    def _camera(self, scene: str) -> Camera:
        if self.config.constant_intrinsics:
            return Camera(CONSTANT_640, (480, 640))
        if scene in self._sens:
            return checked_camera(self._sens[scene], self._opened(scene).header.depth_intrinsics)
        folder = self.root / scene
        path = folder / "intrinsic" / "intrinsic_depth.txt"
        flat = folder / "intrinsics_depth.txt"  # as in scannet_frames_25k
        return Camera(files.read_intrinsics(flat if flat.exists() and not path.exists() else path, 4))

    def _listed(self, path: Path) -> list[str]:
        """The scans that a list names."""
        try:
            wanted = dict.fromkeys(path.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"data.options.scans: {path} cannot be read ({first_line(error)}).") from None
        missing = [name for name in wanted if name not in set(self._scenes)]
        if missing or not wanted:
            raise DataError(
                f"{len(missing)} of the {len(wanted)} scans in {path} are not in {str(self.root)!r}: {some(missing)}."
            )
        return list(wanted)

    def _mesh_path(self, scene: str) -> Path:
        return scan_files.mesh_path(self.root / scene)

    def _segments_path(self, scene: str) -> Path:
        return scan_files.segments_path(self.root / scene)


def _read_labels(path: Path, shape: tuple[int, ...], kind: type[np.signedinteger[Any]]) -> np.ndarray:
    """Read label ids and resize them to the depth grid [H, W]; label images may have either camera's size."""
    ids = files.read_ids(path, bits=(8, 16))
    if ids.max() > np.iinfo(kind).max:
        raise BadFrame(path, f"label {ids.max()} is above {np.iinfo(kind).max}; is this an image of instances?")
    return resize_image(ids, shape).astype(kind)
