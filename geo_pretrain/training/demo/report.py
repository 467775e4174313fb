"""The demo's report: tables and verdicts for the terminal and the page, results.json, and what to do next."""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from geo_pretrain.training.demo.machine import machine
from geo_pretrain.training.demo.pretraining import THRESHOLD, PretrainingResult
from geo_pretrain.training.demo.weights import PICTURE, POINT_NAME, Shown
from geo_pretrain.training.evaluation.features import RANDOM
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.evaluation.verdict import sentence

PAGE, WEIGHTS = (Path(__file__).with_name(name) for name in ("page.html", "weights.html"))
REPORT, RESULTS = "report.html", "results.json"


def weights_head(shown: Shown) -> tuple[str, ...]:
    """The head of the table of finished weights: nothing, then each start."""
    return ("", *(f"{name} weights" if name == RANDOM else name for name in shown.scores))


def weights_rows(shown: Shown) -> list[tuple[str, ...]]:
    """Rows of the table of finished weights: a measure and its value for each start."""
    height, width = shown.setting.size
    scores = shown.scores.values()
    return [
        (f"matching recall at {THRESHOLD:g} px, {height}x{width} (%)", *(str(one.by_room()) for one in scores)),
        ("pixels that get the right label (%)", *(str(Spread(one.accuracy)) for one in scores)),
        ("mIoU of these labels (%)", *(str(Spread(one.miou)) for one in scores)),
    ]


def weights_verdict(shown: Shown) -> str:
    """Whether the weights do better than random ones, at matching and at labels."""
    name = Path(shown.name).name
    matching = sentence(f"Matching with {name}", "with random weights", shown.gain, "")
    labels = sentence(f"Carrying labels with {name}", "with random weights", shown.label_gain, "")
    left_out = "" if shown.label_gain.low > 0 else " So the picture shows no labels."
    return f"{matching.strip()} {labels.strip()}{left_out}"


def table_rows(result: PretrainingResult) -> list[tuple[str, str, str]]:
    """Rows of the table of the short pre-training: measure, without it, with it."""
    recall = result.matching
    height, width = result.recipe.data.size
    return [
        (
            f"matching recall at {THRESHOLD:g} px, {height}x{width} (%)",
            f"{recall['random']}  (random weights)",
            str(recall["pre-trained"]),
        ),
    ]


def verdict(result: PretrainingResult) -> str:
    """Whether the short pre-training helped, and what this does not show."""
    judged = sentence("Matching with pre-trained weights", "with random weights", result.gain, "Take more steps.")
    return f"{judged} So few steps make no backbone for segmentation yet (docs/benchmarks.md)."


def what_next(folder: Path, shown: Shown | None = None) -> list[str]:
    """The commands that lead on: from the weights that were shown or, without them, from the demo's own checkpoint."""
    name = shlex.quote(str(folder) if shown is None else shown.name)
    lines = [
        f"geo-pretrain visualize matches {name} -o matches.html     # point at a pixel",
        f"geo-pretrain finetune rooms_unet_r18 --toy -b {name} --out runs/unet",
        "geo-pretrain data check folder:PATH -o check.png     # a recording of yours",
    ]
    if shown is None:
        return [*lines, "geo-pretrain train pri3d_view_r18 --small --data folder:PATH --out runs/mine"]
    if not shown.installed:
        lines.insert(0, "make weights     # once: the name then loads in any folder, without a network")
    return [
        *lines,
        f"geo-pretrain eval matching {name} --data folder:PATH",
        f"geo-pretrain train pri3d_view_r18 --small --data folder:PATH --set model.init={name} --out runs/mine",
    ]


def write_report(result: PretrainingResult, out: Path, *, shown: Shown | None = None, missing: str = "") -> None:
    """Write results.json and a self-contained report.html; `missing`: why no finished weights are shown."""
    numbers: dict[str, Any] = {
        "command": "geo-pretrain demo",
        "machine": machine(),
        "weights": missing if shown is None else weights_numbers(shown),
        "recipe": result.recipe.name,
        "steps": result.recipe.optim.steps,
        "seconds": result.seconds,
        "matching_recall": {name: list(spread.values) for name, spread in result.matching.items()},
        "matching_chance": result.chance,
        "gain": asdict(result.gain),
    }
    (out / RESULTS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    loaded = str(result.folder) if shown is None else shown.name
    text = Template(PAGE.read_text(encoding="utf-8")).substitute(
        weights=f"<p>{html.escape(missing)}</p>" if shown is None else _weights_part(shown, out),
        rows=_table_rows(table_rows(result)),
        verdict=html.escape(verdict(result)),
        picture=_embedded(out / "matches.png"),
        seconds=seconds,
        machine=html.escape(", ".join(f"{key} {value}" for key, value in machine().items())),
        scenes=len(result.matching["random"].values),
        chance=f"{100 * result.chance:.1f}",
        recipe=html.escape(result.recipe.to_yaml()),
        pretraining=result.recipe.optim.steps,
        next_python=html.escape(f"import geo_pretrain as gp\n\nencoder = gp.load_backbone({loaded!r})"),
        next_commands=html.escape("\n".join(what_next(result.folder, shown))),
    )
    (out / REPORT).write_text(text, encoding="utf-8")


def weights_numbers(shown: Shown) -> dict[str, Any]:
    """The scores of finished weights as plain JSON types, by start: of pairs, and of rooms."""
    setting = shown.setting
    return {
        "name": shown.name,
        "rooms": f"split val of seed {setting.seed}, {setting.frames} frames each",
        "frames": setting.frames,
        "labelled": setting.labelled,
        "size": list(setting.size),
        "seconds": shown.seconds,
        "chance": shown.chance,
        "scores": {
            name: {
                "recall": one.by_room().mean,
                "recall by room": list(one.by_room().values),
                "pixels that get the right label by room": list(one.accuracy),
                "mIoU by room": list(one.miou),
            }
            for name, one in shown.scores.items()
        },
        "gain": asdict(shown.gain),
        "gain of the right label": asdict(shown.label_gain),
    }


def _weights_part(shown: Shown, out: Path) -> str:
    """The part of the page on finished weights."""
    height, width = shown.setting.size
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in weights_head(shown))
    return Template(WEIGHTS.read_text(encoding="utf-8")).substitute(
        name=html.escape(shown.name),
        picture=_embedded(out / PICTURE),
        columns=html.escape(_described(title for title, _ in shown.columns)),
        head=head,
        rows=_table_rows(weights_rows(shown)),
        verdict=html.escape(weights_verdict(shown)),
        rooms=len(shown.ours.by_room().values),
        size=f"{height}x{width}",
        labelled=shown.setting.labelled,
        frames=shown.setting.frames,
        chance=f"{100 * shown.chance:.2g}",
        seconds=f"{shown.seconds:.0f}",
    )


COLUMNS = {
    "matches": "lines from a pixel to the nearest feature in the other view, green where that is right within 4 px, red "
    "where it is not; the pair of median recall",
    "features": "their three main directions as colors, the same for both views and the points",
    "labels": "the true ones of a frame and, below, those that the nearest features carry to it from other frames",
    "points": "the room's points with the mean feature of the pixels that see them",
    "points, 3D": f"the same points with the features of {POINT_NAME}, a network for points, in colors of their own",
}


def _described(titles: Iterable[str]) -> str:
    """What the columns of the picture show, as one text."""
    return "; ".join(f"{title}: {COLUMNS[title]}" for title in titles) + "."


def _table_rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)


def _embedded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()
