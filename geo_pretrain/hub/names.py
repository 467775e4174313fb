"""Names of the catalog: whatever bears one is compared with what the catalog says of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Protocol

from geo_pretrain.catalog import CATALOG, RENAMED, Arch, Entry
from geo_pretrain.checkpoint import Checkpoint, StoredFile
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import CheckpointError, DigestMismatch


class Described(Protocol):
    """A checkpoint, or what a source says of one."""

    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> Arch: ...
    @property
    def contract(self) -> ImageContract | VoxelContract: ...


def check_published_name(checkpoint: Checkpoint, cure: str = "") -> None:
    """Refuse a checkpoint whose name the catalog gives to another network, other input or other files.

    `cure` is what the reader can do instead of renaming it. Raises `CheckpointError`, and `DigestMismatch` for files.
    """
    entry = CATALOG.get(checkpoint.name)
    if entry is None:
        return
    where = str(checkpoint.folder)
    check_pins(entry, checkpoint.files, where, all_files=True)
    check_is_entry(entry, checkpoint, where, cure, encoder_alone=False)


def check_pins(entry: Entry, files: Mapping[str, StoredFile], where: str, *, all_files: bool = False) -> None:
    """Raise `DigestMismatch` when the catalog pins other files; `all_files`: also when one of them is missing."""
    for file in entry.files:
        have = files.get(file.name)
        if (have is None and all_files) or (have is not None and have.sha256 != file.sha256):
            raise DigestMismatch(
                f"{where}: {entry.name!r} is published with sha256 {file.sha256} for {file.name}, this one "
                f"{f'has {have.sha256}' if have else 'has no such file'}. A published name never changes meaning; give "
                "this checkpoint another name."
            )


def check_is_entry(entry: Entry, found: Described, where: str, cure: str = "", *, encoder_alone: bool = True) -> None:
    """Raise `CheckpointError` unless a checkpoint found under an entry's name bears it and has its network and input.

    Many entries have one network and input: there the name in config.json alone tells one method's weights from
    another's. `encoder_alone`: the encoder of its U-Net is accepted, which some sources hold without the decoder.
    """
    rest = f"A published name means one thing. Give it another name{f', or {cure}' if cure else ''}."
    if RENAMED.get(found.name, found.name) != entry.name:
        raise CheckpointError(
            f"{where}: {entry.name!r} is a name of the catalog; the checkpoint there calls itself {found.name!r}. "
            f"{rest}"
        )
    wanted = [entry.arch, *([entry.arch.encoder_alone] if encoder_alone and entry.arch.has_decoder else [])]
    for what, same, have, theirs in (
        ("network", any(same_network(found.arch, other) for other in wanted), found.arch, entry.arch),
        ("input", found.contract == entry.contract, found.contract, entry.contract),
    ):
        if not same:
            raise CheckpointError(
                f"{where}: {entry.name!r} is a name of the catalog, whose {what} is {theirs}; this one's is {have}. "
                f"{rest}"
            )


def same_network(one: Arch, other: Arch) -> bool:
    """Whether two architectures build the same network: one may leave out an argument that the other states."""
    if one.name != other.name:
        return False
    # as JSON: the catalog's tuples are lists in a config.json
    if json.dumps(one.args, sort_keys=True) == json.dumps(other.args, sort_keys=True):
        return True
    from geo_pretrain.backbones.build import network_states

    def shapes(arch: Arch) -> dict[str, dict[str, tuple[int, ...]]]:
        states = network_states(arch)
        return {role: {key: tuple(value.shape) for key, value in state.items()} for role, state in states.items()}

    def stated(arch: Arch) -> dict[str, str]:
        arguments = inspect.signature(arch.architecture.load_class()).bind(**arch.args)
        arguments.apply_defaults()
        return {key: json.dumps(value) for key, value in arguments.arguments.items() if value is not None}

    try:
        ours, theirs = stated(one), stated(other)
    except TypeError:  # arguments that the network does not take
        return False
    return all(theirs[key] == ours[key] for key in set(ours) & set(theirs)) and shapes(one) == shapes(other)
