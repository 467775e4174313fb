"""Key surgery that every family of checkpoints needs, and the report of how the keys of a file met a network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from geo_pretrain.errors import WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")  # tensors, or anything else that hangs on a key
SHOWN_KEYS = 3


@dataclass(frozen=True)
class KeyReport:
    """What happened to the keys of a network and of a file."""

    matched: tuple[str, ...]  # of the network: in the file with the same shape
    missing: tuple[str, ...]  # of the network's head: not in the file, or with another shape there
    unexpected: tuple[str, ...]  # of the file: not used


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
            f"{name!r}: {body - len(missing)} of {body} tensors outside the head match this network; all are needed."
            + _listed("Missing", missing, network)
            + _listed("In the file instead", unexpected, state)
        )
    return report


def _listed(title: str, keys: list[str], tensors: Mapping[str, Tensor]) -> str:
    if not keys:
        return ""
    shown = ", ".join(f"{key} {list(tensors[key].shape)}" for key in keys[:SHOWN_KEYS])
    return f" {title} ({len(keys)}): {shown}{', ...' if len(keys) > SHOWN_KEYS else ''}."
