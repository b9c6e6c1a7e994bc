"""Scores of nucleus segmentation and classification, each under the protocol it is published with.

    images = [score_image(true_map, true_classes, pred_map, pred_classes, num_classes=4), ...]
    print(summarise(images, class_names)["detection"]["f1"])

Source: HoVer-Net (Graham 2019: F1, AJI+), AJI (Kumar 2017), panoptic quality (Kirillov 2019),
PanNuke (Gamper 2020), mPQ+ (Graham 2021). Copied alone, it needs numpy and scipy.
An undefined figure is nan, never 0 or 1, and a mean is taken over the defined ones.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


# --- two label maps, reduced to what every metric needs ------------------------------------------


class Pair(NamedTuple):
    """N true and M predicted nuclei in ascending order of id, and their P overlaps."""

    true_area: np.ndarray  # (N,) pixels
    pred_area: np.ndarray  # (M,)
    true_centroids: np.ndarray  # (N, 2) y, x: means of pixel indices
    pred_centroids: np.ndarray  # (M, 2)
    true: np.ndarray  # (P,) index of the true nucleus of each overlap
    pred: np.ndarray  # (P,) index of the predicted one
    inter: np.ndarray  # (P,) pixels in common, at least 1
    iou: np.ndarray  # (P,) in (0, 1]


def compare(true_map, pred_map):
    """Overlay two (H, W) label maps; 0 is background, and ids may have gaps and any size.

    Raises: ValueError where the maps differ in shape, or an id is negative or not whole.
    """
    true_map, pred_map = _whole(true_map, "true label map"), _whole(pred_map, "predicted label map")
    if true_map.ndim != 2 or true_map.shape != pred_map.shape:
        raise ValueError(f"label maps are {true_map.shape} (true) and {pred_map.shape} (predicted);"
                         " both must be one (height, width): crop or resize one to the other")
    true_index, true_area, true_centroids = _nuclei(true_map)
    pred_index, pred_area, pred_centroids = _nuclei(pred_map)
    shared = (true_index >= 0) & (pred_index >= 0)
    codes = true_index[shared] * len(pred_area) + pred_index[shared]
    codes, inter = np.unique(codes, return_counts=True)  # not bincount: N x M bins may not fit
    true, pred = np.divmod(codes, len(pred_area))
    iou = inter / (true_area[true] + pred_area[pred] - inter)
    return Pair(true_area, pred_area, true_centroids, pred_centroids, true, pred, inter, iou)


def _nuclei(label_map):
    """Index of each pixel's nucleus (H * W,), -1 in the background; areas; centroids."""
    pixels = np.flatnonzero(label_map)
    ids, nucleus = np.unique(label_map.ravel()[pixels], return_inverse=True)
    area = np.bincount(nucleus, minlength=len(ids))
    yx = np.divmod(pixels, label_map.shape[1])
    centroids = np.stack([np.bincount(nucleus, v, len(ids)) / area for v in yx], axis=1)
    index = np.full(label_map.size, -1, np.int64)
    index[pixels] = nucleus
    return index, area, centroids


def _whole(values, name):
    values = np.asarray(values)
    kind = values.dtype.kind  # a bool mask is refused: its nuclei are not told apart
    if not (kind in "iu" or kind == "f" and np.isfinite(values).all() and (values % 1 == 0).all()):
        raise ValueError(f"{name} ({values.dtype}) must hold whole numbers: pass integers")
    if values.size and values.min() < 0:
        raise ValueError(f"{name} holds {values.min()}; write 0 for background, ids from 1")
    return values


def _classes(classes, count, num_classes, name):
    classes = np.ones(count, int) if classes is None else _whole(classes, f"{name} classes")
    if classes.shape != (count,):
        raise ValueError(f"{name} classes have shape {classes.shape} for {count} ids in the label "
                         "map; pass one class for each id present, in ascending order of id")
    if count and not 1 <= classes.min() <= classes.max() <= num_classes:
        raise ValueError(f"{name} classes span {classes.min()}..{classes.max()}; a nucleus must "
                         f"have a class in 1..{num_classes} (0 is background)")
    return classes.astype(np.int64)


def _ratio(part, whole):
    part, whole = np.asarray(part, float), np.asarray(whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def _mean(values, axis=None):
    """Mean over the defined entries; nan where there is none."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis), defined.sum(axis))


# --- one image -----------------------------------------------------------------------------------


def dice(pair):
    """2·|A ∩ B| / (|A| + |B|) of the two foregrounds; nan if both are empty, 0 if one is.

    >>> dice(compare([[1, 1, 0]], [[0, 7, 7]]))
    0.5
    """
    return float(_ratio(2 * pair.inter.sum(), pair.true_area.sum() + pair.pred_area.sum()))


def aji(pair, one_to_one=False):
    """Aggregated Jaccard index (Kumar 2017), Σ intersections / Σ unions; AJI+ if one_to_one.

    AJI: each true nucleus takes the prediction of highest IoU (a tie: the lower id), which others
    may take too. AJI+: pairs are one-to-one and have the largest sum of IoU. The areas of nuclei
    left without a partner add to the unions. nan if both maps are empty, 0 if one is.

    >>> pair = compare([[1, 1, 2, 2, 0, 0]], [[1, 1, 1, 0, 0, 3]])
    >>> aji(pair), round(aji(pair, one_to_one=True), 3)  # (2 + 1) / (3 + 4 + 1), 2 / (3 + 2 + 1)
    (0.375, 0.333)
    """
    if one_to_one:
        overlap = np.full((len(pair.true_area), len(pair.pred_area)), -1)  # which of the P
        overlap[pair.true, pair.pred] = np.arange(len(pair.iou))
        iou = np.append(pair.iou, 0.0)[overlap]  # (N, M), -1 reads the 0
        chosen = overlap[linear_sum_assignment(iou, maximize=True)]
        chosen = chosen[chosen >= 0]
    else:
        order = np.lexsort((pair.pred, -pair.iou, pair.true))
        chosen = order[np.unique(pair.true[order], return_index=True)[1]]
    pred, inter = pair.pred[chosen], pair.inter[chosen].sum()
    unions = pair.true_area.sum() + pair.pred_area[pred].sum() - inter  # with the true ones missed
    spurious = pair.pred_area.sum() - pair.pred_area[np.unique(pred)].sum()
    return float(_ratio(inter, unions + spurious))


def panoptic(pair, true_classes, pred_classes, num_classes):
    """Counts (K, 4): TP, FP, FN, ΣIoU of the true nuclei of each class against the predicted.

    A pair matches at IoU > 0.5, strictly, so it is unique. Classes are 1..K, in order of id.
    """
    match = (pair.iou > 0.5) & (true_classes[pair.true] == pred_classes[pair.pred])
    matched = true_classes[pair.true[match]]
    true, pred, tp = (np.bincount(c, minlength=num_classes + 1)[1:]
                      for c in (true_classes, pred_classes, matched))
    iou = np.bincount(matched, pair.iou[match], num_classes + 1)[1:]
    return np.stack([tp, pred - tp, true - tp, iou], axis=1)


def panoptic_quality(counts):
    """DQ, SQ, PQ (3, ...) of counts (..., 4): TP / (TP + ½FP + ½FN), ΣIoU / TP, their product.

    Without a nucleus on either side all are nan; with no match DQ and PQ are 0 and SQ is nan.

    >>> panoptic_quality([2, 1, 3, 1.5]).tolist()
    [0.5, 0.75, 0.375]
    """
    tp, fp, fn, iou = np.moveaxis(np.asarray(counts, float), -1, 0)
    weight = tp + fp / 2 + fn / 2
    return np.stack([_ratio(tp, weight), _ratio(iou, tp), _ratio(iou, weight)])


def confusion_matrix(pair, true_classes, pred_classes, num_classes, radius):
    """Nuclei (K + 1, K + 1) by true (row) and predicted class; row, column 0 are the unmatched.

    Matched as in HoVer-Net: Hungarian assignment, of the least total distance between all
    centroids; then pairs more than `radius` px apart are dropped. Dense, 5,000 nuclei take 1 s.
    """
    distance = cdist(pair.true_centroids, pair.pred_centroids)
    true, pred = linear_sum_assignment(distance)
    near = distance[true, pred] <= radius
    true, pred = true[near], pred[near]
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.add.at(confusion, (true_classes[true], pred_classes[pred]), 1)
    np.add.at(confusion[:, 0], np.delete(true_classes, true), 1)
    np.add.at(confusion[0], np.delete(pred_classes, pred), 1)
    return confusion


def detection_scores(confusion):
    """Precision, recall, F1 of all nuclei, whatever their class; nan where it would divide by 0.

    >>> detection_scores([[0, 1, 1], [3, 4, 0], [1, 0, 2]]).round(3).tolist()  # TP 6, FP 2, FN 4
    [0.75, 0.6, 0.667]
    """
    confusion = np.asarray(confusion)
    tp, fp, fn = confusion[1:, 1:].sum(), confusion[0].sum(), confusion[:, 0].sum()
    return _ratio([tp, tp, 2 * tp], [tp + fp, tp + fn, 2 * tp + fp + fn])


def classification_f1(confusion):
    """F1 (K,) of each class: 2·TP / (2·(TP + FP + FN) + unmatched predicted + unmatched true).

    TP, FP, FN are among matched nuclei: a wrong class weighs twice a miss, as in HoVer-Net. nan
    for a class that neither side has, 0 for one that was only predicted.

    >>> classification_f1([[0, 3, 0], [1, 6, 2], [0, 1, 0]]).round(2).tolist()  # 12 / (18 + 3 + 1)
    [0.55, 0.0]
    """
    confusion = np.asarray(confusion)
    matched, tp = confusion[1:, 1:], np.diagonal(confusion)[1:]
    either = matched.sum(0) + matched.sum(1) - tp  # TP + FP + FN
    return _ratio(2 * tp, 2 * either + confusion[0, 1:] + confusion[1:, 0])


def score_image(true_map, true_classes, pred_map, pred_classes, *, num_classes, radius=12.0):
    """What `summarise` needs of one image, as a dict of plain numbers; maps as in `compare`.

    Classes are 1..num_classes, one for each id present, in ascending order of id (so by id - 1
    where ids have no gap); None puts all nuclei in class 1. `radius`: 12 px at 40x, 6 px at 20x.
    """
    pair = compare(true_map, pred_map)
    classes = (_classes(true_classes, len(pair.true_area), num_classes, "true"),
               _classes(pred_classes, len(pair.pred_area), num_classes, "predicted"))
    return {
        "radius": float(radius),
        "dice": dice(pair), "aji": aji(pair), "aji_plus": aji(pair, one_to_one=True),
        "panoptic": panoptic(pair, *(np.minimum(c, 1) for c in classes), 1)[0].tolist(),
        "panoptic_classes": panoptic(pair, *classes, num_classes).tolist(),
        "confusion": confusion_matrix(pair, *classes, num_classes, radius).tolist(),
    }


# --- many images ---------------------------------------------------------------------------------


def summarise(images, class_names, tissues=None):
    """The figures of a data set from its `score_image` dicts, each beside its protocol.

    `tissues` has one name an image; without it all are one tissue. Means of PQ over images leave
    out an image whose truth is empty, or lacks the class: its false positives go unpunished there.
    """
    tissues = np.array(["all"] * len(images) if tissues is None else tissues, str)
    if not images or len(tissues) != len(images):
        raise ValueError(f"{len(images)} images and {len(tissues)} tissues; pass an image or more, "
                         "and one tissue for each")
    setups = {(image["radius"], len(image["confusion"]) - 1) for image in images}
    if len(setups) > 1 or min(setups)[1] != len(class_names):
        raise ValueError(f"images were scored with (radius, classes) {sorted(setups)} for "
                         f"{len(class_names)} class names; score all alike, one name a class")

    def named(names, values):
        return dict(zip(names, np.asarray(values).tolist()))

    quality = ("dq", "sq", "pq")
    table = {key: np.array([image[key] for image in images]) for key in images[0]}
    binary, classes = table["panoptic"], table["panoptic_classes"]  # (images, 4), (images, K, 4)
    empty, absent = (c[..., 0] + c[..., 2] == 0 for c in (binary, classes))
    image_quality = np.where(empty, np.nan, panoptic_quality(binary))  # (3, images)
    class_pq = np.where(absent, np.nan, panoptic_quality(classes)[2])  # (images, K)
    image_pq = np.stack([image_quality[2], _mean(class_pq, axis=1)])  # (2, images): bPQ, mPQ
    tissue_pq = {str(t): _mean(image_pq[:, tissues == t], axis=1) for t in np.unique(tissues)}
    class_pooled = panoptic_quality(classes.sum(0)).T  # (K, 3)
    confusion = table["confusion"].sum(0)
    class_f1 = classification_f1(confusion)
    return {
        "images": len(images),
        "images_without_truth": np.flatnonzero(empty).tolist(),  # positions in `images`
        "detection": {
            "protocol": f"HoVer-Net: Hungarian on centroids, up to {min(setups)[0]:g} px; pooled",
            **named(("precision", "recall", "f1"), detection_scores(confusion)),
        },
        "classification": {
            "protocol": "HoVer-Net: F1 of each class over the detection's pairs; pooled",
            "f1": named(class_names, class_f1),
            "mean": float(_mean(class_f1)),
            "confusion": confusion.tolist(),
        },
        "image_mean": {
            "protocol": "all nuclei one class, PQ at IoU > 0.5; per image, then the mean",
            **{key: float(_mean(table[key])) for key in ("dice", "aji", "aji_plus")},
            **named(quality, _mean(image_quality, axis=1)),
        },
        "pooled": {
            "protocol": "TP, FP, FN, IoU summed over images; mPQ+ is the mean over classes",
            **named(quality, panoptic_quality(binary.sum(0))),
            "mpq_plus": float(_mean(class_pooled[:, 2])),
            "classes": {name: named(quality, q) for name, q in zip(class_names, class_pooled)},
        },
        "pannuke": {
            "protocol": "PanNuke: PQ per image, mean over images of a tissue, mean over tissues",
            **named(("bpq", "mpq"), _mean(np.stack(list(tissue_pq.values())), axis=0)),
            "class_pq": named(class_names, _mean(class_pq, axis=0)),  # over images, not tissues
            "tissues": {name: named(("bpq", "mpq"), q) for name, q in tissue_pq.items()},
        },
    }


def bootstrap_interval(images, figure, *, repeats=1000, confidence=0.95, seed=0):
    """Bounds (low, high) of `figure(images)`, a number, over images drawn with replacement.

    Draws in which the figure is undefined are left out; where all are, both bounds are nan.
    """
    draws = np.random.default_rng(seed).integers(len(images), size=(repeats, len(images)))
    values = np.array([figure([images[i] for i in draw]) for draw in draws], float)
    values = values[~np.isnan(values)] if not np.isnan(values).all() else [np.nan]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
