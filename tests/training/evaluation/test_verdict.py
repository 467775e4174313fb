"""Sentences under tables: intervals against numbers computed by hand, and what is said on either side of chance."""

from __future__ import annotations

import math

import pytest

from geo_pretrain.training.evaluation.metrics import Interval
from geo_pretrain.training.evaluation.verdict import T95, of_starts, over_seeds, sentence


def test_the_interval_over_seeds_is_students():
    gain = over_seeds([0.3, 0.5, 0.4], [0.2, 0.2, 0.2])  # gains 0.1, 0.3, 0.2: mean 0.2, deviation 0.1
    assert gain.mean == pytest.approx(0.2)
    assert gain.low == pytest.approx(0.2 - 4.303 * 0.1 / math.sqrt(3))
    assert gain.high == pytest.approx(0.2 + 4.303 * 0.1 / math.sqrt(3))
    assert gain.over == "3 seeds"


def test_the_table_of_t_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees, value in T95.items():
        assert value == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)


@pytest.mark.parametrize("count", [20, 30, 31, 60, 200])
def test_intervals_of_many_seeds_are_no_narrower_than_students(count):
    stats = pytest.importorskip("scipy.stats")
    gain = over_seeds(range(count), [0] * count)
    spread = stats.t.ppf(0.975, count - 1) * math.sqrt((count + 1) / 12)
    assert spread * 0.999 <= gain.high - gain.mean <= spread * 1.03


@pytest.mark.parametrize(
    "gain, said",
    [
        (Interval(0.1, 0.05, 0.15, "scenes"), "a is better than b by 10.0 points, beyond chance"),
        (Interval(-0.1, -0.15, -0.05, "scenes"), "a is worse than b by 10.0 points, beyond chance"),
        (Interval(0.01, -0.05, 0.07, "scenes"), "a and b do not differ beyond chance: +1.0 points"),
        (over_seeds([0.3], [0.35]), "a is 5.0 points below b, in one seed. More seeds tell"),
        (over_seeds([0.3], [0.3]), "a scores as b does, in one seed. More seeds tell"),
        (over_seeds([0.3, math.nan], [0.2, 0.2]), "a and b cannot be compared: a score is not a number."),
    ],
)
def test_what_is_said(gain, said):
    assert sentence("a", "b", gain).startswith(said)


def test_the_best_start_stands_beside_the_baseline():
    scores = {"from scratch": {0: 0.2, 1: 0.21}, "a": {0: 0.3, 1: 0.31}, "b": {0: 0.25, 1: 0.26}}
    assert of_starts(scores, "from scratch", "20 %: ").startswith("20 %: a is better than from scratch by 10.0 points")
    assert of_starts({"a": {0: 0.3}}, "from scratch") == ""


def test_starts_are_compared_over_the_seeds_that_both_have():
    scores = {"x": {0: 0.1, 1: 0.5}, "y": {1: 0.6, 2: 0.1, 0: 0.2}}
    scores["x"][3] = 0.0
    assert of_starts(scores, "x").startswith("y is better than x by 10.0 points, beyond chance (95 % interval +10.0 to")
    assert "no seed in common, so chance is not judged" in of_starts(
        {"x": {0: 0.1, 1: 0.2}, "y": {2: 0.3, 3: 0.4}}, "x"
    )
