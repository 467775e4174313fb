"""Figures of results: matches between two views; segmentations and detections with their ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from geo_pretrain.training.data.labelled.image import Instances
from geo_pretrain.training.evaluation.coco import Detections
from geo_pretrain.training.evaluation.matching import Matches, Unit
from geo_pretrain.training.visualize.colors import class_colors
from geo_pretrain.training.visualize.grids import GAP, PAPER, enlarge, save_grid

RIGHT, WRONG = (38, 201, 106), (238, 60, 60)
DRAW_SCALE = 2  # drawn large and reduced: Pillow's lines are not antialiased
SHOWN = 60  # matches of a pair, at most
DRAWN_SCORE = 0.5  # detections below are not drawn
CELL = 320  # px: longer side of an image with boxes
PANEL = 320  # px: the widest panel of predictions


def draw_matches(
    rows: Sequence[Sequence[Matches]],
    titles: Sequence[str],
    path: Path,
    *,
    threshold: float,
    unit: Unit = "px",
) -> None:
    """Write a figure of matches: a row per pair, a column per network; right matches are green, wrong ones red.

    rows[i][j] are the matches of pair i by network j, their errors in `unit`; `titles` has one text a column.
    """
    panels = [[_match_panel(matches, threshold) for matches in row] for row in rows]
    captions = [[f"{(m.error <= threshold).mean():.0%} within {threshold:g} {unit}" for m in row] for row in rows]
    legend = f"green: the nearest feature lies within {threshold:g} {unit} of the true position; red: it does not"
    save_grid(panels, captions, titles, legend, path)


def draw_segmentations(
    rows: Sequence[tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]],
    titles: Sequence[str],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Write a figure of segmentations: a row per image; columns are the image, its labels, and each prediction.

    A row is (image uint8 [H, W, 3], class ids [H, W], predicted ids [H, W] for each of `titles`); `classes` names the
    ids from 0, which is no class.
    """
    panels, captions, present = [], [], set()
    for color, truth, predictions in rows:
        present |= {int(c) for ids in (truth, *predictions) for c in np.unique(ids)}
        panels.append([enlarge(color), *(enlarge(class_colors(ids)) for ids in (truth, *predictions))])
        right = [((p == truth) & (truth > 0)).sum() / max((truth > 0).sum(), 1) for p in predictions]
        captions.append(["", "", *(f"{share:.0%} of pixels right" for share in right)])
    colors = class_colors(np.arange(len(classes))[None])[0]
    legend = [(classes[c], tuple(int(v) for v in colors[c])) for c in sorted(present) if c > 0]
    save_grid(panels, captions, ["image", "truth", *titles], legend, path)


def draw_predictions(
    rows: Sequence[tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]],
    titles: Sequence[str],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Resize images and class ids to the size of the first labels (at most 320 wide) and draw them as segmentations.

    `classes` names the ids from 1.
    """
    size: tuple[int, int] | None = None  # width, height
    resized = []
    for color, truth, predictions in rows:
        if size is None:
            scale = min(1.0, PANEL / truth.shape[1])
            size = round(truth.shape[1] * scale), round(truth.shape[0] * scale)
        image = np.array(Image.fromarray(color).resize(size, Image.Resampling.BILINEAR))
        labels, *guesses = (_resized_ids(ids, size) for ids in (truth, *predictions))
        resized.append((image, labels, guesses))
    draw_segmentations(resized, titles, ("unlabelled", *classes), path)


def draw_detections(
    rows: Sequence[tuple[np.ndarray, Instances, Detections]], classes: Sequence[str], path: Path
) -> None:
    """Write a figure of detections: a row per image; columns are image, objects, and detections of score >= 0.5.

    A row is (image uint8 [H, W, 3], its objects, what was found); `classes` names the ids from 1.
    """
    colors = class_colors(np.arange(len(classes) + 1)[None])[0]
    pictures, captions, present = [], [], set()
    for image, objects, detections in rows:
        shown = detections.scores >= DRAWN_SCORE
        masks = None if detections.masks is None else detections.masks[shown]
        texts = [f"{score:.2f}" for score in detections.scores[shown]]
        found = detections.classes[shown]
        present |= {int(c) for c in (*objects.classes, *found)}
        pictures.append(
            [
                picture_of(image),
                with_objects(image, objects.boxes, colors[objects.classes], objects.masks),
                with_objects(image, detections.boxes[shown], colors[found], masks, texts),
            ]
        )
        captions.append(["", f"{len(objects)} objects", f"{int(shown.sum())} found with score {DRAWN_SCORE:g} and up"])
    size = [max(picture.size[k] for row in pictures for picture in row) for k in (0, 1)]
    panels = [[ImageOps.pad(p, (size[0], size[1]), color=PAPER, centering=(0, 1)) for p in row] for row in pictures]
    legend = [(classes[c - 1], tuple(int(v) for v in colors[c])) for c in sorted(present)]
    save_grid(panels, captions, ["image", "truth", "found"], legend, path)


def picture_of(pixels: np.ndarray, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Resize an image so that its longer side fills a cell."""
    scale = CELL / max(pixels.shape[:2])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    return Image.fromarray(pixels).resize((width, height), resampling)


def with_objects(
    pixels: np.ndarray, boxes: np.ndarray, colors: np.ndarray, masks: np.ndarray | None, texts: Sequence[str] = ()
) -> Image.Image:
    """Tint masks and outline boxes in their colors, with a text at each."""
    tinted = pixels.astype(np.float32)
    for mask, color in zip(masks if masks is not None else (), colors, strict=masks is not None):
        tinted[mask] = 0.5 * tinted[mask] + 0.5 * color
    picture = picture_of(tinted.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for k, (box, color) in enumerate(zip(boxes, colors, strict=True)):
        ink = tuple(int(v) for v in color)
        x0, y0, x1, y1 = (float(v) * CELL / max(pixels.shape[:2]) for v in box)
        draw.rectangle([x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)], outline=ink, width=2)
        if texts:
            draw.rectangle([x0, y0, x0 + font.getlength(texts[k]) + 4, y0 + 14], fill=ink)
            draw.text((x0 + 2, y0), texts[k], (0, 0, 0), font=font)
    return picture


def _resized_ids(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(ids.astype(np.int32)).resize(size, Image.Resampling.NEAREST), np.int16)


def _match_panel(matches: Matches, threshold: float) -> Image.Image:
    left, right = (enlarge(frame.color) for frame in matches.frames)
    scale = left.width / matches.frames[0].color.shape[1]
    canvas = Image.new("RGB", (left.width * 2 + GAP // 2, left.height), PAPER)
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + GAP // 2, 0))
    canvas = canvas.resize((canvas.width * DRAW_SCALE, canvas.height * DRAW_SCALE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    chosen = np.linspace(0, len(matches.query) - 1, min(SHOWN, len(matches.query))).round().astype(int)
    offset = np.array([left.width + GAP // 2, 0.0])
    for k in sorted(chosen, key=lambda k: matches.error[k] <= threshold):  # right ones on top
        color = RIGHT if matches.error[k] <= threshold else WRONG
        ends = [(matches.query[k] + 0.5) * scale, (matches.predicted[k] + 0.5) * scale + offset]
        (x1, y1), (x2, y2) = ((end * DRAW_SCALE).tolist() for end in ends)
        draw.line([(x1, y1), (x2, y2)], fill=color, width=DRAW_SCALE)
        for x, y in ((x1, y1), (x2, y2)):
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=color, outline=PAPER, width=DRAW_SCALE)
    return canvas.resize((canvas.width // DRAW_SCALE, canvas.height // DRAW_SCALE), Image.Resampling.LANCZOS)
