"""A recording for the Rerun viewer (extra `rerun`): the painted cloud, and the frames with their cameras.

Entities: /world/points/LAYER, all at the same places, to be switched in the viewer; /world/camera with pose, pinhole,
image and depth on the timeline "frame". Written with rerun-sdk's RecordingStream,
https://ref.rerun.io/docs/python, tried with 0.41.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import require
from geo_pretrain.files import atomic_write
from geo_pretrain.targets import RERUN
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.visualize.common import check_file


def check_rerun(path: Path) -> Any:
    """The library, before anything is computed.

    Raises `MissingDependency` where it is not installed, `RecipeError` for another suffix than .rrd.
    """
    check_file(path, RERUN)
    return require("rerun", "rerun")


def write_rerun(
    points: np.ndarray,
    layers: Sequence[tuple[str, np.ndarray]],
    frames: Sequence[Frame],
    path: Path,
    *,
    radius: float,
    up: np.ndarray,
) -> None:
    """Write points [N, 3] (m, world) in the colors uint8 [N, 3] of each layer, and the frames that see them.

    `radius` of a point, m; `up` [3] is the direction of the world that the viewer shows upright.
    """
    rr = check_rerun(path)
    with atomic_write(path, suffix=path.suffix) as temporary:
        recording = rr.RecordingStream("geo_pretrain")
        recording.save(str(temporary))
        recording.log("world", _view_coordinates(rr, up), static=True)
        for title, colors in layers:
            cloud = rr.Points3D(points.astype(np.float32), colors=colors, radii=radius)
            recording.log(f"world/points/{re.sub(r'[^0-9A-Za-z_.-]+', '_', title)}", cloud, static=True)
        for number, frame in enumerate(frames):
            recording.set_time("frame", sequence=number)
            _log_camera(rr, recording, frame)
        recording.flush()
        recording.disconnect()


def _log_camera(rr: Any, recording: Any, frame: Frame) -> None:
    height, width = frame.depth.shape
    pose = frame.cam_to_world
    recording.log("world/camera", rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
    pinhole = rr.Pinhole(image_from_camera=frame.intrinsics, width=width, height=height)
    recording.log("world/camera/image", pinhole)
    recording.log("world/camera/image/color", rr.Image(frame.color))
    recording.log("world/camera/image/depth", rr.DepthImage(frame.depth.astype(np.float32), meter=1.0))


def _view_coordinates(rr: Any, up: np.ndarray) -> Any:
    """The world's upright axis, as Rerun names it."""
    axis = int(np.abs(up).argmax())
    side = "UP" if up[axis] > 0 else "DOWN"
    return getattr(rr.ViewCoordinates, f"RIGHT_HAND_{'XYZ'[axis]}_{side}")
