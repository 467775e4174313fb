"""A process that is gone ends the run: each process of a group beats, its neighbor listens.

Collectives notice a peer only when its connection is closed, or after minutes (ten with nccl, thirty with gloo): not
when a machine loses power or hangs. Long waits are also usual while one process mines pairs or renders rooms, so their
own limit cannot be short. The beat is a thread's, and goes on whatever the process does.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from geo_pretrain.errors import RecipeError

SETTING = "GEO_PRETRAIN_DEAD_AFTER"  # environment variable: seconds without a beat; 0: never
DEAD_AFTER = 45.0  # s, where it is not set
MISSED = 9  # looks in a row without a new beat: counted and not timed, so that a suspended program may go on
DONE, DEAD = "done", "dead"


def dead_after() -> float:
    """Seconds without a sign of life after which a process is taken for dead. Raises `RecipeError` for no number."""
    text = os.environ.get(SETTING, "")
    try:
        seconds = float(text) if text else DEAD_AFTER
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise RecipeError(f"{SETTING} is {text!r}, accepted are seconds from 0 (never) up.")
    return seconds


class Heartbeat:
    """Beats for this process and listens to the next one in the ring of all; `close` ends it.

    One thread talks to the group's store, by a connection of its own: others may hold theirs for long. A second one
    watches the first, which waits for ever when the machine of the store is gone.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        size: int,
        seconds: float,
        leave: Callable[[str], None] | None = None,
    ) -> None:
        self.connect, self.rank, self.size = connect, rank, size
        self.neighbor, self.interval = (rank + 1) % size, seconds / MISSED
        self.leave = leave or end_process
        self._end, self._talks = threading.Event(), 0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()

    @classmethod
    def of_environment(cls, rank: int, size: int) -> Heartbeat | None:
        """The beat in the group that torchrun announces in the environment; None where `SETTING` is 0."""
        seconds = dead_after()
        if seconds == 0:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a start

        def connect() -> dist.Store:
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(seconds, 1)))
            return dist.PrefixStore(f"geo_pretrain/beats/{run}", store)

        return cls(connect, rank, size, seconds)

    def close(self) -> None:
        """Say that this process is done, and stop."""
        self._end.set()
        self._threads[0].join(self.interval * MISSED)

    def _talk(self) -> None:
        store, beat, heard, missed = None, 0, "", 0
        while True:
            ended = self._end.wait(self.interval if store is not None else 0)
            try:
                store = store or self.connect()
                beat += 1
                store.set(str(self.rank), DONE if ended else str(beat))
                if ended:
                    return
                now = _read(store, str(self.neighbor))
                missed = missed + 1 if now == heard and now not in ("", DONE) else 0
                heard = now
                if missed >= MISSED:
                    store.set(DEAD, str(self.neighbor))
                dead = _read(store, DEAD)
            except (RuntimeError, OSError):  # no answer: `_watch` counts how often
                if ended:
                    return
                store = None
                self._end.wait(self.interval)
                continue
            self._talks += 1
            if dead:
                self.leave(f"Process {dead} of {self.size} has given no sign of life for {MISSED * self.interval:g} s")
                return

    def _watch(self) -> None:
        talks, missed = 0, 0
        while not self._end.wait(self.interval):
            missed = missed + 1 if talks == self._talks and talks else 0
            talks = self._talks
            if missed >= MISSED:
                self.leave(f"The group's store has not answered for {MISSED * self.interval:g} s: its machine is gone")
                return


def _read(store: dist.Store, key: str) -> str:
    """The value of a key, "" where there is none yet."""
    return store.get(key).decode() if store.check([key]) else ""


def end_process(why: str) -> None:
    """End this process at once: what it waits for may never come. States are replaced atomically, so none is torn."""
    print(  # noqa: T201 - the command line may not come to say it
        f"Error: {why}. The run ends; its last saved state stays: give the same command again to go on.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
