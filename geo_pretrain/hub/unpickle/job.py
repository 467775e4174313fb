"""The child process: set limits, install the audit hook, do one job from standard input, and report."""

from __future__ import annotations

import errno
import json
import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.hub.unpickle.budget import Budget
from geo_pretrain.hub.unpickle.formats import read_file
from geo_pretrain.hub.unpickle.names import NAME_LENGTH, Refused, Unreadable, shown
from geo_pretrain.hub.unpickle.nodes import Dict
from geo_pretrain.hub.unpickle.tensors import UNFOLDED, check_sums, choose, laid_out, wanted_of, write

SCALARS, SKIPPED, NAMES = 100, 1000, 100  # the report lists at most so many of each


def extract(data: Any, out: Path, entries: Sequence[str], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Write the tensors of the first of `entries` that the file has; returns the report. `out` must not exist."""
    budget = Budget(limits["operations"], 2 * len(data) + (1 << 20))
    opened = read_file(data, budget, limits)
    budget.check_names()
    entry, values = choose(opened.top, entries)
    wanted, skipped = wanted_of(values, opened, limits)
    start, ordered = laid_out(wanted, len(data))
    check_sums(values, wanted, opened, data)
    with out.open("xb") as stream:
        write(start, ordered, data, stream)
    return {
        "entry": entry,
        "tensors": len(wanted),
        "foreign": sorted(budget.names)[:NAMES],
        "scalars": scalars(opened.top),
        "skipped": dict(list(skipped.items())[:SKIPPED]),
    }


def scalars(top: Any) -> dict[str, Any]:
    """The numbers and short texts at the top level of the file."""
    listed: dict[str, Any] = {}
    for key, value in top.items() if isinstance(top, Dict) else ():
        short = isinstance(value, str) and len(value) <= NAME_LENGTH
        number = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63)
        if isinstance(key, str) and (short or number) and len(listed) < SCALARS:
            listed[shown(key)] = shown(value) if short else value
    return listed


def set_limits(limits: Mapping[str, Any], size: int) -> None:
    """Limit this process's memory (beyond that in use and the mapped file), CPU time, output size and core files."""
    try:
        import resource
    except ImportError:  # not on Windows; the parent's clock is what is left there
        return
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        used = 4 << 30  # elsewhere than on Linux
    seconds = math.ceil(limits["seconds"])
    for name, soft in {
        "RLIMIT_AS": used + size + limits["memory"],
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": min(limits["output"] + (128 << 20), UNFOLDED * size),
        "RLIMIT_CORE": 0,
    }.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        _, hard = resource.getrlimit(number)
        ceiling = soft + (5 if name == "RLIMIT_CPU" else 0)
        highest = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
        try:
            resource.setrlimit(number, (min(soft, highest), highest))
        except (ValueError, OSError):  # macOS refuses some
            continue


def deny(event: str, _: tuple[Any, ...]) -> None:
    """Audit hook, a second line of defense: this process starts nothing, opens no socket and unpickles nothing."""
    if event.split(".")[0] in ("subprocess", "socket", "pickle", "webbrowser") or event in (
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.remove",
        "os.rename",
        "os.kill",
    ):
        raise Refused(f"it tried {event}")


def main() -> None:
    """Read the job from standard input, answer with one line of JSON on standard output."""
    job = json.load(sys.stdin)
    sys.path.extend(path for path in job["path"] if path not in sys.path)
    answer: dict[str, Any]
    try:
        size = Path(job["file"]).stat().st_size
        set_limits(job["limits"], size)
        with Path(job["file"]).open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            sys.addaudithook(deny)
            answer = {"done": extract(data, Path(job["out"]), job["entries"], job["limits"])}
    except Refused as error:
        answer = {"refused": str(error)}
    except Unreadable as error:
        answer = {"unreadable": str(error)}
    except (MemoryError, RecursionError):
        answer = {"refused": "reading it takes more memory than is accepted"}
    except Exception as error:  # this process ends here: whatever it was, the parent reports it
        answer = {"broken": f"{type(error).__name__}: {shown(str(error))}"}
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            answer = {"refused": "reading it takes more memory than is accepted"}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
