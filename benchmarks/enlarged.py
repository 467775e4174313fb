"""The U-Net with its decoder's convolutions at the small size, beside enlarging first: ratios of times, in turn.

    python -m benchmarks.enlarged [--repeats 5]

Whole networks, by the processor time of one thread. "by the rule" is what the network does by itself: each
up-projection takes the way that `backbones.enlarged.pays` chooses. Writes benchmarks/results/enlarged.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.common import machine, spread, write_results
from geo_pretrain.backbones import resnet_unet
from geo_pretrain.backbones.resnet_unet import ResNetUNet


class Case(NamedTuple):
    """A network, its input, and what is computed."""

    depth: int
    batch: int
    size: tuple[int, int]
    bf16: bool
    step: bool  # forward and backward, in training mode; else inference

    def __str__(self) -> str:
        what = "step" if self.step else "inference"
        return f"R{self.depth} {what}, {self.batch} x {self.size[0]}x{self.size[1]}, {'bf16' if self.bf16 else 'fp32'}"


CASES = (
    *(Case(18, 8, (120, 160), bf16, step=True) for bf16 in (True, False)),
    Case(18, 8, (96, 128), bf16=True, step=True),
    *(Case(18, 8, (240, 320), bf16, step=True) for bf16 in (True, False)),
    Case(50, 2, (240, 320), bf16=True, step=True),
    *(Case(depth, 1, (240, 320), bf16, step=False) for depth in (18, 50) for bf16 in (True, False)),
    Case(18, 8, (240, 320), bf16=False, step=False),
)
WAYS: dict[str, Callable[..., bool] | None] = {"plain": lambda *_: False, "by the rule": None}


def run(network: ResNetUNet, images: torch.Tensor, case: Case) -> float:
    """Seconds of the processor for one call."""
    begin = time.process_time()
    network.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(case.step), torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
        features = network(images)
    if case.step:
        features.backward(torch.full_like(features, 1e-3))
    return time.process_time() - begin


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Take both ways in turn; the first round warms up."""
    torch.manual_seed(0)
    network = ResNetUNet(case.depth).to(memory_format=torch.channels_last).train(case.step)
    images = torch.rand(case.batch, 3, *case.size).to(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(repeats + 1):
        for name, way in WAYS.items():
            with patch.object(resnet_unet, "pays", way or resnet_unet.pays):
                seconds = run(network, images, case)
            times[name] += [seconds] if repeat else []
    ratios = [rule / plain for plain, rule in zip(times["plain"], times["by the rule"], strict=True)]
    return {"seconds": {name: spread(values) for name, values in times.items()}, "ratio": spread(ratios)}


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for case in CASES:
        results[str(case)] = measure(case, repeats)
        print(case, results[str(case)]["ratio"], flush=True)
    write_results("enlarged", "python -m benchmarks.enlarged", results | {"machine": machine()})


if __name__ == "__main__":
    main()
