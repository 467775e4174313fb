"""What probes read: labelled images, clouds of frames and whole clouds, through a frozen network or without any."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.cloud_recipe import CloudSpec
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.sets import CLOUD_SETS
from geo_pretrain.training.data.labelled.clouds.voxels import batch_voxels, voxels_of
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.data.samples.whole_clouds import evaluation_sample, voxel_of_points
from geo_pretrain.training.evaluation.features import CloudExtractor, ImageExtractor


@dataclass(frozen=True)
class Samples:
    """Features of labelled pixels or voxels; maps are concatenated along channels, `widths` are theirs."""

    features: Tensor  # float32 [N, C]
    labels: Tensor  # int64 [N], 1..
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """A linear classifier of features: one row for each class that the training pixels have."""

    weight: Tensor  # [classes, C]
    bias: Tensor  # [classes]
    classes: Tensor  # int64 [classes], rising: which class a row stands for


class ProbeData(ABC):
    """One labelled split read through a frozen network: features and labels of one image or cloud at a time."""

    extractor: ImageExtractor | CloudExtractor
    ids: list[str]  # of all images or clouds
    classes: int  # without the unlabelled
    nothing: str  # begins the message that there is no label
    kind: str
    needs: str
    skipped: dict[str, str]  # path -> reason, of broken clouds

    def through(self, extractor: ImageExtractor | CloudExtractor) -> ProbeData:
        """Read the same images or clouds through another network of the same contract."""
        data = copy.copy(self)
        data.extractor = extractor
        return data

    @abstractmethod
    def load(self, id: str) -> tuple[list[Tensor], Tensor]:
        """Features, as `read` and `predict` take them, and labels of any shape, 0 where unlabelled.

        Raises `BadFrame`, which ends a probe of images and is skipped and counted by one of whole clouds.
        """

    def loaded(self, id: str) -> tuple[list[Tensor], Tensor] | None:
        """What `load` gives; None for a broken cloud, which is noted in `skipped`."""
        return self.load(id)

    def inputs(self, id: str) -> tuple[list[Tensor | None], Tensor]:
        """In place of features what the network is fed at best: coordinates and color; 3D only."""
        raise NotImplementedError(f"{type(self).__name__} has no control of coordinates and color.")

    @abstractmethod
    def read(self, features: list[Tensor], places: Tensor, shape: torch.Size) -> Tensor:
        """Features [n, C] at `places` [n, dimensions], which index labels of `shape`."""

    def widths(self, features: list[Tensor]) -> tuple[int, ...]:
        """The channels of each map that `features` hold."""
        return tuple(part.shape[1] for part in features)

    @abstractmethod
    def predict(self, head: Head, features: list[Tensor], widths: Sequence[int], shape: torch.Size) -> Tensor:
        """Classes of `shape` that a head gives."""


class ImageData(ProbeData):
    """Labelled images through a 2D network that gives a map or several: [1, C_k, h_k, w_k], and labels [H, W]."""

    extractor: ImageExtractor
    kind, needs = "images", "images with labels of segmentation"

    def __init__(self, extractor: ImageExtractor, source: LabelledSource) -> None:
        self.extractor, self.source, self.ids, self.classes = extractor, source, source.ids(), len(source.classes)
        self.skipped = {}
        self.nothing = f"Source {source.name!r}, split {source.split!r}: no labelled pixel"

    def load(self, id: str) -> tuple[list[Tensor], Tensor]:
        labelled = self.source.load(id)
        if labelled.semantic is None:
            name = self.source.name
            raise DataError(f"{name}: image {id} has no labels of pixels; open the source for segmentation.")
        return self.extractor.maps(labelled.image, resize=True), torch.from_numpy(labelled.semantic.astype(np.int64))

    def read(self, features: list[Tensor], places: Tensor, shape: torch.Size) -> Tensor:
        return read_at(features, places, (shape[0], shape[1]))

    def predict(self, head: Head, features: list[Tensor], widths: Sequence[int], shape: torch.Size) -> Tensor:
        return apply_head(head, features, widths, shape)


class CloudData(ProbeData):
    """The voxels of labelled clouds through a 3D network: features [N, C], and majority labels [N]."""

    extractor: CloudExtractor
    kind, needs, nothing = "clouds", "frames with labels", "No labelled voxel"

    def __init__(self, extractor: CloudExtractor, clouds: Sequence[LabelledCloud], classes: int) -> None:
        self.extractor, self.classes = extractor, classes
        self.clouds = {cloud.id: cloud for cloud in clouds}
        self.ids, self.skipped = list(self.clouds), {}

    def load(self, id: str) -> tuple[list[Tensor], Tensor]:
        x, truth = batch_voxels([voxels_of(self.clouds[id], self.extractor.contract)], self.extractor.device)
        return [self.extractor.voxel_rows(x).float().cpu()], truth.cpu()

    def inputs(self, id: str) -> tuple[list[Tensor | None], Tensor]:
        cloud = self.clouds[id]
        _, _, truth = voxels_of(cloud, self.extractor.contract)
        voxels = self.extractor.contract.transforms()(
            cloud.points, cloud.colors if self.extractor.contract.given_channels else None
        )
        return [None if part is None else part[voxels.index] for part in plain_features(cloud)], truth

    def read(self, features: list[Tensor], places: Tensor, shape: torch.Size) -> Tensor:
        return features[0][places[:, 0]]

    def predict(self, head: Head, features: list[Tensor], widths: Sequence[int], shape: torch.Size) -> Tensor:
        return _classify(head, features[0])


class ScanData(ProbeData):
    """The points of whole labelled clouds through a 3D network: features of voxels [M, C] with the voxel of each point.

    Every labelled point is judged, by the features of its voxel. Clouds are read when they are needed.
    """

    extractor: CloudExtractor
    kind, needs = "clouds", "clouds with labels of points"

    def __init__(self, extractor: CloudExtractor, source: LabelledData) -> None:
        self.extractor, self.source, self.ids, self.classes = extractor, source, source.ids(), len(source.classes)
        self.nothing = f"Source {source.name!r}, split {source.split!r}: no labelled point"
        self.skipped = {}

    def loaded(self, id: str) -> tuple[list[Tensor], Tensor] | None:
        try:
            return self.load(id)
        except BadFrame as bad:
            self.skipped[bad.path] = bad.reason
            return None

    def load(self, id: str) -> tuple[list[Tensor], Tensor]:
        cloud = self._cloud(id)
        sample = evaluation_sample(cloud, CloudSpec(), self.extractor.contract)
        x = SparseTensor(sample.coords.to(self.extractor.device), sample.feats.to(self.extractor.device))
        rows = self.extractor.voxel_rows(x).float().cpu()
        return [rows, voxel_of_points(sample, cloud)], torch.from_numpy(cast(np.ndarray, cloud.labels))

    def inputs(self, id: str) -> tuple[list[Tensor | None], Tensor]:
        cloud = self._cloud(id)
        evaluation_sample(cloud, CloudSpec(), self.extractor.contract)  # leaves out what the network cannot take
        return plain_features(cloud), torch.from_numpy(cast(np.ndarray, cloud.labels))

    def _cloud(self, id: str) -> LabelledCloud:
        cloud = cast(LabelledCloud, self.source.load(id))
        if cloud.labels is None:
            raise DataError(f"{self.source.name}: cloud {id} has no labels of points; a probe needs them.")
        return cloud

    def read(self, features: list[Tensor], places: Tensor, shape: torch.Size) -> Tensor:
        return features[0][features[1][places[:, 0]]]

    def predict(self, head: Head, features: list[Tensor], widths: Sequence[int], shape: torch.Size) -> Tensor:
        return _classify(head, features[0])[features[1]]

    def widths(self, features: list[Tensor]) -> tuple[int, ...]:
        return (features[0].shape[1],)


WIDTHS = (3, 3, 1)  # columns of place, color and remission


class InputData(ProbeData):
    """The same clouds and labels without a network: coordinates and color alone; the control of a probe in 3D."""

    def __init__(self, data: ProbeData, kinds: list[bool] | None = None) -> None:
        """`kinds`: which of place, color, remission are looked at, a list to share; empty: those of the first cloud."""
        self.kinds = [] if kinds is None else kinds
        self.data, self.ids, self.classes, self.nothing = data, data.ids, data.classes, data.nothing
        self.kind, self.needs, self.skipped = data.kind, data.needs, data.skipped

    def load(self, id: str) -> tuple[list[Tensor], Tensor]:
        parts, truth = self.data.inputs(id)
        if not self.kinds:
            self.kinds += [part is not None for part in parts]
        zeros = [truth.new_zeros(len(truth), width, dtype=torch.float32) for width in WIDTHS]
        chosen = zip(parts, zeros, self.kinds, strict=True)
        return [zero if part is None else part for part, zero, wanted in chosen if wanted], truth

    def loaded(self, id: str) -> tuple[list[Tensor], Tensor] | None:
        try:
            return self.load(id)
        except BadFrame as bad:
            self.skipped[bad.path] = bad.reason
            return None

    def read(self, features: list[Tensor], places: Tensor, shape: torch.Size) -> Tensor:
        return torch.cat([part[places[:, 0]] for part in features], dim=1)

    def predict(self, head: Head, features: list[Tensor], widths: Sequence[int], shape: torch.Size) -> Tensor:
        return _classify(head, torch.cat(features, dim=1))


def plain_features(cloud: LabelledCloud) -> list[Tensor | None]:
    """What a point tells by itself: its place [N, 3], color [N, 3] and remission [N, 1]; None: the cloud has none.

    x and y are relative to the middle of the cloud's box, z to its lowest point (m); colors go from 0 to 1.
    """
    points = torch.from_numpy(cloud.points).float()
    low, high = points.amin(0), points.amax(0)
    origin = torch.stack([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    colors = None if cloud.colors is None else torch.from_numpy(cloud.colors).float() / 255
    remission = None if cloud.intensity is None else torch.from_numpy(cloud.intensity).float()[:, None]
    return [points - origin, colors, remission]


def has_whole_clouds(source: LabelledData) -> bool:
    """Whether a source's items are clouds, not images or frames."""
    return source.name in CLOUD_SETS


def _classify(head: Head, rows: Tensor) -> Tensor:
    """The classes [N] that a head gives rows [N, C]."""
    return head.classes[F.linear(rows, head.weight, head.bias).argmax(dim=1)]


def read_at(maps: Sequence[Tensor], pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate maps [1, C_k, h_k, w_k] at `pixels` [N, 2] (row, column) of an image of `size`: [N, sum of C_k]."""
    last = pixels.new_tensor([max(size[0] - 1, 1), max(size[1] - 1, 1)])
    grid = (pixels / last * 2 - 1).flip(-1)[None, None].to(maps[0])  # (x, y), the corners at -1 and 1
    read = [F.grid_sample(m, grid, mode="bilinear", padding_mode="border", align_corners=True)[0, :, 0] for m in maps]
    return torch.cat(read).T


@torch.no_grad()
def apply_head(head: Head, maps: Sequence[Tensor], widths: Sequence[int], size: Sequence[int]) -> Tensor:
    """Classify every pixel of `size` from maps [1, C_k, h_k, w_k]: each map's logits are enlarged, then summed."""
    logits = head.bias[:, None, None]
    for features, weight in zip(maps, head.weight.split(list(widths), dim=1), strict=True):
        part = F.conv2d(features, weight[:, :, None, None].to(features))
        logits = logits + F.interpolate(part, size=tuple(size), mode="bilinear", align_corners=True)[0].cpu()
    return head.classes[logits.argmax(0)]
