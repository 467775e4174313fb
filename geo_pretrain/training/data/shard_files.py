"""Write the frames of any source into shards: tar files in webdataset's layout, see `sources.shards`."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geo_pretrain.errors import BadFrame, CheckpointError, DataError, RecipeError
from geo_pretrain.files import atomic_write, parse_json, read_sealed, write_sealed
from geo_pretrain.progress import already
from geo_pretrain.training.data.frame import Frame, SkippedFrames, Source, resize_frame
from geo_pretrain.training.data.sources.registry import source_note
from geo_pretrain.training.data.sources.shards import index_path, make_index

SCALES = (1000, 5000, 4000, 10000)  # values per meter that 16 bits may hold exactly
AT_ONCE = 32  # frames that are in memory


@dataclass
class WrittenShards:
    """What a call wrote."""

    made: int = 0  # shards
    present: int = 0  # shards that were there before
    frames: int = 0  # of both
    bytes: int = 0
    skips: SkippedFrames = field(default_factory=SkippedFrames)


def write_shards(
    source: Source,
    out: Path,
    *,
    frames: int = 1000,
    size: tuple[int, int] | None = None,
    jpeg: int | None = None,
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenShards:
    """Write all frames of a source into `out`/000000.tar, 000001.tar, ..., scene by scene in order of time.

    Args:
        frames: number of frames of a shard.
        size: (height, width) that frames are reduced to, at the nearest pixels as for training; None: as they are.
        jpeg: quality of color, 1..95; None: PNG, so that frames come back bit for bit.
        shard: (I, N) writes every N-th shard, from the I-th on, I = 1..N: for N machines that share `out`.
        workers: threads that read and encode side by side.

    A shard is written whole or not at all, and kept if it holds these frames already: the same call goes on. Frames
    that cannot be read are left out and counted. Raises `DataError` when no frame is left, or `out` holds other shards.
    """
    if not 1 <= shard[0] <= shard[1]:
        raise RecipeError(f"Shard {shard[0]}/{shard[1]} is given; accepted: I/N with I from 1 to N.")
    every = [(scene, id) for scene in source.scenes() for id in source.frame_ids(scene)]
    parts = [every[at : at + frames] for at in range(0, len(every), frames)]
    result, mine = WrittenShards(), list(enumerate(parts))[shard[0] - 1 :: shard[1]]
    for done, (number, names) in enumerate(mine, 1):
        path = out / f"{number:06d}.tar"
        made_from = _identity(source, names, size, jpeg)
        index, report = _present(path, made_from), progress
        if index is None:
            index = _write(source, path, names, made_from, lambda frame: encode(frame, size, jpeg), workers)
            result.made += 1
        else:
            result.present += 1
            report = partial(already, progress)
        result.frames += len(index["samples"])
        result.bytes += index["bytes"]
        result.skips.reasons.update(index["skips"])
        if report is not None:
            report(done, len(mine))
    if mine and not result.frames:
        raise DataError(f"No frame of source {source.name!r} can be read.\n{result.skips.summary()}")
    return result


def encode(frame: Frame, size: tuple[int, int] | None = None, jpeg: int | None = None) -> dict[str, bytes]:
    """The files of a sample by what they are: "color.png", "depth.png", "json", ...; depth is exact."""
    frame = frame if size is None else resize_frame(frame, size)
    depth, scale = _encoded_depth(frame.depth)
    parts = {"color.png" if jpeg is None else "color.jpg": _image(frame.color, jpeg), **depth}
    for name in ("semantic", "instance"):
        ids = getattr(frame, name)
        if ids is not None and ids.min() >= 0 and ids.max() < 1 << 16:
            parts[f"{name}.png"] = _image(ids.astype(np.uint16))
        elif ids is not None:
            parts[f"{name}.npy"] = _array(ids)
    facts = {
        "scene": frame.scene,
        "frame": frame.id,
        "intrinsics": frame.intrinsics.tolist(),
        "cam_to_world": frame.cam_to_world.tolist() if frame.posed else None,
        "depth_scale": scale,
    }
    return parts | {"json": json.dumps(facts).encode()}


def _encoded_depth(depth: np.ndarray) -> tuple[dict[str, bytes], int]:
    """Depth in meters as 16-bit gray where that is exact, else as float32; and the values per meter."""
    for scale in SCALES:
        stored = np.round(depth.astype(np.float64) * scale)
        if stored.max() < 65535 and np.array_equal((stored / scale).astype(np.float32), depth):
            return {"depth.png": _image(stored.astype(np.uint16))}, scale
    return {"depth.npy": _array(depth)}, 1


def _image(pixels: np.ndarray, jpeg: int | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if jpeg is None:
        image.save(buffer, "PNG", compress_level=4)
    else:
        image.save(buffer, "JPEG", quality=jpeg)
    return buffer.getvalue()


def _array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _identity(
    source: Source, names: list[tuple[str, str]], size: tuple[int, int] | None, jpeg: int | None
) -> dict[str, Any]:
    """What a shard is made from."""
    listed = json.dumps(names)
    return {
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "frames": hashlib.sha256(listed.encode()).hexdigest(),
        "size": None if size is None else list(size),
        "jpeg": jpeg,
    }


def _present(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The index of a shard that is there. Raises `DataError` for one of other frames."""
    if not path.exists():
        return None
    try:
        index = read_sealed(index_path(path))
        if index["bytes"] != path.stat().st_size:
            return None
        if index["made_from"] == made_from:
            return index
    except (OSError, CheckpointError, KeyError, TypeError):
        return None  # it was broken off between the two files, or damaged
    raise DataError(f"{path} holds other frames, or of other settings. Choose another --out, or remove that folder.")


def _write(
    source: Source,
    path: Path,
    names: list[tuple[str, str]],
    made_from: dict[str, Any],
    encode: Callable[[Frame], dict[str, bytes]],
    workers: int,
) -> dict[str, Any]:
    skips, note = SkippedFrames(), source_note(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, tarfile.open(part, "w") as archive:
        for number, (scene, item) in enumerate(_encoded(source, names, encode, workers)):
            if isinstance(item, BadFrame):
                skips.add(item)
                continue
            if note:
                item["json"] = json.dumps({**parse_json(item["json"]), "note": note}).encode()
            for kind, data in item.items():
                member = tarfile.TarInfo(f"{scene}/{number:06d}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    index = make_index(path) | {"made_from": made_from, "skips": skips.reasons}
    write_sealed(index_path(path), index)
    return index


def _encoded(
    source: Source, names: list[tuple[str, str]], encode: Callable[[Frame], dict[str, bytes]], workers: int
) -> Iterator[tuple[str, dict[str, bytes] | BadFrame]]:
    """Each frame's scene and files, in order; a `BadFrame` for one that cannot be read."""

    def one(name: tuple[str, str]) -> tuple[str, dict[str, bytes] | BadFrame]:
        try:
            return name[0], encode(source.load(*name))
        except BadFrame as bad:
            return name[0], bad

    with ThreadPoolExecutor(workers) as pool:
        for at in range(0, len(names), AT_ONCE):
            yield from pool.map(one, names[at : at + AT_ONCE])
