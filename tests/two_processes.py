"""Two processes that train together, for tests of what they share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def in_two_processes(work: Callable[[int], None], folder: Path) -> None:
    """Call `work(rank)` in each of two gloo processes, which meet in `folder`; both must end well.

    Forked, since torchrun would import torch three times. Neither closes its connections before both are through: the
    other one's last collective would fail. One that fails does not keep the other waiting.
    """
    context = multiprocessing.get_context("fork")
    through = context.Barrier(2)

    def joined(rank: int) -> None:
        # Torch makes its pool anew at the first use after a fork; threads that come at once find none and fail.
        torch.set_num_threads(torch.get_num_threads())
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        try:
            work(rank)
        except BaseException:
            through.abort()
            raise
        through.wait(100)
        dist.destroy_process_group()

    processes = [context.Process(target=joined, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
