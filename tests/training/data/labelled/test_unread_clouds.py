"""Text files of points are told with a line of numpy that reads them as they are: header, delimiter, columns."""

from __future__ import annotations

import re

import numpy as np
import pytest

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.labelled.clouds.files import CloudFields, read_cloud
from geo_pretrain.training.data.labelled.clouds.folder import split_files
from geo_pretrain.training.data.labelled.clouds.unread import conversion, left_alone

ROWS = "0.5,1.5,2.5,10,20,30,2\n0.25,1,2,11,21,31,1\n"
TEXTS = {  # text, and the option that names the columns of the array
    "comma": (ROWS, None),
    "header": ("x,y,z,red,green,blue,label\n" + ROWS, None),
    "names": ("x;y;z;red;green;blue;class\n" + ROWS.replace(",", ";"), "x, y, z, red, green, blue, class"),
    "quoted": ('"x","y","z","r","g","b","label"\n' + ROWS, "x, y, z, r, g, b, label"),
    "cloudcompare": ("//X Y Z R G B label\n2\n" + ROWS.replace(",", " "), "X, Y, Z, R, G, B, label"),
    "comment": ("# made by hand\n" + ROWS.replace(",", "\t"), None),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_line_makes_a_file_that_is_read(kind, encoding, tmp_path):
    text, columns = TEXTS[kind]
    path = tmp_path / "it's a scan.csv"
    path.write_text(text, encoding=encoding)
    hint = conversion([path])
    line, _, named = hint.removeprefix(" Columns of numbers: ").rstrip(".").partition(", with the option ")
    exec(line, {"numpy": np})
    assert named == ("" if columns is None else f"columns=[{columns}]")
    names = tuple(re.findall(r"\w+", named.partition("=")[2]))
    cloud = read_cloud(path.with_suffix(".npy"), CloudFields(columns=names), need=())
    assert cloud.points.tolist() == [[0.5, 1.5, 2.5], [0.25, 1, 2]]
    assert cloud.colors.tolist() == [[10, 20, 30], [11, 21, 31]]


def test_columns_that_nobody_names_are_asked_for(tmp_path):
    (tmp_path / "a.asc").write_text("1 2 3 4 5\n" * 60)
    assert conversion([tmp_path / "a.asc"]).endswith(", with the option columns=[...], a name for each of 5.")


@pytest.mark.parametrize("text", ["", "to do: scan the attic\n", "1 2 3 chair\n", "1 2\n3 4\n", "\x00\xff"])
def test_what_is_no_table_of_points_has_no_line(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    assert conversion([tmp_path / "a.txt", tmp_path / "missing.xyz"]) == ""
    assert conversion([tmp_path / "a.txt", tmp_path / "b.e57"]) == " CloudCompare and MeshLab save them as PLY."


def test_a_split_of_text_files_alone_says_how_to_read_them(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "scan.xyz").write_text("1 2 3\n")
    for name in ("notes.md", "classes.txt", ".hidden.txt"):
        (folder / name).write_text("1 2 3\n")
    assert left_alone(folder) == [folder / "scan.xyz"]
    with pytest.raises(DataError, match=r"No \.ply.* file in .*: numpy\.save\("):
        split_files(tmp_path, "train")
