"""One process at a time on what a run writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from geo_pretrain.errors import CheckpointError


@contextmanager
def only_process(out: Path, what: str) -> Iterator[None]:
    """The only process that works on `out`, for `what` ("fine-tuning run"); nobody waits.

    The lock is a file beside `out` that is gone at the end. Whoever dies inside does not block the next.

    Raises:
        CheckpointError: another process, or this one a second time, works on `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"Another process is at work on the {what} in {str(out)!r}. Wait until it ends, or choose another --out."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # whoever opened it in this moment notices and starts over
        lock.release()
