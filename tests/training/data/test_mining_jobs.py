"""Mining by many: files of pairs, one a scene, made once; shards, executors, ranks; estimates; training from them."""

from __future__ import annotations

import dataclasses
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from geo_pretrain import cli
from geo_pretrain.errors import DataError, MissingDependency, RecipeError, UnknownName
from geo_pretrain.training.cluster import Cluster, make_executor
from geo_pretrain.training.data import mining, mining_jobs
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs, refuse_changed
from geo_pretrain.training.data.mining_jobs import estimate, mine_pairs
from geo_pretrain.training.data.pair_files import read_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.recipe import DataSpec
from tests.front_door import geo_pretrain
from tests.training.conftest import write_recording
from tests.two_processes import in_two_processes

SCENES = ("a", "b", "c/d")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for scene in SCENES:
        write_recording(root / scene)
    return DataSpec(source="seven_scenes", path=str(root), size=(60, 80), overlap=(0.2, 1.0), measure="voxels")


@pytest.fixture(scope="module")
def pairs(spec):
    return find_pairs(open_source(spec), spec, skips=SkippedFrames())


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read(folder, spec, **changes):
    changed = dataclasses.replace(spec, **changes)
    return read_pairs(folder, open_source(changed), changed, SkippedFrames())


def test_every_scene_has_a_file_that_is_made_once(tmp_path, spec, pairs):
    seen = []
    first = mine_pairs(spec, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert names(tmp_path) == ["a.json", "b.json", "c/d.json"]  # no lock is left
    assert (first.made, first.present, first.pairs, first.tested) == (3, 0, len(pairs), 45)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert read(tmp_path, spec) == pairs
    (tmp_path / "b.json").unlink()
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in ("a.json", "c/d.json")}
    again = mine_pairs(spec, tmp_path)
    assert (again.made, again.present, again.pairs) == (1, 2, len(pairs))
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in times}
    (tmp_path / "a.json").write_text("[]")
    with pytest.warns(UserWarning, match="a.json cannot be used"):
        assert mine_pairs(spec, tmp_path).made == 1


def test_shards_and_executors_mine_the_same_pairs(tmp_path, spec, pairs):
    for part in (2, 1):
        mine_pairs(spec, tmp_path / "shards", shard=(part, 2))
    with ThreadPoolExecutor(2) as pool:
        assert mine_pairs(spec, tmp_path / "pool", executor=pool, jobs=2).pairs == len(pairs)
    assert read(tmp_path / "shards", spec) == read(tmp_path / "pool", spec) == pairs
    for name in names(tmp_path / "shards"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "pool" / name).read_bytes()
    with pytest.raises(RecipeError, match="Shard 3/2 is given; accepted: I/N"):
        mine_pairs(spec, tmp_path, shard=(3, 2))


def test_a_call_that_was_killed_loses_one_scene(tmp_path, spec, pairs, monkeypatch):
    mine = mining_jobs.mine_scene
    monkeypatch.setattr(
        mining_jobs, "mine_scene", lambda s, scene, *rest: mine(s, scene, *rest) if scene < "b" else 1 / 0
    )
    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        mine_pairs(spec, tmp_path, executor=pool)
    assert names(tmp_path) == ["a.json"]
    monkeypatch.undo()
    assert (mine_pairs(spec, tmp_path).made, read(tmp_path, spec)) == (2, pairs)


def test_files_are_read_in_a_narrower_range_of_fewer_frames_and_not_otherwise(tmp_path, spec, pairs):
    mine_pairs(dataclasses.replace(spec, path=str(Path(spec.path) / "a")), tmp_path / "one")
    with pytest.raises(DataError, match=r"3 of 3 scenes have no usable pairs .*data mine seven_scenes:.* --out"):
        read(tmp_path / "two", spec)
    mine_pairs(spec, tmp_path)
    high = read(tmp_path, spec, overlap=(0.5, 1.0))
    assert high == [pair for pair in pairs if pair.overlap >= 0.5]
    first_half = read(tmp_path, spec, frames=(0.0, 0.5))
    assert first_half == [pair for pair in pairs if max(pair.frame1, pair.frame2) < "000030"]
    assert len(read(tmp_path, spec, max_pairs_per_scene=1)) == 3
    with pytest.raises(RecipeError, match=r"measure 'voxels', the recipe's is 'projective'"):
        read(tmp_path, spec, measure="projective")
    with pytest.raises(RecipeError, match=r"\[0.2, 1\], the recipe's data.overlap is \[0.1, 1\]"):
        read(tmp_path, spec, overlap=(0.1, 1.0))
    with pytest.raises(DataError, match=r"No pair of frames(.|\n)*"):
        read(tmp_path, spec, overlap=(0.999, 1.0))


def test_frames_that_are_new_are_mined(tmp_path, spec):
    root = write_recording(tmp_path / "root" / "a").parent
    changed = dataclasses.replace(spec, path=str(root))
    before = mine_pairs(changed, tmp_path / "pairs")
    for ending in ("color.png", "color.jpg", "depth.png", "pose.txt"):
        old = root / "a" / f"frame-000050.{ending}"
        if old.exists():
            (root / "a" / f"frame-000060.{ending}").write_bytes(old.read_bytes())
    mining_jobs._opened.cache_clear()
    with pytest.warns(UserWarning, match=r"1 of 1 scenes have other frames .*\(a\): those that came since are in no"):
        read(tmp_path / "pairs", changed)
    after = mine_pairs(changed, tmp_path / "pairs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path / "pairs", changed)
    assert (before.made, before.tested, after.made, after.tested) == (1, 15, 1, 21)


def test_pairs_of_another_part_of_the_frames_are_neither_replaced_nor_read(tmp_path, spec):
    first, rest = (dataclasses.replace(spec, frames=part) for part in ((0.0, 0.5), (0.5, 1.0)))
    mine_pairs(first, tmp_path)
    with pytest.raises(DataError, match=r"a\.json holds pairs of the frames 0:0\.5, not 0\.5:1\. Choose another --out"):
        mine_pairs(rest, tmp_path)
    held = len(read(tmp_path, first))
    with pytest.raises(DataError, match=rf"holds {held} pairs, none of them of the frames 0\.5:1 of these scenes"):
        read(tmp_path, rest)
    assert mine_pairs(first, tmp_path).made == 0


def test_names_that_are_no_unicode_are_names_too(tmp_path, spec):
    root = write_recording(tmp_path / os.fsdecode(b"k\xfcche")).parent
    named = dataclasses.replace(spec, path=str(root))
    assert mine_pairs(named, tmp_path / "pairs").pairs == len(read(tmp_path / "pairs", named)) > 0


def test_ranks_mine_no_scene_twice(tmp_path, spec, pairs):
    log = tmp_path / "log"
    log.mkdir()
    mine = mining.mine_scene

    def noted(source, scene, *rest):
        with (log / scene.replace("/", "_")).open("a") as file:
            file.write(".")
        return mine(source, scene, *rest)

    def work(rank):
        mining.mine_scene = noted
        world = World.current(ALONE.device)
        found = find_pairs(open_source(spec), spec, skips=SkippedFrames(), cache_dir=tmp_path / "cache", world=world)
        assert found == pairs

    in_two_processes(work, tmp_path)
    assert {path.name: path.read_text() for path in log.iterdir()} == {"a": ".", "b": ".", "c_d": "."}
    (cached,) = (tmp_path / "cache" / "pairs").iterdir()
    assert cached.suffix == ".json"


def test_estimate_of_a_small_source_is_what_mining_gives(spec, pairs):
    expected = estimate(open_source(spec), spec, workers=2)
    assert (expected.scenes, expected.frames, expected.pairs, expected.kept) == (3, 18, 45, len(pairs))
    assert 0 < expected.hours < 0.1
    assert expected.read_gb is None or 1e-5 < expected.read_gb < 1
    assert str(expected).startswith(f"3 scenes, 18 frames, 45 pairs to test: about {len(pairs)} pairs, ")


def test_pairs_of_other_settings_are_not_replaced(tmp_path, spec):
    mine_pairs(spec, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*.json")}
    for other in (dataclasses.replace(spec, overlap=(0.5, 1.0)), dataclasses.replace(spec, max_pairs_per_scene=1)):
        with pytest.raises(DataError, match=r"holds pairs with (overlap|max_pairs_per_scene) .*Choose another --out"):
            mine_pairs(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UnknownName, match=r"Unknown cluster 'slrum'. Closest: 'slurm'"):
        make_executor(tmp_path, Cluster("slrum"))
    with pytest.raises((MissingDependency, RecipeError), match=r"geo_pretrain\[cluster\]|No cluster 'slurm' here"):
        make_executor(tmp_path, Cluster("slurm"))


def test_jobs_of_submitit_mine_the_same_pairs(tmp_path, spec, pairs):
    pytest.importorskip("submitit", reason="submitit is an optional library, the extra 'cluster'")
    executor = make_executor(tmp_path / "jobs", Cluster("local", hours=0.1))
    mined = mine_pairs(spec, tmp_path / "pairs", executor=executor, jobs=1)
    assert (mined.made, mined.pairs) == (3, len(pairs))
    assert read(tmp_path / "pairs", spec) == pairs
    command = ["data", "mine", f"seven_scenes:{spec.path}", "--out", tmp_path / "again", "--overlap", "0.2:1"]
    told = geo_pretrain(*command, "--set", "data.size=[60, 80]", "--jobs", 2, "--cluster", "local", "--hours", 0.1)
    assert f"{len(pairs)} of 45 pairs, in 3 scenes mined now and 0 that were there" in told.output
    assert read(tmp_path / "again", spec) == pairs


@pytest.mark.parametrize(
    "words, says",
    [
        (["--out", __file__], "is a file"),
        (["--out", "x", "--device", "cuda:99"], "torch sees"),
        (["--out", "x", "--partition", "gpu"], "goes with --jobs"),
    ],
)
def test_options_that_cannot_be_are_told_before_any_work(words, says):
    result = CliRunner().invoke(cli.app, ["data", "mine", "rooms", *words])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


def test_poses_changed_under_the_same_names_are_noticed(tmp_path, spec, pairs):
    root = tmp_path / "root"
    for scene in SCENES:
        write_recording(root / scene)
    own = dataclasses.replace(spec, path=str(root))
    refuse_changed(open_source(own), [], own, tmp_path)
    mine_pairs(own, tmp_path / "pairs")
    assert mine_pairs(own, tmp_path / "pairs").present == 3
    for number, pose in enumerate(sorted(root.rglob("*.pose.txt"))):
        rows = pose.read_text().split()
        rows[3] = str(float(rows[3]) + 40 * number)  # m, to the right
        pose.write_text(" ".join(rows))
    mining_jobs._opened.cache_clear()
    with pytest.raises(DataError, match=r"compared anew 8 overlap otherwise, such as .* of a by 0\.00, not 0\.\d\d"):
        mine_pairs(own, tmp_path / "pairs")
    source = open_source(own)
    for measure in ("projective", "source"):
        refuse_changed(source, [], dataclasses.replace(own, measure=measure), tmp_path)
    refuse_changed(source, pairs, dataclasses.replace(own, measure="source"), tmp_path)  # a rule that is not asked
    with pytest.raises(DataError, match="of 1 pairs that were compared anew 1 overlap"):
        refuse_changed(source, pairs[:1], own, tmp_path)
    in_place = open_source(spec)
    apart = dataclasses.replace(pairs[0], overlap=pairs[0].overlap - 0.9)
    refuse_changed(in_place, [apart, *pairs[1:]], spec, tmp_path)  # one of eight may be another size's
