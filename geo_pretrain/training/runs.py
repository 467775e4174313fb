"""A run's folder `<out>.run`: one process at a time, state and log that survive a kill, requests to stop."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import geo_pretrain
from geo_pretrain.errors import CheckpointError, GeoPretrainError, MissingDependency, require
from geo_pretrain.files import atomic_write, locked

STATE, LOG, BOARD = "state.pt", "log.jsonl", "tensorboard"
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "safetensors")  # whose versions a result names

WriteLog = Callable[[Mapping[str, Any], Mapping[str, float]], None]  # a line {"step": ..., ...}; the losses in it


class Interrupted(GeoPretrainError):
    """The run was asked to stop and has saved its state."""


@dataclass(frozen=True)
class RunFolder:
    """The folder with state and log of a run, until its result is written to `out`."""

    out: Path
    writes: bool = True  # False: a process beside the main one, which only reads
    board: bool = False  # write TensorBoard's event files, where it is installed

    @property
    def path(self) -> Path:
        """The folder beside `out`."""
        return run_folder(self.out)

    @property
    def log_file(self) -> Path:
        """One JSON line a step, and one an evaluation."""
        return self.path / LOG

    def create(self) -> None:
        """Make the folder, unless it is there."""
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Delete the folder and its content."""
        shutil.rmtree(self.path)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state; a kill at any moment leaves the old one or the new one."""
        if self.writes:
            with atomic_write(self.path / STATE) as part:
                torch.save(state, part)

    def load(self) -> dict[str, Any] | None:
        """The saved state, its tensors on the CPU; None at the beginning of a run."""
        path = self.path / STATE
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    @contextmanager
    def log(self, step: int) -> Iterator[WriteLog]:
        """A function that appends a line to the log, and shows losses in TensorBoard.

        Lines after `step`, where the run goes on, are dropped first, and so is a line that was broken off.
        """
        if not self.writes:
            yield write_nothing
            return
        _drop_lines_after(self.log_file, step)
        board = _tensorboard(self.path / BOARD, step) if self.board else None
        with self.log_file.open("a", encoding="utf-8") as file:

            def write(record: Mapping[str, Any], losses: Mapping[str, float]) -> None:
                file.write(json.dumps(record) + "\n")
                file.flush()
                if board is not None:
                    for name, value in losses.items():
                        board.add_scalar(f"loss/{name}", value, record["step"])

            try:
                yield write
            finally:
                if board is not None:
                    board.close()

    def keep_board(self) -> None:
        """Move the event files into `out`; those of an older run are deleted."""
        if (self.path / BOARD).exists():
            shutil.rmtree(self.out / BOARD, ignore_errors=True)
            shutil.move(self.path / BOARD, self.out / BOARD)


def write_nothing(record: Mapping[str, Any], losses: Mapping[str, float]) -> None:
    """A log that is not kept."""


def run_folder(out: Path) -> Path:
    """Where the run that ends in `out` keeps its state."""
    return out.with_name(out.name + ".run")


def check_out(out: Path, result: str, what: str, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if `out` holds a finished `what` (its file `result`) and there is no run to resume."""
    if (out / result).exists() and not run_folder(out).exists() and not overwrite:
        raise CheckpointError(f"{str(out)!r} already holds {what}. Choose another --out, or pass --overwrite.")


def run_lock(out: Path, what: str) -> AbstractContextManager[None]:
    """Hold the lock of `out` for `what` ("fine-tuning run"); while another holds it, raise `CheckpointError`."""
    busy = f"Another process is at work on the {what} in {str(out)!r}. Wait until it ends, or choose another --out."
    return locked(out, busy=busy)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM; a second signal acts at once, as without this handler."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _drop_lines_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if not line.endswith("}") or json.loads(line)["step"] > step:
            break
        kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _tensorboard(path: Path, step: int) -> Any:
    try:
        tensorboard = require("torch.utils.tensorboard", "training")
    except MissingDependency:  # the log file holds the same numbers
        return None
    return tensorboard.SummaryWriter(str(path), purge_step=step + 1)


def code_version() -> str:
    """The package version, with the commit when it runs from a git checkout."""
    root = Path(geo_pretrain.__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (root / ".git").exists():
        return geo_pretrain.__version__
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return geo_pretrain.__version__
    return f"{geo_pretrain.__version__}+{commit}"


def library_versions() -> dict[str, str]:
    """The versions of the libraries that numbers depend on."""
    return {name: version(name) for name in LIBRARIES}
