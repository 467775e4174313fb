"""What an attack is, and the corpus that attacks are added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from geo_pretrain.errors import CheckpointError, UnsafeFile
from tests.hub.hostile.assembler import call, name


@dataclass(frozen=True)
class Attack:
    make: Callable[[str], bytes]  # given the path of the canary
    error: type[CheckpointError] = UnsafeFile
    match: str = ""
    fires: bool = False  # Python's unpickler would touch the canary
    limits: dict[str, Any] = field(default_factory=dict)
    harmless: bool = False  # only a lie: even a reader with a hole in it could be given it without a process around it


CORPUS: dict[str, Attack] = {}


def attack(
    title: str,
    make: Callable[[str], bytes] | bytes,
    match: str,
    error: type[CheckpointError] = UnsafeFile,
    *,
    fires: bool = False,
    harmless: bool = False,
    **limits: Any,
) -> None:
    assert title not in CORPUS, title
    build = (lambda _, made=make: made) if isinstance(make, bytes) else make
    CORPUS[title] = Attack(build, error, match, fires, limits, harmless)


lie = partial(attack, harmless=True)


class Touch:
    """A real object that runs a command when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.canary}",)


def system(canary: str) -> bytes:
    return call(name("posix", "system"), f"touch {canary}")


def python(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"
