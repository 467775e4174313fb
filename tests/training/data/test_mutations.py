"""Damaged files of every kind end as our errors with the file's name: no reader shows a traceback."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.files import loaded_arrays
from geo_pretrain.training.data.surfaces.obj import read_obj
from tests.mutations import faults, readers

NAMES = (
    "depth", "ids", "png", "jpeg", "size", "pose", "intrinsics", "ply", "ascii ply", "cloud ply", "cloud npy",
    "cloud npz", "packed npz", "sunrgbd boxes", "obj", "kitti calibration", "kitti boxes", "scan", "labels",
    "alignment", "segments", "objects", "categories", "labelled points", "s3dis", "coco", "recipe", "sealed",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_as_our_errors(tmp_path, name):
    assert set(readers(tmp_path)) == set(NAMES)
    found = [
        f"{type(error).__name__}: {error} <- {data!r}" for data, error in faults(readers(tmp_path)[name], tmp_path, 80)
    ]
    assert not found


def test_an_archive_that_unpacks_to_far_more_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("points.npy", "w", force_zip64=True) as file:
            file.write(b"\0" * 100_000)
        archive.infolist()[0].file_size = 1 << 40  # as the directory of a bomb states
    with pytest.raises(BadFrame, match=r"x\.npz: unpacks to 1099511627776 bytes"), loaded_arrays(tmp_path / "x.npz"):
        pass


def test_headers_of_arrays_that_lie_are_bad_frames(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((12, 3)))
    for lie in (b"(12, 3 ", b"(12000", b"(-1, 3)"):
        (tmp_path / "x.npy").write_bytes(buffer.getvalue().replace(b"(12, 3)", lie))
        with pytest.raises(BadFrame, match=r"x\.npy: "), loaded_arrays(tmp_path / "x.npy"):
            pass


def test_a_face_beyond_all_numbers_is_a_bad_frame(tmp_path):
    (tmp_path / "x.obj").write_text(f"v 0 0 0\nv 1 0 0\nv 0 1 0\nf {'9' * 30} 2 3\n")
    with pytest.raises(BadFrame, match="beyond 64 bits"):
        read_obj(tmp_path / "x.obj")
