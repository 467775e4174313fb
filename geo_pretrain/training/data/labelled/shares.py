"""Which label in the files is which class, and how much of the data it is: a table to look at before training.

A class that is off by one trains without an error. The table shows it: "road" with the sky's share of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from geo_pretrain.errors import BadFrame, some

LOOKED_AT = 32  # items of the table before training, evenly spaced
UNKNOWN = "not in the list of classes"
NO_CLASS = "(no class)"
MOST_SHOWN = 8  # labels of no class that are named
MOST_IGNORED = 32  # labels of no class that may be ignored


@runtime_checkable
class CountsLabels(Protocol):
    """A labelled source that says what its files call the classes."""

    counted: str  # what is counted: "pixels", "points" or "objects"
    classes: tuple[str, ...]  # names of the classes 1..C

    def ids(self) -> list[str]:
        """Names of all items."""

    def label_keys(self) -> Mapping[str, int]:
        """Labels as files have them ("7", "128 64 128"), in the table's order -> class 1..C; 0: of no class."""

    def label_counts(self, id: str) -> Mapping[str, int]:
        """How often each label occurs in an item's file, also one of no class. Raises `BadFrame`."""

    def label_note(self, shares: Mapping[str, float]) -> str | None:
        """A remark on labels that may be read wrongly; `shares`: of all that was counted, by label."""


@dataclass(frozen=True)
class LabelShare:
    """One label of the files."""

    key: str  # as files have it: "7", "128 64 128"
    name: str  # of its class
    known: bool  # False: it is neither a class nor ignored, and an item with it cannot be used
    count: int  # pixels, points or objects
    items: int  # items that it occurs in


@dataclass(frozen=True)
class LabelTable:
    """The labels in a number of items. Classes that occur nowhere are listed, too."""

    counted: str  # "pixels", "points", "objects"
    rows: tuple[LabelShare, ...]
    looked: int  # items that were read
    total: int  # items of the source
    note: str | None = None

    def share(self, row: LabelShare) -> float:
        """The part of all counted pixels, points or objects, from 0 to 1."""
        return row.count / max(sum(one.count for one in self.rows), 1)

    @property
    def unknown(self) -> list[LabelShare]:
        """Labels that are neither a class nor ignored."""
        return [row for row in self.rows if not row.known]

    def cells(self) -> list[tuple[str, str, str, str]]:
        """Rows for people: label, class, share, items."""
        return [(row.key, row.name, percent(self.share(row)), str(row.items)) for row in self.rows]

    def fault(self, ignored: Iterable[int] = ()) -> str | None:
        """What to say of labels that are no class, with the option that mends it; `ignored`: what it holds by now."""
        keys = [row.key for row in self.unknown]
        if not keys:
            return None
        ways = "add them to the list of classes"
        numbers = [key for key in keys if key.removeprefix("-").isdecimal()]
        if len(numbers) == len(keys) <= MOST_IGNORED:  # more are no leftovers: the list is of other data
            held = ",".join(map(str, sorted({*ignored, *map(int, numbers)})))
            ways = f"ignore them with --set data.options.ignore=[{held}], or {ways}"
        elif len(numbers) < len(keys):  # colors: those of names in `void` are ignored
            ways = f"{ways}; there, colors of one name are ignored with --set data.options.void=[NAME]"
        seen = "" if self.looked == self.total else f" (in {self.looked} of {self.total} files)"
        return f"Labels that are no class: {some(keys, MOST_SHOWN)}{seen}. Training stops at them: {ways}."

    def notes(self, ignored: Iterable[int] = ()) -> list[str]:
        """Remarks for people on what may be wrong; `ignored`: see `fault`."""
        return [text for text in (self.note, self.fault(ignored)) if text is not None]


def label_table(
    source: Any, most: int | None = LOOKED_AT, progress: Callable[[int, int], None] | None = None
) -> LabelTable | None:
    """Count the labels of at most `most` items, evenly spaced; None where a source does not say what files call them.

    Items that cannot be read are left out. A subset's items are counted, not all of its source.
    """
    whole = getattr(source, "source", source)
    if not isinstance(whole, CountsLabels):
        return None
    ids: Sequence[str] = source.ids()
    number = len(ids) if most is None else min(most, len(ids))
    counts: dict[str, int] = {}
    items: dict[str, int] = {}
    looked = 0
    for k in range(number):
        if progress is not None:
            progress(k, number)
        try:
            found = whole.label_counts(ids[k * len(ids) // number])
        except BadFrame:
            continue  # it is told where it is loaded
        looked += 1
        for key, count in found.items():
            counts[key] = counts.get(key, 0) + count
            items[key] = items.get(key, 0) + 1
    keys, total = whole.label_keys(), max(sum(counts.values()), 1)
    rows = [
        LabelShare(key, whole.classes[label - 1] if label else NO_CLASS, True, counts.get(key, 0), items.get(key, 0))
        for key, label in keys.items()
        if label or key in counts
    ]
    rows += [LabelShare(key, UNKNOWN, False, counts[key], items[key]) for key in counts if key not in keys]
    note = whole.label_note({key: count / total for key, count in counts.items()})
    return LabelTable(whole.counted, tuple(rows), looked, len(ids), note)


def names_alone_note(path: str, first_name: str, unit: str, share: float) -> str:
    """The remark on a list of names without ids, where id 0 occurs in the files."""
    return (
        f"{path} has names alone. So ids count from 1, and id 0 ({percent(share)} of the {unit}) is of no class. "
        f"Is id 0 {first_name!r}? Then every class is off by one: --set data.options.first=0. Or write the id before "
        f"each name, such as '0 {first_name}'."
    )


def count_values(values: np.ndarray) -> dict[int, int]:
    """Count the values of an array of whole numbers; quick where equal ones lie side by side, as in label images."""
    flat = values.reshape(-1)
    if not flat.size:
        return {}
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(starts, append=flat.size)
    found, places = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(places.reshape(-1), weights=lengths)
    return {int(value): int(count) for value, count in zip(found, counts, strict=True)}


def percent(share: float) -> str:
    """A share as text: two digits, and never 0 % for what occurs."""
    if 0 < share < 0.0001:
        return "<0.01 %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.3g} %"
