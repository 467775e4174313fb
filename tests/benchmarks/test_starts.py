"""Studies of starts: every start gets every rate, which is chosen elsewhere than reported; a loss is told as a gain."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import warnings
from pathlib import Path

import pytest

from benchmarks import few_labels, starts
from benchmarks.few_labels import starts_of, study_of
from benchmarks.jobs import work
from benchmarks.starts import (
    Score,
    Start,
    Study,
    estimate,
    fine_tuning_jobs,
    gains_of,
    markdown,
    pilot,
    points_of,
    provenance,
    results_of,
    scores_of,
    table_of,
    with_earlier,
)
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.files import read_sealed
from geo_pretrain.training.finetune.folder import read_result
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.pretrain import load_checked_recipe
from geo_pretrain.training.recipe import changes
from tests.training.finetune.killed import run_killed_at
from tests.zoo import write_tiny, write_tiny_3d

SCRATCH = Start("scratch", "scratch", "scratch")
OTHER = Start("view", "runs/view", "scratch")
TINY = (
    "network.width=8",
    "data.size=[64,64]",
    "data.options={scenes: 4, frames: 2, labelled: 2, val_scenes: 1, width: 64, height: 64, classes: coarse}",
    "optim.batch=2",
    "optim.steps=3",
    "evaluate.every_steps=null",
    "save_every=1",
)


def study(*, rates=(0.01, 0.1), shares=(0.25, 1.0), seeds=(0, 1), begins=(SCRATCH, OTHER)):
    return Study("tiny", "rooms_unet_r18", TINY, begins, shares, rates, seeds, {"seed": 1})


def scores(start, share, rate, chosen_by, reported):
    """One score a seed."""
    pairs = enumerate(zip(chosen_by, reported, strict=True))
    return [Score(start, share, rate, seed, one, other, 36.0, 8) for seed, (one, other) in pairs]


GIVEN = [
    *scores("scratch", 0.25, 0.01, [0.30, 0.32], [0.20, 0.22]),  # chosen: its validation mean is higher
    *scores("scratch", 0.25, 0.1, [0.29, 0.31], [0.40, 0.42]),  # although this is better where it is reported
    *scores("view", 0.25, 0.01, [0.10, 0.10], [0.50, 0.50]),
    *scores("view", 0.25, 0.1, [0.20, 0.20], [0.10, 0.12]),
    *scores("scratch", 1.0, 0.01, [0.5, 0.5], [0.40, 0.42]),
    *scores("scratch", 1.0, 0.1, [0.1, 0.1], [0.1, 0.1]),
    *scores("view", 1.0, 0.01, [0.5, 0.5], [0.41, 0.41]),
    *scores("view", 1.0, 0.1, [0.1], [0.1]),  # its second seed is not done at every rate
]


def test_the_rate_is_chosen_where_it_is_not_reported():
    points = {(p.start, p.share): p for p in points_of(study(), GIVEN)}
    few = points["scratch", 0.25]
    assert (few.rate, few.reported, few.at_edge, few.images) == (0.01, {0: 0.20, 1: 0.22}, True, 8)
    assert few.every_rate[0.1] == {"chosen by": {0: 0.29, 1: 0.31}, "reported": {0: 0.40, 1: 0.42}}
    assert (points["view", 0.25].rate, points["view", 0.25].reported) == (0.1, {0: 0.10, 1: 0.12})
    assert points["view", 1.0].reported == {0: 0.41}


def test_the_middle_rate_is_at_no_edge():
    given = [
        score for rate in (0.01, 0.03, 0.1) for score in scores("scratch", 1.0, rate, [1 - abs(rate - 0.03)], [0.5])
    ]
    (point,) = points_of(study(rates=(0.01, 0.03, 0.1), seeds=(0,)), given)
    assert (point.rate, point.at_edge) == (0.03, False)


def test_a_loss_and_a_nil_are_told_as_a_gain_is():
    given = [score for score in GIVEN if score.share == 0.25]
    given += scores("scratch", 1.0, 0.01, [0.5] * 3, [0.40, 0.42, 0.44]) + scores("scratch", 1.0, 0.1, [0] * 3, [0] * 3)
    given += scores("view", 1.0, 0.01, [0.5] * 3, [0.41, 0.41, 0.44]) + scores("view", 1.0, 0.1, [0] * 3, [0] * 3)
    two, three = study(), study(seeds=(0, 1, 2))
    (loss,) = [gain for gain in gains_of(two, points_of(two, given)) if gain.share == 0.25]
    assert loss.by_seed == pytest.approx({0: -0.10, 1: -0.10})
    assert loss.verdict == (
        "25 % of the labels: view is worse than scratch by 10.0 points, beyond chance "
        "(95 % interval -10.0 to -10.0, over 2 seeds)."
    )
    (nil,) = [gain for gain in gains_of(three, points_of(three, given)) if gain.share == 1.0]
    assert re.match(r"100 % of the labels: view and scratch do not differ beyond chance: [+-]0\.0 points", nil.verdict)
    lines = table_of(two, points_of(two, given))
    assert lines[:3] == [
        "| start | 25 % (8 images) | 100 % (8 images) |",
        "| --- | --- | --- |",
        "| scratch | 21.0 ± 1.4 (lr 0.01, edge) | 41.0 ± 1.4 (lr 0.01, edge) |",
    ]
    assert lines[3].startswith("| view | 11.0 ± 1.4 (lr 0.1, edge) |")


def test_every_start_gets_every_rate_and_a_seed_is_whole_before_the_next(tmp_path):
    plan = study(rates=(0.01, 0.03, 0.1))
    names = [job.name for job in fine_tuning_jobs(plan, tmp_path)]
    assert len(names) == len(set(names)) == 2 * 3 * 2
    assert plan.runs() == 24  # two shares each
    assert names[:2] == ["tiny: scratch, lr 0.01, seed 0", "tiny: scratch, lr 0.03, seed 0"]
    assert all(name.endswith("seed 0") for name in names[:6])
    assert len({job.place for job in fine_tuning_jobs(plan, tmp_path)}) == 6  # seeds of a sweep take turns


def test_a_run_that_is_killed_twice_gives_the_same_numbers(tmp_path, monkeypatch):
    plan = study(rates=(0.05,), shares=(0.25, 1.0), seeds=(3,), begins=(SCRATCH,))
    work(fine_tuning_jobs(plan, tmp_path / "whole"))
    out = tmp_path / "killed"

    def in_a_run(*, on_step):
        from geo_pretrain.training.finetune import sweep

        sweep.finetune = lambda *given, **options: finetune(*given, **options | {"on_step": on_step})
        work(fine_tuning_jobs(plan, out))

    def before_it_is_judged(*, on_step):
        starts.judge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        work(fine_tuning_jobs(plan, out))

    run_killed_at(2, in_a_run)
    assert scores_of(plan, out) == []
    run_killed_at(99, before_it_is_judged)
    assert scores_of(plan, out) == []
    work(fine_tuning_jobs(plan, out))
    found, expected = (
        [dataclasses.replace(score, seconds=0) for score in scores_of(plan, folder)]
        for folder in (out, tmp_path / "whole")
    )
    assert found == expected
    assert [(score.share, score.images) for score in found] == [(0.25, 2), (1.0, 8)]
    assert not list(out.rglob("*.safetensors"))
    assert all(job.is_done() for job in fine_tuning_jobs(plan, out))
    run = plan.sweep(out, SCRATCH, 0.05) / "runs" / "scratch" / "100" / "seed3"
    judged, result = read_sealed(run / "judged.json"), read_result(run)
    assert judged["fingerprint"] != result.data["data"]["val_fingerprint"]  # other rooms
    assert sum(map(sum, judged["details"]["confusion"])) == 2 * 64 * 64
    results = results_of(plan, out)
    assert results["runs"] == [2, 2]
    assert "2 of 2 runs" in markdown(results)
    assert provenance(plan, out)["weights"] == {}
    longer = dataclasses.replace(plan, settings=(*TINY, "optim.steps=4"), seeds=(4,))
    with pytest.raises(RecipeError, match=r"another recipe: optim\.steps: 3 -> 4"):
        work(fine_tuning_jobs(longer, out))


def test_runs_of_an_earlier_folder_count_and_are_not_run_again(tmp_path, monkeypatch):
    given = [score for score in GIVEN if score.share == 0.25]
    first = study(shares=(0.25,))
    monkeypatch.setattr(starts, "_own_scores", lambda *_: given)
    stored = json.loads(json.dumps({**results_of(first, tmp_path), "weights": {"view": "12ab"}}))
    more = with_earlier(study(shares=(0.25,), rates=(0.3,)), stored, {})
    assert (set(more.earlier), more.rates) == (set(given), (0.01, 0.1, 0.3))
    assert pilot(more).earlier == ()
    assert [job.name for job in fine_tuning_jobs(more, tmp_path / "new") if not job.is_done()] == [
        f"tiny: {start}, lr 0.3, seed {seed}" for seed in (0, 1) for start in ("scratch", "view")
    ]
    new = [*scores("scratch", 0.25, 0.3, [0.9, 0.9], [0.6, 0.6]), *scores("view", 0.25, 0.3, [0.0, 0.0], [0.0, 0.0])]
    again = scores("view", 0.25, 0.1, [0.2, 0.2], [0.13, 0.15])  # measured here too: this folder's counts
    monkeypatch.setattr(starts, "_own_scores", lambda *_: [*new, *again])
    best = {point.start: point for point in points_of(more, scores_of(more, tmp_path / "new"))}
    assert (best["scratch"].rate, best["scratch"].reported) == (0.3, {0: 0.6, 1: 0.6})
    assert (best["view"].rate, best["view"].at_edge, best["view"].reported) == (0.1, False, {0: 0.13, 1: 0.15})
    assert results_of(more, tmp_path)["runs"] == [12, 12]
    assert results_of(more, tmp_path)["core hours"] == pytest.approx(12 * 36 / 3600)


def test_runs_of_another_study_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "_own_scores", lambda *_: GIVEN)
    plan = study()
    stored = {**results_of(plan, tmp_path), "weights": {"view": "12ab"}}
    with pytest.raises(DataError, match="other weights of view"):
        with_earlier(plan, stored, {"view": "34cd"})
    longer = dataclasses.replace(plan, settings=(*TINY, "optim.steps=4"))
    with pytest.raises(DataError, match="steps 3 there, 4 here"):
        with_earlier(longer, stored, {})
    for broken in ({}, {**stored, "measured": [1]}, {**stored, "runs": None}):
        with pytest.raises(DataError, match="no table of fine-tuned starts"):
            with_earlier(plan, broken, {})


def test_a_stored_table_is_read_unless_this_run_writes_it(tmp_path):
    for name, text, message in (
        ("few_labels.json", "{}", "is written by this run"),
        ("list.json", "[]", "no table"),
        ("cut.json", '{"runs', r"cut\.json cannot be read"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            few_labels.read_earlier(tmp_path / name, tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        few_labels.read_earlier(tmp_path / "none.json", tmp_path)
    assert few_labels.read_earlier(tmp_path / "few_labels.json", tmp_path / "new") == {}


def test_other_weights_are_refused_once_runs_tell_them(tmp_path, monkeypatch):
    """At first nothing tells the digests of what will be run."""
    (tmp_path / "earlier.json").write_text(json.dumps({"weights": {"view": "12ab"}}))
    told = iter([{}, {"view": "34cd"}])
    seen = []
    monkeypatch.setattr(few_labels, "provenance", lambda *_: {"weights": next(told)})
    monkeypatch.setattr(few_labels, "with_earlier", lambda study, stored, digests: seen.append(digests) or study)
    monkeypatch.setattr(few_labels, "keep", lambda *_, **__: None)
    start = str(write_tiny(tmp_path / "tiny").folder)
    arguments = [str(tmp_path / "out"), "--start", start, "--earlier", str(tmp_path / "earlier.json"), "--table"]
    with pytest.raises(SystemExit):
        few_labels.main(arguments)
    assert seen == [{}, {"view": "34cd"}]


def test_a_sweep_that_has_not_begun_has_no_digest(tmp_path):
    plan = study()
    plan.sweep(tmp_path, OTHER, 0.1).mkdir(parents=True)  # a run that was killed before it wrote its plan
    assert provenance(plan, tmp_path)["weights"] == {}


def test_a_pilot_is_the_first_start_with_all_labels(tmp_path):
    small = pilot(study(rates=(0.01, 0.1)))
    assert (small.runs(), small.shares, small.starts) == (2, (1.0,), (SCRATCH,))
    assert small.name == "tiny_pilot_3"  # another length is another pilot
    assert small.sweep(tmp_path, SCRATCH, 0.1) != study().sweep(tmp_path, SCRATCH, 0.1)
    assert estimate(study(), {"core hours": 0.2, "runs": [2, 2]}) == (
        "360 s a run: 16 runs are 1.6 core hours, 0.8 hours of two cores."
    )


def test_starts_have_random_weights_of_their_encoder_beside_them(tmp_path):
    tiny = str(write_tiny(tmp_path / "tiny").folder)
    width = ("network.encoder=resnet18", "network.width=8")
    random = "resnet18 of width 8 from scratch"
    assert starts_of([tiny], decoder=True) == (
        Start(random, "scratch", random, width),
        Start("tiny_net_r18", tiny, random, width),
        Start("tiny_net_r18, with its decoder", tiny, random, (*width, "network.transfer=all")),
    )
    other = write_tiny(tmp_path / "other", name="other_r18").folder
    rivals = {start.label: start.rivals for start in starts_of([tiny, str(other)], decoder=True)}
    assert {label: names for label, names in rivals.items() if names} == {"other_r18": ("tiny_net_r18",)}
    with pytest.raises(RecipeError, match="Two starts are called 'tiny_net_r18'"):
        starts_of([tiny, str(write_tiny(tmp_path / "again").folder)])
    with pytest.raises(RecipeError, match="give --start FOLDER"):
        starts_of([])
    points = str(write_tiny_3d(tmp_path / "points").folder)
    with pytest.raises(Exception, match="accepted: a ResNet, a U-Net or a timm encoder"):
        starts_of([points])


def test_the_plan_of_few_labels_is_one_that_recipes_take(tmp_path):
    plan = study_of(starts_of([str(write_tiny(tmp_path / "tiny").folder)]), 400, 3)
    assert plan.runs() == 2 * 4 * 3 * 3
    recipe = plan.recipe_at(plan.starts[1], 0.03)
    assert (recipe.optim.lr, recipe.optim.steps, recipe.optim.bn_momentum) == (0.03, 400, "constant")
    assert recipe.data.options["classes"] == "coarse"
    assert plan.reported == {"seed": 1} != {"seed": recipe.data.options.get("seed", 0)}


def test_results_are_stored_where_all_runs_are_done(tmp_path, monkeypatch):
    plan = study()
    stored: list[tuple[str, str]] = []
    monkeypatch.setattr(few_labels, "scores_of", lambda *_: GIVEN)
    monkeypatch.setattr(few_labels, "provenance", lambda *_: {"machine": "m", "weights": {}})
    monkeypatch.setattr(few_labels, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(few_labels, "write_results", lambda name, command, *_, timed: stored.append((name, command)))
    results = {"table": [], "gains": [], "runs": [15, 16], "core hours": 1, "steps": 3}
    few_labels.keep(plan, tmp_path, results)
    assert stored == []
    assert {path.name for path in tmp_path.iterdir()} == {"few_labels.json", "few_labels.md", "few_labels.png"}
    few_labels.keep(plan, tmp_path, results | {"runs": [16, 16]})
    command = "python -m benchmarks.few_labels OUT --start view --rate 0.01 --rate 0.1 --steps 3"
    assert stored == [("few_labels", command)]
    assert (tmp_path / "docs" / "few_labels.png").is_file()
    few_labels.keep(plan, tmp_path, results | {"runs": [16, 16]}, name="other")
    assert stored[1:] == [("other", f"{command} --result other")]
    assert (tmp_path / "docs" / "other.png").is_file()
    assert Path(tmp_path / "few_labels.md").read_text().endswith("16 of 16 runs, 1 core hours.\n")
    few_labels.keep(plan, tmp_path, results, {"code": "0.1.0", "weights": {"view": "12ab"}, "gains": []})
    told = json.loads((tmp_path / "few_labels.json").read_text())
    assert (told["earlier"], told["weights"]) == ({"code": "0.1.0"}, {"view": "12ab"})


def test_recipes_of_the_two_tasks_differ_in_the_task_alone():
    folder = Path(few_labels.__file__).parent / "recipes"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view, geo = (
            load_checked_recipe(str(folder / f"{name}_r18.cpu.yaml")) for name in ("pri3d_view", "pri3d_view_geo")
        )
    sections = {change.split(":")[0].split(".")[0] for change in changes(view.to_yaml(), geo.to_yaml())}
    assert sections == {"name", "task", "unet3d"}
    both = view.task.keys() - {"name"}
    assert {key: geo.task[key] for key in both} == {key: view.task[key] for key in both}
