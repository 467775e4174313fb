"""Write labelled images in the data sets' own layouts and formats, at sizes that tests can afford."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colors, so that JPEG keeps them within a few gray values."""
    corners = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def random_objects(
    rng: np.random.Generator, height: int, width: int, labels: list[int], count: int = 7
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes painted over one another: labels [H, W] and the number of each object among those of its label [H, W]."""
    label, number = np.zeros((2, height, width), np.int64)
    counts: dict[int, int] = {}
    for _ in range(count):
        chosen = int(rng.choice(labels))
        counts[chosen] = counts.get(chosen, 0) + 1
        top, left = int(rng.integers(0, height - 8)), int(rng.integers(0, width - 8))
        bottom, right = top + int(rng.integers(4, height)), left + int(rng.integers(4, width))
        label[top:bottom, left:right], number[top:bottom, left:right] = chosen, counts[chosen]
    return label, number


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def png_bytes(rows: list[bytes], width: int, bits: int, color: int, chunks: bytes = b"") -> bytes:
    """A PNG written by hand: any depth and color type; `rows` are packed pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_scannet_frame(root: Path, scene: str, frame: int, image, label, number, *, label_bits: int = 8) -> None:
    """One frame of scannet_frames_25k: JPEG color, nyu40 label and 16-bit label * 1000 + number."""
    save(root / scene / "color" / f"{frame:06d}.jpg", image, quality=95)
    save(root / scene / "label" / f"{frame:06d}.png", label.astype(np.uint8 if label_bits == 8 else np.uint16))
    save(root / scene / "instance" / f"{frame:06d}.png", (label * 1000 + number).astype(np.uint16))
    (root / scene / "pose").mkdir(exist_ok=True)
    np.savetxt(root / scene / "pose" / f"{frame:06d}.txt", np.eye(4))


def write_nyuv2_image(folder: Path, number: int, image, label, instance) -> None:
    """One image of train/ or val/: 8-bit PNGs."""
    save(folder / "color" / f"nyu_rgb_{number:04d}.png", image)
    save(folder / "label" / f"new_nyu_class13_{number:04d}.png", label.astype(np.uint8))
    save(folder / "instance" / f"{number:04d}.png", instance.astype(np.uint8))


def write_cityscapes_image(root: Path, split: str, name: str, image, label) -> None:
    """One image with all the label files of gtFine; `name` is such as aachen_000000_000019."""
    city = name.partition("_")[0]
    save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
    stem = root / "gtFine" / split / city / f"{name}_gtFine"
    save(stem.with_name(f"{stem.name}_labelIds.png"), label.astype(np.uint8))
    save(stem.with_name(f"{stem.name}_instanceIds.png"), label.astype(np.uint16) * 1000)
    save(stem.with_name(f"{stem.name}_labelTrainIds.png"), np.full(label.shape, 255, np.uint8))


def write_kitti_image(root: Path, name: str, image, label) -> None:
    """One image of the semantics benchmark's training folder."""
    save(root / "training" / "image_2" / f"{name}.png", image)
    save(root / "training" / "semantic" / f"{name}.png", label.astype(np.uint8))
    save(root / "training" / "instance" / f"{name}.png", label.astype(np.uint16) * 256)


def write_sunrgbd_image(root: Path, number: int, image, label, split: str = "") -> None:
    """One image and its labels from 0, 255 = none."""
    save(root / "image" / split / f"img-{number:06d}.jpg", image, quality=95)
    save(root / "semseg_label37" / split / f"{number:08d}.png", label.astype(np.uint8))


def write_ade20k_image(root: Path, split: str, number: int, image, label) -> None:
    """One image of ADEChallengeData2016: JPEG, and an 8-bit gray PNG written by hand, 0 = other objects, 1 to 150."""
    part, word = {"train": ("training", "train"), "val": ("validation", "val")}[split]
    base = root / "ADEChallengeData2016"
    save(base / "images" / part / f"ADE_{word}_{number:08d}.jpg", image, quality=95)
    path = base / "annotations" / part / f"ADE_{word}_{number:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes([bytes(row) for row in label.astype(np.uint8)], label.shape[1], 8, 0))


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths, column by column, beginning with the zeros."""
    counts, value, length = [], 0, 0
    for pixel in mask.T.reshape(-1):
        if int(pixel) != value:
            counts.append(length)
            value, length = int(pixel), 0
        length += 1
    return [*counts, length]


def write_coco_files(
    root: Path, split: str, images: dict[int, np.ndarray], annotations: list[dict], categories: list[tuple[int, str]]
) -> Path:
    """annotations/instances_SPLIT.json and SPLIT/*.jpg, as the data set has them."""
    entries = []
    for number, image in images.items():
        name = f"{number:012d}.jpg"
        save(root / split / name, image, quality=95)
        entries.append(
            {"id": number, "file_name": name, "height": image.shape[0], "width": image.shape[1], "license": 1}
        )
    tree = {
        "info": {"year": 2017},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": k, "name": name, "supercategory": "thing"} for k, name in categories],
    }
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path
