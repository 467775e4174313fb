"""Linear and k-NN probes: how well frozen features of a backbone segment, measured in minutes.

2D backbones are probed at labelled pixels, 3D ones at the voxels of labelled RGB-D frames. Nothing of the backbone is
trained. Features of a pixel are read from the maps bilinearly, corners aligned, so a linear layer on the map and then
enlarged gives the same as that layer on the features read. The maps are the U-Net's (stride 2), or the four of the
encoder together (strides 4 to 32). Features of a voxel are those before the sparse U-Net's last layer. k-NN prediction
is that of instance discrimination (Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978).
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain import hub
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import CheckpointError, DataError, unknown
from geo_pretrain.training.checks import Count, Positive, Ranged
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.frames import labelled_clouds
from geo_pretrain.training.data.labelled.clouds.voxels import batch_voxels, voxels_of
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.evaluation.features import (
    RANDOM,
    CloudExtractor,
    ImageExtractor,
    load_network,
    output_options,
)
from geo_pretrain.training.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy
from geo_pretrain.training.evaluation.progress import Progress, counted, part_of

Part = Literal["encoder", "unet"]
PROBES = ("linear", "knn")
QUERIES = 256  # of k-NN compared with the whole bank at once
LEAST_STD = 1e-6  # a channel that varies less is constant


@dataclass(frozen=True)
class ProbeSpec(Ranged):
    """Settings of a probe; the same for every backbone of a comparison."""

    size: tuple[int, int] | None = None  # height, width of the network's input; None: its contract's; 3D: of frames
    pixels: Count = 20_000  # labelled pixels (3D: voxels) of the training images, equally many of each; k-NN: val too
    penalty: Positive = 1e-4  # linear: weight of half the squared norm of the weights, beside the mean cross-entropy
    iterations: Count = 200  # linear: at most
    k: Count = 20
    temperature: Positive = 0.07  # k-NN: a neighbor's vote is exp(cosine / temperature)
    seed: int = 0  # of the pixels, and of the random-init baseline's weights


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe on the validation images, in shares of 1."""

    probe: str  # "linear" or "knn"
    miou: float  # over the classes present in the truth
    accuracy: float  # of the pixels
    confusion: np.ndarray  # int64 [1 + C, 1 + C], rows = truth; class 0 (unlabelled) is left out
    fitted: int  # pixels of the training images
    channels: int  # of the features

    @property
    def measured(self) -> int:
        """Number of labelled pixels or voxels of the validation split that were classified."""
        return int(self.confusion.sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        numbers = {"probe": self.probe, "miou": self.miou, "accuracy": self.accuracy}
        return numbers | {"pixels": [self.fitted, self.measured], "channels": self.channels}


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

    def through(self, extractor: ImageExtractor | CloudExtractor) -> ProbeData:
        """Read the same images or clouds through another network of the same contract."""
        data = copy.copy(self)
        data.extractor = extractor
        return data

    @abstractmethod
    def load(self, id: str) -> tuple[list[Tensor], Tensor]:
        """Features, as `read` and `predict` take them, and labels of any shape, 0 where unlabelled."""

    @abstractmethod
    def read(self, features: list[Tensor], places: Tensor, shape: torch.Size) -> Tensor:
        """Features [n, C] at `places` [n, dimensions], which index labels of `shape`."""

    @abstractmethod
    def predict(self, head: Head, features: list[Tensor], widths: Sequence[int], shape: torch.Size) -> Tensor:
        """Classes of `shape` that a head gives."""


class ImageData(ProbeData):
    """Labelled images through a 2D network that gives a map or several: [1, C_k, h_k, w_k], and labels [H, W]."""

    extractor: ImageExtractor
    kind, needs = "images", "images with labels of segmentation"

    def __init__(self, extractor: ImageExtractor, source: LabelledSource) -> None:
        self.extractor, self.source, self.ids, self.classes = extractor, source, source.ids(), len(source.classes)
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
        self.ids = list(self.clouds)

    def load(self, id: str) -> tuple[list[Tensor], Tensor]:
        x, truth = batch_voxels([voxels_of(self.clouds[id], self.extractor.contract)], self.extractor.device)
        return [self.extractor.voxel_rows(x).float().cpu()], truth.cpu()

    def read(self, features: list[Tensor], places: Tensor, shape: torch.Size) -> Tensor:
        return features[0][places[:, 0]]

    def predict(self, head: Head, features: list[Tensor], widths: Sequence[int], shape: torch.Size) -> Tensor:
        return head.classes[F.linear(features[0], head.weight, head.bias).argmax(dim=1)]


def probe_backbone(
    backbone: str | Path | nn.Module,
    train: LabelledSource,
    val: LabelledSource,
    spec: ProbeSpec = ProbeSpec(),
    *,
    probe: str = "linear",
    part: Part | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ProbeResult:
    """Classify pixels (or voxels) of `val` by their frozen features, from labelled ones of `train`.

    "linear": softmax regression, judged on every labelled pixel. The fit is the minimum of a convex function, found by
    L-BFGS, so nothing depends on a schedule. Logits are brought to the size of the labels (bilinear, corners aligned).
    Classes that no training pixel has are never predicted.

    "knn": k-NN prediction for `spec.pixels` pixels from as many of `train`. Nearest by cosine; the parts of a feature
    that come from different maps count equally.

    Args:
        backbone: catalog name, checkpoint folder, or a network with a `contract`: from images to a map or maps, or from
            voxels to voxels.
        part: of a 2D backbone given by name; None: "unet" where it has a decoder.
        progress: called with the images done and all of them.

    Raises:
        DataError: no labelled pixel to learn from, or to judge.
        BadFrame: an image or its labels cannot be used.
        CheckpointError: no part of the kind asked for, or voxels that RGB-D frames cannot give.
        RecipeError: a 3D backbone, and a source without depth.
    """
    network = backbone if isinstance(backbone, nn.Module) else _load(backbone, part)
    extractor = probe_extractor(network.to(device), spec.size)
    return run_probes([probe], *open_data(extractor, train, val, spec), spec, progress)[probe]


def compare_probes(
    backbone: str | Path,
    train: LabelledSource,
    val: LabelledSource,
    spec: ProbeSpec = ProbeSpec(),
    *,
    probes: Sequence[str] = PROBES,
    progress: Progress | None = None,
) -> dict[str, dict[str, ProbeResult]]:
    """Probe a backbone (catalog name or folder, 2D or 3D) and its random-init baseline.

    Returns {"random": {probe: result}, backbone: {probe: result}}. Arguments and errors are those of `probe_backbone`.
    """
    for name in probes:
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    extractors = {
        RANDOM: probe_extractor(_load(backbone, random_init=True, seed=spec.seed), spec.size),
        str(backbone): probe_extractor(_load(backbone), spec.size),
    }
    seen, unseen = open_data(extractors[RANDOM], train, val, spec)
    return {
        name: run_probes(probes, seen.through(extractor), unseen.through(extractor), spec, part_of(progress, number, 2))
        for number, (name, extractor) in enumerate(extractors.items())
    }


def probe_extractor(network: nn.Module, size: tuple[int, int] | None = None) -> ImageExtractor | CloudExtractor:
    """Wrap a network with a `contract` for probes; `size`: of the images it sees, None: its contract's.

    Of a sparse U-Net the finest map before its last layer is probed, `block8` (96 channels at the real width), which
    fine-tuning keeps; of other 3D networks their output. Raises `CheckpointError` without a usable contract.
    """
    contract: Any = getattr(network, "contract", None)
    if isinstance(contract, VoxelContract):
        return CloudExtractor(network, contract, level=0 if isinstance(network, SRUNet) else None)
    if isinstance(contract, ImageContract):
        return ImageExtractor(network, contract if size is None else replace(contract, size=size))
    raise CheckpointError(f"The network's contract is {contract!r}; the probes need an ImageContract or VoxelContract.")


def open_data(
    extractor: ImageExtractor | CloudExtractor, train: LabelledSource, val: LabelledSource, spec: ProbeSpec
) -> tuple[ProbeData, ProbeData]:
    """Open both splits for an extractor. Raises `RecipeError` for a 3D network and a source without depth."""
    if isinstance(extractor, ImageExtractor):
        return ImageData(extractor, train), ImageData(extractor, val)
    seen, unseen = (CloudData(extractor, labelled_clouds(s, spec.size), len(val.classes)) for s in (train, val))
    return seen, unseen


def run_probes(
    probes: Sequence[str], train: ProbeData, val: ProbeData, spec: ProbeSpec, progress: Progress | None = None
) -> dict[str, ProbeResult]:
    """Run several probes on features of `train` that are read once. `progress` is called after every image."""
    steps = counted(progress, len(train.ids) + len(probes) * len(val.ids))
    samples = draw_samples(train, spec, "train", steps)
    judge = {"linear": _linear_confusion, "knn": _knn_confusion}
    results = {}
    for probe in probes:
        confusion = judge[probe](samples, val, spec, steps)
        if not confusion.sum():
            raise DataError(f"{val.nothing} to judge the probe by.")
        miou, accuracy = mean_iou(confusion), pixel_accuracy(confusion)
        results[probe] = ProbeResult(probe, miou, accuracy, confusion, *samples.features.shape)
    return results


def fit_head(samples: Samples, *, penalty: float, iterations: int = 200) -> Head:
    """Minimize mean cross-entropy + penalty / 2 |weights|^2 over features standardized per channel.

    The head returned takes features that are not standardized.
    """
    x, (classes, target) = samples.features, samples.labels.unique(return_inverse=True)
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std > LEAST_STD, 1 / std.clamp_min(LEAST_STD), 0.0)
    x = (x - mean) * scale
    weight = x.new_zeros(len(classes), x.shape[1]).requires_grad_()
    bias = x.new_zeros(len(classes)).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), target) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(cast(Callable[[], float], objective))
    with torch.no_grad():
        raw = weight * scale
        return Head(raw, bias - raw @ mean, classes)


def knn_predict(bank: Samples, queries: Samples, *, k: int, temperature: float) -> Tensor:
    """Predict the class of each query by its k nearest in the bank, weighted by exp(cosine / temperature): [N]."""
    directions, labels = _directions(bank), bank.labels
    count = int(labels.max()) + 1
    chosen = []
    for part in _directions(queries).split(QUERIES):
        cosine, row = (part @ directions.T).topk(min(k, len(labels)), dim=1)
        votes = part.new_zeros(len(part), count)
        votes.scatter_add_(1, labels[row], ((cosine - 1) / temperature).exp())
        chosen.append(votes.argmax(1))
    return torch.cat(chosen)


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


@torch.no_grad()
def draw_samples(data: ProbeData, spec: ProbeSpec, split: str, steps: Iterator[None]) -> Samples:
    """Read features at labelled places, drawn for each image by the seed and its name alone."""
    per_image = -(-spec.pixels // max(len(data.ids), 1))
    drawn_features, drawn_labels = [], []
    widths: tuple[int, ...] = ()
    for id in data.ids:
        features, truth = data.load(id)
        known = (truth > 0).nonzero()
        digest = hashlib.sha256(f"{spec.seed}\n{split}\n{id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        places = known[torch.randperm(len(known), generator=generator)[:per_image]]
        drawn_features.append(data.read(features, places, truth.shape).cpu())
        drawn_labels.append(truth[places.unbind(1)])
        widths = tuple(part.shape[1] for part in features)
        next(steps)
    if not sum(map(len, drawn_labels)):
        raise DataError(f"{data.nothing} in {len(data.ids)} {data.kind}; a probe needs {data.needs}.")
    return Samples(torch.cat(drawn_features), torch.cat(drawn_labels), widths)


def _linear_confusion(samples: Samples, val: ProbeData, spec: ProbeSpec, steps: Iterator[None]) -> np.ndarray:
    head = fit_head(samples, penalty=spec.penalty, iterations=spec.iterations)
    count = 1 + val.classes
    confusion = np.zeros((count, count), np.int64)
    with torch.no_grad():
        for id in val.ids:
            features, truth = val.load(id)
            confusion += confusion_matrix(truth, val.predict(head, features, samples.widths, truth.shape), count)
            next(steps)
    return confusion


def _knn_confusion(samples: Samples, val: ProbeData, spec: ProbeSpec, steps: Iterator[None]) -> np.ndarray:
    queries = draw_samples(val, spec, "val", steps)
    predicted = knn_predict(samples, queries, k=spec.k, temperature=spec.temperature)
    return confusion_matrix(queries.labels, predicted, 1 + val.classes)


def _directions(samples: Samples) -> Tensor:
    """Normalize features so that each map counts equally, whatever its scale and width."""
    return F.normalize(torch.cat([F.normalize(m) for m in samples.features.split(list(samples.widths), 1)], 1))


def _load(backbone: str | Path, part: Part | None = None, **options: Any) -> nn.Module:
    """Load the network to probe; for a 2D backbone, the one that outputs the maps of `part`."""
    opened = hub.open(backbone)
    checkpoint = opened.fetch(*opened.network_roles(decoder=part != "encoder"))
    if part == "unet" and not checkpoint.arch.has_decoder:
        raise CheckpointError(f"{checkpoint.name!r} holds an encoder alone ({checkpoint.arch}); probe part='encoder'.")
    return load_network(checkpoint.folder, **output_options(checkpoint, decoder=part != "encoder"), **options)
