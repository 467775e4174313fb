"""Files of ScanNet's benchmark: read back as its own evaluation scripts do, they are what was predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.predictions import PointInstances
from geo_pretrain.training.evaluation.scannet_benchmark import write_scannet_instances, write_scannet_semantic

VALID = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39]  # evaluate_semantic_label.py


def test_classes_are_written_as_nyu40_ids_in_order(tmp_path):
    labels = np.random.default_rng(0).integers(1, 21, 500)
    path = write_scannet_semantic(tmp_path, "scene0707_00", labels)
    assert path == tmp_path / "scene0707_00.txt"
    assert np.loadtxt(path, dtype=np.int64).tolist() == [VALID[label - 1] for label in labels]
    for wrong in (np.array([0, 1]), np.array([21]), np.zeros(0, int)):
        with pytest.raises(DataError, match="Scan 'scene0707_00': the benchmark takes a class from 1 to 20"):
            write_scannet_semantic(tmp_path, "scene0707_00", wrong)


def test_instances_are_masks_with_class_and_confidence(tmp_path):
    rng = np.random.default_rng(1)
    many = PointInstances(rng.random((5, 90)) > 0.5, rng.integers(3, 21, 5), np.linspace(1, 0.2, 5).astype(np.float32))
    few = PointInstances(many.masks[:2], np.array([3, 20]), np.array([0.75, 0.5], np.float32))
    for found in (many, few):
        lines = write_scannet_instances(tmp_path, "scene0707_00", found).read_text().splitlines()
        assert len(lines) == len(found) == len(list((tmp_path / "predicted_masks").iterdir()))
        for k, line in enumerate(lines):
            name, label, confidence = line.split(" ")
            assert not Path(name).is_absolute()
            assert np.array_equal(np.loadtxt(tmp_path / name, dtype=np.int64) != 0, found.masks[k])
            assert int(label) == VALID[found.classes[k] - 1]
            assert float(confidence) == pytest.approx(found.scores[k], abs=1e-6)
    write_scannet_instances(tmp_path, "scene0707", found)  # whose name the other's begins with
    assert all((tmp_path / line.split(" ")[0]).is_file() for line in lines)
    none = PointInstances(np.zeros((0, 90), bool), np.zeros(0, int), np.zeros(0, np.float32))
    assert write_scannet_instances(tmp_path, "scene0708_00", none).read_text() == ""
    with pytest.raises(DataError, match="takes instances of classes 3 to 20"):
        write_scannet_instances(tmp_path, "x", PointInstances(many.masks[:1], np.array([2]), np.ones(1, np.float32)))
