"""Start of the child process: `python -I <this folder>`.

The modules here import each other by their full names, `geo_pretrain.hub.unpickle.*`, in the child as everywhere. In
the child an empty package of that name, with this folder as its only path, is registered before the first of them is
imported: Python finds the parent package there and never looks for `geo_pretrain` itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "geo_pretrain.hub.unpickle"


def stand_alone() -> None:
    """Register this folder as the package `geo_pretrain.hub.unpickle`, and remove it from sys.path."""
    folder = Path(__file__).absolute().parent
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    sys.path[:] = [path for path in sys.path if Path(path).absolute() != folder]


if __name__ == "__main__":
    stand_alone()
    from geo_pretrain.hub.unpickle.job import main

    main()
