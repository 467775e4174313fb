"""Which samples a step uses, and the seed of each: pure functions of (seed, epoch, position)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, BadLabels, DataError, some
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.augment import Normalize
from geo_pretrain.training.recipe import DataSpec

ATTEMPTS = 16  # replacements tried for a sample whose files broke after the pairs were mined

Key = tuple[int, int]  # (epoch, position in the list of pairs)
Skipped = list[tuple[str, str]]  # (path, reason) of files that could not be read
T = TypeVar("T")


@dataclass(eq=False, repr=False)
class Samples(Dataset[dict[str, Any]], ABC):
    """The samples of a run, one a pair or as many as are drawn; each a pure function of its key.

    Keys are (epoch, position): samples do not depend on workers, processes and resuming.

    Every sample has the fields that its class names, "seed", an integer for draws made later on the device, and
    "skipped", (path, reason) of the files that could not be read and were replaced.
    """

    # Names of a sample's fields int32 [n, 3] of varying length; a batch has [N, 4], rows (sample, x, y, z).
    coords: ClassVar[tuple[str, ...]] = ()
    ragged: ClassVar[tuple[str, ...]] = ()  # other fields [n, ...] of varying length; a batch has [N, ...]

    source: Source
    pairs: Sequence[Pair]
    spec: DataSpec
    seed: int

    def __len__(self) -> int:
        draws = self.spec.draws_per_scene
        return len(self.pairs) if draws is None else draws * len(self.rows_by_scene)

    @cached_property
    def rows_by_scene(self) -> list[list[int]]:
        """Positions of the pairs of each scene."""
        rows: dict[str, list[int]] = {}
        for row, pair in enumerate(self.pairs):
            rows.setdefault(pair.scene, []).append(row)
        return list(rows.values())

    def __getitem__(self, key: Key) -> dict[str, Any]:
        generator = sample_generator(self.seed, key)
        skipped: Skipped = []
        sample = self._draw(key, generator, skipped)
        on_device = int(torch.randint(2**62, (), generator=generator))
        return sample | {"seed": on_device, "skipped": skipped}

    @abstractmethod
    def _draw(self, key: Key, generator: torch.Generator, skipped: Skipped) -> dict[str, Any]:
        """Load the sample at a position; draws come from `generator`, files that cannot be read go to `skipped`."""

    @classmethod
    def collate(cls, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples to a batch: tensors stacked, or joined where their lengths vary; seeds and skipped as lists."""
        batch: dict[str, Any] = {}
        for name, value in samples[0].items():
            parts = [sample[name] for sample in samples]
            if name in cls.coords:
                batch[name] = torch.cat([F.pad(part, (1, 0), value=number) for number, part in enumerate(parts)])
            elif isinstance(value, Tensor):
                batch[name] = torch.cat(parts) if name in cls.ragged else torch.stack(parts)
        batch["seed"] = [sample["seed"] for sample in samples]
        batch["skipped"] = [item for sample in samples for item in sample["skipped"]]
        return batch

    def own_data(self) -> dict[str, Any]:
        """Describe training data besides the source's frames, for a checkpoint's provenance; {} if there is none."""
        return {}


@dataclass(eq=False, repr=False)
class ImageSamples(Samples):
    """Samples with images, normalized as `contract` says."""

    contract: ImageContract

    def __post_init__(self) -> None:
        self.normalize = Normalize(self.contract)


class MicroBatches(Sampler[list[Key]]):
    """The keys of every micro-batch of one process from step `start` on: a pure function of its arguments.

    Samples form an endless stream of epochs, each a permutation of the pairs by (seed, epoch). A step takes the next
    `batch` of them. Rank r takes samples r, r + world, ...; these are split the same way into `accumulate`
    micro-batches, so that n micro-batches see what n processes would.
    """

    def __init__(
        self, pairs: int, *, batch: int, accumulate: int, rank: int, world: int, start: int, steps: int, seed: int
    ) -> None:
        self.pairs, self.batch, self.accumulate = pairs, batch, accumulate
        self.rank, self.world, self.start, self.steps, self.seed = rank, world, start, steps, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.steps):
            keys = [self._key(step * self.batch + k) for k in range(self.rank, self.batch, self.world)]
            for part in range(self.accumulate):
                yield keys[part :: self.accumulate]

    def _key(self, position: int) -> Key:
        epoch, index = divmod(position, self.pairs)
        if epoch != self._epoch:
            generator = sample_generator(self.seed, (epoch, -1))
            self._epoch, self._order = epoch, torch.randperm(self.pairs, generator=generator)
        return epoch, int(self._order[index])


def total_steps(pairs: int, batch: int, epochs: float | None, steps: int | None) -> int:
    """Optimizer steps of a run: given, or enough to see every pair `epochs` times."""
    return max(1, math.ceil((epochs or 0) * pairs / batch)) if steps is None else steps


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Mix three integers into a 63-bit seed (splitmix64 steps): neighbors share no structure."""
    state = seed & (2**64 - 1)
    for value in (epoch, index):
        state = (state + 0x9E3779B97F4A7C15 * (value + 2)) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def sample_generator(seed: int, key: Key) -> torch.Generator:
    """The random generator that all draws of a sample come from."""
    return torch.Generator().manual_seed(sample_seed(seed, *key))


def read_or_replace(
    load: Callable[[int], T], count: int, index: int, generator: torch.Generator, skipped: Skipped, *, what: str
) -> tuple[int, T]:
    """Call `load(index)`; while that raises `BadFrame`, draw another of `count` indices. Returns the index and result.

    Failures are added to `skipped`. Raises `DataError` after `ATTEMPTS` failures in a row, naming `what` was read, and
    `BadLabels` at once: a list of classes that does not fit would silently leave out whatever has the class.
    """
    for _ in range(ATTEMPTS):
        try:
            return index, load(index)
        except BadLabels:
            raise
        except BadFrame as bad:
            skipped.append((bad.path, bad.reason))
            index = int(torch.randint(count, (), generator=generator))
    listed = some(dict.fromkeys(f"{path}: {reason}" for path, reason in skipped), 2)
    raise DataError(f"{ATTEMPTS} {what} in a row cannot be read, drawn from {count}. First: {listed}.")
