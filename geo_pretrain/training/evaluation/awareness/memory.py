"""Feature maps of all frames and layers in one file, which is mapped into memory: computed once, read by every measure.

Numbers are float16; each map is divided by its largest magnitude, which is stored beside it, so that none overflows.
The index is written last and names the file: one without, or of another network, frames or size, is replaced by a file
of another name. So a process that has the older one open goes on reading what it wrote, on Windows too.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geo_pretrain.errors import CheckpointError
from geo_pretrain.files import locked, read_sealed, write_sealed

FORMAT = 1
INDEX, CONTENT = "index.json", "features*.f16"


class FeatureMemory:
    """Maps by frame and layer, read from a memory map as float32."""

    def __init__(self, folder: Path) -> None:
        """Open what `remember` wrote."""
        tree = read_sealed(folder / INDEX)
        self.facts: dict[str, Any] = tree["facts"]
        self.layers: list[str] = tree["layers"]
        self._rows: list[list[Any]] = tree["rows"]  # of each frame, of each layer: [offset, shape, scale]
        content = folder / tree["content"]
        size = content.stat().st_size // 2
        if size != tree["size"]:
            raise CheckpointError(f"{content}: {size} numbers, expected {tree['size']}.")
        self._content = np.memmap(content, np.float16, "r") if size else np.zeros(0, np.float16)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, frame: int, layer: int) -> Tensor:
        """A map in the shape in which it was given: float32, in memory of its own."""
        offset, shape, scale = self._rows[frame][layer]
        part = self._content[offset : offset + int(np.prod(shape))]
        return torch.from_numpy(part.astype(np.float32)).reshape(shape) * scale


def remember(
    folder: Path,
    layers: Sequence[str],
    maps: Callable[[int], Sequence[Tensor]],
    count: int,
    facts: Mapping[str, Any],
    progress: Callable[[], None] = lambda: None,
) -> FeatureMemory:
    """Open the maps of `count` frames in `folder`, or compute and store them: `maps(frame)` gives those of one.

    `facts` are what they depend on, plain JSON types: maps of others are replaced. `progress` is called after each
    frame. One process at a time: another one waits, and then finds the maps or makes its own.
    """
    wanted = {"format": FORMAT, **facts}
    kept = _kept(folder, wanted)  # without the lock, which not everybody may write; the index comes last
    if kept is None:
        with locked(folder, stacklevel=2):
            kept = _kept(folder, wanted)
            if kept is None:
                _write(folder, layers, (maps(frame) for frame in range(count)), wanted, progress)
                return FeatureMemory(folder)
    for _ in range(count):
        progress()
    return kept


def _write(
    folder: Path,
    layers: Sequence[str],
    frames: Iterable[Sequence[Tensor]],
    facts: Mapping[str, Any],
    progress: Callable[[], None],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob(CONTENT):
        with suppress(PermissionError):  # Windows, where it is open
            old.unlink()
    name = CONTENT.replace("*", f"-{secrets.token_hex(4)}")
    rows, size = [], 0
    with (folder / name).open("xb") as file, torch.no_grad():
        for maps in frames:
            row = []
            for one in maps:
                largest = float(one.abs().max()) if one.numel() else 0.0
                scale = largest if 0 < largest < float("inf") else 1.0
                (one / scale).cpu().half().numpy().tofile(file)
                row.append([size, list(one.shape), scale])
                size += one.numel()
            rows.append(row)
            progress()
    tree = {"facts": dict(facts), "layers": list(layers), "rows": rows, "size": size, "content": name}
    write_sealed(folder / INDEX, tree)


def _kept(folder: Path, facts: Mapping[str, Any]) -> FeatureMemory | None:
    try:
        kept = FeatureMemory(folder)
    except (OSError, CheckpointError, KeyError, TypeError, ValueError):
        return None
    return kept if kept.facts == facts else None


def network_digest(network: nn.Module) -> str:
    """A sha256 (hex) over names, types, shapes and values of a network's tensors."""
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def feature_folder(kept: Path | None) -> Iterator[Path]:
    """The folder of feature maps: one to keep, or a temporary one."""
    if kept is not None:
        yield kept
        return
    with TemporaryDirectory(prefix="geo-pretrain-features-") as folder:
        yield Path(folder)
