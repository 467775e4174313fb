"""Start of the child process: `python -I <this folder>`.

The modules here import each other by their full names, `geo_pretrain.hub.unpickle.*`, in the child as everywhere: there
a bare package of that name, which holds this folder and nothing else, stands in before the first of them is imported,
and Python, finding the parent there, never looks for `geo_pretrain` itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "geo_pretrain.hub.unpickle"


def stand_alone() -> None:
    """Give this folder its name in the package, and take it off the path, where Python put it as what it was to run."""
    folder = Path(__file__).absolute().parent
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    sys.path[:] = [path for path in sys.path if Path(path).absolute() != folder]


if __name__ == "__main__":
    stand_alone()
    from geo_pretrain.hub.unpickle.job import main

    main()
