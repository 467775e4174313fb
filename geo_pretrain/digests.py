"""Digests of files: sha256, and XXH3, which is several times quicker."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

HASHED = 8 << 20  # bytes that are hashed at once


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def xxh3(path: Path) -> str:
    """Hex XXH3 digest (128 bits) of a file; read and not mapped: a map ends the process if the file is cut."""
    digest = xxh3_hasher()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(HASHED):
            digest.update(block)
    return str(digest.hexdigest())


def xxh3_hasher() -> Any:
    """A digest of XXH3 to update with bytes."""
    from xxhash import xxh3_128

    return xxh3_128()


def inventory_line(path: Path, role: str) -> dict[str, Any]:
    """What config.json says of a file: role, size and digests."""
    return {"role": role, "size": path.stat().st_size, "sha256": sha256(path), "xxh3": xxh3(path)}
