"""Check labelled data, images or clouds: every file is read, and all that is wrong is told at once.

`check_labelled` finds files that cannot be used, images without labels and labels without images, labels of no class,
classes that never occur, and gives the share of each class. The check of RGB-D recordings is `source.check_source`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, some
from geo_pretrain.files import expanded
from geo_pretrain.training.data.check.own_clouds import SeenClouds
from geo_pretrain.training.data.check.report import Finding, Level
from geo_pretrain.training.data.labelled.clouds.folder import CloudFolder
from geo_pretrain.training.data.labelled.dataset import LabelledData, Task
from geo_pretrain.training.data.labelled.own_boxes import OF_ALL, OF_SPLIT, shared_images
from geo_pretrain.training.data.labelled.own_images import LABELLED, OwnImages, OwnOptions, stray_files
from geo_pretrain.training.data.labelled.registry import DATA_SETS, labelled_options, open_labelled
from geo_pretrain.training.data.labelled.shares import LabelTable, label_table, percent
from geo_pretrain.training.data.sources.registry import list_sources

SIZES = 3  # of images, that a finding names
COUNT = re.compile(r" (in|at) \d+ (pixels|points)")  # of a label, in the reason why a file cannot be used
Progress = Callable[[str, int, int, str], None]


@dataclass
class LabelledReport:
    """What was found in the splits of a labelled data set."""

    source: str
    path: str | None
    task: Task
    findings: list[Finding] = field(default_factory=list)
    tables: dict[str, LabelTable] = field(default_factory=dict)  # by split
    faults: dict[str, str] = field(default_factory=dict)  # every file that cannot be used -> why
    opened: dict[str, LabelledData] = field(default_factory=dict)  # the splits, to draw some of

    @property
    def level(self) -> Level:
        """The worst level of all findings."""
        return max((finding.level for finding in self.findings), default=Level.OK)

    def note(self, topic: str, level: Level, text: str, **numbers: Any) -> None:
        """Add a finding."""
        self.findings.append(Finding(topic, level, text, numbers=numbers))

    def fault_groups(self) -> dict[str, list[str]]:
        """The files that cannot be used by why: reasons that differ by counts or the file's own name are one."""
        groups: dict[str, list[str]] = {}
        for file, reason in self.faults.items():
            groups.setdefault(COUNT.sub("", reason.replace(f" {file!r}", "")), []).append(file)
        return groups

    def rows(self) -> list[tuple[str, str, *tuple[str, ...]]]:
        """The table for people: label, class, and the share in each split."""
        keys = {(row.key, row.name): None for table in self.tables.values() for row in table.rows}
        shares = [{row.key: percent(table.share(row)) for row in table.rows} for table in self.tables.values()]
        return [(key, name, *(found.get(key, "0 %") for found in shares)) for key, name in keys]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        classes = {
            split: [
                {"label": r.key, "class": r.name, "known": r.known, "count": r.count, "files": r.items}
                for r in table.rows
            ]
            for split, table in self.tables.items()
        }
        return {
            "source": self.source,
            "path": self.path,
            "task": self.task,
            "level": self.level.name.lower(),
            "findings": [
                {"topic": f.topic, "level": f.level.name.lower(), "text": f.text, **f.numbers} for f in self.findings
            ],
            "labels": classes,
            "unusable": self.faults,
        }


def labelled_task(source: str, path: str | None, task: str | None = None) -> Task | None:
    """The task whose labels a data set is checked for; None: it is RGB-D data.

    A `task` that is given is taken. Sources that are labelled data alone have the first of their tasks; "folder", which
    is also the plain layout of RGB-D recordings, is labelled where it has classes.txt or a JSON of objects.
    """
    if source not in DATA_SETS:
        return None
    tasks = DATA_SETS[source].tasks
    if task is not None:
        return cast(Task, task)  # the registry refuses what is none
    if source not in list_sources():
        return tasks[0]
    if source != "folder" or path is None:
        return None
    root = expanded(path)
    if (root / "classes.txt").is_file() or any((root / part / "images").is_dir() for part in ("", *LABELLED)):
        return "segmentation" if not _has_objects(root) or (root / "classes.txt").is_file() else "detection"
    return "detection" if _has_objects(root) else None


def _has_objects(root: Path) -> bool:
    """Whether a folder has a JSON of objects where one is looked for."""
    splits = (*LABELLED, "valid")
    files = [*OF_ALL, *(name.format(split=split) for split in splits for name in OF_SPLIT)]
    return any((root / name).is_file() for name in files)


def check_labelled(
    source: str,
    path: str | None,
    task: Task,
    options: Mapping[str, Any],
    progress: Progress = lambda *_: None,
) -> LabelledReport:
    """Read every file of both splits of a labelled data set. Raises `UnknownName`, `RecipeError` for wrong options."""
    settings = labelled_options(source, task, options)
    report = LabelledReport(source, path, task)
    for split in LABELLED:
        data = _opened(report, split, options)
        if data is None:
            continue
        report.opened[split] = data
        _read(report, split, data, options, progress)
        if isinstance(data, OwnImages):
            _strays(report, split, data.root, settings)
    _compare(report)
    return report


def _opened(report: LabelledReport, split: str, options: Mapping[str, Any]) -> LabelledData | None:
    """Open a split; what keeps it from being opened is a finding. Whether ids count from 1 keeps nothing from it."""
    path = None if report.path is None else Path(report.path)
    for more in ({}, {"first": 1}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # images without labels are a finding of their own
                data: LabelledData = open_labelled(
                    report.source, path, split, task=report.task, options={**options, **more}
                )
            return data
        except DataError as error:
            text = str(error)
            if text not in [finding.text for finding in report.findings]:
                report.note(split, Level.WRONG, text)
            if "data.options.first=0 or =1" not in text:
                break
    return None


def _read(
    report: LabelledReport, split: str, data: LabelledData, options: Mapping[str, Any], progress: Progress
) -> None:
    """Read all items: what is broken, how large they are, and the labels in them."""
    ids = data.ids()
    sizes: dict[str, int] = {}
    faults: dict[str, str] = {}
    clouds = SeenClouds()
    for number, id in enumerate(ids):
        progress(f"reading {split}", number, len(ids), "")
        try:
            item = data.load(id)
            sizes[_size(item)] = sizes.get(_size(item), 0) + 1
            if isinstance(data, CloudFolder):
                clouds.note(item)
        except BadFrame as bad:
            faults[bad.path] = bad.reason
            if isinstance(data, CloudFolder):  # a wrong unit is to be told beside labels of no class
                with suppress(BadFrame):
                    clouds.note(data.without_labels(id))
    progress(f"reading {split}", len(ids), len(ids), "")
    common = sorted(sizes, key=lambda size: -sizes[size])
    shown = some((f"{size} ({sizes[size]})" if len(common) > 1 else size for size in common), SIZES)
    text = f"{len(ids)} of {shown}" if sizes else f"none of {len(ids)} can be read"
    if clouds.points:
        text = f"{len(clouds.points)} {clouds}" if sizes else f"{text}: {clouds}"
    report.note(split, Level.OK if sizes else Level.WRONG, text, items=len(ids), sizes=sizes)
    if isinstance(data, CloudFolder):
        report.findings += clouds.findings(split, data.root / split, options)
    if faults:
        report.faults |= faults
        report.note(f"{split} files", Level.WRONG, f"{len(faults)} cannot be used (below)", unusable=len(faults))
    table = label_table(data, None)
    if table is None:
        return
    report.tables[split] = table
    for text in table.notes(options.get("ignore") or ()):
        if text not in [finding.text for finding in report.findings]:
            report.note("labels", Level.WRONG if table.unknown and text != table.note else Level.DOUBTFUL, text)


def _size(item: Any) -> str:
    """What an item is, in short: 480x360 of an image, or that it is a cloud."""
    image = getattr(item, "image", None)
    return "any size" if not isinstance(image, np.ndarray) else f"{image.shape[1]}x{image.shape[0]}"


def _strays(report: LabelledReport, split: str, root: Path, options: OwnOptions) -> None:
    """Note images without labels, and labels without images."""
    without, extra = stray_files(root, split, options)
    for paths, text in ((without, "without a label file, left out"), (extra, "label files without an image")):
        if paths:
            names = some((path.relative_to(root).as_posix() for path in paths), 5)
            report.note(f"{split} files", Level.DOUBTFUL, f"{len(paths)} {text}: {names}", files=list(map(str, paths)))


def _compare(report: LabelledReport) -> None:
    """Note classes that a split lacks, and images that are in both."""
    for split, table in report.tables.items():
        lacking = [row.name for row in table.rows if row.known and not row.count]
        if lacking:
            report.note(f"{split} labels", Level.DOUBTFUL, f"never occur: {some(lacking, 8)}")
    shared = shared_images(list(report.opened.values())) if len(report.opened) == len(LABELLED) else []
    if shared:
        names = some((path.name for path in shared), 5)
        report.note("splits", Level.WRONG, f"{len(shared)} images are in train and in val: {names}")
