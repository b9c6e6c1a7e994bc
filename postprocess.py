"""From two maps to nuclei: density peaks, a flooding watershed, measurements and outlines.

Watershed as a minimum spanning forest: Cousty et al. 2009, "Watershed cuts"
(doi.org/10.1109/TPAMI.2008.173). Needs numpy and scipy; works when copied alone.

    nuclei = reconstruct(type_map, density)              # argmax of the logits, density head
    nuclei.inst_map, nuclei.centroids, nuclei.classes    # arrays indexed by id - 1
    outlines = contours(nuclei.inst_map)                 # one closed ring a nucleus

Arrays and coordinates are (y, x). H, W: image size; N: nuclei; K: classes, 0 = background.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.sparse import csgraph, csr_matrix


class Nuclei(NamedTuple):
    """A label map and what was measured on it, one row a nucleus, indexed by id - 1."""

    inst_map: np.ndarray  # (H, W) int32, 0 = background, ids contiguous from 1
    peaks: np.ndarray  # (N, 2) int64, pixel where the density peaks
    centroids: np.ndarray  # (N, 2) float64, mean of pixel indices
    classes: np.ndarray  # (N,) int64, 1..K
    probabilities: np.ndarray  # (N,) float32, mean probability of that class; nan if unknown
    areas: np.ndarray  # (N,) int64, pixels
    boxes: np.ndarray  # (N, 4) int64, y0, x0, y1, x1, half-open


def _in_blocks(local_filter, image, dtype, reach=0, side=512):
    """local_filter(image) by blocks, whose columns and temporary arrays stay in the cache."""
    result = np.empty(image.shape, dtype)
    for y in range(0, image.shape[0], side):
        for x in range(0, image.shape[1], side):
            top, left = max(y - reach, 0), max(x - reach, 0)
            block = local_filter(image[top:y + side + reach, left:x + side + reach])
            result[y:y + side, x:x + side] = block[y - top:, x - left:][:side, :side]
    return result


# ------------------------------------------------------------------------------------ watershed


def _edges(number, pixels, offsets):
    """Both ends (2, E) of every edge that leads from `pixels`, all nodes, by one of `offsets` > 0.

    number: flat grid with the number of every node, -1 for none, as in the column after the last
    and the row below, where edges would leave the image. pixels: indices of it.
    """
    low = np.tile(number[pixels], len(offsets))
    high = np.hstack([number[pixels + offset] for offset in offsets])
    joined = np.flatnonzero(high >= 0)  # twice as fast here as the mask itself
    return np.stack((low[joined], high[joined]))


def _basins(edges, count, roots):
    """Contract a graph of ranked nodes to its basins: the minimum spanning tree's first step.

    The edge between ranks low < high weighs high * (count + 1) + low; no two weigh the same. A
    node's cheapest edge belongs to the tree, and unless the node is a minimum leads to its lowest
    neighbour: all slide down to minima, or to `roots`, and a far smaller graph is left to solve.
    Returns the bottom of each node's slide (count,) and, since a sparse matrix would add parallel
    edges up, the cheapest link from basin to basin: their bottoms (2, L) and its weight (L,).
    """
    low, high = edges.min(axis=0), edges.max(axis=0)
    bottom = np.arange(count, dtype=edges.dtype)
    np.minimum.at(bottom, high, low)
    bottom[roots] = roots
    while not np.array_equal(bottom, further := bottom[bottom]):
        bottom = further

    crossing = bottom[low] != bottom[high]
    low, high = low[crossing].astype(np.int64), high[crossing].astype(np.int64)
    # csgraph computes in float64: exact while (count + 1)^2 < 2^53, up to 94 million pixels.
    weight = high * (count + 1) + low
    order = np.argsort(weight)
    a, b = bottom[low[order]], bottom[high[order]]
    _, cheapest = np.unique(a.astype(np.int64) * count + b, return_index=True)
    return bottom, np.stack((a, b))[:, cheapest], weight[order[cheapest]]


def _flood(relief, markers, edges):
    """Label (n,) pixels, joined by `edges` (2, E) and each connected to some marker."""
    count, seeds = len(relief), np.flatnonzero(markers)
    shape = (count + 1, count + 1)
    root = np.full(len(seeds), count)  # one more node, joined to every marker
    hops = np.hstack((edges, (root, seeds)))
    hops = csr_matrix((np.ones(hops.shape[1]), hops), shape)
    order = csgraph.breadth_first_order(hops, count, directed=False)[0][1:]
    order = order[np.argsort(relief[order], kind="stable")]  # ties: what is nearer a marker first
    rank = np.empty(count, np.int32)
    rank[order] = np.arange(count)

    bottom, links, weight = _basins(rank[edges], count, rank[seeds])
    links = np.hstack((links, (root, rank[seeds])))
    weight = np.hstack((weight, np.ones(len(seeds))))  # below all others; 0 would mean no edge
    tree = csgraph.minimum_spanning_tree(csr_matrix((weight, links), shape))[:count, :count]
    _, component = csgraph.connected_components(tree, directed=False)  # one for each marker
    label = np.zeros(count, np.int32)
    label[component[rank[seeds]]] = markers[seeds]
    return label[component[bottom[rank]]]


def watershed(relief, markers, mask):
    """Flood `relief` from `markers` inside `mask`: (H, W) int32 labels, 0 where no marker gets.

    relief: (H, W), low floods first; markers: (H, W) int, 0 = none; mask: (H, W) bool.
    Each pixel goes to a marker that reaches it over the lowest possible pass, by 4-neighbours,
    on plateaus breadth first. (scipy's `watershed_ift` minimises the largest step instead.)
    """
    mask = np.asarray(mask, bool)
    components, count = ndimage.label(mask)
    relief, markers = np.ravel(relief), np.ravel(markers)
    seeds = np.flatnonzero(mask.ravel() & (markers != 0))
    owner, marker = np.unique(np.stack((components.ravel()[seeds], markers[seeds])), axis=1)
    label = np.zeros(count + 1, np.int32)
    label[owner] = marker
    label[np.bincount(owner, minlength=count + 1) > 1] = -1  # several markers: to be flooded
    inst_map = _in_blocks(label.__getitem__, components, np.int32)

    # Components are independent: flooded some hundred at a time, the cost grows with the area.
    pixels = np.flatnonzero(inst_map < 0)
    component = components.ravel()[pixels].astype(np.intp)
    sizes = np.bincount(component)
    group = (np.cumsum(sizes) >> 18).astype(np.uint16)
    pixels = pixels[np.argsort(group[component], kind="stable")]
    ends = np.cumsum(np.bincount(group, sizes)).astype(int)
    stride, flooded = mask.shape[1] + 1, inst_map.ravel()
    number = np.full((mask.shape[0] + 1) * stride, -1, np.int32)  # a line more below and right
    for part in filter(len, np.split(pixels, ends)):
        nodes = part + part // mask.shape[1]
        number[nodes] = np.arange(len(part))
        flooded[part] = _flood(relief[part], markers[part], _edges(number, nodes, (1, stride)))
    return inst_map


# ---------------------------------------------------------------------------------------- peaks


def _checked(density):
    density = np.asarray(density)
    if density.ndim != 2 or not density.size:
        raise ValueError(f"density has shape {density.shape}; expected (H, W): pass one map")
    if bad := density.size - np.count_nonzero(np.isfinite(density)):
        raise ValueError(f"density has {bad} values that are not finite; check the weights")
    return density.astype(np.result_type(density, np.float32), copy=False)


def find_peaks(density, *, min_distance=2, threshold=0.3):
    """Pixels above `threshold` that none within `min_distance` exceeds: (N, 2), in scan order.

    density: (H, W) float. The window is a square of side 2 * min_distance + 1. Equal maxima
    within `min_distance` of each other, plateaus included, are one peak: their first pixel.
    """
    density = _checked(density)
    if min_distance < 1:
        raise ValueError(f"min_distance is {min_distance}; expected at least 1 pixel")

    def highest(block):
        window = ndimage.maximum_filter(block, size=2 * min_distance + 1)
        return (block == window) & (block > threshold)

    peaks = np.argwhere(_in_blocks(highest, density, bool, min_distance))
    # Squares of side min_distance touch where their peaks are within min_distance of each other.
    squares = np.zeros(np.add(density.shape, min_distance), bool)
    for offset in np.ndindex(min_distance, min_distance):
        squares[tuple((peaks + offset).T)] = True
    group = ndimage.label(squares, np.ones((3, 3)))[0][tuple(peaks.T)]
    return peaks[np.sort(np.unique(group, return_index=True)[1])]


def prominent_peaks(density, h=0.15, *, rescale=True):
    """The h-maxima: one pixel for each regional maximum of dynamics >= `h`: (N, 2), in scan order.

    Dynamics is how far one must descend from a maximum to reach a higher one (8-neighbours), or,
    from the highest, the map's minimum: a flat map has no peak. Of equals the first is higher.
    With `rescale`, h refers to the map stretched to [0, 1], or to [-1, 1] if it has a negative
    value, as published; that stretch depends on the tile, so tiled inference does without.
    """
    density = _checked(density)
    floor, count = float(density.min()), density.size
    if rescale:  # the height shrinks instead of stretching the map
        h = h * (float(density.max()) - floor) / (2 if floor < 0 else 1)

    pixels = np.argsort(-density, axis=None, kind="stable")  # rank -> pixel, the highest first
    heights = density.ravel()[pixels].astype(np.float64)
    stride = density.shape[1] + 1
    rank = np.full((density.shape[0] + 1) * stride, -1, np.int32)  # a line more below and right
    rank[pixels + pixels // density.shape[1]] = np.arange(count)
    edges = _edges(rank, np.flatnonzero(rank >= 0), (1, stride - 1, stride, stride + 1))
    bottom, links, weight = _basins(edges, count, roots=[])

    # Kruskal over the basins: where two merge, the lower maximum has found a higher one.
    tree = csgraph.minimum_spanning_tree(csr_matrix((weight, links), (count, count))).tocoo()
    order = np.argsort(tree.data)
    passes = heights[(tree.data[order] // (count + 1)).astype(int)]
    dynamics = np.where(bottom == np.arange(count), heights - floor, 0)
    higher = list(range(count))
    for a, b, level in zip(tree.row[order].tolist(), tree.col[order].tolist(), passes):
        while higher[a] != a:
            higher[a] = a = higher[higher[a]]
        while higher[b] != b:
            higher[b] = b = higher[higher[b]]
        a, b = min(a, b), max(a, b)
        higher[b] = a
        dynamics[b] = heights[b] - level
    chosen = np.sort(pixels[(dynamics >= h) & (dynamics > 0)])
    return np.stack(np.unravel_index(chosen, density.shape), axis=1)


# --------------------------------------------------------------------------------------- nuclei


def measure(inst_map, type_map, *, peaks, class_probability=None):
    """Measure every nucleus of a label map; nucleus `id` has its peak in row id - 1 of `peaks`.

    The class is the majority of a nucleus's pixels, background aside; ties go to the smaller.
    An id without pixels has area 0, class 0, probability nan, and its peak as centroid and empty
    box: drop such rows by their area. Other arguments as in `reconstruct`.
    """
    peaks = np.asarray(peaks, np.int64).reshape(-1, 2)
    count = len(peaks)
    if (top := inst_map.max(initial=0)) > count:
        raise ValueError(f"inst_map holds id {top} but there are {count} peaks; pass one an id")
    # Runs: stretches of a row with one id and one type, ten times fewer than pixels.
    starts = np.ones(inst_map.shape, bool)
    starts[:, 1:] = inst_map[:, 1:] != inst_map[:, :-1]
    starts[:, 1:] |= type_map[:, 1:] != type_map[:, :-1]
    starts = np.flatnonzero(starts)
    lengths = np.diff(starts, append=inst_map.size)
    rows = inst_map.ravel()[starts].astype(np.int64) - 1
    starts, lengths, rows = (values[rows >= 0] for values in (starts, lengths, rows))
    y, x = np.divmod(starts, inst_map.shape[1])
    areas = np.bincount(rows, lengths, count).astype(np.int64)
    present = areas > 0
    sums = [np.bincount(rows, axis * lengths, count) for axis in (y, x + (lengths - 1) / 2)]
    centroids = peaks.astype(np.float64)
    centroids[present] = np.stack(sums, axis=1)[present] / areas[present, None]
    boxes = np.tile(peaks, 2)
    boxes[present] = *inst_map.shape, 0, 0
    for side, first, beyond in ((0, y, y + 1), (1, x, x + lengths)):
        np.minimum.at(boxes[:, side], rows, first)
        np.maximum.at(boxes[:, side + 2], rows, beyond)

    types = type_map.ravel()[starts].astype(np.int64)
    channels = max(2, types.max(initial=0) + 1)
    votes = np.bincount(rows * channels + types, lengths, count * channels)
    votes = votes.reshape(count, channels)[:, 1:]
    classes = np.where(votes.any(axis=1), votes.argmax(axis=1) + 1, 0)

    probabilities = np.full(count, np.nan, np.float32)
    if class_probability is not None:
        pixels = np.flatnonzero(inst_map != 0)
        rows = inst_map.ravel()[pixels].astype(np.int64) - 1
        y = pixels // inst_map.shape[1]
        x = pixels - y * inst_map.shape[1]  # sooner than by divmod
        total = np.bincount(rows, class_probability[classes[rows], y, x], count)
        probabilities[present] = total[present] / areas[present]
    return Nuclei(inst_map, peaks, centroids, classes, probabilities, areas, boxes)


def select(nuclei, keep):
    """The nuclei whose row of `keep` (N,) bool is true, numbered anew."""
    ids = np.append(0, np.where(keep, keep.cumsum(), 0)).astype(np.int32)
    return Nuclei(ids[nuclei.inst_map], *(values[keep] for values in nuclei[1:]))


def reconstruct(
    type_map,
    density,
    *,
    class_probability=None,
    combine="max",  # how the density target was made; "sum": published
    min_distance=2,  # ours: px at 0.25 um/px, a 5 px window
    threshold=0.3,  # ours: on unit peaks; chosen on validation images, 0.2 to 0.35 do as well
    h=0.15,  # published config; used with "sum"
    smooth=1.0,  # ours: px; bf16 and fp32 then agree on 99.8 % of nuclei
    min_size=10,  # ours: px; what is smaller is debris
):
    """Nuclei of one image: each is the foreground that its density peak floods.

    type_map: (H, W) int, 0 = background; density: (H, W) float, about 1 at each nucleus's centre;
    class_probability: (K+1, H, W) float, background first.
    Foreground without a peak is dropped, and so are peaks on background; ids follow the scan
    order of the peaks. Raises: ValueError if shapes or types do not fit, or density is not finite.
    """
    type_map, density = np.asarray(type_map), np.asarray(density, np.float32)
    if type_map.ndim != 2 or type_map.dtype.kind not in "iu" or type_map.min(initial=0) < 0:
        raise ValueError(f"type_map is {type_map.dtype} {type_map.shape}; expected (H, W) integers "
                         "from 0 for background: pass the argmax of the logits")
    if density.shape != type_map.shape:
        raise ValueError(f"density is {density.shape}; expected {type_map.shape} like type_map")
    shape, channels = np.shape(class_probability), int(type_map.max(initial=0)) + 1
    if class_probability is not None and (shape[1:] != type_map.shape or shape[0] < channels):
        raise ValueError(f"class_probability is {shape}; expected (K+1, H, W), K+1 >= {channels}, "
                         f"(H, W) = {type_map.shape}")
    if combine not in ("max", "sum"):
        raise ValueError(f"combine is {combine!r}; expected 'max' or 'sum'")

    density = _in_blocks(lambda block: ndimage.gaussian_filter(block, smooth), _checked(density),
                         np.float32, reach=int(4 * smooth + 0.5))  # the filter ends at 4 sigma
    if combine == "max":
        peaks = find_peaks(density, min_distance=min_distance, threshold=threshold)
    else:
        peaks = prominent_peaks(density.clip(0, 1), h, rescale=False)

    markers = np.zeros(type_map.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    inst_map = watershed(-density, markers, type_map > 0)
    nuclei = measure(inst_map, type_map, peaks=peaks, class_probability=class_probability)
    return select(nuclei, nuclei.areas >= max(min_size, 1))


# ------------------------------------------------------------------------------------- outlines


def _steps(following):
    """A permutation as the graph of its steps."""
    return csr_matrix((np.ones(len(following)), following, np.arange(len(following) + 1)))


def _cycles(following):
    """Number the cycles of a permutation: which one each of its entries is in."""
    return csgraph.connected_components(_steps(following), directed=False)[1]


def contours(inst_map):
    """The outer outline of every nucleus along pixel edges: a list of (M, 2) int, one an id.

    Pixel (y, x) covers [y, y+1] x [x, x+1]. A ring lists its corners clockwise on the screen,
    first = last, and never meets itself, even where the nucleus touches itself at a corner; its
    shoelace area is pixels plus holes. An id in several 4-connected pieces gets the ring of the
    largest, an id without pixels an empty array.
    """
    padded = np.pad(np.asarray(inst_map), 1)
    stride, padded, count = padded.shape[1], padded.ravel(), int(padded.max())
    across = np.array((-stride, 1, stride, -1))  # over side 0, 1, 2, 3: top, right, bottom, left
    own = padded[stride:-stride]
    beside = [padded[stride + step:len(padded) - stride + step] for step in across]
    edges = [np.flatnonzero((own != 0) & (own != other)) + stride for other in beside]
    # An edge is 4 * pixel + side, and runs towards side + 1.
    edges = np.sort(np.hstack([4 * pixels + side for side, pixels in enumerate(edges)]))
    pixel, side = np.divmod(edges, 4)
    ids = padded[pixel].astype(np.int64)
    if not count:
        return []

    ahead = pixel + across[(side + 1) % 4]
    beyond = ahead + across[side]
    straight, opens = padded[ahead] == ids, padded[beyond] == ids
    right, left = pixel * 4 + (side + 1) % 4, beyond * 4 + (side + 3) % 4
    following = np.where(straight, np.where(opens, left, ahead * 4 + side), right)
    following = np.searchsorted(edges, following)
    # Where pixels meet only at a corner, this turns right and keeps them apart. If both ways
    # past the corner are one ring, turning left instead cuts a hole off it.
    pinched = np.flatnonzero(opens & ~straight)
    other, ring = np.searchsorted(edges, left[pinched]), _cycles(following)
    same = ring[pinched] == ring[other]
    following[pinched[same]] = other[same]

    y, x = np.divmod(pixel, stride)
    starts = np.stack((y - (side < 2), x - (side % 3 == 0)), axis=1)  # in corners of inst_map
    turns = np.empty(len(edges), bool)
    turns[following] = side[following] != side
    ring = _cycles(following)
    first = np.unique(ring, return_index=True)[1]
    area = np.bincount(ring, starts[:, 1] * np.array((0, 1, 0, -1))[side])  # holes are negative
    largest = np.full(count + 1, -1)
    by_area = first[np.argsort(area)]
    largest[ids[by_area]] = by_area  # the largest ring of an id comes last and stays
    largest = largest[largest >= 0]

    # The end of each ring leads on to the beginning of the next: one walk visits them all.
    following[np.argsort(following)[largest]] = np.roll(largest, -1)
    walk = csgraph.breadth_first_order(_steps(following), largest[0], return_predecessors=False)
    walk = walk[turns[walk]]
    begin = np.flatnonzero(np.diff(ids[walk], prepend=0))
    end = np.append(begin[1:], len(walk))
    rings = np.split(starts[np.insert(walk, end, walk[begin])], end + np.arange(1, len(end) + 1))
    outlines = dict(zip(ids[walk[begin]].tolist(), rings))
    return [outlines.get(label, rings[0][:0]) for label in range(1, count + 1)]
