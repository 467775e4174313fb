"""What is said under the table of pretext tasks."""

from __future__ import annotations

from typing import Any

from geo_pretrain.training.bench.report import MEASURES, verdicts


def row(scores: dict[int, float]) -> dict[str, Any]:
    return {"seeds": list(scores)} | {measure: list(scores.values()) for measure in MEASURES}


def said(random: dict[int, float], tasks: dict[str, dict[int, float]]) -> str:
    group = {"kind": "2D", "random": row(random), "tasks": {name: row(scores) for name, scores in tasks.items()}}
    lines = verdicts(
        {"seeds": sorted({*random, *(seed for of in tasks.values() for seed in of)}), "groups": {"": group}}
    )
    assert len({line.partition(": ")[2] for line in lines}) == 1
    return lines[0].partition(": ")[2]


def test_tasks_are_compared_over_the_seeds_that_both_have():
    random = {0: 0.10, 1: 0.20, 2: 0.30}
    tasks = {
        "better": {0: 0.30, 1: 0.41, 2: 0.50},
        "worse": {0: 0.00, 1: 0.11, 2: 0.20},
        "alike": {0: 0.11, 1: 0.18, 2: 0.30},
        "two": {1: 0.20, 2: 0.30},  # with seeds 0 and 1 it would gain 0.1 each
        "one": {2: 0.50},
        "none": {7: 0.5},
    }
    assert said(random, tasks) == "above random weights beyond chance: better; below: worse; one seed: one."
    assert said({0: 0.1}, {"a": {0: 0.2}}) == "one seed, so chance is not judged; give more --seed."
