"""Reads YAML files into frozen dataclasses: overrides, overlays, renamed keys and differences.

This module knows no recipe; the schemas are in `recipe` and `finetune_recipe`. Errors name all mistakes of a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from geo_pretrain.errors import GeoPretrainError, RecipeError, nearest
from geo_pretrain.training.checks import Mistakes, Problem, all_mistakes, type_hints
from geo_pretrain.yaml_text import copied, parse_setting, parse_yaml, read_yaml

T = TypeVar("T")
# Metadata of a dataclass field, `field(default_factory=dict, metadata=OTHER_KEYS)`: it takes all keys that the
# dataclass does not know, as they are.
OTHER_KEYS = {"takes": "other keys"}
SIZE = re.compile(r"(\d+)[xX](\d+)")
_BAD: Any = object()  # in place of a value that is missing or wrong


@dataclass(frozen=True)
class Renamed:
    """A renamed key, or a key with renamed values; old files, overrides and stored recipes are still read."""

    old: str
    new: str
    values: Mapping[Any, Any] = field(default_factory=dict)  # old value -> new value; others are kept


class Draft:
    """Settings on their way from a file to a dataclass: their tree, and the mistakes in the file and the overrides."""

    def __init__(self, tree: Any, where: str, renames: Sequence[Renamed] = (), prefix: str = "") -> None:
        """`where`: the file; `prefix`: path of `tree` in it, such as "task."; both are for messages."""
        self.tree, self.where, self.renames, self.prefix = tree, where, renames, prefix
        self.problems: list[Problem] = []
        self.overrides: dict[str, str] = {}  # key -> the override that set it
        self._rename()

    @classmethod
    def read(cls, path: Path, renames: Sequence[Renamed] = ()) -> Draft:
        """Read a YAML file of keys and values. Raises `RecipeError` for any other file."""
        try:
            tree = read_yaml(path)
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(tree, dict):
            raise RecipeError(f"{path}: expected keys and values, got {_shown(tree)}.")
        return cls(tree, str(path), renames)

    def override(self, overrides: Iterable[str], owners: Mapping[str, tuple[str, str]] = {}) -> Draft:
        """Set keys from texts `key.key=value`, values in YAML; the last one counts where a key is given again.

        `owners`: key -> a key that holds for its present value only, which goes when an override changes the first; and
        the value that the first has where it is not given.
        """
        by_old = {renamed.old: renamed for renamed in self.renames}
        spelled: dict[str, str] = {}  # key -> how the override that set it spelled the key
        for override in overrides:
            given, equals, text = override.partition("=")
            given = given.strip()
            if not equals or not given:
                self._note(f"Override {override!r} is not of the form key=value, such as optim.lr=0.05.")
                continue
            try:
                value = parse_setting(text)
            except yaml.YAMLError:
                self._note(f"Override {override!r}: {text!r} is not valid YAML.")
                continue
            renamed = by_old.get(given)
            key, value = (given, value) if renamed is None else (renamed.new, _translated(renamed, value))
            if spelled.setdefault(key, given) != given:
                self._note(f"{key!r} is given twice, by {self.overrides[key]!r} and, under another name, {override!r}.")
            if key in owners:
                owned, default = owners[key]
                if value != (lookup(self.tree, key) or default):
                    _set(self.tree, owned.split("."), {})
                    for lost in [text for other, text in self.overrides.items() if f"{other}.".startswith(f"{owned}.")]:
                        self._note(
                            f"Override {lost!r} would be lost: {override!r} drops '{owned}'. Give it after that."
                        )
            blocking = _set(self.tree, key.split("."), value)
            if blocking is not None:
                self._note(f"Override {override!r}: '{blocking}' holds a value, not keys.")
            self.overrides[key] = override
            if isinstance(value, Mapping):
                self._rename()
        return self

    def parse(self, kind: type[T], also: Sequence[Callable[[T], object]] = ()) -> T:
        """Build the dataclass `kind`; see the function `parse`."""
        parser = _Parser(self.problems)
        value = typing.cast(T, parser.section(kind, self.tree, self.prefix))
        for check in also:
            parser.run(check, value, GeoPretrainError)
        if len(parser.problems) == 1 and parser.causes and not isinstance(parser.causes[0], Mistakes):
            raise parser.causes[0]
        if parser.problems:
            raise all_mistakes(self.where, parser.problems, self.overrides)
        return value

    def _note(self, text: str, *keys: str) -> None:
        self.problems.append(Problem(keys, text))

    def _rename(self) -> None:
        """Rename old keys; where a key has both names, the value under its present name stays."""
        self.tree = copied(self.tree)
        for renamed in self.renames:
            if not (renamed.old.startswith(self.prefix) and renamed.new.startswith(self.prefix)):
                continue
            old, new = (key.removeprefix(self.prefix).split(".") for key in (renamed.old, renamed.new))
            value = _get(self.tree, old)
            if value is _BAD:
                continue
            del _get(self.tree, old[:-1])[old[-1]]
            if _get(self.tree, new) is not _BAD:
                text = f"'{renamed.new}' is given twice, also by its former name '{renamed.old}'."
                self._note(text, renamed.new, renamed.old)
            else:
                _set(self.tree, new, _translated(renamed, value))


def merge_tree(tree: dict[str, Any], overlay: Mapping[str, Any]) -> None:
    """Merge `overlay` into `tree` in place, section by section; a value None removes the key."""
    for key, value in overlay.items():
        if isinstance(value, Mapping):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            merge_tree(tree[key], value)
        elif value is None:
            tree.pop(key, None)
        else:
            tree[key] = value


def changes(
    before: str, now: str, kind: type, *, renames: Sequence[Renamed] = (), ignore: Iterable[str] = ()
) -> list[str]:
    """List the differences of two YAML texts of the dataclass `kind` as "key.key: old -> new".

    Keys in `ignore` do not count. A key that a text lacks, such as one that is newer than it, has its default there.
    Raises `RecipeError` for a text that is no YAML of keys and values.
    """
    old, new = (Draft(_stored(text), "recipe", renames).tree for text in (before, now))
    return _differences(kind, old, new, set(ignore))


def _stored(text: str) -> Any:
    """The tree of a stored recipe."""
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the stored recipe is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"the stored recipe: expected keys and values, got {_shown(tree)}.")
    return tree


def _differences(
    kind: type | None, old: Mapping[str, Any], new: Mapping[str, Any], ignored: set[str], prefix: str = ""
) -> list[str]:
    """`changes` of nested mappings; `kind` is None where they are not those of a dataclass."""
    hints = {} if kind is None else type_hints(kind)
    defaults = {} if kind is None else _defaults(kind)
    found = []
    for name in {**new, **old}:
        key = prefix + str(name)
        one, two = (tree.get(name, defaults.get(name, "(none)")) for tree in (old, new))
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += _differences(_section_of(hints.get(name)), one, two, ignored, f"{key}.")
        elif one != two and key not in ignored:
            found.append(f"{key}: {one} -> {two}")
    return found


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
    """Build the dataclass `kind`, whose fields may be dataclasses too, from nested mappings.

    `where` is the file and `prefix` the path of `tree` in it, such as "task.", for messages; `renames` are old keys
    that are accepted; `also` are further checks of the result, functions that raise errors of this package.

    Raises `RecipeError` that names every unknown key, wrong type, missing key and value out of range; a function in
    `also` that found the only mistake raises its own error.
    """
    return Draft(tree, where, renames, prefix).parse(kind, also)


class _Parser:
    """Parses sections and collects mistakes; something stands in for a wrong value, so that parsing goes on."""

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        self.problems = list(problems)
        self.doubtful: set[str] = set()  # keys whose value was replaced, so that later checks of it mean nothing
        self.causes: list[GeoPretrainError] = []  # errors that functions in `also` raised
        self.root: type | None = None  # what the whole file is

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
        """Build an instance of the dataclass `kind`, with stand-ins where there are mistakes."""
        if not isinstance(tree, Mapping):
            name = prefix.rstrip(".")
            self.note(f"{name or 'the file'} is {_shown(tree)}, expected keys and values.", *([name] if name else []))
            if not name:
                return _filled(kind, {})
            tree = {}
        self.root = kind if self.root is None and not prefix else self.root
        hints = type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind) if f.metadata != OTHER_KEYS}
        others = [f.name for f in dataclasses.fields(kind) if f.metadata == OTHER_KEYS]
        unknown = {key: value for key, value in tree.items() if key not in fields}
        for key in unknown if not others else ():
            self._note_unknown(str(key), list(fields), prefix, unknown[key])
        values: dict[str, Any] = dict.fromkeys(others, unknown)
        for name, f in fields.items():
            if name in tree:
                values[name] = self.value(hints[name], tree[name], prefix + name)
            elif _is_required(f) and prefix + name not in self.doubtful:
                self.note(f"key '{prefix}{name}' is missing.", prefix + name)
        built = _filled(kind, values)
        if hasattr(kind, "__post_init__"):
            self.run(kind.__post_init__, built)
        return built

    def value(self, hint: Any, value: object, key: str) -> Any:
        """Convert a value to its type hint; returns `_BAD` for a mistake."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in args:
                return None
            kinds = [kind for kind in args if kind is not type(None)]
            fits = [kind for kind in kinds if isinstance(kind, type) and isinstance(value, kind)]
            if isinstance(value, list | tuple):
                fits += [kind for kind in kinds if typing.get_origin(kind) is tuple]
            return self.value((fits or kinds)[0], value, key)
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
        if args[1:] == (Ellipsis,):  # as many values as are given
            if not isinstance(value, list | tuple):
                return self._refuse(key, value, "a list")
            args = args[:1] * len(value)
        if args == (int, int) and isinstance(value, str) and (size := SIZE.fullmatch(value.strip())):
            value = [int(part) for part in size.groups()]  # as --size has it
        if not isinstance(value, list | tuple) or len(value) != len(args):
            such = (
                ", such as [96, 128] or 96x128" if args == (int, int) else ", such as [0, 1]" if len(args) == 2 else ""
            )
            return self._refuse(key, value, f"a list of {len(args)} values{such}")
        items = [self.value(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))]
        if _BAD in items:
            self.doubtful.add(key)
            return _BAD
        return tuple(items)

    def _scalar(self, hint: type, value: object, key: str) -> Any:
        if hint is float and isinstance(value, str | int | float) and not isinstance(value, bool):
            try:
                number = float(value)  # YAML 1.1 reads 1e-3 as a string
            except (ValueError, OverflowError):
                return self._refuse(key, value, "a number")
            return number if math.isfinite(number) else self._refuse(key, value, "a finite number")
        if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
            return value
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        return self._refuse(key, value, names.get(hint, hint.__name__))

    def _refuse(self, key: str, value: object, accepted: str, hint: str = "") -> object:
        self.note(f"'{key}' is {_shown(value)}, accepted is {accepted}.{hint}", key)
        return _BAD

    def _note_unknown(self, key: str, accepted: Sequence[str], prefix: str, value: object) -> None:
        leaf = key
        while isinstance(value, Mapping) and value:
            leaf, value = next(iter(value.items()))
        elsewhere = [] if self.root is None else _places(self.root, str(leaf))
        closest = ", ".join(repr(prefix + name) for name in nearest(key, accepted, 1))
        known = f"Closest: {closest}. Accepted: {', '.join(accepted)}" if accepted else "There are none here"
        same = f" Of that name there is {', '.join(map(repr, elsewhere))}." if elsewhere else ""
        self.note(f"unknown key '{prefix}{key}'. {known}.{same}", prefix + key)
        # The key that was probably meant must not be reported as missing or out of range.
        self.doubtful.update(prefix + name for name in difflib.get_close_matches(key, accepted, 1))


def _places(kind: type, leaf: str, prefix: str = "", deep: int = 3) -> list[str]:
    """The keys of a schema, up to `deep` sections down, whose last part is `leaf`."""
    found = []
    for name, hint in type_hints(kind).items():
        sections = [
            one for one in (hint, *typing.get_args(hint)) if isinstance(one, type) and dataclasses.is_dataclass(one)
        ]
        if name == leaf and not sections:
            found.append(prefix + name)
        for section in sections if deep else ():
            found += _places(section, leaf, f"{prefix}{name}.", deep - 1)
    return found


def _filled(kind: type, values: Mapping[str, Any]) -> object:
    """An instance of a dataclass before its `__post_init__`.

    For a value that is missing or `_BAD` stands the default or, without one, any value of the right type.
    """
    hints = type_hints(kind)
    made: object = object.__new__(kind)
    for f in dataclasses.fields(kind):
        value = values.get(f.name, _BAD)
        object.__setattr__(made, f.name, _stand_in(f, hints[f.name]) if value is _BAD else value)
    return made


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is f.default_factory is dataclasses.MISSING


def _stand_in(f: dataclasses.Field[Any], hint: Any) -> Any:
    """The default of a field, or any value of its type."""
    if f.default is not dataclasses.MISSING:
        return f.default
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    if dataclasses.is_dataclass(hint):
        return _filled(typing.cast(type, hint), {})
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Literal else (typing.get_origin(hint) or hint)()


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _defaults(kind: type) -> dict[str, Any]:
    """The fields of a dataclass that have defaults, in plain types; a section without a default has its fields'."""
    hints = type_hints(kind)
    return {
        f.name: plain_types(_stand_in(f, hints[f.name]))
        for f in dataclasses.fields(kind)
        if not _is_required(f) or dataclasses.is_dataclass(hints[f.name])
    }


def _section_of(hint: Any) -> type | None:
    """The dataclass in a type hint such as `Spec` or `Spec | None`; None if there is none."""
    parts = (hint, *typing.get_args(hint))
    return next((part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def _translated(renamed: Renamed, value: object) -> object:
    try:
        return renamed.values.get(value, value)
    except TypeError:  # a list or a mapping, which is no former value
        return value


def lookup(tree: Any, key: str) -> Any:
    """The value of "key.key" in nested mappings; None if there is none."""
    value = _get(tree, key.split("."))
    return None if value is _BAD else value


def _get(tree: Any, path: Sequence[str]) -> Any:
    """The value at a path of keys; `_BAD` if there is none."""
    value = tree
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return _BAD
        value = value[key]
    return value


def _set(tree: dict[str, Any], path: Sequence[str], value: object) -> str | None:
    """Set the value at a path of keys; returns the key in the way if it holds a value instead of keys, else None."""
    *parents, last = path
    branch = tree
    for parent in parents:
        if branch.get(parent) is None:  # also a section that is null
            branch[parent] = {}
        branch = branch[parent]
        if not isinstance(branch, dict):
            return parent
    branch[last] = value
    return None
