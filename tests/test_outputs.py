"""Tests of what is written and drawn: every format, the summary, panels, curves and outlines."""

import csv
import json
import os
import sys
import uuid

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import outputs
from labels import read_labels
from outputs import FORMATS, GREY, Result, contours, draw_curves, outlined, titled_panel
from pictures import moved
from postprocess import measure

CROSS = ndimage.generate_binary_structure(2, 1)
NAMES = ["plain", 'a "quoted", name', "ünï\ncode"]
COLORS = [(255, 0, 0), (0, 250, 0), (0, 0, 250)]


def make_result(height=90, width=130, count=40, mpp=0.5, probability=0.75):
    """Round nuclei, many of which touch, on a picture of noise."""
    rng = np.random.default_rng(0)
    cells = rng.permutation(height * width)[:count]
    away = np.ones((height, width))
    away.ravel()[cells] = 0
    inst_map = np.zeros(away.shape, np.int32)
    if count:
        distance, nearest = ndimage.distance_transform_edt(away, return_indices=True)
        number = np.cumsum(away == 0).reshape(away.shape)
        inst_map = np.where(distance < 6, number[tuple(nearest)], 0).astype(np.int32)
    image = rng.integers(0, 200, (height, width, 3), np.uint8)
    nuclei = measure(inst_map, (inst_map + 2) % 3 + (inst_map > 0), peaks=np.argwhere(away == 0))
    nuclei = nuclei._replace(probabilities=np.full(count, probability, np.float32))
    return Result('it, "s" ü.png', image, nuclei, NAMES, COLORS, mpp)


@pytest.fixture(scope="module")
def result():
    return make_result()


def read_json(path):
    def refuse(word):
        pytest.fail(f"{word} in JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# ---------------------------------------------------------------- formats


def test_geojson_is_what_qupath_opens(result, tmp_path):
    outputs.write_geojson(tmp_path / "a", result)
    outputs.write_geojson(tmp_path / "b", result)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    collection = read_json(tmp_path / "a")
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == len(result.nuclei.areas) == 40
    assert len({uuid.UUID(feature["id"]) for feature in collection["features"]}) == 40
    y, x = result.nuclei.peaks[0]
    first = uuid.uuid5(uuid.NAMESPACE_URL, f"{result.name}/{y},{x}")
    assert collection["features"][0]["id"] == str(first)
    for row, feature in enumerate(collection["features"]):
        (ring,), kind = feature["geometry"]["coordinates"], result.nuclei.classes[row]
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert ring[0] == ring[-1] and len(ring) >= 5
        x, y = np.array(ring).T
        assert abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2 >= result.nuclei.areas[row]
        assert [y.min(), x.min(), y.max(), x.max()] == result.nuclei.boxes[row].tolist()
        area = int(result.nuclei.areas[row])
        assert feature["properties"] == {
            "objectType": "detection",
            "classification": {"name": NAMES[kind - 1], "color": list(COLORS[kind - 1])},
            "measurements": {"class_probability": 0.75, "area_px": area, "area_um2": area / 4},
        }


def test_geojson_comes_back_pixel_for_pixel(tmp_path):
    # Touching nuclei with holes, and nuclei of one pixel, in a tile that begins at (7, 7).
    rng = np.random.default_rng(0)
    inst_map = make_result(300, 400, 400).nuclei.inst_map
    inst_map[(inst_map > 0) & (rng.random(inst_map.shape) < 0.02)] = 0
    inst_map[(inst_map == 0) & (rng.random(inst_map.shape) < 0.001)] = 1
    pieces, count = np.zeros_like(inst_map), 0
    for number in range(1, 401):
        labels, more = ndimage.label(inst_map == number, np.ones((3, 3)))
        pieces[labels > 0] = labels[labels > 0] + count
        count += more
    _, first = np.unique(pieces, return_index=True)
    peaks = np.transpose(np.unravel_index(first[1:], pieces.shape))
    nuclei = moved(measure(pieces, np.minimum(pieces, 1), peaks=peaks), (7, 7))
    found = Result("a", None, nuclei, ["one"], COLORS, None)
    found.rings = [ring + 7 for ring in contours(pieces)]

    outputs.write_geojson(tmp_path / "a.geojson", found)
    read, _, classes = read_labels(tmp_path / "a.geojson", (307, 407))
    assert np.array_equal(read[7:, 7:], pieces) and set(classes.values()) == {"one"}
    features = read_json(tmp_path / "a.geojson")["features"]
    rings = [len(feature["geometry"]["coordinates"]) for feature in features]
    assert max(rings) > 2 and rings.count(1) > 50 and (nuclei.areas == 1).sum() > 50


def test_csv_names_the_ids_of_the_label_map(result, tmp_path):
    outputs.write_outputs(tmp_path, "a", result, ["csv", "tif", "npy"])
    with Image.open(tmp_path / "a_instances.tif") as file:
        assert file.mode == "I" and file.tag_v2[258] == (32,)
        label_map = np.array(file)
    assert np.array_equal(label_map, result.nuclei.inst_map)
    assert np.array_equal(label_map, np.load(tmp_path / "a_instances.npy"))
    with open(tmp_path / "a_nuclei.csv", encoding="utf-8", newline="") as file:
        assert file.readline() == "id,x,y,class,class_probability,area_px,area_um2\n"
        rows = list(csv.reader(file))
    assert [int(row[0]) for row in rows] == np.unique(label_map)[1:].tolist()
    for i, x, y, name, probability, area, um2 in rows:
        pixels = np.argwhere(label_map == int(i))
        assert np.allclose((float(y), float(x)), pixels.mean(axis=0), atol=0.006)
        assert (int(area), float(um2)) == (len(pixels), len(pixels) / 4)
        assert name == NAMES[result.nuclei.classes[int(i) - 1] - 1] and probability == "0.75"


def test_hovernet_json_holds_every_nucleus(result, tmp_path):
    outputs.write_json(tmp_path / "a.json", result)
    written = read_json(tmp_path / "a.json")
    assert written["mag"] == 20
    assert list(written["nuc"]) == [str(i) for i in range(1, 41)]
    first = written["nuc"]["1"]
    assert set(first) == {"bbox", "centroid", "contour", "type_prob", "type"}
    assert sum(first["bbox"], []) == result.nuclei.boxes[0].tolist()
    assert np.allclose(first["centroid"][::-1], result.nuclei.centroids[0], atol=0.006)
    assert first["contour"] == contours(result.nuclei.inst_map)[0][:-1, ::-1].tolist()
    assert first["type"] == result.nuclei.classes[0]


@pytest.mark.parametrize("count", [0, 1])
def test_no_nuclei_and_no_resolution_are_written_too(tmp_path, count):
    found = make_result(9, 7, count, mpp=None, probability=np.nan)
    outputs.write_outputs(tmp_path, "a", found, list(FORMATS))
    assert len(list(tmp_path.iterdir())) == len(FORMATS)
    features = read_json(tmp_path / "a_nuclei.geojson")["features"]
    document = read_json(tmp_path / "a_nuclei.json")
    rows = (tmp_path / "a_nuclei.csv").read_text(encoding="utf-8").split("area_um2\n")[1]
    assert len(features) == len(document["nuc"]) == rows.count("\n") == count
    assert document["mag"] is None
    if count:
        assert features[0]["properties"]["measurements"].keys() == {"area_px"}
        assert ",plain,," in rows and rows.endswith(",\n")


def test_a_name_that_is_no_text_loses_no_output(tmp_path):
    found = make_result(count=3)
    stem = os.fsdecode(b"odd\xff")
    named = Result(f"{stem}.png", found.image, found.nuclei, NAMES, COLORS, 0.25)
    written = []

    def write(path, result):
        written.append(path.name)
        path.write_text(result.name, encoding="utf-8")

    writers = FORMATS | {"csv": ("_nuclei.csv", write)}
    if sys.platform == "linux":
        outputs.write_outputs(tmp_path, stem, named, list(FORMATS), writers)
        assert {path.name for path in tmp_path.iterdir()} == {
            stem + suffix for suffix, _ in FORMATS.values()}
        assert "odd" not in written[0] and written[0].isascii()
    assert named.name == "odd?.png"
    outputs.write_summary(tmp_path / "summary.csv", [outputs.summary_row(named, seconds=1)])
    assert "\nodd?.png,0.0117," in (tmp_path / "summary.csv").read_text(encoding="utf-8")


def test_a_writer_that_fails_leaves_the_old_files_alone(result, tmp_path):
    outputs.write_outputs(tmp_path, "a", result, ["csv", "tif"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, result):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    writers = FORMATS | {"tif": ("_instances.tif", fail)}
    with pytest.raises(OSError, match="No space"):
        outputs.write_outputs(tmp_path, "a", result, ["overlay", "csv", "tif"], writers)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------- overlay


def test_the_overlay_registers_on_the_image(tmp_path):
    found = make_result(300, 400, 60)
    outputs.write_overlay(tmp_path / "a.png", found)
    picture, ids = np.array(Image.open(tmp_path / "a.png")), found.nuclei.inst_map
    assert picture.shape == found.image.shape
    legend = np.zeros(ids.shape, bool)
    legend[:80, :160] = True
    assert (picture[2, 2] > 180).all() and not np.array_equal(picture[legend], found.image[legend])

    inner = np.ones(ids.shape, bool)
    for beside in outputs.neighbours(ids):
        inner &= ids == beside
    line = (ids > 0) & ~inner & ~legend
    colors = np.array(COLORS)[found.nuclei.classes - 1]
    assert np.array_equal(picture[line], colors[ids[line] - 1])
    kept = (inner & (ids > 0) & ~legend) | (ndimage.distance_transform_edt(ids == 0) > 1.5)
    kept &= ~legend
    assert np.array_equal(picture[kept], found.image[kept])
    casing = (ids == 0) & ~kept & ~legend & outputs.grown(ids > 0)
    assert casing.any() and (picture[casing] >= 153).all()  # light, and no overflow

    tiny = make_result(40, 40, 0)  # has no room for a legend
    outputs.write_overlay(tmp_path / "b.png", tiny)
    assert np.array_equal(np.array(Image.open(tmp_path / "b.png")), tiny.image)


def test_the_legend_lists_the_classes_that_occur(monkeypatch):
    legend, listed = outputs.legend, []

    def noted(labels, colors, size):
        listed.append((labels, colors))
        return legend(labels, colors, size)

    monkeypatch.setattr(outputs, "legend", noted)
    found = make_result(300, 400, 2)
    outputs.add_legend(found.image, found)
    kinds = found.nuclei.classes.tolist()
    assert listed == [([f"{NAMES[k - 1]} 1" for k in kinds], [COLORS[k - 1] for k in kinds])]
    empty = make_result(300, 400, 0)
    before = empty.image.copy()
    outputs.add_legend(empty.image, empty)
    assert np.array_equal(empty.image, before) and len(listed) == 1


def test_lines_grow_with_the_image(tmp_path):
    inst_map = np.zeros((30, 4001), np.int32)
    inst_map[5:25, 2000:2020] = 1
    nuclei = measure(inst_map, inst_map, peaks=[[15, 2010]])
    image = np.full((*inst_map.shape, 3), 90, np.uint8)
    outputs.write_overlay(tmp_path / "a.png", Result("a", image, nuclei, ["one"], COLORS, None))
    row = np.array(Image.open(tmp_path / "a.png"))[15, 1996:2012].tolist()
    grey, light = [90] * 3, [189] * 3
    assert row == [grey] * 2 + [light] * 2 + [[255, 0, 0]] * 3 + [grey] * 9


def test_outlined_enlarges_crops_and_draws_unknown_in_grey():
    inst_map = np.zeros((8, 9), int)
    inst_map[2:6, 2:6], inst_map[3:6, 6:] = 7, 2
    classes = np.array([1, 255, 1, 1, 1, 1, 3])  # of ids 1 to 7; most are not in the crop
    image = np.full((8, 9, 3), 50, np.uint8)
    plain = outlined(image, inst_map, classes, COLORS)
    assert plain[2, 2].tolist() == list(COLORS[2]) and plain[3, 8].tolist() == list(GREY)
    assert plain[4, 4].tolist() == [50] * 3 and (image == 50).all()
    large = outlined(image, inst_map, classes, COLORS, scale=3)
    assert large.shape == (24, 27, 3)
    assert large[6, 6].tolist() == list(COLORS[2]) and large[8, 8].tolist() == [50] * 3


# ---------------------------------------------------------------- summary.csv


def test_summary_row_is_what_a_spreadsheet_wants(result):
    row = outputs.summary_row(result, seconds=1.234)
    area = row.pop("mean_area_um2")
    assert row == {
        "name": result.name, "megapixels": 0.0117, "um_per_pixel": 0.5, "mm2": 0.002925,
        "nuclei": 40, **dict(zip(NAMES, result.counts())), "nuclei_per_mm2": 13675.21,
        "seconds": 1.23}
    assert list(row)[5:8] == NAMES and sum(result.counts()) == 40
    assert abs(area - result.nuclei.areas.mean() / 4) < 0.01
    row = outputs.summary_row(result, seconds=1, mm2=2)
    assert row["mm2"] == 2 and row["nuclei_per_mm2"] == 20

    # Nothing where nothing is known.
    unknown = outputs.summary_row(make_result(mpp=None), seconds=1)
    for column in ("um_per_pixel", "mm2", "nuclei_per_mm2", "mean_area_um2"):
        assert unknown[column] is None
    empty = outputs.summary_row(make_result(count=0), seconds=1)
    assert empty["nuclei_per_mm2"] == 0 and empty["mean_area_um2"] is None
    assert outputs.summary_row(make_result(count=0), seconds=1, mm2=0)["nuclei_per_mm2"] is None


def test_the_summary_has_a_row_an_image(result, tmp_path):
    path = tmp_path / "summary.csv"
    row = outputs.summary_row(result, seconds=1)
    outputs.write_summary(path, [row])
    outputs.write_summary(path, [row | {"name": "a"}, row | {"name": "b", "mm2": None}])
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["mm2"]) for row in rows] == [("a", "0.002925"), ("b", "")]
    assert list(rows[0]) == list(row) and [path] == list(tmp_path.iterdir())


# ---------------------------------------------------------------- panels and curves


def has_color(picture, color):
    return (np.asarray(picture) == color).all(axis=-1).sum() > 99  # not the edge of a letter


def test_a_panel_holds_every_picture_and_explains_the_colors():
    pictures = [np.full((30, 40 + 5 * k, 3), (200, 90, 40 * k), np.uint8) for k in range(3)]
    titles = [["a name that is far too long for its picture", "truth"], ["ü\n\udcff"]]
    page = titled_panel([pictures[:2], pictures[2:]], titles, NAMES, COLORS)
    pixels = np.asarray(page)
    for picture in pictures:
        assert 3 * (pixels == picture[0, 0]).all(axis=-1).sum() == picture.size
    assert all(has_color(page, color) for color in COLORS) and not has_color(page, GREY)
    more_colors = [*COLORS, (1, 2, 3)]
    page = titled_panel([pictures], [["", "", ""]], NAMES, more_colors, unknown=True)
    assert has_color(page, GREY) and not has_color(page, (1, 2, 3))
    assert pixels[:24, 12:].min() == 0 and (pixels[:, :12] == 255).all()


@pytest.mark.parametrize("high, ticks", [
    (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (3.3, [0, 0.5, 1, 1.5, 2, 2.5, 3]),
    (0.013, [0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012]),
    (4, [0, 1, 2, 3, 4]),
    (38, [0, 10, 20, 30]),
])
def test_ticks_are_numbers_that_a_person_would_choose(high, ticks):
    assert outputs.nice_ticks(high) == pytest.approx(ticks)


def line_pixels(lines, last, highest=1):
    """(y, x) of the pixels of a plot's first line, 0 to 1 from the lower left of its axes."""
    picture = outputs.plot(lines, [(255, 0, 0), (0, 0, 255)], last, highest)
    y, x = np.nonzero((picture == (255, 0, 0)).all(axis=-1))
    return 1 - (y - 90) / 520, (x - 90) / 760


def test_nothing_is_drawn_before_the_first_epoch():
    y, x = line_pixels([[(3, 0.5), (4, 1)], [(1, 1), (5, 1)]], 5)
    assert abs(x.min() - 0.6) < 0.02 and abs(x.max() - 0.8) < 0.02 and abs(y.min() - 0.5) < 0.02
    y, x = line_pixels([[(1, 2.0)]], 1, 4)  # one epoch is a dot
    assert len(y) > 100 and abs(x.mean() - 1) < 0.01 and abs(y.mean() - 0.5) < 0.01


def test_one_wild_value_does_not_flatten_the_rest(tmp_path, monkeypatch):
    plot, tops = outputs.plot, []
    monkeypatch.setattr(outputs, "plot", lambda *given: tops.append(given[-1]) or plot(*given))
    line = list(enumerate((500.0, 1.0, 0.8, 0.9), 1))
    records = [{"epoch": epoch} | dict.fromkeys(outputs.LOSSES, loss) for epoch, loss in line]
    draw_curves(records, tmp_path / "curves.png")
    assert tops == [pytest.approx(2.85), 1]
    y, x = line_pixels([line], 4, 1.9)
    assert y.max() < 1.02 and y[x > 0.6].min() > 0.3


def test_curves_take_what_there_is(tmp_path):
    scores = {"pq": 0.4, "detection_f1": 0.7, "class_f1": float("nan"), "dice": 0.8}
    losses = dict.fromkeys(outputs.LOSSES, 3.0)
    first = {"epoch": 1, "rate": 0.1, "set": scores, "other": scores} | losses
    lost = {"epoch": 1} | dict.fromkeys(outputs.LOSSES, float("inf"))
    for records in ([first], [lost | {"set": scores}, first | {"epoch": 2}], [lost]):
        draw_curves(records, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as file:
            assert min(file.size) > 300


def test_losses_fill_their_plot_and_a_wild_value_does_not_flatten_the_rest(tmp_path, monkeypatch):
    plot, tops = outputs.plot, []
    monkeypatch.setattr(outputs, "plot", lambda *words: tops.append(words[-1]) or plot(*words))
    for values, top in (((2.5, 2, 1), 2.5), ((1000, 2, 1), 6)):
        records = []
        for epoch, value in enumerate(values, 1):
            records.append({"epoch": epoch} | dict.fromkeys(outputs.LOSSES, value))
        draw_curves(records, tmp_path / "curves.png")
        assert tops[-2] == top


# ---------------------------------------------------------------- outlines


def check_ring(ring, pixels):
    """A ring of corners, clockwise, around exactly these pixels."""
    steps = np.diff(ring, axis=0)
    assert len(ring) >= 5 and np.array_equal(ring[0], ring[-1])
    assert np.all((steps == 0).sum(axis=1) == 1)  # along the axes
    assert np.all((steps == 0) != (np.roll(steps, 1, axis=0) == 0))  # turning at every corner
    y, x = ring.T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() == 2 * pixels.sum()  # shoelace, clockwise
    raster = np.zeros(pixels.shape, int)
    for (y0, x0), (y1, _) in zip(ring, ring[1:]):
        raster[min(y0, y1):max(y0, y1), x0:] += 1
    assert np.array_equal(raster % 2 == 1, pixels)  # even-odd


def check_simple(ring):
    """A ring that nowhere meets itself."""
    steps = np.diff(ring, axis=0)
    lengths = np.abs(steps).sum(axis=1)
    walk = np.cumsum(np.repeat(steps // lengths[:, None], lengths, axis=0), axis=0)
    assert len(np.unique(walk, axis=0)) == len(walk)


@pytest.mark.parametrize("picture", [
    "#", "###/###", "...../.###./.#.#./.###./.....",  # one pixel, the border, a hole
    ".##/#.#/###", "###./#.##/####",  # touching itself at a corner, round a hole
    "####/#.##/##.#/####",  # two holes that meet at a corner
    "#####/#...#/#.#.#/#...#/#####", "##.../##.../..##./..#..", ".#./#.#/.#.",  # several pieces
])
def test_outline_of_a_shape(picture):
    shape = np.array([[char == "#" for char in row] for row in picture.split("/")])
    (ring,) = contours(shape.astype(int))
    check_ring(ring, ndimage.binary_fill_holes(shape, CROSS))
    if ndimage.label(shape, CROSS)[1] == 1:
        check_simple(ring)


def test_the_outline_in_the_docstring():
    (ring,) = contours([[1, 1, 0], [1, 1, 1]])
    assert ring.tolist() == [[0, 0], [0, 2], [1, 2], [1, 3], [2, 3], [2, 0], [0, 0]]


def test_outlines_of_random_labels():
    for seed in range(40):
        inst_map = np.random.default_rng(seed).integers(0, 4, (9, 11)).astype(np.int32)
        assert contours(np.zeros((3, 4), int)) == []
    for n, ring in enumerate(contours(inst_map), start=1):
            pieces, _ = ndimage.label(inst_map == n, np.ones((3, 3)))
            first = pieces == pieces[pieces > 0][0]
            check_ring(ring, ndimage.binary_fill_holes(first, CROSS))
    assert contours(np.zeros((3, 4), int)) == []


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_label_maps_of_any_integers_are_outlined(dtype):
    inst_map = np.zeros((40, 30), np.int32)
    inst_map[3:9, 25:], inst_map[10:15, :4], inst_map[30, 8:20] = 1, 2, 3
    for a, b in zip(contours(inst_map), contours(inst_map.astype(dtype)), strict=True):
        assert np.array_equal(a, b)
