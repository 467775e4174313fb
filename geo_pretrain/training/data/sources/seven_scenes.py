"""7-Scenes layout: folders of frame-XXXXXX.{color.png|jpg, depth.png, pose.txt}, nested as deep as they come.

Depth is in millimeters, 0 and 65535 invalid; poses are camera-to-world. Depth and color come from two cameras that
are *not* registered in the released files. With a registration (color intrinsics and extrinsics) the depth is moved
into the color camera; without one the color is read at the depth pixel, about 20 pixels off on a Kinect v1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.sources.conventions import (
    Assembly,
    Camera,
    Conventions,
    FolderOptions,
    camera_matrix,
)
from geo_pretrain.training.data.sources.recording import files_below, places_above

INTRINSICS = "camera-intrinsics.txt"
# the nominal depth camera, for folders without a file
KINECT_V1 = Camera(camera_matrix(585.0, 585.0, 320.0, 240.0), (480, 640), nominal=True)


@dataclass(frozen=True)
class SevenScenesConfig(FolderOptions):
    """Options of the source."""


class SevenScenes:
    """A folder in 7-Scenes layout as a source of frames; every folder that holds frames is a scene."""

    name = "seven_scenes"

    def __init__(self, root: Path, config: SevenScenesConfig | None = None) -> None:
        self.config = config or SevenScenesConfig()
        self.assembly = Assembly(Conventions(registered=False), self.config)
        self.conventions = self.assembly.conventions
        if not root.is_dir():
            raise DataError(f"No folder {str(root)!r}: expected one in 7-Scenes layout (frame-000000.pose.txt, ...).")
        self.root = root
        self._scenes: dict[str, Path] = {}
        for folder in sorted({path.parent for path in files_below(root, "frame-*.pose.txt")}):
            self._scenes[folder.relative_to(root).as_posix() if folder != root else root.resolve().name] = folder
        if not self._scenes:
            raise DataError(
                f"No frames in {str(root)!r}: expected frame-XXXXXX.pose.txt, .color.png (or .jpg) and .depth.png."
            )

    @property
    def note(self) -> str:
        """A remark on the registration of these frames, for the provenance of checkpoints."""
        return self.assembly.note()

    def scenes(self) -> list[str]:
        return list(self._scenes)

    def frame_ids(self, scene: str) -> list[str]:
        """The six digits of each frame that has a pose file, in order of time."""
        names = (path.name.split("-")[1].split(".")[0] for path in self._scenes[scene].glob("frame-*.pose.txt"))
        return sorted(names, key=files.natural_order)

    def load(self, scene: str, frame_id: str) -> Frame:
        stem = self._scenes[scene] / f"frame-{frame_id}"
        pose_path, depth_path = (stem.with_name(stem.name + ending) for ending in (".pose.txt", ".depth.png"))
        pose = self.conventions.cam_to_world(files.read_matrix(pose_path, 4, 4), pose_path)
        color_path = self._color_path(stem)
        color = files.read_frame_color(color_path)
        depth = self.conventions.read_depth(depth_path, color.shape[:2])
        images = self.assembly.images(color, depth, self._camera(scene), pose, color_path, depth_path)
        return Frame(scene, frame_id, *images)

    def raw_depth(self, scene: str, frame_id: str) -> np.ndarray:
        """Read the values of a depth image as they are stored: [H, W]."""
        return files.read_raw_depth(self._scenes[scene] / f"frame-{frame_id}.depth.png")

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of all frame files and intrinsics, and of the registration."""
        return self.assembly.digest(
            files.files_fingerprint(self.root, filter(Path.is_file, files_below(self.root, "frame-*", INTRINSICS)))
        )

    def content(self) -> str:
        """A digest of the bytes of some frame files, see `files.sampled_digest`."""
        return files.sampled_digest(self.root, files_below(self.root, "frame-*", INTRINSICS))

    def _camera(self, scene: str) -> Camera:
        for folder in places_above(self._scenes[scene], self.root):
            if (folder / INTRINSICS).exists():
                return Camera(files.read_intrinsics(folder / INTRINSICS))
        return KINECT_V1

    @staticmethod
    def _color_path(stem: Path) -> Path:
        candidates = [stem.with_name(stem.name + suffix) for suffix in (".color.png", ".color.jpg")]
        return next((path for path in candidates if path.exists()), candidates[0])
