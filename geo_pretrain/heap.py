"""Memory between the steps of a run: glibc's malloc keeps what was freed, instead of asking for new pages each time.

By itself glibc gives a block of 32 MB and more back to the kernel as it is freed, and the next step pays for the same
pages again, zeroed one by one (`python -m benchmarks.heap` measures how long that takes). The price: a process whose
sizes change from step to step holds more memory, since blocks leave holes.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
NEVER = -1  # a threshold of trimming: nothing is given back
LARGEST = 1 << 30  # bytes from which a block has a mapping of its own
DYNAMIC = 32 << 20  # bytes: the most that glibc's own threshold comes to; it trims at twice that


def glibc() -> ctypes.CDLL | None:
    """The C library of this process; None where it is another one, or where the environment says how to allocate."""
    if platform.libc_ver()[0] != "glibc":
        return None
    if any(name in os.environ for name in CHOSEN_BY_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    return ctypes.CDLL(None)


@contextmanager
def kept_heap() -> Iterator[None]:
    """Within the context, keep freed memory for the next use; at its end hand back what is free then.

    Not to be nested: the first end is that of all. Processes forked within keep their memory, too. Before glibc 2.35
    blocks of 32 MB and more are handed back all the same. Does nothing where the environment sets glibc's malloc
    (MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES), and on other C libraries (macOS, Windows, musl). Another allocator in
    malloc's place (jemalloc, tcmalloc) is not changed by it.
    """
    library = glibc()
    if library is None:
        yield
        return
    if not library.mallopt(MMAP, LARGEST):
        library.mallopt(MMAP, DYNAMIC)  # before glibc 2.35 the most that it takes
    library.mallopt(TRIM, NEVER)
    try:
        yield
    finally:
        library.mallopt(MMAP, DYNAMIC)
        library.mallopt(TRIM, 2 * DYNAMIC)
        library.malloc_trim(0)
