"""Makes the density map that a network learns, and turns its two maps back into nuclei.

The watershed is a minimum spanning forest, grown by Boruvka's rounds: Cousty et al. 2009,
"Watershed cuts" (doi.org/10.1109/TPAMI.2008.173). Needs only numpy and scipy.

    target = density_map(centroids_of(inst_map), inst_map.shape)  # what the density head learns
    nuclei = reconstruct(class_probability, density)              # from the outputs of both heads
    nuclei.inst_map, nuclei.centroids, nuclei.classes             # arrays indexed by id - 1

Arrays and coordinates are (y, x). H, W: image size; N: nuclei; K: classes, 0 = background.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

CROSS = ndimage.generate_binary_structure(2, 1)  # a pixel and its 4 neighbours
SQUARE = ndimage.generate_binary_structure(2, 2)  # a pixel and its 8 neighbours
ROUNDING = 0.001  # ours: height per pixel of distance; makes borders between close nuclei round


class Nuclei(NamedTuple):
    """A label map and what was measured on it, one row a nucleus, indexed by id - 1."""

    inst_map: np.ndarray  # (H, W) int32, 0 = background, ids contiguous from 1
    peaks: np.ndarray  # (N, 2) int64, pixel where the density peaks
    centroids: np.ndarray  # (N, 2) float64, mean of pixel indices
    classes: np.ndarray  # (N,) int64, 1..K
    probabilities: np.ndarray  # (N,) float32, mean probability of that class; nan if unknown
    areas: np.ndarray  # (N,) int64, pixels
    boxes: np.ndarray  # (N, 4) int64, y0, x0, y1, x1, half-open


# -------------------------------------------------------------------- targets: nuclei to density


def centroids_of(inst_map):
    """(N, 2) float64 centroids: the mean pixel index of every id, in ascending order of the ids."""
    y, x = np.nonzero(inst_map)
    _, row = np.unique(inst_map[y, x], return_inverse=True)
    areas = np.bincount(row)
    sums = np.bincount(row, y), np.bincount(row, x)
    return np.stack(sums, axis=1) / areas[:, None]


def density_map(centroids, shape, *, sigma=5.0, combine="max"):
    """A Gaussian peak on each nucleus: (H, W) float32 in [0, 1]; zeros where there is none.

    centroids: (N, 2), may lie outside; shape: (H, W); sigma: pixels.
    combine: "max" gives every nucleus a peak of exactly 1, whatever its neighbours and the crop.
    "sum" is the published form: Gaussians are added up and divided by the maximum of the image.
    Then close nuclei merge into one peak, and isolated nuclei get low peaks.
    """
    _check_combine(combine)
    # 1. Mark the pixel of each centroid. A peak just outside the image still reaches into it.
    margin = math.ceil(4 * sigma) if combine == "max" else 0
    empty = np.ones(np.add(shape, 2 * margin), bool)
    pixels = np.reshape(centroids, (-1, 2)) + margin
    pixels = np.round(pixels).astype(int)
    inside = (pixels >= 0) & (pixels < empty.shape)
    y, x = pixels[inside.all(axis=1)].T
    empty[y, x] = False
    if empty.all():
        return np.zeros(shape, np.float32)

    # 2. Add up the Gaussians, or take the largest: that of the nearest centroid.
    if combine == "sum":
        density = ndimage.gaussian_filter(1.0 - empty, sigma, mode="constant")
        density /= density.max()
    else:
        distance = ndimage.distance_transform_edt(empty)
        distance = distance[margin:, margin:][:shape[0], :shape[1]]
        density = np.exp(-distance**2 / (2 * sigma**2))
    return density.astype(np.float32)


def _check_combine(combine):
    if combine not in ("max", "sum"):
        raise ValueError(f"combine is {combine!r}; expected 'max' or 'sum'")


# ---------------------------------------------------------------------------------------- peaks


def _checked(density):
    """The density as float32. Raises: ValueError if it is not one map of finite values."""
    density = np.asarray(density, np.float32)
    if density.ndim != 2 or not density.size:
        raise ValueError(f"density has shape {density.shape}; expected (H, W): pass one map")
    bad = density.size - np.isfinite(density).sum()
    if bad:
        raise ValueError(f"density has {bad} values that are not finite; check the weights")
    return density


def _spaced(values):
    """A copy of a map (H, W) with a row stride of no power of two, which is 3 times slower."""
    height, width = values.shape
    spare = (8 - width) % 64
    room = np.empty((height, width + spare), values.dtype)
    room[:, :width] = values
    return room[:, :width]


def find_peaks(density, *, min_distance=2, threshold=0.3):
    """Local maxima of the density above `threshold`: (N, 2), in scan order.

    density: (H, W) float. A peak is the highest pixel of the square of side 2 * min_distance + 1
    around it. Equal maxima within `min_distance` of each other, also those of a plateau, count as
    one peak: the first of their pixels.
    """
    density = _checked(density)
    if min_distance < 1:
        raise ValueError(f"min_distance is {min_distance}; expected at least 1 pixel")

    # 1. Candidates are the highest pixels of their window.
    highest = _spaced(density)
    ndimage.maximum_filter(highest, 2 * min_distance + 1, output=highest)
    candidates = (density == highest) & (density > threshold)
    peaks = np.argwhere(candidates)

    # 2. Draw a square of side min_distance at each candidate. Touching squares are one group.
    squares = np.zeros(np.add(density.shape, min_distance), bool)
    y, x = peaks.T
    for below, right in np.ndindex(min_distance, min_distance):
        squares[y + below, x + right] = True
    groups, _ = ndimage.label(squares, SQUARE)

    # 3. The first candidate of each group is the peak.
    _, first = np.unique(groups[y, x], return_index=True)
    return peaks[np.sort(first)]


# ------------------------------------------------------------------------------------ watershed


def _follow(pointers):
    """The end that each entry reaches when one follows the pointers; an end points to itself."""
    further = pointers[pointers]
    while np.any(further != pointers):
        pointers, further = further, further[further]  # twice as far each time
    return pointers


def _pits_and_passes(relief, mask, neighbours, held):
    """Move every pixel of the mask downhill to a pit, and find the passes between the basins.

    A pit is a local minimum. Its basin is all pixels that move to it. A pass joins two basins.
    neighbours: CROSS or SQUARE. held: pixels that do not move; each of them is a pit.
    The n pixels of the mask are numbered in scan order. Returns the pits (P,) as pixel numbers;
    the basin (n,) of each pixel as an index into the pits; and the passes, lowest first: the two
    basins of each (2, L), and its height (L,).
    """
    # 1. Add a frame of infinite height. Now every pixel has all neighbours, at fixed steps.
    framed = np.pad(np.where(mask, relief, np.inf), 1, constant_values=np.inf)
    level = framed.ravel()
    place = np.flatnonzero(level < np.inf)  # (n,) indices of the framed map
    pixel = np.arange(len(place))
    number = np.full(level.size, -1, np.int32)  # the reverse: place -> pixel
    number[place] = pixel

    # 2. Move downhill. Of equal neighbours the first counts as lower, so no path is a cycle.
    offsets = np.argwhere(neighbours) - 1  # (5 or 9, 2), in scan order
    steps = offsets @ (framed.shape[1], 1)
    around = np.stack([level[place + step] for step in steps])  # (5 or 9, n)
    lowest = steps[around.argmin(axis=0)]
    down = number[place + lowest]
    down[held] = held
    bottom = _follow(down)

    # 3. Number the pits.
    is_pit = bottom == pixel
    basin = np.cumsum(is_pit)[bottom] - 1
    number[place] = basin  # place -> basin

    # 4. A pass is a pair of neighbours in two basins. Its height is that of the higher pixel.
    edges = []
    for step in steps[steps > 0]:
        beside = number[place + step]
        crossing = place[(beside >= 0) & (beside != basin)]
        edges.append((crossing, crossing + step))
    edges = np.hstack(edges)  # (2, L) places
    low, high = np.sort(level[edges], axis=0)
    order = np.lexsort((low, high))  # if equal, the one with the lower low side first
    sides = number[edges[:, order]]
    return np.flatnonzero(is_pit), basin, sides, high[order]


def _overflow(label, sides):
    """Let every basin without a marker overflow over its lowest pass, until it reaches a marker.

    label: (P,) the marker in each basin, 0 = none; sides: as from `_pits_and_passes`.
    Returns the marker that each basin reaches (P,), 0 if none. Each round at least halves the
    number of basins that can overflow, so a few rounds are enough.
    """
    basins = np.arange(len(label))
    home = basins  # the basin into which each basin has overflowed
    while sides.size:
        # 1. The passes are sorted, so a basin's first pass is its lowest.
        passes = np.arange(sides.shape[1])
        first = np.full(len(label), len(passes))
        np.minimum.at(first, sides[0], passes)
        np.minimum.at(first, sides[1], passes)

        # 2. Basins without a marker overflow. If two overflow into each other, one stays.
        full = np.flatnonzero((label == 0) & (first < len(passes)))
        beside = sides[:, first[full]].sum(axis=0) - full
        into = basins.copy()
        into[full] = beside
        stays = full[(into[beside] == full) & (full < beside)]
        into[stays] = stays
        into = _follow(into)
        home = into[home]

        # 3. Drop passes inside one basin, and passes between two basins with markers.
        sides = into[sides]
        apart = sides[0] != sides[1]
        needed = (label[sides] == 0).any(axis=0)
        sides = sides[:, apart & needed]
    return label[home]


def watershed(relief, markers, mask):
    """Flood `relief` from `markers` inside `mask`: (H, W) int32 labels, 0 for background.

    relief: (H, W) finite, low is flooded first; markers: (H, W) int, 0 = none; mask: (H, W) bool.
    Every pixel moves to its lowest 4-neighbour, and so to a pit. A basin without a marker
    overflows over its lowest pass into the next basin. Pixels that reach no marker are background.
    So a marker reaches each of its pixels over the lowest possible pass. First, `relief` is raised
    by ROUNDING times the distance to the nearest marker, so that flat ground goes to that marker.
    (scipy's `watershed_ift` minimises the largest step instead.)
    """
    # 1. Raise the relief. (8 more columns avoid a stride of a power of two, as in `_spaced`.)
    mask = np.asarray(mask, bool)
    unmarked = ~mask | (markers == 0)
    unmarked = np.pad(unmarked, ((0, 0), (0, 8)), constant_values=True)
    distance = ndimage.distance_transform_edt(unmarked)[:, :-8].astype(np.float32)
    relief = relief + ROUNDING * distance

    # 2. Move downhill, overflow, and label each pixel with the marker of its basin.
    markers = markers[mask]
    held = np.flatnonzero(markers)
    pits, basin, sides, _ = _pits_and_passes(relief, mask, CROSS, held)
    inst_map = np.zeros(mask.shape, np.int32)
    inst_map[mask] = _overflow(markers[pits], sides)[basin]
    return inst_map


def prominent_peaks(density, h=0.15):
    """The h-maxima (published): a pixel for each maximum of dynamics >= `h`: (N, 2), scan order.

    The dynamics of a maximum is the least descent on a path to a higher maximum (8-neighbours).
    For the highest it is the descent to the map's minimum, so a flat map has no peak. Of equal
    maxima the first counts as higher. (The published code first stretches the map to [0, 1]. Then
    the result depends on the tile.)
    """
    density = _checked(density)

    # 1. In the negative map, maxima are pits and saddles are passes. Sort maxima by height.
    everywhere = np.ones(density.shape, bool)
    pits, _, sides, level = _pits_and_passes(-density, everywhere, SQUARE, [])
    order = np.argsort(-density.ravel()[pits], kind="stable")
    pits = pits[order]
    rank = np.argsort(order)
    sides = np.sort(rank[sides], axis=0)

    # 2. Of all saddles between two maxima, only the highest counts.
    pair = sides[0] * len(pits) + sides[1]
    _, first = np.unique(pair, return_index=True)
    first.sort()

    # 3. Join maxima, the highest saddle first. There the lower maximum meets a higher one.
    height = density.ravel()[pits].astype(float)
    dynamics = height - density.min()
    higher = list(range(len(pits)))  # each maximum points to the one that it has met

    def summit(peak):
        while higher[peak] != peak:
            higher[peak] = peak = higher[higher[peak]]
        return peak

    for a, b, depth in zip(*sides[:, first].tolist(), level[first].tolist()):
        high, low = sorted((summit(a), summit(b)))
        if high != low:
            higher[low] = high
            dynamics[low] = height[low] + depth

    # 4. Keep the prominent maxima.
    kept = np.sort(pits[(dynamics >= h) & (dynamics > 0)])
    return np.stack(np.unravel_index(kept, density.shape), axis=1)


# --------------------------------------------------------------------------------------- nuclei


def measure(inst_map, type_map, *, peaks, class_probability=None):
    """Measure every nucleus of a label map; nucleus `id` has its peak in row id - 1 of `peaks`.

    The class is the most frequent one among the pixels, without background; of equals the smaller.
    type_map: (H, W) int; class_probability: (K+1, H, W). An id without pixels has area 0, class 0
    and probability nan; its centroid and its empty box are at its peak. Drop it by its area.
    """
    peaks = np.asarray(peaks, np.int64).reshape(-1, 2)
    count = len(peaks)
    if (top := inst_map.max(initial=0)) > count:
        raise ValueError(f"inst_map holds id {top} but there are {count} peaks; pass one an id")

    # 1. All pixels of nuclei, and the row of each.
    y, x = np.nonzero(inst_map)
    rows = inst_map[y, x].astype(np.int64) - 1

    # 2. Areas, centroids, boxes.
    areas = np.bincount(rows, minlength=count)
    present = areas > 0
    sums = np.bincount(rows, y, count), np.bincount(rows, x, count)
    sums = np.stack(sums, axis=1)
    centroids = peaks.astype(float)
    centroids[present] = sums[present] / areas[present, None]
    boxes = np.tile(peaks, 2)
    boxes[present] = (*inst_map.shape, 0, 0)
    np.minimum.at(boxes[:, 0], rows, y)
    np.minimum.at(boxes[:, 1], rows, x)
    np.maximum.at(boxes[:, 2], rows, y + 1)
    np.maximum.at(boxes[:, 3], rows, x + 1)

    # 3. Classes by vote.
    types = type_map[y, x].astype(np.int64)
    channels = max(2, types.max(initial=0) + 1)
    ballots = rows * channels + types
    votes = np.bincount(ballots, minlength=count * channels).reshape(count, channels)
    votes[:, 0] = 0  # background does not vote
    classes = votes.argmax(axis=1)

    # 4. The mean probability of the nucleus's class.
    probabilities = np.full(count, np.nan, np.float32)
    if class_probability is not None:
        of_pixels = class_probability[classes[rows], y, x]
        sums = np.bincount(rows, of_pixels, count)
        probabilities[present] = sums[present] / areas[present]
    return Nuclei(inst_map, peaks, centroids, classes, probabilities, areas, boxes)


def select(nuclei, keep):
    """The nuclei whose row of `keep` (N,) bool is true, renumbered from 1."""
    new_ids = np.where(keep, np.cumsum(keep), 0)
    new_ids = np.append(0, new_ids).astype(np.int32)  # 0 stays the background
    columns = [values[keep] for values in nuclei[1:]]
    return Nuclei(new_ids[nuclei.inst_map], *columns)


def reconstruct(
    class_probability,
    density,
    *,
    combine="max",  # how the density target was made; "sum": published
    min_distance=2,  # ours: px at 0.25 um/px, a 5 px window
    threshold=0.3,  # ours: for unit peaks; chosen on validation images, 0.2 to 0.35 are as good
    h=0.15,  # published config; used with "sum"
    smooth=1.0,  # ours: px, sigma of a Gaussian; bf16 and fp32 then agree on 99.8 % of nuclei
    min_size=10,  # ours: px; smaller pieces are debris
):
    """Finds the nuclei of one image: a watershed floods the foreground from the density peaks.

    class_probability: (K+1, H, W) float, background first; density: (H, W) float, about 1 at the
    centre of each nucleus. Foreground is where the background is less probable than one half.
    Foreground without a peak is dropped, and so are peaks on background; ids follow the scan
    order of the peaks. Raises: ValueError if shapes do not fit, or the density is not finite.
    """
    shape = np.shape(class_probability)
    if len(shape) != 3 or shape[0] < 2:
        raise ValueError(f"class_probability is {shape}; expected (K+1, H, W), background first")
    if np.shape(density) != shape[1:]:
        raise ValueError(f"density is {np.shape(density)}; expected {shape[1:]}, "
                         "as class_probability")
    _check_combine(combine)

    # 1. Classify the pixels. (An argmax over all channels loses nuclei between two classes.)
    class_probability = np.asarray(class_probability)
    foreground = class_probability[0] < 0.5
    type_map = np.zeros(foreground.shape, np.uint8)
    candidates = class_probability[1:, foreground]  # (K, pixels of nuclei)
    type_map[foreground] = candidates.argmax(axis=0) + 1

    # 2. Find the peaks, one for each nucleus.
    density = _spaced(_checked(density))
    ndimage.gaussian_filter(density, smooth, output=density)
    if combine == "max":
        peaks = find_peaks(density, min_distance=min_distance, threshold=threshold)
    else:
        peaks = prominent_peaks(density.clip(0, 1), h)
    peaks = peaks[foreground[tuple(peaks.T)]]

    # 3. Flood the foreground from the peaks.
    markers = np.zeros(foreground.shape, np.int32)
    y, x = peaks.T
    markers[y, x] = np.arange(len(peaks)) + 1
    inst_map = watershed(-density, markers, foreground)

    # 4. Measure the nuclei, and drop the tiny ones.
    nuclei = measure(inst_map, type_map, peaks=peaks, class_probability=class_probability)
    return select(nuclei, nuclei.areas >= max(min_size, 1))
