"""What a user waits for before anything is computed: imports, `geo-pretrain list`, networks of both kinds.

    python -m benchmarks.imports

Writes benchmarks/results/imports.json. Each figure is a fresh process that finds its bytecode compiled, as an installed
package has it; `import torch` stands beside them. Processor time is that of all threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.common import machine, spread, write_results

REPEATS = 7
BUILD = "from geo_pretrain import load_backbone; load_backbone({!r}, pretrained=False)"
SNIPPETS = {
    "python": "pass",
    "import geo_pretrain": "import geo_pretrain",
    "list_backbones()": "import geo_pretrain as gp; gp.list_backbones('pri3d*')",
    "geo-pretrain list": "import sys; sys.argv = ['geo-pretrain', 'list']\n"
    "from geo_pretrain.__main__ import main; main()",
    "import torch": "import torch",
    "import load_backbone": "from geo_pretrain import load_backbone",
    "load_backbone, 3D": BUILD.format("pointcontrast_nce_srunet34"),
    "load_backbone, 2D": BUILD.format("pri3d_view_geo_r18"),
}
HEAVY = ("torch", "torchvision", "torch._dynamo", "typer", "rich")
REPORT = f"""
import sys, time
used = time.process_time()
peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))
loaded = [name for name in {HEAVY} if name in sys.modules]
print(used, int(peak) / 1024, *loaded, sep='|', file=sys.stderr)
"""


def main() -> None:
    """Run every snippet in turn, several times."""
    wall: dict[str, list[float]] = {name: [] for name in SNIPPETS}
    processor: dict[str, list[float]] = {name: [] for name in SNIPPETS}
    memory: dict[str, list[float]] = {name: [] for name in SNIPPETS}
    loaded: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        for repeat in range(REPEATS + 1):
            for name, code in SNIPPETS.items():
                command = [sys.executable, "-c", code + REPORT]
                begin = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                seconds = time.perf_counter() - begin
                used, megabytes, *loaded[name] = done.stderr.splitlines()[-1].split("|")
                if repeat > 0:  # the first compiles, and fills the file cache
                    wall[name].append(seconds)
                    processor[name].append(float(used))
                    memory[name].append(float(megabytes))
    results: dict[str, Any] = {
        name: {
            "seconds": spread(wall[name]),
            "processor_seconds": spread(processor[name]),
            "peak_MB": spread(memory[name]),
            "heavy_libraries_loaded": loaded[name],
        }
        for name in SNIPPETS
    }
    write_results("imports", "python -m benchmarks.imports", results | {"machine": machine()})


if __name__ == "__main__":
    main()
