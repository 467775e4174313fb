"""Renaming and matching of state-dict keys, shared by all formats, and the report of what matched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from geo_pretrain.errors import WeightsMismatch, some

if TYPE_CHECKING:
    from torch import Tensor

State: TypeAlias = "Mapping[str, Tensor]"  # a flat state dict
Networks: TypeAlias = "Mapping[str, State]"  # role -> the state dict of that part of a network
T = TypeVar("T")  # the values of a dict: tensors or anything else
HEADS = "heads"  # the role of weights that were trained along but are no part of the network
COUNTER = ".num_batches_tracked"  # of a BatchNorm: old and foreign files have none, and nothing is computed from it


@dataclass(frozen=True)
class KeyReport:
    """How the keys of a file matched those of a network."""

    matched: tuple[str, ...]  # keys of the network that the file has with the same shape
    missing: tuple[str, ...]  # keys of the network's head that the file lacks or has with another shape
    unexpected: tuple[str, ...]  # keys of the file that are not used
    added: tuple[str, ...] = ()  # keys of the network that such files may lack, set to a fixed value
    prefix: str = ""  # in front of the keys of the file that were used; the others are unexpected

    def coverage(self, networks: Networks) -> str:
        """What was found of each part of the network, and what of the file was not used, in a line or two."""
        found = [*self.matched, *self.added]
        parts = []
        for role, network in networks.items():
            count = sum(key.startswith(f"{role}.") for key in found)
            if count:
                parts.append(f"{role}: {count} of {len(network)} tensors")
        lines = ["; ".join(parts) + (f" (prefix {self.prefix!r})" if self.prefix else "")]
        if self.added:
            lines.append(f"Not in the file, set to zero: {len(self.added)}, such as {self.added[0]!r}")
        if self.unexpected:
            lines.append(f"Not used: {len(self.unexpected)} keys of the file: {shown(self.unexpected)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Converted:
    """An authors' state dict split into the roles of a checkpoint folder."""

    weights: dict[str, dict[str, Tensor]]  # role -> state dict with our names; parts of the network are complete
    report: KeyReport  # keys of the network as "<role>.<key>", keys of the file as they are, less any `module.`


def without_data_parallel(state: Mapping[str, T]) -> Mapping[str, T]:
    """Strip the `module.` that data-parallel training puts in front of every key."""
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def match_keys(state: State, network: State, *, heads: tuple[str, ...], name: str) -> KeyReport:
    """Match names and shapes of `state` with the network's state dict (tensors on the meta device suffice).

    Keys that begin with one of `heads` may be missing, unexpected or of another shape. Raises `WeightsMismatch`, with
    `name` in the message, for any other key that is missing, unexpected or of another shape.
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


def assign(
    format: str,
    state: State,
    targets: Mapping[str, tuple[str, str]],
    networks: Networks,
    *,
    counters: bool = False,
) -> Converted:
    """Assign the tensors of a file to roles, and check each part of the network for completeness.

    `targets`: key of the file -> (role, our key); keys without a target, or with a role that `networks` lacks, are
    reported as unexpected. With `counters`, a part without any BatchNorm batch counter gets all of them, as zeros.
    Raises `WeightsMismatch` when a part that has a key in the file does not match the network in all names and shapes.
    """
    import torch

    weights: dict[str, dict[str, Tensor]] = {}
    matched: list[str] = []
    added: list[str] = []
    for key, (role, ours) in targets.items():
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
    unexpected = [key for key in state if key not in targets or targets[key][0] not in weights]
    from_file = [key for key in matched if key not in set(added)]
    return Converted(weights, KeyReport(tuple(from_file), (), tuple(unexpected), tuple(added)))


def shown(keys: Iterable[str]) -> str:
    """The first few keys, for an error message."""
    return some(map(repr, keys))


def _listed(title: str, keys: list[str], tensors: State) -> str:
    shapes = some(f"{key} {list(tensors[key].shape)}" for key in keys)
    return f" {title} ({len(keys)}): {shapes}." if keys else ""
