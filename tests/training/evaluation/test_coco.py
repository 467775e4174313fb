"""COCO's average precision: cases computed by hand, and a slow twin written from the definition."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from geo_pretrain.errors import DataError, UnknownName
from geo_pretrain.training.data.labelled.export import coco_json, encode_mask
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.evaluation.coco import coco_report

SIZE = 40


def truth(objects, classes=("chair", "table"), images=1):
    """COCO's tree from (image, class, box or mask, crowd); ids from 0, as some conversions have them."""
    return {
        "images": [{"id": k, "width": SIZE, "height": SIZE} for k in range(images)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, 1)],
        "annotations": [
            {"id": k, "image_id": image, "category_id": label, "iscrowd": int(crowd)} | shape(what)
            for k, (image, label, what, crowd) in enumerate(objects)
        ],
    }


def shape(what):
    if isinstance(what, np.ndarray):
        return {"segmentation": encode_mask(what), "area": int(what.sum())}
    return {"bbox": list(what), "area": what[2] * what[3]}


def found(*detections):
    """Detections from (image, class, box or mask, score)."""
    return [
        {"image_id": image, "category_id": label, "score": score} | shape(what)
        for image, label, what, score in detections
    ]


def coco_ap(*arguments):
    """The means over all classes alone."""
    report = coco_report(*arguments)
    del report["classes"]
    return report


SQUARE, OTHER, FAR = (0, 0, 10, 10), (20, 20, 10, 10), (25, 0, 10, 10)


def disc(x, y, radius):
    v, u = np.mgrid[:SIZE, :SIZE]
    return (u - x) ** 2 + (v - y) ** 2 <= radius**2


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "detections", "expected"),
    [
        pytest.param([(0, 1, SQUARE, 0)], [(0, 1, SQUARE, 0.3)], (1, 1, 1), id="found"),
        pytest.param([(0, 1, SQUARE, 0)], [(0, 1, FAR, 0.3)], (0, 0, 0), id="elsewhere"),
        pytest.param([(0, 1, SQUARE, 0)], [(0, 2, SQUARE, 0.3)], (0, 0, 0), id="of another class"),
        # found at 0.5, 0.55, 0.6, 0.65, 0.7: five thresholds of ten
        pytest.param([(0, 1, SQUARE, 0)], [(0, 1, (0, 0, 10, 7.2), 0.3)], (0.5, 1, 0), id="IoU 0.72"),
        pytest.param([(0, 1, SQUARE, 0)], [(0, 1, (0, 0, 10, 7.8), 0.3)], (0.6, 1, 1), id="IoU 0.78"),
        # recall 1/2 at precision 1: 51 of the 101 points 0, 0.01, ..., 1
        pytest.param([(0, 1, SQUARE, 0), (0, 1, OTHER, 0)], [(0, 1, OTHER, 1)], (51 / 101,) * 3, id="one of two"),
        pytest.param([(0, 1, SQUARE, 0)], [(0, 1, FAR, 0.9), (0, 1, SQUARE, 0.8)], (0.5,) * 3, id="second try"),
        pytest.param([(0, 1, SQUARE, 0)], [(0, 1, FAR, 0.7), (0, 1, SQUARE, 0.8)], (1,) * 3, id="a wrong one after"),
        # the second detection of the same object is wrong, then recall 1 at precision 2/3
        pytest.param(
            [(0, 1, SQUARE, 0), (0, 1, OTHER, 0)],
            [(0, 1, SQUARE, 0.9), (0, 1, SQUARE, 0.8), (0, 1, OTHER, 0.7)],
            ((51 + 50 * 2 / 3) / 101,) * 3,
            id="twice",
        ),
        pytest.param([(0, 1, SQUARE, 0), (0, 2, OTHER, 0)], [(0, 1, SQUARE, 0.9)], (0.5,) * 3, id="mean over classes"),
        # inside a crowd nothing is wrong; what covers a crowd and nothing else is left out too
        pytest.param(
            [(0, 1, SQUARE, 0), (0, 1, (20, 0, 20, 20), 1)],
            [(0, 1, (22, 2, 5, 5), 0.9), (0, 1, (30, 5, 8, 8), 0.8), (0, 1, SQUARE, 0.7)],
            (1,) * 3,
            id="crowd",
        ),
        pytest.param(
            [(0, 1, SQUARE, 0), (0, 1, (20, 0, 20, 20), 0)],
            [(0, 1, (22, 2, 5, 5), 0.9), (0, 1, SQUARE, 0.7)],
            (0.5 * 51 / 101,) * 3,
            id="no crowd",
        ),
    ],
)
def test_cases_computed_by_hand(objects, detections, expected):
    values = coco_ap(truth(objects), found(*detections))
    assert list(values) == ["AP", "AP50", "AP75"]
    assert tuple(values.values()) == pytest.approx(expected, abs=1e-9)


def test_scores_rank_over_all_images():
    """Per image each would be perfect; together the wrong one of image 1 comes first."""
    tree = truth([(0, 1, SQUARE, 0)], images=2)
    assert coco_ap(tree, found((0, 1, SQUARE, 0.5), (1, 1, SQUARE, 0.6)))["AP"] == pytest.approx(0.5)


def test_masks_are_compared_as_masks():
    """Two triangles of one square share their box and half of their pixels at most."""
    lower = np.zeros((SIZE, SIZE), bool)
    lower[:10, :10] = np.tri(10, dtype=bool)
    tree = truth([(0, 1, lower, 0)])
    tree["annotations"][0]["bbox"] = list(SQUARE)
    upper = np.zeros_like(lower)
    upper[:10, :10] = np.tri(10, dtype=bool).T
    detections = found((0, 1, upper, 0.9))
    detections[0]["bbox"] = list(SQUARE)
    assert coco_ap(tree, detections, "box")["AP"] == pytest.approx(1)
    assert coco_ap(tree, detections, "mask")["AP"] == 0
    assert coco_ap(tree, found((0, 1, lower, 0.9)), "mask")["AP"] == pytest.approx(1)


def test_polygons_in_the_truth():
    tree = truth([(0, 1, disc(5, 5, 3), 0)])
    tree["annotations"][0]["segmentation"] = [[4, 6, 24, 6, 24, 16, 4, 16]]
    rectangle = np.zeros((SIZE, SIZE), bool)
    rectangle[6:16, 4:24] = True
    assert coco_ap(tree, found((0, 1, rectangle, 0.5)), "mask")["AP"] == pytest.approx(1)


def test_at_most_a_hundred_detections_an_image_count():
    wrong = [(0, 1, FAR, 0.9)] * 100
    assert coco_ap(truth([(0, 1, SQUARE, 0)]), found(*wrong, (0, 1, SQUARE, 0.5)))["AP"] == 0
    assert coco_ap(truth([(0, 1, SQUARE, 0)]), found(*wrong[1:], (0, 1, SQUARE, 0.5)))["AP"] == pytest.approx(0.01)


def test_classes():
    objects = [(0, 3, SQUARE, 0), (0, 1, OTHER, 0), (0, 1, SQUARE, 0), (0, 2, FAR, 1)]
    tree = truth(objects, classes=("chair", "crowd only", "lamp", "absent"))
    tree["categories"].reverse()  # the order of the file means nothing
    detections = found((0, 1, OTHER, 0.9), (0, 3, (0, 0, 10, 7.2), 0.9), (0, 4, SQUARE, 0.9))
    classes = coco_report(tree, detections)["classes"]
    half = pytest.approx(51 / 101)
    assert classes == {
        "chair": {"AP": half, "AP50": half, "AP75": half},
        "lamp": {"AP": pytest.approx(0.5), "AP50": pytest.approx(1), "AP75": 0},
    }
    assert coco_report(tree, detections)["AP"] == pytest.approx((51 / 101 + 0.5) / 2)


# --- a slow twin ----------------------------------------------------------------------------------------------------


def slow_iou(a, b, crowd):
    """Of detection a with object b; of a crowd: how much of a lies in it."""
    if isinstance(a, np.ndarray):
        shared, area_a, area_b = (a & b).sum(), a.sum(), b.sum()
    else:
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared, area_a, area_b = max(width, 0) * max(height, 0), a[2] * a[3], b[2] * b[3]
    union = area_a if crowd else area_a + area_b - shared
    return shared / union if union else 0


def slow_ap(objects, detections, label, threshold):
    """One class at one threshold: greedy by score, each object once, 101 recalls, best precision from there on."""
    objects = [o for o in objects if o[1] == label]
    count = sum(not o[3] for o in objects)
    if not count:
        return None
    taken, hits = set(), []
    for image, _, what, _ in sorted((d for d in detections if d[1] == label), key=lambda d: -d[3]):
        here = [k for k, o in enumerate(objects) if o[0] == image]
        ious = {k: slow_iou(what, objects[k][2], objects[k][3]) for k in here}
        free = [k for k in here if not objects[k][3] and k not in taken and ious[k] >= threshold]
        if free:
            taken.add(max(free, key=lambda k: ious[k]))
            hits.append(True)
        elif not any(objects[k][3] and ious[k] >= threshold for k in here):
            hits.append(False)
    curve = [(sum(hits[:n]) / count, sum(hits[:n]) / n) for n in range(1, len(hits) + 1)]
    return sum(max((p for r, p in curve if r >= k / 100 - 1e-12), default=0) for k in range(101)) / 101


def slow_report(objects, detections, names):
    thresholds = [0.5 + 0.05 * k for k in range(10)]
    table = {name: [slow_ap(objects, detections, label, t) for t in thresholds] for label, name in enumerate(names, 1)}
    table = {name: row for name, row in table.items() if row[0] is not None}
    rows = {name: {"AP": sum(row) / 10, "AP50": row[0], "AP75": row[5]} for name, row in table.items()}
    means = {key: sum(row[key] for row in rows.values()) / len(rows) for key in ("AP", "AP50", "AP75")}
    return {**means, "classes": rows}


def random_case(kind, seed):
    """Objects with crowds among them, and detections near and far of them; all scores differ."""
    random = np.random.default_rng(seed)

    def place():
        x, y, size = *random.uniform(5, 35, 2), random.uniform(3, 10)
        return disc(x, y, size) if kind == "mask" else (x - size, y - size, 2 * size, 2 * random.uniform(3, 10))

    def near(what):
        if kind == "mask":
            return np.roll(what, random.integers(-3, 4, 2), (0, 1))
        return tuple(np.array(what) + random.normal(0, 1.2, 4).clip(-4, 4))

    objects = [
        (int(random.integers(3)), int(random.integers(1, 4)), place(), bool(random.random() < 0.2)) for _ in range(14)
    ]
    objects[0] = (*objects[0][:3], False)
    scores = iter(random.permutation(60) / 60)
    detections = [(o[0], o[1], near(o[2]), next(scores)) for o in objects for _ in range(random.integers(0, 4))]
    detections += [(int(random.integers(3)), int(random.integers(1, 4)), place(), next(scores)) for _ in range(6)]
    return objects, detections


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(6))
def test_against_the_slow_twin(kind, seed):
    names = ("chair", "table", "lamp", "none of it")
    objects, detections = random_case(kind, seed)
    fast = coco_report(truth(objects, names, images=3), found(*detections), kind)
    slow = slow_report(objects, detections, names)
    classes, slow_classes = fast.pop("classes"), slow.pop("classes")
    assert fast == pytest.approx(slow, abs=1e-9)
    assert 0 < fast["AP"] < 1
    assert list(classes) == list(slow_classes)
    for name, row in classes.items():
        assert row == pytest.approx(slow_classes[name], abs=1e-9)


# --- the real thing -------------------------------------------------------------------------------------------------

COCO_SAMPLE = Path(__file__).resolve().parents[4] / "shared/data/downstream_samples/coco"


@pytest.mark.skipif(not COCO_SAMPLE.is_dir(), reason=f"no COCO images in {COCO_SAMPLE}")
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_coco_itself_gives_what_cocos_own_script_does(kind):
    """Polygons, crowds and gaps in the category ids; pycocotools reads both files and sums up as in its demo."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path = next((COCO_SAMPLE / "annotations").glob("*.json"))
    theirs, tree = COCO(str(path)), json.loads(path.read_text())
    random, results = np.random.default_rng(0), []
    for annotation in tree["annotations"]:
        result = {key: annotation[key] for key in ("image_id", "category_id")} | {"score": float(random.random())}
        if kind == "box":
            result["bbox"] = (np.array(annotation["bbox"]) + random.normal(0, 3, 4)).clip(1).tolist()
        else:
            result["segmentation"] = encode_mask(np.roll(theirs.annToMask(annotation), int(random.integers(4)), 1))
        results.append(result)
        if random.random() < 0.3:
            results.append({**result, "score": float(random.random())})
    assert any(annotation["iscrowd"] for annotation in tree["annotations"])
    evaluation = COCOeval(theirs, theirs.loadRes(copy.deepcopy(results)), {"box": "bbox", "mask": "segm"}[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = coco_ap(tree, results, kind)
    assert list(values.values()) == pytest.approx(evaluation.stats[:3].tolist(), abs=1e-12)
    assert 0 < values["AP"] < 1

    # and by way of our reader, whose classes are 1..C and whose crowds are COCO's
    source = open_labelled("coco", COCO_SAMPLE, "val2017", task="detection")
    ours = coco_json(source)
    number = {entry["source_id"]: entry["id"] for entry in ours["images"]}
    label = {category["id"]: k for k, category in enumerate(sorted(tree["categories"], key=lambda c: c["id"]), 1)}
    for result in results:
        result["image_id"] = number[str(result["image_id"])]
        result["category_id"] = label[result["category_id"]]
    assert coco_ap(ours, results, kind) == pytest.approx(values, abs=1e-4)


# --- traps and errors -----------------------------------------------------------------------------------------------


def test_nothing_detected_is_zero():
    assert coco_ap(truth([(0, 1, SQUARE, 0)]), []) == {"AP": 0, "AP50": 0, "AP75": 0}
    assert coco_ap(truth([(0, 1, disc(9, 9, 5), 0)]), [], "mask")["AP"] == 0


def test_silent_and_leaves_its_arguments_alone(capfd):
    tree, detections = truth([(0, 1, disc(9, 9, 5), 0)]), found((0, 1, disc(9, 9, 5), 0.5))
    del tree["annotations"][0]["iscrowd"]  # optional in files made for training only
    before = copy.deepcopy((tree, detections))
    assert coco_ap(tree, detections, "mask")["AP"] == pytest.approx(1)
    assert (tree, detections) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 7}, "Detection 1 has image_id 7, which the truth does not have"),
        ({"category_id": 3}, "Detection 1 has category_id 3, which"),
        ({"score": float("nan")}, "Detection 1 has score nan; expected a finite number"),
        ({"score": None}, "Detection 1 has score None"),
        ({"bbox": None}, "Detection 1 has no 'bbox', which AP by box needs"),
    ],
)
def test_detections_that_cannot_be_counted(changes, message):
    detections = found((0, 1, SQUARE, 0.5), (0, 1, SQUARE, 0.5))
    detections[1] |= changes
    detections[1] = {key: value for key, value in detections[1].items() if value is not None}
    with pytest.raises(DataError, match=message):
        coco_ap(truth([(0, 1, SQUARE, 0)]), detections)


def test_truth_that_cannot_be_used():
    with pytest.raises(DataError, match="No object to find in 1 images"):
        coco_ap(truth([(0, 1, SQUARE, 1)]), [])
    with pytest.raises(DataError, match="Annotation 0 has no 'segmentation'; AP by mask needs it"):
        coco_ap(truth([(0, 1, SQUARE, 0)]), [], "mask")
    with pytest.raises(DataError, match="no 'categories'"):
        coco_ap({"images": [], "annotations": []}, [])
    with pytest.raises(UnknownName, match=r"'boxes'\. Closest: 'box'"):
        coco_ap(truth([(0, 1, SQUARE, 0)]), [], "boxes")
