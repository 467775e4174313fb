"""SR-UNet34: our engine by all its backends, spconv and MinkowskiEngine side by side, on frames and a room of rooms.

On a CPU:  python -m benchmarks.sparse [--repeats 7] [--inputs frame batch room] [--threads N]
           [--engines plain fast fast_bf16 by_spconv spconv minkowski]
On a GPU:  python -m benchmarks.sparse --device cuda [--precision float32 float16 bfloat16]
           [--engines plain by_spconv by_warpconvnet spconv minkowski]; within --budget seconds (540)
Dry run:   python -m benchmarks.sparse --quick [--device cpu]: tiny inputs, nothing kept

Results go to benchmarks/results/sparse.json (sparse_cuda.json), after every input anew: what is measured when time
runs out is kept. fast_bf16 is `fast` under bfloat16 autocast, where the processor multiplies bfloat16. Peers are
measured where they can be imported; by_spconv and by_warpconvnet are our layers with their products. Every time
includes building the sparse tensor and all kernel maps; engines take turns within a repeat, so that a busy moment hits
all. On a busy machine compare the minima, and the processor times.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, spread, write_results
from benchmarks.sparse_engines import (
    BY_PEER,
    ENGINES,
    FEW,
    INPUTS,
    LIBRARY,
    OWN,
    PEERS,
    Engine,
    available,
    build_inputs,
    first_call,
    gflop,
    kept_inputs,
    kernel_gradients,
    layer_groups,
    seconds,
)
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.heap import kept_heap
from geo_pretrain.sparse import SparseTensor

FAST = "geo_pretrain.sparse.fast"
MODULES = {"fast": FAST, "fast_bf16": FAST, "spconv": "spconv.pytorch"}  # that bring an engine's library
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Turns:
    """Wall and processor seconds of every action in every repeat."""

    def __init__(self, actions: dict[str, Callable[[], None]], repeats: int, device: str) -> None:
        """Each time is taken after an unmeasured call of the same.

        Right after another engine's turn memory has been handed back and that engine's threads still spin.
        """
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.processor: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):
            for name, action in actions.items():
                action()
                before = time.process_time()
                self.wall[name].append(seconds(action, device))
                self.processor[name].append(time.process_time() - before)


# ---- The limit of the processor -------------------------------------------------------------------------------------


def sgemm_rate(device: str = "cpu", size: int = 2048) -> float:
    """GFLOP/s of torch's float32 product of square matrices: the best of 9."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device) for _ in range(9)) / 1e9


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


# ---- Memory ---------------------------------------------------------------------------------------------------------


def peak_memory(name: str, coords_file: Path, mode: str, threads: int) -> float:
    """MB by which a process of its own grows, at its peak, for the network and one forward pass or training step."""
    command = [sys.executable, "-m", "benchmarks.sparse", "--child", name, str(coords_file), mode]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def child(name: str, coords_file: str, mode: str) -> None:
    """Print what `peak_memory` asks for, the libraries not counted."""
    if name != "plain":
        importlib.import_module(MODULES.get(name, LIBRARY[name]))
    coords = torch.load(coords_file)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    getattr(Engine(name, coords), mode)()
    print(status("VmHWM") - before)


def status(field: str) -> float:
    """MB of a field of this process in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024, 1)


def peak_memory_cuda(action: Callable[[], None]) -> float:
    """MB of a GPU that an action takes at its peak, beyond what was held before (weights, features)."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


# ---- The measurement ------------------------------------------------------------------------------------------------


class Bench:
    """What is measured, how often and on what."""

    def __init__(self, options: argparse.Namespace, names: list[str], rate: float) -> None:
        self.options, self.names, self.rate = options, names, rate
        self.device: str = options.device
        self.until = time.monotonic() + options.budget

    def measure(self, coords: Tensor, precision: str) -> dict[str, Any]:
        """Everything about one input in one precision. An engine that fails is named with its error and left out."""
        with torch.no_grad():
            x = SparseTensor(coords, torch.rand(len(coords), 3))
            work = sum(gflop(SRUNet().eval(), x).values())
        results: dict[str, Any] = {"voxels": len(coords), "gflop": round(work, 1), "engines": {}}
        group = self.engines(coords, precision, results)
        repeats = self.options.repeats
        forward = Turns({name: engine.forward for name, engine in group.items()}, repeats, self.device)
        maps = Turns({name: engine.maps for name, engine in group.items() if engine.is_ours}, repeats, self.device)
        with kept_heap():  # as training runs are; for all engines
            train = Turns({name: engine.train for name, engine in group.items()}, repeats, self.device)
        for name, engine in group.items():
            middle = statistics.median(forward.wall[name])
            entry: dict[str, Any] = {"forward_s": spread(forward.wall[name]), "train_s": spread(train.wall[name])}
            if self.device == "cpu":
                entry["forward_processor_s"] = spread(forward.processor[name])
                entry["train_processor_s"] = spread(train.processor[name])
            entry["forward_of_sgemm"] = round(work / middle / self.rate, 2)
            if engine.is_ours:
                entry["maps_of_forward"] = round(statistics.median(maps.wall[name]) / middle, 3)
                entry["groups"] = layer_groups(engine, repeats, self.rate)
                if name not in BY_PEER:
                    with kept_heap():
                        entry["kernel_gradients"] = kernel_gradients(engine, repeats, self.rate)
            results["engines"][name] = entry
        self.memory(coords, group, results["engines"])
        results["differs_from_plain_by"] = differences(group)
        if {"fast", "fast_bf16"} <= group.keys():
            full, low = features(group["fast"]), features(group["fast_bf16"])
            results["fast_bf16_relative_l2"] = round(float((low - full).norm() / full.norm()), 5)
        results["times_faster"] = ratios({"forward": forward.wall, "train": train.wall})
        return results

    def engines(self, coords: Tensor, precision: str, results: dict[str, Any]) -> dict[str, Engine]:
        """The engines that can do it; libraries of GPUs choose their algorithms in these first calls."""
        group = {}
        for name in self.names:
            started = time.perf_counter()
            try:
                engine = Engine(name, coords, self.device, PRECISIONS[precision])
                engine.forward()
                engine.train()
            except Exception as error:  # of another library: the others are still compared
                if name in OWN[self.device]:
                    raise
                results.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
                continue
            results.setdefault("first_calls_s", {})[name] = round(time.perf_counter() - started, 2)
            group[name] = engine
        return group

    def memory(self, coords: Tensor, group: dict[str, Engine], entries: dict[str, Any]) -> None:
        """Peak memory of a forward pass and of a step."""
        modes = ("forward", "train")
        if self.device == "cuda":
            for name, engine in group.items():
                entries[name]["peak_mb"] = {mode: peak_memory_cuda(getattr(engine, mode)) for mode in modes}
        elif not self.options.quick:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "coords.pt"
                torch.save(coords, path)
                for name in group:
                    peaks = {mode: peak_memory(name, path, mode, self.options.threads) for mode in modes}
                    entries[name]["peak_mb"] = peaks

    def run(self, keep: Callable[[dict[str, Any]], None]) -> None:
        """Measure every input in every precision while there is time, and keep the results after each."""
        done: dict[str, Any] = {}
        kept = build_inputs(FEW, voxel=0.16) if self.options.quick else kept_inputs(self.options.coords)
        for name, coords in kept.items():
            for precision in self.options.precision:
                if name not in self.options.inputs:
                    continue
                late = time.monotonic() > self.until
                done[f"{name}, {precision}" if self.device == "cuda" else name] = (
                    f"not measured: over {self.options.budget} s" if late else self.measure(coords, precision)
                )
                keep(done)
                if self.device == "cuda":
                    torch.cuda.empty_cache()


def differences(group: dict[str, Engine]) -> dict[str, float]:
    """How far our features of other backends lie from those of plain torch, of the largest; the same weights."""
    ours = {name: engine for name, engine in group.items() if engine.is_ours}
    for engine in ours.values():
        engine.network.load_state_dict(next(iter(ours.values())).network.state_dict())
        engine.network.eval()
    outputs = {name: features(engine) for name, engine in ours.items()}
    plain = outputs.pop("plain", None)
    if plain is None:
        return {}
    return {name: float((out - plain).abs().max() / plain.abs().max()) for name, out in outputs.items()}


@torch.no_grad()
def features(engine: Engine) -> Tensor:
    """What an engine's network computes now, in float32."""
    return engine.output().float()


def ratios(times: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """How many times faster our engines are than the quickest peer, the fast than the plain one, bf16 than float32."""
    faster = {}
    for mode, by_engine in times.items():
        middle = {engine: statistics.median(values) for engine, values in by_engine.items()}
        peers = [middle[engine] for engine in PEERS if engine in middle]
        for engine in (engine for engine in middle if engine not in PEERS and peers):
            faster[f"{mode}_{engine}_than_peer"] = round(min(peers) / middle[engine], 2)
        if {"fast", "fast_bf16"} <= middle.keys():
            faster[f"{mode}_fast_bf16_than_fast"] = round(middle["fast"] / middle["fast_bf16"], 2)
        for engine in ("fast", *BY_PEER):
            if middle.keys() >= {"plain", engine}:
                faster[f"{mode}_{engine}_than_plain"] = round(middle["plain"] / middle[engine], 2)
    return faster


def versions(names: list[str]) -> dict[str, str]:
    """The releases of the libraries behind some engines, as they are installed."""
    distributions = importlib.metadata.packages_distributions()
    found = {}
    for library in {LIBRARY[name] for name in names if name in LIBRARY}:
        for distribution in distributions.get(library, [library]):
            found[distribution] = importlib.metadata.version(distribution)
    return dict(sorted(found.items()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(OWN))
    parser.add_argument("--repeats", type=int, default=None, help="7; 1 with --quick")
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), choices=INPUTS)
    parser.add_argument("--engines", nargs="+", default=None, choices=ENGINES)
    parser.add_argument("--precision", nargs="+", default=None, choices=list(PRECISIONS), help="autocast, on CUDA")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--budget", type=float, default=None, help="seconds after which nothing new is begun; CUDA: 540"
    )
    parser.add_argument(
        "--coords", type=Path, default=None, help="file that keeps the inputs, for machines without time"
    )
    parser.add_argument("--quick", action="store_true", help="a dry run: tiny inputs, results only printed")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    options.repeats = options.repeats or (1 if options.quick else 7)
    options.precision = options.precision or (["float32", "float16"] if on_cuda else ["float32"])
    options.budget = options.budget or (540 if on_cuda else float("inf"))
    if not on_cuda and options.precision != ["float32"]:
        parser.error("--precision is for --device cuda: on a CPU the engine fast_bf16 has bfloat16, float16 is float32")
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --quick tries the same on a CPU")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure all inputs on all engines that can be imported."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.child:
        return child(*options.child)
    names = available(options.device, options.engines)
    start = round(first_call(), 2) if "fast" in names else None
    rate = sgemm_rate(options.device, 256 if options.quick else 8192 if options.device == "cuda" else 2048)
    if "minkowski" in names and options.device == "cpu":
        check_openblas(rate)
    about = {
        "what": f"SR-UNet34 (34C, 3 to 32), {options.device}: seconds of a forward pass (eval) and a training step",
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "libraries": versions(names),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "sgemm_gflops": round(rate),
        "fast_start_s": start,  # import, machine code and first convolution
        "repeats": options.repeats,
    }
    command = " ".join(["python -m benchmarks.sparse", *(sys.argv[1:] if arguments is None else arguments)])

    def keep(inputs: dict[str, Any]) -> None:
        if options.quick:
            print(json.dumps({**about, "inputs": inputs}))
        else:
            write_results("sparse_cuda" if options.device == "cuda" else "sparse", command, {**about, "inputs": inputs})

    Bench(options, names, rate).run(keep)


if __name__ == "__main__":
    main()
