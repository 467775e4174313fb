"""Key surgery that every family of checkpoints needs, and the report of how the keys of a file met a network's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from geo_pretrain.errors import WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")  # tensors, or anything else that hangs on a key
SHOWN_KEYS = 3
HEADS = "heads"  # the role of what is trained along and no part of the network
COUNTER = ".num_batches_tracked"  # of a norm: old and foreign files have none, and nothing is computed from it


@dataclass(frozen=True)
class KeyReport:
    """What happened to the keys of a network and of a file."""

    matched: tuple[str, ...]  # of the network: in the file with the same shape
    missing: tuple[str, ...]  # of the network's head: not in the file, or with another shape there
    unexpected: tuple[str, ...]  # of the file: not used
    added: tuple[str, ...] = ()  # of the network: such files need not have it, it was put in with a fixed value


@dataclass(frozen=True)
class Converted:
    """An authors' state dict taken apart into the roles of a checkpoint folder."""

    weights: dict[str, dict[str, Tensor]]  # role -> state dict with our names; parts of the network are whole
    report: KeyReport  # keys of the network as "<role>.<key>", of the file as they are there, less any `module.`


def without_data_parallel(state: Mapping[str, T]) -> Mapping[str, T]:
    """The same tensors without the `module.` that data-parallel training leaves in front of every key."""
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def match_keys(
    state: Mapping[str, Tensor], network: Mapping[str, Tensor], *, heads: tuple[str, ...], name: str
) -> KeyReport:
    """Compare names and shapes of `state` with the network's state dict (a network on the meta device will do).

    Keys that begin with one of `heads` may be missing, left over or of another shape. Raises `WeightsMismatch`, with
    `name` in the message, when any other key of either side has no partner of its shape on the other.
    """
    matched = {key: None for key, value in network.items() if key in state and state[key].shape == value.shape}
    report = KeyReport(
        matched=tuple(matched),
        missing=tuple(key for key in network if key not in matched),
        unexpected=tuple(key for key in state if key not in matched),
    )
    missing = [key for key in report.missing if not key.startswith(heads)]
    unexpected = [key for key in report.unexpected if not key.startswith(heads)]
    if missing or unexpected:
        body = sum(not key.startswith(heads) for key in network)
        raise WeightsMismatch(
            f"{name!r}: {body - len(missing)} of {body} tensors{' outside the head' if heads else ''} match this "
            "network; all are needed."
            + _listed("Missing", missing, network)
            + _listed("In the file instead", unexpected, state)
        )
    return report


def place(
    format: str,
    state: Mapping[str, Tensor],
    places: Mapping[str, tuple[str, str]],
    networks: Mapping[str, Mapping[str, Tensor]],
    *,
    counters: bool = False,
) -> Converted:
    """Put the tensors of a file where they belong, and compare each part of the network as a whole.

    `places`: key of the file -> (role, our key); a key without place, or of a part that is not in `networks`, is
    reported as unexpected. With `counters` a part without any norm's batch counter gets them all, as zeros. Raises
    `WeightsMismatch` when a part that has a key in the file is not there name by name and shape by shape.
    """
    import torch

    weights: dict[str, dict[str, Tensor]] = {}
    matched: list[str] = []
    added: list[str] = []
    for key, (role, ours) in places.items():
        if role == HEADS or role in networks:
            weights.setdefault(role, {})[ours] = state[key]
    for role, part in weights.items():
        if role == HEADS:
            continue
        network = networks[role]
        zeros = [key for key in network if key.endswith(COUNTER)]
        if counters and not any(key.endswith(COUNTER) for key in part):
            part |= {key: torch.zeros((), dtype=torch.int64) for key in zeros}
            added += [f"{role}.{key}" for key in zeros]
        match_keys(part, network, heads=(), name=f"{format}: {role}")
        matched += [f"{role}.{key}" for key in network]
        weights[role] = {key: part[key] for key in network}
    unexpected = [key for key in state if key not in places or places[key][0] not in weights]
    found = [key for key in matched if key not in set(added)]
    return Converted(weights, KeyReport(tuple(found), (), tuple(unexpected), tuple(added)))


def shown(keys: Iterable[str]) -> str:
    """The first few keys, for messages."""
    listing = list(keys)
    return ", ".join(map(repr, listing[:SHOWN_KEYS])) + (", ..." if len(listing) > SHOWN_KEYS else "") or "none"


def _listed(title: str, keys: list[str], tensors: Mapping[str, Tensor]) -> str:
    if not keys:
        return ""
    listing = ", ".join(f"{key} {list(tensors[key].shape)}" for key in keys[:SHOWN_KEYS])
    return f" {title} ({len(keys)}): {listing}{', ...' if len(keys) > SHOWN_KEYS else ''}."
