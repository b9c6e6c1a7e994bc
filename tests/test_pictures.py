"""pictures.py: windows, resampling, what OpenSlide is asked for, bounds, resolution, bad slides."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import pictures
from data import synthetic_tissue
from pictures import Picture, array_level, open_picture
from postprocess import measure

SIDES = 300, 390


def tissue_with_glass():
    """Synthetic tissue of 150 x 260 with glass around: (300, 390, 3) uint8."""
    image = np.full((*SIDES, 3), 245, np.uint8)
    image[60:210, 40:300] = synthetic_tissue(10, (150, 260))[0]
    return image


class FakeSlide:
    """What OpenSlide shows of an image at levels 1 and 4, without its library."""

    properties = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}
    vendor = "fake"
    broken = False

    def __init__(self, path):
        image = Image.fromarray(tissue_with_glass()).convert("RGBA")
        self.levels = [image, image.reduce(4)]
        self.level_dimensions = [level.size for level in self.levels]
        self.level_downsamples = [1.0, 4.0]

    def read_region(self, location, level, size):
        if self.broken:
            raise OSError("JPEG ended early")
        x, y = (round(side / self.level_downsamples[level]) for side in location)
        return self.levels[level].crop((x, y, x + size[0], y + size[1]))

    @classmethod
    def detect_format(cls, path):
        return cls.vendor if path.stat().st_size else None


@pytest.fixture
def openslide(monkeypatch):
    """An OpenSlide that knows every file."""
    module = SimpleNamespace(OpenSlide=type("Copy", (FakeSlide,), {}))
    monkeypatch.setitem(sys.modules, "openslide", module)
    return module.OpenSlide


@pytest.fixture
def slide(tmp_path, openslide):
    path = tmp_path / "slide.svs"
    path.write_bytes(b"a slide")
    return path


# ---------------------------------------------------------------- windows


def test_an_array_is_a_picture_of_itself():
    image = tissue_with_glass()
    picture = Picture([array_level(image)], mpp=0.25)
    picture.resample_to(0.26)  # the same but for 4 %
    assert picture.shape == image.shape and not picture.resampled and not picture.large
    assert np.shares_memory(picture[5:20, 7:9], image)
    assert np.array_equal(picture[5:20, 7:9], image[5:20, 7:9]) and picture.load() is not None


def test_windows_do_not_depend_on_the_grid(slide):
    for wanted, zoomed in ((0.25, 2), (0.5, 1), (1.0, 0.5), (2.5, 0.2)):
        picture = open_picture(slide)
        picture.resample_to(wanted)
        h, w, _ = picture.shape
        assert (h, w) == tuple(round(side * zoomed) for side in SIDES)
        whole, part = picture[0:h, 0:w], picture[h // 3:h - 5, w // 3:w - 5]
        assert whole.shape == picture.shape
        difference = whole[h // 3:h - 5, w // 3:w - 5].astype(int) - part
        assert np.abs(difference).max() <= 4  # Pillow rounds


@pytest.mark.parametrize("wanted", [0.25, 0.4, 1.0, 1.3])
def test_resampling_does_not_shift(wanted):
    """The centre of a symmetric picture stays its centre, in all windows."""
    y, x = np.mgrid[:101, :141]
    image = np.uint8(255 * np.exp(-((y - 50) ** 2 + (x - 70) ** 2) / 400))[..., None].repeat(3, 2)
    picture = Picture([array_level(image)], mpp=0.5)
    picture.resample_to(wanted)
    h, w, _ = picture.shape
    light = np.zeros((h, w))
    for top in range(0, h, 40):
        for left in range(0, w, 40):
            seen = picture[top:min(top + 40, h), left:min(left + 40, w)]
            light[top:top + 40, left:left + 40] = seen[..., 0]
    for axis, side in ((1, h), (0, w)):
        profile = light.sum(axis)
        centre = (profile @ np.arange(side)) / profile.sum()
        assert abs(centre - (side - 1) / 2) < 0.05


@pytest.mark.parametrize("scale", [0.5, 2.0, 1.7])
def test_coordinates_are_those_of_the_picture(scale):
    inst_map = np.zeros((30, 40), np.int32)
    inst_map[10:20, 12:18] = 1
    nuclei = measure(inst_map, inst_map, peaks=[(14, 15)])
    full = round(100 * scale), round(120 * scale)
    picture = Picture([array_level(np.zeros((*full, 3), np.uint8))], mpp=0.25 / scale)
    picture.resample_to(0.25)
    assert picture.shape == (100, 120, 3)
    origin, scaled = picture.to_own_pixels((32, 64), nuclei)
    expected = np.array([42.0, 76.0, 52.0, 82.0]) * scale  # the box, in the picture's pixels
    assert np.abs(scaled.boxes[0] + np.tile(origin, 2) - expected).max() <= 1
    assert np.abs(scaled.peaks[0] + origin + 0.5 - np.array([46.5, 79.5]) * scale).max() <= 1
    assert scaled.areas[0] == pytest.approx(60 * scale**2, rel=0.2)
    assert scaled.classes.tolist() == [1]


def test_halved_nuclei_keep_their_place_and_size_on_average():
    rng = np.random.default_rng(0)
    picture = Picture([array_level(np.zeros((500, 500, 3), np.uint8))], mpp=0.5)
    picture.resample_to(0.25)
    y, x = np.ogrid[:1000, :1000]
    shifts, sizes = [], []
    for _ in range(60):
        centre, radii = rng.uniform(20, 80, 2), rng.uniform(8, 15, 2)
        inst_map = np.int32(((y[:100] - centre[0]) / radii[0]) ** 2
                            + ((x[:, :100] - centre[1]) / radii[1]) ** 2 < 1)
        nuclei = measure(inst_map, inst_map, peaks=[centre.round()])
        _, halved = picture.to_own_pixels((0, 0), nuclei)
        shifts.append(halved.centroids[0] - ((nuclei.centroids[0] + 0.5) / 2 - 0.5))
        sizes.append(4 * halved.areas[0] / nuclei.areas[0])
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.02
    assert np.mean(sizes) == pytest.approx(1, abs=0.01)


def test_tiles_of_glass_are_not_looked_at():
    picture = Picture([array_level(tissue_with_glass())])
    tissue = []
    for y in range(0, 300, 96):
        for x in range(0, 390, 96):
            if picture.has_tissue((y, x, min(y + 96, 320), min(x + 96, 416))):
                tissue.append((y, x))
    assert tissue == [(y, x) for y in (0, 96, 192) for x in (0, 96, 192, 288)]
    assert picture.pixels_in([(0, 0, 96, 96), (288, 384, 320, 416)]) == 96 * 96 + 12 * 6
    blank = Picture([array_level(np.full((300, 390, 3), 240, np.uint8))])
    assert not blank.has_tissue((0, 0, 320, 416))


# ---------------------------------------------------------------- files


def test_the_bounds_of_a_slide_are_the_picture(slide, openslide):
    openslide.properties = openslide.properties | {
        "openslide.bounds-x": "40", "openslide.bounds-y": "60",
        "openslide.bounds-width": "260", "openslide.bounds-height": "150"}
    picture = open_picture(slide)
    assert picture.full == (150, 260)
    scanned = tissue_with_glass()[60:210, 40:300]
    assert np.array_equal(picture[0:150, 0:260], scanned)
    assert np.array_equal(picture.load(), scanned)
    picture = open_picture(slide)
    picture.resample_to(2.0)  # from the second level
    expected = scanned.reshape(-1, 2, 65, 4, 3).mean((1, 3)).reshape(75, 65, 3)[::2]
    seen = picture[0:37, 0:64].astype(int)
    assert np.abs(seen - expected[:37, :64]).mean() < 12

    # Bounds beyond the slide are nonsense.
    openslide.properties = openslide.properties | {"openslide.bounds-width": "600"}
    assert open_picture(slide).full == SIDES


@pytest.mark.parametrize("properties, mpp", [
    ({"openslide.mpp-x": "0.499", "openslide.mpp-y": "0.501"}, 0.5),
    ({"openslide.mpp-x": "1000", "openslide.mpp-y": "1000"}, None),  # vips
    ({"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"}, None),  # 72 dpi
    ({"openslide.mpp-x": "nan", "openslide.mpp-y": "0.25"}, None),
    ({"openslide.mpp-x": "0,25", "openslide.mpp-y": "0,25"}, None),
    ({}, None),
])
def test_a_plausible_resolution_of_a_slide_is_believed(slide, openslide, properties, mpp):
    openslide.properties = properties
    picture = open_picture(slide)
    assert picture.mpp == mpp and picture.source == ("the slide" if mpp else "")


def test_openslide_is_asked_for_every_tiff_and_left_out_of_small_plain_ones(
        tmp_path, openslide, monkeypatch):
    path = tmp_path / "a.tif"
    Image.fromarray(tissue_with_glass()[:50, :50]).save(path, dpi=(50800, 50800))
    picture = open_picture(path)
    assert picture.full == SIDES and picture.source == "the slide"  # a scanner's
    openslide.vendor = "generic-tiff"
    picture = open_picture(path)
    assert picture.full == (50, 50) and picture.mpp == pytest.approx(0.5, rel=0.01)
    assert picture.source not in ("", "the slide") and not pictures.is_large(path)
    monkeypatch.setattr(pictures, "LARGE", 2000)
    assert open_picture(path).full == SIDES and pictures.is_large(path)
    openslide.vendor = None
    assert open_picture(path).full == (50, 50) and pictures.is_large(path)


def test_what_pillow_cannot_read_goes_to_openslide(tmp_path, openslide):
    openslide.vendor = "generic-tiff"
    (tmp_path / "a.tif").write_bytes(b"MM\0\x2b damaged or BigTIFF")
    assert open_picture(tmp_path / "a.tif").full == SIDES
    for suffix in (".dcm", ".czi", ".qptiff", ".mrxs", ".ndpi", ".scn", ".bif", ".vms"):
        assert suffix in pictures.SLIDE_SUFFIXES


def test_an_array_on_disk_is_a_picture(tmp_path):
    np.save(tmp_path / "a.npy", tissue_with_glass())
    picture = open_picture(tmp_path / "a.npy")
    assert picture.full == SIDES and picture.mpp is None
    assert not pictures.is_large(tmp_path / "a.npy")
    assert np.array_equal(picture[50:70, 30:50], tissue_with_glass()[50:70, 30:50])


def test_notes_of_a_slide_are_those_of_an_image(slide, openslide, monkeypatch):
    assert open_picture(slide).notes == []
    grey = Image.fromarray(tissue_with_glass()).convert("L").convert("RGBA")
    monkeypatch.setattr(openslide, "read_region",
                        lambda self, location, level, size: grey.crop((0, 0, *size)))
    assert any("grey" in note for note in open_picture(slide).notes)


def test_bad_slides_end_in_a_sentence(slide, openslide, monkeypatch, tmp_path):
    openslide.broken = True
    with pytest.raises(ValueError, match="slide.svs: .*JPEG ended early.* copy it again"):
        open_picture(slide)
    slide.write_bytes(b"")
    with pytest.raises(ValueError, match="slide.svs: not a slide that OpenSlide knows"):
        open_picture(slide)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ValueError, match="pip install openslide-python openslide-bin"):
        open_picture(slide)
    assert not pictures.is_large(slide)
    np.save(tmp_path / "grey.npy", np.zeros((5, 5)))
    with pytest.raises(ValueError, match=r"expected uint8 \(height, width, 3\)"):
        open_picture(tmp_path / "grey.npy")
    with pytest.raises(FileNotFoundError, match="none.png: no such image"):
        open_picture(tmp_path / "none.png")
