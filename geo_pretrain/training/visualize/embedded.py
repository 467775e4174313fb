"""Features small enough for a page: their main directions as 8-bit numbers, which a browser compares by cosine."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geo_pretrain.seeding import seeded

DIRECTIONS, ENERGY = 64, 0.9999  # at most so many, and no more than keep this share of the features' squared length
EXACT = 512  # channels up to which all directions are computed; of more, the first ones by subspace iteration
_PLACE = "__SCENE__"  # in the pages


@dataclass(frozen=True)
class Embedded:
    """Features of one space, as a page holds them: component k of a row is codes[:, k] * scales[k]."""

    codes: tuple[np.ndarray, ...]  # int8 [M_i, K]
    scales: np.ndarray  # float32 [K]
    energy: float  # share of the squared length of all features that K directions keep

    def rows(self, number: int) -> Tensor:
        """The features float32 [M, K] that the page compares."""
        return torch.from_numpy(self.codes[number].astype(np.float32) * self.scales)


def embed(parts: Sequence[Tensor]) -> Embedded:
    """Reduce unit features [M_i, C] to shared directions, not centered, so that inner products stay, and round them."""
    rows = torch.cat([part.float() for part in parts])
    if rows.shape[1] <= EXACT:
        values, axes = torch.linalg.eigh((rows.T @ rows).double())
        values, axes = values.flip(0).clamp(min=0), axes.flip(1).float()
        total = float(values.sum())
    else:
        with seeded(0):
            _, lengths, axes = torch.svd_lowrank(rows, q=min(DIRECTIONS + 16, *rows.shape), niter=4)
        values, total = lengths.double() ** 2, float(rows.double().square().sum())
    shares = values.cumsum(0) / max(total, 1e-12)
    count = min(DIRECTIONS, len(shares), 1 + int((shares < ENERGY).sum()))
    reduced = [part.float() @ axes[:, :count] for part in parts]
    largest = torch.stack([part.abs().amax(0) for part in reduced if len(part)]).amax(0).clamp(min=1e-12)
    codes = tuple((part / largest * 127).round().to(torch.int8).numpy() for part in reduced)
    return Embedded(codes, (largest / 127).numpy(), float(shares[count - 1]))


def encode(array: np.ndarray) -> str:
    """The bytes of an array for a page, little-endian, in base64."""
    return base64.b64encode(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def encode_rows(index: np.ndarray) -> dict[str, Any]:
    """Row numbers [...], -1 for none, as "index" of 2 or 4 bytes ("wide"); the largest number of either is none."""
    wide = int(index.max(initial=0)) >= 0xFFFF
    return {"index": encode(index.astype(np.uint32 if wide else np.uint16)), "wide": wide}


def encode_picture(pixels: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as the address of a PNG that a page holds."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def fill_page(page: Path, scene: Any) -> str:
    """Put a scene into a page; "</script>" in a name would end the element that holds it."""
    return page.read_text(encoding="utf-8").replace(_PLACE, json.dumps(scene).replace("<", "\\u003c"))
