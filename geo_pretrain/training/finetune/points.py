"""3D semantic segmentation on the clouds of labelled RGB-D frames: probes of frozen features, and fine-tuning.

A voxel has the commonest label of its points and is judged once, however many they are. The papers' protocols
(PointContrast, tables 4 and 7) segment whole scans; a frame's cloud is what a labelled RGB-D source offers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain import hub
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import CheckpointError, DataError, RecipeError, unknown
from geo_pretrain.geometry import centered, transform
from geo_pretrain.loading import load_backbone
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.data.labelled.registry import Subset
from geo_pretrain.training.data.labelled.rooms import LabelledRooms
from geo_pretrain.training.data.mining import resize_frame
from geo_pretrain.training.data.samples.clouds import random_rotation
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.data.surfaces.fusing import frame_cloud
from geo_pretrain.training.evaluation.cloud_matching import edge
from geo_pretrain.training.evaluation.metrics import best_class, confusion_matrix, mean_iou, pixel_accuracy
from geo_pretrain.training.evaluation.probes import (
    PROBES,
    RANDOM,
    Head,
    ProbeResult,
    ProbeSpec,
    Progress,
    Samples,
    fit_head,
    vote,
)
from geo_pretrain.training.finetune.in_memory import SegmentationResult
from geo_pretrain.training.recipe import OptimSpec
from geo_pretrain.training.schedule import learning_rate, set_bn_momentum


@dataclass(frozen=True)
class LabelledCloud:
    """The points that one frame sees, with labels."""

    id: str
    points: np.ndarray  # float32 [N, 3], world, z up, m
    colors: np.ndarray  # uint8 [N, 3]
    labels: np.ndarray  # int64 [N], 0 = unlabelled, 1..C


@dataclass(frozen=True)
class PointsSpec:
    """The budget of a 3D fine-tuning run, the same for every start; SGD as in PointContrast's segmentation."""

    steps: int = 100
    batch: int = 4  # clouds
    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.1
    weight_decay: float = 1e-4
    bn_momentum: float = 0.1  # the released 0.02 forgets the start's statistics in hundreds of steps only


def labelled_clouds(source: LabelledSource, size: tuple[int, int] | None = None) -> list[LabelledCloud]:
    """The cloud of every labelled frame of `source`, its images first sampled at `size` (None: their own).

    Raises `RecipeError` for a source whose labelled images have no depth; so far rooms alone has.
    """
    rooms = _rooms_of(source)
    clouds = []
    for id in source.ids():
        scene, _, frame_id = id.partition("/")
        frame, semantic = rooms.rooms.load(scene, frame_id), source.load(id).semantic
        if semantic is None:
            raise DataError(f"{source.name}: image {id} has no labels of pixels; open the source for segmentation.")
        frame = dataclasses.replace(frame, semantic=semantic.astype(np.int16))  # the classes of this source
        frame = frame if size is None else resize_frame(frame, size)
        cloud, labels = frame_cloud(frame), np.asarray(frame.semantic)[frame.depth > 0]
        if len(cloud):
            clouds.append(LabelledCloud(id, cloud.points, cloud.colors, labels.astype(np.int64)))
    return clouds


def linear_probe_points(
    network: nn.Module,
    contract: VoxelContract,
    train: Sequence[LabelledCloud],
    val: Sequence[LabelledCloud],
    classes: int,
    spec: ProbeSpec = ProbeSpec(),
    *,
    progress: Progress | None = None,
) -> ProbeResult:
    """Fit softmax regression to frozen voxel features and measure its mIoU on every labelled voxel of `val`.

    Features are those of `voxel_features`. The fit is that of the 2D probe: the minimum of a convex function.

    Args:
        network: an `SRUNet`, or any network from voxels to voxels with a parameter.
        classes: C, without the unlabelled.
        spec: `pixels` counts voxels; `size` is not used.

    Raises:
        DataError: no labelled voxel to learn from, or to judge.
    """
    network.eval()
    steps = _counted(progress, len(train) + len(val))
    samples = _read(network, contract, train, spec, "train", steps)
    return _probe("linear", network, contract, samples, val, classes, spec, steps)


def compare_point_probes(
    backbone: str | Path,
    train: LabelledSource,
    val: LabelledSource,
    spec: ProbeSpec = ProbeSpec(),
    *,
    probes: Sequence[str] = PROBES,
    progress: Progress | None = None,
) -> dict[str, dict[str, ProbeResult]]:
    """The probes of a 3D backbone (catalog name or folder) and of its architecture with random weights.

    Returns {"random": {probe: result}, backbone: {probe: result}} as `probes.compare_probes` does for 2D ones.

    Raises:
        CheckpointError: a 2D backbone, or one that RGB-D frames cannot feed.
        RecipeError: a source without depth.
    """
    for name in probes:
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    folder = hub.resolve(backbone)
    contract = voxel_contract_of(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        twin = load_backbone(folder, pretrained=False)
    networks = {RANDOM: twin, str(backbone): load_backbone(folder)}
    seen, unseen = labelled_clouds(train, spec.size), labelled_clouds(val, spec.size)
    steps = _counted(progress, 2 * (len(seen) + len(probes) * len(unseen)))
    results = {}
    for name, network in networks.items():
        samples = _read(network, contract, seen, spec, "train", steps)
        results[name] = {
            probe: _probe(probe, network, contract, samples, unseen, len(val.classes), spec, steps) for probe in probes
        }
    return results


def segmentation_srunet(start: SRUNet, classes: int, *, seed: int, transfer: bool = True) -> SRUNet:
    """A U-Net shaped like `start` whose last layer gives `classes` logits.

    All other weights are those of `start` or, without `transfer`, drawn by `seed`, like the last layer: the same ones
    whatever is transferred.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SRUNet(
            start.variant,
            in_chans=start.in_chans,
            out_chans=classes,
            width=start.width,
            stem_kernel=start.conv0p1s1.kernel_size,
            planes=start.planes,
            layers=start.layers,
        )
    if transfer:
        kept = {key: value for key, value in start.state_dict().items() if not key.startswith("final.")}
        network.load_state_dict(network.state_dict() | kept)
    return network


def finetune_points(
    network: nn.Module,
    contract: VoxelContract,
    train: Sequence[LabelledCloud],
    val: Sequence[LabelledCloud],
    spec: PointsSpec = PointsSpec(),
    *,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> SegmentationResult:
    """Train `network` (logits [N, 1 + C] of voxels) on labelled clouds and measure it on others, as they lie.

    SGD, poly schedule, cross-entropy over the labelled voxels of a batch, the last state measured. In training every
    cloud is turned upright about its centroid (any angle about z, +-pi/64 about x and y). The seed draws order and
    turns.
    """
    if not train:
        raise DataError("No labelled cloud to train on.")
    generator = torch.Generator().manual_seed(sample_seed(seed, 0, 0))
    optim = OptimSpec(batch=spec.batch, lr=spec.lr, steps=spec.steps)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=spec.lr,
        momentum=spec.momentum,
        dampening=spec.dampening,
        weight_decay=spec.weight_decay,
    )
    network.train()
    set_bn_momentum(network, spec.bn_momentum)
    losses = []
    order = torch.empty(0, dtype=torch.long)
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, spec.steps)
        while len(order) < spec.batch:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        chosen, order = order[: spec.batch].tolist(), order[spec.batch :]
        x, y = _batch([voxels_of(train[k], contract, generator) for k in chosen], network)
        optimizer.zero_grad(set_to_none=True)
        logits: Tensor = network(x).feats.float()
        known = y > 0  # a mean over no voxel at all would be NaN
        loss = F.cross_entropy(logits[known], y[known]) if known.any() else logits.sum() * 0
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    confusion = evaluate_points(network, contract, val)
    return SegmentationResult(mean_iou(confusion), confusion, tuple(losses))


@torch.no_grad()
def evaluate_points(network: nn.Module, contract: VoxelContract, clouds: Sequence[LabelledCloud]) -> np.ndarray:
    """The confusion matrix of a network over the labelled voxels of clouds as they lie: int64 [1 + C, 1 + C]."""
    network.eval()
    total: np.ndarray | None = None
    for cloud in clouds:
        x, truth = _batch([voxels_of(cloud, contract)], network)
        logits: Tensor = network(x).feats.float()
        matrix = confusion_matrix(truth, best_class(logits), logits.shape[1])
        total = matrix if total is None else total + matrix
    if total is None or not total.sum():
        raise DataError("No labelled cloud to evaluate on.")
    return total


def voxels_of(
    cloud: LabelledCloud, contract: VoxelContract, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The voxels of a cloud: coords int32 [n, 4], feats [n, C] as `contract` says, labels int64 [n].

    `generator` draws the upright turn of training; None leaves the cloud as it lies.
    """
    edge(contract)  # refuses what RGB-D frames cannot be made into
    points = torch.from_numpy(cloud.points)
    if generator is not None:
        world = points.double()
        points = transform(world, random_rotation(generator, "upright") @ centered(world)).float()
    voxels = contract.transforms()(points, torch.from_numpy(cloud.colors) if contract.given_channels else None)
    return voxels.coords, voxels.feats, commonest(torch.from_numpy(cloud.labels), voxels.inverse, len(voxels.coords))


def commonest(labels: Tensor, inverse: Tensor, count: int) -> Tensor:
    """The commonest known label (above 0) among the points [N] of each of `count` voxels: int64 [count].

    The smallest of equally common ones; 0 where no point's label is known. `inverse` [N]: the voxel of each point.
    """
    classes = int(labels.max()) + 1 if len(labels) else 1
    votes = torch.bincount(inverse * classes + labels, minlength=count * classes).reshape(count, classes)
    votes[:, 0] = 0
    return votes.argmax(dim=1)  # the first of equal ones: 0 where there is none


@torch.no_grad()
def voxel_features(network: nn.Module, x: SparseTensor) -> Tensor:
    """Features of every voxel of `x`: float32 [N, C], on the CPU.

    Of an `SRUNet` the finest map before its last layer, `block8` (96 channels at the real width): what fine-tuning
    keeps. Of other networks their output.
    """
    found: SparseTensor = network.pyramid(x)[0] if isinstance(network, SRUNet) else network(x)
    return found.feats.float().cpu()


def voxel_contract_of(folder: Path) -> VoxelContract:
    """The contract of a 3D backbone's folder. Raises `CheckpointError` for a 2D one."""
    found = read_checkpoint(folder)
    if not isinstance(found.contract, VoxelContract):
        raise CheckpointError(f"{found.name!r} is a 2D backbone; this measures 3D ones.")
    edge(found.contract)
    return found.contract


def _rooms_of(source: LabelledSource) -> LabelledRooms:
    inner: Any = source
    while isinstance(inner, Subset):
        inner = inner.source
    if not isinstance(inner, LabelledRooms):
        raise RecipeError(f"Source {source.name!r} has no depth beside its labels; 3D networks accept: rooms.")
    return inner


def _batch(clouds: Sequence[tuple[Tensor, Tensor, Tensor]], network: nn.Module) -> tuple[SparseTensor, Tensor]:
    """Voxels of several clouds as one tensor, with their labels [N], where the network is."""
    device = next(network.parameters()).device
    rows = []
    for number, (coords, _, _) in enumerate(clouds):
        coords = coords.clone()
        coords[:, 0] = number
        rows.append(coords)
    feats, labels = (torch.cat([cloud[column] for cloud in clouds]) for column in (1, 2))
    return SparseTensor(torch.cat(rows).to(device), feats.to(device)), labels.to(device)


def _read(
    network: nn.Module,
    contract: VoxelContract,
    clouds: Sequence[LabelledCloud],
    spec: ProbeSpec,
    what: str,
    steps: Iterator[None],
) -> Samples:
    """Features of labelled voxels drawn for each cloud by the seed and its name, so its neighbors do not matter."""
    per_cloud = -(-spec.pixels // max(len(clouds), 1))
    features, labels = [], []
    for cloud in clouds:
        x, truth = _batch([voxels_of(cloud, contract)], network)
        truth = truth.cpu()
        known = (truth > 0).nonzero()[:, 0]
        digest = hashlib.sha256(f"{spec.seed}\n{what}\n{cloud.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        drawn = known[torch.randperm(len(known), generator=generator)[:per_cloud]]
        features.append(voxel_features(network, x)[drawn])
        labels.append(truth[drawn])
        next(steps)
    if not sum(map(len, labels)):
        raise DataError(f"No labelled voxel in {len(clouds)} clouds; a probe needs frames with labels.")
    joined = torch.cat(features)
    return Samples(joined, torch.cat(labels), (joined.shape[1],))


def _probe(
    probe: str,
    network: nn.Module,
    contract: VoxelContract,
    samples: Samples,
    val: Sequence[LabelledCloud],
    classes: int,
    spec: ProbeSpec,
    steps: Iterator[None],
) -> ProbeResult:
    if probe == "knn":
        queries = _read(network, contract, val, spec, "val", steps)
        named = vote(samples, queries, k=spec.k, temperature=spec.temperature)
        confusion = confusion_matrix(queries.labels, named, 1 + classes)
    else:
        head = fit_head(samples, penalty=spec.penalty, iterations=spec.iterations)
        confusion = np.zeros((1 + classes, 1 + classes), np.int64)
        for cloud in val:
            x, truth = _batch([voxels_of(cloud, contract)], network)
            confusion += confusion_matrix(truth.cpu(), _apply(head, voxel_features(network, x)), 1 + classes)
            next(steps)
    if not confusion.sum():
        raise DataError("No labelled voxel to judge the probe by.")
    return ProbeResult(probe, mean_iou(confusion), pixel_accuracy(confusion), confusion, *samples.features.shape)


def _apply(head: Head, features: Tensor) -> Tensor:
    """The class of each row: int64 [N]."""
    return head.classes[F.linear(features, head.weight, head.bias).argmax(dim=1)]


def _counted(progress: Progress | None, total: int) -> Iterator[None]:
    """Each `next` reports one more cloud."""
    done = 0
    while True:
        done += 1
        if progress is not None:
            progress(done, total)
        yield
