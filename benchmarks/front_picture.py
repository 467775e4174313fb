"""The picture and numbers on the front page, from finished weights: matches, features, points; recall beside random.

    python -m benchmarks.front_picture                        # of the shipped weights, about a minute on two cores
    python -m benchmarks.front_picture runs/mine --try out    # of any backbone for images, into out/ alone

Writes docs/front.jpg, benchmarks/results/front_picture.json and the parts of README.md between its marks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, machine, write_results
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.files import write_text
from geo_pretrain.progress import progress
from geo_pretrain.training.demo.report import weights_numbers
from geo_pretrain.training.demo.weights import NAME, POINT_NAME, Setting, Shown, show_weights
from geo_pretrain.training.evaluation.features import RANDOM
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.visualize.strip import save_strip

ROOT = Path(__file__).parents[1]
PICTURE, README, RESULT = "docs/front.jpg", ROOT / "README.md", RESULTS / "front_picture.json"
COMMAND = "python -m benchmarks.front_picture"
OF_POINTS = "points, 3D"  # where weights for points are at hand
COLUMNS = ("matches", "features", "points", OF_POINTS)  # the demo's picture may have labels, too
LARGEST = 300_000  # bytes
QUALITIES = (88, 80, 70)  # of the .jpg, the first that is small enough
RECALL, RIGHT = "recall by room", "pixels that get the right label by room"


def save_picture(shown: Shown, path: Path) -> None:
    """Write the columns of the front page. Raises `GeoPretrainError` for a picture that is too big in any quality."""
    for quality in QUALITIES:
        save_strip([column for column in shown.columns if column[0] in COLUMNS], path, quality=quality)
        if (size := path.stat().st_size) <= LARGEST:
            return
    raise GeoPretrainError(f"{path}: has {size:,} bytes; at most {LARGEST:,} are accepted on the front page.")


def parts(results: dict[str, Any]) -> dict[str, str]:
    """What stands between the marks of README.md, by the name of the mark, from stored results."""
    weights = results["weights"]
    name, scores, (height, width) = weights["name"], weights["scores"], weights["size"]
    starts = [start for start in scores if start != name]
    rooms = len(scores[name][RECALL])
    third = ""
    if OF_POINTS in results.get("columns", ()):
        card = f"[`{POINT_NAME}`](model_cards/{POINT_NAME}.md)"
        third = f";\nat the right the points in the colors of {card}, a network for points"
    picture = (
        f"![Matches between two views of a room, their features as colors, and the room's points]({PICTURE})\n\n"
        f"*[`{name}`](model_cards/{name}.md) in a room it never saw: the nearest feature in the other view (green is\n"
        "right within 4 pixels, red is not), its features as colors, and the room's points in these colors"
        f"{third}.\n`make demo` draws it in a minute.*"
    )
    heads = [f"{start} weights" if start == RANDOM else start for start in starts]
    head = f"| | {' | '.join([*heads, f'`{name}`'])} |"
    rule = f"| --- |{' --- |' * (len(starts) + 1)}"
    measures = {
        f"matching recall at 4 px, {height}x{width} (%), mean ± spread over {rooms} rooms never seen": RECALL,
        f"pixels that get the right label (%), carried from {weights['labelled']} of a room's {weights['frames']} "
        "frames by the nearest features": RIGHT,
    }
    rows = []
    for measure, key in measures.items():
        others, ours = (
            [str(Spread(tuple(scores[start][key]))) for start in starts],
            str(Spread(tuple(scores[name][key]))),
        )
        rows.append(f"| {' | '.join([measure, *others, f'**{ours}**'])} |")
    return {"front picture": picture, "front numbers": "\n".join([head, rule, *rows])}


def with_parts(text: str, results: dict[str, Any]) -> str:
    """README.md with its marked parts rendered from results. Raises `GeoPretrainError` for a mark that is not there."""
    for mark, part in parts(results).items():
        opening, closing = f"<!-- {mark} -->\n", f"\n<!-- /{mark} -->"
        if (text.count(opening), text.count(closing)) != (1, 1):
            raise GeoPretrainError(f"README.md: accepted is one part between <!-- {mark} --> and <!-- /{mark} -->.")
        before, after = text.partition(opening)[0], text.partition(closing)[2]
        text = f"{before}{opening}{part}{closing}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default=NAME, help="a catalog name or a checkpoint folder")
    parser.add_argument("--try", dest="trial", type=Path, help="write into this folder, and nothing of the front page")
    given = parser.parse_args()
    with progress() as report:
        shown = show_weights(given.name, None, setting=Setting(), report=report)
    results: dict[str, Any] = {
        "weights": weights_numbers(shown),
        "columns": [title for title, _ in shown.columns if title in COLUMNS],
        "machine": machine(),
    }
    del results["weights"]["seconds"]  # the demo's own are stored
    if given.trial is not None:
        save_picture(shown, given.trial / "front.jpg")
        write_text(given.trial / "front_picture.json", json.dumps(results, indent=2) + "\n")
        print(json.dumps(results["weights"], indent=2))
        return
    text = with_parts(README.read_text(encoding="utf-8"), results)
    save_picture(shown, ROOT / PICTURE)
    write_results(RESULT.stem, COMMAND, results, timed=False)
    write_text(README, text)


if __name__ == "__main__":
    main()
