"""The engines that `benchmarks.sparse` compares, each with an SR-UNet34, and the voxels they get."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.spconv_unet import SpconvUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.geometry import backproject, transform
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.sparse import SparseTensor, backend
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.sparse.layers import Conv3d, ConvTranspose3d
from geo_pretrain.training.data.sources.rooms import Rooms

# Our layers with each of our backends; our layers with another library's products; other libraries' own networks.
OWN = {"cpu": ("plain", "fast", "fast_bf16"), "cuda": ("plain",)}
BY_PEER = {"by_spconv": "spconv", "by_warpconvnet": "warpconvnet"}
PEERS = ("spconv", "minkowski")
LIBRARY = {"fast": "numba", "fast_bf16": "numba", "spconv": "spconv", "minkowski": "MinkowskiEngine", **BY_PEER}
BACKENDS = {"fast_bf16": "fast", **BY_PEER}  # those that have another name than the engine
ENGINES = ("plain", "fast", "fast_bf16", *BY_PEER, *PEERS)
INPUTS = ("frame", "batch", "room")
WANTED = 22_000  # voxels of the frame; frames differ, and the nearest to this is taken
SCENES = RoomsConfig(seed=5, scenes=4, frames=20, width=640, height=480)
FEW = replace(SCENES, scenes=2, frames=2, width=64, height=64)  # of a dry run


def available(device: str, chosen: list[str] | None) -> list[str]:
    """The chosen engines that this device and the installed libraries have; without a choice those worth comparing."""
    names = [name for name in ENGINES if name in (chosen or ENGINES)]
    if not chosen and device == "cpu":  # there they prove that results are right: no other library is quicker
        names = [name for name in names if name not in BY_PEER]
    left_out = {"cpu": [] if multiplies_bf16() else ["fast_bf16"], "cuda": ["fast", "fast_bf16"]}[device]
    fitting = [name for name in names if name not in left_out]
    return [name for name in fitting if name == "plain" or importlib.util.find_spec(LIBRARY[name])]


def multiplies_bf16() -> bool:
    """Whether the fast kernels multiply bfloat16 on this processor."""
    return backend.product_dtype("cpu", torch.bfloat16) == torch.bfloat16


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def points(source: Rooms, scene: str, frame_id: str) -> Tensor:
    """World points [N, 3] m of a frame's valid pixels."""
    frame = source.load(scene, frame_id)
    depth = torch.as_tensor(frame.depth)
    world = transform(
        backproject(depth, torch.as_tensor(frame.intrinsics).float()), torch.as_tensor(frame.cam_to_world).float()
    )
    return world[depth.flatten() > 0]


def voxels(clouds: list[Tensor], size: float) -> Tensor:
    """Coordinates int32 [N, 4] of a batch of clouds."""
    batch = torch.cat([torch.full((len(cloud),), number) for number, cloud in enumerate(clouds)])
    cloud = torch.cat(clouds)
    return voxelize(cloud, cloud.new_ones(len(cloud), 1), size, batch=batch).coords


def build_inputs(config: RoomsConfig = SCENES, voxel: float = 0.02) -> dict[str, Tensor]:
    """One frame at 2 cm, one frame of each of four scenes at 2.5 cm, all frames of a scene at 2 cm."""
    source = Rooms(config)
    chosen = []
    for scene in source.scenes():
        clouds = [points(source, scene, frame_id) for frame_id in source.frame_ids(scene)]
        sizes = [len(voxels([cloud], voxel)) for cloud in clouds]
        best = min(range(len(clouds)), key=lambda i: abs(sizes[i] - WANTED))
        chosen.append((abs(sizes[best] - WANTED), clouds[best], torch.cat(clouds)))
    frame = min(chosen, key=lambda choice: choice[0])[1]
    return {
        "frame": voxels([frame], voxel),
        "batch": voxels([cloud for _, cloud, _ in chosen], 1.25 * voxel),
        "room": voxels([chosen[0][2]], voxel),
    }


def kept_inputs(path: Path | None) -> dict[str, Tensor]:
    """The inputs, read from a file where there is one, else built and kept there."""
    if path is not None and path.is_file():
        kept: dict[str, Tensor] = torch.load(path, weights_only=True)
        return kept
    inputs = build_inputs()
    if path is not None:
        torch.save(inputs, path)
    return inputs


# ---- Engines --------------------------------------------------------------------------------------------------------


class Engine:
    """One of the engines with its SR-UNet34 (in 3, out 32), random weights, on a device and in a precision."""

    def __init__(self, name: str, coords: Tensor, device: str = "cpu", precision: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.name, self.device = name, device
        self.precision = torch.bfloat16 if name == "fast_bf16" else precision
        self.coords, self.feats = coords.to(device), torch.rand(len(coords), 3).to(device)
        self.network: nn.Module = SRUNet()
        if name == "spconv":
            self.network = SpconvUNet(3, 32)
        elif name == "minkowski":
            from geo_pretrain.adapters.minkowski import me_network

            self.network = me_network(self.network)
        self.network.to(device)

    def output(self) -> Tensor:
        """Features [N, 32]."""
        with self.use():
            if self.name == "spconv":
                return self.network(self.feats, self.coords)
            if self.name == "minkowski":
                engine = importlib.import_module("MinkowskiEngine")
                return self.network(engine.SparseTensor(self.feats, coordinates=self.coords)).F
            return self.network(SparseTensor(self.coords, self.feats)).sorted_feats

    @property
    def is_ours(self) -> bool:
        """Whether the layers are ours."""
        return self.name not in PEERS

    def use(self) -> AbstractContextManager[Any]:
        """Our backend of this name, and autocast where the precision is lower than float32."""
        stack = ExitStack()
        if self.is_ours:
            stack.enter_context(backend.use(BACKENDS.get(self.name, self.name)))
        lower = self.precision != torch.float32
        stack.enter_context(torch.autocast(self.device, self.precision) if lower else nullcontext())
        return stack

    def forward(self) -> None:
        """Inference."""
        self.network.eval()
        with torch.no_grad():
            self.output()

    def train(self) -> None:
        """Forward and backward in training mode; the optimizer's step is the same for all."""
        self.network.train()
        self.network.zero_grad()
        out = self.output()
        with self.use():
            out.float().square().mean().backward()

    def maps(self) -> None:
        """Of ours: the sparse tensor and every kernel map of the forward pass, as the engine uses it."""
        with self.use():
            manager = SparseTensor(self.coords, self.feats).coordinate_manager
            for stride in (1, 2, 4, 8, 16):
                used = [manager.kernel_map(stride, 1, 3, 1)]
                if stride < 16:
                    used += [(down := manager.kernel_map(stride, 2, 2, 1)), down.reverse]
                for kernel_map in used:
                    if self.name.startswith("fast"):
                        from geo_pretrain.sparse.fast import Pairs

                        Pairs.of(kernel_map)
                    elif self.name == "plain":
                        _ = kernel_map.tiles, kernel_map.count


def synchronize(device: str) -> None:
    """Wait until a GPU has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of one call, a GPU's work included."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def first_call() -> float:
    """Seconds until the first convolution of a process on the fast kernels is done: import, machine code, product."""
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)

    def call() -> None:
        with backend.use("fast"), torch.no_grad():
            Conv3d(3, 8)(SparseTensor(coords, torch.ones(2, 3)))

    return seconds(call)


def gflop(network: nn.Module, x: SparseTensor) -> dict[str, float]:
    """Multiply-adds of every convolution of a network, counted twice, in 10^9: 2 * pairs * Cin * Cout by layer name."""
    counts: dict[str, float] = {}

    def count(name: str, layer: Conv3d | ConvTranspose3d, inputs: tuple[SparseTensor], output: SparseTensor) -> None:
        size, fine = layer.kernel_size, min(inputs[0].stride, output.stride)
        maps = x.coordinate_manager
        pairs = len(output) if size == 1 else maps.kernel_map(fine, layer.stride, size, layer.dilation).count
        counts[name] = 2e-9 * pairs * layer.in_chans * layer.out_chans

    hooks = []
    for name, layer in network.named_modules():
        if isinstance(layer, Conv3d | ConvTranspose3d):
            hooks.append(layer.register_forward_hook(lambda m, i, o, name=name: count(name, m, i, o)))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return counts


def layer_groups(engine: Engine, repeats: int, rate: float) -> dict[str, dict[str, float]]:
    """Of one of ours: median ms, GFLOP and share of the sgemm rate of each of the network's children."""
    network = engine.network.eval()
    with engine.use():
        counts = gflop(network, SparseTensor(engine.coords, engine.feats))
    times: dict[str, list[float]] = defaultdict(list)
    begun: list[float] = []

    def now() -> float:
        synchronize(engine.device)
        return time.perf_counter()

    hooks = []
    for name, child in network.named_children():
        if name != "relu":
            hooks.append(child.register_forward_pre_hook(lambda *_: begun.append(now())))
            hooks.append(child.register_forward_hook(lambda *_, name=name: times[name].append(now() - begun.pop())))
    for _ in range(repeats):
        engine.forward()
    for hook in hooks:
        hook.remove()
    table = {}
    for name, values in times.items():
        work = sum(value for layer, value in counts.items() if layer.split(".")[0] == name)
        middle = statistics.median(values)
        table[name] = {"ms": round(middle * 1e3, 2), "gflop": round(work, 2)}
        if work:
            table[name]["of_sgemm"] = round(work / middle / rate, 2)
    return table


def kernel_gradients(engine: Engine, repeats: int, rate: float) -> dict[str, float]:
    """Of one of ours: median ms of a step's kernel gradients, GFLOP and share of the sgemm rate; without 1x1 layers."""
    network = engine.network
    with engine.use():
        counts = gflop(network, SparseTensor(engine.coords, engine.feats))
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Conv3d | ConvTranspose3d)}
    work = sum(count for name, count in counts.items() if layers[name].kernel_size > 1)
    times: list[float] = []

    def timed(compute: Callable[..., Tensor], *inputs: Any) -> Tensor:
        found: list[Tensor] = []
        times[-1] += seconds(lambda: found.append(compute(*inputs)), engine.device)
        return found[0]

    with ExitStack() as stack:
        for name in ("plain", "fast"):
            if module := sys.modules.get(f"geo_pretrain.sparse.{name}"):
                stack.enter_context(patch.object(module, "sparse_conv_wgrad", partial(timed, module.sparse_conv_wgrad)))
        for _ in range(repeats + 1):
            times.append(0.0)
            engine.train()
    middle = statistics.median(times[1:])  # the first finds its memory
    return {"ms": round(middle * 1e3, 2), "gflop": round(work, 2), "of_sgemm": round(work / middle / rate, 2)}
