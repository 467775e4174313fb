"""Frames in tar files, as the library webdataset lays them out: few large files for network disks.

A shard is a tar. Files that follow each other and share a name up to the first dot behind the last slash are one
sample; what follows that dot says what a file is (webdataset's `base_plus_ext`,
https://github.com/webdataset/webdataset/blob/main/webdataset/tariterators.py):

    SCENE/000000.color.jpg    8-bit color (.color.png, .jpg, .png, .jpeg, .webp too)
    SCENE/000000.depth.png    16-bit gray, `depth_scale` values per meter; .depth.tif; .depth.npy
    SCENE/000000.json         {"intrinsics": 3x3 or [fx, fy, cx, cy] of the depth image, "cam_to_world": 4x4,
                              "depth_scale": 1000, "scene": NAME, "frame": NAME}; only the first is needed
    SCENE/000000.semantic.png, .instance.png (or .npy)    ids, where there are any

Without a "scene" it is the folder, else the name of the shard. Frames are read by random access: an index of bytes
lies beside a shard (`geo-pretrain data shards` writes it), or is made in one pass over the headers and cached.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, CheckpointError, DataError, first_line
from geo_pretrain.files import parse_json, read_sealed, write_sealed
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.sources.conventions import (
    Assembly,
    Camera,
    Conventions,
    FolderOptions,
    camera_matrix,
    checked_camera,
    stated,
    z_up,
)
from geo_pretrain.training.data.sources.recording import existing_folder, files_below, hint

KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's: a sample's name, and what a file of it is
COLORS = ("color.jpg", "color.png", "color.jpeg", "color.webp", "jpg", "png", "jpeg", "webp")
DEPTHS = ("depth.png", "depth.npy", "depth.tif")
IDS: dict[str, type[np.signedinteger[Any]]] = {"semantic": np.int16, "instance": np.int32}
JSON_BYTES = 1 << 16
VERSION = 1

Members = Mapping[str, tuple[int, int]]  # what a file of a sample is -> its first byte and its size


@dataclass(frozen=True)
class ShardsOptions(FolderOptions):
    """Options of the source."""


@dataclass(frozen=True)
class Sample:
    """Where a frame lies."""

    shard: Path
    key: str
    scene: str
    frame: str
    posed: bool
    members: Members


class Shards:
    """A folder of tar files as a source of frames."""

    name = "shards"

    def __init__(self, root: Path, options: ShardsOptions) -> None:
        existing_folder(root, "tar files (shards)")
        self.root, self.config, self.assembly = root, options, Assembly(Conventions(), options)
        self.conventions = self.assembly.conventions
        self.shards = sorted(
            files_below(root, "*.tar"), key=lambda path: files.natural_order(path.relative_to(root).as_posix())
        )
        there = set(self.shards)
        for index_file in sorted(files_below(root, "*.tar.index.json")):
            if (shard := index_file.with_name(index_file.name.removesuffix(".index.json"))) not in there:
                raise DataError(f"{shard} is missing, its index is there: copy it, or remove {index_file.name}.")
        self._samples: dict[str, dict[str, Sample]] = {}
        notes = []
        for shard in self.shards:
            index = read_index(shard)
            notes.append(str(index["note"]))
            for sample in samples_of(shard, index):
                known = self._samples.setdefault(sample.scene, {}).setdefault(sample.frame, sample)
                if known is not sample:
                    raise DataError(f"Frame {sample.scene}/{sample.frame} is in {known.shard} and again in {shard}.")
        self._note = next((note for note in notes if note), "")
        if not self._samples:
            raise DataError(f"No frame in tar files in {str(root)!r}.{hint(root, self.name)}")

    @property
    def note(self) -> str:
        """What was unusual in the frames when they were written."""
        return "; ".join(part for part in (self.assembly.note(), self._note) if part)

    def scenes(self) -> list[str]:
        return list(self._samples)

    def frame_ids(self, scene: str) -> list[str]:
        return list(self._samples[scene])

    def load(self, scene: str, frame_id: str) -> Frame:
        sample = self._samples[scene][frame_id]
        with _of(sample):
            return self._frame(sample, _read(sample))

    def raw_depth(self, scene: str, frame_id: str) -> np.ndarray:
        """Read the stored values of a frame's depth, [H, W]."""
        sample = self._samples[scene][frame_id]
        with _of(sample):
            return _values(sample.shard, _read(sample), "depth", DEPTHS)

    def unposed(self) -> list[str]:
        return [
            scene for scene, samples in self._samples.items() if not any(sample.posed for sample in samples.values())
        ]

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of the shards, and of the options."""
        of_files = files.files_fingerprint(self.root, self.shards)
        options = json.dumps(stated(self.config), sort_keys=True)
        return hashlib.sha256(f"{self.assembly.digest(of_files)}\0{options}".encode()).hexdigest()

    def content(self) -> str:
        """A digest of the bytes of some frames, evenly spaced: shards are too large to be read whole."""
        samples = [sample for scene in self._samples.values() for sample in scene.values()]
        count, digest = min(files.SAMPLED, len(samples)), hashlib.sha256()
        for sample in (samples[number * len(samples) // count] for number in range(count)):
            with _of(sample):
                for kind, data in sorted(_read(sample).items()):
                    digest.update(f"{sample.key}.{kind}\0".encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def depth_scale(self, scene: str) -> float:
        """Stored values of depth per meter: the option, or what the scene's first frame says, or millimeters."""
        sample = next(iter(self._samples[scene].values()))
        stated = self._stated_scale(_facts(sample.shard, _read(sample).get("json")))
        return self.conventions.depth_scale if stated is None else stated

    def _stated_scale(self, facts: Mapping[str, Any]) -> float | None:
        scale = facts.get("depth_scale")
        given = self.config.depth_scale is None and isinstance(scale, int | float) and 0 < scale < 1e9
        return float(scale) if given and scale is not None else None

    def _frame(self, sample: Sample, parts: Mapping[str, bytes]) -> Frame:
        path, facts = sample.shard, _facts(sample.shard, parts.get("json"))
        stated = self._stated_scale(facts)
        scale = self.conventions.depth_scale if stated is None else stated
        floats = stated is not None or self.conventions.float_depth
        depth = files.meters_of(path, _values(path, parts, "depth", DEPTHS), scale=scale, floats=floats)
        kind = next((kind for kind in COLORS if kind in parts), None)
        if kind is None:
            raise BadFrame(path, f"has no color image; accepted are {', '.join(COLORS)}")
        color = files.read_frame_color(path, parts[kind])
        pose = z_up("-y")
        if facts.get("cam_to_world") is not None:
            pose = self.conventions.cam_to_world(_matrix(path, facts, "cam_to_world", (4, 4)), path)
        camera = self.assembly.camera or _camera(path, facts)
        color, depth, matrix, pose = self.assembly.images(color, depth, camera, pose, path, path)
        ids = {}
        for name, dtype in IDS.items():
            kinds = (f"{name}.png", f"{name}.npy")
            if any(kind in parts for kind in kinds):
                values = _values(path, parts, name, kinds)
                if values.shape != depth.shape or values.dtype.kind not in "ui":
                    raise BadFrame(
                        path, f"{name} is {list(values.shape)} of {values.dtype}, expected {list(depth.shape)}"
                    )
                ids[name] = values.astype(dtype)
        posed = facts.get("cam_to_world") is not None
        return Frame(sample.scene, sample.frame, color, depth, matrix, pose, **ids, posed=posed)


def index_path(shard: Path) -> Path:
    """The index beside a shard."""
    return shard.with_name(f"{shard.name}.index.json")


def read_index(shard: Path) -> dict[str, Any]:
    """The index of a shard: the one beside it or in the cache, else made now and cached; see `make_index`.

    One that belongs to other bytes, or is damaged, is not used.
    """
    try:
        stat = shard.stat()
    except OSError as error:
        raise BadFrame(shard, f"cannot be read ({error.strerror})") from None
    key = f"{VERSION}\0{shard.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    cached = default_cache() / "shards" / f"{shard.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    for path in (index_path(shard), cached):
        try:
            index = read_sealed(path)
            samples_of(shard, index)
            if index["version"] == VERSION and index["bytes"] == stat.st_size:
                return index
            if index["version"] == VERSION and path == index_path(shard):
                raise DataError(
                    f"{shard} has {stat.st_size} bytes, the index beside it was made of {index['bytes']} with "
                    f"{len(index['samples'])} frames: it was cut off or replaced. Write it again by `geo-pretrain data "
                    f"shards`, or remove {path.name} to read what is there."
                )
        except (OSError, CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            continue
    index = make_index(shard)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(cached, index)
    except OSError as error:
        raise DataError(
            f"Cannot write the index of {str(shard)!r} to {str(cached)!r} ({error.strerror}). "
            "Set GEO_PRETRAIN_CACHE to a folder that can be written."
        ) from error
    return index


def make_index(shard: Path) -> dict[str, Any]:
    """Find all samples of a shard in one pass over its headers; of contents only the small .json files are read.

    {"version", "bytes": of the shard, "note", "samples": [[key, scene, frame, posed, {kind: [first byte, size]}]]}.
    A shard that was cut off yields the samples that it holds whole.
    """
    samples: list[list[Any]] = []
    note = ""
    size = shard.stat().st_size
    for key, members in _grouped(shard, size):
        facts = {}
        if "json" in members:
            try:
                facts = _facts(shard, _pick(shard, {"json": members["json"]})["json"])
            except BadFrame:  # told when the frame is loaded
                facts = {}
        elif not any(kind in members for kind in (*COLORS, *DEPTHS)):
            continue
        folder, _, name = key.rpartition("/")
        scene, frame = facts.get("scene"), facts.get("frame")
        scene = scene if isinstance(scene, str) and scene else folder or shard.stem
        frame = frame if isinstance(frame, str) and frame else name
        note = note or str(facts.get("note", ""))
        samples.append(
            [key, scene, frame, facts.get("cam_to_world") is not None, {k: list(v) for k, v in members.items()}]
        )
    return {"version": VERSION, "bytes": size, "note": note, "samples": samples}


def samples_of(shard: Path, index: Mapping[str, Any]) -> list[Sample]:
    """The samples that an index lists."""
    return [
        Sample(
            shard, str(key), str(scene), str(frame), bool(posed), {str(k): (int(a), int(n)) for k, (a, n) in at.items()}
        )
        for key, scene, frame, posed, at in index["samples"]
    ]


def _grouped(shard: Path, size: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Samples by name: files that follow each other and share it."""
    current, members = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                match = KEY.match(member.name)
                if not member.isreg() or match is None:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} ends behind its end")
                key, kind = match[1].removeprefix("./"), match[2].lower()
                if key != current and members:
                    yield current, members
                    members = {}
                current = key
                members[kind] = (member.offset_data, member.size)
                archive.members = []  # type: ignore[attr-defined]  # or a list of all of them is kept
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        if not members and not current:
            raise BadFrame(shard, f"is no tar file ({first_line(error)})") from None
        warnings.warn(
            f"{shard} is cut off or damaged ({first_line(error)}): frames after it are left out.", stacklevel=2
        )
    if members:
        yield current, members


def _read(sample: Sample) -> dict[str, bytes]:
    """The bytes of a frame's files."""
    return _pick(sample.shard, sample.members)


def _pick(shard: Path, members: Members) -> dict[str, bytes]:
    """Bytes of files of a shard, which lie side by side, in one read."""
    begin, end = min(at for at, _ in members.values()), max(at + size for at, size in members.values())
    needed = sum(size for _, size in members.values())
    try:
        with shard.open("rb", buffering=0) as file:
            if end - begin <= 2 * needed + (1 << 16):
                file.seek(begin)
                data = file.read(end - begin)
                parts = {kind: data[at - begin : at - begin + size] for kind, (at, size) in members.items()}
            else:
                parts = {}
                for kind, (at, size) in members.items():
                    file.seek(at)
                    parts[kind] = file.read(size)
    except (OSError, ValueError, OverflowError) as error:
        raise BadFrame(shard, f"cannot be read ({first_line(error)})") from None
    for kind, (_, size) in members.items():
        if len(parts[kind]) != size:
            raise BadFrame(shard, f"file ends too early, in a .{kind}")
    return parts


class _of:  # noqa: N801 - used as a function
    """Name the sample in a `BadFrame` about its shard."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, BadFrame) and error.path == str(self.sample.shard):
            raise BadFrame(f"{self.sample.shard}/{self.sample.key}", error.reason) from None


def _values(path: Path, parts: Mapping[str, bytes], what: str, kinds: tuple[str, ...]) -> np.ndarray:
    """Decode an image of numbers [H, W], of the first kind that is there."""
    kind = next((kind for kind in kinds if kind in parts), None)
    if kind is None:
        raise BadFrame(path, f"has no {what} image; accepted are {', '.join(kinds)}")
    if kind.endswith(".npy"):
        return files.read_map(path, parts[kind], what)
    return files.read_raw_depth(path, parts[kind])


def _facts(path: Path, data: bytes | None) -> dict[str, Any]:
    """What the .json of a sample says; nothing without one."""
    if data is None:
        return {}
    try:
        tree = parse_json(data) if len(data) <= JSON_BYTES else None
    except ValueError as error:
        raise BadFrame(path, f"its .json cannot be read ({first_line(error)})") from None
    if not isinstance(tree, dict):
        raise BadFrame(path, "its .json is no JSON object of a frame")
    return tree


def _matrix(path: Path, facts: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        matrix = np.array(facts[name], dtype=np.float64)
    except (KeyError, ValueError, TypeError, OverflowError):
        matrix = np.zeros(0)
    if matrix.shape != shape:
        raise BadFrame(path, f"its .json has no '{name}' of {'x'.join(map(str, shape))} numbers")
    return matrix


def _camera(path: Path, facts: Mapping[str, Any]) -> Camera:
    given = facts.get("intrinsics")
    if isinstance(given, list) and len(given) == 4:
        return checked_camera(path, camera_matrix(*_matrix(path, facts, "intrinsics", (4,))))
    return checked_camera(path, _matrix(path, facts, "intrinsics", (3, 3)))
