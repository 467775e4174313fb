"""The questions that lead to a checkpoint: what comes out, what goes in, which license; in the catalog's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geo_pretrain.cards.front_matter import SENSORS
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import Entry
from geo_pretrain.catalog.license import LICENSE_GROUPS, check_license
from geo_pretrain.errors import UnknownName, unknown

ANY, PERMISSIVE, NON_COMMERCIAL = "any", "permissive", "non-commercial"
LICENSES = (ANY, PERMISSIVE, NON_COMMERCIAL)  # beside identifiers
LIDAR = "lidar"

# task -> what the catalog calls it, by modality; no paper states numbers of those that no entry has
TASKS: Mapping[str, Mapping[str, str]] = {
    "segmentation": {"2d": "semantic segmentation", "3d": "3D semantic segmentation"},
    "instances": {"2d": "instance segmentation", "3d": "3D instance segmentation"},
    "detection": {"2d": "object detection", "3d": "3D object detection"},
    "classification": {"2d": "classification", "3d": "classification"},
    "parts": {"3d": "part segmentation"},
    "matching": {"2d": "matching", "3d": "matching"},
    "depth": {"2d": "depth"},
}


@dataclass(frozen=True)
class Input:
    """What somebody has: in words, the modalities of networks that take it, the channels it can give."""

    words: str
    modalities: tuple[str, ...]
    channels: frozenset[str]

    def fits(self, entry: Entry) -> bool:
        """Whether the network takes this input: its modality, and no channel that is not there."""
        contract = entry.contract
        given = contract.channels if entry.modality == "2d" else getattr(contract, "given_channels", ())
        return entry.modality in self.modalities and self.channels.issuperset(given)


COLORS = frozenset("RGB")
INPUTS: Mapping[str, Input] = {
    "rgb": Input("color images", ("2d",), COLORS),
    "rgb-d": Input("color images with depth", ("2d", "3d"), COLORS),
    "depth": Input("depth images without color, as points", ("3d",), frozenset()),
    "points": Input("point clouds without color", ("3d",), frozenset()),
    "colored-points": Input("point clouds with color", ("3d",), COLORS),
    LIDAR: Input("LiDAR sweeps with intensity", ("3d",), frozenset({"intensity"})),
}


@dataclass(frozen=True)
class Question:
    """One question, checked when it is built."""

    task: str
    input: str
    license: str = ANY
    like: str | None = None  # the benchmark whose data is most like one's own
    network: str = ""  # part of a network's title, such as "ResNet-18"

    def __post_init__(self) -> None:
        for kind, value, accepted in (("task", self.task, TASKS), ("input", self.input, INPUTS)):
            if value not in accepted:
                raise unknown(kind, value, accepted, f"Accepted: {', '.join(accepted)}.")
        if self.license not in LICENSES:
            try:
                check_license(self.license)
            except UnknownName as error:
                raise UnknownName(f"{error} Accepted beside these: {', '.join(LICENSES)}.") from None
        if not self.modalities:
            fitting = [name for name, kind in INPUTS.items() if set(kind.modalities) & set(TASKS[self.task])]
            raise UnknownName(
                f"No network for {self.task} takes {INPUTS[self.input].words}. Accepted with {self.task}: "
                f"{', '.join(fitting)}."
            )
        titles = dict.fromkeys(e.arch.title for e in CATALOG.values() if e.modality in self.modalities)
        if not any(plain(self.network) in plain(title) for title in titles):
            raise unknown("network", self.network, titles, f"Accepted: a part of {', '.join(titles)}.")
        known = self.datasets()
        same = {dataset.lower(): dataset for dataset in known}
        object.__setattr__(self, "like", same.get((self.like or "").lower(), self.like))
        if self.like is not None and self.like not in known:
            if not known:
                raise UnknownName(f"No paper reports {self.task} on {self.like!r} or on any other data; drop it.")
            raise unknown("benchmark", self.like, known, f"Accepted for {self.task}: {', '.join(known)}.")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of networks that take this input and can learn this task."""
        return tuple(modality for modality in INPUTS[self.input].modalities if modality in TASKS[self.task])

    def datasets(self) -> list[str]:
        """The data sets on which papers report the task."""
        wanted = {(modality, TASKS[self.task][modality]) for modality in self.modalities}
        reported = (r.dataset for e in CATALOG.values() for r in e.results if (e.modality, r.task) in wanted)
        return list(dict.fromkeys(reported))

    def allows(self, license: str) -> bool:
        """Whether weights under this license may be used: "non-commercial" accepts permissive ones, too."""
        if self.license == ANY:
            return True
        groups = {PERMISSIVE: (PERMISSIVE,), NON_COMMERCIAL: (PERMISSIVE, NON_COMMERCIAL)}
        if self.license not in groups:
            return license == self.license
        return any(license in LICENSE_GROUPS[group] for group in groups[self.license])

    @property
    def terms(self) -> str:
        """The license that was asked for, to stand after "under"."""
        words = {ANY: "any license", PERMISSIVE: "a permissive license", NON_COMMERCIAL: "a non-commercial license"}
        return words.get(self.license, f"the license {self.license}")

    def same_sensor(self, entry: Entry) -> bool:
        """Whether the entry saw what this input's sensor sees; told apart for LiDAR alone."""
        return self.input != LIDAR or SENSORS.get(entry.data) == LIDAR


def plain(title: str) -> str:
    """Lower case, letters and digits alone: "ResNet-18 U-Net" -> "resnet18unet"."""
    return "".join(filter(str.isalnum, title.lower()))


def license_words(license: str) -> str:
    """A license for newcomers: "MIT (permissive)", "ScanNet-ToU (non-commercial)"."""
    group = next((group for group, members in LICENSE_GROUPS.items() if license in members), "see its terms")
    return f"{license.removeprefix('LicenseRef-')} ({group})"
