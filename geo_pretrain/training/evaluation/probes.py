"""Linear and k-NN probes: how well frozen features of a backbone segment, measured in minutes.

2D backbones are probed at labelled pixels, 3D ones at the points of labelled clouds or the voxels of labelled RGB-D
frames. Nothing of the backbone is trained. In 3D the same probe on coordinates and color alone stands beside it: what
is above it was learned, as random weights are beside it for what the architecture brings (Sonata, CVPR 2025, asks so
whether features tell more than shortcuts of geometry).

Features of a pixel are read from the maps bilinearly, corners aligned, so a linear layer on the map and then enlarged
gives the same as that layer on the features read. The maps are the U-Net's (stride 2), or the four of the encoder
together (strides 4 to 32). Features of a voxel are those before the sparse U-Net's last layer. k-NN prediction is that
of instance discrimination (Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978).
"""

from __future__ import annotations

import hashlib
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
from geo_pretrain.errors import CheckpointError, DataError, RecipeError, some, unknown
from geo_pretrain.training.checks import Count, Positive, Ranged
from geo_pretrain.training.cloud_recipe import CloudFeatures, CloudSpec
from geo_pretrain.training.data.labelled.clouds.frames import labelled_clouds
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.evaluation.features import (
    RANDOM,
    CloudExtractor,
    ImageExtractor,
    load_network,
    output_options,
)
from geo_pretrain.training.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy
from geo_pretrain.training.evaluation.probe_data import CloudData as CloudData
from geo_pretrain.training.evaluation.probe_data import (
    Head,
    ImageData,
    InputData,
    ProbeData,
    Samples,
    ScanData,
    has_whole_clouds,
)
from geo_pretrain.training.evaluation.probe_data import apply_head as apply_head
from geo_pretrain.training.evaluation.probe_data import read_at as read_at
from geo_pretrain.training.evaluation.progress import Progress, counted, part_of
from geo_pretrain.training.networks3d import cloud_input

Part = Literal["encoder", "unet"]
PROBES = ("linear", "knn")
INPUT = "xyz+color"  # name of the control without a network in results
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
    features: CloudFeatures = "contract"  # whole clouds: input channels, as data.cloud.features of recipes


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


def probe_backbone(
    backbone: str | Path | nn.Module,
    train: LabelledData,
    val: LabelledData,
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
    extractor = probe_extractor(network.to(device), spec.size, frames=not has_whole_clouds(train))
    return run_probes([probe], *open_data(extractor, train, val, spec), spec, progress)[probe]


def compare_probes(
    backbone: str | Path,
    train: LabelledData,
    val: LabelledData,
    spec: ProbeSpec = ProbeSpec(),
    *,
    probes: Sequence[str] = PROBES,
    progress: Progress | None = None,
    skipped: dict[str, str] | None = None,
) -> dict[str, dict[str, ProbeResult]]:
    """Probe a backbone (catalog name or folder, 2D or 3D) beside its controls.

    Returns {"xyz+color": {probe: result}, "random": ..., backbone: ...}: the control without a network (3D only), the
    architecture with random weights, and the backbone. All see the same images or clouds and are judged by the same
    pixels, voxels or points. `skipped` is filled with path and reason of broken clouds. Other arguments and errors are
    those of `probe_backbone`.
    """
    for name in probes:
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    frames = not has_whole_clouds(train)
    extractors = {
        RANDOM: _extractor(backbone, spec, frames, random_init=True, seed=spec.seed),
        str(backbone): _extractor(backbone, spec, frames),
    }
    seen, unseen = open_data(extractors[RANDOM], train, val, spec)
    pairs = {name: (seen.through(e), unseen.through(e)) for name, e in extractors.items()}
    if isinstance(extractors[RANDOM], CloudExtractor):
        control = InputData(seen)
        pairs = {INPUT: (control, InputData(unseen, control.kinds))} | pairs
    results = {
        name: run_probes(probes, *pair, spec, part_of(progress, number, len(pairs)))
        for number, (name, pair) in enumerate(pairs.items())
    }
    if skipped is not None:
        skipped |= seen.skipped | unseen.skipped
    return results


def probe_extractor(
    network: nn.Module, size: tuple[int, int] | None = None, *, frames: bool = True
) -> ImageExtractor | CloudExtractor:
    """Wrap a network with a `contract` for probes; `size`: of the images it sees, None: its contract's.

    `frames`: clouds are those of RGB-D frames, not whole ones, which only cubic voxels fit.

    Of a sparse U-Net the finest map before its last layer is probed, `block8` (96 channels at the real width), which
    fine-tuning keeps; of other 3D networks their output. Raises `CheckpointError` without a usable contract.
    """
    contract: Any = getattr(network, "contract", None)
    if isinstance(contract, VoxelContract):
        return CloudExtractor(network, contract, level=0 if isinstance(network, SRUNet) else None, frames=frames)
    if isinstance(contract, ImageContract):
        return ImageExtractor(network, contract if size is None else replace(contract, size=size))
    raise CheckpointError(f"The network's contract is {contract!r}; the probes need an ImageContract or VoxelContract.")


def open_data(
    extractor: ImageExtractor | CloudExtractor, train: LabelledData, val: LabelledData, spec: ProbeSpec
) -> tuple[ProbeData, ProbeData]:
    """Open both splits for an extractor.

    Raises `RecipeError` for a 3D network and images without depth, and for an image network and clouds.
    """
    if isinstance(extractor, ImageExtractor):
        if has_whole_clouds(train):
            raise RecipeError(f"Source {train.name!r} has clouds, the backbone takes images; accepted: a 3D backbone.")
        return ImageData(extractor, cast(Any, train)), ImageData(extractor, cast(Any, val))
    if has_whole_clouds(train):
        return ScanData(extractor, train), ScanData(extractor, val)
    pair = (CloudData(extractor, labelled_clouds(cast(Any, s), spec.size), len(val.classes)) for s in (train, val))
    seen, unseen = pair
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


@torch.no_grad()
def draw_samples(data: ProbeData, spec: ProbeSpec, split: str, steps: Iterator[None]) -> Samples:
    """Read features at labelled places, drawn for each image by the seed and its name alone."""
    per_image = -(-spec.pixels // max(len(data.ids), 1))
    drawn_features, drawn_labels = [], []
    widths: tuple[int, ...] = ()
    for id in data.ids:
        loaded = data.loaded(id)
        next(steps)
        if loaded is None:
            continue
        features, truth = loaded
        known = (truth > 0).nonzero()
        digest = hashlib.sha256(f"{spec.seed}\n{split}\n{id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        places = known[torch.randperm(len(known), generator=generator)[:per_image]]
        drawn_features.append(data.read(features, places, truth.shape).cpu())
        drawn_labels.append(truth[places.unbind(1)])
        widths = data.widths(features)
    if not sum(map(len, drawn_labels)):
        skipped = some((f"{path}: {reason}" for path, reason in data.skipped.items()), 3)
        why = f" Skipped: {skipped}." if data.skipped else ""
        raise DataError(f"{data.nothing} in {len(data.ids)} {data.kind}; a probe needs {data.needs}.{why}")
    return Samples(torch.cat(drawn_features), torch.cat(drawn_labels), widths)


def _linear_confusion(samples: Samples, val: ProbeData, spec: ProbeSpec, steps: Iterator[None]) -> np.ndarray:
    head = fit_head(samples, penalty=spec.penalty, iterations=spec.iterations)
    count = 1 + val.classes
    confusion = np.zeros((count, count), np.int64)
    with torch.no_grad():
        for id in val.ids:
            loaded = val.loaded(id)
            next(steps)
            if loaded is not None:
                features, truth = loaded
                guess = val.predict(head, features, samples.widths, truth.shape)
                confusion += confusion_matrix(truth, guess, count)
    return confusion


def _knn_confusion(samples: Samples, val: ProbeData, spec: ProbeSpec, steps: Iterator[None]) -> np.ndarray:
    queries = draw_samples(val, spec, "val", steps)
    predicted = knn_predict(samples, queries, k=spec.k, temperature=spec.temperature)
    return confusion_matrix(queries.labels, predicted, 1 + val.classes)


def _directions(samples: Samples) -> Tensor:
    """Normalize features so that each map counts equally, whatever its scale and width."""
    return F.normalize(torch.cat([F.normalize(m) for m in samples.features.split(list(samples.widths), 1)], 1))


def _extractor(backbone: str | Path, spec: ProbeSpec, frames: bool, **options: Any) -> ImageExtractor | CloudExtractor:
    """Load a backbone, or its random-init twin, for the input channels of `spec`."""
    network: Any = _load(backbone, **options)
    if spec.features != "contract" and isinstance(network.contract, VoxelContract):
        inputs = cloud_input(CloudSpec(features=spec.features), network.contract, str(backbone))
        if inputs.in_chans is not None:
            network = _load(backbone, in_chans=inputs.in_chans, **options)
        network.contract = inputs.contract
    return probe_extractor(network, spec.size, frames=frames)


def _load(backbone: str | Path, part: Part | None = None, **options: Any) -> nn.Module:
    """Load the network to probe; for a 2D backbone, the one that outputs the maps of `part`."""
    opened = hub.open(backbone)
    checkpoint = opened.fetch(*opened.network_roles(decoder=part != "encoder"))
    if part == "unet" and not checkpoint.arch.has_decoder:
        raise CheckpointError(f"{checkpoint.name!r} holds an encoder alone ({checkpoint.arch}); probe part='encoder'.")
    return load_network(checkpoint.folder, **output_options(checkpoint, decoder=part != "encoder"), **options)
