"""Files of mined pairs, one a scene: written atomically under a lock, so that many processes and machines share work.

A file `<scene>.json` holds the pairs of a scene, its skipped frames and counts, what they were mined from (`identity`)
and a digest. One that is damaged, or that was mined from other frames or by other settings, is mined again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from geo_pretrain.errors import CheckpointError, DataError, RecipeError, first_line, some
from geo_pretrain.files import locked, parse_json, read_sealed, write_sealed
from geo_pretrain.training.data.frame import Pair, SkippedFrames, Source
from geo_pretrain.training.recipe import DataSpec

VERSION = 1
WHOLE = (0.0, 1.0)  # `DataSpec.frames` of all

T = TypeVar("T")


@dataclass
class PairCounts:
    """How many pairs of frames were tested, and why those that are left out were."""

    pairs: int = 0
    below: int = 0  # pairs that overlap less than asked for
    above: int = 0
    largest: float = 0.0  # overlap of a pair below the range

    def add(self, ratios: np.ndarray, overlap: tuple[float, float]) -> None:
        """Count the pairs of a scene by their overlap ratios [N, N], or [M] of its pairs."""
        values = ratios[np.triu_indices(len(ratios), 1)] if ratios.ndim == 2 else ratios
        below = values[values < overlap[0]]
        self.pairs += len(values)
        self.below += len(below)
        self.above += int((values > overlap[1]).sum())
        self.largest = max(self.largest, float(below.max(initial=0)))

    def join(self, other: PairCounts) -> None:
        """Count also what `other` counted."""
        self.pairs += other.pairs
        self.below += other.below
        self.above += other.above
        self.largest = max(self.largest, other.largest)

    def no_pair(self, spec: DataSpec, skips: SkippedFrames) -> DataError:
        """The error when no pair is left: how many failed for which reason, and what to try."""
        low, high = spec.overlap
        reasons = []
        if self.below:
            reasons.append(f"{self.below} overlap by less than {low:g} (at most {self.largest:.2g})")
        if self.above:
            reasons.append(f"{self.above} by more than {high:g}")
        counted = f"Of {self.pairs} pairs {' and '.join(reasons)}." if reasons else "No two frames could be compared."
        hint = (
            f"\n`geo-pretrain data check {spec.source}:{spec.path}` tries other directions and axes of the poses "
            "and other units of depth, and names the options that mend it."
        )
        start = f"No pair of frames is left in source {spec.source!r}. {counted}\n{skips.summary()}"
        return DataError(start + hint if spec.path else start)


@dataclass
class ScenePairs:
    """The pairs of one scene, and what was left out."""

    pairs: list[Pair] = field(default_factory=list)
    skips: SkippedFrames = field(default_factory=SkippedFrames)
    tested: PairCounts = field(default_factory=PairCounts)


def scene_file(folder: Path, scene: str) -> Path:
    """The file of a scene's pairs; scenes in nested folders have nested files."""
    return folder / f"{scene}.json"


def identity(source: Source, scene: str, spec: DataSpec) -> dict[str, Any]:
    """What the pairs of a scene are mined from, in plain types: its frames and the settings that choose pairs."""
    return {
        "version": VERSION,
        "source": source.name,
        "frames": _frames_digest(source, scene),
        "options": parse_json(json.dumps(spec.options, default=str)),
        "measure": spec.measure,
        "size": list(spec.size) if spec.measure == "projective" else None,
        "overlap": list(spec.overlap),
        "max_pairs_per_scene": spec.max_pairs_per_scene,
    }


def _frames_digest(source: Source, scene: str) -> str:
    names = "\n".join(source.frame_ids(scene))
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def mined_once(
    folder: Path,
    scene: str,
    mined_from: dict[str, Any],
    mine: Callable[[], ScenePairs],
    part: Sequence[float] | None = None,
) -> tuple[ScenePairs, bool]:
    """Read the pairs of a scene from its file, or `mine` and write them; also whether they were mined now.

    `part` of the scene's frames is told in the file, see `refuse_other_settings`.
    Processes and machines that want the same scene wait for the one that mines it. Killed, it leaves no file.
    """
    path = scene_file(folder, scene)
    known = _read(path, scene, mined_from)
    if known is not None:
        return known, False
    with locked(path):
        known = _read(path, scene, mined_from)
        mined = mine() if known is None else known
        if known is None:
            pairs = [[pair.frame1, pair.frame2, pair.overlap] for pair in mined.pairs]
            rest: dict[str, Any] = {"skips": mined.skips.reasons, "tested": asdict(mined.tested)}
            rest |= {} if part is None else {"part": list(part)}
            write_sealed(path, {"identity": mined_from, "pairs": pairs, **rest})
    with suppress(OSError):  # whoever waited has read the file; nobody locks it again
        path.with_name(f".{path.name}.lock").unlink()
    return mined, known is None


def read_pairs(folder: Path, source: Source, spec: DataSpec, skips: SkippedFrames) -> list[Pair]:
    """Read the pairs of all scenes of a source from a folder that `geo-pretrain data mine` wrote.

    Pairs in `spec.overlap` of frames of the source, at most `spec.max_pairs_per_scene` a scene: the range may be
    narrower than the mined one, and the source a part of the mined frames.

    Raises:
        DataError: scenes have no file yet, no pair is left, or the pairs are those of other frames.
        RecipeError: they were mined by another measure, or in a narrower range.
    """
    missing, grown, pairs, tested = list[str](), list[str](), list[Pair](), PairCounts()
    held, of_others = 0, 0  # pairs in the files, those of frames that are not here
    for scene in source.scenes():
        path = scene_file(folder, scene)
        tree = _tree(path)
        if tree is None:
            missing.append(scene)
            continue
        mined = _parsed(tree, scene)
        _check_settings(path, tree["identity"], spec)
        here, (low, high) = set(source.frame_ids(scene)), spec.overlap
        known = [pair for pair in mined.pairs if pair.frame1 in here and pair.frame2 in here]
        if mined.pairs and not known and spec.frames == WHOLE:
            raise DataError(f"{path} holds pairs of other frames than scene {scene!r} has; mine it again.")
        same = tree["identity"].get("frames") == _frames_digest(source, scene)
        if spec.frames == WHOLE == tuple(tree.get("part", WHOLE)) and not same:
            grown.append(scene)
        held += len(mined.pairs)
        of_others += len(mined.pairs) - len(known)
        pairs += spread_evenly([pair for pair in known if low <= pair.overlap <= high], spec.max_pairs_per_scene)
        skips.reasons.update(mined.skips.reasons)
        tested.join(mined.tested)
    place = f"{spec.source}:{spec.path}" if spec.path else spec.source
    if missing:
        raise DataError(
            f"{len(missing)} of {len(source.scenes())} scenes have no usable pairs in {str(folder)!r}: "
            f"{some(missing)}. "
            f"`geo-pretrain data mine {place} --out {folder}` mines those that are missing."
        )
    if held and held == of_others:
        low, high = spec.frames
        raise DataError(
            f"{str(folder)!r} holds {held} pairs, none of them of the frames {low:g}:{high:g} of these scenes: they "
            "were mined from others. Mine these into another folder."
        )
    if not pairs:
        raise tested.no_pair(spec, skips)
    if grown:
        warnings.warn(
            f"{len(grown)} of {len(source.scenes())} scenes have other frames than when their pairs in {str(folder)!r} "
            f"were mined ({some(grown)}): those that came since are in no pair. The same `geo-pretrain data mine` "
            "again brings them in.",
            stacklevel=2,
        )
    return pairs


def _check_settings(path: Path, mined_from: dict[str, Any], spec: DataSpec) -> None:
    """Raise `RecipeError` where pairs were mined by other settings than those asked for."""
    if mined_from["measure"] != spec.measure:
        raise RecipeError(
            f"{path} was mined by data.measure {mined_from['measure']!r}, the recipe's is {spec.measure!r}. Mine into "
            f"another folder with --set data.measure={spec.measure}, or train with "
            f"--set data.measure={mined_from['measure']}."
        )
    low, high = mined_from["overlap"]
    if not (low <= spec.overlap[0] and spec.overlap[1] <= high):
        raise RecipeError(
            f"{path} holds overlaps in [{low:g}, {high:g}], the recipe's data.overlap is [{spec.overlap[0]:g}, "
            f"{spec.overlap[1]:g}]; accepted is a range inside of it."
        )


def _tree(path: Path) -> dict[str, Any] | None:
    """The content of a scene's file; None without one, or where it is damaged, which a warning names."""
    try:
        tree = read_sealed(path)
        _parsed(tree, "")
        known = tree["identity"]
        low, high = known["overlap"]
        float(low), float(high), str(known["measure"])
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        warnings.warn(f"{path} cannot be used ({first_line(error)}).", stacklevel=2)
        return None
    return tree


def _read(path: Path, scene: str, mined_from: dict[str, Any]) -> ScenePairs | None:
    tree = _tree(path)
    return None if tree is None or tree["identity"] != mined_from else _parsed(tree, scene)


def _parsed(tree: dict[str, Any], scene: str) -> ScenePairs:
    pairs = [Pair(scene, str(first), str(second), float(ratio)) for first, second, ratio in tree["pairs"]]
    skips = SkippedFrames({str(path): str(reason) for path, reason in tree["skips"].items()})
    counts = tree["tested"]
    pairs_tested, below, above = (int(counts[key]) for key in ("pairs", "below", "above"))
    tested = PairCounts(pairs_tested, below, above, float(counts["largest"]))
    return ScenePairs(pairs, skips, tested)


def refuse_other_settings(folder: Path, scene: str, mined_from: Mapping[str, Any], part: Sequence[float]) -> None:
    """Raise `DataError` where a scene's file holds pairs of other settings or of another part of its frames.

    Mining would replace them. Those of a scene that has got or lost frames are replaced.
    """
    path = scene_file(folder, scene)
    tree = _tree(path)
    if tree is None:
        return
    for key in ("source", "options", "measure", "size", "overlap", "max_pairs_per_scene"):
        if tree["identity"].get(key) != mined_from[key]:
            raise DataError(
                f"{path} holds pairs with {key} {tree['identity'].get(key)!r}, not {mined_from[key]!r}. Choose another "
                "--out, or remove that folder to mine it again."
            )
    low, high = tree.get("part", part)
    if [low, high] != list(part) and tree["identity"].get("frames") != mined_from["frames"]:
        raise DataError(
            f"{path} holds pairs of the frames {low:g}:{high:g}, not {part[0]:g}:{part[1]:g}. Choose another --out, or "
            "remove that folder to mine it again."
        )


def spread_evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """Choose at most `limit` (None: all) of the items, from the first to the last at even distances."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[k] for k in np.linspace(0, len(items) - 1, limit).round().astype(int)]
