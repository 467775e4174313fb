"""Which checkpoint? The answers follow from the catalog: facts that change change them; the pages say the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from typer.testing import CliRunner

from geo_pretrain import cli
from geo_pretrain.advice import INPUTS, TASKS, answer, ranking, recommend
from geo_pretrain.advice.lengths import LENGTHS, lengths_text
from geo_pretrain.advice.page import ANSWERS, OTHERS, alternatives_table, answers_table
from geo_pretrain.advice.questions import Question, license_words
from geo_pretrain.cards.front_matter import task_of
from geo_pretrain.cards.gallery import copied_lines
from geo_pretrain.catalog import CATALOG, License
from geo_pretrain.catalog.alternatives import ALTERNATIVES
from geo_pretrain.catalog.entry import File, Result
from geo_pretrain.catalog.license import PERMISSIVE
from geo_pretrain.errors import UnknownName
from geo_pretrain.listing import catalog_lines
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import TASKS as PRETEXT_TASKS
from geo_pretrain.training.tasks.clouds import CloudPairs

DOCS = Path(__file__).resolve().parents[1] / "docs"


def names(answer):
    return [pick.name for pick in answer.picks]


def test_every_reported_task_can_be_asked_for():
    asked = {(modality, words) for by_modality in TASKS.values() for modality, words in by_modality.items()}
    reported = {(entry.modality, task_of(result)) for entry in CATALOG.values() for result in entry.results}
    assert reported <= asked


def test_the_first_choice_is_the_highest_number_that_can_be_downloaded():
    answer = recommend("segmentation", here=())
    twin = max(
        (entry.result("semantic segmentation", "ScanNet", "mIoU") or 0, entry.name)
        for entry in CATALOG.values()
        if entry.modality == "2d" and entry.status == "published-by-authors"
    )
    assert (answer.picks[0].score, answer.picks[0].name) == twin == (61.7, "pri3d_view_geo_r50")
    assert answer.picks[0].why == "61.7 mIoU on ScanNet (ImageNet start 55.7, random start 39.1)"
    assert answer.picks[0].how == "download from authors"
    assert names(answer)[-1] == "gsc_r50"  # a higher number, 63.1, that is harder to get
    assert answer.picks[-1].how.startswith("train it yourself: 2 epochs in steps of 64, on ScanNet, after a first")
    assert answer.picks[0].lines == copied_lines(CATALOG["pri3d_view_geo_r50"])
    assert names(recommend("segmentation", limit=1, here=())) == ["pri3d_view_geo_r50"]


@pytest.mark.parametrize(
    ("question", "first", "why"),
    [
        (("segmentation", "rgb", "any", "Cityscapes"), "pri3d_view_r50.kitti_180", "56.3 mIoU on Cityscapes (ImageNet"),
        (("detection", "rgb", "any", "coco"), "pri3d_view_r50.lr001", "60.6 AP50 on COCO (ImageNet start 59.5)"),
        (("segmentation", "points", "any", "ScanNet"), "pointcontrast_nce_srunet34", "74.1 mIoU on ScanNet (random"),
        (("segmentation", "colored-points", "any", None), "csc_100k_srunet34", "72.2 mIoU on S3DIS"),
        (("segmentation", "lidar", "any", None), "slidr_srunet34.nuscenes", "74.6 mIoU on nuScenes"),
        (
            ("segmentation", "rgb", "MIT", None),
            "gsc_r18.rooms",
            "not measured; the paper's own weights: 57.2 mIoU on Sc",
        ),
        (
            ("instances", "rgb", "permissive", None),
            "gsc_r18.rooms",
            "segmentation: not measured; the paper's own weights",
        ),
        (
            ("matching", "rgb", "any", None),
            "pri3d_view_geo_r50",
            "trained to match places in two views (pri3d_view_geo)",
        ),
        (
            ("depth", "rgb", "any", None),
            "pri3d_view_geo_r50",
            "trained to predict depth beside its own task (pri3d_view",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_answers(question, first, why, empty_shelf):
    task, given, license, like = question
    pick = recommend(task, given, license=license, like=like, here=()).picks[0]
    assert pick.name == first
    assert pick.why.startswith(why)


def test_nothing_is_recommended_that_does_not_fit():
    for task in TASKS:
        for name, kind in INPUTS.items():
            if not set(kind.modalities) & set(TASKS[task]):
                with pytest.raises(UnknownName, match=f"No network for {task} takes .* Accepted with {task}: "):
                    recommend(task, name, here=())
                continue
            answer = recommend(task, name, license="permissive", here=())
            for pick in answer.picks:
                contract = CATALOG[pick.name].contract
                needs = getattr(contract, "given_channels", contract.channels)
                assert set(needs) <= kind.channels
                assert pick.modality in kind.modalities
                assert pick.license in PERMISSIVE
                assert "\n" not in pick.why
                assert len(pick.why) < 80
            assert all(other.license in PERMISSIVE for other in answer.outside)
            assert max(map(len, (line for line in str(answer).splitlines() if line[:4] != " " * 4))) < 100


def test_words_are_honest_where_nothing_can_be_had(empty_shelf):
    answer = recommend("segmentation", license="permissive", here=())
    assert all(pick.how.startswith("train it yourself") for pick in answer.picks)
    assert [other.name for other in answer.outside] == ["DINOv2"]
    assert answer.notes[0].startswith("No weights for it can be had under a permissive license.")
    assert answer.notes[1] == "Under other terms pri3d_view_geo_r50 can be had: ScanNet-ToU (non-commercial)."
    assert answer.outside_first
    assert str(answer).index("The better answer is likely outside this zoo") < str(answer).index("1. gsc_r18.rooms")
    assert not recommend("segmentation", here=()).outside_first
    assert recommend("depth", here=()).outside_first
    points = recommend("segmentation", "points", license="permissive", here=())
    assert points.notes[-1] == "Outside this zoo we know of no weights for it under a permissive license either."
    assert points.outside == ()
    assert recommend("segmentation", license="GPL-3.0-only", here=()).notes[0] == (
        "This zoo has nothing for it under the license GPL-3.0-only."
    )
    assert "No paper reports classification for any weights here." in recommend("classification", here=()).notes
    assert any("gives depth maps as it is" in note for note in recommend("depth", here=()).notes)
    assert [other.name for other in recommend("depth", here=()).outside][:2] == ["Depth Anything V2 Small", "MASt3R"]
    assert [other.name for other in recommend("segmentation", "lidar", here=()).outside] == ["Utonia"]
    assert any("pretrained=False" in note for note in recommend("segmentation", here=()).notes)


def unpublished() -> MappingProxyType:
    """The catalog as it is before this project publishes any weights."""
    plain = {}
    for name, entry in CATALOG.items():
        ours = entry.status == "published-here" and not entry.authors_files
        plain[name] = replace(entry, status="regenerable", files=(), measured=(), made="") if ours else entry
    return MappingProxyType(plain)


@pytest.fixture
def empty_shelf(monkeypatch: pytest.MonkeyPatch) -> MappingProxyType:
    monkeypatch.setattr(ranking, "CATALOG", unpublished())
    return ranking.CATALOG


def test_what_is_here_is_in_the_list(empty_shelf):
    here = {"pri3d_geo_r18.rooms"}
    answer = recommend("segmentation", here=here)
    assert names(answer) == ["pri3d_view_geo_r50", "pri3d_geo_r18.rooms", "gsc_r50"]
    assert answer.picks[1].how == "ready offline"
    assert names(recommend("segmentation", license="permissive", here=here))[0] == "pri3d_geo_r18.rooms"
    assert names(recommend("segmentation", here=here, offline=True)) == ["pri3d_geo_r18.rooms"]
    nothing = recommend("segmentation", here=(), offline=True)
    assert nothing.picks == ()
    assert nothing.notes[0].startswith("None of them loads here without a network.")


def test_answers_follow_the_facts(empty_shelf, monkeypatch: pytest.MonkeyPatch):
    """Files in a package make the rooms checkpoint the first choice, and no note says that there is none."""
    entry = empty_shelf["pri3d_view_geo_r18.rooms"]
    files = tuple(
        File(role, f"{role}.safetensors", 1, "0" * 64, ("package:geo_pretrain_weights",)) for role in entry.arch.roles
    )
    measured = (
        Result("dense matching", "rooms", "recall at 4 px (%)", 40.0, "x.json", "random: 21.5"),
        Result("semantic segmentation", "rooms", "mIoU", 33.0, "y.json"),
    )
    changed = replace(entry, status="published-here", files=files, measured=measured)
    closed = replace(
        empty_shelf["pri3d_view_r18.rooms"], license=License("MIT", "CC-BY-NC-4.0", (("x", "MIT"),), "none")
    )
    new = MappingProxyType({**empty_shelf, changed.name: changed, closed.name: closed})
    monkeypatch.setattr(ranking, "CATALOG", new)
    answer = recommend("segmentation", license="permissive", here=())
    assert names(answer)[0] == changed.name
    line = "pip install ./weights/geo_pretrain_weights"  # no package index has it yet
    assert answer.picks[0].how == f"install the weights: `{line}` in a clone"
    assert answer.picks[0].lines["CLI"].startswith(f"{line}  # in a clone\n")
    ready = recommend("segmentation", license="permissive", here={changed.name})
    assert ready.picks[0].lines["CLI"] == f"geo-pretrain verify {changed.name}"  # it loads, so nothing is installed
    assert "pip install" not in str(ready).partition("Outside this zoo")[0]
    assert not answer.notes
    assert closed.name not in names(recommend("segmentation", license="permissive", limit=99, here=()))
    assert names(recommend("segmentation", here=()))[0] == "pri3d_view_geo_r50"  # a number of its own goes before
    first = recommend("matching", here=()).picks[0]
    assert (first.name, first.why) == (changed.name, "measured here: 40 recall at 4 px (%) on rooms (random: 21.5)")
    (pick,) = [one for one in recommend("instances", limit=99, here=()).picks if one.name == changed.name]
    assert pick.why == "segmentation: measured here: 33 mIoU on rooms"


def test_tasks_that_match_are_those_that_compare_two_views():
    views = {name for name, (_, settings) in PRETEXT_TASKS.items() if settings.get("view")}
    clouds = {str(r.task["name"]) for r in map(load_recipe, ("csc_srunet34.rooms", "pointcontrast_nce_srunet34.rooms"))}
    assert set(ranking.MATCHING_TASKS) == views | clouds | {"pointcontrast_hardest"}
    for name in set(ranking.MATCHING_TASKS) - views:
        module, _, kind = PRETEXT_TASKS[name][0].partition(":")
        assert issubclass(getattr(__import__(module, fromlist=[kind]), kind), CloudPairs)
    assert ranking.DEPTH_TASK in PRETEXT_TASKS


def test_wrong_words_are_told_with_those_that_are_right():
    for arguments, message in (
        (
            {"task": "segmentaton"},
            r"Unknown task 'segmentaton'\. Closest: 'segmentation'.*Accepted: segmentation, inst",
        ),
        ({"input": "rgbd"}, r"Unknown input 'rgbd'\. Closest: 'rgb-d'"),
        ({"license": "free"}, r"Unknown license 'free'.*any, permissive, non-commercial"),
        ({"like": "Cityscape"}, r"Unknown benchmark 'Cityscape'\. Closest: 'Cityscapes'.*ScanNet, NYUv2"),
        ({"task": "depth", "like": "KITTI"}, r"No paper reports depth on 'KITTI' or on any other data; drop it"),
        ({"network": "vit"}, r"Unknown network 'vit'.*Accepted: a part of ResNet-18 U-Net"),
    ):
        with pytest.raises(UnknownName, match=message):
            recommend(**{"task": "segmentation", **arguments}, here=())
    titles = {pick.network for pick in recommend("segmentation", network="resnet18", limit=9, here=()).picks}
    assert all(title.startswith("ResNet-18") for title in titles)


def test_the_command_prints_the_answer_and_json(empty_shelf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answer, "names_here", set)
    words = ["recommend", "--for", "segmentation", "--input", "colored-points", "--license", "permissive"]
    printed = CliRunner().invoke(cli.app, words).output
    assert printed == f"{recommend('segmentation', 'colored-points', license='permissive')}\n"
    assert "geo-pretrain train csc_srunet34.rooms --out runs/csc_srunet34.rooms" in printed
    assert 'gp.load_backbone("csc_srunet34.rooms")' in printed
    assert "geo-pretrain finetune clouds_srunet34 -b csc_srunet34.rooms --data clouds:PATH" in printed
    rows = json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).output)
    assert rows["picks"][0]["lines"]["Python"] in printed.replace("\n    ", "\n")
    assert rows["question"]["license"] == "permissive"


def test_the_command_asks_for_a_task():
    ended = CliRunner().invoke(cli.app, ["recommend"], env={"COLUMNS": "200"})
    assert ended.exit_code == 2
    assert "What comes out: segmentation, instances, detection" in ended.output
    for words in (" ".join(TASKS), " ".join(INPUTS)):  # what the help lists is what there is
        text = CliRunner().invoke(cli.app, ["recommend", "--help"], env={"COLUMNS": "200"}).output
        assert all(word in text for word in words.split())


def test_commands_after_a_choice_name_recipes_that_there_are(empty_shelf):
    for task, given in (("segmentation", "rgb"), ("detection", "rgb"), ("instances", "colored-points")):
        for command in recommend(task, given, here=()).picks[0].next:
            assert command.split()[1] == "finetune"
            assert command.split()[2] in {"folder_unet", "folder_deeplabv3plus", "folder_mask_rcnn", "clouds_instances"}
    assert recommend("matching", here=()).picks[0].next == (
        "geo-pretrain eval matching pri3d_view_geo_r50 --data folder:PATH",
    )


@pytest.mark.parametrize(
    ("page", "marks", "made"),
    [("which.md", ANSWERS, answers_table), ("alternatives.md", OTHERS, alternatives_table)],
    ids=["which", "alternatives"],
)
def test_tables_of_the_pages_are_fresh(page, marks, made):
    """`make cards` writes them again."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text.partition(marks[0])[2].partition(marks[1])[0].strip() == made()


def test_licenses_in_words():
    assert license_words("MIT") == "MIT (permissive)"
    assert license_words("LicenseRef-unstated") == "unstated (see its terms)"
    assert Question("segmentation", "rgb", "non-commercial").allows("MIT")
    assert not Question("segmentation", "rgb", "non-commercial").allows("LicenseRef-unstated")
    assert len({other.name for other in ALTERNATIVES}) == len(ALTERNATIVES)


def test_lengths_of_recipes_are_fresh_and_listed():
    """What `list` says of recipes is what they hold."""
    root = Path(__file__).parents[1]
    assert (root / LENGTHS).read_text(encoding="utf-8") == lengths_text(), "run make cards"
    assert '"ppkt_srunet34": "60k steps of 24"' in lengths_text()  # PPKT, 4.1
    (line,) = (line for line in catalog_lines(["ppkt_srunet34"]).splitlines() if line.startswith("ppkt"))
    assert line.endswith("train: 60k steps of 24")
