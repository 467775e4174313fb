"""Checking a source: `check_source` looks at everything, `quick_check` at what training must not begin without."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.files import atomic_write
from geo_pretrain.training.data.check import findings
from geo_pretrain.training.data.check.conventions import Fit, Fits, View, try_conventions
from geo_pretrain.training.data.check.registration import find_registration
from geo_pretrain.training.data.check.report import Finding, Level, Report
from geo_pretrain.training.data.check.sample import FULL, QUICK, Sample, load_sample
from geo_pretrain.training.data.frame import Frame, Source, SourcePart
from geo_pretrain.training.data.mining import spread_evenly
from geo_pretrain.training.data.mining_jobs import estimate
from geo_pretrain.training.recipe import DataSpec

COMPARED = 12  # frames whose edges are compared
PARTS = 4  # of a check, for its progress


def check_source(
    source: Source, spec: DataSpec, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Check the frames of a source: conventions, units, registration, order and sharpness.

    `progress` is called after each of `PARTS` parts: frames read, conventions, registration, all others.
    """
    progress(0, PARTS)
    sample = load_sample(source, FULL)
    progress(1, PARTS)
    if not sample.frames:
        return Report(spec, (findings.of_frames(sample),), sample)
    fits = _fits(source, sample)
    progress(2, PARTS)
    registration = find_registration(_of_one_size(sample))
    progress(3, PARTS)
    found = (
        findings.of_frames(sample),
        findings.of_intrinsics(sample.frames),
        findings.of_depth(source, sample.frames),
        findings.of_poses(source, fits, bool(sample.posed)),
        findings.of_scale(source, fits, sample.frames),
        findings.of_registration(source, registration, sample.frames),
        findings.of_order(sample),
        findings.of_blur(sample.frames),
        _expected_pairs(source, spec, fits, sample.frames),
    )
    progress(PARTS, PARTS)
    return Report(spec, (*found, *_unlike_scenes(source, sample)), sample, fits, registration)


def with_registration(report: Report, path: Path) -> Report:
    """The report with a registration that was found written to `path`, a JSON file, and suggested as an option."""

    def suggested(finding: Finding) -> Finding:
        if "registration" not in finding.numbers:
            return finding
        with atomic_write(path) as part:
            part.write_text(json.dumps(finding.numbers["registration"]) + "\n", encoding="utf-8")
        text = f"{finding.text}; {path} moves depth into the color camera, good to a few pixels"
        return replace(finding, text=text, options={"registration": str(path)})

    return replace(report, findings=tuple(suggested(finding) for finding in report.findings))


def quick_check(source: Source, spec: DataSpec) -> Report:
    """Check what decides whether training makes sense: readable frames, intrinsics, poses and the unit of depth.

    Poses are left out for single-frame tasks (`spec.units` "frames"), which do not use them.
    """
    sample = load_sample(source, QUICK)
    if not sample.frames:
        return Report(spec, (findings.of_frames(sample),), sample)
    fits = _fits(source, sample, quick=True)
    if fits is not None and not fits.fits_as_read:  # something is wrong: judged as `check_source` judges it
        sample = load_sample(source, FULL)
        fits = _fits(source, sample)
    found = [findings.of_frames(sample), findings.of_intrinsics(sample.frames)]
    if spec.units == "pairs":
        found.append(findings.of_poses(source, fits, bool(sample.posed)))
    found += [findings.of_scale(source, fits, sample.frames), *_unlike_scenes(source, sample)]
    return Report(spec, tuple(found), sample, fits)


def stop_if_wrong(report: Report) -> list[str]:
    """Raise `DataError` when something is surely wrong; else the warnings, a line each.

    Frames that cannot be read are left to mining, which says which they are, and why.
    """
    serious = [finding for finding in report.at(Level.WRONG) if finding.topic != "frames"]
    what = f"{report.spec.source}:{report.spec.path}" if report.spec.path else report.spec.source
    if serious:
        told = "\n".join(_line(finding) for finding in serious)
        mend = f"\nTry: {report.paste()}" if report.options else ""
        raise DataError(
            f"The frames of {what} are read wrongly.\n{told}{mend}\n"
            f"`geo-pretrain data check {what}` shows more; --no-check trains all the same."
        )
    warned = [_line(finding) for finding in report.at(Level.DOUBTFUL) if finding.topic != "frames"]
    return [*warned, f"`geo-pretrain data check {what}` shows more."] if warned else []


class Reread(SourcePart):
    """A source whose frames are read as they fit best."""

    def __init__(self, source: Source, best: Fit, *, scaled_poses: bool) -> None:
        self.source, self.best, self.name = source, best, source.name
        self.scaled_poses = scaled_poses  # the factor is one of the poses, and not of depth

    def scenes(self) -> list[str]:
        return self.source.scenes()

    def frame_ids(self, scene: str) -> list[str]:
        return self.source.frame_ids(scene)

    def load(self, scene: str, frame_id: str) -> Frame:
        frame = self.source.load(scene, frame_id)
        turn = findings.world_turn(self.source)
        pose = turn @ self.best.convention.apply(np.linalg.inv(turn) @ frame.cam_to_world)
        if self.scaled_poses:
            pose[:3, 3] /= self.best.scale
            return replace(frame, cam_to_world=pose)
        return replace(frame, depth=(frame.depth * self.best.scale).astype(np.float32), cam_to_world=pose)

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}:{self.best}"


def _expected_pairs(source: Source, spec: DataSpec, fits: Fits | None, frames: Sequence[Frame]) -> Finding:
    """How many pairs mining will find, and what it takes, if frames are read as they fit best."""
    if fits is None:
        return Finding("pairs", Level.UNKNOWN, "no two frames could be compared")
    scaled_poses = findings.poses_are_off(fits.best, frames)
    mended = source if fits.fits_as_read else Reread(source, fits.best, scaled_poses=scaled_poses)
    try:
        expected = estimate(mended, spec)
    except DataError as error:
        return Finding("pairs", Level.UNKNOWN, str(error))
    low, high = spec.overlap
    level = Level.OK if expected.kept else Level.DOUBTFUL
    text = f"with an overlap in [{low:g}, {high:g}]: {expected}"
    return Finding("pairs", level, text, numbers=asdict(expected))


def _line(finding: Finding) -> str:
    return f"{finding.topic}: {finding.text}"


def _views(source: Source, sample: Sample) -> list[View]:
    """The frames as they are compared, with poses in the world that they were stored in."""
    back = np.linalg.inv(findings.world_turn(source))
    return [View(frame.depth, frame.intrinsics, back @ frame.cam_to_world) for frame in sample.small()]


def _fits(source: Source, sample: Sample, *, quick: bool = False) -> Fits | None:
    views = _views(source, sample)
    return findings.in_meters(try_conventions(views, sample.pairs, quick=quick), sample.frames)


def _unlike_scenes(source: Source, sample: Sample) -> list[Finding]:
    """The finding on scenes that are read otherwise than the rest, if there are any: together they hide each other."""
    of_frames = [frame.scene for frame in sample.frames]
    if len(set(of_frames)) < 2:
        return []
    views = _views(source, sample)
    fits = {}
    for scene in dict.fromkeys(of_frames):
        pairs = [(i, j) for i, j in sample.pairs if of_frames[i] == of_frames[j] == scene]
        if (fit := try_conventions(views, pairs, quick=True)) is not None:
            fits[scene] = fit
    found = findings.of_scenes(sample.frames, fits)
    return [] if found is None else [found]


def _of_one_size(sample: Sample) -> list[Frame]:
    """Some frames as large as the first."""
    size = sample.frames[0].depth.shape
    return spread_evenly([frame for frame in sample.frames if frame.depth.shape == size], COMPARED)
