"""7-Scenes layout: folders of frame-XXXXXX.{color.png|jpg, depth.png, pose.txt}, nested as deep as they come.

Depth is in millimeters, 0 and 65535 invalid; poses are camera-to-world. Depth and color come from two cameras that
are *not* registered in the released files. With a registration (color intrinsics and extrinsics) the depth is moved
into the color camera; without one the color is read at the depth pixel, about 20 pixels off on a Kinect v1.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.files import parse_json
from geo_pretrain.geometry import register_depth
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame

INTRINSICS = "camera-intrinsics.txt"
KINECT_V1 = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])  # nominal depth camera, for folders without a file


@dataclass(frozen=True)
class SevenScenesConfig:
    """Options of the source."""

    registration: str | None = None  # JSON: {"color_intrinsics": 3x3, "depth_to_color": 4x4}


class SevenScenes:
    """A folder in 7-Scenes layout as a source of frames; every folder that holds frames is a scene."""

    name = "seven_scenes"

    def __init__(self, root: Path, config: SevenScenesConfig | None = None) -> None:
        config = config or SevenScenesConfig()
        if not root.is_dir():
            raise DataError(f"No folder {str(root)!r}: expected one in 7-Scenes layout (frame-000000.pose.txt, ...).")
        self.root = root
        self._scenes: dict[str, Path] = {}
        for folder in sorted({path.parent for path in root.rglob("frame-*.pose.txt")}):
            self._scenes[folder.relative_to(root).as_posix() if folder != root else root.resolve().name] = folder
        if not self._scenes:
            raise DataError(
                f"No frames in {str(root)!r}: expected frame-XXXXXX.pose.txt, .color.png (or .jpg) and .depth.png."
            )
        self.registration = read_registration(Path(config.registration)) if config.registration else None

    @property
    def note(self) -> str:
        """A remark on the registration of these frames, for the provenance of checkpoints."""
        if self.registration is not None:
            return "depth registered to the color camera"
        return (
            "depth and color are not registered: color is read at the depth pixel, about 20 px off on a Kinect v1; "
            "give data.options.registration to mend it"
        )

    def scenes(self) -> list[str]:
        return list(self._scenes)

    def frame_ids(self, scene: str) -> list[str]:
        """The six digits of each frame that has a pose file."""
        return sorted(p.name.split("-")[1].split(".")[0] for p in self._scenes[scene].glob("frame-*.pose.txt"))

    def load(self, scene: str, frame_id: str) -> Frame:
        stem = self._scenes[scene] / f"frame-{frame_id}"
        pose = files.read_pose(stem.with_name(stem.name + ".pose.txt"))
        color = files.read_color(self._color_path(stem))
        depth_path = stem.with_name(stem.name + ".depth.png")
        depth = files.read_depth(depth_path, color.shape[:2])
        intrinsics = self._intrinsics(scene)
        if self.registration is not None:
            color_intrinsics, depth_to_color = self.registration
            own, other, moved = (torch.from_numpy(a) for a in (intrinsics, color_intrinsics, depth_to_color))
            size = color.shape[0], color.shape[1]
            depth = register_depth(torch.from_numpy(depth), own, other, moved, size).numpy()
            if not depth.any():
                raise BadFrame(depth_path, "no depth is left after registration to the color camera")
            intrinsics, pose = color_intrinsics, pose @ np.linalg.inv(depth_to_color)
        return Frame(scene, frame_id, color, depth, intrinsics, pose)

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of all frame files and intrinsics, and of the registration."""
        digest = files.files_fingerprint(self.root, chain(*map(self.root.rglob, ("frame-*", INTRINSICS))))
        if self.registration is None:
            return digest
        return hashlib.sha256(digest.encode() + b"".join(m.tobytes() for m in self.registration)).hexdigest()

    def content(self) -> str:
        """A digest of the bytes of some frame files, see `files.sampled_digest`."""
        return files.sampled_digest(self.root, chain(*map(self.root.rglob, ("frame-*", INTRINSICS))))

    def _intrinsics(self, scene: str) -> np.ndarray:
        for folder in (self._scenes[scene], self.root):
            if (folder / INTRINSICS).exists():
                return files.read_intrinsics(folder / INTRINSICS)
        return KINECT_V1

    @staticmethod
    def _color_path(stem: Path) -> Path:
        candidates = [stem.with_name(stem.name + suffix) for suffix in (".color.png", ".color.jpg")]
        return next((path for path in candidates if path.exists()), candidates[0])


def read_registration(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read color intrinsics [3, 3] and depth-to-color extrinsics [4, 4] (m) from a JSON file."""
    try:
        tree: Any = parse_json(path.read_text(encoding="utf-8"))
        matrices = [np.array(tree[key], dtype=np.float64) for key in ("color_intrinsics", "depth_to_color")]
    except FileNotFoundError:
        raise RecipeError(f"No registration file {str(path)!r}.") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f'{path}: {type(error).__name__} {error}; expected {{"color_intrinsics": 3x3, "depth_to_color": 4x4}}.'
        ) from None
    for key, matrix, shape in zip(("color_intrinsics", "depth_to_color"), matrices, ((3, 3), (4, 4)), strict=True):
        if matrix.shape != shape or not np.isfinite(matrix).all():
            raise RecipeError(f"{path}: '{key}' has shape {matrix.shape}, expected {shape} finite numbers.")
    for key, fault in zip(
        ("color_intrinsics", "depth_to_color"),
        (files.intrinsics_fault(matrices[0]), files.pose_fault(matrices[1])),
        strict=True,
    ):
        if fault is not None:
            raise RecipeError(f"{path}: '{key}' {fault}.")
    return matrices[0], matrices[1]
