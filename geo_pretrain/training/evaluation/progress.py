"""Progress of evaluations, as callbacks `progress(done, total)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]


def part_of(progress: Progress | None, number: int, count: int) -> Progress:
    """Report the progress of one of `count` equal parts as progress of the whole."""

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(number * total + done, count * total)

    return show


def counted(progress: Progress | None, total: int) -> Iterator[None]:
    """Each `next` reports that one more of `total` is done."""
    done = 0
    while True:
        done += 1
        if progress is not None:
            progress(done, total)
        yield
