"""Memory that a run keeps between its steps."""

import os
import subprocess
import sys

import pytest

from geo_pretrain import heap

# The share of its memory that a step gets as new pages, before and in the context; then the memory handed back (MB).
STEPS = """
import resource
import torch
from geo_pretrain.heap import kept_heap

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(size << 20, dtype=torch.uint8).fill_(1) for size in (48, 5, 33, 64, 12, 40)]
    pages = sum(map(len, blocks)) / resource.getpagesize()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

before = min(step() for _ in range(6))
with kept_heap():
    within = min([step() for _ in range(20)][10:])
    most = held()
print(before, within, most - held())
"""

needs_glibc = pytest.mark.skipif(heap.glibc() is None, reason="another C library than glibc, or malloc set by the user")


def measured(**environment: str) -> tuple[float, ...]:
    kept = {name: value for name, value in os.environ.items() if name not in heap.CHOSEN_BY_USER}
    run = subprocess.run([sys.executable, "-c", STEPS], env=kept | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tuple(float(word) for word in run.stdout.split())


@needs_glibc
def test_steps_find_their_memory_again_and_the_end_hands_it_back():
    before, within, handed_back = measured()
    assert before > 0.4
    assert within < 0.05
    assert handed_back > 100


@needs_glibc
@pytest.mark.parametrize(
    "chosen",
    [{"MALLOC_MMAP_THRESHOLD_": "1048576"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}],
    ids=["environment", "tunables"],
)
def test_what_the_user_set_is_left_alone(chosen):
    before, within, _ = measured(**chosen)
    assert before > 0.9
    assert within > 0.9


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("nothing may be called there"))
    with heap.kept_heap():
        pass
