"""postprocess.py against plain loops, against perfect maps, and on its own."""

import heapq
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import ndimage

import postprocess
from postprocess import (
    ROUNDING,
    SQUARE,
    centroids_of,
    density_map,
    find_peaks,
    measure,
    prominent_peaks,
    reconstruct,
    watershed,
)

KINDS = ("noise", "plateaus", "smooth", "smooth plateaus", "flat")


def relief_of(kind, seed, shape=(60, 70)):
    random = np.random.default_rng(seed)
    if kind == "noise":
        return random.random(shape)
    if kind == "plateaus":
        return random.integers(0, 4, shape) / 4
    if kind == "flat":
        return np.zeros(shape)
    smooth = ndimage.gaussian_filter(random.normal(size=shape), 3)
    smooth *= 2 / np.ptp(smooth)
    return smooth if kind == "smooth" else np.round(smooth * 16) / 16


def one_hot(type_map, classes=3):
    """Probabilities (K+1, H, W) that are sure of the types."""
    return (np.arange(classes + 1)[:, None, None] == type_map).astype(np.float32)


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


# -------------------------------------------------------------------------------------- targets


def test_density_peaks_at_one_whatever_the_neighbours():
    centroids = [(20, 20), (20, 26), (50, 40)]
    density = density_map(centroids, (64, 70))
    assert [density[y, x] for y, x in centroids] == [1, 1, 1] and density.dtype == np.float32
    y, x = np.indices(density.shape)
    plain = np.max([np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 50) for cy, cx in centroids], axis=0)
    assert np.allclose(density, plain, atol=1e-6)
    assert density_map([(-3, 5)], (8, 9))[0, 5] == pytest.approx(np.exp(-9 / 50))  # peak is outside
    assert density_map([(3, 3)], (8, 8), sigma=2)[3, 5] == pytest.approx(np.exp(-4 / 8))


def test_the_published_density_fades_isolated_nuclei():
    published = density_map([(20, 20), (20, 26), (50, 40)], (64, 64), combine="sum")
    assert published.max() == 1 and published.dtype == np.float32 and published[50, 40] < 0.8


@pytest.mark.parametrize("combine", ["max", "sum"])
def test_no_nucleus_no_density(combine):
    for centroids in ([], np.zeros((0, 2)), [(900, 900)], [(-900, 5)]):
        density = density_map(centroids, (8, 9), combine=combine)
        assert density.shape == (8, 9) and not density.any()


def test_centroids_are_means_in_the_order_of_ids():
    inst_map = np.random.default_rng(0).choice([0, 3, 8, 2**40], (20, 30))
    means = [np.argwhere(inst_map == n).mean(axis=0) for n in (3, 8, 2**40)]
    assert np.allclose(centroids_of(inst_map), means)
    assert centroids_of(inst_map * 0).shape == (0, 2)


def test_density_and_reconstruct_are_inverse():
    inst_map, type_map, _ = discs((90, 80), [(20, 20), (20, 32), (45, 60), (60, 20), (72, 25)])
    density = density_map(centroids_of(inst_map), inst_map.shape)
    assert np.array_equal(reconstruct(one_hot(type_map), density).inst_map, inst_map)


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


def raised(relief, markers, mask):
    """The relief that the watershed floods: a little higher far from the markers."""
    distance = ndimage.distance_transform_edt((markers == 0) | ~mask)
    return relief + ROUNDING * distance.astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_is_reached_over_the_lowest_pass(kind):
    for seed in range(4):
        random, relief = np.random.default_rng(seed), relief_of(kind, seed)
        mask = ndimage.gaussian_filter(random.normal(size=relief.shape), 2) > -0.05
        markers = random.permutation(relief.size).reshape(relief.shape)
        markers *= random.random(relief.shape) < 0.02
        labels = watershed(relief, markers, mask)
        relief = raised(relief, markers, mask)
        slow, lowest = slow_flood(relief, markers, mask)
        assert labels.dtype == np.int32 and not np.all(slow[mask])
        assert np.array_equal(labels > 0, slow > 0)
        # Each marker reaches its own pixels as low, without leaving them.
        assert np.array_equal(slow_flood(relief, markers, mask, within=labels)[1], lowest)


def test_density_is_flooded_as_by_a_priority_queue():
    different = total = 0
    for seed in range(4):
        type_map, density = tissue(seed, side=144, levels=2**30)
        mask, relief = type_map > 0, -ndimage.gaussian_filter(density, 1)
        peaks = find_peaks(-relief)
        markers = np.zeros(density.shape, int)
        markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        slow, _ = slow_flood(raised(relief, markers, mask), markers, mask)
        different += (watershed(relief, markers, mask) != slow).sum()
        total += (slow > 0).sum()
    assert total > 10000 and different <= 0.001 * total


def test_level_ground_goes_to_the_nearest_marker():
    markers = np.zeros((40, 50), int)
    places = np.array([(5, 4), (30, 12), (14, 40)])
    markers[tuple(places.T)] = 7, 3, 9
    labels = watershed(np.zeros(markers.shape), markers, np.ones(markers.shape))
    y, x = np.indices(markers.shape)
    distance = np.array([np.hypot(y - cy, x - cx) for cy, cx in places])
    first, second, _ = np.sort(distance, axis=0)
    clear = second - first > 1.5  # a border runs along 4-neighbours
    nearest = np.array([7, 3, 9])[distance.argmin(axis=0)]
    assert np.array_equal(labels[clear], nearest[clear]) and clear.mean() > 0.85


def test_a_pass_goes_to_the_side_that_reaches_it_first():
    relief, markers = np.full((3, 4), 9), np.zeros((3, 4), int)
    relief[1], relief[0, 2], markers[1, [0, 3]] = (1, 4, 5, 2), 0, (7, 3)
    for turn in range(4):
        for view in (np.rot90, lambda a, k: np.rot90(a.T, k)):
            seen = view(relief, turn)
            labels = watershed(seen, view(markers, turn), np.ones(seen.shape))
            assert labels[seen == 0] == 3  # the pit behind pass 5, reached from 2 before from 4


def test_components_do_not_see_each_other():
    relief = relief_of("noise", 5)
    mask = ndimage.gaussian_filter(relief_of("noise", 6), 2) > 0.5
    markers = np.where(relief_of("noise", 7) < 0.01, np.arange(relief.size).reshape(mask.shape), 0)
    relief = raised(relief, markers, mask) * 1000  # the distance adds nothing more
    labels, (components, count) = watershed(relief, markers, mask), ndimage.label(mask)
    alone = [watershed(relief, markers, components == n) for n in range(1, count + 1)]
    empty = [not (markers * (components == n)).any() for n in range(1, count + 1)]
    assert np.array_equal(labels, sum(alone)) and 0 < sum(empty) < count
    assert not labels[np.append(False, empty)[components]].any()


def test_a_marker_of_several_pixels_and_an_empty_mask():
    markers = np.zeros((6, 9), int)
    markers[1:3, 1:3], markers[4, 7] = 5, 2
    labels = watershed(np.zeros((6, 9)), markers, np.ones((6, 9), bool))
    assert np.all(labels[:3, :3] == 5) and labels[4, 7] == 2 and labels.all()
    assert not watershed(np.zeros((6, 9)), markers, np.zeros((6, 9), bool)).any()


def test_no_relief_takes_long():
    side, random = 512, np.random.default_rng(0)
    y, x = np.indices((side, side))
    board = (y + x) % 2 == 0
    full = np.ones((side, side), bool)
    real = ndimage.gaussian_filter(random.normal(size=(side, side)), 4) * 8

    def seconds(foreground, density, **options):
        probability = one_hot(foreground.astype(int), 1)
        start = time.process_time()
        reconstruct(probability, density, **options)
        return time.process_time() - start

    limit = 0.1 + 12 * seconds(full, real)  # measured: 2 to 5 times at this size
    for foreground in (full, board):
        for density in (full, board, random.random(full.shape), x / side):
            for smooth in (0, 1):
                assert seconds(foreground, density, smooth=smooth) < limit


# ---------------------------------------------------------------------------------------- peaks


def test_find_peaks_merges_equal_maxima_within_its_window():
    density = np.zeros((20, 30))
    density[2:4, 3:6] = 0.5  # a plateau
    density[10, 10] = density[12, 12] = 0.9  # two apart: one peak
    density[10, 20] = density[10, 23] = density[13, 20] = 0.9  # three apart: three peaks
    density[17, 3], density[17, 5] = 0.7, 0.8  # the lower is in the higher one's window
    density[0, 29] = 0.25  # at the threshold, not above
    expected = [[2, 3], [10, 10], [10, 20], [10, 23], [13, 20], [17, 5]]
    assert find_peaks(density, threshold=0.25).tolist() == expected
    assert find_peaks(density, threshold=0.24).tolist() == [[0, 29], *expected]
    assert find_peaks(density, min_distance=1).tolist() == sorted([*expected, [12, 12], [17, 3]])
    assert find_peaks(density, min_distance=3, threshold=0.85).tolist() == [[10, 10], [10, 20]]
    assert find_peaks(np.full((5, 5), 0.5)).tolist() == [[0, 0]]


def test_find_peaks_on_wide_maps_are_the_maxima_of_their_windows():
    for width in (1, 63, 64, 256, 1024):
        density = relief_of("noise", width, (33, width)).astype(np.float32)
        peaks = (density == ndimage.maximum_filter(density, 5)) & (density > 0.3)
        assert np.array_equal(find_peaks(density), np.argwhere(peaks))


def plain_reconstruction(marker, mask):
    """Grey-scale reconstruction by dilation, until nothing changes."""
    while not np.array_equal(marker, grown := np.minimum(ndimage.maximum_filter(marker, 3), mask)):
        marker = grown
    return marker


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("h", [0.11, 0.3, 0.7])
def test_prominent_peaks_are_the_maxima_of_a_plain_reconstruction(kind, h):
    for seed in range(5):
        density = relief_of(kind, seed).astype(np.float32).astype(float)
        level = plain_reconstruction(density - h, density)
        lower = plain_reconstruction(np.nextafter(level, -np.inf), level)
        maxima, count = ndimage.label(lower < level, SQUARE)
        peaks = prominent_peaks(density, h)
        found = maxima[tuple(peaks.T)]
        assert sorted(found) == list(range(1, count + 1))  # one in each
        assert np.array_equal(density[tuple(peaks.T)], ndimage.maximum(density, maxima, found))
        assert np.all(np.diff(peaks @ (1000, 1)) > 0)  # scan order


def test_prominence_counts_from_the_pass_and_includes_h():
    density = np.array([[0, 0.5, 0.25, 1, 0.75, 0.875, 0, 0.25, 0]])

    def columns(h):
        return prominent_peaks(density, h)[:, 1].tolist()

    assert columns(0.125) == [1, 3, 5, 7] and columns(0.126) == [1, 3, 7]
    assert columns(0.25) == [1, 3, 7] and columns(0.26) == [3]
    assert columns(1) == [3] and columns(1.01) == []
    assert prominent_peaks(density)[:, 1].tolist() == [1, 3, 7]  # h = 0.15
    assert prominent_peaks(np.eye(4, dtype=np.uint8)).tolist() == [[0, 0]]  # 8-connected, any type
    assert prominent_peaks(np.full((4, 4), 0.7)).shape == (0, 2)


# --------------------------------------------------------------------------------------- nuclei


def test_perfect_maps_give_every_nucleus_and_its_measurements():
    centres = [(9, 40), (20, 10), (20, 23), (45, 30), (45, 42)]  # two pairs touch
    inst_map, type_map, density = discs((60, 57), centres, classes=[1, 2, 3, 2, 1])
    nuclei = reconstruct(one_hot(type_map) * 0.75 + 0.0625 * np.arange(4)[:, None, None], density)
    assert np.array_equal(nuclei.inst_map, inst_map)
    assert nuclei.peaks.tolist() == [list(centre) for centre in centres]
    truth = ndimage.center_of_mass(inst_map, inst_map, range(1, 6))
    assert np.allclose(nuclei.centroids, truth)
    assert nuclei.classes.tolist() == [1, 2, 3, 2, 1]
    assert np.allclose(nuclei.probabilities, 0.75 + 0.0625 * nuclei.classes)
    assert nuclei.areas.tolist() == np.bincount(inst_map.ravel())[1:].tolist()
    assert nuclei.boxes[0].tolist() == [3, 34, 16, 47]
    assert [field.dtype.name for field in nuclei] == [
        "int32", "int64", "float64", "int64", "float32", "int64", "int64"]
    summed = reconstruct(one_hot(type_map), density, combine="sum", h=0.35)
    assert np.array_equal(summed.inst_map, inst_map)
    clipped = reconstruct(one_hot(type_map), density * 2, combine="sum", h=0.35)
    assert len(clipped.areas) == 3  # lower above the pass
    assert len(reconstruct(one_hot(type_map), density * 0.5, combine="sum", h=0.6).areas) == 0


def test_foreground_is_where_the_background_is_less_probable_than_one_half():
    probability = np.zeros((3, 12, 40), np.float32)
    probability[:, :, :10] = np.reshape((0.4, 0.35, 0.25), (3, 1, 1))  # not the most probable
    probability[:, :, 10:20] = np.reshape((0.49, 0.1, 0.41), (3, 1, 1))
    probability[0, :, 20:] = 0.5
    density = np.zeros((12, 40))
    density[5, [4, 15, 30]] = 1
    nuclei = reconstruct(probability, density, smooth=0)
    assert np.array_equal(nuclei.inst_map > 0, np.broadcast_to(np.arange(40) < 20, (12, 40)))
    assert nuclei.classes.tolist() == [1, 2]
    assert np.allclose(nuclei.probabilities, [0.35, 0.41])


def test_empty_tile_one_pixel_and_all_foreground():
    empty = reconstruct(one_hot(np.zeros((7, 5), int)), np.ones((7, 5)))
    shapes = [(7, 5), (0, 2), (0, 2), (0,), (0,), (0,), (0, 4)]
    assert not empty.inst_map.any() and [field.shape for field in empty] == shapes
    assert reconstruct([[[0.0]], [[0.2]], [[0.8]]], [[1.0]], min_size=1).classes.tolist() == [2]
    density = discs((40, 50), [(10, 10), (30, 40)])[2]
    everywhere = one_hot(np.ones((40, 50), int))
    full = reconstruct(everywhere, density)
    assert full.areas.sum() == 2000 and len(full.areas) == 2
    assert len(reconstruct(everywhere, density * 0).areas) == 0


def test_debris_lone_pixels_and_peaks_on_background_are_dropped():
    type_map, density = discs((40, 60), [(10, 10), (10, 30), (30, 10)])[1:]
    type_map[4:17, 4:17], type_map[25:36, 5:16] = 0, 0  # of the third a rim remains
    type_map[9:12, 9:12] = 1  # of the first 9 pixels
    probability = one_hot(type_map)
    nuclei = reconstruct(probability, density, min_size=9)
    assert nuclei.peaks.tolist() == [[10, 10], [10, 30]] and nuclei.areas[0] == 9
    nuclei = reconstruct(probability, density)
    assert nuclei.peaks.tolist() == [[10, 30]] and nuclei.inst_map.max() == 1
    assert len(reconstruct(probability, density, min_size=0).areas) == 2
    spike = (np.indices((9, 9)) == 4).all(axis=0) * 1.0
    everywhere = one_hot(np.ones((9, 9), int))
    assert len(reconstruct(everywhere, spike).areas) == 0  # smoothed to 0.16
    assert len(reconstruct(everywhere, spike, smooth=0).areas) == 1


def test_peaks_are_taken_as_the_defaults_say():
    density = np.zeros((20, 40))
    density[5, [5, 15, 25, 28]] = 0.31, 0.29, 0.5, 0.5
    density[15, [10, 30]] = 0.16, 0.14
    everywhere = one_hot(np.ones(density.shape, int))
    highest = [[5, 5], [5, 25], [5, 28]]  # threshold 0.3, min_distance 2; for the sum, h 0.15
    for combine, peaks in (("max", highest), ("sum", sorted([*highest, [5, 15], [15, 10]]))):
        nuclei = reconstruct(everywhere, density, combine=combine, smooth=0)
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
    assert np.isnan(measure(inst_map, type_map, peaks=peaks).probabilities).all()
    with pytest.raises(ValueError, match="holds id 3 but there are 2 peaks; pass one an id"):
        measure(inst_map, type_map, peaks=np.zeros((2, 2)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.uint64])
def test_label_maps_of_any_integers_are_measured(dtype):
    inst_map = np.zeros((40, 30), np.int64)
    inst_map[3:9, 25:], inst_map[10:15, :4], inst_map[30, 8:20] = 1, 2, 255  # ids at both sides
    peaks, probability = np.zeros((255, 2)), np.random.default_rng(0).random((2, 40, 30))
    expected, found = (measure(labels, inst_map > 0, peaks=peaks, class_probability=probability)
                       for labels in (inst_map, inst_map.astype(dtype)))
    for a, b in zip(expected, found):
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@pytest.mark.parametrize("smooth", [0, 1])
def test_windows_with_a_halo_give_the_same_nuclei(smooth):
    type_map, density = tissue(1)
    probability = one_hot(type_map)

    def found(core, halo):
        nuclei = {}
        for start in np.ndindex(*[-(-240 // core)] * 2):
            low, high = np.multiply(start, core), np.add(start, 1) * core
            origin = np.maximum(low - halo, 0)
            window = tuple(map(slice, origin, high + halo))
            tile = reconstruct(probability[:, *window], density[window], smooth=smooth)
            for row, peak in enumerate(tile.peaks + origin):
                if np.all((low <= peak) & (peak < high)):
                    pixels = np.argwhere(tile.inst_map == row + 1) + origin
                    nuclei[tuple(peak)] = tile.classes[row], pixels.tolist()
        return nuclei

    assert found(80, 50) == found(97, 61) == found(240, 0) and len(found(240, 0)) > 60


ONES = np.ones((4, 5))


@pytest.mark.parametrize("message, probability, density, options", [
    (r"class_probability is \(4, 5\); expected \(K\+1, H, W\), background first", ONES, ONES, {}),
    (r"is \(1, 4, 5\); expected \(K\+1, H, W\)", ONES[None], ONES, {}),
    (r"density is \(5, 4\); expected \(4, 5\), as class_prob", np.ones((2, 4, 5)), ONES.T, {}),
    (r"shape \(0, 5\); expected \(H, W\)", np.ones((2, 0, 5)), ONES[:0], {}),
    ("20 values that are not finite; check", np.ones((2, 4, 5)), ONES * np.nan, {}),
    ("combine is 'mean'; expected 'max' or 'sum'", np.ones((2, 4, 5)), ONES, {"combine": "mean"}),
    ("min_distance is 0; expected at least 1", np.ones((2, 4, 5)), ONES, {"min_distance": 0}),
])
def test_errors_say_what_was_expected(message, probability, density, options):
    with pytest.raises(ValueError, match=message):
        reconstruct(probability, density, **options)


def test_density_map_and_peaks_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="combine is 'mean'; expected 'max' or 'sum'"):
        density_map([(1, 1)], (8, 8), combine="mean")
    for peaks in (find_peaks, prominent_peaks):
        with pytest.raises(ValueError, match=r"density has shape \(1, 4, 5\); expected \(H, W\)"):
            peaks(ONES[None])


def test_the_file_works_alone(tmp_path):
    shutil.copy(postprocess.__file__, tmp_path)
    code = ("import sys, numpy, postprocess; postprocess.reconstruct([[[0.0]], [[1.0]]], [[1.0]]);"
            "assert not {'torch', 'PIL', 'skimage'} & set(sys.modules)")
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
