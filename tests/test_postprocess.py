import heapq
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

import postprocess
from postprocess import contours, find_peaks, measure, prominent_peaks, reconstruct, watershed

CROSS, SQUARE = ndimage.generate_binary_structure(2, 1), np.ones((3, 3), bool)
KINDS = ("noise", "plateaus", "smooth", "smooth plateaus", "flat")


def relief_of(kind, seed, shape=(60, 70)):
    random = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(random.normal(size=shape), 3)
    relief = {"noise": random.random(shape), "flat": np.zeros(shape),
              "plateaus": random.integers(0, 4, shape) / 4}.get(kind, smooth / np.ptp(smooth) * 2)
    return np.round(relief * 16) / 16 if kind == "smooth plateaus" else relief


def discs(shape, centres, classes=1, radius=6):
    """Perfect maps of discs that do not overlap: inst_map, type_map, density."""
    y, x = np.indices(shape)
    distance = np.array([np.hypot(y - cy, x - cx) for cy, cx in centres])
    inst_map = np.where(distance.min(axis=0) <= radius, distance.argmin(axis=0) + 1, 0)
    type_map = np.append(0, np.ones(len(centres), int) * classes)[inst_map]
    return inst_map, type_map, np.exp(-distance.min(axis=0) ** 2 / 50)


def tissue(seed, side=240, levels=8):
    """Clusters of four nuclei within 40 px, noisy; few levels make many ties."""
    random = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(*[np.arange(0, side, 48)] * 2), axis=-1).reshape(-1, 1, 2)
    centres = (corners + random.integers(8, 32, (len(corners), 4, 2))).reshape(-1, 2)
    _, foreground, density = discs((side, side), centres)
    density = ndimage.gaussian_filter(density + random.normal(0, 0.1, density.shape), 1)
    return foreground * random.integers(1, 4, density.shape), np.round(density * levels) / levels


# ------------------------------------------------------------------------------------ watershed


def slow_flood(relief, markers, mask, within=None):
    """Labels and lowest passes by a plain priority queue, which may not leave its `within`."""
    labels, passes = np.zeros_like(markers), np.full(relief.shape, np.inf)
    seeds = list(zip(*np.nonzero(markers * mask)))
    queue = sorted((relief[pixel], age, pixel, markers[pixel]) for age, pixel in enumerate(seeds))
    age = len(queue)
    while queue:
        level, _, (y, x), marker = heapq.heappop(queue)
        if labels[y, x]:
            continue
        labels[y, x], passes[y, x] = marker, level
        for q in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            inside = 0 <= q[0] < len(mask) and 0 <= q[1] < mask.shape[1] and mask[q]
            if inside and not labels[q] and (within is None or within[q] == marker):
                age += 1
                heapq.heappush(queue, (max(level, relief[q]), age, q, marker))
    return labels, passes


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_is_reached_over_the_lowest_pass(kind):
    for seed in range(4):
        random, relief = np.random.default_rng(seed), relief_of(kind, seed)
        mask = ndimage.gaussian_filter(random.normal(size=relief.shape), 2) > -0.05
        markers = random.permutation(relief.size).reshape(relief.shape)
        markers *= random.random(relief.shape) < 0.02
        labels, (slow, lowest) = watershed(relief, markers, mask), slow_flood(relief, markers, mask)
        assert labels.dtype == np.int32 and not np.all(slow[mask])
        assert np.array_equal(labels > 0, slow > 0)
        # Each marker reaches its own pixels as low, without leaving them.
        assert np.array_equal(slow_flood(relief, markers, mask, within=labels)[1], lowest)


def test_density_is_flooded_as_by_a_priority_queue():
    different = total = 0
    for seed in range(4):
        type_map, density = tissue(seed, side=144, levels=2**30)
        relief, markers = -ndimage.gaussian_filter(density, 1), np.zeros(density.shape, int)
        peaks = find_peaks(-relief)
        markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        slow = slow_flood(relief, markers, type_map)[0]
        different += (watershed(relief, markers, type_map) != slow).sum()
        total += (slow > 0).sum()
    assert total > 10000 and different <= 0.001 * total


def test_plateaus_go_to_the_nearest_marker():
    markers = np.zeros((9, 31), int)
    markers[4, 2], markers[4, 22] = 7, 3
    labels = watershed(np.zeros(markers.shape), markers, np.ones(markers.shape))
    assert np.all(labels[:, :12] == 7) and np.all(labels[:, 13:] == 3)


def test_a_pass_goes_to_the_side_that_reaches_it_first():
    relief, markers = np.full((3, 4), 9), np.zeros((3, 4), int)
    relief[1], relief[0, 2], markers[1, [0, 3]] = (1, 4, 5, 2), 0, (7, 3)
    for turn in range(4):
        for view in (np.rot90, lambda a, k: np.rot90(a.T, k)):
            seen = view(relief, turn)
            labels = watershed(seen, view(markers, turn), np.ones(seen.shape))
            assert labels[seen == 0] == 3  # the pit behind pass 5, reached from 2 before from 4


def test_components_flooded_in_groups_are_flooded_as_alone():
    rng = np.random.default_rng(0)
    relief, markers = rng.random((500, 400)), np.zeros((500, 400), int)
    mask = np.pad(np.ones((498, 398), bool), 1)  # three such are more than one group holds
    markers[tuple(rng.integers(1, 399, (2, 9)))] = np.arange(1, 10)
    alone = watershed(relief, markers, mask)
    for shape in (1, 3), (3, 1):
        shift = 9 * np.arange(3).reshape(shape).repeat(mask.shape[0], 0).repeat(mask.shape[1], 1)
        moved = [np.tile(m, shape) + shift * (np.tile(m, shape) > 0) for m in (markers, alone)]
        assert np.array_equal(
            watershed(np.tile(relief, shape), moved[0], np.tile(mask, shape)), moved[1])


def test_the_shortcut_for_a_single_marker_changes_nothing():
    relief, mask = relief_of("noise", 5), ndimage.gaussian_filter(relief_of("noise", 6), 2) > 0.5
    markers = np.where(relief_of("noise", 7) < 0.01, np.arange(relief.size).reshape(mask.shape), 0)
    markers[:30] = np.where(markers[:30], 5, 0)  # many pixels, one marker
    labels, (components, count) = watershed(relief, markers, mask), ndimage.label(mask)
    shortcuts = 0
    for pixels in (components == n for n in range(1, count + 1)):
        number = np.pad(np.where(pixels, np.cumsum(pixels).reshape(mask.shape), 0) - 1, (0, 1),
                        constant_values=-1)
        if (markers * pixels).any():
            nodes, stride = np.flatnonzero(number >= 0), number.shape[1]
            edges = postprocess._edges(number.ravel(), nodes, (1, stride))
            flooded = postprocess._flood(relief[pixels], markers[pixels], edges)
            assert np.array_equal(labels[pixels], flooded)
            shortcuts += len(np.unique(flooded)) == 1
    assert 3 < shortcuts < count


# ---------------------------------------------------------------------------------------- peaks


def test_find_peaks_merges_equal_maxima_within_its_window():
    density = np.zeros((20, 30))
    density[2:4, 3:6] = 0.5  # a plateau
    density[10, 10] = density[12, 12] = 0.9  # two apart: one peak
    density[10, 20] = density[10, 23] = density[13, 20] = 0.9  # three apart: three peaks
    density[17, 3], density[17, 5] = 0.7, 0.8  # the lower is in the higher one's window
    density[0, 29] = 0.3  # at the threshold, not above
    expected = [[2, 3], [10, 10], [10, 20], [10, 23], [13, 20], [17, 5]]
    assert find_peaks(density).tolist() == expected
    assert find_peaks(density, threshold=0.29).tolist() == [[0, 29], *expected]
    assert find_peaks(density, min_distance=1).tolist() == sorted([*expected, [12, 12], [17, 3]])
    assert find_peaks(density, min_distance=3, threshold=0.85).tolist() == [[10, 10], [10, 20]]
    assert find_peaks(np.full((5, 5), 0.5)).tolist() == [[0, 0]]


def plain_reconstruction(marker, mask):
    """Grey-scale reconstruction by dilation, until nothing changes."""
    while not np.array_equal(marker, grown := np.minimum(ndimage.maximum_filter(marker, 3), mask)):
        marker = grown
    return marker


def test_blocks_do_not_show():
    density = relief_of("noise", 0, (530, 1050))  # two by three blocks
    peaks = (density == ndimage.maximum_filter(density, 5)) & (density > 0.3)
    assert np.array_equal(find_peaks(density), np.argwhere(peaks))
    smooth = ndimage.gaussian_filter(density, 1)
    found = postprocess._in_blocks(lambda x: ndimage.gaussian_filter(x, 1), density, float, 4)
    assert np.array_equal(found, smooth)


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("h", [0.11, 0.3, 0.7])
def test_prominent_peaks_are_the_maxima_of_a_plain_reconstruction(kind, h):
    for seed in range(5):
        density = relief_of(kind, seed)
        level = plain_reconstruction(density - h, density)
        lower = plain_reconstruction(np.nextafter(level, -np.inf), level)
        maxima, count = ndimage.label(lower < level, SQUARE)
        peaks = prominent_peaks(density, h, rescale=False)
        found = maxima[tuple(peaks.T)]
        assert sorted(found) == list(range(1, count + 1))  # one in each
        assert np.array_equal(density[tuple(peaks.T)], ndimage.maximum(density, maxima, found))
        assert np.all(np.diff(peaks @ (1000, 1)) > 0)  # scan order


def test_prominence_counts_from_the_pass_and_includes_h():
    density = np.array([[0, 0.5, 0.25, 1, 0.75, 0.875, 0, 0.25, 0]])

    def columns(h, rescale):
        return prominent_peaks(density, h, rescale=rescale)[:, 1].tolist()

    assert columns(0.125, False) == [1, 3, 5, 7] and columns(0.126, False) == [1, 3, 7]
    assert columns(0.25, False) == [1, 3, 7] and columns(0.26, False) == [3]
    assert columns(1, False) == [3] and columns(1.01, False) == []
    density *= 0.5
    assert columns(0.126, False) == [3] != columns(0.126, True) == [1, 3, 7]
    assert prominent_peaks(density)[:, 1].tolist() == [1, 3, 7]  # h = 0.15 of the stretched map
    density[0, 0] = -0.5  # the range stays 1 above it, now stretched to [-1, 1]
    assert columns(0.25, True) == [1, 3, 7] and columns(0.26, True) == [3]
    assert prominent_peaks(np.eye(4, dtype=np.uint8)).tolist() == [[0, 0]]  # 8-connected, any type
    for rescale in (True, False):
        assert prominent_peaks(np.full((4, 4), 0.7), rescale=rescale).shape == (0, 2)


# --------------------------------------------------------------------------------------- nuclei


def test_perfect_maps_give_every_nucleus_and_its_measurements():
    centres = [(9, 40), (20, 10), (20, 23), (45, 30), (45, 42)]  # two pairs touch
    inst_map, type_map, density = discs((60, 57), centres, classes=[1, 2, 3, 2, 1])
    probability = np.stack([(type_map == k) * 0.25 + k / 10 for k in range(4)])
    nuclei = reconstruct(type_map, density, class_probability=probability)
    assert np.array_equal(nuclei.inst_map, inst_map)
    assert nuclei.peaks.tolist() == [list(centre) for centre in centres]
    truth = ndimage.center_of_mass(inst_map, inst_map, range(1, 6))
    assert np.allclose(nuclei.centroids, truth)
    assert nuclei.classes.tolist() == [1, 2, 3, 2, 1]
    assert np.allclose(nuclei.probabilities, [0.35, 0.45, 0.55, 0.45, 0.35])
    assert nuclei.areas.tolist() == np.bincount(inst_map.ravel())[1:].tolist()
    assert nuclei.boxes[0].tolist() == [3, 34, 16, 47]
    assert [field.dtype.name for field in nuclei] == [
        "int32", "int64", "float64", "int64", "float32", "int64", "int64"]
    summed = reconstruct(type_map, density, combine="sum", h=0.35)
    assert np.array_equal(summed.inst_map, inst_map) and np.isnan(summed.probabilities).all()
    clipped = reconstruct(type_map, density * 2, combine="sum", h=0.35)  # lower above the pass
    assert len(clipped.areas) == 3
    assert len(reconstruct(type_map, density * 0.5, combine="sum", h=0.6).areas) == 0


def test_empty_tile_one_pixel_and_all_foreground():
    empty = reconstruct(np.zeros((7, 5), int), np.ones((7, 5)))
    shapes = [(7, 5), (0, 2), (0, 2), (0,), (0,), (0,), (0, 4)]
    assert not empty.inst_map.any() and [field.shape for field in empty] == shapes
    assert reconstruct([[2]], [[1.0]], min_size=1).classes.tolist() == [2]
    density = discs((40, 50), [(10, 10), (30, 40)])[2]
    full = reconstruct(np.ones((40, 50), int), density)
    assert full.areas.sum() == 2000 and len(full.areas) == 2
    assert len(reconstruct(np.ones((40, 50), int), density * 0).areas) == 0


def test_debris_lone_pixels_and_peaks_on_background_are_dropped():
    type_map, density = discs((40, 60), [(10, 10), (10, 30), (30, 10)])[1:]
    type_map[4:17, 4:17], type_map[25:36, 5:16] = 0, 0  # of the third a rim remains
    type_map[9:12, 9:12] = 1  # of the first 9 pixels
    nuclei = reconstruct(type_map, density, min_size=9)
    assert nuclei.peaks.tolist() == [[10, 10], [10, 30]] and nuclei.areas[0] == 9
    nuclei = reconstruct(type_map, density)
    assert nuclei.peaks.tolist() == [[10, 30]] and nuclei.inst_map.max() == 1
    assert len(reconstruct(type_map, density, min_size=0).areas) == 2
    spike = (np.indices((9, 9)) == 4).all(axis=0) * 1.0
    assert len(reconstruct(np.ones((9, 9), int), spike).areas) == 0  # smoothed to 0.16
    assert len(reconstruct(np.ones((9, 9), int), spike, smooth=0).areas) == 1


def test_peaks_are_taken_as_the_defaults_say():
    density = np.zeros((20, 40))
    density[5, [5, 15, 25, 28]] = 0.31, 0.29, 0.5, 0.5
    density[15, [10, 30]] = 0.16, 0.14
    highest = [[5, 5], [5, 25], [5, 28]]  # threshold 0.3, min_distance 2; for the sum, h 0.15
    for combine, peaks in (("max", highest), ("sum", sorted([*highest, [5, 15], [15, 10]]))):
        nuclei = reconstruct(np.ones(density.shape, int), density, combine=combine, smooth=0)
        assert nuclei.peaks.tolist() == peaks


def test_measure_takes_the_majority_and_survives_an_id_without_pixels():
    inst_map = np.array([[1, 1, 1, 0], [1, 1, 3, 3], [0, 1, 3, 3]], np.int32)
    type_map = np.array([[0, 0, 0, 2], [0, 2, 3, 1], [2, 1, 1, 3]], np.uint8)
    probability = np.arange(48).reshape(4, 3, 4)
    peaks = [(0, 0), (2, 3), (1, 2)]
    nuclei = measure(inst_map, type_map, peaks=peaks, class_probability=probability)
    assert nuclei.classes.tolist() == [1, 0, 1]  # background has no vote; ties: the smaller
    assert nuclei.areas.tolist() == [6, 0, 4]
    assert np.allclose(nuclei.centroids, [[2 / 3, 5 / 6], [2, 3], [1.5, 2.5]])
    assert nuclei.boxes.tolist() == [[0, 0, 3, 3], [2, 3, 2, 3], [1, 2, 3, 4]]
    assert np.allclose(nuclei.probabilities, [15.5, np.nan, 20.5], equal_nan=True)
    with pytest.raises(ValueError, match="holds id 3 but there are 2 peaks; pass one an id"):
        measure(inst_map, type_map, peaks=np.zeros((2, 2)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.uint64])
def test_label_maps_of_any_integers_are_measured_and_outlined(dtype):
    inst_map = np.zeros((40, 30), np.int64)
    inst_map[3:9, 25:], inst_map[10:15, :4], inst_map[30, 8:20] = 1, 2, 255  # ids at both sides
    peaks, probability = np.zeros((255, 2)), np.random.default_rng(0).random((2, 40, 30))
    expected, found = (measure(labels, inst_map > 0, peaks=peaks, class_probability=probability)
                       for labels in (inst_map, inst_map.astype(dtype)))
    for a, b in zip(expected, found):
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    for a, b in zip(contours(inst_map), contours(inst_map.astype(dtype)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("smooth", [0, 1])
def test_windows_with_a_halo_give_the_same_nuclei(smooth):
    type_map, density = tissue(1)

    def found(core, halo):
        nuclei = {}
        for start in np.ndindex(*[-(-240 // core)] * 2):
            low, high = np.multiply(start, core), np.add(start, 1) * core
            origin = np.maximum(low - halo, 0)
            window = tuple(map(slice, origin, high + halo))
            tile = reconstruct(type_map[window], density[window], smooth=smooth)
            rows = zip(tile.peaks + origin, tile.classes, tile.areas, contours(tile.inst_map))
            nuclei |= {tuple(peak): (kind, area, (ring + origin).tolist())
                       for peak, kind, area, ring in rows if np.all((low <= peak) & (peak < high))}
        return nuclei

    assert found(80, 50) == found(97, 61) == found(240, 0) and len(found(240, 0)) > 60


INTS, ONES = np.full((4, 5), 2), np.ones((4, 5))


@pytest.mark.parametrize("message, type_map, density, options", [
    (r"float64 \(4, 5\); expected \(H, W\) integers", ONES, ONES, {}),
    (r"int64 \(1, 4, 5\); expected \(H, W\)", INTS[None], ONES, {}),
    ("from 0 for background: pass the argmax", -INTS, ONES, {}),
    (r"density is \(5, 4\); expected \(4, 5\) like type_map", INTS, ONES.T, {}),
    (r"shape \(0, 5\); expected \(H, W\)", INTS[:0], ONES[:0], {}),
    ("20 values that are not finite; check", INTS, ONES * np.nan, {}),
    ("combine is 'mean'; expected 'max' or 'sum'", INTS, ONES, {"combine": "mean"}),
    ("min_distance is 0; expected at least 1", INTS, ONES, {"min_distance": 0}),
    (r"\(2, 4, 5\); .*K\+1 >= 3", INTS, ONES, {"class_probability": np.ones((2, 4, 5))}),
    (r"\(3, 5, 4\); .*= \(4, 5\)", INTS, ONES, {"class_probability": np.ones((3, 5, 4))}),
])
def test_errors_say_what_was_expected(message, type_map, density, options):
    with pytest.raises(ValueError, match=message):
        reconstruct(type_map, density, **options)


# ------------------------------------------------------------------------------------- outlines


def check_ring(ring, pixels):
    """A ring of corners, clockwise and nowhere meeting itself, around exactly these pixels."""
    steps = np.diff(ring, axis=0)
    assert len(ring) >= 5 and np.array_equal(ring[0], ring[-1])
    assert np.all((steps == 0).sum(axis=1) == 1)  # along the axes
    assert np.all((steps == 0) != (np.roll(steps, 1, axis=0) == 0))  # turning at every corner
    y, x = ring.T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() == 2 * pixels.sum()  # shoelace, clockwise
    lengths = np.abs(steps).sum(axis=1)
    walk = np.cumsum(np.repeat(steps // lengths[:, None], lengths, axis=0), axis=0)
    assert len(np.unique(walk, axis=0)) == len(walk)
    raster = np.zeros(pixels.shape, int)
    for (y0, x0), (y1, _) in zip(ring, ring[1:]):
        raster[min(y0, y1) : max(y0, y1), x0:] += 1
    assert np.array_equal(raster % 2 == 1, pixels)  # even-odd


@pytest.mark.parametrize("picture", [
    "#", "###/###", "...../.###./.#.#./.###./.....",  # one pixel, the border, a hole
    ".##/#.#/###", "###./#.##/####",  # touching itself at a corner, round a hole
    "####/#.##/##.#/####",  # two holes that meet at a corner
    "#####/#...#/#.#.#/#...#/#####", "##.../#####/..#.#/###..",  # several pieces
])
def test_outline_of_a_shape(picture):
    shape = np.array([[char == "#" for char in row] for row in picture.split("/")])
    pieces = ndimage.label(shape, CROSS)[0]
    largest = pieces == np.bincount(pieces[shape]).argmax()
    nothing, ring = contours(shape * 2)
    assert nothing.shape == (0, 2)
    check_ring(ring, ndimage.binary_fill_holes(largest, CROSS))


def test_outlines_of_random_labels():
    for seed in range(40):
        inst_map = np.random.default_rng(seed).integers(0, 4, (9, 11)).astype(np.int32)
        for n, ring in enumerate(contours(inst_map), start=1):
            pieces, count = ndimage.label(inst_map == n, CROSS)
            filled = [ndimage.binary_fill_holes(pieces == k, CROSS) for k in range(1, count + 1)]
            chosen = filled[pieces[tuple(min(ring.tolist()))] - 1]  # by its first pixel
            assert chosen.sum() == max(piece.sum() for piece in filled)
            check_ring(ring, chosen)


def test_every_outline_is_that_of_its_id():
    inst_map = discs((60, 57), [(50, 40), (20, 10), (20, 22), (3, 30)])[0].astype(np.int32)
    rings = contours(inst_map)
    assert len(rings) == 4 and contours(inst_map * 0) == []
    for n, ring in enumerate(rings, start=1):
        check_ring(ring, inst_map == n)


def test_the_file_works_alone(tmp_path):
    shutil.copy(postprocess.__file__, tmp_path)
    code = ("import sys, numpy, postprocess; postprocess.reconstruct([[1]], [[1.0]]);"
            "assert not {'torch', 'PIL', 'skimage'} & set(sys.modules)")
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
