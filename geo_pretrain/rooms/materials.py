"""Colors and patterns of a room: one small palette, shared by all things regardless of their class.

No class owns a color or a pattern: walls, sofas, tables and bins draw from the same palette, so that a network that
looks at color alone cannot tell them apart. What differs between materials is their role (cloth, hard, metal, ...).
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geo_pretrain.rooms.scene import Material
from geo_pretrain.rooms.textures import PATTERN_ID, TABLE

Color = tuple[float, float, float]

# Neutral and wood tones (sRGB) that real rooms are full of; accents are drawn freely.
_NEUTRALS: tuple[Color, ...] = (
    (0.93, 0.92, 0.90),
    (0.86, 0.83, 0.77),
    (0.78, 0.74, 0.68),
    (0.66, 0.66, 0.68),
    (0.45, 0.45, 0.47),
    (0.25, 0.26, 0.29),
    (0.12, 0.12, 0.13),
)
_WOODS: tuple[Color, ...] = (
    (0.78, 0.62, 0.43),
    (0.68, 0.49, 0.31),
    (0.55, 0.36, 0.21),
    (0.40, 0.25, 0.15),
    (0.28, 0.18, 0.12),
    (0.86, 0.76, 0.60),
)


# Periods (m) of patterns that have a size of their own, whatever they cover.
_OWN_SCALES: dict[str, tuple[float, float]] = {"weave": (0.012, 0.04), "spines": (0.025, 0.06), "marble": (0.15, 0.5)}


@dataclass(frozen=True)
class Look:
    """How rich and how difficult the surfaces of a room are."""

    plain: float  # share of surfaces without texture
    contrast: float  # how far apart the two colors of a pattern are, 0..1
    gloss: float  # scales every gloss
    grain: float  # scales fine noise


LOOKS: dict[str, Look] = {
    "easy": Look(plain=0.15, contrast=1.0, gloss=0.3, grain=1.0),
    "medium": Look(plain=0.35, contrast=0.75, gloss=0.8, grain=0.7),
    "hard": Look(plain=0.6, contrast=0.45, gloss=1.3, grain=0.35),
}


def linear(color: Sequence[float]) -> Color:
    """Convert sRGB to linear RGB (gamma 2.2)."""
    r, g, b = (float(np.clip(c, 0, 1)) ** 2.2 for c in color)
    return r, g, b


class Palette:
    """The colors of one room, from which its materials are drawn; uses `rng` in call order."""

    def __init__(self, rng: np.random.Generator, difficulty: str) -> None:
        self.rng = rng
        self.look = LOOKS[difficulty]
        accents = [self._accent() for _ in range(5)]
        neutrals = [_NEUTRALS[i] for i in rng.choice(len(_NEUTRALS), 4, replace=False)]
        woods = [_WOODS[i] for i in rng.choice(len(_WOODS), 3, replace=False)]
        self.colors: list[Color] = [*accents, *neutrals, *woods]
        self.woods = woods

    def _accent(self) -> Color:
        hue, saturation = self.rng.random(), self.rng.uniform(0.15, 0.75)
        return colorsys.hsv_to_rgb(hue, saturation, self.rng.uniform(0.35, 0.95))

    def color(self, light: bool = False) -> Color:
        """Draw a palette color (sRGB) with a little jitter; `light` lifts it towards white."""
        color = np.array(self.colors[self.rng.integers(len(self.colors))])
        color = color * self.rng.uniform(0.85, 1.12) + self.rng.normal(0, 0.02, 3)
        if light:
            color = 0.4 * color + 0.6 * self.rng.uniform(0.75, 0.97)
        r, g, b = np.clip(color, 0.04, 0.97)
        return float(r), float(g), float(b)

    def _second(self, base: Color) -> Color:
        """Draw the second color of a pattern: another of the palette or another shade, closer when contrast is low."""
        other = np.array(self.color()) if self.rng.random() < 0.6 else np.array(base) * self.rng.choice([0.55, 1.5])
        mixed = np.array(base) + (np.clip(other, 0, 1) - base) * self.look.contrast
        return float(mixed[0]), float(mixed[1]), float(mixed[2])

    def make(self, pattern: str, base: Color, second: Color, *, scale: float, gloss: float = 0.0) -> Material:
        """Make a material with this room's gloss and grain; colors are sRGB."""
        return Material(
            pattern=PATTERN_ID[pattern],
            base=linear(base),
            second=linear(second),
            scale=scale,
            gloss=float(min(gloss * self.look.gloss, 0.9)),
            shine=float(self.rng.uniform(12, 90)),
            seed=int(self.rng.integers(TABLE)),
            grain=float(self.look.grain * self.rng.uniform(0.0, 0.18)),
        )

    def _deal(
        self, patterns: Sequence[str], scales: tuple[float, float], gloss: float, light: bool = False
    ) -> Material:
        base = self.color(light)
        pattern = "plain" if self.rng.random() < self.look.plain else str(self.rng.choice(list(patterns)))
        low, high = np.log(_OWN_SCALES.get(pattern, scales))
        return self.make(
            pattern, base, self._second(base), scale=float(np.exp(self.rng.uniform(low, high))), gloss=gloss
        )

    def cloth(self) -> Material:
        """Upholstery, blankets, curtains, rugs."""
        patterns = (
            "stripes",
            "checks",
            "plaid",
            "dots",
            "noise",
            "weave",
            "weave",
            "weave",
            "spines",
            "picture",
            "tiles",
        )
        return self._deal(patterns, (0.05, 0.25), 0.0)

    def hard(self) -> Material:
        """Painted or wooden furniture."""
        if self.rng.random() < 0.5:
            return self.wood()
        return self._deal(
            ("noise", "marble", "stripes", "checks", "weave", "picture", "tiles"), (0.06, 0.4), 0.25 * self.rng.random()
        )

    def wood(self) -> Material:
        """Wood, sometimes stained in a palette color."""
        base = self.woods[self.rng.integers(len(self.woods))] if self.rng.random() < 0.7 else self.color()
        dark: Color = (base[0] * 0.6, base[1] * 0.55, base[2] * 0.5)
        scale = float(self.rng.uniform(0.03, 0.09))
        return self.make("wood", base, dark, scale=scale, gloss=0.3 * self.rng.random())

    def metal(self) -> Material:
        """Legs, handles, frames: plain and often glossy."""
        base = self.color()
        return self.make("plain", base, base, scale=0.1, gloss=float(self.rng.uniform(0.2, 0.7)))

    def ceramic(self) -> Material:
        """Vases, lamp feet, balls: often glossy."""
        return self._deal(
            ("stripes", "dots", "marble", "checks", "noise"), (0.03, 0.12), float(self.rng.uniform(0.1, 0.7))
        )

    def wall(self) -> Material:
        """Paint or wallpaper."""
        if self.rng.random() < 0.1:
            return self._deal(("tiles", "tiles", "planks"), (0.08, 0.25), 0.2)
        return self._deal(
            ("noise", "stripes", "weave", "dots", "checks"), (0.1, 0.5), 0.0, light=self.rng.random() < 0.65
        )

    def floor(self) -> Material:
        """Boards, tiles, carpet or lino."""
        draw = self.rng.random()
        gloss = float(self.rng.uniform(0.0, 0.45))
        if draw < 0.45:
            base = self.woods[self.rng.integers(len(self.woods))]
            dark: Color = (base[0] * 0.65, base[1] * 0.6, base[2] * 0.55)
            return self.make("planks", base, dark, scale=float(self.rng.uniform(0.08, 0.2)), gloss=gloss)
        if draw < 0.7:
            base = self.color()
            return self.make("tiles", base, self._second(base), scale=float(self.rng.uniform(0.2, 0.5)), gloss=gloss)
        return self._deal(("weave", "noise", "checks", "marble"), (0.1, 0.4), 0.3 * gloss)

    def ceiling(self) -> Material:
        """Light paint, at times boards."""
        if self.rng.random() < 0.12:
            return self.make("planks", self.color(True), self.color(True), scale=0.15, gloss=0.0)
        base = self.color(True)
        return self.make("plain", base, base, scale=0.2)

    def picture(self) -> Material:
        """A painting (each seed is another one), a view out of a window, or a piece of cloth in a frame."""
        draw = self.rng.random()
        if draw < 0.15:
            return self.cloth()
        if draw < 0.3:
            return self.make("outdoor", self.color(light=True), self.color(), scale=0.3)
        return self.make("picture", self.color(), self.color(), scale=0.2, gloss=0.25 * self.rng.random())

    def outdoor(self, brightness: float) -> Material:
        """What a window shows; it gives off light."""
        sky = (0.75 + 0.2 * self.rng.random(), 0.8 + 0.15 * self.rng.random(), 0.9 + 0.1 * self.rng.random())
        material = self.make("outdoor", sky, self.color(), scale=0.3, gloss=0.3)
        return _emitting(material, brightness)

    def screen(self) -> Material:
        """A display: dark and glossy, or lit."""
        if self.rng.random() < 0.5:
            dark = self.rng.uniform(0.03, 0.15)
            return self.make("plain", (dark, dark, dark), (dark, dark, dark), scale=0.1, gloss=0.6)
        pattern = str(self.rng.choice(["screen", "screen", "picture"]))
        return _emitting(self.make(pattern, self.color(), self.color(), scale=0.1, gloss=0.4), 0.8)

    def shade(self, glow: float) -> Material:
        """A lamp shade that glows when lit."""
        material = self._deal(("stripes", "weave", "dots"), (0.03, 0.1), 0.0, light=True)
        return _emitting(material, glow)

    def books(self) -> Material:
        """A row of books: mostly backs of many colors, at times all bound alike."""
        if self.rng.random() < 0.25:
            return self.cloth()
        return self.make("spines", self.color(), self.color(), scale=float(self.rng.uniform(0.025, 0.045)))

    def leaves(self) -> Material:
        """Leaves: of any palette color or of a random green, so that green is no proof of a plant."""
        base = self.color()
        if self.rng.random() < 0.5:
            base = colorsys.hsv_to_rgb(
                self.rng.uniform(0.2, 0.42), self.rng.uniform(0.3, 0.8), self.rng.uniform(0.25, 0.7)
            )
        dark: Color = (base[0] * 0.6, base[1] * 0.65, base[2] * 0.6)
        return self.make("noise", base, dark, scale=float(self.rng.uniform(0.05, 0.15)), gloss=0.2 * self.rng.random())


def _emitting(material: Material, strength: float) -> Material:
    return Material(**{**material.__dict__, "emit": float(strength)})
