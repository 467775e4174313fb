"""Runs that are ended by SIGKILL at a step, for tests of how they go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any


def run_killed_at(step: int, run: Callable[..., Any]) -> None:
    """Call `run(on_step=...)` in a forked process that ends itself by SIGKILL right after a step."""

    def kill(info: Any) -> None:
        if info.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run, kwargs={"on_step": kill})
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
