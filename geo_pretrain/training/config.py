"""Reads YAML files into frozen dataclasses: overrides, overlays, renamed keys, checks and differences.

This module knows no recipe; the schemas are in `recipe` and `finetune_recipe`. Errors name all mistakes of a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from geo_pretrain.errors import GeoPretrainError, RecipeError, UnknownName, nearest

T = TypeVar("T")
# Metadata of a dataclass field, `field(default_factory=dict, metadata=OTHER_KEYS)`: it takes all keys that the
# dataclass does not know, as they are.
OTHER_KEYS = {"takes": "other keys"}
_BAD: Any = object()  # in place of a value that is missing or wrong


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

    def note(self, text: str, *keys: str) -> None:
        """Record a mistake that concerns `keys`, in words."""
        self.problems.append(Problem(keys, text))

    def done(self) -> None:
        """Raise one `RecipeError` that names all recorded mistakes, if there are any."""
        if self.problems:
            raise _error("", self.problems)


def check_key(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raise a `RecipeError` with the value of `key` and the accepted values unless the condition holds."""
    check = Checks()
    check(condition, key, value, accepted)
    check.done()


@dataclass(frozen=True)
class Renamed:
    """A renamed key, or a key with renamed values; old files, overrides and stored recipes are still read."""

    old: str
    new: str
    values: Mapping[Any, Any] = field(default_factory=dict)  # old value -> new value; others are kept


def read_tree(path: Path, renames: Sequence[Renamed] = ()) -> dict[str, Any]:
    """Read a YAML file of keys and values and rename old keys. Raises `RecipeError` for any other file."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected keys and values, got {_shown(tree)}.")
    return rename_keys(tree, renames, where=str(path))


def rename_keys(tree: Mapping[str, Any], renames: Sequence[Renamed], *, where: str, prefix: str = "") -> dict[str, Any]:
    """Copy nested mappings with old keys renamed; `prefix` is the path of `tree` in the file, such as "data."."""
    copy = _copied(tree)
    for renamed in renames:
        if not (renamed.old.startswith(prefix) and renamed.new.startswith(prefix)):
            continue
        old, new = renamed.old.removeprefix(prefix).split("."), renamed.new.removeprefix(prefix).split(".")
        value = _get(copy, old)
        if value is _BAD:
            continue
        _pop(copy, old)
        if _get(copy, new) is not _BAD:
            raise RecipeError(f"{where}: '{renamed.new}' is given twice, also by its former name '{renamed.old}'.")
        _set(copy, new, _translated(renamed, value))
    return copy


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str], renames: Sequence[Renamed] = ()) -> None:
    """Set keys of nested mappings in place from texts `key.key=value`; values are parsed as YAML.

    Raises `RecipeError` that names all overrides which cannot be applied.
    """
    problems = []
    by_old = {renamed.old: renamed for renamed in renames}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            text = f"Override {override!r} is not of the form key=value, such as optim.lr=0.05."
            problems.append(Problem((), text))
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(Problem((key,), f"Override {override!r}: {text!r} is not valid YAML."))
            continue
        if key in by_old:
            key, value = by_old[key].new, _translated(by_old[key], value)
        blocking = _set(tree, key.split("."), value)
        if blocking is not None:
            problems.append(Problem((key,), f"Override {override!r}: '{blocking}' holds a value, not keys."))
        elif isinstance(value, Mapping):
            renewed = rename_keys(tree, renames, where=f"Override {override!r}")
            tree.clear()
            tree.update(renewed)
    if problems:
        raise _error("", problems)


def merge_tree(tree: dict[str, Any], overlay: Mapping[str, Any]) -> None:
    """Merge `overlay` into `tree` in place, section by section; a value None removes the key."""
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            merge_tree(tree[key], value)
        elif value is None:
            tree.pop(key, None)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def changes(
    before: str, now: str, kind: type, *, renames: Sequence[Renamed] = (), ignore: Iterable[str] = ()
) -> list[str]:
    """List the differences of two YAML texts of the dataclass `kind` as "key.key: old -> new".

    Keys in `ignore` do not count. A key that a text lacks, such as one that is newer than it, has its default there.
    """
    ignored, defaults, missing = set(ignore), _defaults(kind), "(none)"
    old, new = (_flat(rename_keys(yaml.safe_load(text), renames, where="recipe")) for text in (before, now))
    keys = [key for key in {**new, **old} if key not in ignored]
    values = [(key, *(tree.get(key, defaults.get(key, missing)) for tree in (old, new))) for key in keys]
    return [f"{key}: {one} -> {two}" for key, one, two in values if one != two]


def plain_types(value: Any) -> Any:
    """Convert dataclasses to mappings and tuples to lists, so that YAML stays plain and `parse` reads it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            item = plain_types(getattr(value, f.name))
            tree |= item if f.metadata == OTHER_KEYS else {f.name: item}
        return tree
    if isinstance(value, Mapping):
        return {key: plain_types(item) for key, item in value.items()}
    return [plain_types(item) for item in value] if isinstance(value, list | tuple) else value


def parse(
    kind: type[T],
    tree: object,
    *,
    where: str,
    prefix: str = "",
    renames: Sequence[Renamed] = (),
    also: Sequence[Callable[[T], object]] = (),
) -> T:
    """Build the dataclass `kind` from nested mappings.

    Args:
        kind: a dataclass; its fields may be dataclasses too. Its `__post_init__` may check values with `Checks`.
        tree: what was read from YAML.
        where: the file, for messages.
        prefix: path of `tree` in the file, such as "task.", for messages.
        renames: old keys that are accepted.
        also: further checks of the result, functions that raise `RecipeError` or `UnknownName`.

    Raises:
        RecipeError: names every unknown key, wrong type, missing key and value out of range. A single mistake that a
            function in `also` found is raised as that function raised it.
    """
    if isinstance(tree, Mapping) and renames:
        tree = rename_keys(tree, renames, where=where, prefix=prefix)
    parser = _Parser()
    value = typing.cast(T, parser.section(kind, tree, prefix))
    for check in also:
        parser.run(check, value, RecipeError, UnknownName)
    if len(parser.problems) == 1 and parser.causes:
        raise parser.causes[0]
    if parser.problems:
        raise _error(where, parser.problems)
    return value


class _Parser:
    """Parses sections and collects mistakes; wrong values are replaced so that parsing goes on to the end."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.doubtful: set[str] = set()  # keys whose value was replaced, so that later checks of it mean nothing
        self.causes: list[GeoPretrainError] = []  # errors that functions in `also` raised

    def note(self, text: str, *keys: str) -> None:
        self.problems.append(Problem(keys, text))
        self.doubtful.update(keys)

    def run(self, check: Callable[[Any], object], value: object, *own: type[GeoPretrainError]) -> None:
        """Call a check and record the mistakes it raises, except those about doubtful keys.

        With `own`, errors of these types are recorded too, and the error itself is kept.
        """
        expected: tuple[type[GeoPretrainError], ...] = (RecipeError, *own)
        try:
            check(value)
        except expected as error:
            problems = error.problems if isinstance(error, Mistakes) else (Problem((), str(error)),)
            fresh = [problem for problem in problems if not problem.touches(self.doubtful)]
            self.problems += fresh
            self.causes += [error] if fresh and own else []

    def section(self, kind: type, tree: object, prefix: str) -> object:
        """Build an instance of the dataclass `kind`, with replaced values where there are mistakes."""
        if not isinstance(tree, Mapping):
            name = prefix.rstrip(".")
            self.note(f"{name or 'the file'} is {_shown(tree)}, expected keys and values.", *([name] if name else []))
            tree = {}
            if not name:
                return _unchecked(kind, {})
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind) if f.metadata != OTHER_KEYS}
        others = [f.name for f in dataclasses.fields(kind) if f.metadata == OTHER_KEYS]
        unknown = {key: value for key, value in tree.items() if key not in fields}
        for key in unknown if not others else ():
            self._note_unknown(str(key), list(fields), prefix)
        values: dict[str, Any] = dict.fromkeys(others, unknown)
        for name, f in fields.items():
            if name in tree:
                values[name] = self.value(hints[name], tree[name], prefix + name)
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                values[name] = _BAD
                if prefix + name not in self.doubtful:
                    self.note(f"key '{prefix}{name}' is missing.", prefix + name)
        usable = {name: _usable(fields[name], hints[name], values[name]) for name in fields if name in values}
        return self._built(kind, values | usable)

    def value(self, hint: Any, value: object, key: str) -> Any:
        """Convert a value to its type hint; returns `_BAD` for a mistake."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in args:
                return None
            return self.value(next(a for a in args if a is not type(None)), value, key)
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type, hint), value, key + ".")
        if origin is Literal:
            if value in args and type(value) in {type(a) for a in args}:
                return value
            closest = nearest(str(value), map(str, args), 1)[0]
            return self._refuse(key, value, f"one of {', '.join(map(str, args))}", f" Closest: {closest!r}.")
        if origin is tuple:
            return self._tuple(args, value, key)
        if origin is dict or hint is dict:
            return dict(value) if isinstance(value, Mapping) else self._refuse(key, value, "keys and values")
        return self._scalar(hint, value, key)

    def _tuple(self, args: tuple[Any, ...], value: object, key: str) -> Any:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            return self._refuse(key, value, f"a list of {len(args)} values")
        items = [self.value(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))]
        if _BAD in items:
            self.doubtful.add(key)
            return _BAD
        return tuple(items)

    def _scalar(self, hint: type, value: object, key: str) -> Any:
        if hint is float and isinstance(value, str):
            try:  # YAML 1.1 reads 1e-3 as a string
                return float(value)
            except ValueError:
                pass
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
            return value
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        return self._refuse(key, value, names.get(hint, hint.__name__))

    def _refuse(self, key: str, value: object, accepted: str, hint: str = "") -> object:
        self.note(f"'{key}' is {_shown(value)}, accepted is {accepted}.{hint}", key)
        return _BAD

    def _note_unknown(self, key: str, accepted: Sequence[str], prefix: str) -> None:
        closest = ", ".join(repr(prefix + name) for name in nearest(key, accepted, 1))
        self.note(f"unknown key '{prefix}{key}'. Closest: {closest}. Accepted: {', '.join(accepted)}.", prefix + key)
        # The key that was probably meant must not be reported as missing or out of range.
        self.doubtful.update(prefix + name for name in difflib.get_close_matches(key, accepted, 1))

    def _built(self, kind: type, values: dict[str, Any]) -> object:
        """Build an instance of `kind`; if its own checks fail, build it without them."""
        made: list[object] = []
        self.run(lambda _: made.append(kind(**values)), None)
        return made[0] if made else _unchecked(kind, values)


def _usable(f: dataclasses.Field[Any], hint: Any, value: object) -> Any:
    """The value, or in place of `_BAD` the default, or any value of the right type."""
    if value is not _BAD:
        return value
    if f.default is not dataclasses.MISSING:
        return f.default
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    if dataclasses.is_dataclass(hint):
        return _unchecked(typing.cast(type, hint), {})
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Literal else (typing.get_origin(hint) or hint)()


def _unchecked(kind: type, values: Mapping[str, Any]) -> object:
    """Build an instance of a dataclass without calling its `__post_init__`."""
    hints = typing.get_type_hints(kind)
    made: object = object.__new__(kind)
    for f in dataclasses.fields(kind):
        value = values[f.name] if f.name in values else _usable(f, hints[f.name], _BAD)
        object.__setattr__(made, f.name, value)
    return made


def _error(where: str, problems: Sequence[Problem]) -> Mistakes:
    """The error that names all problems: one line for a single problem, else a list."""
    start = f"{where}: " if where else ""
    if len(problems) == 1:
        return Mistakes(start + problems[0].text, problems)
    lines = "".join(f"\n  - {problem.text}" for problem in problems)
    return Mistakes(f"{start}{len(problems)} mistakes:{lines}", problems)


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _inside(key: str, other: str) -> bool:
    """Whether `key` is `other` or a subkey of it."""
    return key == other or key.startswith((f"{other}.", f"{other}["))


def _flat(tree: object, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to keys "key.key"; lists are values."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _defaults(kind: type, prefix: str = "") -> dict[str, Any]:
    """Default values of a dataclass and its sections, by "key.key"."""
    hints = typing.get_type_hints(kind)
    defaults: dict[str, Any] = {}
    for f in dataclasses.fields(kind):
        key = prefix + f.name
        section = next((hint for hint in (hints[f.name], *typing.get_args(hints[f.name])) if _is_section(hint)), None)
        if section is not None:
            defaults |= _defaults(section, key + ".")
        elif f.default is not dataclasses.MISSING:
            defaults[key] = plain_types(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            defaults[key] = plain_types(f.default_factory())
    return defaults


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _translated(renamed: Renamed, value: object) -> object:
    try:
        return renamed.values.get(value, value)
    except TypeError:  # a list or a mapping, which is no former value
        return value


def _get(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at a path of keys; `_BAD` if there is none."""
    value: Any = tree
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return _BAD
        value = value[key]
    return value


def _pop(tree: dict[str, Any], path: Sequence[str]) -> None:
    *parents, last = path
    del _get(tree, parents)[last]


def _set(tree: dict[str, Any], path: Sequence[str], value: object) -> str | None:
    """Set the value at a path of keys; returns the key in the way if it holds a value instead of keys, else None."""
    *parents, last = path
    branch = tree
    for parent in parents:
        branch = branch.setdefault(parent, {})
        if not isinstance(branch, dict):
            return parent
    branch[last] = value
    return None
