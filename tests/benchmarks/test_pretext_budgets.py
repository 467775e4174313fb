"""Gains at two budgets, against numbers by hand and the page of the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.pretext_budgets import BEGIN, END, LARGE, SMALL, markdown
from geo_pretrain.cards.markdown import around_marks
from geo_pretrain.training.bench.report import gains

ROOT = Path(__file__).parents[2]


def results(steps, random, ours, seeds=(0, 1, 2)):
    rows = [{"seeds": list(seeds[: len(values)]), **dict.fromkeys(("probe", "finetuned"), values), "matching": values}
            for values in (random, ours)]  # fmt: skip
    group = {"kind": "3D", "random": rows[0], "tasks": {"csc": rows[1]}}
    return {"budget": {"steps": steps}, "groups": {"a": group}}


def test_gains_are_seed_by_seed_and_bold_beyond_chance():
    small = results(80, [0.1, 0.2, 0.3], [0.12, 0.21, 0.29])
    large = results(800, [0.1, 0.2, 0.3], [0.2, 0.3])  # a seed failed
    assert gains(small["groups"]["a"], "probe")["csc"].mean == pytest.approx(0.02 / 3)
    line = markdown(small, large).splitlines()[-1]
    assert line == "| 3D `csc` | +0.7 | **+10.0** | +0.7 | **+10.0** | +0.7 | **+10.0** |"
    assert "matching recall, 80 steps | matching recall, 800 steps" in markdown(small, large)
    small["groups"]["a"]["tasks"] = {}
    assert markdown(small, large).splitlines()[-1].startswith("| 3D `csc` | - | **+10.0** | - |")


def test_the_page_shows_the_stored_results():
    page = ROOT / "docs" / "pretext.md"
    before, after = around_marks(page, BEGIN, END)
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in (SMALL, LARGE)]
    assert page.read_text(encoding="utf-8") == f"{before}{BEGIN}\n{markdown(*stored)}\n{END}{after}"
