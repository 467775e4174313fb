"""Show how far long work is, in one style for all of it: a live bar in a terminal, now and then a line in a log.

`with progress() as report:` makes the one display of a process; `report.stage("matching")` is a callable
`(done, total)` for what works in a loop. It writes to standard error only. What downloads, far below a command, finds
the display that is open by `of_bytes`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from geo_pretrain.redact import safe
from geo_pretrain.remaining import Remaining

WIDTH = 80  # columns of a line
INTERVAL, SHARE, RARELY = 5.0, 0.02, 300.0  # seconds between lines of a log: at least, of the time so far, at most
LONG = 60.0  # seconds; longer work is announced
BAR = 12  # cells
NAME, LEAST = 18, 8  # columns that a shortened name keeps, and any shortened text
NUMBER = re.compile(r"(^| )[-+]?(\d[\d.e+-]*|inf|nan)( ?\S+/s)?$")  # at the end of a detail: loss 0.52, 3.1 images/s

T = TypeVar("T")
Report = Callable[[str, int, int, str], None]  # stage, done, total, detail


@dataclass
class _State:
    """A stage of the work: where it is."""

    name: str
    rest: Remaining
    began: float
    bytes: bool = False
    done: float = 0
    total: float | None = None
    detail: str = ""
    shown: float | None = None  # when its latest line was written
    announced: bool = False
    latest: float = 0.0  # time of the latest report

    def line(self, width: int = WIDTH) -> str:
        """The stage as one line of at most `width` columns."""
        ended = self.total is not None and self.done >= self.total
        left = "" if self.total is None else rest_of(self.rest.seconds())
        left = f"took {duration(self.latest - self.began)}" if ended else left
        pace = self.rest.pace() if self.bytes and not ended else None
        detail = f"{1e-6 / pace:.1f} MB/s" if pace else self.detail
        return fitted(self.name, self.count(), detail, left, width)

    def count(self) -> str:
        if not self.bytes:
            return f"{self.done:.0f}/{self.total:.0f}" if self.total is not None else f"{self.done:.0f}"
        of = "" if self.total is None else f"/{self.total / 1e6:.1f}"
        return f"{self.done / 1e6:.1f}{of} MB"


class Stage:
    """A stage of a display, as the callable `(done, total)` that a loop calls after each item."""

    def __init__(self, display: Display, name: str, detail: str = "", *, bytes: bool = False) -> None:
        self.display, self.name, self.detail, self.bytes = display, name, detail, bytes

    def __call__(self, done: float, total: float | None, detail: str | None = None) -> None:
        self.display.show(self, done, total, self.detail if detail is None else detail)

    def already(self, done: float, total: float | None) -> None:
        """The latest item was there before: how long it took tells nothing of those that have to be made."""
        self.display.show(self, done, total, self.detail, already=True)


class Display:
    """Stages of the work. This one is silent."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.process = clock, os.getpid()
        self.states: dict[str, _State] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        Stage(self, stage)(done, total, detail)

    def stage(self, name: str, detail: str = "", *, bytes: bool = False) -> Stage:
        return Stage(self, name, detail, bytes=bytes)

    def show(self, stage: Stage, done: float, total: float | None, detail: str, *, already: bool = False) -> None:
        state, now = self.states.get(stage.name), self.clock()
        if state is None or done < state.done:  # it begins, or begins again in the next run
            before, announced = state, state is not None and state.announced
            state = _State(safe(stage.name), Remaining(self.clock), now, stage.bytes, announced=announced)
            self.states[stage.name] = state
            self.begin(state, before)
        state.done, state.total, state.detail, state.latest = done, total, safe(detail), now
        state.rest.report(done, done if total is None else total, already=already)
        if not state.announced and (left := state.rest.seconds()) is not None:
            state.announced = True
            if left > LONG:
                until = time.strftime("%H:%M", time.localtime(time.time() + left))
                self.write(f"{state.name}: will take about {duration(left)}, until {until}")
        self.draw(state)

    def begin(self, state: _State, before: _State | None) -> None:
        """A stage begins; `before`: the same one of the run before."""

    def draw(self, state: _State) -> None:
        """A stage has gone on."""

    def write(self, text: str) -> None:
        """A line that stays."""


class Lines(Display):
    """Plain lines for logs and pipes: the first report, the last, and between them one now and then."""

    def __init__(self, out: Callable[[str], object] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.out = out or _to_stderr

    def write(self, text: str) -> None:
        self.out(text)

    def draw(self, state: _State) -> None:
        now = self.clock()
        ended = state.total is not None and state.done >= state.total
        interval = min(RARELY, max(INTERVAL, SHARE * (now - state.began)))
        if state.shown is None or ended or now - state.shown >= interval:
            state.shown = now
            self.write(state.line())


class Bars(Display):
    """Live bars in a terminal, by rich."""

    def __init__(self, bars: Any, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.bars = bars
        self.tasks: dict[int, Any] = {}

    def begin(self, state: _State, before: _State | None) -> None:
        if before is not None and id(before) in self.tasks:
            self.bars.remove_task(self.tasks.pop(id(before)))
        self.tasks[id(state)] = self.bars.add_task("", total=None, state=state)

    def draw(self, state: _State) -> None:
        self.bars.update(self.tasks[id(state)], completed=state.done, total=state.total)

    def write(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)


_open: list[Display] = []


@contextmanager
def progress(show: bool = True) -> Iterator[Display]:
    """The display of this process: the one that is open, or a new one; with `show` false one that is silent."""
    if show and (display := _current()) is not None:
        yield display
        return
    with _display(show) as display:
        _open.append(display)
        try:
            yield display
        finally:
            _open.remove(display)


@contextmanager
def of_bytes(title: str) -> Iterator[Stage | None]:
    """A stage of a transfer, which counts bytes; None where neither a command nor a terminal shows it."""
    if _current() is None and not sys.stderr.isatty():
        yield None
        return
    with progress() as display:
        yield display.stage(title, bytes=True)


def tell(text: str) -> None:
    """Write a line that stays, at any moment and from any thread: above the bars, or to standard error."""
    if _open:
        _open[-1].write(text)
    else:
        _to_stderr(text)


def is_shown() -> bool:
    """Whether a command shows its progress."""
    return bool(_open)


def shown_items(items: Iterable[T], name: str, detail: str, total: int) -> Iterator[T]:
    """The items, counted in a stage of the open display, if a command has opened one; `total`: at most so many."""
    display = _current()
    if display is None:
        yield from items
        return
    stage = display.stage(name, detail)
    stage(0, total)
    for done, item in enumerate(items, 1):
        yield item
        stage(done, total)
    stage(total, total)


def _current() -> Display | None:
    """The display that is open in this process; one that a parent had open is not for its forks."""
    return _open[-1] if _open and _open[-1].process == os.getpid() else None


def already(report: Callable[[int, int], None] | None, done: int, total: int) -> None:
    """Report an item that was there before to any callback `(done, total)`; displays do not judge the rest by it."""
    if report is not None:
        getattr(report, "already", report)(done, total)


def stage_of(report: Report, name: str, detail: str = "") -> Callable[[int, int], None]:
    """A stage of a display, or of any other callable `(stage, done, total, detail)`, as a callable `(done, total)`."""
    if isinstance(report, Display):
        return report.stage(name, detail)
    return lambda done, total: report(name, done, total, detail)


@contextmanager
def _display(show: bool) -> Iterator[Display]:
    if not show:
        yield Display()
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    from rich.progress import Progress, ProgressColumn, Task
    from rich.text import Text

    class Line(ProgressColumn):
        """A stage as one line: bar, count, detail, what is left."""

        def render(self, task: Task) -> Text:
            width = min(console.width, 2 * WIDTH)
            bar = min(BAR, width // 6)
            text = task.fields["state"].line(width - bar - 1)
            full = 0 if not task.total else round(bar * min(1.0, task.completed / task.total))
            mark = "-" if console.options.ascii_only else "\u2501"
            return Text.assemble((mark * full, "green"), (mark * (bar - full), "bright_black"), " ", text, no_wrap=True)

    # Answers on standard output stay there where it is a file: rich would print them above the bars.
    with Progress(Line(), console=console, expand=True, redirect_stdout=sys.stdout.isatty()) as bars:
        yield Bars(bars)


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """A time in words, two digits: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    for unit, size, most in (("min", 60, 99.5), ("h", 3600, 47.95)):
        if seconds / size < most:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def rest_of(seconds: float | None) -> str:
    """What is left, in words."""
    return "estimating..." if seconds is None else f"{duration(seconds)} left"


def fitted(name: str, count: str, detail: str, left: str, width: int) -> str:
    """`name: count, detail, left` in at most `width` columns.

    A long name is shortened first, then the longest text of the details, which commas part. A number is never cut:
    details that end in one, or in one and its unit, are left out from the last on.
    """
    parts = [part for part in detail.split(", ") if part]

    def over() -> int:
        return len(_joined(name, count, parts, left)) - width

    name = _cut(name, max(NAME, len(name) - max(0, over())))
    while over() > 0 and parts:
        texts = [number for number, part in enumerate(parts) if not NUMBER.search(part)]
        longest = max(texts, key=lambda number: len(parts[number]), default=len(parts) - 1)
        short = _cut(parts[longest], max(len(parts[longest]) - over(), LEAST))
        if short == parts[longest] or longest not in texts:
            parts.pop(longest)
        else:
            parts[longest] = short
    if over() > 0:
        name = _cut(name, max(len(name) - over(), LEAST))
    return _joined(name, count, parts, left)[:width]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _joined(name: str, count: str, parts: list[str], left: str) -> str:
    return ", ".join([f"{name}: {count}", *parts, *([left] if left else [])])
