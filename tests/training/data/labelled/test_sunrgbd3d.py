"""SUN RGB-D's clouds: VoteNet's files read box by box, broken files named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from geo_pretrain.errors import BadFrame, DataError, UnknownName
from geo_pretrain.training.data.labelled.clouds.sunrgbd3d import CLASSES, PREPARED
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from geo_pretrain.training.data.samples.cloud_boxes import box_rows
from geo_pretrain.training.geometry3d.boxes import points_in_boxes

SAMPLE = Path(__file__).parents[5] / "shared" / "data" / "downstream_samples" / "sunrgbd_points" / "000017.bin"


def write_prepared(root, split, clouds):
    """Write clouds {number: (points [N, 6], rows [K, 8])} as VoteNet's preprocessing does, votes included."""
    folder = root / f"{PREPARED}{split}"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (points, rows) in clouds.items():
        np.savez_compressed(folder / f"{number:06d}_pc.npz", pc=points)
        np.save(folder / f"{number:06d}_bbox.npy", rows)
        np.savez_compressed(folder / f"{number:06d}_votes.npz", point_votes=np.zeros((len(points), 10)))
    return root


def cloud(seed=0, count=100):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-2, 2, (count, 3)), rng.uniform(0, 1, (count, 3))], axis=1)


ROW = [1.0, 2, -0.5, 0.9, 0.4, 0.3, 0.7, 2]


@pytest.fixture
def root(tmp_path):
    train = {5051: (cloud(1), np.array([ROW])), 5052: (cloud(2), np.zeros((0, 8)))}
    write_prepared(tmp_path, "train", train)
    return write_prepared(tmp_path, "val", {3: (cloud(3), np.array([ROW, ROW]))})


def opened(root, split="train"):
    return open_labelled("sunrgbd3d", root, split, task="detection3d")


def test_points_colors_and_boxes_are_those_of_the_files(root):
    source = opened(root)
    assert source.ids() == ["005051", "005052"]
    assert source.classes == CLASSES
    found = source.load("005051")
    np.testing.assert_allclose(found.points, cloud(1)[:, :3], atol=1e-6)
    np.testing.assert_allclose(found.colors / 255, cloud(1)[:, 3:], atol=0.5 / 255 + 1e-9)
    assert found.labels is None
    assert found.instances is None
    boxes = found.boxes
    np.testing.assert_allclose(boxes.centers, [[1, 2, -0.5]])
    np.testing.assert_allclose(boxes.sizes, [[1.8, 0.8, 0.6]], atol=1e-6)
    assert CLASSES[boxes.classes[0] - 1] == "sofa"
    assert len(source.load("005052").boxes) == 0
    assert len(opened(root, "val").load("000003").boxes) == 2
    assert subset(source, 0.5).ids() != source.ids()


def test_heading_of_the_file_is_clockwise_and_lengths_are_along_the_boxs_own_axes(root):
    """The released reader turns a box by the negative of its heading: a point at its long end lies inside."""
    row = box_rows(opened(root).load("005051").boxes)
    turn = -ROW[6]
    ahead = np.array([np.cos(turn), np.sin(turn), 0]) * 0.89 + ROW[:3]
    aside = np.array([-np.sin(turn), np.cos(turn), 0]) * 0.5 + ROW[:3]
    inside = points_in_boxes(torch.tensor(np.stack([ahead, aside]), dtype=torch.float32), row)
    assert inside.tolist() == [[True, False]]


def test_converted_files_hold_the_same(root, tmp_path):
    (tmp_path / "converted" / "train").mkdir(parents=True)
    np.savez_compressed(tmp_path / "converted" / "train" / "005051.npz", pc=cloud(1), bbox=np.array([ROW]))
    first, second = opened(tmp_path / "converted").load("005051"), opened(root).load("005051")
    assert np.array_equal(first.points, second.points)
    assert np.array_equal(box_rows(first.boxes), box_rows(second.boxes))


@pytest.mark.parametrize(
    "name, write, reason",
    [
        ("pc.npz", lambda path: path.write_bytes(path.read_bytes()[:40]), r"array 'pc' cannot be read"),
        ("pc.npz", lambda path: np.savez(path, other=np.zeros(3)), r"array 'pc' cannot be read \(.*pc"),
        ("pc.npz", lambda path: np.savez(path, pc=np.zeros((4, 5))), r"'pc' is \(4, 5\), expected \[N, 6\]"),
        ("pc.npz", lambda path: np.savez(path, pc=np.full((4, 6), np.nan)), "4 points are not finite"),
        ("pc.npz", lambda path: np.savez(path, pc=np.full((4, 6), 1e300)), r"1e\+300 m from the origin"),
        ("pc.npz", lambda path: np.savez(path, pc=np.array([{}], object)), "cannot be read"),
        ("bbox.npy", lambda path: np.save(path, np.array([[1e300, *ROW[1:]]])), "more than 1e.07 m away"),
        ("bbox.npy", lambda path: np.save(path, np.zeros((1, 7))), r"boxes are \(1, 7\), expected \[K, 8\]"),
        ("bbox.npy", lambda path: np.save(path, np.array([[*ROW[:7], 10]])), "class other than 0 to 9"),
        ("bbox.npy", lambda path: np.save(path, np.array([[*ROW[:3], 0, 1, 1, 0, 1]])), "length of 0 or less"),
        ("bbox.npy", lambda path: path.unlink(), "file is missing"),
    ],
)
def test_a_broken_file_is_named_with_its_reason(root, name, write, reason):
    source = opened(root)
    path = root / f"{PREPARED}train" / f"005051_{name}"
    write(path)
    with pytest.raises(BadFrame, match=reason) as caught:
        source.load("005051")
    assert caught.value.path == str(path)


def test_what_is_missing_is_said_on_opening(root, tmp_path):
    with pytest.raises(UnknownName, match="Unknown cloud '9'"):
        opened(root).load("9")
    (root / f"{PREPARED}val" / "000003_bbox.npy").unlink()
    with pytest.raises(DataError, match=r"lacks 1 files of boxes, first 000003_bbox.npy"):
        opened(root, "val")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"No cloud of split 'train'.*geo-pretrain data convert sunrgbd3d RAW OUT"):
        opened(tmp_path / "empty")


def test_digest_changes_with_a_file(root):
    before = opened(root).fingerprint()
    assert opened(root).fingerprint() == before
    np.save(root / f"{PREPARED}train" / "005051_bbox.npy", np.array([ROW, ROW]))
    assert opened(root).fingerprint() != before


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the real sample of SUN RGB-D is not beside this checkout")
def test_a_real_cloud_passes(tmp_path):
    points = np.fromfile(SAMPLE, "<f4").reshape(-1, 6)
    found = opened(write_prepared(tmp_path, "train", {17: (points, np.array([ROW]))})).load("000017")
    assert len(found) == 50_000
    assert np.array_equal(found.points, points[:, :3])
    np.testing.assert_allclose(found.colors / 255, points[:, 3:], atol=1e-3)
