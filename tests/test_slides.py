"""slides.py: reading, resampling, tiles that survive a kill, several processes, and bad slides."""

import csv
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import infer
import slides
from data import synthetic_tissue
from slides import rescale
from metrics import compare
from postprocess import measure

TILING = ["--tile", "96", "--halo", "32", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Synthetic tissue of 150 x 260 with glass around, as picture.png and .npy; its folder."""
    folder = tmp_path_factory.mktemp("slides")
    image = np.full((300, 390, 3), 245, np.uint8)
    image[60:210, 40:300] = synthetic_tissue(10, (150, 260))[0]
    Image.fromarray(image).save(folder / "picture.png")
    np.save(folder / "picture.npy", image)
    return folder


def run(*words):
    return infer.main([*map(str, words), *TILING])


def table(folder, stem="picture"):
    with open(folder / f"{stem}_nuclei.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.jsonl"}


@pytest.fixture(scope="module")
def whole(picture, tmp_path_factory):
    """What the slide of `picture` gives in one go."""
    out = tmp_path_factory.mktemp("whole")
    assert run(picture / "picture.npy", "--out", out,
               "--formats", "csv", "geojson", "overlay", "npy") == 0
    return out


def test_a_slide_has_the_nuclei_of_the_image(picture, whole, tmp_path):
    assert run(picture / "picture.png", "--out", tmp_path, "--formats", "csv", "npy") == 0
    maps = [np.load(folder / "picture_instances.npy") for folder in (tmp_path, whole)]
    assert len(table(whole)) > 15 and maps[1].dtype == np.int32 and maps[1].shape == (300, 390)
    pair = compare(*maps)
    assert (pair.iou > 0.9).sum() >= 0.97 * max(len(pair.true_area), len(pair.pred_area))
    rows, areas = table(whole), np.bincount(maps[1].ravel())[1:]  # differ where nuclei overlap
    assert [int(row["id"]) for row in rows] == list(range(1, len(areas) + 1))
    assert np.mean([int(row["area_px"]) == area for row, area in zip(rows, areas)]) > 0.9
    features = json.loads((whole / "picture_nuclei.geojson").read_text())["features"]
    assert len({feature["id"] for feature in features}) == len(features) == len(rows)
    for row, feature in zip(rows, features):
        x, y = np.array(feature["geometry"]["coordinates"][0]).T
        assert (x.min() < float(row["x"]) + 0.5 < x.max()
                and y.min() < float(row["y"]) + 0.5 < y.max())
    with Image.open(whole / "picture_overlay.png") as overlay:
        assert overlay.width == 390 and overlay.height > 300
    assert {path.name for path in whole.iterdir()} == {
        "run.jsonl", *(f"picture_{name}" for name in (
            "nuclei.csv", "nuclei.geojson", "overlay.png", "instances.npy"))}


def test_a_killed_slide_goes_on_and_ends_the_same(picture, whole, tmp_path, monkeypatch):
    save, saved = slides.save_tile, []

    def power_cut(path, core, *rest):
        saved.append(core)
        if len(saved) == 4:
            raise KeyboardInterrupt
        save(path, core, *rest)

    words = (picture / "picture.npy", "--out", tmp_path,
             "--formats", "csv", "geojson", "overlay", "npy")
    monkeypatch.setattr(slides, "save_tile", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["run.jsonl"]
    assert run(*words) == 0
    assert saved.count(saved[3]) == 2 and len(set(saved)) == len(saved) - 1
    assert outputs(tmp_path) == outputs(whole)


def test_two_processes_write_what_one_writes(picture, whole, root, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", root / "infer.py"]
    words = [picture, "--out", tmp_path, "--formats", "csv", "geojson", "overlay", "npy", *TILING]
    done = subprocess.run([*map(str, command + words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "in 2 of 2 images, 0 failed" in done.stdout, done.stderr
    (tmp_path / "one").mkdir()
    both = {name.replace("picture.npy_", "picture_"): data for name, data in
            ((path.name, path.read_bytes()) for path in tmp_path.glob("picture.npy_*"))}
    assert both == outputs(whole)
    assert len(table(tmp_path, "picture.png")) == len(table(whole))


def test_tiles_of_glass_are_not_looked_at(picture):
    slide = slides.Slide(picture / "picture.npy")
    cores = infer.tile_cores(300, 390, 96)
    seen = {core for core in cores if slide.has_tissue(core)}
    assert seen == {(y, x, min(y + 96, 320), min(x + 96, 416))
                    for y in (0, 96, 192) for x in (0, 96, 192, 288)}
    blank = slides.Slide(picture / "picture.npy")
    blank.thumbnail = np.full((300, 390, 3), 240, np.uint8), 1
    assert not any(map(blank.has_tissue, cores))


def test_a_nucleus_of_two_tiles_is_written_once(tmp_path):
    slide, config = (SimpleNamespace(scale=1.0, full=(40, 80), mpp=None),
                     {"class_names": ["a"], "colors": [(0, 0, 0)], "mpp": None})
    for number, (core, peak) in enumerate({(0, 0, 40, 40): (20, 39),
                                           (0, 40, 40, 80): (20, 41)}.items()):
        inst_map = np.zeros((40, 80), np.int32)
        inst_map[15:25, 33:47], inst_map[2:6, 5 + core[1]:9 + core[1]] = 1, 2
        nuclei = measure(inst_map, (inst_map > 0) * 1, peaks=[peak, (4, 7 + core[1])])
        nuclei = nuclei._replace(probabilities=np.ones(2, np.float32))
        slides.save_tile(tmp_path / f"{number}.npz", core, (0, 0), nuclei, slide)
    tiles = slides.Tiles("a", slide, [tmp_path / "0.npz", tmp_path / "1.npz"], config)
    assert tiles.counts() == [3] and [row[:3] for row in tiles.rows()] == [
        (1, 39.5, 19.5), (2, 6.5, 3.5), (3, 46.5, 3.5)]
    assert len(list(tiles.features())) == 3


@pytest.mark.parametrize("scale", [0.5, 2.0, 1.7])
def test_coordinates_are_those_of_the_picture(scale):
    inst_map = np.zeros((30, 40), np.int32)
    inst_map[10:20, 12:18] = 1
    nuclei = measure(inst_map, inst_map, peaks=[(14, 15)])
    shape = round(100 * scale), round(100 * scale)
    origin, scaled = rescale((32, 64), nuclei, scale, shape)
    expected = np.array([42.0, 76.0, 52.0, 82.0]) * scale  # the box, in the picture's pixels
    assert np.abs(scaled.boxes[0] + np.tile(origin, 2) - expected).max() <= 1
    assert np.abs(scaled.peaks[0] + origin + 0.5 - np.array([46.5, 79.5]) * scale).max() <= 1
    assert (scaled.areas[0] == pytest.approx(60 * scale**2, rel=0.2)
            and scaled.classes.tolist() == [1])


# ---------------------------------------------------------------- OpenSlide


class Pyramid:
    """What OpenSlide shows of an image at levels 1 and 4, without its library."""

    properties = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}
    broken = False

    def __init__(self, path):
        image = Image.open(path.with_suffix(".png")).convert("RGBA")
        self.levels = [image, image.reduce(4)]
        self.level_dimensions, self.level_downsamples = (
            [level.size for level in self.levels], [1.0, 4.0])

    def read_region(self, location, level, size):
        if self.broken:
            raise OSError("JPEG ended early")
        x, y = (round(side / self.level_downsamples[level]) for side in location)
        return self.levels[level].crop((x, y, x + size[0], y + size[1]))

    @staticmethod
    def detect_format(path):
        return "fake" if path.stat().st_size else None


@pytest.fixture
def pyramid(picture, monkeypatch):
    """picture.svs, and an OpenSlide that reads it."""
    (picture / "picture.svs").write_bytes(b"a slide")
    module = SimpleNamespace(OpenSlide=type("Copy", (Pyramid,), {}))
    monkeypatch.setitem(sys.modules, "openslide", module)
    yield module.OpenSlide
    (picture / "picture.svs").unlink()


def test_windows_do_not_depend_on_the_grid(picture, pyramid):
    for wanted, zoomed in ((0.25, 2), (0.5, 1), (1.0, 0.5), (2.5, 0.2)):
        slide = slides.Slide(picture / "picture.svs", wanted=wanted)
        assert slide.shape == (*(round(side * zoomed) for side in (300, 390)), 3)
        h, w = slide.shape[:2]
        whole, part = slide[0:h, 0:w], slide[h // 3:h - 5, w // 3:w - 5]  # Pillow rounds
        assert whole.shape == slide.shape
        assert np.abs(whole[h // 3:h - 5, w // 3:w - 5].astype(int) - part).max() <= 4


def test_a_slide_is_resampled_and_answers_in_its_own_pixels(picture, pyramid, tmp_path, capsys):
    words = "--formats", "csv", "npy"
    assert run(picture / "picture.svs", "--out", tmp_path / "slide", *words) == 0
    assert "0.5 µm per pixel, resampled to the checkpoint's 0.25" in capsys.readouterr().err
    assert run(picture / "picture.png", "--out", tmp_path / "image", "--mpp", "0.5", *words) == 0
    maps = [np.load(tmp_path / name / "picture_instances.npy") for name in ("image", "slide")]
    assert maps[0].shape == maps[1].shape == (300, 390) and maps[0].max() > 5
    pair = compare(*maps)
    assert (pair.iou > 0.7).sum() >= 0.9 * max(len(pair.true_area), len(pair.pred_area))
    row = table(tmp_path / "slide")[0]
    assert float(row["area_um2"]) == pytest.approx(int(row["area_px"]) * 0.25)


def test_bad_slides_end_in_a_sentence(picture, pyramid, tmp_path, capsys, monkeypatch):
    def error(*words):
        assert run(*words, "--out", tmp_path / "out") == 1
        lines = capsys.readouterr().err.splitlines()
        return next(line for line in lines if line.startswith(f"error: {picture}"))

    slide = picture / "picture.svs"
    assert "add one of overlay, geojson, csv, npy" in error(
        slide, "--formats", "tif", "--overwrite")
    words = slide, "--formats", "csv", "--overwrite"
    pyramid.broken = True
    assert "JPEG ended early" in error(*words)
    pyramid.properties = {}
    assert "a slide without resolution; give --mpp" in error(*words)
    slide.write_bytes(b"")
    assert "not a slide that OpenSlide knows" in error(*words)
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert "pip install openslide-python openslide-bin" in error(*words)
    np.save(picture / "grey.npy", np.zeros((5, 5)))
    assert "expected uint8 (height, width, 3)" in error(picture / "grey.npy", *words[1:])
    (picture / "grey.npy").unlink()
    assert not [path for path in (tmp_path / "out").iterdir()
                if path.is_file() and path.name != "run.jsonl"]


def test_an_image_above_the_limit_goes_by_tiles(picture, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "LARGE", 1000)
    assert run(picture / "picture.png", "--out", tmp_path) == 0
    assert table(tmp_path) == table(whole) and not (tmp_path / "picture_instances.tif").exists()
