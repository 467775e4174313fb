"""Saved states of runs: one file each, with a digest of its bytes at its end, and the checks before one is used."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geo_pretrain.errors import CheckpointError, first_line

SEAL = b"\ngeo_pretrain state sha256 "  # then 64 hex digits and a line break: torch.load reads the file as ever
SEAL_SIZE = len(SEAL) + 64 + 1
ZIP_END = b"PK\x05\x06"  # begins the last record of a zip, which without a comment is 22 bytes long


class BadState(CheckpointError):
    """A saved state that cannot be used; the message says why."""


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state by `torch.save`, and behind it the sha256 of these bytes."""
    torch.save(state, path)
    with path.open("rb+") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.write(SEAL + digest.encode() + b"\n")  # the digest was read up to the end


def read_state(path: Path) -> dict[str, Any]:
    """Read a state whose digest is right, its tensors on the CPU. Raises `BadState` with the reason.

    States of older versions have no digest: their tensors are compared with the zip's own checksums, and a warning
    says so.
    """
    try:
        with path.open("rb") as stream:
            _check_seal(stream)
            stream.seek(0)
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except BadState:
        raise
    except Exception as error:  # torch's reader has many ways to fail on bytes that are no state
        raise BadState(f"cannot be read ({first_line(error)})") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise BadState("holds no state of a run")
    return state


def read_recipe(path: Path) -> str:
    """Read the recipe of the run that saved a state, without its tensors. Raises `BadState` where there is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        recipe = state.get("identity", state)["recipe"]  # older states have it themselves
    except Exception as error:
        raise BadState(f"cannot be read ({first_line(error)})") from None
    if not isinstance(recipe, str):
        raise BadState("holds no recipe")
    return recipe


def check_values(state: Mapping[str, Any]) -> None:
    """Raise `BadState` that names a weight, or a value of the optimizer, that is not finite."""
    for part in ("module", "optimizer"):
        if (name := not_finite(state.get(part, {}), part)) is not None:
            raise BadState(f"{name} is not finite: the run had diverged")


def not_finite(tree: Any, name: str = "") -> str | None:
    """The name of a tensor with NaN or infinity in nested dicts and lists; None: all are finite.

    One reduction for all of them, so that an accelerator is waited for once.
    """
    tensors = dict(_tensors(tree, name))
    if not tensors:
        return None
    finite = torch.stack([torch.isfinite(tensor).all().cpu() for tensor in tensors.values()])
    return None if finite.all() else list(tensors)[int((~finite).nonzero()[0])]


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` where a restored optimizer holds what its next step could not use.

    torch compares neither the shapes of momenta with their weights nor the types of a group's settings.
    """
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, str | bytes) and not isinstance(optimizer.defaults.get(key), str):
                raise ValueError(f"{key} of group {number} of the optimizer is the text {value!r}")
    for weight, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != weight.shape:
                what = f"{key} of the optimizer is shaped {list(value.shape)}"
                raise ValueError(f"{what}, its weight {list(weight.shape)}")


def log_facts(path: Path) -> dict[str, Any]:
    """Size and sha256 of a log, which the state that is saved with it keeps."""
    if not path.exists():
        return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def check_log(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise `BadState` unless the log begins with the bytes that it had when the state was saved."""
    if not isinstance(facts, Mapping) or type(facts.get("bytes")) is not int or facts["bytes"] < 0:
        raise BadState("does not say what its log was")
    size, digest = facts["bytes"], hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(min(1 << 20, size)):
                digest.update(block)
                size -= len(block)
    except FileNotFoundError:
        pass
    if size or digest.hexdigest() != facts.get("sha256"):
        what = "is missing" if not path.exists() else "was cut off" if size else "was altered"
        raise BadState(f"{path.name}, whose first {facts['bytes']} bytes belong to this state, {what}")


def _check_seal(stream: Any) -> None:
    """Compare an open file with the digest at its end."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - SEAL_SIZE))
    seal = stream.read()
    stream.seek(0)
    if seal.startswith(SEAL) and len(seal) == SEAL_SIZE:
        digest, left = hashlib.sha256(), size - SEAL_SIZE
        while block := stream.read(min(1 << 20, left)):
            digest.update(block)
            left -= len(block)
        if seal[len(SEAL) :] != digest.hexdigest().encode() + b"\n":
            raise BadState("was altered: its sha256 is not the one at its end")
        return
    if seal[-22:-18] != ZIP_END:  # with nothing behind it, so it is no damaged digest
        raise BadState("was cut off or altered: it does not end as a state does" if size else "is empty")
    with zipfile.ZipFile(stream) as records:
        if (damaged := records.testzip()) is not None:
            raise BadState(f"was altered: the checksum of {damaged} is wrong")
    warnings.warn("The saved state is of an older version, without a digest of its own.", stacklevel=4)


def _tensors(tree: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        return [(name, tree)] if tree.is_floating_point() else []
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, value in pairs for found in _tensors(value, f"{name}.{key}" if name else str(key))]
