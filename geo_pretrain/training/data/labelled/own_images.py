"""Your own labelled images as a source: images, label PNGs with the same names, and a `classes.txt`.

The twin of `clouds.folder`. Detection in the same folder is `own_boxes`. See docs/own_images.md.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, some
from geo_pretrain.training.checks import Accepts, Checks, Ranged, Seed
from geo_pretrain.training.data import files
from geo_pretrain.training.data.files import read_listing, read_photo
from geo_pretrain.training.data.labelled.folders import Folder, Item
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.data.labelled.mapping import LARGEST
from geo_pretrain.training.data.labelled.own_classes import BITS, FIRST_1, ImageClasses, read_image_classes
from geo_pretrain.training.data.labelled.shares import names_alone_note

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
LAYOUT = (
    "classes.txt with {train,val}/images/NAME.jpg and {train,val}/labels/NAME.png; or images/NAME.jpg and "
    "labels/NAME.png with lists train.txt and val.txt, or without lists, of which data.options.val_share validates"
)
LABELLED = ("train", "val")  # images of other splits need no labels
LOOKED_AT = 64  # label files that tell whether ids count from 0 or from 1
ValShare = Annotated[float, Accepts(lambda share: 0 < share < 1, "above 0 and below 1")]


@dataclass(frozen=True)
class OwnOptions(Ranged):
    """Options of your own images. Paths are below the folder; `{split}` in them stands for train or val."""

    section = "data.options."

    classes: str | None = None  # another file than classes.txt
    images: str | None = None  # another folder than {split}/images or images
    labels: str | None = None  # another folder than {split}/labels or labels
    label_suffix: str = ""  # of a label's name after that of its image: "_mask" for NAME_mask.png
    annotations: str | None = None  # detection: the JSON file, if it is called otherwise than docs/own_images.md says
    ignore: tuple[int, ...] = ()  # ids of no class, besides 0 and 255
    void: tuple[str, ...] = ()  # names in classes.txt that are no classes: ignored
    first: Literal[0, 1] | None = None  # id of the first name, where classes.txt has names alone; None: 1, if certain
    val_share: ValShare = 0.2  # without lists or folders of splits: the share of the images that validates
    seed: Seed = 0  # chooses these
    scene: Literal["file", "folder"] = "file"  # what stays together in subsets and in `val_share`

    def check_settings(self, check: Checks) -> None:
        """Note options that cannot be."""
        wrong = [id for id in self.ignore if not 0 <= id < LARGEST]
        check(not wrong, "data.options.ignore", list(self.ignore), f"ids of files, from 0 to {LARGEST - 1}")
        for key in ("images", "labels", "annotations"):
            path = Path(getattr(self, key) or "")
            inside = not path.is_absolute() and ".." not in path.parts
            check(inside, f"data.options.{key}", str(path), "a path below the folder")


class OwnImages(Folder):
    """A split of a folder of labelled images, for segmentation; images of other splits than train and val need none.

    `guessed`: whether that ids count from 1 is a guess, for the list of classes has names alone.
    """

    counted = "pixels"

    def __init__(
        self,
        split: str,
        root: Path,
        items: Sequence[Item],
        classes: ImageClasses | None,
        labelled: bool,
        guessed: bool = False,
    ) -> None:
        found, self.guessed = classes or ImageClasses((), {}, {}), guessed
        super().__init__("folder", split, root, items, found.label_map())
        self.image_classes, self._labelled = found, labelled
        self.colors, self.file_ids = found.palette(), found.file_ids()

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of the files, and of the classes."""
        return hashlib.sha256(f"{super().fingerprint()}\n{self.image_classes}".encode()).hexdigest()

    def load(self, id: str) -> LabelledImage:
        """Read one image and its labels. Raises `BadFrame`; an image is turned as its EXIF data say."""
        item = self._item(id)
        if not self._labelled:
            return LabelledImage(id, read_photo(item.image), None, None)
        found = self.image_classes.read(item.annotation)
        image = read_photo(item.image, found.shape)
        if image.shape[:2] != found.shape:
            given, expected = (f"{shape[1]}x{shape[0]}" for shape in (found.shape, image.shape))
            raise BadFrame(item.annotation, f"annotation is {given}, the image {expected}")
        return LabelledImage(id, image, found, None)

    def label_keys(self) -> Mapping[str, int]:
        return self.image_classes.keys()

    def label_counts(self, id: str) -> Mapping[str, int]:
        return self.image_classes.counts(self._item(id).annotation)

    def label_note(self, shares: Mapping[str, float]) -> str | None:
        if self.image_classes.counted and self.image_classes.starts_late(map(int, shares)):
            return FIRST_1
        if not self.guessed or "0" not in shares:
            return None
        return names_alone_note(self.image_classes.path, self.classes[0], self.counted, shares["0"])


def open_own_images(path: Path, split: str, options: OwnOptions) -> OwnImages:
    """Open a split of a folder of images. Raises `DataError` for what is missing, with the expected layout."""
    if not path.is_dir():
        raise DataError(f"No folder {str(path)!r}. Expected layout: {LAYOUT}.")
    listed = path / (options.classes or "classes.txt")
    labelled = split in LABELLED
    classes, guessed = None, False
    if labelled or listed.is_file():
        classes = read_image_classes(
            listed, options.ignore, options.void, 1 if options.first is None else options.first
        )
        guessed = classes.counted and options.first is None
        if guessed:
            _check_first(classes, path, options)
    images = split_images(path, split, options)
    items = _items(path, split, images, options) if labelled else _unlabelled(path, images, options)
    extra = stray_files(path, split, options)[1] if labelled else []
    if extra:
        what = f"{len(extra)} label files have no image, such as {str(extra[0])!r}: not used."
        warnings.warn(what, stacklevel=2)
    return OwnImages(split, path, items, classes, labelled, guessed)


def split_images(root: Path, split: str, options: OwnOptions) -> list[Path]:
    """The images of a split: of the folder SPLIT/images, of the list SPLIT.txt, or a share of images/."""
    folder = image_folder(root, split, options)
    if folder.is_relative_to(root / split) or "{split}" in (options.images or ""):
        return images_below(folder)
    listed = root / f"{split}.txt"
    if listed.is_file():
        return _listed(folder, listed)
    if split not in LABELLED:
        raise DataError(f"{str(root)!r} has neither {split}.txt nor a folder {split}/images.")
    lone = [name for name in LABELLED if (root / f"{name}.txt").is_file()]
    if lone:
        raise DataError(f"{str(root)!r} has {lone[0]}.txt and no {split}.txt; accepted: both lists, or neither.")
    return _shared_out(root, folder, options)[split]


def image_folder(root: Path, split: str, options: OwnOptions) -> Path:
    """The folder of a split's images. Raises `DataError`."""
    if options.images is not None:
        folder = root / options.images.replace("{split}", split)
        if not folder.is_dir():
            raise DataError(f"No folder {str(folder)!r} (data.options.images is {options.images!r}).")
        return folder
    for folder in (root / split / "images", root / "images"):
        if folder.is_dir():
            return folder
    there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{str(root)!r} has neither {split}/images nor images; it has: {there}. Expected layout: {LAYOUT}. Other "
        "names: --set data.options.images=... and data.options.labels=..., where {split} stands for train or val."
    )


def images_below(folder: Path) -> list[Path]:
    """All images below a folder, sorted. Raises `DataError` where there are none."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise DataError(f"No image ({', '.join(IMAGE_SUFFIXES)}) in {str(folder)!r}.")
    return found


def stray_files(root: Path, split: str, options: OwnOptions) -> tuple[list[Path], list[Path]]:
    """The images of a split without a label file, and the label files without an image. Raises `DataError`."""
    folder = image_folder(root, split, options)
    labels, every = _label_folder(root, split, folder, options), images_below(folder)
    listed = root / f"{split}.txt"
    own = _listed(folder, listed) if listed.is_file() and not folder.is_relative_to(root / split) else every
    expected = {_label_of(path, folder, labels, options) for path in every}
    return (
        [path for path in own if not _label_of(path, folder, labels, options).is_file()],
        sorted(path for path in labels.rglob("*.png") if path not in expected and not path.name.startswith(".")),
    )


def share_out(names: Sequence[str], share: float, seed: int) -> set[str]:
    """Choose the names that validate: the nearest to `share` of them, by a digest of `seed` and the name.

    At least one, and at least one is left. An image that is added changes nothing for others but at the border.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())
    return set(order[: min(max(round(share * len(order)), 1), len(order) - 1)])


def _shared_out(root: Path, folder: Path, options: OwnOptions) -> dict[str, list[Path]]:
    found = images_below(folder)
    labels = _label_folder(root, "train", folder, options)
    found = [path for path in found if _label_of(path, folder, labels, options).is_file()] or found
    scenes = {path: _scene(path, folder, options) for path in found}
    names = sorted(set(scenes.values()))
    if len(names) < 2:
        raise DataError(f"{str(folder)!r}: {len(found)} images of {len(names)} scenes; two are needed to hold one out.")
    val = share_out(names, options.val_share, options.seed)
    return {
        "train": [path for path in found if scenes[path] not in val],
        "val": [path for path in found if scenes[path] in val],
    }


def listed_names(listed: Path) -> list[str]:
    """The names in a list of images, below their folder, with or without suffix; # after a blank begins a remark."""
    names = [re.split(r"(?:^|\s)#", line)[0].strip() for line in read_listing(listed, "list of images")]
    return [name.removeprefix("images/") for name in names if name]


def _listed(folder: Path, listed: Path) -> list[Path]:
    """The images that a list names, with or without suffix. Raises `DataError` for those that are not there."""
    names = listed_names(listed)
    missing, found = [], list[Path]()
    for name in names:
        given = folder / name
        ways = [given] if given.suffix.lower() in IMAGE_SUFFIXES else [Path(f"{given}{end}") for end in IMAGE_SUFFIXES]
        there = [path for path in ways if path.is_file()]
        missing += [] if there else [name]
        found += there[:1]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} images are missing: {some(missing)}" if names else "it names no image"
        raise DataError(f"{str(listed)!r}: {what}. Names are below {str(folder)!r}, with or without suffix.")
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise DataError(f"{str(listed)!r}: {twice.name} stands there twice.")
    return found


def _items(root: Path, split: str, images: Sequence[Path], options: OwnOptions) -> list[Item]:
    """The files of each labelled image; images without labels are left out with a warning."""
    folder = image_folder(root, split, options)
    labels = _label_folder(root, split, folder, options)
    items: dict[str, Item] = {}
    missing: list[Path] = []
    for path in images:
        label = _label_of(path, folder, labels, options)
        id = path.relative_to(folder).with_suffix("").as_posix()
        if id in items:
            raise DataError(f"{str(folder)!r}: {items[id].image.name} and {path.name} have the same labels.")
        if label.is_file():
            items[id] = Item(id, _scene(path, folder, options), path, label)
        else:
            missing.append(label)
    wanted = f"such as {str(missing[0])!r}" if missing else ""
    if not items:
        raise DataError(
            f"None of {len(images)} images in {str(folder)!r} has labels, {wanted}. Labels are PNGs with the image's "
            "name, or that and data.options.label_suffix."
        )
    if missing:
        warnings.warn(f"{len(missing)} of {len(images)} images have no label file, {wanted}: left out.", stacklevel=2)
    return list(items.values())


def _unlabelled(root: Path, images: Sequence[Path], options: OwnOptions) -> list[Item]:
    items: dict[str, Item] = {}
    for path in images:
        id = path.relative_to(root).with_suffix("").as_posix()
        if id in items:
            names = f"{items[id].image.name} and {path.name}"
            raise DataError(f"{str(path.parent)!r}: {names} differ in their suffix alone.")
        items[id] = Item(id, path.stem, path, path)
    return list(items.values())


def _label_folder(root: Path, split: str, images: Path, options: OwnOptions) -> Path:
    if options.labels is not None:
        folder = root / options.labels.replace("{split}", split)
        where = f" (data.options.labels is {options.labels!r})"
    else:
        folder, where = images.parent / "labels", ""
    if not folder.is_dir():
        raise DataError(f"No folder {str(folder)!r}{where}. Expected layout: {LAYOUT}.")
    return folder


def _label_of(image: Path, images: Path, labels: Path, options: OwnOptions) -> Path:
    below = image.relative_to(images)
    return labels / below.parent / f"{below.stem}{options.label_suffix}.png"


def _scene(path: Path, folder: Path, options: OwnOptions) -> str:
    below = path.relative_to(folder)
    return below.with_suffix("").as_posix() if options.scene == "file" else below.parent.as_posix()


def _check_first(classes: ImageClasses, root: Path, options: OwnOptions) -> None:
    """Raise `DataError` where ids may count from 0 as well as from 1: names alone would then be off by one."""
    labels = [item.annotation for item in _items(root, "train", split_images(root, "train", options), options)]
    looked, seen = min(LOOKED_AT, len(labels)), set[int]()
    for number in range(looked):
        try:
            seen |= set(np.unique(files.read_ids(labels[number * len(labels) // looked], bits=BITS)).tolist())
        except BadFrame:
            continue  # its turn comes when it is loaded
    count = len(classes.names) + len(options.void)
    if 0 in seen and count not in seen:
        raise DataError(
            f"{classes.path} has {count} names without numbers; id 0 occurs in labels and {count} in none of {looked}. "
            "Is 0 the first name, or pixels of no class? Say so: --set data.options.first=0 or =1, or write the number "
            "before each name in that file, such as '0 road'."
        )
