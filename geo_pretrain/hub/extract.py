"""Extract tensors from the authors' pickle files in a child process that executes nothing in them.

The package `unpickle`, the child, knows the formats. Here is its guard: it starts the child with an empty environment
and limits on time, memory and output, turns every failure into one clear error, and puts the result in place only when
it is complete.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geo_pretrain.errors import CheckpointError, UnsafeFile
from geo_pretrain.files import move, parse_json

CHILD = Path(__file__).with_name("unpickle")  # a folder; Python runs its __main__


@dataclass(frozen=True)
class Limits:
    """Limits on reading one file. The defaults suffice several times over for every file of the catalog."""

    seconds: float = 300.0  # by the clock, and of CPU
    memory: int = 2 << 30  # bytes, beside the mapped file
    output: int = 4 << 30  # bytes of tensors
    pickle: int = 64 << 20  # bytes of the pickle within a torch archive
    operations: int = 2_000_000  # instructions of the pickle
    records: int = 100_000  # members of an archive
    tensors: int = 100_000


@dataclass(frozen=True)
class Extracted:
    """What an authors' file holds beside its tensors."""

    entry: str  # which of the `entries` was found; "" the top level
    tensors: int
    foreign: tuple[str, ...]  # names without a stand-in, replaced by inert placeholders
    scalars: Mapping[str, Any]  # numbers and short texts at its top level
    skipped: Mapping[str, str]  # key in the entry -> why it is not in the result


def extract(path: Path, out: Path, *, entries: Sequence[str] = ("",), limits: Limits = Limits()) -> Extracted:
    """Write the tensors in the first of `entries` that `path` has to the safetensors file `out`, contiguous.

    `path` is a file of torch.save (either format) or a pickle with numpy arrays; an entry is a key of its top-level
    dict, "" that dict itself, "*" the tensors of all dicts inside it, keys joined by dots. Values of the entry that are
    no tensors are left out and listed. Nothing in the file is executed. `out` has at most 4 times the bytes of `path`
    (`unpickle.tensors.UNFOLDED`). Raises `UnsafeFile` for a file that asks for more than tensors, or for more than that
    or `limits`, and `CheckpointError` for one that is damaged, of another format or has no tensors there; `out` is then
    untouched.
    """
    path, out = Path(path), Path(out)
    if isinstance(entries, str) or not entries:
        raise CheckpointError(f"entries={entries!r}: a list of keys is accepted, such as ['model', '']")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    part = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    job = {
        "file": os.fspath(path.resolve()),
        "out": os.fspath(part.absolute()),
        "entries": list(entries),
        "limits": asdict(limits),
        "path": [os.path.abspath(folder) for folder in sys.path if folder],  # noqa: PTH100  # where numpy lies
    }
    try:
        report = _answer(path, job, limits)
        move(part, out)
    except OSError as error:
        raise CheckpointError(f"{out}: could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return Extracted(**{**report, "foreign": tuple(report["foreign"])})


def _answer(path: Path, job: Mapping[str, Any], limits: Limits) -> Mapping[str, Any]:
    """Run the child on a job; anything but a complete report raises."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", os.fspath(CHILD)],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=limits.seconds,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnsafeFile(f"{path}: reading it takes longer than {limits.seconds:g} s; it was given up.") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        if name == "SIGXCPU":
            raise UnsafeFile(f"{path}: reading it takes more than {limits.seconds:g} s of CPU; it was given up.")
        raise UnsafeFile(f"{path}: the process reading it was ended by {name}, for lack of memory or by the file.")
    try:
        answer = parse_json(done.stdout)
    except ValueError as error:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise CheckpointError(
            f"{path}: the process reading it failed ({done.returncode}), saying: {last[0]}"
        ) from error
    if "refused" in answer:
        raise UnsafeFile(f"{path}: {answer['refused']}.")
    if "done" not in answer:
        raise CheckpointError(f"{path}: {answer.get('unreadable') or answer.get('broken')}.")
    return answer["done"]


def _environment() -> dict[str, str]:
    """The child's environment: empty but for what Windows needs to start a program, and one thread a library."""
    kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
