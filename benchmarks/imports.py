"""What a user waits for: import geo_pretrain, `geo-pretrain list`, and whether torch was needed for it.

    python -m benchmarks.imports

Writes benchmarks/results/imports.json. Each figure is a fresh process; `import torch` stands beside them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from benchmarks.common import machine, spread, write_results

REPEATS = 7
SNIPPETS = {
    "python": "pass",
    "import geo_pretrain": "import geo_pretrain",
    "list_backbones()": "import geo_pretrain as gp; gp.list_backbones('pri3d*')",
    "geo-pretrain list": "import sys; sys.argv = ['geo-pretrain', 'list']\n"
    "from geo_pretrain.cli import app; app(standalone_mode=False)",
    "import torch": "import torch",
    "import geo_pretrain.loading": "import geo_pretrain.loading",
}
REPORT = "\nimport sys; sys.stderr.write('loaded:' + ','.join(m for m in ('torch', 'torchvision') if m in sys.modules))"


def main() -> None:
    """Run every snippet in turn, several times."""
    seconds: dict[str, list[float]] = {name: [] for name in SNIPPETS}
    loaded: dict[str, str] = {}
    for repeat in range(REPEATS + 1):
        for name, code in SNIPPETS.items():
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=True)
            if repeat > 0:  # the first fills the file cache
                seconds[name].append(time.perf_counter() - begin)
            loaded[name] = done.stderr.rpartition("loaded:")[2]
    results: dict[str, Any] = {
        name: {
            "seconds": spread(seconds[name]),
            "heavy_libraries_loaded": loaded[name].split(",") if loaded[name] else [],
        }
        for name in SNIPPETS
    }
    write_results("imports", "python -m benchmarks.imports", results | {"machine": machine()})


if __name__ == "__main__":
    main()
