"""Settings of every test: one thread a process (xdist uses the cores), a cache of their own, no outside hub."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import signal
import sys

import pytest

gc.disable()  # imports make no garbage; a million objects of torch were looked through again and again
os.fsync = lambda descriptor: None  # tests that write real files wait for the disk only in processes of their own
os.environ["OMP_NUM_THREADS"] = "1"
# glibc in xdist's workers and in programs that tests start: freed memory is used again, not handed back and zeroed
# anew, which took a tenth of the processor time. Tests of `kept_heap` take it out again.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(128 << 20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(512 << 20))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of the many programs that tests start would compile all anew
sys.dont_write_bytecode = False
os.environ.pop("GEO_PRETRAIN_HUB", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so does a shell for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that tests start and interrupt must notice
os.environ["GEO_PRETRAIN_MIRROR"] = "http://127.0.0.1:9"  # where authors' files would come from: nobody listens there


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: the collector need not look at it after each test. Forks can compute gradients.

    The first backward pass of a process starts threads for all kinds of devices that are known then, and no fork has
    gradients after that. torch._dynamo makes one known, so a pass comes before the first test that imports it.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].ones(1, requires_grad=True).sum().backward()
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # or libraries take what they made for leaked


# Files with tests of ten seconds and more: begun first, so that no core waits for them at the end.
LONG = (
    "test_adding.py",
    "test_cli_bench.py",
    "test_compiled.py",
    "test_demo.py",
    "test_fast.py",
    "test_layouts.py",
    "test_loop.py",
    "test_pri3d_geo.py",
    "test_processes.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Rooms rendered by one test worker serve the others; nothing of the user's cache is read or written."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["GEO_PRETRAIN_CACHE"] = str(base / "geo_pretrain_cache")
    return base


@pytest.fixture(scope="module")
def quick_weights():
    """Random weights repeat after 4,999 numbers: drawing them takes most of the time that a real-size network takes."""
    import torch

    def repeating(draw):
        def fill(tensor, *arguments, **options):
            if tensor.is_meta or tensor.numel() <= 4999 or not tensor.is_contiguous():
                return draw(tensor, *arguments, **options)
            flat = tensor.view(-1)
            drawn = draw(flat[:4999], *arguments, **options)
            flat.copy_(drawn.repeat(-(-len(flat) // 4999))[: len(flat)])
            return tensor

        return fill

    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal_", "uniform_"):
            patch.setattr(torch.Tensor, name, repeating(getattr(torch.Tensor, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def float32():
    """`precision: auto` is float32 on every machine: stored numbers are, and so are comparisons bit for bit."""
    from geo_pretrain.training import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "bf16_is_faster", lambda device, points=False: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in one order, so that runs can be compared bit for bit; the workers of the suite share the processors."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_command_tree():
    """Commands and options are gathered once a worker, not at each call: that took three quarters of a call's time."""
    import typer.main
    import typer.testing

    gathered = functools.cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", gathered)
        patch.setattr(typer.testing, "_get_command", gathered)
        yield
