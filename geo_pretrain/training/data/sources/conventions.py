"""Options that all folders of frames share: units of depth, direction and axes of poses, registration, intrinsics.

Every recorder has its own conventions. A layout states them as `Conventions`; `FolderOptions` overrule what it states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError, first_line
from geo_pretrain.files import expanded, parse_json
from geo_pretrain.geometry import register_depth
from geo_pretrain.training.data import files

PoseConvention = Literal["camera_to_world", "world_to_camera"]
CameraAxes = Literal["opencv", "opengl"]  # x right, y down, z forward | x right, y up, z backward
Up = Literal["x", "-x", "y", "-y", "z", "-z"]
Size = tuple[int, int]  # height, width
TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
# the axis of a world that points up -> the turn after which z does
_Z_UP: dict[Up, list[list[int]]] = {
    "x": [[0, 0, -1], [0, 1, 0], [1, 0, 0]],
    "-x": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
    "y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    "-y": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "z": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "-z": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
}


def z_up(up: Up) -> np.ndarray:
    """The turn of a world whose axis `up` points up into one whose z axis does: float64 [4, 4]."""
    turn = np.eye(4)
    turn[:3, :3] = _Z_UP[up]
    return turn


@dataclass(frozen=True)
class FolderOptions:
    """Options common to all folders. None: as the layout has it."""

    registration: str | None = None  # JSON: {"color_intrinsics": 3x3, "depth_to_color": 4x4}
    depth_scale: float | None = None  # stored values per meter: 1000 millimeters, 5000 TUM, 1 meters in float
    pose_convention: PoseConvention | None = None
    camera_axes: CameraAxes | None = None
    pose_scale: float | None = None  # units of the poses' translations per meter: 1000 millimeters
    world_up: Up | None = None  # axis of the poses' world that points up; clouds turn about it, CSC cuts along it
    registered: bool | None = None  # whether color and depth share one camera
    intrinsics: str | tuple[float, float, float, float] | None = None  # a file, or fx, fy, cx, cy in pixels
    intrinsics_of: Literal["depth", "color"] | None = None  # the image that these, or the folder's, are of; None: depth

    def __post_init__(self) -> None:
        for name in ("depth_scale", "pose_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"'data.options.{name}' is {value!r}, accepted is a number above 0: units per meter.")
        if self.registered and self.registration is not None:
            raise RecipeError(
                "'data.options.registered' is true and 'data.options.registration' is given: depth that is registered "
                "is not moved again. Accepted is one of the two."
            )
        if isinstance(self.intrinsics, tuple):
            fault = files.intrinsics_fault(camera_matrix(*self.intrinsics))
            if fault is not None:
                raise RecipeError(f"'data.options.intrinsics' {fault}; accepted is [fx, fy, cx, cy] in pixels.")


@dataclass(frozen=True)
class Conventions:
    """Conventions in force for a folder."""

    depth_scale: float = 1000.0
    pose_convention: PoseConvention = "camera_to_world"
    camera_axes: CameraAxes = "opencv"
    pose_scale: float = 1.0
    world_up: Up = "z"
    registered: bool = True
    float_depth: bool = False  # whether depth images in float are read: the layout, or the user, states their unit

    def overruled(self, options: FolderOptions) -> Conventions:
        """These conventions with what the options state."""
        names = ("depth_scale", "pose_convention", "camera_axes", "pose_scale", "world_up", "registered")
        given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        return replace(self, **given, float_depth=self.float_depth or options.depth_scale is not None)

    def read_depth(self, path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Read a depth image in meters, float32 [H, W]."""
        return self.meters(files.read_raw_depth(path), path, shape)

    def meters(self, stored: np.ndarray, path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Convert stored values of depth [H, W] to meters, float32."""
        return files.meters_of(path, stored, shape, scale=self.depth_scale, floats=self.float_depth)

    def cam_to_world(self, pose: np.ndarray, path: object) -> np.ndarray:
        """Convert a stored pose [4, 4] to camera-to-world in meters, x right, y down, z forward, in a world with z up.

        Raises `BadFrame` with `path`, the file it stands in, where it is no rigid motion.
        """
        pose = np.array(pose, dtype=np.float64)
        pose[:3, 3] /= self.pose_scale
        if (fault := files.pose_fault(pose)) is not None:
            raise BadFrame(path, f"pose {fault}")
        if self.pose_convention == "world_to_camera":
            pose = np.linalg.inv(pose)
        pose = pose @ TO_OPENCV if self.camera_axes == "opengl" else pose
        return pose if self.world_up == "z" else z_up(self.world_up) @ pose


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: its matrix, and the size of the image that it holds for (None: the depth image's)."""

    matrix: np.ndarray  # float64 [3, 3], integer pixel centers
    size: Size | None = None
    nominal: bool = False  # of a kind of sensor, not of this one: only images of just this size are accepted

    def at(self, size: Size, path: object) -> np.ndarray:
        """The matrix for an image of `size` that shows the same. Raises `BadFrame` with `path` if it cannot."""
        if self.size is None or self.size == size:
            return inside(self.matrix, size, path)
        if self.nominal:
            raise BadFrame(
                path,
                f"has {size[1]}x{size[0]} pixels and no intrinsics; the sensor's nominal ones hold for "
                f"{self.size[1]}x{self.size[0]}: give them (data.options.intrinsics, or a file)",
            )
        if (fault := files.aspect_fault(self.size, size)) is not None:
            raise BadFrame(path, f"intrinsics hold for another image: {fault}".replace("color is", "theirs is"))
        scale = np.array([[size[1] / self.size[1]], [size[0] / self.size[0]]])
        matrix = self.matrix.copy()
        matrix[:2, :2] *= scale
        matrix[:2, 2] = (matrix[:2, 2] + 0.5) * scale[:, 0] - 0.5  # pixel centers are at integers
        return inside(matrix, size, path)


def camera_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """The matrix of a pinhole camera, float64 [3, 3]."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def read_camera(path: Path) -> Camera:
    """Read a pinhole camera: a text file of 4 (fx fy cx cy), 9 or 16 numbers, or Open3D's JSON.

    Open3D's `PinholeCameraIntrinsic` writes {"width", "height", "intrinsic_matrix": 9 numbers, column by column}.
    Raises `BadFrame`.
    """
    if path.suffix == ".json":
        return _open3d_camera(path)
    numbers = files.read_numbers(path, (4, 9, 16), "fx fy cx cy, or a 3x3 or 4x4 matrix")
    matrix = camera_matrix(*numbers) if len(numbers) == 4 else numbers.reshape(int(len(numbers) ** 0.5), -1)[:3, :3]
    return checked_camera(path, matrix)


def checked_camera(path: object, matrix: np.ndarray, size: Size | None = None) -> Camera:
    """A `Camera`, or `BadFrame` with the path of the file that states it."""
    if (fault := files.intrinsics_fault(matrix)) is not None:
        raise BadFrame(path, f"intrinsics {fault}")
    return Camera(matrix, size)


def _open3d_camera(path: Path) -> Camera:
    try:
        tree: Any = parse_json(path.read_text(encoding="utf-8-sig"))
        matrix = np.array(tree["intrinsic_matrix"], dtype=np.float64).reshape(3, 3).T
        size = int(tree["height"]), int(tree["width"])
    except OSError as error:
        raise BadFrame(path, f"intrinsics cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise BadFrame(
            path, f'intrinsics are not Open3D\'s {{"width", "height", "intrinsic_matrix"}} ({first_line(error)})'
        ) from None
    return checked_camera(path, np.ascontiguousarray(matrix), size if min(size) > 0 else None)


class Assembly:
    """Makes frames of images, poses and intrinsics by the conventions and options of a folder."""

    def __init__(
        self,
        conventions: Conventions,
        options: FolderOptions,
        *,
        resize: Callable[[np.ndarray, Size], np.ndarray] | None = None,
    ) -> None:
        """`resize(color, size)` brings color onto the depth grid; None: by the mean of pixels that fall into one."""
        self.options = options
        self.resize = resize or resize_color
        self.conventions = conventions.overruled(options)
        self.registration = None
        if options.registration is not None:
            self.registration = read_registration(expanded(options.registration))
        self.camera = self._given_camera()

    def digest(self, of_files: str) -> str:
        """A fingerprint of files and of what the options make of them; that of the files where there are no options."""
        given = {
            field.name: value
            for field in fields(FolderOptions)
            if (value := getattr(self.options, field.name)) is not None and field.name not in ("registration",)
        }
        if self.registration is None and not given:
            return of_files
        parts = [of_files.encode(), *(matrix.tobytes() for matrix in self.registration or ())]
        if given:
            parts.append(json.dumps(given, sort_keys=True).encode())
            parts.append(self.camera.matrix.tobytes() if self.camera is not None else b"")
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def note(self) -> str:
        """A remark on registration for the provenance of checkpoints."""
        if self.registration is not None:
            return "depth registered to the color camera"
        if self.conventions.registered:
            return "depth and color share one camera" if self.options.registered else ""
        return (
            "depth and color are not registered: color is read at the depth pixel, about 20 px off on a Kinect v1; "
            "give data.options.registration to mend it, or data.options.registered=true if they are"
        )

    def images(
        self, color: np.ndarray, depth: np.ndarray, camera: Camera, pose: np.ndarray, color_path: Path, depth_path: Path
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Bring color [H, W, 3] and depth [h, w] to one camera: color, depth, intrinsics, cam_to_world.

        Without a registration color is resized onto the depth grid.
        """
        camera = self.camera or camera
        if self.options.intrinsics_of == "color":
            camera = replace(camera, size=camera.size or (color.shape[0], color.shape[1]))
        size = depth.shape[0], depth.shape[1]
        if self.registration is not None:
            matrix = camera.at(size, depth_path)
            return self._registered(color, depth, matrix, pose, self.registration, depth_path)
        if (fault := files.aspect_fault(color.shape, size)) is not None:
            raise BadFrame(color_path, fault)
        return self.resize(color, size), depth, camera.at(size, depth_path), pose

    def _registered(
        self,
        color: np.ndarray,
        depth: np.ndarray,
        matrix: np.ndarray,
        pose: np.ndarray,
        registration: tuple[np.ndarray, np.ndarray],
        path: Path,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        color_matrix, depth_to_color = registration
        size = color.shape[0], color.shape[1]
        if depth.shape[0] < size[0]:  # a finer grid than the depth's would have holes
            small = depth.shape[0], round(size[1] * depth.shape[0] / size[0])
            color, color_matrix, size = self.resize(color, small), Camera(color_matrix, size).at(small, path), small
        own, other, moved = (torch.from_numpy(a) for a in (matrix, color_matrix, depth_to_color))
        depth = register_depth(torch.from_numpy(depth), own, other, moved, size).numpy()
        if not depth.any():
            raise BadFrame(path, "no depth is left after registration to the color camera")
        return color, depth, color_matrix, pose @ np.linalg.inv(depth_to_color)

    def _given_camera(self) -> Camera | None:
        given = self.options.intrinsics
        if given is None:
            return None
        if isinstance(given, str):
            try:
                return read_camera(expanded(given))
            except DataError as error:
                raise RecipeError(f"data.options.intrinsics: {error}.") from None
        return Camera(camera_matrix(*given))


def resize_color(color: np.ndarray, size: Size) -> np.ndarray:
    """Resize an image [H, W, 3] to `size` by averaging the pixels that fall into one."""
    if color.shape[:2] == size:
        return color
    return np.asarray(Image.fromarray(color).resize((size[1], size[0]), Image.Resampling.BOX))


def inside(matrix: np.ndarray, size: Size, path: object) -> np.ndarray:
    """The matrix of a camera, or `BadFrame` if its principal point lies outside of an image of `size`."""
    cx, cy = matrix[0, 2], matrix[1, 2]
    if 0 <= cx < size[1] and 0 <= cy < size[0]:
        return matrix
    fault = f"intrinsics have the principal point ({cx:g}, {cy:g}), outside of this image of {size[1]}x{size[0]} pixels"
    if (factor := times_as_large(matrix, size)) is None:
        raise BadFrame(path, f"{fault}: are they those of the color image (intrinsics_of=color), or transposed?")
    other = f"{round(size[1] * factor)}x{round(size[0] * factor)}"
    here = ",".join(f"{number:g}" for number in smaller(matrix, factor))
    raise BadFrame(
        path,
        f"{fault}: those of the color image (intrinsics_of=color), or of another of about {other}? Then this one has "
        f"about data.options.intrinsics=[{here}]",
    )


def times_as_large(matrix: np.ndarray, size: Size) -> float | None:
    """By how much larger an image has its middle at the principal point; None unless both axes say the same.

    A whole number or a half is taken where one is very near.
    """
    factors = (2 * matrix[0, 2] + 1) / size[1], (2 * matrix[1, 2] + 1) / size[0]
    if abs(factors[0] / factors[1] - 1) >= 0.05 or min(factors) <= 0.1:
        return None
    factor = float(np.mean(factors))
    simple = (round(factor), round(2 * factor) / 2)
    return next((near for near in simple if near > 1 and abs(factor / near - 1) < 0.005), factor)


def smaller(matrix: np.ndarray, factor: float) -> list[float]:
    """fx, fy, cx, cy for an image that is `factor` times smaller; pixels count from the center of the first."""
    fx, fy, cx, cy = (float(matrix[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return [
        round(value, 3) for value in (fx / factor, fy / factor, (cx + 0.5) / factor - 0.5, (cy + 0.5) / factor - 0.5)
    ]


def read_registration(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read color intrinsics [3, 3] and depth-to-color extrinsics [4, 4] (m) from a JSON file."""
    try:
        tree: Any = parse_json(path.read_text(encoding="utf-8-sig"))
        matrices = [np.array(tree[key], dtype=np.float64) for key in ("color_intrinsics", "depth_to_color")]
    except FileNotFoundError:
        raise RecipeError(f"No registration file {str(path)!r}.") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, OSError) as error:
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


def stated(options: Any) -> dict[str, Any]:
    """The options of a dataclass that are not those of `FolderOptions` left at None, for fingerprints."""
    common = {field.name for field in fields(FolderOptions)}
    return {name: value for name, value in asdict(options).items() if name not in common or value is not None}
