"""What looking at the values and sizes of a network's input costs, beside its whole forward pass, in turn.

    python -m benchmarks.inputs [--repeats 9]

A ResNet-50 on one image of 240x320, eval, one thread, by its processor time. Writes benchmarks/results/inputs.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.common import machine, spread, write_results
from geo_pretrain.backbones.resnet_unet import ResNetEncoder
from geo_pretrain.inputs import check_images, look_at

CALLS = 200  # of the checks, whose time is small


def main() -> None:
    """Measure both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    network, image = ResNetEncoder(50).eval(), torch.randn(1, 3, 240, 320)
    looks, passes = list[float](), list[float]()
    for repeat in range(repeats + 1):
        with torch.no_grad():
            begin = time.process_time()
            for _ in range(CALLS):
                check_images(image, 3, network.conv1.weight)
                look_at(network, image)
            middle = time.process_time()
            network(image)
            end = time.process_time()
        if repeat:  # the first warms up
            looks.append(1e6 * (middle - begin) / CALLS)
            passes.append(1e6 * (end - middle))
    shares = [100 * look / whole for look, whole in zip(looks, passes, strict=True)]
    found: dict[str, Any] = {"check_us": spread(looks), "network_us": spread(passes), "share_percent": spread(shares)}
    write_results("inputs", "python -m benchmarks.inputs", found | {"machine": machine()})


if __name__ == "__main__":
    main()
