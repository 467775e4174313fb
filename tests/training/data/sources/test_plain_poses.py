"""Which pose of a plain folder's poses.txt is whose: by order, by name, or refused."""

from __future__ import annotations

import pytest

from geo_pretrain.errors import BadFrame, DataError
from tests.recording_layouts import golden_frames, write_plain
from tests.training.data.sources.test_recordings import assert_is, opened


@pytest.fixture(scope="module")
def frames():
    """Four frames of a recording, 64x48."""
    return golden_frames(4, (48, 64))


def test_poses_with_the_names_of_their_images_are_theirs_in_any_order(frames, tmp_path):
    root = write_plain(tmp_path / "a", [frames[k % 4] for k in range(11)])
    lines = [line for line in (root / "poses.txt").read_text().splitlines() if not line.startswith("#")]
    poses = {str(k): " ".join(line.split()[-16:]) for k, line in enumerate(lines)}
    for form in ("{}", "{}.jpg"):  # as any sorted list of files has them: 0, 1, 10, 2
        text = "".join(f"{form.format(name)} {poses[name]}\n" for name in sorted(poses))
        (root / "poses.txt").write_text(text)
        source = opened("folder", tmp_path / "a")
        for name in ("2", "10"):
            assert_is(source.load("a", name), frames[int(name) % 4])
    (root / "poses.txt").write_text(text.replace("10.jpg", "x.jpg"))
    source = opened("folder", tmp_path / "a")
    assert_is(source.load("a", "2"), frames[2])
    with pytest.raises(BadFrame, match=r"poses\.txt: 10: image has no pose"):
        source.load("a", "10")
    (root / "poses.txt").write_text(text.replace("10.jpg", "1.jpg"))
    with pytest.raises(BadFrame, match=r"poses\.txt: 1: image has several poses"):
        opened("folder", tmp_path / "a").load("a", "1")
    counted = "".join(f"{int(name) + 100} {poses[name]}\n" for name in poses)
    (root / "poses.txt").write_text(f"\ufeff{counted}", encoding="utf-8")  # as Windows writes it
    assert_is(opened("folder", tmp_path / "a").load("a", "10"), frames[2])
    counted = "".join(f"{int(name) + 1} {poses[name]}\n" for name in poses)  # images from 0, poses from 1
    (root / "poses.txt").write_text(counted)
    assert_is(opened("folder", tmp_path / "a").load("a", "10"), frames[2])
    times = "".join(f"{number / 4:g} {poses[str(number)]}\n" for number in range(11))  # 0, 0.25, ... 1 ... 2 ...
    (root / "poses.txt").write_text(times)
    source = opened("folder", tmp_path / "a")
    assert_is(source.load("a", "2"), frames[2])
    assert_is(source.load("a", "10"), frames[2])
    (root / "color" / "7.jpg").unlink()
    (root / "depth" / "7.png").unlink()
    (root / "poses.txt").write_text("".join(f"{name} {poses[name]}\n" for name in poses if name != "10"))
    with pytest.raises(DataError, match=r"names of some images, and there is none for '10': name each image"):
        opened("folder", tmp_path / "a")


def test_poses_go_to_the_images_of_their_names_though_files_are_missing(frames, tmp_path):
    """As many poses as images, but of other frames: by position they would be shifted without a word."""
    root = write_plain(tmp_path / "a", [frames[k % 4] for k in range(11)])
    lines = [line for line in (root / "poses.txt").read_text().splitlines() if not line.startswith("#")]
    for kind, ending in (("color", "jpg"), ("depth", "png")):
        for number in range(11):
            (root / kind / f"{number}.{ending}").rename(root / kind / f"{number:04d}.{ending}")
        (root / kind / f"0007.{ending}").unlink()
    named = "".join(f"{number:04d} {' '.join(lines[number].split()[-16:])}\n" for number in range(10))
    (root / "poses.txt").write_text(named)
    source = opened("folder", root)
    for number in (6, 8, 9):
        assert_is(source.load("a", f"{number:04d}"), frames[number % 4])
    with pytest.raises(BadFrame, match=r"poses\.txt: 0010: image has no pose"):
        source.load("a", "0010")
    named_all = named.replace("0007 ", "0010 ")
    (root / "poses.txt").write_text(named_all)
    assert "by name" not in opened("folder", root)._recordings["a"].order


def test_numbers_with_zeros_may_count_from_another_one(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames)
    lines = [line for line in (root / "poses.txt").read_text().splitlines() if not line.startswith("#")]
    for kind, ending in (("color", "jpg"), ("depth", "png")):
        for number in range(4):
            (root / kind / f"{number}.{ending}").rename(root / kind / f"{number + 1:04d}.{ending}")
    (root / "poses.txt").write_text("".join(f"{k:04d} {' '.join(lines[k].split()[-16:])}\n" for k in range(4)))
    source = opened("folder", root)
    for k in range(4):
        assert_is(source.load("a", f"{k + 1:04d}"), frames[k])


def test_a_folder_of_other_poses_makes_no_poses(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames, poses="none")
    (root / "poses").mkdir()
    (root / "poses" / "sitting.txt").write_text("1 2 3")
    assert not opened("folder", root).load("a", "0").posed


@pytest.mark.parametrize("front", ["12:00:0{}.5", "2024-05-01T12:00:0{}", "0:", "depth_{}.png", "{}.75"])
def test_what_names_no_image_before_poses_is_not_looked_at(front, frames, tmp_path):
    root = write_plain(tmp_path / "a", frames[:4])
    lines = [line for line in (root / "poses.txt").read_text().splitlines() if not line.startswith("#")]
    text = "".join(f"{front.format(k)} {' '.join(line.split()[-16:])}\n" for k, line in enumerate(lines))
    (root / "poses.txt").write_text(text)
    assert_is(opened("folder", root).load("a", "3"), frames[3])
