"""Linear and k-NN probes: how much of a segmentation the frozen features of a backbone hold already, in minutes.

Both read features at labelled pixels: bilinear, corners aligned, so a linear layer on the map and then enlarged gives
the same as that layer on the features read. The maps are the U-Net's (stride 2), or the four of the encoder together
(strides 4 to 32), each read where the pixel is. Nothing of the backbone is trained. The k-NN vote is that of
instance discrimination (Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978).
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
from geo_pretrain.backbones.build import has_decoder
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import CheckpointError, DataError, RecipeError, unknown
from geo_pretrain.loading import load_backbone
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy

Part = Literal["encoder", "unet"]
Progress = Callable[[int, int], None]
RANDOM = "random"  # what the twin is called in results
PROBES = ("linear", "knn")
STAGES = (1, 2, 3, 4)  # of the encoder: strides 4, 8, 16, 32
QUERIES = 256  # of k-NN compared with the whole bank at once
LEAST_STD = 1e-6  # a channel that varies less is constant


@dataclass(frozen=True)
class ProbeSpec:
    """What a probe reads and fits; the same for every backbone of a comparison."""

    size: tuple[int, int] | None = None  # height and width the network sees; None: those of its contract
    pixels: int = 20_000  # labelled pixels of the training images, the same number of each; k-NN: of the others, too
    penalty: float = 1e-4  # linear: weight of half the squared norm of the weights, beside the mean cross-entropy
    iterations: int = 200  # linear: at most
    k: int = 20
    temperature: float = 0.07  # k-NN: a neighbor's vote is exp(cosine / temperature)
    seed: int = 0  # of the pixels, and of the twin's weights

    def __post_init__(self) -> None:
        for key, least in (("pixels", 1), ("iterations", 1), ("k", 1)):
            if getattr(self, key) < least:
                raise RecipeError(f"'{key}' is {getattr(self, key)}, accepted is a whole number from {least} up.")
        for key in ("penalty", "temperature"):
            if not getattr(self, key) > 0:
                raise RecipeError(f"'{key}' is {getattr(self, key)}, accepted is a number above 0.")


@dataclass(frozen=True)
class ProbeResult:
    """What a probe measured on the validation images, in shares of 1."""

    probe: str  # "linear" or "knn"
    miou: float  # over the classes present in the truth
    accuracy: float  # of the pixels
    confusion: np.ndarray  # int64 [1 + C, 1 + C], rows = truth; class 0 (unlabelled) is left out
    fitted: int  # pixels of the training images
    channels: int  # of the features

    @property
    def measured(self) -> int:
        """Labelled pixels of the validation images that were judged."""
        return int(self.confusion.sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        numbers = {"probe": self.probe, "miou": self.miou, "accuracy": self.accuracy}
        return numbers | {"pixels": [self.fitted, self.measured], "channels": self.channels}


@dataclass(frozen=True)
class Samples:
    """Features of labelled pixels; the channels of the maps follow each other, `widths` says how many each has."""

    features: Tensor  # float32 [N, C]
    labels: Tensor  # int64 [N], 1..
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """A 1x1 convolution on the maps: one row for each class that the training pixels have."""

    weight: Tensor  # [classes, C]
    bias: Tensor  # [classes]
    classes: Tensor  # int64 [classes], rising: which class a row stands for


def linear_probe(
    backbone: str | Path | nn.Module,
    train: LabelledSource,
    val: LabelledSource,
    spec: ProbeSpec = ProbeSpec(),
    *,
    part: Part | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ProbeResult:
    """Fit softmax regression to frozen features and measure its mIoU on every labelled pixel of `val`.

    The fit is the minimum of a convex function, found by L-BFGS, so nothing depends on a schedule. Logits are brought
    to the size of the labels (bilinear, corners aligned). Classes that no training pixel has are never predicted.

    Args:
        backbone: catalog name, checkpoint folder, or a network with a `contract` that maps images to a map or maps.
        part: of a backbone given by name; None: "unet" where it has a decoder.
        progress: called with the images done and all of them.

    Raises:
        DataError: no labelled pixel to learn from, or to judge.
        BadFrame: an image or its labels cannot be used.
        CheckpointError: a 3D backbone, or one without the part asked for.
    """
    network = _as_network(backbone, part, device)
    steps = _counted(progress, len(train.ids()) + len(val.ids()))
    return _linear(network, _read(network, train, spec, "train", steps), val, spec, steps)


def knn_probe(
    backbone: str | Path | nn.Module,
    train: LabelledSource,
    val: LabelledSource,
    spec: ProbeSpec = ProbeSpec(),
    *,
    part: Part | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ProbeResult:
    """Name `spec.pixels` labelled pixels of `val` by the vote of their `spec.k` nearest among those of `train`.

    Nearest by cosine; the parts of a feature that come from different maps count equally. Arguments and errors are
    those of `linear_probe`.
    """
    network = _as_network(backbone, part, device)
    steps = _counted(progress, len(train.ids()) + len(val.ids()))
    return _knn(network, _read(network, train, spec, "train", steps), val, spec, steps)


def compare_probes(
    backbone: str,
    train: LabelledSource,
    val: LabelledSource,
    spec: ProbeSpec = ProbeSpec(),
    *,
    probes: Sequence[str] = PROBES,
    part: Part | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, dict[str, ProbeResult]]:
    """The probes of a backbone (catalog name or folder) and of its architecture with random weights.

    Returns {"random": {probe: result}, backbone: {probe: result}}. Arguments and errors are those of `linear_probe`.
    """
    for name in probes:
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    networks = {
        RANDOM: _load(backbone, part, device, pretrained=False, seed=spec.seed),
        backbone: _load(backbone, part, device),
    }
    steps = _counted(progress, 2 * (len(train.ids()) + len(probes) * len(val.ids())))
    results = {}
    for name, network in networks.items():
        samples = _read(network, train, spec, "train", steps)
        measure = {"linear": _linear, "knn": _knn}
        results[name] = {probe: measure[probe](network, samples, val, spec, steps) for probe in probes}
    return results


def fit_head(samples: Samples, *, penalty: float, iterations: int = 200) -> Head:
    """The least mean cross-entropy + penalty / 2 |weights|^2 over features of mean 0 and deviation 1 a channel.

    The head returned takes the features as they are.
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


def vote(bank: Samples, queries: Samples, *, k: int, temperature: float) -> Tensor:
    """The class of each query: the largest sum of exp(cosine / temperature) over its k nearest in the bank: [N]."""
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
    """Maps [1, C_k, h_k, w_k] read at `pixels` [N, 2] (row, column) of an image of `size`: float [N, sum of C_k]."""
    last = pixels.new_tensor([max(size[0] - 1, 1), max(size[1] - 1, 1)])
    grid = (pixels / last * 2 - 1).flip(-1)[None, None].to(maps[0])  # (x, y), the corners at -1 and 1
    read = [F.grid_sample(m, grid, mode="bilinear", padding_mode="border", align_corners=True)[0, :, 0] for m in maps]
    return torch.cat(read).T


@torch.no_grad()
def _read(network: nn.Module, source: LabelledSource, spec: ProbeSpec, what: str, steps: Iterator[None]) -> Samples:
    """Features at labelled pixels drawn for each image by the seed and its name, so its neighbors do not matter."""
    ids = source.ids()
    per_image = -(-spec.pixels // max(len(ids), 1))
    features, labels = [], []
    widths: tuple[int, ...] = ()
    for id in ids:
        maps, truth = _describe(network, source, id, spec)
        known = (truth > 0).nonzero()
        digest = hashlib.sha256(f"{spec.seed}\n{what}\n{id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        drawn = known[torch.randperm(len(known), generator=generator)[:per_image]]
        features.append(read_at(maps, drawn, (truth.shape[0], truth.shape[1])).cpu())
        labels.append(truth[drawn[:, 0], drawn[:, 1]])
        widths = tuple(m.shape[1] for m in maps)
        next(steps)
    if not sum(map(len, labels)):
        raise DataError(
            f"Source {source.name!r}, split {source.split!r}: no labelled pixel in {len(ids)} images; a probe needs "
            "images with labels of segmentation."
        )
    return Samples(torch.cat(features), torch.cat(labels), widths)


@torch.no_grad()
def _describe(network: nn.Module, source: LabelledSource, id: str, spec: ProbeSpec) -> tuple[list[Tensor], Tensor]:
    """The network's maps of an image, and its labels at their own size: int64 [H, W]."""
    labelled, contract = source.load(id), _contract(network)
    if labelled.semantic is None:
        raise DataError(f"{source.name}: image {id} has no labels of pixels; open the source for segmentation.")
    if spec.size is not None:
        contract = replace(contract, size=spec.size)
    image = contract.transforms()(labelled.image)[None].to(next(network.parameters()).device)
    out = network(image)
    maps = [out] if isinstance(out, Tensor) else list(out)
    return [m.float() for m in maps], torch.from_numpy(labelled.semantic.astype(np.int64))


def _linear(
    network: nn.Module, samples: Samples, val: LabelledSource, spec: ProbeSpec, steps: Iterator[None]
) -> ProbeResult:
    head = fit_head(samples, penalty=spec.penalty, iterations=spec.iterations)
    count = 1 + len(val.classes)
    confusion = np.zeros((count, count), np.int64)
    for id in val.ids():
        maps, truth = _describe(network, val, id, spec)
        confusion += confusion_matrix(truth, apply_head(head, maps, samples.widths, truth.shape), count)
        next(steps)
    return _result("linear", confusion, samples, val)


@torch.no_grad()
def apply_head(head: Head, maps: Sequence[Tensor], widths: Sequence[int], size: Sequence[int]) -> Tensor:
    """Classes [H, W] = `size` from maps [1, C_k, h_k, w_k]: each map's logits are enlarged, then summed."""
    logits = head.bias[:, None, None]
    for features, weight in zip(maps, head.weight.split(list(widths), dim=1), strict=True):
        part = F.conv2d(features, weight[:, :, None, None].to(features))
        logits = logits + F.interpolate(part, size=tuple(size), mode="bilinear", align_corners=True)[0].cpu()
    return head.classes[logits.argmax(0)]


def _knn(
    network: nn.Module, samples: Samples, val: LabelledSource, spec: ProbeSpec, steps: Iterator[None]
) -> ProbeResult:
    queries = _read(network, val, spec, "val", steps)
    predicted = vote(samples, queries, k=spec.k, temperature=spec.temperature)
    return _result("knn", confusion_matrix(queries.labels, predicted, 1 + len(val.classes)), samples, val)


def _directions(samples: Samples) -> Tensor:
    """Unit features in which each map has an equal part, whatever its scale and width."""
    return F.normalize(torch.cat([F.normalize(m) for m in samples.features.split(list(samples.widths), 1)], 1))


def _result(probe: str, confusion: np.ndarray, samples: Samples, val: LabelledSource) -> ProbeResult:
    if not confusion.sum():
        raise DataError(f"Source {val.name!r}, split {val.split!r}: no labelled pixel to judge the probe by.")
    return ProbeResult(probe, mean_iou(confusion), pixel_accuracy(confusion), confusion, *samples.features.shape)


def _as_network(backbone: str | Path | nn.Module, part: Part | None, device: torch.device | str) -> nn.Module:
    return backbone.to(device).eval() if isinstance(backbone, nn.Module) else _load(backbone, part, device)


def _load(
    backbone: str | Path, part: Part | None, device: torch.device | str, *, pretrained: bool = True, seed: int = 0
) -> nn.Module:
    """The network that gives the maps of `part`."""
    folder = hub.resolve(backbone, roles=lambda found: found.network_roles(decoder=part != "encoder"))
    found = read_checkpoint(folder)
    if not isinstance(found.contract, ImageContract):
        raise CheckpointError(f"{found.name!r} is a 3D backbone; the probes read images and accept 2D ones.")
    if part == "unet" and not has_decoder(found.arch):
        raise CheckpointError(f"{found.name!r} holds an encoder alone ({found.arch}); probe part='encoder'.")
    unet = has_decoder(found.arch) and part != "encoder"
    options: dict[str, Any] = {"decoder": True} if unet else {"out_indices": STAGES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_backbone(folder, pretrained=pretrained, device=device, **options)


def _contract(network: nn.Module) -> ImageContract:
    contract = getattr(network, "contract", None)
    if not isinstance(contract, ImageContract):
        raise CheckpointError(f"The network's contract is {contract!r}; the probes need an ImageContract.")
    return contract


def _counted(progress: Progress | None, total: int) -> Iterator[None]:
    """Each `next` reports one more image."""
    done = 0
    while True:
        done += 1
        if progress is not None:
            progress(done, total)
        yield
