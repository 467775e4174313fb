"""PLY files as written: the bytes expected by hand, and the reader's view of them."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from geo_pretrain.training.data.surfaces.ply import read_ply, write_ply

HEADER = b"""ply
format binary_little_endian 1.0
element vertex 2
property float x
property uchar red
element face 1
property list uchar int vertex_indices
end_header
"""


def test_bytes_are_those_of_the_format(tmp_path):
    vertex = {"x": np.array([0.5, -1.25], np.float32), "red": np.array([7, 255], np.uint8)}
    write_ply(tmp_path / "a.ply", {"vertex": vertex, "face": {"vertex_indices": np.array([[0, 1, 1]], np.int32)}})
    body = struct.pack("<fBfB", 0.5, 7, -1.25, 255) + struct.pack("<Biii", 3, 0, 1, 1)
    assert (tmp_path / "a.ply").read_bytes() == HEADER + body


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", ">f4", ">i2"])
def test_every_type_comes_back(tmp_path, kind):
    values = np.array([[3, 1, 100], [0, 2, 127]]).astype(kind)
    write_ply(tmp_path / "a.ply", {"one": {"lists": values, "numbers": values[:, 2]}, "none": {"x": values[:0, 0]}})
    found = read_ply(tmp_path / "a.ply")
    for name, expected in (("lists", values), ("numbers", values[:, 2])):
        assert np.array_equal(found["one"][name], expected)
        assert found["one"][name].dtype == np.dtype(kind).newbyteorder("=")
    assert len(found["none"]["x"]) == 0


@pytest.mark.parametrize(
    "columns, part",
    [
        ({"x": np.zeros(2, np.float32), "y": np.zeros(3, np.float32)}, r"lengths \[2, 3\]"),
        ({"x": np.zeros(2, np.int64)}, "int64"),
        ({"x": np.zeros(2, bool)}, "bool"),
        ({"x": np.zeros((2, 256), np.int32)}, "up to 255"),
        ({"x": np.zeros((2, 2, 2), np.int32)}, r"\(2, 2, 2\)"),
        ({}, r"lengths \[\]"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, columns, part):
    with pytest.raises(ValueError, match=part):
        write_ply(tmp_path / "a.ply", {"vertex": columns})
    assert not (tmp_path / "a.ply").exists()
