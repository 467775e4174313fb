"""The tables of docs/which.md and docs/alternatives.md, written from what `recommend` answers and from the catalog."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.advice.answer import recommend
from geo_pretrain.advice.questions import INPUTS, NON_COMMERCIAL, PERMISSIVE, TASKS, Question
from geo_pretrain.cards.markdown import around_marks, table
from geo_pretrain.catalog.alternatives import ALTERNATIVES
from geo_pretrain.errors import UnknownName
from geo_pretrain.files import write_text

ANSWERS = ("<!-- answers -->", "<!-- /answers -->")
OTHERS = ("<!-- alternatives -->", "<!-- /alternatives -->")
HEAD = ("what comes out", "license may be non-commercial", "license must be permissive", "outside this zoo")
SHOWN = ("rgb", "colored-points", "points", "lidar")  # rgb-d has the answers of the first two, depth those of points


def answers_table() -> str:
    """For each input a table: the first choice for each task, under two licenses, for a machine with an empty cache."""
    parts = []
    for name in SHOWN:
        rows = [_row(task, name) for task in TASKS if _is_asked(task, name)]
        parts.append(f"**`--input {name}`**: {INPUTS[name].words}\n\n{table(HEAD, rows)}")
    return "\n\n".join(parts)


def alternatives_table() -> str:
    """Backbones of others, one row each."""
    head = ("backbone", "for", "reported by its authors", "license of the weights", "needs")
    rows = [
        (
            f"[{other.name}]({other.url})",
            other.what,
            other.reported,
            other.license.removeprefix("LicenseRef-"),
            other.needs,
        )
        for other in ALTERNATIVES
    ]
    return table(head, rows)


def write_pages(docs: Path) -> list[Path]:
    """Write the tables into the two pages of a `docs` folder; returns the pages that changed.

    Raises `DataError` where a page or its marks are missing.
    """
    changed = []
    for name, marks, text in (
        ("which.md", ANSWERS, answers_table()),
        ("alternatives.md", OTHERS, alternatives_table()),
    ):
        path = docs / name
        before, after = around_marks(path, *marks)
        updated = f"{before}{marks[0]}\n{text}\n{marks[1]}{after}"
        if updated != path.read_text(encoding="utf-8"):
            write_text(path, updated)
            changed.append(path)
    return changed


def _is_asked(task: str, name: str) -> bool:
    try:
        Question(task, name)
    except UnknownName:
        return False
    return True


def _row(task: str, name: str) -> tuple[str, ...]:
    answers = [recommend(task, name, license=license, limit=1, here=()) for license in (NON_COMMERCIAL, PERMISSIVE)]
    cells = [f"`{p.name}`: {p.why}; {_get(p.how)}" if p else "-" for p in (next(iter(a.picks), None) for a in answers)]
    return (task, *cells, ", ".join(other.name for other in answers[0].outside) or "-")


def _get(how: str) -> str:
    return how.partition(":")[0]  # without the schedule, which `recommend` states
