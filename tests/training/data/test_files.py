"""Images of ids, of every depth that PNG has, keep their ids; what is not one is refused."""

from __future__ import annotations

import io
import os
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data import files
from geo_pretrain.training.data.files import (
    checked_points,
    image_size,
    loaded_arrays,
    read_color,
    read_depth,
    read_ids,
    read_intrinsics,
    read_listing,
    read_matrix,
    read_pose,
)
from geo_pretrain.training.data.surfaces.obj import read_obj
from geo_pretrain.training.data.surfaces.ply import read_ply
from tests.labelled_layouts import chunk, png_bytes, save


def test_ids_of_8_and_16_bit_images_are_kept(tmp_path):
    small = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    large = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5001
    save(tmp_path / "8.png", small)
    save(tmp_path / "16.png", large)
    np.testing.assert_array_equal(read_ids(tmp_path / "8.png"), small)
    np.testing.assert_array_equal(read_ids(tmp_path / "16.png", (3, 4, 3), bits=(8, 16)), large)
    assert read_ids(tmp_path / "8.png").dtype == np.int32


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_of_palette_images_are_the_indices(tmp_path, bits):
    palette = chunk(b"PLTE", bytes(range(3 * 2**bits)) if bits < 8 else bytes(768))
    row = {1: b"\xb4", 2: b"\x1b\x1b", 4: b"\x01\x23\x01\x23", 8: bytes([0, 1, 2, 3] * 2)}[bits]
    (tmp_path / "p.png").write_bytes(png_bytes([row], 8, bits, 3, palette))
    want = {1: [1, 0, 1, 1, 0, 1, 0, 0]}.get(bits, [0, 1, 2, 3, 0, 1, 2, 3])
    assert read_ids(tmp_path / "p.png").tolist() == [want]


def gray(bits):
    """Two rows of four pixels 1, 2, 3, 15."""
    return png_bytes([{4: b"\x12\x3f", 2: b"\x1b", 1: b"\x50"}[bits]] * 2, 4, bits, 0)


def encode(array, format="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, bits, reason",
    [
        (gray(4), (8,), "4-bit gray, expected 8-bit ids"),  # Pillow alone would read 17, 34, 51, 255
        (gray(2), (8, 16), "2-bit gray, expected 8 or 16-bit ids"),
        (gray(1), (16,), "1-bit gray, expected 16-bit ids"),
        (encode(np.zeros((2, 4), np.uint16)), (8,), "16-bit gray, expected 8-bit ids"),
        (encode(np.zeros((2, 4), np.uint8)), (16,), "8-bit gray, expected 16-bit ids"),
        (encode(np.zeros((2, 4, 3), np.uint8)), (8,), "a PNG in color, expected 8-bit gray ids"),
        (encode(np.zeros((2, 4, 2), np.uint8)), (8,), "a PNG in color, expected 8-bit gray ids"),
        (encode(np.zeros((2, 4), np.uint8), "jpeg"), (8,), "not a PNG; labels are 8-bit PNGs"),
        (b"\x89PNG\r\n\x1a\n", (8,), "not a PNG"),
        (b"", (8,), "not a PNG"),
        (encode(np.random.default_rng(0).integers(0, 9, (2, 4), np.uint8))[:50], (8,), "annotation cannot be read"),
        (encode(np.zeros((4, 2), np.uint8)), (8,), "annotation is 2x4, the image 4x2"),
        (None, (8,), "annotation is missing"),
    ],
)
def test_other_files_are_refused_with_path_and_reason(tmp_path, data, bits, reason):
    path = tmp_path / "labels.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BadFrame) as error:
        read_ids(path, (2, 4, 3), bits=bits)
    assert error.value.path == str(path)
    assert error.value.reason.startswith(reason)


CAMERA = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])
FAULTY_CAMERAS = {
    "zero": (CAMERA * 0, "last row 0 0 0"),
    "NaN": (CAMERA * np.nan, "not finite"),
    "infinite": (np.where(np.eye(3) > 0, np.inf, 0), "not finite"),
    "negative": (CAMERA * [[-1, 1, 1], [1, -1, 1], [1, 1, 1]], "focal lengths -585 -585"),
    "one is zero": (CAMERA * [[1, 1, 1], [1, 0, 1], [1, 1, 1]], "focal lengths 585 0"),
    "tiny": (CAMERA * [[1e-30, 1, 1], [1, 1, 1], [1, 1, 1]], "focal lengths 5.85e-28 585"),
    "transposed": (CAMERA.T, "last row 320 240 1"),
    "relative to the size": (CAMERA / [[640, 1, 640], [1, 480, 480], [1, 1, 1]], "focal lengths 0.914062 1.21875"),
    "last row zero": (CAMERA * [[1], [1], [0]], "last row 0 0 0"),
    "huge": (CAMERA * 1e300, "last row"),
    "skewed": (CAMERA + [[0, 0, 0], [9, 0, 0], [0, 0, 0]], "no|not those of a pinhole camera"),
}


@pytest.mark.parametrize("what", FAULTY_CAMERAS)
def test_cameras_that_are_none_are_bad_frames_with_the_reason(tmp_path, what):
    matrix, reason = FAULTY_CAMERAS[what]
    path = tmp_path / "k.txt"
    np.savetxt(path, CAMERA)
    np.testing.assert_array_equal(read_intrinsics(path), CAMERA)
    np.savetxt(path, matrix)
    with pytest.raises(BadFrame, match=rf"k\.txt: intrinsics .*{reason}"):
        read_intrinsics(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({(3, 3): 0.0}, "last row 0 0 0 0"),
        ({(3, 0): 1.0}, "last row 1 0 0 1"),
        ({(0, 3): 1e300}, r"1e\+300 m from the origin"),
        ({(0, 0): 1e300}, "not a rotation"),
        ({(0, 0): -1.0}, "not a rotation"),
        ({(1, 3): float("nan")}, "not finite"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_poses_that_are_none_are_bad_frames_with_the_reason(tmp_path, change, reason):
    pose = np.eye(4)
    np.savetxt(tmp_path / "p.txt", pose)
    np.testing.assert_array_equal(read_pose(tmp_path / "p.txt"), pose)
    for place, value in change.items():
        pose[place] = value
    np.savetxt(tmp_path / "p.txt", pose)
    with pytest.raises(BadFrame, match=rf"p\.txt: pose .*{reason}"):
        read_pose(tmp_path / "p.txt")


@pytest.mark.parametrize("side", [13_000, 65_535])
def test_images_that_state_a_size_beyond_all_cameras_are_bad_frames_unread(tmp_path, side):
    data = bytearray(encode(np.zeros((48, 64, 3), np.uint8), "jpeg"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = side.to_bytes(2, "big") * 2
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(BadFrame, match=rf"x\.jpg: .*({side}x{side}|{side**2} pixels)"):
        read_color(tmp_path / "x.jpg")
    (tmp_path / "x.png").write_bytes(png_bytes([b"\0\0"], side, 16, 0))
    with pytest.raises(BadFrame, match=r"x\.png: "):
        read_depth(tmp_path / "x.png")


def test_a_matrix_in_a_huge_file_is_no_matrix(tmp_path: Path):
    (tmp_path / "pose.txt").write_text("1 " * 40_000)
    with pytest.raises(BadFrame, match=r"has 80000 bytes; a matrix of 4x4 numbers is accepted"):
        read_matrix(tmp_path / "pose.txt", 4, 4)


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
@pytest.mark.parametrize("scale", [1.0, 1000.0, 5000.0, 3.7])
def test_meters_are_the_quotients_and_invalid_values_are_zero(kind, scale):
    stored = np.array([[0, 1, 999, 30_000], [65_534, 65_535, 7, 0]], kind)
    if kind != "uint16":
        stored[0, 0] = -5
    if kind == "float32":
        stored[1, 3], stored[0, 2] = np.nan, np.inf
    invalid = {"uint16": (0, 65_535), "int32": (0, -5, 65_535), "float32": (-5,)}[kind]
    want = [
        [0 if v in invalid or not np.isfinite(v) else np.float32(v / scale) for v in row] for row in stored.tolist()
    ]
    assert files.meters_of(Path("x.png"), stored, scale=scale, floats=True).tolist() == want
    for value in invalid:
        with pytest.raises(BadFrame, match=r"x\.png: no pixel has a valid depth"):
            files.meters_of(Path("x.png"), np.full((2, 2), value, kind), scale=scale, floats=True)


def bomb(kind: bytes, data: bytes, times: int = 1) -> bytes:
    """A gray image of 16 bits with a chunk `times` before its pixels."""
    start, image = 33, encode(np.full((4, 4), 900, np.uint16))
    return image[:start] + chunk(kind, data) * times + image[start:]


PACKED = zlib.compress(b"x" * 100_000_000, level=1)
PNG_BOMBS = {
    "text": bomb(b"zTXt", b"a\0\0" + PACKED),
    "international text": bomb(b"iTXt", b"a\0\1\0\0\0" + PACKED),
    "colors": bomb(b"iCCP", b"a\0\0" + PACKED),
    "many texts": bomb(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 900_000), 80),
}


@pytest.mark.parametrize("what", PNG_BOMBS)
def test_a_png_whose_texts_unpack_to_much_more_is_a_bad_frame_in_little_memory(tmp_path, what):
    path = tmp_path / "d.png"
    path.write_bytes(bomb(b"zTXt", b"a\0\0" + zlib.compress(b"an honest text")))
    assert read_depth(path)[0, 0] == np.float32(0.9)
    path.write_bytes(PNG_BOMBS[what])
    for read in (read_depth, read_color, lambda path: read_ids(path, bits=(16,)), image_size):
        tracemalloc.start()
        try:
            with pytest.raises(BadFrame, match=r"d\.png: .*(too large|Too much)"):
                read(path)
            assert tracemalloc.get_traced_memory()[1] < 100e6
        finally:
            tracemalloc.stop()


def test_points_that_float32_cannot_hold_are_bad_frames(tmp_path):
    path, points = tmp_path / "p.ply", np.zeros((3, 3))
    assert checked_points(path, points).dtype == np.float32
    for value, reason in ((np.nan, "1 of 3 points are not finite"), (1e300, r"1e\+300 m"), (-2e7, r"2e\+07 m")):
        points[1, 2] = value
        with pytest.raises(BadFrame, match=rf"p\.ply: .*{reason}"):
            checked_points(path, points)


def test_an_image_that_asks_for_more_memory_than_there_is_is_a_bad_frame(tmp_path, monkeypatch):
    def ask(self: Image.Image, mode: str) -> Image.Image:
        raise MemoryError

    save(tmp_path / "x.png", np.zeros((3, 4), np.uint8))
    monkeypatch.setattr(Image.Image, "convert", ask)  # as Pillow does for a chunk of pixels that states 4 GB
    with pytest.raises(BadFrame, match=r"x\.png: color image cannot be read \(MemoryError"):
        read_color(tmp_path / "x.png")


def test_a_file_in_postscript_is_no_image_and_runs_no_program(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: ran.append(args))
    path = tmp_path / "frame-000000.color.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n{} loop\n%%EOF\n")
    with pytest.raises(BadFrame, match="cannot identify image file"):
        read_color(path)
    assert not ran


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP", "GIF", "JPEG2000", "TGA"])
def test_formats_of_cameras_are_read_whatever_the_file_is_called(tmp_path, kind):
    Image.new("RGB", (64, 48), (200, 100, 50)).save(tmp_path / "image", format=kind)
    assert read_color(tmp_path / "image").shape == (48, 64, 3)


def arrays(path):
    with loaded_arrays(path):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("read", [read_color, read_ids, read_pose, arrays, read_listing, read_ply, read_obj])
def test_a_pipe_in_place_of_a_file_is_refused_before_it_is_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "frame")
    for path in (tmp_path / "frame", Path("/dev/zero")):  # no end, either
        with pytest.raises((BadFrame, DataError), match="is a pipe or a device, no file"):
            read(path)
