"""ScanNet's .sens files: all frames of a scan in one file, read by random access without extracting it.

Little-endian. Header: u32 version (4), u64 length and the sensor's name, four row-major float32 4x4 matrices
(intrinsics and extrinsics of color, of depth), i32 color codec (0 raw, 1 PNG, 2 JPEG), i32 depth codec (0 raw, 1 zlib,
of u16), u32 width and height of color, of depth, f32 depth values per meter, u64 number of frames. A frame: float32 4x4
camera-to-world, u64 times of color and depth, u64 bytes of color and depth, then both. Source: ScanNet's SensReader
(https://github.com/ScanNet/ScanNet/tree/master/SensReader).

An index of the frames is made in one pass that reads 96 bytes a frame, and cached by the file's name, size and time.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from geo_pretrain.errors import BadFrame, first_line
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.training.data import files
from geo_pretrain.training.data.cache import cached_arrays

VERSION = 4
LONGEST_NAME = 1 << 10
FRAME = np.dtype([("pose", "<f4", (4, 4)), ("times", "<u8", (2,)), ("bytes", "<u8", (2,))])  # 96 bytes
RAW, PNG, JPEG = 0, 1, 2
ZLIB = 1


@dataclass(frozen=True)
class SensHeader:
    """The header of a .sens file."""

    path: Path
    color_intrinsics: np.ndarray  # float64 [3, 3] pixels
    depth_intrinsics: np.ndarray
    color_codec: int
    depth_codec: int
    color_size: tuple[int, int]  # height, width
    depth_size: tuple[int, int]
    depth_shift: float  # depth values per meter
    frames: int
    start: int  # byte of the first frame


def read_header(path: Path) -> SensHeader:
    """Read the header. Raises `BadFrame` for a missing file or one of another format."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            version, length = struct.unpack("<IQ", _take(file, 12, path))
            if version != VERSION or length > LONGEST_NAME:
                raise BadFrame(path, f"is no .sens file of version {VERSION} (version {version})")
            _take(file, length, path)
            matrices = np.frombuffer(_take(file, 4 * 64, path), "<f4").reshape(4, 4, 4).astype(np.float64)
            numbers = struct.unpack("<iiIIIIfQ", _take(file, 36, path))
            start = file.tell()
    except OSError as error:
        raise BadFrame(path, f"cannot be read ({error.strerror})") from None
    color_codec, depth_codec, color_width, color_height, depth_width, depth_height, shift, count = numbers
    if color_codec not in (RAW, PNG, JPEG) or depth_codec not in (RAW, ZLIB):
        raise BadFrame(
            path, f"codecs are {color_codec} (color) and {depth_codec} (depth); 0 to 2 and 0, 1 are accepted"
        )
    for width, height in ((color_width, color_height), (depth_width, depth_height)):
        if not 0 < width * height <= files.MOST_PIXELS:
            raise BadFrame(path, f"states images of {width}x{height} pixels; at most {files.MOST_PIXELS} are accepted")
    if not 0 < shift < 1e9:
        raise BadFrame(path, f"states {shift:g} depth values per meter; a number above 0 is accepted")
    if count * FRAME.itemsize > size:
        raise BadFrame(path, f"states {count} frames, more than its {size} bytes hold")
    color, depth = matrices[0, :3, :3], matrices[2, :3, :3]
    sizes = (color_height, color_width), (depth_height, depth_width)
    return SensHeader(path, color, depth, color_codec, depth_codec, *sizes, shift, count, start)


class SensFile:
    """A scan in a .sens file: `pose`, `color` and `stored_depth` of each frame by its number."""

    def __init__(self, path: Path, cache_dir: Path | None = None) -> None:
        self.path, self.header = path, read_header(path)
        self._cache_dir = cache_dir
        self._index: Mapping[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.header.frames

    def pose(self, number: int) -> np.ndarray:
        """The camera-to-world pose as it is stored, float64 [4, 4]; -inf where tracking was lost."""
        return self._entry("poses", number).astype(np.float64)

    def color(self, number: int) -> np.ndarray:
        """The color image, uint8 [H, W, 3] RGB."""
        data, header = self._blob(number, 0), self.header
        if header.color_codec == RAW:
            if len(data) != header.color_size[0] * header.color_size[1] * 3:
                raise BadFrame(self._frame(number), f"color has {len(data)} bytes")
            return np.frombuffer(data, np.uint8).reshape(*header.color_size, 3)
        try:
            return files.read_frame_color(self.path, data)
        except BadFrame as bad:
            raise BadFrame(self._frame(number), bad.reason) from None

    def stored_depth(self, number: int) -> np.ndarray:
        """The depth image as it is stored, uint16 [H, W]."""
        data, size = self._blob(number, 1), 2 * self.header.depth_size[0] * self.header.depth_size[1]
        if self.header.depth_codec == ZLIB:
            try:
                data = zlib.decompressobj().decompress(data, size + 1)
            except zlib.error as error:
                raise BadFrame(self._frame(number), f"depth cannot be unpacked ({first_line(error)})") from None
        if len(data) != size:
            raise BadFrame(self._frame(number), f"depth has {len(data)} bytes, expected {size}")
        return np.frombuffer(data, "<u2").reshape(self.header.depth_size)

    def _blob(self, number: int, part: int) -> bytes:
        """The bytes of a frame's color (0) or depth (1)."""
        offset, sizes = int(self._entry("offsets", number)), self._entry("bytes", number)
        try:
            with self.path.open("rb") as file:
                file.seek(offset + FRAME.itemsize + (int(sizes[0]) if part else 0))
                return _take(file, int(sizes[part]), self._frame(number))
        except OSError as error:
            raise BadFrame(self.path, f"cannot be read ({error.strerror})") from None

    def _entry(self, name: str, number: int) -> np.ndarray:
        if self._index is None:
            self._index = cached_arrays(self._index_path(), lambda: index_frames(self.header), "index of frames")
        rows = self._index[name]
        if not 0 <= number < len(rows):
            raise BadFrame(self._frame(number), f"is missing: the file ends after {len(rows)} frames")
        return rows[number]

    def _frame(self, number: int) -> str:
        """What a broken frame is called in messages: each is counted."""
        return f"{self.path}: frame {number}"

    def _index_path(self) -> Path:
        stat = self.path.stat()
        key = f"1\0{self.path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        name = f"{self.path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        return (self._cache_dir or default_cache()) / "sens" / name


def beginning(path: Path, count: int = 1 << 16) -> bytes:
    """The first bytes of a file, for digests of its content; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


@lru_cache(maxsize=64)
def open_sens(path: Path, changed: int) -> SensFile:
    """Open a scan, and keep it while it is among the last 64; `changed`: the time of the file in nanoseconds."""
    return SensFile(path)


def index_frames(header: SensHeader) -> dict[str, np.ndarray]:
    """Find all frames in one pass: offsets int64 [N], bytes int64 [N, 2] of color and depth, poses float32 [N, 4, 4].

    A file that was cut yields the frames that it holds.
    """
    size = header.path.stat().st_size
    offsets, sizes, poses, at = [], [], [], header.start
    try:
        with header.path.open("rb", buffering=0) as file:
            for _ in range(header.frames):
                file.seek(at)
                head = file.read(FRAME.itemsize)
                if len(head) < FRAME.itemsize:
                    break
                row = np.frombuffer(head, FRAME)[0]
                blobs = [int(count) for count in row["bytes"]]
                if at + FRAME.itemsize + sum(blobs) > size:
                    break
                offsets.append(at)
                sizes.append(blobs)
                poses.append(row["pose"])
                at += FRAME.itemsize + sum(blobs)
    except OSError as error:
        raise BadFrame(header.path, f"cannot be read ({error.strerror})") from None
    return {
        "offsets": np.array(offsets, np.int64),
        "bytes": np.array(sizes, np.int64).reshape(-1, 2),
        "poses": np.array(poses, np.float32).reshape(-1, 4, 4),
    }


def _take(file: IO[bytes], count: int, path: object) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise BadFrame(path, "file ends too early")
    return data
