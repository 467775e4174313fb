"""YAML of users' files: plain values, and no more work than the text is long; the reader of JSON is `files.parse_json`.

Aliases let a few lines state a tree of any size, which is met when the tree is copied, searched or shown.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LONGEST = 512 * 1024  # bytes; a recipe that lists all scenes of ScanNet has 20,000
SHORT = 16 * 1024  # bytes of texts whose trees are kept: a run reads its recipe several times
PLACEHOLDER = re.compile(r"\{[A-Za-z]\w*\}")  # as in names of files; YAML reads a mapping without values
EXPANDED = 4 * LONGEST  # characters, with every alias written out


def read_yaml(path: Path) -> Any:
    """Read a file by `parse_yaml`. Raises `yaml.YAMLError` and OSError; nothing beyond `LONGEST` is read."""
    with path.open("rb") as file:
        return parse_yaml(file.read(LONGEST + 1))


def parse_yaml(text: str | bytes) -> Any:
    """Parse one YAML document to plain values; two aliases of a mapping become two mappings.

    Raises `yaml.YAMLError`, also for a key that is given twice, and for what is too long, nested too deeply, contains
    itself or becomes too large by its aliases.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"it is longer than {LONGEST} characters")
    try:
        return copied(_parsed(text) if len(text) > SHORT else copy.deepcopy(_kept(text)))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or a value contains itself") from None
    except (ValueError, AttributeError) as error:  # of values that look like a date or have a wrong tag
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def parse_setting(text: str) -> Any:
    """Parse the value of a KEY=VALUE by `parse_yaml`; a text with a placeholder, such as {split}annot, is a text.

    >>> parse_setting("{split}annot"), parse_setting("{split}"), parse_setting("{scenes: 2}")
    ('{split}annot', '{split}', {'scenes': 2})
    """
    placeholder = PLACEHOLDER.search(text) is not None
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        if placeholder:
            return text.strip()
        raise
    empty = isinstance(value, Mapping) and all(each is None for each in value.values())
    return text.strip() if placeholder and empty else value


def quoted(text: str) -> str:
    """A text as YAML, whatever characters it has: JSON, but for those that JSON writes as two.

    >>> print(quoted('a: "b"'))
    "a: \\"b\\""
    """
    pairs = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")
    return pairs.sub(lambda m: f"\\U{ord(bytes.fromhex(m[1] + m[2]).decode('utf-16-be')):08x}", json.dumps(text))


def _parsed(text: str | bytes) -> Any:
    """Parse one document; an alias is the same mapping again."""
    loader = _Loader(text.decode("utf-8") if isinstance(text, bytes) else text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _expanded(root, {}) > EXPANDED:
            raise yaml.YAMLError(f"with its aliases written out it is longer than {EXPANDED} characters")
        return loader.construct_document(root)
    finally:
        loader.dispose()


_kept = functools.lru_cache(maxsize=64)(_parsed)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                line = first[key.value].start_mark.line + 1
                problem = f"key {key.value!r} is given twice, first in line {line}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters and values of a node with all its aliases written out; nodes that contain themselves never end."""
    if id(node) not in known:
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = 1 + len(node.value)
        else:
            pairs = isinstance(node, yaml.MappingNode)
            below = [child for pair in node.value for child in pair] if pairs else node.value
            known[id(node)] = 1 + sum(_expanded(child, known) for child in below)
    return known[id(node)]


def copied(tree: Any) -> Any:
    """Copy nested mappings; lists are values."""
    return {key: copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree
