"""One plain sentence under a table: is it better than the baseline, and beyond chance?

Repetitions with the same seeds are compared pair by pair: the 95 % interval of the mean difference is Student's t.
One seed has no interval, and the sentence says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from geo_pretrain.training.evaluation.metrics import Interval, Spread

# Student's t for a two-sided interval of 95 %, by degrees of freedom; between them that of the fewer, which is wider
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 29: 2.045}
T95 |= {59: 2.001, 119: 1.980}
MORE_SEEDS = "More seeds tell how far chance moves it."


def over_seeds(ours: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean of `ours` - `baseline`, value by value, with its 95 % interval; infinite for one value.

    >>> str(over_seeds([0.30, 0.34, 0.32], [0.20, 0.22, 0.21]))
    '+11.0 (95 % interval +8.5 to +13.5, over 3 seeds)'
    """
    gains = [one - other for one, other in zip(ours, baseline, strict=True)]
    mean, count = statistics.mean(gains), len(gains)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, "1 seed")
    half = T95[max(degrees for degrees in T95 if degrees < count)] * Spread(tuple(gains)).std / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, f"{count} seeds")


def sentence(name: str, baseline: str, gain: Interval, hint: str = MORE_SEEDS) -> str:
    """Whether `name` is better than `baseline`, by an interval of the difference; `hint` follows where it is not told.

    >>> print(sentence("runs/a", "random weights", Interval(0.1, 0.05, 0.15, "scenes")))
    runs/a is better than random weights by 10.0 points, beyond chance (95 % interval +5.0 to +15.0, over scenes).
    """
    points = f"{100 * abs(gain.mean):.1f} points"
    if math.isnan(gain.mean):
        return f"{name} and {baseline} cannot be compared: a score is not a number."
    if math.isinf(gain.high):
        if gain.mean == 0:
            return f"{name} scores as {baseline} does, in one seed. {hint}"
        side = "above" if gain.mean > 0 else "below"
        return f"{name} is {points} {side} {baseline}, in one seed. {hint}"
    interval = f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}, over {gain.over}"
    if gain.low > 0:
        return f"{name} is better than {baseline} by {points}, beyond chance ({interval})."
    if gain.high < 0:
        return f"{name} is worse than {baseline} by {points}, beyond chance ({interval})."
    return f"{name} and {baseline} do not differ beyond chance: {100 * gain.mean:+.1f} points ({interval}). {hint}"


def of_starts(scores: Mapping[str, Mapping[int, float]], baseline: str, what: str = "") -> str:
    """The best of several starts (scores by seed) beside the baseline, over the seeds that both have."""
    others = {name: by_seed for name, by_seed in scores.items() if name != baseline and by_seed}
    if baseline not in scores or not others:
        return ""
    best = max(others, key=lambda name: statistics.mean(others[name].values()))
    ours, theirs = others[best], scores[baseline]
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return f"{what}{best} is highest; it and {baseline} have no seed in common, so chance is not judged."
    return what + sentence(best, baseline, over_seeds([ours[seed] for seed in both], [theirs[seed] for seed in both]))
