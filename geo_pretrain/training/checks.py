"""What the fields of a recipe accept: ranges stated in their types, checks, and one error for all mistakes."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

from geo_pretrain.errors import RecipeError


class Accepts(NamedTuple):
    """The range of a field, stated in its type: `Annotated[float, Accepts(condition, words)]`; None is not checked."""

    condition: Callable[[Any], bool]
    words: str


Count = Annotated[int, Accepts(lambda n: n >= 1, "a whole number from 1 up")]
NaturalNumber = Annotated[int, Accepts(lambda n: n >= 0, "a whole number from 0 up")]
Odd = Annotated[int, Accepts(lambda n: n >= 1 and n % 2 == 1, "an odd number from 1 up")]
Seed = Annotated[int, Accepts(lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")]
Positive = Annotated[float, Accepts(lambda x: x > 0, "a number above 0")]
NotNegative = Annotated[float, Accepts(lambda x: x >= 0, "a number from 0 up")]
Meters = Annotated[float, Accepts(lambda x: x > 0, "meters above 0")]
Share = Annotated[float, Accepts(lambda x: 0 < x <= 1, "a number above 0 and up to 1")]
Momentum = Annotated[float, Accepts(lambda x: 0 <= x < 1, "a number from 0 to below 1")]
Probability = Annotated[float, Accepts(lambda x: 0 <= x <= 1, "a probability, from 0 to 1")]
Shares = Annotated[
    tuple[float, float], Accepts(lambda r: 0 < r[0] <= r[1] <= 1, "[low, high] with 0 < low <= high <= 1")
]
PositiveRange = Annotated[tuple[float, float], Accepts(lambda r: 0 < r[0] <= r[1], "[low, high] with 0 < low <= high")]
Interval = Annotated[
    tuple[float, float], Accepts(lambda r: 0 <= r[0] < r[1] <= 1, "[low, high] with 0 <= low < high <= 1")
]
ImageSize = Annotated[tuple[int, int], Accepts(lambda size: min(size) >= 32, "[height, width], each from 32 up")]


@functools.cache
def type_hints(kind: type, include_extras: bool = False) -> dict[str, Any]:
    """Evaluate the types of a dataclass' fields, once a class: doing it took half the time of reading a recipe."""
    return typing.get_type_hints(kind, include_extras=include_extras)


@dataclass(frozen=True)
class Problem:
    """One mistake in a file: the keys it concerns, and a sentence for the user."""

    keys: tuple[str, ...]
    text: str

    def touches(self, keys: Iterable[str]) -> bool:
        """Whether the mistake concerns one of `keys`, one of their subkeys or a section they are in."""
        return any(_inside(one, other) or _inside(other, one) for one in self.keys for other in keys)


class Mistakes(RecipeError):
    """The error for one or more mistakes in a file; `problems` lists them."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class Checks:
    """Collects failed checks: `check = Checks()`, then `check(condition, ...)` for each, then `check.done()`."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def __call__(self, condition: bool, key: str, value: object, accepted: str, *, given: Sequence[str] = ()) -> bool:
        """Record a mistake unless the condition holds; returns the condition.

        `key` may name several keys: "optim.steps / optim.epochs". `given` names further keys that the condition depends
        on; if one of these has a mistake of its own, this one is not reported.
        """
        if not condition:
            self.note(f"'{key}' is {value!r}, accepted is {accepted}.", *key.split(" / "), *given)
        return condition

    def ranges(self, section: Any, prefix: str = "") -> None:
        """Record every field of a dataclass, and of the dataclasses in it, that is out of the range its type states."""
        kind: type = type(section)
        for name, hint in type_hints(kind, include_extras=True).items():
            value, key = getattr(section, name), prefix + name
            if dataclasses.is_dataclass(value):
                self.ranges(value, key + ".")
            shown = list(value) if isinstance(value, tuple) else value
            for part in (hint, *typing.get_args(hint)):
                for accepts in getattr(part, "__metadata__", ()):
                    self(value is None or accepts.condition(value), key, shown, accepts.words)

    def note(self, text: str, *keys: str) -> None:
        """Record a mistake that concerns `keys`, in words."""
        self.problems.append(Problem(keys, text))

    def done(self) -> None:
        """Raise one `RecipeError` that names all recorded mistakes, if there are any."""
        if self.problems:
            raise all_mistakes("", self.problems)


@dataclass(frozen=True)
class Ranged:
    """A dataclass that raises one `RecipeError` for all values out of the ranges that the types of its fields state."""

    section: ClassVar[str] = ""  # of a recipe, for messages, such as "task."

    def __post_init__(self) -> None:
        check = Checks()
        check.ranges(self, self.section)
        self.check_settings(check)
        check.done()

    def check_settings(self, check: Checks) -> None:
        """Note values that do not go together."""


def check_key(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raise a `RecipeError` with the value of `key` and the accepted values unless the condition holds."""
    check = Checks()
    check(condition, key, value, accepted)
    check.done()


def all_mistakes(where: str, problems: Sequence[Problem], overrides: Mapping[str, str] = {}) -> Mistakes:
    """The error that names all problems: one line for a single problem, else a list.

    A problem that overrides (key -> override) brought about names them; alone it does not blame the file.
    """
    problems = list(dict.fromkeys(problems))  # two parts of a recipe may have the same fault to find
    given = [[f"--set {text}" for key, text in overrides.items() if problem.touches([key])] for problem in problems]
    texts = [
        f"{problem.text} Given by {', '.join(by)}." if by else problem.text
        for problem, by in zip(problems, given, strict=True)
    ]
    start = f"{where}: " if where and not all(given) else ""
    if len(problems) == 1:
        return Mistakes(start + texts[0], problems)
    lines = "".join(f"\n  - {text}" for text in texts)
    return Mistakes(f"{start}{len(problems)} mistakes:{lines}", problems)


def _inside(key: str, other: str) -> bool:
    """Whether `key` is `other` or a subkey of it."""
    return key == other or key.startswith((f"{other}.", f"{other}["))
