"""Figures and sheets with Pillow: panels in a grid with titles, captions and a legend, or tiles side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRAY = (28, 32, 38), (255, 255, 255), (120, 126, 134)
GAP, HEADER, CAPTION = 12, 40, 22  # px of a figure: between panels, of the titles, of the text under a panel
TILE_GAP = 4  # px between the tiles of a sheet


def save_grid(
    panels: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    titles: Sequence[str],
    legend: str | Sequence[tuple[str, tuple[int, ...]]],
    path: Path,
) -> None:
    """Write panels of one size in a grid, with a title a column, a caption a panel, and a legend below.

    `legend`: a sentence, or names with their colors.
    """
    cell_width, cell_height = panels[0][0].size
    columns = len(panels[0])
    width = columns * (cell_width + GAP) + GAP
    swatches = [] if isinstance(legend, str) else _swatch_rows(legend, width)
    footer = 30 if isinstance(legend, str) else 26 * len(swatches) + GAP
    has_captions = any(any(row) for row in captions)
    row_height = cell_height + (CAPTION if has_captions else 0) + GAP
    sheet = Image.new("RGB", (width, HEADER + len(panels) * row_height + footer), PAPER)
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(size=18), ImageFont.load_default(size=13)
    for j, title in enumerate(titles):
        draw.text((GAP + j * (cell_width + GAP), 10), title, INK, font=bold)
    for i, (row, texts) in enumerate(zip(panels, captions, strict=True)):
        top = HEADER + i * row_height
        for j, (panel, text) in enumerate(zip(row, texts, strict=True)):
            left = GAP + j * (cell_width + GAP)
            sheet.paste(panel, (left, top))
            draw.text((left, top + cell_height + 3), text, GRAY, font=small)
    bottom = HEADER + len(panels) * row_height
    if isinstance(legend, str):
        draw.text((GAP, bottom), legend, GRAY, font=small)
    for i, swatch_row in enumerate(swatches):
        for left, name, color in swatch_row:
            draw.rectangle([left, bottom + 26 * i + 2, left + 14, bottom + 26 * i + 16], fill=color)
            draw.text((left + 20, bottom + 26 * i), name, INK, font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _swatch_rows(
    legend: Sequence[tuple[str, tuple[int, ...]]], width: int
) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    """Wrap class names with their colors to the width of the figure."""
    font = ImageFont.load_default(size=13)
    rows: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    left = GAP
    for name, color in legend:
        step = 20 + int(font.getlength(name)) + 18
        if left + step > width and rows[-1]:
            rows.append([])
            left = GAP
        rows[-1].append((left, name, color))
        left += step
    return rows


def magnification(width: int) -> int:
    """Return the whole factor that makes a picture of `width` pixels about 256 wide."""
    return max(1, round(256 / width))


def enlarge(pixels: np.ndarray) -> Image.Image:
    """Magnify an image [H, W, 3] by a whole factor to about 256 pixels in width."""
    factor = magnification(pixels.shape[1])
    image = Image.fromarray(pixels.astype(np.uint8))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def tile(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Lay cells [h, w, 3] out in rows, white between; all get the size of the first."""
    height, width = rows[0][0].shape[:2]

    def fitted(cell: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(cell).resize((width, height), Image.Resampling.BILINEAR))

    return stack([stack([fitted(cell) for cell in row], axis=1) for row in rows])


def stack(blocks: list[np.ndarray], axis: int = 0) -> np.ndarray:
    """Lay pictures one below another (axis 1: side by side), white between and where they are smaller."""
    shape = [max(block.shape[k] for block in blocks) for k in (0, 1)]
    shape[axis] = sum(block.shape[axis] + TILE_GAP for block in blocks) - TILE_GAP
    sheet, corner = np.full((*shape, 3), 255, np.uint8), [0, 0]
    for block in blocks:
        sheet[corner[0] : corner[0] + block.shape[0], corner[1] : corner[1] + block.shape[1]] = block
        corner[axis] += block.shape[axis] + TILE_GAP
    return sheet


def save_sheet(sheet: np.ndarray, path: Path) -> None:
    """Write a picture [H, W, 3] as a PNG, whatever the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, format="PNG")


def shorten(text: str, width: int, size: int = 18) -> str:
    """Leave out the middle of a text that is wider than `width` pixels in the titles' font."""
    font = ImageFont.load_default(size=size)
    if font.getlength(text) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and font.getlength(_without_middle(text, keep)) > width:
        keep -= 1
    return _without_middle(text, keep)


def _without_middle(text: str, keep: int) -> str:
    return f"{text[: keep - keep // 2]}...{text[len(text) - keep // 2 :]}"
