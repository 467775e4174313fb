"""What every benchmark reports: the machine, a median with its spread, and a JSON file with the command."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {key: round(f(values), 3) for key, f in (("median", statistics.median), ("min", min), ("max", max))}


def write_results(name: str, command: str, results: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>.json and print it."""
    text = json.dumps({"command": command, **results}, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
