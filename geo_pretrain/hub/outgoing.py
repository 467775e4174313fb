"""The texts of a checkpoint as they leave this machine: without its folders, without logins and keys.

A run's own folder keeps the paths, since evaluations find their data by them; what is published or bundled has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from geo_pretrain.checkpoint import CONFIG, Checkpoint
from geo_pretrain.errors import CheckpointError
from geo_pretrain.files import SEAL, parse_json, tree_digest
from geo_pretrain.redact import without_paths

CLEANED = ("provenance", "licence")  # of config.json; its other values say what the network is


def outgoing(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files that change when a checkpoint leaves, with their new bytes; config.json among them if there are any.

    Recipe, log, card and the facts in config.json lose absolute paths, logins and keys (`redact.without_paths`);
    weights are never touched, and a clean folder gives nothing. Raises `CheckpointError` for a recipe that is no YAML.
    """
    config = parse_json((checkpoint.folder / CONFIG).read_bytes())
    facts = {key: config[key] for key in CLEANED if key in config}
    paths = {checkpoint.files[name].role: checkpoint.folder / name for name in checkpoint.files}
    recipe = _recipe(paths.get("recipe"))
    local = _changes([facts, recipe])
    texts = {}
    for role in ("recipe", "log", "card"):
        path = paths.get(role)
        if path is None or not path.is_file():
            continue  # a cache may lack it
        before = path.read_bytes()
        if role == "recipe":
            after = _yaml(recipe) if _changes(recipe) else before
        else:
            after = _replaced(_clean_lines(before) if role == "log" else before, local)
        if after != before:
            texts[path.name] = after
    cleaned = {key: without_paths(value) for key, value in facts.items()}
    if cleaned == facts and not texts:
        return {}
    from xxhash import xxh3_128

    for name, text in texts.items():
        entry = config["files"][name]
        entry |= {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        if "xxh3" in entry:
            entry["xxh3"] = xxh3_128(text).hexdigest()
    config |= cleaned
    if SEAL in config:
        del config[SEAL]
        config[SEAL] = tree_digest(config)
    return texts | {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _recipe(path: Path | None) -> Any:
    if path is None or not path.is_file():
        return None
    import yaml

    from geo_pretrain.yaml_text import read_yaml

    try:
        return read_yaml(path)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: is not YAML, so its paths cannot be left out; a recipe is accepted.") from error


def _yaml(recipe: Any) -> bytes:
    import yaml

    text: str = yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True)
    return text.encode()


def _changes(value: Any) -> dict[str, str]:
    """The texts in parsed JSON or YAML that must not leave -> what stands there instead."""
    return {text: clean for text in _texts(value) if (clean := without_paths(text)) != text}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _replaced(text: bytes, changes: Mapping[str, str]) -> bytes:
    """The text, such as a card, without what recipe and config.json had to lose; the longest first."""
    for old in sorted(changes, key=len, reverse=True):
        text = text.replace(old.encode(), changes[old].encode())
    return text


def _clean_lines(text: bytes) -> bytes:
    """The JSON lines of a log, changed only where they hold a path."""
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            record = parse_json(line)
        except ValueError:
            lines.append(line)
            continue
        lines.append(json.dumps(without_paths(record)).encode() + b"\n" if _changes(record) else line)
    return b"".join(lines)
