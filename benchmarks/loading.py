"""How long the largest network takes to load with every byte verified, beside reading its files and verifying nothing.

    python -m benchmarks.loading

Writes benchmarks/results/loading.json: a ResNet-50 U-Net (701 MB), its files in the page cache, all ways in turn.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common import machine, spread, write_results
from geo_pretrain import backbone_info, load_backbone
from geo_pretrain.backbones.build import build
from geo_pretrain.checkpoint import CONFIG, write_checkpoint
from geo_pretrain.files import SEAL

NAME = "pri3d_view_geo_r50"
REPEATS = 9
ROLES = ("encoder", "decoder")
PIECE = 8 << 20  # bytes read at once, into memory that stays: the quickest way to see every byte of a file


def write_folder(folder: Path) -> None:
    """A checkpoint folder of this network with random weights."""
    entry = backbone_info(NAME)
    network = build(entry.arch, decoder=True)
    weights = {role: network.get_submodule(role).state_dict() for role in ROLES}
    facts: dict[str, Any] = {"name": NAME, "arch": entry.arch, "contract": entry.contract, "license": entry.license}
    texts: dict[str, Any] = {"provenance": {}, "recipe_yaml": None, "log": None, "card": "random weights"}
    golden = {"input": network.encoder.conv1.weight}  # nothing computes it here
    write_checkpoint(folder, weights=weights, golden=golden, **facts, **texts)


def make_older(folder: Path) -> None:
    """Take the newer digest out of config.json, as folders of earlier versions are."""
    config = json.loads((folder / CONFIG).read_text())
    del config[SEAL]
    for file in config["files"].values():
        del file["xxh3"]
    (folder / CONFIG).write_text(json.dumps(config))


def read(folder: Path) -> None:
    """Read the files of the network, and drop the bytes."""
    memory = bytearray(PIECE)
    for role in ROLES:
        with (folder / f"{role}.safetensors").open("rb", buffering=0) as stream:
            while stream.readinto(memory):
                pass


def copy(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Load by safetensors and verify nothing, into memory that the file cannot change: its tensors are maps of it."""
    loaded = (load_file(folder / f"{role}.safetensors") for role in ROLES)
    return [{key: tensor.clone() for key, tensor in tensors.items()} for tensors in loaded]


def main() -> None:
    """Time each way in turn."""
    with tempfile.TemporaryDirectory() as parent:
        new, older = Path(parent, "new"), Path(parent, "older")
        for folder in (new, older):
            write_folder(folder)
        make_older(older)
        ways: dict[str, Callable[[], object]] = {
            "read": lambda: read(new),
            "read into new memory": lambda: [(new / f"{role}.safetensors").read_bytes() for role in ROLES],
            "safetensors into new memory": lambda: copy(new),
            "load": lambda: load_backbone(new, decoder=True),
            "load an older folder (sha256)": lambda: load_backbone(older, decoder=True),
        }
        wall: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(REPEATS + 1):
            for name, way in ways.items():
                begin, used = time.perf_counter(), time.process_time()
                way()
                if repeat > 0:  # the first imports torchvision, and fills the file cache
                    wall[name].append(time.perf_counter() - begin)
                    processor[name].append(time.process_time() - used)
        size = sum((new / f"{role}.safetensors").stat().st_size for role in ROLES)
    results: dict[str, Any] = {"MB": round(size / 1e6), "load_of_the_machine": os.getloadavg()[0]}
    for name in ways:
        ratios = [one / raw for one, raw in zip(wall[name], wall["read"], strict=True)]
        peers = [
            one / peer for one, peer in zip(processor[name], processor["safetensors into new memory"], strict=True)
        ]
        results[name] = {
            "seconds": spread(wall[name]),
            "processor_seconds": spread(processor[name]),
            "times_read": round(median(ratios), 2),
            "times_safetensors": round(median(peers), 2),
        }
    write_results("loading", "python -m benchmarks.loading", results | {"machine": machine()})


if __name__ == "__main__":
    main()
