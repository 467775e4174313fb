"""Every number the papers and READMEs report of a checkpoint in the catalog, typed from their tables once more.

The tables below have the layout of the papers, so that they can be proofread beside them. They say where each value
stands; an entry must hold exactly these, no more and no fewer.
"""

from __future__ import annotations

import pytest

from geo_pretrain.catalog import CATALOG
from tests.catalog_names import NAMES

SEG2D, DET2D, INS2D = "semantic segmentation", "object detection", "instance segmentation"
SEG3D, DET3D, INS3D = "3D semantic segmentation", "3D object detection", "3D instance segmentation"

Key = tuple[str, str, str]  # task, dataset, metric
EXPECTED: dict[str, dict[tuple[str, Key], float]] = {name: {} for name in CATALOG}  # (table, key) -> value


def state(table: str, columns: list[Key], rows: str) -> None:
    """Take over a table: a row is a name and its values, "-" for none."""
    for row in rows.strip().splitlines():
        name, *values = row.split()
        assert len(values) == len(columns), row
        for key, value in zip(columns, values, strict=True):
            if value != "-":
                assert (table, key) not in EXPECTED[name], (name, table, key)
                EXPECTED[name][table, key] = float(value)


def aps(task: str, dataset: str) -> list[Key]:
    return [(task, dataset, metric) for metric in ("AP50", "AP75", "AP")]


def boxes(dataset: str, *metrics: str) -> list[Key]:
    return [(DET3D, dataset, metric) for metric in metrics]


def points(dataset: str, *metrics: str) -> list[Key]:
    return [(SEG3D, dataset, metric) for metric in metrics]


# --- Pri3D, and the baselines in its tables

MIOU = [(SEG2D, "ScanNet", "mIoU")]
state(
    "T1",
    MIOU,
    """
    pri3d_view_r50      61.3
    pri3d_view_r18      54.4
    pri3d_geo_r50       61.1
    pri3d_geo_r18       55.3
    pri3d_view_geo_r50  61.7
    pri3d_view_geo_r18  55.7
    """,
)
state(
    "Pri3D T1",
    MIOU,
    """
    moco_v2_sup_in_sn_r50       56.6
    moco_v2_in_sn_combine_r50   54.9
    moco_v2_in_sn_mixing_r50    54.5
    trivial_correspondence_r50  56.4
    depth_prediction_r50        58.4
    """,
)
PRI3D = "pri3d_view_r50 {}\npri3d_geo_r50 {}\npri3d_view_geo_r50 {}"
state("T2", aps(DET2D, "ScanNet"), PRI3D.format("43.7 27.0 26.3", "44.2 27.6 26.6", "44.5 27.4 26.6"))
state("T3", aps(INS2D, "ScanNet"), PRI3D.format("34.3 18.7 18.3", "34.4 18.7 18.3", "35.8 19.3 18.7"))
state("T6", aps(DET2D, "NYUv2"), PRI3D.format("33.0 19.8 18.9", "33.8 20.2 19.1", "34.0 20.4 19.4"))
state("T7", aps(INS2D, "NYUv2"), PRI3D.format("28.1 15.7 15.7", "29.0 15.9 15.2", "29.5 16.3 15.8"))
MOCO = "moco_v2_sup_in_sn_r50 "
state("Pri3D T2", aps(DET2D, "ScanNet"), MOCO + "43.5 26.8 25.8")
state("Pri3D T3", aps(INS2D, "ScanNet"), MOCO + "33.9 18.1 18.3")
state("Pri3D T5", [(SEG2D, "NYUv2", "mIoU")], MOCO + "47.6")
state("Pri3D T6", aps(DET2D, "NYUv2"), MOCO + "30.1 18.1 17.3")
state("Pri3D T7", aps(INS2D, "NYUv2"), MOCO + "27.2 14.7 14.8")
HEADS = [(f"{SEG2D}, {head}", "ScanNet", "mIoU") for head in ("DeepLabV3", "DeepLabV3+", "PSPNet")]
state("T4", HEADS, "pri3d_view_geo_r50 61.3 61.6 62.8")
state(
    "T5",
    [(SEG2D, "NYUv2", "mIoU")],
    """
    pri3d_view_r50      54.2
    pri3d_view_r18      48.2
    pri3d_geo_r50       54.8
    pri3d_geo_r18       48.6
    pri3d_view_geo_r50  54.7
    pri3d_view_geo_r18  48.1
    """,
)
state("T8", [(DET2D, "COCO", "AP50"), (INS2D, "COCO", "AP50")], "pri3d_view_r50.lr001 60.6 57.5")
state(
    "T8",
    [(SEG2D, "Cityscapes", "mIoU"), (SEG2D, "KITTI", "mIoU")],
    """
    pri3d_view_r50.megadepth  55.2  -
    pri3d_view_r50.kitti_180  56.3  -
    pri3d_view_r50.kitti      -     33.2
    """,
)
state(
    "T9",
    MIOU,
    """
    pri3d_unsup_view_r50      60.5
    pri3d_unsup_geo_r50       60.8
    pri3d_unsup_view_geo_r50  60.8
    """,
)
state("Pri3D T9", MIOU, "moco_v2_unsup_in_sn_r50 55.4")
state("T10", MIOU, "pri3d_view_r50.nodepth 60.2\npri3d_view_r50 61.3")
SHARES = [(f"{SEG2D}, {percent} % of the training scenes", "ScanNet", "mIoU") for percent in (20, 40, 60, 80)]
state("README", [*SHARES, *MIOU], "pri3d_view_geo_r50 51.5 56.2 58.9 60.3 61.7")

# --- GSC

state("T1", MIOU, "gsc_r50 63.1\ngsc_r18 57.2")
state("T2", [*SHARES, *MIOU], "gsc_r50 54.1 58.3 60.4 61.5 63.1")
state("T3", HEADS, "gsc_r50 62.2 62.7 63.7")
state("T4", aps(DET2D, "ScanNet"), "gsc_r50 45.1 27.6 26.9")
state("T5", aps(INS2D, "ScanNet"), "gsc_r50 36.0 19.3 19.5")
state("T6", [(SEG2D, "NYUv2", "mIoU")], "gsc_r50 55.4")
state("T7", aps(DET2D, "NYUv2"), "gsc_r50 34.6 20.5 19.7")
state("T8", aps(INS2D, "NYUv2"), "gsc_r50 29.7 16.3 16.5")
state(
    "GSC T10",
    MIOU,
    """
    pri3d_view_r50.continued      61.4
    pri3d_geo_r50.continued       61.6
    pri3d_view_geo_r50.continued  61.5
    pri3d_view_geo_r50            61.7
    """,
)

# --- Janda et al.

JANDA = [
    (SEG3D, "S3DIS", "mIoU"),
    (INS3D, "S3DIS", "mAP@0.5"),
    (SEG3D, "ScanNet", "mIoU"),
    (INS3D, "ScanNet", "mAP@0.5"),
    (DET3D, "ScanNet", "mAP@0.5"),
    (SEG3D, "SemanticKITTI", "mIoU"),
    (DET3D, "SUN RGB-D", "mAP@0.5"),
]
state("T1", JANDA, "img2pc_srunet34 66.5 55.8 67.7 48.5 37.7 42.0 33.1")
state(
    "Janda T1",
    JANDA,
    """
    pointcontrast_nce_srunet34  66.2 54.8 66.9 49.1 36.7 42.1 34.2
    csc_100k_srunet34           69.0 57.8 67.6 49.3 36.1 43.0 35.1
    """,
)

# --- PPKT and its baselines

state(
    "PPKT T1",
    points("S3DIS", "mAcc", "mIoU"),
    """
    global_kd_srunet34  72.65 66.56
    gupta_srunet34      72.11 64.39
    crd_srunet34        72.70 65.65
    ppkt_srunet34       75.19 68.28
    pointcontrast_nce_srunet34  73.97 66.86
    """,
)
state(
    "PPKT T2",
    boxes("SUN RGB-D", "mAP@0.25", "mAP@0.5"),
    """
    global_kd_srunet34  56.10 33.58
    gupta_srunet34      54.42 31.12
    crd_srunet34        55.86 34.30
    ppkt_srunet34       57.26 33.92
    pointcontrast_nce_srunet34  56.14 32.70
    """,
)
state(
    "PPKT T3",
    [*points("ScanNet", "accuracy", "mIoU"), *boxes("ScanNet", "mAP@0.25", "mAP@0.5")],
    """
    global_kd_srunet34  88.63 70.35 57.50 34.81
    gupta_srunet34      88.40 68.71 56.74 36.27
    crd_srunet34        88.08 68.53 56.82 36.75
    ppkt_srunet34       88.53 69.56 59.67 38.90
    pointcontrast_nce_srunet34  88.63 69.22 58.30 36.26
    """,
)
state("PPKT T4", points("S3DIS", "mAcc", "mIoU"), "ppkt_srunet18 73.67 66.40\nppkt_srunet34 75.19 68.28")
state(
    "PPKT T5",
    boxes("SUN RGB-D", "mAP@0.25"),
    """
    ppkd_srunet34      56.07
    ppkt_ade_srunet34  58.03
    ppkt_srunet34      57.26
    """,
)
state(
    "PPKT T6",
    [*boxes("ScanNet", "mAP@0.25"), *boxes("SUN RGB-D", "mAP@0.25")],
    """
    ppkt_moco_srunet34  59.69 57.17
    ppkt_srunet34       59.67 57.26
    """,
)
state("PPKT Fig. 4", [(f"{SEG3D}, 15 % of the labels", "ScanNet", "mIoU gain")], "ppkt_srunet34 2.23")

# --- PointContrast: each row NCE, then hardest-contrastive

PC = "pointcontrast_nce_srunet34 {}\npointcontrast_hardest_srunet34 {}"
CLASSIFY, PARTS = "classification", "part segmentation"


def shapenet(task: str, metric: str, *limits: str) -> list[Key]:
    return [(f"{task}, {limit}" if limit else task, "ShapeNet", metric) for limit in limits]


ONE, FIVE, TEN = (f"{percent} % of the training data" for percent in (1, 5, 10))
state("T2", shapenet(CLASSIFY, "accuracy", ONE, TEN, ""), PC.format("65.8 78.8 85.7", "66.2 79.0 85.7"))
RAREST = shapenet(CLASSIFY, "accuracy", "10 rarest classes", "30 rarest classes")
state("T2", RAREST, "pointcontrast_hardest_srunet34 70.9 72.9")
state("T3", shapenet(PARTS, "IoU", ONE, FIVE, ""), PC.format("73.1 79.9 85.1", "74.0 79.9 85.1"))
state("T4", points("S3DIS", "mIoU", "mAcc"), PC.format("70.3 76.9", "70.9 77.0"))
state("T5", boxes("SUN RGB-D", "mAP@0.5", "mAP@0.25"), PC.format("34.8 57.5", "34.5 57.5"))
state("T6", points("Synthia4D", "mIoU", "mAcc"), PC.format("83.1 93.7", "82.6 93.7"))
state("T7", points("ScanNet", "mIoU", "mAcc"), PC.format("74.1 81.6", "73.3 81.0"))
state("T8", boxes("ScanNet", "mAP@0.5", "mAP@0.25"), PC.format("38.0 58.5", "37.3 59.2"))

# --- CSC, its README: each value stands with the file that was fine-tuned

SCENES = "% of the scenes"


def limited(task: str, metric: str, unit: str, *limits: int) -> list[Key]:
    return [(f"{task}, {limit} {unit}", "ScanNet", metric) for limit in limits]


LABELS, BOXES = "labelled points a scene", "labelled boxes a scene"
state("README", limited(SEG3D, "mIoU", SCENES, 1, 5, 10, 20), "csc_60k_srunet34 29.3 45.4 59.5 64.1")
state("README", limited(SEG3D, "mIoU", LABELS, 20, 50, 100, 200), "csc_60k_srunet34 53.8 62.9 66.9 69.0")
state("README", limited(INS3D, "mAP@0.5", SCENES, 1, 5, 10, 20), "csc_60k_srunet34 12.3 33.9 45.3 49.8")
state("README", limited(INS3D, "mAP@0.5", LABELS, 20, 50, 100, 200), "csc_60k_srunet34 27.2 35.7 43.6 50.4")
state("README", [(INS3D, "ScanNet", "mAP@0.5")], "csc_60k_srunet34 59.4")
state("README", limited(DET3D, "mAP@0.5", SCENES, 10, 20, 40, 80), "csc_60k_srunet34 9.9 21.4 29.5 36.3")
state("README", limited(DET3D, "mAP@0.25", SCENES, 10, 20, 40, 80), "csc_60k_srunet34 24.7 41.4 52.0 56.3")
state("README", [*points("ScanNet", "mIoU"), *points("S3DIS", "mIoU")], "csc_100k_srunet34 73.8 72.2")
state("README", limited(DET3D, "mAP@0.5", BOXES, 1, 2, 4, 7), "csc_100k_srunet34 10.9 18.5 26.1 30.4")
state("README", limited(DET3D, "mAP@0.25", BOXES, 1, 2, 4, 7), "csc_100k_srunet34 24.5 36.5 45.9 52.5")
state("README", [(INS3D, "S3DIS", "mAP@0.5")], "csc_20k_srunet34 63.4")
state("README", boxes("ScanNet", "mAP@0.5", "mAP@0.25"), "csc_partition4_srunet34 39.3 59.1")
state("README", boxes("SUN RGB-D", "mAP@0.5", "mAP@0.25"), "csc_partition4_srunet34 36.4 58.9")

# --- SLidR, its README

SLIDR = "slidr_srunet34.nuscenes "
state("README", [(f"{SEG3D}, linear probing", "nuScenes", "mIoU")], SLIDR + "38.8")
DATA = [(f"{SEG3D}, {percent} % of the training data", "nuScenes", "mIoU") for percent in (1, 5, 10, 25)]
state("README", [*DATA, *points("nuScenes", "mIoU")], SLIDR + "38.3 52.2 58.8 66.2 74.6")
state("README", [(f"{SEG3D}, 1 % of the training data", "SemanticKITTI", "mIoU")], SLIDR + "44.6")


@pytest.mark.parametrize("name", list(CATALOG))
def test_an_entry_holds_exactly_the_numbers_reported_of_it(name: str):
    stated = {(r.table, (r.task, r.dataset, r.metric)): r.value for r in CATALOG[name].results}
    assert stated == EXPECTED[name]
    assert len(CATALOG[name].results) == len(stated)


@pytest.mark.parametrize("name", list(CATALOG))
def test_numbers_are_found_by_task_dataset_and_metric(name: str):
    values: dict[Key, list[float]] = {}
    for (_, key), value in EXPECTED[name].items():
        values.setdefault(key, []).append(value)
    for key, stated in values.items():
        assert CATALOG[name].result(*key) in stated
    assert CATALOG[name].result("semantic segmentation", "the moon", "mIoU") is None


def test_of_several_numbers_the_papers_own_is_found():
    entry = CATALOG["pointcontrast_nce_srunet34"]
    assert entry.result(SEG3D, "ScanNet", "mIoU") == 74.1
    stated = {r.table: r.value for r in entry.results if (r.task, r.dataset, r.metric) == (SEG3D, "ScanNet", "mIoU")}
    assert stated == {"T7": 74.1, "PPKT T3": 69.22, "Janda T1": 66.9}


def test_the_sweep_saw_them_all():
    assert sum(len(EXPECTED[name]) for name in NAMES) == 266
    # nothing is reported of weights made here, nor of the teacher in the first stage
    assert {name for name in NAMES if not EXPECTED[name]} == {
        *(name for name in NAMES if ".rooms" in name),
        "pri3d_view_r18.nodepth",
        "pri3d_view_geo_r50.lr001",
        "img2pc_stage1_r18",
    }
