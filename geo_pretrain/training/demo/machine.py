"""The machine of measurements."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Describe the machine of the measurements."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
