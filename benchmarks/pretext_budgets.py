"""What a larger budget changes: each task's gain over random weights in two results of `geo-pretrain bench pretext`.

    python -m benchmarks.pretext_budgets [SMALL.json LARGE.json] [--render PAGE.md]

Gains are in points, the mean over the seeds that both have; bold: beyond chance, that is, the 95 % interval of the mean
difference (Student's t, seed by seed) leaves out zero. Each budget is compared with random weights of its own run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from geo_pretrain.cards.markdown import around_marks, table
from geo_pretrain.training.bench.report import HEAD, MEASURES, gains
from geo_pretrain.training.evaluation.metrics import Interval

BEGIN, END = "<!-- pretext budgets: begin -->", "<!-- pretext budgets: end -->"
SMALL, LARGE = RESULTS / "pretext_toy.json", RESULTS / "pretext_800.json"


def shown(gain: Interval | None) -> str:
    """A gain in points, bold where it is beyond chance."""
    if gain is None:
        return "-"
    text = f"{100 * gain.mean:+.1f}"
    return f"**{text}**" if gain.low > 0 or gain.high < 0 else text


def markdown(small: Mapping[str, Any], large: Mapping[str, Any]) -> str:
    """The table: a row a task, for each measure the gain at both budgets."""
    budgets = [results["budget"]["steps"] for results in (small, large)]
    head = ["task", *(f"{title}, {steps} steps" for title in HEAD[1:4] for steps in budgets)]
    columns = [_of_all(results, measure) for measure in MEASURES for results in (small, large)]
    kinds = {task: group["kind"] for group in large["groups"].values() for task in group["tasks"]}
    rows = [[f"{kind} `{task}`", *(shown(column.get(task)) for column in columns)] for task, kind in kinds.items()]
    return table(head, rows)


def _of_all(results: Mapping[str, Any], measure: str) -> dict[str, Interval]:
    """The gains of the tasks of all groups, each over its own random weights."""
    return {task: gain for group in results["groups"].values() for task, gain in gains(group, measure).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", default=[SMALL, LARGE], help="two results.json")
    parser.add_argument("--render", type=Path, help="a page with marks, into which the table goes")
    options = parser.parse_args()
    if len(options.results) != 2:
        parser.error(f"{len(options.results)} files; accepted: two, the smaller budget first")
    small, large = (json.loads(path.read_text(encoding="utf-8")) for path in options.results)
    text = markdown(small, large)
    print(text)
    if options.render is not None:
        before, after = around_marks(options.render, BEGIN, END)
        options.render.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
