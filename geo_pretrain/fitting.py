"""Fit the tensors of a file to a network, by name and shape, and report the result of every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geo_pretrain.errors import some

SHOWN_KEYS = 8


@dataclass(frozen=True)
class LoadReport:
    """The load result of every tensor of the network and of the files."""

    loaded: int  # tensors of the network that came from the files
    fresh: tuple[str, ...]  # of the network, newly initialized
    dropped: tuple[str, ...]  # of the files, not used
    reshaped: tuple[str, ...]  # loaded after a change of shape that was asked for
    coverage: float  # loaded / all tensors of the network

    def __str__(self) -> str:
        total = self.loaded + len(self.fresh)
        parts = [f"{self.loaded} of {total} tensors loaded ({self.coverage:.0%})"]
        parts += [
            f"{what}: {shown_keys(keys)}"
            for what, keys in (("fresh", self.fresh), ("dropped", self.dropped), ("reshaped", self.reshaped))
            if keys
        ]
        return "; ".join(parts)


def adapt_stem(weight: Tensor, in_chans: int) -> Tensor:
    """A first convolution, [C, n, k, k] or sparse [K, n, C], for `in_chans` input channels instead of n.

    Fewer channels: each keeps its weights plus an equal share of the dropped ones, so input that is equal in all
    channels gives the same response as before (one channel: the sum over RGB). More: the new ones start from the mean
    of the old ones.
    """
    have = weight.shape[1]
    if in_chans == have:
        return weight
    if in_chans < have:
        return weight[:, :in_chans] + weight[:, in_chans:].sum(dim=1, keepdim=True) / in_chans
    mean = weight.mean(dim=1, keepdim=True)
    return torch.cat([weight, mean.repeat_interleave(in_chans - have, dim=1)], dim=1)


def match(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Tensors of `given` that fit `expected` by name and shape; names left over of `expected`; those of `given`."""
    fits = {key: value for key, value in given.items() if key in expected and expected[key].shape == value.shape}
    return fits, tuple(k for k in expected if k not in fits), tuple(k for k in given if k not in fits)


def fitting_prefix(expected: Iterable[str], given: Iterable[str]) -> tuple[str, int]:
    """The prefix, ending in a dot, that most keys of `given` have before a key of `expected`, and how many have it.

    ("", 0) when there is none.
    """
    wanted = set(expected)
    counts: Counter[str] = Counter()
    for key in given:
        parts = key.split(".")
        counts.update(".".join(parts[:cut]) + "." for cut in range(1, len(parts)) if ".".join(parts[cut:]) in wanted)
    return counts.most_common(1)[0] if counts else ("", 0)


def prefix_hint(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """For an error message: the prefix under which the file would fit, or what the keys on both sides look like."""
    prefix, count = fitting_prefix(expected, given)
    if not count:
        theirs, ours = shown_keys(tuple(given)[:3]), shown_keys(tuple(expected)[:3])
        return f" The file's keys look like {theirs}, the network's like {ours}."
    return (
        f" The file has prefix {prefix!r}: without it {count} of {len(expected)} would match. Files in another "
        "library's format are turned into a checkpoint folder by geo_pretrain.convert."
    )


def shown_keys(keys: Sequence[str]) -> str:
    """The first keys for a message, quoted."""
    return some(map(repr, keys), SHOWN_KEYS)
