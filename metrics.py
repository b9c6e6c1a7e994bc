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
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

UNKNOWN_CLASS = 255  # of a true nucleus; it counts in all scores except those of classes


# --- two label maps, reduced to what every metric needs ------------------------------------------


class Pair(NamedTuple):
    """N true and M predicted nuclei in ascending order of id, and their P overlaps."""

    true_area: np.ndarray  # (N,) pixels
    pred_area: np.ndarray  # (M,)
    true_centroids: np.ndarray  # (N, 2) y, x: means of pixel indices
    pred_centroids: np.ndarray  # (M, 2)
    true: np.ndarray  # (P,) index of the true nucleus of each overlap, ascending
    pred: np.ndarray  # (P,) index of the predicted one
    inter: np.ndarray  # (P,) pixels in common, at least 1
    iou: np.ndarray  # (P,) in (0, 1]


def compare(true_map, pred_map):
    """Overlay two (H, W) label maps; 0 is background, and ids may have gaps and any size.

    Raises: ValueError where the maps differ in shape, or an id is negative or not whole.
    """
    true_map = _whole(true_map, "true label map")
    pred_map = _whole(pred_map, "predicted label map")
    if true_map.ndim != 2 or true_map.shape != pred_map.shape:
        raise ValueError(f"label maps are {true_map.shape} (true) and {pred_map.shape} (predicted);"
                         " both must be one (height, width): crop or resize one to the other")

    # 1. The nuclei of each map.
    true_index, true_area, true_centroids = _nuclei(true_map)
    pred_index, pred_area, pred_centroids = _nuclei(pred_map)

    # 2. Their overlaps. (A table of all N x M pairs may not fit in memory.)
    shared = (true_index >= 0) & (pred_index >= 0)
    codes = true_index[shared] * len(pred_area) + pred_index[shared]
    codes, inter = np.unique(codes, return_counts=True)
    true, pred = np.divmod(codes, len(pred_area))
    union = true_area[true] + pred_area[pred] - inter
    return Pair(true_area, pred_area, true_centroids, pred_centroids,
                true, pred, inter, inter / union)


def _nuclei(label_map):
    """Index of each pixel's nucleus (H * W,), -1 in the background; areas; centroids."""
    pixels = np.flatnonzero(label_map)
    ids = label_map.ravel()[pixels]
    _, nucleus = np.unique(ids, return_inverse=True)
    area = np.bincount(nucleus)
    y, x = np.divmod(pixels, label_map.shape[1])
    sums = np.bincount(nucleus, y), np.bincount(nucleus, x)
    centroids = np.stack(sums, axis=1) / area[:, None]
    index = np.full(label_map.size, -1, np.int64)
    index[pixels] = nucleus
    return index, area, centroids


def _whole(values, name):
    """An array of whole numbers from 0; a bool mask is refused, because it has no ids."""
    values = np.asarray(values)
    whole = values.dtype.kind in "iu"
    if values.dtype.kind == "f":
        whole = np.isfinite(values).all() and (values == np.floor(values)).all()
    if not whole:
        raise ValueError(f"{name} ({values.dtype}) must hold whole numbers: pass integers")
    if values.min(initial=0) < 0:
        raise ValueError(f"{name} holds {values.min()}; write 0 for background, ids from 1")
    return values


def _classes(classes, count, num_classes, name):
    """(count,) int64 classes, all 1 if None. Raises: ValueError if they do not fit."""
    if classes is None:
        return np.ones(count, np.int64)
    classes = _whole(classes, f"{name} classes").astype(np.int64)
    if classes.shape != (count,):
        raise ValueError(f"{name} classes have shape {classes.shape} for {count} ids in the label "
                         "map; pass one class for each id present, in ascending order of id")
    known = classes[classes != UNKNOWN_CLASS] if name == "true" else classes
    if len(known) and not 1 <= known.min() <= known.max() <= num_classes:
        raise ValueError(f"{name} classes span {known.min()}..{known.max()}; a nucleus must have "
                         f"a class in 1..{num_classes} (0 is background), or {UNKNOWN_CLASS} if "
                         "the truth does not know it")
    return classes


def _ratio(part, whole):
    """part / whole, nan where whole is 0."""
    part, whole = np.asarray(part, float), np.asarray(whole)
    undefined = np.full(part.shape, np.nan)
    return np.divide(part, whole, out=undefined, where=whole != 0)


def _mean(values, axis=None):
    """Mean over the defined entries; nan where there is none."""
    defined = ~np.isnan(values)
    total = np.where(defined, values, 0).sum(axis)
    return _ratio(total, defined.sum(axis))


def _cheapest_pairs(true, pred, cost, alone, counts):
    """One-to-one pairs of least total cost; a true nucleus without partner costs `alone`.

    true, pred, cost: (C,) each, the candidates; counts: N, M. Returns the chosen true and pred.
    """
    # Each true nucleus can also take a column of its own, which stands for no partner.
    rows = np.append(true, np.arange(counts[0]))
    columns = np.append(pred, counts[1] + np.arange(counts[0]))
    cost = np.append(cost, np.full(counts[0], alone)) + 1  # 0 would mean no candidate
    shape = counts[0], counts[0] + counts[1]
    graph = csr_matrix((cost, (rows, columns)), shape)
    true, pred = min_weight_full_bipartite_matching(graph)
    paired = pred < counts[1]
    return true[paired], pred[paired]


# --- one image -----------------------------------------------------------------------------------


def dice(pair):
    """2·|A ∩ B| / (|A| + |B|) of the two foregrounds; nan if both are empty, 0 if one is.

    >>> dice(compare([[1, 1, 0]], [[0, 7, 7]]))
    0.5
    """
    return float(_ratio(2 * pair.inter.sum(), pair.true_area.sum() + pair.pred_area.sum()))


def aji(pair, one_to_one=False):
    """Aggregated Jaccard index (Kumar 2017), Σ intersections / Σ unions; AJI+ if one_to_one.

    AJI: each true nucleus takes the prediction of highest IoU (if equal, the lower id). Others may
    take the same one. AJI+: pairs are one-to-one, with the largest sum of IoU. The areas of nuclei
    without a partner add to the unions. nan if both maps are empty, 0 if one is.

    >>> pair = compare([[1, 1, 2, 2, 0, 0]], [[1, 1, 1, 0, 0, 3]])
    >>> aji(pair), round(aji(pair, one_to_one=True), 3)  # (2 + 1) / (3 + 4 + 1), 2 / (3 + 2 + 1)
    (0.375, 0.333)
    """
    # 1. Choose overlaps.
    counts = len(pair.true_area), len(pair.pred_area)
    if one_to_one:
        true, pred = _cheapest_pairs(pair.true, pair.pred, 1 - pair.iou, 1, counts)
        codes = pair.true * counts[1] + pair.pred  # ascending
        chosen = np.searchsorted(codes, true * counts[1] + pred)
    else:
        order = np.lexsort((pair.pred, -pair.iou, pair.true))
        _, first = np.unique(pair.true[order], return_index=True)
        chosen = order[first]

    # 2. Sum over them, over missed nuclei and over spurious ones.
    pred, inter = pair.pred[chosen], pair.inter[chosen].sum()
    unions = pair.true_area.sum() + pair.pred_area[pred].sum() - inter  # with the true ones missed
    spurious = pair.pred_area.sum() - pair.pred_area[np.unique(pred)].sum()
    return float(_ratio(inter, unions + spurious))


def panoptic(pair, true_classes, pred_classes, num_classes):
    """Counts (K, 4): TP, FP, FN, ΣIoU of the true nuclei of each class against the predicted.

    A pair matches at IoU > 0.5, strictly, so it is unique. Classes are 1..K, in order of id. True
    nuclei of UNKNOWN_CLASS, and the predictions that match one, are left out.
    """
    # 1. Pair by overlap; a prediction on a nucleus of unknown class is neither right nor wrong.
    true_class = true_classes[pair.true]
    pred_class = pred_classes[pair.pred]
    match = pair.iou > 0.5
    same = match & (true_class == pred_class)
    ignored = match & (true_class == UNKNOWN_CLASS)
    judged = np.delete(pred_classes, pair.pred[ignored])

    # 2. Count by class; the slices drop the background and the unknown.
    size = num_classes + 1
    tp = np.bincount(pred_class[same], minlength=size)
    iou = np.bincount(pred_class[same], pair.iou[same], size)
    true = np.bincount(true_classes, minlength=size)[:size]
    pred = np.bincount(judged, minlength=size)
    return np.stack([tp, pred - tp, true - tp, iou], axis=1)[1:]


def panoptic_quality(counts):
    """DQ, SQ, PQ (3, ...) of counts (..., 4): TP / (TP + ½FP + ½FN), ΣIoU / TP, their product.

    Without a nucleus on either side all are nan; with no match DQ and PQ are 0 and SQ is nan.

    >>> panoptic_quality([2, 1, 3, 1.5]).tolist()
    [0.5, 0.75, 0.375]
    """
    tp, fp, fn, iou = np.moveaxis(np.asarray(counts, float), -1, 0)
    weight = tp + fp / 2 + fn / 2
    return np.stack([_ratio(tp, weight), _ratio(iou, tp), _ratio(iou, weight)])


def _published_pairs(pair, radius):
    """HoVer-Net's pairs of least total centroid distance; then pairs beyond `radius` are dropped.

    If one side has an extra nucleus, whole chains of right pairs may shift by one and be dropped.
    """
    distance = cdist(pair.true_centroids, pair.pred_centroids)
    true, pred = linear_sum_assignment(distance)
    near = distance[true, pred] <= radius
    return true[near], pred[near]


def _capped_pairs(pair, radius):
    """Pairs of least total distance, each capped at `radius`; pairs at the radius are dropped."""
    counts = len(pair.true_area), len(pair.pred_area)
    trees = KDTree(pair.true_centroids), KDTree(pair.pred_centroids)
    near = trees[0].sparse_distance_matrix(trees[1], radius, output_type="ndarray")
    near = near[near["v"] < radius]
    return _cheapest_pairs(near["i"], near["j"], near["v"], radius, counts)


def confusion_matrix(pair, true_classes, pred_classes, num_classes, radius, *, capped=False):
    """Nuclei (K + 2, K + 1) by true (row) and predicted class; row and column 0: the unmatched.

    The last row holds the true nuclei of UNKNOWN_CLASS. Nuclei are paired by centroids as in
    HoVer-Net. If capped, an extra nucleus cannot shift the pairs of others.
    """
    if capped:
        true, pred = _capped_pairs(pair, radius)
    else:
        true, pred = _published_pairs(pair, radius)
    row = np.where(true_classes == UNKNOWN_CLASS, num_classes + 1, true_classes)
    confusion = np.zeros((num_classes + 2, num_classes + 1), np.int64)
    np.add.at(confusion, (row[true], pred_classes[pred]), 1)
    np.add.at(confusion[:, 0], np.delete(row, true), 1)
    np.add.at(confusion[0], np.delete(pred_classes, pred), 1)
    return confusion


def detection_scores(confusion):
    """Precision, recall, F1 of all nuclei, whatever their class; nan for a division by 0.

    >>> detection_scores([[0, 1, 1], [3, 4, 0], [1, 0, 2]]).round(3).tolist()  # TP 6, FP 2, FN 4
    [0.75, 0.6, 0.667]
    """
    confusion = np.asarray(confusion)
    tp = confusion[1:, 1:].sum()
    pred = tp + confusion[0].sum()
    true = tp + confusion[:, 0].sum()
    return _ratio([tp, tp, 2 * tp], [pred, true, pred + true])


def classification_f1(confusion):
    """F1 (K,) of each class: 2·TP / (2·(TP + FP + FN) + unmatched predicted + unmatched true).

    TP, FP, FN are among matched nuclei: a wrong class weighs twice a miss, as in HoVer-Net. nan
    for a class that neither side has, 0 for one that was only predicted. A row of nuclei of
    unknown class, after those of the classes, is left out.

    >>> classification_f1([[0, 3, 0], [1, 6, 2], [0, 1, 0]]).round(2).tolist()  # 12 / (18 + 3 + 1)
    [0.55, 0.0]
    """
    confusion = np.asarray(confusion)
    confusion = confusion[:confusion.shape[1]]  # square
    tp = np.diagonal(confusion)[1:]
    matched = confusion[1:, 1:]
    either = matched.sum(axis=0) + matched.sum(axis=1) - tp  # TP + FP + FN
    unmatched = confusion[0, 1:] + confusion[1:, 0]
    return _ratio(2 * tp, 2 * either + unmatched)


def score_image(true_map, true_classes, pred_map, pred_classes, *, num_classes, radius=12.0):
    """The numbers of one image that `summarise` needs, as a dict; maps as in `compare`.

    Classes are 1..num_classes, one for each id present, in ascending order of id (so by id - 1
    where ids have no gap); None puts all nuclei in class 1. A true class may be UNKNOWN_CLASS.
    `radius`: 12 px at 40x, 6 px at 20x.
    """
    pair = compare(true_map, pred_map)
    true = _classes(true_classes, len(pair.true_area), num_classes, "true")
    pred = _classes(pred_classes, len(pair.pred_area), num_classes, "predicted")
    confusion = confusion_matrix(pair, true, pred, num_classes, radius)
    capped = confusion_matrix(pair, true, pred, num_classes, radius, capped=True)
    binary = panoptic(pair, np.ones_like(true), np.ones_like(pred), 1)
    return {
        "radius": float(radius),
        "areas": [int(pair.true_area.sum()), int(pair.pred_area.sum())],
        "dice": dice(pair),
        "aji": aji(pair),
        "aji_plus": aji(pair, one_to_one=True),
        "panoptic": binary[0].tolist(),
        "panoptic_classes": panoptic(pair, true, pred, num_classes).tolist(),
        "confusion": confusion.tolist(),
        "confusion_capped": capped.tolist(),
    }


# --- many images ---------------------------------------------------------------------------------


def _named(names, values):
    return dict(zip(names, np.asarray(values).tolist()))


def _detection(confusion, matching):
    scores = _named(("precision", "recall", "f1"), detection_scores(confusion))
    return {"protocol": f"{matching}; pooled", **scores}


def _classification(confusion, matching, class_names):
    f1 = classification_f1(confusion)
    return {
        "protocol": f"{matching}; F1 of each class as in HoVer-Net, unknown left out; pooled",
        "f1": _named(class_names, f1),
        "mean": float(_mean(f1)),
        "confusion": confusion[:-1].tolist(),  # without the row of the unknown
    }


def _pannuke(image_quality, class_counts, class_names, tissues):
    """Means over the images of each tissue, then over tissues."""
    # 1. bPQ and mPQ of each image.
    absent = class_counts[..., 0] + class_counts[..., 2] == 0
    class_pq = np.where(absent, np.nan, panoptic_quality(class_counts)[2])  # (images, K)
    image_pq = np.stack([image_quality[2], _mean(class_pq, axis=1)])  # (2, images)

    # 2. Of each tissue.
    tissue_pq = {}
    for tissue in np.unique(tissues):
        tissue_pq[str(tissue)] = _mean(image_pq[:, tissues == tissue], axis=1)
    mean = _mean(np.stack(list(tissue_pq.values())), axis=0)
    return {
        "protocol": "PanNuke: PQ per image, mean over images of a tissue, mean over tissues",
        **_named(("bpq", "mpq"), mean),
        "class_pq": _named(class_names, _mean(class_pq, axis=0)),  # over images, not tissues
        "tissues": {name: _named(("bpq", "mpq"), pq) for name, pq in tissue_pq.items()},
    }


def summarise(images, class_names, tissues=None):
    """The figures of a data set from its `score_image` dicts, each beside its protocol.

    `tissues` has one name an image; without it all are one tissue. Means of PQ over images leave
    out an image whose truth is empty or lacks the class, so its false positives cost nothing.
    """
    # 1. Check that the images belong together.
    tissues = np.array(["all"] * len(images) if tissues is None else tissues, str)
    if not images or len(tissues) != len(images):
        raise ValueError(f"{len(images)} images and {len(tissues)} tissues; pass an image or more, "
                         "and one tissue for each")
    setups = {(image["radius"], len(image["panoptic_classes"])) for image in images}
    radius, num_classes = min(setups)
    if len(setups) > 1 or num_classes != len(class_names):
        raise ValueError(f"images were scored with (radius, classes) {sorted(setups)} for "
                         f"{len(class_names)} class names; score all alike, one name a class")

    # 2. Pool, or take the quality of each image.
    table = {key: np.array([image[key] for image in images]) for key in images[0]}
    true_area, pred_area = table["areas"].sum(axis=0)
    confusion = table["confusion"].sum(axis=0)
    capped = table["confusion_capped"].sum(axis=0)
    binary, classes = table["panoptic"], table["panoptic_classes"]  # (images, 4), (images, K, 4)
    empty = binary[:, 0] + binary[:, 2] == 0
    image_quality = np.where(empty, np.nan, panoptic_quality(binary))  # (3, images)
    class_quality = panoptic_quality(classes.sum(axis=0)).T  # (K, 3)

    # 3. Name it all.
    quality = ("dq", "sq", "pq")
    published = f"HoVer-Net: Hungarian on centroids, up to {radius:g} px"
    ours = f"Hungarian on centroid distances capped at {radius:g} px"
    return {
        "images": len(images),
        "images_without_truth": np.flatnonzero(empty).tolist(),  # positions in `images`
        "area_ratio": float(_ratio(pred_area, true_area)),  # predicted over true pixels, pooled
        "detection": _detection(confusion, published),
        "detection_capped": _detection(capped, ours),
        "classification": _classification(confusion, published, class_names),
        "classification_capped": _classification(capped, ours, class_names),
        "image_mean": {
            "protocol": "all nuclei one class, PQ at IoU > 0.5; per image, then the mean",
            **{key: float(_mean(table[key])) for key in ("dice", "aji", "aji_plus")},
            **_named(quality, _mean(image_quality, axis=1)),
        },
        "pooled": {
            "protocol": "TP, FP, FN, IoU summed over images; mPQ+ is the mean over classes",
            **_named(quality, panoptic_quality(binary.sum(axis=0))),
            "mpq_plus": float(_mean(class_quality[:, 2])),
            "classes": {name: _named(quality, q) for name, q in zip(class_names, class_quality)},
        },
        "pannuke": _pannuke(image_quality, classes, class_names, tissues),
    }


def bootstrap_interval(images, figure, *, repeats=1000, confidence=0.95, seed=0):
    """Bounds (low, high) of `figure(images)`, a number, over images drawn with replacement.

    Draws in which the figure is undefined are left out. Both bounds are nan if all are, and for
    fewer than three images, because so few say nothing about others.
    """
    if len(images) < 3:
        return np.nan, np.nan
    random = np.random.default_rng(seed)
    values = np.full(repeats, np.nan)
    for repeat in range(repeats):
        draw = random.integers(len(images), size=len(images))
        values[repeat] = figure([images[i] for i in draw])
    if np.isnan(values).all():
        return np.nan, np.nan
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)
