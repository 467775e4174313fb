"""Random augmentation: crops and colors of images, rotation and elastic distortion of point clouds.

Every draw comes from the generator that is passed in, in a fixed order: a sample depends on its key alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from geo_pretrain.contract import ImageContract
from geo_pretrain.geometry import centered, rotation
from geo_pretrain.training.recipe import AugmentSpec

Rotation = Literal["full", "upright", "none"]

BOX_ATTEMPTS = 10  # boxes drawn before the crop falls back to the largest central one, as torchvision does
TILT = math.pi / 64  # limit of an upright rotation about x and y
MOST_NODES = 128  # of the elastic grid along an axis: 25 m at the papers' finer spacing of 0.2 m
ELASTIC_BLURS = 2  # rounds of a 3-tap box filter along each axis


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


class Normalize:
    """Subtract the mean and divide by the standard deviation that a network's contract names."""

    def __init__(self, contract: ImageContract) -> None:
        self.mean = torch.tensor(contract.mean).view(3, 1, 1)
        self.std = torch.tensor(contract.std).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """Normalize a float image [3, H, W] in [0, 1]."""
        return (image - self.mean) / self.std

    def fill_color(self) -> np.ndarray:
        """Compute the color, uint8 [3], that normalizes to nearly 0."""
        color: np.ndarray = (255 * self.mean.flatten()).round().to(torch.uint8).numpy()
        return color


@dataclass(frozen=True)
class Crop:
    """A box of an image, in pixels, and whether it is mirrored left to right after cropping."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Crop:
    """Draw a crop of an image of `size` (height, width) as torchvision's `RandomResizedCrop` does.

    The area is uniform in `scale` (shares of the image's), the aspect ratio log-uniform in `ratio`. A box that does not
    fit is drawn again; after `BOX_ATTEMPTS` the crop is the largest central box of an accepted aspect ratio.

    Args:
        dtype: precision of the draws. With float32 they equal torchvision's, draw for draw.
    """
    height, width = size
    low, high = torch.log(torch.tensor(ratio, dtype=dtype)).tolist()
    for _ in range(BOX_ATTEMPTS):
        area = height * width * torch.empty(1, dtype=dtype).uniform_(*scale, generator=generator).item()
        aspect = torch.empty(1, dtype=dtype).uniform_(low, high, generator=generator).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return Crop(top, left, h, w)
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def crop_resize(color: np.ndarray, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """Crop a uint8 image [H, W, 3] and resize the box bilinearly to `size` (height, width): uint8."""
    box = color[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    view = np.array(Image.fromarray(box).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return view[:, ::-1].copy() if crop.flip else view


def augment_colors(
    color: np.ndarray, spec: AugmentSpec, generator: torch.Generator, blur_taps: int | None = None
) -> Tensor:
    """Jitter, convert to gray and blur a uint8 image [H, W, 3], each with its probability: float [3, H, W] in [0, 1].

    Args:
        blur_taps: blur with a Gaussian kernel of so many taps whose sigma is drawn from `spec.blur_radius`; the kernel
            is shortened to the largest odd one that the image can mirror at its border. None: Pillow's blur, as Pri3D.
    """
    from torchvision.transforms.v2 import functional as tvf  # here: point clouds do without torchvision

    image = Image.fromarray(color)
    if uniform(0, 1, generator) < spec.jitter_prob:
        image = _jitter(image, spec.jitter, generator)
    if uniform(0, 1, generator) < spec.grayscale_prob:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    blurs = uniform(0, 1, generator) < spec.blur_prob
    if blur_taps is None:
        if blurs:
            image = image.filter(ImageFilter.GaussianBlur(uniform(*spec.blur_radius, generator)))
        return _to_tensor(image)
    pixels = _to_tensor(image)
    if uniform(0, 1, generator) < spec.blur_prob:  # not `blurs`: stored runs drew a second number here
        sigma = uniform(*spec.blur_radius, generator)
        taps = min(blur_taps, 2 * min(pixels.shape[1:]) - 1)
        for kernel in ([taps, 1], [1, taps]):  # one axis after the other: equal, and ten times faster
            pixels = tvf.gaussian_blur(pixels, kernel, [sigma, sigma])
    return pixels


def _jitter(
    image: Image.Image, strengths: tuple[float, float, float, float], generator: torch.Generator
) -> Image.Image:
    """Change brightness, contrast, saturation and hue in random order, as Pri3D draws them."""
    from torchvision.transforms.v2 import functional as tvf

    brightness, contrast, saturation, hue = strengths
    operations = [
        (tvf.adjust_brightness, uniform(max(0, 1 - brightness), 1 + brightness, generator)),
        (tvf.adjust_contrast, uniform(max(0, 1 - contrast), 1 + contrast, generator)),
        (tvf.adjust_saturation, uniform(max(0, 1 - saturation), 1 + saturation, generator)),
        (tvf.adjust_hue, uniform(-hue, hue, generator)),
    ]
    for k in torch.randperm(4, generator=generator).tolist():
        operation, factor = operations[k]
        image = operation(image, factor)
    return image


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def random_rotation(generator: torch.Generator, mode: Rotation) -> Tensor:
    """Draw a rotation as the released loaders do: float64 [4, 4].

    "full" (PointContrast): about the direction of rand(3) - 0.5 by an angle in [-pi, pi), which is not uniform over
    rotations. "upright" (CSC): +-pi/64 about x and y and +-pi about z, one after another in random order.
    """
    if mode == "none":
        return torch.eye(4, dtype=torch.float64)
    draw = torch.rand(4, generator=generator, dtype=torch.float64)
    if mode == "full":
        return rotation(draw[:3] - 0.5, (2 * float(draw[3]) - 1) * math.pi)
    limits = torch.tensor([TILT, TILT, math.pi], dtype=torch.float64)
    angles = (2 * draw[:3] - 1) * limits
    rotations = [rotation(axis, float(angle)) for axis, angle in zip(torch.eye(3), angles, strict=True)]
    first, second, third = torch.randperm(3, generator=generator).tolist()
    return rotations[first] @ rotations[second] @ rotations[third]


def scaled_rotation(points: Tensor, scale: float, mode: Rotation, generator: torch.Generator) -> Tensor:
    """Scale points [N, 3] and rotate them at random about their centroid, which moves to the origin: float64 [4, 4].

    With `mode` "none" they are only scaled, about the origin.
    """
    scaled = torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=torch.float64))
    return scaled if mode == "none" else random_rotation(generator, mode) @ scaled @ centered(points)


def elastic_grid(points: Tensor, granularity: float) -> tuple[int, int, int]:
    """Size of the noise grid for points [N, 3] (m) at a spacing of `granularity` (m), with a node beyond either end.

    At most `MOST_NODES` along an axis: a pixel far away would else cost the cube of its distance.
    """
    extent = points.amax(dim=0) - points.amin(dim=0)
    x, y, z = (torch.floor(extent.double() / granularity).long() + 3).clamp(max=MOST_NODES).tolist()
    return x, y, z


def elastic_distortion(points: Tensor, noise: Tensor, granularity: float, magnitude: float) -> Tensor:
    """Displace points [N, 3] (m) by `magnitude` (m) times blurred noise, interpolated at each point.

    From the augmentations of SparseConvNet and MinkowskiEngine's examples, which the downstream code of PointContrast
    and CSC (Hou et al., CVPR 2021) shares.

    Args:
        noise: [X, Y, Z, 3] of `elastic_grid`'s size, standard normal. Node (1, 1, 1) lies at the lowest corner of the
            points, the next ones `granularity` (m) apart. Noise outside the grid counts as 0 in the blur. Where points
            reach beyond the grid it is repeated.
    """
    smooth = noise
    for _ in range(ELASTIC_BLURS):
        for axis in range(3):
            count = smooth.shape[axis] - 1
            box = smooth.clone()  # three neighbors by shifted sums, many times quicker than a convolution
            box.narrow(axis, 1, count).add_(smooth.narrow(axis, 0, count))
            box.narrow(axis, 0, count).add_(smooth.narrow(axis, 1, count))
            smooth = box.div_(3)
    position = (points - points.amin(dim=0)).to(noise.dtype) / granularity + 1
    low = position.floor().long()
    size = low.new_tensor(noise.shape[:3])
    fraction = position - low
    displacement = torch.zeros_like(position)
    for corner in range(8):
        step = low.new_tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        weight = torch.where(step.bool(), fraction, 1 - fraction).prod(dim=1, keepdim=True)
        x, y, z = ((low + step) % size).unbind(1)  # a point at the far end may round up onto the last node
        displacement += weight * smooth[x, y, z]
    return points + (magnitude * displacement).to(points.dtype)
