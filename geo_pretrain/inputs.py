"""What networks and transforms are given, checked before anything is computed.

Every message says what was given, what is accepted, and the line that mends it. What cannot be computed, or cannot be
right (NaN), is an `InputError`; what can be meant but seldom is, such as pixels that were not normalized, is a warning,
once a network; of points that seem not to be in meters once a cloud. Values are looked at on a CPU in every call, which
costs a thousandth of a network; on other devices in the first call alone, because a look makes them wait; and never
while torch traces or compiles.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geo_pretrain.errors import InputError, some

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIZE = 32  # pixels: below this the last stage of an encoder has nothing to look at
MAX_EXTENT = 1000.0  # meters: no scan is larger, and rooms in millimeters are
IMAGE = "a PIL image, uint8 [H, W, C] numpy, or a tensor [C, H, W] or [B, C, H, W], uint8 or float in [0, 1]"
POINTS = "float [N, 3] in meters, N > 0"
BATCHED = "encode_points({join}(clouds), batch=numpy.repeat(range(len(clouds)), [len(cloud) for cloud in clouds]))"


def described(value: Any) -> str:
    """What a value is, for a message: kind, type of numbers, shape.

    >>> described([[0.5, 1.0]]), described("a.png")
    ('a list of 1 list', "the text 'a.png'")
    """
    if is_pil(value):
        return f"a PIL image of mode {value.mode!r}, {value.size[0]} x {value.size[1]} pixels"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if type(value).__module__ == "numpy":
            return f"a numpy array {value.dtype} {tuple(value.shape)}"
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, list | tuple) and value:
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {len(value)} {some(kinds)}"
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, os.PathLike):
        return f"the path {os.fspath(value)!r}"
    return type(value).__name__


def is_pil(value: Any) -> bool:
    """Whether a value is a PIL image, without importing PIL."""
    return hasattr(value, "mode") and hasattr(value, "convert") and hasattr(value, "size")


def is_path(value: Any) -> bool:
    """Whether a value names a file."""
    return isinstance(value, str | os.PathLike)


def check_path(call: str, value: Any, accepted: str) -> None:
    """Raise `InputError` unless a value is a text or a path."""
    if not is_path(value):
        given = repr(value) if value is None or isinstance(value, int | float) else described(value)
        raise InputError(f"{call} takes {accepted}; got {given}.")


# --- images into networks


def check_images(x: Tensor, in_chans: int, weight: Tensor, least: int = MIN_SIZE) -> None:
    """Raise `InputError` unless x is [B, in_chans, H, W], H and W from `least` up, of the type and place of `weight`.

    `weight` is a parameter of the network. Nothing here looks at values, so that it may be traced and compiled.
    """
    import torch

    if not isinstance(x, torch.Tensor):
        raise InputError(
            f"This network takes images [B, {in_chans}, H, W]; got {described(x)}. {_from_other(x, in_chans)}"
        )
    if torch.jit.is_tracing():
        return  # sizes are tensors there, and every comparison would be warned of
    if x.ndim != 4 or x.shape[1] != in_chans:
        given = f"a tensor of shape {tuple(x.shape)}"
        raise InputError(
            f"This network takes images [B, {in_chans}, H, W]; got {given}.{_reshaped(tuple(x.shape), in_chans)}"
        )
    if not x.dtype.is_floating_point:
        made = {torch.uint8: "images", torch.bool: "images.float()"}.get(x.dtype, "images.to(torch.uint8)")
        line = f"network(network.transforms({made}))"
        raise InputError(f"Images are {x.dtype}; accepted: floating point, as .transforms gives them: {line}.")
    if x.shape[0] == 0:
        raise InputError("The batch of images is empty, [0, C, H, W]; accepted: at least one image. Leave it out.")
    if min(x.shape[2:]) < least:
        raise InputError(
            f"Images are {x.shape[2]} x {x.shape[3]} pixels; accepted: at least {least} in both directions. "
            "network.transforms resizes them."
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        check_place(x, weight, "Images", "images")


def check_place(x: Any, weight: Tensor, what: str, name: str) -> None:
    """Raise `InputError` where `x`, a dense or sparse tensor, has another type or device than the network's weights."""
    import torch

    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or not weight.is_floating_point():
        return  # quantized or sharded: its own code knows what it takes
    if x.device != weight.device:
        raise InputError(
            f"{what} are on {x.device}, the network is on {weight.device}; accepted: one device. "
            f"network({name}.to({str(weight.device)!r})) or network.to({str(x.device)!r}) once."
        )
    if x.dtype != weight.dtype and (x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)):
        raise InputError(
            f"{what} are {x.dtype}, the weights {weight.dtype}; accepted: one type. network({name}.to({weight.dtype})) "
            f"or network.to({x.dtype}) once{'' if x.dtype == torch.float64 else ', or torch.autocast'}."
        )


def _from_other(x: Any, in_chans: int) -> str:
    """The line that makes a batch of what is no tensor."""
    if is_path(x):
        return f"network(network.transforms(PIL.Image.open({os.fspath(x)!r}))[None])"
    if isinstance(x, list | tuple):
        return "network(torch.stack([network.transforms(image) for image in images]))"
    if hasattr(x, "ndim") and x.ndim == 4 and x.dtype.kind == "f":
        turned = "" if x.shape[1] == in_chans else ".permute(0, 3, 1, 2)"
        return f"network(torch.from_numpy(images){turned}) if they are normalized as network.transforms does"
    if hasattr(x, "ndim") and x.ndim == 4 and x.shape[1] == in_chans:
        return "network(network.transforms(torch.from_numpy(images)))"
    if hasattr(x, "ndim") and x.ndim == 4:
        return "network(torch.stack([network.transforms(image) for image in images])) of uint8 images [H, W, C]"
    return "network(network.transforms(image)[None]) makes a batch of an image"


def _reshaped(shape: tuple[int, ...], in_chans: int) -> str:
    """The line that mends the shape of a tensor, after a space; "" where there is none."""
    if len(shape) == 3 and shape[0] == in_chans:
        return " One image is a batch of one: network(image[None])."
    if len(shape) == 3 and shape[2] == in_chans:
        return " Channels come first: network(image.permute(2, 0, 1)[None])."
    if len(shape) != 4:
        return " network(network.transforms(image)[None]) makes a batch of an image."
    if shape[3] == in_chans:
        return " Channels come first: network(images.permute(0, 3, 1, 2))."
    known = {1: ", or repeat gray: images.repeat(1, 3, 1, 1)", 4: ", or leave out alpha: images[:, :3]"}
    return f" Load with in_chans={shape[1]} for such images{known.get(shape[1], '') if in_chans == 3 else ''}."


def look_at(network: Any, x: Any, *, doubt: bool = True) -> tuple[float, float] | None:
    """Raise `InputError` for images with values that are not finite; warn once of those that do not fit the contract.

    On other devices than a CPU the first input alone is looked at, which `network._looked` remembers. `network` has a
    `contract`, or None. Returns the `extremes`, None if nothing was looked at.
    """
    import torch

    first = not getattr(network, "_looked", False)
    if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or (x.device.type != "cpu" and not first):
        return None
    span = extremes(x)
    if span is None:
        return None
    network._looked = True
    check_finite(x, span, "images", "images")
    told = not doubt or getattr(network, "_doubted", False)
    said = None if told or network.contract is None else network.contract.doubt(span)
    if said is not None:
        network._doubted = True
        name = getattr(network, "name", None) or "This network"
        warnings.warn(f"{name} expects {network.contract}; {said}", stacklevel=caller_level())
    return span


def extremes(x: Any) -> tuple[float, float] | None:
    """The least and the greatest value of a tensor; None where nobody may look: it is traced, compiled, or has none.

    Both are NaN where one value is.
    """
    import torch

    if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.jit.is_tracing():
        return None
    if x.is_meta or not x.numel() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    try:
        low, high = x.detach().aminmax()
        return float(low), float(high)
    except RuntimeError:  # inside torch.vmap values are not at hand
        return None


def check_finite(x: Tensor, span: tuple[float, float], what: str, name: str) -> None:
    """Raise `InputError` for an input with values that are NaN or infinite; `span`: its `extremes`."""
    if math.isfinite(span[0]) and math.isfinite(span[1]):
        return
    bad = int((~x.isfinite()).sum())
    raise InputError(
        f"{bad} of {x.numel()} values of the {what} are not finite (NaN or infinity); accepted: finite numbers; one "
        f"NaN spreads. torch.nan_to_num({name}, 0, 0, 0) replaces them; better find where they come from."
    )


def caller_level() -> int:
    """The `stacklevel` that makes a warning point at the first caller outside torch, the networks and this file."""
    import torch

    inner = (
        __file__,
        *(str(Path(__file__).parent / room) for room in ("backbones", "adapters")),
        str(Path(torch.__file__).parent),
    )
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inner):
        frame, level = frame.f_back, level + 1
    return level


# --- images into transforms


def to_image(image: Any, chans: int, call: str = "transforms") -> Tensor:
    """Convert any accepted image to a tensor [(B,) C, H, W], uint8 or float in [0, 1]; `InputError` for others.

    `call`: the function that was given it, for the line that mends it.
    """
    try:
        return _to_image(image, chans)
    except InputError as error:
        if call == "transforms":
            raise
        several = "torch.stack([transforms(image) for image in images])"
        text = str(error).replace(several, f"{call}(list(images))").replace("transforms(", f"{call}(")
        raise InputError(text) from None


def _to_image(image: Any, chans: int) -> Tensor:
    import numpy as np
    import torch

    if is_pil(image):
        image = _from_pil(image, chans)
    wanted = f"accepted, with C = {chans}: {IMAGE}"
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != chans:
            raise InputError(f"Got {described(image)}; {wanted}.{_array_line(image, chans)}")
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
    if not isinstance(image, torch.Tensor):
        raise InputError(f"Got {described(image)}; {wanted}.{_other_line(image)}")
    if image.ndim not in (3, 4) or image.shape[-3] != chans:
        raise InputError(f"Got {described(image)}; {wanted}.{_tensor_line(tuple(image.shape), chans)}")
    if not image.numel():
        raise InputError(f"Got {described(image)}, without a pixel; accepted: at least one image of one pixel.")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        line = "image.float())" if image.dtype == torch.bool else "image.to(torch.uint8)) for 0 to 255"
        raise InputError(f"Got {described(image)}; accepted: {IMAGE}. transforms({line}.")
    check_range(image, "images", "normalized already")
    return image


def _from_pil(image: Any, chans: int) -> Any:
    import numpy as np

    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"Got a PIL image of mode {image.mode!r} (16 bit or float); accepted: 8-bit images. Scale it first: "
            "transforms(torch.from_numpy(numpy.array(image) / LARGEST).expand(3, -1, -1))."
        )
    if chans not in (1, 3):
        raise InputError(f"A PIL image cannot give {chans} channels; accepted here: numpy or tensors with C = {chans}.")
    pixels = np.asarray(image.convert("RGB" if chans == 3 else "L"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _array_line(image: Any, chans: int) -> str:
    """The line that mends a numpy array, after a space."""
    if image.ndim == 3 and image.shape[0] == chans and image.dtype.kind == "u":
        return " Channels come last in arrays: transforms(image.transpose(1, 2, 0))."
    if image.dtype.kind == "f":
        return f" Floats in [0, 1] are given as a tensor: {_of_array(image.shape, chans)}."
    if image.dtype.kind == "b":
        return " transforms(image.astype(numpy.uint8) * 255) for black and white."
    if image.ndim == 4 and image.shape[1] == chans:
        return f" Batches are given as a tensor: {_of_array(image.shape, chans)}."
    if image.ndim == 4:
        return " Several: torch.stack([transforms(image) for image in images])."
    if image.ndim == 2 and chans == 3:
        return " Gray is repeated: transforms(numpy.repeat(image[..., None], 3, axis=2))."
    if image.ndim == 3 and image.shape[2] == 4 and chans == 3:
        return " Leave out alpha: transforms(image[..., :3])."
    return " transforms(image.astype(numpy.uint8)) for values from 0 to 255."


def _of_array(shape: tuple[int, ...], chans: int) -> str:
    """The call with an array as a tensor [(B,) C, H, W]."""
    turns = {2: f".expand({chans}, -1, -1)", 3: ".permute(2, 0, 1)", 4: ".permute(0, 3, 1, 2)"}
    first = len(shape) > 2 and shape[-3] == chans
    return f"transforms(torch.from_numpy(image){'' if first else turns.get(len(shape), '')})"


def _tensor_line(shape: tuple[int, ...], chans: int) -> str:
    if len(shape) in (3, 4) and shape[-1] == chans:
        order = "2, 0, 1" if len(shape) == 3 else "0, 3, 1, 2"
        return f" Channels come first in tensors: transforms(image.permute({order}))."
    if len(shape) in (3, 4) and shape[-3] == 4 and chans == 3:
        return " Leave out alpha: transforms(image[..., :3, :, :])."
    if len(shape) == 2 or (len(shape) in (3, 4) and shape[-3] == 1):
        return f" Gray is repeated: transforms(image.expand({'-1, ' * (len(shape) == 4)}{chans}, -1, -1))."
    return f" For such channels load the network with in_chans={shape[-3]}." if len(shape) in (3, 4) else ""


def _other_line(image: Any) -> str:
    if is_path(image):
        return f" transforms(PIL.Image.open({os.fspath(image)!r}))."
    if isinstance(image, list | tuple) and not image:
        return " There is nothing in it: leave it out."
    if isinstance(image, list | tuple):
        return " Several: torch.stack([transforms(image) for image in images])."
    return ""


def check_range(values: Tensor, what: str, below: str) -> None:
    """Raise `InputError` unless all values lie in [0, 1]; `below`: what was done to them if they are negative."""
    if not values.numel():
        return
    low, high = (float(bound) for bound in values.detach().aminmax())
    if low >= 0 and high <= 1:
        return
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~values.isfinite()).sum())
        raise InputError(
            f"Float {what} must lie in [0, 1]; {bad} of {values.numel()} values are not finite (NaN or infinity). "
            "torch.nan_to_num(values, 0, 0, 0) replaces them; better find where they come from."
        )
    raise InputError(
        f"Float {what} must lie in [0, 1]; these span [{low:.4g}, {high:.4g}]. Below 0 they were probably {below}; "
        "up to 255 they need dividing by 255 (or pass uint8)."
    )


# --- points


def as_tensor(values: Any) -> Tensor:
    """A tensor as it is, a copy of anything else that numpy makes numbers of."""
    import numpy as np
    import torch

    # a copy of arrays: torch dislikes those that are read-only or run backwards
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def to_points(points: Any, call: str = "encode_points", *, together: bool = True) -> Tensor:
    """Convert points to a tensor [N, 3], finite and in meters; `InputError` for others.

    `call`: the function that was given them, for the line that mends it.
    """
    try:
        return _to_points(points, together)
    except InputError as error:
        if call == "encode_points":
            raise
        joined = BATCHED.partition("{join}")[0]
        text = str(error).partition(f" A batch: {joined}")[0].replace("encode_points(", f"{call}(")
        raise InputError(text.replace(", features=cloud[:, 3:]", "")) from None


def _to_points(points: Any, together: bool) -> Tensor:
    given = points
    points = _numbers(points, "points", POINTS)
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point() or not len(points):
        shown = f"{points.dtype} {tuple(points.shape)}"
        raise InputError(f"points are {shown}; accepted: {POINTS}.{_points_line(given, points)}")
    extent = float((points.amax(dim=0) - points.amin(dim=0)).max())
    if not math.isfinite(extent) and not points.isfinite().all():
        bad = int((~points.isfinite()).any(dim=1).sum())
        raise InputError(
            f"Some points are not finite (NaN or infinity), {bad} of {len(points)}; accepted: finite numbers. Drop "
            "those rows: good = points.isfinite().all(1) (of arrays numpy.isfinite), points[good], features[good]."
        )
    if together:
        check_extents(points, None)
    return points


def check_extents(points: Tensor, batch: Tensor | None) -> None:
    """Raise `InputError` where points, or those of one cloud of a batch, int [N], are farther apart than any scan's."""
    clouds = [points] if batch is None else [points[batch == number] for number in batch.unique()]
    extent = max(float((own.amax(dim=0) - own.amin(dim=0)).max()) for own in clouds)
    if extent > MAX_EXTENT:
        raise InputError(
            f"The points span {extent:.4g} m; accepted: meters, up to {MAX_EXTENT:g}. "
            "Millimeters need dividing by 1000: points / 1000."
        )


def _points_line(given: Any, points: Tensor) -> str:
    """The line that mends points of another shape or type, after a space; "" where there is none."""
    shape = tuple(points.shape)
    if points.ndim == 3 and shape[2] == 3:
        return f" A batch: {BATCHED.format(join=_joiner(given)).replace('clouds', 'points')}."
    if points.ndim != 2:
        return " One row a point: points.reshape(-1, 3)." if points.ndim and shape[-1] == 3 else ""
    if not len(points):
        return " The cloud is empty: leave it out."
    if shape[0] == 3 and shape[1] != 3:
        return " One row a point: points.T."
    if shape[1] > 3:
        return " Coordinates first, the rest apart: encode_points(cloud[:, :3], features=cloud[:, 3:])."
    if shape[1] == 3:
        return " Whole numbers are no meters: points * METERS_PER_UNIT; numbers of voxels go into a SparseTensor."
    return " Every point needs x, y and z."


def _joiner(values: Any) -> str:
    import torch

    inside = values[0] if isinstance(values, list | tuple) and values else values
    return "torch.cat" if isinstance(inside, torch.Tensor) else "numpy.concatenate"


def _numbers(values: Any, what: str, wanted: str) -> Tensor:
    """A tensor of numbers; `InputError` for paths, several clouds, and what holds no numbers."""
    import torch

    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, list | tuple) and any(getattr(item, "ndim", 0) == 2 for item in values):
        line = BATCHED.format(join=_joiner(values)) if what == "points" else f"{_joiner(values)}({what})"
        raise InputError(f"{what} are {described(values)}; accepted: one, {wanted}. Several clouds: {line}.")
    try:
        return as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        line = ""
        if is_path(values):
            path = os.fspath(values)
            ending = Path(path).suffix.lower()
            line = f" numpy.load({path!r})" if ending == ".npy" else " Read the file first; `geo-pretrain predict` does"
            line += "."
        raise InputError(f"{what} are {described(values)}; accepted: {wanted}.{line}") from None


def to_batch(batch: Any, points: Tensor) -> Tensor:
    """Convert the number of the cloud of every point to integers [N]; `InputError` for others."""
    batch = _numbers(batch, "batch", f"integers [{len(points)}]")
    if batch.shape != points.shape[:1] or batch.is_floating_point():
        line = "" if batch.shape == points.shape[:1] else " [len(cloud) for cloud in clouds] has to add up to it."
        raise InputError(
            f"batch is {batch.dtype} {tuple(batch.shape)}; accepted: integers [N], N = {len(points)}, the number of "
            f"each point's cloud (0, 1, ...).{line or ' batch.long()'}"
        )
    return batch.to(points.device)


def to_features(features: Any, points: Tensor, names: Sequence[str], colors: set[str]) -> Tensor:
    """Convert features of points to floats [N, C] for the channels `names`, of which `colors` lie in [0, 1].

    Raises `InputError` for others, and for values that are not finite.
    """
    import torch

    count, kinds = len(points), "uint8 or float in [0, 1]" if set(names) <= colors else "float"
    wanted = f"[{count}, {len(names)}] ({', '.join(names)})"
    if features is None:
        raise InputError(
            f"This network needs features of the points; accepted: {kinds} {wanted}: encode_points(points, features)."
        )
    features = _numbers(features, "features", f"{kinds} {wanted}").to(points.device)
    if features.shape != (count, len(names)):
        raise InputError(f"features are {tuple(features.shape)}; accepted: {wanted}, one row a point.")
    if features.dtype == torch.uint8 and set(names) <= colors:
        features = as_float(features)
    if not features.is_floating_point():
        line = " features.to(torch.uint8) for colors from 0 to 255." if set(names) <= colors else " features.float()."
        raise InputError(f"features are {features.dtype}; accepted: {kinds}.{line}")
    check_range(features[:, [name in colors for name in names]], "colors", "shifted already, which is done here")
    finite = features.isfinite().all(dim=0)
    if not finite.all():
        wrong = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
        raise InputError(
            f"Some features ({', '.join(wrong)}) are not finite; accepted: finite numbers. Drop those rows: "
            "good = features.isfinite().all(1), then points[good] and features[good]."
        )
    return features


def as_float(values: Tensor) -> Tensor:
    """Values in float32; bytes are divided by 255."""
    import torch

    return values.to(torch.float32) / 255 if values.dtype == torch.uint8 else values.to(torch.float32)
