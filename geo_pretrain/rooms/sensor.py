"""A camera model for radiance and exact depth: exposure, noise, and optionally a Kinect's depth errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sensor:
    """Strengths of a camera's imperfections; colors in units of full scale."""

    noise: float  # standard deviation at mid gray
    balance: float  # white-balance change from frame to frame
    exposure: float  # brightness change from frame to frame
    vignette: float  # darkening in the corners


SENSORS: dict[str, Sensor] = {
    "easy": Sensor(noise=1.0 / 255, balance=0.005, exposure=0.02, vignette=0.0),
    "medium": Sensor(noise=2.5 / 255, balance=0.02, exposure=0.08, vignette=0.08),
    "hard": Sensor(noise=5.0 / 255, balance=0.045, exposure=0.2, vignette=0.18),
}


def develop(radiance: np.ndarray, sensor: Sensor, rng: np.random.Generator) -> np.ndarray:
    """Convert linear radiance [H, W, 3] to uint8 sRGB: auto exposure, soft shoulder, gamma, white balance and noise."""
    height, width = radiance.shape[:2]
    mean = float(radiance.mean()) + 1e-4
    # Not full compensation: dark rooms stay darker than bright ones.
    gain = (0.21 / mean) ** 0.85 * float(np.exp(rng.normal(0, sensor.exposure)))
    balance = np.exp(rng.normal(0, sensor.balance, 3)).astype(np.float32)
    light = radiance * (gain * balance)
    if sensor.vignette:
        v, u = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
        light *= (1 - sensor.vignette * (u * u + v * v))[..., None]
    light = np.where(light > 0.6, 0.6 + 0.4 * (1 - np.exp(-(light - 0.6) / 0.4)), light)
    image = np.maximum(light, 0) ** np.float32(1 / 2.2)
    # Shot noise grows with the light, read noise does not.
    spread = sensor.noise * np.sqrt(0.4 + 1.2 * image)
    image = image + spread * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def disturb_depth(
    depth: np.ndarray, slant: np.ndarray, gloss: np.ndarray, fx: float, rng: np.random.Generator
) -> np.ndarray:
    """Simulate a structured-light depth image: axial and lateral noise, disparity steps, holes (0).

    Axial noise and its growth with depth and slant after Nguyen, Izadi & Lovell, "Modeling Kinect Sensor Noise"
    (3DIMPVT 2012); holes at shadows of edges, grazing angles and glossy surfaces. depth, slant, gloss: [H, W].
    """
    height, width = depth.shape
    rows, columns = np.mgrid[0:height, 0:width]
    shift = rng.normal(0, 0.4, (2, height, width)) * (width / 320)
    r = np.clip(np.rint(rows + shift[0]), 0, height - 1).astype(np.int64)
    c = np.clip(np.rint(columns + shift[1]), 0, width - 1).astype(np.int64)
    measured = depth[r, c].astype(np.float64)
    angle = np.arccos(np.clip(slant, 0.0, 1.0))
    sigma = 0.0012 + 0.0019 * (measured - 0.4) ** 2
    sigma += 0.0001 / np.sqrt(np.maximum(measured, 0.1)) * angle**2 / np.maximum(np.pi / 2 - angle, 0.05) ** 2
    measured += sigma * rng.standard_normal((height, width))
    base = 0.075 * fx * (640 / width)  # m px: baseline times the sensor's own focal length
    measured = base / (np.rint(base / np.maximum(measured, 0.1) * 8) / 8)
    holes = (slant < 0.12) | (measured < 0.4) | (measured > 8.0)
    # The projector sits to one side: a strip beside each edge is in its shadow.
    for step in range(1, 1 + round(5 * width / 320)):
        drop = np.zeros_like(holes)
        drop[:, step:] = depth[:, step:] > depth[:, :-step] + 0.08 + 0.09 * step * depth[:, step:] / fx
        holes |= drop & (0.075 * fx * (1 / depth[:, np.maximum(np.arange(width) - step, 0)] - 1 / depth) >= step)
    patch = _blobs(height, width, 9 * width / 320, rng)
    holes |= patch < 0.5 * gloss * np.clip(1.3 - slant, 0, 1)
    holes |= rng.random((height, width)) < 0.002
    return np.where(holes, 0.0, measured).astype(np.float32)


def _blobs(height: int, width: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """Draw smooth random values [H, W] in [0, 1] whose bumps are about `cell` pixels wide."""
    rows, columns = (np.arange(count) / max(cell, 2.0) for count in (height, width))
    grid = rng.random((int(rows[-1]) + 2, int(columns[-1]) + 2))
    r, c = rows.astype(np.int64), columns.astype(np.int64)
    down, across = (rows - r)[:, None], columns - c
    upper = grid[r][:, c] * (1 - across) + grid[r][:, c + 1] * across
    lower = grid[r + 1][:, c] * (1 - across) + grid[r + 1][:, c + 1] * across
    return np.asarray(upper * (1 - down) + lower * down)
