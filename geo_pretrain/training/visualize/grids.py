"""Pictures of results with Pillow: matches between two views, and segmentations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.evaluation.matching import Matches, Unit
from geo_pretrain.training.visualize.preview import class_colors

INK, PAPER, GREY = (28, 32, 38), (255, 255, 255), (120, 126, 134)
RIGHT, WRONG = (38, 201, 106), (238, 60, 60)
GAP, HEADER, CAPTION = 12, 40, 22
DRAW_SCALE = 2  # drawn large and reduced: Pillow's lines are not antialiased


def draw_matches(
    rows: Sequence[Sequence[Matches]],
    titles: Sequence[str],
    path: Path,
    *,
    threshold: float,
    unit: Unit = "px",
    shown: int = 60,
) -> None:
    """Write a figure: a row a pair, a column a network; green joins what is matched right, red what is wrong.

    rows[i][j] are the matches of pair i by network j, their errors in `unit`; `titles` has one text a column.
    """
    panels = [[_match_panel(matches, threshold, shown) for matches in row] for row in rows]
    captions = [[f"{(m.error <= threshold).mean():.0%} within {threshold:g} {unit}" for m in row] for row in rows]
    legend = f"green: the nearest feature lies within {threshold:g} {unit} of the true position; red: it does not"
    _save_grid(panels, captions, titles, legend, path)


def draw_segmentations(
    rows: Sequence[tuple[Frame, Sequence[np.ndarray]]], titles: Sequence[str], classes: Sequence[str], path: Path
) -> None:
    """Write a figure: a row a frame; columns are the image, its labels, and each prediction [H, W] of class ids."""
    panels, captions, present = [], [], set()
    for frame, predictions in rows:
        truth = frame.semantic if frame.semantic is not None else np.zeros(frame.depth.shape, int)
        present |= set(np.unique(truth)) | {c for p in predictions for c in np.unique(p)}
        panels.append([_enlarge(frame.color), *(_enlarge(class_colors(ids)) for ids in (truth, *predictions))])
        right = [((p == truth) & (truth > 0)).sum() / max((truth > 0).sum(), 1) for p in predictions]
        captions.append(["", "", *(f"{share:.0%} of pixels right" for share in right)])
    colors = class_colors(np.arange(len(classes))[None])[0]
    legend = [(classes[c], tuple(int(v) for v in colors[c])) for c in sorted(present) if c > 0]
    _save_grid(panels, captions, ["image", "truth", *titles], legend, path)


def _match_panel(matches: Matches, threshold: float, shown: int) -> Image.Image:
    left, right = (_enlarge(frame.color) for frame in matches.frames)
    scale = left.width / matches.frames[0].color.shape[1]
    canvas = Image.new("RGB", (left.width * 2 + GAP // 2, left.height), PAPER)
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + GAP // 2, 0))
    canvas = canvas.resize((canvas.width * DRAW_SCALE, canvas.height * DRAW_SCALE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    chosen = np.linspace(0, len(matches.query) - 1, min(shown, len(matches.query))).round().astype(int)
    offset = np.array([left.width + GAP // 2, 0.0])
    for k in sorted(chosen, key=lambda k: matches.error[k] <= threshold):  # right ones on top
        color = RIGHT if matches.error[k] <= threshold else WRONG
        ends = [(matches.query[k] + 0.5) * scale, (matches.predicted[k] + 0.5) * scale + offset]
        (x1, y1), (x2, y2) = ((end * DRAW_SCALE).tolist() for end in ends)
        draw.line([(x1, y1), (x2, y2)], fill=color, width=DRAW_SCALE)
        for x, y in ((x1, y1), (x2, y2)):
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=color, outline=PAPER, width=DRAW_SCALE)
    return canvas.resize((canvas.width // DRAW_SCALE, canvas.height // DRAW_SCALE), Image.Resampling.LANCZOS)


def _enlarge(pixels: np.ndarray, width: int = 256) -> Image.Image:
    factor = max(1, round(width / pixels.shape[1]))
    image = Image.fromarray(pixels.astype(np.uint8))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _save_grid(
    panels: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    titles: Sequence[str],
    legend: str | Sequence[tuple[str, tuple[int, ...]]],
    path: Path,
) -> None:
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
            draw.text((left, top + cell_height + 3), text, GREY, font=small)
    bottom = HEADER + len(panels) * row_height
    if isinstance(legend, str):
        draw.text((GAP, bottom), legend, GREY, font=small)
    for i, swatch_row in enumerate(swatches):
        for left, name, color in swatch_row:
            draw.rectangle([left, bottom + 26 * i + 2, left + 14, bottom + 26 * i + 16], fill=color)
            draw.text((left + 20, bottom + 26 * i), name, INK, font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _swatch_rows(
    legend: Sequence[tuple[str, tuple[int, ...]]], width: int
) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    """Class names with their colors, wrapped to the width of the figure."""
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
