"""SR-UNet34 on the CPU: our engines, spconv and MinkowskiEngine side by side, on frames and a room of rooms.

Run: python -m benchmarks.sparse [--repeats 7] [--inputs frame batch room] [--engines plain fast spconv minkowski]
[--threads N]; writes benchmarks/results/sparse.json. Peers are measured where they can be imported. Every time includes
building the sparse tensor and all kernel maps; engines take turns within a repeat, so that a busy moment hits all.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import machine, spread, write_results
from benchmarks.spconv_unet import SpconvUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.geometry import backproject, transform
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.sparse import SparseTensor, backend
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.sparse.layers import Conv3d, ConvTranspose3d
from geo_pretrain.training.data.sources.rooms import Rooms

OURS, PEERS = ("plain", "fast"), ("spconv", "minkowski")
LIBRARY = {"fast": "numba", "spconv": "spconv", "minkowski": "MinkowskiEngine"}
WANTED = 22_000  # voxels of the frame; frames differ, and the nearest to this is taken
SCENES = RoomsConfig(seed=5, scenes=4, frames=20, width=640, height=480)


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


def build_inputs(names: list[str]) -> dict[str, Tensor]:
    """One frame at 2 cm, one frame of each of four scenes at 2.5 cm, all frames of a scene at 2 cm."""
    source = Rooms(SCENES)
    chosen = []
    for scene in source.scenes():
        clouds = [points(source, scene, frame_id) for frame_id in source.frame_ids(scene)]
        sizes = [len(voxels([cloud], 0.02)) for cloud in clouds]
        best = min(range(len(clouds)), key=lambda i: abs(sizes[i] - WANTED))
        chosen.append((abs(sizes[best] - WANTED), clouds[best], torch.cat(clouds)))
    frame = min(chosen, key=lambda choice: choice[0])[1]
    makers: dict[str, Callable[[], Tensor]] = {
        "frame": lambda: voxels([frame], 0.02),
        "batch": lambda: voxels([cloud for _, cloud, _ in chosen], 0.025),
        "room": lambda: voxels([chosen[0][2]], 0.02),
    }
    return {name: makers[name]() for name in names}


class Engine:
    """One of the engines with its SR-UNet34 (in 3, out 32), random weights."""

    def __init__(self, name: str, coords: Tensor) -> None:
        torch.manual_seed(0)
        self.name, self.coords, self.feats = name, coords, torch.rand(len(coords), 3)
        self.network: nn.Module = SRUNet()
        if name == "spconv":
            self.network = SpconvUNet(3, 32)
        elif name == "minkowski":
            from geo_pretrain.adapters.minkowski import me_network

            self.network = me_network(self.network)

    def output(self) -> Tensor:
        """Features [N, 32]."""
        if self.name == "spconv":
            return self.network(self.feats, self.coords)
        if self.name == "minkowski":
            engine = importlib.import_module("MinkowskiEngine")
            return self.network(engine.SparseTensor(self.feats, coordinates=self.coords)).F
        with self.use():
            return self.network(SparseTensor(self.coords, self.feats)).sorted_feats

    def use(self) -> AbstractContextManager[None]:
        """Our engine of this name."""
        return backend.use(self.name) if self.name in OURS else nullcontext()

    def forward(self) -> None:
        """Inference."""
        self.network.eval()
        with torch.no_grad():
            self.output()

    def train(self) -> None:
        """Forward and backward in training mode; the optimizer's step is the same for all."""
        self.network.train()
        self.network.zero_grad()
        with self.use():
            self.output().square().mean().backward()

    def maps(self) -> None:
        """Of ours: the sparse tensor and every kernel map of the forward pass, as the engine uses it."""
        with self.use():
            manager = SparseTensor(self.coords, self.feats).coordinate_manager
            for stride in (1, 2, 4, 8, 16):
                used = [manager.kernel_map(stride, 1, 3, 1)]
                if stride < 16:
                    used += [(down := manager.kernel_map(stride, 2, 2, 1)), down.reverse]
                for kernel_map in used:
                    if self.name == "fast":
                        from geo_pretrain.sparse.fast import Pairs

                        Pairs.of(kernel_map)
                    else:
                        _ = kernel_map.tiles, kernel_map.count


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def take_turns(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every action in every repeat, each time after an unmeasured call of the same.

    Right after another engine's turn memory has been handed back and that engine's threads still spin.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, action in actions.items():
            action()
            times[name].append(seconds(action))
    return times


def gflop(network: nn.Module, x: SparseTensor) -> dict[str, float]:
    """Multiply-adds of every convolution of a network, counted twice, in 10^9: 2 * pairs * Cin * Cout by layer name."""
    counts: dict[str, float] = {}

    def count(name: str, layer: Conv3d | ConvTranspose3d, inputs: tuple[SparseTensor], output: SparseTensor) -> None:
        size, fine = layer.kernel_size, min(inputs[0].stride, output.stride)
        pairs = len(output) if size == 1 else x.grid.kernel_map(fine, layer.stride, size, layer.dilation).count
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
    hooks = []
    for name, child in network.named_children():
        if name != "relu":
            hooks.append(child.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())))
            hooks.append(
                child.register_forward_hook(lambda *_, name=name: times[name].append(time.perf_counter() - begun.pop()))
            )
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


def sgemm_rate() -> float:
    """GFLOP/s of torch's float32 product of 2048 x 2048 matrices: the best of 9."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(9)) / 1e9


def openblas_rates(number: type[ctypes.c_int | ctypes.c_int64] = ctypes.c_int, affix: str = "{}") -> dict[str, float]:
    """GFLOP/s of every OpenBLAS in this process whose functions are named so, by its path and chosen kind of core."""
    maps = Path("/proc/self/maps").read_text().split()
    a, size, rates = torch.randn(3, 1024, 1024), number(1024), {}
    for path in sorted({path for path in maps if path.startswith("/") and "openblas" in path}):
        library = ctypes.CDLL(path)
        product = getattr(library, affix.format("cblas_sgemm"), None)
        if product is None:  # numpy's own, which no engine uses
            continue
        core = getattr(library, affix.format("openblas_get_corename"))
        core.restype = ctypes.c_char_p
        x, y, z = (ctypes.c_void_p(matrix.data_ptr()) for matrix in a)
        plain, one, zero = [ctypes.c_int(code) for code in (101, 111, 111)], ctypes.c_float(1), ctypes.c_float(0)
        call = partial(product, *plain, size, size, size, one, x, size, y, size, zero, z, size)
        rates[f"{path} ({core().decode()})"] = 2 * 1024**3 / min(seconds(call) for _ in range(9)) / 1e9
    return rates


def check_openblas(rate: float) -> None:
    """Refuse to compare with a MinkowskiEngine whose OpenBLAS takes this processor for another kind."""
    importlib.import_module("MinkowskiEngine")
    for library, reached in openblas_rates().items():
        if reached < rate / 2:
            raise SystemExit(
                f"{library} multiplies at {reached:.0f} GFLOP/s, torch at {rate:.0f}: MinkowskiEngine would look "
                "slow. Set OPENBLAS_CORETYPE to this processor's kind (SkylakeX, Zen, Haswell, ...) and run again."
            )


def peak_memory(name: str, coords_file: Path, mode: str, threads: int) -> float:
    """MB by which a process of its own grows, at its peak, for the network and one forward pass or training step."""
    command = [sys.executable, "-m", "benchmarks.sparse", "--child", name, str(coords_file), mode]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def child(name: str, coords_file: str, mode: str) -> None:
    """Print what `peak_memory` asks for, the libraries not counted."""
    if name != "plain":
        importlib.import_module(
            {"fast": "geo_pretrain.sparse.fast", "spconv": "spconv.pytorch"}.get(name, LIBRARY[name])
        )
    coords = torch.load(coords_file)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    getattr(Engine(name, coords), mode)()
    print(_status("VmHWM") - before)


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024, 1)


def measure(name: str, coords: Tensor, names: list[str], repeats: int, rate: float, threads: int) -> dict[str, Any]:
    """Everything about one input."""
    group = {engine: Engine(engine, coords) for engine in names}
    with torch.no_grad():
        work = sum(gflop(SRUNet().eval(), SparseTensor(coords, torch.rand(len(coords), 3))).values())
    forward = take_turns({engine: group[engine].forward for engine in names}, repeats)
    maps = take_turns({engine: group[engine].maps for engine in names if engine in OURS}, repeats)
    train = {} if name == "room" else take_turns({engine: group[engine].train for engine in names}, repeats)
    coords_file = Path(tempfile.mkdtemp()) / "coords.pt"
    torch.save(coords, coords_file)
    results: dict[str, Any] = {"voxels": len(coords), "gflop": round(work, 1), "engines": {}}
    for engine in names:
        middle = statistics.median(forward[engine])
        entry: dict[str, Any] = {"forward_s": spread(forward[engine])}
        entry["forward_of_sgemm"] = round(work / middle / rate, 2)
        if engine in maps:
            entry["maps_of_forward"] = round(statistics.median(maps[engine]) / middle, 3)
            entry["groups"] = layer_groups(group[engine], repeats, rate)
        if engine in train:
            entry["train_s"] = spread(train[engine])
        modes = ("forward", "train") if engine in train else ("forward",)
        entry["peak_mb"] = {mode: peak_memory(engine, coords_file, mode, threads) for mode in modes}
        results["engines"][engine] = entry
    coords_file.unlink()
    if set(OURS) <= group.keys():
        with torch.no_grad():
            plain, fast = (group[engine].output() for engine in OURS)
        results["fast_differs_by"] = float((plain - fast).abs().max() / plain.abs().max())
    results["times_faster"] = ratios({"forward": forward, "train": train})
    return results


def ratios(times: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """How many times faster our engines are than the quickest peer, and the fast than the plain one."""
    faster = {}
    for mode, by_engine in times.items():
        middle = {engine: statistics.median(values) for engine, values in by_engine.items()}
        peers = [middle[engine] for engine in PEERS if engine in middle]
        for engine in (engine for engine in OURS if engine in middle and peers):
            faster[f"{mode}_{engine}_than_peer"] = round(min(peers) / middle[engine], 2)
        if middle.keys() >= set(OURS):
            faster[f"{mode}_fast_than_plain"] = round(middle["plain"] / middle["fast"], 2)
    return faster


def main() -> None:
    """Measure all inputs on all engines that can be imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inputs", nargs="+", default=["frame", "batch", "room"], choices=["frame", "batch", "room"])
    parser.add_argument("--engines", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(*options.child)
    names = [e for e in options.engines if e == "plain" or importlib.util.find_spec(LIBRARY[e])]
    started = time.perf_counter()
    if "fast" in names:
        importlib.import_module("geo_pretrain.sparse.fast")
    start = round(time.perf_counter() - started, 1)
    rate = sgemm_rate()
    if "minkowski" in names:
        check_openblas(rate)
    run = partial(measure, names=names, repeats=options.repeats, rate=rate, threads=options.threads)
    results = {
        "what": "SR-UNet34 (34C, in 3, out 32), float32, CPU: seconds of a forward pass (eval) and a training step",
        "machine": machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "sgemm_gflops": round(rate),
        "fast_start_s": start,
        "repeats": options.repeats,
        "inputs": {name: run(name, coords) for name, coords in build_inputs(options.inputs).items()},
    }
    write_results("sparse", " ".join(["python -m benchmarks.sparse", *sys.argv[1:]]), results)


if __name__ == "__main__":
    main()
