"""What every benchmark reports: the machine, a median with its spread, and a JSON file with the command."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LOAD = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0  # before the benchmark began
MOST_LOAD = 0.3  # a core; above it times say more about the other programs
ANYWAY = "BENCHMARK_ANYWAY"  # environment variable that stores results of a busy machine


def machine() -> dict[str, Any]:
    """Processor, cores, load a core before the benchmark began, and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load_per_core": round(LOAD, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {key: round(f(values), 3) for key, f in (("median", statistics.median), ("min", min), ("max", max))}


def write_results(name: str, command: str, results: dict[str, Any], *, timed: bool = True) -> None:
    """Print results and write benchmarks/results/<name>.json, unless they are times and the machine was busy before."""
    text = json.dumps({"command": command, **results}, indent=2)
    print(text)
    if timed and LOAD > MOST_LOAD and not os.environ.get(ANYWAY):
        sys.exit(
            f"Not stored: the load was {LOAD:.2f} a core when this began, accepted for times is {MOST_LOAD}. "
            f"Wait until the machine is idle (the load is a mean of one minute), or set {ANYWAY}=1."
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(f"load {LOAD:.2f} a core at the start")
