"""Run a benchmark: cells run as parallel processes, and finished cells are kept so that a stopped run resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from types import FrameType
from typing import Any

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import CheckpointError, RecipeError
from geo_pretrain.files import parse_json, read_sealed, write_sealed, write_text
from geo_pretrain.training.bench.cell import Job
from geo_pretrain.training.bench.measure import Rooms
from geo_pretrain.training.bench.plan import BenchSpec, Row, Training, base_data, plan
from geo_pretrain.training.bench.report import summarize
from geo_pretrain.training.config import plain_types
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.demo.machine import machine
from geo_pretrain.training.pretrain import is_trained
from geo_pretrain.training.runs import Interrupted, run_lock

SPEC, RESULTS = "bench.json", "results.json"
POLL = 0.2  # seconds between looks at the processes
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # beside Ctrl-C
# Windows asks a group of processes by this event alone, and a process in a group of its own sees no Ctrl-C.
ASK = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
NEW_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
PATIENCE = 60.0  # seconds for a process to save its state when the run is stopped

Report = Callable[[int, int, str], None]  # cells done, cells known, event


@dataclass
class Cell:
    """One process: a training with its measurements, a first stage, or measurements of random weights."""

    key: str
    job: Job
    row: str  # the task, or a description of the cell
    training: Training | None = None  # None: nothing is trained
    failure: str = ""

    @property
    def first(self) -> Training | None:
        """The first stage that must be trained before."""
        return None if self.training is None else self.training.stage1

    def is_done(self) -> bool:
        """Whether the result exists; of a first stage, which has none, the checkpoint."""
        if self.job.result is None:
            return is_trained(Path(self.job.folder))
        try:
            return bool(read_sealed(Path(self.job.result)))
        except FileNotFoundError:
            return False
        except CheckpointError as error:
            warnings.warn(f"{error} It is measured anew.", stacklevel=2)
            return False


@dataclass
class Bench:
    """The state of a benchmark in progress."""

    rows: list[Row]
    seeds: list[int]
    spec: BenchSpec
    out: Path
    jobs: int
    device: str
    report: Report
    cells: dict[str, Cell] = field(default_factory=dict)  # by key, in the order of running
    begun: set[str] = field(default_factory=set)

    def checkpoint(self, training: Training) -> Path:
        """The checkpoint folder of the training."""
        return self.out / "checkpoints" / training.key

    def add(self, key: str, row: str, folder: Path, seed: int, training: Training | None, *, measured: bool) -> None:
        """Add a cell; without a training it measures random weights of the folder's architecture."""
        first = None if training is None else training.stage1
        job = Job(
            str(folder),
            seed,
            self.spec,
            recipe=None if training is None else str(self.out / "recipes" / f"{key}.yaml"),
            stage1=None if first is None else str(self.checkpoint(first)),
            result=str(self.out / "cells" / f"{key}.json") if measured else None,
            pretrained=training is not None,
            device=self.device,
        )
        self.cells[key] = Cell(key, job, row, training)


def run_bench(
    rows: list[Row],
    seeds: list[int],
    spec: BenchSpec,
    out: Path,
    *,
    jobs: int | None = None,
    device: str = "cpu",
    command: str = "",
    report: Report = lambda *_: None,
    on_rooms: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train and measure every row with every seed, and random weights of every architecture; write `out`/results.json.

    What is finished in `out` is kept; a cell that failed is tried again by the next call. A task that fails has its
    error in the results and holds up none of the others. `jobs` processes run at a time (None: one a core, or one on
    a GPU), sharing the cores. Returns what results.json holds (see `report.summarize`).

    Raises:
        CheckpointError: another process works on `out`.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; trainings have saved their states.
        RecipeError: `out` was begun with another budget, or a recipe cannot be given this one.
    """
    cores = os.cpu_count() or 1
    # Paths of checkpoints get into recipes, which another way of writing --out must not change.
    out = out.resolve()
    bench = Bench(rows, sorted(set(seeds)), spec, out, jobs or (cores if device == "cpu" else 1), device, report)
    for seed in bench.seeds:
        for row in rows:
            _add(bench, row, seed)
    with run_lock(out, "benchmark"):
        _claim(out, spec)
        _prepare_rooms(spec, on_rooms)
        start = time.monotonic()
        _run_all(bench, max(1, cores // bench.jobs))
        return _write(bench, command, round(time.monotonic() - start))


def _write(bench: Bench, command: str, seconds: int) -> dict[str, Any]:
    """Write results.json from the finished cells."""
    failures = {(cell.row, cell.job.seed): cell.failure for cell in bench.cells.values() if cell.failure}
    path = bench.out / RESULTS
    before = _seconds_before(path)
    results = {
        "command": command,
        "machine": machine() | {"jobs": bench.jobs},
        "seconds of this call": seconds,
        "seconds of all calls": seconds + before,
    } | summarize(bench.rows, bench.seeds, bench.spec, _found(bench), failures)
    write_text(path, json.dumps(results, indent=1) + "\n")
    return results


def _seconds_before(path: Path) -> int:
    """The seconds of earlier calls; of a results.json that cannot be read, which is written anew, none."""
    try:
        return int(parse_json(path.read_bytes())["seconds of all calls"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def _claim(out: Path, spec: BenchSpec) -> None:
    """Store the budget; reject a folder that was begun with another one."""
    path, mine = out / SPEC, plain_types(spec)
    if path.is_file():
        theirs = read_sealed(path)
        changed = [f"{key} {theirs.get(key)!r} -> {value!r}" for key, value in mine.items() if theirs.get(key) != value]
        if changed:
            raise RecipeError(f"{out} was begun with another budget: {', '.join(changed)}. Choose another --out.")
        return
    write_sealed(path, mine, indent=1)


def _add(bench: Bench, row: Row, seed: int) -> None:
    """Add the cells of a row, first stages before the runs that need them; rows share equal trainings."""
    if row.recipe is None:
        return
    training = plan(row, bench.spec, seed)
    first = training.stage1
    if first is not None and first.key not in bench.cells:
        bench.add(first.key, f"first stage of {row.task}", bench.checkpoint(first), seed, first, measured=False)
    bench.add(training.key, row.task, bench.checkpoint(training), seed, training, measured=True)


def _add_twin(bench: Bench, cell: Cell) -> None:
    """Add the random-initialization baseline of a measured cell's architecture, once per seed."""
    if cell.job.result is None or not cell.job.pretrained:
        return
    twin = read_sealed(Path(cell.job.result))["twin"]
    key = f"random-{twin}-s{cell.job.seed}"
    if key not in bench.cells:
        bench.add(key, f"random weights ({twin})", Path(cell.job.folder), cell.job.seed, None, measured=True)


def _prepare_rooms(spec: BenchSpec, progress: Callable[[int, int], None] | None) -> None:
    """Render the rooms once before the processes start, which would otherwise each render them."""
    data = base_data(spec)
    open_source(data, progress=progress)
    Rooms(data, spec)


def _run_all(bench: Bench, threads: int) -> None:
    """Keep `bench.jobs` processes busy until every cell is done or has failed."""
    running: dict[str, Popen[bytes]] = {}
    kept = sum(cell.is_done() for cell in bench.cells.values())
    bench.report(kept, len(bench.cells), "")  # the remaining time is estimated from here on
    with _stopped_together(running):
        while True:
            for key in [key for key, process in running.items() if process.poll() is not None]:
                _collect(bench, bench.cells[key], running.pop(key).returncode)
            for cell in list(bench.cells.values()):
                if len(running) >= bench.jobs:
                    break
                if cell.key in bench.begun or not _is_ready(bench, cell):
                    continue
                bench.begun.add(cell.key)
                if cell.failure or cell.is_done():
                    _collect(bench, cell, 0)
                else:
                    running[cell.key] = _start(bench, cell, threads)
            if not running and bench.begun.issuperset(bench.cells):
                return
            time.sleep(POLL)


def _is_ready(bench: Bench, cell: Cell) -> bool:
    """Whether a cell's first stage is finished; if that stage failed, the cell fails too."""
    first = cell.first
    if first is None or is_trained(bench.checkpoint(first)):
        return True
    cell.failure = bench.cells[first.key].failure and f"first stage: {bench.cells[first.key].failure}"
    return bool(cell.failure)


def _start(bench: Bench, cell: Cell, threads: int) -> Popen[bytes]:
    """Start the process of a cell, with its output in logs/<key>.txt."""
    if cell.training is not None and cell.job.recipe is not None:
        write_text(Path(cell.job.recipe), cell.training.recipe.to_yaml())
    file = bench.out / "jobs" / f"{cell.key}.json"
    write_text(file, cell.job.to_json())
    log = bench.out / "logs" / f"{cell.key}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return Popen(
            [sys.executable, "-m", "geo_pretrain.training.bench.cell", str(file)],
            stdout=output,
            stderr=STDOUT,
            stdin=DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            # A terminal would send its Ctrl-C to them, too, and the second signal stops a training without saving.
            start_new_session=True,
            creationflags=NEW_GROUP,
        )


def _collect(bench: Bench, cell: Cell, returncode: int) -> None:
    """Record how a cell ended, and add the cells that follow from it."""
    if returncode or (not cell.failure and not cell.is_done()):
        cell.failure = _why(bench.out / "logs" / f"{cell.key}.txt", returncode)
    if not cell.failure:
        _add_twin(bench, cell)
    done = sum(bool(other.failure) or other.is_done() for other in bench.cells.values())
    ending = f"failed: {cell.failure}" if cell.failure else "done"
    bench.report(done, len(bench.cells), f"{cell.row}, seed {cell.job.seed}: {ending}")


def _why(log: Path, returncode: int) -> str:
    """The reason why a process failed: the last line of its output, or the signal that killed it."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    said = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    last = " ".join(lines[said[-1] if said else -1 :]).removeprefix("Error: ")
    if returncode < 0:
        killer = signal.Signals(-returncode).name
        memory = ", as when memory runs out" if killer == "SIGKILL" else ""
        return f"killed by {killer}{memory}; last said: {last or 'nothing'}"
    if returncode == 0:
        return f"ended without a result; last said: {last or 'nothing'}"
    return last or f"exit code {returncode}"


@contextmanager
def _stopped_together(running: dict[str, Popen[bytes]]) -> Iterator[None]:
    """Stop the child processes together with this one, and give them time to save their states."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # others may not set handlers
    before = {number: signal.signal(number, stop) for number in STOPS if main}
    try:
        yield
    except BaseException as error:
        for process in running.values():
            process.send_signal(ASK)
        for process in running.values():
            try:
                process.wait(PATIENCE)
            except TimeoutExpired:
                process.kill()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("Stopped; finished cells are kept. Give the same command again to go on.") from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _found(bench: Bench) -> dict[tuple[str, int], dict[str, Any]]:
    """Read the measurements by (task or baseline's key, seed)."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in bench.cells.values():
        if cell.job.result is None or not cell.is_done():
            continue
        tree = read_sealed(Path(cell.job.result))
        tree["input"] = str(read_checkpoint(cell.job.folder).contract)
        first = cell.first
        if cell.training is not None and first is not None:
            seconds = read_checkpoint(bench.checkpoint(first)).provenance["seconds"]
            facts = {"recipe": first.recipe.name, "steps": first.recipe.optim.steps, "seconds": float(seconds)}
            tree["first stage"] = facts | {"continued": cell.training.continued}
        found[cell.row if cell.job.pretrained else tree["twin"], cell.job.seed] = tree
    return found
