"""Mine the pairs of a source into a folder, one file a scene: by processes, shards, or any executor of jobs."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.files import parse_json
from geo_pretrain.progress import already
from geo_pretrain.training.config import parse, plain_types
from geo_pretrain.training.data.frame import Pair, SkippedFrames, Source
from geo_pretrain.training.data.mining import compare_frames, mine_scene, own_pairs, prepared, refuse_changed
from geo_pretrain.training.data.pair_files import identity, mined_once, refuse_other_settings, spread_evenly
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import DataSpec

POLL = 0.1  # seconds between looks at jobs
SAMPLED_SCENES, SAMPLED_FRAMES = 3, 24  # of which an estimate measures time, bytes and overlaps
NEAR = 8  # frames between those that are compared by a data set's own rule
PAIR_BYTES = 40  # of a pair in a file

OnScene = Callable[[int, int], None]  # called with (done, total), scenes or jobs


@dataclass
class Mined:
    """What a call mined."""

    made: int = 0  # scenes
    present: int = 0  # scenes that were there before
    pairs: int = 0  # of both
    tested: int = 0
    skips: SkippedFrames = field(default_factory=SkippedFrames)

    def join(self, other: Mined) -> None:
        """Add what another job mined."""
        self.made, self.present = self.made + other.made, self.present + other.present
        self.pairs, self.tested = self.pairs + other.pairs, self.tested + other.tested
        self.skips.reasons.update(other.skips.reasons)


def mine_pairs(
    spec: DataSpec,
    out: Path,
    *,
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
    executor: Any = None,
    jobs: int | None = None,
    device: str = "cpu",
    progress: OnScene | None = None,
) -> Mined:
    """Mine the pairs of every scene of a source into `out`/SCENE.json; scenes that are there are kept.

    Args:
        shard: (I, N) takes every N-th scene, from the I-th on, I = 1..N: for N machines that share `out`.
        workers: processes that mine scenes side by side.
        executor: what runs the jobs instead, such as submitit's: anything whose `submit(function, *arguments)` gives an
            object with `done()` and `result()`. It is not shut down.
        jobs: number of jobs for the executor, each of which mines its share of the scenes with `workers` processes;
            None: one a scene.

    A job that fails stops the others that have not begun. What is mined stays; the same call goes on. Raises as
    `open_source`, and `DataError` when a process was ended from outside, or when scenes that are there were mined from
    other frames (`refuse_changed`).
    """
    if not 1 <= shard[0] <= shard[1]:
        raise RecipeError(f"Shard {shard[0]}/{shard[1]} is given; accepted: I/N with I from 1 to N.")
    text = json.dumps(plain_types(spec))
    scenes = _opened(text, device).scenes()[shard[0] - 1 :: shard[1]]
    report = progress or (lambda done, total: None)
    if executor is None and (workers <= 1 or len(scenes) <= 1):
        return _mine_here(text, out, shard, device, report)
    count = min(jobs or len(scenes), len(scenes))
    parts = [(shard[0] + shard[1] * part, shard[1] * count) for part in range(count)]
    inner = workers if executor is not None and jobs is not None else 1
    result = Mined()
    with nullcontext(executor) if executor is not None else _processes(min(workers, count)) as pool:
        with getattr(pool, "batch", nullcontext)():  # submitit sends them as one array
            waiting = [pool.submit(mine_shard, text, str(out), part, inner, device) for part in parts]
        for done, job in enumerate(_finished(waiting), 1):
            result.join(mined := job.result())
            (report if mined.made else partial(already, report))(done, count)
    return result


def mine_shard(text: str, out: str, shard: tuple[int, int], workers: int, device: str) -> Mined:
    """Mine a share of the scenes; the job that executors run. `text`: a `DataSpec` in JSON."""
    if workers > 1:
        return mine_pairs(_spec(text), Path(out), shard=shard, workers=workers, device=device)
    return _mine_here(text, Path(out), shard, device, lambda done, total: None)


def _mine_here(text: str, out: Path, shard: tuple[int, int], device: str, report: OnScene) -> Mined:
    spec, source, result, kept = _spec(text), _opened(text, device), Mined(), list[Pair]()
    scenes = source.scenes()[shard[0] - 1 :: shard[1]]
    for done, scene in enumerate(scenes, 1):
        made_from = identity(source, scene, spec)
        refuse_other_settings(out, scene, made_from, spec.frames)
        mined, now = mined_once(out, scene, made_from, partial(mine_scene, source, scene, spec, device), spec.frames)
        result.join(Mined(int(now), int(not now), len(mined.pairs), mined.tested.pairs, mined.skips))
        kept += [] if now else mined.pairs
        (report if now else partial(already, report))(done, len(scenes))
    refuse_changed(source, kept, spec, out)
    return result


def _spec(text: str) -> DataSpec:
    return parse(DataSpec, parse_json(text), where="job", prefix="data.")


@lru_cache(maxsize=1)
def _opened(text: str, device: str) -> Source:
    """Open a source once a process: listing a large folder takes longer than mining a scene."""
    return open_source(_spec(text), device=device)


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")  # forked processes of a program with threads may hang
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    except BrokenProcessPool:
        raise DataError(
            "A process that mined pairs was ended from outside, often for want of memory. What is done stays: the "
            "same command continues it; fewer --workers need less memory."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(waiting: list[Any]) -> Iterator[Any]:
    """Yield jobs as they are done. When the caller stops, those that have not begun are canceled."""
    waiting = list(waiting)
    try:
        while waiting:
            done = [job for job in waiting if job.done()]
            waiting = [job for job in waiting if job not in done]
            yield from done
            if not done:
                time.sleep(POLL)
    finally:
        for job in waiting:
            job.cancel()


@dataclass(frozen=True)
class Estimate:
    """What mining a source will take, measured on a few scenes."""

    scenes: int
    frames: int
    pairs: int  # to be tested
    kept: int  # of them, expected
    hours: float
    read_gb: float | None  # None where the system does not tell
    write_gb: float
    measured_frames: int  # on which this rests
    readable: float  # share of them

    def __str__(self) -> str:
        read = "" if self.read_gb is None else f"{self.read_gb:.3g} GB to read, "
        lost = "" if self.readable == 1 else f", {1 - self.readable:.0%} of which could not be read"
        return (
            f"{self.scenes} scenes, {self.frames} frames, {self.pairs} pairs to test: about {self.kept} pairs, "
            f"{self.hours:.2g} hours, {read}{self.write_gb:.2g} GB to write "
            f"(extrapolated from {self.measured_frames} frames{lost})"
        )


def estimate(source: Source, spec: DataSpec, *, workers: int = 1, device: str = "cpu") -> Estimate:
    """Estimate the pairs, hours and gigabytes of mining a source with `workers` processes, from a few of its scenes.

    Raises `DataError` when none of the frames that it reads can be used.
    """
    own = own_pairs(source) if spec.measure == "source" else None
    sizes = [len(source.frame_ids(scene)) for scene in source.scenes()]
    pairs = sum(count * (count - 1) // 2 for count in sizes)
    if own is not None:
        pairs = sum(own.tests(scene, source.frame_ids(scene)) for scene in source.scenes())
    read, frames, tested, kept, reading, comparing = _bytes_read(), 0, 0, 0, 0.0, 0.0
    faults: list[BadFrame] = []
    for scene in spread_evenly(source.scenes(), SAMPLED_SCENES):
        begin, clouds = time.monotonic(), []
        if own is not None:
            ids, skips = _neighbors(source.frame_ids(scene)), SkippedFrames()
            values = [ratio for _, _, ratio in own.overlaps(scene, ids, skips)]
            comparing += time.monotonic() - begin  # and reading: frames are read once for many comparisons
            frames += len(ids)
            faults += [BadFrame(path, reason) for path, reason in skips.reasons.items()]
        else:
            for id in spread_evenly(source.frame_ids(scene), SAMPLED_FRAMES):
                frames += 1
                try:
                    clouds.append(prepared(source.load(scene, id), spec))
                except BadFrame as bad:
                    faults.append(bad)
            reading += time.monotonic() - begin
            begin = time.monotonic()
            ratios = compare_frames(clouds, spec, device)
            comparing += time.monotonic() - begin
            values = [ratios[i, j] for i, j in combinations(range(len(clouds)), 2)]
        tested += len(values)
        kept += sum(spec.overlap[0] <= value <= spec.overlap[1] for value in values)
    if frames == len(faults):
        raise faults[0] if faults else DataError(f"Source {source.name!r} has no frame.")
    readable = 1 - len(faults) / frames
    if own is None:
        pairs = round(pairs * readable**2)
    seconds = sum(sizes) * reading / frames + pairs * comparing / max(tested, 1)
    expected, now = round(pairs * kept / max(tested, 1)), _bytes_read()
    amount = None if read is None or now is None else (now - read) / frames * sum(sizes) / 1e9
    if spec.max_pairs_per_scene is not None:
        expected = min(expected, spec.max_pairs_per_scene * len(sizes))
    return Estimate(
        scenes=len(sizes),
        frames=sum(sizes),
        pairs=pairs,
        kept=expected,
        hours=seconds / workers / 3600,
        read_gb=amount,
        write_gb=expected * PAIR_BYTES / 1e9,
        measured_frames=frames,
        readable=readable,
    )


def _neighbors(ids: list[str]) -> list[str]:
    """Some frames of a scene, near enough to each other for rules that compare neighbors in time."""
    step = min(NEAR, max(1, len(ids) // SAMPLED_FRAMES))
    start = (len(ids) - step * SAMPLED_FRAMES) // 2
    return ids[max(start, 0) :: step][:SAMPLED_FRAMES]


def _bytes_read() -> int | None:
    """Bytes that this process has read from files; None where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar")), None)
