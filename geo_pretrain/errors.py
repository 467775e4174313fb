"""Errors of this package, and helpers for their messages: given value, accepted values, closest match."""

from __future__ import annotations

import difflib
import importlib
import json
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from geo_pretrain.redact import safe

LONGEST_LINE = 500  # characters of another library's message; a server may have written it


class GeoPretrainError(Exception):
    """Base class of all errors this package raises on purpose; its message holds no logins and control characters."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(safe(arg) if isinstance(arg, str) else arg for arg in args))


class UnknownName(GeoPretrainError, KeyError):
    """A backbone, recipe, source or task that does not exist."""

    def __str__(self) -> str:  # KeyError would print the message as a quoted repr
        return str(self.args[0])


class InputError(GeoPretrainError, ValueError, TypeError):
    """A value that a network, a transform or a prediction cannot take: an image, points, or features of points."""


class RecipeError(GeoPretrainError, ValueError):
    """A recipe with an unknown key, a wrong type or a value out of range."""


class CheckpointError(GeoPretrainError, RuntimeError):
    """A checkpoint folder that is incomplete, altered or of another format."""


class DigestMismatch(CheckpointError):
    """A file whose bytes do not have the size or digest that its checkpoint states."""


class UnsafeFile(CheckpointError):
    """A pickled file that contains more than tensors, or exceeds the limits; nothing in it was executed."""


class WeightsMismatch(GeoPretrainError, RuntimeError):
    """Weights whose keys or shapes do not fit the network."""


class HubError(GeoPretrainError, RuntimeError):
    """A checkpoint that could not be fetched from any source; the message gives the reason for each source."""


class NotThere(HubError):
    """A source that works but does not have this checkpoint or file."""


class DataError(GeoPretrainError, RuntimeError):
    """A data set that cannot be used at all."""


class BadFrame(DataError):
    """One unusable frame or scene: skipped and counted by the loaders."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = safe(str(path))
        self.reason = safe(reason)

    def __reduce__(self) -> tuple[type[BadFrame], tuple[str, str]]:  # workers send it to the main process
        return type(self), (self.path, self.reason)


class BadLabels(BadFrame):
    """Labels that the list of classes lacks: no broken file, but a list that does not fit. Training on it ends."""


class MissingDependency(GeoPretrainError, ImportError):
    """An optional library that is not installed."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The `count` options closest in spelling to `name`, best first."""
    ranked = sorted(options, key=lambda option: (-difflib.SequenceMatcher(None, name, option).ratio(), option))
    return ranked[:count]


def unknown(kind: str, name: str, options: Iterable[str], hint: str = "") -> UnknownName:
    """Build the error for an unknown `kind` (such as "backbone"), which names the three nearest options."""
    closest = ", ".join(repr(option) for option in nearest(name, options))
    return UnknownName(f"Unknown {kind} {name!r}. Closest: {closest}." + (f" {hint}" if hint else ""))


def path_without_source(name: str, source: str) -> str:
    """What to say of data that are a path without a source: what was meant; "" for a plain name."""
    is_path = name.startswith((".", "~")) or any(sign in name for sign in "/\\") or Path(name).exists()
    return f"{name!r} is a path, and data are SOURCE:PATH. Did you mean {source}:{name}?" if is_path else ""


def some(texts: Iterable[str], count: int = 3) -> str:
    """The first few texts for a message, and how many more there are.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    listed = list(texts)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return (", ".join(listed[:count]) or "none") + more


def run_note(out: Path) -> str:
    """What to add to "does not exist": how far the run is that will write a result; "" without one."""
    run = Path(f"{out}.run")
    if not run.is_dir():
        return ""
    step = _last_step(run / "log.jsonl")
    state = f"is at step {step}" if step else "has not taken a step"
    return (
        f" yet: its run, in {run}, {state}. It is written when that ends; pre-training stopped by Ctrl-C writes it, "
        "too. If nothing is at work there, the same command goes on"
    )


def _last_step(log: Path) -> int:
    """The last step in a log of JSON lines; 0 where there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 16)))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def shown(error: BaseException) -> BaseException | None:
    """The error as the cause of another one; None if its text, which a traceback shows, holds keys or escapes."""
    return error if safe(str(error)) == str(error) else None


def require(package: str, extra: str = "", *, install: str = "") -> ModuleType:
    """Import an optional library; MissingDependency with the exact install line if it is absent.

    The line is `install`, or that of our extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        line = install or f"pip install 'geo_pretrain[{extra}]'"
        raise MissingDependency(f"This needs the library {package!r}, which is not installed: {line}") from error


def renamed(old: str, new: str) -> Any:
    """A property that reads attribute `new` under its former name and warns; kept for one version."""

    def read(self: Any) -> Any:
        warnings.warn(f"'{old}' is now '{new}'.", FutureWarning, stacklevel=2)
        return getattr(self, new)

    return property(read, doc=f"Former name of `{new}`.")
