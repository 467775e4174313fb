"""Reading frames from files: images, depth, ids, poses and matrices, each failure a `BadFrame` with path and reason."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from geo_pretrain.errors import BadFrame, DataError, first_line, require
from geo_pretrain.files import regular

INVALID_MM = 65535  # "no measurement", as 0 is; rare and easily forgotten
SHORTEST, LONGEST = 2.0, 1e6  # focal lengths in pixels; below are those in meters, or relative to the image's size
FARTHEST = 1e7  # m from the origin, more than any map frame on earth has
SAMPLED = 240  # files whose bytes are read for a digest of a data set
MOST_PIXELS = 60_000_000
EXIF_ORIENTATION = 0x0112
ASPECT = 0.01  # by which the aspects of color and depth may differ
LAST_ROW = 1e-3  # by which the last row of a matrix may be off
# Whatever a file is called, Pillow tries all it knows, and runs Ghostscript on what begins as PostScript does.
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP", "GIF", "JPEG2000", "TGA", "PCX", "SGI", "ICO", "DDS")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _PALETTE = 0, 3  # color types of PNG whose pixels are one number
UNPACKED, MOST_PACKED = 1 << 30, 64  # bytes of arrays that any archive may hold, and the multiple of its own size
_DAMAGED = (OSError, ValueError, EOFError, KeyError, SyntaxError, RuntimeError, OverflowError, TypeError)
LONGEST_NAME = 255  # bytes that file systems accept in a name
MATRIX_BYTES = 1 << 16  # of a text file of numbers; a pose has some hundred


def read_color(path: Path) -> np.ndarray:
    """Read an image file: uint8 [H, W, 3] RGB. More than 8 bits a channel are refused: they come out white or black."""
    with _reading(path, "color image"), _opened(path) as image:
        refuse_deep(path, image)
        return np.asarray(image.convert("RGB"))


def refuse_deep(path: Path, image: Image.Image) -> None:
    """Raise `BadFrame` for an opened image with more than 8 bits a channel, which Pillow clips or cuts to 8."""
    kinds = [image.mode, *(str(tile[3]) for tile in getattr(image, "tile", ()) if len(tile) > 3)]
    if image.mode[0] in "IF" or any(word in kind for kind in kinds for word in (";16", ";12", ";10")):
        raise BadFrame(path, f"color image has more than 8 bits a channel (mode {image.mode}): save it with 8")


def read_photo(path: Path, shape: Sequence[int] | None = None) -> np.ndarray:
    """Read an image file as viewers show it: uint8 [H, W, 3] RGB, turned as its EXIF data say.

    It is left as it is stored where only that has the given `shape` (H, W), of its labels.
    """
    with _reading(path, "color image"), _opened(path) as image:
        refuse_deep(path, image)
        turned = ImageOps.exif_transpose(image) if image.format != "PNG" else image
        if shape is not None and (turned.height, turned.width) != tuple(shape[:2]) == (image.height, image.width):
            turned = image
        return np.array(turned.convert("RGB"))


def read_frame_color(path: Path, data: bytes | None = None) -> np.ndarray:
    """`read_color` for an image that has a depth image: one whose EXIF data say that it is to be turned is refused.

    `data`: the image itself, where it is a part of the file at `path`.
    """
    with _reading(path, "color image"), _opened(path, data) as image:
        refuse_deep(path, image)
        turn = image.getexif().get(EXIF_ORIENTATION, 1) if image.format != "PNG" else 1
        if turn not in (0, 1):
            raise BadFrame(
                path,
                f"color image has EXIF orientation {turn}, the depth image none: save its pixels as they lie in the "
                "depth image and remove the tag",
            )
        return np.asarray(image.convert("RGB"))


def aspect_fault(color: Sequence[int], depth: Sequence[int]) -> str | None:
    """Why a color image of shape [H, W, ...] cannot show what a depth image [H, W] shows; None if it can.

    Their aspects may differ by 1 % (ScanNet's 1296x968 and 640x480 differ by 0.4 %).
    """
    ratio = (color[1] / color[0]) / (depth[1] / depth[0])
    if abs(ratio - 1) <= ASPECT:
        return None
    sizes = f"color is {color[1]}x{color[0]}, depth {depth[1]}x{depth[0]}"
    turned = abs(color[0] / color[1] / (depth[1] / depth[0]) - 1) <= ASPECT
    return f"{sizes}: " + ("one of them is turned" if turned else "another aspect, so that they show different parts")


def read_map(path: Path, data: bytes, what: str) -> np.ndarray:
    """Read numbers [H, W] from the bytes of a .npy file, which are a part of the file at `path`."""
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (*_DAMAGED, tokenize.TokenError, MemoryError) as error:
        raise BadFrame(path, f"{what} cannot be read ({first_line(error)})") from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "uif" or not values.size:
        raise BadFrame(path, f"{what} is no array [H, W] of numbers")
    return values


def read_raw_depth(path: Path, data: bytes | None = None) -> np.ndarray:
    """Read the values of a depth image as stored, [H, W]: gray of 16 or 32 bits, float TIFF, .npy, .h5, .exr, COLMAP's.

    `data`: the image itself (gray or TIFF), where it is a part of the file at `path`.
    """
    if data is None and path.suffix.lower() == ".bin":
        return _read_colmap_map(path)
    if data is None and path.suffix.lower() == ".h5":
        return _read_hdf5_map(path)
    if data is None and path.suffix.lower() == ".exr":
        return _read_exr_map(path)
    if data is None and path.suffix.lower() == ".npy":
        with loaded_arrays(path) as array:
            values = np.asarray(array)
        if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
            values = values.squeeze(0 if values.shape[0] == 1 else 2)
        if values.ndim != 2 or values.dtype.kind not in "uif" or not values.size:
            raise BadFrame(
                path, f"depth is an array {list(values.shape)} of {values.dtype}, expected [H, W] of numbers"
            )
        return values
    with _reading(path, "depth image"), _opened(path, data) as image:
        if image.mode not in ("I;16", "I;16B", "I;16L", "I", "F"):
            raise BadFrame(path, f"depth has image mode {image.mode}, expected 16-bit gray")
        return np.asarray(image)


def _read_colmap_map(path: Path) -> np.ndarray:
    """Read a depth map of COLMAP, float32 [H, W]: the text "width&height&1&", then the values row by row."""
    with _reading(path, "depth map"):
        data = path.read_bytes()
    words = data[:64].split(b"&", 3)
    numbers = [int(word) for word in words[:3] if word.isdigit()]
    if len(words) < 4 or len(numbers) < 3 or numbers[2] != 1 or not 0 < numbers[0] * numbers[1] <= MOST_PIXELS:
        raise BadFrame(path, 'is no depth map of COLMAP, which begins with "width&height&1&"')
    start = sum(len(word) + 1 for word in words[:3])
    if len(data) - start != 4 * numbers[0] * numbers[1]:
        raise BadFrame(path, f"has {len(data) - start} bytes of values, expected {numbers[0]}x{numbers[1]} of 4 bytes")
    return np.frombuffer(data, "<f4", offset=start).reshape(numbers[1], numbers[0])


def _read_hdf5_map(path: Path) -> np.ndarray:
    """Read the data set "depth" of an HDF5 file, float [H, W], as MegaDepth stores it. Needs h5py."""
    h5py: Any = require("h5py", "datasets")
    try:
        with h5py.File(regular(path), "r") as file:
            data = file["depth"]
            shape, kind = tuple(data.shape), data.dtype.kind
            if len(shape) == 2 and kind in "uif" and 0 < shape[0] * shape[1] <= MOST_PIXELS:
                return np.asarray(data[()])
    except FileNotFoundError:
        raise BadFrame(path, "depth image is missing") from None
    except (*_DAMAGED, AttributeError, MemoryError) as error:
        raise BadFrame(path, f"depth cannot be read ({first_line(error)})") from None
    raise BadFrame(path, f"depth is a data set {list(shape)} of kind {kind!r}, expected [H, W] of numbers")


def _read_exr_map(path: Path) -> np.ndarray:
    """Read the first channel of an OpenEXR image, float [H, W], as Record3D exports depth. Needs OpenEXR."""
    with _reading(path, "depth image"), path.open("rb") as file:
        if file.read(4) != b"v/1\x01":
            raise BadFrame(path, "is no OpenEXR image")
    library: Any = require("OpenEXR", "datasets")
    try:
        channels = library.File(str(path), separate_channels=True).channels()
        values = np.asarray(channels["R" if "R" in channels else next(iter(channels))].pixels)
    except Exception as error:  # of a library in C++: errors of many kinds
        raise BadFrame(path, f"depth cannot be read ({first_line(error)})") from None
    if values.ndim != 2 or values.dtype.kind != "f" or not values.size:
        raise BadFrame(path, f"depth is an image {list(values.shape)} of {values.dtype}, expected [H, W] in float")
    return values


def read_depth(
    path: Path, shape: tuple[int, ...] | None = None, *, scale: float = 1000.0, floats: bool = False
) -> np.ndarray:
    """Read a depth image: float32 [H, W] meters, 0 where there is no measurement.

    `scale`: stored values per meter, 1000 for millimeters. Of 16-bit images 0 and 65535 are invalid; of images in
    float, which are read only with `floats`, NaN, infinities and what is not above 0. `shape`: that of the color image.
    """
    return meters_of(path, read_raw_depth(path), shape, scale=scale, floats=floats)


FLOAT_DEPTH = "depth is in float; say its unit: depth_scale=1 for meters, 1000 for millimeters"


def meters_of(
    path: Path,
    stored: np.ndarray,
    shape: tuple[int, ...] | None = None,
    *,
    scale: float = 1000.0,
    floats: bool = False,
) -> np.ndarray:
    """Convert the stored values [H, W] of a depth image to meters, see `read_depth`; `path` is for messages."""
    if stored.dtype.kind == "f" and not floats:
        raise BadFrame(path, FLOAT_DEPTH)
    if shape is not None and stored.shape != shape:
        given, wanted = "x".join(map(str, stored.shape[::-1])), "x".join(map(str, shape[::-1]))
        raise BadFrame(path, f"depth is {given}, the color image {wanted}")
    if stored.dtype == np.uint16:
        meters = _meters_of_16_bits(scale)[stored]
    else:
        invalid = (stored == INVALID_MM) if stored.dtype.kind != "f" else ~np.isfinite(stored)
        meters = np.where(invalid | (stored <= 0), 0, stored.astype(np.float64) / scale).astype(np.float32)
    if not meters.any():
        raise BadFrame(path, "no pixel has a valid depth")
    return meters


@lru_cache(maxsize=8)
def _meters_of_16_bits(scale: float) -> np.ndarray:
    """Meters of each 16-bit value, float32 [65536]: a lookup in place of a division and three masks."""
    values = np.arange(INVALID_MM + 1)
    return np.where(values == INVALID_MM, 0, values / scale).astype(np.float32)


def read_ids(path: Path, shape: Sequence[int] | None = None, *, bits: Sequence[int] = (8,)) -> np.ndarray:
    """Read a PNG of ids: int32 [H, W]. `bits` are the accepted bit depths, `shape` (H, W) is the image's size.

    The depth is read from the file's header: Pillow stretches gray images of 1, 2 and 4 bits to 0..255, which would
    turn one class into another.
    """
    wanted = " or ".join(map(str, bits))
    with _reading(path, "annotation"):
        with path.open("rb") as file:
            header = file.read(26)
        if not header.startswith(_SIGNATURE) or len(header) < 26:
            raise BadFrame(path, f"not a PNG; labels are {wanted}-bit PNGs (other formats change ids)")
        depth, kind = header[24], header[25]
        if kind not in (_GRAY, _PALETTE):
            raise BadFrame(path, f"a PNG in color, expected {wanted}-bit gray ids")
        if kind == _GRAY and depth not in bits:
            raise BadFrame(path, f"{depth}-bit gray, expected {wanted}-bit ids")
        with _opened(path) as image:
            ids = np.asarray(image).astype(np.int32)
    if shape is not None and ids.shape != tuple(shape[:2]):
        given, expected = (f"{size[1]}x{size[0]}" for size in (ids.shape, shape))
        raise BadFrame(path, f"annotation is {given}, the image {expected}")
    return ids


def read_label_colors(path: Path) -> np.ndarray:
    """Read a PNG of labels that are colors: uint8 [H, W, 3] RGB, of one with a palette the palette's colors."""
    with _reading(path, "annotation"):
        with path.open("rb") as file:
            if file.read(len(_SIGNATURE)) != _SIGNATURE:
                raise BadFrame(path, "not a PNG; labels are PNGs (other formats change colors)")
        with _opened(path) as image:
            if image.mode.startswith("I"):
                raise BadFrame(path, "has 16 bits a pixel; labels that are colors have 8 bits a channel")
            return np.asarray(image.convert("RGB"))


def read_matrix(path: Path, rows: int, columns: int) -> np.ndarray:
    """Read a text file of numbers: float64 [rows, columns]."""
    with _reading(path, "file", "is not a matrix of numbers"):
        size = path.stat().st_size
        if size > MATRIX_BYTES:
            raise BadFrame(path, f"has {size} bytes; a matrix of {rows}x{columns} numbers is accepted")
        values = [float(word) for word in path.read_text(encoding="utf-8-sig").split()]
    if len(values) != rows * columns:
        raise BadFrame(path, f"{len(values)} numbers, expected {rows}x{columns}")
    return np.array(values, dtype=np.float64).reshape(rows, columns)


def read_listing(path: Path, what: str = "list") -> list[str]:
    """Read the lines of a text file that names the parts of a data set. Raises `DataError` if it is no such file."""
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r}: the {what} cannot be read ({first_line(error)}).") from None
    for word in text.replace(",", " ").split():
        if (fault := name_fault(word)) is not None:
            raise DataError(f"{str(path)!r}: the {what} has a name that {fault}.")
    return text.splitlines()


def name_fault(name: str) -> str | None:
    """Why no file can have this name or path; None if one can. Asking the disk for such a file raises an error."""
    longest = max((len(part.encode("utf-8", "replace")) for part in name.split("/")), default=0)
    if "\0" in name:
        return "has a zero byte"
    return None if longest <= LONGEST_NAME else f"is {longest} bytes long; at most {LONGEST_NAME} are accepted"


def read_numbers(path: Path, counts: Sequence[int], what: str) -> np.ndarray:
    """Read a small text file of as many numbers as one of `counts`, float64 [N]; `what` says which, for messages.

    Numbers may be separated by commas; lines that begin with # are comments.
    """
    with _reading(path, "file", "is not a list of numbers"):
        size = path.stat().st_size
        if size > MATRIX_BYTES:
            raise BadFrame(path, f"has {size} bytes; accepted is {what}")
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        values = [float(word) for word in " ".join(lines).replace(",", " ").split()]
    if len(values) not in counts:
        raise BadFrame(path, f"{len(values)} numbers; accepted is {what}")
    return np.array(values, dtype=np.float64)


def read_pose(path: Path) -> np.ndarray:
    """Read a camera-to-world matrix, float64 [4, 4]; lost tracking (NaN, -inf) or no rigid motion is a bad frame."""
    pose = read_matrix(path, 4, 4)
    if (fault := pose_fault(pose)) is not None:
        raise BadFrame(path, f"pose {fault}")
    return pose


def read_intrinsics(path: Path, size: int = 3) -> np.ndarray:
    """Read the matrix of a pinhole camera, float64 [3, 3] pixels, from a file of `size` x `size` numbers."""
    matrix = read_matrix(path, size, size)
    if (fault := intrinsics_fault(matrix[:3, :3])) is not None:
        raise BadFrame(path, f"intrinsics {fault}")
    return matrix[:3, :3]


def pose_fault(pose: np.ndarray) -> str | None:
    """Why [4, 4] is no rigid motion in meters; None if it is one."""
    if not np.isfinite(pose).all():
        return "is not finite (tracking was lost)"
    rotation = pose[:3, :3]
    if np.abs(rotation).max() > 2 or np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.05:
        return "is not a rotation and a translation"
    if np.linalg.det(rotation) < 0:
        return "is not a rotation and a translation"
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > LAST_ROW:
        return f"has the last row {_row(pose[3])}, expected 0 0 0 1"
    if np.abs(pose[:3, 3]).max() > FARTHEST:
        return f"is {np.abs(pose[:3, 3]).max():.3g} m from the origin; at most {FARTHEST:g} m are accepted"
    return None


def intrinsics_fault(matrix: np.ndarray) -> str | None:
    """Why [3, 3] is no pinhole camera in pixels; None if it is one."""
    if not np.isfinite(matrix).all():
        return "are not finite"
    if np.abs(matrix[2] - (0, 0, 1)).max() > LAST_ROW:
        return f"have the last row {_row(matrix[2])}, expected 0 0 1"
    focal = matrix[0, 0], matrix[1, 1]
    if not all(SHORTEST <= length <= LONGEST for length in focal):
        return f"have the focal lengths {_row(focal)} pixels; {SHORTEST:g} to {LONGEST:g} are accepted"
    if abs(matrix[1, 0]) > LAST_ROW or np.abs(matrix[:2, 2]).max() > LONGEST:
        return f"are not those of a pinhole camera: {_row(matrix.reshape(-1))}"
    return None


def points_fault(points: np.ndarray, farthest: float = FARTHEST) -> str | None:
    """Why [N, 3] are no points in meters; None if they are. In float32, 1e300 would be infinite without a word."""
    wrong = int((~np.isfinite(points)).any(axis=1).sum())
    if wrong:
        return f"coordinates of {wrong} of {len(points)} points are not finite"
    far = float(max(points.max(initial=0), -points.min(initial=0)))
    return None if far <= farthest else f"a point is {far:.3g} m from the origin; at most {farthest:g} m are accepted"


def checked_points(path: Path, points: np.ndarray) -> np.ndarray:
    """Points [N, 3] in meters as float32; `BadFrame` with the file's path and the reason if they are none."""
    if (fault := points_fault(points)) is not None:
        raise BadFrame(path, fault)
    return points.astype(np.float32, copy=False)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key for sorting names whose numbers may lack zeros in front: "2" before "10"."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0] in "0123456789" else (1, 0, part) for part in parts]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file, from its header."""
    with _reading(path, "image"), _opened(path) as image:
        return image.size


@contextmanager
def loaded_arrays(path: Path, key: str | None = None) -> Iterator[Any]:
    """What `numpy.load` makes of a .npy or .npz file, without pickles; a damaged one is a `BadFrame`, also on access.

    `key`: the array that is wanted, for messages.

    An archive that would unpack to far more than it has bytes is refused before anything is unpacked.
    """
    try:
        if zipfile.is_zipfile(regular(path)):
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > max(UNPACKED, MOST_PACKED * path.stat().st_size):
                raise BadFrame(path, f"unpacks to {size} bytes, more than {MOST_PACKED} times its own")
        with path.open("rb") as file:
            yield np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise BadFrame(path, "file is missing") from None
    except BadFrame:
        raise
    # What zipfile, zlib and numpy raise: headers are parsed as Python's own text, and flags as features to come.
    except (*_DAMAGED, tokenize.TokenError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        what = "file" if key is None else f"array {key!r}"
        raise BadFrame(path, f"{what} cannot be read ({first_line(error)})") from None


def _row(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def visible(folder: Path, pattern: str) -> list[Path]:
    """`folder.glob(pattern)` sorted, without hidden files: macOS leaves a ._NAME beside each NAME on foreign disks."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def files_fingerprint(root: Path, paths: Iterable[Path]) -> str:
    """A sha256 over relative names, sizes and modification times: cheap; it changes when a file does."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        digest.update(f"{_below(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _below(path: Path, root: Path) -> Path:
    """A path as it is called from `root`; the whole path of one elsewhere, which a listing may name."""
    return path.relative_to(root) if path.is_relative_to(root) else path.absolute()


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Turn a `DataError` about a file into a `BadFrame` with its path: what the file belongs to is skipped and counted.

    A reader of one file, such as a mesh, does not know whether a program can go on without it.
    """
    try:
        yield
    except BadFrame:
        raise
    except DataError as error:
        raise BadFrame(path, str(error).removeprefix(f"{path}: ").rstrip(".")) from None


def sampled_digest(root: Path, paths: Iterable[Path]) -> str:
    """A sha256 over the bytes of at most `SAMPLED` files, evenly spaced by name; of a small data set over all of them.

    Beside `files_fingerprint`: it notices a file that was altered at equal size and time, if it is among these.
    """
    found = sorted(path for path in paths if path.is_file())
    count = min(SAMPLED, len(found))
    digest = hashlib.sha256()
    for path in (found[number * len(found) // count] for number in range(count)):
        name = f"{_below(path, root)}\0".encode(errors="surrogateescape")
        digest.update(name + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """Open an image of a format that is only decoded, and whose header states a size that a camera has."""
    try:
        opened = Image.open(path if data is None else io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:  # its own text has the name again, or an address in memory
        raise UnidentifiedImageError("cannot identify image file") from None
    with opened as image:
        if image.width * image.height > MOST_PIXELS:
            raise BadFrame(path, f"states {image.width}x{image.height} pixels; at most {MOST_PIXELS} are accepted")
        yield image


@contextmanager
def _reading(path: Path, what: str, fault: str = "cannot be read") -> Iterator[None]:
    """Turn errors of reading a file into a `BadFrame` that calls it `what`."""
    try:
        regular(path)
        yield
    except FileNotFoundError:
        raise BadFrame(path, f"{what} is missing") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        MemoryError,
        Image.DecompressionBombError,
    ) as error:  # zlib states any size
        raise BadFrame(path, f"{what} {fault} ({first_line(error)})") from None
