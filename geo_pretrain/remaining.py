"""Estimate the time that a loop still needs, from its own reports; nothing is said before it can be known.

The mean of all items so far misleads wherever items differ: the first one compiles, the first hundred come from a
cache, another program begins to take processors. So the estimate is the mean of the items since the last change of
pace. A change is a split of the items whose two sides differ by more than their own scatter (Welch's t on logarithms
of seconds an item; binary segmentation from the left), and counts once the new pace has lasted long enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

Span = tuple[float, float]  # items, seconds that they took together

KEPT = 256  # spans; of a longer run the older ones are joined in pairs
SOONEST = 2.0  # seconds of measured items before anything is said
SURE, SURE_AT_START = 4.5, 3.0  # t of a change of pace, and of one after the first or second item, as of a warm-up
FACTOR = 1.25  # smaller changes do not matter
SCATTER, WEIGHT = 0.3, 4.0  # standard deviation of logarithms that is expected, and how many items it counts as
LASTED, SHARE, ITEMS = 2.0, 0.03, 2  # a new pace counts after so many seconds, such a share of all, so many spans
FEW, UNLIKE, UNLIKE_TWO = 4, 3.0, 1.5  # of so few spans, or of two, that differ more nothing can be said
BURST = 0.25  # share of all the time that one span may have had
LONG = 8  # spans of an older pace that is trusted until the new one counts


class Remaining:
    """The seconds that a loop still needs. `clock` gives seconds.

    The first report is the starting line: what was done before it, in an earlier sitting, tells nothing.

    >>> now = iter([0, 30, 31, 32, 33])  # the first item warms up
    >>> rest = Remaining(lambda: next(now, 33))
    >>> for done in range(5):
    ...     rest.report(done, 104)
    >>> round(rest.seconds())
    100
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.spans: list[Span] = []
        self.hits = self.misses = 0.0  # items that were there and items that were made, since the first made one
        self.last: tuple[float, float] | None = None  # done and time of the latest report
        self.total = 0.0
        self._pace: float | None = None  # of the spans so far
        self._known = False

    def report(self, done: float, total: float, *, already: bool = False) -> None:
        """Take note that `done` of `total` items are done; `already`: the latest were there before, in a cache."""
        now, self._known = self.clock(), False
        if self.last is not None and done < self.last[0]:  # the same work begins again, for the next run
            self.spans, self.hits, self.misses, self.last = [], 0.0, 0.0, None
        self.total = total
        if self.last is None:
            self.last = done, now
            return
        items = done - self.last[0]
        if items <= 0:
            return
        if already:
            self.hits += items if self.spans else 0
        else:
            self.spans.append((items, max(0.0, now - self.last[1])))
            self.misses += items
        self.last = done, now
        if len(self.spans) > KEPT:
            self.spans = _joined(self.spans)

    def seconds(self) -> float | None:
        """The seconds that are left, None while they cannot be known."""
        if self.last is None or self.last[0] >= self.total:
            return None
        pace = self.pace()
        if pace is None:
            return None
        left = (self.total - self.last[0]) * self.misses / (self.misses + self.hits)
        waited = self.clock() - self.last[1]
        if waited > max(LASTED, 3 * pace, sum(seconds for _, seconds in self.spans) / 2):
            return None  # the item in work is of another kind than all before
        return max(0.0, left * pace - min(waited, pace))

    def pace(self) -> float | None:
        """Seconds an item takes now, None while it cannot be known."""
        if not self._known:
            self._known, self._pace = True, _pace(list(self.spans))  # a copy: a display reads it in its own thread
        return self._pace


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The older half in pairs."""
    half = len(spans) // 2 // 2 * 2
    old = [(a + b, s + t) for (a, s), (b, t) in zip(spans[:half:2], spans[1:half:2], strict=True)]
    return [*old, *spans[half:]]


def _pace(spans: Sequence[Span]) -> float | None:
    """Seconds an item now, None while it cannot be known."""
    total = sum(seconds for _, seconds in spans)
    if len(spans) < 2 or total < SOONEST:
        return None
    logs = _logarithms(spans)
    begin = 0
    while (split := _change(logs, begin)) is not None:
        lasted = sum(seconds for _, seconds in spans[split:])
        if lasted < max(LASTED, SHARE * total) or len(spans) - split < ITEMS:
            before = spans[begin:split]
            if len(before) < LONG or sum(seconds for _, seconds in before) < 2 * LASTED:
                return None
            break
        begin = split
    now = spans[begin:]
    unlike = max(logs[begin:]) - min(logs[begin:])
    if len(now) <= FEW and unlike > math.log(UNLIKE_TWO if len(now) == 2 else UNLIKE):
        return None  # which of them is the usual one?
    if logs[-1] == max(logs) and spans[-1][1] > total * BURST and len(spans) > FEW:
        return None  # the latest outweighs many: is it the first of a new kind?
    return sum(seconds for _, seconds in now) / sum(items for items, _ in now)


def _logarithms(spans: Sequence[Span]) -> list[float]:
    """Logarithms of seconds an item; of items that workers hand over together all but the first take no time."""
    least = max(1e-6, 1e-3 * sum(seconds for _, seconds in spans) / sum(items for items, _ in spans))
    return [math.log(max(least, seconds / items)) for items, seconds in spans]


def _change(logs: Sequence[float], begin: int) -> int | None:
    """Where the pace changed most surely after `begin`: the first index of the new pace; None: nowhere."""
    values = logs[begin:]
    count, best, where = len(values), 1.0, None
    sums, squares = [0.0], [0.0]
    for value in values:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)
    for split in range(1, count - 1):
        left, right = split, count - split
        means = sums[split] / left, (sums[-1] - sums[split]) / right
        gap = abs(means[0] - means[1])
        if gap < math.log(FACTOR):
            continue
        scatter = (
            max(0.0, squares[split] - left * means[0] ** 2),
            max(0.0, squares[-1] - squares[split] - right * means[1] ** 2),
        )
        usual = max(SCATTER**2, sum(scatter) / max(1, count - 2))
        error = sum(_variance(s, n, usual) / n for s, n in zip(scatter, (left, right), strict=True))
        sureness = gap / math.sqrt(error) / (SURE_AT_START if left <= 2 and begin == 0 else SURE)
        if sureness > best:
            best, where = sureness, begin + split
    return where


def _variance(squares: float, count: int, usual: float) -> float:
    """Variance from a sum of squares, drawn towards the usual one where items are few: some equal ones are chance."""
    return (squares + WEIGHT * usual) / (count - 1 + WEIGHT)
