"""crops.py: targets at the network's resolution, windows, turns, zoom, stain, where crops lie."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import crops as module
from crops import Crops, View, cut, nearest, prepare, random_affine, random_stain, reflect, warp
from data import CONSEP_CLASSES, UNKNOWN_CLASS, Source, open_source
from postprocess import centroids_of

SAME = np.arange(256, dtype=np.uint8)  # a lookup that keeps all classes


def disc(shape, y, x, radius):
    """(H, W) bool; (y, x) counts in pixel indices."""
    rows, columns = np.indices(shape)
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def tile_of(centers, shape=(96, 96), radius=6, classes=None):
    """Dark discs on white, as `Source.read` gives them."""
    inst_map = np.zeros(shape, np.int32)
    type_map = np.zeros(shape, np.uint8)
    for number, (y, x) in enumerate(centers, 1):
        inside = disc(shape, y, x, radius)
        inst_map[inside] = number
        type_map[inside] = classes[number - 1] if classes else 1
    image = np.where(inst_map > 0, 40, 230).astype(np.uint8)
    return np.repeat(image[..., None], 3, axis=2), inst_map, type_map


def source_of(*tiles, class_names=("a", "b"), mpp=0.25):
    """A source that holds the tiles in memory."""
    names = [f"tile{i}" for i in range(len(tiles))]
    return Source(names, class_names, tiles.__getitem__, None, mpp)


def sample_of(tile, mpp=0.25, own_mpp=0.25, sigma=5.0):
    return prepare(source_of(tile, mpp=own_mpp), 0, SAME, mpp, sigma, "max")


def width_of_peak(density):
    """Sigma of a lone Gaussian peak, from the area above one half: 2π ln(2) σ²."""
    return np.sqrt((density > 0.5).sum() / (2 * np.pi * np.log(2)))


# ---------------------------------------------------------------- one image


def test_targets_of_an_image():
    tile = tile_of([(20, 30), (60, 70)], classes=[2, UNKNOWN_CLASS])
    sample = sample_of(tile)
    assert np.array_equal(sample.image, tile[0]) and np.array_equal(sample.type_map, tile[2])
    assert sample.density[20, 30] == sample.density[60, 70] == 255
    assert sample.density[40, 50] < 5
    assert sample.centroids.tolist() == [[20, 30], [60, 70]]
    assert sample.classes.tolist() == [2, UNKNOWN_CLASS]
    empty = sample_of(tile_of([]))
    assert not empty.density.any() and empty.centroids.shape == (0, 2)


def test_at_half_the_resolution_nothing_shifts_and_sigma_is_what_is_asked_for():
    centers = [(y, x) for y in range(20, 180, 35) for x in range(20, 210, 35)]  # odd and even
    tile = tile_of(centers, shape=(200, 220))
    sample = sample_of(tile, mpp=0.5, own_mpp=0.25, sigma=2.5)
    assert sample.image.shape == (100, 110, 3) and sample.type_map.shape == (100, 110)
    expected = (np.array(centers) + 0.5) / 2 - 0.5  # centres of pixels meet
    assert np.allclose(sample.centroids, expected, atol=1e-9)
    shifts = []
    for y, x in expected:
        # the peak, the labels and the picture, each measured on its own
        box = np.indices((100, 110))[:, int(y) - 6:int(y) + 8, int(x) - 6:int(x) + 8]
        peak = sample.density[tuple(box)]
        top = box[:, peak == 255].mean(axis=1)
        labels = box[:, sample.type_map[tuple(box)] > 0].mean(axis=1)
        darkness = 230.0 - sample.image[tuple(box)][..., 0]
        picture = (box * darkness).sum(axis=(1, 2)) / darkness.sum()
        assert np.abs(top - (y, x)).max() <= 0.5
        assert np.abs(labels - (y, x)).max() < 0.3 and np.abs(picture - (y, x)).max() < 0.05
        assert width_of_peak(peak / 255) == pytest.approx(2.5, rel=0.1)
        shifts.append(labels - (y, x))
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.05


def test_a_small_difference_of_resolution_is_left_alone():
    tile = tile_of([(20, 30)])
    assert sample_of(tile, mpp=0.25, own_mpp=0.26).image is tile[0]
    assert sample_of(tile, mpp=0.25, own_mpp=0.5).image.shape == (192, 192, 3)


def test_nearest_pixels_of_two_that_are_as_near_take_turns():
    assert nearest(4, 8).tolist() == [1, 2, 5, 6]  # the mirror image of itself
    assert nearest(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest(3, 9).tolist() == [1, 4, 7] and nearest(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_windows_are_reflected_outside_however_often():
    array = np.arange(48).reshape(6, 8)
    image = np.repeat(array[..., None], 3, axis=2)
    window, large = cut([array, image], -3, -2, 11, 14)
    assert np.array_equal(window, np.pad(array, ((3, 2), (2, 4)), mode="reflect"))
    assert np.array_equal(large[..., 1], window)
    assert np.array_equal(cut([array], 1, 2, 3, 4)[0], array[1:4, 2:6])
    assert np.array_equal(cut([array[:1, :1]], -5, -5, 9, 9)[0], np.zeros((9, 9)))
    assert reflect(-4, 9, 3).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0]


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("zoom", [0.75, 1.0, 1.3])
@pytest.mark.parametrize("angle", [0.0, 0.6])
def test_a_peak_stays_on_its_nucleus_and_keeps_its_width(zoom, angle):
    y, x = 157, 144
    sample = sample_of(tile_of([(y, x)], shape=(320, 310), radius=8))
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.array([[c, -s], [s, c]]) / zoom
    center = np.array((160.5, 150.5))
    image, type_map, density = warp(sample, View(center, matrix, zoom), 128)
    assert image.shape == (128, 128, 3) and type_map.dtype == np.uint8
    assert density.dtype == np.float32
    expected = np.linalg.solve(matrix, (y + 0.5, x + 0.5) - center) + 64 - 0.5
    found = centroids_of((type_map > 0).astype(int))[0]
    top = np.argwhere(density == density.max()).mean(axis=0)
    dark = np.argwhere(image[..., 0] < 135).mean(axis=0)
    for place in (found, top, dark):
        assert np.abs(place - expected).max() < 0.6
    assert density.max() > 0.97
    assert width_of_peak(density) == pytest.approx(5, rel=0.05)
    assert (type_map > 0).sum() == pytest.approx(np.pi * 64 * zoom**2, rel=0.05)


def test_quarter_turns_resample_nothing(tissue):
    source = source_of(tissue, class_names=CONSEP_CLASSES)
    crops = Crops([(source, [0], 1.0)], CONSEP_CLASSES, crop=64,
                  geometry={"scale": 1.0, "aspect": 1.0, "turn": 0.0})
    crops.load()
    whole = crops.sample(0, 0)
    seen = set()
    for n in range(40):
        _, _, _, view = crops.draw(n)
        plain = warp(whole, View(view.center, np.eye(2), 1.0), 64)
        y, x = (view.center - 32).astype(int)
        pixels = cut([whole.image], y, x, 64, 64)[0]
        assert np.array_equal(plain[0], pixels)  # not even the plain window is
        turned = warp(whole, view, 64)
        matches = []
        for k in range(8):
            form = [np.rot90(part if k < 4 else part[::-1], k) for part in plain]
            equal = [np.array_equal(a, b) for a, b in zip(form, turned)]
            matches.append(all(equal))
        assert any(matches)
        seen.add(matches.index(True))
    assert len(seen) == 8  # four turns, mirrored or not


def test_random_affine_stays_within_its_limits():
    rng = np.random.default_rng(0)
    drawn = [random_affine(rng, scale=1.3, aspect=1.08, turn=0.7) for _ in range(400)]
    zooms = np.array([zoom for _, zoom in drawn])
    areas = np.array([abs(np.linalg.det(matrix)) for matrix, _ in drawn])
    assert zooms.min() < 0.8 and zooms.max() > 1.25 and np.abs(np.log(zooms)).max() <= np.log(1.3)
    assert np.allclose(areas, zooms**-2)  # the stretch changes no area
    plain = [abs(matrix).round(9).tolist() in ([[1, 0], [0, 1]], [[0, 1], [1, 0]])
             for matrix, _ in drawn]
    assert 0.15 < np.mean(plain) < 0.27  # 0.3 * 0.7 of them
    mirrored = np.mean([np.linalg.det(matrix) < 0 for matrix, _ in drawn])
    assert 0.4 < mirrored < 0.6


def test_stain_of_nothing_changes_nothing_and_more_of_it_is_darker(tissue):
    image = tissue[0]
    nothing = {"stain": 0, "shift": 0, "blur": 0, "noise": 0}
    same = random_stain(image, np.random.default_rng(0), **nothing)
    assert np.abs(same.astype(int) - image).max() <= 1 and same.dtype == np.uint8

    class Extreme:
        """A generator whose every draw is the upper end."""

        def uniform(self, low, high, size=None):
            return np.full(size, high) if size else high

        def random(self):
            return 1.0

    darker = random_stain(image, Extreme(), **nothing | {"stain": 0.25})
    assert darker.mean() < image.mean() - 5
    assert random_stain(image, Extreme(), **nothing | {"shift": 0.07}).mean() < image.mean() - 5


def test_blur_and_noise_happen_as_often_as_asked(tissue):
    image = tissue[0][:64, :64]
    off = {"stain": 0, "shift": 0, "blur": 0, "noise": 0}

    def roughness(options):
        stained = random_stain(image, np.random.default_rng(3), **off | options).astype(int)
        return np.abs(np.diff(stained, axis=0)).mean()

    assert roughness({"blur": 1}) < roughness({}) < roughness({"noise": 1})


# ---------------------------------------------------------------- crops


def make_crops(seed=0, crop=64, size=128, count=3, **options):
    source = open_source("synthetic", count=count, size=size)
    crops = Crops([(source, range(count), 1.0)], source.class_names, crop=crop, seed=seed,
                  geometry={}, color={}, **options)
    crops.load()
    return crops


def test_a_crop_depends_on_seed_and_number_alone():
    crops, other = make_crops(), make_crops(seed=1)
    again = pickle.loads(pickle.dumps(crops))  # as a worker process receives it
    assert crops.cache and not again.cache  # images are not sent along
    crops[3]
    for a, b in zip(crops[7], again[7]):
        assert torch.equal(a, b)
    assert not torch.equal(crops[7][0], other[7][0])
    image, type_map, density = crops[7]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    assert type_map.shape == (64, 64) and type_map.dtype == torch.uint8
    assert density.shape == (1, 64, 64) and density.dtype == torch.float32
    assert crops.name(7) in crops.sources[0].names


def test_worker_processes_give_the_same_and_may_be_spawned():
    crops = make_crops(crop=32, size=64, count=2)
    alone = list(DataLoader(crops, 2, sampler=range(4)))
    spawned = DataLoader(crops, 2, sampler=range(4), num_workers=1,
                         multiprocessing_context="spawn")
    for a, b in zip(alone, spawned, strict=True):
        assert all(map(torch.equal, a, b))


def test_images_are_read_once_in_several_processes_too():
    done = []
    alone, pooled = make_crops(size=64), make_crops(size=64)
    pooled.cache.clear()
    pooled.load(workers=2, progress=lambda *numbers: done.append(numbers))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert pooled.shapes[0].tolist() == [[64, 64]] * 3 and pooled.pixels() == 3 * 64 * 64
    assert np.array_equal(alone.nuclei[0], pooled.nuclei[0])
    for key, sample in alone.cache.items():
        assert np.array_equal(sample.density, pooled.cache[key].density)


def test_an_image_that_does_not_fit_into_memory_is_read_again(monkeypatch):
    read = []
    tiles = [tile_of([(20, 30)]), tile_of([(50, 60)])]

    def reading(i):
        read.append(i)
        return tiles[i]

    source = Source(["x", "y"], ["a", "b"], reading)
    crops = [Crops([(source, [0, 1], 1.0)], ["a", "b"], crop=32, geometry={}, color={})
             for _ in range(2)]
    crops[0].load()
    assert read == [0, 1]
    expected = [crops[0][n] for n in range(6)]
    assert read == [0, 1]

    one = sum(array.nbytes for array in crops[0].cache[0, 0])
    monkeypatch.setattr(module, "CACHE_BYTES", one)  # room for one of two
    crops[1].load()
    assert list(crops[1].cache) == [(0, 0)]
    read.clear()
    for n in range(6):
        assert all(map(torch.equal, crops[1][n], expected[n]))
    assert set(read) == {1} and list(crops[1].cache) == [(0, 0)]


def test_shares_say_how_often_a_part_is_taken():
    a, b = source_of(tile_of([(20, 30)])), source_of(tile_of([(20, 30)]))
    crops = Crops([(a, [0], 3.0), (b, [0], 1.0)], ["a", "b"], crop=32)
    crops.load()
    assert crops.shares.tolist() == [0.75, 0.25]
    parts = [crops.draw(n)[1] for n in range(300)]
    assert 0.18 < np.mean(parts) < 0.32


def test_large_images_are_taken_more_often():
    small, large = tile_of([(20, 30)], shape=(64, 64)), tile_of([(20, 30)], shape=(192, 192))
    crops = Crops([(source_of(small, large), [0, 1], 1.0)], ["a", "b"], crop=32)
    crops.load()
    taken = [crops.draw(n)[2] for n in range(200)]
    assert 0.83 < np.mean(taken) < 0.97  # 9 of 10


def test_rare_classes_are_looked_for_as_often_as_asked():
    centers = [(y, x) for y in range(20, 400, 40) for x in range(20, 400, 40)]
    classes = [1] * len(centers)
    classes[55] = 2
    classes[7] = UNKNOWN_CLASS  # is never looked for
    tile = tile_of(centers, shape=(400, 400), classes=classes)
    parts = [(source_of(tile), [0], 1.0)]
    lone = np.array(centers[55]) + 0.5

    def near(**options):
        crops = Crops(parts, ["a", "b"], crop=64, **options)
        crops.load()
        offsets = np.array([crops.draw(n)[3].center - lone for n in range(300)])
        return np.mean((np.abs(offsets) <= 0.4 * 64 + 0.5).all(axis=1))

    assert near() < 0.06
    assert 0.45 < near(rare=1.0) < 0.6
    assert 0.85 < near(rare=1.0, rare_shares=[0.1, 0.9]) < 0.97
    assert near(rare=1.0, rare_shares=[1.0, 0.0]) < 0.06

    # a set that knows one class is taken anywhere
    only = source_of(tile_of(centers, shape=(400, 400)))
    crops = Crops([(only, [0], 1.0)], ["a", "b"], crop=64, rare=1.0)
    crops.load()
    assert crops.pick_rare(np.random.default_rng(0), 0) is None


def test_classes_are_counted_with_the_unknown():
    tile = tile_of([(20, 30), (60, 30), (60, 70)], classes=[1, 1, UNKNOWN_CLASS])
    outlines = source_of(tile_of([(20, 30)]), class_names=["nucleus"])
    crops = Crops([(source_of(tile), [0], 1.0), (outlines, [0], 1.0)], ["a", "b"], crop=96)
    crops.load()
    assert crops.class_counts() == ({"a": 2, "b": 0}, 2)
    frequency = crops.class_frequency(samples=8)
    assert frequency.shape == (3,) and frequency.sum() == pytest.approx(1)
    assert frequency[0] > 0.9 and frequency[1] > 0 and frequency[2] == 0
    one = Crops([(source_of(tile), [0], 1.0)], ["nucleus"], crop=96)
    one.load()
    assert one.class_counts() == ({"nucleus": 3}, 0)


def test_an_image_that_is_not_understood_stops_the_loading():
    def read(i):
        raise ValueError("t.png: no label")

    crops = Crops([(Source(["t"], ["a"], read), [0], 1.0)], ["a"], crop=32)
    with pytest.raises(ValueError, match="t.png: no label"):
        crops.load()
    with pytest.raises(ValueError, match="class 'c' is not among a, b"):
        Crops([(source_of(class_names=["c"]), [], 1.0)], ["a", "b"], crop=32)
