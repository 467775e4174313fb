"""PLY files whose bytes are packed by hand: every order, type and layout, and every way to be broken."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.surfaces.ply import read_ply, triangle_rows
from tests.work import python_lines

SCANNET_HEADER = """ply
format binary_little_endian 1.0
comment MLIB generated
element vertex {vertices}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
property uchar alpha
element face {faces}
property list uchar int vertex_indices
end_header
"""
VERTICES = [(0.5, -1.25, 2.0, 10, 20, 30, 255), (1.5, 0.0, -3.5, 40, 50, 255, 255), (7.0, 8.0, 9.0, 0, 1, 2, 255)]
FACES = [(0, 1, 2), (2, 1, 0)]


def scannet_bytes(order="<", faces=FACES):
    body = b"".join(struct.pack(order + "fff4B", *vertex) for vertex in VERTICES)
    body += b"".join(struct.pack(f"{order}B{len(face)}i", len(face), *face) for face in faces)
    header = SCANNET_HEADER.format(vertices=len(VERTICES), faces=len(faces))
    return header.replace("little", "little" if order == "<" else "big").encode() + body


def write(tmp_path, data):
    path = tmp_path / "mesh.ply"
    path.write_bytes(data)
    return path


def check_scannet(ply):
    for column, name in enumerate(("x", "y", "z", "red", "green", "blue", "alpha")):
        assert ply["vertex"][name].tolist() == [vertex[column] for vertex in VERTICES]
        assert ply["vertex"][name].dtype == (np.float32 if column < 3 else np.uint8)
    assert ply["face"]["vertex_indices"].tolist() == [list(face) for face in FACES]
    assert ply["face"]["vertex_indices"].dtype == np.int32


@pytest.mark.parametrize("order", ["<", ">"])
def test_mesh_of_a_scan_is_read_in_both_byte_orders(tmp_path, order):
    check_scannet(read_ply(write(tmp_path, scannet_bytes(order))))


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_ascii_is_the_same_file(tmp_path, ending):
    lines = SCANNET_HEADER.format(vertices=3, faces=2).replace("binary_little_endian", "ascii").split("\n")[:-1]
    lines += [" ".join(map(str, vertex)) for vertex in VERTICES]
    lines += [f"{len(face)} " + " ".join(map(str, face)) for face in FACES]
    check_scannet(read_ply(write(tmp_path, ending.join(line.encode() for line in lines) + ending)))


def test_binary_header_with_windows_line_ends(tmp_path):
    data = scannet_bytes()
    end = data.index(b"end_header\n") + len(b"end_header\n")
    check_scannet(read_ply(write(tmp_path, data[:end].replace(b"\n", b"\r\n") + data[end:])))


def test_every_type_in_any_order_with_lists_before_scalars(tmp_path):
    header = b"""ply
format binary_big_endian 1.0
obj_info made by hand
element odd 2
property list ushort double weights
property int8 a
property uint16 b
comment between properties
property short c
property list uint8 char letters
property uint d
property double e
element empty 0
property float nothing
element bare 1
property uint32 last
end_header
"""
    body = struct.pack(">H2dbHhB3bId", 2, 0.25, -1e300, -5, 65535, -30000, 3, 1, -2, 3, 4_000_000_000, 1e-9)
    body += struct.pack(">H2dbHhB3bId", 2, 0.5, 7.0, 127, 1, 2, 3, 4, 5, 6, 0, -0.0)
    ply = read_ply(write(tmp_path, header + body + struct.pack(">I", 4_294_967_295)))
    assert ply["odd"]["weights"].tolist() == [[0.25, -1e300], [0.5, 7.0]]
    assert ply["odd"]["letters"].tolist() == [[1, -2, 3], [4, 5, 6]]
    rest = {name: ply["odd"][name].tolist() for name in "abcde"}
    assert rest == {
        "a": [-5, 127],
        "b": [65535, 1],
        "c": [-30000, 2],
        "d": [4_000_000_000, 0],
        "e": [1e-9, -0.0],
    }
    assert ply["empty"]["nothing"].shape == (0,)
    assert ply["bare"]["last"].tolist() == [4_294_967_295]
    assert all(column.dtype.isnative for element in ply.values() for column in element.values())


NAMES = {"char int8": "b", "uchar uint8": "B", "short int16": "h", "ushort uint16": "H", "int int32": "i",
         "uint uint32": "I", "float float32": "f", "double float64": "d"}  # fmt: skip


@pytest.mark.parametrize("names", NAMES)
def test_both_names_of_every_type_hold_its_whole_range(tmp_path, names):
    code = NAMES[names]
    bits = 8 * struct.calcsize(code)
    whole = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if code in "bhi" else (0, 2**bits - 1)
    values = (-(2.0**100), 1 / 3) if code == "d" else (-(2.0**100), 0.1875) if code == "f" else whole
    for name in names.split():
        for form, body in (
            ("binary_little_endian", struct.pack(f"<2{code}", *values)),
            ("binary_big_endian", struct.pack(f">2{code}", *values)),
            ("ascii", f"{values[0]!r} {values[1]!r}\n".encode()),
        ):
            header = f"ply\nformat {form} 1.0\nobj_info x\nelement e 2\nproperty {name} p\nend_header\n"
            (tmp_path / "a.ply").write_bytes(header.encode() + body)
            column = read_ply(tmp_path / "a.ply")["e"]["p"]
            assert column.tolist() == list(values)
            assert column.itemsize == bits // 8


def test_corners_of_triangles_are_vertices_of_the_file():
    face = {"vertex_indices": np.array([[0, 1, 2], [3, 1, 0]], np.int32)}
    assert triangle_rows(Path("a.ply"), face, 4).tolist() == [[0, 1, 2], [3, 1, 0]]
    with pytest.raises(DataError, match="faces name vertices 0 to 3, the file has 0 to 2"):
        triangle_rows(Path("a.ply"), face, 3)
    with pytest.raises(DataError, match="faces name vertices -1 to 2, the file has 0 to 9"):
        triangle_rows(Path("a.ply"), {"vertex_index": face["vertex_indices"] - 1}, 10)


@pytest.mark.parametrize("form", ["binary", "ascii"])
def test_faces_of_different_sizes_are_read_row_by_row(tmp_path, form):
    faces = [(0, 1, 2), (2, 1, 0, 1), (), (1, 0, 2)]
    data = scannet_bytes(faces=faces)
    if form == "ascii":
        text = SCANNET_HEADER.format(vertices=3, faces=4).replace("binary_little_endian", "ascii")
        text += "".join(" ".join(map(str, vertex)) + "\n" for vertex in VERTICES)
        data = (text + "".join(" ".join(map(str, (len(face), *face))) + "\n" for face in faces)).encode()
    found = read_ply(write(tmp_path, data))["face"]["vertex_indices"]
    assert [tuple(face) for face in found] == faces


def test_vertices_do_not_need_the_faces_behind_them(tmp_path):
    vertices = len(VERTICES) * struct.calcsize("<fff4B")
    data = scannet_bytes()
    path = write(tmp_path, data[: data.index(b"end_header\n") + 11 + vertices])
    assert read_ply(path, ["vertex"])["vertex"]["blue"].tolist() == [30, 255, 2]
    with pytest.raises(DataError, match=r"mesh\.ply: element 'face', row 0 of 2: the file is cut off"):
        read_ply(path)


def test_an_element_behind_ragged_lists_is_found(tmp_path):
    header = b"ply\nformat binary_little_endian 1.0\nelement face 2\nproperty list uchar short i\n"
    header += b"element vertex 1\nproperty float x\nend_header\n"
    body = struct.pack("<B2h", 2, 5, 6) + struct.pack("<B1h", 1, 7) + struct.pack("<f", 1.5)
    ply = read_ply(write(tmp_path, header + body), ["vertex"])
    assert list(ply) == ["vertex"]
    assert ply["vertex"]["x"].tolist() == [1.5]


ASCII = b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty uchar red\nend_header\n"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"solid cube\n", "is no PLY file; it begins with b'soli', expected b'ply'"),
        (b"", "is no PLY file"),
        (scannet_bytes()[:100], "no line 'end_header'; the file is cut off"),
        (scannet_bytes().replace(b"binary_little_endian", b"binary_odd_endian"), "'format binary_odd_endian 1.0'"),
        (b"ply\nelement vertex 1\nproperty float x\nend_header\n0", "no line 'format'"),
        (scannet_bytes().replace(b"uchar alpha", b"uchat alpha"), "'property uchat alpha' that is not understood"),
        (scannet_bytes().replace(b"list uchar", b"list float"), "'property list float int vertex_indices'"),
        (scannet_bytes().replace(b"vertex 3", b"vertex -3"), "'element vertex -3'"),
        (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "'property float x'"),
        (scannet_bytes()[:-1], "element 'face', row 1 of 2: the file is cut off"),
        (scannet_bytes()[:-40], "element 'vertex', row 2 of 3: the file is cut off"),
        (scannet_bytes().replace(b"face 2", b"face 3"), "element 'face', row 2 of 3: the file is cut off"),
        (scannet_bytes().replace(b"list uchar", b"list char").replace(b"\x03\x02\0", b"\xff\x02\0"), "row 1 of 2"),
        (ASCII + b"1 2\n3", "element 'vertex', row 1 of 2: the file is cut off"),
        (ASCII + b"1 2\nabc 4", "row 1 of 2: not a number"),
        (ASCII + b"1 2\n1 300", "row 1 of 2: not a whole number from 0 to 255"),
        (ASCII + b"1 2\n1 2.5", "row 1 of 2: not a whole number"),
        (ASCII.replace(b"vertex", b"point") + b"1 2 3 4", "has no element 'vertex'; it has 'point'"),
    ],
)
def test_broken_file_is_refused_with_its_name_and_what_is_wrong(tmp_path, data, reason):
    path = write(tmp_path, data)
    with pytest.raises(DataError) as error:
        read_ply(path, None if b"face" in data else ["vertex"])
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)


def test_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.ply: cannot be read"):
        read_ply(tmp_path / "nowhere.ply")


def test_a_mesh_of_scannet_size_is_read_at_once(tmp_path):
    """150k vertices and 300k faces: a loop over rows would take seconds; none is there."""
    rng = np.random.default_rng(0)
    vertex = np.zeros(150_000, [("xyz", "<f4", 3), ("rgba", "u1", 4)])
    vertex["xyz"] = rng.random((150_000, 3))
    face = np.zeros(300_000, [("n", "u1"), ("i", "<i4", 3)])
    face["n"], face["i"] = 3, rng.integers(0, 150_000, (300_000, 3))
    header = SCANNET_HEADER.format(vertices=150_000, faces=300_000).encode()
    path = write(tmp_path, header + vertex.tobytes() + face.tobytes())
    ply, lines = python_lines(lambda: read_ply(path))
    assert lines < 5000
    assert (ply["vertex"]["y"] == vertex["xyz"][:, 1]).all()
    assert (ply["face"]["vertex_indices"] == face["i"]).all()


@pytest.mark.parametrize("kind", ["binary_little_endian", "ascii"])
@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("element vertex 1000000000\n", "states 1000000000 rows without properties"),
        ("element vertex 1000000000\nproperty float x\n", "states 1000000000 rows in 0 bytes"),
        ("element vertex 9\nproperty list uchar int i\n", "states 9 rows in 0 bytes"),
        ("element vertex " + "9" * 5000 + "\nproperty float x\n", "that is not understood"),
    ],
)
def test_a_few_bytes_that_state_many_rows_are_refused_at_once(tmp_path, kind, lines, reason):
    path = write(tmp_path, f"ply\nformat {kind} 1.0\n{lines}end_header\n".encode())

    def refused():
        with pytest.raises(DataError) as error:
            read_ply(path)
        return str(error.value)

    said, lines_run = python_lines(refused)
    assert lines_run < 5000
    assert reason in said
