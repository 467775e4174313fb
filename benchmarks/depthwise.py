"""A training step of U-Nets with depthwise convolutions in bfloat16: their gradients by torch, and by our rule.

    python -m benchmarks.depthwise [--encoder timm/NAME ...] [--repeats 5]

Forward and backward passes of a batch on all threads, in turn with float32; ours: `quick_depthwise`, in which training
runs take their steps. Writes benchmarks/results/depthwise.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from benchmarks.common import machine, spread, write_results
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.heap import kept_heap
from geo_pretrain.training.depthwise import quick_depthwise

ENCODERS = tuple(f"timm/{name}" for name in ("efficientnet_lite0", "mobilenetv2_100", "convnext_tiny"))
BATCH, SIZE, CHANNELS = 8, (120, 160), 32


def ways(encoder: str) -> dict[str, Callable[[], None]]:
    """The step in each way, of one network."""
    network = build_encoder(encoder).unet(CHANNELS).to(memory_format=torch.channels_last).train()
    images = torch.randn(BATCH, 3, *SIZE).to(memory_format=torch.channels_last)

    def step(*, low: bool, quick: bool) -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=low), quick_depthwise(network) if quick else nullcontext():
            features = network(images)
        features.float().square().mean().backward()

    return {
        "float32": lambda: step(low=False, quick=False),
        "bfloat16 by torch": lambda: step(low=True, quick=False),
        "bfloat16, ours": lambda: step(low=True, quick=True),
    }


def measure(encoder: str, repeats: int) -> dict[str, object]:
    """Seconds of a step in each way, and how many times ours is as quick."""
    steps = ways(encoder)
    times: dict[str, list[float]] = {way: [] for way in steps}
    for repeat in range(repeats + 1):
        for way, step in steps.items():
            begin = time.perf_counter()
            step()
            if repeat > 0:  # the first warms up
                times[way].append(time.perf_counter() - begin)
    plain, by_torch, ours = times.values()
    return {
        "seconds": {way: spread(taken) for way, taken in times.items()},
        "over torch": spread([slow / fast for slow, fast in zip(by_torch, ours, strict=True)]),
        "over float32": spread([slow / fast for slow, fast in zip(plain, ours, strict=True)]),
    }


def main() -> None:
    """Print and store all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=list(ENCODERS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with kept_heap():
        steps = {encoder: measure(encoder, options.repeats) for encoder in options.encoder}
    settings = {"batch": BATCH, "size": SIZE, "decoder": "as Pri3D's"}
    write_results("depthwise", "python -m benchmarks.depthwise", {"machine": machine(), "of": settings, "steps": steps})


if __name__ == "__main__":
    main()
