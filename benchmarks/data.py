"""Loading: frames per second of one worker, where the time goes, and how many workers one GPU's step of Pri3D needs.

Run: OMP_NUM_THREADS=1 python -m benchmarks.data DATA [--pairs 48] [--repeats 3]; writes benchmarks/results/data.json.
DATA is a folder in 7-Scenes layout. One core, processor time, files in the page cache: the disk is not measured. A
sample is one of `pri3d_view_r50`: two frames read, brought to 240x320, augmented in color and normalized; batches are
joined.

The rate of a GPU is assumed, not measured: that of NVIDIA's ResNet-50 training on an A100 of 80 GB (images of 224x224
a second in TF32 and in mixed precision, from NVIDIA's DeepLearningExamples,
PyTorch/Classification/ConvNets/resnet50v1.5), carried over to our step by the operations of both forward passes, which
torch counts. Workers are taken to scale.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

from benchmarks.common import machine, spread, write_results
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples import augment, pairs
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.data.shard_files import write_shards
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import DataSpec, Recipe, load_recipe
from geo_pretrain.training.tasks import build_task

RECIPE, BATCH = "pri3d_view_r50", 8  # pairs that a process takes at once
A100 = {"tf32": 938.0, "mixed precision": 2470.0}  # images of 224x224 a second, training of ResNet-50, one A100 80 GB
FORWARD_AND_BACKWARD = 3  # times the multiplications of the forward pass
PARTS: dict[str, tuple[Any, str]] = {  # what is timed, and where it stands
    "decode color": (files, "read_frame_color"),
    "decode depth": (files, "read_raw_depth"),
    "depth to meters": (files, "meters_of"),
    "load": (pairs, "read_pair"),
    "augment color": (pairs, "augment_colors"),
    "normalize": (augment.Normalize, "__call__"),
}


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the processor time of each of `PARTS` within the context."""

    def timer(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*given: Any, **named: Any) -> Any:
            begin = time.process_time()
            try:
                return call(*given, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - begin

        return timing

    patches = [
        mock.patch.object(where, name, timer(part, getattr(where, name))) for part, (where, name) in PARTS.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def samples_of(recipe: Recipe, source: Source, count: int) -> Samples:
    """Samples of pairs of frames that are far apart in the recording, so that none is read twice in a row."""
    (scene, *_) = source.scenes()
    ids = source.frame_ids(scene)
    half = len(ids) // 2
    chosen = [Pair(scene, ids[k], ids[k + half], 0.5) for k in range(0, half, max(1, half // count))][:count]
    return build_task(recipe).dataset(source, chosen)


def measure(samples: Samples, repeats: int) -> dict[str, Any]:
    """Frames a second of one core, and milliseconds of each part a frame."""
    rates, parts = [], dict[str, list[float]]()
    frames = 2 * len(samples)
    samples[(0, 0)]
    for epoch in range(repeats):
        begin = time.process_time()
        made = [samples[(epoch, k)] for k in range(len(samples))]
        joining = time.process_time()
        for k in range(0, len(made), BATCH):
            samples.collate(made[k : k + BATCH])
        end = time.process_time()
        rates.append(frames / (end - begin))
        spent: dict[str, float] = {}
        with timed(spent):
            whole = time.process_time()
            for k in range(len(samples)):
                samples[(epoch, k)]
            whole = time.process_time() - whole
        inside = sum(spent[name] for name in ("decode color", "decode depth", "depth to meters"))
        spent["read bytes, resize, cameras"] = spent.pop("load") - inside
        spent["rest"] = whole - sum(spent.values())
        spent["join a batch"] = end - joining
        for name, seconds in spent.items():
            parts.setdefault(name, []).append(1000 * seconds / frames)
    return {
        "frames_per_second": spread(rates),
        "milliseconds_a_frame": {name: round(statistics.median(values), 2) for name, values in parts.items()},
    }


def through_a_worker(samples: Samples) -> float:
    """Frames a second that one loader process hands over, by the clock: an idle core is needed."""
    keys = [[(0, k) for k in range(at, min(at + BATCH, len(samples)))] for at in range(0, len(samples), BATCH)] * 2
    loader = DataLoader(samples, batch_sampler=keys, num_workers=1, collate_fn=samples.collate)
    iterator = iter(loader)
    next(iterator)  # the process starts
    begin, frames = time.perf_counter(), 0
    for batch in iterator:
        frames += 2 * len(batch["seed"])
    return frames / (time.perf_counter() - begin)


def multiplications(call: Callable[[], Any]) -> float:
    """Floating-point operations of a call, as torch counts them (two a multiplication with addition)."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def gpu_rates(recipe: Recipe) -> dict[str, Any]:
    """Frames a second that the assumed GPU takes in a step of the recipe."""
    reference = resnet50().eval()
    of_reference = multiplications(lambda: reference(torch.zeros(1, 3, 224, 224)))
    unet = build_task(recipe).backbone.eval()
    of_frame = multiplications(lambda: unet(torch.zeros(1, 3, *recipe.data.size)))
    return {
        "assumed": "NVIDIA A100 80 GB as it trains ResNet-50 at 224x224, carried over by operations",
        "reference_images_per_second": A100,
        "gflop_a_frame": {
            "resnet50_224": round(FORWARD_AND_BACKWARD * of_reference / 1e9, 1),
            "step_of_recipe": round(FORWARD_AND_BACKWARD * of_frame / 1e9, 1),
        },
        "frames_per_second": {name: round(rate * of_reference / of_frame, 1) for name, rate in A100.items()},
    }


def sources_of(data: Path, folder: Path, size: tuple[int, int], frames: int) -> dict[str, Source]:
    """The same frames as a folder, and in three kinds of shards."""
    whole = open_source(DataSpec(source="seven_scenes", path=str(data)))
    few = _Few(whole, frames)
    kinds: dict[str, dict[str, Any]] = {
        "shards, PNG": {},
        "shards, PNG 240x320": {"size": size},
        "shards, JPEG 240x320": {"size": size, "jpeg": 95},
    }
    found: dict[str, Source] = {"folder, JPEG 480x640": few}
    for number, (name, options) in enumerate(kinds.items()):
        write_shards(few, folder / str(number), **options)
        found[name] = open_source(DataSpec(source="shards", path=str(folder / str(number))))
    return found


class _Few:
    """Some frames of a recording, evenly spaced."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.name = source, source.name
        (self.scene, *_) = source.scenes()
        ids = source.frame_ids(self.scene)
        self.ids = ids[:: max(1, len(ids) // count)][:count]

    def scenes(self) -> list[str]:
        return [self.scene]

    def frame_ids(self, scene: str) -> list[str]:
        return self.ids

    def load(self, scene: str, frame_id: str) -> Any:
        return self.source.load(scene, frame_id)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, ["model.init=scratch"])
    gpu = gpu_rates(recipe)
    loaders: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources_of(options.data, Path(folder), recipe.data.size, 2 * options.pairs).items():
            samples = samples_of(recipe, source, options.pairs)
            found = measure(samples, options.repeats)
            rate = found["frames_per_second"]["median"]
            needed = {kind: math.ceil(wanted / rate) for kind, wanted in gpu["frames_per_second"].items()}
            handed = round(through_a_worker(samples), 1)
            loaders[name] = found | {
                "frames_per_second_through_a_worker": handed,
                "workers_that_saturate_the_gpu": needed,
            }
    results = {"machine": machine(), "recipe": RECIPE, "gpu": gpu, "loaders": loaders}
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.data DATA --pairs {options.pairs} --repeats {options.repeats}"
    write_results("data", command, results)


if __name__ == "__main__":
    main()
