"""The papers' 3D tables, cell by cell: the golden text tests/data/paper_tables_3d.md against the catalog.

Every number of the text is looked up by row and column; at the end none of the catalog's 3D numbers is left over.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.baselines import BASELINES
from geo_pretrain.catalog.tables import PaperTable, paper_tables

TEXT = (Path(__file__).parent / "data" / "paper_tables_3d.md").read_text(encoding="utf-8")
TABLES = paper_tables(CATALOG)
SEG, DET, INS = "3D semantic segmentation", "3D object detection", "3D instance segmentation"
SHARE = "% of the training data"
Cells = dict[tuple[str, str, str, str], float]  # table, row, "task / data", metric -> value
NUMBER = re.compile(r"(?<![\w.@])\d+\.\d+")
# row of the text -> row of the catalog
ROWS = {
    "PointContrast (multi-scan)": "pointcontrast_nce_srunet34",
    "CSC (multi-scan)": "csc_100k_srunet34",
    "Janda (single)": "img2pc_srunet34",
    "PointContrast": "pointcontrast_nce_srunet34",
    "PPKT": "ppkt_srunet34",
    "Global KD": "global_kd_srunet34",
    "Gupta et al.": "gupta_srunet34",
    "CRD": "crd_srunet34",
    "hardest-contrastive": "pointcontrast_hardest_srunet34",
    "PointInfoNCE": "pointcontrast_nce_srunet34",
    "VoteNet geo": "VoteNet, geometry",
    "geo+height": "VoteNet, geometry and height",
}


def value(table: str, row: str, task: str, dataset: str, metric: str, network: str = "SR-UNet34C") -> float | None:
    rows = [r for r in TABLES[table].rows if r.label == ROWS.get(row, row) and r.network in ("", network)]
    assert len(rows) == 1, (table, row)
    return rows[0].values.get((task, dataset, metric))


def markdown(heading: str) -> list[list[str]]:
    """The rows of the first Markdown table below a heading, its head first."""
    lines = TEXT[TEXT.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def numbers(text: str) -> list[float | None]:
    return [None if part.strip() == "-" else float(part) for part in text.split("/")]


def columns(metrics: list[str], *places: tuple[str, str]) -> list[tuple[str, str, str]]:
    return [(task, dataset, metric) for task, dataset in places for metric in metrics]


def test_janda_t1():
    head, *rows = markdown("### 7.3")
    places = [(SEG, "S3DIS"), (INS, "S3DIS"), (SEG, "ScanNet"), (INS, "ScanNet"), (DET, "ScanNet")]
    places += [(SEG, "SemanticKITTI"), (DET, "SUN RGB-D")]
    assert len(head) == len(places) + 1
    assert len(rows) == 5
    for row, *cells in rows:
        stated = [value("Janda T1", row, *place, "mIoU" if place[0] == SEG else "mAP@0.5") for place in places]
        assert stated == [float(cell) for cell in cells], row


def test_ppkt_t1_to_t3():
    _, *rows = markdown("### 7.4")
    boxes = ["mAP@0.25", "mAP@0.5"]
    layout = [
        ("PPKT T1", columns(["mAcc", "mIoU"], (SEG, "S3DIS"))),
        ("PPKT T2", columns(boxes, (DET, "SUN RGB-D"))),
        ("PPKT T3", columns(["accuracy", "mIoU"], (SEG, "ScanNet"))),  # of the size of an overall accuracy
        ("PPKT T3", columns(boxes, (DET, "ScanNet"))),
    ]
    assert len(rows) == 6
    for row, *cells in rows:
        for (table, where), cell in zip(layout, cells, strict=True):
            assert [value(table, row, *column) for column in where] == numbers(cell), (table, row)


PC_TABLES = {  # as the text calls the row -> (table, columns)
    "T2 ShapeNet accuracy 1 / 10 / 100 %": (
        "T2",
        [(f"classification{s}", "ShapeNet", "accuracy") for s in (f", 1 {SHARE}", f", 10 {SHARE}", "")],
    ),
    "T2 10 tail / 30 tail / all 55": (
        "T2",
        [(f"classification{s}", "ShapeNet", "accuracy") for s in (", 10 rarest classes", ", 30 rarest classes", "")],
    ),
    "T3 part IoU 1 / 5 / 100 %": (
        "T3",
        [(f"part segmentation{s}", "ShapeNet", "IoU") for s in (f", 1 {SHARE}", f", 5 {SHARE}", "")],
    ),
    "T4 S3DIS Area 5 mIoU / mAcc": ("T4", columns(["mIoU", "mAcc"], (SEG, "S3DIS"))),
    "T5 SUN RGB-D mAP@.5 / .25": ("T5", columns(["mAP@0.5", "mAP@0.25"], (DET, "SUN RGB-D"))),
    "T6 Synthia4D mIoU / mAcc": ("T6", columns(["mIoU", "mAcc"], (SEG, "Synthia4D"))),
    "T7 ScanNet val mIoU / mAcc": ("T7", columns(["mIoU", "mAcc"], (SEG, "ScanNet"))),
    "T8 ScanNet mAP@.5 / .25": ("T8", columns(["mAP@0.5", "mAP@0.25"], (DET, "ScanNet"))),
}


def test_pointcontrast_t2_to_t8():
    head, *rows = markdown("### 7.5")
    assert {row[0] for row in rows} == set(PC_TABLES)
    for name, *cells in rows:
        table, where = PC_TABLES[name]
        for start, cell in zip(head[1:4], cells[:3], strict=True):
            if cell != "(lost in the text)":
                stated = [value(f"PointContrast {table}", start, *column) for column in where]
                assert stated == numbers(cell), (name, start)
        for other in filter(None, cells[3].split("; ")):
            label, given = re.fullmatch(r"(.*?) ((?:-|[\d.]+)(?: / [\d.]+)+)", other).groups()
            stated = [value(f"PointContrast {table}", label, *column) for column in where]
            assert stated[: len(numbers(given))] == numbers(given), (name, label)


def line(start: str) -> list[float]:
    """The decimal numbers of the line that begins so, up to its end."""
    found = next(text for text in TEXT.splitlines() if text.startswith(start))
    return [float(number) for number in NUMBER.findall(found.removeprefix(start))]


def test_ppkt_t4_to_t6_and_figure_4():
    s3dis, sun, scannet = (SEG, "S3DIS"), (DET, "SUN RGB-D", "mAP@0.25"), (DET, "ScanNet", "mAP@0.25")
    rows = [
        ("scratch", "SR-UNet18A"),
        ("ppkt_srunet18", "SR-UNet18A"),
        ("scratch", "SR-UNet34C"),
        ("PPKT", "SR-UNet34C"),
    ]
    stated = [value("PPKT T4", row, *s3dis, metric, network) for row, network in rows for metric in ("mAcc", "mIoU")]
    assert stated == line("T4 S3DIS mAcc / mIoU:")
    t5 = [value("PPKT T5", row, *sun) for row in ("scratch", "ppkd_srunet34", "ppkt_ade_srunet34", "PPKT")]
    assert t5 == line("T5 SUN RGB-D mAP@.25:")
    t6 = [value("PPKT T6", row, *c) for row in ("scratch", "PPKT", "ppkt_moco_srunet34") for c in (scannet, sun)]
    assert t6 == line("T6 mAP@.25 ScanNet / SUN RGB-D:")
    gain = value("PPKT Fig. 4", "PPKT", f"{SEG}, 15 % of the labels", "ScanNet", "mIoU gain")
    assert [gain] == line("Fig. 4:")


def test_slidr_readme():
    rows = ("PPKT on nuScenes", "slidr_srunet34.nuscenes", "scratch")
    places = [(f"{SEG}, linear probing", "nuScenes"), (f"{SEG}, 1 {SHARE}", "nuScenes")]
    places += [(f"{SEG}, 1 {SHARE}", "SemanticKITTI")]
    stated = [value("SLidR README", row, *place, "mIoU") for place in places for row in rows]
    assert stated == line("SLidR README (nuScenes pre-training), PPKT / SLidR / random:")


def test_pointcontrast_analysis():
    where, alone = "S3DIS", f"{SEG}, beside single whole-scene views"
    cells = [("ScanNet, supervised", SEG), ("scratch", f"{SEG}, 20,000 steps"), ("scratch", f"{SEG}, 30,000 steps")]
    cells += [("single whole-scene view", alone), ("scratch", alone)]
    stated = [value("PointContrast text", row, task, where, "mIoU") for row, task in cells]
    papers = [value(t, "scratch", SEG, where, "mIoU") for t in ("PointContrast T4", "PPKT T4", "Janda T1")]
    assert stated + papers == line("Analysis on S3DIS:")


def test_csc_readme():
    def of(row: str, task: str, metric: str, dataset: str = "ScanNet") -> float | None:
        return value("CSC README", f"csc_{row}_srunet34", task, dataset, metric)

    shares = [of("60k", f"{SEG}, {share} % of the scenes", "mIoU") for share in (1, 5, 10, 20)]
    points = [of("60k", f"{SEG}, {n} labelled points a scene", "mIoU") for n in (20, 50, 100, 200)]
    ap50, ap25 = "mAP@0.5", "mAP@0.25"
    boxes = [of("partition4", DET, metric, data) for data in ("ScanNet", "SUN RGB-D") for metric in (ap50, ap25)]
    rest = [of("60k", INS, ap50), *boxes[:2], of("100k", SEG, "mIoU", "S3DIS"), of("20k", INS, ap50, "S3DIS")]
    stated = [*shares, of("100k", SEG, "mIoU"), *points, *rest, *boxes[2:]]
    assert stated == line("CSC README fine-tuning (for orientation):")


def test_every_start_is_one_that_fine_tuning_takes_or_says_why_not():
    for table in TABLES.values():
        for row in table.rows:
            assert row.start in (*CATALOG, "scratch", "imagenet") or (row.start == "" and row.note), (table.name, row)
    assert {baseline.start for baseline in BASELINES} == {"", "scratch", "imagenet"}
    numbered = {"Pri3D": range(1, 11), "PointContrast": range(2, 9), "PPKT": range(1, 7), "Janda": (1,)}
    assert {f"{paper} T{number}" for paper, own in numbered.items() for number in own} <= set(TABLES)


@pytest.mark.parametrize("name", ["PPKT T1", "Janda T1", "Pri3D T1"])
def test_a_table_has_its_rows_once(name: str):
    table: PaperTable = TABLES[name]
    assert len({(row.label, row.network) for row in table.rows}) == len(table.rows)
    assert all(set(row.values) <= set(table.columns) for row in table.rows)
