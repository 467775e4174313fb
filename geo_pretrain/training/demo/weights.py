"""What finished weights can do, about a minute on a CPU: on rooms that nobody trained on, beside random weights.

Pixels are matched between two views. Labels of two frames of a room are carried to its other frames by the nearest
features. Features are drawn as colors, on two views and on the room's points; those of a network for points, too.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geo_pretrain import hub
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.catalog import find
from geo_pretrain.catalog.entry import how_to_install
from geo_pretrain.checkpoint import Checkpoint
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import CheckpointError, HubError
from geo_pretrain.hub.cache import folders_here
from geo_pretrain.hub.packages import packages_with
from geo_pretrain.progress import Report, stage_of
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.frame import Pair, SkippedFrames, Surface
from geo_pretrain.training.data.labelled.rooms import LabelledRooms
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.evaluation.features import (
    RANDOM,
    CloudExtractor,
    EncoderMaps,
    Features,
    ImageExtractor,
    deep_maps,
    load_extractor,
)
from geo_pretrain.training.evaluation.matching import THRESHOLDS, evaluate_matching, match_pair
from geo_pretrain.training.evaluation.metrics import Interval, Spread, paired_difference
from geo_pretrain.training.evaluation.probe_data import ImageData, Samples
from geo_pretrain.training.evaluation.probes import ProbeSpec, draw_samples, knn_predict, run_probes
from geo_pretrain.training.evaluation.progress import counted
from geo_pretrain.training.initialize import imagenet_file, initialize_encoder
from geo_pretrain.training.recipe import DataSpec, ModelSpec
from geo_pretrain.training.visualize.cloud_layers import spacing
from geo_pretrain.training.visualize.colors import class_colors, shared_pca
from geo_pretrain.training.visualize.common import paint
from geo_pretrain.training.visualize.points import TOP
from geo_pretrain.training.visualize.strip import cloud_column, match_column, save_strip, stacked

NAME = "pri3d_view_r18.rooms"  # the weights for images that this project ships
POINT_NAME = "csc_srunet34.rooms"  # those for points
IMAGENET = "ImageNet"
THRESHOLD = THRESHOLDS["px"]
PICTURE = "weights.png"
POINTS = 250_000  # of the room that is drawn


@dataclass(frozen=True)
class Setting:
    """The rooms to look at, and how much of them is measured."""

    seed: int = 2026  # recipes train on rooms of seed 0
    rooms: int = 8
    frames: int = 6  # of a room
    pairs: int = 3  # of a room
    labelled: int = 2  # frames of a room whose labels are given; its others get theirs from them
    size: tuple[int, int] = (240, 320)  # height, width of the frames
    overlap: tuple[float, float] = (0.3, 1.0)  # of the views of a pair
    probe: ProbeSpec = ProbeSpec(pixels=8000)  # of k-NN prediction

    def config(self) -> RoomsConfig:
        """What to render."""
        height, width = self.size
        return RoomsConfig(self.seed, self.rooms, self.frames, width, height, split="val")


@dataclass(frozen=True)
class Scores:
    """The scores of one network, each from 0 to 1."""

    recall: tuple[float, ...]  # of each pair: share of pixels whose nearest feature is right
    scenes: tuple[str, ...]  # of each pair
    accuracy: tuple[float, ...]  # of each room: share of pixels that get the right label
    miou: tuple[float, ...]  # of each room, over the classes that it has

    def by_room(self) -> Spread:
        """The recall of each room."""
        rooms = dict.fromkeys(self.scenes)
        values = [[r for r, scene in zip(self.recall, self.scenes, strict=True) if scene == room] for room in rooms]
        return Spread(tuple(float(np.mean(each)) for each in values))


@dataclass(frozen=True)
class Shown:
    """What weights gave on rooms that nobody trained on, and the columns of their picture."""

    name: str  # as given
    scores: dict[str, Scores]  # random weights, ImageNet's where they are at hand, `name`
    chance: float  # recall of a cell drawn at random
    setting: Setting
    # "matches", "features", "labels" where they gain, "points", "points, 3D" where such weights are at hand
    columns: tuple[tuple[str, Image.Image], ...]
    installed: bool  # the name loads in any folder, without a network
    seconds: float

    @property
    def ours(self) -> Scores:
        """The scores of the weights that are shown."""
        return self.scores[self.name]

    @property
    def gain(self) -> Interval:
        """How far their recall lies above that of random weights, on the same pairs."""
        return paired_difference(self.ours.recall, self.scores[RANDOM].recall, self.ours.scenes)

    @property
    def label_gain(self) -> Interval:
        """The same of the share of pixels that get the right label, in the same rooms."""
        rooms = list(dict.fromkeys(self.ours.scenes))
        return paired_difference(self.ours.accuracy, self.scores[RANDOM].accuracy, rooms)


def find_weights(name: str) -> Checkpoint:
    """Bring the network of a name or folder without a network connection.

    Raises `HubError` where it is not on this machine, `CheckpointError` for a folder that is none or takes no images.
    """
    opened = hub.open(name, local_files_only=True)
    if not isinstance(opened.contract, ImageContract):
        raise CheckpointError(f"{name!r} takes {opened.contract}; accepted: a backbone for images, such as {NAME!r}.")
    return opened.fetch(*opened.network_roles(), optional=("recipe",))


def find_point_network() -> CloudExtractor | None:
    """Load the shipped network for points, if it is on this machine."""
    try:
        opened = hub.open(POINT_NAME, local_files_only=True)
        folder = opened.fetch(*opened.network_roles()).folder
    except HubError:
        return None
    return cast(CloudExtractor, load_extractor(folder))


def why_missing(name: str, error: HubError) -> str:
    """What to say where a name is not on this machine: what to install; of damaged files what is wrong with them."""
    hubs = [place.strip() for place in os.environ.get(hub.HUB_VARIABLE, "").split(",") if place.strip()]
    if packages_with(name) or any((Path(place) / name).is_dir() for place in hubs):
        return str(error)
    entry = find(name)
    packages = () if entry is None else entry.packages
    if not packages:
        return f"{name}: this version has no weights of that name to install."
    return f"{name} is not on this machine. Install it: {how_to_install(packages[0])}."


def show_weights(
    name: str, out: Path | None, *, setting: Setting = Setting(), report: Report = lambda *_: None
) -> Shown:
    """Measure and draw the weights of a name or folder beside random ones; `out`/weights.png is the picture.

    ImageNet's weights of the same encoder are measured, too, where torch has them in its cache. Raises as
    `find_weights`, before anything is rendered.
    """
    began = time.monotonic()
    checkpoint, point_network = find_weights(name), find_point_network()
    rooms = Rooms(setting.config())
    rooms.prepare(stage_of(report, "rendering rooms", f"{setting.size[0]}x{setting.size[1]}"))
    spec = DataSpec("rooms", size=setting.size, overlap=setting.overlap, max_pairs_per_scene=setting.pairs)
    pairs = find_pairs(rooms, spec, skips=SkippedFrames())
    networks, scores, chance = _networks(name, checkpoint, setting), {}, 0.0
    for title, extractor in networks.items():
        scores[title], chance = _measure(extractor, rooms, pairs, setting, stage_of(report, "measuring", title))
    shown = Shown(name, scores, chance, setting, (), checkpoint.name in folders_here(hubs=False), 0.0)
    typical = pairs[int(np.argsort(shown.ours.recall, kind="stable")[len(shown.ours.recall) // 2])]  # no better than the numbers
    drawn = _columns(networks[name], point_network, rooms, typical, setting, labels=shown.label_gain.low > 0)
    columns = tuple(drawn)
    if out is not None:
        save_strip(columns, out / PICTURE)
    return replace(shown, columns=columns, seconds=round(time.monotonic() - began, 1))


class _Remembering(ImageExtractor):
    """Runs the network once for each frame of a room: matching and labels read the same maps."""

    def __init__(self, network: Any, contract: ImageContract, frames: int) -> None:
        super().__init__(network, contract)
        self.frames, self.latest = frames, OrderedDict[bytes, list[Tensor]]()

    @torch.no_grad()
    def maps(self, image: np.ndarray, *, resize: bool = False) -> list[Tensor]:
        key = image.tobytes()
        if key not in self.latest:
            self.latest[key] = super().maps(image, resize=resize)
            if len(self.latest) > self.frames:
                self.latest.popitem(last=False)
        return self.latest[key]


def _networks(name: str, checkpoint: Checkpoint, setting: Setting) -> dict[str, _Remembering]:
    """Random weights, ImageNet's where they are at hand, and those of `name`, for images of the setting's size."""
    networks = {
        RANDOM: load_extractor(checkpoint.folder, random_init=True).network,
        IMAGENET: _imagenet(checkpoint),
        name: load_extractor(checkpoint.folder).network,
    }
    contract = replace(cast(ImageContract, checkpoint.contract), size=setting.size)
    return {title: _Remembering(net, contract, setting.frames) for title, net in networks.items() if net is not None}


def _imagenet(checkpoint: Checkpoint) -> EncoderMaps | None:
    """The maps of the checkpoint's ResNet with torchvision's ImageNet weights; None where torch's cache lacks them."""
    encoder = f"resnet{checkpoint.arch.args.get('depth')}"
    if not checkpoint.arch.name.startswith("resnet") or not imagenet_file(encoder).is_file():
        return None
    network = build_encoder(encoder, out_indices=deep_maps(checkpoint.arch))
    initialize_encoder(network, ModelSpec(encoder=encoder, init="imagenet"))
    return EncoderMaps(network)


def _measure(
    extractor: ImageExtractor, rooms: Rooms, pairs: list[Pair], setting: Setting, progress: Callable[[int, int], None]
) -> tuple[Scores, float]:
    """Measure matching and labels room by room; also the recall of chance."""
    recall: list[float] = []
    measured: list[str] = []
    labels, chance = [], 0.0
    scenes = list(dict.fromkeys(pair.scene for pair in pairs))
    for number, scene in enumerate(scenes):
        progress(number, len(scenes))
        own = [pair for pair in pairs if pair.scene == scene]
        matching = evaluate_matching(extractor, rooms, own, size=setting.size, threshold=THRESHOLD)
        recall += matching.per_pair
        measured += matching.scenes
        chance = matching.chance
        labels.append(run_probes(["knn"], *_labelled(extractor, rooms, scene, setting), setting.probe)["knn"])
    progress(len(scenes), len(scenes))
    accuracy, miou = tuple(one.accuracy for one in labels), tuple(one.miou for one in labels)
    return Scores(tuple(recall), tuple(measured), accuracy, miou), chance


def _labelled(extractor: ImageExtractor, rooms: Rooms, scene: str, setting: Setting) -> tuple[ImageData, ImageData]:
    """The frames of a room whose labels are given, evenly spaced in time, and its other frames."""
    given, others = (
        ImageData(extractor, LabelledRooms(rooms, rooms.config.split, "segmentation", labelled=count, coarse=True))
        for count in (setting.labelled, setting.frames)
    )
    given.ids = [id for id in given.ids if given.source.scene_of(id) == scene]
    others.ids = [id for id in others.ids if others.source.scene_of(id) == scene and id not in given.ids]
    return given, others


def _columns(
    extractor: ImageExtractor,
    point_network: CloudExtractor | None,
    rooms: Rooms,
    pair: Pair,
    setting: Setting,
    *,
    labels: bool,
) -> list[tuple[str, Image.Image]]:
    """The columns of the picture; features of pixels share one color space, in both views and on the points."""
    matches = match_pair(extractor, rooms, pair, size=setting.size)
    surface, cloud = _lifted(extractor, rooms, pair.scene)
    views = [extractor.extract_frame(frame) for frame in matches.frames]
    colors = shared_pca([view.unit() for view in views] + [cloud.unit()])
    above, below = (paint(color, view.index) for color, view in zip(colors[:-1], views, strict=True))
    columns = [("matches", match_column(matches, THRESHOLD)), ("features", stacked(above, below))]
    if labels:
        columns.append(("labels", _label_column(extractor, rooms, pair, setting)))
    seen = cloud.index >= 0
    height = surface.points[:, 2]
    seen &= height <= height.min() + TOP * (height.max() - height.min())  # ceilings hide what is below them
    points, painted = surface.points[seen], colors[-1][cloud.index[seen]]
    columns.append(("points", cloud_column(points, painted, spacing(points))))
    if point_network is not None:
        of_points = point_network.extract_surface(surface, [])
        (painted,) = shared_pca([of_points.unit()])
        columns.append(("points, 3D", cloud_column(points, painted[of_points.index[seen]], spacing(points))))
    return columns


def _label_column(extractor: ImageExtractor, rooms: Rooms, pair: Pair, setting: Setting) -> Image.Image:
    """The true labels of a frame, of the pair if it has one without given labels, and below them those carried to it."""
    given, others = _labelled(extractor, rooms, pair.scene, setting)
    bank = draw_samples(given, setting.probe, "train", counted(None, len(given.ids)))
    views = [f"{pair.scene}/{frame}" for frame in (pair.frame1, pair.frame2)]
    (features,), truth = others.load(next((id for id in views if id in others.ids), others.ids[0]))
    cells = Samples(features[0].flatten(1).T, bank.labels, bank.widths)
    carried = knn_predict(bank, cells, k=setting.probe.k, temperature=setting.probe.temperature)
    return stacked(*(class_colors(ids.numpy()) for ids in (truth, carried.reshape(features.shape[2:]))))


def _lifted(extractor: ImageExtractor, rooms: Rooms, scene: str) -> tuple[Surface, Features]:
    """Points of a room, and the mean features of the pixels that see them."""
    whole = rooms.surface(scene)
    chosen = np.random.default_rng(0).permutation(len(whole))[:POINTS]
    surface = Surface(whole.points[chosen], whole.colors[chosen])
    return surface, extractor.extract_surface(surface, [rooms.load(scene, id) for id in rooms.frame_ids(scene)])
