"""Find the network among the keys of a file: people wrap it, add heads to it, and save a whole training state.

`select` takes what a user names; `find_prefix` looks for the one prefix under which a whole network lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from geo_pretrain.convert.keys import COUNTER, Converted, Networks, State, shown
from geo_pretrain.errors import WeightsMismatch, nearest

T = TypeVar("T")
Run = Callable[[State], Converted]  # raises `WeightsMismatch` where the state dict does not fit


def select(state: Mapping[str, T], prefix: str = "", ignore: Sequence[str] = ()) -> dict[str, T]:
    """The keys under `prefix`, without it, and without those that match one of the patterns `ignore` (* and ?).

    Patterns are compared with the keys as the file has them. Raises `WeightsMismatch` for a prefix or a pattern that
    no key has: a mistyped one would leave out nothing, or everything.
    """
    for pattern in ignore:
        if not any(fnmatchcase(key, pattern) for key in state):
            raise WeightsMismatch(f"No key of the file fits ignore={pattern!r}; it has {shown(state)}.")
    kept = {key: value for key, value in state.items() if not any(fnmatchcase(key, pattern) for pattern in ignore)}
    if prefix and not any(key.startswith(prefix) for key in kept):
        closest = ", ".join(map(repr, nearest(prefix, prefixes(kept)))) or "none"
        raise WeightsMismatch(f"No key of the file begins with prefix={prefix!r}. Prefixes in it: {closest}.")
    return {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}


def prefixes(keys: Iterable[str]) -> list[str]:
    """All prefixes of the keys that end with a dot, in order of appearance.

    >>> prefixes(["model.net.weight", "head.bias"])
    ['model.', 'model.net.', 'head.']
    """
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")[:-1]
        found |= dict.fromkeys(".".join(parts[:length]) + "." for length in range(1, len(parts) + 1))
    return list(found)


def find_prefix(state: State, networks: Networks, run: Run, error: WeightsMismatch) -> str:
    """The one prefix under which a whole network lies, though not all of the file fits.

    `run` converts a state dict; `error` says why the whole file does not fit, and is raised, with what comes closest,
    where no prefix does, or several with different tensors.
    """
    smallest = min(sum(not key.endswith(COUNTER) for key in network) for network in networks.values())
    fitting: dict[frozenset[int], str] = {}
    for prefix in prefixes(state):
        below = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if len(below) < smallest or len(below) == len(state):
            continue
        try:
            converted = run(below)
        except WeightsMismatch:
            continue
        given = {id(value) for value in below.values()}
        used = frozenset(id(t) for part in converted.weights.values() for t in part.values() if id(t) in given)
        fitting[used] = prefix  # the longest: formats find networks below a shorter one by themselves
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise WeightsMismatch(
            f"{error} Several networks lie in the file, under {', '.join(map(repr, fitting.values()))}: name one "
            "(prefix=, --prefix)."
        ) from error
    raise WeightsMismatch(f"{error}{_closest(state, networks)}") from error


def _closest(state: State, networks: Networks) -> str:
    """Which prefix covers most of a network by names and shapes, for an error; "" if that is none."""
    best = (0, 0, "", "")
    for prefix in ["", *prefixes(state)]:
        for role, network in networks.items():
            same = sum(
                prefix + key in state and state[prefix + key].shape == value.shape for key, value in network.items()
            )
            best = max(best, (same, len(network), prefix, role), key=lambda found: found[0])
    same, size, prefix, role = best
    way_on = "What else the file holds can be left out (ignore=, --ignore PATTERN)."
    if not prefix:
        return f" {way_on}" if same == size else ""
    if 2 * same < size:
        return ""
    return (
        f" Closest: under the prefix {prefix!r}, {same} of {size} tensors of the {role} have their names and shapes. "
        f"{way_on}"
    )
