"""labels.py: every form of labels, exact outlines, masks refused, what wrong files get."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import io

from labels import (
    UNKNOWN_CLASS, class_table, count_pieces, fill_rings, match_classes, number_ids, read_labels,
    read_names, read_predictions,
)
from outputs import contours

SHAPE = (64, 80)


def two_nuclei():
    """Ids 3 and 8 in a map that is not square."""
    inst_map = np.zeros(SHAPE, np.int32)
    inst_map[5:15, 5:15], inst_map[30:50, 30:40] = 3, 8
    return inst_map


def scattered(count, ids=(1,), side=5):
    """`count` squares apart from each other, which take the ids in turn."""
    inst_map = np.zeros((100, 100), np.int32)
    for k in range(count):
        y, x = 10 * (k // 10), 10 * (k % 10)
        inst_map[y:y + side, x:x + side] = ids[k % len(ids)]
    return inst_map


def square(x, y, side=6):
    """A closed ring (x, y) along pixel edges."""
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(rings, classification=None, kind="Polygon"):
    properties = {"objectType": "detection"}
    if classification is not None:
        properties["classification"] = classification
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": rings},
            "properties": properties}


def write_geojson(path, features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


# ---------------------------------------------------------------- forms that are read


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "uint64", "float32"])
def test_instance_maps_of_every_number_type(tmp_path, dtype):
    labels = two_nuclei().astype(dtype)
    np.save(tmp_path / "a.npy", labels)
    np.savez(tmp_path / "a.npz", inst_map=labels)
    io.savemat(tmp_path / "a.mat", {"inst_map": labels, "text": "not needed"})
    paths = [tmp_path / "a.npy", tmp_path / "a.npz", tmp_path / "a.mat"]
    if dtype in ("uint8", "uint16"):
        paths.append(tmp_path / "a.png")
        Image.fromarray(labels).save(paths[-1])
    if dtype in ("uint8", "uint16", "int32", "float32"):
        paths.append(tmp_path / "a.tif")
        Image.fromarray(labels).save(paths[-1])
    for path in paths:
        inst_map, ids, classes = read_labels(path, SHAPE)
        assert inst_map.dtype == np.int32 and ids.tolist() == [3, 8] and classes is None
        assert np.array_equal(inst_map, np.select([labels == 3, labels == 8], [1, 2]))


def test_classes_inside_the_file(tmp_path):
    labels = two_nuclei()
    type_map = np.select([labels == 3, labels == 8], [2, 1])
    type_map[5, 5] = 1  # the majority counts
    for name, arrays in {
        "map": {"type_map": type_map}, "list": {"inst_type": np.array([[2], [1]])},
        "lizard": {"id": np.array([8, 3]), "class": np.array([1, 2])},
    }.items():
        np.savez(tmp_path / f"{name}.npz", inst_map=labels, **arrays)
        io.savemat(tmp_path / f"{name}.mat", {"inst_map": labels, **arrays})
        for suffix in ("npz", "mat"):
            assert read_labels(tmp_path / f"{name}.{suffix}", SHAPE)[2] == {3: 2, 8: 1}


def test_predictions_come_back_with_their_classes(tmp_path):
    Image.fromarray(np.array([[0, 1], [2, 2]], np.int32)).save(tmp_path / "x_instances.tif")
    (tmp_path / "x_nuclei.csv").write_text("id,class\n2,a\n1,b\n")
    assert read_predictions(tmp_path, "x", ["a", "b"])[1].tolist() == [2, 1]
    for text, words in (("id,class\n2,a\n", "id 1 is of class '0', which is not among a, b"),
                        ("id,class\n1,a\n2,a\n3,a\n", "id 3 has a class but no pixels"),
                        ("a\n1\n", "run infer.py again"),
                        ("id,class\n1,a\n2,c\n", "id 2 is of class 'c', which is not among a, b")):
        (tmp_path / "x_nuclei.csv").write_text(text)
        with pytest.raises(ValueError, match=f"x_nuclei.csv: .*{words}"):
            read_predictions(tmp_path, "x", ["a", "b"])


# ---------------------------------------------------------------- GeoJSON


def test_outlines_along_pixel_edges_come_back_pixel_for_pixel(tmp_path, tissue):
    inst_map = tissue[1]
    rings = [ring[:, ::-1].tolist() for ring in contours(inst_map)]  # (x, y)
    path = write_geojson(tmp_path / "a.geojson", [feature([ring], {"name": "a"}) for ring in rings])
    found, ids, classes = read_labels(path, inst_map.shape)
    assert np.array_equal(found, inst_map) and len(ids) == inst_map.max()
    assert set(classes.values()) == {"a"}


def test_general_outlines_follow_the_pixel_centres():
    angle = np.linspace(0, 2 * np.pi, 50)[:-1]
    ring = np.stack((20.3 + 11 * np.cos(angle), 18.6 + 7 * np.sin(3 * angle)), axis=1)  # crossing
    inst_map = np.zeros((40, 40), np.int32)
    fill_rings(inst_map, [ring], 7)

    # by hand: how many edges lie left of the centre, on its line?
    expected = np.zeros((40, 40), bool)
    for y in range(40):
        for x in range(40):
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0)):
                if (y0 <= y + 0.5) != (y1 <= y + 0.5):
                    crossing = x0 + (y + 0.5 - y0) / (y1 - y0) * (x1 - x0)
                    expected[y, x] ^= crossing <= x + 0.5
    assert expected.sum() > 100 and np.array_equal(inst_map == 7, expected)


def test_holes_parts_overlaps_and_borders(tmp_path):
    path = write_geojson(tmp_path / "a.geojson", [
        feature([square(10, 10, 9), square(13, 13, 3)]),  # with a hole
        feature([[square(30, 5)], [square(40, 5)]], kind="MultiPolygon"),
        feature([square(10, 30, 6)]),
        feature([square(13, 30, 6)]),  # over the one before it
        feature([square(76, 50, 9)]),  # half outside
        feature([[[60, 30], [60.2, 30], [60.2, 30.2], [60, 30]]]),  # smaller than a pixel
    ])
    inst_map, ids, _ = read_labels(path, SHAPE)
    assert ids.tolist() == [1, 2, 3, 4, 5]  # the last one covers no pixel's centre
    assert np.bincount(inst_map.ravel())[1:].tolist() == [81 - 9, 72, 18, 36, 9 * 4]
    assert inst_map[14, 14] == 0 and inst_map[31, 14] == 4


def test_classes_of_features(tmp_path):
    inner = feature([square(2, 2, 20)]) | {
        "nucleusGeometry": {"type": "Polygon", "coordinates": [square(8, 8)]}}
    features = [feature([square(30, 5)], {"name": "Tumor", "color": [1, 2, 3]}),
                feature([square(50, 5)]),
                feature([square(60, 5)], {"names": ["Tumor", "Positive"]}), inner]
    features[1]["properties"]["objectType"] = "annotation"
    inst_map, _, classes = read_labels(write_geojson(tmp_path / "a.geojson", features), SHAPE)
    assert list(classes.values()) == ["Tumor", "", "Tumor: Positive", ""]
    assert np.sum(inst_map == 4) == 36  # of a cell the nucleus

    # QuPath writes a list if "FeatureCollection" is not ticked
    (tmp_path / "list.geojson").write_text(json.dumps(features))
    assert np.array_equal(read_labels(tmp_path / "list.geojson", SHAPE)[0], inst_map)


def test_wrong_geojson_ends_in_a_sentence(tmp_path):
    inside = [feature([square(10 * k + 2, 10 * k % 50 + 2)]) for k in range(5)]
    for features, words in (
            ([feature([5, 5], kind="Point")], "a feature is a Point; expected Polygon"),
            ([feature([])], "a feature has no coordinates"),
            ([feature([[["a", 1], [2, 2], [3, 3]]])], "not a readable GeoJSON file"),
            (inside + [feature([square(80, 5)])], "feature 6 .x 80 to 86, y 5 to 11. lies outside "
             "the image of 64x80; export"),
            (inside + [feature([square(0, 0, 62)])], "feature 6 .* is a region, not a nucleus"),
            ([feature([square(0, 0, 62)])], "id 1 covers 75% of the image"),
            ([feature([[square(10 * k, 5)] for k in range(6)], kind="MultiPolygon")],
             "id 1 covers 6 separate pieces")):
        with pytest.raises(ValueError, match=f"a.geojson: .*{words}"):
            read_labels(write_geojson(tmp_path / "a.geojson", features), SHAPE)
    (tmp_path / "a.geojson").write_text(json.dumps(inside[0]))
    with pytest.raises(ValueError, match="it has no features; an object alone is not all of an im"):
        read_labels(tmp_path / "a.geojson", SHAPE)
    for text in ("[7]", "7", '{"features": [{"geometry": 7}]}', '[{"properties": [7]}]'):
        (tmp_path / "a.geojson").write_text(text)
        with pytest.raises(ValueError, match="not a readable GeoJSON file.*from QuPath"):
            read_labels(tmp_path / "a.geojson", SHAPE)


# ---------------------------------------------------------------- masks are not instances


@pytest.mark.parametrize("inst_map, words", [
    (scattered(33) * 255, "id 255 covers 33 separate pieces: a mask, not instances"),
    (scattered(2) * 255, "id 255 covers 2 separate pieces"),
    (scattered(2) > 0, "id 1 covers 2 separate pieces"),
    (scattered(33) > 0, "id 1 covers 33 separate pieces"),
    (scattered(30, (1, 2, 3)), "covers 10 separate pieces.*label its connected components"),
    (scattered(4, (1, 2)), "id 1 covers 2 separate pieces.*ids: 2, pieces in all: 4"),
    (scattered(80, range(1, 51)), "ids: 50, pieces in all: 80"),  # 8 bits that began anew
    (1 - scattered(20), "id 1 covers 95% of the image; background must be 0"),
])
def test_masks_and_class_maps_are_refused(tmp_path, inst_map, words):
    np.save(tmp_path / "mask.npy", inst_map)
    with pytest.raises(ValueError, match=f"mask.npy: .*{words}"):
        read_labels(tmp_path / "mask.npy", inst_map.shape)
    if inst_map.dtype == bool:
        Image.fromarray(inst_map).save(tmp_path / "mask.png")
        with pytest.raises(ValueError, match=f"mask.png: .*{words}"):
            read_labels(tmp_path / "mask.png", inst_map.shape)


def test_true_instance_maps_may_have_a_few_ids_in_pieces(tmp_path):
    whole = scattered(40, range(1, 41))
    for changed in ({2: 1, 4: 3}, {}):  # two nuclei of two pieces each, as in real sets
        inst_map = whole.copy()
        for old, new in changed.items():
            inst_map[whole == old] = new
        inst_map[60:99:4, 60:99:4] = 5  # specks
        np.save(tmp_path / "a.npy", inst_map)
        assert read_labels(tmp_path / "a.npy", whole.shape)[1].size == 40 - len(changed)
    for inst_map in (whole * 0, (whole == 1) * 255, scattered(2)):  # none, one, one in two pieces
        np.save(tmp_path / "a.npy", inst_map)
        assert len(read_labels(tmp_path / "a.npy", whole.shape)[1]) <= 1
    assert count_pieces(scattered(5, (1, 2))).tolist() == [3, 2]


# ---------------------------------------------------------------- what wrong files get


def test_wrong_labels_end_in_a_sentence(tmp_path):
    labels = two_nuclei()
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    for name, value in (("float", 0.5), ("minus", -1), ("huge", 2**40), ("nan", np.nan)):
        np.save(tmp_path / f"{name}.npy", np.full(SHAPE, value))
    np.save(tmp_path / "text.npy", np.full(SHAPE, "a"))
    np.save(tmp_path / "two.npy", np.dstack([labels, labels]))
    np.savez(tmp_path / "other.npz", masks=labels)
    io.savemat(tmp_path / "other.mat", {"mask": labels})
    io.savemat(tmp_path / "complex.mat", {"inst_map": labels * 1j})
    (tmp_path / "text.mat").write_text("hello")
    (tmp_path / "v73.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\0" * 400)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray(labels).save(tmp_path / "pages.tif", save_all=True,
                                 append_images=[Image.fromarray(labels)])
    np.savez(tmp_path / "few.npz", inst_map=labels, inst_type=np.array([1]))
    np.savez(tmp_path / "types.npz", inst_map=labels, type_map=labels * 1000)
    np.savez(tmp_path / "size.npz", inst_map=labels, type_map=labels[:9])
    for name, words in {
        "pickle.npy": "not a readable label file", "float.npy": "values that are not all whole",
        "minus.npy": "int64 values that are not all whole numbers from 0", "nan.npy": "not all",
        "huge.npy": "from 0 to 2147483647", "text.npy": "<U1 values that are not all whole",
        "two.npy": r"labels are int32 \(64, 80, 2\), the .*classes apart, such as inst_map and ty",
        "other.npz": "no array inst_map in it; store", "other.mat": "no array inst_map in it",
        "complex.mat": "complex128 values that are not all whole",
        "text.mat": "not a readable label", "v73.mat": "7.3.*with -v7",
        "cut.png": "not a readable label file.*save it as",
        "colour.png": r"labels are uint8 \(64, 80, 3\).*no colours",
        "pages.tif": "2 pages; expected one",
        "few.npz": "1 classes for 2 nuclei", "types.npz": "type_map goes up to 8000",
        "size.npz": r"labels are int32 \(9, 80\), the image is \(64, 80\)",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            read_labels(tmp_path / name, SHAPE)
    with pytest.raises(FileNotFoundError, match="none.npy: no such label file"):
        read_labels(tmp_path / "none.npy", SHAPE)


def test_classes_are_matched_by_name_or_number():
    known = {"a": 1, "b": 2, "1": 1, "2": 2, "other": UNKNOWN_CLASS, "0": UNKNOWN_CLASS}
    ids = np.array([3, 5, 7, 9, 11, 13, 15])
    classes = {3: "a", 5: 2, 7: "2", 9: "other", 11: 0, 13: None}
    found = match_classes("x.json", ids, classes, known).tolist()
    assert found == [1, 2, 2, 255, 255, 255, 255]  # unlisted, 0 and null are unknown
    with pytest.raises(ValueError, match="x.json: id 5 is of class 'c', which is not among a, b"):
        match_classes("x.json", ids, {5: "c"}, known)
    with pytest.raises(ValueError, match="x.json: id 4 has a class but no pixels"):
        match_classes("x.json", ids, {4: "a"}, known)


def test_a_table_of_classes():
    names, known = class_table({1: "a", 2: "b", 3: "b"})
    assert names == ["a", "b"]
    assert known == {"0": 255, "a": 1, "1": 1, "b": 2, "2": 2, "3": 2}
    assert class_table({1: "nucleus"})[1]["0"] == 1  # where nobody has a class


def test_names_from_json(tmp_path):
    path = tmp_path / "names.json"
    for text, names in (('["a", "b"]', {1: "a", 2: "b"}),
                        ('{"3": "a", "5": null}', {3: "a", 5: ""})):
        path.write_text(text)
        assert read_names(path) == names
    for text in ("7", '{"a": "b"}', "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match="names.json: not a readable JSON file.*expected"):
            read_names(path)


def test_ids_are_numbered_without_gaps():
    inst_map, ids = number_ids(np.array([[0, 9], [4, 9]]))
    assert inst_map.tolist() == [[0, 2], [1, 2]] and ids.tolist() == [4, 9]
    assert number_ids(np.full((2, 2), 5))[0].tolist() == [[1, 1], [1, 1]]
