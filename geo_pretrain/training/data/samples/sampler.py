"""Training samples: a pair of augmented images with depth and cameras, drawn by (seed, epoch, index) alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as tvf

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Frame, Source
from geo_pretrain.training.data.mining import Pair, resize_frame
from geo_pretrain.training.recipe import AugmentSpec, DataSpec

ATTEMPTS = 16  # samples tried in place of one whose files broke after the pairs were mined

Key = tuple[int, int]  # (epoch, position in the list of pairs)


class PairSamples(Dataset[dict[str, Any]]):
    """The samples of a run. Indexed by (epoch, pair), so that workers, processes and resuming change nothing."""

    def __init__(self, source: Source, pairs: list[Pair], spec: DataSpec, contract: ImageContract, seed: int) -> None:
        self.source, self.pairs, self.spec, self.seed = source, pairs, spec, seed
        self.mean = torch.tensor(contract.mean).view(3, 1, 1)
        self.std = torch.tensor(contract.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One sample, by (epoch, pair).

        image1, image2 [3, H, W] normalized; depth1, depth2 [H, W] m; intrinsics1, 2 [3, 3]; cam_to_world1, 2 [4, 4];
        seed: an integer for draws made later, on the device; skipped: (path, reason) of files that failed on the way.
        """
        frames, skipped, generator = load_pair(self.source, self.pairs, self.spec.size, self.seed, key)
        sample: dict[str, Any] = {"skipped": skipped}
        for number, frame in enumerate(frames, start=1):
            sample |= {f"{name}{number}": value for name, value in self._tensors(frame, generator).items()}
        sample["seed"] = int(torch.randint(2**62, (), generator=generator))
        return sample

    def _tensors(self, frame: Frame, generator: torch.Generator) -> dict[str, Tensor]:
        image = augment(frame.color, self.spec.augment, generator)
        return {
            "image": (image - self.mean) / self.std,
            "depth": torch.from_numpy(np.ascontiguousarray(frame.depth)),
            "intrinsics": torch.from_numpy(frame.intrinsics).float(),
            "cam_to_world": torch.from_numpy(frame.cam_to_world),
        }


def load_pair(
    source: Source, pairs: list[Pair], size: tuple[int, int], seed: int, key: Key
) -> tuple[list[Frame], list[tuple[str, str]], torch.Generator]:
    """The two frames of a pair at `size`, (path, reason) of the files that failed, and the sample's own generator.

    A pair that cannot be read is replaced by one drawn from the sample's generator. Raises `DataError` after
    `ATTEMPTS` pairs in a row.
    """
    return load_numbered(source, pairs, size, seed, key)[1:]


def load_numbered(
    source: Source, pairs: list[Pair], size: tuple[int, int], seed: int, key: Key
) -> tuple[int, list[Frame], list[tuple[str, str]], torch.Generator]:
    """`load_pair`, with the position of the pair that was in the end loaded in front."""
    epoch, index = key
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, index))
    skipped: list[tuple[str, str]] = []
    for _ in range(ATTEMPTS):
        pair = pairs[index]
        try:
            first = _load(source, pair.scene, pair.frame1, size)
            alone = pair.frame2 == pair.frame1  # `DataSpec.units` "frames": read once
            second = first if alone else _load(source, pair.scene, pair.frame2, size)
            return index, [first, second], skipped, generator
        except BadFrame as bad:
            skipped.append((bad.path, bad.reason))
            index = int(torch.randint(len(pairs), (), generator=generator))
    listed = "; ".join(f"{path}: {reason}" for path, reason in skipped[:3])
    raise DataError(f"{ATTEMPTS} pairs in a row cannot be read; the data seem to be gone. First: {listed}")


def _load(source: Source, scene: str, frame_id: str, size: tuple[int, int]) -> Frame:
    frame = resize_frame(source.load(scene, frame_id), size)
    if not frame.depth.any():
        raise BadFrame(f"{scene}/{frame_id}", f"no pixel has a valid depth at {size[0]}x{size[1]}")
    return frame


class MicroBatches(Sampler[list[Key]]):
    """The keys of every micro-batch of one process from step `start` on: a pure function of its arguments.

    Samples form an endless stream of epochs, each a permutation of the pairs by (seed, epoch). A step takes the next
    `batch` of them; process `rank` of `world` works on every world-th one, dealt into
    `accumulate` parts in the same way, so that n parts see what n processes would.
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
            mine = [self._key(step * self.batch + k) for k in range(self.rank, self.batch, self.world)]
            for part in range(self.accumulate):
                yield mine[part :: self.accumulate]

    def _key(self, position: int) -> Key:
        epoch, index = divmod(position, self.pairs)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, -1))
            self._epoch, self._order = epoch, torch.randperm(self.pairs, generator=generator)
        return epoch, int(self._order[index])


def augment(color: np.ndarray, spec: AugmentSpec, generator: torch.Generator) -> Tensor:
    """Jitter, gray and blur of a uint8 [H, W, 3] image, as Pri3D draws them: float [3, H, W] in [0, 1]."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    image = Image.fromarray(color)
    brightness, contrast, saturation, hue = spec.jitter
    if uniform(0, 1) < spec.jitter_prob:
        operations = [
            (tvf.adjust_brightness, uniform(max(0, 1 - brightness), 1 + brightness)),
            (tvf.adjust_contrast, uniform(max(0, 1 - contrast), 1 + contrast)),
            (tvf.adjust_saturation, uniform(max(0, 1 - saturation), 1 + saturation)),
            (tvf.adjust_hue, uniform(-hue, hue)),
        ]
        for k in torch.randperm(4, generator=generator).tolist():
            operation, value = operations[k]
            image = operation(image, value)
    if uniform(0, 1) < spec.grayscale_prob:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    if uniform(0, 1) < spec.blur_prob:
        image = image.filter(ImageFilter.GaussianBlur(uniform(*spec.blur_radius)))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors; keep seeds and skipped files as lists."""
    batch: dict[str, Any] = {
        name: torch.stack([sample[name] for sample in samples])
        for name, value in samples[0].items()
        if isinstance(value, Tensor)
    }
    batch["seed"] = [sample["seed"] for sample in samples]
    batch["skipped"] = [item for sample in samples for item in sample["skipped"]]
    return batch


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A well-mixed 63-bit seed from three integers (splitmix64 steps): neighbors share no structure."""
    state = seed & (2**64 - 1)
    for value in (epoch, index):
        state = (state + 0x9E3779B97F4A7C15 * (value + 2)) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def total_steps(pairs: int, batch: int, epochs: float | None, steps: int | None) -> int:
    """Optimizer steps of a run: given, or enough to see every pair `epochs` times."""
    if steps is not None:
        return steps
    return max(1, math.ceil((epochs or 0) * pairs / batch))
