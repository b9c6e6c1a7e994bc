"""slides.py: tiles that survive a kill, several processes, what is written of large pictures."""

import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import infer
import pictures
import slides
from metrics import compare
from postprocess import measure
from test_infer import Darkness
from test_pictures import FakeSlide, tissue_with_glass

FORMATS = "csv", "geojson", "overlay", "npy"
LARGE = 10_000  # pixels, for these tests


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Tissue with glass around as picture.png and .npy; their folder."""
    folder = tmp_path_factory.mktemp("slides")
    (folder / "tiny.pt").write_text("stands for the network")
    (folder / "in").mkdir()
    Image.fromarray(tissue_with_glass()).save(folder / "in" / "picture.png")
    np.save(folder / "in" / "picture.npy", tissue_with_glass())
    return folder


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", LARGE)
    monkeypatch.setattr(infer, "load_any_model", lambda path, device: Darkness())


def words(picture, image, out, *more):
    options = ["--tile", "96", "--halo", "32", "--device", "cpu", "--precision", "fp32"]
    return [str(word) for word in (image, "--checkpoint", picture / "tiny.pt", "--out", out,
                                   *options, "--formats", *FORMATS, *more)]


def table(folder, stem="picture"):
    with open(folder / f"{stem}_nuclei.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.glob("picture*")}


@pytest.fixture(scope="module")
def whole(picture, tmp_path_factory):
    """What picture.npy gives tile by tile in one go."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "LARGE", LARGE)
        patch.setattr(infer, "load_any_model", lambda path, device: Darkness())
        assert infer.main(words(picture, picture / "in" / "picture.npy", out)) == 0
    return out


def test_a_large_picture_has_the_nuclei_of_a_small_one(picture, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", 10**8)
    assert infer.main(words(picture, picture / "in" / "picture.npy", tmp_path)) == 0
    in_memory, on_disk = (np.load(out / "picture_instances.npy") for out in (tmp_path, whole))
    assert on_disk.dtype == np.int32 and on_disk.shape == in_memory.shape == (300, 390)
    assert on_disk.max() > 15
    pair = compare(in_memory, on_disk)
    assert (pair.iou == 1).sum() >= 0.97 * max(len(pair.true_area), len(pair.pred_area))

    # Table, outlines and label map agree.
    rows = table(whole)
    areas = np.bincount(on_disk.ravel())[1:]
    assert [int(row["id"]) for row in rows] == list(range(1, len(areas) + 1))
    assert [int(row["area_px"]) for row in rows] == areas.tolist()
    features = json.loads((whole / "picture_nuclei.geojson").read_text())["features"]
    assert len({feature["id"] for feature in features}) == len(features) == len(rows)
    for row, feature in zip(rows, features):
        x, y = np.array(feature["geometry"]["coordinates"][0]).T
        assert x.min() < float(row["x"]) + 0.5 < x.max()
        assert y.min() < float(row["y"]) + 0.5 < y.max()
    with Image.open(whole / "picture_overlay.png") as overlay:
        assert overlay.size == (390, 300)
    assert {path.name for path in whole.iterdir()} == {
        "run.jsonl", "summary.csv", "picture_nuclei.csv", "picture_nuclei.geojson",
        "picture_overlay.png", "picture_instances.npy"}


def test_the_summary_counts_what_was_looked_at(picture, whole):
    with open(whole / "summary.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    looked_at = 288 * 384  # twelve tiles; the last row and column show nothing but glass
    assert float(row["mm2"]) == pytest.approx(looked_at * 0.25**2 / 1e6, abs=1e-6)
    assert int(row["nuclei"]) == len(table(whole)) and row["name"] == "picture.npy"


def test_an_interrupted_slide_resumes_and_ends_the_same(picture, whole, tmp_path, monkeypatch):
    save, saved = infer.save_nuclei, []

    def stopped(path, *rest):
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt
        save(path, *rest)

    monkeypatch.setattr(infer, "save_nuclei", stopped)
    call = words(picture, picture / "in" / "picture.npy", tmp_path)
    assert infer.main(call) == 130
    assert [path.name[:9] for path in tmp_path.iterdir()] == [".picture."]
    assert infer.main(call) == 0
    assert saved.count(saved[3]) == 2 and len(set(saved)) == len(saved) - 1
    assert outputs(tmp_path) == outputs(whole)

    # Killed while the result was written: all tiles are there, and nothing is computed again.
    def power_cut(*_):
        raise KeyboardInterrupt

    out = tmp_path / "again"
    call = words(picture, picture / "in" / "picture.npy", out)
    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_outputs", power_cut)
        assert infer.main(call) == 130
    count = len(saved)
    assert infer.main(call) == 0 and len(saved) == count and outputs(out) == outputs(whole)
    assert not list(out.glob(".picture*"))


SCRIPT = f"""
import sys
import infer, pictures, test_infer
pictures.LARGE = {LARGE}
infer.load_any_model = lambda path, device: test_infer.Darkness()
sys.exit(infer.main(sys.argv[1:]))
"""


def test_two_processes_write_what_one_writes(picture, whole, root, tmp_path):
    """By torchrun; a broken file beside the slide stops neither of them."""
    images = tmp_path / "in"
    images.mkdir()
    for name in ("picture.npy", "picture.png"):
        (images / name).write_bytes((picture / "in" / name).read_bytes())
    (images / "broken.png").write_text("no image")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(script), *words(picture, images, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"})
    out = tmp_path / "out"
    assert done.returncode == 1 and "1 image failed, see above" in done.stdout, done.stderr
    assert "nuclei in 2 images" in done.stdout and done.stdout.count("megapixels") == 1
    both = {name.replace("picture.npy_", "picture_"): data for name, data in outputs(out).items()
            if name.startswith("picture.npy_")}
    assert both == outputs(whole)
    assert len(table(out, "picture.png")) == len(table(whole))
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    with open(out / "summary.csv", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["picture.npy", "picture.png"]


def test_a_share_is_left_to_the_other_process(picture, whole, tmp_path, monkeypatch, capsys):
    call = words(picture, picture / "in" / "picture.npy", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert infer.main(call) == 0
    assert not outputs(tmp_path) and len(list(tmp_path.glob(".picture.*/*.npz"))) == 6
    monkeypatch.setenv("RANK", "0")
    assert infer.main(call) == 0 and outputs(tmp_path) == outputs(whole)
    assert "nuclei in 1 image" in capsys.readouterr().out


def test_one_process_at_a_time_writes(tmp_path):
    file = tmp_path / "0_0.npz"
    with slides.writing_alone(tmp_path, [file]) as alone:
        assert not alone  # a tile is missing
    file.write_text("")
    with slides.writing_alone(tmp_path, [file]) as alone:
        assert alone
        with slides.writing_alone(tmp_path, [file]) as second:
            assert not second
    with slides.writing_alone(tmp_path / "removed", []) as alone:
        assert not alone
    with slides.writing_alone(tmp_path, [file]) as alone:
        assert alone


def test_classes_to_keep_count_for_large_pictures_too(picture, whole, tmp_path):
    kept = table(whole)[0]["class"]
    image = picture / "in" / "picture.npy"
    assert infer.main(words(picture, image, tmp_path, "--keep", kept)) == 0
    expected = [row for row in table(whole) if row["class"] == kept]
    rows = table(tmp_path)
    assert [{**row, "id": 0} for row in rows] == [{**row, "id": 0} for row in expected]
    assert np.load(tmp_path / "picture_instances.npy").max() == len(rows)


def test_tiles_are_read_as_they_were_kept(tmp_path):
    inst_map = np.zeros((20, 30), np.int32)
    inst_map[3:9, 4:12], inst_map[12:18, 20:29] = 1, 2
    nuclei = measure(inst_map, inst_map, peaks=[(5, 6), (15, 25)])
    slides.save_nuclei(tmp_path / "a.npz", (100, 200), nuclei)
    origin, read = slides.load_nuclei(tmp_path / "a.npz")
    assert origin == (100, 200)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(nuclei, read))

    view = SimpleNamespace(mpp=0.5, full=(300, 300))
    tiles = slides.Tiles("a\nb", view, tmp_path, ["x", "y"], [(0, 0, 0), (1, 1, 1)])
    empty = measure(inst_map * 0, inst_map * 0, peaks=[])
    for start, part in ((origin, nuclei), ((0, 0), empty)):
        tiles.add(start, part)
    assert tiles.counts() == [1, 1] and tiles.total_area() == 48 + 54 and tiles.name == "a b"
    assert [row[:3] for row in tiles.rows()] == [(1, 207.5, 105.5), (2, 224.0, 114.5)]
    ring = json.loads(list(tiles.features())[1])["geometry"]["coordinates"][0]
    assert [min(ring), max(ring)] == [[220, 112], [229, 118]]

    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="a.npz: damaged; delete it and run again"):
        slides.load_nuclei(tmp_path / "a.npz")


# ---------------------------------------------------------------- with OpenSlide


@pytest.fixture
def slide(tmp_path, monkeypatch):
    module = SimpleNamespace(OpenSlide=type("Copy", (FakeSlide,), {}))
    monkeypatch.setitem(sys.modules, "openslide", module)
    (tmp_path / "picture.svs").write_bytes(b"a slide")
    return tmp_path / "picture.svs"


def test_a_slide_is_resampled_and_answers_in_its_own_pixels(picture, slide, tmp_path, capsys):
    assert infer.main(words(picture, slide, tmp_path / "slide")) == 0
    assert "at 0.5 µm per pixel (the slide; resampled to 0.25)" in capsys.readouterr().out
    image = picture / "in" / "picture.png"
    assert infer.main(words(picture, image, tmp_path / "image", "--mpp", "0.5")) == 0
    maps = [np.load(tmp_path / name / "picture_instances.npy") for name in ("image", "slide")]
    assert maps[0].shape == maps[1].shape == (300, 390) and maps[0].max() > 5
    pair = compare(*maps)
    assert (pair.iou > 0.7).sum() >= 0.9 * max(len(pair.true_area), len(pair.pred_area))
    row = table(tmp_path / "slide")[0]
    assert float(row["area_um2"]) == pytest.approx(int(row["area_px"]) * 0.25)


def test_a_small_slide_has_all_outputs(picture, slide, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", 10**6)
    call = words(picture, slide, tmp_path / "out")
    call[call.index("--formats") + 1:] = ["tif", "json", "overlay"]
    assert infer.main(call) == 0
    assert {path.name for path in (tmp_path / "out").glob("picture*")} == {
        "picture_instances.tif", "picture_nuclei.json", "picture_overlay.png"}


def test_what_is_not_written_of_a_large_picture_is_said(picture, slide, tmp_path, capsys):
    call = words(picture, slide, tmp_path / "out")
    at = call.index("--formats") + 1
    call[at:] = ["tif", "csv", "json"]
    assert infer.main(call) == 0
    said = capsys.readouterr().out
    assert "_instances.tif and _nuclei.json would not fit into memory" in said
    assert infer.main(call) == 0 and "1 image already done" in capsys.readouterr().out
    call[at:] = ["tif", "--overwrite"]
    assert infer.main(call) == 1
    assert "add one of overlay, geojson, csv, npy to --formats" in capsys.readouterr().err
