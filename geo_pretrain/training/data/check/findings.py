"""From sampled frames to findings: one function a topic, each with a verdict, numbers and options to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from geo_pretrain.training.data.check.conventions import AS_READ, Fit, Fits
from geo_pretrain.training.data.check.registration import Registration
from geo_pretrain.training.data.check.report import Finding, Level
from geo_pretrain.training.data.check.sample import Sample, turn
from geo_pretrain.training.data.files import FLOAT_DEPTH
from geo_pretrain.training.data.frame import Frame, RawDepth, Source, capability
from geo_pretrain.training.data.sources.conventions import Conventions, smaller, times_as_large, z_up

NARROWEST, WIDEST = 20.0, 150.0  # degrees; horizontal angles of view beyond are no camera's that records RGB-D
OFF_CENTER, AT_BORDER = 0.08, 0.4  # of the size: farther from the middle a principal point is suspicious, or wrong
NEAREST, FARTHEST = 0.2, 30.0  # m; a median depth beyond these is suspicious
SURE = 0.75  # of the best agreement: below, the reading of the source is surely wrong
TRUSTED = 0.35  # agreement of a reading that can be trusted
SCALES = (1.0, 100.0, 256.0, 1000.0, 4000.0, 5000.0, 6553.5, 10000.0)  # units per meter that cameras write
ROUND = 0.06  # relative: a measured scale this near to one of these is taken for it
UNLIKE, APART = 1.25, 50.0  # times: scales of two scenes that differ by more, and medians of their depths
UNSORTED = 10.0  # degrees between neighbors in time, above which the order is looked at


def of_frames(sample: Sample) -> Finding:
    """How many frames there are and could be read."""
    sizes = sorted({frame.depth.shape for frame in sample.frames})
    shown = ", ".join(f"{width}x{height}" for height, width in sizes)
    numbers = {"scenes": sample.scenes, "frames": sample.total, "read": len(sample.frames), "tried": sample.tried}
    text = f"{sample.total} in {sample.scenes} scene{'s' * (sample.scenes != 1)}"
    if not sample.frames:
        level, text = Level.WRONG, f"{text}; none of {sample.tried} could be read: {_reasons(sample)}"
    else:
        failed = sample.tried - len(sample.frames)
        level = Level.DOUBTFUL if failed > 0.1 * sample.tried else Level.OK
        text += f"; {len(sample.frames)} looked at, {shown}"
        text += f"; {failed} could not be read: {_reasons(sample)}" if failed else ""
    floats = not sample.frames and FLOAT_DEPTH in sample.skips.counts()  # in meters, as most that write float
    options = {"depth_scale": 1.0} if floats else {}
    return Finding("frames", level, text, options, numbers | {"sizes": [f"{w}x{h}" for h, w in sizes]})


def _reasons(sample: Sample) -> str:
    counts = sample.skips.counts()
    return "; ".join(f"{count} times: {reason}" if len(counts) > 1 else reason for reason, count in counts.items())


def of_intrinsics(frames: Sequence[Frame]) -> Finding:
    """Whether the pinhole matrices fit the images: angle of view, principal point, square pixels."""
    matrices = np.stack([frame.intrinsics for frame in frames])
    sizes = np.array([frame.depth.shape[::-1] for frame in frames])
    k, (width, height) = matrices[0], sizes[0]
    angle = float(np.degrees(2 * np.arctan(width / (2 * k[0, 0]))))
    shift = np.abs(matrices[:, :2, 2] - (sizes - 1) / 2) / sizes
    numbers = {
        "fx": float(k[0, 0]), "fy": float(k[1, 1]), "cx": float(k[0, 2]), "cy": float(k[1, 2]), "angle_of_view": angle
    }  # fmt: skip
    text = (
        f"fx {k[0, 0]:.4g}, fy {k[1, 1]:.4g}, cx {k[0, 2]:.4g}, cy {k[1, 2]:.4g} at {width}x{height}: {angle:.0f}° wide"
    )
    if (shift > OFF_CENTER).any():
        level = Level.WRONG if (shift > AT_BORDER).any() else Level.DOUBTFUL
        note = f"the principal point lies {100 * shift.max():.0f} % of the image off its middle"
    elif not NARROWEST < angle < WIDEST:
        return Finding("intrinsics", Level.DOUBTFUL, f"{text}, which hardly any camera is", numbers=numbers)
    elif not 0.8 < k[0, 0] / k[1, 1] < 1.25:
        return Finding("intrinsics", Level.DOUBTFUL, f"{text}; pixels are not square", numbers=numbers)
    else:
        return Finding("intrinsics", Level.OK, text, numbers=numbers)
    if (factor := times_as_large(k, (height, width))) is None:
        return Finding("intrinsics", level, f"{text}; {note}", numbers=numbers)
    other = f"{round(width * factor)}x{round(height * factor)}"
    options = {"intrinsics": smaller(k, factor)}
    return Finding("intrinsics", level, f"{text}; {note}: those of an image of {other}?", options, numbers)


def of_depth(source: Source, frames: Sequence[Frame]) -> Finding:
    """Share and kinds of invalid depth, and how far surfaces are."""
    invalid = float(np.mean([np.mean(frame.depth == 0) for frame in frames]))
    valid = np.concatenate([frame.depth[frame.depth > 0][::7] for frame in frames])
    low, median, high = (float(value) for value in np.percentile(valid, [1, 50, 99]))
    kinds = _kinds(source, frames)
    shown = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in kinds.items() if share > 0)
    text = f"{100 * invalid:.0f} % invalid" + (f" ({shown})" if shown else "")
    text += f"; surfaces at {low:.3g} to {high:.3g} m, in the median {median:.3g} m"
    numbers = {"invalid": invalid, "kinds": kinds, "meters": [low, median, high]}
    if not NEAREST <= median <= FARTHEST:
        return Finding("depth", Level.DOUBTFUL, f"{text}: is depth_scale right (units per meter)?", numbers=numbers)
    level = Level.DOUBTFUL if invalid > 0.7 else Level.OK
    return Finding("depth", level, text, numbers=numbers)


def _kinds(source: Source, frames: Sequence[Frame]) -> dict[str, float]:
    """Shares of pixels that stored values mark as invalid, by kind; {} where a source does not show them."""
    raw = capability(source, RawDepth)
    if raw is None:
        return {}
    images = [raw.raw_depth(frame.scene, frame.id) for frame in frames[:: max(1, len(frames) // 12)]]
    kinds = {
        "0": [np.mean(image == 0) for image in images],
        "65535": [np.mean(image == 65535) for image in images],
        "not finite": [np.mean(~np.isfinite(image)) for image in images],
        "below 0": [np.mean(image < 0) for image in images],
    }
    return {kind: float(np.mean(shares)) for kind, shares in kinds.items()}


def of_poses(source: Source, fits: Fits | None, posed: bool) -> Finding:
    """Direction and axes of the poses, by reprojection."""
    topic = "poses"
    if not posed:
        return Finding(topic, Level.UNKNOWN, "frames have no poses: they serve single-frame tasks (PPKT, img2pc, MoCo)")
    if fits is None or not fits.pairs:
        return Finding(topic, Level.UNKNOWN, "the camera hardly moves between the frames looked at")
    best, read = fits.best, fits.as_read
    numbers = {"pairs": fits.pairs, "tried": [_numbers(fit) for fit in fits.conventions], "as_read": _numbers(read)}
    if best.agreement < TRUSTED:
        text = (
            f"no reading of the poses fits: at best {_shown(best)}. Are poses, depth and intrinsics of one recording?"
        )
        return Finding(topic, Level.DOUBTFUL, text, numbers=numbers)
    now = _in_force(source)
    options = _pose_options(now, best)
    if fits.fits_as_read or not options:
        return Finding(topic, Level.OK, f"{_named(now)}: {_shown(best)}", numbers=numbers)
    told = _named({**now, **options})
    text = f"fit as {told}: {_shown(best)}; as read ({_named(now)}): {_shown(read)}"
    return Finding(topic, _sureness(fits), text, options, numbers)


def of_scale(source: Source, fits: Fits | None, frames: Sequence[Frame]) -> Finding:
    """The unit of depth against that of the poses, by reprojection."""
    topic = "depth scale"
    if fits is None or not fits.pairs or fits.best.agreement < TRUSTED:
        return Finding(topic, Level.UNKNOWN, "not known: no poses against which depth could be measured")
    best = fits.best
    numbers = {"factor": best.scale}
    if best.scale == 1.0:
        return Finding(topic, Level.OK, f"depth and poses have one unit ({_shown(best)})", numbers=numbers)
    now = _in_force(source, frames)
    if poses_are_off(best, frames):
        key, wanted = "pose_scale", now["pose_scale"] * best.scale
    elif now["depth_scale"] is None:
        text = f"a factor of {best.scale:.3g} fits better ({_shown(best)}); scenes state different depth scales"
        return Finding(topic, Level.DOUBTFUL, f"{text}: one of these is wrong", numbers=numbers)
    else:
        key, wanted = "depth_scale", now["depth_scale"] / best.scale
    nearest = min(SCALES, key=lambda scale: abs(np.log(scale / wanted)))
    value = nearest if abs(np.log(nearest / wanted)) < ROUND else float(f"{wanted:.3g}")
    clearly = _sureness(fits) == Level.WRONG and best.difference < fits.as_read.difference
    if value != nearest and not clearly:  # something else is wrong, which a factor would only hide
        text = (
            f"a factor of {best.scale:.3g} fits better ({_shown(best)}; as read {_shown(fits.as_read)}) and "
            "is no unit in use: a wrong focal length, or quaternions in another order, look like this"
        )
        return Finding(topic, Level.DOUBTFUL, text, numbers=numbers)
    ratio = value / now[key]
    what = f"depth is {_times(ratio if key == 'depth_scale' else 1 / ratio)} what the poses say"
    text = f"{what} ({_shown(best)}; as read {_shown(fits.as_read)}): {key} is {now[key]:g}, {value:g} fits"
    return Finding(topic, _sureness(fits), text, {key: value}, numbers)


def of_scenes(frames: Sequence[Frame], fits: Mapping[str, Fits]) -> Finding | None:
    """Scenes whose poses or depth are read otherwise than those of the rest: options are for all. None: they agree.

    `fits`: of each scene alone. Without poses that tell, depths that are `APART` times as large are another unit.
    """
    told = {scene: fit.best for scene, fit in fits.items() if fit.pairs and fit.best.agreement >= TRUSTED}
    usual = [one for one in told.values() if one.convention == AS_READ and one.scale == 1] or list(told.values())
    other = [
        f"{scene}: depth is {_times(float(f'{1 / best.scale:.2g}'))} what its poses say"
        + ("" if best.convention == usual[0].convention else ", and its poses are read otherwise")
        for scene, best in told.items()
        if best.convention != usual[0].convention or abs(np.log(best.scale / usual[0].scale)) > np.log(UNLIKE)
    ]
    depths = {
        scene: [f.depth[f.depth > 0][::7] for f in frames if f.scene == scene] for scene in {f.scene for f in frames}
    }
    medians = {
        scene: float(np.median(np.concatenate(parts))) for scene, parts in depths.items() if any(map(len, parts))
    }
    if not other and medians and max(medians.values()) > APART * min(medians.values()):
        other = [f"{scene}: surfaces at {median:.3g} m in the median" for scene, median in sorted(medians.items())]
    if not other:
        return None
    text = f"not all are in one unit and convention; options are for all, so check them apart. {'; '.join(other)}"
    return Finding("scenes", Level.DOUBTFUL, text, numbers={"medians_m": medians})


def in_meters(fits: Fits | None, frames: Sequence[Frame]) -> Fits | None:
    """Fits with their depth differences in meters, also where it is the poses that have another unit."""
    if fits is None or not poses_are_off(fits.best, frames):
        return fits
    mended = [replace(fit, difference=fit.difference / fit.scale) for fit in (fits.best, *fits.conventions)]
    return replace(fits, best=mended[0], conventions=tuple(mended[1:]))


def poses_are_off(best: Fit, frames: Sequence[Frame]) -> bool:
    """Whether a factor between depth and poses is one of the poses: of a whole unit, and depth is as it should be."""
    median = float(np.median(np.concatenate([frame.depth[frame.depth > 0][::7] for frame in frames])))
    return NEAREST <= median <= FARTHEST and not 0.05 < best.scale < 20


def of_registration(source: Source, found: Registration | None, frames: Sequence[Frame]) -> Finding:
    """Whether color and depth show the same pixel, by their edges; if not, a registration in the file's own form.

    Scaling and moving depth edges gives the intrinsics of the color camera, as if both cameras were in one place: right
    for what is far away, a few pixels off for what is near.
    """
    topic = "registration"
    if found is None or not found.is_known:
        return Finding(topic, Level.UNKNOWN, "edges of depth and color have too little in common to tell")
    numbers: dict[str, Any] = {
        "in_place": found.in_place,
        "fit": found.fit,
        "scale": found.scale,
        "error_px": found.error,
    }
    claimed = _in_force(source).get("registered")
    if found.is_registered:
        if claimed is False and _is_raw(source):
            text = "color and depth are registered, the source takes them for not: say so"
            return Finding(topic, Level.DOUBTFUL, text, {"registered": True}, numbers)
        return Finding(topic, Level.OK, f"edges of depth lie on edges of color (fit {found.in_place:.2f})", {}, numbers)
    right, down = found.offset
    text = (
        f"edges of depth lie {found.error:.0f} px off the edges of color (fit {found.in_place:.2f} in place, "
        f"{found.fit:.2f} when scaled by {found.scale:g} and moved by {right:.0f}, {down:.0f} px): they are not "
        "registered"
    )
    if _takes_registration(source):
        shape = frames[0].depth.shape
        middle = (np.array([shape[1], shape[0]]) - 1) / 2
        k = np.diag([found.scale, found.scale, 1.0])
        k[:2, 2] = (1 - found.scale) * middle + found.offset
        color = [[round(float(value), 3) for value in row] for row in k @ frames[0].intrinsics]
        numbers |= {"registration": {"color_intrinsics": color, "depth_to_color": np.eye(4).tolist()}}
    else:
        text += ": leave out data.options.registered, or give data.options.registration=FILE.json (docs/data.md)"
    return Finding(topic, Level.DOUBTFUL, text, numbers=numbers)


def of_order(sample: Sample) -> Finding:
    """Whether frames follow each other in time: neighbors must be turned less than frames far apart."""
    posed = set(sample.posed)
    turns: dict[bool, list[float]] = {True: [], False: []}
    for i in sorted(posed):
        for j in sorted(posed):
            gap = sample.positions[j] - sample.positions[i]
            if sample.frames[i].scene == sample.frames[j].scene and gap > 0:
                turns[gap <= 2].append(turn(sample.frames[i].cam_to_world, sample.frames[j].cam_to_world))
    if not turns[True] or not turns[False]:
        return Finding("time order", Level.UNKNOWN, "too few frames with poses to tell")
    near, far = (float(np.median(turns[key])) for key in (True, False))
    numbers = {"turn_near": near, "turn_far": far}
    text = f"neighbors are turned by {near:.1f}°, frames farther apart by {far:.1f}° (medians)"
    if near > UNSORTED and near > 0.8 * far:
        text += ": names may not sort in order of time, or frames are far apart in time"
        return Finding("time order", Level.DOUBTFUL, text, numbers=numbers)
    return Finding("time order", Level.OK, text, numbers=numbers)


def of_blur(frames: Sequence[Frame]) -> Finding:
    """How many frames are much less sharp than most."""
    sharpness = np.array([_sharpness(frame.color) for frame in frames])
    median = float(np.median(sharpness))
    share = float(np.mean(sharpness < 0.5 * median)) if median else 1.0
    numbers = {"sharpness": median, "blurred": share}
    if not median:
        return Finding("blur", Level.DOUBTFUL, "color images are of one color", numbers=numbers)
    level = Level.DOUBTFUL if share > 0.3 else Level.OK
    return Finding("blur", level, f"{100 * share:.0f} % of frames are half as sharp as most, or less", numbers=numbers)


def _sharpness(color: np.ndarray) -> float:
    """The deviation of the Laplacian of an image uint8 [H, W, 3] over that of its brightness; 0 without any texture."""
    gray = color.astype(np.float64).mean(axis=2)
    inner = gray[1:-1, 1:-1]
    laplacian = gray[1:-1, 2:] + gray[1:-1, :-2] + gray[2:, 1:-1] + gray[:-2, 1:-1] - 4 * inner
    return float(laplacian.std() / inner.std()) if inner.std() > 0 else 0.0


def _in_force(source: Source, frames: Sequence[Frame] = ()) -> dict[str, Any]:
    """Conventions by which a source reads its files; those of frames in memory are ours.

    Where files state their depth scale, it is that of the scenes of `frames`; None: these differ.
    """
    while hasattr(source, "source"):
        source = source.source
    stated = getattr(source, "conventions", None)
    found = {**vars(Conventions()), "registered": None, **({} if stated is None else vars(stated))}
    if frames and hasattr(source, "depth_scale"):
        scales = {source.depth_scale(scene) for scene in {frame.scene for frame in frames}}
        found["depth_scale"] = scales.pop() if len(scales) == 1 else None
    return found


def world_turn(source: Source) -> np.ndarray:
    """By what a source turns the world of its poses, so that z points up: float64 [4, 4]."""
    return z_up(_in_force(source)["world_up"])


def _is_raw(source: Source) -> bool:
    """Whether depth is as it was recorded, not moved into the color camera by a registration."""
    while hasattr(source, "source"):
        source = source.source
    return getattr(getattr(source, "config", None), "registration", None) is None


def _takes_registration(source: Source) -> bool:
    """Whether the source has an option for a registration, and neither it nor its opposite is given."""
    while hasattr(source, "source"):
        source = source.source
    config: Any = getattr(source, "config", None)
    return hasattr(config, "registration") and config.registration is None and not getattr(config, "registered", None)


def _pose_options(now: dict[str, Any], best: Fit) -> dict[str, str]:
    """Options of the poses under which the source would read them as `best` does."""
    inverse, flipped = best.convention.inverse, best.convention.flipped
    outward = (now["pose_convention"] == "world_to_camera") != inverse
    # read backwards, the axes that the source turned are axes of the world, which any frame of reference may be
    opengl = flipped if inverse else (now["camera_axes"] == "opengl") != flipped
    wanted = {
        "pose_convention": "world_to_camera" if outward else "camera_to_world",
        "camera_axes": "opengl" if opengl else "opencv",
    }
    return {key: value for key, value in wanted.items() if now[key] != value}


def _named(options: dict[str, Any]) -> str:
    axes = {"opencv": "x right, y down, z forward", "opengl": "OpenGL's axes"}[options["camera_axes"]]
    return f"{options['pose_convention'].replace('_', '-')}, {axes}"


def _shown(fit: Fit) -> str:
    gap = "" if np.isnan(fit.difference) else f", depth differs by {100 * fit.difference:.2g} cm in the median"
    return f"{100 * fit.agreement:.0f} % of pixels agree{gap}"


def _numbers(fit: Fit) -> dict[str, Any]:
    return {
        "inverse": fit.convention.inverse,
        "opengl": fit.convention.flipped,
        "factor": fit.scale,
        "agreement": round(fit.agreement, 4),
        "median_difference_m": None if np.isnan(fit.difference) else round(fit.difference, 5),
    }


def _sureness(fits: Fits) -> Level:
    return Level.WRONG if fits.as_read.agreement < SURE * fits.best.agreement else Level.DOUBTFUL


def _times(factor: float) -> str:
    return f"{factor:.4g} times" if factor >= 1 else f"1/{1 / factor:.4g} of"
