"""metrics.py against hand computation, against slow and plain loops, and on its own."""

import doctest
import re
import shutil
import subprocess
import sys
import time
from itertools import permutations

import numpy as np
import pytest

import metrics
from metrics import (
    UNKNOWN_CLASS,
    aji,
    bootstrap_interval,
    compare,
    dice,
    panoptic_quality,
    score_image,
    summarise,
)

NAMES = ["a", "b", "c"]


def discs(seed, count, size):
    """A label map of discs with gaps between the ids, and a class in 1..2 for each id."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    label_map = np.zeros((size, size), np.int32)
    for id, (cy, cx) in enumerate(rng.uniform(0, size, (count, 2))):
        label_map[(y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(2, 5) ** 2] = 3 * id + 2
    return label_map, rng.integers(1, 3, len(np.unique(label_map)) - 1)


def row(*runs):
    """A label map one pixel high from (id, length) runs."""
    return np.repeat([id for id, _ in runs], [length for _, length in runs])[None]


def points(*pixels):
    """A 60 x 64 label map with one pixel a nucleus, ids in the order given."""
    label_map = np.zeros((60, 64), int)
    for id, pixel in enumerate(pixels, 1):
        label_map[pixel] = id
    return label_map


def score(true_map, true_classes, pred_map, pred_classes, **options):
    return score_image(true_map, true_classes, pred_map, pred_classes, num_classes=3, **options)


def confusions(true_map, pred_map, **options):
    """Spurious, found and missed nuclei, as published and capped."""
    got = score(true_map, None, pred_map, None, **options)
    return tuple([sum(got[key][0]), got[key][1][1], got[key][1][0]]
                 for key in ("confusion", "confusion_capped"))


def best_pairs(value):
    """The one-to-one pairs (i, j) of the largest sum of value[i, j], by trying all."""
    if len(value) > len(value[0]):
        return [(i, j) for j, i in best_pairs(value.T)]
    orders = permutations(range(len(value[0])), len(value))
    return max((list(enumerate(o)) for o in orders), key=lambda o: sum(value[ij] for ij in o))


@pytest.mark.parametrize("seed", range(8))
def test_fast_equals_slow_on_random_maps(seed):
    (true_map, true_classes), (pred_map, _) = discs(seed, 5, 18), discs(seed + 50, 4, 18)
    pred_map[:, :14] = np.roll(true_map, 1, axis=0)[:, :14] * 2
    pred_classes = np.random.default_rng(seed).integers(1, 4, len(np.unique(pred_map)) - 1)
    got = score(true_map, true_classes, pred_map, pred_classes, radius=3)
    true = [true_map == i for i in np.unique(true_map) if i]
    pred = [pred_map == i for i in np.unique(pred_map) if i]
    inter = np.array([[(t & p).sum() for p in pred] for t in true])
    union = np.array([[(t | p).sum() for p in pred] for t in true])
    iou, areas = inter / union, sum(mask.sum() for mask in true + pred)
    assert got["dice"] == pytest.approx(2 * ((true_map > 0) & (pred_map > 0)).sum() / areas)

    top, bottom, unused = 0, 0, set(range(len(pred)))
    for i, j in enumerate(iou.argmax(axis=1)):
        top += inter[i, j]
        bottom += union[i, j] if inter[i, j] else true[i].sum()
        unused -= {j} if inter[i, j] else set()
    assert got["aji"] == pytest.approx(top / (bottom + sum(pred[j].sum() for j in unused)))
    top = sum(inter[ij] for ij in best_pairs(iou))
    assert got["aji_plus"] == pytest.approx(top / (areas - top))

    for c, counts in enumerate([got["panoptic"], *got["panoptic_classes"]]):
        t = [i for i, k in enumerate(true_classes) if c in (0, k)]
        p = [j for j, k in enumerate(pred_classes) if c in (0, k)]
        hits = [iou[i, j] for i in t for j in p if iou[i, j] > 0.5]
        wanted = [len(hits), len(p) - len(hits), len(t) - len(hits), sum(hits)]
        assert counts == pytest.approx(wanted)

    centres = [[np.argwhere(mask).mean(axis=0) for mask in masks] for masks in (true, pred)]
    distance = np.array([[np.hypot(*(t - p)) for p in centres[1]] for t in centres[0]])
    for key, cost in (("confusion", distance), ("confusion_capped", np.minimum(distance, 3))):
        wanted = np.zeros((5, 4), int)
        wanted[0, 1:] = [list(pred_classes).count(c) for c in (1, 2, 3)]
        wanted[1:4, 0] = [list(true_classes).count(c) for c in (1, 2, 3)]
        for i, j in best_pairs(-cost):
            if distance[i, j] < 3:
                wanted[0, pred_classes[j]] -= 1
                wanted[true_classes[i], 0] -= 1
                wanted[true_classes[i], pred_classes[j]] += 1
        assert got[key] == wanted.tolist()


def test_aji_lets_two_share_a_prediction_and_aji_plus_does_not():
    # id 9 covers both true nuclei; 4 is spurious; the third true nucleus is missed
    true_map = row((1, 4), (2, 2), (0, 3), (7, 5))
    pred_map = row((9, 6), (0, 1), (4, 2), (0, 5))
    pair = compare(true_map, pred_map)
    assert aji(pair) == pytest.approx((4 + 2) / (6 + 6 + 5 + 2))
    assert aji(pair, one_to_one=True) == pytest.approx(4 / (6 + 2 + 5 + 2))
    assert dice(pair) == pytest.approx(2 * 6 / (11 + 8))


def test_aji_prefers_iou_to_overlap_and_the_lower_id_at_a_tie():
    for one_to_one in (False, True):  # 2 of 5 px, not 3 of 12
        pair = compare(row((1, 5), (0, 7)), row((3, 2), (4, 10)))
        assert aji(pair, one_to_one) == pytest.approx(2 / (5 + 10))
    for low, high, wanted in ((3, 4, 1 / (4 + 6)), (4, 3, 2 / (8 + 1))):  # 1 of 4, 2 of 8
        pair = compare(row((1, 4), (0, 4)), row((low, 1), (0, 1), (high, 6)))
        assert aji(pair) == pytest.approx(wanted)


def test_iou_of_exactly_half_is_no_match():
    counts = score(row((1, 2), (5, 3)), [1, 1], row((1, 1), (0, 1), (5, 2), (0, 1)), [1, 1])
    assert counts["panoptic"] == pytest.approx([1, 1, 1, 2 / 3])
    dq, sq, pq = panoptic_quality(counts["panoptic"])
    assert (dq, sq, pq) == pytest.approx((0.5, 2 / 3, 1 / 3))
    got = summarise([counts], NAMES)
    for key in ("image_mean", "pooled"):
        assert [got[key][k] for k in ("dq", "sq", "pq")] == pytest.approx([0.5, 2 / 3, 1 / 3])
    figures = got["pannuke"]["bpq"], got["pannuke"]["mpq"], got["pooled"]["mpq_plus"]
    assert (*figures, got["pannuke"]["class_pq"]["a"]) == pytest.approx([1 / 3] * 4)


def test_pairs_beyond_the_radius_are_dropped_after_the_assignment():
    true_map = points((0, 0), (30, 30), (50, 0))
    pred_map = points((0, 12), (30, 43), (55, 12))  # 12, 13 and 13 px apart
    for radius, tp in ((11.9, 0), (12, 1), (13, 3)):
        counts = score(true_map, None, pred_map, None, radius=radius)
        assert counts["confusion"][1][1] == tp and counts["radius"] == radius
    # 13 + 39 px is less than 11 + 52, so the pair of 11 px is never formed
    counts = score(points((0, 0), (11, 13)), None, points((0, 13), (50, 13)), None)
    assert counts["confusion"][1][1] == 0


def test_capped_distances_do_not_let_one_nucleus_shift_a_chain():
    # 13 + 39 px is less than 11 + 52, so the published matching never forms the pair of 11 px.
    published, capped = confusions(points((0, 0), (11, 13)), points((0, 13), (50, 13)))
    assert published == [2, 0, 2] and capped == [1, 1, 1]  # the pair 11 px apart is kept
    summary = summarise([score(points((0, 0), (11, 13)), [1, 2], points((0, 13), (50, 13)),
                               [2, 2])], NAMES)
    assert summary["detection"]["f1"] == 0 and summary["detection_capped"]["f1"] == 0.5
    assert summary["classification"]["f1"]["b"] == 0
    assert summary["classification_capped"]["f1"]["b"] == pytest.approx(2 / 3)
    assert "capped at 12 px" in summary["detection_capped"]["protocol"]


def test_capped_pairs_at_the_radius_are_dropped():
    for radius, tp in ((12, 0), (12.1, 1)):
        assert confusions(points((0, 0)), points((0, 12)), radius=radius)[1][1] == tp
    assert confusions(points((4, 4)), points((4, 4)))[1] == [0, 1, 0]  # at no distance at all
    assert confusions(points(), points((4, 4)))[1] == [1, 0, 0]
    assert confusions(points((4, 4)), points())[1] == [0, 0, 1]


def test_nuclei_of_unknown_class_count_in_everything_but_classes():
    # truth: a, unknown, unknown; found: a on the first, b on the second, b alone
    true_map, pred_map = points((0, 0), (0, 20), (0, 40)), points((0, 0), (0, 20), (50, 0))
    unknown = score(true_map, [1, UNKNOWN_CLASS, UNKNOWN_CLASS], pred_map, [1, 2, 2])
    known = score(true_map, [1, 2, 2], pred_map, [1, 2, 2])
    for key in ("dice", "aji", "aji_plus", "panoptic", "areas"):
        assert unknown[key] == known[key]
    assert unknown["panoptic_classes"] == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert unknown["confusion"] == [[0, 0, 1, 0], [0, 1, 0, 0], [0] * 4, [0] * 4, [1, 0, 1, 0]]
    got, full = summarise([unknown], NAMES), summarise([known], NAMES)
    for matching in ("", "_capped"):
        assert got["detection" + matching] == full["detection" + matching]
        f1 = got["classification" + matching]["f1"]
        assert f1 == pytest.approx({"a": 1, "b": 0, "c": np.nan}, nan_ok=True)
        assert got["classification" + matching]["confusion"] == unknown["confusion"][:4]
    assert got["image_mean"] == full["image_mean"]
    assert got["pannuke"]["class_pq"] == pytest.approx({"a": 1, "b": np.nan, "c": np.nan},
                                                       nan_ok=True)
    with pytest.raises(ValueError, match="predicted classes span 1..255"):
        score(true_map, None, pred_map, [1, 2, UNKNOWN_CLASS])


def test_area_ratio_is_pooled():
    wide, narrow = row((1, 30), (0, 10)), row((1, 10), (0, 30))
    images = [score(wide, None, narrow, None), score(narrow, None, narrow, None)]
    assert summarise(images, NAMES)["area_ratio"] == 20 / 40
    empty = score(row((0, 40)), None, narrow, None)
    assert np.isnan(summarise([empty], NAMES)["area_ratio"])


def test_thousands_of_nuclei_are_quick():
    rng = np.random.default_rng(0)
    truth = 4 + 10 * np.stack(np.meshgrid(np.arange(70), np.arange(70)), axis=-1).reshape(-1, 2)
    found = truth + rng.integers(-3, 4, truth.shape)
    maps = np.zeros((2, 710, 710), np.int32)
    maps[0][tuple(truth.T)] = maps[1][tuple(found.T)] = np.arange(1, 4901)
    pair = compare(*maps)
    start = time.process_time()
    assert aji(pair, one_to_one=True) > 0
    ones = np.ones(4900, int)
    confusion = metrics.confusion_matrix(pair, ones, ones, 1, 12, capped=True)
    assert confusion[1, 1] == 4900 and time.process_time() - start < 3


def test_figures_of_two_images_by_hand():
    first = score(points((0, 0), (0, 20), (0, 40), (20, 0)), [1, 1, 2, 2],
                  points((0, 0), (0, 20), (0, 40), (50, 50)), [1, 2, 2, 2])
    second = score(points((5, 5)), [1], points((5, 5), (40, 40)), [1, 1])
    got = summarise([first, second], NAMES, ["lung", "colon"])
    assert got["images"] == 2 and got["images_without_truth"] == []
    assert got["classification"]["confusion"] == [[0, 1, 1, 0], [0, 2, 1, 0], [1, 0, 1, 0], [0] * 4]
    assert [got["detection"][k] for k in ("precision", "recall", "f1")] == pytest.approx(
        [4 / 6, 4 / 5, 8 / 11])
    f1 = [4 / (4 + 2 + 1), 2 / (2 + 2 + 2), np.nan]
    assert list(got["classification"]["f1"].values()) == pytest.approx(f1, nan_ok=True)
    assert got["classification"]["mean"] == pytest.approx(np.mean(f1[:2]))
    # every match has IoU 1, so PQ = DQ: 3 of (4 | 4) and 1 of (1 | 2); by class 1|2, 1|2 and 1|1.5
    mean = got["image_mean"]
    assert (mean["dq"], mean["sq"], mean["pq"]) == pytest.approx((17 / 24, 1, 17 / 24))
    assert (mean["dice"], mean["aji"]) == pytest.approx(((3 / 4 + 2 / 3) / 2, (3 / 5 + 1 / 2) / 2))
    assert mean["aji_plus"] == mean["aji"]
    pooled = got["pooled"]
    assert (pooled["dq"], pooled["sq"], pooled["pq"]) == pytest.approx((8 / 11, 1, 8 / 11))
    assert np.isnan(list(pooled["classes"]["c"].values())).all()
    assert pooled["classes"]["a"] == pytest.approx({"dq": 4 / 6, "sq": 1, "pq": 4 / 6})
    assert pooled["classes"]["b"]["pq"] == pytest.approx(2 / 5)
    assert pooled["mpq_plus"] == pytest.approx((4 / 6 + 2 / 5) / 2)
    tissues = got["pannuke"]["tissues"]
    assert tissues["lung"] == pytest.approx({"bpq": 3 / 4, "mpq": (2 / 3 + 2 / 5) / 2})
    assert tissues["colon"] == pytest.approx({"bpq": 2 / 3, "mpq": 2 / 3})
    assert got["pannuke"]["mpq"] == pytest.approx((8 / 15 + 2 / 3) / 2)
    class_pq = {"a": 2 / 3, "b": 2 / 5, "c": np.nan}
    assert got["pannuke"]["class_pq"] == pytest.approx(class_pq, nan_ok=True)
    assert "up to 12 px" in got["detection"]["protocol"]
    assert all("protocol" in section for section in got.values() if isinstance(section, dict))


def test_tissues_weigh_alike_and_images_alike_within_one():
    good, bad = (score(points((0, 0)), [1], points((0, x)), [1]) for x in (0, 9))
    got = summarise([good, good, good, bad], NAMES, ["x", "x", "x", "y"])
    assert got["pannuke"]["bpq"] == got["pannuke"]["mpq"] == 0.5
    got = summarise([good, good, good, bad], NAMES)["pannuke"]
    assert got["bpq"] == 0.75 and list(got["tissues"]) == ["all"]


def test_empty_truth_and_empty_prediction():
    empty, one = points(), points((3, 3))
    nothing, spurious, missed = (score(empty, [], empty, []), score(empty, [], one, [2]),
                                 score(one, [2], empty, []))
    for counts, value in ((nothing, np.nan), (spurious, 0), (missed, 0)):
        got = [counts[key] for key in ("dice", "aji", "aji_plus")]
        assert got == pytest.approx([value] * 3, nan_ok=True)
    assert spurious["panoptic"] == [0, 1, 0, 0] and missed["panoptic"] == [0, 0, 1, 0]
    assert panoptic_quality([0, 0, 1, 0]).tolist() == pytest.approx([0, np.nan, 0], nan_ok=True)
    perfect = score(one, [2], one, [2])
    got = summarise([nothing, perfect, spurious], NAMES, ["x", "x", "empty"])
    assert got["images_without_truth"] == [0, 2]
    assert got["pannuke"]["bpq"] == got["pannuke"]["mpq"] == got["image_mean"]["pq"] == 1
    assert got["image_mean"]["dice"] == 0.5 and got["pooled"]["pq"] == pytest.approx(2 / 3)
    assert np.isnan(got["pannuke"]["tissues"]["empty"]["bpq"])
    got = summarise([missed], NAMES)
    assert got["detection"]["recall"] == got["detection"]["f1"] == got["pannuke"]["bpq"] == 0
    assert np.isnan([got["detection"]["precision"], got["image_mean"]["sq"]]).all()
    got = summarise([spurious], NAMES)
    assert got["classification"]["f1"]["b"] == 0 and np.isnan(got["classification"]["f1"]["a"])
    assert got["detection"]["precision"] == 0 and np.isnan(got["detection"]["recall"])


def test_truth_as_prediction_is_perfect_and_absent_classes_are_undefined():
    true_map, classes = discs(1, 20, 48)
    got = summarise([score(true_map, classes, true_map.copy(), classes)], NAMES)
    for absent in ([got["classification"]["f1"].pop("c"), got["pannuke"]["class_pq"].pop("c")],
                   list(got["pooled"]["classes"].pop("c").values())):
        assert np.isnan(absent).all()
    for key in ("classification", "detection", "image_mean", "pannuke", "pooled"):
        del got[key]["protocol"]
        values = re.findall(r"\d+\.\d+|nan", str(got[key]))  # at any depth; counts have no dot
        assert set(values) == {"1.0"}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, np.float64])
def test_relabelling_changes_nothing(dtype):
    (true_map, classes), (pred_map, pred_classes) = discs(2, 20, 48), discs(3, 20, 48)
    ids, far = np.unique(true_map), 2 ** 40 if np.dtype(dtype).itemsize == 8 else 0
    new = np.append(0, np.random.default_rng(0).permutation(200)[1:len(ids)] + 1 + far)
    relabelled = new[np.searchsorted(ids, true_map)].astype(dtype)
    before = score(true_map, classes, pred_map, pred_classes)
    after = score(relabelled, classes[np.argsort(new[1:])], pred_map, pred_classes)
    for key in before:
        np.testing.assert_allclose(after[key], before[key], rtol=1e-12)


def test_bootstrap_interval():
    good, bad = (score(points((0, 0)), [1], points((0, x)), [1]) for x in (0, 30))
    images = [good] * 6 + [bad] * 4

    def f1(drawn):
        return summarise(drawn, NAMES)["detection"]["f1"]

    low, high = bootstrap_interval(images, f1, repeats=200)
    assert 0.2 <= low <= 0.4 and 0.8 <= high <= 0.9  # binomial: 0.3 and 0.9
    assert len({bootstrap_interval(range(50), np.mean, repeats=20) for _ in range(3)}) == 1
    inner = bootstrap_interval(images, f1, repeats=200, confidence=0.5, seed=1)
    assert low < inner[0] < 0.6 < inner[1] < high
    assert bootstrap_interval([0, 0, np.nan], np.mean, repeats=50) == (0, 0)
    assert np.isnan(bootstrap_interval([np.nan] * 3, np.mean, repeats=5)).all()
    for few in ([], [1.0], [1.0, 2.0]):
        assert np.isnan(bootstrap_interval(few, np.mean, repeats=5)).all()


@pytest.mark.parametrize("true_map, classes, words", [
    (np.full((60, 64), 0.5), [1], "true label map .float64. must hold whole numbers"),
    (np.full((60, 64), np.inf), [1], "must hold whole numbers"),
    (np.ones((60, 64), bool), [1], "true label map .bool. must hold whole"),
    (np.full((60, 64), -1), [1], "true label map holds -1; write 0 for background"),
    (np.ones((60, 63), int), [1], r"\(60, 63\) \(true\) and \(60, 64\) \(predicted\)"),
    (np.ones((60, 64, 1), int), [1], "must be one .height, width."),
    (points((1, 1)), [1, 2], r"true classes have shape \(2,\) for 1 ids"),
    (points((1, 1)), [0], r"true classes span 0..0; .* in 1..3"),
    (points((1, 1)), [4], r"true classes span 4..4"),
    (points((1, 1)), [1.5], "true classes .float64. must hold whole"),
])
def test_bad_input_is_named(true_map, classes, words):
    with pytest.raises(ValueError, match=words):
        score(true_map, classes, points((0, 0)), [1])
    if true_map.shape == (60, 64):
        with pytest.raises(ValueError, match=words.replace("true", "predicted")):
            score(points((0, 0)), [1], true_map, classes)


def test_bad_collections_are_named():
    image = score(points((0, 0)), None, points((0, 0)), None)
    with pytest.raises(ValueError, match="0 images and 0 tissues; pass an image or more"):
        summarise([], NAMES)
    with pytest.raises(ValueError, match="1 images and 2 tissues"):
        summarise([image], NAMES, ["x", "y"])
    with pytest.raises(ValueError, match=r"\[\(12.0, 3\)\] for 2 class names"):
        summarise([image], NAMES[:2])
    with pytest.raises(ValueError, match=r"\[\(6.0, 3\), \(12.0, 3\)\] for 3 class names"):
        summarise([image, {**image, "radius": 6.0}], NAMES)


def test_docstrings_and_the_file_alone(tmp_path):
    assert doctest.testmod(metrics) == (0, 6)
    shutil.copy(metrics.__file__, tmp_path)
    code = "import metrics; print(metrics.dice(metrics.compare([[1, 1, 0]], [[0, 7, 7]])))"
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path,
                         capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("0.5\n", "")
