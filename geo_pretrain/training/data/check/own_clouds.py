"""What a check of your own clouds tells besides labels: sizes, units, colors, intensities, files that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from geo_pretrain.errors import some
from geo_pretrain.inputs import MAX_EXTENT
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.sparse.spacing import spacing_doubt
from geo_pretrain.training.data.check.report import Finding, Level
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.unread import conversion, left_alone

VOXEL = 0.05  # m; that of the recipes for one's own clouds
DARK = 1  # of 255: the brightest color of a cloud whose colors were whole numbers from 0 to 1
DIM = 0.02  # the strongest intensity of all clouds, below which they were probably divided by too much


@dataclass
class SeenClouds:
    """The clouds of a split, noted one after the other."""

    points: list[int] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)  # m, the longest side
    doubts: dict[str, str] = field(default_factory=dict)  # id -> why it seems not to be in meters
    brightest: dict[str, int | None] = field(default_factory=dict)  # id -> of 255; None: it has no colors
    strongest: dict[str, float | None] = field(default_factory=dict)  # id -> intensity up to 1; None: it has none

    def note(self, cloud: LabelledCloud) -> None:
        """Look at a cloud."""
        points = torch.from_numpy(cloud.points)
        coords = voxelize(points, torch.ones(len(points), 1), VOXEL).coords
        self.points.append(len(points))
        self.widths.append(float(np.ptp(cloud.points, axis=0).max()))
        doubt = spacing_doubt(coords, len(points), VOXEL, "--set data.options.scale={}")
        if doubt is None and self.widths[-1] > MAX_EXTENT:  # no network takes it
            doubt = f"it spans {self.widths[-1]:.4g} m; accepted: meters, up to {MAX_EXTENT:g}. Another unit, or tiles?"
        if doubt is not None:
            self.doubts[cloud.id] = doubt
        self.brightest[cloud.id] = None if cloud.colors is None else int(cloud.colors.max(initial=0))
        self.strongest[cloud.id] = None if cloud.intensity is None else float(cloud.intensity.max(initial=0))

    def __str__(self) -> str:
        return f"clouds of {_range(self.points, '')} points, {_range(self.widths, ' m')} wide"

    def findings(self, split: str, folder: Path, options: Mapping[str, object]) -> list[Finding]:
        """All that was seen; `folder`: of the split, where files that are not read may lie."""
        if not self.points:
            return _unread(split, folder)
        seen = [*self._units(split, options), self._colors(split), *self._intensities(split)]
        return [*seen, *_unread(split, folder)]

    def _units(self, split: str, options: Mapping[str, object]) -> list[Finding]:
        """Whether clouds seem to be in meters: all, none, or some, whose unit then is another than that of the rest."""
        if not self.doubts:
            return []
        first, text = next(iter(self.doubts.items()))
        every = len(self.doubts) == len(self.points)
        if every:
            surely = "scale" not in options  # then `finetune` refuses them
            text = f"{len(self.doubts)} of {len(self.points)} clouds: {text}"
            return [Finding(f"{split} units", Level.WRONG if surely else Level.DOUBTFUL, text)]
        text = (
            f"{len(self.doubts)} of {len(self.points)} clouds have another unit than the rest, or other spacing: "
            f"{some(self.doubts, 5)}. {first}: {text.replace('--set data.options.scale=', 'times ')} Options are for "
            "all files: bring these to the unit of the others."
        )
        return [Finding(f"{split} units", Level.DOUBTFUL, text)]

    def _colors(self, split: str) -> Finding:
        """How many clouds have colors, and whether these can be meant."""
        topic = f"{split} colors"
        without = [id for id, brightest in self.brightest.items() if brightest is None]
        dark = [id for id, brightest in self.brightest.items() if brightest is not None and brightest <= DARK]
        if len(without) == len(self.points):
            text = (
                "none. Fields of another name: --set data.options.color=NAME. Without any, fine-tune with "
                "--set data.cloud.features=ones"
            )
            return Finding(topic, Level.UNKNOWN, text)
        if dark:
            text = (
                f"{len(dark)} of {len(self.points)} clouds are black: {some(dark, 5)}. Accepted: whole numbers to 255 "
                "(or 65535), or numbers with a point up to 1. Are these whole numbers from 0 to 1? Save them as float32"
            )
            return Finding(topic, Level.DOUBTFUL, text)
        if without:
            text = f"{len(without)} of {len(self.points)} clouds have none, and are left out of training with colors: "
            return Finding(topic, Level.DOUBTFUL, text + some(without, 5))
        return Finding(topic, Level.OK, "in all, from 0 to 255 or brought there")

    def _intensities(self, split: str) -> list[Finding]:
        """How many clouds have intensities, and how strong they are; nothing where no cloud has any."""
        topic = f"{split} intensities"
        without = [id for id, strongest in self.strongest.items() if strongest is None]
        found = [strongest for strongest in self.strongest.values() if strongest is not None]
        if not found:
            return []
        if without:
            text = f"{len(without)} of {len(self.points)} clouds have none: {some(without, 5)}"
            return [Finding(topic, Level.DOUBTFUL, text)]
        if max(found) < DIM:
            text = (
                f"at most {max(found):.2g} of 1 in any cloud. Are they divided by too much? "
                "--set data.options.intensity_scale=K multiplies what the files hold"
            )
            return [Finding(topic, Level.DOUBTFUL, text)]
        return [Finding(topic, Level.OK, f"in all; the strongest of each cloud {_range(found, ' of 1')}")]


def _unread(split: str, folder: Path) -> list[Finding]:
    others = left_alone(folder) if folder.is_dir() else []
    if not others:
        return []
    names = some((path.relative_to(folder).as_posix() for path in others), 5)
    return [Finding(f"{split} files", Level.DOUBTFUL, f"{len(others)} are not read: {names}.{conversion(others)}")]


def _range(values: Sequence[float], unit: str) -> str:
    low, high = (f"{float(f'{value:.3g}'):g}" if unit else f"{value:.0f}" for value in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"
