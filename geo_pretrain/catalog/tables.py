"""The papers' tables, put together from the entries' results and the baselines: rows are starts, columns benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from geo_pretrain.catalog import csc, gsc, img2pc, pointcontrast, ppkt, pri3d, slidr
from geo_pretrain.catalog.baselines import BASELINES
from geo_pretrain.catalog.entry import Entry, Paper, Result

# method of an entry -> what its paper is called in tables, and the paper
PAPERS: Mapping[str, tuple[str, Paper]] = MappingProxyType(
    {
        "pri3d": ("Pri3D", pri3d.PAPER),
        "gsc": ("GSC", gsc.PAPER),
        "pointcontrast": ("PointContrast", pointcontrast.PAPER),
        "csc": ("CSC", csc.PAPER),
        "ppkt": ("PPKT", ppkt.PAPER),
        "img2pc": ("Janda", img2pc.PAPER),
        "slidr": ("SLidR", slidr.PAPER),
    }
)
NAMES = dict(PAPERS.values())
Column = tuple[str, str, str]  # task, data set, metric


@dataclass(frozen=True)
class TableRow:
    """One start of a table, with its numbers in percent by column."""

    label: str
    start: str  # a name of the catalog, "scratch" or "imagenet"; "" when it cannot be run here
    network: str  # name of the 2D encoder, title of the 3D network; "" where the table does not say
    values: Mapping[Column, float]
    note: str = ""  # what the paper leaves open, or why there is no start


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper, called "PPKT T1"."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]

    @property
    def paper(self) -> str:
        """The paper's short name."""
        return self.name.split()[0]


def full_table(entry: Entry, result: Result) -> str:
    """The label of a result's table including its paper: "PPKT T1". Own tables of an entry are called "T1" alone."""
    return result.table if result.table.split()[0] in NAMES else f"{PAPERS[entry.method][0]} {result.table}"


def paper_of(table: str, default: Paper) -> Paper:
    """The paper that a label such as "PPKT T1" names; `default` for "T1"."""
    return NAMES.get(table.split()[0], default)


def paper_tables(entries: Mapping[str, Entry]) -> dict[str, PaperTable]:
    """Every table by its name, papers in the order of `PAPERS`; baselines come first, then `entries` in their order."""
    rows: dict[str, list[TableRow]] = {}

    def add(label: str, start: str, network: str, note: str, results: dict[str, list[Result]]) -> None:
        for table, numbers in results.items():
            values = {(r.task, r.dataset, r.metric): r.value for r in numbers}
            open_points = next((r.note for r in numbers if r.note), note)
            rows.setdefault(table, []).append(TableRow(label, start, network, values, open_points))

    for baseline in BASELINES:
        by_table: dict[str, list[Result]] = {}
        for result in baseline.results:
            by_table.setdefault(result.table, []).append(result)
        add(baseline.label, baseline.start, baseline.network, baseline.absent, by_table)
    for entry in entries.values():
        by_table = {}
        for result in entry.results:
            by_table.setdefault(full_table(entry, result), []).append(result)
        add(entry.name, entry.name, network_of(entry), "", by_table)
    return {name: PaperTable(name, _columns(rows[name]), tuple(rows[name])) for name in sorted(rows, key=_order)}


def start_values(entry: Entry | None, start: str) -> dict[Result, float]:
    """What the same table states for the same network from another start, "scratch" or "imagenet", by result."""
    if entry is None:
        return {}
    known = {
        (result.table, result.task, result.dataset, result.metric): result.value
        for baseline in BASELINES
        if baseline.start == start and baseline.network == network_of(entry)
        for result in baseline.results
    }
    found = {r: known.get((full_table(entry, r), r.task, r.dataset, r.metric)) for r in entry.results}
    return {result: value for result, value in found.items() if value is not None}


def scratch_values(entry: Entry | None) -> dict[Result, float]:
    """What the same table states for the same network from random weights, by the entry's results that have such."""
    return start_values(entry, "scratch")


def network_of(entry: Entry) -> str:
    """What rows of tables call an entry's network: the encoder of an image network, the title of a 3D network."""
    return entry.arch.encoder_name or entry.arch.title


def _columns(rows: list[TableRow]) -> tuple[Column, ...]:
    """All columns of the rows; the row with the most of them gives the order."""
    longest = max(rows, key=lambda row: len(row.values))
    return tuple(dict.fromkeys([*longest.values, *(column for row in rows for column in row.values)]))


def _order(name: str) -> tuple[int, int, str]:
    paper, _, label = name.partition(" ")
    number = int(label[1:]) if label[1:].isdigit() else 1000
    return list(NAMES).index(paper), number, label
