"""Memory that a run keeps between its steps."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from geo_pretrain import heap

# The share of its memory that a step gets as new pages, before and in the context. In full: the memory handed back at
# its end (MB), and the share that a large block gets as new pages after it.
STEPS = """
import resource
import sys
import torch
from geo_pretrain.heap import kept_heap

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(size << 20, dtype=torch.uint8).fill_(1) for size in (48, 5, 33, 64, 12, 40)]
    pages = sum(map(len, blocks)) / resource.getpagesize()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

before = min(step() for _ in range(4))
with kept_heap():
    within = min([step() for _ in range(10)][5:])
    most = held()
if sys.argv[1:] != ["full"]:
    print(before, within)
    sys.exit()
handed_back = most - held()
faults = []
for _ in range(3):  # larger than any hole
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(400 << 20, dtype=torch.uint8).fill_(1)
    faults.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start) * resource.getpagesize() / (400 << 20))
print(before, within, handed_back, min(faults))
"""

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLD = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2] if part.isdigit()) < (2, 35)
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or OLD or (PAGES.exists() and "[always]" in PAGES.read_text()),
    reason="no glibc from 2.35 on, or large pages for all: nothing to count",
)


def measured(*how: str, **environment: str) -> tuple[float, ...]:
    kept = {name: value for name, value in os.environ.items() if name not in (*heap.CHOSEN_BY_USER, "GLIBC_TUNABLES")}
    small_pages = {"THP_MEM_ALLOC_ENABLE": "0"}  # torch's own choice
    run = subprocess.run(
        [sys.executable, "-c", STEPS, *how], env=kept | small_pages | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return tuple(float(word) for word in run.stdout.split())


@needs_glibc
def test_steps_find_their_memory_again_and_the_end_hands_it_back():
    before, within, handed_back, afterwards = measured("full")
    assert before > 0.4
    assert within < 0.05
    assert handed_back > 100
    assert afterwards > 0.9


@needs_glibc
@pytest.mark.parametrize(
    "chosen",
    [{"MALLOC_MMAP_THRESHOLD_": "1048576"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}],
    ids=["environment", "tunables"],
)
def test_what_the_user_set_is_left_alone(chosen):
    before, within = measured(**chosen)
    assert before > 0.9
    assert within > 0.9


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("nothing may be called there"))
    with heap.kept_heap():
        pass
