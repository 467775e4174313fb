"""Settings of every test: one thread a process (xdist uses the cores), a cache of their own, no outside hub."""

from __future__ import annotations

import os
import signal
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of the many programs that tests start would compile all anew
sys.dont_write_bytecode = False
os.environ.pop("GEO_PRETRAIN_HUB", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so does a shell for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that tests start and interrupt must notice
os.environ["GEO_PRETRAIN_MIRROR"] = "http://127.0.0.1:9"  # where authors' files would come from: nobody listens there


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Rooms rendered by one test worker serve the others; nothing of the user's cache is read or written."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["GEO_PRETRAIN_CACHE"] = str(base / "geo_pretrain_cache")
    return base


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
